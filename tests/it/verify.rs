//! `mkv verify`: its findings, what `-repair` repairs, and what it must never delete.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{
    CommandOutput, DiskContents, copy_folder, files_below, flip_a_bit, now, numbered_keys, replicas, value_of,
};
use crate::support::faulty_proxy::{Fault, FaultyProxy};
use crate::support::http_client::{Conn, target};
use crate::support::random::seeded_rng;
use crate::support::reference;

const KEY: &str = "/foo/été";
const KEYS: usize = 33;

/// A store with values, one of them replaced and one unlinked. The master is stopped. Also returns
/// the disks' contents.
fn store(setup: Setup) -> (Cluster, DiskContents) {
    let mut c = setup.start();
    c.fill(&numbered_keys("/n/", KEYS - 3));
    c.put(KEY, "value").expect(201);
    c.put("/replaced", "old").expect(201);
    c.replace("/replaced", "new").expect(201);
    c.put("/unlinked", "unlinked value").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    c.wait_until_cleaned();
    c.stop_master();
    let disks = c.disk_contents();
    (c, disks)
}

/// Checks that every blob still exists with its bytes.
#[track_caller]
fn assert_no_blob_lost(c: &Cluster, before: &DiskContents) {
    let after = c.disk_contents();
    let lost: Vec<_> = before.iter().filter(|(file, text)| after.get(*file) != Some(text)).collect();
    assert!(lost.is_empty(), "lost or changed: {lost:#?}");
}

fn files_of(c: &Cluster, key: &str, version: u64) -> Vec<PathBuf> {
    let path = reference::path(key.as_bytes(), version);
    replicas(&c.dump(), key).iter().map(|replica| c.file(replica, &path)).collect()
}

/// A folder on a volume where placement wants no replica of the key.
fn misplaced_replica(c: &Cluster, key: &str) -> String {
    let placed = c.placement(key);
    let other = c.names.iter().find(|name| !placed.iter().any(|r| r.starts_with(*name)));
    format!("{}/sv00", other.expect("there are more volumes than replicas"))
}

// Findings.

#[test]
fn verify_reports_a_whole_store_and_changes_nothing() {
    let (mut c, disks) = store(Setup::new().replicas(2));
    let (index, temporary) = (c.index_files(), c.folder.join("tmp"));
    fs::create_dir(&temporary).unwrap();
    for flags in [vec!["verify"], vec!["verify", "-deep", "-v"]] {
        let result = c.mkv_command(&flags).env("TMPDIR", &temporary).output().unwrap();
        let out = String::from_utf8_lossy(&result.stdout);
        assert!(result.status.success() && out.contains("the store is whole"), "{result:?}");
        assert!(out.contains(&format!("{KEYS} keys in the index, 0 with findings")), "{out}");
        c.assert_index_files(&index);
        c.assert_disks(&disks);
    }
    assert!(files_below(&temporary).is_empty());
    // -repair changes nothing in a healthy store.
    let dump = c.dump();
    c.mkv(&["verify", "-repair", "-deep", "-strays", "-grace", "0s"]).expect(0);
    assert_eq!(c.dump(), dump);
    c.assert_disks(&disks);
    c.start_master();
    c.mkv(&["verify", "-deep"]).expect(0).prints("the store is whole");
}

