//! How brokers of a cluster start: what they wait for in words, and what they refuse.

use std::fs;

use super::members::{Cluster, etcd};
use crate::{broker::Home, etcd::Etcd, patience::eventually};

#[test]
fn a_broker_without_the_partition_says_who_leads_it() {
    let cluster = Cluster::start(2);
    cluster.cli().ok(&["topic", "create", "t"]);
    let leader = cluster.leader("t", 0);
    // A command that is pointed at the other one alone finds its way, by metadata and by what it is told.
    let cli = cluster.home(3 - leader).cli();
    cli.ok_with(&["produce", "t"], b"one\n");
    let state = cli.ok(&["topic", "describe", "t", "--output", "json"]).json();
    assert_eq!(state["partitions"][0]["leader"], leader);
    assert_eq!(cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).stdout, b"one\n");
}

#[test]
fn a_start_waits_for_etcd_in_words_and_can_be_stopped_while_it_waits() {
    let mut etcd = Etcd::begin(1, "http", &[]);
    etcd.kill(0);
    let home = Home::member(1, &etcd);
    let waits = |times: usize| {
        eventually("it says what it waits for", || {
            (home.log().matches("waiting for the metadata store").count() >= times).then_some(())
        });
    };
    let broker = home.spawn();
    waits(1);
    assert!(home.log().contains(&etcd.endpoint(0)), "{}", home.log());
    assert!(broker.terminate().success(), "{}", home.log());
    let mut broker = home.spawn();
    waits(2);
    etcd.run(0);
    broker.wait_ready().expect("etcd is there now");
    assert!(broker.terminate().success(), "{}", home.log());
}

#[test]
fn an_etcd_that_never_heard_of_this_directory_is_refused() {
    let first = etcd(1);
    let mut home = Home::member(1, &first);
    let broker = home.start();
    home.cli().ok(&["topic", "create", "t"]);
    home.cli().ok_with(&["produce", "t"], b"one\n");
    assert!(broker.terminate().success());
    let second = etcd(1);
    home = home.at_etcd(&second);
    assert!(!home.spawn().wait().success());
    assert!(home.log().contains("is metadata.etcd another cluster's?"), "{}", home.log());
    home = home.at_etcd(&first);
    let broker = home.start();
    assert_eq!(home.cli().ok(&["consume", "t", "--from", "earliest", "--until-end"]).stdout, b"one\n");
    assert!(broker.terminate().success());
}

#[test]
fn a_number_that_another_broker_has_is_refused_with_its_address() {
    let etcd = etcd(1);
    let mut first = Home::member(1, &etcd);
    let mut running = first.start();
    let second = Home::member(1, &etcd);
    assert!(!second.spawn().wait().success());
    let told = format!("broker id 1 is taken by a broker at {}", first.grpc());
    assert!(second.log().contains(&told), "{}", second.log());
    assert!(running.is_running(), "the one who has it is not disturbed");
}

#[test]
fn of_two_processes_with_one_directory_one_ends_and_says_why() {
    let etcd = etcd(1);
    let mut first = Home::member(1, &etcd);
    let mut running = first.start();
    let second = Home::member(1, &etcd);
    copy(&first.data_dir(), &second.data_dir());
    let mut later = second.spawn();
    // Most often the later one wins; not if the first one registers again while the later one proves itself.
    let log = eventually("one of them ends", || match (running.is_running(), later.is_running()) {
        (false, true) => Some(first.log()),
        (true, false) => Some(second.log()),
        _ => None,
    });
    assert!(log.contains("with a copy of this data directory; one of the two must go"), "{log}");
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copied");
        }
    }
}
