//! Each way in which one volume can fail, and the failure of all volumes.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::cluster::{Cluster, Setup, same};
use crate::support::commands::{numbered, value_of};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Answer, follow};

/// The failure of one of three volumes.
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
    /// The status of a write to the failed volume.
    fn status(self) -> u16 {
        match self {
            Wrong::Killed | Wrong::Frozen | Wrong::Slow => 503,
            Wrong::Refusing | Wrong::Full | Wrong::ReadOnly => 500,
            Wrong::Emptied => 201,
        }
    }

    /// `own_disk`: the volume's folder is a disk of its own.
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
            // Where no disk can be mounted, the proxy answers as nginx would.
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

pub fn fill_up(disk: &Path) {
    let mut file = fs::File::create(disk.join(".filler")).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
}

pub fn make_room(disk: &Path) {
    fs::remove_file(disk.join(".filler")).unwrap();
}

pub fn remount(disk: &Path, how: &str) -> bool {
    let option = format!("remount,{how}");
    let output = Command::new("mount").args(["-o", &option]).arg(disk).output();
    output.is_ok_and(|output| output.status.success())
}

/// Reads each key three times. Only the first few reads may wait for the silent volume's timeout.
pub fn all_are_read(c: &Cluster, keys: &[Vec<u8>]) {
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
        // The second try shows that the first left no lock.
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
    // The key is deleted even if a blob must wait for its volume. A slow volume gets enough time.
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
