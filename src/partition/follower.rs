//! A follower's decisions: the start of a subscription, the batches to append, and the high watermark. Pure.
//!
//! # Overview
//!
//! One [`Follower`] is one replica under one leader in one epoch. The actor drives it:
//!
//! ```text
//!           subscribe                response: At                batches ─▶ append ─▶ appended
//!   idle ───────────▶ subscribing ────────────────▶ following ──────────────────────────╮
//!    ▲                    │ Diverged, BeginAt           │  ▲                            │
//!    ╰─ truncate, reset ◀─╯                             │  ╰────────────────────────────╯
//!    ╰──────────── link lost, violation, failed append ─╯
//! ```
//!
//! # Rules
//!
//! - The follower truncates only where the leader's epoch history and its own diverge, and never to a high watermark.
//! - The follower never truncates below its high watermark. Every clean leader has the records below it. So a response that asks for such
//!   a truncation is wrong, and the replica keeps its log and reports the error. Only an unclean election in an epoch above the last
//!   epoch of the log may remove committed records.
//! - The follower appends only batches that continue its log without gap, overlap or decreasing epoch, and no batch of another epoch's
//!   link.
//! - Its high watermark is the minimum of the leader's high watermark and its own log end. It moves only after the leader has found this
//!   log to be a prefix of its own.
//!
//! Messages of a leader are input. A message that does not fit is a [`Violation`]: nothing changes, except that the follower may have to
//! subscribe again.

use super::leader::join::{Claim, Join, JoinRefused};
use crate::{
    log::EpochHistory,
    model::{BrokerId, LeaderEpoch, Offset},
};

/// Fields of a batch that are checked before an append.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Head {
    /// First offset of the batch.
    pub base: Offset,
    /// Offset after the last record.
    pub end: Offset,
    /// Leader epoch stamped on the batch.
    pub epoch: LeaderEpoch,
}

/// Action for the actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Act {
    /// Nothing to change: this log equals the leader's up to this offset. Acknowledge it; batches follow.
    Follow(Offset),
    /// Truncate the log at this offset, then subscribe again.
    Cut(Offset),
    /// Reset the log to this offset, or to a later one where the object store ends, with the tables of that offset. Then call
    /// [`Follower::begun`] and subscribe again.
    Begin(Offset),
    /// Append the batches, then call [`Follower::appended`].
    Append,
    /// Nothing to append.
    Pass,
    /// The leader rejected the subscription: subscribe again after a pause.
    Wait(JoinRefused),
}

/// A message that a correct leader does not send. The follower has to subscribe again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Violation {
    /// The message is of an older epoch than the followed one.
    #[error("a message of epoch {got} came in epoch {follows}: it is late")]
    OldEpoch {
        /// Epoch of the message.
        got: LeaderEpoch,
        /// Followed epoch.
        follows: LeaderEpoch,
    },
    /// The message is of a newer epoch than the followed one: this broker has not received that metadata yet.
    #[error("a message of epoch {got} came in epoch {follows}: this broker has not heard of it yet")]
    NewEpoch {
        /// Epoch of the message.
        got: LeaderEpoch,
        /// Followed epoch.
        follows: LeaderEpoch,
    },
    /// A response without a request, or batches before the leader accepted the subscription.
    #[error("the leader sent what was not asked for")]
    NotAsked,
    /// Offsets are missing.
    #[error("offsets are missing: {expected} is next, the leader sent {got}")]
    Gap {
        /// Next expected offset.
        expected: Offset,
        /// First offset of the batch.
        got: Offset,
    },
    /// Offsets are repeated, or the batch is empty.
    #[error("offsets overlap: {expected} is next, the leader sent {got}")]
    Overlap {
        /// Next expected offset.
        expected: Offset,
        /// First offset of the batch, or its end if that is lower.
        got: Offset,
    },
    /// The epoch of a batch is below that of the batch before it.
    #[error("the epoch of the batch at {at} falls from {last} to {got}")]
    EpochFalls {
        /// First offset of the batch.
        at: Offset,
        /// Epoch of the batch before it.
        last: LeaderEpoch,
        /// Epoch of the batch.
        got: LeaderEpoch,
    },
    /// The epoch of a batch is above that of the leader that sent it.
    #[error("the batch at {at} is of epoch {got}, above its leader's {follows}")]
    AboveLink {
        /// First offset of the batch.
        at: Offset,
        /// Epoch of the batch.
        got: LeaderEpoch,
        /// Followed epoch.
        follows: LeaderEpoch,
    },
    /// The response does not shorten the log that it calls diverged, or accepts another end than the reported one.
    #[error("the leader's answer names offset {got}, the log ends at {log_end}")]
    WrongAnswer {
        /// Offset in the response.
        got: Offset,
        /// Log end of the replica.
        log_end: Offset,
    },
    /// Committed records would be truncated, and no unclean election explains the loss.
    #[error(
        "the leader's log parts from this replica's at {to}, below the committed end {high_watermark}, and no unclean election is \
         recorded: the replica stays as it is"
    )]
    CutBelowCommitted {
        /// Offset of the truncation.
        to: Offset,
        /// High watermark of the replica.
        high_watermark: Offset,
    },
    /// The log would be reset below the high watermark, because the leader's disk still holds segments below its log start. After their
    /// removal the leader responds to the next subscription with a later offset.
    #[error(
        "the leader has this replica begin anew at {at}, below the committed end {high_watermark}: it is asked again"
    )]
    BeginBelowCommitted {
        /// Offset of the reset.
        at: Offset,
        /// High watermark of the replica.
        high_watermark: Offset,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    /// No subscription is pending: the log is being changed, or there is no link.
    Idle,
    /// A response is due. The value is the log end that the subscription reported.
    Claiming(Offset),
    /// `next` is the next offset that the leader sends; all records below `held` are in the log.
    Following { next: Offset, held: Offset, last: Option<LeaderEpoch> },
}

