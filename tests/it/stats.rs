//! `?stats`: keys and bytes by volume, prefix and size.

use serde_json::{Value, json};

use crate::support::cluster::{Cluster, Setup};

fn stats(c: &Cluster) -> Value {
    let answer = c.ask_target("GET", "/?stats").expect(200);
    assert_eq!(answer.header("Content-Type"), Some("application/json"));
    serde_json::from_slice(&answer.body).expect("JSON")
}

#[test]
fn stats_count_keys_and_bytes() {
    let mut c = Setup::new().replicas(2).start();
    c.put("/photos/1", vec![0; 2000]).expect(201);
    c.put("/photos/2/3", "12345").expect(201);
    c.put(b"/\xff/x", "1").expect(201);
    c.put("/top", "12").expect(201);
    c.put("/gone", "123").expect(201);
    c.ask("UNLINK", "/gone").expect(204);
    let counted = stats(&c);
    assert_eq!((&counted["keys"], &counted["bytes"]), (&json!(5), &json!(2011)), "{counted}");
    assert_eq!(counted["unlinked"], json!({"keys": 1, "bytes": 3}));
    let prefixes = json!([
        {"prefix": "/", "keys": 2, "bytes": 5},
        {"prefix": "/photos/", "keys": 2, "bytes": 2005},
        {"prefix": "/%FF/", "keys": 1, "bytes": 1},
    ]);
    assert_eq!(counted["prefixes"], prefixes);
    assert_eq!(counted["sizes"][0], json!({"up_to": 1024, "keys": 4, "bytes": 11}));
    assert_eq!(counted["sizes"][1], json!({"up_to": 4096, "keys": 1, "bytes": 2000}));
    // Each replica counts on its volume and on its subvolume.
    let volumes = counted["volumes"].as_object().expect("volumes");
    assert_eq!(volumes.values().map(|v| v["bytes"].as_u64().unwrap()).sum::<u64>(), 2 * 2011);
    for replica in c.key_info("/photos/1").replicas {
        let (volume, subvolume) = replica.split_once('/').expect("a subvolume");
        assert!(volumes[volume]["subvolumes"][subvolume]["bytes"].as_u64() >= Some(2000), "{counted}");
    }

    // The result is kept for an hour, and not beyond a restart.
    c.put("/later", "1").expect(201);
    assert_eq!(stats(&c), counted);
    assert_eq!(c.ask_target("HEAD", "/?stats").expect(200).body, b"");
    c.restart_master();
    assert_eq!(stats(&c)["keys"], 6);
}
