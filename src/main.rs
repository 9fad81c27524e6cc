//! mkv: a distributed key-value store. The way of a request through the files:
//!
//! - `options`: the command line
//! - `http`: connections and requests; the only file that names tiny_http
//! - `route`: method and target to command
//! - `auth`: basic authorization
//! - `store`: the API's commands, the write protocols, the cleaner
//! - `list`: pages of keys
//! - `placement`: key to blob path and volumes, and back
//! - `record`: what the index holds for a key
//! - `index`: RocksDB and the locks of keys; the only file that names rocksdb
//! - `volumes`: requests to nginx; the only file that names ureq
//! - `fan`: one request to several volumes at the same time
//! - `listing`: nginx's listings
//! - `pool`: threads for what is done at the same time
//! - `metrics`: what the master counts
//! - `memory`: what is large straight from the kernel
//! - `error`: the errors, their HTTP statuses and exit codes
//!
//! and the commands beside the server:
//!
//! - `scan`: all that lies on the volumes, prefix by prefix
//! - `rebuild`: volumes to a fresh index
//! - `rebalance`: replicas to where placement wants them
//! - `verify`: index against volumes, and repair
//! - `import`: an index of the Go minikeyvalue into ours
//! - `leveldb`: reads the files that it is in
//! - `dump`: the index as text
//! - `progress`: a bar or a line for those that take long

mod auth;
mod dump;
mod error;
mod fan;
mod http;
mod import;
mod index;
mod leveldb;
mod list;
mod listing;
mod memory;
mod metrics;
mod options;
mod placement;
mod pool;
mod progress;
mod rebalance;
mod rebuild;
mod record;
mod route;
mod scan;
mod store;
mod verify;
mod volumes;

use std::io::Write;

use error::Result;
use index::Index;
use options::{Mode, Options, USAGE};

#[global_allocator]
static ALLOCATOR: memory::Allocator = memory::Allocator;

fn main() {
    let result = options::parse(std::env::args().skip(1)).and_then(run);
    if let Err(error) = result {
        eprintln!("mkv: {error}");
        std::process::exit(error.exit_code());
    }
}

fn run(options: Options) -> Result<()> {
    let level = if options.verbose { log::LevelFilter::Info } else { log::LevelFilter::Warn };
    env_logger::Builder::new().filter_module("mkv", level).init();
    // One line in the log. tiny_http's threads panic where a client resets its connection at once.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map_or("", |at| at.file());
        // `println!`: what reads the output has ended, as `head` does.
        if place.ends_with("std/src/io/stdio.rs") {
            let _ = writeln!(std::io::stderr(), "mkv: the output cannot be written");
            std::process::exit(1);
        }
        let quiet = place.contains("tiny_http");
        log::log!(if quiet { log::Level::Debug } else { log::Level::Error }, "{panic}");
    }));
    memory::keep_malloc_from_hoarding();
    schedule_as_batch();
    match options.mode {
        Mode::Help => println!("{USAGE}"),
        Mode::Version => println!("mkv {}", env!("CARGO_PKG_VERSION")),
        Mode::Server => {
            let _lock = index::lock_dir(&options.db, true)?;
            let index = Index::open(&index::folder(&options.db)?, true, options.sync)?;
            http::serve(store::Store::new(options, index))?;
        }
        Mode::Rebuild => rebuild::run(&options)?,
        Mode::Rebalance => {
            let _lock = index::lock_dir(&options.db, false)?;
            let index = Index::open(&index::folder(&options.db)?, false, options.sync)?;
            rebalance::run(&store::Store::new(options, index))?;
        }
        Mode::Verify => verify::run(options)?,
        Mode::Import => import::run(&options)?,
        Mode::Dump => dump::run(&options)?,
    }
    Ok(())
}

/// A thread that is woken up waits until the one that runs has no more to do: requests go from
/// thread to thread, and each hand-over would otherwise cost two switches. Threads inherit it.
fn schedule_as_batch() {
    // SAFETY: all fields of the struct are numbers.
    let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the struct outlives the call.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &parameters) } != 0 {
        log::info!("sched_setscheduler: {}", std::io::Error::last_os_error());
    }
}
