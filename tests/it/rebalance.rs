//! REBALANCE and `mkv rebalance`: replicas move, and nothing else changes.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rocksdb::{DB, Options};

use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{flip_a_bit, numbered_keys, peak_memory, record, replicas};
use crate::support::faulty_proxy::{Fault, FaultyProxy};
use crate::support::http_client::{Conn, head, target};
use crate::support::random::seeded_rng;
use crate::support::reference;

const KEY: &str = "/foo/été";
const KEYS: usize = 33;

/// A store with values, one of them replaced and one unlinked, that was written with only the first
/// `known` volumes. The master is stopped, and -volumes now names all volumes.
fn store(setup: Setup, known: usize) -> Cluster {
    let mut c = setup.start();
    let all_names = c.names.clone();
    if known < all_names.len() {
        c.names.truncate(known);
        c.restart_master();
    }
    c.fill(&numbered_keys("/n/", KEYS - 3));
    c.put(KEY, "value").expect(201);
    c.put("/replaced", "old").expect(201);
    c.replace("/replaced", "new").expect(201);
    c.put("/unlinked", "unlinked value").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    c.wait_until_cleaned();
    c.stop_master();
    c.names = all_names;
    c
}

/// The fields of each record but its replicas: state, hash, size, time, version.
fn fields(dump: &str) -> Vec<&str> {
    dump.lines().map(|line| &line[..line.find("127.").expect("a record names a volume")]).collect()
}

/// Checks that every key is balanced and has its value.
fn assert_intact(c: &mut Cluster) {
    c.start_master();
    for key in numbered_keys("/n/", KEYS - 3) {
        assert!(c.key_info(key).balanced);
    }
    c.assert_reads_back(&numbered_keys("/n/", KEYS - 3));
    assert!(c.assert_value(KEY, "value").balanced);
    assert!(c.assert_value("/replaced", "new").version > 0);
    assert_eq!(c.unlinked(), [b"/unlinked"]);
    c.ask("RELINK", "/unlinked").expect(204);
    assert!(c.assert_value("/unlinked", "unlinked value").balanced);
}

fn assert_rebalance_succeeds(c: &Cluster) {
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0).prints(" 0 failed");
}

#[test]
fn a_new_subvolume_count_moves_replicas_and_nothing_else() {
    let mut c = store(Setup::new().replicas(2), 3);
    let before = c.dump();
    for subvolumes in [3, 1, 17, 10] {
        c.setup = c.setup.clone().subvolumes(subvolumes);
        assert_rebalance_succeeds(&c);
        let after = c.dump();
        assert_eq!(fields(&after), fields(&before));
        for key in [KEY, "/n/0007", "/unlinked", "/replaced"] {
            assert_eq!(replicas(&after, key), c.placement(key));
        }
        assert_eq!(c.blobs().len(), 2 * KEYS);
        c.assert_verified();
        c.mkv(&["rebuild"]).expect(0);
        assert_eq!(c.dump(), after);
    }
    assert_eq!(c.dump(), before);
    assert_intact(&mut c);
}

#[test]
fn a_new_replica_count_creates_or_removes_replicas() {
    let mut c = store(Setup::new().replicas(3), 3);
    let before = c.dump();
    for count in [2, 1, 3] {
        c.setup = c.setup.clone().replicas(count);
        assert_rebalance_succeeds(&c);
        assert_eq!(fields(&c.dump()), fields(&before));
        assert_eq!(c.blobs().len(), count * KEYS);
        c.assert_verified();
    }
    assert_eq!(c.dump(), before);
    assert_intact(&mut c);
}

#[test]
fn rebalance_refills_an_emptied_disk() {
    let mut c = store(Setup::new().replicas(2).subvolumes(3), 3);
    let (before, disks) = (c.dump(), c.disk_contents());
    for disk in [c.volumes[1].folder.clone(), c.disk_folder(&c.placement(KEY)[0])] {
        c.erase_disk(&disk);
        c.mkv(&["verify"]).fails(&["not whole"]).prints("replicas missing");
        assert_rebalance_succeeds(&c);
        assert_eq!(c.dump(), before);
        c.assert_disks(&disks);
        c.assert_verified();
    }
    assert_intact(&mut c);
}

