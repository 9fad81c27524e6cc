//! The command line: flags, their defaults and checks, and the configuration that each room gets.
//!
//! `flags.rs` is the one source of the flags: parsing and `-help` both read it. As with the Go master, a flag may stand
//! before or after the command, with one dash or two, with a space or `=` before its value; the last one counts.
//! Everything that can be known to be wrong is found here, before the first side effect.

mod flags;
mod values;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::api;
use crate::error::{Error, Result};
use crate::format::placement::Placement;
use crate::format::record::{TAGS, is_volume};
use crate::http;
use crate::index::{ENGINE, LOG, Location, Url};
use crate::ops::{backup, rebuild, verify};
use crate::s3;
use crate::serve::S3Config;
use crate::store;
use crate::store::follow::Peer;
use crate::volumes::basic_auth;
use crate::volumes::secret::{self, Secret};
use crate::{completions, man};
use flags::EVERY;
pub use flags::{EXIT_STATUSES, Flag, GROUPS, Group, help, operand_of};

/// A command with everything that it needs to run.
pub enum Command {
    Server(Box<Server>),
    Promote {
        db: Location,
    },
    Rebuild {
        store: store::Config,
        rebuild: rebuild::Config,
    },
    Rebalance {
        db: Location,
        sync: bool,
        store: store::Config,
        dry_run: bool,
    },
    Verify {
        store: store::Config,
        verify: verify::Config,
    },
    Import {
        db: Location,
        from: Source,
    },
    Dump {
        db: Location,
    },
    /// Writes a new secret to this file.
    Secret(PathBuf),
    Backup(backup::Config),
    Restore {
        db: Location,
        file: PathBuf,
    },
    /// Prints this text.
    Print(String),
}

/// `server` and `follow`.
pub struct Server {
    pub db: Location,
    pub sync: bool,
    /// How many MiB of the log are kept for followers.
    pub log: u64,
    pub store: store::Config,
    pub http: http::Config,
    pub api: api::Config,
    pub s3: Option<S3Config>,
    pub peer: Option<Peer>,
    /// Whether it is to follow its peer.
    pub follows: bool,
}

/// What `import` reads.
pub enum Source {
    LevelDb(PathBuf),
    Index(Location),
}

/// A parsed command line.
pub struct Cli {
    pub command: Command,
    /// Log each request and show every finding.
    pub verbose: bool,
    /// How long a HEAD to a volume, or a connection, may take.
    pub voltimeout: Duration,
    /// Signs all that is asked of volumes.
    pub secret: Option<Secret>,
    /// Log as JSON.
    pub json: bool,
}

/// The version of mkv, the commit that it was built from, and RocksDB's version. Outside of git there is no commit.
fn version() -> String {
    let commit = option_env!("MKV_COMMIT").map_or(String::new(), |commit| format!(" ({commit})"));
    format!("mkv {}{commit}, {ENGINE}", env!("CARGO_PKG_VERSION"))
}

/// Parses and checks the command line, without the program's name.
pub fn parse(words: impl Iterator<Item = OsString>) -> Result<Cli> {
    let words = words.map(|word| word.into_string().or_else(|word| usage(format!("{word:?}: use UTF-8 only"))));
    let (flags, words) = Flags::read(words.collect::<Result<_>>()?)?;
    let (verbose, voltimeout) = (flags.switch("v", false)?, flags.timeout("voltimeout", 1)?);
    let json = flags.parsed("log", false, "text or json", |format| match format {
        "text" => Some(false),
        "json" => Some(true),
        _ => None,
    })?;
    let cli = |command| Ok(Cli { command, verbose, voltimeout, secret: None, json });
    let is_command = |word: &&String| GROUPS[1..].iter().any(|(name, ..)| name == word);
    if flags.switch("help", false)? {
        let command = words.first().filter(is_command);
        return cli(Command::Print(help(command.map(String::as_str))));
    }
    if flags.switch("version", false)? {
        return cli(Command::Print(version()));
    }
    match &words[..] {
        [word] if word == "man" => cli(Command::Print(man::page())), // for packages; -help does not name it
        [] => usage(
            "say what to do: server, follow, promote, rebuild, rebalance, verify, import, secret, dump, backup or restore; \
             see mkv -help",
        ),
        [word, ..] if word == "secret" && flags.last("secret").is_some() => {
            usage("-secret: to make a secret, name the file after the command: mkv secret FILE")
        }
        [word] if word == "secret" => cli(Command::Print(secret::generate()?)),
        [word] if word == "s3key" => {
            let (access, secret) = s3::keys::generate().map_err(|e| Error::Failed(format!("/dev/urandom: {e}")))?;
            cli(Command::Print(format!("{access} {secret}")))
        }
        [word, file] if word == "secret" => cli(Command::Secret(file.into())),
        [word] if !is_command(&word) => usage(format!("{word}: no such command, see mkv -help")),
        [word, shell] if word == "completions" => cli(Command::Print(completions::script(shell)?)),
        [word, rest @ ..] if rest.len() == usize::from(operand_of(word).is_some()) => {
            let operand = rest.first().map_or("", String::as_str);
            let (command, secret) = (flags.command(word, operand, verbose)?, flags.last("secret"));
            let secret = secret.map(|file| Secret::read(Path::new(file))).transpose()?;
            Ok(Cli { secret, ..cli(command)? })
        }
        [word] => {
            let operand = operand_of(word).unwrap_or_default();
            usage(format!("{word}: name {operand} behind it, as in mkv {word} {operand}"))
        }
        _ => usage(format!("one command at a time, not {}", words.join(" and "))),
    }
}

