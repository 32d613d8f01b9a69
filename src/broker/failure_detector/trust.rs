//! Cooldown for failure reports: after a false report about a broker, further reports are ignored for some time. Pure.
//!
//! A process that returns after it was declared gone was running. Something between the brokers refused connections: a
//! proxy, or a full connection table. Another process with the same broker id starts without a cooldown.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use crate::{cluster::Revision, model::BrokerId, telemetry::LogThrottle};

/// Maximum time in which a process returns that was falsely declared gone.
const FALSE_ALARM_WINDOW: Duration = Duration::from_secs(10);

/// First and longest cooldown after a false report.
const COOLDOWN: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// Cooldowns of all brokers.
#[derive(Debug, Default)]
pub(super) struct RevokeCooldown {
    revoked: BTreeMap<BrokerId, RevokedRegistration>,
}

#[derive(Debug)]
struct RevokedRegistration {
    incarnation: String,
    /// Broker epoch of the deleted registration.
    epoch: Revision,
    at: Instant,
    /// Number of returns of the process.
    returns: u32,
    /// End of the cooldown: reports are ignored until then.
    ignored_until: Option<Instant>,
    /// Log throttle for ignored reports.
    log: LogThrottle,
}

impl RevokeCooldown {
    /// Returns true if this registration was deleted. The metadata cache may show it a moment longer.
    pub(super) fn is_revoked(&self, broker: BrokerId, epoch: Revision) -> bool {
        self.revoked.get(&broker).is_some_and(|revoked| revoked.epoch == epoch)
    }

    /// Returns true if reports about a broker with this registered incarnation are accepted now.
    pub(super) fn allows(&mut self, broker: BrokerId, incarnation: &str, now: Instant) -> bool {
        let Some(revoked) = self.revoked.get_mut(&broker) else { return true };
        if revoked.incarnation != incarnation {
            self.revoked.remove(&broker);
            return true;
        }
        if let Some(until) = revoked.ignored_until {
            return now >= until;
        }
        // The process that was declared gone is registered again.
        if now.duration_since(revoked.at) > FALSE_ALARM_WINDOW {
            return true;
        }
        let times = 2u32.saturating_pow(revoked.returns);
        revoked.ignored_until = Some(now + COOLDOWN.0.saturating_mul(times).min(COOLDOWN.1));
        revoked.returns = revoked.returns.saturating_add(1);
        false
    }

    /// Counts an ignored report. Returns the number of reports since the last log line if one is due.
    pub(super) fn on_ignored_report(&mut self, broker: BrokerId, now: Instant) -> Option<u64> {
        self.revoked.get_mut(&broker)?.log.occur(now)
    }

    /// Records that a registration was deleted.
    pub(super) fn revoked(&mut self, broker: BrokerId, incarnation: &str, epoch: Revision, now: Instant) {
        let before = self.revoked.remove(&broker).filter(|before| before.incarnation == incarnation);
        let (returns, log) = before.map(|before| (before.returns, before.log)).unwrap_or_default();
        let incarnation = incarnation.to_owned();
        let revoked = RevokedRegistration { incarnation, epoch, at: now, returns, ignored_until: None, log };
        self.revoked.insert(broker, revoked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::clock;

    #[tokio::test(start_paused = true)]
    async fn cooldown_doubles_each_time_a_process_returns() {
        let (mut cooldown, broker) = (RevokeCooldown::default(), BrokerId(2));
        let mut now = clock::monotonic();
        let second = Duration::from_secs(1);
        assert!(cooldown.allows(broker, "a", now));
        for minutes in [1, 2, 4] {
            cooldown.revoked(broker, "a", Revision(7), now);
            now += second;
            assert!(!cooldown.allows(broker, "a", now), "the process returned after a second");
            now += Duration::from_secs(60) * minutes - second;
            assert!(!cooldown.allows(broker, "a", now), "{minutes} minutes have not passed");
            now += second;
            assert!(cooldown.allows(broker, "a", now));
        }
        cooldown.revoked(broker, "a", Revision(7), now);
        assert!(cooldown.allows(broker, "b", now), "another process starts without a cooldown");
        cooldown.revoked(broker, "b", Revision(9), now);
        assert!(cooldown.is_revoked(broker, Revision(9)), "a second report about the same registration");
        assert!(!cooldown.is_revoked(broker, Revision(11)), "a later registration");
        now += FALSE_ALARM_WINDOW + second;
        assert!(cooldown.allows(broker, "b", now), "a process that returns so late may have been suspended");
    }
}
