//! S3 through the front, and redirects to the volumes.

use std::fs;

use crate::front_proxy::{FrontProxy, file_path};
use crate::support::cluster::{Cluster, Setup, assert_same_bytes};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Answer, follow, target};
use crate::support::random::{random_bytes, seeded_rng};
use crate::support::reference;
use crate::support::s3::{Client, store};

/// A request with a presigned URL through the front. Returns its status and head, and its body.
fn curl(front: &FrontProxy, target: &str, args: &[&str]) -> (String, String, Vec<u8>) {
    let (status, body) =
        front.curl_at(&front.s3, &[&["-D", "-", "--path-as-is", "-H", "Expect:"], args].concat(), target);
    let end = crate::support::http_client::find(&body, b"\r\n\r\n").map_or(0, |end| end + 4);
    (status, String::from_utf8_lossy(&body[..end]).to_ascii_lowercase(), body[end..].to_vec())
}

/// A store behind the front, whose volumes answer nobody but mkv, and a client that signs for the front's address.
fn store_behind_front() -> (Cluster, FrontProxy, Client) {
    let (c, s3) = store(Setup::new().secret().proxied().flags(&["-accel"]));
    let front = FrontProxy::start(&c);
    let s3 = Client { host: front.s3.clone(), ..s3 };
    (c, front, s3)
}

fn asked(c: &Cluster) -> usize {
    c.proxies.iter().map(|proxy| proxy.seen("GET").len()).sum()
}

#[test]
fn the_front_reads_values_from_the_volumes() {
    let (c, front, s3) = store_behind_front();
    let value = random_bytes(&mut seeded_rng(), 3_000_000);
    let file = file_path(&c.folder, "value");
    fs::write(&file, &value).expect("the file can be written");
    let key = "/bucket/a b//../é+";
    let put = s3.request("PUT", key).presigned(60);
    let (status, head, _) =
        curl(&front, &put, &["-T", &file, "-H", "Content-Type: text/x; a=b", "-H", "Cache-Control: no-store"]);
    assert!(status.starts_with("200 "), "{status}");
    let etag = format!("\"{}\"", reference::md5(&value));
    assert!(head.contains(&format!("etag: {etag}")), "{head}");
    c.assert_value(key, &value);
    let get = s3.request("GET", key).presigned(60);
    let before = asked(&c);
    let (status, head, body) = curl(&front, &get, &[]);
    assert!(status.starts_with("200 "), "{status}");
    assert_same_bytes(&body, &value, "the value through the front");
    for line in [
        "content-type: text/x; a=b",
        "cache-control: no-store",
        "accept-ranges: bytes",
        "content-length: 3000000",
        &format!("etag: {etag}"),
    ] {
        assert_eq!(head.matches(&format!("{line}\r\n")).count(), 1, "{line}: {head}");
    }
    assert_eq!(head.matches("last-modified: ").count(), 1, "{head}");
    assert!(!head.contains("x-mkv-") && !head.contains("x-accel"), "{head}");
    assert_eq!(asked(&c), before + 1, "the front reads from one volume");
    let (status, head, body) = curl(&front, &get, &["-r", "1000000-1000999"]);
    assert!(status.starts_with("206 ") && body == value[1_000_000..1_001_000], "{status}");
    assert!(head.contains("content-range: bytes 1000000-1000999/3000000"), "{head}");
    for (args, status) in [
        (["-r", "3000000-"], "416 "),
        (["-H", &format!("If-None-Match: {etag}")], "304 "),
        (["-H", "If-Match: \"other\""], "412 "),
        (["-H", &format!("If-Match: {etag}")], "200 "),
        (["-H", "X-Mkv-Failed: x"], "200 "),
    ] {
        let answer = curl(&front, &get, &args);
        assert!(answer.0.starts_with(status), "{args:?}: {}", answer.0);
    }
    let over = s3.request("GET", key).query("response-content-type", "image/png").presigned(60);
    assert!(curl(&front, &over, &[]).1.contains("content-type: image/png\r\n"));
    // Metadata of any name.
    let put = s3.request("PUT", "/bucket/meta").header("x-amz-meta-some-name", "1").header("x-amz-meta-mtime", "2");
    let signed = put.presigned(60);
    let meta = ["-H", "x-amz-meta-some-name: 1", "-H", "x-amz-meta-mtime: 2"];
    assert!(curl(&front, &signed, &[&meta[..], &["-T", &file]].concat()).0.starts_with("200 "));
    for method in ["GET", "HEAD"] {
        let target = s3.request(method, "/bucket/meta").presigned(60);
        let (_, head, body) = curl(&front, &target, if method == "HEAD" { &["-I"] } else { &[] });
        assert!(head.contains("x-amz-meta-some-name: 1\r\n") && head.contains("x-amz-meta-mtime: 2\r\n"), "{head}");
        assert!(method == "HEAD" || body == value);
    }
    // Empty objects, missing ones, lists, refusals.
    assert!(
        curl(&front, &s3.request("PUT", "/bucket/empty").presigned(60), &["-X", "PUT", "-H", "Content-Length: 0"])
            .0
            .starts_with("200 ")
    );
    let (status, _, body) = curl(&front, &s3.request("GET", "/bucket/empty").presigned(60), &[]);
    assert!(status.starts_with("200 ") && body.is_empty(), "{status}");
    let (status, _, body) = curl(&front, &s3.request("GET", "/bucket/none").presigned(60), &[]);
    assert!(status.starts_with("404 ") && String::from_utf8_lossy(&body).contains("NoSuchKey"), "{status}");
    let (status, _, body) = curl(&front, &s3.request("GET", "/bucket").queries("list-type=2").presigned(60), &[]);
    assert!(status.starts_with("200 ") && String::from_utf8_lossy(&body).contains("<Key>meta</Key>"), "{status}");
    assert!(curl(&front, &target(key), &[]).0.starts_with("40"));
}

