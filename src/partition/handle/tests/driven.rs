//! The task of one partition, driven by the test. A list of its requests replaces its links and its ISR updater.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;

use crate::{
    cluster::{PartitionValue, Revision},
    log::{DataDir, DataDirIdentity, LogOptions, SimDisk},
    model::{Acks, BrokerId, ConfigMap, LeaderEpoch, PartitionId, TopicConfig, TopicId, TopicName},
    partition::{
        handle::COMMAND_QUEUE_LEN,
        handle::tests::net::{append, at, batch, broker, send, tick},
        leader::{
            divergence::{LogPosition, SubscribeError},
            isr::{IsrProposal, ProposalOutcome},
            member::{BrokerStatus, DisconnectCause, PeerId, ReplicaProgress},
        },
        *,
    },
    record::Batch,
    task::{
        Tasks,
        lock::Mutex,
        mutation::{self, Mutation},
        test_timeout::wait_until,
    },
};

/// Request of a partition's task to its links or to its ISR updater.
#[derive(Clone, Debug, PartialEq)]
enum TaskRequest {
    Follow(BrokerId),
    Subscribe(LeaderEpoch, LogPosition, ReplicaProgress),
    RetryLater,
    /// Epoch of the applied value, and true if the partition is being stopped.
    Unsubscribe(LeaderEpoch, bool),
    Propose(IsrProposal),
    ReadBack,
    Resign(LeaderEpoch),
}

/// Requests of the task that the test has not taken yet, in order.
#[derive(Default)]
struct RequestLog(Mutex<Vec<TaskRequest>>);

impl RequestLog {
    fn add(&self, request: TaskRequest) {
        self.0.lock().push(request);
    }

    /// Returns the requests since the last call, and removes them.
    fn take(&self) -> Vec<TaskRequest> {
        std::mem::take(&mut *self.0.lock())
    }
}

impl ReplicationLinks for RequestLog {
    fn start_following(&self, _: PartitionId, leader: BrokerId) {
        self.add(TaskRequest::Follow(leader));
    }

    fn subscribe(&self, _: PartitionId, epoch: LeaderEpoch, position: LogPosition, progress: ReplicaProgress) {
        self.add(TaskRequest::Subscribe(epoch, position, progress));
    }

    fn retry_later(&self, _: PartitionId) {
        self.add(TaskRequest::RetryLater);
    }

    fn unsubscribe(&self, _: PartitionId, known: LeaderEpoch, stopping: bool) {
        self.add(TaskRequest::Unsubscribe(known, stopping));
    }
}

impl IsrUpdater for RequestLog {
    fn propose(&self, _: PartitionId, proposal: IsrProposal) {
        self.add(TaskRequest::Propose(proposal));
    }

    fn read_back(&self, _: PartitionId) {
        self.add(TaskRequest::ReadBack);
    }

    fn resign(&self, _: PartitionId, epoch: LeaderEpoch) {
        self.add(TaskRequest::Resign(epoch));
    }
}

/// Opens broker 1's replica of a partition with three replicas. The caller must keep the data directory open as long as
/// the replica is written to.
fn open() -> (Arc<Partition>, Arc<RequestLog>, DataDir) {
    open_on(SimDisk::new())
}

/// Opens the replica as [`open`] does, on this disk.
fn open_on(disk: SimDisk) -> (Arc<Partition>, Arc<RequestLog>, DataDir) {
    let identity = DataDirIdentity { cluster: "test".to_owned(), broker: broker(1) };
    let options = LogOptions { journal_bytes: 1 << 20, reserve_bytes: 0, ..LogOptions::default() };
    let log = DataDir::open(Arc::new(disk), Path::new("/data"), &identity, options).unwrap();
    let spec = ReplicaSpec {
        id: PartitionId::new(TopicId::from_bytes([5; 16]), 0),
        topic: TopicName::new("events").unwrap(),
        config: Arc::new(TopicConfig::resolve(&ConfigMap::new(), &ConfigMap::new()).unwrap()),
        committed: None,
        tier: None,
        standalone: false,
        discard_local: false,
        max_lag_time: Duration::from_secs(10),
    };
    let requests = Arc::new(RequestLog::default());
    let ctx =
        PartitionContext { links: requests.clone(), isr_updater: requests.clone(), ..PartitionContext::standalone() };
    let queue = MaintenanceQueue::default();
    (Partition::open(broker(1), &log, spec, ctx, &queue, &Tasks::new()).unwrap(), requests, log)
}

