//! REBALANCE and `mkv rebalance`: replicas move, and nothing else changes.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rocksdb::{DB, Options};

use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{flip_a_bit, numbered, peak, record, replicas};
use crate::support::faulty_proxy::{Fault, Faulty};
use crate::support::http_client::{Conn, head, target};
use crate::support::random::seeded_rng;
use crate::support::reference;

const KEY: &str = "/foo/été";
const KEYS: usize = 33;

/// A store with values, one of them replaced and one unlinked, that was written with only the first
/// `known` volumes. The master is stopped, and -volumes now names all volumes.
fn store(setup: Setup, known: usize) -> Cluster {
    let mut c = setup.start();
    let all = c.names.clone();
    if known < all.len() {
        c.names.truncate(known);
        c.restart_master();
    }
    c.fill(&numbered("/n/", KEYS - 3));
    c.put(KEY, "value").expect(201);
    c.put("/replaced", "old").expect(201);
    c.replace("/replaced", "new").expect(201);
    c.put("/unlinked", "unlinked value").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    c.cleaned();
    c.stop_master();
    c.names = all;
    c
}

/// The fields of each record but its replicas: state, hash, size, time, version.
fn fields(dump: &str) -> Vec<&str> {
    dump.lines().map(|line| &line[..line.find("127.").expect("it names a volume")]).collect()
}

/// Checks that every key is balanced and has its value.
fn is_intact(c: &mut Cluster) {
    c.start_master();
    for key in numbered("/n/", KEYS - 3) {
        assert!(c.found(key).balanced);
    }
    c.reads_back(&numbered("/n/", KEYS - 3));
    assert!(c.holds(KEY, "value").balanced);
    assert!(c.holds("/replaced", "new").version > 0);
    assert_eq!(c.unlinked(), [b"/unlinked"]);
    c.ask("RELINK", "/unlinked").expect(204);
    assert!(c.holds("/unlinked", "unlinked value").balanced);
}

fn settled(c: &Cluster) {
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0).says(" 0 failed");
}

#[test]
fn another_number_of_subvolumes_moves_replicas_and_nothing_else() {
    let mut c = store(Setup::new().replicas(2), 3);
    let before = c.dump();
    for subvolumes in [3, 1, 17, 10] {
        c.setup = c.setup.clone().subvolumes(subvolumes);
        settled(&c);
        let after = c.dump();
        assert_eq!(fields(&after), fields(&before));
        for key in [KEY, "/n/0007", "/unlinked", "/replaced"] {
            assert_eq!(replicas(&after, key), c.placed(key));
        }
        assert_eq!(c.blobs().len(), 2 * KEYS);
        c.verified();
        c.mkv(&["rebuild"]).expect(0);
        assert_eq!(c.dump(), after);
    }
    assert_eq!(c.dump(), before);
    is_intact(&mut c);
}

#[test]
fn more_or_fewer_replicas_are_made_and_removed() {
    let mut c = store(Setup::new().replicas(3), 3);
    let before = c.dump();
    for count in [2, 1, 3] {
        c.setup = c.setup.clone().replicas(count);
        settled(&c);
        assert_eq!(fields(&c.dump()), fields(&before));
        assert_eq!(c.blobs().len(), count * KEYS);
        c.verified();
    }
    assert_eq!(c.dump(), before);
    is_intact(&mut c);
}

#[test]
fn an_emptied_disk_is_filled_again() {
    let mut c = store(Setup::new().replicas(2).subvolumes(3), 3);
    let (before, disks) = (c.dump(), c.disks());
    for disk in [c.volumes[1].folder.clone(), c.disk(&c.placed(KEY)[0])] {
        c.empty(&disk);
        c.mkv(&["verify"]).fails(&["not whole"]).says("replicas missing");
        settled(&c);
        assert_eq!(c.dump(), before);
        c.disks_are(&disks);
        c.verified();
    }
    is_intact(&mut c);
}

#[test]
fn a_replica_of_the_wrong_size_is_copied_anew() {
    let mut c = store(Setup::new(), 3);
    let (dump, disks) = (c.dump(), c.disks());
    let path = reference::path(KEY.as_bytes(), 0);
    for (replica, text) in replicas(&dump, KEY).iter().zip(["cut", "longer than it was"]) {
        fs::write(c.file(replica, &path), text).unwrap();
    }
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0).says("1 moved, 2 copies, 10 bytes, 0 failed");
    assert_eq!(c.dump(), dump);
    c.disks_are(&disks);
    is_intact(&mut c);
}