/// The flags that were given, with their values.
struct Flags(BTreeMap<&'static str, Vec<String>>);

impl Flags {
    /// Returns the flags and the other words.
    fn read(words: Vec<String>) -> Result<(Flags, Vec<String>)> {
        let mut arguments = pico_args::Arguments::from_vec(words.into_iter().map(double_dash).collect());
        let mut given = BTreeMap::new();
        for (name, ..) in GROUPS.iter().flat_map(|(.., flags)| *flags) {
            let flag: &'static str = Box::leak(format!("--{name}").into_boxed_str());
            let values = arguments.values_from_str(flag);
            let values = values.or_else(|_| usage(format!("-{name}: give it a value, see mkv -help")))?;
            // A flag of two groups has no more values at the second one.
            if !values.is_empty() {
                given.insert(*name, values);
            }
        }
        let rest: Vec<String> = arguments.finish().iter().map(|word| word.to_string_lossy().into()).collect();
        match rest.iter().find(|word| word.starts_with('-')) {
            Some(flag) => usage(format!("{}: no such flag, see mkv -help", flag.replacen("--", "-", 1))),
            None => Ok((Flags(given), rest)),
        }
    }

    /// `operand`: the word behind the command, if it takes one.
    fn command(&self, name: &str, operand: &str, verbose: bool) -> Result<Command> {
        self.check_group(name)?;
        if name == "backup" {
            return self.backup(operand);
        }
        let db = match self.last("db").unwrap_or_default() {
            "" => return usage("-db: give the folder of the index, or the URL of its database"),
            db => self.location(db, name)?,
        };
        // A wrong value of a server's flag is an error of every command, as with the Go master.
        let (store, sync, http, api) = (self.store()?, self.switch("sync", false)?, self.http()?, self.api()?);
        if !["import", "dump", "restore", "promote"].contains(&name) {
            check_volumes(&store.placement)?;
        }
        Ok(match name {
            "server" | "follow" => {
                let (follows, log) = (name == "follow", self.number("keeplog", LOG, 0, 1 << 40)?);
                let peer = self.peer(&db, if follows { "from" } else { "peer" })?;
                if follows && peer.is_none() {
                    return usage("-from: give the master to follow, as http://host:port");
                }
                let s3 = self.s3(&http, &api)?;
                Command::Server(Box::new(Server { db, sync, log, store, http, api, s3, peer, follows }))
            }
            "promote" => Command::Promote { db },
            "rebuild" => {
                let from = self.last("from").map(|from| self.location(from, name)).transpose()?;
                let (nobackup, rehash) = (self.switch("nobackup", false)?, self.switch("rehash", false)?);
                Command::Rebuild { store, rebuild: rebuild::Config { db, from, nobackup, rehash, verbose } }
            }
            "rebalance" => Command::Rebalance { db, sync, store, dry_run: self.switch("dry-run", false)? },
            "verify" => Command::Verify { store, verify: self.verify(db, verbose)? },
            "import" => match (self.last("leveldb"), self.last("index")) {
                (Some(leveldb), None) => Command::Import { db, from: Source::LevelDb(leveldb.into()) },
                (None, Some(index)) => Command::Import { db, from: Source::Index(self.location(index, name)?) },
                _ => return usage("-leveldb: give the folder of the Go master's index, or -index and one of mkv's"),
            },
            "restore" => Command::Restore { db, file: operand.into() },
            _ => Command::Dump { db },
        })
    }

    /// Where an index is. `command`: the command that opens it.
    fn location(&self, db: &str, command: &str) -> Result<Location> {
        if !Url::is_url(db) {
            return Ok(Location::Folder(db.into()));
        }
        let url = Url::parse(db, std::env::var("PGPASSWORD").ok())?;
        let Placement { mut volumes, replicas, subvolumes } = self.store()?.placement;
        volumes.sort();
        let flags = format!("-volumes {} -replicas {replicas} -subvolumes {subvolumes}", volumes.join(","));
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let port = if command == "server" { self.last("port").unwrap_or("3000").to_string() } else { String::new() };
        let name = format!("{command} {port} on {}, process {}", host.trim(), std::process::id()).replace("  ", " ");
        Ok(Location::Database { url, name, flags })
    }

    /// The other process that this flag names.
    fn peer(&self, db: &Location, flag: &str) -> Result<Option<Peer>> {
        let Some(url) = self.last(flag) else { return Ok(None) };
        let Ok(folder) = db.folder() else {
            return usage(format!("-{flag}: masters with an index in PostgreSQL need none"));
        };
        let auth = self.login()?.map(|login| basic_auth(login.as_bytes()));
        Ok(Some(Peer::new(folder.into(), &host_of(flag, url)?, auth.as_deref(), self.timeout("voltimeout", 1)?)))
    }

    fn backup(&self, dir: &str) -> Result<Command> {
        let master = host_of("master", self.last("master").unwrap_or("http://127.0.0.1:3000"))?;
        let auth = self.login()?.map(|login| basic_auth(login.as_bytes()));
        let (keep, timeout) = (self.number("keep", 7, 1, 1_000_000)?, self.timeout("voltimeout", 1)?);
        Ok(Command::Backup(backup::Config { dir: dir.into(), master, auth, keep, timeout }))
    }

    /// The login that mkv itself uses: `-userpass`, or the variable of the environment, which others do not see.
    fn login(&self) -> Result<Option<String>> {
        let login = self.last("userpass").map(String::from).or_else(|| std::env::var("MKV_USERPASS").ok());
        if login.as_ref().is_some_and(|login| !login.contains(':')) {
            return usage("-userpass: expected user:pass");
        }
        Ok(login)
    }

    /// Refuses flags that belong to other commands. The server's flags are accepted everywhere: the Go master has one
    /// set of flags for all commands.
    fn check_group(&self, command: &str) -> Result<()> {
        for flag in self.0.keys() {
            let has = |flags: &[Flag]| flags.iter().any(|(name, ..)| name == flag);
            let groups = GROUPS.iter().filter(|(.., flags)| has(flags));
            let groups: Vec<&str> = groups.map(|(group, ..)| *group).collect();
            if !groups.iter().any(|group| [EVERY, "server", command].contains(group)) {
                return usage(format!("-{flag}: only for {}", groups.join(" or ")));
            }
        }
        Ok(())
    }

    fn store(&self) -> Result<store::Config> {
        let login = self.login()?;
        let is_signed = self.last("secret").is_some();
        if login.is_some() && is_signed && self.last("from").or(self.last("peer")).is_none() {
            return usage("-userpass: leave it out, volumes with -secret take signatures and no password");
        }
        Ok(store::Config {
            placement: Placement {
                volumes: self.last("volumes").map_or(Vec::new(), |list| list.split(',').map(String::from).collect()),
                replicas: self.number("replicas", 3, 1, 1000)?,
                subvolumes: self.number("subvolumes", 10, 1, 65536)?,
            },
            protect: self.switch("protect", false)?,
            md5sum: self.switch("md5sum", true)?,
            // With signatures it is for the other master only.
            auth: login.filter(|_| !is_signed).map(|login| basic_auth(login.as_bytes())),
            settle: self.time("settle", 60)?,
            uploads: self.timeout("s3uploads", 7 * 24 * 3600)?,
            lost: self.all("lost").iter().flat_map(|list| list.split(',')).map(String::from).collect(),
        })
    }

    fn http(&self) -> Result<http::Config> {
        Ok(http::Config {
            host: self.last("host").unwrap_or_default().into(),
            port: self.number("port", 3000, 0, 65535)?,
            max_connections: self.number("maxconns", 4096, 1, 1_000_000)?,
            head_timeout: self.timeout("headtimeout", 30)?,
            idle_timeout: self.timeout("idletimeout", 60)?,
            stall_timeout: self.timeout("stalltimeout", 60)?,
        })
    }

    fn api(&self) -> Result<api::Config> {
        let fallback = self.last("fallback").filter(|host| !host.is_empty()).map(String::from);
        let (basicauth, accel) = (self.switch("basicauth", false)?, self.switch("accel", false)?);
        let linktime = self.timeout("linktime", 3600)?;
        let backup = Some(self.time("backup", 0)?).filter(|interval| !interval.is_zero());
        if backup.is_some_and(|interval| interval < Duration::from_secs(1)) {
            return usage("-backup: a second is the least; 24h is usual");
        }
        Ok(api::Config { fallback, basicauth, accel, linktime, flags: self.shown(), backup })
    }

    /// Where S3 listens: `-s3`, beside the API.
    fn s3(&self, http: &http::Config, api: &api::Config) -> Result<Option<S3Config>> {
        let (keys, redirect) = (self.last("s3keys").map(PathBuf::from), self.switch("s3redirect", false)?);
        if self.last("s3").is_none() {
            return match keys.is_some() || redirect {
                true => usage("-s3keys, -s3redirect: only together with -s3 PORT"),
                false => Ok(None),
            };
        }
        let port = self.number("s3", 0, 0, 65535)?;
        if port != 0 && port == http.port {
            return usage("-s3: S3 has a port of its own, another one than -port");
        }
        if api.basicauth && self.login()?.is_none() && self.last("secret").is_none() {
            return usage("-s3: with -basicauth give -userpass, because S3 clients have no login for the volumes");
        }
        let s3 = s3::Config { keys, redirect, accel: api.accel, linktime: api.linktime };
        Ok(Some(S3Config { http: http::Config { port, ..http.clone() }, s3 }))
    }

    /// The flags that were given, for the page. A password is left out.
    fn shown(&self) -> Vec<(String, String)> {
        let value = |name: &str, values: &[String]| match name {
            "userpass" => "(hidden)".to_string(),
            "db" if Url::is_url(self.last("db").unwrap_or_default()) => "(a database)".to_string(),
            _ => values.last().cloned().unwrap_or_default(),
        };
        self.0.iter().map(|(name, values)| (name.to_string(), value(name, values))).collect()
    }

    fn verify(&self, db: Location, verbose: bool) -> Result<verify::Config> {
        let (repair, strays) = (self.switch("repair", false)?, self.switch("strays", false)?);
        if strays && !repair {
            return usage("-strays: only together with -repair");
        }
        let (deep, grace) = (self.switch("deep", false)?, self.time("grace", 24 * 3600)?);
        Ok(verify::Config { db, deep, repair, strays, grace, verbose })
    }
}

/// `host:port` of a master's URL.
fn host_of(flag: &str, url: &str) -> Result<String> {
    let host = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/').to_string();
    if host.is_empty() || host.contains(['/', '@', '?', '#']) {
        return usage(format!("-{flag}: expected the master itself, as http://host:port, not {url}"));
    }
    Ok(host)
}

fn check_volumes(Placement { volumes, replicas, .. }: &Placement) -> Result<()> {
    if volumes.is_empty() {
        return usage("-volumes: give at least one volume, as host:port,host:port");
    }
    for (n, volume) in volumes.iter().enumerate() {
        if !is_volume(volume) || volume.contains(['/', '@', '?', '#']) || volume.ends_with(':') {
            let tags = TAGS.join(", ");
            return usage(format!("-volumes: {volume:?} is not host:port (and may not begin with one of {tags})"));
        }
        if volumes[..n].contains(volume) {
            return usage(format!("-volumes: {volume} is given twice"));
        }
    }
    let count = volumes.len();
    if *replicas > count {
        return usage(format!("-replicas: {replicas} replicas need as many volumes, -volumes has {count}"));
    }
    Ok(())
}

fn usage<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::Usage(text.into()))
}

