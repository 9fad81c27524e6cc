//! The command line: flags, their defaults and checks, and the configuration that each room gets.
//!
//! `FLAGS` is the one source of the flags: parsing and `-help` both read it. As with the Go master, a flag may stand
//! before or after the command, with one dash or two, with a space or `=` before its value; the last one counts.
//! Everything that can be known to be wrong is found here, before the first side effect.

use std::path::PathBuf;
use std::time::Duration;

use crate::api;
use crate::error::{Error, Result};
use crate::format::placement::Placement;
use crate::format::record::is_volume;
use crate::http;
use crate::man;
use crate::ops::{import, rebuild, verify};
use crate::store;
use crate::volumes::basic_auth;

/// A command with everything that it needs to run.
pub enum Command {
    Server {
        db: PathBuf,
        sync: bool,
        store: store::Config,
        http: http::Config,
        api: api::Config,
    },
    Rebuild(rebuild::Config),
    Rebalance {
        db: PathBuf,
        store: store::Config,
        dry_run: bool,
    },
    Verify {
        store: store::Config,
        verify: verify::Config,
    },
    Import(import::Config),
    Dump {
        db: PathBuf,
    },
    /// Prints this text.
    Print(String),
}

/// A parsed command line.
pub struct Cli {
    pub command: Command,
    /// Log each request and show every finding.
    pub verbose: bool,
    /// How long a HEAD to a volume, or a connection, may take.
    pub voltimeout: Duration,
}

