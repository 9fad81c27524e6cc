//! S3 and native requests at once, compared with a model in memory.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use crate::model::{StoredValue, expected};
use crate::support::cluster::{Cluster, Setup, assert_same_bytes};
use crate::support::http_client::{follow, target};
use crate::support::random::{random_bytes, seeded_rng};
use crate::support::reference;
use crate::support::s3::{AwsChunked, Client, store};

/// What a client knows of one of its keys.
#[derive(Clone)]
struct Object {
    stored: StoredValue,
    etag: String,
    /// Its Content-Type, if S3 wrote it.
    kind: String,
}

/// A client with keys of its own, which nobody else writes.
struct Worker<'a> {
    c: &'a Cluster,
    s3: Vec<Client>,
    random: fastrand::Rng,
    folder: String,
    keys: Vec<String>,
    model: BTreeMap<String, Object>,
}

fn plain_etag(value: &[u8]) -> String {
    format!("\"{}\"", reference::md5(value))
}

impl Worker<'_> {
    fn s3(&mut self) -> Client {
        self.s3[self.random.usize(..self.s3.len())].clone()
    }

    fn value(&mut self) -> Vec<u8> {
        let length = match self.random.u32(..20) {
            0 => 0,
            1 => self.random.usize(100_000..700_000),
            _ => self.random.usize(1..3000),
        };
        random_bytes(&mut self.random, length)
    }

    fn live(&self, key: &str) -> Option<&Object> {
        self.model.get(key).filter(|object| object.stored.live)
    }

    fn keep(&mut self, key: &str, value: Vec<u8>, etag: String, kind: &str) {
        let stored = StoredValue { value, live: true };
        self.model.insert(key.into(), Object { stored, etag, kind: kind.into() });
    }

    fn s3_put(&mut self, key: &str) {
        let (value, s3, kind) = (self.value(), self.s3(), format!("test/{}", self.random.u32(..9)));
        let mut request = s3.request("PUT", key).header("Content-Type", &kind).body(&value);
        let held = match self.random.u32(..4) {
            0 => {
                request = request.header("If-None-Match", "*");
                self.live(key).is_none()
            }
            1 => {
                let etag = self.live(key).map_or("\"none\"".into(), |object| object.etag.clone());
                request = request.header("If-Match", &etag);
                self.live(key).is_some()
            }
            _ => true,
        };
        if self.random.bool() {
            let (signed, transfer) = (self.random.bool(), self.random.bool());
            let sum = crate::support::s3::checksum("crc32", &value);
            let trailer = Some(("x-amz-checksum-crc32".to_string(), sum));
            request =
                request.aws_chunked(AwsChunked { signed, transfer, trailer, sizes: vec![65536], announced: None });
        }
        let answer = request.send();
        if held {
            assert_eq!(answer.expect(200).etag(), plain_etag(&value), "{key}");
            self.keep(key, value.clone(), plain_etag(&value), &kind);
        } else {
            assert!([404, 412].contains(&answer.status), "{key}: {} {}", answer.status, answer.text());
        }
    }

    fn multipart(&mut self, key: &str) {
        let (value, s3) = (self.value(), self.s3());
        let upload = s3.create_upload(key);
        let etag = s3.put_part(key, &upload, 1, &value);
        let other = self.s3();
        let done = other.complete(key, &upload, &[(1, etag)]).expect(200);
        let etag = crate::s3_multipart::parts_etag(&[&value]);
        assert_eq!(done.element("ETag"), etag);
        self.keep(key, value, etag, crate::s3_objects::DEFAULT_TYPE);
    }

    fn copy(&mut self, key: &str) {
        let from = self.keys[self.random.usize(..self.keys.len())].clone();
        let s3 = self.s3();
        let answer = s3.request("PUT", key).header("x-amz-copy-source", target(&from)).send();
        match self.live(&from).cloned() {
            _ if from == key => drop(answer.expect_code(400, "InvalidRequest")),
            None => drop(answer.expect_code(404, "NoSuchKey")),
            Some(source) => {
                // Whether a copy keeps the ETag of a multipart upload is the server's choice.
                let etag = answer.expect(200).element("ETag");
                assert!(etag == plain_etag(&source.stored.value) || etag == source.etag, "{etag}");
                self.keep(key, source.stored.value, etag, &source.kind);
            }
        }
    }

    fn s3_delete(&mut self, key: &str) {
        // DELETE of an unlinked key is left to the native API.
        if self.model.get(key).is_none_or(|object| object.stored.live) {
            self.s3().ask("DELETE", key).expect(204);
            self.model.remove(key);
        }
    }

    fn native(&mut self, key: &str) {
        let method = ["PUT", "REPLACE", "DELETE", "UNLINK", "RELINK", "REBALANCE"][self.random.usize(..6)];
        let mut value = self.value();
        value.push(0);
        let before = self.model.get(key).cloned();
        let (status, stored) = expected(before.as_ref().map(|object| &object.stored), method, &value);
        let body = if matches!(method, "PUT" | "REPLACE") { &value[..] } else { b"" };
        let answer = match body {
            b"" => self.c.ask(method, key),
            body => self.c.send(method, key, &[], body),
        };
        // A deleted key may still have debris. DELETE clears it and answers 204.
        if !(method == "DELETE" && answer.status == 204) {
            assert_eq!(answer.status, status, "{method} {key}: {}", answer.text());
        }
        match stored {
            None => drop(self.model.remove(key)),
            Some(stored) if status == 201 => {
                let etag = plain_etag(&stored.value);
                self.keep(key, stored.value, etag, crate::s3_objects::DEFAULT_TYPE);
            }
            Some(stored) => _ = self.model.insert(key.into(), Object { stored, ..before.expect("it was there") }),
        }
    }

    fn read(&mut self, key: &str) {
        let s3 = self.s3();
        let (answer, native) = (s3.get(key), self.c.get(key));
        let Some(object) = self.live(key) else {
            answer.expect_code(404, "NoSuchKey");
            native.expect(404);
            return;
        };
        let answer = answer.expect(200);
        assert_same_bytes(&answer.body, &object.stored.value, key);
        assert_eq!((answer.etag(), answer.header("Content-Type")), (object.etag.clone(), Some(object.kind.as_str())));
        assert_same_bytes(&follow(&native.expect(302)).expect(200).body, &object.stored.value, key);
        let head = s3.ask("HEAD", key).expect(200);
        assert_eq!(head.header("Content-Length"), Some(object.stored.value.len().to_string().as_str()));
        if object.stored.value.len() > 2 {
            let range = s3.request("GET", key).header("Range", "bytes=1-2").send().expect(206);
            assert_same_bytes(&range.body, &object.stored.value[1..3], key);
        }
    }

    fn list(&mut self) {
        let prefix = &self.folder["/bucket/".len()..];
        let page = self.s3[0].query("GET", "/bucket", &format!("list-type=2&prefix={prefix}"), "").expect(200);
        let keys = page.elements("Key").into_iter().map(|key| format!("/bucket/{key}"));
        let found: Vec<_> = keys.zip(page.elements("ETag")).zip(page.elements("Size")).collect();
        let live = self.model.iter().filter(|(_, object)| object.stored.live);
        let expected: Vec<_> = live
            .map(|(key, object)| ((key.clone(), object.etag.clone()), object.stored.value.len().to_string()))
            .collect();
        assert_eq!(found, expected);
        let native = self.c.keys(&self.folder, "list");
        assert!(native.iter().eq(expected.iter().map(|((key, _), _)| key.as_bytes())));
    }

    fn run(&mut self, time: Duration) -> usize {
        let (started, mut steps) = (Instant::now(), 0);
        while started.elapsed() < time {
            let key = self.keys[self.random.usize(..self.keys.len())].clone();
            match self.random.u32(..100) {
                0..25 => self.s3_put(&key),
                25..32 => self.multipart(&key),
                32..40 => self.copy(&key),
                40..48 => self.s3_delete(&key),
                48..70 => self.native(&key),
                70..92 => self.read(&key),
                _ => self.list(),
            }
            steps += 1;
        }
        steps
    }
}

#[test]
fn s3_and_native_requests_at_once_match_the_model() {
    // A long -voltimeout, so that a busy machine does not make a volume look down.
    let (mut c, s3) = store(Setup::new().replicas(2).flags(&["-voltimeout", "20s"]));
    let mut random = seeded_rng();
    let mut clients = vec![s3.clone()];
    if c.postgres.is_some() {
        c.others = vec![c.start_another(&["-s3", "3901"])];
        clients.push(s3.at(&format!("{}:3901", c.host)));
    }
    let steps: usize = thread::scope(|scope| {
        let c = &c;
        let threads: Vec<_> = (0..4)
            .map(|n| {
                let folder = format!("/bucket/{n}/");
                let keys = (0..8).map(|key| format!("{folder}é {key}")).collect();
                let (s3, model) = (clients.clone(), BTreeMap::new());
                let mut worker = Worker { c, s3, random: random.fork(), folder, keys, model };
                scope.spawn(move || worker.run(Duration::from_secs(6)))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("the model holds")).sum()
    });
    println!("{steps} steps");
    assert!(steps > 200);
    c.wait_until_cleaned();
    c.stop_master();
    c.others.clear();
    c.assert_verified();
}
