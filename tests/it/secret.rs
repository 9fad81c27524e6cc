//! Signed links: volumes and master with a secret.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use crate::support::cluster::{Cluster, Setup};
use crate::support::commands::{flip_a_bit, now, numbered_keys};
use crate::support::http_client::{Answer, ask, find, follow};
use crate::support::reference::signature;

/// The host and the rest of the redirect's URL.
#[track_caller]
fn link(redirect: &Answer) -> (String, String) {
    let location = redirect.header("Location").expect("a redirect has a Location");
    let url = location.strip_prefix("http://").expect("the Location is a URL");
    let (host, target) = url.split_at(url.find('/').expect("the URL has a path"));
    (host.to_string(), target.to_string())
}

fn secrets(c: &Cluster) -> Vec<String> {
    let text = fs::read_to_string(c.secret().expect("the cluster has a secret")).expect("the secret can be read");
    text.lines().map(String::from).collect()
}

fn write_secrets(c: &Cluster, secrets: &[&str]) {
    // The mode stays.
    fs::write(c.secret().expect("the cluster has a secret"), secrets.join("\n") + "\n")
        .expect("the file can be written");
}

/// What `mkv secret` prints.
fn new_secret() -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_mkv")).arg("secret").output().expect("mkv starts");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("a secret is text").trim_end().to_string()
}

#[test]
fn a_volume_with_a_secret_answers_only_signed_requests() {
    let c = Setup::new().volumes(1).secret().start();
    c.put("/été", "value").expect(201);
    let redirect = c.get("/été").expect(302);
    assert_eq!(redirect.header("Cache-Control"), Some("no-store"));
    let ((host, target), secret) = (link(&redirect), &secrets(&c)[0]);
    let path = target.split('?').next().unwrap();
    let refused = |method: &str, target: &str| {
        let body = (method == "PUT").then_some(b"new".as_slice());
        let answer = ask(&host, method, target, &[], body);
        assert!(answer.status == 403, "{method} {target}: {answer:?}");
    };
    let folder = path.rsplit_once('/').unwrap().0.to_string() + "/";
    let all = ["GET", "HEAD", "PUT", "DELETE", "POST", "MKCOL", "COPY", "OPTIONS"];
    for place in [path, "/", &folder, "/new", "/.nginx/nginx.conf", "/.login", "/.nginx/", "//"] {
        all.iter().for_each(|method| refused(method, place));
    }
    // A signature is for one path, one class of methods, one secret and one time.
    let (later, other) = (now() + 60, new_secret());
    for query in [
        signature(secret, 'r', &folder, later),
        signature(secret, 'w', path, later),
        signature(secret, 'r', path, now() - 1),
        signature(&other, 'r', path, later),
        signature(secret, 'r', path, later).replace(&format!("e={later}"), &format!("e={}", later + 1)),
        signature(secret, 'r', path, later).replace("&s=", "&s=x"),
        format!("?e={later}"),
        "?e=&s=".into(),
        target[path.len()..].replace("e=", "e=0"),
    ] {
        refused("GET", &format!("{path}{query}"));
        refused("HEAD", &format!("{path}{query}"));
    }
    refused("GET", &format!("{folder}{}", &target[path.len()..]));
    refused("PUT", &target);
    refused("DELETE", &target);
    refused("PUT", &format!("{path}{}", signature(secret, 'w', path, now() - 1)));
    refused("DELETE", &format!("{path}.x{}", signature(secret, 'w', path, later)));
    // The redirect reads the blob for an hour.
    let expires: u64 = target.split(['?', '&']).nth(1).and_then(|e| e.strip_prefix("e=")?.parse().ok()).unwrap();
    assert!((3590..=3600).contains(&(expires - now())), "{target}");
    assert_eq!(target, format!("{path}{}", signature(secret, 'r', path, expires)));
    assert_eq!(ask(&host, "GET", &target, &[], None).expect(200).text(), "value");
    assert_eq!(ask(&host, "HEAD", &target, &[], None).expect(200).header("Content-Length"), Some("5"));
    assert_eq!(ask(&host, "GET", &target, &[("Range", "bytes=1-2")], None).expect(206).text(), "al");
    ask(&host, "GET", &format!("{folder}{}", signature(secret, 'r', &folder, later)), &[], None).expect(200);
    let dots = "/.nginx/nginx.conf";
    ask(&host, "GET", &format!("{dots}{}", signature(secret, 'r', dots, later)), &[], None).expect(404);
    let conf = fs::metadata(c.volumes[0].folder.join(".nginx/nginx.conf")).expect("nginx.conf exists");
    assert_eq!(conf.permissions().mode() & 0o777, 0o600);
    assert!(find(c.log().as_bytes(), secret.as_bytes()).is_none());
}

#[test]
fn linktime_is_how_long_a_redirect_is_valid() {
    let c = Setup::new().volumes(1).secret().flags(&["-linktime", "1s"]).start();
    c.put("/k", "value").expect(201);
    let redirect = c.get("/k").expect(302);
    assert_eq!(follow(&redirect).expect(200).text(), "value");
    std::thread::sleep(std::time::Duration::from_millis(2100));
    follow(&redirect).expect(403);
}

