//! `mkv server` and `mkv follow`: opens the doors, starts the threads beside them, and ends them in order.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::bounded;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::api;
use crate::api::auth::Authenticator;
use crate::api::handlers::Api;
use crate::error::{Error, Result};
use crate::http::{self, Counters, Server};
use crate::store::Store;
use crate::store::follow::{Ended, Peer};

/// How long requests may go on after SIGTERM.
const DRAIN: Duration = Duration::from_secs(30);

/// How a server ended without an error.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    Stopped,
    /// The process has to start again, with another index.
    Again,
}

/// Serves the store until SIGTERM or SIGINT, or until it cannot go on beside its peer. Then it accepts nothing more,
/// waits up to 30 s for the requests under way, and flushes the index.
pub fn serve(store: Arc<Store>, config: api::Config, http: http::Config, peer: Option<Peer>) -> Result<Outcome> {
    raise_descriptor_limit();
    store.check_volumes()?;
    let authenticator = match config.basicauth {
        true => Some(Authenticator::new(store.volumes.clone(), &store.config.placement.volumes)?),
        false => None,
    };
    let follows = store.index.following().is_some();
    if !follows {
        store.suspect_after_crash()?;
    }
    let place = if http.host.is_empty() { "every address".into() } else { http.host.clone() };
    let (port, counters) = (http.port, Arc::new(Counters::default()));
    let writers = Writers { store: store.clone(), backup: config.backup, basicauth: config.basicauth };
    let api = Api::new(store.clone(), config, authenticator, counters.clone());
    let sampler = api.sampler();
    let server = Server::bind(http, counters, api).map_err(|e| {
        Error::Failed(format!("cannot listen on {place}, port {port}: {e}: choose another -port or -host"))
    })?;
    let address = server.address().map_err(|e| Error::Failed(e.to_string()))?;
    let front = server.clone();
    spawn("mkv-accept", move || front.run())?;
    spawn("mkv-sampler", sampler)?;
    let checker = store.clone();
    let check = move || {
        checker.volumes.warn_if_open(&checker.config.placement.volumes);
        checker.warn_if_index_lost();
    };
    spawn("mkv-check", check)?;
    let wrong = |e: std::io::Error| Error::Failed(format!("signals: {e}"));
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(wrong)?;
    let (end, ended) = bounded(1);
    let handle = signals.handle();
    let end = move |why| {
        let _ = end.try_send(why);
        handle.close();
    };
    match peer {
        Some(peer) => watch(Arc::new(peer), &store, writers, follows, end)?,
        None => writers.start()?,
    }
    println!("mkv listens on {address}");
    // SIGHUP has nothing to reopen: the log goes to stderr, and all settings are flags.
    while !signals.is_closed() && signals.wait().all(|signal| signal == SIGHUP) {}
    server.stop(DRAIN);
    store.index.sync()?;
    store.index.close();
    match ended.try_recv() {
        Err(_) => Ok(Outcome::Stopped),
        Ok(Ended::Replaced) => Ok(Outcome::Again),
        Ok(Ended::Failed(error)) => Err(error),
    }
}

/// What only a master does, in the background.
struct Writers {
    store: Arc<Store>,
    backup: Option<Duration>,
    basicauth: bool,
}

impl Writers {
    fn start(self) -> Result<()> {
        let store = self.store;
        if !self.basicauth || store.own_auth().is_some() || store.volumes.are_signed() {
            let cleaner = store.clone();
            spawn("mkv-cleaner", move || cleaner.clean())?;
        } else {
            log::warn!("without -userpass the cleaner cannot delete: debris waits");
        }
        if let Some(interval) = self.backup {
            spawn("mkv-backup", move || store.keep_backup(interval))?;
        }
        Ok(())
    }
}

/// Starts what a process with a peer does: it follows, until it is promoted; a master looks whether its peer was.
fn watch(
    peer: Arc<Peer>,
    store: &Arc<Store>,
    writers: Writers,
    follows: bool,
    end: impl Fn(Ended) + Clone + Send + 'static,
) -> Result<()> {
    if follows {
        let (peer, store, end) = (peer.clone(), store.clone(), end.clone());
        let promotion = move || store.await_promotion(&peer, || writers.start());
        spawn("mkv-promotion", move || {
            if let Err(error) = promotion() {
                end(Ended::Failed(error));
            }
        })?;
    } else {
        writers.start()?;
    }
    let store = store.clone();
    spawn("mkv-follow", move || end(store.follow(&peer)))
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
