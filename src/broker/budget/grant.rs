//! Memory that one message or read has taken, of its connection's part and of the budget. It is given back when the value is dropped.

use tokio::sync::OwnedSemaphorePermit;

use crate::partition::Memory;

/// Memory taken of a connection's part and of the budget.
#[derive(Debug)]
pub struct Grant {
    /// Of the connection's part, where the pool has such parts.
    own: Option<OwnedSemaphorePermit>,
    all: OwnedSemaphorePermit,
}

impl Grant {
    pub(super) fn of_connection(own: OwnedSemaphorePermit, all: OwnedSemaphorePermit) -> Self {
        Self { own: Some(own), all }
    }

    /// Of a pool that has no parts of connections.
    pub(super) fn of_all(all: OwnedSemaphorePermit) -> Self {
        Self { own: None, all }
    }

    pub(super) fn bytes(&self) -> usize {
        Memory::bytes_of(&self.all)
    }

    /// Takes `bytes` out, or as many as there are.
    pub(super) fn split(&mut self, bytes: usize) -> Self {
        let own = self.own.as_mut().map(|permit| Memory::split(permit, bytes));
        Self { own, all: Memory::split(&mut self.all, bytes) }
    }

    /// Puts in what was taken of the same pools. What was taken of other pools is given back.
    pub(super) fn merge(&mut self, part: Self) {
        if let (Some(permit), Some(part)) = (&mut self.own, part.own) {
            Memory::merge(permit, part);
        }
        Memory::merge(&mut self.all, part.all);
    }

    /// Takes what is lacking for `bytes` of these pools; whether they had as much.
    pub(super) fn try_grow(&mut self, own: &Memory, all: &Memory, bytes: usize) -> bool {
        self.own.as_mut().is_none_or(|permit| own.try_grow(permit, bytes)) && all.try_grow(&mut self.all, bytes)
    }

    /// Gives back what is above `bytes`.
    pub fn shrink(&mut self, bytes: usize) {
        self.own.iter_mut().chain([&mut self.all]).for_each(|permit| Memory::shrink(permit, bytes));
    }
}
