//! Sends the ISR proposals of led partitions to the metadata store, and the outcomes back to the partitions. Also reads
//! keys back and resigns leaderships.
//!
//! # Overview
//!
//! A leader does not wait for the outcome of its proposal, and has at most one open proposal. The queue is therefore
//! bounded by the number of partitions. Proposals that are queued during a transaction are sent together afterwards, in
//! as few transactions as possible. A failed follower is in the ISR of hundreds of partitions at once. No other
//! component batches the proposals.
//!
//! # Invariants
//!
//! - No proposal is sent twice. If it is uncertain whether a proposal was applied, its outcome is `Unknown`. The leader
//!   then requests a read-back of the key, which is retried until the store responds.
//! - A broker that cannot write a partition resigns its leadership in the metadata store, if the ISR has another
//!   member. The resignation is retried until it is committed or has no effect, for example because the broker no
//!   longer leads in that epoch.
//!
//! # Shutdown
//!
//! The tasks end at once, without waiting for requests in flight. The next leader reads the result of these requests
//! from the metadata store.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use tokio::sync::Notify;

use crate::{
    broker::partitions::table::PartitionTable,
    cluster::{Compare, Keys, PartitionUpdate, PartitionUpdater, PartitionValue, Revision, UpdateOutcome},
    model::{BrokerId, LeaderEpoch, PartitionId},
    partition::{
        IsrUpdater,
        leader::{
            isr::{IsrProposal, ProposalOutcome},
            member::PeerId,
        },
    },
    task::{Backoff, Tasks, lock::Mutex},
};

/// First pause before operations that failed are retried.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);

/// Longest pause before operations that failed are retried.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// Maximum number of queued operations that run concurrently, one for each partition.
const MAX_CONCURRENT_OPS: usize = 16;

/// Queue with at most one entry per partition.
struct CoalescingQueue<T> {
    waiting: Mutex<BTreeMap<PartitionId, T>>,
    added: Notify,
}

impl<T: Default> CoalescingQueue<T> {
    fn new() -> Self {
        Self { waiting: Mutex::default(), added: Notify::new() }
    }

    /// Changes the entry of a partition, and creates it first if there is none.
    fn put(&self, id: PartitionId, change: impl FnOnce(&mut T)) {
        change(self.waiting.lock().entry(id).or_default());
        self.added.notify_one();
    }

    /// Waits until there is an entry, and removes and returns all entries. Only one task may call this function.
    async fn take(&self) -> BTreeMap<PartitionId, T> {
        loop {
            let taken = std::mem::take(&mut *self.waiting.lock());
            if !taken.is_empty() {
                return taken;
            }
            self.added.notified().await;
        }
    }
}

/// Operations of one partition on the metadata store, besides its proposals.
#[derive(Clone, Copy, Debug, Default)]
struct PendingStoreOp {
    /// True if the partition requested a read-back of the key.
    read_back: bool,
    /// Leader epoch whose leadership this broker must resign; `None` without a resignation.
    resign: Option<LeaderEpoch>,
}

/// Queues of the proposals and other store operations of this broker's partitions.
pub(super) struct IsrUpdateManager {
    me: BrokerId,
    keys: Keys,
    updater: PartitionUpdater,
    partitions: Arc<PartitionTable>,
    proposals: CoalescingQueue<Option<IsrProposal>>,
    store_ops: CoalescingQueue<PendingStoreOp>,
}

impl IsrUpdater for IsrUpdateManager {
    fn propose(&self, partition: PartitionId, proposal: IsrProposal) {
        self.proposals.put(partition, |waiting| *waiting = Some(proposal));
    }

    fn read_back(&self, partition: PartitionId) {
        self.store_ops.put(partition, |op| op.read_back = true);
    }

    fn resign(&self, partition: PartitionId, epoch: LeaderEpoch) {
        self.store_ops.put(partition, |op| op.resign = Some(epoch));
    }
}

impl IsrUpdateManager {
    pub(super) fn new(
        me: BrokerId,
        keys: Keys,
        updater: PartitionUpdater,
        partitions: Arc<PartitionTable>,
    ) -> Arc<Self> {
        Arc::new(Self {
            me,
            keys,
            updater,
            partitions,
            proposals: CoalescingQueue::new(),
            store_ops: CoalescingQueue::new(),
        })
    }