#[test]
fn verify_finds_every_kind_of_fault_and_repairs_most() {
    let (mut c, _) = store(Setup::new().replicas(2));
    // Leave an unfinished deletion.
    c.start_master();
    c.put("/deleted", "deleted").expect(201);
    c.stop_master();
    let dump = c.dump();
    c.start_master();
    let silent = c.holder("/deleted", 1);
    c.volumes[silent].stop();
    c.ask("DELETE", "/deleted").expect(503);
    c.stop_master();
    c.start_volumes();
    let mut whole = c.disk_contents();
    let debris = c.file(&replicas(&dump, "/deleted")[1], &reference::path(b"/deleted", 0));
    let dump = c.dump();
    fs::remove_file(&files_of(&c, KEY, 0)[0]).unwrap();
    fs::remove_file(&files_of(&c, "/unlinked", 0)[1]).unwrap();
    fs::write(&files_of(&c, "/n/0000", 0)[1], "x").unwrap();
    let plain = |key: &str| reference::path(key.as_bytes(), 0);
    c.store_blob(&misplaced_replica(&c, "/n/0001"), &plain("/n/0001"), "surplus", 1000);
    c.store_blob(&misplaced_replica(&c, "/replaced"), &plain("/replaced"), "stale", 1000);
    let newer = reference::path(b"/n/0002", u64::MAX / 2);
    c.store_blob(&c.names[0], &newer, "newer", 1000);
    c.store_blob(&c.names[1], &plain("/unknown"), "unknown", 1000);
    c.store_blob(&c.names[2], "/note.txt", "no blob", 1000);
    let lines = [
        "replicas missing: 2",
        "replicas of the wrong size: 1",
        "debris: 1",
        "surplus replicas: 1",
        "stale versions: 1",
        "versions newer than the index: 1",
        "blobs of keys that the index does not know: 1",
        "names that are no blob: 1",
    ];
    let damaged = c.disk_contents();
    let result = c.mkv(&["verify"]).fails(&["not whole"]);
    let result = lines.iter().fold(result, |result, line| result.prints(line));
    result
        .prints("33 keys in the index")
        .prints(&format!("\"/unlinked\" http://{}", replicas(&dump, "/unlinked")[1]))
        .prints(&format!("http://{}{newer}", c.names[0]))
        .prints(&format!("{}/note.txt", c.names[2]));
    c.assert_disks(&damaged);
    assert_eq!(c.dump(), dump);
    // A blob newer than the index suggests that it is the wrong index, so nothing is removed.
    let result = c.mkv(&["verify", "-repair"]).fails(&["not whole"]);
    let result = lines[..2].iter().fold(result, |result, line| result.does_not_print(line));
    let result = lines[2..].iter().fold(result, |result, line| result.prints(line));
    result.prints("Nothing is removed").prints("-db");
    fs::remove_file(c.file(&c.names[0], &newer)).unwrap();
    // Findings without a safe repair stay.
    let result = c.mkv(&["verify", "-repair"]).fails(&["not whole"]);
    let result = lines[..6].iter().fold(result, |result, line| result.does_not_print(line));
    lines[6..].iter().fold(result, |result, line| result.prints(line));
    assert_eq!(c.dump(), dump);
    assert!(!debris.exists() && c.debris().is_empty());
    fs::remove_file(c.file(&c.names[1], &plain("/unknown"))).unwrap();
    fs::remove_file(c.file(&c.names[2], "/note.txt")).unwrap();
    whole.remove(&debris).expect("the debris is in the listing");
    c.assert_disks(&whole);
    c.assert_verified();
}

#[test]
fn v_shows_all_names_instead_of_the_first_ones() {
    let (c, disks) = store(Setup::new());
    let lost = c.volumes[1].files();
    lost.values().for_each(|file| fs::remove_file(file).unwrap());
    let line = format!("replicas missing: {}", lost.len());
    let short = c.mkv(&["verify"]).fails(&["not whole"]).prints(&line);
    let verbose = c.mkv(&["verify", "-v"]).fails(&["not whole"]).prints(&line);
    let names = |result: &CommandOutput| {
        lost.keys().filter(|path| result.out.contains(&format!("{}{path}", c.names[1]))).count()
    };
    assert!(lost.len() > 15 && names(&verbose) == lost.len(), "{verbose:?}");
    assert!((1..=15).contains(&names(&short)), "{short:?}");
    short.prints("-v shows all");
    c.mkv(&["verify", "-repair"]).expect(0);
    c.assert_disks(&disks);
}

