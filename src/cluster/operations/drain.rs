//! Drains of brokers: the operation writes the key `drains/{id}`, and the controller moves the replicas.

use super::{ClusterOperations, UnknownBrokers, known_brokers};
use crate::{
    cluster::{
        keys::{DrainValue, Value as _},
        placement::Placement,
        store::{Compare, MetaStoreError, Transaction, TxnOutcome},
    },
    model::{BrokerId, PartitionId},
};

/// Error of a drain, or of its cancellation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DrainError {
    #[error(transparent)]
    Unknown(#[from] UnknownBrokers),
    #[error(transparent)]
    Store(#[from] MetaStoreError),
}

/// State of a broker's drain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerDrain {
    /// True if this operation started the drain; false if the broker was drained already.
    pub changed: bool,
    /// Wall-clock time of the request that started the drain, in milliseconds.
    pub since_ms: i64,
    /// Number of partitions that the broker leads.
    pub leaders: usize,
    /// Number of replicas that remain on the broker.
    pub replicas: usize,
    /// Partitions with a leader whose replica cannot move: too few eligible brokers, or a reassignment of the partition
    /// waits for an offline broker.
    pub blocked: Vec<PartitionId>,
    /// Number of replicas that cannot move because their partition has no leader.
    pub leaderless: usize,
    /// Number of other brokers that can take at least one more replica.
    pub eligible_brokers: usize,
}

impl ClusterOperations {
    /// Stores the drain of a broker, which the controller then executes, and returns the state of the drain. The broker
    /// may be offline: its replicas are then replaced without delay. If the broker is drained already, the stored drain
    /// keeps its start time.
    pub async fn drain(&self, broker: BrokerId, now_ms: i64) -> Result<BrokerDrain, DrainError> {
        self.check_known(broker)?;
        let key = self.keys.drain(broker);
        let mut unchanged = Compare::Absent(key.clone());
        let (changed, since_ms) = loop {
            let put = Transaction::new()
                .when(unchanged)
                .put(key.as_str(), DrainValue { since_ms: now_ms }.encode())
                .else_get(key.as_str());
            let found = match self.store.transact(put).await? {
                TxnOutcome::Committed { revision } => {
                    self.wait_for_cache(revision).await;
                    break (true, now_ms);
                }
                TxnOutcome::CompareFailed { mut found, .. } => found.pop().flatten(),
            };
            unchanged = match found.map(|entry| (DrainValue::decode(&entry.key, &entry.value), entry)) {
                Some((Ok(drain), _)) => break (false, drain.since_ms),
                // An unreadable value drains no broker: overwrite it.
                Some((Err(_), entry)) => Compare::ModRevision(key.clone(), entry.mod_revision),
                None => Compare::Absent(key.clone()),
            };
        };
        Ok(BrokerDrain { changed, since_ms, ..self.count_remaining(broker) })
    }

    /// Cancels the drain of a broker. Returns false if the broker was not drained. Replicas that moved already are not
    /// moved back.
    pub async fn undrain(&self, broker: BrokerId) -> Result<bool, DrainError> {
        self.check_known(broker)?;
        let key = self.keys.drain(broker);
        let delete = Transaction::new().when(Compare::Exists(key.clone())).delete(key);
        match self.store.transact(delete).await? {
            TxnOutcome::Committed { revision } => {
                self.wait_for_cache(revision).await;
                Ok(true)
            }
            TxnOutcome::CompareFailed { .. } => Ok(false),
        }
    }

    /// Returns the number of replicas of a drained broker that cannot move now, according to the metadata cache. Either
    /// too few brokers can take them, their reassignment waits for an offline broker, or their partition has no leader.
    pub fn count_blocked(&self, broker: BrokerId) -> usize {
        let remaining = self.count_remaining(broker);
        remaining.blocked.len() + remaining.leaderless
    }

    /// Fails if the metadata does not name the broker: it is not live, holds no replica, and is not drained.
    fn check_known(&self, broker: BrokerId) -> Result<(), UnknownBrokers> {
        let known = known_brokers(&self.metadata.state());
        if known.contains(&broker) {
            return Ok(());
        }
        Err(UnknownBrokers { ids: vec![broker], known: known.into_iter().collect() })
    }

    /// Counts the replicas that remain on a drained broker. To find replicas that cannot move, this function replaces
    /// the replicas of each partition as the controller's plan does. Only the controller measures for how long a broker
    /// is offline, so a replica on an offline broker that is not drained counts as staying. The caller sets `changed`
    /// and `since_ms`.
    fn count_remaining(&self, broker: BrokerId) -> BrokerDrain {
        let state = self.metadata.state();
        let mut placement = Placement::of(&state);
        placement.exclude(broker);
        let eligible_brokers = placement.accepting_brokers().filter(|(id, _)| placement.has_capacity(*id)).count();
        let mut drained = BrokerDrain {
            changed: false,
            since_ms: 0,
            leaders: 0,
            replicas: 0,
            blocked: Vec::new(),
            leaderless: 0,
            eligible_brokers,
        };
        for id in state.partitions_on(broker) {
            let topic = state.name(id.topic).and_then(|name| state.topic(name));
            let partition = state.partition(id).and_then(|entry| entry.partition.as_ref());
            let (Some(topic), Some(partition)) = (topic, partition) else { continue };
            let value = &partition.value;
            drained.replicas += 1;
            drained.leaders += usize::from(value.leader == Some(broker));
            // New replicas copy from the leader. So without a leader the replica cannot move, also if a reassignment is
            // in progress.
            if value.leader.is_none() {
                drained.leaderless += 1;
                continue;
            }
            // A reassignment in progress must end before this replica can move. An offline broker may block that
            // reassignment, but an offline drained broker does not: the controller replaces it at once.
            let counts_as_live =
                |id| state.brokers().contains_key(&id) || id == broker || state.drains().contains_key(&id);
            let min_insync = self.min_insync(id.topic);
            if value.is_reassignment_blocked(min_insync, counts_as_live) {
                drained.blocked.push(id);
                continue;
            }
            // A reassignment in progress removes the replica already.
            if value.removing.contains(&broker) {
                continue;
            }
            let is_leaving = |id: &BrokerId| *id == broker || state.drains().contains_key(id);
            let (leaving, staying): (Vec<BrokerId>, Vec<BrokerId>) =
                value.replicas.iter().copied().filter(|id| !value.removing.contains(id)).partition(is_leaving);
            let factor = usize::try_from(topic.value.replication_factor).unwrap_or(usize::MAX);
            // The factor was lowered, so a replica leaves without a new one.
            if staying.len() >= factor {
                continue;
            }
            let target = placement.replace(id, value, &leaving, factor, min_insync);
            // Counts the new replicas, also if they replace only those on other drained brokers. A broker may have
            // capacity for one more replica, but not for all.
            let new: Vec<BrokerId> = target.iter().copied().filter(|id| !value.replicas.contains(id)).collect();
            placement.add_replica_to_each(&new);
            if target.contains(&broker) {
                drained.blocked.push(id);
            }
        }
        drained
    }
}
