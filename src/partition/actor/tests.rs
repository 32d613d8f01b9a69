//! The actor without its task: the test calls the handlers, and chooses the order of journal results.

use std::path::Path;

use futures::FutureExt as _;
use tokio::sync::{Semaphore, oneshot::Receiver};

mod turn_order;

use super::*;
use crate::{
    cluster::{PartitionValue, Revision},
    log::{DataDir, DataDirIdentity, LogOptions, SimDisk, SimHook},
    model::{Acks, Compression, ConfigMap, LeaderEpoch, TopicId},
    partition::{AckDurability, BatchOrigin, metadata::Transition},
    record::BatchBuilder,
};

/// Opens a log in step mode, without threads: the test starts each journal write.
fn open_log() -> DataDir {
    open_log_on(SimDisk::new())
}

fn open_log_on(disk: SimDisk) -> DataDir {
    open_log_with(disk, None)
}

fn open_log_with(disk: SimDisk, sim_hook: Option<SimHook>) -> DataDir {
    let identity = DataDirIdentity { cluster: "test".to_owned(), broker: BrokerId(1) };
    let options =
        LogOptions { journal_bytes: 1 << 20, reserve_bytes: 0, step_mode: true, sim_hook, ..LogOptions::default() };
    DataDir::open(Arc::new(disk), Path::new("/data"), &identity, options).unwrap()
}

/// Opens an actor that leads in epoch 4.
fn open(log: &DataDir) -> Actor {
    let mut actor = open_unassigned(log);
    start_leading(&mut actor, 4);
    actor
}

/// Opens an actor without an assignment.
fn open_unassigned(log: &DataDir) -> Actor {
    open_at(log, Offset::ZERO)
}

/// Opens an actor without an assignment, whose log starts at `start` if it is empty.
fn open_at(log: &DataDir, start: Offset) -> Actor {
    let signals = Arc::<ActorSignals>::default();
    let id = PartitionId::new(TopicId::from_bytes([7; 16]), 0);
    let config = Arc::new(TopicConfig::resolve(&ConfigMap::new(), &ConfigMap::new()).unwrap());
    Actor::new(ActorConfig {
        broker: BrokerId(1),
        id,
        topic: TopicName::new("t").unwrap(),
        replica: log.open_replica(id, start).unwrap(),
        published: Arc::new(PublishedState::new(config, Tasks::new())),
        signals: Arc::clone(&signals),
        ctx: PartitionContext::standalone(),
        maintenance: MaintenanceQueue::default(),
        tier: None,
        log_start: start,
        tiered_end: Offset::ZERO,
        committed_end: start,
        lag_ms: u64::MAX,
        control: mpsc::channel(1).0.downgrade(),
        inbox: Inbox::new(signals, mpsc::channel(1).1, mpsc::channel(1).1, Tasks::new()),
        tasks: Tasks::new(),
    })
}

/// Applies metadata that names this broker as the leader of an epoch.
fn start_leading(actor: &mut Actor, epoch: u32) {
    let value = PartitionValue::new(vec![BrokerId(1)], LeaderEpoch(epoch));
    actor.apply_partition_value(Arc::new(value), Revision(u64::from(epoch)));
    actor.finish_turn();
}

/// Appends one record with `acks=all` and submits it to the journal.
fn write(actor: &mut Actor) -> Receiver<AppendResult> {
    write_with(actor, Acks::All)
}

fn write_with(actor: &mut Actor, acks: Acks) -> Receiver<AppendResult> {
    let receiver = append(actor, acks);
    actor.finish_group();
    receiver
}

/// Admits one record into the group.
fn append(actor: &mut Actor, acks: Acks) -> Receiver<AppendResult> {
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(1000, None, Some(b"x"), &[]).unwrap();
    let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
    let (responder, receiver) = oneshot::channel();
    let batch = builder.finish(None).unwrap();
    let origin = BatchOrigin { fingerprint: None, timestamps: batch.timestamp_range(), refusal: None };
    actor.append(Append { batch, origin, acks, permit, responder, stored: None }, 1000);
    receiver
}

/// Applies the pending signals.
fn take_signals(actor: &mut Actor) {
    if let Some(pending) = actor.signals.take() {
        actor.handle(Input::Signals(pending)).now_or_never().expect("signals are applied without waiting");
    }
}

/// Returns a sender to the actor's control queue.
fn connect_control(actor: &mut Actor) -> mpsc::Sender<ControlMessage> {
    let (control, messages) = mpsc::channel(4);
    actor.inbox = Inbox::new(Arc::clone(&actor.signals), messages, mpsc::channel(1).1, Tasks::new());
    control
}