#[test]
fn deep_finds_a_flipped_bit_and_repair_restores_it() {
    let (c, disks) = store(Setup::new());
    let dump = c.dump();
    for (key, at) in [(KEY, 0), ("/unlinked", 1), ("/n/0003", 2)] {
        flip_a_bit(&files_of(&c, key, 0)[at]);
    }
    let flipped = c.disk_contents();
    assert!(flipped != disks);
    c.mkv(&["verify"]).expect(0);
    c.mkv(&["verify", "-repair"]).expect(0);
    c.assert_disks(&flipped);
    c.mkv(&["verify", "-deep"]).fails(&["not whole"]).prints("replicas with the wrong bytes: 3");
    c.assert_disks(&flipped);
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    c.assert_disks(&disks);
    assert_eq!(c.dump(), dump);
    assert!(c.debris().is_empty());
    c.assert_verified();
}

#[test]
fn without_a_hash_the_bytes_of_the_majority_count() {
    let mut c = Setup::new().flags(&["-md5sum=false"]).start();
    c.put("/two/of/three", "value").expect(201);
    c.put("/undecided", "value").expect(201);
    let files = (c.files("/two/of/three"), c.files("/undecided"));
    c.stop_master();
    flip_a_bit(&files.0[0]);
    let undecided = ["value", "valuf", "valug"];
    files.1.iter().zip(undecided).for_each(|(file, text)| fs::write(file, text).unwrap());
    c.mkv(&["verify", "-deep"]).fails(&[]).prints("wrong bytes: 4");
    c.mkv(&["verify", "-deep", "-repair"]).fails(&[]).prints("wrong bytes: 3").prints("/undecided");
    assert_eq!(fs::read(&files.0[0]).unwrap(), b"value");
    for (file, text) in files.1.iter().zip(undecided) {
        assert_eq!(fs::read(file).unwrap(), text.as_bytes());
        fs::write(file, "value").unwrap();
    }
    c.assert_verified();
}

#[test]
fn verify_fails_and_changes_nothing_when_a_volume_is_down() {
    let (c, disks) = store(Setup::new().replicas(2));
    let mut c = c;
    c.store_blob(&misplaced_replica(&c, KEY), &reference::path(KEY.as_bytes(), 0), "value", 1000);
    let damaged = c.disk_contents();
    c.volumes[1].stop();
    for flags in [vec!["verify"], vec!["verify", "-repair", "-deep", "-strays", "-grace", "0s"]] {
        c.mkv(&flags).fails(&[&format!("http://{}/", c.names[1])]);
        c.assert_disks(&damaged);
    }
    c.start_volumes();
    c.mkv(&["verify", "-repair"]).expect(0);
    c.assert_disks(&disks);
}

#[test]
fn verify_has_no_findings_while_a_master_writes() {
    let mut random = seeded_rng();
    let c = Setup::new().replicas(2).subvolumes(3).start();
    c.fill(&numbered_keys("/still/", 20));
    let (stop, written) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for writer in 0..3 {
            let (c, stop, written) = (&c, &stop, &written);
            let mut random = random.fork();
            scope.spawn(move || {
                let mut conn = Conn::open(&c.address());
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("/{writer}/{}", random.u32(..8));
                    let method = ["PUT", "REPLACE", "REPLACE", "DELETE", "UNLINK", "RELINK"][random.usize(..6)];
                    let body = [b'v'; 3000];
                    let body = method.ends_with(['T', 'E']).then_some(&body[..random.usize(1..3000)]);
                    let body = body.filter(|_| method != "DELETE");
                    let answer = conn.ask(method, &key, &[], body);
                    if answer.header("Connection") == Some("close") {
                        conn = Conn::open(&c.address());
                    }
                    assert!(matches!(answer.status, 201 | 204 | 403 | 404), "{method} {answer:?}");
                    written.fetch_add(usize::from(answer.status < 300), Ordering::Relaxed);
                }
            });
        }
        let verified = std::panic::catch_unwind(|| {
            for flags in [vec!["verify"], vec!["verify", "-deep"], vec!["verify"]] {
                c.mkv(&flags).expect(0).prints("the store is whole");
            }
        });
        stop.store(true, Ordering::Relaxed);
        verified.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    assert!(written.into_inner() > 100);
}

