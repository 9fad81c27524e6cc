//! `GET /?status`: the page for operators.
//!
//! - `page.html`: the page, with its style and its script
//! - `html.rs`: the view that fills the page, as HTML and as JSON
//! - this file: what the view shows
//!
//! The page works without JavaScript; its script only refreshes it. Nothing is loaded from elsewhere, and the
//! Content-Security-Policy allows nothing else. No secret is shown: `-userpass` is not among the flags.

mod html;

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::health::{Health, NEARLY_FULL, VolumeHealth};
use super::metrics::Gauges;
use super::route::Browse;
use super::samples::{EVERY, KEPT, Samples, Totals};
use super::status::KINDS;
use super::text;
use crate::error::{Error, Result};
use crate::format::record::State;
use crate::format::time::readable;
use crate::format::{percent_encoded, shown, unshown};
use crate::index::scrub::Scrub;
use crate::store::stats::{SizeAmount, Stats};
use crate::store::{Detail, Store, now};
use crate::volumes::space::Disk;
use html::{Cell, Chart, Line, View, chart};

/// Keys on a page of the browser.
const KEYS: usize = 30;

/// How many prefixes are shown.
const PREFIXES: usize = 10;

/// A disk with a smaller free part than this is marked.
const FILLS_UP: f64 = 0.1;

/// Words a number.
type Word<'a> = &'a dyn Fn(f64) -> String;

/// What the page shows beside the keys.
pub struct Figures<'a> {
    pub health: Arc<Health>,
    pub gauges: Gauges,
    /// `None`: not counted yet.
    pub stats: Option<Arc<Stats>>,
    pub samples: &'a Samples,
    pub totals: Totals,
    /// Seconds since the start.
    pub uptime: u64,
    pub flags: &'a [(String, String)],
}

