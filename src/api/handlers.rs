//! Answers requests: runs each command on the store, and makes, counts and logs the response.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::accel;
use super::auth::{Authenticator, Credentials};
use super::health::{Health, LastCheck};
use super::metrics::Metrics;
use super::page::{self, Figures};
use super::route::{Browse, Command, Position, View, route};
use super::samples::{EVERY, Samples};
use super::status::RequestId;
use super::{Config, status};
use crate::error::{Error, Result};
use crate::format::record::{Hash, hex, unhex};
use crate::format::time::stamp;
use crate::http::{Body, Content, Counters, Handler, Refusal, Request, Response};
use crate::logging;
use crate::store::stats::Statistics;
use crate::store::{List, Located, Store};
use crate::volumes::Auth;
use crate::volumes::upload::Upload;

/// A body that a command has no use for is accepted up to this length, in bytes: some clients send one with every
/// request.
const IGNORED_BODY: u64 = 1024;

/// How long a request for statistics waits for the pass that counts them.
const STATS_WAIT: Duration = Duration::from_secs(5);

/// A client must read a backup within this time and at this rate, in bytes a second: while it reads, old tables of the
/// index stay on the disk.
const BACKUP_TIME: Duration = Duration::from_secs(60);
const BACKUP_RATE: u64 = 256 << 10;

/// How long a follower waits for news of a value that no volume has.
const CATCH_UP: Duration = Duration::from_millis(500);

pub struct Api {
    store: Arc<Store>,
    config: Config,
    /// `None`: every client is anonymous.
    authenticator: Option<Authenticator>,
    metrics: Arc<Metrics>,
    samples: Arc<Samples>,
    checked: LastCheck,
    statistics: Arc<Statistics>,
    begun: Instant,
    /// The number of the last request.
    requests: AtomicU64,
}

impl Handler for Api {
    fn handle<'a>(&'a self, request: &Request<'_>, body: &mut Body<'_>) -> Response<'a> {
        let begun = Instant::now();
        let id = RequestId::new(request.header("X-Request-Id"), self.next_number());
        let (mut response, error) = match self.answer(request, body) {
            Ok(response) => (response, None),
            Err(Error::NotFound(_)) if wants_page(request) => (status::welcome(), Some("client")),
            // The Go master sends no body either.
            Err(Error::NotFound(_)) if matches!(request.method, "GET" | "HEAD") => (status::empty(404), Some("client")),
            Err(error) => (status::failure(&error, id), Some(status::kind(&error))),
        };
        let path = request.target.split('?').next().unwrap_or_default();
        // The log is read all the time, and its answers wait for changes.
        if !request.target.starts_with("/?log") || error.is_some() {
            self.count((request.method, path, id), &response, error, begun.elapsed());
        }
        if let Some(following) = self.store.index.following() {
            response.headers.push(("Key-Age", following.age().as_secs_f64().ceil().to_string()));
        }
        if let RequestId::Given(id) = id {
            response.headers.push(("X-Request-Id", id.to_string()));
        }
        response
    }

    fn refuse(&self, refusal: Refusal) -> Response<'_> {
        let id = RequestId::Own(self.next_number());
        let response = status::refusal(refusal, id);
        let kind = if response.status == 503 { "unavailable" } else { "client" };
        self.count(("-", "-", id), &response, Some(kind), Duration::ZERO);
        response
    }
}

impl Api {
    pub fn new(
        store: Arc<Store>,
        config: Config,
        authenticator: Option<Authenticator>,
        counters: Arc<Counters>,
    ) -> Api {
        let start = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
        let (metrics, begun) = (Arc::new(Metrics::new(counters)), Instant::now());
        let (samples, checked, statistics) = Default::default();
        Api { store, config, authenticator, metrics, samples, checked, statistics, begun, requests: start.into() }
    }

    /// Counts the requests of another door: method, status, the error if there was one, and the time it took.
    pub fn observer(&self) -> impl Fn(&str, u16, Option<&Error>, Duration) + Send + Sync + use<> {
        let metrics = self.metrics.clone();
        move |method: &str, status: u16, error: Option<&Error>, time: Duration| {
            let kind = error.map(status::kind).or((status >= 400).then_some("client"));
            metrics.count(method, status, kind, time);
        }
    }

