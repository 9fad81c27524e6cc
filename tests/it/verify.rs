//! `mkv verify`: its findings, what `-repair` repairs, and what it must never delete.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{
    Disks, Ran, copy_folder, flip_a_bit, now, numbered, replicas, tree, value_of,
};
use crate::support::faulty_proxy::{Fault, Faulty};
use crate::support::http_client::{Conn, target};
use crate::support::random::seeded_rng;
use crate::support::reference;

const KEY: &str = "/foo/été";
const KEYS: usize = 33;

/// A store with values, one of them replaced and one unlinked. The master is stopped. Also returns
/// the disks' contents.
fn store(setup: Setup) -> (Cluster, Disks) {
    let mut c = setup.start();
    c.fill(&numbered("/n/", KEYS - 3));
    c.put(KEY, "value").expect(201);
    c.put("/replaced", "old").expect(201);
    c.replace("/replaced", "new").expect(201);
    c.put("/unlinked", "unlinked value").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    c.cleaned();
    c.stop_master();
    let disks = c.disks();
    (c, disks)
}

/// Checks that every blob still exists with its bytes.
#[track_caller]
fn nothing_is_lost(c: &Cluster, before: &Disks) {
    let after = c.disks();
    let lost: Vec<_> =
        before.iter().filter(|(file, text)| after.get(*file) != Some(text)).collect();
    assert!(lost.is_empty(), "lost or changed: {lost:#?}");
}

fn files_of(c: &Cluster, key: &str, version: u64) -> Vec<PathBuf> {
    let path = reference::path(key.as_bytes(), version);
    replicas(&c.dump(), key).iter().map(|replica| c.file(replica, &path)).collect()
}

/// A folder on a volume where placement wants no replica of the key.
fn elsewhere(c: &Cluster, key: &str) -> String {
    let placed = c.placed(key);
    let other = c.names.iter().find(|name| !placed.iter().any(|r| r.starts_with(*name)));
    format!("{}/sv00", other.expect("there are more volumes than replicas"))
}

// Findings.

#[test]
fn a_whole_store_is_told_to_be_whole_and_nothing_is_changed() {
    let (mut c, disks) = store(Setup::new().replicas(2));
    let (index, temporary) = (c.index_files(), c.folder.join("tmp"));
    fs::create_dir(&temporary).unwrap();
    for flags in [vec!["verify"], vec!["verify", "-deep", "-v"]] {
        let ran = c.mkv_command(&flags).env("TMPDIR", &temporary).output().unwrap();
        let out = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success() && out.contains("the store is whole"), "{ran:?}");
        assert!(out.contains(&format!("{KEYS} keys in the index, 0 with findings")), "{out}");
        c.index_is(&index);
        c.disks_are(&disks);
    }
    assert!(tree(&temporary).is_empty());
    // -repair changes nothing in a healthy store.
    let dump = c.dump();
    c.mkv(&["verify", "-repair", "-deep", "-strays", "-grace", "0s"]).expect(0);
    assert_eq!(c.dump(), dump);
    c.disks_are(&disks);
    c.start_master();
    c.mkv(&["verify", "-deep"]).expect(0).says("the store is whole");
}

