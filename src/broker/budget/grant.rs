//! Memory that one message or read has taken from its connection's share and from the budget. Dropping the value frees
//! the memory.

use tokio::sync::OwnedSemaphorePermit;

use crate::partition::MemoryBudget;

/// Memory taken from a connection's share and from the budget.
#[derive(Debug)]
pub struct Grant {
    /// Memory of the connection's share; `None` for a pool without shares.
    own: Option<OwnedSemaphorePermit>,
    all: OwnedSemaphorePermit,
}

impl Grant {
    pub(super) fn of_connection(own: OwnedSemaphorePermit, all: OwnedSemaphorePermit) -> Self {
        Self { own: Some(own), all }
    }

    /// Creates a grant of a pool without shares.
    pub(super) fn of_all(all: OwnedSemaphorePermit) -> Self {
        Self { own: None, all }
    }

    pub(super) fn bytes(&self) -> usize {
        MemoryBudget::bytes_of(&self.all)
    }

    /// Splits off `bytes`, or all if there are fewer.
    pub(super) fn split(&mut self, bytes: usize) -> Self {
        let own = self.own.as_mut().map(|permit| MemoryBudget::split(permit, bytes));
        Self { own, all: MemoryBudget::split(&mut self.all, bytes) }
    }

    /// Merges a grant of the same pools. Memory from other pools is freed.
    pub(super) fn merge(&mut self, part: Self) {
        if let (Some(permit), Some(part)) = (&mut self.own, part.own) {
            MemoryBudget::merge(permit, part);
        }
        MemoryBudget::merge(&mut self.all, part.all);
    }

    /// Takes the missing memory up to `bytes` from these pools. Returns true if they had enough.
    pub(super) fn try_grow(&mut self, own: &MemoryBudget, all: &MemoryBudget, bytes: usize) -> bool {
        self.own.as_mut().is_none_or(|permit| own.try_grow(permit, bytes)) && all.try_grow(&mut self.all, bytes)
    }

    /// Frees the memory above `bytes`.
    pub fn shrink(&mut self, bytes: usize) {
        self.own.iter_mut().chain([&mut self.all]).for_each(|permit| MemoryBudget::shrink(permit, bytes));
    }
}
