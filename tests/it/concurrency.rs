//! Concurrency: parallel replicas, readers during slow uploads, several writers of one key.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::numbered_keys;
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Conn, LAST_CHUNK, TIMEOUT, chunks, follow, target, wait_until};
use crate::support::random::{random_bytes, seeded_rng};

#[test]
fn put_writes_its_replicas_in_parallel() {
    let c = Setup::new().proxied().start();
    for (n, length) in [(0, 10), (1, 10), (2, 10), (0, 200_000), (1, 3_000_000), (2, 3_000_000)] {
        let key = format!("/{n}/{length}");
        let value = vec![b'v'; length];
        let before: Vec<usize> = c.proxies.iter().map(|proxy| proxy.seen("PUT").len()).collect();
        let held = &c.proxies[n];
        held.set("PUT", Fault::HoldRequest);
        let mut writer = c.conn();
        let sending = thread::scope(|scope| {
            writer.head("PUT", &key, &[("Content-Length", &length.to_string())]);
            let sending = scope.spawn(|| {
                writer.send(&value);
                writer.answer()
            });
            held.wait_held("PUT", 1);
            // The other replicas do not wait for the held one.
            for (proxy, before) in c.proxies.iter().zip(&before) {
                proxy.wait_seen("PUT", before + 1);
            }
            held.release("PUT");
            sending.join().expect("the thread does not panic")
        });
        sending.expect(201);
        c.assert_value(&key, &value);
    }
}

#[test]
fn delete_removes_its_blobs_in_parallel() {
    let c = Setup::new().proxied().start();
    for n in 0..3 {
        let key = format!("/{n}");
        c.put(&key, "value").expect(201);
        let held = &c.proxies[n];
        held.set("DELETE", Fault::HoldRequest);
        let mut conn = c.conn();
        conn.head("DELETE", &key, &[]);
        held.wait_held("DELETE", 1);
        wait_until("the other two are deleted", || c.blobs().len() == 1);
        assert!(!conn.readable(Duration::from_millis(20)), "answered before the last blob is deleted");
        held.release("DELETE");
        conn.answer().expect(204);
        assert!(c.blobs().is_empty());
    }
}

#[test]
fn deletes_that_wait_for_a_hung_volume_do_not_delay_others() {
    let c = Setup::new().proxied().start();
    let keys = numbered_keys("/k", 40);
    c.fill(&keys);
    c.proxies.iter().for_each(|proxy| proxy.set("DELETE", Fault::HoldRequest));
    let mut waiting: Vec<Conn> = keys[..39].iter().map(|_| c.conn()).collect();
    for (conn, key) in waiting.iter_mut().zip(&keys) {
        conn.head("DELETE", &target(key), &[]);
    }
    c.proxies[0].wait_held("DELETE", 39);
    c.ask("UNLINK", &keys[39]).expect(204);
    c.ask("RELINK", &keys[39]).expect(204);
    c.ask_target("GET", "/?metrics").expect(200);
    c.proxies.iter().for_each(|proxy| proxy.release("DELETE"));
    for conn in &mut waiting {
        conn.answer().expect(204);
    }
}

#[test]
fn other_requests_are_fast_during_64_slow_uploads() {
    let c = Cluster::new();
    c.put("/there", "value").expect(201);
    for n in 0..30 {
        c.put(format!("/old/{n}"), "value").expect(201);
    }
    let value = vec![b'v'; 400_000];
    let mut uploads: Vec<Conn> = (0..64)
        .map(|n| {
            let mut conn = c.conn();
            let key = format!("/slow/{n}");
            if n % 2 == 0 {
                conn.head("PUT", &key, &[("Content-Length", "400000")]).send(&value[..300_000]);
            } else {
                conn.head("PUT", &key, &[("Transfer-Encoding", "chunked")]);
                conn.send(chunks(&value[..300_000], &[50_000]));
            }
            conn
        })
        .collect();
    wait_until("all 64 uploads have begun", || c.keys_with_debris().len() == 64);
    assert_eq!(c.blobs().len(), 31 * 3, "part of a value is visible");
    let keep_sending = AtomicBool::new(true);
    let mut slowest = [Duration::ZERO; 5];
    let left = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 300_000;
            while keep_sending.load(Ordering::Relaxed) && sent < 390_000 {
                for (n, conn) in uploads.iter_mut().enumerate() {
                    let bytes = &value[sent..sent + 10];
                    conn.send(if n % 2 == 0 { bytes.to_vec() } else { chunks(bytes, &[10]) });
                }
                sent += 10;
                thread::sleep(Duration::from_millis(5));
            }
            sent
        });
        let mut timed = |kind: usize, act: &dyn Fn()| {
            let started = Instant::now();
            act();
            slowest[kind] = slowest[kind].max(started.elapsed());
        };
        for n in 0..30 {
            timed(0, &|| drop(c.get("/there").expect(302)));
            timed(0, &|| drop(c.get("/slow/1").expect(404)));
            timed(1, &|| drop(c.ask("HEAD", "/there").expect(302)));
            timed(2, &|| assert_eq!(c.live().len(), 31 - n));
            timed(3, &|| drop(c.ask("DELETE", format!("/old/{n}")).expect(204)));
            timed(4, &|| drop(c.put(format!("/new/{n}"), "value").expect(201)));
            timed(3, &|| drop(c.ask("DELETE", format!("/new/{n}")).expect(204)));
        }
        keep_sending.store(false, Ordering::Relaxed);
        sender.join().expect("the thread does not panic")
    });
    println!("slowest GET, HEAD, list, DELETE, PUT: {slowest:?}");
    assert!(slowest.iter().all(|time| *time < Duration::from_secs(2)), "{slowest:?}");
    for (n, conn) in uploads.iter_mut().enumerate() {
        let rest = &value[left..];
        conn.send(if n % 2 == 0 { rest.to_vec() } else { chunks(rest, &[9999]) });
        conn.send(if n % 2 == 0 { b"" } else { LAST_CHUNK });
    }
    for (n, conn) in uploads.iter_mut().enumerate() {
        conn.answer().expect(201);
        c.assert_value(format!("/slow/{n}"), &value);
    }
}

