//! Detects outages of the object store. `store` reports the outcome of each request that it sends; the parts of
//! multipart uploads, which `upload` sends, are not reported. While an outage is suspected, `store` sends one probe at
//! a time.
//!
//! After one failed or unanswered request, an outage is only *suspected*: the store may refuse one object, or one kind
//! of request, for other reasons. A failed probe at least [`CONFIRM_DELAY`] after the first failure *confirms* the
//! outage: the store is unavailable until the next success. During a confirmed outage, reads fail at once. Uploads end,
//! and start again after the outage. An outage is logged once, for all affected partitions together.

use std::{fmt, time::Duration};

use tokio::{sync::watch, time::Instant};

use crate::task::{clock, lock::Mutex};

/// Time of failures without a success, after which a failed probe confirms the outage. Occasional failures are retried
/// without a log line.
const CONFIRM_DELAY: Duration = Duration::from_millis(300);

/// Time of failures without a success, after which the outage is logged.
const LOG_DELAY: Duration = Duration::from_secs(5);

/// Time without a response to a request after which an outage is suspected.
pub(super) const SUSPECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Time limit of a probe. With [`SUSPECT_TIMEOUT`], the outage of a store that never responds is confirmed within 5 s.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_millis(2500);

/// Pauses before the first probes. The third probe is sent after [`CONFIRM_DELAY`], so the outage of a store that
/// refuses requests is confirmed within a second.
const FIRST_PROBE_DELAYS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(250)];

/// Pause before each later probe. The next probe after the end of an outage detects this end, and operations that wait
/// for the store continue.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);

/// Outage state of one store.
#[derive(Debug)]
pub(super) struct OutageTracker {
    /// The suspected outage; `None` after a success.
    suspected: Mutex<Option<SuspectedOutage>>,
    /// The confirmed outage; `None` if there is none. Changes only while `suspected` is locked.
    confirmed: watch::Sender<Option<ConfirmedOutage>>,
}

/// A suspected outage: a request failed, and none has succeeded since.
#[derive(Clone, Debug)]
struct SuspectedOutage {
    /// Time when the first failed request was sent.
    since: Instant,
    /// Error of the last failed request.
    reason: String,
    logged: bool,
    /// Number of probes that were sent, including one whose pause has begun.
    probes: usize,
}

/// An outage that a failed probe has confirmed.
#[derive(Clone, Debug)]
struct ConfirmedOutage {
    /// Time when the first failed request was sent.
    since: Instant,
    /// Time when the outage was confirmed.
    confirmed_at: Instant,
    reason: String,
}

/// An outage: the object store does not respond, or refuses every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// Duration since the first failed request was sent.
    pub lasted: Duration,
    /// Error of the last failed request.
    pub reason: String,
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for {} s: {}", self.lasted.as_secs(), self.reason)
    }
}

impl Default for OutageTracker {
    fn default() -> Self {
        Self { suspected: Mutex::default(), confirmed: watch::Sender::new(None) }
    }
}

impl OutageTracker {
    /// Handles a request that was sent at `sent` and failed for a reason other than its content, or has had no response
    /// for [`SUSPECT_TIMEOUT`]. From then on, an outage is suspected; the first failure after [`LOG_DELAY`] logs it.
    /// Returns true for the first failure: the caller then starts the probes.
    #[must_use]
    pub(super) fn on_failure(&self, url: &str, sent: Instant, reason: &str) -> bool {
        let mut guard = self.suspected.lock();
        let is_first = guard.is_none();
        let suspected = guard.get_or_insert_with(|| SuspectedOutage {
            since: sent,
            reason: String::new(),
            logged: false,
            probes: 0,
        });
        reason.clone_into(&mut suspected.reason);
        if !suspected.logged && suspected.since.elapsed() >= LOG_DELAY {
            suspected.logged = true;
            tracing::warn!(
                url,
                error = suspected.reason,
                "the object store serves no request: until it recovers, segments stay on disk, and tiered records \
                 cannot be read"
            );
        }
        is_first
    }