/// Returns the value of a partition with replicas on brokers 1 to 3, all in the ISR.
fn value(leader: Option<u32>, epoch: u32) -> PartitionValue {
    let value = PartitionValue::new([1, 2, 3].map(broker).to_vec(), LeaderEpoch(epoch));
    PartitionValue { leader: leader.map(broker), ..value }
}

/// Assigns a value to broker 1. Brokers 2 and 3 are registered.
async fn assign(partition: &Partition, value: PartitionValue, revision: u64) {
    let running = |number| (broker(number), BrokerStatus::Registered(Revision(100 + u64::from(number))));
    let registered = [running(2), running(3)].into();
    let assignment =
        PartitionAssignment { value: Arc::new(value), revision: Revision(revision), committed: None, registered };
    partition.assign(assignment).await;
}

/// Returns the broker id and broker epoch of a follower.
fn peer(number: u32) -> PeerId {
    PeerId { broker: broker(number), epoch: Revision(100 + u64::from(number)) }
}

/// Returns the batch at offset `base` that a leader appended in `epoch`.
fn leader_batch(base: u64, epoch: u32) -> Batch {
    let mut batch = batch(b"x", None);
    batch.set_offset_and_epoch(at(base), LeaderEpoch(epoch));
    batch
}

fn batches_event(epoch: u32, high_watermark: u64, batches: Vec<Batch>) -> LinkEvent {
    LinkEvent::Batches { epoch: LeaderEpoch(epoch), high_watermark: at(high_watermark), batches }
}

fn response_event(epoch: u32, outcome: SubscribeOutcome) -> LinkEvent {
    LinkEvent::Response(SubscribeResponse { epoch: LeaderEpoch(epoch), high_watermark: at(0), outcome, in_sync: false })
}

/// Delivers link events, and returns when the task has handled them.
async fn deliver(partition: &Partition, events: impl IntoIterator<Item = LinkEvent>) {
    for event in events {
        partition.on_link_event(event).unwrap();
    }
    // The task handles these messages after the events, because they are in the same queue.
    partition.on_broker_status(broker(9), BrokerStatus::Unregistered).await;
    assign_stale(partition).await;
}

/// Sends stale metadata, and returns when the task has handled all earlier messages.
async fn assign_stale(partition: &Partition) {
    assign(partition, value(None, 0), 0).await;
}

/// Returns the request to subscribe in `epoch` with a log that ends at `end`, durably, with a batch of epoch `last`.
fn subscribed(epoch: u32, last: Option<u32>, end: u64) -> TaskRequest {
    let position = LogPosition { last_epoch: last.map(LeaderEpoch), log_end: at(end), removal_count: None };
    TaskRequest::Subscribe(LeaderEpoch(epoch), position, ReplicaProgress { log_end: at(end), persisted_end: at(end) })
}