#[test]
fn a_second_rebalance_changes_nothing() {
    let mut c = store(Setup::new().volumes(4).replicas(2), 2);
    settled(&c);
    let (dump, disks) = (c.dump(), c.disks());
    let ran = c.mkv(&["rebalance"]).expect(0);
    ran.says(&format!("{KEYS} keys: 0 moved, 0 copies, 0 bytes, 0 failed")).never_says("waiting");
    assert_eq!(c.dump(), dump);
    c.disks_are(&disks);
    c.verified();
    is_intact(&mut c);
}

#[test]
fn a_dry_run_says_what_would_be_done_and_changes_nothing() {
    let mut c = store(Setup::new().volumes(4).replicas(2), 2);
    let (dump, disks) = (c.dump(), c.disks());
    let dry = c.mkv(&["rebalance", "-dry-run"]).expect(0);
    assert_eq!(c.dump(), dump);
    c.disks_are(&disks);
    assert!(c.debris().is_empty());
    // The expected copies, by the reference placement.
    let (mut copies, mut bytes, mut moved) = ([0; 4], [0; 4], 0);
    for line in dump.lines() {
        let key: Vec<u8> =
            percent_encoding::percent_decode_str(line.split('\t').next().unwrap()).collect();
        let (there, wanted) = (&line[line.find("127.").unwrap()..], c.placed(&key));
        moved += usize::from(there != wanted.join(","));
        let size = line.split_once("SIZE").unwrap().1;
        let size = u64::from_str_radix(&size[..16], 16).unwrap();
        for copy in wanted.iter().filter(|replica| !there.contains(*replica)) {
            copies[c.number(copy)] += 1;
            bytes[c.number(copy)] += size;
        }
    }
    let sum = |numbers: &[u64]| numbers.iter().sum::<u64>();
    let counts = format!("{} copies, {} bytes, 0 failed", sum(&copies), sum(&bytes));
    let dry = dry.says(&format!("{KEYS} keys: {moved} to move, {counts}"));
    let real = c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    let mut real = real.says(&format!("{KEYS} keys: {moved} moved, {counts}"));
    for volume in [2, 3] {
        assert!(copies[volume] > 0 && copies[volume - 2] == 0);
        let text =
            format!("{}: {} copies, {} bytes", c.names[volume], copies[volume], bytes[volume]);
        assert!(dry.out.contains(&text), "{text} is missing: {dry:?}");
        real = real.says(&text);
    }
    is_intact(&mut c);
}

#[test]
fn a_rebalance_beside_a_running_master_is_refused() {
    let mut c = store(Setup::new().volumes(2).replicas(1), 1);
    c.start_master();
    let dump = c.dump();
    for flags in [vec!["rebalance"], vec!["rebalance", "-dry-run"]] {
        c.mkv(&flags).fails(&["-db", &c.master_pid().to_string()]);
    }
    assert_eq!(c.dump(), dump);
    c.stop_master();
    settled(&c);
    is_intact(&mut c);
}

#[test]
fn a_rebalance_without_an_index_makes_none() {
    let mut c = store(Setup::new().volumes(1), 1);
    let disks = c.disks();
    let empty = c.folder.join("empty");
    fs::create_dir(&empty).unwrap();
    for db in [empty, c.folder.join("nowhere"), "/proc/version".into()] {
        c.mkv(&["rebalance", "-db", db.to_str().unwrap()]).expect(1);
        assert!(!db.join("index/CURRENT").exists());
    }
    assert!(!c.folder.join("nowhere").exists());
    c.disks_are(&disks);
    is_intact(&mut c);
}

// Kills.

