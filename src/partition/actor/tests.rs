//! The task's state without the task: journal results arrive in an order that the test chooses.

use std::{path::Path, time::Duration};

use futures::FutureExt as _;
use tokio::sync::{Semaphore, oneshot::Receiver};

use super::*;
use crate::{
    cluster::{PartitionValue, Revision},
    log::{Identity, Log, Options, SimDisk},
    model::{Compression, ConfigMap, LeaderEpoch, TopicId},
    partition::{BatchOrigin, Held},
    record::BatchBuilder,
};

/// Opens a log without threads: the test starts each journal write.
fn open_log() -> Log {
    open_log_on(SimDisk::new())
}

fn open_log_on(disk: SimDisk) -> Log {
    let identity = Identity { cluster: "test".to_owned(), broker: BrokerId(1) };
    let options = Options { journal_bytes: 1 << 20, reserve_bytes: 0, manual: true, ..Options::default() };
    Log::open(Arc::new(disk), Path::new("/data"), &identity, options).unwrap()
}

fn open(log: &Log) -> Actor {
    let mut actor = open_waiting(log);
    lead(&mut actor, 4);
    actor
}

/// Opens an actor without an assignment.
fn open_waiting(log: &Log) -> Actor {
    let id = PartitionId::new(TopicId::from_bytes([7; 16]), 0);
    let config = Arc::new(TopicConfig::resolve(&ConfigMap::new(), &ConfigMap::new()).unwrap());
    Actor::new(Parts {
        broker: BrokerId(1),
        id,
        topic: TopicName::new("t").unwrap(),
        replica: log.open_replica(id, Offset::ZERO).unwrap(),
        shared: Arc::new(Shared::new(config, Tasks::new())),
        news: Arc::default(),
        around: Surroundings::alone(),
        upkeep: UpkeepQueue::default(),
        tier: None,
        log_start: Offset::ZERO,
        tiered_end: Offset::ZERO,
        committed_end: Offset::ZERO,
        lag_ms: u64::MAX,
        orders: mpsc::channel(1).0.downgrade(),
        tasks: Tasks::new(),
    })
}

/// Applies metadata that names this broker as the leader of an epoch.
fn lead(actor: &mut Actor, epoch: u32) {
    let value = PartitionValue::new(vec![BrokerId(1)], LeaderEpoch(epoch));
    actor.placed(Arc::new(value), Revision(u64::from(epoch)));
    actor.publish();
}

/// Appends one record and submits it to the journal.
fn write(actor: &mut Actor) -> Receiver<AppendResult> {
    write_with(actor, Acks::All)
}

fn write_with(actor: &mut Actor, acks: Acks) -> Receiver<AppendResult> {
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(1000, None, Some(b"x"), &[]).unwrap();
    let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
    let (answer, receiver) = oneshot::channel();
    let batch = builder.finish(None).unwrap();
    let origin = BatchOrigin { fingerprint: None, timestamps: batch.timestamp_range(), refusal: None };
    actor.append(Append { batch, origin, acks, permit, answer, stored: None }, 1000);
    actor.complete();
    receiver
}

/// Applies the pending signals.
fn hear(actor: &mut Actor) {
    if let Some(told) = actor.news.take() {
        actor.hear(told);
    }
}

/// Truncates the log, as a replica with records that its leader lacks does, and then leads.
fn cut_and_lead(actor: &mut Actor, to: u64) {
    let log_end = actor.replica.truncate(Offset::new(to).unwrap()).unwrap();
    actor.handed_end = log_end;
    lead(actor, 5);
}

/// Returns true if maintenance was queued since the last call.
fn is_queued(actor: &Actor) -> bool {
    let mut queued = false;
    while let Some(id) = actor.upkeep.next().now_or_never() {
        actor.upkeep.done(id, false);
        queued = true;
    }
    queued
}

/// Regression: a retry with `acks=tiered` came before the epoch was committed, and waited for the next pass over all partitions.
#[tokio::test]
async fn maintenance_is_queued_when_epoch_is_committed() {
    let log = open_log();
    let mut actor = open(&log);
    let _written = write(&mut actor);
    lead(&mut actor, 5);
    assert_eq!(actor.standing.role, Role::Leader { settled: false });
    assert!(is_queued(&actor) && !is_queued(&actor));
    assert!(log.journal_step());
    hear(&mut actor);
    assert_eq!(actor.standing.role, Role::Leader { settled: true });
    assert!(is_queued(&actor));
}

