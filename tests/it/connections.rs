//! Connections: clients that do not read, bursts, resource limits, idle clients.

use std::fs;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};

use crate::support::cluster::{Cluster, Setup};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Conn, head, wait_at_most, wait_until};
use crate::support::random::{random_bytes, seeded_rng};

/// Opens a connection that buffers little: the client's receive buffer is minimal, and a small
/// segment size keeps the server's send buffer small.
fn connect_with_small_buffers(c: &Cluster, packet: u32) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(1).unwrap();
    socket.set_tcp_mss(packet).unwrap();
    let address: SocketAddr = c.address().parse().unwrap();
    socket.connect(&address.into()).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.into()
}

/// Requests sent without a pause, fewer than the master queues for one connection.
const BATCH: usize = 8;

/// A client that sends requests and never reads the answers.
struct NonReader {
    socket: TcpStream,
    request: Vec<u8>,
    unsent: Vec<u8>,
    sent: usize,
    closed: bool,
}

impl NonReader {
    fn new(c: &Cluster, packet: u32, method: &str, target: &str) -> NonReader {
        let (socket, request) = (connect_with_small_buffers(c, packet), head(method, target, &[]));
        NonReader { socket, request, unsent: Vec::new(), sent: 0, closed: false }
    }

    fn send_batch(&mut self) {
        if self.unsent.is_empty() {
            self.unsent = self.request.repeat(BATCH);
            self.sent += BATCH;
        }
        match self.socket.write(&self.unsent) {
            Ok(n) => drop(self.unsent.drain(..n)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            // The server closes with unread requests pending, which resets the connection.
            Err(e) if [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&e.kind()) => {
                self.closed = true;
            }
            Err(e) => panic!("after {} requests: {e}", self.sent),
        }
    }
}

/// Other clients meanwhile, on a kept connection and on new ones.
struct OtherClients {
    keep_alive: Conn,
    slowest: Duration,
}

impl OtherClients {
    fn new(c: &Cluster) -> OtherClients {
        OtherClients { keep_alive: c.conn(), slowest: Duration::ZERO }
    }

