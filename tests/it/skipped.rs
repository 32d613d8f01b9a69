//! Reports tests that this machine cannot run. Each report is printed at once, and `.ci/run` repeats it in its last
//! lines.

use std::io::Write as _;

/// Prints that a test was skipped, and the reason. Writes to stderr directly, because the test harness captures the
/// output of tests that pass.
pub(crate) fn report_skipped(what: &str, reason: &str) {
    let line = format!("\nSKIPPED: {what}: {reason}\n");
    std::io::stderr().write_all(line.as_bytes()).expect("the log is writable");
}
