//! Following: messages of the leader are checked, copied and submitted to the journal. The link acknowledges the published progress.

use super::{Actor, AppendError, GROUP_BYTES, Part, warnings::Condition};
use crate::{
    model::{LeaderEpoch, Offset},
    partition::{
        On,
        begin::{BeginError, Tables},
        follower::{Act, Head, Violation},
        leader::{
            insync::Ends,
            join::{Claim, Join},
        },
        role::{Answered, FromLink, Joined},
    },
    record::Batch,
};

impl Actor {
    /// Handles an event of the link. Events in another role are late: they belong to an earlier subscription.
    pub(super) async fn hear_link(&mut self, said: FromLink) {
        let Part::Following(follower) = &mut self.part else { return };
        match said {
            FromLink::Up => self.claim(),
            FromLink::Down => {
                follower.interrupted();
                // The object store's response is no longer needed: the next subscription may have another outcome.
                self.placed.question += 1;
            }
            FromLink::Answer(answered) => self.answered(answered).await,
            FromLink::Pieces { epoch, high_watermark, batches } => self.received(epoch, high_watermark, &batches),
        }
    }

    /// Subscribes with the position of this log.
    fn claim(&mut self) {
        let Part::Following(follower) = &mut self.part else { return };
        self.placed.question += 1;
        let log_end = self.replica.log_end();
        let added = self.placed.added_after(self.broker);
        let claim = Claim { added, ..follower.claim(&self.replica.epochs(), log_end) };
        let epoch = follower.epoch();
        sim_event!(LogPositionSent { partition: self.id, epoch, persisted: self.replica.persisted_end() });
        let ends = Ends { written: log_end, persisted: self.replica.persisted_end() };
        self.around.links.join(self.id, epoch, claim, ends);
    }

    /// Asks the link for another [`FromLink::Up`] after a pause.
    fn again(&mut self) {
        if let Part::Following(follower) = &mut self.part {
            follower.interrupted();
            self.around.links.again(self.id);
        }
    }

    async fn answered(&mut self, answered: Answered) {
        let Part::Following(follower) = &mut self.part else { return };
        let Answered { epoch, high_watermark, join, in_sync: _ } = answered;
        let (join, beginning) = match join {
            Joined::At(at) => (Join::At(at), None),
            Joined::Diverged { epoch, end } => (Join::Diverged { epoch, end }, None),
            Joined::Begin(beginning) => (Join::BeginAt(beginning.at), Some(beginning)),
            Joined::Refused(why) => {
                tracing::debug!(partition = %self.id, leader = %follower.leader(), %epoch, why, "may not join yet");
                return self.again();
            }
        };
        let act = follower.answered(epoch, &join, high_watermark, &self.replica.epochs());
        match act {
            Ok(Act::Cut(to)) => {
                sim_event!(LeaderMessageApplied { partition: self.id, epoch });
                self.cut(to).await;
            }
            Ok(Act::Begin(at)) => match beginning {
                Some(beginning) if !beginning.in_bucket => {
                    // No tier has the records before.
                    self.log_start = self.log_start.max(at);
                    self.begin_following(Tables::sent(&beginning)).await;
                }
                _ => self.ask_bucket(at, None),
            },
            Ok(Act::Follow(_)) => {
                // The link acknowledges the current progress, although nothing moved.
                self.publish();
                self.shared.wake(On::Progress);
            }
            Ok(Act::Append | Act::Pass | Act::Wait(_)) => {}
            Err(violation) => self.violated(violation),
        }
    }

    /// Truncates where this log and the leader's diverge.
    async fn cut(&mut self, to: Offset) {
        tracing::info!(topic = %self.topic, partition = %self.id, %to, log_end = %self.replica.log_end(), "cuts what its leader does not have");
        // Below the start of this disk there are no tables of the records before: then the log is emptied.
        let done = if to < self.replica.local_start().max(self.replica.log_start()) {
            self.empty().await
        } else {
            self.cut_by(move |replica| replica.truncate(to).map(drop)).await
        };
        sim_event!(Truncated { partition: self.id, epoch: self.placed.epoch(), to: self.replica.log_end() });
        self.claim_when(done);
    }

    /// Subscribes at once if the log changed, otherwise after a pause.
    fn claim_when(&mut self, changed: bool) {
        if changed { self.claim() } else { self.again() }
    }

