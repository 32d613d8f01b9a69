//! What leaders count of what followers acknowledge.

use std::collections::BTreeMap;

use strandline::model::{BrokerId, LeaderEpoch};

use super::{Wrong, replica::Ends};

/// One acknowledgement, as a leader takes it.
pub(super) struct Ack {
    pub(super) follower: BrokerId,
    /// The revision of the follower's registration, by the link.
    pub(super) registered: u64,
    /// The epoch in which the follower had joined.
    pub(super) epoch: LeaderEpoch,
    pub(super) ends: Ends,
}

/// By each epoch's leader: who joined.
#[derive(Default)]
pub(super) struct Acks(BTreeMap<LeaderEpoch, BTreeMap<BrokerId, Joined>>);

#[derive(Default)]
struct Joined {
    /// The uptime that joined last.
    registered: u64,
    /// What it has acknowledged since.
    acked: Option<Ends>,
    /// What had been acknowledged before. Marks that were moved by that may be published after the join.
    before: Option<Ends>,
}

impl Acks {
    /// What a follower has acknowledged in this epoch since it joined last.
    pub(super) fn of(&self, epoch: LeaderEpoch, follower: BrokerId) -> Option<Ends> {
        self.0.get(&epoch)?.get(&follower)?.acked
    }

    /// What may have moved the marks that a leader publishes now.
    pub(super) fn of_late(&self, epoch: LeaderEpoch, follower: BrokerId) -> Option<Ends> {
        let Joined { acked, before, .. } = self.0.get(&epoch)?.get(&follower)?;
        before.map(|before| before.most(acked.unwrap_or_default())).or(*acked)
    }

    /// Its leader has published its marks.
    pub(super) fn published(&mut self, epoch: LeaderEpoch) {
        self.0.entry(epoch).or_default().values_mut().for_each(|joined| joined.before = None);
    }

    /// A follower joins anew, by no older registration than it did.
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

    /// The leader of an epoch counts this; `ever` is the most that the follower acknowledged in the epoch that it names. Whether harm comes
    /// of an older epoch's word, or of an older uptime's, is another matter: what it names may have been cut since.
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
