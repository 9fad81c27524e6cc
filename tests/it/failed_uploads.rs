//! Failed uploads: the right answer, and no trace.

use std::fs;
use std::time::{Duration, Instant};

use crate::support::cluster::{Cluster, Setup};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Answer, Conn, LAST_CHUNK, chunks, head, wait_until};
use crate::support::random::{random_bytes, seeded_rng};
use crate::support::reference::{md5, md5_base64};

/// The state of a key before the failed upload.
#[derive(Debug, Clone, Copy, PartialEq)]
enum KeyState {
    Absent,
    Live,
    Unlinked,
}

const ALL: [KeyState; 3] = [KeyState::Absent, KeyState::Live, KeyState::Unlinked];

impl KeyState {
    fn prepare(self, c: &Cluster, key: &str) {
        if self != KeyState::Absent {
            c.put(key, key).expect(201);
        }
        if self == KeyState::Unlinked {
            c.ask("UNLINK", key).expect(204);
        }
    }

    /// Checks that the failed upload left no trace: the key is in its old state and can be written.
    #[track_caller]
    fn assert_untouched(self, c: &Cluster, key: &str) {
        match self {
            KeyState::Absent => c.assert_absent(key),
            KeyState::Live => assert_eq!(c.assert_value(key, key).version, 0),
            KeyState::Unlinked => {
                c.get(key).expect(404);
                assert!(c.unlinked().contains(&key.into()));
                c.ask("RELINK", key).expect(204);
                assert_eq!(c.assert_value(key, key).version, 0);
            }
        }
        c.wait_until_cleaned();
        let copies = if self == KeyState::Absent { 0 } else { c.setup.replica_count() };
        let paths = c.blobs().into_keys().filter(|blob| blob.contains(&plain_path(key))).count();
        assert_eq!(paths, copies, "blobs of {key}");
        c.replace(key, "the next").expect(201);
        c.assert_value(key, "the next");
        c.wait_until_cleaned();
        c.ask("DELETE", key).expect(204);
    }
}

fn plain_path(key: &str) -> String {
    crate::support::reference::path(key.as_bytes(), 0)
}

/// Truncated uploads: a description, and the bytes to send.
fn truncated_uploads(key: &str) -> Vec<(String, Vec<u8>)> {
    let value = vec![b'v'; 600_000];
    let mut uploads = Vec::new();
    for (length, sent) in [
        (1, 0),
        (1024, 1023),
        (1025, 1024),
        (100_000, 0),
        (100_000, 99_999),
        (600_000, 256 << 10),
        (600_000, 300_000),
        (600_000, 599_999),
        (1u64 << 40, 300_000),
    ] {
        let head = head("REPLACE", key, &[("Content-Length", &length.to_string())]);
        let bytes = [head, value[..sent].to_vec()].concat();
        uploads.push((format!("{sent} of {length} bytes"), bytes));
    }
    let coded = chunks(&value, &[100_000]);
    let line = "186a0\r\n".len();
    let chunk = line + 100_000 + 2;
    assert_eq!(coded.len(), 6 * chunk);
    let ends: [(&str, &[u8], usize); 11] = [
        ("before the first chunk", b"", 0),
        ("in the first length", b"", 2),
        ("after the first length", b"", line),
        ("inside the first chunk", b"", 50_000),
        ("after the first chunk's bytes", b"", chunk - 2),
        ("between chunks", b"", 3 * chunk),
        ("inside a later chunk", b"", 3 * chunk + 50_000),
        ("inside the last chunk", b"", 6 * chunk - 100),
        ("before the closing chunk", b"", 6 * chunk),
        ("inside the closing chunk", b"0", 6 * chunk),
        ("before the closing chunk's last line", b"0\r\n", 6 * chunk),
    ];
    for (name, tail, at) in ends {
        let head = head("REPLACE", key, &[("Transfer-Encoding", "chunked")]);
        uploads.push((format!("chunked, {name}"), [&head, &coded[..at], tail].concat()));
    }
    uploads
}

