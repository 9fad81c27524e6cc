//! A follower trails a master's index, and takes its place.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::cluster::{Cluster, Setup, signal, stop_process};
use crate::support::commands::{CommandOutput, copy_folder, numbered_keys, value_of};
use crate::support::follower::{Follower, log_head};
use crate::support::http_client::{self, Conn, head, target, wait_until};

/// Writers during a promotion.
const WRITERS: usize = 8;

fn promote(c: &Cluster, db: &Path) -> CommandOutput {
    c.mkv(&["promote", "-db", db.to_str().unwrap()])
}

#[test]
fn a_follower_serves_reads_and_refuses_writes() {
    let c = Setup::new().volumes(1).start();
    let keys = numbered_keys("/k/", 50);
    c.fill(&keys);
    c.ask("UNLINK", &keys[0]).expect(204);
    let mut follower = c.start_follower(&[]);
    c.put("/later", "value").expect(201);
    follower.wait_until_caught_up(&c);
    assert_eq!(follower.dump(&c), c.dump());
    for (key, value) in [(keys[1].clone(), value_of(&keys[1])), (b"/later".to_vec(), b"value".to_vec())] {
        assert_eq!(http_client::follow(&follower.get(&key).expect(302)).expect(200).body, value);
        follower.ask("HEAD", &http_client::target(&key)).expect(302);
    }
    follower.get(&keys[0]).expect(404);
    for list in ["/?list", "/?unlinked", "/k/?list&limit=7&start=/k/0020"] {
        assert_eq!(follower.ask("GET", list).expect(200).body, c.ask_target("GET", list).expect(200).body, "{list}");
    }
    let before = log_head(&follower.address)["change"].as_u64();
    for method in ["PUT", "REPLACE", "DELETE", "UNLINK", "RELINK", "REBALANCE"] {
        follower.send(method, &keys[1], "v").expect_error(503, &format!("http://{}", c.address()));
    }
    let health: serde_json::Value = serde_json::from_slice(&follower.ask("GET", "/?health").expect(200).body).unwrap();
    assert_eq!(health["follows"]["master"], c.address());
    assert_eq!(health["follows"]["behind"], 0);
    assert!(health["follows"]["age"].as_f64().unwrap() < 5.0, "{health}");
    let metrics = follower.ask("GET", "/?metrics").expect(200).text();
    assert!(metrics.contains("mkv_follower_behind 0\n") && metrics.contains("mkv_follower_age_seconds "), "{metrics}");
    follower.ask("GET", "/?ready").expect(200);
    follower.ask("GET", "/?status").expect(200);
    assert_eq!(log_head(&follower.address)["change"].as_u64(), before, "a follower writes nothing of its own");
    assert!(follower.key_age() <= 2);

    // Reads go on without the master.
    stop_process(c.master_pid());
    wait_until("the follower's state is old", || follower.key_age() > 5);
    follower.get(&keys[1]).expect(302);
    signal(c.master_pid(), Signal::CONT);
    wait_until("the follower is current again", || follower.key_age() <= 1);
    c.mkv(&["verify", "-db", follower.db.to_str().unwrap()]).expect(0).prints("the store is whole");

    follower.stop();
    let db = follower.db.to_str().unwrap();
    for args in [&["server"][..], &["rebalance"], &["verify", "-repair"], &["rebuild"]] {
        c.mkv(&[args, &["-db", db]].concat()).fails(&["mkv follow", "mkv promote"]);
    }
    c.mkv(&["follow", "-from", "http://127.0.0.1:1"]).fails(&["is using it"]);
}

#[test]
fn a_follower_that_is_killed_again_and_again_catches_up() {
    // With -sync the log is read from the disk.
    let c = Setup::new().volumes(1).flags(&["-sync"]).start();
    c.put("/first", "value").expect(201);
    let mut follower = c.start_follower(&[]);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                c.replace(format!("/k/{}", n % 100), format!("value {n}")).expect(201);
            }
        });
        for _ in 0..8 {
            thread::sleep(Duration::from_millis(fastrand::u64(20..300)));
            follower.kill();
            follower.start(&c);
        }
        done.store(true, Ordering::Relaxed);
    });
    follower.wait_until_caught_up(&c);
    assert_eq!(follower.dump(&c), c.dump());
    assert_eq!(follower.checkpoints(), 1);
}

