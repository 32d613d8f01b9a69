//! In-flight batches of one partition: the batches that the task has taken, from the first send to the last response.
//! Pure: it decides which batches are sent again, in which order and under which sequences. The task sends them.
//!
//! # The rules
//!
//! 1. At most `window` batches are taken, counted from the oldest batch without a final result. Acknowledged batches
//!    behind it count as well. A broker remembers the last `window` batches that it appended
//!    (`limits::MAX_BATCHES_PER_PRODUCER`; 16 if its memory for producers is used up), and detects a repetition of any
//!    of them.
//! 2. If a batch fails and may be repeated, nothing more is sent until each in-flight batch has a response or has lost
//!    its stream. Then all unacknowledged batches are sent again, in their first order and with their first sequences.
//!    The broker refuses batches behind a failed batch as out of order, or with the error of the failed batch. These
//!    errors are expected.
//! 3. A batch that fails leaves a gap in the sequence. If it was certainly not appended, and no attempt of a later
//!    batch can still arrive, the later batches move up. Otherwise they continue under a new producer id. Those that
//!    may have been appended, or may still be, fail as well, because no broker could detect their repetition.
//! 4. A broker that has no state of the producer, or lacks a batch before the first in-flight batch, has lost state.
//!    The batches then continue under a new producer id, as in rule 3.
//! 5. Without idempotence one batch is in flight at a time, which preserves the order. After a lost response the batch
//!    is repeated and may be duplicated. With `acks=0` a batch that may have been sent is never repeated.

use std::{collections::VecDeque, sync::Arc};

use tokio::time::Instant;

use super::{
    completion::Completion,
    lane::{Body, Sealed},
};
use crate::{
    proto::error::{ApiError, ErrorCode},
    record::{Batch, ProducerSequence},
};

/// Producer id and epoch that a broker assigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) id: i64,
    pub(super) epoch: i16,
}

/// Delivery guarantee: the permitted reaction to a lost response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guarantee {
    /// Exactly once, in order.
    Idempotent,
    /// In order; duplicates are possible.
    AtLeastOnce,
    /// At most once; no repetition.
    AtMostOnce,
}

#[derive(Debug)]
struct Entry {
    /// Encoded batch; `None` before the first send.
    batch: Option<Batch>,
    body: Option<Body>,
    /// Number of batches taken before this batch.
    place: u64,
    sequence: i32,
    count: u32,
    completion: Arc<Completion>,
    permits: u32,
    deadline: Instant,
    /// Attempt in flight.
    sent: Option<Sent>,
    /// True if a response was lost: the broker may have appended the batch.
    maybe_appended: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sent {
    stream: u64,
    correlation: u64,
    /// Sequence of this attempt; the sequence of the entry may have changed since.
    sequence: i32,
}

/// Batch that needs no more work.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) completion: Arc<Completion>,
    pub(super) permits: u32,
    pub(super) count: u32,
}

/// Failed batch, with the reason.
#[derive(Debug)]
pub(super) struct GivenUp {
    pub(super) done: Done,
    pub(super) why: Why,
}

/// Reason for the failure of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why {
    Refused(ApiError),
    Expired { maybe_appended: bool },
    Unknown,
    Build(crate::record::BuildError),
}

/// Outcome of a response.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The batch is acknowledged.
    Done(Done),
    /// The batch will be sent again; the leader may have changed.
    Again,
    /// These batches failed.
    GivenUp(Vec<GivenUp>),
    /// The response belongs to an attempt that is no longer in flight.
    Stale,
}

/// Next action of the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Send this entry.
    Send(usize),
    /// Take another batch: all taken batches are in flight, and there is room.
    Take,
    /// Wait for a response.
    Wait,
    /// Wait for the end of the pause, then call [`Flight::resume`].
    Resume,
    /// Request a new producer id from a broker, then call [`Flight::identify`].
    Identify,
}

#[derive(Debug)]
pub(super) struct Flight {
    guarantee: Guarantee,
    window: usize,
    identity: Option<Identity>,
    next_sequence: i32,
    /// Number of batches taken so far.
    taken: u64,
    entries: VecDeque<Entry>,
    /// True after a failure: nothing is sent until no batch is in flight.
    draining: bool,
    /// True if the sequence has a gap that only a new producer id can close.
    reidentify: bool,
}

