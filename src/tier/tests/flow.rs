//! Staging, commits, reads, trims, and garbage collection.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::FutureExt as _;

use super::{chunk_cache::CachedMetadata, *};
use crate::{log::ReadLimits, task::lock::Mutex};

/// Magic number of tmpfs, which consists only of page cache (statfs(2)).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Returns a tier with three segments of epochs 0, 0 and 2, and all their bytes.
async fn three_segments(options: &ObjectStoreOptions, size: usize) -> (PartitionTier, Segments, Bytes) {
    let segments = Segments::new();
    let tier = open(options);
    let mut all = BytesMut::new();
    for (number, epoch) in [0, 0, 2].into_iter().enumerate() {
        let (source, content) = segments.source(number as u64 * 300, 100, size, epoch);
        let staged = stage(&tier, &source, LeaderEpoch(epoch)).await.unwrap();
        assert_eq!(staged.replaces(), &tier.state());
        tier.install(staged);
        all.extend_from_slice(&content);
    }
    (tier, segments, all.freeze())
}

#[tokio::test]
async fn installed_segments_read_back_bit_exact() {
    let (tier, _segments, all) = three_segments(&ObjectStoreOptions::new("memory://"), 3000).await;
    assert_eq!((tier.state().version(), tier.state().tiered_end), (3, at(900)));
    assert_eq!(tier.bytes(), all.len() as u64);
    for max in [1, 10_000, 1 << 20, 100 << 20] {
        assert_eq!(read_all(&tier, 0, 900, max).await, all, "reads of {max}");
    }
    // A read from the middle of a batch returns the batch that contains the offset.
    let read = tier.read(at(301), 1.into()).await.unwrap();
    assert_eq!(read.next, at(303));
    let footer = tier.last_footer().await.unwrap().unwrap();
    assert_eq!(footer.epochs, [(LeaderEpoch(2), at(600))]);
    // The producer state begins with the partition's time: the largest timestamp of the batches.
    let mut expected = producers().to_bytes().to_vec();
    expected[..8].copy_from_slice(&8990_i64.to_be_bytes());
    assert_eq!(footer.producers, expected);
    assert!(matches!(tier.read(at(900), 1.into()).await, Err(TierReadError::OutOfRange { .. })));
}

#[tokio::test]
async fn large_segment_is_uploaded_in_parts_and_reads_back() {
    let store = tempfile::tempdir().unwrap();
    let segments = Segments::new();
    let tier = open(&ObjectStoreOptions::new(&format!("file://{}", store.path().join("objects").display())));
    // 26 MB with batches of 900 KB, so that batches cross the ends of parts and chunks.
    let (source, content) = segments.source(0, 29, 300_000, 0);
    let staged = stage(&tier, &source, LeaderEpoch(0)).await.unwrap();
    tier.install(staged);
    assert_eq!(read_all(&tier, 0, 87, 2 << 20).await, content);
}

/// Regression: uploaded objects filled the page cache, and appends waited until the system reclaimed memory.
#[tokio::test]
async fn uploaded_segment_leaves_the_page_cache() {
    let store = tempfile::tempdir().unwrap();
    let segments = Segments::new();
    let tier = open(&ObjectStoreOptions::new(&format!("file://{}", store.path().display())));
    let (source, content) = segments.source(0, 29, 300_000, 0);
    let staged = stage(&tier, &source, LeaderEpoch(0)).await.unwrap();
    tier.install(staged);
    let segment = tier.segments(at(0), 1).await.unwrap()[0].stamp.segment();
    let object = store.path().join(super::name::partition_folder(partition())).join(segment);
    let file = std::fs::File::open(&object).unwrap();
    let is_cached = |position: usize| {
        let mut byte = [0];
        let into = &mut [std::io::IoSliceMut::new(&mut byte)];
        rustix::io::preadv2(&file, into, position as u64, rustix::io::ReadWriteFlags::NOWAIT)
    };
    // Each position is tested once, because some systems start to read an absent page.
    let cached_at: Vec<_> =
        (0..content.len()).step_by(1 << 20).map(|position| (position, is_cached(position))).collect();
    // Only some file systems support this check, and tmpfs drops no pages.
    let is_unsupported = cached_at[0].1.is_err_and(|error| error != rustix::io::Errno::AGAIN);
    if is_unsupported || rustix::fs::fstatfs(&file).unwrap().f_type == TMPFS_MAGIC {
        return;
    }
    let cached: Vec<_> = cached_at.iter().filter(|(_, result)| result.is_ok()).map(|(position, _)| position).collect();
    assert!(cached.is_empty(), "MiB at {cached:?}");
    assert_eq!(read_all(&tier, 0, 87, 2 << 20).await, content);
    assert!(is_cached(0).is_ok(), "pages that were read on demand stay");
}

