//! Cluster description and admin operations: converts requests to calls of `cluster::ClusterOperations`.
//!
//! The response to an operation is sent after the operation was committed and this broker's metadata cache contains it.
//! So the next request to this broker observes the operation. The wait for the cache has a timeout.

use std::sync::Arc;

use super::{describe::ids_to_proto, errors::invalid_request, topics::parse_topic_name};
use crate::{
    broker::{
        background::lease_monitor::LeaseMonitor,
        health::Health,
        node_context::NodeContext,
        replication::peer_status::{PeerStatus, ReplicaReport, replica_offline_error},
    },
    cluster::{
        self, BrokerValue, ClusterOperations, ElectError, OperationResult, PartitionEntry, ReplicaPosition, Revision,
        UncleanCandidate, Versioned, best_unclean_candidate,
    },
    model::{BrokerId, Offset, PartitionId, TopicName},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    task::clock,
};

/// Number of reassignments that are described before a yield to other tasks.
const REASSIGNMENTS_PER_YIELD: usize = 256;

/// Handler of the cluster description and of admin operations.
pub(in crate::broker) struct Operations {
    ctx: NodeContext,
    operations: ClusterOperations,
    peers: Arc<PeerStatus>,
    lease: Arc<LeaseMonitor>,
    health: Arc<Health>,
}

impl Operations {
    pub(super) fn new(ctx: NodeContext, peers: Arc<PeerStatus>, lease: Arc<LeaseMonitor>, health: Arc<Health>) -> Self {
        let (store, keys, metadata) = (Arc::clone(&ctx.store), ctx.keys.clone(), ctx.metadata.clone());
        let operations = ClusterOperations::new(store, keys, metadata, ctx.config.topic_defaults.clone());
        Self { ctx, operations, peers, lease, health }
    }

    /// Describes all brokers of the metadata, with the stats that registered brokers report, and the number of
    /// partitions in each state.
    pub(in crate::broker) async fn describe_cluster(&self) -> v1::DescribeClusterResponse {
        let alive = self.ctx.metadata.state().brokers().keys().copied().collect();
        let mut broker_stats = self.peers.request_stats(alive).await;
        let (state, stats) = (self.ctx.metadata.state(), self.operations.stats());
        let brokers = stats.brokers.iter().map(|(id, load)| {
            let draining = state.drains().get(id).map(|drain| drain.value.since_ms);
            let mut broker = v1::BrokerDescription {
                id: id.0,
                draining_since_ms: draining,
                blocked: draining.map_or(0, |_| u32::try_from(self.operations.count_blocked(*id)).unwrap_or(u32::MAX)),
                leader_count: load.leaders,
                replica_count: load.replicas,
                in_sync_count: load.in_sync,
                ..Default::default()
            };
            if let Some(registration) = state.brokers().get(id) {
                add_registration(&mut broker, registration);
                if *id == self.ctx.id {
                    // The registration contains the disk states of this broker with a delay, and on a standalone broker
                    // never.
                    broker.disk_pressure |= self.ctx.metrics.disk_pressure.get() > 0;
                    broker.disk_full |= self.health.is_full();
                }
                match broker_stats.remove(id) {
                    Some(Ok(stats)) => broker.stats = Some(stats),
                    Some(Err(error)) => broker.error = Some(error.into()),
                    None => {}
                }
            }
            broker
        });
        let unreadable = self.operations.unreadable().into_iter();
        v1::DescribeClusterResponse {
            brokers: brokers.collect(),
            cluster: self.ctx.config.cluster.clone(),
            controller: state.controller().map(|id| id.0),
            topics: stats.topics,
            partitions: stats.partitions,
            leaderless: stats.leaderless,
            under_replicated: stats.under_replicated,
            under_min_isr: stats.under_min_isr,
            reassigning: stats.reassigning,
            unreadable: unreadable.map(|(key, error)| v1::UnreadableKey { key, error }).collect(),
            metadata_staleness_ms: u64::try_from(self.lease.metadata_staleness().as_millis()).unwrap_or(u64::MAX),
            responder: self.ctx.id.0,
            unavailable: stats
                .unavailable
                .iter()
                .map(|(topic, number)| v1::TopicPartition { topic: topic.to_string(), partition: number.cast_signed() })
                .collect(),
        }
    }

