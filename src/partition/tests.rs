//! One partition on a real disk with a bucket in memory: writing, reading, upkeep, stopping.

use std::{path::Path, time::Duration};

use tokio::sync::Semaphore;

use super::*;
use crate::{
    cluster::{EmbeddedStore, Keys, MetaStore, PartitionValue, TierCommits, Transaction, Value as _},
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
    upkeep: Upkeep,
    queue: UpkeepQueue,
    tasks: Tasks,
    id: PartitionId,
}

impl Bench {
    async fn new(dir: &Path, bucket: bool) -> Self {
        let identity = Identity { cluster: "test".to_owned(), broker: BrokerId(1) };
        let options = Options { journal_bytes: 8 << 20, tail_bytes: 24 << 10, ..Options::default() };
        let log = Log::open(Arc::new(RealDisk), dir, &identity, options).unwrap();
        let id = PartitionId::new(TopicId::from_bytes([7; 16]), 0);
        let store = EmbeddedStore::in_memory();
        let keys = Keys::new("test").unwrap();
        let value = PartitionValue {
            replicas: vec![BrokerId(1)],
            leader: Some(BrokerId(1)),
            leader_epoch: LeaderEpoch(4),
            isr: vec![BrokerId(1)],
            elr: vec![],
            adding: vec![],
            removing: vec![],
        };
        store.transact(Transaction::new().put(keys.partition(id), value.encode())).await.unwrap();
        let tier = bucket.then(|| {
            let store = Store::open(&StoreOptions::new("memory://"), "test").unwrap();
            let cache = Cache::open(&CacheOptions::default(), &Metrics::new()).unwrap();
            PartitionTier::new(store, cache, id, TierState::default())
        });
        let upkeep = Upkeep::new(TierCommits::new(Arc::new(store), keys));
        Self { log, tier, upkeep, queue: UpkeepQueue::default(), tasks: Tasks::new(), id }
    }

    fn open(&self, config: &[(&str, &str)]) -> Arc<Partition> {
        let spec = Spec {
            id: self.id,
            topic: TopicName::new("events").unwrap(),
            epoch: LeaderEpoch(4),
            config: resolve(config),
            committed: None,
            tier: self.tier.clone(),
        };
        Partition::open(BrokerId(1), &self.log, spec, &self.queue, &self.tasks).unwrap()
    }

    /// Carries out upkeep until there is nothing left to do.
    async fn settle(&self, partition: &Partition) {
        while self.upkeep.step(partition).await.unwrap().more {}
        // The last command was only queued: a question behind it is answered after it.
        upkeep::local(partition).await.unwrap();
    }
}

fn resolve(config: &[(&str, &str)]) -> Arc<TopicConfig> {
    let overrides: ConfigMap = config.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Arc::new(TopicConfig::resolve(&ConfigMap::new(), &overrides).unwrap())
}

fn batch(value: &[u8]) -> Batch {
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(crate::task::clock::wall_ms(), None, Some(value), &[]).unwrap();
    builder.finish(None).unwrap()
}

async fn append(partition: &Partition, value: &[u8], acks: Acks) -> AppendResult {
    let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
    partition.append(batch(value), acks, permit).await.await.unwrap()
}

/// Everything from `from` to the high watermark, and where it came from.
async fn read_all(partition: &Partition, from: u64) -> (Vec<Vec<u8>>, Vec<Source>) {
    let (mut values, mut sources) = (Vec::new(), Vec::new());
    let mut at = Offset::new(from).unwrap();
    while let Some(fetched) = partition.reader().read(at, 1 << 20).await.unwrap() {
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
async fn what_is_acknowledged_is_read_and_survives_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(&[]);
    for n in 0..10u8 {
        let acked = append(&partition, &[n], Acks::All).await.unwrap();
        assert_eq!((acked.base.get(), acked.held), (u64::from(n), Held::Synced(1)));
    }
    let (values, sources) = read_all(&partition, 3).await;
    assert_eq!(values, (3..10u8).map(|n| vec![n]).collect::<Vec<_>>());
    assert_eq!(sources, [Source::Memory]);
    partition.stop().await;
    assert_eq!(append(&partition, b"late", Acks::All).await, Err(AppendError::Closing));
    assert_eq!(partition.reader().read(Offset::ZERO, 1).await.unwrap_err(), ReadError::Closed);
    drop(partition);
    let again = bench.open(&[]);
    assert_eq!(again.marks().high_watermark.get(), 10);
    assert_eq!(read_all(&again, 0).await.0.len(), 10);
}

/// A fast producer's batches come in large groups; one group once lay in one segment whatever its size.
#[tokio::test]
async fn a_segment_does_not_outgrow_its_topic_because_batches_came_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(&[("segment.bytes", "16384")]);
    // On one thread: all of them are queued before the partition has its turn.
    let mut answers = Vec::new();
    for n in 0..40_u8 {
        let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        answers.push(partition.append(batch(&[n; 4000]), Acks::All, permit).await);
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
async fn a_reader_crosses_bucket_disk_and_memory() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("local.retention.bytes", "40000")]);
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

