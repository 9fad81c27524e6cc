//! Several masters on one PostgreSQL: real servers, real volumes, short leases.

use std::collections::HashMap;
use std::fs;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::cluster::{Cluster, Master, Setup};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{self, Answer, Conn, follow, target, wait_at_most};
use crate::support::postgres::Postgres;
use crate::support::random::seeded_rng;

/// A lease, and how long a request without an answer may be carried out later, in seconds.
const SHORT: &str = "lease=2&late=3";

/// How long a takeover may take: the lease and 5 s.
const TAKEOVER: Duration = Duration::from_secs(7);

/// What clients of several masters have sent, and what they were answered.
struct Clients {
    masters: Vec<String>,
    /// For each key, the values that may be its value: acknowledged, in doubt or under way.
    sent: Vec<Mutex<HashMap<u64, u16>>>,
    count: AtomicU64,
    acknowledged: AtomicU64,
    stop: AtomicBool,
}

/// Ends the clients when it is dropped.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The length tells values of different writes apart as well.
fn value(key: usize, number: u64) -> Vec<u8> {
    format!("{key} {number} ").repeat(1 + number as usize % 700).into_bytes()
}

impl Clients {
    fn new(masters: Vec<String>, keys: usize) -> Clients {
        let sent = (0..keys).map(|_| Mutex::default()).collect();
        let (count, acknowledged, stop) = Default::default();
        Clients { masters, sent, count, acknowledged, stop }
    }

    /// One random request to one of the masters. `methods`: what may be asked.
    fn request(&self, random: &mut fastrand::Rng, methods: &[&str]) {
        let (key, master) = (random.usize(..self.sent.len()), &self.masters[random.usize(..self.masters.len())]);
        let (name, method) = (format!("/k{key}"), methods[random.usize(..methods.len())]);
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        let is_upload = matches!(method, "PUT" | "REPLACE");
        if is_upload {
            self.sent[key].lock().unwrap().insert(number, 0);
        }
        let body = is_upload.then(|| value(key, number));
        let Some(answer) = try_ask(master, method, &name, body.as_deref()) else { return };
        if is_upload {
            let mut sent = self.sent[key].lock().unwrap();
            // 503: in doubt.
            if matches!(answer.status, 201 | 503) {
                sent.insert(number, answer.status);
            } else {
                sent.remove(&number);
            }
            self.acknowledged.fetch_add(u64::from(answer.status == 201), Ordering::SeqCst);
        }
        let expected: &[u16] = match method {
            "GET" => &[302, 404, 410, 503],
            "PUT" => &[201, 403, 409, 503],
            "REPLACE" => &[201, 409, 503],
            _ => &[204, 404, 409, 410, 500, 503],
        };
        assert!(expected.contains(&answer.status), "{method} {name}: {} {}", answer.status, answer.text());
        if answer.status == 302 {
            self.check_read(key, &follow(&answer));
        }
    }

    /// A value that is read was sent and not refused. It may have been replaced between the redirect and the read.
    fn check_read(&self, key: usize, read: &Answer) {
        if read.status != 200 {
            return assert_eq!(read.status, 404);
        }
        let text = String::from_utf8(read.body.clone()).unwrap();
        let number: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
        assert!(read.body == value(key, number), "mixed bytes of key {key}");
        assert!(self.sent[key].lock().unwrap().contains_key(&number), "key {key} has a value that was refused");
    }

    /// Runs 16 clients while `meanwhile` runs.
    fn run(&self, methods: &[&str], meanwhile: impl FnOnce()) {
        let mut random = seeded_rng();
        thread::scope(|scope| {
            for _ in 0..16 {
                let mut random = random.fork();
                scope.spawn(move || {
                    while !self.stop.load(Ordering::SeqCst) {
                        self.request(&mut random, methods);
                    }
                });
            }
            // The clients end also if this panics.
            let _end = End(&self.stop);
            meanwhile();
        });
        println!(
            "{} requests, {} uploads acknowledged",
            self.count.load(Ordering::SeqCst),
            self.acknowledged.load(Ordering::SeqCst)
        );
    }
}