#[test]
fn the_second_of_two_writers_gets_409() {
    let c = Setup::new().proxied().start();
    for (round, method) in ["PUT", "REPLACE"].into_iter().enumerate() {
        let key = format!("/{round}");
        let first = random_bytes(&mut seeded_rng(), 500_000);
        c.proxies[0].set("PUT", Fault::HoldRequest);
        let mut first_writer = c.conn();
        first_writer.head(method, &key, &[("Content-Length", "500000")]).send(&first[..1000]);
        // The lock is held once the debris is written.
        wait_until("the first write has begun", || c.keys_with_debris().len() == 1);
        for other in ["PUT", "REPLACE"] {
            c.send(other, &key, &[], vec![b'2'; 500_000]).expect_error(409, "writing");
        }
        first_writer.send(&first[1000..]);
        c.proxies[0].release("PUT");
        first_writer.answer().expect(201);
        c.assert_value(&key, &first);
        assert!(c.is_first(c.key_info(&key).version));
        c.put(&key, "third").expect(403);
    }
    assert_eq!(c.blobs().len(), 6);
}

#[test]
fn concurrent_writers_and_readers_see_only_whole_values() {
    let c = Cluster::new();
    let (address, stop) = (c.address(), AtomicBool::new(false));
    // All bytes of a value are the same and identify its writer.
    let value = |writer: usize, round: usize| -> Vec<u8> {
        let length = [3, 700, 5000, 300_000][(writer + round) % 4] + writer;
        vec![b'a' + (writer * 3 + round % 3) as u8; length]
    };
    let assert_whole = |read: &[u8]| {
        let writer = usize::from(read[0] - b'a') / 3;
        assert!(read.iter().all(|byte| *byte == read[0]), "a mix of two values");
        assert!(writer < 8 && [3, 700, 5000, 300_000].contains(&(read.len() - writer)), "a truncated value");
    };
    let counts = thread::scope(|scope| {
        let writers: Vec<_> = (0..8)
            .map(|writer| {
                let address = &address;
                scope.spawn(move || {
                    let mut conn = Conn::open(address);
                    let (mut stored, mut locked) = (0, 0);
                    let started = Instant::now();
                    for round in 0.. {
                        let method = if round % 5 == 0 { "PUT" } else { "REPLACE" };
                        match conn.ask(method, "/k", &[], Some(&value(writer, round))).status {
                            201 => stored += 1,
                            409 => {
                                locked += 1;
                                conn = Conn::open(address);
                            }
                            403 if method == "PUT" => conn = Conn::open(address),
                            status => panic!("{method}: {status}"),
                        }
                        if round % 16 == 7 {
                            let status = conn.ask("DELETE", "/k", &[], None).status;
                            assert!([204, 404, 409].contains(&status), "DELETE: {status}");
                        }
                        if stored == 5 {
                            break;
                        }
                        assert!(started.elapsed() < TIMEOUT, "{stored} stored, {locked} locked");
                    }
                    (stored, locked)
                })
            })
            .collect();
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut read = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let answer = c.get("/k");
                        match answer.status {
                            302 => {
                                // The blob may have been replaced since the redirect, but it never
                                // holds another value.
                                let found = follow(&answer);
                                if found.status == 200 {
                                    assert_whole(&found.body);
                                    read += 1;
                                }
                            }
                            404 | 410 => {}
                            status => panic!("GET: {status}"),
                        }
                    }
                    read
                })
            })
            .collect();
        let counts: Vec<_> = writers.into_iter().map(|w| w.join().expect("the thread does not panic")).collect();
        stop.store(true, Ordering::Relaxed);
        let read: usize = readers.into_iter().map(|r| r.join().expect("the thread does not panic")).sum();
        println!("stored and locked: {counts:?}, read {read}");
        counts
    });
    assert!(counts.iter().any(|(_, locked)| *locked > 0), "no write found the key locked");
    c.wait_until_cleaned();
    if c.get("/k").status == 302 {
        let last = follow(&c.get("/k")).body;
        assert_whole(&last);
        c.assert_value("/k", last);
    }
}

#[test]
fn writes_to_different_keys_run_in_parallel() {
    let c = Setup::new().proxied().start();
    c.proxies[0].set("PUT", Fault::HoldRequest);
    let mut held: Vec<Conn> = (0..20)
        .map(|n| {
            let mut conn = c.conn();
            conn.head("PUT", &target(format!("/{n}")), &[("Content-Length", "5")]).send("value");
            conn
        })
        .collect();
    c.proxies[0].wait_held("PUT", 20);
    assert_eq!(c.keys_with_debris().len(), 20);
    c.proxies[0].release("PUT");
    for (n, conn) in held.iter_mut().enumerate() {
        conn.answer().expect(201);
        c.assert_value(format!("/{n}"), "value");
    }
}
