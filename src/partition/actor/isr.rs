//! A leader's work for its followers: subscriptions, acknowledgements, and the ISR changes that follow from them. Also
//! the requests of an idle replica whose metadata is late: it reads the partition's key, and may clear the leader.

use super::{Actor, RoleState, leading::LeaderRole, signals::FollowerAck};
use crate::{
    cluster::{PartitionValue, Revision},
    model::{BrokerId, LeaderEpoch, PartitionId, format_ids},
    partition::{
        leader::{
            divergence::{BootstrapTables, LocalLogBounds, LogPosition, SubscribeError, SubscribeOutcome},
            isr::{IsrProposal, IsrTracker, ProposalOutcome, ValueUpdate},
            member::{PeerId, ReplicaProgress},
        },
        metadata::ReadBack,
        role::SubscribeResponse,
    },
    task::clock,
    telemetry::LogThrottle,
};

/// Request of this task to the metadata store that has no outcome yet.
#[derive(Clone, Copy)]
pub(super) struct PendingStoreRequest {
    /// Epoch of the applied value when the task sent the request.
    epoch: LeaderEpoch,
    kind: StoreRequestKind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum StoreRequestKind {
    /// Write of a proposed value: by a leader, or by an idle replica that clears the leader.
    Proposal,
    /// Read of the key by a leader, because the outcome of its proposal is unknown.
    ReadBack,
    /// Read of the key by an idle replica, because its metadata is late ([`Actor::awaits_metadata`]).
    LateMetadata,
}

/// ISR that was proposed last, with the throttle of its log lines. While the metadata store refuses the proposal, the
/// leader repeats it at each tick (250 ms).
pub(super) struct LastProposal {
    isr: Vec<BrokerId>,
    log: LogThrottle,
}

impl LastProposal {
    /// Counts a proposal of this ISR; a different ISR starts a new count. Returns the number of proposals since the
    /// last log line, or `None` if no line is due yet.
    fn occur(last: &mut Option<Box<Self>>, isr: &[BrokerId]) -> Option<u64> {
        if last.as_ref().is_none_or(|proposed| proposed.isr != isr) {
            *last = Some(Box::new(Self { isr: isr.to_vec(), log: LogThrottle::default() }));
        }
        last.as_mut()?.log.occur(clock::monotonic())
    }
}

impl Actor {
    /// Applies `update` to the leader's ISR state. Does nothing in another role: only a leader has that state.
    pub(super) fn update_isr_tracker(&mut self, update: impl FnOnce(&mut IsrTracker)) {
        if let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role {
            update(leader.in_sync_mut());
        }
    }

    /// Handles a subscription of a follower, and returns the response. An accepted subscription also counts as an
    /// acknowledgement of the reported progress, up to the accepted offset.
    pub(super) async fn on_subscribe(
        &mut self,
        peer: PeerId,
        epoch: LeaderEpoch,
        position: LogPosition,
        progress: ReplicaProgress,
    ) -> SubscribeResponse {
        // Acknowledgements on this follower's earlier subscriptions do not count.
        self.signals.drop_acks_of(peer.broker);
        let has_tables = self.has_tiered_tables();
        let local =
            LocalLogBounds { local_start: self.log.local_start(), tiered_end: has_tables.then_some(self.tiered_end) };
        let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role else {
            return SubscribeResponse::rejected(
                self.metadata.epoch(),
                "this broker does not lead the partition".to_owned(),
            );
        };
        if let Some(reason) = self.published.error() {
            return SubscribeResponse::rejected(leader.epoch(), format!("the leader's disk failed: {reason}"));
        }
        let mut outcome = leader.in_sync_mut().on_subscribe(peer, epoch, position, local, &self.log.epochs());
        let (epoch, high_watermark) = (leader.epoch(), leader.high_watermark());
        let in_sync = leader.in_sync().value().isr.contains(&peer.broker);
        if !matches!(outcome, SubscribeOutcome::Rejected(_)) {
            sim_event!(FollowerSubscribed {
                partition: self.id,
                epoch,
                follower: peer.broker,
                registered: peer.epoch.0
            });
        }
        match &mut outcome {
            SubscribeOutcome::Accepted(at) => {
                let progress = ReplicaProgress {
                    log_end: progress.log_end.min(*at),
                    persisted_end: progress.persisted_end.min(*at),
                };
                apply_ack(self.id, leader.in_sync_mut(), FollowerAck { peer, epoch, progress });
                self.published.acknowledged(peer.broker, progress.log_end);
                tracing::debug!(partition = %self.id, broker = %peer.broker, %epoch, %at, "follower subscribed");
            }
            SubscribeOutcome::Bootstrap(tables) if !tables.from_object_store => {
                match self.tables_at_start(peer.broker).await {
                    Ok(at_start) => **tables = at_start,
                    Err(reason) => outcome = SubscribeOutcome::Rejected(SubscribeError::Unavailable { reason }),
                }
            }
            SubscribeOutcome::Diverged { .. } | SubscribeOutcome::Bootstrap(_) => {}
            SubscribeOutcome::Rejected(reason) => {
                tracing::debug!(partition = %self.id, broker = %peer.broker, %reason, "rejected a subscription");
            }
        }
        SubscribeResponse { epoch, high_watermark, outcome, in_sync }
    }

