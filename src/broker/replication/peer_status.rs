//! Reports of brokers about themselves and about their replicas. Local reports are read directly, and the reports of
//! peers are requested from them.
//!
//! All peers are queried concurrently. A peer that does not respond delays the result by at most two
//! [`REQUEST_TIMEOUT`]s, for any number of partitions. One is for the connection, and one for the first request without
//! a response.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future;

use super::peer_client::{PeerClient, PeerError};
use crate::{
    broker::{node_context::NodeContext, partitions::table::PartitionTable},
    cluster::MetadataCache,
    limits,
    model::{BrokerId, LeaderEpoch, Offset, PartitionId, Watermarks},
    partition::Partition,
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
};

/// Timeout of a request to a peer, and separately of the connection for it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// Report of a broker about one replica.
#[derive(Clone, Debug)]
pub(in crate::broker) struct ReplicaReport {
    pub(in crate::broker) watermarks: Watermarks,
    /// Leader epoch of the last batch; `None` for an empty log.
    pub(in crate::broker) last_epoch: Option<LeaderEpoch>,
    /// Bytes of the replica on the disk of its broker.
    pub(in crate::broker) local_bytes: u64,
    /// Bytes of the partition in the object store, as this replica's broker reports them.
    pub(in crate::broker) tiered_bytes: u64,
    /// Reason why the replica accepts no writes; `None` if it accepts writes.
    pub(in crate::broker) failed: Option<String>,
}

/// Response of one broker: for each requested replica its report, or the reason why the replica is offline. Replicas
/// that are neither open nor offline are left out. The outer error means that the broker is not registered, has no peer
/// address, did not respond, or responded with an error.
pub(in crate::broker) type ReportResult = Result<BTreeMap<PartitionId, Result<ReplicaReport, String>>, ApiError>;

/// Source of this broker's own stats.
pub(in crate::broker) type BrokerStatsSource = Arc<dyn Fn() -> v1::GetBrokerStatsResponse + Send + Sync>;

/// Source of reports about all brokers and their replicas.
pub(in crate::broker) struct PeerStatus {
    id: BrokerId,
    metadata: MetadataCache,
    partitions: Arc<PartitionTable>,
    /// Client for requests to peers; `None` for a standalone broker.
    peers: Option<PeerClient>,
    stats: BrokerStatsSource,
}

impl PeerStatus {
    pub(in crate::broker) fn new(
        ctx: &NodeContext,
        partitions: Arc<PartitionTable>,
        peers: Option<PeerClient>,
        stats: BrokerStatsSource,
    ) -> Self {
        Self { id: ctx.id, metadata: ctx.metadata.clone(), partitions, peers, stats }
    }

    /// Requests replica reports from these brokers, concurrently. The result has an entry for each broker.
    pub(in crate::broker) async fn request_reports(
        &self,
        requested: BTreeMap<BrokerId, Vec<PartitionId>>,
    ) -> BTreeMap<BrokerId, ReportResult> {
        let requests = requested.into_iter().map(async |(broker, ids)| (broker, self.reports_of(broker, &ids).await));
        future::join_all(requests).await.into_iter().collect()
    }

    /// Returns the reports of one broker about these replicas.
    async fn reports_of(&self, broker: BrokerId, ids: &[PartitionId]) -> ReportResult {
        if broker == self.id {
            let report = |id| match self.partitions.by_id(id) {
                Some(partition) => Some(Ok(replica_report(&partition))),
                None => self.partitions.offline_reason(id).map(Err),
            };
            return Ok(ids.iter().filter_map(|id| Some((*id, report(*id)?))).collect());
        }
        let (peers, address) = self.route_to(broker)?;
        let mut reports = BTreeMap::new();
        for ids in ids.chunks(limits::MAX_PEER_REPLICAS) {
            let names = ids
                .iter()
                .map(|id| v1::TopicIdPartition { topic_id: id.topic.to_string(), partition: id.number.cast_signed() });
            let request = v1::DescribeReplicasRequest { replicas: names.collect() };
            let response = peers.describe_replicas(&address, request, REQUEST_TIMEOUT).await;
            let response = response.map_err(|error| request_error(broker, &error))?;
            let parsed =
                ids.iter().zip(response.replicas).filter_map(|(id, report)| Some((*id, parse_report(report)?)));
            reports.extend(parsed);
        }
        Ok(reports)
    }

