//! Requests of a hostile client, sent while other clients are served.

use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::time::Duration;

use crate::support::cluster::{Cluster, Setup};
use crate::support::http_client::{Conn, LAST_CHUNK, find, head};
use crate::support::random::seeded_rng;

/// The master's peak memory must stay below this, in MiB.
const MEMORY: u64 = 256;

const UPLOADS: usize = 64;
const VALUE: usize = 1 << 20;

/// Bytes after a request that become a second request if the server gets the framing wrong.
const SMUGGLED: &str = "PUT /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nbad";

/// What a client sends, and which statuses are allowed. No answer at all is always allowed.
struct Attack {
    bytes: Vec<u8>,
    allowed: fn(u16) -> bool,
}

fn is_client_error(status: u16) -> bool {
    (400..500).contains(&status) || status == 505
}

/// For requests that are odd but unambiguous.
fn is_not_server_error(status: u16) -> bool {
    (200..500).contains(&status)
}

/// A request that begins with this head must be refused. What follows must never be taken for a
/// request.
fn attack(head: impl AsRef<[u8]>) -> Attack {
    let bytes = [head.as_ref(), SMUGGLED.as_bytes()].concat();
    Attack { bytes, allowed: is_client_error }
}

fn bad_lengths() -> Vec<Attack> {
    let mut attacks = Vec::new();
    for length in
        ["1000000000000", "9223372036854775807", "18446744073709551615", "100000000000000000000000", "-1", "abc", "3\0"]
    {
        let header = [("Content-Length", length)];
        for (method, target) in [
            ("PUT", "/stored"),
            ("REPLACE", "/stored"),
            ("GET", "/stored"),
            ("HEAD", "/stored"),
            ("DELETE", "/stored"),
            ("GET", "/?list"),
            ("OPTIONS", "*"),
            ("PATCH", "/stored"),
        ] {
            attacks.push(attack(head(method, target, &header)));
        }
        let expects = [header[0], ("Expect", "100-continue")];
        attacks.push(attack(head("GET", "/stored", &expects)));
    }
    attacks
}

fn bad_framings() -> Vec<Attack> {
    let chunk = format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len());
    let long = SMUGGLED.len().to_string();
    let mut attacks = Vec::new();
    for headers in [
        "Content-Length: 3\r\nContent-Length: 300".into(),
        "Content-Length: 300\r\nContent-Length: 3".into(),
        "Content-Length: 3, 300".into(),
        // CL.TE, TE.CL, TE.TE.
        format!("Content-Length: {long}\r\nTransfer-Encoding: chunked"),
        "Transfer-Encoding: chunked\r\nContent-Length: 3".into(),
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity".into(),
        "Transfer-Encoding: xchunked".into(),
        "Transfer-Encoding: chunked, chunked".into(),
        "Transfer-Encoding: \"chunked\"".into(),
        "Transfer-Encoding: chunked\0".into(),
        "Transfer-Encoding : chunked".into(),
        "Transfer-Encoding\t: chunked".into(),
        "Transfer-Encoding\0: chunked".into(),
        "Content-Length : 3".into(),
        // Folded lines.
        format!("Content-Length:\r\n {long}"),
        "Transfer-Encoding:\r\n chunked".into(),
        "Transfer-Encoding: chunked,\r\n\tidentity".into(),
        "Content-Length: 3\r\n Transfer-Encoding: chunked".into(),
        " : x".into(),
        // Headers that exist only for a parser that ends lines at a bare LF, CR or NUL.
        format!("X: y\nContent-Length: {long}"),
        format!("X: y\rContent-Length: {long}"),
        format!("X: y\0Content-Length: {long}"),
        "X: y\nTransfer-Encoding: chunked".into(),
        format!("X\nContent-Length: {long}"),
        ": no name".into(),
        "no colon".into(),
    ] {
        for method in ["PUT", "GET"] {
            let request = format!("{method} /stored HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n");
            attacks.push(attack(&request));
            attacks.push(attack(request + &chunk));
        }
    }
    attacks.push(attack(format!("PUT /stored HTTP/1.1\nContent-Length: {long}\n\n")));
    attacks.push(attack(
        "PUT /stored HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nbad\r\n0\r\n\r\n",
    ));
    attacks
}

