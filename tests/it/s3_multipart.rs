//! Multipart uploads of the S3 endpoint.

use std::time::Duration;

use crate::support::cluster::{Cluster, Setup, assert_same_bytes};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Answer, Conn, target, wait_until};
use crate::support::random::{random_bytes, seeded_rng};
use crate::support::reference;
use crate::support::s3::{AwsChunked, Client, checksum, store};

pub const MIB: usize = 1 << 20;

/// The ETag of an object that was completed of these parts.
pub fn parts_etag(parts: &[&[u8]]) -> String {
    let unhex = |text: &str| (0..16).map(|n| u8::from_str_radix(&text[2 * n..][..2], 16).unwrap()).collect::<Vec<u8>>();
    let digests: Vec<u8> = parts.iter().flat_map(|part| unhex(&reference::md5(part))).collect();
    format!("\"{}-{}\"", reference::md5(&digests), parts.len())
}

fn abort(s3: &Client, path: &str, upload: &str) -> Answer {
    s3.query("DELETE", path, &format!("uploadId={upload}"), "")
}

fn list_parts(s3: &Client, path: &str, upload: &str) -> Answer {
    s3.query("GET", path, &format!("uploadId={upload}"), "")
}

#[test]
fn parts_become_one_object() {
    let (c, s3) = store(Setup::new().replicas(2));
    let mut random = seeded_rng();
    let path = "/bucket/a b/é";
    let large = [random_bytes(&mut random, 5 * MIB), random_bytes(&mut random, 5 * MIB + 1)];
    let parts: [&[u8]; 3] = [&large[0], &large[1], b"tail"];
    let start =
        s3.request("POST", path).query("uploads", "").header("Content-Type", "text/x").header("x-amz-meta-a", "1");
    let start = start.send().expect(200);
    assert_eq!((start.element("Bucket").as_str(), start.element("Key").as_str()), ("bucket", "a b/é"));
    let upload = start.element("UploadId");
    // In any order; a part that is sent again replaces the first.
    let tail = s3.put_part(path, &upload, 10_000, "tail");
    s3.put_part(path, &upload, 7, "replaced");
    let second = s3.put_part(path, &upload, 7, &large[1]);
    let first = s3.put_part(path, &upload, 3, &large[0]);
    let unused = s3.put_part(path, &upload, 5, "unused");
    assert_eq!(unused.trim_matches('"'), reference::md5(b"unused"));
    s3.get(path).expect_code(404, "NoSuchKey");
    assert!(s3.query("GET", "/bucket", "list-type=2", "").elements("Key").is_empty());
    let listed = list_parts(&s3, path, &upload).expect(200);
    assert_eq!(listed.elements("PartNumber"), ["3", "5", "7", "10000"]);
    assert_eq!(listed.elements("Size"), [5 * MIB, 6, 5 * MIB + 1, 4].map(|size| size.to_string()));
    assert_eq!(listed.elements("ETag"), [&first, &unused, &second, &tail].map(String::from));
    let page = s3.query("GET", path, &format!("uploadId={upload}&max-parts=2&part-number-marker=3"), "").expect(200);
    assert_eq!(page.elements("PartNumber"), ["5", "7"]);
    assert_eq!((page.element("NextPartNumberMarker").as_str(), page.element("IsTruncated").as_str()), ("7", "true"));
    let uploads = s3.query("GET", "/bucket", "uploads", "").expect(200);
    assert_eq!((uploads.element("Key"), uploads.element("UploadId")), ("a b/é".to_string(), upload.clone()));
    assert!(s3.query("GET", "/bucket", "uploads&prefix=b", "").expect(200).elements("Key").is_empty());

    let chosen = [(3, first), (7, second), (10_000, tail)];
    let done = s3.complete(path, &upload, &chosen).expect(200);
    let etag = parts_etag(&parts);
    assert_eq!((done.element("ETag"), done.element("Key").as_str()), (etag.clone(), "a b/é"));
    for method in ["GET", "HEAD"] {
        let answer = s3.ask(method, path).expect(200);
        assert_eq!(
            (answer.etag(), answer.header("Content-Type"), answer.header("x-amz-meta-a")),
            (etag.clone(), Some("text/x"), Some("1"))
        );
        assert_eq!(answer.header("Content-Length"), Some((10 * MIB + 5).to_string().as_str()));
    }
    assert_same_bytes(&s3.get(path).body, &parts.concat(), "the object");
    let range =
        s3.request("GET", path).header("Range", format!("bytes={}-{}", 5 * MIB - 2, 5 * MIB + 1)).send().expect(206);
    assert_same_bytes(&range.body, &[&large[0][5 * MIB - 2..], &large[1][..2]].concat(), "a range over two parts");
    assert_eq!(s3.query("GET", "/bucket", "list-type=2", "").expect(200).element("ETag"), etag);
    c.assert_value(path, parts.concat());
    // The same answer again, as after a lost one.
    assert_eq!(s3.complete(path, &upload, &chosen).expect(200).element("ETag"), etag);
    list_parts(&s3, path, &upload).expect_code(404, "NoSuchUpload");
    assert!(s3.query("GET", "/bucket", "uploads", "").expect(200).elements("Key").is_empty());
    // A copy of it keeps value and type, and has an ETag of its own value.
    s3.request("PUT", "/bucket/copy").header("x-amz-copy-source", target(path)).send().expect(200);
    assert_same_bytes(&s3.get("/bucket/copy").expect(200).body, &parts.concat(), "the copy");
    s3.put(path, "a plain object").expect(200);
    assert_eq!(s3.get(path).etag().trim_matches('"'), reference::md5(b"a plain object"));
    s3.complete(path, &upload, &chosen).expect_code(404, "NoSuchUpload");
}