/// Regression: only the last sealed segment was checked. The writers of the one before waited for a follower that lacked the last one.
#[tokio::test]
async fn maintenance_is_queued_when_awaited_segment_is_committed() {
    let log = open_log();
    let mut actor = open(&log);
    let _first = write_with(&mut actor, Acks::Tiered);
    assert!(log.journal_step());
    actor.seal_now();
    let _second = write_with(&mut actor, Acks::Tiered);
    actor.seal_now();
    assert!(is_queued(&actor) && !is_queued(&actor));
    hear(&mut actor);
    assert_eq!((actor.high_watermark().get(), actor.replica.active().base.get()), (1, 2));
    assert!(is_queued(&actor));
}

/// Regression: the broker led until the next write, and records that it could not read were read from no other replica.
#[tokio::test]
async fn failed_segment_sync_is_detected_without_writes() {
    let disk = SimDisk::new();
    let log = open_log_on(disk.clone());
    let mut actor = open(&log);
    let written = write(&mut actor);
    assert!(log.journal_step());
    hear(&mut actor);
    written.await.unwrap().unwrap();
    let look = async |actor: &mut Actor| {
        let (answer, local) = oneshot::channel();
        actor.administer(Command::Local(answer)).await;
        local.await.unwrap();
        actor.shared.fault()
    };
    assert_eq!(look(&mut actor).await, None);
    disk.fail_syncs(Some(".log"));
    log.sync_step();
    let why = look(&mut actor).await.expect("it is told");
    assert!(why.contains("segment"), "{why}");
}

/// Regression: a crash left records that the journal had not taken, and the replica was assigned elsewhere at the next start. Its close
/// waited for a journal result that was never requested, and the broker never became active.
#[tokio::test(start_paused = true)]
async fn unassigned_replica_with_unsynced_records_closes() {
    let disk = SimDisk::new();
    let log = open_log_on(disk.clone());
    let mut actor = open(&log);
    let _kept = write(&mut actor);
    assert!(log.journal_step());
    let _unknown = write(&mut actor);
    drop((actor, log));
    disk.kill();
    let log = open_log_on(disk);
    let mut actor = open_waiting(&log);
    assert!(actor.replica.persisted_end() < actor.replica.log_end());
    let (_open, mut mailbox) = mpsc::channel(1);
    let steps = async {
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            log.sync_step();
            log.journal_step();
        }
    };
    tokio::select! {
        biased;
        () = actor.stop(&mut mailbox) => {}
        () = steps => panic!("it is still not closed"),
    }
    assert_eq!(actor.replica.persisted_end(), actor.replica.log_end());
}

/// Regression: the journal's result for truncated records is `Cut`, which counted as a broken disk for ever.
#[test]
fn truncation_during_journal_write_keeps_log_writable() {
    let log = open_log();
    let mut actor = open(&log);
    let kept = write(&mut actor);
    assert!(log.journal_step());
    hear(&mut actor);
    assert_eq!(kept.blocking_recv().unwrap().unwrap().end.get(), 1);

    let lost = write(&mut actor);
    cut_and_lead(&mut actor, 1);
    hear(&mut actor);
    let answer = lost.blocking_recv().unwrap();
    assert_eq!(answer, Err(AppendError::Deposed), "nobody is told that what was cut is there");
    assert_eq!(actor.shared.fault(), None);

    let written = write(&mut actor);
    assert!(log.journal_step());
    hear(&mut actor);
    let acked = written.blocking_recv().unwrap().unwrap();
    assert_eq!((acked.base.get(), acked.held), (1, Held::Synced(1)));
}

/// The journal has a result, and before the task applies it, the task truncates the records of that result.
#[test]
fn journal_result_from_before_truncation_does_not_count() {
    let log = open_log();
    let mut actor = open(&log);
    let _kept = write(&mut actor);
    let _lost = write(&mut actor);
    assert!(log.journal_step());
    cut_and_lead(&mut actor, 1);
    let mut written = write(&mut actor);
    hear(&mut actor);
    assert_eq!(actor.high_watermark().get(), 1, "offset 1 is another record now, and is not durable yet");
    assert!(written.try_recv().is_err());
    assert!(log.journal_step());
    hear(&mut actor);
    assert_eq!(written.try_recv().unwrap().unwrap().end.get(), 2);
}

/// Regression: after the wall clock went back a day, nothing was sealed by age for a day.
#[tokio::test(start_paused = true)]
async fn open_segment_ages_by_the_monotonic_clock() {
    let log = open_log();
    let mut actor = open(&log);
    let is_due = |actor: &Actor| {
        let age = actor.shared.active_age(clock::monotonic());
        age.is_some_and(|age| age >= actor.config.segment_age)
    };
    assert!(actor.shared.active_age(clock::monotonic()).is_none(), "it is empty");
    drop(write(&mut actor));
    assert!(!is_due(&actor));
    tokio::time::advance(actor.config.segment_age).await;
    assert!(is_due(&actor));
    drop(write(&mut actor));
    assert_eq!((actor.replica.sealed().len(), is_due(&actor)), (1, false), "the next append began another one");
}
