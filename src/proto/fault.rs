//! Errors on the wire: one stable reason, one sentence, details by name.
//!
//! A failed call carries a [`Fault`] as `google.rpc.Status` with `ErrorInfo`; a failed part of a stream carries it as
//! [`v1::Error`]. Both ways hold the same, so a client treats them alike.

use std::{collections::HashMap, fmt};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::v1;

/// The `ErrorInfo` domain of every reason.
pub const DOMAIN: &str = "strandline";

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $word:literal, $code:ident, $retryable:literal;)*) => {
        /// Why a request failed. The word is stable: programs may compare it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $name),* }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Reason] = &[$(Self::$name),*];

            /// The word on the wire.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word),* }
            }

            /// The gRPC code that a failed call carries.
            pub const fn code(self) -> Code {
                match self { $(Self::$name => Code::$code),* }
            }

            /// Whether the same request may succeed later.
            pub const fn retryable(self) -> bool {
                match self { $(Self::$name => $retryable),* }
            }
        }
    };
}

reasons! {
    /// The request itself is wrong: a field is missing or not possible.
    InvalidRequest = "INVALID_REQUEST", InvalidArgument, false;
    /// No topic has this name.
    UnknownTopic = "UNKNOWN_TOPIC", NotFound, false;
    /// The topic of this name has another id: it was deleted and made again.
    TopicIdMismatch = "TOPIC_ID_MISMATCH", FailedPrecondition, false;
    /// The topic has no partition of this number.
    UnknownPartition = "UNKNOWN_PARTITION", NotFound, false;
    /// A topic of this name exists.
    TopicExists = "TOPIC_EXISTS", AlreadyExists, false;
    /// A topic name, configuration key or value is not allowed.
    InvalidTopic = "INVALID_TOPIC", InvalidArgument, false;
    /// This broker does not lead the partition; the metadata says who does.
    NotLeader = "NOT_LEADER", Unavailable, true;
    /// Nobody who may lead the partition is there; the message names who is waited for.
    NoLeader = "NO_LEADER", Unavailable, true;
    /// The cluster has no broker of this number.
    UnknownBroker = "UNKNOWN_BROKER", NotFound, false;
    /// No move of the partition is under way.
    NoReassignment = "NO_REASSIGNMENT", FailedPrecondition, false;
    /// The order is not possible, or not needed, as the cluster stands.
    NotPossible = "NOT_POSSIBLE", FailedPrecondition, false;
    /// The offset is not in `log_start..=high_watermark`.
    OffsetOutOfRange = "OFFSET_OUT_OF_RANGE", OutOfRange, false;
    /// The batch is larger than `max.message.bytes`.
    RecordTooLarge = "RECORD_TOO_LARGE", InvalidArgument, false;
    /// A record's timestamp is further from the broker's clock than the topic allows.
    InvalidTimestamp = "INVALID_TIMESTAMP", InvalidArgument, false;
    /// The bytes are no batch, or a damaged one.
    MalformedBatch = "MALFORMED_BATCH", InvalidArgument, false;
    /// The request is larger than any message may be.
    MessageTooLarge = "MESSAGE_TOO_LARGE", ResourceExhausted, false;
    /// The broker has no method of this name.
    UnknownMethod = "UNKNOWN_METHOD", Unimplemented, false;
    /// The request's messages are compressed, which gRPC allows and this broker does not take.
    UnsupportedEncoding = "UNSUPPORTED_ENCODING", Unimplemented, false;
    /// A gap in an idempotent producer's sequence.
    OutOfOrderSequence = "OUT_OF_ORDER_SEQUENCE", FailedPrecondition, false;
    /// A newer epoch of the same producer has written.
    ProducerFenced = "PRODUCER_FENCED", FailedPrecondition, false;
    /// The partition does not know this idempotent producer any more.
    UnknownProducer = "UNKNOWN_PRODUCER", FailedPrecondition, false;
    /// Fewer replicas are in sync than `min.insync.replicas`.
    NotEnoughReplicas = "NOT_ENOUGH_REPLICAS", Unavailable, true;
    /// The acknowledgement did not come in time; the write may or may not have happened.
    Timeout = "TIMEOUT", DeadlineExceeded, true;
    /// Too much is under way; send less, or later.
    Overloaded = "OVERLOADED", ResourceExhausted, true;
    /// The disk is full. Appends go on by themselves when there is room.
    DiskFull = "DISK_FULL", ResourceExhausted, true;
    /// A write to this broker's disk failed; the partition takes no more writes here.
    StorageFailed = "STORAGE_FAILED", Unavailable, true;
    /// The replica's data is damaged; the offsets named cannot be read here.
    DataDamaged = "DATA_DAMAGED", DataLoss, false;
    /// The object store did not answer as it should.
    ObjectStoreUnavailable = "OBJECT_STORE_UNAVAILABLE", Unavailable, true;
    /// The metadata store did not answer as it should.
    MetadataUnavailable = "METADATA_UNAVAILABLE", Unavailable, true;
    /// The metadata store went back, or is another one: this broker needs a person, and a restart.
    MetadataRegressed = "METADATA_REGRESSED", FailedPrecondition, false;
    /// Somebody else changed the same thing at the same time.
    Conflict = "CONFLICT", Aborted, true;
    /// The broker is stopping, or not ready yet.
    NotReady = "NOT_READY", Unavailable, true;
    /// A bug, or an answer that this version does not understand.
    Internal = "INTERNAL", Internal, false;
}

