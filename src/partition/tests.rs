//! One partition on a real disk with an object store in memory: writes, reads, maintenance, stop.

mod acks_tiered;
mod by_time;

use std::{path::Path, sync::Arc, time::Duration};

use tokio::sync::Semaphore;

use super::*;
use crate::{
    cluster::{
        EmbeddedStore, Keys, MetaStore, PartitionValue, Revision, TierCommitError, TierCommits, Transaction,
        Value as _,
        faulty::{Fault, FaultyStore},
    },
    log::{DataDir, DataDirIdentity, LogOptions, RealDisk},
    model::{
        Acks, BrokerId, Compression, ConfigMap, LeaderEpoch, Offset, PartitionId, TopicConfig, TopicId, TopicName,
    },
    record::{Batch, BatchBuilder},
    task::Tasks,
    telemetry::Metrics,
    tier::{ChunkCache, ChunkCacheOptions, ObjectStoreOptions, PartitionTier, TierState, TierStore},
};

/// A standalone broker with one partition.
struct Bench {
    log: DataDir,
    tier: Option<PartitionTier>,
    store: FaultyStore,
    commits: TierCommits,
    maintenance: MaintenanceRunner,
    queue: MaintenanceQueue,
    tasks: Tasks,
    id: PartitionId,
}

impl Bench {
    async fn new(dir: &Path, object_store: bool) -> Self {
        let identity = DataDirIdentity { cluster: "test".to_owned(), broker: BrokerId(1) };
        let options = LogOptions { journal_bytes: 8 << 20, tail_bytes: 24 << 10, ..LogOptions::default() };
        let log = DataDir::open(Arc::new(RealDisk::default()), dir, &identity, options).unwrap();
        let id = PartitionId::new(TopicId::from_bytes([7; 16]), 0);
        let store = EmbeddedStore::in_memory();
        let keys = Keys::new("test").unwrap();
        store.transact(Transaction::new().put(keys.partition(id), standalone_value().encode())).await.unwrap();
        let tier = object_store.then(|| {
            let store = TierStore::open(&ObjectStoreOptions::new("memory://"), "test").unwrap();
            let cache = ChunkCache::open(&ChunkCacheOptions::default(), &Metrics::new()).unwrap();
            PartitionTier::new(store, cache, id, TierState::default())
        });
        let store = FaultyStore::new(store);
        let commits = TierCommits::new(Arc::new(store.clone()), keys);
        let maintenance = MaintenanceRunner::new(commits.clone());
        Self { log, tier, store, commits, maintenance, queue: MaintenanceQueue::default(), tasks: Tasks::new(), id }
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
        let spec = ReplicaSpec {
            id: self.id,
            topic: TopicName::new("events").unwrap(),
            config: resolve(config),
            committed: committed.clone(),
            tier: self.tier.clone(),
            standalone: true,
            discard_local: false,
            max_lag_time: Duration::MAX,
        };
        let ctx = PartitionContext::standalone();
        let partition = Partition::open(BrokerId(1), &self.log, spec, ctx, &self.queue, &self.tasks).unwrap();
        let assignment = PartitionAssignment {
            value: Arc::new(standalone_value()),
            revision: Revision::ZERO,
            committed,
            registered: std::collections::BTreeMap::new(),
        };
        partition.assign(assignment).await;
        partition
    }

    /// Runs maintenance steps with uploads until no work is left.
    async fn run_maintenance(&self, partition: &Partition) {
        while self.maintenance.step(partition).await.unwrap().more {}
        // The last command of a step may still be queued. The response to this later command arrives after the task has
        // handled it.
        partition.describe_segments().await.unwrap();
    }

    /// Runs maintenance steps for the queue, as a broker's worker does, until `result` is ready.
    async fn serve_until<T>(&self, partition: &Partition, result: impl Future<Output = T>) -> T {
        let serve = async {
            loop {
                let id = self.queue.next().await;
                let more = self.maintenance.step(partition).await.unwrap().more;
                self.queue.done(id, more);
            }
        };
        tokio::select! {
            result = result => result,
            () = serve => unreachable!("the worker never ends"),
            () = tokio::time::sleep(Duration::from_secs(30)) => panic!("the write was not uploaded in time"),
        }
    }
}