#[test]
fn parts_have_their_rules() {
    let (c, s3) = store(Setup::new().volumes(1));
    let path = "/bucket/k";
    let upload = s3.create_upload(path);
    let small: Vec<_> = (1..=2).map(|n| (n, s3.put_part(path, &upload, n, "small"))).collect();
    s3.complete(path, &upload, &small).expect_code(400, "EntityTooSmall");
    // Parts are verified as objects are.
    let part = || s3.request("PUT", path).query("partNumber", "1").query("uploadId", &upload).body("part");
    part().header("Content-MD5", reference::md5_base64(b"another")).send().expect_code(400, "BadDigest");
    part().header("x-amz-checksum-crc32", checksum("crc32", b"another")).send().expect_code(400, "BadDigest");
    let trailer = Some(("x-amz-checksum-crc64nvme".to_string(), checksum("crc64nvme", b"part")));
    part()
        .aws_chunked(AwsChunked { trailer, sizes: vec![3], transfer: true, ..AwsChunked::default() })
        .send()
        .expect(200);
    assert_eq!(list_parts(&s3, path, &upload).elements("Size"), ["4", "5"]);
    // An upload without parts, one that is aborted, one of a bucket that is not there.
    let none = s3.create_upload("/bucket/none");
    s3.complete("/bucket/none", &none, &[(1, "\"x\"".into())]).expect_code(400, "InvalidPart");
    abort(&s3, "/bucket/none", &none).expect(204);
    abort(&s3, "/bucket/none", &none).expect_code(404, "NoSuchUpload");
    abort(&s3, path, &upload).expect(204);
    part().send().expect_code(404, "NoSuchUpload");
    s3.complete(path, &upload, &small).expect_code(404, "NoSuchUpload");
    s3.query("POST", "/nobucket/k", "uploads", "").expect_code(404, "NoSuchBucket");
    c.wait_until_cleaned();
    assert_eq!(c.blobs().len(), 1, "the bucket's own: {:?}", c.blobs());
    // An empty part alone is an empty object, with the ETag of a multipart upload.
    let answer = s3.multipart("/bucket/empty", &[b""]);
    assert_eq!(answer.element("ETag"), parts_etag(&[b""]));
    assert!(s3.get("/bucket/empty").expect(200).body.is_empty());
}

#[test]
fn parts_are_copied_from_objects() {
    let (_c, s3) = store(Setup::new().volumes(1));
    let value = random_bytes(&mut seeded_rng(), 6 * MIB);
    s3.put("/bucket/source", &value).expect(200);
    let upload = s3.create_upload("/bucket/k");
    let copy = |number: usize, range: &str| {
        let request = s3.request("PUT", "/bucket/k").query("partNumber", number.to_string()).query("uploadId", &upload);
        let request = request.header("x-amz-copy-source", "/bucket/source");
        if range.is_empty() { request.send() } else { request.header("x-amz-copy-source-range", range).send() }
    };
    let first = copy(1, "").expect(200);
    assert!(first.text().contains("<CopyPartResult"), "{}", first.text());
    let second = copy(2, "bytes=10-19").expect(200).element("ETag");
    assert_eq!(second.trim_matches('"'), reference::md5(&value[10..20]));
    for range in ["bytes=0-99999999", "bytes=-5", "bytes=5-", "0-5", "bytes=9-3"] {
        let answer = copy(3, range);
        assert!([400, 416].contains(&answer.status), "{range}: {} {}", answer.status, answer.text());
    }
    s3.complete("/bucket/k", &upload, &[(1, first.element("ETag")), (2, second)]).expect(200);
    assert_same_bytes(&s3.get("/bucket/k").expect(200).body, &[&value[..], &value[10..20]].concat(), "the object");
}

