//! Who may do what: signatures and keys of the S3 endpoint.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::cluster::{Cluster, Setup, signal};
use crate::support::commands::now;
use crate::support::http_client::{self, find, target, wait_until};
use crate::support::s3::{
    AwsChunked, Client, Key, OWNER, Payload, READER, Request, TENANT, TENANTS_BUCKET, UNSIGNED, store,
};

#[test]
fn signatures_are_verified() {
    let (c, s3) = store(Setup::new().volumes(1));
    s3.put("/bucket/a b", "value").expect(200);
    let get = || s3.request("GET", "/bucket/a b");
    for region in ["us-east-1", "eu-central-1", "mars"] {
        get().region(region).send().expect(200);
    }
    // The same target, spelled in other ways.
    for spelling in ["/bucket/a%20b", "/bucket/%61%20b", "/%62ucket/a%20%62"] {
        get().sent_as(spelling).send().expect(200);
    }
    let odd = "a b+c&d=e/é~*'()";
    get().query("x-id", odd).query("versionId", "null").query("response-content-language", odd).send().expect(200);
    get().header("x-amz-meta-spaces", "  a   b  ").header("X-Amz-Upper", "c").send().expect(200);
    get().at(now() - 800).send().expect(200);
    get().at(now() + 800).send().expect(200);
    get().payload(Payload::Plain(UNSIGNED.into())).send().expect(200);

    let with = |key: Key| s3.with_key(key).request("GET", "/bucket/a b");
    with(Key { secret: "wrong", ..OWNER }).send().expect_code(403, "SignatureDoesNotMatch");
    with(Key { secret: "", ..OWNER }).send().expect_code(403, "SignatureDoesNotMatch");
    with(Key { access: "AKIANOBODY", ..OWNER }).send().expect_code(403, "InvalidAccessKeyId");
    with(Key { secret: TENANT.secret, ..OWNER }).send().expect_code(403, "SignatureDoesNotMatch");
    get().at(now() - 1000).send().expect_code(403, "RequestTimeTooSkewed");
    get().at(now() + 1000).send().expect_code(403, "RequestTimeTooSkewed");
    get().sent_as("/bucket/other").send().expect_code(403, "SignatureDoesNotMatch");
    s3.with_key(None).get("/bucket/a b").expect_code(403, "AccessDenied");
    s3.with_key(None).ask("HEAD", "/bucket/a b").expect(403);
    s3.with_key(None).put("/bucket/new", "value").expect_code(403, "AccessDenied");
    s3.with_key(None).get("/").expect_code(403, "AccessDenied");
    // A signed request that was changed on its way.
    let (head, _) = get().header("Range", "bytes=0-1").query("x-id", "1").bytes();
    let text = String::from_utf8(head).unwrap();
    for (from, to) in [
        ("GET ", "PUT "),
        ("bytes=0-1", "bytes=0-3"),
        ("x-id=1", "x-id=2"),
        ("x-id=1", "x-id=1&delete"),
        ("Signature=", "Signature=0"),
        ("SignedHeaders=", "SignedHeaders=x-amz-none;"),
        ("Host: mkv.test", "Host: other.test"),
    ] {
        assert!(text.contains(from), "{text}");
        let mut conn = http_client::Conn::open(&s3.address);
        let answer = conn.send(text.replacen(from, to, 1)).answer();
        assert!([400, 403].contains(&answer.status), "{from} to {to}: {}", answer.text());
    }
    for broken in [
        "AWS4-HMAC-SHA256",
        "AWS4-HMAC-SHA256 Credential=x",
        "AWS4-HMAC-SHA256 Credential=a/b/c/d/e, SignedHeaders=host, Signature=f",
        "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/ec2/aws4_request, SignedHeaders=host, Signature=f",
        "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request,SignedHeaders=,Signature=",
        "Basic dXNlcjpwYXNz",
        "Bearer token",
        "AWS AKIA:c2lnbmF0dXJl",
    ] {
        let answer = s3.with_key(None).request("GET", "/bucket/a b").header("Authorization", broken).send();
        assert!([400, 403].contains(&answer.status), "{broken}: {} {}", answer.status, answer.text());
    }
    assert_eq!(c.live().len(), 2);
}

