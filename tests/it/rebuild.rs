//! `mkv rebuild`: each rule, with a history that needs it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{
    copy_folder, flip_a_bit, mtime, now, numbered, peak, record, replicas, tree,
};
use crate::support::faulty_proxy::{Fault, Faulty};
use crate::support::http_client::{Conn, target};
use crate::support::reference;

pub const KEY: &str = "/foo/été";

/// A store with values, one of them replaced and one unlinked. The master is stopped. Also returns
/// its dump.
pub fn store(setup: Setup) -> (Cluster, String) {
    let mut c = setup.start();
    c.fill(&numbered("/n/", 30));
    c.put(KEY, "value").expect(201);
    c.put("/replaced", "old").expect(201);
    c.replace("/replaced", "new").expect(201);
    c.put("/unlinked", "unlinked value").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    c.cleaned();
    c.stop_master();
    let dump = c.dump();
    (c, dump)
}

pub fn is_intact(c: &mut Cluster) {
    c.start_master();
    c.reads_back(&numbered("/n/", 30));
    c.holds(KEY, "value");
    c.holds("/replaced", "new");
    assert_eq!(c.unlinked(), [b"/unlinked"]);
    c.ask("RELINK", "/unlinked").expect(204);
    c.holds("/unlinked", "unlinked value");
}

// Recovery.

#[test]
fn the_index_that_is_rebuilt_is_the_one_that_was() {
    let (mut c, dump) = store(Setup::new().replicas(2));
    let (before, disks) = (c.index_files(), c.disks());
    c.mkv(&["rebuild"])
        .expect(0)
        .says("33 keys, 66 replicas, 0 under-replicated, 0 skipped")
        .never_says("names that are no blob");
    assert_eq!(c.dump(), dump);
    // The exchange keeps the old index until the next rebuild.
    assert_eq!(by_name(tree(&c.db().join("index.old"))), by_name(before));
    assert!(!c.db().join("index.new").exists());
    let second = c.index_files();
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!(c.dump(), dump);
    assert_eq!(by_name(tree(&c.db().join("index.old"))), by_name(second));
    c.disks_are(&disks);
    c.verified();
    is_intact(&mut c);
}

/// The files by name, without their folder.
fn by_name(files: BTreeMap<PathBuf, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    let name = |path: PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    files.into_iter().map(|(path, bytes)| (name(path), bytes)).collect()
}

#[test]
fn without_an_old_index_everything_is_found_but_what_no_blob_tells() {
    let (mut c, dump) = store(Setup::new());
    fs::remove_dir_all(c.db()).unwrap();
    c.mkv(&["rebuild"]).expect(0).says("33 keys, 99 replicas");
    let plain = c.dump();
    assert_eq!(plain.lines().count(), 33);
    assert!(!plain.contains("HASH") && !plain.contains("DELETED"));
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!(c.dump(), dump.replace("DELETED", ""));
    c.start_master();
    c.holds("/unlinked", "unlinked value");
    assert!(c.found("/replaced").md5.is_some());
}

#[test]
fn an_old_index_that_does_not_open_is_what_rebuild_is_for() {
    let (mut c, dump) = store(Setup::new().volumes(1));
    for file in c.index_files().keys().filter(|file| file.to_string_lossy().contains("MANIFEST")) {
        fs::write(file, "damaged").unwrap();
    }
    let temporary = c.folder.join("tmp");
    let before = c.index_files();
    let ran = c.mkv_command(&["rebuild"]).env("TMPDIR", &temporary).output().unwrap();
    assert!(!ran.status.success() && String::from_utf8_lossy(&ran.stderr).contains("TMPDIR"));
    c.index_is(&before);
    fs::create_dir(&temporary).unwrap();
    let command = &mut c.mkv_command(&["rebuild", "-rehash"]);
    let ran = command.env("TMPDIR", &temporary).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    let told = said.contains("unlinked states, hashes and debris are lost");
    assert!(ran.status.code() == Some(1) && told, "{said}");
    fs::remove_dir(&temporary).expect("nothing is left there");
    assert_eq!(c.dump(), dump.replace("DELETED", ""));
    c.start_master();
    c.holds(KEY, "value");
}

