//! Placement: from a key to the path of its blob and to its volumes, and from a path back.
//!
//! Both rules are minikeyvalue's, so that its files are found where they lie; the second form of a
//! name and the version are mkv's own. `shared/DESIGN.md` of the project has the rules in words.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use md5::{Digest, Md5};

use crate::format::record::number;

/// The most bytes a key may have.
pub const KEY_MAX: usize = 1024;

/// The most bytes of one part of a name: with a version's 17 it is the 255 that file systems allow.
const PART_MAX: usize = 238;

/// The path of a key's blob, with its leading `/`; version 0 is the plain name.
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

/// The key and version whose path this is; `None`: it is the path of no blob.
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

/// The volumes, with their subvolumes, that should hold a key: `replicas` of them, best score first.
pub fn place(key: &[u8], volumes: &[String], replicas: usize, subvolumes: u32) -> Vec<String> {
    let mut scores: Vec<([u8; 16], &String)> = volumes
        .iter()
        .map(|v| (Md5::new().chain_update(key).chain_update(v).finalize().into(), v))
        .collect();
    scores.sort_by_key(|(score, _)| std::cmp::Reverse(*score));
    let replica = |(score, volume): &([u8; 16], &String)| match subvolumes {
        1 => volume.to_string(),
        n => {
            let last = u32::from_be_bytes([score[12], score[13], score[14], score[15]]);
            format!("{volume}/{}", subvolume(last % n))
        }
    };
    scores.iter().take(replicas).map(replica).collect()
}

/// The name of a subvolume's folder.
pub fn subvolume(n: u32) -> String {
    format!("sv{n:02X}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vectors() -> serde_json::Value {
        serde_json::from_str(include_str!("../../tests/vectors.json")).unwrap()
    }

    fn bytes(hex: &serde_json::Value) -> Vec<u8> {
        let digits = hex.as_str().unwrap();
        (0..digits.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn golden_paths_come_out_and_turn_back() {
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
    fn golden_placements_come_out() {
        for vector in vectors()["placements"].as_array().unwrap() {
            let names = |field: &str| -> Vec<String> {
                vector[field]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|v| v.as_str().unwrap().into())
                    .collect()
            };
            let replicas = vector["replicas"].as_u64().unwrap() as usize;
            let subvolumes = vector["subvolumes"].as_u64().unwrap() as u32;
            let placed = place(&bytes(&vector["key_hex"]), &names("volumes"), replicas, subvolumes);
            assert_eq!(placed, names("placed_on"));
        }
    }

    #[test]
    fn every_key_gives_a_usable_path_that_turns_back() {
        let seed =
            std::env::var("MKV_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
        println!("MKV_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for round in 0..50_000 {
            let length = 1 + random.usize(..if round % 10 == 0 { KEY_MAX } else { 40 });
            let few = random.bool();
            let key: Vec<u8> = (0..length)
                .map(|_| if few { b"\xff\x3f/?"[random.usize(..4)] } else { random.u8(..) })
                .collect();
            let version = if random.bool() { 0 } else { random.u64(..) };
            let blob = path(&key, version);
            assert!(
                blob.split('/').skip(1).all(|part| !part.is_empty() && part.len() <= 255),
                "{blob}"
            );
            assert_eq!(key_of(&blob), Some((key, version)), "{blob}");
        }
    }

    #[test]
    fn what_does_not_give_its_own_path_back_is_no_blob() {
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
