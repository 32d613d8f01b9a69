//! Retry output of a waiting command on standard error. The output has a line when a problem has lasted a second, when
//! its cause changes, every 30 seconds, and at its end. Also ends a wait without progress after a timeout.

use std::{cell::Cell, time::Duration};

use anyhow::anyhow;
use indicatif::ProgressBar;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior},
};

use crate::{
    client::{Client, RetryStatus},
    task::clock,
};

/// Interval between checks of the retry status.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Minimum duration of a problem, or of its absence, before a line is printed.
const REPORT_AFTER: Duration = Duration::from_secs(1);

/// Time without progress after which expected work counts as delayed although no problem is known.
const STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Minimum interval between lines if the cause changes. Two causes may alternate.
const CHANGE_INTERVAL: Duration = Duration::from_secs(5);

/// Interval at which a lasting problem is printed again.
const REMIND_INTERVAL: Duration = Duration::from_secs(30);

/// Monitor of a command's work and of the retry status of its clients.
pub(super) struct RetryMonitor {
    /// Retry status of each client; `None` while the client retries nothing.
    retries: Vec<watch::Receiver<Option<RetryStatus>>>,
    /// Progress bar that is suspended while a line is printed.
    bar: Option<ProgressBar>,
}

/// Work that consists of pieces, whose next piece must arrive within a timeout.
pub(super) struct ExpectedWork<'a> {
    /// Number of pieces so far.
    pub(super) pieces: &'a Cell<u64>,
    /// Noun for a piece, for messages.
    pub(super) piece: &'static str,
    /// Maximum time until the next piece.
    pub(super) timeout: Duration,
}

impl RetryMonitor {
    pub(super) fn new(client: &Client) -> Self {
        Self { retries: vec![client.retries()], bar: None }
    }

    /// Adds the retry status of another client.
    pub(super) fn add_client(&mut self, client: &Client) {
        self.retries.push(client.retries());
    }

    /// Sets the progress bar that is suspended while a line is printed.
    pub(super) fn set_bar(&mut self, bar: &ProgressBar) {
        self.bar = Some(bar.clone());
    }

    /// Runs the work, and prints problems that delay it. Without `expected`, only the work itself ends the wait.
    ///
    /// # Errors
    /// The work failed, or the next piece did not arrive in time; the error then names the known problem.
    pub(super) async fn run_with_retry_output<T>(
        &self,
        expected: Option<ExpectedWork<'_>>,
        work: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        tokio::select! {
            biased;
            timeout_error = self.watch(expected) => Err(timeout_error),
            result = work => result,
        }
    }

    /// Prints lines about problems until the next expected piece is overdue, and returns the timeout error. Never
    /// returns without `expected`.
    async fn watch(&self, expected: Option<ExpectedWork<'_>>) -> anyhow::Error {
        let mut ticks = tokio::time::interval(POLL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut printer = RetryPrinter::default();
        let (mut seen_pieces, mut last_progress) = (0, clock::monotonic());
        loop {
            // The clock is read again, because the tick may be late: printing may have blocked.
            ticks.tick().await;
            let now = clock::monotonic();
            let mut status = self.retries.iter().find_map(|status| status.borrow().clone());
            if let Some(expected) = &expected {
                if seen_pieces != expected.pieces.get() {
                    (seen_pieces, last_progress) = (expected.pieces.get(), now);
                }
                let deadline = last_progress + expected.timeout;
                if deadline <= now {
                    return timeout_error(expected, status);
                }
                status = with_deadline(expected, status, last_progress, deadline, now);
            }
            if let Some(line) = printer.format_progress(now, status.as_ref()) {
                self.print_line(&line);
            }
        }
    }

    fn print_line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }
}

/// Returns the retry status with the time at which the wait ends. Without a known problem, `STALL_TIMEOUT` without
/// progress counts as a problem.
fn with_deadline(
    expected: &ExpectedWork<'_>,
    status: Option<RetryStatus>,
    last_progress: Instant,
    deadline: Instant,
    now: Instant,
) -> Option<RetryStatus> {
    match status {
        Some(status) => {
            let until = status.until.map_or(deadline, |until| until.min(deadline));
            Some(RetryStatus { until: Some(until), ..status })
        }
        None if last_progress + STALL_TIMEOUT <= now => {
            let problem = format!("no {} arrives, for an unknown reason", expected.piece);
            Some(RetryStatus { problem, since: last_progress, until: Some(deadline) })
        }
        None => None,
    }
}

/// Returns the error for a piece that did not arrive in time, with the known problem.
fn timeout_error(expected: &ExpectedWork<'_>, status: Option<RetryStatus>) -> anyhow::Error {
    let reason = status.map_or_else(|| "unknown reason".to_owned(), |status| status.problem);
    let (piece, timeout) = (expected.piece, format_seconds(expected.timeout));
    anyhow!("timed out after {timeout} without a {piece}: {reason}; raise the limit with --timeout")
}

