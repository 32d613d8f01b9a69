//! Decisions of one broker about partition values: examples, and random orders of values, reports and role ends.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const ME: BrokerId = BrokerId(1);
const OTHER: BrokerId = BrokerId(2);

/// Returns the value of `epoch` that names this leader; brokers 1 to 3 are replicas.
fn value(epoch: u32, leader: Option<BrokerId>) -> PartitionValue {
    PartitionValue { leader, ..PartitionValue::new(vec![ME, OTHER, BrokerId(3)], LeaderEpoch(epoch)) }
}

fn apply(metadata: &mut AppliedMetadata, revision: u64, value: PartitionValue) -> Transition {
    metadata.apply(Arc::new(value), Revision(revision), ME)
}

/// Returns the metadata of a broker that leads in epoch 4, by a value of revision 10.
fn leading() -> AppliedMetadata {
    let mut metadata = AppliedMetadata::default();
    assert_eq!(apply(&mut metadata, 10, value(4, Some(ME))), Transition::Lead);
    metadata.start_leading();
    metadata
}

#[test]
fn value_of_older_revision_changes_nothing() {
    let mut metadata = leading();
    let before = metadata.clone();
    assert_eq!(apply(&mut metadata, 9, value(3, Some(OTHER))), Transition::Stale);
    assert_eq!(metadata, before);
}

#[test]
fn leader_keeps_its_role_while_its_epoch_lasts() {
    let mut metadata = leading();
    assert_eq!(apply(&mut metadata, 10, value(4, Some(ME))), Transition::Unchanged);
    let shrunk = PartitionValue { isr: vec![ME], ..value(4, Some(ME)) };
    assert_eq!(apply(&mut metadata, 11, shrunk), Transition::SetsChanged);
    assert!(metadata.isr_contains(ME) && !metadata.isr_contains(OTHER) && !metadata.is_late(ME));
    assert_eq!(apply(&mut metadata, 12, value(6, Some(ME))), Transition::Lead);
}

/// Before a task leads, it may have to read the object store. If the same value or newer sets of the epoch arrive
/// meanwhile, the leadership must not start again.
#[test]
fn leadership_that_has_not_begun_is_decided_once() {
    let mut metadata = AppliedMetadata::default();
    assert_eq!(apply(&mut metadata, 10, value(4, Some(ME))), Transition::Lead);
    assert_eq!(apply(&mut metadata, 10, value(4, Some(ME))), Transition::Unchanged);
    assert_eq!(apply(&mut metadata, 11, value(4, Some(ME))), Transition::SetsChanged);
    assert!(!metadata.is_late(ME));
}

#[test]
fn value_with_an_ended_leadership_is_late() {
    let mut metadata = leading();
    metadata.end_role();
    for revision in [10, 11] {
        assert_eq!(apply(&mut metadata, revision, value(4, Some(ME))), Transition::EndedEpoch);
        assert!(metadata.is_late(ME));
    }
    assert_eq!(apply(&mut metadata, 12, value(5, None)), Transition::Idle);
    assert!(!metadata.is_late(ME));
    assert_eq!(apply(&mut metadata, 13, value(6, Some(ME))), Transition::Lead);
}

#[test]
fn refused_leadership_makes_the_value_late() {
    let mut metadata = AppliedMetadata::default();
    assert_eq!(apply(&mut metadata, 10, value(4, Some(ME))), Transition::Lead);
    metadata.refuse_leadership();
    assert!(metadata.is_late(ME));
    assert_eq!(apply(&mut metadata, 11, value(4, Some(ME))), Transition::EndedEpoch);
}

#[test]
fn value_below_reported_epoch_gives_no_role() {
    let mut metadata = AppliedMetadata::default();
    metadata.on_reported_epoch(LeaderEpoch(5));
    assert_eq!(apply(&mut metadata, 10, value(3, Some(OTHER))), Transition::Idle);
    assert_eq!(apply(&mut metadata, 11, value(4, Some(ME))), Transition::Idle);
    assert!(metadata.is_late(ME));
    assert_eq!(apply(&mut metadata, 12, value(5, Some(OTHER))), Transition::Follow(OTHER));
    assert!(!metadata.is_late(ME));
}

