//! Cluster description and admin operations: translates requests to `cluster::Orders`.
//!
//! The response to an operation is sent when the operation is committed and this broker's metadata cache contains it, so that the next
//! request finds it.

use std::time::Duration;

use super::{
    Broker,
    admin::name,
    describe::numbers,
    faults::invalid,
    figures::{Told, useless},
};
use crate::{
    cluster::{self, BrokerValue, ElectError, Held, Known, Ordered, PartitionEntry, Revision, Successor, successor},
    model::{BrokerId, Offset, PartitionId, TopicName},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    task::clock,
};

/// Number of reassignments that are described before a yield to other tasks.
const REASSIGNMENTS_TOGETHER: usize = 256;

impl Broker {
    pub(super) async fn describe_cluster(&self) -> v1::DescribeClusterResponse {
        let alive = self.view.state().brokers().keys().copied().collect();
        let mut figures = self.ask_figures(alive).await;
        let (state, census) = (self.view.state(), self.orders.census());
        let brokers = census.brokers.iter().map(|(id, carried)| {
            let draining = state.drains().get(id).map(|known| known.value.since_ms);
            let mut broker = v1::BrokerState {
                id: id.0,
                draining_since_ms: draining,
                stuck: draining.map_or(0, |_| u32::try_from(self.orders.stuck(*id)).unwrap_or(u32::MAX)),
                leaders: carried.leaders,
                replicas: carried.replicas,
                in_sync: carried.in_sync,
                ..Default::default()
            };
            if let Some(known) = state.brokers().get(id) {
                registered(&mut broker, known);
                if *id == self.settings.id {
                    // The registration shows this state late, and on a standalone broker never.
                    broker.disk_full |= self.metrics.disk_full.get() > 0;
                    broker.no_room |= self.health.is_full();
                }
                match figures.remove(id) {
                    Some(Ok(figures)) => broker.figures = Some(figures),
                    Some(Err(fault)) => broker.unanswered = Some(fault.into()),
                    None => {}
                }
            }
            broker
        });
        let unreadable = self.orders.unreadable().into_iter();
        v1::DescribeClusterResponse {
            brokers: brokers.collect(),
            cluster: self.settings.cluster.clone(),
            controller: state.controller().map(|id| id.0),
            topics: census.topics,
            partitions: census.partitions,
            leaderless: census.leaderless,
            under_replicated: census.under_replicated,
            below_minimum: census.below_minimum,
            moving: census.moving,
            unreadable: unreadable.map(|(key, why)| v1::UnreadableKey { key, why }).collect(),
            metadata_silence_ms: u64::try_from(self.metadata_silence().as_millis()).unwrap_or(u64::MAX),
            answered_by: self.settings.id.0,
            unavailable: census
                .unavailable
                .iter()
                .map(|(topic, number)| v1::PartitionName { topic: topic.to_string(), partition: number.cast_signed() })
                .collect(),
        }
    }

    /// Returns the time for which this broker has been cut off from the metadata store; zero while it is connected. A broker whose
    /// registration is renewed is connected, even if nothing has changed for a long time.
    pub(super) fn metadata_silence(&self) -> Duration {
        let renewed = self.session.get().is_none_or(|session| !session.lease_left().is_zero());
        if renewed { Duration::ZERO } else { self.view.silence() }
    }

    pub(super) async fn drain_broker(&self, broker: u32) -> Result<v1::DrainBrokerResponse, ApiError> {
        let drained = self.orders.drain(BrokerId(broker), clock::wall_ms()).await?;
        let count = |many: usize| u32::try_from(many).unwrap_or(u32::MAX);
        Ok(v1::DrainBrokerResponse {
            changed: drained.changed,
            since_ms: drained.since_ms,
            leaders: count(drained.leaders),
            replicas: count(drained.replicas),
            stuck: drained.stuck.iter().map(|id| self.named(*id)).collect(),
            takers: count(drained.takers),
            leaderless: count(drained.leaderless),
        })
    }

