//! Common clients: curl, wget, Python's requests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::support::cluster::{Cluster, Setup};
use crate::support::random::{random_bytes, seeded_rng};

/// Runs a program that must succeed, and returns its output.
#[track_caller]
fn run(program: &str, arguments: &[&str]) -> Vec<u8> {
    let Output { status, stdout, stderr } = Command::new(program)
        .args(arguments)
        .env("no_proxy", "*")
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}: ./test.sh installs what is missing"));
    let text = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{program} {arguments:?}: {status}: {text}");
    stdout
}

fn write_file(c: &Cluster, name: &str, value: &[u8]) -> PathBuf {
    let path = c.folder.join(name);
    fs::write(&path, value).expect("a file can be written");
    path
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("the temporary folder's name is UTF-8")
}

#[test]
fn curl_works() {
    let c = Cluster::new();
    let base = format!("http://{}", c.address());
    let value = random_bytes(&mut seeded_rng(), 3_000_000);
    let (large, small) = (write_file(&c, "large", &value), write_file(&c, "small", b"small"));
    let curl = |arguments: &[&str]| run("curl", &[&["-q", "-sS", "--fail"], arguments].concat());
    let status = |arguments: &[&str]| -> String {
        let quiet = ["-q", "-sS", "-o", "/dev/null", "-w", "%{http_code}"];
        String::from_utf8(run("curl", &[&quiet, arguments].concat())).expect("the status is text")
    };
    // Uploads with a length, with Expect: 100-continue, and in chunks.
    for (key, file, extra) in [
        ("/large", &large, vec![]),
        ("/small", &small, vec!["-H", "Expect: 100-continue"]),
        ("/chunked", &large, vec!["-H", "Transfer-Encoding: chunked"]),
        ("/chunked/small", &small, vec!["-H", "Transfer-Encoding: chunked", "-H", "Expect:"]),
        ("/caf%C3%A9%20%2B%3F", &small, vec![]),
    ] {
        let url = format!("{base}{key}");
        let put = [&["-T", path_text(file)], &extra[..], &[&url]].concat();
        assert_eq!(status(&put), "201", "{key}");
        assert_eq!(curl(&["-L", &url]), fs::read(file).unwrap(), "{key}");
        assert_eq!(status(&put), "403", "{key}");
        assert_eq!(status(&["-L", "-I", &url]), "200");
    }
    c.assert_value("/café +?", "small");
    let url = format!("{base}/small");
    let body = format!("@{}", path_text(&large));
    assert_eq!(status(&["-X", "REPLACE", "--data-binary", &body, &url]), "201");
    c.assert_value("/small", &value);
    // nginx answers range requests.
    assert_eq!(curl(&["-L", "-r", "10-19", &url]), &value[10..20]);
    for (method, code) in [("UNLINK", "204"), ("RELINK", "204"), ("DELETE", "204"), ("RELINK", "404")] {
        assert_eq!(status(&["-X", method, &url]), code);
    }
    let list = curl(&[&format!("{base}/large?list")]);
    assert_eq!(list, br#"{"next":"","keys":["/large"]}"#);
    assert_eq!(status(&["-L", &url]), "404");
}

#[test]
fn wget_works() {
    let c = Setup::new().replicas(2).start();
    let value = random_bytes(&mut seeded_rng(), 300_000);
    let body = format!("--body-file={}", path_text(&write_file(&c, "value", &value)));
    let url = format!("http://{}/a/value", c.address());
    let wget = |arguments: &[&str]| run("wget", &[&["-q", "--no-config", "--tries=1", "-O", "-"], arguments].concat());
    wget(&["--method=PUT", &body, &url]);
    assert_eq!(wget(&[&url]), value);
    c.assert_value("/a/value", &value);
    wget(&["--method=DELETE", &url]);
    c.assert_absent("/a/value");
}

#[test]
fn python_requests_works() {
    let c = Cluster::new();
    let script = write_file(
        &c,
        "client.py",
        br#"
import sys, requests
base = sys.argv[1]
session = requests.Session()
for client in (requests, session):
    for key, value in [("/a", b"x" * 10), ("/b c", b"y" * 2_000_000), ("/caf\u00e9/+?".replace("?", "%3F"), b"z")]:
        url = base + key
        assert client.get(url).status_code == 404
        assert client.put(url, data=value).status_code == 201
        assert client.put(url, data=value).status_code == 403
        answer = client.get(url)
        assert answer.status_code == 200 and answer.content == value
        answer = client.get(url, allow_redirects=False)
        assert answer.status_code == 302 and len(answer.headers["content-md5"]) == 32
        answer = client.head(url, allow_redirects=True)
        assert answer.status_code == 200 and int(answer.headers["content-length"]) == len(value)
        pieces = (value[n:n + 1000] for n in range(0, len(value), 1000))
        assert client.request("REPLACE", url, data=pieces).status_code == 201
        assert client.get(url).content == value
        assert client.request("UNLINK", url).status_code == 204
        assert client.get(url).status_code == 404
        assert client.request("RELINK", url).status_code == 204
        assert client.delete(url).status_code == 204
        assert client.get(url).status_code == 404
    for n in range(20):
        assert client.put(base + "/list/%02d" % n, data=b"v").status_code == 201
    page = client.get(base + "/list/?list&limit=15").json()
    assert len(page["keys"]) == 15 and page["next"] == "/list/15"
    for key in client.get(base + "/?list").json()["keys"]:
        assert client.delete(base + key).status_code == 204
    assert client.get(base + "/?list").json() == {"next": "", "keys": []}
    assert client.put(base + "/empty", data=b"").status_code == 411
    assert client.post(base + "/a").status_code == 405
print("done")
"#,
    );
    let url = format!("http://{}", c.address());
    // Pick a python3 that has the module: the first in PATH may not be the distribution's.
    let python = ["python3", "/usr/bin/python3"]
        .into_iter()
        .find(|python| {
            let import = Command::new(python).args(["-c", "import requests"]).output();
            import.is_ok_and(|output| output.status.success())
        })
        .expect("no python3 has requests: ./test.sh installs python3-requests");
    assert_eq!(run(python, &[path_text(&script), &url]), b"done\n");
    assert!(c.live().is_empty());
}