impl Flight {
    pub(super) fn new(guarantee: Guarantee, window: usize, identity: Option<Identity>) -> Self {
        let window = if guarantee == Guarantee::AtLeastOnce { 1 } else { window };
        Self {
            guarantee,
            window,
            identity,
            next_sequence: 0,
            taken: 0,
            entries: VecDeque::new(),
            draining: false,
            reidentify: false,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn under_way(&self) -> usize {
        self.entries.iter().filter(|entry| entry.sent.is_some()).count()
    }

    pub(super) fn next(&self) -> Next {
        if self.draining {
            return match (self.under_way(), self.reidentify) {
                (0, true) => Next::Identify,
                (0, false) => Next::Resume,
                _ => Next::Wait,
            };
        }
        match self.entries.iter().position(|entry| entry.sent.is_none()) {
            Some(index) => Next::Send(index),
            None if self.has_room() => Next::Take,
            None => Next::Wait,
        }
    }

    /// Returns true if, after one more batch, the oldest batch without a result is still among the last `window`.
    fn has_room(&self) -> bool {
        self.entries.front().is_none_or(|oldest| self.taken - oldest.place < self.window as u64)
    }

    pub(super) fn take(&mut self, sealed: Sealed) {
        let sequence = self.next_sequence;
        self.next_sequence = after(sequence, sealed.count);
        self.entries.push_back(Entry {
            batch: None,
            body: Some(sealed.body),
            place: self.taken,
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

    /// Returns the encoded batch of an entry. The entry is in flight from now on.
    pub(super) fn send(&mut self, index: usize, stream: u64, correlation: u64) -> Result<Batch, GivenUp> {
        let stamp = self.stamp(self.entries[index].sequence);
        let entry = &mut self.entries[index];
        if let Some(body) = entry.body.take() {
            match body.stamped(stamp) {
                Ok(batch) => entry.batch = Some(batch),
                Err(error) => {
                    let entry = self.remove(index);
                    self.close_gap(index, &entry);
                    return Err(entry.given_up(Why::Build(error)));
                }
            }
        }
        let batch = entry.batch.as_mut().expect("made above or before");
        if batch.producer() != stamp {
            batch.set_producer(stamp);
        }
        entry.sent = Some(Sent { stream, correlation, sequence: entry.sequence });
        Ok(batch.clone())
    }

    /// Processes a response.
    pub(super) fn answered(&mut self, stream: u64, correlation: u64, answer: Result<(), ApiError>) -> Verdict {
        let this = |sent: &Sent| sent.stream == stream && sent.correlation == correlation;
        let found = self.entries.iter().position(|entry| entry.sent.as_ref().is_some_and(this));
        let Some(index) = found else { return Verdict::Stale };
        let fault = match answer {
            Ok(()) => return Verdict::Done(self.remove(index).done()),
            Err(fault) => fault,
        };
        if self.repeatable(index, &fault) {
            self.reidentify |= self.entries[index].come_back(outcome_unknown(fault.code));
            self.draining = true;
            return Verdict::Again;
        }
        if fault.code == ErrorCode::ProducerFenced && self.guarantee == Guarantee::Idempotent {
            return Verdict::GivenUp(
                self.entries.drain(..).map(|entry| entry.given_up(Why::Refused(fault.clone()))).collect(),
            );
        }
        let entry = self.remove(index);
        self.close_gap(index, &entry);
        Verdict::GivenUp(vec![entry.given_up(Why::Refused(fault))])
    }

    fn repeatable(&mut self, index: usize, fault: &ApiError) -> bool {
        match fault.code {
            ErrorCode::OutOfOrderSequence | ErrorCode::UnknownProducer if self.guarantee == Guarantee::Idempotent => {
                // Behind another batch, the error is the effect of that batch's failure. While draining, the attempt
                // may have used a sequence that has changed since. The batch is sent again in both cases. Otherwise the
                // broker has lost earlier batches.
                self.reidentify |= index == 0 && !self.draining;
                true
            }
            reason if self.guarantee == Guarantee::AtMostOnce => fault.retryable && !outcome_unknown(reason),
            _ => fault.retryable,
        }
    }

    /// Processes the end of a stream. `delivered`: the broker may have received the batches in flight on it.
    pub(super) fn lost(&mut self, stream: u64, delivered: bool) -> Vec<GivenUp> {
        let mut given_up = Vec::new();
        let lost = |entry: &Entry| entry.sent.is_some_and(|sent| sent.stream == stream);
        if !self.entries.iter().any(lost) {
            return given_up;
        }
        self.draining = true;
        if delivered && self.guarantee == Guarantee::AtMostOnce {
            let (gone, kept) = self.entries.drain(..).partition::<VecDeque<_>, _>(lost);
            self.entries = kept;
            given_up.extend(gone.into_iter().map(|entry| entry.given_up(Why::Unknown)));
            return given_up;
        }
        for entry in self.entries.iter_mut().filter(|entry| lost(entry)) {
            self.reidentify |= entry.come_back(delivered);
        }
        given_up
    }

    /// Fails batches whose delivery timeout has passed. A batch in flight must lose its stream first.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<GivenUp> {
        let mut given_up = Vec::new();
        while self.entries.front().is_some_and(|entry| entry.deadline <= now && entry.sent.is_none()) {
            let entry = self.remove(0);
            self.close_gap(0, &entry);
            let maybe_appended = entry.maybe_appended;
            given_up.push(entry.given_up(Why::Expired { maybe_appended }));
        }
        given_up
    }

    /// Returns the time at which the oldest batch expires, and the stream of that batch if it is in flight.
    pub(super) fn deadline(&self) -> Option<(Instant, Option<u64>)> {
        let entry = self.entries.front()?;
        Some((entry.deadline, entry.sent.map(|sent| sent.stream)))
    }

    /// Ends the drain after a failure, once the pause is over.
    pub(super) fn resume(&mut self) {
        debug_assert_eq!(self.next(), Next::Resume, "answers are out, or a new id is needed");
        self.draining = false;
    }

    /// Sets a new producer id. Batches that were certainly not appended continue under it; batches that may have been
    /// appended fail.
    pub(super) fn identify(&mut self, identity: Identity) -> Vec<GivenUp> {
        debug_assert_eq!(self.under_way(), 0, "a new id while answers are out");
        self.identity = Some(identity);
        self.reidentify = false;
        let (unsure, kept) = self.entries.drain(..).partition::<VecDeque<_>, _>(|entry| entry.maybe_appended);
        self.entries = kept;
        self.number_from(0, 0);
        self.draining = false;
        unsure.into_iter().map(|entry| entry.given_up(Why::Unknown)).collect()
    }

    /// Removes and returns all batches, without a result.
    pub(super) fn abandon(&mut self) -> Vec<Done> {
        self.entries.drain(..).map(Entry::done).collect()
    }

    pub(super) fn waiting(&self) -> impl Iterator<Item = &Arc<Completion>> {
        self.entries.iter().map(|entry| &entry.completion)
    }

    fn stamp(&self, base_sequence: i32) -> Option<ProducerSequence> {
        let identity = self.identity.filter(|_| self.guarantee == Guarantee::Idempotent)?;
        Some(ProducerSequence { id: identity.id, epoch: identity.epoch, base_sequence })
    }

    fn remove(&mut self, index: usize) -> Entry {
        self.entries.remove(index).expect("the index is of an entry")
    }

    /// Applies rule 3 after the batch at `index` was removed.
    fn close_gap(&mut self, index: usize, gone: &Entry) {
        if self.guarantee != Guarantee::Idempotent {
            return;
        }
        let on_the_way = self.entries.iter().skip(index).any(|entry| entry.maybe_appended);
        if gone.maybe_appended || on_the_way {
            // This also holds without a later batch: the next batch must not use the sequence of a batch that may be in
            // the log.
            self.draining = true;
            self.reidentify = true;
        } else {
            // The broker refuses later batches in flight as out of order; they are sent again under their new
            // sequences.
            self.draining |= self.under_way() > 0;
            self.number_from(index, gone.sequence);
        }
    }

    /// Assigns dense sequences to the entries from `index` on.
    fn number_from(&mut self, index: usize, mut sequence: i32) {
        for entry in self.entries.iter_mut().skip(index) {
            entry.sequence = sequence;
            sequence = after(sequence, entry.count);
        }
        self.next_sequence = sequence;
    }
}

impl Entry {
    /// Ends the attempt in flight without an acknowledgement. `unknown`: the batch may have been appended, or may still
    /// be. Returns true if it may have been appended under a sequence that now belongs to another batch: only a new
    /// producer id separates the two.
    fn come_back(&mut self, unknown: bool) -> bool {
        let sent = self.sent.take();
        self.maybe_appended |= unknown;
        unknown && sent.is_some_and(|sent| sent.sequence != self.sequence)
    }

    fn done(self) -> Done {
        Done { completion: self.completion, permits: self.permits, count: self.count }
    }

    fn given_up(self, why: Why) -> GivenUp {
        GivenUp { done: self.done(), why }
    }
}

/// Returns the sequence `count` records after `sequence`; 2^31 - 1 is followed by 0 (KIP-98).
fn after(sequence: i32, count: u32) -> i32 {
    let next = (u64::from(sequence.cast_unsigned()) + u64::from(count)) & 0x7fff_ffff;
    i32::try_from(next).expect("masked to 31 bits")
}

/// Returns true if a broker that responds with this error may have appended the batch, or may still append it.
fn outcome_unknown(reason: ErrorCode) -> bool {
    !matches!(
        reason,
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
#[path = "flight_tests.rs"]
mod tests;
