//! Detects outages of the object store. Every request reports its outcome here. While an outage is suspected, one probe at a time is sent.
//!
//! A failed or unanswered request only raises the suspicion: the store may refuse one object, or one kind of request, for other reasons. A
//! failed probe then confirms the outage: the store is *away* until the next success. During a confirmed outage, reads fail at once, and
//! uploads continue to retry. The log reports an outage once, for all affected partitions together.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::task::clock;

/// Time of failures without a success, after which a failed probe confirms the outage. Occasional failures are retried without a log line.
const AWAY_AFTER: Duration = Duration::from_millis(300);

/// Time of failures without a success, after which the outage is logged.
const LOG_AFTER: Duration = Duration::from_secs(5);

/// Time without a response after which a request raises the suspicion.
pub(super) const DOUBT_AFTER: Duration = Duration::from_secs(2);

/// Time limit of a probe. With [`DOUBT_AFTER`], the outage of a store that never responds is confirmed within 5 s.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_millis(2500);

/// Pauses before the first probes. The third probe is sent after [`AWAY_AFTER`], so the outage of a store that refuses requests is
/// confirmed within a second.
const FIRST_PAUSES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(250)];

/// Pause before each later probe. After the outage, operations that wait for the store continue at most this long later.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);

/// Outage state of one store.
#[derive(Debug)]
pub(super) struct Reach {
    failing: Mutex<Option<Failing>>,
    /// The confirmed outage. `None` if there is none.
    away: watch::Sender<Option<Away>>,
}

/// A suspected outage: requests fail, and none has succeeded since the first failure.
#[derive(Clone, Debug)]
struct Failing {
    /// Time when the first failed request was sent.
    since: Instant,
    why: String,
    logged: bool,
    probes: usize,
}

#[derive(Clone, Debug)]
struct Away {
    since: Instant,
    /// Time when the outage was confirmed.
    known_at: Instant,
    why: String,
}

/// An outage: the object store does not respond, or refuses every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// Duration since the first failed request was sent.
    pub lasted: Duration,
    /// Error of the last failed request.
    pub why: String,
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for {} s: {}", self.lasted.as_secs(), self.why)
    }
}

impl Default for Reach {
    fn default() -> Self {
        Self { failing: Mutex::default(), away: watch::Sender::new(None) }
    }
}

impl Reach {
    /// Records that a request sent at `sent` failed for a reason other than its content, or has had no response for long. Returns true for
    /// the first failure: the caller then starts the probes.
    #[must_use]
    pub(super) fn failed(&self, place: &str, sent: Instant, why: &str) -> bool {
        let mut failing = self.lock();
        let first = failing.is_none();
        let known =
            failing.get_or_insert_with(|| Failing { since: sent, why: String::new(), logged: false, probes: 0 });
        why.clone_into(&mut known.why);
        if !known.logged && known.since.elapsed() >= LOG_AFTER {
            known.logged = true;
            tracing::warn!(
                place,
                error = known.why,
                "the object store serves nothing: segments stay on disk, and old records cannot be read, until it does"
            );
        }
        first
    }

    /// Records a failed probe. Confirms the outage after [`AWAY_AFTER`].
    pub(super) fn probe_failed(&self, place: &str, sent: Instant, why: &str) {
        let _probing_already = self.failed(place, sent, why);
        let failing = self.lock();
        let Some(known) = failing.as_ref().filter(|known| known.since.elapsed() >= AWAY_AFTER) else { return };
        // The lock is held, so that a success in the meantime cannot be overwritten.
        self.away.send_if_modified(|away| {
            let begins = away.is_none();
            let known_at = away.as_ref().map_or_else(clock::monotonic, |away| away.known_at);
            *away = Some(Away { since: known.since, known_at, why: known.why.clone() });
            begins
        });
    }

    /// Records that a request succeeded, or failed for its own content, such as a missing object. Ends the outage.
    pub(super) fn answered(&self, place: &str) {
        let mut failing = self.lock();
        let Some(over) = failing.take() else { return };
        self.away.send_if_modified(|away| away.take().is_some());
        if over.logged {
            let seconds = over.since.elapsed().as_secs();
            tracing::info!(place, seconds, "the object store serves again");
        }
    }

    /// Returns the pause before the next probe. Returns `None` if no outage is suspected.
    pub(super) fn next_probe(&self) -> Option<Duration> {
        let mut failing = self.lock();
        let known = failing.as_mut()?;
        known.probes += 1;
        Some(FIRST_PAUSES.get(known.probes - 1).copied().unwrap_or(PROBE_INTERVAL))
    }

    /// Returns the outage that was logged and has not ended.
    pub(super) fn outage(&self) -> Option<Outage> {
        let failing = self.lock().clone().filter(|failing| failing.logged)?;
        Some(Outage { lasted: clock::monotonic().duration_since(failing.since), why: failing.why })
    }

    /// Returns the outage if it is confirmed and has not ended.
    pub(super) fn away(&self) -> Option<Outage> {
        let away = self.away.borrow().clone()?;
        Some(Outage { lasted: clock::monotonic().duration_since(away.since), why: away.why })
    }