/// One replica under one leader in one epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Follower {
    leader: BrokerId,
    epoch: LeaderEpoch,
    /// Newest epoch whose election may have lost committed records.
    unclean: Option<LeaderEpoch>,
    /// True if the log's last epoch, at the first subscription of this epoch, was older than `unclean`.
    may_lose: Option<bool>,
    stage: Stage,
    /// Newest high watermark that the leader sent.
    told: Offset,
    /// High watermark of the replica. Falls only by an unclean election.
    high_watermark: Offset,
}

impl Follower {
    /// Creates a follower of `leader` in `epoch`. `high_watermark` is the replica's own; `unclean` is taken from the partition's value.
    pub fn new(leader: BrokerId, epoch: LeaderEpoch, high_watermark: Offset, unclean: Option<LeaderEpoch>) -> Self {
        Self { leader, epoch, unclean, may_lose: None, stage: Stage::Idle, told: Offset::ZERO, high_watermark }
    }

    pub fn leader(&self) -> BrokerId {
        self.leader
    }

    pub fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    /// Returns the high watermark: all records of this log below it are known as committed.
    pub fn high_watermark(&self) -> Offset {
        self.high_watermark
    }

    /// Returns true if the leader has accepted the subscription: batches may arrive.
    pub fn is_following(&self) -> bool {
        matches!(self.stage, Stage::Following { .. })
    }

    /// Returns true if the leader's response is due.
    pub fn is_claiming(&self) -> bool {
        matches!(self.stage, Stage::Claiming(_))
    }

    /// Starts a subscription and returns the log position for it. Called when a link is connected, and after each truncation or reset.
    pub fn claim(&mut self, history: &EpochHistory, log_end: Offset) -> Claim {
        let last = history.last().map(|(epoch, _)| epoch);
        // The log counts as it was at the first subscription of this epoch: a truncation makes its last epoch look older.
        self.may_lose.get_or_insert(self.unclean.is_some_and(|unclean| last.is_none_or(|last| unclean > last)));
        self.stage = Stage::Claiming(log_end);
        Claim { last, end: log_end, added: None }
    }

    /// Ends the subscription, because the link is lost or an append failed. No message counts before the next subscription.
    pub fn interrupted(&mut self) {
        self.stage = Stage::Idle;
    }

    /// Processes the leader's response to the subscription, with the leader's epoch and high watermark.
    ///
    /// # Errors
    /// The response cannot be right. The log stays as it is.
    pub fn answered(
        &mut self,
        epoch: LeaderEpoch,
        answer: &Join,
        high_watermark: Offset,
        history: &EpochHistory,
    ) -> Result<Act, Violation> {
        self.is_current(epoch)?;
        let Stage::Claiming(log_end) = self.stage else { return Err(Violation::NotAsked) };
        self.stage = Stage::Idle;
        match answer {
            Join::At(at) if *at == log_end => {
                let last = history.last().map(|(epoch, _)| epoch);
                self.stage = Stage::Following { next: log_end, held: log_end, last };
                self.marked(high_watermark);
                Ok(Act::Follow(log_end))
            }
            Join::At(got) => Err(Violation::WrongAnswer { got: *got, log_end }),
            Join::Diverged { epoch, end } => {
                let cut = if mutant!(TruncateToHighWatermark) {
                    self.high_watermark
                } else {
                    common_end(*epoch, *end, history, log_end)
                };
                if cut >= log_end {
                    return Err(Violation::WrongAnswer { got: *end, log_end });
                }
                self.give_up_above(cut)?;
                Ok(Act::Cut(cut))
            }
            Join::BeginAt(at) => {
                let high_watermark = self.high_watermark;
                self.give_up_above(*at).map_err(|_| Violation::BeginBelowCommitted { at: *at, high_watermark })?;
                Ok(Act::Begin(*at))
            }
            Join::Refused(refused) => Ok(Act::Wait(*refused)),
        }
    }

