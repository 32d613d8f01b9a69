//! What happened in a run, line by line. Two runs of a seed must write the same.

use std::{
    fmt::{self, Write as _},
    sync::{Arc, Mutex},
};

use strandline::task::clock;
use tokio::time::Instant;

/// Lines with their moments. Clones share them.
#[derive(Clone)]
pub(crate) struct Trace {
    began: Instant,
    lines: Arc<Mutex<String>>,
}

impl Trace {
    pub(crate) fn new() -> Self {
        Self { began: clock::monotonic(), lines: Arc::default() }
    }

    pub(crate) fn note(&self, what: fmt::Arguments<'_>) {
        let passed = (clock::monotonic() - self.began).as_micros();
        writeln!(self.lines.lock().unwrap(), "{passed:>10} {what}").unwrap();
    }

    pub(crate) fn text(&self) -> String {
        self.lines.lock().unwrap().clone()
    }
}
