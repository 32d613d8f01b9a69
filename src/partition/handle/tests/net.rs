//! Brokers of one partition in one process. Each broker has its own disk, the metadata store is the embedded one, and
//! tests can disconnect brokers from each other and from the metadata. Links only carry messages, and ISR updates are
//! compare-and-sets.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::sync::oneshot;

use tokio::sync::Semaphore;

use crate::{
    cluster::{
        Compare, EmbeddedStore, Keys, MetaStore, PartitionValue, Revision, TierCommits, Transaction, TxnOutcome,
        Value as _,
    },
    log::{DataDir, DataDirIdentity, LogOptions, SimDisk},
    model::{
        Acks, BrokerId, Compression, ConfigMap, LeaderEpoch, Offset, PartitionId, TopicConfig, TopicId, TopicName,
    },
    partition::leader::{
        divergence::LogPosition,
        isr::{IsrProposal, ProposalOutcome},
        member::{BrokerStatus, DisconnectCause, PeerId, ReplicaProgress},
    },
    record::{Batch, BatchBuilder, Fingerprint, ProducerSequence},
    task::{Tasks, test_timeout::wait_until},
    telemetry::Metrics,
    tier::{ChunkCache, ChunkCacheOptions, ObjectStoreOptions, PartitionTier, TierState, TierStore},
};
use crate::{partition::*, task::lock::Mutex};

/// Index in the wake set of a subscription. Marked when the leader's log end or high watermark moved.
const LEADER_MOVED: usize = 0;

/// Index in the wake set of a subscription. Marked when the follower's log end or persisted end moved.
const FOLLOWER_MOVED: usize = 1;

/// Index in the wake set of a subscription. Marked when the subscription may have ended.
const CONNECTION_CHANGED: usize = 2;

/// The brokers and the network between them.
pub(super) struct Net {
    state: Mutex<NetState>,
    pub(super) store: EmbeddedStore,
    pub(super) keys: Keys,
    pub(super) id: PartitionId,
    object_store: Option<TierStore>,
    pub(super) min_insync: usize,
    tasks: Tasks,
}

#[derive(Default)]
struct NetState {
    nodes: BTreeMap<BrokerId, Node>,
    /// Pairs of brokers without a connection, in either direction.
    disconnected: BTreeSet<(BrokerId, BrokerId)>,
    /// Brokers that receive no metadata.
    without_metadata: BTreeSet<BrokerId>,
    /// Number of further proposals whose outcomes are lost.
    outcomes_to_lose: usize,
    /// True if proposals that admit a member are refused.
    refuse_admissions: bool,
    /// All proposals so far.
    proposals: Vec<IsrProposal>,
    /// All resignations so far: the leader, and the epoch that it ended.
    resigned: Vec<(BrokerId, LeaderEpoch)>,
}

pub(super) struct Node {
    pub(super) disk: SimDisk,
    pub(super) log: DataDir,
    pub(super) epoch: Revision,
    pub(super) queue: MaintenanceQueue,
    pub(super) tasks: Tasks,
    partition: Option<Arc<Partition>>,
    /// Leader that the replica follows, if any.
    follows: Option<BrokerId>,
    /// Number of the replica's last subscription. A task that serves an earlier subscription ends.
    subscription: u64,
    /// Wake set of the task that serves the last subscription.
    wake_set: Arc<WakeSet>,
}

/// Links and ISR updater of one broker, as its partition's task calls them.
struct BrokerContext {
    me: BrokerId,
    net: Arc<Net>,
}

pub(super) fn broker(number: u32) -> BrokerId {
    BrokerId(number)
}

pub(super) fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