#[tokio::test]
async fn follower_copies_and_rejects_batches_that_do_not_fit() {
    let (partition, requests, _log) = open();
    assign(&partition, value(Some(2), 4), 10).await;
    deliver(&partition, [LinkEvent::Connected]).await;
    assert_eq!(requests.take(), [TaskRequest::Follow(broker(2)), subscribed(4, None, 0)]);

    // Batches that arrive before the response to the subscription are ignored, and the follower does not subscribe
    // again.
    deliver(&partition, [batches_event(4, 0, vec![leader_batch(0, 4)])]).await;
    deliver(
        &partition,
        [
            response_event(4, SubscribeOutcome::Accepted(at(0))),
            batches_event(4, 1, vec![leader_batch(0, 3), leader_batch(1, 4)]),
        ],
    )
    .await;
    assert_eq!((partition.watermarks().log_end, partition.watermarks().high_watermark), (at(2), at(1)));
    wait_until("the batches are durable", || partition.progress().persisted_end == at(2)).await;
    assert_eq!(partition.status().role, ReplicaRole::Follower { leader: broker(2), in_sync: true });
    assert_eq!(requests.take(), []);

    // A late batch of an earlier epoch changes nothing.
    deliver(&partition, [batches_event(3, 2, vec![leader_batch(2, 3)])]).await;
    assert_eq!(requests.take(), []);
    let bad = [
        ("a gap", vec![leader_batch(3, 4)]),
        ("an overlap", vec![leader_batch(1, 4)]),
        ("an epoch that decreases", vec![leader_batch(2, 3)]),
        ("an epoch above its leader's", vec![leader_batch(2, 5)]),
        ("a valid batch before a gap", vec![leader_batch(2, 4), leader_batch(4, 4)]),
    ];
    for (case, batches) in bad {
        deliver(&partition, [batches_event(4, 9, batches), batches_event(4, 9, vec![leader_batch(2, 4)])]).await;
        assert_eq!(requests.take(), [TaskRequest::RetryLater], "{case}");
        assert_eq!((partition.watermarks().log_end, partition.watermarks().high_watermark), (at(2), at(1)), "{case}");
        assert_eq!(partition.status().role, ReplicaRole::Follower { leader: broker(2), in_sync: false }, "{case}");
        deliver(&partition, [LinkEvent::Connected, response_event(4, SubscribeOutcome::Accepted(at(2)))]).await;
        assert_eq!(requests.take(), [subscribed(4, Some(4), 2)], "{case}");
    }
    deliver(&partition, [batches_event(4, 3, vec![leader_batch(2, 4)])]).await;
    assert_eq!(partition.watermarks().high_watermark, at(3));
}

/// A follower holds records that its leader has not committed yet. No reader gets them, even if its read starts at an
/// offset above the follower's high watermark.
#[tokio::test]
async fn in_sync_follower_serves_only_committed_records() {
    let (partition, _requests, _log) = open();
    let reader = partition.reader().clone();
    let serves = || (partition.status().role.serves(false), partition.status().role.serves(true));
    let next = async |from| reader.read(at(from), (1 << 20).into()).await.unwrap().map(|fetched| fetched.next);
    assign(&partition, value(Some(2), 4), 10).await;
    deliver(&partition, [LinkEvent::Connected]).await;
    assert_eq!(serves(), (false, false), "the leader has not responded");
    let batches = (0..4).map(|n| leader_batch(n, 4)).collect();
    deliver(&partition, [response_event(4, SubscribeOutcome::Accepted(at(0))), batches_event(4, 2, batches)]).await;
    assert_eq!(serves(), (false, true));
    assert_eq!((next(0).await, next(1).await), (Some(at(2)), Some(at(2))));
    let wake_set = Arc::new(WakeSet::default());
    reader.add_listener(&wake_set, 7);
    assert_eq!((wake_set.take(), wake_set.take()), (Some(7), None));
    assert_eq!(
        (next(2).await, next(3).await, next(9).await),
        (None, None, None),
        "the reader waits for the high watermark"
    );
    let broken = mutation::with_mutation(Some(Mutation::FollowerServesUncommitted), || next(2).now_or_never());
    assert_eq!(broken, Some(Some(at(4))), "the follower has the uncommitted records");
    deliver(&partition, [batches_event(4, 3, vec![])]).await;
    assert_eq!((wake_set.take(), next(2).await), (Some(7), Some(at(3))), "the high watermark moved");

    // The follower is removed from the ISR, and admitted again.
    let without = PartitionValue { isr: vec![broker(2), broker(3)], ..value(Some(2), 4) };
    assign(&partition, without, 11).await;
    assert_eq!(serves(), (false, false));
    assign(&partition, value(Some(2), 4), 12).await;
    assert_eq!(serves(), (false, true));
    // The link is lost: later commits of the leader do not arrive.
    deliver(&partition, [LinkEvent::Disconnected]).await;
    assert_eq!(serves(), (false, false));
    // Another broker leads: the follower serves no reads before the leader has accepted its log.
    assign(&partition, value(Some(3), 5), 13).await;
    deliver(&partition, [LinkEvent::Connected]).await;
    assert_eq!(serves(), (false, false));
    deliver(&partition, [response_event(5, SubscribeOutcome::Accepted(at(4)))]).await;
    assert_eq!((serves(), next(3).await), ((false, true), None));
    // The broker leads, and then follows again.
    assign(&partition, value(Some(1), 6), 14).await;
    assert_eq!(serves(), (true, true));
    assign(&partition, value(Some(2), 7), 15).await;
    assert_eq!(serves(), (false, false));
}