    /// Reads the epoch history and the producer state of the log before its start on this disk, for the replica on
    /// `follower`, which bootstraps there. The error is the reason that the follower receives.
    async fn tables_at_start(&mut self, follower: BrokerId) -> Result<BootstrapTables, String> {
        // The read may take long. Earlier ISR changes and results of writes must not wait for the read.
        self.finish_turn();
        match self.log.run_blocking(|replica| replica.tables_at_start()).await {
            Ok((start, epochs, producers)) => Ok(BootstrapTables {
                start,
                from_object_store: false,
                epochs: epochs.iter().collect(),
                producers: producers.to_bytes(),
            }),
            Err(error) => {
                if let Some(count) = self.published.count_follower_read_error() {
                    tracing::warn!(
                        topic = %self.topic, partition = %self.id, %follower, %error, count,
                        "cannot read the start of this broker's log, so the follower cannot start to copy it, and \
                         retries: check the disk"
                    );
                }
                Err(format!("the leader cannot read the start of its log: {error}"))
            }
        }
    }

    /// Applies acknowledgements of followers.
    pub(super) fn on_acknowledged(&mut self, acks: Vec<FollowerAck>) {
        let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role else { return };
        for ack in acks {
            apply_ack(self.id, leader.in_sync_mut(), ack);
        }
    }

