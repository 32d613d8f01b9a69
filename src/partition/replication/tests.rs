//! Both sides of a link over channels: connected to each other, or one side to a scripted peer that may violate the
//! protocol.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream::BoxStream};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;

use super::{
    messages::{self, SubscribeRequest},
    *,
};
use crate::{
    cluster::{PartitionValue, Revision},
    log::{DataDir, DataDirIdentity, LogOptions, SimDisk},
    model::{Acks, BrokerId, Compression, ConfigMap, LeaderEpoch, Offset, TopicConfig, TopicId, TopicName},
    partition::{
        AppendResult, MaintenanceQueue, PartitionAssignment, PartitionContext, ReplicaSpec, ReplicationLinks,
        leader::{
            divergence::LogPosition,
            member::{BrokerStatus, PeerId, ReplicaProgress},
        },
    },
    proto::v1::{replicate_request, replicate_response, subscribe_response},
    record::{Batch, BatchBuilder, ChunkedBatches},
    task::{Tasks, lock::Mutex, test_timeout::wait_until},
    telemetry::Counter,
};

mod subscriptions;

const EPOCH: LeaderEpoch = LeaderEpoch(3);
const LEADER: BrokerId = BrokerId(1);
const FOLLOWER: PeerId = PeerId { broker: BrokerId(2), epoch: Revision(20) };

/// One broker's partitions, and its side of one link.
pub(super) struct Side {
    me: BrokerId,
    log: DataDir,
    partitions: Arc<Mutex<BTreeMap<PartitionId, Arc<Partition>>>>,
    pub(super) requests: Arc<LinkRequests>,
    /// Pings the followers of its links.
    probe: Arc<LinkProbe>,
    /// Leader epoch of every partition in the metadata store.
    stored: Arc<Mutex<Option<LeaderEpoch>>>,
    pub(super) tasks: Tasks,
}

/// Links of a broker with one link.
struct TestLinks(Arc<LinkRequests>);

impl ReplicationLinks for TestLinks {
    fn start_following(&self, partition: PartitionId, _leader: BrokerId) {
        self.0.start_following(partition);
    }

    fn subscribe(&self, partition: PartitionId, epoch: LeaderEpoch, position: LogPosition, progress: ReplicaProgress) {
        self.0.subscribe(partition, epoch, position, progress);
    }

    fn retry_later(&self, partition: PartitionId) {
        self.0.retry_later(partition);
    }

    fn unsubscribe(&self, partition: PartitionId, known: LeaderEpoch, stopping: bool) {
        self.0.unsubscribe(partition, known, stopping);
    }
}

fn id(number: u32) -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), number)
}

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

/// Returns a value with the replicas 1 and 2.
fn value(epoch: LeaderEpoch, leader: BrokerId, isr: &[BrokerId]) -> PartitionValue {
    let value = PartitionValue::new(vec![LEADER, FOLLOWER.broker], epoch);
    PartitionValue { leader: Some(leader), isr: isr.to_vec(), ..value }
}

impl Side {
    pub(super) fn new(me: BrokerId) -> Self {
        let identity = DataDirIdentity { cluster: "test".to_owned(), broker: me };
        let options = LogOptions { journal_bytes: 8 << 20, ..LogOptions::default() };
        let log = DataDir::open(Arc::new(SimDisk::new()), Path::new("/data"), &identity, options).unwrap();
        let (requests, probe) = (Arc::default(), Arc::default());
        Self { me, log, partitions: Arc::default(), requests, probe, stored: Arc::default(), tasks: Tasks::new() }
    }

    /// Opens a partition whose leader is broker 1.
    pub(super) async fn open(&self, number: u32, isr: &[BrokerId]) -> Arc<Partition> {
        let config = TopicConfig::resolve(&ConfigMap::new(), &ConfigMap::new()).unwrap();
        let spec = ReplicaSpec {
            id: id(number),
            topic: TopicName::new("events").unwrap(),
            config: Arc::new(config),
            committed: None,
            tier: None,
            standalone: false,
            discard_local: false,
            max_lag_time: Duration::MAX,
        };
        let links = Arc::new(TestLinks(Arc::clone(&self.requests)));
        let ctx = PartitionContext { links, ..PartitionContext::standalone() };
        let queue = MaintenanceQueue::default();
        let partition = Partition::open(self.me, &self.log, spec, ctx, &queue, &self.tasks).unwrap();
        self.partitions.lock().insert(id(number), Arc::clone(&partition));
        self.assign(number, value(EPOCH, LEADER, isr), Revision(1)).await;
        partition
    }