    /// Takes a sample for the page's charts every few seconds, for ever.
    pub fn sampler(&self) -> impl FnOnce() + Send + 'static + use<> {
        let (metrics, samples, volumes) = (self.metrics.clone(), self.samples.clone(), self.store.volumes.clone());
        move || {
            loop {
                samples.take(metrics.totals(), || volumes.snapshot());
                std::thread::sleep(EVERY);
            }
        }
    }

    fn answer(&self, request: &Request, body: &mut Body) -> Result<Response<'_>> {
        let client = match &self.authenticator {
            Some(authenticator) => Some(authenticator.login(request.header("Authorization"))?),
            None => None,
        };
        // Volumes that check signatures get no password.
        let client = client.filter(|_| !self.store.volumes.are_signed());
        let command = route(request.method, request.target)?;
        let is_upload = matches!(command, Command::Put { .. });
        if !is_upload && body.length().is_none_or(|length| length > IGNORED_BODY) {
            return Err(Error::BadRequest("only PUT and REPLACE take a body".into()));
        }
        let content_md5 = request.header("Content-MD5").map(content_md5).transpose()?;
        let upload = Upload { length: body.length(), content_md5, reader: body };
        let front = Some(request).filter(|_| self.config.accel && accel::is_from_front(request));
        let response = self.run(command, upload, client.as_ref(), front);
        // The credentials were revoked since the authenticator cached them.
        if let (Err(Error::Refused { status: 401 | 403, .. }), Some(authenticator), Some(client)) =
            (&response, &self.authenticator, &client)
        {
            authenticator.forget(client);
            return Err(Error::Unauthorized);
        }
        response
    }

    /// `front`: the request, if it came through the front.
    fn run(
        &self,
        command: Command,
        upload: Upload,
        client: Option<&Credentials>,
        front: Option<&Request>,
    ) -> Result<Response<'_>> {
        let store = &self.store;
        let auth = client.map(|client| client.header.as_str()).or(store.own_auth());
        let done = |()| status::empty(204);
        if command.writes() {
            self.store.check_master()?;
        }
        match command {
            Command::Get { key, path } => {
                let failed = front.map_or(Vec::new(), accel::failed);
                match (self.find(&key, auth, &failed)?, front) {
                    (Some(located), Some(front)) => {
                        accel::response(store, &located, front, client, self.config.linktime)
                    }
                    (Some(located), None) => Ok(self.redirect(&located, client)),
                    (None, _) => self.missing(&path),
                }
            }
            Command::Put { key, replace } => {
                self.metrics.uploads.fetch_add(1, Ordering::Relaxed);
                let stored = store.put(&key, replace, upload, auth);
                self.metrics.uploads.fetch_sub(1, Ordering::Relaxed);
                stored.map(|()| status::empty(201))
            }
            Command::Delete(key) => store.delete(&key, auth).map(done),
            Command::Unlink(key) => store.unlink(&key).map(done),
            Command::Relink(key) => store.relink(&key, auth).map(done),
            Command::Rebalance(key) => store.rebalance(&key, auth).map(|_| status::empty(204)),
            Command::List(list) => self.list(list),
            Command::Metrics => Ok(self.metrics_text(auth)),
            Command::Health => Ok(self.health(auth)),
            Command::Ready if store.index.is_ready() => Ok(status::text(200, "text/plain", "ready\n".into())),
            Command::Ready => Err(Error::Unavailable("the database is away: ask another master".into())),
            Command::Stats => self.stats(),
            Command::Status(view, browse) => self.status(view, &browse, auth),
            Command::Backup => self.backup(),
            Command::Log(position) => self.log(position),
        }
    }

    /// Finds a replica of a live key. A follower may not know yet that a value was replaced or deleted.
    fn find(&self, key: &[u8], auth: Auth, failed: &[&str]) -> Result<Option<Located>> {
        let mut found = self.store.get(key, auth, failed);
        let Some(following) = self.store.index.following() else { return found };
        let begun = Instant::now();
        while matches!(found, Err(Error::Gone)) && begun.elapsed() < CATCH_UP {
            std::thread::sleep(CATCH_UP / 10);
            found = self.store.get(key, auth, failed);
        }
        match found {
            Err(Error::Gone) => Err(Error::Unavailable(format!(
                "no volume has the value that this follower knows: ask http://{}",
                following.master
            ))),
            found => found,
        }
    }

    /// Sends a reader to a blob.
    fn redirect(
        &self,
        Located { record, replica, path, balanced }: &Located,
        client: Option<&Credentials>,
    ) -> Response<'_> {
        // Clients drop the Authorization header when they are sent to another port, so the URL carries the login, as
        // the Go master's does.
        let login = client.map_or("", |client| &client.url);
        let link = self.store.volumes.link(replica, path, self.config.linktime);
        let balance = if *balanced { "balanced" } else { "unbalanced" };
        let mut headers = vec![
            ("Location", format!("http://{login}{link}")),
            ("Key-Volumes", record.replicas.join(",")),
            ("Key-Balance", balance.to_string()),
        ];
        let private = client.is_some() || self.store.volumes.are_signed();
        headers.extend(private.then(|| ("Cache-Control", "no-store".to_string())));
        headers.extend(record.hash.map(|hash| ("Content-Md5", hex(&hash))));
        Response { headers, ..status::empty(302) }
    }

    /// The response for a key that is not here. `path`: the target's path as it was sent.
    fn missing(&self, path: &str) -> Result<Response<'_>> {
        let Some(fallback) = &self.config.fallback else { return Err(Error::NOT_FOUND) };
        let headers = vec![("Location", format!("http://{fallback}{path}"))];
        Ok(Response { headers, ..status::empty(302) })
    }

    fn list(&self, list: List) -> Result<Response<'_>> {
        let page = self.store.page(list)?;
        let length = page.length;
        let write = Box::new(move |out: &mut dyn io::Write| page.write(out));
        let headers = vec![("Content-Type", "application/json".to_string())];
        Ok(Response { headers, content: Content::Stream { length, write }, ..status::empty(200) })
    }

    /// The index as one file.
    fn backup(&self) -> Result<Response<'_>> {
        let mut backup = self.store.index.backup(false)?;
        let deadline = Instant::now() + BACKUP_TIME + Duration::from_secs(backup.length / BACKUP_RATE);
        let name = format!("attachment; filename=\"mkv-{}.tar\"", stamp(backup.time));
        let headers = vec![("Content-Type", "application/x-tar".to_string()), ("Content-Disposition", name)];
        let length = backup.length;
        let write = Box::new(move |out: &mut dyn io::Write| {
            let mut chunk = vec![0; 64 << 10];
            loop {
                match backup.read(&mut chunk)? {
                    0 => return Ok(()),
                    _ if Instant::now() > deadline => return Err(io::ErrorKind::TimedOut.into()),
                    count => out.write_all(&chunk[..count])?,
                }
            }
        });
        Ok(Response { headers, content: Content::Stream { length, write }, ..status::empty(200) })
    }

    /// The log of changes after this position.
    fn log(&self, position: Option<Position>) -> Result<Response<'_>> {
        let index = &self.store.index;
        let log = match position {
            None => index.head()?,
            Some(Position { since, run }) => {
                self.store.check_master()?;
                index.log(since, &run)?
            }
        };
        let headers = vec![("Content-Type", "application/octet-stream".to_string())];
        let (length, write) = (log.len() as u64, Box::new(move |out: &mut dyn io::Write| out.write_all(&log)));
        Ok(Response { headers, content: Content::Stream { length, write }, ..status::empty(200) })
    }

    fn metrics_text(&self, auth: Auth) -> Response<'_> {
        let gauges = self.metrics.gauges(&self.store, auth);
        status::text(200, "text/plain; version=0.0.4", self.metrics.text(&gauges))
    }

    fn health(&self, auth: Auth) -> Response<'_> {
        let health = Health::check(&self.store, auth);
        let status = if health.is_healthy() { 200 } else { 503 };
        status::text(status, "application/json", format!("{}\n", health.json()))
    }

    fn stats(&self) -> Result<Response<'_>> {
        match self.statistics.get(&self.store, STATS_WAIT)? {
            Some(stats) => {
                let text = serde_json::to_string(&*stats).map_err(|e| Error::Failed(e.to_string()))?;
                Ok(status::text(200, "application/json", format!("{text}\n")))
            }
            None => {
                let mut response = status::text(202, "application/json", "{\"counting\":true}\n".into());
                response.headers.push(("Retry-After", "10".into()));
                Ok(response)
            }
        }
    }

    fn status(&self, view: View, browse: &Browse, auth: Auth) -> Result<Response<'_>> {
        let json = |text| status::text(200, "application/json", text);
        match view {
            View::Page => {
                let (page, policy) = page::page(&self.store, &self.figures(auth), browse)?;
                Ok(status::html(200, policy, page))
            }
            View::Figures => Ok(json(page::figures_json(&self.figures(auth)))),
            View::Keys => Ok(json(page::keys_json(&self.store, browse)?)),
        }
    }

    fn figures(&self, auth: Auth) -> Figures<'_> {
        Figures {
            // First, because asking the volumes is what tells which ones are up.
            health: self.checked.recent(&self.store, auth),
            gauges: self.metrics.gauges(&self.store, auth),
            stats: self.statistics.last(&self.store),
            samples: &self.samples,
            totals: self.metrics.totals(),
            uptime: self.begun.elapsed().as_secs(),
            flags: &self.config.flags,
        }
    }

    /// The number of a new request.
    fn next_number(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Counts and logs a response to a request of this method, path and id. The query is not logged.
    fn count(
        &self,
        (method, path, id): (&str, &str, RequestId),
        response: &Response,
        error: Option<&'static str>,
        time: Duration,
    ) {
        let status = response.status;
        self.metrics.count(method, status, error, time);
        let (level, error) = match &response.content {
            // 410: a value is lost.
            Content::Text(text) if status >= 500 && status != 505 || status == 410 => {
                (log::Level::Error, Some(text.trim_end()))
            }
            _ => (log::Level::Info, None),
        };
        logging::Request { method, path, status, time, id, error }.log(level);
    }
}

/// Whether a browser asks for the root, where people look first.
fn wants_page(request: &Request) -> bool {
    matches!(request.method, "GET" | "HEAD")
        && request.target == "/"
        && request.header("Accept").is_some_and(|types| types.contains("text/html"))
}

/// A digest in base64 (RFC 1864), or in hex as GET shows it.
fn content_md5(text: &str) -> Result<Hash> {
    let digest = unhex(&text.to_ascii_lowercase()).or_else(|| STANDARD.decode(text).ok()?.try_into().ok());
    digest.ok_or_else(|| Error::BadRequest("Content-MD5 is neither base64 nor hex of 16 bytes".into()))
}
