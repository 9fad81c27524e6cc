//! Several clients of the S3 endpoint at one key.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::cluster::{Setup, assert_same_bytes};
use crate::support::faulty_proxy::Fault;
use crate::support::http_client::{Conn, wait_until};
use crate::support::reference;
use crate::support::s3::{AwsChunked, store};

/// Runs this in so many threads at once.
fn at_once<T: Send>(count: usize, act: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let barrier = std::sync::Barrier::new(count);
    thread::scope(|scope| {
        let run = |n| {
            let (barrier, act) = (&barrier, &act);
            scope.spawn(move || {
                barrier.wait();
                act(n)
            })
        };
        let threads: Vec<_> = (0..count).map(run).collect();
        threads.into_iter().map(|thread| thread.join().expect("the thread does not panic")).collect()
    })
}

#[test]
fn of_eight_creators_one_wins() {
    let (mut c, s3) = store(Setup::new());
    let mut clients = vec![s3.clone()];
    if c.postgres.is_some() {
        // Two masters, each with half of the writers.
        c.others = vec![c.start_another(&["-s3", "3901"])];
        clients.push(s3.at(&format!("{}:3901", c.host)));
    }
    for round in 0..10 {
        let path = format!("/bucket/{round}");
        let create = |n: usize| {
            let s3 = &clients[n % clients.len()];
            let body = vec![b'0' + n as u8; [10, 300_000][round % 2]];
            s3.request("PUT", &path).header("If-None-Match", "*").body(body).send()
        };
        let answers = at_once(8, create);
        let winners: Vec<usize> = (0..8).filter(|n| answers[*n].status == 200).collect();
        assert_eq!(winners.len(), 1, "{:?}", answers.iter().map(|answer| answer.status).collect::<Vec<_>>());
        for answer in answers.iter().filter(|answer| answer.status != 200) {
            assert!(["PreconditionFailed", "ConditionalRequestConflict"].contains(&answer.element("Code").as_str()));
        }
        let value = s3.get(&path).expect(200);
        assert!(value.body.iter().all(|byte| *byte == b'0' + winners[0] as u8));
        // Of eight who replace what they have seen, one does.
        let swap = |n: usize| {
            let request = clients[n % clients.len()].request("PUT", &path).header("If-Match", value.etag());
            request.body(format!("swapped by {n}")).send().status
        };
        let statuses = at_once(8, swap);
        assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
        assert!(statuses.iter().all(|status| [200, 409, 412].contains(status)), "{statuses:?}");
        let winner = statuses.iter().position(|status| *status == 200).unwrap();
        assert_eq!(s3.get(&path).text(), format!("swapped by {winner}"));
    }
    let missing = s3.request("PUT", "/bucket/none").header("If-Match", "\"x\"").body("v").send();
    assert!([404, 412].contains(&missing.status), "{}", missing.text());
    s3.get("/bucket/none").expect_code(404, "NoSuchKey");
    // DELETE has conditions, too.
    s3.request("DELETE", "/bucket/0").header("If-Match", "\"x\"").send().expect_code(412, "PreconditionFailed");
    let etag = s3.get("/bucket/0").expect(200).etag();
    s3.request("DELETE", "/bucket/0").header("If-Match", etag).send().expect(204);
    s3.get("/bucket/0").expect_code(404, "NoSuchKey");
}

#[test]
fn a_stalled_put_is_passed_by_others() {
    let (c, s3) = store(Setup::new());
    let path = "/bucket/k";
    let put = |body: &str| s3.request("PUT", path).body(body);
    let (head, _) = put("a stalled value").bytes();
    let mut stalled = Conn::open(&s3.address);
    stalled.send(head).send("a stalled");
    let mut conditional = s3.request("PUT", path).header("If-None-Match", "*").body("conditional").start();
    conditional.send("condi");
    wait_until("both are under way", || c.keys_with_debris() == [path.as_bytes()]);
    thread::sleep(Duration::from_millis(50));
    put("first").send().expect(200);
    assert_eq!(s3.get(path).expect(200).text(), "first");
    s3.ask("DELETE", path).expect(204);
    put("second").send().expect(200);
    s3.multipart(path, &[b"third"]);
    assert_eq!(s3.get(path).expect(200).text(), "third");
    // The native API keeps its 409 among native writers, and sees what S3 wrote.
    c.put(path, "native").expect(403);
    conditional.send("tional").answer().expect_code(412, "PreconditionFailed");
    // The last flip wins.
    stalled.send(" value").answer().expect(200);
    assert_eq!(s3.get(path).expect(200).text(), "a stalled value");
    c.assert_value(path, "a stalled value");
    // A stalled one whose client goes away leaves nothing.
    let (head, _) = put("another").bytes();
    let mut gone = Conn::open(&s3.address);
    gone.send(head).send("ano");
    wait_until("it is under way", || !c.keys_with_debris().is_empty());
    drop(gone);
    c.wait_until_cleaned();
    assert_eq!(s3.get(path).expect(200).text(), "a stalled value");
}

