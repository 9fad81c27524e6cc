//! No listing may make the parser panic, and a path that is taken for a blob's is one.
#![no_main]


libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    for entry in mkv::volumes::autoindex::parse(data).unwrap_or_default() {
        let path = format!("/00/00/{}", entry.name);
        if let Some((key, version)) = mkv::format::placement::key_of(&path) {
            assert_eq!(mkv::format::placement::path(&key, version), path);
        }
    }
});
