//! The write protocols: the master is killed after each step, and the state must match the design.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::cluster::{Cluster, Setup};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Conn, follow, wait_at_most, wait_until};
use crate::support::random::seeded_rng;
use crate::support::reference;

const KEY: &str = "/foo/été";

/// A store of three volumes behind proxies. Each volume holds a replica of every key.
fn store() -> Cluster {
    Setup::new().proxied().start()
}

/// Sends a write without waiting for its answer.
fn start_write(c: &Cluster, method: &str, value: &str) -> Conn {
    let mut conn = c.conn();
    let length = value.len().to_string();
    conn.head(method, &crate::support::http_client::target(KEY), &[("Content-Length", &length)]).send(value);
    conn
}

/// Kills and restarts the master, and holds the cleaner's first deletion.
fn kill_and_restart(c: &mut Cluster) {
    c.kill_master();
    c.each_proxy(|proxy| {
        proxy.drop_held("PUT");
        proxy.release("PUT");
        proxy.drop_held("DELETE");
        proxy.set("DELETE", Fault::HoldRequest);
    });
    c.start_master();
}

/// Checks that the cleaner deletes one write's blobs on all its volumes, under this version
/// (`None`: any version but the plain name), so that `left` blobs remain. The debris may stay for
/// some seconds more, because a 404 is no proof so soon after a crash.
fn assert_cleaner_deletes(c: &mut Cluster, version: Option<u64>, left: usize) {
    c.each_proxy(|proxy| proxy.wait_held("DELETE", 1));
    assert_eq!(c.keys_with_debris(), [KEY.as_bytes()]);
    for replica in c.placement(KEY) {
        let deleted_path = c.proxies[c.volume_index(&replica)].seen("DELETE").pop().expect("a request is held");
        let below = replica.split_once('/').map_or("", |(_, subvolume)| subvolume);
        let path = deleted_path.strip_prefix(&format!("/{below}")).expect("the replica's folder");
        let found = reference::version_of(path);
        assert_eq!(path, reference::path(KEY.as_bytes(), found));
        match version {
            Some(version) => assert_eq!(found, version, "{deleted_path}"),
            None => assert!(found > 0, "{deleted_path} has no version"),
        }
    }
    c.each_proxy(|proxy| proxy.release("DELETE"));
    wait_for_blobs(c, left);
    c.allow_debris(KEY);
}

fn wait_for_blobs(c: &Cluster, count: usize) {
    wait_until(&format!("{count} blobs are published"), || c.blobs().len() == count);
}

// PUT.

#[test]
fn a_put_killed_before_its_first_byte_leaves_only_debris() {
    let mut c = store();
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldRequest));
    let _writer = start_write(&c, "PUT", "value");
    c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
    // The debris is written before any volume is contacted.
    assert_eq!(c.keys_with_debris(), [KEY.as_bytes()]);
    assert!(c.live().is_empty());
    c.get(KEY).expect(404);
    kill_and_restart(&mut c);
    c.get(KEY).expect(404);
    assert!(c.live().is_empty() && c.blobs().is_empty());
    assert_cleaner_deletes(&mut c, Some(0), 0);
    c.put(KEY, "next").expect(201);
    c.assert_value(KEY, "next");
    // No blob has appeared, so the entry is dropped.
    wait_until("there is no debris", || c.keys_with_debris().is_empty());
}

#[test]
fn the_cleaner_deletes_the_replicas_of_a_put_killed_halfway() {
    for stored in [1, 2] {
        let mut c = store();
        for replica in stored..3 {
            c.proxies[c.holder(KEY, replica)].set("PUT", Fault::HoldRequest);
        }
        let _writer = start_write(&c, "PUT", "value");
        wait_for_blobs(&c, stored);
        for replica in stored..3 {
            c.proxies[c.holder(KEY, replica)].wait_held("PUT", 1);
        }
        kill_and_restart(&mut c);
        c.get(KEY).expect(404);
        assert!(c.live().is_empty());
        assert_eq!(c.blobs().len(), stored);
        assert_cleaner_deletes(&mut c, Some(0), 0);
        c.put(KEY, "next").expect(201);
        c.assert_value(KEY, "next");
    }
}

