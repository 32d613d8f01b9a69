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

/// By each epoch's leader: who joined, in which uptime, and what it has acknowledged since.
#[derive(Default)]
pub(super) struct Acks(BTreeMap<LeaderEpoch, BTreeMap<BrokerId, (u64, Option<Ends>)>>);

impl Acks {
    /// What a follower has acknowledged in this epoch since it joined last.
    pub(super) fn of(&self, epoch: LeaderEpoch, follower: BrokerId) -> Option<Ends> {
        self.0.get(&epoch)?.get(&follower)?.1
    }

    /// A follower joins anew, by no older registration than it did.
    pub(super) fn joined(&mut self, epoch: LeaderEpoch, follower: BrokerId, registered: u64) -> Result<(), Wrong> {
        match self.0.entry(epoch).or_default().insert(follower, (registered, None)) {
            Some((before, _)) if before > registered => Err(format!(
                "has broker {follower} of registration {registered} join in epoch {epoch}, after that of {before}"
            )),
            _ => Ok(()),
        }
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
        let Some((_, counted)) = known.filter(|(joined, _)| joined == registered) else {
            return Err(format!(
                "counts what broker {follower} acknowledged in registration {registered}, in which it has not joined last"
            ));
        };
        *counted = Some(counted.unwrap_or_default().most(*ends));
        Ok(())
    }
}