#[test]
fn another_index_is_carried_over_from_where_from_says_so() {
    let (mut c, dump) = store(Setup::new().volumes(2));
    copy_folder(&c.db(), &c.folder.join("backup"));
    let backup = tree(&c.folder.join("backup/index"));
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("backup");
    c.mkv(&["rebuild", "-from", from.to_str().unwrap()]).expect(0);
    assert_eq!(c.dump(), dump);
    assert_eq!(tree(&from.join("index")), backup);
    // An index given with -from must open.
    let before = c.index_files();
    c.mkv(&["rebuild", "-from", "/nowhere"]).fails(&["/nowhere"]);
    c.index_is(&before);
    is_intact(&mut c);
}

#[test]
fn a_rebuild_beside_a_running_master_is_refused() {
    let (mut c, dump) = store(Setup::new().volumes(1));
    c.start_master();
    let pid = c.master_pid().to_string();
    c.mkv(&["rebuild"]).fails(&["-db", &pid]);
    assert_eq!(c.dump(), dump);
    assert!(!c.db().join("index.new").exists() && !c.db().join("index.old").exists());
    c.holds(KEY, "value");
}

#[test]
fn rehash_reads_what_has_no_hash_and_nothing_else() {
    let mut c = Setup::new().volumes(2).flags(&["-md5sum=false"]).start();
    c.put("/without", "value").expect(201);
    c.restart_with(&[]);
    c.put("/with", "another value").expect(201);
    let files = c.files("/with");
    c.stop_master();
    let right = format!("HASH{}", reference::md5(b"another value"));
    // The hash is known, so rebuild does not read the blob. `verify -deep` finds the damage.
    let bytes = fs::read(&files[0]).unwrap();
    files.iter().for_each(|file| flip_a_bit(file));
    c.mkv(&["rebuild"]).expect(0);
    assert!(!record(&c.dump(), "/without").unwrap().contains("HASH"));
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    let dump = c.dump();
    let hash = format!("HASH{}SIZE", reference::md5(b"value"));
    assert!(record(&dump, "/without").unwrap().starts_with(&hash), "{dump}");
    assert!(record(&dump, "/with").unwrap().starts_with(&right), "{dump}");
    files.iter().for_each(|file| fs::write(file, &bytes).unwrap());
    c.start_master();
    assert_eq!(c.holds("/without", "value").md5, Some(reference::md5(b"value")));
}

#[test]
fn a_blob_that_cannot_be_read_for_its_md5_is_named_unless_another_replica_can() {
    let (mut c, _) = store(Setup::new().replicas(2));
    let path = reference::path(KEY.as_bytes(), 0);
    let files = replicas(&c.dump(), KEY).into_iter().map(|replica| c.file(&replica, &path));
    let files: Vec<_> = files.collect();
    fs::remove_dir_all(c.db()).unwrap();
    let close = |file: &PathBuf, mode| {
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
    };
    files.iter().for_each(|file| close(file, 0o000));
    c.mkv(&["rebuild", "-rehash"]).fails(&["see what is named above"]).says("md5").says("403");
    let dump = c.dump();
    assert_eq!((dump.lines().count(), dump.matches("HASH").count()), (33, 32));
    assert!(record(&dump, KEY).unwrap().starts_with("SIZE0000000000000005TIME"));
    close(&files[1], 0o644);
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!(c.dump().matches("HASH").count(), 33);
    close(&files[0], 0o644);
    c.verified();
    c.start_master();
    c.holds(KEY, "value");
}