#[test]
fn a_put_killed_in_the_middle_of_its_body_publishes_nothing() {
    let mut c = store();
    let mut writer = c.conn();
    let target = crate::support::http_client::target(KEY);
    writer.head("PUT", &target, &[("Content-Length", "2000000")]).send(vec![b'v'; 1_500_000]);
    wait_until("every volume has received data", || c.volumes.iter().all(|volume| volume.temporary_files() > 0));
    kill_and_restart(&mut c);
    c.get(KEY).expect(404);
    assert_cleaner_deletes(&mut c, Some(0), 0);
    let mut writer = c.conn();
    writer.head("PUT", &target, &[("Transfer-Encoding", "chunked")]);
    writer.send(crate::support::http_client::chunks(&vec![b'v'; 1_500_000], &[100_000]));
    wait_until("every volume has received data", || c.volumes.iter().all(|volume| volume.temporary_files() > 0));
    kill_and_restart(&mut c);
    c.get(KEY).expect(404);
    c.each_proxy(|proxy| proxy.release("DELETE"));
    c.assert_absent(KEY);
}

#[test]
fn a_put_killed_before_its_flip_is_undone() {
    let mut c = store();
    c.proxies[c.holder(KEY, 1)].set("PUT", Fault::HoldAnswer);
    let _writer = start_write(&c, "PUT", "value");
    c.proxies[c.holder(KEY, 1)].wait_held("PUT", 1);
    wait_for_blobs(&c, 3);
    c.get(KEY).expect(404);
    kill_and_restart(&mut c);
    c.get(KEY).expect(404);
    assert!(c.live().is_empty());
    assert_eq!(c.blobs().len(), 3);
    assert_cleaner_deletes(&mut c, Some(0), 0);
}

#[test]
fn a_put_survives_a_kill_right_after_its_201() {
    let mut c = store();
    for round in 0..5 {
        let key = format!("{KEY}/{round}");
        c.put(&key, format!("value {round}")).expect(201);
        c.kill_master();
        c.start_master();
        assert_eq!(c.assert_value(&key, format!("value {round}")).version, 0);
        assert!(c.keys_with_debris().is_empty());
        assert_eq!(c.blobs().len(), 3 * (round + 1));
    }
}

#[test]
fn the_cleaner_clears_a_failed_put_after_a_kill() {
    let mut c = store();
    let refuses = c.holder(KEY, 2);
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::HoldRequest));
    c.proxies[refuses].set("PUT", Fault::Answer(500));
    let _writer = start_write(&c, "PUT", "value");
    c.proxies[c.holder(KEY, 0)].wait_held("DELETE", 1);
    c.proxies[c.holder(KEY, 1)].wait_held("DELETE", 1);
    kill_and_restart(&mut c);
    c.get(KEY).expect(404);
    assert_cleaner_deletes(&mut c, Some(0), 0);
    c.assert_absent(KEY);
}

#[test]
fn acknowledged_writes_survive_repeated_kills() {
    let mut random = seeded_rng();
    let mut c = Cluster::new();
    let mut written: BTreeMap<String, String> = BTreeMap::new();
    for round in 0..4 {
        let address = c.address();
        let (stop, known) = (AtomicBool::new(false), AtomicUsize::new(0));
        let results: Vec<Vec<(String, String, bool)>> = thread::scope(|scope| {
            let writers: Vec<_> = (0..4)
                .map(|writer| {
                    let (address, stop, count) = (&address, &stop, &known);
                    scope.spawn(move || {
                        let mut done = Vec::new();
                        for n in 0.. {
                            if stop.load(Ordering::Relaxed) {
                                break;
                            }
                            let (key, value) = (format!("/{round}/{writer}/{n}"), n.to_string());
                            let Ok(mut conn) = Conn::try_open(address) else { continue };
                            let length = [("Content-Length", &*value.len().to_string())];
                            let head = crate::support::http_client::head("PUT", &key, &length);
                            let sent = conn.try_send(&[&head, value.as_bytes()].concat()).is_ok();
                            let answer = conn.next_answer("PUT").ok().flatten();
                            let known = answer.is_some_and(|answer| answer.status == 201);
                            count.fetch_add(usize::from(known), Ordering::Relaxed);
                            if sent {
                                done.push((key, value, known));
                            }
                        }
                        done
                    })
                })
                .collect();
            let enough = random.usize(5..60);
            wait_until("there are enough writes", || known.load(Ordering::Relaxed) >= enough);
            c.kill_master();
            stop.store(true, Ordering::Relaxed);
            writers.into_iter().map(|writer| writer.join().expect("the thread does not panic")).collect()
        });
        c.start_master();
        for (key, value, known) in results.into_iter().flatten() {
            // A write without an acknowledgement is stored whole or not at all.
            if known || c.get(&key).status == 302 {
                written.insert(key, value);
            } else {
                c.get(&key).expect(404);
            }
        }
    }
    println!("{} writes", written.len());
    c.wait_until_cleaned();
    for (key, value) in &written {
        c.assert_value(key, value);
    }
    assert_eq!(c.live().len(), written.len());
    assert_eq!(c.blobs().len(), written.len() * 3);
}

