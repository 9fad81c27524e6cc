//! The store as its users see it: the real master, real nginx volumes, bytes on sockets.
//!
//! - `cluster`: a store of its own for each test, and what has to hold when the test is over
//! - `client`: HTTP, also as no client should speak it
//! - `faulty`: a proxy before a volume that misbehaves on purpose
//! - `golden`: the frozen rules of the files, written down a second time
//! - `operator`: the commands beside the server, and what they must not change
//!
//! Tests that draw lots print `MKV_SEED=…` and take it back from the environment.

mod client;
mod cluster;
mod faulty;
mod golden;
mod operator;

mod absent;
mod api;
mod auth;
mod clients;
mod command;
mod connections;
mod faults;
mod hostile;
mod http;
mod import;
mod keys;
mod kills;
mod lists;
mod model;
mod operations;
mod outside;
mod protocol;
mod rebalance;
mod rebuild;
mod records;
mod together;
mod uploads;
mod values;
mod verify;

/// The seed of a test that draws lots.
fn random() -> fastrand::Rng {
    let seed = std::env::var("MKV_SEED")
        .map_or_else(|_| fastrand::u64(..), |seed| seed.parse().expect("MKV_SEED is a number"));
    println!("MKV_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}