#[test]
fn replica_that_is_added_again_subscribes_again() {
    let added = |removals| PartitionValue { adding: vec![ME], removal_count: removals, ..value(4, Some(OTHER)) };
    let mut metadata = AppliedMetadata::default();
    assert_eq!(apply(&mut metadata, 10, added(1)), Transition::Follow(OTHER));
    assert_eq!(apply(&mut metadata, 11, added(1)), Transition::SetsChanged);
    assert_eq!(apply(&mut metadata, 12, added(2)), Transition::Follow(OTHER));
    // The end of the addition changes only the sets.
    assert_eq!(apply(&mut metadata, 13, value(4, Some(OTHER))), Transition::SetsChanged);
    let removed = PartitionValue { replicas: vec![OTHER], ..value(4, Some(OTHER)) };
    assert_eq!(apply(&mut metadata, 14, removed), Transition::Idle);
}

#[test]
fn store_is_read_after_a_second_without_newer_value() {
    let mut metadata = leading();
    assert!(!metadata.is_read_due(true, 500));
    assert!(!metadata.is_read_due(true, 1499));
    assert!(metadata.is_read_due(true, 1500));
    assert!(!metadata.is_read_due(false, 1500));
    assert!(!metadata.is_read_due(true, 1600), "the time starts again");
    metadata.stop_waiting();
    assert!(!metadata.is_read_due(true, 2600));
}

#[test]
fn stored_value_confirms_or_disproves_a_reported_epoch() {
    let mut metadata = leading();
    metadata.on_reported_epoch(LeaderEpoch(6));
    metadata.end_role();
    let mut read = |revision, value: &PartitionValue| metadata.check_read_back(value, Revision(revision), ME);
    assert_eq!(read(9, &value(3, Some(OTHER))), ReadBack::Ignored, "older than the applied value");
    assert_eq!(read(11, &value(6, Some(ME))), ReadBack::Ignored, "only the metadata cache starts a leadership");
    assert_eq!(read(11, &value(6, Some(OTHER))), ReadBack::Confirmed);
    assert_eq!(read(10, &value(4, Some(ME))), ReadBack::Disproved(LeaderEpoch(6)));
    assert_eq!(read(10, &value(4, Some(ME))), ReadBack::Confirmed, "the report no longer counts");
    assert_eq!(apply(&mut metadata, 10, value(4, Some(ME))), Transition::EndedEpoch);
}

#[derive(Clone, Debug)]
enum Input {
    /// A value with this revision and leader. Its epoch is the newest epoch so far plus `epochs_later`.
    Value {
        revision: u64,
        epochs_later: u32,
        leader: Option<u32>,
        is_replica: bool,
        removal_count: u64,
    },
    /// The last value is delivered again.
    Repeat,
    Report(u32),
    /// A value was read from the store. `None` is the last value. `Some` is a value of the next revision, with the
    /// number of epochs after the newest epoch so far, and with a leader. The value is applied unless it is ignored.
    ReadBack(Option<(u32, u32)>),
    RefuseLeadership,
    EndRole,
}

fn inputs() -> impl Strategy<Value = Vec<Input>> {
    let leader = prop_oneof![Just(None), (1u32..4).prop_map(Some)];
    let some_value = (0u64..40, 0u32..3, leader, prop::bool::weighted(0.9), 0u64..3).prop_map(
        |(revision, epochs_later, leader, is_replica, removal_count)| Input::Value {
            revision,
            epochs_later,
            leader,
            is_replica,
            removal_count,
        },
    );
    let input = prop_oneof![
        6 => some_value,
        2 => Just(Input::Repeat),
        1 => (0u32..9).prop_map(Input::Report),
        2 => prop::option::of((0u32..3, 1u32..4)).prop_map(Input::ReadBack),
        1 => Just(Input::RefuseLeadership),
        1 => Just(Input::EndRole),
    ];
    prop::collection::vec(input, 1..60)
}

