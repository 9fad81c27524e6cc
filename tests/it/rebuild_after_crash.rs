//! `mkv rebuild` after crashes, and from an old copy of the index.

use std::fs;
use std::thread;
use std::time::Duration;

use crate::rebuild::{KEY, assert_intact, store};
use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{copy_folder, now};
use crate::support::faulty_proxy::{Fault, FaultyProxy};
use crate::support::http_client::{Conn, target};
use crate::support::reference;

/// Sends a write without waiting for its answer.
fn start_write(c: &Cluster, method: &str, value: &str) -> Conn {
    let mut conn = c.conn();
    let length = value.len().to_string();
    conn.head(method, &target(KEY), &[("Content-Length", &length)]).send(value);
    conn
}

/// A write in progress at the time of the copy may have succeeded since. `rebuild` must not leave
/// its blobs to the cleaner.
#[test]
fn rebuild_from_a_copy_keeps_blobs_of_writes_that_finished_later() {
    let mut c = Setup::new().proxied().start();
    c.put("/other", "other").expect(201);
    c.put("/replaced", "old").expect(201);
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let mut put = start_write(&c, "PUT", "value");
    let mut replace = c.conn();
    replace.head("REPLACE", "/replaced", &[("Content-Length", "3")]).send("new");
    c.each_proxy(|proxy| proxy.wait_held("PUT", 2));
    copy_folder(&c.db(), &c.folder.join("copy"));
    c.each_proxy(FaultyProxy::remove_faults);
    put.answer().expect(201);
    replace.answer().expect(201);
    c.wait_until_cleaned();
    c.stop_master();
    let (disks, dump) = (c.disk_contents(), c.dump());
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("copy");
    let result = c.mkv(&["rebuild", "-from", from.to_str().unwrap()]);
    let result = result.fails(&["see what is named above"]).prints("left alone: 2");
    result.prints("no blob was found for, their records kept: 1").prints("/replaced");
    c.start_master();
    c.wait_until_cleaned();
    c.assert_value("/other", "other");
    c.assert_disks(&disks);
    // The volumes alone are enough to rebuild everything.
    c.stop_master();
    fs::remove_dir_all(c.db()).unwrap();
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!(c.dump(), dump);
    c.start_master();
    c.assert_value(KEY, "value");
    c.assert_value("/replaced", "new");
}

/// The same for a write that has lost a replica since.
#[test]
fn rebuild_from_a_copy_keeps_a_later_value_that_has_lost_a_replica() {
    let mut c = Setup::new().proxied().start();
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let mut put = start_write(&c, "PUT", "value");
    c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
    copy_folder(&c.db(), &c.folder.join("copy"));
    c.each_proxy(FaultyProxy::remove_faults);
    put.answer().expect(201);
    let replica = c.files(KEY).remove(0);
    c.stop_master();
    fs::remove_file(replica).unwrap();
    let disks = c.disk_contents();
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("copy");
    c.mkv(&["rebuild", "-from", from.to_str().unwrap()]).fails(&["see what is named above"]).prints("left alone: 1");
    c.start_master();
    c.wait_until_cleaned();
    c.assert_disks(&disks);
    // The volumes alone have the value.
    c.stop_master();
    fs::remove_dir_all(c.db()).unwrap();
    c.mkv(&["rebuild"]).expect(0);
    c.start_master();
    c.assert_value(KEY, "value");
}

/// The master is stopped before it has deleted the old version.
#[test]
fn rebuild_from_a_copy_prefers_a_complete_newer_version() {
    let mut c = Setup::new().proxied().start();
    c.put(KEY, "old").expect(201);
    c.stop_master();
    copy_folder(&c.db(), &c.folder.join("copy"));
    c.start_master();
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::Answer(503)));
    c.replace(KEY, "new").expect(201);
    c.stop_master();
    c.each_proxy(FaultyProxy::remove_faults);
    assert_eq!(c.blobs().len(), 6);
    let dump = c.dump();
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("copy");
    let result = c.mkv(&["rebuild", "-rehash", "-from", from.to_str().unwrap()]).expect(0);
    result.prints("other versions of keys, not indexed: 1");
    assert_eq!(c.dump(), dump);
    c.mkv(&["verify", "-repair"]).expect(0);
    c.start_master();
    c.assert_value(KEY, "new");
    assert_eq!(c.blobs().len(), 3);
}

