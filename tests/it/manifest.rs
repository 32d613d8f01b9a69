//! A partition's manifest is lost from a real bucket behind a real broker: it is made again, by itself where what is left is what was
//! committed, else by order.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    broker::{Broker, Cli, Home},
    damage::{files, lines, partition},
    s3::S3,
    test_timeout::eventually,
};

/// Small segments that leave the disk as soon as the bucket has them.
const EAGER: &[&str] = &["segment.bytes=65536", "segment.ms=200", "local.retention.bytes=0", "retention.ms=-1"];

/// Records in each of the pieces that a test begins with.
const RECORDS: usize = 3000;

/// A broker whose topic `t` has so many pieces in the bucket, each of some segments, and nothing on the disk; it is stopped.
fn stopped_with(pieces: usize) -> (S3, Home) {
    let server = S3::begin();
    let mut home = Home::new().object_store(&server);
    let broker = home.start();
    let config: Vec<&str> = EAGER.iter().flat_map(|one| ["--config", *one]).collect();
    home.cli().ok(&[&["topic", "create", "t"][..], &config].concat());
    for piece in 1..=pieces {
        home.cli().ok_with(&["produce", "t"], lines(RECORDS).as_bytes());
        settled(&home.cli(), (piece * RECORDS) as i64);
    }
    assert!(broker.terminate().success());
    (server, home)
}

fn settled(cli: &Cli, end: i64) {
    eventually("everything is in the bucket, and there alone", || {
        let state = partition(cli, "t");
        (state["high_watermark"] == end && state["tiered_end"] == end && state["local_start"] == end).then_some(())
    });
}

/// The objects whose file names begin so or end so.
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

/// The offsets that a segment object's name says.
fn range(object: &Path) -> (i64, i64) {
    let name = object.file_name().and_then(|name| name.to_str()).expect("a name");
    let mut parts = name.split('-').map(|part| part.parse().expect("a number"));
    (parts.next().expect("its base"), parts.next().expect("its end"))
}

fn lose(paths: &[PathBuf]) {
    assert!(!paths.is_empty(), "there is something to lose");
    paths.iter().for_each(|path| fs::remove_file(path).expect("it is deleted"));
}

fn start(home: &mut Home) -> (Cli, Broker) {
    let broker = home.start();
    (home.cli(), broker)
}

#[test]
fn a_lost_manifest_is_made_again_by_itself_and_a_left_over_copy_of_a_segment_does_no_harm() {
    let (server, mut home) = stopped_with(3);
    let segments = objects(&server, ".segment");
    // What a retried upload leaves: the same records under another attempt's name.
    let name = segments[1].file_name().and_then(|name| name.to_str()).expect("a name");
    let (stem, _) = name.rsplit_once(".segment").expect("a segment");
    let copy = format!("{}00000000-0000-4000-8000-000000000001.segment", &stem[..stem.len() - 36]);
    fs::copy(&segments[1], segments[1].with_file_name(copy)).expect("copied");
    lose(&objects(&server, "manifest-"));
    let (cli, _broker) = start(&mut home);
    cli.ok_with(&["produce", "t"], lines(RECORDS).as_bytes());
    settled(&cli, 4 * RECORDS as i64);
    let read = cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]);
    assert!(read.stdout == lines(RECORDS).repeat(4).as_bytes(), "every record is there");
    assert_eq!(home.log().matches("it was made again from the segments' footers").count(), 1);
}

#[test]
fn a_manifest_without_one_of_its_segments_waits_for_a_person_who_is_told_what_is_missing() {
    let (server, mut home) = stopped_with(3);
    let segments = objects(&server, ".segment");
    let (from, to) = range(&segments[1]);
    lose(&segments[1..2]);
    lose(&objects(&server, "manifest-"));
    let (cli, _broker) = start(&mut home);
    cli.ok_with(&["produce", "t"], lines(10).as_bytes());
    eventually("the description tells the way out", || {
        let described = cli.ok(&["cluster", "describe"]).text();
        described.contains("partition rebuild-manifest t/0").then_some(())
    });
    let missing = format!("no object covers {from}..{to}");
    let asked = cli.run(&["partition", "rebuild-manifest", "t/0"]);
    assert!(asked.code == 1 && asked.stderr.contains(&missing) && asked.stderr.contains("--yes"), "{asked:?}");
    assert_eq!(partition(&cli, "t")["log_start"], 0, "nothing was given up without a word");

    let done = cli.ok(&["partition", "rebuild-manifest", "t/0", "--yes"]).text();
    assert!(done.contains(&missing) && done.contains("the manifest of t/0 is there again"), "{done}");
    let end = 3 * RECORDS as i64 + 10;
    settled(&cli, end);
    let start = partition(&cli, "t")["log_start"].as_i64().expect("a number");
    assert_eq!(start, to, "behind the missing segment");
    let read = cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).text();
    assert_eq!(read.lines().count() as i64, end - start, "what is left reads back");
    let again = cli.run(&["partition", "rebuild-manifest", "t/0", "--yes"]);
    assert!(again.code == 1 && again.stderr.contains("is there: nothing is to be rebuilt"), "{again:?}");
}