// REPLACE.

/// Readers see the old value until the flip, whatever the volumes hold.
#[test]
fn a_replace_killed_before_its_flip_leaves_the_old_value() {
    for fault in [Fault::HoldRequest, Fault::HoldAnswer] {
        for held in [1, 3] {
            let mut c = store();
            c.put(KEY, "the old value").expect(201);
            for replica in 0..held {
                c.proxies[c.holder(KEY, replica)].set("PUT", fault);
            }
            let _writer = start_write(&c, "REPLACE", "the new one");
            for replica in 0..held {
                c.proxies[c.holder(KEY, replica)].wait_held("PUT", 1);
            }
            let stored = if fault == Fault::HoldAnswer { 3 } else { 3 - held };
            wait_for_blobs(&c, 3 + stored);
            assert_eq!(c.assert_value(KEY, "the old value").version, 0);
            assert_eq!(c.keys_with_debris(), [KEY.as_bytes()]);
            kill_and_restart(&mut c);
            assert_eq!(c.assert_value(KEY, "the old value").version, 0);
            assert_cleaner_deletes(&mut c, None, 3);
            assert_eq!(c.assert_value(KEY, "the old value").version, 0);
        }
    }
}

#[test]
fn a_replace_killed_after_its_flip_keeps_the_new_value() {
    let mut c = store();
    c.put(KEY, "the old value").expect(201);
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::HoldRequest));
    c.replace(KEY, "the new one").expect(201);
    assert_eq!(c.blobs().len(), 6);
    assert_eq!(c.keys_with_debris(), [KEY.as_bytes()]);
    let version = c.assert_value(KEY, "the new one").version;
    assert!(version > 0);
    kill_and_restart(&mut c);
    assert_eq!(c.assert_value(KEY, "the new one").version, version);
    assert_eq!(c.blobs().len(), 6);
    assert_cleaner_deletes(&mut c, Some(0), 3);
    assert_eq!(c.assert_value(KEY, "the new one").version, version);
}

// DELETE.

#[test]
fn the_cleaner_finishes_a_delete_killed_halfway() {
    for gone in [0, 2] {
        let mut c = store();
        c.put(KEY, "value").expect(201);
        for replica in gone..3 {
            c.proxies[c.holder(KEY, replica)].set("DELETE", Fault::HoldRequest);
        }
        let _deleter = start_write(&c, "DELETE", "");
        for replica in gone..3 {
            c.proxies[c.holder(KEY, replica)].wait_held("DELETE", 1);
        }
        wait_for_blobs(&c, 3 - gone);
        // The index changes before any blob is deleted.
        c.get(KEY).expect(404);
        assert!(c.live().is_empty());
        assert_eq!(c.keys_with_debris(), [KEY.as_bytes()]);
        kill_and_restart(&mut c);
        c.get(KEY).expect(404);
        assert!(c.live().is_empty());
        assert_eq!(c.blobs().len(), 3 - gone);
        assert_cleaner_deletes(&mut c, Some(0), 0);
        c.assert_absent(KEY);
    }
}

#[test]
fn the_cleaner_finishes_a_killed_delete_of_an_unlinked_key() {
    let mut c = store();
    c.put(KEY, "value").expect(201);
    c.ask("UNLINK", KEY).expect(204);
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::HoldRequest));
    let _deleter = start_write(&c, "DELETE", "");
    c.each_proxy(|proxy| proxy.wait_held("DELETE", 1));
    kill_and_restart(&mut c);
    assert!(c.unlinked().is_empty());
    c.ask("RELINK", KEY).expect(404);
    assert_cleaner_deletes(&mut c, Some(0), 0);
    c.assert_absent(KEY);
}

