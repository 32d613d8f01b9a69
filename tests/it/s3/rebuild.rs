//! Manifests rebuilt from the footers of real objects, also after the loss of pages.

use std::{path::Path, sync::Arc};

use bytes::{Bytes, BytesMut};
use strandline::{
    log::{DataDir, DataDirIdentity, LogOptions, SimDisk},
    model::{BrokerId, Compression, LeaderEpoch, Offset, PartitionId, TopicId},
    record::BatchBuilder,
    telemetry::Metrics,
    tier::{
        ChunkCache, ChunkCacheOptions, ObjectStoreOptions, PartitionTier, SegmentSource, SurveyVerdict, TierState,
        TierStore,
    },
};

use super::{S3, stage};
use crate::corruption::files;

const EPOCH: LeaderEpoch = LeaderEpoch(0);

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn partition() -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), 0)
}

fn tier(options: &ObjectStoreOptions, state: TierState) -> PartitionTier {
    let store = TierStore::open(options, "test").unwrap();
    let cache = ChunkCache::open(&ChunkCacheOptions::default(), &Metrics::new()).unwrap();
    PartitionTier::new(store, cache, partition(), state)
}

/// Returns this number of segments of one small batch each, and the concatenated batches.
fn segments(count: u64) -> (Vec<SegmentSource>, Bytes) {
    let identity = DataDirIdentity { cluster: "test".to_owned(), broker: BrokerId(1) };
    let options = LogOptions { journal_bytes: 1 << 20, reserve_bytes: 0, step_mode: true, ..LogOptions::default() };
    let log = DataDir::open(Arc::new(SimDisk::new()), Path::new("/data"), &identity, options).unwrap();
    let mut replica = log.open_replica(partition(), at(0)).unwrap();
    replica.set_journaled(false);
    let (mut sources, mut content) = (Vec::new(), BytesMut::new());
    for offset in 0..count {
        let mut builder = BatchBuilder::new(Compression::None);
        builder.push(1, None, Some(&offset.to_be_bytes()), &[]).unwrap();
        let mut batch = builder.finish(None).unwrap();
        batch.set_offset_and_epoch(at(offset), EPOCH);
        content.extend_from_slice(&batch.to_bytes());
        replica.append(&[batch]).unwrap();
        replica.roll().unwrap();
        sources.push(SegmentSource::new(replica.export(at(offset)).unwrap()));
    }
    (sources, content.freeze())
}

async fn read_all(tier: &PartitionTier) -> Bytes {
    let (mut out, mut next) = (BytesMut::new(), tier.state().log_start);
    while next < tier.state().tiered_end {
        let read = tier.read(next, (3 << 20).into()).await.unwrap();
        read.chunks.iter().for_each(|chunk| out.extend_from_slice(chunk));
        next = read.next;
    }
    out.freeze()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn manifest_lost_with_its_pages_is_rebuilt_as_committed() {
    let s3 = S3::start().await;
    let options = s3.options("rebuild");
    let (sources, content) = segments(1030);
    let writer = tier(&options, TierState::default());
    let mut staging = writer.start_upload_batch(EPOCH).await.unwrap();
    for source in &sources {
        staging.add(source).await.unwrap();
    }
    writer.install(staging.finish().await.unwrap());
    let state = writer.state();
    let named = |suffix: &str| files(&s3.bucket(), suffix);
    let root = state.manifest.unwrap().to_string();
    let pages = named(".page");
    assert_eq!(pages.len(), 1, "more segments than two pages hold");

    // Only the page is lost. The root still exists, which does not help.
    std::fs::remove_file(&pages[0]).unwrap();
    let reader = tier(&options, state.clone());
    let error = reader.check_manifest().await.unwrap_err();
    assert!(error.lost_manifest().is_some_and(|object| object.ends_with(".page")), "{error}");
    reader.read(at(0), (1 << 20).into()).await.unwrap_err();
    assert!(reader.lost_manifest().is_some(), "a reader that finds the corruption notifies maintenance");

    // The root is lost too.
    named("").iter().filter(|path| path.ends_with(&root)).for_each(|path| std::fs::remove_file(path).unwrap());
    let rebuilder = tier(&options, state.clone());
    let survey = rebuilder.survey().await.unwrap();
    assert_eq!((survey.verdict, survey.chain.len(), survey.bytes()), (SurveyVerdict::Committed, 1030, state.bytes));
    let staged = rebuilder.stage_rebuilt(&survey.chain, survey.log_start, EPOCH).await.unwrap();
    assert_eq!(
        (staged.state().version(), staged.replaces()),
        (state.version() + 1, &state),
        "the versions are one chain"
    );
    let same = TierState { manifest: staged.state().manifest, ..state.clone() };
    assert_eq!(staged.state(), &same, "only the name differs");
    rebuilder.install(staged);
    let fresh = tier(&options, rebuilder.state());
    fresh.check_manifest().await.unwrap();
    assert!(read_all(&fresh).await == content, "the stored bytes are equal");
    assert_eq!(named(".page").len(), 1, "the manifest page exists again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn object_with_a_corrupt_footer_is_named_and_not_used() {
    let s3 = S3::start().await;
    let options = s3.options("corrupt");
    let (sources, _) = segments(3);
    let writer = tier(&options, TierState::default());
    for source in &sources {
        writer.install(stage(&writer, source, EPOCH).await.unwrap());
    }
    let mut objects = files(&s3.bucket(), ".segment");
    objects.sort();
    let mut bytes = std::fs::read(&objects[1]).unwrap();
    let at_footer = bytes.len() - 60;
    bytes[at_footer] ^= 1;
    std::fs::write(&objects[1], bytes).unwrap();
    let survey = tier(&options, writer.state()).survey().await.unwrap();
    assert_eq!((survey.verdict, survey.chain.len(), survey.log_start), (SurveyVerdict::Incomplete, 1, at(2)));
    assert_eq!((survey.missing, survey.unusable.len()), (vec![(at(1), at(2))], 1));
}