#[test]
fn verify_ignores_a_key_deleted_before_the_master_restarts() {
    let mut c = Setup::new().proxied().start();
    c.put(KEY, "value").expect(201);
    c.put("/deleted", "value").expect(201);
    c.each_proxy(|proxy| proxy.set("GET", Fault::HoldRequest));
    let verify = c.start_command(&["verify"]);
    crate::support::http_client::wait_until("verify lists the volumes", || any_held(&c, "GET"));
    c.ask("DELETE", "/deleted").expect(204);
    c.restart_master();
    c.each_proxy(|proxy| proxy.release("GET"));
    verify.wait().expect(0).prints("the store is whole");
}

#[test]
fn debris_is_a_finding_only_without_a_running_master() {
    let mut c = Setup::new().proxied().start();
    c.put("/other", "other").expect(201);
    c.put(KEY, "value").expect(201);
    let holder = c.holder(KEY, 1);
    c.proxies[holder].set("DELETE", Fault::Answer(503));
    c.ask("DELETE", KEY).expect(503);
    c.mkv(&["verify"]).expect(0).prints("debris");
    c.stop_master();
    c.mkv(&["verify"]).fails(&["not whole"]).prints("debris: 1");
    // The volume still refuses, so the debris stays.
    c.mkv(&["verify", "-repair"]).fails(&["not whole"]).prints("debris: 1");
    c.proxies[holder].remove_faults();
    c.mkv(&["verify", "-repair"]).expect(0);
    assert!(c.debris().is_empty() && c.blobs().len() == 3);
}

// Refused repairs.

#[test]
fn repair_fails_while_a_master_runs() {
    let (mut c, _) = store(Setup::new().replicas(2));
    fs::remove_file(&files_of(&c, KEY, 0)[0]).unwrap();
    c.start_master();
    let disks = c.disk_contents();
    c.mkv(&["verify", "-repair"]).fails(&["-db", &c.master_pid().to_string()]);
    c.assert_disks(&disks);
    c.mkv(&["verify"]).fails(&["not whole"]);
    c.stop_master();
    c.mkv(&["verify", "-repair"]).expect(0);
}

#[test]
fn strays_requires_repair() {
    let (c, disks) = store(Setup::new().volumes(1));
    let result = c.mkv(&["verify", "-strays"]).expect(2);
    assert!(result.err.contains("-strays") && result.err.contains("-repair"), "{result:?}");
    c.assert_disks(&disks);
}

const REPAIR_ALL: [&str; 6] = ["verify", "-repair", "-deep", "-strays", "-grace", "0s"];

#[test]
fn repair_with_a_mistyped_db_changes_nothing_and_creates_no_index() {
    let (mut c, disks) = store(Setup::new().replicas(2));
    let (dump, empty) = (c.dump(), c.folder.join("empty"));
    fs::create_dir(&empty).unwrap();
    let typed = [
        empty,
        c.folder.join("nowhere"),
        c.folder.clone(),
        c.db().join("index"),
        c.volumes[0].folder.clone(),
        "/proc/version".into(),
    ];
    for db in typed {
        let before = folder_entries(&db);
        for flags in [&REPAIR_ALL[..], &REPAIR_ALL[..2], &["verify"]] {
            c.mkv(&[flags, &["-db", db.to_str().unwrap()]].concat()).fails(&[]);
            assert_eq!(folder_entries(&db), before, "{}", db.display());
        }
    }
    c.assert_disks(&disks);
    assert_eq!(c.dump(), dump);
    c.start_master();
}

/// The names in a folder, if it is one, without the files that hold a command's output.
fn folder_entries(folder: &Path) -> Option<Vec<String>> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.filter(|name| !name.starts_with("command-")).collect();
    names.sort();
    Some(names)
}