/// `None`: the connection broke.
fn try_ask(address: &str, method: &str, key: &str, body: Option<&[u8]>) -> Option<Answer> {
    let mut conn = Conn::try_open(address).ok()?;
    let length = body.map_or(0, <[u8]>::len).to_string();
    let head = http_client::head(method, &target(key), &[("Content-Length", &length)]);
    let _ = conn.try_send(&[&head, body.unwrap_or_default()].concat());
    conn.next_answer(method).ok()?
}

impl Cluster {
    fn database(&self) -> &Postgres {
        self.postgres.as_ref().expect("the index is in a database")
    }

    /// Waits until this statement counts no rows.
    #[track_caller]
    fn wait_until_none(&self, limit: Duration, rows: &str) {
        wait_at_most(limit, &format!("there are no {rows}"), || {
            self.database().ask(&format!("SELECT count(*) FROM {rows}")).trim() == "0"
        });
    }

    /// The end of a test with short times: nothing is left to delete, and all is whole.
    #[track_caller]
    fn assert_settled(&mut self) {
        self.proxies.iter().for_each(|proxy| proxy.remove_faults());
        self.wait_until_none(Duration::from_secs(40), "debris");
        self.wait_until_none(Duration::ZERO, "writing");
        self.assert_verified();
    }
}

/// An upload that is under way on another thread.
fn begin_upload(master: &Master, key: &'static str, value: &'static str) -> thread::JoinHandle<Answer> {
    let address = master.address.clone();
    thread::spawn(move || http_client::ask(&address, "PUT", key, &[], Some(value.as_bytes())))
}

fn begin_rebalance(address: &str, key: &str) -> thread::JoinHandle<Answer> {
    let (address, key) = (address.to_string(), key.to_string());
    thread::spawn(move || http_client::ask(&address, "REBALANCE", &key, &[], None))
}

/// 16 clients and two masters, on transactions of this isolation.
fn serve_16_clients(isolation: &str) {
    let setup = Setup::new().replicas(2).postgres(SHORT).flags(&["-voltimeout", "20s", "-settle", "0s"]);
    let mut c = Cluster::start_with(setup, |c| {
        let set = format!("ALTER DATABASE mkv SET default_transaction_isolation = '{isolation}'");
        c.database().ask_in("postgres", &set);
    });
    // The other one places values elsewhere, so REBALANCE has something to move.
    let mut names = c.names.clone();
    names.pop();
    let other = c.start_another(&["-volumes", &names.join(",")]);
    let clients = Clients::new(vec![c.address(), other.address.clone()], 12);
    let methods = ["PUT", "PUT", "REPLACE", "DELETE", "UNLINK", "RELINK", "GET", "GET", "REBALANCE"];
    clients.run(&methods, || thread::sleep(Duration::from_secs(6)));
    assert!(clients.acknowledged.load(Ordering::SeqCst) > 100);
    c.assert_settled();
}

#[test]
fn two_masters_serve_one_store_to_16_clients() {
    serve_16_clients("read committed");
}

#[test]
fn two_masters_serve_serializable_transactions() {
    serve_16_clients("serializable");
}

#[test]
fn the_uploads_of_a_killed_master_are_taken_over() {
    let mut c = Setup::new().proxied().postgres(SHORT).start();
    let other = c.start_another(&[]);
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldWhole));
    let upload = {
        let address = other.address.clone();
        thread::spawn(move || try_ask(&address, "PUT", "/a", Some(b"of the dead")))
    };
    c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
    c.each_proxy(|proxy| proxy.let_new_pass("PUT"));
    c.put("/a", "refused").expect(409);
    assert_eq!(c.keys_with_debris(), [b"/a"]);
    drop(other);
    assert!(upload.join().unwrap().is_none());
    let killed = Instant::now();
    wait_at_most(TAKEOVER, "the key takes a PUT", || c.put("/a", "alive").status == 201);
    println!("taken over after {:.1} s", killed.elapsed().as_secs_f64());
    // The dead master's blobs arrive now.
    c.each_proxy(|proxy| proxy.release("PUT"));
    c.assert_value("/a", "alive");
    c.assert_settled();
}

