//! The API: every status and every header.

use std::fs;
use std::time::{Duration, Instant};

use crate::support::cluster::{Cluster, Setup};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Conn, follow, head, target};
use crate::support::reference::{md5, md5_base64};

#[test]
fn put_get_head_and_delete_work() {
    let c = Cluster::new();
    c.get("/wehave").expect_missing();
    c.ask("DELETE", "/wehave").expect_error(404, "no such key");
    let answer = c.put("/wehave", "a value").expect(201);
    assert_eq!(answer.header("Content-Length"), Some("0"));
    let get = c.get("/wehave").expect(302);
    assert_eq!(get.header("Content-Md5"), Some(md5(b"a value").as_str()));
    assert_eq!(get.header("Key-Volumes"), Some(c.placement("/wehave").join(",").as_str()));
    assert_eq!(get.header("Key-Balance"), Some("balanced"));
    assert_eq!(get.header("Content-Length"), Some("0"));
    assert_eq!(follow(&get).text(), "a value");
    let head = c.ask("HEAD", "/wehave").expect(302);
    for name in ["Content-Md5", "Key-Volumes", "Key-Balance", "Content-Length"] {
        assert_eq!(head.header(name), get.header(name), "{name}");
    }
    assert_eq!(follow(&head).text(), "a value");
    assert!(c.is_first(c.assert_value("/wehave", "a value").version));
    assert_eq!(c.blobs().len(), 3);
    let answer = c.ask("DELETE", "/wehave").expect(204);
    assert_eq!((answer.body.len(), answer.header("Content-Length")), (0, None));
    assert!(c.blobs().is_empty());
    let answer = c.ask("HEAD", "/wehave").expect(404);
    assert!(answer.body.is_empty());
    c.ask("DELETE", "/wehave").expect_error(404, "no such key");
    c.assert_absent("/wehave");
}

#[test]
fn get_redirects_to_every_replica() {
    let c = Cluster::new();
    c.put("/k", "v").expect(201);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..200 {
        seen.insert(c.get("/k").header("Location").unwrap().to_string());
    }
    let all: Vec<String> =
        c.key_info("/k").replicas.iter().map(|r| format!("http://{r}{}", c.key_info("/k").path)).collect();
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), {
        let mut all = all;
        all.sort();
        all
    });
}

#[test]
fn a_key_becomes_unbalanced_when_placement_changes() {
    let mut c = Setup::new().volumes(4).replicas(2).start();
    let all_names = c.names.clone();
    c.names = all_names[..3].to_vec();
    c.restart_master();
    for n in 0..30 {
        c.put(format!("/{n}"), [n]).expect(201);
        assert!(c.key_info(format!("/{n}")).balanced);
    }
    // The order of -volumes does not matter.
    c.names.reverse();
    c.restart_master();
    assert!((0..30).all(|n| c.key_info(format!("/{n}")).balanced));
    c.names = all_names;
    c.restart_master();
    let balanced = (0..30).filter(|n| c.key_info(format!("/{n}")).balanced).count();
    assert!((1..30).contains(&balanced), "{balanced} of 30 are balanced");
    c.setup = c.setup.clone().replicas(3);
    c.restart_master();
    assert!((0..30).all(|n| !c.key_info(format!("/{n}")).balanced));
    for n in 0..30 {
        c.assert_value(format!("/{n}"), [n]);
    }
}