#[test]
fn an_aborted_upload_leaves_nothing() {
    let c = Cluster::new();
    let mut keys = Vec::new();
    for (state, ways) in [
        (KeyState::Absent, ["closes", "resets", "ends sending"].as_slice()),
        (KeyState::Unlinked, &["closes", "ends sending"]),
        (KeyState::Live, &["resets"]),
    ] {
        for (n, (name, _)) in truncated_uploads("").into_iter().enumerate() {
            for way in ways {
                let key = format!("/{state:?}/{way}/{n}").replace(' ', "-");
                state.prepare(&c, &key);
                let (_, bytes) = truncated_uploads(&key).swap_remove(n);
                let mut conn = c.conn();
                conn.send(bytes);
                match *way {
                    "closes" => drop(conn),
                    "resets" => conn.reset(),
                    _ => {
                        conn.shutdown_write();
                        match conn.next_answer("PUT") {
                            Ok(Some(answer)) => drop(answer.expect_error(400, "upload")),
                            // A body this short is read before the master sees the request, so the
                            // connection just closes.
                            Ok(None) if name.ends_with("of 1 bytes") => {}
                            Ok(None) if name.ends_with("of 1024 bytes") => {}
                            other => panic!("{name}: {other:?}"),
                        }
                    }
                }
                keys.push((state, format!("{name}, the client {way}"), key));
            }
        }
    }
    for (_, name, key) in &keys {
        wait_until(&format!("the lock of {key} is free: {name}"), || c.ask("RELINK", key).status != 409);
    }
    c.wait_until_cleaned();
    for (state, name, key) in keys {
        println!("{name}: {key}");
        if state == KeyState::Unlinked {
            // The loop above has just relinked it.
            assert_eq!(c.assert_value(&key, &key).version, 0);
        } else {
            state.assert_untouched(&c, &key);
        }
    }
}

#[test]
fn an_upload_with_a_wrong_digest_leaves_nothing() {
    let c = Cluster::new();
    let value = random_bytes(&mut seeded_rng(), 9 << 20);
    for state in ALL {
        for (n, length) in [1, 1000, 5000, 256 << 10, 700_000, 9 << 20].into_iter().enumerate() {
            let key = format!("/{state:?}/{n}");
            state.prepare(&c, &key);
            let value = &value[..length];
            let digest = [("Content-MD5", &*md5_base64(b"something else"))];
            c.send("REPLACE", &key, &digest, value).expect_error(400, "Content-MD5");
            let mut conn = c.conn();
            let digest = md5(b"something else");
            conn.head("REPLACE", &key, &[("Transfer-Encoding", "chunked"), ("Content-MD5", &digest)]);
            conn.send(chunks(value, &[1000])).send(LAST_CHUNK);
            conn.answer().expect_error(400, "Content-MD5");
            state.assert_untouched(&c, &key);
        }
    }
}

/// Uploads slowly until the answer arrives. Returns the answer and how many bytes were sent.
fn upload_until_answered(conn: &mut Conn, key: &str, chunked: bool) -> (Answer, usize) {
    const PIECE: usize = 64 << 10;
    const ALL: usize = 1 << 30;
    let piece = vec![b'v'; PIECE];
    let coded = chunks(&piece, &[PIECE]);
    if chunked {
        conn.head("REPLACE", key, &[("Transfer-Encoding", "chunked")]);
    } else {
        conn.head("REPLACE", key, &[("Content-Length", &ALL.to_string())]);
    }
    let mut sent = 0;
    while sent < ALL && !conn.readable(Duration::from_millis(5)) {
        sent += PIECE;
        if conn.try_send(if chunked { &coded } else { &piece }).is_err() {
            break;
        }
    }
    (conn.answer(), sent)
}

