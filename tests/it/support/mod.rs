//! What the tests share.
//!
//! - `cluster`: a store for one test, and the checks that end every test
//! - `http_client`: a raw HTTP/1.1 client that can also violate the protocol
//! - `faulty_proxy`: a proxy in front of a volume that injects faults
//! - `follower`: a follower of the master
//! - `browser`: a real headless Chromium
//! - `commands`: runs mkv's commands and compares disks and indexes before and after
//! - `postgres`: a private PostgreSQL for one test
//! - `random`: random input from a seed that is printed
//! - `reference`: a second implementation of blob paths and placement
//! - `s3`: a client of the S3 endpoint that shares no code with the server

pub mod browser;
pub mod cluster;
pub mod commands;
pub mod faulty_proxy;
pub mod follower;
pub mod http_client;
pub mod postgres;
pub mod random;
pub mod reference;
pub mod s3;
