//! The commands beside the server.

pub mod dump;
pub mod import;
pub mod progress;
pub mod rebalance;
pub mod rebuild;
pub mod scan;
pub mod verify;