impl Net {
    /// Creates brokers 1 to `brokers`; the first `replicas` of them are in-sync replicas, led by broker 1 in epoch 1.
    /// No replica is open yet.
    pub(super) async fn new(brokers: u32, replicas: u32, min_insync: usize, object_store: bool) -> Arc<Self> {
        let id = PartitionId::new(TopicId::from_bytes([9; 16]), 3);
        let replicas: Vec<BrokerId> = (1..=replicas).map(BrokerId).collect();
        let value = PartitionValue::new(replicas, LeaderEpoch(1));
        let (store, keys) = (EmbeddedStore::in_memory(), Keys::new("test").unwrap());
        store.transact(Transaction::new().put(keys.partition(id), value.encode())).await.unwrap();
        let object_store =
            object_store.then(|| TierStore::open(&ObjectStoreOptions::new("memory://"), "test").unwrap());
        let net = Self { state: Mutex::default(), store, keys, id, object_store, min_insync, tasks: Tasks::new() };
        for number in 1..=brokers {
            let disk = SimDisk::new();
            let node = Node {
                log: open_log(&disk, BrokerId(number)),
                disk,
                epoch: Revision(1000 + u64::from(number)),
                queue: MaintenanceQueue::default(),
                tasks: Tasks::new(),
                partition: None,
                follows: None,
                subscription: 0,
                wake_set: Arc::default(),
            };
            net.state.lock().nodes.insert(BrokerId(number), node);
        }
        Arc::new(net)
    }

    /// Calls `access` with one broker's state, and returns the result.
    pub(super) fn node<T>(&self, of: u32, access: impl FnOnce(&mut Node) -> T) -> T {
        access(self.state.lock().nodes.get_mut(&BrokerId(of)).unwrap())
    }

    /// Opens the replica of a broker, and assigns the stored value to all brokers that receive metadata.
    pub(super) async fn start(
        self: &Arc<Self>,
        of: u32,
        config: &[(&str, &str)],
        discard_local: bool,
    ) -> Arc<Partition> {
        let partition = self.open(of, config, discard_local).await.unwrap();
        self.deliver_metadata().await;
        partition
    }

    /// Opens the replica of a broker, which gets no assignment yet.
    pub(super) async fn open(
        self: &Arc<Self>,
        of: u32,
        config: &[(&str, &str)],
        discard_local: bool,
    ) -> Result<Arc<Partition>, PartitionError> {
        let overrides: ConfigMap = config.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let defaults: ConfigMap = [("min.insync.replicas".to_owned(), self.min_insync.to_string())].into();
        let committed = self.committed().await;
        let tier = self.object_store.clone().map(|store| {
            let cache = ChunkCache::open(&ChunkCacheOptions::default(), &Metrics::new()).unwrap();
            PartitionTier::new(store, cache, self.id, committed.clone().unwrap_or_default())
        });
        let spec = ReplicaSpec {
            id: self.id,
            topic: TopicName::new("events").unwrap(),
            config: Arc::new(TopicConfig::resolve(&defaults, &overrides).unwrap()),
            committed,
            tier,
            standalone: false,
            discard_local,
            max_lag_time: Duration::from_secs(10),
        };
        let context = Arc::new(BrokerContext { me: BrokerId(of), net: Arc::clone(self) });
        let ctx = PartitionContext { links: context.clone(), isr_updater: context, ..PartitionContext::standalone() };
        let (log, queue, tasks) = self.node(of, |node| (node.log.clone(), node.queue.clone(), node.tasks.clone()));
        let partition = Partition::open(BrokerId(of), &log, spec, ctx, &queue, &tasks)?;
        self.node(of, |node| node.partition = Some(Arc::clone(&partition)));
        Ok(partition)
    }

    /// Stops the replica of a broker, and ends the subscriptions of this replica and of its followers.
    pub(super) async fn stop(&self, of: u32) {
        let (partition, wake_sets) = {
            let mut state = self.state.lock();
            let node = state.nodes.get_mut(&BrokerId(of)).unwrap();
            node.subscription += 1;
            let partition = node.partition.take();
            (partition, state.nodes.values().map(|node| Arc::clone(&node.wake_set)).collect::<Vec<_>>())
        };
        if let Some(partition) = partition {
            partition.stop().await;
        }
        wake_sets.iter().for_each(|wake_set| wake_set.mark(CONNECTION_CHANGED));
    }

    fn partition(&self, of: BrokerId) -> Option<Arc<Partition>> {
        self.state.lock().nodes[&of].partition.clone()
    }

    /// Returns the partition value in the metadata store, and its revision.
    pub(super) async fn value(&self) -> (PartitionValue, Revision) {
        let key = self.keys.partition(self.id);
        let entry = self.store.get(&key).await.unwrap().entry.unwrap();
        (PartitionValue::decode(&key, &entry.value).unwrap(), entry.mod_revision)
    }

    /// Returns the tier state in the metadata store.
    pub(super) async fn committed(&self) -> Option<TierState> {
        let key = self.keys.tier(self.id);
        let entry = self.store.get(&key).await.unwrap().entry?;
        Some(TierState::decode(&key, &entry.value).unwrap())
    }

