//! Batches that cannot be decoded. An append decodes only the first records, and refuses the batch if they are corrupt.
//! A consumer stops at an undecodable batch that is stored, or skips it with `--skip-corrupt`.

use std::io::Write as _;

use flate2::{Compression, write::GzEncoder};
use rustix::process::Signal;
use strandline::proto::{
    error::{ApiError, ErrorCode},
    v1,
};

use crate::{broker::BrokerInstance, running::Running, wire};

/// Value of the attributes field of a batch with gzip records.
const GZIP: i16 = 1;

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(plain).expect("memory can be written");
    encoder.finish().expect("memory can be written")
}

/// Returns the uncompressed records of a batch, without its header. The last record is corrupt if `breaks_last` is
/// true.
fn encode_records(count: usize, breaks_last: bool) -> Vec<u8> {
    let values = vec![&b"0123456789abcdef"[..]; count];
    let mut records = wire::batch(&values)[61..].to_vec();
    if breaks_last {
        // The last byte is the header count of the last record.
        *records.last_mut().expect("records") = 0x55;
    }
    records
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_with_an_undecodable_beginning_are_refused() {
    let mut instance = BrokerInstance::new();
    let _broker = tokio::task::block_in_place(|| instance.start());
    wire::create_topic(instance.grpc(), "orders", 1, &[]).await;
    let mut log = wire::log(instance.grpc());
    let noise: Vec<u8> = (0..200_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    for (what, count, stored) in [
        ("one record, and a header that declares 10^6", 1_000_000, gzip(&encode_records(1, false))),
        ("noise", 1, noise),
        ("a broken record", 3, gzip(&encode_records(3, true))),
    ] {
        let refused =
            wire::append(&mut log, wire::append_batch("orders", 0, wire::raw_batch(&stored, count, GZIP))).await;
        let refused = refused.expect_err(what);
        assert_eq!((refused.code, refused.retryable), (ErrorCode::MalformedBatch, false), "{what}: {refused:?}");
        assert!(!refused.message.contains("fewer records"), "{what}: {refused:?}");
    }
    let stored = wire::append(
        &mut log,
        wire::append_batch("orders", 0, wire::raw_batch(&gzip(&encode_records(3, false)), 3, GZIP)),
    )
    .await;
    assert_eq!(stored.expect("a valid batch").base_offset, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batch_above_the_decompression_limit_names_the_setting() {
    const SETTING: &str = "limits.decompression_memory_bytes";
    let mut instance = BrokerInstance::new().setting(SETTING, 1 << 20);
    let _broker = tokio::task::block_in_place(|| instance.start());
    for (topic, codec) in [("opened", "uncompressed"), ("kept", "producer")] {
        let config = [("compression.type", codec), ("max.message.bytes", "8388608")];
        wire::create_topic(instance.grpc(), topic, 1, &config).await;
    }
    let mut log = wire::log(instance.grpc());
    let large = wire::raw_batch(&gzip(&wire::batch(&[&vec![7; 4 << 20]])[61..]), 1, GZIP);
    let refused = wire::append(&mut log, wire::append_batch("opened", 0, large.clone())).await.expect_err("too large");
    assert!(refused.message.contains(SETTING) && !refused.retryable, "{refused:?}");
    assert_eq!(wire::latest(&mut log, "opened", 0).await.expect("a response"), 0, "no record is stored");

    // The broker decompresses the stored batch for a read of decoded records, which exceeds the limit. The consumer
    // decompresses the batch itself, without this limit.
    wire::append(&mut log, wire::append_batch("kept", 0, large)).await.expect("the batch is stored unchanged");
    let partition = v1::FetchPartition { topic: "kept".to_owned(), ..Default::default() };
    let request = v1::ReadRequest { partitions: vec![partition], decode: true, ..Default::default() };
    let read = log.read(request).await.expect("a response").into_inner().partitions.remove(0);
    let refused = ApiError::from(read.error.expect("the records exceed the limit"));
    assert!(refused.message.contains(SETTING) && !refused.retryable, "{refused:?}");
    let consumed =
        tokio::task::block_in_place(|| instance.cli().ok(&["consume", "kept", "--from", "earliest", "--until-end"]));
    assert_eq!(consumed.stdout.len(), (4 << 20) + 1);
}

/// An append checks only the records in the first 4 KiB of decompressed bytes. The corrupt record is the last of 1,000,
/// so the batch is stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consume_skips_an_undecodable_batch_only_on_request() {
    let mut instance = BrokerInstance::new();
    let _broker = tokio::task::block_in_place(|| instance.start());
    wire::create_topic(instance.grpc(), "orders", 1, &[]).await;
    let mut log = wire::log(instance.grpc());
    for batch in [
        wire::batch(&[b"before"]),
        wire::raw_batch(&gzip(&encode_records(1_000, true)), 1_000, GZIP),
        wire::batch(&[b"after"]),
        wire::raw_batch(&gzip(&encode_records(1_000, true)), 1_000, GZIP),
    ] {
        wire::append(&mut log, wire::append_batch("orders", 0, batch)).await.expect("stored");
    }
    let cli = instance.cli();
    let consume = |more: &[&str]| {
        tokio::task::block_in_place(|| cli.run(&[&["consume", "orders", "--until-end"], more].concat()))
    };
    let failed = consume(&[]);
    assert_eq!(failed.code, 1, "{failed:?}");
    assert_eq!(failed.text().lines().count(), 1 + 999, "the decodable records are printed");
    for words in [
        "batch at offset 1 ",
        "from offset 1000 on",
        "the next batch is at offset 1001",
        "--partition 0 --from 1001",
        "--skip-corrupt",
    ] {
        assert!(failed.stderr.contains(words), "{words}: {}", failed.stderr);
    }
    assert_eq!(consume(&["--from", "1001", "--max-records", "1"]).text(), "after\n");
    let skipped = consume(&["--skip-corrupt"]);
    assert_eq!(skipped.code, 0, "{skipped:?}");
    assert_eq!(skipped.text().lines().count(), 1 + 999 + 1 + 999, "the log ends at the previous end");
    let first = "skipped offsets 1000 up to, but not including, 1001";
    let second = "skipped offsets 2001 up to, but not including, 2002";
    for words in [first, second, "skipped 2 records"] {
        assert!(skipped.stderr.contains(words), "{words}: {}", skipped.stderr);
    }
    // A consumer that follows the topic ends at a signal, and prints the same information about skipped records.
    let follows = Running::start(&cli, &["consume", "orders", "--from", "earliest", "--skip-corrupt"]);
    let stderr = follows.stderr.clone();
    tokio::task::block_in_place(|| {
        follows.wait_for_output(&stderr, second);
        assert_eq!(follows.stop(Signal::INT).0, Some(0));
    });
    assert!(stderr.lock().contains("skipped 2 records"));
}
