//! One partition on a real disk with an object store in memory: writes, reads, maintenance, stop.

mod acks_tiered;
mod by_time;

use std::{path::Path, time::Duration};

use tokio::sync::Semaphore;

use super::*;
use crate::{
    cluster::{
        EmbeddedStore, Keys, MetaStore, PartitionValue, Revision, TierCommitError, TierCommits, Transaction,
        Value as _,
        faulty::{Fault, Faulty},
    },
    log::{Identity, Options, RealDisk},
    model::{Compression, ConfigMap, Offset, TopicId},
    record::BatchBuilder,
    telemetry::Metrics,
    tier::{Cache, CacheOptions, Store, StoreOptions},
};

/// A broker of one partition.
struct Bench {
    log: Log,
    tier: Option<PartitionTier>,
    store: Faulty,
    commits: TierCommits,
    upkeep: Upkeep,
    queue: UpkeepQueue,
    tasks: Tasks,
    id: PartitionId,
}

impl Bench {
    async fn new(dir: &Path, bucket: bool) -> Self {
        let identity = Identity { cluster: "test".to_owned(), broker: BrokerId(1) };
        let options = Options { journal_bytes: 8 << 20, tail_bytes: 24 << 10, ..Options::default() };
        let log = Log::open(Arc::new(RealDisk::default()), dir, &identity, options).unwrap();
        let id = PartitionId::new(TopicId::from_bytes([7; 16]), 0);
        let store = EmbeddedStore::in_memory();
        let keys = Keys::new("test").unwrap();
        store.transact(Transaction::new().put(keys.partition(id), alone().encode())).await.unwrap();
        let tier = bucket.then(|| {
            let store = Store::open(&StoreOptions::new("memory://"), "test").unwrap();
            let cache = Cache::open(&CacheOptions::default(), &Metrics::new()).unwrap();
            PartitionTier::new(store, cache, id, TierState::default())
        });
        let store = Faulty::new(store);
        let commits = TierCommits::new(Arc::new(store.clone()), keys);
        let upkeep = Upkeep::new(commits.clone());
        Self { log, tier, store, commits, upkeep, queue: UpkeepQueue::default(), tasks: Tasks::new(), id }
    }

    async fn open(&self, config: &[(&str, &str)]) -> Arc<Partition> {
        self.open_with(config, None).await
    }

    /// Opens the partition as a restart does: with the tier state of the metadata store.
    async fn reopen(&self, config: &[(&str, &str)]) -> Arc<Partition> {
        let committed = self.commits.current(self.id).await.unwrap();
        self.open_with(config, committed.filter(|state| *state != TierState::default())).await
    }

    async fn open_with(&self, config: &[(&str, &str)], committed: Option<TierState>) -> Arc<Partition> {
        let spec = Spec {
            id: self.id,
            topic: TopicName::new("events").unwrap(),
            config: resolve(config),
            committed: committed.clone(),
            tier: self.tier.clone(),
            alone: true,
            anew: false,
            lag_time: Duration::MAX,
        };
        let around = Surroundings::alone();
        let partition = Partition::open(BrokerId(1), &self.log, spec, around, &self.queue, &self.tasks).unwrap();
        let assignment = Assignment {
            value: Arc::new(alone()),
            revision: Revision::ZERO,
            committed,
            registered: std::collections::BTreeMap::new(),
        };
        partition.assign(assignment).await;
        partition
    }

    /// Runs maintenance until no work is left.
    async fn settle(&self, partition: &Partition) {
        while self.upkeep.step(partition).await.unwrap().more {}
        // The last command was only queued: a request behind it returns after it.
        upkeep::local(partition).await.unwrap();
    }