#[test]
fn an_upload_ends_early_when_a_volume_refuses_at_once() {
    let c = Setup::new().proxied().start();
    let mut n = 0;
    for state in ALL {
        for (status, chunked) in [(500, false), (401, true), (507, true), (403, false)] {
            n += 1;
            let key = format!("/{n}");
            state.prepare(&c, &key);
            let volume = c.holder(&key, n % 3);
            c.proxies[volume].set("PUT", Fault::Answer(status));
            let started = Instant::now();
            let (answer, sent) = upload_until_answered(&mut c.conn(), &key, chunked);
            let text = answer.expect_error(500, &c.names[volume]).text();
            assert!(text.contains(&status.to_string()), "{status}: {text}");
            assert!(sent < 32 << 20, "{sent} bytes were accepted");
            assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
            // Also for a value that is sent in one go.
            c.replace(&key, vec![b'v'; 10_000]).expect_error(500, &c.names[volume]);
            c.proxies[volume].release("PUT");
            state.assert_untouched(&c, &key);
        }
    }
}

#[test]
fn an_upload_ends_early_when_a_volume_refuses_in_the_middle() {
    let c = Setup::new().proxied().start();
    for (state, chunked) in ALL.into_iter().zip([true, false, true]) {
        let key = format!("/{state:?}");
        state.prepare(&c, &key);
        let volume = c.holder(&key, 1);
        c.proxies[volume].set("PUT", Fault::AnswerAfter(3 << 20, 500));
        let started = Instant::now();
        let (answer, sent) = upload_until_answered(&mut c.conn(), &key, chunked);
        let text = answer.expect_error(500, &c.names[volume]).text();
        assert!(text.contains("500"), "{text}");
        assert!((3 << 20..64 << 20).contains(&sent), "{sent} bytes were accepted");
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        c.proxies[volume].release("PUT");
        state.assert_untouched(&c, &key);
    }
}

/// The volume refuses and stops reading while the master has more to send than the buffers hold.
#[test]
fn the_master_sees_a_refusal_while_the_socket_to_the_volume_is_full() {
    let c = Setup::new().proxied().start();
    let volume = c.holder("/k", 1);
    let piece = vec![b'v'; 1 << 20];
    for chunked in [false, true] {
        c.proxies[volume].set("PUT", Fault::AnswerAfter(3 << 20, 500));
        let started = Instant::now();
        let mut conn = c.conn();
        if chunked {
            conn.head("PUT", "/k", &[("Transfer-Encoding", "chunked")]);
        } else {
            conn.head("PUT", "/k", &[("Content-Length", &(200usize << 20).to_string())]);
        }
        let mut sender = conn.socket.try_clone().unwrap();
        let coded = if chunked { chunks(&piece, &[1 << 20]) } else { piece.clone() };
        let sending = std::thread::spawn(move || {
            let mut sent = 0;
            while sent < 200 && std::io::Write::write_all(&mut sender, &coded).is_ok() {
                sent += 1;
            }
            sent
        });
        conn.answer().expect_error(500, &c.names[volume]);
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        drop(conn);
        let sent = sending.join().expect("the thread does not panic");
        println!("{sent} MiB were sent in {:?}", started.elapsed());
        c.proxies[volume].release("PUT");
        KeyState::Absent.assert_untouched(&c, "/k");
    }
}

#[test]
fn an_upload_fails_when_a_volume_dies_in_the_middle() {
    let c = Setup::new().proxied().start();
    // Larger than the socket buffers to a slow volume, so that the master cannot have sent all of
    // it.
    let value = random_bytes(&mut seeded_rng(), 12_000_000);
    let mut keys = Vec::new();
    for state in ALL {
        for (n, cut) in [1, 100_000].into_iter().enumerate() {
            let key = format!("/{state:?}/{n}");
            state.prepare(&c, &key);
            let volume = c.holder(&key, n);
            c.proxies[volume].set("PUT", Fault::Cut(cut));
            c.replace(&key, &value).expect_error(503, &c.names[volume]);
            let mut conn = c.conn();
            conn.head("REPLACE", &key, &[("Transfer-Encoding", "chunked")]);
            let _ = conn.try_send(&chunks(&value, &[90_000]));
            let _ = conn.try_send(LAST_CHUNK);
            conn.answer().expect_error(503, &c.names[volume]);
            c.proxies[volume].release("PUT");
            keys.push((state, key));
        }
    }
    for (state, key) in keys {
        state.assert_untouched(&c, &key);
    }
}

