//! Description of the cluster, and admin operations on it.
//!
//! The call for a drain or a reassignment returns once the operation is stored in the metadata store. The controller
//! then moves the replicas.

use std::{ops::Range, time::Duration};

use super::{Admin, brokers, invalid_response, offset};
use crate::{
    connection::admin_client,
    error::CallError,
    model::{BrokerId, LeaderEpoch, Offset},
    proto::{error::ApiError, v1},
};

/// Description of a cluster and of the load of each broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterDescription {
    /// Name of the cluster.
    pub name: String,
    /// Controller; `None` if there is none, and for a standalone broker.
    pub controller: Option<BrokerId>,
    /// Brokers by id: registered brokers, and unregistered brokers that still hold replicas or are to be drained.
    pub brokers: Vec<BrokerDescription>,
    /// Number of topics.
    pub topics: u32,
    /// Number of partitions.
    pub partitions: u32,
    /// Number of partitions without a live leader or without a readable value.
    pub leaderless: u32,
    /// Number of partitions whose ISR lacks a replica that is not being removed.
    pub under_replicated: u32,
    /// Number of partitions whose ISR is smaller than `min.insync.replicas`: `acks=all` fails there.
    pub under_min_isr: u32,
    /// Number of partitions with a reassignment.
    pub reassigning: u32,
    /// Topic and number of the first 20 partitions without a leader or with an ISR smaller than `min.insync.replicas`.
    pub unavailable: Vec<(String, u32)>,
    /// Values in the metadata store that cannot be read.
    pub unreadable: Vec<UnreadableKey>,
    /// Time for which the metadata store has not responded to the responding broker; zero while it responds. Except for
    /// the brokers' own stats, the description is as old as that time.
    pub metadata_staleness: Duration,
    /// Broker that responded.
    pub responder: BrokerId,
}

/// Value in the metadata store that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnreadableKey {
    /// Key of the value.
    pub key: String,
    /// Error of the value.
    pub error: String,
}

/// Description of one broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerDescription {
    /// Broker id.
    pub id: BrokerId,
    /// True if the broker is registered. If false, the fields of its registration are empty.
    pub alive: bool,
    /// `host:port` of the gRPC listener.
    pub address: String,
    /// `host:port` of the HTTP listener.
    pub http_address: String,
    /// `host:port` for other brokers; empty for a standalone broker.
    pub peer_address: String,
    /// Rack of the broker.
    pub rack: String,
    /// Broker epoch: the revision of its registration.
    pub broker_epoch: u64,
    /// Program version.
    pub version: String,
    /// True during a controlled shutdown.
    pub stopping: bool,
    /// True under disk pressure: the broker gets no new replicas.
    pub disk_pressure: bool,
    /// True if the disk is full: a write found no space, and other brokers take over every leadership that they can.
    pub disk_full: bool,
    /// Maximum number of replicas placed on the broker (`broker.max_replicas`); `None` if the limit is not known.
    pub max_replicas: Option<u32>,
    /// Start of the drain in milliseconds since 1970; `None` if the broker is not draining.
    pub draining_since_ms: Option<i64>,
    /// Number of replicas that block the drain. Too few other brokers are eligible, the reassignment waits for an
    /// unregistered broker, or the partition has no leader.
    pub blocked: u32,
    /// Number of partitions that the broker leads.
    pub leader_count: u32,
    /// Number of replicas on the broker.
    pub replica_count: u32,
    /// Number of partitions whose ISR contains the broker.
    pub in_sync_count: u32,
    /// Stats that the broker reports, or the error of the request for them; `None` if the broker is not registered.
    pub stats: Option<Result<BrokerStats, ApiError>>,
}

