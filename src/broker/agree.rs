//! Sends ISR proposals of partitions to the metadata store, and the outcomes back.
//!
//! # Overview
//!
//! A leader continues while its proposal is open, and has at most one open request. The queue is therefore bounded by the number of
//! partitions. Requests that queue up meanwhile are sent together, in as few transactions as possible: a failed follower is a member of
//! hundreds of partitions at once. No other component batches these requests.
//!
//! # Invariants
//!
//! - No proposal is sent twice. A proposal that may or may not be applied has the outcome unknown. The leader then requests a read-back of
//!   the key, which is retried until the store responds.
//! - A leader whose disk failed resigns in the metadata store, if another member is in sync. The resignation is retried until it is done or
//!   another epoch has begun.
//!
//! # Shutdown
//!
//! The tasks end at once. The next leader finds the result of requests in flight in the metadata store.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::sync::Notify;

use super::hosted::Hosted;
use crate::{
    cluster::{Change, Changed, Compare, Keys, PartitionChanges, PartitionValue, Revision},
    model::{BrokerId, LeaderEpoch, PartitionId},
    partition::{
        Agreement,
        leader::insync::{Agreed, Peer, Proposal},
    },
    task::Tasks,
};

/// First and longest pause after the store did not respond.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Maximum number of keys that are read concurrently.
const TOGETHER: usize = 16;

/// Queue with at most one entry per partition.
struct Inbox<T> {
    waiting: Mutex<BTreeMap<PartitionId, T>>,
    news: Notify,
}

impl<T: Default> Inbox<T> {
    fn new() -> Self {
        Self { waiting: Mutex::default(), news: Notify::new() }
    }

    /// Updates the entry of a partition.
    fn put(&self, id: PartitionId, change: impl FnOnce(&mut T)) {
        change(self.waiting.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default());
        self.news.notify_one();
    }

    /// Takes all entries, once there are any. Only one task calls this function.
    async fn take(&self) -> BTreeMap<PartitionId, T> {
        loop {
            let taken = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
            if !taken.is_empty() {
                return taken;
            }
            self.news.notified().await;
        }
    }
}

/// Store operations of one partition, other than its proposals.
#[derive(Clone, Copy, Debug, Default)]
struct Errand {
    read_back: bool,
    resign: Option<LeaderEpoch>,
}

/// Requests of one broker's partitions to the metadata store.
pub(super) struct Agree {
    me: BrokerId,
    keys: Keys,
    changes: PartitionChanges,
    hosted: Arc<Hosted>,
    proposals: Inbox<Option<Proposal>>,
    errands: Inbox<Errand>,
}

impl Agreement for Agree {
    fn propose(&self, partition: PartitionId, proposal: Proposal) {
        self.proposals.put(partition, |waiting| *waiting = Some(proposal));
    }

    fn read_back(&self, partition: PartitionId) {
        self.errands.put(partition, |errand| errand.read_back = true);
    }

    fn resign(&self, partition: PartitionId, epoch: LeaderEpoch) {
        self.errands.put(partition, |errand| errand.resign = Some(epoch));
    }
}

impl Agree {
    pub(super) fn new(me: BrokerId, keys: Keys, changes: PartitionChanges, hosted: Arc<Hosted>) -> Arc<Self> {
        Arc::new(Self { me, keys, changes, hosted, proposals: Inbox::new(), errands: Inbox::new() })
    }

