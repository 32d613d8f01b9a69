//! Acknowledgements of followers that leaders count.

use std::collections::BTreeMap;

use strandline::model::{BrokerId, LeaderEpoch};

use super::{Wrong, replica::Ends};

/// One acknowledgement, as a leader receives it.
pub(super) struct Ack {
    pub(super) follower: BrokerId,
    /// Broker epoch of the follower, as its link states it.
    pub(super) registered: u64,
    /// Leader epoch in which the follower subscribed.
    pub(super) epoch: LeaderEpoch,
    pub(super) ends: Ends,
}

/// Subscribed followers of each epoch's leader.
#[derive(Default)]
pub(super) struct Acks(BTreeMap<LeaderEpoch, BTreeMap<BrokerId, Joined>>);

#[derive(Default)]
struct Joined {
    /// Broker epoch that subscribed last.
    registered: u64,
    /// Progress acknowledged since that subscription.
    acked: Option<Ends>,
    /// Progress acknowledged before that subscription. Watermarks that this progress moved may be published after the subscription.
    before: Option<Ends>,
}

impl Acks {
    /// Returns the progress that a follower has acknowledged in this epoch since its last subscription.
    pub(super) fn of(&self, epoch: LeaderEpoch, follower: BrokerId) -> Option<Ends> {
        self.0.get(&epoch)?.get(&follower)?.acked
    }

    /// Returns the progress that may have moved the watermarks that a leader publishes now.
    pub(super) fn of_late(&self, epoch: LeaderEpoch, follower: BrokerId) -> Option<Ends> {
        let Joined { acked, before, .. } = self.0.get(&epoch)?.get(&follower)?;
        before.map(|before| before.most(acked.unwrap_or_default())).or(*acked)
    }

    /// Drops the progress before the last subscriptions, as the leader has published its watermarks.
    pub(super) fn published(&mut self, epoch: LeaderEpoch) {
        self.0.entry(epoch).or_default().values_mut().for_each(|joined| joined.before = None);
    }

    /// Records a subscription, whose broker epoch must not be older than the last one.
    pub(super) fn joined(&mut self, epoch: LeaderEpoch, follower: BrokerId, registered: u64) -> Result<(), Wrong> {
        let joined = self.0.entry(epoch).or_default().entry(follower).or_default();
        if joined.registered > registered {
            return Err(format!(
                "has broker {follower} of registration {registered} join in epoch {epoch}, after that of {}",
                joined.registered
            ));
        }
        let before = joined.acked.or(joined.before);
        *joined = Joined { registered, acked: None, before };
        Ok(())
    }

    /// Checks and records an acknowledgement that the leader of epoch `leads` counts. `ever` is the maximum that the follower acknowledged
    /// in the epoch of the acknowledgement. An acknowledgement of an older leader epoch or broker epoch is a violation even without harm,
    /// as its records may have been truncated since.
    pub(super) fn counted(&mut self, leads: LeaderEpoch, ack: &Ack, ever: Ends) -> Result<(), Wrong> {
        let Ack { follower, registered, epoch, ends } = ack;
        if *epoch != leads {
            return Err(format!("counts in epoch {leads} what broker {follower} acknowledged in epoch {epoch}"));
        }
        if ends.written > ever.written || ends.persisted > ever.persisted {
            return Err(format!("counts {ends:?} of broker {follower}, which never acknowledged more than {ever:?}"));
        }
        let known = self.0.entry(*epoch).or_default().get_mut(follower);
        let Some(joined) = known.filter(|joined| joined.registered == *registered) else {
            return Err(format!(
                "counts what broker {follower} acknowledged in registration {registered}, in which it has not joined last"
            ));
        };
        joined.acked = Some(joined.acked.unwrap_or_default().most(*ends));
        Ok(())
    }
}
