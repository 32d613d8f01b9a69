//! The `ListOffsets` call: the log start and high watermark of a partition, and the first record at or after a
//! timestamp.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::{sync::watch, time::Instant};

use super::errors;
use crate::{
    broker::{CallMemory, partitions::lookup::ReplicaLookup},
    limits,
    model::{LeaderEpoch, Offset},
    partition::{Charge, Decompressor, Partition, ReadError, ReplicaRole, WakeSet, WatermarkKind},
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, offset_query::At},
    },
    task::clock,
};

/// Maximum number of queries of one request that run concurrently. A query by timestamp may read a file or the object
/// store.
const MAX_CONCURRENT_LOOKUPS: usize = 8;

/// Maximum time that one request waits for new leaders whose leader epoch is not committed yet.
const EPOCH_COMMIT_TIMEOUT: Duration = Duration::from_secs(1);

/// Limits on the waits of one request, shared by its queries.
#[derive(Clone, Copy)]
struct Waits<'a> {
    /// Deadline of the wait for new leaders whose leader epoch is not committed yet.
    epoch_deadline: Instant,
    /// True after a query waited for memory in vain. Further queries of the request then do not wait for memory.
    out_of_memory: &'a AtomicBool,
}

/// Handler of offset queries.
pub(in crate::broker) struct OffsetFinder {
    pub(super) lookup: ReplicaLookup,
    pub(super) decompressor: Decompressor,
    /// True while the lease has expired.
    pub(super) lease: watch::Receiver<bool>,
    /// Maximum time that a query by timestamp waits for memory.
    pub(super) max_wait: Duration,
}

impl OffsetFinder {
    /// Returns the result of each query, in the order of the queries. A failed query has an error in its result and
    /// does not fail the call. Fails on too many queries.
    pub(in crate::broker) async fn list_offsets(
        &self,
        request: v1::ListOffsetsRequest,
        memory: &CallMemory,
    ) -> Result<v1::ListOffsetsResponse, ApiError> {
        if request.queries.len() > limits::MAX_FETCH_PARTITIONS {
            return Err(errors::invalid_request(format!(
                "{} queries in one request, at most {} are allowed: send several requests",
                request.queries.len(),
                limits::MAX_FETCH_PARTITIONS
            )));
        }
        self.lookup.wait_for_topics(request.queries.iter().map(|query| (query.topic.as_str(), ""))).await;
        // One deadline for all queries: the waits for thousands of partitions below min ISR must not add up.
        let now = clock::monotonic();
        let out_of_memory = AtomicBool::new(false);
        let waits = Waits { epoch_deadline: now + EPOCH_COMMIT_TIMEOUT, out_of_memory: &out_of_memory };
        let results = stream::iter(request.queries).map(|query| async move {
            self.find_offset(&query, waits, memory).await.unwrap_or_else(|error| v1::OffsetResult {
                error: Some(error.into()),
                offset: -1,
                timestamp_ms: -1,
                leader_epoch: -1,
            })
        });
        // Checked before and after the queries: if the lease is renewed during them, a result may still be from before
        // the renewal.
        let lease_expired = *self.lease.borrow();
        let results = results.buffered(MAX_CONCURRENT_LOOKUPS).collect().await;
        Ok(v1::ListOffsetsResponse { results, lease_expired: lease_expired || *self.lease.borrow() })
    }

    /// Returns the offset for a query. Every query but for the earliest offset requires a committed leader epoch, for
    /// which this function waits until [`Waits::epoch_deadline`]. A timestamp after the last record gives the latest
    /// offset.
    async fn find_offset(
        &self,
        query: &v1::OffsetQuery,
        waits: Waits<'_>,
        memory: &CallMemory,
    ) -> Result<v1::OffsetResult, ApiError> {
        let partition = self.lookup.partition(&query.topic, query.partition)?;
        let needs_committed_epoch = !matches!(query.at, Some(At::Earliest(_)) | None);
        if needs_committed_epoch && !wait_for_committed_epoch(&partition, waits.epoch_deadline).await {
            let message = format!(
                "partition {} of topic {:?} has a new leader that has not determined the last committed offset yet: \
                 retry",
                query.partition, query.topic
            );
            return Err(ApiError::new(ErrorCode::NotReady, message));
        }
        let watermarks = partition.watermarks();
        let epoch = partition.epoch();
        let (offset, timestamp_ms, epoch) = match query.at {
            Some(At::Earliest(_)) => (watermarks.log_start, -1, epoch),
            Some(At::Latest(_)) => {
                sim_event!(LatestReturned { partition: partition.id(), epoch, offset: watermarks.high_watermark });
                (watermarks.high_watermark, -1, epoch)
            }
            Some(At::TimestampMs(time)) => {
                self.find_time(&partition, time, waits, memory).await?.unwrap_or((watermarks.high_watermark, -1, epoch))
            }
            None => {
                return Err(errors::invalid_request("the query has no position: set earliest, latest or a timestamp"));
            }
        };
        Ok(v1::OffsetResult { error: None, offset: offset.as_i64(), timestamp_ms, leader_epoch: epoch.as_i32() })
    }

    /// Returns the offset, timestamp and leader epoch of the first record at or after `time`; `None` if there is no
    /// such record. The search begins with memory for batches of the usual size. If it finds a larger batch, the search
    /// starts again with memory for that batch.
    async fn find_time(
        &self,
        partition: &Partition,
        time: i64,
        waits: Waits<'_>,
        memory: &CallMemory,
    ) -> Result<Option<(Offset, i64, LeaderEpoch)>, ApiError> {
        let (decompressor, mut batch_bytes) = (memory.decompressor(&self.decompressor), limits::SEARCH_BYTES);
        loop {
            // The memory is for chunks from the object store, and for the batch that is assembled from them.
            let out_of_memory = waits.out_of_memory.load(Ordering::Relaxed);
            let timeout = if out_of_memory { Duration::ZERO } else { self.max_wait };
            let grant = tokio::time::timeout(timeout, memory.read(2 * batch_bytes)).await;
            let grant = grant.map_err(|_| {
                waits.out_of_memory.store(true, Ordering::Relaxed);
                memory.no_response_memory_error()
            })?;
            let charge: Charge = Arc::new(grant);
            let decompressor = decompressor.charged(Arc::clone(&charge));
            match partition.reader().charged(charge).offset_for_time(time, batch_bytes, &decompressor).await {
                // The size is rounded up. Otherwise, batches that grow byte by byte would each restart the search.
                Err(ReadError::BatchTooLarge { bytes }) => batch_bytes = bytes.next_power_of_two(),
                found => return Ok(found?),
            }
        }
    }
}

/// Waits until this broker leads the partition in a committed leader epoch. Returns false if the deadline passes first,
/// or if this broker does not lead.
async fn wait_for_committed_epoch(partition: &Partition, deadline: Instant) -> bool {
    if partition.status().role == (ReplicaRole::Leader { epoch_committed: true }) || mutant!(LatestBeforeEpochCommitted)
    {
        return true;
    }
    let ready = Arc::new(WakeSet::default());
    partition.add_listener(&ready, 0, WatermarkKind::HighWatermark);
    let committed = async {
        loop {
            match partition.status().role {
                ReplicaRole::Leader { epoch_committed: true } => return true,
                ReplicaRole::Leader { epoch_committed: false } => ready.wait_for_mark().await,
                ReplicaRole::Idle | ReplicaRole::Follower { .. } => return false,
            }
            // The role is read after these marks were taken, so no change is missed.
            while ready.take().is_some() {}
        }
    };
    tokio::time::timeout_at(deadline, committed).await.unwrap_or(false)
}
