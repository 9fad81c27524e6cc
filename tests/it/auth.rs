//! Basic authorization, which the volumes decide.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use rustix::process::Signal;

use crate::support::cluster::{child_command, first_line, reserve_address, signal, wait};
use crate::support::http_client::{self, Answer, Conn, find, head, target, wait_at_most, wait_until};
use crate::support::reference;

const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

const USER: &str = "me:secret";

/// Users and passwords that need careful encoding.
const UNUSUAL_USERS: [&str; 12] = [
    "colon:a:b::c:",
    "at:p@ss@word",
    "slash:/a//b/",
    "percent:100%25%zz%",
    "space: a  b ",
    "utf8:pässwörd☃日本",
    "empty:",
    "quotes:'\"`\\$(x)!",
    "url:?#[]&=+;,<>|^{}~",
    "ü@b/c%d e:pass",
    "long:0123456789012345678901234567890123456789012345678901234567890123456789",
    "-dash:-dash",
];

/// Volumes with basic authorization, and a master.
struct Store {
    folder: PathBuf,
    host: String,
    names: Vec<String>,
    volumes: Vec<Option<Child>>,
    master: Option<Child>,
    port: u16,
    flags: Vec<String>,
    /// A file for -secret and SECRET.
    secret: Option<PathBuf>,
    /// A library to preload into the master.
    preload: Option<PathBuf>,
    _reserved: TcpListener,
}

impl Store {
    /// Starts three volumes with these users (`user:password`), and no master.
    fn volumes(users: &[&str]) -> Store {
        Store::volumes_with(users, false)
    }