#[tokio::test]
async fn staged_manifest_changes_nothing_before_install() {
    let segments = Segments::new();
    let tier = open(&ObjectStoreOptions::new("memory://"));
    let (source, _) = segments.source(0, 5, 10, 0);
    let staged = stage(&tier, &source, LeaderEpoch(0)).await.unwrap();
    assert_eq!(tier.state(), TierState::default());
    assert!(tier.read(at(0), 10.into()).await.is_err());
    // The commit fails. The same segment is staged again under other names, and that state is committed.
    let second = stage(&tier, &source, LeaderEpoch(0)).await.unwrap();
    assert_ne!(staged.state().manifest, second.state().manifest);
    tier.install(second.clone());
    let json = serde_json::to_string(second.state()).unwrap();
    assert_eq!(&serde_json::from_str::<TierState>(&json).unwrap(), second.state());
    // A late watch event with an older state changes nothing.
    tier.apply_state(TierState::default());
    assert_eq!(&tier.state(), second.state());
}

#[tokio::test]
async fn one_manifest_lists_several_segments_without_failed_one() {
    let segments = Segments::new();
    let tier = open(&ObjectStoreOptions::new("memory://"));
    let mut batch = tier.start_upload_batch(LeaderEpoch(0)).await.unwrap();
    let mut all = BytesMut::new();
    for number in 0..3 {
        let (source, content) = segments.source(number * 30, 10, 100, 0);
        batch.add(&source).await.unwrap();
        all.extend_from_slice(&content);
    }
    let (corrupt, content) = segments.source(90, 10, 100, 0);
    segments.corrupt(&corrupt, &content[1..]);
    assert!(matches!(batch.add(&corrupt).await, Err(UploadError::Source(SegmentSourceError::Corrupt { .. }))));
    assert_eq!(tier.state(), TierState::default(), "no manifest lists the segments yet");
    tier.install(batch.finish().await.unwrap());
    assert_eq!((tier.state().version(), tier.state().tiered_end), (1, at(90)));
    assert_eq!(read_all(&tier, 0, 90, 1 << 20).await, all);
}

/// The page is written with the segment that fills it, at any position among the segments of one manifest.
#[tokio::test]
async fn page_that_fills_up_within_one_manifest_is_written() {
    let segments = Segments::new();
    let tier = open(&ObjectStoreOptions::new("memory://"));
    let mut all = BytesMut::new();
    for part in [0..1000, 1000..1060] {
        let mut batch = tier.start_upload_batch(LeaderEpoch(0)).await.unwrap();
        for number in part {
            let (source, content) = segments.source(number * 3, 1, 10, 0);
            batch.add(&source).await.unwrap();
            all.extend_from_slice(&content);
        }
        tier.install(batch.finish().await.unwrap());
    }
    assert_eq!((tier.state().version(), tier.state().tiered_end), (2, at(3180)));
    assert_eq!(read_all(&tier, 0, 3180, 1 << 20).await, all);
    assert_eq!(tier.segments(at(0), 5000).await.unwrap().len(), 1060);
}

#[tokio::test]
async fn overlapping_source_uploads_only_the_rest() {
    let segments = Segments::new();
    let tier = open(&ObjectStoreOptions::new("memory://"));
    let (first, _) = segments.source(0, 10, 100, 0);
    tier.install(stage(&tier, &first, LeaderEpoch(0)).await.unwrap());
    let (wide, content) = segments.source(0, 25, 100, 0);
    tier.install(stage(&tier, &wide, LeaderEpoch(0)).await.unwrap());
    assert_eq!(read_all(&tier, 0, 75, 1 << 20).await, content);
    let entries = tier.segments(at(0), 10).await.unwrap();
    assert_eq!(entries.iter().map(|entry| entry.stamp.base.get()).collect::<Vec<_>>(), [0, 30]);
    // A segment that ends at or below the tiered end is rejected, and so is one that leaves a gap.
    assert!(matches!(
        stage(&tier, &wide, LeaderEpoch(0)).await,
        Err(UploadError::Source(SegmentSourceError::NotContiguous { .. }))
    ));
    let (gap, _) = segments.source(90, 5, 100, 0);
    assert!(matches!(
        stage(&tier, &gap, LeaderEpoch(0)).await,
        Err(UploadError::Source(SegmentSourceError::NotContiguous { .. }))
    ));
}