/// Stats that a broker reports about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BrokerStats {
    /// Bytes of all segments.
    pub segment_bytes: u64,
    /// Free disk space in bytes.
    pub free_bytes: u64,
    /// Number of records of led partitions that are not in the object store yet.
    pub tier_lag_records: u64,
    /// Reason for which the broker refuses writes; `None` if it accepts them.
    pub failed: Option<String>,
    /// Duration and cause of an outage of the object store; `None` while the object store responds.
    pub object_store: Option<String>,
    /// Number of partitions whose maintenance (rolling, uploading or trimming segments) fails repeatedly, and the error
    /// of the longest failure. Without such a partition, the error of the uploads if none has succeeded for 30 seconds.
    /// `None` otherwise, and for failures because the object store or the metadata store does not respond.
    pub maintenance: Option<String>,
    /// Impairments of a broker that serves requests, one line each.
    pub impaired: Vec<String>,
    /// Reason for which the broker refuses requests; `None` if it accepts them.
    pub not_ready: Option<String>,
    /// Description of a metadata store that went back to an older state. The broker then refuses admin operations until
    /// its restart.
    pub metadata_regressed: Option<String>,
    /// Number of segments of led partitions that hold timestamps in the future, and the names of these partitions.
    pub future_timestamps: Option<String>,
}

/// Progress of a drain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainStatus {
    /// True if this call started the drain.
    pub changed: bool,
    /// Start of the drain in milliseconds since 1970.
    pub since_ms: i64,
    /// Number of partitions that the broker still leads.
    pub leader_count: u32,
    /// Number of replicas that the broker still holds.
    pub replica_count: u32,
    /// Topic and number of the partitions that cannot move: too few other brokers are eligible, or the reassignment
    /// waits for an unregistered broker.
    pub blocked: Vec<(String, u32)>,
    /// Number of other brokers that are eligible for replicas.
    pub eligible_brokers: u32,
    /// Number of further replicas that cannot move while their partitions have no leader.
    pub leaderless: u32,
}

impl DrainStatus {
    /// Returns true if no replica can move, and not only because partitions have no leader.
    pub fn is_blocked(&self) -> bool {
        let blocked = u32::try_from(self.blocked.len()).unwrap_or(u32::MAX);
        blocked > 0 && blocked.saturating_add(self.leaderless) >= self.replica_count
    }
}

/// Replicas of a partition during a reassignment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reassignment {
    /// Topic name.
    pub topic: String,
    /// Partition number.
    pub partition: u32,
    /// Replicas after the reassignment, the preferred leader first.
    pub replicas: Vec<BrokerId>,
    /// Replicas to add.
    pub adding: Vec<BrokerId>,
    /// Replicas to remove once the added replicas are in sync.
    pub removing: Vec<BrokerId>,
    /// Current in-sync replicas.
    pub isr: Vec<BrokerId>,
    /// Current leader; `None` if there is none.
    pub leader: Option<BrokerId>,
    /// True if this call changed the partition.
    pub changed: bool,
    /// True if the reassignment is queued: the number of concurrent reassignments is limited.
    pub queued: bool,
}

/// Result of an election or of its dry run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElectionResult {
    /// Elected broker.
    pub leader: BrokerId,
    /// Leader epoch after the election; for a dry run, the current epoch.
    pub leader_epoch: LeaderEpoch,
    /// True if the call changed the leader; false in a dry run, or if the broker already led.
    pub changed: bool,
    /// Revision of the partition's value to which the result refers.
    pub revision: u64,
    /// Log state that each replica reports; only in the dry run of an unclean election.
    pub replicas: Vec<ReplicaDescription>,
    /// Offsets that are known to be committed and that the elected leader does not have; only in the dry run of an
    /// unclean election. Empty with `discard_local`, because the lost offsets are then unknown.
    pub lost: Range<Offset>,
    /// True if the leader's log is unusable and would be deleted, so that the partition continues at the tiered end.
    /// Set only in the dry run of an unclean election.
    pub discard_local: bool,
}

