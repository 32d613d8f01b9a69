//! Errors of a client: of connections, calls, sends and reads. The errors of calls, sends and reads state whether a
//! repetition may succeed later.

use std::{error::Error, fmt, time::Duration};

use crate::{
    model::Offset,
    proto::error::{ApiError, ErrorCode},
    record::{BuildError, MalformedBatch},
};

/// Error of a connection to the brokers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The list of brokers is empty.
    #[error("no broker address: give at least one, such as 127.0.0.1:9460")]
    NoAddress,
    /// The text is no valid address.
    #[error("broker address {address:?} is invalid ({problem}): write host:port, such as 127.0.0.1:9460")]
    Address {
        /// The rejected text.
        address: String,
        /// Problem of the text.
        problem: &'static str,
    },
    /// No address led to a broker that serves the call.
    #[error("no broker responds at {}", AttemptList(.tried))]
    NoResponse {
        /// Addresses that were tried, each with its error.
        tried: Vec<(String, String)>,
    },
}

/// Problem text of an address whose host refused the connection. [`root_cause`] writes it, and
/// [`ConnectError::is_refused`] compares with it.
const CONNECTION_REFUSED: &str = "connection refused";

impl ConnectError {
    /// Returns the errors of [`ConnectError::NoResponse`] without their addresses, for a message that already names the
    /// address. Any other error is returned in full.
    pub fn problem(&self) -> String {
        match self {
            Self::NoResponse { tried } => {
                tried.iter().map(|(_, problem)| problem.as_str()).collect::<Vec<_>>().join(", ")
            }
            other => other.to_string(),
        }
    }

    /// Returns true if the host at every address refused the connection.
    pub fn is_refused(&self) -> bool {
        match self {
            Self::NoResponse { tried } => {
                !tried.is_empty() && tried.iter().all(|(_, problem)| problem == CONNECTION_REFUSED)
            }
            _ => false,
        }
    }
}

/// Message part that lists the addresses that were tried, each with its error.
struct AttemptList<'a>(&'a [(String, String)]);

impl fmt::Display for AttemptList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (address, problem)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{address}: {problem}")?;
        }
        Ok(())
    }
}

/// Error of a call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No broker could be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A broker returned an error or an invalid response, or the metadata names no broker for the call. Or the response
    /// to a call that a broker may have received did not arrive.
    #[error("{0}")]
    Api(ApiError),
}

impl CallError {
    /// Returns true if the same call may succeed later.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Connect(error) => matches!(error, ConnectError::NoResponse { .. }),
            Self::Api(error) => error.retryable,
        }
    }

    /// Returns the error code of a [`CallError::Api`]; `None` for a [`CallError::Connect`].
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Connect(_) => None,
            Self::Api(error) => Some(error.code),
        }
    }
}

impl From<ApiError> for CallError {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

/// Error of a record or batch that was not acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The topic could not be looked up.
    #[error(transparent)]
    Lookup(#[from] CallError),
    /// The topic has no such partition.
    #[error("topic {topic:?} has no partition {partition}: it has {partitions}, numbered from 0")]
    UnknownPartition {
        /// Topic name.
        topic: String,
        /// Requested partition.
        partition: u32,
        /// Number of partitions of the topic.
        partitions: u32,
    },
    /// The record, or the supplied batch, is larger than the topic allows.
    #[error(
        "record of {bytes} bytes is too large for topic {topic:?} with a maximum of {limit} bytes: raise the \
         topic's max.message.bytes, or send smaller records"
    )]
    TooLarge {
        /// Topic name.
        topic: String,
        /// Size in bytes of the supplied batch, or of a batch that holds only the record.
        bytes: usize,
        /// Maximum size in bytes.
        limit: usize,
    },
    /// The batch could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A broker returned an error that is not retried. The record was not appended, unless the response to an earlier
    /// attempt was lost. With `acks=0`, and after a response that cannot be interpreted, the record may have been
    /// appended.
    #[error("{topic}/{partition}: {error}")]
    Refused {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
        /// Error of the broker.
        error: ApiError,
    },
    /// The record was not acknowledged within the delivery timeout.
    #[error(
        "{topic}/{partition}: not acknowledged within {timeout:?} (the delivery timeout), and {}; last problem: \
         {status}",
        if *.maybe_appended {
            "the record may have been appended: sending it again may duplicate it"
        } else {
            "the record was not appended"
        }
    )]
    Expired {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
        /// Delivery timeout of the producer.
        timeout: Duration,
        /// True if an earlier attempt may have been appended although its response was lost.
        maybe_appended: bool,
        /// Last problem before the timeout.
        status: String,
    },
    /// A response was lost, so the record may have been appended, and another attempt could append it twice.
    #[error(
        "{topic}/{partition}: the response was lost and the batch may have been appended: sending the batch again may \
         duplicate its records"
    )]
    Unknown {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
    },
    /// The producer was closed or dropped before the acknowledgement.
    #[error("the producer is closed")]
    Closed,
}