    pub(super) async fn restore_broker(&self, broker: u32) -> Result<v1::RestoreBrokerResponse, ApiError> {
        Ok(v1::RestoreBrokerResponse { changed: self.orders.restore(BrokerId(broker)).await? })
    }

    pub(super) async fn reassign(&self, request: v1::ReassignRequest) -> Result<v1::ReassignResponse, ApiError> {
        let (topic, partition) = (name(&request.topic)?, number(request.partition)?);
        if request.replicas.is_empty() {
            return Err(invalid("no brokers are named: name as many as the topic's replication factor"));
        }
        let replicas: Vec<BrokerId> = request.replicas.iter().copied().map(BrokerId).collect();
        let ordered = self.orders.reassign(&topic, partition, &replicas).await?;
        Ok(v1::ReassignResponse { partitions: self.reassignments(&ordered).await })
    }

    pub(super) async fn list_reassignments(
        &self,
        request: &v1::ListReassignmentsRequest,
    ) -> Result<v1::ListReassignmentsResponse, ApiError> {
        let (topic, partition) = filter(&request.topic, request.partition)?;
        let moving = self.orders.moving(topic.as_ref(), partition)?;
        Ok(v1::ListReassignmentsResponse { partitions: self.reassignments(&moving).await })
    }

    pub(super) async fn cancel_reassignment(
        &self,
        request: &v1::CancelReassignmentRequest,
    ) -> Result<v1::CancelReassignmentResponse, ApiError> {
        let (topic, partition) = filter(&request.topic, request.partition)?;
        let ordered = self.orders.cancel(topic.as_ref(), partition).await?;
        Ok(v1::CancelReassignmentResponse { partitions: self.reassignments(&ordered).await })
    }

    pub(super) async fn elect_leader(
        &self,
        request: v1::ElectLeaderRequest,
    ) -> Result<v1::ElectLeaderResponse, ApiError> {
        let topic = name(&request.topic)?;
        let partition = number(Some(request.partition))?.unwrap_or_default();
        if request.unclean {
            return self.elect_unclean(&topic, partition, &request).await;
        }
        if request.validate_only || request.to.is_some() || request.revision.is_some() || request.discard {
            return Err(invalid("validate_only, to, revision and discard go with unclean only"));
        }
        let ordered = self.orders.elect(&topic, partition).await?;
        Ok(self.carried_out("preferred", &ordered).await)
    }

    async fn elect_unclean(
        &self,
        topic: &TopicName,
        partition: u32,
        request: &v1::ElectLeaderRequest,
    ) -> Result<v1::ElectLeaderResponse, ApiError> {
        let expect = request.revision.map(Revision);
        if let (Some(to), Some(_)) = (request.to, expect) {
            self.still_usable(topic, partition, BrokerId(to), request.discard).await?;
            let ordered = self.orders.elect_unclean(topic, partition, BrokerId(to), expect, request.discard).await?;
            return Ok(self.carried_out("unclean", &ordered).await);
        }
        if request.to.is_some() || expect.is_some() || request.discard {
            return Err(invalid(
                "to and revision go together, and discard with them: they are in the answer to validate_only",
            ));
        }
        let found = self.orders.forsaken(topic, partition)?;
        let asked = self.ask_replicas(&found).await;
        let tiered_end = self.view.partition(found.id).as_ref().map_or(Offset::ZERO, bucket_end);
        // Last resort: an unusable replica that restarts at the tiered end. The lost offsets are unknown then.
        let behind_bucket = || {
            let broker = asked.useless.filter(|_| tiered_end > Offset::ZERO && !asked.silent)?;
            Some(Successor { broker, loss: None })
        };
        let usable = successor(&found.value.replicas, &asked.told, tiered_end);
        let discard = usable.is_none();
        let best = usable.or_else(behind_bucket);
        let Some(best) = best else {
            let partition = format!("{topic}/{partition}");
            return Err(ElectError::Silent { partition, replicas: found.value.replicas }.into());
        };
        let mut answer = elected(&found);
        if request.validate_only {
            answer.leader = best.broker.0;
        } else {
            let revision = Some(found.revision);
            let ordered = self.orders.elect_unclean(topic, partition, best.broker, revision, discard).await?;
            answer = self.carried_out("unclean", &ordered).await;
        }
        if let Some(loss) = best.loss {
            (answer.lost_from, answer.lost_to) = (loss.from.as_i64(), loss.to.as_i64());
        }
        Ok(v1::ElectLeaderResponse { held: asked.held, discard, ..answer })
    }