#[test]
fn rebalance_replaces_replicas_of_the_wrong_size() {
    let mut c = store(Setup::new(), 3);
    let (dump, disks) = (c.dump(), c.disk_contents());
    let path = reference::path(KEY.as_bytes(), 0);
    for (replica, text) in replicas(&dump, KEY).iter().zip(["cut", "longer than it was"]) {
        fs::write(c.file(replica, &path), text).unwrap();
    }
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0).prints("1 moved, 2 copies, 10 bytes, 0 failed");
    assert_eq!(c.dump(), dump);
    c.assert_disks(&disks);
    assert_intact(&mut c);
}

#[test]
fn a_second_rebalance_changes_nothing() {
    let mut c = store(Setup::new().volumes(4).replicas(2), 2);
    assert_rebalance_succeeds(&c);
    let (dump, disks) = (c.dump(), c.disk_contents());
    let result = c.mkv(&["rebalance"]).expect(0);
    result.prints(&format!("{KEYS} keys: 0 moved, 0 copies, 0 bytes, 0 failed")).does_not_print("waiting");
    assert_eq!(c.dump(), dump);
    c.assert_disks(&disks);
    c.assert_verified();
    assert_intact(&mut c);
}

#[test]
fn a_dry_run_prints_the_same_counts_and_changes_nothing() {
    let mut c = store(Setup::new().volumes(4).replicas(2), 2);
    let (dump, disks) = (c.dump(), c.disk_contents());
    let dry = c.mkv(&["rebalance", "-dry-run"]).expect(0);
    assert_eq!(c.dump(), dump);
    c.assert_disks(&disks);
    assert!(c.debris().is_empty());
    // The expected copies, by the reference placement.
    let (mut copies, mut bytes, mut moved) = ([0; 4], [0; 4], 0);
    for line in dump.lines() {
        let key: Vec<u8> = percent_encoding::percent_decode_str(line.split('\t').next().unwrap()).collect();
        let (current, wanted) = (&line[line.find("127.").unwrap()..], c.placement(&key));
        moved += usize::from(current != wanted.join(","));
        let size = line.split_once("SIZE").unwrap().1;
        let size = u64::from_str_radix(&size[..16], 16).unwrap();
        for copy in wanted.iter().filter(|replica| !current.contains(*replica)) {
            copies[c.volume_index(copy)] += 1;
            bytes[c.volume_index(copy)] += size;
        }
    }
    let sum = |numbers: &[u64]| numbers.iter().sum::<u64>();
    let counts = format!("{} copies, {} bytes, 0 failed", sum(&copies), sum(&bytes));
    let dry = dry.prints(&format!("{KEYS} keys: {moved} to move, {counts}"));
    let real = c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    let mut real = real.prints(&format!("{KEYS} keys: {moved} moved, {counts}"));
    for volume in [2, 3] {
        assert!(copies[volume] > 0 && copies[volume - 2] == 0);
        let text = format!("{}: {} copies, {} bytes", c.names[volume], copies[volume], bytes[volume]);
        assert!(dry.out.contains(&text), "{text} is missing: {dry:?}");
        real = real.prints(&text);
    }
    assert_intact(&mut c);
}

#[test]
fn rebalance_fails_while_a_master_runs() {
    let mut c = store(Setup::new().volumes(2).replicas(1), 1);
    c.start_master();
    let dump = c.dump();
    for flags in [vec!["rebalance"], vec!["rebalance", "-dry-run"]] {
        c.mkv(&flags).fails(&["-db", &c.master_pid().to_string()]);
    }
    assert_eq!(c.dump(), dump);
    c.stop_master();
    assert_rebalance_succeeds(&c);
    assert_intact(&mut c);
}

#[test]
fn rebalance_without_an_index_creates_none() {
    let mut c = store(Setup::new().volumes(1), 1);
    let disks = c.disk_contents();
    let empty = c.folder.join("empty");
    fs::create_dir(&empty).unwrap();
    for db in [empty, c.folder.join("nowhere"), "/proc/version".into()] {
        c.mkv(&["rebalance", "-db", db.to_str().unwrap()]).expect(1);
        assert!(!db.join("index/CURRENT").exists());
    }
    assert!(!c.folder.join("nowhere").exists());
    c.assert_disks(&disks);
    assert_intact(&mut c);
}

// Kills.

