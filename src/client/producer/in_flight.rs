//! In-flight batches of one partition: the batches that the task has taken from the partition queue and that have no
//! final result yet. Pure: this module decides which batches are sent again, in which order and under which sequences.
//! The producer's task sends them.
//!
//! # The rules
//!
//! 1. At most `window` batches are taken, counted from the oldest batch without a final result. Acknowledged batches
//!    behind it count as well. The broker detects a repetition of a batch only among the last
//!    `limits::MAX_BATCHES_PER_PRODUCER` that it appended (16 if its memory for producers is used up). So `window` must
//!    not be larger.
//! 2. If a batch fails and may be repeated, nothing more is sent until each sent batch has a response or has lost its
//!    stream (*draining*). Then all unacknowledged batches are sent again, in their first order and with their first
//!    sequences. Meanwhile the broker refuses batches behind a failed batch as out of order, or with the error of the
//!    failed batch. These errors are expected.
//! 3. A batch that fails leaves a gap in the sequence. If no attempt of this or a later batch had an unknown outcome,
//!    the sequences of the later batches are reduced by the gap. The broker refuses later batches in flight as out of
//!    order, and they are sent again under their new sequences. If an attempt had an unknown outcome, the later batches
//!    continue under a new producer id. Of these, the batches that may have been appended, or may still be, fail as
//!    well, because no broker could detect their repetition under the new id.
//! 4. A broker that has no state of the producer, or lacks a batch before the first in-flight batch, has lost state.
//!    The batches then continue under a new producer id, as in rule 3.
//! 5. Without idempotence, but with acknowledgements, one batch is in flight at a time, which preserves the order.
//!    After a lost response the batch is repeated and may be duplicated. With `acks=0` a batch that may have been
//!    appended is never repeated.

use std::{collections::VecDeque, sync::Arc};

use tokio::time::Instant;

use super::{
    completion::Completion,
    partition_queue::{BatchBody, SealedBatch},
};
use crate::{
    proto::error::{ApiError, ErrorCode},
    record::{Batch, ProducerSequence},
};

/// Producer id and epoch that a broker assigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProducerIdAndEpoch {
    pub(super) id: i64,
    pub(super) epoch: i16,
}

/// Delivery guarantee: the permitted reaction to a lost response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeliveryGuarantee {
    /// Exactly once, in order.
    Idempotent,
    /// In order; duplicates are possible.
    AtLeastOnce,
    /// At most once; no repetition.
    AtMostOnce,
}

/// Batch that was taken and has no final result.
#[derive(Debug)]
struct InFlightBatch {
    /// Encoded batch; `None` before the first send.
    batch: Option<Batch>,
    /// Content until the first send.
    body: Option<BatchBody>,
    /// Number of batches taken before this batch.
    number: u64,
    /// Sequence of the first record in the next attempt.
    sequence: i32,
    count: u32,
    completion: Arc<Completion>,
    permits: u32,
    deadline: Instant,
    /// Attempt in flight; `None` while no response is expected.
    sent: Option<SentBatch>,
    /// True if the outcome of an attempt is unknown: the broker may have appended the batch, or may still append it.
    maybe_appended: bool,
}

/// Attempt to send a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SentBatch {
    stream: u64,
    correlation_id: u64,
    /// Sequence of this attempt. [`InFlightBatch::sequence`] may have changed since.
    sequence: i32,
}

/// Batch whose result is decided. The task completes it and releases its memory.
#[derive(Debug)]
pub(super) struct CompletedBatch {
    pub(super) completion: Arc<Completion>,
    pub(super) permits: u32,
    pub(super) count: u32,
}

impl From<SealedBatch> for CompletedBatch {
    fn from(sealed: SealedBatch) -> Self {
        Self { completion: sealed.completion, permits: sealed.permits, count: sealed.count }
    }
}

/// Failed batch, with the reason.
#[derive(Debug)]
pub(super) struct FailedBatch {
    pub(super) batch: CompletedBatch,
    pub(super) reason: FailureReason,
}

/// Reason for the failure of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FailureReason {
    /// A broker's error that is not retried.
    Refused(ApiError),
    /// The delivery timeout passed.
    Expired { maybe_appended: bool },
    /// The batch may have been appended, and another attempt could append it twice.
    Unknown,
    /// The batch could not be encoded.
    Build(crate::record::BuildError),
}

