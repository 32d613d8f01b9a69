//! The mirror: pure moves first, then the task over a real store.

use std::sync::Arc;

use super::*;
use crate::{
    cluster::{
        embedded::EmbeddedStore,
        faulty::Faulty,
        keys::{TopicValue, Value as _},
        partition_value::PartitionValue,
        store::{Changes, Entry, Event, Listing, Transaction},
    },
    model::{BrokerId, ConfigMap, LeaderEpoch, TopicId, TopicName},
};

fn keys() -> Keys {
    Keys::new("test").expect("valid")
}

fn id() -> TopicId {
    TopicId::from_bytes([5; 16])
}

fn name() -> TopicName {
    "orders".parse().expect("valid")
}

fn topic(partitions: u32) -> TopicValue {
    TopicValue { id: id(), partitions, replication_factor: 1, config: ConfigMap::new() }
}

fn partition(epoch: u32) -> PartitionValue {
    PartitionValue::new(vec![BrokerId(1)], LeaderEpoch(epoch))
}

fn entry(key: String, value: impl Into<bytes::Bytes>, revision: u64) -> Entry {
    let revision = Revision(revision);
    Entry { key, value: value.into(), create_revision: revision, mod_revision: revision, lease: None }
}

fn changes(revision: u64, events: Vec<Event>) -> Changes {
    Changes { revision: Revision(revision), events }
}

fn epoch(state: &ViewState, number: u32) -> Option<u32> {
    let known = state.partition(PartitionId::new(id(), number))?.partition.clone()?;
    Some(known.value.leader_epoch.0)
}

fn topic_path() -> String {
    keys().topic(&name())
}

fn partition_path(number: u32) -> String {
    keys().partition(PartitionId::new(id(), number))
}

/// A topic of two partitions at revision 10.
fn listed() -> ViewState {
    let mut state = ViewState::default();
    let entries = vec![
        entry(partition_path(0), partition(0).encode(), 8),
        entry(partition_path(1), partition(0).encode(), 9),
        entry(topic_path(), topic(2).encode(), 9),
    ];
    let changed = state.replace(&keys(), Listing { revision: Revision(10), entries });
    assert_eq!(changed.len(), 3);
    state
}

#[test]
fn what_is_older_than_the_state_changes_nothing() {
    let mut state = listed();
    let late = Event::Put(entry(partition_path(0), partition(99).encode(), 9));
    assert!(state.apply(&keys(), changes(10, vec![late])).is_empty());
    let gone = Event::Delete { key: topic_path(), revision: Revision(10) };
    assert!(state.apply(&keys(), changes(10, vec![gone])).is_empty());
    assert!(state.replace(&keys(), Listing { revision: Revision(7), entries: vec![] }).is_empty());
    assert_eq!((epoch(&state, 0), state.revision()), (Some(0), Revision(10)));
}