#[test]
fn the_next_rebalance_finishes_a_killed_one() {
    let mut c = store(Setup::new().proxied().volumes(3).replicas(2), 2);
    let before = c.dump();
    let all_names = c.names.clone();
    for (known, method, fault) in [
        (3, "PUT", Fault::HoldRequest),
        (2, "PUT", Fault::HoldAnswer),
        (3, "DELETE", Fault::HoldRequest),
        (2, "DELETE", Fault::HoldAnswer),
        (3, "HEAD", Fault::HoldRequest),
        (2, "GET", Fault::HoldAnswer),
    ] {
        c.names = all_names[..known].to_vec();
        // A volume where some of the requests are needed.
        let index = c
            .proxies
            .iter()
            .position(|proxy| proxy.address == all_names[if (known == 3) == (method == "PUT") { 2 } else { 0 }]);
        let proxy = &c.proxies[index.unwrap()];
        proxy.set(method, fault);
        let rebalance = c.start_command(&["rebalance", "-settle", "0s"]);
        proxy.wait_held(method, 1);
        rebalance.kill();
        proxy.drop_held(method);
        c.each_proxy(FaultyProxy::remove_faults);
        // Nothing is lost: all replicas of the index exist.
        let verify = c.mkv(&["verify", "-deep", "-volumes", &all_names.join(",")]);
        verify.does_not_print("replicas missing").does_not_print("wrong").does_not_print("does not know");
        assert_eq!(fields(&c.dump()), fields(&before));
        assert_rebalance_succeeds(&c);
        assert_eq!(c.blobs().len(), 2 * KEYS, "{method} {fault:?}");
        assert!(c.debris().is_empty(), "{method} {fault:?}");
        c.assert_verified();
    }
    c.names.truncate(2);
    assert_eq!(c.dump(), before);
    assert_intact(&mut c);
}

#[test]
fn rebalance_succeeds_after_many_kills() {
    let mut random = seeded_rng();
    let mut c = store(Setup::new().volumes(4).replicas(2), 2);
    let before = c.dump();
    let all_names = c.names.clone();
    let mut killed = 0;
    for round in 0..6 {
        c.names = if round % 2 == 0 { all_names[1..].to_vec() } else { all_names[..3].to_vec() };
        let rebalance = c.start_command(&["rebalance", "-settle", "0s"]);
        thread::sleep(Duration::from_millis(random.u64(5..80)));
        killed += u32::from(rebalance.kill().code.is_none());
        assert_eq!(fields(&c.dump()), fields(&before));
    }
    println!("{killed} runs were killed");
    c.names = all_names;
    assert_rebalance_succeeds(&c);
    assert_eq!(c.blobs().len(), 2 * KEYS);
    c.assert_verified();
    assert_intact(&mut c);
}

#[test]
fn surplus_replicas_stay_until_their_copies_have_settled() {
    let mut c = store(Setup::new().volumes(2).replicas(1), 1);
    let started = Instant::now();
    let mut rebalance = c.start_command(&["rebalance", "-settle", "2s"]);
    rebalance.wait_until_prints("waiting");
    let moved = c.blobs().len() - KEYS;
    assert!(moved > 0);
    // The run was killed while it waited, so the next one waits too.
    rebalance.kill();
    assert_eq!(c.debris().len(), moved);
    let rebalance = c.start_command(&["rebalance"]);
    thread::sleep(Duration::from_millis(900).saturating_sub(started.elapsed()));
    assert!(c.blobs().len() == KEYS + moved || started.elapsed() > Duration::from_secs(1));
    rebalance.wait().expect(0);
    assert!(started.elapsed() > Duration::from_secs(1));
    assert_eq!(c.blobs().len(), KEYS);
    c.assert_verified();
    assert_intact(&mut c);
}

#[test]
fn the_master_waits_until_copies_have_settled() {
    let mut c = store(Setup::new().volumes(2).replicas(1), 1);
    let mut rebalance = c.start_command(&["rebalance", "-settle", "60s"]);
    rebalance.wait_until_prints("waiting");
    rebalance.kill();
    let before = c.disk_contents();
    assert!(before.len() > KEYS);
    c.start_master();
    // Trigger the cleaner with another key.
    c.replace("/new", "1").expect(201);
    let old_path = c.key_info("/new").path;
    c.replace("/new", "2").expect(201);
    crate::support::http_client::wait_until("the cleaner has run", || {
        c.blobs().keys().all(|blob| !blob.ends_with(&old_path))
    });
    c.ask("DELETE", "/new").expect(204);
    c.assert_disks(&before);
    c.stop_master();
    // With the old index, rebuild does not take the surplus replicas for replicas: they are still
    // debris.
    c.mkv(&["rebuild"]).expect(0).prints(&format!("{KEYS} keys, {KEYS} replicas"));
    // Without the old index, their debris is forgotten.
    fs::remove_dir_all(c.db()).unwrap();
    c.mkv(&["rebuild"]).expect(0);
    assert_rebalance_succeeds(&c);
    assert_eq!(c.blobs().len(), KEYS);
    c.start_master();
    c.assert_reads_back(&numbered_keys("/n/", KEYS - 3));
}

