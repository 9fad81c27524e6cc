//! Objects of the S3 endpoint: what is written is read, and nothing else acts on it.

use std::time::Duration;

use crate::support::cluster::{Setup, assert_same_bytes};
use crate::support::http_client::{self, target};
use crate::support::random::{random_bytes, seeded_rng};
use crate::support::reference;
use crate::support::s3::{Client, store};

pub const DEFAULT_TYPE: &str = "binary/octet-stream";

/// Keys inside a bucket that need careful encoding.
pub fn unusual_keys() -> Vec<String> {
    let mut keys: Vec<String> = [
        "a",
        "a b",
        " ",
        "é",
        "日本語/キー",
        "a+b",
        "a%2Fb",
        "%",
        "//",
        "a//b",
        "dir/",
        "../x",
        ".",
        "..",
        "?",
        "#frag",
        "~",
        "&=;:@$,!*'()",
        "\"<>&'",
        "back\\slash",
        "tab\tkey",
        "[]{}|^`",
        "list-type=2",
        "\u{1F600}",
        "a/?uploads",
    ]
    .map(String::from)
    .into();
    keys.push("k".repeat(1024));
    keys.push("é".repeat(512));
    keys.push(format!("{}/{}", "p".repeat(300), "/".repeat(700)));
    keys
}

fn quoted_md5(value: &[u8]) -> String {
    format!("\"{}\"", reference::md5(value))
}

#[test]
fn objects_are_written_read_and_deleted() {
    let (c, s3) = store(Setup::new().replicas(2));
    let mut random = seeded_rng();
    for (n, key) in unusual_keys().iter().enumerate() {
        let path = format!("/bucket/{key}");
        let value = random_bytes(&mut random, [0, 1, 5000, 700_000][n % 4]);
        let etag = quoted_md5(&value);
        assert_eq!(s3.put(&path, &value).expect(200).etag(), etag, "{key}");
        let read = s3.get(&path).expect(200);
        assert_same_bytes(&read.body, &value, key);
        let head = s3.ask("HEAD", &path).expect(200);
        for answer in [&read, &head] {
            assert_eq!(answer.etag(), etag);
            assert_eq!(answer.header("Content-Length"), Some(value.len().to_string().as_str()));
            assert_eq!(answer.header("Content-Type"), Some(DEFAULT_TYPE));
            assert_eq!(answer.header("Accept-Ranges"), Some("bytes"));
            assert!(httpdate::parse_http_date(answer.header("Last-Modified").unwrap()).is_ok());
        }
        // The same value under the same key of the native API, one file on each volume.
        c.assert_value(&path, &value);
        let longer = [&value[..], b"longer"].concat();
        s3.put(&path, &longer).expect(200);
        assert_same_bytes(&s3.get(&path).expect(200).body, &longer, key);
        s3.ask("DELETE", &path).expect(204);
        let missing = s3.get(&path).expect_code(404, "NoSuchKey");
        assert_eq!(missing.element("Resource"), target(&path));
        assert!(s3.ask("HEAD", &path).expect(404).body.is_empty());
        s3.ask("DELETE", &path).expect(204);
        c.assert_absent(&path);
    }
    s3.put(format!("/bucket/{}", "k".repeat(1025)), "").expect_code(400, "KeyTooLongError");
    s3.put("/none/key", "value").expect_code(404, "NoSuchBucket");
    s3.get("/none/key").expect_code(404, "NoSuchBucket");
}

#[test]
fn ranges_are_those_of_the_value() {
    let (_c, s3) = store(Setup::new().volumes(1));
    let value = random_bytes(&mut seeded_rng(), 1000);
    s3.put("/bucket/k", &value).expect(200);
    s3.put("/bucket/empty", "").expect(200);
    let ask = |method: &str, range: &str| s3.request(method, "/bucket/k").header("Range", range).send();
    for (range, first, last) in [
        ("bytes=0-0", 0, 0),
        ("bytes=10-99", 10, 99),
        ("bytes=900-", 900, 999),
        ("bytes=-50", 950, 999),
        ("bytes=-5000", 0, 999),
        ("bytes=999-99999999999", 999, 999),
        ("bytes=0-18446744073709551615", 0, 999),
    ] {
        let answer = ask("GET", range).expect(206);
        assert_same_bytes(&answer.body, &value[first..=last], range);
        assert_eq!(answer.header("Content-Range"), Some(format!("bytes {first}-{last}/1000").as_str()));
        assert_eq!(answer.etag(), quoted_md5(&value));
        let head = ask("HEAD", range).expect(206);
        assert_eq!(head.header("Content-Length"), Some((last - first + 1).to_string().as_str()));
    }
    for range in ["bytes=1000-", "bytes=5000-6000", "bytes=-0"] {
        ask("GET", range).expect_code(416, "InvalidRange");
    }
    for range in ["lines=0-1", "bytes=9-3", "bytes=a-b", "bytes"] {
        assert_same_bytes(&ask("GET", range).expect(200).body, &value, range);
    }
    s3.request("GET", "/bucket/empty").header("Range", "bytes=0-0").send().expect_code(416, "InvalidRange");
}

