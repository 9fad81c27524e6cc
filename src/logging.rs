//! The log on stderr: text, or with `-log json` one object a line.
//!
//! ```text
//! {"time":"2026-11-25T04:22:36.123Z","level":"WARN","message":"volume vol1:3001 answers again"}
//! {"time":…,"level":"INFO","message":…,"method":"GET","path":"/a","status":302,"ms":0,"id":"1f"}
//! ```
//!
//! A leaf that any room may use. Nothing is formatted, and no memory taken, for a line that is not logged.

use std::fmt::Display;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::{Level, LevelFilter};

static JSON: AtomicBool = AtomicBool::new(false);

/// The target of lines about a request: their text is a list of fields where the log is JSON.
const REQUEST: &str = "mkv::request";

/// Starts to log. `verbose`: also what is no warning.
pub fn init(json: bool, verbose: bool) {
    JSON.store(json, Ordering::Relaxed);
    let mut builder = env_logger::Builder::new();
    builder.filter_module("mkv", if verbose { LevelFilter::Info } else { LevelFilter::Warn });
    if json {
        builder.format(|out, record| {
            let (time, level, text) = (out.timestamp_millis(), record.level(), record.args().to_string());
            let fields = if record.target() == REQUEST { text } else { format!("\"message\":{}", quoted(&text)) };
            writeln!(out, "{{\"time\":\"{time}\",\"level\":\"{level}\",{fields}}}")
        });
    }
    builder.init();
}

/// Whether the log is JSON.
pub fn is_json() -> bool {
    JSON.load(Ordering::Relaxed)
}

/// A request that was answered.
pub struct Request<'a, Id> {
    pub method: &'a str,
    /// As it was sent, without the query.
    pub path: &'a str,
    pub status: u16,
    pub time: Duration,
    pub id: Id,
    /// The text of an error, which has the id.
    pub error: Option<&'a str>,
}

impl<Id: Display> Request<'_, Id> {
    pub fn log(&self, level: Level) {
        if !log::log_enabled!(target: REQUEST, level) {
            return;
        }
        let Request { method, path, status, time, id, error } = self;
        let (path, ms) = (path.escape_debug(), time.as_millis());
        let line = match error {
            Some(error) => format!("{method} {path} {status}: {error}"),
            None => format!("{method} {path} {status} {ms} ms, request {id}"),
        };
        if !is_json() {
            return log::log!(target: REQUEST, level, "{line}");
        }
        let [line, method, path] = [&line, *method, self.path].map(quoted);
        log::log!(
            target: REQUEST,
            level,
            "\"message\":{line},\"method\":{method},\"path\":{path},\"status\":{status},\"ms\":{ms},\"id\":\"{id}\""
        );
    }
}

/// A JSON string.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