/// The inodes of all blobs that hold this value: a blob that is copied gets another one.
fn inodes_with(c: &Cluster, value: &[u8]) -> Vec<u64> {
    use std::os::unix::fs::MetadataExt;
    let blobs = c.blobs().into_values().filter(|file| std::fs::read(file).is_ok_and(|bytes| bytes == value));
    let mut inodes: Vec<u64> = blobs.map(|file| std::fs::metadata(file).unwrap().ino()).collect();
    inodes.sort();
    inodes
}

#[test]
fn an_upload_of_one_part_becomes_the_object_without_a_copy() {
    let (c, s3) = store(Setup::new().proxied());
    let value = random_bytes(&mut seeded_rng(), 2 * MIB);
    s3.put("/bucket/k", "before").expect(200);
    let upload = s3.create_upload("/bucket/k");
    let etag = s3.put_part("/bucket/k", &upload, 1, &value);
    let before = inodes_with(&c, &value);
    assert!(before.len() >= 2, "a part has two replicas: {before:?}");
    let done = s3.complete("/bucket/k", &upload, &[(1, etag)]).expect(200);
    assert_eq!(done.element("ETag"), parts_etag(&[&value]));
    let after = inodes_with(&c, &value);
    // What was missing was made; what was there became the object's.
    assert!(after.len() == 3 && before.iter().all(|inode| after.contains(inode)), "{before:?}, then {after:?}");
    c.assert_value("/bucket/k", &value);
}

#[test]
fn uploads_survive_a_restart_and_the_cleaner() {
    let (mut c, s3) = store(Setup::new());
    let large = random_bytes(&mut seeded_rng(), 5 * MIB);
    let path = "/bucket/k";
    let upload = s3.create_upload(path);
    let first = s3.put_part(path, &upload, 1, &large);
    s3.put("/bucket/other", "value").expect(200);
    s3.ask("DELETE", "/bucket/other").expect(204);
    c.restart_master();
    let second = s3.put_part(path, &upload, 2, "tail");
    c.kill_master();
    c.start_master();
    // The cleaner works, and leaves the parts alone.
    s3.put("/bucket/other", "value").expect(200);
    c.replace("/bucket/other", "another").expect(201);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(list_parts(&s3, path, &upload).expect(200).elements("PartNumber"), ["1", "2"]);
    // DELETE of the key, and a value in between, concern the key alone.
    s3.ask("DELETE", path).expect(204);
    s3.put(path, "between").expect(200);
    c.ask("DELETE", path).expect(204);
    c.put(path, "native").expect(201);
    assert_eq!(s3.get(path).expect(200).text(), "native");
    let chosen = [(1, first), (2, second)];
    s3.complete(path, &upload, &chosen).expect(200);
    let parts: [&[u8]; 2] = [&large, b"tail"];
    c.assert_value(path, parts.concat());
    c.restart_master();
    // Also after a restart, the answer is the same.
    assert_eq!(s3.complete(path, &upload, &chosen).expect(200).element("ETag"), parts_etag(&parts));
    // Aborted after a restart.
    let upload = s3.create_upload("/bucket/aborted");
    s3.put_part("/bucket/aborted", &upload, 1, "part");
    c.kill_master();
    c.start_master();
    abort(&s3, "/bucket/aborted", &upload).expect(204);
    c.allow_debris("/bucket/aborted");
    wait_until("the bucket and two objects are left", || c.blobs().len() == 9);
}

#[test]
fn old_uploads_are_purged() {
    let (mut c, s3) = store(Setup::new().flags(&["-s3uploads", "2s"]));
    // The first look is at the start.
    let upload = s3.create_upload("/bucket/old");
    s3.put_part("/bucket/old", &upload, 1, "part");
    c.stop_master();
    std::thread::sleep(Duration::from_millis(2500));
    c.start_master();
    wait_until("the upload is purged", || list_parts(&s3, "/bucket/old", &upload).status == 404);
    c.wait_until_cleaned();
    assert_eq!(c.blobs().len(), 3, "the bucket's own: {:?}", c.blobs());
}

