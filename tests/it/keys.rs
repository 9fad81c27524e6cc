//! Keys: 1 to 1,089 arbitrary bytes.

use std::collections::{BTreeMap, HashMap};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::percent_decode_str;

use crate::support::cluster::{Cluster, Setup};
use crate::support::http_client::{follow, target, wait_until};
use crate::support::random::seeded_rng;
use crate::support::reference;

/// Keys that need careful handling.
pub fn unusual_keys() -> Vec<Vec<u8>> {
    let mut keys: Vec<Vec<u8>> = [
        "/",
        "//",
        "///",
        "////a//",
        "/.",
        "/..",
        "/../..",
        "/./a",
        "/a/../b",
        "/a/",
        "/a",
        "/a/b",
        "/a/b/",
        "/a/b/c",
        "/foo/été",
        "/日本語/キー",
        "/what?",
        "/ab?",
        "/a?list",
        "/a#b",
        "/a&b=c",
        "/with space",
        "/ ",
        "/a+b",
        "/a%b",
        "/%",
        "/%20",
        "/%2F",
        "/a\\b",
        "/a\"b",
        "/a'b;c",
        "/<>",
        "/\r\n",
        "/\t",
        "/a:b",
        "/http://x/y",
        "/~",
        "/~a",
        "/sv00",
        "/.nginx",
        "/a.0000000000000001",
        "/☃️",
        "/\u{202e}",
        "/nul\0",
        "/\0",
        "/a,b",
        "/HASH",
        "/DELETED",
    ]
    .iter()
    .map(|key| key.as_bytes().to_vec())
    .collect();
    for tail in [
        vec![0xff],
        vec![0xff; 9],
        vec![0xff; 100],
        vec![0xff; 1023],
        vec![0x80, 0xfe, 0xff, 0x00],
        vec![b'k'; 177],
        vec![b'k'; 178],
        vec![b'k'; 179],
        vec![b'k'; 1000],
        vec![b'k'; 1023],
        vec![b'?'; 500],
        vec![b'/'; 1023],
        (0..=255).collect(),
        (0..=255).rev().collect(),
    ] {
        keys.push([b"/".to_vec(), tail].concat());
    }
    keys.sort();
    keys.dedup();
    keys
}

#[test]
fn unusual_keys_work_with_every_method() {
    let c = Setup::new().replicas(2).start();
    let keys = unusual_keys();
    let value = |key: &[u8], round: &str| [round.as_bytes(), key].concat();
    for key in &keys {
        c.put(key, value(key, "first")).expect(201);
        c.put(key, "x").expect(403);
    }
    assert_eq!(c.live(), keys);
    for key in &keys {
        assert!(c.is_first(c.assert_value(key, value(key, "first")).version), "{}", key.escape_ascii());
        assert_eq!(c.ask("HEAD", key).expect(302).header("Key-Balance"), Some("balanced"));
        assert!(c.keys(&target(key), "list").contains(key));
    }
    assert_eq!(c.blobs().len(), keys.len() * 2);
    for key in &keys {
        c.replace(key, value(key, "second")).expect(201);
    }
    c.wait_until_cleaned();
    for key in &keys {
        assert!(c.assert_value(key, value(key, "second")).version > 0);
        c.ask("UNLINK", key).expect(204);
        c.get(key).expect(404);
    }
    assert_eq!(c.blobs().len(), keys.len() * 2);
    assert!(c.live().is_empty());
    assert_eq!(c.unlinked(), keys);
    for key in &keys {
        c.ask("RELINK", key).expect(204);
        assert_eq!(follow(&c.get(key).expect(302)).body, value(key, "second"));
    }
    for key in &keys {
        c.ask("DELETE", key).expect(204);
        c.get(key).expect(404);
    }
    assert!(c.live().is_empty() && c.unlinked().is_empty() && c.blobs().is_empty());
}

#[test]
fn every_encoding_of_a_target_names_the_same_key() {
    let c = Setup::new().volumes(1).start();
    c.put("/a~b/c d", "value").expect(201);
    for target in ["/a~b/c%20d", "/%61%7e%62/c%20d", "/%61%7E%62%2Fc%20%64", "/a~b%2fc%20d"] {
        c.ask_target("GET", target).expect(302);
    }
    for other in ["/a~b/c+d", "/a~b//c%20d", "/a~b/./c%20d", "/A~b/c%20d", "/a~b/c%2520d"] {
        c.ask_target("GET", other).expect(404);
    }
}

/// Two keys, where the path of the second's blob lies below that of the first's.
fn keys_with_nested_blobs() -> (Vec<u8>, Vec<u8>) {
    let mut outer: HashMap<(String, String), Vec<u8>> = HashMap::new();
    // The first key's base64 must have no padding and no `/`.
    for n in 0..400u32 {
        let key = format!("/{n:05}").into_bytes();
        let text = STANDARD.encode(&key);
        if !text.contains(['/', '=']) {
            outer.insert((text, reference::md5(&key)[..4].to_string()), key);
        }
    }
    for outer_key in outer.values() {
        let text = STANDARD.encode(outer_key);
        for n in 0..100_000u32 {
            // The base64 of 0xfc begins with `/`.
            let inner = [outer_key.as_slice(), &[0xfc], format!("{n:05}").as_bytes()].concat();
            let plain = reference::path(&inner, 0);
            if plain.starts_with(&format!("{}/", reference::path(outer_key, 0))) {
                assert!(STANDARD.encode(&inner).starts_with(&format!("{text}/")));
                return (outer_key.clone(), inner);
            }
        }
    }
    panic!("no such pair of keys");
}

