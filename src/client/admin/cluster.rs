//! The cluster's description, and an operator's orders to it.
//!
//! An order is done when it is written down where all brokers see it; the controller moves replicas from then on.

use std::{ops::Range, time::Duration};

use super::{Admin, brokers, odd, offset};
use crate::{
    client::{connection::admin_client, error::CallError},
    model::{BrokerId, LeaderEpoch, Offset},
    proto::{fault::Fault, v1},
};

/// A cluster with what each of its brokers carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterDescription {
    /// Its name.
    pub name: String,
    /// The broker that plans; none while nobody does, and where a broker runs alone.
    pub controller: Option<BrokerId>,
    /// By number: those that are alive, and those that are not and still hold replicas or are to be drained.
    pub brokers: Vec<BrokerDescription>,
    /// How many topics there are.
    pub topics: u32,
    /// How many partitions they have.
    pub partitions: u32,
    /// Partitions that nobody leads.
    pub leaderless: u32,
    /// Partitions with fewer in sync than replicas.
    pub under_replicated: u32,
    /// Partitions with fewer in sync than `min.insync.replicas`: `acks=all` fails there.
    pub below_minimum: u32,
    /// Partitions whose replicas are being moved.
    pub moving: u32,
    /// Topics and numbers of partitions that nobody leads, or with fewer in sync than `min.insync.replicas`: the first 20.
    pub unavailable: Vec<(String, u32)>,
    /// What is in the metadata store and cannot be used.
    pub unreadable: Vec<UnreadableKey>,
    /// How long the metadata store has not answered the broker that answered here; zero while it does. All but the brokers' own figures
    /// is told as it was then.
    pub metadata_silence: Duration,
    /// The broker that answered.
    pub answered_by: BrokerId,
}

/// A value in the metadata store that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnreadableKey {
    /// Its key.
    pub key: String,
    /// What is wrong with it.
    pub why: String,
}

/// One broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerDescription {
    /// Its number.
    pub id: BrokerId,
    /// Whether it is registered. Without, what it says of itself is empty.
    pub alive: bool,
    /// `host:port` of its gRPC listener.
    pub address: String,
    /// `host:port` of its HTTP listener.
    pub http_address: String,
    /// `host:port` at which other brokers reach it; empty for a standalone broker.
    pub peer_address: String,
    /// Where it stands.
    pub rack: String,
    /// Its uptime: the revision at which it registered.
    pub broker_epoch: u64,
    /// The version of its program.
    pub version: String,
    /// It is being stopped.
    pub stopping: bool,
    /// Its disk is so full that it is given no new replicas.
    pub disk_full: bool,
    /// Its disk took no more records: others lead what they can.
    pub no_room: bool,
    /// Most replicas that are placed on it (`broker.max_replicas`).
    pub max_replicas: Option<u32>,
    /// Since when it is to be emptied, in milliseconds since 1970.
    pub draining_since_ms: Option<i64>,
    /// While it is to be emptied: replicas that cannot move, because too few other brokers take any, a move waits for a
    /// broker that is gone, or nobody leads their partitions.
    pub stuck: u32,
    /// Partitions that it leads.
    pub leaders: u32,
    /// Partitions that it holds.
    pub replicas: u32,
    /// Partitions that it is in sync with.
    pub in_sync: u32,
    /// What it says of itself, or why it does not; neither of one that is not alive.
    pub figures: Option<Result<BrokerFigures, Fault>>,
}

/// What a broker says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BrokerFigures {
    /// Bytes of its segments.
    pub segment_bytes: u64,
    /// Bytes that can still be written.
    pub free_bytes: u64,
    /// Records of partitions that it leads and that are not in the bucket yet.
    pub tier_lag_records: u64,
    /// Why it takes no writes, when it takes none.
    pub failed: Option<String>,
    /// For how long the object store has served it nothing, and why.
    pub object_store: Option<String>,
    /// How many partitions fail to be sealed, uploaded or trimmed, and why the one that has for longest does; not while a store does not answer.
    pub upkeep: Option<String>,
    /// Impairments of a broker that serves, one line each.
    pub impaired: Vec<String>,
    /// Why it takes no requests, when it takes none.
    pub not_ready: Option<String>,
    /// How the metadata store went back, when it did: the broker refuses orders until it is restarted.
    pub metadata_regressed: Option<String>,
    /// How many segments of partitions that it leads hold timestamps that are still to come, and of which partitions.
    pub future_timestamps: Option<String>,
}