    /// Starts the tasks. Proposals do not wait for read-backs.
    pub(super) fn spawn(self: &Arc<Self>, tasks: &Tasks) {
        let (agree, stop) = (Arc::clone(self), tasks.clone());
        tasks.spawn("agree", async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = agree.propose_all() => {}
            }
        });
        let (agree, stop) = (Arc::clone(self), tasks.clone());
        tasks.spawn("agree errands", async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = agree.run_errands() => {}
            }
        });
    }

    async fn propose_all(&self) {
        loop {
            let some = self.proposals.take().await;
            let proposed = some.into_iter().filter_map(|(id, proposal)| Some((id, proposal?)));
            let changes = proposed.map(|(id, proposal)| self.change(id, proposal)).collect();
            for (id, changed) in self.changes.make(changes, &[]).await {
                self.answer(id, outcome(id, changed)).await;
            }
        }
    }

    fn change(&self, id: PartitionId, proposal: Proposal) -> Change {
        let Proposal { expect, value, added } = proposal;
        let registered = |peer: Peer| Compare::CreateRevision(self.keys.broker(peer.broker), peer.epoch);
        let added = if mutant!(AdmitStaleBrokerEpoch) { Vec::new() } else { added };
        let also = added.into_iter().map(registered).collect();
        Change { id, expect, value, also }
    }

    async fn answer(&self, id: PartitionId, outcome: Agreed) {
        // The outcome for a partition that is no longer open is dropped.
        if let Some(partition) = self.hosted.by_id(id) {
            partition.agreed(outcome).await;
        }
    }

    async fn run_errands(&self) {
        let mut pause = PAUSES.0;
        loop {
            let some = self.errands.take().await;
            let run = stream::iter(some).map(|(id, errand)| async move { (id, self.run_errand(id, errand).await) });
            let left: Vec<(PartitionId, Errand)> = run.buffer_unordered(TOGETHER).collect().await;
            let left: Vec<_> = left.into_iter().filter(|(_, left)| left.read_back || left.resign.is_some()).collect();
            if left.is_empty() {
                pause = PAUSES.0;
                continue;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
            for (id, left) in left {
                self.errands.put(id, |errand| {
                    errand.read_back |= left.read_back;
                    errand.resign = errand.resign.max(left.resign);
                });
            }
        }
    }

    /// Reads the key and runs the requested operations. Returns the remaining operations.
    async fn run_errand(&self, id: PartitionId, errand: Errand) -> Errand {
        let found = match self.changes.read_back(id).await {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(partition = %id, %error, "the partition's key could not be read yet");
                return errand;
            }
        };
        if errand.read_back {
            let outcome = found.clone().map_or(Agreed::Gone, |(value, revision)| Agreed::Found(value, revision));
            self.answer(id, outcome).await;
        }
        let Some((epoch, (value, revision))) = errand.resign.zip(found) else { return Errand::default() };
        let resigned = self.resign_from(id, epoch, value, revision).await;
        Errand { read_back: false, resign: (!resigned).then_some(epoch) }
    }

    /// Resigns from the leadership of this epoch. Returns false if that must be retried.
    async fn resign_from(
        &self,
        id: PartitionId,
        epoch: LeaderEpoch,
        value: PartitionValue,
        revision: Revision,
    ) -> bool {
        let leads = value.leader == Some(self.me) && value.leader_epoch == epoch;
        let stay = value.isr.iter().any(|member| *member != self.me);
        if !leads || !stay {
            // The only in-sync replica would be elected again. As the leader, it still serves its records.
            return true;
        }
        let Some(config) = self.hosted.config(id) else { return true };
        let value = value.resign(self.me, config.min_insync_replicas);
        let change = Change { id, expect: revision, value, also: Vec::new() };
        match self.changes.make(vec![change], &[]).await.pop() {
            Some((_, Changed::Done(_))) => {
                tracing::error!(partition = %id, "this broker cannot write the partition any more: it gave it up, and another replica leads");
                true
            }
            _ => false,
        }
    }
}