#[tokio::test]
async fn flipped_bit_in_segment_file_is_never_uploaded() {
    let segments = Segments::new();
    let tier = open(&ObjectStoreOptions::new("memory://"));
    let (source, content) = segments.source(0, 3, 20, 0);
    for bit in 0..content.len() * 8 {
        let mut bytes = content.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        segments.corrupt(&source, &bytes);
        let error = stage(&tier, &source, LeaderEpoch(0)).await.expect_err(&format!("bit {bit}"));
        assert!(matches!(error, UploadError::Source(SegmentSourceError::Corrupt { .. })), "bit {bit}: {error}");
    }
    for len in 0..content.len() {
        segments.corrupt(&source, &content[..len]);
        assert!(stage(&tier, &source, LeaderEpoch(0)).await.is_err(), "truncated at {len}");
    }
    segments.corrupt(&source, &[&content[..], b"x"].concat());
    assert!(stage(&tier, &source, LeaderEpoch(0)).await.is_err(), "the file is too long");
    assert!(tier.store().list("topics").await.unwrap().is_empty(), "no object was written");
}

/// Regression: uploads opened the segment file by its name, so an upload failed if the segment was evicted or its topic
/// deleted meanwhile.
#[tokio::test]
async fn upload_survives_removal_of_segment_file() {
    let segments = Segments::new();
    let tier = open(&ObjectStoreOptions::new("memory://"));
    let (source, content) = segments.source(0, 29, 300_000, 0);
    segments.disk.remove(source.path()).unwrap();
    assert!(segments.disk.read(source.path()).is_err());
    tier.install(stage(&tier, &source, LeaderEpoch(0)).await.unwrap());
    assert_eq!(read_all(&tier, 0, 87, 2 << 20).await, content);
}

#[tokio::test]
async fn flipped_bit_in_segment_object_is_detected() {
    let segments = Segments::new();
    let tier = open(&ObjectStoreOptions::new("memory://"));
    let (source, content) = segments.source(0, 2, 20, 0);
    tier.install(stage(&tier, &source, LeaderEpoch(0)).await.unwrap());
    let entry = tier.segments(at(0), 1).await.unwrap()[0];
    let object = tier.object(&entry.stamp.segment());
    let intact = tier.store().get(&object).await.unwrap();
    for bit in 0..intact.len() * 8 {
        let mut bytes = intact.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        tier.store().put(&object, bytes.into()).await.unwrap();
        let fresh = tier_over(tier.store().clone(), tier.state());
        let mut next = 0;
        let error = loop {
            // A corrupt length may end a read early. The bytes that were returned are correct, and the next read
            // detects the corruption.
            match fresh.read(at(next), (1 << 20).into()).await {
                Ok(read) if read.next < at(6) => {
                    assert!(content.starts_with(&read.chunks[0]), "bit {bit}");
                    next = read.next.get();
                }
                Ok(_) => panic!("bit {bit} was not detected"),
                Err(error) => break error,
            }
        };
        assert!(
            matches!(error, TierReadError::Corrupt { object: ref named, .. } if *named == object),
            "bit {bit}: {error}"
        );
    }
    tier.store().delete(&object).await.unwrap();
    let fresh = tier_over(tier.store().clone(), tier.state());
    assert!(matches!(fresh.read(at(0), 1.into()).await, Err(TierReadError::Missing { .. })));
}

