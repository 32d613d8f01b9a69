//! Tests that this machine cannot run. Each skip is printed at once, and `.ci/run` shows the skip among its closing lines.

use std::io::Write as _;

/// Prints that a test was skipped, and the reason. Writes to stderr directly, because the test harness captures the output of tests that
/// pass.
pub(crate) fn skipped(what: &str, why: &str) {
    let line = format!("\nSKIPPED: {what}: {why}\n");
    std::io::stderr().write_all(line.as_bytes()).expect("there is somewhere to say it");
}
