//! The API's commands on the index and the volumes: the write protocols and the cleaner.
//!
//! The order of the steps is what keeps values safe when the master dies between two of them:
//! debris names every place where a blob may come to lie before its first byte is sent, one batch
//! makes a value visible and its debris nothing, and only what the index no longer names is deleted.

pub mod list;

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::api::auth::{Credentials, Gate};
use crate::api::metrics::{Metrics, plain, write_volumes};
use crate::api::route::{Command, List};
use crate::cli::Options;
use crate::error::{Error, Result};
use crate::format::placement::{path, place};
use crate::format::record::{Debris, Record, State, hex};
use crate::index::Index;
use crate::ops::scan::has_blobs;
use crate::threads::lock;
use crate::volumes::Volumes;
pub use crate::volumes::upload::Upload;
use crate::volumes::upload::{PutOptions, Stored};

/// For how long a 404 proves nothing where a whole body was sent and no answer came, in seconds.
const LATE: u64 = 3600;

/// For how long a 404 proves nothing of what a crash left, in seconds.
const CRASHED: u64 = 10;

/// For how long the plain name of a key is avoided after a volume could not use it, in seconds.
const CONFLICT: u64 = 60;

/// For how long a deletion that got no answer may yet be done.
const UNANSWERED: Duration = Duration::from_secs(LATE);

/// How often the cleaner looks again at what it could not clear.
const CLEAN_EVERY: Duration = Duration::from_secs(5);

/// How many keys the cleaner clears at the same time.
const CLEAN_WIDTH: usize = 32;

pub struct Store {
    pub options: Options,
    pub index: Index,
    pub volumes: Arc<Volumes>,
    pub metrics: Metrics,
    /// With basic authorization: who may come in.
    gate: Option<Gate>,
    own_auth: Option<String>,
    /// Whether the cleaner should look when the key's lock is free again.
    dirty: AtomicBool,
    /// The keys whose blob of the plain name the cleaner is deleting without their locks.
    cleaning: Mutex<HashSet<Vec<u8>>>,
    /// The keys with a deletion of a blob that got no answer, and may yet be done by one of the
    /// volume's processes when another has answered the next; and when that was.
    unanswered: Mutex<HashMap<Vec<u8>, Instant>>,
    /// When a master started that found debris: what the one before it had sent may yet be done.
    crashed: OnceLock<Instant>,
    /// Wakes the cleaner.
    wake: Sender<()>,
    woken: Receiver<()>,
}

/// What a client is answered.
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: ReplyBody,
    /// The kind of error that this reply tells of.
    pub error: Option<&'static str>,
}

pub enum ReplyBody {
    Text(String),
    /// A page of keys, written while it is read from the index.
    List(List),
}

impl Reply {
    fn empty(status: u16) -> Reply {
        Reply { status, headers: Vec::new(), body: ReplyBody::Text(String::new()), error: None }
    }
}

