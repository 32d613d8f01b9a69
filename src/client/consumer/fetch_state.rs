//! States of the partitions in the consumer's task, and the verification of the batches in a response. Pure.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;

use super::{super::metadata::ReadTarget, read_replica::FollowerBackoff};
use crate::{
    model::{LeaderEpoch, Offset, TopicId},
    proto::v1,
    record::{Batch, ChunkedBatches, MalformedBatch},
    task::Backoff,
};

/// Time for which a stream must be open before a problem with the leader is cleared. At the end of a log no record
/// arrives that would clear the problem earlier.
pub(super) const STREAM_STABLE_DELAY: Duration = Duration::from_secs(2);

/// Problem that blocks a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FetchProblem {
    /// No leader of the partition is known or can be reached. Cleared when a stream was open for `STREAM_STABLE_DELAY`,
    /// or when records arrive.
    Leader,
    /// The records cannot be read. Cleared when records arrive.
    Records,
}

/// State of one partition in the consumer's task.
pub(super) struct PartitionFetchState {
    /// Generation of the assignment, which its events carry.
    pub(super) generation: u64,
    /// Next offset to fetch.
    pub(super) position: Offset,
    /// Number of the stream that serves the partition; `None` if none does.
    pub(super) stream: Option<u64>,
    /// True if a follower serves the partition on that stream.
    pub(super) is_follower: bool,
    pub(super) follower_backoff: FollowerBackoff,
    /// Id of the topic that is read: the position is invalid in another topic of the same name.
    pub(super) topic: TopicId,
    /// True if a broker rejected the topic id and no batch arrived since. The broker's metadata may be older than the
    /// client's, so the first rejection is retried.
    pub(super) mismatched: bool,
    /// Newest leader epoch from metadata or from a response.
    leader_epoch: LeaderEpoch,
    /// True if the partition failed: it is not read until it is assigned again, as by a seek.
    pub(super) failed: bool,
    /// Backoff between failed reads; `None` after batches were read.
    pub(super) backoff: Option<Backoff>,
    /// Time before which the partition gets no stream.
    pub(super) not_before: Option<Instant>,
    /// Number of invalid responses of the leader in a row.
    pub(super) corrupt_reads: u32,
    /// Problem that is shown in the retry status.
    pub(super) problem: Option<FetchProblem>,
    /// Time at which the broker accepted the stream; `None` before.
    pub(super) open_since: Option<Instant>,
}

impl PartitionFetchState {
    /// Creates the state of a partition that is read from `position` on. The backoff from followers is taken from an
    /// earlier assignment of the partition, if there is one. For the same topic id, the leader epoch is taken from it
    /// too.
    pub(super) fn new(generation: u64, topic: TopicId, position: Offset, now: Instant, earlier: Option<Self>) -> Self {
        let leader_epoch =
            earlier.as_ref().filter(|earlier| earlier.topic == topic).map(|earlier| earlier.leader_epoch);
        Self {
            topic,
            mismatched: false,
            generation,
            position,
            stream: None,
            is_follower: false,
            follower_backoff: earlier.map_or_else(|| FollowerBackoff::new(now), |earlier| earlier.follower_backoff),
            leader_epoch: leader_epoch.unwrap_or_default(),
            failed: false,
            backoff: None,
            not_before: None,
            corrupt_reads: 0,
            problem: None,
            open_since: None,
        }
    }

    /// Attaches the partition to a stream. Returns the offset and the leader epoch to request.
    pub(super) fn attach(&mut self, stream: u64, target: &ReadTarget) -> (i64, i32) {
        self.stream = Some(stream);
        self.is_follower = target.is_follower;
        if target.topic == self.topic {
            self.leader_epoch = self.leader_epoch.max(target.epoch);
        }
        (self.position.as_i64(), self.leader_epoch.as_i32())
    }