    /// Marks a broker as draining: the controller then moves its leaderships and replicas to other brokers. The
    /// response lists what must be moved and what blocks the drain.
    pub(super) async fn drain_broker(&self, broker: u32) -> Result<v1::DrainBrokerResponse, ApiError> {
        let drained = self.operations.drain(BrokerId(broker), clock::wall_ms()).await?;
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Ok(v1::DrainBrokerResponse {
            changed: drained.changed,
            since_ms: drained.since_ms,
            leader_count: count(drained.leaders),
            replica_count: count(drained.replicas),
            blocked: drained.blocked.iter().map(|id| self.topic_partition(*id)).collect(),
            eligible_brokers: count(drained.eligible_brokers),
            leaderless: count(drained.leaderless),
        })
    }

    pub(super) async fn undrain_broker(&self, broker: u32) -> Result<v1::UndrainBrokerResponse, ApiError> {
        Ok(v1::UndrainBrokerResponse { changed: self.operations.undrain(BrokerId(broker)).await? })
    }

    /// Requests a reassignment of a partition, or of all partitions of a topic, to the replicas in the request. The
    /// controller runs the reassignment later.
    pub(super) async fn reassign(
        &self,
        request: v1::ReassignPartitionsRequest,
    ) -> Result<v1::ReassignPartitionsResponse, ApiError> {
        let (topic, partition) = (parse_topic_name(&request.topic)?, parse_partition(request.partition)?);
        if request.replicas.is_empty() {
            return Err(invalid_request("replicas is empty: name as many brokers as the topic's replication factor"));
        }
        let replicas: Vec<BrokerId> = request.replicas.iter().copied().map(BrokerId).collect();
        let results = self.operations.reassign(&topic, partition, &replicas).await?;
        Ok(v1::ReassignPartitionsResponse { partitions: self.describe_reassignments(&results).await })
    }

    pub(super) async fn list_reassignments(
        &self,
        request: &v1::ListReassignmentsRequest,
    ) -> Result<v1::ListReassignmentsResponse, ApiError> {
        let (topic, partition) = parse_scope(&request.topic, request.partition)?;
        let results = self.operations.list_reassignments(topic.as_ref(), partition)?;
        Ok(v1::ListReassignmentsResponse { partitions: self.describe_reassignments(&results).await })
    }

    /// Cancels the reassignments, in progress or queued, of all topics, one topic or one partition. The response
    /// describes the affected partitions.
    pub(super) async fn cancel_reassignment(
        &self,
        request: &v1::CancelReassignmentRequest,
    ) -> Result<v1::CancelReassignmentResponse, ApiError> {
        let (topic, partition) = parse_scope(&request.topic, request.partition)?;
        let results = self.operations.cancel(topic.as_ref(), partition).await?;
        Ok(v1::CancelReassignmentResponse { partitions: self.describe_reassignments(&results).await })
    }

    /// Elects the preferred leader of a partition, or runs an unclean election if the request sets `unclean`.
    pub(super) async fn elect_leader(
        &self,
        request: v1::ElectLeaderRequest,
    ) -> Result<v1::ElectLeaderResponse, ApiError> {
        let topic = parse_topic_name(&request.topic)?;
        let partition = parse_partition(Some(request.partition))?.unwrap_or_default();
        if request.unclean {
            return self.elect_unclean(&topic, partition, &request).await;
        }
        if request.validate_only || request.leader.is_some() || request.revision.is_some() || request.discard_local {
            return Err(invalid_request(
                "validate_only, leader, revision and discard_local require unclean: set unclean or leave them out",
            ));
        }
        let election = self.operations.elect(&topic, partition).await?;
        Ok(self.complete_election("preferred", &election).await)
    }

