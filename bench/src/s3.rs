//! A client of S3 for the benchmarks: `mkv-bench s3 URL BUCKET WORK ARGUMENTS…`, with the keys in AWS_ACCESS_KEY_ID and
//! AWS_SECRET_ACCESS_KEY. It signs with SigV4 and UNSIGNED-PAYLOAD, and each of its threads keeps a connection.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hmac::{Hmac, KeyInit, Mac};
use jiff::Timestamp;
use sha2::{Digest, Sha256};

/// The size of a part of a multipart upload, in bytes.
const PART: usize = 16 << 20;

/// Requests of a HEAD and list phase: they cost less than the others.
const SHORT_PHASE: usize = 2000;

struct Endpoint {
    /// `host:port`.
    host: String,
    bucket: String,
    access: String,
    secret: String,
}

/// A connection of one thread.
struct Client<'a> {
    endpoint: &'a Endpoint,
    socket: BufReader<TcpStream>,
}

/// Runs the work that the arguments name, and prints its figures on one line.
pub fn run(url: &str, bucket: &str, work: &[&str]) {
    let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let endpoint = Endpoint {
        host: url.strip_prefix("http://").expect("the URL begins with http://").trim_end_matches('/').into(),
        bucket: bucket.into(),
        access: variable("AWS_ACCESS_KEY_ID"),
        secret: variable("AWS_SECRET_ACCESS_KEY"),
    };
    match work {
        ["bucket"] => drop(Client::open(&endpoint).ask("PUT", "", "", &[])),
        ["cycle", size, count, threads] => cycle(&endpoint, number(size), number(count), number(threads)),
        ["multipart", size, threads] => multipart(&endpoint, number(size), number(threads)),
        ["fill", count, threads] => fill(&endpoint, number(count), number(threads)),
        ["lists", count] => lists(&endpoint, number(count)),
        ["get", key, count, threads] => get(&endpoint, key, number(count), number(threads)),
        ["put", key, size] => drop(Client::open(&endpoint).ask("PUT", key, "", &random(number(size)))),
        other => panic!("unknown work {other:?}"),
    }
}

fn number(text: &str) -> usize {
    text.parse().unwrap_or_else(|_| panic!("\"{text}\" is not a number that fits"))
}

fn random(size: usize) -> Vec<u8> {
    let mut value = vec![0; size];
    fastrand::Rng::with_seed(1).fill(&mut value);
    value
}

/// Runs `act` for each number below `count`, on so many threads, and returns how long it took.
fn in_threads(endpoint: &Endpoint, count: usize, threads: usize, act: impl Fn(&mut Client, usize) + Sync) -> Duration {
    let next = AtomicUsize::new(0);
    let started = Instant::now();
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut client = Client::open(endpoint);
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= count {
                        return;
                    }
                    act(&mut client, n);
                }
            });
        }
    });
    started.elapsed()
}

/// PUT, GET, HEAD, list and DELETE of `count` objects. Prints the rate of each.
fn cycle(endpoint: &Endpoint, size: usize, count: usize, threads: usize) {
    let value = random(size);
    let key = |n: usize| format!("cycle/{size}/{n:06}");
    let rate = |count: usize, time: Duration| format!("{:.1}", count as f64 / time.as_secs_f64());
    let mut line =
        rate(count, in_threads(endpoint, count, threads, |client, n| drop(client.ask("PUT", &key(n), "", &value))));
    let read = |client: &mut Client, n: usize| assert_eq!(client.length_of("GET", &key(n), ""), size as u64);
    let _ = write!(line, " {}", rate(count, in_threads(endpoint, count, threads, read)));
    let short = SHORT_PHASE.max(count);
    let head = |client: &mut Client, n: usize| drop(client.ask("HEAD", &key(n % count), "", &[]));
    let _ = write!(line, " {}", rate(short, in_threads(endpoint, short, threads, head)));
    let pages = SHORT_PHASE / 10;
    let list = |client: &mut Client, n: usize| {
        let after = target(&key(n % count));
        let query = format!("list-type=2&max-keys=100&prefix=cycle%2F{size}%2F&start-after={after}");
        client.ask("GET", "", &query, &[]);
    };
    let _ = write!(line, " {}", rate(pages, in_threads(endpoint, pages, threads, list)));
    let delete = |client: &mut Client, n: usize| drop(client.ask("DELETE", &key(n), "", &[]));
    println!("{line} {}", rate(count, in_threads(endpoint, count, threads, delete)));
}

