//! The frozen formats: where a blob lies and what the index holds for a key.
//!
//! Everything here is pure: no I/O, no clock, no other room. docs/formats.md has the grammars; `tests/vectors.json`
//! holds golden vectors. A store written by the Go minikeyvalue is readable in place, so none of these rules may
//! change.

pub mod placement;
pub mod record;
pub mod tar;
pub mod time;

use std::fmt::Display;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

/// The characters that stay as they are in a percent-encoded key: RFC 3986's unreserved ones and `/`.
const KEY_SET: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// A key as it stands in a URL.
pub fn percent_encoded(key: &[u8]) -> impl Display {
    percent_encode(key, KEY_SET)
}

/// A key as messages and logs show it: in quotes, on one line, with escapes for what is not printable ASCII.
pub fn quoted(key: &[u8]) -> String {
    format!("\"{}\"", key.escape_ascii())
}

/// Keys below it are the master's own: clients can read them, and write none.
const OWN_KEYS: &[u8] = b"/.mkv/";

/// The keys of the index's backups, which take turns.
pub const BACKUP_KEYS: [&[u8]; 2] = [b"/.mkv/backup/1", b"/.mkv/backup/2"];

/// Whether a key is the master's own.
pub fn is_own(key: &[u8]) -> bool {
    key.starts_with(OWN_KEYS)
}

/// A key as a page shows it: UTF-8 as it is, and `%XX` for every byte that is not part of UTF-8 or that would not be
/// seen, such as control characters and marks that change the direction of text. A `%` that would look like such an
/// escape is shown as `%25`, so that `unshown` gives the key back.
pub fn shown(key: &[u8]) -> String {
    let mut text = String::new();
    let escape = |text: &mut String, bytes: &[u8]| bytes.iter().for_each(|byte| *text += &format!("%{byte:02X}"));
    let mut rest = key;
    while !rest.is_empty() {
        let valid = match std::str::from_utf8(rest) {
            Ok(valid) => valid,
            Err(e) => std::str::from_utf8(&rest[..e.valid_up_to()]).unwrap_or_default(),
        };
        for (at, char) in valid.char_indices() {
            let is_escape = char == '%' && is_hex_pair(&rest[at + 1..]);
            if is_escape || is_invisible(char) {
                escape(&mut text, char.encode_utf8(&mut [0; 4]).as_bytes());
            } else {
                text.push(char);
            }
        }
        let bad = usize::from(valid.len() < rest.len());
        escape(&mut text, &rest[valid.len()..valid.len() + bad]);
        rest = &rest[valid.len() + bad..];
    }
    text
}

/// The key that `shown` shows as this text.
pub fn unshown(text: &str) -> Vec<u8> {
    percent_encoding::percent_decode_str(text).collect()
}

fn is_hex_pair(bytes: &[u8]) -> bool {
    bytes.len() > 1 && bytes[..2].iter().all(u8::is_ascii_hexdigit)
}

/// Whether a character is not seen where it stands: control and format characters, and line separators.
fn is_invisible(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(char, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_key_is_text_that_gives_the_key_back() {
        for (key, text) in [
            (b"/a b<c>?".as_slice(), "/a b<c>?"),
            ("/été".as_bytes(), "/été"),
            (b"/\xff\xc3", "/%FF%C3"),
            (b"/100%", "/100%"),
            (b"/%41%4", "/%2541%4"),
            (b"/%\xff", "/%%FF"),
            ("/a\n\u{202e}b".as_bytes(), "/a%0A%E2%80%AEb"),
        ] {
            assert_eq!(shown(key), text);
            assert_eq!(unshown(text), key);
        }
        let seed = std::env::var("MKV_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
        println!("MKV_SEED={seed}");
        let (mut random, bytes) = (fastrand::Rng::with_seed(seed), b"%%%412aF/\xc3\xa9\xff\n");
        for _ in 0..10_000 {
            let key: Vec<u8> = (0..8).map(|_| bytes[random.usize(..bytes.len())]).collect();
            assert_eq!(unshown(&shown(&key)), key, "{}", quoted(&key));
        }
    }
}