    /// Starts one task for proposals and one for all other operations, so that proposals do not wait for read-backs.
    pub(super) fn spawn(self: &Arc<Self>, tasks: &Tasks) {
        let isr_updates = Arc::clone(self);
        tasks.spawn_until_cancelled("isr-updates", async move { isr_updates.propose_all().await });
        let isr_updates = Arc::clone(self);
        tasks.spawn_until_cancelled("isr-store-ops", async move { isr_updates.run_store_ops().await });
    }

    /// Sends the queued proposals to the metadata store, and the outcomes back to their partitions. Never returns.
    async fn propose_all(&self) {
        loop {
            let proposals = self.proposals.take().await;
            let proposed = proposals.into_iter().filter_map(|(id, proposal)| Some((id, proposal?)));
            let updates = proposed.map(|(id, proposal)| self.build_update(id, proposal)).collect();
            for (id, result) in self.updater.apply(updates, &[]).await {
                self.send_outcome(id, outcome(id, result)).await;
            }
        }
    }

    /// Returns the update for a proposal. The update is applied only if the stored value still has the expected
    /// revision. In addition, each added member must still be registered with the broker epoch in the proposal.
    fn build_update(&self, id: PartitionId, proposal: IsrProposal) -> PartitionUpdate {
        let IsrProposal { expect, value, added } = proposal;
        let registered = |peer: PeerId| Compare::CreateRevision(self.keys.broker(peer.broker), peer.epoch);
        let added = if mutant!(AdmitStaleBrokerEpoch) { Vec::new() } else { added };
        let guards = added.into_iter().map(registered).collect();
        PartitionUpdate { id, expected_revision: expect, value, guards }
    }

    /// Sends the outcome of a proposal or read-back to the partition.
    async fn send_outcome(&self, id: PartitionId, outcome: ProposalOutcome) {
        // The outcome for a partition that is no longer open is dropped.
        if let Some(partition) = self.partitions.by_id(id) {
            partition.on_isr_outcome(outcome).await;
        }
    }

    /// Runs the queued operations. Operations that must be retried return to the queue after a pause. Never returns.
    async fn run_store_ops(&self) {
        let mut backoff = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        loop {
            let ops = self.store_ops.take().await;
            let results = stream::iter(ops).map(|(id, op)| async move { (id, self.run_store_op(id, op).await) });
            let results: Vec<(PartitionId, PendingStoreOp)> =
                results.buffer_unordered(MAX_CONCURRENT_OPS).collect().await;
            let is_pending = |op: &PendingStoreOp| op.read_back || op.resign.is_some();
            let pending: Vec<_> = results.into_iter().filter(|(_, op)| is_pending(op)).collect();
            if pending.is_empty() {
                backoff.reset();
                continue;
            }
            backoff.pause().await;
            for (id, pending) in pending {
                self.store_ops.put(id, |op| {
                    op.read_back |= pending.read_back;
                    op.resign = op.resign.max(pending.resign);
                });
            }
        }
    }

    /// Reads the key of the partition, and runs the requested operations on its value. Returns the operations that must
    /// be retried.
    async fn run_store_op(&self, id: PartitionId, op: PendingStoreOp) -> PendingStoreOp {
        let stored = match self.updater.read_back(id).await {
            Ok(stored) => stored,
            Err(error) => {
                tracing::debug!(partition = %id, %error, "could not read the key of the partition: retrying");
                return op;
            }
        };
        if op.read_back {
            let outcome = stored
                .clone()
                .map_or(ProposalOutcome::Deleted, |(value, revision)| ProposalOutcome::CurrentValue(value, revision));
            self.send_outcome(id, outcome).await;
        }
        let Some((epoch, (value, revision))) = op.resign.zip(stored) else { return PendingStoreOp::default() };
        let resigned = self.resign_from(id, epoch, value, revision).await;
        PendingStoreOp { read_back: false, resign: (!resigned).then_some(epoch) }
    }

