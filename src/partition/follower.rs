//! A follower's decisions: the start of a subscription, the batches to append, and the high watermark. Pure.
//!
//! # Overview
//!
//! One [`Follower`] is one replica under one leader in one epoch. The actor calls it:
//!
//! ```text
//!           subscribe              response: Accepted            batches ─▶ append ─▶ appended
//!   idle ───────────▶ subscribing ────────────────▶ following ──────────────────────────╮
//!    ▲                    │ Diverged, Bootstrap         │  ▲                            │
//!    ╰─ truncate, reset ◀─╯                             │  ╰────────────────────────────╯
//!    ╰──────────── link lost, violation, failed append ─╯
//! ```
//!
//! # Rules
//!
//! - The follower truncates only where the leader's epoch history and its own diverge. No high watermark selects that
//!   offset.
//! - The follower truncates below its high watermark only if committed records may have been lost in an epoch above the
//!   last epoch of the log. The cause is an unclean election, or an unclean shutdown of the only eligible replica.
//!   Otherwise the leader has all records below that high watermark, so a response that requires a lower truncation is
//!   wrong. The replica then keeps its log and reports the error.
//! - The follower appends only batches that the leader sent in the followed epoch, and that continue the log without
//!   gap, overlap or decreasing batch epoch.
//! - The follower raises its high watermark to the minimum of the leader's high watermark and its own log end. The
//!   follower does so only after the leader has accepted the subscription, because this log is then a prefix of the
//!   leader's. A bootstrap also raises the high watermark, to the new start of the log.
//!
//! Messages of a leader are input. A message that cannot be applied is a [`ProtocolViolation`]: log and high watermark
//! stay unchanged, and the follower may have to subscribe again.

use super::leader::divergence::{LogPosition, SubscribeOutcome};
use crate::{
    log::EpochHistory,
    model::{BrokerId, LeaderEpoch, Offset},
};

/// Fields of a batch that are checked before an append.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BatchHeader {
    /// First offset of the batch.
    pub base: Offset,
    /// Offset after the last record.
    pub end: Offset,
    /// Leader epoch stamped on the batch.
    pub epoch: LeaderEpoch,
}

/// Action that the actor has to take after a message of the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FollowerAction {
    /// The leader accepted the subscription: this log is a prefix of the leader's and ends at this offset. Acknowledge
    /// that end; batches follow.
    Follow(Offset),
    /// Truncate the log at this offset, then subscribe again.
    Truncate(Offset),
    /// Reset the log to this offset, or to a later one where the object store ends, with the tables of that offset.
    /// Then call [`Follower::on_reset`] and subscribe again.
    Bootstrap(Offset),
    /// Append the batches, then call [`Follower::on_appended`].
    Append,
    /// The message had no batches, only a high watermark: there is nothing to append.
    Ignore,
    /// The leader rejected the subscription: subscribe again after a pause.
    RetryLater,
}