/// Returns the value of a partition whose only replica is on this broker.
fn standalone_value() -> PartitionValue {
    PartitionValue::new(vec![BrokerId(1)], LeaderEpoch(4))
}

fn resolve(config: &[(&str, &str)]) -> Arc<TopicConfig> {
    let overrides: ConfigMap = config.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Arc::new(TopicConfig::resolve(&ConfigMap::new(), &overrides).unwrap())
}

fn batch(value: &[u8]) -> Batch {
    batch_at(crate::task::clock::wall_ms(), value)
}

/// Returns a batch of one record with this timestamp.
fn batch_at(timestamp_ms: i64, value: &[u8]) -> Batch {
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

/// Reads everything from `from` to the high watermark. Returns the values, and the source of each read.
async fn read_all(partition: &Partition, from: u64) -> (Vec<Vec<u8>>, Vec<ReadSource>) {
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
        assert_eq!((acked.base.get(), acked.durability), (u64::from(n), AckDurability::Persisted(1)));
    }
    let (values, sources) = read_all(&partition, 3).await;
    assert_eq!(values, (3..10u8).map(|n| vec![n]).collect::<Vec<_>>());
    assert_eq!(sources, [ReadSource::Memory]);
    partition.stop().await;
    assert_eq!(append(&partition, b"late", Acks::All).await, Err(AppendError::Closing));
    assert_eq!(partition.reader().read(Offset::ZERO, 1.into()).await.unwrap_err(), ReadError::Closed);
    drop(partition);
    let reopened = bench.open(&[]).await;
    assert_eq!(reopened.watermarks().high_watermark.get(), 10);
    assert_eq!(read_all(&reopened, 0).await.0.len(), 10);
}

/// Regression: all batches that were queued together were written to one segment, even if they exceeded
/// `segment.bytes`.
#[tokio::test]
async fn queued_batches_do_not_exceed_segment_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(&[("segment.bytes", "16384")]).await;
    // The test has one thread, so all writes are queued before the partition's task runs.
    let mut receivers = Vec::new();
    for n in 0..40_u8 {
        let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        receivers.push(partition.append(batch(&[n; 4000]), None, Acks::All, permit).await);
    }
    for receiver in receivers {
        receiver.await.unwrap().unwrap();
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
    bench.run_maintenance(&partition).await;
    let watermarks = partition.watermarks();
    assert!(watermarks.local_start > Offset::ZERO, "segments were evicted: {watermarks:?}");
    assert!(watermarks.local_start <= watermarks.tiered_end && watermarks.tiered_end <= watermarks.high_watermark);
    let (values, sources) = read_all(&partition, 0).await;
    assert_eq!(values, (0..60).map(value).collect::<Vec<_>>());
    for source in [ReadSource::ObjectStore, ReadSource::Disk, ReadSource::Memory] {
        assert!(sources.contains(&source), "{source:?} was read: {sources:?}");
    }
}

/// Regression: the partition's tier receives a new log start before the partition's task applies it. Meanwhile, reads
/// below that log start failed with an object store error.
#[tokio::test(flavor = "multi_thread")]
async fn read_below_a_log_start_that_has_just_moved_is_out_of_range() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("local.retention.bytes", "0")]).await;
    for _ in 0..30 {
        append(&partition, &[7; 4000], Acks::All).await.unwrap();
    }
    bench.run_maintenance(&partition).await;
    let tier = bench.tier.as_ref().unwrap();
    let start = Offset::new(7).unwrap();
    tier.apply_state(TierState { log_start: start, ..tier.state() });
    assert_eq!(partition.watermarks().log_start, Offset::ZERO, "the task has not applied the log start");
    let offset = Offset::new(3).unwrap();
    let end = partition.watermarks().high_watermark;
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
    bench.run_maintenance(&partition).await;
    let start = partition.watermarks().log_start;
    assert!(start > Offset::ZERO);
    let error = partition.reader().read(Offset::ZERO, 1.into()).await.unwrap_err();
    let end = partition.watermarks().high_watermark;
    assert_eq!(error, ReadError::OutOfRange { offset: Offset::ZERO, start, end });
    assert_eq!(read_all(&partition, start.get()).await.0.len() as u64, end.since(start));
}

