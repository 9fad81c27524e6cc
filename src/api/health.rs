//! Whether the store is well: the index takes writes, every volume answers, and no disk is nearly full.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::text;
use crate::index::Peer;
use crate::store::Store;
use crate::threads::lock;
use crate::volumes::Auth;
use crate::volumes::space::Disk;

/// A disk with a smaller free part than this gets a warning.
pub const NEARLY_FULL: f64 = 0.02;

/// A follower that is further behind gets a warning.
const LATE: Duration = Duration::from_secs(10);

/// How long a check may be used again.
const RECENT: Duration = Duration::from_secs(2);

pub struct Health {
    /// What is wrong with the index.
    pub index: Option<String>,
    pub volumes: Vec<VolumeHealth>,
    /// The processes that write the index, and what is wrong with it or them; `None`: there is only this one.
    peers: Option<(Vec<Peer>, Vec<String>)>,
    /// The master that this process follows.
    follows: Option<Follows>,
}

struct Follows {
    master: String,
    /// Time since the index was last known to be current.
    age: Duration,
    /// How many changes the master was ahead when it last answered.
    behind: u64,
}

pub struct VolumeHealth {
    pub name: String,
    /// What is wrong with the volume.
    pub problem: Option<String>,
    /// Empty: not known.
    pub disks: Arc<Vec<Disk>>,
}

impl Health {
    /// Asks every volume and tries a write to the index.
    pub fn check(store: &Store, auth: Auth) -> Health {
        let Store { index, volumes, config, .. } = store;
        let index = index.probe().err().map(|error| error.to_string());
        let (asked, header) = (volumes.clone(), auth.map(String::from));
        let ask = move |name: String| match asked.accepts_login(&name, header.as_deref()) {
            Ok(true) => (name, None),
            Ok(false) => (name, Some("it does not accept the master's login or signature".to_string())),
            Err(error) => (name, Some(error.to_string())),
        };
        let names = &config.placement.volumes;
        let problems = volumes.pool.each(names.clone(), ask);
        let states = problems.into_iter().zip(volumes.disks(names, auth));
        let volumes = states.map(|((name, problem), disks)| VolumeHealth { name, problem, disks }).collect();
        let follows = store.index.following().map(|following| {
            let (age, behind) = (following.age(), following.behind());
            Follows { master: following.master.clone(), age, behind }
        });
        Health { index, volumes, peers: store.index.peers(), follows }
    }

    /// Whether everything answers. A full disk does not count: reads and most writes work, and no restart helps.
    pub fn is_healthy(&self) -> bool {
        self.index.is_none() && self.volumes.iter().all(|volume| volume.problem.is_none())
    }

    /// A line for each disk that is nearly full, and for what is wrong with the database, other masters, or the
    /// master that this process follows.
    pub fn warnings(&self) -> Vec<String> {
        let disks = self.volumes.iter().flat_map(|v| v.disks.iter().map(|disk| (v.name.as_str(), disk)));
        let full = disks.filter(|(_, disk)| disk.free_part() < NEARLY_FULL);
        let lines = full.map(|(volume, disk)| {
            let (part, free) = (disk.free_part() * 100.0, text::bytes(disk.free as f64));
            format!("volume {volume}: disk {} has {part:.1} % free ({free}): add volumes or disks", disk.name)
        });
        let late = self.follows.iter().filter(|follows| follows.age > LATE).map(|Follows { master, age, .. }| {
            let age = text::duration(age.as_secs());
            format!("this follower is {age} behind: see its log, and whether http://{master} answers")
        });
        let lines = lines.chain(late);
        lines.chain(self.peers.iter().flat_map(|(_, warnings)| warnings.clone())).collect()
    }

    pub fn json(&self) -> Value {
        let state = |problem: &Option<String>| Value::from(problem.clone().unwrap_or_else(|| "ok".into()));
        let volumes: Map<_, _> = self.volumes.iter().map(|v| (v.name.clone(), state(&v.problem))).collect();
        let (healthy, index) = (self.is_healthy(), state(&self.index));
        let mut text = json!({ "healthy": healthy, "index": index, "volumes": volumes, "warnings": self.warnings() });
        if let Some(Follows { master, age, behind }) = &self.follows {
            text["follows"] = json!({ "master": master, "age": age.as_secs_f64(), "behind": behind });
        }
        if let Some((peers, _)) = &self.peers {
            let peer = |peer: &Peer| json!({ "name": peer.name, "flags": peer.flags });
            text["masters"] = peers.iter().map(peer).collect();
        }
        text
    }
}

/// The last check, for pages that many people look at.
#[derive(Default)]
pub struct LastCheck(Mutex<Option<(Instant, Arc<Health>)>>);

impl LastCheck {
    /// A check that is at most 2 s old. Callers at the same time wait for one check.
    pub fn recent(&self, store: &Store, auth: Auth) -> Arc<Health> {
        let mut last = lock(&self.0);
        if let Some((at, health)) = &*last
            && at.elapsed() < RECENT
        {
            return health.clone();
        }
        let health = Arc::new(Health::check(store, auth));
        *last = Some((Instant::now(), health.clone()));
        health
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nearly_full_disk_is_named_but_the_store_is_healthy() {
        let disk = |name: &str, free: u64| Disk { name: name.into(), mount: 0, size: 1000 << 20, free: free << 20 };
        let disks = Arc::new(vec![disk("sv00", 19), disk("sv01", 20)]);
        let volumes = vec![VolumeHealth { name: "a:1".into(), problem: None, disks }];
        let health = Health { index: None, volumes, peers: None, follows: None };
        let warnings = ["volume a:1: disk sv00 has 1.9 % free (19.0 MiB): add volumes or disks"];
        let expected = json!({"healthy": true, "index": "ok", "volumes": {"a:1": "ok"}, "warnings": warnings});
        assert_eq!(health.json(), expected);
    }
}
