//! `mkv server` and `mkv follow`: listens for requests, starts the threads in the background, and ends all in order.

use std::net::SocketAddr;
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
use crate::http::{self, Counters, Handler, Server};
use crate::s3::{self, S3};
use crate::store::Store;
use crate::store::follow::{Ended, Peer};

/// How long requests may go on after SIGTERM.
const DRAIN: Duration = Duration::from_secs(30);

/// Look for expired multipart uploads this often, or more often if they expire sooner.
const PURGE: Duration = Duration::from_secs(600);

/// Where S3 listens, and how it serves.
pub struct S3Config {
    pub http: http::Config,
    pub s3: s3::Config,
}

/// How a server ended without an error.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    Stopped,
    /// The process has to start again, with another index.
    Again,
}

/// Serves the store until SIGTERM or SIGINT, or until it cannot go on beside its peer. Then it accepts nothing more,
/// waits up to 30 s for the requests under way, and flushes the index.
pub fn serve(
    store: Arc<Store>,
    config: api::Config,
    http: http::Config,
    s3: Option<S3Config>,
    peer: Option<Peer>,
) -> Result<Outcome> {
    raise_descriptor_limit();
    store.check_volumes()?;
    let authenticate = || Authenticator::new(store.volumes.clone(), &store.config.placement.volumes);
    let authenticator = config.basicauth.then(authenticate).transpose()?;
    let follows = store.index.following().is_some();
    if !follows {
        store.suspect_after_crash()?;
    }
    let counters = Arc::new(Counters::default());
    let (backup, basicauth, uploads) = (config.backup, config.basicauth, s3.is_some());
    let writers = Writers { store: store.clone(), backup, basicauth, uploads };
    let api = Api::new(store.clone(), config, authenticator, counters.clone());
    let (sampler, observer) = (api.sampler(), api.observer());
    let (server, address) = listen(http, counters.clone(), api, "-port")?;
    let s3 = match s3 {
        Some(s3) => Some(listen_for_s3(store.clone(), s3, counters, Box::new(observer))?),
        None => None,
    };
    spawn("mkv-sampler", sampler)?;
    let checker = store.clone();
    spawn("mkv-check", move || {
        checker.volumes.warn_if_open(&checker.config.placement.volumes);
        checker.warn_if_index_lost();
    })?;
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|e| Error::Failed(format!("signals: {e}")))?;
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
    if let Some((.., address)) = &s3 {
        println!("mkv listens for S3 on {address}");
    }
    await_end(&mut signals, s3.as_ref().map(|(s3, ..)| &**s3));
    drain(&server, s3.as_ref().map(|(_, server, _)| &**server));
    store.index.sync()?;
    store.index.close();
    match ended.try_recv() {
        Err(_) => Ok(Outcome::Stopped),
        Ok(Ended::Replaced) => Ok(Outcome::Again),
        Ok(Ended::Failed(error)) => Err(error),
    }
}

/// The handler of S3, and its server with its address.
type S3Server = (Arc<S3>, Arc<Server<Arc<S3>>>, SocketAddr);

/// Serves S3 on a port of its own.
fn listen_for_s3(
    store: Arc<Store>,
    S3Config { http, s3 }: S3Config,
    counters: Arc<Counters>,
    observe: s3::Observe,
) -> Result<S3Server> {
    if s3.keys.is_none() {
        log::warn!("S3 without -s3keys: everybody who reaches its port may read and write everything");
    }
    let s3 = Arc::new(S3::new(store, s3, observe)?);
    let (server, address) = listen(http, counters, s3.clone(), "-s3")?;
    Ok((s3, server, address))
}

/// Waits for SIGTERM or SIGINT, or until another thread closes the signals. On SIGHUP it reads the keys of S3 again: all
/// other settings are flags, and the log goes to stderr.
fn await_end(signals: &mut Signals, s3: Option<&S3>) {
    while !signals.is_closed() && signals.wait().all(|signal| signal == SIGHUP) {
        if let Some(s3) = s3 {
            s3.reload_keys();
        }
    }
}

/// Waits for the requests under way on both servers at the same time.
fn drain<H: Handler>(server: &Server<H>, s3: Option<&Server<Arc<S3>>>) {
    std::thread::scope(|scope| {
        if let Some(s3) = s3 {
            scope.spawn(move || s3.stop(DRAIN));
        }
        server.stop(DRAIN);
    });
}

/// The threads that only a master has.
struct Writers {
    store: Arc<Store>,
    backup: Option<Duration>,
    basicauth: bool,
    /// Whether there is S3.
    uploads: bool,
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
        if self.uploads {
            let purger = store.clone();
            spawn("mkv-uploads", move || purger.purge_uploads(PURGE.min(purger.config.uploads)))?;
        }
        if let Some(interval) = self.backup {
            spawn("mkv-backup", move || store.keep_backup(interval))?;
        }
        Ok(())
    }
}

/// Starts the threads of a process with a peer: a follower follows until it is promoted, a master asks whether its peer
/// was promoted.
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

/// Binds a server and lets it accept connections. `flag`: what chooses its port.
fn listen<H: Handler>(
    config: http::Config,
    counters: Arc<Counters>,
    handler: H,
    flag: &str,
) -> Result<(Arc<Server<H>>, SocketAddr)> {
    let place = if config.host.is_empty() { "every address".into() } else { config.host.clone() };
    let port = config.port;
    let server = Server::bind(config, counters, handler).map_err(|e| {
        Error::Failed(format!("cannot listen on {place}, port {port}: {e}: choose another {flag} or -host"))
    })?;
    let address = server.address().map_err(|e| Error::Failed(e.to_string()))?;
    let front = server.clone();
    spawn("mkv-accept", move || front.run())?;
    Ok((server, address))
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