/// Turns `-flag` into `--flag`, the only form that pico-args knows for long names. A bare switch gets `=true`, so that
/// every flag has a value.
fn double_dash(word: String) -> OsString {
    let Some(name) = word.strip_prefix("--").or(word.strip_prefix('-')).filter(|n| !n.is_empty()) else {
        return word.into();
    };
    let name = if name == "h" { "help" } else { name };
    let is_switch = |(flag, value, _): &Flag| *flag == name && (value.is_empty() || *value == "BOOL");
    let bare = GROUPS.iter().any(|(.., flags)| flags.iter().any(is_switch));
    format!("--{name}{}", if bare { "=true" } else { "" }).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(line: &str) -> Result<Command> {
        parse(line.split(' ').map(OsString::from)).map(|cli| cli.command)
    }

    #[test]
    fn flags_stand_anywhere_with_one_dash_or_two_and_a_space_or_an_equals_sign() {
        for line in [
            "-db /x -volumes a:1,b:2 -replicas 2 -port 7 -md5sum=false -protect -voltimeout 1m1.5s server",
            "server --db=/x --volumes=a:1,b:2 --replicas=2 --port=7 --md5sum=0 --protect=true --voltimeout=61500ms",
            "-replicas 1 -db /x server -volumes=a:1,b:2 --replicas 2 -port 7 -protect -md5sum=F -voltimeout 61.5s",
        ] {
            let cli = parse(line.split(' ').map(OsString::from)).unwrap();
            assert_eq!(cli.voltimeout, Duration::from_millis(61500), "{line}");
            assert!(!cli.verbose);
            let Command::Server(server) = cli.command else { panic!("{line}") };
            let Server { db, store, http, .. } = *server;
            assert!(matches!(db, Location::Folder(folder) if folder.to_str() == Some("/x")));
            let Placement { volumes, replicas, subvolumes } = store.placement;
            assert_eq!(volumes, ["a:1", "b:2"]);
            assert_eq!((replicas, http.port, subvolumes), (2, 7, 10));
            assert!(store.protect && !store.md5sum);
        }
    }

    #[test]
    fn help_of_a_command_is_printed() {
        let Ok(Command::Print(text)) = command("verify -help") else { panic!("-help prints") };
        assert_eq!(text, help(Some("verify")));
    }

    #[test]
    fn a_word_that_is_not_utf_8_is_named() {
        use std::os::unix::ffi::OsStringExt;
        let words = [b"-db".to_vec(), b"/x\xff".to_vec(), b"dump".to_vec()].map(OsString::from_vec);
        let error = parse(words.into_iter()).err().unwrap();
        assert_eq!((error.exit_code(), error.to_string().as_str()), (2, "\"/x\\xFF\": use UTF-8 only"));
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
            ("server -db /x -volumes a:1 -replicas 1 -userpass me:pass -secret /x", "-userpass"),
            ("server -db /x -volumes a:1 -replicas 1 -secret /no/such/file", "-secret"),
            ("server -db /x -volumes a:1 -replicas 1 -linktime 0s", "-linktime"),
            ("secret -secret /x", "-secret"),
            ("server -db /x -volumes a:1 -replicas 1 -subvolumes", "-subvolumes"),
            ("server -db /x -volumes a:1 -replicas 1 -frobnicate", "-frobnicate"),
            ("verify -db /x -volumes a:1 -replicas 1 -strays", "-strays"),
            ("verify -db /x -volumes a:1 -replicas 1 -repair -dry-run", "-dry-run"),
            ("server -db /x -volumes a:1 -replicas 1 -lost a:1", "-lost"),
            ("dump -db /x -rehash", "-rehash"),
            ("dump -db /x -log xml", "-log"),
            ("server -db /x -volumes a:1 -replicas 1 -backup 9ms", "-backup"),
            ("backup", "DIR"),
            ("backup /y -master https://host/", "-master"),
            ("backup /y -keep 0", "-keep"),
            ("restore -db /x", "FILE"),
            ("restore /y", "-db"),
            ("completions", "SHELL"),
            ("server -db /x -volumes a:1 -replicas 1 -s3keys /y", "-s3"),
            ("server -db /x -volumes a:1 -replicas 1 -s3 3000", "-s3"),
            ("server -db /x -volumes a:1 -replicas 1 -s3 3001 -basicauth", "-userpass"),
            ("follow -db /x -volumes a:1 -replicas 1", "-from"),
            ("follow -db /x -volumes a:1 -replicas 1 -from https://host/", "-from"),
            ("server -db /x -volumes a:1 -replicas 1 -keeplog all", "-keeplog"),
            ("dump -db postgres://me@host", "-db"),
            ("import -db /x -leveldb /y -index /z", "-index"),
            ("serve -db /x", "serve"),
            ("server rebuild -db /x", "rebuild"),
            ("-db /x", "server"),
        ] {
            let text = command(line).err().expect(line).to_string();
            assert!(text.contains(flag), "{line}: {text}");
        }
    }
}