    /// Runs an unclean election of a partition that has no live leader.
    ///
    /// A request with a leader and a revision, both from an earlier response to `validate_only`, elects this leader if
    /// the partition still has that revision. For a request without a leader and a revision, this broker collects the
    /// reports of the replicas. The broker elects the replica that loses the fewest records. With `validate_only`, the
    /// response only names that replica.
    async fn elect_unclean(
        &self,
        topic: &TopicName,
        partition: u32,
        request: &v1::ElectLeaderRequest,
    ) -> Result<v1::ElectLeaderResponse, ApiError> {
        let expected_revision = request.revision.map(Revision);
        if request.validate_only && (request.leader.is_some() || expected_revision.is_some()) {
            return Err(invalid_request(
                "leader and revision run the election, and validate_only changes nothing: set either validate_only, \
                 or leader and revision",
            ));
        }
        if let (Some(leader), Some(_)) = (request.leader.map(BrokerId), expected_revision) {
            let discard = request.discard_local;
            self.check_still_usable(topic, partition, leader, discard).await?;
            let election = self.operations.elect_unclean(topic, partition, leader, expected_revision, discard).await?;
            return Ok(self.complete_election("unclean", &election).await);
        }
        if request.leader.is_some() || expected_revision.is_some() || request.discard_local {
            return Err(invalid_request(
                "leader and revision must be set together, and discard_local requires both: copy them from the \
                 response to validate_only",
            ));
        }
        let leaderless = self.operations.leaderless_partition(topic, partition)?;
        let reports = self.request_replica_reports(&leaderless).await;
        let tiered_end = self.ctx.metadata.partition(leaderless.id).as_ref().map_or(Offset::ZERO, committed_tiered_end);
        // If no usable replica responded, but all registered replicas have reported, an offline replica can be elected,
        // which restarts at the tiered end. The lost offsets are unknown then.
        let offline_candidate = || {
            let broker = reports.offline.filter(|_| tiered_end > Offset::ZERO && !reports.is_incomplete)?;
            Some(UncleanCandidate { broker, loss: None })
        };
        let usable_candidate = best_unclean_candidate(&leaderless.value.replicas, &reports.positions, tiered_end);
        let discard = usable_candidate.is_none();
        let Some(candidate) = usable_candidate.or_else(offline_candidate) else {
            let partition = format!("{topic}/{partition}");
            return Err(ElectError::NoResponse { partition, replicas: leaderless.value.replicas }.into());
        };
        let mut response = election_response(&leaderless);
        if request.validate_only {
            response.leader = candidate.broker.0;
        } else {
            let (broker, revision) = (candidate.broker, Some(leaderless.revision));
            let election = self.operations.elect_unclean(topic, partition, broker, revision, discard).await?;
            response = self.complete_election("unclean", &election).await;
        }
        if let Some(loss) = candidate.loss {
            (response.lost_start, response.lost_end) = (loss.from.as_i64(), loss.to.as_i64());
        }
        Ok(v1::ElectLeaderResponse { replicas: reports.replicas, discard_local: discard, ..response })
    }

    /// Fails if the candidate, whose log the operator wants to keep, does not report a usable log now. Does nothing
    /// with `discard`, because the operator agreed to the loss of the candidate's log.
    async fn check_still_usable(
        &self,
        topic: &TopicName,
        partition: u32,
        candidate: BrokerId,
        discard: bool,
    ) -> Result<(), ElectError> {
        // If the partition is not leaderless, an earlier attempt of this operation may have succeeded. The election
        // itself returns any other error.
        let Ok(leaderless) = self.operations.leaderless_partition(topic, partition) else { return Ok(()) };
        if discard {
            return Ok(());
        }
        let reports = self.request_replica_reports(&leaderless).await;
        if reports.positions.iter().any(|position| position.broker == candidate) {
            return Ok(());
        }
        Err(ElectError::LogUnusable { partition: format!("{topic}/{partition}"), id: candidate })
    }