/// Regression: in the object store, records without a timestamp counted as older than all other records, and were
/// deleted right after their upload.
#[tokio::test(flavor = "multi_thread")]
async fn records_without_timestamp_expire_by_time_of_append() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let config = [("segment.bytes", "16384"), ("retention.ms", "3600000")];
    let partition = bench.open(&config).await;
    for n in 0..20u8 {
        append_batch(&partition, batch_at(-1, &[n; 4000]), Acks::All).await.unwrap();
    }
    bench.run_maintenance(&partition).await;
    let watermarks = partition.watermarks();
    assert!(watermarks.tiered_end > Offset::ZERO, "{watermarks:?}");
    assert_eq!(watermarks.log_start, Offset::ZERO, "no record is an hour old");
    partition.update_config(resolve(&[("segment.bytes", "16384"), ("retention.ms", "1")])).await;
    let all_removed = async {
        while partition.watermarks().log_start < partition.watermarks().high_watermark {
            bench.run_maintenance(&partition).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all_removed).await.expect("all records expire after a millisecond");
}

/// Regression: the local copy of a segment with a record timestamp far in the future was never evicted. That of a
/// segment with timestamps of 1970 was evicted at once.
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
            append_batch(&partition, batch_at(timestamp_ms, &[n; 4000]), Acks::All).await.unwrap();
        }
        bench.run_maintenance(&partition).await;
        let watermarks = partition.watermarks();
        assert!(
            watermarks.tiered_end > Offset::ZERO && watermarks.local_start == Offset::ZERO,
            "{timestamp_ms}: {watermarks:?}"
        );
        partition.update_config(resolve(&config("1"))).await;
        let all_removed = async {
            while partition.watermarks().local_start < watermarks.tiered_end {
                bench.run_maintenance(&partition).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), all_removed)
            .await
            .expect("all records expire after a millisecond");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn durability_change_applies_to_open_partition() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(&[("durability", "replicated")]).await;
    assert_eq!(append(&partition, b"a", Acks::All).await.unwrap().durability, AckDurability::PageCache(1));
    partition.update_config(resolve(&[("durability", "persisted")])).await;
    assert_eq!(append(&partition, b"b", Acks::All).await.unwrap().durability, AckDurability::Persisted(1));
    let synced = async {
        while partition.watermarks().persisted_end.get() < 2 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), synced).await.expect("records in the page cache are synced too");
    partition.update_config(resolve(&[("durability", "replicated")])).await;
    assert_eq!(append(&partition, b"c", Acks::Leader).await.unwrap().durability, AckDurability::PageCache(1));
}

/// Regression: requests were checked against the previous configuration until the partition's task ran. A batch was not
/// recompressed although the topic's new codec required that.
#[tokio::test]
async fn changed_configuration_applies_before_the_task_runs() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(&[]).await;
    let changed = resolve(&[("compression.type", "zstd")]);
    // The test has one thread, so the partition's task does not run in between.
    partition.update_config(Arc::clone(&changed)).await;
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

/// Topic configuration without uploads and without retention limits.
const LOCAL: &[(&str, &str)] =
    &[("segment.bytes", "16384"), ("remote.storage.enable", "false"), ("retention.ms", "-1")];

/// Returns [`LOCAL`] with this limit of `retention.bytes`.
fn local_with_limit(limit: &'static str) -> Vec<(&'static str, &'static str)> {
    LOCAL.iter().copied().chain([("retention.bytes", limit)]).collect()
}