#[test]
fn a_secret_is_rotated_while_values_are_read_and_written() {
    let mut c = Setup::new().volumes(2).secret().start();
    let old = secrets(&c).remove(0);
    let new = new_secret();
    c.put("/k", "0").expect(201);
    let redirect = c.get("/k").expect(302);
    let works = |c: &Cluster, value: &str| {
        c.replace("/k", value).expect(201);
        c.assert_value("/k", value);
    };
    // The volumes learn the new secret one by one; the master still signs with the old one.
    write_secrets(&c, &[&new, &old]);
    for n in 0..2 {
        c.volumes[n].stop();
        follow(&c.get("/k").expect(302)).expect(200);
        c.volumes[n].start();
        works(&c, &n.to_string());
    }
    c.restart_master();
    works(&c, "2");
    let (host, target) = link(&c.get("/k").expect(302));
    write_secrets(&c, &[&new]);
    c.restart_volumes(false);
    works(&c, "3");
    // The links of the old secret end with it, and those of the new one stay.
    follow(&redirect).expect(403);
    assert_ne!(ask(&host, "GET", &target, &[], None).status, 403);
    c.mkv(&["verify", "-deep"]).expect(0);
}

#[test]
fn every_command_signs_its_requests() {
    let mut c = Setup::new().subvolumes(2).replicas(2).secret().start();
    let keys = numbered_keys("/photos/", 12);
    c.fill(&keys);
    c.ask("UNLINK", &keys[0]).expect(204);
    c.ask("REBALANCE", &keys[1]).expect(204);
    c.ask_target("GET", "/?health").expect(200);
    c.assert_verified();
    c.stop_master();
    let dump = c.dump();
    // Without a signature, or with a wrong one, nothing is done, and the error says why.
    let wrong = c.folder.join("wrong");
    let made = Command::new(env!("CARGO_BIN_EXE_mkv")).arg("secret").arg(&wrong).status();
    assert!(made.expect("mkv starts").success());
    for command in ["rebuild", "rebalance", "verify"] {
        c.mkv(&[command, "-settle", "0s", "-secret", wrong.to_str().unwrap()])
            .expect(1)
            .prints("403")
            .prints("-secret");
        assert_eq!(c.dump(), dump);
    }
    flip_a_bit(c.blobs().values().next().unwrap());
    c.mkv(&["verify", "-deep"]).expect(1);
    c.mkv(&["verify", "-deep", "-repair"]).expect(0);
    fs::remove_file(c.blobs().values().next().unwrap()).unwrap();
    c.mkv(&["verify", "-repair"]).expect(0);
    c.mkv(&["rebuild", "-rehash"]).expect(0);
    assert_eq!(c.dump(), dump);
    c.setup = c.setup.clone().replicas(3);
    c.mkv(&["rebalance", "-settle", "0s"]).expect(0);
    assert_eq!(c.blobs().len(), 36);
    let import = c.folder.join("import");
    fs::create_dir(&import).unwrap();
    crate::support::commands::copy_folder("tests/goleveldb/killed".as_ref(), &import.join("go"));
    let (db, go) = (import.join("db"), import.join("go"));
    c.mkv(&["-db", db.to_str().unwrap(), "import", "-leveldb", go.to_str().unwrap()]);
    assert!(db.join("index").is_dir());
    c.start_master();
    c.assert_verified();
}

#[test]
fn a_master_warns_of_volumes_that_do_not_check_signatures_or_refuse_them() {
    let mut c = Setup::new().secret().start();
    c.volumes[0].stop();
    c.volumes[0].secret = None;
    c.volumes[0].start();
    let wrong = c.folder.join("wrong");
    fs::copy(c.secret().unwrap(), &wrong).unwrap();
    fs::write(&wrong, new_secret()).unwrap();
    c.volumes[1].stop();
    c.volumes[1].secret = Some(wrong);
    c.volumes[1].start();
    c.restart_master();
    let says = |n: usize, text: &str| c.log().lines().any(|line| line.contains(&c.names[n]) && line.contains(text));
    crate::support::http_client::wait_until("the warnings are logged", || {
        says(0, "answers requests without a signature") && says(1, "refuses the signature")
    });
    let health = c.ask_target("GET", "/?health").expect(503).text();
    assert!(health.contains("signature"), "{health}");
    for n in 0..2 {
        c.volumes[n].stop();
        c.volumes[n].secret = c.secret();
        c.volumes[n].start();
    }
    c.put("/k", "value").expect(201);
}

#[test]
fn a_secret_that_others_can_read_or_that_is_short_is_refused() {
    let folder = std::env::temp_dir().join(format!("mkv-it-secret-{:x}", fastrand::u64(..)));
    fs::create_dir(&folder).unwrap();
    let file = folder.join("secret");
    let make = || Command::new(env!("CARGO_BIN_EXE_mkv")).arg("secret").arg(&file).output().expect("mkv starts");
    assert!(make().status.success());
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let good = fs::read_to_string(&file).unwrap();
    let again = make();
    assert!(again.status.code() == Some(1) && fs::read_to_string(&file).unwrap() == good, "{again:?}");
    let three = good.repeat(3);
    for (text, mode) in [
        (good.as_str(), 0o644),
        ("short\n", 0o600),
        ("", 0o600),
        (&three, 0o600),
        (&good.replacen(&good[..1], "$", 1), 0o600),
    ] {
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        let mut master = Command::new(env!("CARGO_BIN_EXE_mkv"));
        master.args(["-volumes", "127.0.0.1:1", "-replicas", "1", "server", "-db"]).arg(folder.join("db"));
        master.arg("-secret").arg(&file);
        let mut volume = Command::new("./volume.sh");
        volume.arg(folder.join("volume")).env("PORT", "1").env("SECRET", &file).env_remove("AUTH");
        for (command, code) in [(&mut master, 2), (&mut volume, 1)] {
            let output = command.stdin(Stdio::null()).output().expect("it starts");
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(code), "{text:?} {mode:o}: {error}");
            assert!(error.lines().count() == 1 && error.contains(file.to_str().unwrap()), "{text:?}: {error}");
            assert!(text.len() < 20 || !error.contains(text.trim_end()), "{error}");
        }
    }
    fs::remove_dir_all(&folder).unwrap();
}
