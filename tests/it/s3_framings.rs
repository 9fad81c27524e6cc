//! Every framing of a body, whole and damaged: what does not arrive whole is not stored.

use crate::support::cluster::{Cluster, Setup, assert_same_bytes};
use crate::support::http_client::{Answer, Conn, LAST_CHUNK, chunks, find, wait_until};
use crate::support::random::{random_bytes, seeded_rng};
use crate::support::reference;
use crate::support::s3::{AwsChunked, Client, Payload, Request, UNSIGNED, checksum, store};

const SUMS: [&str; 5] = ["crc32", "crc32c", "crc64nvme", "sha1", "sha256"];

fn trailer(name: &str, value: &[u8]) -> Option<(String, String)> {
    Some((format!("x-amz-checksum-{name}"), checksum(name, value)))
}

/// All kinds of aws-chunked bodies of a value.
fn kinds(value: &[u8]) -> Vec<AwsChunked> {
    let mut kinds = Vec::new();
    for transfer in [false, true] {
        for sum in [None, Some("crc32"), Some("sha256"), Some("crc64nvme")] {
            for signed in [false, true] {
                if signed || sum.is_some() {
                    let trailer = sum.and_then(|sum| trailer(sum, value));
                    kinds.push(AwsChunked { signed, trailer, transfer, ..AwsChunked::default() });
                }
            }
        }
    }
    kinds
}

#[test]
fn every_framing_arrives() {
    let (c, s3) = store(Setup::new().replicas(2));
    let mut random = seeded_rng();
    for length in [0, 1, 70_000, 1_500_000] {
        let value = random_bytes(&mut random, length);
        let put = || s3.request("PUT", "/bucket/k").body(&value);
        let check = |answer: Answer, kind: &str| {
            assert_eq!(answer.status, 200, "{kind}, {length} bytes: {}", answer.text());
            assert_eq!(answer.etag().trim_matches('"'), reference::md5(&value), "{kind}");
            assert_same_bytes(&s3.get("/bucket/k").expect(200).body, &value, kind);
        };
        check(put().send(), "hash");
        check(put().payload(Payload::Plain(UNSIGNED.into())).send(), "unsigned");
        for sizes in [vec![], vec![65536], vec![1 << 20, 8192, 3], vec![8193]] {
            for kind in kinds(&value) {
                let name = format!("signed {}, {:?}, TE {}, {sizes:?}", kind.signed, kind.trailer, kind.transfer);
                let request = put().header("Content-Encoding", "aws-chunked");
                check(request.aws_chunked(AwsChunked { sizes: sizes.clone(), ..kind }).send(), &name);
            }
        }
    }
    // restic says nothing of aws-chunked in Content-Encoding.
    let kind = AwsChunked { signed: true, sizes: vec![2], ..AwsChunked::default() };
    s3.request("PUT", "/bucket/k").body("restic").aws_chunked(kind).send().expect(200);
    c.assert_value("/bucket/k", "restic");
    // Plain bodies under a chunked transfer.
    let (head, body) = s3.request("PUT", "/bucket/k").body("plain chunks").bytes();
    let head = String::from_utf8(head).unwrap().replace("Content-Length: 12", "Transfer-Encoding: chunked");
    let body = [&chunks(&body, &[5, 1]), LAST_CHUNK].concat();
    Conn::open(&s3.address).send(head).send(body).answer().expect(200);
    c.assert_value("/bucket/k", "plain chunks");
}

#[test]
fn tolerated_framings_arrive() {
    let (c, s3) = store(Setup::new().volumes(1));
    let kind = AwsChunked { trailer: trailer("crc32", b"value"), ..AwsChunked::default() };
    let (head, body) = s3.request("PUT", "/bucket/k").body("value").aws_chunked(kind).bytes();
    let body = String::from_utf8(body).unwrap();
    assert!(body.starts_with("5\r\nvalue\r\n0\r\nx-amz-checksum-crc32:"), "{body}");
    let head = String::from_utf8(head).unwrap();
    let (trailer, digest) = body.split_once("x-amz").map(|(_, rest)| ("x-amz", rest.trim_end().to_string())).unwrap();
    for variant in [
        body.clone(),
        // Without the last line, or with one more.
        body.strip_suffix("\r\n").unwrap().to_string(),
        format!("{body}\r\n"),
        body.replacen("5\r\n", "0005\r\n", 1),
        body.replacen(trailer, "X-AMZ", 1),
        body.replacen(&digest, &digest.replacen(':', ":  ", 1), 1),
    ] {
        let length = format!("Content-Length: {}", variant.len());
        let head = head.replace(&format!("Content-Length: {}", body.len()), &length);
        let answer = Conn::open(&s3.address).send(head).send(&variant).answer();
        assert_eq!(answer.status, 200, "{variant:?}: {}", answer.text());
        c.assert_value("/bucket/k", "value");
        s3.ask("DELETE", "/bucket/k").expect(204);
    }
}

