//! Verifies claims of other brokers about registrations and leader epochs in the metadata store, at a bounded rate.
//!
//! Brokers do not authenticate. A claim is therefore only a reason for a look-up: this broker acts on the claim only if
//! the store confirms it. If the rate is exceeded or the store does not respond, the claim is not confirmed. A true
//! claim becomes visible in the metadata cache later.

use std::{sync::Arc, time::Duration};

use crate::{
    broker::token_bucket::TokenBucket,
    cluster::{Keys, MetaStore, PartitionValue, Revision, Value as _},
    model::{BrokerId, LeaderEpoch, PartitionId},
    proto::error::{ApiError, ErrorCode},
    task::{clock, lock::Mutex},
};

/// Maximum number of look-ups per minute, for registrations and for partitions each.
const MAX_LOOKUPS_PER_MINUTE: u32 = 600;

/// Timeout of a look-up, which delays the response to the broker that made the claim.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(1);

/// Verifier of other brokers' claims.
pub(super) struct ClaimVerifier {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    /// Rate limit of look-ups of registrations.
    registrations: Rate,
    /// Rate limit of look-ups of partitions.
    partitions: Rate,
}

/// Rate limit of look-ups.
#[derive(Default)]
struct Rate(Mutex<Option<TokenBucket>>);

impl Rate {
    /// Counts a look-up. Returns false if the rate is exceeded.
    fn try_take(&self) -> bool {
        let mut bucket = self.0.lock();
        let remaining = TokenBucket::take(*bucket, MAX_LOOKUPS_PER_MINUTE, clock::monotonic());
        *bucket = remaining.or(*bucket);
        remaining.is_some()
    }
}

impl ClaimVerifier {
    pub(super) fn new(store: Arc<dyn MetaStore>, keys: Keys) -> Self {
        Self { store, keys, registrations: Rate::default(), partitions: Rate::default() }
    }

    /// Reads the broker epoch with which a broker is registered from the metadata store; `None` if the broker is not
    /// registered.
    ///
    /// # Errors
    /// `NOT_READY`: the rate is exceeded, or the store could not be read in time.
    pub(super) async fn broker_epoch(&self, broker: BrokerId) -> Result<Option<Revision>, ApiError> {
        if !self.registrations.try_take() {
            let message =
                format!("more than {MAX_LOOKUPS_PER_MINUTE} registrations were looked up in a minute: retry later");
            return Err(not_ready_error(message));
        }
        let key = self.keys.broker(broker);
        match tokio::time::timeout(LOOKUP_TIMEOUT, self.store.get(&key)).await {
            Ok(Ok(reading)) => Ok(reading.entry.map(|entry| entry.create_revision)),
            Ok(Err(error)) => {
                Err(not_ready_error(format!("could not read the registration from the metadata store: {error}")))
            }
            Err(_) => Err(not_ready_error(format!(
                "the metadata store did not respond within {LOOKUP_TIMEOUT:?}: retry later"
            ))),
        }
    }

    /// Reads the leader epoch of a partition from the metadata store. Returns `None` if the rate is exceeded, if the
    /// store could not be read in time, or if the partition has no readable value.
    pub(super) async fn leader_epoch(&self, id: PartitionId) -> Option<LeaderEpoch> {
        if !self.partitions.try_take() {
            return None;
        }
        let key = self.keys.partition(id);
        let reading = tokio::time::timeout(LOOKUP_TIMEOUT, self.store.get(&key)).await.ok()?.ok()?;
        let entry = reading.entry?;
        PartitionValue::decode(&entry.key, &entry.value).ok().map(|value| value.leader_epoch)
    }
}

fn not_ready_error(message: String) -> ApiError {
    ApiError::new(ErrorCode::NotReady, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::{BrokerValue, EmbeddedStore, Transaction},
        model::TopicId,
    };

    #[tokio::test(start_paused = true)]
    async fn registrations_are_looked_up_at_bounded_rate() {
        let store = EmbeddedStore::in_memory();
        let keys = Keys::new("it").unwrap();
        let put = Transaction::new().put(keys.broker(BrokerId(2)), BrokerValue::running_at("a:1".to_owned()).encode());
        store.transact(put).await.unwrap();
        let created = store.get(&keys.broker(BrokerId(2))).await.unwrap().entry.unwrap().create_revision;
        let verifier = ClaimVerifier::new(Arc::new(store), keys);
        assert_eq!(verifier.broker_epoch(BrokerId(2)).await.unwrap(), Some(created));
        assert_eq!(verifier.broker_epoch(BrokerId(3)).await.unwrap(), None);
        for _ in 2..MAX_LOOKUPS_PER_MINUTE {
            verifier.broker_epoch(BrokerId(3)).await.unwrap();
        }
        assert_eq!(verifier.broker_epoch(BrokerId(2)).await.unwrap_err().code, ErrorCode::NotReady);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(verifier.broker_epoch(BrokerId(2)).await.unwrap(), Some(created), "tokens return");
    }

    #[tokio::test(start_paused = true)]
    async fn leader_epochs_are_looked_up_at_bounded_rate() {
        let store = EmbeddedStore::in_memory();
        let keys = Keys::new("it").unwrap();
        let id = |number| PartitionId::new(TopicId::from_bytes([7; 16]), number);
        let value = PartitionValue::new(vec![BrokerId(1)], LeaderEpoch(5));
        store.transact(Transaction::new().put(keys.partition(id(0)), value.encode())).await.unwrap();
        let verifier = ClaimVerifier::new(Arc::new(store), keys);
        assert_eq!(verifier.leader_epoch(id(0)).await, Some(LeaderEpoch(5)));
        for _ in 1..MAX_LOOKUPS_PER_MINUTE {
            assert_eq!(verifier.leader_epoch(id(1)).await, None, "the partition does not exist");
        }
        assert_eq!(verifier.leader_epoch(id(0)).await, None, "the rate is exceeded");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(verifier.leader_epoch(id(0)).await, Some(LeaderEpoch(5)));
    }
}