/// Name, value (empty: a switch), and help. A group's first element is its command.
type Flag = (&'static str, &'static str, &'static str);

pub(crate) const COMMANDS: [(&str, &str); 6] = [
    ("server", "answer requests until SIGTERM or Ctrl-C"),
    ("rebuild", "make a new index from the files on the volumes"),
    ("rebalance", "move values to the volumes where they belong"),
    ("verify", "compare the index with the volumes, and repair"),
    ("import", "take over the index of a Go minikeyvalue"),
    ("dump", "print the index: a percent-encoded key, a tab and its record on each line"),
];

pub(crate) const FLAGS: [(&str, &[Flag]); 7] = [
    (
        "every command",
        &[
            ("db", "DIR", "the folder of the index"),
            ("volumes", "LIST", "the volumes, host:port,host:port,…"),
            ("replicas", "N", "how many volumes hold a value (3)"),
            ("subvolumes", "N", "how many folders, each a disk, a volume has (10)"),
            ("userpass", "USER:PASS", "the login for volumes with basic authorization"),
            ("voltimeout", "TIME", "how long to wait for a volume's HEAD, as 500ms or 1s (1s)"),
            ("v", "", "log each request, show every finding"),
            ("version", "", "print the version"),
            ("help", "", "print this; mkv COMMAND -help prints the flags of one command"),
        ],
    ),
    (
        "server",
        &[
            ("host", "ADDR", "the address to listen on (all)"),
            ("port", "N", "the port to listen on (3000)"),
            ("fallback", "HOST:PORT", "where to send a GET of a key that is not here"),
            ("protect", "", "a key must be unlinked before it can be deleted, and is never replaced"),
            ("settle", "TIME", "how long copies of REBALANCE rest before what they replace is deleted (60s)"),
            ("basicauth", "", "every request needs a login that the volumes accept"),
            ("md5sum", "BOOL", "keep the md5 of each value (true)"),
            ("sync", "", "flush the index to the disk before a write is answered"),
            ("maxconns", "N", "the most connections of clients (4096)"),
            ("headtimeout", "TIME", "how long the head of a request may take (30s)"),
            ("idletimeout", "TIME", "how long a connection may wait for its next request (60s)"),
            ("stalltimeout", "TIME", "how long a client may take for 1 KiB of a body (60s)"),
        ],
    ),
    (
        "rebuild",
        &[
            ("rehash", "", "read the blobs whose md5 is not known"),
            ("from", "DIR", "another -db to carry over unlinked states, hashes and debris from"),
            ("lost", "VOLUME", "host:port or host:port/svXX that is gone for good; may be repeated"),
        ],
    ),
    (
        "rebalance",
        &[
            ("dry-run", "", "say what would be done"),
            ("settle", "TIME", "how long copies rest before what they replace is deleted (60s)"),
            ("lost", "VOLUME", "treat as empty, ask it nothing; may be repeated"),
        ],
    ),
    (
        "verify",
        &[
            ("deep", "", "read every blob and compare its md5"),
            ("repair", "", "restore replicas, remove debris and surplus; stop the master first"),
            ("strays", "", "with -repair: remove blobs of keys that the index does not know"),
            ("grace", "TIME", "leave strays that are younger than this (24h)"),
        ],
    ),
    ("import", &[("leveldb", "DIR", "the index of a Go minikeyvalue; it is only read")]),
    ("dump", &[]),
];

/// The usage text, of all commands or of one.
pub fn help(only: Option<&str>) -> String {
    let mut text = String::from("mkv, a distributed key-value store: plain files behind nginx, one small index\n\n");
    let names = COMMANDS.map(|(name, _)| name).join(" | ");
    text += &format!("usage: mkv [flags] <{}>\n", only.unwrap_or(&names));
    for (group, flags) in FLAGS {
        let command = COMMANDS.iter().find(|(name, _)| *name == group);
        if only.is_some_and(|only| command.is_some() && group != only) {
            continue;
        }
        let title = command.map_or(group.into(), |(name, what)| format!("{name}: {what}"));
        text += &format!("\n{title}\n");
        for (name, value, what) in flags {
            text += &format!("  {:<20} {what}\n", format!("-{name} {value}").trim_end());
        }
    }
    text.trim_end().to_string()
}

/// Parses and checks the command line, without the program's name.
pub fn parse(words: impl Iterator<Item = String>) -> Result<Cli> {
    let mut flags = Flags(pico_args::Arguments::from_vec(words.map(double_dash).collect()));
    let help_wanted = flags.switch("help", false)? | flags.switch("h", false)?;
    let version = flags.switch("version", false)?;
    let verbose = flags.switch("v", false)?;
    let given = Given::read(&mut flags)?;
    let rest: Vec<String> = flags.0.finish().into_iter().map(|word| word.to_string_lossy().into_owned()).collect();
    if let Some(flag) = rest.iter().find(|word| word.starts_with('-')) {
        return usage(format!("{}: no such flag, see mkv -help", flag.replacen("--", "-", 1)));
    }
    let voltimeout = given.voltimeout;
    let cli = |command| Ok(Cli { command, verbose, voltimeout });
    let known = |word: &&str| COMMANDS.iter().any(|(name, _)| name == word);
    let command = rest.first().map(String::as_str);
    if help_wanted {
        return cli(Command::Print(help(command.filter(known))));
    }
    if version {
        return cli(Command::Print(format!("mkv {}", env!("CARGO_PKG_VERSION"))));
    }
    match (command, rest.len()) {
        (Some("man"), 1) => return cli(Command::Print(man::page())), // for packages; -help does not name it
        (None, _) => {
            return usage("say what to do: server, rebuild, rebalance, verify, import or dump; see mkv -help");
        }
        (Some(word), 1) if !known(&word) => {
            return usage(format!("{word}: no such command, see mkv -help"));
        }
        (_, 2..) => return usage(format!("one command at a time, not {}", rest.join(" and "))),
        _ => {}
    }
    cli(given.command(command.unwrap_or_default(), verbose)?)
}

/// The values of all flags.
struct Given {
    /// The names of the flags that were given.
    names: Vec<&'static str>,
    db: PathBuf,
    volumes: Vec<String>,
    replicas: usize,
    subvolumes: u32,
    userpass: Option<String>,
    voltimeout: Duration,
    sync: bool,
    protect: bool,
    md5sum: bool,
    http: http::Config,
    api: api::Config,
    from: Option<PathBuf>,
    lost: Vec<String>,
    rehash: bool,
    dry_run: bool,
    settle: Duration,
    deep: bool,
    repair: bool,
    strays: bool,
    grace: Duration,
    leveldb: Option<PathBuf>,
}

impl Given {
    fn read(flags: &mut Flags) -> Result<Given> {
        let all = FLAGS.iter().flat_map(|(_, flags)| flags.iter().map(|(name, ..)| *name));
        let names = all.filter(|name| flags.is_given(name)).collect();
        let seconds = Duration::from_secs;
        let volumes = flags.last("volumes")?;
        Ok(Given {
            names,
            db: flags.last("db")?.unwrap_or_default().into(),
            volumes: volumes.map_or(Vec::new(), |list| list.split(',').map(String::from).collect()),
            replicas: flags.number("replicas", 3, 1, 1000)?,
            subvolumes: flags.number("subvolumes", 10, 1, 65536)?,
            userpass: flags.last("userpass")?,
            voltimeout: flags.time("voltimeout", seconds(1))?,
            sync: flags.switch("sync", false)?,
            protect: flags.switch("protect", false)?,
            md5sum: flags.switch("md5sum", true)?,
            http: http::Config {
                host: flags.last("host")?.unwrap_or_default(),
                port: flags.number("port", 3000, 0, 65535)?,
                max_connections: flags.number("maxconns", 4096, 1, 1_000_000)?,
                head_timeout: flags.time("headtimeout", seconds(30))?,
                idle_timeout: flags.time("idletimeout", seconds(60))?,
                stall_timeout: flags.time("stalltimeout", seconds(60))?,
            },
            api: api::Config {
                fallback: flags.last("fallback")?.filter(|host| !host.is_empty()),
                basicauth: flags.switch("basicauth", false)?,
            },
            from: flags.last("from")?.map(PathBuf::from),
            lost: flags.all("lost")?.iter().flat_map(|l| l.split(',')).map(String::from).collect(),
            rehash: flags.switch("rehash", false)?,
            dry_run: flags.switch("dry-run", false)?,
            settle: flags.time("settle", seconds(60))?,
            deep: flags.switch("deep", false)?,
            repair: flags.switch("repair", false)?,
            strays: flags.switch("strays", false)?,
            grace: flags.time("grace", seconds(24 * 3600))?,
            leveldb: flags.last("leveldb")?.map(PathBuf::from),
        })
    }

    fn command(self, name: &str, verbose: bool) -> Result<Command> {
        self.check_names(name)?;
        if self.db.as_os_str().is_empty() {
            return usage("-db: give the folder of the index");
        }
        match name {
            "import" => match self.leveldb {
                Some(leveldb) => Ok(Command::Import(import::Config { db: self.db, leveldb })),
                None => usage("-leveldb: give the folder of the Go master's index"),
            },
            "dump" => Ok(Command::Dump { db: self.db }),
            _ => self.command_on_volumes(name, verbose),
        }
    }

    fn command_on_volumes(self, name: &str, verbose: bool) -> Result<Command> {
        self.check_volumes()?;
        for (flag, time) in [
            ("headtimeout", self.http.head_timeout),
            ("idletimeout", self.http.idle_timeout),
            ("stalltimeout", self.http.stall_timeout),
        ] {
            if time.is_zero() {
                return usage(format!("-{flag}: 0 leaves a client no time, see mkv -help"));
            }
        }
        let Given { volumes, replicas, subvolumes, db, .. } = self;
        let store = store::Config {
            placement: Placement { volumes, replicas, subvolumes },
            protect: self.protect,
            md5sum: self.md5sum,
            auth: self.userpass.as_deref().map(|login| basic_auth(login.as_bytes())),
            settle: self.settle,
            lost: self.lost,
        };
        Ok(match name {
            "server" => Command::Server { db, sync: self.sync, store, http: self.http, api: self.api },
            "rebuild" => {
                let (from, rehash) = (self.from, self.rehash);
                Command::Rebuild(rebuild::Config { db, store, from, rehash, verbose })
            }
            "rebalance" => Command::Rebalance { db, store, dry_run: self.dry_run },
            _ => {
                let (deep, repair, strays, grace) = (self.deep, self.repair, self.strays, self.grace);
                let verify = verify::Config { db, deep, repair, strays, grace, verbose };
                Command::Verify { store, verify }
            }
        })
    }

    /// Refuses flags that belong to other commands. The server's flags are accepted everywhere: the Go master has one
    /// set of flags for all commands.
    fn check_names(&self, command: &str) -> Result<()> {
        for flag in &self.names {
            let has = |flags: &[Flag]| flags.iter().any(|(name, ..)| name == flag);
            let groups: Vec<&str> = FLAGS.iter().filter(|(_, flags)| has(flags)).map(|(group, _)| *group).collect();
            let everywhere = groups.iter().any(|group| ["every command", "server"].contains(group));
            if !everywhere && !groups.contains(&command) {
                return usage(format!("-{flag}: only for {}", groups.join(" or ")));
            }
        }
        if self.strays && !self.repair {
            return usage("-strays: only together with -repair");
        }
        Ok(())
    }

    fn check_volumes(&self) -> Result<()> {
        if self.voltimeout.is_zero() {
            return usage("-voltimeout: 0 leaves a volume no time to answer, 1s is the default");
        }
        if self.volumes.is_empty() {
            return usage("-volumes: give at least one volume, as host:port,host:port");
        }
        for (n, volume) in self.volumes.iter().enumerate() {
            if !is_volume(volume) || volume.contains(['/', '@', '?', '#']) || volume.ends_with(':') {
                return usage(format!(
                    "-volumes: {volume:?} is not host:port (and may not begin with INIT, DELETED, HASH, SIZE, TIME, VERS or WAIT)"
                ));
            }
            if self.volumes[..n].contains(volume) {
                return usage(format!("-volumes: {volume} is given twice"));
            }
        }
        if self.replicas > self.volumes.len() {
            return usage(format!(
                "-replicas: {} replicas need as many volumes, -volumes has {}",
                self.replicas,
                self.volumes.len()
            ));
        }
        if self.userpass.as_ref().is_some_and(|text| !text.contains(':')) {
            return usage("-userpass: expected user:pass");
        }
        Ok(())
    }
}

fn usage<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::Usage(text.into()))
}

