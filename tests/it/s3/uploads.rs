//! Multipart uploads that have not ended: those of a killed broker are aborted, and no others.

use std::time::Duration;

use object_store::{MultipartUpload, ObjectStoreExt, PutPayload, aws::AmazonS3Builder, path::Path};
use strandline::{
    model::{LeaderEpoch, Offset, PartitionId, TopicId},
    task::clock,
    tier::{
        BindingError, MultipartAbortError, MultipartAbortReport, ObjectStoreOptions, TierStore,
        abort_abandoned_uploads, doctor, name,
    },
};

use super::{ACCESS_KEY, BUCKET, Fault, Op, S3, SECRET_KEY};
use crate::{broker::BrokerInstance, test_timeout::eventually};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Returns the key, below the prefix, of a segment that was never uploaded before.
fn segment(base: u64) -> String {
    let at = |offset| Offset::new(offset).unwrap();
    let folder = name::partition_folder(PartitionId::new(TopicId::from_bytes([7; 16]), 3));
    format!("{folder}/{}", name::ObjectId::draw(at(base), at(base + 1), LeaderEpoch(0)).segment())
}

/// Starts an upload as a broker does, and sends a first part.
async fn begin(s3: &S3, key: &str) -> Box<dyn MultipartUpload> {
    let client = AmazonS3Builder::new()
        .with_endpoint(s3.endpoint())
        .with_allow_http(true)
        .with_region("us-east-1")
        .with_bucket_name(BUCKET)
        .with_access_key_id(ACCESS_KEY)
        .with_secret_access_key(SECRET_KEY);
    begin_with(client, key).await
}

async fn begin_with(client: AmazonS3Builder, key: &str) -> Box<dyn MultipartUpload> {
    let mut upload = client.build().unwrap().put_multipart(&Path::from(key)).await.unwrap();
    upload.put_part(PutPayload::from_static(b"a part")).await.unwrap();
    upload
}

