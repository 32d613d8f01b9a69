//! Commits of what a partition has in the bucket: the one transaction after which local copies may go.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{Compare, Keys, MetaStore, Outcome, PartitionValue, StoreError, Transaction, Value as _};
use crate::{
    model::{LeaderEpoch, PartitionId},
    tier::TierState,
};

/// Why a commit did not happen, or is not known to have.
#[derive(Debug, thiserror::Error)]
pub enum TierCommitError {
    /// The metadata store did not answer; whether the commit happened is found out by the next try.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another epoch leads the partition: this broker must not commit.
    #[error("partition {id} is led in epoch {current}, not {epoch}")]
    Deposed {
        /// The partition.
        id: PartitionId,
        /// The epoch that wanted to commit.
        epoch: LeaderEpoch,
        /// The epoch that counts.
        current: LeaderEpoch,
    },
    /// Somebody else committed in between, or the partition is gone.
    #[error("the tier of partition {id} was changed by somebody else, or the partition is deleted")]
    Changed {
        /// The partition.
        id: PartitionId,
    },
    /// What the store holds does not parse; it is not overwritten.
    #[error(transparent)]
    Invalid(#[from] super::InvalidValue),
}

/// Commits tier states by compare-and-set.
#[derive(Clone)]
pub struct TierCommits {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    /// Whether the last write found no space.
    no_space: Arc<AtomicBool>,
}

impl TierCommits {
    /// Commits under `keys` in `store`.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys) -> Self {
        Self { store, keys, no_space: Arc::default() }
    }

    /// What is committed for a partition, read from the store and not from a mirror: the default where nothing is yet, `None` where
    /// there is no such partition.
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

    /// Refuses an upload whose commit would fail: an upload that is not committed leaves garbage in the bucket, once for each try. A store
    /// that had no space is asked to write the partition's own state over itself.
    ///
    /// # Errors
    /// When the store has gone back, or still has no space.
    pub async fn accepts(&self, id: PartitionId) -> Result<(), TierCommitError> {
        if let Some(regression) = self.store.regression() {
            return Err(StoreError::Regressed(regression).into());
        }
        if !self.no_space.load(Ordering::Acquire) {
            return Ok(());
        }
        let key = self.keys.tier(id);
        let (same, value) = match self.store.get(&key).await?.entry {
            Some(entry) => (Compare::ModRevision(key.clone(), entry.mod_revision), entry.value),
            None => (Compare::Absent(key.clone()), TierState::default().encode()),
        };
        self.transact(Transaction::new().when(same).put(key, value)).await.map(drop)
    }

    async fn transact(&self, transaction: Transaction) -> Result<Outcome, TierCommitError> {
        let outcome = self.store.transact(transaction).await;
        self.no_space.store(matches!(outcome, Err(StoreError::NoSpace { .. })), Ordering::Release);
        Ok(outcome?)
    }

    /// Replaces `before` (`None`, or the default: no commit yet) by `after`, if `epoch` still leads the partition. A state that is there already is a
    /// success: an earlier try whose answer was lost.
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
            Outcome::Done { .. } => Ok(()),
            Outcome::Refused { .. } => Err(TierCommitError::Changed { id }),
        }
    }
}
