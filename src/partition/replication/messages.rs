//! Messages of a link: checked types, and the conversion from and to the protocol (`proto/strandline/v1/peer.proto`).
//!
//! Batches stay in the chunks of memory in which they were read, and go into the message unchanged. Messages are input:
//! an invalid number is rejected with its name and value. An invalid subscription, response or batch ends only its
//! subscription. An invalid progress message, or a message of an unexpected kind, ends the link.

use bytes::Bytes;
use prost::Message;

use crate::{
    model::{LeaderEpoch, Offset, PartitionId},
    partition::{
        leader::{
            divergence::{BootstrapTables, LogPosition, SubscribeError, SubscribeOutcome},
            member::ReplicaProgress,
        },
        role::SubscribeResponse,
    },
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, replicate_request, replicate_response, subscribe_response},
    },
    record::{Batch, ChunkedBatches, MalformedBatch},
};

/// Message that no correct broker sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidMessage {
    /// A message or an outcome of a missing or unknown kind, or a message that belongs to the start of a link.
    #[error("message of an unexpected kind")]
    Kind,
    /// An invalid number.
    #[error("{field} is {value}")]
    Number {
        /// Name of the field, or a description of the invalid number.
        field: &'static str,
        /// Value of the field.
        value: i64,
    },
    /// An invalid topic id.
    #[error("topic id {0:?} is no UUID")]
    TopicId(String),
    /// Lists of different lengths.
    #[error("the lists of a progress message have {subscriptions}, {log_ends} and {persisted_ends} entries")]
    Lengths {
        /// Number of subscriptions.
        subscriptions: usize,
        /// Number of log ends.
        log_ends: usize,
        /// Number of persisted ends.
        persisted_ends: usize,
    },
    /// Malformed batches.
    #[error("the batches at offset {base} are malformed: {reason}")]
    Batches {
        /// Expected first offset.
        base: Offset,
        /// Error of the first malformed batch.
        reason: MalformedBatch,
    },
    /// An offset other than the requested one.
    #[error("{field} is {got} instead of {expected}")]
    NotRequested {
        /// Name of the field.
        field: &'static str,
        /// Received value.
        got: i64,
        /// Requested value.
        expected: i64,
    },
}

impl From<InvalidMessage> for ApiError {
    fn from(error: InvalidMessage) -> Self {
        let reason = if matches!(error, InvalidMessage::Batches { .. }) {
            ErrorCode::MalformedBatch
        } else {
            ErrorCode::InvalidRequest
        };
        Self::new(reason, error.to_string())
    }
}

/// Message of a follower's broker.
#[derive(Debug)]
pub(super) enum FollowerMessage {
    /// Start of a subscription; an invalid request ends only that subscription.
    Subscribe { subscription_id: u32, request: Result<SubscribeRequest, InvalidMessage> },
    /// End of a subscription, with the follower's newest leader epoch; `None` if that epoch is invalid. `stopping` is
    /// true if the follower will not return soon.
    Unsubscribe { subscription_id: u32, known_epoch: Option<LeaderEpoch>, stopping: bool },
    /// Progress, by the id of the subscription.
    Progress(Vec<(u32, ReplicaProgress)>),
    /// Response to a ping.
    Pong(u64),
}

/// Parameters of a follower's subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SubscribeRequest {
    pub(super) partition: PartitionId,
    pub(super) epoch: LeaderEpoch,
    pub(super) position: LogPosition,
    pub(super) progress: ReplicaProgress,
}

/// Message of a leader's broker.
#[derive(Debug)]
pub(super) enum LeaderMessage {
    /// Response to a subscription.
    Response { subscription_id: u32, response: Result<SubscribeResponse, InvalidMessage> },
    /// Batches of one or more subscriptions, not checked yet.
    Batches(Vec<v1::PartitionBatches>),
    /// Request for a `Pong`. A `Pong` shows that the follower's process runs.
    Ping(u64),
}

/// Checked batches of one subscription.
#[derive(Debug)]
pub(super) struct PartitionBatches {
    pub(super) epoch: LeaderEpoch,
    pub(super) high_watermark: Offset,
    pub(super) batches: Vec<Batch>,
}

/// Converts an offset; `field` names the field for the error.
fn parse_offset(field: &'static str, value: i64) -> Result<Offset, InvalidMessage> {
    Offset::from_i64(value).ok_or(InvalidMessage::Number { field, value })
}

