//! Tests that this machine cannot run: that is said where it is seen, and `.ci/run` shows it among its closing lines.

use std::io::Write as _;

/// Says that a test was not run, and why. Past the test harness, which keeps what a test that passes prints.
pub(crate) fn skipped(what: &str, why: &str) {
    let line = format!("\nSKIPPED: {what}: {why}\n");
    std::io::stderr().write_all(line.as_bytes()).expect("there is somewhere to say it");
}