// Failures.

#[test]
fn rebalance_lists_the_keys_that_fail_and_moves_the_others() {
    let mut c = store(Setup::new().volumes(4).replicas(2).subvolumes(1), 3);
    let before = c.dump();
    let down = c.names[0].clone();
    c.volumes[0].stop();
    // The keys that have or want a replica on the stopped volume.
    let failing: Vec<String> = before
        .lines()
        .map(|line| line.split('\t').next().unwrap().to_string())
        .filter(|key| {
            let key: Vec<u8> = percent_encoding::percent_decode_str(key).collect();
            let text = String::from_utf8(key).unwrap();
            replicas(&before, &text).contains(&down) || c.placement(&text).contains(&down)
        })
        .collect();
    assert!(failing.len() < KEYS);
    let result = c.mkv(&["rebalance", "-settle", "0s", "-v"]);
    let result = result.fails(&[&format!("{} keys could not be rebalanced", failing.len())]);
    let result = result.prints(&format!("{} failed", failing.len()));
    for key in &failing {
        let key: Vec<u8> = percent_encoding::percent_decode_str(key).collect();
        let line = format!("\"{}\": ", key.escape_ascii());
        let text = result.err.lines().find(|text| text.starts_with(&line));
        assert!(text.is_some_and(|text| text.contains(&down)), "{line} {result:?}");
    }
    let after = c.dump();
    for line in after.lines() {
        let key = line.split('\t').next().unwrap();
        let moved = c.placement(percent_encoding::percent_decode_str(key).collect::<Vec<_>>());
        assert!(
            failing.contains(&key.to_string()) != line.ends_with(&moved.join(",")) || {
                // An unmoved record may happen to be balanced already.
                before.contains(line)
            }
        );
    }
    c.start_volumes();
    assert_rebalance_succeeds(&c);
    assert_intact(&mut c);
}

#[test]
fn rebalance_restores_a_lost_machine_without_contacting_it() {
    let mut c = Setup::new().proxied().volumes(4).replicas(2).start();
    c.fill(&numbered_keys("/n/", 30));
    let lost = c.names[3].clone();
    c.proxies[3].set("DELETE", Fault::Answer(503));
    let deleted = numbered_keys("/d/", 40)
        .into_iter()
        .find(|key| c.placement(key).iter().any(|replica| replica.starts_with(&lost)))
        .unwrap();
    c.put(&deleted, "value").expect(201);
    c.ask("DELETE", &deleted).expect(503);
    c.stop_master();
    let before = c.dump();
    assert!(before.contains(&lost) && c.debris().len() == 1);
    c.volumes[3].stop();
    let names = c.names.clone();
    c.names.truncate(3);
    c.mkv(&["rebalance", "-settle", "0s"]).fails(&["could not be rebalanced"]).prints(&lost);
    let requests_before = ["HEAD", "GET", "PUT", "DELETE"].map(|method| c.proxies[3].seen(method).len());
    c.mkv(&["rebalance", "-settle", "0s", "-lost", &lost]).expect(0).prints(" 0 failed");
    let requests_after = ["HEAD", "GET", "PUT", "DELETE"].map(|method| c.proxies[3].seen(method).len());
    assert_eq!(requests_before, requests_after);
    let after = c.dump();
    assert_eq!(fields(&after), fields(&before));
    assert!(!after.contains(&lost) && c.debris().is_empty());
    c.assert_verified();
    c.start_master();
    c.assert_reads_back(&numbered_keys("/n/", 30));
    // The machine comes back with its blobs. All are known but that of the deleted key.
    c.stop_master();
    c.proxies[3].remove_faults();
    c.start_volumes();
    c.names = names;
    let stray = c.blobs().into_iter().find(|(blob, _)| blob.ends_with(&reference::path(&deleted, 0)));
    c.mkv(&["verify"]).fails(&[]).prints("surplus").prints("that the index does not know: 1");
    fs::remove_file(stray.expect("the deleted key's blob still exists").1).unwrap();
    // Repair leaves surplus replicas where placement wants them, because a newer index may refer to
    // them.
    c.mkv(&["verify", "-repair"]).fails(&["not whole"]).prints("mkv rebalance takes it up");
    assert_rebalance_succeeds(&c);
    c.mkv(&["verify", "-repair"]).expect(0);
    assert_eq!(c.dump(), before);
}

