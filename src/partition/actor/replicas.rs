//! A leader's work for its followers: subscriptions, acknowledgements, and the ISR changes that follow from them.

use super::{Actor, Part, news::Ack};
use crate::{
    cluster::{PartitionValue, Revision},
    model::{BrokerId, LeaderEpoch, PartitionId, format_ids},
    partition::{
        leader::{
            insync::{Agreed, Ends, InSync, Observed, Peer, Proposal},
            join::{Claim, Join, Local},
        },
        role::{Answered, Beginning, Joined},
    },
    task::clock,
    telemetry::LogThrottle,
};

/// Request to the metadata store that has no outcome yet.
#[derive(Clone, Copy)]
pub(super) struct Question {
    /// Epoch of the leader that sent the request.
    epoch: LeaderEpoch,
    about: About,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    /// Outcome of a proposal.
    Proposal,
    /// Value of the key, because the outcome of a proposal is unknown.
    Outcome,
    /// Value of the key, because the metadata does not show how a leadership that ended here continues.
    GivenUp,
}

/// ISR that was proposed last. While the metadata store accepts no change, the proposal is repeated every 250 ms.
pub(super) struct Proposed {
    isr: Vec<BrokerId>,
    log: LogThrottle,
}

impl Proposed {
    /// Counts a proposal of this ISR. Returns the number of proposals since the last line if a line is due.
    fn occur(last: &mut Option<Box<Self>>, isr: &[BrokerId]) -> Option<u64> {
        if last.as_ref().is_none_or(|proposed| proposed.isr != isr) {
            *last = Some(Box::new(Self { isr: isr.to_vec(), log: LogThrottle::default() }));
        }
        last.as_mut()?.log.occur(clock::monotonic())
    }
}

/// Maximum time, in milliseconds, in which the metadata must arrive that a task without its leadership waits for.
const GIVEN_UP_MS: u64 = 1000;

impl Actor {
    /// Applies a report about followers to the leader, if this task leads, and sends the request that follows from it.
    pub(super) fn in_sync(&mut self, tell: impl FnOnce(&mut InSync)) {
        if let Part::Leading(leader) = &mut self.part {
            tell(leader.in_sync_mut());
            self.propose();
        }
    }

    /// Handles a subscription of a follower.
    pub(super) async fn join(&mut self, peer: Peer, epoch: LeaderEpoch, claim: Claim, ends: Ends) -> Answered {
        // Acknowledgements of this follower's earlier links do not count.
        self.news.forget(peer.broker);
        let bucket = self.has_bucket_tables();
        let local = Local { local_start: self.replica.local_start(), tiered_end: bucket.then_some(self.tiered_end) };
        let Part::Leading(leader) = &mut self.part else {
            return Answered::refused(self.placed.epoch(), "this broker does not lead the partition".to_owned());
        };
        if let Some(why) = self.shared.fault() {
            return Answered::refused(leader.epoch(), format!("the leader's disk failed: {why}"));
        }
        let join = leader.in_sync_mut().join(peer, epoch, claim, local, &self.replica.epochs());
        if !matches!(join, Join::Refused(_)) {
            sim_event!(FollowerSubscribed {
                partition: self.id,
                epoch: leader.epoch(),
                follower: peer.broker,
                registered: peer.epoch.0
            });
        }
        let (epoch, high_watermark) = (leader.epoch(), leader.high_watermark());
        let in_sync = leader.in_sync().value().isr.contains(&peer.broker);
        let join = match join {
            Join::At(at) => {
                let ends = Ends { written: ends.written.min(at), persisted: ends.persisted.min(at) };
                count(self.id, leader.in_sync_mut(), Ack { peer, epoch, ends });
                self.shared.acknowledged(peer.broker, ends.written);
                tracing::debug!(partition = %self.id, broker = %peer.broker, %epoch, %at, "a follower joined");
                Joined::At(at)
            }
            Join::Diverged { epoch, end } => Joined::Diverged { epoch, end },
            Join::BeginAt(at) if Some(at) == local.tiered_end => {
                Joined::Begin(Box::new(Beginning { at, in_bucket: true, ..Beginning::default() }))
            }
            Join::BeginAt(_) => match self.replica.lend(|replica| replica.tables_at_start()).await {
                Ok((at, epochs, producers)) => Joined::Begin(Box::new(Beginning {
                    at,
                    in_bucket: false,
                    epochs: epochs.iter().collect(),
                    producers: producers.to_bytes(),
                })),
                Err(error) => {
                    if let Some(count) = self.shared.count_unsendable() {
                        tracing::warn!(topic = %self.topic, partition = %self.id, %error, count, "a new replica cannot begin here");
                    }
                    Joined::Refused(format!("the leader cannot read what is known where its log begins: {error}"))
                }
            },
            Join::Refused(why) => {
                tracing::debug!(partition = %self.id, broker = %peer.broker, %why, "a follower may not join");
                Joined::Refused(why.to_string())
            }
        };
        Answered { epoch, high_watermark, join, in_sync }
    }