/// Regression: a lower limit deleted nearly the whole log, because records below the log start were counted again. The
/// deletion freed no space, because only segments in the object store were evicted.
#[tokio::test(flavor = "multi_thread")]
async fn size_retention_without_uploads_frees_disk_to_the_limit() {
    for object_store in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let bench = Bench::new(dir.path(), object_store).await;
        let partition = bench.open(LOCAL).await;
        for n in 0..100u8 {
            append(&partition, &[n; 4000], Acks::All).await.unwrap();
        }
        bench.run_maintenance(&partition).await;
        assert_eq!(partition.watermarks().log_start, Offset::ZERO);
        let before = bytes_on_disk(dir.path());

        partition.update_config(resolve(&local_with_limit("100000"))).await;
        bench.run_maintenance(&partition).await;
        let watermarks = partition.watermarks();
        let on_disk = bytes_on_disk(dir.path());
        assert!(
            (100_000..100_000 + 16_384).contains(&on_disk),
            "{before} became {on_disk}, object store: {object_store}"
        );
        assert_eq!(partition.local_bytes(), on_disk);
        assert_eq!((watermarks.log_start, watermarks.tiered_end), (watermarks.local_start, Offset::ZERO));
        let (values, _) = read_all(&partition, watermarks.log_start.get()).await;
        let first = u8::try_from(watermarks.log_start.get()).unwrap();
        assert_eq!(values, (first..100).map(|n| vec![n; 4000]).collect::<Vec<_>>());
        assert_eq!(
            partition.reader().read(Offset::ZERO, 1.into()).await.unwrap_err(),
            ReadError::OutOfRange { offset: Offset::ZERO, start: watermarks.log_start, end: watermarks.high_watermark }
        );

        // Further steps delete no more records.
        for _ in 0..3 {
            bench.maintenance.step(&partition).await.unwrap();
            assert_eq!(partition.watermarks(), watermarks);
        }
        partition.stop().await;
        drop(partition);
        let reopened = bench.reopen(&local_with_limit("100000")).await;
        bench.run_maintenance(&reopened).await;
        assert_eq!(reopened.watermarks(), watermarks, "after a restart, object store: {object_store}");
        assert_eq!(bytes_on_disk(dir.path()), on_disk);
        reopened.stop().await;
    }
}

/// Regression: the leader did not apply its own commit if the response was lost. Every later commit then failed,
/// because the metadata store had a state that the leader did not expect.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_continue_after_lost_commit_response() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("retention.ms", "-1")]).await;
    // Writes more than two segments.
    let write = async || {
        for n in 0..10u8 {
            append(&partition, &[n; 4000], Acks::All).await.unwrap();
        }
    };
    write().await;
    bench.maintenance.step(&partition).await.unwrap();
    write().await;
    bench.store.fail_transactions([Some(Fault::ResponseLost)]);
    let lost = bench.maintenance.step(&partition).await.unwrap_err();
    assert!(matches!(lost, MaintenanceError::Commit(TierCommitError::Store(_))), "{lost}");
    write().await;
    let changed = bench.maintenance.step(&partition).await.unwrap_err();
    assert!(matches!(changed, MaintenanceError::Commit(TierCommitError::Changed { .. })), "{changed}");
    bench.run_maintenance(&partition).await;
    let (watermarks, state) = (partition.watermarks(), bench.commits.current(bench.id).await.unwrap().unwrap());
    assert!(watermarks.tiered_end.get() > 20, "all sealed segments are in the object store: {watermarks:?}");
    assert_eq!(state.tiered_end, watermarks.tiered_end);
    let segments = bench.tier.as_ref().unwrap().segments(Offset::ZERO, 100).await.unwrap();
    let ends: Vec<Offset> = segments.iter().map(|segment| segment.stamp.end).collect();
    let bases: Vec<Offset> = segments.iter().map(|segment| segment.stamp.base).collect();
    assert_eq!((bases[0], &bases[1..]), (Offset::ZERO, &ends[..ends.len() - 1]), "each segment was committed once");
    assert_eq!(ends.last(), Some(&watermarks.tiered_end));
    partition.stop().await;
}

/// The broker exits after the commit of a log start, and before it evicts segments. Maintenance after the restart
/// evicts them.
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
    let reopened = bench.reopen(LOCAL).await;
    assert_eq!(reopened.watermarks().log_start.get(), 9);
    bench.run_maintenance(&reopened).await;
    let watermarks = reopened.watermarks();
    assert!(
        watermarks.local_start > Offset::ZERO && watermarks.local_start.get() <= 9,
        "the segment with offset 9 stays: {watermarks:?}"
    );
    assert_eq!(bytes_on_disk(dir.path()), reopened.local_bytes());
    assert_eq!(read_all(&reopened, 9).await.0.len(), 31);
    reopened.stop().await;
}

