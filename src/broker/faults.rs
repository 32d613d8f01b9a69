//! The one mapping from errors of the inner modules to API errors.

mod orders;

use tonic::Status;

use crate::{
    cluster::{
        AddPartitionsError, AlterError, CreateError, DeleteError, ReplicaBound, StoreError, There, UnknownTopic,
    },
    model::{BrokerId, LeaderEpoch, Offset, TopicId, TopicName},
    partition::{AppendError, ReadError, Refused},
    proto::error::{ApiError, ErrorCode, from_transport},
    record::MalformedBatch,
};

/// Leader of a partition, for a client that contacted another broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leader {
    pub(super) broker: BrokerId,
    pub(super) epoch: LeaderEpoch,
    /// Address for clients; `None` while the leader is not registered.
    pub(super) address: Option<String>,
}

impl Leader {
    /// Returns the error with the leader in its details, as docs/errors.md specifies.
    pub(super) fn told(&self, fault: ApiError) -> ApiError {
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

/// Error for a topic or partition that this broker cannot serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum LookupError {
    /// Another topic has this name by now.
    #[error(
        "topic {topic:?} has id {id}, and {asked} is asked for: it was deleted and made again; read its metadata again"
    )]
    Replaced {
        topic: String,
        id: TopicId,
        /// Requested id.
        asked: TopicId,
    },
    /// The topic has fewer partitions.
    #[error("topic {topic:?} has no partition {partition}: it has {count}, numbered from 0")]
    UnknownPartition {
        topic: String,
        /// Requested partition number.
        partition: i32,
        /// Number of partitions of the topic.
        count: usize,
    },
    /// Another broker leads the partition, or the partition is not open here yet.
    #[error("this broker does not lead partition {partition} of topic {topic:?} at the moment: {}", instead(leader.as_ref()))]
    NotLeader {
        topic: String,
        partition: i32,
        /// Leader according to the metadata; `None` during an election.
        leader: Option<Leader>,
    },
    /// The local replica could not be opened.
    #[error("partition {partition} of topic {topic:?} cannot be served by this broker: {why}")]
    Unusable {
        topic: String,
        partition: i32,
        /// Error of the open.
        why: String,
    },
}

impl From<LookupError> for ApiError {
    fn from(error: LookupError) -> Self {
        let message = error.to_string();
        match error {
            LookupError::Replaced { topic, id, asked } => Self::new(ErrorCode::TopicIdMismatch, message)
                .with("topic", topic)
                .with("topic_id", id)
                .with("asked", asked),
            LookupError::UnknownPartition { topic, partition, count } => {
                Self::new(ErrorCode::UnknownPartition, message)
                    .with("topic", topic)
                    .with("partition", partition)
                    .with("partitions", count)
            }
            LookupError::NotLeader { topic, partition, leader } => {
                let fault = Self::new(ErrorCode::NotLeader, message).with("topic", topic).with("partition", partition);
                leader.map_or(fault.clone(), |leader| leader.told(fault))
            }
            LookupError::Unusable { topic, partition, .. } => {
                Self::new(ErrorCode::StorageFailed, message).with("topic", topic).with("partition", partition)
            }
        }
    }
}

impl From<AppendError> for ApiError {
    fn from(error: AppendError) -> Self {
        let message = error.to_string();
        match error {
            AppendError::Refused(refused) => match refused {
                Refused::TooLarge { bytes, most, .. } => {
                    Self::new(ErrorCode::RecordTooLarge, message).with("bytes", bytes).with("max", most)
                }
                Refused::StoreAway { .. } => Self::new(ErrorCode::ObjectStoreUnavailable, message),
                Refused::Grows { most, .. } => Self::new(ErrorCode::RecordTooLarge, message).with("max", most),
                Refused::NotEnoughReplicas { in_sync, needed } => {
                    Self::new(ErrorCode::NotEnoughReplicas, message).with("in_sync", in_sync).with("needed", needed)
                }
                Refused::OutOfOrder { producer, sent, expected } => Self::new(ErrorCode::OutOfOrderSequence, message)
                    .with("producer", producer)
                    .with("sent", sent)
                    .with("expected", expected),
                Refused::SequenceConflict { producer, sent, base } => Self::new(ErrorCode::OutOfOrderSequence, message)
                    .with("producer", producer)
                    .with("sent", sent)
                    .with("stored_at", base),
                Refused::Fenced { producer, current, .. } => {
                    Self::new(ErrorCode::ProducerFenced, message).with("producer", producer).with("current", current)
                }
                Refused::Timestamp { timestamp_ms, now_ms, setting, limit_ms, .. } => {
                    Self::new(ErrorCode::InvalidTimestamp, message)
                        .with("timestamp", timestamp_ms)
                        .with("now", now_ms)
                        .with("setting", setting)
                        .with("max", limit_ms)
                }
                Refused::TooManyProducers { known, max_bytes } => {
                    Self::new(ErrorCode::Overloaded, message).with("known", known).with("max", max_bytes)
                }
                Refused::UnknownProducer { producer, sent } => {
                    Self::new(ErrorCode::UnknownProducer, message).with("producer", producer).with("sent", sent)
                }
            },
            AppendError::DiskFull => Self::new(ErrorCode::DiskFull, message),
            AppendError::StorageFailed { .. } => Self::new(ErrorCode::StorageFailed, message),
            AppendError::NotLeader { .. } => Self::new(ErrorCode::NotLeader, message),
            AppendError::Deposed | AppendError::Closing => Self::new(ErrorCode::NotReady, message),
        }
    }
}

