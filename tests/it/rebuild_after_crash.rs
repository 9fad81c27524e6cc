//! `mkv rebuild` after crashes, and from an old copy of the index.

use std::fs;
use std::thread;
use std::time::Duration;

use crate::rebuild::{KEY, is_intact, store};
use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{copy_folder, now};
use crate::support::faulty_proxy::{Fault, FaultyProxy};
use crate::support::http_client::{Conn, target};
use crate::support::reference;

/// Sends a write without waiting for its answer.
fn begin(c: &Cluster, method: &str, value: &str) -> Conn {
    let mut conn = c.conn();
    let length = value.len().to_string();
    conn.head(method, &target(KEY), &[("Content-Length", &length)]).send(value);
    conn
}

/// A write in progress at the time of the copy may have succeeded since. `rebuild` must not leave
/// its blobs to the cleaner.
#[test]
fn a_write_that_a_copy_of_the_index_saw_unfinished_is_left_alone() {
    let mut c = Setup::new().proxied().start();
    c.put("/other", "other").expect(201);
    c.put("/replaced", "old").expect(201);
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let mut put = begin(&c, "PUT", "value");
    let mut replace = c.conn();
    replace.head("REPLACE", "/replaced", &[("Content-Length", "3")]).send("new");
    c.each_proxy(|proxy| proxy.wait_held("PUT", 2));
    copy_folder(&c.db(), &c.folder.join("copy"));
    c.each_proxy(Faulty::behave);
    put.answer().expect(201);
    replace.answer().expect(201);
    c.cleaned();
    c.stop_master();
    let (disks, dump) = (c.disks(), c.dump());
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("copy");
    let ran = c.mkv(&["rebuild", "-from", from.to_str().unwrap()]);
    let ran = ran.fails(&["see what is named above"]).says("left alone: 2");
    ran.says("no blob was found for, their records kept: 1").says("/replaced");
    c.start_master();
    c.cleaned();
    c.holds("/other", "other");
    c.disks_are(&disks);
    // The volumes alone are enough to rebuild everything.
    c.stop_master();
    fs::remove_dir_all(c.db()).unwrap();
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!(c.dump(), dump);
    c.start_master();
    c.holds(KEY, "value");
    c.holds("/replaced", "new");
}

/// The master is stopped before it has deleted the old version.
#[test]
fn a_whole_newer_version_is_what_replaced_that_of_an_old_copy() {
    let mut c = Setup::new().proxied().start();
    c.put(KEY, "old").expect(201);
    c.stop_master();
    copy_folder(&c.db(), &c.folder.join("copy"));
    c.start_master();
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::Answer(503)));
    c.replace(KEY, "new").expect(201);
    c.stop_master();
    c.each_proxy(Faulty::behave);
    assert_eq!(c.blobs().len(), 6);
    let dump = c.dump();
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("copy");
    let ran = c.mkv(&["rebuild", "-rehash", "-from", from.to_str().unwrap()]).expect(0);
    ran.says("other versions of keys, not indexed: 1");
    assert_eq!(c.dump(), dump);
    c.mkv(&["verify", "-repair"]).expect(0);
    c.start_master();
    c.holds(KEY, "new");
    assert_eq!(c.blobs().len(), 3);
}

/// Both values have the same length and the plain name, but the copy's record describes the first
/// one.
#[test]
fn a_copy_of_the_index_tells_nothing_of_a_value_that_was_written_anew() {
    let mut c = Setup::new().volumes(2).start();
    c.put(KEY, "value 1").expect(201);
    c.ask("UNLINK", KEY).expect(204);
    c.stop_master();
    copy_folder(&c.db(), &c.folder.join("copy"));
    c.start_master();
    c.ask("DELETE", KEY).expect(204);
    let second = now();
    crate::support::http_client::until("the next second has come", || now() > second);
    c.put(KEY, "value 2").expect(201);
    c.stop_master();
    let dump = c.dump();
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("copy");
    c.mkv(&["rebuild", "-rehash", "-from", from.to_str().unwrap()]).expect(0);
    assert_eq!(c.dump(), dump);
    c.start_master();
    c.holds(KEY, "value 2");
}

#[test]
fn a_put_killed_before_its_flip_is_no_key_after_a_rebuild() {
    let mut c = Setup::new().proxied().start();
    c.put("/other", "other").expect(201);
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let _writer = begin(&c, "PUT", "value");
    c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
    c.kill_master();
    c.each_proxy(|proxy| {
        proxy.lose_held("PUT");
        proxy.release("PUT");
    });
    assert_eq!((c.blobs().len(), c.debris().len()), (6, 1));
    c.mkv(&["rebuild"]).expect(0).says("1 keys, 3 replicas");
    assert_eq!(c.debris().len(), 1);
    c.start_master();
    c.lacks(KEY);
    c.holds("/other", "other");
}