/// The first replica is damaged. Its md5 must not become the reference for the others.
#[test]
fn rehash_takes_an_md5_that_two_replicas_have() {
    let (mut c, dump) = store(Setup::new());
    let path = reference::path(KEY.as_bytes(), 0);
    let files: Vec<_> = replicas(&dump, KEY).iter().map(|r| c.file(r, &path)).collect();
    flip_a_bit(&files[0]);
    fs::remove_dir_all(c.db()).unwrap();
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!(record(&c.dump(), KEY), record(&dump, KEY));
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    assert!(files.iter().all(|file| fs::read(file).unwrap() == b"value"));
    // With two different replicas there is no majority.
    flip_a_bit(&files[0]);
    fs::remove_file(&files[1]).unwrap();
    fs::remove_dir_all(c.db()).unwrap();
    let ran = c.mkv(&["rebuild", "-rehash"]).fails(&["see what is named above"]);
    ran.says("do not agree on it: 1");
    assert!(record(&c.dump(), KEY).unwrap().starts_with("SIZE"));
    fs::write(&files[0], "value").unwrap();
    fs::write(&files[1], "value").unwrap();
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    c.start_master();
    c.ask("UNLINK", "/unlinked").expect(204);
    c.stop_master();
    is_intact(&mut c);
}

/// A power cut on two of three volumes can leave empty files.
#[test]
fn an_empty_blob_is_no_value() {
    let (mut c, dump) = store(Setup::new());
    let path = reference::path(KEY.as_bytes(), 0);
    let files: Vec<_> = replicas(&dump, KEY).iter().map(|r| c.file(r, &path)).collect();
    files[..2].iter().for_each(|file| fs::write(file, "").unwrap());
    for old in [true, false] {
        if !old {
            fs::remove_dir_all(c.db()).unwrap();
        }
        let ran = c.mkv(&["rebuild"]).expect(0).says("1 under-replicated").says("2 skipped");
        ran.says("is empty");
        assert_eq!(replicas(&c.dump(), KEY), replicas(&dump, KEY)[2..]);
    }
    files[..2].iter().for_each(|file| fs::write(file, "value").unwrap());
    c.mkv(&["rebuild"]).expect(0);
    c.start_master();
    c.holds(KEY, "value");
}

// Unreadable volumes and listings.

#[test]
fn one_volume_down_leaves_the_index_byte_for_byte() {
    let (mut c, dump) = store(Setup::new());
    let before = c.index_files();
    for (volume, flags) in [(0, &["rebuild"][..]), (2, &["rebuild", "-rehash", "-v"])] {
        c.volumes[volume].stop();
        c.mkv(flags).fails(&[&format!("http://{}/", c.names[volume])]);
        c.index_is(&before);
        assert!(!c.db().join("index.old").exists());
        c.start_volumes();
    }
    assert_eq!(c.dump(), dump);
    is_intact(&mut c);
}

#[test]
fn a_volume_down_leaves_the_log_of_a_killed_master_too() {
    let mut c = Setup::new().volumes(2).start();
    c.put(KEY, "value").expect(201);
    c.kill_master();
    let before = c.index_files();
    c.volumes[1].stop();
    c.mkv(&["rebuild"]).fails(&[&c.names[1]]);
    c.index_is(&before);
    c.start_volumes();
    c.mkv(&["rebuild"]).expect(0);
    c.start_master();
    assert!(c.holds(KEY, "value").md5.is_some());
}

#[test]
fn a_listing_that_fails_is_an_error_with_its_url() {
    let (mut c, dump) = store(Setup::new().replicas(2));
    let replica = &replicas(&dump, KEY)[1];
    let folder = &reference::path(KEY.as_bytes(), 0)[..7];
    let before = c.index_files();
    for depth in [4, 7] {
        let closed = c.file(replica, &folder[..depth]);
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
        c.mkv(&["rebuild"]).fails(&[&format!("http://{replica}{}", &folder[..depth]), "403"]);
        c.index_is(&before);
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
    }
    c.mkv(&["rebuild"]).expect(0);
    assert_eq!(c.dump(), dump);
    is_intact(&mut c);
}

