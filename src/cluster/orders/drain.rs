//! Emptying a broker: the wish is a key, `drains/{id}`, and the controller does the rest.

use super::{Orders, UnknownBrokers, known};
use crate::{
    cluster::{
        keys::{DrainValue, Value as _},
        placement::Placement,
        store::{Compare, Outcome, StoreError, Transaction},
    },
    model::{BrokerId, PartitionId},
};

/// Why a drain was not ordered, or not taken back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DrainError {
    /// No such broker.
    #[error(transparent)]
    Unknown(#[from] UnknownBrokers),
    /// The metadata store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A broker that is to be emptied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Whether this order began it.
    pub changed: bool,
    /// Since when, by the wall clock in milliseconds.
    pub since_ms: i64,
    /// Partitions that it leads.
    pub leaders: usize,
    /// Partitions that it holds.
    pub replicas: usize,
    /// Of these, those that cannot move: too few others take replicas, or a move of their partition waits for a broker that is gone.
    pub stuck: Vec<PartitionId>,
    /// And how many cannot move while nobody leads their partitions.
    pub leaderless: usize,
    /// How many others take replicas.
    pub takers: usize,
}

impl Orders {
    /// Wants a broker empty. One that is gone may be named as well: its replicas are replaced without waiting for it.
    pub async fn drain(&self, broker: BrokerId, now_ms: i64) -> Result<Drained, DrainError> {
        self.must_know(broker)?;
        let key = self.keys.drain(broker);
        let mut as_it_is = Compare::Absent(key.clone());
        let (changed, since_ms) = loop {
            let put = Transaction::new()
                .when(as_it_is)
                .put(key.as_str(), DrainValue { since_ms: now_ms }.encode())
                .else_get(key.as_str());
            let found = match self.store.transact(put).await? {
                Outcome::Done { revision } => {
                    self.reached(revision).await;
                    break (true, now_ms);
                }
                Outcome::Refused { mut found, .. } => found.pop().flatten(),
            };
            as_it_is = match found.map(|entry| (DrainValue::decode(&entry.key, &entry.value), entry)) {
                Some((Ok(known), _)) => break (false, known.since_ms),
                // Nobody is drained by what nobody can read.
                Some((Err(_), entry)) => Compare::ModRevision(key.clone(), entry.mod_revision),
                None => Compare::Absent(key.clone()),
            };
        };
        Ok(Drained { changed, since_ms, ..self.left(broker) })
    }

    /// Takes the wish back. Says whether there was one.
    pub async fn restore(&self, broker: BrokerId) -> Result<bool, DrainError> {
        self.must_know(broker)?;
        let key = self.keys.drain(broker);
        let delete = Transaction::new().when(Compare::Exists(key.clone())).delete(key);
        match self.store.transact(delete).await? {
            Outcome::Done { revision } => {
                self.reached(revision).await;
                Ok(true)
            }
            Outcome::Refused { .. } => Ok(false),
        }
    }

    /// Replicas of a drained broker that cannot move: too few others take any, their move waits for a broker that is gone, or nobody leads
    /// their partitions.
    pub fn stuck(&self, broker: BrokerId) -> usize {
        let left = self.left(broker);
        left.stuck.len() + left.leaderless
    }

    fn must_know(&self, broker: BrokerId) -> Result<(), UnknownBrokers> {
        let known = known(&self.view.state());
        if known.contains(&broker) {
            return Ok(());
        }
        Err(UnknownBrokers { ids: vec![broker], known: known.into_iter().collect() })
    }

    /// The replicas that a broker has still to give away, as the controller's plan moves them.
    fn left(&self, broker: BrokerId) -> Drained {
        let state = self.view.state();
        let mut placement = Placement::of(&state);
        placement.exclude(broker);
        let takers = placement.steady().filter(|(id, _)| placement.has_room(*id)).count();
        let mut drained =
            Drained { changed: false, since_ms: 0, leaders: 0, replicas: 0, stuck: Vec::new(), leaderless: 0, takers };
        for id in state.partitions_on(broker) {
            let Some(known) = state.partition(id).and_then(|entry| entry.partition.as_ref()) else { continue };
            let value = &known.value;
            drained.replicas += 1;
            drained.leaders += usize::from(value.leader == Some(broker));
            // Only its leader copies a partition to others, also where a move has begun.
            if value.leader.is_none() {
                drained.leaderless += 1;
                continue;
            }
            // Another move begins when the one under way has ended. Without the brokers that are gone it may not end; one that is gone and
            // drained is replaced at once.
            let is_live = |id| state.brokers().contains_key(&id) || id == broker || state.drains().contains_key(&id);
            if value.move_is_blocked(self.min_insync(id.topic), is_live) {
                drained.stuck.push(id);
                continue;
            }
            if value.removing.contains(&broker) {
                continue;
            }
            let stays =
                |id: &BrokerId| *id != broker && !state.drains().contains_key(id) && !value.removing.contains(id);
            let stay: Vec<BrokerId> = value.replicas.iter().copied().filter(stays).collect();
            let kept = stay.len();
            match placement.choose(id, stay, value.replicas.len() - value.removing.len()) {
                // Each has room for a replica, and not for all.
                Some(chosen) => placement.carry_more(&chosen[kept..]),
                None => drained.stuck.push(id),
            }
        }
        drained
    }
}
