//! Each way in which one volume can fail, and the failure of all volumes.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::cluster::{Cluster, Setup, assert_same_bytes};
use crate::support::commands::{numbered_keys, value_of};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Answer, follow};

/// The failure of one of three volumes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Failure {
    Killed,
    Frozen,
    Refusing,
    Slow,
    Full,
    ReadOnly,
    Emptied,
}

const TIMEOUT: Duration = Duration::from_secs(1);

impl Failure {
    /// The status of a write to the failed volume.
    fn status(self) -> u16 {
        match self {
            Failure::Killed | Failure::Frozen | Failure::Slow => 503,
            Failure::Refusing | Failure::Full | Failure::ReadOnly => 500,
            Failure::Emptied => 201,
        }
    }

    /// `own_disk`: the volume's folder is a disk of its own.
    fn start(self, c: &mut Cluster, own_disk: bool) {
        let refuse = |methods: &[&str]| {
            methods.iter().for_each(|method| c.proxies[0].set(method, Fault::Answer(500)));
        };
        match self {
            Failure::Killed => c.volumes[0].kill(),
            Failure::Frozen => c.volumes[0].freeze(),
            Failure::Refusing => refuse(&["HEAD", "GET", "PUT", "DELETE"]),
            Failure::Slow => {
                let slow = Fault::Delay(TIMEOUT * 3 / 2);
                ["HEAD", "PUT", "DELETE"].iter().for_each(|method| c.proxies[0].set(method, slow));
            }
            Failure::Full if own_disk => fill_disk(&c.volumes[0].folder),
            Failure::ReadOnly if own_disk => assert!(remount(&c.volumes[0].folder, "ro")),
            // Where no disk can be mounted, the proxy answers as nginx would.
            Failure::Full => refuse(&["PUT"]),
            Failure::ReadOnly => refuse(&["PUT", "DELETE"]),
            Failure::Emptied => {
                c.volumes[0].kill();
                c.erase_disk(&c.volumes[0].folder);
                c.volumes[0].start();
            }
        }
    }

    fn stop(self, c: &mut Cluster, own_disk: bool) {
        c.proxies.iter().for_each(|proxy| proxy.remove_faults());
        match self {
            Failure::Killed => c.volumes[0].start(),
            Failure::Frozen => c.volumes[0].thaw(),
            Failure::Full if own_disk => free_disk(&c.volumes[0].folder),
            Failure::ReadOnly if own_disk => assert!(remount(&c.volumes[0].folder, "rw")),
            _ => {}
        }
    }
}

pub fn fill_disk(disk: &Path) {
    let mut file = fs::File::create(disk.join(".filler")).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
}

pub fn free_disk(disk: &Path) {
    fs::remove_file(disk.join(".filler")).unwrap();
}

pub fn remount(disk: &Path, how: &str) -> bool {
    let option = format!("remount,{how}");
    let output = Command::new("mount").args(["-o", &option]).arg(disk).output();
    output.is_ok_and(|output| output.status.success())
}

/// Reads each key three times. Only the first few reads may wait for the silent volume's timeout.
pub fn assert_all_readable(c: &Cluster, keys: &[Vec<u8>]) {
    let mut slow = 0;
    for key in [keys, keys, keys].concat() {
        let started = Instant::now();
        let answer = follow(&c.get(&key).expect(302)).expect(200);
        assert!(started.elapsed() < TIMEOUT * 2, "{:?}", started.elapsed());
        slow += usize::from(started.elapsed() > TIMEOUT / 2);
        assert_same_bytes(&answer.body, &value_of(&key), &key.escape_ascii().to_string());
    }
    println!("{slow} of {} reads were slow", 3 * keys.len());
    assert!(slow <= 3, "{slow} reads were slow");
}