#[test]
fn an_unmounted_disk_is_an_error_that_names_it_unless_it_is_lost() {
    let (mut c, dump) = store(Setup::new().replicas(2).subvolumes(3));
    let volume = c.names[1].clone();
    let subvolume = format!("{volume}/sv01");
    let before = c.index_files();
    for (lost, disk) in [(subvolume, "sv01"), (volume, "")] {
        let disk = c.volumes[1].folder.join(disk);
        c.unmount(&disk);
        c.mkv(&["rebuild"]).fails(&[&lost, "-lost", "mounted"]);
        // -lost for another volume does not help.
        let other = &c.names[0];
        c.mkv(&["rebuild", "-lost", other]).fails(&[&lost, "-lost"]);
        c.index_is(&before);
        // An empty folder and a missing one are treated alike.
        let ran = c.mkv(&["rebuild", "-lost", &lost]).expect(0);
        let under = ran.number(" under-replicated");
        assert!(under > 0 && ran.number(" replicas") == 66 - under, "{ran:?}");
        let after = c.dump();
        assert_eq!(after.lines().count(), 33);
        assert!(!after.contains(&lost) && after.contains("DELETED"), "{after}");
        // The disk is back, and nothing was lost.
        c.mount(&disk);
        c.mkv(&["rebuild"]).expect(0);
        assert_eq!(c.dump(), dump);
        fs::remove_dir_all(c.db().join("index")).unwrap();
        copy_back(&c, &before);
    }
    is_intact(&mut c);
}

fn copy_back(c: &Cluster, index: &BTreeMap<PathBuf, Vec<u8>>) {
    fs::create_dir(c.db().join("index")).unwrap();
    for (path, bytes) in index {
        fs::write(path, bytes).unwrap();
    }
}

#[test]
fn a_volume_that_the_old_index_names_and_volumes_does_not_is_an_error_unless_it_is_lost() {
    let (mut c, dump) = store(Setup::new());
    let gone = c.names[2].clone();
    c.volumes[2].stop();
    let names = c.names.clone();
    c.names.truncate(2);
    let flags = ["rebuild", "-replicas", "2"];
    c.mkv(&flags).fails(&[&gone, "-volumes", "-lost"]).never_says("mounted");
    assert_eq!(c.dump(), dump);
    c.mkv(&[&flags[..], &["-lost", &gone]].concat()).expect(0).says("33 keys, 66 replicas");
    assert!(!c.dump().contains(&gone));
    c.names = names;
    c.start_volumes();
    c.mkv(&["rebuild"]).expect(0);
    is_intact(&mut c);
}

#[test]
fn debris_on_a_lost_volume_is_forgotten() {
    let mut c = Setup::new().proxied().start();
    c.put(KEY, "value").expect(201);
    c.put("/other", "other").expect(201);
    let holder = c.holder(KEY, 1);
    c.proxies[holder].set("DELETE", Fault::Answer(503));
    c.ask("DELETE", KEY).expect(503);
    c.stop_master();
    assert_eq!(c.debris().len(), 1);
    let lost = c.names[holder].clone();
    c.empty(&c.volumes[holder].folder.clone());
    c.mkv(&["rebuild", "-lost", &lost]).expect(0);
    assert!(c.debris().is_empty());
    c.proxies[holder].behave();
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    c.start_master();
    c.holds("/other", "other");
}

#[test]
fn keys_without_a_blob_keep_their_record_and_are_listed() {
    let (mut c, dump) = store(Setup::new().replicas(2).subvolumes(1));
    let path = reference::path(KEY.as_bytes(), 0);
    let files = replicas(&dump, KEY).into_iter().map(|replica| c.file(&replica, &path));
    let saved: Vec<_> = files.map(|file| (file.clone(), fs::read(&file).unwrap())).collect();
    saved.iter().for_each(|(file, _)| fs::remove_file(file).unwrap());
    for _ in 0..2 {
        let ran = c.mkv(&["rebuild"]).fails(&["see what is named above"]);
        ran.says("no blob was found for").says("/foo/\\xc3\\xa9t\\xc3\\xa9");
        assert_eq!(c.dump(), dump);
    }
    c.start_master();
    c.get(KEY).expect(410);
    for (file, bytes) in saved {
        fs::write(file, bytes).unwrap();
    }
    c.stop_master();
    c.mkv(&["rebuild"]).expect(0).never_says("no blob");
    assert_eq!(c.dump(), dump);
    is_intact(&mut c);
}

