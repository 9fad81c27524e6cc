//! A second implementation of blob paths and placement, to check the server against.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use md5::{Digest, Md5};

const PART: usize = 238;

/// The path of a blob below its volume or subvolume. Version 0 is the plain name.
pub fn path(key: &[u8], version: u64) -> String {
    let base64 = STANDARD.encode(key);
    let usable = base64.split('/').all(|part| (1..=PART).contains(&part.len()));
    let name = if usable {
        base64
    } else {
        let text = format!("~{}", URL_SAFE_NO_PAD.encode(key));
        let parts: Vec<&str> =
            (0..text.len()).step_by(PART).map(|from| &text[from..text.len().min(from + PART)]).collect();
        parts.join("/")
    };
    let digest = md5(key);
    let suffix = if version == 0 { String::new() } else { format!(".{version:016x}") };
    format!("/{}/{}/{name}{suffix}", &digest[..2], &digest[2..4])
}

/// The version in a blob's path.
pub fn version_of(path: &str) -> u64 {
    path.split_once('.').map_or(0, |(_, version)| u64::from_str_radix(version, 16).expect("16 hex digits"))
}

/// The volumes that should hold a key, highest score first, each with its subvolume.
pub fn place(key: &[u8], volumes: &[String], replicas: usize, subvolumes: u32) -> Vec<String> {
    let score = |volume: &String| md5(&[key, volume.as_bytes()].concat());
    let mut best: Vec<(String, &String)> = volumes.iter().map(|v| (score(v), v)).collect();
    best.sort_by(|a, b| b.cmp(a));
    best.truncate(replicas);
    best.into_iter()
        .map(|(score, volume)| {
            let last = u32::from_str_radix(&score[24..], 16).expect("hex digits");
            match subvolumes {
                1 => volume.clone(),
                n => format!("{volume}/sv{:02X}", last % n),
            }
        })
        .collect()
}

/// The query that lets a request through to a volume that checks signatures. `class`: r for GET and HEAD, w for all other
/// methods; `path`: on the volume.
pub fn signature(secret: &str, class: char, path: &str, expires: u64) -> String {
    let digest = Md5::digest(format!("{expires}{class}{path} {secret}"));
    format!("?e={expires}&k={}&s={}", &md5(secret.as_bytes())[..8], URL_SAFE_NO_PAD.encode(digest))
}

/// The md5 in lower-case hex.
pub fn md5(bytes: &[u8]) -> String {
    Md5::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The md5 in base64, as in RFC 1864.
pub fn md5_base64(bytes: &[u8]) -> String {
    STANDARD.encode(Md5::digest(bytes))
}

#[test]
fn the_reference_matches_the_golden_vectors() {
    let vectors: serde_json::Value = serde_json::from_str(include_str!("../../vectors.json")).unwrap();
    let rows = |name: &str| vectors[name].as_array().unwrap().clone();
    let unhex = |text: &serde_json::Value| -> Vec<u8> {
        let digits = text.as_str().unwrap();
        (0..digits.len()).step_by(2).map(|n| u8::from_str_radix(&digits[n..n + 2], 16).unwrap()).collect()
    };
    for row in ["paths", "second_form", "versioned"].into_iter().flat_map(rows) {
        let version = row["version_hex"].as_str().map_or(0, |hex| u64::from_str_radix(hex, 16).unwrap());
        let golden = row["path"].as_str().unwrap();
        assert_eq!(path(&unhex(&row["key_hex"]), version), golden);
        assert_eq!(version_of(golden), version);
    }
    for row in rows("placements") {
        let names = |field: &str| -> Vec<String> {
            row[field].as_array().unwrap().iter().map(|v| v.as_str().unwrap().into()).collect()
        };
        let replicas = row["replicas"].as_u64().unwrap() as usize;
        let subvolumes = row["subvolumes"].as_u64().unwrap() as u32;
        let placed = place(&unhex(&row["key_hex"]), &names("volumes"), replicas, subvolumes);
        assert_eq!(placed, names("placed_on"));
    }
}