/// Decides which lines of the retry output are due.
#[derive(Debug, Default)]
struct RetryPrinter {
    /// Last printed line; `None` before the first line, and after the line at the end of a problem.
    last: Option<LastMessage>,
}

#[derive(Debug)]
struct LastMessage {
    problem: String,
    printed_at: Instant,
    /// Start of the problem; kept when the cause changes.
    since: Instant,
    /// Time since which there has been no problem; `None` during a problem.
    absent_since: Option<Instant>,
}

impl RetryPrinter {
    /// Returns the line to print now: a new, changed or lasting problem, or the end of a printed problem. Returns
    /// `None` while no line is due.
    fn format_progress(&mut self, now: Instant, status: Option<&RetryStatus>) -> Option<String> {
        let Some(status) = status else {
            let last = self.last.as_mut()?;
            if now < *last.absent_since.get_or_insert(now) + REPORT_AFTER {
                return None;
            }
            let line = format!("working again after {}", format_seconds(now - last.since));
            self.last = None;
            return Some(line);
        };
        match &mut self.last {
            None if now < status.since + REPORT_AFTER => return None,
            None => {}
            Some(last) => {
                last.absent_since = None;
                let interval = if last.problem == status.problem { REMIND_INTERVAL } else { CHANGE_INTERVAL };
                if now < last.printed_at + interval {
                    return None;
                }
            }
        }
        let since = self.last.as_ref().map_or(status.since, |last| last.since);
        self.last = Some(LastMessage { problem: status.problem.clone(), printed_at: now, since, absent_since: None });
        let end = match status.until {
            Some(until) => format!("giving up in {}", format_seconds(until.saturating_duration_since(now))),
            None => "stop with Ctrl-C".to_owned(),
        };
        Some(format!("still trying: {}; {end}", status.problem))
    }
}

/// Formats a duration rounded to seconds. A multiple of a minute is printed in minutes from two minutes on.
fn format_seconds(time: Duration) -> String {
    match (time + Duration::from_millis(500)).as_secs() {
        seconds if seconds >= 120 && seconds % 60 == 0 => format!("{} min", seconds / 60),
        seconds => format!("{seconds} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    fn status(problem: &str, since: Instant) -> RetryStatus {
        RetryStatus { problem: problem.to_owned(), since, until: None }
    }

    #[test]
    fn problem_is_printed_at_start_change_interval_and_end() {
        let start = clock::monotonic();
        let mut printer = RetryPrinter::default();
        let (a, b) = (status("a", start), status("b", start));
        let mut format = |ms, status: Option<&RetryStatus>| printer.format_progress(at(start, ms), status);
        assert_eq!(format(250, Some(&a)), None, "the problem may be brief");
        assert_eq!(format(500, None), None, "no line was printed before");
        assert_eq!(format(1000, Some(&a)).as_deref(), Some("still trying: a; stop with Ctrl-C"));
        assert_eq!(format(6000, Some(&a)), None, "no repetition");
        let until = RetryStatus { until: Some(at(start, 126_500)), ..b };
        assert_eq!(format(6500, Some(&until)).as_deref(), Some("still trying: b; giving up in 2 min"));
        assert_eq!(format(7000, Some(&a)), None, "alternating causes");
        assert_eq!(format(36_500, Some(&until)).as_deref(), Some("still trying: b; giving up in 90 s"));
        assert_eq!(format(40_000, None), None, "the problem may return");
        assert_eq!(format(40_250, Some(&until)), None);
        assert_eq!(format(41_000, None), None);
        assert_eq!(format(42_000, None).as_deref(), Some("working again after 42 s"));
        assert_eq!(format(43_000, None), None);
    }

    #[tokio::test(start_paused = true)]
    async fn wait_without_progress_ends_and_names_the_problem() {
        let (status_sender, receiver) = watch::channel(None);
        let monitor = RetryMonitor { retries: vec![receiver], bar: None };
        let pieces = Cell::new(0);
        let expected = || ExpectedWork { pieces: &pieces, piece: "record", timeout: Duration::from_secs(60) };
        let start = clock::monotonic();
        let work = async {
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_secs(50)).await;
                pieces.set(pieces.get() + 1);
            }
            status_sender.send_replace(Some(status("the bucket is gone", start)));
            std::future::pending::<anyhow::Result<()>>().await
        };
        let error =
            monitor.run_with_retry_output(Some(expected()), work).await.expect_err("the work never ends").to_string();
        assert!(start.elapsed() >= Duration::from_secs(560), "each record restarts the timeout");
        assert!(
            error.contains("60 s") && error.contains("the bucket is gone") && error.contains("--timeout"),
            "{error}"
        );
    }
}