#[tokio::test]
async fn follower_truncates_bootstraps_and_retries_by_response() {
    let (partition, requests, _log) = open();
    assign(&partition, value(Some(2), 4), 10).await;
    let copied = batches_event(4, 1, (0..6).map(|n| leader_batch(n, if n < 3 { 1 } else { 2 })).collect());
    deliver(&partition, [LinkEvent::Connected, response_event(4, SubscribeOutcome::Accepted(at(0))), copied]).await;
    wait_until("the batches are durable", || partition.progress().persisted_end == at(6)).await;
    requests.take();

    // Another broker leads, and has only the first of the follower's records.
    assign(&partition, value(Some(3), 5), 11).await;
    deliver(&partition, [LinkEvent::Connected]).await;
    assert_eq!(
        requests.take(),
        [TaskRequest::Unsubscribe(LeaderEpoch(5), false), TaskRequest::Follow(broker(3)), subscribed(5, Some(2), 6)]
    );
    deliver(&partition, [response_event(5, SubscribeOutcome::Diverged { epoch: LeaderEpoch(1), end: at(7) })]).await;
    assert_eq!(
        requests.take(),
        [subscribed(5, Some(1), 3)],
        "the log is truncated where its own records of that epoch end"
    );
    assert_eq!(partition.watermarks().log_end, at(3));

    for event in [
        response_event(5, SubscribeOutcome::Rejected(SubscribeError::Unavailable { reason: "not now".to_owned() })),
        response_event(5, SubscribeOutcome::Accepted(at(2))),
        response_event(5, SubscribeOutcome::Diverged { epoch: LeaderEpoch(1), end: at(3) }),
        response_event(6, SubscribeOutcome::Accepted(at(3))),
        response_event(
            5,
            SubscribeOutcome::Bootstrap(Box::new(BootstrapTables {
                start: at(9),
                from_object_store: true,
                ..BootstrapTables::default()
            })),
        ),
        response_event(
            5,
            SubscribeOutcome::Bootstrap(Box::new(BootstrapTables {
                start: at(9),
                from_object_store: false,
                epochs: vec![(LeaderEpoch(2), at(10))],
                producers: bytes::Bytes::new(),
            })),
        ),
    ] {
        deliver(&partition, [event.clone()]).await;
        wait_until("the task requests a retry", || requests.0.lock().contains(&TaskRequest::RetryLater)).await;
        assert_eq!(partition.watermarks().log_end, at(3), "{event:?}");
        deliver(&partition, [LinkEvent::Connected]).await;
        assert_eq!(requests.take(), [TaskRequest::RetryLater, subscribed(5, Some(1), 3)], "{event:?}");
    }
    // This response would remove committed records: the follower does not truncate, and does not retry.
    deliver(&partition, [response_event(5, SubscribeOutcome::Diverged { epoch: LeaderEpoch(0), end: at(0) })]).await;
    assert_eq!((requests.take(), partition.watermarks().log_end), (vec![], at(3)));

    deliver(&partition, [LinkEvent::Connected]).await;
    let epochs = vec![(LeaderEpoch(1), at(0)), (LeaderEpoch(3), at(5))];
    let tables = BootstrapTables { start: at(9), from_object_store: false, epochs, producers: bytes::Bytes::new() };
    deliver(&partition, [response_event(5, SubscribeOutcome::Bootstrap(Box::new(tables.clone())))]).await;
    assert_eq!(requests.take(), [subscribed(5, Some(1), 3), subscribed(5, Some(3), 9)]);
    // If a leader repeats its response, the follower waits before it subscribes again.
    deliver(&partition, [response_event(5, SubscribeOutcome::Bootstrap(Box::new(tables)))]).await;
    wait_until("the task requests a retry", || requests.0.lock().contains(&TaskRequest::RetryLater)).await;
    assert_eq!(requests.take(), [TaskRequest::RetryLater]);
    let watermarks = partition.watermarks();
    assert_eq!((watermarks.log_start, watermarks.local_start, watermarks.log_end), (at(9), at(9), at(9)));
    partition.stop().await;
    assert_eq!(requests.take(), [TaskRequest::Unsubscribe(LeaderEpoch(5), true)]);
}