/// A message of the leader that the follower cannot apply, because it is late, early or invalid. The actor ignores a
/// late message. After most other violations it subscribes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ProtocolViolation {
    /// The message is of an older epoch than the followed one.
    #[error("late message of leader epoch {got}: this replica follows in leader epoch {follows}")]
    OldEpoch {
        /// Epoch of the message.
        got: LeaderEpoch,
        /// Followed epoch.
        follows: LeaderEpoch,
    },
    /// The message is of a newer epoch than the followed one: this broker has not received that metadata yet.
    #[error(
        "message of leader epoch {got}, newer than the followed leader epoch {follows}: the metadata has not arrived \
         yet"
    )]
    NewEpoch {
        /// Epoch of the message.
        got: LeaderEpoch,
        /// Followed epoch.
        follows: LeaderEpoch,
    },
    /// A response without a pending subscription, or batches without an accepted one.
    #[error("the leader sent an unrequested message")]
    Unexpected,
    /// Offsets are missing before a batch.
    #[error("offsets are missing: offset {expected} is next, and the leader sent offset {got}")]
    Gap {
        /// Next expected offset.
        expected: Offset,
        /// First offset of the batch.
        got: Offset,
    },
    /// A batch repeats offsets, or is empty.
    #[error("offsets overlap, or a batch is empty: offset {expected} is next, and the leader sent offset {got}")]
    Overlap {
        /// Next expected offset.
        expected: Offset,
        /// First offset of the batch, or its end if that is lower.
        got: Offset,
    },
    /// The epoch of a batch is below that of the batch before it.
    #[error("the batch at offset {at} has leader epoch {got}, older than leader epoch {last} of the batch before it")]
    EpochDecreased {
        /// First offset of the batch.
        at: Offset,
        /// Epoch of the batch before it.
        last: LeaderEpoch,
        /// Epoch of the batch.
        got: LeaderEpoch,
    },
    /// The epoch of a batch is above that of the leader that sent it.
    #[error("the batch at offset {at} has leader epoch {got}, newer than epoch {follows} of the leader that sent it")]
    EpochAboveLeader {
        /// First offset of the batch.
        at: Offset,
        /// Epoch of the batch.
        got: LeaderEpoch,
        /// Followed epoch.
        follows: LeaderEpoch,
    },
    /// The response requires a truncation that removes nothing, or accepts another log end than the reported one.
    #[error("the leader's response names offset {got}, and the log of this replica ends at offset {log_end}")]
    InvalidResponse {
        /// Offset in the response.
        got: Offset,
        /// Log end of the replica.
        log_end: Offset,
    },
    /// Committed records would be truncated, and no unclean election explains the loss.
    #[error(
        "the log diverges from the leader's at offset {to}, below the high watermark {high_watermark}, and no unclean \
         election is recorded: the replica is not truncated"
    )]
    TruncateBelowCommitted {
        /// Offset of the truncation.
        to: Offset,
        /// High watermark of the replica.
        high_watermark: Offset,
    },
    /// The log would be reset below the high watermark, and no unclean election explains the loss. A leader requests
    /// that while its disk still holds segments below its log start. After their removal it responds to the next
    /// subscription with a later offset.
    #[error(
        "the leader asks this replica to restart its log at offset {at}, below the high watermark {high_watermark} of \
         this replica"
    )]
    BootstrapBelowCommitted {
        /// Offset of the reset.
        at: Offset,
        /// High watermark of the replica.
        high_watermark: Offset,
    },
}

/// Stage of the subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum FollowerStage {
    /// No subscription is pending or accepted: the log is being changed, the link is lost, or the next subscription
    /// waits for a pause.
    Idle,
    /// The leader's response is due. The value is the log end that the subscription reported.
    Subscribing(Offset),
    /// The leader accepted the subscription. `next` is the next offset that the leader sends, and `last` the epoch of
    /// the batch before `next`; `None` if there is no such batch. All records below `appended_end` are in the log.
    Following { next: Offset, appended_end: Offset, last: Option<LeaderEpoch> },
}

/// One replica under one leader in one epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Follower {
    leader: BrokerId,
    epoch: LeaderEpoch,
    /// Newest epoch before which committed records may have been lost, by the partition's value; `None` if there is
    /// none.
    unclean: Option<LeaderEpoch>,
    /// True if committed records may be truncated. This is so if, at the first subscription in this epoch, the log was
    /// empty or its last epoch was older than `unclean`. `None` before the first subscription.
    may_lose_committed: Option<bool>,
    stage: FollowerStage,
    /// Newest high watermark that the leader sent.
    leader_high_watermark: Offset,
    /// High watermark of the replica. Falls only by a truncation or reset after an unclean election.
    high_watermark: Offset,
}

impl Follower {
    /// Creates a follower of `leader` in `epoch`. `high_watermark` is the replica's own; `unclean` is the
    /// `unclean_epoch` of the partition's value.
    pub fn new(leader: BrokerId, epoch: LeaderEpoch, high_watermark: Offset, unclean: Option<LeaderEpoch>) -> Self {
        Self {
            leader,
            epoch,
            unclean,
            may_lose_committed: None,
            stage: FollowerStage::Idle,
            leader_high_watermark: Offset::ZERO,
            high_watermark,
        }
    }

    pub fn leader(&self) -> BrokerId {
        self.leader
    }

    pub fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    /// Returns the high watermark of the replica: all records of this log below it are committed.
    pub fn high_watermark(&self) -> Offset {
        self.high_watermark
    }