/// Translates the result of the store to the outcome for the proposing leader.
fn outcome(id: PartitionId, changed: Changed) -> Agreed {
    match changed {
        Changed::Done(revision) => Agreed::Done(revision),
        Changed::Refused(Some((value, revision))) => Agreed::Found(value, revision),
        // There is no readable value, so the leader must not continue as if the old value were stored.
        Changed::Refused(None) => Agreed::Gone,
        Changed::Barred => unreachable!("nothing was named that holds for all"),
        // The change was not applied, or may have been applied: a read-back shows the stored value.
        Changed::Unknown(error) | Changed::Failed(error) => {
            tracing::debug!(partition = %id, %error, "a change of the in-sync replicas has no known outcome yet");
            Agreed::Unknown
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        broker::hosted::HostedTopic,
        cluster::{BrokerValue, EmbeddedStore, MetaStore as _, Transaction, Value as _},
        model::{TopicConfig, TopicId, TopicName},
        task::random,
    };

    const ME: BrokerId = BrokerId(1);

    struct Bench {
        store: EmbeddedStore,
        keys: Keys,
        agree: Arc<Agree>,
        id: PartitionId,
    }

    impl Bench {
        fn new() -> Self {
            let (store, keys) = (EmbeddedStore::in_memory(), Keys::new("test").expect("valid"));
            let (hosted, topic) = (Arc::new(Hosted::default()), TopicId::new(random::uuid()));
            let held = HostedTopic::new(topic, Arc::new(TopicConfig::default()), 1, None);
            hosted.put([(TopicName::new("t").expect("valid"), held)]);
            let changes = PartitionChanges::new(Arc::new(store.clone()), keys.clone());
            let agree = Agree::new(ME, keys.clone(), changes, hosted);
            Self { store, keys, agree, id: PartitionId::new(topic, 0) }
        }

        async fn put(&self, value: &PartitionValue) {
            let put = Transaction::new().put(self.keys.partition(self.id), value.encode());
            self.store.transact(put).await.expect("answers");
        }

        async fn stands(&self) -> PartitionValue {
            let key = self.keys.partition(self.id);
            let entry = self.store.get(&key).await.expect("answers").entry.expect("there");
            PartitionValue::decode(&key, &entry.value).expect("ours")
        }

        /// Resigns from an epoch. Returns true if nothing is left to do.
        async fn resign(&self, epoch: u32) -> bool {
            let errand = Errand { read_back: false, resign: Some(LeaderEpoch(epoch)) };
            self.agree.run_errand(self.id, errand).await.resign.is_none()
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
        for (before, epoch, why) in [
            (value(1, &[1]), 3, "nobody else is in sync"),
            (value(2, &[1, 2]), 3, "another one leads"),
            (value(1, &[1, 2]), 2, "it leads anew since"),
        ] {
            bench.put(&before).await;
            assert!(bench.resign(epoch).await, "{why}");
            assert_eq!(bench.stands().await, before, "{why}");
        }
        bench.put(&value(1, &[1, 2])).await;
        assert!(bench.resign(3).await);
        let after = bench.stands().await;
        assert_eq!((after.leader, after.leader_epoch, after.isr), (None, LeaderEpoch(4), vec![BrokerId(2)]));
    }

    /// A broker that was removed from the sets after its acknowledgement, and registered again, may lack the acknowledged records.
    #[tokio::test]
    async fn isr_admission_requires_unchanged_broker_epoch() {
        let bench = Bench::new();
        let peer = BrokerId(2);
        let key = bench.keys.broker(peer);
        let register = async || {
            let gone = Transaction::new().delete(key.clone());
            bench.store.transact(gone).await.expect("answers");
            let put = Transaction::new().put(key.clone(), BrokerValue::running_at("there:1".to_owned()).encode());
            bench.store.transact(put).await.expect("answers");
            bench.store.get(&key).await.expect("answers").entry.expect("there").create_revision
        };
        let (before, after) = (value(1, &[1]), value(1, &[1, 2]));
        let (older, newer) = (register().await, register().await);
        for (epoch, stands) in [(older, &before), (newer, &after)] {
            bench.put(&before).await;
            let expect = bench.store.get(&bench.keys.partition(bench.id)).await.expect("answers").entry.expect("there");
            let added = vec![Peer { broker: peer, epoch }];
            let proposal = Proposal { expect: expect.mod_revision, value: after.clone(), added };
            let change = bench.agree.change(bench.id, proposal);
            bench.agree.changes.make(vec![change], &[]).await;
            assert_eq!(&bench.stands().await, stands);
        }
    }

    #[tokio::test]
    async fn queued_operations_of_one_partition_are_merged() {
        let inbox: Inbox<Errand> = Inbox::new();
        let topic = TopicId::new(random::uuid());
        for number in [0, 1, 0] {
            inbox.put(PartitionId::new(topic, number), |errand| {
                errand.resign = errand.resign.max(Some(LeaderEpoch(number)));
            });
        }
        inbox.put(PartitionId::new(topic, 0), |errand| errand.read_back = true);
        let taken = inbox.take().await;
        let waits = |number| taken[&PartitionId::new(topic, number)];
        assert_eq!((taken.len(), waits(0).read_back, waits(1).read_back), (2, true, false));
        let again = tokio::time::timeout(Duration::from_millis(20), inbox.take()).await;
        assert!(again.is_err(), "nothing waits any more");
    }

    #[test]
    fn store_results_map_to_proposal_outcomes() {
        let id = PartitionId::new(TopicId::new(random::uuid()), 0);
        let (found, at) = (value(2, &[2]), Revision(7));
        let lost = || crate::cluster::StoreError::unknown("no answer");
        assert_eq!(outcome(id, Changed::Done(at)), Agreed::Done(at));
        assert_eq!(outcome(id, Changed::Refused(Some((found.clone(), at)))), Agreed::Found(found, at));
        assert_eq!(outcome(id, Changed::Refused(None)), Agreed::Gone);
        assert_eq!(outcome(id, Changed::Unknown(lost())), Agreed::Unknown);
        assert_eq!(
            outcome(id, Changed::Failed(lost())),
            Agreed::Unknown,
            "nobody may go on as if nothing had been asked"
        );
    }
}