#[tokio::test(flavor = "multi_thread")]
async fn a_tiered_write_is_answered_by_the_bucket_without_waiting_for_a_full_segment() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[]);
    let written = append(&partition, b"x", Acks::Tiered);
    let serve = async {
        loop {
            let id = bench.queue.next().await;
            let more = bench.upkeep.step(&partition).await.unwrap().more;
            bench.queue.done(id, more);
        }
    };
    let acked = tokio::select! {
        acked = written => acked,
        () = serve => unreachable!("it serves for ever"),
        () = tokio::time::sleep(Duration::from_secs(30)) => panic!("the bucket was not hurried"),
    };
    assert_eq!(acked.unwrap().held, Held::Tiered(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_moves_the_start_in_both_tiers_and_readers_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("retention.bytes", "50000")]);
    for n in 0..40u8 {
        append(&partition, &[n; 4000], Acks::All).await.unwrap();
    }
    bench.settle(&partition).await;
    let start = partition.marks().log_start;
    assert!(start > Offset::ZERO);
    let error = partition.reader().read(Offset::ZERO, 1).await.unwrap_err();
    let end = partition.marks().high_watermark;
    assert_eq!(error, ReadError::OutOfRange { offset: Offset::ZERO, start, end });
    assert_eq!(read_all(&partition, start.get()).await.0.len() as u64, end.since(start));
}

#[tokio::test(flavor = "multi_thread")]
async fn durability_changes_on_a_live_topic() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), false).await;
    let partition = bench.open(&[("durability", "replicated")]);
    assert_eq!(append(&partition, b"a", Acks::All).await.unwrap().held, Held::PageCache(1));
    partition.configure(resolve(&[("durability", "persisted")])).await;
    assert_eq!(append(&partition, b"b", Acks::All).await.unwrap().held, Held::Synced(1));
    let synced = async {
        while partition.marks().persisted_end.get() < 2 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), synced).await.expect("what was only cached is synced too");
    partition.configure(resolve(&[("durability", "replicated")])).await;
    assert_eq!(append(&partition, b"c", Acks::Leader).await.unwrap().held, Held::PageCache(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_is_found_to_the_record_in_every_tier() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("retention.ms", "-1")]);
    for group in 0..6i64 {
        let mut builder = BatchBuilder::new(Compression::None);
        for n in 0..4 {
            builder.push(1000 + group * 40 + n * 10, None, Some(&[0; 2000]), &[]).unwrap();
        }
        let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        let answer = partition.append(builder.finish(None).unwrap(), Acks::All, permit).await;
        answer.await.unwrap().unwrap();
    }
    for tiered in [false, true] {
        if tiered {
            bench.settle(&partition).await;
            assert!(partition.marks().tiered_end > Offset::ZERO);
        }
        for (time, offset) in [(0, 0), (1000, 0), (1001, 1), (1115, 12), (1230, 23)] {
            let found = partition.reader().offset_for_time(time).await.unwrap().expect("a record that young");
            assert_eq!((found.0.get(), found.1), (offset, 1000 + i64::try_from(offset).unwrap() * 10), "{time}");
        }
        assert_eq!(partition.reader().offset_for_time(1231).await.unwrap(), None);
    }
}
