//! The command line: usage, flags with their defaults, and what makes them wrong.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::format::record::{is_volume, volume_of};

pub const USAGE: &str = "\
mkv, a distributed key-value store: plain files behind nginx, one small index

usage: mkv [flags] <server | rebuild | rebalance | verify | import | dump>

every command
  -db DIR              the folder of the index
  -volumes LIST        the volumes, host:port,host:port,…
  -replicas N          on how many volumes a value lies (3)
  -subvolumes N        over how many folders of a volume, each a disk, values are spread (10)
  -userpass USER:PASS  what to show to volumes with basic authorization
  -voltimeout TIME     how long to wait for a volume's HEAD, as 500ms or 1s (1s)
  -v                   say more: each request, each finding
  -version, -help
server
  -host ADDR           the address to listen on (all)
  -port N              the port to listen on (3000)
  -fallback HOST:PORT  where GET of a key that is not here is sent
  -protect             a key must be unlinked before it can be deleted, and is never replaced
  -basicauth           every request needs a user and password that the volumes accept
  -md5sum=BOOL         keep the md5 of each value (true)
  -sync                the index is on disk before a write is answered
  -maxconns N          the most connections of clients (4096)
rebuild
  -rehash              read the blobs whose md5 is not known
  -from DIR            another -db to carry over unlinked states, hashes and debris from
  -lost VOLUME         host:port or host:port/svXX that is gone for good; may be repeated
rebalance
  -dry-run             say what would be done
  -settle TIME         how long copies rest before what they replace is deleted (60s)
  -lost VOLUME         treat as empty, ask it nothing
verify
  -deep                read every blob and compare its md5
  -repair              restore replicas, remove debris and surplus; the master is stopped
  -strays              with -repair: remove blobs of keys that the index does not know
  -grace TIME          leave strays younger than this (24h)
import
  -leveldb DIR         the index of a Go minikeyvalue; it is only read";

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mode {
    Server,
    Rebuild,
    Rebalance,
    Verify,
    Import,
    Dump,
    Help,
    Version,
}

#[derive(Debug, Clone)]
pub struct Options {
    pub mode: Mode,
    pub db: PathBuf,
    pub volumes: Vec<String>,
    pub replicas: usize,
    pub subvolumes: u32,
    pub userpass: Option<String>,
    pub voltimeout: Duration,
    pub verbose: bool,
    /// Empty: every address of the machine.
    pub host: String,
    pub port: u16,
    pub fallback: Option<String>,
    pub protect: bool,
    pub basicauth: bool,
    pub md5sum: bool,
    pub sync: bool,
    pub maxconns: usize,
    pub rehash: bool,
    pub from: Option<PathBuf>,
    /// `host:port` or `host:port/svXX`.
    pub lost: Vec<String>,
    pub dry_run: bool,
    pub settle: Duration,
    pub deep: bool,
    pub repair: bool,
    pub strays: bool,
    pub grace: Duration,
    pub leveldb: Option<PathBuf>,
}

/// Flags that stand alone, or have `=true` or `=false` behind them.
const SWITCHES: &str =
    "v version help h protect basicauth md5sum sync rehash dry-run deep repair strays";