    /// Rejects the election if the replica to be elected responded earlier and does not now. The operator did not agree to the loss of its
    /// log.
    async fn still_usable(
        &self,
        topic: &TopicName,
        partition: u32,
        to: BrokerId,
        discard: bool,
    ) -> Result<(), ElectError> {
        // An error here means that an earlier attempt of this operation succeeded, or the operation itself returns the error.
        let Ok(found) = self.orders.forsaken(topic, partition) else { return Ok(()) };
        if discard || self.ask_replicas(&found).await.told.iter().any(|held| held.broker == to) {
            return Ok(());
        }
        Err(ElectError::Unusable { partition: format!("{topic}/{partition}"), id: to })
    }

    /// Counts an election, waits until this broker's metadata cache contains it, and returns the response.
    async fn carried_out(&self, cause: &'static str, ordered: &Ordered) -> v1::ElectLeaderResponse {
        if ordered.changed {
            self.metrics.elections.count(cause);
        }
        self.orders.seen(std::slice::from_ref(ordered)).await;
        elected(ordered)
    }

    /// Requests the reports of a partition's replicas.
    async fn ask_replicas(&self, found: &Ordered) -> Asked {
        let (id, value) = (found.id, &found.value);
        let state = self.view.state();
        let alive = value.replicas.iter().filter(|id| state.brokers().contains_key(id));
        let wanted = alive.map(|broker| (*broker, vec![id])).collect();
        drop(state);
        let mut answers = self.ask_marks(wanted).await;
        let mut asked = Asked::default();
        for broker in &value.replicas {
            let mut replica = v1::ReplicaState {
                broker: broker.0,
                in_sync: value.isr.contains(broker),
                eligible: value.elr.contains(broker),
                ..Default::default()
            };
            match answers.remove(broker).map(|answer| answer.map(|mut told| told.remove(&id))) {
                Some(Ok(Some(Ok(Told { marks, last_epoch, .. })))) => {
                    replica.high_watermark = marks.high_watermark.as_i64();
                    replica.log_end = marks.log_end.as_i64();
                    replica.last_epoch = last_epoch.map(|epoch| epoch.as_i32());
                    replica.empty = marks.local_start >= marks.log_end;
                    let (broker, log_end, high_watermark) = (*broker, marks.log_end, marks.high_watermark);
                    asked.told.push(Held { broker, last_epoch, log_end, high_watermark });
                }
                Some(Ok(Some(Err(why)))) => {
                    replica.unanswered = Some(useless(*broker, &why).into());
                    asked.useless = asked.useless.or(Some(*broker));
                }
                Some(Ok(None)) => {
                    replica.unanswered = Some(without(*broker).into());
                    asked.silent = true;
                }
                Some(Err(fault)) => {
                    replica.unanswered = Some(fault.into());
                    asked.silent = true;
                }
                None => replica.unanswered = Some(gone(*broker).into()),
            }
            asked.held.push(replica);
        }
        asked
    }

    async fn reassignments(&self, ordered: &[Ordered]) -> Vec<v1::Reassignment> {
        self.orders.seen(ordered).await;
        let mut reassignments = Vec::with_capacity(ordered.len());
        for together in ordered.chunks(REASSIGNMENTS_TOGETHER) {
            reassignments.extend(together.iter().map(|one| self.reassignment(one)));
            tokio::task::yield_now().await;
        }
        reassignments
    }