fn bad_chunks() -> Vec<Attack> {
    let sizes = ["zz", "-3", "0x3", "", " ", "3 3", "3\0", "ffffffffffffffff", "10000000000"];
    let head = head("PUT", "/stored", &[("Transfer-Encoding", "chunked")]);
    let mut attacks: Vec<Attack> =
        sizes.iter().map(|size| attack([&head, format!("{size}\r\nbad\r\n0\r\n\r\n").as_bytes()].concat())).collect();
    for body in ["3\r\nbadX\r\n0\r\n\r\n", "3\r\nbad0\r\n\r\n", "5\r\nbad\r\n0\r\n\r\n", "3\nbad\n0\n\n"] {
        attacks.push(attack([&head, body.as_bytes()].concat()));
    }
    attacks
}

fn bad_request_lines() -> Vec<Attack> {
    let mut attacks: Vec<Attack> = [
        b"\r\n\r\n".as_slice(),
        b"PUT\r\n\r\n",
        b"PUT /stored\r\n\r\n",
        b"PUT /stored HTTP/1.2\r\n\r\n",
        b"PUT  /stored HTTP/1.1\r\n\r\n",
        b"PUT /stored\0 HTTP/1.1\r\nContent-Length: 57\r\n\r\n",
        b"PUT /sto\nred HTTP/1.1\r\nContent-Length: 57\r\n\r\n",
        b"P\0T /stored HTTP/1.1\r\nContent-Length: 57\r\n\r\n",
        b"PUT /\xc3\x28 HTTP/1.1\r\nContent-Length: 57\r\n\r\n",
        b"PUT /%zz HTTP/1.1\r\nContent-Length: 57\r\n\r\n",
        b"PUT /% HTTP/1.1\r\nContent-Length: 57\r\n\r\n",
        b"PUT * HTTP/1.1\r\nContent-Length: 57\r\n\r\n",
        b"PUT /stored HTTP/1.1\r\nX: \xff\r\nContent-Length: 57\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ]
    .into_iter()
    .map(attack)
    .collect();
    // Unfinished or oversized heads. The master itself does not limit them.
    let long = "a".repeat(1 << 20);
    let many = "X: y\r\n".repeat(100_000);
    for request in [
        format!("GET /{long} HTTP/1.1\r\n\r\n"),
        format!("GET /stored HTTP/1.1\r\nX: {long}\r\n\r\n"),
        format!("GET /stored HTTP/1.1\r\n{long}: y\r\n\r\n"),
        format!("GET /stored HTTP/1.1\r\n{many}\r\n"),
        format!("GET /stored HTTP/1.1\r\n{many}"),
        long,
    ] {
        attacks.push(Attack { bytes: request.into(), allowed: is_client_error });
    }
    attacks
}

fn odd_but_valid() -> Vec<Attack> {
    let body = ("Content-Length", "5");
    let mut many = Vec::new();
    for _ in 0..500 {
        many.extend(head("GET", "/stored", &[]));
        many.extend(head("GET", "/stored", &[body]));
        many.extend(b"GET /");
    }
    let chunked = head("GET", "/stored", &[("Transfer-Encoding", "chunked")]);
    [many, [&head("DELETE", "/stored", &[body]), b"GET /".as_slice()].concat(), [&chunked, LAST_CHUNK].concat()]
        .map(|bytes| Attack { bytes, allowed: is_not_server_error })
        .into()
}

/// Sends an attack and checks the answers. With `open`, the client waits for the answer before it
/// shuts down its sending side.
#[track_caller]
fn send_attack(c: &Cluster, attack: &Attack, open: bool) {
    let shown = attack.bytes[..attack.bytes.len().min(300)].escape_ascii().to_string();
    let mut conn = c.conn();
    // The master may close before it has read everything.
    let _ = conn.try_send(&attack.bytes);
    if open {
        conn.readable(Duration::from_millis(20));
    }
    let _ = conn.socket.shutdown(Shutdown::Write);
    let mut answers = Vec::new();
    if let Err(e) = conn.socket.read_to_end(&mut answers) {
        assert_eq!(e.kind(), ErrorKind::ConnectionReset, "{shown}: the connection stays open: {e}");
    }
    let mut rest = answers.as_slice();
    while let Some(at) = find(rest, b"HTTP/1.1 ") {
        let status = String::from_utf8_lossy(&rest[at + 9..rest.len().min(at + 12)]).into_owned();
        let fits = status.parse().is_ok_and(attack.allowed);
        assert!(fits, "{shown}: {}", answers.escape_ascii());
        rest = &rest[at + 9..];
    }
}

/// Uploads in progress, which send a few bytes now and then.
struct Uploads {
    conns: Vec<Conn>,
    value: Vec<u8>,
    sent: usize,
}

impl Uploads {
    fn start(c: &Cluster) -> Uploads {
        let mut value = vec![0; VALUE];
        fastrand::Rng::with_seed(1).fill(&mut value);
        let length = VALUE.to_string();
        let begin = |n| {
            let mut conn = c.conn();
            conn.head("PUT", &format!("/upload/{n}"), &[("Content-Length", &length)]);
            conn
        };
        Uploads { conns: (0..UPLOADS).map(begin).collect(), value, sent: 0 }
    }

    fn send_more(&mut self, bytes: usize) {
        let end = VALUE.min(self.sent + bytes);
        for conn in &mut self.conns {
            conn.send(&self.value[self.sent..end]);
        }
        self.sent = end;
    }

    fn finish(mut self, c: &Cluster) {
        self.send_more(VALUE);
        for (n, conn) in self.conns.iter_mut().enumerate() {
            conn.answer().expect(201);
            c.assert_value(format!("/upload/{n}"), &self.value);
        }
    }
}

#[test]
fn hostile_requests_do_not_harm_other_clients() {
    let mut random = seeded_rng();
    let c = Setup::new().start();
    c.put("/there", "value").expect(201);
    let mut uploads = Uploads::start(&c);
    let groups = [bad_lengths(), bad_framings(), bad_chunks(), bad_request_lines(), odd_but_valid()];
    let attacks: Vec<Attack> = groups.into_iter().flatten().collect();
    for (n, attack) in attacks.iter().enumerate() {
        for open in [true, false] {
            send_attack(&c, attack, open);
        }
        let request = attack.bytes[..attack.bytes.len().min(300)].escape_ascii();
        assert_eq!(c.get("/smuggled").status, 404, "{request}");
        if n % 8 == 0 {
            uploads.send_more(VALUE / 64);
            assert_eq!(c.live(), [b"/there"]);
        }
    }
    c.get("/stored").expect(404);
    assert_eq!(c.live(), [b"/there"]);
    // The same with random bytes changed. The right answer is then unknown, but it is never a 500.
    for attack in &attacks {
        let mut bytes = attack.bytes.clone();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..bytes.len().min(200));
            bytes[at] = random.u8(..);
        }
        send_attack(&c, &Attack { bytes, allowed: |status| status != 500 }, false);
    }
    c.assert_value("/there", "value");
    uploads.finish(&c);
    println!("{} attacks, peak memory {} MiB", attacks.len() * 3, (c.memory_kib("VmHWM") >> 10));
    assert!((c.memory_kib("VmHWM") >> 10) < MEMORY, "{} MiB", (c.memory_kib("VmHWM") >> 10));
    c.put("/next", "value").expect(201);
    c.assert_value("/next", "value");
}
