//! `/metrics` of a real broker while records are appended, uploaded and read: the metrics of each of these operations
//! change.

use strandline::proto::v1::GetMetadataRequest;

use crate::{
    broker::BrokerInstance,
    corruption::{lines, partition},
    test_timeout::eventually,
    wire,
};

#[test]
fn metrics_change_with_appends_uploads_and_reads() {
    let text = lines(20_000);
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    let cli = instance.cli();
    let config = ["segment.bytes=65536", "segment.ms=200", "local.retention.bytes=0"];
    let config: Vec<&str> = config.into_iter().flat_map(|one| ["--config", one]).collect();
    cli.ok(&[&["topic", "create", "counted"][..], &config].concat());
    cli.ok_with(&["produce", "counted"], text.as_bytes());
    assert!(instance.metric("strandline_journal_writes_total") >= 1.0);
    assert!(instance.metric("strandline_journal_bytes_total") >= instance.metric("strandline_produce_bytes_total"));
    eventually("all records are only in the object store", || {
        let state = partition(&cli, "counted");
        (state["tiered_end"] == 20_000 && state["local_start"] == 20_000).then_some(())
    });
    eventually("the lag is 0", || (instance.metric("strandline_tier_lag_records") == 0.0).then_some(()));
    // The journal is idle now, so both counters are final.
    let [frames, syncs] =
        instance.metrics(["strandline_journal_writes_total", "strandline_journal_sync_seconds_count"]);
    assert_eq!(syncs, frames, "each frame is one sync");
    assert!(instance.metric("strandline_tier_uploads_total") > 5.0);
    let [uploaded, tiered] = instance.metrics(["strandline_tier_upload_bytes_total", "strandline_tiered_bytes"]);
    assert_eq!(uploaded, tiered);
    assert!(broker.terminate().success(), "{}", instance.log());

    // After a restart, no record is in memory or in the chunk cache, so the first read fetches each chunk.
    let _broker = instance.start();
    let cli = instance.cli();
    let read =
        || assert!(cli.ok(&["consume", "counted", "--from", "earliest", "--until-end"]).stdout == text.as_bytes());
    read();
    let misses = instance.metric("strandline_cache_misses_total");
    assert!(misses > 5.0, "a chunk of each segment was fetched: {misses}");
    assert!(instance.metric("strandline_fetch_bytes_total{source=\"object_store\"}") > 0.0);
    let hits = instance.metric("strandline_cache_hits_total");
    read();
    assert_eq!(instance.metric("strandline_cache_misses_total"), misses, "no chunk is fetched twice");
    assert!(instance.metric("strandline_cache_hits_total") > hits);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connection_is_counted_while_open() {
    let mut instance = BrokerInstance::new();
    let _broker = tokio::task::block_in_place(|| instance.start());
    let count = |wanted: f64| {
        eventually("the number of connections", || (instance.metric("strandline_connections") == wanted).then_some(()));
    };
    tokio::task::block_in_place(|| count(0.0));
    let mut clients = [wire::admin(instance.grpc()), wire::admin(instance.grpc())];
    for client in &mut clients {
        client.get_metadata(GetMetadataRequest::default()).await.expect("a response");
    }
    tokio::task::block_in_place(|| count(2.0));
    drop(clients);
    tokio::task::block_in_place(|| count(0.0));
}
