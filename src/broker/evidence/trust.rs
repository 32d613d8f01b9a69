//! Cooldown for failure reports: after a false report about a broker, further reports are ignored for some time. Pure.
//!
//! A process that returns after it was declared gone was running. Something between the brokers refused connections: a proxy, or a full
//! connection table. Another process with the same broker id starts without a cooldown.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use crate::{cluster::Revision, model::BrokerId, telemetry::LogThrottle};

/// Maximum time in which a process returns that was falsely declared gone.
const COMES_BACK: Duration = Duration::from_secs(10);

/// First and longest cooldown after a false report.
const DISTRUST: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// Cooldowns of all brokers.
#[derive(Debug, Default)]
pub(super) struct Trust {
    revoked: BTreeMap<BrokerId, Revoked>,
}

#[derive(Debug)]
struct Revoked {
    incarnation: String,
    /// Broker epoch of the deleted registration.
    epoch: Revision,
    at: Instant,
    /// Number of returns of the process.
    returns: u32,
    /// End of the cooldown: reports are ignored until then.
    distrust: Option<Instant>,
    /// Log throttle for ignored reports.
    log: LogThrottle,
}

impl Trust {
    /// Returns true if this registration was deleted. The metadata cache may show it a moment longer.
    pub(super) fn is_revoked(&self, broker: BrokerId, epoch: Revision) -> bool {
        self.revoked.get(&broker).is_some_and(|revoked| revoked.epoch == epoch)
    }

    /// Returns true if reports about a broker with this registered incarnation are accepted now.
    pub(super) fn believes(&mut self, broker: BrokerId, incarnation: &str, now: Instant) -> bool {
        let Some(revoked) = self.revoked.get_mut(&broker) else { return true };
        if revoked.incarnation != incarnation {
            self.revoked.remove(&broker);
            return true;
        }
        if let Some(until) = revoked.distrust {
            return now >= until;
        }
        // The process that was declared gone is registered again.
        if now.duration_since(revoked.at) > COMES_BACK {
            return true;
        }
        let times = 2u32.saturating_pow(revoked.returns);
        revoked.distrust = Some(now + DISTRUST.0.saturating_mul(times).min(DISTRUST.1));
        revoked.returns = revoked.returns.saturating_add(1);
        false
    }

    /// Counts an ignored report. Returns the number of reports since the last log line if one is due.
    pub(super) fn distrusted(&mut self, broker: BrokerId, now: Instant) -> Option<u64> {
        self.revoked.get_mut(&broker)?.log.occur(now)
    }

    /// Records that a registration was deleted.
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
    async fn cooldown_doubles_each_time_a_process_returns() {
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