/// Outcome of a response for the batches.
#[derive(Debug)]
pub(super) enum ResponseOutcome {
    /// The batch is acknowledged.
    Completed(CompletedBatch),
    /// The batch will be sent again; the leader may have changed.
    Retry,
    /// These batches failed.
    Failed(Vec<FailedBatch>),
    /// The response belongs to an attempt that is no longer in flight.
    Stale,
}

/// Next action of the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NextAction {
    /// Send this entry.
    Send(usize),
    /// Take another batch: all taken batches are sent, and the window is not full.
    Take,
    /// Wait for a response.
    Wait,
    /// Wait for the end of the pause, then call [`InFlightBatches::resume`].
    Resume,
    /// Request a new producer id from a broker, then call [`InFlightBatches::set_producer_id`].
    RequestId,
}

/// In-flight batches of one partition.
#[derive(Debug)]
pub(super) struct InFlightBatches {
    guarantee: DeliveryGuarantee,
    window: usize,
    identity: Option<ProducerIdAndEpoch>,
    next_sequence: i32,
    /// Number of batches taken so far.
    taken: u64,
    entries: VecDeque<InFlightBatch>,
    /// True after a failure (rule 2): nothing is sent until each sent batch has a response or has lost its stream.
    draining: bool,
    /// True if the sequence has a gap that only a new producer id can close.
    needs_new_id: bool,
}