    /// Waits until an outage is confirmed.
    pub(super) async fn until_away(&self) -> Outage {
        let mut away = self.away.subscribe();
        let known = away.wait_for(Option::is_some).await.expect("the sender is in self").clone();
        let Away { since, why, .. } = known.expect("it was waited for");
        Outage { lasted: clock::monotonic().duration_since(since), why }
    }

    /// Waits until an outage has been confirmed for `time`. Returns at once if that holds already.
    pub(super) async fn until_away_for(&self, time: Duration) -> Outage {
        loop {
            let outage = self.until_away().await;
            let known = self.away.borrow().as_ref().map(|away| away.known_at.elapsed());
            // If the outage has ended meanwhile, this waits for the next one.
            let left = known.map_or(Duration::ZERO, |known| time.saturating_sub(known));
            if left.is_zero() && known.is_some() {
                return outage;
            }
            tokio::select! {
                biased;
                () = self.until_back() => {}
                () = tokio::time::sleep(left) => {}
            }
        }
    }

    /// Waits until there is no confirmed outage.
    pub(super) async fn until_back(&self) {
        let mut away = self.away.subscribe();
        away.wait_for(Option::is_none).await.expect("the sender is in self");
    }

    /// Sleeps for `pause`. During a confirmed outage, returns as soon as the outage ends, so that waiting operations continue at once.
    pub(super) async fn pause(&self, pause: Duration) {
        let sleep = tokio::time::sleep(pause);
        if self.away.borrow().is_none() {
            return sleep.await;
        }
        tokio::select! {
            biased;
            () = self.until_back() => {}
            () = sleep => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Failing>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: &str = "s3://bucket";

    /// Sends probes as the store does, each with an immediate error. Returns the time until the outage is confirmed.
    async fn probe_until_away(reach: &Reach) -> Duration {
        let begin = clock::monotonic();
        while reach.away().is_none() {
            tokio::time::advance(reach.next_probe().expect("there is doubt")).await;
            reach.probe_failed(PLACE, clock::monotonic(), "refused");
        }
        begin.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn outage_starts_after_failed_probes_and_ends_with_success() {
        let reach = Reach::default();
        assert!(reach.failed(PLACE, clock::monotonic(), "refused"), "the first failure starts the probes");
        assert!(!reach.failed(PLACE, clock::monotonic(), "refused"), "one probe at a time");
        assert_eq!(reach.away(), None, "one failure proves nothing");
        reach.answered(PLACE);
        assert_eq!(reach.next_probe(), None, "nothing is left to find out");

        assert!(reach.failed(PLACE, clock::monotonic(), "refused"));
        tokio::time::advance(AWAY_AFTER * 3).await;
        assert!(!reach.failed(PLACE, clock::monotonic(), "refused"));
        assert_eq!(reach.away(), None, "requests of one kind may fail while probes are answered");
        reach.answered(PLACE);

        assert!(reach.failed(PLACE, clock::monotonic(), "refused"));
        let took = probe_until_away(&reach).await;
        assert!(took < Duration::from_secs(1), "{took:?}");
        assert_eq!(reach.away().map(|outage| outage.why).as_deref(), Some("refused"));
        let begin = clock::monotonic();
        tokio::join!(reach.pause(Duration::from_secs(60)), async { reach.answered(PLACE) });
        assert_eq!(begin.elapsed(), Duration::ZERO, "pauses end with the outage");
        assert_eq!(reach.away(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn outage_of_unresponsive_store_is_confirmed_in_5_s() {
        let (reach, sent) = (Reach::default(), clock::monotonic());
        tokio::time::advance(DOUBT_AFTER).await;
        assert!(reach.failed(PLACE, sent, "no answer for 2 s"));
        let pause = reach.next_probe().expect("there is doubt");
        tokio::time::advance(pause + PROBE_TIMEOUT).await;
        reach.probe_failed(PLACE, clock::monotonic() - PROBE_TIMEOUT, "no answer within 2.5 s");
        assert!(reach.away().is_some_and(|outage| outage.lasted < Duration::from_secs(5)));
    }

    #[tokio::test(start_paused = true)]
    async fn long_outage_is_logged() {
        let reach = Reach::default();
        let _first = reach.failed(PLACE, clock::monotonic(), "first");
        tokio::time::advance(LOG_AFTER / 2).await;
        reach.answered(PLACE);
        tokio::time::advance(LOG_AFTER).await;
        let _first = reach.failed(PLACE, clock::monotonic(), "second");
        assert_eq!(reach.outage(), None, "the store has answered in between");
        tokio::time::advance(LOG_AFTER).await;
        reach.probe_failed(PLACE, clock::monotonic(), "refused");
        let outage = reach.outage().expect("nothing succeeded for so long");
        assert_eq!(outage, Outage { lasted: LOG_AFTER, why: "refused".to_owned() });
        tokio::time::advance(LOG_AFTER).await;
        assert_eq!(reach.outage().expect("it goes on").to_string(), "for 10 s: refused");
        reach.answered(PLACE);
        assert_eq!(reach.outage(), None);
        let _first = reach.failed(PLACE, clock::monotonic() - LOG_AFTER, "no answer within 5 s");
        assert!(reach.outage().is_some(), "one request that hangs is enough");
    }
}
