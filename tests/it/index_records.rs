//! The records on disk: what the master writes, and what older masters have written.

use std::fs;
use std::os::unix::fs::MetadataExt;

use rocksdb::{DB, IteratorMode, Options, WriteBatch};

use crate::support::cluster::{Cluster, Setup};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{ask, follow};
use crate::support::reference::{self, md5};

/// Opens the index of a stopped master.
fn index(c: &Cluster) -> DB {
    DB::open_cf(&Options::default(), c.folder.join("db/index"), ["default", "debris", "uploads"])
        .expect("the index opens")
}

fn records(c: &Cluster) -> Vec<(String, String)> {
    index(c)
        .iterator(IteratorMode::Start)
        .map(|row| {
            let (key, record) = row.expect("a record can be read");
            (String::from_utf8_lossy(&key).into(), String::from_utf8_lossy(&record).into())
        })
        .collect()
}

fn debris(c: &Cluster) -> Vec<(Vec<u8>, String)> {
    let index = index(c);
    let family = index.cf_handle("debris").expect("the column family exists");
    index
        .iterator_cf(family, IteratorMode::Start)
        .map(|row| {
            let (name, entry) = row.expect("an entry can be read");
            (name.to_vec(), String::from_utf8_lossy(&entry).into())
        })
        .collect()
}

#[test]
fn a_record_holds_hash_size_time_version_and_volumes() {
    let mut c = Setup::new().replicas(2).start();
    c.put("/a", "value").expect(201);
    c.put("/b", "old").expect(201);
    c.replace("/b", "new value").expect(201);
    c.put("/c", "unlinked").expect(201);
    c.ask("UNLINK", "/c").expect(204);
    c.put("/d", "deleted").expect(201);
    c.ask("DELETE", "/d").expect(204);
    c.wait_until_cleaned();
    let (a, b) = (c.key_info("/a"), c.key_info("/b"));
    let mtime = |key| fs::metadata(&c.files(key)[0]).unwrap().mtime();
    let (time_a, time_b) = (mtime("/a"), mtime("/b"));
    let (on_a, on_b) = (c.placement("/a").join(","), c.placement("/b").join(","));
    c.stop_master();
    let rows = records(&c);
    let keys: Vec<&str> = rows.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["/a", "/b", "/c"]);
    let hash = md5(b"value");
    assert_eq!(rows[0].1, format!("HASH{hash}SIZE{:016x}TIME{time_a:016x}{on_a}", 5));
    let (hash, version) = (md5(b"new value"), b.version);
    let fields = format!("HASH{hash}SIZE{:016x}TIME{time_b:016x}VERS{version:016x}", 9);
    assert_eq!(rows[1].1, format!("{fields}{on_b}"));
    assert!(a.version == 0 && version > 0);
    let hash = md5(b"unlinked");
    assert!(rows[2].1.starts_with(&format!("DELETEDHASH{hash}SIZE{:016x}TIME", 8)), "{rows:?}");
    assert!(debris(&c).is_empty());
}

#[test]
fn without_md5sum_a_record_has_no_hash() {
    let mut c = Setup::new().volumes(1).flags(&["-md5sum=false"]).start();
    c.put("/a", "value").expect(201);
    c.stop_master();
    assert!(records(&c)[0].1.starts_with(&format!("SIZE{:016x}TIME", 5)));
}

#[test]
fn debris_is_stored_by_key_and_version_and_names_the_volumes() {
    let mut c = Setup::new().replicas(2).proxied().start();
    let key = "/k";
    c.proxies.iter().for_each(|proxy| proxy.set("PUT", Fault::HoldRequest));
    let mut writer = c.conn();
    writer.head("PUT", key, &[("Content-Length", "5")]).send("value");
    for replica in [0, 1] {
        c.proxies[c.holder(key, replica)].wait_held("PUT", 1);
    }
    c.kill_master();
    c.proxies.iter().for_each(|proxy| proxy.drop_held("PUT"));
    let name = [key.as_bytes(), &[0; 8]].concat();
    let rows = debris(&c);
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].0, name);
    assert!(rows[0].1.ends_with(&c.placement(key).join(",")), "{rows:?}");
    assert!(records(&c).is_empty());
}

/// Stores a blob directly on a volume.
fn store_blob(key: &str, replica: &str, value: &str) {
    let (host, below) = replica.split_at(replica.find('/').unwrap_or(replica.len()));
    let path = format!("{below}{}", reference::path(key.as_bytes(), 0));
    ask(host, "PUT", &path, &[], Some(value.as_bytes())).expect(201);
}

