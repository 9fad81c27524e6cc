//! What the benchmarks need beside the store itself:
//!
//! - `mkv-bench delay FROM TO`: a TCP proxy on 127.0.0.1 from one port to another that delays each
//!   way by half a millisecond
//! - `mkv-bench index DIR KEYS`: an index of so many keys as the master writes them; every second
//!   one, by its last digit, is unlinked, so that a GET of it needs the index alone
//! - `mkv-bench s3 …`: a client of S3, see s3.rs

mod s3;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use mkv::format::record::{Record, State};
use mkv::index::Index;

const DELAY: Duration = Duration::from_micros(500);

/// Keys in one write of the generator.
const BATCH: u64 = 1000;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["delay", from, to] => delay(number(from), number(to)),
        ["index", folder, keys] => generate(Path::new(folder), number(keys)),
        ["s3", url, bucket, work @ ..] => s3::run(url, bucket, work),
        _ => {
            eprintln!("usage: mkv-bench delay FROM TO | mkv-bench index DIR KEYS | mkv-bench s3 URL BUCKET WORK …");
            std::process::exit(2);
        }
    }
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("\"{text}\" is not a number that fits"))
}

fn delay(from: u16, to: u16) {
    let listener = TcpListener::bind(("127.0.0.1", from)).expect("the port is free");
    for client in listener.incoming() {
        let client = client.expect("a connection");
        let server = TcpStream::connect(("127.0.0.1", to)).expect("the volume answers");
        for (from, to) in [(&client, &server), (&server, &client)] {
            from.set_nodelay(true).expect("an open socket");
            pass_on(from.try_clone().expect("a descriptor"), to.try_clone().expect("a descriptor"));
        }
    }
}

/// Carries bytes from one socket to the other, each `DELAY` after it came.
fn pass_on(mut from: TcpStream, mut to: TcpStream) {
    let (send, due) = channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let _ = send.send((Instant::now() + DELAY, buffer[..n].to_vec()));
        }
    });
    thread::spawn(move || {
        for (at, bytes) in due {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
}

fn generate(folder: &Path, keys: u64) {
    std::fs::create_dir_all(folder).expect("the folder can be made");
    let index = Index::create(&folder.join("index")).expect("it opens");
    let mut random = fastrand::Rng::with_seed(1);
    for first in (0..keys).step_by(BATCH as usize) {
        let mut batch = index.batch();
        for n in first..(first + BATCH).min(keys) {
            let record = Record {
                state: if n % 2 == 0 { State::Live } else { State::Unlinked },
                hash: Some(std::array::from_fn(|_| random.u8(..))),
                size: Some(random.u64(1 << 20..1 << 30)),
                time: Some(1_700_000_000 + n),
                version: 0,
                meta: String::new(),
                replicas: (1..=3).map(|v| format!("10.0.0.{v}:3001/sv{:02X}", n % 10)).collect(),
            };
            batch = batch.put(format!("/bench/{n:010}").as_bytes(), &record);
        }
        batch.commit().expect("it is written");
    }
    index.sync().expect("it is on disk");
    index.close();
}
