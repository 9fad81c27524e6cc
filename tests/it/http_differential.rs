//! The same mutated requests, sent to the master and to a stock nginx in front of it: what nginx refuses
//! as malformed the master refuses too, and where both accept a request they agree where its body ends.
//! Otherwise a request could hide another one from one of them.
//!
//! A second request, which reads a known key, follows each one on its connection: whether it is answered
//! as such shows where the first one ended.

use std::cmp::Ordering::{Equal, Greater, Less};
use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::Signal;

use crate::support::cluster::{Cluster, Setup, child_command, signal, wait};
use crate::support::http_client::{Answer, Conn, find, head, wait_until};
use crate::support::random::seeded_rng;

const COUNT: usize = 6000;
const THREADS: usize = 32;

/// How long a client waits for the rest of a request, here and in nginx's configuration.
const TIMEOUT: &str = "500ms";

struct Nginx {
    process: Child,
    address: String,
}

impl Nginx {
    fn start(c: &Cluster) -> Nginx {
        let folder = c.folder.join("nginx");
        fs::create_dir(&folder).unwrap();
        let (folder, address) = (folder.to_str().unwrap(), format!("{}:5000", c.host));
        let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {folder}/{kind};"))
            .concat();
        let conf = format!(
            "daemon off; pid {folder}/pid; events {{ worker_connections 512; }}
            http {{ access_log off; {temp}
                client_header_timeout {TIMEOUT}; client_body_timeout {TIMEOUT};
                lingering_timeout {TIMEOUT}; keepalive_timeout {TIMEOUT};
                server {{ listen {address}; location / {{
                    proxy_pass http://{}; proxy_set_header Host $http_host;
                }} }}
            }}",
            c.address()
        );
        let file = format!("{folder}/conf");
        fs::write(&file, conf).unwrap();
        let log = fs::File::create(format!("{folder}/log")).unwrap();
        let mut command: Command = child_command("TERM");
        command.args(["nginx", "-p", folder, "-c", &file, "-e", "stderr"]);
        let process = command.stdin(Stdio::null()).stderr(log).spawn().expect("nginx starts");
        wait_until("nginx listens", || Conn::try_open(&address).is_ok());
        Nginx { process, address }
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        signal(self.process.id(), Signal::TERM);
        if !std::thread::panicking() {
            wait(&mut self.process, "nginx");
        }
    }
}

/// Requests as they should be; `KEY` is replaced by a key of each case's own.
const REQUESTS: [&str; 8] = [
    "GET KEY HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET KEY HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nvalue",
    "GET KEY HTTP/1.0\r\nConnection: keep-alive\r\nX: y\r\n\r\n",
    "PUT KEY HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\na value\r\n\r\n",
    "PUT KEY HTTP/1.1\r\nHost: x\r\nX-Y: z\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nvalue\r\n0\r\n\r\n",
    "PUT KEY HTTP/1.1\r\nHost: x:80\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nva\r\na \t;z\r\nlue 0\r\n\r\nGE\r\n00\r\nX: y\r\n\r\n",
    "PUT KEY HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1f\r\nGET /x HTTP/1.1\r\nHost: y\r\n\r\n\r\n\r\n\r\n0\r\n\r\n",
    "DELETE KEY HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n",
];

/// Lines that say something about the body's end, or seem to.
const LINES: [&str; 14] = [
    "Content-Length: 5\r\n",
    "Content-Length: 3\r\n",
    "Content-Length: 0005\r\n",
    "Content-Length: 5, 5\r\n",
    "Content-Length: +5\r\n",
    "Content-Length:\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: identity\r\n",
    "Transfer-Encoding: chunked, chunked\r\n",
    "transfer-encoding:chunked\r\n",
    "Host: z\r\n",
    " folded\r\n",
    "X : y\r\n",
    "\r\n",
];

const BYTES: &[u8] = b"\0\t\n\r  ::;;,\"+-_%/.\\0159afFxX\x0b\x7f\x80\xff";