/// The broker lost its log, and only the log start in the metadata store shows which offsets were assigned. The new log
/// must not assign them again.
#[tokio::test(flavor = "multi_thread")]
async fn lost_log_without_object_store_restarts_at_log_start() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let state = TierState { log_start: Offset::new(600).unwrap(), epoch: LeaderEpoch(4), ..TierState::default() };
    bench.commits.commit(bench.id, LeaderEpoch(4), None, &state).await.unwrap();
    let partition = bench.reopen(LOCAL).await;
    let watermarks = partition.watermarks();
    assert_eq!(
        (watermarks.log_start.get(), watermarks.log_end.get(), watermarks.high_watermark.get()),
        (600, 600, 600)
    );
    assert_eq!((watermarks.local_start.get(), watermarks.tiered_end.get()), (600, 0));
    assert_eq!(append(&partition, b"x", Acks::All).await.unwrap().base.get(), 600);
    partition.stop().await;
}

/// Uploads are disabled, the log start moves above the tiered end, and uploads are enabled again. Uploads then continue
/// at the log start, and all records from there on stay readable.
#[tokio::test(flavor = "multi_thread")]
async fn reenabled_uploads_continue_after_deleted_records() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let on = [("segment.bytes", "16384"), ("retention.ms", "-1"), ("local.retention.ms", "-1")];
    let partition = bench.open(&on).await;
    for n in 0..40u8 {
        append(&partition, &[n; 4000], Acks::All).await.unwrap();
    }
    bench.run_maintenance(&partition).await;
    let tiered_end = partition.watermarks().tiered_end;
    assert!(tiered_end > Offset::ZERO);

    partition.update_config(resolve(LOCAL)).await;
    for n in 40..100u8 {
        append(&partition, &[n; 4000], Acks::All).await.unwrap();
    }
    partition.update_config(resolve(&local_with_limit("100000"))).await;
    bench.run_maintenance(&partition).await;
    let watermarks = partition.watermarks();
    assert!(watermarks.log_start > tiered_end, "{watermarks:?}");
    assert_eq!((watermarks.tiered_end, partition.tiered_bytes()), (tiered_end, 0));
    let on_disk = bytes_on_disk(dir.path());
    assert!((100_000..100_000 + 16_384).contains(&on_disk), "{on_disk}");
    partition.stop().await;
    drop(partition);

    let reopened = bench.reopen(&local_with_limit("100000")).await;
    bench.run_maintenance(&reopened).await;
    assert_eq!(reopened.watermarks(), watermarks, "a restart changes nothing");
    reopened.update_config(resolve(&on)).await;
    bench.run_maintenance(&reopened).await;
    let caught_up = reopened.watermarks();
    assert!(caught_up.tiered_end > caught_up.log_start && caught_up.log_start == watermarks.log_start, "{caught_up:?}");
    let (values, _) = read_all(&reopened, watermarks.log_start.get()).await;
    let first = u8::try_from(watermarks.log_start.get()).unwrap();
    assert_eq!(values, (first..100).map(|n| vec![n; 4000]).collect::<Vec<_>>());
    reopened.stop().await;
}

/// A reader at the log start, while segments are deleted, gets intact batches or an error with the new log start.
#[tokio::test(flavor = "multi_thread")]
async fn reader_at_log_start_gets_new_one_during_deletion() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(LOCAL).await;
    let reader = partition.reader().clone();
    let read_loop = async move {
        let (mut at, mut errors) = (Offset::ZERO, 0);
        loop {
            match reader.read(at, 1.into()).await {
                Ok(_) => {}
                Err(ReadError::OutOfRange { offset, start, end }) => {
                    assert!(offset == at && start > at && start <= end, "{offset} {start} {end}");
                    (at, errors) = (start, errors + 1);
                }
                Err(ReadError::Closed) => return errors,
                Err(error) => panic!("{error}"),
            }
            tokio::task::yield_now().await;
        }
    };
    let writer = async {
        partition.update_config(resolve(&local_with_limit("60000"))).await;
        for n in 0..200u8 {
            append(&partition, &[n; 4000], Acks::All).await.unwrap();
            bench.run_maintenance(&partition).await;
        }
        partition.stop().await;
    };
    let (errors, ()) = tokio::join!(read_loop, writer);
    assert!(errors > 0);
}
