//! What lies on the volumes, read from their listings.
//!
//! The folders of one two-byte prefix are taken together over all volumes and subvolumes, so that
//! all blobs of a key are seen at once, and no more than the blobs of some prefixes is in memory.
//! Nothing is asked for that a listing did not name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Mutex;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::format::placement::key_of;
use crate::ops::progress::Progress;
use crate::threads::lock;
use crate::volumes::Volumes;
use crate::volumes::autoindex::Entry;

/// Prefixes that are listed at the same time.
const WIDTH: usize = 8;

/// Places that are asked at the same time for a prefix.
const AT_ONCE: usize = 8;

/// A blob as a listing names it.
#[derive(Debug, Clone)]
pub struct Blob {
    /// `host:port` or `host:port/svXX`.
    pub replica: String,
    pub version: u64,
    /// Bytes.
    pub size: u64,
    /// mtime, in seconds since 1970.
    pub time: u64,
}

/// The blobs of one prefix, by key, and the URLs of what is no blob.
#[derive(Default)]
pub struct Found {
    pub keys: HashMap<Vec<u8>, Vec<Blob>>,
    pub strays: Vec<String>,
}

/// Lists all volumes and calls `f`, on several threads, with what lies under each prefix.
pub fn scan(
    volumes: &Volumes,
    names: &[String],
    auth: Option<&str>,
    f: impl Fn(Found) -> Result<()> + Sync,
) -> Result<()> {
    let scanner = Scanner { volumes, auth };
    threads(WIDTH)?.install(|| {
        let mut strays = Found::default();
        // First byte to the places where it has a folder.
        let mut firsts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for name in names {
            scanner.roots(name, true, &mut firsts, &mut strays)?;
        }
        f(strays)?;
        let progress = Progress::new(firsts.len() as u64, "of the top folders");
        let done = firsts.par_iter().try_for_each(|(first, places)| {
            let mut strays = Found::default();
            let mut seconds: BTreeMap<String, Vec<&str>> = BTreeMap::new();
            for (place, entries) in scanner.list(places, &format!("/{first}/"))? {
                for entry in entries {
                    if entry.folder && is_hex(&entry.name) {
                        seconds.entry(entry.name).or_default().push(place);
                    } else {
                        strays.strays.push(format!("{place}/{first}/{}", entry.name));
                    }
                }
            }
            f(strays)?;
            seconds.par_iter().try_for_each(|(second, places)| {
                let mut found = Found::default();
                scanner.blobs(places, &format!("/{first}/{second}/"), &mut found)?;
                f(found)
            })?;
            progress.add(1);
            Ok(())
        });
        progress.end();
        done
    })
}

/// Whether there are folders of blobs on a volume.
pub fn has_blobs(volumes: &Volumes, name: &str, auth: Option<&str>) -> Result<bool> {
    let mut firsts = BTreeMap::new();
    let scanner = Scanner { volumes, auth };
    scanner.roots(name, true, &mut firsts, &mut Found::default())?;
    Ok(!firsts.is_empty())
}

struct Scanner<'a> {
    volumes: &'a Volumes,
    auth: Option<&'a str>,
}

impl Scanner<'_> {
    /// Lists a folder in all these places.
    fn list<'p>(
        &self,
        places: &'p [impl AsRef<str>],
        folder: &str,
    ) -> Result<Vec<(&'p str, Vec<Entry>)>> {
        let mut listings = Vec::with_capacity(places.len());
        for places in places.chunks(AT_ONCE) {
            let places: Vec<&str> = places.iter().map(AsRef::as_ref).collect();
            let entries = self.volumes.list(&places, folder, self.auth)?;
            listings.extend(places.into_iter().zip(entries));
        }
        Ok(listings)
    }

    /// Finds the top folders of a volume and, if it is one, of its subvolumes.
    fn roots(
        &self,
        place: &str,
        volume: bool,
        firsts: &mut BTreeMap<String, Vec<String>>,
        found: &mut Found,
    ) -> Result<()> {
        for entry in self.volumes.list(&[place], "/", self.auth)?.remove(0) {
            if entry.folder && is_hex(&entry.name) {
                firsts.entry(entry.name).or_default().push(place.to_string());
            } else if entry.folder && volume && is_subvolume(&entry.name) {
                self.roots(&format!("{place}/{}", entry.name), false, firsts, found)?;
            } else if entry.name != "lost+found" {
                found.strays.push(format!("{place}/{}", entry.name));
            }
        }
        Ok(())
    }

    /// Collects the blobs below a folder; a name may hold slashes.
    fn blobs(&self, places: &[&str], folder: &str, found: &mut Found) -> Result<()> {
        for (place, entries) in self.list(places, folder)? {
            for entry in entries {
                let path = format!("{folder}{}", entry.name);
                match entry.size {
                    Some(size) => match key_of(&path) {
                        Some((key, version)) => {
                            let replica = place.to_string();
                            let blob = Blob { replica, version, size, time: entry.time };
                            found.keys.entry(key).or_default().push(blob);
                        }
                        None => found.strays.push(format!("{place}{path}")),
                    },
                    None if entry.folder && entry.name.bytes().all(is_base64) => {
                        self.blobs(&[place], &format!("{path}/"), found)?;
                    }
                    None => found.strays.push(format!("{place}{path}")),
                }
            }
        }
        Ok(())
    }
}

fn is_hex(name: &str) -> bool {
    name.len() == 2 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_subvolume(name: &str) -> bool {
    let digits = name.strip_prefix("sv").unwrap_or_default();
    digits.len() >= 2 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'))
}

fn is_base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"+-_=~".contains(&byte)
}

/// Threads for work that waits for volumes more than it computes.
pub fn threads(width: usize) -> Result<rayon::ThreadPool> {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(width).build();
    threads.map_err(|e| Error::Failed(format!("no thread can be started: {e}")))
}

/// Findings that are shown of a kind without `-v`.
const SHOWN: usize = 10;

/// What a run finds, by what it is called: how many, and their names, or the first of them.
pub struct Findings {
    all: bool,
    kinds: Mutex<BTreeMap<&'static str, (usize, BTreeSet<String>)>>,
}

impl Findings {
    /// `all`: every name is kept and shown.
    pub fn new(all: bool) -> Findings {
        Findings { all, kinds: Mutex::default() }
    }

    pub fn add(&self, kind: &'static str, name: String) {
        let mut kinds = lock(&self.kinds);
        let (count, names) = kinds.entry(kind).or_default();
        *count += 1;
        names.insert(name);
        if !self.all && names.len() > SHOWN {
            names.pop_last();
        }
    }

    pub fn count(&self, kind: &str) -> usize {
        lock(&self.kinds).get(kind).map_or(0, |(count, _)| *count)
    }

    pub fn show(&self) {
        for (kind, (count, names)) in &*lock(&self.kinds) {
            println!("{kind}: {count}");
            for name in names {
                // A file's name may be meant to look like a line of ours.
                println!("  {}", name.replace(char::is_control, "\u{fffd}"));
            }
            if *count > names.len() {
                println!("  … and {} more, -v shows all", count - names.len());
            }
        }
    }
}
