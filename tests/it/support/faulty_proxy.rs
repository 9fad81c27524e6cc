//! A proxy in front of a real volume that injects faults.
//!
//! It makes rare timing repeatable: a request still in flight, a blob published but its answer
//! lost, a volume that dies in the middle of a body.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::support::http_client::{Conn, TIMEOUT};

/// What happens to the requests of a method.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// Hold the request after its head. Nothing reaches the volume.
    HoldRequest,
    /// Hold the request after its body. Nothing reaches the volume.
    HoldWhole,
    /// Hold the volume's answer. The volume has done the work, and the master does not know.
    HoldAnswer,
    /// Read the whole request, close the connection without an answer, and hold the request. Once
    /// released, it reaches the volume late.
    PublishLate,
    /// Close both connections after this many bytes of the body.
    Cut(u64),
    /// Answer with this status after the head, and read no further.
    Answer(u16),
    /// Answer with this status after this many bytes of the body, and read no further.
    AnswerAfter(u64, u16),
    /// Delay the request for this long after its head.
    Delay(Duration),
}

/// What happens to held requests.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Verdict {
    Pass,
    Drop,
}

#[derive(Default)]
struct State {
    faults: HashMap<String, Fault>,
    /// The number of requests of each method that are held now.
    held: HashMap<String, usize>,
    /// The decisions about held requests of each method, oldest first.
    verdicts: HashMap<String, Vec<Verdict>>,
    /// The method and path of every request received.
    seen: Vec<(String, String)>,
    /// The method of every request that the volume has answered.
    answered: Vec<String>,
    /// Open connections that the proxy no longer reads.
    parked: Vec<TcpStream>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

pub struct FaultyProxy {
    shared: Arc<Shared>,
    pub address: String,
}

impl FaultyProxy {
    /// Starts a proxy at `address` for the volume at `volume`.
    pub fn start(address: &str, volume: &str) -> FaultyProxy {
        let listener = TcpListener::bind(address).expect("the proxy's address is free");
        let shared = Arc::new(Shared::default());
        let (state, volume) = (shared.clone(), volume.to_string());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (state, volume) = (state.clone(), volume.clone());
                std::thread::spawn(move || {
                    let _ = serve(&state, &client, &volume);
                    // A parked connection shares this socket and must stay open.
                    if !state.is_parked(&client) {
                        let _ = client.shutdown(Shutdown::Both);
                    }
                });
            }
        });
        FaultyProxy { shared, address: address.to_string() }
    }

    /// Applies this fault to new requests of the method.
    pub fn set(&self, method: &str, fault: Fault) {
        self.shared.lock().faults.insert(method.to_string(), fault);
    }

    /// Lets held and new requests of the method pass.
    pub fn release(&self, method: &str) {
        self.decide(method, Verdict::Pass, true);
    }

    /// Lets held requests pass, and keeps the fault for new ones.
    pub fn release_held(&self, method: &str) {
        self.decide(method, Verdict::Pass, false);
    }

    /// Lets new requests of the method pass, and keeps holding the held ones.
    pub fn let_new_pass(&self, method: &str) {
        self.shared.lock().faults.remove(method);
    }

    /// Drops held requests with their connections, and keeps the fault for new ones.
    pub fn drop_held(&self, method: &str) {
        self.decide(method, Verdict::Drop, false);
    }

    fn decide(&self, method: &str, verdict: Verdict, forget: bool) {
        let mut state = self.shared.lock();
        if forget {
            state.faults.remove(method);
        }
        state.verdicts.entry(method.to_string()).or_default().push(verdict);
        state.parked.clear();
        self.shared.changed.notify_all();
    }

    /// Removes all faults and lets all held requests pass.
    pub fn remove_faults(&self) {
        let mut state = self.shared.lock();
        let held: Vec<String> = state.held.keys().cloned().collect();
        for method in held {
            state.verdicts.entry(method).or_default().push(Verdict::Pass);
        }
        state.faults.clear();
        state.parked.clear();
        self.shared.changed.notify_all();
    }

    /// Waits until this many requests of the method are held.
    #[track_caller]
    pub fn wait_held(&self, method: &str, count: usize) {
        self.wait(&format!("{count} {method} requests are held"), |state| {
            state.held.get(method).copied().unwrap_or(0) >= count
        });
    }

    /// The number of requests of the method that are held now.
    pub fn held(&self, method: &str) -> usize {
        self.shared.lock().held.get(method).copied().unwrap_or(0)
    }

    /// Waits until the proxy has received this many requests of the method since its start.
    #[track_caller]
    pub fn wait_seen(&self, method: &str, count: usize) {
        self.wait(&format!("{count} {method} requests have arrived"), |state| {
            state.seen.iter().filter(|(m, _)| m == method).count() >= count
        });
    }

    #[track_caller]
    fn wait(&self, what: &str, condition: impl Fn(&State) -> bool) {
        let started = Instant::now();
        let mut state = self.shared.lock();
        while !condition(&state) {
            let left = TIMEOUT.saturating_sub(started.elapsed());
            if left.is_zero() {
                // Unlock before the panic: the proxy's threads need the lock.
                let text = format!("{:?}, {:?}", state.held, state.seen);
                drop(state);
                panic!("{}: after {TIMEOUT:?}, still waiting until {what}: {text}", self.address);
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// The number of requests of the method that the volume has answered, whether or not the answer
    /// was passed on.
    pub fn answered(&self, method: &str) -> usize {
        self.shared.lock().answered.iter().filter(|m| *m == method).count()
    }

    /// The paths of the method's requests, in order of arrival.
    pub fn seen(&self, method: &str) -> Vec<String> {
        let state = self.shared.lock();
        state.seen.iter().filter(|(m, _)| m == method).map(|(_, path)| path.clone()).collect()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Records a request and returns the fault that applies to it.
    fn arrive(&self, head: &Head) -> Option<Fault> {
        let mut state = self.lock();
        state.seen.push((head.method.clone(), head.path.clone()));
        self.changed.notify_all();
        state.faults.get(&head.method).copied()
    }

    /// Holds a request until the test decides about its method.
    fn hold(&self, method: &str) -> Verdict {
        let mut state = self.lock();
        let count = |state: &State| state.verdicts.get(method).map_or(0, Vec::len);
        let before = count(&state);
        *state.held.entry(method.to_string()).or_default() += 1;
        self.changed.notify_all();
        while count(&state) == before {
            state = self.changed.wait(state).unwrap();
        }
        *state.held.get_mut(method).expect("the entry exists") -= 1;
        self.changed.notify_all();
        state.verdicts[method][before]
    }

    fn park(&self, client: &TcpStream) {
        let client = client.try_clone().expect("the socket can be cloned");
        self.lock().parked.push(client);
    }

    fn is_parked(&self, client: &TcpStream) -> bool {
        let peer = client.peer_addr().ok();
        peer.is_some() && self.lock().parked.iter().any(|parked| parked.peer_addr().ok() == peer)
    }
}

/// The head of a request or an answer.
struct Head {
    raw: Vec<u8>,
    method: String,
    path: String,
    body: Length,
}

#[derive(Clone, Copy, PartialEq)]
enum Length {
    Bytes(u64),
    Chunked,
    /// Until the connection closes.
    Open,
}

/// Reads a head. Returns `None` at the end of the connection.
fn read_head(from: &mut impl BufRead, no_length: Length) -> io::Result<Option<Head>> {
    let mut raw = Vec::new();
    let mut body = no_length;
    let mut words = Vec::new();
    loop {
        let start = raw.len();
        if from.read_until(b'\n', &mut raw)? == 0 {
            return Ok(None);
        }
        let line = String::from_utf8_lossy(&raw[start..]).trim_end().to_ascii_lowercase();
        if start == 0 {
            let text = String::from_utf8_lossy(&raw);
            words = text.split_ascii_whitespace().map(String::from).collect();
        } else if line.is_empty() {
            let mut words = words.into_iter();
            let (method, path) = (words.next(), words.next());
            let (method, path) = (method.unwrap_or_default(), path.unwrap_or_default());
            return Ok(Some(Head { raw, method, path, body }));
        } else if let Some(length) = line.strip_prefix("content-length:") {
            body = Length::Bytes(length.trim().parse().map_err(io::Error::other)?);
        } else if line.strip_prefix("transfer-encoding:").is_some() {
            body = Length::Chunked;
        }
    }
}

/// Copies a body as it arrives. Fails if it ends early.
fn pass_body(from: &mut impl BufRead, to: &mut dyn Write, length: Length) -> io::Result<()> {
    match length {
        Length::Bytes(n) => pass(from, to, n),
        Length::Open => pass_all(from, to),
        Length::Chunked => loop {
            let mut line = Vec::new();
            from.read_until(b'\n', &mut line)?;
            let text = String::from_utf8_lossy(&line);
            let size = u64::from_str_radix(text.trim(), 16).map_err(io::Error::other)?;
            to.write_all(&line)?;
            pass(from, to, size + 2)?;
            if size == 0 {
                return Ok(());
            }
        },
    }
}

fn pass(from: &mut impl BufRead, to: &mut dyn Write, mut left: u64) -> io::Result<()> {
    while left > 0 {
        let bytes = from.fill_buf()?;
        if bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let n = bytes.len().min(left as usize);
        to.write_all(&bytes[..n])?;
        from.consume(n);
        left -= n as u64;
    }
    Ok(())
}

fn pass_all(from: &mut impl BufRead, to: &mut dyn Write) -> io::Result<()> {
    loop {
        let n = from.fill_buf()?.len();
        if n == 0 {
            return Ok(());
        }
        pass(from, to, n as u64)?;
    }
}

/// Serves one connection, from the master or from a client that follows a redirect.
fn serve(shared: &Arc<Shared>, client: &TcpStream, volume: &str) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut requests = BufReader::with_capacity(64 << 10, client.try_clone()?);
    while let Some(head) = read_head(&mut requests, Length::Bytes(0))? {
        let fault = shared.arrive(&head);
        let mut whole = None;
        let mut cut = None;
        let mut hold_answer = false;
        let mut verdict = Verdict::Pass;
        match fault {
            None => {}
            Some(Fault::HoldRequest) => verdict = shared.hold(&head.method),
            Some(Fault::Delay(time)) => std::thread::sleep(time),
            Some(Fault::HoldAnswer) => hold_answer = true,
            Some(Fault::Cut(bytes)) => cut = Some(bytes),
            Some(Fault::Answer(status)) => return refuse(shared, client, status),
            Some(Fault::AnswerAfter(bytes, status)) => {
                pass(&mut requests, &mut io::sink(), bytes)?;
                return refuse(shared, client, status);
            }
            Some(Fault::HoldWhole | Fault::PublishLate) => {
                let mut body = Vec::new();
                pass_body(&mut requests, &mut body, head.body)?;
                if fault == Some(Fault::PublishLate) {
                    client.shutdown(Shutdown::Both)?;
                }
                verdict = shared.hold(&head.method);
                whole = Some(body);
            }
        }
        if verdict == Verdict::Drop {
            return Ok(());
        }
        let mut to = TcpStream::connect(volume)?;
        to.set_nodelay(true)?;
        to.write_all(&head.raw)?;
        // A volume may answer before it has read the whole body.
        let (shared, method) = (shared.clone(), head.method.clone());
        let (answers, mut out) = (to.try_clone()?, client.try_clone()?);
        let answering = std::thread::spawn(move || {
            let sent = pass_answer(&shared, answers, &mut out, &method, hold_answer);
            if sent.is_err() {
                let _ = out.shutdown(Shutdown::Both);
            }
            sent
        });
        let passed = match (whole, cut) {
            (Some(body), _) => to.write_all(&body),
            (None, Some(bytes)) => {
                pass(&mut requests, &mut to, bytes).and_then(|()| Err(io::Error::other("cut by the test")))
            }
            (None, None) => pass_body(&mut requests, &mut to, head.body),
        };
        // If the volume stopped reading, its answer says why. If the body was cut short, no answer
        // will come.
        if let Err(error) = &passed
            && error.kind() != io::ErrorKind::BrokenPipe
            && error.kind() != io::ErrorKind::ConnectionReset
        {
            let _ = to.shutdown(Shutdown::Both);
        }
        answering.join().map_err(|_| io::Error::other("the thread panicked"))??;
        passed?;
    }
    Ok(())
}

/// Answers without reading the rest of the request.
fn refuse(shared: &Shared, mut client: &TcpStream, status: u16) -> io::Result<()> {
    shared.park(client);
    client.write_all(format!("HTTP/1.1 {status} Refused\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").as_bytes())
}

fn pass_answer(shared: &Shared, from: TcpStream, to: &mut TcpStream, method: &str, hold: bool) -> io::Result<()> {
    let mut from = BufReader::with_capacity(64 << 10, from);
    loop {
        let Some(mut head) = read_head(&mut from, Length::Open)? else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        // The second word of a status line is the status.
        let status = head.path.clone();
        if method == "HEAD" || status.starts_with('1') || status == "204" {
            head.body = Length::Bytes(0);
        }
        shared.lock().answered.push(method.to_string());
        if hold && shared.hold(method) == Verdict::Drop {
            return Err(io::Error::other("dropped by the test"));
        }
        to.write_all(&head.raw)?;
        pass_body(&mut from, to, head.body)?;
        if !status.starts_with('1') {
            return Ok(());
        }
    }
}

impl Drop for FaultyProxy {
    fn drop(&mut self) {
        self.remove_faults();
    }
}

/// A volume that answers every request with a description of it.
fn echo(address: &str) {
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut from = BufReader::new(client.try_clone().unwrap());
            let Ok(Some(head)) = read_head(&mut from, Length::Bytes(0)) else { continue };
            let mut body = Vec::new();
            let whole = pass_body(&mut from, &mut body, head.body).is_ok();
            let text = format!("{} {} {whole}", head.method, body.len());
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", text.len());
            let _ = client.write_all((answer + &text).as_bytes());
            let _ = client.read(&mut [0]);
        }
    });
}

