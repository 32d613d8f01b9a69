//! Messages of a link, checked, and their wire form (`proto/strandline/v1/peer.proto`).
//!
//! Batches stay in the chunks of memory in which they were read, and go into the message unchanged. Messages are input: an invalid number
//! is rejected with its name and value. An error in one subscription ends only that subscription; a message that names none ends the
//! link.

use bytes::Bytes;
use prost::Message;

use crate::{
    model::{LeaderEpoch, Offset, PartitionId},
    partition::{
        leader::{insync::Ends, join::Claim},
        role::{Answered, Beginning, Joined},
    },
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, answer, to_follower, to_leader},
    },
    record::{Batch, ChunkedBatches, MalformedBatch},
};

/// Message that no correct broker sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadFrame {
    /// A message of an unknown kind, or one that belongs to the start of a link.
    #[error("a message of a kind that has no place here")]
    Kind,
    /// An invalid number.
    #[error("{field} is {value}")]
    Number {
        /// Name of the field.
        field: &'static str,
        /// Value of the field.
        value: i64,
    },
    /// An invalid topic id.
    #[error("topic id {0:?} is no UUID")]
    TopicId(String),
    /// Lists of different lengths.
    #[error("the lists of a progress have {places}, {written} and {persisted} entries")]
    Lengths {
        /// Number of subscriptions.
        places: usize,
        /// Number of log ends.
        written: usize,
        /// Number of persisted ends.
        persisted: usize,
    },
    /// Malformed batches.
    #[error("the batches at offset {base} are malformed: {why}")]
    Batches {
        /// Expected first offset.
        base: Offset,
        /// Error of the first malformed batch.
        why: MalformedBatch,
    },
    /// An offset or an epoch other than the requested one.
    #[error("{field} is {got}, and {expected} was asked for")]
    NotAsked {
        /// Name of the field.
        field: &'static str,
        /// Received value.
        got: i64,
        /// Requested value.
        expected: i64,
    },
}

impl From<BadFrame> for ApiError {
    fn from(error: BadFrame) -> Self {
        let reason = if matches!(error, BadFrame::Batches { .. }) {
            ErrorCode::MalformedBatch
        } else {
            ErrorCode::InvalidRequest
        };
        Self::new(reason, error.to_string())
    }
}

/// Message of a follower's broker, about one subscription or many.
#[derive(Debug)]
pub(super) enum FromFollower {
    /// Start of a subscription.
    Join { place: u32, join: Result<JoinFrame, BadFrame> },
    /// End of a subscription.
    Leave { place: u32, known: Option<LeaderEpoch>, stopping: bool },
    /// Progress of these subscriptions.
    Progress(Vec<(u32, Ends)>),
    /// Response to a ping.
    Pong(u64),
}

/// Request of a subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct JoinFrame {
    pub(super) partition: PartitionId,
    pub(super) epoch: LeaderEpoch,
    pub(super) claim: Claim,
    pub(super) ends: Ends,
}

/// Message of a leader's broker.
#[derive(Debug)]
pub(super) enum FromLeader {
    /// Response to a subscription.
    Answer { place: u32, answered: Result<Answered, BadFrame> },
    /// Batches of subscriptions.
    Batches(Vec<v1::Piece>),
    /// Request for a response, which shows that the follower's process runs.
    Ping(u64),
}

/// Batches of one subscription.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) epoch: LeaderEpoch,
    pub(super) high_watermark: Offset,
    pub(super) batches: Vec<Batch>,
}

fn offset(field: &'static str, value: i64) -> Result<Offset, BadFrame> {
    Offset::from_i64(value).ok_or(BadFrame::Number { field, value })
}

fn epoch(field: &'static str, value: i32) -> Result<LeaderEpoch, BadFrame> {
    LeaderEpoch::from_i32(value).ok_or(BadFrame::Number { field, value: value.into() })
}

fn ends(written: i64, persisted: i64) -> Result<Ends, BadFrame> {
    let ends = Ends { written: offset("a written end", written)?, persisted: offset("a persisted end", persisted)? };
    if ends.persisted > ends.written {
        return Err(BadFrame::Number { field: "a persisted end above the written one", value: persisted });
    }
    Ok(ends)
}

impl TryFrom<v1::ToLeader> for FromFollower {
    type Error = BadFrame;

