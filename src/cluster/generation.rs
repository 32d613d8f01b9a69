//! The cluster generation: a number that is raised when the metadata store was restored to an older state.
//!
//! A restored etcd issues the same revisions a second time. The pair (generation, create revision) stays unique, so
//! code compares both to distinguish an old holder of a key from a new holder. The generation is stored in three
//! places: the key `generation`, the object store's `cluster.json`, and the marker file of each data directory. A new
//! cluster has generation 1. Only an operator raises the generation, with `strandline cluster new-generation`
//! ([`Generations::raise`]).
//!
//! # Invariants
//!
//! - The key is raised first. A starting broker copies the key's number to its directory and to the object store if the
//!   number there is lower.
//! - A broker rejects a directory or an object store with a higher number than the key: the key is from an older
//!   backup.
//!
//! # Crash
//!
//! A crash may leave the key ahead of the object store and the directories; the next starts correct them.

use std::sync::Arc;

use super::{
    keys::{GenerationValue, Keys, PRODUCER_ID_COUNTER_END, ProducerIdsValue, Value as _},
    store::{Compare, KeyValue, MetaStore, MetaStoreError, Transaction, TxnOutcome},
};

/// Generation of a cluster that was never restored.
pub const FIRST_GENERATION: u64 = 1;

/// Number of producer id counters per generation. The counters of the next generation start above them, so a counter
/// that was issued after the backup is not issued again. This holds unless one generation issues more counters than
/// this number.
const PRODUCER_IDS_PER_GENERATION: i64 = 1 << 28;

/// Returns the first producer id counter of a generation.
fn first_producer_id(generation: u64) -> i64 {
    let earlier_generations = i64::try_from(generation.saturating_sub(FIRST_GENERATION)).unwrap_or(i64::MAX);
    earlier_generations.saturating_mul(PRODUCER_IDS_PER_GENERATION).min(PRODUCER_ID_COUNTER_END)
}

/// Access to the key `generation`.
pub struct Generations {
    store: Arc<dyn MetaStore>,
    keys: Keys,
}