#[test]
fn debris_stays_when_a_volume_dies_at_the_last_byte() {
    let mut c = Setup::new().proxied().start();
    let (key, value) = ("/k", random_bytes(&mut seeded_rng(), 3_000_000));
    let volume = c.holder(key, 1);
    c.proxies[volume].set("PUT", Fault::Cut(value.len() as u64 - 1));
    c.put(key, &value).expect_error(503, &c.names[volume]);
    c.proxies[volume].release("PUT");
    // The volume received the whole body, so its 404 proves nothing yet.
    c.allow_debris(key);
    wait_until("the other blobs are gone", || c.blobs().is_empty());
    assert_eq!(c.keys_with_debris(), [key.as_bytes()]);
    c.assert_absent(key);
    c.put(key, "the next").expect(201);
    assert_ne!(c.assert_value(key, "the next").version, 0);
}

#[test]
fn an_upload_fails_when_nginx_is_killed_in_the_middle() {
    let mut c = Cluster::new();
    for state in [KeyState::Absent, KeyState::Unlinked] {
        let key = format!("/{state:?}");
        state.prepare(&c, &key);
        let volume = c.holder(&key, 2);
        let mut conn = c.conn();
        conn.head("PUT", &key, &[("Content-Length", "3000000")]).send(vec![b'v'; 1_000_000]);
        wait_until("the volume has received data", || c.volumes[volume].temporary_files() > 0);
        c.volumes[volume].kill();
        let _ = conn.try_send(&vec![b'v'; 2_000_000]);
        let answer = conn.answer().expect_error(503, &c.names[volume]);
        assert!(answer.header("Retry-After").is_some());
        c.get(&key).expect(404);
        c.volumes[volume].start();
        state.assert_untouched(&c, &key);
    }
}

#[test]
fn a_put_fails_at_once_when_a_volume_is_down() {
    let mut c = Cluster::new();
    let volume = c.holder("/k", 0);
    c.put("/unlinked", "/unlinked").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    c.volumes[volume].stop();
    let started = Instant::now();
    for value in [vec![b'v'; 10], vec![b'v'; 3_000_000]] {
        c.put("/k", &value).expect_error(503, &c.names[volume]);
        c.put("/unlinked", &value).expect_error(503, &c.names[volume]);
    }
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert!(c.live().is_empty());
    assert_eq!(c.unlinked(), [b"/unlinked"]);
    c.volumes[volume].start();
    KeyState::Absent.assert_untouched(&c, "/k");
    KeyState::Unlinked.assert_untouched(&c, "/unlinked");
}

#[test]
fn requests_succeed_after_a_volume_restart_closed_idle_connections() {
    let mut c = Setup::new().volumes(1).start();
    let value = random_bytes(&mut seeded_rng(), 700_000);
    let warm = |c: &Cluster, n: u8| {
        for key in [format!("/{n}/a"), format!("/{n}/b"), format!("/{n}/c")] {
            c.put(&key, &value).expect(201);
            c.get(&key).expect(302);
        }
    };
    warm(&c, 0);
    c.restart_volumes(false);
    c.put("/small", "small").expect(201);
    c.restart_volumes(true);
    c.put("/large", &value).expect(201);
    c.restart_volumes(false);
    let mut conn = c.conn();
    conn.head("PUT", "/chunked", &[("Transfer-Encoding", "chunked")]);
    conn.send(chunks(&value, &[10_000])).send(LAST_CHUNK).answer().expect(201);
    c.restart_volumes(true);
    c.get("/0/a").expect(302);
    c.restart_volumes(false);
    c.ask("DELETE", "/0/a").expect(204);
    c.assert_value("/small", "small");
    c.assert_value("/large", &value);
    c.assert_value("/chunked", &value);
}

