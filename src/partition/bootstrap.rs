//! Bootstrap of an empty or useless replica, with the tables (epoch history, producer state) of the log before its
//! start.
//!
//! The records before the start are in the object store, whose last footer has the tables; the replica copies only the
//! tail. Without an object store those records were deleted, and the leader sends its own tables. Without the epochs
//! the log could not be compared with another leader's; without the producers a retry would be appended twice.

use super::role::BootstrapTables;
use crate::{
    log::{EpochHistory, ProducerTable},
    model::{LeaderEpoch, Offset},
    tier::{self, PartitionTier},
};

/// Tables of a log at the start of a replica.
pub(super) struct Tables {
    pub(super) start: Offset,
    pub(super) epochs: EpochHistory,
    pub(super) producers: ProducerTable,
}

/// Error of a bootstrap.
#[derive(Debug, thiserror::Error)]
pub(super) enum BootstrapError {
    /// The object store did not respond, or its content is corrupt.
    #[error("cannot read the footer of the last segment in the object store: {0}")]
    ObjectStore(#[from] tier::TierReadError),
    /// By this broker's metadata, the object store ends before the start.
    #[error(
        "the object store ends at {end} by this broker's metadata, below the start {at} of the replica: newer \
         metadata has not arrived yet"
    )]
    Behind {
        /// Tiered end.
        end: Offset,
        /// Start of the replica.
        at: Offset,
    },
    /// The tables are malformed.
    #[error("the epoch history or producer state before offset {at} is malformed")]
    Malformed {
        /// Start of the replica.
        at: Offset,
    },
    /// This broker has no object store.
    #[error(
        "the replica must bootstrap at the end of the object store, and this broker has none: set object_store.url"
    )]
    NoObjectStore,
}

impl Tables {
    /// Returns the tables of an empty log that starts at `at`.
    pub(super) fn empty(at: Offset) -> Self {
        Self { start: at, epochs: EpochHistory::new(), producers: ProducerTable::new() }
    }

    /// Returns the tables that the leader sent.
    pub(super) fn sent(tables: &BootstrapTables) -> Result<Self, BootstrapError> {
        Self::checked(tables.start, &tables.epochs, &tables.producers)
    }

    fn checked(at: Offset, epochs: &[(LeaderEpoch, Offset)], producers: &[u8]) -> Result<Self, BootstrapError> {
        let malformed = || BootstrapError::Malformed { at };
        let epochs = EpochHistory::from_starts(epochs.iter().copied()).ok_or_else(malformed)?;
        if epochs.last().is_some_and(|(_, start)| start >= at) {
            return Err(malformed());
        }
        let producers =
            if producers.is_empty() { Some(ProducerTable::new()) } else { ProducerTable::from_bytes(producers) };
        Ok(Self { start: at, epochs, producers: producers.ok_or_else(malformed)? })
    }

    /// Returns true if a log with these epochs, valid from `start` on, equals the object store's up to the lower of
    /// both ends. A footer has the epochs of its own segment only. That is enough: logs that share an offset and its
    /// epoch are equal up to that offset.
    pub(super) fn agree(&self, history: &EpochHistory, start: Offset, log_end: Offset) -> bool {
        let end = self.start.min(log_end);
        let start = self.epochs.iter().next().map_or(start, |(_, first)| start.max(first));
        start >= end || self.epochs.between(start, end) == history.between(start, end)
    }
}

/// Returns the tables at the end of the object store, which must be at `at` or later.
pub(super) async fn read_from_object_store(tier: Option<&PartitionTier>, at: Offset) -> Result<Tables, BootstrapError> {
    let tier = tier.ok_or(BootstrapError::NoObjectStore)?;
    let end = tier.state().tiered_end();
    match tier.last_footer().await? {
        Some(footer) if footer.end >= at => {
            let producers: &[u8] = if mutant!(BootstrapWithoutProducers) { &[] } else { &footer.producers };
            Tables::checked(footer.end, &footer.epochs, producers)
        }
        Some(footer) => Err(BootstrapError::Behind { end: footer.end, at }),
        None => Err(BootstrapError::Behind { end, at }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: u64) -> Offset {
        Offset::new(offset).unwrap()
    }

    fn pairs(of: &[(u32, u64)]) -> Vec<(LeaderEpoch, Offset)> {
        of.iter().map(|(epoch, start)| (LeaderEpoch(*epoch), at(*start))).collect()
    }

    fn sent(epochs: &[(u32, u64)], producers: &'static [u8]) -> Result<Tables, BootstrapError> {
        let producers = bytes::Bytes::from_static(producers);
        Tables::sent(&BootstrapTables { start: at(10), from_object_store: false, epochs: pairs(epochs), producers })
    }

    #[test]
    fn malformed_tables_are_rejected() {
        assert_eq!(sent(&[(1, 0), (3, 4)], b"").unwrap().epochs.last(), Some((LeaderEpoch(3), at(4))));
        let bad: [&[(u32, u64)]; 4] = [&[(3, 0), (1, 4)], &[(1, 4), (2, 4)], &[(1, 5), (2, 4)], &[(1, 0), (2, 10)]];
        for epochs in bad {
            assert!(matches!(sent(epochs, b""), Err(BootstrapError::Malformed { .. })), "{epochs:?}");
        }
        assert!(matches!(sent(&[(1, 0)], b"nonsense"), Err(BootstrapError::Malformed { .. })));
    }

    #[test]
    fn log_agrees_with_footer_of_equal_epochs() {
        let tables = sent(&[(1, 0), (3, 4)], b"").unwrap();
        let agrees = |history: &[(u32, u64)], local_start, log_end| {
            let history = EpochHistory::from_starts(pairs(history)).unwrap();
            tables.agree(&history, at(local_start), at(log_end))
        };
        assert!(agrees(&[(1, 0), (3, 4)], 0, 10));
        assert!(agrees(&[(1, 0), (3, 4), (5, 10)], 0, 20), "records after the footer are not compared");
        assert!(agrees(&[(1, 0)], 0, 3), "the log ends before the footer");
        assert!(agrees(&[(7, 12)], 12, 20), "the log starts after the footer");
        // The footer of a segment that is not the first one on the disk.
        let last = sent(&[(3, 6)], b"").unwrap();
        let history = EpochHistory::from_starts(pairs(&[(1, 0), (3, 4)])).unwrap();
        assert!(last.agree(&history, at(0), at(20)));
        assert!(!agrees(&[(1, 0), (5, 4)], 0, 10));
        assert!(!agrees(&[(1, 0), (3, 5)], 0, 10));
        assert!(!agrees(&[(1, 2), (5, 8)], 2, 20));
    }
}