    /// Writes the value that `change` makes of the stored one, as an election or an operator does. Assigns the value to
    /// all brokers that receive metadata, and returns it.
    pub(super) async fn change(&self, change: impl Fn(&PartitionValue) -> PartitionValue) -> PartitionValue {
        loop {
            let (value, revision) = self.value().await;
            let new = change(&value);
            if self.set(revision, &new).await.is_ok() {
                self.deliver_metadata().await;
                return new;
            }
        }
    }

    /// Writes a value if the stored one has revision `expect`; `Err` otherwise.
    async fn set(&self, expect: Revision, value: &PartitionValue) -> Result<Revision, ()> {
        let key = self.keys.partition(self.id);
        let when = Compare::ModRevision(key.clone(), expect);
        match self.store.transact(Transaction::new().when(when).put(key, value.encode())).await.unwrap() {
            TxnOutcome::Committed { revision } => Ok(revision),
            TxnOutcome::CompareFailed { .. } => Err(()),
        }
    }

    /// Elects `leader` cleanly, as if the brokers in `offline` were offline. Panics if the broker cannot be elected.
    pub(super) async fn elect(&self, leader: u32, offline: &[u32]) {
        let offline: BTreeSet<BrokerId> = offline.iter().map(|id| BrokerId(*id)).collect();
        let min_insync = self.min_insync;
        self.change(move |value| {
            value.elect(BrokerId(leader), |id| !offline.contains(&id), min_insync).expect("the broker can be elected")
        })
        .await;
    }

    /// Assigns the stored value to all brokers that receive metadata.
    pub(super) async fn deliver_metadata(&self) {
        let (value, revision) = self.value().await;
        let committed = self.committed().await;
        let (value, mut receivers) = (Arc::new(value), Vec::new());
        let registered = {
            let state = self.state.lock();
            for (id, node) in &state.nodes {
                if let Some(partition) = node.partition.as_ref().filter(|_| !state.without_metadata.contains(id)) {
                    receivers.push(Arc::clone(partition));
                }
            }
            state.nodes.iter().map(|(id, node)| (*id, BrokerStatus::Registered(node.epoch))).collect::<BTreeMap<_, _>>()
        };
        for partition in receivers {
            let (value, committed, registered) = (Arc::clone(&value), committed.clone(), registered.clone());
            partition.assign(PartitionAssignment { value, revision, committed, registered }).await;
        }
    }

    /// Delivers no metadata to this broker from now on. Assigns the stored value to the others.
    pub(super) async fn pause_metadata(&self, of: u32) {
        self.state.lock().without_metadata.insert(BrokerId(of));
        self.deliver_metadata().await;
    }

    /// Delivers metadata to this broker from now on, beginning with the stored value.
    pub(super) async fn resume_metadata(&self, of: u32) {
        self.state.lock().without_metadata.remove(&BrokerId(of));
        self.deliver_metadata().await;
    }

    /// Ends the connection between two brokers. Both brokers keep running.
    pub(super) fn disconnect(&self, first: u32, second: u32) {
        let mut state = self.state.lock();
        state.disconnected.insert(pair(BrokerId(first), BrokerId(second)));
        state.nodes.values().for_each(|node| node.wake_set.mark(CONNECTION_CHANGED));
    }

    /// Restores the connection between two brokers; their links connect again.
    pub(super) fn reconnect(self: &Arc<Self>, first: u32, second: u32) {
        self.state.lock().disconnected.remove(&pair(BrokerId(first), BrokerId(second)));
        for me in [first, second] {
            self.notify_connected(BrokerId(me), Duration::ZERO);
        }
    }

    /// Loses the outcomes of the next `count` proposals. The store still writes these proposals.
    pub(super) fn lose_outcomes(&self, count: usize) {
        self.state.lock().outcomes_to_lose = count;
    }

    /// Refuses proposals that admit a member from now on, or accepts such proposals again.
    pub(super) fn refuse_admissions(&self, refuse: bool) {
        self.state.lock().refuse_admissions = refuse;
    }

    pub(super) fn proposals(&self) -> Vec<IsrProposal> {
        self.state.lock().proposals.clone()
    }

    pub(super) fn resigned(&self) -> Vec<(BrokerId, LeaderEpoch)> {
        self.state.lock().resigned.clone()
    }