#[test]
fn repair_fails_with_an_empty_index() {
    let (mut c, disks) = store(Setup::new().replicas(2));
    let (flags, kept) = (c.setup.clone(), c.db());
    fs::rename(&kept, c.folder.join("kept")).unwrap();
    // A master started with the wrong -db leaves an empty index.
    c.setup = flags.flags(&[]);
    c.start_master();
    assert!(c.live().is_empty());
    c.stop_master();
    for flags in [&REPAIR_ALL[..], &REPAIR_ALL[..2]] {
        c.mkv(flags).fails(&["empty", "-db"]);
        c.assert_disks(&disks);
    }
    fs::remove_dir_all(&kept).unwrap();
    fs::rename(c.folder.join("kept"), kept).unwrap();
    c.assert_verified();
}

#[test]
fn repair_with_the_index_of_another_store_loses_no_blob() {
    for (ours, theirs, replaced) in [(0..20, 0..20, 0), (0..30, 0..22, 9), (0..20, 5..40, 3)] {
        let (mut c, mut other) = (Setup::new().replicas(2).start(), Setup::new().replicas(2).start());
        let keys = numbered_keys("/n/", 40);
        c.fill(&keys[ours]);
        other.fill(&keys[theirs]);
        // Some versions are newer in this store, some in the other.
        for n in 0..replaced {
            let store = if n % 2 == 0 { &c } else { &other };
            store.replace(&keys[10 + n], "another value").expect(201);
        }
        c.wait_until_cleaned();
        other.wait_until_cleaned();
        c.stop_master();
        other.stop_master();
        let (disks, others) = (c.disk_contents(), other.disk_contents());
        let db = other.db();
        for flags in [&REPAIR_ALL[..2], &REPAIR_ALL[..3], &REPAIR_ALL[..]] {
            let result = c.mkv(&[flags, &["-db", db.to_str().unwrap()]].concat());
            assert_no_blob_lost(&c, &disks);
            assert_no_blob_lost(&other, &others);
            result.expect(1);
        }
        c.assert_verified();
        other.assert_verified();
    }
}

#[test]
fn repair_with_an_old_copy_of_the_index_loses_no_blob() {
    let mut c = Setup::new().proxied().volumes(4).replicas(2).flags(&["-settle", "0s"]).start();
    let all_names = c.names.clone();
    c.names.truncate(3);
    c.restart_master();
    let keys = numbered_keys("/n/", 40);
    c.fill(&keys);
    // Two writes are in progress when the copy is made, and succeed later.
    c.each_proxy(|proxy| proxy.set("PUT", Fault::HoldAnswer));
    let pending: Vec<Conn> = [("PUT", "/pending"), ("REPLACE", "/n/0000")]
        .into_iter()
        .map(|(method, key)| {
            let mut conn = c.conn();
            conn.head(method, &target(key), &[("Content-Length", "7")]).send("pending");
            (0..2).for_each(|replica| c.proxies[c.holder(key, replica)].wait_held("PUT", 1));
            conn
        })
        .collect();
    crate::support::http_client::wait_until("both writes have begun", || c.keys_with_debris().len() == 2);
    copy_folder(&c.db(), &c.folder.join("copy"));
    c.each_proxy(FaultyProxy::remove_faults);
    pending.into_iter().for_each(|mut conn| drop(conn.answer().expect(201)));
    // The store changes after the copy was made.
    for key in &keys[1..5] {
        c.replace(key, "replaced").expect(201);
    }
    for key in &keys[5..10] {
        c.ask("DELETE", key).expect(204);
        c.put(key, "put again").expect(201);
    }
    for n in 0..8 {
        c.put(format!("/new/{n}"), "new").expect(201);
    }
    c.wait_until_cleaned();
    c.names = all_names;
    c.restart_master();
    for key in &keys[10..30] {
        c.ask("REBALANCE", key).expect(204);
    }
    c.wait_until_cleaned();
    c.stop_master();
    let (disks, dump) = (c.disk_contents(), c.dump());
    let copy = c.folder.join("copy");
    for flags in [&REPAIR_ALL[..2], &REPAIR_ALL[..3], &REPAIR_ALL[..]] {
        let result = c.mkv(&[flags, &["-db", copy.to_str().unwrap()]].concat());
        assert_no_blob_lost(&c, &disks);
        assert_eq!(c.dump(), dump);
        result.expect(1);
    }
    // With the right index, the unneeded copies are removed.
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    assert_no_blob_lost(&c, &disks);
    c.start_master();
    for key in ["/pending", "/n/0000"] {
        c.assert_value(key, "pending");
    }
    c.assert_reads_back(&keys[10..]);
}