#[test]
fn a_follower_or_master_that_stands_still_is_caught_up_with() {
    let mut c = Setup::new().volumes(1).start();
    let mut follower = c.start_follower(&[]);
    for round in 0..3 {
        follower.freeze();
        c.fill(&numbered_keys(&format!("/frozen/{round}/"), 200));
        follower.thaw();
        stop_process(c.master_pid());
        thread::sleep(Duration::from_millis(300));
        signal(c.master_pid(), Signal::CONT);
        c.fill(&numbered_keys(&format!("/thawed/{round}/"), 200));
        // The log is read across restarts of the master, also after a kill.
        c.kill_master();
        c.start_master();
        c.fill(&numbered_keys(&format!("/restarted/{round}/"), 50));
        follower.wait_until_caught_up(&c);
        assert_eq!(follower.dump(&c), c.dump());
    }
    assert_eq!(follower.checkpoints(), 1);
    // A promoted one has all of it.
    c.stop_master();
    promote(&c, &follower.db).expect(0).prints("generation 1");
    assert_eq!(follower.ask("GET", "/thawed/2/?list").expect(200).text().matches("/thawed/").count(), 200);
    follower.stop();
    c.start_master();
}

#[test]
fn a_follower_that_is_behind_for_longer_than_the_log_fetches_a_checkpoint() {
    let mut c = Setup::new().volumes(1).flags(&["-keeplog", "0"]).start();
    let keys = numbered_keys("/k/", 100);
    c.fill(&keys);
    let follower = c.start_follower(&[]);
    follower.wait_until_caught_up(&c);
    for round in 1..=2 {
        follower.freeze();
        // The answer to its last request is on the way.
        thread::sleep(Duration::from_secs(1));
        c.fill(&numbered_keys(&format!("/missed/{round}/"), 100));
        // A start moves all changes to tables, and the log goes.
        c.restart_master();
        c.put(format!("/after/{round}"), "value").expect(201);
        follower.thaw();
        wait_until("a checkpoint is fetched", || follower.checkpoints() == 1 + round);
        follower.wait_until_caught_up(&c);
        assert_eq!(follower.dump(&c), c.dump());
    }
    follower.get("/after/2").expect(302);
    assert!(!follower.db.join("index.new").exists() && !follower.db.join("index.old").exists());
}

#[test]
fn a_master_that_has_lost_its_last_changes_is_not_followed_blindly() {
    let mut c = Setup::new().volumes(1).start();
    c.fill(&numbered_keys("/k/", 20));
    let mut follower = c.start_follower(&[]);
    follower.wait_until_caught_up(&c);
    // As after a power cut: the master's folder as it was, and then other changes under the numbers of those lost.
    c.stop_master();
    copy_folder(&c.db(), &c.folder.join("before"));
    c.start_master();
    c.fill(&numbered_keys("/lost/", 20));
    follower.wait_until_caught_up(&c);
    c.kill_master();
    fs::remove_dir_all(c.db()).unwrap();
    fs::rename(c.folder.join("before"), c.db()).unwrap();
    c.start_master();
    c.fill(&numbered_keys("/other/", 30));
    follower.wait_until_caught_up(&c);
    wait_until("a checkpoint is fetched", || follower.checkpoints() == 2);
    follower.wait_until_caught_up(&c);
    assert_eq!(follower.dump(&c), c.dump());
    // The blobs of those lost are of keys that the index does not know.
    follower.kill();
    c.stop_master();
    c.mkv(&["verify"]).expect(1).prints("does not know");
    c.mkv(&["verify", "-repair", "-strays", "-grace", "0s"]).expect(0);
    c.start_master();
}

#[test]
fn a_follower_sends_its_login_and_signs_what_it_asks_of_volumes() {
    let c = Setup::new().volumes(1).secret().start();
    c.put("/k", "value").expect(201);
    let follower = c.start_follower(&["-userpass", "me:pass"]);
    assert_eq!(http_client::follow(&follower.get("/k").expect(302)).expect(200).body, b"value");
}

fn is_master(follower: &Follower) -> bool {
    log_head(&follower.address)["follows"].is_null()
}

