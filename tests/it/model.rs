//! The whole API compared with an in-memory model: the same requests, answers and lists.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::keys::unusual_keys;
use crate::support::cluster::{Cluster, Setup, assert_same_bytes};
use crate::support::http_client::{Answer, LAST_CHUNK, chunks, follow, target};
use crate::support::random::{random_bytes, seeded_rng};
use crate::support::reference;

/// The stored state of a key.
#[derive(Clone, PartialEq)]
pub struct StoredValue {
    pub value: Vec<u8>,
    /// `false` if the key is unlinked.
    pub live: bool,
}

/// The status that a healthy store answers with, and the key's state afterwards.
pub fn expected(stored: Option<&StoredValue>, method: &str, value: &[u8]) -> (u16, Option<StoredValue>) {
    let with_state = |live: bool| stored.map(|stored| StoredValue { live, ..stored.clone() });
    match (method, stored.map(|stored| stored.live)) {
        ("PUT", Some(true)) => (403, stored.cloned()),
        ("PUT" | "REPLACE", _) => (201, Some(StoredValue { value: value.to_vec(), live: true })),
        ("DELETE", Some(_)) => (204, None),
        ("UNLINK", Some(true)) => (204, with_state(false)),
        ("RELINK", Some(false)) => (204, with_state(true)),
        ("REBALANCE", Some(_)) => (204, stored.cloned()),
        _ => (404, stored.cloned()),
    }
}

/// A store and its model.
struct StoreAndModel {
    c: Cluster,
    random: fastrand::Rng,
    keys: Vec<Vec<u8>>,
    model: BTreeMap<Vec<u8>, StoredValue>,
    /// The replicas of each key, as placed by its last write or rebalance.
    replicas: BTreeMap<Vec<u8>, Vec<String>>,
    /// Keys that may have debris.
    maybe_debris: BTreeSet<Vec<u8>>,
}

impl StoreAndModel {
    fn any_key(&mut self) -> Vec<u8> {
        self.keys[self.random.usize(..self.keys.len())].clone()
    }

    fn upload(&mut self, key: &[u8]) {
        let method = if self.random.bool() { "PUT" } else { "REPLACE" };
        let length = match self.random.u32(..40) {
            0 => 0,
            1 => self.random.usize(100_000..1_500_000),
            _ => self.random.usize(1..4000),
        };
        let value = random_bytes(&mut self.random, length);
        let digest = match self.random.u32(..8) {
            0 if length > 0 => Some(reference::md5_base64(b"another value")),
            1 | 2 => Some(reference::md5_base64(&value)),
            _ => None,
        };
        let chunked = self.random.bool();
        let (status, stored) = match expected(self.model.get(key), method, &value) {
            (403, _) if length == 0 && !chunked => (411, None),
            (201, _) if length == 0 => (411, None),
            (201, _) if digest.as_ref().is_some_and(|d| *d != reference::md5_base64(&value)) => (400, None),
            answer => answer,
        };
        let headers: Vec<_> = digest.iter().map(|digest| ("Content-MD5", digest.as_str())).collect();
        let answer = match chunked {
            true => self.send_chunked(method, key, headers, &value),
            false => self.c.send(method, key, &headers, &value),
        };
        assert_eq!(
            answer.status,
            status,
            "{method} of {length} bytes, chunked: {chunked}, {digest:?}: {}",
            answer.text()
        );
        if status == 201 {
            self.replicas.insert(key.to_vec(), self.c.placement(key));
            if self.model.insert(key.to_vec(), stored.expect("an upload with 201 has a value")).is_some() {
                self.maybe_debris.insert(key.to_vec());
            }
        } else if status != 403 {
            self.maybe_debris.insert(key.to_vec());
        }
    }