/// Converts a leader epoch; `field` names the field for the error.
fn parse_epoch(field: &'static str, value: i32) -> Result<LeaderEpoch, InvalidMessage> {
    LeaderEpoch::from_i32(value).ok_or(InvalidMessage::Number { field, value: value.into() })
}

/// Converts a follower's progress. The persisted end must not be above the log end.
fn parse_progress(log_end: i64, persisted_end: i64) -> Result<ReplicaProgress, InvalidMessage> {
    let progress = ReplicaProgress {
        log_end: parse_offset("a log end", log_end)?,
        persisted_end: parse_offset("a persisted end", persisted_end)?,
    };
    if progress.persisted_end > progress.log_end {
        return Err(InvalidMessage::Number { field: "a persisted end above the log end", value: persisted_end });
    }
    Ok(progress)
}

impl TryFrom<v1::ReplicateRequest> for FollowerMessage {
    type Error = InvalidMessage;

    fn try_from(message: v1::ReplicateRequest) -> Result<Self, InvalidMessage> {
        match message.message {
            Some(replicate_request::Message::Subscribe(subscribe)) => {
                Ok(Self::Subscribe { subscription_id: subscribe.subscription_id, request: subscribe.try_into() })
            }
            Some(replicate_request::Message::Unsubscribe(unsubscribe)) => Ok(Self::Unsubscribe {
                subscription_id: unsubscribe.subscription_id,
                known_epoch: LeaderEpoch::from_i32(unsubscribe.known_epoch),
                stopping: unsubscribe.stopping,
            }),
            Some(replicate_request::Message::Progress(progress)) => {
                let (subscriptions, log_ends, persisted_ends) =
                    (progress.subscription_id.len(), progress.log_end.len(), progress.persisted_end.len());
                if subscriptions != log_ends || subscriptions != persisted_ends {
                    return Err(InvalidMessage::Lengths { subscriptions, log_ends, persisted_ends });
                }
                let ends = progress.log_end.into_iter().zip(progress.persisted_end);
                let entries = progress.subscription_id.into_iter().zip(ends);
                let parsed =
                    entries.map(|(id, (log_end, persisted_end))| Ok((id, parse_progress(log_end, persisted_end)?)));
                Ok(Self::Progress(parsed.collect::<Result<_, InvalidMessage>>()?))
            }
            Some(replicate_request::Message::Pong(pong)) => Ok(Self::Pong(pong.number)),
            Some(replicate_request::Message::Hello(_)) | None => Err(InvalidMessage::Kind),
        }
    }
}

impl TryFrom<v1::Subscribe> for SubscribeRequest {
    type Error = InvalidMessage;

    fn try_from(subscribe: v1::Subscribe) -> Result<Self, InvalidMessage> {
        let topic = subscribe
            .topic_id
            .parse()
            .map_err(|_| InvalidMessage::TopicId(subscribe.topic_id.chars().take(64).collect()))?;
        let number = u32::try_from(subscribe.partition)
            .map_err(|_| InvalidMessage::Number { field: "a partition number", value: subscribe.partition.into() })?;
        let last_epoch =
            subscribe.last_epoch.map(|value| parse_epoch("the epoch of a last batch", value)).transpose()?;
        let progress = parse_progress(subscribe.log_end, subscribe.persisted_end)?;
        Ok(Self {
            partition: PartitionId::new(topic, number),
            epoch: parse_epoch("a leader epoch", subscribe.leader_epoch)?,
            position: LogPosition { last_epoch, log_end: progress.log_end, removal_count: subscribe.removal_count },
            progress,
        })
    }
}

impl TryFrom<v1::ReplicateResponse> for LeaderMessage {
    type Error = InvalidMessage;

    fn try_from(message: v1::ReplicateResponse) -> Result<Self, InvalidMessage> {
        match message.message {
            Some(replicate_response::Message::SubscribeResponse(response)) => {
                Ok(Self::Response { subscription_id: response.subscription_id, response: parse_response(response) })
            }
            Some(replicate_response::Message::Batches(batches)) => Ok(Self::Batches(batches.partitions)),
            Some(replicate_response::Message::Ping(ping)) => Ok(Self::Ping(ping.number)),
            Some(replicate_response::Message::Welcome(_)) | None => Err(InvalidMessage::Kind),
        }
    }
}