    /// Counts an election that changed the leader, waits, up to a timeout, until this broker's metadata cache contains
    /// the election, and returns the response.
    async fn complete_election(&self, cause: &'static str, election: &OperationResult) -> v1::ElectLeaderResponse {
        if election.changed {
            self.ctx.metrics.elections.count(cause);
        }
        self.operations.wait_until_cached(std::slice::from_ref(election)).await;
        election_response(election)
    }

    /// Requests the reports of a leaderless partition's replicas from each of their brokers that is registered.
    async fn request_replica_reports(&self, leaderless: &OperationResult) -> ReplicaReports {
        let (id, value) = (leaderless.id, &leaderless.value);
        let state = self.ctx.metadata.state();
        let alive = value.replicas.iter().filter(|id| state.brokers().contains_key(id));
        let requested = alive.map(|broker| (*broker, vec![id])).collect();
        drop(state);
        let mut responses = self.peers.request_reports(requested).await;
        let mut reports = ReplicaReports::default();
        for broker in &value.replicas {
            let mut replica = v1::ReplicaDescription {
                broker: broker.0,
                in_sync: value.isr.contains(broker),
                eligible: value.elr.contains(broker),
                ..Default::default()
            };
            match responses.remove(broker).map(|response| response.map(|mut replicas| replicas.remove(&id))) {
                // The replica is open.
                Some(Ok(Some(Ok(ReplicaReport { watermarks, last_epoch, .. })))) => {
                    replica.high_watermark = watermarks.high_watermark.as_i64();
                    replica.log_end = watermarks.log_end.as_i64();
                    replica.last_epoch = last_epoch.map(|epoch| epoch.as_i32());
                    replica.empty = watermarks.local_start >= watermarks.log_end;
                    let (broker, log_end, high_watermark) = (*broker, watermarks.log_end, watermarks.high_watermark);
                    reports.positions.push(ReplicaPosition { broker, last_epoch, log_end, high_watermark });
                }
                // The broker responded that its replica is offline.
                Some(Ok(Some(Err(reason)))) => {
                    replica.error = Some(replica_offline_error(*broker, &reason).into());
                    reports.offline = reports.offline.or(Some(*broker));
                }
                // The broker responded, and its replica is neither open nor offline.
                Some(Ok(None)) => {
                    replica.error = Some(not_open_error(*broker).into());
                    reports.is_incomplete = true;
                }
                // The broker is registered, and did not respond or returned an error.
                Some(Err(error)) => {
                    let message = format!("{error}; check broker {broker} first");
                    replica.error = Some(ApiError { message, ..error }.into());
                    reports.is_incomplete = true;
                }
                None => replica.error = Some(broker_offline_error(*broker).into()),
            }
            reports.replicas.push(replica);
        }
        reports
    }

    /// Waits, up to a timeout, until this broker's metadata cache contains the results of an operation, and describes
    /// the reassignment of each partition.
    async fn describe_reassignments(&self, results: &[OperationResult]) -> Vec<v1::Reassignment> {
        self.operations.wait_until_cached(results).await;
        let mut reassignments = Vec::with_capacity(results.len());
        for chunk in results.chunks(REASSIGNMENTS_PER_YIELD) {
            reassignments.extend(chunk.iter().map(|result| self.describe_reassignment(result)));
            tokio::task::yield_now().await;
        }
        reassignments
    }

    /// Describes the reassignment of a partition. A queued reassignment is described with the values that it will have
    /// after its start.
    fn describe_reassignment(&self, result: &OperationResult) -> v1::Reassignment {
        let value = &result.value;
        let queued = value.has_queued() && !value.is_reassigning();
        let started = value.start_queued().filter(|_| queued);
        let shown = started.as_ref().unwrap_or(value);
        let stays = |id: &BrokerId| !shown.removing.contains(id);
        let target: Vec<BrokerId> = shown.replicas.iter().copied().filter(stays).collect();
        v1::Reassignment {
            partition: Some(self.topic_partition(result.id)),
            replicas: ids_to_proto(&target),
            adding: ids_to_proto(&shown.adding),
            removing: ids_to_proto(&shown.removing),
            queued,
            isr: ids_to_proto(&value.isr),
            leader: value.leader.map(|leader| leader.0),
            changed: result.changed,
        }
    }