/// Both values have the same length and the plain name, but the copy's record describes the first
/// one.
#[test]
fn rebuild_from_a_copy_does_not_mix_up_a_value_written_again() {
    let mut c = Setup::new().volumes(2).start();
    c.put(KEY, "value 1").expect(201);
    c.ask("UNLINK", KEY).expect(204);
    c.stop_master();
    copy_folder(&c.db(), &c.folder.join("copy"));
    c.start_master();
    c.ask("DELETE", KEY).expect(204);
    let second = now();
    crate::support::http_client::wait_until("the next second has begun", || now() > second);
    c.put(KEY, "value 2").expect(201);
    c.stop_master();
    let dump = c.dump();
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("copy");
    c.mkv(&["rebuild", "-rehash", "-from", from.to_str().unwrap()]).expect(0);
    assert_eq!(c.dump(), dump);
    c.start_master();
    c.assert_value(KEY, "value 2");
}

#[test]
fn rebuild_does_not_index_a_put_killed_before_its_flip() {
    let mut c = Setup::new().proxied().start();
    c.put("/other", "other").expect(201);
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let _writer = start_write(&c, "PUT", "value");
    c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
    c.kill_master();
    c.each_proxy(|proxy| {
        proxy.drop_held("PUT");
        proxy.release("PUT");
    });
    assert_eq!((c.blobs().len(), c.debris().len()), (6, 1));
    c.mkv(&["rebuild"]).expect(0).prints("1 keys, 3 replicas");
    assert_eq!(c.debris().len(), 1);
    c.start_master();
    c.assert_absent(KEY);
    c.assert_value("/other", "other");
}

#[test]
fn rebuild_keeps_a_key_deleted_after_a_killed_replace() {
    let mut c = Setup::new().proxied().start();
    c.put(KEY, "the old value").expect(201);
    c.put("/other", "other").expect(201);
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let _writer = start_write(&c, "REPLACE", "the new one");
    c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
    c.kill_master();
    c.each_proxy(|proxy| {
        proxy.drop_held("PUT");
        proxy.release("PUT");
        proxy.set("DELETE", Fault::Answer(503));
    });
    assert_eq!(c.blobs().len(), 9);
    c.start_master();
    c.ask("DELETE", KEY).expect(503);
    c.get(KEY).expect(404);
    c.stop_master();
    let (dump, debris) = (c.dump(), c.debris());
    assert_eq!(debris.len(), 2, "both versions: {debris:?}");
    for round in 0..2 {
        c.mkv(&["rebuild"]).expect(0);
        assert_eq!((c.dump(), c.debris()), (dump.clone(), debris.clone()), "round {round}");
    }
    c.start_master();
    c.get(KEY).expect(404);
    c.each_proxy(FaultyProxy::remove_faults);
    c.assert_absent(KEY);
    c.assert_value("/other", "other");
}

#[test]
fn rebuild_keeps_the_old_value_after_a_killed_replace() {
    let mut c = Setup::new().proxied().start();
    c.put(KEY, "the old value").expect(201);
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let _writer = start_write(&c, "REPLACE", "the new one");
    c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
    c.kill_master();
    c.each_proxy(|proxy| {
        proxy.drop_held("PUT");
        proxy.release("PUT");
    });
    assert_eq!(c.blobs().len(), 6);
    let (dump, debris) = (c.dump(), c.debris());
    assert!(debris[0].1 > 0 && debris.len() == 1, "{debris:?}");
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!((c.dump(), c.debris()), (dump, debris));
    c.start_master();
    assert_eq!(c.assert_value(KEY, "the old value").version, 0);
    c.wait_until_cleaned();
    assert_eq!(c.blobs().len(), 3);
}