#[test]
fn a_cleaner_killed_halfway_resumes() {
    let mut c = store();
    c.put(KEY, "value").expect(201);
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::Answer(500)));
    c.ask("DELETE", KEY).expect_error(503, "deleted");
    let last = c.holder(KEY, 0);
    for n in 0..3 {
        c.proxies[n].release("DELETE");
        if n == last {
            c.proxies[n].set("DELETE", Fault::HoldRequest);
        }
    }
    c.proxies[last].wait_held("DELETE", 1);
    wait_for_blobs(&c, 1);
    kill_and_restart(&mut c);
    assert_eq!(c.keys_with_debris(), [KEY.as_bytes()]);
    c.proxies[last].wait_held("DELETE", 1);
    c.each_proxy(|proxy| proxy.release("DELETE"));
    wait_for_blobs(&c, 0);
    c.allow_debris(KEY);
    c.assert_absent(KEY);
}

#[test]
fn an_unfinished_delete_can_be_repeated() {
    let c = store();
    c.put(KEY, "value").expect(201);
    let refuses = c.holder(KEY, 1);
    c.proxies[refuses].set("DELETE", Fault::Answer(500));
    for _ in 0..2 {
        let answer = c.ask("DELETE", KEY).expect_error(503, &c.names[refuses]);
        assert!(answer.header("Retry-After").is_some());
        c.get(KEY).expect(404);
        assert_eq!(c.blobs().len(), 1);
    }
    c.proxies[refuses].release("DELETE");
    // The cleaner may have finished first.
    let status = c.ask("DELETE", KEY).status;
    assert!([204, 404].contains(&status), "{status}");
    c.assert_absent(KEY);
    c.ask("DELETE", KEY).expect(404);
}

// UNLINK, RELINK.

#[test]
fn unlink_and_relink_survive_a_kill() {
    let mut c = store();
    c.put(KEY, "value").expect(201);
    for _ in 0..2 {
        c.ask("UNLINK", KEY).expect(204);
        c.kill_master();
        c.start_master();
        c.get(KEY).expect(404);
        assert_eq!(c.unlinked(), [KEY.as_bytes()]);
        assert_eq!(c.blobs().len(), 3);
        c.ask("RELINK", KEY).expect(204);
        c.kill_master();
        c.start_master();
        assert_eq!(c.assert_value(KEY, "value").version, 0);
        assert!(c.unlinked().is_empty() && c.keys_with_debris().is_empty());
    }
}

#[test]
fn a_put_over_an_unlinked_key_killed_before_its_flip_leaves_the_unlinked_value() {
    for fault in [Fault::HoldRequest, Fault::HoldAnswer] {
        let mut c = store();
        c.put(KEY, "unlinked").expect(201);
        c.ask("UNLINK", KEY).expect(204);
        c.each_proxy(|proxy| proxy.set("PUT", fault));
        let _writer = start_write(&c, "PUT", "the new one");
        c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
        kill_and_restart(&mut c);
        c.get(KEY).expect(404);
        assert_eq!(c.unlinked(), [KEY.as_bytes()]);
        assert_cleaner_deletes(&mut c, None, 3);
        c.ask("RELINK", KEY).expect(204);
        assert_eq!(c.assert_value(KEY, "unlinked").version, 0);
    }
}

#[test]
fn a_put_over_an_unlinked_key_killed_after_its_flip_keeps_the_new_value() {
    let mut c = store();
    c.put(KEY, "unlinked").expect(201);
    c.ask("UNLINK", KEY).expect(204);
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::HoldRequest));
    c.put(KEY, "the new one").expect(201);
    kill_and_restart(&mut c);
    assert!(c.unlinked().is_empty());
    assert!(c.assert_value(KEY, "the new one").version > 0);
    c.ask("RELINK", KEY).expect(404);
    assert_cleaner_deletes(&mut c, Some(0), 3);
    c.assert_value(KEY, "the new one");
}

// Versions and debris.

