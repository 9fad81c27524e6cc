//! Long sequences of writes, crashes and commands.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::thread;
use std::time::Duration;

use percent_encoding::percent_decode_str;

use crate::keys::unusual_keys;
use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{flip_a_bit, numbered_keys, value_of};
use crate::support::random::seeded_rng;
use crate::support::reference;

/// The expected state of the store.
struct Expected {
    live: Vec<Vec<u8>>,
    unlinked: Vec<Vec<u8>>,
    dump: String,
}

impl Expected {
    #[track_caller]
    fn assert_matches(&self, c: &mut Cluster) {
        c.assert_verified();
        c.start_master();
        assert_eq!(c.live(), self.live);
        assert_eq!(c.unlinked(), self.unlinked);
        c.assert_reads_back(&self.live);
        c.stop_master();
    }

    #[track_caller]
    fn assert_dump_unchanged(&self, c: &Cluster, step: &str) {
        let dump = c.dump();
        let differ = dump.lines().zip(self.dump.lines()).find(|(now, then)| now != then);
        assert_eq!(differ, None, "{step}");
        assert_eq!(dump.lines().count(), self.dump.lines().count(), "{step}");
    }
}

#[test]
fn a_store_with_unusual_keys_survives_all_maintenance() {
    let mut c = Setup::new().volumes(5).replicas(2).subvolumes(3).start();
    let five = c.names.clone();
    c.names.truncate(3);
    c.restart_master();
    let mut keys = unusual_keys();
    keys.extend(numbered_keys("/1000/", 1000));
    keys.extend((0..60).map(|n| format!("/été/日本語/{n}?").into_bytes()));
    keys.sort();
    c.fill(&keys);
    // Give some keys several versions.
    for key in keys.iter().step_by(20) {
        c.replace(key, "another value").expect(201);
        c.replace(key, value_of(key)).expect(201);
    }
    let unlinked: BTreeSet<&Vec<u8>> = keys.iter().skip(7).step_by(25).collect();
    unlinked.iter().for_each(|key| drop(c.ask("UNLINK", key).expect(204)));
    c.wait_until_cleaned();
    c.stop_master();
    let expected = Expected {
        live: keys.iter().filter(|key| !unlinked.contains(key)).cloned().collect(),
        unlinked: unlinked.into_iter().cloned().collect(),
        dump: c.dump(),
    };
    expected.assert_matches(&mut c);

    c.mkv(&["rebuild"]).expect(0).prints(" 0 under-replicated, 0 skipped");
    expected.assert_dump_unchanged(&c, "a rebuild");
    let other = c.folder.join("another");
    c.mkv(&["rebuild", "-rehash", "-db", other.to_str().unwrap()]).expect(0);
    let rehashed = c.mkv(&["dump", "-db", other.to_str().unwrap()]).expect(0).out;
    assert!(rehashed == expected.dump.replace("\tDELETED", "\t"), "a rebuild into another index");

    c.names = five.clone();
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    assert!((3..5).all(|n| c.volumes[n].files().len() > keys.len() / 5));
    expected.assert_matches(&mut c);
    c.mkv(&["rebuild"]).expect(0);
    c.names.truncate(3);
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    assert!((3..5).all(|n| c.volumes[n].files().is_empty()));
    expected.assert_dump_unchanged(&c, "three volumes to five and back");
    expected.assert_matches(&mut c);

    c.erase_disk(&c.volumes[1].folder.clone());
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    expected.assert_dump_unchanged(&c, "an emptied disk");
    let (replica, path) = replica_of_replaced_key(&expected.dump);
    flip_a_bit(&c.file(&replica, &path));
    c.mkv(&["verify"]).expect(0);
    c.mkv(&["verify", "-deep"]).fails(&["not whole"]).prints("with the wrong bytes: 1").prints(&path);
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    expected.assert_dump_unchanged(&c, "a flipped bit");
    expected.assert_matches(&mut c);
}

/// A model of the store: each key's value, and whether it is unlinked.
type Model = BTreeMap<Vec<u8>, (Vec<u8>, bool)>;