#[test]
fn the_master_reads_the_records_of_older_masters() {
    let mut c = Setup::new().volumes(2).subvolumes(1).start();
    c.stop_master();
    let both = c.names.join(",");
    let hash = md5(b"value");
    {
        let index = index(&c);
        for (key, record) in [
            ("/bare", both.clone()),
            ("/hashed", format!("HASH{hash}{both}")),
            ("/one", c.names[1].clone()),
            ("/unlinked", format!("DELETED{both}")),
            ("/unlinked/hashed", format!("DELETEDHASH{hash}{both}")),
            ("/init", format!("INIT{both}")),
        ] {
            index.put(key, record).unwrap();
            for name in c.names.iter().filter(|name| key != "/one" || **name == c.names[1]) {
                store_blob(key, name, "value");
            }
        }
    }
    c.start_master();
    assert_eq!(c.live(), [b"/bare".as_slice(), b"/hashed", b"/one"]);
    assert_eq!(c.unlinked(), [b"/unlinked".as_slice(), b"/unlinked/hashed"]);
    assert_eq!(c.assert_value("/bare", "value").md5, None);
    assert_eq!(c.assert_value("/hashed", "value").md5, Some(hash.clone()));
    assert!(!c.assert_value("/one", "value").balanced);
    // Without SIZE, any length is accepted.
    for file in c.files("/bare") {
        fs::write(file, "longer than it was").unwrap();
    }
    assert_eq!(follow(&c.get("/bare").expect(302)).text(), "longer than it was");
    for key in ["/unlinked", "/unlinked/hashed"] {
        c.get(key).expect(404);
        c.ask("RELINK", key).expect(204);
        c.assert_value(key, "value");
    }
    // An unfinished write of a Go master is not a value, and a new write replaces it.
    c.get("/init").expect(404);
    c.ask("UNLINK", "/init").expect(404);
    c.put("/init", "whole").expect(201);
    assert!(c.assert_value("/init", "whole").version > 0);
    c.replace("/bare", "new").expect(201);
    assert_eq!(c.assert_value("/bare", "new").md5, Some(md5(b"new")));
    c.ask("DELETE", "/hashed").expect(204);
    c.ask("DELETE", "/one").expect(204);
    c.wait_until_cleaned();
    assert_eq!(c.blobs().len(), 4 * 2);
}

#[test]
fn a_record_that_does_not_decode_is_an_error_that_names_its_key() {
    let mut c = Setup::new().volumes(2).start();
    c.put("/good", "value").expect(201);
    c.stop_master();
    let vectors: serde_json::Value = serde_json::from_str(include_str!("../vectors.json")).unwrap();
    let mut broken: Vec<Vec<u8>> = vectors["records_that_do_not_decode"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap().as_bytes().to_vec())
        .collect();
    broken.push(b"\xff\xfe".to_vec());
    {
        let index = index(&c);
        for (n, text) in broken.iter().enumerate() {
            index.put(format!("/broken/{n:02}\u{ff}"), text).unwrap();
        }
    }
    c.start_master();
    for n in 0..broken.len() {
        let (key, word) = (format!("/broken/{n:02}\u{ff}"), format!("/broken/{n:02}"));
        c.get(&key).expect_error(500, &word);
        c.ask("HEAD", &key).expect(500);
        for method in ["PUT", "REPLACE"] {
            c.send(method, &key, &[], "value").expect_error(500, &word);
        }
        for method in ["DELETE", "UNLINK", "RELINK"] {
            c.ask(method, &key).expect_error(500, &word);
        }
    }
    c.ask_target("GET", "/?list").expect_error(500, "/broken/00");
    c.ask_target("GET", "/?unlinked").expect_error(500, "/broken/00");
    // Nothing was stored for these keys, and the rest of the store works.
    assert_eq!(c.keys("/g", "list"), [b"/good"]);
    c.assert_value("/good", "value");
    c.put("/new", "value").expect(201);
    assert_eq!(c.blobs().len(), 4);
    c.stop_master();
    let index = index(&c);
    for (n, text) in broken.iter().enumerate() {
        let key = format!("/broken/{n:02}\u{ff}");
        assert_eq!(index.get(&key).unwrap().as_ref(), Some(text), "{key} was changed");
        index.delete(key).unwrap();
    }
}

#[test]
fn a_list_of_over_a_million_keys_needs_a_limit() {
    const MILLION: usize = 1_000_000;
    let mut c = Setup::new().volumes(1).start();
    c.stop_master();
    let record = format!("SIZE{:016x}TIME{:016x}{}", 1, 1, c.names[0]);
    {
        let index = index(&c);
        let mut batch = WriteBatch::default();
        for n in 0..MILLION {
            batch.put(format!("/{n:07}"), &record);
        }
        index.write(batch).unwrap();
        index.put("/unlinked", format!("DELETED{record}")).unwrap();
    }
    c.start_master();
    let answer = c.ask_target("GET", "/?list").expect(200);
    let page: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(page["keys"].as_array().unwrap().len(), MILLION);
    assert_eq!((&page["next"], &page["keys"][MILLION - 1]), (&"".into(), &"/0999999".into()));
    c.put("/one/more", "v").expect(201);
    c.ask_target("GET", "/?list").expect_error(413, "limit");
    let answer = c.ask_target("GET", "/?list&limit=1000001").expect(200);
    assert!(answer.text().ends_with(r#","/one/more"]}"#));
    let answer = c.ask_target("GET", "/?list&limit=2&start=/0999998").expect(200);
    assert_eq!(answer.text(), r#"{"next":"/one/more","keys":["/0999998","/0999999"]}"#);
    let answer = c.ask_target("GET", "/?unlinked").expect(200);
    assert_eq!(answer.text(), r#"{"next":"","keys":["/unlinked"]}"#);
    // The million keys have no blobs: start over with an empty index.
    c.ask("DELETE", "/one/more").expect(204);
    c.stop_master();
    fs::remove_dir_all(c.folder.join("db")).unwrap();
}