/// What a broker that is drained has still to give away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drain {
    /// Whether this order began it.
    pub changed: bool,
    /// Since when, in milliseconds since 1970.
    pub since_ms: i64,
    /// Partitions that it leads.
    pub leaders: u32,
    /// Partitions that it holds.
    pub replicas: u32,
    /// Topics and numbers of partitions that cannot move, because too few other brokers take replicas or a move waits for a broker that is gone.
    pub stuck: Vec<(String, u32)>,
    /// How many others take replicas.
    pub takers: u32,
    /// How many more replicas cannot move while nobody leads their partitions.
    pub leaderless: u32,
}

impl Drain {
    /// True where no replica can move, and a leader for the leaderless ones would not change that for all.
    pub fn is_stuck(&self) -> bool {
        let stuck = u32::try_from(self.stuck.len()).unwrap_or(u32::MAX);
        stuck > 0 && stuck.saturating_add(self.leaderless) >= self.replicas
    }
}

/// Where a partition's replicas go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reassignment {
    /// The topic.
    pub topic: String,
    /// The partition's number.
    pub partition: u32,
    /// The replicas when the move is over, the preferred leader first.
    pub replicas: Vec<BrokerId>,
    /// Those that are new.
    pub adding: Vec<BrokerId>,
    /// Those that go when the new ones are in sync.
    pub removing: Vec<BrokerId>,
    /// Those that are in sync now.
    pub isr: Vec<BrokerId>,
    /// Who leads.
    pub leader: Option<BrokerId>,
    /// Whether the order changed it.
    pub changed: bool,
    /// Whether it waits for its turn: only so many partitions are moved at the same time.
    pub waiting: bool,
}

/// Who leads after an election, or would.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Election {
    /// The broker.
    pub leader: BrokerId,
    /// Its epoch; of an election that was only asked about, the one that is.
    pub leader_epoch: LeaderEpoch,
    /// False when it led already.
    pub changed: bool,
    /// The revision of the partition's value that this is about.
    pub revision: u64,
    /// Of an unclean election: what each replica says that it holds.
    pub held: Vec<HeldReplica>,
    /// Of an unclean election: offsets that are known to have been committed and that the leader does not have.
    pub lost: Range<Offset>,
    /// Of an unclean election: the leader's log cannot be used and is deleted, and the partition goes on behind what the bucket has.
    pub discard: bool,
}

/// A replica as its broker tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldReplica {
    /// The broker.
    pub broker: BrokerId,
    /// Whether it was in sync.
    pub in_sync: bool,
    /// Whether it was eligible.
    pub eligible: bool,
    /// Whether its broker answered that its log holds no batch. What the bucket has of the partition is not counted.
    pub empty: bool,
    /// Its high watermark, its log end, and the epoch of its last batch if it has any; or why nothing is known.
    pub ends: Result<(Offset, Offset, Option<LeaderEpoch>), Fault>,
}

impl Admin {
    /// The cluster, its brokers, and what keeps partitions from being as they should.
    ///
    /// # Errors
    /// When no broker answers.
    pub async fn describe_cluster(&self) -> Result<ClusterDescription, CallError> {
        let call = |wire| async move { admin_client(wire).describe_cluster(v1::DescribeClusterRequest {}).await };
        let answer = self.client.retried(|| self.client.ask_any(call)).await?;
        let unreadable = answer.unreadable.into_iter().map(|v1::UnreadableKey { key, why }| UnreadableKey { key, why });
        Ok(ClusterDescription {
            name: answer.cluster,
            controller: answer.controller.map(BrokerId),
            brokers: answer.brokers.into_iter().map(broker).collect(),
            topics: answer.topics,
            partitions: answer.partitions,
            leaderless: answer.leaderless,
            under_replicated: answer.under_replicated,
            below_minimum: answer.below_minimum,
            moving: answer.moving,
            unreadable: unreadable.collect(),
            unavailable: answer.unavailable.into_iter().map(named).collect::<Result<_, _>>()?,
            metadata_silence: Duration::from_millis(answer.metadata_silence_ms),
            answered_by: BrokerId(answer.answered_by),
        })
    }

