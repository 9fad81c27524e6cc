//! `mkv server`: opens the doors, starts the threads beside them, and ends them in order.

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::api;
use crate::api::auth::Authenticator;
use crate::api::handlers::Api;
use crate::error::{Error, Result};
use crate::http::{self, Counters, Server};
use crate::store::Store;

/// How long requests may go on after SIGTERM.
const DRAIN: Duration = Duration::from_secs(30);

/// Serves the store until SIGTERM or SIGINT. Then it accepts nothing more, waits up to 30 s for the requests under way,
/// and flushes the index.
pub fn serve(store: Arc<Store>, config: api::Config, http: http::Config) -> Result<()> {
    raise_descriptor_limit();
    store.check_volumes()?;
    let authenticator = match config.basicauth {
        true => Some(Authenticator::new(store.volumes.clone(), &store.config.placement.volumes)?),
        false => None,
    };
    store.suspect_after_crash()?;
    let cleans = authenticator.is_none() || store.own_auth().is_some() || store.volumes.are_signed();
    let place = if http.host.is_empty() { "every address".into() } else { http.host.clone() };
    let (port, counters, backup) = (http.port, Arc::new(Counters::default()), config.backup);
    let api = Api::new(store.clone(), config, authenticator, counters.clone());
    let sampler = api.sampler();
    let server = Server::bind(http, counters, api).map_err(|e| {
        Error::Failed(format!("cannot listen on {place}, port {port}: {e}: choose another -port or -host"))
    })?;
    let address = server.address().map_err(|e| Error::Failed(e.to_string()))?;
    let front = server.clone();
    spawn("mkv-accept", move || front.run())?;
    spawn("mkv-sampler", sampler)?;
    if cleans {
        let cleaner = store.clone();
        spawn("mkv-cleaner", move || cleaner.clean())?;
    } else {
        log::warn!("without -userpass the cleaner cannot delete: debris waits");
    }
    if let Some(interval) = backup {
        let keeper = store.clone();
        spawn("mkv-backup", move || keeper.keep_backup(interval))?;
    }
    let checker = store.clone();
    let check = move || {
        checker.volumes.warn_if_open(&checker.config.placement.volumes);
        checker.warn_if_index_lost();
    };
    spawn("mkv-check", check)?;
    let wrong = |e: std::io::Error| Error::Failed(format!("signals: {e}"));
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(wrong)?;
    println!("mkv listens on {address}");
    // SIGHUP has nothing to reopen: the log goes to stderr, and all settings are flags.
    while signals.wait().all(|signal| signal == SIGHUP) {}
    server.stop(DRAIN);
    store.index.sync()?;
    store.index.close();
    Ok(())
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(work);
    thread.map(drop).map_err(|e| Error::Failed(format!("no thread can be started: {e}")))
}

/// Raises the soft limit of descriptors, which is meant for shells, to the hard limit: each connection needs a
/// descriptor, and an upload one more for each replica.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