#[test]
fn rebalance_treats_a_lost_disk_as_empty() {
    let mut c = store(Setup::new().replicas(2).subvolumes(3), 3);
    let (dump, disks) = (c.dump(), c.disk_contents());
    let lost = format!("{}/sv02", c.names[1]);
    let disk = c.disk_folder(&lost);
    // The bytes on a lost disk do not matter.
    let blobs: Vec<_> = disks.keys().filter(|file| file.starts_with(&disk)).collect();
    assert!(!blobs.is_empty());
    blobs.iter().for_each(|file| flip_a_bit(file));
    c.mkv(&["rebalance", "-settle", "0s", "-lost", &lost]).expect(0);
    assert_eq!(c.dump(), dump);
    c.assert_disks(&disks);
    assert_intact(&mut c);
}

#[test]
fn rebalance_never_copies_a_corrupt_replica() {
    let mut c = store(Setup::new(), 3);
    let (dump, disks) = (c.dump(), c.disk_contents());
    let path = reference::path(KEY.as_bytes(), 0);
    let files: Vec<_> = replicas(&dump, KEY).iter().map(|r| c.file(r, &path)).collect();
    for (bad, missing, good) in [(0, 1, 2), (0, 2, 1), (1, 0, 2)] {
        flip_a_bit(&files[bad]);
        fs::remove_file(&files[missing]).unwrap();
        assert_rebalance_succeeds(&c);
        assert_eq!(fs::read(&files[missing]).unwrap(), b"value");
        assert_eq!(fs::read(&files[good]).unwrap(), b"value");
        flip_a_bit(&files[bad]);
        assert_eq!(c.dump(), dump);
        c.assert_disks(&disks);
    }
    // No good replica is left: nothing is copied or removed.
    fs::remove_file(&files[1]).unwrap();
    [0, 2].iter().for_each(|n| flip_a_bit(&files[*n]));
    let bad = c.disk_contents();
    let result = c.mkv(&["rebalance", "-settle", "0s"]).fails(&["1 keys could not be rebalanced"]);
    result.prints("no good source").prints("/foo/\\xc3\\xa9t\\xc3\\xa9");
    assert_eq!(c.dump(), dump);
    c.assert_disks(&bad);
    [0, 2].iter().for_each(|n| flip_a_bit(&files[*n]));
    assert_rebalance_succeeds(&c);
    assert_eq!(c.dump(), dump);
    c.assert_disks(&disks);
    assert_intact(&mut c);
}

#[test]
fn without_hash_and_size_a_value_is_copied_only_if_its_replicas_agree_in_length() {
    let mut c = Setup::new().subvolumes(1).start();
    c.stop_master();
    let on_two = c.names[..2].join(",");
    {
        let index = c.db().join("index");
        let index = DB::open_cf(&Options::default(), index, ["default", "debris", "uploads"]).unwrap();
        index.put("/agree", &on_two).unwrap();
        index.put("/differ", &on_two).unwrap();
    }
    let (agree, differ) = (reference::path(b"/agree", 0), reference::path(b"/differ", 0));
    for (n, value) in ["one", "three"].iter().enumerate() {
        c.store_blob(&c.names[n], &agree, "value", 1000);
        c.store_blob(&c.names[n], &differ, value, 1000);
    }
    let result = c.mkv(&["rebalance", "-settle", "0s"]).fails(&["1 keys could not be rebalanced"]);
    result.prints("\"/differ\"").prints("differ in length");
    let dump = c.dump();
    assert_eq!(record(&dump, "/agree"), Some(&*c.placement("/agree").join(",")));
    assert_eq!(record(&dump, "/differ"), Some(&*on_two));
    assert_eq!(fs::read(c.file(&c.names[2], &agree)).unwrap(), b"value");
    assert!(!c.file(&c.names[2], &differ).exists());
    // The operator resolves the conflict by removing one replica.
    fs::remove_file(c.file(&c.names[0], &differ)).unwrap();
    assert_rebalance_succeeds(&c);
    c.start_master();
    c.assert_value("/agree", "value");
    c.assert_value("/differ", "three");
}