    /// Assigns this value to a partition; both brokers are registered.
    async fn assign(&self, number: u32, value: PartitionValue, revision: Revision) {
        let registered = [(LEADER, Revision(10)), (FOLLOWER.broker, FOLLOWER.epoch)];
        let registered = registered.map(|(id, epoch)| (id, BrokerStatus::Registered(epoch)));
        let value = Arc::new(value);
        let assignment = PartitionAssignment { value, revision, committed: None, registered: registered.into() };
        (self.find())(id(number)).unwrap().assign(assignment).await;
    }

    pub(super) fn find(&self) -> PartitionLookup {
        let partitions = Arc::clone(&self.partitions);
        Arc::new(move |id| partitions.lock().get(&id).cloned())
    }

    /// Runs the leader's side against a scripted peer.
    fn start_leading(&self) -> ScriptedPeer<v1::ReplicateRequest, v1::ReplicateResponse> {
        self.start_throttled_leading(CatchUpThrottle::new(None))
    }

    /// Runs the leader's side against a scripted peer, with a limit on catching up.
    fn start_throttled_leading(
        &self,
        catch_up: CatchUpThrottle,
    ) -> ScriptedPeer<v1::ReplicateRequest, v1::ReplicateResponse> {
        let ((to, incoming), (outgoing, from)) = (mpsc::channel(1), mpsc::channel(1));
        let config = self.sender_config(catch_up);
        let tasks = self.tasks.clone();
        let ended = self
            .tasks
            .spawn("lead", async move { run_sender(config, ReceiverStream::new(incoming), outgoing, &tasks).await });
        ScriptedPeer { to, from: ReceiverStream::new(from).boxed(), ended }
    }

    fn sender_config(&self, catch_up: CatchUpThrottle) -> SenderConfig {
        let (catch_up, probe, sent) = (Arc::new(catch_up), Arc::clone(&self.probe), Counter::default());
        let stored = Arc::clone(&self.stored);
        let stored_epoch: StoredEpoch = Arc::new(move |_| {
            let stored = *stored.lock();
            Box::pin(async move { stored })
        });
        SenderConfig { peer: FOLLOWER, find: self.find(), catch_up, probe, stored_epoch, sent }
    }

    /// Runs the follower's side against a scripted peer.
    fn start_following(&self) -> ScriptedPeer<v1::ReplicateResponse, v1::ReplicateRequest> {
        let ((to, incoming), (outgoing, from)) = (mpsc::channel(1), mpsc::channel(1));
        let (requests, find, tasks) = (Arc::clone(&self.requests), self.find(), self.tasks.clone());
        let ended = self.tasks.spawn("follow", async move {
            run_receiver(&requests, &find, ReceiverStream::new(incoming), outgoing, &Counter::default(), &tasks).await
        });
        ScriptedPeer { to, from: ReceiverStream::new(from).map(Ok).boxed(), ended }
    }
}

/// Scripted peer: the other end of a side's channels.
struct ScriptedPeer<T, F> {
    to: mpsc::Sender<Result<T, Status>>,
    from: BoxStream<'static, Result<F, Status>>,
    /// End of the side under test.
    ended: JoinHandle<LinkEnd>,
}

impl<T, F> ScriptedPeer<T, F> {
    async fn send(&self, message: T) {
        assert!(self.to.send(Ok(message)).await.is_ok(), "the peer receives");
    }

    /// Receives the next message of the side under test.
    async fn receive(&mut self) -> F {
        let received = tokio::time::timeout(Duration::from_secs(20), self.from.next()).await;
        received.expect("a message arrives in time").expect("the link continues").expect("the message is no error")
    }
}

impl ScriptedPeer<v1::ReplicateRequest, v1::ReplicateResponse> {
    /// Sends the subscription of a follower with an empty log.
    async fn subscribe(&self, subscription_id: u32, partition: PartitionId, epoch: LeaderEpoch) {
        let (position, progress) =
            (LogPosition { last_epoch: None, log_end: Offset::ZERO, removal_count: None }, ReplicaProgress::default());
        self.send(messages::subscribe(subscription_id, &SubscribeRequest { partition, epoch, position, progress }))
            .await;
    }

