//! A volume that fails, in each way a volume can; all of them; an index whose disk fails or whose
//! files are damaged.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::cluster::{Cluster, Setup, same};
use crate::support::commands::{numbered, tree, value_of};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Answer, follow};

/// What is wrong with one of three volumes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wrong {
    Killed,
    Frozen,
    Refusing,
    Slow,
    Full,
    ReadOnly,
    Emptied,
}

const TIMEOUT: Duration = Duration::from_secs(1);

impl Wrong {
    /// What a write to the volume is answered with.
    fn status(self) -> u16 {
        match self {
            Wrong::Killed | Wrong::Frozen | Wrong::Slow => 503,
            Wrong::Refusing | Wrong::Full | Wrong::ReadOnly => 500,
            Wrong::Emptied => 201,
        }
    }

    /// `real`: the volume has a disk of its own.
    fn begin(self, c: &mut Cluster, real: bool) {
        let refuse = |methods: &[&str]| {
            methods.iter().for_each(|method| c.proxies[0].set(method, Fault::Answer(500)));
        };
        match self {
            Wrong::Killed => c.volumes[0].kill(),
            Wrong::Frozen => c.volumes[0].freeze(),
            Wrong::Refusing => refuse(&["HEAD", "GET", "PUT", "DELETE"]),
            Wrong::Slow => {
                let slow = Fault::Delay(TIMEOUT * 3 / 2);
                ["HEAD", "PUT", "DELETE"].iter().for_each(|method| c.proxies[0].set(method, slow));
            }
            Wrong::Full if real => fill_up(&c.volumes[0].folder),
            Wrong::ReadOnly if real => assert!(remount(&c.volumes[0].folder, "ro")),
            // Where no disk can be mounted, the volume answers as nginx does on such a one.
            Wrong::Full => refuse(&["PUT"]),
            Wrong::ReadOnly => refuse(&["PUT", "DELETE"]),
            Wrong::Emptied => {
                c.volumes[0].kill();
                c.empty(&c.volumes[0].folder);
                c.volumes[0].start();
            }
        }
    }

    fn end(self, c: &mut Cluster, real: bool) {
        c.proxies.iter().for_each(|proxy| proxy.behave());
        match self {
            Wrong::Killed => c.volumes[0].start(),
            Wrong::Frozen => c.volumes[0].thaw(),
            Wrong::Full if real => make_room(&c.volumes[0].folder),
            Wrong::ReadOnly if real => assert!(remount(&c.volumes[0].folder, "rw")),
            _ => {}
        }
    }
}

fn fill_up(disk: &Path) {
    let mut file = fs::File::create(disk.join(".filler")).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
}

fn make_room(disk: &Path) {
    fs::remove_file(disk.join(".filler")).unwrap();
}

fn remount(disk: &Path, how: &str) -> bool {
    let option = format!("remount,{how}");
    let output = Command::new("mount").args(["-o", &option]).arg(disk).output();
    output.is_ok_and(|output| output.status.success())
}

/// Reads each of these keys a few times: no read takes longer than one silent volume may, and most
/// of them do not pay that again.
fn all_are_read(c: &Cluster, keys: &[Vec<u8>]) {
    let mut slow = 0;
    for key in [keys, keys, keys].concat() {
        let begun = Instant::now();
        let answer = follow(&c.get(&key).expect(302)).expect(200);
        assert!(begun.elapsed() < TIMEOUT * 2, "{:?}", begun.elapsed());
        slow += usize::from(begun.elapsed() > TIMEOUT / 2);
        same(&answer.body, &value_of(&key), &key.escape_ascii().to_string());
    }
    println!("{slow} of {} reads were slow", 3 * keys.len());
    assert!(slow <= 3, "{slow} reads were slow");
}