/// Parses and checks the words of the command line, the program's name left out.
pub fn parse(words: impl Iterator<Item = String>) -> Result<Options> {
    let mut flags = Flags(pico_args::Arguments::from_vec(words.map(double_dash).collect()));
    let help = flags.switch("help", false)? | flags.switch("h", false)?;
    let version = flags.switch("version", false)?;
    let mut options = Options {
        mode: Mode::Help,
        db: flags.last("db")?.unwrap_or_default().into(),
        volumes: flags
            .last("volumes")?
            .map_or(Vec::new(), |list| list.split(',').map(String::from).collect()),
        replicas: flags.number("replicas", 3, 1, 1000)?,
        subvolumes: flags.number("subvolumes", 10, 1, 65536)?,
        userpass: flags.last("userpass")?,
        voltimeout: flags.time("voltimeout", Duration::from_secs(1))?,
        verbose: flags.switch("v", false)?,
        host: flags.last("host")?.unwrap_or_default(),
        port: flags.number("port", 3000, 0, 65535)?,
        fallback: flags.last("fallback")?.filter(|host| !host.is_empty()),
        protect: flags.switch("protect", false)?,
        basicauth: flags.switch("basicauth", false)?,
        md5sum: flags.switch("md5sum", true)?,
        sync: flags.switch("sync", false)?,
        maxconns: flags.number("maxconns", 4096, 1, 1_000_000)?,
        rehash: flags.switch("rehash", false)?,
        from: flags.last("from")?.map(PathBuf::from),
        lost: flags.all("lost")?.iter().flat_map(|l| l.split(',')).map(String::from).collect(),
        dry_run: flags.switch("dry-run", false)?,
        settle: flags.time("settle", Duration::from_secs(60))?,
        deep: flags.switch("deep", false)?,
        repair: flags.switch("repair", false)?,
        strays: flags.switch("strays", false)?,
        grace: flags.time("grace", Duration::from_secs(24 * 3600))?,
        leveldb: flags.last("leveldb")?.map(PathBuf::from),
    };
    let rest: Vec<String> =
        flags.0.finish().into_iter().map(|word| word.to_string_lossy().into_owned()).collect();
    if let Some(flag) = rest.iter().find(|word| word.starts_with('-')) {
        return usage(format!("{}: no such flag, see mkv -help", flag.replacen("--", "-", 1)));
    }
    options.mode = match rest.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        _ if help => Mode::Help,
        _ if version => Mode::Version,
        ["server"] => Mode::Server,
        ["rebuild"] => Mode::Rebuild,
        ["rebalance"] => Mode::Rebalance,
        ["verify"] => Mode::Verify,
        ["import"] => Mode::Import,
        ["dump"] => Mode::Dump,
        [] => {
            return usage(
                "say what to do: server, rebuild, rebalance, verify, import or dump; see mkv -help",
            );
        }
        [word] => return usage(format!("{word}: no such command, see mkv -help")),
        [..] => return usage(format!("one command at a time, not {}", rest.join(" and "))),
    };
    let command = rest.first().map_or("", String::as_str);
    for (flag, given, commands) in [
        ("-rehash", options.rehash, "rebuild"),
        ("-from", options.from.is_some(), "rebuild"),
        ("-lost", !options.lost.is_empty(), "rebuild or rebalance"),
        ("-dry-run", options.dry_run, "rebalance"),
        ("-deep", options.deep, "verify"),
        ("-repair", options.repair, "verify"),
        ("-leveldb", options.leveldb.is_some(), "import"),
    ] {
        let known = command.is_empty() || commands.split(" or ").any(|known| known == command);
        if given && !known {
            return usage(format!("{flag}: only for {commands}"));
        }
    }
    options.check()?;
    Ok(options)
}

impl Options {
    /// Whether a replica lies on a volume, or subvolume, that `-lost` names.
    pub fn is_lost(&self, replica: &str) -> bool {
        self.lost.iter().any(|lost| lost == replica || lost == volume_of(replica))
    }

    /// Everything that can be known to be wrong before the first side effect.
    fn check(&self) -> Result<()> {
        if matches!(self.mode, Mode::Help | Mode::Version) {
            return Ok(());
        }
        if self.db.as_os_str().is_empty() {
            return usage("-db: give the folder of the index");
        }
        if self.mode == Mode::Import && self.leveldb.is_none() {
            return usage("-leveldb: give the folder of the Go master's index");
        }
        if matches!(self.mode, Mode::Dump | Mode::Import) {
            return Ok(());
        }
        if self.voltimeout.is_zero() {
            return usage("-voltimeout: 0 leaves a volume no time to answer, 1s is the default");
        }
        if self.volumes.is_empty() {
            return usage("-volumes: give at least one volume, as host:port,host:port");
        }
        for (n, volume) in self.volumes.iter().enumerate() {
            if !is_volume(volume) || volume.contains(['/', '@', '?', '#']) || volume.ends_with(':')
            {
                return usage(format!(
                    "-volumes: {volume:?} is not host:port (and may not begin with INIT, DELETED, HASH, SIZE, TIME, VERS or WAIT)"
                ));
            }
            if self.volumes[..n].contains(volume) {
                return usage(format!("-volumes: {volume} is given twice"));
            }
        }
        if self.replicas > self.volumes.len() {
            let n = self.volumes.len();
            return usage(format!(
                "-replicas: {} replicas need as many volumes, -volumes has {n}",
                self.replicas
            ));
        }
        if self.userpass.as_ref().is_some_and(|text| !text.contains(':')) {
            return usage("-userpass: expected user:pass");
        }
        if self.strays && !self.repair {
            return usage("-strays: only together with -repair");
        }
        Ok(())
    }
}

fn usage<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::Usage(text.into()))
}

/// `-flag` as `--flag`, which is the only form that pico-args knows for names of several letters; a
/// switch with nothing behind it gets `=true`, so that every flag has a value.
fn double_dash(word: String) -> std::ffi::OsString {
    let Some(name) = word.strip_prefix("--").or(word.strip_prefix('-')).filter(|n| !n.is_empty())
    else {
        return word.into();
    };
    let bare = SWITCHES.split(' ').any(|switch| switch == name);
    format!("--{name}{}", if bare { "=true" } else { "" }).into()
}

struct Flags(pico_args::Arguments);

impl Flags {
    /// Every value of a flag that may be repeated.
    fn all(&mut self, name: &str) -> Result<Vec<String>> {
        let flag: &'static str = Box::leak(format!("--{name}").into_boxed_str());
        self.0
            .values_from_str(flag)
            .map_err(|_| Error::Usage(format!("-{name}: give it a value, see mkv -help")))
    }