#[test]
fn an_amz_header_that_is_not_signed_has_no_effect() {
    let (_c, s3) = store(Setup::new().volumes(1));
    s3.put("/bucket/source", "secret").expect(200);
    let put = || s3.request("PUT", "/bucket/k").body("value");
    let smuggled = [
        ("x-amz-meta-a", "1"),
        ("x-amz-copy-source", "/bucket/source"),
        ("x-amz-metadata-directive", "REPLACE"),
        ("x-amz-security-token", "token"),
    ];
    for (name, value) in smuggled {
        let answer = put().unsigned_header(name, value).send();
        assert!([200, 403].contains(&answer.status), "{name}: {}", answer.text());
        if answer.status == 200 {
            let read = s3.get("/bucket/k").expect(200);
            assert_eq!((read.text().as_str(), read.header("x-amz-meta-a")), ("value", None), "{name}");
        }
    }
}

#[test]
fn keys_have_their_limits() {
    let (c, s3) = store(Setup::new().volumes(1));
    s3.put(format!("/{TENANTS_BUCKET}"), "").expect(200);
    s3.put("/bucket/k", "value").expect(200);
    let (reader, tenant) = (s3.with_key(READER), s3.with_key(TENANT));
    assert_eq!(reader.get("/bucket/k").expect(200).text(), "value");
    reader.ask("HEAD", "/bucket").expect(200);
    reader.query("GET", "/bucket", "list-type=2", "").expect(200);
    reader.get("/").expect(200);
    let before = c.live();
    let upload = s3.create_upload("/bucket/under way");
    let uploads = format!("partNumber=1&uploadId={upload}");
    for (method, path, query, body) in [
        ("PUT", "/bucket/k", "", "other"),
        ("PUT", "/bucket/new", "", "other"),
        ("DELETE", "/bucket/k", "", ""),
        ("PUT", "/new-bucket", "", ""),
        ("DELETE", "/bucket", "", ""),
        ("POST", "/bucket", "delete", "<Delete><Object><Key>k</Key></Object></Delete>"),
        ("POST", "/bucket/k", "uploads", ""),
        ("PUT", "/bucket/under way", &uploads, "part"),
    ] {
        reader.query(method, path, query, body).expect_code(403, "AccessDenied");
    }
    assert_eq!(c.live(), before);
    assert_eq!(s3.get("/bucket/k").expect(200).text(), "value");
    let own = format!("/{TENANTS_BUCKET}/k");
    tenant.put(&own, "mine").expect(200);
    assert_eq!(tenant.get(&own).expect(200).text(), "mine");
    for (method, path) in [
        ("GET", "/bucket/k"),
        ("PUT", "/bucket/k"),
        ("HEAD", "/bucket"),
        ("PUT", "/new-bucket"),
        ("DELETE", "/bucket/k"),
    ] {
        assert_eq!(tenant.ask(method, path).status, 403, "{method} {path}");
    }
    // Neither may a source of a copy be read that the key cannot read.
    let copy = tenant.request("PUT", &own).header("x-amz-copy-source", "/bucket/k").send();
    copy.expect_code(403, "AccessDenied");
    assert_eq!(tenant.get("/").expect(200).elements("Name"), [TENANTS_BUCKET]);
    s3.query("DELETE", "/bucket/under way", &format!("uploadId={upload}"), "").expect(204);
}