/// The same address in another notation: 127.1.2.3 is also 127.1.515.
fn alias(name: &str) -> String {
    let (host, port) = name.split_once(':').unwrap();
    let parts: Vec<u32> = host.split('.').map(|part| part.parse().unwrap()).collect();
    format!("{}.{}.{}:{port}", parts[0], parts[1], parts[2] << 8 | parts[3])
}

/// Otherwise each value would be copied onto itself and then deleted under its old name.
#[test]
fn a_second_name_for_a_volume_is_detected() {
    let mut c = store(Setup::new().subvolumes(1), 3);
    let (names, before, disks) = (c.names.clone(), c.dump(), c.disk_contents());
    let message = "names of one server";
    c.names = names.iter().map(|name| alias(name)).collect();
    let result = c.mkv(&["rebalance", "-settle", "0s"]);
    result.fails(&[&format!("{KEYS} keys could not be rebalanced")]).prints(message);
    c.start_master();
    c.ask("REBALANCE", KEY).expect_error(500, message);
    c.stop_master();
    // Both names of one volume in -volumes.
    c.names = names.iter().cloned().chain([alias(&names[0])]).collect();
    for command in [&["rebalance"][..], &["verify", "-repair"], &["rebuild"]] {
        c.mkv(command).fails(&[message]);
    }
    assert!(c.try_start_master().unwrap_err().contains(message));
    assert_eq!(c.dump(), before);
    c.assert_disks(&disks);
    // The supported way to rename volumes.
    c.names = names.iter().map(|name| alias(name)).collect();
    c.mkv(&["rebuild"]).fails(&["not in -volumes", "-lost"]);
    c.mkv(&["rebuild", "-lost", &names.join(",")]).expect(0);
    assert_rebalance_succeeds(&c);
    assert_eq!(fields(&c.dump()), fields(&before));
    c.assert_disks(&disks);
    c.assert_verified();
    assert_intact(&mut c);
}

/// Puts a key on the first of two volumes, where placement wants it on the second.
fn put_key_that_moves(c: &mut Cluster) -> String {
    let all_names = c.names.clone();
    let moves = |key: &String| reference::place(key.as_bytes(), &all_names, 1, 1)[0] == all_names[1];
    let key = (0..).map(|n| format!("/{n}")).find(moves).unwrap();
    c.names.truncate(1);
    c.restart_master();
    c.put(&key, "value").expect(201);
    c.names = all_names;
    c.restart_master();
    key
}

/// A power cut can lose a copy, because nginx does not fsync.
#[test]
fn a_surplus_replica_stays_while_its_copy_is_missing() {
    let mut c = Setup::new().volumes(2).replicas(1).subvolumes(1).flags(&["-settle", "1s"]).start();
    let key = put_key_that_moves(&mut c);
    c.ask("REBALANCE", &key).expect(204);
    let copy = c.files(&key).remove(0);
    fs::remove_file(&copy).unwrap();
    crate::support::http_client::wait_until("the cleaner has checked the replicas", || {
        c.log().contains("stays: a replica")
    });
    c.get(&key).expect(410);
    assert_eq!(c.blobs().len(), 1);
    c.stop_master();
    // The last pass of the command checks this too.
    c.mkv(&["rebalance", "-settle", "0s"]).expect(1);
    assert_eq!(c.blobs().len(), 1);
    c.mkv(&["verify", "-repair"]).expect(0);
    assert!(copy.exists() && c.blobs().len() == 1);
    c.start_master();
    c.assert_value(&key, "value");
}

#[test]
fn rebalance_removes_nothing_when_a_remaining_replica_is_corrupt() {
    let mut c = store(Setup::new(), 3);
    let path = reference::path(KEY.as_bytes(), 0);
    let files: Vec<_> = replicas(&c.dump(), KEY).iter().map(|r| c.file(r, &path)).collect();
    flip_a_bit(&files[0]);
    c.setup = c.setup.clone().replicas(1);
    let result = c.mkv(&["rebalance", "-settle", "0s"]).fails(&["1 keys could not be rebalanced"]);
    result.prints("other bytes").prints("/foo/\\xc3\\xa9t\\xc3\\xa9");
    assert!(files.iter().all(|file| file.exists()));
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    assert_rebalance_succeeds(&c);
    assert_eq!(c.blobs().len(), KEYS);
    assert_intact(&mut c);
}

