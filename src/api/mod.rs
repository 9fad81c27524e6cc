//! Requests of the HTTP API: method and target to command, authorization, metrics.

pub mod auth;
pub mod metrics;
pub mod route;