#[tokio::test]
async fn time_lookup_finds_first_batch_at_or_after_time() {
    let (tier, _segments, _all) = three_segments(&ObjectStoreOptions::new("memory://"), 500).await;
    for (time, expected) in [(-5, 0), (0, 0), (1, 1), (3000, 300), (3001, 301), (5995, 600), (8990, 899)] {
        let batch = tier.batch_for_time(time, at(0), usize::MAX).await.unwrap().unwrap();
        assert_eq!(batch.base_offset(), at(expected / 3 * 3), "time {time}");
        assert_eq!(batch.leader_epoch(), Some(LeaderEpoch(if expected < 600 { 0 } else { 2 })));
    }
    assert_eq!(tier.batch_for_time(8991, at(0), usize::MAX).await.unwrap(), None);
    for (from, expected) in [(302, 300), (303, 303), (304, 303), (897, 897)] {
        let batch = tier.batch_for_time(0, at(from), usize::MAX).await.unwrap().unwrap();
        assert_eq!(batch.base_offset(), at(expected), "from {from}");
    }
    assert_eq!(tier.batch_for_time(0, at(900), usize::MAX).await.unwrap(), None);
    trim(&tier, at(451)).await;
    let batch = tier.batch_for_time(0, at(0), usize::MAX).await.unwrap().unwrap();
    assert_eq!(batch.base_offset(), at(450), "the search starts at the batch of the log start");
}

/// A batch above both limits of a read is reported with its size and not read. Regression: memory for a batch was
/// reserved only after the batch had been read.
#[tokio::test]
async fn batch_above_the_limit_is_not_read() {
    let (tier, _segments, _all) = three_segments(&ObjectStoreOptions::new("memory://"), 3000).await;
    let bytes = tier.read(at(0), 1.into()).await.unwrap().bytes;
    let limits = |max_batch_bytes| ReadLimits { max_bytes: 1, max_batch_bytes };
    let read = tier.read(at(0), limits(bytes - 1)).await;
    assert!(matches!(read, Err(TierReadError::BatchTooLarge { bytes: needed }) if needed == bytes));
    assert_eq!(tier.read(at(0), limits(bytes)).await.unwrap().bytes, bytes);
    let found = tier.batch_for_time(0, at(0), 1).await;
    assert!(found.is_ok(), "the first read of a search may be larger: {found:?}");
}

/// The store's clock, and not the broker's, is used for the ages of objects. Regression: a controller whose clock was
/// hours ahead treated an object as garbage that another broker had just uploaded and not committed yet.
#[tokio::test]
async fn clock_is_read_from_the_store() {
    let (tier, _, _) = three_segments(&ObjectStoreOptions::new("memory://"), 100).await;
    let store = tier.store();
    let now = store.clock_ms().await.unwrap();
    let listed = store.list("").await.unwrap();
    let clock = listed.iter().find(|entry| entry.object == crate::tier::name::CLOCK).unwrap();
    assert_eq!(clock.modified_ms, now);
    assert!(listed.iter().all(|entry| entry.modified_ms <= now), "all objects are older: {listed:?}");
    let later = store.clock_ms().await.unwrap();
    assert!(later >= now);
}

/// Returns the bytes of the segments that a log start at `to` removes.
async fn bytes_below(tier: &PartitionTier, to: Offset) -> u64 {
    let segments = tier.segments(tier.state().log_start, usize::MAX).await.unwrap();
    segments.iter().filter(|entry| entry.stamp.end <= to).map(|entry| entry.data_bytes).sum()
}

/// Moves the log start as maintenance does: first in the state, then in the manifest.
async fn trim(tier: &PartitionTier, to: Offset) {
    let removed = bytes_below(tier, to).await;
    tier.install(tier.stage_log_start(to, removed, LeaderEpoch(2)).unwrap());
    if tier.manifest_lags().await.unwrap() {
        tier.install(tier.stage_trim(LeaderEpoch(2)).await.unwrap());
    }
    assert!(!tier.manifest_lags().await.unwrap());
}

