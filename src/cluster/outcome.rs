//! Retries of a transaction until its outcome is known.

use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};

use super::store::{MetaStore, MetaStoreError, Transaction, TxnOutcome};

/// Pause before the first retry. Later pauses grow up to [`MAX_RETRY_DELAY`].
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Longest pause between two attempts.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Maximum number of retries after the first attempt.
const MAX_RETRIES: usize = 8;

/// Sends a transaction, and repeats it while its outcome is unknown, at most [`MAX_RETRIES`] times. A second
/// application must be harmless, by the compares or because the operations are idempotent. The store may apply the
/// transaction a second time much later. After `CompareFailed`, the caller reads back, because an earlier attempt may
/// have been applied.
///
/// # Errors
/// As [`MetaStore::transact`], or the unknown outcome of the last attempt.
pub(super) async fn transact_until_known(
    store: &dyn MetaStore,
    transaction: &Transaction,
) -> Result<TxnOutcome, MetaStoreError> {
    let backoff = ExponentialBuilder::new()
        .with_min_delay(MIN_RETRY_DELAY)
        .with_max_delay(MAX_RETRY_DELAY)
        .with_max_times(MAX_RETRIES);
    (|| store.transact(transaction.clone())).retry(backoff).when(MetaStoreError::outcome_unknown).await
}