/// The whole page, and its Content-Security-Policy.
pub fn page(store: &Store, figures: &Figures, browse: &Browse) -> Result<(String, String)> {
    let nonce = nonce()?;
    let mut view = figures.view();
    let keys = keys(store, browse)?;
    view.texts.extend(keys.texts);
    view.rows.extend(keys.rows);
    view.next = keys.next;
    let flag = |(name, value): &(String, String)| vec![Cell::text(format!("-{name}")), Cell::text(value)];
    view.rows.insert("flags", figures.flags.iter().map(flag).collect());
    let policy = format!(
        "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    );
    Ok((view.html(&nonce), policy))
}

/// A number that a foreign script cannot guess.
fn nonce() -> Result<String> {
    let mut bytes = [0; 16];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|e| Error::Failed(format!("/dev/urandom cannot be read: {e}")))?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

/// What the script takes every few seconds, as JSON.
pub fn figures_json(figures: &Figures) -> String {
    json(&figures.view())
}

/// A page of keys, as JSON.
pub fn keys_json(store: &Store, browse: &Browse) -> Result<String> {
    Ok(json(&keys(store, browse)?))
}

fn json(view: &View) -> String {
    serde_json::to_string(view).unwrap_or_default()
}

impl Figures<'_> {
    fn view(&self) -> View {
        let mut view = View::default();
        self.add_state(&mut view);
        self.add_store(&mut view);
        self.add_charts(&mut view);
        let volumes = self.health.volumes.iter().map(|volume| self.volume(volume)).collect();
        view.rows.insert("volumes", volumes);
        view.rows.insert("errors", self.errors());
        let prefixes = self.stats.iter().flat_map(|stats| &stats.prefixes).take(PREFIXES).map(|prefix| {
            let text = shown(&unshown(&prefix.prefix));
            let link = Line { h: Some(browse_url(&text, None)), ..Line::text(text, "") };
            let (keys, bytes) = (text::number(prefix.all.keys), text::bytes(prefix.all.bytes as f64));
            vec![Cell { k: "k", l: vec![link] }, Cell::number(keys), Cell::number(bytes)]
        });
        view.rows.insert("prefixes", prefixes.collect());
        view.rows.insert("sizes", self.sizes());
        view
    }

    /// What is wrong, in one line.
    fn add_state(&self, view: &mut View) {
        let all = self.health.volumes.len();
        let down = self.health.volumes.iter().filter(|volume| volume.problem.is_some()).count();
        let warnings = self.health.warnings();
        let (state, headline) = match (&self.health.index, down, warnings.first()) {
            (Some(problem), ..) => ("bad", problem.clone()),
            (None, 1.., _) => ("bad", format!("{down} of {all} volumes down")),
            (None, 0, Some(warning)) => ("warn", warning.clone()),
            (None, 0, None) if all == 1 => ("ok", "The volume answers".into()),
            (None, 0, None) => ("ok", format!("All {all} volumes answer")),
        };
        let title = if state == "ok" { "mkv".into() } else { format!("mkv: {headline}") };
        let version = format!("mkv {}", env!("CARGO_PKG_VERSION"));
        let (uptime, time) = (text::duration(self.uptime), readable(now()));
        view.state = state;
        view.texts.extend([("headline", headline), ("title", title)]);
        view.texts.extend([("version", version), ("uptime", uptime), ("time", time)]);
    }

    fn add_store(&self, view: &mut View) {
        let Gauges { debris, locked, keys, scrub, connections, .. } = &self.gauges;
        let counted = self.stats.as_deref().map(|stats| format!("counted {}", text::ago(stats.time, now())));
        let unlinked = self.stats.as_deref().map_or(0, |stats| stats.unlinked.keys);
        let mut keys_note = "an estimate".to_string();
        if let (Some(stats), Some(counted)) = (self.stats.as_deref(), &counted) {
            keys_note += &format!("; {} {counted}", text::number(stats.all.keys));
        }
        if unlinked > 0 {
            keys_note += &format!(", {} unlinked", text::number(unlinked));
        }
        let bytes = self.stats.as_deref().map_or("–".into(), |stats| text::bytes(stats.all.bytes as f64));
        let bytes_note = counted.map_or("being counted".into(), |_| "of values, without replicas".into());
        let debris_note = if *debris == 0 { "nothing to delete" } else { "blobs to delete or being written" };
        let (scrub, scrub_note) = scrub_texts(scrub.as_ref());
        view.texts.extend([
            ("keys-count", text::number(*keys)),
            ("keys-note", keys_note),
            ("bytes", bytes),
            ("bytes-note", bytes_note),
            ("debris", text::number(*debris)),
            ("debris-note", debris_note.into()),
            ("scrub", scrub),
            ("scrub-note", scrub_note),
            ("connections", text::number(*connections)),
            ("locks", format!("{} being written", text::count(*locked, "key"))),
        ]);
    }

    fn add_charts(&self, view: &mut View) {
        let totals = self.samples.totals();
        let uploads: Vec<f64> = totals.iter().skip(1).map(|sample| sample.uploads as f64).collect();
        let bytes_a_second = |n: f64| format!("{}/s", text::bytes(n));
        let a_second = |n: f64| format!("{}/s", text::rate(n));
        let charts: [(_, _, _, _, Word); 4] = [
            ("requests", "requests-now", "requests-top", rates(&totals, |t| t.requests), &a_second),
            ("received", "received-now", "received-top", rates(&totals, |t| t.received), &bytes_a_second),
            ("sent", "sent-now", "sent-top", rates(&totals, |t| t.sent), &bytes_a_second),
            ("uploads", "uploads-now", "uploads-top", uploads, &|n| text::number(n as u64)),
        ];
        for (name, now, top, values, word) in charts {
            let most = values.iter().copied().fold(0.0, f64::max);
            view.texts
                .extend([(now, word(values.last().copied().unwrap_or(0.0))), (top, format!("at most {}", word(most)))]);
            view.charts.insert(name, chart(&values, KEPT - 1));
        }
        // The value of this moment, as it is the one that a reader compares with.
        view.texts.insert("uploads-now", text::number(self.totals.uploads));
    }

    fn volume(&self, volume: &VolumeHealth) -> Vec<Cell> {
        let state = match &volume.problem {
            None => vec![Line::text("up", "ok")],
            Some(problem) => vec![Line::text("down", "bad"), Line::text(problem, "m")],
        };
        let amount = self.stats.as_deref().and_then(|stats| stats.volumes.get(&volume.name));
        let unknown = || if self.stats.is_some() { "0".to_string() } else { "–".into() };
        let replicas = amount.map_or_else(unknown, |amount| text::number(amount.all.keys));
        let bytes = amount.map_or_else(unknown, |amount| text::bytes(amount.all.bytes as f64));
        let snapshot = self.gauges.volumes.iter().find(|snapshot| snapshot.name == volume.name);
        let latency = snapshot.map(|snapshot| self.samples.latency(snapshot));
        let quantile = |part| latency.as_ref().and_then(|l| l.quantile(part)).map_or("–".into(), text::latency);
        vec![
            Cell::text(&volume.name),
            Cell { k: "", l: state },
            Cell { k: "disks", l: disks(&volume.disks) },
            Cell::number(replicas),
            Cell::number(bytes),
            Cell::number(quantile(0.5)),
            Cell::number(quantile(0.99)),
        ]
    }

    fn sizes(&self) -> Vec<Vec<Cell>> {
        let Some(stats) = self.stats.as_deref() else { return Vec::new() };
        let row = |size: &SizeAmount| {
            let percent = (size.all.keys * 100 / stats.all.keys.max(1)) as u8;
            vec![
                Cell::text(size.up_to.map_or("more".into(), |bytes| text::bytes(bytes as f64))),
                Cell { k: "", l: vec![Line { b: Some(percent), ..Line::default() }] },
                Cell::number(text::number(size.all.keys)),
                Cell::number(text::bytes(size.all.bytes as f64)),
            ]
        };
        stats.sizes.iter().filter(|size| size.all.keys > 0).map(row).collect()
    }

    fn errors(&self) -> Vec<Vec<Cell>> {
        let totals = self.samples.totals();
        let row = |(n, (kind, meaning)): (usize, &(&'static str, &'static str))| {
            let rates = rates(&totals, |t| t.errors[n]);
            let since_start = self.totals.errors[n];
            let recent = since_start - totals.first().map_or(0, |oldest| oldest.errors[n]);
            let Chart { line, .. } = chart(&rates, KEPT - 1);
            let class = if recent > 0 && *kind != "client" && *kind != "locked" { "n bad" } else { "n" };
            vec![
                Cell { k: "", l: vec![Line::text(*kind, ""), Line::text(*meaning, "m")] },
                Cell { k: "", l: vec![Line { c: Some(line), ..Line::default() }] },
                Cell { k: class, ..Cell::text(text::number(recent)) },
                Cell::number(text::number(since_start)),
            ]
        };
        KINDS.iter().enumerate().map(row).collect()
    }
}

