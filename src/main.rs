//! The program: parses the command line, runs the command, prints the error once.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process;
use std::sync::Arc;

use mkv::cli::{self, Cli, Command, Server, Source};
use mkv::error::{Error, Result};
use mkv::index::LOG;
use mkv::logging;
use mkv::ops::{backup, dump, follow, import, rebalance, rebuild, verify};
use mkv::serve::{Outcome, serve};
use mkv::store::Store;
use mkv::volumes::{Volumes, secret};

fn main() {
    if let Err(error) = cli::parse(std::env::args_os().skip(1)).and_then(run) {
        if logging::is_json() {
            log::error!("{error}");
        } else {
            eprintln!("mkv: {error}");
        }
        std::process::exit(error.exit_code());
    }
}

fn run(Cli { command, verbose, voltimeout, secret: own, json }: Cli) -> Result<()> {
    logging::init(json, verbose);
    log_panics();
    pin_mmap_threshold();
    schedule_as_batch();
    let volumes = || Volumes::new(voltimeout, own);
    match command {
        Command::Print(text) => println!("{text}"),
        Command::Secret(file) => secret::create(&file)?,
        Command::Server(server) => run_server(*server, volumes())?,
        Command::Promote { db } => follow::promote(&db)?,
        Command::Rebuild { store, rebuild } => rebuild::run(&rebuild, store, volumes())?,
        Command::Rebalance { db, sync, store, dry_run } => {
            let index = db.open(false, sync, LOG)?;
            rebalance::run(&Store::new(store, index, volumes()), dry_run, verbose)?;
        }
        Command::Verify { store, verify } => verify::run(verify, store, volumes())?,
        Command::Import { db, from: Source::LevelDb(folder) } => import::run(&db, &folder)?,
        Command::Import { db, from: Source::Index(index) } => import::copy(&db, &index)?,
        Command::Dump { db } => dump::run(&db)?,
        Command::Backup(config) => backup::run(&config)?,
        Command::Restore { db, file } => backup::restore(&db, &file)?,
    }
    Ok(())
}

/// Runs the server until it is stopped.
fn run_server(
    Server { db, sync, log, store, http, api, s3, peer, follows }: Server,
    volumes: Arc<Volumes>,
) -> Result<()> {
    let follows = peer.as_ref().map_or(Ok(false), |peer| follow::prepare(peer, follows))?;
    let index = if follows { db.open_to_follow(sync, log) } else { db.open(true, sync, log) }?;
    match serve(Store::new(store, index, volumes), api, http, s3, peer)? {
        Outcome::Stopped => Ok(()),
        Outcome::Again => {
            // Threads still use the index that was replaced: only a new process can open the other one.
            let error = process::Command::new("/proc/self/exe").args(std::env::args_os().skip(1)).exec();
            Err(Error::Failed(format!("this process cannot start again: {error}")))
        }
    }
}

/// Logs each panic as one line.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let file = panic.location().map_or("", |at| at.file());
        // `println!` panics when the reader of the output has ended, as `head` does.
        if file.ends_with("std/src/io/stdio.rs") {
            let _ = writeln!(std::io::stderr(), "mkv: the output cannot be written");
            std::process::exit(1);
        }
        log::error!("{panic}");
    }));
}

/// glibc raises its mmap threshold after large frees; pin it so that RocksDB's buffers return to the kernel.
fn pin_mmap_threshold() {
    // SAFETY: the call sets a number.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10)
    };
}

/// Schedules this process as SCHED_BATCH, which all its threads inherit: a thread that wakes up does not preempt the
/// nginx process that answered it. On two cores that makes a GET of an existing key a fifth faster (bench/NOTES.md).
fn schedule_as_batch() {
    // SAFETY: all fields of the struct are numbers.
    let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the struct outlives the call.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &parameters) } != 0 {
        log::info!("sched_setscheduler: {}", std::io::Error::last_os_error());
    }
}