    /// `signed`: volumes and master have a secret.
    fn volumes_with(users: &[&str], signed: bool) -> Store {
        let (reserved, host) = reserve_address();
        let folder = std::env::temp_dir().join(format!("mkv-test-{}", host.replace('.', "-")));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("the temporary folder can be created");
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).expect("the folder's mode can be set");
        let names = (1..=3).map(|n| format!("{host}:{}", 3000 + n)).collect();
        let mut store = Store {
            names,
            volumes: vec![None, None, None],
            master: None,
            port: 0,
            flags: Vec::new(),
            secret: signed.then(|| folder.join("secret")),
            preload: None,
            _reserved: reserved,
            folder,
            host,
        };
        store.set_users(users);
        if let Some(file) = &store.secret {
            let made = Command::new(env!("CARGO_BIN_EXE_mkv")).arg("secret").arg(file).status();
            assert!(made.expect("mkv starts").success());
        }
        (0..3).for_each(|n| store.start_volume(n, true));
        store
    }

    /// Starts volumes and a master with -basicauth, which checks each client's credentials at the
    /// volumes.
    fn start(users: &[&str], flags: &[&str]) -> Store {
        let mut store = Store::volumes(users);
        store.start_master(&[&["-basicauth"], flags].concat());
        store
    }

    /// Replaces the users. Half of the passwords use bcrypt, half apr1.
    fn set_users(&self, users: &[&str]) {
        let mut text = String::new();
        for (n, user) in users.iter().enumerate() {
            let (name, password) = user.split_once(':').expect("user:password");
            let hash: &[&str] = if n % 2 == 0 { &["-nbB", "-C", "4"] } else { &["-nbm"] };
            let line = Command::new("htpasswd").args(hash).args(["--", name, password]).output();
            let line = line.expect("htpasswd starts");
            assert!(line.status.success(), "{line:?}");
            text.push_str(String::from_utf8_lossy(&line.stdout).trim());
            text.push('\n');
        }
        // Replace the file atomically: nginx reads it for each request.
        let file = self.folder.join(".htpasswd");
        fs::write(file.with_extension("new"), text).expect("the file can be written");
        fs::rename(file.with_extension("new"), file).expect("the file can be renamed");
    }

    fn start_volume(&mut self, n: usize, authorized: bool) {
        let log = fs::File::options()
            .append(true)
            .create(true)
            .open(self.folder.join("volumes.log"))
            .expect("the log can be written");
        let (host, port) = self.names[n].split_once(':').expect("host:port");
        let mut command = child_command("TERM");
        command
            .arg("./volume.sh")
            .arg(self.folder.join(format!("v{n}")))
            .env("BIND", host)
            .env("PORT", port)
            .env_remove("AUTH")
            .env_remove("SECRET")
            .envs(self.secret.iter().map(|file| ("SECRET", file)));
        if authorized {
            command.env("AUTH", self.folder.join(".htpasswd"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut script = command.spawn().expect("volume.sh starts");
        let line = first_line(&mut script);
        assert!(line.contains(" serves "), "{line}");
        self.volumes[n] = Some(script);
    }

    fn stop_volume(&mut self, n: usize) {
        if let Some(mut script) = self.volumes[n].take() {
            signal(script.id(), Signal::TERM);
            wait(&mut script, "volume.sh");
        }
    }

    fn mkv(&self, args: &[&str]) -> Command {
        let mut command = child_command("KILL");
        command
            .arg(env!("CARGO_BIN_EXE_mkv"))
            .arg("-db")
            .arg(self.folder.join("db"))
            .args(["-volumes", &self.names.join(","), "-replicas", "2", "-v"])
            .args(self.secret.iter().flat_map(|file| [Path::new("-secret"), file]))
            .args(args)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.mkv(args).output().expect("mkv starts")
    }

    fn start_master(&mut self, flags: &[&str]) {
        self.flags = flags.iter().map(|flag| flag.to_string()).collect();
        let log = fs::File::options()
            .append(true)
            .create(true)
            .open(self.folder.join("master.log"))
            .expect("the log can be written");
        let mut command = self.mkv(flags);
        command.args(["-host", &self.host, "-port", &self.port.to_string(), "server"]);
        if let Some(library) = &self.preload {
            command.env("LD_PRELOAD", library).env("LATER", self.folder.join("later"));
        }
        let mut master = command.stdout(Stdio::piped()).stderr(log).spawn().expect("mkv starts");
        let line = first_line(&mut master);
        self.master = Some(master);
        let address = line.strip_prefix("mkv listens on ");
        self.port = address
            .and_then(|address| address.trim().rsplit(':').next()?.parse().ok())
            .unwrap_or_else(|| panic!("the master does not listen: {line:?}\n{}", self.log()));
    }

    fn stop_master(&mut self) {
        let mut master = self.master.take().expect("the master runs");
        signal(master.id(), Signal::TERM);
        wait(&mut master, "the master after SIGTERM");
        assert_eq!(master.wait().unwrap().code(), Some(0), "{}", self.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.join("master.log")).unwrap_or_default()
    }

    fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// Sends a request with or without `user:password`.
    #[track_caller]
    fn ask(&self, user: Option<&str>, method: &str, target: &str, body: Option<&[u8]>) -> Answer {
        let header = user.map(basic);
        let headers: Vec<_> = header.iter().map(|value| ("Authorization", &**value)).collect();
        http_client::ask(&self.address(), method, target, &headers, body)
    }

    #[track_caller]
    fn put(&self, user: &str, key: &str, value: &str) -> Answer {
        self.ask(Some(user), "PUT", &target(key), Some(value.as_bytes()))
    }

    /// The paths of all blobs.
    fn blobs(&self) -> Vec<String> {
        let mut blobs = Vec::new();
        (0..3).for_each(|n| collect_files(&self.folder.join(format!("v{n}")), &mut blobs));
        blobs.sort();
        blobs
    }

    fn curl(&self, args: &[&str]) -> Output {
        let mut curl = Command::new("curl");
        curl.args(["-q", "-sS", "-f", "--max-time", "20"]).args(args);
        curl.output().expect("curl starts")
    }

    fn url(&self, key: &str) -> String {
        format!("http://{}{}", self.address(), target(key))
    }

    /// Checks that nothing has panicked.
    fn check(&self) {
        let panics: Vec<String> = self.log().lines().filter(|l| l.contains("panicked")).map(String::from).collect();
        assert!(panics.is_empty(), "{panics:?}");
    }
}

fn collect_files(folder: &Path, blobs: &mut Vec<String>) {
    for entry in fs::read_dir(folder).expect("a folder can be read").flatten() {
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        match entry.file_type().expect("the file type is known").is_dir() {
            true => collect_files(&entry.path(), blobs),
            false => blobs.push(entry.path().display().to_string()),
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the master's log:\n{}", self.log());
        } else {
            self.check();
        }
        for script in self.volumes.iter().flatten() {
            signal(script.id(), Signal::TERM);
        }
        if let Some(mut master) = self.master.take() {
            signal(master.id(), Signal::KILL);
            wait(&mut master, "the killed master");
        }
        (0..3).for_each(|n| self.stop_volume(n));
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn basic(userpass: &str) -> String {
    format!("Basic {}", STANDARD.encode(userpass))
}

/// `user:password@`, as in a redirect's URL.
fn url_credentials(userpass: &str) -> String {
    let (user, password) = userpass.split_once(':').expect("user:password");
    let encode = |text: &str| percent_encode(text.as_bytes(), UNRESERVED).to_string();
    format!("{}:{}@", encode(user), encode(password))
}

/// Reads the URL of a redirect with the credentials in it.
#[track_caller]
fn follow(redirect: &Answer) -> Answer {
    let location = redirect.header("Location").expect("a redirect has a Location");
    let rest = location.strip_prefix("http://").expect("the Location is a URL");
    let (user, rest) = rest.split_once('@').expect("the URL has credentials");
    let (host, path) = rest.split_at(rest.find('/').expect("the URL has a path"));
    let user: Vec<u8> = percent_decode_str(user).collect();
    let header = format!("Basic {}", STANDARD.encode(user));
    http_client::ask(host, "GET", path, &[("Authorization", &header)], None)
}

#[track_caller]
fn assert_401(answer: &Answer) {
    assert_eq!(answer.status, 401, "{answer:?}");
    let scheme = answer.header("WWW-Authenticate").expect("a 401 has WWW-Authenticate");
    assert!(scheme.starts_with("Basic realm="), "{scheme}");
    for name in ["Location", "Key-Volumes", "Key-Balance", "Content-Md5", "Allow"] {
        assert_eq!(answer.header(name), None);
    }
}

/// Everything in the answer of an error but its Date and the id of its request.
fn without_date_and_id(answer: Answer) -> (u16, Vec<(String, String)>, String) {
    let text = answer.text();
    let (text, _id) = text.split_once(" (request ").expect("an error has its request's id");
    let differs = |name: &str| ["date", "content-length"].contains(&name.to_lowercase().as_str());
    let headers = answer.headers.into_iter().filter(|(name, _)| !differs(name));
    (answer.status, headers.collect(), text.to_string())
}

/// The curl flags that follow a redirect with credentials. Before 8.2.0, curl drops -u on a
/// redirect to another port and also ignores the credentials in the Location (curl/curl#11410).
fn curl_redirect_flags() -> Vec<&'static str> {
    let text = Command::new("curl").args(["-q", "--version"]).output().expect("curl starts").stdout;
    let text = String::from_utf8_lossy(&text).into_owned();
    let version: Vec<u32> =
        text.split_whitespace().nth(1).map_or(Vec::new(), |version| version.split('.').flat_map(str::parse).collect());
    let new = version.as_slice() >= [8, 2].as_slice();
    if new { vec!["--location-trusted", "-L"] } else { vec!["--location-trusted"] }
}

const METHODS: [&str; 12] = [
    "GET",
    "HEAD",
    "PUT",
    "REPLACE",
    "DELETE",
    "UNLINK",
    "RELINK",
    "REBALANCE",
    "POST",
    "PATCH",
    "OPTIONS",
    "FROBNICATE",
];

#[test]
fn every_request_without_valid_credentials_gets_the_same_401() {
    let s = Store::start(&[USER, "you:other"], &["-userpass", USER]);
    s.put(USER, "/live", "value").expect(201);
    s.put(USER, "/unlinked", "value").expect(201);
    s.ask(Some(USER), "UNLINK", "/unlinked", None).expect(204);
    let before = s.blobs();
    let wrong = ["me:Secret", "me:", "me:secret ", "me:secre", "Me:secret", "you:secret", ":", "nobody:x"];
    for user in std::iter::once(None).chain(wrong.map(Some)) {
        let mut answers = Vec::new();
        let methods = if user.is_none() || user == Some("me:") { &METHODS[..] } else { &METHODS[..3] };
        for method in methods {
            let body = ["PUT", "REPLACE"].contains(method).then_some(b"new".as_slice());
            for key in ["/live", "/unlinked", "/absent", "/", "/%zz"] {
                let answer = s.ask(user, method, key, body);
                assert_401(&answer);
                if *method != "HEAD" {
                    answers.push(without_date_and_id(answer));
                }
            }
        }
        for query in [
            "/?list",
            "/?unlinked",
            "/?writing",
            "/?metrics",
            "/?health",
            "/?stats",
            "/?status",
            "/?status=json",
            "/live?x",
            "/?list&limit=x",
        ] {
            let answer = s.ask(user, "GET", query, None);
            assert_401(&answer);
            answers.push(without_date_and_id(answer));
        }
        answers.dedup();
        assert_eq!(answers.len(), 1, "{user:?}: {answers:?}");
    }
    // An upload is refused before its body is sent, and the client reads the refusal.
    for (user, headers) in [(None, vec![]), (Some("me:wrong"), vec![("Expect", "100-continue")])] {
        let header = user.map(basic);
        let mut headers: Vec<(&str, &str)> = headers;
        headers.extend(header.iter().map(|value| ("Authorization", value.as_str())));
        headers.push(("Content-Length", "100000000"));
        let mut conn = Conn::open(&s.address());
        conn.send(head("PUT", "/new", &headers));
        let first = conn.next_answer("PUT").unwrap().unwrap();
        assert_401(&first);
    }
    assert_eq!(s.blobs(), before);
    for user in [USER, "you:other"] {
        let list = s.ask(Some(user), "GET", "/?list", None).expect(200);
        assert_eq!(list.text(), r#"{"next":"","keys":["/live"]}"#);
        assert_eq!(follow(&s.ask(Some(user), "GET", "/live", None).expect(302)).text(), "value");
        s.ask(Some(user), "GET", "/?metrics", None).expect(200);
        let page = s.ask(Some(user), "GET", "/?status", None).expect(200).text();
        assert!(page.contains("All 3 volumes answer") && page.contains("% full"), "{page}");
        assert!(page.contains("-userpass") && !page.contains(USER.split_once(':').unwrap().1), "{page}");
        s.ask(Some(user), "FROBNICATE", "/live", None).expect(405);
        s.ask(Some(user), "GET", "/absent", None).expect(404);
    }
}

#[test]
fn a_malformed_authorization_header_gets_401() {
    let s = Store::start(&[USER, "empty:"], &[]);
    s.put(USER, "/live", "value").expect(201);
    let token = STANDARD.encode(USER);
    let long = format!("Basic {}", "QUFB".repeat(1500));
    let headers = [
        "",
        " ",
        "Basic",
        "Basic ",
        "Basic  ",
        "Basic :",
        "Basic !!!",
        "Basic =",
        "Basic bWU=",
        "Basic bWU6c2VjcmV0IQ",
        "Basic me:secret",
        "Basic\tbWU6c2VjcmV0IA==",
        "Bearer bWU6c2VjcmV0",
        "Digest username=\"me\"",
        "Negotiate",
        &token,
        &format!("Basic {token} {token}"),
        &format!("Basic,{token}"),
        &format!("Basic {}", STANDARD.encode("me\0:secret")),
        &format!("Basic {}", STANDARD.encode("me:secret\0")),
        &format!("Basic {}", STANDARD.encode("me:secret\r\nX: y")),
        &format!("Basic {}", STANDARD.encode([b'm', b'e', b':', 0xff, 0xfe])),
        &long,
    ];
    for header in headers {
        for (method, target) in [("GET", "/live"), ("GET", "/?list"), ("PUT", "/new")] {
            let body = (method == "PUT").then_some(b"new".as_slice());
            let sent = [("Authorization", header)];
            let answer = http_client::ask(&s.address(), method, target, &sent, body);
            assert_eq!(answer.status, 401, "{header:?}: {answer:?}");
            assert_401(&answer);
        }
    }
    // Unusual but valid headers.
    for header in [format!("basic {token}"), format!("BASIC {token}"), format!("Basic   {token}  ")] {
        http_client::ask(&s.address(), "GET", "/live", &[("Authorization", &header)], None).expect(302);
    }
    s.ask(Some("empty:"), "GET", "/live", None).expect(302);
}

#[test]
fn unusual_users_and_passwords_work_end_to_end() {
    let s = Store::start(&UNUSUAL_USERS, &[]);
    for (n, user) in UNUSUAL_USERS.iter().enumerate() {
        let (key, value) = (format!("/{n}/été"), format!("the value of {user}"));
        s.put(user, &key, &value).expect(201);
        let answer = s.ask(Some(user), "GET", &target(&key), None).expect(302);
        let volumes = answer.header("Key-Volumes").unwrap();
        let places = volumes
            .split(',')
            .map(|replica| format!("http://{}{replica}{}", url_credentials(user), reference::path(key.as_bytes(), 0)));
        let location = answer.header("Location").unwrap();
        assert!(places.into_iter().any(|place| place == location), "{user}: {location}");
        assert_eq!(answer.header("Cache-Control"), Some("no-store"));
        assert_eq!(follow(&answer).expect(200).text(), value);
        for flag in curl_redirect_flags() {
            let read = s.curl(&[flag, "-u", user, &s.url(&key)]);
            assert!(read.status.success() && read.stdout == value.as_bytes(), "{user}: {read:?}");
        }
        for method in ["UNLINK", "RELINK", "REBALANCE", "DELETE"] {
            s.ask(Some(user), method, &target(&key), None).expect(204);
        }
        s.ask(Some(&format!("{user}x")), "GET", &target(&key), None).expect(401);
    }
    assert!(s.blobs().is_empty());
}

#[test]
fn the_servers_own_password_may_be_unusual() {
    for user in [UNUSUAL_USERS[0], UNUSUAL_USERS[3], UNUSUAL_USERS[5], UNUSUAL_USERS[9]] {
        let mut s = Store::start(&[user], &["-userpass", user]);
        s.put(user, "/a", "old").expect(201);
        s.ask(Some(user), "REPLACE", "/a", Some(b"new")).expect(201);
        wait_until("the cleaner has deleted the old value", || s.blobs().len() == 2);
        s.stop_master();
        let result = s.run(&["rebuild", "-rehash", "-userpass", user]);
        assert!(result.status.success(), "{result:?}");
    }
}

#[test]
fn curl_works_with_basic_authorization() {
    let s = Store::start(&[USER], &["-userpass", USER]);
    let file = s.folder.join("value");
    let value = "v".repeat(300_000);
    fs::write(&file, &value).unwrap();
    let file = file.to_str().unwrap();
    for flag in curl_redirect_flags() {
        let ok = |args: &[&str]| {
            let result = s.curl(&[&[flag], args].concat());
            assert!(result.status.success(), "{args:?}: {result:?}");
            String::from_utf8_lossy(&result.stdout).into_owned()
        };
        ok(&["-u", USER, "-T", file, &s.url("/file")]);
        assert_eq!(ok(&["-u", USER, &s.url("/file")]), value);
        ok(&["-u", USER, "-X", "PUT", "-d", "bigswag", &s.url("/wehave")]);
        assert_eq!(ok(&["-u", USER, &s.url("/wehave")]), "bigswag");
        assert!(ok(&["-u", USER, &format!("{}?list", s.url("/"))]).contains("/wehave"));
        for args in [vec![], vec!["-u", "me:wrong"]] {
            let result = s.curl(&[&[flag], &args[..], &[&s.url("/wehave")]].concat());
            assert!(!result.status.success() && String::from_utf8_lossy(&result.stderr).contains("401"));
        }
        ok(&["-u", USER, "-X", "DELETE", &s.url("/wehave")]);
        ok(&["-u", USER, "-X", "DELETE", &s.url("/file")]);
        assert!(s.blobs().is_empty());
    }
}

#[test]
fn the_reachable_volumes_decide_and_without_any_all_requests_fail() {
    let users: Vec<String> = (0..12).map(|n| format!("user{n}:pass{n}")).collect();
    let users: Vec<&str> = users.iter().map(String::as_str).collect();
    let mut s = Store::start(&users, &[]);
    s.put(users[0], "/live", "value").expect(201);
    // Users that the master has not cached yet.
    s.stop_volume(1);
    for user in &users[1..6] {
        s.ask(Some(user), "GET", "/?list", None).expect(200);
        assert_401(&s.ask(Some(&format!("{user}x")), "GET", "/?list", None));
    }
    s.stop_volume(0);
    for user in &users[6..9] {
        s.ask(Some(user), "GET", "/absent", None).expect(404);
        assert_401(&s.ask(Some(&format!("{user}x")), "GET", "/absent", None));
    }
    s.stop_volume(2);
    for (method, target) in [("GET", "/live"), ("GET", "/absent"), ("GET", "/?list"), ("PUT", "/x")] {
        let body = (method == "PUT").then_some(b"new".as_slice());
        for user in [users[10], users[11], "user10:wrong", "nobody:x"] {
            let answer = s.ask(Some(user), method, target, body).expect(503);
            assert!(answer.header("Retry-After").is_some());
        }
        assert_401(&s.ask(None, method, target, body));
    }
    (0..3).for_each(|n| s.start_volume(n, true));
    wait_at_most(Duration::from_secs(10), "the volumes decide again", || {
        s.ask(Some(users[10]), "GET", "/?list", None).status == 200
    });
    assert_401(&s.ask(Some("user10:wrong"), "GET", "/?list", None));
}

#[test]
fn a_revoked_password_fails_at_once_and_a_new_one_works_within_two_seconds() {
    let s = Store::start(&["me:old", "you:other"], &[]);
    s.put("me:old", "/live", "value").expect(201);
    assert_401(&s.ask(Some("me:new"), "GET", "/?list", None));
    let refused_at = Instant::now();
    s.set_users(&["me:new", "you:other"]);
    // Even while the old password is cached, no value is read or written with it.
    let before = s.blobs();
    assert_401(&s.ask(Some("me:old"), "GET", "/live", None));
    let put = s.put("me:old", "/other", "value");
    assert!(put.status >= 400, "{put:?}");
    assert_eq!(s.blobs(), before);
    wait_at_most(Duration::from_secs(2), "the new password is right", || {
        s.ask(Some("me:new"), "GET", "/?list", None).status == 200
    });
    println!("the new password works after {:?}", refused_at.elapsed());
    assert_eq!(follow(&s.ask(Some("me:new"), "GET", "/live", None).expect(302)).text(), "value");
    s.ask(Some("you:other"), "DELETE", "/live", None).expect(204);
}

/// A preloaded clock that runs ahead by the seconds in the file named by LATER.
const CLOCK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *at) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(id, at);
  FILE *file = id == CLOCK_MONOTONIC ? fopen(getenv("LATER"), "r") : NULL;
  int seconds;
  if (file && fscanf(file, "%d", &seconds) == 1) at->tv_sec += seconds;
  if (file) fclose(file);
  return result;
}
"#;

#[test]
fn accepted_credentials_are_cached_for_30_seconds() {
    let mut s = Store::volumes(&["me:old"]);
    let (source, library) = (s.folder.join("clock.c"), s.folder.join("clock.so"));
    fs::write(&source, CLOCK).unwrap();
    let cc = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).output();
    assert!(cc.as_ref().is_ok_and(|cc| cc.status.success()), "{cc:?}");
    s.preload = Some(library);
    s.start_master(&["-basicauth"]);
    let list = |user: &str| s.ask(Some(user), "GET", "/?list", None).status;
    let later = |seconds: &str| fs::write(s.folder.join("later"), seconds).unwrap();
    assert_eq!(list("me:old"), 200);
    s.set_users(&["me:new"]);
    later("25");
    assert_eq!(list("me:old"), 200);
    // The cache entry dates from the first check: using it does not extend it.
    later("31");
    assert_eq!((list("me:old"), list("me:new")), (401, 200));
    later("63");
    assert_eq!((list("me:old"), list("me:new")), (401, 200));
}

#[test]
fn the_master_does_not_start_with_a_volume_that_accepts_anonymous_requests() {
    let mut s = Store::volumes(&[USER]);
    s.stop_volume(1);
    s.start_volume(1, false);
    for flags in [vec!["-basicauth"], vec!["-basicauth", "-userpass", USER]] {
        let result = s.run(&[&flags[..], &["-host", &s.host, "-port", "0", "server"]].concat());
        let text = String::from_utf8_lossy(&result.stderr);
        assert_eq!(result.status.code(), Some(1), "{result:?}");
        assert!(text.contains(&s.names[1]) && text.contains("AUTH") && result.stdout.is_empty(), "{text}");
    }
    s.stop_volume(1);
    // A volume that is down does not prevent the start.
    s.start_master(&["-basicauth"]);
    s.ask(Some(USER), "GET", "/?list", None).expect(200);
    assert_401(&s.ask(Some("me:wrong"), "GET", "/?list", None));
}

#[test]
fn a_volume_without_authorization_cannot_accept_credentials() {
    let mut s = Store::volumes(&[USER]);
    s.stop_volume(1);
    s.start_master(&["-basicauth"]);
    s.start_volume(1, false);
    // The volume without authorization is the only one that answers.
    s.stop_volume(0);
    s.stop_volume(2);
    for n in 0..5 {
        let answer = s.ask(Some(&format!("me:guess{n}")), "GET", "/?list", None);
        assert!(matches!(answer.status, 401 | 503), "{answer:?}");
    }
    s.stop_volume(1);
    (0..3).for_each(|n| s.start_volume(n, true));
    wait_at_most(Duration::from_secs(10), "the volumes decide again", || {
        s.ask(Some(USER), "GET", "/?list", None).status == 200
    });
    assert_401(&s.ask(Some("me:guess6"), "GET", "/?list", None));
}

#[test]
fn rebuild_rebalance_and_verify_send_userpass_to_the_volumes() {
    let mut s = Store::start(&[USER], &[]);
    for n in 0..10 {
        s.put(USER, &format!("/{n}"), "value").expect(201);
    }
    s.stop_master();
    let dump = s.run(&["dump"]).stdout;
    for command in ["rebuild", "rebalance", "verify"] {
        for flags in [vec![], vec!["-userpass", "me:wrong"]] {
            let result = s.run(&[&flags[..], &[command, "-settle", "0s"]].concat());
            let text = String::from_utf8_lossy(&result.stderr);
            assert!(result.status.code() == Some(1) && text.contains("401"), "{command}: {result:?}");
            assert!(text.contains(&format!("{}:300", s.host)) && !text.contains("wrong"), "{text}");
            assert_eq!(s.run(&["dump"]).stdout, dump);
        }
        let result = s.run(&["-userpass", USER, command, "-settle", "0s"]);
        assert!(result.status.success(), "{command}: {result:?}");
    }
    let result = s.run(&["-userpass", USER, "verify", "-deep", "-repair"]);
    assert!(result.status.success() && String::from_utf8_lossy(&result.stdout).contains("whole"));
    let result = s.run(&["-userpass", USER, "rebuild", "-rehash", "-replicas", "3"]);
    assert!(result.status.success(), "{result:?}");
    let result = s.run(&["-userpass", USER, "rebalance", "-replicas", "3", "-settle", "0s"]);
    assert!(result.status.success() && s.blobs().len() == 30, "{result:?}");
    // A -userpass without a colon is an error on the command line.
    let result = s.run(&["-userpass", "secret", "verify"]);
    let text = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.code() == Some(2) && text.contains("-userpass") && !text.contains("secret"));
}

