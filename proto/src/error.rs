//! API errors: a stable code, a message and named details.
//!
//! A failed call carries an [`ApiError`] as `google.rpc.Status` with `ErrorInfo`. A failed part of a response carries
//! the [`ApiError`] as [`v1::Error`]. A client handles both forms in the same way: they have the same content, except
//! that `retryable` of a failed call follows from the code.

use std::{collections::HashMap, fmt};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::v1;

/// `ErrorInfo` domain of all codes.
pub const DOMAIN: &str = "strandline";

macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $code:ident, $retryable:literal;)*) => {
        /// Cause of a failed request. The names are stable, so that programs can compare them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorCode { $($(#[$doc])* $name),* }

        impl ErrorCode {
            /// All codes.
            pub const ALL: &'static [ErrorCode] = &[$(Self::$name),*];

            /// Returns the name of the code, as responses contain it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }

            /// Returns the gRPC status code of a failed call.
            pub const fn grpc_code(self) -> Code {
                match self { $(Self::$name => Code::$code),* }
            }

            /// Returns true if the same request can succeed later.
            pub const fn retryable(self) -> bool {
                match self { $(Self::$name => $retryable),* }
            }
        }
    };
}

error_codes! {
    /// A field of the request is missing or invalid.
    InvalidRequest = "INVALID_REQUEST", InvalidArgument, false;
    /// The topic does not exist.
    UnknownTopic = "UNKNOWN_TOPIC", NotFound, false;
    /// The topic has another id: it was deleted and created again.
    TopicIdMismatch = "TOPIC_ID_MISMATCH", FailedPrecondition, false;
    /// The topic has no partition with this number.
    UnknownPartition = "UNKNOWN_PARTITION", NotFound, false;
    /// A topic with this name exists.
    TopicExists = "TOPIC_EXISTS", AlreadyExists, false;
    /// A topic name, configuration key or configuration value is invalid.
    InvalidTopic = "INVALID_TOPIC", InvalidArgument, false;
    /// This broker does not lead the partition, or does not have the leader epoch in the request. The metadata has the
    /// leader.
    NotLeader = "NOT_LEADER", Unavailable, true;
    /// No broker that can lead the partition without loss is available. The message names these brokers, if any.
    NoLeader = "NO_LEADER", Unavailable, true;
    /// The cluster has no broker with this id.
    UnknownBroker = "UNKNOWN_BROKER", NotFound, false;
    /// The partition is not being reassigned.
    NoReassignmentInProgress = "NO_REASSIGNMENT_IN_PROGRESS", FailedPrecondition, false;
    /// The state of the cluster does not allow the operation, or the operation would change nothing.
    FailedPrecondition = "FAILED_PRECONDITION", FailedPrecondition, false;
    /// The offset is outside `log_start..=high_watermark`.
    OffsetOutOfRange = "OFFSET_OUT_OF_RANGE", OutOfRange, false;
    /// The batch is larger than `max.message.bytes`.
    RecordTooLarge = "RECORD_TOO_LARGE", InvalidArgument, false;
    /// A timestamp differs from the clock of the broker by more than the topic allows.
    InvalidTimestamp = "INVALID_TIMESTAMP", InvalidArgument, false;
    /// The bytes are not a batch, or the batch is corrupt.
    MalformedBatch = "MALFORMED_BATCH", InvalidArgument, false;
    /// The request is larger than the maximum.
    RequestTooLarge = "REQUEST_TOO_LARGE", ResourceExhausted, false;
    /// The broker has no method with this name.
    UnknownMethod = "UNKNOWN_METHOD", Unimplemented, false;
    /// The request uses gRPC compression, which the broker does not support.
    UnsupportedEncoding = "UNSUPPORTED_ENCODING", Unimplemented, false;
    /// The sequence is not the idempotent producer's next one, and the batch is not the retry of a stored batch.
    OutOfOrderSequence = "OUT_OF_ORDER_SEQUENCE", FailedPrecondition, false;
    /// The same producer has written with a newer epoch.
    ProducerFenced = "PRODUCER_FENCED", FailedPrecondition, false;
    /// The partition has no state of this idempotent producer, or the cluster never assigned its id.
    UnknownProducer = "UNKNOWN_PRODUCER", FailedPrecondition, false;
    /// Fewer replicas are in sync than `min.insync.replicas`.
    NotEnoughReplicas = "NOT_ENOUGH_REPLICAS", Unavailable, true;
    /// The acknowledgement did not arrive within the timeout, and the write may have happened. Or a read from the disk
    /// took too long.
    Timeout = "TIMEOUT", DeadlineExceeded, true;
    /// The broker has reached a limit. Send less, or retry later.
    Overloaded = "OVERLOADED", ResourceExhausted, true;
    /// The disk is full. Appends succeed again when the disk has free space.
    DiskFull = "DISK_FULL", ResourceExhausted, true;
    /// A write to the disk of this broker failed, and the broker accepts no more writes to the partition. Or the broker
    /// could not open the replica or read from its disk.
    StorageFailed = "STORAGE_FAILED", Unavailable, true;
    /// Stored data fails its checks and is not served; or, with `decode`, the records of a batch cannot be decoded. The
    /// message names the offsets.
    DataCorrupt = "DATA_CORRUPT", DataLoss, false;
    /// The object store did not respond, or with an error.
    ObjectStoreUnavailable = "OBJECT_STORE_UNAVAILABLE", Unavailable, true;
    /// The metadata store did not respond, or with an error.
    MetadataUnavailable = "METADATA_UNAVAILABLE", Unavailable, true;
    /// The metadata store has an older revision, or it is another store. An operator must act and restart the broker.
    MetadataRegressed = "METADATA_REGRESSED", FailedPrecondition, false;
    /// A concurrent request changed the same state.
    Conflict = "CONFLICT", Aborted, true;
    /// The broker is stopping or not ready yet, or the epoch of a new leader is not committed yet.
    NotReady = "NOT_READY", Unavailable, true;
    /// A bug, or a response that this version cannot interpret.
    Internal = "INTERNAL", Internal, false;
}