#[test]
fn a_completion_that_was_killed_is_completed_again() {
    let (mut c, s3) = store(Setup::new().proxied());
    let mut random = seeded_rng();
    let large = random_bytes(&mut random, 5 * MIB);
    let path = "/bucket/k";
    s3.put(path, "before").expect(200);
    for parts in [vec![&large[..], b"tail"], vec![&large[..]]] {
        // While its copies are on their way, and after their last byte.
        for fault in [Fault::HoldRequest, Fault::HoldAnswer] {
            let upload = s3.create_upload(path);
            let chosen: Vec<_> =
                parts.iter().enumerate().map(|(n, part)| (n + 1, s3.put_part(path, &upload, n + 1, part))).collect();
            c.each_proxy(|proxy| proxy.set("PUT", fault));
            let (head, body) = s3.complete_request(path, &upload, &chosen).bytes();
            let mut conn = Conn::open(&s3.address);
            conn.send([head, body].concat());
            wait_until("a copy is on its way", || c.proxies.iter().any(|proxy| proxy.held("PUT") > 0));
            c.kill_master();
            c.each_proxy(|proxy| {
                proxy.drop_held("PUT");
                proxy.release("PUT");
            });
            c.start_master();
            assert_ne!(s3.get(path).expect(200).body, parts.concat());
            assert_eq!(list_parts(&s3, path, &upload).expect(200).elements("PartNumber").len(), parts.len());
            if c.postgres.is_some() {
                // The key is the killed master's until its lease ends.
                wait_until("the upload can be completed", || s3.complete(path, &upload, &chosen).status == 200);
            }
            assert_eq!(s3.complete(path, &upload, &chosen).expect(200).element("ETag"), parts_etag(&parts));
            assert_same_bytes(&s3.get(path).expect(200).body, &parts.concat(), "the object");
            c.allow_debris(path);
            s3.put(path, "before").expect(200);
        }
    }
    wait_until("the bucket and the object are left", || c.blobs().len() == 6);
}

#[test]
fn conditions_of_a_completion_are_judged_at_its_end() {
    let (_c, s3) = store(Setup::new().volumes(1));
    let path = "/bucket/k";
    let start = || {
        let upload = s3.create_upload(path);
        let part = s3.put_part(path, &upload, 1, "part");
        (upload, [(1, part)])
    };
    let (upload, parts) = start();
    let create = s3.complete_request(path, &upload, &parts).header("If-None-Match", "*");
    let etag = s3.put(path, "there").expect(200).etag();
    create.send().expect_code(412, "PreconditionFailed");
    let matching = s3.complete_request(path, &upload, &parts).header("If-Match", &etag);
    s3.put(path, "another").expect(200);
    matching.send().expect_code(412, "PreconditionFailed");
    assert_eq!(s3.get(path).text(), "another");
    s3.ask("DELETE", path).expect(204);
    create.send().expect(200);
    assert_eq!(s3.get(path).text(), "part");
}

#[test]
fn a_long_completion_keeps_its_client_alive() {
    let (c, s3) = store(Setup::new().volumes(1).proxied());
    let path = "/bucket/k";
    let part = vec![b'x'; 5 * MIB];
    let start = || {
        let upload = s3.create_upload(path);
        let parts: Vec<_> = (1..=7).map(|n| (n, s3.put_part(path, &upload, n, &part))).collect();
        (upload, parts)
    };
    let (upload, parts) = start();
    let volume = &c.proxies[0];
    volume.set("PUT", Fault::HoldAnswer);
    let (head, body) = s3.complete_request(path, &upload, &parts).bytes();
    let mut conn = Conn::open(&s3.address);
    conn.send([head, body].concat());
    volume.wait_held("PUT", 1);
    // The head of the answer comes long before its end.
    assert!(conn.readable(Duration::from_secs(25)), "nothing came");
    assert_eq!(volume.held("PUT"), 1);
    volume.release("PUT");
    let answer = conn.answer().expect(200);
    assert!(answer.text().starts_with("<?xml"), "{}", answer.text());
    assert_eq!(answer.element("ETag"), parts_etag(&[&part[..]; 7]));
    // An error that comes so late is in the text, and the parts are still there.
    let (upload, parts) = start();
    volume.set("PUT", Fault::Answer(500));
    let answer = s3.complete(path, &upload, &parts);
    assert!(answer.status >= 500 || answer.status == 200 && answer.text().contains("<Error>"), "{answer:?}");
    volume.release("PUT");
    s3.complete(path, &upload, &parts).expect(200);
}
