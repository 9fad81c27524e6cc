//! The record codec: what the index holds for a key, and for debris.
//!
//! ```text
//! record  = [ "INIT" ] [ "DELETED" ] fields volumes
//! debris  = [ "TIME" 16hex ] [ "WAIT" 16hex ] volumes
//! fields  = [ "HASH" 32hex ] [ "SIZE" 16hex ] [ "TIME" 16hex ] [ "VERS" 16hex ]
//! volumes = volume *( "," volume )
//! ```
//!
//! Hex is lower case. `INIT` was written by one fork of the Go master for a write under way; mkv
//! reads it and never writes it to a store of its own. A text that is not of this form is an error,
//! never a guess: no volume may begin with a tag.

use std::fmt::Write;

/// What stands at the beginning of a field, and so at the beginning of no volume's name.
pub const TAGS: [&str; 7] = ["INIT", "DELETED", "HASH", "SIZE", "TIME", "VERS", "WAIT"];

/// An md5 digest (RFC 1321).
pub type Hash = [u8; 16];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    #[default]
    Live,
    Unlinked,
    /// A write of a Go master that did not end.
    HalfWritten,
}

/// What the index holds for a key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    pub state: State,
    /// md5 of the value.
    pub hash: Option<Hash>,
    /// Bytes of the value.
    pub size: Option<u64>,
    /// When the value was written, in seconds since 1970.
    pub time: Option<u64>,
    /// The version in the blob's name; 0: the plain name.
    pub version: u64,
    /// `host:port` or `host:port/svXX`, as placement ordered them when they were written.
    pub replicas: Vec<String>,
}

/// Volumes that may hold an unwanted blob of one key and version.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Debris {
    /// Until then, in seconds since 1970, a 404 does not prove that the blob is gone.
    pub until: u64,
    /// Until then, in seconds since 1970, the blobs stay: their successors may not be on disk yet.
    pub wait: u64,
    pub replicas: Vec<String>,
}

impl Record {
    /// Whether a reader sees the value.
    pub fn live(&self) -> bool {
        self.state == State::Live
    }

    /// Whether the blob of this version on this replica is the value.
    pub fn names(&self, version: u64, replica: &String) -> bool {
        self.version == version && self.replicas.contains(replica)
    }

    /// Decodes a record; `None`: it is none.
    pub fn decode(text: &[u8]) -> Option<Record> {
        let mut rest = std::str::from_utf8(text).ok()?;
        let half = take_tag(&mut rest, "INIT");
        let unlinked = take_tag(&mut rest, "DELETED");
        let state = match (half, unlinked) {
            (true, _) => State::HalfWritten,
            (false, true) => State::Unlinked,
            (false, false) => State::Live,
        };
        Some(Record {
            state,
            hash: match take_tag(&mut rest, "HASH") {
                true => Some(unhex(take(&mut rest, 32)?)?),
                false => None,
            },
            size: take_number(&mut rest, "SIZE")?,
            time: take_number(&mut rest, "TIME")?,
            version: take_number(&mut rest, "VERS")?.unwrap_or(0),
            replicas: volumes(rest)?,
        })
    }

    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(160);
        match self.state {
            State::Live => {}
            State::Unlinked => text.push_str("DELETED"),
            State::HalfWritten => text.push_str("INIT"),
        }
        if let Some(hash) = self.hash {
            text.push_str("HASH");
            text.push_str(&hex(&hash));
        }
        put_number(&mut text, "SIZE", self.size);
        put_number(&mut text, "TIME", self.time);
        put_number(&mut text, "VERS", Some(self.version).filter(|v| *v > 0));
        text + &self.replicas.join(",")
    }
}

impl Debris {
    /// Decodes an entry; `None`: it is none.
    pub fn decode(text: &[u8]) -> Option<Debris> {
        let mut rest = std::str::from_utf8(text).ok()?;
        Some(Debris {
            until: take_number(&mut rest, "TIME")?.unwrap_or(0),
            wait: take_number(&mut rest, "WAIT")?.unwrap_or(0),
            replicas: volumes(rest)?,
        })
    }

    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(96);
        put_number(&mut text, "TIME", Some(self.until).filter(|t| *t > 0));
        put_number(&mut text, "WAIT", Some(self.wait).filter(|t| *t > 0));
        text + &self.replicas.join(",")
    }

    /// Makes this entry say what `other` says too.
    pub fn grow(&mut self, other: &Debris) {
        self.until = self.until.max(other.until);
        self.wait = self.wait.max(other.wait);
        for replica in &other.replicas {
            if !self.replicas.contains(replica) {
                self.replicas.push(replica.clone());
            }
        }
    }
}

/// Lower-case hex.
pub fn hex(hash: &Hash) -> String {
    format!("{:032x}", u128::from_be_bytes(*hash))
}