#[test]
fn a_rebalance_killed_at_any_point_is_done_by_the_next_one() {
    let mut c = store(Setup::new().proxied().volumes(3).replicas(2), 2);
    let before = c.dump();
    let all = c.names.clone();
    for (known, method, fault) in [
        (3, "PUT", Fault::HoldRequest),
        (2, "PUT", Fault::HoldAnswer),
        (3, "DELETE", Fault::HoldRequest),
        (2, "DELETE", Fault::HoldAnswer),
        (3, "HEAD", Fault::HoldRequest),
        (2, "GET", Fault::HoldAnswer),
    ] {
        c.names = all[..known].to_vec();
        // A volume where some of the requests are needed.
        let at = c.proxies.iter().position(|proxy| {
            proxy.address == all[if (known == 3) == (method == "PUT") { 2 } else { 0 }]
        });
        let proxy = &c.proxies[at.unwrap()];
        proxy.set(method, fault);
        let rebalance = c.begin(&["rebalance", "-settle", "0s"]);
        proxy.wait_held(method, 1);
        rebalance.kill();
        proxy.lose_held(method);
        c.each_proxy(Faulty::behave);
        // Nothing is lost: all replicas of the index exist.
        let kept = c.mkv(&["verify", "-deep", "-volumes", &all.join(",")]);
        kept.never_says("replicas missing").never_says("wrong").never_says("does not know");
        assert_eq!(fields(&c.dump()), fields(&before));
        settled(&c);
        assert_eq!(c.blobs().len(), 2 * KEYS, "{method} {fault:?}");
        assert!(c.debris().is_empty(), "{method} {fault:?}");
        c.verified();
    }
    c.names.truncate(2);
    assert_eq!(c.dump(), before);
    is_intact(&mut c);
}

#[test]
fn a_rebalance_killed_again_and_again_ends_well() {
    let mut random = seeded_rng();
    let mut c = store(Setup::new().volumes(4).replicas(2), 2);
    let before = c.dump();
    let all = c.names.clone();
    let mut killed = 0;
    for round in 0..6 {
        c.names = if round % 2 == 0 { all[1..].to_vec() } else { all[..3].to_vec() };
        let rebalance = c.begin(&["rebalance", "-settle", "0s"]);
        thread::sleep(Duration::from_millis(random.u64(5..80)));
        killed += u32::from(rebalance.kill().code.is_none());
        assert_eq!(fields(&c.dump()), fields(&before));
    }
    println!("{killed} were killed");
    c.names = all;
    settled(&c);
    assert_eq!(c.blobs().len(), 2 * KEYS);
    c.verified();
    is_intact(&mut c);
}

#[test]
fn what_was_replaced_stays_until_its_copies_have_settled() {
    let mut c = store(Setup::new().volumes(2).replicas(1), 1);
    let begun = Instant::now();
    let mut rebalance = c.begin(&["rebalance", "-settle", "2s"]);
    rebalance.until_says("waiting");
    let moved = c.blobs().len() - KEYS;
    assert!(moved > 0);
    // The run was killed while it waited, so the next one waits too.
    rebalance.kill();
    assert_eq!(c.debris().len(), moved);
    let rebalance = c.begin(&["rebalance"]);
    thread::sleep(Duration::from_millis(900).saturating_sub(begun.elapsed()));
    assert!(c.blobs().len() == KEYS + moved || begun.elapsed() > Duration::from_secs(1));
    rebalance.ends().expect(0);
    assert!(begun.elapsed() > Duration::from_secs(1));
    assert_eq!(c.blobs().len(), KEYS);
    c.verified();
    is_intact(&mut c);
}

#[test]
fn the_master_waits_for_copies_to_settle_too() {
    let mut c = store(Setup::new().volumes(2).replicas(1), 1);
    let mut rebalance = c.begin(&["rebalance", "-settle", "60s"]);
    rebalance.until_says("waiting");
    rebalance.kill();
    let there = c.disks();
    assert!(there.len() > KEYS);
    c.start_master();
    // Trigger the cleaner with another key.
    c.replace("/new", "1").expect(201);
    let gone = c.found("/new").path;
    c.replace("/new", "2").expect(201);
    crate::support::http_client::until("the cleaner has been there", || {
        c.blobs().keys().all(|blob| !blob.ends_with(&gone))
    });
    c.ask("DELETE", "/new").expect(204);
    c.disks_are(&there);
    c.stop_master();
    // With the old index, rebuild does not take the surplus replicas for replicas: they are still
    // debris.
    c.mkv(&["rebuild"]).expect(0).says(&format!("{KEYS} keys, {KEYS} replicas"));
    // Without the old index, their debris is forgotten.
    fs::remove_dir_all(c.db()).unwrap();
    c.mkv(&["rebuild"]).expect(0);
    settled(&c);
    assert_eq!(c.blobs().len(), KEYS);
    c.start_master();
    c.reads_back(&numbered("/n/", KEYS - 3));
}