    /// Records a rejection of the topic id. Returns true for the first rejection since a batch arrived: the read is
    /// then repeated, because the metadata of the broker may be old.
    pub(super) fn record_mismatch(&mut self) -> bool {
        !std::mem::replace(&mut self.mismatched, true)
    }

    /// Returns true if the partition may be read and has no stream.
    pub(super) fn is_free(&self, now: Instant) -> bool {
        !self.failed && self.stream.is_none() && self.not_before.is_none_or(|at| at <= now)
    }

    /// Removes the partition from its stream.
    pub(super) fn detach(&mut self) {
        self.stream = None;
        self.open_since = None;
    }

    /// Stores the role of the replica that responded, and its leader epoch if that is newer than the stored one.
    /// Returns true if it is newer.
    pub(super) fn on_response(&mut self, fetched: &v1::FetchedPartition) -> bool {
        self.is_follower = fetched.from_follower;
        let epoch = LeaderEpoch::from_i32(fetched.leader_epoch).filter(|epoch| *epoch > self.leader_epoch);
        self.leader_epoch = epoch.unwrap_or(self.leader_epoch);
        epoch.is_some()
    }

    /// Returns the newest leader epoch from metadata or from a response.
    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.leader_epoch
    }

    /// Returns the time at which a problem with the leader is cleared if the stream stays open. Returns `None` without
    /// such a problem or without an open stream.
    pub(super) fn stable_at(&self) -> Option<Instant> {
        let open_since = self.open_since.filter(|_| self.problem == Some(FetchProblem::Leader))?;
        Some(open_since + STREAM_STABLE_DELAY)
    }
}

/// States of all assigned partitions, by topic and number.
#[derive(Default)]
pub(super) struct FetchStates(BTreeMap<Arc<str>, BTreeMap<u32, PartitionFetchState>>);

impl FetchStates {
    pub(super) fn insert(&mut self, topic: Arc<str>, partition: u32, state: PartitionFetchState) {
        self.0.entry(topic).or_default().insert(partition, state);
    }

    pub(super) fn remove(&mut self, topic: &str, partition: u32) -> Option<PartitionFetchState> {
        let states = self.0.get_mut(topic)?;
        let removed = states.remove(&partition);
        if states.is_empty() {
            self.0.remove(topic);
        }
        removed
    }

    pub(super) fn get(&self, topic: &str, partition: u32) -> Option<&PartitionFetchState> {
        self.0.get(topic)?.get(&partition)
    }

    pub(super) fn get_mut(&mut self, topic: &str, partition: u32) -> Option<&mut PartitionFetchState> {
        self.0.get_mut(topic)?.get_mut(&partition)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Arc<str>, u32, &PartitionFetchState)> {
        self.0.iter().flat_map(|(topic, states)| states.iter().map(move |(number, state)| (topic, *number, state)))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut PartitionFetchState> {
        self.0.values_mut().flat_map(BTreeMap::values_mut)
    }

    /// Returns the shared name of an assigned topic.
    pub(super) fn topic(&self, name: &str) -> Option<Arc<str>> {
        self.0.get_key_value(name).map(|(topic, _)| topic.clone())
    }

    pub(super) fn topics(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.keys()
    }
}

/// Error in the batches of a response.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum InvalidResponse {
    /// The bytes are truncated or no valid batch.
    Malformed(MalformedBatch),
    /// A batch starts at this offset, and records before it are missing.
    Gap(Offset),
}