impl Generations {
    /// Returns access to the key in `store`.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys) -> Self {
        Self { store, keys }
    }

    /// Returns the stored generation; `None` if the key does not exist, as in a store that no cluster has used yet.
    ///
    /// # Errors
    /// Those of [`MetaStore::get`]; `Unavailable` also if the value cannot be read.
    pub async fn current(&self) -> Result<Option<u64>, MetaStoreError> {
        Ok(self.read().await?.map(|(_, generation)| generation))
    }

    /// Returns the stored generation. If the key does not exist, creates it with [`FIRST_GENERATION`].
    ///
    /// # Errors
    /// Those of [`Generations::current`] and of [`MetaStore::transact`].
    pub async fn get_or_create(&self) -> Result<u64, MetaStoreError> {
        loop {
            if let Some((_, generation)) = self.read().await? {
                return Ok(generation);
            }
            let key = self.keys.generation();
            let first = GenerationValue { generation: FIRST_GENERATION }.encode();
            // If the compare fails, another broker has created the key, and the next pass reads it.
            self.store.transact(Transaction::new().when(Compare::Absent(key.clone())).put(key, first)).await?;
        }
    }

    /// Raises the generation above its stored value and above `above`, the highest generation that the caller has found
    /// elsewhere (0 if none). The same transaction raises the next producer id counter to at least the first one of the
    /// new generation. Returns the new generation.
    ///
    /// # Errors
    /// Those of [`Generations::get_or_create`]; `Unavailable` also if the value of `producer-ids` cannot be read. After
    /// an unknown outcome, the generation may have been raised.
    pub async fn raise(&self, above: u64) -> Result<u64, MetaStoreError> {
        loop {
            let current = self.read().await?;
            let generation = current.as_ref().map_or(0, |(_, current)| *current).max(above).saturating_add(1);
            let (key, ids_key) = (self.keys.generation(), self.keys.producer_ids());
            let ids_entry = self.store.get(&ids_key).await?.entry;
            let stored_next = match &ids_entry {
                None => 0,
                Some(entry) => {
                    ProducerIdsValue::decode(&entry.key, &entry.value).map_err(MetaStoreError::unavailable)?.next
                }
            };
            let next = stored_next.max(first_producer_id(generation));
            let transaction = Transaction::new()
                .when(Compare::unchanged(&key, current.as_ref().map(|(entry, _)| entry)))
                .when(Compare::unchanged(&ids_key, ids_entry.as_ref()))
                .put(key, GenerationValue { generation }.encode())
                .put(ids_key, ProducerIdsValue { next }.encode());
            if let TxnOutcome::Committed { .. } = self.store.transact(transaction).await? {
                return Ok(generation);
            }
        }
    }

    /// Returns the entry of the key, for a compare, and the generation in it; `None` if the key does not exist.
    async fn read(&self) -> Result<Option<(KeyValue, u64)>, MetaStoreError> {
        let Some(entry) = self.store.get(&self.keys.generation()).await?.entry else { return Ok(None) };
        let value = GenerationValue::decode(&entry.key, &entry.value).map_err(MetaStoreError::unavailable)?;
        Ok(Some((entry, value.generation)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::EmbeddedStore;

    #[tokio::test]
    async fn generation_starts_at_one_and_rises_above_known_values() {
        let store = Arc::new(EmbeddedStore::in_memory());
        let generations = Generations::new(Arc::clone(&store) as _, Keys::new("test").expect("valid"));
        assert_eq!(generations.current().await, Ok(None));
        assert_eq!(generations.get_or_create().await, Ok(1));
        assert_eq!(generations.get_or_create().await, Ok(1), "the generation is created once");
        assert_eq!(generations.raise(0).await, Ok(2));
        assert_eq!(generations.raise(6).await, Ok(7), "the object store was ahead");
        assert_eq!(generations.current().await, Ok(Some(7)));
    }

    /// The next counter of a new generation is above all counters that earlier generations issued. Regression: a broker
    /// got a block of producer ids that another broker had issued after the backup.
    #[tokio::test]
    async fn producer_ids_start_above_those_of_earlier_generations() {
        let (store, keys) = (Arc::new(EmbeddedStore::in_memory()), Keys::new("test").expect("valid"));
        let generations = Generations::new(Arc::clone(&store) as _, keys.clone());
        let next = async || {
            let entry = store.get(&keys.producer_ids()).await.expect("readable").entry.expect("stored");
            ProducerIdsValue::decode(&entry.key, &entry.value).expect("valid").next
        };
        let backup = ProducerIdsValue { next: 3000 }.encode();
        generations.get_or_create().await.expect("the store responds");
        let mut expected = 0;
        // The same backup is restored twice. At the second restore, `above` is the generation that the first one wrote
        // to the object store.
        for above in [1, 2] {
            store.transact(Transaction::new().put(keys.producer_ids(), backup.clone())).await.expect("written");
            let generation = generations.raise(above).await.expect("the store responds");
            assert_eq!((generation, next().await), (above + 1, expected + PRODUCER_IDS_PER_GENERATION));
            expected += PRODUCER_IDS_PER_GENERATION;
        }
        let many = ProducerIdsValue { next: expected + 5 * PRODUCER_IDS_PER_GENERATION }.encode();
        store.transact(Transaction::new().put(keys.producer_ids(), many)).await.expect("written");
        generations.raise(0).await.expect("the store responds");
        assert_eq!(next().await, expected + 5 * PRODUCER_IDS_PER_GENERATION, "the counter never falls");
    }

    #[tokio::test]
    async fn unreadable_generation_is_not_overwritten() {
        let (store, keys) = (Arc::new(EmbeddedStore::in_memory()), Keys::new("test").expect("valid"));
        store.transact(Transaction::new().put(keys.generation(), "seven")).await.expect("written");
        let generations = Generations::new(Arc::clone(&store) as _, keys.clone());
        let error = generations.get_or_create().await.expect_err("the generation is unreadable");
        assert!(error.retryable() && error.to_string().contains(&keys.generation()), "{error}");
    }
}