/// One multipart upload, and its download. Prints the MiB per second of both.
fn multipart(endpoint: &Endpoint, size: usize, threads: usize) {
    let (key, part, count) = ("multipart", random(PART), size.div_ceil(PART));
    let mut client = Client::open(endpoint);
    let started = Instant::now();
    let answer = client.ask("POST", key, "uploads=", &[]);
    let id = element(&answer, "UploadId").into_iter().next().expect("the answer has an UploadId");
    let etags: Vec<_> = (0..count).map(|_| std::sync::Mutex::new(String::new())).collect();
    in_threads(endpoint, count, threads, |client, n| {
        let size = PART.min(size - n * PART);
        *etags[n].lock().unwrap() =
            client.put_part(key, &format!("partNumber={}&uploadId={}", n + 1, target(&id)), &part[..size]);
    });
    let mut xml = String::from("<CompleteMultipartUpload>");
    for (n, etag) in etags.iter().enumerate() {
        let _ = write!(xml, "<Part><PartNumber>{}</PartNumber><ETag>{}</ETag></Part>", n + 1, etag.lock().unwrap());
    }
    let done =
        client.ask("POST", key, &format!("uploadId={}", target(&id)), (xml + "</CompleteMultipartUpload>").as_bytes());
    assert!(done.contains("CompleteMultipartUploadResult"), "{done}");
    let (written, started) = (started.elapsed(), Instant::now());
    assert_eq!(client.length_of("GET", key, ""), size as u64);
    let mib = |time: Duration| size as f64 / f64::from(1 << 20) / time.as_secs_f64();
    println!("{:.1} {:.1}", mib(written), mib(started.elapsed()));
    client.ask("DELETE", key, "", &[]);
}

/// Small objects in a hundred folders, for `lists`.
fn fill(endpoint: &Endpoint, count: usize, threads: usize) {
    in_threads(endpoint, count, threads, |client, n| {
        drop(client.ask("PUT", &format!("list/{:02}/{n:08}", n % 100), "", b"value"));
    });
}

/// Lists these objects. Prints keys per second of the whole list, pages per second of one folder, and lists per second of
/// the folders.
fn lists(endpoint: &Endpoint, count: usize) {
    let mut client = Client::open(endpoint);
    let (started, mut found, mut token) = (Instant::now(), 0, String::new());
    loop {
        let page = client.ask("GET", "", &format!("list-type=2&prefix=list%2F{token}"), &[]);
        found += element(&page, "Key").len();
        match element(&page, "NextContinuationToken").into_iter().next() {
            Some(next) => token = format!("&continuation-token={}", target(&next)),
            None => break,
        }
    }
    assert_eq!(found, count, "keys that are listed");
    let all = found as f64 / started.elapsed().as_secs_f64();
    let mut rate = |query: &dyn Fn(usize) -> String, name: &str, expected: usize| {
        let (started, mut n) = (Instant::now(), 0);
        while started.elapsed() < Duration::from_secs(2) {
            let page = client.ask("GET", "", &query(n), &[]);
            assert_eq!(element(&page, name).len(), expected, "{page}");
            n += 1;
        }
        n as f64 / started.elapsed().as_secs_f64()
    };
    let folder = rate(&|n| format!("list-type=2&prefix=list%2F{:02}%2F", n % 100), "Key", (count / 100).min(1000));
    let folders = rate(&|_| "list-type=2&prefix=list%2F&delimiter=%2F".into(), "CommonPrefixes", 100);
    println!("{all:.0} {folder:.1} {folders:.1}");
}

/// Reads one object again and again. Prints reads per second.
fn get(endpoint: &Endpoint, key: &str, count: usize, threads: usize) {
    let time = in_threads(endpoint, count, threads, |client, _| assert!(client.length_of("GET", key, "") > 0));
    println!("{:.1}", count as f64 / time.as_secs_f64());
}

/// The texts of all elements of this name.
fn element(xml: &str, name: &str) -> Vec<String> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    xml.split(&open).skip(1).filter_map(|rest| Some(rest.split_once(&close)?.0.to_string())).collect()
}

/// Percent-encodes all but unreserved characters.
fn target(text: &str) -> String {
    let mut target = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => target.push(byte.into()),
            _ => _ = write!(target, "%{byte:02X}"),
        }
    }
    target
}

