//! `mkv server`: opens the doors, starts the threads beside them, and ends them in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

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

/// How long requests may go on after SIGTERM.
const DRAIN: Duration = Duration::from_secs(30);

/// How often multipart uploads that have expired are looked for.
const PURGE: Duration = Duration::from_secs(600);

/// Where S3 listens, and how it serves.
pub struct S3Config {
    pub http: http::Config,
    pub s3: s3::Config,
}

/// Serves the store until SIGTERM or SIGINT. Then it accepts nothing more, waits up to 30 s for the requests under way,
/// and flushes the index.
pub fn serve(store: Arc<Store>, config: api::Config, http: http::Config, s3: Option<S3Config>) -> Result<()> {
    raise_descriptor_limit();
    store.check_volumes()?;
    let authenticator = match config.basicauth {
        true => Some(Authenticator::new(store.volumes.clone(), &store.config.placement.volumes)?),
        false => None,
    };
    store.suspect_after_crash()?;
    let cleans = authenticator.is_none() || store.own_auth().is_some() || store.volumes.are_signed();
    let (counters, backup) = (Arc::new(Counters::default()), config.backup);
    let api = Api::new(store.clone(), config, authenticator, counters.clone());
    let (sampler, observer) = (api.sampler(), api.observer());
    let (server, address) = listen(http, counters.clone(), api, "-port")?;
    let s3 = match s3 {
        Some(S3Config { http, s3 }) => {
            if s3.keys.is_none() {
                log::warn!("S3 without -s3keys: everybody who reaches its port may read and write everything");
            }
            let s3 = Arc::new(S3::new(store.clone(), s3, Box::new(observer))?);
            let (server, address) = listen(http, counters, s3.clone(), "-s3")?;
            let purger = store.clone();
            spawn("mkv-uploads", move || purger.purge_uploads(PURGE))?;
            Some((s3, server, address))
        }
        None => None,
    };
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
    if let Some((.., address)) = &s3 {
        println!("mkv listens for S3 on {address}");
    }
    // The log goes to stderr, and all other settings are flags.
    while signals.wait().all(|signal| signal == SIGHUP) {
        if let Some((s3, ..)) = &s3 {
            s3.reload_keys();
        }
    }
    std::thread::scope(|scope| {
        if let Some((_, server, _)) = &s3 {
            scope.spawn(|| server.stop(DRAIN));
        }
        server.stop(DRAIN);
    });
    store.index.sync()?;
    store.index.close();
    Ok(())
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