#[test]
fn conditions_of_reads_follow_the_rfc() {
    let (_c, s3) = store(Setup::new().volumes(1));
    s3.put("/bucket/k", "value").expect(200);
    let answer = s3.get("/bucket/k").expect(200);
    let (etag, modified) = (answer.etag(), answer.header("Last-Modified").unwrap().to_string());
    let before = "Tue, 14 Nov 2023 22:13:20 GMT";
    let bare = etag.trim_matches('"');
    for (headers, status) in [
        (vec![("If-Match", etag.as_str())], 200),
        (vec![("If-Match", bare)], 200),
        (vec![("If-Match", "*")], 200),
        (vec![("If-Match", "\"other\"")], 412),
        (vec![("If-Match", "\"other\", \"more\"")], 412),
        (vec![("If-None-Match", etag.as_str())], 304),
        (vec![("If-None-Match", "*")], 304),
        (vec![("If-None-Match", "\"other\"")], 200),
        (vec![("If-Modified-Since", modified.as_str())], 304),
        (vec![("If-Modified-Since", before)], 200),
        (vec![("If-Modified-Since", "no date")], 200),
        (vec![("If-Unmodified-Since", modified.as_str())], 200),
        (vec![("If-Unmodified-Since", before)], 412),
        // An ETag outweighs a date.
        (vec![("If-Match", etag.as_str()), ("If-Unmodified-Since", before)], 200),
        (vec![("If-None-Match", "\"other\""), ("If-Modified-Since", modified.as_str())], 200),
        (vec![("If-None-Match", etag.as_str()), ("If-Modified-Since", before)], 304),
    ] {
        for method in ["GET", "HEAD"] {
            let request = s3.request(method, "/bucket/k").header("Range", "bytes=0-2");
            let request = headers.iter().fold(request, |request, (name, value)| request.header(name, value));
            let answer = request.send();
            let expected = if status == 200 { 206 } else { status };
            assert_eq!(answer.status, expected, "{method} {headers:?}: {}", answer.text());
            match answer.status {
                304 => assert!(answer.etag() == etag && answer.body.is_empty()),
                412 if method == "GET" => drop(answer.expect_code(412, "PreconditionFailed")),
                _ => {}
            }
        }
    }
}