    fn try_from(message: v1::ToLeader) -> Result<Self, BadFrame> {
        match message.is {
            Some(to_leader::Is::Join(join)) => Ok(Self::Join { place: join.place, join: join.try_into() }),
            Some(to_leader::Is::Leave(leave)) => Ok(Self::Leave {
                place: leave.place,
                known: LeaderEpoch::from_i32(leave.known_epoch),
                stopping: leave.stopping,
            }),
            Some(to_leader::Is::Progress(progress)) => {
                let (places, written, persisted) =
                    (progress.place.len(), progress.written.len(), progress.persisted.len());
                if places != written || places != persisted {
                    return Err(BadFrame::Lengths { places, written, persisted });
                }
                let of_places = progress.written.into_iter().zip(progress.persisted);
                let all = progress.place.into_iter().zip(of_places);
                let all = all.map(|(place, (written, persisted))| Ok((place, ends(written, persisted)?)));
                Ok(Self::Progress(all.collect::<Result<_, BadFrame>>()?))
            }
            Some(to_leader::Is::Pong(pong)) => Ok(Self::Pong(pong.number)),
            Some(to_leader::Is::Hello(_)) | None => Err(BadFrame::Kind),
        }
    }
}

impl TryFrom<v1::Join> for JoinFrame {
    type Error = BadFrame;

    fn try_from(join: v1::Join) -> Result<Self, BadFrame> {
        let topic = join.topic_id.parse().map_err(|_| BadFrame::TopicId(join.topic_id.chars().take(64).collect()))?;
        let number = u32::try_from(join.partition)
            .map_err(|_| BadFrame::Number { field: "a partition's number", value: join.partition.into() })?;
        let last = join.last_epoch.map(|value| epoch("the epoch of a last batch", value)).transpose()?;
        let ends = ends(join.end, join.persisted)?;
        Ok(Self {
            partition: PartitionId::new(topic, number),
            epoch: epoch("a leader epoch", join.leader_epoch)?,
            claim: Claim { last, end: ends.written, added: join.added_after },
            ends,
        })
    }
}

impl TryFrom<v1::ToFollower> for FromLeader {
    type Error = BadFrame;

    fn try_from(message: v1::ToFollower) -> Result<Self, BadFrame> {
        match message.is {
            Some(to_follower::Is::Answer(answer)) => {
                Ok(Self::Answer { place: answer.place, answered: answered(answer) })
            }
            Some(to_follower::Is::Batches(batches)) => Ok(Self::Batches(batches.pieces)),
            Some(to_follower::Is::Ping(ping)) => Ok(Self::Ping(ping.number)),
            Some(to_follower::Is::Welcome(_)) | None => Err(BadFrame::Kind),
        }
    }
}

fn answered(answer: v1::Answer) -> Result<Answered, BadFrame> {
    let join = match answer.is.ok_or(BadFrame::Kind)? {
        answer::Is::At(at) => Joined::At(offset("the offset to go on at", at)?),
        answer::Is::Diverged(diverged) => Joined::Diverged {
            epoch: epoch("the epoch of a divergence", diverged.epoch)?,
            end: offset("the end of a divergence", diverged.end)?,
        },
        answer::Is::Begin(begin) => Joined::Begin(Box::new(beginning(begin)?)),
        answer::Is::Refused(error) => Joined::Refused(error.message),
    };
    Ok(Answered {
        epoch: epoch("a leader epoch", answer.leader_epoch)?,
        high_watermark: offset("a high watermark", answer.high_watermark)?,
        join,
        in_sync: false,
    })
}

fn beginning(begin: v1::Begin) -> Result<Beginning, BadFrame> {
    let at = offset("the offset to begin at", begin.at)?;
    let start =
        |start: &v1::EpochStart| Ok((epoch("an epoch", start.epoch)?, offset("the start of an epoch", start.start)?));
    let epochs = begin.epochs.iter().map(start).collect::<Result<_, BadFrame>>()?;
    Ok(Beginning { at, in_bucket: begin.in_bucket, epochs, producers: begin.producers })
}

impl TryFrom<v1::Piece> for Piece {
    type Error = BadFrame;

    fn try_from(piece: v1::Piece) -> Result<Self, BadFrame> {
        let base = offset("the offset of a piece", piece.base)?;
        let batches = ChunkedBatches::new(piece.chunks).collect::<Result<Vec<_>, _>>();
        Ok(Self {
            epoch: epoch("a leader epoch", piece.leader_epoch)?,
            high_watermark: offset("a high watermark", piece.high_watermark)?,
            batches: batches.map_err(|why| BadFrame::Batches { base, why })?,
        })
    }
}

