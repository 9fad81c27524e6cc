//! A store over the years: everything that is done to it, one after the other; and dump.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use percent_encoding::percent_decode_str;
use rocksdb::{DB, Options, WriteBatch};

use crate::keys::strange_keys;
use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{Ran, flip_a_bit, numbered, record, value_of};
use crate::support::reference;

/// All is as it was: the records, the values for a reader and on every disk, and what is unlinked.
struct Expected {
    live: Vec<Vec<u8>>,
    unlinked: Vec<Vec<u8>>,
    dump: String,
}

impl Expected {
    #[track_caller]
    fn holds(&self, c: &mut Cluster) {
        c.verified();
        c.start_master();
        assert_eq!(c.live(), self.live);
        assert_eq!(c.unlinked(), self.unlinked);
        c.reads_back(&self.live);
        c.stop_master();
    }

    #[track_caller]
    fn is_same(&self, c: &Cluster, step: &str) {
        let dump = c.dump();
        let differ = dump.lines().zip(self.dump.lines()).find(|(now, then)| now != then);
        assert_eq!(differ, None, "{step}");
        assert_eq!(dump.lines().count(), self.dump.lines().count(), "{step}");
    }
}

#[test]
fn a_store_with_strange_names_survives_all_that_is_done_to_it() {
    let mut c = Setup::new().volumes(5).replicas(2).subvolumes(3).start();
    let five = c.names.clone();
    c.names.truncate(3);
    c.restart_master();
    let mut keys = strange_keys();
    keys.extend(numbered("/1000/", 1000));
    keys.extend((0..60).map(|n| format!("/été/日本語/{n}?").into_bytes()));
    keys.sort();
    c.fill(&keys);
    // Some have a history.
    for key in keys.iter().step_by(20) {
        c.replace(key, "another value").expect(201);
        c.replace(key, value_of(key)).expect(201);
    }
    let unlinked: BTreeSet<&Vec<u8>> = keys.iter().skip(7).step_by(25).collect();
    unlinked.iter().for_each(|key| drop(c.ask("UNLINK", key).expect(204)));
    c.cleaned();
    c.stop_master();
    let expected = Expected {
        live: keys.iter().filter(|key| !unlinked.contains(key)).cloned().collect(),
        unlinked: unlinked.into_iter().cloned().collect(),
        dump: c.dump(),
    };
    expected.holds(&mut c);

    c.mkv(&["rebuild"]).expect(0).says(" 0 under-replicated, 0 skipped");
    expected.is_same(&c, "a rebuild");
    let other = c.folder.join("another");
    c.mkv(&["rebuild", "-rehash", "-db", other.to_str().unwrap()]).expect(0);
    let rehashed = c.mkv(&["dump", "-db", other.to_str().unwrap()]).expect(0).out;
    assert!(rehashed == expected.dump.replace("\tDELETED", "\t"), "a rebuild into another index");

    c.names = five.clone();
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    assert!((3..5).all(|n| c.volumes[n].files().len() > keys.len() / 5));
    expected.holds(&mut c);
    c.mkv(&["rebuild"]).expect(0);
    c.names.truncate(3);
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    assert!((3..5).all(|n| c.volumes[n].files().is_empty()));
    expected.is_same(&c, "three volumes to five and back");
    expected.holds(&mut c);

    c.empty(&c.volumes[1].folder.clone());
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    expected.is_same(&c, "an emptied disk");
    let (replica, path) = a_blob_with_a_history(&expected.dump);
    flip_a_bit(&c.file(&replica, &path));
    c.mkv(&["verify"]).expect(0);
    c.mkv(&["verify", "-deep"]).fails(&["not whole"]).says("with the wrong bytes: 1").says(&path);
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    expected.is_same(&c, "a flipped bit");
    expected.holds(&mut c);
}

/// A store as it should be: each key's value, and whether it is unlinked.
type Model = BTreeMap<Vec<u8>, (Vec<u8>, bool)>;