impl From<Error> for Reply {
    fn from(error: Error) -> Reply {
        let mut headers = vec![("Content-Type", "text/plain; charset=utf-8".to_string())];
        match error.status() {
            401 => headers.push(("WWW-Authenticate", "Basic realm=\"mkv\"".into())),
            405 => headers.push((
                "Allow",
                "GET, HEAD, PUT, REPLACE, DELETE, UNLINK, RELINK, REBALANCE".into(),
            )),
            503 => headers.push(("Retry-After", "5".into())),
            _ => {}
        }
        Reply {
            headers,
            body: ReplyBody::Text(format!("{error}\n")),
            error: Some(error.kind()),
            ..Reply::empty(error.status())
        }
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Store {
    pub fn new(options: Options, index: Index) -> Arc<Store> {
        let (wake, woken) = bounded(1);
        let volumes = Volumes::new(options.voltimeout);
        let own = options.userpass.as_ref().and_then(|text| Credentials::new(text.as_bytes()));
        let own_auth = own.map(|credentials| credentials.header);
        let gate = options.basicauth.then(|| Gate::new(volumes.clone(), &options.volumes));
        Arc::new(Store {
            options,
            index,
            volumes,
            metrics: Metrics::default(),
            gate,
            own_auth,
            dirty: AtomicBool::new(false),
            cleaning: Mutex::default(),
            unanswered: Mutex::default(),
            crashed: OnceLock::new(),
            wake,
            woken,
        })
    }

    /// What has to hold before anybody is served.
    pub fn check(&self) -> Result<()> {
        self.volumes.check_distinct(self.options.volumes.iter())?;
        if self.gate.is_some() && self.own_auth.is_none() {
            log::warn!("without -userpass the cleaner cannot delete: debris waits");
        }
        self.gate.as_ref().map_or(Ok(()), Gate::check)
    }

    /// What a crash left may still be on its way to a disk: for some time a 404 is no proof.
    pub fn distrust(&self) -> Result<()> {
        let mut change = self.index.change();
        self.index.view().debris(b"", |key, version, entry| {
            let until = entry.until.max(now() + CRASHED);
            let taken = std::mem::replace(&mut change, self.index.change());
            change = taken.set_debris(key, version, &Debris { until, ..entry });
            self.crashed.get_or_init(Instant::now);
            Ok(())
        })?;
        change.commit()
    }

    /// Who sends this Authorization header, as far as is known without asking a volume; `None`: one
    /// has to be asked. Without basic authorization everybody is nobody, and welcome.
    pub fn known_client(&self, header: Option<&str>) -> Option<Result<Option<Credentials>>> {
        let Some(gate) = &self.gate else { return Some(Ok(None)) };
        let Some(credentials) = header.and_then(Credentials::parse) else {
            return Some(Err(Error::Unauthorized));
        };
        match gate.remembered(&credentials)? {
            true => Some(Ok(Some(credentials))),
            false => Some(Err(Error::Unauthorized)),
        }
    }

    /// Who sends this Authorization header.
    pub fn client(&self, header: Option<&str>) -> Result<Option<Credentials>> {
        if let Some(known) = self.known_client(header) {
            return known;
        }
        let (Some(gate), Some(credentials)) = (&self.gate, header.and_then(Credentials::parse))
        else {
            return Err(Error::Unauthorized);
        };
        if gate.ask(&credentials)? { Ok(Some(credentials)) } else { Err(Error::Unauthorized) }
    }

    /// Answers a GET from the index alone; where that is not enough, `then` gets nothing.
    pub fn get_at_once(&self, key: &[u8], target: &str, then: impl FnOnce(Option<Result<Reply>>)) {
        match self.index.get(key) {
            Ok(Some(record)) if record.live() => then(None),
            Ok(_) => then(Some(self.not_here(target))),
            Err(error) => then(Some(Err(error))),
        }
    }

    /// Carries out a command. `upload` is read by PUT and REPLACE only.
    pub fn run(
        &self,
        command: Command,
        upload: Upload,
        client: Option<&Credentials>,
    ) -> Result<Reply> {
        let auth = self.auth_of(client);
        let mut reply = match command {
            Command::Get { key, path } => self.get(&key, &path, client),
            Command::Put { key, replace } => self.put(&key, replace, upload, auth),
            Command::Delete(key) => self.delete(&key, auth),
            Command::Unlink(key) => self.unlink(&key),
            Command::Relink(key) => self.relink(&key, auth),
            Command::Rebalance(key) => self.rebalance(&key, auth).map(|_| Reply::empty(204)),
            Command::List(list) => Ok(reply(200, "application/json", ReplyBody::List(list))),
            Command::Metrics => {
                Ok(reply(200, "text/plain; version=0.0.4", ReplyBody::Text(self.metrics())))
            }
            Command::Health => Ok(self.health(auth)),
        };
        // A volume did not take the caller's credentials: they are wrong since a moment ago.
        if let (Err(Error::Refused { status: 401 | 403, .. }), Some(gate), Some(client)) =
            (&reply, &self.gate, client)
        {
            gate.forget(client);
            reply = Err(Error::Unauthorized);
        }
        // The key's lock is free again: the cleaner may have it.
        if self.dirty.swap(false, Ordering::Relaxed) {
            let _ = self.wake.try_send(());
        }
        reply
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        self.metrics.write(&mut text);
        write_volumes(&mut text, &self.volumes.snapshot());
        let (locked, keys) = (self.index.locked() as u64, self.index.estimate());
        plain(&mut text, "mkv_locks", "gauge", "Keys that are being written.", locked);
        plain(&mut text, "mkv_keys", "gauge", "Keys in the index, an estimate.", keys);
        text
    }

    /// Whether the index can be written and every volume answers.
    fn health(&self, auth: Option<&str>) -> Reply {
        let index = self.index.probe().map_or_else(|e| e.to_string(), |()| "ok".into());
        let (volumes, auth) = (self.volumes.clone(), auth.map(String::from));
        let ask = move |name: String| match volumes.accepts_login(&name, auth.as_deref()) {
            Ok(true) => (name, "ok".to_string()),
            Ok(false) => (name, "it does not let the master in".to_string()),
            Err(error) => (name, error.to_string()),
        };
        let states = self.volumes.pool.each(self.options.volumes.clone(), ask);
        let healthy = index == "ok" && states.iter().all(|(_, state)| state == "ok");
        let states: serde_json::Map<_, _> =
            states.into_iter().map(|(name, state)| (name, state.into())).collect();
        let text = serde_json::json!({ "healthy": healthy, "index": index, "volumes": states });
        reply(
            if healthy { 200 } else { 503 },
            "application/json",
            ReplyBody::Text(format!("{text}\n")),
        )
    }

    fn not_here(&self, path: &str) -> Result<Reply> {
        let Some(fallback) = &self.options.fallback else { return Err(NOT_FOUND) };
        let headers = vec![("Location", format!("http://{fallback}{path}"))];
        Ok(Reply { headers, ..Reply::empty(302) })
    }

    fn get(&self, key: &[u8], target: &str, client: Option<&Credentials>) -> Result<Reply> {
        let mut found = self.index.get(key)?;
        loop {
            let Some(record) = found.filter(Record::live) else { return self.not_here(target) };
            match self.find(key, &record, self.auth_of(client)) {
                Ok(blob) => return Ok(self.redirect(key, &record, &blob, client)),
                Err(error) => {
                    found = self.index.get(key)?;
                    // Otherwise it was replaced in the meantime, or deleted.
                    if found.as_ref() == Some(&record) {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Sends a reader to a blob: the URL's part behind `http://`.
    fn redirect(
        &self,
        key: &[u8],
        record: &Record,
        blob: &str,
        client: Option<&Credentials>,
    ) -> Reply {
        let placed = self.place(key);
        let balance = if record.replicas == placed { "balanced" } else { "unbalanced" };
        // As the original does: clients drop the header when they are sent to another port.
        let user = client.map_or("", |client| &client.url);
        let mut headers = vec![
            ("Location", format!("http://{user}{blob}")),
            ("Key-Volumes", record.replicas.join(",")),
            ("Key-Balance", balance.to_string()),
        ];
        headers.extend(client.map(|_| ("Cache-Control", "no-store".into())));
        headers.extend(record.hash.map(|hash| ("Content-Md5", hex(&hash))));
        Reply { headers, ..Reply::empty(302) }
    }

    /// A blob in the record's length, as `host:port/path`.
    fn find(&self, key: &[u8], record: &Record, auth: Option<&str>) -> Result<String> {
        let (blob, mut silent) = (path(key, record.version), None);
        for replica in self.volumes.shuffled(&record.replicas) {
            match self.volumes.head(&replica, &blob, auth) {
                Ok(Some(length)) if record.size.is_none_or(|size| size == length) => {
                    return Ok(format!("{replica}{blob}"));
                }
                Ok(found) => {
                    let found = found.map_or("has no blob".into(), |n| format!("has {n} bytes"));
                    log::warn!("\"{}\": {replica} {found}", key.escape_ascii());
                }
                Err(error) => silent = Some(error),
            }
        }
        Err(match silent {
            None => Error::Gone,
            Some(Error::Refused { volume, status }) if status != 401 && status != 403 => {
                Error::Unreachable {
                    volume,
                    why: format!("it answered {status}"),
                    maybe_done: false,
                }
            }
            Some(error) => error,
        })
    }

    pub fn place(&self, key: &[u8]) -> Vec<String> {
        place(key, &self.options.volumes, self.options.replicas, self.options.subvolumes)
    }

    fn put(&self, key: &[u8], replace: bool, upload: Upload, auth: Option<&str>) -> Result<Reply> {
        if upload.length == Some(0) {
            return Err(Error::NoValue);
        }
        let _lock = self.index.lock(key).ok_or(Error::Locked)?;
        let old = self.index.get(key)?;
        if old.as_ref().is_some_and(Record::live) {
            if !replace {
                return Err(Error::Forbidden("the key exists: delete it first, or use REPLACE"));
            }
            if self.options.protect {
                return Err(Error::Forbidden(PROTECTED));
            }
        }
        let version = self.new_version(key, old.as_ref())?;
        let replicas = self.place(key);
        self.volumes.check_silent(&replicas, auth)?;
        let time = now();
        let options = PutOptions { time, md5sum: self.options.md5sum };
        let stored = self.write_blob(key, version, &replicas, upload, options, auth)?;
        let record = Record {
            state: State::Live,
            hash: stored.hash.filter(|_| self.options.md5sum),
            size: Some(stored.size),
            time: Some(time),
            version,
            replicas,
        };
        let mut change = self.index.change().put(key, &record).drop_debris(key, version);
        if let Some(old) = &old {
            change = change.grow_debris(key, old.version, &surplus(old))?;
        }
        change.commit()?;
        self.dirty.fetch_or(old.is_some(), Ordering::Relaxed);
        Ok(Reply::empty(201))
    }

    /// Writes a blob to these replicas, all or none. When this returns `Ok`, the debris entry of this
    /// version still names them: the caller's next change makes them a record's.
    pub fn write_blob(
        &self,
        key: &[u8],
        version: u64,
        replicas: &[String],
        upload: Upload,
        options: PutOptions,
        auth: Option<&str>,
    ) -> Result<Stored> {
        let mut new = Debris { replicas: replicas.to_vec(), ..Debris::default() };
        // A crash from here on leaves this entry, which says what may lie where.
        self.index.change().grow_debris(key, version, &new)?.commit()?;
        self.volumes.put(replicas, &path(key, version), upload, options, auth).or_else(|failed| {
            // A folder where the plain name should lie: as long as this entry stays, another attempt
            // gets a version.
            let conflict =
                version == 0 && matches!(failed.error, Error::Refused { status: 409, .. });
            if conflict || !failed.maybe_stored.is_empty() {
                new.until = now() + if failed.maybe_stored.is_empty() { CONFLICT } else { LATE };
                self.index.change().grow_debris(key, version, &new)?.commit()?;
            }
            // What cannot be cleared now, the cleaner clears.
            let cleared = self.clear(key, version, replicas, auth)?;
            self.dirty.fetch_or(!cleared, Ordering::Relaxed);
            Err(failed.error)
        })
    }

    /// The version of a blob that is about to be written: the plain name only where no blob of the
    /// key can lie anywhere, otherwise one that the key never had, so that a path never holds two
    /// values.
    fn new_version(&self, key: &[u8], old: Option<&Record>) -> Result<u64> {
        let debris = self.index.debris(key)?;
        let versions = debris.iter().map(|(version, _)| *version).chain(old.map(|old| old.version));
        let highest = match versions.max() {
            Some(highest) => highest,
            None if lock(&self.cleaning).contains(key) => 0,
            None if self.may_be_deleted(key) => 0,
            None if self.crashed.get().is_some_and(|at| at.elapsed() < UNANSWERED) => 0,
            None => return Ok(0),
        };
        let micros = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_micros() as u64);
        Ok(micros.max(highest + 1))
    }

    fn delete(&self, key: &[u8], auth: Option<&str>) -> Result<Reply> {
        let _lock = self.index.lock(key).ok_or(Error::Locked)?;
        let debris = match self.index.get(key)? {
            Some(record) if record.live() && self.options.protect => {
                return Err(Error::Forbidden(PROTECTED));
            }
            Some(record) => {
                let blobs = surplus(&record);
                self.index
                    .change()
                    .remove(key)
                    .grow_debris(key, record.version, &blobs)?
                    .commit()?;
                vec![(record.version, blobs)]
            }
            // An earlier DELETE could not delete all blobs: this one goes on.
            None => self.index.debris(key)?,
        };
        if debris.is_empty() {
            return Err(NOT_FOUND);
        }
        let mut failed = None;
        for (version, entry) in debris {
            match self.clear_now(key, version, &entry.replicas, true, auth) {
                Ok(()) => {}
                Err(error @ Error::Index(_)) => return Err(error),
                Err(error) => failed = Some(error),
            }
        }
        let Some(error) = failed else { return Ok(Reply::empty(204)) };
        self.dirty.store(true, Ordering::Relaxed);
        Err(Error::Unavailable(format!("the key is deleted, but not all its blobs: {error}")))
    }

    fn unlink(&self, key: &[u8]) -> Result<Reply> {
        let _lock = self.index.lock(key).ok_or(Error::Locked)?;
        let record = self.index.get(key)?.filter(Record::live).ok_or(NOT_FOUND)?;
        self.index.change().put(key, &Record { state: State::Unlinked, ..record }).commit()?;
        Ok(Reply::empty(204))
    }

    fn relink(&self, key: &[u8], auth: Option<&str>) -> Result<Reply> {
        let _lock = self.index.lock(key).ok_or(Error::Locked)?;
        let record = self.index.get(key)?.filter(|record| record.state == State::Unlinked);
        let record = record.ok_or(Error::NotFound("no unlinked key of this name"))?;
        self.find(key, &record, auth)?;
        self.index.change().put(key, &Record { state: State::Live, ..record }).commit()?;
        Ok(Reply::empty(204))
    }

    /// Deletes the blobs of an entry of debris from these volumes; whether they are all gone.
    fn clear(
        &self,
        key: &[u8],
        version: u64,
        replicas: &[String],
        auth: Option<&str>,
    ) -> Result<bool> {
        match self.clear_now(key, version, replicas, false, auth) {
            Ok(()) => Ok(true),
            Err(error @ Error::Index(_)) => Err(error),
            Err(error) => {
                log::warn!("debris of \"{}\" stays for now: {error}", key.escape_ascii());
                Ok(false)
            }
        }
    }

    /// As `clear`, with the error that kept a blob; `patient` asks volumes that were silent just now
    /// too. The caller holds the key's lock.
    pub fn clear_now(
        &self,
        key: &[u8],
        version: u64,
        replicas: &[String],
        patient: bool,
        auth: Option<&str>,
    ) -> Result<()> {
        let targets = self.unwanted(key, version, replicas)?;
        let (gone, failed) = self.delete_blobs(key, version, targets, patient, auth)?;
        self.forget(key, version, &gone)?;
        failed.map_or(Ok(()), Err)
    }

    /// Those of the replicas that the entry of debris names and the key's record does not: a blob
    /// that the record names is no debris, whatever the entry says.
    fn unwanted(&self, key: &[u8], version: u64, replicas: &[String]) -> Result<Vec<String>> {
        let entry = self.index.debris_entry(key, version)?.unwrap_or_default();
        let record = self.index.get(key)?;
        let kept = |r: &String| record.as_ref().is_some_and(|record| record.names(version, r));
        let unwanted = replicas.iter().filter(|r| entry.replicas.contains(r) && !kept(r));
        Ok(unwanted.cloned().collect())
    }

    /// Deletes blobs: the replicas where they are gone for good, and an error if one said no.
    fn delete_blobs(
        &self,
        key: &[u8],
        version: u64,
        replicas: Vec<String>,
        patient: bool,
        auth: Option<&str>,
    ) -> Result<(Vec<String>, Option<Error>)> {
        let until = self.index.debris_entry(key, version)?.map_or(0, |entry| entry.until);
        let outcomes = self.volumes.delete_all(&replicas, &path(key, version), patient, auth);
        let (mut gone, mut failed) = (Vec::new(), None);
        for (replica, outcome) in replicas.into_iter().zip(outcomes) {
            match outcome {
                // It is not there now; whether it appears later the cleaner will see.
                Ok(false) if now() < until => {}
                Ok(_) => gone.push(replica),
                Err(error) => {
                    if matches!(error, Error::Unreachable { maybe_done: true, .. }) {
                        lock(&self.unanswered).insert(key.to_vec(), Instant::now());
                    }
                    failed = Some(error);
                }
            }
        }
        Ok((gone, failed))
    }

    /// Takes replicas from an entry of debris, and those that the key's record names; the last one
    /// takes the entry with it. The caller holds the key's lock.
    pub fn forget(&self, key: &[u8], version: u64, gone: &[String]) -> Result<()> {
        let Some(mut entry) = self.index.debris_entry(key, version)? else { return Ok(()) };
        let record = self.index.get(key)?;
        let kept = |r: &String| record.as_ref().is_some_and(|record| record.names(version, r));
        let before = entry.replicas.len();
        entry.replicas.retain(|replica| !gone.contains(replica) && !kept(replica));
        if entry.replicas.len() == before {
            return Ok(());
        }
        self.index.change().set_debris(key, version, &entry).commit()
    }

    /// Clears an entry of debris that no writer holds. The lock is not held while the volumes are
    /// asked, so that a hung one keeps no client waiting: no writer uses a version that is debris.
    /// Only the record's own version can be written again, by a rebalance.
    fn clean_entry(&self, key: &[u8], version: u64, entry: &Debris) -> Result<()> {
        let auth = self.own_auth();
        let Some(held) = self.index.lock_to_clean(key) else { return Ok(()) };
        if let Some(record) = self.index.get(key)?.filter(|record| record.version == version) {
            // What a rebalance replaced goes only when what took its place is seen to be there: a
            // power cut on a volume may have cost the copies.
            let silent = record.replicas.iter().any(|replica| self.volumes.is_down(replica));
            let whole = || self.whole(key, &record, record.replicas.iter(), auth);
            let are_there = || whole().is_ok_and(|there| there.len() == record.replicas.len());
            if entry.wait > 0 && (silent || !are_there()) {
                log::info!("surplus of \"{}\" stays: a replica is missing", key.escape_ascii());
                return Ok(());
            }
            return self.clear(key, version, &entry.replicas, auth).map(drop);
        }
        let targets = self.unwanted(key, version, &entry.replicas)?;
        // A DELETE may take the entry away in between, but not for the plain name to be used again.
        if version == 0 {
            lock(&self.cleaning).insert(key.to_vec());
        }
        drop(held);
        let cleaned = self.clean_unlocked(key, version, targets);
        if version == 0 {
            lock(&self.cleaning).remove(key);
        }
        cleaned
    }

    fn clean_unlocked(&self, key: &[u8], version: u64, targets: Vec<String>) -> Result<()> {
        let (gone, failed) = self.delete_blobs(key, version, targets, false, self.own_auth())?;
        if let Some(error) = failed {
            log::info!("debris of \"{}\" stays for now: {error}", key.escape_ascii());
        }
        // Where a writer has come in between, the next round sees that the blobs are gone.
        let Some(_lock) = self.index.lock_to_clean(key) else { return Ok(()) };
        self.forget(key, version, &gone)
    }

    /// Whether a deletion of a blob of this key may yet be done.
    pub fn may_be_deleted(&self, key: &[u8]) -> bool {
        lock(&self.unanswered).get(key).is_some_and(|at| at.elapsed() < UNANSWERED)
    }

    /// Says so where the index is empty and the volumes are not: with a mistyped `-db` a PUT takes the
    /// place of another store's blob. (What does not answer now is no matter.)
    pub fn look_for_blobs(&self) {
        let is_empty = || self.index.is_empty() == Ok(true);
        if !is_empty() {
            return;
        }
        for name in &self.options.volumes {
            let found = has_blobs(&self.volumes, name, self.own_auth.as_deref());
            // It is asked again: they may be the first of our own.
            if found == Ok(true) && is_empty() {
                log::warn!(
                    "the index is empty, but volume {name} has folders of blobs: if a store lies \
                     there, stop, and check -db or run mkv rebuild"
                );
            }
        }
    }

    /// The cleaner's thread: clears debris that no writer holds, now and for ever.
    pub fn clean(self: &Arc<Store>) {
        let may = self.gate.is_none() || self.own_auth.is_some();
        loop {
            let begun = Instant::now();
            // A panic, which the log has, ends this round and not the cleaner.
            let round = AssertUnwindSafe(|| if may { self.clean_once() } else { Ok(()) });
            if let Ok(Err(error)) = catch_unwind(round) {
                log::error!("cleaner: {error}");
            }
            lock(&self.unanswered).retain(|_, at| at.elapsed() < UNANSWERED);
            let _ = self.woken.recv_timeout(CLEAN_EVERY);
            // Deletes that come one by one are taken together.
            std::thread::sleep(Duration::from_millis(20).min(begun.elapsed()));
        }
    }

    /// One round over all debris.
    pub fn clean_once(self: &Arc<Store>) -> Result<()> {
        let view = self.index.view();
        let mut batch = Vec::new();
        let time = now();
        let flush = |batch: &mut Vec<(Vec<u8>, u64, Debris)>| -> Result<()> {
            // What was written so far is on disk before a blob is deleted because of it: a power cut
            // cannot undo the flip that made the blob debris.
            if !batch.is_empty() {
                self.index.sync()?;
            }
            let store = self.clone();
            let clear = move |(key, version, entry): (Vec<u8>, u64, Debris)| {
                // One key that cannot be cleared does not keep the others from it.
                if let Err(error) = store.clean_entry(&key, version, &entry) {
                    log::error!("cleaner: \"{}\": {error}", key.escape_ascii());
                }
            };
            self.volumes.pool.each(std::mem::take(batch), clear);
            Ok(())
        };
        view.debris(b"", |key, version, entry| {
            if entry.wait <= time {
                batch.push((key.to_vec(), version, entry));
            }
            if batch.len() >= CLEAN_WIDTH { flush(&mut batch) } else { Ok(()) }
        })?;
        flush(&mut batch)
    }

    /// What is shown to volumes on behalf of a client.
    fn auth_of<'a>(&'a self, client: Option<&'a Credentials>) -> Option<&'a str> {
        client.map(|client| client.header.as_str()).or(self.own_auth())
    }

    /// The credentials that the master itself shows to volumes.
    pub fn own_auth(&self) -> Option<&str> {
        self.own_auth.as_deref()
    }
}

fn reply(status: u16, kind: &str, body: ReplyBody) -> Reply {
    Reply { headers: vec![("Content-Type", kind.into())], body, ..Reply::empty(status) }
}

pub const NOT_FOUND: Error = Error::NotFound("no such key");
const PROTECTED: &str = "this server protects keys: UNLINK it first";

/// The blobs of a record that another one takes the place of.
fn surplus(record: &Record) -> Debris {
    Debris { replicas: record.replicas.clone(), ..Debris::default() }
}
