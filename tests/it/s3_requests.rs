//! Hostile requests to the S3 endpoint: XML, queries and heads. Each has an answer, and none costs much.

use std::time::{Duration, Instant};

use crate::support::cluster::Setup;
use crate::support::http_client::{Conn, find};
use crate::support::random::{random_bytes, seeded_rng};
use crate::support::s3::{Client, complete_xml, store};

/// Documents that no parser should spend much on.
fn hostile_documents() -> Vec<String> {
    let object = "<Object><Key>k</Key></Object>";
    let laughs: String =
        (1..10).map(|n| format!("<!ENTITY l{n} \"{}\">", format!("&l{};", n - 1).repeat(10))).collect();
    vec![
        String::new(),
        "no XML".into(),
        "<".into(),
        "<Delete".into(),
        "<Delete>".into(),
        format!("<Delete>{object}"),
        format!("<Delete>{object}</Delet>"),
        format!("<Delete>{object}</Delete><Delete/>"),
        "<Other/>".into(),
        "<Delete><Object><Key>&undefined;</Key></Object></Delete>".into(),
        "<Delete><Object><Key>&#xFFFFFFFF;</Key></Object></Delete>".into(),
        "<Delete><Object><Key>k</Key><Key>l</Key></Object></Delete>".into(),
        "<Delete><Object></Object></Delete>".into(),
        format!("<!DOCTYPE Delete [<!ENTITY l0 \"lol\">{laughs}]><Delete><Object><Key>&l9;</Key></Object></Delete>"),
        "<!DOCTYPE d [<!ENTITY x SYSTEM \"file:///etc/passwd\">]><Delete><Object><Key>&x;</Key></Object></Delete>"
            .into(),
        format!("<!DOCTYPE Delete><Delete>{object}</Delete>"),
        "<a>".repeat(100_000),
        format!("<Delete>{}{object}{}</Delete>", "<a>".repeat(50_000), "</a>".repeat(50_000)),
        format!("<Delete {}></Delete>", (0..100_000).map(|n| format!("a{n}='' ")).collect::<String>()),
        format!("<Delete><Object><Key>{}</Key></Object></Delete>", "k".repeat(9 << 20)),
        format!("<!--{}-->", "c".repeat(9 << 20)),
    ]
}

#[test]
fn hostile_documents_are_refused() {
    let (c, s3) = store(Setup::new().volumes(1));
    s3.put("/bucket/k", "value").expect(200);
    let upload = s3.create_upload("/bucket/m");
    let etag = s3.put_part("/bucket/m", &upload, 1, "part");
    for document in hostile_documents() {
        let what = &document[..document.len().min(60)];
        let started = Instant::now();
        let complete = document.replace("Delete", "CompleteMultipartUpload").replace("Object", "Part");
        let id = format!("uploadId={upload}");
        for (method, path, query, document) in [
            ("POST", "/bucket", "delete", &document),
            ("POST", "/bucket/m", id.as_str(), &complete),
            ("PUT", "/new-bucket", "", &document),
        ] {
            // Bucket configurations may be missing.
            let answer = s3.query(method, path, query, document);
            let expected = if document.is_empty() && method == "PUT" { 200..201 } else { 400..500 };
            assert!(expected.contains(&answer.status), "{path}, {what:?}: {} {}", answer.status, answer.text());
            s3.ask("DELETE", "/new-bucket");
        }
        assert!(started.elapsed() < Duration::from_secs(5), "{what:?} took {:?}", started.elapsed());
    }
    assert_eq!(s3.get("/bucket/k").expect(200).text(), "value");
    s3.complete("/bucket/m", &upload, &[(1, etag)]).expect(200);
    assert!(c.memory_kib("VmHWM") < 200 << 10, "{} KiB", c.memory_kib("VmHWM"));
}

#[test]
fn documents_are_bounded_before_they_are_read() {
    let (_c, s3) = store(Setup::new().volumes(1));
    let mut request = s3.request("POST", "/bucket").query("delete", "");
    request = request.payload(crate::support::s3::Payload::Plain(crate::support::s3::UNSIGNED.into()));
    let (head, _) = request.bytes();
    let head = String::from_utf8(head).unwrap().replace("Content-Length: 0", "Content-Length: 99999999999");
    Conn::open(&s3.address).send(head).answer().expect(400);
}

