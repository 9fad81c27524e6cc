//! No method and target may make the router panic, and a key is never longer than allowed.
#![no_main]


libfuzzer_sys::fuzz_target!(|data: &str| {
    let (method, target) = data.split_once(' ').unwrap_or(("GET", data));
    if let Ok(mkv::api::route::Command::Delete(key)) = mkv::api::route::route(method, target) {
        assert!(!key.is_empty() && key.len() <= mkv::format::placement::KEY_MAX);
        assert_eq!(mkv::format::placement::key_of(&mkv::format::placement::path(&key, 0)), Some((key, 0)));
    }
});