/// Turns `-flag` into `--flag`, the only form that pico-args knows for long names. A bare switch gets `=true`, so that
/// every flag has a value.
fn double_dash(word: String) -> std::ffi::OsString {
    let Some(name) = word.strip_prefix("--").or(word.strip_prefix('-')).filter(|n| !n.is_empty()) else {
        return word.into();
    };
    let is_switch = |(flag, value, _): &Flag| *flag == name && (value.is_empty() || *value == "BOOL");
    let bare = name == "h" || FLAGS.iter().any(|(_, flags)| flags.iter().any(is_switch));
    format!("--{name}{}", if bare { "=true" } else { "" }).into()
}

struct Flags(pico_args::Arguments);

impl Flags {
    fn is_given(&self, name: &str) -> bool {
        let (alone, with_value) = (format!("--{name}"), format!("--{name}="));
        let mut words = self.0.clone().finish().into_iter();
        words.any(|word| {
            let word = word.to_string_lossy();
            word == alone || word.starts_with(&with_value)
        })
    }

    /// Every value of a flag that may be repeated.
    fn all(&mut self, name: &str) -> Result<Vec<String>> {
        let flag: &'static str = Box::leak(format!("--{name}").into_boxed_str());
        self.0.values_from_str(flag).map_err(|_| Error::Usage(format!("-{name}: give it a value, see mkv -help")))
    }

