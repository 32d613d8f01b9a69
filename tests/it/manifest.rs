//! The manifest of a partition is deleted from the object store of a real broker. The broker rebuilds it automatically
//! if the segment objects contain all committed records, and otherwise on an operator's command.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    broker::{Broker, BrokerInstance, Cli},
    corruption::{files, lines, partition},
    s3::S3,
    test_timeout::eventually,
};

/// Configuration of a topic with small segments that are evicted as soon as the object store has them.
const EAGER: &[&str] = &["segment.bytes=65536", "segment.ms=200", "local.retention.bytes=0", "retention.ms=-1"];

/// Number of records that are produced at a time.
const RECORDS: usize = 3000;

/// Returns an S3 server and the instance of a stopped broker. Topic `t` has [`RECORDS`] records `pieces` times, in
/// several segments each, all of them only in the object store.
fn stopped_with(pieces: usize) -> (S3, BrokerInstance) {
    let server = S3::begin();
    let mut instance = BrokerInstance::new().object_store(&server);
    let broker = instance.start();
    let config: Vec<&str> = EAGER.iter().flat_map(|one| ["--config", *one]).collect();
    instance.cli().ok(&[&["topic", "create", "t"][..], &config].concat());
    for piece in 1..=pieces {
        instance.cli().ok_with(&["produce", "t"], lines(RECORDS).as_bytes());
        wait_until_evicted(&instance.cli(), (piece * RECORDS) as i64);
    }
    assert!(broker.terminate().success());
    (server, instance)
}

/// Waits until topic `t` ends at the offset `end` and all of its records are only in the object store.
fn wait_until_evicted(cli: &Cli, end: i64) {
    eventually("all records are only in the object store", || {
        let state = partition(cli, "t");
        (state["high_watermark"] == end && state["tiered_end"] == end && state["local_start"] == end).then_some(())
    });
}

/// Returns the files of the objects whose names start or end with `part`.
fn objects(server: &S3, part: &str) -> Vec<PathBuf> {
    let all = files(&server.bucket(), "").into_iter();
    let named = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with(part) || name.ends_with(part)
    };
    let mut objects: Vec<PathBuf> = all.filter(named).collect();
    objects.sort();
    objects
}

/// Returns the base offset and the end offset in the name of a segment object.
fn range(object: &Path) -> (i64, i64) {
    let name = object.file_name().and_then(|name| name.to_str()).expect("a name");
    let mut parts = name.split('-').map(|part| part.parse().expect("a number"));
    (parts.next().expect("the base offset is present"), parts.next().expect("the end offset is present"))
}

fn remove_files(paths: &[PathBuf]) {
    assert!(!paths.is_empty(), "manifests exist");
    paths.iter().for_each(|path| fs::remove_file(path).expect("the file is removed"));
}

fn start(instance: &mut BrokerInstance) -> (Cli, Broker) {
    let broker = instance.start();
    (instance.cli(), broker)
}

#[test]
fn lost_manifest_is_rebuilt_despite_a_duplicate_segment() {
    let (server, mut instance) = stopped_with(3);
    let segments = objects(&server, ".segment");
    // A retried upload may leave a second object with the same records, under the name of another attempt.
    let name = segments[1].file_name().and_then(|name| name.to_str()).expect("a name");
    let (stem, _) = name.rsplit_once(".segment").expect("a segment");
    let copy = format!("{}00000000-0000-4000-8000-000000000001.segment", &stem[..stem.len() - 36]);
    fs::copy(&segments[1], segments[1].with_file_name(copy)).expect("copied");
    remove_files(&objects(&server, "manifest-"));
    let (cli, _broker) = start(&mut instance);
    cli.ok_with(&["produce", "t"], lines(RECORDS).as_bytes());
    wait_until_evicted(&cli, 4 * RECORDS as i64);
    let read = cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]);
    assert!(read.stdout == lines(RECORDS).repeat(4).as_bytes(), "every record is stored");
    assert_eq!(instance.log().matches("rebuilt the lost manifest from the segment footers").count(), 1);
}

#[test]
fn manifest_with_a_missing_segment_waits_for_an_operator() {
    let (server, mut instance) = stopped_with(3);
    let segments = objects(&server, ".segment");
    let (from, to) = range(&segments[1]);
    remove_files(&segments[1..2]);
    remove_files(&objects(&server, "manifest-"));
    let (cli, _broker) = start(&mut instance);
    cli.ok_with(&["produce", "t"], lines(10).as_bytes());
    eventually("the description contains the remedy", || {
        let described = cli.ok(&["cluster", "describe"]).text();
        described.contains("partition rebuild-manifest t/0").then_some(())
    });
    let missing = format!("no object covers {from}..{to}");
    let asked = cli.run(&["partition", "rebuild-manifest", "t/0"]);
    assert!(asked.code == 1 && asked.stderr.contains(&missing) && asked.stderr.contains("--yes"), "{asked:?}");
    assert_eq!(partition(&cli, "t")["log_start"], 0, "every failed record was reported");

    let done = cli.ok(&["partition", "rebuild-manifest", "t/0", "--yes"]).text();
    assert!(done.contains(&missing) && done.contains("rebuilt the manifest of t/0"), "{done}");
    let end = 3 * RECORDS as i64 + 10;
    wait_until_evicted(&cli, end);
    let start = partition(&cli, "t")["log_start"].as_i64().expect("a number");
    assert_eq!(start, to, "behind the missing segment");
    let read = cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).text();
    assert_eq!(read.lines().count() as i64, end - start, "the remaining records are read");
    let again = cli.run(&["partition", "rebuild-manifest", "t/0", "--yes"]);
    assert!(again.code == 1 && again.stderr.contains("exists: there is nothing to rebuild"), "{again:?}");
}
