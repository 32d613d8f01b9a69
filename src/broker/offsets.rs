//! Finding offsets: the ends of a partition, and the first record of a time.

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
        fault::{Fault, Reason},
        v1::{self, offset_query::At},
    },
    task::clock,
};

/// Look-ups by time of one request that run side by side: each may read a file or the bucket.
const LOOKUPS: usize = 8;

/// How long the latest offsets of one request are waited for where new leaders do not know them yet.
const SETTLES: Duration = Duration::from_secs(1);

/// How the look-ups of one request wait.
#[derive(Clone, Copy)]
struct Waits<'a> {
    /// For new leaders.
    settled: Instant,
    /// One of them waited for memory in vain: the others take what is there.
    out_of_memory: &'a AtomicBool,
}

impl Broker {
    /// Answers the queries in their order.
    pub(super) async fn list_offsets(
        &self,
        request: v1::ListOffsetsRequest,
        memory: &CallMemory,
    ) -> Result<v1::ListOffsetsResponse, Fault> {
        if request.queries.len() > limits::MAX_FETCH_PARTITIONS {
            return Err(faults::invalid(format!(
                "{} queries in one request; at most {} are allowed",
                request.queries.len(),
                limits::MAX_FETCH_PARTITIONS
            )));
        }
        self.acquaint(request.queries.iter().map(|query| (query.topic.as_str(), ""))).await;
        // For all of them together: thousands of partitions without their minimum must not be waited for one after the other.
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
        // A doubt that ends meanwhile has not heard yet what became of what is answered.
        let doubted = self.is_in_doubt();
        let answers = answers.buffered(LOOKUPS).collect().await;
        Ok(v1::ListOffsetsResponse { answers, in_doubt: doubted || self.is_in_doubt() })
    }

    async fn find_offset(
        &self,
        query: &v1::OffsetQuery,
        waits: Waits<'_>,
        memory: &CallMemory,
    ) -> Result<v1::OffsetAnswer, Fault> {
        let partition = self.partition(&query.topic, query.partition)?;
        if !matches!(query.at, Some(At::Earliest(_)) | None) && !settled(&partition, waits.settled).await {
            let message = "a new leader of the partition does not know yet what is committed: try again";
            return Err(Fault::new(Reason::NotReady, message));
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

    /// The first record of a time. Memory is taken for batches of the usual size at first, and for a larger one once it was met.
    async fn find_time(
        &self,
        partition: &Partition,
        time: i64,
        waits: Waits<'_>,
        memory: &CallMemory,
    ) -> Result<Option<(Offset, i64, LeaderEpoch)>, Fault> {
        let (opener, mut batch_bytes) = (memory.opener(&self.opener), limits::SEARCH_BYTES);
        loop {
            // Chunks of the bucket, and the batch that is put together from them.
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
                // Larger than needed: batches that grow byte by byte would begin the search again and again.
                Err(ReadError::BatchTooLarge { bytes }) => batch_bytes = bytes.next_power_of_two(),
                found => return Ok(found?),
            }
        }
    }
}

/// Waits until the partition's leader knows what is committed; false when it does not by then, or leads no more.
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
            // What is looked at next is newer than this news.
            while ready.take().is_some() {}
        }
    };
    tokio::time::timeout_at(by, settles).await.unwrap_or(false)
}
