//! `mkv follow`, before the server starts: whether this process is a master or follows one, and its first copy. And
//! `mkv promote`.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::index::{Location, Role, is_locked, lock_dir, publish_checkpoint, remove};
use crate::store::follow::{Peer, REQUEST};

/// How long a running follower may take to become a master.
const PROMOTION: Duration = Duration::from_secs(30);

/// Whether the process is to follow its peer; if so, it has an index then. `wants`: it was started as a follower.
pub fn prepare(peer: &Peer, wants: bool) -> Result<bool> {
    let folder = peer.db.as_path();
    let _lock = lock_dir(folder, true)?;
    remove_request(folder)?;
    let role = Role::read(folder)?;
    let Some(follows) = role_with(peer, &role, wants)? else { return Ok(false) };
    if follows != role {
        if role.follows.is_none() {
            // Of an earlier time as a follower.
            remove(&folder.join("index.new"))?;
        }
        follows.write(folder)?;
    }
    let published = publish_checkpoint(folder, follows.stepped_down)?;
    if published && follows.stepped_down {
        // The old master's index is kept once.
        Role { stepped_down: false, ..follows }.write(folder)?;
    }
    if !folder.join("index").exists() {
        peer.fetch_checkpoint()?;
        publish_checkpoint(folder, false)?;
    }
    Ok(true)
}

/// The role of a process that follows this peer; `None`: it is a master.
fn role_with(peer: &Peer, role: &Role, wants: bool) -> Result<Option<Role>> {
    let (folder, host) = (&peer.db, peer.host());
    let follows = Role { follows: Some(host.into()), ..role.clone() };
    let has_index = folder.join("index").exists();
    match &role.follows {
        Some(master) if wants || master == host => return Ok(Some(follows)),
        Some(_) => return role.check_master(folder).map(|()| None),
        None if wants && !has_index => return Ok(Some(follows)),
        None => {}
    }
    let head = peer.head();
    match &head {
        Ok(head) if head.follows.is_none() && head.generation > role.generation => {
            log::warn!("http://{host} was promoted: this master steps down and follows it");
            return Ok(Some(Role { stepped_down: has_index, ..follows }));
        }
        Err(error) if has_index => log::warn!("it is not known whether the peer was promoted: {error}"),
        _ => {}
    }
    if wants && role.generation == 0 {
        return Err(Error::Failed(format!(
            "-db {}: this is a master's index, and http://{host} is not known to have been promoted in its place: give \
             an empty folder, or run mkv server",
            folder.display()
        )));
    }
    Ok(None)
}

/// Makes a follower's index a master's. A running follower becomes the master in place.
pub fn promote(db: &Location) -> Result<()> {
    let (folder, begun) = (db.folder()?, Instant::now());
    let role = Role::read(folder)?;
    if role.follows.is_none() {
        if !db.exists()? {
            return Err(Error::Failed(format!("-db {}: there is no index here", folder.display())));
        }
        println!("-db {}: this is a master's index already", folder.display());
        return Ok(());
    }
    while is_locked(folder) {
        let role = Role::read(folder)?;
        if role.follows.is_none() && !role.inherits && !folder.join(REQUEST).exists() {
            println!("the follower is the master now, of generation {}", role.generation);
            return Ok(());
        }
        if begun.elapsed() > PROMOTION {
            remove_request(folder)?;
            let text = "the running follower does not become a master: stop it and run mkv promote again";
            return Err(Error::Failed(format!("-db {}: {text}", folder.display())));
        }
        if role.follows.is_some() {
            fs::write(folder.join(REQUEST), "").map_err(|e| failed(folder, &e))?;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let _lock = lock_dir(folder, true)?;
    publish_checkpoint(folder, role.stepped_down)?;
    if !db.exists()? {
        return Err(Error::Failed(format!("-db {}: the follower has no copy of the index yet", folder.display())));
    }
    remove_request(folder)?;
    // The running one may have been killed after it was promoted.
    let role = Role::read(folder)?;
    let role = if role.follows.is_some() { role.promoted() } else { role };
    role.write(folder)?;
    println!("this is a master's index now, of generation {}: start it", role.generation);
    Ok(())
}

fn remove_request(folder: &Path) -> Result<()> {
    match fs::remove_file(folder.join(REQUEST)) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(failed(folder, &e)),
        _ => Ok(()),
    }
}

fn failed(folder: &Path, e: &std::io::Error) -> Error {
    Error::Failed(format!("-db {}: {REQUEST}: {e}", folder.display()))
}
