//! Ids for idempotent producers: assigned from blocks that no other broker has, and checked when a batch names one.
//!
//! A broker reserves blocks in advance, so that a new producer gets its id while the metadata store is unavailable. The
//! end of the newest block is in the data directory before an id of that block is assigned. At a start, the counter in
//! the store is raised to that end.

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::Broker;
use crate::{
    cluster::{ANONYMOUS, MetaStoreError, ProducerIdKey, Topics},
    log::DataDir,
    proto::error::{ApiError, ErrorCode},
    task::{self, clock},
};

/// Number of remaining ids below which another block is reserved.
const REFILL_BELOW: i64 = 500;

/// Pause before the metadata store is called again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum time that a batch waits for the cluster's key, which another broker may have created just now.
const STORE_TIMEOUT: Duration = Duration::from_secs(1);

/// Error of assigning a producer id.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProducerIdError {
    /// The store did not respond, or its value is unusable.
    #[error(transparent)]
    Store(#[from] MetaStoreError),
    /// The end of the block could not be written to the data directory.
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

/// Quota of new producers per connection: requested ids, and ids in batches that the cluster never assigned. Clones
/// share the quota.
#[derive(Clone, Debug, Default)]
pub struct ProducerIdQuota(Arc<Mutex<Option<Bucket>>>);

/// Token bucket. Tokens return evenly, up to the number for one minute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// Takes a token. Returns `None` if there is none.
    pub(super) fn take(bucket: Option<Self>, per_minute: u32, now: Instant) -> Option<Self> {
        let max = f64::from(per_minute);
        let tokens = bucket.map_or(max, |bucket| {
            let grown = now.saturating_duration_since(bucket.at).as_secs_f64() / 60.0 * max;
            (bucket.tokens + grown).min(max)
        });
        (tokens >= 1.0).then_some(Self { tokens: tokens - 1.0, at: now })
    }
}

impl ProducerIdQuota {
    /// Counts one new producer.
    fn take(&self, per_minute: u32) -> Result<(), ApiError> {
        let mut bucket = self.0.lock();
        let Some(left) = Bucket::take(*bucket, per_minute, clock::monotonic()) else {
            return Err(ApiError::new(
                ErrorCode::Overloaded,
                format!(
                    "more than {per_minute} producers were created on this connection within a minute \
                     (limits.producer_ids_per_minute): reuse producers, or retry later"
                ),
            ));
        };
        *bucket = Some(left);
        Ok(())
    }
}

/// Remaining ids of the reserved blocks.
#[derive(Default)]
pub(super) struct ProducerIds {
    /// The cluster's key, once it was read. The key never changes.
    key: OnceLock<ProducerIdKey>,
    blocks: Mutex<VecDeque<Range<i64>>>,
    /// Lock with which one of many callers reserves a block. Holds the end of the newest block, once the data directory
    /// was read.
    filling: tokio::sync::Mutex<Option<i64>>,
    low: Notify,
}

impl ProducerIds {
    /// Returns an id that was never assigned before.
    async fn next(&self, topics: &Topics, log: &DataDir) -> Result<i64, ProducerIdError> {
        let key = self.key(topics).await?;
        loop {
            if let Some(counter) = self.take() {
                return Ok(key.id(counter, ANONYMOUS));
            }
            self.fill(topics, log, 1).await?;
        }
    }

    /// Returns the cluster's key. Creates the key if no broker has.
    async fn key(&self, topics: &Topics) -> Result<&ProducerIdKey, MetaStoreError> {
        if let Some(key) = self.key.get() {
            return Ok(key);
        }
        let key = topics.producer_id_key().await?;
        Ok(self.key.get_or_init(|| key))
    }

    fn take(&self) -> Option<i64> {
        let mut blocks = self.blocks.lock();
        let id = loop {
            match blocks.front_mut()?.next() {
                Some(id) => break id,
                None => drop(blocks.pop_front()),
            }
        };
        if remaining(&blocks) < REFILL_BELOW {
            self.low.notify_one();
        }
        Some(id)
    }

    /// Reserves a block if fewer than `min_ids` ids are left.
    async fn fill(&self, topics: &Topics, log: &DataDir, min_ids: i64) -> Result<(), ProducerIdError> {
        let mut stored_end = self.filling.lock().await;
        if remaining(&self.blocks.lock()) >= min_ids {
            return Ok(());
        }
        let end = match *stored_end {
            Some(end) => end,
            None => {
                let log = log.clone();
                *stored_end.insert(task::run_blocking(move || log.producer_ids_end()).await?)
            }
        };
        let block = topics.producer_ids(end).await?;
        let (log, end) = (log.clone(), block.end);
        task::run_blocking(move || log.record_producer_ids_end(end)).await?;
        *stored_end = Some(end);
        self.blocks.lock().push_back(block);
        Ok(())
    }
}

