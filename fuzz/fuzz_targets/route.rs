//! No method and target may make the router panic, and a key is never longer than allowed.
#![no_main]
#![allow(dead_code)]

#[path = "../../src/error.rs"]
mod error;
#[path = "../../src/placement.rs"]
mod placement;
#[path = "../../src/record.rs"]
mod record;
#[path = "../../src/route.rs"]
mod route;

libfuzzer_sys::fuzz_target!(|data: &str| {
    let (method, target) = data.split_once(' ').unwrap_or(("GET", data));
    if let Ok(route::Command::Delete(key)) = route::route(method, target) {
        assert!(!key.is_empty() && key.len() <= placement::KEY_MAX);
        assert_eq!(placement::key_of(&placement::path(&key, 0)), Some((key, 0)));
    }
});
