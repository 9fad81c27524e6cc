//! The server process: command line, start and shutdown.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::cluster::{Cluster, Setup, signal};
use crate::support::http_client::{Conn, ask, wait_until};

fn mkv(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mkv"));
    command.args(arguments);
    command
}

/// Runs a command that should exit by itself. Returns its exit code and output.
#[track_caller]
fn run_to_exit(command: &mut Command) -> (i32, String, String) {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().expect("mkv starts");
    let started = Instant::now();
    while process.try_wait().expect("the process can be waited for").is_none() {
        if started.elapsed() > Duration::from_secs(20) {
            let _ = process.kill();
            panic!("{command:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = process.wait_with_output().expect("the output can be read");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the output is UTF-8");
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// Checks for this exit code and one error line that contains these words.
#[track_caller]
fn assert_fails(command: &mut Command, code: i32, words: &[&str]) {
    let (status, out, error) = run_to_exit(command);
    assert_eq!(status, code, "{command:?}: {out}{error}");
    assert!(out.is_empty(), "{out}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.starts_with("mkv: "), "{error}");
    for word in words {
        assert!(error.contains(word), "{word} is missing: {error}");
    }
}

#[test]
fn on_sigterm_the_master_finishes_uploads_and_refuses_connections() {
    let mut c = Cluster::new();
    c.put("/k", "value").expect(201);
    let mut idle: Vec<Conn> = (0..5).map(|_| c.conn()).collect();
    idle[0].ask("GET", "/k", &[], None).expect(302);
    let mut length = c.conn();
    length.head("PUT", "/length", &[("Content-Length", "600000")]).send(vec![b'v'; 300_000]);
    let mut chunked = c.conn();
    chunked.head("PUT", "/chunked", &[("Transfer-Encoding", "chunked")]).send("3\r\nval\r\n");
    wait_until("both uploads have begun", || c.keys_with_debris().len() == 2);
    c.terminate_master();
    wait_until("the master refuses connections", || Conn::try_open(&c.address()).is_err());
    length.send(vec![b'v'; 300_000]).answer().expect(201);
    chunked.send("2\r\nue\r\n0\r\n\r\n").answer().expect(201);
    assert_eq!(c.wait_for_master_exit().code(), Some(0), "{}", c.log());
    c.start_master();
    c.assert_value("/length", vec![b'v'; 600_000]);
    c.assert_value("/chunked", "value");
    c.assert_value("/k", "value");
    assert!(c.keys_with_debris().is_empty());
}

#[test]
fn an_idle_master_exits_at_once_on_sigterm_and_sigint() {
    for number in [Signal::TERM, Signal::INT] {
        let mut c = Setup::new().volumes(1).start();
        c.put("/k", "value").expect(201);
        let mut idle: Vec<Conn> = (0..20).map(|_| c.conn()).collect();
        idle.iter_mut().step_by(2).for_each(|conn| drop(conn.ask("GET", "/k", &[], None)));
        let started = Instant::now();
        signal(c.master_pid(), number);
        assert_eq!(c.wait_for_master_exit().code(), Some(0));
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        // Acknowledged writes are stored, and the lock on -db is free.
        c.start_master();
        c.assert_value("/k", "value");
    }
}

#[test]
fn a_second_master_on_the_same_db_fails() {
    let c = Setup::new().volumes(1).start();
    let pid = c.master_pid().to_string();
    let db = c.folder.join("db");
    let mut second = mkv(&["-volumes", &c.names[0], "-replicas", "1", "-host", &c.host]);
    second.args(["-port", "0", "server", "-db"]).arg(&db);
    assert_fails(&mut second, 1, &["-db", db.to_str().unwrap(), &pid]);
    c.put("/k", "value").expect(201);
    c.assert_value("/k", "value");
}

#[test]
fn an_error_names_the_port_or_address_that_is_unavailable() {
    let c = Setup::new().volumes(1).start();
    let (address, other) = (c.address(), c.folder.join("other"));
    let port = address.rsplit(':').next().unwrap();
    let server = |host: &str, port: &str| {
        let mut command = mkv(&["-volumes", &c.names[0], "-replicas", "1"]);
        command.args(["-host", host, "-port", port, "server", "-db"]).arg(&other);
        command
    };
    assert_fails(&mut server(&c.host, port), 1, &[port, "-port"]);
    assert_fails(&mut server("192.0.2.1", "0"), 1, &["192.0.2.1", "-host"]);
    assert_fails(&mut server("no.such.host.invalid", "0"), 1, &["no.such.host.invalid"]);
    c.put("/k", "value").expect(201);
}

#[test]
fn a_wrong_command_line_exits_with_2_and_names_the_flag() {
    let folder = std::env::temp_dir().join(format!("mkv-never-made-{}", std::process::id()));
    let db = folder.to_str().unwrap();
    let volume = ["-volumes", "a:1", "-replicas", "1"];
    for (line, word) in [
        (vec!["server", "-db", db], "-volumes"),
        (vec!["server", "-db", db, "-volumes", ""], "-volumes"),
        (vec!["server", "-db", db, "-volumes", "a:1,a:1", "-replicas", "1"], "-volumes"),
        (vec!["server", "-db", db, "-volumes", "a:1,b:2"], "-replicas"),
        ([&["server"], &volume[..]].concat(), "-db"),
        ([&["server", "-db", db, "-port", "70000"], &volume[..]].concat(), "-port"),
        ([&["server", "-db", db, "-port", "x"], &volume[..]].concat(), "-port"),
        ([&["server", "-db", db, "-subvolumes", "0"], &volume[..]].concat(), "-subvolumes"),
        ([&["server", "-db", db, "-voltimeout", "soon"], &volume[..]].concat(), "-voltimeout"),
        ([&["server", "-db", db, "-protect=maybe"], &volume[..]].concat(), "-protect"),
        ([&["server", "-db", db, "-md5sum", "false", "x"], &volume[..]].concat(), ""),
        ([&["server", "-db", db, "-frobnicate"], &volume[..]].concat(), "-frobnicate"),
        ([&["server", "-db", db, "--maxconns"], &volume[..]].concat(), "-maxconns"),
        ([&["serve", "-db", db], &volume[..]].concat(), "serve"),
        ([&["server", "rebuild", "-db", db], &volume[..]].concat(), "rebuild"),
        (vec![], "server"),
    ] {
        assert_fails(&mut mkv(&line), 2, &[word]);
    }
    assert!(!folder.exists());
}

#[test]
fn help_and_version_print_to_stdout() {
    for flag in ["-help", "--help", "-h"] {
        let (code, out, error) = run_to_exit(&mut mkv(&[flag]));
        assert_eq!((code, error.as_str()), (0, ""));
        for word in ["server", "rebuild", "-volumes", "-md5sum", "-leveldb", "backup DIR", "exit status"] {
            assert!(out.contains(word), "{word}: {out}");
        }
    }
    let (code, out, error) = run_to_exit(&mut mkv(&["--version"]));
    assert_eq!((code, error.as_str()), (0, ""));
    let version = concat!("mkv ", env!("CARGO_PKG_VERSION"));
    let (rest, rocksdb) = out.split_once(", RocksDB ").expect("the version of RocksDB");
    assert!(rest.starts_with(version) && out.lines().count() == 1, "{out}");
    assert!(rocksdb.trim().split('.').all(|n| n.parse::<u32>().is_ok()), "{out}");
    // A clone names its commit, a source package cannot.
    assert_eq!(rest == version, option_env!("MKV_COMMIT").is_none(), "{out}");
}

#[test]
fn the_server_rejects_a_db_that_is_not_an_mkv_folder() {
    let c = Setup::new().volumes(1).start();
    let server = |db: &std::path::Path| {
        let mut command = mkv(&["server", "-volumes", "a:1", "-replicas", "1", "-port", "0"]);
        command.args(["-host", &c.host, "-db"]).arg(db);
        command
    };
    let file = c.folder.join("a-file");
    fs::write(&file, "x").unwrap();
    assert_fails(&mut server(&file), 1, &["-db", "a-file"]);
    assert_fails(&mut server(&file.join("below")), 1, &["-db", "below"]);
    // A Go master's folder must be imported, not opened.
    let go = c.folder.join("go");
    fs::create_dir(&go).unwrap();
    fs::write(go.join("CURRENT"), "MANIFEST-000001\n").unwrap();
    assert_fails(&mut server(&go), 1, &["-db", "import"]);
    assert_eq!(fs::read(go.join("CURRENT")).unwrap(), b"MANIFEST-000001\n");
    // A damaged index is an error, not a panic and not an empty store.
    let damaged = c.folder.join("damaged");
    fs::create_dir_all(damaged.join("index")).unwrap();
    fs::write(damaged.join("index/CURRENT"), "MANIFEST-000099\n").unwrap();
    assert_fails(&mut server(&damaged), 1, &["rebuild"]);
}

#[test]
fn the_master_warns_when_the_index_is_empty_and_the_volumes_are_not() {
    for subvolumes in [1, 3] {
        let mut c = Setup::new().subvolumes(subvolumes).start();
        c.put("/k", "value").expect(201);
        c.restart_master();
        c.stop_master();
        assert!(!c.log().contains("mkv rebuild"), "{}", c.log());
        let away = c.folder.join("away");
        fs::rename(c.db(), &away).unwrap();
        c.start_master();
        crate::support::http_client::wait_until("the warning is logged", || {
            let log = c.log();
            let warnings = log.lines().filter(|line| line.contains("mkv rebuild"));
            c.names.iter().all(|name| warnings.clone().any(|line| line.contains(name)))
        });
        c.stop_master();
        fs::remove_dir_all(c.db()).unwrap();
        fs::rename(&away, c.db()).unwrap();
        c.start_master();
        c.assert_value("/k", "value");
    }
}

#[test]
fn flags_may_stand_anywhere_and_the_default_host_is_every_address() {
    let mut c = Setup::new().volumes(1).start();
    c.stop_master();
    let mut command = mkv(&["--volumes", &c.names[0], "server", "--port=0", "-replicas=1"]);
    command.args(["--md5sum=false", "-subvolumes", "1", "-sync", "-protect", "--db"]);
    command.arg(c.folder.join("db")).stdout(Stdio::piped()).stdin(Stdio::null());
    let mut master = command.spawn().unwrap();
    let mut line = String::new();
    let mut out = std::io::BufReader::new(master.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    let checked = std::panic::catch_unwind(|| {
        let port = line.trim().rsplit(':').next().unwrap();
        assert!(line.starts_with("mkv listens on "), "{line}");
        let both = [format!("127.0.0.1:{port}"), format!("{}:{port}", c.host)];
        ask(&both[0], "PUT", "/k", &[], Some(b"value")).expect(201);
        let answer = ask(&both[1], "GET", "/k", &[], None).expect(302);
        assert_eq!(answer.header("Content-Md5"), None);
        assert_eq!(answer.header("Key-Volumes"), Some(c.names[0].as_str()));
        ask(&both[1], "DELETE", "/k", &[], None).expect(403);
        if fs::exists("/proc/net/if_inet6").unwrap() {
            ask(&format!("[::1]:{port}"), "GET", "/k", &[], None).expect(302);
        }
    });
    signal(master.id(), Signal::TERM);
    assert_eq!(master.wait().unwrap().code(), Some(0));
    if let Err(panic) = checked {
        std::panic::resume_unwind(panic);
    }
    c.setup = c.setup.clone().subvolumes(1);
    c.start_master();
    c.assert_value("/k", "value");
}

#[test]
fn the_log_shows_requests_only_with_v() {
    let mut c = Setup::new().volumes(1).start();
    c.put("/with", "value").expect(201);
    wait_until("the request is logged", || c.log().contains("PUT /with 201"));
    c.restart_with(&["-v=false"]);
    c.put("/without", "value").expect(201);
    c.restart_with(&[]);
    assert!(!c.log().contains("/without"), "{}", c.log());
}

#[test]
fn writes_survive_a_kill_with_sync() {
    let mut c = Setup::new().flags(&["-sync"]).start();
    c.put("/k", "value").expect(201);
    c.replace("/k", "other").expect(201);
    c.put("/l", "value").expect(201);
    c.ask("UNLINK", "/l").expect(204);
    c.kill_master();
    c.start_master();
    c.assert_value("/k", "other");
    assert_eq!(c.unlinked(), [b"/l"]);
}

#[test]
fn sighup_changes_nothing() {
    let c = Setup::new().volumes(1).start();
    c.put("/k", "value").expect(201);
    let (mut idle, mut upload) = (c.conn(), c.conn());
    idle.ask("GET", "/k", &[], None).expect(302);
    upload.head("PUT", "/upload", &[("Content-Length", "10")]).send("01234");
    wait_until("the upload has begun", || c.keys_with_debris().len() == 1);
    let pid = c.master_pid();
    for _ in 0..3 {
        signal(pid, Signal::HUP);
        idle.ask("GET", "/k", &[], None).expect(302);
    }
    upload.send("56789").answer().expect(201);
    assert_eq!(c.master_pid(), pid);
    c.assert_value("/upload", "0123456789");
}

/// What bash offers behind these words.
fn completed(script: &str, words: &[&str]) -> Vec<String> {
    let test =
        format!("{script}\nCOMP_WORDS=(\"$@\") COMP_CWORD=$(($# - 1)); _mkv; printf '%s\\n' \"${{COMPREPLY[@]}}\"");
    let output = Command::new("bash").args(["--norc", "-euc", &test, "bash"]).args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(String::from).filter(|line| !line.is_empty()).collect()
}

#[test]
fn completions_offer_commands_flags_and_files() {
    let (code, bash, error) = run_to_exit(&mut mkv(&["completions", "bash"]));
    assert_eq!((code, error.as_str()), (0, ""));
    for (words, offered) in [
        (&["mkv", "re"][..], &["rebuild", "rebalance", "restore"][..]),
        (&["mkv", "rebuild", "-re"], &["-replicas", "-rehash"]),
        (&["mkv", "verify", "-re"], &["-replicas", "-repair"]),
        (&["mkv", "-replicas", "3", "rebuild", "-no"], &["-nobackup"]),
        (&["mkv", "-log", ""], &["text", "json"]),
        (&["mkv", "completions", ""], &["bash", "zsh", "fish"]),
        (&["mkv", "-port", "3"], &[]),
        (&["mkv", "restore", "src/lib"], &["src/lib.rs"]),
        (&["mkv", "-db", "src/lib"], &["src/lib.rs"]),
    ] {
        assert_eq!(completed(&bash, words), offered, "{words:?}");
    }
    // zsh and fish load the script, and fish answers.
    for (shell, flags, test, offered) in [
        ("zsh", "-fc", "autoload -Uz compinit; compinit -u -D; eval \"$1\"; print $_comps[mkv]", "_mkv\n"),
        ("fish", "-Nc", "echo $argv[2] | source; complete -C 'mkv reb'", "rebalance\tmove values "),
    ] {
        let (_, script, _) = run_to_exit(&mut mkv(&["completions", shell]));
        let mut command = Command::new(shell);
        let (code, out, error) = run_to_exit(command.args([flags, test, shell, &script]).env("HOME", "/nonexistent"));
        assert_eq!((code, error.as_str()), (0, ""));
        assert!(out.contains(offered), "{out}");
    }
}