/// Converts a response, which must have an outcome. Each error of the leader becomes [`SubscribeError::Unavailable`].
fn parse_response(response: v1::SubscribeResponse) -> Result<SubscribeResponse, InvalidMessage> {
    let outcome = match response.outcome.ok_or(InvalidMessage::Kind)? {
        subscribe_response::Outcome::AcceptedAt(at) => {
            SubscribeOutcome::Accepted(parse_offset("the accepted offset", at)?)
        }
        subscribe_response::Outcome::Diverged(diverged) => SubscribeOutcome::Diverged {
            epoch: parse_epoch("the epoch of a divergence", diverged.epoch)?,
            end: parse_offset("the end of a divergence", diverged.end)?,
        },
        subscribe_response::Outcome::Bootstrap(tables) => SubscribeOutcome::Bootstrap(Box::new(parse_tables(tables)?)),
        subscribe_response::Outcome::Error(error) => {
            SubscribeOutcome::Rejected(SubscribeError::Unavailable { reason: error.message })
        }
    };
    Ok(SubscribeResponse {
        epoch: parse_epoch("a leader epoch", response.leader_epoch)?,
        high_watermark: parse_offset("a high watermark", response.high_watermark)?,
        outcome,
        in_sync: false,
    })
}

fn parse_tables(tables: v1::Bootstrap) -> Result<BootstrapTables, InvalidMessage> {
    let bootstrap_start = parse_offset("the bootstrap offset", tables.start_offset)?;
    let parse_epoch_start = |start: &v1::EpochStart| {
        Ok((parse_epoch("an epoch", start.epoch)?, parse_offset("the start of an epoch", start.start)?))
    };
    let epochs = tables.epochs.iter().map(parse_epoch_start).collect::<Result<_, InvalidMessage>>()?;
    Ok(BootstrapTables {
        start: bootstrap_start,
        from_object_store: tables.from_object_store,
        epochs,
        producers: tables.producers,
    })
}

impl TryFrom<v1::PartitionBatches> for PartitionBatches {
    type Error = InvalidMessage;

    fn try_from(message: v1::PartitionBatches) -> Result<Self, InvalidMessage> {
        let base = parse_offset("the base offset of batches", message.base)?;
        let batches = ChunkedBatches::new(message.chunks).collect::<Result<Vec<_>, _>>();
        Ok(Self {
            epoch: parse_epoch("a leader epoch", message.leader_epoch)?,
            high_watermark: parse_offset("a high watermark", message.high_watermark)?,
            batches: batches.map_err(|reason| InvalidMessage::Batches { base, reason })?,
        })
    }
}

/// Encodes the start of a subscription.
pub(super) fn subscribe(subscription_id: u32, request: &SubscribeRequest) -> v1::ReplicateRequest {
    replicate_request(replicate_request::Message::Subscribe(v1::Subscribe {
        subscription_id,
        topic_id: request.partition.topic.to_string(),
        partition: request.partition.number.cast_signed(),
        leader_epoch: request.epoch.as_i32(),
        last_epoch: request.position.last_epoch.map(LeaderEpoch::as_i32),
        log_end: request.position.log_end.as_i64(),
        persisted_end: request.progress.persisted_end.as_i64(),
        removal_count: request.position.removal_count,
    }))
}

/// Encodes the end of a subscription.
pub(super) fn unsubscribe(subscription_id: u32, known_epoch: LeaderEpoch, stopping: bool) -> v1::ReplicateRequest {
    replicate_request(replicate_request::Message::Unsubscribe(v1::Unsubscribe {
        subscription_id,
        known_epoch: known_epoch.as_i32(),
        stopping,
    }))
}

/// Encodes a ping.
pub(super) fn ping(number: u64) -> v1::ReplicateResponse {
    replicate_response(replicate_response::Message::Ping(v1::Ping { number }))
}

/// Encodes the response to a ping.
pub(super) fn pong(number: u64) -> v1::ReplicateRequest {
    replicate_request(replicate_request::Message::Pong(v1::Pong { number }))
}

