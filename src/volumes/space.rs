//! How full a volume's disks are, as its `volume.sh` publishes it at `/.space`:
//!
//! ```text
//! {"time":SECONDS,"disks":[{"name":"sv00","mount":1,"size":BYTES,"free":BYTES},…]}
//! ```
//!
//! `time` is when the disks were measured, by the volume's clock. The name "." is the volume's folder itself. Other
//! volumes, such as a Go master's, publish nothing: their disks are unknown.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;

/// Where a volume publishes it. No part of a blob's name begins with a dot.
pub(super) const PATH: &str = "/.space";

/// A volume is asked again after this time.
const ASK: Duration = Duration::from_secs(10);

/// Figures that have not changed their `time` for so long are not used: the disk may hang.
const OLD: Duration = Duration::from_secs(60);

/// One `svXX` of a volume, or its folder.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Disk {
    /// `svXX`, or "." for the volume's folder.
    pub name: String,
    /// Disks with the same number are one file system.
    pub mount: u32,
    /// Bytes.
    pub size: u64,
    /// Bytes that are free for ordinary users.
    pub free: u64,
}

impl Disk {
    /// The free part of the disk, from 0 to 1.
    pub fn free_part(&self) -> f64 {
        self.free as f64 / self.size.max(1) as f64
    }
}

#[derive(Deserialize)]
struct Published {
    time: u64,
    disks: Vec<Disk>,
}

/// What was last read of a volume.
#[derive(Default)]
pub(super) struct Space {
    asked: Option<Instant>,
    /// When `time` was new.
    changed: Option<Instant>,
    time: u64,
    disks: Arc<Vec<Disk>>,
}

impl Space {
    /// Whether to ask the volume now. The caller does so; others see the figures of before meanwhile.
    pub fn begin(&mut self) -> bool {
        let due = self.asked.is_none_or(|at| at.elapsed() >= ASK);
        if due {
            self.asked = Some(Instant::now());
        }
        due
    }

    /// Takes what the volume published. Ignores a text that is not in the format.
    pub fn read(&mut self, text: &[u8]) {
        let Ok(published) = serde_json::from_slice::<Published>(text) else { return };
        if !published.disks.iter().all(|disk| is_name(&disk.name) && disk.free <= disk.size) {
            return;
        }
        if self.changed.is_none() || self.time != published.time {
            (self.changed, self.time) = (Some(Instant::now()), published.time);
        }
        self.disks = Arc::new(published.disks);
    }

    /// The disks; empty: not known.
    pub fn disks(&self) -> Arc<Vec<Disk>> {
        let is_new = self.changed.is_some_and(|at| at.elapsed() < OLD);
        if is_new { self.disks.clone() } else { Arc::default() }
    }
}

/// Whether this is the name of a disk: it becomes part of metrics and messages.
fn is_name(name: &str) -> bool {
    let digits = name.strip_prefix("sv").unwrap_or_default();
    name == "." || (2..=8).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_texts_in_the_format_are_taken() {
        let mut space = Space::default();
        assert!(space.begin() && !space.begin());
        let disk = |name: &str, free: u64| format!(r#"{{"name":"{name}","mount":  1,"size":   200,"free":{free:5}}}"#);
        let text = |disks: &str| format!(r#"{{"time":7,"disks":[{disks}]}}"#);
        for wrong in ["", "404", "{}", &text(&disk("sv\\\"", 1)), &text(&disk("sv00", 201)), &text(&disk("/", 1))] {
            space.read(wrong.as_bytes());
            assert_eq!(space.disks().len(), 0, "{wrong}");
        }
        space.read(text(&[disk(".", 100), disk("sv0A", 3)].join(",")).as_bytes());
        let disks = space.disks();
        assert_eq!(disks[1], Disk { name: "sv0A".into(), mount: 1, size: 200, free: 3 });
        assert_eq!(disks[0].free_part(), 0.5);
    }

    #[test]
    fn figures_that_do_not_change_for_a_minute_are_not_used() {
        let mut space = Space::default();
        space.read(br#"{"time":7,"disks":[{"name":".","mount":0,"size":2,"free":1}]}"#);
        assert_eq!(space.disks().len(), 1);
        space.changed = Instant::now().checked_sub(OLD);
        space.read(br#"{"time":7,"disks":[{"name":".","mount":0,"size":2,"free":1}]}"#);
        assert_eq!(space.disks().len(), 0);
        space.read(br#"{"time":8,"disks":[{"name":".","mount":0,"size":2,"free":1}]}"#);
        assert_eq!(space.disks().len(), 1);
    }
}
