//! Statistics: keys and bytes by volume, by top-level prefix and by size.
//!
//! One pass over the index counts them, on a thread of its own with the lowest priority and past the block cache, so
//! that it is not in the way of requests. The result is kept for an hour. Sizes are those of the records: blobs of
//! debris do not count, and neither do values without a size, which a Go master wrote.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Store, now};
use crate::error::{Error, Result};
use crate::format::percent_encoded;
use crate::format::record::{Record, State, volume_of};
use crate::threads::lock;

/// How long a result is used, and how long a failure.
const FRESH: Duration = Duration::from_secs(3600);
const FAILED: Duration = Duration::from_secs(60);

/// How many prefixes are listed by name: those with the most bytes.
const PREFIXES: usize = 100;

/// Upper bounds of the sizes, in bytes: powers of 4 from 1 KiB to 64 GiB.
const BOUNDS: usize = 14;

/// Keys and the bytes of their values, or replicas and the bytes of their blobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, PartialOrd, Serialize)]
pub struct Amount {
    pub bytes: u64,
    pub keys: u64,
}

impl Amount {
    fn add(&mut self, bytes: u64) {
        *self = Amount { bytes: self.bytes.saturating_add(bytes), keys: self.keys + 1 };
    }

    fn merge(&mut self, other: Amount) {
        *self = Amount { bytes: self.bytes.saturating_add(other.bytes), keys: self.keys + other.keys };
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct VolumeAmount {
    #[serde(flatten)]
    pub all: Amount,
    /// Empty with `-subvolumes 1`.
    pub subvolumes: BTreeMap<String, Amount>,
}

/// The keys that begin with the same two slashes and what is between them, or with one slash only.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PrefixAmount {
    /// Percent-encoded, as in a URL. `/`: the keys without a second slash.
    pub prefix: String,
    #[serde(flatten)]
    pub all: Amount,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SizeAmount {
    /// The largest size of this range in bytes; `None`: no limit. The range begins above the one before.
    pub up_to: Option<u64>,
    #[serde(flatten)]
    pub all: Amount,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Stats {
    /// When the pass began, in seconds since 1970, and how long it took.
    pub time: u64,
    pub seconds: f64,
    /// All values, those of unlinked keys too.
    #[serde(flatten)]
    pub all: Amount,
    pub unlinked: Amount,
    /// Keys whose record does not say the value's size.
    pub without_size: u64,
    pub volumes: BTreeMap<String, VolumeAmount>,
    /// How many prefixes are not among `prefixes`, and what they hold.
    pub other_prefixes: u64,
    pub other: Amount,
    /// The prefixes with the most bytes.
    pub prefixes: Vec<PrefixAmount>,
    pub sizes: Vec<SizeAmount>,
}

/// The last statistics, and the pass that counts new ones.
#[derive(Default)]
pub struct Statistics {
    state: Mutex<Counted>,
    done: Condvar,
}

#[derive(Default)]
struct Counted {
    running: bool,
    last: Option<(Instant, Result<Arc<Stats>>)>,
}

impl Statistics {
    /// Statistics that are at most an hour old. If there are none, a pass begins, and this waits for it up to `patience`.
    /// `None`: the pass takes longer.
    pub fn get(self: &Arc<Self>, store: &Arc<Store>, patience: Duration) -> Result<Option<Arc<Stats>>> {
        let mut state = lock(&self.state);
        if !state.running && state.fresh().is_none() {
            let (statistics, store) = (self.clone(), store.clone());
            let thread = std::thread::Builder::new().name("mkv-stats".into());
            let failed = |e| Error::Unavailable(format!("no thread can be started: {e}: try again later"));
            thread.spawn(move || statistics.run(&store)).map_err(failed)?;
            state.running = true;
        }
        let (state, _) = self
            .done
            .wait_timeout_while(state, patience, |state| state.running)
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        state.fresh().transpose()
    }

    /// The last statistics, whatever their age. Begins a pass if they are over an hour old, and does not wait for it.
    pub fn last(self: &Arc<Self>, store: &Arc<Store>) -> Option<Arc<Stats>> {
        // A failure is told to those who ask for statistics alone.
        let _ = self.get(store, Duration::ZERO);
        let state = lock(&self.state);
        state.last.as_ref().and_then(|(_, counted)| counted.clone().ok())
    }

    fn run(&self, store: &Store) {
        // On Linux this is the priority of the calling thread alone.
        let _ = rustix::process::setpriority_process(None, 19);
        let counted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| count(store)));
        let counted =
            counted.unwrap_or_else(|_| Err(Error::Failed("the pass over the index panicked: see the log".into())));
        let mut state = lock(&self.state);
        *state = Counted { running: false, last: Some((Instant::now(), counted.map(Arc::new))) };
        self.done.notify_all();
    }
}

impl Counted {
    fn fresh(&self) -> Option<Result<Arc<Stats>>> {
        let (at, counted) = self.last.as_ref()?;
        let limit = if counted.is_ok() { FRESH } else { FAILED };
        (at.elapsed() < limit).then(|| counted.clone())
    }
}

fn count(store: &Store) -> Result<Stats> {
    let (begun, time) = (Instant::now(), now());
    let mut counter = Counter::default();
    for row in store.index.view().all_records() {
        let (key, record) = row?;
        // What a Go master left half written is no value.
        if record.state != State::HalfWritten {
            counter.add(&key, &record);
        }
    }
    Ok(Stats { time, seconds: begun.elapsed().as_secs_f64(), ..counter.finish() })
}

#[derive(Default)]
struct Counter {
    stats: Stats,
    replicas: HashMap<String, Amount>,
    sizes: [Amount; BOUNDS + 1],
    /// The keys without a second slash.
    top: Amount,
    /// The prefix of the last key. All keys of a prefix come one after the other.
    prefix: Vec<u8>,
    current: Amount,
    /// The largest prefixes so far, smallest first.
    largest: Vec<(Amount, Vec<u8>)>,
}

impl Counter {
    fn add(&mut self, key: &[u8], record: &Record) {
        let bytes = record.size.unwrap_or(0);
        self.stats.all.add(bytes);
        if !record.live() {
            self.stats.unlinked.add(bytes);
        }
        match record.size {
            Some(size) => self.sizes[bucket(size)].add(size),
            None => self.stats.without_size += 1,
        }
        for replica in &record.replicas {
            match self.replicas.get_mut(replica) {
                Some(amount) => amount.add(bytes),
                None => self.replicas.entry(replica.clone()).or_default().add(bytes),
            }
        }
        match prefix_of(key) {
            None => self.top.add(bytes),
            Some(prefix) => {
                if prefix != self.prefix {
                    self.end_prefix();
                    self.prefix = prefix.to_vec();
                }
                self.current.add(bytes);
            }
        }
    }