    /// Runs maintenance of one replica until no work is left, then assigns the stored value to all brokers.
    pub(super) async fn run_maintenance(&self, of: u32) {
        let partition = self.partition(BrokerId(of)).unwrap();
        let maintenance = MaintenanceRunner::new(TierCommits::new(Arc::new(self.store.clone()), self.keys.clone()));
        while maintenance.step(&partition).await.unwrap().more {}
        partition.describe_segments().await.unwrap();
        self.deliver_metadata().await;
    }

    /// Returns true if broker `me` is connected to broker `peer`, and the replica of `peer` is open.
    fn can_reach(&self, me: BrokerId, peer: BrokerId) -> bool {
        let state = self.state.lock();
        !state.disconnected.contains(&pair(me, peer)) && state.nodes[&peer].partition.is_some()
    }

    /// After a delay, notifies the replica of `me` that its link is connected, if it follows a leader that `me` can
    /// reach then.
    fn notify_connected(self: &Arc<Self>, me: BrokerId, after: Duration) {
        let net = Arc::clone(self);
        self.tasks.spawn("connect", async move {
            tokio::time::sleep(after).await;
            let (follows, partition) = net.node(me.0, |node| (node.follows, node.partition.clone()));
            if let (Some(leader), Some(partition)) = (follows, partition)
                && net.can_reach(me, leader)
            {
                partition.on_link_event(LinkEvent::Connected).unwrap();
            }
        });
    }

    /// Runs one subscription of `me` on its link to the leader: the request, its response, then batches one way and
    /// acknowledgements the other.
    async fn serve(
        self: Arc<Self>,
        me: BrokerId,
        subscription: u64,
        wake_set: Arc<WakeSet>,
        request: (LeaderEpoch, LogPosition, ReplicaProgress),
    ) {
        let (epoch, position, progress) = request;
        let (leader, follower, broker_epoch) =
            self.node(me.0, |node| (node.follows, node.partition.clone(), node.epoch));
        let (Some(leader), Some(follower)) = (leader, follower) else { return };
        let Some(leading) = self.partition(leader).filter(|_| self.can_reach(me, leader)) else { return };
        let peer = PeerId { broker: me, epoch: broker_epoch };
        let response = leading.subscribe(peer, epoch, position, progress).await;
        let is_current = || self.node(me.0, |node| node.subscription == subscription) && self.can_reach(me, leader);
        if !is_current() {
            // If `me` stopped, the leader may have received the end of the link before this subscription. So the end is
            // reported again.
            if self.partition(me).is_none() {
                leading.on_follower_disconnected(peer, DisconnectCause::ShuttingDown).await;
            }
            return;
        }
        follower.on_link_event(LinkEvent::Response(response.clone())).unwrap();
        let SubscribeOutcome::Accepted(mut from) = response.outcome else { return };
        let (tail, mut sent_high_watermark) = (leading.tail(), response.high_watermark);
        leading.add_listener(&wake_set, LEADER_MOVED, WatermarkKind::LogEnd);
        leading.add_listener(&wake_set, LEADER_MOVED, WatermarkKind::HighWatermark);
        follower.add_listener(&wake_set, FOLLOWER_MOVED, WatermarkKind::AnyEnd);
        while is_current() && tail.epoch() == response.epoch {
            wake_set.wait_for_mark().await;
            let index = wake_set.take();
            if !is_current() {
                break;
            }
            if index == Some(FOLLOWER_MOVED) {
                leading.on_acknowledged(peer, epoch, follower.progress());
                continue;
            }
            let Ok(batches) = read(&tail, &mut from).await else { break };
            let high_watermark = tail.progress().1;
            if !batches.is_empty() || high_watermark != sent_high_watermark {
                sent_high_watermark = high_watermark;
                follower.on_link_event(LinkEvent::Batches { epoch: response.epoch, high_watermark, batches }).unwrap();
            }
        }
        // If the follower has replaced or ended the subscription itself, neither side is notified.
        if self.node(me.0, |node| node.subscription == subscription) {
            leading.on_follower_disconnected(peer, DisconnectCause::LinkLost).await;
            follower.on_link_event(LinkEvent::Disconnected).unwrap();
            self.notify_connected(me, Duration::from_millis(10));
        }
    }
}