#[test]
fn without_a_hash_differing_replicas_are_not_removed() {
    let mut c = Setup::new().flags(&["-md5sum=false"]).start();
    c.put(KEY, "value").expect(201);
    let files = c.files(KEY);
    c.stop_master();
    flip_a_bit(&files[0]);
    let disks = c.disk_contents();
    c.setup = c.setup.clone().replicas(2);
    c.mkv(&["rebalance", "-settle", "0s"]).fails(&["1 keys"]).prints("no hash tells which is right");
    c.assert_disks(&disks);
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    assert_eq!(c.blobs().len(), 2);
    c.start_master();
    c.assert_value(KEY, "value");
}

/// One nginx worker holds the DELETE and runs it after another worker has stored a new copy.
#[test]
fn an_unanswered_deletion_never_deletes_a_new_copy() {
    let setup = Setup::new().proxied().volumes(2).replicas(1).subvolumes(1);
    let mut c = setup.flags(&["-settle", "0s"]).start();
    let key = put_key_that_moves(&mut c);
    c.proxies[1].set("PUT", Fault::Answer(500));
    c.proxies[1].set("DELETE", Fault::HoldRequest);
    c.ask("REBALANCE", &key).expect_error(500, &c.names[1]);
    c.proxies[1].remove_faults();
    c.ask("REBALANCE", &key).expect_error(503, "try again in an hour");
    c.assert_value(&key, "value");
    c.wait_until_cleaned();
    // After a restart the master no longer knows of the unanswered deletion.
    c.restart_master();
    c.ask("REBALANCE", &key).expect(204);
    assert!(c.assert_value(&key, "value").balanced);
}

/// An import without sizes knows only the hash.
#[test]
fn without_a_size_rebalance_skips_sources_with_the_wrong_hash() {
    let mut c = Setup::new().subvolumes(1).start();
    c.stop_master();
    {
        let index = DB::open_cf(&Options::default(), c.db().join("index"), ["default", "debris", "uploads"]);
        let text = format!("HASH{}{}", reference::md5(b"value"), c.names[..2].join(","));
        index.unwrap().put("/cut", text).unwrap();
    }
    let path = reference::path(b"/cut", 0);
    c.store_blob(&c.names[0], &path, "val", 1000);
    c.store_blob(&c.names[1], &path, "value", 1000);
    assert_rebalance_succeeds(&c);
    assert_eq!(fs::read(c.file(&c.names[2], &path)).unwrap(), b"value");
    c.mkv(&["verify"]).fails(&["not whole"]).prints("replicas with the wrong bytes: 1");
    c.mkv(&["verify", "-repair"]).expect(0);
    c.start_master();
    c.assert_value("/cut", "value");
}

#[test]
fn rebalance_copies_a_large_value_in_little_memory() {
    let mut c = Setup::new().volumes(2).replicas(1).start();
    let all_names = c.names.clone();
    c.names.truncate(1);
    c.restart_master();
    let moves = |key: &String| reference::place(key.as_bytes(), &all_names, 1, 10)[0].starts_with(&all_names[1]);
    let key = (0..).map(|n| format!("/large/{n}")).find(moves).unwrap();
    let value = vec![b'v'; 100 << 20];
    c.put(&key, &value).expect(201);
    c.stop_master();
    c.names = all_names;
    let (peak, result) = peak_memory(&c, &["rebalance", "-settle", "0s"]);
    result.expect(0).prints("1 moved, 1 copies, 104857600 bytes");
    println!("{peak} MiB");
    assert!(peak < 40, "{peak} MiB for a value of 100 MiB");
    c.start_master();
    assert!(c.assert_value(&key, &value).balanced);
}

// REBALANCE.

#[test]
fn a_running_master_rebalances_single_keys() {
    let mut c = store(Setup::new().volumes(4).replicas(2).flags(&["-settle", "0s"]), 2);
    let before = c.dump();
    c.start_master();
    c.ask("REBALANCE", "/absent").expect_error(404, "no such key");
    for key in c.live() {
        let values = (c.key_info(&key), crate::support::http_client::follow(&c.get(&key)).body);
        c.ask("REBALANCE", &key).expect(204);
        let found = c.assert_value(&key, values.1);
        assert!(found.balanced && found.md5 == values.0.md5 && found.path == values.0.path);
        c.ask("REBALANCE", &key).expect(204);
    }
    c.ask("REBALANCE", "/unlinked").expect(204);
    assert_eq!(c.unlinked(), [b"/unlinked"]);
    c.wait_until_cleaned();
    assert_eq!(c.blobs().len(), 2 * KEYS);
    c.stop_master();
    assert_eq!(fields(&c.dump()), fields(&before));
    c.assert_verified();
    c.mkv(&["rebalance"]).expect(0).prints(" 0 moved");
    assert_intact(&mut c);
}

