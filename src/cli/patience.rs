//! Retry output of a waiting command on standard error: a line when a problem has lasted a second, when its cause
//! changes, every 30 seconds, and at its end. Also ends a wait without progress after a timeout.

use std::{cell::Cell, time::Duration};

use anyhow::anyhow;
use indicatif::ProgressBar;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior},
};

use crate::{
    client::{Client, Trouble},
    task::clock,
};

/// Interval between checks of the retry status.
const LOOK: Duration = Duration::from_millis(250);

/// Minimum duration of a problem, or of its absence, before a line is printed.
const BRIEF: Duration = Duration::from_secs(1);

/// Time without progress after which expected work counts as delayed although no problem is known.
const QUIET: Duration = Duration::from_secs(5);

/// Minimum interval between lines if the cause changes. Two causes may alternate.
const CHANGE: Duration = Duration::from_secs(5);

/// Interval at which a lasting problem is printed again.
const AGAIN: Duration = Duration::from_secs(30);

/// Monitor of a command's work and of the retry status of its clients.
pub(super) struct Patience {
    troubles: Vec<watch::Receiver<Option<Trouble>>>,
    bar: Option<ProgressBar>,
}

/// Work whose next piece is known to exist.
pub(super) struct Expected<'a> {
    /// Number of pieces so far.
    pub(super) pieces: &'a Cell<u64>,
    /// Noun for a piece, for messages.
    pub(super) piece: &'static str,
    /// Maximum time until the next piece.
    pub(super) timeout: Duration,
}

impl Patience {
    pub(super) fn new(client: &Client) -> Self {
        Self { troubles: vec![client.trouble()], bar: None }
    }

    /// Adds the retry status of another client.
    pub(super) fn and(&mut self, client: &Client) {
        self.troubles.push(client.trouble());
    }

    /// Sets the progress bar that is suspended while a line is printed.
    pub(super) fn beside(&mut self, bar: &ProgressBar) {
        self.bar = Some(bar.clone());
    }

    /// Runs the work, and prints problems that delay it.
    ///
    /// # Errors
    /// The work failed, or the next piece did not arrive in time; the error then names the known problem.
    pub(super) async fn over<T>(
        &self,
        expected: Option<Expected<'_>>,
        work: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        tokio::select! {
            biased;
            late = self.watch(expected) => Err(late),
            done = work => done,
        }
    }

    /// Prints lines until the next expected piece is overdue, and returns the error for that. Never returns without
    /// `expected`.
    async fn watch(&self, expected: Option<Expected<'_>>) -> anyhow::Error {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut story = Story::default();
        let mut last = (0, clock::monotonic());
        loop {
            // The time of the tick itself is long past if printing has blocked.
            looks.tick().await;
            let now = clock::monotonic();
            let shown = self.troubles.iter().find_map(|trouble| trouble.borrow().clone());
            let mut trouble = shown.clone();
            if let Some(expected) = &expected {
                if last.0 != expected.pieces.get() {
                    last = (expected.pieces.get(), now);
                }
                let until = last.1 + expected.timeout;
                if until <= now {
                    return late(expected, shown);
                }
                trouble = limited(expected, trouble, last.1, until, now);
            }
            if let Some(line) = story.tell(now, trouble.as_ref()) {
                self.say(&line);
            }
        }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }
}

/// Returns the problem with the time at which the wait ends. Without a known problem, `QUIET` without progress counts
/// as one.
fn limited(
    expected: &Expected<'_>,
    trouble: Option<Trouble>,
    last: Instant,
    until: Instant,
    now: Instant,
) -> Option<Trouble> {
    match trouble {
        Some(trouble) => {
            Some(Trouble { until: Some(trouble.until.map_or(until, |other| other.min(until))), ..trouble })
        }
        None if last + QUIET <= now => {
            let problem = format!("no {} comes, and nothing says why", expected.piece);
            Some(Trouble { problem, since: last, until: Some(until) })
        }
        None => None,
    }
}

fn late(expected: &Expected<'_>, trouble: Option<Trouble>) -> anyhow::Error {
    let why = trouble.map_or_else(|| "nothing says why".to_owned(), |trouble| trouble.problem);
    let (piece, timeout) = (expected.piece, seconds(expected.timeout));
    anyhow!("given up after {timeout} without a {piece}: {why}; --timeout waits longer")
}

