//! Trace of a run, line by line. Two runs of a seed must write the same lines. `STRANDLINE_LOG=strandline=debug`, or
//! another filter of this form, adds the log of the brokers. `STRANDLINE_TRACE=live` prints each line at once, for runs
//! that do not end.

use std::{
    cell::RefCell,
    fmt::{self, Write as _},
    io,
    sync::Arc,
};

use strandline::task::{clock, lock::Mutex, process::SimProcess};
use tokio::time::Instant;

thread_local! {
    static LAST: RefCell<Option<Trace>> = const { RefCell::new(None) };
}

/// Returns the trace of this thread's last run, also after a failure.
pub(crate) fn last() -> String {
    LAST.with_borrow(|last| last.as_ref().map(Trace::text)).unwrap_or_default()
}

/// Prints the last trace if `STRANDLINE_TRACE` is set and its lines were not printed at once.
pub(crate) fn print_last() {
    if trace_setting().is_some_and(|value| value != LIVE) {
        println!("{}", last());
    }
}

/// Value of `STRANDLINE_TRACE` with which lines are printed at once.
const LIVE: &str = "live";

fn trace_setting() -> Option<String> {
    std::env::var("STRANDLINE_TRACE").ok().filter(|value| !value.is_empty())
}

/// Runs `work`. If `STRANDLINE_LOG` is set, adds the log lines that this thread writes meanwhile to the trace.
pub(crate) fn with_log<T>(work: impl FnOnce() -> T) -> T {
    let Some(filter) = std::env::var("STRANDLINE_LOG").ok().filter(|filter| !filter.is_empty()) else { return work() };
    let log =
        tracing_subscriber::fmt().with_env_filter(filter).without_time().with_ansi(false).with_writer(|| TraceWriter);
    tracing::subscriber::with_default(log.finish(), work)
}

/// Writer of the log into this thread's trace, one line at a time.
struct TraceWriter;

impl io::Write for TraceWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let process = SimProcess::current().map_or(0, |process| process.id());
        let text = String::from_utf8_lossy(line);
        LAST.with_borrow(|last| {
            if let Some(trace) = last {
                trace.record(format_args!("process {process}: {}", text.trim_end()));
            }
        });
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines with their times. Clones share the lines.
#[derive(Clone)]
pub(crate) struct Trace {
    began: Instant,
    lines: Arc<Mutex<String>>,
    is_live: bool,
}

impl Trace {
    /// Creates an empty trace, which becomes the last one of this thread.
    pub(crate) fn new() -> Self {
        let is_live = trace_setting().is_some_and(|value| value == LIVE);
        let trace = Self { began: clock::monotonic(), lines: Arc::default(), is_live };
        LAST.set(Some(trace.clone()));
        trace
    }

    pub(crate) fn record(&self, what: fmt::Arguments<'_>) {
        let elapsed_us = (clock::monotonic() - self.began).as_micros();
        if self.is_live {
            println!("{elapsed_us:>10} {what}");
        }
        writeln!(self.lines.lock(), "{elapsed_us:>10} {what}").unwrap();
    }

    fn text(&self) -> String {
        self.lines.lock().clone()
    }
}
