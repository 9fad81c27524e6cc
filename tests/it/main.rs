//! Tests of the real binary with real nginx volumes.

mod support;

// HTTP and the API.
mod api;
mod auth;
mod concurrency;
mod connections;
mod front_proxy;
mod hostile_requests;
mod http;
mod http_differential;
mod http_limits;
mod keys;
mod lists;
mod model;
mod monitoring;
mod real_clients;
mod secret;
mod server_process;
mod stats;
mod status_page;
mod values;

// Failures and crashes.
mod crash_recovery;
mod failed_uploads;
mod follower;
mod index_failures;
mod kills_under_load;
mod masters;
mod upload_timeouts;
mod volume_failures;

// The S3 endpoint.
mod s3_concurrency;
mod s3_failures;
mod s3_framings;
mod s3_front;
mod s3_lists;
mod s3_model;
mod s3_multipart;
mod s3_objects;
mod s3_requests;
mod s3_signatures;

// The index and the commands beside the server.
mod backup;
mod dump;
mod import;
mod index_records;
mod rebalance;
mod rebuild;
mod rebuild_after_crash;
mod store_history;
mod verify;
