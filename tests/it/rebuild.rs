//! `mkv rebuild`: each rule, with a history that needs it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{
    copy_folder, files_below, flip_a_bit, mtime, now, numbered_keys, peak_memory, record, replicas,
};
use crate::support::faulty_proxy::Fault;
use crate::support::reference;

pub const KEY: &str = "/foo/été";

/// A store with values, one of them replaced and one unlinked. The master is stopped. Also returns
/// its dump.
pub fn store(setup: Setup) -> (Cluster, String) {
    let mut c = setup.start();
    c.fill(&numbered_keys("/n/", 30));
    c.put(KEY, "value").expect(201);
    c.put("/replaced", "old").expect(201);
    c.replace("/replaced", "new").expect(201);
    c.put("/unlinked", "unlinked value").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    c.wait_until_cleaned();
    c.stop_master();
    let dump = c.dump();
    (c, dump)
}

pub fn assert_intact(c: &mut Cluster) {
    c.start_master();
    c.assert_reads_back(&numbered_keys("/n/", 30));
    c.assert_value(KEY, "value");
    c.assert_value("/replaced", "new");
    assert_eq!(c.unlinked(), [b"/unlinked"]);
    c.ask("RELINK", "/unlinked").expect(204);
    c.assert_value("/unlinked", "unlinked value");
}

// Recovery.

#[test]
fn rebuild_restores_the_same_index() {
    let (mut c, dump) = store(Setup::new().replicas(2));
    let (before, disks) = (c.index_files(), c.disk_contents());
    c.mkv(&["rebuild"])
        .expect(0)
        .prints("33 keys, 66 replicas, 0 under-replicated, 0 skipped")
        .does_not_print("names that are no blob");
    assert_eq!(c.dump(), dump);
    // The exchange keeps the old index until the next rebuild.
    assert_eq!(by_name(files_below(&c.db().join("index.old"))), by_name(before));
    assert!(!c.db().join("index.new").exists());
    let second = c.index_files();
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!(c.dump(), dump);
    assert_eq!(by_name(files_below(&c.db().join("index.old"))), by_name(second));
    c.assert_disks(&disks);
    c.assert_verified();
    assert_intact(&mut c);
}

/// The files by name, without their folder.
fn by_name(files: BTreeMap<PathBuf, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    let name = |path: PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    files.into_iter().map(|(path, bytes)| (name(path), bytes)).collect()
}

#[test]
fn without_an_old_index_rebuild_loses_only_hashes_and_unlinked_states() {
    let (mut c, dump) = store(Setup::new());
    fs::remove_dir_all(c.db()).unwrap();
    c.mkv(&["rebuild"]).expect(0).prints("33 keys, 99 replicas");
    let plain = c.dump();
    assert_eq!(plain.lines().count(), 33);
    assert!(!plain.contains("HASH") && !plain.contains("DELETED"));
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!(c.dump(), dump.replace("DELETED", ""));
    c.start_master();
    c.assert_value("/unlinked", "unlinked value");
    assert!(c.key_info("/replaced").md5.is_some());
}

#[test]
fn rebuild_replaces_an_index_that_does_not_open() {
    let (mut c, dump) = store(Setup::new().volumes(1));
    for file in c.index_files().keys().filter(|file| file.to_string_lossy().contains("MANIFEST")) {
        fs::write(file, "damaged").unwrap();
    }
    let temporary = c.folder.join("tmp");
    let before = c.index_files();
    let result = c.mkv_command(&["rebuild"]).env("TMPDIR", &temporary).output().unwrap();
    assert!(!result.status.success() && String::from_utf8_lossy(&result.stderr).contains("TMPDIR"));
    c.assert_index_files(&before);
    fs::create_dir(&temporary).unwrap();
    let command = &mut c.mkv_command(&["rebuild", "-rehash"]);
    let result = command.env("TMPDIR", &temporary).output().unwrap();
    let text = String::from_utf8_lossy(&result.stderr);
    let reported = text.contains("unlinked states, hashes and debris are lost");
    assert!(result.status.code() == Some(1) && reported, "{text}");
    fs::remove_dir(&temporary).expect("the folder is empty");
    assert_eq!(c.dump(), dump.replace("DELETED", ""));
    c.start_master();
    c.assert_value(KEY, "value");
}