#[test]
fn every_kind_of_fault_is_found_and_what_can_be_is_mended() {
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
    let mut whole = c.disks();
    let debris = c.file(&replicas(&dump, "/deleted")[1], &reference::path(b"/deleted", 0));
    let dump = c.dump();
    fs::remove_file(&files_of(&c, KEY, 0)[0]).unwrap();
    fs::remove_file(&files_of(&c, "/unlinked", 0)[1]).unwrap();
    fs::write(&files_of(&c, "/n/0000", 0)[1], "x").unwrap();
    let plain = |key: &str| reference::path(key.as_bytes(), 0);
    c.plant(&elsewhere(&c, "/n/0001"), &plain("/n/0001"), "surplus", 1000);
    c.plant(&elsewhere(&c, "/replaced"), &plain("/replaced"), "stale", 1000);
    let newer = reference::path(b"/n/0002", u64::MAX / 2);
    c.plant(&c.names[0], &newer, "newer", 1000);
    c.plant(&c.names[1], &plain("/unknown"), "unknown", 1000);
    c.plant(&c.names[2], "/note.txt", "no blob", 1000);
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
    let damaged = c.disks();
    let ran = c.mkv(&["verify"]).fails(&["not whole"]);
    let ran = lines.iter().fold(ran, |ran, line| ran.says(line));
    ran.says("33 keys in the index")
        .says(&format!("\"/unlinked\" http://{}", replicas(&dump, "/unlinked")[1]))
        .says(&format!("http://{}{newer}", c.names[0]))
        .says(&format!("{}/note.txt", c.names[2]));
    c.disks_are(&damaged);
    assert_eq!(c.dump(), dump);
    // A blob newer than the index suggests that it is the wrong index, so nothing is removed.
    let ran = c.mkv(&["verify", "-repair"]).fails(&["not whole"]);
    let ran = lines[..2].iter().fold(ran, |ran, line| ran.never_says(line));
    let ran = lines[2..].iter().fold(ran, |ran, line| ran.says(line));
    ran.says("Nothing is removed").says("-db");
    fs::remove_file(c.file(&c.names[0], &newer)).unwrap();
    // Findings without a safe repair stay.
    let ran = c.mkv(&["verify", "-repair"]).fails(&["not whole"]);
    let ran = lines[..6].iter().fold(ran, |ran, line| ran.never_says(line));
    lines[6..].iter().fold(ran, |ran, line| ran.says(line));
    assert_eq!(c.dump(), dump);
    assert!(!debris.exists() && c.debris().is_empty());
    fs::remove_file(c.file(&c.names[1], &plain("/unknown"))).unwrap();
    fs::remove_file(c.file(&c.names[2], "/note.txt")).unwrap();
    whole.remove(&debris).expect("it was debris");
    c.disks_are(&whole);
    c.verified();
}

#[test]
fn all_names_are_shown_with_v_and_the_first_ones_without() {
    let (c, disks) = store(Setup::new());
    let lost = c.volumes[1].files();
    lost.values().for_each(|file| fs::remove_file(file).unwrap());
    let line = format!("replicas missing: {}", lost.len());
    let few = c.mkv(&["verify"]).fails(&["not whole"]).says(&line);
    let all = c.mkv(&["verify", "-v"]).fails(&["not whole"]).says(&line);
    let names = |ran: &Ran| {
        lost.keys().filter(|path| ran.out.contains(&format!("{}{path}", c.names[1]))).count()
    };
    assert!(lost.len() > 15 && names(&all) == lost.len(), "{all:?}");
    assert!((1..=15).contains(&names(&few)), "{few:?}");
    few.says("-v shows all");
    c.mkv(&["verify", "-repair"]).expect(0);
    c.disks_are(&disks);
}

#[test]
fn a_flipped_bit_is_found_by_deep_and_healed_by_repair() {
    let (c, disks) = store(Setup::new());
    let dump = c.dump();
    for (key, at) in [(KEY, 0), ("/unlinked", 1), ("/n/0003", 2)] {
        flip_a_bit(&files_of(&c, key, 0)[at]);
    }
    let flipped = c.disks();
    assert!(flipped != disks);
    c.mkv(&["verify"]).expect(0);
    c.mkv(&["verify", "-repair"]).expect(0);
    c.disks_are(&flipped);
    c.mkv(&["verify", "-deep"]).fails(&["not whole"]).says("replicas with the wrong bytes: 3");
    c.disks_are(&flipped);
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    c.disks_are(&disks);
    assert_eq!(c.dump(), dump);
    assert!(c.debris().is_empty());
    c.verified();
}