    /// Handles a failed probe. Confirms the outage if the first failed request was sent at least [`CONFIRM_DELAY`] ago.
    pub(super) fn on_probe_failure(&self, url: &str, sent: Instant, reason: &str) {
        // The task that sent this probe sends the next one, so the returned value is not needed.
        let _is_first = self.on_failure(url, sent, reason);
        let guard = self.suspected.lock();
        let is_lasting = |suspected: &&SuspectedOutage| suspected.since.elapsed() >= CONFIRM_DELAY;
        let Some(suspected) = guard.as_ref().filter(is_lasting) else { return };
        // The lock is held, so that a success in the meantime cannot be overwritten.
        self.confirmed.send_if_modified(|confirmed| {
            let is_new = confirmed.is_none();
            let confirmed_at = confirmed.as_ref().map_or_else(clock::monotonic, |outage| outage.confirmed_at);
            *confirmed =
                Some(ConfirmedOutage { since: suspected.since, confirmed_at, reason: suspected.reason.clone() });
            is_new
        });
    }

    /// Handles a request that succeeded, or failed for its own content, such as a missing object. Ends a suspected or
    /// confirmed outage.
    pub(super) fn on_reply(&self, url: &str) {
        let mut suspected = self.suspected.lock();
        let Some(ended) = suspected.take() else { return };
        self.confirmed.send_if_modified(|confirmed| confirmed.take().is_some());
        if ended.logged {
            let seconds = ended.since.elapsed().as_secs();
            tracing::info!(url, seconds, "the object store has recovered");
        }
    }

    /// Counts one more probe, and returns the pause before it. Returns `None` if no outage is suspected: the caller
    /// stops probing.
    pub(super) fn next_probe(&self) -> Option<Duration> {
        let mut guard = self.suspected.lock();
        let suspected = guard.as_mut()?;
        suspected.probes += 1;
        Some(FIRST_PROBE_DELAYS.get(suspected.probes - 1).copied().unwrap_or(PROBE_INTERVAL))
    }

    /// Returns the outage, if it was logged and has not ended.
    pub(super) fn outage(&self) -> Option<Outage> {
        let suspected = self.suspected.lock().clone().filter(|suspected| suspected.logged)?;
        Some(Outage { lasted: clock::monotonic().duration_since(suspected.since), reason: suspected.reason })
    }

    /// Returns the outage if it is confirmed and has not ended.
    pub(super) fn confirmed(&self) -> Option<Outage> {
        let outage = self.confirmed.borrow().clone()?;
        Some(Outage { lasted: clock::monotonic().duration_since(outage.since), reason: outage.reason })
    }

    /// Waits until an outage is confirmed.
    pub(super) async fn wait_until_unavailable(&self) -> Outage {
        let mut confirmed = self.confirmed.subscribe();
        let outage = confirmed.wait_for(Option::is_some).await.expect("the sender is in self").clone();
        let ConfirmedOutage { since, reason, .. } = outage.expect("`wait_for` returned an outage");
        Outage { lasted: clock::monotonic().duration_since(since), reason }
    }

    /// Waits until an outage has lasted for `time` since its confirmation. Returns at once if that holds already.
    pub(super) async fn wait_until_unavailable_for(&self, time: Duration) -> Outage {
        loop {
            let outage = self.wait_until_unavailable().await;
            let confirmed_for = self.confirmed.borrow().as_ref().map(|outage| outage.confirmed_at.elapsed());
            // If the outage has ended meanwhile, this waits for the next one.
            let remaining = confirmed_for.map_or(Duration::ZERO, |confirmed_for| time.saturating_sub(confirmed_for));
            if remaining.is_zero() && confirmed_for.is_some() {
                return outage;
            }
            tokio::select! {
                biased;
                () = self.wait_until_available() => {}
                () = tokio::time::sleep(remaining) => {}
            }
        }
    }

    /// Waits until there is no confirmed outage. Returns at once without one.
    pub(super) async fn wait_until_available(&self) {
        let mut confirmed = self.confirmed.subscribe();
        confirmed.wait_for(Option::is_none).await.expect("the sender is in self");
    }

