//! Request routing: method and target to command. Pure: no I/O.

use percent_encoding::percent_decode_str;

use crate::error::{Error, Result};
use crate::format::is_own;
use crate::format::placement::KEY_MAX;
use crate::store::{List, Listed};

/// A request of the API. A key is the percent-decoded path, with its leading `/`.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// GET and HEAD. `path`: the target's path as it was sent, for the fallback server.
    Get {
        key: Vec<u8>,
        path: String,
    },
    Put {
        key: Vec<u8>,
        replace: bool,
    },
    Delete(Vec<u8>),
    Unlink(Vec<u8>),
    Relink(Vec<u8>),
    Rebalance(Vec<u8>),
    List(List),
    Metrics,
    Health,
    Ready,
    Stats,
    Backup,
    /// The log of changes, or only what it says first.
    Log(Option<Position>),
    Status(View, Browse),
}

impl Command {
    /// Whether it changes a key.
    pub fn writes(&self) -> bool {
        use Command::{Delete, Put, Rebalance, Relink, Unlink};
        matches!(self, Put { .. } | Delete(_) | Unlink(_) | Relink(_) | Rebalance(_))
    }
}

/// Where a reader of the log is: its last change, and the last run that it has followed.
#[derive(Debug, Clone, PartialEq)]
pub struct Position {
    pub since: u64,
    pub run: String,
}

/// What a request for the page wants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum View {
    Page,
    /// The figures, as JSON.
    Figures,
    /// Keys, as JSON.
    Keys,
}

/// Which keys the page shows, as `format::shown` writes keys.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Browse {
    pub prefix: String,
    pub start: String,
}

/// Parses a request's method and target (RFC 9112, origin or absolute form).
pub fn route(method: &str, target: &str) -> Result<Command> {
    let (absolute, target) = match target.strip_prefix("http://") {
        Some(rest) => (true, &rest[rest.find(['/', '?']).unwrap_or(rest.len())..]),
        None => (false, target),
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let path = if absolute && path.is_empty() { "/" } else { path };
    if !path.starts_with('/') {
        return Err(Error::BadRequest("the request target does not begin with /".into()));
    }
    if target.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(Error::BadRequest("a control character: send it percent-encoded".into()));
    }
    let key = decode(path)?;
    if key.len() > KEY_MAX {
        return Err(Error::KeyTooLong(key.len()));
    }
    if !query.is_empty() {
        let command = if matches!(method, "GET" | "HEAD") { query_of(key, query) } else { Err(FORBIDDEN_QUERY) };
        // The Go master knows no HEAD of a list.
        let has_head = matches!(command, Ok(Command::Status(..) | Command::Stats));
        return if method == "GET" || has_head { command } else { Err(FORBIDDEN_QUERY) };
    }
    match method {
        "PUT" | "REPLACE" | "DELETE" | "UNLINK" | "RELINK" if is_own(&key) => Err(OWN_KEY),
        "GET" | "HEAD" => Ok(Command::Get { key, path: path.to_string() }),
        "PUT" => Ok(Command::Put { key, replace: false }),
        "REPLACE" => Ok(Command::Put { key, replace: true }),
        "DELETE" => Ok(Command::Delete(key)),
        "UNLINK" => Ok(Command::Unlink(key)),
        "RELINK" => Ok(Command::Relink(key)),
        "REBALANCE" => Ok(Command::Rebalance(key)),
        _ => Err(Error::Method),
    }
}

const FORBIDDEN_QUERY: Error = Error::Forbidden(
    "unknown query: GET takes ?list, ?unlinked, ?writing, ?metrics, ?health, ?ready, ?stats, ?status, ?backup and \
     ?log; a ? in a key is sent as %3F",
);

const OWN_KEY: Error = Error::Forbidden("keys below /.mkv/ are the master's own: choose another key");