#[test]
fn a_listing_brings_what_the_watch_missed_and_names_only_that() {
    let mut state = listed();
    let entries = vec![
        entry(partition_path(0), partition(0).encode(), 8),
        entry(partition_path(1), partition(4).encode(), 15),
        entry(keys().controller(), r#"{"broker":2}"#, 12),
    ];
    let changed = state.replace(&keys(), Listing { revision: Revision(20), entries });
    let expected = [Key::Partition(PartitionId::new(id(), 1)), Key::Controller, Key::Topic(name())];
    assert_eq!(changed, expected);
    assert_eq!((state.topic(&name()), state.name(id()), state.controller()), (None, None, Some(BrokerId(2))));
    assert_eq!(epoch(&state, 1), None, "a partition without its topic does not count");
    assert_eq!(state.strays()[&id()].len(), 2);
}

#[test]
fn only_partitions_below_the_topics_count_count() {
    let mut state = listed();
    state.apply(&keys(), changes(11, vec![Event::Put(entry(partition_path(2), partition(0).encode(), 11))]));
    assert_eq!(epoch(&state, 2), None);
    assert_eq!(state.partitions_of(&topic(2)).count(), 2);
    assert_eq!(state.strays()[&id()][0].0, 2);
    state.apply(&keys(), changes(12, vec![Event::Put(entry(topic_path(), topic(3).encode(), 12))]));
    assert_eq!(epoch(&state, 2), Some(0));
    assert!(state.strays().is_empty());
    assert_eq!(state.partitions_on(BrokerId(1)).len(), 3);
}

#[test]
fn a_value_that_does_not_parse_is_named_and_skipped() {
    let mut state = listed();
    let broken = Event::Put(entry(partition_path(0), "{broken", 11));
    assert_eq!(state.apply(&keys(), changes(11, vec![broken])).len(), 1);
    let key = Key::Partition(PartitionId::new(id(), 0));
    assert!(state.unreadable().contains_key(&key));
    assert_eq!((epoch(&state, 0), epoch(&state, 1)), (None, Some(0)), "what it was before is not true any more");
    let mended = Event::Put(entry(partition_path(0), partition(3).encode(), 12));
    state.apply(&keys(), changes(12, vec![mended]));
    assert!(state.unreadable().is_empty());
    assert_eq!(epoch(&state, 0), Some(3));
}

#[test]
fn a_value_that_is_not_mirrored_is_named_too_while_it_does_not_parse() {
    let mut state = listed();
    let paths =
        [(keys().directory(BrokerId(1)), Key::Directory(BrokerId(1))), (keys().producer_ids(), Key::ProducerIds)];
    for (path, key) in paths {
        let put =
            |value: &'static str, revision| changes(revision, vec![Event::Put(entry(path.clone(), value, revision))]);
        let next = state.revision().0 + 1;
        assert_eq!(state.apply(&keys(), put("{broken", next)), [], "nobody acts by it");
        assert_eq!(state.unreadable().keys().collect::<Vec<_>>(), [&key]);
        let good = if key == Key::ProducerIds { r#"{"next":7}"# } else { r#"{"directory_id":"d","incarnation":"i"}"# };
        state.apply(&keys(), put(good, next + 1));
        assert!(state.unreadable().is_empty(), "{:?}", state.unreadable());
        let listing = vec![entry(path.clone(), "{broken", next + 2)];
        let listing = Listing { entries: listing, revision: Revision(next + 2) };
        assert!(!state.clone().replace(&keys(), listing).contains(&key));
    }
}

#[test]
fn keys_of_kinds_that_this_version_does_not_know_pass_by() {
    let mut state = listed();
    let new = Event::Put(entry(format!("{}groups/g", keys().prefix()), "?", 30));
    assert!(state.apply(&keys(), changes(30, vec![new])).is_empty());
    assert_eq!(state.revision(), Revision(30));
}

#[test]
fn a_change_leaves_held_states_as_they_are_and_shares_other_topics() {
    let mut state = listed();
    let other = PartitionId::new(TopicId::from_bytes([6; 16]), 0);
    state.apply(&keys(), changes(11, vec![Event::Put(entry(keys().partition(other), partition(0).encode(), 11))]));
    let held = state.clone();
    state.apply(&keys(), changes(12, vec![Event::Put(entry(partition_path(1), partition(5).encode(), 12))]));
    assert_eq!((epoch(&held, 1), epoch(&state, 1)), (Some(0), Some(5)));
    assert_eq!(state.shared_tables(&held), 1, "only the table of the topic that changed was copied");
}

async fn put(store: &EmbeddedStore, key: String, value: bytes::Bytes) -> Revision {
    match store.transact(Transaction::new().put(key, value)).await.expect("answers") {
        super::super::store::Outcome::Done { revision } => revision,
        refused => panic!("{refused:?}"),
    }
}

#[tokio::test]
async fn the_mirror_follows_the_store_and_feeds_what_changed() {
    let store = EmbeddedStore::in_memory();
    put(&store, topic_path(), topic(1).encode()).await;
    let tasks = Tasks::new();
    let view = View::start(Arc::new(store.clone()), keys(), &tasks);
    view.reached(Revision::ZERO).await;
    assert!(view.state().topic(&name()).is_some());
    let mut feed = view.feed();
    assert_eq!(feed.next().await, Some(Moved::Everything));
    let revision = put(&store, partition_path(0), partition(1).encode()).await;
    view.reached(revision).await;
    let key = Key::Partition(PartitionId::new(id(), 0));
    assert_eq!(feed.next().await, Some(Moved::Keys([key].into())));
    assert_eq!(epoch(&view.state(), 0), Some(1));
    tasks.stop().await;
    drop((view, tasks));
    assert_eq!(feed.next().await, None);
}

#[tokio::test]
async fn a_feed_that_lies_too_far_behind_starts_over() {
    let store = EmbeddedStore::in_memory();
    put(&store, topic_path(), topic(1).encode()).await;
    let tasks = Tasks::new();
    let view = View::start(Arc::new(store.clone()), keys(), &tasks);
    view.reached(Revision::ZERO).await;
    let mut feed = view.feed();
    assert_eq!(feed.next().await, Some(Moved::Everything));
    for n in 0..=FEED_MOVES {
        let moved = Key::Partition(PartitionId::new(id(), u32::try_from(n).expect("small")));
        let _listeners = view.moves.send([moved].into());
    }
    assert_eq!(feed.next().await, Some(Moved::Everything));
    tasks.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_and_watches_that_break_are_outlived() {
    let store = EmbeddedStore::in_memory();
    put(&store, topic_path(), topic(1).encode()).await;
    let faulty = Faulty::new(store.clone());
    faulty.fail_lists(5);
    faulty.break_watches();
    let tasks = Tasks::new();
    let view = View::start(Arc::new(faulty), keys(), &tasks);
    view.reached(Revision::ZERO).await;
    for n in 1..5 {
        let revision = put(&store, partition_path(0), partition(n).encode()).await;
        view.reached(revision).await;
        assert_eq!(epoch(&view.state(), 0), Some(n));
    }
    tasks.stop().await;
}

/// Each listing is of everything: twenty a second from every broker would keep a store down that is hardly up.
#[tokio::test(start_paused = true)]
async fn watches_that_break_at_once_have_the_prefix_listed_ever_more_rarely() {
    let faulty = Faulty::new(EmbeddedStore::in_memory());
    faulty.break_watches();
    let (tasks, listings) = (Tasks::new(), Counter::default());
    let _view = View::counted(Arc::new(faulty), keys(), &tasks, listings.clone());
    tokio::time::sleep(Duration::from_secs(60)).await;
    // Each watch lasts a second, and the pauses grow to five.
    assert!((10..20).contains(&listings.get()), "{} listings in a minute", listings.get());
    tasks.stop().await;
}