/// A leader has one request at a time. The outcome of a request of an earlier epoch must not be applied to the current
/// request. Otherwise the leader could drop a member from the maximal ISR whose admission may still be written.
#[tokio::test]
async fn late_outcome_does_not_count_for_another_proposal() {
    let (partition, requests, _log) = open();
    assign(&partition, value(Some(1), 4), 10).await;
    partition.on_follower_disconnected(peer(2), DisconnectCause::ProcessGone).await;
    assign_stale(&partition).await;
    let [TaskRequest::Propose(first)] = &requests.take()[..] else { panic!("one proposal") };
    assert_eq!((first.expect, &first.value.isr), (Revision(10), &vec![broker(1), broker(3)]));
    partition.on_follower_disconnected(peer(3), DisconnectCause::ProcessGone).await;
    assign(&partition, value(None, 5), 20).await;
    assign(&partition, value(Some(1), 6), 21).await;
    partition.on_follower_disconnected(peer(3), DisconnectCause::ProcessGone).await;
    assign_stale(&partition).await;
    assert_eq!(requests.take(), [], "the first proposal has no outcome yet");

    partition.on_isr_outcome(ProposalOutcome::Committed(Revision(11))).await;
    assign_stale(&partition).await;
    let [TaskRequest::Propose(second)] = &requests.take()[..] else { panic!("one proposal") };
    assert_eq!((second.expect, &second.value.isr), (Revision(21), &vec![broker(1), broker(2)]));

    // The outcome is unknown: the key is read back, and nothing is proposed before.
    partition.on_isr_outcome(ProposalOutcome::Unknown).await;
    partition.on_follower_disconnected(peer(2), DisconnectCause::ProcessGone).await;
    assign_stale(&partition).await;
    assert_eq!(requests.take(), [TaskRequest::ReadBack]);
    // The metadata arrives before the value that is read back. The leader still waits for that value.
    assign(&partition, second.value.clone(), 22).await;
    assert_eq!(requests.take(), []);
    partition.on_isr_outcome(ProposalOutcome::CurrentValue(second.value.clone(), Revision(22))).await;
    assign_stale(&partition).await;
    let [TaskRequest::Propose(third)] = &requests.take()[..] else { panic!("one proposal") };
    assert_eq!((third.expect, &third.value.isr), (Revision(22), &vec![broker(1)]));
}