#[test]
fn a_promoted_folder_is_a_masters_and_an_old_master_follows_it() {
    let mut c = Setup::new().volumes(1).start();
    c.fill(&numbered_keys("/k/", 20));
    let mut follower = c.start_follower(&[]);
    follower.wait_until_caught_up(&c);
    promote(&c, &c.db()).expect(0).prints("is a master's index already");
    let nowhere = c.folder.join("nowhere");
    c.mkv(&["promote", "-db", nowhere.to_str().unwrap()]).fails(&["there is no index here"]);
    // An ordinary master's folder does not become a follower's.
    c.stop_master();
    c.mkv(&["follow", "-from", &format!("http://{}", follower.address)]).fails(&["this is a master's index"]);
    // Stopped, promoted, started with the same command.
    follower.kill();
    promote(&c, &follower.db).expect(0).prints("generation 1");
    follower.start(&c);
    assert!(is_master(&follower));
    follower.send("PUT", "/new", "value").expect(201);
    let location = follower.get("/new").expect(302).header("Location").unwrap().to_string();
    let version = u64::from_str_radix(location.rsplit('.').next().unwrap(), 16).expect("the blob has a version");
    assert_eq!(version % 16, 1, "a promoted master writes versions of its own: {location}");
    assert!(follower.get("/new").header("Key-Age").is_none());
    // The old master sees it: it follows.
    let peer = format!("http://{}", follower.address);
    c.setup.flags = vec!["-peer".into(), peer.clone()];
    c.start_master();
    c.put("/second", "value").expect_error(503, &peer);
    wait_until("the old master has the new key", || c.get("/new").status == 302);
    assert!(c.log().contains("steps down"), "{}", c.log());
    // And back: the follower is promoted while it runs.
    follower.stop();
    promote(&c, &c.db()).expect(0).prints("the follower is the master now, of generation 2");
    c.put("/second", "value").expect(201);
    follower.start(&c);
    assert!(!is_master(&follower));
    follower.wait_until_caught_up(&c);
    assert_eq!(follower.dump(&c), c.dump());
    c.setup.flags.clear();
}

#[test]
fn a_running_master_ends_when_its_peer_is_promoted() {
    let mut c = Setup::new().volumes(1).start();
    c.put("/k", "value").expect(201);
    let mut follower = c.start_follower(&[]);
    c.setup.flags = vec!["-peer".into(), format!("http://{}", follower.address)];
    c.restart_master();
    follower.wait_until_caught_up(&c);
    // Against all advice, while the old master runs.
    promote(&c, &follower.db).expect(0);
    assert!(is_master(&follower));
    assert_eq!(c.wait_for_master_exit().code(), Some(1));
    assert!(c.log().contains("was promoted in place of this master"), "{}", c.log());
    c.start_master();
    c.put("/other", "value").expect_error(503, &follower.address);
    follower.stop();
    promote(&c, &c.db()).expect(0);
    c.setup.flags.clear();
}

/// The status of a PUT, or `None` if there is no answer.
fn try_put(address: &str, key: &[u8]) -> Option<u16> {
    let (mut conn, value) = (Conn::try_open(address).ok()?, value_of(key));
    let head = head("PUT", &target(key), &[("Content-Length", &value.len().to_string())]);
    conn.try_send(&[&head, &value[..]].concat()).ok()?;
    Some(conn.next_answer("PUT").ok()??.status)
}

/// A key that was acknowledged, when, and by which of the two addresses.
struct Acknowledged {
    key: Vec<u8>,
    at: Instant,
    by: usize,
}

/// Writes new keys until told to stop. A key that one address does not take goes to the other one.
fn write(writer: usize, addresses: &[String; 2], done: &AtomicBool, written: &Mutex<Vec<Acknowledged>>) {
    let mut by = 0;
    for n in 0.. {
        let key = format!("/w/{writer}/{n}").into_bytes();
        loop {
            if done.load(Ordering::Relaxed) {
                return;
            }
            // Fewer blobs than fast clients would leave on the disks.
            thread::sleep(Duration::from_millis(5));
            match try_put(&addresses[by], &key) {
                // 403: the old master has stored it, and its answer was lost.
                Some(201 | 403) => break,
                _ => by = 1 - by,
            }
        }
        written.lock().unwrap().push(Acknowledged { key, at: Instant::now(), by });
    }
}