// Failures.

#[test]
fn keys_that_fail_are_counted_and_listed_and_the_others_are_moved() {
    let mut c = store(Setup::new().volumes(4).replicas(2).subvolumes(1), 3);
    let before = c.dump();
    let down = c.names[0].clone();
    c.volumes[0].stop();
    // The keys that have or want a replica on the stopped volume.
    let stays: Vec<String> = before
        .lines()
        .map(|line| line.split('\t').next().unwrap().to_string())
        .filter(|key| {
            let key: Vec<u8> = percent_encoding::percent_decode_str(key).collect();
            let text = String::from_utf8(key).unwrap();
            replicas(&before, &text).contains(&down) || c.placed(&text).contains(&down)
        })
        .collect();
    assert!(stays.len() < KEYS);
    let ran = c.mkv(&["rebalance", "-settle", "0s", "-v"]);
    let ran = ran.fails(&[&format!("{} keys could not be rebalanced", stays.len())]);
    let ran = ran.says(&format!("{} failed", stays.len()));
    for key in &stays {
        let key: Vec<u8> = percent_encoding::percent_decode_str(key).collect();
        let line = format!("\"{}\": ", key.escape_ascii());
        let said = ran.err.lines().find(|text| text.starts_with(&line));
        assert!(said.is_some_and(|said| said.contains(&down)), "{line} {ran:?}");
    }
    let after = c.dump();
    for line in after.lines() {
        let key = line.split('\t').next().unwrap();
        let moved = c.placed(percent_encoding::percent_decode_str(key).collect::<Vec<_>>());
        assert!(
            stays.contains(&key.to_string()) != line.ends_with(&moved.join(",")) || {
                // An unmoved record may happen to be balanced already.
                before.contains(line)
            }
        );
    }
    c.start_volumes();
    settled(&c);
    is_intact(&mut c);
}

#[test]
fn a_lost_machine_is_asked_nothing_and_its_keys_are_restored_from_the_others() {
    let mut c = Setup::new().proxied().volumes(4).replicas(2).start();
    c.fill(&numbered("/n/", 30));
    let lost = c.names[3].clone();
    c.proxies[3].set("DELETE", Fault::Answer(503));
    let deleted = numbered("/d/", 40)
        .into_iter()
        .find(|key| c.placed(key).iter().any(|replica| replica.starts_with(&lost)))
        .unwrap();
    c.put(&deleted, "value").expect(201);
    c.ask("DELETE", &deleted).expect(503);
    c.stop_master();
    let before = c.dump();
    assert!(before.contains(&lost) && c.debris().len() == 1);
    c.volumes[3].stop();
    let names = c.names.clone();
    c.names.truncate(3);
    c.mkv(&["rebalance", "-settle", "0s"]).fails(&["could not be rebalanced"]).says(&lost);
    let asked = ["HEAD", "GET", "PUT", "DELETE"].map(|method| c.proxies[3].seen(method).len());
    c.mkv(&["rebalance", "-settle", "0s", "-lost", &lost]).expect(0).says(" 0 failed");
    let again = ["HEAD", "GET", "PUT", "DELETE"].map(|method| c.proxies[3].seen(method).len());
    assert_eq!(asked, again);
    let after = c.dump();
    assert_eq!(fields(&after), fields(&before));
    assert!(!after.contains(&lost) && c.debris().is_empty());
    c.verified();
    c.start_master();
    c.reads_back(&numbered("/n/", 30));
    // The machine comes back with its blobs. All are known but that of the deleted key.
    c.stop_master();
    c.proxies[3].behave();
    c.start_volumes();
    c.names = names;
    let stray =
        c.blobs().into_iter().find(|(blob, _)| blob.ends_with(&reference::path(&deleted, 0)));
    c.mkv(&["verify"]).fails(&[]).says("surplus").says("that the index does not know: 1");
    fs::remove_file(stray.expect("it was never deleted").1).unwrap();
    // Repair leaves surplus replicas where placement wants them, because a newer index may refer to
    // them.
    c.mkv(&["verify", "-repair"]).fails(&["not whole"]).says("mkv rebalance takes it up");
    settled(&c);
    c.mkv(&["verify", "-repair"]).expect(0);
    assert_eq!(c.dump(), before);
}

