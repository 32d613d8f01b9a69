//! Batches that nobody can decode: refused at the append as far as their beginning tells, and where one is stored all the same, consumers
//! stop there, or skip it where their user said so.

use std::io::Write as _;

use flate2::{Compression, write::GzEncoder};
use rustix::process::Signal;
use strandline::proto::{
    fault::{Fault, Reason},
    v1,
};

use crate::{broker::Home, running::Running, wire};

/// The attributes of a batch of gzip records.
const GZIP: i16 = 1;

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(plain).expect("memory can be written");
    encoder.finish().expect("memory can be written")
}

/// Framed records as a batch holds them: so many, the last one broken where that is asked for.
fn framed(count: usize, breaks_last: bool) -> Vec<u8> {
    let values = vec![&b"0123456789abcdef"[..]; count];
    let mut records = wire::batch(&values)[61..].to_vec();
    if breaks_last {
        // The last record's header count.
        *records.last_mut().expect("records") = 0x55;
    }
    records
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_whose_beginning_cannot_be_decoded_are_refused_and_nothing_is_stored() {
    let mut home = Home::new();
    let _broker = tokio::task::block_in_place(|| home.start());
    wire::create_topic(home.grpc(), "orders", 1, &[]).await;
    let mut log = wire::log(home.grpc());
    let noise: Vec<u8> = (0..200_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    for (what, count, stored) in [
        ("one record, and a header that says 10^6", 1_000_000, gzip(&framed(1, false))),
        ("noise", 1, noise),
        ("a broken record", 3, gzip(&framed(3, true))),
    ] {
        let refused = wire::append(&mut log, wire::append_batch("orders", 0, wire::frame(&stored, count, GZIP))).await;
        let refused = refused.expect_err(what);
        assert_eq!((refused.reason, refused.retryable), (Reason::MalformedBatch, false), "{what}: {refused:?}");
        assert!(!refused.message.contains("fewer records"), "{what}: {refused:?}");
    }
    let stored =
        wire::append(&mut log, wire::append_batch("orders", 0, wire::frame(&gzip(&framed(3, false)), 3, GZIP))).await;
    assert_eq!(stored.expect("a right one").base_offset, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batch_that_cannot_be_decompressed_within_its_share_is_refused_with_the_settings_name() {
    const SETTING: &str = "limits.decompression_memory_bytes";
    let mut home = Home::new().setting(SETTING, 1 << 20);
    let _broker = tokio::task::block_in_place(|| home.start());
    for (topic, codec) in [("opened", "uncompressed"), ("kept", "producer")] {
        let config = [("compression.type", codec), ("max.message.bytes", "8388608")];
        wire::create_topic(home.grpc(), topic, 1, &config).await;
    }
    let mut log = wire::log(home.grpc());
    let large = wire::frame(&gzip(&wire::batch(&[&vec![7; 4 << 20]])[61..]), 1, GZIP);
    let refused = wire::append(&mut log, wire::append_batch("opened", 0, large.clone())).await.expect_err("too large");
    assert!(refused.message.contains(SETTING) && !refused.retryable, "{refused:?}");
    assert_eq!(wire::latest(&mut log, "opened", 0).await.expect("answered"), 0, "nothing is stored");

    // Stored as it is, it is opened for those who read plain records, and by clients themselves.
    wire::append(&mut log, wire::append_batch("kept", 0, large)).await.expect("stored as it is");
    let place = v1::FetchPartition { topic: "kept".to_owned(), ..Default::default() };
    let request = v1::ReadRequest { partitions: vec![place], plain: true, ..Default::default() };
    let read = log.read(request).await.expect("an answer").into_inner().partitions.remove(0);
    let refused = Fault::from(read.error.expect("its records do not fit"));
    assert!(refused.message.contains(SETTING) && !refused.retryable, "{refused:?}");
    let consumed =
        tokio::task::block_in_place(|| home.cli().ok(&["consume", "kept", "--from", "earliest", "--until-end"]));
    assert_eq!(consumed.stdout.len(), (4 << 20) + 1);
}

/// What is broken lies behind what the append looks at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consume_stops_at_a_stored_batch_that_cannot_be_decoded_and_skips_it_only_when_told() {
    let mut home = Home::new();
    let _broker = tokio::task::block_in_place(|| home.start());
    wire::create_topic(home.grpc(), "orders", 1, &[]).await;
    let mut log = wire::log(home.grpc());
    for batch in [
        wire::batch(&[b"before"]),
        wire::frame(&gzip(&framed(1_000, true)), 1_000, GZIP),
        wire::batch(&[b"after"]),
        wire::frame(&gzip(&framed(1_000, true)), 1_000, GZIP),
    ] {
        wire::append(&mut log, wire::append_batch("orders", 0, batch)).await.expect("stored");
    }
    let cli = home.cli();
    let consume = |more: &[&str]| {
        tokio::task::block_in_place(|| cli.run(&[&["consume", "orders", "--until-end"], more].concat()))
    };
    let stopped = consume(&[]);
    assert_eq!(stopped.code, 1, "{stopped:?}");
    assert_eq!(stopped.text().lines().count(), 1 + 999, "what could be decoded is printed");
    for words in ["batch at offset 1 ", "from offset 1000 on", "the next batch is at offset 1001", "--skip-corrupt"] {
        assert!(stopped.stderr.contains(words), "{words}: {}", stopped.stderr);
    }
    assert_eq!(consume(&["--from", "1001", "--max", "1"]).text(), "after\n");
    let skipped = consume(&["--skip-corrupt"]);
    assert_eq!(skipped.code, 0, "{skipped:?}");
    assert_eq!(skipped.text().lines().count(), 1 + 999 + 1 + 999, "it ends where the log did");
    for words in ["skipped up to offset 1001", "skipped up to offset 2002", "skipped 2 records"] {
        assert!(skipped.stderr.contains(words), "{words}: {}", skipped.stderr);
    }
    // One that follows ends at a signal, and its user learns the same.
    let follows = Running::start(&cli, &["consume", "orders", "--from", "earliest", "--skip-corrupt"]);
    let stderr = follows.stderr.clone();
    tokio::task::block_in_place(|| {
        follows.says(&stderr, "skipped up to offset 2002");
        assert_eq!(follows.stop(Signal::INT).0, Some(0));
    });
    assert!(stderr.lock().expect("whole").contains("skipped 2 records"));
}
