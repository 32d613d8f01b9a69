//! Liveness after the faults: metadata caches equal the store, sealed segments are in the object store, and orphan
//! objects are deleted.
//!
//! `run` checks that every request has a response and that every replica is in sync.

use std::{collections::BTreeSet, time::Duration};

use strandline::{
    cluster::{Key, MetaStore as _, TopicValue, Value as _},
    model::PartitionId,
    task::clock,
    tier::{TierState, name},
};

use crate::{
    checker::StateChecker,
    machine::{GRACE_INTERVAL, Machine},
    manifest,
    objects::Objects,
    panics,
    world::Simulation,
};

/// Maximum time after the faults until metadata caches and uploads are complete. A leader retries a failed upload
/// within eight seconds.
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(30);

/// Interval between two checks of a condition.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// Waits until the metadata cache of every running broker equals the store and all sealed segments are in the object
/// store. Panics after [`COMPLETION_TIMEOUT`].
pub(crate) async fn wait_for_caches_and_uploads(world: &Simulation, checker: &StateChecker) {
    until(COMPLETION_TIMEOUT, async || match check_metadata_caches(&world.machines, checker).await {
        None => find_missing_upload(checker).await,
        wrong => wrong,
    })
    .await;
}

/// Waits until no orphan object remains in the object store. The timeout is long enough for two garbage collections
/// after the last fault, because the first may find an object too young. Panics after that time, or if a referenced
/// object is missing.
pub(crate) async fn wait_for_garbage_collection(world: &Simulation, checker: &StateChecker) {
    until(3 * GRACE_INTERVAL + COMPLETION_TIMEOUT, async || find_orphans(&world.shared.objects, checker).await).await;
}

/// Waits until `wrong`, which describes an unmet condition, returns `None`. Panics with the description after `within`,
/// or if a task has panicked.
async fn until(within: Duration, mut wrong: impl AsyncFnMut() -> Option<String>) {
    let end = clock::monotonic() + within;
    while let Some(wrong) = wrong().await {
        panics::check();
        assert!(clock::monotonic() < end, "{within:?} after the faults: {wrong}");
        tokio::time::sleep(CHECK_INTERVAL).await;
    }
}

/// Returns a description of the first difference between the metadata cache of a running broker and the store; `None`
/// if all are equal.
async fn check_metadata_caches(machines: &[Machine], checker: &StateChecker) -> Option<String> {
    for machine in machines {
        let listing = checker.store.list(checker.keys.prefix()).await.unwrap();
        let Some(snapshot) = machine.metadata_snapshot() else { continue };
        if let Some(differs) = snapshot.differs_from(&checker.keys, listing) {
            return Some(format!("the metadata cache of broker {}: {differs}", machine.id));
        }
    }
    None
}

/// Returns the tier state of a partition in the metadata store; the default state if there is none.
async fn tier_state(checker: &StateChecker, id: PartitionId) -> TierState {
    let key = checker.keys.tier(id);
    let entry = checker.store.get(&key).await.unwrap().entry;
    entry.map_or_else(TierState::default, |entry| TierState::decode(&key, &entry.value).unwrap())
}

/// Returns a description of a partition whose leader has sealed segments that are neither in the object store nor
/// deleted; `None` if there is none.
async fn find_missing_upload(checker: &StateChecker) -> Option<String> {
    for (log, id, value) in checker.partitions().await {
        let state = tier_state(checker, id).await;
        let Some(leads) = checker.machines.iter().find(|machine| Some(machine.id) == value.leader) else { continue };
        let sealed = leads.logs.replica(id).sealed_end();
        if state.tiered_end().max(state.log_start) < sealed {
            return Some(format!("{log:?} is sealed up to {sealed}, but the object store has {state:?}"));
        }
    }
    None
}

/// Returns a description of the orphan objects; `None` if there are none. Panics if a referenced object is missing or a
/// manifest is invalid.
async fn find_orphans(objects: &Objects, checker: &StateChecker) -> Option<String> {
    let entries = checker.store.list(checker.keys.prefix()).await.unwrap().entries;
    let (mut named, mut topics) = (BTreeSet::new(), BTreeSet::new());
    for entry in &entries {
        match checker.keys.parse(&entry.key) {
            Some(Key::Topic(_)) => {
                let value = TopicValue::decode(&entry.key, &entry.value).unwrap();
                topics.insert(name::topic_object(value.id));
            }
            Some(Key::Tier(id)) => {
                let state = TierState::decode(&entry.key, &entry.value).unwrap();
                named.extend(
                    manifest::referenced_objects(objects, id, &state)
                        .unwrap_or_else(|wrong| panic!("{id}: {wrong}"))
                        .objects,
                );
            }
            _ => {}
        }
    }
    let there: BTreeSet<_> =
        objects.all().await.into_iter().filter(|object| object.starts_with(name::TOPICS)).collect();
    let lost = named.difference(&there).next();
    assert_eq!(lost, None, "a referenced object is not in the object store");
    // The object that describes a topic is written with the topic's first segment, so it is allowed but not required.
    let left: Vec<_> = there.iter().filter(|object| !named.contains(*object) && !topics.contains(*object)).collect();
    let first = left.first()?;
    Some(format!("no manifest references {first} and {} more objects", left.len() - 1))
}