#[test]
fn a_path_never_holds_two_values() {
    let c = store();
    c.put(KEY, "value 0").expect(201);
    let mut last = 0;
    // While old blobs may remain, each write gets a version above all earlier ones.
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::Answer(500)));
    for round in 1..6 {
        c.ask("DELETE", KEY).expect_error(503, "deleted");
        let value = format!("value {round}");
        c.put(KEY, &value).expect(201);
        let version = c.assert_value(KEY, &value).version;
        assert!(version > last, "{version} after {last}");
        let micros = std::time::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64;
        assert!(version <= micros && micros - version < 600_000_000, "{version} is not the current time");
        last = version;
        assert_eq!(c.blobs().len(), 3 * (round + 1));
        assert_eq!(c.keys_with_debris(), [KEY.as_bytes()]);
    }
    c.each_proxy(|proxy| proxy.release("DELETE"));
    c.wait_until_cleaned();
    assert_eq!(c.assert_value(KEY, "value 5").version, last);
    assert_eq!(c.blobs().len(), 3);
    c.ask("DELETE", KEY).expect(204);
    // No blob of the key is left, so the plain name is free again.
    c.put(KEY, "anew").expect(201);
    assert_eq!(c.assert_value(KEY, "anew").version, 0);
}

/// The cleaner does not hold the key's lock while it waits for a volume, so no new blob may take
/// the path that it deletes.
#[test]
fn a_slow_deletion_by_the_cleaner_never_deletes_a_new_blob() {
    let c = store();
    c.put("/k", "first").expect(201);
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::HoldRequest));
    c.replace("/k", "second").expect(201);
    c.each_proxy(|proxy| proxy.wait_held("DELETE", 1));
    c.each_proxy(|proxy| proxy.let_new_pass("DELETE"));
    c.ask("DELETE", "/k").expect(204);
    c.ask("DELETE", "/k").expect(204);
    assert!(c.keys_with_debris().is_empty());
    c.put("/k", "third").expect(201);
    c.each_proxy(|proxy| proxy.release_held("DELETE"));
    wait_until("the volumes have answered", || c.proxies.iter().all(|p| p.answered("DELETE") >= 3));
    assert_ne!(c.assert_value("/k", "third").version, 0);
    c.ask("DELETE", "/k").expect(204);
    wait_until("the plain name is free again", || {
        c.put("/k", "fourth").expect(201);
        let version = c.assert_value("/k", "fourth").version;
        c.ask("DELETE", "/k").expect(204);
        version == 0
    });
}

/// One nginx worker holds the DELETE and runs it after another worker has answered the next one.
#[test]
fn an_unanswered_deletion_never_deletes_a_new_blob() {
    let c = store();
    c.put("/k", "first").expect(201);
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::HoldRequest));
    c.ask("DELETE", "/k").expect(503);
    c.each_proxy(|proxy| proxy.let_new_pass("DELETE"));
    c.ask("DELETE", "/k").expect(204);
    assert!(c.keys_with_debris().is_empty());
    c.put("/k", "second").expect(201);
    c.each_proxy(|proxy| proxy.release_held("DELETE"));
    wait_until("the volumes have run the deletions", || {
        c.proxies.iter().all(|p| p.answered("DELETE") == p.seen("DELETE").len())
    });
    assert_ne!(c.assert_value("/k", "second").version, 0);
}

#[test]
fn the_cleaner_clears_debris_on_a_volume_that_left_volumes() {
    let mut c = Setup::new().volumes(3).replicas(1).start();
    let key = "/moved";
    let old = c.holder(key, 0);
    c.put(key, "value").expect(201);
    c.volumes[old].stop();
    c.ask("DELETE", key).expect(503);
    // The volume leaves -volumes, but its debris stays.
    let all_names = c.names.clone();
    c.names.remove(old);
    c.restart_master();
    assert_eq!(c.keys_with_debris(), [key.as_bytes()]);
    c.put(key, "elsewhere").expect(201);
    let other = c.key_info(key).replicas;
    assert!(!other[0].contains(&all_names[old]));
    assert!(c.key_info(key).version > 0);
    c.volumes[old].start();
    c.wait_until_cleaned();
    assert!(c.volumes[old].files().is_empty());
    assert_eq!(follow(&c.get(key).expect(302)).text(), "elsewhere");
    c.names = all_names;
    c.restart_master();
}