    /// Wants a broker empty: its leaderships and replicas move to others, and it is given nothing new.
    ///
    /// # Errors
    /// When the cluster has no such broker.
    pub async fn drain_broker(&self, broker: BrokerId) -> Result<Drain, CallError> {
        let request = v1::DrainBrokerRequest { broker: broker.0 };
        let call = |wire| async move { admin_client(wire).drain_broker(request).await };
        let answer = self.client.tell_any(call).await?;
        Ok(Drain {
            changed: answer.changed,
            since_ms: answer.since_ms,
            leaders: answer.leaders,
            replicas: answer.replicas,
            stuck: answer.stuck.into_iter().map(named).collect::<Result<_, _>>()?,
            takers: answer.takers,
            leaderless: answer.leaderless,
        })
    }

    /// Takes a drain back. False when there was none.
    ///
    /// # Errors
    /// When the cluster has no such broker.
    pub async fn restore_broker(&self, broker: BrokerId) -> Result<bool, CallError> {
        let request = v1::RestoreBrokerRequest { broker: broker.0 };
        let call = |wire| async move { admin_client(wire).restore_broker(request).await };
        Ok(self.client.tell_any(call).await?.changed)
    }

    /// Moves a partition to these brokers, the preferred leader first; without a partition every one of the topic, of which partition N
    /// gets the list rotated by N.
    ///
    /// # Errors
    /// When topic, partition or brokers are not known, a broker is named twice, or there are not as many as the topic's replicas.
    pub async fn reassign(
        &self,
        topic: &str,
        partition: Option<u32>,
        replicas: &[BrokerId],
    ) -> Result<Vec<Reassignment>, CallError> {
        let partition = partition.map(narrow);
        let call = |wire| {
            let replicas = replicas.iter().map(|id| id.0).collect();
            let request = v1::ReassignRequest { topic: topic.to_owned(), partition, replicas };
            async move { admin_client(wire).reassign(request).await }
        };
        let answer = self.client.tell_any(call).await?;
        answer.partitions.into_iter().map(reassignment).collect()
    }

    /// Moves that are under way, of every topic, of one, or of one partition.
    ///
    /// # Errors
    /// When topic or partition are not known.
    pub async fn reassignments(
        &self,
        topic: Option<&str>,
        partition: Option<u32>,
    ) -> Result<Vec<Reassignment>, CallError> {
        let (topic, partition) = (topic.unwrap_or_default(), partition.map(narrow));
        let call = |wire| {
            let request = v1::ListReassignmentsRequest { topic: topic.to_owned(), partition };
            async move { admin_client(wire).list_reassignments(request).await }
        };
        let answer = self.client.retried(|| self.client.ask_any(call)).await?;
        answer.partitions.into_iter().map(reassignment).collect()
    }

    /// Goes back to the replicas of before a move, of every topic, of one, or of one partition.
    ///
    /// # Errors
    /// When topic or partition are not known, nothing of them is being moved, or only new replicas are in sync.
    pub async fn cancel_reassignment(
        &self,
        topic: Option<&str>,
        partition: Option<u32>,
    ) -> Result<Vec<Reassignment>, CallError> {
        let (topic, partition) = (topic.unwrap_or_default(), partition.map(narrow));
        let call = |wire| {
            let request = v1::CancelReassignmentRequest { topic: topic.to_owned(), partition };
            async move { admin_client(wire).cancel_reassignment(request).await }
        };
        let answer = self.client.tell_any(call).await?;
        answer.partitions.into_iter().map(reassignment).collect()
    }

    /// Has the preferred replica lead; where nobody leads, the first that may without loss.
    ///
    /// # Errors
    /// When topic or partition are not known, or nobody can lead without loss.
    pub async fn elect_leader(&self, topic: &str, partition: u32) -> Result<Election, CallError> {
        self.elect(v1::ElectLeaderRequest {
            topic: topic.to_owned(),
            partition: narrow(partition),
            ..Default::default()
        })
        .await
    }

    /// Who would lead after an unclean election, and what would be lost. Changes nothing.
    ///
    /// # Errors
    /// When topic or partition are not known, somebody can lead without loss, or no replica answers.
    pub async fn unclean_election(&self, topic: &str, partition: u32) -> Result<Election, CallError> {
        self.elect(v1::ElectLeaderRequest {
            topic: topic.to_owned(),
            partition: narrow(partition),
            unclean: true,
            validate_only: true,
            ..Default::default()
        })
        .await
    }