    /// Returns true if the leader has accepted the subscription: batches may arrive.
    pub fn is_following(&self) -> bool {
        matches!(self.stage, FollowerStage::Following { .. })
    }

    /// Returns true if a subscription waits for the leader's response.
    pub fn is_subscribing(&self) -> bool {
        matches!(self.stage, FollowerStage::Subscribing(_))
    }

    /// Starts a subscription and returns the log position for it. Called when a link is connected, and after each
    /// truncation or reset. The caller sets `removal_count`.
    pub fn subscribe(&mut self, history: &EpochHistory, log_end: Offset) -> LogPosition {
        let last = history.last().map(|(epoch, _)| epoch);
        // Decided once, at the first subscription of this epoch: a truncation removes the last epochs of the log.
        self.may_lose_committed
            .get_or_insert(self.unclean.is_some_and(|unclean| last.is_none_or(|last| unclean > last)));
        self.stage = FollowerStage::Subscribing(log_end);
        LogPosition { last_epoch: last, log_end, removal_count: None }
    }

    /// Ends the subscription: the link is lost, or the actor subscribes again after a pause. Until the next
    /// subscription, each message of the leader is a violation.
    pub fn on_disconnected(&mut self) {
        self.stage = FollowerStage::Idle;
    }

    /// Processes the leader's response to the subscription, with the leader's epoch and high watermark.
    ///
    /// # Errors
    /// - The response is of another epoch.
    /// - No subscription is pending.
    /// - The outcome is invalid for this log.
    /// - The outcome would remove committed records without an unclean election.
    ///
    /// The log must stay as it is.
    pub fn on_response(
        &mut self,
        epoch: LeaderEpoch,
        outcome: &SubscribeOutcome,
        high_watermark: Offset,
        history: &EpochHistory,
    ) -> Result<FollowerAction, ProtocolViolation> {
        self.check_epoch(epoch)?;
        let FollowerStage::Subscribing(log_end) = self.stage else { return Err(ProtocolViolation::Unexpected) };
        self.stage = FollowerStage::Idle;
        match outcome {
            SubscribeOutcome::Accepted(at) if *at == log_end => {
                let last = history.last().map(|(epoch, _)| epoch);
                self.stage = FollowerStage::Following { next: log_end, appended_end: log_end, last };
                self.advance_high_watermark(high_watermark);
                Ok(FollowerAction::Follow(log_end))
            }
            SubscribeOutcome::Accepted(got) => Err(ProtocolViolation::InvalidResponse { got: *got, log_end }),
            SubscribeOutcome::Diverged { epoch, end } => {
                let to = if mutant!(TruncateToHighWatermark) {
                    self.high_watermark
                } else {
                    common_end(*epoch, *end, history, log_end)
                };
                if to >= log_end {
                    return Err(ProtocolViolation::InvalidResponse { got: *end, log_end });
                }
                self.prepare_truncation(to)?;
                Ok(FollowerAction::Truncate(to))
            }
            SubscribeOutcome::Bootstrap(tables) => {
                let (at, high_watermark) = (tables.start, self.high_watermark);
                self.prepare_truncation(at)
                    .map_err(|_| ProtocolViolation::BootstrapBelowCommitted { at, high_watermark })?;
                Ok(FollowerAction::Bootstrap(at))
            }
            SubscribeOutcome::Rejected(_) => Ok(FollowerAction::RetryLater),
        }
    }

    /// Applies a reset of the log to `at`. All records before `at` are in the object store or deleted, so they were
    /// committed.
    pub fn on_reset(&mut self, at: Offset) {
        self.high_watermark = self.high_watermark.max(at);
    }

    /// Prepares a truncation or reset to `to`. If `to` is below the high watermark, the high watermark falls to `to`.
    ///
    /// # Errors
    /// [`ProtocolViolation::TruncateBelowCommitted`] if `to` is below the high watermark, and no unclean election
    /// explains the loss.
    fn prepare_truncation(&mut self, to: Offset) -> Result<(), ProtocolViolation> {
        let high_watermark = self.high_watermark;
        if to < high_watermark {
            if self.may_lose_committed != Some(true) {
                return Err(ProtocolViolation::TruncateBelowCommitted { to, high_watermark });
            }
            self.high_watermark = to;
        }
        Ok(())
    }

