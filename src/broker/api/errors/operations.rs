//! The part of the mapping to API errors for errors of admin operations.

use crate::{
    cluster::{
        CancelError, DrainError, ElectError, ReassignError, TargetError, UnknownBrokers, UnknownPartition, WriteError,
    },
    model::BrokerId,
    proto::error::{ApiError, ErrorCode},
};

/// Returns the ids as comma-separated text for an error detail.
fn join_ids(ids: &[BrokerId]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

impl From<UnknownBrokers> for ApiError {
    fn from(error: UnknownBrokers) -> Self {
        let message = error.to_string();
        Self::new(ErrorCode::UnknownBroker, message)
            .with("brokers", join_ids(&error.ids))
            .with("known_brokers", join_ids(&error.known))
    }
}

impl From<UnknownPartition> for ApiError {
    fn from(error: UnknownPartition) -> Self {
        Self::new(ErrorCode::UnknownPartition, error.to_string())
            .with("topic", error.topic)
            .with("partition", error.number)
            .with("partitions", error.count)
    }
}

impl From<TargetError> for ApiError {
    fn from(error: TargetError) -> Self {
        match error {
            TargetError::Topic(unknown) => unknown.into(),
            TargetError::Partition(unknown) => unknown.into(),
        }
    }
}

impl From<WriteError> for ApiError {
    fn from(error: WriteError) -> Self {
        let message = error.to_string();
        match error {
            WriteError::Unreadable { .. } => Self::new(ErrorCode::FailedPrecondition, message),
            WriteError::Conflict { .. } => Self::new(ErrorCode::Conflict, message),
            WriteError::Store { source, .. } => Self { message, ..source.into() },
        }
    }
}

impl From<DrainError> for ApiError {
    fn from(error: DrainError) -> Self {
        match error {
            DrainError::Unknown(unknown) => unknown.into(),
            DrainError::Store(error) => error.into(),
        }
    }
}

impl From<ReassignError> for ApiError {
    fn from(error: ReassignError) -> Self {
        let message = error.to_string();
        match error {
            ReassignError::Unknown(unknown) => unknown.into(),
            ReassignError::Brokers(unknown) => unknown.into(),
            ReassignError::Repeated { id } => Self::new(ErrorCode::InvalidRequest, message).with("broker", id),
            ReassignError::WrongBrokerCount { factor, requested, .. } => Self::new(ErrorCode::InvalidRequest, message)
                .with("replication_factor", factor)
                .with("brokers", requested),
            ReassignError::Offline { ids, .. }
            | ReassignError::Draining { ids }
            | ReassignError::DiskPressure { ids, .. }
            | ReassignError::Unreachable { ids, .. } => {
                Self::new(ErrorCode::FailedPrecondition, message).with("brokers", join_ids(&ids))
            }
            ReassignError::ReplicaLimit(error) => super::replica_limit_error(message, error),
            ReassignError::Write(error) => error.into(),
        }
    }
}

impl From<CancelError> for ApiError {
    fn from(error: CancelError) -> Self {
        let message = error.to_string();
        match error {
            CancelError::Unknown(unknown) => unknown.into(),
            CancelError::NotReassigning { .. } => Self::new(ErrorCode::NoReassignmentInProgress, message),
            CancelError::NoEarlierReplicaInSync { .. } => Self::new(ErrorCode::FailedPrecondition, message),
            CancelError::Write(error) => error.into(),
        }
    }
}

impl From<ElectError> for ApiError {
    fn from(error: ElectError) -> Self {
        let message = error.to_string();
        match error {
            ElectError::Unknown(unknown) => unknown.into(),
            ElectError::PreferredNotEligible { .. }
            | ElectError::HasLeader { .. }
            | ElectError::CleanPossible { .. }
            | ElectError::NotLiveReplica { .. } => Self::new(ErrorCode::FailedPrecondition, message),
            ElectError::NoCandidate { waited_for, .. } => {
                Self::new(ErrorCode::NoLeader, message).with("waited_for", join_ids(&waited_for))
            }
            ElectError::NoResponse { replicas, .. } => {
                Self::new(ErrorCode::NoLeader, message).with("waited_for", join_ids(&replicas))
            }
            ElectError::Changed { .. } | ElectError::LogUnusable { .. } => Self::new(ErrorCode::Conflict, message),
            ElectError::Write(error) => error.into(),
        }
    }
}