/// Encodes the follower's progress in these subscriptions.
pub(super) fn progress(entries: impl IntoIterator<Item = (u32, ReplicaProgress)>) -> v1::ReplicateRequest {
    let mut message = v1::Progress::default();
    for (subscription_id, progress) in entries {
        message.subscription_id.push(subscription_id);
        message.log_end.push(progress.log_end.as_i64());
        message.persisted_end.push(progress.persisted_end.as_i64());
    }
    replicate_request(replicate_request::Message::Progress(message))
}

/// Encodes the response to a subscription.
pub(super) fn subscribe_response(subscription_id: u32, response: SubscribeResponse) -> v1::ReplicateResponse {
    let outcome = match response.outcome {
        SubscribeOutcome::Accepted(at) => subscribe_response::Outcome::AcceptedAt(at.as_i64()),
        SubscribeOutcome::Diverged { epoch, end } => {
            subscribe_response::Outcome::Diverged(v1::Diverged { epoch: epoch.as_i32(), end: end.as_i64() })
        }
        SubscribeOutcome::Bootstrap(tables) => subscribe_response::Outcome::Bootstrap(v1::Bootstrap {
            start_offset: tables.start.as_i64(),
            epochs: tables.epochs.iter().map(|(epoch, start)| epoch_start(*epoch, *start)).collect(),
            producers: tables.producers,
            from_object_store: tables.from_object_store,
        }),
        SubscribeOutcome::Rejected(reason) => {
            subscribe_response::Outcome::Error(ApiError::new(ErrorCode::NotLeader, reason.to_string()).into())
        }
    };
    let response = v1::SubscribeResponse {
        subscription_id,
        leader_epoch: response.epoch.as_i32(),
        high_watermark: response.high_watermark.as_i64(),
        outcome: Some(outcome),
    };
    replicate_response(replicate_response::Message::SubscribeResponse(response))
}

fn epoch_start(epoch: LeaderEpoch, start: Offset) -> v1::EpochStart {
    v1::EpochStart { epoch: epoch.as_i32(), start: start.as_i64() }
}

/// Encodes the error that ends a subscription.
pub(super) fn subscription_error(subscription_id: u32, epoch: LeaderEpoch, error: ApiError) -> v1::ReplicateResponse {
    let response = v1::SubscribeResponse {
        subscription_id,
        leader_epoch: epoch.as_i32(),
        high_watermark: 0,
        outcome: Some(subscribe_response::Outcome::Error(error.into())),
    };
    replicate_response(replicate_response::Message::SubscribeResponse(response))
}

/// Wraps batches of any number of subscriptions in one response message.
pub(super) fn batches(partitions: Vec<v1::PartitionBatches>) -> v1::ReplicateResponse {
    replicate_response(replicate_response::Message::Batches(v1::Batches { partitions }))
}

fn replicate_request(message: replicate_request::Message) -> v1::ReplicateRequest {
    v1::ReplicateRequest { message: Some(message), padding: Bytes::new() }
}

fn replicate_response(message: replicate_response::Message) -> v1::ReplicateResponse {
    v1::ReplicateResponse { message: Some(message), padding: Bytes::new() }
}

/// Minimum size of a message. If some hundred smaller messages wait to be read, the transport ends the connection,
/// whatever its window (`ENHANCE_YOUR_CALM`, h2 from 0.4.16 on). A new link sends one subscription for each partition,
/// which would be too many small messages.
const MIN_MESSAGE_BYTES: usize = 256;

/// A message that can be padded to [`MIN_MESSAGE_BYTES`].
pub(super) trait Padded: Message {
    /// Returns the message, padded with zeros if it is smaller than the minimum.
    fn padded(self) -> Self;
}

impl Padded for v1::ReplicateRequest {
    fn padded(self) -> Self {
        Self { padding: padding(self.encoded_len()), ..self }
    }
}

impl Padded for v1::ReplicateResponse {
    fn padded(self) -> Self {
        Self { padding: padding(self.encoded_len()), ..self }
    }
}