/// Encodes the start of a subscription.
pub(super) fn join(place: u32, join: &JoinFrame) -> v1::ToLeader {
    let is = to_leader::Is::Join(v1::Join {
        place,
        topic_id: join.partition.topic.to_string(),
        partition: join.partition.number.cast_signed(),
        leader_epoch: join.epoch.as_i32(),
        last_epoch: join.claim.last.map(LeaderEpoch::as_i32),
        end: join.claim.end.as_i64(),
        persisted: join.ends.persisted.as_i64(),
        added_after: join.claim.added,
    });
    to_leader(is)
}

/// Encodes the end of a subscription.
pub(super) fn leave(place: u32, known: LeaderEpoch, stopping: bool) -> v1::ToLeader {
    to_leader(to_leader::Is::Leave(v1::Leave { place, known_epoch: known.as_i32(), stopping }))
}

/// Encodes a ping.
pub(super) fn ping(number: u64) -> v1::ToFollower {
    to_follower(to_follower::Is::Ping(v1::Ping { number }))
}

pub(super) fn pong(number: u64) -> v1::ToLeader {
    to_leader(to_leader::Is::Pong(v1::Pong { number }))
}

/// Encodes the follower's progress.
pub(super) fn progress(all: impl IntoIterator<Item = (u32, Ends)>) -> v1::ToLeader {
    let mut progress = v1::Progress::default();
    for (place, ends) in all {
        progress.place.push(place);
        progress.written.push(ends.written.as_i64());
        progress.persisted.push(ends.persisted.as_i64());
    }
    to_leader(to_leader::Is::Progress(progress))
}

/// Encodes the response to a subscription.
pub(super) fn answer(place: u32, answered: Answered) -> v1::ToFollower {
    let is = match answered.join {
        Joined::At(at) => answer::Is::At(at.as_i64()),
        Joined::Diverged { epoch, end } => {
            answer::Is::Diverged(v1::Diverged { epoch: epoch.as_i32(), end: end.as_i64() })
        }
        Joined::Begin(begin) => answer::Is::Begin(v1::Begin {
            at: begin.at.as_i64(),
            epochs: begin.epochs.iter().map(|(epoch, start)| epoch_start(*epoch, *start)).collect(),
            producers: begin.producers,
            in_bucket: begin.in_bucket,
        }),
        Joined::Refused(why) => answer::Is::Refused(ApiError::new(ErrorCode::NotLeader, why).into()),
    };
    let answer = v1::Answer {
        place,
        leader_epoch: answered.epoch.as_i32(),
        high_watermark: answered.high_watermark.as_i64(),
        is: Some(is),
    };
    to_follower(to_follower::Is::Answer(answer))
}

fn epoch_start(epoch: LeaderEpoch, start: Offset) -> v1::EpochStart {
    v1::EpochStart { epoch: epoch.as_i32(), start: start.as_i64() }
}

/// Encodes the error that ends a subscription.
pub(super) fn refused(place: u32, epoch: LeaderEpoch, fault: ApiError) -> v1::ToFollower {
    let answer = v1::Answer {
        place,
        leader_epoch: epoch.as_i32(),
        high_watermark: 0,
        is: Some(answer::Is::Refused(fault.into())),
    };
    to_follower(to_follower::Is::Answer(answer))
}

/// Encodes batches.
pub(super) fn batches(pieces: Vec<v1::Piece>) -> v1::ToFollower {
    to_follower(to_follower::Is::Batches(v1::Batches { pieces }))
}

fn to_leader(is: to_leader::Is) -> v1::ToLeader {
    v1::ToLeader { is: Some(is), padding: Bytes::new() }
}

fn to_follower(is: to_follower::Is) -> v1::ToFollower {
    v1::ToFollower { is: Some(is), padding: Bytes::new() }
}

/// Size in bytes from which on the transport counts a message by its bytes alone. With some hundred smaller messages that wait to be
/// read, the transport ends the connection, whatever the window is (`ENHANCE_YOUR_CALM`, h2 from 0.4.16 on). A new link has one for each
/// partition.
const MIN_MESSAGE_BYTES: usize = 256;

/// A message with the size that the transport needs.
pub(super) trait Padded: Message {
    /// Returns the message, with zeros if it is too small.
    fn padded(self) -> Self;
}