/// Sends this head and body, and checks that it is refused with one of these codes and that nothing is stored.
fn assert_refused(c: &Cluster, s3: &Client, head: &[u8], body: &[u8], codes: &[&str], what: &str) {
    let mut conn = Conn::open(&s3.address);
    conn.send(head);
    let _ = conn.try_send(body);
    let _ = conn.shutdown_write();
    match conn.next_answer("PUT") {
        Ok(Some(answer)) => {
            assert!((400..500).contains(&answer.status), "{what}: {} {}", answer.status, answer.text());
            let code = answer.element("Code");
            assert!(codes.is_empty() || codes.contains(&code.as_str()), "{what}: {code}, expected {codes:?}");
        }
        // A cut body has no answer where the connection is gone.
        Ok(None) => assert!(codes.is_empty(), "{what}: no answer"),
        Err(why) => panic!("{what}: {why}"),
    }
    assert_eq!(s3.get("/bucket/k").text(), "before", "{what}");
    wait_until("nothing is left of it", || c.volumes.iter().all(|volume| volume.temporary_files() == 0));
}

#[test]
fn damaged_bodies_are_not_stored() {
    let (c, s3) = store(Setup::new().replicas(2));
    s3.put("/bucket/k", "before").expect(200);
    let value = random_bytes(&mut seeded_rng(), 150_000);
    let put = || s3.request("PUT", "/bucket/k").body(&value);
    let refused = |request: Request, change: &dyn Fn(&mut Vec<u8>), codes: &[&str], what: &str| {
        let (head, mut body) = request.bytes();
        change(&mut body);
        assert_refused(&c, &s3, &head, &body, codes, what);
    };
    let flip = |at: usize| move |body: &mut Vec<u8>| body[at] ^= 1;
    let cut = |left: usize| move |body: &mut Vec<u8>| body.truncate(left);
    refused(put(), &flip(777), &["XAmzContentSHA256Mismatch"], "hash, a flipped byte");
    refused(put(), &cut(149_999), &[], "hash, cut");
    refused(put().payload(Payload::Plain(UNSIGNED.into())), &cut(10), &[], "unsigned, cut");
    for kind in kinds(&value) {
        let kind = AwsChunked { sizes: vec![65536], ..kind };
        let name = format!("signed {}, {:?}, TE {}", kind.signed, kind.trailer, kind.transfer);
        let request = || put().aws_chunked(kind.clone());
        let changed = if kind.signed { "SignatureDoesNotMatch" } else { "BadDigest" };
        refused(request(), &flip(120_000), &[changed, "InvalidRequest", "IncompleteBody"], &format!("{name}: flip"));
        let length = request().bytes().1.len();
        refused(request(), &cut(length / 2), &[], &format!("{name}: cut in the middle"));
        refused(request(), &cut(100), &[], &format!("{name}: cut at the start"));
        // The end is a chunk of no bytes, and the trailers that were announced.
        let end = |body: &mut Vec<u8>| {
            let end = find(body, b"\r\n0").expect("a last chunk");
            body.truncate(end + 2);
        };
        refused(request(), &end, &[], &format!("{name}: no last chunk"));
        for wrong in ["149999", "150001", "0", "18446744073709551616", "-150000", "x", "150000, 150000"] {
            let request = put().aws_chunked(AwsChunked { announced: Some(wrong.into()), ..kind.clone() });
            refused(request, &|_| {}, &[], &format!("{name}: {wrong} bytes announced"));
        }
    }
}