#[test]
fn from_carries_over_another_index() {
    let (mut c, dump) = store(Setup::new().volumes(2));
    copy_folder(&c.db(), &c.folder.join("backup"));
    let backup = files_below(&c.folder.join("backup/index"));
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("backup");
    c.mkv(&["rebuild", "-from", from.to_str().unwrap()]).expect(0);
    assert_eq!(c.dump(), dump);
    assert_eq!(files_below(&from.join("index")), backup);
    // An index given with -from must open.
    let before = c.index_files();
    c.mkv(&["rebuild", "-from", "/nowhere"]).fails(&["/nowhere"]);
    c.assert_index_files(&before);
    assert_intact(&mut c);
}

#[test]
fn rebuild_fails_while_a_master_runs() {
    let (mut c, dump) = store(Setup::new().volumes(1));
    c.start_master();
    let pid = c.master_pid().to_string();
    c.mkv(&["rebuild"]).fails(&["-db", &pid]);
    assert_eq!(c.dump(), dump);
    assert!(!c.db().join("index.new").exists() && !c.db().join("index.old").exists());
    c.assert_value(KEY, "value");
}

#[test]
fn rehash_reads_only_blobs_without_a_hash() {
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
    assert_eq!(c.assert_value("/without", "value").md5, Some(reference::md5(b"value")));
}

#[test]
fn rehash_names_an_unreadable_blob_unless_another_replica_is_readable() {
    let (mut c, _) = store(Setup::new().replicas(2));
    let path = reference::path(KEY.as_bytes(), 0);
    let files = replicas(&c.dump(), KEY).into_iter().map(|replica| c.file(&replica, &path));
    let files: Vec<_> = files.collect();
    fs::remove_dir_all(c.db()).unwrap();
    let set_mode = |file: &PathBuf, mode| {
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
    };
    files.iter().for_each(|file| set_mode(file, 0o000));
    c.mkv(&["rebuild", "-rehash"]).fails(&["see what is named above"]).prints("md5").prints("403");
    let dump = c.dump();
    assert_eq!((dump.lines().count(), dump.matches("HASH").count()), (33, 32));
    assert!(record(&dump, KEY).unwrap().starts_with("SIZE0000000000000005TIME"));
    set_mode(&files[1], 0o644);
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!(c.dump().matches("HASH").count(), 33);
    set_mode(&files[0], 0o644);
    c.assert_verified();
    c.start_master();
    c.assert_value(KEY, "value");
}

/// The first replica is damaged. Its md5 must not become the reference for the others.
#[test]
fn rehash_takes_the_md5_of_the_majority() {
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
    let result = c.mkv(&["rebuild", "-rehash"]).fails(&["see what is named above"]);
    result.prints("do not agree on it: 1");
    assert!(record(&c.dump(), KEY).unwrap().starts_with("SIZE"));
    fs::write(&files[0], "value").unwrap();
    fs::write(&files[1], "value").unwrap();
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    c.start_master();
    c.ask("UNLINK", "/unlinked").expect(204);
    c.stop_master();
    assert_intact(&mut c);
}

/// A power cut on two of three volumes can leave empty files.
#[test]
fn rebuild_ignores_empty_blobs() {
    let (mut c, dump) = store(Setup::new());
    let path = reference::path(KEY.as_bytes(), 0);
    let files: Vec<_> = replicas(&dump, KEY).iter().map(|r| c.file(r, &path)).collect();
    files[..2].iter().for_each(|file| fs::write(file, "").unwrap());
    for old in [true, false] {
        if !old {
            fs::remove_dir_all(c.db()).unwrap();
        }
        let result = c.mkv(&["rebuild"]).expect(0).prints("1 under-replicated").prints("2 skipped");
        result.prints("is empty");
        assert_eq!(replicas(&c.dump(), KEY), replicas(&dump, KEY)[2..]);
    }
    files[..2].iter().for_each(|file| fs::write(file, "value").unwrap());
    c.mkv(&["rebuild"]).expect(0);
    c.start_master();
    c.assert_value(KEY, "value");
}

// Unreadable volumes and listings.

