//! Tests of the output of reassignments and elections.

use super::*;
use crate::{
    client::ReplicaDescription,
    model::{LeaderEpoch, Offset},
    proto::error::{ApiError, ErrorCode},
};

fn brokers(numbers: &[u32]) -> Vec<BrokerId> {
    numbers.iter().copied().map(BrokerId).collect()
}

fn reassignment() -> Reassignment {
    Reassignment {
        topic: "orders".to_owned(),
        partition: 0,
        replicas: brokers(&[3, 2, 1]),
        adding: brokers(&[3]),
        removing: brokers(&[4]),
        isr: brokers(&[4, 2, 1]),
        leader: Some(BrokerId(4)),
        changed: true,
        queued: false,
    }
}

fn moves() -> Vec<Reassignment> {
    let reordered = Reassignment { partition: 1, adding: vec![], removing: vec![], ..reassignment() };
    let same = Reassignment { partition: 2, changed: false, ..reordered.clone() };
    let known = Reassignment { partition: 3, changed: false, leader: None, ..reassignment() };
    let (isr, leader) = (brokers(&[2, 1]), Some(BrokerId(2)));
    let more = Reassignment { partition: 4, removing: vec![], isr, leader, queued: true, ..reassignment() };
    vec![reassignment(), reordered, same, known, more]
}

#[test]
fn reassignment_output_matches_golden_files() {
    output::golden::lines("partition-reassign.txt", &format_requested(&moves()));
    output::golden::lines("partition-reassign-status.txt", &format_status(&moves()[3..]));
    let value = Value::Array(moves()[3..].iter().map(reassignment_json).collect());
    output::golden::json("partition-reassign.json", &value, &["Reassignment", "TopicPartition"], &[]);
    assert_eq!(format_status(&[]), "no partition is being reassigned");
    let leaderless = |partition| Reassignment { partition, leader: None, queued: true, ..reassignment() };
    let text = format_status(&[leaderless(0), leaderless(1)]);
    assert_eq!(text.matches("  no leader\n").count(), 2, "a partition without a leader cannot copy: {text}");
    assert!(text.contains("orders/0 orders/1 have no leader to copy from: see `strandline topic describe orders`"));
    assert!(format_status(&[reassignment()]).ends_with("copying"));
    let cancelled = Reassignment { replicas: brokers(&[4, 2, 1]), adding: vec![], removing: vec![], ..reassignment() };
    let ended = Reassignment { partition: 1, changed: false, ..cancelled.clone() };
    assert_eq!(
        format_cancelled(&[cancelled, ended]),
        "orders/0 stays on 4,2,1\nthe reassignment of orders/1 had ended: orders/1 is on 4,2,1"
    );
}

#[test]
fn wait_counts_only_requested_reassignments() {
    let (requested, other) = (moves(), Reassignment { partition: 9, ..reassignment() });
    let work = |active: &[Reassignment]| remaining(&requested, active);
    assert_eq!(work(std::slice::from_ref(&other)).count, 0);
    let two = work(&[reassignment(), other, Reassignment { queued: true, partition: 4, ..reassignment() }]);
    assert_eq!((two.count, &*two.text), (2, "2 partitions to move (queued: 1)"));
    assert_eq!(work(&[reassignment()]).text, "1 partition to move");
}

fn replica(broker: u32, in_sync: bool, ends: Option<(u64, u64)>) -> ReplicaDescription {
    let offset = |value| Offset::new(value).expect("small");
    let message = format!("broker {broker} is offline: if it can return with its data, start it first");
    let offline = || ApiError::new(ErrorCode::NotReady, message);
    let ends = ends.map(|(committed, end)| (offset(committed), offset(end), Some(LeaderEpoch(6))));
    ReplicaDescription {
        broker: BrokerId(broker),
        in_sync,
        eligible: false,
        empty: false,
        positions: ends.ok_or_else(offline),
    }
}

fn unclean() -> ElectionResult {
    let offset = |value| Offset::new(value).expect("small");
    // An unclean election began epoch 6, and lost the records 120..150 of this replica.
    let older = Ok((offset(150), offset(150), Some(LeaderEpoch(5))));
    ElectionResult {
        leader: BrokerId(2),
        leader_epoch: LeaderEpoch(9),
        changed: true,
        revision: 77,
        replicas: vec![
            replica(1, true, None),
            replica(2, false, Some((100, 120))),
            ReplicaDescription { positions: older, ..replica(3, false, None) },
        ],
        lost: offset(120)..offset(150),
        discard_local: false,
    }
}

#[test]
fn unclean_election_output_names_lost_records() {
    output::golden::lines("partition-elect-unclean.txt", &format_consequences("orders", 0, &unclean()));
    let messages = ["ElectLeaderRequest", "ElectLeaderResponse", "ReplicaDescription"];
    let value = unclean_election_json("orders", 0, &unclean());
    output::golden::json("partition-elect-unclean.json", &value, &messages, &[]);
    output::golden::json("partition-elect.json", &election_json("orders", 0, &unclean()), &messages[..2], &[]);
    let nothing =
        ElectionResult { replicas: unclean().replicas.split_off(1), lost: Offset::ZERO..Offset::ZERO, ..unclean() };
    let text = format_consequences("orders", 0, &nothing);
    assert!(text.ends_with("no replica reports a committed record that broker 2 lacks"), "{text}");
    // The broker of this replica lost its disk. An empty replica reports no lost record, and yet all records may be
    // lost.
    let offset = |value| Offset::new(value).expect("small");
    let bare =
        ReplicaDescription { empty: true, positions: Ok((offset(0), offset(0), None)), ..replica(3, false, None) };
    let bare = ElectionResult { leader: BrokerId(3), replicas: vec![bare], ..nothing.clone() };
    output::golden::lines("partition-elect-unclean-empty.txt", &format_consequences("solo", 0, &bare));
    assert_eq!(unclean_election_json("solo", 0, &bare)["replicas"][0]["empty"], true);
    let useless = ElectionResult {
        replicas: vec![replica(1, true, None), replica(2, false, None)],
        discard_local: true,
        ..nothing
    };
    let text = format_consequences("orders", 0, &useless);
    for wanted in [
        "no available replica has a usable log",
        "the election would delete the log of broker 2",
        "including those that only offline brokers have",
    ] {
        assert!(text.contains(wanted), "{text}");
    }
}

#[test]
fn name_is_parsed_as_topic_or_partition() {
    let name = |topic: &str, partition| Ok(TopicOrPartition { topic: topic.to_owned(), partition });
    assert_eq!("orders".parse(), name("orders", None));
    assert_eq!("orders/12".parse(), name("orders", Some(12)));
    for wrong in ["", "/1", "a b", "orders/", "orders/x", "orders/1/2", "orders/-1"] {
        assert!(wrong.parse::<TopicOrPartition>().is_err(), "{wrong}");
    }
    assert!(parse_partition("orders").expect_err("all of them").contains("orders/0"));
}