    /// Keeps the prefix that ends here if it is among the largest; otherwise it counts to the others.
    fn end_prefix(&mut self) {
        let (prefix, amount) = (std::mem::take(&mut self.prefix), std::mem::take(&mut self.current));
        if amount.keys == 0 {
            return;
        }
        let at = self.largest.partition_point(|(other, _)| *other < amount);
        self.largest.insert(at, (amount, prefix));
        if self.largest.len() > PREFIXES {
            let (smallest, _) = self.largest.remove(0);
            self.stats.other.merge(smallest);
            self.stats.other_prefixes += 1;
        }
    }

    fn finish(mut self) -> Stats {
        self.end_prefix();
        let mut stats = self.stats;
        for (replica, amount) in self.replicas {
            let volume = stats.volumes.entry(volume_of(&replica).to_string()).or_default();
            volume.all.merge(amount);
            if let Some((_, subvolume)) = replica.split_once('/') {
                volume.subvolumes.insert(subvolume.to_string(), amount);
            }
        }
        let named = self.largest.iter().rev().map(|(all, prefix)| (percent_encoded(prefix).to_string(), *all));
        let top = Some(("/".to_string(), self.top)).filter(|(_, top)| top.keys > 0);
        stats.prefixes = top.into_iter().chain(named).map(|(prefix, all)| PrefixAmount { prefix, all }).collect();
        let bound = |n| (n < BOUNDS).then(|| 1024_u64 << (2 * n));
        stats.sizes = self.sizes.iter().enumerate().map(|(n, all)| SizeAmount { up_to: bound(n), all: *all }).collect();
        stats
    }
}

/// The range of sizes that this size belongs to.
fn bucket(size: u64) -> usize {
    (0..BOUNDS).find(|n| size <= 1024_u64 << (2 * n)).unwrap_or(BOUNDS)
}

/// A key up to and with its second slash, if it has one.
fn prefix_of(key: &[u8]) -> Option<&[u8]> {
    let second = key.iter().skip(1).position(|byte| *byte == b'/')?;
    Some(&key[..second + 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(size: u64, replicas: &[&str]) -> Record {
        let replicas = replicas.iter().map(|replica| replica.to_string()).collect();
        Record { size: Some(size), replicas, ..Record::default() }
    }

    #[test]
    fn keys_are_counted_by_volume_prefix_and_size() {
        let mut counter = Counter::default();
        counter.add(b"/a/1", &record(1024, &["v:1/sv00", "w:1/sv03"]));
        counter.add(b"/a/2/3", &record(1025, &["v:1/sv00"]));
        counter.add(b"/b", &record(5, &["v:1/sv01"]));
        counter.add(b"/b\xff/x", &Record { size: None, state: State::Unlinked, ..record(0, &["w:1/sv03"]) });
        let stats = counter.finish();
        assert_eq!(stats.all, Amount { bytes: 2054, keys: 4 });
        assert_eq!((stats.unlinked, stats.without_size), (Amount { bytes: 0, keys: 1 }, 1));
        assert_eq!(stats.volumes["v:1"].all, Amount { bytes: 2054, keys: 3 });
        assert_eq!(stats.volumes["v:1"].subvolumes["sv00"], Amount { bytes: 2049, keys: 2 });
        assert_eq!(stats.volumes["w:1"].subvolumes["sv03"], Amount { bytes: 1024, keys: 2 });
        let prefixes: Vec<_> = stats.prefixes.iter().map(|p| (p.prefix.as_str(), p.all.keys)).collect();
        assert_eq!(prefixes, [("/", 1), ("/a/", 2), ("/b%FF/", 1)]);
        assert_eq!(stats.sizes[0], SizeAmount { up_to: Some(1024), all: Amount { bytes: 1029, keys: 2 } });
        assert_eq!(stats.sizes[1], SizeAmount { up_to: Some(4096), all: Amount { bytes: 1025, keys: 1 } });
        assert_eq!(stats.sizes[BOUNDS].up_to, None);
    }

    #[test]
    fn the_smallest_prefixes_are_summed_up() {
        let mut counter = Counter::default();
        for n in 0..PREFIXES as u64 + 3 {
            counter.add(format!("/{n:03}/key").as_bytes(), &record(n + 1, &["v:1"]));
        }
        let stats = counter.finish();
        assert_eq!((stats.prefixes.len(), stats.other_prefixes), (PREFIXES, 3));
        assert_eq!(stats.other, Amount { bytes: 1 + 2 + 3, keys: 3 });
        assert_eq!(stats.prefixes[0].prefix, "/102/");
        assert!(stats.volumes["v:1"].subvolumes.is_empty());
    }
}