#[test]
fn of_values_without_a_hash_the_bytes_of_the_majority_are_right() {
    let mut c = Setup::new().flags(&["-md5sum=false"]).start();
    c.put("/two/of/three", "value").expect(201);
    c.put("/undecided", "value").expect(201);
    let files = (c.files("/two/of/three"), c.files("/undecided"));
    c.stop_master();
    flip_a_bit(&files.0[0]);
    let undecided = ["value", "valuf", "valug"];
    files.1.iter().zip(undecided).for_each(|(file, text)| fs::write(file, text).unwrap());
    c.mkv(&["verify", "-deep"]).fails(&[]).says("wrong bytes: 4");
    c.mkv(&["verify", "-deep", "-repair"]).fails(&[]).says("wrong bytes: 3").says("/undecided");
    assert_eq!(fs::read(&files.0[0]).unwrap(), b"value");
    for (file, text) in files.1.iter().zip(undecided) {
        assert_eq!(fs::read(file).unwrap(), text.as_bytes());
        fs::write(file, "value").unwrap();
    }
    c.verified();
}

#[test]
fn a_volume_that_is_down_is_an_error_and_nothing_is_touched() {
    let (c, disks) = store(Setup::new().replicas(2));
    let mut c = c;
    c.plant(&elsewhere(&c, KEY), &reference::path(KEY.as_bytes(), 0), "value", 1000);
    let with = c.disks();
    c.volumes[1].stop();
    for flags in [vec!["verify"], vec!["verify", "-repair", "-deep", "-strays", "-grace", "0s"]] {
        c.mkv(&flags).fails(&[&format!("http://{}/", c.names[1])]);
        c.disks_are(&with);
    }
    c.start_volumes();
    c.mkv(&["verify", "-repair"]).expect(0);
    c.disks_are(&disks);
}

#[test]
fn verify_beside_a_running_master_under_writes_has_no_findings() {
    let mut random = seeded_rng();
    let c = Setup::new().replicas(2).subvolumes(3).start();
    c.fill(&numbered("/still/", 20));
    let (stop, written) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for writer in 0..3 {
            let (c, stop, written) = (&c, &stop, &written);
            let mut random = random.fork();
            scope.spawn(move || {
                let mut conn = Conn::open(&c.address());
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("/{writer}/{}", random.u32(..8));
                    let method = ["PUT", "REPLACE", "REPLACE", "DELETE", "UNLINK", "RELINK"]
                        [random.usize(..6)];
                    let body = [b'v'; 3000];
                    let body =
                        method.ends_with(['T', 'E']).then_some(&body[..random.usize(1..3000)]);
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
                c.mkv(&flags).expect(0).says("the store is whole");
            }
        });
        stop.store(true, Ordering::Relaxed);
        verified.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    assert!(written.into_inner() > 100);
}

#[test]
fn what_is_deleted_before_the_master_is_restarted_is_not_missing() {
    let mut c = Setup::new().proxied().start();
    c.put(KEY, "value").expect(201);
    c.put("/deleted", "value").expect(201);
    c.each_proxy(|proxy| proxy.set("GET", Fault::HoldRequest));
    let verify = c.begin(&["verify"]);
    crate::support::http_client::until("it lists", || held(&c, "GET"));
    c.ask("DELETE", "/deleted").expect(204);
    c.restart_master();
    c.each_proxy(|proxy| proxy.release("GET"));
    verify.ends().expect(0).says("the store is whole");
}

#[test]
fn debris_is_a_running_masters_business_and_a_finding_without_one() {
    let mut c = Setup::new().proxied().start();
    c.put("/other", "other").expect(201);
    c.put(KEY, "value").expect(201);
    let holder = c.holder(KEY, 1);
    c.proxies[holder].set("DELETE", Fault::Answer(503));
    c.ask("DELETE", KEY).expect(503);
    c.mkv(&["verify"]).expect(0).says("debris");
    c.stop_master();
    c.mkv(&["verify"]).fails(&["not whole"]).says("debris: 1");
    // The volume still refuses, so the debris stays.
    c.mkv(&["verify", "-repair"]).fails(&["not whole"]).says("debris: 1");
    c.proxies[holder].behave();
    c.mkv(&["verify", "-repair"]).expect(0);
    assert!(c.debris().is_empty() && c.blobs().len() == 3);
}

