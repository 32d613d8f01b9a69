//! What happened in a run, line by line. Two runs of a seed must write the same.

use std::{
    cell::RefCell,
    fmt::{self, Write as _},
    sync::{Arc, Mutex},
};

use strandline::task::clock;
use tokio::time::Instant;

thread_local! {
    static LAST: RefCell<Option<Trace>> = const { RefCell::new(None) };
}

/// What happened in this thread's last run, however it ended.
pub(crate) fn last() -> String {
    LAST.with_borrow(|last| last.as_ref().map(Trace::text)).unwrap_or_default()
}

/// Lines with their moments. Clones share them.
#[derive(Clone)]
pub(crate) struct Trace {
    began: Instant,
    lines: Arc<Mutex<String>>,
}

impl Trace {
    pub(crate) fn new() -> Self {
        let trace = Self { began: clock::monotonic(), lines: Arc::default() };
        LAST.set(Some(trace.clone()));
        trace
    }

    pub(crate) fn note(&self, what: fmt::Arguments<'_>) {
        let passed = (clock::monotonic() - self.began).as_micros();
        writeln!(self.lines.lock().unwrap(), "{passed:>10} {what}").unwrap();
    }

    fn text(&self) -> String {
        self.lines.lock().unwrap().clone()
    }
}