    /// Applies acknowledgements of followers.
    pub(super) fn on_acknowledged(&mut self, acks: Vec<Ack>) {
        let Part::Leading(leader) = &mut self.part else { return };
        let mut outside = false;
        for ack in acks {
            let follower = ack.peer.broker;
            outside |= count(self.id, leader.in_sync_mut(), ack) && !leader.in_sync().value().isr.contains(&follower);
        }
        // An acknowledgement of an ISR member changes no set.
        if outside {
            self.propose();
        }
    }

    /// Sends the ISR change that is due to the metadata store, or a read after an unknown outcome. One request at a time, so that an
    /// outcome is never applied to another request.
    pub(super) fn propose(&mut self) {
        let Part::Leading(leader) = &mut self.part else { return };
        if self.asked.is_some() {
            return;
        }
        let epoch = leader.epoch();
        if self.shared.fault().is_some() {
            // A member that can take over may have entered the ISR since the last resignation.
            if leader.in_sync().value().isr.iter().any(|member| *member != self.broker) {
                self.around.agreement.resign(self.id, epoch);
            }
            return;
        }
        if leader.in_sync().awaits_reading() {
            self.asked = Some(Question { epoch, about: About::Outcome });
            self.around.agreement.read_back(self.id);
        } else if let Some(proposal) = leader.in_sync_mut().proposal() {
            if let Some(proposals) = Proposed::occur(&mut self.proposed, &proposal.value.isr) {
                tracing::info!(
                    topic = %self.topic, partition = %self.id, %epoch, proposals, isr = %format_ids(&proposal.value.isr),
                    elr = %format_ids(&proposal.value.elr), before = %format_ids(&leader.in_sync().value().isr),
                    "proposes other in-sync replicas"
                );
            }
            #[cfg(feature = "sim")]
            let added: Vec<_> = proposal.added.iter().map(|peer| (peer.broker, peer.epoch.0)).collect();
            sim_event!(IsrProposed {
                partition: self.id,
                epoch,
                expect: proposal.expect.0,
                isr: &proposal.value.isr,
                added: &added
            });
            self.asked = Some(Question { epoch, about: About::Proposal });
            self.around.agreement.propose(self.id, proposal);
        }
    }

    /// Returns true if this broker waits for metadata: a follower reported a newer epoch, or the key was missing for a moment while this
    /// broker led. If the report was true, newer metadata is on its way.
    pub(super) fn has_given_up(&self) -> bool {
        matches!(self.part, Part::Waiting) && self.placed.is_given_up(self.broker)
    }

    /// Checks whether the metadata takes too long; called at intervals while [`Self::has_given_up`]. If so, the key is read from the
    /// store.
    pub(super) fn look_at_given_up(&mut self, now_ms: u64) {
        if !self.has_given_up() || self.asked.is_some() {
            self.placed.given_up_ms = None;
            return;
        }
        let since_ms = *self.placed.given_up_ms.get_or_insert(now_ms);
        if now_ms.saturating_sub(since_ms) >= GIVEN_UP_MS {
            self.asked = Some(Question { epoch: self.placed.epoch(), about: About::GivenUp });
            self.around.agreement.read_back(self.id);
        }
    }

