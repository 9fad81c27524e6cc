//! nginx's listings of folders (autoindex_format json).

/// A name in a volume's folder.
#[derive(Debug, PartialEq)]
pub struct Entry {
    /// With U+FFFD for what is not UTF-8; no blob has such a name.
    pub name: String,
    /// Bytes; `None`: it is no plain file.
    pub size: Option<u64>,
    /// Whether it is a folder.
    pub folder: bool,
    /// Its mtime, in seconds since 1970.
    pub time: u64,
}

/// Parses nginx's JSON: `[{"name":"a","type":"file","mtime":"Sun, 22 Nov 2026 20:32:18 GMT","size":7},…]`.
pub fn parse(text: &[u8]) -> serde_json::Result<Vec<Entry>> {
    #[derive(serde::Deserialize)]
    struct Line {
        name: String,
        r#type: String,
        mtime: String,
        size: Option<u64>,
    }
    let lines: Vec<Line> = serde_json::from_str(&String::from_utf8_lossy(text))?;
    let entry = |line: Line| Entry {
        size: line.size.filter(|_| line.r#type == "file"),
        folder: line.r#type == "directory",
        time: http_date(&line.mtime).unwrap_or(0),
        name: line.name,
    };
    Ok(lines.into_iter().map(entry).collect())
}

/// Whether this is a folder of blobs: two lower-case hex digits.
pub fn is_hex_folder(entry: &Entry) -> bool {
    let mut bytes = entry.name.bytes();
    entry.folder && entry.name.len() == 2 && bytes.all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether this is a subvolume: `sv` and upper-case hex digits.
pub fn is_subvolume(entry: &Entry) -> bool {
    let digits = entry.name.strip_prefix("sv").unwrap_or_default();
    let mut bytes = digits.bytes();
    entry.folder && digits.len() >= 2 && bytes.all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'))
}

/// Seconds since 1970 of an HTTP date (RFC 9110).
pub fn http_date(text: &str) -> Option<u64> {
    let time = httpdate::parse_http_date(text).ok()?;
    Some(time.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_of_nginx_is_read_and_a_cut_one_is_an_error() {
        let mut text = br#"[
{ "name":"sv01", "type":"directory", "mtime":"Sun, 22 Nov 2026 20:32:18 GMT" },
{ "name":"L2E=", "type":"file", "mtime":"Thu, 01 Jan 1970 00:00:07 GMT", "size":9 },
{ "name":"pipe?", "type":"other", "mtime":"Thu, 01 Jan 1970 00:00:07 GMT" }
]"#
        .to_vec();
        let at = text.iter().position(|byte| *byte == b'?').unwrap();
        text[at] = 0xff;
        let entries = parse(&text).unwrap();
        assert_eq!(entries[0], Entry { name: "sv01".into(), size: None, folder: true, time: 1795379538 });
        assert_eq!(entries[1], Entry { name: "L2E=".into(), size: Some(9), folder: false, time: 7 });
        assert!(!entries[2].folder && entries[2].size.is_none() && entries[2].name.contains('\u{fffd}'));
        for end in 0..text.len() - 1 {
            assert!(parse(&text[..end]).is_err(), "cut after {end}");
        }
    }

    #[test]
    fn no_listing_makes_it_panic_and_a_name_is_read_as_it_was_written() {
        let seed = std::env::var("MKV_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
        println!("MKV_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..20_000 {
            let name: String = (0..random.usize(1..20)).map(|_| random.char(..)).collect();
            let size = random.u64(..);
            let mut text = serde_json::to_vec(&serde_json::json!([
                { "name": name, "type": "file", "mtime": "Thu, 01 Jan 1970 00:00:07 GMT", "size": size }
            ]))
            .unwrap();
            let entry = Entry { name, size: Some(size), folder: false, time: 7 };
            assert_eq!(parse(&text).unwrap(), [entry]);
            for _ in 0..random.usize(1..5) {
                let at = random.usize(..text.len());
                text[at] = random.u8(..);
            }
            text.truncate(random.usize(..=text.len()));
            let _ = parse(&text);
        }
    }
}