#[test]
fn a_key_without_a_replica_of_the_right_length_is_410() {
    let c = Cluster::new();
    c.put("/k", "value").expect(201);
    let files = c.files("/k");
    let assert_only_replica = |n: usize| {
        for _ in 0..20 {
            let answer = c.get("/k").expect(302);
            let location = answer.header("Location").unwrap();
            assert!(location.contains(&c.key_info("/k").replicas[n]), "{location} is not replica {n}");
            assert_eq!(follow(&answer).text(), "value");
        }
    };
    fs::remove_file(&files[0]).unwrap();
    fs::write(&files[1], "val").unwrap();
    assert_only_replica(2);
    fs::write(&files[2], "values").unwrap();
    c.get("/k").expect_error(410, "replica");
    c.ask("HEAD", "/k").expect(410);
    fs::write(&files[0], "value").unwrap();
    assert_only_replica(0);
    files.iter().for_each(|file| drop(fs::remove_file(file)));
    c.get("/k").expect_error(410, "replica");
    // A folder in place of a blob does not count.
    fs::create_dir(&files[1]).unwrap();
    c.get("/k").expect_error(410, "replica");
    fs::remove_dir(&files[1]).unwrap();
    c.put("/k", "other").expect_error(403, "exists");
    assert_eq!(c.live(), [b"/k"]);
    c.ask("UNLINK", "/k").expect(204);
    c.ask("RELINK", "/k").expect_error(410, "replica");
    fs::write(&files[1], "VALU").unwrap();
    c.ask("RELINK", "/k").expect_error(410, "replica");
    fs::write(&files[1], "value").unwrap();
    c.ask("RELINK", "/k").expect(204);
    assert_only_replica(1);
    c.ask("DELETE", "/k").expect(204);
    c.assert_absent("/k");
}

#[test]
fn a_read_fails_with_503_only_when_no_reachable_volume_has_the_blob() {
    let mut c = Cluster::new();
    c.put("/k", "value").expect(201);
    c.put("/unlinked", "value").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    let files = c.files("/k");
    let first = c.holder("/k", 0);
    c.volumes[first].stop();
    for _ in 0..20 {
        assert_eq!(follow(&c.get("/k").expect(302)).text(), "value");
    }
    // The stopped volume may still hold the value, so the answer is not 410.
    files[1..].iter().for_each(|file| fs::remove_file(file).unwrap());
    let name = c.names[first].clone();
    let answer = c.get("/k").expect_error(503, &name);
    assert!(answer.header("Retry-After").unwrap().parse::<u32>().unwrap() > 0);
    c.ask("HEAD", "/k").expect(503);
    files[1..].iter().for_each(|file| fs::write(file, "value").unwrap());
    c.volumes.iter_mut().for_each(|volume| volume.stop());
    let answer = c.get("/k").expect_error(503, "volume");
    assert!(answer.header("Retry-After").is_some());
    c.ask("RELINK", "/unlinked").expect_error(503, "volume");
    let answer = c.put("/new", "value").expect_error(503, &c.host);
    assert!(answer.header("Retry-After").is_some());
    // Requests that need only the index still succeed.
    c.get("/other").expect(404);
    assert_eq!(c.live(), [b"/k"]);
    assert_eq!(c.unlinked(), [b"/unlinked"]);
    c.ask("UNLINK", "/k").expect(204);
    c.start_volumes();
    c.ask("RELINK", "/k").expect(204);
    c.ask("RELINK", "/unlinked").expect(204);
    c.assert_value("/k", "value");
    c.assert_absent("/new");
}

#[test]
fn the_cleaner_finishes_a_delete_when_the_volume_returns() {
    let mut c = Cluster::new();
    c.put("/k", "value").expect(201);
    let down = c.holder("/k", 1);
    c.volumes[down].stop();
    let name = c.names[down].clone();
    let answer = c.ask("DELETE", "/k").expect_error(503, &name);
    assert!(answer.header("Retry-After").is_some());
    c.get("/k").expect(404);
    assert!(c.live().is_empty());
    assert_eq!(c.keys_with_debris(), [b"/k"]);
    assert_eq!(c.blobs().len(), 1);
    c.volumes[down].start();
    c.assert_absent("/k");
    assert!(c.blobs().is_empty());
}

#[test]
fn voltimeout_limits_how_long_a_read_waits() {
    let mut c = Setup::new().flags(&["-voltimeout", "300ms"]).start();
    c.put("/k", "value").expect(201);
    c.volumes.iter().for_each(|volume| volume.freeze());
    for round in 0..2 {
        let started = Instant::now();
        c.get("/k").expect_error(503, "volume");
        let took = started.elapsed();
        assert!((Duration::from_millis(290)..Duration::from_secs(4)).contains(&took), "{took:?}");
        if round == 0 {
            c.restart_with(&["-voltimeout=500ms"]);
        }
    }
    c.volumes.iter().for_each(|volume| volume.thaw());
    c.assert_value("/k", "value");
}

