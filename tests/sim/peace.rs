//! Liveness after the faults (design.md §13, *live*): metadata caches equal the store, sealed segments are in the object store, and orphan
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
    judge::Judge,
    machine::{GRACE, Machine},
    manifest,
    objects::Objects,
    panics,
    world::World,
};

/// Timeout for metadata caches and uploads. A leader retries a failed upload within eight seconds.
const SOON: Duration = Duration::from_secs(30);

/// Interval between checks.
const LOOK: Duration = Duration::from_millis(200);

/// Waits until every metadata cache equals the store and all sealed segments are in the object store.
pub(crate) async fn comes(world: &World, judge: &Judge) {
    until(SOON, async || match mirrored(&world.machines, judge).await {
        None => uploaded(judge).await,
        wrong => wrong,
    })
    .await;
}

/// Waits until the object store holds exactly the referenced objects. In that time garbage collection runs at least twice, as it may find
/// an object too young once.
pub(crate) async fn collects(world: &World, judge: &Judge) {
    until(3 * GRACE + SOON, async || garbage(&world.shared.objects, judge).await).await;
}

/// Waits until `wrong` returns `None`. Panics after `within`.
async fn until(within: Duration, mut wrong: impl AsyncFnMut() -> Option<String>) {
    let end = clock::monotonic() + within;
    while let Some(wrong) = wrong().await {
        panics::check();
        assert!(clock::monotonic() < end, "after {within:?} of peace: {wrong}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Returns the first difference between a broker's metadata cache and the store.
async fn mirrored(machines: &[Machine], judge: &Judge) -> Option<String> {
    for machine in machines {
        let listing = judge.store.list(judge.keys.prefix()).await.unwrap();
        let Some(mirror) = machine.mirror() else { continue };
        if let Some(differs) = mirror.differs_from(&judge.keys, listing) {
            return Some(format!("the mirror of broker {}: {differs}", machine.id));
        }
    }
    None
}

/// Returns the tier state of a partition in the metadata store.
async fn tier(judge: &Judge, id: PartitionId) -> TierState {
    let key = judge.keys.tier(id);
    let entry = judge.store.get(&key).await.unwrap().entry;
    entry.map_or_else(TierState::default, |entry| TierState::decode(&key, &entry.value).unwrap())
}

/// Returns a description of a partition with sealed segments that are not in the object store.
async fn uploaded(judge: &Judge) -> Option<String> {
    for (log, id, value) in judge.partitions().await {
        let state = tier(judge, id).await;
        let Some(leads) = judge.machines.iter().find(|machine| Some(machine.id) == value.leader) else { continue };
        let sealed = leads.logs.replica(id).sealed_end();
        if state.bucket_end().max(state.log_start) < sealed {
            return Some(format!("{log:?} is sealed up to {sealed}, and the bucket has {state:?}"));
        }
    }
    None
}

/// Returns a description of the orphan objects. Panics if a referenced object is missing.
async fn garbage(objects: &Objects, judge: &Judge) -> Option<String> {
    let entries = judge.store.list(judge.keys.prefix()).await.unwrap().entries;
    let (mut named, mut topics) = (BTreeSet::new(), BTreeSet::new());
    for entry in &entries {
        match judge.keys.parse(&entry.key) {
            Some(Key::Topic(_)) => {
                let value = TopicValue::decode(&entry.key, &entry.value).unwrap();
                topics.insert(name::topic_object(value.id));
            }
            Some(Key::Tier(id)) => {
                let state = TierState::decode(&entry.key, &entry.value).unwrap();
                named.extend(
                    manifest::named_by(objects, id, &state).unwrap_or_else(|wrong| panic!("{id}: {wrong}")).objects,
                );
            }
            _ => {}
        }
    }
    let there: BTreeSet<_> =
        objects.all().await.into_iter().filter(|object| object.starts_with(name::TOPICS)).collect();
    let lost = named.difference(&there).next();
    assert_eq!(lost, None, "it is named and not in the bucket");
    // The object that describes a topic is written with the topic's first segment, so it is allowed but not required.
    let left: Vec<_> = there.iter().filter(|object| !named.contains(*object) && !topics.contains(*object)).collect();
    let first = left.first()?;
    Some(format!("nothing names {first}, nor {} more", left.len() - 1))
}
