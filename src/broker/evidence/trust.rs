//! How far evidence is believed: less after it was wrong. Pure.
//!
//! Who is declared gone and comes back as the same process was not dead, so something between lies: a proxy, a full table of
//! connections. Another process under the number has done nothing yet.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use crate::{cluster::Revision, model::BrokerId, telemetry::LogThrottle};

/// Who comes back so soon after it was declared gone was not dead.
const COMES_BACK: Duration = Duration::from_secs(10);

/// How long evidence against such a broker counts for nothing, at first and at most.
const DISTRUST: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// How far evidence is believed.
#[derive(Debug, Default)]
pub(super) struct Trust {
    revoked: BTreeMap<BrokerId, Revoked>,
}

#[derive(Debug)]
struct Revoked {
    incarnation: String,
    /// The registration's own broker epoch.
    epoch: Revision,
    at: Instant,
    /// How often it came back.
    returns: u32,
    /// Until then nothing counts against it.
    distrust: Option<Instant>,
    /// Lines about evidence that did not count.
    log: LogThrottle,
}

impl Trust {
    /// Whether it was this registration that was taken away: the mirror may show it a moment longer.
    pub(super) fn is_revoked(&self, broker: BrokerId, epoch: Revision) -> bool {
        self.revoked.get(&broker).is_some_and(|revoked| revoked.epoch == epoch)
    }

    /// Whether evidence counts against a broker that is registered with this incarnation now.
    pub(super) fn believes(&mut self, broker: BrokerId, incarnation: &str, now: Instant) -> bool {
        let Some(revoked) = self.revoked.get_mut(&broker) else { return true };
        if revoked.incarnation != incarnation {
            self.revoked.remove(&broker);
            return true;
        }
        if let Some(until) = revoked.distrust {
            return now >= until;
        }
        // It is registered again, and is the process that was declared gone.
        if now.duration_since(revoked.at) > COMES_BACK {
            return true;
        }
        let times = 2u32.saturating_pow(revoked.returns);
        revoked.distrust = Some(now + DISTRUST.0.saturating_mul(times).min(DISTRUST.1));
        revoked.returns = revoked.returns.saturating_add(1);
        false
    }

    /// Evidence against a broker did not count. `Some` when that is to be logged, with how often it was so since the line before.
    pub(super) fn distrusted(&mut self, broker: BrokerId, now: Instant) -> Option<u64> {
        self.revoked.get_mut(&broker)?.log.occur(now)
    }

    /// A registration was taken away.
    pub(super) fn revoked(&mut self, broker: BrokerId, incarnation: &str, epoch: Revision, now: Instant) {
        let before = self.revoked.remove(&broker).filter(|before| before.incarnation == incarnation);
        let (returns, log) = before.map(|before| (before.returns, before.log)).unwrap_or_default();
        let incarnation = incarnation.to_owned();
        self.revoked.insert(broker, Revoked { incarnation, epoch, at: now, returns, distrust: None, log });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::clock;

    #[tokio::test(start_paused = true)]
    async fn evidence_against_a_process_that_came_back_counts_for_nothing_longer_each_time() {
        let (mut trust, broker) = (Trust::default(), BrokerId(2));
        let mut now = clock::monotonic();
        let second = Duration::from_secs(1);
        assert!(trust.believes(broker, "a", now));
        for minutes in [1, 2, 4] {
            trust.revoked(broker, "a", Revision(7), now);
            now += second;
            assert!(!trust.believes(broker, "a", now), "it came back after a second");
            now += Duration::from_secs(60) * minutes - second;
            assert!(!trust.believes(broker, "a", now), "{minutes} minutes are not over");
            now += second;
            assert!(trust.believes(broker, "a", now));
        }
        trust.revoked(broker, "a", Revision(7), now);
        assert!(trust.believes(broker, "b", now), "a new process has done nothing yet");
        trust.revoked(broker, "b", Revision(9), now);
        assert!(trust.is_revoked(broker, Revision(9)), "a second report of it is no news");
        assert!(!trust.is_revoked(broker, Revision(11)), "it has registered again");
        now += COMES_BACK + second;
        assert!(
            trust.believes(broker, "b", now),
            "what comes back so late may have been frozen, and dead for all that matters"
        );
    }
}