#[test]
fn a_master_that_stood_still_stores_nothing_over_a_later_value() {
    let mut c = Setup::new().proxied().postgres(SHORT).start();
    let other = c.start_another(&[]);
    // Before the last chunk of its upload.
    let mut conn = Conn::open(&other.address);
    conn.head("PUT", "/early", &[("Content-Length", "9")]).send("part");
    // After it.
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let late = begin_upload(&other, "/late", "old value");
    c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
    wait_at_most(TAKEOVER, "both are under way", || c.keys_with_debris().len() == 2);
    other.freeze();
    c.each_proxy(|proxy| proxy.release("PUT"));
    for key in ["/early", "/late"] {
        wait_at_most(TAKEOVER, "the key takes a PUT", || c.put(key, "new value").status == 201);
    }
    other.thaw();
    conn.send("whole");
    conn.answer().expect_error(503, "master");
    late.join().unwrap().expect_error(503, "in doubt");
    for key in ["/early", "/late"] {
        c.assert_value(key, "new value");
    }
    // It has a new session and goes on.
    other.send("PUT", "/after", "value").expect(201);
    c.assert_settled();
}

#[test]
fn a_writer_that_was_overtaken_is_acknowledged() {
    let mut c = Setup::new().proxied().postgres(SHORT).start();
    let other = c.start_another(&[]);
    c.put("/a", "first").expect(201);
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let address = other.address.clone();
    let slow = thread::spawn(move || http_client::ask(&address, "REPLACE", "/a", &[], Some(b"slow")));
    c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
    c.each_proxy(|proxy| proxy.let_new_pass("PUT"));
    // A native writer does not pass another one; hiding the row lets it.
    c.replace("/a", "refused").expect(409);
    c.database().ask("UPDATE writing SET key = '/hidden'");
    c.replace("/a", "fast").expect(201);
    c.database().ask("UPDATE writing SET key = '/a'");
    c.each_proxy(|proxy| proxy.release("PUT"));
    slow.join().unwrap().expect(201);
    c.assert_value("/a", "fast");
    c.assert_settled();
}

/// Another rebalance makes the same copy, while the first one stands still for longer than all traces of it.
#[test]
fn a_rebalance_that_stood_still_takes_no_replica_from_a_later_one() {
    let mut c = Setup::new().replicas(2).proxied().postgres(SHORT).flags(&["-settle", "0s"]).start();
    let key = (0..).map(|n| format!("/{n}")).find(|key| c.volume_index(&c.placement(key)[0]) == 2).unwrap();
    let old = c.names[..2].join(",");
    c.start_another(&["-volumes", &old]).send("PUT", &key, "value").expect(201);
    let other = c.start_another(&[]);
    c.proxies[2].set("PUT", Fault::HoldAnswer);
    let first = begin_rebalance(&other.address, &key);
    c.proxies[2].wait_held("PUT", 1);
    other.freeze();
    c.proxies[2].release("PUT");
    c.wait_until_none(TAKEOVER, "writing");
    c.wait_until_none(Duration::from_secs(20), "debris");
    c.proxies[2].set("PUT", Fault::HoldAnswer);
    let second = begin_rebalance(&c.address(), &key);
    c.proxies[2].wait_held("PUT", 1);
    other.thaw();
    first.join().unwrap().expect_error(503, "in doubt");
    c.proxies[2].release("PUT");
    second.join().unwrap().expect(204);
    assert!(c.assert_value(&key, "value").balanced);
    drop(other);
    c.assert_settled();
}

#[test]
fn no_replica_comes_back_while_a_deletion_of_it_may_arrive() {
    let mut c = Setup::new().replicas(2).postgres(SHORT).flags(&["-settle", "0s"]).start();
    let key = (0..).map(|n| format!("/{n}")).find(|key| c.volume_index(&c.placement(key)[0]) == 2).unwrap();
    c.put(&key, "value").expect(201);
    let two = c.start_another(&["-volumes", &c.names[..2].join(",")]);
    two.send("REBALANCE", &key, "").expect(204);
    wait_at_most(TAKEOVER, "the surplus is deleted", || c.blobs().len() == 2);
    c.ask("REBALANCE", &key).expect_error(503, "in an hour");
    wait_at_most(Duration::from_secs(20), "the key can be moved back", || c.ask("REBALANCE", &key).status == 204);
    assert!(c.assert_value(&key, "value").balanced);
    drop(two);
    c.assert_settled();
}

