//! The store as its operator sees it from outside: metrics, health, log, and the nginx in front.

use std::fs;
use std::io::{BufRead, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use prometheus_parse::{Scrape, Value};
use rustix::process::Signal;

use crate::support::cluster::{Cluster, Setup, bound_to_us, same, signal, wait};
use crate::support::http_client::{Conn, until};

struct Metrics(Scrape);

impl Metrics {
    #[track_caller]
    fn of(c: &Cluster) -> Metrics {
        let answer = c.ask_target("GET", "/?metrics").expect(200);
        assert_eq!(answer.header("Content-Type"), Some("text/plain; version=0.0.4"));
        let text = answer.text();
        promtool(&text);
        let lines = text.lines().map(|line| Ok(line.to_string()));
        Metrics(Scrape::parse(lines).expect("Prometheus text"))
    }

    /// The one value of this name and these labels; 0 where there is none yet.
    #[track_caller]
    fn get(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |sample: &&prometheus_parse::Sample| {
            sample.metric == name
                && labels.iter().all(|(label, value)| sample.labels.get(label) == Some(value))
        };
        let found: Vec<_> = self.0.samples.iter().filter(fits).collect();
        assert!(found.len() < 2, "{name} {labels:?}: {found:?}");
        found.first().map_or(0.0, |sample| match &sample.value {
            Value::Counter(n) | Value::Gauge(n) | Value::Untyped(n) => *n,
            Value::Histogram(counts) => {
                let pairs = counts.windows(2);
                assert!(pairs.clone().all(|p| p[0].count <= p[1].count), "{name}: {counts:?}");
                let all = counts.last().expect("it has buckets");
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

/// Has promtool read it too, where there is one.
fn promtool(text: &str) {
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let Ok(mut child) = command.spawn() else { return };
    let mut input = child.stdin.take().expect("its input is a pipe");
    input.write_all(text.as_bytes()).expect("promtool reads");
    drop(input);
    let output = child.wait_with_output().expect("promtool ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn metrics_count_what_happens() {
    let mut c = Setup::new().start();
    let names = c.names.clone();
    c.put("/k", "value").expect(201);
    c.put("/k", "value").expect(403);
    c.get("/k").expect(302);
    c.get("/none").expect(404);
    let before = Metrics::of(&c);
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
    let after = Metrics::of(&c);
    let grown =
        |name: &str, labels: &[(&str, &str)]| after.get(name, labels) - before.get(name, labels);
    let requests =
        |method, status| grown("mkv_requests_total", &[("method", method), ("status", status)]);
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

    // An upload under way holds its key's lock.
    let mut upload = c.conn();
    upload.head("PUT", "/m", &[("Content-Length", "5000")]).send("begun");
    until("the upload is counted", || {
        let now = Metrics::of(&c);
        now.get("mkv_uploads", &[]) == 1.0 && now.get("mkv_locks", &[]) == 1.0
    });
    until("its connection is counted", || Metrics::of(&c).get("mkv_connections", &[]) >= 1.0);
    drop(upload);
    until("the upload is over", || {
        let now = Metrics::of(&c);
        now.get("mkv_uploads", &[]) == 0.0 && now.get("mkv_locks", &[]) == 0.0
    });

    c.volumes[0].stop();
    let errors =
        |m: &Metrics| m.0.samples.iter().filter(|s| s.metric == "mkv_errors_total").count();
    let kinds = errors(&Metrics::of(&c));
    c.put("/n", "value").expect(503);
    let down = Metrics::of(&c);
    assert_eq!(down.get("mkv_volume_up", &[("volume", &names[0])]), 0.0);
    assert_eq!(down.get("mkv_volume_up", &[("volume", &names[1])]), 1.0);
    assert!(errors(&down) > kinds, "no error of a new kind: {:?}", down.0);
    c.volumes[0].start();
    until("the volume counts as up", || {
        c.replace("/n", "value");
        Metrics::of(&c).get("mkv_volume_up", &[("volume", &names[0])]) == 1.0
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
    let well = state(&c, 200);
    assert_eq!((&well["healthy"], &well["index"]), (&true.into(), &"ok".into()));
    assert!(c.names.iter().all(|name| well["volumes"][name] == "ok"), "{well}");
    c.volumes[1].stop();
    let ill = state(&c, 503);
    assert_eq!((&ill["healthy"], &ill["index"]), (&false.into(), &"ok".into()));
    for other in &c.names {
        assert_eq!(ill["volumes"][other] == "ok", *other != name, "{ill}");
    }
    c.volumes[1].start();
    state(&c, 200);
}

#[test]
fn the_log_has_one_line_for_each_request_and_no_query() {
    let c = Setup::new().volumes(1).start();
    c.put("/logged", "value").expect(201);
    c.get("/logged").expect(302);
    c.ask_target("GET", "/?list&start=%2Fsecret").expect(200);
    c.ask_target("GET", "/odd?password=secret").expect(403);
    let log = c.log();
    for line in ["PUT /logged 201", "GET /logged 302", "GET / 200", "GET /odd 403"] {
        assert_eq!(
            log.lines().filter(|l| l.contains(&format!("] {line} "))).count(),
            1,
            "{line}: {log}"
        );
    }
    assert!(!log.contains("secret"), "{log}");
}

/// The nginx of front.conf, with TLS, before a store's master.
struct Front {
    nginx: Child,
    address: String,
    certificate: String,
}

impl Front {
    fn start(c: &Cluster) -> Front {
        let folder = c.folder.join("front");
        fs::create_dir(&folder).expect("its folder can be made");
        let (certificate, key) = (path(&folder, "front.pem"), path(&folder, "front.key"));
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=mkv", "-addext", &format!("subjectAltName=IP:{}", c.host)])
            .args(["-keyout", &key, "-out", &certificate])
            .output()
            .expect("openssl runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let address = format!("{}:3443", c.host);
        let conf = path(&folder, "front.conf");
        fs::write(&conf, configuration(c, &address, &certificate, &key))
            .expect("it can be written");
        let log = fs::File::create(folder.join("log")).expect("the log can be written");
        let pid = path(&folder, "pid");
        let nginx = bound_to_us("TERM")
            .args(["nginx", "-p", &path(&folder, ""), "-c", &conf, "-e", "stderr", "-g"])
            .arg(format!("daemon off; pid {pid};"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("nginx starts");
        until("the front listens", || Conn::try_open(&address).is_ok());
        Front { nginx, address, certificate }
    }

    /// Runs curl through it; gives status and headers, and the body.
    #[track_caller]
    fn curl(&self, args: &[&str], path: &str) -> (String, Vec<u8>) {
        let url = format!("https://{}{path}", self.address);
        let output = Command::new("curl")
            .args(["-sS", "--max-time", "30", "--noproxy", "*", "--cacert", &self.certificate])
            .args(["-w", "%{stderr}%{http_code} %{redirect_url} %{num_redirects}"])
            .args(args)
            .arg(url)
            .output()
            .expect("curl runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?} {path}: {said}");
        (said, output.stdout)
    }
}

impl Front {
    /// Sends bytes inside TLS; the first line that comes back.
    fn raw(&self, request: &str) -> String {
        let mut tls = bound_to_us("KILL")
            .args(["openssl", "s_client", "-quiet", "-verify_return_error"])
            .args(["-CAfile", &self.certificate, "-connect", &self.address])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl runs");
        let mut input = tls.stdin.take().expect("its input is a pipe");
        let out = std::io::BufReader::new(tls.stdout.take().expect("its output is a pipe"));
        input.write_all(request.as_bytes()).expect("openssl reads");
        let line = out.lines().next().and_then(Result::ok).unwrap_or_default();
        signal(tls.id(), Signal::KILL);
        wait(&mut tls, "openssl");
        line
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        signal(self.nginx.id(), Signal::TERM);
        if !std::thread::panicking() {
            wait(&mut self.nginx, "the front");
        }
    }
}

fn path(folder: &Path, name: &str) -> String {
    folder.join(name).to_str().expect("the temporary folder's name is text").to_string()
}

/// front.conf with its lines marked HERE set, and temporary files of its own.
fn configuration(c: &Cluster, address: &str, certificate: &str, key: &str) -> String {
    let text = fs::read_to_string("front.conf").expect("front.conf is there");
    let mut set = 0;
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let Some((directive, _)) = line.split_once("# HERE") else {
            lines.push(line.into());
            if line.starts_with("http {") {
                for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
                    lines.push(format!("{kind}_temp_path temp-{kind};"));
                }
            }
            continue;
        };
        let name = directive.trim().split(' ').next().unwrap_or_default();
        lines.push(match name {
            "server" => format!("server {};", c.address()),
            "listen" => format!("listen {address} ssl;"),
            "ssl_certificate" => format!("ssl_certificate {certificate};"),
            "ssl_certificate_key" => format!("ssl_certificate_key {key};"),
            other => panic!("front.conf: {other}"),
        });
        set += 1;
    }
    assert_eq!(set, 4, "{text}");
    lines.join("\n")
}

#[test]
fn the_front_passes_what_is_right_and_refuses_the_rest() {
    let c = Setup::new().start();
    let front = Front::start(&c);
    let value: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    let file = path(&c.folder, "value");
    fs::write(&file, &value).expect("it can be written");

    // Uploads with a length and in chunks, to a key that only an untouched target names.
    let (said, _) = front.curl(&["-T", &file, "--path-as-is"], "//a/../%2Fkey%3F");
    assert!(said.starts_with("201 "), "{said}");
    c.holds("//a/..//key?", &value);
    let (said, _) =
        front.curl(&["-X", "REPLACE", "-H", "Transfer-Encoding: chunked", "-T", &file], "/chunked");
    assert!(said.starts_with("201 "), "{said}");
    c.holds("/chunked", &value);

    // The redirect is to the volume itself, and holds what was sent.
    let (said, body) = front.curl(&["-I"], "/chunked");
    let location = c.get("/chunked").expect(302).header("Key-Volumes").map(String::from);
    let at = location.expect("it has volumes");
    assert!(said.starts_with("302 http://") && at.split(',').any(|r| said.contains(r)), "{said}");
    let headers = String::from_utf8_lossy(&body).to_ascii_lowercase();
    assert!(headers.contains("content-md5: ") && headers.contains("key-volumes: "), "{headers}");
    let (said, body) = front.curl(&["-L"], "/chunked");
    assert!(said.starts_with("200 ") && said.ends_with(" 1"), "{said}");
    same(&body, &value, "what a client reads through the front");
    let (said, _) = front.curl(&["-X", "DELETE"], "/chunked");
    assert!(said.starts_with("204 "), "{said}");
    c.lacks("/chunked");

    // What the front refuses the master never sees.
    let requests = || c.log().lines().filter(|line| line.contains("mkv::http]")).count();
    let before = requests();
    let large = format!("X-Large: {}", "a".repeat(9 << 10));
    let (said, _) = front.curl(&["-H", &large], "/head");
    assert!(said.starts_with("400 "), "{said}");
    let (said, _) = front.curl(&[], &format!("/{}", "a".repeat(9 << 10)));
    assert!(said.starts_with("414 "), "{said}");
    assert_eq!(requests(), before, "{}", c.log());
}

/// What tiny_http hides from the master means one thing only behind the front.
#[test]
fn the_front_refuses_what_the_master_cannot_see() {
    let c = Setup::new().volumes(1).start();
    let front = Front::start(&c);
    let body = "PUT /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nbad";
    let length = body.len();
    for request in [
        "GET /k HTTP/2.0\r\nHost: x\r\n\r\n".into(),
        format!("PUT /k HTTP/1.1\r\nHost: x\r\nX: y\r\n Content-Length: {length}\r\n\r\n{body}"),
        format!(
            "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \x0bchunked\r\n\r\n{length:x}\r\n{body}\r\n0\r\n\r\n"
        ),
        format!("PUT /k HTTP/1.1 x\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}"),
        format!(
            "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n+{length:x}\r\n{body}\r\n0\r\n\r\n"
        ),
    ] {
        let answer = front.raw(&request);
        let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
        let refused = status.is_some_and(|status| status.starts_with(['4', '5']));
        assert!(refused, "{}: {}", request.escape_debug(), answer.escape_debug());
        assert_eq!(c.live(), Vec::<Vec<u8>>::new(), "{}", request.escape_debug());
    }
}