impl ErrorCode {
    /// Returns the code with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str() == name)
    }
}

/// Error of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// Stable code.
    pub code: ErrorCode,
    /// Message for people: what is wrong, with the value, and what to do.
    pub message: String,
    /// Named details.
    pub metadata: HashMap<String, String>,
    /// True if the same request can succeed later.
    pub retryable: bool,
}

/// Maximum length of a message, without the `…` that marks a truncated one. A message can repeat bytes of a request,
/// and in an HTTP/2 header messages and details take several times their length.
const MAX_MESSAGE_BYTES: usize = 4 << 10;

/// Maximum length of a detail, without the `…` that marks a truncated one.
const MAX_DETAIL_BYTES: usize = 1 << 10;

/// Truncates a text that is longer than `max_bytes` to at most that length, and then appends `…`.
fn truncate(mut text: String, max_bytes: usize) -> String {
    if text.len() > max_bytes {
        text.truncate(text.floor_char_boundary(max_bytes));
        text.push('…');
    }
    text
}

impl ApiError {
    /// Creates an error with this code.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let message = truncate(message.into(), MAX_MESSAGE_BYTES);
        Self { code, message, metadata: HashMap::new(), retryable: code.retryable() }
    }

    /// Adds a detail.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.metadata.insert(name.to_owned(), truncate(value.to_string(), MAX_DETAIL_BYTES));
        self
    }

    /// Returns a detail as a number; `None` if the error has no such detail or the detail is no number.
    pub fn number(&self, name: &str) -> Option<i64> {
        self.metadata.get(name)?.parse().ok()
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let details = ErrorDetails::with_error_info(error.code.as_str(), DOMAIN, error.metadata);
        Self::with_error_details(error.code.grpc_code(), error.message, details)
    }
}

