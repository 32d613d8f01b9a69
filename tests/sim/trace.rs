//! What happened in a run, line by line. Two runs of a seed must write the same.

use std::{
    cell::RefCell,
    fmt::{self, Write as _},
    io,
    sync::{Arc, Mutex, Once},
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

/// Whether somebody wants to see what happened.
pub(crate) fn is_wished() -> bool {
    std::env::var("STRANDLINE_TRACE").is_ok_and(|wish| !wish.is_empty())
}

/// From now on what the brokers log stands in the trace of their run, where traces are wished for.
pub(crate) fn hear_brokers() {
    static ONCE: Once = Once::new();
    if is_wished() {
        ONCE.call_once(|| {
            let lines = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(false).without_time();
            lines.with_writer(|| Logged).init();
        });
    }
}

/// Writes a line of a broker's log to the trace of this thread's run.
struct Logged;

impl io::Write for Logged {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        LAST.with_borrow(|last| {
            if let Some(trace) = last {
                trace.note(format_args!("{}", String::from_utf8_lossy(line).trim_end()));
            }
        });
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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