#[tokio::test]
async fn broker_leads_at_most_once_in_an_epoch() {
    let (partition, requests, _log) = open();
    assign(&partition, value(Some(1), 4), 10).await;
    assert!(partition.status().role.leads());
    let waiting = send(&partition, batch(b"x", None), Acks::All).await;
    wait_until("the batch is written", || partition.progress().log_end == at(1)).await;
    partition.on_isr_outcome(ProposalOutcome::Deleted).await;
    partition.on_follower_disconnected(peer(2), DisconnectCause::ProcessGone).await;
    assign_stale(&partition).await;
    let [TaskRequest::Propose(_)] = &requests.take()[..] else { panic!("one proposal") };
    partition.on_isr_outcome(ProposalOutcome::Deleted).await;
    assert_eq!(waiting.await.unwrap(), Err(AppendError::Deposed));
    assign(&partition, value(Some(1), 4), 10).await;
    assert_eq!(partition.status().role, ReplicaRole::Idle);
    // A value of an older revision changes nothing.
    assign(&partition, value(Some(1), 5), 9).await;
    assert_eq!(partition.status().role, ReplicaRole::Idle);
    assign(&partition, value(Some(1), 6), 12).await;
    assert!(partition.status().role.leads());
    // This broker is no longer a replica.
    let without_broker = PartitionValue { replicas: vec![broker(2)], ..value(Some(2), 7) };
    assign(&partition, without_broker, 13).await;
    let result = append(&partition, b"x", Acks::None).await;
    assert_eq!(result, Err(AppendError::NotLeader { leader: Some(broker(2)), epoch: LeaderEpoch(7) }));
}

/// A follower's report of a newer epoch ends a leadership at once. Regression: after a wrong report, the broker waited
/// for newer metadata without limit, while the metadata still named it as the leader. It must read the store instead,
/// and end its epoch.
#[tokio::test]
async fn wrong_report_of_newer_epoch_costs_only_an_epoch() {
    let (partition, requests, _log) = open();
    assign(&partition, value(Some(1), 4), 10).await;
    partition.report_newer_epoch(LeaderEpoch(1_000_000)).await;
    assign_stale(&partition).await;
    assert_eq!((partition.status().role, partition.wants_ticks()), (ReplicaRole::Idle, true));
    let ticks = async |from_ms: u64| {
        for ms in [0, 250, 750] {
            tick(&partition, from_ms + ms).await;
        }
        assert_eq!(requests.take(), [], "newer metadata may still arrive");
        tick(&partition, from_ms + 1000).await;
        tick(&partition, from_ms + 1250).await;
        assert_eq!(requests.take(), [TaskRequest::ReadBack]);
    };
    ticks(5000).await;
    partition.on_isr_outcome(ProposalOutcome::CurrentValue(value(Some(1), 4), Revision(10))).await;
    assign_stale(&partition).await;
    let [TaskRequest::Propose(first)] = &requests.take()[..] else { panic!("one proposal") };
    assert_eq!((first.expect, &first.value), (Revision(10), &value(None, 5)));
    // The outcome of the proposal is unknown.
    partition.on_isr_outcome(ProposalOutcome::Unknown).await;
    ticks(9000).await;
    partition.on_isr_outcome(ProposalOutcome::CurrentValue(value(None, 5), Revision(11))).await;
    assign_stale(&partition).await;
    assert_eq!((requests.take(), partition.wants_ticks()), (vec![], false));
    assign(&partition, value(Some(1), 6), 12).await;
    assert!(partition.status().role.leads(), "the follower's report no longer counts");
    // A wrong report delays this broker, but does not prevent it from following another leader.
    partition.report_newer_epoch(LeaderEpoch(2_000_000)).await;
    assign(&partition, value(Some(3), 7), 13).await;
    assert_eq!((partition.status().role, requests.take()), (ReplicaRole::Idle, vec![]));
    ticks(15_000).await;
    partition.on_isr_outcome(ProposalOutcome::CurrentValue(value(Some(3), 7), Revision(13))).await;
    assign_stale(&partition).await;
    assert_eq!(requests.take(), [TaskRequest::Follow(broker(3))]);
    assign(&partition, value(Some(1), 8), 14).await;
    assert_eq!(requests.take(), [TaskRequest::Unsubscribe(LeaderEpoch(8), false)]);
    // If the report was true, the store names the new leader.
    partition.report_newer_epoch(LeaderEpoch(9)).await;
    ticks(20_000).await;
    partition.on_isr_outcome(ProposalOutcome::CurrentValue(value(Some(2), 9), Revision(15))).await;
    assign_stale(&partition).await;
    assert_eq!(requests.take(), [TaskRequest::Follow(broker(2))]);
}