#[test]
fn metadata_is_kept_with_the_object() {
    let (c, s3) = store(Setup::new().volumes(1));
    let kept = [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Cache-Control", "max-age=60, public"),
        ("Content-Disposition", "attachment; filename=\"a b.html\""),
        ("Content-Encoding", "gzip"),
        ("Content-Language", "de, en"),
        ("Expires", "Wed, 21 Oct 2065 07:28:00 GMT"),
        ("x-amz-meta-mtime", "1700000000.123456789"),
        ("x-amz-meta-empty", ""),
        ("x-amz-meta-odd", "a=b&c=%41 d\u{e9}"),
    ];
    let put = |value: &str, headers: &[(&str, &str)]| {
        headers.iter().fold(s3.request("PUT", "/bucket/k").body(value), |r, (name, value)| r.header(name, value)).send()
    };
    let assert_kept = |expected: &[(&str, &str)]| {
        for method in ["GET", "HEAD"] {
            let answer = s3.ask(method, "/bucket/k").expect(200);
            for (name, value) in expected {
                assert_eq!(answer.header(name), Some(*value), "{method}: {name}");
            }
            let meta =
                |headers: &[(String, String)]| headers.iter().filter(|(n, _)| n.starts_with("x-amz-meta-")).count();
            assert_eq!(meta(&answer.headers), expected.iter().filter(|(n, _)| n.starts_with("x-amz-meta-")).count());
        }
    };
    put("value", &kept).expect(200);
    assert_kept(&kept);
    let over = "response-content-type=text%2Fplain&response-cache-control=no-store&response-expires=never\
                &response-content-disposition=inline&response-content-encoding=br&response-content-language=fr";
    let answer = s3.query("GET", "/bucket/k", over, "").expect(200);
    let names =
        ["Content-Type", "Cache-Control", "Expires", "Content-Disposition", "Content-Encoding", "Content-Language"];
    let values = ["text/plain", "no-store", "never", "inline", "br", "fr"];
    names.iter().zip(values).for_each(|(name, value)| assert_eq!(answer.header(name), Some(value)));
    // A later write leaves nothing of the earlier one; what only describes the way is not kept.
    let ignored =
        [("Content-Encoding", "aws-chunked"), ("x-amz-acl", "public-read"), ("x-amz-storage-class", "GLACIER")];
    put("value 2", &ignored).expect(200);
    assert_kept(&[("Content-Type", DEFAULT_TYPE)]);
    assert_eq!(s3.get("/bucket/k").header("Content-Encoding"), None);
    put("value 3", &[("Content-Encoding", "aws-chunked,gzip")]).expect(200);
    assert_kept(&[("Content-Encoding", "gzip")]);
    put("value 4", &kept).expect(200);
    c.replace("/bucket/k", "native").expect(201);
    assert_kept(&[("Content-Type", DEFAULT_TYPE)]);
    assert_eq!(s3.get("/bucket/k").text(), "native");
    put("value 5", &[("x-amz-meta-large", "x".repeat(2100).as_str())]).expect_code(400, "MetadataTooLarge");
    let customer_key = ("x-amz-server-side-encryption-customer-algorithm", "AES256");
    put("value 6", &[customer_key]).expect_code(501, "NotImplemented");
    put("value 7", &[("x-amz-server-side-encryption", "aws:kms")]).expect_code(501, "NotImplemented");
    assert_eq!(s3.get("/bucket/k").text(), "native");
}

/// A PUT that copies.
fn copy(s3: &Client, to: &str, from: &str, headers: &[(&str, &str)]) -> http_client::Answer {
    let request = s3.request("PUT", to).header("x-amz-copy-source", from);
    headers.iter().fold(request, |request, (name, value)| request.header(name, value)).send()
}

#[test]
fn copies_carry_value_and_metadata() {
    let (c, s3) = store(Setup::new().replicas(2));
    s3.put("/other-bucket", "").expect(200);
    let value = random_bytes(&mut seeded_rng(), 700_000);
    let source = "/bucket/a b+é?/key";
    s3.request("PUT", source)
        .header("Content-Type", "text/x")
        .header("x-amz-meta-a", "1")
        .body(&value)
        .send()
        .expect(200);
    s3.put("/bucket/empty", "").expect(200);
    for from in [target(source), target(source)[1..].to_string(), format!("{}?versionId=null", target(source))] {
        let answer = copy(&s3, "/other-bucket/to", &from, &[]).expect(200);
        assert_eq!(answer.element("ETag"), quoted_md5(&value), "{from}");
        assert!(answer.text().contains("<CopyObjectResult") && answer.element("LastModified").ends_with(".000Z"));
        let read = s3.get("/other-bucket/to").expect(200);
        assert_same_bytes(&read.body, &value, "the copy");
        assert_eq!((read.header("Content-Type"), read.header("x-amz-meta-a")), (Some("text/x"), Some("1")));
        s3.ask("DELETE", "/other-bucket/to").expect(204);
    }
    copy(&s3, "/bucket/empty copy", "/bucket/empty", &[]).expect(200);
    assert!(s3.get("/bucket/empty copy").expect(200).body.is_empty());
    let replace = [("x-amz-metadata-directive", "REPLACE"), ("x-amz-meta-b", "2")];
    copy(&s3, "/bucket/replaced", &target(source), &replace).expect(200);
    let read = s3.get("/bucket/replaced").expect(200);
    assert_eq!((read.header("x-amz-meta-a"), read.header("x-amz-meta-b")), (None, Some("2")));
    assert_eq!(read.header("Content-Type"), Some(DEFAULT_TYPE));
    // Onto itself, only the metadata can change: no byte moves.
    c.wait_until_cleaned();
    let disks = c.disk_contents();
    copy(&s3, source, &target(source), &[]).expect_code(400, "InvalidRequest");
    assert_eq!(copy(&s3, source, &target(source), &replace).expect(200).element("ETag"), quoted_md5(&value));
    c.assert_disks(&disks);
    let read = s3.get(source).expect(200);
    assert_eq!((read.header("x-amz-meta-a"), read.header("x-amz-meta-b")), (None, Some("2")));
    // Conditions on the source.
    let (etag, modified) = (read.etag(), read.header("Last-Modified").unwrap().to_string());
    for (name, value, status) in [
        ("x-amz-copy-source-if-match", etag.as_str(), 200),
        ("x-amz-copy-source-if-match", "\"other\"", 412),
        ("x-amz-copy-source-if-none-match", etag.as_str(), 412),
        ("x-amz-copy-source-if-none-match", "\"other\"", 200),
        ("x-amz-copy-source-if-modified-since", modified.as_str(), 412),
        ("x-amz-copy-source-if-unmodified-since", modified.as_str(), 200),
    ] {
        let answer = copy(&s3, "/bucket/conditional", &target(source), &[(name, value)]);
        assert_eq!(answer.status, status, "{name}: {value}: {}", answer.text());
        assert_eq!(s3.ask("DELETE", "/bucket/conditional").status, 204);
    }
    copy(&s3, "/bucket/to", "/bucket/none", &[]).expect_code(404, "NoSuchKey");
    copy(&s3, "/bucket/to", "/nobucket/none", &[]).expect_code(404, "NoSuchBucket");
    copy(&s3, "/nobucket/to", &target(source), &[]).expect_code(404, "NoSuchBucket");
    copy(&s3, "/bucket/to", "nonsense", &[]).expect(400);
    s3.get("/bucket/to").expect_code(404, "NoSuchKey");
}

