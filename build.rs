//! Tells the program which commit it is built from and which RocksDB it contains, for `mkv -version`.
//!
//! It runs again only when the sources change. So the commit is that of the sources, and a commit of documents builds
//! nothing anew. What was built before its commit goes on saying "changed" until it is built anew.

use std::process::Command;

/// What the program is made of.
const SOURCES: [&str; 4] = ["src", "build.rs", "Cargo.toml", "Cargo.lock"];

fn main() {
    for source in SOURCES {
        println!("cargo:rerun-if-changed={source}");
    }
    println!("cargo:rustc-env=MKV_ROCKSDB={}", rocksdb_version().unwrap_or_default());
    if let Some(commit) = commit() {
        println!("cargo:rustc-env=MKV_COMMIT={commit}");
    }
}

/// The commit that last changed the sources, marked if they differ from it. `None` outside of a clone.
fn commit() -> Option<String> {
    let commit = git(&["log", "-1", "--format=%h", "--"]).filter(|commit| !commit.is_empty())?;
    let is_changed = git(&["status", "--porcelain", "--"]).is_some_and(|changes| !changes.is_empty());
    Some(if is_changed { format!("{commit}, changed") } else { commit })
}

fn git(words: &[&str]) -> Option<String> {
    let output = Command::new("git").env("GIT_OPTIONAL_LOCKS", "0").args(words).args(SOURCES).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_string())
}

/// The crate librocksdb-sys has RocksDB's version behind a plus.
fn rocksdb_version() -> Option<String> {
    let lock = std::fs::read_to_string("Cargo.lock").ok()?;
    let (_, package) = lock.split_once("name = \"librocksdb-sys\"")?;
    let (_, version) = package.lines().find_map(|line| line.strip_prefix("version = "))?.split_once('+')?;
    Some(version.trim_end_matches('"').to_string())
}