#[test]
fn a_lost_disk_is_treated_as_empty() {
    let mut c = store(Setup::new().replicas(2).subvolumes(3), 3);
    let (dump, disks) = (c.dump(), c.disks());
    let lost = format!("{}/sv02", c.names[1]);
    let disk = c.disk(&lost);
    // The bytes on a lost disk do not matter.
    let there: Vec<_> = disks.keys().filter(|file| file.starts_with(&disk)).collect();
    assert!(!there.is_empty());
    there.iter().for_each(|file| flip_a_bit(file));
    c.mkv(&["rebalance", "-settle", "0s", "-lost", &lost]).expect(0);
    assert_eq!(c.dump(), dump);
    c.disks_are(&disks);
    is_intact(&mut c);
}

#[test]
fn a_source_with_other_bytes_is_no_source() {
    let mut c = store(Setup::new(), 3);
    let (dump, disks) = (c.dump(), c.disks());
    let path = reference::path(KEY.as_bytes(), 0);
    let files: Vec<_> = replicas(&dump, KEY).iter().map(|r| c.file(r, &path)).collect();
    for (bad, missing, good) in [(0, 1, 2), (0, 2, 1), (1, 0, 2)] {
        flip_a_bit(&files[bad]);
        fs::remove_file(&files[missing]).unwrap();
        settled(&c);
        assert_eq!(fs::read(&files[missing]).unwrap(), b"value");
        assert_eq!(fs::read(&files[good]).unwrap(), b"value");
        flip_a_bit(&files[bad]);
        assert_eq!(c.dump(), dump);
        c.disks_are(&disks);
    }
    // No good replica is left: nothing is copied or removed.
    fs::remove_file(&files[1]).unwrap();
    [0, 2].iter().for_each(|n| flip_a_bit(&files[*n]));
    let bad = c.disks();
    let ran = c.mkv(&["rebalance", "-settle", "0s"]).fails(&["1 keys could not be rebalanced"]);
    ran.says("no good source").says("/foo/\\xc3\\xa9t\\xc3\\xa9");
    assert_eq!(c.dump(), dump);
    c.disks_are(&bad);
    [0, 2].iter().for_each(|n| flip_a_bit(&files[*n]));
    settled(&c);
    assert_eq!(c.dump(), dump);
    c.disks_are(&disks);
    is_intact(&mut c);
}

#[test]
fn a_value_of_which_nothing_is_known_is_copied_only_where_its_replicas_agree_in_length() {
    let mut c = Setup::new().subvolumes(1).start();
    c.stop_master();
    let on_two = c.names[..2].join(",");
    {
        let index = c.db().join("index");
        let index = DB::open_cf(&Options::default(), index, ["default", "debris"]).unwrap();
        index.put("/agree", &on_two).unwrap();
        index.put("/differ", &on_two).unwrap();
    }
    let (agree, differ) = (reference::path(b"/agree", 0), reference::path(b"/differ", 0));
    for (n, value) in ["one", "three"].iter().enumerate() {
        c.plant(&c.names[n], &agree, "value", 1000);
        c.plant(&c.names[n], &differ, value, 1000);
    }
    let ran = c.mkv(&["rebalance", "-settle", "0s"]).fails(&["1 keys could not be rebalanced"]);
    ran.says("\"/differ\"").says("differ in length");
    let dump = c.dump();
    assert_eq!(record(&dump, "/agree"), Some(&*c.placed("/agree").join(",")));
    assert_eq!(record(&dump, "/differ"), Some(&*on_two));
    assert_eq!(fs::read(c.file(&c.names[2], &agree)).unwrap(), b"value");
    assert!(!c.file(&c.names[2], &differ).exists());
    // The operator resolves the conflict by removing one replica.
    fs::remove_file(c.file(&c.names[0], &differ)).unwrap();
    settled(&c);
    c.start_master();
    c.holds("/agree", "value");
    c.holds("/differ", "three");
}