#[test]
fn a_database_that_crashes_loses_nothing() {
    let mut c = Setup::new().postgres("lease=3&late=3").flags(&["-voltimeout", "20s"]).start();
    let other = c.start_another(&[]);
    let clients = Clients::new(vec![c.address(), other.address.clone()], 24);
    let mut postgres = c.postgres.take().unwrap();
    clients.run(&["PUT", "REPLACE", "DELETE", "GET"], || {
        for _ in 0..2 {
            thread::sleep(Duration::from_secs(2));
            postgres.crash();
            postgres.launch();
        }
        thread::sleep(Duration::from_secs(3));
    });
    c.postgres = Some(postgres);
    assert!(!c.log().contains("took this one for dead"), "a master was buried because the database was away");
    drop(other);
    c.assert_settled();
}

#[test]
fn a_synchronous_standby_takes_over_and_nothing_acknowledged_is_lost() {
    let setup = Setup::new().postgres("lease=3&late=3").flags(&["-voltimeout", "20s"]);
    let mut c = Cluster::start_with(setup, |c| {
        let folder = c.folder.clone();
        c.standby = Some(c.postgres.as_mut().unwrap().add_standby(&folder));
    });
    let other = c.start_another(&[]);
    assert!(!c.log().contains("synchronous_standby_names"), "{}", c.log());
    let clients = Clients::new(vec![c.address(), other.address.clone()], 24);
    let gap = Mutex::new(Duration::ZERO);
    let standby = c.standby.take().unwrap();
    let mut primary = c.postgres.take().unwrap();
    clients.run(&["PUT", "REPLACE", "DELETE", "GET"], || {
        thread::sleep(Duration::from_secs(2));
        // Commits wait for a standby that hears nothing, and must not be acknowledged.
        primary.freeze_sender();
        thread::sleep(Duration::from_millis(700));
        primary.crash();
        let down = Instant::now();
        standby.promote();
        let acknowledged = clients.acknowledged.load(Ordering::SeqCst);
        wait_at_most(Duration::from_secs(30), "writes go on", || {
            clients.acknowledged.load(Ordering::SeqCst) > acknowledged
        });
        *gap.lock().unwrap() = down.elapsed();
        thread::sleep(Duration::from_secs(3));
    });
    println!("no write for {:.1} s", gap.lock().unwrap().as_secs_f64());
    c.postgres = Some(standby);
    drop((primary, other));
    c.restart_master();
    c.assert_settled();
}