    /// Serves the queue as a broker's worker does, until `answer` is ready.
    async fn serve_until<T>(&self, partition: &Partition, answer: impl Future<Output = T>) -> T {
        let serve = async {
            loop {
                let id = self.queue.next().await;
                let more = self.upkeep.step(partition).await.unwrap().more;
                self.queue.done(id, more);
            }
        };
        tokio::select! {
            answer = answer => answer,
            () = serve => unreachable!("it serves for ever"),
            () = tokio::time::sleep(Duration::from_secs(30)) => panic!("nothing hurried the bucket"),
        }
    }
}

/// Returns the value of a partition whose only replica is on this broker.
fn alone() -> PartitionValue {
    PartitionValue::new(vec![BrokerId(1)], LeaderEpoch(4))
}

fn resolve(config: &[(&str, &str)]) -> Arc<TopicConfig> {
    let overrides: ConfigMap = config.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Arc::new(TopicConfig::resolve(&ConfigMap::new(), &overrides).unwrap())
}

fn batch(value: &[u8]) -> Batch {
    batch_of(crate::task::clock::wall_ms(), value)
}

fn batch_of(timestamp_ms: i64, value: &[u8]) -> Batch {
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(timestamp_ms, None, Some(value), &[]).unwrap();
    builder.finish(None).unwrap()
}

async fn append(partition: &Partition, value: &[u8], acks: Acks) -> AppendResult {
    append_batch(partition, batch(value), acks).await
}

async fn append_batch(partition: &Partition, batch: Batch, acks: Acks) -> AppendResult {
    let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
    partition.append(batch, None, acks, permit).await.await.unwrap()
}

/// Reads everything from `from` to the high watermark. Returns the values, and the tier of each read.
async fn read_all(partition: &Partition, from: u64) -> (Vec<Vec<u8>>, Vec<Source>) {
    let (mut values, mut sources) = (Vec::new(), Vec::new());
    let mut at = Offset::new(from).unwrap();
    while let Some(fetched) = partition.reader().read(at, (1 << 20).into()).await.unwrap() {
        let mut bytes = bytes::Bytes::from(fetched.chunks.concat());
        while !bytes.is_empty() {
            for entry in Batch::split_from(&mut bytes).unwrap().records().unwrap() {
                let (offset, record) = entry.unwrap();
                if offset >= at {
                    values.push(record.value.unwrap().to_vec());
                }
            }
        }
        at = fetched.next;
        sources.push(fetched.source);
    }
    (values, sources)
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_records_are_readable_after_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(&[]).await;
    for n in 0..10u8 {
        let acked = append(&partition, &[n], Acks::All).await.unwrap();
        assert_eq!((acked.base.get(), acked.held), (u64::from(n), Held::Synced(1)));
    }
    let (values, sources) = read_all(&partition, 3).await;
    assert_eq!(values, (3..10u8).map(|n| vec![n]).collect::<Vec<_>>());
    assert_eq!(sources, [Source::Memory]);
    partition.stop().await;
    assert_eq!(append(&partition, b"late", Acks::All).await, Err(AppendError::Closing));
    assert_eq!(partition.reader().read(Offset::ZERO, 1.into()).await.unwrap_err(), ReadError::Closed);
    drop(partition);
    let again = bench.open(&[]).await;
    assert_eq!(again.marks().high_watermark.get(), 10);
    assert_eq!(read_all(&again, 0).await.0.len(), 10);
}