/// Truncates the log, as after a divergence from a leader, and then leads in epoch 5.
fn truncate_and_lead(actor: &mut Actor, to: u64) {
    let log_end = actor.log.truncate(Offset::new(to).unwrap()).unwrap();
    actor.persisted_submit_end = log_end;
    start_leading(actor, 5);
}

/// Returns true if maintenance was queued since the last call, and empties the queue.
fn take_queued(actor: &Actor) -> bool {
    let mut queued = false;
    while let Some(id) = actor.maintenance.next().now_or_never() {
        actor.maintenance.done(id, false);
        queued = true;
    }
    queued
}

/// Regression: a retry with `acks=tiered` arrived before the epoch was committed. Its upload waited for the next pass
/// of maintenance over all partitions.
#[tokio::test]
async fn maintenance_is_queued_when_epoch_is_committed() {
    let log = open_log();
    let mut actor = open(&log);
    let _written = write(&mut actor);
    start_leading(&mut actor, 5);
    assert_eq!(actor.status.role, ReplicaRole::Leader { epoch_committed: false });
    assert!(take_queued(&actor) && !take_queued(&actor));
    assert!(log.journal_step());
    take_signals(&mut actor);
    assert_eq!(actor.status.role, ReplicaRole::Leader { epoch_committed: true });
    assert!(take_queued(&actor));
}

/// Regression: maintenance was queued only when the last sealed segment was committed. Writers of an earlier segment
/// waited until the last segment was committed as well.
#[tokio::test]
async fn maintenance_is_queued_when_awaited_segment_is_committed() {
    let log = open_log();
    let mut actor = open(&log);
    let _first = write_with(&mut actor, Acks::Tiered);
    assert!(log.journal_step());
    actor.roll_now();
    let _second = write_with(&mut actor, Acks::Tiered);
    actor.roll_now();
    assert!(take_queued(&actor) && !take_queued(&actor));
    take_signals(&mut actor);
    assert_eq!((actor.high_watermark().get(), actor.log.active_segment().base.get()), (1, 2));
    assert!(take_queued(&actor));
}

/// Regression: after a failed segment sync, the broker remained leader until the next write. Until then no other
/// replica could serve its consumers.
#[tokio::test]
async fn failed_segment_sync_is_detected_without_writes() {
    let disk = SimDisk::new();
    let log = open_log_on(disk.clone());
    let mut actor = open(&log);
    let written = write(&mut actor);
    assert!(log.journal_step());
    take_signals(&mut actor);
    written.await.unwrap().unwrap();
    // Handles the command `DescribeSegments`, and returns the error that the replica has afterwards.
    let describe = async |actor: &mut Actor| {
        let (responder, local) = oneshot::channel();
        actor.handle_admin_command(ActorCommand::DescribeSegments(responder)).await;
        local.await.unwrap();
        actor.published.error()
    };
    assert_eq!(describe(&mut actor).await, None);
    disk.fail_syncs(Some(".log"));
    log.sync_step();
    let reason = describe(&mut actor).await.expect("the failed sync is reported");
    assert!(reason.contains("segment"), "{reason}");
}

/// Regression: a crash left records that were not in the journal, and the next assignment did not name the replica. Its
/// close waited for a journal result that was never requested, and the broker never became active.
#[tokio::test]
async fn unassigned_replica_with_unsynced_records_closes() {
    let disk = SimDisk::new();
    let log = open_log_on(disk.clone());
    let mut actor = open(&log);
    let _durable = write(&mut actor);
    assert!(log.journal_step());
    let _pending = write(&mut actor);
    drop((actor, log));
    disk.kill();
    let log = open_log_on(disk);
    let mut actor = open_unassigned(&log);
    assert!(actor.log.persisted_end() < actor.log.log_end());
    let mut stop = Box::pin(actor.stop());
    let mut is_stopped = false;
    // One segment sync and one journal write make the records durable. The limit of ten rounds only ends a failing
    // test.
    for _ in 0..10 {
        if futures::poll!(stop.as_mut()).is_ready() {
            is_stopped = true;
            break;
        }
        log.sync_step();
        log.journal_step();
    }
    drop(stop);
    assert!(is_stopped, "the task did not stop");
    assert_eq!(actor.log.persisted_end(), actor.log.log_end());
}