    /// Has a replica lead that may lack committed records: the one that [`Admin::unclean_election`] named, and only if the partition is
    /// still as it was then.
    ///
    /// # Errors
    /// When it has changed since.
    pub async fn elect_unclean(&self, topic: &str, partition: u32, agreed: &Election) -> Result<Election, CallError> {
        self.elect(v1::ElectLeaderRequest {
            topic: topic.to_owned(),
            partition: narrow(partition),
            unclean: true,
            validate_only: false,
            to: Some(agreed.leader.0),
            revision: Some(agreed.revision),
            discard: agreed.discard,
        })
        .await
    }

    async fn elect(&self, request: v1::ElectLeaderRequest) -> Result<Election, CallError> {
        let call = |wire| {
            let request = request.clone();
            async move { admin_client(wire).elect_leader(request).await }
        };
        let answer = self.client.tell_any(call).await?;
        Ok(Election {
            leader: BrokerId(answer.leader),
            leader_epoch: LeaderEpoch::from_i32(answer.leader_epoch).unwrap_or_default(),
            changed: answer.changed,
            revision: answer.revision,
            held: answer.held.into_iter().map(held).collect::<Result<_, _>>()?,
            lost: offset(answer.lost_from)?..offset(answer.lost_to)?,
            discard: answer.discard,
        })
    }
}

/// A partition's number as it travels. One above every topic's is refused by the broker.
fn narrow(partition: u32) -> i32 {
    i32::try_from(partition).unwrap_or(i32::MAX)
}

fn broker(state: v1::BrokerState) -> BrokerDescription {
    let figures = match (state.figures, state.unanswered) {
        (Some(figures), _) => Some(Ok(BrokerFigures {
            segment_bytes: figures.segment_bytes,
            free_bytes: figures.free_bytes,
            tier_lag_records: figures.tier_lag_records,
            failed: Some(figures.failed).filter(|why| !why.is_empty()),
            object_store: Some(figures.object_store).filter(|why| !why.is_empty()),
            upkeep: Some(figures.upkeep).filter(|why| !why.is_empty()),
            impaired: figures.impaired,
            not_ready: Some(figures.not_ready).filter(|why| !why.is_empty()),
            future_timestamps: Some(figures.future_timestamps).filter(|text| !text.is_empty()),
            metadata_regressed: Some(figures.metadata_regressed).filter(|why| !why.is_empty()),
        })),
        (None, Some(error)) => Some(Err(Fault::from(error))),
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
        disk_full: state.disk_full,
        no_room: state.no_room,
        max_replicas: Some(state.max_replicas).filter(|max| *max > 0),
        stuck: state.stuck,
        draining_since_ms: state.draining_since_ms,
        leaders: state.leaders,
        replicas: state.replicas,
        in_sync: state.in_sync,
        figures,
    }
}

fn named(name: v1::PartitionName) -> Result<(String, u32), CallError> {
    let number = u32::try_from(name.partition).map_err(|_| odd("a negative partition"))?;
    Ok((name.topic, number))
}

fn reassignment(answer: v1::Reassignment) -> Result<Reassignment, CallError> {
    let (topic, partition) = named(answer.partition.ok_or_else(|| odd("a move of no partition"))?)?;
    Ok(Reassignment {
        topic,
        partition,
        replicas: brokers(answer.replicas),
        adding: brokers(answer.adding),
        removing: brokers(answer.removing),
        isr: brokers(answer.isr),
        leader: answer.leader.map(BrokerId),
        changed: answer.changed,
        waiting: answer.waiting,
    })
}

fn held(replica: v1::ReplicaState) -> Result<HeldReplica, CallError> {
    let ends = match replica.unanswered {
        Some(error) => Err(Fault::from(error)),
        None => {
            let last_epoch = replica.last_epoch.and_then(LeaderEpoch::from_i32);
            Ok((offset(replica.high_watermark)?, offset(replica.log_end)?, last_epoch))
        }
    };
    let (in_sync, eligible, empty) = (replica.in_sync, replica.eligible, replica.empty);
    Ok(HeldReplica { broker: BrokerId(replica.broker), in_sync, eligible, empty, ends })
}