/// Regression: one group lay in one segment whatever its size, and a fast producer's batches form large groups.
#[tokio::test]
async fn queued_batches_do_not_exceed_segment_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(&[("segment.bytes", "16384")]).await;
    // On one thread: all writes are queued before the partition's task runs.
    let mut answers = Vec::new();
    for n in 0..40_u8 {
        let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        answers.push(partition.append(batch(&[n; 4000]), None, Acks::All, permit).await);
    }
    for answer in answers {
        answer.await.unwrap().unwrap();
    }
    let folder = dir.path().join(bench.id.to_string());
    let bytes: Vec<u64> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "log"))
        .map(|entry| entry.metadata().unwrap().len())
        .collect();
    assert!(bytes.len() >= 10 && bytes.iter().all(|bytes| *bytes <= 16_384), "{bytes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reader_crosses_object_store_disk_and_memory() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("local.retention.bytes", "40000")]).await;
    let value = |n: u32| [n.to_be_bytes().as_slice(), &[7; 4000]].concat();
    for n in 0..60 {
        append(&partition, &value(n), Acks::All).await.unwrap();
    }
    bench.settle(&partition).await;
    let marks = partition.marks();
    assert!(marks.local_start > Offset::ZERO, "something was evicted: {marks:?}");
    assert!(marks.local_start <= marks.tiered_end && marks.tiered_end <= marks.high_watermark);
    let (values, sources) = read_all(&partition, 0).await;
    assert_eq!(values, (0..60).map(value).collect::<Vec<_>>());
    for source in [Source::Bucket, Source::Disk, Source::Memory] {
        assert!(sources.contains(&source), "{source:?} was read: {sources:?}");
    }
}

/// Regression: a follower gets a new log start with the metadata before its task applies it, and reads blamed the object store meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn read_below_a_log_start_that_has_just_moved_is_out_of_range() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("local.retention.bytes", "0")]).await;
    for _ in 0..30 {
        append(&partition, &[7; 4000], Acks::All).await.unwrap();
    }
    bench.settle(&partition).await;
    let tier = bench.tier.as_ref().unwrap();
    let start = Offset::new(7).unwrap();
    tier.adopt(TierState { log_start: start, ..tier.state() });
    assert_eq!(partition.marks().log_start, Offset::ZERO, "the task does not know yet");
    let offset = Offset::new(3).unwrap();
    let end = partition.marks().high_watermark;
    let refused = partition.reader().read(offset, (1 << 20).into()).await.unwrap_err();
    assert_eq!(refused, ReadError::OutOfRange { offset, start, end });
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_moves_log_start_in_both_tiers() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("retention.bytes", "50000")]).await;
    for n in 0..40u8 {
        append(&partition, &[n; 4000], Acks::All).await.unwrap();
    }
    bench.settle(&partition).await;
    let start = partition.marks().log_start;
    assert!(start > Offset::ZERO);
    let error = partition.reader().read(Offset::ZERO, 1.into()).await.unwrap_err();
    let end = partition.marks().high_watermark;
    assert_eq!(error, ReadError::OutOfRange { offset: Offset::ZERO, start, end });
    assert_eq!(read_all(&partition, start.get()).await.0.len() as u64, end.since(start));
}

/// Regression, found by review: in the object store such records counted as older than any other, and were deleted right after their
/// upload.
#[tokio::test(flavor = "multi_thread")]
async fn records_without_timestamp_expire_by_time_of_append() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let config = [("segment.bytes", "16384"), ("retention.ms", "3600000")];
    let partition = bench.open(&config).await;
    for n in 0..20u8 {
        append_batch(&partition, batch_of(-1, &[n; 4000]), Acks::All).await.unwrap();
    }
    bench.settle(&partition).await;
    let marks = partition.marks();
    assert!(marks.tiered_end > Offset::ZERO, "{marks:?}");
    assert_eq!(marks.log_start, Offset::ZERO, "nothing is an hour old");
    partition.configure(resolve(&[("segment.bytes", "16384"), ("retention.ms", "1")])).await;
    let all_go = async {
        while partition.marks().log_start < partition.marks().high_watermark {
            bench.settle(&partition).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all_go).await.expect("all are a millisecond old before long");
}

