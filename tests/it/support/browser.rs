//! A real headless Chromium, driven over its DevTools protocol.
//!
//! Chromium reads commands from descriptor 3 and writes to descriptor 4, as JSON texts that end in a NUL byte.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::cluster::{child_command, signal, wait};
use crate::support::http_client::{TIMEOUT, wait_at_most};

pub struct Browser {
    chromium: Child,
    input: ChildStdin,
    messages: Receiver<Value>,
    session: String,
    last_id: u64,
    /// What went wrong on the page: exceptions, errors in the console, refusals by the Content-Security-Policy.
    pub errors: Vec<String>,
}

impl Browser {
    /// Starts Chromium with an empty page. Its profile and its log lie in this folder.
    pub fn start(folder: &Path) -> Browser {
        let log = fs::File::create(folder.join("chromium.log")).expect("a file can be created");
        let script = "exec chromium --headless --no-sandbox --disable-gpu --no-first-run --no-proxy-server \
                      --disable-dev-shm-usage --disable-background-networking --disable-extensions --mute-audio \
                      --remote-debugging-pipe --user-data-dir=\"$0\" about:blank 3<&0 4>&1 </dev/null >/dev/null";
        let mut command = child_command("KILL");
        command.args(["sh", "-c", script]).arg(folder.join("chromium")).env("HOME", folder);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut chromium = command.spawn().expect("a shell starts");
        let input = chromium.stdin.take().expect("stdin is a pipe");
        let output = BufReader::new(chromium.stdout.take().expect("stdout is a pipe"));
        let (send, messages) = channel();
        std::thread::spawn(move || {
            for text in output.split(0).map_while(Result::ok) {
                let _ = send.send(serde_json::from_slice(&text).expect("Chromium sends JSON"));
            }
        });
        let (session, errors) = Default::default();
        let mut browser = Browser { chromium, input, messages, session, last_id: 0, errors };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let target = json!({ "targetId": target["targetId"], "flatten": true });
        let session = browser.call("Target.attachToTarget", target);
        browser.session = session["sessionId"].as_str().expect("a session").into();
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Calls a method of the DevTools protocol and returns its result.
    #[track_caller]
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.last_id += 1;
        let mut message = json!({ "id": self.last_id, "method": method, "params": params });
        if !self.session.is_empty() {
            message["sessionId"] = self.session.clone().into();
        }
        let sent = write!(self.input, "{message}\0").and_then(|()| self.input.flush());
        sent.expect("Chromium reads: ./test.sh installs it");
        loop {
            let answer = self.messages.recv_timeout(TIMEOUT).expect("Chromium answers: ./test.sh installs it");
            if answer["id"] == self.last_id {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.note(&answer);
        }
    }

    fn note(&mut self, event: &Value) {
        let params = &event["params"];
        let is_error = match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Runtime.consoleAPICalled") => {
                ["error", "warning", "assert"].iter().any(|kind| params["type"] == *kind)
            }
            Some("Log.entryAdded") => ["error", "warning"].iter().any(|level| params["entry"]["level"] == *level),
            _ => false,
        };
        if is_error {
            self.errors.push(params.to_string());
        }
    }

    #[track_caller]
    pub fn open(&mut self, url: &str) {
        let opened = self.call("Page.navigate", json!({ "url": url }));
        assert!(opened["errorText"].is_null(), "{url}: {opened}");
        self.wait_for(
            TIMEOUT,
            &format!("location.href === {} && document.readyState === 'complete'", Value::from(url)),
        );
    }

    /// The value of a JavaScript expression.
    #[track_caller]
    pub fn eval(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let result = self.call("Runtime.evaluate", params);
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until a JavaScript expression is true.
    #[track_caller]
    pub fn wait_for(&mut self, limit: Duration, expression: &str) {
        wait_at_most(limit, expression, || {
            std::thread::sleep(Duration::from_millis(50));
            // The page may be about to change.
            let params = json!({ "expression": expression, "returnByValue": true });
            self.call("Runtime.evaluate", params)["result"]["value"] == true
        });
    }

    /// Types a text into the field that has the focus.
    pub fn type_text(&mut self, text: &str) {
        self.call("Input.insertText", json!({ "text": text }));
    }

    pub fn press_enter(&mut self) {
        for kind in ["keyDown", "keyUp"] {
            let enter =
                json!({ "type": kind, "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r" });
            self.call("Input.dispatchKeyEvent", enter);
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        signal(self.chromium.id(), rustix::process::Signal::TERM);
        if !std::thread::panicking() {
            wait(&mut self.chromium, "Chromium");
        }
    }
}