// Refused repairs.

#[test]
fn a_repair_beside_a_running_master_is_refused() {
    let (mut c, _) = store(Setup::new().replicas(2));
    fs::remove_file(&files_of(&c, KEY, 0)[0]).unwrap();
    c.start_master();
    let disks = c.disks();
    c.mkv(&["verify", "-repair"]).fails(&["-db", &c.master_pid().to_string()]);
    c.disks_are(&disks);
    c.mkv(&["verify"]).fails(&["not whole"]);
    c.stop_master();
    c.mkv(&["verify", "-repair"]).expect(0);
}

#[test]
fn strays_are_for_repair_only() {
    let (c, disks) = store(Setup::new().volumes(1));
    let ran = c.mkv(&["verify", "-strays"]).expect(2);
    assert!(ran.err.contains("-strays") && ran.err.contains("-repair"), "{ran:?}");
    c.disks_are(&disks);
}

const ALL: [&str; 6] = ["verify", "-repair", "-deep", "-strays", "-grace", "0s"];

#[test]
fn a_mistyped_db_without_an_index_costs_nothing_and_makes_none() {
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
        let before = names(&db);
        for flags in [&ALL[..], &ALL[..2], &["verify"]] {
            c.mkv(&[flags, &["-db", db.to_str().unwrap()]].concat()).fails(&[]);
            assert_eq!(names(&db), before, "{}", db.display());
        }
    }
    c.disks_are(&disks);
    assert_eq!(c.dump(), dump);
    c.start_master();
}

/// The names in a folder, if it is one, without the files that hold a command's output.
fn names(folder: &Path) -> Option<Vec<String>> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.filter(|name| !name.starts_with("command-")).collect();
    names.sort();
    Some(names)
}

#[test]
fn a_repair_with_an_empty_index_is_refused() {
    let (mut c, disks) = store(Setup::new().replicas(2));
    let (flags, kept) = (c.setup.clone(), c.db());
    fs::rename(&kept, c.folder.join("kept")).unwrap();
    // A master started with the wrong -db leaves an empty index.
    c.setup = flags.flags(&[]);
    c.start_master();
    assert!(c.live().is_empty());
    c.stop_master();
    for flags in [&ALL[..], &ALL[..2]] {
        c.mkv(flags).fails(&["empty", "-db"]);
        c.disks_are(&disks);
    }
    fs::remove_dir_all(&kept).unwrap();
    fs::rename(c.folder.join("kept"), kept).unwrap();
    c.verified();
}

#[test]
fn the_index_of_another_store_costs_no_blob() {
    for (ours, theirs, replaced) in [(0..20, 0..20, 0), (0..30, 0..22, 9), (0..20, 5..40, 3)] {
        let (mut c, mut other) =
            (Setup::new().replicas(2).start(), Setup::new().replicas(2).start());
        let keys = numbered("/n/", 40);
        c.fill(&keys[ours]);
        other.fill(&keys[theirs]);
        // Some versions are newer in this store, some in the other.
        for n in 0..replaced {
            let store = if n % 2 == 0 { &c } else { &other };
            store.replace(&keys[10 + n], "another value").expect(201);
        }
        c.cleaned();
        other.cleaned();
        c.stop_master();
        other.stop_master();
        let (disks, others) = (c.disks(), other.disks());
        let db = other.db();
        for flags in [&ALL[..2], &ALL[..3], &ALL[..]] {
            let ran = c.mkv(&[flags, &["-db", db.to_str().unwrap()]].concat());
            nothing_is_lost(&c, &disks);
            nothing_is_lost(&other, &others);
            ran.expect(1);
        }
        c.verified();
        other.verified();
    }
}

