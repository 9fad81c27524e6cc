//! Repeated SIGKILL of the master under load: acknowledged writes survive.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::model::{StoredValue, expected};
use crate::support::cluster::{Cluster, Setup};
use crate::support::http_client::{Conn, follow, head, target};
use crate::support::random::{random_bytes, seeded_rng};

/// Kills. Each costs 2 s, and every run draws other moments.
const ROUNDS: usize = 25;
const WRITERS: usize = 16;
const KEYS: usize = 8;

struct Key {
    name: String,
    /// The state after the last acknowledged request.
    stored: Option<StoredValue>,
    /// The other possible state, after a request without an answer.
    maybe_stored: Option<Option<StoredValue>>,
    touched: bool,
}

/// A client that writes its own keys.
struct Writer {
    random: fastrand::Rng,
    keys: Vec<Key>,
    acknowledged: usize,
    unanswered: usize,
}

impl Writer {
    fn new(number: usize, random: fastrand::Rng) -> Writer {
        let key = |n| Key { name: format!("/{number}/{n}"), stored: None, maybe_stored: None, touched: false };
        Writer { random, keys: (0..KEYS).map(key).collect(), acknowledged: 0, unanswered: 0 }
    }

    /// Writes until the master is killed.
    fn write(&mut self, address: &str, killed: &AtomicBool) {
        let mut conn = None;
        loop {
            let key = &mut self.keys[self.random.usize(..KEYS)];
            let method = ["PUT", "REPLACE", "DELETE", "UNLINK"][self.random.usize(..4)];
            let value = match method {
                "PUT" | "REPLACE" if self.random.u32(..20) == 0 => random_bytes(&mut self.random, 300_000),
                "PUT" | "REPLACE" => {
                    let length = self.random.usize(1..5000);
                    random_bytes(&mut self.random, length)
                }
                _ => Vec::new(),
            };
            let (status, next) = expected(key.stored.as_ref(), method, &value);
            key.touched = true;
            match ask(&mut conn, address, method, &key.name, &value) {
                None => {
                    assert!(killed.load(Ordering::SeqCst), "no answer from a running master");
                    self.unanswered += 1;
                    key.maybe_stored = Some(next);
                    return;
                }
                // A deleted key may still have debris. DELETE clears it and answers 204.
                Some(204) if method == "DELETE" => {}
                Some(answer) => assert_eq!(answer, status, "{method} {}", key.name),
            }
            self.acknowledged += 1;
            key.stored = next;
        }
    }

    /// Checks that each touched key is in its acknowledged state, or in that of the unanswered
    /// request.
    fn check(&mut self, c: &Cluster, unlinked: &BTreeSet<Vec<u8>>) {
        for key in self.keys.iter_mut().filter(|key| key.touched) {
            key.touched = false;
            let answer = c.get(&key.name);
            let is_unlinked = unlinked.contains(key.name.as_bytes());
            let read = match answer.status {
                302 if !is_unlinked => Some(follow(&answer).expect(200).body),
                status => {
                    assert_eq!(status, 404, "{}, unlinked: {is_unlinked}", key.name);
                    None
                }
            };
            let is = |stored: &Option<StoredValue>| match (stored, &read) {
                (Some(stored), Some(read)) => stored.live && stored.value == *read,
                (Some(stored), None) => !stored.live && is_unlinked,
                (None, read) => read.is_none() && !is_unlinked,
            };
            if let Some(maybe_stored) = key.maybe_stored.take().filter(|_| !is(&key.stored)) {
                key.stored = maybe_stored;
            }
            let length = read.as_ref().map(Vec::len);
            assert!(is(&key.stored), "{}: {length:?} bytes, unlinked: {is_unlinked}", key.name);
            if let Some(value) = read {
                c.assert_value(&key.name, value);
            }
        }
    }
}

/// The status of the answer, or `None` if there is none.
fn ask(conn: &mut Option<Conn>, address: &str, method: &str, key: &str, value: &[u8]) -> Option<u16> {
    let mut open = conn.take().or_else(|| Conn::try_open(address).ok())?;
    let length = value.len().to_string();
    let head = head(method, &target(key), &[("Content-Length", &length)]);
    // The server may refuse the body and close before it has read all of it.
    let _ = open.try_send(&[&head, value].concat());
    let status = open.next_answer(method).ok()??.status;
    *conn = Some(open).filter(|_| status < 400);
    Some(status)
}

/// Runs the writers for this long, then kills the master.
fn kill_under_load(c: &mut Cluster, writers: &mut [Writer], time: Duration) {
    let (address, killed) = (c.address(), AtomicBool::new(false));
    thread::scope(|scope| {
        for writer in writers {
            scope.spawn(|| writer.write(&address, &killed));
        }
        thread::sleep(time);
        killed.store(true, Ordering::SeqCst);
        c.kill_master();
    });
}

fn check(c: &Cluster, writers: &mut [Writer]) {
    let unlinked: BTreeSet<Vec<u8>> = c.unlinked().into_iter().collect();
    thread::scope(|scope| {
        for writer in writers {
            scope.spawn(|| writer.check(c, &unlinked));
        }
    });
}

#[test]
fn acknowledged_writes_of_16_clients_survive_25_kills() {
    let mut random = seeded_rng();
    // A long -voltimeout, so that a busy machine does not make a volume look down.
    let mut c = Setup::new().flags(&["-voltimeout", "20s"]).start();
    let mut writers: Vec<Writer> = (0..WRITERS).map(|n| Writer::new(n, random.fork())).collect();
    for _ in 0..ROUNDS {
        kill_under_load(&mut c, &mut writers, Duration::from_millis(random.u64(50..=300)));
        c.start_master();
        thread::scope(|scope| {
            // While a master runs, debris is not a finding.
            let verify = scope.spawn(|| c.mkv(&["verify"]));
            check(&c, &mut writers);
            verify.join().unwrap().expect(0).prints("the store is whole");
        });
    }
    let sum = |count: fn(&Writer) -> usize| writers.iter().map(count).sum::<usize>();
    let (acknowledged, unanswered) = (sum(|w| w.acknowledged), sum(|w| w.unanswered));
    println!("{acknowledged} requests acknowledged, {unanswered} unanswered");
    assert!(acknowledged > ROUNDS * WRITERS && unanswered == ROUNDS * WRITERS);

    c.kill_master();
    c.mkv(&["verify", "-repair"]).expect_success_except_debris();
    c.start_master();
    c.wait_until_cleaned();
    writers.iter_mut().flat_map(|writer| &mut writer.keys).for_each(|key| key.touched = true);
    check(&c, &mut writers);
    for key in writers.iter().flat_map(|writer| &writer.keys) {
        if let Some(stored) = key.stored.as_ref().filter(|stored| !stored.live) {
            c.ask("RELINK", &key.name).expect(204);
            c.assert_value(&key.name, &stored.value);
            c.ask("UNLINK", &key.name).expect(204);
        }
    }
    c.stop_master();
    c.assert_verified();
    let other = c.folder.join("another");
    c.mkv(&["rebuild", "-rehash", "-db", other.to_str().unwrap()]).expect(0);
    let rebuilt = c.mkv(&["dump", "-db", other.to_str().unwrap()]).expect(0).out;
    assert!(rebuilt == c.dump().replace("\tDELETED", "\t"), "the rebuilt index:\n{rebuilt}");
}