#[test]
fn wrong_trailers_and_checksums_are_refused() {
    let (c, s3) = store(Setup::new().volumes(1));
    s3.put("/bucket/k", "before").expect(200);
    let put = || s3.request("PUT", "/bucket/k").body("value");
    let refused = |request: Request, codes: &[&str], what: &str| {
        let (head, body) = request.bytes();
        assert_refused(&c, &s3, &head, &body, codes, what);
    };
    for sum in SUMS {
        let (header, other) = (format!("x-amz-checksum-{sum}"), checksum(sum, b"another"));
        refused(put().header(&header, &other), &["BadDigest"], sum);
        refused(put().header(&header, "AAAA"), &["BadDigest", "InvalidRequest", "InvalidDigest"], sum);
        refused(put().header(&header, "no base64!"), &["BadDigest", "InvalidRequest", "InvalidDigest"], sum);
        for signed in [false, true] {
            for transfer in [false, true] {
                let kind = |value: &str| {
                    let trailer = Some((header.clone(), value.to_string()));
                    AwsChunked { signed, trailer, sizes: vec![2], transfer, ..AwsChunked::default() }
                };
                refused(put().aws_chunked(kind(&other)), &["BadDigest"], sum);
                refused(
                    put().aws_chunked(kind("")),
                    &["BadDigest", "InvalidRequest", "InvalidDigest", "MalformedTrailerError"],
                    sum,
                );
            }
        }
    }
    // A trailer that was announced and does not come, another one, and one that was not announced.
    let kind = || AwsChunked { trailer: trailer("crc32", b"value"), ..AwsChunked::default() };
    let (head, body) = put().aws_chunked(kind()).bytes();
    let (head, body) = (String::from_utf8(head).unwrap(), String::from_utf8(body).unwrap());
    for changed in [
        "5\r\nvalue\r\n0\r\n\r\n".to_string(),
        body.replace("crc32:", "crc32c:"),
        body.replace("x-amz-checksum-crc32:", "x-amz-meta-a:"),
        body.replace("\r\n\r\n", &format!("\r\n{}: v\r\n\r\n", "x".repeat(9000))),
    ] {
        let length = format!("Content-Length: {}", changed.len());
        let head = head.replace(&format!("Content-Length: {}", body.len()), &length);
        assert_refused(&c, &s3, head.as_bytes(), changed.as_bytes(), &[], &changed[..40.min(changed.len())]);
    }
    // The signature of a trailer counts, and that of the last chunk.
    let kind = AwsChunked { signed: true, ..kind() };
    let (head, body) = put().aws_chunked(kind).bytes();
    let text = String::from_utf8(body.clone()).unwrap();
    for at in [text.rfind("chunk-signature=").unwrap() + 20, text.rfind("trailer-signature:").unwrap() + 20] {
        let mut body = body.clone();
        body[at] = if body[at] == b'0' { b'1' } else { b'0' };
        assert_refused(&c, &s3, &head, &body, &["SignatureDoesNotMatch"], "a signature at the end");
    }
    refused(put().header("Content-MD5", reference::md5_base64(b"another")), &["BadDigest"], "Content-MD5");
    refused(put().header("Content-MD5", "AAAA"), &["InvalidDigest"], "Content-MD5");
    put().header("Content-MD5", reference::md5_base64(b"value")).send().expect(200);
    let restic = AwsChunked { signed: true, sizes: vec![3], ..AwsChunked::default() };
    let request = put().aws_chunked(restic);
    request.clone().header("Content-MD5", reference::md5_base64(b"value")).send().expect(200);
    request.header("Content-MD5", reference::md5_base64(b"another")).send().expect_code(400, "BadDigest");
}

#[test]
fn hostile_chunks_are_refused() {
    let (c, s3) = store(Setup::new().volumes(1));
    s3.put("/bucket/k", "before").expect(200);
    let kind = AwsChunked { trailer: trailer("crc32", b"value"), ..AwsChunked::default() };
    let (head, body) = s3.request("PUT", "/bucket/k").body("value").aws_chunked(kind).bytes();
    let (head, body) = (String::from_utf8(head).unwrap(), String::from_utf8(body).unwrap());
    let long = format!("5;{}\r\nvalue", "x".repeat(5000));
    for chunk in [
        "6\r\nvalue",
        "4\r\nvalue",
        "+5\r\nvalue",
        "-5\r\nvalue",
        "0x5\r\nvalue",
        " 5\r\nvalue",
        "5 \r\nvalue",
        "5\nvalue",
        "\r\nvalue",
        "g\r\nvalue",
        "FFFFFFFFFFFFFFFF\r\nvalue",
        "7FFFFFFFFFFFFFFF\r\nvalue",
        "10000000000000005\r\nvalue",
        "5_0\r\nvalue",
        "5\r\nvalue\r\n1\r\nx",
        &long,
    ] {
        let changed = body.replacen("5\r\nvalue", chunk, 1);
        let length = format!("Content-Length: {}", changed.len());
        let head = head.replace(&format!("Content-Length: {}", body.len()), &length);
        let what = format!("{:?}", &chunk[..chunk.len().min(40)]);
        assert_refused(&c, &s3, head.as_bytes(), changed.as_bytes(), &[], &what);
    }
    // The framing is complete, and more follows within the body.
    let longer = format!("{body}{body}");
    let head = head.replace(&format!("Content-Length: {}", body.len()), &format!("Content-Length: {}", longer.len()));
    assert_refused(&c, &s3, head.as_bytes(), longer.as_bytes(), &[], "two bodies");
}

#[test]
fn checksums_are_given_back() {
    let (_c, s3) = store(Setup::new().volumes(1));
    let value = random_bytes(&mut seeded_rng(), 5000);
    for sum in SUMS {
        let (header, expected) = (format!("x-amz-checksum-{sum}"), checksum(sum, &value));
        let put = || s3.request("PUT", "/bucket/k").body(&value);
        let by_trailer = AwsChunked { trailer: trailer(sum, &value), ..AwsChunked::default() };
        for request in [put().header(&header, &expected), put().aws_chunked(by_trailer)] {
            assert_eq!(request.send().expect(200).header(&header), Some(expected.as_str()));
            let read = |method: &str| s3.request(method, "/bucket/k").header("x-amz-checksum-mode", "ENABLED");
            assert_eq!(read("GET").send().expect(200).header(&header), Some(expected.as_str()));
            assert_eq!(read("HEAD").send().expect(200).header(&header), Some(expected.as_str()));
            // botocore would compare it with the part that it reads.
            assert_eq!(read("GET").header("Range", "bytes=0-9").send().expect(206).header(&header), None);
            assert_eq!(s3.get("/bucket/k").expect(200).header(&header), None);
        }
    }
}