#[test]
fn the_proxy_injects_the_requested_faults() {
    let (_own, host) = crate::support::cluster::reserve_address();
    let (volume, address) = (format!("{host}:3001"), format!("{host}:4001"));
    echo(&volume);
    let proxy = FaultyProxy::start(&address, &volume);
    let put = |body: &[u8]| Conn::open(&address).ask("PUT", "/x", &[], Some(body)).text();
    assert_eq!(put(b"abc"), "PUT 3 true");
    proxy.set("PUT", Fault::Answer(507));
    assert_eq!(Conn::open(&address).head("PUT", "/x", &[]).answer().status, 507);
    assert_eq!(Conn::open(&address).ask("GET", "/x", &[], None).text(), "GET 0 true");
    proxy.set("PUT", Fault::Cut(2));
    let mut conn = Conn::open(&address);
    conn.head("PUT", "/x", &[("Content-Length", "3")]).send("abc");
    assert!(conn.read_until_closed().is_empty());
    for fault in [Fault::HoldRequest, Fault::HoldWhole, Fault::HoldAnswer] {
        proxy.set("PUT", fault);
        let mut conn = Conn::open(&address);
        conn.head("PUT", "/x", &[("Content-Length", "3")]).send("abc");
        proxy.wait_held("PUT", 1);
        assert!(!conn.readable(Duration::from_millis(30)), "{fault:?}");
        proxy.release("PUT");
        assert_eq!(conn.answer().text(), "PUT 3 true", "{fault:?}");
    }
    assert_eq!(proxy.seen("GET"), ["/x"]);
}