#[test]
fn a_blob_path_below_another_blob_harms_neither_key() {
    let mut c = Setup::new().replicas(2).start();
    let (outer, inner) = keys_with_nested_blobs();
    println!("{} and {}", outer.escape_ascii(), inner.escape_ascii());
    // A name taken by a folder stays as debris for a while, so that the next write gets another
    // version.
    c.allow_debris(&outer);
    for (first, second) in [(&outer, &inner), (&inner, &outer)] {
        c.put(first, "first").expect(201);
        // A path cannot be both a file and a folder. The second write may fail, but the first value
        // is safe.
        let answer = c.put(second, "second");
        c.assert_value(first, "first");
        if answer.status == 201 {
            c.assert_value(second, "second");
        } else {
            answer.expect_error(500, &c.host);
            c.get(second).expect(404);
            c.wait_until_cleaned();
            c.ask("DELETE", first).expect(204);
            c.put(second, "second").expect(201);
            c.put(first, "first");
        }
        c.assert_value(second, "second");
        for key in [first, second] {
            c.ask("DELETE", key);
        }
        assert!(c.live().is_empty());
        wait_until("all blobs are gone", || c.blobs().is_empty());
    }
}

/// A key's state in the model.
#[derive(Clone)]
struct ModelEntry {
    value: Vec<u8>,
    live: bool,
}

#[test]
fn random_requests_on_random_keys_match_a_map() {
    let mut random = seeded_rng();
    let mut c = Setup::new().replicas(2).start();
    let keys: Vec<Vec<u8>> = (0..50)
        .map(|n| {
            let length = random.usize(0..if n % 5 == 0 { 1089 } else { 12 });
            let few_bytes = random.bool();
            let byte = |r: &mut fastrand::Rng| {
                if few_bytes { b"\xff\xfe/?\0%+a"[r.usize(..8)] } else { r.u8(..) }
            };
            let tail: Vec<u8> = (0..length).map(|_| byte(&mut random)).collect();
            [b"/".to_vec(), tail].concat()
        })
        .collect();
    let mut model: BTreeMap<Vec<u8>, ModelEntry> = BTreeMap::new();
    for step in 0..800 {
        let key = &keys[random.usize(..keys.len())];
        let entry = model.get(key).cloned();
        let live = entry.as_ref().is_some_and(|entry| entry.live);
        let unlinked = entry.as_ref().is_some_and(|entry| !entry.live);
        let value = format!("{step} of {}", key.escape_ascii()).into_bytes();
        let write = |method: &str| c.send(method, key, &[], &value).status;
        let alter = |method: &str| c.ask(method, key).status;
        match random.usize(..8) {
            0 | 1 => {
                assert_eq!(write("PUT"), if live { 403 } else { 201 });
                if !live {
                    model.insert(key.clone(), ModelEntry { value, live: true });
                }
            }
            2 => {
                assert_eq!(write("REPLACE"), 201);
                model.insert(key.clone(), ModelEntry { value, live: true });
            }
            3 => {
                if entry.is_none() {
                    // DELETE answers 204 while the key has debris.
                    c.wait_until_cleaned();
                }
                assert_eq!(alter("DELETE"), if entry.is_some() { 204 } else { 404 });
                model.remove(key);
            }
            4 => {
                assert_eq!(alter("UNLINK"), if live { 204 } else { 404 });
                model.entry(key.clone()).and_modify(|entry| entry.live = false);
            }
            5 => {
                assert_eq!(alter("RELINK"), if unlinked { 204 } else { 404 });
                model.entry(key.clone()).and_modify(|entry| entry.live = true);
            }
            6 => match entry.filter(|entry| entry.live) {
                Some(entry) => assert_eq!(follow(&c.get(key).expect(302)).body, entry.value),
                None => drop(c.get(key).expect(404)),
            },
            _ => {
                let start = &keys[random.usize(..keys.len())];
                let prefix = &key[..random.usize(1..=key.len().min(4))];
                let limit = random.usize(1..8);
                compare_list(&c, &model, prefix, start, limit);
            }
        }
        if step % 400 == 200 {
            c.kill_master();
            c.start_master();
        }
    }
    let keys_in_state = |live: bool| -> Vec<Vec<u8>> {
        model.iter().filter(|(_, k)| k.live == live).map(|(key, _)| key.clone()).collect()
    };
    assert_eq!(c.live(), keys_in_state(true));
    assert_eq!(c.unlinked(), keys_in_state(false));
    for key in keys_in_state(true) {
        c.assert_value(&key, &model[&key].value);
    }
}

fn compare_list(c: &Cluster, model: &BTreeMap<Vec<u8>, ModelEntry>, prefix: &[u8], start: &[u8], limit: usize) {
    let query =
        format!("{}?list&encoding=url&limit={limit}&start={}", target(prefix), target(start).replace('+', "%2B"));
    let answer = c.ask_target("GET", &query).expect(200);
    let page: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    let decoded = |key: &serde_json::Value| percent_decode_str(key.as_str().unwrap()).collect::<Vec<u8>>();
    let mut wanted = model
        .iter()
        .filter(|(key, entry)| entry.live && key.starts_with(prefix) && key.as_slice() >= start)
        .map(|(key, _)| key.clone());
    let keys: Vec<Vec<u8>> = page["keys"].as_array().unwrap().iter().map(decoded).collect();
    assert_eq!(keys, wanted.by_ref().take(limit).collect::<Vec<_>>(), "{query}");
    assert_eq!(decoded(&page["next"]), wanted.next().unwrap_or_default(), "{query}");
}
