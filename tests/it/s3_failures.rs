//! Kills, dead volumes and rebuilds with objects of the S3 endpoint.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use crate::s3_multipart::{MIB, parts_etag};
use crate::support::cluster::{Cluster, Setup, assert_same_bytes};
use crate::support::commands::copy_folder;
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Conn, wait_until};
use crate::support::random::{random_bytes, seeded_rng};
use crate::support::reference;
use crate::support::s3::{AwsChunked, Client, Request, store};

const PATH: &str = "/bucket/k";

/// Sends all of a request, or all but its last bytes, and waits until every volume has data of it or holds it.
fn start(c: &Cluster, request: &Request, left: usize) -> Conn {
    let (head, body) = request.bytes();
    let mut conn = request.start();
    drop(head);
    conn.send(&body[..body.len() - left]);
    let arrived = || {
        let held = c.proxies.iter().filter(|proxy| proxy.held("PUT") > 0).count();
        held + c.volumes.iter().filter(|volume| volume.temporary_files() > 0).count() >= 2
    };
    wait_until("the body is on its way to the volumes", arrived);
    conn
}

fn kill_and_restart(c: &mut Cluster) {
    c.kill_master();
    c.each_proxy(|proxy| {
        proxy.drop_held("PUT");
        proxy.release("PUT");
    });
    c.start_master();
}

#[test]
fn a_write_that_is_killed_leaves_the_object_as_it_was() {
    let (mut c, s3) = store(Setup::new().proxied());
    let value = random_bytes(&mut seeded_rng(), 2 * MIB);
    let put = || s3.request("PUT", PATH).body(&value);
    let signed = AwsChunked { signed: true, sizes: vec![65536], transfer: true, ..AwsChunked::default() };
    let etag = s3.put(PATH, "before").expect(200).etag();
    let writes = [
        put(),
        put().aws_chunked(signed),
        put().header("If-Match", &etag),
        s3.request("PUT", PATH).header("x-amz-copy-source", PATH).header("x-amz-metadata-directive", "REPLACE"),
    ];
    for (n, request) in writes[..3].iter().enumerate() {
        // In the middle of the body, before the first byte reaches a volume, and between the last one and the flip.
        for (left, fault) in [(MIB, None), (0, Some(Fault::HoldRequest)), (0, Some(Fault::HoldAnswer))] {
            if let Some(fault) = fault {
                c.each_proxy(|proxy| proxy.set("PUT", fault));
            }
            let conn = start(&c, request, left);
            kill_and_restart(&mut c);
            drop(conn);
            let read = s3.get(PATH).expect(200);
            assert_eq!((read.text(), read.etag()), ("before".into(), etag.clone()), "write {n}, {left} bytes left");
            assert_eq!(s3.query("GET", "/bucket", "list-type=2", "").expect(200).elements("Size"), ["6"]);
        }
    }
    wait_until("the debris is deleted", || c.blobs().len() == 6);
    // A change of the metadata alone is one write of the index.
    writes[3].send().expect(200);
    c.kill_master();
    c.start_master();
    assert_eq!(s3.get(PATH).expect(200).etag(), etag);
    c.allow_debris(PATH);
    put().send().expect(200);
    c.assert_value(PATH, &value);
}

#[test]
fn a_part_that_is_killed_is_not_there_and_can_be_sent_again() {
    let (mut c, s3) = store(Setup::new().proxied());
    let value = random_bytes(&mut seeded_rng(), 2 * MIB);
    let upload = s3.create_upload(PATH);
    s3.put_part(PATH, &upload, 1, "first");
    let part =
        |number: &str| s3.request("PUT", PATH).query("partNumber", number).query("uploadId", &upload).body(&value);
    for (number, left, fault) in
        [("2", MIB, None), ("1", MIB, None), ("2", 0, Some(Fault::HoldAnswer)), ("1", 0, Some(Fault::HoldAnswer))]
    {
        if let Some(fault) = fault {
            c.each_proxy(|proxy| proxy.set("PUT", fault));
        }
        let conn = start(&c, &part(number), left);
        kill_and_restart(&mut c);
        drop(conn);
        let parts = s3.query("GET", PATH, &format!("uploadId={upload}"), "").expect(200);
        assert_eq!((parts.elements("PartNumber"), parts.elements("Size")), (vec!["1".into()], vec!["5".into()]));
    }
    let etag = part("1").send().expect(200).etag();
    s3.complete(PATH, &upload, &[(1, etag)]).expect(200);
    c.assert_value(PATH, &value);
    c.allow_debris(PATH);
    wait_until("the debris is deleted", || c.blobs().len() == 6);
}