#[test]
fn delete_objects_deletes_what_is_named() {
    let (c, s3) = store(Setup::new().volumes(1));
    let delete = |xml: String| s3.query("POST", "/bucket", "delete", xml);
    let object = |key: &str| format!("<Object><Key>{key}</Key></Object>");
    for key in ["a", "<b>&", "c/", "d\u{e9}", "keep"] {
        s3.put(format!("/bucket/{key}"), "v").expect(200);
    }
    let objects = ["a", "&lt;b&gt;&amp;", "c/", "none"].map(object).concat();
    let answer = delete(format!("<Delete>{objects}</Delete>")).expect(200);
    assert_eq!(answer.elements("Key"), ["a", "<b>&", "c/", "none"], "{}", answer.text());
    assert!(answer.text().contains("<DeleteResult") && !answer.text().contains("<Error>"));
    let text = "<Delete xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Quiet>true</Quiet><Object><Key>d&#xe9;</Key>\
                <VersionId>null</VersionId></Object></Delete>";
    assert!(delete(text.into()).expect(200).elements("Key").is_empty());
    assert_eq!(c.live().len(), 2, "{:?}", c.live());
    delete("<Delete></Delete>".into()).expect_code(400, "MalformedXML");
    delete("<Delete><Object><Key>keep</Key></Object>".into()).expect_code(400, "MalformedXML");
    delete(format!("<Delete>{}</Delete>", object("keep").repeat(1001))).expect_code(400, "MalformedXML");
    let request =
        s3.request("POST", "/bucket").query("delete", "").body(format!("<Delete>{}</Delete>", object("keep")));
    let wrong = request.clone().header("Content-MD5", reference::md5_base64(b"another"));
    wrong.send().expect_code(400, "BadDigest");
    s3.get("/bucket/keep").expect(200);
    let answer =
        delete(format!("<Delete>{}</Delete>", (0..1000).map(|n| object(&format!("n{n}"))).collect::<String>()));
    assert_eq!(answer.expect(200).elements("Key").len(), 1000);
    request.header("Content-MD5", reference::md5_base64(&request_body(&object("keep")))).send().expect(200);
    s3.get("/bucket/keep").expect_code(404, "NoSuchKey");
    s3.query("POST", "/none", "delete", format!("<Delete>{}</Delete>", object("a"))).expect_code(404, "NoSuchBucket");
}

fn request_body(objects: &str) -> Vec<u8> {
    format!("<Delete>{objects}</Delete>").into_bytes()
}

