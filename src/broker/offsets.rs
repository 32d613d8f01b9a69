//! Finding offsets: the start and end of a partition, and the first record for a timestamp.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::time::Instant;

use super::{Broker, CallMemory, faults};
use crate::{
    limits,
    model::{LeaderEpoch, Offset},
    partition::{Charge, On, Partition, ReadError, Ready, Role},
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, offset_query::At},
    },
    task::clock,
};

/// Maximum number of concurrent look-ups of one request. A look-up by timestamp may read a file or the object store.
const LOOKUPS: usize = 8;

/// Maximum time that one request waits for new leaders whose epoch is not committed yet.
const SETTLES: Duration = Duration::from_secs(1);

/// Limits on the waits of one request.
#[derive(Clone, Copy)]
struct Waits<'a> {
    /// Deadline for new leaders.
    settled: Instant,
    /// True after a look-up waited for memory in vain. The other look-ups do not wait then.
    out_of_memory: &'a AtomicBool,
}

impl Broker {
    /// Returns the results of the queries, in their order.
    pub(super) async fn list_offsets(
        &self,
        request: v1::ListOffsetsRequest,
        memory: &CallMemory,
    ) -> Result<v1::ListOffsetsResponse, ApiError> {
        if request.queries.len() > limits::MAX_FETCH_PARTITIONS {
            return Err(faults::invalid(format!(
                "{} queries in one request; at most {} are allowed",
                request.queries.len(),
                limits::MAX_FETCH_PARTITIONS
            )));
        }
        self.acquaint(request.queries.iter().map(|query| (query.topic.as_str(), ""))).await;
        // One deadline for all queries: thousands of partitions below min ISR must not be waited for one after the other.
        let now = clock::monotonic();
        let out_of_memory = AtomicBool::new(false);
        let waits = Waits { settled: now + SETTLES, out_of_memory: &out_of_memory };
        let answers = stream::iter(request.queries).map(|query| async move {
            self.find_offset(&query, waits, memory).await.unwrap_or_else(|fault| v1::OffsetAnswer {
                error: Some(fault.into()),
                offset: -1,
                timestamp_ms: -1,
                leader_epoch: -1,
            })
        });
        // If the lease is renewed meanwhile, a result may still be from before the renewal.
        let doubted = self.is_in_doubt();
        let answers = answers.buffered(LOOKUPS).collect().await;
        Ok(v1::ListOffsetsResponse { answers, in_doubt: doubted || self.is_in_doubt() })
    }

    async fn find_offset(
        &self,
        query: &v1::OffsetQuery,
        waits: Waits<'_>,
        memory: &CallMemory,
    ) -> Result<v1::OffsetAnswer, ApiError> {
        let partition = self.partition(&query.topic, query.partition)?;
        if !matches!(query.at, Some(At::Earliest(_)) | None) && !settled(&partition, waits.settled).await {
            let message = "a new leader of the partition does not know yet what is committed: try again";
            return Err(ApiError::new(ErrorCode::NotReady, message));
        }
        let marks = partition.marks();
        let epoch = partition.epoch();
        let (offset, timestamp_ms, epoch) = match query.at {
            Some(At::Earliest(_)) => (marks.log_start, -1, epoch),
            Some(At::Latest(_)) => {
                sim_event!(LatestReturned { partition: partition.id(), epoch, offset: marks.high_watermark });
                (marks.high_watermark, -1, epoch)
            }
            Some(At::TimestampMs(time)) => {
                self.find_time(&partition, time, waits, memory).await?.unwrap_or((marks.high_watermark, -1, epoch))
            }
            None => return Err(faults::invalid("the query says neither earliest nor latest nor a timestamp")),
        };
        Ok(v1::OffsetAnswer { error: None, offset: offset.as_i64(), timestamp_ms, leader_epoch: epoch.as_i32() })
    }

    /// Returns the first record for a timestamp. Takes memory for batches of the usual size first, and for a larger batch once one was
    /// found.
    async fn find_time(
        &self,
        partition: &Partition,
        time: i64,
        waits: Waits<'_>,
        memory: &CallMemory,
    ) -> Result<Option<(Offset, i64, LeaderEpoch)>, ApiError> {
        let (opener, mut batch_bytes) = (memory.opener(&self.opener), limits::SEARCH_BYTES);
        loop {
            // Memory for chunks from the object store, and for the batch that is assembled from them.
            let is_out = waits.out_of_memory.load(Ordering::Relaxed);
            let patience = if is_out { Duration::ZERO } else { self.settings.fetch_max_wait };
            let granted = tokio::time::timeout(patience, memory.read(2 * batch_bytes)).await;
            let granted = granted.map_err(|_| {
                waits.out_of_memory.store(true, Ordering::Relaxed);
                memory.no_response_memory()
            })?;
            let charge: Charge = Arc::new(granted);
            let opener = opener.charged(Arc::clone(&charge));
            match partition.reader().charged(charge).offset_for_time(time, batch_bytes, &opener).await {
                // Rounded up: batches that grow byte by byte would restart the search each time.
                Err(ReadError::BatchTooLarge { bytes }) => batch_bytes = bytes.next_power_of_two(),
                found => return Ok(found?),
            }
        }
    }
}

/// Waits until the epoch of the partition's leader is committed. Returns false if that does not happen in time, or if this broker does not
/// lead.
async fn settled(partition: &Partition, by: Instant) -> bool {
    if partition.standing().role == (Role::Leader { settled: true }) || mutant!(LatestBeforeEpochCommitted) {
        return true;
    }
    let ready = Arc::new(Ready::default());
    partition.follow(&ready, 0, On::Committed);
    let settles = async {
        loop {
            match partition.standing().role {
                Role::Leader { settled: true } => return true,
                Role::Leader { settled: false } => ready.wait().await,
                Role::Waiting | Role::Follower { .. } => return false,
            }
            // The role is read again after this, so these notifications are covered.
            while ready.take().is_some() {}
        }
    };
    tokio::time::timeout_at(by, settles).await.unwrap_or(false)
}
