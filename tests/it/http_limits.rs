//! The limits of the HTTP server: what is too long, too slow, too much or malformed, and what it costs.

use std::time::{Duration, Instant};

use crate::connections::{burst, cpu_ticks, raise_descriptor_limit, set_limit};
use crate::support::cluster::{Cluster, Setup};
use crate::support::http_client::{Conn, head, wait_at_most, wait_until};

fn start(flags: &[&str]) -> Cluster {
    Setup::new().volumes(1).flags(flags).start()
}

/// The request is refused with this status, and its connection ends.
#[track_caller]
fn is_refused(c: &Cluster, request: impl AsRef<[u8]>, status: u16) {
    let mut conn = c.conn();
    // The server may close before it has all of it.
    let _ = conn.try_send(request.as_ref());
    let answer = conn.answer().expect_error(status, " ");
    assert_eq!(answer.header("Connection"), Some("close"));
    assert!(conn.read_until_closed().is_empty());
}

#[test]
fn a_head_has_64_kib_and_100_fields_at_most() {
    let c = start(&[]);
    // "X: ", CRLF and the empty line.
    let begin = "GET /none HTTP/1.1\r\nHost: x\r\nX: ";
    let value = |length: usize| "y".repeat(length - begin.len() - 4);
    let with = |value: &str| format!("{begin}{value}\r\n\r\n");
    c.conn().send(with(&value(64 << 10))).answer().expect(404);
    is_refused(&c, with(&value((64 << 10) + 1)), 431);
    is_refused(&c, with(&value(1 << 20)), 431);
    let fields = |count: usize| format!("{begin}y\r\n{}\r\n", "X: y\r\n".repeat(count - 2));
    c.conn().send(fields(100)).answer().expect(404);
    is_refused(&c, fields(101), 431);
    is_refused(&c, format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(70_000)), 431);
}

#[test]
fn other_versions_than_1_0_and_1_1_are_refused() {
    let c = start(&[]);
    for version in ["2.0", "1.2", "3.0", "0.9"] {
        is_refused(&c, format!("GET /none HTTP/{version}\r\nHost: x\r\n\r\n"), 505);
    }
    for version in ["HTTP/1.15", "HTTP/11", "HTTP/1", "http/1.1", "HTTP/a.b", "H", ""] {
        is_refused(&c, format!("GET /none {version}\r\nHost: x\r\n\r\n"), 400);
    }
}