#[test]
fn the_cleaner_leaves_writes_under_way_alone() {
    let (c, s3) = store(Setup::new().proxied());
    let path = "/bucket/k";
    // Its blobs are stored; the answer of one volume is held, so it does not flip yet.
    let held = &c.proxies[c.holder(path, 1)];
    held.set("PUT", Fault::HoldAnswer);
    let (head, body) = s3.request("PUT", path).body("under way").bytes();
    let mut conn = Conn::open(&s3.address);
    conn.send([head, body].concat());
    held.wait_held("PUT", 1);
    held.let_new_pass("PUT");
    for n in 0..5 {
        s3.put(path, format!("value {n}")).expect(200);
        s3.ask("DELETE", path).expect(204);
    }
    c.put("/bucket/other", "value").expect(201);
    c.ask("DELETE", "/bucket/other").expect(204);
    thread::sleep(Duration::from_millis(500));
    held.release("PUT");
    conn.answer().expect(200);
    c.assert_value(path, "under way");
}

/// A value that says throughout which one it is.
fn numbered(n: usize) -> Vec<u8> {
    let length = [10, 70_000, 1_200_000][n % 3];
    format!("<{n}>").into_bytes().into_iter().cycle().take(length).collect()
}

#[test]
fn every_reader_gets_one_whole_version() {
    let (c, s3) = store(Setup::new().replicas(2));
    let path = "/bucket/k";
    s3.put(path, numbered(0)).expect(200);
    let (stop, reads, flipped) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let read = |n: usize| {
        while !stop.load(Ordering::SeqCst) {
            let oldest = flipped.load(Ordering::SeqCst);
            let answer = s3.get(path);
            assert_eq!(answer.status, 200, "{}", answer.text());
            let text = String::from_utf8_lossy(&answer.body[1..answer.body.len().min(12)]).into_owned();
            let number: usize =
                text.split('>').next().unwrap().parse().unwrap_or_else(|_| panic!("reader {n}: {text}"));
            assert!(number >= oldest, "reader {n} got {number} after {oldest}");
            assert_same_bytes(&answer.body, &numbered(number), "a reader's version");
            let parts = crate::s3_multipart::parts_etag(&[&answer.body]);
            assert!(answer.etag() == parts || answer.etag().trim_matches('"') == reference::md5(&answer.body));
            reads.fetch_add(1, Ordering::SeqCst);
        }
    };
    thread::scope(|scope| {
        // Readers end also if the writer panics.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let _end = End(&stop);
        for n in 0..16 {
            scope.spawn(move || read(n));
        }
        let started = std::time::Instant::now();
        let mut n = 0;
        while started.elapsed() < Duration::from_secs(4) {
            n += 1;
            let value = numbered(n);
            match n % 4 {
                0 => drop(c.replace(path, &value).expect(201)),
                1 => drop(s3.multipart(path, &[&value])),
                2 => {
                    let chunked = AwsChunked { signed: true, sizes: vec![65536], ..AwsChunked::default() };
                    s3.request("PUT", path).body(&value).aws_chunked(chunked).send().expect(200);
                }
                _ => drop(s3.put(path, &value).expect(200)),
            }
            flipped.store(n, Ordering::SeqCst);
        }
        println!("{n} versions, {} reads", reads.load(Ordering::SeqCst));
        assert!(n > 5 && reads.load(Ordering::SeqCst) > 50);
    });
}

#[test]
fn parts_are_sent_at_once() {
    let (c, s3) = store(Setup::new().replicas(2));
    let upload = s3.create_upload("/bucket/k");
    let part = |n: usize| vec![b'a' + n as u8; (5 << 20) + n];
    let etags = at_once(6, |n| s3.put_part("/bucket/k", &upload, n + 1, part(n)));
    // The same part twice at once: one of them is kept.
    let same = at_once(2, |n| s3.put_part("/bucket/k", &upload, 6, part(n)));
    let listed = s3.query("GET", "/bucket/k", &format!("uploadId={upload}"), "").expect(200).elements("ETag");
    assert_eq!((listed.len(), same.contains(&listed[5])), (6, true), "{listed:?}");
    let mut chosen: Vec<_> = (1..).zip(etags).collect();
    chosen[5].1 = listed[5].clone();
    // Complete twice at once.
    let answers = at_once(2, |_| s3.complete("/bucket/k", &upload, &chosen));
    let done: Vec<_> =
        answers.iter().filter(|answer| answer.text().contains("CompleteMultipartUploadResult")).collect();
    assert!(!done.is_empty(), "{answers:?}");
    let last = part(same.iter().position(|etag| *etag == listed[5]).unwrap());
    let value: Vec<u8> = (0..5).flat_map(part).chain(last).collect();
    c.assert_value("/bucket/k", &value);
    assert_eq!(s3.get("/bucket/k").expect(200).etag(), done[0].element("ETag"));
}

#[test]
fn uploads_of_one_part_survive_a_busy_cleaner() {
    let (c, s3) = store(Setup::new().replicas(2));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // Debris keeps the cleaner at work: it looks at entries that change before it comes to them.
        for n in 0..2 {
            let (s3, stop) = (&s3, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    s3.put(format!("/bucket/busy/{n}"), "value").expect(200);
                    s3.ask("DELETE", format!("/bucket/busy/{n}")).expect(204);
                }
            });
        }
        let write = |client: usize| {
            for n in 0..60 {
                let (path, value) = (format!("/bucket/{client}"), format!("{client} {n}"));
                s3.multipart(&path, &[value.as_bytes()]);
                assert_eq!(s3.get(&path).expect(200).text(), value);
            }
        };
        let written = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| at_once(4, write)));
        stop.store(true, Ordering::SeqCst);
        written.expect("every value can be read");
    });
    for client in 0..4 {
        c.assert_value(format!("/bucket/{client}"), format!("{client} 59"));
    }
}