    /// Requests stats from these brokers, concurrently. The result has an entry for each broker.
    pub(in crate::broker) async fn request_stats(
        &self,
        brokers: Vec<BrokerId>,
    ) -> BTreeMap<BrokerId, Result<v1::BrokerStats, ApiError>> {
        let requests = brokers.into_iter().map(async |broker| (broker, self.stats_of(broker).await));
        future::join_all(requests).await.into_iter().collect()
    }

    /// Returns the stats of one broker.
    async fn stats_of(&self, broker: BrokerId) -> Result<v1::BrokerStats, ApiError> {
        let stats = if broker == self.id {
            (self.stats)()
        } else {
            let (peers, address) = self.route_to(broker)?;
            peers.broker_stats(&address, REQUEST_TIMEOUT).await.map_err(|error| request_error(broker, &error))?
        };
        Ok(v1::BrokerStats {
            segment_bytes: stats.segment_bytes,
            free_bytes: stats.free_bytes,
            tier_lag_records: stats.tier_lag_records,
            failed: stats.failed,
            object_store: stats.object_store,
            maintenance: stats.maintenance,
            impaired: stats.impaired,
            not_ready: stats.not_ready,
            metadata_regressed: stats.metadata_regressed,
            future_timestamps: stats.future_timestamps,
        })
    }

    /// Returns the client and the address for requests to a peer. Fails if the peer is not registered or has no peer
    /// address.
    fn route_to(&self, broker: BrokerId) -> Result<(&PeerClient, String), ApiError> {
        let state = self.metadata.state();
        let entry = state.brokers().get(&broker);
        let address = entry.and_then(|entry| entry.value.listeners.peer().map(str::to_owned));
        let route = self.peers.as_ref().zip(address);
        route.ok_or_else(|| {
            let reason = if entry.is_some() { "registered without a peer address" } else { "offline" };
            ApiError::new(ErrorCode::NotReady, format!("broker {broker} is {reason}"))
        })
    }
}

/// Returns the report about a local replica.
fn replica_report(partition: &Arc<Partition>) -> ReplicaReport {
    ReplicaReport {
        watermarks: partition.watermarks(),
        last_epoch: partition.last_epoch(),
        local_bytes: partition.local_bytes(),
        tiered_bytes: partition.tiered_bytes(),
        failed: partition.error().map(|reason| reason.to_string()),
    }
}

/// Parses a peer's report about its replica. The inner error is the reason why the replica is offline. Returns `None`
/// if the replica is neither open nor offline.
fn parse_report(report: v1::ReplicaReport) -> Option<Result<ReplicaReport, String>> {
    let failed = Some(report.failed).filter(|reason| !reason.is_empty());
    if !report.exists {
        return failed.map(Err);
    }
    let offset = |value| Offset::from_i64(value).unwrap_or(Offset::ZERO);
    Some(Ok(ReplicaReport {
        watermarks: Watermarks {
            log_start: offset(report.log_start),
            local_start: offset(report.local_start),
            tiered_end: offset(report.tiered_end),
            high_watermark: offset(report.high_watermark),
            persisted_end: offset(report.persisted_end),
            log_end: offset(report.log_end),
        },
        last_epoch: report.last_epoch.and_then(LeaderEpoch::from_i32),
        local_bytes: report.local_bytes,
        tiered_bytes: report.tiered_bytes,
        failed,
    }))
}

/// Returns the error for a replica that its broker reports as offline.
pub(in crate::broker) fn replica_offline_error(broker: BrokerId, reason: &str) -> ApiError {
    ApiError::new(ErrorCode::StorageFailed, format!("the replica on broker {broker} is offline: {reason}"))
}

/// Returns the error for a failed request to a peer.
fn request_error(broker: BrokerId, error: &PeerError) -> ApiError {
    let outcome = match error {
        PeerError::Address(_) => "cannot be reached",
        PeerError::Lost { .. } => "does not respond",
        PeerError::Refused(_) => "returned an error",
    };
    ApiError::new(ErrorCode::NotReady, format!("broker {broker} {outcome}: {error}"))
}
