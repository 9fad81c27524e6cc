//! The program: parses the command line, runs the command, prints the error once.

use std::io::Write;

use mkv::cli::{self, Mode, Options, USAGE};
use mkv::error::Result;
use mkv::index::{self, Index};
use mkv::ops::{dump, import, rebalance, rebuild, verify};
use mkv::{http, memory, store};

#[global_allocator]
static ALLOCATOR: memory::Allocator = memory::Allocator;

fn main() {
    let result = cli::parse(std::env::args().skip(1)).and_then(run);
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