/// A request with one or two changes outside its method and key.
fn mutated(random: &mut fastrand::Rng) -> Vec<u8> {
    let text = random.choice(REQUESTS).unwrap();
    let first = text.find("KEY").unwrap() + 3;
    let mut bytes = text.as_bytes().to_vec();
    for _ in 0..random.usize(1..3) {
        let at = random.usize(first..bytes.len());
        let byte = *random.choice(BYTES).unwrap();
        match random.usize(..8) {
            0 | 1 => bytes[at] = byte,
            2 => bytes.insert(at, byte),
            3 => drop(bytes.remove(at)),
            4 => bytes[at] ^= 0x20,
            5 => {
                // A line more, or less, or one twice.
                let lines: Vec<usize> = (first..bytes.len()).filter(|at| bytes[at - 1] == b'\n').collect();
                let Some(at) = random.choice(lines) else { continue };
                let line = random.choice(LINES).unwrap().as_bytes();
                bytes.splice(at..at, line.iter().copied());
            }
            6 => {
                let end = (at + random.usize(1..8)).min(bytes.len());
                bytes.extend_from_within(at..end);
            }
            _ => {
                let end = (at + random.usize(1..8)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
        }
    }
    bytes
}

/// What came back for a request and the one that follows it.
struct Outcome(Vec<Answer>);

fn send(address: &str, request: &[u8]) -> Outcome {
    let mut conn = Conn::open(address);
    let next = head("GET", "/known", &[("Connection", "close")]);
    // The server may close before it has it all.
    let _ = conn.try_send(&[request, &next].concat());
    let mut answers = Vec::new();
    while let Ok(Some(answer)) = conn.next_answer("GET") {
        answers.extend((answer.status >= 200).then_some(answer));
    }
    Outcome(answers)
}

impl Outcome {
    fn status(&self) -> u16 {
        self.0.first().map_or(0, |answer| answer.status)
    }

    fn accepted(&self) -> bool {
        (200..400).contains(&self.status()) || [403, 404].contains(&self.status())
    }

    /// nginx has answered by itself that this is no HTTP.
    fn is_nginx_refusal(&self) -> bool {
        let html = self.0.first().is_some_and(|answer| answer.text().contains("<html>"));
        html && [400, 501, 505].contains(&self.status())
    }

    /// How often the known key was read.
    fn reads(&self) -> usize {
        let is_read = |answer: &&Answer| answer.header("Location").is_some_and(|l| l.ends_with("/L2tub3du"));
        self.0.iter().filter(is_read).count()
    }

    /// Whether the server ended the connection behind the first request, or refused what it found
    /// there. The master does so where nginx does not: nginx ignores any CR and LF between requests,
    /// and takes a word before `keep-alive` in a Connection header for part of it.
    fn ended(&self) -> bool {
        let [first, rest @ ..] = &self.0[..] else { return true };
        first.header("Connection") == Some("close")
            || rest.first().is_some_and(|answer| [400, 501, 505].contains(&answer.status))
    }
}

#[test]
fn the_master_and_nginx_agree_where_requests_end() {
    let mut random = seeded_rng();
    let flags = ["-headtimeout", "-idletimeout", "-stalltimeout"].map(|flag| [flag, TIMEOUT]);
    let c = Setup::new().volumes(1).flags(flags.as_flattened()).start();
    let nginx = Nginx::start(&c);
    c.put("/known", "value").expect(201);
    let requests: Vec<Vec<u8>> = (0..COUNT).map(|_| mutated(&mut random)).collect();
    let (next, outcomes) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(request) = requests.get(n) else { return };
                    let outcome = compare(&c, &nginx.address, n, request);
                    outcomes.lock().unwrap().push(outcome);
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap();
    let count = |wanted| outcomes.iter().filter(|outcome| **outcome == wanted).count();
    let (both, neither) = (count(Compared::Accepted), count(Compared::Refused));
    println!("of {COUNT} requests both accepted {both}, and nginx refused {neither}");
    for outcome in &outcomes {
        if let Compared::Differ(text) = outcome {
            println!("{text}\n");
        }
    }
    assert!(!outcomes.iter().any(|outcome| matches!(outcome, Compared::Differ(_))));
    assert!(both > COUNT / 10 && neither > COUNT / 10, "the mutations test little");
}

#[derive(PartialEq)]
enum Compared {
    /// Both have accepted the request, and agree what it was.
    Accepted,
    /// nginx has refused the request, and so has the master.
    Refused,
    /// The master alone has refused it, or a limit has ended it.
    Other,
    Differ(String),
}

fn compare(c: &Cluster, nginx: &str, n: usize, request: &[u8]) -> Compared {
    let at = find(request, b"KEY").expect("the key is not mutated");
    let with = |key: &str| [&request[..at], key.as_bytes(), &request[at + 3..]].concat();
    let keys = [format!("/m/{n}/k"), format!("/n/{n}/k")];
    let own = send(&c.address(), &with(&keys[0]));
    let other = send(nginx, &with(&keys[1]));
    let differ = |why: &str| {
        let text = request.escape_ascii();
        Compared::Differ(format!("{why}: {text}\n  master: {own}\n  nginx: {other}"))
    };
    if other.is_nginx_refusal() {
        return if own.accepted() && !nginx_is_too_strict(request) {
            differ("nginx refuses")
        } else {
            Compared::Refused
        };
    }
    if !own.accepted() || !other.accepted() {
        return Compared::Other;
    }
    let agree = match own.reads().cmp(&other.reads()) {
        Less => own.ended(),
        Equal => true,
        Greater => other.ended(),
    };
    let stored = |key: &String| c.get(key).header("Content-Md5").map(String::from);
    if !agree {
        differ("the end")
    } else if stored(&keys[0]) != stored(&keys[1]) {
        differ("what is stored")
    } else {
        Compared::Accepted
    }
}

/// nginx takes a tab beside a header's value for a part of the value, which RFC 9110 does not
/// (section 5.6.3), and `..` in a Host for no host.
fn nginx_is_too_strict(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request);
    text.lines().any(|line| {
        let value = line.split_once(':').map_or("", |(_, value)| value);
        value.trim_matches(' ') != value.trim() || value.contains("..")
    })
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for answer in &self.0 {
            let connection = answer.header("Connection").unwrap_or("keeps");
            let line = answer.text().lines().next().unwrap_or_default().to_string();
            write!(f, "{} ({connection}) {line:?}; ", answer.status)?;
        }
        write!(f, "{} reads", self.reads())
    }
}