/// Regression: a record of 2100 kept the local copy for ever, and a record of 1970 evicted it at once.
#[tokio::test(flavor = "multi_thread")]
async fn local_copies_age_from_time_of_append() {
    for timestamp_ms in [1, 1 << 62] {
        let dir = tempfile::tempdir().unwrap();
        let bench = Bench::new(dir.path(), true).await;
        let config = |local_ms| {
            [
                ("segment.bytes", "16384"),
                ("retention.ms", "-1"),
                ("message.timestamp.after.max.ms", "-1"),
                ("local.retention.ms", local_ms),
            ]
        };
        let partition = bench.open(&config("3600000")).await;
        for n in 0..20u8 {
            append_batch(&partition, batch_of(timestamp_ms, &[n; 4000]), Acks::All).await.unwrap();
        }
        bench.settle(&partition).await;
        let marks = partition.marks();
        assert!(marks.tiered_end > Offset::ZERO && marks.local_start == Offset::ZERO, "{timestamp_ms}: {marks:?}");
        partition.configure(resolve(&config("1"))).await;
        let all_go = async {
            while partition.marks().local_start < marks.tiered_end {
                bench.settle(&partition).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), all_go).await.expect("all are a millisecond old before long");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn durability_changes_on_a_live_topic() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(&[("durability", "replicated")]).await;
    assert_eq!(append(&partition, b"a", Acks::All).await.unwrap().held, Held::PageCache(1));
    partition.configure(resolve(&[("durability", "persisted")])).await;
    assert_eq!(append(&partition, b"b", Acks::All).await.unwrap().held, Held::Synced(1));
    let synced = async {
        while partition.marks().persisted_end.get() < 2 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), synced).await.expect("what was only cached is synced too");
    partition.configure(resolve(&[("durability", "replicated")])).await;
    assert_eq!(append(&partition, b"c", Acks::Leader).await.unwrap().held, Held::PageCache(1));
}

/// Regression: requests were checked against the configuration of before until the partition's task ran. A batch was not opened although
/// the topic's new codec requires that.
#[tokio::test]
async fn changed_configuration_applies_before_the_task_runs() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(&[]).await;
    let changed = resolve(&[("compression.type", "zstd")]);
    // One thread: the task does not run in between.
    partition.configure(Arc::clone(&changed)).await;
    assert_eq!(partition.config(), changed);
}

/// Returns the bytes of the segment files in a data directory.
fn bytes_on_disk(dir: &Path) -> u64 {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let metadata = entry.metadata().unwrap();
        if metadata.is_dir() {
            bytes += bytes_on_disk(&entry.path());
        } else if entry.path().extension().is_some_and(|extension| extension == "log") {
            bytes += metadata.len();
        }
    }
    bytes
}

const LOCAL: &[(&str, &str)] =
    &[("segment.bytes", "16384"), ("remote.storage.enable", "false"), ("retention.ms", "-1")];

fn with(limit: &'static str) -> Vec<(&'static str, &'static str)> {
    LOCAL.iter().copied().chain([("retention.bytes", limit)]).collect()
}

/// Regression: a lower limit deleted nearly the whole log, because records below the log start were counted again. It freed no space,
/// because only segments in the object store were ever evicted.
#[tokio::test(flavor = "multi_thread")]
async fn size_retention_without_uploads_frees_disk_to_the_limit() {
    for bucket in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let bench = Bench::new(dir.path(), bucket).await;
        let partition = bench.open(LOCAL).await;
        for n in 0..100u8 {
            append(&partition, &[n; 4000], Acks::All).await.unwrap();
        }
        bench.settle(&partition).await;
        assert_eq!(partition.marks().log_start, Offset::ZERO);
        let before = bytes_on_disk(dir.path());

        partition.configure(resolve(&with("100000"))).await;
        bench.settle(&partition).await;
        let marks = partition.marks();
        let on_disk = bytes_on_disk(dir.path());
        assert!((100_000..100_000 + 16_384).contains(&on_disk), "{before} became {on_disk}, bucket: {bucket}");
        assert_eq!(partition.local_bytes(), on_disk);
        assert_eq!((marks.log_start, marks.tiered_end), (marks.local_start, Offset::ZERO));
        let (values, _) = read_all(&partition, marks.log_start.get()).await;
        let first = u8::try_from(marks.log_start.get()).unwrap();
        assert_eq!(values, (first..100).map(|n| vec![n; 4000]).collect::<Vec<_>>());
        assert_eq!(
            partition.reader().read(Offset::ZERO, 1.into()).await.unwrap_err(),
            ReadError::OutOfRange { offset: Offset::ZERO, start: marks.log_start, end: marks.high_watermark }
        );

        // Repeated steps delete nothing more.
        for _ in 0..3 {
            bench.upkeep.step(&partition).await.unwrap();
            assert_eq!(partition.marks(), marks);
        }
        partition.stop().await;
        drop(partition);
        let again = bench.reopen(&with("100000")).await;
        bench.settle(&again).await;
        assert_eq!(again.marks(), marks, "after a restart, bucket: {bucket}");
        assert_eq!(bytes_on_disk(dir.path()), on_disk);
        again.stop().await;
    }
}