#[test]
fn an_old_copy_of_the_index_costs_no_blob() {
    let mut c = Setup::new().proxied().volumes(4).replicas(2).flags(&["-settle", "0s"]).start();
    let all = c.names.clone();
    c.names.truncate(3);
    c.restart_master();
    let keys = numbered("/n/", 40);
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
    crate::support::http_client::until("both have begun", || c.writing().len() == 2);
    copy_folder(&c.db(), &c.folder.join("copy"));
    c.each_proxy(Faulty::behave);
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
    c.cleaned();
    c.names = all;
    c.restart_master();
    for key in &keys[10..30] {
        c.ask("REBALANCE", key).expect(204);
    }
    c.cleaned();
    c.stop_master();
    let (disks, dump) = (c.disks(), c.dump());
    let copy = c.folder.join("copy");
    for flags in [&ALL[..2], &ALL[..3], &ALL[..]] {
        let ran = c.mkv(&[flags, &["-db", copy.to_str().unwrap()]].concat());
        nothing_is_lost(&c, &disks);
        assert_eq!(c.dump(), dump);
        ran.expect(1);
    }
    // With the right index, the unneeded copies are removed.
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    nothing_is_lost(&c, &disks);
    c.start_master();
    for key in ["/pending", "/n/0000"] {
        c.holds(key, "pending");
    }
    c.reads_back(&keys[10..]);
}

#[test]
fn the_last_good_copy_is_never_removed() {
    let mut c = Setup::new().replicas(1).start();
    for key in ["/flipped", "/missing", "/cut", "/stale"] {
        c.put(key, "the good value").expect(201);
    }
    c.replace("/stale", "the good value").expect(201);
    c.cleaned();
    let stale = c.found("/stale").version;
    c.stop_master();
    let plain = |key: &str| reference::path(key.as_bytes(), 0);
    let mut good = Vec::new();
    for key in ["/flipped", "/missing", "/cut", "/stale"] {
        let other = elsewhere(&c, key);
        c.plant(&other, &plain(key), "the good value", 1000);
        good.push(c.file(&other, &plain(key)));
    }
    let files = ["/flipped", "/missing", "/cut"].map(|key| files_of(&c, key, 0).remove(0));
    flip_a_bit(&files[0]);
    fs::remove_file(&files[1]).unwrap();
    fs::write(&files[2], "cut").unwrap();
    flip_a_bit(&files_of(&c, "/stale", stale)[0]);
    for flags in [&ALL[..2], &ALL[..]] {
        c.mkv(flags);
        for file in &good[..3] {
            // The value is repaired or still in the surplus replica.
            let key = good.iter().position(|other| other == file).unwrap();
            let there = [file, &files[key]].map(|file| fs::read(file).unwrap_or_default());
            assert!(there.iter().any(|bytes| bytes == b"the good value"), "{}", file.display());
        }
        assert!(good[3].exists(), "what replaced it cannot be read");
    }
    for key in ["/flipped", "/missing", "/cut", "/stale"] {
        let file = files_of(&c, key, if key == "/stale" { stale } else { 0 }).remove(0);
        fs::write(file, "the good value").unwrap();
    }
    c.mkv(&["verify", "-repair"]).expect(0);
    assert_eq!(c.blobs().len(), 4);
}

#[test]
fn nothing_is_removed_of_a_key_whose_replicas_are_not_all_whole() {
    let (c, disks) = store(Setup::new().proxied().replicas(2));
    let plain = reference::path(KEY.as_bytes(), 0);
    let surplus = c.file(&elsewhere(&c, KEY), &plain);
    c.plant(&elsewhere(&c, KEY), &plain, "value", 1000);
    let missing = files_of(&c, KEY, 0).remove(1);
    fs::remove_file(&missing).unwrap();
    let volume = c.holder(KEY, 1);
    c.proxies[volume].set("PUT", Fault::Answer(500));
    c.mkv(&["verify", "-repair"]).fails(&["not whole"]).says("keys that are not repaired: 1");
    assert!(surplus.exists() && !missing.exists() && c.debris().is_empty());
    c.proxies[volume].behave();
    c.mkv(&["verify", "-repair"]).expect(0);
    c.disks_are(&disks);
}