#[test]
fn a_read_waits_for_a_slow_volume_until_voltimeout_and_then_asks_another() {
    let c = Setup::new().proxied().flags(&["-voltimeout", "1500ms"]).start();
    c.put("/k", "value").expect(201);
    c.proxies.iter().for_each(|proxy| proxy.set("HEAD", Fault::Delay(Duration::from_millis(200))));
    let started = Instant::now();
    c.get("/k").expect(302);
    assert!(started.elapsed() >= Duration::from_millis(200));
    let slow = c.holder("/k", 0);
    c.proxies.iter().for_each(|proxy| proxy.release("HEAD"));
    c.proxies[slow].set("HEAD", Fault::HoldRequest);
    for _ in 0..10 {
        let answer = c.get("/k").expect(302);
        assert!(!answer.header("Location").unwrap().contains(&c.names[slow]));
    }
}

#[test]
fn put_requires_a_value_a_correct_digest_and_a_key_of_at_most_1024_bytes() {
    let c = Cluster::new();
    let no_body = c.ask("PUT", "/k");
    no_body.expect_error(411, "Content-Length");
    c.put("/k", "").expect_error(411, "one byte");
    c.replace("/k", "").expect_error(411, "one byte");
    let mut conn = c.conn();
    conn.head("PUT", "/k", &[("Transfer-Encoding", "chunked")]).send("0\r\n\r\n");
    conn.answer().expect_error(411, "one byte");
    let digest = |value: &str, digest: &str| c.send("PUT", "/k", &[("Content-MD5", digest)], value);
    digest("value", &md5_base64(b"other")).expect_error(400, "Content-MD5");
    digest("value", &md5(b"other")).expect_error(400, "Content-MD5");
    let large = "value".repeat(200_000);
    digest(&large, &md5_base64(b"other")).expect_error(400, "Content-MD5");
    for no_digest in ["AAAA", "value", "12345678", "", &md5(b"value")[1..]] {
        digest("value", no_digest).expect_error(400, "Content-MD5");
    }
    let long = format!("/{}", "k".repeat(1089));
    for method in ["PUT", "REPLACE", "GET", "DELETE", "UNLINK", "RELINK"] {
        let body = ["PUT", "REPLACE"].contains(&method).then_some(b"value".as_slice());
        crate::support::http_client::ask(&c.address(), method, &long, &[], body).expect_error(414, "1089");
    }
    assert!(c.live().is_empty());
    c.wait_until_cleaned();
    assert!(c.blobs().is_empty());
    // The limit counts the bytes of the key, not of its encoded target.
    let longest = format!("/{}", "%FF".repeat(1088));
    crate::support::http_client::ask(&c.address(), "PUT", &longest, &[], Some(b"value")).expect(201);
    digest("value", &md5_base64(b"value")).expect(201);
    c.send("REPLACE", "/k", &[("content-md5", &md5(b"hex"))], "hex").expect(201);
    c.send("REPLACE", "/k", &[("CONTENT-MD5", &md5(b"HEX").to_uppercase())], "HEX").expect(201);
    c.send("REPLACE", "/k", &[("Content-MD5", &md5_base64(large.as_bytes()))], &large).expect(201);
    c.assert_value("/k", large);
}

#[test]
fn a_write_locks_its_key() {
    let c = Setup::new().volumes(1).proxied().start();
    c.put("/live", "old").expect(201);
    c.put("/unlinked", "old").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    let proxy = &c.proxies[0];
    for key in ["/new", "/live", "/unlinked"] {
        proxy.set("PUT", Fault::HoldRequest);
        let mut writer = c.conn();
        writer.head("REPLACE", key, &[("Content-Length", "3")]).send("new");
        proxy.wait_held("PUT", 1);
        c.put(key, "x").expect_error(409, "writing");
        c.replace(key, "x").expect_error(409, "writing");
        for method in ["DELETE", "UNLINK", "RELINK"] {
            c.ask(method, key).expect_error(409, "writing");
        }
        // Readers and lists see the state before the write.
        match key {
            "/live" => drop(c.assert_value(key, "old")),
            _ => drop(c.get(key).expect_missing()),
        }
        assert!(c.keys_with_debris().contains(&key.into()));
        proxy.release("PUT");
        writer.answer().expect(201);
        c.assert_value(key, "new");
        c.wait_until_cleaned();
    }
}