fn assert_survives(failure: Failure) {
    let mut own_disk = false;
    let setup = Setup::new().replicas(2).subvolumes(1).flags(&["-voltimeout", "1s"]);
    let plain = matches!(failure, Failure::Killed | Failure::Frozen | Failure::Emptied);
    let mut c = Cluster::start_with(if plain { setup } else { setup.proxied() }, |c| {
        let disk = c.volumes[0].folder.clone();
        own_disk = matches!(failure, Failure::Full | Failure::ReadOnly) && c.mount_small_disk(&disk, "4m");
    });
    println!("the volume has its own disk: {own_disk}");
    let (name, master) = (c.names[0].clone(), c.master_pid());
    let is_on = |c: &Cluster, key: &[u8]| c.placement(key).contains(&name);
    let (mut on_volume, mut elsewhere): (Vec<_>, Vec<_>) =
        numbered_keys("/k", 60).into_iter().partition(|key| is_on(&c, key));
    c.fill(&[&on_volume[..], &elsewhere[..]].concat());
    let unlinked = [on_volume.split_off(on_volume.len() - 2), elsewhere.split_off(elsewhere.len() - 2)].concat();
    unlinked.iter().for_each(|key| drop(c.ask("UNLINK", key).expect(204)));
    let (new_on_volume, new_elsewhere): (Vec<_>, Vec<_>) =
        numbered_keys("/new", 12).into_iter().partition(|key| is_on(&c, key));

    failure.start(&mut c, own_disk);
    assert_all_readable(&c, &[&on_volume[..], &elsewhere[..]].concat());
    let status = failure.status();
    for key in &new_elsewhere {
        c.put(key, value_of(key)).expect(201);
    }
    for key in &new_on_volume[..3] {
        // The second try shows that the first left no lock.
        for _ in 0..2 {
            match status {
                201 => drop(c.replace(key, value_of(key)).expect(201)),
                _ => drop(c.put(key, value_of(key)).expect_error(status, &name)),
            }
        }
        c.get(key).expect(if status == 201 { 302 } else { 404 });
    }
    if status != 201 {
        c.replace(&on_volume[0], "another value").expect_error(status, &name);
    }
    c.ask("UNLINK", &on_volume[1]).expect(204);
    c.ask("RELINK", &on_volume[1]).expect(204);
    // The key is deleted even if a blob must wait for its volume. A slow volume gets enough time.
    let (deleted_on_volume, deleted_elsewhere) = (on_volume.pop().unwrap(), elsewhere.pop().unwrap());
    if matches!(failure, Failure::Slow | Failure::Full | Failure::Emptied) {
        c.ask("DELETE", &deleted_on_volume).expect(204);
    } else {
        c.ask("DELETE", &deleted_on_volume).expect_error(503, &name);
        c.ask("DELETE", &deleted_on_volume).expect_error(503, &name);
    }
    c.get(&deleted_on_volume).expect(404);
    c.ask("DELETE", &deleted_elsewhere).expect(204);
    let mut live: BTreeSet<_> = [&on_volume[..], &elsewhere[..], &new_elsewhere[..]].concat().into_iter().collect();
    live.extend(new_on_volume[..3].iter().filter(|_| status == 201).cloned());
    assert!(c.live().iter().eq(&live), "{:?}", c.live());
    let live: Vec<_> = live.into_iter().collect();
    assert_all_readable(&c, &live);

    failure.stop(&mut c, own_disk);
    if failure == Failure::Emptied {
        for key in live.iter().chain(&unlinked) {
            c.ask("REBALANCE", key).expect(204);
        }
    }
    c.wait_until_cleaned();
    for key in new_on_volume.iter().filter(|key| !live.contains(key)) {
        c.put(key, value_of(key)).expect(201);
    }
    assert_all_readable(&c, &[&live[..], &new_on_volume[..]].concat());
    c.assert_verified();
    assert_eq!(c.master_pid(), master);
    for key in &unlinked {
        c.ask("RELINK", key).expect(204);
    }
    assert_all_readable(&c, &unlinked);
}

#[test]
fn the_store_survives_a_killed_volume() {
    assert_survives(Failure::Killed);
}

#[test]
fn the_store_survives_a_hanging_volume() {
    assert_survives(Failure::Frozen);
}

#[test]
fn the_store_survives_a_volume_that_refuses_everything() {
    assert_survives(Failure::Refusing);
}

#[test]
fn the_store_survives_a_slow_volume() {
    assert_survives(Failure::Slow);
}

#[test]
fn the_store_survives_a_volume_with_a_full_disk() {
    assert_survives(Failure::Full);
}

#[test]
fn the_store_survives_a_volume_whose_disk_turns_read_only() {
    assert_survives(Failure::ReadOnly);
}

#[test]
fn the_store_survives_a_volume_that_comes_back_empty() {
    assert_survives(Failure::Emptied);
}

#[test]
fn the_index_still_answers_when_all_volumes_are_down() {
    let mut c = Setup::new().flags(&["-voltimeout", "1s"]).start();
    let keys = numbered_keys("/k", 8);
    c.fill(&keys);
    c.ask("UNLINK", &keys[0]).expect(204);
    c.volumes.iter_mut().for_each(|volume| volume.kill());
    let waits = |answer: Answer| assert!(answer.header("Retry-After").is_some(), "{answer:?}");
    for _ in 0..2 {
        waits(c.get(&keys[1]).expect_error(503, "volume"));
        waits(c.put("/new", "value").expect_error(503, &c.host));
        waits(c.replace(&keys[1], "value").expect_error(503, &c.host));
        waits(c.ask("RELINK", &keys[0]).expect_error(503, "volume"));
        waits(c.ask("DELETE", &keys[2]).expect_error(503, &c.host));
        c.ask("UNLINK", &keys[3]);
        c.get("/none").expect(404);
        assert_eq!(c.live().len(), 5);
        assert_eq!(c.unlinked(), [keys[0].clone(), keys[3].clone()]);
        let health = c.ask_target("GET", "/?health").expect(503).text();
        assert!(c.names.iter().all(|name| health.contains(name)), "{health}");
        assert!(health.contains("\"index\":\"ok\""), "{health}");
    }
    c.start_volumes();
    c.wait_until_cleaned();
    c.put("/new", "value").expect(201);
    c.ask("DELETE", "/new").expect(204);
    c.ask_target("GET", "/?health").expect(200);
    c.ask("RELINK", &keys[0]).expect(204);
    c.ask("RELINK", &keys[3]).expect(204);
    assert_all_readable(&c, &[&keys[..2], &keys[3..]].concat());
    c.assert_verified();
}