impl From<&Status> for ApiError {
    /// Converts the status of a failed call. A status without a known [`ErrorCode`] comes from the transport, from a
    /// proxy or from a newer broker. Only its gRPC code then determines whether the call can be retried.
    fn from(status: &Status) -> Self {
        if let Some(info) = status.get_details_error_info()
            && let Some(code) = ErrorCode::from_name(&info.reason)
        {
            let retryable = code.retryable();
            return Self { code, message: status.message().to_owned(), metadata: info.metadata, retryable };
        }
        let code = match status.code() {
            Code::Unavailable | Code::Cancelled | Code::Aborted => ErrorCode::NotReady,
            Code::DeadlineExceeded => ErrorCode::Timeout,
            Code::ResourceExhausted => ErrorCode::Overloaded,
            Code::InvalidArgument | Code::OutOfRange | Code::NotFound => ErrorCode::InvalidRequest,
            // No broker returns this code for a method that the broker has. Often the response is the 404 of another
            // HTTP server.
            Code::Unimplemented => {
                let message = format!(
                    "the server is not a Strandline broker, or its version does not have this method ({})",
                    status.message()
                );
                return Self::new(ErrorCode::Internal, message);
            }
            _ => ErrorCode::Internal,
        };
        Self::new(code, format!("{}: {}", status.code().description(), status.message()))
    }
}

/// Returns true if a broker created the status, and neither the transport nor a proxy.
pub fn is_broker_status(status: &Status) -> bool {
    status.get_details_error_info().is_some_and(|info| info.domain == DOMAIN)
}

/// Converts a status that the gRPC library created because no service has the method, or because the library could not
/// read the request. Such a status has no [`ErrorCode`]. Returns `None` for every other status. `path` is the path of
/// the call, `/package.Service/Method`.
pub fn from_transport(status: &Status, path: &str) -> Option<ApiError> {
    if !status.details().is_empty() {
        return None;
    }
    let message = status.message();
    Some(match status.code() {
        Code::OutOfRange => {
            let message =
                format!("the request is larger than the maximum of a message: send less in one request ({message})");
            ApiError::new(ErrorCode::RequestTooLarge, message)
        }
        Code::Internal => ApiError::new(ErrorCode::InvalidRequest, format!("the request cannot be decoded: {message}")),
        Code::Unimplemented if message.contains("compress") => {
            let message = format!("gRPC compression is not supported: compress the batches instead ({message})");
            ApiError::new(ErrorCode::UnsupportedEncoding, message)
        }
        Code::Unimplemented => {
            let path: String = path.chars().take(200).collect();
            let message = format!(
                "this broker (version {}) has no method {path}: compare with proto/strandline/v1",
                env!("CARGO_PKG_VERSION")
            );
            ApiError::new(ErrorCode::UnknownMethod, message).with("method", path)
        }
        _ => return None,
    })
}

impl From<ApiError> for v1::Error {
    fn from(error: ApiError) -> Self {
        Self {
            reason: error.code.as_str().to_owned(),
            message: error.message,
            retryable: error.retryable,
            metadata: error.metadata,
        }
    }
}

impl From<v1::Error> for ApiError {
    fn from(error: v1::Error) -> Self {
        // The error of a newer broker with an unknown code keeps `retryable` and its message.
        let code = ErrorCode::from_name(&error.reason).unwrap_or(ErrorCode::Internal);
        Self { code, message: error.message, metadata: error.metadata, retryable: error.retryable }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    /// Regression: the error for a name of 2 MB took 36 MB of HTTP/2 headers, which were kept until the client read
    /// them.
    #[test]
    fn message_and_details_of_an_error_are_truncated() {
        let name = "é\u{7f}".repeat(1 << 20);
        let error =
            ApiError::new(ErrorCode::InvalidRequest, format!("topic {name:?} is named twice")).with("topic", &name);
        let max = MAX_MESSAGE_BYTES + "…".len();
        assert!(error.message.starts_with("topic \"é") && error.message.len() <= max, "{}", error.message.len());
        assert!(error.metadata["topic"].ends_with('…') && error.metadata["topic"].len() < MAX_MESSAGE_BYTES);
        let head = Status::from(error.clone()).into_http::<()>();
        let bytes: usize = head.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        assert!(bytes <= 32 << 10, "{bytes}");
        assert_eq!(ApiError::new(error.code, "short").message, "short");
    }
}
