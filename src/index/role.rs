//! What a folder `-db` is: a master's, or that of a follower. `role.json`; without it, a master's that was never a
//! follower's.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::directory::{failed, replace_file};
use crate::error::Result;

const NAME: &str = "role.json";

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Role {
    /// How many promotions led to this index. Masters of different generations never choose the same version.
    pub generation: u64,
    /// `host:port` of the master that this folder follows.
    pub follows: Option<String>,
    /// It was a master's when it began to follow: its index is kept when a checkpoint replaces it.
    pub stepped_down: bool,
    /// It was promoted, and has not dealt with the old master's debris yet.
    pub inherits: bool,
}

impl Role {
    pub fn read(db: &Path) -> Result<Role> {
        match fs::read(db.join(NAME)) {
            Ok(text) => serde_json::from_slice(&text).map_err(|e| failed(db, format!("{NAME} does not decode: {e}"))),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Role::default()),
            Err(e) => Err(failed(db, format!("{NAME}: {e}"))),
        }
    }

    /// Replaces the role of this folder, on the disk when this returns.
    pub fn write(&self, db: &Path) -> Result<()> {
        let text = serde_json::to_string(self).unwrap_or_default();
        replace_file(&db.join(NAME), &text).map_err(|e| failed(db, format!("{NAME} cannot be written: {e}")))
    }

    /// Fails if the folder is a follower's.
    pub fn check_master(&self, db: &Path) -> Result<()> {
        match &self.follows {
            None => Ok(()),
            Some(master) => Err(failed(
                db,
                format!(
                    "this is the index of a follower of http://{master}: run mkv follow or, when that master is \
                     stopped for good, mkv promote"
                ),
            )),
        }
    }

    /// The role after a promotion.
    pub fn promoted(&self) -> Role {
        Role { generation: self.generation + 1, inherits: true, ..Role::default() }
    }
}