/// The volume has the whole body when the master dies. It publishes the blob after the cleaner has
/// seen a 404 and another value has been written.
#[test]
fn a_blob_that_appears_after_a_kill_is_deleted_and_never_served() {
    let mut c = store();
    let late = c.holder(KEY, 1);
    c.proxies[late].set("PUT", Fault::HoldWhole);
    let _writer = start_write(&c, "PUT", "the first value");
    c.proxies[late].wait_held("PUT", 1);
    wait_for_blobs(&c, 2);
    c.kill_master();
    c.start_master();
    // The cleaner has asked the volume and got a 404.
    c.proxies[late].wait_seen("DELETE", 1);
    wait_for_blobs(&c, 0);
    c.get(KEY).expect(404);
    c.proxies[late].let_new_pass("PUT");
    c.put(KEY, "the second").expect(201);
    c.assert_value(KEY, "the second");
    c.proxies[late].release("PUT");
    let late_blob_exists = |c: &Cluster| c.blobs().into_keys().any(|blob| blob.ends_with(&plain_path()));
    wait_until("the late blob exists", || late_blob_exists(&c));
    c.assert_value(KEY, "the second");
    wait_until("the late blob is deleted", || !late_blob_exists(&c));
    c.assert_value(KEY, "the second");
}

fn plain_path() -> String {
    reference::path(KEY.as_bytes(), 0)
}

/// The volume has the whole body but its answer is lost. The blob appears after everything else is
/// over.
#[test]
fn a_blob_whose_answer_was_lost_is_never_served() {
    let mut c = store();
    let late = c.holder(KEY, 1);
    c.proxies[late].set("PUT", Fault::PublishLate);
    c.put(KEY, "value").expect_error(503, &c.names[late]);
    c.proxies[late].wait_held("PUT", 1);
    wait_until("the other replicas are deleted", || c.blobs().is_empty());
    // A 404 does not prove anything yet: the entry stays, also across a kill.
    let deletes_before = c.proxies[late].seen("DELETE").len();
    c.proxies[late].wait_seen("DELETE", deletes_before + 2);
    assert_eq!(c.keys_with_debris(), [KEY.as_bytes()]);
    c.kill_master();
    c.start_master();
    assert_eq!(c.keys_with_debris(), [KEY.as_bytes()]);
    // The next value gets its own version.
    c.put(KEY, "next").expect_error(503, &c.names[late]);
    c.proxies[late].wait_held("PUT", 2);
    c.proxies[late].drop_held("PUT");
    c.proxies[late].release("PUT");
    c.put(KEY, "third").expect(201);
    assert!(c.assert_value(KEY, "third").version > 0);
    c.allow_debris(KEY);
}

#[test]
fn the_cleaner_deletes_late_blobs_of_several_versions() {
    const VERSIONS: usize = 12;
    let c = store();
    let late = c.holder(KEY, 1);
    c.proxies[late].set("PUT", Fault::PublishLate);
    for round in 0..VERSIONS {
        c.put(KEY, format!("value {round}")).expect_error(503, &c.names[late]);
    }
    c.proxies[late].wait_held("PUT", VERSIONS);
    wait_until("the other replicas are deleted", || c.blobs().is_empty());
    // The cleaner gets a 404 before the blobs appear.
    wait_until("the cleaner has asked for all versions", || c.proxies[late].answered("DELETE") >= VERSIONS);
    // Some requests arrived twice: the master retries when a connection closes without an answer.
    let received = c.proxies[late].seen("PUT").len();
    c.proxies[late].set("DELETE", Fault::HoldAnswer);
    c.proxies[late].release("PUT");
    wait_until("the late blobs are published", || c.proxies[late].answered("PUT") == received);
    c.get(KEY).expect(404);
    assert!(c.live().is_empty());
    // The cleaner gets several answers at the same moment.
    c.proxies[late].wait_held("DELETE", 2);
    std::thread::sleep(Duration::from_millis(100));
    c.proxies[late].release("DELETE");
    wait_at_most(Duration::from_secs(15), "the late blobs are deleted", || c.blobs().is_empty());
    // Every blob was seen to be deleted, so no debris is left.
    c.assert_absent(KEY);
}