    /// Receives the next message, which must be a response.
    async fn next_response(&mut self) -> v1::SubscribeResponse {
        match self.receive().await.message {
            Some(replicate_response::Message::SubscribeResponse(response)) => response,
            other => panic!("a response is due: {other:?}"),
        }
    }

    /// Receives the next message, which must have batches.
    async fn receive_batches(&mut self) -> Vec<v1::PartitionBatches> {
        match self.receive().await.message {
            Some(replicate_response::Message::Batches(batches)) => batches.partitions,
            other => panic!("batches are due: {other:?}"),
        }
    }
}

impl ScriptedPeer<v1::ReplicateResponse, v1::ReplicateRequest> {
    /// Receives messages up to the next subscription, and returns that.
    async fn next_subscribe(&mut self) -> v1::Subscribe {
        loop {
            if let Some(replicate_request::Message::Subscribe(subscribe)) = self.receive().await.message {
                return subscribe;
            }
        }
    }

    /// Accepts a subscription at its log end.
    async fn accept(&self, subscribe: &v1::Subscribe) {
        self.respond(subscribe.subscription_id, subscribe_response::Outcome::AcceptedAt(subscribe.log_end)).await;
    }

    async fn respond(&self, subscription_id: u32, outcome: subscribe_response::Outcome) {
        let response = v1::SubscribeResponse {
            subscription_id,
            leader_epoch: EPOCH.as_i32(),
            high_watermark: 0,
            outcome: Some(outcome),
        };
        self.send(v1::ReplicateResponse {
            message: Some(replicate_response::Message::SubscribeResponse(response)),
            ..Default::default()
        })
        .await;
    }

    /// Receives the next message, which must be an acknowledgement.
    async fn progress(&mut self) -> v1::Progress {
        match self.receive().await.message {
            Some(replicate_request::Message::Progress(progress)) => progress,
            other => panic!("progress is due: {other:?}"),
        }
    }
}

/// Connects two sides with a link until its tasks are stopped.
fn connect(leader: &Side, follower: &Side) -> Tasks {
    let tasks = Tasks::new();
    let ((replicate_request, at_leader), (replicate_response, at_follower)) = (mpsc::channel(1), mpsc::channel(1));
    let config = leader.sender_config(CatchUpThrottle::new(None));
    let link = tasks.clone();
    tasks.spawn("lead", async move {
        let incoming = ReceiverStream::new(at_leader).map(Ok);
        run_sender(config, incoming, replicate_response, &link).await
    });
    let (requests, find, link) = (Arc::clone(&follower.requests), follower.find(), tasks.clone());
    tasks.spawn("follow", async move {
        run_receiver(&requests, &find, ReceiverStream::new(at_follower), replicate_request, &Counter::default(), &link)
            .await
    });
    tasks
}

fn batch(bytes: usize) -> Batch {
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(1, None, Some(&vec![7; bytes]), &[]).unwrap();
    builder.finish(None).unwrap()
}

async fn append(partition: &Partition, bytes: usize, acks: Acks) -> tokio::sync::oneshot::Receiver<AppendResult> {
    let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
    partition.append(batch(bytes), None, acks, permit).await
}

