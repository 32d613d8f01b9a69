//! The one place that maps errors of the inner rooms to what travels.

mod orders;

use tonic::Status;

use crate::{
    cluster::{
        AddPartitionsError, AlterError, CreateError, DeleteError, ReplicaBound, StoreError, There, UnknownTopic,
    },
    model::{BrokerId, LeaderEpoch, Offset, TopicId, TopicName},
    partition::{AppendError, ReadError, Refused},
    proto::fault::{self, Fault, Reason},
    record::Malformed,
};

/// Who leads a partition, for whoever asked somebody else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leader {
    /// The broker.
    pub(super) broker: BrokerId,
    /// The epoch that it leads in.
    pub(super) epoch: LeaderEpoch,
    /// Where clients reach it; `None` while it is not registered.
    pub(super) address: Option<String>,
}

impl Leader {
    /// The fault with the leader in its details, as docs/errors.md says.
    pub(super) fn told(&self, fault: Fault) -> Fault {
        let fault = fault.with("leader", self.broker).with("leader_epoch", self.epoch);
        match &self.address {
            Some(address) => fault.with("address", address),
            None => fault,
        }
    }
}

fn instead(leader: Option<&Leader>) -> String {
    match leader {
        Some(Leader { broker, address: Some(address), .. }) => format!("broker {broker} at {address} does"),
        Some(Leader { broker, address: None, .. }) => {
            format!("broker {broker} does, and is gone; try again, another one will take over")
        }
        None => "nobody does; ask for metadata and try again".to_owned(),
    }
}

/// Topic or partition names that this broker cannot serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum LookupError {
    /// Another topic has the name by now.
    #[error(
        "topic {topic:?} has id {id}, and {asked} is asked for: it was deleted and made again; read its metadata again"
    )]
    Replaced {
        /// The topic.
        topic: String,
        /// Its id.
        id: TopicId,
        /// The id asked for.
        asked: TopicId,
    },
    /// The topic has fewer partitions.
    #[error("topic {topic:?} has no partition {partition}: it has {count}, numbered from 0")]
    UnknownPartition {
        /// The topic.
        topic: String,
        /// What was asked for.
        partition: i32,
        /// How many it has.
        count: usize,
    },
    /// The partition is led elsewhere, or not open here yet.
    #[error("this broker does not lead partition {partition} of topic {topic:?} at the moment: {}", instead(leader.as_ref()))]
    NotLeader {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// Who does, by the metadata; nobody at the moment of an election.
        leader: Option<Leader>,
    },
    /// The replica here could not be opened.
    #[error("partition {partition} of topic {topic:?} cannot be served by this broker: {why}")]
    Unusable {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// What is wrong with it.
        why: String,
    },
}

impl From<LookupError> for Fault {
    fn from(error: LookupError) -> Self {
        let message = error.to_string();
        match error {
            LookupError::Replaced { topic, id, asked } => Self::new(Reason::TopicIdMismatch, message)
                .with("topic", topic)
                .with("topic_id", id)
                .with("asked", asked),
            LookupError::UnknownPartition { topic, partition, count } => Self::new(Reason::UnknownPartition, message)
                .with("topic", topic)
                .with("partition", partition)
                .with("partitions", count),
            LookupError::NotLeader { topic, partition, leader } => {
                let fault = Self::new(Reason::NotLeader, message).with("topic", topic).with("partition", partition);
                leader.map_or(fault.clone(), |leader| leader.told(fault))
            }
            LookupError::Unusable { topic, partition, .. } => {
                Self::new(Reason::StorageFailed, message).with("topic", topic).with("partition", partition)
            }
        }
    }
}

impl From<AppendError> for Fault {
    fn from(error: AppendError) -> Self {
        let message = error.to_string();
        match error {
            AppendError::Refused(refused) => match refused {
                Refused::TooLarge { bytes, most, .. } => {
                    Self::new(Reason::RecordTooLarge, message).with("bytes", bytes).with("max", most)
                }
                Refused::StoreAway { .. } => Self::new(Reason::ObjectStoreUnavailable, message),
                Refused::Grows { most, .. } => Self::new(Reason::RecordTooLarge, message).with("max", most),
                Refused::NotEnoughReplicas { in_sync, needed } => {
                    Self::new(Reason::NotEnoughReplicas, message).with("in_sync", in_sync).with("needed", needed)
                }
                Refused::OutOfOrder { producer, sent, expected } => Self::new(Reason::OutOfOrderSequence, message)
                    .with("producer", producer)
                    .with("sent", sent)
                    .with("expected", expected),
                Refused::SequenceConflict { producer, sent, base } => Self::new(Reason::OutOfOrderSequence, message)
                    .with("producer", producer)
                    .with("sent", sent)
                    .with("stored_at", base),
                Refused::Fenced { producer, current, .. } => {
                    Self::new(Reason::ProducerFenced, message).with("producer", producer).with("current", current)
                }
                Refused::Timestamp { timestamp_ms, now_ms, setting, limit_ms, .. } => {
                    Self::new(Reason::InvalidTimestamp, message)
                        .with("timestamp", timestamp_ms)
                        .with("now", now_ms)
                        .with("setting", setting)
                        .with("max", limit_ms)
                }
                Refused::TooManyProducers { known, max_bytes } => {
                    Self::new(Reason::Overloaded, message).with("known", known).with("max", max_bytes)
                }
                Refused::UnknownProducer { producer, sent } => {
                    Self::new(Reason::UnknownProducer, message).with("producer", producer).with("sent", sent)
                }
            },
            AppendError::DiskFull => Self::new(Reason::DiskFull, message),
            AppendError::StorageFailed { .. } => Self::new(Reason::StorageFailed, message),
            AppendError::NotLeader { .. } => Self::new(Reason::NotLeader, message),
            AppendError::Deposed | AppendError::Closing => Self::new(Reason::NotReady, message),
        }
    }
}

