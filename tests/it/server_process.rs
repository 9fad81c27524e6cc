//! The server process: command line, start and shutdown.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::cluster::{Cluster, Setup, signal};
use crate::support::http_client::{Conn, ask, until};

fn mkv(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mkv"));
    command.args(arguments);
    command
}

/// Runs a command that should exit by itself. Returns its exit code and output.
#[track_caller]
fn ended(command: &mut Command) -> (i32, String, String) {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().expect("it starts");
    let begun = Instant::now();
    while process.try_wait().expect("it is ours").is_none() {
        if begun.elapsed() > Duration::from_secs(20) {
            let _ = process.kill();
            panic!("{command:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = process.wait_with_output().expect("it has ended");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// Checks for this exit code and one error line that contains these words.
#[track_caller]
fn fails(command: &mut Command, code: i32, words: &[&str]) {
    let (status, out, error) = ended(command);
    assert_eq!(status, code, "{command:?}: {out}{error}");
    assert!(out.is_empty(), "{out}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.starts_with("mkv: "), "{error}");
    for word in words {
        assert!(error.contains(word), "{word} is missing: {error}");
    }
}

#[test]
fn sigterm_lets_the_uploads_under_way_finish_and_takes_no_new_connection() {
    let mut c = Cluster::new();
    c.put("/k", "value").expect(201);
    let mut idle: Vec<Conn> = (0..5).map(|_| c.conn()).collect();
    idle[0].ask("GET", "/k", &[], None).expect(302);
    let mut length = c.conn();
    length.head("PUT", "/length", &[("Content-Length", "600000")]).send(vec![b'v'; 300_000]);
    let mut chunked = c.conn();
    chunked.head("PUT", "/chunked", &[("Transfer-Encoding", "chunked")]).send("3\r\nval\r\n");
    until("both are under way", || c.writing().len() == 2);
    c.terminate_master();
    until("no connection is taken", || Conn::try_open(&c.address()).is_err());
    length.send(vec![b'v'; 300_000]).answer().expect(201);
    chunked.send("2\r\nue\r\n0\r\n\r\n").answer().expect(201);
    assert_eq!(c.await_master().code(), Some(0), "{}", c.log());
    c.start_master();
    c.holds("/length", vec![b'v'; 600_000]);
    c.holds("/chunked", "value");
    c.holds("/k", "value");
    assert!(c.writing().is_empty());
}

#[test]
fn an_idle_master_stops_at_once_on_sigterm_and_sigint() {
    for number in [Signal::TERM, Signal::INT] {
        let mut c = Setup::new().volumes(1).start();
        c.put("/k", "value").expect(201);
        let mut idle: Vec<Conn> = (0..20).map(|_| c.conn()).collect();
        idle.iter_mut().step_by(2).for_each(|conn| drop(conn.ask("GET", "/k", &[], None)));
        let begun = Instant::now();
        signal(c.master_pid(), number);
        assert_eq!(c.await_master().code(), Some(0));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        // Acknowledged writes are stored, and the lock on -db is free.
        c.start_master();
        c.holds("/k", "value");
    }
}

#[test]
fn a_second_master_on_the_same_db_is_refused() {
    let c = Setup::new().volumes(1).start();
    let pid = c.master_pid().to_string();
    let db = c.folder.join("db");
    let mut second = mkv(&["-volumes", &c.names[0], "-replicas", "1", "-host", &c.host]);
    second.args(["-port", "0", "server", "-db"]).arg(&db);
    fails(&mut second, 1, &["-db", db.to_str().unwrap(), &pid]);
    c.put("/k", "value").expect(201);
    c.holds("/k", "value");
}

#[test]
fn a_port_or_an_address_that_cannot_be_had_is_named() {
    let c = Setup::new().volumes(1).start();
    let (address, other) = (c.address(), c.folder.join("other"));
    let port = address.rsplit(':').next().unwrap();
    let server = |host: &str, port: &str| {
        let mut command = mkv(&["-volumes", &c.names[0], "-replicas", "1"]);
        command.args(["-host", host, "-port", port, "server", "-db"]).arg(&other);
        command
    };
    fails(&mut server(&c.host, port), 1, &[port, "-port"]);
    fails(&mut server("192.0.2.1", "0"), 1, &["192.0.2.1", "-host"]);
    fails(&mut server("no.such.host.invalid", "0"), 1, &["no.such.host.invalid"]);
    c.put("/k", "value").expect(201);
}

#[test]
fn a_wrong_command_line_is_exit_code_2_names_the_flag_and_does_nothing() {
    let folder = std::env::temp_dir().join(format!("mkv-never-made-{}", std::process::id()));
    let db = folder.to_str().unwrap();
    let one = ["-volumes", "a:1", "-replicas", "1"];
    for (line, word) in [
        (vec!["server", "-db", db], "-volumes"),
        (vec!["server", "-db", db, "-volumes", ""], "-volumes"),
        (vec!["server", "-db", db, "-volumes", "a:1,a:1", "-replicas", "1"], "-volumes"),
        (vec!["server", "-db", db, "-volumes", "a:1,b:2"], "-replicas"),
        ([&["server"], &one[..]].concat(), "-db"),
        ([&["server", "-db", db, "-port", "70000"], &one[..]].concat(), "-port"),
        ([&["server", "-db", db, "-port", "x"], &one[..]].concat(), "-port"),
        ([&["server", "-db", db, "-subvolumes", "0"], &one[..]].concat(), "-subvolumes"),
        ([&["server", "-db", db, "-voltimeout", "soon"], &one[..]].concat(), "-voltimeout"),
        ([&["server", "-db", db, "-protect=maybe"], &one[..]].concat(), "-protect"),
        ([&["server", "-db", db, "-md5sum", "false", "x"], &one[..]].concat(), ""),
        ([&["server", "-db", db, "-frobnicate"], &one[..]].concat(), "-frobnicate"),
        ([&["server", "-db", db, "--maxconns"], &one[..]].concat(), "-maxconns"),
        ([&["serve", "-db", db], &one[..]].concat(), "serve"),
        ([&["server", "rebuild", "-db", db], &one[..]].concat(), "rebuild"),
        (vec![], "server"),
    ] {
        fails(&mut mkv(&line), 2, &[word]);
    }
    assert!(!folder.exists());
}

#[test]
fn help_and_version_are_printed() {
    for flag in ["-help", "--help", "-h"] {
        let (code, out, error) = ended(&mut mkv(&[flag]));
        assert_eq!((code, error.as_str()), (0, ""));
        for word in ["server", "rebuild", "-volumes", "-md5sum", "-leveldb"] {
            assert!(out.contains(word), "{word}: {out}");
        }
    }
    let (code, out, error) = ended(&mut mkv(&["--version"]));
    assert_eq!((code, error.as_str()), (0, ""));
    assert_eq!(out, format!("mkv {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_db_that_is_none_is_refused() {
    let c = Setup::new().volumes(1).start();
    let server = |db: &std::path::Path| {
        let mut command = mkv(&["server", "-volumes", "a:1", "-replicas", "1", "-port", "0"]);
        command.args(["-host", &c.host, "-db"]).arg(db);
        command
    };
    let file = c.folder.join("a-file");
    fs::write(&file, "x").unwrap();
    fails(&mut server(&file), 1, &["-db", "a-file"]);
    fails(&mut server(&file.join("below")), 1, &["-db", "below"]);
    // A Go master's folder must be imported, not opened.
    let go = c.folder.join("go");
    fs::create_dir(&go).unwrap();
    fs::write(go.join("CURRENT"), "MANIFEST-000001\n").unwrap();
    fails(&mut server(&go), 1, &["-db", "import"]);
    assert_eq!(fs::read(go.join("CURRENT")).unwrap(), b"MANIFEST-000001\n");
    // A damaged index is an error, not a panic and not an empty store.
    let damaged = c.folder.join("damaged");
    fs::create_dir_all(damaged.join("index")).unwrap();
    fs::write(damaged.join("index/CURRENT"), "MANIFEST-000099\n").unwrap();
    fails(&mut server(&damaged), 1, &["rebuild"]);
}

#[test]
fn an_empty_index_beside_blobs_is_told() {
    for subvolumes in [1, 3] {
        let mut c = Setup::new().subvolumes(subvolumes).start();
        c.put("/k", "value").expect(201);
        c.restart_master();
        c.stop_master();
        assert!(!c.log().contains("mkv rebuild"), "{}", c.log());
        let away = c.folder.join("away");
        fs::rename(c.db(), &away).unwrap();
        c.start_master();
        crate::support::http_client::until("it is told", || {
            let log = c.log();
            let told = log.lines().filter(|line| line.contains("mkv rebuild"));
            c.names.iter().all(|name| told.clone().any(|line| line.contains(name)))
        });
        c.stop_master();
        fs::remove_dir_all(c.db()).unwrap();
        fs::rename(&away, c.db()).unwrap();
        c.start_master();
        c.holds("/k", "value");
    }
}

#[test]
fn flags_stand_anywhere_and_without_host_every_address_is_listened_on() {
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
    c.holds("/k", "value");
}

#[test]
fn the_log_names_requests_only_with_v() {
    let mut c = Setup::new().volumes(1).start();
    c.put("/with", "value").expect(201);
    until("the request is logged", || c.log().contains("PUT /with 201"));
    c.restart_with(&["-v=false"]);
    c.put("/without", "value").expect(201);
    c.restart_with(&[]);
    assert!(!c.log().contains("/without"), "{}", c.log());
}

#[test]
fn with_sync_writes_are_answered_as_without() {
    let mut c = Setup::new().flags(&["-sync"]).start();
    c.put("/k", "value").expect(201);
    c.replace("/k", "other").expect(201);
    c.put("/l", "value").expect(201);
    c.ask("UNLINK", "/l").expect(204);
    c.kill_master();
    c.start_master();
    c.holds("/k", "other");
    assert_eq!(c.unlinked(), [b"/l"]);
}
