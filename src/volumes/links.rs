//! What the master gives away of volumes that check signatures: links to blobs, and the answer to a login.

use std::time::Duration;

use super::client::Response;
use super::{Auth, Target, Volumes, unreachable};
use crate::error::{Error, Result};
use crate::format::record::volume_of;

/// Where a volume that checks signatures asks for a password. No blob has a name with a dot in front.
const LOGIN: &str = "/.login";

impl Volumes {
    /// Whether the volumes check signatures, and passwords only at `check_login`.
    pub fn are_signed(&self) -> bool {
        self.secret.is_some()
    }

    /// Whether the volume takes this Authorization header for the login of a user; without one,
    /// whether it lets everybody in. A volume that checks signatures has one place for this question.
    pub fn check_login(&self, volume: &str, auth: Auth) -> Result<bool> {
        if !self.are_signed() {
            return self.accepts_login(volume, auth);
        }
        match self.ask("HEAD", &[volume], LOGIN, auth).remove(0)? {
            Response { status: 204, .. } => Ok(true),
            // A volume without AUTH.
            Response { status: 404, .. } if auth.is_none() => Ok(true),
            Response { status: 401, .. } => Ok(false),
            Response { status, .. } => Err(Error::Refused { volume: volume.into(), status }),
        }
    }

    /// Warns of volumes that answer without a signature, and of those that refuse it. Without
    /// `-secret` it does nothing.
    pub fn warn_if_open(&self, volumes: &[String]) {
        for volume in volumes.iter().filter(|_| self.are_signed()) {
            let unsigned = self.ask_within(self.timeout, "HEAD", &[volume], |_, _| "/".into(), None).remove(0);
            if unsigned.is_ok_and(|answer| answer.status == 200) {
                log::warn!("volume {volume} answers requests without a signature: start it with SECRET=FILE");
            }
            if self.accepts_login(volume, None) == Ok(false) {
                log::error!("volume {volume} refuses the signature: give it the secret of -secret, and set its clock");
            }
        }
    }

    /// The URL, without `http://`, that reads this blob for so long.
    pub fn link(&self, replica: &str, path: &str, time: Duration) -> String {
        let signature = self.secret.as_ref().map(|secret| secret.query("GET", Target(replica, path), time));
        format!("{replica}{path}{}", signature.unwrap_or_default())
    }

    /// The same, with an address in place of the volume's name: the one where it answered last.
    pub fn link_by_address(&self, replica: &str, path: &str, time: Duration) -> Result<String> {
        let address = self.volume(replica).connections.peer().map_err(|e| unreachable(replica, &e.to_string()))?;
        let link = self.link(replica, path, time);
        Ok(format!("{address}{}", &link[volume_of(replica).len()..]))
    }
}
