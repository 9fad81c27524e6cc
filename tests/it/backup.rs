//! Backups of the index: as files, and on the volumes.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{CommandOutput, flip_a_bit, mtime, numbered_keys, record};
use crate::support::http_client::{follow, wait_until};

/// The keys of the backups on the volumes.
const ON_VOLUMES: [&str; 2] = ["/.mkv/backup/1", "/.mkv/backup/2"];

fn back_up(c: &Cluster, dir: &Path, flags: &[&str]) -> CommandOutput {
    let master = format!("http://{}", c.address());
    c.mkv(&[&["backup", dir.to_str().unwrap(), "-master", &master], flags].concat())
}

/// The files in a folder that do not begin with a dot, by name.
fn files_in(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    let is_visible = |file: &PathBuf| !file.file_name().unwrap().to_string_lossy().starts_with('.');
    let mut files: Vec<_> = files.filter(is_visible).collect();
    files.sort();
    files
}

fn dump_of(c: &Cluster, db: &Path) -> String {
    c.mkv(&["dump", "-db", db.to_str().unwrap()]).expect(0).out
}

/// The lines of a dump without those of the backups.
fn without_backups(dump: &str) -> String {
    dump.lines().filter(|line| !line.starts_with("/.mkv/")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn a_backup_restores_what_was_acknowledged_before_it_while_writes_go_on() {
    let c = Setup::new().volumes(1).start();
    let (dir, new) = (c.folder.join("backups"), c.folder.join("new"));
    let keys = numbered_keys("/k/", 300);
    c.fill(&keys);
    c.ask("UNLINK", &keys[0]).expect(204);
    let before = c.dump();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let more = (0..).map(|n| format!("/more/{n}")).take_while(|_| !done.load(Ordering::Relaxed));
            more.for_each(|key| drop(c.put(key, "value").expect(201)));
        });
        back_up(&c, &dir, &[]).expect(0).prints(" keys, ");
        done.store(true, Ordering::Relaxed);
    });
    let [file] = &files_in(&dir)[..] else { panic!("not one file: {:?}", files_in(&dir)) };
    c.mkv(&["-db", new.to_str().unwrap(), "restore", file.to_str().unwrap()]).expect(0).prints("the index holds");
    let restored = dump_of(&c, &new);
    assert!(before.lines().all(|line| restored.contains(line)) && record(&restored, "/k/0000").is_some());
    // An operator can look into it.
    let look = "mkdir look && cd look && tar xf ../*.tar && md5sum --quiet -c MD5SUMS && test -s index/CURRENT";
    let output = Command::new("sh").args(["-c", look]).current_dir(&dir).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    // A second restore would replace an index.
    c.mkv(&["-db", new.to_str().unwrap(), "restore", file.to_str().unwrap()]).fails(&["new", "there is an index"]);
    assert_eq!(dump_of(&c, &new), restored);
    assert_eq!(fs::read_dir(c.db().join("backup.tmp")).unwrap().count(), 0);
}

#[test]
fn the_newest_backups_are_kept_and_other_files_too() {
    let c = Setup::new().volumes(1).start();
    c.put("/k", "value").expect(201);
    let dir = c.folder.join("backups");
    fs::create_dir(&dir).unwrap();
    for name in ["mkv-20010101-000000.tar", "mkv-20010102-000000.tar", "mkv-2001.tar", "notes"] {
        fs::write(dir.join(name), "x").unwrap();
    }
    (0..3).for_each(|_| drop(back_up(&c, &dir, &["-keep", "2"]).expect(0)));
    let left = files_in(&dir);
    assert_eq!(left.len(), 4, "{left:?}");
    assert!(left[0].ends_with("mkv-2001.tar") && left[3].ends_with("notes"), "{left:?}");
    for file in &left[1..3] {
        let new = file.with_extension("db");
        c.mkv(&["-db", new.to_str().unwrap(), "restore", file.to_str().unwrap()]).expect(0);
    }
}

