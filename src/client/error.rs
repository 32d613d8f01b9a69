//! What can go wrong between a client and the brokers. One enum per kind of call; each knows whether the same call may
//! succeed later.

use std::{error::Error, fmt};

use crate::{
    model::Offset,
    proto::fault::{Fault, Reason},
    record::{Malformed, Unbuildable},
};

/// No connection to any broker.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The list of brokers is empty.
    #[error("no broker is named; give at least one address, such as 127.0.0.1:9460")]
    NoAddress,
    /// A text that is no address.
    #[error("{address:?} is no broker address: {problem}; write host:port, such as 127.0.0.1:9460")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// None of them took the connection.
    #[error("no broker answers at {}", Tried(.tried))]
    NoAnswer {
        /// Each address with what happened there.
        tried: Vec<(String, String)>,
    },
}

impl ConnectError {
    /// What is wrong, for a sentence that names the address itself.
    pub(super) fn problem(&self) -> String {
        match self {
            Self::NoAnswer { tried } => {
                tried.iter().map(|(_, problem)| problem.as_str()).collect::<Vec<_>>().join(", ")
            }
            other => other.to_string(),
        }
    }
}

#[cfg(feature = "server")]
impl ConnectError {
    /// Whether the system at every address said that nobody listens there. The words are those of [`root_cause`].
    pub(super) fn is_refused(&self) -> bool {
        match self {
            Self::NoAnswer { tried } => {
                !tried.is_empty() && tried.iter().all(|(_, problem)| problem == "connection refused")
            }
            _ => false,
        }
    }
}

struct Tried<'a>(&'a [(String, String)]);

impl fmt::Display for Tried<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (address, problem)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{address}: {problem}")?;
        }
        Ok(())
    }
}

/// A call that was not answered, or was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Nobody to call.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A broker refused, or the connection broke while it worked on the call.
    #[error("{0}")]
    Fault(Fault),
}

impl CallError {
    /// Whether the same call may succeed later.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Connect(error) => matches!(error, ConnectError::NoAnswer { .. }),
            Self::Fault(fault) => fault.retryable,
        }
    }

    /// The broker's reason, when a broker refused.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Connect(_) => None,
            Self::Fault(fault) => Some(fault.reason),
        }
    }
}

impl From<Fault> for CallError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// A record or batch that was not acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The topic could not be looked up.
    #[error(transparent)]
    Lookup(#[from] CallError),
    /// The topic has no such partition.
    #[error("topic {topic:?} has no partition {partition}: it has {partitions}, numbered from 0")]
    UnknownPartition {
        /// The topic.
        topic: String,
        /// The partition asked for.
        partition: u32,
        /// How many it has.
        partitions: u32,
    },
    /// Larger than the topic takes.
    #[error(
        "record of {bytes} bytes is too large for topic {topic:?}: {limit} bytes is the most; raise the topic's \
         max.message.bytes, or send less at a time"
    )]
    TooLarge {
        /// The topic.
        topic: String,
        /// Bytes that the record takes in a batch of its own.
        bytes: usize,
        /// The most that are allowed.
        limit: usize,
    },
    /// No batch can hold it.
    #[error(transparent)]
    Unbuildable(#[from] Unbuildable),
    /// A broker refused it for good. It was not appended.
    #[error("{topic}/{partition}: {fault}")]
    Refused {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
        /// The broker's words.
        fault: Fault,
    },
    /// It was never acknowledged in the delivery timeout.
    #[error(
        "{topic}/{partition}: not acknowledged in the delivery timeout; {}; last trouble: {trouble}",
        if *.maybe_appended { "it may have been appended" } else { "it was not appended" }
    )]
    Expired {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
        /// Whether an earlier try may have been appended though its answer was lost.
        maybe_appended: bool,
        /// What stood in the way last.
        trouble: String,
    },
    /// The answer was lost, and asking again could append it twice.
    #[error(
        "{topic}/{partition}: the answer was lost; the batch may have been appended, and sending it again could double it"
    )]
    Unknown {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
    },
    /// The producer was closed or dropped first.
    #[error("the producer is closed")]
    Closed,
}

