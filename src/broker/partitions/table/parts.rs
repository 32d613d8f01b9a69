//! A map that is read without a lock and changed by copying. The map consists of parts: a change of one entry copies
//! only the entries of its part.

use std::{borrow::Borrow, collections::BTreeMap, sync::Arc};

use arc_swap::{ArcSwap, Guard};

use crate::model::{TopicId, TopicName};

/// Number of parts. With 100,000 topics, a part has about 400 entries.
const PART_COUNT: usize = 256;

/// A key that determines its part.
pub(super) trait PartKey: Ord + Clone {
    /// Returns a hash, from which the part of the key is derived. Hashes of different keys must be evenly distributed.
    fn part_hash(&self) -> usize;
}

impl PartKey for TopicName {
    fn part_hash(&self) -> usize {
        hash_name(self.as_str())
    }
}

impl PartKey for TopicId {
    fn part_hash(&self) -> usize {
        // Ids are random, and their last byte is uniformly distributed.
        usize::from(self.as_bytes()[15])
    }
}

fn hash_name(name: &str) -> usize {
    usize::try_from(crc32c::crc32c(name.as_bytes())).expect("a usize has at least 32 bits")
}

type Part<K, V> = BTreeMap<K, V>;

/// A map of [`PART_COUNT`] parts. A reader gets a consistent state of one part, but not of all parts together.
pub(super) struct ShardedMap<K, V>(Box<[ArcSwap<Part<K, V>>]>);

impl<K, V> Default for ShardedMap<K, V> {
    fn default() -> Self {
        Self((0..PART_COUNT).map(|_| ArcSwap::default()).collect())
    }
}

impl<K: PartKey, V: Clone> ShardedMap<K, V> {
    /// Returns the current state of the part to which a key belongs.
    pub(super) fn of(&self, key: &K) -> Guard<Arc<Part<K, V>>> {
        self.0[key.part_hash() % PART_COUNT].load()
    }

    /// Returns all parts, each in its state when the iterator reaches it.
    pub(super) fn all(&self) -> impl Iterator<Item = Arc<Part<K, V>>> + '_ {
        self.0.iter().map(ArcSwap::load_full)
    }

    /// Inserts each key with a value, and removes each key with `None`. Only one caller may change the map at a time,
    /// else changes are lost.
    pub(super) fn apply(&self, changes: impl IntoIterator<Item = (K, Option<V>)>) {
        let mut by_part: BTreeMap<usize, Vec<(K, Option<V>)>> = BTreeMap::new();
        for (key, value) in changes {
            by_part.entry(key.part_hash() % PART_COUNT).or_default().push((key, value));
        }
        for (number, changes) in by_part {
            let mut part = Part::clone(&self.0[number].load());
            for (key, value) in changes {
                match value {
                    Some(value) => part.insert(key, value),
                    None => part.remove(&key),
                };
            }
            self.0[number].store(Arc::new(part));
        }
    }
}

impl<V: Clone> ShardedMap<TopicName, V> {
    /// Returns the part for a name, as [`Self::of`] does. The name need not be a valid topic name.
    pub(super) fn of_name(&self, name: &str) -> Guard<Arc<Part<TopicName, V>>>
    where
        TopicName: Borrow<str>,
    {
        self.0[hash_name(name) % PART_COUNT].load()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u32) -> TopicName {
        format!("topic-{number}").parse().expect("the name is valid")
    }

    /// Regression: each added or removed topic copied the table of all topics. Adding 100,000 topics one by one took
    /// hours.
    #[test]
    fn change_of_one_entry_copies_one_part() {
        let parts = ShardedMap::<TopicName, u32>::default();
        parts.apply((0..10_000).map(|number| (name(number), Some(number))));
        let before: Vec<_> = parts.all().collect();
        parts.apply([(name(1), None), (name(10_000), Some(10_000))]);
        let after: Vec<_> = parts.all().collect();
        let copied = before.iter().zip(&after).filter(|(before, after)| !Arc::ptr_eq(before, after));
        let copied: usize = copied.map(|(part, _)| part.len()).sum();
        assert!(copied < 200, "{copied} entries were copied");
        let mut all: Vec<u32> = after.iter().flat_map(|part| part.values().copied()).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq([0].into_iter().chain(2..=10_000)));
        assert_eq!(parts.of(&name(10_000)).get(&name(10_000)), Some(&10_000));
        assert_eq!(parts.of_name("topic-1").get("topic-1"), None);
    }
}
