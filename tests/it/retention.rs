//! Retention of a log that is not uploaded: the newest data stays, the disk is given back, and neither a kill nor a restart
//! changes what can be read.

use std::path::Path;

use crate::{
    broker::{Broker, Home},
    damage::{files, lines, partition},
    patience::eventually,
};

const LIMIT: u64 = 300_000;

/// What a segment of 64 KiB and the batch that did not fit into it may add.
const SLACK: u64 = 140_000;

fn on_disk(home: &Home) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    files(&home.data_dir(), ".log").iter().map(|path| size(path)).sum()
}

fn given_back(home: &Home) {
    let cli = home.cli();
    eventually("the disk is given back", || {
        let state = partition(&cli, "t");
        (on_disk(home) < LIMIT + SLACK && state["local_start"] == state["log_start"]).then_some(())
    });
}

/// Everything that can be read is the end of `text`, and as much as the limit says; the disk holds no more than that.
fn keeps_the_newest(home: &Home, text: &str) -> u64 {
    let cli = home.cli();
    let (state, read) = eventually("nothing moves", || {
        let before = partition(&cli, "t");
        let read = cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).text();
        (partition(&cli, "t") == before).then_some((before, read))
    });
    assert!(text.ends_with(&read), "{} bytes are not the end of what was produced", read.len());
    let bytes = on_disk(home);
    assert!(bytes >= LIMIT, "{bytes} bytes are left of at least {LIMIT}: {state}");
    let count = read.lines().count() as u64;
    assert_eq!(state["log_end"].as_u64().expect("a number") - state["log_start"].as_u64().expect("a number"), count);
    assert_eq!((&state["tiered_end"], &state["local_start"]), (&0.into(), &state["log_start"]), "{state}");
    state["log_start"].as_u64().expect("a number")
}

fn runs(mut home: Home) {
    let broker = home.start();
    let cli = home.cli();
    let create = ["topic", "create", "t", "--config", "segment.bytes=65536", "--config", "retention.ms=-1"];
    cli.ok(&[&create[..], &["--config", "remote.storage.enable=false"]].concat());
    let text = lines(40_000);
    cli.ok_with(&["produce", "t"], text.as_bytes());
    let before = on_disk(&home);
    assert!(before > 3 * LIMIT, "{before} bytes were written");
    cli.ok(&["topic", "alter", "t", "--config", &format!("retention.bytes={LIMIT}")]);
    given_back(&home);
    let start = keeps_the_newest(&home, &text);
    assert!(start > 0);

    let restarts: [fn(Broker); 2] = [Broker::kill9, |broker| assert!(broker.terminate().success())];
    let mut broker = broker;
    for end in restarts {
        end(broker);
        broker = home.start();
        assert_eq!(keeps_the_newest(&home, &text), start, "a restart changes nothing");
    }
    // Segments are sealed, and looked at, one after the other: each lets the oldest go and no more.
    let more = lines(52_000);
    home.cli().ok_with(&["produce", "t"], &more.as_bytes()[text.len()..]);
    given_back(&home);
    assert!(keeps_the_newest(&home, &more) > start);
    drop(broker);
}

#[test]
fn a_topic_that_is_not_uploaded_keeps_its_limit_and_gives_the_disk_back() {
    runs(Home::new());
}

#[test]
fn a_broker_without_an_object_store_keeps_the_limit_and_gives_the_disk_back() {
    runs(Home::new().without_object_store());
}