#[test]
fn acknowledged_writes_survive_kills_under_load() {
    let (mut c, s3) = store(Setup::new().replicas(2).flags(&["-voltimeout", "20s"]));
    let mut random = seeded_rng();
    // For each client: the number of the last write that was acknowledged, and of the last one that was sent.
    let mut known = [(0_u32, 0_u32); 8];
    let value = |client: usize, n: u32| format!("{client} {n} ").repeat(1 + (n as usize * 37) % 3000);
    for round in 0..6 {
        let running = std::sync::atomic::AtomicBool::new(true);
        let s3 = &s3;
        thread::scope(|scope| {
            for (client, (acknowledged, sent)) in known.iter_mut().enumerate() {
                let running = &running;
                scope.spawn(move || {
                    while running.load(std::sync::atomic::Ordering::SeqCst) {
                        *sent += 1;
                        if write(s3, client, *sent, &value(client, *sent)) != Some(200) {
                            return;
                        }
                        *acknowledged = *sent;
                    }
                });
            }
            thread::sleep(Duration::from_millis(random.u64(80..300)));
            c.kill_master();
            running.store(false, std::sync::atomic::Ordering::SeqCst);
        });
        c.start_master();
        for (client, (acknowledged, sent)) in known.iter_mut().enumerate() {
            let answer = s3.get(format!("/bucket/{client}"));
            let read = if answer.status == 404 { 0 } else { answer.text().split(' ').nth(1).unwrap().parse().unwrap() };
            assert!(
                (*acknowledged..=*sent).contains(&read),
                "round {round}, client {client}: {read}, {acknowledged}..={sent}"
            );
            if read > 0 {
                assert_same_bytes(&answer.body, value(client, read).as_bytes(), "the value");
            }
            (*acknowledged, *sent) = (read, *sent);
        }
    }
    assert!(known.iter().all(|(acknowledged, _)| *acknowledged > 0), "{known:?}");
    c.kill_master();
    c.mkv(&["verify", "-repair"]).expect_success_except_debris();
    c.start_master();
    for upload in uploads(&s3) {
        s3.query("DELETE", &upload.0, &format!("uploadId={}", upload.1), "").expect(204);
    }
    (0..8).for_each(|client| c.allow_debris(format!("/bucket/{client}")));
    wait_until("the bucket and the objects are left", || c.blobs().len() == 2 * 9);
}

fn uploads(s3: &Client) -> Vec<(String, String)> {
    let page = s3.query("GET", "/bucket", "uploads", "").expect(200);
    page.elements("Key").iter().map(|key| format!("/bucket/{key}")).zip(page.elements("UploadId")).collect()
}

/// One write of a client that may lose its server. Returns the status of the last answer.
fn write(s3: &Client, client: usize, n: u32, value: &str) -> Option<u16> {
    let path = format!("/bucket/{client}");
    let ask = |request: Request| {
        let (head, body) = request.bytes();
        let mut conn = Conn::try_open(&s3.address).ok()?;
        let _ = conn.try_send(&[head, body].concat());
        conn.next_answer(&request.method).ok().flatten().filter(|answer| answer.status == 200)
    };
    if !n.is_multiple_of(3) {
        return ask(s3.request("PUT", &path).body(value)).map(|answer| answer.status);
    }
    let upload = ask(s3.request("POST", &path).query("uploads", ""))?.element("UploadId");
    let part = s3.request("PUT", &path).query("partNumber", "1").query("uploadId", &upload).body(value);
    let etag = ask(part)?.etag();
    let done = ask(s3.complete_request(&path, &upload, &[(1, etag)]))?;
    done.text().contains("CompleteMultipartUploadResult").then_some(200)
}

