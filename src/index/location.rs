//! Where an index is, as `-db` says, and how each command opens it.

use std::path::PathBuf;

use super::Index;
use super::directory::{create_new, database, is_locked, lock_dir, publish_new, remove};
use super::rocks::Rocks;
use crate::error::{Error, Result};

/// Where an index is.
#[derive(Debug, Clone)]
pub enum Location {
    /// A folder with a RocksDB.
    Folder(PathBuf),
}

impl Location {
    /// Opens the index for a command that writes it, and locks it against all others. `create`: makes it if there is
    /// none. `sync`: a write is on disk when it returns.
    pub fn open(&self, create: bool, sync: bool) -> Result<Index> {
        let Location::Folder(folder) = self;
        let lock = lock_dir(folder, create)?;
        let mut rocks = Rocks::open(&database(folder)?, create, sync)?;
        rocks.folder_lock = Some(lock);
        Ok(Index::Rocks(rocks))
    }

    /// Opens the index for reading, also beside a running master. It shows the state at the last `catch_up`.
    pub fn follow(&self) -> Result<Index> {
        let Location::Folder(folder) = self;
        Rocks::follow(&database(folder)?).map(Index::Rocks)
    }

    /// Whether a command that writes, such as a running master, uses the index.
    pub fn is_in_use(&self) -> bool {
        let Location::Folder(folder) = self;
        is_locked(folder)
    }

    /// Whether there is an index, readable or not.
    pub fn exists(&self) -> Result<bool> {
        let Location::Folder(folder) = self;
        Ok(database(folder)?.exists())
    }

    /// Locks the index, to make another one in its place.
    pub fn replace(&self) -> Result<Replacement> {
        let Location::Folder(folder) = self;
        let lock = lock_dir(folder, true)?;
        database(folder)?;
        Ok(Replacement { folder: folder.clone(), _lock: lock })
    }
}

/// A new index that is to take the place of one.
pub struct Replacement {
    folder: PathBuf,
    _lock: std::fs::File,
}

impl Replacement {
    /// Fails unless the index that is to be replaced is empty.
    pub fn check_empty(&self) -> Result<()> {
        let folder = database(&self.folder)?;
        if folder.exists() && !Rocks::open(&folder, false, false)?.is_empty()? {
            return Err(Error::Failed(format!("the index {} is not empty: give another -db", folder.display())));
        }
        Ok(())
    }

    /// Makes the new index, empty.
    pub fn create(&self) -> Result<Index> {
        create_new(&self.folder).map(Index::Rocks)
    }

    /// Removes what was made of the new index.
    pub fn discard(&self) -> Result<()> {
        remove(&self.folder.join("index.new"))
    }

    /// Puts the new index, which must be closed, in the place of the old one. An old one is kept as `index.old`, unless
    /// `forget` is set.
    pub fn publish(self, forget: bool) -> Result<()> {
        if forget {
            remove(&database(&self.folder)?)?;
        }
        publish_new(&self.folder)
    }
}