    fn send_chunked(&mut self, method: &str, key: &[u8], mut headers: Vec<(&str, &str)>, value: &[u8]) -> Answer {
        headers.push(("Transfer-Encoding", "chunked"));
        let lengths = [1, self.random.usize(1..5000), 70_000];
        let mut conn = self.c.conn();
        conn.head(method, &target(key), &headers);
        // The server may refuse the body and close before it has read all of it.
        let _ = conn.try_send(&[&chunks(value, &lengths), LAST_CHUNK].concat());
        conn.answer()
    }

    fn alter(&mut self, key: &[u8]) {
        let method = ["DELETE", "UNLINK", "RELINK", "REBALANCE"][self.random.usize(..4)];
        let (status, stored) = expected(self.model.get(key), method, b"");
        let answer = self.c.ask(method, key);
        // A deleted key may still have debris. DELETE clears it and answers 204.
        if !(method == "DELETE" && answer.status == 204 && self.maybe_debris.contains(key)) {
            assert_eq!(answer.status, status, "{method}: {}", answer.text());
        }
        if method == "REBALANCE" && status == 204 {
            let placed = self.c.placement(key);
            if self.replicas.insert(key.to_vec(), placed.clone()) != Some(placed) {
                self.maybe_debris.insert(key.to_vec());
            }
        }
        match stored {
            Some(stored) => drop(self.model.insert(key.to_vec(), stored)),
            None => drop(self.model.remove(key)),
        }
    }

    fn read(&mut self, key: &[u8]) {
        let method = if self.random.bool() { "GET" } else { "HEAD" };
        let answer = self.c.ask(method, key);
        let Some(stored) = self.model.get(key).filter(|stored| stored.live) else {
            drop(answer.expect(404));
            return;
        };
        let answer = answer.expect(302);
        assert!(answer.body.is_empty());
        assert_eq!(answer.header("Content-Md5"), Some(&*reference::md5(&stored.value)));
        assert_same_bytes(&follow(&answer).expect(200).body, &stored.value, "the value that a client reads");
        assert_eq!(self.c.key_info(key).replicas, self.replicas[key]);
    }

    fn list(&mut self, key: &[u8]) {
        let kind = ["list", "unlinked", "writing"][self.random.usize(..3)];
        let prefix = &key[..self.random.usize(1..=key.len().min(5))];
        let start = if self.random.bool() { self.any_key() } else { Vec::new() };
        let limit = self.random.usize(..8);
        let url = kind == "writing" || self.random.bool();
        let mut options = Vec::new();
        if limit > 0 {
            options.push(format!("limit={limit}"));
        }
        if !start.is_empty() {
            options.push(format!("start={}", target(&start)));
        }
        if url {
            options.push("encoding=url".into());
        }
        self.random.shuffle(&mut options);
        options.insert(0, kind.into());
        let query = format!("{}?{}", target(prefix), options.join("&"));
        let answer = self.c.ask_target("GET", &query);
        let inside = |key: &[u8]| key.starts_with(prefix) && *key >= *start;
        if kind == "writing" {
            let page: Value = serde_json::from_slice(&answer.expect(200).body).expect("JSON");
            return self.check_debris_page(&page, limit, inside);
        }
        let mut keys = self.keys_in_state(kind == "list").filter(|key| inside(key));
        let text = |key: &Vec<u8>| match url {
            true => target(key),
            false => String::from_utf8_lossy(key).into_owned(),
        };
        let max_keys = if limit == 0 { usize::MAX } else { limit };
        let page: Vec<String> = keys.by_ref().take(max_keys).map(text).collect();
        let next = keys.next();
        if !url && next.is_some_and(|next| str::from_utf8(next).is_err()) {
            drop(answer.expect_error(400, "encoding=url"));
            return;
        }
        let wanted = json!({ "next": next.map_or_else(String::new, text), "keys": page });
        let actual: Value = serde_json::from_slice(&answer.expect(200).body).expect("JSON");
        assert_eq!(actual, wanted, "{query}");
    }

