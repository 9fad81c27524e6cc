//! `mkv dump`.

use std::fs;
use std::time::{Duration, Instant};

use percent_encoding::percent_decode_str;
use rocksdb::{DB, Options, WriteBatch};

use crate::keys::unusual_keys;
use crate::support::cluster::Setup;
use crate::support::commands::{record, value_of};
use crate::support::reference;

#[test]
fn dump_prints_sorted_lines_with_and_without_a_running_master() {
    let mut c = Setup::new().volumes(1).start();
    let mut keys = unusual_keys();
    c.fill(&keys);
    c.ask("UNLINK", "/a").expect(204);
    keys.sort();
    let dump = c.dump();
    let lines: Vec<(Vec<u8>, &str)> = dump
        .lines()
        .map(|line| line.split_once('\t').expect("a line has a tab"))
        .map(|(key, record)| (percent_decode_str(key).collect(), record))
        .collect();
    assert_eq!(lines.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>(), keys);
    assert!(dump.is_ascii() && dump.ends_with('\n'));
    for (key, record) in lines {
        let value = value_of(&key);
        let state = if key == b"/a" { "DELETED" } else { "" };
        let fields = format!("{state}HASH{}SIZE{:016x}TIME", reference::md5(&value), value.len());
        assert!(record.starts_with(&fields), "{}: {record}", key.escape_ascii());
        assert!(record.ends_with(&c.placement(&key).join(",")), "{record}");
    }
    c.stop_master();
    let before = c.index_files();
    assert!(c.dump() == dump);
    c.assert_index_files(&before);
    // The next dump has the new key.
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
fn dump_needs_an_index_but_no_volumes() {
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
fn dump_prints_records_that_do_not_decode_and_other_commands_fail() {
    let mut c = Setup::new().volumes(1).start();
    c.put("/good", "value").expect(201);
    c.stop_master();
    let open = || {
        let index = c.db().join("index");
        DB::open_cf(&Options::default(), index, ["default", "debris", "uploads"]).expect("the index opens")
    };
    open().put("/broken", "HASHxyz").unwrap();
    assert_eq!(record(&c.dump(), "/broken"), Some("HASHxyz"));
    let dump = c.dump();
    c.mkv(&["rebalance"]).fails(&["1 keys could not"]).prints("/broken").prints("1 keys: 0 moved");
    for command in [&["verify"][..], &["verify", "-repair"], &["rebuild"]] {
        c.mkv(command).fails(&["/broken"]);
        assert_eq!(c.dump(), dump, "{command:?}");
    }
    open().delete("/broken").unwrap();
    c.assert_verified();
}

#[test]
fn dump_prints_a_million_keys_within_8_seconds() {
    let mut c = Setup::new().volumes(1).start();
    c.stop_master();
    let text = format!("HASH{}SIZE{:016x}TIME{:016x}{}", reference::md5(b"v"), 1, 1, c.names[0]);
    {
        let index = c.db().join("index");
        let index = DB::open_cf(&Options::default(), index, ["default", "debris", "uploads"]).unwrap();
        let mut batch = WriteBatch::default();
        (0..1_000_000).for_each(|n| batch.put(format!("/{n:06}"), &text));
        index.write(batch).unwrap();
    }
    let started = Instant::now();
    let dump = c.dump();
    println!("{:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(8));
    assert_eq!(dump.lines().count(), 1_000_000);
    assert!(dump.ends_with(&format!("/999999\t{text}\n")));
    fs::remove_dir_all(c.db()).unwrap();
}