#[test]
fn replace_writes_new_and_existing_keys() {
    let c = Cluster::new();
    c.replace("/k", "first").expect(201);
    assert!(c.is_first(c.assert_value("/k", "first").version));
    c.put("/k", "other").expect_error(403, "exists");
    let mut last = 0;
    for round in 0..5 {
        let value = format!("value {round}");
        c.replace("/k", &value).expect(201);
        let version = c.assert_value("/k", &value).version;
        assert!(version > last, "{version} after {last}");
        last = version;
    }
    c.wait_until_cleaned();
    assert_eq!(c.blobs().len(), 3);
    c.ask("UNLINK", "/k").expect(204);
    c.replace("/k", "again").expect(201);
    assert!(c.assert_value("/k", "again").version > last);
    assert!(c.unlinked().is_empty());
}

#[test]
fn a_single_client_never_finds_its_own_key_locked() {
    let c = Cluster::new();
    let mut conn = c.conn();
    for round in 0..100 {
        let value = format!("value {round}");
        conn.ask("REPLACE", "/k", &[], Some(value.as_bytes())).expect(201);
    }
    for round in 0..50 {
        conn.ask("UNLINK", "/k", &[], None).expect(204);
        conn.ask("PUT", "/k", &[], Some(&[round; 10])).expect(201);
    }
    for _ in 0..50 {
        conn.ask("DELETE", "/k", &[], None).expect(204);
        conn.ask("PUT", "/k", &[], Some(b"v")).expect(201);
    }
    c.assert_value("/k", "v");
}

#[test]
fn protect_requires_unlink_before_delete_and_replace() {
    let c = Setup::new().flags(&["-protect"]).start();
    c.ask("DELETE", "/k").expect_error(404, "no such key");
    c.replace("/k", "value").expect(201);
    c.ask("DELETE", "/k").expect_error(403, "UNLINK");
    c.replace("/k", "other").expect_error(403, "UNLINK");
    c.put("/k", "other").expect_error(403, "exists");
    c.assert_value("/k", "value");
    c.ask("UNLINK", "/k").expect(204);
    c.replace("/k", "other").expect(201);
    c.assert_value("/k", "other");
    c.ask("UNLINK", "/k").expect(204);
    c.put("/k", "third").expect(201);
    c.assert_value("/k", "third");
    c.ask("UNLINK", "/k").expect(204);
    c.ask("RELINK", "/k").expect(204);
    c.ask("DELETE", "/k").expect_error(403, "UNLINK");
    c.ask("UNLINK", "/k").expect(204);
    c.wait_until_cleaned();
    c.ask("DELETE", "/k").expect(204);
    c.assert_absent("/k");
}

#[test]
fn an_unlinked_key_can_be_relinked_deleted_or_put_again() {
    let c = Cluster::new();
    for method in ["UNLINK", "RELINK", "DELETE"] {
        c.ask(method, "/k").expect_error(404, "no ");
    }
    c.put("/k", "value").expect(201);
    c.ask("RELINK", "/k").expect_error(404, "no ");
    c.ask("UNLINK", "/k").expect(204);
    c.ask("UNLINK", "/k").expect_error(404, "no such key");
    c.get("/k").expect_missing();
    assert!(c.live().is_empty());
    assert_eq!(c.unlinked(), [b"/k"]);
    assert_eq!(c.blobs().len(), 3);
    c.ask("RELINK", "/k").expect(204);
    assert!(c.unlinked().is_empty());
    c.assert_value("/k", "value");
    c.ask("UNLINK", "/k").expect(204);
    c.put("/k", "anew").expect(201);
    c.assert_value("/k", "anew");
    assert!(c.unlinked().is_empty());
    c.ask("RELINK", "/k").expect(404);
    c.wait_until_cleaned();
    assert_eq!(c.blobs().len(), 3);
    c.ask("UNLINK", "/k").expect(204);
    c.ask("DELETE", "/k").expect(204);
    assert!(c.blobs().is_empty());
    assert!(c.unlinked().is_empty());
    c.ask("RELINK", "/k").expect_error(404, "no ");
    c.assert_absent("/k");
}