#[test]
fn a_head_that_is_not_complete_in_time_gets_408() {
    let c = start(&["-headtimeout", "300ms", "-idletimeout", "800ms"]);
    let (mut silent, mut idle, mut started, mut dribble) = (c.conn(), c.conn(), c.conn(), c.conn());
    idle.ask("GET", "/none", &[], None).expect(404);
    started.send("GET /none HTTP/1.1\r\nHo");
    let start = Instant::now();
    for byte in head("GET", "/none", &[("X", "0123456789012345678901234567890")]) {
        if dribble.readable(Duration::from_millis(20)) {
            break;
        }
        let _ = dribble.try_send(&[byte]);
    }
    for conn in [&mut started, &mut dribble] {
        conn.answer().expect_error(408, "time");
        conn.read_until_closed();
    }
    assert!((290..2000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    // What has said nothing is told nothing.
    assert!(silent.read_until_closed().is_empty() && idle.read_until_closed().is_empty());
    assert!((790..2500).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
}

#[test]
fn a_body_or_a_reader_that_stalls_ends_its_connection() {
    let c = start(&["-stalltimeout", "400ms"]);
    let started = Instant::now();
    for (header, sent) in [
        (("Content-Length", "5000"), ""),
        (("Content-Length", "5000"), "started"),
        (("Transfer-Encoding", "chunked"), ""),
        (("Transfer-Encoding", "chunked"), "5"),
        (("Transfer-Encoding", "chunked"), "5\r\nval"),
        (("Transfer-Encoding", "chunked"), "5\r\nvalue\r\n0\r\nX-Trail"),
    ] {
        let mut conn = c.conn();
        conn.head("PUT", "/k", &[header]).send(sent);
        conn.answer().expect_error(400, "1 KiB");
        conn.read_until_closed();
        c.assert_absent("/k");
    }
    // A chunk's size line, byte by byte.
    let mut dribble = c.conn();
    dribble.head("PUT", "/k", &[("Transfer-Encoding", "chunked")]).send("5;");
    while !dribble.readable(Duration::from_millis(50)) {
        let _ = dribble.try_send(b"x");
    }
    dribble.answer().expect_error(400, "1 KiB");
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    // One that is slow, but makes progress.
    let mut slow = c.conn();
    slow.head("PUT", "/slow", &[("Content-Length", "12000")]);
    for _ in 0..10 {
        slow.send([b'v'; 1200]);
        std::thread::sleep(Duration::from_millis(100));
    }
    slow.answer().expect(201);
    c.assert_value("/slow", [b'v'; 12000]);
}

#[test]
fn chunks_are_read_as_the_grammar_has_them() {
    let c = start(&[]);
    let put = |body: &str| {
        let mut conn = c.conn();
        conn.head("PUT", "/k", &[("Transfer-Encoding", "chunked")]).send(body);
        let status = conn.answer().status;
        let next = (status < 300).then(|| conn.ask("GET", "/none", &[], None).status);
        assert_eq!(next, (status < 300).then_some(404), "{body:?}: the next request");
        status
    };
    let ext = "x".repeat(256 - 4);
    for body in [
        "5\r\nvalue\r\n0\r\n\r\n",
        "0005\r\nvalue\r\n0000\r\n\r\n",
        "5;a;b=c;d=\"e\"\r\nvalue\r\n0\r\n\r\n",
        "5 ; a = b\r\nvalue\r\n0\r\n\r\n",
        &format!("5;{ext}\r\nvalue\r\n0\r\n\r\n"),
        "2\r\nva\r\n3\r\nlue\r\n0\r\nX-Trailer: y\r\nAnd: another\r\n\r\n",
        &format!("5\r\nvalue\r\n0\r\n{}\r\n", "X: y\r\n".repeat(100)),
    ] {
        assert_eq!(put(body), 201, "{body:?}");
        c.assert_value("/k", "value");
        c.ask("DELETE", "/k").expect(204);
    }
    for body in [
        "5 \r\nvalue\r\n0\r\n\r\n",
        "5\nvalue\r\n0\r\n\r\n",
        "5;\nvalue\r\n0\r\n\r\n",
        "5;\0\r\nvalue\r\n0\r\n\r\n",
        &format!("5;{ext}x\r\nvalue\r\n0\r\n\r\n"),
        "5\r\nvalue\r\n0\r\nno trailer\r\n\r\n",
        "5\r\nvalue\r\n0\r\nX: y\r\n folded\r\n\r\n",
        "5\r\nvalue\r\n0\r\nX: y\n\n",
        &format!("5\r\nvalue\r\n0\r\n{}\r\n", "X: y\r\n".repeat(101)),
        &format!("5\r\nvalue\r\n0\r\nX: {}\r\n\r\n", "y".repeat(64 << 10)),
    ] {
        assert_eq!(put(body), 400, "{body:?}");
    }
    c.assert_absent("/k");
}

#[test]
fn http_1_1_needs_one_host() {
    let c = start(&[]);
    is_refused(&c, "GET /none HTTP/1.1\r\n\r\n", 400);
    is_refused(&c, "GET /none HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400);
    is_refused(&c, "GET /none HTTP/1.1\r\nHost: x y\r\n\r\n", 400);
    c.conn().send("GET /none HTTP/1.0\r\n\r\n").answer().expect(404);
    for host in ["x", "x:3000", "[::1]:3000", "127.0.0.1", "a_b.example"] {
        c.conn().send(format!("GET /none HTTP/1.1\r\nHost: {host}\r\n\r\n")).answer().expect(404);
    }
}

#[test]
fn one_empty_line_before_a_request_is_ignored() {
    let c = start(&[]);
    let mut conn = c.conn();
    for _ in 0..3 {
        conn.send("\r\n").send(head("GET", "/none", &[])).answer().expect(404);
    }
    is_refused(&c, "\r\n\r\nGET /none HTTP/1.1\r\nHost: x\r\n\r\n", 400);
    is_refused(&c, "\nGET /none HTTP/1.1\r\nHost: x\r\n\r\n", 400);
    // TLS, which has no line at all.
    is_refused(&c, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400);
}

#[test]
fn http_1_0_keeps_a_connection_where_the_client_asks_for_it() {
    let c = start(&[]);
    let mut conn = c.conn();
    for _ in 0..3 {
        conn.send("GET /none HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
        assert_eq!(conn.answer().expect(404).header("Connection"), Some("keep-alive"));
    }
}

#[test]
fn a_client_is_told_to_continue_only_where_its_body_is_wanted() {
    let c = start(&[]);
    let expect = ("Expect", "100-continue");
    for length in [("Content-Length", "5"), ("Transfer-Encoding", "chunked")] {
        let body: &[u8] = if length.1 == "5" { b"value" } else { b"5\r\nvalue\r\n0\r\n\r\n" };
        let mut conn = c.conn();
        conn.head("REPLACE", "/k", &[length, expect]);
        assert_eq!(conn.next_answer("PUT").unwrap().unwrap().status, 100);
        conn.send(body).answer().expect(201);
        conn.ask("GET", "/k", &[], None).expect(302);
        // Refused: the client sends no body, so the connection cannot go on.
        let mut conn = c.conn();
        conn.head("PUT", "/k", &[length, expect]);
        let answer = conn.next_answer("PUT").unwrap().unwrap().expect_error(403, "exists");
        assert_eq!(answer.header("Connection"), Some("close"));
        assert!(conn.shutdown_write().read_until_closed().is_empty());
        // A client that did not wait.
        let mut conn = c.conn();
        conn.send([&head("REPLACE", "/k", &[length, expect]), body].concat());
        conn.answer().expect(201);
        conn.ask("GET", "/k", &[], None).expect(302);
    }
    c.conn().ask("REPLACE", "/k", &[("Expect", "something")], Some(b"other")).expect(201);
    c.assert_value("/k", "other");
}

#[test]
fn a_small_body_that_is_not_wanted_does_not_end_the_connection() {
    let c = start(&[]);
    c.put("/k", "value").expect(201);
    let mut conn = c.conn();
    for length in [1, 5, 1000] {
        conn.ask("GET", "/k", &[], Some(&vec![b'v'; length])).expect(302);
        conn.ask("UNLINK", "/k", &[], Some(&vec![b'v'; length])).expect(204);
        conn.ask("RELINK", "/k", &[], Some(&vec![b'v'; length])).expect(204);
        conn.ask("PUT", "/k", &[], Some(&vec![b'v'; length * 50])).expect(403);
    }
}

#[test]
fn a_hundred_thousand_pipelined_requests_need_no_memory() {
    let c = start(&[]);
    c.put("/there", "value").expect(201);
    let mut conn = c.conn();
    conn.ask("GET", "/there", &[], None).expect(302);
    let before = c.memory_kib("VmHWM");
    let mut sender = conn.socket.try_clone().unwrap();
    let batch = [head("GET", "/none", &[]).repeat(99), head("GET", "/?list", &[])].concat();
    let sending = std::thread::spawn(move || {
        (0..1000).for_each(|_| std::io::Write::write_all(&mut sender, &batch).unwrap());
    });
    for _ in 0..1000 {
        (0..99).for_each(|_| drop(conn.answer().expect(404)));
        conn.answer().expect(200);
    }
    sending.join().unwrap();
    let more = c.memory_kib("VmHWM") - before;
    assert!(more < 2 << 10, "{more} KiB");
}

#[test]
fn connections_above_maxconns_disturb_nobody() {
    raise_descriptor_limit();
    let c = start(&["-maxconns", "20"]);
    let mut there: Vec<Conn> = (0..20).map(|_| c.conn()).collect();
    for conn in &mut there {
        conn.ask("GET", "/none", &[], None).expect(404);
    }
    let conns: Vec<Conn> = (0..500).map(|_| c.conn()).collect();
    for conn in &mut there {
        conn.ask("GET", "/none", &[], None).expect(404);
    }
    // Those that are too many make no place dear that is free again.
    drop(there.pop());
    wait_at_most(Duration::from_millis(500), "there is room for one", || {
        let mut conn = c.conn();
        let _ = conn.try_send(&head("GET", "/none", &[]));
        matches!(conn.next_answer("GET"), Ok(Some(answer)) if answer.status == 404)
    });
    drop(conns);
}

/// How long it takes until one new connection is answered.
fn wait_for_answer(c: &Cluster) -> Duration {
    let started = Instant::now();
    c.get("/none").expect(404);
    started.elapsed()
}

#[test]
fn free_descriptors_are_used_within_100_ms() {
    let c = start(&[]);
    set_limit(&c, None, "--nofile=150:");
    let waits = [(); 4].map(|()| {
        let conns: Vec<Conn> = (0..300).map(|_| c.conn()).collect();
        wait_until("all descriptors are in use", || c.open_descriptors() >= 149);
        drop(conns);
        wait_for_answer(&c)
    });
    println!("{waits:?}");
    // A busy machine may delay some of them.
    assert!(waits.iter().min().unwrap() < &Duration::from_millis(100), "{waits:?}");
    assert!(c.log().matches("have to wait").count() < 20, "{}", c.log());
}

#[test]
fn no_connection_of_a_burst_waits_longer_than_50_ms() {
    let c = start(&[]);
    for count in [16, 50, 100, 200] {
        let (mut rounds, mut held) = (Vec::new(), Vec::new());
        // A busy machine may delay some of them.
        while rounds.len() < 3 || rounds.len() < 12 && *rounds.iter().min().unwrap() >= 50 {
            let (conns, worst) = burst(&c, count);
            rounds.push(worst.as_millis());
            held.extend(conns);
        }
        println!("{count} at once waited for at most, in ms: {rounds:?}");
        assert!(*rounds.iter().min().unwrap() < 50, "{count}: {rounds:?}");
        for conn in &mut held {
            conn.ask("GET", "/none", &[], None).expect(404);
        }
    }
}

#[test]
fn idle_connections_cost_no_time_and_little_memory() {
    raise_descriptor_limit();
    let c = start(&[]);
    c.put("/k", "value").expect(201);
    let before = c.memory_kib("VmRSS");
    let mut idle: Vec<Conn> = (0..1000).map(|_| c.conn()).collect();
    for conn in &mut idle {
        conn.ask("GET", "/k", &[], None).expect(302);
        conn.ask("GET", "/none", &[], None).expect(404);
    }
    let each = c.memory_kib("VmRSS").saturating_sub(before) / 1000;
    std::thread::sleep(Duration::from_millis(500));
    let started = cpu_ticks(&c);
    std::thread::sleep(Duration::from_secs(4));
    let used = cpu_ticks(&c) - started;
    println!("{each} KiB each, {used} ticks in 4 s");
    assert!(each < 40, "{each} KiB for each connection");
    assert!(used <= 1, "{used} ticks in 4 s");
}
