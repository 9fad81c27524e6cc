//! Reads a LevelDB that goleveldb wrote, and changes nothing in it.
//!
//! No library does both: RocksDB reads no LevelDB tables since version 11, LevelDB itself compacts what it opens, and
//! rusty-leveldb skips damaged blocks silently. This reader checks every checksum, and all damage is an error. Only an
//! incomplete write at the end of a log is skipped: a killed master leaves it, and LevelDB skips it, too.
//!
//! ```text
//! CURRENT  = name of the manifest, "\n"
//! manifest = log; its records name the tables and the oldest log that is still needed
//! NNN.log  = log; its records are batches of writes that are not in tables yet
//! log      = *chunk; none crosses a boundary of 32 KiB; a record is one chunk of kind 1, or chunks of kinds 2 *3 4
//! chunk    = crc, 2 bytes of length, kind (1 to 4), data
//! batch    = 8 bytes of sequence, 4 of count, *( 1 key value / 0 key ), each with a varint length
//! NNN.ldb  = *block, footer: 40 bytes with two handles, of which the second is the index block's; magic
//! handle   = varint start, varint length
//! block    = rows and their restarts, kind (0: plain, 1: compressed with snappy), crc
//! row      = three varints: bytes shared with the key before, further bytes of the key, bytes of the value; then both
//! ```
//!
//! Keys in tables end in 8 bytes: sequence << 8, plus 1 for a value or 0 for a deletion. The entry with the highest
//! sequence is the key's. All numbers are little-endian.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs;
use std::path::Path;

use crate::error::{Error, Result};

/// Bytes of a log's block, of the header of a chunk in it, and of a table's footer.
const LOG_BLOCK: usize = 32 << 10;
const CHUNK_HEADER: usize = 7;
const FOOTER: usize = 48;
const MAGIC: &[u8] = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb";

/// The newest write of each key: its sequence, and the value, or `None` if it deleted the key.
pub type Newest = BTreeMap<Vec<u8>, (u64, Option<Vec<u8>>)>;

fn note(newest: &mut Newest, key: &[u8], sequence: u64, value: Option<&[u8]>) {
    if newest.get(key).is_none_or(|(known, _)| *known < sequence) {
        newest.insert(key.to_vec(), (sequence, value.map(Vec::from)));
    }
}

/// Calls `f` with all keys of a LevelDB, some thousands at a time. Tables are read in the order of their smallest keys:
/// all keys below the next table's smallest one are complete. So memory holds the writes of the logs, which the Go
/// master held in memory, too, and about one table of each level.
pub fn read(folder: &Path, mut f: impl FnMut(Newest) -> Result<()>) -> Result<()> {
    let current = load(folder, "CURRENT", |data| {
        let name = std::str::from_utf8(data).ok()?.strip_suffix('\n')?;
        name.starts_with("MANIFEST-").then(|| name.to_string())
    })?;
    let Manifest { mut tables, oldest_log, other_log } = load(folder, &current, manifest)?;
    tables.sort_by(|a, b| a.smallest.cmp(&b.smallest));
    let names = fs::read_dir(folder).map_err(|e| wrong(folder, e))?.flatten();
    let mut logs: Vec<u64> = names.filter_map(|n| n.file_name().to_str()?.strip_suffix(".log")?.parse().ok()).collect();
    logs.retain(|n| *n >= oldest_log || *n == other_log);
    if oldest_log > 0 && logs.is_empty() {
        return Err(wrong(folder, "its log is missing: copy all of it, with the master stopped"));
    }
    let mut newest = Newest::new();
    for n in logs {
        load(folder, &format!("{n:06}.log"), |data| {
            log_records(data)?.iter().try_for_each(|batch| replay(batch, &mut newest))
        })?;
    }
    for Table { number, size, smallest } in tables {
        let rest = newest.split_off(&smallest);
        f(std::mem::replace(&mut newest, rest))?;
        load(folder, &format!("{number:06}.ldb"), |data| {
            (data.len() as u64 == size).then_some(())?;
            table(data, &mut newest)
        })?;
    }
    f(newest)
}

/// Reads and decodes a file.
fn load<T>(folder: &Path, name: &str, mut decode: impl FnMut(&[u8]) -> Option<T>) -> Result<T> {
    let path = folder.join(name);
    let data = fs::read(&path).map_err(|e| wrong(&path, e))?;
    let text = "it is damaged: take a backup, or make the index anew with mkv rebuild";
    decode(&data).ok_or_else(|| wrong(&path, text))
}

pub fn wrong(path: &Path, why: impl Display) -> Error {
    Error::Failed(format!("-leveldb: {}: {why}", path.display()))
}

/// The records of a log, without an incomplete one at its end.
pub fn log_records(data: &[u8]) -> Option<Vec<Vec<u8>>> {
    let (mut records, mut record, mut begun, mut at) = (Vec::new(), Vec::new(), false, 0);
    while at < data.len() {
        let left = LOG_BLOCK - at % LOG_BLOCK;
        if left < CHUNK_HEADER {
            at += left;
            continue;
        }
        let rest = &data[at..];
        let Some((kind, body)) = chunk(rest).filter(|(kind, _)| begun == (*kind > 2)) else {
            let end = rest.get(4..6).map_or(7, |n| 7 + usize::from(n[0]) + (usize::from(n[1]) << 8));
            let unwritten = end > rest.len() || rest.iter().all(|byte| *byte == 0);
            let last = (1..rest.len()).all(|n| chunk(&rest[n..]).is_none());
            return (unwritten && last).then(|| {
                log::warn!("-leveldb: a log ends within a write, which is left out");
                records
            });
        };
        record.extend_from_slice(body);
        begun = kind == 2 || kind == 3;
        if !begun {
            records.push(std::mem::take(&mut record));
        }
        at += CHUNK_HEADER + body.len();
    }
    Some(records)
}