/// Sends a head that asks for 100 Continue; the answer must come at once, end the connection, and store nothing.
fn assert_refused_before_the_body(c: &Cluster, request: Request, status: u16) {
    let body = vec![b'v'; 1_000_000];
    let mut conn = request.body(&body).unsigned_header("Expect", "100-continue").start();
    let answer = conn.next_answer("PUT").unwrap().expect("an answer");
    assert_eq!(answer.status, status, "{}", answer.text());
    assert!(conn.read_until_closed().is_empty());
    assert!(c.keys_with_debris().is_empty() && c.volumes.iter().all(|volume| volume.temporary_files() == 0));
}

#[test]
fn a_request_is_refused_before_its_body() {
    let (c, s3) = store(Setup::new());
    let put = |s3: &Client| s3.request("PUT", "/bucket/k");
    assert_refused_before_the_body(&c, put(&s3.with_key(Key { secret: "wrong", ..OWNER })), 403);
    assert_refused_before_the_body(&c, put(&s3.with_key(READER)), 403);
    assert_refused_before_the_body(&c, put(&s3.with_key(TENANT)), 403);
    assert_refused_before_the_body(&c, put(&s3.with_key(None)), 403);
    assert_refused_before_the_body(&c, put(&s3).at(now() - 2000), 403);
    assert_refused_before_the_body(&c, s3.request("PUT", "/none/k"), 404);
    assert_refused_before_the_body(&c, put(&s3).payload(Payload::Plain("NONSENSE".into())), 400);
    assert_refused_before_the_body(&c, put(&s3).header("x-amz-server-side-encryption", "aws:kms"), 501);
    assert_refused_before_the_body(&c, put(&s3).header("x-amz-checksum-crc32", "junk"), 400);
    assert_refused_before_the_body(&c, put(&s3).query("tagging", ""), 501);
    assert_refused_before_the_body(&c, put(&s3).query("partNumber", "1").query("uploadId", "none"), 404);
    // Without Expect, a body that is never sent does not hold back the refusal either.
    let mut conn = put(&s3.with_key(READER)).body(vec![b'v'; 1_000_000]).start();
    conn.answer().expect_code(403, "AccessDenied");
}

#[test]
fn continue_comes_before_the_first_byte_of_the_body_and_for_an_empty_one() {
    let (c, s3) = store(Setup::new().volumes(1));
    for body in ["value", ""] {
        for chunked in [false, true] {
            let mut request = s3.request("PUT", "/bucket/k").body(body).unsigned_header("Expect", "100-continue");
            if chunked {
                request = request.aws_chunked(AwsChunked { signed: true, transfer: true, ..AwsChunked::default() });
            }
            let (head, sent) = request.bytes();
            let mut conn = http_client::Conn::open(&s3.address);
            conn.send(head);
            let interim = conn.next_answer("PUT").unwrap().expect("an answer");
            assert_eq!(interim.status, 100, "{body:?}, chunked {chunked}");
            conn.send(sent).answer().expect(200);
            // The connection is at the start of a request.
            let (head, _) = s3.request("GET", "/bucket/k").bytes();
            assert_eq!(conn.send(head).answer().expect(200).text(), body);
        }
    }
    c.assert_value("/bucket/k", "");
}

#[test]
fn keys_are_read_again_on_sighup() {
    let (c, s3) = store(Setup::new().volumes(1));
    let file = c.s3_keys().unwrap();
    let new = Key { access: "NEWNEWNEWNEWNEWNEW01", secret: "newsecret/+=newsecretnewsecretnewsecret00" };
    let client = s3.with_key(new);
    client.get("/").expect_code(403, "InvalidAccessKeyId");
    fs::write(&file, format!("# new\n\n{} {} bucket\n", new.access, new.secret)).unwrap();
    let mut waiting = s3.request("PUT", "/bucket/k").body("value").start();
    waiting.send("val");
    wait_until("the request is under way", || !c.keys_with_debris().is_empty());
    signal(c.master_pid(), Signal::HUP);
    wait_until("the new key works", || client.get("/bucket").status == 200);
    s3.get("/").expect_code(403, "InvalidAccessKeyId");
    // A request that began before is carried out.
    waiting.send("ue").answer().expect(200);
    // A file that cannot be read, or is wrong, leaves the keys as they are.
    for content in ["only-one-word\n", "a b c\na d\n", "\u{fffd} ro ro\n"] {
        let before = c.log().len();
        fs::write(&file, content).unwrap();
        signal(c.master_pid(), Signal::HUP);
        std::thread::sleep(Duration::from_millis(100));
        if c.log()[before..].contains("s3keys") {
            client.get("/bucket").expect(200);
        }
    }
    fs::remove_file(&file).unwrap();
    signal(c.master_pid(), Signal::HUP);
    wait_until("the log names the file", || c.log().matches(file.to_str().unwrap()).count() > 0);
    client.get("/bucket").expect(200);
}

