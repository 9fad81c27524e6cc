//! `mkv dump`: the index as text, for diff, grep and backups.
//!
//! One line a key, sorted by key: the percent-encoded key, a tab, the record.

use std::io::{BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};
use crate::format::percent_encoded;
use crate::index::{Index, database};

pub fn run(db: &Path) -> Result<()> {
    let index = Index::follow(&database(db)?)?;
    let mut out = BufWriter::with_capacity(1 << 20, std::io::stdout().lock());
    let broken = |e: std::io::Error| Error::Failed(format!("the dump could not be written: {e}"));
    index.view().records(b"", b"", |key, text| {
        write!(out, "{}\t", percent_encoded(key)).map_err(broken)?;
        out.write_all(text).and_then(|()| out.write_all(b"\n")).map_err(broken)?;
        Ok(true)
    })?;
    out.flush().map_err(broken)
}
