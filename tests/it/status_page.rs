//! `?status`: the page for operators, as HTML and JSON and in Chromium.

use std::fs;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::support::browser::Browser;
use crate::support::cluster::{Cluster, Setup};
use crate::support::http_client;

/// A key that would do harm if it were taken for HTML, and one with bytes that are not text.
const SCRIPT: &str = "/strange/<script>alert(1)</script>&amp;\"'";
const BYTES: &[u8] = b"/strange/\xff\n%41\xe2\x80\xae";
const BYTES_SHOWN: &str = "/strange/%FF%0A%2541%E2%80%AE";

fn figures(c: &Cluster) -> Value {
    let answer = c.ask_target("GET", "/?status=json").expect(200);
    assert_eq!(answer.header("Content-Type"), Some("application/json"));
    serde_json::from_slice(&answer.body).expect("JSON")
}

#[test]
fn the_status_page_shows_the_store_without_javascript() {
    let c = Setup::new().flags(&["-userpass", "alice:geheim"]).start();
    c.put(SCRIPT, "value").expect(201);
    c.put(BYTES, "value").expect(201);
    c.put("/unlinked", "value").expect(201);
    c.ask("UNLINK", "/unlinked").expect(204);
    let answer = c.ask_target("GET", "/?status").expect(200);
    assert_eq!(answer.header("Content-Type"), Some("text/html; charset=utf-8"));
    let policy = answer.header("Content-Security-Policy").expect("a policy");
    assert!(policy.starts_with("default-src 'none';") && !policy.contains("unsafe"), "{policy}");
    assert_eq!(answer.header("Cache-Control"), Some("no-store"));
    let page = answer.text();
    println!("the page has {} bytes", page.len());
    assert!(page.len() < 40 << 10, "{}", page.len());
    for text in [
        "All 3 volumes answer",
        &c.names[2],
        "% full",
        "/strange/&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;&quot;&#39;",
        BYTES_SHOWN,
        "-replicas",
        "volume_unreachable",
    ] {
        assert!(page.contains(text), "{text} is missing: {page}");
    }
    assert!(!page.contains("<script>alert") && !page.contains("geheim") && !page.contains("{{"), "{page}");

    let head = c.ask_target("HEAD", "/?status=").expect(200);
    assert!(head.body.is_empty() && head.header("Content-Length").is_some_and(|length| length.len() == 5));
    // The form of the page, as a browser sends it without JavaScript.
    let strange = c.ask_target("GET", "/?status=&prefix=%2Fstrange%2F%25FF").expect(200).text();
    assert!(strange.contains(BYTES_SHOWN) && !strange.contains("/strange/&lt;script&gt;"), "{strange}");
    let keys = c.ask_target("GET", "/?status=keys&prefix=/unlinked").expect(200);
    assert!(keys.text().contains("\"unlinked\"") && !keys.text().contains("/strange"), "{}", keys.text());
    c.ask_target("GET", "/?status&limit=1").expect_error(400, "limit");
    c.ask_target("GET", "/a?status").expect_error(403, "?status");
}

#[test]
fn the_status_page_lists_keys_in_pages() {
    let c = Setup::new().volumes(1).start();
    let keys: Vec<String> = (0..60).map(|n| format!("/a b/{n:02}")).collect();
    keys.iter().for_each(|key| drop(c.put(key, "v").expect(201)));
    let list = |target: &str| -> (Vec<String>, String) {
        let answer = c.ask_target("GET", target).expect(200);
        let view: Value = serde_json::from_slice(&answer.body).expect("JSON");
        let rows = view["rows"]["keys"].as_array().expect("rows").iter();
        let next = view["next"].as_str().expect("a URL").to_string();
        (rows.map(|row| row[0]["l"][0]["t"].as_str().expect("a key").to_string()).collect(), next)
    };
    let (first, next) = list("/?status=keys&prefix=%2Fa+b%2F");
    assert_eq!(first, keys[..30]);
    let query =
        next.strip_prefix("/?status&").and_then(|rest| rest.strip_suffix("#browse")).expect("a URL of the page");
    assert_eq!(list(&format!("/?status=keys&{query}")), (keys[30..].to_vec(), String::new()));
}

#[test]
fn a_browser_that_asks_for_the_root_finds_the_status_page() {
    let c = Setup::new().volumes(1).start();
    let ask =
        |method, target, accept: &str| http_client::ask(&c.address(), method, target, &[("Accept", accept)], None);
    let html = "text/html,application/xhtml+xml,*/*;q=0.8";
    let page = ask("GET", "/", html).expect(404);
    assert!(page.text().contains("href=\"/?status\""), "{}", page.text());
    assert_eq!(ask("HEAD", "/", html).expect(404).header("Content-Type"), Some("text/html; charset=utf-8"));
    ask("GET", "/", "*/*").expect_missing();
    ask("GET", "/other", html).expect_missing();
    c.put("/", "the root is a key, too").expect(201);
    ask("GET", "/", html).expect(302);
}