/// A broker whose leadership ended waits a second for metadata before it reads the store. Regression: the second
/// counted from the start of an earlier wait, if that wait had ended before the next tick.
#[tokio::test]
async fn metadata_wait_counts_from_the_end_of_leadership() {
    let (partition, requests, _log) = open();
    assign(&partition, value(Some(1), 4), 10).await;
    partition.report_newer_epoch(LeaderEpoch(5)).await;
    tick(&partition, 5000).await;
    // The metadata arrives, which ends the wait.
    assign(&partition, value(Some(1), 6), 11).await;
    partition.report_newer_epoch(LeaderEpoch(7)).await;
    tick(&partition, 60_000).await;
    assert_eq!(requests.take(), [], "newer metadata may still arrive");
    tick(&partition, 61_000).await;
    assert_eq!(requests.take(), [TaskRequest::ReadBack]);
}

/// Regression: one clock sends ticks to all partitions of a broker. Ticks filled the queue of a task that was blocked
/// by its disk for minutes. The clock then waited for this task, and all other partitions got no ticks.
#[tokio::test]
async fn ticks_never_wait_and_take_no_queue_space() {
    let (partition, requests, _log) = open();
    assign(&partition, value(Some(2), 4), 10).await;
    (0..2 * COMMAND_QUEUE_LEN as u64).for_each(|now_ms| partition.tick(now_ms));
    assert_eq!(partition.on_link_event(LinkEvent::Connected), Ok(()));
    deliver(&partition, []).await;
    assert_eq!(requests.take().len(), 2, "the task follows and subscribes");
}

/// The control queue is bounded. A link event that does not fit is rejected at once; accepted events are handled.
#[tokio::test]
async fn full_control_queue_rejects_link_events() {
    let (partition, requests, _log) = open();
    assign(&partition, value(Some(2), 4), 10).await;
    let results: Vec<_> = (0..2 * COMMAND_QUEUE_LEN).map(|_| partition.on_link_event(LinkEvent::Connected)).collect();
    assert_eq!(results.iter().filter(|result| result.is_err()).count(), COMMAND_QUEUE_LEN);
    assert!(results[..COMMAND_QUEUE_LEN].iter().all(Result::is_ok));
    deliver(&partition, []).await;
    assert_eq!(requests.take().len(), 1 + COMMAND_QUEUE_LEN, "accepted events are handled");
}

/// A subscription waits up to a second until this broker leads in the subscription's epoch. Then it is rejected.
#[tokio::test(start_paused = true)]
async fn subscription_waits_for_its_epoch_to_begin() {
    let (partition, _requests, _log) = open();
    assign(&partition, value(Some(2), 4), 10).await;
    let position = LogPosition { last_epoch: None, log_end: at(0), removal_count: None };
    let early = partition.subscribe(peer(2), LeaderEpoch(5), position, ReplicaProgress::default());
    // The time of this test is paused, so the sleep takes no real time.
    let metadata = async {
        tokio::time::sleep(Duration::from_millis(900)).await;
        assign(&partition, value(Some(1), 5), 11).await;
    };
    let (response, ()) = tokio::join!(early, metadata);
    assert!(
        matches!(response, SubscribeResponse { epoch: LeaderEpoch(5), outcome: SubscribeOutcome::Accepted(_), .. }),
        "{response:?}"
    );
    let began = crate::task::clock::monotonic();
    let response = partition.subscribe(peer(3), LeaderEpoch(6), position, ReplicaProgress::default()).await;
    assert!(
        matches!(&response.outcome, SubscribeOutcome::Rejected(reason) if reason.to_string().contains("epoch 5")),
        "{response:?}"
    );
    assert_eq!(began.elapsed().as_millis(), 1000);
}