/// Reads all batches from `from` to the leader's log end, and moves `from` there.
async fn read(tail: &TailReader, from: &mut Offset) -> Result<Vec<Batch>, ReadError> {
    let mut batches = Vec::new();
    while let Some(fetched) = tail.read(*from, 64 << 10).await? {
        let mut bytes = bytes::Bytes::from(fetched.chunks.concat());
        while !bytes.is_empty() {
            batches.push(Batch::split_from(&mut bytes).unwrap());
        }
        *from = fetched.next;
    }
    Ok(batches)
}

/// Returns the two brokers in the order of their ids.
fn pair(first: BrokerId, second: BrokerId) -> (BrokerId, BrokerId) {
    (first.min(second), first.max(second))
}

fn open_log(disk: &SimDisk, broker: BrokerId) -> DataDir {
    let identity = DataDirIdentity { cluster: "test".to_owned(), broker };
    let options =
        LogOptions { journal_bytes: 4 << 20, tail_bytes: 24 << 10, reserve_bytes: 0, ..LogOptions::default() };
    DataDir::open(Arc::new(disk.clone()), Path::new("/data"), &identity, options).unwrap()
}

impl ReplicationLinks for BrokerContext {
    fn start_following(&self, _: PartitionId, leader: BrokerId) {
        self.net.node(self.me.0, |node| node.follows = Some(leader));
        self.net.notify_connected(self.me, Duration::ZERO);
    }

    fn subscribe(&self, _: PartitionId, epoch: LeaderEpoch, position: LogPosition, progress: ReplicaProgress) {
        let (subscription, wake_set) = self.net.node(self.me.0, |node| {
            node.subscription += 1;
            // Ends the task of the previous subscription.
            node.wake_set.mark(CONNECTION_CHANGED);
            node.wake_set = Arc::default();
            (node.subscription, Arc::clone(&node.wake_set))
        });
        self.net
            .tasks
            .spawn("link", Arc::clone(&self.net).serve(self.me, subscription, wake_set, (epoch, position, progress)));
    }

    fn retry_later(&self, _: PartitionId) {
        self.net.notify_connected(self.me, Duration::from_millis(5));
    }

    fn unsubscribe(&self, _: PartitionId, known: LeaderEpoch, stopping: bool) {
        let (followed, epoch) = self.net.node(self.me.0, |node| {
            node.subscription += 1;
            node.wake_set.mark(CONNECTION_CHANGED);
            (node.follows.take(), node.epoch)
        });
        let Some(leader) = followed.filter(|leader| self.net.can_reach(self.me, *leader)) else { return };
        let (net, peer) = (Arc::clone(&self.net), PeerId { broker: self.me, epoch });
        self.net.tasks.spawn("unsubscribe", async move {
            let Some(leading) = net.partition(leader) else { return };
            if known > leading.epoch() {
                leading.report_newer_epoch(known).await;
            }
            leading
                .on_follower_disconnected(
                    peer,
                    if stopping { DisconnectCause::ShuttingDown } else { DisconnectCause::LinkLost },
                )
                .await;
        });
    }
}

impl IsrUpdater for BrokerContext {
    fn propose(&self, _: PartitionId, proposal: IsrProposal) {
        let (me, net) = (self.me, Arc::clone(&self.net));
        net.state.lock().proposals.push(proposal.clone());
        self.net.tasks.spawn("propose", async move {
            let is_current = |peer: &PeerId| net.node(peer.broker.0, |node| node.epoch == peer.epoch);
            let is_refused = net.state.lock().refuse_admissions && !proposal.added.is_empty();
            let is_allowed = !is_refused && proposal.added.iter().all(is_current);
            let written = if is_allowed { net.set(proposal.expect, &proposal.value).await } else { Err(()) };
            let is_lost = {
                let mut state = net.state.lock();
                let is_lost = state.outcomes_to_lose > 0;
                state.outcomes_to_lose = state.outcomes_to_lose.saturating_sub(1);
                is_lost
            };
            let outcome = match written {
                _ if is_lost => ProposalOutcome::Unknown,
                Ok(revision) => ProposalOutcome::Committed(revision),
                Err(()) => {
                    let (value, revision) = net.value().await;
                    ProposalOutcome::CurrentValue(value, revision)
                }
            };
            if let Some(partition) = net.partition(me) {
                partition.on_isr_outcome(outcome).await;
            }
            if !is_lost {
                net.deliver_metadata().await;
            }
        });
    }

