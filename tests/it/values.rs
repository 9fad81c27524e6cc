//! Values: from one byte to more than fits into the master's memory.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::support::cluster::{Cluster, Setup};
use crate::support::http_client::{LAST_CHUNK, ask, chunks, target};
use crate::support::random::{random_bytes, seeded_rng};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Lengths at and around all buffer and chunk sizes of the server.
const LENGTHS: [usize; 25] = [
    1,
    2,
    16,
    1023,
    1024,
    1025,
    4 * KIB,
    16 * KIB - 1,
    64 * KIB,
    64 * KIB + 1,
    255 * KIB,
    256 * KIB - 1,
    256 * KIB,
    256 * KIB + 1,
    257 * KIB,
    512 * KIB - 1,
    512 * KIB,
    512 * KIB + 1,
    MIB - 1,
    MIB,
    MIB + 1,
    3 * MIB,
    5 * MIB + 3,
    16 * MIB,
    16 * MIB + 1,
];

/// Checks the value on the disks and as nginx serves it from each replica.
fn assert_readable_everywhere(c: &Cluster, key: &str, value: &[u8]) {
    let found = c.assert_value(key, value);
    for replica in &found.replicas {
        let (host, below) = replica.split_at(replica.find('/').unwrap_or(replica.len()));
        let read = ask(host, "GET", &format!("{below}{}", found.path), &[], None).expect(200);
        assert!(read.body == value, "{replica} serves another value for {key}");
    }
}

#[test]
fn every_replica_returns_values_of_every_length() {
    let c = Cluster::new();
    let mut random = seeded_rng();
    for length in LENGTHS {
        let value = random_bytes(&mut random, length);
        let key = format!("/{length}");
        c.put(&key, &value).expect(201);
        assert_readable_everywhere(&c, &key, &value);
        c.ask("DELETE", &key).expect(204);
    }
    assert!(c.blobs().is_empty());
}

#[test]
fn every_replica_returns_chunked_values_of_every_length() {
    let c = Cluster::new();
    let mut random = seeded_rng();
    for length in LENGTHS {
        let value = random_bytes(&mut random, length);
        let pieces: Vec<usize> = match random.usize(..4) {
            0 => vec![length],
            1 => vec![1, 2, 3, 1023, 1024, 1025],
            2 => vec![64 * KIB, 1],
            _ => (0..9).map(|_| random.usize(1..100_000)).collect(),
        };
        let key = format!("/{length}");
        let mut conn = c.conn();
        conn.head("PUT", &key, &[("Transfer-Encoding", "chunked")]);
        conn.send(chunks(&value, &pieces)).send(LAST_CHUNK);
        conn.answer().expect(201);
        assert_readable_everywhere(&c, &key, &value);
        // The server has read the whole body: the connection takes the next request.
        conn.ask("DELETE", &key, &[], None).expect(204);
    }
    assert!(c.blobs().is_empty());
}

#[test]
fn values_may_arrive_in_small_pieces_and_requests_byte_by_byte() {
    let c = Setup::new().volumes(1).start();
    let value = random_bytes(&mut seeded_rng(), 3000);
    let mut conn = c.conn();
    conn.head("PUT", "/k", &[("Content-Length", "3000")]);
    for piece in value.chunks(7) {
        conn.send(piece);
    }
    conn.answer().expect(201);
    assert_readable_everywhere(&c, "/k", &value);
    for byte in crate::support::http_client::head("GET", "/k", &[]) {
        conn.send([byte]);
    }
    conn.answer().expect(302);
    let request = [
        crate::support::http_client::head("PUT", "/l", &[("Transfer-Encoding", "chunked")]),
        chunks(&value[..300], &[100]),
        LAST_CHUNK.to_vec(),
    ];
    for byte in request.concat() {
        conn.send([byte]);
    }
    conn.answer().expect(201);
    assert_readable_everywhere(&c, "/l", &value[..300]);
}

#[test]
fn the_server_sends_100_continue_only_when_it_wants_the_body() {
    let c = Cluster::new();
    let mut random = seeded_rng();
    for length in [10, 1024, 1025, 300_000] {
        let value = random_bytes(&mut random, length);
        let key = format!("/{length}");
        let headers = [("Content-Length", &*length.to_string()), ("Expect", "100-continue")];
        let mut conn = c.conn();
        conn.head("PUT", &key, &headers);
        assert_eq!(conn.next_answer("PUT").unwrap().unwrap().status, 100);
        conn.send(&value);
        assert_eq!(conn.next_answer("PUT").unwrap().unwrap().status, 201);
        assert_readable_everywhere(&c, &key, &value);
        let mut conn = c.conn();
        conn.head("PUT", &key, &headers);
        assert_eq!(conn.next_answer("PUT").unwrap().unwrap().status, 403);
    }
    let mut conn = c.conn();
    conn.head("PUT", "/chunked", &[("Transfer-Encoding", "chunked"), ("Expect", "100-continue")]);
    assert_eq!(conn.next_answer("PUT").unwrap().unwrap().status, 100);
    conn.send(chunks(b"value", &[2])).send(LAST_CHUNK);
    assert_eq!(conn.next_answer("PUT").unwrap().unwrap().status, 201);
    assert_readable_everywhere(&c, "/chunked", b"value");
}

fn seconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
}

#[test]
fn every_replica_has_the_time_of_the_write_as_mtime() {
    let c = Cluster::new();
    let before = seconds(SystemTime::now());
    let mut conn = c.conn();
    conn.head("PUT", "/k", &[("Content-Length", "600000")]).send(vec![b'v'; 500_000]);
    // The upload ends in a later second than it began.
    std::thread::sleep(Duration::from_millis(2500));
    conn.send(vec![b'v'; 100_000]).answer().expect(201);
    let after = seconds(SystemTime::now());
    assert!(after - before >= 2);
    let times: Vec<i64> = c.files("/k").iter().map(|file| fs::metadata(file).unwrap().mtime()).collect();
    assert_eq!(times, [times[0]; 3]);
    // By itself, nginx would set each mtime to the moment of publication.
    assert!((before..after).contains(&times[0]), "{} in {before}..{after}", times[0]);
}

#[test]
fn a_value_may_be_larger_than_the_masters_memory() {
    let c = Cluster::new();
    let mut random = seeded_rng();
    let piece = random_bytes(&mut random, MIB);
    let count = 100;
    for (key, chunked) in [("/length", false), ("/chunked", true)] {
        let mut conn = c.conn();
        let length = (count * piece.len()).to_string();
        if chunked {
            conn.head("PUT", key, &[("Transfer-Encoding", "chunked")]);
        } else {
            conn.head("PUT", key, &[("Content-Length", &length)]);
        }
        for _ in 0..count {
            conn.send(if chunked { chunks(&piece, &[70_000]) } else { piece.clone() });
        }
        conn.send(if chunked { LAST_CHUNK } else { b"" }).answer().expect(201);
        for file in c.files(key) {
            assert!(fs::read(file).unwrap().chunks(MIB).all(|part| part == piece), "{key}");
        }
        c.ask("DELETE", key).expect(204);
    }
    let peak = c.memory_kib("VmHWM");
    assert!(peak < 64 << 10, "the master used {peak} KiB");
}

#[test]
fn placement_spreads_keys_evenly() {
    let c = Setup::new().replicas(1).start();
    for n in 0..90 {
        c.put(format!("/{n}"), target(format!("/{n}"))).expect(201);
    }
    for volume in &c.volumes {
        let count = volume.files().len();
        assert!((10..60).contains(&count), "{count} of 90");
    }
}
