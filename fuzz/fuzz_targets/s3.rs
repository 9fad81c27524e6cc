//! No head, body or XML may make the S3 room panic. The input is a request line, headers, an empty line and a body.
#![no_main]

use std::io::Read;
use std::sync::LazyLock;
use std::time::SystemTime;

use mkv::s3::head::{Head, query};
use mkv::s3::keys::Keys;
use mkv::s3::payload::Payload;
use mkv::s3::{sigv4, xml};

static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let file = std::env::temp_dir().join(format!("mkv-fuzz-{}", std::process::id()));
    std::fs::write(&file, "AKIDEXAMPLE wJalrXUtnFEMI\n").unwrap();
    Keys::read(&file).unwrap().0
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let end = data.windows(2).position(|pair| pair == b"\n\n").unwrap_or(data.len());
    let (Ok(text), mut body) = (std::str::from_utf8(&data[..end]), &data[data.len().min(end + 2)..]) else { return };
    let mut lines = text.lines();
    let (method, target) = lines.next().and_then(|line| line.split_once(' ')).unwrap_or(("PUT", "/"));
    let headers: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once(": ")).collect();
    let head = Head { method, target, headers: &headers };
    let _ = query(target);
    let signed = sigv4::authenticate(&head, &KEYS, SystemTime::now()).ok().flatten();
    if let Ok(text) = std::str::from_utf8(body) {
        let _ = (xml::parse_delete(text), xml::parse_complete(text), xml::parse_create_bucket(text));
    }
    if let Ok(mut payload) = Payload::new(&head, signed.as_ref(), None, &mut body) {
        let _ = payload.read_to_end(&mut Vec::new());
    }
});
