//! The nginx of front.conf in front of a master.

use std::fs;
use std::io::{BufRead, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;

use crate::support::cluster::{Cluster, Setup, bound_to_us, same, signal, wait};
use crate::support::http_client::{Conn, until};

/// The nginx of front.conf, with TLS, in front of a master.
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

    /// Runs curl through the proxy. Returns status and redirect data, and the body.
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
    /// Sends raw bytes inside TLS, and returns the first line of the answer.
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

/// front.conf with its lines marked HERE filled in, and with its own temporary folders.
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

    // Uploads with a length and in chunks, to a key that survives only if nginx does not normalize
    // the target.
    let (said, _) = front.curl(&["-T", &file, "--path-as-is"], "//a/../%2Fkey%3F");
    assert!(said.starts_with("201 "), "{said}");
    c.holds("//a/..//key?", &value);
    let (said, _) =
        front.curl(&["-X", "REPLACE", "-H", "Transfer-Encoding: chunked", "-T", &file], "/chunked");
    assert!(said.starts_with("201 "), "{said}");
    c.holds("/chunked", &value);

    // The redirect points to the volume itself.
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

    // Requests that the proxy refuses do not reach the master.
    let requests = || c.log().lines().filter(|line| line.contains("mkv::http]")).count();
    let before = requests();
    let large = format!("X-Large: {}", "a".repeat(9 << 10));
    let (said, _) = front.curl(&["-H", &large], "/head");
    assert!(said.starts_with("400 "), "{said}");
    let (said, _) = front.curl(&[], &format!("/{}", "a".repeat(9 << 10)));
    assert!(said.starts_with("414 "), "{said}");
    assert_eq!(requests(), before, "{}", c.log());
}

/// tiny_http hides some malformed requests from the master. The front proxy refuses them.
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