/// After a restore of etcd from a backup, earlier epochs are assigned again. Regression: the first append of a leader
/// panicked if its log had batches of a later epoch. The broker must refuse to lead instead.
#[tokio::test]
async fn broker_does_not_lead_in_an_epoch_before_its_log() {
    let (partition, requests, _log) = open();
    assign(&partition, value(Some(2), 7), 10).await;
    deliver(
        &partition,
        [
            LinkEvent::Connected,
            response_event(7, SubscribeOutcome::Accepted(at(0))),
            batches_event(7, 1, vec![leader_batch(0, 7)]),
        ],
    )
    .await;
    let older = value(Some(1), 5);
    assign(&partition, older.clone(), 11).await;
    requests.take();
    let result = send(&partition, batch(b"y", None), Acks::Leader).await.await.unwrap();
    assert!(matches!(result, Err(AppendError::NotLeader { .. })), "{result:?}");
    assert_eq!((partition.status().role, partition.wants_ticks()), (ReplicaRole::Idle, true));

    // The broker reads the store, and then proposes the value without a leader, which ends the epoch.
    for ms in [0, 1000] {
        tick(&partition, ms).await;
    }
    assert_eq!(requests.take(), [TaskRequest::ReadBack]);
    partition.on_isr_outcome(ProposalOutcome::CurrentValue(older.clone(), Revision(11))).await;
    assign_stale(&partition).await;
    let [TaskRequest::Propose(ended)] = &requests.take()[..] else { panic!("one proposal") };
    assert_eq!(ended.value, older.leaderless());
}

/// A leader whose disk failed resigns again when the ISR changes. Regression: it resigned once, while it was the only
/// ISR member. A successor entered the ISR later, but the partition accepted no writes until the broker was stopped.
#[tokio::test]
async fn failed_leader_resigns_when_a_successor_enters_isr() {
    let disk = SimDisk::new();
    let (partition, requests, _log) = open_on(disk.clone());
    let only_member = PartitionValue { isr: vec![broker(1)], ..value(Some(1), 4) };
    assign(&partition, only_member.clone(), 10).await;
    disk.fail_writes_after(Some(0));
    let result = send(&partition, batch(b"x", None), Acks::Leader).await.await.unwrap();
    assert!(matches!(result, Err(AppendError::StorageFailed { .. })), "{result:?}");
    assert_eq!(requests.take(), [TaskRequest::Resign(LeaderEpoch(4))]);
    assign(&partition, PartitionValue { isr: vec![broker(1), broker(2)], ..only_member }, 11).await;
    assert_eq!(requests.take(), [TaskRequest::Resign(LeaderEpoch(4))]);
}

/// The outcome of a proposal, or a read of the store, names this broker id as the leader of a newer epoch. The id may
/// then belong to another process, on a copy of the data directory. So such a value must not start a leadership.
#[tokio::test]
async fn only_the_metadata_cache_starts_a_leader() {
    let (partition, requests, _log) = open();
    assign(&partition, value(Some(1), 4), 10).await;
    partition.on_follower_disconnected(peer(2), DisconnectCause::ProcessGone).await;
    assign_stale(&partition).await;
    assert!(matches!(&requests.take()[..], [TaskRequest::Propose(_)]));
    let newer = value(Some(1), 6);
    partition.on_isr_outcome(ProposalOutcome::CurrentValue(newer.clone(), Revision(12))).await;
    assign_stale(&partition).await;
    assert_eq!(partition.status().role, ReplicaRole::Idle);
    for ms in [0, 1000] {
        tick(&partition, ms).await;
    }
    assert_eq!(requests.take(), [TaskRequest::ReadBack]);
    partition.on_isr_outcome(ProposalOutcome::CurrentValue(newer.clone(), Revision(12))).await;
    assign_stale(&partition).await;
    assert_eq!((partition.status().role, requests.take()), (ReplicaRole::Idle, vec![]));
    assign(&partition, newer, 12).await;
    assert!(matches!(partition.status().role, ReplicaRole::Leader { .. }));
}