/// State of a replica as its broker reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaDescription {
    /// Broker id.
    pub broker: BrokerId,
    /// True if the replica was in the ISR.
    pub in_sync: bool,
    /// True if the replica was in the ELR.
    pub eligible: bool,
    /// True if the broker reported a log without batches. Segments in the object store do not count.
    pub empty: bool,
    /// High watermark, log end, and epoch of the last batch if there is one. Or the reason why they are unknown: the
    /// broker is not registered, the request to it failed, or its replica is offline or not open.
    pub positions: Result<(Offset, Offset, Option<LeaderEpoch>), ApiError>,
}

impl Admin {
    /// Describes the cluster, its brokers, and the partitions that are unavailable or under-replicated.
    ///
    /// # Errors
    /// No broker responds.
    pub async fn describe_cluster(&self) -> Result<ClusterDescription, CallError> {
        let call = |channel| async move { admin_client(channel).describe_cluster(v1::DescribeClusterRequest {}).await };
        let response = self.client.retried(|| self.client.call_any(call)).await?;
        let unreadable =
            response.unreadable.into_iter().map(|v1::UnreadableKey { key, error }| UnreadableKey { key, error });
        Ok(ClusterDescription {
            name: response.cluster,
            controller: response.controller.map(BrokerId),
            brokers: response.brokers.into_iter().map(broker).collect(),
            topics: response.topics,
            partitions: response.partitions,
            leaderless: response.leaderless,
            under_replicated: response.under_replicated,
            under_min_isr: response.under_min_isr,
            reassigning: response.reassigning,
            unreadable: unreadable.collect(),
            unavailable: response.unavailable.into_iter().map(topic_and_number).collect::<Result<_, _>>()?,
            metadata_staleness: Duration::from_millis(response.metadata_staleness_ms),
            responder: BrokerId(response.responder),
        })
    }

    /// Starts a drain, or returns the progress of a running one. The broker's leaderships and replicas move to other
    /// brokers, and it gets no new replicas.
    ///
    /// # Errors
    /// The cluster has no such broker, or no broker responds.
    pub async fn drain_broker(&self, broker: BrokerId) -> Result<DrainStatus, CallError> {
        let request = v1::DrainBrokerRequest { broker: broker.0 };
        let call = |channel| async move { admin_client(channel).drain_broker(request).await };
        let response = self.client.change_any(call).await?;
        Ok(DrainStatus {
            changed: response.changed,
            since_ms: response.since_ms,
            leader_count: response.leader_count,
            replica_count: response.replica_count,
            blocked: response.blocked.into_iter().map(topic_and_number).collect::<Result<_, _>>()?,
            eligible_brokers: response.eligible_brokers,
            leaderless: response.leaderless,
        })
    }

    /// Cancels a drain. Returns false if there was none.
    ///
    /// # Errors
    /// The cluster has no such broker, or no broker responds.
    pub async fn undrain_broker(&self, broker: BrokerId) -> Result<bool, CallError> {
        let request = v1::UndrainBrokerRequest { broker: broker.0 };
        let call = |channel| async move { admin_client(channel).undrain_broker(request).await };
        Ok(self.client.change_any(call).await?.changed)
    }

    /// Starts to move a partition to the brokers `replicas`, the preferred leader first. Without `partition` all
    /// partitions of the topic move; partition N gets the list rotated by N.
    ///
    /// # Errors
    /// - The topic, the partition or a broker is unknown.
    /// - A broker is named twice.
    /// - The number of brokers is not the replication factor.
    /// - A broker cannot receive the replica.
    /// - No broker responds.
    pub async fn reassign(
        &self,
        topic: &str,
        partition: Option<u32>,
        replicas: &[BrokerId],
    ) -> Result<Vec<Reassignment>, CallError> {
        let partition = partition.map(partition_number);
        let call = |channel| {
            let replicas = replicas.iter().map(|id| id.0).collect();
            let request = v1::ReassignPartitionsRequest { topic: topic.to_owned(), partition, replicas };
            async move { admin_client(channel).reassign_partitions(request).await }
        };
        let response = self.client.change_any(call).await?;
        response.partitions.into_iter().map(reassignment).collect()
    }