#[test]
fn reads_go_on_and_writes_fail_while_a_volume_is_down() {
    let (mut c, s3) = store(Setup::new().proxied());
    let value = random_bytes(&mut seeded_rng(), 3 * MIB);
    s3.put(PATH, &value).expect(200);
    // The first replica that is asked fails before its first byte.
    for status in [500, 404] {
        c.proxies[1..].iter().for_each(|proxy| proxy.set("GET", Fault::Answer(status)));
        for range in ["bytes=0-", "bytes=1000000-1000009"] {
            let answer = s3.request("GET", PATH).header("Range", range).send().expect(206);
            assert!(answer.body == value || answer.body == value[1_000_000..1_000_010], "{status}, {range}");
        }
    }
    c.each_proxy(|proxy| proxy.set("GET", Fault::Answer(500)));
    assert!([500, 503].contains(&s3.get(PATH).status));
    // HEAD and lists come from the index alone.
    s3.ask("HEAD", PATH).expect(200);
    assert_eq!(s3.query("GET", "/bucket", "list-type=2", "").expect(200).elements("Key"), ["k"]);
    // A volume dies in the middle: the client notices, because the body is short.
    c.each_proxy(|proxy| proxy.remove_faults());
    c.volumes[0].kill();
    for _ in 0..4 {
        assert_same_bytes(&s3.get(PATH).expect(200).body, &value, "the value");
    }
    let refused = s3.put("/bucket/new", "value").expect(503);
    assert!(["ServiceUnavailable", "SlowDown"].contains(&refused.element("Code").as_str()), "{}", refused.text());
    s3.get("/bucket/new").expect_code(404, "NoSuchKey");
    s3.put(PATH, "other").expect(503);
    assert_same_bytes(&s3.get(PATH).expect(200).body, &value, "the value");
    // A deletion is done once the index says so.
    s3.ask("DELETE", PATH).expect(204);
    s3.get(PATH).expect_code(404, "NoSuchKey");
    c.start_volumes();
    s3.put(PATH, "again").expect(200);
    c.assert_value(PATH, "again");
    // What was sent to a volume that gave no answer may appear for an hour.
    c.allow_debris(PATH);
    c.allow_debris("/bucket/new");
    wait_until("only the bucket and the object are left", || c.blobs().len() == 6);
}

#[test]
fn a_rebuild_says_what_of_s3_it_loses() {
    let (mut c, s3) = store(Setup::new().replicas(2));
    let large = vec![b'x'; 5 * MIB];
    s3.request("PUT", "/bucket/typed")
        .header("Content-Type", "text/x")
        .header("x-amz-meta-a", "b c")
        .body("v")
        .send()
        .expect(200);
    s3.put("/bucket/plain", "plain").expect(200);
    s3.put("/bucket/empty", "").expect(200);
    s3.put("/bucket/dir/", "").expect(200);
    s3.multipart("/bucket/parts", &[&large, b"tail"]);
    let etag = parts_etag(&[&large, b"tail"]);
    // An upload is no value.
    let upload = s3.create_upload("/bucket/under way");
    s3.put_part("/bucket/under way", &upload, 1, "part");
    let listed = s3.query("GET", "/bucket", "list-type=2", "").expect(200);
    let same = |s3: &Client| {
        let list = s3.query("GET", "/bucket", "list-type=2", "").expect(200);
        assert_eq!((list.elements("Key"), list.elements("ETag")), (listed.elements("Key"), listed.elements("ETag")));
        let typed = s3.get("/bucket/typed").expect(200);
        assert_eq!((typed.header("Content-Type"), typed.header("x-amz-meta-a")), (Some("text/x"), Some("b c")));
        assert!(s3.get("/bucket/empty").expect(200).body.is_empty());
        assert_eq!(s3.get("/bucket/parts").expect(200).etag(), etag);
    };
    if c.postgres.is_some() {
        // There is no old index to rebuild beside a database.
        same(&s3);
        s3.query("DELETE", "/bucket/under way", &format!("uploadId={upload}"), "").expect(204);
        return;
    }
    c.stop_master();
    // With the old index, here or elsewhere, nothing is lost.
    c.mkv(&["rebuild"]).expect(0);
    c.start_master();
    same(&s3);
    c.stop_master();
    copy_folder(&c.db(), &c.folder.join("backup"));
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("backup");
    // The part is named, as every blob is that a copy calls unfinished.
    c.mkv(&["rebuild", "-from", from.to_str().unwrap()]).expect(1).prints("/bucket/under way");
    c.start_master();
    same(&s3);
    c.stop_master();
    fs::remove_dir_all(c.db()).unwrap();
    // From blobs alone: three empty objects, one of them the bucket's, on two volumes each.
    c.mkv(&["rebuild", "-rehash"]).expect(0).prints("empty blobs").prints("left: 6");
    c.start_master();
    let list = s3.query("GET", "/bucket", "list-type=2", "").expect(200);
    let keys = list.elements("Key");
    assert!(["parts", "plain", "typed"].iter().all(|key| keys.iter().any(|k| k == key)), "{keys:?}");
    let parts = s3.get("/bucket/parts").expect(200);
    assert_same_bytes(&parts.body, &[&large, &b"tail"[..]].concat(), "the object");
    assert_eq!(parts.etag().trim_matches('"'), reference::md5(&parts.body));
    assert_eq!(s3.get("/bucket/typed").expect(200).header("Content-Type"), Some("binary/octet-stream"));
    let is_empty = |file: &PathBuf| fs::metadata(file).is_ok_and(|data| data.len() == 0);
    c.blobs().into_values().filter(is_empty).for_each(|file| fs::remove_file(file).unwrap());
}