    /// Resigns from the leadership of this epoch, given the stored value and its revision. Returns false if the
    /// resignation must be retried. Returns true without a resignation in three cases:
    /// - This broker does not lead in the epoch.
    /// - No other replica is in sync.
    /// - The topic is not hosted.
    async fn resign_from(
        &self,
        id: PartitionId,
        epoch: LeaderEpoch,
        value: PartitionValue,
        revision: Revision,
    ) -> bool {
        let leads = value.leader == Some(self.me) && value.leader_epoch == epoch;
        let has_successor = value.isr.iter().any(|member| *member != self.me);
        if !leads || !has_successor {
            // If this is the only in-sync replica, it would be elected again at once. As the leader, it can still serve
            // its records.
            return true;
        }
        // The topic is not hosted, so its configuration is unavailable.
        let Some(config) = self.partitions.config(id) else { return true };
        let value = value.resign(self.me, config.min_insync_replicas);
        let update = PartitionUpdate { id, expected_revision: revision, value, guards: Vec::new() };
        match self.updater.apply(vec![update], &[]).await.pop() {
            Some((_, UpdateOutcome::Done(_))) => {
                let topic = self.partitions.name(id.topic).map_or_else(|| "?".to_owned(), |name| name.to_string());
                tracing::error!(
                    %topic, partition = %id,
                    "this broker resigned as the leader of the partition, which it cannot write, and another in-sync \
                     replica takes over: an earlier line about the partition has the cause; remove it, then restart \
                     the broker"
                );
                true
            }
            // The value has changed, or the store did not respond: the key is read again.
            _ => false,
        }
    }
}

