//! What comes to hold once nothing goes wrong any more (design.md §13, *live*): mirrors show what the store holds, what is sealed is in
//! the bucket, and what nothing names is gone from there.
//!
//! That every request is answered and every replica in sync `run` sees to.

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

/// How long mirrors and uploads may take. A leader that could not upload looks again within eight seconds.
const SOON: Duration = Duration::from_secs(30);

/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Waits until every mirror is right and all that is sealed is in the bucket.
pub(crate) async fn comes(world: &World, judge: &Judge) {
    until(SOON, async || match mirrored(&world.machines, judge).await {
        None => uploaded(judge).await,
        wrong => wrong,
    })
    .await;
}

/// Waits until the bucket holds what is named there and nothing else: somebody looks for garbage once in that time, and may find it too
/// young once.
pub(crate) async fn collects(world: &World, judge: &Judge) {
    until(3 * GRACE + SOON, async || garbage(&world.shared.objects, judge).await).await;
}

/// Waits for it, not for ever.
async fn until(within: Duration, mut wrong: impl AsyncFnMut() -> Option<String>) {
    let end = clock::monotonic() + within;
    while let Some(wrong) = wrong().await {
        panics::check();
        assert!(clock::monotonic() < end, "after {within:?} of peace: {wrong}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Whose mirror is not what the store holds.
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

/// What the bucket holds of a partition, as the store says.
async fn tier(judge: &Judge, id: PartitionId) -> TierState {
    let key = judge.keys.tier(id);
    let entry = judge.store.get(&key).await.unwrap().entry;
    entry.map_or_else(TierState::default, |entry| TierState::decode(&key, &entry.value).unwrap())
}

/// What is sealed and not in the bucket.
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

/// What is in the bucket and named by nothing, or named and not there.
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
    // A topic is described there with its first segment.
    let left: Vec<_> = there.iter().filter(|object| !named.contains(*object) && !topics.contains(*object)).collect();
    let first = left.first()?;
    Some(format!("nothing names {first}, nor {} more", left.len() - 1))
}