#[test]
fn rebuild_with_a_volume_down_leaves_the_index_unchanged() {
    let (mut c, dump) = store(Setup::new());
    let before = c.index_files();
    for (volume, flags) in [(0, &["rebuild"][..]), (2, &["rebuild", "-rehash", "-v"])] {
        c.volumes[volume].stop();
        c.mkv(flags).fails(&[&format!("http://{}/", c.names[volume])]);
        c.assert_index_files(&before);
        assert!(!c.db().join("index.old").exists());
        c.start_volumes();
    }
    assert_eq!(c.dump(), dump);
    assert_intact(&mut c);
}

#[test]
fn rebuild_with_a_volume_down_leaves_the_log_of_a_killed_master_unchanged() {
    let mut c = Setup::new().volumes(2).start();
    c.put(KEY, "value").expect(201);
    c.kill_master();
    let before = c.index_files();
    c.volumes[1].stop();
    c.mkv(&["rebuild"]).fails(&[&c.names[1]]);
    c.assert_index_files(&before);
    c.start_volumes();
    c.mkv(&["rebuild"]).expect(0);
    c.start_master();
    assert!(c.assert_value(KEY, "value").md5.is_some());
}

#[test]
fn rebuild_names_the_url_of_a_failed_listing() {
    let (mut c, dump) = store(Setup::new().replicas(2));
    let replica = &replicas(&dump, KEY)[1];
    let folder = &reference::path(KEY.as_bytes(), 0)[..7];
    let before = c.index_files();
    for depth in [4, 7] {
        let closed = c.file(replica, &folder[..depth]);
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
        c.mkv(&["rebuild"]).fails(&[&format!("http://{replica}{}", &folder[..depth]), "403"]);
        c.assert_index_files(&before);
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
    }
    c.mkv(&["rebuild"]).expect(0);
    assert_eq!(c.dump(), dump);
    assert_intact(&mut c);
}

#[test]
fn rebuild_fails_on_an_unmounted_disk_unless_it_is_lost() {
    let (mut c, dump) = store(Setup::new().replicas(2).subvolumes(3));
    let volume = c.names[1].clone();
    let subvolume = format!("{volume}/sv01");
    let before = c.index_files();
    for (lost, disk) in [(subvolume, "sv01"), (volume, "")] {
        let disk = c.volumes[1].folder.join(disk);
        c.simulate_unmount(&disk);
        c.mkv(&["rebuild"]).fails(&[&lost, "-lost", "mounted"]);
        // -lost for another volume does not help.
        let other = &c.names[0];
        c.mkv(&["rebuild", "-lost", other]).fails(&[&lost, "-lost"]);
        c.assert_index_files(&before);
        // An empty folder and a missing one are treated alike.
        let result = c.mkv(&["rebuild", "-lost", &lost]).expect(0);
        let under = result.number_before(" under-replicated");
        assert!(under > 0 && result.number_before(" replicas") == 66 - under, "{result:?}");
        let after = c.dump();
        assert_eq!(after.lines().count(), 33);
        assert!(!after.contains(&lost) && after.contains("DELETED"), "{after}");
        // The disk is back, and nothing was lost.
        c.simulate_mount(&disk);
        c.mkv(&["rebuild"]).expect(0);
        assert_eq!(c.dump(), dump);
        fs::remove_dir_all(c.db().join("index")).unwrap();
        restore_index(&c, &before);
    }
    assert_intact(&mut c);
}

fn restore_index(c: &Cluster, index: &BTreeMap<PathBuf, Vec<u8>>) {
    fs::create_dir(c.db().join("index")).unwrap();
    for (path, bytes) in index {
        fs::write(path, bytes).unwrap();
    }
}

#[test]
fn rebuild_fails_when_an_indexed_volume_is_missing_from_volumes_unless_it_is_lost() {
    let (mut c, dump) = store(Setup::new());
    let removed = c.names[2].clone();
    c.volumes[2].stop();
    let names = c.names.clone();
    c.names.truncate(2);
    let flags = ["rebuild", "-replicas", "2"];
    c.mkv(&flags).fails(&[&removed, "-volumes", "-lost"]).does_not_print("mounted");
    assert_eq!(c.dump(), dump);
    c.mkv(&[&flags[..], &["-lost", &removed]].concat()).expect(0).prints("33 keys, 66 replicas");
    assert!(!c.dump().contains(&removed));
    c.names = names;
    c.start_volumes();
    c.mkv(&["rebuild"]).expect(0);
    assert_intact(&mut c);
}