#[tokio::test]
async fn log_start_moves_without_store_and_manifest_follows() {
    let (tier, segments, all) = three_segments(&ObjectStoreOptions::new("memory://"), 100).await;
    let store = tier.store().clone();
    let before = tier.state();
    let entries = tier.segments(at(0), 9).await.unwrap();
    let removed = bytes_below(&tier, at(450)).await;
    assert_eq!(removed, entries[0].data_bytes);
    let moved = tier.stage_log_start(at(450), removed, LeaderEpoch(2)).unwrap();
    assert_eq!(moved.replaces(), &before);
    tier.install(moved);
    let state = tier.state();
    assert_eq!((state.log_start, state.manifest, state.bytes), (at(450), before.manifest, before.bytes - removed));
    // Another tier accepts the manifest as the committed one, and reads nothing below the log start.
    let fresh = tier_over(store.clone(), state);
    assert!(fresh.manifest_lags().await.unwrap());
    assert_eq!(fresh.segments(at(0), 9).await.unwrap(), entries[1..]);
    assert!(matches!(fresh.read(at(449), 1.into()).await, Err(TierReadError::OutOfRange { .. })));
    let kept = read_all(&fresh, 450, 900, 1 << 20).await;
    assert!(all.ends_with(&kept));
    let live = |_| std::future::ready(PartitionLiveness::Current(fresh.state()));
    let later = crate::task::clock::wall_ms() + 3_700_000;
    let collected = collect_garbage(&store, live, Duration::from_secs(3600), later).await.unwrap();
    assert_eq!((collected.deleted, collected.skipped.len()), (2, 0), "the two earlier manifests");
    // The manifest of the next upload leaves out the segments below the log start, even if all segments are below it.
    for (to, base, count) in [(450, 900, 3), (920, 915, 1)] {
        let removed = bytes_below(&fresh, at(to)).await;
        fresh.install(fresh.stage_log_start(at(to), removed, LeaderEpoch(2)).unwrap());
        assert!(fresh.manifest_lags().await.unwrap());
        fresh.install(stage(&fresh, &segments.source(base, 5, 10, 2).0, LeaderEpoch(2)).await.unwrap());
        assert!(!fresh.manifest_lags().await.unwrap());
        let reopened = tier_over(store.clone(), fresh.state());
        let found = reopened.segments(at(0), 9).await.unwrap();
        assert_eq!((found.len(), reopened.state().log_start), (count, at(to)), "{found:?}");
        assert_eq!(found.iter().map(|entry| entry.data_bytes).sum::<u64>(), reopened.state().bytes);
    }
}

#[tokio::test]
async fn trim_moves_log_start_and_its_garbage_is_collected() {
    let (tier, segments, all) = three_segments(&ObjectStoreOptions::new("memory://"), 100).await;
    let store = tier.store().clone();
    trim(&tier, at(450)).await;
    let state = tier.state();
    assert_eq!((state.log_start, state.tiered_end), (at(450), at(900)));
    assert!(matches!(tier.read(at(449), 1.into()).await, Err(TierReadError::OutOfRange { .. })));
    let kept = read_all(&tier, 450, 900, 1 << 20).await;
    assert!(all.ends_with(&kept));

    let orphan = stage(&tier, &segments.source(900, 5, 10, 2).0, LeaderEpoch(2)).await.unwrap();
    drop(orphan);
    let live = |_| std::future::ready(PartitionLiveness::Current(tier.state()));
    let now = crate::task::clock::wall_ms();
    let grace = Duration::from_secs(3600);
    let young = collect_garbage(&store, live, grace, now).await.unwrap();
    // The first segment, three old manifests, the orphan and its manifest.
    assert_eq!((young.deleted, young.young), (0, 6));
    assert!(young.young_bytes > 0);
    let collected = collect_garbage(&store, live, grace, now + 3_700_000).await.unwrap();
    assert_eq!((collected.deleted, collected.young, collected.skipped.len()), (6, 0, 0));
    let fresh = tier_over(store.clone(), tier.state());
    assert_eq!(read_all(&fresh, 450, 900, 1 << 20).await, kept, "referenced objects are kept");

    // The log start moves above the tiered end: the manifest is then empty, and the tiered end does not change.
    trim(&tier, at(903)).await;
    let emptied = tier.state();
    assert_eq!((emptied.log_start, emptied.tiered_end, tier.bytes()), (at(903), at(900), 0));
    assert!(matches!(tier.read(at(903), 1.into()).await, Err(TierReadError::OutOfRange { .. })));
    let listed = tier_over(store.clone(), emptied.clone()).segments(at(0), 9).await.unwrap();
    assert_eq!(listed, [], "the empty manifest can be read");
    // While the manifest is empty, the log start moves without a new manifest.
    tier.install(tier.stage_log_start(at(905), 0, LeaderEpoch(2)).unwrap());
    assert!(!tier.manifest_lags().await.unwrap());
    assert_eq!((tier.state().log_start, tier.state().manifest), (at(905), emptied.manifest));
    let (inside, _) = segments.source(900, 5, 10, 2);
    tier.install(stage(&tier, &inside, LeaderEpoch(2)).await.unwrap());
    assert_eq!((tier.state().log_start, tier.state().tiered_end), (at(905), at(915)));
    assert_eq!(tier.read(at(905), 1.into()).await.unwrap().next, at(906));
}

