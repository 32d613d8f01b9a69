//! `--wait`: waits until an admin operation is completed, shows its progress, and ends after an optional timeout.
//!
//! The brokers complete the operation whether or not a command waits; a timeout does not cancel it. An operation may
//! take hours, and brokers restart meanwhile, so one failed request does not end the wait.

use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use indicatif::ProgressBar;
use tokio::time::Instant;

use super::output;
use crate::task::clock;

/// Interval between requests for the remaining work.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Maximum time without a successful response to a request for the remaining work. The wait then fails.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);

/// Options `--wait` and `--timeout` of an admin operation.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct WaitArgs {
    /// Return when the operation is completed, not when it is stored; on a terminal, show its progress
    #[arg(long)]
    wait: bool,
    /// With --wait: exit with code 1 after this many seconds; the operation continues
    #[arg(long, value_name = "SECONDS", requires = "wait", value_parser = clap::value_parser!(u64).range(1..=604_800))]
    timeout: Option<u64>,
}

/// Remaining work of an operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RemainingWork {
    /// Number of remaining replicas or partitions.
    pub(super) count: u64,
    /// The remaining work as text, for the progress bar and the timeout error.
    pub(super) text: String,
    /// Reason why part of the work cannot proceed, as text for the user.
    pub(super) obstacle: Option<String>,
}

/// Interval at which a lasting obstacle is printed again.
const REMINDER_INTERVAL: Duration = Duration::from_secs(30);

/// Timer of the lines that a waiting command prints while an obstacle lasts.
#[derive(Debug, Default)]
struct Reminder {
    /// Time at which an obstacle was last printed, or at which the wait began. With `None`, the first obstacle is
    /// printed at once.
    last: Option<Instant>,
}

impl Reminder {
    /// Returns true if there is an obstacle and no line was printed for `REMINDER_INTERVAL`. The next interval then
    /// starts at `now`.
    fn take_due(&mut self, obstacle: Option<&String>, now: Instant) -> bool {
        let is_recent = |last: Instant| now.duration_since(last) < REMINDER_INTERVAL;
        if obstacle.is_none() || self.last.is_some_and(is_recent) {
            return false;
        }
        self.last = Some(now);
        true
    }
}

/// Reason why the remaining work is unknown.
#[derive(Debug)]
pub(super) enum PollError {
    /// A later request may succeed.
    Retryable(anyhow::Error),
    /// The wait cannot succeed.
    Fatal(anyhow::Error),
}

impl PollError {
    /// Returns `Retryable` for a retryable error, else `Fatal`. `error` is a message for the user.
    pub(super) fn new(retryable: bool, error: anyhow::Error) -> Self {
        if retryable { Self::Retryable(error) } else { Self::Fatal(error) }
    }
}

impl WaitArgs {
    /// Returns true if the command waits.
    pub(super) fn is_wanted(self) -> bool {
        self.wait
    }

    /// Returns the progress bar. The bar is hidden without `--wait` or without a terminal.
    pub(super) fn bar(self) -> ProgressBar {
        if !self.wait {
            return ProgressBar::hidden();
        }
        output::progress(Some(0), "{spinner} {bar:24} {pos} of {len} moved, {elapsed}  {msg}")
    }