#[test]
fn parts_of_a_completion_are_checked() {
    let (_c, s3) = store(Setup::new().volumes(1));
    let upload = s3.create_upload("/bucket/m");
    let large = vec![b'x'; 5 << 20];
    let (one, two) = (s3.put_part("/bucket/m", &upload, 1, &large), s3.put_part("/bucket/m", &upload, 2, "tail"));
    let complete = |parts: &[(usize, String)]| s3.complete("/bucket/m", &upload, parts);
    complete(&[(2, two.clone()), (1, one.clone())]).expect_code(400, "InvalidPartOrder");
    complete(&[(1, one.clone()), (1, one.clone())]).expect_code(400, "InvalidPartOrder");
    complete(&[(1, two.clone())]).expect_code(400, "InvalidPart");
    complete(&[(3, one.clone())]).expect_code(400, "InvalidPart");
    complete(&[(0, one.clone())]).expect(400);
    complete(&[(10_001, one.clone())]).expect(400);
    complete(&[]).expect_code(400, "MalformedXML");
    let many: Vec<_> = (1..=10_001).map(|n| (n, one.clone())).collect();
    complete(&many).expect_code(400, "MalformedXML");
    for bad in ["<PartNumber>x</PartNumber>", "<PartNumber>99999999999</PartNumber>", ""] {
        let text = complete_xml(&[(1, one.clone())]).replace("<PartNumber>1</PartNumber>", bad);
        s3.query("POST", "/bucket/m", &format!("uploadId={upload}"), text).expect(400);
    }
    s3.get("/bucket/m").expect_code(404, "NoSuchKey");
    complete(&[(1, one), (2, two)]).expect(200);
}

/// Sends bytes, and reads an answer if there is one.
fn send(s3: &Client, bytes: &[u8]) -> Option<u16> {
    let mut conn = Conn::open(&s3.address);
    let _ = conn.try_send(bytes);
    let _ = conn.shutdown_write();
    conn.next_answer("GET").ok()?.map(|answer| answer.status)
}

#[test]
fn random_damage_to_a_request_is_answered() {
    let (c, s3) = store(Setup::new().volumes(1));
    let mut random = seeded_rng();
    s3.put("/bucket/k", "value").expect(200);
    let requests = [
        s3.request("GET", "/bucket").queries("list-type=2&prefix=a&delimiter=%2F&max-keys=3&encoding-type=url"),
        s3.request("PUT", "/bucket/new").header("x-amz-meta-a", "b").body("a value"),
        s3.request("POST", "/bucket").query("delete", "").body("<Delete><Object><Key>none</Key></Object></Delete>"),
        s3.request("GET", "/bucket/k").header("Range", "bytes=1-2").header("If-Match", "\"x\""),
    ];
    let unsigned = requests.clone().map(|request| request.presigned(60));
    for n in 0..400 {
        let (head, body) = requests[n % 4].bytes();
        let mut bytes = [head, body].concat();
        if n % 8 < 2 {
            let method = ["GET", "PUT"][n % 2];
            bytes = format!("{method} {} HTTP/1.1\r\nHost: mkv.test\r\nContent-Length: 0\r\n\r\n", unsigned[n % 2])
                .into_bytes();
        }
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..bytes.len());
            match random.u8(..3) {
                0 => bytes[at] = random.u8(..),
                1 => drop(bytes.drain(at..bytes.len().min(at + random.usize(..20)))),
                _ => {
                    let noise = random_bytes(&mut random, 5);
                    bytes.splice(at..at, noise);
                }
            }
        }
        // Damage to the body's length leaves the server waiting for the rest, which never comes.
        let status = send(&s3, &bytes);
        let whole = find(&bytes, b"\r\n\r\n").is_some();
        assert!(status.is_some_and(|status| status < 600 && status != 500) || !whole || status.is_none(), "{status:?}");
    }
    assert_eq!(s3.get("/bucket/k").expect(200).text(), "value");
    assert!(!c.log().contains("panicked"), "{}", c.log());
}

#[test]
fn queries_of_two_minds_are_refused() {
    let (_c, s3) = store(Setup::new().volumes(1));
    s3.put("/bucket/k", "value").expect(200);
    let upload = s3.create_upload("/bucket/m");
    for (method, path, query) in [
        ("PUT", "/bucket/m", format!("partNumber=0&uploadId={upload}")),
        ("PUT", "/bucket/m", format!("partNumber=10001&uploadId={upload}")),
        ("PUT", "/bucket/m", format!("partNumber=x&uploadId={upload}")),
        ("PUT", "/bucket/m", format!("partNumber=1x&uploadId={upload}")),
    ] {
        s3.query(method, path, &query, "body").expect_code(400, "InvalidArgument");
    }
    for id in ["", "none", "0", "-1", "../x", "99999999999999999999999"] {
        for (method, query) in [("PUT", "partNumber=1&"), ("GET", ""), ("DELETE", "")] {
            let answer = s3.query(method, "/bucket/m", &format!("{query}uploadId={id}"), "");
            assert!([400, 404].contains(&answer.status), "{method} {id}: {}", answer.text());
        }
    }
    // The id of another key's upload.
    s3.query("PUT", "/bucket/k", &format!("partNumber=1&uploadId={upload}"), "x").expect_code(404, "NoSuchUpload");
    s3.query("DELETE", "/bucket/k", &format!("uploadId={upload}"), "").expect_code(404, "NoSuchUpload");
    assert_eq!(s3.get("/bucket/k").expect(200).text(), "value");
    s3.query("DELETE", "/bucket/m", &format!("uploadId={upload}"), "").expect(204);
}