/// Splits the chunks of a response into batches and verifies them. Returns the batches with records at or above
/// `position`, each with the first offset that the consumer needs of that batch. Also returns the position after these
/// batches, and the error at which the verification stopped.
pub(super) fn accept_batches(
    mut position: Offset,
    chunks: Vec<Bytes>,
) -> (Vec<(Offset, Batch)>, Offset, Result<(), InvalidResponse>) {
    let mut accepted = Vec::new();
    for batch in ChunkedBatches::new(chunks) {
        match batch {
            Err(malformed) => return (accepted, position, Err(InvalidResponse::Malformed(malformed))),
            Ok(batch) if batch.end_offset() <= position => {}
            Ok(batch) if batch.base_offset() > position => {
                return (accepted, position, Err(InvalidResponse::Gap(batch.base_offset())));
            }
            Ok(batch) => {
                let end = batch.end_offset();
                accepted.push((position, batch));
                position = end;
            }
        }
    }
    (accepted, position, Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Compression, record::BatchBuilder, task::clock};

    fn batch(base: u64, count: u64) -> Batch {
        let mut builder = BatchBuilder::new(Compression::None);
        for n in 0..count {
            builder.push(0, None, Some(format!("record {}", base + n).as_bytes()), &[]).expect("fits");
        }
        let mut batch = builder.finish(None).expect("not empty");
        batch.set_offset_and_epoch(Offset::new(base).expect("small"), LeaderEpoch(0));
        batch
    }

    fn at(offset: u64) -> Offset {
        Offset::new(offset).expect("small")
    }

    #[test]
    fn topic_is_forgotten_with_its_last_partition() {
        let (mut states, now) = (FetchStates::default(), clock::monotonic());
        for partition in 0..2 {
            let state = PartitionFetchState::new(0, TopicId::from_bytes([1; 16]), Offset::ZERO, now, None);
            states.insert("t".into(), partition, state);
        }
        assert!(states.remove("t", 0).is_some());
        assert_eq!(states.topics().count(), 1);
        assert!(states.remove("t", 1).is_some() && states.remove("t", 1).is_none());
        assert_eq!(states.topics().count(), 0, "its metadata is no longer requested");
    }

    #[test]
    fn batches_are_complete_for_any_chunk_boundaries() {
        let bytes: Vec<u8> = [batch(0, 3), batch(3, 1), batch(4, 2)].iter().flat_map(|b| b.to_bytes()).collect();
        for first in 0..=bytes.len() {
            for second in (first..=bytes.len()).step_by(7) {
                let chunks = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                let chunks = chunks.into_iter().map(Bytes::copy_from_slice).collect();
                let (accepted, position, result) = accept_batches(Offset::ZERO, chunks);
                assert_eq!(
                    (accepted.len(), position, result),
                    (3, at(6), Ok(())),
                    "chunks end at {first} and {second}"
                );
            }
        }
    }

    #[test]
    fn only_batches_with_records_at_or_above_position_are_kept() {
        let chunks = vec![batch(0, 3).to_bytes(), batch(3, 3).to_bytes()];
        let (accepted, position, result) = accept_batches(at(4), chunks);
        assert_eq!(result, Ok(()));
        assert_eq!(position, at(6));
        assert_eq!(accepted.len(), 1);
        assert_eq!((accepted[0].0, accepted[0].1.base_offset()), (at(4), at(3)));
    }

    #[test]
    fn gap_is_reported_and_batches_before_it_are_kept() {
        let (accepted, position, result) = accept_batches(at(0), vec![batch(0, 2).to_bytes(), batch(3, 1).to_bytes()]);
        assert_eq!((accepted.len(), position, result), (1, at(2), Err(InvalidResponse::Gap(at(3)))));
    }

    #[test]
    fn flipped_bit_or_truncated_end_is_rejected() {
        let good = batch(0, 2).to_bytes();
        for bit in 0..good.len() * 8 {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            let (accepted, ..) = accept_batches(Offset::ZERO, vec![bad.into()]);
            // The broker sets bytes 0..8 and 12..16; the CRC does not cover them.
            let unchecked = bit / 8 < 8 || (12..16).contains(&(bit / 8));
            assert!(unchecked || accepted.is_empty(), "bit {bit}");
        }
        let (accepted, _, result) = accept_batches(Offset::ZERO, vec![good.slice(..good.len() - 1)]);
        assert!(
            accepted.is_empty() && matches!(result, Err(InvalidResponse::Malformed(MalformedBatch::Truncated { .. })))
        );
    }
}