    /// The value of a flag; as with Go's flags, the last one counts.
    fn last(&mut self, name: &str) -> Result<Option<String>> {
        Ok(self.all(name)?.pop())
    }

    fn parsed<T>(
        &mut self,
        name: &str,
        default: T,
        expected: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        let Some(text) = self.last(name)? else { return Ok(default) };
        read(&text)
            .ok_or_else(|| Error::Usage(format!("-{name}: expected {expected}, not {text:?}")))
    }

    fn switch(&mut self, name: &str, default: bool) -> Result<bool> {
        self.parsed(name, default, "true or false", |text| match text {
            "true" | "1" | "t" | "T" | "TRUE" | "True" => Some(true),
            "false" | "0" | "f" | "F" | "FALSE" | "False" => Some(false),
            _ => None,
        })
    }

    fn number<T: TryFrom<u64>>(
        &mut self,
        name: &str,
        default: T,
        low: u64,
        high: u64,
    ) -> Result<T> {
        let read = |text: &str| {
            text.parse().ok().filter(|n| (low..=high).contains(n)).and_then(|n| n.try_into().ok())
        };
        self.parsed(name, default, &format!("a number from {low} to {high}"), read)
    }

    fn time(&mut self, name: &str, default: Duration) -> Result<Duration> {
        self.parsed(name, default, "a time as 500ms, 1s, 1m30s or 24h", duration)
    }
}

/// Go's way to write a duration, as far as people use it.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let (digits, tail) = rest.split_at(rest.find(|c: char| c.is_ascii_alphabetic())?);
        let (unit, tail) =
            tail.split_at(tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len()));
        let factor = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += digits.parse::<f64>().ok()? * factor;
        rest = tail;
    }
    let sane = text.len() > 1 && (0.0..1e9).contains(&seconds);
    sane.then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Result<Options> {
        parse(line.split(' ').map(String::from))
    }

    #[test]
    fn flags_stand_anywhere_with_one_dash_or_two_and_a_space_or_an_equals_sign() {
        for line in [
            "-db /x -volumes a:1,b:2 -replicas 2 -port 7 -md5sum=false -protect -voltimeout 1m1.5s server",
            "server --db=/x --volumes=a:1,b:2 --replicas=2 --port=7 --md5sum=0 --protect=true --voltimeout=61500ms",
            "-replicas 1 -db /x server -volumes=a:1,b:2 --replicas 2 -port 7 -protect -md5sum=F -voltimeout 61.5s",
        ] {
            let options = options(line).unwrap();
            assert_eq!(options.mode, Mode::Server);
            assert_eq!(options.db.to_str(), Some("/x"));
            assert_eq!(options.volumes, ["a:1", "b:2"]);
            assert_eq!((options.replicas, options.port, options.subvolumes), (2, 7, 10));
            assert!(options.protect && !options.md5sum && !options.verbose);
            assert_eq!(options.voltimeout, Duration::from_millis(61500), "{line}");
        }
    }

    #[test]
    fn a_wrong_flag_is_named() {
        for (line, flag) in [
            ("server -volumes a:1 -replicas 1", "-db"),
            ("server -db /x -replicas 1", "-volumes"),
            ("server -db /x -volumes a:1,", "-volumes"),
            ("server -db /x -volumes a:1,a:1", "-volumes"),
            ("server -db /x -volumes HASH:1", "-volumes"),
            ("server -db /x -volumes a:1/sv00", "-volumes"),
            ("server -db /x -volumes a:1", "-replicas"),
            ("server -db /x -volumes a:1 -replicas 0", "-replicas"),
            ("server -db /x -volumes a:1 -replicas 1 -port 70000", "-port"),
            ("server -db /x -volumes a:1 -replicas 1 -voltimeout 5", "-voltimeout"),
            ("server -db /x -volumes a:1 -replicas 1 -voltimeout 0s", "-voltimeout"),
            ("server -db /x -volumes a:1 -replicas 1 -protect=maybe", "-protect"),
            ("server -db /x -volumes a:1 -replicas 1 -userpass me", "-userpass"),
            ("server -db /x -volumes a:1 -replicas 1 -subvolumes", "-subvolumes"),
            ("server -db /x -volumes a:1 -replicas 1 -frobnicate", "-frobnicate"),
            ("verify -db /x -volumes a:1 -replicas 1 -strays", "-strays"),
            ("verify -db /x -volumes a:1 -replicas 1 -repair -dry-run", "-dry-run"),
            ("server -db /x -volumes a:1 -replicas 1 -lost a:1", "-lost"),
            ("dump -db /x -rehash", "-rehash"),
            ("serve -db /x", "serve"),
            ("server rebuild -db /x", "rebuild"),
            ("-db /x", "server"),
        ] {
            let text = options(line).unwrap_err().to_string();
            assert!(text.contains(flag), "{line}: {text}");
        }
    }
}