/// The digest that 32 lower-case hex digits stand for.
pub fn unhex(text: &str) -> Option<Hash> {
    digits(text, 32).map(u128::to_be_bytes)
}

/// The number that exactly 16 lower-case hex digits stand for.
pub fn number(text: &str) -> Option<u64> {
    digits(text, 16).map(|number| number as u64)
}

fn digits(text: &str, count: usize) -> Option<u128> {
    let lower = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    u128::from_str_radix(text, 16).ok().filter(|_| lower && text.len() == count)
}

fn put_number(text: &mut String, tag: &str, value: Option<u64>) {
    if let Some(value) = value {
        let _ = write!(text, "{tag}{value:016x}");
    }
}

fn take_tag(rest: &mut &str, tag: &str) -> bool {
    let Some(after) = rest.strip_prefix(tag) else { return false };
    *rest = after;
    true
}

fn take<'a>(rest: &mut &'a str, length: usize) -> Option<&'a str> {
    let (head, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(head)
}

/// An optional numeric field: the outer `None` is a field that does not decode.
fn take_number(rest: &mut &str, tag: &str) -> Option<Option<u64>> {
    if !take_tag(rest, tag) {
        return Some(None);
    }
    number(take(rest, 16)?).map(Some)
}

fn volumes(text: &str) -> Option<Vec<String>> {
    text.split(',').map(|name| is_volume(name).then(|| name.to_string())).collect()
}

/// The volume that a replica lies on.
pub fn volume_of(replica: &str) -> &str {
    replica.split('/').next().unwrap_or(replica)
}

/// Whether a volume, with or without a subvolume, may have this name.
pub fn is_volume(name: &str) -> bool {
    !name.is_empty()
        && !TAGS.iter().any(|tag| name.starts_with(tag))
        && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vectors() -> serde_json::Value {
        serde_json::from_str(include_str!("../../tests/vectors.json")).unwrap()
    }

    #[test]
    fn golden_records_decode_and_encode_again() {
        for vector in vectors()["records"].as_array().unwrap() {
            let text = vector["text"].as_str().unwrap();
            let record = Record::decode(text.as_bytes()).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(record.encode(), text);
            let state = match vector["state"].as_str().unwrap() {
                "live" => State::Live,
                "unlinked" => State::Unlinked,
                _ => State::HalfWritten,
            };
            assert_eq!(record.state, state, "{text}");
            let names: Vec<_> = vector["volumes"].as_array().unwrap().iter().collect();
            assert!(record.replicas.iter().eq(names.iter().map(|n| n.as_str().unwrap())), "{text}");
            assert_eq!(record.hash.map(|h| hex(&h)).as_deref(), vector["hash"].as_str());
            assert_eq!(record.size, vector["size"].as_u64());
            assert_eq!(record.time, vector["time"].as_u64());
            let version = vector["version_hex"].as_str().map_or(0, |v| number(v).unwrap());
            assert_eq!(record.version, version);
        }
    }

    #[test]
    fn what_is_no_record_does_not_decode() {
        for vector in vectors()["records_that_do_not_decode"].as_array().unwrap() {
            let text = vector.as_str().unwrap();
            assert_eq!(Record::decode(text.as_bytes()), None, "{text}");
        }
        assert_eq!(Record::decode(b"\xff\xfe"), None);
        assert_eq!(Record::decode("HASHéééééééééééééééé,a:1".as_bytes()), None);
    }

    #[test]
    fn every_decodable_text_encodes_to_itself() {
        let seed =
            std::env::var("MKV_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
        println!("MKV_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let parts = [
            "DELETED",
            "HASH",
            "SIZE",
            "TIME",
            "VERS",
            "INIT",
            "WAIT",
            ",",
            "a:1",
            "0",
            "é",
            "5d41402abc4b2a76b9719d911017c592",
            "0006289d3a1b2c3d",
            "b:2/sv01",
        ];
        for _ in 0..200_000 {
            let text: String =
                (0..random.usize(..8)).map(|_| parts[random.usize(..parts.len())]).collect();
            if let Some(record) = Record::decode(text.as_bytes()) {
                // A version of zero is none, and what is half-written is not unlinked too.
                assert_eq!(Record::decode(record.encode().as_bytes()), Some(record));
            }
            if let Some(debris) = Debris::decode(text.as_bytes()) {
                assert_eq!(Debris::decode(debris.encode().as_bytes()), Some(debris));
            }
        }
    }

    #[test]
    fn debris_grows_by_volumes_and_later_times() {
        let mut entry = Debris { until: 5, wait: 0, replicas: vec!["a:1".into()] };
        entry.grow(&Debris { until: 3, wait: 9, replicas: vec!["a:1".into(), "b:2/sv01".into()] });
        assert_eq!(entry.encode(), "TIME0000000000000005WAIT0000000000000009a:1,b:2/sv01");
        assert_eq!(Debris::decode(entry.encode().as_bytes()), Some(entry));
    }
}