/// The same address in another notation: 127.1.2.3 is also 127.1.515.
fn alias(name: &str) -> String {
    let (host, port) = name.split_once(':').unwrap();
    let parts: Vec<u32> = host.split('.').map(|part| part.parse().unwrap()).collect();
    format!("{}.{}.{}:{port}", parts[0], parts[1], parts[2] << 8 | parts[3])
}

/// Otherwise each value would be copied onto itself and then deleted under its old name.
#[test]
fn a_volume_under_another_name_is_no_other_volume() {
    let mut c = store(Setup::new().subvolumes(1), 3);
    let (names, before, disks) = (c.names.clone(), c.dump(), c.disks());
    let told = "names of one server";
    c.names = names.iter().map(|name| alias(name)).collect();
    let ran = c.mkv(&["rebalance", "-settle", "0s"]);
    ran.fails(&[&format!("{KEYS} keys could not be rebalanced")]).says(told);
    c.start_master();
    c.ask("REBALANCE", KEY).refused(500, told);
    c.stop_master();
    // Both names of one volume in -volumes.
    c.names = names.iter().cloned().chain([alias(&names[0])]).collect();
    for command in [&["rebalance"][..], &["verify", "-repair"], &["rebuild"]] {
        c.mkv(command).fails(&[told]);
    }
    assert!(c.try_start_master().unwrap_err().contains(told));
    assert_eq!(c.dump(), before);
    c.disks_are(&disks);
    // The supported way to rename volumes.
    c.names = names.iter().map(|name| alias(name)).collect();
    c.mkv(&["rebuild"]).fails(&["not in -volumes", "-lost"]);
    c.mkv(&["rebuild", "-lost", &names.join(",")]).expect(0);
    settled(&c);
    assert_eq!(fields(&c.dump()), fields(&before));
    c.disks_are(&disks);
    c.verified();
    is_intact(&mut c);
}

/// Puts a key on the first of two volumes, where placement wants it on the second.
fn one_that_moves(c: &mut Cluster) -> String {
    let all = c.names.clone();
    let moves = |key: &String| reference::place(key.as_bytes(), &all, 1, 1)[0] == all[1];
    let key = (0..).map(|n| format!("/{n}")).find(moves).unwrap();
    c.names.truncate(1);
    c.restart_master();
    c.put(&key, "value").expect(201);
    c.names = all;
    c.restart_master();
    key
}