async fn sweep(store: &TierStore, grace: Duration) -> MultipartAbortReport {
    abort_abandoned_uploads(store, grace, clock::wall_ms()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_uploads_of_our_segments_are_aborted_and_no_others() {
    let s3 = S3::start().await;
    let store = TierStore::open(&s3.options("ours"), "test").unwrap();
    assert_eq!(sweep(&store, HOUR).await, MultipartAbortReport::default());
    let foreign = ["ours/topics/backup.tar".to_owned(), format!("ours/deeper/{}", segment(1))];
    let elsewhere = [format!("theirs/{}", segment(2)), format!("ours-too/{}", segment(3)), segment(4)];
    let mut others = Vec::new();
    for key in foreign.iter().chain(&elsewhere) {
        others.push(begin(&s3, key).await);
    }
    for base in 10..15 {
        drop(begin(&s3, &format!("ours/{}", segment(base))).await);
    }
    s3.age_uploads(2 * HOUR);
    let mut young = begin(&s3, &format!("ours/{}", segment(20))).await;
    assert_eq!(s3.open_uploads().len(), 11);

    let patient = MultipartAbortReport { young: 6, foreign: 2, ..MultipartAbortReport::default() };
    assert_eq!(sweep(&store, DAY).await, patient, "all objects are younger than the grace period");
    let aborted = MultipartAbortReport { aborted: 5, young: 1, foreign: 2, ..MultipartAbortReport::default() };
    assert_eq!(sweep(&store, HOUR).await, aborted);
    assert_eq!(sweep(&store, HOUR).await, MultipartAbortReport { aborted: 0, ..aborted });
    young.complete().await.unwrap();
    for mut upload in others {
        upload.complete().await.unwrap();
    }
    assert_eq!(s3.open_uploads(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_abort_is_reported_and_retried_the_next_time() {
    let s3 = S3::start().await;
    let store = TierStore::open(&s3.options("ours"), "test").unwrap();
    let (stubborn, other) = (segment(1), segment(2));
    for object in [&stubborn, &other] {
        drop(begin(&s3, &format!("ours/{object}")).await);
    }
    s3.age_uploads(2 * HOUR);
    let file = stubborn.rsplit('/').next().unwrap();
    s3.faults().inject_at(Op::AbortUpload, file, 0, Fault::Status(403), usize::MAX);
    let report = sweep(&store, HOUR).await;
    assert_eq!((report.aborted, report.failed.len()), (1, 1), "{report:?}");
    assert!(report.failed[0].0 == stubborn && report.failed[0].1.contains("403"), "{report:?}");
    s3.faults().clear();
    // The upload is aborted and the response is lost. The repeated request finds no upload, which is a success.
    s3.faults().inject(Op::AbortUpload, Fault::LostResponse, 1);
    let report = sweep(&store, HOUR).await;
    assert_eq!((report.aborted, report.failed.len()), (1, 0), "{report:?}");
    s3.faults().clear();

    s3.faults().inject(Op::ListUploads, Fault::Status(501), usize::MAX);
    let error = abort_abandoned_uploads(&store, HOUR, clock::wall_ms()).await.unwrap_err();
    assert!(matches!(error, MultipartAbortError::List { .. }) && error.to_string().contains("501"), "{error}");
    assert!(error.to_string().contains("life-cycle"), "{error}");
    s3.faults().clear();
    let foreign = TierStore::open(&s3.options("ours"), "foreign").unwrap();
    let error = abort_abandoned_uploads(&foreign, HOUR, clock::wall_ms()).await.unwrap_err();
    assert!(matches!(error, MultipartAbortError::Binding(BindingError::Foreign { .. })), "{error}");
}

#[test]
fn uploads_of_a_killed_broker_are_aborted_by_the_next() {
    let s3 = S3::begin();
    let mut instance = BrokerInstance::new().object_store(&s3).setting("tier.garbage_grace", "\"1s\"");
    let broker = instance.start();
    let cli = instance.cli();
    let config = ["segment.bytes=18000000", "local.retention.bytes=0"].map(|one| ["--config", one]).concat();
    cli.ok(&[&["topic", "create", "t"][..], &config].concat());
    s3.faults().inject(Op::PutPart, Fault::Delay(DAY), usize::MAX);
    let text: String = (0..20_000).map(|line| format!("{line:01000}\n")).collect();
    cli.ok_with(&["produce", "t"], text.as_bytes());
    let abandoned = eventually("a segment is being uploaded", || s3.open_uploads().first().cloned());
    broker.kill9();
    s3.faults().clear();
    s3.age_uploads(2 * DAY);
    let broker = instance.start();
    eventually("the upload is aborted", || (!s3.open_uploads().contains(&abandoned)).then_some(()));
    // The abort is logged after the store has responded.
    eventually("the abort is logged", || {
        instance.log().contains("aborted abandoned uploads of killed brokers uploads=1").then_some(())
    });
    eventually("the segment is uploaded nevertheless", || {
        (instance.metric("strandline_tier_uploads_total") >= 1.0).then_some(())
    });
    assert!(cli.ok(&["consume", "t", "--until-end"]).stdout == text.as_bytes());
    assert!(broker.terminate().success(), "{}", instance.log());
}

/// An external store has its own list of uploads, its own prefix matching and its own upload times. `S3_URL` names a
/// bucket and a prefix. The endpoint and the keys are in the usual environment variables.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a bucket: make real-s3 S3_URL=s3://bucket/prefix"]
async fn real_store_aborts_abandoned_uploads() {
    let url = std::env::var("S3_URL").expect("S3_URL names a bucket and a prefix");
    let (bucket, prefix) = url.strip_prefix("s3://").and_then(|rest| rest.split_once('/')).expect("s3://bucket/prefix");
    let prefix = format!("{prefix}/test-{}", strandline::task::random::uuid());
    let endpoint = std::env::var("AWS_ENDPOINT_URL").ok();
    let options = ObjectStoreOptions { endpoint, ..ObjectStoreOptions::new(&format!("s3://{bucket}/{prefix}")) };
    for check in doctor::examine(&options).await.unwrap() {
        println!("{:28} {:?}: {}", check.name, check.outcome, check.detail);
        assert_ne!(check.outcome, doctor::CheckOutcome::Fail, "{check:?}");
    }
    let client = || AmazonS3Builder::from_env().with_allow_http(true).with_bucket_name(bucket);
    let store = TierStore::open(&options, "test").unwrap();
    for base in 0..3 {
        drop(begin_with(client(), &format!("{prefix}/{}", segment(base))).await);
    }
    let mut foreign = begin_with(client(), &format!("{prefix}/topics/backup.tar")).await;
    let young = MultipartAbortReport { young: 3, foreign: 1, ..MultipartAbortReport::default() };
    assert_eq!(sweep(&store, DAY).await, young);
    let later = clock::wall_ms() + 2 * i64::try_from(DAY.as_millis()).unwrap();
    let aborted = MultipartAbortReport { aborted: 3, foreign: 1, ..MultipartAbortReport::default() };
    assert_eq!(abort_abandoned_uploads(&store, DAY, later).await.unwrap(), aborted);
    assert_eq!(sweep(&store, DAY).await, MultipartAbortReport { foreign: 1, ..MultipartAbortReport::default() });
    foreign.abort().await.unwrap();
    store.delete(name::CLUSTER).await.unwrap();
}
