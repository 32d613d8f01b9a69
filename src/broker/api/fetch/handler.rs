//! The handler of reads, and the unary `Read` call.

use std::sync::Arc;

use tokio::sync::watch;

use super::{super::errors, FetchLimits, FetchSession, decode::RecordTooLarge};
use crate::{
    broker::{CallMemory, node_context::NodeContext, partitions::lookup::ReplicaLookup},
    model::PartitionId,
    partition::{Decompressor, Partition, ReadError, ReadSource},
    proto::{error::ApiError, v1},
    task::{Tasks, clock},
};

/// Handler of reads.
pub(in crate::broker) struct Fetch {
    pub(in crate::broker::api) ctx: NodeContext,
    pub(in crate::broker::api) lookup: ReplicaLookup,
    pub(in crate::broker::api) decompressor: Decompressor,
    /// True while the lease has expired.
    pub(in crate::broker::api) lease: watch::Receiver<bool>,
    /// Cancelled when the streams of clients must end.
    pub(in crate::broker::api) stop: Tasks,
}

impl Fetch {
    #[cfg(test)]
    pub(in crate::broker) fn lookup(&self) -> &ReplicaLookup {
        &self.lookup
    }

    /// Returns the local replica for a reader, if this broker serves the partition to that reader.
    pub(super) fn readable(
        &self,
        requested: &v1::FetchPartition,
        any_replica: bool,
    ) -> Result<Arc<Partition>, ApiError> {
        self.lookup.readable(requested, errors::parse_topic_id(&requested.topic_id)?, any_replica)
    }

    /// Returns the response entry of a partition that this broker rejects, with `error`. If a local replica is open,
    /// the entry contains the log start and high watermark of that replica.
    pub(super) fn refused_partition(&self, requested: v1::FetchPartition, error: ApiError) -> v1::FetchedPartition {
        let id = errors::parse_topic_id(&requested.topic_id).ok();
        let replica = id.and_then(|id| self.lookup.open_replica(&requested.topic, id, requested.partition));
        let mut refused =
            v1::FetchedPartition { next_offset: requested.offset, error: Some(error.into()), ..Default::default() };
        if let Some(replica) = replica {
            let watermarks = replica.watermarks();
            (refused.log_start, refused.high_watermark) =
                (watermarks.log_start.as_i64(), watermarks.high_watermark.as_i64());
        }
        (refused.topic, refused.partition) = (requested.topic, requested.partition);
        refused
    }

    /// Converts the error of a read. If the local replica was closed and another broker leads the partition, the error
    /// names that leader.
    pub(super) fn convert_read_error(&self, id: PartitionId, error: ReadError) -> ApiError {
        let is_closed = matches!(error, ReadError::Closed);
        let error = ApiError::from(error);
        if is_closed { self.lookup.with_leader_hint(id, error) } else { error }
    }

    /// Counts the bytes of a read in two metrics: by their source, and by the role of the local replica.
    pub(super) fn count_bytes(&self, source: ReadSource, bytes: usize, is_leader: bool) {
        let (by_source, by_role) = (&self.ctx.metrics.fetch_bytes, &self.ctx.metrics.fetch_role_bytes);
        let counter = match source {
            ReadSource::Memory => &by_source.memory,
            ReadSource::Disk => &by_source.disk,
            ReadSource::ObjectStore => &by_source.object_store,
        };
        counter.inc_by(bytes as u64);
        let counter = if is_leader { &by_role.leader } else { &by_role.follower };
        counter.inc_by(bytes as u64);
    }

    /// Returns a receiver that changes when the lease expires or is renewed. If the lease has already expired, the
    /// receiver counts that as a change.
    pub(super) fn lease_expiry(&self) -> watch::Receiver<bool> {
        let mut expiry = self.lease.clone();
        if *expiry.borrow_and_update() {
            expiry.mark_changed();
        }
        expiry
    }

    /// Serves a unary read. With `decode`, if a record needs more memory than was reserved, everything is read again
    /// from the first offsets.
    pub(in crate::broker) async fn read(
        self: &Arc<Self>,
        request: v1::ReadRequest,
        memory: CallMemory,
    ) -> Result<v1::ReadResponse, ApiError> {
        let fetch_limits = FetchLimits::new(request.min_bytes, request.max_bytes, request.max_wait_ms);
        self.lookup
            .wait_for_topics(
                request.partitions.iter().map(|requested| (requested.topic.as_str(), requested.topic_id.as_str())),
            )
            .await;
        let mut session = FetchSession::new(Arc::clone(self), fetch_limits, memory);
        session.assign(request.partitions, true, request.any_replica)?;
        let deadline = clock::monotonic() + fetch_limits.max_wait;
        loop {
            let mut builder = session.gather(request.decode, deadline).await?;
            let decoded = if request.decode { session.decode(&mut builder).await } else { Ok(0) };
            match decoded {
                Ok(record_bytes) => {
                    session.on_response_built(builder.bytes + record_bytes, builder.partitions.len());
                    let lease_expired = *session.fetch.lease.borrow();
                    return Ok(v1::ReadResponse { partitions: builder.partitions, lease_expired });
                }
                Err(RecordTooLarge { bytes }) => session.read_again(bytes, builder),
            }
        }
    }
}
