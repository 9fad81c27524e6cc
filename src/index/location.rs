//! Where an index is, as `-db` says, and how each command opens it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::Index;
use super::backup::Unpacked;
use super::directory::{create_new, database, is_locked, lock_dir, publish_new, remove, unpack_new, unpacked_in};
use super::rocks::Rocks;
use super::role::Role;
use super::sql::{Sql, Url};
use crate::error::{Error, Result};

/// Where an index is.
#[derive(Debug, Clone)]
pub enum Location {
    /// A folder with a RocksDB.
    Folder(PathBuf),
    /// A PostgreSQL database.
    Database {
        url: Url,
        /// What this process is, and where: other masters show it.
        name: String,
        /// The flags on which all masters have to agree.
        flags: String,
    },
}

/// How many MiB of the log of changes are kept for followers.
pub const LOG: u64 = 1024;

impl Location {
    /// Opens the index for a command that writes it. A folder is locked against all others; a database gets a session,
    /// beside those of others. `create`: makes the index if there is none. `sync`: a write to a folder is on disk when
    /// it returns. `log`: about so many MiB of the log are kept for followers.
    pub fn open(&self, create: bool, sync: bool, log: u64) -> Result<Index> {
        match self {
            Location::Folder(folder) => {
                let (mut rocks, role) = open_locked(folder, create, sync, log)?;
                role.check_master(folder)?;
                rocks.begin_run(role)?;
                Ok(rocks.into())
            }
            Location::Database { url, name, flags } => Sql::open(url, name, flags, create).map(Index::Sql),
        }
    }

    /// Opens the copy of a follower.
    pub fn open_to_follow(&self, sync: bool, log: u64) -> Result<Index> {
        let (mut rocks, role) = open_locked(self.folder()?, false, sync, log)?;
        rocks.begin_following(&role)?;
        Ok(rocks.into())
    }

    /// The folder of the index. A database has none, and followers of its own.
    pub fn folder(&self) -> Result<&Path> {
        match self {
            Location::Folder(folder) => Ok(folder),
            Location::Database { .. } => {
                Err(Error::Failed("-db: the index is in PostgreSQL: start another mkv server on it".into()))
            }
        }
    }

    /// Opens the index for reading, also beside a running master. A folder shows the state at the last `catch_up`.
    pub fn open_to_read(&self) -> Result<Index> {
        match self {
            Location::Folder(folder) => Rocks::open_to_read(&database(folder)?).map(Index::from),
            Location::Database { url, .. } => Sql::open_to_read(url).map(Index::Sql),
        }
    }

    /// Whether several processes may write the index at once.
    pub fn is_shared(&self) -> bool {
        matches!(self, Location::Database { .. })
    }

    /// Whether a command that writes, such as a running master, uses the index.
    pub fn is_in_use(&self) -> Result<bool> {
        match self {
            Location::Folder(folder) => Ok(is_locked(folder)),
            Location::Database { url, .. } => Sql::open_to_read(url)?.is_in_use(),
        }
    }

    /// Whether there is an index, readable or not. A database that is to be replaced has none.
    pub fn exists(&self) -> Result<bool> {
        match self {
            Location::Folder(folder) => Ok(database(folder)?.exists()),
            Location::Database { .. } => Ok(false),
        }
    }

    /// Fails if there is an index, readable or not.
    pub fn check_vacant(&self) -> Result<()> {
        match self {
            Location::Folder(folder) if database(folder)?.exists() => {
                let text = "there is an index: give another folder, or move its index/ away";
                Err(Error::Failed(format!("-db {}: {text}", folder.display())))
            }
            _ => Ok(()),
        }
    }

    /// A folder for what is needed for a while beside the index.
    pub fn scratch(&self) -> PathBuf {
        match self {
            Location::Folder(folder) => unpacked_in(folder),
            Location::Database { .. } => std::env::temp_dir().join(format!("mkv-backup-{}", std::process::id())),
        }
    }

    /// Removes that folder.
    pub fn remove_scratch(&self) -> Result<()> {
        remove(&self.scratch())
    }

    /// Locks the index, to make another one in its place. A database has to be empty and in nobody's use.
    pub fn replace(&self) -> Result<Replacement> {
        match self {
            Location::Folder(folder) => {
                let lock = lock_dir(folder, true)?;
                Role::read(folder)?.check_master(folder)?;
                database(folder)?;
                Ok(Replacement::Folder { folder: folder.clone(), _lock: lock })
            }
            Location::Database { url, .. } => {
                Sql::fill(url)?;
                Ok(Replacement::Database(url.clone()))
            }
        }
    }
}

fn open_locked(folder: &Path, create: bool, sync: bool, log: u64) -> Result<(Rocks, Role)> {
    let (lock, role) = (lock_dir(folder, create)?, Role::read(folder)?);
    let mut rocks = Rocks::open_keeping(&database(folder)?, create, sync, log)?;
    rocks.folder_lock = Some(lock);
    Ok((rocks, role))
}

/// A new index that is to take the place of one.
pub enum Replacement {
    Folder { folder: PathBuf, _lock: File },
    Database(Url),
}

impl Replacement {
    /// Fails unless the index that is to be replaced is empty.
    pub fn check_empty(&self) -> Result<()> {
        let Replacement::Folder { folder, .. } = self else { return Ok(()) };
        let folder = database(folder)?;
        if folder.exists() && !Rocks::open(&folder, false, false)?.is_empty()? {
            return Err(Error::Failed(format!("the index {} is not empty: give another -db", folder.display())));
        }
        Ok(())
    }

    /// Makes the new index, empty.
    pub fn create(&self) -> Result<Index> {
        match self {
            Replacement::Folder { folder, .. } => create_new(folder).map(Index::from),
            Replacement::Database(url) => Sql::filling(url).map(Index::Sql),
        }
    }

    /// Makes the new index from a backup. Only a folder can take one as it is.
    pub fn unpack(&self, backup: &mut dyn Read) -> Result<Unpacked> {
        match self {
            Replacement::Folder { folder, .. } => unpack_new(backup, folder),
            Replacement::Database(_) => Err(Error::Failed(
                "a backup is restored into a folder: then fill the database with mkv import -index FOLDER".into(),
            )),
        }
    }

    /// Removes what was made of the new index. A database stays closed to masters.
    pub fn discard(&self) -> Result<()> {
        match self {
            Replacement::Folder { folder, .. } => remove(&folder.join("index.new")),
            Replacement::Database(_) => Ok(()),
        }
    }

    /// Puts the new index, which must be closed, in the place of the old one. An old one is kept as `index.old`, unless
    /// `forget` is set.
    pub fn publish(self, forget: bool) -> Result<()> {
        match &self {
            Replacement::Folder { folder, .. } => {
                if forget {
                    remove(&database(folder)?)?;
                }
                publish_new(folder)
            }
            Replacement::Database(url) => Sql::filled(url),
        }
    }
}
