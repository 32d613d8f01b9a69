//! A transaction whose outcome is unknown, made again until it is known.

use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};

use super::store::{MetaStore, Outcome, StoreError, Transaction};

/// Waits between two tries: the first, and the longest.
const WAITS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// How often a transaction is made again. A try may take a store that is slow a second.
const AGAIN: usize = 8;

/// Makes a transaction again while nobody knows what became of it. Its own conditions must keep a second time from doing
/// anything, even one that comes much later than the first: then `Refused` may mean that an earlier try was done, and the caller looks.
///
/// # Errors
/// As [`MetaStore::transact`]'s, and the unknown outcome of the last try.
pub(super) async fn known_outcome(store: &dyn MetaStore, transaction: &Transaction) -> Result<Outcome, StoreError> {
    let waits = ExponentialBuilder::new().with_min_delay(WAITS.0).with_max_delay(WAITS.1).with_max_times(AGAIN);
    (|| store.transact(transaction.clone())).retry(waits).when(StoreError::outcome_unknown).await
}