#[test]
fn sub_resources_never_act_on_the_object() {
    let (_c, s3) = store(Setup::new().volumes(1));
    s3.put("/bucket/k", "value").expect(200);
    for (path, query, status, code) in [
        ("/bucket", "policy", 404, "NoSuchBucketPolicy"),
        ("/bucket", "cors", 404, "NoSuchCORSConfiguration"),
        ("/bucket", "lifecycle", 404, "NoSuchLifecycleConfiguration"),
        ("/bucket", "tagging", 404, "NoSuchTagSet"),
        ("/bucket", "encryption", 404, "ServerSideEncryptionConfigurationNotFoundError"),
        ("/bucket", "website", 501, "NotImplemented"),
        ("/bucket", "versions", 501, "NotImplemented"),
        ("/bucket/k", "torrent", 501, "NotImplemented"),
        ("/bucket/k", "attributes", 501, "NotImplemented"),
        ("/bucket/k", "legal-hold", 501, "NotImplemented"),
    ] {
        s3.query("GET", path, query, "").expect_code(status, code);
    }
    assert!(s3.query("GET", "/bucket", "location", "").expect(200).text().contains("LocationConstraint"));
    let versioning = s3.query("GET", "/bucket", "versioning", "").expect(200);
    assert!(versioning.text().contains("VersioningConfiguration") && versioning.elements("Status").is_empty());
    for path in ["/bucket", "/bucket/k"] {
        assert_eq!(s3.query("GET", path, "acl", "").expect(200).elements("Permission"), ["FULL_CONTROL"]);
    }
    for query in ["acl", "tagging", "retention", "legal-hold", "policy", "website", "restore", "select", "encryption"] {
        for method in ["PUT", "DELETE", "POST"] {
            for path in ["/bucket", "/bucket/k"] {
                let answer = s3.query(method, path, query, "<X/>");
                assert!((400..600).contains(&answer.status), "{method} {path}?{query}: {}", answer.status);
            }
        }
    }
    for method in ["POST", "PATCH", "REBALANCE"] {
        assert!([405, 501].contains(&s3.ask(method, "/bucket/k").status), "{method}");
    }
    for query in ["x-id=GetObject", "versionId=null"] {
        assert_eq!(s3.query("GET", "/bucket/k", query, "").expect(200).text(), "value");
    }
    assert!(s3.query("DELETE", "/bucket/k", "versionId=some", "").status >= 400);
    assert_eq!(s3.get("/bucket/k").expect(200).text(), "value");
}

#[test]
fn presigned_urls_read_write_and_delete() {
    let (c, s3) = store(Setup::new().volumes(1));
    let ask =
        |method: &str, target: &str, body: Option<&[u8]>| http_client::ask(&s3.address, method, target, &[], body);
    let key = "/bucket/a b+é";
    let put = s3.request("PUT", key).presigned(60);
    ask("PUT", &put, Some(b"value")).expect(200);
    c.assert_value(key, "value");
    let get = s3.request("GET", key).query("response-content-type", "text/a b+c").presigned(604_800);
    let answer = ask("GET", &get, None).expect(200);
    assert_eq!((answer.text().as_str(), answer.header("Content-Type")), ("value", Some("text/a b+c")));
    let ranged = http_client::ask(&s3.address, "GET", &get, &[("Range", "bytes=1-2")], None).expect(206);
    assert_eq!(ranged.text(), "al");
    ask("HEAD", &s3.request("HEAD", key).presigned(60), None).expect(200);
    ask("PUT", &get, Some(b"other")).expect_code(403, "SignatureDoesNotMatch");
    let list = s3.request("GET", "/bucket").queries("list-type=2&prefix=a%20b").presigned(60);
    assert_eq!(ask("GET", &list, None).expect(200).elements("Key"), [&key[8..]]);
    ask("DELETE", &s3.request("DELETE", key).presigned(60), None).expect(204);
    ask("GET", &get, None).expect_code(404, "NoSuchKey");
    for expires in [0, 604_801] {
        let target = s3.request("GET", key).presigned(expires);
        ask("GET", &target, None).expect_code(400, "AuthorizationQueryParametersError");
    }
    let old = s3.request("GET", key).at(crate::support::commands::now() - 100).presigned(60);
    assert!(ask("GET", &old, None).expect_code(403, "AccessDenied").element("Message").contains("expired"));
}

#[test]
fn a_connection_is_used_again() {
    let (_c, s3) = store(Setup::new().volumes(1));
    let started = std::time::Instant::now();
    let mut conn = http_client::Conn::open(&s3.address);
    for n in 0..50 {
        let path = format!("/bucket/{n}");
        for (method, body, status) in [("PUT", "value", 200), ("HEAD", "", 200), ("GET", "", 200), ("DELETE", "", 204)]
        {
            let request = s3.request(method, &path).body(body);
            let (head, body) = request.bytes();
            conn.send([head, body].concat());
            conn.answer_to(method).expect(status);
        }
    }
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}