// Unexpected files and versions.

#[test]
fn of_unknown_keys_the_version_with_the_most_replicas_counts_and_then_the_newest() {
    let mut c = Setup::new().subvolumes(1).start();
    c.stop_master();
    fs::remove_dir_all(c.db()).unwrap();
    let names = c.names.clone();
    let path = |key: &str, version| reference::path(key.as_bytes(), version);
    // Two replicas of version 5, one of version 9.
    for (replica, version) in [(0, 5), (1, 5), (2, 9)] {
        c.plant(&names[replica], &path("/most", version), format!("version {version}"), 1000);
    }
    for (replica, version) in [(0, 0), (1, 9), (2, 5)] {
        c.plant(&names[replica], &path("/newest", version), format!("version {version}"), 1000);
    }
    for (replica, version) in [(0, 0), (1, 0), (2, 7)] {
        c.plant(&names[replica], &path("/plain", version), format!("version {version}"), 1000);
    }
    let ran = c.mkv(&["rebuild", "-v"]).expect(0);
    ran.says("3 keys, 5 replicas, 3 under-replicated, 4 skipped")
        .says("other versions of keys, not indexed: 4")
        .says(&path("/most", 9))
        .says(&path("/newest", 0))
        .says(&path("/newest", 5))
        .says(&path("/plain", 7));
    let dump = c.dump();
    let on = |key: &str, replicas: &[usize]| {
        let mut wanted = c.placed(key);
        wanted.retain(|name| replicas.iter().any(|n| names[*n] == *name));
        wanted.join(",")
    };
    let fields = "SIZE0000000000000009TIME00000000000003e8";
    let expect = |key, version: &str, replicas: &[usize]| {
        assert_eq!(record(&dump, key), Some(&*format!("{fields}{version}{}", on(key, replicas))));
    };
    expect("/most", "VERS0000000000000005", &[0, 1]);
    expect("/newest", "VERS0000000000000009", &[1]);
    expect("/plain", "", &[0, 1]);
    c.start_master();
    for (key, version) in [("/most", 9), ("/newest", 0), ("/newest", 5), ("/plain", 7)] {
        let path = path(key, version);
        names.iter().for_each(|name| drop(fs::remove_file(c.file(name, &path))));
    }
}

#[test]
fn the_version_of_the_old_index_wins_over_others() {
    let mut c = Setup::new().subvolumes(1).start();
    c.put(KEY, "first").expect(201);
    c.replace(KEY, "second").expect(201);
    c.cleaned();
    let version = c.found(KEY).version;
    let files = c.files(KEY);
    c.stop_master();
    let (dump, names) = (c.dump(), c.names.clone());
    // One replica of the indexed version is left. An older and a newer version have more.
    files[1..].iter().for_each(|file| fs::remove_file(file).unwrap());
    for name in &names {
        for other in [0, version - 1, version + 1] {
            c.plant(name, &reference::path(KEY.as_bytes(), other), "other", now());
        }
    }
    c.mkv(&["rebuild"]).expect(0).says("1 keys, 1 replicas, 1 under-replicated, 3 skipped");
    let after = c.dump();
    let (fields, _) = record(&dump, KEY).unwrap().split_once("127.").unwrap();
    assert!(record(&after, KEY).unwrap().starts_with(fields), "{after}");
    assert!(!after.contains(','));
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    c.start_master();
    assert_eq!(c.holds(KEY, "second").version, version);
    for other in [0, version - 1, version + 1] {
        let path = reference::path(KEY.as_bytes(), other);
        names.iter().for_each(|name| fs::remove_file(c.file(name, &path)).unwrap());
    }
}