    /// The value of a flag.
    fn last(&mut self, name: &str) -> Result<Option<String>> {
        Ok(self.all(name)?.pop())
    }

    fn parsed<T>(&mut self, name: &str, default: T, expected: &str, read: impl Fn(&str) -> Option<T>) -> Result<T> {
        let Some(text) = self.last(name)? else { return Ok(default) };
        read(&text).ok_or_else(|| Error::Usage(format!("-{name}: expected {expected}, not {text:?}")))
    }

    fn switch(&mut self, name: &str, default: bool) -> Result<bool> {
        self.parsed(name, default, "true or false", |text| match text {
            "true" | "1" | "t" | "T" | "TRUE" | "True" => Some(true),
            "false" | "0" | "f" | "F" | "FALSE" | "False" => Some(false),
            _ => None,
        })
    }

    fn number<T: TryFrom<u64>>(&mut self, name: &str, default: T, low: u64, high: u64) -> Result<T> {
        let read = |text: &str| text.parse().ok().filter(|n| (low..=high).contains(n)).and_then(|n| n.try_into().ok());
        self.parsed(name, default, &format!("a number from {low} to {high}"), read)
    }

    fn time(&mut self, name: &str, default: Duration) -> Result<Duration> {
        self.parsed(name, default, "a time as 500ms, 1s, 1m30s or 24h", duration)
    }
}

/// Parses a duration as Go writes it: 500ms, 1s, 1m30s, 24h.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let (digits, tail) = rest.split_at(rest.find(|c: char| c.is_ascii_alphabetic())?);
        let (unit, tail) = tail.split_at(tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len()));
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

    fn command(line: &str) -> Result<Command> {
        parse(line.split(' ').map(String::from)).map(|cli| cli.command)
    }

    #[test]
    fn flags_stand_anywhere_with_one_dash_or_two_and_a_space_or_an_equals_sign() {
        for line in [
            "-db /x -volumes a:1,b:2 -replicas 2 -port 7 -md5sum=false -protect -voltimeout 1m1.5s server",
            "server --db=/x --volumes=a:1,b:2 --replicas=2 --port=7 --md5sum=0 --protect=true --voltimeout=61500ms",
            "-replicas 1 -db /x server -volumes=a:1,b:2 --replicas 2 -port 7 -protect -md5sum=F -voltimeout 61.5s",
        ] {
            let cli = parse(line.split(' ').map(String::from)).unwrap();
            assert_eq!(cli.voltimeout, Duration::from_millis(61500), "{line}");
            assert!(!cli.verbose);
            let Command::Server { db, store, http, .. } = cli.command else { panic!("{line}") };
            assert_eq!(db.to_str(), Some("/x"));
            let Placement { volumes, replicas, subvolumes } = store.placement;
            assert_eq!(volumes, ["a:1", "b:2"]);
            assert_eq!((replicas, http.port, subvolumes), (2, 7, 10));
            assert!(store.protect && !store.md5sum);
        }
    }

    #[test]
    fn help_is_grouped_by_command() {
        let all = help(None);
        assert!(COMMANDS.iter().all(|(name, _)| all.contains(&format!("\n{name}: "))), "{all}");
        let one = help(Some("rebuild"));
        assert!(one.contains("-rehash") && one.contains("-db DIR"), "{one}");
        assert!(!one.contains("-port") && !one.contains("-deep"), "{one}");
        let Ok(Command::Print(text)) = command("verify -help") else { panic!("-help prints") };
        assert_eq!(text, help(Some("verify")));
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
            let text = command(line).err().expect(line).to_string();
            assert!(text.contains(flag), "{line}: {text}");
        }
    }
}
