//! Acknowledgements of followers that leaders count.

use std::collections::BTreeMap;

use strandline::model::{BrokerId, LeaderEpoch};

use super::{RuleViolation, replica::Ends};

/// One acknowledgement of a follower, as a leader receives it.
pub(super) struct Ack {
    pub(super) follower: BrokerId,
    /// Broker epoch of the follower, as sent on its link.
    pub(super) registered: u64,
    /// Leader epoch in which the follower subscribed.
    pub(super) epoch: LeaderEpoch,
    pub(super) ends: Ends,
}

/// Followers that have subscribed to the leader of each epoch.
#[derive(Default)]
pub(super) struct Acks(BTreeMap<LeaderEpoch, BTreeMap<BrokerId, SubscribedFollower>>);

#[derive(Default)]
struct SubscribedFollower {
    /// Broker epoch of the follower at its last subscription.
    registered: u64,
    /// Progress that the leader has counted since that subscription.
    acked: Option<Ends>,
    /// Progress that the leader counted before that subscription. After the subscription, the leader may still
    /// publish watermarks that this progress moved.
    before: Option<Ends>,
}

impl Acks {
    /// Returns the progress of a follower that the leader of this epoch has counted since the follower's last
    /// subscription.
    pub(super) fn progress(&self, epoch: LeaderEpoch, follower: BrokerId) -> Option<Ends> {
        self.0.get(&epoch)?.get(&follower)?.acked
    }

    /// Returns the progress of a follower that may have moved the watermarks which the leader of this epoch publishes
    /// now.
    pub(super) fn recent_progress(&self, epoch: LeaderEpoch, follower: BrokerId) -> Option<Ends> {
        let SubscribedFollower { acked, before, .. } = self.0.get(&epoch)?.get(&follower)?;
        before.map(|before| before.max(acked.unwrap_or_default())).or(*acked)
    }

    /// Drops the progress from before the last subscription of each follower. Called when the leader has published its
    /// watermarks.
    pub(super) fn drop_earlier_progress(&mut self, epoch: LeaderEpoch) {
        self.0.entry(epoch).or_default().values_mut().for_each(|subscribed| subscribed.before = None);
    }

    /// Records a subscription. Its broker epoch must not be older than that of the follower's previous subscription in
    /// this leader epoch.
    pub(super) fn subscribe(
        &mut self,
        epoch: LeaderEpoch,
        follower: BrokerId,
        registered: u64,
    ) -> Result<(), RuleViolation> {
        let subscribed = self.0.entry(epoch).or_default().entry(follower).or_default();
        if subscribed.registered > registered {
            return Err(format!(
                "subscribed broker {follower} with broker epoch {registered} in leader epoch {epoch}, after broker epoch {}",
                subscribed.registered
            ));
        }
        let before = subscribed.acked.or(subscribed.before);
        *subscribed = SubscribedFollower { registered, acked: None, before };
        Ok(())
    }

    /// Checks and records an acknowledgement that the leader of epoch `leads` counts. `ever` is the maximum that the
    /// follower acknowledged in the epoch of the acknowledgement. An acknowledgement of another leader epoch, or of a
    /// broker epoch that did not subscribe last, is a violation. The acknowledged records may have been truncated
    /// since.
    pub(super) fn count(&mut self, leads: LeaderEpoch, ack: &Ack, ever: Ends) -> Result<(), RuleViolation> {
        let Ack { follower, registered, epoch, ends } = ack;
        if *epoch != leads {
            return Err(format!("counts in epoch {leads} an acknowledgement of broker {follower} from epoch {epoch}"));
        }
        if ends.written > ever.written || ends.persisted > ever.persisted {
            return Err(format!("counts {ends:?} of broker {follower}, which acknowledged at most {ever:?}"));
        }
        let subscribed_follower = self.0.entry(*epoch).or_default().get_mut(follower);
        let Some(subscribed) = subscribed_follower.filter(|subscribed| subscribed.registered == *registered) else {
            return Err(format!(
                "counts an acknowledgement of broker {follower} with broker epoch {registered}, which did not subscribe last"
            ));
        };
        subscribed.acked = Some(subscribed.acked.unwrap_or_default().max(*ends));
        Ok(())
    }
}