/// A backup of the index is older than the volumes.
#[test]
fn a_value_written_after_the_backup_of_the_index_is_found() {
    let mut c = Setup::new().volumes(2).start();
    c.put("/replaced", "old").expect(201);
    c.put("/unlinked", "unlinked").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    c.stop_master();
    copy_folder(&c.db(), &c.folder.join("backup"));
    c.start_master();
    c.replace("/replaced", "new").expect(201);
    c.put("/added", "added").expect(201);
    c.cleaned();
    c.stop_master();
    let dump = c.dump();
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("backup");
    c.mkv(&["rebuild", "-rehash", "-from", from.to_str().unwrap()]).expect(0);
    assert_eq!(c.dump(), dump);
    c.start_master();
    c.holds("/replaced", "new");
    c.holds("/added", "added");
}

#[test]
fn of_different_sizes_under_one_name_the_majority_is_taken_and_then_the_newest() {
    let mut c = Setup::new().subvolumes(1).start();
    c.stop_master();
    fs::remove_dir_all(c.db()).unwrap();
    let names = c.names.clone();
    for (key, values) in [
        ("/majority", [("right", 1000), ("newer value", 3000), ("right", 2000)]),
        ("/newest", [("a", 1000), ("bb", 3000), ("ccc", 2000)]),
    ] {
        for (name, (value, time)) in names.iter().zip(values) {
            c.plant(name, &reference::path(key.as_bytes(), 0), value, time);
        }
    }
    let ran = c.mkv(&["rebuild", "-rehash"]).expect(0);
    ran.says("2 keys, 3 replicas, 2 under-replicated")
        .says("replicas of different lengths under one name")
        .says(&format!("11 on {}", names[1]))
        .says(&format!("3 on {}", names[2]));
    let dump = c.dump();
    let fields =
        |value: &str| format!("HASH{}SIZE{:016x}", reference::md5(value.as_bytes()), value.len());
    let majority = record(&dump, "/majority").unwrap();
    assert!(majority.starts_with(&fields("right")) && !majority.contains(&names[1]), "{dump}");
    let newest = record(&dump, "/newest").unwrap();
    assert!(newest.starts_with(&fields("bb")) && newest.ends_with(&names[1]), "{dump}");
    assert!(newest.contains(&format!("TIME{:016x}", 3000)), "{dump}");
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    c.start_master();
    c.holds("/majority", "right");
    c.holds("/newest", "bb");
}

#[test]
fn a_hash_and_a_state_carry_over_only_where_the_size_is_that_of_the_record() {
    let (mut c, dump) = store(Setup::new().volumes(1));
    let replica = &replicas(&dump, KEY)[0];
    let path = reference::path(KEY.as_bytes(), 0);
    c.plant(replica, &path, "a value of another length", 5000);
    c.mkv(&["rebuild"]).expect(0);
    let after = c.dump();
    let fields = format!("SIZE{:016x}TIME{:016x}127.", 25, 5000);
    assert!(record(&after, KEY).unwrap().starts_with(&fields), "{after}");
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    c.verified();
    c.start_master();
    c.holds(KEY, "a value of another length");
    c.replace(KEY, "value").expect(201);
    c.cleaned();
    c.stop_master();
    is_intact(&mut c);
}

