//! The record codec: what the index holds for a key, and for debris.
//!
//! ```text
//! record  = [ "INIT" ] [ "DELETED" ] fields [ "META " meta " " ] volumes
//! debris  = [ "TIME" 16hex ] [ "WAIT" 16hex ] volumes
//! fields  = [ "HASH" 32hex ] [ "SIZE" 16hex ] [ "TIME" 16hex ] [ "VERS" 16hex ]
//! meta    = 1*( %x21-7E )                                  ; no space, so no volume's name looks like it
//! volumes = volume *( "," volume )
//! ```
//!
//! Hex digits are lower case. One fork of the Go master wrote `INIT` for a write under way; mkv reads it and never
//! writes it. A text that does not match the grammar is an error, never a guess; for that reason no volume's name may
//! begin with a tag.
//!
//! *Debris* is the list of volumes that may hold an unwanted blob of one key and version. It is both the trace of a
//! write under way and the to-do list of deletions.

use std::fmt::Write;

/// The tags that begin a field. No volume's name may begin with one.
pub const TAGS: [&str; 7] = ["INIT", "DELETED", "HASH", "SIZE", "TIME", "VERS", "WAIT"];

/// An md5 digest (RFC 1321).
pub type Hash = [u8; 16];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    #[default]
    Live,
    Unlinked,
    /// A write that a Go master did not finish.
    HalfWritten,
}

impl State {
    /// The state of an encoded record, without decoding the rest of it.
    pub fn of(text: &[u8]) -> State {
        if text.starts_with(b"INIT") {
            State::HalfWritten
        } else if text.starts_with(b"DELETED") {
            State::Unlinked
        } else {
            State::Live
        }
    }
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
    /// The version in the blob's name; 0 is the plain name.
    pub version: u64,
    /// What S3 keeps beside a value, `name=value&…` (docs/formats.md); empty: nothing.
    pub meta: String,
    /// `host:port` or `host:port/svXX`, in the order that placement gave them at the time of the write.
    pub replicas: Vec<String>,
}

/// Volumes that may hold an unwanted blob of one key and version.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Debris {
    /// A 404 before this time (seconds since 1970) does not prove that the blob is gone: a request that was sent may
    /// still create it.
    pub doubtful_until: u64,
    /// The blobs stay until this time (seconds since 1970): the copies that replace them may not be on disk yet.
    pub keep_until: u64,
    pub replicas: Vec<String>,
}

impl Record {
    /// Whether a reader sees the value.
    pub fn live(&self) -> bool {
        self.state == State::Live
    }

    /// Whether the blob of this version on this replica is the value.
    pub fn is_at(&self, version: u64, replica: &str) -> bool {
        self.version == version && self.replicas.iter().any(|known| known == replica)
    }

    /// Decodes a record; `None` if the text does not match the grammar.
    pub fn decode(text: &[u8]) -> Option<Record> {
        let mut rest = std::str::from_utf8(text).ok()?;
        let state = State::of(text);
        take_tag(&mut rest, "INIT");
        take_tag(&mut rest, "DELETED");
        Some(Record {
            state,
            hash: match take_tag(&mut rest, "HASH") {
                true => Some(unhex(take(&mut rest, 32)?)?),
                false => None,
            },
            size: take_number(&mut rest, "SIZE")?,
            time: take_number(&mut rest, "TIME")?,
            version: take_number(&mut rest, "VERS")?.unwrap_or(0),
            meta: match take_tag(&mut rest, "META ") {
                true => take_word(&mut rest)?,
                false => String::new(),
            },
            replicas: volumes(rest)?,
        })
    }

    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(160 + self.meta.len());
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
        if !self.meta.is_empty() {
            let _ = write!(text, "META {} ", self.meta);
        }
        text + &self.replicas.join(",")
    }
}