    /// Returns the reassignments in progress: of all topics, of one topic, or of one partition.
    ///
    /// # Errors
    /// The topic or partition is unknown, a partition is given without its topic, or no broker responds.
    pub async fn reassignments(
        &self,
        topic: Option<&str>,
        partition: Option<u32>,
    ) -> Result<Vec<Reassignment>, CallError> {
        let (topic, partition) = (topic.unwrap_or_default(), partition.map(partition_number));
        let call = |channel| {
            let request = v1::ListReassignmentsRequest { topic: topic.to_owned(), partition };
            async move { admin_client(channel).list_reassignments(request).await }
        };
        let response = self.client.retried(|| self.client.call_any(call)).await?;
        response.partitions.into_iter().map(reassignment).collect()
    }

    /// Cancels the reassignments of all topics, of one topic, or of one partition, queued ones included. Restores the
    /// replicas from before each reassignment.
    ///
    /// # Errors
    /// - The topic or partition is unknown.
    /// - A partition is given without its topic.
    /// - No reassignment is in progress or queued.
    /// - Only added replicas are in sync.
    /// - No broker responds.
    pub async fn cancel_reassignment(
        &self,
        topic: Option<&str>,
        partition: Option<u32>,
    ) -> Result<Vec<Reassignment>, CallError> {
        let (topic, partition) = (topic.unwrap_or_default(), partition.map(partition_number));
        let call = |channel| {
            let request = v1::CancelReassignmentRequest { topic: topic.to_owned(), partition };
            async move { admin_client(channel).cancel_reassignment(request).await }
        };
        let response = self.client.change_any(call).await?;
        response.partitions.into_iter().map(reassignment).collect()
    }

    /// Elects the preferred leader. If the partition has no leader, elects the first replica that can lead without
    /// loss.
    ///
    /// # Errors
    /// The topic or partition is unknown, no replica can lead without loss, or no broker responds.
    pub async fn elect_leader(&self, topic: &str, partition: u32) -> Result<ElectionResult, CallError> {
        self.elect(v1::ElectLeaderRequest {
            topic: topic.to_owned(),
            partition: partition_number(partition),
            ..Default::default()
        })
        .await
    }

    /// Returns the leader that an unclean election would elect, and the offsets that it would lose. Changes nothing.
    ///
    /// # Errors
    /// - The topic or partition is unknown.
    /// - The partition has a leader or a replica that can lead without loss.
    /// - No replica can be elected.
    /// - No broker responds.
    pub async fn unclean_election(&self, topic: &str, partition: u32) -> Result<ElectionResult, CallError> {
        self.elect(v1::ElectLeaderRequest {
            topic: topic.to_owned(),
            partition: partition_number(partition),
            unclean: true,
            validate_only: true,
            ..Default::default()
        })
        .await
    }

    /// Elects the replica that [`Admin::unclean_election`] returned in `dry_run`. The replica may lack committed
    /// records.
    ///
    /// # Errors
    /// See [`Admin::unclean_election`]; also, the partition has changed since the dry run, or the log of the replica
    /// can no longer be used.
    pub async fn elect_unclean(
        &self,
        topic: &str,
        partition: u32,
        dry_run: &ElectionResult,
    ) -> Result<ElectionResult, CallError> {
        self.elect(v1::ElectLeaderRequest {
            topic: topic.to_owned(),
            partition: partition_number(partition),
            unclean: true,
            validate_only: false,
            leader: Some(dry_run.leader.0),
            revision: Some(dry_run.revision),
            discard_local: dry_run.discard_local,
        })
        .await
    }

