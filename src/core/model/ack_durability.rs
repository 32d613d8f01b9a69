//! Storage of an acknowledged record.

use std::fmt;

/// Storage of an acknowledged record at the time of the acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AckDurability {
    /// In the leader's memory.
    Memory,
    /// In the page cache of this number of replicas.
    PageCache(u32),
    /// On stable storage of this number of replicas.
    Persisted(u32),
    /// In the object store, and on this number of replicas.
    Tiered(u32),
}

impl fmt::Display for AckDurability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |replicas| if replicas == 1 { "" } else { "s" };
        match *self {
            Self::Memory => f.write_str("in the leader's memory"),
            Self::PageCache(replicas) => write!(f, "in the page cache of {replicas} replica{}", plural(replicas)),
            Self::Persisted(replicas) => write!(f, "persisted on {replicas} replica{}", plural(replicas)),
            Self::Tiered(_) => f.write_str("in the object store"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledgement_is_described_by_its_storage() {
        assert_eq!(AckDurability::Memory.to_string(), "in the leader's memory");
        assert_eq!(AckDurability::PageCache(2).to_string(), "in the page cache of 2 replicas");
        assert_eq!(AckDurability::Persisted(1).to_string(), "persisted on 1 replica");
        assert_eq!(AckDurability::Tiered(3).to_string(), "in the object store");
    }
}