    /// Bootstraps with these tables.
    pub(super) async fn begin_following(&mut self, tables: Result<Tables, BeginError>) {
        if !matches!(self.part, Part::Following(_)) {
            return;
        }
        match tables {
            Ok(tables) => {
                let at = tables.at;
                let had = self.replica.log_end();
                // The reset would change nothing, so the subscription is retried after a pause.
                let is_same = had == at && self.replica.local_start() == at;
                let done = self.reset(tables).await;
                if let Part::Following(follower) = &mut self.part
                    && done
                {
                    tracing::info!(topic = %self.topic, partition = %self.id, %at, log_end = %had, "begins anew and copies from there");
                    follower.begun(at);
                }
                self.claim_when(done && !is_same);
            }
            Err(error) => {
                if let Some(count) = self.warnings.occur(Condition::CannotBegin) {
                    tracing::warn!(topic = %self.topic, partition = %self.id, %error, count, "the replica cannot begin yet; it is tried again");
                }
                self.again();
            }
        }
    }

    /// Handles batches from the leader.
    fn received(&mut self, epoch: LeaderEpoch, high_watermark: Offset, batches: &[Batch]) {
        let Part::Following(follower) = &mut self.part else { return };
        let heads: Option<Vec<Head>> = batches.iter().map(head).collect();
        let Some(heads) = heads else {
            if let Some(count) = self.warnings.occur(Condition::BadBatches) {
                let leader = follower.leader();
                tracing::warn!(topic = %self.topic, partition = %self.id, %leader, count, "the leader sent a batch without an epoch");
            }
            return self.again();
        };
        match follower.received(epoch, &heads, high_watermark) {
            Ok(Act::Append) => {
                sim_event!(LeaderMessageApplied { partition: self.id, epoch });
                self.copy(batches);
            }
            Ok(_) => {}
            Err(violation) => self.violated(violation),
        }
    }

    /// Appends batches that were checked.
    fn copy(&mut self, mut batches: &[Batch]) {
        let most = usize::try_from(self.config.segment_bytes).map_or(GROUP_BYTES, |bytes| bytes.min(GROUP_BYTES));
        while !batches.is_empty() {
            let (mut count, mut bytes) = (0, 0);
            for batch in batches {
                if count > 0 && bytes + batch.encoded_len() > most {
                    break;
                }
                (count, bytes) = (count + 1, bytes + batch.encoded_len());
            }
            let (group, rest) = batches.split_at(count);
            batches = rest;
            match self.write(group, bytes) {
                Ok(()) => {}
                Err(AppendError::StorageFailed { why }) => return self.fail(&why),
                Err(error) => {
                    tracing::debug!(partition = %self.id, %error, "cannot copy now");
                    return self.again();
                }
            }
            let log_end = self.replica.log_end();
            if let Part::Following(follower) = &mut self.part {
                follower.appended(log_end);
            }
        }
    }

    /// Handles a wrong or late message of the leader, as the follower classified it. If the replica no longer follows, it
    /// subscribes again, unless the outcome would be the same for ever.
    fn violated(&mut self, violation: Violation) {
        let Part::Following(follower) = &mut self.part else { return };
        let (leader, epoch) = (follower.leader(), follower.epoch());
        match violation {
            // From an earlier link or epoch: the response to the current subscription is still due.
            Violation::OldEpoch { .. } | Violation::NotAsked => {
                tracing::trace!(partition = %self.id, %leader, %epoch, error = %violation, "passed over");
            }
            Violation::NewEpoch { .. } => {
                tracing::debug!(partition = %self.id, %leader, %epoch, error = %violation, "waits for the metadata");
                if follower.is_claiming() {
                    self.again();
                }
            }
            Violation::CutBelowCommitted { .. } => tracing::error!(
                topic = %self.topic, partition = %self.id, %leader, %epoch, error = %violation,
                "the replica follows nobody until another leads: compare the two logs (strandline segment dump); if the leader is \
                 right, take this replica away and add it again (strandline partition reassign)"
            ),
            _ => {
                if let Some(count) = self.warnings.occur(Condition::BadBatches) {
                    tracing::warn!(
                        topic = %self.topic, partition = %self.id, %leader, %epoch, error = %violation, count,
                        "what the leader sent does not fit"
                    );
                } else {
                    tracing::debug!(partition = %self.id, error = %violation, "what the leader sent does not fit again");
                }
                self.again();
            }
        }
    }
}

fn head(batch: &Batch) -> Option<Head> {
    Some(Head { base: batch.base_offset(), end: batch.end_offset(), epoch: batch.leader_epoch()? })
}