fn survives(wrong: Wrong) {
    let mut real = false;
    let setup = Setup::new().replicas(2).subvolumes(1).flags(&["-voltimeout", "1s"]);
    let plain = matches!(wrong, Wrong::Killed | Wrong::Frozen | Wrong::Emptied);
    let mut c = Cluster::start_with(if plain { setup } else { setup.proxied() }, |c| {
        let disk = c.volumes[0].folder.clone();
        real = matches!(wrong, Wrong::Full | Wrong::ReadOnly) && c.mount_small_disk(&disk, "4m");
    });
    println!("a disk of its own: {real}");
    let (name, master) = (c.names[0].clone(), c.master_pid());
    let is_on = |c: &Cluster, key: &[u8]| c.placed(key).contains(&name);
    let (mut on, mut off): (Vec<_>, Vec<_>) =
        numbered("/k", 60).into_iter().partition(|key| is_on(&c, key));
    c.fill(&[&on[..], &off[..]].concat());
    let hidden = [on.split_off(on.len() - 2), off.split_off(off.len() - 2)].concat();
    hidden.iter().for_each(|key| drop(c.ask("UNLINK", key).expect(204)));
    let (new_on, new_off): (Vec<_>, Vec<_>) =
        numbered("/new", 12).into_iter().partition(|key| is_on(&c, key));

    wrong.begin(&mut c, real);
    all_are_read(&c, &[&on[..], &off[..]].concat());
    let status = wrong.status();
    for key in &new_off {
        c.put(key, value_of(key)).expect(201);
    }
    for key in &new_on[..3] {
        // The second time: no lock was left.
        for _ in 0..2 {
            match status {
                201 => drop(c.replace(key, value_of(key)).expect(201)),
                _ => drop(c.put(key, value_of(key)).refused(status, &name)),
            }
        }
        c.get(key).expect(if status == 201 { 302 } else { 404 });
    }
    if status != 201 {
        c.replace(&on[0], "another value").refused(status, &name);
    }
    c.ask("UNLINK", &on[1]).expect(204);
    c.ask("RELINK", &on[1]).expect(204);
    // A deletion counts, also where a blob has to wait for its volume; one that is slow has time.
    let (gone_on, gone_off) = (on.pop().unwrap(), off.pop().unwrap());
    if matches!(wrong, Wrong::Slow | Wrong::Full | Wrong::Emptied) {
        c.ask("DELETE", &gone_on).expect(204);
    } else {
        c.ask("DELETE", &gone_on).refused(503, &name);
        c.ask("DELETE", &gone_on).refused(503, &name);
    }
    c.get(&gone_on).expect(404);
    c.ask("DELETE", &gone_off).expect(204);
    let mut live: BTreeSet<_> = [&on[..], &off[..], &new_off[..]].concat().into_iter().collect();
    live.extend(new_on[..3].iter().filter(|_| status == 201).cloned());
    assert!(c.live().iter().eq(&live), "{:?}", c.live());
    let live: Vec<_> = live.into_iter().collect();
    all_are_read(&c, &live);

    wrong.end(&mut c, real);
    if wrong == Wrong::Emptied {
        for key in live.iter().chain(&hidden) {
            c.ask("REBALANCE", key).expect(204);
        }
    }
    c.cleaned();
    for key in new_on.iter().filter(|key| !live.contains(key)) {
        c.put(key, value_of(key)).expect(201);
    }
    all_are_read(&c, &[&live[..], &new_on[..]].concat());
    c.verified();
    assert_eq!(c.master_pid(), master);
    for key in &hidden {
        c.ask("RELINK", key).expect(204);
    }
    all_are_read(&c, &hidden);
}

#[test]
fn a_volume_that_is_killed() {
    survives(Wrong::Killed);
}

#[test]
fn a_volume_that_hangs() {
    survives(Wrong::Frozen);
}

#[test]
fn a_volume_that_refuses_everything() {
    survives(Wrong::Refusing);
}

#[test]
fn a_volume_that_is_slow() {
    survives(Wrong::Slow);
}

#[test]
fn a_volume_whose_disk_is_full() {
    survives(Wrong::Full);
}