#[test]
fn repair_never_removes_the_last_good_copy() {
    let mut c = Setup::new().replicas(1).start();
    for key in ["/flipped", "/missing", "/cut", "/stale"] {
        c.put(key, "the good value").expect(201);
    }
    c.replace("/stale", "the good value").expect(201);
    c.wait_until_cleaned();
    let stale = c.key_info("/stale").version;
    c.stop_master();
    let plain = |key: &str| reference::path(key.as_bytes(), 0);
    let mut good = Vec::new();
    for key in ["/flipped", "/missing", "/cut", "/stale"] {
        let other = misplaced_replica(&c, key);
        c.store_blob(&other, &plain(key), "the good value", 1000);
        good.push(c.file(&other, &plain(key)));
    }
    let files = ["/flipped", "/missing", "/cut"].map(|key| files_of(&c, key, 0).remove(0));
    flip_a_bit(&files[0]);
    fs::remove_file(&files[1]).unwrap();
    fs::write(&files[2], "cut").unwrap();
    flip_a_bit(&files_of(&c, "/stale", stale)[0]);
    for flags in [&REPAIR_ALL[..2], &REPAIR_ALL[..]] {
        c.mkv(flags);
        for file in &good[..3] {
            // The value is repaired or still in the surplus replica.
            let key = good.iter().position(|other| other == file).unwrap();
            let contents = [file, &files[key]].map(|file| fs::read(file).unwrap_or_default());
            assert!(contents.iter().any(|bytes| bytes == b"the good value"), "{}", file.display());
        }
        assert!(good[3].exists(), "the only readable blob is gone");
    }
    for key in ["/flipped", "/missing", "/cut", "/stale"] {
        let file = files_of(&c, key, if key == "/stale" { stale } else { 0 }).remove(0);
        fs::write(file, "the good value").unwrap();
    }
    c.mkv(&["verify", "-repair"]).expect(0);
    assert_eq!(c.blobs().len(), 4);
}

#[test]
fn repair_removes_nothing_of_a_key_with_a_bad_replica() {
    let (c, disks) = store(Setup::new().proxied().replicas(2));
    let plain = reference::path(KEY.as_bytes(), 0);
    let surplus = c.file(&misplaced_replica(&c, KEY), &plain);
    c.store_blob(&misplaced_replica(&c, KEY), &plain, "value", 1000);
    let missing = files_of(&c, KEY, 0).remove(1);
    fs::remove_file(&missing).unwrap();
    let volume = c.holder(KEY, 1);
    c.proxies[volume].set("PUT", Fault::Answer(500));
    c.mkv(&["verify", "-repair"]).fails(&["not whole"]).prints("keys that are not repaired: 1");
    assert!(surplus.exists() && !missing.exists() && c.debris().is_empty());
    c.proxies[volume].remove_faults();
    c.mkv(&["verify", "-repair"]).expect(0);
    c.assert_disks(&disks);
}

/// Stands in for a bad sector.
#[test]
fn an_unreadable_blob_counts_as_a_missing_replica() {
    let (c, disks) = store(Setup::new().replicas(2));
    let file = files_of(&c, KEY, 0).remove(0);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
    c.mkv(&["verify", "-deep"]).fails(&["not whole"]).prints("replicas missing: 1");
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    c.assert_disks(&disks);
}