    #[track_caller]
    fn assert_served(&mut self, c: &Cluster) {
        for (method, key, status) in [("GET", "/there", 302), ("GET", "/none", 404), ("UNLINK", "/none", 404)] {
            let started = Instant::now();
            self.keep_alive.ask(method, key, &[], None).expect(status);
            self.slowest = self.slowest.max(started.elapsed());
            let started = Instant::now();
            c.ask(method, key).expect(status);
            self.slowest = self.slowest.max(started.elapsed());
        }
        assert!(self.slowest < Duration::from_secs(3), "other clients waited for {:?}", self.slowest);
    }
}

/// The master answers such a client until all buffers are full, then stops reading its requests,
/// and at last closes the connection.
#[test]
fn clients_that_never_read_do_not_delay_others() {
    // Keys of the maximum length have the longest answers.
    let long = |first: &str| format!("/{first}{}", "k".repeat(1000));
    let c = Setup::new().volumes(1).flags(&["-stalltimeout", "1s"]).start();
    c.put("/there", "value").expect(201);
    c.put(long("there"), "value").expect(201);
    let requests = [("GET", long("none")), ("GET", long("there")), ("UNLINK", long("none"))];
    let mut others = OtherClients::new(&c);
    for packet in [88, 536, 32_000] {
        // How many requests of each kind the master accepts before it closes.
        let max_requests = requests.each_ref().map(|(method, key)| {
            let mut client = NonReader::new(&c, packet, method, key);
            while !client.closed {
                client.send_batch();
                others.assert_served(&c);
                assert!(client.sent < 50_000, "{method}: the master never stops reading");
            }
            client.sent
        });
        // Clients that send slightly less: their connections stay open.
        let mut clients: Vec<_> = (0..30)
            .map(|n| (max_requests[n % 3], NonReader::new(&c, packet, requests[n % 3].0, &requests[n % 3].1)))
            .collect();
        for _ in 0..max_requests.iter().max().unwrap() / BATCH {
            for (max_requests, client) in &mut clients {
                if client.sent + 4 * BATCH < *max_requests && !client.closed {
                    client.send_batch();
                }
            }
            others.assert_served(&c);
        }
        let closed = clients.iter().filter(|(_, client)| client.closed).count();
        println!("segments of {packet} bytes: closed after {max_requests:?} requests, {closed} of 30 closed early");
    }
    println!("other clients waited for at most {:?}", others.slowest);
}

/// Opens this many connections, sends a request on each, and returns the longest wait.
#[track_caller]
pub fn burst(c: &Cluster, count: usize) -> (Vec<Conn>, Duration) {
    let mut conns: Vec<(Instant, Conn)> = (0..count)
        .map(|_| {
            let started = Instant::now();
            let mut conn = c.conn();
            conn.head("GET", "/none", &[]);
            (started, conn)
        })
        .collect();
    let wait = |(started, conn): &mut (Instant, Conn)| {
        conn.answer().expect(404);
        started.elapsed()
    };
    let worst = conns.iter_mut().map(wait).max().unwrap_or_default();
    (conns.into_iter().map(|(_, conn)| conn).collect(), worst)
}

#[test]
fn every_connection_of_a_burst_is_answered_within_250_ms() {
    let mut c = Setup::new().volumes(1).start();
    for count in [16, 50, 100, 200] {
        // A busy machine may delay a few of them, but not on four servers in a row.
        let mut servers = Vec::new();
        while servers.len() < 4 && servers.iter().all(|worst| *worst >= Duration::from_millis(250)) {
            c.restart_master();
            let mut held = Vec::new();
            let rounds = (0..6).map(|round| {
                let (conns, worst) = burst(&c, count);
                if round % 2 == 0 {
                    held.extend(conns);
                }
                worst
            });
            servers.push(rounds.max().unwrap_or_default());
            for conn in &mut held {
                conn.ask("GET", "/none", &[], None).expect(404);
            }
        }
        println!("{count} at once: {servers:?}");
        let best = servers.iter().min().unwrap();
        assert!(*best < Duration::from_millis(250), "{count} at once: {servers:?}");
    }
}

/// Sets a soft limit of the master process. prlimit must run as the master's user.
#[track_caller]
pub fn set_limit(c: &Cluster, user: Option<&str>, limit: &str) {
    let pid = c.master_pid().to_string();
    let set = ["prlimit", "--pid", &pid, limit];
    let mut command = Command::new(if user.is_some() { "setpriv" } else { set[0] });
    match user {
        Some(user) => command.args(["--reuid", user, "--regid", user, "--clear-groups"]).args(set),
        None => command.args(&set[1..]),
    };
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// More descriptors for the test itself than a shell gives.
pub fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
}

/// Opens connections one after the other and sends a request on each, as far as the server lets it.
fn open_many(c: &Cluster, count: usize) -> Vec<Conn> {
    let open = |_| {
        let mut conn = c.conn();
        let _ = conn.try_send(&head("GET", "/none", &[]));
        conn
    };
    (0..count).map(open).collect()
}

/// Measures how long it takes until five new connections in a row are answered.
#[track_caller]
fn time_until_answered(c: &Cluster) -> Duration {
    let started = Instant::now();
    let answered = || {
        let Ok(mut conn) = Conn::try_open(&c.address()) else { return false };
        conn.try_send(&head("GET", "/none", &[])).is_ok()
            && conn.readable(Duration::from_millis(200))
            && matches!(conn.next_answer("GET"), Ok(Some(answer)) if answer.status == 404)
    };
    wait_at_most(Duration::from_secs(2), "new connections are answered again", || (0..5).all(|_| answered()));
    started.elapsed()
}

#[test]
fn the_master_recovers_when_descriptors_are_free_again() {
    let c = Setup::new().volumes(1).start();
    c.put("/k", "value").expect(201);
    set_limit(&c, None, "--nofile=200:");
    for round in 0..5 {
        // An existing connection is served throughout.
        let mut keep_alive = c.conn();
        keep_alive.ask("GET", "/none", &[], None).expect(404);
        // An odd count in every second round: one connection then gets the last descriptor but not
        // the two that it needs.
        let conns = open_many(&c, 400 + round % 2);
        wait_until("all descriptors are in use", || c.open_descriptors() >= 198);
        for _ in 0..20 {
            keep_alive.ask("GET", "/none", &[], None).expect(404);
        }
        drop(conns);
        println!("round {round}: {:?}", time_until_answered(&c));
    }
    c.put("/after", "value").expect(201);
}

#[test]
fn the_master_recovers_when_threads_are_available_again() {
    // The limit does not apply to root. Keep root's access to the tests' folders.
    let user = (100_000 + fastrand::u32(..1_000_000_000)).to_string();
    let user = rustix::process::geteuid().is_root().then_some(user.as_str());
    let mut setup = Setup::new().volumes(1);
    if let Some(user) = user {
        let other = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"];
        let caps = ["--inh-caps", "-all,+dac_override", "--ambient-caps", "-all,+dac_override"];
        setup = setup.launcher(&[&other[..], &caps, &["--pdeathsig", "KILL", "--"]].concat());
    }
    let c = setup.start();
    c.put("/k", "value").expect(201);
    for round in 0..4 {
        let mut keep_alive = c.conn();
        keep_alive.ask("GET", "/none", &[], None).expect(404);
        set_limit(&c, user, "--nproc=1:");
        let conns = open_many(&c, 100);
        wait_until("no thread can be started", || c.log().matches("no thread can be started").count() > round);
        for _ in 0..20 {
            keep_alive.ask("GET", "/none", &[], None).expect(404);
        }
        // Lift the limit at different times after the failure, up to the longest retry interval.
        std::thread::sleep(Duration::from_secs([0, 1, 3, 7][round]));
        set_limit(&c, user, "--nproc=1000:");
        println!("round {round}: {:?}", time_until_answered(&c));
        drop(conns);
    }
    c.put("/after", "value").expect(201);
}

#[test]
fn the_master_raises_its_descriptor_limit_to_the_hard_limit() {
    let c = Setup::new().volumes(1).launcher(&["prlimit", "--nofile=64:1000", "--"]).start();
    let limits = fs::read_to_string(format!("/proc/{}/limits", c.master_pid())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let numbers: Vec<_> = line.split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers, ["1000", "1000"], "{line}");
}

#[test]
fn connections_above_maxconns_get_503_and_the_others_continue() {
    let c = Setup::new().volumes(1).flags(&["-maxconns", "100"]).start();
    let (mut served, mut refused) = (Vec::new(), 0);
    let connect = || {
        let mut conn = c.conn();
        let _ = conn.try_send(&head("GET", "/none", &[]));
        match conn.next_answer("GET") {
            Ok(Some(answer)) if answer.status == 404 => return Some(conn),
            Ok(Some(answer)) => drop(answer.expect_error(503, "connections")),
            Ok(None) => {}
            Err(why) => panic!("{why}"),
        }
        conn.read_until_closed();
        None
    };
    while refused < 50 {
        match connect() {
            Some(conn) => served.push(conn),
            None => refused += 1,
        }
    }
    // The master opens connections to itself now and then.
    assert!((95..=100).contains(&served.len()), "{} connections are served", served.len());
    for _ in 0..10 {
        // A connection without a request is closed too.
        c.conn().read_until_closed();
    }
    for conn in &mut served {
        conn.ask("GET", "/none", &[], None).expect(404);
    }
    served.truncate(30);
    wait_until("a connection is accepted again", || connect().is_some());
}

#[test]
fn closed_connections_do_not_count_towards_maxconns() {
    let c = Setup::new().volumes(1).flags(&["-maxconns", "60"]).start();
    for _ in 0..1000 {
        c.get("/none").expect(404);
    }
}

/// Time on the processor, in ticks of 10 ms.
pub fn cpu_ticks(c: &Cluster) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", c.master_pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn two_thousand_idle_connections_use_little_memory_and_delay_nobody() {
    raise_descriptor_limit();
    let c = Setup::new().volumes(1).start();
    let before = c.memory_kib("VmRSS");
    let mut idle: Vec<Conn> = (0..2000).map(|_| c.conn()).collect();
    for conn in idle.iter_mut().step_by(2) {
        conn.ask("GET", "/none", &[], None).expect(404);
    }
    wait_until("all are accepted", || c.open_descriptors() > 2000);
    let each = c.memory_kib("VmRSS").saturating_sub(before) / 2000;
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        let started = Instant::now();
        c.get("/none").expect(404);
        slowest = slowest.max(started.elapsed());
    }
    let started = cpu_ticks(&c);
    std::thread::sleep(Duration::from_secs(3));
    let used = cpu_ticks(&c) - started;
    println!("{each} KiB each, new ones wait {slowest:?} at most, {used} ticks in 3 s");
    assert!(slowest < Duration::from_secs(1), "a new connection waited {slowest:?}");
    assert!(used < 3, "{used} ticks in 3 s");
    assert!(each < 40, "{each} KiB for each connection");
    for conn in &mut idle {
        conn.ask("GET", "/none", &[], None).expect(404);
    }
}

