//! Events that the producer's child tasks send to its task.

use super::{super::error::CallError, in_flight::ProducerIdAndEpoch};
use crate::proto::{error::ApiError, v1};

/// Event from a child task to the producer's task.
pub(super) enum DriverEvent {
    /// A broker sent a response, or a notice before a response.
    Response { stream: u64, response: v1::ProduceResponse },
    /// A stream ended. `delivered` is true if the broker may have received the batches that were sent on it.
    StreamEnded { stream: u64, delivered: bool, error: ApiError },
    /// A metadata refresh ended.
    MetadataRefreshed(Result<(), CallError>),
    /// A request for a new producer id, made for one queue, ended.
    ProducerIdReceived { queue: usize, result: Result<ProducerIdAndEpoch, CallError> },
}