#[test]
fn a_database_that_hangs_costs_seconds_and_buries_nobody() {
    let mut c = Setup::new().postgres("lease=4&late=3").start();
    let other = c.start_another(&[]);
    c.put("/a", "value").expect(201);
    other.ask("GET", "/?ready").expect(200);
    c.database().freeze();
    let frozen = Instant::now();
    let gets = thread::scope(|scope| {
        let get = || {
            let begun = Instant::now();
            (other.ask("GET", "/a").status, begun.elapsed())
        };
        let all: Vec<_> = (0..40).map(|_| scope.spawn(get)).collect();
        all.into_iter().map(|get| get.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(gets.iter().all(|(status, time)| *status == 503 && *time < Duration::from_secs(8)), "{gets:?}");
    let begun = Instant::now();
    other.ask("GET", "/a").expect(503);
    assert!(begun.elapsed() < Duration::from_secs(7));
    other.ask("GET", "/?ready").expect(503);
    thread::sleep(Duration::from_secs(10).saturating_sub(frozen.elapsed()));
    c.database().thaw();
    wait_at_most(TAKEOVER, "reads go on", || other.ask("GET", "/a").status == 302);
    wait_at_most(TAKEOVER, "the master is ready", || other.ask("GET", "/?ready").status == 200);
    thread::sleep(Duration::from_secs(3));
    assert!(!c.log().contains("for dead"), "{}", c.log());
    c.assert_settled();
}

#[test]
fn masters_see_each_other_and_warn_of_other_flags() {
    let mut c = Setup::new().postgres(SHORT).start();
    let health = |address: &str| {
        let answer = http_client::ask(address, "GET", "/?health", &[], None).expect(200);
        serde_json::from_slice::<serde_json::Value>(&answer.body).expect("JSON")
    };
    let other = c.start_another(&["-subvolumes", "4"]);
    let seen = health(&other.address);
    assert_eq!(seen["masters"].as_array().unwrap().len(), 2, "{seen}");
    let warnings = seen["warnings"].to_string();
    assert!(warnings.contains("-subvolumes 10") && warnings.contains("synchronous_standby_names"), "{seen}");
    wait_at_most(TAKEOVER, "both are shown", || health(&c.address())["masters"].as_array().unwrap().len() == 2);
    assert!(c.log().contains("has other flags"));
    drop(other);
    wait_at_most(TAKEOVER, "the dead master is no longer shown", || {
        health(&c.address())["masters"].as_array().unwrap().len() == 1
    });
    c.stop_master();
    assert_eq!(c.database().ask("SELECT count(*) FROM session").trim(), "0");
}

#[test]
fn a_login_that_fails_is_named() {
    let c = Setup::new().postgres(SHORT).start();
    let url = c.db_flag();
    for (old, new, word) in [
        ("p%40ss", "guess", "password"),
        ("/mkv?", "/missing?", "does not exist"),
        ("sslmode=disable", "sslmode=verify-full", "TLS"),
    ] {
        c.mkv(&["dump", "-db", &url.replace(old, new)]).fails(&[word]);
    }
    let mut dump = c.mkv_command(&["dump", "-db", &url.replace(":p%40ss%20w%C3%B6rd", "")]);
    let output = dump.env("PGPASSWORD", "p@ss wörd").output().unwrap();
    assert!(output.status.success());
}

/// Gives the server a certificate for this address.
fn certify(c: &Cluster, address: &str) -> String {
    let home = c.folder.join("postgres");
    let (key, certificate) = (home.join("server.key"), home.join("server.crt"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=mkv"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-addext", &format!("subjectAltName=IP:{address}")])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output();
    assert!(made.unwrap().status.success());
    let owner = format!("--reference={}", home.display());
    assert!(Command::new("chown").arg(owner).args([&key, &certificate]).status().unwrap().success());
    for (setting, value) in [("ssl_cert_file", &certificate), ("ssl_key_file", &key)] {
        c.database().ask_in("postgres", &format!("ALTER SYSTEM SET {setting} = '{}'", value.display()));
    }
    c.database().ask_in("postgres", "ALTER SYSTEM SET ssl = on");
    c.database().ask_in("postgres", "SELECT pg_reload_conf()");
    certificate.to_string_lossy().into_owned()
}

#[test]
fn a_server_with_tls_is_checked() {
    let c = Setup::new().postgres(SHORT).start();
    let plain = c.db_flag();
    let trusted = format!("sslmode=verify-full&sslrootcert={}", certify(&c, &c.host));
    let url = plain.replace("sslmode=disable", &trusted);
    wait_at_most(TAKEOVER, "the server has TLS", || c.mkv(&["dump", "-db", &url]).code == Some(0));
    c.mkv(&["dump", "-db", &plain.replace("sslmode=disable", "sslmode=verify-full")]).fails(&["certificate"]);
    certify(&c, "192.0.2.1");
    wait_at_most(TAKEOVER, "another name is refused", || {
        let output = c.mkv(&["dump", "-db", &url]);
        output.code == Some(1) && output.err.contains("certificate")
    });
}

#[test]
fn an_index_goes_from_a_folder_to_a_database_and_back() {
    let mut c = Setup::new().replicas(2).postgres(SHORT).start();
    let keys = [&b"/a"[..], b"/b c", b"/\x00\xff\\\t\n", &[b'/'; 1024]];
    for key in keys {
        c.put(key, [b"value of ", key].concat()).expect(201);
    }
    c.ask("UNLINK", "/a").expect(204);
    let url = c.db_flag();
    let folder = c.folder.join("copy").to_string_lossy().into_owned();
    c.mkv(&["import", "-db", &folder, "-index", &url]).fails(&["stop it first"]);
    c.stop_master();
    let dump = c.dump();
    assert_eq!(dump.lines().count(), 4);
    c.mkv(&["import", "-db", &folder, "-index", &url]).expect(0).prints("imported 4 keys");
    assert_eq!(c.mkv(&["dump", "-db", &folder]).expect(0).out, dump);
    c.database().ask_in("postgres", "CREATE DATABASE second");
    let second = url.replace("/mkv?", "/second?");
    c.mkv(&["import", "-db", &second, "-index", &folder]).expect(0);
    assert_eq!(c.mkv(&["dump", "-db", &second]).expect(0).out, dump);
    c.mkv(&["import", "-db", &second, "-index", &folder]).fails(&["not empty"]);
    c.database().ask_in("postgres", "CREATE DATABASE third");
    let third = url.replace("/mkv?", "/third?");
    c.mkv(&["rebuild", "-db", &third, "-from", &url]).expect(0).prints("the new index holds 4 keys");
    assert_eq!(c.mkv(&["dump", "-db", &third]).expect(0).out, dump);
    c.start_master();
}

#[test]
fn a_database_that_is_filled_has_no_masters_and_one_with_masters_is_not_filled() {
    let mut c = Setup::new().postgres(SHORT).start();
    c.mkv(&["rebuild"]).fails(&["stop it first"]);
    c.stop_master();
    c.database().ask("UPDATE store SET format = 0");
    assert!(c.try_start_master().unwrap_err().contains("is filling this database"));
    c.mkv(&["dump"]).fails(&["is filling this database"]);
    c.database().ask("UPDATE store SET format = 7");
    assert!(c.try_start_master().unwrap_err().contains("its format is 7"));
    c.database().ask("UPDATE store SET format = 1");
    c.start_master();
}

#[test]
fn verify_repairs_and_rebalance_moves_beside_masters() {
    let mut c = Setup::new().replicas(2).postgres(SHORT).flags(&["-settle", "0s"]).start();
    for n in 0..30 {
        c.put(format!("/{n}"), format!("value {n}")).expect(201);
    }
    let lost = c.files("/7")[0].clone();
    fs::remove_file(&lost).unwrap();
    let info = c.key_info("/8");
    let elsewhere = c.names.iter().find(|name| !info.replicas.iter().any(|r| r.starts_with(*name))).unwrap();
    let surplus = format!("{elsewhere}/sv00");
    c.store_blob(&surplus, &info.path, "value 8", 1_700_000_000);
    c.mkv(&["verify"]).expect(1).prints("replicas missing").prints("surplus replicas");
    c.mkv(&["verify", "-repair"]).expect(0).prints("the store is whole");
    c.assert_value("/7", "value 7");
    assert!(!c.file(&surplus, &info.path).exists());
    c.setup = c.setup.clone().subvolumes(3);
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0).prints("30 keys");
    c.restart_master();
    for n in 0..30 {
        assert!(c.assert_value(format!("/{n}"), format!("value {n}")).balanced);
    }
    c.assert_settled();
}

#[test]
fn the_first_host_that_takes_writes_is_used() {
    let mut c = Setup::new().postgres(SHORT).start();
    let folder = c.folder.clone();
    let standby = c.postgres.as_mut().unwrap().add_standby(&folder);
    c.put("/a", "value").expect(201);
    let url = standby.url(&[c.database()], SHORT);
    assert!(c.mkv(&["dump", "-db", &url]).expect(0).out.starts_with("/a\t"));
    c.mkv(&["dump", "-db", &standby.url(&[], SHORT)]).fails(&["read-only"]);
    c.database().ask_in("postgres", "ALTER SYSTEM SET synchronous_standby_names = ''");
    c.database().ask_in("postgres", "SELECT pg_reload_conf()");
}