/// Regression: the leader did not apply its own commit whose response was lost. Every later attempt met an unknown state, and nothing was
/// uploaded until another broker led.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_continue_after_lost_commit_response() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("retention.ms", "-1")]).await;
    // Two segments and more, each time.
    let write = async || {
        for n in 0..10u8 {
            append(&partition, &[n; 4000], Acks::All).await.unwrap();
        }
    };
    write().await;
    bench.upkeep.step(&partition).await.unwrap();
    write().await;
    bench.store.transactions([Some(Fault::AnswerLost)]);
    let lost = bench.upkeep.step(&partition).await.unwrap_err();
    assert!(matches!(lost, UpkeepError::Commit(TierCommitError::Store(_))), "{lost}");
    write().await;
    let unknown = bench.upkeep.step(&partition).await.unwrap_err();
    assert!(matches!(unknown, UpkeepError::Commit(TierCommitError::Changed { .. })), "{unknown}");
    bench.settle(&partition).await;
    let (marks, state) = (partition.marks(), bench.commits.current(bench.id).await.unwrap().unwrap());
    assert!(marks.tiered_end.get() > 20, "all but the active segment is in the bucket: {marks:?}");
    assert_eq!(state.tiered_end, marks.tiered_end);
    let segments = bench.tier.as_ref().unwrap().segments(Offset::ZERO, 100).await.unwrap();
    let ends: Vec<Offset> = segments.iter().map(|segment| segment.stamp.end).collect();
    let bases: Vec<Offset> = segments.iter().map(|segment| segment.stamp.base).collect();
    assert_eq!((bases[0], &bases[1..]), (Offset::ZERO, &ends[..ends.len() - 1]), "each was committed once");
    assert_eq!(ends.last(), Some(&marks.tiered_end));
    partition.stop().await;
}

/// The commit is in the metadata store, and the broker exited before it changed the disk.
#[tokio::test(flavor = "multi_thread")]
async fn files_below_log_start_after_crash_are_evicted() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(LOCAL).await;
    for n in 0..40u8 {
        append(&partition, &[n; 4000], Acks::All).await.unwrap();
    }
    partition.stop().await;
    let state = TierState { log_start: Offset::new(9).unwrap(), epoch: LeaderEpoch(4), ..TierState::default() };
    bench.commits.commit(bench.id, LeaderEpoch(4), None, &state).await.unwrap();
    drop(partition);
    let again = bench.reopen(LOCAL).await;
    assert_eq!(again.marks().log_start.get(), 9);
    bench.settle(&again).await;
    let marks = again.marks();
    assert!(marks.local_start > Offset::ZERO && marks.local_start.get() <= 9, "the segment of 9 stays: {marks:?}");
    assert_eq!(bytes_on_disk(dir.path()), again.local_bytes());
    assert_eq!(read_all(&again, 9).await.0.len(), 31);
    again.stop().await;
}