#[test]
fn a_backup_that_is_not_whole_is_refused_and_costs_no_older_one() {
    let mut c = Setup::new().volumes(1).start();
    c.fill(&numbered_keys("/k/", 50));
    let (dir, new) = (c.folder.join("backups"), c.folder.join("new"));
    back_up(&c, &dir, &[]).expect(0);
    let [file] = &files_in(&dir)[..] else { panic!("not one file") };
    let whole = fs::read(file).unwrap();
    // A master that dies while it sends.
    let master = TcpListener::bind((c.host.as_str(), 0)).unwrap();
    let url = format!("http://{}/", master.local_addr().unwrap());
    let half = whole[..whole.len() / 2].to_vec();
    let length = whole.len();
    let dying = thread::spawn(move || {
        let mut socket = master.accept().unwrap().0;
        let _ = socket.read(&mut [0; 4096]);
        write!(socket, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").unwrap();
        socket.write_all(&half).unwrap();
    });
    c.mkv(&["backup", dir.to_str().unwrap(), "-master", &url, "-keep", "1"]).fails(&["backup"]);
    dying.join().unwrap();
    c.stop_master();
    back_up(&c, &dir, &["-keep", "1"]).fails(&["does a master run there"]);
    assert_eq!(files_in(&dir), std::slice::from_ref(file));
    assert!(!dir.join(".mkv-backup.part").exists() && !dir.join(".mkv-backup.check").exists());
    for damaged in [whole[..whole.len() - 1024].to_vec(), whole[..700].to_vec(), b"not a tar".to_vec(), Vec::new()] {
        let bad = c.folder.join("bad.tar");
        fs::write(&bad, damaged).unwrap();
        c.mkv(&["-db", new.to_str().unwrap(), "restore", bad.to_str().unwrap()]).fails(&["bad.tar", "no whole backup"]);
        assert!(!new.join("index").exists() && !new.join("index.new").exists());
    }
    c.mkv(&["-db", new.to_str().unwrap(), "restore", "/nowhere.tar"]).fails(&["/nowhere.tar"]);
    c.mkv(&["-db", new.to_str().unwrap(), "restore", file.to_str().unwrap()]).expect(0);
    assert_eq!(dump_of(&c, &new), c.dump());
}

/// A write that was under way when the backup was made has ended since. The cleaner of a master on the restored index
/// must not take its blob for a remains.
#[test]
fn a_restored_index_deletes_no_value_that_was_being_written() {
    let mut c = Setup::new().start();
    let dir = c.folder.join("backups");
    let mut upload = c.conn();
    upload.head("PUT", "/late", &[("Content-Length", "10")]).send("01234");
    wait_until("the upload has begun", || c.keys_with_debris().len() == 1);
    back_up(&c, &dir, &[]).expect(0);
    upload.send("56789").answer().expect(201);
    let blobs = c.files("/late");
    c.stop_master();
    let (db, away) = (c.db(), c.folder.join("away"));
    fs::rename(&db, &away).unwrap();
    c.mkv(&["restore", files_in(&dir)[0].to_str().unwrap()]).expect(0);
    assert_eq!(c.debris(), []);
    c.start_master();
    c.get("/late").expect_missing();
    c.put("/other", "value").expect(201);
    c.ask("DELETE", "/other").expect(204);
    assert!(blobs.iter().all(|blob| blob.exists()));
    c.stop_master();
    fs::remove_dir_all(&db).unwrap();
    fs::rename(&away, &db).unwrap();
    c.start_master();
    c.assert_value("/late", "0123456789");
}

/// The only place of the backup is the store itself, and its volumes answer only what is signed.
#[test]
fn one_rebuild_brings_back_a_wiped_master_with_unlinked_states_and_hashes() {
    let mut c = Setup::new().volumes(4).replicas(2).subvolumes(2).secret().start();
    c.fill(&numbered_keys("/n/", 40));
    c.put("/hidden", "hidden value").expect(201);
    c.ask("UNLINK", "/hidden").expect(204);
    c.restart_with(&["-backup", "24h"]);
    wait_until("a backup is on the volumes", || c.get(ON_VOLUMES[0]).status == 302);
    c.put("/after", "written after the backup").expect(201);
    let dump = c.dump();
    c.kill_master();
    fs::remove_dir_all(c.db()).unwrap();
    c.mkv(&["rebuild"]).expect(0).prints("carrying over from the backup of 20");
    let rebuilt = c.dump();
    // Only what is younger than the backup has lost its hash.
    let differ: Vec<&str> = dump.lines().filter(|line| !rebuilt.lines().any(|other| other == *line)).collect();
    assert!(differ.iter().all(|line| line.starts_with("/after\t") || line.starts_with("/.mkv/")), "{differ:?}");
    assert_eq!(rebuilt.lines().count(), dump.lines().count());
    assert_eq!(rebuilt.matches("DELETED").count(), 1);
    assert!(!c.db().join("backup.tmp").exists());
    c.assert_verified();
    // Without the backup the key is visible.
    fs::remove_dir_all(c.db()).unwrap();
    c.mkv(&["rebuild", "-nobackup"]).expect(0).does_not_print("backup");
    assert!(!c.dump().contains("DELETED") && !c.dump().contains("HASH"));
    // A damaged index is as good as none.
    fs::remove_file(c.db().join("index/CURRENT")).unwrap();
    c.mkv(&["rebuild"]).expect(0).prints("the backup takes its place");
    assert_eq!(c.dump(), rebuilt);
    c.start_master();
    assert_eq!(c.unlinked(), [b"/hidden"]);
    assert!(c.key_info("/n/0007").md5.is_some());
}

#[test]
fn a_rebuild_takes_another_replica_or_the_older_backup_or_none() {
    let mut c = Setup::new().volumes(2).start();
    c.put("/hidden", "value").expect(201);
    c.ask("UNLINK", "/hidden").expect(204);
    c.restart_with(&["-backup", "24h"]);
    wait_until("a first backup is on the volumes", || c.get(ON_VOLUMES[0]).status == 302);
    c.restart_with(&["-backup", "1s"]);
    wait_until("a second backup is on the volumes", || c.get(ON_VOLUMES[1]).status == 302);
    c.restart_with(&[]);
    c.wait_until_cleaned();
    let mut backups = ON_VOLUMES.map(|key| c.files(key));
    backups.sort_by_key(|files| mtime(&files[0]));
    let [older, newer] = backups;
    assert!(mtime(&older[0]) < mtime(&newer[0]));
    c.stop_master();
    let dump = c.dump();
    let rebuild = |flags: &[&str]| {
        fs::remove_dir_all(c.db()).unwrap();
        c.mkv(&[&["rebuild"], flags].concat())
    };
    let mut damaged = Vec::new();
    for (file, used) in [(&newer[0], 1), (&newer[1], 1), (&older[0], 1), (&older[1], 0)] {
        damaged.push((file.clone(), fs::read(file).unwrap()));
        flip_a_bit(file);
        let (code, text) =
            if used == 1 { (0, "carrying over from") } else { (1, "no backup on the volumes can be used") };
        let result = rebuild(&[]).expect(code).prints(text);
        if damaged.len() > 1 {
            result.prints("is left out: this is no whole backup");
        }
        assert_eq!(c.dump().contains("DELETED"), used == 1);
    }
    for (file, bytes) in damaged {
        let time = fs::metadata(&file).and_then(|data| data.modified()).unwrap();
        fs::write(&file, bytes).unwrap();
        fs::File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
    }
    rebuild(&[]).expect(0).does_not_print("left out");
    assert_eq!(without_backups(&c.dump()), without_backups(&dump));
    c.start_master();
}

#[test]
fn from_takes_a_backup_as_well_as_a_folder() {
    let mut c = Setup::new().volumes(1).start();
    c.fill(&numbered_keys("/n/", 10));
    c.ask("UNLINK", "/n/0003").expect(204);
    let dir = c.folder.join("backups");
    back_up(&c, &dir, &[]).expect(0);
    let dump = c.dump();
    c.stop_master();
    fs::remove_dir_all(c.db()).unwrap();
    let file = files_in(&dir).remove(0);
    c.mkv(&["rebuild", "-from", file.to_str().unwrap()]).expect(0);
    assert_eq!(c.dump(), dump);
    flip_a_bit(&file);
    c.mkv(&["rebuild", "-from", file.to_str().unwrap()]).fails(&["no whole backup", file.to_str().unwrap()]);
    assert_eq!(c.dump(), dump);
}

#[test]
fn the_masters_own_backups_take_turns_and_no_client_can_change_them() {
    let mut c = Setup::new().volumes(2).flags(&["-protect", "-backup", "1s"]).start();
    thread::sleep(std::time::Duration::from_millis(1500));
    // An empty index needs no backup.
    assert!(c.keys("/.mkv/", "list").is_empty());
    c.put("/k", "value").expect(201);
    let versions = |c: &Cluster| ON_VOLUMES.map(|key| (c.get(key).status == 302).then(|| c.key_info(key).version));
    wait_until("there are two", || versions(&c).iter().all(Option::is_some));
    let before = versions(&c);
    wait_until("both were replaced", || (0..2).all(|n| versions(&c)[n] > before[n]));
    // What a crash leaves of a checkpoint goes with the next start.
    c.kill_master();
    fs::create_dir_all(c.db().join("backup.tmp/7")).unwrap();
    fs::write(c.db().join("backup.tmp/7/CURRENT"), "x").unwrap();
    c.setup = c.setup.clone().flags(&["-backup", "24h"]);
    c.start_master();
    assert!(!c.db().join("backup.tmp/7").exists());
    assert_eq!(c.live(), [b"/k"]);
    assert_eq!(c.keys("/.mkv/", "list"), ON_VOLUMES.map(|key| key.as_bytes().to_vec()));
    for key in ["/.mkv/backup/1", "/.mkv/else"] {
        for method in ["PUT", "REPLACE", "DELETE", "UNLINK", "RELINK"] {
            c.send(method, key, &[], if method.len() % 2 == 1 { "v" } else { "" }).expect_error(403, "/.mkv/");
        }
    }
    c.ask("REBALANCE", ON_VOLUMES[0]).expect(204);
    // A reader gets it as any value.
    let (file, new) = (c.folder.join("read.tar"), c.folder.join("new"));
    fs::write(&file, follow(&c.get(ON_VOLUMES[1]).expect(302)).expect(200).body).unwrap();
    c.mkv(&["-db", new.to_str().unwrap(), "restore", file.to_str().unwrap()]).expect(0);
    assert!(record(&dump_of(&c, &new), "/k").is_some());
    c.wait_until_cleaned();
    c.assert_verified();
}
