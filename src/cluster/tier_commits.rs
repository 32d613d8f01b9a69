//! Tier commits: the transaction that makes uploaded segments part of a partition. Only after this transaction may a
//! local segment be evicted because the object store has it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{Compare, Keys, MetaStore, MetaStoreError, PartitionValue, Transaction, TxnOutcome, Value as _};
use crate::{
    model::{LeaderEpoch, PartitionId},
    tier::TierState,
};

/// Error of a read or commit of a tier state.
#[derive(Debug, thiserror::Error)]
pub enum TierCommitError {
    /// The metadata store failed or did not respond. The commit may be applied nevertheless; the next attempt reads
    /// whether it was.
    #[error(transparent)]
    Store(#[from] MetaStoreError),
    /// The partition has another leader epoch: this broker must not commit.
    #[error("partition {id} is led in epoch {current}, not {epoch}")]
    Deposed {
        /// Id of the partition.
        id: PartitionId,
        /// Epoch of the attempted commit.
        epoch: LeaderEpoch,
        /// Current leader epoch.
        current: LeaderEpoch,
    },
    /// Another broker committed meanwhile, the partition is deleted, or its value (for example the ISR) was changed
    /// during the commit. This attempt committed nothing.
    #[error("the tier state of partition {id} was changed by another broker, or the partition is deleted")]
    Changed {
        /// Id of the partition.
        id: PartitionId,
    },
    /// The stored value of the partition or its tier state cannot be read; it is not overwritten.
    #[error(transparent)]
    Invalid(#[from] super::InvalidValue),
}

/// Commits tier states by compare-and-set.
#[derive(Clone)]
pub struct TierCommits {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    /// True if the metadata store had no space for the last transaction of this object and its clones.
    no_space: Arc<AtomicBool>,
}

impl TierCommits {
    /// Returns a writer of the tier states under `keys` in `store`.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys) -> Self {
        Self { store, keys, no_space: Arc::default() }
    }

    /// Returns the committed tier state of a partition, read from the store and not from the metadata cache. Before the
    /// first commit, this is the default state. Returns `None` if the partition does not exist.
    pub async fn current(&self, id: PartitionId) -> Result<Option<TierState>, TierCommitError> {
        if self.store.get(&self.keys.partition(id)).await?.entry.is_none() {
            return Ok(None);
        }
        let key = self.keys.tier(id);
        match self.store.get(&key).await?.entry {
            Some(entry) => Ok(Some(TierState::decode(&key, &entry.value)?)),
            None => Ok(Some(TierState::default())),
        }
    }

    /// Fails if the commit of an upload is known to fail now: each upload without a commit leaves an orphan object. If
    /// the store had no space for the last transaction, this writes the stored tier state of the partition again,
    /// unchanged, to test for space.
    ///
    /// # Errors
    /// The store returned to an older state, still has no space, or failed during the test.
    pub async fn check_can_commit(&self, id: PartitionId) -> Result<(), TierCommitError> {
        if let Some(regression) = self.store.regression() {
            return Err(MetaStoreError::Regressed(regression).into());
        }
        if !self.no_space.load(Ordering::Acquire) {
            return Ok(());
        }
        let key = self.keys.tier(id);
        let (unchanged, value) = match self.store.get(&key).await?.entry {
            Some(entry) => (Compare::ModRevision(key.clone(), entry.mod_revision), entry.value),
            None => (Compare::Absent(key.clone()), TierState::default().encode()),
        };
        self.transact(Transaction::new().when(unchanged).put(key, value)).await.map(drop)
    }

    /// Runs a transaction, and sets `no_space` to whether the store had no space for it.
    async fn transact(&self, transaction: Transaction) -> Result<TxnOutcome, TierCommitError> {
        let outcome = self.store.transact(transaction).await;
        self.no_space.store(matches!(outcome, Err(MetaStoreError::NoSpace { .. })), Ordering::Release);
        Ok(outcome?)
    }

    /// Replaces the stored state `before` by `after` if `epoch` is still the partition's leader epoch. For the first
    /// commit, `before` is `None` or the default state. If `after` is stored already, an earlier attempt was applied
    /// whose response was lost: the commit succeeds.
    pub async fn commit(
        &self,
        id: PartitionId,
        epoch: LeaderEpoch,
        before: Option<&TierState>,
        after: &TierState,
    ) -> Result<(), TierCommitError> {
        let (partition_key, tier_key) = (self.keys.partition(id), self.keys.tier(id));
        let partition = self.store.get(&partition_key).await?.entry.ok_or(TierCommitError::Changed { id })?;
        let current = PartitionValue::decode(&partition_key, &partition.value)?.leader_epoch;
        if current != epoch && !mutant!(DeposedLeaderCommits) {
            return Err(TierCommitError::Deposed { id, epoch, current });
        }
        let tier = self.store.get(&tier_key).await?.entry;
        // `None` if no state is stored yet.
        let before = before.filter(|state| **state != TierState::default());
        let unchanged = match &tier {
            None if before.is_none() => Compare::Absent(tier_key.clone()),
            None => return Err(TierCommitError::Changed { id }),
            Some(entry) => {
                let committed = TierState::decode(&tier_key, &entry.value)?;
                if committed == *after {
                    return Ok(());
                }
                if committed != before.cloned().unwrap_or_default() {
                    return Err(TierCommitError::Changed { id });
                }
                Compare::ModRevision(tier_key.clone(), entry.mod_revision)
            }
        };
        let transaction = Transaction::new()
            .when(Compare::ModRevision(partition_key, partition.mod_revision))
            .when(unchanged)
            .put(tier_key, after.encode());
        match self.transact(transaction).await? {
            TxnOutcome::Committed { .. } => Ok(()),
            TxnOutcome::CompareFailed { .. } => Err(TierCommitError::Changed { id }),
        }
    }
}