    /// Checks a page of `?writing`: only keys that were written may have debris.
    fn check_debris_page(&self, page: &Value, limit: usize, inside: impl Fn(&[u8]) -> bool) {
        let maybe_debris: Vec<String> = self.maybe_debris.iter().filter(|key| inside(key)).map(target).collect();
        let keys: Vec<&str> =
            page["keys"].as_array().expect("a list of keys").iter().filter_map(Value::as_str).collect();
        let next = page["next"].as_str().expect("next is a string");
        assert!(limit == 0 || keys.len() <= limit, "{limit}: {page}");
        assert!(next.is_empty() || limit > 0 && keys.len() == limit, "{limit}: {page}");
        // The page is in key order, each key once.
        let mut rest = maybe_debris.iter();
        for key in keys.into_iter().chain(Some(next).filter(|next| !next.is_empty())) {
            assert!(rest.any(|maybe_debris| maybe_debris == key), "{key} of {page}, written: {maybe_debris:?}");
        }
    }

    fn keys_in_state(&self, live: bool) -> impl Iterator<Item = &Vec<u8>> {
        self.model.iter().filter(move |(_, stored)| stored.live == live).map(|(key, _)| key)
    }

    /// Restarts a volume or the master while no request is running.
    fn restart_volume_or_master(&mut self) {
        self.c.wait_until_cleaned();
        self.maybe_debris.clear();
        let volume = self.random.usize(..3);
        match self.random.u32(..4) {
            0 => self.c.volumes[volume].stop(),
            1 => self.c.volumes[volume].kill(),
            2 => {
                let others = std::mem::take(&mut self.c.others).len();
                self.c.stop_master();
                // Placement changes with these flags.
                let (replicas, subvolumes) = (self.random.usize(1..=3), self.random.u32(1..4));
                self.c.setup = self.c.setup.clone().replicas(replicas).subvolumes(subvolumes);
                self.c.start_master();
                self.c.others = (0..others).map(|_| self.c.start_another(&[])).collect();
            }
            _ => {
                self.c.kill_master();
                self.c.start_master();
            }
        }
        self.c.start_volumes();
        self.assert_lists();
        assert!(self.c.keys_with_debris().is_empty());
    }

    fn assert_lists(&self) {
        assert!(self.c.live().iter().eq(self.keys_in_state(true)));
        assert!(self.c.unlinked().iter().eq(self.keys_in_state(false)));
    }
}

#[test]
fn random_requests_match_the_model() {
    let mut random = seeded_rng();
    let mut keys = unusual_keys();
    for length in 0..60 {
        let tail = random_bytes(&mut random, if length < 50 { length / 4 } else { 1023 });
        keys.push([b"/".to_vec(), tail].concat());
    }
    keys.sort();
    keys.dedup();
    let mut pair = StoreAndModel {
        // A long -voltimeout, so that a busy machine does not make a volume look down.
        c: Setup::new().replicas(2).flags(&["-settle", "0s", "-voltimeout", "20s"]).start(),
        random,
        keys,
        model: BTreeMap::new(),
        replicas: BTreeMap::new(),
        maybe_debris: BTreeSet::new(),
    };
    if pair.c.postgres.is_some() {
        // Each request goes to one of two masters.
        pair.c.others = vec![pair.c.start_another(&[])];
    }
    let (started, mut steps, mut restarts) = (Instant::now(), 0, 0);
    while started.elapsed() < Duration::from_secs(20) {
        let key = pair.any_key();
        match pair.random.u32(..400) {
            0 => {
                pair.restart_volume_or_master();
                restarts += 1;
            }
            1..140 => pair.upload(&key),
            140..220 => pair.alter(&key),
            220..320 => pair.read(&key),
            _ => pair.list(&key),
        }
        steps += 1;
    }
    println!("{steps} steps, {restarts} restarts, {} keys", pair.model.len());
    pair.assert_lists();
    pair.c.wait_until_cleaned();
    for key in pair.keys_in_state(true) {
        pair.c.assert_value(key, &pair.model[key].value);
    }
    pair.c.stop_master();
    pair.c.assert_verified();
}