#[test]
fn a_replace_killed_before_its_flip_and_then_deleted_stays_deleted() {
    let mut c = Setup::new().proxied().start();
    c.put(KEY, "the old value").expect(201);
    c.put("/other", "other").expect(201);
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let _writer = begin(&c, "REPLACE", "the new one");
    c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
    c.kill_master();
    c.each_proxy(|proxy| {
        proxy.lose_held("PUT");
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
    c.each_proxy(Faulty::behave);
    c.lacks(KEY);
    c.holds("/other", "other");
}

#[test]
fn a_replace_killed_before_its_flip_leaves_the_old_value_also_after_a_rebuild() {
    let mut c = Setup::new().proxied().start();
    c.put(KEY, "the old value").expect(201);
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let _writer = begin(&c, "REPLACE", "the new one");
    c.each_proxy(|proxy| proxy.wait_held("PUT", 1));
    c.kill_master();
    c.each_proxy(|proxy| {
        proxy.lose_held("PUT");
        proxy.release("PUT");
    });
    assert_eq!(c.blobs().len(), 6);
    let (dump, debris) = (c.dump(), c.debris());
    assert!(debris[0].1 > 0 && debris.len() == 1, "{debris:?}");
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!((c.dump(), c.debris()), (dump, debris));
    c.start_master();
    assert_eq!(c.holds(KEY, "the old value").version, 0);
    c.cleaned();
    assert_eq!(c.blobs().len(), 3);
}

#[test]
fn a_rebalance_killed_before_its_last_pass_and_then_deleted_stays_deleted() {
    // The master starts with three of four volumes. The fourth then takes over a replica.
    let mut c = Setup::new().volumes(4).proxied().start();
    let all = c.names.clone();
    c.names.truncate(3);
    c.restart_master();
    let key = (0..)
        .map(|n| format!("/{n}"))
        .find(|key| reference::place(key.as_bytes(), &all, 3, 10)[0].starts_with(&all[3]))
        .unwrap();
    c.put(&key, "value").expect(201);
    c.stop_master();
    c.names = all;
    c.each_proxy(|proxy| proxy.set("DELETE", Fault::HoldRequest));
    let rebalance = c.begin(&["rebalance", "-settle", "0s"]);
    let surplus = (0..3).find(|n| !c.placed(&key).iter().any(|r| c.number(r) == *n)).unwrap();
    c.proxies[surplus].wait_held("DELETE", 1);
    rebalance.kill();
    c.each_proxy(|proxy| {
        proxy.lose_held("DELETE");
        proxy.set("DELETE", Fault::Answer(503));
    });
    assert_eq!(c.blobs().len(), 4);
    c.each_proxy(Faulty::behave);
    c.proxies[surplus].set("DELETE", Fault::Answer(503));
    c.start_master();
    assert!(c.holds(&key, "value").balanced);
    c.ask("DELETE", &key);
    c.get(&key).expect(404);
    assert_eq!(c.blobs().len(), 1);
    c.stop_master();
    c.mkv(&["rebuild"]).expect(0).says("0 keys");
    assert_eq!(c.dump(), "");
    assert_eq!(c.debris().len(), 1);
    c.start_master();
    c.get(&key).expect(404);
    c.each_proxy(Faulty::behave);
    c.lacks(&key);
}

#[test]
fn copies_that_a_killed_rebalance_had_made_are_not_replicas_after_a_rebuild() {
    let mut c = Setup::new().volumes(2).replicas(1).proxied().start();
    let all = c.names.clone();
    let moves =
        |key: &String| reference::place(key.as_bytes(), &all, 1, 10)[0].starts_with(&all[1]);
    let key = (0..).map(|n| format!("/{n}")).find(moves).unwrap();
    c.names.truncate(1);
    c.restart_master();
    c.put(&key, "value").expect(201);
    c.stop_master();
    c.names = all;
    let before = c.dump();
    c.proxies[1].set("PUT", Fault::HoldAnswer);
    let rebalance = c.begin(&["rebalance", "-settle", "0s"]);
    c.proxies[1].wait_held("PUT", 1);
    rebalance.kill();
    c.each_proxy(Faulty::behave);
    assert_eq!((c.blobs().len(), c.dump()), (2, before.clone()));
    c.mkv(&["rebuild"]).expect(0);
    assert_eq!(c.dump(), before);
    c.start_master();
    c.cleaned();
    assert_eq!(c.blobs().len(), 1);
    assert!(!c.holds(&key, "value").balanced);
}

#[test]
fn a_rebuild_killed_at_any_point_is_done_by_the_next_one() {
    let (mut c, dump) = store(Setup::new().proxied().replicas(2));
    let before = c.index_files();
    // Out of about 50 listings. Each release lets several pass.
    for listings in [1, 10, 30] {
        c.proxies[0].set("GET", Fault::HoldRequest);
        let asked = c.proxies[0].seen("GET").len();
        let rebuild = c.begin(&["rebuild", "-rehash"]);
        c.proxies[0].wait_held("GET", 1);
        while c.proxies[0].seen("GET").len() < asked + listings {
            c.proxies[0].wait_held("GET", 1);
            c.proxies[0].release_held("GET");
            thread::sleep(Duration::from_millis(3));
        }
        c.proxies[0].wait_held("GET", 1);
        rebuild.kill();
        c.proxies[0].lose_held("GET");
        c.proxies[0].release("GET");
        assert!(c.db().join("index.new").exists());
        c.index_is(&before);
    }
    c.mkv(&["rebuild"]).expect(0);
    assert_eq!(c.dump(), dump);
    assert!(!c.db().join("index.new").exists());
    is_intact(&mut c);
}

#[test]
fn a_rebuild_killed_after_the_exchange_leaves_a_whole_index() {
    let (mut c, dump) = store(Setup::new().volumes(1));
    // The state between the last two steps: the old index is still named index.new.
    c.mkv(&["rebuild"]).expect(0);
    fs::rename(c.db().join("index.old"), c.db().join("index.new")).unwrap();
    assert_eq!(c.dump(), dump);
    c.mkv(&["rebuild"]).expect(0);
    assert_eq!(c.dump(), dump);
    assert!(!c.db().join("index.new").exists() && c.db().join("index.old").exists());
    is_intact(&mut c);
}