impl From<ReadError> for ApiError {
    fn from(error: ReadError) -> Self {
        let message = error.to_string();
        match error {
            ReadError::OutOfRange { offset, start, end } => Self::new(ErrorCode::OffsetOutOfRange, message)
                .with("offset", offset)
                .with("start", start)
                .with("end", end),
            ReadError::Closed => Self::new(ErrorCode::NotLeader, message),
            ReadError::Damaged { offset, .. } => Self::new(ErrorCode::DataDamaged, message).with("offset", offset),
            ReadError::BatchTooLarge { .. } => Self::new(ErrorCode::Overloaded, message),
            ReadError::Disk { .. } => Self::new(ErrorCode::StorageFailed, message),
            ReadError::ObjectStore { .. } => Self::new(ErrorCode::ObjectStoreUnavailable, message),
        }
    }
}

impl From<MalformedBatch> for ApiError {
    fn from(error: MalformedBatch) -> Self {
        let reason = match error {
            MalformedBatch::NoMemory { .. } => ErrorCode::RecordTooLarge,
            _ => ErrorCode::MalformedBatch,
        };
        Self::new(reason, error.to_string())
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let reason = match error {
            StoreError::Regressed(_) => ErrorCode::MetadataRegressed,
            _ => ErrorCode::MetadataUnavailable,
        };
        Self::new(reason, error.to_string())
    }
}

impl From<UnknownTopic> for ApiError {
    fn from(error: UnknownTopic) -> Self {
        let near: Vec<&str> = error.near.iter().map(TopicName::as_str).collect();
        Self::new(ErrorCode::UnknownTopic, error.to_string()).with("topic", &error.name).with("near", near.join(","))
    }
}

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> Self {
        let message = error.to_string();
        match error {
            CreateError::Exists { name } => Self::new(ErrorCode::TopicExists, message).with("topic", name),
            CreateError::Partitions { .. } | CreateError::Replicas { .. } | CreateError::TooManyTopics => {
                Self::new(ErrorCode::InvalidRequest, message)
            }
            CreateError::Brokers { asked, there } => too_few_brokers(message, asked, there),
            CreateError::Bound(bound) => above_bound(message, bound),
            CreateError::Config(_) => Self::new(ErrorCode::InvalidTopic, message),
            CreateError::Conflict { .. } => Self::new(ErrorCode::Conflict, message),
            CreateError::Store(error) => error.into(),
        }
    }
}

impl From<AlterError> for ApiError {
    fn from(error: AlterError) -> Self {
        let message = error.to_string();
        match error {
            AlterError::Unknown(unknown) => unknown.into(),
            AlterError::Config(_) | AlterError::Both { .. } => Self::new(ErrorCode::InvalidTopic, message),
            AlterError::Replicas { .. } => Self::new(ErrorCode::InvalidRequest, message),
            AlterError::Brokers { asked, there } => too_few_brokers(message, asked, there),
            AlterError::Bound(bound) => above_bound(message, bound),
            AlterError::Conflict { .. } => Self::new(ErrorCode::Conflict, message),
            AlterError::Store(error) => error.into(),
        }
    }
}

impl From<AddPartitionsError> for ApiError {
    fn from(error: AddPartitionsError) -> Self {
        let message = error.to_string();
        match error {
            AddPartitionsError::Unknown(unknown) => unknown.into(),
            AddPartitionsError::NotMore { .. } | AddPartitionsError::TooMany { .. } => {
                Self::new(ErrorCode::InvalidRequest, message)
            }
            AddPartitionsError::Brokers { asked, there } => too_few_brokers(message, asked, there),
            AddPartitionsError::Bound(bound) => above_bound(message, bound),
            AddPartitionsError::Conflict { .. } => Self::new(ErrorCode::Conflict, message),
            AddPartitionsError::Store(error) => error.into(),
        }
    }
}

impl From<DeleteError> for ApiError {
    fn from(error: DeleteError) -> Self {
        let message = error.to_string();
        match error {
            DeleteError::Unknown(unknown) => unknown.into(),
            DeleteError::Conflict { .. } => Self::new(ErrorCode::Conflict, message),
            DeleteError::Store(error) => error.into(),
        }
    }
}

/// Returns the error for more replicas than eligible brokers.
fn too_few_brokers(message: String, asked: u32, there: There) -> ApiError {
    ApiError::new(ErrorCode::InvalidRequest, message).with("replication_factor", asked).with("brokers", there.takers())
}

/// Returns the error for more replicas on a broker than its limit.
fn above_bound(message: String, bound: ReplicaBound) -> ApiError {
    ApiError::new(ErrorCode::NotPossible, message)
        .with("broker", bound.broker)
        .with("replicas", bound.replicas)
        .with("max", bound.max)
        .with("setting", "broker.max_replicas")
}

/// Returns the status for a stream whose requests cannot be read any further, with a stable error code if the transport rejected a request.
pub(super) fn unreadable(status: Status) -> Status {
    from_transport(&status, "").map_or(status, Status::from)
}

/// Returns the error for an invalid request.
pub(super) fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::InvalidRequest, message)
}

/// Parses the topic id of a request. Returns `None` if the request has none.
pub(super) fn topic_id(text: &str) -> Result<Option<TopicId>, ApiError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        let shown: String = text.chars().take(100).collect();
        invalid(format!("topic_id {shown:?} is no topic id: use the one in the metadata"))
    })
}

/// Parses an offset of a request.
pub(super) fn offset(value: i64) -> Result<Offset, ApiError> {
    Offset::from_i64(value).ok_or_else(|| invalid(format!("offset {value} is negative")))
}
