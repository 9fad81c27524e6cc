//! What lies on the volumes, read from nginx's listings.
//!
//! The folders of one two-byte prefix are listed together on all volumes and subvolumes. So all blobs of a key are seen
//! at once, and memory holds the blobs of some prefixes only. Every path that is listed was named by the listing of its
//! parent.

use std::collections::{BTreeMap, HashMap};

use rayon::prelude::*;

use super::report::Progress;
use crate::error::{Error, Result};
use crate::format::placement::{key_of, path};
use crate::volumes::autoindex::{Entry, is_hex_folder, is_subvolume};
use crate::volumes::{Auth, Volumes};

/// Prefixes that are listed at the same time.
const WIDTH: usize = 8;

/// Places that are asked at the same time for a prefix.
const AT_ONCE: usize = 8;

/// A blob as a listing shows it.
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

/// What the listings of one prefix show.
#[derive(Default)]
pub struct PrefixListing {
    /// The blobs of each key.
    pub keys: HashMap<Vec<u8>, Vec<Blob>>,
    /// URLs (without `http://`) of files and folders that are no blobs.
    pub foreign: Vec<String>,
    /// Folders that a volume refuses to list, and why.
    pub unreadable: Vec<String>,
}

/// Lists all volumes and calls `f`, on several threads, with what lies under each prefix. Fails if a volume does not
/// answer.
pub fn scan(
    volumes: &Volumes,
    names: &[String],
    auth: Auth,
    f: impl Fn(PrefixListing) -> Result<()> + Sync,
) -> Result<()> {
    let scanner = Scanner { volumes, auth, f };
    threads(WIDTH)?.install(|| {
        let mut listing = PrefixListing::default();
        // The first byte of a prefix, and the places that have a folder for it.
        let mut firsts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for name in names {
            scanner.roots(name, true, &mut firsts, &mut listing)?;
        }
        (scanner.f)(listing)?;
        let progress = Progress::new(firsts.len() as u64, "of the top folders");
        let done = firsts.par_iter().try_for_each(|(first, places)| {
            scanner.first_byte(first, places)?;
            progress.add(1);
            Ok(())
        });
        progress.clear();
        done
    })
}

/// Finds the blobs of one key on all volumes. Fails if a volume does not answer.
pub fn find(volumes: &Volumes, names: &[String], auth: Auth, key: &[u8]) -> Result<Vec<Blob>> {
    let scanner = Scanner { volumes, auth, f: |_| Ok(()) };
    let (mut firsts, mut listing) = (BTreeMap::new(), PrefixListing::default());
    for name in names {
        scanner.roots(name, true, &mut firsts, &mut listing)?;
    }
    let blob = path(key, 0);
    let (first, second, folder) = (&blob[1..3], &blob[4..6], &blob[..7]);
    let places = firsts.remove(first).unwrap_or_default();
    let seconds = scanner.list(&places, &blob[..4], &mut listing)?;
    let places: Vec<&str> = seconds
        .iter()
        .filter(|(_, entry)| is_hex_folder(entry) && entry.name == second)
        .map(|(place, _)| *place)
        .collect();
    scanner.blobs(&places, folder, &mut listing)?;
    Ok(listing.keys.remove(key).unwrap_or_default())
}

struct Scanner<'a, F> {
    volumes: &'a Volumes,
    auth: Auth<'a>,
    f: F,
}

impl<F: Fn(PrefixListing) -> Result<()> + Sync> Scanner<'_, F> {
    /// Lists a folder in all these places.
    fn list<'p>(
        &self,
        places: &'p [impl AsRef<str>],
        folder: &str,
        listing: &mut PrefixListing,
    ) -> Result<Vec<(&'p str, Entry)>> {
        let mut listed = Vec::new();
        for places in places.chunks(AT_ONCE) {
            let places: Vec<&str> = places.iter().map(AsRef::as_ref).collect();
            let answers = self.volumes.list(&places, folder, self.auth);
            for (place, entries) in places.into_iter().zip(answers) {
                let text = |e: Error| format!("no listing of http://{place}{folder}: {e}");
                match entries {
                    Ok(entries) => listed.extend(entries.into_iter().map(|entry| (place, entry))),
                    // At "/" the volume refuses everything.
                    Err(e @ Error::Refused { .. }) if folder != "/" => listing.unreadable.push(text(e)),
                    Err(e) => return Err(Error::Failed(text(e))),
                }
            }
        }
        Ok(listed)
    }

    /// Finds the top folders of a volume and of its subvolumes.
    fn roots(
        &self,
        place: &str,
        is_volume: bool,
        firsts: &mut BTreeMap<String, Vec<String>>,
        listing: &mut PrefixListing,
    ) -> Result<()> {
        for (_, entry) in self.list(&[place], "/", listing)? {
            if is_hex_folder(&entry) {
                firsts.entry(entry.name).or_default().push(place.to_string());
            } else if is_volume && is_subvolume(&entry) {
                self.roots(&format!("{place}/{}", entry.name), false, firsts, listing)?;
            } else if entry.name != "lost+found" {
                listing.foreign.push(format!("{place}/{}", entry.name));
            }
        }
        Ok(())
    }

    /// Lists all prefixes with this first byte.
    fn first_byte(&self, first: &str, places: &[String]) -> Result<()> {
        let mut listing = PrefixListing::default();
        let mut seconds: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for (place, entry) in self.list(places, &format!("/{first}/"), &mut listing)? {
            if is_hex_folder(&entry) {
                seconds.entry(entry.name).or_default().push(place);
            } else {
                listing.foreign.push(format!("{place}/{first}/{}", entry.name));
            }
        }
        (self.f)(listing)?;
        seconds.par_iter().try_for_each(|(second, places)| {
            let mut listing = PrefixListing::default();
            self.blobs(places, &format!("/{first}/{second}/"), &mut listing)?;
            (self.f)(listing)
        })
    }

    /// Collects the blobs below a folder. A blob's name may hold slashes.
    fn blobs(&self, places: &[&str], folder: &str, listing: &mut PrefixListing) -> Result<()> {
        for (place, Entry { name, size, folder: is_folder, time }) in self.list(places, folder, listing)? {
            let path = format!("{folder}{name}");
            match (size, key_of(&path)) {
                (Some(size), Some((key, version))) => {
                    let blob = Blob { replica: place.to_string(), version, size, time };
                    listing.keys.entry(key).or_default().push(blob);
                }
                (None, _) if is_folder && name.bytes().all(is_base64) => {
                    self.blobs(&[place], &format!("{path}/"), listing)?;
                }
                _ => listing.foreign.push(format!("{place}{path}")),
            }
        }
        Ok(())
    }
}

fn is_base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"+-_=~".contains(&byte)
}

/// Threads for work that waits for volumes more than it computes.
pub fn threads(width: usize) -> Result<rayon::ThreadPool> {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(width).build();
    threads.map_err(|e| Error::Failed(format!("no thread can be started: {e}")))
}