    /// Applies the value that was read from the store. If it still names this broker as leader of an epoch that it already led, no
    /// election would follow. The broker clears the leader, which starts one.
    fn go_on_from(&mut self, value: PartitionValue, revision: Revision) {
        if !self.has_given_up() || self.placed.is_newer_than(revision) {
            return;
        }
        // Only the metadata cache starts a leadership: it shows whether this broker id still belongs to this process.
        if value.leader == Some(self.broker) && value.leader_epoch > self.placed.epoch() {
            return;
        }
        if value.leader_epoch < self.placed.heard {
            tracing::warn!(
                topic = %self.topic, partition = %self.id, heard = %self.placed.heard, epoch = %value.leader_epoch,
                "a follower spoke of a leader epoch that the metadata store does not know; it is not believed"
            );
            self.placed.heard = value.leader_epoch;
        }
        let free = value.leaderless();
        self.placed(value.into(), revision);
        if self.has_given_up() {
            self.asked = Some(Question { epoch: self.placed.epoch(), about: About::Proposal });
            let proposal = Proposal { expect: revision, value: free, added: Vec::new() };
            self.around.agreement.propose(self.id, proposal);
        }
    }

    /// Applies an outcome of the metadata store.
    pub(super) fn agreed(&mut self, outcome: Agreed) {
        let asked = self.asked.take();
        let found = match &outcome {
            Agreed::Found(value, revision) => Some((value.clone(), *revision)),
            _ => None,
        };
        if asked.is_some_and(|asked| asked.about == About::GivenUp)
            && let Some((value, revision)) = found.clone()
        {
            self.go_on_from(value, revision);
        }
        let Part::Leading(leader) = &mut self.part else { return };
        let (epoch, reading) = (leader.epoch(), leader.in_sync().awaits_reading());
        let before = leader.in_sync().value().isr.clone();
        let about = if reading { About::Outcome } else { About::Proposal };
        let is_due = asked.is_some_and(|asked| asked.epoch == epoch && asked.about == about);
        let observed = if is_due {
            leader.in_sync_mut().agreed(outcome)
        } else {
            // The request is of an earlier epoch, or the metadata was faster. The outcome counts for nothing, but its value may be new.
            found.as_ref().map_or(Observed::Same, |(value, revision)| leader.in_sync_mut().observed(value, *revision))
        };
        match observed {
            Observed::Same => {}
            Observed::Adopted => {
                self.around.counts.isr_changed(&before, &leader.in_sync().value().isr);
                let (value, revision) = (leader.in_sync().value().clone(), leader.in_sync().revision());
                self.placed(value.into(), revision);
            }
            Observed::Deposed { .. } => match found {
                Some((value, _)) if value.leader == Some(self.broker) => self.deposed(value.leader_epoch),
                Some((value, revision)) => self.placed(value.into(), revision),
                None => {}
            },
            Observed::Gone => {
                tracing::info!(topic = %self.topic, partition = %self.id, "the partition's key is gone; it is being deleted");
                self.wait();
            }
        }
        self.propose();
    }
}

/// Counts one acknowledgement. Returns true if it counts.
fn count(partition: PartitionId, in_sync: &mut InSync, Ack { peer, epoch, ends }: Ack) -> bool {
    match in_sync.acknowledged(peer, epoch, ends) {
        Ok(()) => {
            sim_event!(AckCounted {
                partition,
                epoch: in_sync.epoch(),
                follower: peer.broker,
                registered: peer.epoch.0,
                acknowledged: epoch,
                written: ends.written,
                persisted: ends.persisted
            });
            true
        }
        Err(error) => {
            tracing::debug!(%partition, broker = %peer.broker, %error, "an acknowledgement is not counted");
            false
        }
    }
}
