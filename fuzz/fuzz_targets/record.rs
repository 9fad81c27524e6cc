//! What decodes encodes to a text that decodes to the same.
#![no_main]


libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some(record) = mkv::format::record::Record::decode(data) {
        assert_eq!(mkv::format::record::Record::decode(record.encode().as_bytes()), Some(record));
    }
    if let Some(debris) = mkv::format::record::Debris::decode(data) {
        assert_eq!(mkv::format::record::Debris::decode(debris.encode().as_bytes()), Some(debris));
    }
});