impl Debris {
    /// Decodes an entry; `None` if the text does not match the grammar.
    pub fn decode(text: &[u8]) -> Option<Debris> {
        let mut rest = std::str::from_utf8(text).ok()?;
        Some(Debris {
            doubtful_until: take_number(&mut rest, "TIME")?.unwrap_or(0),
            keep_until: take_number(&mut rest, "WAIT")?.unwrap_or(0),
            replicas: volumes(rest)?,
        })
    }

    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(96);
        put_number(&mut text, "TIME", Some(self.doubtful_until).filter(|t| *t > 0));
        put_number(&mut text, "WAIT", Some(self.keep_until).filter(|t| *t > 0));
        text + &self.replicas.join(",")
    }

    /// Adds the other entry's replicas and takes the later times.
    pub fn merge(&mut self, other: &Debris) {
        self.doubtful_until = self.doubtful_until.max(other.doubtful_until);
        self.keep_until = self.keep_until.max(other.keep_until);
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

/// Parses 32 lower-case hex digits.
pub fn unhex(text: &str) -> Option<Hash> {
    digits(text, 32).map(u128::to_be_bytes)
}

/// Parses exactly 16 lower-case hex digits.
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

/// Takes a word of printable ASCII and the space behind it.
fn take_word(rest: &mut &str) -> Option<String> {
    let (word, after) = rest.split_once(' ')?;
    *rest = after;
    (!word.is_empty() && word.bytes().all(|byte| byte.is_ascii_graphic())).then(|| word.to_string())
}

/// Takes an optional numeric field; the outer `None` means that it does not decode.
fn take_number(rest: &mut &str, tag: &str) -> Option<Option<u64>> {
    if !take_tag(rest, tag) {
        return Some(None);
    }
    number(take(rest, 16)?).map(Some)
}

fn volumes(text: &str) -> Option<Vec<String>> {
    text.split(',').map(|name| is_volume(name).then(|| name.to_string())).collect()
}

/// The volume of a replica: `host:port` without the subvolume.
pub fn volume_of(replica: &str) -> &str {
    replica.split('/').next().unwrap_or(replica)
}

/// Whether this is a valid name of a volume, with or without a subvolume.
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
    fn malformed_records_do_not_decode() {
        for vector in vectors()["records_that_do_not_decode"].as_array().unwrap() {
            let text = vector.as_str().unwrap();
            assert_eq!(Record::decode(text.as_bytes()), None, "{text}");
        }
        assert_eq!(Record::decode(b"\xff\xfe"), None);
        assert_eq!(Record::decode("HASHéééééééééééééééé,a:1".as_bytes()), None);
    }

    #[test]
    fn decoding_an_encoded_record_gives_the_same_record() {
        let seed = std::env::var("MKV_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
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
            "META ",
            "etag=a%20b,c ",
            ",",
            "a:1",
            "0",
            "é",
            "5d41402abc4b2a76b9719d911017c592",
            "0006289d3a1b2c3d",
            "b:2/sv01",
        ];
        for _ in 0..200_000 {
            let text: String = (0..random.usize(..8)).map(|_| parts[random.usize(..parts.len())]).collect();
            if let Some(record) = Record::decode(text.as_bytes()) {
                assert_eq!(Record::decode(record.encode().as_bytes()), Some(record));
            }
            if let Some(debris) = Debris::decode(text.as_bytes()) {
                assert_eq!(Debris::decode(debris.encode().as_bytes()), Some(debris));
            }
        }
    }

    #[test]
    fn merging_debris_adds_volumes_and_takes_the_later_times() {
        let mut entry = Debris { doubtful_until: 5, keep_until: 0, replicas: vec!["a:1".into()] };
        entry.merge(&Debris { doubtful_until: 3, keep_until: 9, replicas: vec!["a:1".into(), "b:2/sv01".into()] });
        assert_eq!(entry.encode(), "TIME0000000000000005WAIT0000000000000009a:1,b:2/sv01");
        assert_eq!(Debris::decode(entry.encode().as_bytes()), Some(entry));
    }
}
