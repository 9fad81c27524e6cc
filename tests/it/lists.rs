//! Lists of keys: pages, prefixes, and keys that are not UTF-8.

use serde_json::{Value, json};

use crate::support::cluster::{Cluster, Setup};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::target;

fn store_with(keys: &[&[u8]]) -> Cluster {
    let c = Setup::new().volumes(1).start();
    for key in keys {
        c.put(key, "v").expect(201);
    }
    c
}

/// Reads a list and parses its JSON.
#[track_caller]
fn list(c: &Cluster, target: &str) -> Value {
    let answer = c.ask_target("GET", target).expect(200);
    assert_eq!(answer.header("Content-Type"), Some("application/json"));
    serde_json::from_slice(&answer.body).expect("a list is JSON")
}

fn page(next: &str, keys: &[&str]) -> Value {
    json!({ "next": next, "keys": keys })
}

#[test]
fn a_list_holds_the_live_keys_of_its_prefix_in_order() {
    let c = store_with(&[b"/b", b"/a", b"/a/2", b"/a/10", b"/ab", b"/A", b"/a/"]);
    assert_eq!(list(&c, "/?list"), page("", &["/A", "/a", "/a/", "/a/10", "/a/2", "/ab", "/b"]));
    assert_eq!(list(&c, "/a?list"), page("", &["/a", "/a/", "/a/10", "/a/2", "/ab"]));
    assert_eq!(list(&c, "/a/?list"), page("", &["/a/", "/a/10", "/a/2"]));
    assert_eq!(list(&c, "/a/2?list"), page("", &["/a/2"]));
    assert_eq!(list(&c, "/c?list"), page("", &[]));
    assert_eq!(list(&c, "/%61%2f?list"), page("", &["/a/", "/a/10", "/a/2"]));
    let text = c.ask_target("GET", "/b?list").text();
    assert_eq!(text, r#"{"next":"","keys":["/b"]}"#);
    c.ask("UNLINK", "/a/2").expect(204);
    assert_eq!(list(&c, "/a/?list"), page("", &["/a/", "/a/10"]));
    assert_eq!(list(&c, "/?unlinked"), page("", &["/a/2"]));
    assert_eq!(list(&c, "/b?unlinked"), page("", &[]));
    c.ask_target("HEAD", "/?list").expect(403);
}

#[test]
fn limit_splits_a_list_into_pages_linked_by_next() {
    let c = Setup::new().volumes(1).start();
    let all: Vec<String> = (0..25).map(|n| format!("/p/{n:02}")).collect();
    for key in all.iter().map(String::as_str).chain(["/o", "/q", "/p"]) {
        c.put(key, "v").expect(201);
    }
    for limit in [1, 7, 24, 25, 26, 1_000_000_000] {
        let (mut keys, mut start, mut pages) = (Vec::new(), String::new(), 0);
        loop {
            let page = list(&c, &format!("/p/?list&limit={limit}&start={start}"));
            let part = page["keys"].as_array().unwrap();
            assert!(part.len() <= limit && !part.is_empty());
            keys.extend(part.iter().map(|key| key.as_str().unwrap().to_string()));
            pages += 1;
            start = page["next"].as_str().unwrap().to_string();
            if start.is_empty() {
                break;
            }
        }
        assert_eq!(keys, all, "limit {limit}");
        assert_eq!(pages, all.len().div_ceil(limit));
    }
    assert_eq!(list(&c, "/p/?list&start=/p/22"), page("", &["/p/22", "/p/23", "/p/24"]));
    assert_eq!(list(&c, "/p/?list&start=/p/22x&limit=1"), page("/p/24", &["/p/23"]));
}

#[test]
fn start_never_leaves_the_prefix() {
    let c = store_with(&[b"/o", b"/p", b"/p/1", b"/p/2", b"/p\xff", b"/q"]);
    let both = page("", &["/p/1", "/p/2"]);
    for start in ["", "/", "/a", "/p", "/p/", "/p%2F1", "%00"] {
        assert_eq!(list(&c, &format!("/p/?list&start={start}")), both, "{start}");
    }
    assert_eq!(list(&c, "/p/?list&start=/p/2"), page("", &["/p/2"]));
    for start in ["/p/3", "/p0", "/q", "/z", "%FF"] {
        assert_eq!(list(&c, &format!("/p/?list&start={start}")), page("", &[]), "{start}");
    }
    // The page ends with the prefix, so there is no next one.
    assert_eq!(list(&c, "/p/?list&limit=2"), both);
}

#[test]
fn list_options_work_in_any_order_and_unknown_ones_are_refused() {
    let c = store_with(&[b"/a b", b"/a+b", b"/c"]);
    let one = page("/a%2Bb", &["/a%20b"]);
    assert_eq!(list(&c, "/?list&limit=1&encoding=url"), one);
    assert_eq!(list(&c, "/?list&encoding=url&start=/a&limit=1"), one);
    // A plus means a space, as in a form.
    assert_eq!(list(&c, "/?list&start=/a+b"), page("", &["/a b", "/a+b", "/c"]));
    assert_eq!(list(&c, "/?list&start=/a%2bb"), page("", &["/a+b", "/c"]));
    for wrong in ["limit=x", "limit=-1", "limit=1.5", "encoding=base64", "strat=/a", "start=%f"] {
        c.ask_target("GET", &format!("/?list&{wrong}")).expect_error(400, "");
    }
    c.ask_target("GET", "/?limit=1&list").expect_error(403, "query");
}

#[test]
fn keys_that_are_not_utf8_can_be_listed_percent_encoded() {
    let c = store_with(&[b"/a\xff", b"/b\"\\\n\x01\x7f", b"/c\xc3\xa9", b"/d ~-._%"]);
    let shown = ["/a\u{fffd}", "/b\"\\\n\u{1}\u{7f}", "/cé", "/d ~-._%"];
    assert_eq!(list(&c, "/?list"), page("", &shown));
    let encoded = ["/a%FF", "/b%22%5C%0A%01%7F", "/c%C3%A9", "/d%20~-._%25"];
    assert_eq!(list(&c, "/?list&encoding=url"), page("", &encoded));
    assert_eq!(list(&c, "/a%ff?list&encoding=url"), page("", &encoded[..1]));
    assert_eq!(list(&c, "/?list&encoding=url&limit=2"), page("/c%C3%A9", &encoded[..2]));
    assert_eq!(list(&c, "/?list&limit=2"), page("/cé", &shown[..2]));
}

#[test]
fn a_next_key_that_is_not_utf8_requires_encoding_url() {
    let c = store_with(&[b"/a", b"/a\xff", b"/b"]);
    c.ask_target("GET", "/?list&limit=1").expect_error(400, "encoding=url");
    assert_eq!(list(&c, "/?list&limit=1&encoding=url"), page("/a%FF", &["/a"]));
    assert_eq!(list(&c, "/?list&limit=2"), page("/b", &["/a", "/a\u{fffd}"]));
    c.ask("UNLINK", "/a").expect(204);
    c.ask("UNLINK", "/a\u{ff}").expect(404);
    c.ask("UNLINK", b"/a\xff").expect(204);
    c.ask_target("GET", "/?unlinked&limit=1").expect_error(400, "encoding=url");
}

#[test]
fn writing_lists_each_key_with_debris_once() {
    let c = Setup::new().volumes(1).proxied().start();
    let keys: [&[u8]; 6] = [b"/a", b"/a\0\0\0\0\0\0\0\0", b"/a/b", b"/a\xff", b"/b", b"/"];
    let proxy = &c.proxies[0];
    proxy.set("DELETE", Fault::Answer(500));
    for key in keys {
        // Create two versions of debris for each key.
        for value in ["v", "w"] {
            c.replace(key, value).expect(201);
            c.ask("DELETE", key).expect_error(503, "deleted");
        }
    }
    let mut sorted: Vec<Vec<u8>> = keys.iter().map(|key| key.to_vec()).collect();
    sorted.sort();
    assert_eq!(c.keys_with_debris(), sorted);
    let mut paged = Vec::new();
    let mut start = String::new();
    loop {
        let page = list(&c, &format!("/?writing&limit=2&encoding=url&start={start}"));
        let keys = page["keys"].as_array().unwrap();
        assert!(keys.len() <= 2);
        paged.extend(keys.iter().map(|key| key.as_str().unwrap().to_string()));
        start = page["next"].as_str().unwrap().to_string();
        if start.is_empty() {
            break;
        }
    }
    assert_eq!(paged, sorted.iter().map(target).collect::<Vec<_>>());
    assert_eq!(c.keys("/a/", "writing"), [b"/a/b"]);
    assert!(c.live().is_empty());
    proxy.release("DELETE");
    c.wait_until_cleaned();
    assert!(c.blobs().is_empty());
}
