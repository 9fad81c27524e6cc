//! Placement: from a key to the path of its blob and to its volumes, and from a path back to the key.
//!
//! ```text
//! path    = "/" 2hex "/" 2hex "/" name [ "." 16hex ]     ; the first two bytes of md5(key), and the version
//! name    = base64(key)                                  ; if no part between its slashes is empty or over 238 bytes
//!         / "~" base64url(key)                           ; otherwise, cut by "/" into parts of 238 characters
//! replica = volume [ "/sv" 2*hex ]                       ; upper-case hex
//! ```
//!
//! Both rules are minikeyvalue's, so mkv finds its files where they lie. The second form of a name and the version are
//! mkv's own.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use md5::{Digest, Md5};

use crate::format::record::number;

/// The longest key, in bytes: an S3 object's 1,024 below the longest name of a bucket, 63, and two slashes.
pub const KEY_MAX: usize = 1089;

/// The longest part of a name, in bytes. With the 17 bytes of a version it makes the 255 that file systems allow.
const PART_MAX: usize = 238;

/// The path of a key's blob, with its leading `/`. Version 0 is the plain name.
pub fn path(key: &[u8], version: u64) -> String {
    let digest = Md5::digest(key);
    let mut path = format!("/{:02x}/{:02x}/", digest[0], digest[1]);
    let plain = STANDARD.encode(key);
    if plain.split('/').all(|part| !part.is_empty() && part.len() <= PART_MAX) {
        path.push_str(&plain);
    } else {
        let text = format!("~{}", URL_SAFE_NO_PAD.encode(key));
        for (n, part) in text.as_bytes().chunks(PART_MAX).enumerate() {
            path.push_str(if n > 0 { "/" } else { "" });
            path.extend(part.iter().map(|byte| *byte as char));
        }
    }
    if version > 0 {
        path.push_str(&format!(".{version:016x}"));
    }
    path
}

/// The key and version of a blob's path; `None` if no key gives this path.
pub fn key_of(blob_path: &str) -> Option<(Vec<u8>, u64)> {
    let name = blob_path.get(7..)?;
    let (text, version) = match name.split_once('.') {
        Some((text, version)) => (text, number(version)?),
        None => (name, 0),
    };
    let key = match text.strip_prefix('~') {
        Some(text) => URL_SAFE_NO_PAD.decode(text.replace('/', "")).ok()?,
        None => STANDARD.decode(text).ok()?,
    };
    let whole = !key.is_empty() && key.len() <= KEY_MAX && path(&key, version) == blob_path;
    whole.then_some((key, version))
}

/// The volumes of a store and how values are spread over them.
#[derive(Debug, Clone)]
pub struct Placement {
    /// `host:port` of each volume.
    pub volumes: Vec<String>,
    /// How many volumes hold a key.
    pub replicas: usize,
    /// How many folders `svXX` a volume has; 1 means that blobs lie directly under the volume.
    pub subvolumes: u32,
}

impl Placement {
    /// The replicas that should hold a key, best score first. A volume's score is md5(key ++ volume).
    pub fn place(&self, key: &[u8]) -> Vec<String> {
        let score = |volume| Md5::new().chain_update(key).chain_update(volume).finalize().into();
        let mut scores: Vec<([u8; 16], &String)> = self.volumes.iter().map(|volume| (score(volume), volume)).collect();
        scores.sort_by_key(|(score, _)| std::cmp::Reverse(*score));
        let replica = |(score, volume): &([u8; 16], &String)| match self.subvolumes {
            1 => volume.to_string(),
            count => {
                let last = u32::from_be_bytes([score[12], score[13], score[14], score[15]]);
                format!("{volume}/sv{:02X}", last % count)
            }
        };
        scores.iter().take(self.replicas).map(replica).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vectors() -> serde_json::Value {
        serde_json::from_str(include_str!("../../tests/vectors.json")).unwrap()
    }

    fn bytes(hex: &serde_json::Value) -> Vec<u8> {
        let digits = hex.as_str().unwrap();
        (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap()).collect()
    }

    #[test]
    fn golden_paths_are_made_and_parsed() {
        let vectors = vectors();
        let all = ["paths", "second_form", "versioned"];
        for vector in all.iter().flat_map(|kind| vectors[kind].as_array().unwrap()) {
            let key = bytes(&vector["key_hex"]);
            let version = vector["version_hex"].as_str().map_or(0, |v| number(v).unwrap());
            let golden = vector["path"].as_str().unwrap();
            assert_eq!(path(&key, version), golden);
            assert_eq!(key_of(golden), Some((key, version)));
        }
    }

    #[test]
    fn golden_placements_are_made() {
        for vector in vectors()["placements"].as_array().unwrap() {
            let names = |field: &str| -> Vec<String> {
                vector[field].as_array().unwrap().iter().map(|v| v.as_str().unwrap().into()).collect()
            };
            let placement = Placement {
                volumes: names("volumes"),
                replicas: vector["replicas"].as_u64().unwrap() as usize,
                subvolumes: vector["subvolumes"].as_u64().unwrap() as u32,
            };
            assert_eq!(placement.place(&bytes(&vector["key_hex"])), names("placed_on"));
        }
    }

    #[test]
    fn every_key_has_a_usable_path_that_parses_to_the_key() {
        let seed = std::env::var("MKV_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
        println!("MKV_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for round in 0..50_000 {
            let length = 1 + random.usize(..if round % 10 == 0 { KEY_MAX } else { 40 });
            let few = random.bool();
            let key: Vec<u8> =
                (0..length).map(|_| if few { b"\xff\x3f/?"[random.usize(..4)] } else { random.u8(..) }).collect();
            let version = if random.bool() { 0 } else { random.u64(..) };
            let blob = path(&key, version);
            assert!(blob.split('/').skip(1).all(|part| !part.is_empty() && part.len() <= 255), "{blob}");
            assert_eq!(key_of(&blob), Some((key, version)), "{blob}");
        }
    }

    #[test]
    fn other_paths_are_not_blobs() {
        for stray in [
            "",
            "/",
            "/60/08/",
            "/60/08/é",
            "/60/09/L3dlaGF2ZQ==",
            "/60/08/L3dlaGF2ZQ",
            "/60/08/~L3dlaGF2ZQ",
            "/60/08/L3dlaGF2ZQ==.0",
            "/60/08/L3dlaGF2ZQ==.0000000000000000",
            "/60/08/L3dlaGF2ZQ==.0006289D3A1B2C3D",
            "/60/08/L3dlaGF2ZQ==.0006289d3a1b2c3d.0006289d3a1b2c3d",
            "/60/08/L3dl/aGF2ZQ==",
            "/6\u{e9}/08/L3dlaGF2ZQ==",
        ] {
            assert_eq!(key_of(stray), None, "{stray}");
        }
    }
}
