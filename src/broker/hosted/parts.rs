//! A map that is read without a lock and changed by copying: in parts, so that a change of one entry copies few of the others.

use std::{borrow::Borrow, collections::BTreeMap, sync::Arc};

use arc_swap::{ArcSwap, Guard};

use crate::model::{TopicId, TopicName};

/// How many parts there are. With 100,000 topics each has 400.
const PARTS: usize = 256;

/// A key that says which part holds it.
pub(super) trait PartKey: Ord + Clone {
    /// Equal keys have equal numbers, and those of different keys are spread evenly.
    fn number(&self) -> usize;
}

impl PartKey for TopicName {
    fn number(&self) -> usize {
        number_of_name(self.as_str())
    }
}

impl PartKey for TopicId {
    fn number(&self) -> usize {
        // Ids are drawn: each of their last bytes is as good as any.
        usize::from(self.as_bytes()[15])
    }
}

fn number_of_name(name: &str) -> usize {
    usize::try_from(crc32c::crc32c(name.as_bytes())).expect("a usize holds 32 bits")
}

type Part<K, V> = BTreeMap<K, V>;

/// The map. Readers see each part whole, and one after the other where they look at all.
pub(super) struct Parts<K, V>(Box<[ArcSwap<Part<K, V>>]>);

impl<K, V> Default for Parts<K, V> {
    fn default() -> Self {
        Self((0..PARTS).map(|_| ArcSwap::default()).collect())
    }
}

impl<K: PartKey, V: Clone> Parts<K, V> {
    /// The part that holds a key, if any does.
    pub(super) fn of(&self, key: &K) -> Guard<Arc<Part<K, V>>> {
        self.0[key.number() % PARTS].load()
    }

    /// All parts, each as it is when it is its turn.
    pub(super) fn all(&self) -> impl Iterator<Item = Arc<Part<K, V>>> + '_ {
        self.0.iter().map(ArcSwap::load_full)
    }

    /// Puts or removes entries. Only one caller changes the map, else changes are lost.
    pub(super) fn apply(&self, changes: impl IntoIterator<Item = (K, Option<V>)>) {
        let mut by_part: BTreeMap<usize, Vec<(K, Option<V>)>> = BTreeMap::new();
        for (key, value) in changes {
            by_part.entry(key.number() % PARTS).or_default().push((key, value));
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

impl<V: Clone> Parts<TopicName, V> {
    /// As [`Self::of`], for a name that nobody has checked.
    pub(super) fn of_name(&self, name: &str) -> Guard<Arc<Part<TopicName, V>>>
    where
        TopicName: Borrow<str>,
    {
        self.0[number_of_name(name) % PARTS].load()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u32) -> TopicName {
        format!("topic-{number}").parse().expect("valid")
    }

    /// Each topic that came or went copied the table of all topics: 100,000 of them, one by one, took hours.
    #[test]
    fn change_of_one_entry_copies_few_others() {
        let parts = Parts::<TopicName, u32>::default();
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