/// Returns the padding of a message whose encoded size is `bytes`.
fn padding(bytes: usize) -> Bytes {
    Bytes::from_static(&[0; MIN_MESSAGE_BYTES][..MIN_MESSAGE_BYTES.saturating_sub(bytes)])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::TopicId;

    /// Returns offsets, some of them invalid.
    fn offsets() -> impl Strategy<Value = i64> {
        prop_oneof![-2..3i64, any::<i64>()]
    }

    fn epochs() -> impl Strategy<Value = i32> {
        prop_oneof![-2..3i32, any::<i32>()]
    }

    fn responses() -> impl Strategy<Value = v1::SubscribeResponse> {
        let start = (epochs(), offsets()).prop_map(|(epoch, start)| v1::EpochStart { epoch, start });
        let starts = prop::collection::vec(start, 0..4);
        let outcome = prop_oneof![
            offsets().prop_map(subscribe_response::Outcome::AcceptedAt),
            (epochs(), offsets())
                .prop_map(|(epoch, end)| subscribe_response::Outcome::Diverged(v1::Diverged { epoch, end })),
            (offsets(), starts, any::<bool>()).prop_map(|(start_offset, epochs, from_object_store)| {
                subscribe_response::Outcome::Bootstrap(v1::Bootstrap {
                    start_offset,
                    epochs,
                    producers: vec![1, 2].into(),
                    from_object_store,
                })
            }),
        ];
        (any::<u32>(), epochs(), offsets(), prop::option::of(outcome)).prop_map(
            |(subscription_id, leader_epoch, high_watermark, outcome)| v1::SubscribeResponse {
                subscription_id,
                leader_epoch,
                high_watermark,
                outcome,
            },
        )
    }

    /// Regression: a follower of 3,000 partitions sent as many subscriptions at once, each of 90 bytes. The leader's
    /// transport ended the connection, again and again.
    #[test]
    fn messages_have_the_minimum_size_of_the_transport() {
        let subscribe = v1::Subscribe {
            subscription_id: 1,
            topic_id: TopicId::from_bytes([7; 16]).to_string(),
            ..v1::Subscribe::default()
        };
        for kind in
            [replicate_request::Message::Subscribe(subscribe), replicate_request::Message::Pong(v1::Pong::default())]
        {
            let message = replicate_request(kind).padded();
            let bytes = message.encoded_len();
            assert!((MIN_MESSAGE_BYTES..MIN_MESSAGE_BYTES + 8).contains(&bytes), "{bytes}");
        }
        let watermark =
            v1::PartitionBatches { subscription_id: 1, high_watermark: 5, ..v1::PartitionBatches::default() };
        assert!(batches(vec![watermark.clone()]).padded().encoded_len() >= MIN_MESSAGE_BYTES);
        let many = batches(vec![watermark; 100]);
        assert_eq!(many.clone().padded(), many, "a large message has no padding");
    }

    proptest! {
        #[test]
        fn valid_response_is_encoded_as_it_was_received(response in responses()) {
            let message = replicate_response(replicate_response::Message::SubscribeResponse(response));
            let Ok(LeaderMessage::Response { subscription_id, response }) = message.clone().try_into() else { panic!("a response") };
            if let Ok(response) = response {
                prop_assert_eq!(subscribe_response(subscription_id, response), message);
            }
        }

        #[test]
        fn subscription_is_rejected_or_encoded_as_received(
            subscription_id: u32, partition in epochs(), leader_epoch in epochs(), last in prop::option::of(epochs()),
            end in offsets(), persisted in offsets(), added_after: Option<u64>, id in "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        ) {
            let message =
                v1::Subscribe { subscription_id, topic_id: id, partition, leader_epoch, last_epoch: last, log_end: end, persisted_end: persisted, removal_count: added_after };
            let is_valid = partition >= 0 && leader_epoch >= 0 && last.is_none_or(|last| last >= 0) && 0 <= persisted && persisted <= end;
            let parsed = SubscribeRequest::try_from(message.clone());
            prop_assert_eq!(parsed.is_ok(), is_valid);
            if let Ok(parsed) = parsed {
                prop_assert_eq!(subscribe(subscription_id, &parsed).message, Some(replicate_request::Message::Subscribe(message)));
            }
        }

        #[test]
        fn any_bytes_are_decoded_or_rejected(bytes: Vec<u8>) {
            if let Ok(message) = v1::ReplicateRequest::decode(&bytes[..]) {
                let _ = FollowerMessage::try_from(message);
            }
            if let Ok(message) = v1::ReplicateResponse::decode(&bytes[..])
                && let Ok(LeaderMessage::Batches(messages)) = message.try_into()
            {
                for message in messages {
                    let _ = PartitionBatches::try_from(message);
                }
            }
        }
    }
}