#[test]
fn what_makes_no_progress_is_closed() {
    let c = Setup::new().volumes(1).flags(&["-idletimeout", "3s", "-stalltimeout", "3s"]).start();
    let open = || {
        let conn = c.conn();
        conn.socket.set_read_timeout(Some(Duration::from_secs(100))).unwrap();
        conn
    };
    let silent = open();
    let mut idle = open();
    idle.ask("GET", "/none", &[], None).expect(404);
    let mut length = open();
    length.head("PUT", "/length", &[("Content-Length", "600000")]).send([b'v'; 300_000]);
    let mut chunked = open();
    chunked.head("PUT", "/chunked", &[("Transfer-Encoding", "chunked")]).send("9\r\nhalf");
    let mut dribble = open();
    dribble.head("PUT", "/dribble", &[("Content-Length", "600000")]).send("d");
    let mut busy = open();
    wait_until("all uploads have begun", || c.keys_with_debris().len() == 3);
    let started = Instant::now();
    std::thread::scope(|scope| {
        for mut conn in [silent, idle, length, chunked] {
            scope.spawn(move || {
                let last = conn.read_until_closed();
                let after = started.elapsed();
                println!("{after:?}: {}", String::from_utf8_lossy(&last).lines().next().unwrap_or("closed"));
                assert!((2900..6000).contains(&after.as_millis()), "closed after {after:?}");
            });
        }
        // This client sends one byte a second.
        scope.spawn(move || {
            while !dribble.readable(Duration::from_secs(1)) {
                dribble.send("d");
                assert!(started.elapsed() < Duration::from_secs(8), "it goes on");
            }
            assert!(started.elapsed() > Duration::from_secs(2));
        });
        // One that asks now and then, for longer than that.
        for _ in 0..7 {
            std::thread::sleep(Duration::from_millis(700));
            busy.ask("GET", "/none", &[], None).expect(404);
        }
    });
    for key in ["/length", "/chunked", "/dribble"] {
        c.assert_absent(key);
        c.put(key, "value").expect(201);
        c.assert_value(key, "value");
    }
}