#[test]
fn a_volume_whose_disk_turns_read_only() {
    survives(Wrong::ReadOnly);
}

#[test]
fn a_volume_that_comes_back_empty() {
    survives(Wrong::Emptied);
}

#[test]
fn with_all_volumes_down_the_index_still_answers() {
    let mut c = Setup::new().flags(&["-voltimeout", "1s"]).start();
    let keys = numbered("/k", 8);
    c.fill(&keys);
    c.ask("UNLINK", &keys[0]).expect(204);
    c.volumes.iter_mut().for_each(|volume| volume.kill());
    let waits = |answer: Answer| assert!(answer.header("Retry-After").is_some(), "{answer:?}");
    for _ in 0..2 {
        waits(c.get(&keys[1]).refused(503, "volume"));
        waits(c.put("/new", "value").refused(503, &c.host));
        waits(c.replace(&keys[1], "value").refused(503, &c.host));
        waits(c.ask("RELINK", &keys[0]).refused(503, "volume"));
        waits(c.ask("DELETE", &keys[2]).refused(503, &c.host));
        c.ask("UNLINK", &keys[3]);
        c.get("/none").expect(404);
        assert_eq!(c.live().len(), 5);
        assert_eq!(c.unlinked(), [keys[0].clone(), keys[3].clone()]);
        let health = c.ask_target("GET", "/?health").expect(503).text();
        assert!(c.names.iter().all(|name| health.contains(name)), "{health}");
        assert!(health.contains("\"index\":\"ok\""), "{health}");
    }
    c.start_volumes();
    c.cleaned();
    c.put("/new", "value").expect(201);
    c.ask("DELETE", "/new").expect(204);
    c.ask_target("GET", "/?health").expect(200);
    c.ask("RELINK", &keys[0]).expect(204);
    c.ask("RELINK", &keys[3]).expect(204);
    all_are_read(&c, &[&keys[..2], &keys[3..]].concat());
    c.verified();
}

/// How the index's disk comes to take no more.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Disk {
    Full,
    Fails,
}

/// Ignores the signal that comes with the limit which stands in for a disk.
const LIMITED: [&str; 4] = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"];