#[test]
fn a_shell_loop_rebalances_a_running_store() {
    let mut c = store(Setup::new().volumes(3).replicas(2).flags(&["-settle", "0s"]), 2);
    c.start_master();
    let script = r#"set -euo pipefail
        for list in list unlinked; do
          curl -sSf "$1/?$list&encoding=url" | grep -o '"/[^"]*"' | tr -d '"' |
            while read -r key; do curl -sSf -X REBALANCE "$1$key"; done
        done"#;
    let master = format!("http://{}", c.address());
    let result = Command::new("bash").args(["-c", script, "bash", &master]).output().unwrap();
    assert!(result.status.success(), "{result:?}");
    for key in c.live() {
        assert!(c.key_info(key).balanced);
    }
    c.stop_master();
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0).prints(" 0 moved");
    assert_intact(&mut c);
}

#[test]
fn rebalancing_a_key_fails_while_a_volume_is_down_or_the_key_is_locked() {
    let mut c = Setup::new().proxied().volumes(3).replicas(1).flags(&["-settle", "0s"]).start();
    let all_names = c.names.clone();
    let moves = |key: &String| reference::place(key.as_bytes(), &all_names, 1, 10)[0].starts_with(&all_names[2]);
    let key = (0..).map(|n| format!("/{n}")).find(moves).unwrap();
    c.names.truncate(2);
    c.restart_master();
    c.put(&key, "value").expect(201);
    let old = c.holder(&key, 0);
    c.names = all_names;
    c.restart_master();
    // Both the current volume and the wanted one must be up.
    for (volume, method) in [(old, "HEAD"), (2, "PUT")] {
        c.volumes[volume].stop();
        let answer = c.ask("REBALANCE", &key).expect_error(503, &c.names[volume]);
        assert!(answer.header("Retry-After").is_some(), "{method}");
        c.start_volumes();
        assert!(!c.assert_value(&key, "value").balanced);
    }
    // The proxy read the whole copy, so the copy may still appear within an hour.
    c.allow_debris(&key);
    assert_eq!(c.blobs().len(), 1);
    c.proxies[2].set("PUT", Fault::HoldRequest);
    let mut conn = Conn::open(&c.address());
    conn.send(head("REBALANCE", &key, &[]));
    c.proxies[2].wait_held("PUT", 1);
    for method in ["REBALANCE", "DELETE", "UNLINK"] {
        c.ask(method, &key).expect_error(409, "another");
    }
    c.replace(&key, "other").expect_error(409, "another");
    assert!(!c.assert_value(&key, "value").balanced);
    c.proxies[2].release("PUT");
    conn.answer_to("REBALANCE").expect(204);
    assert!(c.assert_value(&key, "value").balanced);
    let mut writer = c.conn();
    c.proxies[2].set("PUT", Fault::HoldRequest);
    writer.head("REPLACE", &target(&key), &[("Content-Length", "3")]).send("new");
    c.proxies[2].wait_held("PUT", 1);
    c.ask("REBALANCE", &key).expect_error(409, "another");
    c.proxies[2].release("PUT");
    writer.answer().expect(201);
    c.ask("REBALANCE", &key).expect(204);
    c.assert_value(&key, "new");
    crate::support::http_client::wait_until("the old blob is deleted", || c.blobs().len() == 1);
}

#[test]
fn a_running_master_never_copies_a_corrupt_replica() {
    let mut c = Setup::new().replicas(2).flags(&["-settle", "0s"]).start();
    c.put(KEY, "value").expect(201);
    let files = c.files(KEY);
    fs::remove_file(&files[0]).unwrap();
    flip_a_bit(&files[1]);
    c.ask("REBALANCE", KEY).expect_error(500, "no good source");
    assert!(!files[0].exists() && files[1].exists());
    flip_a_bit(&files[1]);
    c.ask("REBALANCE", KEY).expect(204);
    assert!(c.assert_value(KEY, "value").balanced);
    // Without any replica there is nothing to copy.
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
    assert!(matches!(c.ask("REBALANCE", KEY).status, 410 | 500));
    fs::write(&files[1], "value").unwrap();
    c.ask("REBALANCE", KEY).expect(204);
    c.assert_value(KEY, "value");
    c.wait_until_cleaned();
    c.stop_master();
    c.assert_verified();
    c.start_master();
}