    /// Sends the ISR change that is due, or a read after an unknown outcome, to the metadata store. Only one request is
    /// pending at a time, so that an outcome is never applied to another request. A leader with a failed disk only
    /// resigns.
    pub(super) fn propose(&mut self) {
        if self.published.has_failed() {
            return self.resign();
        }
        let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role else { return };
        if self.pending_request.is_some() {
            return;
        }
        let epoch = leader.epoch();
        if leader.in_sync().needs_read_back() {
            self.pending_request = Some(PendingStoreRequest { epoch, kind: StoreRequestKind::ReadBack });
            self.ctx.isr_updater.read_back(self.id);
        } else if let Some(proposal) = leader.in_sync_mut().start_proposal() {
            if let Some(proposals) = LastProposal::occur(&mut self.proposed, &proposal.value.isr) {
                tracing::info!(
                    topic = %self.topic, partition = %self.id, %epoch, proposals, isr = %format_ids(&proposal.value.isr),
                    elr = %format_ids(&proposal.value.elr), before = %format_ids(&leader.in_sync().value().isr),
                    "proposing an ISR change"
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
            self.pending_request = Some(PendingStoreRequest { epoch, kind: StoreRequestKind::Proposal });
            self.ctx.isr_updater.propose(self.id, proposal);
        }
    }

    /// Returns true if this replica is idle and its metadata is late. Either a newer epoch was reported, or the
    /// leadership ended here although the value still names this broker.
    pub(super) fn awaits_metadata(&self) -> bool {
        matches!(self.role, RoleState::Idle) && self.metadata.is_late(self.broker)
    }

    /// Requests a read of the key from the store if the metadata has been late for a second, and no request is pending.
    /// Called at each tick.
    pub(super) fn check_late_metadata(&mut self, now_ms: u64) {
        let may_read = self.awaits_metadata() && self.pending_request.is_none();
        if self.metadata.is_read_due(may_read, now_ms) {
            self.pending_request =
                Some(PendingStoreRequest { epoch: self.metadata.epoch(), kind: StoreRequestKind::LateMetadata });
            self.ctx.isr_updater.read_back(self.id);
        }
    }

    /// Applies the value that was read from the store because the metadata was late. Does nothing if the metadata is no
    /// longer late, or if the value is to be ignored ([`ReadBack::Ignored`]). If the value still names this broker as
    /// leader of an epoch that it already led or refused to lead, no election would follow. The broker then proposes
    /// the value without a leader, which starts an election.
    fn on_read_back(&mut self, value: PartitionValue, revision: Revision) {
        if !self.awaits_metadata() {
            return;
        }
        match self.metadata.check_read_back(&value, revision, self.broker) {
            ReadBack::Ignored => return,
            ReadBack::Confirmed => {}
            ReadBack::Disproved(reported) => tracing::warn!(
                topic = %self.topic, partition = %self.id, %reported, epoch = %value.leader_epoch,
                "ignoring a report of a leader epoch that the metadata store does not have"
            ),
        }
        let leaderless = value.leaderless();
        self.apply_partition_value(value.into(), revision);
        if self.awaits_metadata() {
            self.pending_request =
                Some(PendingStoreRequest { epoch: self.metadata.epoch(), kind: StoreRequestKind::Proposal });
            let proposal = IsrProposal { expect: revision, value: leaderless, added: Vec::new() };
            self.ctx.isr_updater.propose(self.id, proposal);
        }
    }

    /// Handles the outcome of the pending request. An idle replica applies only a value that it read because its
    /// metadata was late. A leader applies the outcome of its own request. The request may be of an earlier epoch or of
    /// another kind than the leader waits for. The leader then applies only the value in the outcome.
    pub(super) fn on_isr_outcome(&mut self, outcome: ProposalOutcome) {
        let request = self.pending_request.take();
        let current = match &outcome {
            ProposalOutcome::CurrentValue(value, revision) => Some((value.clone(), *revision)),
            ProposalOutcome::Committed(_) | ProposalOutcome::Deleted | ProposalOutcome::Unknown => None,
        };
        if request.is_some_and(|request| request.kind == StoreRequestKind::LateMetadata)
            && let Some((value, revision)) = current.clone()
        {
            self.on_read_back(value, revision);
        }
        let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role else { return };
        let (epoch, needs_read_back) = (leader.epoch(), leader.in_sync().needs_read_back());
        let old_isr = leader.in_sync().value().isr.clone();
        let kind = if needs_read_back { StoreRequestKind::ReadBack } else { StoreRequestKind::Proposal };
        let is_expected = request.is_some_and(|request| request.epoch == epoch && request.kind == kind);
        let update = if is_expected {
            leader.in_sync_mut().on_outcome(outcome)
        } else {
            // The request belongs to an earlier epoch, or this leader waits for another kind of request. Only the value
            // in the outcome may be new.
            current
                .as_ref()
                .map_or(ValueUpdate::Unchanged, |(value, revision)| leader.in_sync_mut().on_value(value, *revision))
        };
        match update {
            ValueUpdate::Unchanged => {}
            ValueUpdate::Adopted => {
                self.ctx.counters.count_isr_change(&old_isr, &leader.in_sync().value().isr);
                let (value, revision) = (leader.in_sync().value().clone(), leader.in_sync().revision());
                self.apply_partition_value(value.into(), revision);
            }
            ValueUpdate::Deposed { .. } => match current {
                // This broker leads in a newer epoch when the metadata cache delivers the value, and is idle until
                // then.
                Some((value, _)) if value.leader == Some(self.broker) => self.on_reported_epoch(value.leader_epoch),
                Some((value, revision)) => self.apply_partition_value(value.into(), revision),
                None => {}
            },
            ValueUpdate::Deleted => {
                tracing::info!(
                    topic = %self.topic, partition = %self.id,
                    "the partition's key does not exist: the topic is being deleted"
                );
                self.become_idle();
            }
        }
    }
}

/// Applies one acknowledgement; an invalid one is only logged.
fn apply_ack(partition: PartitionId, in_sync: &mut IsrTracker, FollowerAck { peer, epoch, progress }: FollowerAck) {
    match in_sync.on_acknowledged(peer, epoch, progress) {
        Ok(()) => {
            sim_event!(AckCounted {
                partition,
                epoch: in_sync.epoch(),
                follower: peer.broker,
                registered: peer.epoch.0,
                acknowledged: epoch,
                written: progress.log_end,
                persisted: progress.persisted_end
            });
        }
        Err(error) => {
            tracing::debug!(%partition, broker = %peer.broker, %error, "ignored an acknowledgement");
        }
    }
}
