//! Tests of the real binary with real nginx volumes.
//!
//! Tests with random input print `MKV_SEED=…` and read it back from the environment.

mod support;

// HTTP and the API.
mod api;
mod auth;
mod concurrency;
mod connections;
mod front_proxy;
mod hostile_requests;
mod http;
mod keys;
mod lists;
mod model;
mod real_clients;
mod server_process;
mod values;

// Failures and crashes.
mod crash_recovery;
mod failed_uploads;
mod kills_under_load;
mod upload_timeouts;
mod volume_failures;

// The index and the commands beside the server.
mod import;
mod index_records;
mod rebalance;
mod rebuild;
mod store_history;
mod verify;

/// The generator for a test's random input.
fn random() -> fastrand::Rng {
    let seed = std::env::var("MKV_SEED")
        .map_or_else(|_| fastrand::u64(..), |seed| seed.parse().expect("MKV_SEED is a number"));
    println!("MKV_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}
