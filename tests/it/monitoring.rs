//! Metrics, health and the log.

use std::io::Write;
use std::process::{Command, Stdio};

use prometheus_parse::{Scrape, Value};

use crate::support::cluster::{Cluster, Setup};
use crate::support::http_client::wait_until;

struct Metrics(Scrape);

impl Metrics {
    #[track_caller]
    fn fetch(c: &Cluster) -> Metrics {
        let answer = c.ask_target("GET", "/?metrics").expect(200);
        assert_eq!(answer.header("Content-Type"), Some("text/plain; version=0.0.4"));
        let text = answer.text();
        promtool(&text);
        let lines = text.lines().map(|line| Ok(line.to_string()));
        Metrics(Scrape::parse(lines).expect("Prometheus text"))
    }

    /// The value with this name and these labels, or 0 if there is none yet.
    #[track_caller]
    fn get(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |sample: &&prometheus_parse::Sample| {
            sample.metric == name && labels.iter().all(|(label, value)| sample.labels.get(label) == Some(value))
        };
        let found: Vec<_> = self.0.samples.iter().filter(fits).collect();
        assert!(found.len() < 2, "{name} {labels:?}: {found:?}");
        found.first().map_or(0.0, |sample| match &sample.value {
            Value::Counter(n) | Value::Gauge(n) | Value::Untyped(n) => *n,
            Value::Histogram(counts) => {
                let pairs = counts.windows(2);
                assert!(pairs.clone().all(|p| p[0].count <= p[1].count), "{name}: {counts:?}");
                let all = counts.last().expect("a histogram has buckets");
                assert_eq!(all.less_than, f64::INFINITY, "{name}");
                all.count
            }
            other => panic!("{name}: {other:?}"),
        })
    }

    fn has(&self, name: &str) -> bool {
        self.0.docs.contains_key(name) && self.0.samples.iter().any(|s| s.metric == name)
    }
}