fn query_of(prefix: Vec<u8>, query: &str) -> Result<Command> {
    let mut options = query.split('&');
    // Prometheus and others send a bare word as `word=`.
    let of = match options.next().map(|word| word.strip_suffix('=').unwrap_or(word)) {
        Some("list") => Listed::Live,
        Some("unlinked") => Listed::Unlinked,
        Some("writing") => Listed::Writing,
        Some("metrics") if prefix == b"/" => return Ok(Command::Metrics),
        Some("health") if prefix == b"/" => return Ok(Command::Health),
        Some("ready") if prefix == b"/" => return Ok(Command::Ready),
        Some("stats") if prefix == b"/" => return Ok(Command::Stats),
        Some("status") if prefix == b"/" => return status_of(View::Page, options),
        Some("status=json") if prefix == b"/" => return status_of(View::Figures, options),
        Some("status=keys") if prefix == b"/" => return status_of(View::Keys, options),
        Some("backup") if prefix == b"/" => return Ok(Command::Backup),
        Some("log") if prefix == b"/" => return position_of(options).map(Command::Log),
        _ => return Err(FORBIDDEN_QUERY),
    };
    let mut list = List { of, prefix, start: Vec::new(), limit: 0, url: false };
    for option in options.filter(|option| !option.is_empty()) {
        match option.split_once('=').unwrap_or((option, "")) {
            // A plus is a space, as in a form.
            ("start", key) => list.start = decode(&key.replace('+', " "))?,
            ("limit", "") => {}
            ("limit", n) => {
                let wrong = |_| Error::BadRequest(format!("limit={n} is not a number of keys"));
                list.limit = n.parse().map_err(wrong)?;
            }
            ("encoding", "url") => list.url = true,
            (name, _) => {
                let text = format!("{name}: a list takes limit=N, start=KEY and encoding=url");
                return Err(Error::BadRequest(text));
            }
        }
    }
    Ok(Command::List(list))
}

fn status_of<'a>(view: View, options: impl Iterator<Item = &'a str>) -> Result<Command> {
    let mut browse = Browse::default();
    for option in options.filter(|option| !option.is_empty()) {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let value = decode(&value.replace('+', " "))?;
        let value = String::from_utf8(value).map_err(|_| Error::BadRequest(format!("{name} is not UTF-8")))?;
        match name {
            "prefix" => browse.prefix = value,
            "start" => browse.start = value,
            _ => return Err(Error::BadRequest(format!("{name}: the page takes prefix=KEY and start=KEY"))),
        }
    }
    Ok(Command::Status(view, browse))
}

fn position_of<'a>(options: impl Iterator<Item = &'a str>) -> Result<Option<Position>> {
    let (mut since, mut run) = (None, String::new());
    for option in options.filter(|option| !option.is_empty()) {
        match option.split_once('=').unwrap_or((option, "")) {
            ("since", n) => since = Some(n.parse().map_err(|_| Error::BadRequest(format!("since={n} is no change")))?),
            ("run", id) => run = id.to_string(),
            (name, _) => return Err(Error::BadRequest(format!("{name}: the log takes since=CHANGE and run=ID"))),
        }
    }
    Ok(since.map(|since| Position { since, run }))
}

