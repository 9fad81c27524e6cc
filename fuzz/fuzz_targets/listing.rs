//! No listing may make the parser panic, and a path that is taken for a blob's is one.
#![no_main]
#![allow(dead_code)]

#[path = "../../src/listing.rs"]
mod listing;
#[path = "../../src/placement.rs"]
mod placement;
#[path = "../../src/record.rs"]
mod record;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    for entry in listing::parse(data).unwrap_or_default() {
        let path = format!("/00/00/{}", entry.name);
        if let Some((key, version)) = placement::key_of(&path) {
            assert_eq!(placement::path(&key, version), path);
        }
    }
});