/// Regression: the journal's result for truncated records is `Truncated`, which counted as a failed disk.
#[test]
fn truncation_during_journal_write_keeps_log_writable() {
    let log = open_log();
    let mut actor = open(&log);
    let first = write(&mut actor);
    assert!(log.journal_step());
    take_signals(&mut actor);
    assert_eq!(first.blocking_recv().unwrap().unwrap().end.get(), 1);

    let truncated = write(&mut actor);
    truncate_and_lead(&mut actor, 1);
    take_signals(&mut actor);
    let result = truncated.blocking_recv().unwrap();
    assert_eq!(result, Err(AppendError::Deposed), "a truncated write is not acknowledged");
    assert_eq!(actor.published.error(), None);

    let written = write(&mut actor);
    assert!(log.journal_step());
    take_signals(&mut actor);
    let acked = written.blocking_recv().unwrap().unwrap();
    assert_eq!((acked.base.get(), acked.durability), (1, AckDurability::Persisted(1)));
}

/// The journal has written records, and the task truncates these records before it applies the result. The result must
/// not count for other records at the same offsets.
#[test]
fn journal_result_from_before_truncation_does_not_count() {
    let log = open_log();
    let mut actor = open(&log);
    let _first = write(&mut actor);
    let _truncated = write(&mut actor);
    assert!(log.journal_step());
    truncate_and_lead(&mut actor, 1);
    let mut written = write(&mut actor);
    take_signals(&mut actor);
    assert_eq!(actor.high_watermark().get(), 1, "offset 1 has another record, which is not durable yet");
    assert!(written.try_recv().is_err());
    assert!(log.journal_step());
    take_signals(&mut actor);
    assert_eq!(written.try_recv().unwrap().unwrap().end.get(), 2);
}

/// Regression: after the wall clock went back by a day, no segment was sealed by age for a day.
#[tokio::test(start_paused = true)]
async fn open_segment_ages_by_the_monotonic_clock() {
    let log = open_log();
    let mut actor = open(&log);
    let is_due = |actor: &Actor| {
        let age = actor.published.active_age(clock::monotonic());
        age.is_some_and(|age| age >= actor.config.segment_age)
    };
    assert!(actor.published.active_age(clock::monotonic()).is_none(), "the active segment is empty");
    drop(write(&mut actor));
    assert!(!is_due(&actor));
    tokio::time::advance(actor.config.segment_age).await;
    assert!(is_due(&actor));
    drop(write(&mut actor));
    assert_eq!((actor.log.sealed().len(), is_due(&actor)), (1, false), "the next append started another segment");
}

/// Regression: a leadership of epoch 4 waited for the object store, and started after a follower had reported epoch 6.
#[tokio::test]
async fn leadership_below_reported_epoch_never_starts() {
    let log = open_log();
    let mut actor = open_unassigned(&log);
    actor.tiered_end = Offset::new(5).unwrap();
    start_leading(&mut actor, 4);
    let request_id = actor.bootstrap_request.id();
    actor.handle(Input::Control(ControlMessage::NewerEpoch(LeaderEpoch(6)))).await;
    let tables = Err(BootstrapError::NoObjectStore);
    actor.handle(Input::Control(ControlMessage::BootstrapReady(request_id, tables))).await;
    assert_eq!((actor.status.role, actor.log.log_end()), (ReplicaRole::Idle, Offset::ZERO));
    assert!(actor.awaits_metadata());
}

/// A replica with a failed disk becomes idle, also in its metadata. So the same value would give the role of a follower
/// again.
#[tokio::test]
async fn replica_with_failed_disk_has_no_role() {
    let log = open_log();
    let mut actor = open_unassigned(&log);
    let follow = |actor: &mut Actor, epoch| {
        let value = Arc::new(PartitionValue::new(vec![BrokerId(2), BrokerId(1)], LeaderEpoch(epoch)));
        actor.apply_partition_value(Arc::clone(&value), Revision(u64::from(epoch)));
        value
    };
    // Returns true if `value`, applied again, would give the role of a follower.
    let gives_role = |actor: &Actor, value| {
        let transition = actor.metadata.clone().apply(value, actor.metadata.revision(), BrokerId(1));
        transition == Transition::Follow(BrokerId(2))
    };
    let value = follow(&mut actor, 4);
    assert!(matches!(actor.role, RoleState::Following(_)) && !gives_role(&actor, value.clone()));
    actor.fail("test");
    assert!(matches!(actor.role, RoleState::Idle) && gives_role(&actor, value));
    let value = follow(&mut actor, 5);
    assert!(matches!(actor.role, RoleState::Idle) && gives_role(&actor, value));
}