impl SendError {
    /// Whether the same record may succeed later. The producer has already retried what it safely could.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Lookup(error) => error.retryable(),
            Self::Refused { fault, .. } => fault.retryable,
            Self::Expired { maybe_appended, .. } => !maybe_appended,
            _ => false,
        }
    }
}

/// A read that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConsumeError {
    /// The topic could not be looked up.
    #[error(transparent)]
    Lookup(#[from] CallError),
    /// The partition is not assigned to this consumer.
    #[error("partition {topic}/{partition} is not assigned to this consumer; assign it first")]
    NotAssigned {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
    },
    /// The topic has no such partition.
    #[error("topic {topic:?} has no partition {partition}: it has {partitions}, numbered from 0")]
    UnknownPartition {
        /// The topic.
        topic: String,
        /// The partition asked for.
        partition: u32,
        /// How many it has.
        partitions: u32,
    },
    /// The position is not in the log.
    #[error("{topic}/{partition}: offset {offset} is out of range: the log holds {start}..{end}; seek to one of those")]
    OutOfRange {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
        /// The position.
        offset: Offset,
        /// First offset that can be read.
        start: Offset,
        /// First offset that is not committed yet.
        end: Offset,
    },
    /// What the broker sent is no batch, several times over.
    #[error("{topic}/{partition}: what the broker sent at offset {offset} is damaged: {source}")]
    Damaged {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
        /// The position.
        offset: Offset,
        /// What is wrong with it.
        source: Malformed,
    },
    /// A batch is stored, and nobody can decode it: its producer wrote it so.
    #[error(
        "{topic}/{partition}: the batch at offset {batch} cannot be decoded from offset {offset} on: {source}; {}",
        Further { skipped: *.skipped, next: *.next }
    )]
    Undecodable {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
        /// First offset of the batch.
        batch: Offset,
        /// The position: first offset that cannot be decoded.
        offset: Offset,
        /// First offset behind the batch.
        next: Offset,
        /// The consumer goes on there, as its options say. Else it stays at `offset`.
        skipped: bool,
        /// What is wrong with it.
        source: Malformed,
    },
    /// The broker left out records.
    #[error("{topic}/{partition}: the broker sent offset {found} where {expected} was due")]
    Gap {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
        /// The position.
        expected: Offset,
        /// First offset of what came.
        found: Offset,
    },
    /// A broker refused for good.
    #[error("{topic}/{partition}: {fault}")]
    Refused {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
        /// The broker's words.
        fault: Fault,
    },
    /// The consumer's task has ended.
    #[error("the consumer is closed")]
    Closed,
}

impl ConsumeError {
    /// Whether the same read may succeed later.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Lookup(error) => error.retryable(),
            Self::Refused { fault, .. } => fault.retryable,
            _ => false,
        }
    }
}

/// Where a consumer reads on behind a batch that cannot be decoded.
struct Further {
    skipped: bool,
    next: Offset,
}

impl fmt::Display for Further {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { skipped, next } = self;
        if *skipped {
            write!(f, "skipped up to offset {next}")
        } else {
            write!(f, "the next batch is at offset {next}")
        }
    }
}

/// The plainest words for a failed connection: the last cause, without the system's error number.
pub(super) fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    if let Some(io) = last.downcast_ref::<std::io::Error>() {
        match io.kind() {
            std::io::ErrorKind::ConnectionRefused => return "connection refused".to_owned(),
            std::io::ErrorKind::TimedOut => return "no answer in time".to_owned(),
            _ => {}
        }
    }
    let text = last.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_lowercase(),
        None if text == "deadline has elapsed" => "no answer in time".to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_every_address_that_was_tried() {
        let tried = vec![
            ("127.0.0.1:9460".to_owned(), "connection refused".to_owned()),
            ("b:1".to_owned(), "no answer in time".to_owned()),
        ];
        let text = ConnectError::NoAnswer { tried }.to_string();
        assert_eq!(text, "no broker answers at 127.0.0.1:9460: connection refused, b:1: no answer in time");
    }

    #[test]
    fn a_refused_connection_is_said_without_numbers() {
        let error = std::io::Error::from_raw_os_error(111);
        assert_eq!(root_cause(&error), "connection refused");
        assert_eq!(root_cause(&std::io::Error::from_raw_os_error(101)), "network is unreachable");
    }
}