/// Sends a random write to the store and applies it to the model.
fn random_write(c: &Cluster, model: &mut Model, key: &[u8], random: &mut fastrand::Rng) {
    let value: Vec<u8> = (0..random.usize(1..3000)).map(|_| random.u8(..)).collect();
    let old = model.get(key).cloned();
    let live = old.as_ref().is_some_and(|(_, unlinked)| !unlinked);
    match random.u32(..10) {
        0..4 => {
            c.put(key, &value).expect(if live { 403 } else { 201 });
            if !live {
                model.insert(key.to_vec(), (value, false));
            }
        }
        4..6 => {
            c.replace(key, &value).expect(201);
            model.insert(key.to_vec(), (value, false));
        }
        6 => {
            // A deleted key may still have debris. DELETE clears it and answers 204.
            let answer = c.ask("DELETE", key);
            assert!(answer.status == 204 || old.is_none() && answer.status == 404, "{answer:?}");
            model.remove(key);
        }
        7 => {
            c.ask("UNLINK", key).expect(if live { 204 } else { 404 });
            model.entry(key.to_vec()).and_modify(|(_, unlinked)| *unlinked = true);
        }
        8 => {
            c.ask("RELINK", key).expect(if old.is_some() && !live { 204 } else { 404 });
            model.entry(key.to_vec()).and_modify(|(_, unlinked)| *unlinked = false);
        }
        _ => drop(c.ask("REBALANCE", key).expect(if old.is_some() { 204 } else { 404 })),
    }
}

/// Runs a random command on a store whose master was stopped or killed.
fn run_random_command(c: &mut Cluster, all_names: &[String], random: &mut fastrand::Rng) -> String {
    match random.u32(..6) {
        0 => {
            c.mkv(&["rebuild", "-rehash"]).expect(0);
            "rebuild".into()
        }
        1 | 2 => {
            let volumes = random.usize(2..=all_names.len());
            c.names = all_names[..volumes].to_vec();
            let (replicas, subvolumes) = (random.usize(1..=2), random.u32(1..4));
            c.setup = c.setup.clone().replicas(replicas).subvolumes(subvolumes);
            let kills = random.u32(..3);
            for _ in 0..kills {
                let rebalance = c.start_command(&["rebalance", "-settle", "0s"]);
                thread::sleep(Duration::from_millis(random.u64(5..60)));
                rebalance.kill();
            }
            c.mkv(&["rebalance", "-settle", "0s"]).expect_success_except_debris();
            format!("rebalance to {replicas} replicas on {volumes} volumes, killed {kills} times")
        }
        3 => {
            c.mkv(&["verify", "-deep", "-repair"]).expect_success_except_debris();
            "repair".into()
        }
        4 => {
            // Damage one replica of a key that has another.
            let files: Vec<_> = c.blobs().into_values().collect();
            if c.setup.replica_count() > 1 && !files.is_empty() {
                let file = &files[random.usize(..files.len())];
                if random.bool() { flip_a_bit(file) } else { fs::remove_file(file).unwrap() }
            }
            c.mkv(&["verify", "-deep", "-repair"]).expect_success_except_debris();
            "damage and repair".into()
        }
        _ => {
            let rebuild = c.start_command(&["rebuild"]);
            thread::sleep(Duration::from_millis(random.u64(5..60)));
            rebuild.kill();
            "a killed rebuild".into()
        }
    }
}

#[test]
fn a_random_history_of_writes_kills_and_commands_ends_well() {
    let mut random = seeded_rng();
    let mut c = Setup::new().volumes(4).replicas(2).flags(&["-settle", "0s"]).start();
    let (all_names, mut model) = (c.names.clone(), Model::new());
    let mut keys = unusual_keys();
    random.shuffle(&mut keys);
    keys.truncate(30);
    for round in 0..12 {
        for _ in 0..25 {
            let key = &keys[random.usize(..keys.len())];
            random_write(&c, &mut model, key, &mut random);
        }
        let killed = random.bool();
        if killed {
            c.kill_master()
        } else {
            c.stop_master()
        }
        let done = run_random_command(&mut c, &all_names, &mut random);
        println!("{round}: {}, {done}", if killed { "killed" } else { "stopped" });
        c.start_master();
        let listed = |wanted: bool| {
            let keys = model.iter().filter(|(_, (_, unlinked))| *unlinked == wanted);
            keys.map(|(key, _)| key.clone()).collect::<Vec<_>>()
        };
        assert_eq!((c.live(), c.unlinked()), (listed(false), listed(true)));
        for key in listed(false) {
            c.assert_value(&key, &model[&key].0);
        }
    }
    c.wait_until_cleaned();
    c.stop_master();
    c.assert_verified();
}

/// The second replica of a replaced key, and its blob's path.
fn replica_of_replaced_key(dump: &str) -> (String, String) {
    let line = dump.lines().find(|line| line.contains("VERS")).expect("a key was replaced");
    let (key, record) = line.split_once('\t').expect("a line has a tab");
    let key: Vec<u8> = percent_decode_str(key).collect();
    let (_, version) = record.split_once("VERS").expect("the record has a version");
    let version = u64::from_str_radix(&version[..16], 16).expect("hex digits");
    let (_, replica) = record.rsplit_once(',').expect("the record has two replicas");
    (replica.into(), reference::path(&key, version))
}