#[test]
fn the_cleaner_needs_userpass_to_delete() {
    let mut s = Store::start(&[USER], &[]);
    s.put(USER, "/a", "old").expect(201);
    s.ask(Some(USER), "REPLACE", "/a", Some(b"new")).expect(201);
    let writing = |s: &Store| s.ask(Some(USER), "GET", "/?writing", None).expect(200).text();
    // A client's own DELETE needs no cleaner.
    s.put(USER, "/b", "value").expect(201);
    s.ask(Some(USER), "DELETE", "/b", None).expect(204);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(writing(&s), r#"{"next":"","keys":["/a"]}"#);
    assert_eq!(s.blobs().len(), 4);
    let log = s.log();
    let text: Vec<&str> = log.lines().filter(|line| line.contains("-userpass")).collect();
    assert_eq!(text.len(), 1, "{log}");
    s.stop_master();
    s.start_master(&["-basicauth", "-userpass", USER]);
    wait_until("the cleaner has deleted the old blobs", || s.blobs().len() == 2);
    wait_until("the debris is gone", || writing(&s) == r#"{"next":"","keys":[]}"#);
    assert_eq!(follow(&s.ask(Some(USER), "GET", "/a", None).expect(302)).text(), "new");
}

#[test]
fn a_cleaner_with_a_wrong_userpass_keeps_its_debris() {
    let mut s = Store::start(&[USER], &["-userpass", "me:wrong"]);
    s.put(USER, "/a", "old").expect(201);
    s.ask(Some(USER), "REPLACE", "/a", Some(b"new")).expect(201);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(s.blobs().len(), 4);
    s.stop_master();
    s.start_master(&["-basicauth", "-userpass", USER]);
    wait_until("the cleaner has deleted the old blobs", || s.blobs().len() == 2);
}

#[test]
fn a_server_without_basicauth_does_not_reveal_its_userpass() {
    let mut s = Store::volumes(&[USER]);
    s.start_master(&["-userpass", USER]);
    s.ask(None, "PUT", "/a", Some(b"value")).expect(201);
    let answer = s.ask(None, "GET", "/a", None).expect(302);
    let location = answer.header("Location").unwrap().to_string();
    assert!(location.starts_with(&format!("http://{}:300", s.host)), "{location}");
    assert_eq!(answer.header("Cache-Control"), None);
    assert!(!format!("{answer:?}").contains("secret"));
    s.ask(None, "REPLACE", "/a", Some(b"new")).expect(201);
    wait_until("the cleaner has deleted the old blobs", || s.blobs().len() == 2);
    s.ask(None, "DELETE", "/a", None).expect(204);
    assert!(s.blobs().is_empty());
}

#[test]
fn logs_and_commands_never_print_passwords() {
    let users = ["me:S3cr3t-Of-The-Server", "caller:An0ther/One"];
    let mut s = Store::start(&users, &["-userpass", users[0]]);
    for user in users {
        s.put(user, "/a", "value").expect(201);
        s.ask(Some(user), "REPLACE", "/a", Some(b"new")).expect(201);
        s.ask(Some(user), "GET", "/a", None).expect(302);
        s.ask(Some(user), "HEAD", "/a", None).expect(302);
        s.ask(Some(&format!("{user}-Wr0ng")), "GET", "/a", None).expect(401);
        s.ask(Some(user), "GET", "/?metrics", None).expect(200);
        s.ask(Some(user), "DELETE", "/a", None).expect(204);
    }
    s.put(users[1], "/a", "value").expect(201);
    // Provoke all kinds of errors.
    (0..3).for_each(|n| s.stop_volume(n));
    for method in ["GET", "HEAD", "PUT", "REPLACE", "DELETE", "REBALANCE"] {
        let body = ["PUT", "REPLACE"].contains(&method).then_some(b"x".as_slice());
        s.ask(Some(users[1]), method, "/a", body);
        s.ask(Some(&format!("{}-Wr0ng", users[1])), method, "/a", body);
    }
    s.stop_master();
    let mut text = String::new();
    for command in ["rebuild", "rebalance", "verify"] {
        for user in [users[0], "me:S3cr3t-Wr0ng"] {
            let result = s.run(&["-v", "-userpass", user, command, "-settle", "0s"]);
            text.push_str(&String::from_utf8_lossy(&[result.stdout, result.stderr].concat()));
        }
    }
    (0..3).for_each(|n| s.start_volume(n, true));
    for user in [users[0], "me:S3cr3t-Wr0ng"] {
        for command in ["verify", "rebuild", "rebalance"] {
            let result = s.run(&["-v", "-userpass", user, command, "-settle", "0s"]);
            text.push_str(&String::from_utf8_lossy(&[result.stdout, result.stderr].concat()));
        }
    }
    text.push_str(&s.log());
    text.push_str(&fs::read_to_string(s.folder.join("volumes.log")).unwrap_or_default());
    assert!(text.contains("PUT /a 201") && text.contains("verify"), "{text}");
    let tokens = users.map(|user| STANDARD.encode(user)[..12].to_string());
    for word in ["S3cr3t", "An0ther", "Wr0ng", "Authorization", "Basic ", &tokens[0], &tokens[1]] {
        let at = find(text.as_bytes(), word.as_bytes());
        assert_eq!(at, None, "{word} is printed: {}", &text[at.unwrap_or(0)..][..100]);
    }
}

/// What `ps` shows of all processes.
fn command_lines() -> String {
    let output = Command::new("ps").args(["-eo", "args"]).output().expect("ps starts");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn with_a_secret_no_password_leaves_the_master_but_for_the_question_who_a_user_is() {
    // Words of this test alone: ps also shows the processes of other tests.
    let users = ["me:Unu5ual-0ne", "you:R4re/Tw0"];
    let mut s = Store::volumes_with(&users, true);
    s.start_master(&["-basicauth"]);
    for user in users {
        s.put(user, "/a", "old").expect(201);
        s.ask(Some(user), "REPLACE", "/a", Some(b"value")).expect(201);
        let answer = s.ask(Some(user), "GET", "/a", None).expect(302);
        let location = answer.header("Location").unwrap();
        assert!(location.starts_with(&format!("http://{}:300", s.host)) && location.contains("&s="), "{location}");
        assert_eq!(crate::support::http_client::follow(&answer).expect(200).text(), "value");
        for wrong in [format!("{user}x"), "nobody:x".into()] {
            assert_401(&s.ask(Some(&wrong), "GET", "/a", None));
        }
        // The master deletes without a password of its own.
        wait_until("the cleaner has deleted the old blobs", || s.blobs().len() == 2);
        s.ask(Some(user), "GET", "/?health", None).expect(200);
        s.ask(Some(user), "DELETE", "/a", None).expect(204);
    }
    assert_401(&s.ask(None, "GET", "/a", None));
    // A volume that is not asked for its users decides nothing.
    s.stop_volume(1);
    s.start_volume(1, false);
    let db = s.folder.join("another");
    let flags = ["-basicauth", "-host", &s.host, "-port", "0", "-db", db.to_str().unwrap(), "server"];
    let result = s.run(&flags);
    let error = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.code() == Some(1) && error.contains(&s.names[1]) && error.contains("AUTH"), "{error}");
    let text =
        command_lines() + &s.log() + &fs::read_to_string(s.folder.join("volumes.log")).unwrap_or_default() + &error;
    for word in ["Unu5ual", "R4re", "Authorization: Basic"] {
        assert!(!text.contains(word), "{word} is printed");
    }
}

#[test]
fn with_a_secret_common_clients_read_with_one_command() {
    let mut s = Store::volumes_with(&[USER], true);
    s.start_master(&["-basicauth"]);
    s.put(USER, "/a/value", "bigswag").expect(201);
    let url = s.url("/a/value");
    let python = "import sys, requests; print(requests.get(sys.argv[1], auth=('me', 'secret')).text, end='')";
    for command in [
        &["curl", "-q", "-sS", "-L", "-u", USER, &url][..],
        &["wget", "-q", "--no-config", "--user=me", "--password=secret", "-O", "-", &url],
        &["/usr/bin/python3", "-c", python, &url],
    ] {
        let output = Command::new(command[0]).args(&command[1..]).env("no_proxy", "*").output().expect("it starts");
        assert!(output.status.success() && output.stdout == b"bigswag", "{command:?}: {output:?}");
    }
    let read = s.curl(&["-u", USER, "-L", "-r", "3-", &url]);
    assert!(read.stdout == b"swag", "{read:?}");
    assert_eq!(chromium_download(&s.folder, &format!("http://{USER}@{}/a/value", s.address())), b"bigswag");
}

/// What Chromium saves when a user opens this URL.
fn chromium_download(folder: &Path, url: &str) -> Vec<u8> {
    let (profile, downloads) = (folder.join("profile"), folder.join("downloads"));
    fs::create_dir_all(profile.join("Default")).unwrap();
    fs::create_dir_all(&downloads).unwrap();
    let preferences =
        serde_json::json!({ "download": { "default_directory": downloads, "prompt_for_download": false } });
    fs::write(profile.join("Default/Preferences"), preferences.to_string()).unwrap();
    let mut chromium = child_command("KILL");
    chromium
        .args(["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--no-proxy-server"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(url)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut chromium = chromium.spawn().expect("chromium starts");
    // Chromium writes to another name first.
    let file =
        || {
            fs::read_dir(&downloads).unwrap().flatten().map(|file| file.path()).find(|file| {
                !file.file_name().unwrap().to_string_lossy().starts_with('.') && file.extension().is_none()
            })
        };
    wait_until("chromium has saved the value", || file().is_some());
    signal(chromium.id(), Signal::TERM);
    wait(&mut chromium, "chromium");
    fs::read(file().unwrap()).expect("the file can be read")
}

#[test]
fn a_backup_needs_a_login_as_everything_does() {
    let s = Store::start(&[USER], &["-userpass", USER, "-backup", "1s"]);
    s.put(USER, "/k", "value").expect(201);
    s.ask(None, "GET", "/?backup", None).expect(401);
    let (dir, address) = (s.folder.join("backups"), s.address());
    let backup = |flags: &[&str], hidden: Option<&str>| {
        let mut command = s.mkv(&["backup", dir.to_str().unwrap(), "-master", &address]);
        command.args(flags).envs(hidden.map(|login| ("MKV_USERPASS", login))).output().expect("mkv starts")
    };
    let refused = backup(&[], None);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("401"), "{refused:?}");
    for done in [backup(&["-userpass", USER], None), backup(&[], Some(USER))] {
        assert!(done.status.success(), "{done:?}");
    }
    http_client::wait_until("the master's own backup is stored", || {
        s.ask(Some(USER), "GET", "/.mkv/backup/1", None).status == 302
    });
    assert!(!s.ask(None, "GET", "/.mkv/backup/1", None).expect(401).text().contains(".mkv"));
}