    /// Processes batches from the leader, and its high watermark.
    ///
    /// # Errors
    /// The batches are of another epoch, no subscription is accepted, a batch does not continue the log, or its epoch
    /// is above the leader's. None of the batches may be appended. The last two errors end the subscription.
    pub fn on_batches(
        &mut self,
        epoch: LeaderEpoch,
        headers: &[BatchHeader],
        high_watermark: Offset,
    ) -> Result<FollowerAction, ProtocolViolation> {
        self.check_epoch(epoch)?;
        match self.check_batches(headers) {
            Ok(stage) => self.stage = stage,
            Err(violation) => {
                // Unrequested batches do not cancel a subscription whose response is due.
                if self.is_following() {
                    self.stage = FollowerStage::Idle;
                }
                return Err(violation);
            }
        }
        self.advance_high_watermark(high_watermark);
        Ok(if headers.is_empty() { FollowerAction::Ignore } else { FollowerAction::Append })
    }

    /// Checks that a message is of the followed epoch.
    fn check_epoch(&self, got: LeaderEpoch) -> Result<(), ProtocolViolation> {
        let follows = self.epoch;
        if mutant!(ObeyOlderLeaderEpoch) && got < follows {
            return Ok(());
        }
        match got.cmp(&follows) {
            std::cmp::Ordering::Less => Err(ProtocolViolation::OldEpoch { got, follows }),
            std::cmp::Ordering::Greater => Err(ProtocolViolation::NewEpoch { got, follows }),
            std::cmp::Ordering::Equal => Ok(()),
        }
    }

    /// Checks that batches continue the log, and that their epochs are not above the leader's. Returns the stage after
    /// them.
    fn check_batches(&self, headers: &[BatchHeader]) -> Result<FollowerStage, ProtocolViolation> {
        let FollowerStage::Following { mut next, appended_end, mut last } = self.stage else {
            return Err(ProtocolViolation::Unexpected);
        };
        for header in headers {
            let (at, got, follows) = (header.base, header.epoch, self.epoch);
            if at > next {
                return Err(ProtocolViolation::Gap { expected: next, got: at });
            }
            if at < next || header.end <= at {
                return Err(ProtocolViolation::Overlap { expected: next, got: at.min(header.end) });
            }
            if let Some(last) = last.filter(|last| *last > got) {
                return Err(ProtocolViolation::EpochDecreased { at, last, got });
            }
            if got > follows {
                return Err(ProtocolViolation::EpochAboveLeader { at, got, follows });
            }
            (next, last) = (header.end, Some(got));
        }
        Ok(FollowerStage::Following { next, appended_end, last })
    }

    /// Applies an append, after which the log ends at `log_end`. Raises the high watermark as far as the leader's
    /// allows.
    pub fn on_appended(&mut self, log_end: Offset) {
        if let FollowerStage::Following { appended_end, .. } = &mut self.stage {
            *appended_end = log_end.max(*appended_end);
        }
        self.advance_high_watermark(self.leader_high_watermark);
    }

    /// Stores a high watermark that the leader sent, if it is the highest so far. In an accepted subscription, raises
    /// the follower's own high watermark, at most to the appended end.
    fn advance_high_watermark(&mut self, leader_high_watermark: Offset) {
        self.leader_high_watermark = self.leader_high_watermark.max(leader_high_watermark);
        if let FollowerStage::Following { appended_end, .. } = self.stage {
            self.high_watermark = self.high_watermark.max(self.leader_high_watermark.min(appended_end));
        }
    }
}

/// Returns the offset at which to truncate this log, which has the epochs `history`. In the leader's log, `epoch` is
/// the newest epoch not above this log's last one, and ends at `end`. The result is the lower of `end` and the end of
/// this log's batches up to that epoch. The result is the start of this log if the log has no such batches, or if `end`
/// lies below that start.
fn common_end(epoch: LeaderEpoch, end: Offset, history: &EpochHistory, log_end: Offset) -> Offset {
    let start = history.iter().next().map_or(log_end, |(_, start)| start);
    let end_here = history.end_of(epoch, log_end).map_or(start, |(_, end)| end);
    end.min(end_here).max(start)
}

#[cfg(test)]
mod tests;