#[test]
fn without_a_hash_a_differing_surplus_replica_stays() {
    let mut c = Setup::new().replicas(2).flags(&["-md5sum=false"]).start();
    c.put(KEY, "value").expect(201);
    c.stop_master();
    let surplus = misplaced_replica(&c, KEY);
    let plain = reference::path(KEY.as_bytes(), 0);
    c.store_blob(&surplus, &plain, "other", 1000);
    c.mkv(&["verify", "-repair"]).fails(&["not whole"]).prints("no hash tells");
    assert!(c.file(&surplus, &plain).exists());
    c.store_blob(&surplus, &plain, "value", 1000);
    c.mkv(&["verify", "-repair"]).expect(0);
    assert_eq!(c.blobs().len(), 2);
}

#[test]
fn without_a_hash_differing_replicas_are_not_copied() {
    let mut c = Setup::new().flags(&["-md5sum=false"]).start();
    c.put(KEY, "value").expect(201);
    c.stop_master();
    let files = files_of(&c, KEY, 0);
    flip_a_bit(&files[0]);
    fs::remove_file(&files[1]).unwrap();
    let disks = c.disk_contents();
    c.mkv(&["verify", "-repair"]).fails(&["not whole"]).prints("no hash tells which is right");
    c.assert_disks(&disks);
    let deep = c.mkv(&["verify", "-deep", "-repair"]).fails(&["not whole"]);
    deep.prints("none of its replicas is known to hold the right bytes");
    c.mkv(&["rebalance"]).fails(&["1 keys"]).prints("no hash tells which is right");
    c.assert_disks(&disks);
    c.start_master();
    assert!(c.ask("REBALANCE", KEY).expect(500).text().contains("no hash tells"));
    c.assert_disks(&disks);
    fs::remove_file(&files[0]).unwrap();
    c.ask("REBALANCE", KEY).expect(204);
    c.assert_value(KEY, "value");
}

#[test]
fn a_key_without_any_replica_remains_a_finding() {
    let (c, disks) = store(Setup::new().replicas(2));
    let files = files_of(&c, "/replaced", version(&c));
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
    for flags in [&["verify"][..], &REPAIR_ALL[..]] {
        c.mkv(flags).fails(&["not whole"]).prints("replicas missing: 2").prints("\"/replaced\"");
    }
    assert_eq!(c.dump().lines().count(), KEYS);
    files.iter().for_each(|file| fs::write(file, "new").unwrap());
    c.assert_verified();
    assert_eq!(c.disk_contents().len(), disks.len());
}

fn version(c: &Cluster) -> u64 {
    let dump = c.dump();
    let (_, version) = dump.split_once("VERS").expect("a key was replaced");
    u64::from_str_radix(&version[..16], 16).unwrap()
}

#[test]
fn repair_removes_strays_only_on_request_and_after_the_grace() {
    let (c, disks) = store(Setup::new().replicas(2));
    let plain = |key: &str| reference::path(key.as_bytes(), 0);
    let ages = [("/minutes", 600), ("/hours", 7200), ("/days", 100_000)];
    for (key, age) in ages {
        c.store_blob(&misplaced_replica(&c, key), &plain(key), "stray", now() - age);
    }
    let exist = || ages.map(|(key, _)| c.file(&misplaced_replica(&c, key), &plain(key)).exists());
    let line = "blobs of keys that the index does not know: ";
    c.mkv(&["verify"]).fails(&[]).prints(&format!("{line}3"));
    c.mkv(&["verify", "-repair"]).fails(&[]).prints(&format!("{line}3"));
    assert_eq!(exist(), [true, true, true]);
    c.mkv(&["verify", "-repair", "-strays"]).fails(&[]).prints(&format!("{line}2"));
    assert_eq!(exist(), [true, true, false]);
    c.mkv(&["verify", "-repair", "-strays", "-grace", "1h"]).fails(&[]).prints(&format!("{line}1"));
    assert_eq!(exist(), [true, false, false]);
    // A stray newer than everything in the index protects all strays, whatever the grace.
    let new = misplaced_replica(&c, "/new");
    c.store_blob(&new, &plain("/new"), "stray", now() + 1);
    c.mkv(&["verify", "-repair", "-strays", "-grace", "0s"]).fails(&[]).prints(&format!("{line}2"));
    assert_eq!(exist(), [true, false, false]);
    fs::remove_file(c.file(&new, &plain("/new"))).unwrap();
    c.mkv(&["verify", "-repair", "-strays", "-grace", "5m"]).expect(0);
    c.assert_disks(&disks);
    c.assert_verified();
}