    fn read_back(&self, _: PartitionId) {
        let (me, net) = (self.me, Arc::clone(&self.net));
        self.net.tasks.spawn("read-back", async move {
            let (value, revision) = net.value().await;
            if let Some(partition) = net.partition(me) {
                partition.on_isr_outcome(ProposalOutcome::CurrentValue(value, revision)).await;
            }
        });
    }

    fn resign(&self, _: PartitionId, epoch: LeaderEpoch) {
        let (me, net) = (self.me, Arc::clone(&self.net));
        net.state.lock().resigned.push((me, epoch));
        self.net.tasks.spawn("resign", async move {
            let min_insync = net.min_insync;
            net.change(
                move |value| if value.leader_epoch == epoch { value.resign(me, min_insync) } else { value.clone() },
            )
            .await;
        });
    }
}

/// Returns a batch of one record. With a producer sequence, its timestamp is constant, so that a retry has the same
/// bytes.
pub(super) fn batch(value: &[u8], stamp: Option<ProducerSequence>) -> Batch {
    let mut builder = BatchBuilder::new(Compression::None);
    let timestamp_ms = if stamp.is_some() { 1 } else { crate::task::clock::wall_ms() };
    builder.push(timestamp_ms, None, Some(value), &[]).unwrap();
    builder.finish(stamp).unwrap()
}

/// Queues a write of a batch as a client sent it.
pub(super) async fn send(partition: &Partition, batch: Batch, acks: Acks) -> oneshot::Receiver<AppendResult> {
    let sent = Some(batch.fingerprint());
    send_as(partition, batch, sent, acks).await
}

/// Queues a write of a batch that a broker made from a request. `sent` is the fingerprint of the client's batch, or
/// `None` if the client sent records.
pub(super) async fn send_as(
    partition: &Partition,
    batch: Batch,
    sent: Option<Fingerprint>,
    acks: Acks,
) -> oneshot::Receiver<AppendResult> {
    let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
    partition.append(batch, sent, acks, permit).await
}

/// Waits until the task has handled all earlier messages, sends the time, and waits until the task has handled the
/// time.
pub(super) async fn tick(partition: &Partition, now_ms: u64) {
    // Returns an assignment that is older than every applied value, so that the task drops it. `assign` returns when
    // the task has handled it.
    let stale_assignment = || {
        let (value, revision) = (Arc::new(PartitionValue::new(vec![broker(1)], LeaderEpoch(0))), Revision::ZERO);
        PartitionAssignment { value, revision, committed: None, registered: BTreeMap::new() }
    };
    partition.assign(stale_assignment()).await;
    partition.tick(now_ms);
    // The task may handle later assignments before the time, and a later time would replace it.
    wait_until("the task takes the time", || !partition.signals.has_tick()).await;
    partition.assign(stale_assignment()).await;
}

/// Appends a batch of one record, and waits for the result.
pub(super) async fn append(partition: &Partition, value: &[u8], acks: Acks) -> AppendResult {
    let receiver = send(partition, batch(value, None), acks).await;
    tokio::time::timeout(Duration::from_secs(20), receiver).await.expect("the write gets a result in time").unwrap()
}

/// Returns the bytes of a replica's log from offset `from` on, read from its disk.
pub(super) fn bytes_of(partition: &Partition, from: Offset) -> Vec<u8> {
    let (end, mut at, mut bytes) = (partition.watermarks().log_end, from, Vec::new());
    while at < end {
        let read = partition.log_reader.read_disk(at, end, 1 << 20).unwrap();
        read.chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
        at = read.next;
    }
    bytes
}

/// Waits until both logs end at the same offset, and checks that they hold the same bytes from `from` on.
pub(super) async fn assert_equal_logs(first: &Partition, second: &Partition, from: u64) {
    wait_until("equal ends", || first.watermarks().log_end == second.watermarks().log_end).await;
    assert!(bytes_of(first, at(from)) == bytes_of(second, at(from)), "the logs differ");
}

/// Waits until the replica follows and is in sync.
pub(super) async fn wait_until_in_sync(partition: &Partition) {
    wait_until("the replica is in sync", || {
        matches!(partition.status().role, ReplicaRole::Follower { in_sync: true, .. })
    })
    .await;
}
