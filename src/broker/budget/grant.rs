//! Memory that one message or read has taken from a pool, and the same amount from its connection's share of that pool.
//! Dropping the value frees the memory.

use tokio::sync::OwnedSemaphorePermit;

use crate::partition::MemoryBudget;

/// Memory taken from a connection's share of a pool and from the pool.
#[derive(Debug)]
pub struct Grant {
    /// Memory of the connection's share of the pool; `None` for a pool without shares.
    share: Option<OwnedSemaphorePermit>,
    /// Memory of the pool: as many bytes as of the share, or fewer after a failed [`Self::try_grow`].
    pool: OwnedSemaphorePermit,
}

impl Grant {
    /// Creates a grant of a pool of which each connection has a share.
    pub(super) fn with_share(share: OwnedSemaphorePermit, pool: OwnedSemaphorePermit) -> Self {
        Self { share: Some(share), pool }
    }

    /// Creates a grant of a pool without shares.
    pub(super) fn without_share(pool: OwnedSemaphorePermit) -> Self {
        Self { share: None, pool }
    }

    pub(super) fn bytes(&self) -> usize {
        MemoryBudget::bytes_of(&self.pool)
    }

    /// Splits off `bytes`, or everything if the grant has fewer.
    pub(super) fn split(&mut self, bytes: usize) -> Self {
        let share = self.share.as_mut().map(|permit| MemoryBudget::split(permit, bytes));
        Self { share, pool: MemoryBudget::split(&mut self.pool, bytes) }
    }

    /// Merges a grant of the same pool and share. If `part` is of another pool, its memory is freed.
    pub(super) fn merge(&mut self, part: Self) {
        if let (Some(permit), Some(part)) = (&mut self.share, part.share) {
            MemoryBudget::merge(permit, part);
        }
        MemoryBudget::merge(&mut self.pool, part.pool);
    }

    /// Extends the grant to `bytes` from this share and pool, without waiting. Returns true if both had enough. After a
    /// failure, the share may be extended and the pool not.
    pub(super) fn try_grow(&mut self, share: &MemoryBudget, pool: &MemoryBudget, bytes: usize) -> bool {
        self.share.as_mut().is_none_or(|permit| share.try_grow(permit, bytes)) && pool.try_grow(&mut self.pool, bytes)
    }

    /// Frees the memory above `bytes`.
    pub fn shrink(&mut self, bytes: usize) {
        self.share.iter_mut().chain([&mut self.pool]).for_each(|permit| MemoryBudget::shrink(permit, bytes));
    }
}
