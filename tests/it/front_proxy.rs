//! The nginx of front.conf in front of a master.

use std::fs;
use std::io::{BufRead, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;

use crate::support::cluster::{Cluster, Setup, assert_same_bytes, child_command, signal, wait};
use crate::support::faulty_proxy::{Fault, FaultyProxy};
use crate::support::http_client::{Conn, wait_until};

/// The nginx of front.conf, with TLS, in front of a master.
pub struct FrontProxy {
    nginx: Child,
    address: String,
    /// The address of its S3.
    pub s3: String,
    certificate: String,
}

impl FrontProxy {
    pub fn start(c: &Cluster) -> FrontProxy {
        let folder = c.folder.join("front");
        fs::create_dir(&folder).expect("the proxy's folder can be created");
        let (certificate, key) = (file_path(&folder, "front.pem"), file_path(&folder, "front.key"));
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=mkv", "-addext", &format!("subjectAltName=IP:{}", c.host)])
            .args(["-keyout", &key, "-out", &certificate])
            .output()
            .expect("openssl runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let (address, s3) = (format!("{}:3443", c.host), format!("{}:9443", c.host));
        let conf = file_path(&folder, "front.conf");
        fs::write(&conf, front_configuration(c, [&address, &s3], &certificate, &key)).expect("the file can be written");
        let log = fs::File::create(folder.join("log")).expect("the log can be written");
        let pid = file_path(&folder, "pid");
        let nginx = child_command("TERM")
            .args(["nginx", "-p", &file_path(&folder, ""), "-c", &conf, "-e", "stderr", "-g"])
            .arg(format!("daemon off; pid {pid};"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("nginx starts");
        wait_until("the front proxy listens", || Conn::try_open(&address).is_ok());
        FrontProxy { nginx, address, s3, certificate }
    }

    /// Runs curl through the proxy. Returns status and redirect data, and the body.
    #[track_caller]
    fn curl(&self, args: &[&str], path: &str) -> (String, Vec<u8>) {
        self.curl_at(&self.address, args, path)
    }

    /// The same at one of the proxy's addresses.
    #[track_caller]
    pub fn curl_at(&self, address: &str, args: &[&str], path: &str) -> (String, Vec<u8>) {
        let url = format!("https://{address}{path}");
        let output = Command::new("curl")
            .args(["-sS", "--max-time", "30", "--noproxy", "*", "--cacert", &self.certificate])
            .args(["-w", "%{stderr}%{http_code} %{redirect_url} %{num_redirects}"])
            .args(args)
            .arg(url)
            .output()
            .expect("curl runs");
        let status = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?} {path}: {status}");
        (status, output.stdout)
    }
}

impl FrontProxy {
    /// Sends raw bytes inside TLS, and returns the first line of the answer.
    fn send_raw(&self, request: &str) -> String {
        let mut tls = child_command("KILL")
            .args(["openssl", "s_client", "-quiet", "-verify_return_error"])
            .args(["-CAfile", &self.certificate, "-connect", &self.address])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl runs");
        let mut input = tls.stdin.take().expect("stdin is a pipe");
        let out = std::io::BufReader::new(tls.stdout.take().expect("stdout is a pipe"));
        input.write_all(request.as_bytes()).expect("openssl reads");
        let line = out.lines().next().and_then(Result::ok).unwrap_or_default();
        signal(tls.id(), Signal::KILL);
        wait(&mut tls, "openssl");
        line
    }
}

impl Drop for FrontProxy {
    fn drop(&mut self) {
        signal(self.nginx.id(), Signal::TERM);
        if !std::thread::panicking() {
            wait(&mut self.nginx, "the front");
        }
    }
}

pub fn file_path(folder: &Path, name: &str) -> String {
    folder.join(name).to_str().expect("the temporary folder's name is UTF-8").to_string()
}

/// front.conf with its lines marked HERE and those of S3 filled in, and with its own temporary folders.
fn front_configuration(c: &Cluster, [address, s3]: [&str; 2], certificate: &str, key: &str) -> String {
    let text = fs::read_to_string("deploy/front.conf").expect("deploy/front.conf exists");
    let mut set = 0;
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let Some((directive, _)) = line.split_once("# HERE") else {
            let line = line.replace("127.0.0.1:9000", &c.s3_address());
            lines.push(line.replace("# listen 9443 ssl;", &format!("listen {s3} ssl;")));
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
fn the_front_proxy_passes_valid_requests_and_refuses_oversized_ones() {
    let c = Setup::new().start();
    let front = FrontProxy::start(&c);
    let value: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    let file = file_path(&c.folder, "value");
    fs::write(&file, &value).expect("the file can be written");

    // Uploads with a length and in chunks, to a key that survives only if nginx does not normalize
    // the target.
    let (status, _) = front.curl(&["-T", &file, "--path-as-is"], "//a/../%2Fkey%3F");
    assert!(status.starts_with("201 "), "{status}");
    c.assert_value("//a/..//key?", &value);
    let (status, _) = front.curl(&["-X", "REPLACE", "-H", "Transfer-Encoding: chunked", "-T", &file], "/chunked");
    assert!(status.starts_with("201 "), "{status}");
    c.assert_value("/chunked", &value);

    // The redirect points to the volume itself.
    let (status, body) = front.curl(&["-I"], "/chunked");
    let location = c.get("/chunked").expect(302).header("Key-Volumes").map(String::from);
    let volumes = location.expect("the answer has Key-Volumes");
    assert!(status.starts_with("302 http://") && volumes.split(',').any(|r| status.contains(r)), "{status}");
    let headers = String::from_utf8_lossy(&body).to_ascii_lowercase();
    assert!(headers.contains("content-md5: ") && headers.contains("key-volumes: "), "{headers}");
    let (status, body) = front.curl(&["-L"], "/chunked");
    assert!(status.starts_with("200 ") && status.ends_with(" 1"), "{status}");
    assert_same_bytes(&body, &value, "the value that a client reads through the proxy");
    let (status, _) = front.curl(&["-X", "DELETE"], "/chunked");
    assert!(status.starts_with("204 "), "{status}");
    c.assert_absent("/chunked");

    // Requests that the proxy refuses do not reach the master.
    let requests = || c.log().lines().filter(|line| line.contains("mkv::api::handlers]")).count();
    let before = requests();
    let large = format!("X-Large: {}", "a".repeat(9 << 10));
    let (status, _) = front.curl(&["-H", &large], "/head");
    assert!(status.starts_with("400 "), "{status}");
    let (status, _) = front.curl(&[], &format!("/{}", "a".repeat(9 << 10)));
    assert!(status.starts_with("414 "), "{status}");
    assert_eq!(requests(), before, "{}", c.log());
}

#[test]
fn the_front_proxy_refuses_malformed_requests() {
    let c = Setup::new().volumes(1).start();
    let front = FrontProxy::start(&c);
    let body = "PUT /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nbad";
    let length = body.len();
    for request in [
        "GET /k HTTP/2.0\r\nHost: x\r\n\r\n".into(),
        format!("PUT /k HTTP/1.1\r\nHost: x\r\nX: y\r\n Content-Length: {length}\r\n\r\n{body}"),
        format!(
            "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \x0bchunked\r\n\r\n{length:x}\r\n{body}\r\n0\r\n\r\n"
        ),
        format!("PUT /k HTTP/1.1 x\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}"),
        format!("PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n+{length:x}\r\n{body}\r\n0\r\n\r\n"),
    ] {
        let answer = front.send_raw(&request);
        let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
        let refused = status.is_some_and(|status| status.starts_with(['4', '5']));
        assert!(refused, "{}: {}", request.escape_debug(), answer.escape_debug());
        assert_eq!(c.live(), Vec::<Vec<u8>>::new(), "{}", request.escape_debug());
    }
}

/// A store with -accel whose volumes are private, behind proxies that can fail.
fn private_store() -> Cluster {
    Setup::new().secret().proxied().flags(&["-accel"]).start()
}

#[test]
fn the_front_proxy_streams_values_of_private_volumes() {
    let c = private_store();
    let front = FrontProxy::start(&c);
    let value: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    let file = file_path(&c.folder, "value");
    fs::write(&file, &value).expect("the file can be written");
    front.curl(&["-T", &file, "--path-as-is"], "//été/..%2F%3F");
    let get = |args: &[&str]| front.curl(&[&["--path-as-is"], args].concat(), "//été/..%2F%3F");
    let (status, body) = get(&[]);
    assert!(status.starts_with("200  0"), "{status}");
    assert_same_bytes(&body, &value, "the value that a client reads through the front");

    let (status, head) = get(&["-I"]);
    let head = String::from_utf8(head).unwrap();
    let fields: Vec<(&str, &str)> = head.lines().filter_map(|line| line.split_once(": ")).collect();
    let field = |name: &str| fields.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim());
    assert!(status.starts_with("200 "), "{status}");
    assert_eq!(field("content-length"), Some("3000000"));
    assert_eq!(field("accept-ranges"), Some("bytes"));
    let md5 = field("content-md5").expect("the answer has the value's md5");
    let etag = format!("\"{md5}\"");
    assert_eq!(field("etag"), Some(etag.as_str()));
    let modified = field("last-modified").expect("the answer has a time");
    for private in ["location", "key-volumes", "x-mkv", "x-accel", &c.host] {
        assert!(!head.to_ascii_lowercase().contains(private), "{private}: {head}");
    }

    let (status, body) = get(&["-r", "1000000-1000999"]);
    assert!(status.starts_with("206 ") && body == value[1_000_000..1_001_000], "{status}");
    assert!(get(&["-r", "3000000-"]).0.starts_with("416 "));
    let (none_match, range) = (format!("If-None-Match: {etag}"), "Range: bytes=0-9");
    for (headers, expected, length) in [
        (vec![none_match.as_str()], 304, 0),
        (vec!["If-None-Match: \"other\""], 200, value.len()),
        (vec![&format!("If-Modified-Since: {modified}")], 304, 0),
        (vec!["If-Modified-Since: Tue, 14 Nov 2023 22:13:20 GMT"], 200, value.len()),
        (vec!["If-Match: \"other\""], 412, 0),
        (vec![&format!("If-Range: {etag}"), range], 206, 10),
        (vec!["If-Range: \"other\"", range], 200, value.len()),
        // What a client says of its own accord changes nothing.
        (vec!["X-Mkv-Failed: x", "X-Mkv-Front: 2", "X-Mkv-Blob: 127.0.0.1:1/x", "Connection: close"], 200, value.len()),
    ] {
        let args: Vec<&str> = headers.iter().flat_map(|header| ["-H", header]).collect();
        let (status, body) = get(&args);
        assert!(status.starts_with(&expected.to_string()), "{headers:?}: {status}");
        assert_eq!(body.len(), length, "{headers:?}");
    }
    // Requests that did not come through the front get a redirect; missing keys, lists and errors pass as they are.
    c.assert_value("//été/../?", &value);
    assert!(front.curl(&[], "/none").0.starts_with("404 "));
    assert!(front.curl(&[], "/?list").1.starts_with(b"{\"next\""));
}

#[test]
fn the_front_proxy_reads_another_replica_when_a_volume_fails() {
    let mut c = private_store();
    let front = FrontProxy::start(&c);
    c.put("/k", "value").expect(201);
    // Two volumes answer HEAD, and fail when the blob itself is read.
    for status in [500, 404, 403] {
        c.proxies[1..].iter().for_each(|proxy| proxy.set("GET", Fault::Answer(status)));
        for n in 0..4 {
            let args = if n % 2 == 0 { vec![] } else { vec!["-r", "0-"] };
            let (answer, body) = front.curl(&args, "/k");
            assert!(answer.starts_with('2') && body == b"value", "{status}: {answer}");
        }
    }
    // A volume dies before the first byte of its answer.
    let asked = |proxy: &FaultyProxy| proxy.seen("GET").len();
    let before: Vec<usize> = c.proxies.iter().map(asked).collect();
    c.each_proxy(|proxy| proxy.set("GET", Fault::HoldRequest));
    std::thread::scope(|scope| {
        let read = scope.spawn(|| front.curl(&[], "/k"));
        let is_asked = |n: &usize| asked(&c.proxies[*n]) > before[*n];
        wait_until("a volume is asked for the blob", || (0..3).any(|n| is_asked(&n)));
        for n in 0..3 {
            if is_asked(&n) { c.proxies[n].drop_held("GET") } else { c.proxies[n].release("GET") }
        }
        assert_eq!(read.join().expect("curl runs").1, b"value");
    });
    c.each_proxy(|proxy| proxy.set("GET", Fault::Answer(500)));
    // Every replica fails: an error that says so, and the value is back once one of them is.
    let (status, body) = front.curl(&[], "/k");
    assert!(status.starts_with("503 ") && String::from_utf8_lossy(&body).contains("front"), "{status}");
    c.each_proxy(|proxy| proxy.remove_faults());
    c.volumes[0].kill();
    for _ in 0..4 {
        assert_eq!(front.curl(&[], "/k").1, b"value");
    }
}