#[test]
fn unknown_methods_get_405_and_unknown_queries_403() {
    let c = Setup::new().volumes(1).start();
    c.put("/k", "value").expect(201);
    for method in ["POST", "PATCH", "OPTIONS", "TRACE", "MKCOL", "get", "Put", "LINK"] {
        let answer = c.ask(method, "/k").expect_error(405, "method");
        assert!(answer.header("Allow").unwrap().contains("REPLACE"));
    }
    for query in ["versioning", "list-type=2", "LIST", "lists", "foo=bar", "uploads", "health", "="] {
        c.ask_target("GET", &format!("/k?{query}")).expect_error(403, "query");
    }
    for method in ["HEAD", "PUT", "REPLACE", "DELETE", "UNLINK", "RELINK"] {
        for query in ["list", "unlinked", "x"] {
            let answer = c.ask_target(method, &format!("/k?{query}")).expect(403);
            assert!(method == "HEAD" || answer.text().contains("query"));
        }
    }
    // A PUT with a query stores nothing under any name.
    crate::support::http_client::ask(&c.address(), "PUT", "/up?partNumber=1", &[], Some(b"x")).expect(403);
    assert_eq!(c.live(), [b"/k"]);
    for target in ["/%", "/%4", "/%zz", "/k%", "*", "k"] {
        c.ask_target("GET", target).expect_error(400, "");
    }
    c.ask_target("GET", "/k?").expect(302);
    c.assert_value("/k", "value");
}

#[test]
fn missing_keys_redirect_to_the_fallback_server() {
    let c = Setup::new().volumes(1).flags(&["-fallback", "elsewhere.test:3000"]).start();
    c.put("/here", "value").expect(201);
    c.assert_value("/here", "value");
    let strange = "/%e6%97%A5//a+b%20c%3f";
    for method in ["GET", "HEAD"] {
        let answer = c.ask_target(method, strange).expect(302);
        let location = format!("http://elsewhere.test:3000{strange}");
        assert_eq!(answer.header("Location"), Some(location.as_str()));
        assert_eq!(answer.header("Content-Length"), Some("0"));
        assert_eq!(answer.header("Key-Volumes"), None);
    }
    let absolute = c.ask_target("GET", "http://some.host:1/not/here").expect(302);
    assert_eq!(absolute.header("Location"), Some("http://elsewhere.test:3000/not/here"));
    for method in ["DELETE", "UNLINK", "RELINK"] {
        c.ask(method, "/not/here").expect(404);
    }
    c.ask("UNLINK", "/here").expect(204);
    let answer = c.get("/here").expect(302);
    assert_eq!(answer.header("Location"), Some("http://elsewhere.test:3000/here"));
    // 410 even with -fallback: this store wrote the key, so the fallback server cannot have it.
    c.ask("RELINK", "/here").expect(204);
    let files = c.files("/here");
    fs::remove_file(&files[0]).unwrap();
    c.get("/here").expect(410);
    fs::write(&files[0], "value").unwrap();
}

#[test]
fn without_md5sum_the_master_stores_no_digest_but_checks_a_given_one() {
    let mut c = Setup::new().flags(&["-md5sum=false"]).start();
    c.put("/k", "value").expect(201);
    assert_eq!(c.assert_value("/k", "value").md5, None);
    c.send("PUT", "/l", &[("Content-MD5", &md5_base64(b"other"))], "value").expect_error(400, "MD5");
    c.assert_absent("/l");
    c.send("PUT", "/l", &[("Content-MD5", &md5_base64(b"value"))], "value").expect(201);
    c.assert_value("/l", "value");
    c.restart_with(&["-md5sum=true"]);
    assert_eq!(c.assert_value("/k", "value").md5, None);
    c.replace("/k", "other").expect(201);
    assert!(c.assert_value("/k", "other").md5.is_some());
}