/// Checks the text with promtool too, if it is installed.
fn promtool(text: &str) {
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let Ok(mut child) = command.spawn() else { return };
    let mut input = child.stdin.take().expect("stdin is a pipe");
    input.write_all(text.as_bytes()).expect("promtool reads");
    drop(input);
    let output = child.wait_with_output().expect("promtool ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn metrics_count_requests_bytes_and_errors() {
    let mut c = Setup::new().start();
    let names = c.names.clone();
    c.put("/k", "value").expect(201);
    c.put("/k", "value").expect(403);
    c.get("/k").expect(302);
    c.get("/none").expect(404);
    let before = Metrics::fetch(&c);
    for family in [
        "mkv_requests_total",
        "mkv_received_bytes_total",
        "mkv_sent_bytes_total",
        "mkv_request_seconds",
        "mkv_volume_seconds",
        "mkv_uploads",
        "mkv_connections",
        "mkv_locks",
        "mkv_keys",
        "mkv_backup_timestamp_seconds",
        "mkv_volume_up",
        "mkv_errors_total",
    ] {
        assert!(before.has(family), "{family} is missing: {:?}", before.0);
    }
    for name in &names {
        assert_eq!(before.get("mkv_volume_up", &[("volume", name)]), 1.0, "{name}");
    }
    c.put("/l", "a longer value").expect(201);
    c.get("/l").expect(302);
    c.get("/none").expect(404);
    let after = Metrics::fetch(&c);
    let grown = |name: &str, labels: &[(&str, &str)]| after.get(name, labels) - before.get(name, labels);
    let requests = |method, status| grown("mkv_requests_total", &[("method", method), ("status", status)]);
    assert_eq!(requests("PUT", "201"), 1.0);
    assert_eq!(requests("PUT", "403"), 0.0);
    assert_eq!(requests("GET", "302"), 1.0);
    assert_eq!(requests("GET", "404"), 1.0);
    assert_eq!(grown("mkv_received_bytes_total", &[]), "a longer value".len() as f64);
    assert!(grown("mkv_sent_bytes_total", &[]) > 100.0);
    assert_eq!(grown("mkv_request_seconds", &[("method", "PUT")]), 1.0);
    for name in &names {
        assert!(grown("mkv_volume_seconds", &[("volume", name)]) >= 1.0, "{name}");
    }
    assert_eq!((after.get("mkv_uploads", &[]), after.get("mkv_locks", &[])), (0.0, 0.0));

    // An upload in progress holds its key's lock.
    let mut upload = c.conn();
    upload.head("PUT", "/m", &[("Content-Length", "5000")]).send("begun");
    wait_until("the upload is counted", || {
        let now = Metrics::fetch(&c);
        now.get("mkv_uploads", &[]) == 1.0 && now.get("mkv_locks", &[]) == 1.0
    });
    wait_until("the connection is counted", || Metrics::fetch(&c).get("mkv_connections", &[]) >= 1.0);
    drop(upload);
    wait_until("the upload is over", || {
        let now = Metrics::fetch(&c);
        now.get("mkv_uploads", &[]) == 0.0 && now.get("mkv_locks", &[]) == 0.0
    });

    c.volumes[0].stop();
    let errors = |m: &Metrics| m.0.samples.iter().filter(|s| s.metric == "mkv_errors_total").count();
    let kinds = errors(&Metrics::fetch(&c));
    c.put("/n", "value").expect(503);
    let down = Metrics::fetch(&c);
    assert_eq!(down.get("mkv_volume_up", &[("volume", &names[0])]), 0.0);
    assert_eq!(down.get("mkv_volume_up", &[("volume", &names[1])]), 1.0);
    assert!(errors(&down) > kinds, "no new kind of error: {:?}", down.0);
    c.volumes[0].start();
    wait_until("the volume counts as up", || {
        c.replace("/n", "value");
        Metrics::fetch(&c).get("mkv_volume_up", &[("volume", &names[0])]) == 1.0
    });
}

#[test]
fn health_names_the_volume_that_is_down() {
    let mut c = Cluster::new();
    let state = |c: &Cluster, status| -> serde_json::Value {
        let answer = c.ask_target("GET", "/?health").expect(status);
        assert_eq!(answer.header("Content-Type"), Some("application/json"));
        serde_json::from_slice(&answer.body).expect("JSON")
    };
    let name = c.names[1].clone();
    let healthy = state(&c, 200);
    assert_eq!((&healthy["healthy"], &healthy["index"]), (&true.into(), &"ok".into()));
    assert!(c.names.iter().all(|name| healthy["volumes"][name] == "ok"), "{healthy}");
    c.volumes[1].stop();
    let unhealthy = state(&c, 503);
    assert_eq!((&unhealthy["healthy"], &unhealthy["index"]), (&false.into(), &"ok".into()));
    for other in &c.names {
        assert_eq!(unhealthy["volumes"][other] == "ok", *other != name, "{unhealthy}");
    }
    c.volumes[1].start();
    state(&c, 200);
}

#[test]
fn metrics_show_disks_debris_and_the_last_verify() {
    let mut c = Setup::new().subvolumes(2).start();
    c.put("/k", "value").expect(201);
    let before = Metrics::fetch(&c);
    let disk = [("volume", c.names[0].as_str()), ("disk", ".")];
    let (size, free) = (before.get("mkv_volume_size_bytes", &disk), before.get("mkv_volume_free_bytes", &disk));
    assert!(size > free && free > 0.0, "{size} {free}");
    assert!(before.has("mkv_debris") && before.has("mkv_verify_timestamp_seconds"));
    assert_eq!(before.get("mkv_verify_timestamp_seconds", &[]), 0.0);

    c.mkv(&["verify", "-deep"]).expect(0);
    let file = c.files("/k").remove(0);
    let value = std::fs::read(&file).expect("a blob can be read");
    std::fs::remove_file(&file).expect("a blob can be removed");
    c.mkv(&["verify"]).expect(1);
    std::fs::write(&file, value).expect("a blob can be written");
    let after = Metrics::fetch(&c);
    let verify = |name: &str| after.get(&format!("mkv_verify_{name}"), &[]);
    assert_eq!((verify("findings"), verify("deep")), (1.0, 0.0));
    assert!(verify("timestamp_seconds") >= verify("deep_timestamp_seconds") && verify("deep_timestamp_seconds") > 1e9);

    // A deletion that a volume does not hear of.
    c.volumes[1].stop();
    c.ask("DELETE", "/k").expect(503);
    assert_eq!(Metrics::fetch(&c).get("mkv_debris", &[]), 1.0);
    c.volumes[1].start();
    wait_until("the debris is gone", || Metrics::fetch(&c).get("mkv_debris", &[]) == 0.0);
}

#[test]
fn health_names_a_disk_that_is_nearly_full() {
    let mut mounted = false;
    let c = Cluster::start_with(Setup::new().volumes(1), |c| {
        let disk = c.volumes[0].folder.join("sv00");
        std::fs::create_dir(&disk).expect("a folder can be created");
        mounted = c.mount_small_disk(&disk, "32m");
        if mounted {
            std::fs::write(disk.join(".filler"), vec![1; (32 << 20) - (500 << 10)]).expect("a file can be written");
        }
    });
    if !mounted {
        return println!("skipped: this user may not mount a disk");
    }
    let answer = c.ask_target("GET", "/?health").expect(200);
    let health: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
    let warning = health["warnings"][0].as_str().expect("a warning");
    assert!(warning.contains(&c.names[0]) && warning.contains("disk sv00 has 1."), "{health}");
    assert_eq!((health["warnings"].as_array().map(Vec::len), &health["healthy"]), (Some(1), &true.into()));
}

#[test]
fn the_log_has_one_line_per_request_without_its_query() {
    let c = Setup::new().volumes(1).start();
    c.put("/logged", "value").expect(201);
    c.get("/logged").expect(302);
    c.ask_target("GET", "/?list&start=%2Fsecret").expect(200);
    c.ask_target("GET", "/odd?password=secret").expect(403);
    let log = c.log();
    for line in ["PUT /logged 201", "GET /logged 302", "GET / 200", "GET /odd 403"] {
        assert_eq!(log.lines().filter(|l| l.contains(&format!("] {line} "))).count(), 1, "{line}: {log}");
    }
    assert!(!log.contains("secret"), "{log}");
}

#[test]
fn the_log_as_json_has_one_object_per_line() {
    let mut c = Setup::new().volumes(1).flags(&["-log", "json"]).start();
    c.put("/with \"quotes\"", "value").expect(201);
    c.volumes[0].stop();
    c.get("/with \"quotes\"").expect(503);
    c.start_volumes();
    let log = c.log();
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect();
    for line in &lines {
        assert!(["INFO", "WARN", "ERROR"].contains(&line["level"].as_str().unwrap()), "{line}");
        let time = line["time"].as_str().unwrap();
        assert!(time.len() == 24 && time.starts_with("20") && time.ends_with('Z'), "{line}");
        assert!(line["message"].is_string());
    }
    let put = lines.iter().find(|line| line["status"] == 201).expect("the PUT is logged");
    assert_eq!((&put["method"], &put["path"]), (&"PUT".into(), &"/with%20%22quotes%22".into()));
    assert!(put["ms"].is_u64() && put["id"].is_string(), "{put}");
    let failed = lines.iter().find(|line| line["status"] == 503).expect("the failure is logged");
    assert!(failed["level"] == "ERROR" && failed["message"].as_str().unwrap().contains(&c.names[0]), "{failed}");
    // The last words, too.
    let second = c.master_command().args(["-db", c.db().to_str().unwrap()]).output().unwrap();
    let last: serde_json::Value = serde_json::from_slice(&second.stderr).expect("one object");
    assert!(!second.status.success() && last["message"].as_str().unwrap().contains("another mkv"), "{last}");
}

/// The id in the text of an error.
fn id_in(text: &str) -> String {
    let (_, id) = text.trim_end().rsplit_once("(request ").unwrap_or_else(|| panic!("no id: {text}"));
    id.strip_suffix(')').expect("it ends the line").to_string()
}

#[test]
fn an_error_has_the_id_of_its_request_and_so_has_its_line_in_the_log() {
    let c = Setup::new().volumes(1).start();
    c.put("/k", "value").expect(201);
    let ids: Vec<String> = (0..3).map(|_| id_in(&c.put("/k", "value").expect_error(403, "exists").text())).collect();
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids.iter().all(|id| id.len() == 13), "{ids:?}");
    let logged = |id: &str| c.log().lines().filter(|line| line.ends_with(&format!(", request {id}"))).count();
    assert_eq!(ids.iter().map(|id| logged(id)).collect::<Vec<_>>(), [1, 1, 1]);
    // The client's id is used where it is one.
    let answer = c.send("PUT", "/k", &[("X-Request-Id", "a-1:b_2.c")], "value").expect(403);
    assert_eq!((id_in(&answer.text()).as_str(), answer.header("X-Request-Id")), ("a-1:b_2.c", Some("a-1:b_2.c")));
    assert_eq!(logged("a-1:b_2.c"), 1);
    let get = c.send("GET", "/k", &[("X-Request-Id", "mine")], "").expect(302);
    assert_eq!(get.header("X-Request-Id"), Some("mine"));
    for other in ["", "a b", "\u{e9}", &"x".repeat(65), "\"", "a,b"] {
        let answer = c.send("PUT", "/k", &[("X-Request-Id", other)], "value").expect(403);
        assert!(answer.header("X-Request-Id").is_none() && id_in(&answer.text()).len() == 13, "{other}");
    }
    // Refusals of the server have one, and a missing key's 404 stays empty.
    assert!(id_in(&c.conn().send("GET / HTTP/2.0\r\n\r\n").answer().expect(505).text()).len() == 13);
    assert_eq!(c.get("/none").expect_missing().header("X-Request-Id"), None);
}
