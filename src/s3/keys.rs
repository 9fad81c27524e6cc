//! The file of keys (`-s3keys`): who may sign requests, and what each may do.
//!
//! ```text
//! file   = *( line LF )
//! line   = [ access SP secret [ SP "ro" ] *( SP bucket ) ] [ "#" comment ]    ; SP: any spaces and tabs
//! access = 3*128( ALPHA / DIGIT / "." / "_" / "-" )
//! secret = 8*128VCHAR                        ; a "#" in it begins no comment
//! bucket = 3*63( ALPHA / DIGIT / "." / "_" / "-" )
//! ```
//!
//! With `ro` a key may only read. One with buckets may use these only, one without may use all.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const UPPERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

pub struct Key {
    access: String,
    pub(super) secret: String,
    read_only: bool,
    /// The buckets that it may use. Empty: all.
    buckets: Vec<String>,
}

impl Key {
    /// Whether it may read, or write, in this bucket. `None`: the request names no bucket.
    pub fn may(&self, writes: bool, bucket: Option<&str>) -> bool {
        let is_its = |bucket| self.buckets.is_empty() || self.buckets.iter().any(|its| its == bucket);
        !(writes && self.read_only) && bucket.is_none_or(is_its)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.access)
    }
}

#[derive(Debug)]
pub struct Keys {
    by_access: HashMap<String, Key>,
}

impl Keys {
    /// Reads a file of keys. Returns a warning, too, if other users can read the file.
    pub fn read(file: &Path) -> Result<(Keys, Option<String>), String> {
        let unreadable = |e: io::Error| format!("{} cannot be read: {e}", file.display());
        let (mut text, mut opened) = (String::new(), File::open(file).map_err(unreadable)?);
        let mode = opened.metadata().map_err(unreadable)?.permissions().mode() & 0o777;
        opened.read_to_string(&mut text).map_err(unreadable)?;
        let keys = Keys::parse(&text).map_err(|(line, why)| format!("{}, line {line}: {why}", file.display()))?;
        let is_open = mode & 0o077 != 0;
        let warning = || format!("{} has mode {mode:03o}, so other users can read it: chmod 600 it", file.display());
        Ok((keys, is_open.then(warning)))
    }

    pub(super) fn parse(text: &str) -> Result<Keys, (usize, String)> {
        let mut by_access = HashMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            let Some(key) = parse_line(line).map_err(|why| (number, why))? else { continue };
            if by_access.insert(key.access.clone(), key).is_some() {
                return Err((number, "the access key stands there twice".into()));
            }
        }
        Ok(Keys { by_access })
    }

    pub fn get(&self, access: &str) -> Option<&Key> {
        self.by_access.get(access)
    }
}

/// The key of a line, if there is one. Errors do not repeat the line: it may hold a secret.
fn parse_line(line: &str) -> Result<Option<Key>, String> {
    let is_space = |c| c == ' ' || c == '\t';
    let mut words = line.split(is_space).filter(|word| !word.is_empty()).peekable();
    let Some(access) = words.next_if(|word| !word.starts_with('#')) else {
        return Ok(None);
    };
    if !is_name(access, 3..=128) {
        return Err("the access key is not 3 to 128 of the characters A-Z a-z 0-9 . _ -".into());
    }
    let secret = words.next().unwrap_or_default();
    if !(8..=128).contains(&secret.len()) || !secret.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the secret is not 8 to 128 printable characters of ASCII".into());
    }
    let read_only = words.next_if_eq(&"ro").is_some();
    let buckets: Vec<String> = words.take_while(|word| !word.starts_with('#')).map(String::from).collect();
    if !buckets.iter().all(|bucket| is_name(bucket, 3..=63)) {
        return Err("the secret is followed by something other than ro and names of buckets".into());
    }
    Ok(Some(Key { access: access.into(), secret: secret.into(), read_only, buckets }))
}