#[test]
fn rebuild_forgets_debris_on_a_lost_volume() {
    let mut c = Setup::new().proxied().start();
    c.put(KEY, "value").expect(201);
    c.put("/other", "other").expect(201);
    let holder = c.holder(KEY, 1);
    c.proxies[holder].set("DELETE", Fault::Answer(503));
    c.ask("DELETE", KEY).expect(503);
    c.stop_master();
    assert_eq!(c.debris().len(), 1);
    let lost = c.names[holder].clone();
    c.erase_disk(&c.volumes[holder].folder.clone());
    c.mkv(&["rebuild", "-lost", &lost]).expect(0);
    assert!(c.debris().is_empty());
    c.proxies[holder].remove_faults();
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    c.start_master();
    c.assert_value("/other", "other");
}

#[test]
fn rebuild_keeps_and_lists_keys_without_a_blob() {
    let (mut c, dump) = store(Setup::new().replicas(2).subvolumes(1));
    let path = reference::path(KEY.as_bytes(), 0);
    let files = replicas(&dump, KEY).into_iter().map(|replica| c.file(&replica, &path));
    let saved: Vec<_> = files.map(|file| (file.clone(), fs::read(&file).unwrap())).collect();
    saved.iter().for_each(|(file, _)| fs::remove_file(file).unwrap());
    for _ in 0..2 {
        let result = c.mkv(&["rebuild"]).fails(&["see what is named above"]);
        result.prints("no blob was found for").prints("/foo/\\xc3\\xa9t\\xc3\\xa9");
        assert_eq!(c.dump(), dump);
    }
    c.start_master();
    c.get(KEY).expect(410);
    for (file, bytes) in saved {
        fs::write(file, bytes).unwrap();
    }
    c.stop_master();
    c.mkv(&["rebuild"]).expect(0).does_not_print("no blob");
    assert_eq!(c.dump(), dump);
    assert_intact(&mut c);
}

// Unexpected files and versions.