impl InFlightBatches {
    /// Creates the state without batches. `window` is the maximum number of batches in flight. Without idempotence and
    /// with acknowledgements it is always 1, because rule 5 requires this for the order. `identity` is `None` without
    /// idempotence.
    pub(super) fn new(guarantee: DeliveryGuarantee, window: usize, identity: Option<ProducerIdAndEpoch>) -> Self {
        let window = if guarantee == DeliveryGuarantee::AtLeastOnce { 1 } else { window };
        Self {
            guarantee,
            window,
            identity,
            next_sequence: 0,
            taken: 0,
            entries: VecDeque::new(),
            draining: false,
            needs_new_id: false,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn in_flight_count(&self) -> usize {
        self.entries.iter().filter(|entry| entry.sent.is_some()).count()
    }

    /// Returns the next action of the task.
    pub(super) fn next(&self) -> NextAction {
        if self.draining {
            return match (self.in_flight_count(), self.needs_new_id) {
                (0, true) => NextAction::RequestId,
                (0, false) => NextAction::Resume,
                _ => NextAction::Wait,
            };
        }
        match self.entries.iter().position(|entry| entry.sent.is_none()) {
            Some(index) => NextAction::Send(index),
            None if self.has_capacity() => NextAction::Take,
            None => NextAction::Wait,
        }
    }

    /// Returns true if, after one more batch, the oldest batch without a result is still among the last `window`
    /// batches taken. A broker detects duplicates only of these batches.
    fn has_capacity(&self) -> bool {
        self.entries.front().is_none_or(|oldest| self.taken - oldest.number < self.window as u64)
    }

    /// Adds a batch behind the batches taken before, with the next sequence.
    pub(super) fn take(&mut self, sealed: SealedBatch) {
        let sequence = self.next_sequence;
        self.next_sequence = after(sequence, sealed.count);
        self.entries.push_back(InFlightBatch {
            batch: None,
            body: Some(sealed.body),
            number: self.taken,
            sequence,
            count: sealed.count,
            completion: sealed.completion,
            permits: sealed.permits,
            deadline: sealed.deadline,
            sent: None,
            maybe_appended: false,
        });
        self.taken += 1;
    }

    /// Returns the encoded batch of an entry, which is then in flight. If the batch cannot be built, the entry is
    /// removed and fails.
    pub(super) fn send(&mut self, index: usize, stream: u64, correlation_id: u64) -> Result<Batch, FailedBatch> {
        let sequence = self.producer_sequence(self.entries[index].sequence);
        let entry = &mut self.entries[index];
        if let Some(body) = entry.body.take() {
            match body.into_batch(sequence) {
                Ok(batch) => entry.batch = Some(batch),
                Err(error) => {
                    let entry = self.remove(index);
                    self.close_gap(index, &entry);
                    return Err(entry.into_failed(FailureReason::Build(error)));
                }
            }
        }
        let batch = entry.batch.as_mut().expect("encoded above or in an earlier send");
        if batch.producer() != sequence {
            batch.set_producer(sequence);
        }
        entry.sent = Some(SentBatch { stream, correlation_id, sequence: entry.sequence });
        Ok(batch.clone())
    }

    /// Processes a response: the batch is acknowledged, fails, or is sent again once no batch is in flight (rule 2). If
    /// the producer is fenced, all batches fail. A response to an attempt that is no longer in flight changes nothing.
    pub(super) fn on_response(
        &mut self,
        stream: u64,
        correlation_id: u64,
        result: Result<(), ApiError>,
    ) -> ResponseOutcome {
        let is_match = |sent: &SentBatch| sent.stream == stream && sent.correlation_id == correlation_id;
        let position = self.entries.iter().position(|entry| entry.sent.as_ref().is_some_and(is_match));
        let Some(index) = position else { return ResponseOutcome::Stale };
        let error = match result {
            Ok(()) => return ResponseOutcome::Completed(self.remove(index).into_completed()),
            Err(error) => error,
        };
        if self.check_repeatable(index, &error) {
            self.needs_new_id |= self.entries[index].end_attempt(outcome_unknown(error.code));
            self.draining = true;
            return ResponseOutcome::Retry;
        }
        if error.code == ErrorCode::ProducerFenced && self.guarantee == DeliveryGuarantee::Idempotent {
            return ResponseOutcome::Failed(
                self.entries.drain(..).map(|entry| entry.into_failed(FailureReason::Refused(error.clone()))).collect(),
            );
        }
        let entry = self.remove(index);
        self.close_gap(index, &entry);
        ResponseOutcome::Failed(vec![entry.into_failed(FailureReason::Refused(error))])
    }

    /// Returns true if the batch may be sent again after this error. Also sets `needs_new_id` if the broker has lost
    /// the producer's state (rule 4).
    fn check_repeatable(&mut self, index: usize, error: &ApiError) -> bool {
        match error.code {
            ErrorCode::OutOfOrderSequence | ErrorCode::UnknownProducer
                if self.guarantee == DeliveryGuarantee::Idempotent =>
            {
                // Behind another batch, the error is the effect of that batch's failure. While draining, the attempt
                // may have used a sequence that has changed since. In both cases sending the batch again suffices. In
                // all other cases the broker has lost earlier batches.
                self.needs_new_id |= index == 0 && !self.draining;
                true
            }
            code if self.guarantee == DeliveryGuarantee::AtMostOnce => error.retryable && !outcome_unknown(code),
            _ => error.retryable,
        }
    }

    /// Processes the end of a stream. `delivered` is true if the broker may have received the batches in flight on it.
    /// Returns the batches that fail: none, except with `acks=0`.
    pub(super) fn on_stream_lost(&mut self, stream: u64, delivered: bool) -> Vec<FailedBatch> {
        let mut failed = Vec::new();
        let is_lost = |entry: &InFlightBatch| entry.sent.is_some_and(|sent| sent.stream == stream);
        if !self.entries.iter().any(is_lost) {
            return failed;
        }
        self.draining = true;
        if delivered && self.guarantee == DeliveryGuarantee::AtMostOnce {
            let (removed, remaining) = self.entries.drain(..).partition::<VecDeque<_>, _>(is_lost);
            self.entries = remaining;
            failed.extend(removed.into_iter().map(|entry| entry.into_failed(FailureReason::Unknown)));
            return failed;
        }
        for entry in self.entries.iter_mut().filter(|entry| is_lost(entry)) {
            self.needs_new_id |= entry.end_attempt(delivered);
        }
        failed
    }

    /// Fails the oldest batches whose delivery timeout has passed, up to the first batch that is sent. That batch must
    /// get a response or lose its stream first.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<FailedBatch> {
        let mut failed = Vec::new();
        while self.entries.front().is_some_and(|entry| entry.deadline <= now && entry.sent.is_none()) {
            let entry = self.remove(0);
            self.close_gap(0, &entry);
            let maybe_appended = entry.maybe_appended;
            failed.push(entry.into_failed(FailureReason::Expired { maybe_appended }));
        }
        failed
    }

    /// Returns the time at which the oldest batch expires, and the stream on which it is sent, if it is. Returns `None`
    /// without batches.
    pub(super) fn deadline(&self) -> Option<(Instant, Option<u64>)> {
        let entry = self.entries.front()?;
        Some((entry.deadline, entry.sent.map(|sent| sent.stream)))
    }

    /// Ends the drain after a failure, once the pause is over.
    pub(super) fn resume(&mut self) {
        debug_assert_eq!(self.next(), NextAction::Resume, "batches are in flight, or a new producer id is needed");
        self.draining = false;
    }

    /// Sets a new producer id and ends the drain. Batches that were certainly not appended continue under the new id,
    /// with sequences from 0. Removes and returns the batches that may have been appended, which fail.
    pub(super) fn set_producer_id(&mut self, identity: ProducerIdAndEpoch) -> Vec<FailedBatch> {
        debug_assert_eq!(self.in_flight_count(), 0, "a new producer id while batches are in flight");
        self.identity = Some(identity);
        self.needs_new_id = false;
        let (maybe_appended, remaining) =
            self.entries.drain(..).partition::<VecDeque<_>, _>(|entry| entry.maybe_appended);
        self.entries = remaining;
        self.renumber_from(0, 0);
        self.draining = false;
        maybe_appended.into_iter().map(|entry| entry.into_failed(FailureReason::Unknown)).collect()
    }

    /// Removes and returns all batches. The caller sets their results.
    pub(super) fn abandon(&mut self) -> Vec<CompletedBatch> {
        self.entries.drain(..).map(InFlightBatch::into_completed).collect()
    }

    pub(super) fn completions(&self) -> impl Iterator<Item = &Arc<Completion>> {
        self.entries.iter().map(|entry| &entry.completion)
    }

    /// Returns the producer fields of a batch with this sequence; `None` without idempotence.
    fn producer_sequence(&self, base_sequence: i32) -> Option<ProducerSequence> {
        let identity = self.identity.filter(|_| self.guarantee == DeliveryGuarantee::Idempotent)?;
        Some(ProducerSequence { id: identity.id, epoch: identity.epoch, base_sequence })
    }

    fn remove(&mut self, index: usize) -> InFlightBatch {
        self.entries.remove(index).expect("the index belongs to an entry")
    }

    /// Applies rule 3 after the batch at `index` was removed.
    fn close_gap(&mut self, index: usize, removed: &InFlightBatch) {
        if self.guarantee != DeliveryGuarantee::Idempotent {
            return;
        }
        let may_arrive = self.entries.iter().skip(index).any(|entry| entry.maybe_appended);
        if removed.maybe_appended || may_arrive {
            // A new id is needed even without a later batch. The next batch must not use the sequence of a batch that
            // may be in the log.
            self.draining = true;
            self.needs_new_id = true;
        } else {
            // The broker refuses later batches in flight as out of order; they are sent again under their new
            // sequences.
            self.draining |= self.in_flight_count() > 0;
            self.renumber_from(index, removed.sequence);
        }
    }

    /// Assigns dense sequences to the entries from `index` on.
    fn renumber_from(&mut self, index: usize, mut sequence: i32) {
        for entry in self.entries.iter_mut().skip(index) {
            entry.sequence = sequence;
            sequence = after(sequence, entry.count);
        }
        self.next_sequence = sequence;
    }
}

impl InFlightBatch {
    /// Ends the attempt in flight without an acknowledgement. `maybe_appended` is true if the batch may have been
    /// appended, or may still be. Returns true if the batch may have been appended under a sequence that now belongs to
    /// another batch. Only a new producer id separates the two batches.
    fn end_attempt(&mut self, maybe_appended: bool) -> bool {
        let sent = self.sent.take();
        self.maybe_appended |= maybe_appended;
        maybe_appended && sent.is_some_and(|sent| sent.sequence != self.sequence)
    }

    fn into_completed(self) -> CompletedBatch {
        CompletedBatch { completion: self.completion, permits: self.permits, count: self.count }
    }

    fn into_failed(self, reason: FailureReason) -> FailedBatch {
        FailedBatch { batch: self.into_completed(), reason }
    }
}

/// Returns the sequence `count` records after `sequence`; 2^31 - 1 is followed by 0 (KIP-98).
fn after(sequence: i32, count: u32) -> i32 {
    let next = (u64::from(sequence.cast_unsigned()) + u64::from(count)) & 0x7fff_ffff;
    i32::try_from(next).expect("masked to 31 bits")
}

/// Returns true if a broker that responds with this error may have appended the batch, or may still append it.
fn outcome_unknown(code: ErrorCode) -> bool {
    !matches!(
        code,
        ErrorCode::NotLeader
            | ErrorCode::OutOfOrderSequence
            | ErrorCode::UnknownProducer
            | ErrorCode::Overloaded
            | ErrorCode::DiskFull
            | ErrorCode::UnknownTopic
            | ErrorCode::UnknownPartition
            | ErrorCode::TopicIdMismatch
            | ErrorCode::ObjectStoreUnavailable
    )
}

#[cfg(test)]
mod tests;
