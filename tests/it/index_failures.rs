//! An index whose disk fails or whose files are damaged.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::support::cluster::{Cluster, Setup, assert_same_bytes};
use crate::support::commands::{files_below, numbered_keys, value_of};
use crate::support::http_client::follow;
use crate::volume_failures::{assert_all_readable, fill_disk, free_disk, remount};

/// How the index's disk fails.
#[derive(Debug, Clone, Copy, PartialEq)]
enum DiskFailure {
    Full,
    Failing,
}

/// Ignores SIGXFSZ: a file size limit stands in for a failing disk.
const LIMITED: [&str; 4] = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"];

/// Limits the size of the master's files.
fn limit_files(c: &Cluster, bytes: &str) {
    let pid = c.master_pid().to_string();
    let limit = format!("--fsize={bytes}:unlimited");
    let output = Command::new("prlimit").args(["--pid", &pid, &limit]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn assert_index_survives(failure: DiskFailure) {
    let mut own_disk = false;
    let mut c = Cluster::start_with(Setup::new().replicas(2).launcher(&LIMITED), |c| {
        fs::create_dir(c.db()).unwrap();
        own_disk = failure == DiskFailure::Full && c.mount_small_disk(&c.db(), "2m");
    });
    println!("the index has its own disk: {own_disk}");
    let keys = numbered_keys("/k", 20);
    c.fill(&keys);
    c.ask("UNLINK", &keys[0]).expect(204);
    match failure {
        DiskFailure::Full if own_disk => fill_disk(&c.db()),
        DiskFailure::Full => limit_files(&c, "16384"),
        DiskFailure::Failing => limit_files(&c, "0"),
    }
    let mut stored = Vec::new();
    let mut refused = Vec::new();
    for key in numbered_keys("/more", 5000) {
        let answer = c.put(&key, value_of(&key));
        if answer.status == 201 {
            stored.push(key);
            continue;
        }
        answer.expect_error(500, "index");
        refused.push(key);
        if refused.len() == 5 {
            break;
        }
    }
    println!("{} were stored", stored.len());
    assert_eq!(refused.len(), 5);
    for _ in 0..2 {
        c.replace(&keys[1], "another value").expect_error(500, "index");
        c.ask("DELETE", &keys[2]).expect_error(500, "index");
        c.ask("UNLINK", &keys[3]).expect_error(500, "index");
        c.ask("RELINK", &keys[0]).expect_error(500, "index");
        let health = c.ask_target("GET", "/?health").expect(503).text();
        assert!(!health.contains("\"index\":\"ok\""), "{health}");
        assert_all_readable(&c, &[&keys[1..], &stored[..]].concat());
        refused.iter().for_each(|key| drop(c.get(key).expect(404)));
        assert_eq!(c.live().len(), keys.len() - 1 + stored.len());
        assert_eq!(c.unlinked(), [keys[0].clone()]);
    }
    if own_disk {
        free_disk(&c.db());
    } else {
        limit_files(&c, "unlimited");
    }
    c.terminate_master();
    // The exit may report what could not be written, but nothing breaks.
    assert!(matches!(c.wait_for_master_exit().code(), Some(0 | 1)), "{}", c.log());
    c.start_master();
    c.wait_until_cleaned();
    assert_all_readable(&c, &[&keys[1..], &stored[..]].concat());
    assert_eq!(c.unlinked(), [keys[0].clone()]);
    for key in &refused {
        c.get(key).expect(404);
        c.put(key, value_of(key)).expect(201);
    }
    c.ask("RELINK", &keys[0]).expect(204);
    assert_all_readable(&c, &[&keys[..], &stored[..], &refused[..]].concat());
    c.assert_verified();
}

#[test]
fn an_index_on_a_full_disk_refuses_writes_and_loses_nothing() {
    assert_index_survives(DiskFailure::Full);
}

#[test]
fn an_index_on_a_failing_disk_refuses_writes_and_loses_nothing() {
    assert_index_survives(DiskFailure::Failing);
}

#[test]
fn the_master_does_not_start_with_a_read_only_index() {
    let mut own_disk = false;
    let mut c = Cluster::start_with(Setup::new().volumes(1), |c| {
        fs::create_dir(c.db()).unwrap();
        own_disk = c.mount_small_disk(&c.db(), "16m");
    });
    let keys = numbered_keys("/k", 5);
    c.fill(&keys);
    c.stop_master();
    let before = c.index_files();
    if own_disk {
        assert!(remount(&c.db(), "ro"));
    } else {
        assert!(Command::new("chmod").args(["-R", "a-w"]).arg(c.db()).status().unwrap().success());
        c.setup = c.setup.clone().launcher(&["setpriv", "--reuid=65534", "--clear-groups"]);
    }
    let error = c.try_start_master().expect_err("the index cannot be written");
    assert!(error.contains("-db") && error.contains(c.db().to_str().unwrap()), "{error}");
    c.assert_index_files(&before);
    if own_disk {
        assert!(remount(&c.db(), "rw"));
    } else {
        assert!(Command::new("chmod").args(["-R", "u+w"]).arg(c.db()).status().unwrap().success());
        c.setup = c.setup.clone().launcher(&[]);
    }
    c.start_master();
    c.assert_reads_back(&keys);
}

/// The index's files whose path contains this text.
fn files(c: &Cluster, kind: &str) -> Vec<PathBuf> {
    let all = files_below(&c.db().join("index")).into_keys();
    let files: Vec<_> = all.filter(|file| file.to_str().unwrap().contains(kind)).collect();
    assert!(!files.is_empty(), "no {kind}");
    files
}

/// Flips a bit in each file, at this position.
fn flip_bits(files: &[PathBuf], place: fn(usize) -> usize) {
    for file in files {
        let mut bytes = fs::read(file).unwrap();
        let place = place(bytes.len());
        bytes[place] ^= 0x10;
        fs::write(file, bytes).unwrap();
    }
}

#[test]
fn a_damaged_index_never_looks_like_an_empty_store() {
    let mut c = Setup::new().replicas(2).subvolumes(1).start();
    let keys = numbered_keys("/k", 40);
    c.fill(&keys);
    let (deleted, unlinked, live) = (&keys[..3], &keys[3..6], &keys[6..]);
    deleted.iter().for_each(|key| drop(c.ask("DELETE", key).expect(204)));
    unlinked.iter().for_each(|key| drop(c.ask("UNLINK", key).expect(204)));
    // A restart flushes the log into tables; the writes that follow go to the log.
    c.restart_master();
    live[..20].iter().for_each(|key| {
        c.replace(key, value_of(key)).expect(201);
    });
    c.wait_until_cleaned();
    c.kill_master();
    let (index, disks) = (c.index_files(), c.disk_contents());
    let remove = |files: Vec<PathBuf>| files.iter().for_each(|file| fs::remove_file(file).unwrap());
    let cut = |files: Vec<PathBuf>, at: fn(usize) -> usize| {
        for file in files {
            let bytes = fs::read(&file).unwrap();
            fs::write(file, &bytes[..at(bytes.len())]).unwrap();
        }
    };
    type Damage<'a> = (&'static str, &'a dyn Fn(&Cluster));
    let damages: [Damage; 10] = [
        ("a bit in each table's data", &|c| flip_bits(&files(c, ".sst"), |_| 20)),
        ("a bit in each table's end", &|c| flip_bits(&files(c, ".sst"), |length| length - 20)),
        ("tables cut short", &|c| cut(files(c, ".sst"), |length| length / 2)),
        ("tables gone", &|c| remove(files(c, ".sst"))),
        ("a bit in the log", &|c| flip_bits(&files(c, ".log"), |length| length / 3)),
        ("a bit in the manifest", &|c| flip_bits(&files(c, "MANIFEST"), |length| length / 2)),
        ("the manifest gone", &|c| remove(files(c, "MANIFEST"))),
        ("CURRENT gone", &|c| remove(files(c, "CURRENT"))),
        ("CURRENT empty", &|c| cut(files(c, "CURRENT"), |_| 0)),
        ("all files but the tables gone", &|c| {
            let all = files(c, "index/").into_iter();
            remove(all.filter(|file| file.extension().is_none_or(|kind| kind != "sst")).collect());
        }),
    ];
    for (what, damage) in damages {
        fs::remove_dir_all(c.db().join("index")).unwrap();
        fs::create_dir(c.db().join("index")).unwrap();
        for (file, bytes) in &index {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, bytes).unwrap();
        }
        damage(&c);
        // Restart repeatedly, as a supervisor would.
        for _ in 0..3 {
            match c.try_start_master() {
                Err(error) => {
                    println!("{what}: {error}");
                    assert!(error.contains("mkv rebuild"), "{what}: {error}");
                }
                Ok(()) => {
                    println!("{what}: the master starts");
                    assert_answers_correctly(&c, live, &[deleted, unlinked].concat());
                    c.terminate_master();
                    c.wait_for_master_exit();
                }
            }
            c.assert_disks(&disks);
            c.mkv(&["verify", "-deep"]).expect(1);
        }
        // The procedure of the README.
        fs::rename(c.db().join("index"), c.folder.join("damaged")).unwrap();
        c.mkv(&["rebuild", "-rehash"]).expect(0);
        fs::remove_dir_all(c.folder.join("damaged")).unwrap();
        c.start_master();
        c.assert_reads_back(live);
        c.assert_reads_back(unlinked);
        deleted.iter().for_each(|key| drop(c.get(key).expect(404)));
        c.assert_verified();
        c.stop_master();
        c.assert_disks(&disks);
    }
    c.start_master();
}

/// With a damaged index the master may fail to answer, but it never answers wrongly.
fn assert_answers_correctly(c: &Cluster, live: &[Vec<u8>], others: &[Vec<u8>]) {
    let mut failed = 0;
    for key in live {
        let answer = c.get(key);
        if answer.status == 500 {
            failed += 1;
            answer.expect_error(500, "index");
            c.put(key, "another value").expect_error(500, "index");
            c.ask("DELETE", key).expect_error(500, "index");
        } else {
            assert_same_bytes(&follow(&answer.expect(302)).expect(200).body, &value_of(key), "a value");
        }
    }
    for key in others {
        let answer = c.get(key);
        assert!(matches!(answer.status, 404 | 500), "{answer:?}");
    }
    println!("{failed} of {} could not be read", live.len());
    assert!(failed > 0, "the damage had no effect");
    let mut conn = c.conn();
    conn.head("GET", "/?list", &[]);
    // A list is complete, breaks off, or is an error.
    if let Ok(Some(answer)) = conn.next_answer("GET") {
        answer.expect(500);
    }
}