    /// Calls `poll` for the remaining work until none remains, and returns the time that this took. Shows the progress
    /// on `bar`, and prints obstacles. `progress` is the command that shows the progress later.
    ///
    /// # Errors
    /// A request failed permanently, no request succeeded for a minute, or the timeout expired. The timeout error
    /// contains the remaining work and `progress`.
    pub(super) async fn until_done(
        self,
        bar: &ProgressBar,
        progress: &str,
        mut poll: impl AsyncFnMut() -> Result<RemainingWork, PollError>,
    ) -> anyhow::Result<Duration> {
        let began = clock::monotonic();
        let (mut total, mut last_response, mut reminder) = (0, began, Reminder { last: Some(began) });
        bar.enable_steady_tick(Duration::from_millis(200));
        let outcome = loop {
            let text = match poll().await {
                Ok(RemainingWork { count: 0, .. }) => break Ok(began.elapsed()),
                Ok(work) => {
                    last_response = clock::monotonic();
                    // The remaining work may grow: partitions of a drained broker wait for capacity, or a topic gets
                    // partitions.
                    total = total.max(work.count);
                    bar.set_length(total);
                    bar.set_position(total - work.count);
                    if reminder.take_due(work.obstacle.as_ref(), last_response) {
                        let obstacle = work.obstacle.unwrap_or_default();
                        bar.suspend(|| eprintln!("still waiting: {obstacle}"));
                    }
                    work.text
                }
                Err(PollError::Retryable(error)) if last_response.elapsed() < RESPONSE_TIMEOUT => {
                    format!("{error:#}")
                }
                Err(PollError::Retryable(error) | PollError::Fatal(error)) => break Err(error),
            };
            bar.set_message(text.clone());
            if let Some(timeout) = self.timeout.filter(|timeout| began.elapsed() >= Duration::from_secs(*timeout)) {
                break Err(anyhow!(
                    "timed out after {timeout} s: {text}; the operation continues, and {progress} shows its progress"
                ));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        };
        bar.finish_and_clear();
        outcome
    }
}

/// Formats the duration of a wait in seconds, or in minutes and seconds from two minutes on.
pub(super) fn format_elapsed(time: Duration) -> String {
    match time.as_secs() {
        0..120 => format!("{:.1} s", time.as_secs_f64()),
        seconds => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    fn remaining(count: u64) -> RemainingWork {
        RemainingWork { count, text: format!("{count} to go"), obstacle: None }
    }

    #[tokio::test(start_paused = true)]
    async fn wait_ends_when_no_work_is_left() {
        let wait = WaitArgs { wait: true, timeout: None };
        let bar = ProgressBar::hidden();
        let mut counts = VecDeque::from([2, 3, 1, 0]);
        let done =
            wait.until_done(&bar, "x", async || Ok(remaining(counts.pop_front().expect("no poll after the end"))));
        assert_eq!(done.await.expect("done"), POLL_INTERVAL * 3);
        assert_eq!((bar.length(), counts.len()), (Some(3), 0));
    }

    #[tokio::test(start_paused = true)]
    async fn wait_timeout_error_names_remaining_work() {
        let wait = WaitArgs { wait: true, timeout: Some(7) };
        let began = clock::monotonic();
        let error =
            wait.until_done(&ProgressBar::hidden(), "`status`", async || Ok(remaining(4))).await.expect_err("never");
        assert_eq!(
            error.to_string(),
            "timed out after 7 s: 4 to go; the operation continues, and `status` shows its progress"
        );
        assert_eq!(began.elapsed(), Duration::from_secs(7));
        let bar = ProgressBar::hidden();
        let refused = wait.until_done(&bar, "`status`", async || Err(PollError::Fatal(anyhow!("gone"))));
        assert_eq!(refused.await.expect_err("the operation failed").to_string(), "gone");
    }

    /// Regression: a single failed request, as during the restart of one broker, ended a wait of hours.
    #[tokio::test(start_paused = true)]
    async fn wait_outlasts_restarts_and_ends_after_silence() {
        let wait = WaitArgs { wait: true, timeout: None };
        let (bar, mut polls) = (ProgressBar::hidden(), 0);
        let restarts = wait.until_done(&bar, "x", async || {
            polls += 1;
            match polls {
                1 => Ok(remaining(2)),
                2..100 => Err(PollError::Retryable(anyhow!("no response"))),
                _ => Ok(remaining(0)),
            }
        });
        restarts.await.expect("a response arrives in time");
        let began = clock::monotonic();
        let no_response = wait.until_done(&bar, "x", async || Err(PollError::Retryable(anyhow!("no response"))));
        assert_eq!(no_response.await.expect_err("no response").to_string(), "no response");
        assert_eq!(began.elapsed(), RESPONSE_TIMEOUT);
    }

    #[test]
    fn obstacle_is_repeated_every_30_seconds() {
        let (start, obstacle) = (clock::monotonic(), "no brokers".to_owned());
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut reminder = Reminder::default();
        let due: Vec<bool> = [0, 1, 29, 30, 59, 60].map(|now| reminder.take_due(Some(&obstacle), at(now))).into();
        assert_eq!(due, [true, false, false, true, false, true]);
        assert!(!reminder.take_due(None, at(200)));
    }

    #[test]
    fn durations_are_formatted_in_seconds_or_minutes() {
        assert_eq!(format_elapsed(Duration::from_millis(1234)), "1.2 s");
        assert_eq!(format_elapsed(Duration::from_secs(3_725)), "62 min 5 s");
    }
}
