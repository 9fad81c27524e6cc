//! Runs the binary with outputs that nobody reads.

use std::io::pipe;
use std::process::{Command, Output, Stdio};

/// Runs thrasher with a standard output whose reader has gone, as in `thrasher | true`.
fn run_unread(options: &[&str]) -> Output {
    let (reader, writer) = pipe().expect("a pipe");
    drop(reader);
    let mut thrasher = Command::new(env!("CARGO_BIN_EXE_thrasher"));
    let thrasher = thrasher.args(options).stdout(writer).stderr(Stdio::piped());
    thrasher.spawn().and_then(|child| child.wait_with_output()).expect("thrasher runs")
}

#[test]
fn a_closed_output_ends_thrasher_quietly() {
    for options in [&["--help"][..], &["--count", "1"], &["--json", "--url", "127.0.0.1:1"]] {
        let output = run_unread(options);
        assert_eq!(output.status.code(), Some(141), "{options:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{options:?}");
    }
}

#[test]
fn a_closed_stderr_does_not_change_the_exit_status() {
    let (reader, writer) = pipe().expect("a pipe");
    drop(reader);
    let mut thrasher = Command::new(env!("CARGO_BIN_EXE_thrasher"));
    let status = thrasher.arg("--unknown").stderr(writer).status().expect("thrasher runs");
    assert_eq!(status.code(), Some(2));
}