#[test]
fn the_front_reads_another_replica_when_a_volume_fails() {
    let (mut c, front, s3) = store_behind_front();
    c.s3().put("/bucket/k", "value").expect(200);
    let get = s3.request("GET", "/bucket/k").presigned(600);
    for status in [500, 404, 403] {
        c.proxies[1..].iter().for_each(|proxy| proxy.set("GET", Fault::Answer(status)));
        for args in [&[][..], &["-r", "0-"]] {
            let (status, head, body) = curl(&front, &get, args);
            assert!(status.starts_with('2') && body == b"value", "{status}");
            assert_eq!(head.matches("content-type: ").count(), 1, "{head}");
        }
    }
    c.each_proxy(|proxy| proxy.set("GET", Fault::Answer(500)));
    assert!(curl(&front, &get, &[]).0.starts_with("503 "));
    c.each_proxy(|proxy| proxy.remove_faults());
    c.volumes[0].kill();
    for _ in 0..4 {
        assert_eq!(curl(&front, &get, &[]).2, b"value");
    }
}

/// A GET by a client that calls itself this.
fn get_as(s3: &Client, path: &str, agent: &str) -> Answer {
    s3.request("GET", path).header("User-Agent", agent).send()
}

#[test]
fn clients_that_follow_are_redirected() {
    let (mut c, s3) = store(Setup::new().secret().flags(&["-s3redirect"]));
    s3.put("/bucket/k", "value").expect(200);
    s3.request("PUT", "/bucket/typed").header("Content-Type", "text/x").body("value").send().expect(200);
    for agent in ["rclone/v1.75.2", "MinIO (Linux; x86_64) minio-py/7.2.20", "object_store/0.13.1"] {
        let answer = get_as(&s3, "/bucket/k", agent);
        assert!([302, 307].contains(&answer.status), "{agent}: {}", answer.status);
        let read = follow(&answer).expect(200);
        assert_eq!(read.text(), "value");
        assert!(s3.request("HEAD", "/bucket/k").header("User-Agent", agent).send().status == 200);
        get_as(&s3, "/bucket/none", agent).expect_code(404, "NoSuchKey");
    }
    for agent in [
        "Boto3/1.44.8 md/Botocore#1.44.8 ua/2.1 os/linux",
        "aws-cli/1.46.3 md/Botocore#1.43.62",
        "MinIO (linux; amd64) minio-go/v7.0.46",
        "aws-sdk-js/3.1175.0",
        "curl/7.88.1",
        "",
    ] {
        let answer = get_as(&s3, "/bucket/k", agent).expect(200);
        assert_eq!(answer.text(), "value", "{agent}");
        assert_eq!(answer.etag().trim_matches('"'), reference::md5(b"value"));
    }
    // Without the flag nobody is.
    c.restart_with(&[]);
    get_as(&s3, "/bucket/k", "rclone/v1.75.2").expect(200);
}
