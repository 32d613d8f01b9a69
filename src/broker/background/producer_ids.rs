//! Ids for idempotent producers: assigned from blocks that no other broker has, and checked when a batch contains one.
//!
//! A broker reserves blocks in advance, so that a new producer also gets an id while the metadata store is unavailable.
//! The end of each block is written to the data directory before an id of the block is assigned. A reservation raises
//! the counter in the store to the written end if the counter is below it. The store may have been restored from an
//! older state.

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::sync::Notify;

use crate::{
    broker::{node_context::NodeContext, token_bucket::TokenBucket},
    cluster::{ANONYMOUS, MetaStoreError, MetadataCache, ProducerIdKey, Topics},
    log::DataDir,
    proto::error::{ApiError, ErrorCode},
    task::{self, clock, lock::Mutex},
};

/// Number of unassigned ids below which another block is reserved.
const REFILL_BELOW: i64 = 500;

/// Pause before the metadata store is called again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum time that a batch waits until the metadata cache contains the cluster's key, which another broker may have
/// created a moment ago.
const STORE_TIMEOUT: Duration = Duration::from_secs(1);

/// Error of assigning a producer id.
#[derive(Debug, thiserror::Error)]
enum ProducerIdError {
    /// The metadata store did not respond, or its value is unusable.
    #[error(transparent)]
    Store(#[from] MetaStoreError),
    /// The end of the newest block could not be read from, or written to, the data directory.
    #[error("could not write the end of a block of producer ids to the data directory: {0}")]
    Directory(#[from] io::Error),
}

impl From<ProducerIdError> for ApiError {
    fn from(error: ProducerIdError) -> Self {
        let message = error.to_string();
        match error {
            ProducerIdError::Store(error) => error.into(),
            ProducerIdError::Directory(error) if error.kind() == io::ErrorKind::StorageFull => {
                Self::new(ErrorCode::DiskFull, message)
            }
            ProducerIdError::Directory(_) => Self::new(ErrorCode::StorageFailed, message),
        }
    }
}

/// Quota of one connection for new producers. Each request for an id counts, and each batch with an id that the cluster
/// never assigned. Clones share the quota.
#[derive(Clone, Debug, Default)]
pub struct ProducerIdQuota(Arc<Mutex<Option<TokenBucket>>>);

impl ProducerIdQuota {
    /// Counts one request for an id, or one batch with an unassigned id. Fails with `OVERLOADED` if the connection has
    /// used up its quota.
    fn take(&self, per_minute: u32) -> Result<(), ApiError> {
        let mut bucket = self.0.lock();
        let Some(remaining) = TokenBucket::take(*bucket, per_minute, clock::monotonic()) else {
            return Err(ApiError::new(
                ErrorCode::Overloaded,
                format!(
                    "more than {per_minute} producers were created on this connection within a minute \
                     (limits.producer_ids_per_minute): reuse producers, or retry later"
                ),
            ));
        };
        *bucket = Some(remaining);
        Ok(())
    }
}

/// Producer ids of one broker: the reserved blocks, and the cluster's key.
pub(in crate::broker) struct ProducerIds {
    topics: Topics,
    log: DataDir,
    metadata: MetadataCache,
    /// Quota of each connection, in new producers per minute.
    per_minute: u32,
    /// The cluster's key, from which the check values of all its ids are computed; empty until it was read. The key
    /// never changes.
    key: OnceLock<ProducerIdKey>,
    /// Unassigned counters of the reserved blocks. A producer id is a counter with a check value.
    blocks: Mutex<VecDeque<Range<i64>>>,
    /// Locked while a caller reserves a block, so that only one caller does. Contains the end of the newest block;
    /// `None` until the data directory was read.
    filling: tokio::sync::Mutex<Option<i64>>,
    /// Notified when fewer than [`REFILL_BELOW`] ids are unassigned.
    low: Notify,
}

impl ProducerIds {
    pub(super) fn new(ctx: &NodeContext, topics: Topics) -> Self {
        let per_minute = ctx.config.limits.producer_ids_per_minute;
        Self::with_quota(topics, ctx.log.clone(), ctx.metadata.clone(), per_minute)
    }

    /// Creates the ids of a broker without any reserved block. `per_minute` is the quota of each connection.
    fn with_quota(topics: Topics, log: DataDir, metadata: MetadataCache, per_minute: u32) -> Self {
        Self {
            topics,
            log,
            metadata,
            per_minute,
            key: OnceLock::new(),
            blocks: Mutex::default(),
            filling: tokio::sync::Mutex::default(),
            low: Notify::new(),
        }
    }

    /// Assigns an id that was never assigned before. Reserves a block first if all ids are assigned.
    async fn next(&self) -> Result<i64, ProducerIdError> {
        let key = self.key().await?;
        loop {
            if let Some(counter) = self.take_counter() {
                return Ok(key.id(counter, ANONYMOUS));
            }
            self.ensure_ids(1).await?;
        }
    }

    /// Returns the cluster's key. The first call reads it from the metadata store, and creates it there if no broker
    /// has.
    async fn key(&self) -> Result<&ProducerIdKey, MetaStoreError> {
        if let Some(key) = self.key.get() {
            return Ok(key);
        }
        let key = self.topics.producer_id_key().await?;
        Ok(self.key.get_or_init(|| key))
    }

    /// Takes the next counter of the reserved blocks; `None` if no reserved block has an unassigned counter. Requests a
    /// refill if fewer than [`REFILL_BELOW`] remain.
    fn take_counter(&self) -> Option<i64> {
        let mut blocks = self.blocks.lock();
        let counter = loop {
            match blocks.front_mut()?.next() {
                Some(counter) => break counter,
                None => drop(blocks.pop_front()),
            }
        };
        if remaining(&blocks) < REFILL_BELOW {
            self.low.notify_one();
        }
        Some(counter)
    }

    /// Reserves a block if fewer than `min_ids` ids are unassigned, and writes its end to the data directory.
    async fn ensure_ids(&self, min_ids: i64) -> Result<(), ProducerIdError> {
        let mut stored_end = self.filling.lock().await;
        if remaining(&self.blocks.lock()) >= min_ids {
            return Ok(());
        }
        let end = match *stored_end {
            Some(end) => end,
            None => {
                let log = self.log.clone();
                *stored_end.insert(task::run_blocking(move || log.producer_ids_end()).await?)
            }
        };
        let block = self.topics.reserve_producer_ids(end).await?;
        let (log, end) = (self.log.clone(), block.end);
        task::run_blocking(move || log.record_producer_ids_end(end)).await?;
        *stored_end = Some(end);
        self.blocks.lock().push_back(block);
        Ok(())
    }

    /// Assigns a producer id for a request. Fails in these cases:
    /// - The connection has used up its quota.
    /// - This broker has not read the cluster's key and cannot read it now.
    /// - No id is reserved and no block can be reserved now.
    pub(in crate::broker) async fn assign(&self, quota: &ProducerIdQuota) -> Result<i64, ApiError> {
        quota.take(self.per_minute)?;
        Ok(self.next().await?)
    }

    /// Fails if this cluster never assigned the producer id of a batch, and counts the batch against the quota then.
    /// The error is `UNKNOWN_PRODUCER`, or `OVERLOADED` if the quota is used up. The check needs only the cluster's
    /// key. If this broker does not have the key yet, the check waits at most [`STORE_TIMEOUT`] for the key and then
    /// fails.
    pub(in crate::broker) async fn check(&self, id: i64, quota: &ProducerIdQuota) -> Result<(), ApiError> {
        let key = match self.key.get() {
            Some(key) => key,
            None => self.read_key().await?,
        };
        if key.has_issued(id, ANONYMOUS) {
            return Ok(());
        }
        quota.take(self.per_minute)?;
        let message = format!("producer id {id} was not assigned by this cluster: request an id with InitProducerId");
        Err(ApiError::new(ErrorCode::UnknownProducer, message).with("producer", id))
    }

    /// Returns the cluster's key from the metadata cache. Waits at most [`STORE_TIMEOUT`] for the key, and fails with
    /// `METADATA_UNAVAILABLE` if there is none.
    async fn read_key(&self) -> Result<&ProducerIdKey, ApiError> {
        let read = self.metadata.wait_until(|state| state.producer_id_key().is_some());
        let _late = tokio::time::timeout(STORE_TIMEOUT, read).await;
        let key = self.metadata.state().producer_id_key().cloned().ok_or_else(|| {
            let message =
                "this broker has not read the key of the cluster's producer ids yet, and the batch was not appended: \
                 retry";
            ApiError::new(ErrorCode::MetadataUnavailable, message)
        })?;
        Ok(self.key.get_or_init(|| key))
    }

    /// Reads the cluster's key, and reserves a block whenever fewer than [`REFILL_BELOW`] ids are unassigned. Never
    /// returns.
    pub(super) async fn keep_filled(&self) {
        loop {
            let filled = match self.key().await {
                Ok(_) => self.ensure_ids(REFILL_BELOW).await,
                Err(error) => Err(error.into()),
            };
            match filled {
                Ok(()) => self.low.notified().await,
                Err(error) => {
                    tracing::debug!(%error, "could not reserve producer ids: retrying");
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }
}

/// Returns the number of counters in the blocks.
fn remaining(blocks: &VecDeque<Range<i64>>) -> i64 {
    blocks.iter().map(|block| block.end - block.start).sum()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use super::*;
    use crate::{
        cluster::{EmbeddedStore, Keys, MetaStore, MetadataCache, ProducerIdsValue, Transaction, Value as _},
        log::{DataDirIdentity, LogOptions, SimDisk},
        model::{BrokerId, ConfigMap},
        task::Tasks,
    };

    fn open(disk: &SimDisk) -> DataDir {
        let identity = DataDirIdentity { cluster: "test".to_owned(), broker: BrokerId(1) };
        let options = LogOptions { journal_bytes: 4 << 20, reserve_bytes: 0, ..LogOptions::default() };
        DataDir::open(Arc::new(disk.clone()), Path::new("/data"), &identity, options).unwrap()
    }

    /// Assigns 1500 ids, more than one block has.
    async fn assign_many(ids: &ProducerIds) -> BTreeSet<i64> {
        let mut assigned = BTreeSet::new();
        for _ in 0..1500 {
            assert!(assigned.insert(ids.next().await.unwrap()));
        }
        assigned
    }

    #[tokio::test]
    async fn restored_store_assigns_no_id_twice() {
        let (disk, tasks) = (SimDisk::new(), Tasks::new());
        let (store, keys) = (Arc::new(EmbeddedStore::in_memory()), Keys::new("test").unwrap());
        let shared: Arc<dyn MetaStore> = Arc::clone(&store) as _;
        let metadata = MetadataCache::start(Arc::clone(&shared), keys.clone(), &tasks);
        let topics = Topics::new(shared, keys.clone(), metadata.clone(), ConfigMap::new());
        let ids = |log: &DataDir| ProducerIds::with_quota(topics.clone(), log.clone(), metadata.clone(), 1000);
        let log = open(&disk);
        let before = assign_many(&ids(&log)).await;

        let backup = Transaction::new().put(keys.producer_ids(), ProducerIdsValue { next: 0 }.encode());
        store.transact(backup).await.unwrap();
        drop(log);
        disk.crash(1);
        let log = open(&disk);
        let after = assign_many(&ids(&log)).await;
        assert!(before.is_disjoint(&after));

        // No id is assigned from a block whose end could not be written to the data directory.
        disk.fail_writes_after(Some(0));
        assert!(matches!(ids(&log).next().await, Err(ProducerIdError::Directory(_))));
        tasks.stop().await;
    }
}