/// Stands in for a bad sector.
#[test]
fn a_blob_that_cannot_be_read_is_a_replica_that_is_missing() {
    let (c, disks) = store(Setup::new().replicas(2));
    let file = files_of(&c, KEY, 0).remove(0);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
    c.mkv(&["verify", "-deep"]).fails(&["not whole"]).says("replicas missing: 1");
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    c.disks_are(&disks);
}

#[test]
fn a_surplus_replica_with_other_bytes_stays_where_no_hash_tells_which_is_right() {
    let mut c = Setup::new().replicas(2).flags(&["-md5sum=false"]).start();
    c.put(KEY, "value").expect(201);
    c.stop_master();
    let surplus = elsewhere(&c, KEY);
    let plain = reference::path(KEY.as_bytes(), 0);
    c.plant(&surplus, &plain, "other", 1000);
    c.mkv(&["verify", "-repair"]).fails(&["not whole"]).says("no hash tells");
    assert!(c.file(&surplus, &plain).exists());
    c.plant(&surplus, &plain, "value", 1000);
    c.mkv(&["verify", "-repair"]).expect(0);
    assert_eq!(c.blobs().len(), 2);
}

#[test]
fn of_replicas_that_differ_none_is_copied_where_no_hash_tells_which_is_right() {
    let mut c = Setup::new().flags(&["-md5sum=false"]).start();
    c.put(KEY, "value").expect(201);
    c.stop_master();
    let files = files_of(&c, KEY, 0);
    flip_a_bit(&files[0]);
    fs::remove_file(&files[1]).unwrap();
    let disks = c.disks();
    c.mkv(&["verify", "-repair"]).fails(&["not whole"]).says("no hash tells which is right");
    c.disks_are(&disks);
    let deep = c.mkv(&["verify", "-deep", "-repair"]).fails(&["not whole"]);
    deep.says("none of its replicas is known to hold the right bytes");
    c.mkv(&["rebalance"]).fails(&["1 keys"]).says("no hash tells which is right");
    c.disks_are(&disks);
    c.start_master();
    assert!(c.ask("REBALANCE", KEY).expect(500).text().contains("no hash tells"));
    c.disks_are(&disks);
    fs::remove_file(&files[0]).unwrap();
    c.ask("REBALANCE", KEY).expect(204);
    c.holds(KEY, "value");
}

#[test]
fn a_key_without_any_replica_is_a_finding_that_stays() {
    let (c, disks) = store(Setup::new().replicas(2));
    let files = files_of(&c, "/replaced", version(&c));
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
    for flags in [&["verify"][..], &ALL[..]] {
        c.mkv(flags).fails(&["not whole"]).says("replicas missing: 2").says("\"/replaced\"");
    }
    assert_eq!(c.dump().lines().count(), KEYS);
    files.iter().for_each(|file| fs::write(file, "new").unwrap());
    c.verified();
    assert_eq!(c.disks().len(), disks.len());
}

fn version(c: &Cluster) -> u64 {
    let dump = c.dump();
    let (_, version) = dump.split_once("VERS").expect("a key was replaced");
    u64::from_str_radix(&version[..16], 16).unwrap()
}