#[test]
fn for_unknown_keys_the_version_with_the_most_replicas_wins_then_the_newest() {
    let mut c = Setup::new().subvolumes(1).start();
    c.stop_master();
    fs::remove_dir_all(c.db()).unwrap();
    let names = c.names.clone();
    let path = |key: &str, version| reference::path(key.as_bytes(), version);
    // Two replicas of version 5, one of version 9.
    for (replica, version) in [(0, 5), (1, 5), (2, 9)] {
        c.store_blob(&names[replica], &path("/most", version), format!("version {version}"), 1000);
    }
    for (replica, version) in [(0, 0), (1, 9), (2, 5)] {
        c.store_blob(&names[replica], &path("/newest", version), format!("version {version}"), 1000);
    }
    for (replica, version) in [(0, 0), (1, 0), (2, 7)] {
        c.store_blob(&names[replica], &path("/plain", version), format!("version {version}"), 1000);
    }
    let result = c.mkv(&["rebuild", "-v"]).expect(0);
    result
        .prints("3 keys, 5 replicas, 3 under-replicated, 4 skipped")
        .prints("other versions of keys, not indexed: 4")
        .prints(&path("/most", 9))
        .prints(&path("/newest", 0))
        .prints(&path("/newest", 5))
        .prints(&path("/plain", 7));
    let dump = c.dump();
    let on = |key: &str, replicas: &[usize]| {
        let mut wanted = c.placement(key);
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
    c.wait_until_cleaned();
    let version = c.key_info(KEY).version;
    let files = c.files(KEY);
    c.stop_master();
    let (dump, names) = (c.dump(), c.names.clone());
    // One replica of the indexed version is left. An older and a newer version have more.
    files[1..].iter().for_each(|file| fs::remove_file(file).unwrap());
    for name in &names {
        for other in [0, version - 1, version + 1] {
            c.store_blob(name, &reference::path(KEY.as_bytes(), other), "other", now());
        }
    }
    c.mkv(&["rebuild"]).expect(0).prints("1 keys, 1 replicas, 1 under-replicated, 3 skipped");
    let after = c.dump();
    let (fields, _) = record(&dump, KEY).unwrap().split_once("127.").unwrap();
    assert!(record(&after, KEY).unwrap().starts_with(fields), "{after}");
    assert!(!after.contains(','));
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    c.start_master();
    assert_eq!(c.assert_value(KEY, "second").version, version);
    for other in [0, version - 1, version + 1] {
        let path = reference::path(KEY.as_bytes(), other);
        names.iter().for_each(|name| fs::remove_file(c.file(name, &path)).unwrap());
    }
}

/// A backup of the index is older than the volumes.
#[test]
fn rebuild_finds_values_written_after_the_backup_of_the_index() {
    let mut c = Setup::new().volumes(2).start();
    c.put("/replaced", "old").expect(201);
    c.put("/unlinked", "unlinked").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    c.stop_master();
    copy_folder(&c.db(), &c.folder.join("backup"));
    c.start_master();
    c.replace("/replaced", "new").expect(201);
    c.put("/added", "added").expect(201);
    c.wait_until_cleaned();
    c.stop_master();
    let dump = c.dump();
    fs::remove_dir_all(c.db()).unwrap();
    let from = c.folder.join("backup");
    c.mkv(&["rebuild", "-rehash", "-from", from.to_str().unwrap()]).expect(0);
    assert_eq!(c.dump(), dump);
    c.start_master();
    c.assert_value("/replaced", "new");
    c.assert_value("/added", "added");
}

#[test]
fn among_different_sizes_under_one_name_the_majority_wins_then_the_newest() {
    let mut c = Setup::new().subvolumes(1).start();
    c.stop_master();
    fs::remove_dir_all(c.db()).unwrap();
    let names = c.names.clone();
    for (key, values) in [
        ("/majority", [("right", 1000), ("newer value", 3000), ("right", 2000)]),
        ("/newest", [("a", 1000), ("bb", 3000), ("ccc", 2000)]),
    ] {
        for (name, (value, time)) in names.iter().zip(values) {
            c.store_blob(name, &reference::path(key.as_bytes(), 0), value, time);
        }
    }
    let result = c.mkv(&["rebuild", "-rehash"]).expect(0);
    result
        .prints("2 keys, 3 replicas, 2 under-replicated")
        .prints("replicas of different lengths under one name")
        .prints(&format!("11 on {}", names[1]))
        .prints(&format!("3 on {}", names[2]));
    let dump = c.dump();
    let fields = |value: &str| format!("HASH{}SIZE{:016x}", reference::md5(value.as_bytes()), value.len());
    let majority = record(&dump, "/majority").unwrap();
    assert!(majority.starts_with(&fields("right")) && !majority.contains(&names[1]), "{dump}");
    let newest = record(&dump, "/newest").unwrap();
    assert!(newest.starts_with(&fields("bb")) && newest.ends_with(&names[1]), "{dump}");
    assert!(newest.contains(&format!("TIME{:016x}", 3000)), "{dump}");
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    c.start_master();
    c.assert_value("/majority", "right");
    c.assert_value("/newest", "bb");
}

#[test]
fn hash_and_state_carry_over_only_if_the_size_matches() {
    let (mut c, dump) = store(Setup::new().volumes(1));
    let replica = &replicas(&dump, KEY)[0];
    let path = reference::path(KEY.as_bytes(), 0);
    c.store_blob(replica, &path, "a value of another length", 5000);
    c.mkv(&["rebuild"]).expect(0);
    let after = c.dump();
    let fields = format!("SIZE{:016x}TIME{:016x}127.", 25, 5000);
    assert!(record(&after, KEY).unwrap().starts_with(&fields), "{after}");
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    c.assert_verified();
    c.start_master();
    c.assert_value(KEY, "a value of another length");
    c.replace(KEY, "value").expect(201);
    c.wait_until_cleaned();
    c.stop_master();
    assert_intact(&mut c);
}

#[test]
fn rebuild_lists_names_that_are_not_blobs() {
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
    strays.iter().for_each(|stray| c.store_blob(&name, stray, "stray", 1000));
    let result = c.mkv(&["rebuild", "-v"]).expect(0).prints("33 keys, 66 replicas, 0 under-replicated");
    assert!(result.number_before(" skipped") >= strays.len() as u64 - 2, "{result:?}");
    let out = result.out.clone();
    assert!(out.contains("names that are no blob, not indexed"));
    for stray in strays {
        // A folder that cannot hold blobs is reported without its contents.
        let parts: Vec<&str> = stray.split('/').collect();
        let reported =
            (2..=parts.len()).any(|n| out.lines().any(|line| line.trim() == format!("{name}{}", parts[..n].join("/"))));
        assert!(reported, "{stray} is missing:\n{out}");
    }
    assert_eq!(c.dump(), dump);
    // Without -v, the output shows the first names and the number of the others.
    c.mkv(&["rebuild"]).expect(0).prints("-v shows all");
    c.mkv(&["verify"]).fails(&["not whole"]).prints(&format!("{name}/note.txt"));
    for stray in strays {
        fs::remove_file(c.file(&name, stray)).unwrap();
    }
    fs::remove_dir_all(c.file(&name, "/svAA0")).unwrap();
    fs::remove_dir_all(c.file(&name, "/sv0g")).unwrap();
    fs::remove_dir_all(c.file(&name, "/sv00/AB")).unwrap();
    c.assert_verified();
    assert_intact(&mut c);
}

#[test]
fn rebuild_ignores_temporary_files_of_nginx() {
    let (mut c, dump) = store(Setup::new().volumes(1));
    let leftovers = c.volumes[0].folder.join(".nginx/temp/0000000001");
    fs::write(&leftovers, "half a value").unwrap();
    c.mkv(&["rebuild"]).expect(0).prints("0 skipped");
    assert_eq!(c.dump(), dump);
    fs::remove_file(leftovers).unwrap();
    assert_intact(&mut c);
}

#[test]
fn a_folder_with_100_000_names_needs_little_memory() {
    const MANY: usize = 100_000;
    let (mut c, dump) = store(Setup::new().volumes(1));
    let (before, result) = peak_memory(&c, &["rebuild"]);
    result.expect(0);
    let replica = &replicas(&dump, KEY)[0];
    let file = c.file(replica, &reference::path(KEY.as_bytes(), 0));
    let folder = file.parent().unwrap().parent().unwrap();
    let strays: Vec<_> = (0..MANY).map(|n| folder.join(format!("stray-{n:06}"))).collect();
    // A file can have some ten thousand names, and a hard link is faster to create than a file.
    for names in strays.chunks(10_000) {
        fs::File::create(&names[0]).unwrap();
        names[1..].iter().for_each(|name| fs::hard_link(&names[0], name).unwrap());
    }
    let (after, result) = peak_memory(&c, &["rebuild"]);
    result.expect(0).prints(&format!("names that are no blob, not indexed: {MANY}"));
    println!("{before} MiB, with {MANY} more names {after} MiB");
    assert!(after < 2 * before.max(40), "{before} MiB, with {MANY} more names {after} MiB");
    assert_eq!(c.dump(), dump);
    strays.iter().for_each(|stray| fs::remove_file(stray).unwrap());
    assert_intact(&mut c);
}

#[test]
fn misplaced_replicas_come_last_in_the_record() {
    let mut c = Setup::new().volumes(4).replicas(2).subvolumes(1).start();
    c.put(KEY, "value").expect(201);
    let (placed, file) = (c.placement(KEY), c.files(KEY)[0].clone());
    let others: Vec<String> = c.names.iter().filter(|name| !placed.contains(name)).cloned().collect();
    c.stop_master();
    fs::remove_dir_all(c.db()).unwrap();
    let time = mtime(&file) as u64;
    for other in &others {
        c.store_blob(other, &reference::path(KEY.as_bytes(), 0), "value", time);
    }
    c.mkv(&["rebuild"]).expect(0).prints("1 keys, 4 replicas");
    let dump = c.dump();
    assert_eq!(replicas(&dump, KEY), [placed, others].concat());
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    c.start_master();
    assert!(c.assert_value(KEY, "value").balanced && c.blobs().len() == 2);
}