#[test]
fn the_status_page_shows_a_volume_that_is_down_and_up_again() {
    let c = Cluster::new();
    let state = |c: &Cluster| figures(c)["rows"]["volumes"][1][1]["l"][0]["t"].clone();
    assert_eq!(state(&c), "up");
    c.volumes[1].freeze();
    http_client::wait_at_most(Duration::from_secs(10), "a frozen volume is down", || state(&c) == "down");
    c.volumes[1].thaw();
    http_client::wait_at_most(Duration::from_secs(10), "it is up again", || state(&c) == "up");
}

/// Takes a picture of the page, if MKV_SCREENSHOTS names a folder for it.
fn screenshot(browser: &mut Browser, name: &str, dark: bool, width: u32) {
    let Ok(folder) = std::env::var("MKV_SCREENSHOTS") else { return };
    let scheme = json!({ "name": "prefers-color-scheme", "value": if dark { "dark" } else { "light" } });
    browser.call("Emulation.setEmulatedMedia", json!({ "features": [scheme] }));
    let size = json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false });
    browser.call("Emulation.setDeviceMetricsOverride", size);
    let picture = browser.call("Page.captureScreenshot", json!({ "captureBeyondViewport": true }));
    let bytes = STANDARD.decode(picture["data"].as_str().expect("base64")).expect("base64");
    fs::write(Path::new(&folder).join(name), bytes).expect("a file can be written");
}

#[test]
fn the_status_page_works_in_chromium() {
    let mut c = Cluster::new();
    c.put(SCRIPT, "value").expect(201);
    c.put(BYTES, "value").expect(201);
    (0..60).for_each(|n| drop(c.put(format!("/photos/2026/{n:03}.jpg"), vec![1; 1000 * n + 1]).expect(201)));
    let soon = Duration::from_secs(10);
    let mut browser = Browser::start(&c.folder);
    browser.open(&format!("http://{}/?status", c.address()));
    let headline = |text: &str| format!("document.getElementById('headline').textContent === {}", Value::from(text));
    browser.wait_for(soon, &headline("All 3 volumes answer"));
    screenshot(&mut browser, "light.png", false, 1200);
    screenshot(&mut browser, "dark.png", true, 1200);
    screenshot(&mut browser, "phone.png", false, 390);

    // A killed volume is down within 10 s, a screen reader hears of it, and it comes up again.
    c.volumes[1].kill();
    browser.wait_for(soon, &headline("1 of 3 volumes down"));
    browser.wait_for(soon, "document.querySelectorAll('#rows-volumes .bad')[0].textContent === 'down'");
    assert_eq!(browser.eval("document.getElementById('said').textContent"), "1 of 3 volumes down");
    screenshot(&mut browser, "down.png", true, 1200);
    c.volumes[1].start();
    browser.wait_for(soon, &headline("All 3 volumes answer"));

    // The browser of keys, by keyboard. A strange key is text.
    browser.eval("document.getElementById('prefix').focus()");
    browser.type_text("/strange/");
    browser.press_enter();
    browser.wait_for(soon, "document.getElementById('found').textContent === 'All 2 keys below /strange/'");
    let keys = "[...document.querySelectorAll('#rows-keys th a')].map((key) => key.textContent)";
    assert_eq!(browser.eval(keys), json!([SCRIPT, BYTES_SHOWN]));
    assert_eq!(browser.eval("document.querySelectorAll('#rows-keys script').length"), 0);
    // The link leads to the key, byte for byte.
    let path = "new URL(document.querySelectorAll('#rows-keys a')[1].href).pathname";
    assert_eq!(browser.eval(path), http_client::target(BYTES));
    // The same from the server, in a page that is opened anew.
    browser.open(&format!("http://{}/?status&prefix=%2Fstrange%2F", c.address()));
    assert_eq!(browser.eval(keys), json!([SCRIPT, BYTES_SHOWN]));
    assert!(browser.errors.is_empty(), "{:?}", browser.errors);
    // Nothing is wider than a phone.
    let phone = json!({ "width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": true });
    browser.call("Emulation.setDeviceMetricsOverride", phone);
    assert_eq!(browser.eval("document.documentElement.scrollWidth"), 390);
}
