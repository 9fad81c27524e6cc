//! `mkv dump`: the index as text, for diff, grep and backups.
//!
//! One line for each key, in the order of keys: the percent-encoded key, a tab, the record.

use std::io::{BufWriter, Write};

use crate::error::{Error, Result};
use crate::format::percent_encoded;
use crate::index::Location;

pub fn run(db: &Location) -> Result<()> {
    let index = db.open_to_read()?;
    let mut out = BufWriter::with_capacity(1 << 20, std::io::stdout().lock());
    let broken = |e: std::io::Error| Error::Failed(format!("the dump could not be written: {e}"));
    for row in index.view().texts() {
        let (key, text) = row?;
        write!(out, "{}\t", percent_encoded(&key)).map_err(broken)?;
        out.write_all(&text).and_then(|()| out.write_all(b"\n")).map_err(broken)?;
    }
    out.flush().map_err(broken)
}
