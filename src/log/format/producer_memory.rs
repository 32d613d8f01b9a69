//! Memory of the producer state of all opened replicas, including their state at the last checkpoints.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Memory of all producer tables of a log. Clones share it.
#[derive(Clone, Debug)]
pub(in crate::log) struct ProducerMemory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    max_bytes: usize,
    taken: AtomicUsize,
}

impl ProducerMemory {
    /// Returns a counter for tables that should use at most `max_bytes` together.
    pub(in crate::log) fn new(max_bytes: usize) -> Self {
        Self(Arc::new(Inner { max_bytes, taken: AtomicUsize::new(0) }))
    }

    pub(in crate::log) fn taken(&self) -> usize {
        self.0.taken.load(Ordering::Relaxed)
    }
}

/// Share of one table, until it is dropped. A table outside a log has an empty share.
#[derive(Debug, Default)]
pub(in crate::log) struct TableMemory {
    of: Option<ProducerMemory>,
    bytes: usize,
}

impl TableMemory {
    pub(in crate::log) fn new(of: ProducerMemory, bytes: usize) -> Self {
        let mut memory = Self { of: Some(of), bytes: 0 };
        memory.set(bytes);
        memory
    }

    /// Sets the memory of the table to `bytes`.
    pub(in crate::log) fn set(&mut self, bytes: usize) {
        let Some(of) = &self.of else { return };
        match bytes.checked_sub(self.bytes) {
            Some(more) => of.0.taken.fetch_add(more, Ordering::Relaxed),
            None => of.0.taken.fetch_sub(self.bytes - bytes, Ordering::Relaxed),
        };
        self.bytes = bytes;
    }

    /// Returns the limit, if all tables together exceed it.
    pub(in crate::log) fn exceeded(&self) -> Option<usize> {
        self.of.as_ref().filter(|of| of.taken() > of.0.max_bytes).map(|of| of.0.max_bytes)
    }
}

impl Clone for TableMemory {
    fn clone(&self) -> Self {
        self.of.clone().map_or_else(Self::default, |of| Self::new(of, self.bytes))
    }
}

impl Drop for TableMemory {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// Tables with equal producers are equal, whatever memory they are charged to.
impl PartialEq for TableMemory {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl Eq for TableMemory {}