fn decode(text: &str) -> Result<Vec<u8>> {
    let hex = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_hexdigit);
    let bytes = text.as_bytes();
    let broken = |(at, _): (usize, &u8)| !(hex(bytes.get(at + 1)) && hex(bytes.get(at + 2)));
    if bytes.iter().enumerate().filter(|(_, byte)| **byte == b'%').any(broken) {
        return Err(Error::BadRequest("a % is not followed by two hex digits: send a % as %25".into()));
    }
    Ok(percent_decode_str(text).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::status;

    fn get(target: &str) -> Result<Command> {
        route("GET", target)
    }

    #[test]
    fn a_key_is_the_decoded_path() {
        for (target, key) in [
            ("/wehave", b"/wehave".as_slice()),
            ("/", b"/"),
            ("//a//", b"//a//"),
            ("/what%3f", b"/what?"),
            ("/a+b%20c", b"/a+b c"),
            ("/%00%ff", b"/\x00\xff"),
            ("http://host:3000/x", b"/x"),
            ("/x?", b"/x"),
        ] {
            assert_eq!(route("DELETE", target), Ok(Command::Delete(key.into())), "{target}");
        }
    }

    #[test]
    fn an_absolute_target_may_have_no_path() {
        assert!(matches!(get("http://any.host?list"), Ok(Command::List(list)) if list.prefix == b"/"));
        assert!(get("?list").is_err());
    }

    #[test]
    fn a_list_takes_its_options_in_any_order() {
        let list = List { of: Listed::Unlinked, prefix: b"/p".into(), start: b"/p/\xff q".into(), limit: 7, url: true };
        let target = "/p?unlinked&encoding=url&limit=7&start=%2Fp%2F%FF+q";
        assert_eq!(get(target), Ok(Command::List(list)));
    }

    #[test]
    fn a_word_may_have_an_empty_value() {
        assert_eq!(get("/?metrics="), Ok(Command::Metrics));
        assert_eq!(get("/?health="), get("/?health"));
        assert_eq!(get("/?status="), get("/?status"));
        assert_eq!(get("/a?list=&limit="), get("/a?list"));
    }

    #[test]
    fn the_page_takes_a_prefix_and_a_start() {
        let browse = Browse { prefix: "/a b%FF".into(), start: "/a b%FF/c".into() };
        let command = get("/?status=keys&prefix=%2Fa+b%25FF&start=/a%20b%25FF/c");
        assert_eq!(command, Ok(Command::Status(View::Keys, browse)));
        assert_eq!(route("HEAD", "/?status"), Ok(Command::Status(View::Page, Browse::default())));
    }

    #[test]
    fn the_log_takes_a_position() {
        let position = Position { since: 7, run: "0f".into() };
        assert_eq!(get("/?log&since=7&run=0f"), Ok(Command::Log(Some(position))));
        assert_eq!(get("/?log"), Ok(Command::Log(None)));
    }

    #[test]
    fn wrong_requests_get_the_documented_status() {
        for (method, target, status) in [
            ("GET", "/a?list&limit=x", 400),
            ("GET", "/a?list&limit=-1", 400),
            ("GET", "/a?list&limt=1", 400),
            ("GET", "/a?list&start=%f", 400),
            ("GET", "/%zz", 400),
            ("GET", "/%", 400),
            ("GET", "*", 400),
            ("GET", "/a\0", 400),
            ("PUT", "/a\nb", 400),
            ("GET", "/a?list&start=\t", 400),
            ("GET", "", 400),
            ("GET", "/a?versioning", 403),
            ("GET", "/a?health", 403),
            ("GET", "/a?backup", 403),
            ("HEAD", "/?backup", 403),
            ("GET", "/a?log", 403),
            ("GET", "/?log&since=-1", 400),
            ("GET", "/?log&from=1", 400),
            ("PUT", "/.mkv/x", 403),
            ("DELETE", "/.mkv/backup/1", 403),
            ("GET", "/a?limit=1&list", 403),
            ("PUT", "/a?list", 403),
            ("HEAD", "/a?list", 403),
            ("GET", "/a?status", 403),
            ("PUT", "/?status", 403),
            ("GET", "/?status&limit=1", 400),
            ("GET", "/?status&prefix=%ff", 400),
            ("POST", "/a", 405),
            ("get", "/a", 405),
        ] {
            assert_eq!(status::status(&route(method, target).unwrap_err()), status, "{method} {target}");
        }
        let long = format!("/{}", "k".repeat(KEY_MAX));
        assert_eq!(status::status(&get(&long).unwrap_err()), 414);
        assert!(get(&long[..KEY_MAX]).is_ok());
    }

    #[test]
    fn no_target_panics() {
        let seed = std::env::var("MKV_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
        println!("MKV_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let parts = ["/", "%", "%4", "%41", "?", "&", "=", "list", "start", "limit", "http://", "é", "\0", "+", "9"];
        for _ in 0..200_000 {
            let target: String = (0..random.usize(..9)).map(|_| parts[random.usize(..parts.len())]).collect();
            let _ = get(&target);
        }
    }
}