    /// Sends a request for an election or for its dry run.
    async fn elect(&self, request: v1::ElectLeaderRequest) -> Result<ElectionResult, CallError> {
        let call = |channel| {
            let request = request.clone();
            async move { admin_client(channel).elect_leader(request).await }
        };
        let response = self.client.change_any(call).await?;
        Ok(ElectionResult {
            leader: BrokerId(response.leader),
            leader_epoch: LeaderEpoch::from_i32(response.leader_epoch).unwrap_or_default(),
            changed: response.changed,
            revision: response.revision,
            replicas: response.replicas.into_iter().map(replica).collect::<Result<_, _>>()?,
            lost: offset(response.lost_start)?..offset(response.lost_end)?,
            discard_local: response.discard_local,
        })
    }
}

/// Converts a partition number to its protocol type. A number that does not fit becomes `i32::MAX`, which brokers
/// reject.
fn partition_number(partition: u32) -> i32 {
    i32::try_from(partition).unwrap_or(i32::MAX)
}

/// Converts a broker of the response. Empty texts of its stats become `None`.
fn broker(state: v1::BrokerDescription) -> BrokerDescription {
    let stats = match (state.stats, state.error) {
        (Some(stats), _) => Some(Ok(BrokerStats {
            segment_bytes: stats.segment_bytes,
            free_bytes: stats.free_bytes,
            tier_lag_records: stats.tier_lag_records,
            failed: Some(stats.failed).filter(|reason| !reason.is_empty()),
            object_store: Some(stats.object_store).filter(|reason| !reason.is_empty()),
            maintenance: Some(stats.maintenance).filter(|reason| !reason.is_empty()),
            impaired: stats.impaired,
            not_ready: Some(stats.not_ready).filter(|reason| !reason.is_empty()),
            future_timestamps: Some(stats.future_timestamps).filter(|text| !text.is_empty()),
            metadata_regressed: Some(stats.metadata_regressed).filter(|reason| !reason.is_empty()),
        })),
        (None, Some(error)) => Some(Err(ApiError::from(error))),
        (None, None) => None,
    };
    BrokerDescription {
        id: BrokerId(state.id),
        alive: state.alive,
        address: state.address,
        http_address: state.http_address,
        peer_address: state.peer_address,
        rack: state.rack,
        broker_epoch: state.broker_epoch,
        version: state.version,
        stopping: state.stopping,
        disk_pressure: state.disk_pressure,
        disk_full: state.disk_full,
        max_replicas: Some(state.max_replicas).filter(|max| *max > 0),
        blocked: state.blocked,
        draining_since_ms: state.draining_since_ms,
        leader_count: state.leader_count,
        replica_count: state.replica_count,
        in_sync_count: state.in_sync_count,
        stats,
    }
}

/// Returns the topic and the partition number of a name in a response.
fn topic_and_number(name: v1::TopicPartition) -> Result<(String, u32), CallError> {
    let number = u32::try_from(name.partition).map_err(|_| invalid_response("a negative partition"))?;
    Ok((name.topic, number))
}

/// Converts a reassignment of a response.
fn reassignment(response: v1::Reassignment) -> Result<Reassignment, CallError> {
    let (topic, partition) =
        topic_and_number(response.partition.ok_or_else(|| invalid_response("a reassignment without a partition"))?)?;
    Ok(Reassignment {
        topic,
        partition,
        replicas: brokers(response.replicas),
        adding: brokers(response.adding),
        removing: brokers(response.removing),
        isr: brokers(response.isr),
        leader: response.leader.map(BrokerId),
        changed: response.changed,
        queued: response.queued,
    })
}

/// Converts a replica of a response. An error replaces its positions.
fn replica(replica: v1::ReplicaDescription) -> Result<ReplicaDescription, CallError> {
    let positions = match replica.error {
        Some(error) => Err(ApiError::from(error)),
        None => {
            let last_epoch = replica.last_epoch.and_then(LeaderEpoch::from_i32);
            Ok((offset(replica.high_watermark)?, offset(replica.log_end)?, last_epoch))
        }
    };
    let (in_sync, eligible, empty) = (replica.in_sync, replica.eligible, replica.empty);
    Ok(ReplicaDescription { broker: BrokerId(replica.broker), in_sync, eligible, empty, positions })
}