#[test]
fn a_target_may_be_absolute() {
    let c = Setup::new().volumes(1).start();
    let put = |target: &str| crate::support::http_client::ask(&c.address(), "PUT", target, &[], Some(b"value"));
    put("http://any.host:1234/a/b%3F").expect(201);
    c.assert_value("/a/b?", "value");
    c.ask_target("GET", &format!("http://{}/a/b%3f", c.address())).expect(302);
    let list = c.ask_target("GET", "http://any.host/?list").expect(200);
    assert_eq!(list.text(), r#"{"next":"","keys":["/a/b?"]}"#);
    let list = c.ask_target("GET", "http://any.host?list").expect(200);
    assert_eq!(list.text(), r#"{"next":"","keys":["/a/b?"]}"#);
}

#[test]
fn the_server_answers_http_1_0_and_closes() {
    let c = Setup::new().volumes(1).start();
    let request_1_0 = |method: &str, target: &str, body: &str| {
        let mut conn = c.conn();
        let length = body.len();
        conn.send(format!("{method} {target} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}"));
        let answer = conn.answer();
        assert_eq!(answer.header("Connection"), Some("close"));
        assert!(conn.read_until_closed().is_empty());
        answer
    };
    request_1_0("PUT", "/k", "value").expect(201);
    let answer = request_1_0("GET", "/k", "").expect(302);
    assert_eq!(follow(&answer).text(), "value");
    assert_eq!(request_1_0("GET", "/?list", "").expect(200).text(), r#"{"next":"","keys":["/k"]}"#);
    request_1_0("DELETE", "/k", "").expect(204);
    request_1_0("GET", "/k", "").expect(404);
}

#[test]
fn connections_stay_open_unless_the_client_asks_to_close() {
    let c = Setup::new().volumes(1).start();
    let mut conn = c.conn();
    for round in 0..20 {
        let key = format!("/{round}");
        conn.ask("PUT", &key, &[], Some(&[round; 3000])).expect(201);
        conn.ask("GET", &key, &[], None).expect(302);
        conn.ask("HEAD", &key, &[], None).expect(302);
        conn.ask("GET", "/none", &[], None).expect(404);
        conn.ask("PUT", &key, &[], Some(b"small")).expect(403);
        conn.ask("GET", "/?list&limit=1", &[], None).expect(200);
        conn.ask("UNLINK", &key, &[], None).expect(204);
        conn.ask("DELETE", &key, &[], None).expect(204);
    }
    for target in ["/k", "/?list"] {
        let answer = c.conn().ask("GET", target, &[], None);
        assert_eq!(answer.header("Connection"), None);
        let mut conn = c.conn();
        let answer = conn.ask("GET", target, &[("Connection", "close")], None);
        assert_eq!(answer.header("Connection"), Some("close"));
        assert!(conn.read_until_closed().is_empty());
    }
}

#[test]
fn blob_paths_and_placement_match_the_reference() {
    for subvolumes in [1, 2, 300, 65536] {
        let c = Setup::new().replicas(2).subvolumes(subvolumes).start();
        for key in ["/a", "/foo/été", "/what?", "//", "/日本語/キー"] {
            c.put(key, key).expect(201);
            let found = c.assert_value(key, key);
            assert!(found.replicas == c.placement(key) && c.is_first(found.version), "{found:?}");
            let folders = found.replicas.iter().filter(|replica| replica.contains("/sv")).count();
            assert_eq!(folders, if subvolumes == 1 { 0 } else { 2 });
        }
        assert_eq!(c.blobs().len(), 10);
    }
}

#[test]
fn a_connection_survives_an_error_when_the_body_was_read() {
    let c = Setup::new().volumes(1).start();
    let mut conn: Conn = c.conn();
    conn.send(head("DELETE", &target("/none"), &[])).answer().expect(404);
    conn.ask("PUT", "/k", &[("Content-MD5", &md5(b"x"))], Some(b"y")).expect(400);
    conn.ask("PUT", "/k", &[], Some(b"y")).expect(201);
    c.assert_value("/k", "y");
}