#[test]
fn repair_restores_a_lost_disk_larger_than_one_batch() {
    let mut c = Setup::new().subvolumes(1).replicas(2).start();
    let keys = numbered_keys("/n/", 6500);
    c.fill(&keys);
    c.stop_master();
    let disks = c.disk_contents();
    let lost: Vec<PathBuf> = c.volumes[0].files().into_values().collect();
    assert!(lost.len() > 4096, "{}", lost.len());
    lost.iter().for_each(|file| fs::remove_file(file).unwrap());
    let line = format!("replicas missing: {}", lost.len());
    let more = format!("… and {} more", lost.len() - 10);
    let with_findings = format!("{} with findings", lost.len());
    c.mkv(&["verify"]).fails(&["not whole"]).prints(&line).prints(&more).prints(&with_findings);
    // A blob newer than the index keeps all surplus blobs, from the first key to the last.
    let (first, last) = (misplaced_replica(&c, "/n/0000"), reference::path(b"/z", 0));
    c.store_blob(&first, &reference::path(b"/n/0000", 0), value_of(&keys[0]), 1000);
    c.store_blob(&c.names[1], &last, "newer", now() + 1);
    let unknown = "that the index does not know: 1";
    let result = c.mkv(&REPAIR_ALL).fails(&["not whole"]).prints("Nothing is removed").prints(unknown);
    result.prints("surplus replicas: 1").prints("2 with findings").does_not_print("missing");
    fs::remove_file(c.file(&c.names[1], &last)).unwrap();
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    c.assert_disks(&disks);
}

#[test]
fn the_next_repair_finishes_a_killed_one() {
    let (c, disks) = store(Setup::new().proxied().replicas(2));
    let dump = c.dump();
    let files = || ["/n/0001", "/n/0002", KEY].map(|key| files_of(&c, key, 0).remove(0));
    for (method, fault) in [
        ("PUT", Fault::HoldRequest),
        ("PUT", Fault::HoldAnswer),
        ("DELETE", Fault::HoldRequest),
        ("DELETE", Fault::HoldAnswer),
        ("HEAD", Fault::HoldRequest),
    ] {
        let [missing, cut, flipped] = files();
        fs::remove_file(missing).unwrap();
        fs::write(cut, "cut").unwrap();
        flip_a_bit(&flipped);
        for key in ["/n/0004", "/replaced", "/n/0001"] {
            let plain = reference::path(key.as_bytes(), 0);
            c.store_blob(&misplaced_replica(&c, key), &plain, "too much", now() - 10);
        }
        c.each_proxy(|proxy| proxy.set(method, fault));
        let repair = c.start_command(&["verify", "-deep", "-repair"]);
        crate::support::http_client::wait_until("a request is held", || any_held(&c, method));
        repair.kill();
        c.each_proxy(|proxy| {
            proxy.drop_held(method);
            proxy.remove_faults();
        });
        assert_eq!(c.dump(), dump);
        c.mkv(&["verify", "-deep", "-repair"]).expect(0);
        assert_eq!(c.dump(), dump, "{method} {fault:?}");
        c.assert_disks(&disks);
    }
    c.assert_verified();
}

fn any_held(c: &Cluster, method: &str) -> bool {
    c.proxies.iter().any(|proxy| proxy.held(method) > 0)
}
