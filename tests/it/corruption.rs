//! Data on disk or in the object store is corrupt, missing or unreachable. Brokers never serve wrong data, lose no more
//! than is corrupt, and need no restart once missing data is back.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    broker::{Broker, BrokerInstance, Cli},
    test_timeout::eventually,
};

/// Returns `count` different lines, so that a line at the wrong offset is detected.
pub(crate) fn lines(count: usize) -> String {
    (0..count).map(|n| format!("line {n} of the log, which is {:x}\n", n.wrapping_mul(0x9e37_79b9))).collect()
}

/// Returns the files below a folder whose names end in `ending`.
pub(crate) fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let (mut folders, mut found) = (vec![folder.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("the folder is readable") {
            let path = entry.expect("the folder is readable").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Flips one bit of the byte at the offset `at` of a file.
fn flip_bit(path: &Path, at: usize) {
    let mut bytes = fs::read(path).expect("a file");
    bytes[at] ^= 0x04;
    fs::write(path, bytes).expect("the file is written");
}

/// Returns partition 0 of a topic, as `topic describe` reports it.
pub(crate) fn partition(cli: &Cli, topic: &str) -> Value {
    cli.ok(&["topic", "describe", topic, "--output", "json"]).json()["partitions"][0].clone()
}

/// Starts a broker with the topics `victim`, which contains the lines of `text`, and `calm`. If `tiered` is true, waits
/// until only the object store has the records of `victim`.
fn start_with_records(tiered: bool, text: &str) -> (BrokerInstance, Broker) {
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    let cli = instance.cli();
    let tier = format!("remote.storage.enable={tiered}");
    let config = ["segment.bytes=65536", "segment.ms=200", "local.retention.bytes=0", "retention.ms=-1", &tier];
    let config: Vec<&str> = config.into_iter().flat_map(|one| ["--config", one]).collect();
    cli.ok(&[&["topic", "create", "victim"][..], &config].concat());
    cli.ok(&["topic", "create", "calm"]);
    cli.ok_with(&["produce", "victim"], text.as_bytes());
    if tiered {
        eventually("all records are only in the object store", || {
            let state = partition(&cli, "victim");
            (state["tiered_end"] == state["high_watermark"] && state["local_start"] == state["tiered_end"])
                .then_some(())
        });
    }
    (instance, broker)
}

/// Checks that a read of the topic `victim` fails, and that its output before the failure is the beginning of `text`.
/// Checks also that the topic `calm` accepts records.
fn check_read_fails_after_correct_prefix(cli: &Cli, text: &str) {
    let read = cli.run(&["consume", "victim", "--from", "earliest", "--until-end"]);
    assert_eq!(read.code, 1, "a corrupt object is an error: {}", read.stderr);
    assert!(text.as_bytes().starts_with(&read.stdout), "the printed records are correct");
    assert!(read.stdout.len() < text.len() && !read.stderr.is_empty(), "{}", read.stderr);
    assert!(!read.stderr.contains("panicked"), "{}", read.stderr);
    cli.ok_with(&["produce", "calm"], b"still here\n");
}

#[test]
fn flipped_bit_in_segment_file_is_never_served() {
    let text = lines(20_000);
    let (mut instance, broker) = start_with_records(false, &text);
    assert!(broker.terminate().success(), "{}", instance.log());
    let bytes = |path: &PathBuf| fs::metadata(path).map_or(0, |file| file.len());
    let victims: Vec<PathBuf> =
        files(&instance.data_dir(), ".log").into_iter().filter(|path| bytes(path) > 0).collect();
    assert!(victims.len() > 3, "sealed segments exist: {victims:?}");
    // The offset is relative to the size, because the size varies: timing decides how records form batches.
    flip_bit(&victims[1], usize::try_from(bytes(&victims[1]) / 2).expect("a small segment"));
    let _broker = instance.start();
    check_read_fails_after_correct_prefix(&instance.cli(), &text);
}

#[test]
fn flipped_bit_in_object_makes_only_that_object_unreadable() {
    let text = lines(20_000);
    let (mut instance, broker) = start_with_records(true, &text);
    assert!(broker.terminate().success(), "{}", instance.log());
    let objects = files(&instance.object_store_dir(), ".segment");
    assert!(objects.len() > 3, "segment objects exist: {objects:?}");
    // The offset is relative to the size, because the size varies: timing decides how records form batches.
    let bytes = fs::metadata(&objects[1]).expect("an object").len();
    flip_bit(&objects[1], usize::try_from(bytes / 2).expect("a small object"));
    let _broker = instance.start();
    check_read_fails_after_correct_prefix(&instance.cli(), &text);
    // Records after the corrupt object are readable.
    let name = objects[2].file_name().and_then(|name| name.to_str()).expect("a name");
    let base: usize = name.split('-').next().expect("the base offset").parse().expect("a number");
    let rest: String = text.split_inclusive('\n').skip(base).collect();
    let read = instance.cli().ok(&["consume", "victim", "--from", &base.to_string(), "--until-end"]);
    assert_eq!(read.stdout.len(), rest.len());
    assert!(read.stdout == rest.as_bytes());
}

#[test]
fn missing_object_is_reported_and_served_when_restored() {
    let text = lines(20_000);
    let (mut instance, broker) = start_with_records(true, &text);
    assert!(broker.terminate().success(), "{}", instance.log());
    let object = files(&instance.object_store_dir(), ".segment").remove(1);
    let away = instance.path().join("away");
    fs::rename(&object, &away).expect("the file is moved");
    let _broker = instance.start();
    check_read_fails_after_correct_prefix(&instance.cli(), &text);
    fs::rename(&away, &object).expect("the file is moved back");
    let whole = eventually("the object is served again", || {
        let read = instance.cli().run(&["consume", "victim", "--from", "earliest", "--until-end"]);
        (read.code == 0).then_some(read.stdout)
    });
    assert!(whole == text.as_bytes(), "{} of {} bytes", whole.len(), text.len());
}

/// While the object store is missing, uploads fail and appends succeed. When it is back, the remaining uploads follow
/// without a restart.
#[test]
fn missing_object_store_loses_no_records() {
    let text = lines(20_000);
    let (instance, mut broker) = start_with_records(true, &text);
    let cli = instance.cli();
    let away = instance.path().join("object-store-away");
    fs::rename(instance.object_store_dir(), &away).expect("the file is moved");
    // A file at the path of the folder prevents the broker from creating the folder again.
    fs::write(instance.object_store_dir(), "no folder").expect("written");
    cli.ok_with(&["produce", "victim"], text.as_bytes());
    let state = partition(&cli, "victim");
    let (tiered, end) =
        (state["tiered_end"].as_i64().expect("a number"), state["high_watermark"].as_i64().expect("a number"));
    assert_eq!((tiered, end), (20_000, 40_000), "the record is written, but not in the object store");
    let tail = cli.ok(&["consume", "victim", "--from", "20000", "--until-end"]);
    assert!(tail.stdout == text.as_bytes(), "only committed records are evicted");
    assert!(broker.is_running());
    fs::remove_file(instance.object_store_dir()).expect("removed");
    fs::rename(&away, instance.object_store_dir()).expect("the file is moved back");
    eventually("the rest is uploaded", || (partition(&cli, "victim")["tiered_end"] == 40_000).then_some(()));
    let whole = cli.ok(&["consume", "victim", "--from", "earliest", "--until-end"]);
    assert!(whole.stdout == [text.as_bytes(), text.as_bytes()].concat());
}

#[test]
fn object_store_of_another_cluster_is_refused() {
    let (instance, _broker) = start_with_records(true, &lines(10));
    let other = BrokerInstance::new();
    let text = fs::read_to_string(other.write_config()).expect("a configuration");
    let text = text.replace("cluster = \"it\"", "cluster = \"someone-else\"");
    let [own, foreign] = [&other, &instance].map(|instance| instance.object_store_dir().display().to_string());
    let text = text.replace(&own, &foreign);
    let file = other.path().join("foreign.toml");
    fs::write(&file, text).expect("written");
    let output =
        Cli::without_broker(other.path()).run(&["broker", "--config", file.to_str().expect("the path is UTF-8")]);
    assert_eq!(output.code, 1, "{output:?}");
    assert!(output.stderr.contains("someone-else") && output.stderr.contains("\"it\""), "{output:?}");
    instance.cli().ok_with(&["produce", "calm"], b"still here\n");
}