/// A write, and what the model says of it.
fn write(c: &Cluster, model: &mut Model, key: &[u8], random: &mut fastrand::Rng) {
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
            // Of a key that is gone there may be debris, which DELETE clears.
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

/// It did all it could: for some seconds after a crash, debris stays although its blobs are gone.
#[track_caller]
pub fn but_for_debris(ran: Ran) {
    if ran.code != Some(0) {
        let ran = ran.expect(1).says("debris").never_says(" 1 failed");
        ran.never_says("replicas").never_says("versions").never_says("does not know");
    }
}

/// What an operator may do to a store whose master is stopped, or was killed.
fn operate(c: &mut Cluster, all: &[String], random: &mut fastrand::Rng) -> String {
    match random.u32(..6) {
        0 => {
            c.mkv(&["rebuild", "-rehash"]).expect(0);
            "rebuild".into()
        }
        1 | 2 => {
            let volumes = random.usize(2..=all.len());
            c.names = all[..volumes].to_vec();
            let (replicas, subvolumes) = (random.usize(1..=2), random.u32(1..4));
            c.setup = c.setup.clone().replicas(replicas).subvolumes(subvolumes);
            let kills = random.u32(..3);
            for _ in 0..kills {
                let rebalance = c.begin(&["rebalance", "-settle", "0s"]);
                thread::sleep(Duration::from_millis(random.u64(5..60)));
                rebalance.kill();
            }
            but_for_debris(c.mkv(&["rebalance", "-settle", "0s"]));
            format!("rebalance to {replicas} replicas on {volumes} volumes, killed {kills} times")
        }
        3 => {
            but_for_debris(c.mkv(&["verify", "-deep", "-repair"]));
            "repair".into()
        }
        4 => {
            // Where a key has a replica left.
            let files: Vec<_> = c.blobs().into_values().collect();
            if c.setup.replica_count() > 1 && !files.is_empty() {
                let file = &files[random.usize(..files.len())];
                if random.bool() { flip_a_bit(file) } else { fs::remove_file(file).unwrap() }
            }
            but_for_debris(c.mkv(&["verify", "-deep", "-repair"]));
            "damage and repair".into()
        }
        _ => {
            let rebuild = c.begin(&["rebuild"]);
            thread::sleep(Duration::from_millis(random.u64(5..60)));
            rebuild.kill();
            "a killed rebuild".into()
        }
    }
}

#[test]
fn any_history_of_writes_kills_and_commands_ends_well() {
    let mut random = crate::random();
    let mut c = Setup::new().volumes(4).replicas(2).flags(&["-settle", "0s"]).start();
    let (all, mut model) = (c.names.clone(), Model::new());
    let mut keys = strange_keys();
    random.shuffle(&mut keys);
    keys.truncate(30);
    for round in 0..12 {
        for _ in 0..25 {
            let key = &keys[random.usize(..keys.len())];
            write(&c, &mut model, key, &mut random);
        }
        let killed = random.bool();
        if killed {
            c.kill_master()
        } else {
            c.stop_master()
        }
        let done = operate(&mut c, &all, &mut random);
        println!("{round}: {}, {done}", if killed { "killed" } else { "stopped" });
        c.start_master();
        let listed = |wanted: bool| {
            let keys = model.iter().filter(|(_, (_, unlinked))| *unlinked == wanted);
            keys.map(|(key, _)| key.clone()).collect::<Vec<_>>()
        };
        assert_eq!((c.live(), c.unlinked()), (listed(false), listed(true)));
        for key in listed(false) {
            c.holds(&key, &model[&key].0);
        }
    }
    c.cleaned();
    c.stop_master();
    c.verified();
}

/// The second replica of a key that was replaced, and the path of its blob.
fn a_blob_with_a_history(dump: &str) -> (String, String) {
    let line = dump.lines().find(|line| line.contains("VERS")).expect("a key was replaced");
    let (key, record) = line.split_once('\t').expect("a tab");
    let key: Vec<u8> = percent_decode_str(key).collect();
    let (_, version) = record.split_once("VERS").expect("it has a version");
    let version = u64::from_str_radix(&version[..16], 16).expect("hex digits");
    let (_, replica) = record.rsplit_once(',').expect("it has two replicas");
    (replica.into(), reference::path(&key, version))
}

#[test]
fn a_dump_is_sorted_and_one_line_a_key_beside_a_running_master_too() {
    let mut c = Setup::new().volumes(1).start();
    let mut keys = strange_keys();
    c.fill(&keys);
    c.ask("UNLINK", "/a").expect(204);
    keys.sort();
    let dump = c.dump();
    let lines: Vec<(Vec<u8>, &str)> = dump
        .lines()
        .map(|line| line.split_once('\t').expect("a tab"))
        .map(|(key, record)| (percent_decode_str(key).collect(), record))
        .collect();
    assert_eq!(lines.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>(), keys);
    assert!(dump.is_ascii() && dump.ends_with('\n'));
    for (key, record) in lines {
        let value = value_of(&key);
        let state = if key == b"/a" { "DELETED" } else { "" };
        let fields = format!("{state}HASH{}SIZE{:016x}TIME", reference::md5(&value), value.len());
        assert!(record.starts_with(&fields), "{}: {record}", key.escape_ascii());
        assert!(record.ends_with(&c.placed(&key).join(",")), "{record}");
    }
    c.stop_master();
    let before = c.index_files();
    assert!(c.dump() == dump);
    c.index_is(&before);
    // What was written since is in the next one.
    c.start_master();
    c.put("/zzz", "value").expect(201);
    let after = c.dump();
    let added: Vec<&str> = after.lines().filter(|line| !dump.contains(line)).collect();
    assert!(added.len() == 1 && added[0].starts_with("/zzz\tHASH"), "{added:?}");
    c.ask("DELETE", "/zzz").expect(204);
    assert!(c.dump() == dump);
    c.kill_master();
    assert!(c.dump() == dump);
}

#[test]
fn a_dump_needs_no_volumes_and_no_index_is_an_error() {
    let mut c = Setup::new().volumes(1).start();
    c.put("/a", "value").expect(201);
    c.volumes[0].stop();
    let mut dump = std::process::Command::new(env!("CARGO_BIN_EXE_mkv"));
    let dump = dump.arg("dump").arg("-db").arg(c.db()).output().unwrap();
    assert!(dump.status.success() && dump.stdout.starts_with(b"/a\tHASH"), "{dump:?}");
    let nowhere = c.folder.join("nowhere");
    c.mkv(&["dump", "-db", nowhere.to_str().unwrap()]).fails(&["nowhere"]);
    assert!(!nowhere.exists());
    c.start_volumes();
}

#[test]
fn a_record_that_does_not_decode_is_dumped_as_it_is_and_stops_what_would_act_on_it() {
    let mut c = Setup::new().volumes(1).start();
    c.put("/good", "value").expect(201);
    c.stop_master();
    let open = || {
        let index = c.db().join("index");
        DB::open_cf(&Options::default(), index, ["default", "debris"]).expect("the index opens")
    };
    open().put("/broken", "HASHxyz").unwrap();
    assert_eq!(record(&c.dump(), "/broken"), Some("HASHxyz"));
    let dump = c.dump();
    c.mkv(&["rebalance"]).fails(&["1 keys could not"]).says("/broken").says("1 keys: 0 moved");
    for command in [&["verify"][..], &["verify", "-repair"], &["rebuild"]] {
        c.mkv(command).fails(&["/broken"]);
        assert_eq!(c.dump(), dump, "{command:?}");
    }
    open().delete("/broken").unwrap();
    c.verified();
}

#[test]
fn a_million_keys_are_dumped_in_a_few_seconds() {
    let mut c = Setup::new().volumes(1).start();
    c.stop_master();
    let text = format!("HASH{}SIZE{:016x}TIME{:016x}{}", reference::md5(b"v"), 1, 1, c.names[0]);
    {
        let index = c.db().join("index");
        let index = DB::open_cf(&Options::default(), index, ["default", "debris"]).unwrap();
        let mut batch = WriteBatch::default();
        (0..1_000_000).for_each(|n| batch.put(format!("/{n:06}"), &text));
        index.write(batch).unwrap();
    }
    let begun = Instant::now();
    let dump = c.dump();
    println!("{:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(8));
    assert_eq!(dump.lines().count(), 1_000_000);
    assert!(dump.ends_with(&format!("/999999\t{text}\n")));
    fs::remove_dir_all(c.db()).unwrap();
}
