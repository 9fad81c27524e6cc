//! Signed links: a volume that shares a secret with the master answers only requests whose URL the master has signed.
//!
//! ```text
//! link      = path "?e=" expires "&k=" id "&s=" signature
//! expires   = 1*DIGIT                     ; seconds since 1970; the volume answers 403 after this time
//! id        = 8HEX                        ; the first bytes of md5(secret): tells the volume which secret to take
//! signature = 22base64url                 ; md5(expires class path " " secret), without padding
//! class     = "r" / "w"                   ; GET and HEAD / every other method
//! file      = secret LF [ secret LF ]     ; newest first
//! secret    = 32*256( ALPHA / DIGIT / "+" / "/" / "-" / "_" / "=" )
//! ```
//!
//! `path` is the decoded path of the URL. nginx's module secure_link makes the same md5; `volume.sh` configures it.
//! The secret stands last, so nobody can append to a signed path.

use std::fmt::{self, Display};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use md5::{Digest, Md5};

use crate::error::{Error, Result};
use crate::format::record::hex;

/// The length of a secret, in characters: those that nginx takes in its configuration as they are.
const LENGTH: std::ops::RangeInclusive<usize> = 32..=256;

/// How long the signature of a request of mkv's own is valid. The volume looks at the head of a request only, so this
/// has to cover the difference of two clocks, not the time of an upload.
pub const OWN: Duration = Duration::from_secs(12 * 3600);

/// The secret that mkv signs with. A file may hold an older one, too, which only volumes use.
pub struct Secret {
    text: String,
    id: String,
}

impl Secret {
    /// Reads a file of one or two secrets, and takes the first. Fails if other users can read the file.
    pub fn read(file: &Path) -> Result<Secret> {
        let wrong = |why: String| Error::Usage(format!("-secret: {} {why}", file.display()));
        let unreadable = |e| wrong(format!("cannot be read: {e}: make it with mkv secret FILE"));
        let (mut text, mut opened) = (String::new(), File::open(file).map_err(unreadable)?);
        let mode = opened.metadata().map_err(unreadable)?.permissions().mode();
        if mode & 0o007 != 0 {
            return Err(wrong("is open to every user: chmod 600 it".into()));
        }
        opened.read_to_string(&mut text).map_err(unreadable)?;
        let lines: Vec<&str> = text.strip_suffix('\n').unwrap_or(&text).split('\n').collect();
        if lines.len() > 2 || !lines.iter().all(|line| is_secret(line)) {
            let (low, high) = (LENGTH.start(), LENGTH.end());
            return Err(wrong(format!(
                "holds no secret, one or two lines of {low} to {high} of the characters A-Z a-z 0-9 + / - _ =: \
                 make it with mkv secret FILE"
            )));
        }
        Ok(Secret::new(lines[0]))
    }

    fn new(text: &str) -> Secret {
        Secret { text: text.into(), id: hex(&Md5::digest(text).into())[..8].into() }
    }

    /// The query that lets `method` through to this decoded path of a volume, for so long from now.
    pub fn query(&self, method: &str, path: impl Display, time: Duration) -> String {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.query_until(method, path, since.saturating_add(time).as_secs())
    }

    fn query_until(&self, method: &str, path: impl Display, expires: u64) -> String {
        let class = if matches!(method, "GET" | "HEAD") { 'r' } else { 'w' };
        let digest = Md5::digest(format!("{expires}{class}{path} {}", self.text));
        format!("?e={expires}&k={}&s={}", self.id, URL_SAFE_NO_PAD.encode(digest))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({})", self.id)
    }
}

fn is_secret(line: &str) -> bool {
    LENGTH.contains(&line.len()) && line.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/-_=".contains(&byte))
}

/// A new secret: 32 random bytes, as text.
pub fn generate() -> Result<String> {
    let mut bytes = [0; 32];
    let failed = |e| Error::Failed(format!("/dev/urandom: {e}"));
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes)).map_err(failed)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// Writes a new secret to a new file that only its owner can read.
pub fn create(file: &Path) -> Result<()> {
    let text = generate()?;
    let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    let written = created.and_then(|mut created| writeln!(created, "{text}").and_then(|()| created.sync_all()));
    written.map_err(|e| Error::Failed(format!("{}: {e}: name a new file in a folder that exists", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "0123456789abcdefghijklmnopqrstuvwxyz-_ABCDE";

    /// printf '1700000000r/sv04/60/08/L3dlaGF2ZQ== 0123456789abcdefghijklmnopqrstuvwxyz-_ABCDE' | openssl md5 -binary |
    /// base64 | tr '+/' '-_' | tr -d =
    #[test]
    fn golden_links_are_made() {
        let (secret, path) = (Secret::new(TEXT), "/sv04/60/08/L3dlaGF2ZQ==");
        for (methods, signature) in
            [(["GET", "HEAD"], "mGfXlVpBoDNUZ82XIKzLEg"), (["PUT", "DELETE"], "DZqH1IQB3D6-WI97w38BNA")]
        {
            for method in methods {
                let query = secret.query_until(method, path, 1_700_000_000);
                assert_eq!(query, format!("?e=1700000000&k=f7c208c8&s={signature}"));
            }
        }
        assert_eq!(format!("{secret:?}"), "Secret(f7c208c8)");
    }

    #[test]
    fn a_file_has_one_or_two_secrets_and_is_private() {
        let file = std::env::temp_dir().join(format!("mkv-secret-{}", fastrand::u64(..)));
        let read = |text: &str, mode: u32| {
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
            Secret::read(&file).map_err(|e| e.to_string())
        };
        let new = generate().unwrap();
        for text in [TEXT.to_string(), format!("{TEXT}\n"), format!("{TEXT}\n{new}\n"), format!("{TEXT}\n{new}")] {
            assert_eq!(read(&text, 0o640).unwrap().text, TEXT);
        }
        for text in ["", "\n", "short\n", &format!("{TEXT}\n\n"), &format!("{new}\n{TEXT}\n{new}\n"), &TEXT[..31]] {
            assert!(read(text, 0o600).unwrap_err().contains("holds no secret"), "{text:?}");
        }
        for odd in ["$", "\"", "\\", " ", "é", "\r", ";", "\0"] {
            assert!(read(&format!("{TEXT}{odd}\n"), 0o600).unwrap_err().contains("holds no secret"), "{odd:?}");
        }
        assert!(read(TEXT, 0o604).unwrap_err().contains("chmod 600"));
        std::fs::remove_file(&file).unwrap();
        assert!(Secret::read(&file).unwrap_err().to_string().contains("mkv secret"));
        create(&file).unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Secret::read(&file).unwrap().text.len() == 43 && create(&file).is_err());
        std::fs::remove_file(&file).unwrap();
    }
}