proptest! {
    /// The role follows from the newest applied value. No epoch is led twice, and none while a newer epoch counts as
    /// reported.
    #[test]
    fn roles_follow_from_newest_value(inputs in inputs()) {
        let mut metadata = AppliedMetadata::default();
        let (mut led, mut newest) = (BTreeSet::new(), 1);
        let mut last: Option<(PartitionValue, Revision)> = None;
        for input in inputs {
            let before = metadata.clone();
            let (value, revision) = match (input, &last) {
                (Input::Report(epoch), _) => {
                    metadata.on_reported_epoch(LeaderEpoch(epoch));
                    continue;
                }
                (Input::EndRole, _) => {
                    metadata.end_role();
                    continue;
                }
                (Input::RefuseLeadership, _) => {
                    if metadata.role == AssignedRole::Leader {
                        metadata.refuse_leadership();
                        prop_assert!(metadata.is_late(ME));
                    }
                    continue;
                }
                (Input::ReadBack(_), None) => continue,
                (Input::ReadBack(read), Some((value, revision))) => {
                    let (stored, revision) = match read {
                        None => (value.clone(), *revision),
                        Some((epochs_later, leader)) => {
                            let epoch = LeaderEpoch(newest + epochs_later);
                            let stored = PartitionValue { leader: Some(BrokerId(leader)), leader_epoch: epoch, ..value.clone() };
                            (stored, revision.max(&metadata.revision()).next())
                        }
                    };
                    let reported = before.newest_seen_epoch;
                    match metadata.check_read_back(&stored, revision, ME) {
                        ReadBack::Ignored => {
                            prop_assert_eq!(&metadata, &before);
                            continue;
                        }
                        ReadBack::Confirmed => prop_assert!(stored.leader_epoch >= reported),
                        ReadBack::Disproved(epoch) => {
                            prop_assert!(stored.leader_epoch < epoch && epoch == reported);
                            prop_assert_eq!(metadata.newest_seen_epoch, stored.leader_epoch);
                        }
                    }
                    prop_assert!(revision >= before.revision());
                    let starts = stored.leader == Some(ME) && stored.leader_epoch > before.epoch();
                    prop_assert!(!starts, "only the metadata cache starts a leadership");
                    (stored, revision)
                }
                (Input::Repeat, None) => continue,
                (Input::Repeat, Some(last)) => last.clone(),
                (Input::Value { revision, epochs_later, leader, is_replica, removal_count }, _) => {
                    let epoch = newest + epochs_later;
                    let replicas = if is_replica { vec![ME, OTHER, BrokerId(3)] } else { vec![OTHER, BrokerId(3)] };
                    let adding = if removal_count > 0 && is_replica { vec![ME] } else { Vec::new() };
                    let leader = leader.map(BrokerId);
                    let value = PartitionValue {
                        leader, adding, removal_count, ..PartitionValue::new(replicas, LeaderEpoch(epoch))
                    };
                    (value, Revision(revision))
                }
            };
            let reported = metadata.newest_seen_epoch;
            let transition = metadata.apply(Arc::new(value.clone()), revision, ME);
            if revision < before.revision() {
                prop_assert_eq!(transition, Transition::Stale);
                prop_assert_eq!(&metadata, &before);
                continue;
            }
            prop_assert_eq!((metadata.epoch(), metadata.revision()), (value.leader_epoch, revision));
            newest = newest.max(value.leader_epoch.0);
            let is_current = value.replicas.contains(&ME) && value.leader_epoch >= reported;
            match transition {
                Transition::Stale => prop_assert!(false, "the value is not older"),
                Transition::Unchanged => {
                    prop_assert_eq!((before.revision(), before.role), (revision, metadata.role));
                }
                Transition::SetsChanged => {
                    prop_assert_eq!((before.epoch(), before.role), (value.leader_epoch, metadata.role));
                }
                Transition::Lead => {
                    prop_assert!(is_current && value.leader == Some(ME));
                    prop_assert!(led.insert(value.leader_epoch), "led twice in epoch {}", value.leader_epoch);
                    metadata.start_leading();
                }
                Transition::Follow(leader) => {
                    prop_assert!(is_current && value.leader == Some(leader) && leader != ME);
                }
                Transition::EndedEpoch => {
                    prop_assert!(is_current && value.leader == Some(ME) && metadata.is_late(ME));
                    prop_assert!(led.last() >= Some(&value.leader_epoch));
                }
                Transition::Idle => prop_assert!(!is_current || value.leader.is_none()),
            }
            // A value that is delivered again gives the same role.
            let again = metadata.apply(Arc::new(value.clone()), revision, ME);
            if transition == Transition::EndedEpoch {
                prop_assert_eq!(again, transition);
            } else {
                prop_assert_eq!(again, Transition::Unchanged);
            }
            last = Some((value, revision));
        }
    }
}