#[test]
fn names_that_are_no_blob_are_counted_and_listed_and_not_indexed() {
    let (mut c, dump) = store(Setup::new().volumes(2).subvolumes(3));
    let name = c.names[0].clone();
    let path = reference::path(KEY.as_bytes(), 0);
    let strays = [
        // Beside the subvolumes, in them, and below.
        "/note.txt",
        "/sv00/note.txt",
        "/sv00/ab/note.txt",
        "/sv00/ab/cd/note.txt",
        "/sv00/AB/cd/L2E=",
        "/sv0g/ab/cd/L2E=",
        "/svAA0/0639/L2E=",
        "/00000000001",
        // Valid blob names in the wrong folder or with an invalid version.
        &format!("/sv01/ab/cd/{}", &path[7..]),
        &format!("/sv01{path}.0"),
        &format!("/sv01{path}.0006289D3A1B2C3D"),
        &format!("/sv01{path}.tmp"),
        &format!("/sv01{}~L2E", &path[..7]),
    ];
    strays.iter().for_each(|stray| c.plant(&name, stray, "stray", 1000));
    let ran = c.mkv(&["rebuild", "-v"]).expect(0).says("33 keys, 66 replicas, 0 under-replicated");
    assert!(ran.number(" skipped") >= strays.len() as u64 - 2, "{ran:?}");
    let out = ran.out.clone();
    assert!(out.contains("names that are no blob, not indexed"));
    for stray in strays {
        // A folder that cannot hold blobs is reported without its contents.
        let parts: Vec<&str> = stray.split('/').collect();
        let told = (2..=parts.len()).any(|n| {
            out.lines().any(|line| line.trim() == format!("{name}{}", parts[..n].join("/")))
        });
        assert!(told, "{stray} is missing:\n{out}");
    }
    assert_eq!(c.dump(), dump);
    // Without -v, the output shows the first names and the number of the others.
    c.mkv(&["rebuild"]).expect(0).says("-v shows all");
    c.mkv(&["verify"]).fails(&["not whole"]).says(&format!("{name}/note.txt"));
    for stray in strays {
        fs::remove_file(c.file(&name, stray)).unwrap();
    }
    fs::remove_dir_all(c.file(&name, "/svAA0")).unwrap();
    fs::remove_dir_all(c.file(&name, "/sv0g")).unwrap();
    fs::remove_dir_all(c.file(&name, "/sv00/AB")).unwrap();
    c.verified();
    is_intact(&mut c);
}

#[test]
fn temporary_files_of_nginx_are_no_names() {
    let (mut c, dump) = store(Setup::new().volumes(1));
    let leftovers = c.volumes[0].folder.join(".nginx/temp/0000000001");
    fs::write(&leftovers, "half a value").unwrap();
    c.mkv(&["rebuild"]).expect(0).says("0 skipped");
    assert_eq!(c.dump(), dump);
    fs::remove_file(leftovers).unwrap();
    is_intact(&mut c);
}

#[test]
fn a_folder_with_very_many_names_takes_no_more_memory_than_others() {
    const MANY: usize = 100_000;
    let (mut c, dump) = store(Setup::new().volumes(1));
    let (before, ran) = peak(&c, &["rebuild"]);
    ran.expect(0);
    let replica = &replicas(&dump, KEY)[0];
    let file = c.file(replica, &reference::path(KEY.as_bytes(), 0));
    let folder = file.parent().unwrap().parent().unwrap();
    let strays: Vec<_> = (0..MANY).map(|n| folder.join(format!("stray-{n:06}"))).collect();
    // A file can have some ten thousand names, and a hard link is faster to create than a file.
    for names in strays.chunks(10_000) {
        fs::File::create(&names[0]).unwrap();
        names[1..].iter().for_each(|name| fs::hard_link(&names[0], name).unwrap());
    }
    let (with, ran) = peak(&c, &["rebuild"]);
    ran.expect(0).says(&format!("names that are no blob, not indexed: {MANY}"));
    println!("{before} MiB, {with} MiB with {MANY} names more");
    assert!(with < 2 * before.max(40), "{before} MiB, {with} MiB with {MANY} names more");
    assert_eq!(c.dump(), dump);
    strays.iter().for_each(|stray| fs::remove_file(stray).unwrap());
    is_intact(&mut c);
}

#[test]
fn blobs_on_volumes_where_placement_does_not_want_them_come_after_the_others() {
    let mut c = Setup::new().volumes(4).replicas(2).subvolumes(1).start();
    c.put(KEY, "value").expect(201);
    let (placed, file) = (c.placed(KEY), c.files(KEY)[0].clone());
    let others: Vec<String> =
        c.names.iter().filter(|name| !placed.contains(name)).cloned().collect();
    c.stop_master();
    fs::remove_dir_all(c.db()).unwrap();
    let time = mtime(&file) as u64;
    for other in &others {
        c.plant(other, &reference::path(KEY.as_bytes(), 0), "value", time);
    }
    c.mkv(&["rebuild"]).expect(0).says("1 keys, 4 replicas");
    let dump = c.dump();
    assert_eq!(replicas(&dump, KEY), [placed, others].concat());
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    c.start_master();
    assert!(c.holds(KEY, "value").balanced && c.blobs().len() == 2);
}
