//! Tiering over real HTTP. Whatever the store does, installed data reads back bit-exact, and failed uploads become
//! garbage.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use strandline::telemetry::Metrics;
use strandline::{
    cluster::{EmbeddedStore, Keys, MetaBindingStore, MetadataCache},
    log::{DataDir, DataDirIdentity, LogOptions, SimDisk},
    model::{BrokerId, Compression, LeaderEpoch, Offset, PartitionId, TopicId},
    record::BatchBuilder,
    task::{self, Tasks},
    tier::{
        BindingError, ChunkCache, ChunkCacheOptions, ObjectStoreOptions, PartitionLiveness, PartitionTier,
        SegmentSource, StagedManifest, StoreOwner, TierReadError, TierState, TierStore, UploadError, collect_garbage,
        doctor,
    },
};

use super::{Fault, Op, S3, stage};
use crate::test_timeout::eventually_async;

const EPOCH: LeaderEpoch = LeaderEpoch(0);

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn partition() -> PartitionId {
    PartitionId::new(TopicId::from_bytes([9; 16]), 0)
}

/// Returns a segment of `count` batches with one record of `size` bytes each, from a log in memory.
fn segment(count: u64, size: usize) -> (SegmentSource, Bytes) {
    let identity = DataDirIdentity { cluster: "test".to_owned(), broker: BrokerId(1) };
    let options = LogOptions { journal_bytes: 1 << 20, reserve_bytes: 0, step_mode: true, ..LogOptions::default() };
    let log = DataDir::open(Arc::new(SimDisk::new()), Path::new("/data"), &identity, options).unwrap();
    let mut replica = log.open_replica(partition(), at(0)).unwrap();
    replica.set_journaled(false);
    let mut content = BytesMut::new();
    for offset in 0..count {
        let mut state = offset + 1;
        let value: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        })
        .take(size)
        .collect();
        let mut builder = BatchBuilder::new(Compression::None);
        builder.push(i64::try_from(offset).unwrap(), None, Some(&value), &[]).unwrap();
        let mut batch = builder.finish(None).unwrap();
        batch.set_offset_and_epoch(at(offset), EPOCH);
        content.extend_from_slice(&batch.to_bytes());
        replica.append(&[batch]).unwrap();
    }
    replica.roll().unwrap();
    (SegmentSource::new(replica.export(at(0)).unwrap()), content.freeze())
}

fn tier(options: &ObjectStoreOptions, state: TierState) -> PartitionTier {
    tier_with(options, state, &ChunkCacheOptions::default(), &Metrics::new())
}

fn tier_with(
    options: &ObjectStoreOptions,
    state: TierState,
    cache: &ChunkCacheOptions,
    metrics: &Metrics,
) -> PartitionTier {
    let store = TierStore::open(options, "test").unwrap();
    PartitionTier::new(store, ChunkCache::open(cache, metrics).unwrap(), partition(), state)
}

async fn read_all(tier: &PartitionTier, end: u64) -> Result<Bytes, TierReadError> {
    let (mut out, mut next) = (BytesMut::new(), tier.state().log_start);
    while next < at(end) {
        let read = tier.read(next, (3 << 20).into()).await?;
        read.chunks.iter().for_each(|chunk| out.extend_from_slice(chunk));
        next = read.next;
    }
    Ok(out.freeze())
}

/// Uploads the one segment of a partition. Returns the tier state and the content of the segment.
async fn upload_segment(options: &ObjectStoreOptions, count: u64, size: usize) -> (TierState, Bytes) {
    let (source, content) = segment(count, size);
    let writer = tier(options, TierState::default());
    writer.install(stage(&writer, &source, EPOCH).await.unwrap());
    (writer.state(), content)
}

/// Installs a staged manifest, and reads everything back through a tier with an empty cache.
async fn install_and_compare(
    tier: &PartitionTier,
    options: &ObjectStoreOptions,
    staged: StagedManifest,
    content: &Bytes,
) {
    tier.install(staged);
    let fresh = self::tier(options, tier.state());
    let end = tier.state().tiered_end.get();
    assert!(read_all(&fresh, end).await.unwrap() == *content, "the installed bytes are equal");
}