#[tokio::test(flavor = "multi_thread")]
async fn thousand_partitions_follow_over_one_link_and_the_next() {
    const COUNT: u32 = 1000;
    let (leader, follower) = (Side::new(LEADER), Side::new(FOLLOWER.broker));
    let isr = [LEADER, FOLLOWER.broker];
    let (mut leaders, mut copies) = (Vec::new(), Vec::new());
    for number in 0..COUNT {
        leaders.push(leader.open(number, &isr).await);
        copies.push(follower.open(number, &isr).await);
    }
    for round in 1..=2 {
        let link = connect(&leader, &follower);
        let mut receivers = Vec::new();
        for partition in &leaders {
            receivers.push(append(partition, 100, Acks::All).await);
        }
        for receiver in receivers {
            let acked = tokio::time::timeout(Duration::from_secs(60), receiver)
                .await
                .expect("the write is acknowledged in time");
            assert!(acked.unwrap().is_ok(), "both replicas have the batch");
        }
        for copy in &copies {
            assert_eq!(copy.watermarks().log_end, at(round));
        }
        // The last high watermark arrives although no batches follow it.
        wait_until("all records are committed on the followers", || {
            copies.iter().all(|copy| copy.watermarks().high_watermark == at(round))
        })
        .await;
        link.stop().await;
    }
    for side in [leader, follower] {
        side.tasks.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocked_subscription_keeps_its_window_and_delays_no_other() {
    const BYTES: usize = 256 << 10;
    let side = Side::new(LEADER);
    let mut link = side.start_leading();
    let mut partitions = Vec::new();
    for number in 0..10 {
        partitions.push(side.open(number, &[LEADER]).await);
        link.subscribe(100 + number, id(number), EPOCH).await;
        let response = link.next_response().await;
        assert_eq!(
            (response.subscription_id, response.outcome),
            (100 + number, Some(subscribe_response::Outcome::AcceptedAt(0)))
        );
    }
    for _ in 0..40 {
        append(&partitions[0], BYTES, Acks::Leader).await.await.unwrap().unwrap();
    }
    let mut blocked_bytes = 0;
    for round in 1..=20 {
        for partition in &partitions[1..] {
            append(partition, 10, Acks::Leader).await.await.unwrap().unwrap();
        }
        let mut ends = BTreeMap::new();
        while ends.values().filter(|end| **end == at(round)).count() < 9 {
            for batches_message in link.receive_batches().await {
                let batches: Vec<_> = ChunkedBatches::new(batches_message.chunks).collect::<Result<_, _>>().unwrap();
                let Some(last) = batches.last() else { continue };
                if batches_message.subscription_id == 100 {
                    blocked_bytes += batches.iter().map(Batch::encoded_len).sum::<usize>();
                } else {
                    ends.insert(batches_message.subscription_id, last.end_offset());
                }
            }
        }
        let ends = ends
            .into_iter()
            .map(|(subscription_id, log_end)| (subscription_id, ReplicaProgress { log_end, persisted_end: log_end }));
        link.send(messages::progress(ends)).await;
    }
    assert!(
        (flow_control::MAX_SUBSCRIPTION_BYTES - BYTES..flow_control::MAX_SUBSCRIPTION_BYTES + 2 * BYTES)
            .contains(&blocked_bytes),
        "{blocked_bytes}"
    );
    // The acknowledgement frees space in the window of subscription 100.
    let progress = ReplicaProgress { log_end: at(8), persisted_end: at(0) };
    link.send(messages::progress([(100, progress)])).await;
    let batches_message = loop {
        if let Some(batches_message) =
            link.receive_batches().await.into_iter().find(|batches_message| !batches_message.chunks.is_empty())
        {
            break batches_message;
        }
    };
    assert_eq!(batches_message.subscription_id, 100);
    side.tasks.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_follower_message_gets_an_error() {
    let subscribe = |topic_id: &str, partition: i32, epoch: i32, end: i64, persisted: i64| {
        let (topic_id, last_epoch) = (topic_id.to_owned(), None);
        let message = v1::Subscribe {
            subscription_id: 1,
            topic_id,
            partition,
            leader_epoch: epoch,
            last_epoch,
            log_end: end,
            persisted_end: persisted,
            removal_count: None,
        };
        replicate_request::Message::Subscribe(message)
    };
    let topic = id(0).topic.to_string();
    let rejected = [
        (subscribe("no id", 0, 3, 0, 0), "topic id \"no id\" is no UUID"),
        (subscribe(&topic, -1, 3, 0, 0), "a partition number is -1"),
        (subscribe(&topic, 0, -3, 0, 0), "a leader epoch is -3"),
        (subscribe(&topic, 0, 3, -1, -1), "a log end is -1"),
        (subscribe(&topic, 0, 3, 0, 5), "a persisted end above the log end is 5"),
        (subscribe(&topic, 99, 3, 0, 0), "has no open replica of partition"),
        (subscribe(&topic, 0, 2, 0, 0), "epoch 3, not in 2"),
    ];
    for (message, text) in rejected {
        let side = Side::new(LEADER);
        side.open(0, &[LEADER]).await;
        let mut link = side.start_leading();
        link.send(v1::ReplicateRequest { message: Some(message), ..Default::default() }).await;
        let response = link.next_response().await;
        let Some(subscribe_response::Outcome::Error(error)) = response.outcome else { panic!("{text}: {response:?}") };
        assert!(error.message.contains(text), "{text}: {}", error.message);
        // The link continues after the invalid message.
        link.subscribe(2, id(0), EPOCH).await;
        assert_eq!(link.next_response().await.outcome, Some(subscribe_response::Outcome::AcceptedAt(0)), "{text}");
        // An acknowledgement of records that were never sent ends that subscription, and only it.
        link.send(messages::progress([(2, ReplicaProgress { log_end: at(7), persisted_end: at(0) })])).await;
        let response = link.next_response().await;
        assert!(matches!(response.outcome, Some(subscribe_response::Outcome::Error(_))), "{response:?}");
        side.tasks.stop().await;
    }
    let progress = |ids: &[u32], written: &[i64]| v1::Progress {
        subscription_id: ids.to_vec(),
        log_end: written.to_vec(),
        persisted_end: written.to_vec(),
    };
    let link_errors = [
        (None, "message of an unexpected kind"),
        (Some(replicate_request::Message::Hello(v1::Hello::default())), "message of an unexpected kind"),
        (Some(replicate_request::Message::Progress(progress(&[1, 2], &[5]))), "have 2, 1 and 1 entries"),
        (Some(replicate_request::Message::Progress(progress(&[1], &[-5]))), "a log end is -5"),
        (Some(subscribe(&topic, 0, 3, 0, 0)), "a subscription id in use is 1"),
    ];
    for (message, text) in link_errors {
        let side = Side::new(LEADER);
        side.open(0, &[LEADER]).await;
        let mut link = side.start_leading();
        link.subscribe(1, id(0), EPOCH).await;
        link.next_response().await;
        link.send(v1::ReplicateRequest { message, ..Default::default() }).await;
        let ended = link.ended.await.unwrap();
        let LinkEnd::Bad(error) = ended else { panic!("{text}: {ended:?}") };
        assert!(error.message.contains(text), "{text}: {error}");
        side.tasks.stop().await;
    }
}

/// Returns a message with one batch of the current epoch, at offset `base`.
fn partition_batches(subscription_id: u32, base: u64) -> v1::PartitionBatches {
    let mut batch = batch(10);
    batch.set_offset_and_epoch(at(base), EPOCH);
    let chunks = vec![batch.header().to_vec().into(), batch.records_bytes().clone()];
    v1::PartitionBatches {
        subscription_id,
        leader_epoch: EPOCH.as_i32(),
        base: at(base).as_i64(),
        high_watermark: 0,
        chunks,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_leader_message_causes_a_new_subscription() {
    let corrupt = |mut message: v1::PartitionBatches| {
        let mut records = message.chunks[1].to_vec();
        records[3] ^= 1;
        message.chunks[1] = records.into();
        message
    };
    type MakeBatches = Box<dyn Fn(u32) -> v1::PartitionBatches>;
    let cases: [(&str, MakeBatches); 5] = [
        ("corrupt", Box::new(move |subscription_id| corrupt(partition_batches(subscription_id, 1)))),
        (
            "truncated",
            Box::new(|subscription_id| v1::PartitionBatches {
                chunks: partition_batches(subscription_id, 1).chunks[..1].to_vec(),
                ..partition_batches(subscription_id, 1)
            }),
        ),
        (
            "another epoch",
            Box::new(|subscription_id| v1::PartitionBatches {
                leader_epoch: 4,
                ..partition_batches(subscription_id, 1)
            }),
        ),
        (
            "an invalid high watermark",
            Box::new(|subscription_id| v1::PartitionBatches {
                high_watermark: -1,
                ..partition_batches(subscription_id, 1)
            }),
        ),
        // The partition detects the gap; the link does not compare offsets.
        ("a gap", Box::new(|subscription_id| partition_batches(subscription_id, 5))),
    ];
    for (case, make_invalid) in cases {
        let side = Side::new(FOLLOWER.broker);
        let [copy, other] = [side.open(0, &[LEADER]).await, side.open(1, &[LEADER]).await];
        let mut link = side.start_following();
        let mut subscriptions = [link.next_subscribe().await, link.next_subscribe().await];
        // Each partition subscribes from its own task, so the subscriptions arrive in any order.
        subscriptions.sort_by_key(|subscription| subscription.partition);
        let [first, second] = subscriptions;
        link.accept(&first).await;
        link.accept(&second).await;
        link.send(messages::batches(vec![
            partition_batches(first.subscription_id, 0),
            partition_batches(second.subscription_id, 0),
        ]))
        .await;
        wait_until("both replicas have the batch", || {
            copy.watermarks().log_end == at(1) && other.watermarks().log_end == at(1)
        })
        .await;

        link.send(messages::batches(vec![
            make_invalid(first.subscription_id),
            partition_batches(second.subscription_id, 1),
        ]))
        .await;
        let next = link.next_subscribe().await;
        assert_eq!((next.partition, next.log_end), (first.partition, 1), "{case}");
        assert!(
            next.subscription_id > first.subscription_id.max(second.subscription_id),
            "{case}: a subscription with an earlier number would accept late messages"
        );
        link.accept(&next).await;
        // Late messages for the earlier subscription are dropped.
        link.send(messages::batches(vec![
            partition_batches(first.subscription_id, 0),
            partition_batches(next.subscription_id, 1),
            partition_batches(second.subscription_id, 2),
        ]))
        .await;
        wait_until("both replicas have the batch", || {
            copy.watermarks().log_end == at(2) && other.watermarks().log_end == at(3)
        })
        .await;
        drop(link);
        side.tasks.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unexpected_responses_change_nothing() {
    let side = Side::new(FOLLOWER.broker);
    let copy = side.open(0, &[LEADER]).await;
    let mut link = side.start_following();
    let mut subscribe = link.next_subscribe().await;
    let rejected = || v1::Error { message: "not now".to_owned(), ..v1::Error::default() };
    for outcome in [
        // The follower's log end is 0, so none of these outcomes lets it append.
        subscribe_response::Outcome::AcceptedAt(5),
        subscribe_response::Outcome::AcceptedAt(-1),
        subscribe_response::Outcome::Diverged(v1::Diverged { epoch: -1, end: 0 }),
        subscribe_response::Outcome::Diverged(v1::Diverged { epoch: 1, end: 4 }),
        subscribe_response::Outcome::Bootstrap(v1::Bootstrap { start_offset: -4, ..v1::Bootstrap::default() }),
        subscribe_response::Outcome::Bootstrap(v1::Bootstrap {
            start_offset: 4,
            epochs: vec![v1::EpochStart { epoch: 2, start: 3 }, v1::EpochStart { epoch: 1, start: 0 }],
            ..v1::Bootstrap::default()
        }),
        subscribe_response::Outcome::Error(rejected()),
    ] {
        let case = format!("{outcome:?}");
        link.respond(subscribe.subscription_id, outcome).await;
        // These batches follow no accepting response.
        link.send(messages::batches(vec![partition_batches(subscribe.subscription_id, 0)])).await;
        let next = link.next_subscribe().await;
        assert_eq!((next.log_end, copy.watermarks().log_end), (0, at(0)), "{case}");
        subscribe = next;
    }
    link.accept(&subscribe).await;
    link.respond(subscribe.subscription_id, subscribe_response::Outcome::Error(rejected())).await;
    let next = link.next_subscribe().await;
    assert!(next.subscription_id > subscribe.subscription_id, "a leader may end a subscription that it accepted");
    // A message of an unexpected kind ends the link.
    link.send(v1::ReplicateResponse::default()).await;
    assert!(matches!(link.ended.await.unwrap(), LinkEnd::Bad(_)));
    side.tasks.stop().await;
}

/// The leader counts an acknowledgement for the epoch of the subscription. The progress of a replica under another
/// leader must not be sent to the first leader.
#[tokio::test(flavor = "multi_thread")]
async fn unsubscribed_partition_acknowledges_nothing() {
    let side = Side::new(FOLLOWER.broker);
    let copy = side.open(0, &[LEADER]).await;
    let mut link = side.start_following();
    let subscribe = link.next_subscribe().await;
    link.accept(&subscribe).await;
    assert_eq!(link.progress().await.log_end, [0], "the progress is acknowledged at once");
    link.send(messages::batches(vec![partition_batches(subscribe.subscription_id, 0)])).await;
    while link.progress().await.persisted_end != [1] {}

    let next = LeaderEpoch(EPOCH.0 + 1);
    side.requests.unsubscribe(id(0), next, false);
    // If these late batches were appended, the progress of the copy would move.
    link.send(messages::batches(vec![partition_batches(subscribe.subscription_id, 1)])).await;
    let Some(replicate_request::Message::Unsubscribe(unsubscribe)) = link.receive().await.message else {
        panic!("an unsubscription is due")
    };
    assert_eq!(
        (unsubscribe.subscription_id, unsubscribe.known_epoch, unsubscribe.stopping),
        (subscribe.subscription_id, next.as_i32(), false)
    );
    side.requests.start_following(id(0));
    let subscribe = link.next_subscribe().await;
    assert_eq!((subscribe.log_end, copy.watermarks().log_end), (1, at(1)), "late batches are dropped");
    // An unsubscription while the broker stops is delivered.
    side.requests.unsubscribe(id(0), next, true);
    side.tasks.cancel();
    let Some(replicate_request::Message::Unsubscribe(unsubscribe)) = link.receive().await.message else {
        panic!("an unsubscription is due")
    };
    assert!(unsubscribe.stopping);
    assert!(link.from.next().await.is_none(), "no message follows the unsubscription");
    drop(link);
    side.tasks.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn moved_high_watermark_is_sent_without_batches() {
    let side = Side::new(LEADER);
    let partition = side.open(0, &[LEADER, FOLLOWER.broker]).await;
    let mut link = side.start_leading();
    link.subscribe(1, id(0), EPOCH).await;
    assert_eq!(link.next_response().await.outcome, Some(subscribe_response::Outcome::AcceptedAt(0)));
    link.send(messages::progress([(1, ReplicaProgress::default())])).await;
    let acked = append(&partition, 10, Acks::All).await;
    let sent = link.receive_batches().await;
    assert_eq!((sent.len(), sent[0].high_watermark), (1, 0));
    link.send(messages::progress([(1, ReplicaProgress { log_end: at(1), persisted_end: at(1) })])).await;
    acked.await.unwrap().unwrap();
    let sent = link.receive_batches().await;
    assert_eq!((sent.len(), sent[0].high_watermark, sent[0].chunks.len()), (1, 1, 0));
    side.tasks.stop().await;
}

/// Every commit waits for the in-sync followers, so the catch-up limit applies only to followers outside the ISR.
#[tokio::test(start_paused = true)]
async fn in_sync_follower_is_not_throttled_by_catch_up_limit() {
    for (isr, is_throttled) in [(&[LEADER, FOLLOWER.broker][..], false), (&[LEADER], true)] {
        let side = Side::new(LEADER);
        let partition = side.open(0, isr).await;
        let _pending = append(&partition, 10, Acks::All).await;
        let overdrawn = CatchUpThrottle::new(Some(1));
        overdrawn.take(1 << 20);
        let mut link = side.start_throttled_leading(overdrawn);
        link.subscribe(1, id(0), EPOCH).await;
        assert_eq!(link.next_response().await.outcome, Some(subscribe_response::Outcome::AcceptedAt(0)));
        let batches = tokio::time::timeout(Duration::from_secs(5), link.receive_batches()).await;
        assert_eq!(batches.is_err(), is_throttled, "{isr:?}");
        side.tasks.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn follower_that_reads_no_responses_is_blocked() {
    let side = Side::new(LEADER);
    let mut link = side.start_leading();
    let mut sent = 0;
    // The paused clock moves only when no task has work, so the timeout means that the leader's side receives nothing
    // more.
    let send_all = async {
        while sent < 100_000 {
            link.subscribe(sent, id(99), EPOCH).await;
            sent += 1;
        }
    };
    tokio::time::timeout(Duration::from_secs(1), send_all).await.expect_err("the leader's side is blocked");
    let max = u32::try_from(sender::MAX_QUEUED_RESPONSES).unwrap() + 4;
    assert!((max - 4..=max).contains(&sent), "{sent} subscriptions were received");
    // The link continues when its responses are read.
    for subscription_id in 0..sent {
        assert_eq!(link.next_response().await.subscription_id, subscription_id);
    }
    link.subscribe(sent, id(99), EPOCH).await;
    assert_eq!(link.next_response().await.subscription_id, sent);
    side.tasks.stop().await;
}