#[test]
fn without_keys_the_endpoint_is_open_and_says_so() {
    let port = crate::support::s3::PORT.to_string();
    let mut c = Setup::new().volumes(1).flags(&["-s3", &port]).start();
    let warning = |log: &str| log.lines().any(|line| line.contains("WARN") && line.contains("-s3keys"));
    assert!(warning(&c.log()), "{}", c.log());
    let s3 = c.s3();
    for client in [s3.with_key(None), s3.clone(), s3.with_key(Key { access: "ANY", secret: "thing" })] {
        client.put("/bucket", "").expect(200);
        client.put("/bucket/k", "value").expect(200);
        assert_eq!(client.get("/bucket/k").expect(200).text(), "value");
        let chunked = AwsChunked { signed: true, sizes: vec![3], ..AwsChunked::default() };
        if client.key.is_some() {
            client.request("PUT", "/bucket/chunked").body("chunked value").aws_chunked(chunked).send().expect(200);
            assert_eq!(client.get("/bucket/chunked").text(), "chunked value");
        }
    }
    // The file of keys has to be there at the start, and should be private.
    let file = c.folder.join("keys");
    let flags = ["-s3", &port, "-s3keys", file.to_str().unwrap()];
    c.stop_master();
    c.setup = c.setup.clone().flags(&flags);
    let refused = || {
        let output = c.master_command().output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && error.contains(file.to_str().unwrap()), "{output:?}");
        assert!(!error.contains("secretword"), "{error}");
    };
    refused();
    for content in ["one\n", "a secretword\na secretword\n"] {
        fs::write(&file, content).unwrap();
        refused();
    }
    fs::write(&file, crate::support::s3::keys_file()).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let before = c.log().len();
    c.start_master();
    let log = c.log().split_off(before);
    assert!(log.lines().any(|line| line.contains("WARN") && line.contains("600")), "{log}");
    c.s3().get("/bucket/k").expect(200);
    c.s3().with_key(None).get("/bucket/k").expect_code(403, "AccessDenied");
}

#[test]
fn s3key_makes_a_pair_that_works() {
    let (c, s3) = store(Setup::new().volumes(1));
    let made = |c: &Cluster| c.mkv(&["s3key"]).expect(0).out;
    let line = made(&c);
    assert_ne!(line, made(&c));
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!((words.len(), words[0].len(), words[1].len()), (2, 20, 40), "{line}");
    let file = c.s3_keys().unwrap();
    fs::write(&file, fs::read_to_string(&file).unwrap() + line.trim_end() + " ro\n").unwrap();
    signal(c.master_pid(), Signal::HUP);
    let key = Key { access: words[0].to_string().leak(), secret: words[1].to_string().leak() };
    wait_until("the new key works", || s3.with_key(key).get("/").status == 200);
    s3.with_key(key).put("/bucket/k", "value").expect_code(403, "AccessDenied");
    // Neither secret is in the log.
    s3.put("/bucket/k", "value").expect(200);
    assert!(!c.log().contains(key.secret) && !c.log().contains(OWNER.secret));
    assert!(find(c.log().as_bytes(), target("Signature=").as_bytes()).is_none());
}