/// The kind and the data of the chunk at the start of `rest`; `None` if it is incomplete or damaged.
fn chunk(rest: &[u8]) -> Option<(u8, &[u8])> {
    let ([crc @ .., low, high, kind], body) = rest.split_first_chunk::<CHUNK_HEADER>()?;
    let body = body.get(..usize::from(u16::from_le_bytes([*low, *high])))?;
    let whole = (1..=4).contains(kind) && masked_crc(&rest[6..CHUNK_HEADER + body.len()]) == u32::from_le_bytes(*crc);
    whole.then_some((*kind, body))
}

struct Table {
    number: u64,
    /// Bytes.
    size: u64,
    smallest: Vec<u8>,
}

struct Manifest {
    tables: Vec<Table>,
    /// The numbers of the oldest log that is needed, and of one more.
    oldest_log: u64,
    other_log: u64,
}

fn manifest(data: &[u8]) -> Option<Manifest> {
    let mut tables = BTreeMap::new();
    let (mut oldest_log, mut other_log) = (None, 0);
    for record in log_records(data)? {
        let rest = &mut record.as_slice();
        while !rest.is_empty() {
            match varint(rest)? {
                1 => (text(rest)? == b"leveldb.BytewiseComparator").then_some(())?,
                2 => oldest_log = Some(varint(rest)?),
                3 | 4 => drop(varint(rest)?),
                5 => drop((varint(rest)?, text(rest)?)),
                6 => drop(tables.remove(&(varint(rest)?, varint(rest)?))),
                7 => {
                    let (level, number, size) = (varint(rest)?, varint(rest)?, varint(rest)?);
                    let smallest = text(rest)?.split_last_chunk::<8>()?.0.to_vec();
                    text(rest)?;
                    tables.insert((level, number), Table { number, size, smallest });
                }
                9 => other_log = varint(rest)?,
                _ => return None,
            }
        }
    }
    Some(Manifest { tables: tables.into_values().collect(), oldest_log: oldest_log?, other_log })
}

/// Adds the writes of a batch.
fn replay(batch: &[u8], newest: &mut Newest) -> Option<()> {
    let (sequence, rest) = batch.split_first_chunk()?;
    let (count, mut rest) = rest.split_first_chunk()?;
    for n in 0..u64::from(u32::from_le_bytes(*count)) {
        let kind = take(&mut rest, 1)?[0];
        let key = text(&mut rest)?;
        let value = if kind == 1 { Some(text(&mut rest)?) } else { None };
        (kind <= 1).then_some(())?;
        note(newest, key, u64::from_le_bytes(*sequence).wrapping_add(n), value);
    }
    rest.is_empty().then_some(())
}

/// Adds the entries of a table.
fn table(data: &[u8], newest: &mut Newest) -> Option<()> {
    let mut footer = data.get(data.len().checked_sub(FOOTER)?..)?.strip_suffix(MAGIC)?;
    let _metaindex = (varint(&mut footer)?, varint(&mut footer)?);
    for (_, handle) in block(data, footer)? {
        for (key, value) in block(data, &handle)? {
            let (key, tag) = key.split_last_chunk()?;
            let tag = u64::from_le_bytes(*tag);
            (tag & 0xff <= 1).then_some(())?;
            note(newest, key, tag >> 8, Some(value.as_slice()).filter(|_| tag & 1 == 1));
        }
    }
    Some(())
}

/// The keys and values of the block that a handle names.
fn block(table: &[u8], mut handle: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let (start, length) = (varint(&mut handle)?, varint(&mut handle)?);
    let mut rest = table.get(usize::try_from(start).ok()?..)?;
    let (checked, crc) = take(&mut rest, length.checked_add(5)?)?.split_last_chunk()?;
    (masked_crc(checked) == u32::from_le_bytes(*crc)).then_some(())?;
    let (kind, packed) = checked.split_last()?;
    let block = match kind {
        0 => packed.to_vec(),
        1 => snap::raw::Decoder::new().decompress_vec(packed).ok()?,
        _ => return None,
    };
    let (rest, restarts) = block.split_last_chunk()?;
    let restarts = 4 * u32::from_le_bytes(*restarts) as usize;
    let mut rest = rest.get(..rest.len().checked_sub(restarts)?)?;
    let (mut rows, mut key) = (Vec::new(), Vec::new());
    while !rest.is_empty() {
        let [shared, own, value] = [varint(&mut rest)?, varint(&mut rest)?, varint(&mut rest)?];
        key = [take(&mut key.as_slice(), shared)?, take(&mut rest, own)?].concat();
        rows.push((key.clone(), take(&mut rest, value)?.to_vec()));
    }
    Some(rows)
}

fn take<'a>(rest: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(length.try_into().ok()?)?;
    *rest = tail;
    Some(head)
}

/// A number in groups of seven bits, the lowest first. The highest bit of a byte says that another one follows.
fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(rest, 1)?[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

/// A varint and as many bytes.
fn text<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = varint(rest)?;
    take(rest, length)
}

/// CRC-32C (RFC 3720), masked as LevelDB stores it.
fn masked_crc(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
    let crc = bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), bit));
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}