/// If each request were answered in the call that answered the previous one, 60 of them would need
/// 300 KiB of stack, on the thread that serves all volumes.
#[test]
fn pipelined_requests_do_not_grow_the_stack() {
    let small = ["env", "RUST_MIN_STACK=200000"];
    let c = Setup::new().volumes(1).proxied().launcher(&small).start();
    c.put("/there", "value").expect(201);
    c.proxies[0].set("HEAD", Fault::Delay(Duration::from_millis(500)));
    let mut conn = c.conn();
    conn.send([head("GET", "/there", &[]), head("GET", "/none", &[]).repeat(60)].concat());
    conn.answer().expect(302);
    (0..60).for_each(|_| drop(conn.answer().expect(404)));
}

#[test]
fn a_head_that_takes_too_long_ends_its_connection() {
    let c = Setup::new().volumes(1).flags(&["-headtimeout", "3s"]).start();
    let (mut first, mut later, mut upload) = (c.conn(), c.conn(), c.conn());
    later.ask("GET", "/none", &[], None).expect(404);
    let begin = "GET /none HTTP/1.1\r\nDribble: ";
    let mut heads = vec![first.send(begin), later.send(begin)];
    // An upload may take longer.
    let value = random_bytes(&mut seeded_rng(), 6 << 10);
    upload.head("PUT", "/slow", &[("Content-Length", &value.len().to_string())]);
    let started = Instant::now();
    for (part, second) in value.chunks(1 << 10).zip(1..) {
        std::thread::sleep(Duration::from_secs(second).saturating_sub(started.elapsed()));
        upload.send(part);
        heads.retain_mut(|head| {
            let closed = head.readable(Duration::ZERO) || head.try_send(b"d").is_err();
            assert!(!closed || second >= 3, "closed after {second} s");
            !closed
        });
    }
    assert!(heads.is_empty(), "{} of two heads go on for more than 6 s", heads.len());
    upload.answer().expect(201);
    c.assert_value("/slow", value);
}