impl Reason {
    /// The code with this name on the wire.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str() == name)
    }
}

/// One failure as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The stable word.
    pub reason: Reason,
    /// For people: what is wrong, with the value, and what to do.
    pub message: String,
    /// Details by name.
    pub metadata: HashMap<String, String>,
    /// Whether the same request may succeed later.
    pub retryable: bool,
}

/// Most bytes of a message and of a detail. They may repeat what a request had, and travel in a head, where they take several times as much.
const MAX_MESSAGE_BYTES: usize = 4 << 10;
const MAX_DETAIL_BYTES: usize = 1 << 10;

/// The beginning of a text that is too long.
fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most));
        text.push('…');
    }
    text
}

impl Fault {
    /// A failure for this reason.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        let message = cut(message.into(), MAX_MESSAGE_BYTES);
        Self { reason, message, metadata: HashMap::new(), retryable: reason.retryable() }
    }

    /// Adds a detail.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.metadata.insert(name.to_owned(), cut(value.to_string(), MAX_DETAIL_BYTES));
        self
    }

    /// A detail that is a number.
    pub fn number(&self, name: &str) -> Option<i64> {
        self.metadata.get(name)?.parse().ok()
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        let details = ErrorDetails::with_error_info(fault.reason.as_str(), DOMAIN, fault.metadata);
        Self::with_error_details(fault.reason.code(), fault.message, details)
    }
}

impl From<&Status> for Fault {
    /// Reads a failed call. A status without our details comes from the transport or from something in between: what
    /// gRPC calls unavailable may be tried again, the rest may not.
    fn from(status: &Status) -> Self {
        if let Some(info) = status.get_details_error_info()
            && let Some(reason) = Reason::from_name(&info.reason)
        {
            let retryable = reason.retryable();
            return Self { reason, message: status.message().to_owned(), metadata: info.metadata, retryable };
        }
        let reason = match status.code() {
            Code::Unavailable | Code::Cancelled | Code::Aborted => Reason::NotReady,
            Code::DeadlineExceeded => Reason::Timeout,
            Code::ResourceExhausted => Reason::Overloaded,
            Code::InvalidArgument | Code::OutOfRange | Code::NotFound => Reason::InvalidRequest,
            // An answer that no version of a broker gives to a call that it knows: often another HTTP server's 404.
            Code::Unimplemented => {
                let message = format!(
                    "what answers there is no Strandline broker, or an older one that does not know the call ({})",
                    status.message()
                );
                return Self::new(Reason::Internal, message);
            }
            _ => Reason::Internal,
        };
        Self::new(reason, format!("{}: {}", status.code().description(), status.message()))
    }
}

/// Whether a failed call's status is a broker's own answer, and not the transport's or that of something in between.
pub fn is_own(status: &Status) -> bool {
    status.get_details_error_info().is_some_and(|info| info.domain == DOMAIN)
}

/// What a refusal means that the gRPC library made itself, before or instead of a service of ours: those carry no word.
/// `None` for every other status. `path` is that of the call, `/package.Service/Method`.
pub fn of_transport(status: &Status, path: &str) -> Option<Fault> {
    if !status.details().is_empty() {
        return None;
    }
    let said = status.message();
    Some(match status.code() {
        Code::OutOfRange => {
            let message = format!("the request is larger than a message may be: send less at once ({said})");
            Fault::new(Reason::MessageTooLarge, message)
        }
        Code::Internal => Fault::new(Reason::InvalidRequest, format!("the request cannot be read: {said}")),
        Code::Unimplemented if said.contains("compress") => {
            let message = format!("send messages without gRPC compression; batches may be compressed instead ({said})");
            Fault::new(Reason::UnsupportedEncoding, message)
        }
        Code::Unimplemented => {
            let path: String = path.chars().take(200).collect();
            let message = format!(
                "this broker, version {}, has no method {path}: compare with proto/strandline/v1",
                env!("CARGO_PKG_VERSION")
            );
            Fault::new(Reason::UnknownMethod, message).with("method", path)
        }
        _ => return None,
    })
}

impl From<Fault> for v1::Error {
    fn from(fault: Fault) -> Self {
        Self {
            reason: fault.reason.as_str().to_owned(),
            message: fault.message,
            retryable: fault.retryable,
            metadata: fault.metadata,
        }
    }
}

impl From<v1::Error> for Fault {
    fn from(error: v1::Error) -> Self {
        // A reason of a newer broker keeps its retryability and its words.
        let reason = Reason::from_name(&error.reason).unwrap_or(Reason::Internal);
        Self { reason, message: error.message, metadata: error.metadata, retryable: error.retryable }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    /// A name of 2 MB made 36 MB of heads: shown, encoded twice, and kept by HTTP/2 until its client read.
    #[test]
    fn texts_of_a_fault_are_bounded() {
        let name = "é\u{7f}".repeat(1 << 20);
        let fault = Fault::new(Reason::InvalidRequest, format!("topic {name:?} is named twice")).with("topic", &name);
        let most = MAX_MESSAGE_BYTES + "…".len();
        assert!(fault.message.starts_with("topic \"é") && fault.message.len() <= most, "{}", fault.message.len());
        assert!(fault.metadata["topic"].ends_with('…') && fault.metadata["topic"].len() < MAX_MESSAGE_BYTES);
        let head = Status::from(fault.clone()).into_http::<()>();
        let bytes: usize = head.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        assert!(bytes <= 32 << 10, "{bytes}");
        assert_eq!(Fault::new(fault.reason, "short").message, "short");
    }
}
