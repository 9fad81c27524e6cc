//! The commands beside the server: rebuild, rebalance, verify, import, dump, backup, restore, promote; and what
//! `mkv follow` does before it serves.
//!
//! Each command prints its progress to stderr and its result to stdout, and fails if anything could not be done or was
//! found wrong. Work on many keys runs in parallel with rayon; memory does not grow with the number of keys. No error
//! ends a command in silence: it is counted, named and reflected in the exit status.
//!
//! The room may name `store`, `index`, `volumes` and `format`. No other room names it, except the command line.

pub mod backup;
mod carry_over;
pub mod dump;
mod examine;
pub mod follow;
pub mod import;
pub mod rebalance;
pub mod rebuild;
mod repair;
mod report;
mod scan;
pub mod verify;
