//! The metadata cache: first the pure changes, then the task over a real store.

use std::sync::Arc;

use super::*;
use crate::{
    cluster::{
        embedded::EmbeddedStore,
        faulty::FaultyStore,
        keys::{TopicValue, Value as _},
        partition_value::PartitionValue,
        store::{KeyValue, ListResult, Transaction, WatchBatch, WatchEvent},
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

fn entry(key: String, value: impl Into<bytes::Bytes>, revision: u64) -> KeyValue {
    let revision = Revision(revision);
    KeyValue { key, value: value.into(), create_revision: revision, mod_revision: revision, lease: None }
}

fn changes(revision: u64, events: Vec<WatchEvent>) -> WatchBatch {
    WatchBatch { revision: Revision(revision), events }
}

fn epoch(state: &MetadataSnapshot, number: u32) -> Option<u32> {
    let partition = state.partition(PartitionId::new(id(), number))?.partition.clone()?;
    Some(partition.value.leader_epoch.0)
}

fn topic_path() -> String {
    keys().topic(&name())
}

fn partition_path(number: u32) -> String {
    keys().partition(PartitionId::new(id(), number))
}

/// Returns a snapshot with a topic of two partitions at revision 10.
fn listed_snapshot() -> MetadataSnapshot {
    let mut state = MetadataSnapshot::default();
    let entries = vec![
        entry(partition_path(0), partition(0).encode(), 8),
        entry(partition_path(1), partition(0).encode(), 9),
        entry(topic_path(), topic(2).encode(), 9),
    ];
    let changed = state.replace(&keys(), ListResult { revision: Revision(10), entries });
    assert_eq!(changed.len(), 3);
    state
}

#[test]
fn older_changes_and_lists_are_ignored() {
    let mut state = listed_snapshot();
    let late = WatchEvent::Put(entry(partition_path(0), partition(99).encode(), 9));
    assert!(state.apply(&keys(), changes(10, vec![late])).is_empty());
    let deleted = WatchEvent::Delete { key: topic_path(), revision: Revision(10) };
    assert!(state.apply(&keys(), changes(10, vec![deleted])).is_empty());
    assert!(state.replace(&keys(), ListResult { revision: Revision(7), entries: vec![] }).is_empty());
    assert_eq!((epoch(&state, 0), state.revision()), (Some(0), Revision(10)));
}

#[test]
fn list_applies_and_reports_only_missed_changes() {
    let mut state = listed_snapshot();
    let entries = vec![
        entry(partition_path(0), partition(0).encode(), 8),
        entry(partition_path(1), partition(4).encode(), 15),
        entry(keys().controller(), r#"{"broker":2}"#, 12),
    ];
    let changed = state.replace(&keys(), ListResult { revision: Revision(20), entries });
    let expected = [Key::Partition(PartitionId::new(id(), 1)), Key::Controller, Key::Topic(name())];
    assert_eq!(changed, expected);
    assert_eq!((state.topic(&name()), state.name(id()), state.controller()), (None, None, Some(BrokerId(2))));
    assert_eq!(epoch(&state, 1), None, "a partition does not exist without its topic");
    assert_eq!(state.stale_partitions()[&id()].len(), 2);
}

#[test]
fn partitions_above_the_topics_count_are_stale() {
    let mut state = listed_snapshot();
    state.apply(&keys(), changes(11, vec![WatchEvent::Put(entry(partition_path(2), partition(0).encode(), 11))]));
    assert_eq!(epoch(&state, 2), None);
    assert_eq!(state.partitions_of(&topic(2)).count(), 2);
    assert_eq!(state.stale_partitions()[&id()][0].0, 2);
    state.apply(&keys(), changes(12, vec![WatchEvent::Put(entry(topic_path(), topic(3).encode(), 12))]));
    assert_eq!(epoch(&state, 2), Some(0));
    assert!(state.stale_partitions().is_empty());
    assert_eq!(state.partitions_on(BrokerId(1)).len(), 3);
}

#[test]
fn unparsable_value_is_recorded_and_skipped() {
    let mut state = listed_snapshot();
    let broken = WatchEvent::Put(entry(partition_path(0), "{broken", 11));
    assert_eq!(state.apply(&keys(), changes(11, vec![broken])).len(), 1);
    let key = Key::Partition(PartitionId::new(id(), 0));
    assert!(state.unreadable().contains_key(&key));
    assert_eq!((epoch(&state, 0), epoch(&state, 1)), (None, Some(0)), "the previous value is removed");
    let repaired = WatchEvent::Put(entry(partition_path(0), partition(3).encode(), 12));
    state.apply(&keys(), changes(12, vec![repaired]));
    assert!(state.unreadable().is_empty());
    assert_eq!(epoch(&state, 0), Some(3));
}

#[test]
fn uncached_value_is_recorded_while_unparsable() {
    let mut state = listed_snapshot();
    let paths =
        [(keys().directory(BrokerId(1)), Key::Directory(BrokerId(1))), (keys().producer_ids(), Key::ProducerIds)];
    for (path, key) in paths {
        let put = |value: &'static str, revision| {
            changes(revision, vec![WatchEvent::Put(entry(path.clone(), value, revision))])
        };
        let next = state.revision().0 + 1;
        assert_eq!(state.apply(&keys(), put("{broken", next)), [], "the change is not published");
        assert_eq!(state.unreadable().keys().collect::<Vec<_>>(), [&key]);
        let good = if key == Key::ProducerIds { r#"{"next":7}"# } else { r#"{"directory_id":"d","incarnation":"i"}"# };
        state.apply(&keys(), put(good, next + 1));
        assert!(state.unreadable().is_empty(), "{:?}", state.unreadable());
        let listing = vec![entry(path.clone(), "{broken", next + 2)];
        let listing = ListResult { entries: listing, revision: Revision(next + 2) };
        assert!(!state.clone().replace(&keys(), listing).contains(&key));
    }
}

#[test]
fn unknown_kinds_of_keys_are_ignored() {
    let mut state = listed_snapshot();
    let new = WatchEvent::Put(entry(format!("{}groups/g", keys().prefix()), "?", 30));
    assert!(state.apply(&keys(), changes(30, vec![new])).is_empty());
    assert_eq!(state.revision(), Revision(30));
}

#[test]
fn change_copies_only_its_topic_of_a_held_snapshot() {
    let mut state = listed_snapshot();
    let other = PartitionId::new(TopicId::from_bytes([6; 16]), 0);
    state.apply(&keys(), changes(11, vec![WatchEvent::Put(entry(keys().partition(other), partition(0).encode(), 11))]));
    let older = state.clone();
    state.apply(&keys(), changes(12, vec![WatchEvent::Put(entry(partition_path(1), partition(5).encode(), 12))]));
    assert_eq!((epoch(&older, 1), epoch(&state, 1)), (Some(0), Some(5)));
    assert_eq!(state.shared_topics(&older), 1, "only the entries of the topic that changed were copied");
}

async fn put(store: &EmbeddedStore, key: String, value: bytes::Bytes) -> Revision {
    match store.transact(Transaction::new().put(key, value)).await.expect("the store responds") {
        super::super::store::TxnOutcome::Committed { revision } => revision,
        outcome => panic!("{outcome:?}"),
    }
}

#[tokio::test]
async fn cache_follows_store_and_feeds_changed_keys() {
    let store = EmbeddedStore::in_memory();
    put(&store, topic_path(), topic(1).encode()).await;
    let tasks = Tasks::new();
    let metadata = MetadataCache::start(Arc::new(store.clone()), keys(), &tasks);
    metadata.wait_for_revision(Revision::ZERO).await;
    assert!(metadata.state().topic(&name()).is_some());
    let mut feed = metadata.feed();
    assert_eq!(feed.next().await, Some(MetadataChange::Relisted));
    let revision = put(&store, partition_path(0), partition(1).encode()).await;
    metadata.wait_for_revision(revision).await;
    let key = Key::Partition(PartitionId::new(id(), 0));
    assert_eq!(feed.next().await, Some(MetadataChange::Keys([key].into())));
    assert_eq!(epoch(&metadata.state(), 0), Some(1));
    tasks.stop().await;
    drop((metadata, tasks));
    assert_eq!(feed.next().await, None);
}

#[tokio::test]
async fn feed_that_lags_too_far_starts_over() {
    let store = EmbeddedStore::in_memory();
    put(&store, topic_path(), topic(1).encode()).await;
    let tasks = Tasks::new();
    let metadata = MetadataCache::start(Arc::new(store.clone()), keys(), &tasks);
    metadata.wait_for_revision(Revision::ZERO).await;
    let mut feed = metadata.feed();
    assert_eq!(feed.next().await, Some(MetadataChange::Relisted));
    for n in 0..=MAX_QUEUED_CHANGES {
        let key = Key::Partition(PartitionId::new(id(), u32::try_from(n).expect("small")));
        let _listeners = metadata.changes.send([key].into());
    }
    assert_eq!(feed.next().await, Some(MetadataChange::Relisted));
    tasks.stop().await;
}

#[tokio::test(start_paused = true)]
async fn cache_recovers_from_failing_lists_and_watches() {
    let store = EmbeddedStore::in_memory();
    put(&store, topic_path(), topic(1).encode()).await;
    let faulty = FaultyStore::new(store.clone());
    faulty.fail_lists(5);
    faulty.break_watches();
    let tasks = Tasks::new();
    let metadata = MetadataCache::start(Arc::new(faulty), keys(), &tasks);
    metadata.wait_for_revision(Revision::ZERO).await;
    for n in 1..5 {
        let revision = put(&store, partition_path(0), partition(n).encode()).await;
        metadata.wait_for_revision(revision).await;
        assert_eq!(epoch(&metadata.state(), 0), Some(n));
    }
    tasks.stop().await;
}

/// A pause between two responses is normal, and no outage. Regression: a broker whose registration was deleted reported
/// that the store had not responded for 0 s.
#[tokio::test(start_paused = true)]
async fn store_is_unresponsive_only_after_a_long_silence() {
    let (store, tasks) = (EmbeddedStore::in_memory(), Tasks::new());
    let metadata = MetadataCache::start(Arc::new(store.clone()), keys(), &tasks);
    metadata.wait_for_revision(Revision::ZERO).await;
    tokio::time::advance(MAX_CONTACT_INTERVAL).await;
    assert_eq!(metadata.unresponsive_for(), Duration::ZERO);
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(metadata.unresponsive_for(), MAX_CONTACT_INTERVAL + Duration::from_secs(1));
    let revision = put(&store, topic_path(), topic(1).encode()).await;
    metadata.wait_for_revision(revision).await;
    assert_eq!(metadata.unresponsive_for(), Duration::ZERO);
    tasks.stop().await;
}

/// While watches end without a response, the pauses between lists grow. Each list returns all metadata: twenty lists
/// per second from each broker would overload a store that has just recovered.
#[tokio::test(start_paused = true)]
async fn broken_watches_are_relisted_with_backoff() {
    let faulty = FaultyStore::new(EmbeddedStore::in_memory());
    faulty.break_watches();
    let (tasks, lists) = (Tasks::new(), Counter::default());
    let _cache = MetadataCache::start_with_counter(Arc::new(faulty), keys(), &tasks, lists.clone());
    tokio::time::sleep(Duration::from_secs(60)).await;
    // Each watch lasts a second, and the pauses grow to five seconds.
    assert!((10..20).contains(&lists.get()), "{} lists in a minute", lists.get());
    tasks.stop().await;
}
