//! Whether the object store answers. The outcomes of all requests lead here; while there is doubt, one probe at a time asks the store.
//!
//! A failed or an unanswered request only raises doubt: one object, or one kind of request, may be refused for reasons of its own. A
//! probe that fails as well makes the store *away*, and the first request that succeeds ends that. Readers are refused at once while the
//! store is away; uploads go on retrying. The log names an outage once, however many partitions meet it.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::task::clock;

/// How long requests fail, with no success between them, until a failed probe counts: a failure now and then is retried in silence.
const AWAY_AFTER: Duration = Duration::from_millis(300);

/// How long requests fail until the log says so.
const LOG_AFTER: Duration = Duration::from_secs(5);

/// A request that has had no answer for this long raises doubt.
pub(super) const DOUBT_AFTER: Duration = Duration::from_secs(2);

/// How long a probe may go unanswered. With [`DOUBT_AFTER`] a store that never answers is away within 5 s.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_millis(2500);

/// The pauses before the first probes: the third comes when [`AWAY_AFTER`] is over, and a store that refuses is away within a second.
const FIRST_PAUSES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(250)];

/// The pause between all later probes. Everything that waits for the store goes on this long after it is back.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);

/// What is known of one store.
#[derive(Debug)]
pub(super) struct Reach {
    failing: Mutex<Option<Failing>>,
    /// Why the store is away, and since when; `None` while it is not.
    away: watch::Sender<Option<Away>>,
}

/// Requests fail, and none has succeeded since the first that did.
#[derive(Clone, Debug)]
struct Failing {
    /// When the first request was sent that failed.
    since: Instant,
    why: String,
    logged: bool,
    probes: usize,
}

#[derive(Clone, Debug)]
struct Away {
    since: Instant,
    /// When that was known.
    known_at: Instant,
    why: String,
}

/// An object store that does not answer, or refuses every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// Since when.
    pub lasted: Duration,
    /// The error of the last request that failed.
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
    /// A request that was sent at `sent` failed, and not for what it asked, or has had no answer for long. True where this is the first
    /// one: the caller starts the probes.
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

    /// A probe failed.
    pub(super) fn probe_failed(&self, place: &str, sent: Instant, why: &str) {
        let _probing_already = self.failed(place, sent, why);
        let failing = self.lock();
        let Some(known) = failing.as_ref().filter(|known| known.since.elapsed() >= AWAY_AFTER) else { return };
        // Under the lock, so that an answer that comes meanwhile is not overtaken.
        self.away.send_if_modified(|away| {
            let begins = away.is_none();
            let known_at = away.as_ref().map_or_else(clock::monotonic, |away| away.known_at);
            *away = Some(Away { since: known.since, known_at, why: known.why.clone() });
            begins
        });
    }

    /// The store did what it was asked for, or said that it has no such object.
    pub(super) fn answered(&self, place: &str) {
        let mut failing = self.lock();
        let Some(over) = failing.take() else { return };
        self.away.send_if_modified(|away| away.take().is_some());
        if over.logged {
            let seconds = over.since.elapsed().as_secs();
            tracing::info!(place, seconds, "the object store serves again");
        }
    }

    /// How long to wait before the next probe; `None` when none is needed, because the store answers.
    pub(super) fn next_probe(&self) -> Option<Duration> {
        let mut failing = self.lock();
        let known = failing.as_mut()?;
        known.probes += 1;
        Some(FIRST_PAUSES.get(known.probes - 1).copied().unwrap_or(PROBE_INTERVAL))
    }

    /// The outage that the log has named and that is not over.
    pub(super) fn outage(&self) -> Option<Outage> {
        let failing = self.lock().clone().filter(|failing| failing.logged)?;
        Some(Outage { lasted: clock::monotonic().duration_since(failing.since), why: failing.why })
    }

    /// The outage while the store is away.
    pub(super) fn away(&self) -> Option<Outage> {
        let away = self.away.borrow().clone()?;
        Some(Outage { lasted: clock::monotonic().duration_since(away.since), why: away.why })
    }

    /// Waits until the store is away.
    pub(super) async fn until_away(&self) -> Outage {
        let mut away = self.away.subscribe();
        let known = away.wait_for(Option::is_some).await.expect("the sender is in self").clone();
        let Away { since, why, .. } = known.expect("it was waited for");
        Outage { lasted: clock::monotonic().duration_since(since), why }
    }

    /// Waits until it has been known for so long that the store is away; not at all where it has been.
    pub(super) async fn until_away_for(&self, time: Duration) -> Outage {
        loop {
            let outage = self.until_away().await;
            let known = self.away.borrow().as_ref().map(|away| away.known_at.elapsed());
            // The outage may have ended meanwhile: the next one is waited for.
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

    /// Waits until the store is not away.
    pub(super) async fn until_back(&self) {
        let mut away = self.away.subscribe();
        away.wait_for(Option::is_none).await.expect("the sender is in self");
    }

    /// Sleeps for so long, or until the store is back where it is away: what waits for it goes on at once then.
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

    /// Probes as the store does, with requests that are answered with an error at once; how long until the store is away.
    async fn probe_until_away(reach: &Reach) -> Duration {
        let begin = clock::monotonic();
        while reach.away().is_none() {
            tokio::time::advance(reach.next_probe().expect("there is doubt")).await;
            reach.probe_failed(PLACE, clock::monotonic(), "refused");
        }
        begin.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn store_is_away_after_failed_probes_and_back_after_one_answer() {
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
    async fn silent_store_is_away_within_five_seconds() {
        let (reach, sent) = (Reach::default(), clock::monotonic());
        tokio::time::advance(DOUBT_AFTER).await;
        assert!(reach.failed(PLACE, sent, "no answer for 2 s"));
        let pause = reach.next_probe().expect("there is doubt");
        tokio::time::advance(pause + PROBE_TIMEOUT).await;
        reach.probe_failed(PLACE, clock::monotonic() - PROBE_TIMEOUT, "no answer within 2.5 s");
        assert!(reach.away().is_some_and(|outage| outage.lasted < Duration::from_secs(5)));
    }

    #[tokio::test(start_paused = true)]
    async fn outage_is_named_in_the_log_once_it_has_lasted() {
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
