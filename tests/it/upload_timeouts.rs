//! Uploads that stall: a volume that never answers, a client that never finishes.

use std::time::{Duration, Instant};

use crate::support::cluster::{Cluster, Setup};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Conn, head};
use crate::support::reference;

/// The master waits a minute for a volume's answer. The three uploads wait in parallel.
#[test]
fn an_upload_fails_when_a_volume_never_answers() {
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
    let started = Instant::now();
    let mut uploads: Vec<(&str, Conn)> =
        ["/absent", "/unlinked", "/live"].into_iter().map(|key| (key, upload(key))).collect();
    c.proxies[silent].wait_held("PUT", 3);
    for (key, conn) in &mut uploads {
        let answer = conn.answer().expect_error(503, &c.names[silent]);
        assert!(answer.header("Retry-After").is_some());
        println!("{key}: {:?}", started.elapsed());
    }
    assert!(started.elapsed() < Duration::from_secs(90));
    assert_untouched(&c, &old);
    // The volume publishes the blobs without the master's knowledge. The cleaner deletes them
    // anyway.
    c.proxies[silent].release("PUT");
    c.assert_absent("/absent");
    assert_eq!(c.blobs().len(), 6);
    for key in ["/unlinked", "/live", "/absent"] {
        c.replace(key, "next").expect(201);
        c.assert_value(key, "next");
    }
}

fn assert_untouched(c: &Cluster, old: &dyn Fn(&str) -> String) {
    c.get("/absent").expect(404);
    c.assert_value("/live", old("/live"));
    assert_eq!(c.unlinked(), [b"/unlinked"]);
    c.ask("RELINK", "/unlinked").expect(204);
    c.assert_value("/unlinked", old("/unlinked"));
    assert_eq!(reference::version_of(&c.key_info("/unlinked").path), 0);
}

/// A stalled client delays the master's shutdown by at most half a minute.
#[test]
fn a_stalled_upload_delays_shutdown_by_30_seconds() {
    let mut c = Cluster::new();
    c.put("/unlinked", "value").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    let mut conn = c.conn();
    conn.send(head("PUT", "/k", &[("Content-Length", "600000")])).send([b'v'; 500_000]);
    crate::support::http_client::wait_until("the upload has begun", || c.keys_with_debris() == [b"/k"]);
    c.terminate_master();
    let started = Instant::now();
    std::thread::sleep(Duration::from_secs(20));
    assert!(!conn.readable(Duration::from_millis(1)), "the upload was aborted after 20 s");
    assert_eq!(c.wait_for_master_exit().code(), Some(0), "{}", c.log());
    println!("the master has stopped after {:?}", started.elapsed());
    c.start_master();
    c.assert_absent("/k");
    c.ask("RELINK", "/unlinked").expect(204);
    c.assert_value("/unlinked", "value");
}
