//! A server that is no volume: a master, of which another mkv reads a backup or the log.

use std::sync::Arc;
use std::time::Duration;

use ureq::Agent;

use super::client::Connections;
use super::{Opened, agent};
use crate::error::{Error, Result};

pub struct Remote {
    agent: Agent,
    /// `host:port`.
    host: String,
    /// The `Authorization` header for it.
    auth: Option<String>,
}

impl Remote {
    /// `timeout`: for a connection. `stall`: how long it may send nothing.
    pub fn new(host: &str, auth: Option<&str>, timeout: Duration, stall: Duration) -> Remote {
        let agent = agent(Arc::new(Connections::new(host, timeout)), timeout, stall);
        Remote { agent, host: host.into(), auth: auth.map(String::from) }
    }

    pub fn host(&self) -> &str {
        &self.host
    }

    /// Opens what it sends for a GET. Fails unless it answers 200.
    pub fn get(&self, target: &str) -> Result<Opened> {
        let host = &self.host;
        let request = self.agent.get(format!("http://{host}{target}"));
        let request = match &self.auth {
            Some(auth) => request.header("authorization", auth),
            None => request,
        };
        let failed = |why: &str| Error::Failed(format!("http://{host}{target}: {why}"));
        let mut answer = request.call().map_err(|e| failed(&format!("no answer ({e}): does a master run there?")))?;
        if answer.status() != 200 {
            let text = answer.body_mut().with_config().limit(1000).read_to_string().unwrap_or_default();
            let (status, line) = (answer.status().as_u16(), text.lines().next().unwrap_or_default());
            return Err(failed(&format!("it answers {status}: {line}")));
        }
        Opened::new(answer).ok_or_else(|| failed("its answer has no Content-Length"))
    }
}