impl SendError {
    /// Returns true if the same record may succeed later. The producer has already made all retries that are safe.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Lookup(error) => error.retryable(),
            Self::Refused { error, .. } => error.retryable,
            Self::Expired { maybe_appended, .. } => !maybe_appended,
            _ => false,
        }
    }
}

/// Error of a read that cannot continue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConsumeError {
    /// The topic could not be looked up.
    #[error(transparent)]
    Lookup(#[from] CallError),
    /// The call concerns the position of a partition that is not, or no longer, assigned.
    #[error("partition {topic}/{partition} is not assigned to this consumer: assign it first")]
    NotAssigned {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
    },
    /// The topic has no such partition.
    #[error("topic {topic:?} has no partition {partition}: it has {partitions}, numbered from 0")]
    UnknownPartition {
        /// Topic name.
        topic: String,
        /// Requested partition.
        partition: u32,
        /// Number of partitions of the topic.
        partitions: u32,
    },
    /// The position is outside the log, and the consumer's policy is to fail.
    #[error("{topic}/{partition}: offset {offset} is out of range {start}..{end}: seek to an offset in this range")]
    OutOfRange {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
        /// Position of the consumer.
        offset: Offset,
        /// First offset that can be read.
        start: Offset,
        /// First uncommitted offset.
        end: Offset,
    },
    /// The leader repeatedly sent bytes that are no valid batch.
    #[error(
        "{topic}/{partition}: the leader repeatedly sent a corrupt batch at offset {offset}: {source}; check the \
         network and the leader's log"
    )]
    Corrupt {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
        /// Position of the consumer.
        offset: Offset,
        /// Error of the batch.
        source: MalformedBatch,
    },
    /// A stored batch cannot be decoded, because its producer wrote invalid records.
    #[error(
        "{topic}/{partition}: the batch at offset {batch} cannot be decoded from offset {offset} on: {source}; {}",
        NextBatch { skipped: *.skipped, offset: *.offset, next: *.next }
    )]
    Undecodable {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
        /// First offset of the batch.
        batch: Offset,
        /// Position of the consumer: the first offset that cannot be decoded.
        offset: Offset,
        /// First offset after the batch.
        next: Offset,
        /// True if the consumer continues at `next`, according to its options. If false, it stays at `offset`.
        skipped: bool,
        /// Error of the batch.
        source: MalformedBatch,
    },
    /// The leader repeatedly sent a response that skips records.
    #[error(
        "{topic}/{partition}: the leader repeatedly left out offsets {expected} up to, but not including, {found}: \
         check the leader's log, or continue at offset {found}"
    )]
    Gap {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
        /// Position of the consumer.
        expected: Offset,
        /// First offset of the response.
        found: Offset,
    },
    /// A broker refused the read with an error that is not retried.
    #[error("{topic}/{partition}: {error}")]
    Refused {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
        /// Error of the broker.
        error: ApiError,
    },
    /// The consumer's task has ended.
    #[error("the consumer is closed")]
    Closed,
}

impl ConsumeError {
    /// Returns true if the same read may succeed later.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Lookup(error) => error.retryable(),
            Self::Refused { error, .. } => error.retryable,
            _ => false,
        }
    }
}

/// Message part that names the skipped offsets, or the offset after a batch that cannot be decoded.
struct NextBatch {
    skipped: bool,
    offset: Offset,
    next: Offset,
}

impl fmt::Display for NextBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { skipped, offset, next } = self;
        if *skipped {
            write!(f, "skipped offsets {offset} up to, but not including, {next}")
        } else {
            write!(f, "the next batch is at offset {next}")
        }
    }
}

/// Returns the last cause of a failed connection as text, without the operating system's error number.
pub(super) fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    if let Some(io) = cause.downcast_ref::<std::io::Error>() {
        match io.kind() {
            std::io::ErrorKind::ConnectionRefused => return CONNECTION_REFUSED.to_owned(),
            std::io::ErrorKind::TimedOut => return "no response in time".to_owned(),
            _ => {}
        }
    }
    let text = cause.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_lowercase(),
        None if text == "deadline has elapsed" => "no response in time".to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_names_every_address_that_was_tried() {
        let tried = vec![
            ("127.0.0.1:9460".to_owned(), "connection refused".to_owned()),
            ("b:1".to_owned(), "no response in time".to_owned()),
        ];
        let text = ConnectError::NoResponse { tried }.to_string();
        assert_eq!(text, "no broker responds at 127.0.0.1:9460: connection refused, b:1: no response in time");
    }

    #[test]
    fn refused_connection_error_has_no_error_number() {
        let error = std::io::Error::from_raw_os_error(111);
        assert_eq!(root_cause(&error), "connection refused");
        assert_eq!(root_cause(&std::io::Error::from_raw_os_error(101)), "network is unreachable");
    }
}