#[tokio::test]
async fn collection_deletes_topics_and_skips_unreadable_manifests() {
    let (tier, _segments, _all) = three_segments(&ObjectStoreOptions::new("memory://"), 10).await;
    let store = tier.store().clone();
    let topic = TopicRecord {
        name: crate::model::TopicName::new("t").unwrap(),
        id: partition().topic,
        partitions: 1,
        config: Default::default(),
    };
    store.put_topic(&topic).await.unwrap();
    let later = crate::task::clock::wall_ms() + 10_000_000;
    let unknown = |_| std::future::ready(PartitionLiveness::Unknown);
    assert_eq!(collect_garbage(&store, unknown, Duration::ZERO, later).await.unwrap(), GarbageReport::default());

    let manifest = tier.object(&tier.state().manifest.unwrap().to_string());
    let content = store.get(&manifest).await.unwrap();
    store.put(&manifest, Bytes::from_static(b"not a manifest")).await.unwrap();
    let live = |_| std::future::ready(PartitionLiveness::Current(tier.state()));
    let report = collect_garbage(&store, live, Duration::ZERO, later).await.unwrap();
    assert_eq!((report.deleted, report.skipped.len()), (0, 1));
    store.put(&manifest, content).await.unwrap();

    let deleted = |_| std::future::ready(PartitionLiveness::Deleted);
    collect_garbage(&store, deleted, Duration::ZERO, later).await.unwrap();
    assert_eq!(store.list("topics").await.unwrap(), []);
}

#[tokio::test]
async fn prefix_of_another_cluster_is_rejected_with_both_names() {
    let folder = tempfile::tempdir().unwrap();
    let segments = Segments::new();
    let options = ObjectStoreOptions::new(&format!("file://{}/objects", folder.path().display()));
    TierStore::open(&options, "red").unwrap().bind().await.unwrap();
    TierStore::open(&options, "red").unwrap().bind().await.unwrap();
    let blue = TierStore::open(&options, "blue").unwrap();
    let error = blue.bind().await.unwrap_err();
    assert!(!error.retryable());
    let text = error.to_string();
    assert!(text.contains("\"red\"") && text.contains("\"blue\"") && text.contains("file:///"), "{text}");
    let (source, _) = segments.source(0, 1, 1, 0);
    let refused = stage(&tier_over(blue, TierState::default()), &source, LeaderEpoch(0)).await;
    assert!(matches!(refused, Err(UploadError::Binding(BindingError::Foreign { .. }))));
}

/// Storage of bindings in which another broker completes the binding, and writes the marker, while this broker requests
/// the binding.
struct FasterBroker {
    marker: std::path::PathBuf,
    id: uuid::Uuid,
}

impl BindingStore for FasterBroker {
    fn bind<'a>(
        &'a self,
        url: &'a str,
        _: Option<uuid::Uuid>,
    ) -> futures::future::BoxFuture<'a, Result<StoreBinding, String>> {
        let binding = StoreBinding { id: self.id, url: url.to_owned(), pending: false };
        let marker = format!(r#"{{"format":1,"cluster":"test","id":"{}"}}"#, self.id);
        std::fs::write(&self.marker, marker).unwrap();
        Box::pin(std::future::ready(Ok(binding)))
    }

    fn stored(&self) -> futures::future::BoxFuture<'_, Result<Option<StoreBinding>, String>> {
        Box::pin(std::future::ready(Ok(None)))
    }
}

#[tokio::test]
async fn marker_that_another_broker_writes_meanwhile_is_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let options = ObjectStoreOptions::new(&format!("file://{}", folder.path().display()));
    let marker = folder.path().join(name::CLUSTER);
    let bindings: Arc<dyn BindingStore> = Arc::new(FasterBroker { marker, id: uuid::Uuid::from_u128(7) });
    let owner = StoreOwner { bindings: Some(bindings), ..StoreOwner::default() };
    TierStore::open(&options, "test").unwrap().owned_by(owner).bind().await.unwrap();
}