#[test]
fn the_error_for_a_full_disk_names_the_volume() {
    let mut own_disk = false;
    // Where no disk can be mounted, the proxy answers as nginx does on a full disk.
    let mut c = Cluster::start_with(Setup::new().proxied(), |c| {
        let disk = c.volumes[0].folder.clone();
        own_disk = c.mount_small_disk(&disk, "2m");
    });
    println!("the volume has its own disk: {own_disk}");
    let name = c.names[0].clone();
    let value = random_bytes(&mut seeded_rng(), 3_000_000);
    for state in ALL {
        let key = format!("/{state:?}");
        state.prepare(&c, &key);
        if !own_disk {
            c.proxies[0].set("PUT", Fault::AnswerAfter(1 << 20, 500));
        }
        let text = c.replace(&key, &value).expect_error(500, &name).text();
        assert!(text.contains("500") && text.contains("disk"), "{text}");
        let mut conn = c.conn();
        conn.head("REPLACE", &key, &[("Transfer-Encoding", "chunked")]);
        let _ = conn.try_send(&chunks(&value, &[50_000]));
        let _ = conn.try_send(LAST_CHUNK);
        conn.answer().expect_error(500, &name);
        wait_until("the volumes have dropped the upload", || c.volumes.iter().all(|v| v.temporary_files() == 0));
        c.proxies[0].release("PUT");
        state.assert_untouched(&c, &key);
    }
    // Values that fit are stored. A disk filled to its last block refuses more and loses nothing.
    let mut stored = Vec::new();
    loop {
        let key = format!("/{}", stored.len());
        if !own_disk && stored.len() == 5 {
            c.proxies[0].set("PUT", Fault::Answer(500));
        }
        let answer = c.put(&key, &value[..400_000]);
        if answer.status != 201 {
            answer.expect_error(500, &name);
            c.get(&key).expect(404);
            break;
        }
        stored.push(key);
    }
    assert!((2..6).contains(&stored.len()), "{stored:?}");
    c.put("/small", &value[..100_000]);
    c.proxies[0].release("PUT");
    for key in &stored {
        c.assert_value(key, &value[..400_000]);
        c.ask("DELETE", key).expect(204);
    }
    c.put("/room", &value[..400_000]).expect(201);
    c.assert_value("/room", &value[..400_000]);
    c.restart_master();
}

#[test]
fn refused_uploads_use_little_memory() {
    let mut c = Cluster::new();
    c.volumes[0].kill();
    let value = vec![b'v'; 4 << 20];
    std::thread::scope(|scope| {
        for client in 0..16 {
            let (c, value) = (&c, &value);
            scope.spawn(move || {
                for round in 0..20 {
                    let key = format!("/{client}-{round}");
                    c.put(key, &value[..fastrand::usize(1 << 20..value.len())]).expect(503);
                }
            });
        }
    });
    let peak = c.memory_kib("VmHWM") >> 10;
    println!("{peak} MiB");
    assert!(peak < 64, "the master used {peak} MiB");
}

#[test]
fn failed_uploads_leave_no_descriptors_open() {
    let c = Cluster::new();
    let open = || fs::read_dir(format!("/proc/{}/fd", c.master_pid())).unwrap().count();
    c.put("/k", vec![b'v'; 600_000]).expect(201);
    let before = open();
    for round in 0..60 {
        let mut conn = c.conn();
        let key = format!("/{round}");
        if round % 2 == 0 {
            conn.head("PUT", &key, &[("Content-Length", "900000")]);
        } else {
            conn.head("PUT", &key, &[("Transfer-Encoding", "chunked")]).send("f4240\r\n");
        }
        conn.send(vec![b'v'; 500_000]);
        if round % 3 == 0 {
            conn.shutdown_write().answer().expect(400);
        }
    }
    c.wait_until_cleaned();
    wait_until("the descriptors are closed", || open() < before + 20);
    c.ask("DELETE", "/k").expect(204);
    assert!(c.blobs().is_empty());
}