/// The rates a second between the samples.
fn rates(totals: &[Totals], of: impl Fn(&Totals) -> u64) -> Vec<f64> {
    let rate = |pair: &[Totals]| of(&pair[1]).saturating_sub(of(&pair[0])) as f64 / EVERY.as_secs_f64();
    totals.windows(2).map(rate).collect()
}

fn scrub_texts(scrub: Option<&Scrub>) -> (String, String) {
    let Some(scrub) = scrub else { return ("never".into(), "run mkv verify".into()) };
    let kind = if scrub.deep { "deep, " } else { "" };
    let result = match scrub.findings {
        0 => "whole".into(),
        n => text::count(n, "finding"),
    };
    let took = text::duration(scrub.seconds);
    (text::ago(scrub.time, now()), format!("{kind}{result}; {} in {took}", text::count(scrub.keys, "key")))
}

/// A line for each file system of a volume.
fn disks(disks: &[Disk]) -> Vec<Line> {
    let mut mounts: Vec<u32> = disks.iter().map(|disk| disk.mount).collect();
    mounts.sort_unstable();
    mounts.dedup();
    let line = |mount: u32| {
        let same: Vec<&Disk> = disks.iter().filter(|disk| disk.mount == mount).collect();
        let names: Vec<&str> = same.iter().map(|disk| disk.name.as_str()).filter(|name| *name != ".").collect();
        let name = if names.is_empty() { "folder".to_string() } else { ranges(&names) };
        let (part, disk) = (same[0].free_part(), same[0]);
        let (free, size) = (text::bytes(disk.free as f64), text::bytes(disk.size as f64));
        let k = match part {
            part if part < NEARLY_FULL => "bad",
            part if part < FILLS_UP => "warn",
            _ => "",
        };
        let percent = ((1.0 - part) * 100.0) as u8;
        Line { k, b: Some(percent), ..Line::text(format!("{name} {percent} % full, {free} of {size} free"), "") }
    };
    if mounts.is_empty() { vec![Line::text("not known", "m")] } else { mounts.into_iter().map(line).collect() }
}

/// The names of subvolumes in short: sv00–sv03, sv05.
fn ranges(names: &[&str]) -> String {
    let number = |name: &str| u64::from_str_radix(name.trim_start_matches("sv"), 16).unwrap_or(0);
    let word = |range: &[&str]| match range {
        [first, _, .., last] => format!("{first}–{last}"),
        few => few.join(", "),
    };
    let words: Vec<String> = names.chunk_by(|a, b| number(b) == number(a) + 1).map(word).collect();
    words.join(", ")
}