    /// Returns a partition with the name of its topic, or with the topic id if the topic was deleted meanwhile.
    fn topic_partition(&self, id: PartitionId) -> v1::TopicPartition {
        let state = self.ctx.metadata.state();
        let topic = state.name(id.topic).map_or_else(|| id.topic.to_string(), ToString::to_string);
        v1::TopicPartition { topic, partition: id.number.cast_signed() }
    }
}

/// Adds the content of a broker's registration to its description.
fn add_registration(broker: &mut v1::BrokerDescription, registration: &Versioned<BrokerValue>) {
    let value = &registration.value;
    broker.alive = true;
    broker.address = value.listeners.client().to_owned();
    broker.http_address = value.listeners.http().unwrap_or_default().to_owned();
    broker.peer_address = value.listeners.peer().unwrap_or_default().to_owned();
    broker.rack = value.rack.clone().unwrap_or_default();
    broker.broker_epoch = registration.create_revision.0;
    broker.version.clone_from(&value.version);
    broker.stopping = value.state == cluster::BrokerState::Stopping;
    broker.disk_pressure = value.disk_pressure;
    broker.disk_full = value.disk_full;
    broker.max_replicas = value.max_replicas.unwrap_or_default();
}

/// Returns the response with the leader, leader epoch and revision in `result`: the result of an election, or the
/// leaderless value with `validate_only`.
fn election_response(result: &OperationResult) -> v1::ElectLeaderResponse {
    v1::ElectLeaderResponse {
        leader: result.value.leader.map(|leader| leader.0).unwrap_or_default(),
        leader_epoch: result.value.leader_epoch.as_i32(),
        changed: result.changed,
        revision: result.revision.0,
        ..Default::default()
    }
}

/// Returns the tiered end of a partition in the metadata; zero without a tier state.
fn committed_tiered_end(entry: &PartitionEntry) -> Offset {
    entry.tier.as_ref().map_or(Offset::ZERO, |tier| tier.value.tiered_end())
}

/// Reports of the replicas of one partition, and what they show together.
#[derive(Default)]
struct ReplicaReports {
    /// Entries for the response, in the order of the replicas.
    replicas: Vec<v1::ReplicaDescription>,
    /// Log positions of the open replicas.
    positions: Vec<ReplicaPosition>,
    /// First broker, in the order of the replicas, that reported its replica as offline.
    offline: Option<BrokerId>,
    /// True if a registered broker did not respond, or has not opened its replica yet.
    is_incomplete: bool,
}

fn broker_offline_error(broker: BrokerId) -> ApiError {
    let message = format!("broker {broker} is offline: if it can return with its data, start it first");
    ApiError::new(ErrorCode::NotReady, message)
}

fn not_open_error(broker: BrokerId) -> ApiError {
    let message =
        format!("broker {broker} is running and has not opened its replica yet: wait, and repeat the command");
    ApiError::new(ErrorCode::NotReady, message)
}

/// Parses the partition number of a request. Returns `None` if the request has none.
fn parse_partition(partition: Option<i32>) -> Result<Option<u32>, ApiError> {
    let Some(number) = partition else { return Ok(None) };
    u32::try_from(number)
        .map(Some)
        .map_err(|_| invalid_request(format!("partition {number} is negative: use 0 or more")))
}

/// Parses the scope of a request: all topics (an empty name), one topic, or one partition. A partition number requires
/// a topic.
fn parse_scope(topic: &str, partition: Option<i32>) -> Result<(Option<TopicName>, Option<u32>), ApiError> {
    let partition = parse_partition(partition)?;
    if topic.is_empty() {
        return match partition {
            None => Ok((None, None)),
            Some(number) => Err(invalid_request(format!("partition {number} has no topic: name the topic"))),
        };
    }
    Ok((Some(parse_topic_name(topic)?), partition))
}
