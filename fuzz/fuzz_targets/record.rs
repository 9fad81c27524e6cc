//! What decodes encodes to a text that decodes to the same.
#![no_main]
#![allow(dead_code)]

#[path = "../../src/record.rs"]
mod record;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some(record) = record::Record::decode(data) {
        assert_eq!(record::Record::decode(record.encode().as_bytes()), Some(record));
    }
    if let Some(debris) = record::Debris::decode(data) {
        assert_eq!(record::Debris::decode(debris.encode().as_bytes()), Some(debris));
    }
});