/// Regression: an unmounted disk leaves an empty folder, or none. The next write then created a new store on the wrong
/// disk.
#[tokio::test]
async fn missing_or_empty_folder_rejects_writes_until_it_returns() {
    let folder = tempfile::tempdir().unwrap();
    let segments = Segments::new();
    let (mounted_at, unmounted) = (folder.path().join("objects"), folder.path().join("unmounted"));
    let options = ObjectStoreOptions {
        retry_for: Duration::ZERO,
        ..ObjectStoreOptions::new(&format!("file://{}", mounted_at.display()))
    };
    let tier = open(&options);
    let (first, content) = segments.source(0, 1, 10, 0);
    let staged = stage(&tier, &first, LeaderEpoch(0)).await.unwrap();
    tier.install(staged);
    let (second, more) = segments.source(3, 1, 10, 0);
    std::fs::rename(&mounted_at, &unmounted).unwrap();
    for mounted in [false, true] {
        if mounted {
            std::fs::create_dir(&mounted_at).unwrap();
        }
        let refused = stage(&tier, &second, LeaderEpoch(0)).await.unwrap_err();
        assert!(
            matches!(refused, UploadError::Binding(BindingError::Missing { .. })) && refused.retryable(),
            "{refused}"
        );
        assert!(refused.to_string().contains(&options.url), "{refused}");
        assert_eq!(mounted_at.exists(), mounted, "no folder is created");
        assert!(!mounted || std::fs::read_dir(&mounted_at).unwrap().next().is_none(), "no object is written");
        // The objects may return, so the error is `Unavailable` and not a corrupt or missing object.
        let cold = tier_over(tier.store().clone(), tier.state());
        let read = cold.read(at(0), 1.into()).await.unwrap_err();
        assert!(matches!(&read, TierReadError::Store(TierStoreError::Unavailable { .. })), "{read:?}");
    }
    std::fs::remove_dir(&mounted_at).unwrap();
    std::fs::rename(&unmounted, &mounted_at).unwrap();
    let staged = stage(&tier, &second, LeaderEpoch(0)).await.unwrap();
    tier.install(staged);
    assert_eq!(read_all(&tier, 0, 6, 1 << 20).await, [content, more].concat());
}

#[test]
fn url_without_store_is_rejected() {
    for bad in ["", "bucket", "ftp://x/y", "s3://", "s3:///prefix", "file://relative/dir"] {
        let error = TierStore::open(&ObjectStoreOptions::new(bad), "c").unwrap_err().to_string();
        assert!(error.contains(&format!("{bad:?}")), "{error}");
    }
}

#[tokio::test]
async fn older_leader_cannot_stage() {
    let (tier, segments, _all) = three_segments(&ObjectStoreOptions::new("memory://"), 10).await;
    let (source, _) = segments.source(900, 1, 10, 1);
    assert!(matches!(stage(&tier, &source, LeaderEpoch(1)).await, Err(UploadError::Deposed { .. })));
    assert!(matches!(tier.stage_trim(LeaderEpoch(1)).await, Err(UploadError::Deposed { .. })));
    assert!(matches!(tier.stage_log_start(at(1), 0, LeaderEpoch(1)), Err(UploadError::Deposed { .. })));
}

#[tokio::test]
async fn disk_cache_serves_evicted_chunks_but_no_corrupt_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (tier, _segments, all) = three_segments(&ObjectStoreOptions::new("memory://"), 3000).await;
    let chunks = folder.path().join("chunks");
    let options = ChunkCacheOptions {
        memory_bytes: 0,
        disk: Some((chunks.clone(), 64 << 20)),
        read_ahead_bytes: 4 << 20,
        ..ChunkCacheOptions::default()
    };
    let cache = ChunkCache::open(&options, &Metrics::new()).unwrap();
    let cold = PartitionTier::new(tier.store().clone(), cache, partition(), tier.state());
    assert_eq!(read_all(&cold, 0, 900, 1 << 20).await, all);
    cold.cache().wait_for_writes().await;
    assert_eq!(std::fs::read_dir(&chunks).unwrap().count(), 0, "chunks that are read once are not kept");
    assert_eq!(read_all(&cold, 0, 900, 1 << 20).await, all);
    // Chunks are written in the background.
    cold.cache().wait_for_writes().await;
    let files: HashMap<_, _> = std::fs::read_dir(&chunks)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    assert!(!files.is_empty());
    for (path, content) in &files {
        let mut corrupt = content.clone();
        corrupt[content.len() / 2] ^= 1;
        std::fs::write(path, corrupt).unwrap();
    }
    assert_eq!(read_all(&cold, 0, 900, 1 << 20).await, all);
    // The next start deletes the chunks. The writes of this cache must be complete before that.
    cold.cache().wait_for_writes().await;
    ChunkCache::open(&options, &Metrics::new()).unwrap();
    assert_eq!(std::fs::read_dir(&chunks).unwrap().count(), 0);
}

