//! Uploads that stall: a volume that never answers, a client that never finishes.

use std::time::{Duration, Instant};

use crate::support::cluster::{Cluster, Setup};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Conn, head};
use crate::support::reference;

/// The master waits a minute for a volume's answer. The three uploads wait in parallel.
#[test]
fn a_volume_that_never_answers_ends_the_upload_after_a_while() {
    let c = Setup::new().proxied().start();
    let old = |key: &str| format!("the old value of {key}");
    c.put("/unlinked", old("/unlinked")).expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    c.put("/live", old("/live")).expect(201);
    let silent = c.holder("/absent", 1);
    c.proxies[silent].set("PUT", Fault::HoldAnswer);
    let upload = |key: &str| -> Conn {
        let mut conn = c.conn();
        conn.socket.set_read_timeout(Some(Duration::from_secs(100))).unwrap();
        conn.send(head("REPLACE", key, &[("Content-Length", "300000")])).send([b'v'; 300_000]);
        conn
    };
    let begun = Instant::now();
    let mut uploads: Vec<(&str, Conn)> =
        ["/absent", "/unlinked", "/live"].into_iter().map(|key| (key, upload(key))).collect();
    c.proxies[silent].wait_held("PUT", 3);
    for (key, conn) in &mut uploads {
        let answer = conn.answer().refused(503, &c.names[silent]);
        assert!(answer.header("Retry-After").is_some());
        println!("{key}: {:?}", begun.elapsed());
    }
    assert!(begun.elapsed() < Duration::from_secs(90));
    untouched(&c, &old);
    // The volume publishes the blobs without the master's knowledge. The cleaner deletes them
    // anyway.
    c.proxies[silent].release("PUT");
    c.lacks("/absent");
    assert_eq!(c.blobs().len(), 6);
    for key in ["/unlinked", "/live", "/absent"] {
        c.replace(key, "next").expect(201);
        c.holds(key, "next");
    }
}

fn untouched(c: &Cluster, old: &dyn Fn(&str) -> String) {
    c.get("/absent").expect(404);
    c.holds("/live", old("/live"));
    assert_eq!(c.unlinked(), [b"/unlinked"]);
    c.ask("RELINK", "/unlinked").expect(204);
    c.holds("/unlinked", old("/unlinked"));
    assert_eq!(reference::version_of(&c.found("/unlinked").path), 0);
}

/// A stalled client delays the master's shutdown by at most half a minute.
#[test]
fn an_upload_that_never_ends_delays_sigterm_by_30_seconds() {
    let mut c = Cluster::new();
    c.put("/unlinked", "value").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    let mut conn = c.conn();
    conn.send(head("PUT", "/k", &[("Content-Length", "600000")])).send([b'v'; 500_000]);
    crate::support::http_client::until("it is under way", || c.writing() == [b"/k"]);
    c.terminate_master();
    let begun = Instant::now();
    std::thread::sleep(Duration::from_secs(20));
    assert!(!conn.readable(Duration::from_millis(1)), "the upload was given up after 20 s");
    assert_eq!(c.await_master().code(), Some(0), "{}", c.log());
    println!("the master has stopped after {:?}", begun.elapsed());
    c.start_master();
    c.lacks("/k");
    c.ask("RELINK", "/unlinked").expect(204);
    c.holds("/unlinked", "value");
}
