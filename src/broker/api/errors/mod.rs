//! The mapping from errors of `cluster`, `partition` and `record` to API errors.

mod operations;

use tonic::Status;

use crate::{
    cluster::{
        AddPartitionsError, AlterError, BrokerCounts, CreateError, DeleteError, MetaStoreError, ReplicaLimitExceeded,
        UnknownTopic,
    },
    model::{Offset, TopicId},
    partition::{AdmitError, AppendError, ReadError},
    proto::error::{ApiError, ErrorCode, from_transport},
    record::MalformedBatch,
};

impl From<AppendError> for ApiError {
    fn from(error: AppendError) -> Self {
        let message = error.to_string();
        match error {
            AppendError::Refused(refused) => match refused {
                AdmitError::TooLarge { bytes, max_bytes, .. } => {
                    Self::new(ErrorCode::RecordTooLarge, message).with("bytes", bytes).with("max", max_bytes)
                }
                AdmitError::StoreUnavailable { .. } => Self::new(ErrorCode::ObjectStoreUnavailable, message),
                AdmitError::Grows { max_bytes, .. } => {
                    Self::new(ErrorCode::RecordTooLarge, message).with("max", max_bytes)
                }
                AdmitError::NotEnoughReplicas { in_sync, needed } => {
                    Self::new(ErrorCode::NotEnoughReplicas, message).with("in_sync", in_sync).with("needed", needed)
                }
                AdmitError::OutOfOrder { producer, sent, expected } => {
                    Self::new(ErrorCode::OutOfOrderSequence, message)
                        .with("producer", producer)
                        .with("sent", sent)
                        .with("expected", expected)
                }
                AdmitError::SequenceConflict { producer, sent, base } => {
                    Self::new(ErrorCode::OutOfOrderSequence, message)
                        .with("producer", producer)
                        .with("sent", sent)
                        .with("stored_at", base)
                }
                AdmitError::Fenced { producer, current, .. } => {
                    Self::new(ErrorCode::ProducerFenced, message).with("producer", producer).with("current", current)
                }
                AdmitError::Timestamp { timestamp_ms, now_ms, setting, limit_ms, .. } => {
                    Self::new(ErrorCode::InvalidTimestamp, message)
                        .with("timestamp", timestamp_ms)
                        .with("now", now_ms)
                        .with("setting", setting)
                        .with("max", limit_ms)
                }
                AdmitError::TooManyProducers { known, max_bytes } => {
                    Self::new(ErrorCode::Overloaded, message).with("producers", known).with("max", max_bytes)
                }
                AdmitError::UnknownProducer { producer, sent } => {
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
            ReadError::Corrupt { offset, .. } => Self::new(ErrorCode::DataCorrupt, message).with("offset", offset),
            ReadError::BatchTooLarge { .. } => Self::new(ErrorCode::Overloaded, message),
            ReadError::Disk { .. } => Self::new(ErrorCode::StorageFailed, message),
            ReadError::ObjectStore { .. } => Self::new(ErrorCode::ObjectStoreUnavailable, message),
        }
    }
}

/// Converts the error of a malformed batch. This is no `From` impl, because both types belong to other packages.
pub(super) fn malformed_batch_error(error: MalformedBatch) -> ApiError {
    let code = match error {
        MalformedBatch::NoMemory { .. } => ErrorCode::RecordTooLarge,
        _ => ErrorCode::MalformedBatch,
    };
    ApiError::new(code, error.to_string())
}

impl From<MetaStoreError> for ApiError {
    fn from(error: MetaStoreError) -> Self {
        let code = match error {
            MetaStoreError::Regressed(_) => ErrorCode::MetadataRegressed,
            _ => ErrorCode::MetadataUnavailable,
        };
        Self::new(code, error.to_string())
    }
}

impl From<UnknownTopic> for ApiError {
    fn from(error: UnknownTopic) -> Self {
        Self::new(ErrorCode::UnknownTopic, error.to_string()).with("topic", &error.name)
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
            CreateError::Brokers { requested, counts } => too_few_brokers_error(message, requested, counts),
            CreateError::ReplicaLimit(error) => replica_limit_error(message, error),
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
            AlterError::Config(_) | AlterError::SetAndUnset { .. } => Self::new(ErrorCode::InvalidTopic, message),
            AlterError::Replicas { .. } => Self::new(ErrorCode::InvalidRequest, message),
            AlterError::Brokers { requested, counts } => too_few_brokers_error(message, requested, counts),
            AlterError::ReplicaLimit(error) => replica_limit_error(message, error),
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
            AddPartitionsError::NotAnIncrease { .. } | AddPartitionsError::TooMany { .. } => {
                Self::new(ErrorCode::InvalidRequest, message)
            }
            AddPartitionsError::Brokers { requested, counts } => too_few_brokers_error(message, requested, counts),
            AddPartitionsError::ReplicaLimit(error) => replica_limit_error(message, error),
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

/// Returns the error for a topic with more replicas than eligible brokers.
fn too_few_brokers_error(message: String, requested: u32, counts: BrokerCounts) -> ApiError {
    ApiError::new(ErrorCode::InvalidRequest, message)
        .with("replication_factor", requested)
        .with("brokers", counts.eligible_brokers())
}

/// Returns the API error for a broker that would exceed its replica limit.
fn replica_limit_error(message: String, error: ReplicaLimitExceeded) -> ApiError {
    ApiError::new(ErrorCode::FailedPrecondition, message)
        .with("broker", error.broker)
        .with("replicas", error.replicas)
        .with("max", error.max)
        .with("setting", "broker.max_replicas")
}

/// Returns the status that ends a call whose stream of requests failed with `status`. If the transport rejected a
/// request, the returned status has a stable error code; else it is `status`.
pub(super) fn request_stream_error(status: Status) -> Status {
    from_transport(&status, "").map_or(status, Status::from)
}

/// Returns an `INVALID_REQUEST` error.
pub(super) fn invalid_request(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::InvalidRequest, message)
}

/// Parses the topic id of a request. Returns `None` if the request has none.
pub(super) fn parse_topic_id(text: &str) -> Result<Option<TopicId>, ApiError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        let shown: String = text.chars().take(100).collect();
        invalid_request(format!("topic_id {shown:?} is not a topic id: use the id in the metadata"))
    })
}

/// Parses an offset of a request, which must not be negative.
pub(super) fn parse_offset(value: i64) -> Result<Offset, ApiError> {
    Offset::from_i64(value).ok_or_else(|| invalid_request(format!("offset {value} is negative: use 0 or more")))
}
