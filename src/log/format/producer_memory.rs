//! Memory of the producer state of all opened replicas, including their state at the recovery points.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Memory of all producer tables of a data directory. Clones share one counter.
#[derive(Clone, Debug)]
pub(in crate::log) struct ProducerMemory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    max_bytes: usize,
    used: AtomicUsize,
}

impl ProducerMemory {
    /// Returns a counter for the tables of a data directory, which together should use at most `max_bytes`.
    pub(in crate::log) fn new(max_bytes: usize) -> Self {
        Self(Arc::new(Inner { max_bytes, used: AtomicUsize::new(0) }))
    }

    pub(in crate::log) fn used_bytes(&self) -> usize {
        self.0.used.load(Ordering::Relaxed)
    }
}

/// Bytes of one table, counted in the memory of all tables until the value is dropped.
#[derive(Debug, Default)]
pub(in crate::log) struct TableMemory {
    /// Memory of all tables; `None` for a table that is not counted.
    all_tables: Option<ProducerMemory>,
    bytes: usize,
}

impl TableMemory {
    pub(in crate::log) fn new(all_tables: ProducerMemory, bytes: usize) -> Self {
        let mut memory = Self { all_tables: Some(all_tables), bytes: 0 };
        memory.set(bytes);
        memory
    }

    /// Sets the memory of the table to `bytes`.
    pub(in crate::log) fn set(&mut self, bytes: usize) {
        let Some(all_tables) = &self.all_tables else { return };
        match bytes.checked_sub(self.bytes) {
            Some(added) => all_tables.0.used.fetch_add(added, Ordering::Relaxed),
            None => all_tables.0.used.fetch_sub(self.bytes - bytes, Ordering::Relaxed),
        };
        self.bytes = bytes;
    }

    /// Returns the limit of all tables in bytes, if they exceed it; otherwise `None`.
    pub(in crate::log) fn exceeded_limit(&self) -> Option<usize> {
        let all_tables = self.all_tables.as_ref()?;
        (all_tables.used_bytes() > all_tables.0.max_bytes).then_some(all_tables.0.max_bytes)
    }
}

impl Clone for TableMemory {
    fn clone(&self) -> Self {
        self.all_tables.clone().map_or_else(Self::default, |all_tables| Self::new(all_tables, self.bytes))
    }
}

impl Drop for TableMemory {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// Always equal: the comparison of two tables ignores the memory in which they are counted.
impl PartialEq for TableMemory {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl Eq for TableMemory {}