impl From<ReadError> for Fault {
    fn from(error: ReadError) -> Self {
        let message = error.to_string();
        match error {
            ReadError::OutOfRange { offset, start, end } => Self::new(Reason::OffsetOutOfRange, message)
                .with("offset", offset)
                .with("start", start)
                .with("end", end),
            ReadError::Closed => Self::new(Reason::NotLeader, message),
            ReadError::Damaged { offset, .. } => Self::new(Reason::DataDamaged, message).with("offset", offset),
            ReadError::BatchTooLarge { .. } => Self::new(Reason::Overloaded, message),
            ReadError::Disk { .. } => Self::new(Reason::StorageFailed, message),
            ReadError::ObjectStore { .. } => Self::new(Reason::ObjectStoreUnavailable, message),
        }
    }
}

impl From<Malformed> for Fault {
    fn from(error: Malformed) -> Self {
        let reason = match error {
            Malformed::NoMemory { .. } => Reason::RecordTooLarge,
            _ => Reason::MalformedBatch,
        };
        Self::new(reason, error.to_string())
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        let reason = match error {
            StoreError::Regressed(_) => Reason::MetadataRegressed,
            _ => Reason::MetadataUnavailable,
        };
        Self::new(reason, error.to_string())
    }
}

impl From<UnknownTopic> for Fault {
    fn from(error: UnknownTopic) -> Self {
        let near: Vec<&str> = error.near.iter().map(TopicName::as_str).collect();
        Self::new(Reason::UnknownTopic, error.to_string()).with("topic", &error.name).with("near", near.join(","))
    }
}

impl From<CreateError> for Fault {
    fn from(error: CreateError) -> Self {
        let message = error.to_string();
        match error {
            CreateError::Exists { name } => Self::new(Reason::TopicExists, message).with("topic", name),
            CreateError::Partitions { .. } | CreateError::Replicas { .. } | CreateError::TooManyTopics => {
                Self::new(Reason::InvalidRequest, message)
            }
            CreateError::Brokers { asked, there } => too_few_brokers(message, asked, there),
            CreateError::Bound(bound) => above_bound(message, bound),
            CreateError::Config(_) => Self::new(Reason::InvalidTopic, message),
            CreateError::Conflict { .. } => Self::new(Reason::Conflict, message),
            CreateError::Store(error) => error.into(),
        }
    }
}

impl From<AlterError> for Fault {
    fn from(error: AlterError) -> Self {
        let message = error.to_string();
        match error {
            AlterError::Unknown(unknown) => unknown.into(),
            AlterError::Config(_) | AlterError::Both { .. } => Self::new(Reason::InvalidTopic, message),
            AlterError::Replicas { .. } => Self::new(Reason::InvalidRequest, message),
            AlterError::Brokers { asked, there } => too_few_brokers(message, asked, there),
            AlterError::Bound(bound) => above_bound(message, bound),
            AlterError::Conflict { .. } => Self::new(Reason::Conflict, message),
            AlterError::Store(error) => error.into(),
        }
    }
}

impl From<AddPartitionsError> for Fault {
    fn from(error: AddPartitionsError) -> Self {
        let message = error.to_string();
        match error {
            AddPartitionsError::Unknown(unknown) => unknown.into(),
            AddPartitionsError::NotMore { .. } | AddPartitionsError::TooMany { .. } => {
                Self::new(Reason::InvalidRequest, message)
            }
            AddPartitionsError::Brokers { asked, there } => too_few_brokers(message, asked, there),
            AddPartitionsError::Bound(bound) => above_bound(message, bound),
            AddPartitionsError::Conflict { .. } => Self::new(Reason::Conflict, message),
            AddPartitionsError::Store(error) => error.into(),
        }
    }
}

impl From<DeleteError> for Fault {
    fn from(error: DeleteError) -> Self {
        let message = error.to_string();
        match error {
            DeleteError::Unknown(unknown) => unknown.into(),
            DeleteError::Conflict { .. } => Self::new(Reason::Conflict, message),
            DeleteError::Store(error) => error.into(),
        }
    }
}

/// More replicas than brokers that take any.
fn too_few_brokers(message: String, asked: u32, there: There) -> Fault {
    Fault::new(Reason::InvalidRequest, message).with("replication_factor", asked).with("brokers", there.takers())
}

/// More replicas on a broker than it takes.
fn above_bound(message: String, bound: ReplicaBound) -> Fault {
    Fault::new(Reason::NotPossible, message)
        .with("broker", bound.broker)
        .with("replicas", bound.replicas)
        .with("max", bound.max)
        .with("setting", "broker.max_replicas")
}

/// Why no more requests of a stream can be read, with a stable word where the transport refused one.
pub(super) fn unreadable(status: Status) -> Status {
    fault::of_transport(&status, "").map_or(status, Status::from)
}

/// A request that cannot mean anything.
pub(super) fn invalid(message: impl Into<String>) -> Fault {
    Fault::new(Reason::InvalidRequest, message)
}

/// The topic id of a request; `None` where it names none.
pub(super) fn topic_id(text: &str) -> Result<Option<TopicId>, Fault> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        let shown: String = text.chars().take(100).collect();
        invalid(format!("topic_id {shown:?} is no topic id: use the one in the metadata"))
    })
}

/// An offset of a request.
pub(super) fn offset(value: i64) -> Result<Offset, Fault> {
    Offset::from_i64(value).ok_or_else(|| invalid(format!("offset {value} is negative")))
}
