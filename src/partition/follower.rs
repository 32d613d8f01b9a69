//! A follower's decisions: where it begins, what it appends, and what it takes as committed. Pure.
//!
//! # Overview
//!
//! One [`Follower`] is one replica under one leader in one epoch. It is driven by the actor:
//!
//! ```text
//!            claim                 answered: At                received ─▶ append ─▶ appended
//!   idle ───────────▶ claiming ───────────────────▶ following ──────────────────────────╮
//!    ▲                    │ Diverged, BeginAt           │  ▲                            │
//!    ╰── cut or begin ◀───╯                             │  ╰────────────────────────────╯
//!    ╰──────────── link lost, violation, failed append ─╯
//! ```
//!
//! # Rules
//!
//! - It cuts only where the leader's epochs and its own part, and never to a high watermark.
//! - It never cuts below what it knows as committed. Every clean leader has that; so an answer that asks for it is wrong, and the replica
//!   keeps its bytes and says so. Only an unclean election in an epoch above its log's last one may take committed records.
//! - It appends only what continues its log without gap, overlap or falling epoch, and nothing of another epoch's link.
//! - Its high watermark is the least of what the leader told and of what it has, and counts only once the leader has found that its log
//!   is the beginning of its own.
//!
//! What a leader sends is input: whatever does not fit is a [`Violation`] and changes nothing but that the follower claims anew.

use super::leader::join::{Claim, Join, JoinRefused};
use crate::{
    log::EpochHistory,
    model::{BrokerId, LeaderEpoch, Offset},
};

/// The part of a batch that decides whether it fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Head {
    /// Its first offset.
    pub base: Offset,
    /// The offset after its last record.
    pub end: Offset,
    /// The leader epoch stamped on it.
    pub epoch: LeaderEpoch,
}

/// What the actor is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Act {
    /// Nothing to be changed: what it has is what the leader has up to here. Acknowledge it; batches follow.
    Follow(Offset),
    /// Cut the log at this offset, then claim again.
    Cut(Offset),
    /// Throw the log away and begin at this offset, or a later one where the bucket ends, with the tables of that place; say
    /// [`Follower::begun`], and claim again.
    Begin(Offset),
    /// Append the batches, then say [`Follower::appended`].
    Append,
    /// Nothing to append.
    Pass,
    /// The leader refused the claim: claim again a little later.
    Wait(JoinRefused),
}

/// Something that a leader in order does not send. The follower has to claim anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Violation {
    /// It is of an older epoch than the one that is followed.
    #[error("a message of epoch {got} came in epoch {follows}: it is late")]
    OldEpoch {
        /// The epoch of the message.
        got: LeaderEpoch,
        /// The epoch that is followed.
        follows: LeaderEpoch,
    },
    /// It is of a newer epoch than the one that is followed: this broker has not heard of it yet.
    #[error("a message of epoch {got} came in epoch {follows}: this broker has not heard of it yet")]
    NewEpoch {
        /// The epoch of the message.
        got: LeaderEpoch,
        /// The epoch that is followed.
        follows: LeaderEpoch,
    },
    /// An answer that nothing asked for, or batches before the leader has said where to go on.
    #[error("the leader sent what was not asked for")]
    NotAsked,
    /// Offsets are missing.
    #[error("offsets are missing: {expected} is next, the leader sent {got}")]
    Gap {
        /// The log end.
        expected: Offset,
        /// Where the batch begins.
        got: Offset,
    },
    /// Offsets come again.
    #[error("offsets overlap: {expected} is next, the leader sent {got}")]
    Overlap {
        /// The log end.
        expected: Offset,
        /// Where the batch begins, or ends when it is empty.
        got: Offset,
    },
    /// The epoch of a batch is below that of the batch before it.
    #[error("the epoch of the batch at {at} falls from {last} to {got}")]
    EpochFalls {
        /// Where the batch begins.
        at: Offset,
        /// The epoch of the batch before.
        last: LeaderEpoch,
        /// Its epoch.
        got: LeaderEpoch,
    },
    /// The epoch of a batch is above that of the leader who sends it.
    #[error("the batch at {at} is of epoch {got}, above its leader's {follows}")]
    AboveLink {
        /// Where the batch begins.
        at: Offset,
        /// Its epoch.
        got: LeaderEpoch,
        /// The epoch that is followed.
        follows: LeaderEpoch,
    },
    /// The answer does not shorten the log that it calls diverged, or names another end than the claimed one.
    #[error("the leader's answer names offset {got}, the log ends at {log_end}")]
    WrongAnswer {
        /// The offset that it names.
        got: Offset,
        /// The log end.
        log_end: Offset,
    },
    /// Committed records would be cut, and no unclean election explains it.
    #[error(
        "the leader's log parts from this replica's at {to}, below the committed end {high_watermark}, and no unclean election is \
         recorded: the replica stays as it is"
    )]
    CutBelowCommitted {
        /// Where it would have to be cut.
        to: Offset,
        /// What is known as committed.
        high_watermark: Offset,
    },
    /// The log would begin anew below what is committed: the leader's disk still holds segments below its log start. Once they
    /// are gone the next claim is answered with where it begins then.
    #[error(
        "the leader has this replica begin anew at {at}, below the committed end {high_watermark}: it is asked again"
    )]
    BeginBelowCommitted {
        /// Where it would begin.
        at: Offset,
        /// What is known as committed.
        high_watermark: Offset,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    /// Nothing is asked; the log is being changed, or there is no link.
    Idle,
    /// The log ended here when it was claimed.
    Claiming(Offset),
    /// `next` is what the leader sends next; all below `held` is in the log.
    Following { next: Offset, held: Offset, last: Option<LeaderEpoch> },
}