/// Reads keys of before from the follower until told to stop: each is there all the time.
fn read(follower: &str, keys: &[Vec<u8>], done: &AtomicBool) -> usize {
    let mut reads = 0;
    while !done.load(Ordering::Relaxed) {
        let key = &keys[reads % keys.len()];
        let answer = http_client::ask(follower, "GET", &target(key), &[], None).expect(302);
        assert_eq!(http_client::follow(&answer).expect(200).body, value_of(key));
        reads += 1;
    }
    reads
}

/// Kills the master under load and promotes the follower. Returns the writes that were acknowledged, a time at which the
/// follower was current, and how often it was read.
fn fail_over(c: &mut Cluster, follower: &Follower, before: &[Vec<u8>]) -> (Vec<Acknowledged>, Instant, usize) {
    let addresses = [c.address(), follower.address.clone()];
    let (done, written) = (AtomicBool::new(false), Mutex::default());
    let (current, reads) = thread::scope(|scope| {
        let reader = scope.spawn(|| read(&addresses[1], before, &done));
        for writer in 0..WRITERS {
            let (addresses, done, written) = (&addresses, &done, &written);
            scope.spawn(move || write(writer, addresses, done, written));
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            thread::sleep(Duration::from_secs(1));
            c.kill_master();
            // Longer than an answer of the master takes: the follower has all that it will ever have of it.
            thread::sleep(Duration::from_millis(500));
            let asked = Instant::now();
            let health = serde_json::from_slice::<serde_json::Value>(&follower.ask("GET", "/?health").body).unwrap();
            let age = health["follows"]["age"].as_f64().expect("a follower has an age");
            let blobs = c.disk_contents();
            promote(c, &follower.db).expect(0).prints("the follower is the master now");
            thread::sleep(Duration::from_secs(1));
            // No blob has changed under its name.
            let later = c.disk_contents();
            let changed: Vec<_> =
                blobs.iter().filter(|(file, blob)| later.get(*file).is_some_and(|b| b != *blob)).collect();
            assert!(changed.is_empty(), "{changed:?}");
            asked - Duration::from_secs_f64(age)
        }));
        done.store(true, Ordering::Relaxed);
        (result.unwrap(), reader.join().unwrap())
    });
    (written.into_inner().unwrap(), current, reads)
}

#[test]
fn promotion_under_load_loses_only_the_writes_of_the_last_moment() {
    let mut c = Setup::new().start();
    let before = numbered_keys("/before/", 100);
    c.fill(&before);
    let mut follower = c.start_follower(&[]);
    follower.wait_until_caught_up(&c);
    let (written, current, reads) = fail_over(&mut c, &follower, &before);
    let (kept, lost): (Vec<_>, Vec<_>) = written.iter().partition(|w| follower.get(&w.key).status == 302);
    let [old, new] = [0, 1].map(|by| written.iter().filter(|w| w.by == by).count());
    println!("acknowledged by the old master: {old}, by the promoted one: {new}; lost: {}; reads: {reads}", lost.len());
    assert!(old > 100 && new > 100 && reads > 100);
    for lost in &lost {
        assert!(lost.by == 0 && lost.at > current, "{} was lost", lost.key.escape_ascii());
    }
    // The old master comes back, sees the promoted one and follows it.
    c.setup.flags = vec!["-peer".into(), format!("http://{}", follower.address)];
    c.start_master();
    c.put("/x", "value").expect_error(503, &follower.address);
    follower.wait_until_followed_by(&c);
    for written in kept {
        assert_eq!(http_client::follow(&c.get(&written.key).expect(302)).expect(200).body, value_of(&written.key));
    }
    // What was lost or under way lies on the volumes. No replica of the index is missing or wrong.
    follower.stop();
    let deep = c.mkv(&["verify", "-deep", "-db", follower.db.to_str().unwrap()]);
    let deep = deep.does_not_print("replicas missing").does_not_print("wrong");
    assert!(lost.is_empty() || deep.out.contains("does not know"), "{deep:?}");
    promote(&c, &c.db()).expect(0).prints("generation 2");
    c.setup.flags.clear();
    c.restart_master();
    c.wait_until_cleaned();
    c.stop_master();
    c.mkv(&["verify", "-repair", "-strays", "-grace", "0s"]).expect_success_except_debris();
    c.assert_verified();
}