    /// Sleeps for `pause`. During a confirmed outage, returns as soon as the outage ends, so that waiting operations
    /// continue at once.
    pub(super) async fn pause(&self, pause: Duration) {
        let sleep = tokio::time::sleep(pause);
        if self.confirmed.borrow().is_none() {
            return sleep.await;
        }
        tokio::select! {
            biased;
            () = self.wait_until_available() => {}
            () = sleep => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "s3://bucket";

    /// Sends probes as the store does, each with an immediate error. Returns the time until the outage is confirmed.
    async fn probe_until_confirmed(tracker: &OutageTracker) -> Duration {
        let begin = clock::monotonic();
        while tracker.confirmed().is_none() {
            tokio::time::advance(tracker.next_probe().expect("an outage is suspected")).await;
            tracker.on_probe_failure(URL, clock::monotonic(), "refused");
        }
        begin.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn outage_starts_after_failed_probes_and_ends_with_success() {
        let tracker = OutageTracker::default();
        assert!(tracker.on_failure(URL, clock::monotonic(), "refused"), "the first failure starts the probes");
        assert!(!tracker.on_failure(URL, clock::monotonic(), "refused"), "one probe at a time");
        assert_eq!(tracker.confirmed(), None, "one failure confirms no outage");
        tracker.on_reply(URL);
        assert_eq!(tracker.next_probe(), None, "no outage is suspected");

        assert!(tracker.on_failure(URL, clock::monotonic(), "refused"));
        tokio::time::advance(CONFIRM_DELAY * 3).await;
        assert!(!tracker.on_failure(URL, clock::monotonic(), "refused"));
        assert_eq!(tracker.confirmed(), None, "requests of one kind may fail while probes succeed");
        tracker.on_reply(URL);

        assert!(tracker.on_failure(URL, clock::monotonic(), "refused"));
        let took = probe_until_confirmed(&tracker).await;
        assert!(took < Duration::from_secs(1), "{took:?}");
        assert_eq!(tracker.confirmed().map(|outage| outage.reason).as_deref(), Some("refused"));
        let begin = clock::monotonic();
        tokio::join!(tracker.pause(Duration::from_secs(60)), async { tracker.on_reply(URL) });
        assert_eq!(begin.elapsed(), Duration::ZERO, "pauses end with the outage");
        assert_eq!(tracker.confirmed(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn outage_of_unresponsive_store_is_confirmed_in_5_s() {
        let (tracker, sent) = (OutageTracker::default(), clock::monotonic());
        tokio::time::advance(SUSPECT_TIMEOUT).await;
        assert!(tracker.on_failure(URL, sent, "no response for 2 s"));
        let pause = tracker.next_probe().expect("an outage is suspected");
        tokio::time::advance(pause + PROBE_TIMEOUT).await;
        tracker.on_probe_failure(URL, clock::monotonic() - PROBE_TIMEOUT, "no response within 2.5 s");
        assert!(tracker.confirmed().is_some_and(|outage| outage.lasted < Duration::from_secs(5)));
    }

    #[tokio::test(start_paused = true)]
    async fn long_outage_is_logged() {
        let tracker = OutageTracker::default();
        let _first = tracker.on_failure(URL, clock::monotonic(), "first");
        tokio::time::advance(LOG_DELAY / 2).await;
        tracker.on_reply(URL);
        tokio::time::advance(LOG_DELAY).await;
        let _first = tracker.on_failure(URL, clock::monotonic(), "second");
        assert_eq!(tracker.outage(), None, "the store responded in between");
        tokio::time::advance(LOG_DELAY).await;
        tracker.on_probe_failure(URL, clock::monotonic(), "refused");
        let outage = tracker.outage().expect("every request failed for that time");
        assert_eq!(outage, Outage { lasted: LOG_DELAY, reason: "refused".to_owned() });
        tokio::time::advance(LOG_DELAY).await;
        assert_eq!(tracker.outage().expect("the outage continues").to_string(), "for 10 s: refused");
        tracker.on_reply(URL);
        assert_eq!(tracker.outage(), None);
        let _first = tracker.on_failure(URL, clock::monotonic() - LOG_DELAY, "no response within 5 s");
        assert!(tracker.outage().is_some(), "one request without response is sufficient");
    }
}