/// One replica under one leader in one epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Follower {
    leader: BrokerId,
    epoch: LeaderEpoch,
    /// The last epoch before which committed records may have been lost.
    unclean: Option<LeaderEpoch>,
    /// Whether the log, as it was when this epoch was first claimed, is older than that.
    may_lose: Option<bool>,
    stage: Stage,
    /// The leader's high watermark, as it last told it.
    told: Offset,
    /// What is known as committed. Falls only by an unclean election.
    high_watermark: Offset,
}

impl Follower {
    /// Follows `leader` in its epoch. `high_watermark` is what this replica knows as committed, `unclean` what the partition's
    /// value says.
    pub fn new(leader: BrokerId, epoch: LeaderEpoch, high_watermark: Offset, unclean: Option<LeaderEpoch>) -> Self {
        Self { leader, epoch, unclean, may_lose: None, stage: Stage::Idle, told: Offset::ZERO, high_watermark }
    }

    /// Whom it follows.
    pub fn leader(&self) -> BrokerId {
        self.leader
    }

    /// The epoch that it follows.
    pub fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    /// What is known as committed: the least of what the leader told and of what is in the log.
    pub fn high_watermark(&self) -> Offset {
        self.high_watermark
    }

    /// Whether the leader has said where to go on, and batches may come.
    pub fn is_following(&self) -> bool {
        matches!(self.stage, Stage::Following { .. })
    }

    /// Whether the leader owes an answer.
    pub fn is_claiming(&self) -> bool {
        matches!(self.stage, Stage::Claiming(_))
    }

    /// What to say to the leader when a link to it is there, and after each cut or beginning.
    pub fn claim(&mut self, history: &EpochHistory, log_end: Offset) -> Claim {
        let last = history.last().map(|(epoch, _)| epoch);
        // Judged by the log as it came into this epoch: cutting it makes it look older than what it once knew.
        self.may_lose.get_or_insert(self.unclean.is_some_and(|unclean| last.is_none_or(|last| unclean > last)));
        self.stage = Stage::Claiming(log_end);
        Claim { last, end: log_end, added: None }
    }

    /// The link is lost, or an append failed: nothing counts before the next claim.
    pub fn interrupted(&mut self) {
        self.stage = Stage::Idle;
    }

    /// The leader's answer to the claim, with its epoch and its high watermark.
    ///
    /// # Errors
    /// When the answer cannot be right. The log stays as it is.
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

    /// The log was thrown away and begins at `at`. All that lies before is in the bucket, or deleted: it is committed.
    pub fn begun(&mut self, at: Offset) {
        self.high_watermark = self.high_watermark.max(at);
    }

    /// Checks that no committed record is given up.
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

    /// Batches from the leader, and its high watermark.
    ///
    /// # Errors
    /// When they do not continue the log. Nothing of them may be appended.
    pub fn received(&mut self, epoch: LeaderEpoch, heads: &[Head], high_watermark: Offset) -> Result<Act, Violation> {
        self.is_current(epoch)?;
        match self.continues(heads) {
            Ok(stage) => self.stage = stage,
            Err(violation) => {
                // What nobody asked for does not stand in the way of an answer that is due.
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

    /// The log reaches this far.
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

/// Where a log parts from one in which the newest epoch not above its own last is `epoch` and ends at `end`: not before that end, and not
/// after what it has of the same epochs itself. Its own start when it has none of them.
fn common_end(epoch: LeaderEpoch, end: Offset, history: &EpochHistory, log_end: Offset) -> Offset {
    let first = history.iter().next().map_or(log_end, |(_, start)| start);
    let own = history.end_of(epoch, log_end).map_or(first, |(_, end)| end);
    end.min(own).max(first)
}

#[cfg(test)]
mod tests;