/// From now on no file of the master's grows beyond this length.
fn limit_files(c: &Cluster, bytes: &str) {
    let pid = c.master_pid().to_string();
    let limit = format!("--fsize={bytes}:unlimited");
    let output = Command::new("prlimit").args(["--pid", &pid, &limit]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn index_takes_no_more(disk: Disk) {
    let mut real = false;
    let mut c = Cluster::start_with(Setup::new().replicas(2).launcher(&LIMITED), |c| {
        fs::create_dir(c.db()).unwrap();
        real = disk == Disk::Full && c.mount_small_disk(&c.db(), "2m");
    });
    println!("a real full disk: {real}");
    let keys = numbered("/k", 20);
    c.fill(&keys);
    c.ask("UNLINK", &keys[0]).expect(204);
    match disk {
        Disk::Full if real => fill_up(&c.db()),
        Disk::Full => limit_files(&c, "16384"),
        Disk::Fails => limit_files(&c, "0"),
    }
    let mut stored = Vec::new();
    let mut refused = Vec::new();
    for key in numbered("/more", 5000) {
        let answer = c.put(&key, value_of(&key));
        if answer.status == 201 {
            stored.push(key);
            continue;
        }
        answer.refused(500, "index");
        refused.push(key);
        if refused.len() == 5 {
            break;
        }
    }
    println!("{} were stored", stored.len());
    assert_eq!(refused.len(), 5);
    for _ in 0..2 {
        c.replace(&keys[1], "another value").refused(500, "index");
        c.ask("DELETE", &keys[2]).refused(500, "index");
        c.ask("UNLINK", &keys[3]).refused(500, "index");
        c.ask("RELINK", &keys[0]).refused(500, "index");
        let health = c.ask_target("GET", "/?health").expect(503).text();
        assert!(!health.contains("\"index\":\"ok\""), "{health}");
        all_are_read(&c, &[&keys[1..], &stored[..]].concat());
        refused.iter().for_each(|key| drop(c.get(key).expect(404)));
        assert_eq!(c.live().len(), keys.len() - 1 + stored.len());
        assert_eq!(c.unlinked(), [keys[0].clone()]);
    }
    if real {
        make_room(&c.db());
    } else {
        limit_files(&c, "unlimited");
    }
    c.terminate_master();
    // What could not be written is told at the end, too, but nothing breaks.
    assert!(matches!(c.await_master().code(), Some(0 | 1)), "{}", c.log());
    c.start_master();
    c.cleaned();
    all_are_read(&c, &[&keys[1..], &stored[..]].concat());
    assert_eq!(c.unlinked(), [keys[0].clone()]);
    for key in &refused {
        c.get(key).expect(404);
        c.put(key, value_of(key)).expect(201);
    }
    c.ask("RELINK", &keys[0]).expect(204);
    all_are_read(&c, &[&keys[..], &stored[..], &refused[..]].concat());
    c.verified();
}

#[test]
fn an_index_on_a_full_disk_refuses_writes_and_loses_none() {
    index_takes_no_more(Disk::Full);
}

#[test]
fn an_index_on_a_disk_that_fails_refuses_writes_and_loses_none() {
    index_takes_no_more(Disk::Fails);
}

#[test]
fn an_index_that_is_read_only_at_the_start_is_an_error() {
    let mut real = false;
    let mut c = Cluster::start_with(Setup::new().volumes(1), |c| {
        fs::create_dir(c.db()).unwrap();
        real = c.mount_small_disk(&c.db(), "16m");
    });
    let keys = numbered("/k", 5);
    c.fill(&keys);
    c.stop_master();
    let before = c.index_files();
    if real {
        assert!(remount(&c.db(), "ro"));
    } else {
        assert!(Command::new("chmod").args(["-R", "a-w"]).arg(c.db()).status().unwrap().success());
        c.setup = c.setup.clone().launcher(&["setpriv", "--reuid=65534", "--clear-groups"]);
    }
    let error = c.try_start_master().expect_err("the index cannot be written");
    assert!(error.contains("-db") && error.contains(c.db().to_str().unwrap()), "{error}");
    c.index_is(&before);
    if real {
        assert!(remount(&c.db(), "rw"));
    } else {
        assert!(Command::new("chmod").args(["-R", "u+w"]).arg(c.db()).status().unwrap().success());
        c.setup = c.setup.clone().launcher(&[]);
    }
    c.start_master();
    c.reads_back(&keys);
}

/// The index's files of this kind.
fn files(c: &Cluster, kind: &str) -> Vec<PathBuf> {
    let all = tree(&c.db().join("index")).into_keys();
    let files: Vec<_> = all.filter(|file| file.to_str().unwrap().contains(kind)).collect();
    assert!(!files.is_empty(), "no {kind}");
    files
}

/// Damages these files, at this place of each.
fn flip(files: &[PathBuf], place: fn(usize) -> usize) {
    for file in files {
        let mut bytes = fs::read(file).unwrap();
        let place = place(bytes.len());
        bytes[place] ^= 0x10;
        fs::write(file, bytes).unwrap();
    }
}

#[test]
fn a_damaged_index_is_an_error_and_never_an_empty_store() {
    let mut c = Setup::new().replicas(2).subvolumes(1).start();
    let keys = numbered("/k", 40);
    c.fill(&keys);
    let (gone, hidden, live) = (&keys[..3], &keys[3..6], &keys[6..]);
    gone.iter().for_each(|key| drop(c.ask("DELETE", key).expect(204)));
    hidden.iter().for_each(|key| drop(c.ask("UNLINK", key).expect(204)));
    // Its start puts what the log holds into tables; then the log gets the rest.
    c.restart_master();
    live[..20].iter().for_each(|key| {
        c.replace(key, value_of(key)).expect(201);
    });
    c.cleaned();
    c.kill_master();
    let (index, disks) = (c.index_files(), c.disks());
    let remove = |files: Vec<PathBuf>| files.iter().for_each(|file| fs::remove_file(file).unwrap());
    let cut = |files: Vec<PathBuf>, at: fn(usize) -> usize| {
        for file in files {
            let bytes = fs::read(&file).unwrap();
            fs::write(file, &bytes[..at(bytes.len())]).unwrap();
        }
    };
    type Damage<'a> = (&'static str, &'a dyn Fn(&Cluster));
    let damages: [Damage; 10] = [
        ("a bit in each table's data", &|c| flip(&files(c, ".sst"), |_| 20)),
        ("a bit in each table's end", &|c| flip(&files(c, ".sst"), |length| length - 20)),
        ("tables cut short", &|c| cut(files(c, ".sst"), |length| length / 2)),
        ("tables gone", &|c| remove(files(c, ".sst"))),
        ("a bit in the log", &|c| flip(&files(c, ".log"), |length| length / 3)),
        ("a bit in the manifest", &|c| flip(&files(c, "MANIFEST"), |length| length / 2)),
        ("the manifest gone", &|c| remove(files(c, "MANIFEST"))),
        ("CURRENT gone", &|c| remove(files(c, "CURRENT"))),
        ("CURRENT empty", &|c| cut(files(c, "CURRENT"), |_| 0)),
        ("all gone but the tables", &|c| {
            let all = files(c, "index/").into_iter();
            remove(all.filter(|file| file.extension().is_none_or(|kind| kind != "sst")).collect());
        }),
    ];
    for (what, damage) in damages {
        fs::remove_dir_all(c.db().join("index")).unwrap();
        fs::create_dir(c.db().join("index")).unwrap();
        index.iter().for_each(|(file, bytes)| fs::write(file, bytes).unwrap());
        damage(&c);
        // Again and again, as a supervisor would.
        for _ in 0..3 {
            match c.try_start_master() {
                Err(error) => {
                    println!("{what}: {error}");
                    assert!(error.contains("mkv rebuild"), "{what}: {error}");
                }
                Ok(()) => {
                    println!("{what}: it starts");
                    serves_the_truth(&c, live, &[gone, hidden].concat());
                    c.terminate_master();
                    c.await_master();
                }
            }
            c.disks_are(&disks);
            c.mkv(&["verify", "-deep"]).expect(1);
        }
        // What the README says to do.
        fs::rename(c.db().join("index"), c.folder.join("damaged")).unwrap();
        c.mkv(&["rebuild", "-rehash"]).expect(0);
        fs::remove_dir_all(c.folder.join("damaged")).unwrap();
        c.start_master();
        c.reads_back(live);
        c.reads_back(hidden);
        gone.iter().for_each(|key| drop(c.get(key).expect(404)));
        c.verified();
        c.stop_master();
        c.disks_are(&disks);
    }
    c.start_master();
}

/// A damaged index may keep the master from answering, but what it answers is so.
fn serves_the_truth(c: &Cluster, live: &[Vec<u8>], others: &[Vec<u8>]) {
    let mut failed = 0;
    for key in live {
        let answer = c.get(key);
        if answer.status == 500 {
            failed += 1;
            answer.refused(500, "index");
            c.put(key, "another value").refused(500, "index");
            c.ask("DELETE", key).refused(500, "index");
        } else {
            same(&follow(&answer.expect(302)).expect(200).body, &value_of(key), "a value");
        }
    }
    for key in others {
        let answer = c.get(key);
        assert!(matches!(answer.status, 404 | 500), "{answer:?}");
    }
    println!("{failed} of {} could not be read", live.len());
    assert!(failed > 0, "the damage did not matter");
    let mut conn = c.conn();
    conn.head("GET", "/?list", &[]);
    // A list is whole, or has no end, or is an error.
    if let Ok(Some(answer)) = conn.any_answer("GET") {
        answer.expect(500);
    }
}