impl Client<'_> {
    fn open(endpoint: &Endpoint) -> Client<'_> {
        let socket = TcpStream::connect(&endpoint.host).expect("the server accepts");
        socket.set_nodelay(true).expect("an open socket");
        Client { endpoint, socket: BufReader::with_capacity(256 << 10, socket) }
    }

    /// Sends a request, which must succeed, and returns the answer's body. `query`: encoded and sorted.
    fn ask(&mut self, method: &str, key: &str, query: &str, body: &[u8]) -> String {
        let (_, length) = self.send(method, key, query, body);
        let mut text = Vec::new();
        if method != "HEAD" {
            self.read_body(length, &mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The length of the answer's body, which is read and dropped.
    fn length_of(&mut self, method: &str, key: &str, query: &str) -> u64 {
        let (_, length) = self.send(method, key, query, &[]);
        self.read_body(length, &mut io::sink())
    }

    /// Returns the part's ETag.
    fn put_part(&mut self, key: &str, query: &str, body: &[u8]) -> String {
        let (head, length) = self.send("PUT", key, query, body);
        self.read_body(length, &mut io::sink());
        let etag = head.iter().find(|line| line.to_ascii_lowercase().starts_with("etag:"));
        etag.expect("the answer has an ETag")[5..].trim().to_string()
    }

    /// Sends a request and reads the head of the answer. The length is `None` if the body is chunked.
    fn send(&mut self, method: &str, key: &str, query: &str, body: &[u8]) -> (Vec<String>, Option<u64>) {
        let slash = if key.is_empty() { "" } else { "/" };
        let path =
            format!("/{}{slash}{}", self.endpoint.bucket, key.split('/').map(target).collect::<Vec<_>>().join("/"));
        let head = self.endpoint.head(method, &path, query, body.len());
        let out = self.socket.get_mut();
        out.write_all(head.as_bytes()).and_then(|()| out.write_all(body)).expect("the server reads the request");
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            self.socket.read_line(&mut line).expect("the server answers");
            assert!(!line.is_empty(), "the server has closed the connection");
            if line.trim().is_empty() {
                break;
            }
            lines.push(line.trim().to_string());
        }
        let value = |name: &str| {
            let found =
                lines.iter().filter_map(|line| line.split_once(':')).find(|(n, _)| n.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.trim().to_string())
        };
        let chunked = value("transfer-encoding").is_some();
        let length = value("content-length").map_or(0, |text| text.parse().expect("a length"));
        if !lines[0].contains(" 20") {
            let mut text = Vec::new();
            self.read_body((!chunked).then_some(length), &mut text);
            panic!("{method} {path}?{query}: {} {}", lines[0], String::from_utf8_lossy(&text));
        }
        (lines, (!chunked).then_some(length))
    }

    fn read_body(&mut self, length: Option<u64>, to: &mut dyn Write) -> u64 {
        let Some(length) = length else { return self.read_chunks(to) };
        io::copy(&mut (&mut self.socket).take(length), to).expect("the body comes")
    }

    fn read_chunks(&mut self, to: &mut dyn Write) -> u64 {
        let mut sum = 0;
        loop {
            let mut line = String::new();
            self.socket.read_line(&mut line).expect("a chunk comes");
            let size = u64::from_str_radix(line.trim(), 16).expect("the length of a chunk");
            sum += io::copy(&mut (&mut self.socket).take(size), to).expect("the chunk comes");
            self.socket.read_line(&mut line).expect("the end of a chunk");
            if size == 0 {
                return sum;
            }
        }
    }
}

impl Endpoint {
    /// The head of a signed request.
    fn head(&self, method: &str, path: &str, query: &str, length: usize) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs();
        let date =
            Timestamp::from_second(now as i64).expect("a time of this era").strftime("%Y%m%dT%H%M%SZ").to_string();
        let scope = format!("{}/us-east-1/s3/aws4_request", &date[..8]);
        let names = "host;x-amz-content-sha256;x-amz-date";
        let mut pairs: Vec<&str> = query.split('&').collect();
        pairs.sort_unstable();
        let canonical = format!(
            "{method}\n{path}\n{}\nhost:{}\nx-amz-content-sha256:UNSIGNED-PAYLOAD\nx-amz-date:{date}\n\n{names}\nUNSIGNED-PAYLOAD",
            pairs.join("&"),
            self.host
        );
        let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", hex(&Sha256::digest(canonical)));
        let key = scope.split('/').fold(format!("AWS4{}", self.secret).into_bytes(), |key, word| hmac(&key, word));
        let signature = hex(&hmac(&key, &text));
        let mark = if query.is_empty() { "" } else { "?" };
        format!(
            "{method} {path}{mark}{query} HTTP/1.1\r\nHost: {}\r\nx-amz-date: {date}\r\nx-amz-content-sha256: UNSIGNED-PAYLOAD\r\n\
             Authorization: AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={names}, Signature={signature}\r\n\
             Content-Length: {length}\r\n\r\n",
            self.host, self.access
        )
    }
}

fn hmac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("a key of any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