fn is_name(text: &str, lengths: RangeInclusive<usize>) -> bool {
    lengths.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// A new access key and its secret, of letters and digits: 103 and 238 random bits.
pub fn generate() -> io::Result<(String, String)> {
    let mut random = File::open("/dev/urandom")?;
    Ok((draw(&mut random, UPPERS, 20)?, draw(&mut random, LETTERS, 40)?))
}

/// Draws characters. Bytes past the last whole multiple of the alphabet are left out, so that all are equally likely.
fn draw(random: &mut impl Read, alphabet: &[u8], length: usize) -> io::Result<String> {
    let mut text = String::new();
    while text.len() < length {
        let mut bytes = [0; 64];
        random.read_exact(&mut bytes)?;
        let even = bytes.iter().map(|byte| *byte as usize).filter(|byte| *byte < 256 / alphabet.len() * alphabet.len());
        text.extend(even.map(|byte| alphabet[byte % alphabet.len()] as char).take(length - text.len()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_with_what_they_may_do() {
        let keys = Keys::parse(
            "# who\n\nALL secret/+=#!~\r\n  READ\t secret-2  ro # why\nONE secret-3 one two.b\n #x\nBOTH secret-4 ro one",
        );
        let keys = keys.unwrap();
        let may = |access: &str| {
            let key = keys.get(access).unwrap();
            let cases = [(false, None), (true, None), (false, Some("one")), (true, Some("one")), (true, Some("three"))];
            cases.map(|(writes, bucket)| key.may(writes, bucket))
        };
        assert_eq!(may("ALL"), [true; 5]);
        assert_eq!(may("READ"), [true, false, true, false, false]);
        assert_eq!(may("ONE"), [true, true, true, true, false]);
        assert_eq!(may("BOTH"), [true, false, true, false, false]);
        assert!(!keys.get("BOTH").unwrap().may(false, Some("three")));
        assert_eq!(keys.get("ALL").unwrap().secret, "secret/+=#!~");
        assert_eq!(keys.get("ONE").unwrap().buckets, ["one", "two.b"]);
        assert!(keys.get("all").is_none() && keys.get("").is_none());
        assert_eq!(format!("{keys:?}").matches("secret").count(), 0);
    }

    #[test]
    fn a_wrong_line_is_an_error_that_names_it() {
        for (text, why) in [
            ("ab secret-1", "access key is not"),
            ("abc/d secret-1", "access key is not"),
            ("abc", "secret is not"),
            ("abc short", "secret is not"),
            ("abc sécret-1", "secret is not"),
            ("abc secret-1 RO", "other than"),
            ("abc secret-1 bucket ro", "other than"),
            ("abc secret-1 b/c/d", "other than"),
            ("KEY other-secret", "twice"),
            (&"a".repeat(129), "access key is not"),
            (&format!("abc {}", "s".repeat(129)), "secret is not"),
        ] {
            let (line, error) = Keys::parse(&format!("KEY secret-0\n#\n{text}\n")).unwrap_err();
            assert!(line == 3 && error.contains(why), "{text}: {line} {error}");
        }
    }

    #[test]
    fn a_file_that_others_can_read_gives_a_warning() {
        let file = std::env::temp_dir().join(format!("mkv-keys-{}", fastrand::u64(..)));
        let (access, secret) = generate().unwrap();
        for (text, mode, warns, keys) in [
            (format!("{access} {secret}\n"), 0o600, false, 1),
            (format!("{access} {secret}"), 0o400, false, 1),
            (String::new(), 0o640, true, 0),
        ] {
            let _ = std::fs::remove_file(&file);
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
            let (read, warning) = Keys::read(&file).unwrap();
            assert_eq!((warning.is_some(), read.by_access.len()), (warns, keys), "{warning:?}");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(Keys::read(&file).unwrap_err().contains("cannot be read"));
    }

    #[test]
    fn generated_keys_are_right_and_differ() {
        let pairs: Vec<_> = (0..100).map(|_| generate().unwrap()).collect();
        for (access, secret) in &pairs {
            assert!(access.len() == 20 && access.bytes().all(|byte| UPPERS.contains(&byte)), "{access}");
            assert!(secret.len() == 40 && Keys::parse(&format!("{access} {secret}")).is_ok());
        }
        let of_all: std::collections::HashSet<char> = pairs.iter().flat_map(|(_, secret)| secret.chars()).collect();
        assert_eq!(of_all.len(), LETTERS.len());
    }
}