/// State of the retry output: the last printed line, from which the next one follows.
#[derive(Debug, Default)]
struct Story {
    said: Option<Said>,
}

#[derive(Debug)]
struct Said {
    problem: String,
    at: Instant,
    /// Start of the problem; kept when the cause changes.
    since: Instant,
    /// Time since which there has been no problem; `None` during a problem.
    well: Option<Instant>,
}

impl Story {
    fn tell(&mut self, now: Instant, trouble: Option<&Trouble>) -> Option<String> {
        let Some(trouble) = trouble else {
            let said = self.said.as_mut()?;
            if now < *said.well.get_or_insert(now) + BRIEF {
                return None;
            }
            let line = format!("working again after {}", seconds(now - said.since));
            self.said = None;
            return Some(line);
        };
        match &mut self.said {
            None if now < trouble.since + BRIEF => return None,
            None => {}
            Some(said) => {
                said.well = None;
                let wait = if said.problem == trouble.problem { AGAIN } else { CHANGE };
                if now < said.at + wait {
                    return None;
                }
            }
        }
        let since = self.said.as_ref().map_or(trouble.since, |said| said.since);
        self.said = Some(Said { problem: trouble.problem.clone(), at: now, since, well: None });
        let end = match trouble.until {
            Some(until) => format!("giving up in {}", seconds(until.saturating_duration_since(now))),
            None => "Ctrl-C ends it".to_owned(),
        };
        Some(format!("still trying: {}; {end}", trouble.problem))
    }
}

/// Formats a duration rounded to seconds. Whole minutes from two minutes on are printed as minutes.
fn seconds(time: Duration) -> String {
    match (time + Duration::from_millis(500)).as_secs() {
        whole if whole >= 120 && whole % 60 == 0 => format!("{} min", whole / 60),
        whole => format!("{whole} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    fn trouble(problem: &str, since: Instant) -> Trouble {
        Trouble { problem: problem.to_owned(), since, until: None }
    }

    #[test]
    fn problem_is_printed_at_start_change_interval_and_end() {
        let start = clock::monotonic();
        let mut story = Story::default();
        let (a, b) = (trouble("a", start), trouble("b", start));
        let mut tell = |ms, trouble: Option<&Trouble>| story.tell(at(start, ms), trouble);
        assert_eq!(tell(250, Some(&a)), None, "it may be over at once");
        assert_eq!(tell(500, None), None, "nothing was said, so nothing is over");
        assert_eq!(tell(1000, Some(&a)).as_deref(), Some("still trying: a; Ctrl-C ends it"));
        assert_eq!(tell(6000, Some(&a)), None, "once");
        let until = Trouble { until: Some(at(start, 126_500)), ..b };
        assert_eq!(tell(6500, Some(&until)).as_deref(), Some("still trying: b; giving up in 2 min"));
        assert_eq!(tell(7000, Some(&a)), None, "causes that take turns");
        assert_eq!(tell(36_500, Some(&until)).as_deref(), Some("still trying: b; giving up in 90 s"));
        assert_eq!(tell(40_000, None), None, "it may be back at once");
        assert_eq!(tell(40_250, Some(&until)), None);
        assert_eq!(tell(41_000, None), None);
        assert_eq!(tell(42_000, None).as_deref(), Some("working again after 42 s"));
        assert_eq!(tell(43_000, None), None);
    }

    #[tokio::test(start_paused = true)]
    async fn wait_without_progress_ends_and_names_the_problem() {
        let (shown, watch) = watch::channel(None);
        let patience = Patience { troubles: vec![watch], bar: None };
        let pieces = Cell::new(0);
        let expected = || Expected { pieces: &pieces, piece: "record", timeout: Duration::from_secs(60) };
        let start = clock::monotonic();
        let work = async {
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_secs(50)).await;
                pieces.set(pieces.get() + 1);
            }
            shown.send_replace(Some(trouble("the bucket is gone", start)));
            std::future::pending::<anyhow::Result<()>>().await
        };
        let error = patience.over(Some(expected()), work).await.expect_err("it never ends").to_string();
        assert!(start.elapsed() >= Duration::from_secs(560), "each record begins the wait anew");
        assert!(
            error.contains("60 s") && error.contains("the bucket is gone") && error.contains("--timeout"),
            "{error}"
        );
    }
}