#[test]
fn strays_go_only_when_they_are_asked_to_and_older_than_the_grace() {
    let (c, disks) = store(Setup::new().replicas(2));
    let plain = |key: &str| reference::path(key.as_bytes(), 0);
    let ages = [("/minutes", 600), ("/hours", 7200), ("/days", 100_000)];
    for (key, age) in ages {
        c.plant(&elsewhere(&c, key), &plain(key), "stray", now() - age);
    }
    let there = || ages.map(|(key, _)| c.file(&elsewhere(&c, key), &plain(key)).exists());
    let line = "blobs of keys that the index does not know: ";
    c.mkv(&["verify"]).fails(&[]).says(&format!("{line}3"));
    c.mkv(&["verify", "-repair"]).fails(&[]).says(&format!("{line}3"));
    assert_eq!(there(), [true, true, true]);
    c.mkv(&["verify", "-repair", "-strays"]).fails(&[]).says(&format!("{line}2"));
    assert_eq!(there(), [true, true, false]);
    c.mkv(&["verify", "-repair", "-strays", "-grace", "1h"]).fails(&[]).says(&format!("{line}1"));
    assert_eq!(there(), [true, false, false]);
    // A stray newer than everything in the index protects all strays, whatever the grace.
    let new = elsewhere(&c, "/new");
    c.plant(&new, &plain("/new"), "stray", now() + 1);
    c.mkv(&["verify", "-repair", "-strays", "-grace", "0s"]).fails(&[]).says(&format!("{line}2"));
    assert_eq!(there(), [true, false, false]);
    fs::remove_file(c.file(&new, &plain("/new"))).unwrap();
    c.mkv(&["verify", "-repair", "-strays", "-grace", "5m"]).expect(0);
    c.disks_are(&disks);
    c.verified();
}

#[test]
fn a_lost_disk_of_more_keys_than_are_looked_at_together_is_mended() {
    let mut c = Setup::new().subvolumes(1).replicas(2).start();
    let keys = numbered("/n/", 6500);
    c.fill(&keys);
    c.stop_master();
    let disks = c.disks();
    let lost: Vec<PathBuf> = c.volumes[0].files().into_values().collect();
    assert!(lost.len() > 4096, "{}", lost.len());
    lost.iter().for_each(|file| fs::remove_file(file).unwrap());
    let line = format!("replicas missing: {}", lost.len());
    let more = format!("… and {} more", lost.len() - 10);
    let with_findings = format!("{} with findings", lost.len());
    c.mkv(&["verify"]).fails(&["not whole"]).says(&line).says(&more).says(&with_findings);
    // A blob newer than the index keeps all surplus blobs, from the first key to the last.
    let (first, last) = (elsewhere(&c, "/n/0000"), reference::path(b"/z", 0));
    c.plant(&first, &reference::path(b"/n/0000", 0), value_of(&keys[0]), 1000);
    c.plant(&c.names[1], &last, "newer", now() + 1);
    let unknown = "that the index does not know: 1";
    let ran = c.mkv(&ALL).fails(&["not whole"]).says("Nothing is removed").says(unknown);
    ran.says("surplus replicas: 1").says("2 with findings").never_says("missing");
    fs::remove_file(c.file(&c.names[1], &last)).unwrap();
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    c.disks_are(&disks);
}

#[test]
fn a_repair_killed_at_any_point_is_done_by_the_next_one() {
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
            c.plant(&elsewhere(&c, key), &plain, "too much", now() - 10);
        }
        c.each_proxy(|proxy| proxy.set(method, fault));
        let repair = c.begin(&["verify", "-deep", "-repair"]);
        crate::support::http_client::until("one is held", || held(&c, method));
        repair.kill();
        c.each_proxy(|proxy| {
            proxy.lose_held(method);
            proxy.behave();
        });
        assert_eq!(c.dump(), dump);
        c.mkv(&["verify", "-deep", "-repair"]).expect(0);
        assert_eq!(c.dump(), dump, "{method} {fault:?}");
        c.disks_are(&disks);
    }
    c.verified();
}

fn held(c: &Cluster, method: &str) -> bool {
    c.proxies.iter().any(|proxy| proxy.held(method) > 0)
}