fn remaining(blocks: &VecDeque<Range<i64>>) -> i64 {
    blocks.iter().map(|block| block.end - block.start).sum()
}

impl Broker {
    /// Assigns a producer id.
    pub(super) async fn next_producer_id(&self, quota: &ProducerIdQuota) -> Result<i64, ApiError> {
        quota.take(self.ctx.config.limits.producer_ids_per_minute)?;
        Ok(self.producer_ids.next(&self.topics, &self.ctx.log).await?)
    }

    /// Rejects a batch whose producer id this cluster never assigned. No other broker is called. Until this broker has
    /// read the cluster's key, no id can be verified, and such batches are rejected.
    pub(super) async fn check_producer_id(&self, id: i64, quota: &ProducerIdQuota) -> Result<(), ApiError> {
        let key = match self.producer_ids.key.get() {
            Some(key) => key,
            None => self.read_producer_id_key().await?,
        };
        if key.made(id, ANONYMOUS) {
            return Ok(());
        }
        quota.take(self.ctx.config.limits.producer_ids_per_minute)?;
        let message = format!("producer id {id} was not assigned by this cluster: request an id with InitProducerId");
        Err(ApiError::new(ErrorCode::UnknownProducer, message).with("producer", id))
    }

    async fn read_producer_id_key(&self) -> Result<&ProducerIdKey, ApiError> {
        let read = self.ctx.metadata.wait_until(|state| state.producer_id_key().is_some());
        let _late = tokio::time::timeout(STORE_TIMEOUT, read).await;
        let key = self.ctx.metadata.state().producer_id_key().cloned().ok_or_else(|| {
            let message =
                "this broker has not read the key of the cluster's producer ids yet, and the batch was not appended: \
                 retry";
            ApiError::new(ErrorCode::MetadataUnavailable, message)
        })?;
        Ok(self.producer_ids.key.get_or_init(|| key))
    }
}

/// Keeps the cluster's key and a block available until the broker stops.
pub(super) async fn keep(broker: Arc<Broker>) {
    let ids = &broker.producer_ids;
    let kept = async {
        loop {
            let kept = match ids.key(&broker.topics).await {
                Ok(_) => ids.fill(&broker.topics, &broker.ctx.log, REFILL_BELOW).await,
                Err(error) => Err(error.into()),
            };
            match kept {
                Ok(()) => ids.low.notified().await,
                Err(error) => {
                    tracing::debug!(%error, "could not reserve producer ids: retrying");
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    };
    broker.ctx.tasks.run_until_cancelled(kept).await;
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

    /// Takes more ids than one block has.
    async fn many(ids: &ProducerIds, topics: &Topics, log: &DataDir) -> BTreeSet<i64> {
        let mut given = BTreeSet::new();
        for _ in 0..1500 {
            assert!(given.insert(ids.next(topics, log).await.unwrap()));
        }
        given
    }

    #[tokio::test]
    async fn restored_store_assigns_no_id_twice() {
        let (disk, tasks) = (SimDisk::new(), Tasks::new());
        let (store, keys) = (Arc::new(EmbeddedStore::in_memory()), Keys::new("test").unwrap());
        let shared: Arc<dyn MetaStore> = Arc::clone(&store) as _;
        let metadata = MetadataCache::start(Arc::clone(&shared), keys.clone(), &tasks);
        let topics = Topics::new(shared, keys.clone(), metadata, ConfigMap::new());
        let log = open(&disk);
        let before = many(&ProducerIds::default(), &topics, &log).await;

        let backup = Transaction::new().put(keys.producer_ids(), ProducerIdsValue { next: 0 }.encode());
        store.transact(backup).await.unwrap();
        drop(log);
        disk.crash(1);
        let log = open(&disk);
        let after = many(&ProducerIds::default(), &topics, &log).await;
        assert!(before.is_disjoint(&after));

        // No id is assigned from a block whose end is not in the directory.
        disk.fail_writes_after(Some(0));
        assert!(matches!(ProducerIds::default().next(&topics, &log).await, Err(ProducerIdError::Directory(_))));
        tasks.stop().await;
    }

    #[test]
    fn quota_refills_evenly_up_to_one_minute() {
        let start = clock::monotonic();
        let after = |seconds| start + Duration::from_secs(seconds);
        let take_all = |mut bucket, now| {
            let mut taken = 0;
            while let Some(left) = Bucket::take(bucket, 60, now) {
                (bucket, taken) = (Some(left), taken + 1);
            }
            (bucket, taken)
        };
        let (bucket, taken) = take_all(None, start);
        assert_eq!(taken, 60);
        let (bucket, taken) = take_all(bucket, after(10));
        assert_eq!(taken, 10);
        assert_eq!(take_all(bucket, after(3600)).1, 60);
    }
}