impl Padded for v1::ToLeader {
    fn padded(self) -> Self {
        Self { padding: padding(self.encoded_len()), ..self }
    }
}

impl Padded for v1::ToFollower {
    fn padded(self) -> Self {
        Self { padding: padding(self.encoded_len()), ..self }
    }
}

fn padding(bytes: usize) -> Bytes {
    Bytes::from_static(&[0; MIN_MESSAGE_BYTES][..MIN_MESSAGE_BYTES.saturating_sub(bytes)])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::TopicId;

    /// Returns numbers, some of them invalid.
    fn numbers() -> impl Strategy<Value = i64> {
        prop_oneof![-2..3i64, any::<i64>()]
    }

    fn epochs() -> impl Strategy<Value = i32> {
        prop_oneof![-2..3i32, any::<i32>()]
    }

    fn answers() -> impl Strategy<Value = v1::Answer> {
        let start = (epochs(), numbers()).prop_map(|(epoch, start)| v1::EpochStart { epoch, start });
        let starts = prop::collection::vec(start, 0..4);
        let is = prop_oneof![
            numbers().prop_map(answer::Is::At),
            (epochs(), numbers()).prop_map(|(epoch, end)| answer::Is::Diverged(v1::Diverged { epoch, end })),
            (numbers(), starts, any::<bool>()).prop_map(|(at, epochs, in_bucket)| {
                answer::Is::Begin(v1::Begin { at, epochs, producers: vec![1, 2].into(), in_bucket })
            }),
        ];
        (any::<u32>(), epochs(), numbers(), prop::option::of(is)).prop_map(
            |(place, leader_epoch, high_watermark, is)| v1::Answer { place, leader_epoch, high_watermark, is },
        )
    }

    /// Regression: a follower of 3,000 partitions sent as many subscriptions at once, each of 90 bytes, and the leader's transport ended
    /// the connection, again and again.
    #[test]
    fn messages_have_the_minimum_size_of_the_transport() {
        let join = v1::Join { place: 1, topic_id: TopicId::from_bytes([7; 16]).to_string(), ..v1::Join::default() };
        for is in [to_leader::Is::Join(join), to_leader::Is::Pong(v1::Pong::default())] {
            let message = to_leader(is).padded();
            let bytes = message.encoded_len();
            assert!((MIN_MESSAGE_BYTES..MIN_MESSAGE_BYTES + 8).contains(&bytes), "{bytes}");
        }
        let mark = v1::Piece { place: 1, high_watermark: 5, ..v1::Piece::default() };
        assert!(batches(vec![mark.clone()]).padded().encoded_len() >= MIN_MESSAGE_BYTES);
        let many = batches(vec![mark; 100]);
        assert_eq!(many.clone().padded(), many, "a large one stays as it is");
    }

    proptest! {
        #[test]
        fn valid_response_is_encoded_as_it_was_received(answer in answers()) {
            let message = to_follower(to_follower::Is::Answer(answer));
            let Ok(FromLeader::Answer { place, answered }) = message.clone().try_into() else { panic!("an answer") };
            if let Ok(answered) = answered {
                prop_assert_eq!(super::answer(place, answered), message);
            }
        }

        #[test]
        fn subscription_is_rejected_or_encoded_as_received(
            place: u32, partition in epochs(), leader_epoch in epochs(), last in prop::option::of(epochs()),
            end in numbers(), persisted in numbers(), added_after: Option<u64>, id in "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        ) {
            let message =
                v1::Join { place, topic_id: id, partition, leader_epoch, last_epoch: last, end, persisted, added_after };
            let can_be = partition >= 0 && leader_epoch >= 0 && last.is_none_or(|last| last >= 0) && 0 <= persisted && persisted <= end;
            let parsed = JoinFrame::try_from(message.clone());
            prop_assert_eq!(parsed.is_ok(), can_be);
            if let Ok(parsed) = parsed {
                prop_assert_eq!(join(place, &parsed).is, Some(to_leader::Is::Join(message)));
            }
        }

        #[test]
        fn any_bytes_are_decoded_or_rejected(bytes: Vec<u8>) {
            if let Ok(message) = v1::ToLeader::decode(&bytes[..]) {
                let _ = FromFollower::try_from(message);
            }
            if let Ok(message) = v1::ToFollower::decode(&bytes[..])
                && let Ok(FromLeader::Batches(pieces)) = message.try_into()
            {
                for piece in pieces {
                    let _ = Piece::try_from(piece);
                }
            }
        }
    }
}
