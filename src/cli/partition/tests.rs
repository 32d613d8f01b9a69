//! Tests of the output of reassignments and elections.

use super::*;
use crate::{
    client::HeldReplica,
    model::{LeaderEpoch, Offset},
    proto::error::{ApiError, ErrorCode},
};

fn brokers(numbers: &[u32]) -> Vec<BrokerId> {
    numbers.iter().copied().map(BrokerId).collect()
}

fn moving() -> Reassignment {
    Reassignment {
        topic: "orders".to_owned(),
        partition: 0,
        replicas: brokers(&[3, 2, 1]),
        adding: brokers(&[3]),
        removing: brokers(&[4]),
        isr: brokers(&[4, 2, 1]),
        leader: Some(BrokerId(4)),
        changed: true,
        waiting: false,
    }
}

fn moves() -> Vec<Reassignment> {
    let reordered = Reassignment { partition: 1, adding: vec![], removing: vec![], ..moving() };
    let same = Reassignment { partition: 2, changed: false, ..reordered.clone() };
    let known = Reassignment { partition: 3, changed: false, leader: None, ..moving() };
    let more = Reassignment { partition: 4, removing: vec![], waiting: true, ..moving() };
    vec![moving(), reordered, same, known, more]
}

#[test]
fn reassignment_output_matches_golden_files() {
    output::golden::lines("partition-reassign.txt", &reassigned(&moves()));
    output::golden::lines("partition-reassign-status.txt", &under_way(&moves()[3..]));
    let value = Value::Array(moves()[3..].iter().map(reassignment).collect());
    output::golden::json("partition-reassign.json", &value);
    assert_eq!(under_way(&[]), "no partition is being moved");
    let forsaken = Reassignment { leader: None, waiting: true, ..moving() };
    assert!(under_way(&[forsaken]).ends_with("no leader"), "its turn does not help it");
    assert!(under_way(&[moving()]).ends_with("copying"));
    let back = Reassignment { replicas: brokers(&[4, 2, 1]), adding: vec![], removing: vec![], ..moving() };
    let ended = Reassignment { partition: 1, changed: false, ..back.clone() };
    assert_eq!(taken_back(&[back, ended]), "orders/0 stays on 4,2,1\nthe move of orders/1 had ended: it is on 4,2,1");
}

#[test]
fn wait_counts_only_ordered_reassignments() {
    let (ordered, others) = (moves(), Reassignment { partition: 9, ..moving() });
    let said = |under_way: &[Reassignment]| left(&ordered, under_way);
    assert_eq!(said(std::slice::from_ref(&others)).count, 0);
    let two = said(&[moving(), others, Reassignment { waiting: true, partition: 4, ..moving() }]);
    assert_eq!((two.count, &*two.said), (2, "2 partitions to move, of which 1 waiting for their turn"));
    assert_eq!(said(&[moving()]).said, "1 partition to move");
}

fn held(broker: u32, in_sync: bool, ends: Option<(u64, u64)>) -> HeldReplica {
    let offset = |value| Offset::new(value).expect("small");
    let silent = || ApiError::new(ErrorCode::NotReady, format!("broker {broker} is not alive"));
    let ends = ends.map(|(committed, end)| (offset(committed), offset(end), Some(LeaderEpoch(6))));
    HeldReplica { broker: BrokerId(broker), in_sync, eligible: false, empty: false, ends: ends.ok_or_else(silent) }
}

fn unclean() -> Election {
    let offset = |value| Offset::new(value).expect("small");
    Election {
        leader: BrokerId(2),
        leader_epoch: LeaderEpoch(9),
        changed: true,
        revision: 77,
        held: vec![held(1, true, None), held(2, false, Some((100, 120))), held(3, false, Some((150, 110)))],
        lost: offset(120)..offset(150),
        discard: false,
    }
}

#[test]
fn unclean_election_output_names_lost_records() {
    output::golden::lines("partition-elect-unclean.txt", &prospect("orders", 0, &unclean()));
    output::golden::json("partition-elect-unclean.json", &uncleanly("orders", 0, &unclean()));
    output::golden::json("partition-elect.json", &elected("orders", 0, &unclean()));
    let nothing = Election { held: unclean().held.split_off(1), lost: Offset::ZERO..Offset::ZERO, ..unclean() };
    let said = prospect("orders", 0, &nothing);
    assert!(said.ends_with("no replica knows of a committed record that it lacks"), "{said}");
    // The broker of this replica lost its disk. An empty replica does not show that no record is lost.
    let offset = |value| Offset::new(value).expect("small");
    let bare = HeldReplica { empty: true, ends: Ok((offset(0), offset(0), None)), ..held(3, false, None) };
    let bare = Election { leader: BrokerId(3), held: vec![bare], ..nothing.clone() };
    output::golden::lines("partition-elect-unclean-empty.txt", &prospect("solo", 0, &bare));
    assert_eq!(uncleanly("solo", 0, &bare)["held"][0]["empty"], true);
    let useless = Election { held: vec![held(1, true, None), held(2, false, None)], discard: true, ..nothing };
    let said = prospect("orders", 0, &useless);
    for wanted in [
        "no replica that is alive has a log",
        "what broker 2 holds is deleted",
        "also what a broker holds that is not alive now",
    ] {
        assert!(said.contains(wanted), "{said}");
    }
}

#[test]
fn name_is_parsed_as_topic_or_partition() {
    let name = |topic: &str, partition| Ok(Name { topic: topic.to_owned(), partition });
    assert_eq!("orders".parse(), name("orders", None));
    assert_eq!("orders/12".parse(), name("orders", Some(12)));
    for wrong in ["", "/1", "a b", "orders/", "orders/x", "orders/1/2", "orders/-1"] {
        assert!(wrong.parse::<Name>().is_err(), "{wrong}");
    }
    assert!(one_partition("orders").expect_err("all of them").contains("orders/0"));
}
