//! Brokers of one partition in one process: each has its own disk, the metadata store is a real one, and the network
//! between the brokers can be cut. This file makes no decision: links carry messages, and ISR updates are
//! compare-and-sets.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::sync::oneshot;

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::partition::*;
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
    cut: BTreeSet<(BrokerId, BrokerId)>,
    /// Brokers that receive no metadata.
    blind: BTreeSet<BrokerId>,
    /// Number of outcomes of proposals that are still to be lost.
    lost_outcomes: usize,
    /// True if proposals that admit a member are refused.
    refuse_admissions: bool,
    /// Proposals that were made.
    proposals: Vec<IsrProposal>,
    resigned: Vec<(BrokerId, LeaderEpoch)>,
}

pub(super) struct Node {
    pub(super) disk: SimDisk,
    pub(super) log: DataDir,
    pub(super) epoch: Revision,
    pub(super) queue: MaintenanceQueue,
    pub(super) tasks: Tasks,
    partition: Option<Arc<Partition>>,
    follows: Option<BrokerId>,
    /// Number of its link's last subscription, and the wake set of the task that serves it.
    subscription: u64,
    ready: Arc<WakeSet>,
}

/// One broker's side of the links and of the ISR updates.
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
                ready: Arc::default(),
            };
            net.state.lock().nodes.insert(BrokerId(number), node);
        }
        Arc::new(net)
    }

    /// Reads, or changes, one broker's state.
    pub(super) fn node<T>(&self, of: u32, look: impl FnOnce(&mut Node) -> T) -> T {
        look(self.state.lock().nodes.get_mut(&BrokerId(of)).unwrap())
    }

    /// Opens the replica of a broker, and assigns the stored value.
    pub(super) async fn start(
        self: &Arc<Self>,
        of: u32,
        config: &[(&str, &str)],
        discard_local: bool,
    ) -> Arc<Partition> {
        let partition = self.open(of, config, discard_local).await.unwrap();
        self.spread().await;
        partition
    }

    pub(super) async fn open(
        self: &Arc<Self>,
        of: u32,
        config: &[(&str, &str)],
        discard_local: bool,
    ) -> Result<Arc<Partition>, PartitionError> {
        let overrides: ConfigMap = config.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let minimum: ConfigMap = [("min.insync.replicas".to_owned(), self.min_insync.to_string())].into();
        let committed = self.committed().await;
        let tier = self.object_store.clone().map(|store| {
            let cache = ChunkCache::open(&ChunkCacheOptions::default(), &Metrics::new()).unwrap();
            PartitionTier::new(store, cache, self.id, committed.clone().unwrap_or_default())
        });
        let spec = ReplicaSpec {
            id: self.id,
            topic: TopicName::new("events").unwrap(),
            config: Arc::new(TopicConfig::resolve(&minimum, &overrides).unwrap()),
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

    /// Stops the replica of a broker. Its followers find their links ended.
    pub(super) async fn stop(&self, of: u32) {
        let (partition, followers) = {
            let mut world = self.state.lock();
            let node = world.nodes.get_mut(&BrokerId(of)).unwrap();
            node.subscription += 1;
            let partition = node.partition.take();
            (partition, world.nodes.values().map(|node| Arc::clone(&node.ready)).collect::<Vec<_>>())
        };
        if let Some(partition) = partition {
            partition.stop().await;
        }
        followers.iter().for_each(|ready| ready.mark(2));
    }

    fn partition(&self, of: BrokerId) -> Option<Arc<Partition>> {
        self.state.lock().nodes[&of].partition.clone()
    }

    /// Returns the stored value.
    pub(super) async fn value(&self) -> (PartitionValue, Revision) {
        let key = self.keys.partition(self.id);
        let entry = self.store.get(&key).await.unwrap().entry.unwrap();
        (PartitionValue::decode(&key, &entry.value).unwrap(), entry.mod_revision)
    }

    pub(super) async fn committed(&self) -> Option<TierState> {
        let key = self.keys.tier(self.id);
        let entry = self.store.get(&key).await.unwrap().entry?;
        Some(TierState::decode(&key, &entry.value).unwrap())
    }

    /// Writes any value, as an election or an operator does, and assigns it to all brokers that receive metadata.
    pub(super) async fn change(&self, change: impl Fn(&PartitionValue) -> PartitionValue) -> PartitionValue {
        loop {
            let (value, revision) = self.value().await;
            let new = change(&value);
            if self.set(revision, &new).await.is_ok() {
                self.spread().await;
                return new;
            }
        }
    }

    async fn set(&self, expect: Revision, value: &PartitionValue) -> Result<Revision, ()> {
        let key = self.keys.partition(self.id);
        let when = Compare::ModRevision(key.clone(), expect);
        match self.store.transact(Transaction::new().when(when).put(key, value.encode())).await.unwrap() {
            TxnOutcome::Committed { revision } => Ok(revision),
            TxnOutcome::CompareFailed { .. } => Err(()),
        }
    }

    /// Elects a leader cleanly; the brokers of `dead` are offline.
    pub(super) async fn elect(&self, to: u32, dead: &[u32]) {
        let dead: BTreeSet<BrokerId> = dead.iter().map(|id| BrokerId(*id)).collect();
        let min_insync = self.min_insync;
        self.change(move |value| {
            value.elect(BrokerId(to), |id| !dead.contains(&id), min_insync).expect("the broker can be elected")
        })
        .await;
    }

    /// Assigns the stored value to all brokers that receive metadata.
    pub(super) async fn spread(&self) {
        let (value, revision) = self.value().await;
        let committed = self.committed().await;
        let (value, mut receivers) = (Arc::new(value), Vec::new());
        let registered = {
            let world = self.state.lock();
            for (id, node) in &world.nodes {
                if let Some(partition) = node.partition.as_ref().filter(|_| !world.blind.contains(id)) {
                    receivers.push(Arc::clone(partition));
                }
            }
            world.nodes.iter().map(|(id, node)| (*id, BrokerStatus::Registered(node.epoch))).collect::<BTreeMap<_, _>>()
        };
        for partition in receivers {
            let (value, committed, registered) = (Arc::clone(&value), committed.clone(), registered.clone());
            partition.assign(PartitionAssignment { value, revision, committed, registered }).await;
        }
    }

    /// Stops the metadata of this broker, or resumes it.
    pub(super) async fn set_blind(&self, of: u32, blind: bool) {
        {
            let mut world = self.state.lock();
            if blind {
                world.blind.insert(BrokerId(of))
            } else {
                world.blind.remove(&BrokerId(of))
            };
        }
        self.spread().await;
    }

    /// Cuts the connection between two brokers.
    pub(super) fn cut(&self, one: u32, other: u32) {
        let mut world = self.state.lock();
        world.cut.insert(pair(BrokerId(one), BrokerId(other)));
        world.nodes.values().for_each(|node| node.ready.mark(2));
    }

    /// Restores the connection between two brokers; their links connect again.
    pub(super) fn heal(self: &Arc<Self>, one: u32, other: u32) {
        self.state.lock().cut.remove(&pair(BrokerId(one), BrokerId(other)));
        for me in [one, other] {
            self.notify_connected(BrokerId(me), Duration::ZERO);
        }
    }

    /// Loses the outcomes of the next proposals, which are written all the same.
    pub(super) fn lose_outcomes(&self, count: usize) {
        self.state.lock().lost_outcomes = count;
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
    pub(super) async fn settle(&self, of: u32) {
        let partition = self.partition(BrokerId(of)).unwrap();
        let maintenance = MaintenanceRunner::new(TierCommits::new(Arc::new(self.store.clone()), self.keys.clone()));
        while maintenance.step(&partition).await.unwrap().more {}
        partition.describe_segments().await.unwrap();
        self.spread().await;
    }

    fn reach(&self, me: BrokerId, other: BrokerId) -> bool {
        let world = self.state.lock();
        !world.cut.contains(&pair(me, other)) && world.nodes[&other].partition.is_some()
    }

    fn notify_connected(self: &Arc<Self>, me: BrokerId, after: Duration) {
        let net = Arc::clone(self);
        self.tasks.spawn("up", async move {
            tokio::time::sleep(after).await;
            let (follows, partition) = net.node(me.0, |node| (node.follows, node.partition.clone()));
            if let (Some(leader), Some(partition)) = (follows, partition)
                && net.reach(me, leader)
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
        ready: Arc<WakeSet>,
        request: (LeaderEpoch, LogPosition, ReplicaProgress),
    ) {
        let (epoch, position, progress) = request;
        let (leader, follower, broker_epoch) =
            self.node(me.0, |node| (node.follows, node.partition.clone(), node.epoch));
        let (Some(leader), Some(follower)) = (leader, follower) else { return };
        let Some(leading) = self.partition(leader).filter(|_| self.reach(me, leader)) else { return };
        let peer = PeerId { broker: me, epoch: broker_epoch };
        let response = leading.subscribe(peer, epoch, position, progress).await;
        let is_current = || self.node(me.0, |node| node.subscription == subscription) && self.reach(me, leader);
        if !is_current() {
            // A broker that stopped meanwhile reported that before this request arrived: the subscription must not be
            // the last event.
            if self.partition(me).is_none() {
                leading.on_follower_disconnected(peer, DisconnectCause::ShuttingDown).await;
            }
            return;
        }
        follower.on_link_event(LinkEvent::Response(response.clone())).unwrap();
        let SubscribeOutcome::Accepted(mut from) = response.outcome else { return };
        let (tail, mut sent_high_watermark) = (leading.tail(), response.high_watermark);
        leading.add_listener(&ready, 0, WatermarkKind::LogEnd);
        leading.add_listener(&ready, 0, WatermarkKind::HighWatermark);
        follower.add_listener(&ready, 1, WatermarkKind::AnyEnd);
        while is_current() && tail.epoch() == response.epoch {
            ready.wait_for_index().await;
            let index = ready.take();
            if !is_current() {
                break;
            }
            if index == Some(1) {
                leading.acknowledged(peer, epoch, follower.progress());
                continue;
            }
            let Ok(batches) = read(&tail, &mut from).await else { break };
            let high_watermark = tail.progress().1;
            if !batches.is_empty() || high_watermark != sent_high_watermark {
                sent_high_watermark = high_watermark;
                follower.on_link_event(LinkEvent::Batches { epoch: response.epoch, high_watermark, batches }).unwrap();
            }
        }
        // A replaced subscription was ended by its follower's own request.
        if self.node(me.0, |node| node.subscription == subscription) {
            leading.on_follower_disconnected(peer, DisconnectCause::LinkLost).await;
            follower.on_link_event(LinkEvent::Disconnected).unwrap();
            self.notify_connected(me, Duration::from_millis(10));
        }
    }
}

/// Reads all batches from `from` to the leader's log end.
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

fn pair(one: BrokerId, other: BrokerId) -> (BrokerId, BrokerId) {
    (one.min(other), one.max(other))
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
        let (subscription, ready) = self.net.node(self.me.0, |node| {
            node.subscription += 1;
            // Ends the task of the subscription before.
            node.ready.mark(2);
            node.ready = Arc::default();
            (node.subscription, Arc::clone(&node.ready))
        });
        self.net
            .tasks
            .spawn("link", Arc::clone(&self.net).serve(self.me, subscription, ready, (epoch, position, progress)));
    }

    fn retry_later(&self, _: PartitionId) {
        self.net.notify_connected(self.me, Duration::from_millis(5));
    }

    fn unsubscribe(&self, _: PartitionId, known: LeaderEpoch, stopping: bool) {
        let (followed, epoch) = self.net.node(self.me.0, |node| {
            node.subscription += 1;
            node.ready.mark(2);
            (node.follows.take(), node.epoch)
        });
        let Some(leader) = followed.filter(|leader| self.net.reach(self.me, *leader)) else { return };
        let (net, peer) = (Arc::clone(&self.net), PeerId { broker: self.me, epoch });
        self.net.tasks.spawn("leave", async move {
            let Some(leading) = net.partition(leader) else { return };
            if known > leading.epoch() {
                leading.deposed(known).await;
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
            let admitted = !is_refused && proposal.added.iter().all(is_current);
            let done = if admitted { net.set(proposal.expect, &proposal.value).await } else { Err(()) };
            let lost = {
                let mut world = net.state.lock();
                let lost = world.lost_outcomes > 0;
                world.lost_outcomes = world.lost_outcomes.saturating_sub(1);
                lost
            };
            let outcome = match done {
                _ if lost => ProposalOutcome::Unknown,
                Ok(revision) => ProposalOutcome::Committed(revision),
                Err(()) => {
                    let (value, revision) = net.value().await;
                    ProposalOutcome::CurrentValue(value, revision)
                }
            };
            if let Some(partition) = net.partition(me) {
                partition.on_isr_outcome(outcome).await;
            }
            if !lost {
                net.spread().await;
            }
        });
    }

    fn read_back(&self, _: PartitionId) {
        let (me, net) = (self.me, Arc::clone(&self.net));
        self.net.tasks.spawn("read back", async move {
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

/// Returns a batch of one record. A producer's retry has the same bytes.
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

/// Queues a write of a batch that a broker made of a request.
pub(super) async fn send_as(
    partition: &Partition,
    batch: Batch,
    sent: Option<Fingerprint>,
    acks: Acks,
) -> oneshot::Receiver<AppendResult> {
    let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
    partition.append(batch, sent, acks, permit).await
}

/// Sends the time when everything before it was handled, and returns when the task has handled it.
pub(super) async fn tick(partition: &Partition, now_ms: u64) {
    // Older than every known value.
    let nothing = || {
        let (value, revision) = (Arc::new(PartitionValue::new(vec![broker(1)], LeaderEpoch(0))), Revision::ZERO);
        PartitionAssignment { value, revision, committed: None, registered: BTreeMap::new() }
    };
    partition.assign(nothing()).await;
    partition.tick(now_ms);
    partition.assign(nothing()).await;
}

pub(super) async fn append(partition: &Partition, value: &[u8], acks: Acks) -> AppendResult {
    let receiver = send(partition, batch(value, None), acks).await;
    tokio::time::timeout(Duration::from_secs(20), receiver).await.expect("the write gets a result in time").unwrap()
}

/// Returns the bytes of a replica's disk, from `from` on.
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
pub(super) async fn equal(one: &Partition, other: &Partition, from: u64) {
    wait_until("equal ends", || one.watermarks().log_end == other.watermarks().log_end).await;
    assert!(bytes_of(one, at(from)) == bytes_of(other, at(from)), "the logs differ");
}

/// Waits until the replica follows and is in sync.
pub(super) async fn in_sync(partition: &Partition) {
    wait_until("the replica is in sync", || {
        matches!(partition.status().role, ReplicaRole::Follower { in_sync: true, .. })
    })
    .await;
}