#[test]
fn rebuild_keeps_a_key_deleted_after_a_killed_rebalance() {
    // The master starts with three of four volumes. The fourth then takes over a replica.
    let mut c = Setup::new().volumes(4).proxied().start();
    let all_names = c.names.clone();
    c.names.truncate(3);
    c.restart_master();
    let key = (0..)
        .map(|n| format!("/{n}"))
        .find(|key| reference::place(key.as_bytes(), &all_names, 3, 10)[0].starts_with(&all_names[3]))
        .unwrap();
    c.put(&key, "value").expect(201);
    c.stop_master();
    c.names = all_names;
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::HoldRequest));
    let rebalance = c.start_command(&["rebalance", "-settle", "0s"]);
    let surplus = (0..3).find(|n| !c.placement(&key).iter().any(|r| c.volume_index(r) == *n)).unwrap();
    c.proxies[surplus].wait_held("DELETE", 1);
    rebalance.kill();
    c.each_proxy(|proxy| {
        proxy.drop_held("DELETE");
        proxy.set("DELETE", Fault::Answer(503));
    });
    assert_eq!(c.blobs().len(), 4);
    c.each_proxy(FaultyProxy::remove_faults);
    c.proxies[surplus].set("DELETE", Fault::Answer(503));
    c.start_master();
    assert!(c.assert_value(&key, "value").balanced);
    c.ask("DELETE", &key);
    c.get(&key).expect(404);
    assert_eq!(c.blobs().len(), 1);
    c.stop_master();
    c.mkv(&["rebuild"]).expect(0).prints("0 keys");
    assert_eq!(c.dump(), "");
    assert_eq!(c.debris().len(), 1);
    c.start_master();
    c.get(&key).expect(404);
    c.each_proxy(FaultyProxy::remove_faults);
    c.assert_absent(&key);
}

#[test]
fn rebuild_does_not_index_the_copies_of_a_killed_rebalance() {
    let mut c = Setup::new().volumes(2).replicas(1).proxied().start();
    let all_names = c.names.clone();
    let moves = |key: &String| reference::place(key.as_bytes(), &all_names, 1, 10)[0].starts_with(&all_names[1]);
    let key = (0..).map(|n| format!("/{n}")).find(moves).unwrap();
    c.names.truncate(1);
    c.restart_master();
    c.put(&key, "value").expect(201);
    c.stop_master();
    c.names = all_names;
    let before = c.dump();
    c.proxies[1].set("PUT", Fault::HoldAnswer);
    let rebalance = c.start_command(&["rebalance", "-settle", "0s"]);
    c.proxies[1].wait_held("PUT", 1);
    rebalance.kill();
    c.each_proxy(FaultyProxy::remove_faults);
    assert_eq!((c.blobs().len(), c.dump()), (2, before.clone()));
    c.mkv(&["rebuild"]).expect(0);
    assert_eq!(c.dump(), before);
    c.start_master();
    c.wait_until_cleaned();
    assert_eq!(c.blobs().len(), 1);
    assert!(!c.assert_value(&key, "value").balanced);
}

#[test]
fn the_next_rebuild_finishes_a_killed_one() {
    let (mut c, dump) = store(Setup::new().proxied().replicas(2));
    let before = c.index_files();
    // Out of about 50 listings. Each release lets several pass.
    for listings in [1, 10, 30] {
        c.proxies[0].set("GET", Fault::HoldRequest);
        let listed_before = c.proxies[0].seen("GET").len();
        let rebuild = c.start_command(&["rebuild", "-rehash"]);
        c.proxies[0].wait_held("GET", 1);
        while c.proxies[0].seen("GET").len() < listed_before + listings {
            c.proxies[0].wait_held("GET", 1);
            c.proxies[0].release_held("GET");
            thread::sleep(Duration::from_millis(3));
        }
        c.proxies[0].wait_held("GET", 1);
        rebuild.kill();
        c.proxies[0].drop_held("GET");
        c.proxies[0].release("GET");
        assert!(c.db().join("index.new").exists());
        c.assert_index_files(&before);
    }
    c.mkv(&["rebuild"]).expect(0);
    assert_eq!(c.dump(), dump);
    assert!(!c.db().join("index.new").exists());
    assert_intact(&mut c);
}

#[test]
fn a_rebuild_killed_after_the_exchange_leaves_a_complete_index() {
    let (mut c, dump) = store(Setup::new().volumes(1));
    // The state between the last two steps: the old index is still named index.new.
    c.mkv(&["rebuild"]).expect(0);
    fs::rename(c.db().join("index.old"), c.db().join("index.new")).unwrap();
    assert_eq!(c.dump(), dump);
    c.mkv(&["rebuild"]).expect(0);
    assert_eq!(c.dump(), dump);
    assert!(!c.db().join("index.new").exists() && c.db().join("index.old").exists());
    assert_intact(&mut c);
}
