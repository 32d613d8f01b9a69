//! The cluster generation: a number that rises when the metadata store was put back to an older state.
//!
//! Revisions of a restored etcd are given out a second time. The pair (generation, create revision) is not, so whatever must tell an old
//! holder of a key from a new one compares both. The number stands in three places: the key `generation`, the bucket's `cluster.json`,
//! and the card of each data directory. It is 1 in a new cluster, and only a person raises it ([`Generations::raise`], by
//! `strandline cluster new-generation`).
//!
//! # Invariants
//!
//! - The key is raised first. A broker that starts copies the key's number into its directory and into the bucket, where that is less.
//! - A broker whose directory or bucket has a higher number than the key does not start: the key is of an older backup.
//!
//! # What a crash leaves
//!
//! A key that is ahead of the bucket and of the directories, which the next starts mend.

use std::sync::Arc;

use super::{
    keys::{GenerationValue, Keys, ProducerIdsValue, Value as _},
    producer_ids::COUNTER_END,
    store::{Compare, Entry, MetaStore, Outcome, StoreError, Transaction},
};

/// The number of a cluster that was never restored.
pub const FIRST_GENERATION: u64 = 1;

/// Counters of producer ids that a generation may hand out: those of the next one begin behind them, so no id that was handed out after a
/// backup comes a second time.
const PRODUCER_IDS: i64 = 1 << 28;

/// The first counter of producer ids of a generation.
fn first_producer_id(generation: u64) -> i64 {
    let before = i64::try_from(generation.saturating_sub(FIRST_GENERATION)).unwrap_or(i64::MAX);
    before.saturating_mul(PRODUCER_IDS).min(COUNTER_END)
}

/// The key `generation`.
pub struct Generations {
    store: Arc<dyn MetaStore>,
    keys: Keys,
}

impl Generations {
    /// The key in `store`.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys) -> Self {
        Self { store, keys }
    }

    /// The number in the store; `None` in one that no cluster has used yet.
    ///
    /// # Errors
    /// When the store does not answer, or the value cannot be read.
    pub async fn current(&self) -> Result<Option<u64>, StoreError> {
        Ok(self.read().await?.map(|(_, generation)| generation))
    }

    /// The number in the store, which is begun where there is none.
    ///
    /// # Errors
    /// As [`Generations::current`].
    pub async fn begin(&self) -> Result<u64, StoreError> {
        loop {
            if let Some((_, generation)) = self.read().await? {
                return Ok(generation);
            }
            let key = self.keys.generation();
            let first = GenerationValue { generation: FIRST_GENERATION }.encode();
            // Refused: another broker has begun it.
            self.store.transact(Transaction::new().when(Compare::Absent(key.clone())).put(key, first)).await?;
        }
    }

    /// Raises the number above what it is, and above `above`, and the counter of producer ids with it. Returns the new one.
    ///
    /// # Errors
    /// As [`Generations::current`].
    pub async fn raise(&self, above: u64) -> Result<u64, StoreError> {
        loop {
            let known = self.read().await?;
            let generation = known.as_ref().map_or(0, |(_, known)| *known).max(above).saturating_add(1);
            let (key, ids_key) = (self.keys.generation(), self.keys.producer_ids());
            let ids = self.store.get(&ids_key).await?.entry;
            let next = match &ids {
                None => 0,
                Some(entry) => {
                    ProducerIdsValue::decode(&entry.key, &entry.value).map_err(StoreError::unavailable)?.next
                }
            };
            let next = next.max(first_producer_id(generation));
            let put = Transaction::new()
                .when(Compare::unchanged(&key, known.as_ref().map(|(entry, _)| entry)))
                .when(Compare::unchanged(&ids_key, ids.as_ref()))
                .put(key, GenerationValue { generation }.encode())
                .put(ids_key, ProducerIdsValue { next }.encode());
            if let Outcome::Done { .. } = self.store.transact(put).await? {
                return Ok(generation);
            }
        }
    }

    async fn read(&self) -> Result<Option<(Entry, u64)>, StoreError> {
        let Some(entry) = self.store.get(&self.keys.generation()).await?.entry else { return Ok(None) };
        let value = GenerationValue::decode(&entry.key, &entry.value).map_err(StoreError::unavailable)?;
        Ok(Some((entry, value.generation)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::EmbeddedStore;

    #[tokio::test]
    async fn a_generation_begins_at_one_and_is_raised_above_everything_known() {
        let store = Arc::new(EmbeddedStore::in_memory());
        let generations = Generations::new(Arc::clone(&store) as _, Keys::new("test").expect("valid"));
        assert_eq!(generations.current().await, Ok(None));
        assert_eq!(generations.begin().await, Ok(1));
        assert_eq!(generations.begin().await, Ok(1), "it is begun once");
        assert_eq!(generations.raise(0).await, Ok(2));
        assert_eq!(generations.raise(6).await, Ok(7), "the bucket was ahead");
        assert_eq!(generations.current().await, Ok(Some(7)));
    }

    /// A broker that started before another one was given a block that the other one had handed out after the backup.
    #[tokio::test]
    async fn producer_ids_of_a_generation_lie_behind_those_of_the_ones_before() {
        let (store, keys) = (Arc::new(EmbeddedStore::in_memory()), Keys::new("test").expect("valid"));
        let generations = Generations::new(Arc::clone(&store) as _, keys.clone());
        let next = async || {
            let entry = store.get(&keys.producer_ids()).await.expect("it answers").entry.expect("it is there");
            ProducerIdsValue::decode(&entry.key, &entry.value).expect("valid").next
        };
        let backup = ProducerIdsValue { next: 3000 }.encode();
        generations.begin().await.expect("it answers");
        let mut least = 0;
        // The same backup twice: the bucket knows of the first time.
        for above in [1, 2] {
            store.transact(Transaction::new().put(keys.producer_ids(), backup.clone())).await.expect("taken");
            let generation = generations.raise(above).await.expect("it answers");
            assert_eq!((generation, next().await), (above + 1, least + PRODUCER_IDS));
            least += PRODUCER_IDS;
        }
        let many = ProducerIdsValue { next: least + 5 * PRODUCER_IDS }.encode();
        store.transact(Transaction::new().put(keys.producer_ids(), many)).await.expect("taken");
        generations.raise(0).await.expect("it answers");
        assert_eq!(next().await, least + 5 * PRODUCER_IDS, "it never goes back");
    }

    #[tokio::test]
    async fn a_generation_that_cannot_be_read_is_not_begun_again() {
        let (store, keys) = (Arc::new(EmbeddedStore::in_memory()), Keys::new("test").expect("valid"));
        store.transact(Transaction::new().put(keys.generation(), "seven")).await.expect("taken");
        let generations = Generations::new(Arc::clone(&store) as _, keys.clone());
        let error = generations.begin().await.expect_err("nobody knows which it is");
        assert!(error.retryable() && error.to_string().contains(&keys.generation()), "{error}");
    }
}
