//! Whether the object store answers. An outage is said once aloud and not once by each of a thousand partitions, and so is its end.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::task::clock;

/// How long no request may succeed before that is said: a request that fails now and then is tried again in silence.
const SHORT: Duration = Duration::from_secs(5);

/// How long after the last failure nothing is known any more: whoever has work for the store asks more often, also one that hangs.
const STALE: Duration = Duration::from_secs(60);

/// What is known of one store.
#[derive(Debug, Default)]
pub(super) struct Reach {
    outage: Mutex<Option<Begun>>,
}

#[derive(Clone, Debug)]
struct Begun {
    /// When the first request was sent that failed, with none that succeeded since.
    at: Instant,
    /// When the last one failed, and what it said.
    last: Instant,
    why: String,
    said: bool,
}

/// An object store that has not answered, or refused, for longer than a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// Since when.
    pub lasted: Duration,
    /// What the last request that failed said.
    pub why: String,
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for {} s: {}", self.lasted.as_secs(), self.why)
    }
}

impl Reach {
    /// A request that was sent at `sent` failed, and not for what it asked.
    pub(super) fn failed(&self, place: &str, sent: Instant, why: &str) {
        let (mut outage, now) = (self.lock(), clock::monotonic());
        let begun = outage.get_or_insert_with(|| Begun { at: sent, last: now, why: String::new(), said: false });
        begun.last = now;
        why.clone_into(&mut begun.why);
        if !begun.said && begun.at.elapsed() >= SHORT {
            begun.said = true;
            tracing::warn!(
                place,
                error = begun.why,
                "the object store serves nothing: segments stay on disk, and old records cannot be read, until it does"
            );
        }
    }

    /// The store did what it was asked for, or said that it has no such object.
    pub(super) fn answered(&self, place: &str) {
        if let Some(over) = self.lock().take().filter(|begun| begun.said) {
            let seconds = over.at.elapsed().as_secs();
            tracing::info!(place, seconds, "the object store serves again");
        }
    }

    /// The outage that was spoken of and is not over.
    pub(super) fn outage(&self) -> Option<Outage> {
        let begun = self.lock().clone().filter(|begun| begun.said && begun.last.elapsed() < STALE)?;
        Some(Outage { lasted: clock::monotonic().duration_since(begun.at), why: begun.why })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Begun>> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_one_that_lasts() {
        let reach = Reach::default();
        let fail = |why: &str| reach.failed("s3://bucket", clock::monotonic(), why);
        fail("first");
        assert_eq!(reach.outage(), None, "one failure is none");
        tokio::time::advance(SHORT / 2).await;
        reach.answered("s3://bucket");
        tokio::time::advance(SHORT).await;
        fail("second");
        assert_eq!(reach.outage(), None, "the store has answered in between");
        tokio::time::advance(SHORT).await;
        fail("refused");
        let outage = reach.outage().expect("nothing succeeded for so long");
        assert_eq!(outage, Outage { lasted: SHORT, why: "refused".to_owned() });
        tokio::time::advance(SHORT).await;
        assert_eq!(reach.outage().expect("it goes on").to_string(), "for 10 s: refused");
        tokio::time::advance(STALE).await;
        assert_eq!(reach.outage(), None, "nobody has asked since");
        fail("refused");
        assert!(reach.outage().is_some());
        reach.answered("s3://bucket");
        assert_eq!(reach.outage(), None);
        reach.failed("s3://bucket", clock::monotonic() - SHORT, "no answer within 5 s");
        assert!(reach.outage().is_some(), "one request that hangs is enough");
    }
}
