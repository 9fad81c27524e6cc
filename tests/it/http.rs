//! HTTP edge cases: valid and invalid requests, framing, pipelining.

use std::fs;
use std::time::{Duration, Instant};

use crate::support::cluster::{Cluster, Setup};
use crate::support::http_client::{Conn, LAST_CHUNK, chunks, follow, head};

fn threads(c: &Cluster) -> usize {
    fs::read_dir(format!("/proc/{}/task", c.master_pid())).unwrap().count()
}

#[test]
fn an_idle_master_does_not_accumulate_threads_or_descriptors() {
    let c = Setup::new().volumes(1).start();
    c.put("/k", "value").expect(201);
    let before = (threads(&c), c.open_descriptors());
    std::thread::sleep(Duration::from_secs(7));
    let after = (threads(&c), c.open_descriptors());
    assert!(after.0 <= before.0 + 2 && after.1 <= before.1 + 4, "{before:?}, then {after:?}");
}

#[test]
fn every_connection_of_a_burst_is_answered_repeatedly() {
    for count in [16, 50, 100] {
        let c = Setup::new().volumes(1).start();
        let started = Instant::now();
        let mut conns: Vec<Conn> = (0..count).map(|_| c.conn()).collect();
        for round in 0..3 {
            for conn in &mut conns {
                conn.head("GET", "/none", &[]);
            }
            for (n, conn) in conns.iter_mut().enumerate() {
                let left = Duration::from_secs(5).saturating_sub(started.elapsed());
                assert!(conn.readable(left), "connection {n} of {count} has no answer in round {round}");
                conn.answer().expect(404);
            }
        }
        // Send requests one after the other while all connections stay open.
        for conn in &mut conns {
            conn.ask("PUT", "/k", &[], Some(b"v"));
            conn.ask("GET", "/k", &[], None).expect(302);
        }
        println!("{count}: {:?}", started.elapsed());
        c.assert_value("/k", "v");
    }
}

/// Sends a malformed request and bytes that must not be taken for a second one. The server must
/// refuse it or close, send no second answer and store nothing.
#[track_caller]
fn assert_refused(c: &Cluster, request: &[u8]) {
    let shown = request.escape_ascii().to_string();
    let mut conn = c.conn();
    conn.send(request);
    let _ = conn.try_send(b"PUT /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nbad");
    let _ = conn.socket.shutdown(std::net::Shutdown::Write);
    match conn.next_answer("PUT") {
        Ok(Some(answer)) => {
            assert!((400..500).contains(&answer.status) || answer.status == 505, "{shown}: {answer:?}")
        }
        Ok(None) => {}
        Err(why) => panic!("{shown}: {why}"),
    }
    let more = conn.read_until_closed();
    assert!(more.is_empty(), "{shown}: a second answer: {}", more.escape_ascii());
    assert!(c.live().is_empty(), "{shown} stored {:?}", c.live());
    c.get("/smuggled").expect(404);
}

#[test]
fn invalid_and_oversized_content_lengths_are_refused() {
    let c = Setup::new().volumes(1).start();
    for length in [
        "1000000000000",
        "9223372036854775807",
        "18446744073709551615",
        "18446744073709551616",
        "100000000000000000000000",
        "-1",
        "+3",
        "abc",
        "0x10",
        "1,2",
        "3, 3",
        "3;3",
        "",
        " ",
        "3.0",
        "1e3",
        "٣",
    ] {
        for method in ["PUT", "REPLACE"] {
            // Some of these lengths are valid, but the body is cut short.
            assert_refused(&c, &head(method, "/k", &[("Content-Length", length)]));
        }
    }
    c.wait_until_cleaned();
    assert!(c.blobs().is_empty());
}

#[test]
fn duplicate_or_conflicting_framing_headers_are_refused() {
    let c = Setup::new().volumes(1).start();
    for headers in [
        [("Content-Length", "3"), ("Content-Length", "3")],
        [("Content-Length", "3"), ("Content-Length", "300")],
        [("Content-Length", "300"), ("content-length", "3")],
        [("Content-Length", "3"), ("Transfer-Encoding", "chunked")],
        [("Transfer-Encoding", "chunked"), ("Content-Length", "300")],
        [("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")],
        [("Transfer-Encoding", "gzip, chunked"), ("X", "y")],
        [("Transfer-Encoding", "chunked, identity"), ("X", "y")],
        [("Transfer-Encoding", "identity"), ("X", "y")],
        [("Transfer-Encoding", "xchunked"), ("Content-Length", "300")],
        [("Transfer-Encoding ", "chunked"), ("Content-Length", "300")],
        [("Content-Length ", "300"), ("X", "y")],
    ] {
        assert_refused(&c, &head("PUT", "/k", &headers));
    }
    c.wait_until_cleaned();
    assert!(c.blobs().is_empty());
}

#[test]
fn malformed_chunks_are_refused() {
    let c = Setup::new().volumes(1).start();
    for body in [
        "zz\r\nvalue\r\n0\r\n\r\n",
        "-5\r\nvalue\r\n0\r\n\r\n",
        "\r\nvalue\r\n0\r\n\r\n",
        "ffffffffffffffff\r\nvalue\r\n0\r\n\r\n",
        "fffffffffffffffff\r\nvalue\r\n0\r\n\r\n",
        "10000000000\r\nvalue\r\n",
        "5\r\nvalueX\r\n0\r\n\r\n",
        "5\r\nvalue0\r\n\r\n",
        "5 5\r\nvalue\r\n0\r\n\r\n",
    ] {
        let head = head("PUT", "/k", &[("Transfer-Encoding", "chunked")]);
        assert_refused(&c, &[&head, body.as_bytes()].concat());
    }
    c.wait_until_cleaned();
    assert!(c.blobs().is_empty());
}