/// Runs a garbage collection when all objects are older than the grace period. Returns the number of deleted objects.
async fn collect(options: &ObjectStoreOptions, state: &TierState) -> u64 {
    let store = TierStore::open(options, "test").unwrap();
    let later = task::clock::wall_ms() + 3_600_000;
    let live = |_| std::future::ready(PartitionLiveness::Current(state.clone()));
    let report = collect_garbage(&store, live, Duration::from_secs(60), later).await.unwrap();
    assert_eq!((report.skipped.len(), report.young, report.foreign), (0, 0, 0));
    report.deleted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_request_uploads_survive_every_fault() {
    let s3 = S3::start().await;
    let (source, content) = segment(40, 50_000);
    let faults = [
        (Op::Put, Fault::Status(503)),
        (Op::Put, Fault::Status(500)),
        (Op::Put, Fault::Refuse),
        (Op::Put, Fault::LostResponse),
        (Op::Put, Fault::Twice),
        (Op::Put, Fault::Delay(Duration::from_millis(200))),
        (Op::Put, Fault::CorruptRequest),
        (Op::Head, Fault::Status(503)),
        (Op::Head, Fault::Vanished),
        (Op::Get, Fault::CorruptResponse),
        (Op::Get, Fault::CutResponse),
        (Op::Get, Fault::Status(500)),
    ];
    for (number, (op, fault)) in faults.into_iter().enumerate() {
        let options = s3.options(&format!("single-{number}"));
        let tier = tier(&options, TierState::default());
        // Claims the prefix, so that the faults affect the upload.
        drop(tier.stage_trim(EPOCH).await.unwrap());
        let before = s3.faults().hits();
        s3.faults().inject(op, fault, 2);
        let staged = stage(&tier, &source, EPOCH).await.unwrap_or_else(|error| panic!("{op:?} {fault:?}: {error}"));
        assert_eq!(s3.faults().hits(), before + 2, "{op:?} {fault:?} happened");
        install_and_compare(&tier, &options, staged, &content).await;
        s3.faults().clear();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn multipart_uploads_survive_every_fault() {
    let s3 = S3::start().await;
    let (source, content) = segment(40, 600_000);
    let faults = [
        (Op::StartUpload, Fault::Status(503)),
        (Op::StartUpload, Fault::LostResponse),
        (Op::PutPart, Fault::Status(503)),
        (Op::PutPart, Fault::LostResponse),
        (Op::PutPart, Fault::Twice),
        (Op::PutPart, Fault::CorruptRequest),
        (Op::EndUpload, Fault::Status(500)),
        (Op::EndUpload, Fault::LostResponse),
        (Op::EndUpload, Fault::Refuse),
    ];
    for (number, (op, fault)) in faults.into_iter().enumerate() {
        // Longer than one attempt takes on a busy machine: no retry starts after this time.
        let retry_for = Duration::from_secs(60);
        let options = ObjectStoreOptions { retry_for, ..s3.options(&format!("multipart-{number}")) };
        let tier = tier(&options, TierState::default());
        let before = s3.faults().hits();
        s3.faults().inject(op, fault, 1);
        let staged = stage(&tier, &source, EPOCH).await.unwrap_or_else(|error| panic!("{op:?} {fault:?}: {error}"));
        assert_eq!(s3.faults().hits(), before + 1, "{op:?} {fault:?} happened");
        install_and_compare(&tier, &options, staged, &content).await;
        s3.faults().clear();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upload_fails_while_the_store_is_down_and_then_succeeds() {
    let s3 = S3::start().await;
    let options = s3.options("gone");
    let (source, content) = segment(10, 1000);
    let tier = tier(&options, TierState::default());
    s3.faults().set_down(true);
    let error = stage(&tier, &source, EPOCH).await.unwrap_err();
    assert!(matches!(error, UploadError::Binding(BindingError::Store(_))) && error.retryable(), "{error}");
    s3.faults().set_down(false);
    // Down in the middle: the segment object exists, its manifest does not.
    s3.faults().inject_at(Op::Put, "manifest-", 0, Fault::Status(503), usize::MAX);
    let error = stage(&tier, &source, EPOCH).await.unwrap_err();
    assert!(matches!(error, UploadError::Store(_)) && error.retryable(), "{error}");
    s3.faults().clear();
    let staged = stage(&tier, &source, EPOCH).await.unwrap();
    install_and_compare(&tier, &options, staged, &content).await;
    assert_eq!(collect(&options, &tier.state()).await, 1, "the object of the first attempt");
    assert_eq!(collect(&options, &tier.state()).await, 0);
    assert!(read_all(&self::tier(&options, tier.state()), 10).await.unwrap() == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_survive_faults_without_wrong_data() {
    let s3 = S3::start().await;
    let options = s3.options("reads");
    let (state, content) = upload_segment(&options, 80, 100_000).await;
    let faults = [
        Fault::Status(503),
        Fault::Refuse,
        Fault::LostResponse,
        Fault::CorruptResponse,
        Fault::CutResponse,
        Fault::Twice,
    ];
    for fault in faults {
        for pass in 0..4 {
            s3.faults().inject_at(Op::Get, "", pass, fault, 1);
            let fresh = tier(&options, state.clone());
            assert!(read_all(&fresh, 80).await.unwrap() == content, "{fault:?} after {pass}");
            s3.faults().clear();
        }
    }
    // A lasting corruption, loss or failure is reported with the object's name.
    for (fault, expected) in
        [(Fault::CorruptResponse, "corrupt"), (Fault::Vanished, "missing"), (Fault::Status(500), "serve")]
    {
        s3.faults().inject_at(Op::Get, ".segment", 0, fault, usize::MAX);
        let error = read_all(&tier(&options, state.clone()), 80).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains(".segment"), "{text}");
        assert_eq!(error.retryable(), expected == "serve");
        s3.faults().clear();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_reads_of_one_chunk_make_one_request() {
    let s3 = S3::start().await;
    let options = s3.options("flight");
    let (state, _) = upload_segment(&options, 5, 100_000).await;
    let fresh = tier(&options, state.clone());
    let before = s3.faults().requests(Op::Get);
    s3.faults().inject(Op::Get, Fault::Delay(Duration::from_millis(100)), 100);
    let reads = futures::future::join_all((0..32).map(|_| fresh.read(at(0), (1 << 20).into()))).await;
    assert!(reads.iter().all(Result::is_ok));
    assert_eq!(s3.faults().requests(Op::Get) - before, 3, "manifest, footer, chunk");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequential_reads_are_read_ahead_with_few_requests() {
    let s3 = S3::start().await;
    let options = s3.options("ahead");
    let (state, content) = upload_segment(&options, 100, 200_000).await;
    let metrics = Metrics::new();
    let fresh = tier_with(&options, state.clone(), &ChunkCacheOptions::default(), &metrics);
    let before = s3.faults().requests(Op::Get);
    let chunks = content.len().div_ceil(1 << 20);
    let (mut next, mut out) = (at(0), BytesMut::new());
    // The read-ahead window doubles with each sequential read, and at least half of the window is fetched behind that
    // read. The test waits for these chunks, so that the reader never arrives before them.
    for window in [0, 1, 2, 4, 8].into_iter().chain(std::iter::repeat(16)) {
        let read = fresh.read(next, (1 << 20).into()).await.unwrap();
        read.chunks.iter().for_each(|chunk| out.extend_from_slice(chunk));
        let ahead = chunks.min(out.len().div_ceil(1 << 20) + window / 2) as u64;
        eventually_async("the chunks are read ahead", || async { (metrics.cache_misses.get() >= ahead).then_some(()) })
            .await;
        next = read.next;
        if next == at(100) {
            break;
        }
    }
    assert!(out == content);
    assert_eq!(metrics.cache_misses.get(), chunks as u64, "every chunk once");
    let requests = s3.faults().requests(Op::Get) - before - 2;
    assert!(requests < chunks * 4 / 5, "{requests} requests for {chunks} chunks, without manifest and footer");
}

/// A cache full of chunks that were read once must still accept read-ahead chunks. Otherwise all of these would be
/// fetched twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_cache_keeps_read_ahead_chunks_for_their_reader() {
    let s3 = S3::start().await;
    let options = s3.options("full");
    let (state, content) = upload_segment(&options, 160, 200_000).await;
    let metrics = Metrics::new();
    let small = ChunkCacheOptions { memory_bytes: 28 << 20, ..ChunkCacheOptions::default() };
    let fresh = tier_with(&options, state.clone(), &small, &metrics);
    let chunks = content.len().div_ceil(1 << 20) as u64;
    for pass in 1..=2 {
        assert!(read_all(&fresh, 160).await.unwrap() == content);
        let fetched = metrics.cache_misses.get();
        assert!((chunks..=pass * chunks).contains(&fetched), "pass {pass}: {fetched} fetched of {chunks}");
    }
}

/// If the memory is too small for the read-ahead window, less is fetched ahead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiny_cache_causes_few_duplicate_fetches() {
    let s3 = S3::start().await;
    let options = s3.options("tiny");
    let (state, content) = upload_segment(&options, 160, 200_000).await;
    let metrics = Metrics::new();
    let tiny = ChunkCacheOptions { memory_bytes: 8 << 20, ..ChunkCacheOptions::default() };
    let fresh = tier_with(&options, state.clone(), &tiny, &metrics);
    assert!(read_all(&fresh, 160).await.unwrap() == content);
    let (chunks, fetched) = (content.len().div_ceil(1 << 20) as u64, metrics.cache_misses.get());
    assert!((chunks..chunks * 2).contains(&fetched), "{fetched} fetched of {chunks}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_clusters_do_not_share_a_prefix() {
    let s3 = S3::start().await;
    let options = s3.options("claimed");
    let stores: Vec<_> = ["red", "blue"].map(|cluster| TierStore::open(&options, cluster).unwrap()).into();
    let claims = futures::future::join_all(stores.iter().map(TierStore::bind)).await;
    assert_eq!(claims.iter().filter(|claim| claim.is_ok()).count(), 1, "{claims:?}");
    assert!(claims.iter().any(|claim| matches!(claim, Err(BindingError::Foreign { .. }))));
}

/// On a store without conditional puts, the last writer of the cluster marker is its writer. All brokers write the same
/// content.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_brokers_of_one_cluster_share_a_prefix() {
    let s3 = S3::start().await;
    s3.faults().set_ignore_conditions(true);
    for round in 0..10 {
        let options = s3.options(&format!("shared-{round}"));
        let (meta, keys, tasks) = (Arc::new(EmbeddedStore::in_memory()), Keys::new("test").unwrap(), Tasks::new());
        let view = MetadataCache::start(Arc::clone(&meta) as _, keys.clone(), &tasks);
        let brokers = || -> Vec<TierStore> {
            let open = || {
                let bindings = MetaBindingStore::new(Arc::clone(&meta) as _, keys.clone(), view.clone(), false);
                let owner = StoreOwner { bindings: Some(Arc::new(bindings)), ..StoreOwner::default() };
                TierStore::open(&options, "test").unwrap().owned_by(owner)
            };
            vec![open(), open(), open(), open()]
        };
        for start in ["the first", "the second"] {
            let brokers = brokers();
            for claim in futures::future::join_all(brokers.iter().map(TierStore::bind)).await {
                claim.unwrap_or_else(|error| panic!("round {round}, {start} start: {error}"));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_keys_fail_at_once_and_are_never_printed() {
    let s3 = S3::start().await;
    let mut options = s3.options("keys");
    options.keys.as_mut().unwrap().secret_access_key = "wrong".to_owned();
    let error = TierStore::open(&options, "test").unwrap().bind().await.unwrap_err();
    assert!(!error.retryable() && error.to_string().contains("credentials"), "{error}");
    assert!(!format!("{options:?}").contains("wrong"), "a secret is never printed");
    s3.create_bucket("other");
    let mut options = s3.options("x");
    options.url = "s3://other/x".to_owned();
    TierStore::open(&options, "test").unwrap().bind().await.unwrap();
    assert_eq!(s3.environment()[0].0, "AWS_ACCESS_KEY_ID");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn doctor_passes_a_good_store_and_finds_faults() {
    let s3 = S3::start().await;
    let outcome = async |options: &ObjectStoreOptions, name: &str| {
        let checks = doctor::examine(options).await.unwrap();
        checks.into_iter().find(|check| check.name == name).unwrap_or_else(|| panic!("no check {name}"))
    };
    let options = s3.options("doctor");
    for check in doctor::examine(&options).await.unwrap() {
        assert_eq!(check.outcome, doctor::CheckOutcome::Pass, "{check:?}");
    }
    s3.faults().set_ignore_conditions(true);
    let check = outcome(&options, "conditional put").await;
    assert_eq!(check.outcome, doctor::CheckOutcome::Unsupported);
    assert!(check.detail.contains("silently ignored") && check.meaning.contains("safe without it"), "{check:?}");
    s3.faults().clear();
    s3.faults().inject(Op::Get, Fault::CorruptResponse, usize::MAX);
    assert_eq!(outcome(&options, "ranged get").await.outcome, doctor::CheckOutcome::Fail);
    s3.faults().clear();
    s3.faults().inject(Op::Delete, Fault::Status(403), usize::MAX);
    let check = outcome(&options, "delete").await;
    assert!(check.outcome == doctor::CheckOutcome::Fail && check.detail.contains("403"), "{check:?}");
    s3.faults().clear();
    let mut wrong = s3.options("doctor");
    wrong.keys.as_mut().unwrap().secret_access_key = "wrong".to_owned();
    let checks = doctor::examine(&wrong).await.unwrap();
    assert_eq!((checks[0].name, checks[0].outcome), ("put", doctor::CheckOutcome::Fail), "{checks:?}");
}