/// The keys that begin with a prefix.
fn keys(store: &Store, Browse { prefix, start }: &Browse) -> Result<View> {
    let (details, next) = store.details(&unshown(prefix), &unshown(start), KEYS)?;
    let mut view = View::default();
    let count = details.len();
    let keys = text::count(count as u64, "key");
    let of = if next.is_some() || !start.is_empty() || count == 1 { keys } else { format!("All {keys}") };
    let from = details.first().filter(|_| !start.is_empty()).map(|first| format!(", from {}", shown(&first.key)));
    let found = match (count, prefix.is_empty()) {
        (0, _) => format!("No key begins with {prefix}"),
        (_, true) => format!("{of}{}", from.unwrap_or_default()),
        (_, false) => format!("{of} below {prefix}{}", from.unwrap_or_default()),
    };
    view.texts.extend([("found", found), ("prefix", prefix.clone())]);
    view.rows.insert("keys", details.iter().map(key_row).collect());
    view.next = Some(next.map_or(String::new(), |next| browse_url(prefix, Some(&shown(&next)))));
    Ok(view)
}

fn key_row(Detail { key, record, path, balanced }: &Detail) -> Vec<Cell> {
    let mut name = vec![Line { h: key_url(key).filter(|_| record.live()), ..Line::text(shown(key), "") }];
    match record.state {
        State::Live => {}
        State::Unlinked => name.push(Line::text("unlinked", "warn")),
        State::HalfWritten => name.push(Line::text("half written by a Go master", "warn")),
    }
    name.push(Line::text(path, "m"));
    let mut replicas: Vec<Line> = record.replicas.iter().map(|replica| Line::text(replica, "")).collect();
    if !balanced {
        replicas.push(Line::text("not where placement wants it: REBALANCE", "warn"));
    }
    vec![
        Cell { k: "k", l: name },
        Cell::number(record.size.map_or("–".into(), |size| text::bytes(size as f64))),
        Cell::text(record.time.map_or("–".into(), readable)),
        Cell { k: "r", l: replicas },
    ]
}

/// The URL of a key on this server. `None`: a browser would change the path, because it has a part `.` or `..`.
fn key_url(key: &[u8]) -> Option<String> {
    let is_dots = |part: &[u8]| part == b"." || part == b"..";
    if key.split(|byte| *byte == b'/').any(is_dots) {
        return None;
    }
    // A browser takes what follows two slashes for a host. It removes the dot before it sends the request.
    let dot = if key.starts_with(b"//") { "/." } else { "" };
    Some(format!("{dot}{}", percent_encoded(key)))
}

/// The URL of the page with the keys from `start` on.
fn browse_url(prefix: &str, start: Option<&str>) -> String {
    let encoded = |text| utf8_percent_encode(text, NON_ALPHANUMERIC);
    let start = start.map_or(String::new(), |start| format!("&start={}", encoded(start)));
    format!("/?status&prefix={}{start}#browse", encoded(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_on_one_file_system_are_one_line() {
        let disk = |name: &str, mount, free: u64| Disk { name: name.into(), mount, size: 100 << 30, free: free << 30 };
        let shared = [".", "sv00", "sv01", "sv03", "sv04", "sv05"].map(|name| disk(name, 0, 50));
        let lines = disks(&[&shared[..], &[disk("sv02", 1, 1)]].concat());
        let lines: Vec<_> = lines.iter().map(|line| (line.t.as_str(), line.k, line.b)).collect();
        let expected = [
            ("sv00, sv01, sv03–sv05 50 % full, 50.0 GiB of 100 GiB free", "", Some(50)),
            ("sv02 99 % full, 1.00 GiB of 100 GiB free", "bad", Some(99)),
        ];
        assert_eq!(lines, expected);
        assert_eq!(disks(&[])[0].t, "not known");
    }

    #[test]
    fn a_link_to_a_key_stays_on_this_server() {
        assert_eq!(key_url(b"/a b\xff").as_deref(), Some("/a%20b%FF"));
        assert_eq!(key_url(b"//evil.example/x").as_deref(), Some("/.//evil.example/x"));
        assert_eq!((key_url(b"/a/../b"), key_url(b"/.")), (None, None));
    }

    #[test]
    fn rates_are_those_between_samples() {
        let totals = [0, 10, 10].map(|requests| Totals { requests, ..Totals::default() });
        assert_eq!(rates(&totals, |t| t.requests), [2.0, 0.0]);
    }
}