    fn reassignment(&self, ordered: &Ordered) -> v1::Reassignment {
        let value = &ordered.value;
        let waiting = value.is_ordered() && !value.is_moving();
        // A queued reassignment is shown as it will be.
        let begun = value.begin_ordered().filter(|_| waiting);
        let move_of = begun.as_ref().unwrap_or(value);
        let stays = |id: &BrokerId| !move_of.removing.contains(id);
        let target: Vec<BrokerId> = move_of.replicas.iter().copied().filter(stays).collect();
        v1::Reassignment {
            partition: Some(self.named(ordered.id)),
            replicas: numbers(&target),
            adding: numbers(&move_of.adding),
            removing: numbers(&move_of.removing),
            waiting,
            isr: numbers(&value.isr),
            leader: value.leader.map(|leader| leader.0),
            changed: ordered.changed,
        }
    }

    /// Returns a partition with the name of its topic, or with the topic id if the topic was deleted meanwhile.
    fn named(&self, id: PartitionId) -> v1::PartitionName {
        let state = self.view.state();
        let topic = state.name(id.topic).map_or_else(|| id.topic.to_string(), ToString::to_string);
        v1::PartitionName { topic, partition: id.number.cast_signed() }
    }
}

/// Adds the content of a broker's registration.
fn registered(broker: &mut v1::BrokerState, known: &Known<BrokerValue>) {
    let value = &known.value;
    broker.alive = true;
    broker.address = value.listeners.client().to_owned();
    broker.http_address = value.listeners.http().unwrap_or_default().to_owned();
    broker.peer_address = value.listeners.peer().unwrap_or_default().to_owned();
    broker.rack = value.rack.clone().unwrap_or_default();
    broker.broker_epoch = known.create_revision.0;
    broker.version.clone_from(&value.version);
    broker.stopping = value.state == cluster::BrokerState::Stopping;
    broker.disk_full = value.disk_full;
    broker.no_room = value.no_room;
    broker.max_replicas = value.max_replicas.unwrap_or_default();
}

fn elected(ordered: &Ordered) -> v1::ElectLeaderResponse {
    v1::ElectLeaderResponse {
        leader: ordered.value.leader.map(|leader| leader.0).unwrap_or_default(),
        leader_epoch: ordered.value.leader_epoch.as_i32(),
        changed: ordered.changed,
        revision: ordered.revision.0,
        ..Default::default()
    }
}

fn bucket_end(entry: &PartitionEntry) -> Offset {
    entry.tier.as_ref().map_or(Offset::ZERO, |known| known.value.bucket_end())
}

/// Reports of a partition's replicas.
#[derive(Default)]
struct Asked {
    /// Entries for the response, in the order of the replicas.
    held: Vec<v1::ReplicaState>,
    /// Reports of the replicas that responded.
    told: Vec<Held>,
    /// First live broker whose replica is unusable.
    useless: Option<BrokerId>,
    /// True if a live broker has not responded, or has not opened its replica yet.
    silent: bool,
}

fn gone(broker: BrokerId) -> ApiError {
    ApiError::new(ErrorCode::NotReady, format!("broker {broker} is not alive"))
}

fn without(broker: BrokerId) -> ApiError {
    let message = format!("broker {broker} does not have its replica open");
    ApiError::new(ErrorCode::NotReady, message)
}

fn number(partition: Option<i32>) -> Result<Option<u32>, ApiError> {
    let Some(number) = partition else { return Ok(None) };
    u32::try_from(number).map(Some).map_err(|_| invalid(format!("partition {number} is negative")))
}

/// Parses the scope of a request: all topics, one topic, or one partition.
fn filter(topic: &str, partition: Option<i32>) -> Result<(Option<TopicName>, Option<u32>), ApiError> {
    let partition = number(partition)?;
    if topic.is_empty() {
        return match partition {
            None => Ok((None, None)),
            Some(number) => Err(invalid(format!("partition {number} of which topic? name it"))),
        };
    }
    Ok((Some(name(topic)?), partition))
}