/// Converts the result of an update to the outcome for the leader that proposed it.
fn outcome(id: PartitionId, result: UpdateOutcome) -> ProposalOutcome {
    match result {
        UpdateOutcome::Done(revision) => ProposalOutcome::Committed(revision),
        UpdateOutcome::Conflict(Some((value, revision))) => ProposalOutcome::CurrentValue(value, revision),
        // The stored value is missing or unreadable, so the leader must not continue as if the old value were stored.
        UpdateOutcome::Conflict(None) => ProposalOutcome::Deleted,
        UpdateOutcome::GuardFailed => unreachable!("the update has no guard for all changes"),
        // After `Unknown`, the change may or may not have been applied. After `Failed`, the change was not applied. In
        // both cases, the leader requests a read-back, which shows the stored value.
        UpdateOutcome::Unknown(error) | UpdateOutcome::Failed(error) => {
            tracing::debug!(partition = %id, %error, "the outcome of an ISR proposal is unknown: reading the key back");
            ProposalOutcome::Unknown
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        broker::partitions::table::HostedTopic,
        cluster::{BrokerValue, EmbeddedStore, MetaStore as _, Transaction, Value as _},
        model::{TopicConfig, TopicId, TopicName},
        task::random,
    };

    const ME: BrokerId = BrokerId(1);

    struct Bench {
        store: EmbeddedStore,
        keys: Keys,
        isr_updates: Arc<IsrUpdateManager>,
        id: PartitionId,
    }

    impl Bench {
        fn new() -> Self {
            let (store, keys) = (EmbeddedStore::in_memory(), Keys::new("test").expect("the name is valid"));
            let (partitions, topic) = (Arc::new(PartitionTable::default()), TopicId::new(random::uuid()));
            let hosted = HostedTopic::new(topic, Arc::new(TopicConfig::default()), 1, None);
            partitions.put([(TopicName::new("t").expect("the name is valid"), hosted)]);
            let updater = PartitionUpdater::new(Arc::new(store.clone()), keys.clone());
            let isr_updates = IsrUpdateManager::new(ME, keys.clone(), updater, partitions);
            Self { store, keys, isr_updates, id: PartitionId::new(topic, 0) }
        }

        async fn put(&self, value: &PartitionValue) {
            let put = Transaction::new().put(self.keys.partition(self.id), value.encode());
            self.store.transact(put).await.expect("the store responds");
        }

        async fn stored(&self) -> PartitionValue {
            let key = self.keys.partition(self.id);
            let entry = self.store.get(&key).await.expect("the store responds").entry.expect("the key exists");
            PartitionValue::decode(&key, &entry.value).expect("the value is valid")
        }

        /// Runs one attempt to resign from an epoch. Returns true if no retry is needed.
        async fn resign(&self, epoch: u32) -> bool {
            let op = PendingStoreOp { read_back: false, resign: Some(LeaderEpoch(epoch)) };
            self.isr_updates.run_store_op(self.id, op).await.resign.is_none()
        }
    }

    fn value(leader: u32, isr: &[u32]) -> PartitionValue {
        PartitionValue {
            leader: Some(BrokerId(leader)),
            isr: isr.iter().copied().map(BrokerId).collect(),
            ..PartitionValue::new(vec![ME, BrokerId(2)], LeaderEpoch(3))
        }
    }

    #[tokio::test]
    async fn failed_leader_resigns_only_for_another_isr_member() {
        let bench = Bench::new();
        for (before, epoch, reason) in [
            (value(1, &[1]), 3, "no other replica is in sync"),
            (value(2, &[1, 2]), 3, "another broker leads"),
            (value(1, &[1, 2]), 2, "the broker leads in a later epoch"),
        ] {
            bench.put(&before).await;
            assert!(bench.resign(epoch).await, "{reason}");
            assert_eq!(bench.stored().await, before, "{reason}");
        }
        bench.put(&value(1, &[1, 2])).await;
        assert!(bench.resign(3).await);
        let after = bench.stored().await;
        assert_eq!((after.leader, after.leader_epoch, after.isr), (None, LeaderEpoch(4), vec![BrokerId(2)]));
    }

    /// A broker that registered again after its acknowledgement may lack the acknowledged records. So the proposal to
    /// admit its earlier registration must fail.
    #[tokio::test]
    async fn isr_admission_requires_unchanged_broker_epoch() {
        let bench = Bench::new();
        let peer = BrokerId(2);
        let key = bench.keys.broker(peer);
        let register = async || {
            let delete = Transaction::new().delete(key.clone());
            bench.store.transact(delete).await.expect("the store responds");
            let put = Transaction::new().put(key.clone(), BrokerValue::running_at("there:1".to_owned()).encode());
            bench.store.transact(put).await.expect("the store responds");
            bench.store.get(&key).await.expect("the store responds").entry.expect("the key exists").create_revision
        };
        let (before, after) = (value(1, &[1]), value(1, &[1, 2]));
        let (older, newer) = (register().await, register().await);
        for (epoch, expected) in [(older, &before), (newer, &after)] {
            bench.put(&before).await;
            let read = bench.store.get(&bench.keys.partition(bench.id)).await.expect("the store responds");
            let expect = read.entry.expect("the key exists");
            let added = vec![PeerId { broker: peer, epoch }];
            let proposal = IsrProposal { expect: expect.mod_revision, value: after.clone(), added };
            let update = bench.isr_updates.build_update(bench.id, proposal);
            bench.isr_updates.updater.apply(vec![update], &[]).await;
            assert_eq!(&bench.stored().await, expected);
        }
    }

    #[tokio::test]
    async fn queued_operations_of_one_partition_are_merged() {
        let queue: CoalescingQueue<PendingStoreOp> = CoalescingQueue::new();
        let topic = TopicId::new(random::uuid());
        for number in [0, 1, 0] {
            queue.put(PartitionId::new(topic, number), |op| {
                op.resign = op.resign.max(Some(LeaderEpoch(number)));
            });
        }
        queue.put(PartitionId::new(topic, 0), |op| op.read_back = true);
        let taken = queue.take().await;
        let op = |number| taken[&PartitionId::new(topic, number)];
        assert_eq!((taken.len(), op(0).read_back, op(1).read_back), (2, true, false));
        let again = tokio::time::timeout(Duration::from_millis(20), queue.take()).await;
        assert!(again.is_err(), "the queue is empty");
    }

    #[test]
    fn store_results_map_to_proposal_outcomes() {
        let id = PartitionId::new(TopicId::new(random::uuid()), 0);
        let (stored, revision) = (value(2, &[2]), Revision(7));
        let lost = || crate::cluster::MetaStoreError::unknown("no response");
        assert_eq!(outcome(id, UpdateOutcome::Done(revision)), ProposalOutcome::Committed(revision));
        assert_eq!(
            outcome(id, UpdateOutcome::Conflict(Some((stored.clone(), revision)))),
            ProposalOutcome::CurrentValue(stored, revision)
        );
        assert_eq!(outcome(id, UpdateOutcome::Conflict(None)), ProposalOutcome::Deleted);
        assert_eq!(outcome(id, UpdateOutcome::Unknown(lost())), ProposalOutcome::Unknown);
        assert_eq!(
            outcome(id, UpdateOutcome::Failed(lost())),
            ProposalOutcome::Unknown,
            "the leader must not continue as if it had proposed nothing"
        );
    }
}