#[test]
fn requests_that_are_not_http_are_refused() {
    let c = Setup::new().volumes(1).start();
    for request in [
        b"\r\n\r\n".as_slice(),
        b"GET\r\n\r\n",
        b"GET /k\r\n\r\n",
        b"GET /k HTTP/9.9\r\n\r\n",
        b"PUT /k HTTP/1.1\r\nno colon\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PUT /\xff HTTP/1.1\r\nContent-Length: 300\r\n\r\n",
        b"PUT /k HTTP/1.1\r\nX: \xff\r\nContent-Length: 300\r\n\r\n",
    ] {
        assert_refused(&c, request);
    }
    c.put("/k", "value").expect(201);
    c.assert_value("/k", "value");
}

#[test]
fn an_unexpected_body_is_not_parsed_as_a_request() {
    let c = Setup::new().volumes(1).start();
    let smuggled = "PUT /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nbad";
    let length = smuggled.len().to_string();
    for (method, target) in [
        ("GET", "/k"),
        ("HEAD", "/k"),
        ("GET", "/?list"),
        ("DELETE", "/k"),
        ("UNLINK", "/k"),
        ("RELINK", "/k"),
        ("POST", "/k"),
        ("PUT", "/k?list"),
    ] {
        for chunked in [false, true] {
            let mut conn = c.conn();
            if chunked {
                conn.head(method, target, &[("Transfer-Encoding", "chunked")]);
                conn.send(chunks(smuggled.as_bytes(), &[999])).send(LAST_CHUNK);
            } else {
                conn.head(method, target, &[("Content-Length", &length)]).send(smuggled);
            }
            conn.answer_to(method);
            conn.shutdown_write();
            let more = conn.read_until_closed();
            assert!(more.is_empty(), "{method} {target}: {}", more.escape_ascii());
            assert!(c.live().is_empty(), "{method} {target} stored {:?}", c.live());
        }
    }
}

#[test]
fn the_server_refuses_an_upload_before_its_body_arrives() {
    let c = Setup::new().volumes(1).start();
    c.put("/k", "value").expect(201);
    let started = Instant::now();
    let long = format!("/{}", "k".repeat(1089));
    for (target, status) in [("/k", 403), ("/k?x", 403), (long.as_str(), 414), ("/%zz", 400)] {
        for header in [("Content-Length", "10000000"), ("Transfer-Encoding", "chunked")] {
            let mut conn = c.conn();
            conn.head("PUT", target, &[header]);
            conn.answer().expect(status);
        }
    }
    let mut conn = c.conn();
    conn.head("PUT", "/k", &[("Content-Length", "10000000"), ("Expect", "100-continue")]);
    assert_eq!(conn.next_answer("PUT").unwrap().unwrap().status, 403);
    // A client that goes on sending is not cut off before it has read the answer.
    for _ in 0..5 {
        let mut conn = c.conn();
        conn.head("PUT", "/k", &[("Content-Length", "4000000")]);
        let _ = conn.try_send(&vec![b'v'; 4_000_000]);
        conn.answer().expect(403);
    }
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    c.assert_value("/k", "value");
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let c = Setup::new().volumes(1).start();
    c.put("/there", "value").expect(201);
    let mut conn = c.conn();
    let mut requests = Vec::new();
    for n in 0..10 {
        requests.extend(head("GET", "/there", &[]));
        requests.extend(head("GET", "/none", &[]));
        requests.extend(head("HEAD", "/there", &[]));
        let length = if n % 2 == 0 { 5 } else { 3000 };
        requests.extend(head("PUT", &format!("/{n}"), &[("Content-Length", &length.to_string())]));
        requests.extend(vec![b'v'; length]);
        requests.extend(head("GET", &format!("/{n}"), &[]));
        requests.extend(head("PUT", &format!("/{n}/c"), &[("Transfer-Encoding", "chunked")]));
        requests.extend(chunks(b"chunked", &[3]));
        requests.extend(LAST_CHUNK);
        requests.extend(head("DELETE", &format!("/{n}/c"), &[]));
        requests.extend(head("PATCH", "/there", &[]));
    }
    conn.send(&requests);
    for n in 0..10 {
        conn.answer().expect(302);
        conn.answer().expect(404);
        conn.answer_to("HEAD").expect(302);
        conn.answer().expect(201);
        let answer = conn.answer().expect(302);
        let length = if n % 2 == 0 { 5 } else { 3000 };
        assert_eq!(follow(&answer).body, vec![b'v'; length]);
        conn.answer().expect(201);
        conn.answer().expect(204);
        conn.answer().expect(405);
    }
    conn.ask("GET", "/9", &[], None).expect(302);
}

#[test]
fn clients_that_leave_after_their_request_harm_nobody() {
    let c = Setup::new().volumes(1).start();
    c.put("/k", "value").expect(201);
    for n in 0..200 {
        let mut conn = c.conn();
        let mut requests = vec![
            head("GET", "/k", &[]),
            head("GET", "/?list", &[]),
            b"GET /k HT".to_vec(),
            Vec::new(),
            head("DELETE", "/none", &[]),
        ];
        conn.send(requests.swap_remove(n % 5));
        if n % 2 == 0 { drop(conn) } else { conn.reset() }
    }
    c.assert_value("/k", "value");
    crate::support::http_client::wait_until("the connections are closed", || c.open_descriptors() < 100);
}
