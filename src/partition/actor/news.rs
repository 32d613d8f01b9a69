//! Signals to the task that never block the sender: journal results, acknowledgements of followers, clock ticks and dropped receivers.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::{
    log::PersistError,
    model::{BrokerId, LeaderEpoch, Offset},
    partition::leader::insync::{Ends, Peer},
};

/// Latest signals. A sender overwrites and wakes: neither the journal, nor a link, nor the clock ever waits for a partition.
#[derive(Default)]
pub(in crate::partition) struct News {
    told: Mutex<Told>,
    notify: Notify,
}

/// Signals that the task has not taken. The journal's result has no offset: the replica has the persisted end, and an end from before a
/// truncation would count removed records.
#[derive(Default)]
pub(super) struct Told {
    pub(super) persisted: Option<Result<(), PersistError>>,
    /// At most one for each follower.
    pub(super) acks: Vec<Ack>,
    /// Time of the last tick, in milliseconds.
    pub(super) now_ms: Option<u64>,
    /// True if a writer dropped its receiver before the result.
    pub(super) given_up: bool,
}

/// A follower's acknowledgement.
pub(super) struct Ack {
    pub(super) peer: Peer,
    pub(super) epoch: LeaderEpoch,
    pub(super) ends: Ends,
}

impl News {
    pub(super) fn persisted(&self, outcome: Result<Offset, PersistError>) {
        let outcome = match outcome {
            // This very task truncated the submitted records: the disk did not fail.
            Ok(_) | Err(PersistError::Cut) => Ok(()),
            Err(error) => Err(error),
        };
        let mut told = self.lock();
        // A failure is final; no success follows it.
        if !matches!(told.persisted, Some(Err(_))) {
            told.persisted = Some(outcome);
        }
        drop(told);
        self.notify.notify_one();
    }

    pub(in crate::partition) fn acknowledged(&self, peer: Peer, epoch: LeaderEpoch, ends: Ends) {
        let ack = Ack { peer, epoch, ends };
        let mut told = self.lock();
        match told.acks.iter_mut().find(|known| known.peer.broker == peer.broker) {
            Some(known) => *known = ack,
            None => told.acks.push(ack),
        }
        drop(told);
        self.notify.notify_one();
    }

    pub(in crate::partition) fn tick(&self, now_ms: u64) {
        self.lock().now_ms = Some(now_ms);
        self.notify.notify_one();
    }

    pub(in crate::partition) fn given_up(&self) {
        self.lock().given_up = true;
        self.notify.notify_one();
    }

    /// Drops the acknowledgement of a follower that was not taken yet: its link is gone.
    pub(super) fn forget(&self, broker: BrokerId) {
        self.lock().acks.retain(|ack| ack.peer.broker != broker);
    }

    pub(super) fn take(&self) -> Option<Told> {
        let mut told = self.lock();
        let some = told.persisted.is_some() || !told.acks.is_empty() || told.now_ms.is_some() || told.given_up;
        some.then(|| std::mem::take(&mut *told))
    }

    pub(super) async fn next(&self) -> Told {
        loop {
            let notified = self.notify.notified();
            if let Some(told) = self.take() {
                return told;
            }
            notified.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