    /// Records a reset of the log to `at`. All records before `at` are in the object store or deleted, so they were committed.
    pub fn begun(&mut self, at: Offset) {
        self.high_watermark = self.high_watermark.max(at);
    }

    /// Checks that a truncation or reset to `to` removes no committed record, or that an unclean election allows it. In the latter case
    /// the high watermark falls to `to`.
    fn give_up_above(&mut self, to: Offset) -> Result<(), Violation> {
        let high_watermark = self.high_watermark;
        if to < high_watermark {
            if self.may_lose != Some(true) {
                return Err(Violation::CutBelowCommitted { to, high_watermark });
            }
            self.high_watermark = to;
        }
        Ok(())
    }

    /// Processes batches from the leader, and its high watermark.
    ///
    /// # Errors
    /// The batches do not continue the log. None of them may be appended.
    pub fn received(&mut self, epoch: LeaderEpoch, heads: &[Head], high_watermark: Offset) -> Result<Act, Violation> {
        self.is_current(epoch)?;
        match self.continues(heads) {
            Ok(stage) => self.stage = stage,
            Err(violation) => {
                // Unrequested batches do not cancel a subscription whose response is due.
                if self.is_following() {
                    self.stage = Stage::Idle;
                }
                return Err(violation);
            }
        }
        self.marked(high_watermark);
        Ok(if heads.is_empty() { Act::Pass } else { Act::Append })
    }

    fn is_current(&self, got: LeaderEpoch) -> Result<(), Violation> {
        let follows = self.epoch;
        if mutant!(ObeyOlderLeaderEpoch) && got < follows {
            return Ok(());
        }
        match got.cmp(&follows) {
            std::cmp::Ordering::Less => Err(Violation::OldEpoch { got, follows }),
            std::cmp::Ordering::Greater => Err(Violation::NewEpoch { got, follows }),
            std::cmp::Ordering::Equal => Ok(()),
        }
    }

    fn continues(&self, heads: &[Head]) -> Result<Stage, Violation> {
        let Stage::Following { mut next, held, mut last } = self.stage else { return Err(Violation::NotAsked) };
        for head in heads {
            let (at, got, follows) = (head.base, head.epoch, self.epoch);
            if at > next {
                return Err(Violation::Gap { expected: next, got: at });
            }
            if at < next || head.end <= at {
                return Err(Violation::Overlap { expected: next, got: at.min(head.end) });
            }
            if let Some(last) = last.filter(|last| *last > got) {
                return Err(Violation::EpochFalls { at, last, got });
            }
            if got > follows {
                return Err(Violation::AboveLink { at, got, follows });
            }
            (next, last) = (head.end, Some(got));
        }
        Ok(Stage::Following { next, held, last })
    }

    /// Records an append: the log reaches `log_end`.
    pub fn appended(&mut self, log_end: Offset) {
        if let Stage::Following { held, .. } = &mut self.stage {
            *held = log_end.max(*held);
        }
        self.marked(self.told);
    }

    fn marked(&mut self, told: Offset) {
        self.told = self.told.max(told);
        if let Stage::Following { held, .. } = self.stage {
            self.high_watermark = self.high_watermark.max(self.told.min(held));
        }
    }
}

/// Returns the offset at which to truncate. In the leader's log, `epoch` is the newest epoch not above this log's last one, and ends at
/// `end`. The result is the lower of `end` and the end of this log's own batches up to that epoch. It is the log's own start if the log
/// has no such batches.
fn common_end(epoch: LeaderEpoch, end: Offset, history: &EpochHistory, log_end: Offset) -> Offset {
    let first = history.iter().next().map_or(log_end, |(_, start)| start);
    let own = history.end_of(epoch, log_end).map_or(first, |(_, end)| end);
    end.min(own).max(first)
}

#[cfg(test)]
mod tests;