/// Regression: reads of the folder continued although no caller waited for them. They used 1 MiB each outside of every
/// budget, and as many ran as there were threads.
#[tokio::test]
async fn folder_reads_are_bounded_and_skip_callers_that_left() {
    let folder = tempfile::tempdir().unwrap();
    let (tier, _segments, _) = three_segments(&ObjectStoreOptions::new("memory://"), 3000).await;
    let disk = Some((folder.path().join("chunks"), 64 << 20));
    let options = ChunkCacheOptions { memory_bytes: 0, disk, ..ChunkCacheOptions::default() };
    let metrics = Metrics::new();
    let cache = ChunkCache::open(&options, &metrics).unwrap();
    let root = tier.root(&tier.state()).await.unwrap();
    let entry = tier.segment_of(&root, at(0)).await.unwrap().unwrap();
    let object = tier.object(&entry.stamp.segment());
    for _ in 0..2 {
        cache.chunk(tier.store(), &object, &entry, 0).await.unwrap();
        cache.wait_for_writes().await;
    }
    let before = metrics.cache_hits.get();
    let permits = cache.folder_permits().await;
    assert!(cache.chunk(tier.store(), &object, &entry, 0).now_or_never().is_none(), "the caller leaves");
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    drop(permits);
    drop(cache.folder_permits().await);
    cache.chunk(tier.store(), &object, &entry, 0).await.unwrap();
    assert_eq!(metrics.cache_hits.get() - before, 1, "the file was read once");
}

/// Regression: manifests, pages and footers were fetched although no caller waited for them, and without a limit on
/// concurrent fetches.
#[tokio::test]
async fn metadata_fetches_are_bounded_and_skip_callers_that_left() {
    let (tier, _segments, _) = three_segments(&ObjectStoreOptions::new("memory://"), 3000).await;
    let cache = ChunkCache::open(&ChunkCacheOptions::default(), &Metrics::new()).unwrap();
    let (root, loads) = (tier.root(&tier.state()).await.unwrap(), Arc::new(AtomicUsize::new(0)));
    let load = || {
        let (root, loads) = (Arc::clone(&root), Arc::clone(&loads));
        async move {
            loads.fetch_add(1, Ordering::Relaxed);
            Ok(CachedMetadata::Root(root))
        }
    };
    let attempt = tier.state().manifest.unwrap().attempt;
    let permits = cache.parse_permits().await;
    assert!(cache.get_parsed(tier.store(), attempt, load()).now_or_never().is_none(), "the caller leaves");
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    drop(permits);
    drop(cache.parse_permits().await);
    assert_eq!(loads.load(Ordering::Relaxed), 0, "a fetch without caller is skipped");
    cache.get_parsed(tier.store(), attempt, load()).await.unwrap();
    assert_eq!(loads.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn stop_ends_retries_of_unreachable_store() {
    let options = ObjectStoreOptions {
        endpoint: Some("http://127.0.0.1:9".to_owned()),
        retry_for: Duration::from_secs(3600),
        ..ObjectStoreOptions::new("s3://bucket/prefix")
    };
    let store = TierStore::open(&options, "c").unwrap();
    let result = Arc::new(Mutex::new(None));
    let tasks = crate::task::Tasks::new();
    let (client, response) = (store.clone(), Arc::clone(&result));
    tasks.spawn("store-binding", async move {
        let bound = client.bind().await;
        *response.lock() = Some(bound);
    });
    tokio::task::yield_now().await;
    store.stop().await;
    tasks.stop().await;
    let bound = result.lock().take();
    assert!(matches!(bound, Some(Err(BindingError::Store(TierStoreError::Stopped)))), "{bound:?}");
}