/// An offset is never assigned twice, even if only the metadata store shows that it was assigned once.
#[tokio::test(flavor = "multi_thread")]
async fn lost_log_without_object_store_restarts_at_log_start() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let state = TierState { log_start: Offset::new(600).unwrap(), epoch: LeaderEpoch(4), ..TierState::default() };
    bench.commits.commit(bench.id, LeaderEpoch(4), None, &state).await.unwrap();
    let partition = bench.reopen(LOCAL).await;
    let marks = partition.marks();
    assert_eq!((marks.log_start.get(), marks.log_end.get(), marks.high_watermark.get()), (600, 600, 600));
    assert_eq!((marks.local_start.get(), marks.tiered_end.get()), (600, 0));
    assert_eq!(append(&partition, b"x", Acks::All).await.unwrap().base.get(), 600);
    partition.stop().await;
}

/// The object store has records; uploads are turned off, deletion overtakes the tiered end, and uploads are turned on again.
#[tokio::test(flavor = "multi_thread")]
async fn reenabled_uploads_continue_after_deleted_records() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let on = [("segment.bytes", "16384"), ("retention.ms", "-1"), ("local.retention.ms", "-1")];
    let partition = bench.open(&on).await;
    for n in 0..40u8 {
        append(&partition, &[n; 4000], Acks::All).await.unwrap();
    }
    bench.settle(&partition).await;
    let tiered_end = partition.marks().tiered_end;
    assert!(tiered_end > Offset::ZERO);

    partition.configure(resolve(LOCAL)).await;
    for n in 40..100u8 {
        append(&partition, &[n; 4000], Acks::All).await.unwrap();
    }
    partition.configure(resolve(&with("100000"))).await;
    bench.settle(&partition).await;
    let marks = partition.marks();
    assert!(marks.log_start > tiered_end, "{marks:?}");
    assert_eq!((marks.tiered_end, partition.tiered_bytes()), (tiered_end, 0));
    let on_disk = bytes_on_disk(dir.path());
    assert!((100_000..100_000 + 16_384).contains(&on_disk), "{on_disk}");
    partition.stop().await;
    drop(partition);

    let again = bench.reopen(&with("100000")).await;
    bench.settle(&again).await;
    assert_eq!(again.marks(), marks, "a restart changes nothing");
    again.configure(resolve(&on)).await;
    bench.settle(&again).await;
    let caught_up = again.marks();
    assert!(caught_up.tiered_end > caught_up.log_start && caught_up.log_start == marks.log_start, "{caught_up:?}");
    let (values, _) = read_all(&again, marks.log_start.get()).await;
    let first = u8::try_from(marks.log_start.get()).unwrap();
    assert_eq!(values, (first..100).map(|n| vec![n; 4000]).collect::<Vec<_>>());
    again.stop().await;
}

/// A reader at the front during deletions gets intact batches, or the log start of that time.
#[tokio::test(flavor = "multi_thread")]
async fn reader_at_front_gets_log_start_during_deletion() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(LOCAL).await;
    let reader = partition.reader().clone();
    let front = async move {
        let (mut at, mut told) = (Offset::ZERO, 0);
        loop {
            match reader.read(at, 1.into()).await {
                Ok(_) => {}
                Err(ReadError::OutOfRange { offset, start, end }) => {
                    assert!(offset == at && start > at && start <= end, "{offset} {start} {end}");
                    (at, told) = (start, told + 1);
                }
                Err(ReadError::Closed) => return told,
                Err(error) => panic!("{error}"),
            }
            tokio::task::yield_now().await;
        }
    };
    let writer = async {
        partition.configure(resolve(&with("60000"))).await;
        for n in 0..200u8 {
            append(&partition, &[n; 4000], Acks::All).await.unwrap();
            bench.settle(&partition).await;
        }
        partition.stop().await;
    };
    let (told, ()) = tokio::join!(front, writer);
    assert!(told > 0);
}