/// A power cut can lose a copy, because nginx does not fsync.
#[test]
fn what_was_replaced_stays_as_long_as_its_copy_is_missing() {
    let mut c = Setup::new().volumes(2).replicas(1).subvolumes(1).flags(&["-settle", "1s"]).start();
    let key = one_that_moves(&mut c);
    c.ask("REBALANCE", &key).expect(204);
    let copy = c.files(&key).remove(0);
    fs::remove_file(&copy).unwrap();
    crate::support::http_client::until("the cleaner has looked", || {
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
    c.holds(&key, "value");
}

#[test]
fn nothing_goes_where_what_stays_has_other_bytes() {
    let mut c = store(Setup::new(), 3);
    let path = reference::path(KEY.as_bytes(), 0);
    let files: Vec<_> = replicas(&c.dump(), KEY).iter().map(|r| c.file(r, &path)).collect();
    flip_a_bit(&files[0]);
    c.setup = c.setup.clone().replicas(1);
    let ran = c.mkv(&["rebalance", "-settle", "0s"]).fails(&["1 keys could not be rebalanced"]);
    ran.says("other bytes").says("/foo/\\xc3\\xa9t\\xc3\\xa9");
    assert!(files.iter().all(|file| file.exists()));
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    settled(&c);
    assert_eq!(c.blobs().len(), KEYS);
    is_intact(&mut c);
}

#[test]
fn none_goes_where_replicas_differ_and_no_hash_tells_which_is_right() {
    let mut c = Setup::new().flags(&["-md5sum=false"]).start();
    c.put(KEY, "value").expect(201);
    let files = c.files(KEY);
    c.stop_master();
    flip_a_bit(&files[0]);
    let disks = c.disks();
    c.setup = c.setup.clone().replicas(2);
    c.mkv(&["rebalance", "-settle", "0s"]).fails(&["1 keys"]).says("no hash tells which is right");
    c.disks_are(&disks);
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    assert_eq!(c.blobs().len(), 2);
    c.start_master();
    c.holds(KEY, "value");
}

/// One nginx worker holds the DELETE and runs it after another worker has stored a new copy.
#[test]
fn a_deletion_without_an_answer_never_meets_a_new_copy() {
    let setup = Setup::new().proxied().volumes(2).replicas(1).subvolumes(1);
    let mut c = setup.flags(&["-settle", "0s"]).start();
    let key = one_that_moves(&mut c);
    c.proxies[1].set("PUT", Fault::Answer(500));
    c.proxies[1].set("DELETE", Fault::HoldRequest);
    c.ask("REBALANCE", &key).refused(500, &c.names[1]);
    c.proxies[1].behave();
    c.ask("REBALANCE", &key).refused(503, "try again in an hour");
    c.holds(&key, "value");
    c.cleaned();
    // After a restart the master no longer knows of the unanswered deletion.
    c.restart_master();
    c.ask("REBALANCE", &key).expect(204);
    assert!(c.holds(&key, "value").balanced);
}

/// An import without sizes knows only the hash.
#[test]
fn a_source_of_another_length_is_passed_over_where_only_the_hash_is_known() {
    let mut c = Setup::new().subvolumes(1).start();
    c.stop_master();
    {
        let index = DB::open_cf(&Options::default(), c.db().join("index"), ["default", "debris"]);
        let text = format!("HASH{}{}", reference::md5(b"value"), c.names[..2].join(","));
        index.unwrap().put("/cut", text).unwrap();
    }
    let path = reference::path(b"/cut", 0);
    c.plant(&c.names[0], &path, "val", 1000);
    c.plant(&c.names[1], &path, "value", 1000);
    settled(&c);
    assert_eq!(fs::read(c.file(&c.names[2], &path)).unwrap(), b"value");
    c.mkv(&["verify"]).fails(&["not whole"]).says("replicas with the wrong bytes: 1");
    c.mkv(&["verify", "-repair"]).expect(0);
    c.start_master();
    c.holds("/cut", "value");
}

#[test]
fn a_large_value_is_copied_in_little_memory() {
    let mut c = Setup::new().volumes(2).replicas(1).start();
    let all = c.names.clone();
    c.names.truncate(1);
    c.restart_master();
    let moves =
        |key: &String| reference::place(key.as_bytes(), &all, 1, 10)[0].starts_with(&all[1]);
    let key = (0..).map(|n| format!("/large/{n}")).find(moves).unwrap();
    let value = vec![b'v'; 100 << 20];
    c.put(&key, &value).expect(201);
    c.stop_master();
    c.names = all;
    let (most, ran) = peak(&c, &["rebalance", "-settle", "0s"]);
    ran.expect(0).says("1 moved, 1 copies, 104857600 bytes");
    println!("{most} MiB");
    assert!(most < 40, "{most} MiB for a value of 100 MiB");
    c.start_master();
    assert!(c.holds(&key, &value).balanced);
}

// REBALANCE.

#[test]
fn a_running_master_rebalances_a_key_at_a_time() {
    let mut c = store(Setup::new().volumes(4).replicas(2).flags(&["-settle", "0s"]), 2);
    let before = c.dump();
    c.start_master();
    c.ask("REBALANCE", "/absent").refused(404, "no such key");
    for key in c.live() {
        let values = (c.found(&key), crate::support::http_client::follow(&c.get(&key)).body);
        c.ask("REBALANCE", &key).expect(204);
        let found = c.holds(&key, values.1);
        assert!(found.balanced && found.md5 == values.0.md5 && found.path == values.0.path);
        c.ask("REBALANCE", &key).expect(204);
    }
    c.ask("REBALANCE", "/unlinked").expect(204);
    assert_eq!(c.unlinked(), [b"/unlinked"]);
    c.cleaned();
    assert_eq!(c.blobs().len(), 2 * KEYS);
    c.stop_master();
    assert_eq!(fields(&c.dump()), fields(&before));
    c.verified();
    c.mkv(&["rebalance"]).expect(0).says(" 0 moved");
    is_intact(&mut c);
}

#[test]
fn a_shell_loop_over_the_list_rebalances_a_store_that_stays_up() {
    let mut c = store(Setup::new().volumes(3).replicas(2).flags(&["-settle", "0s"]), 2);
    c.start_master();
    let script = r#"set -euo pipefail
        for list in list unlinked; do
          curl -sSf "$1/?$list&encoding=url" | grep -o '"/[^"]*"' | tr -d '"' |
            while read -r key; do curl -sSf -X REBALANCE "$1$key"; done
        done"#;
    let master = format!("http://{}", c.address());
    let ran = Command::new("bash").args(["-c", script, "bash", &master]).output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
    for key in c.live() {
        assert!(c.found(key).balanced);
    }
    c.stop_master();
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0).says(" 0 moved");
    is_intact(&mut c);
}

#[test]
fn a_key_cannot_be_rebalanced_while_a_volume_is_down_or_another_writes_it() {
    let mut c = Setup::new().proxied().volumes(3).replicas(1).flags(&["-settle", "0s"]).start();
    let all = c.names.clone();
    let moves =
        |key: &String| reference::place(key.as_bytes(), &all, 1, 10)[0].starts_with(&all[2]);
    let key = (0..).map(|n| format!("/{n}")).find(moves).unwrap();
    c.names.truncate(2);
    c.restart_master();
    c.put(&key, "value").expect(201);
    let old = c.holder(&key, 0);
    c.names = all;
    c.restart_master();
    // Both the current volume and the wanted one must be up.
    for (volume, method) in [(old, "HEAD"), (2, "PUT")] {
        c.volumes[volume].stop();
        let answer = c.ask("REBALANCE", &key).refused(503, &c.names[volume]);
        assert!(answer.header("Retry-After").is_some(), "{method}");
        c.start_volumes();
        assert!(!c.holds(&key, "value").balanced);
    }
    // The proxy read the whole copy, so the copy may still appear within an hour.
    c.debris_may_last(&key);
    assert_eq!(c.blobs().len(), 1);
    c.proxies[2].set("PUT", Fault::HoldRequest);
    let mut conn = Conn::open(&c.address());
    conn.send(head("REBALANCE", &key, &[]));
    c.proxies[2].wait_held("PUT", 1);
    for method in ["REBALANCE", "DELETE", "UNLINK"] {
        c.ask(method, &key).refused(409, "another");
    }
    c.replace(&key, "other").refused(409, "another");
    assert!(!c.holds(&key, "value").balanced);
    c.proxies[2].release("PUT");
    conn.answer_to("REBALANCE").expect(204);
    assert!(c.holds(&key, "value").balanced);
    let mut writer = c.conn();
    c.proxies[2].set("PUT", Fault::HoldRequest);
    writer.head("REPLACE", &target(&key), &[("Content-Length", "3")]).send("new");
    c.proxies[2].wait_held("PUT", 1);
    c.ask("REBALANCE", &key).refused(409, "another");
    c.proxies[2].release("PUT");
    writer.answer().expect(201);
    c.ask("REBALANCE", &key).expect(204);
    c.holds(&key, "new");
    crate::support::http_client::until("what was replaced is gone", || c.blobs().len() == 1);
}

#[test]
fn a_running_master_takes_no_source_with_other_bytes() {
    let mut c = Setup::new().replicas(2).flags(&["-settle", "0s"]).start();
    c.put(KEY, "value").expect(201);
    let files = c.files(KEY);
    fs::remove_file(&files[0]).unwrap();
    flip_a_bit(&files[1]);
    c.ask("REBALANCE", KEY).refused(500, "no good source");
    assert!(!files[0].exists() && files[1].exists());
    flip_a_bit(&files[1]);
    c.ask("REBALANCE", KEY).expect(204);
    assert!(c.holds(KEY, "value").balanced);
    // Without any replica there is nothing to copy.
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
    assert!(matches!(c.ask("REBALANCE", KEY).status, 410 | 500));
    fs::write(&files[1], "value").unwrap();
    c.ask("REBALANCE", KEY).expect(204);
    c.holds(KEY, "value");
    c.cleaned();
    c.stop_master();
    c.verified();
    c.start_master();
}
