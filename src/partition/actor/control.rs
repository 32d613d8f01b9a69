//! Role changes of the task by the metadata: idle, following or leading.
//!
//! # Transitions
//!
//! | input | while idle | while following in e | while leading in e |
//! | --- | --- | --- | --- |
//! | this broker leads in e' > e | leads | unsubscribes, leads | leads again, writers of e get results |
//! | another broker leads in e' > e | follows | follows the other broker | follows, writers get results |
//! | no broker leads in e' > e, or this is no replica | | unsubscribes | writers get results |
//! | other ISR or ELR in e | | | adopts them |
//! | another addition of this replica in e | | unsubscribes, follows again | |
//! | a follower or the tier state names e' > e | does not begin to lead in e | | admits nothing more; a second later it reads the key from the metadata store |
//! | the disk fails | | unsubscribes for good | resigns |
//! | an older revision | | | |
//!
//! # Invariants
//!
//! Readers stay open in every case: committed records stay where they are. A writer whose records are in the log when
//! the epoch ends gets `AppendError::Deposed`: the outcome is unknown. A writer whose records were never appended gets
//! `AppendError::NotLeader`.
//!
//! A new leader must have all committed records. Elections ensure that, except an unclean one: then the log may end
//! before the object store does, or hold other records than the object store. The object store is right in that case,
//! and the log is reset to its end.

use std::sync::Arc;

use super::{
    Actor, ControlMessage, MAX_CONTROL_BATCH, RoleState, SubscribeMessage,
    leading::{AppendError, LeaderRole},
    rule,
};
use crate::{
    cluster::{PartitionValue, Revision},
    model::{BrokerId, LeaderEpoch},
    partition::{
        follower::Follower,
        leader::{Leader, isr::LeaderStart, member::ReplicaProgress},
        metadata::Transition,
        role::{PartitionAssignment, ReplicaRole, ReplicaStatus},
    },
    tier::TierState,
};

impl Actor {
    /// Handles this control message and those that are queued behind it.
    pub(super) async fn handle_control(&mut self, first: ControlMessage) {
        self.handle_control_message(first).await;
        for _ in 1..MAX_CONTROL_BATCH {
            let Some(message) = self.inbox.next_control() else { break };
            self.handle_control_message(message).await;
        }
    }

    async fn handle_control_message(&mut self, message: ControlMessage) {
        if let ControlMessage::Assign(..) | ControlMessage::IsrOutcome(_) | ControlMessage::Deposed(_) = message {
            // Barrier: commits of earlier control messages belong to the role and the value that may end now.
            self.publish();
        }
        match message {
            ControlMessage::Assign(assignment, done) => {
                self.assign(*assignment);
                // The caller finds the new role.
                self.finish_turn();
                let _gone = done.send(());
            }
            ControlMessage::Subscribe(subscribe) => {
                let SubscribeMessage { peer, epoch, position, progress, responder } = *subscribe;
                let response = self.on_subscribe(peer, epoch, position, progress).await;
                let _gone = responder.send(response);
            }
            ControlMessage::FollowerDisconnected(peer, cause) => {
                self.update_isr_tracker(|tracker| tracker.on_disconnected(peer, cause))
            }
            ControlMessage::BrokerStatusChanged(broker, status) => {
                self.metadata.set_broker_status(broker, status);
                self.update_isr_tracker(|tracker| tracker.on_broker_status(broker, status));
            }
            ControlMessage::IsrOutcome(outcome) => self.on_isr_outcome(*outcome),
            ControlMessage::Deposed(epoch) => self.on_deposed(epoch),
            ControlMessage::Link(event) => self.on_link_event(event).await,
            ControlMessage::BootstrapReady(request_id, tables) => self.on_tables(request_id, tables).await,
        }
    }

    /// Returns the current replica status.
    pub(super) fn current_status(&self) -> ReplicaStatus {
        let (epoch, leader) = (self.metadata.epoch(), self.metadata.leader());
        let role = match &self.role {
            RoleState::Leading(LeaderRole { leader, .. }) => {
                ReplicaRole::Leader { epoch_committed: leader.in_sync().is_epoch_committed() }
            }
            RoleState::Following(follower) => ReplicaRole::Follower {
                leader: follower.leader(),
                in_sync: follower.is_following() && self.metadata.isr_contains(self.broker),
            },
            RoleState::Idle => ReplicaRole::Idle,
        };
        // Another broker leads by now, but this task has no metadata that names it.
        let deposed = role == ReplicaRole::Idle && leader == Some(self.broker);
        ReplicaStatus { role, epoch, leader: leader.filter(|_| !deposed) }
    }

    fn assign(&mut self, assignment: PartitionAssignment) {
        let PartitionAssignment { value, revision, committed, registered } = assignment;
        if self.metadata.is_stale(revision) {
            return;
        }
        if let Some(state) = committed {
            self.apply_tier_state(&state);
        }
        self.metadata.set_broker_statuses(registered);
        self.apply_partition_value(value, revision);
    }

    /// Applies a value of the partition: takes the role that the value gives this broker.
    pub(super) fn apply_partition_value(&mut self, value: Arc<PartitionValue>, revision: Revision) {
        let (epoch, unclean_epoch) = (value.leader_epoch, value.unclean_epoch);
        let transition = self.metadata.apply(Arc::clone(&value), revision, self.broker);
        sim_event!(MetadataApplied { partition: self.id, revision: self.metadata.revision().0 });
        match transition {
            Transition::Stale => {}
            Transition::Same => self.apply_broker_statuses(),
            Transition::SetsChanged => self.adopt_sets(&value, revision),
            Transition::Lead => self.become_leader(&value),
            Transition::Follow(leader) => self.become_follower(leader, epoch, unclean_epoch),
            Transition::Idle | Transition::EndedEpoch => self.become_idle(),
        }
    }

    /// Applies a newer value of the epoch in which this broker leads.
    fn adopt_sets(&mut self, value: &PartitionValue, revision: Revision) {
        let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role else { return };
        let before = leader.in_sync().value().isr.clone();
        leader.in_sync_mut().on_value(value, revision);
        self.ctx.counters.isr_changed(&before, &leader.in_sync().value().isr);
        self.apply_broker_statuses();
    }

    /// Leaves the current role, in the epoch of that role.
    fn leave_role(&mut self) {
        self.committed_end = self.high_watermark();
        self.bootstrap_request.cancel();
        match std::mem::replace(&mut self.role, RoleState::Idle) {
            RoleState::Idle => {}
            RoleState::Following(_) => self.ctx.links.unsubscribe(self.id, self.metadata.epoch(), false),
            RoleState::Leading(LeaderRole { mut leader, .. }) => {
                self.published.set_leading(false);
                // Writers whose rule holds get their acknowledgement first.
                leader.take_due(|writer, acked| writer.respond(Ok(acked)));
                for writer in leader.abandon() {
                    writer.respond(Err(AppendError::Deposed));
                }
            }
        }
    }

    pub(super) fn become_idle(&mut self) {
        self.metadata.end_role();
        self.leave_role();
    }

    fn become_follower(&mut self, leader: BrokerId, epoch: LeaderEpoch, unclean: Option<LeaderEpoch>) {
        self.leave_role();
        if self.published.has_failed() {
            // The replica cannot copy: no leader may wait for it.
            return self.metadata.end_role();
        }
        tracing::debug!(partition = %self.id, %leader, %epoch, "became a follower");
        self.role = RoleState::Following(Follower::new(leader, epoch, self.high_watermark(), unclean));
        self.ctx.links.start_following(self.id, leader);
    }

    fn become_leader(&mut self, value: &PartitionValue) {
        let (epoch, last) = (value.leader_epoch, self.log.epochs().last().map(|(last, _)| last));
        if let Some(last) = last.filter(|last| *last > epoch) {
            tracing::error!(
                topic = %self.topic, partition = %self.id, %epoch, %last,
                "the metadata is older than this log: its leader epoch is below the epoch of the log's last records; \
                 check whether etcd was restored from a backup. This broker leads only in a newer epoch"
            );
            self.metadata.refuse_leadership();
            return self.become_idle();
        }
        self.leave_role();
        if self.needs_object_store(value) {
            self.request_tables_to_lead();
        } else {
            self.start_leading();
        }
    }

    pub(super) fn start_leading(&mut self) {
        let Some(value) = self.metadata.value().cloned() else { return };
        let progress = ReplicaProgress { log_end: self.log.log_end(), persisted_end: self.log.persisted_end() };
        let committed_end = self.committed_end.max(self.tiered_end).max(self.log_start).min(progress.log_end);
        let (epoch, in_sync) = (value.leader_epoch, value.isr.len());
        let rules = rule(&self.config, self.lag_ms);
        let start = LeaderStart {
            me: self.broker,
            value: PartitionValue::clone(&value),
            revision: self.metadata.revision(),
            progress,
            committed_end,
            rules,
        };
        self.bootstrap_request.cancel();
        self.metadata.start_leading();
        sim_event!(LeadershipStarted { partition: self.id, epoch, start: progress.log_end });
        self.role = RoleState::Leading(LeaderRole::new(Leader::new(start, self.tiered_end)));
        self.published.set_leading(true);
        self.ctx.counters.leader_epochs.inc();
        tracing::debug!(
            partition = %self.id, %epoch, log_end = %progress.log_end, %committed_end, in_sync,
            "became the leader"
        );
        self.apply_broker_statuses();
        // Segments may be due that could not be uploaded while another broker led.
        self.maintenance.push(self.id);
    }

    /// Applies the status of every replica's broker to the leader. A proposal that was refused may then be repeated.
    fn apply_broker_statuses(&mut self) {
        let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role else { return };
        let replicas = leader.in_sync().value().replicas.clone();
        for broker in replicas {
            leader.in_sync_mut().on_broker_status(broker, self.metadata.broker_status(broker));
        }
    }

    /// Handles a report of a newer epoch. A leader of an older epoch admits nothing more until the metadata contains
    /// the newer one. A leadership of an older epoch that waits for the object store does not begin.
    pub(super) fn on_deposed(&mut self, known: LeaderEpoch) {
        self.metadata.on_reported_epoch(known);
        let epoch = self.metadata.epoch();
        let leads = matches!(self.role, RoleState::Leading(_)) || self.bootstrap_request.is_for_leadership();
        if leads && epoch < known {
            tracing::info!(
                topic = %self.topic, partition = %self.id, %epoch, %known,
                "deposed by a newer leader epoch"
            );
            self.become_idle();
        }
    }

    /// Applies the tiered end and the log start of the metadata. All records below both were committed, by a leader of
    /// the state's epoch or an earlier one. If that epoch is newer than the one in which this broker leads, this log
    /// may hold other records there.
    pub(super) fn apply_tier_state(&mut self, state: &TierState) {
        if !mutant!(AdoptNewerTieredEnd) {
            self.on_deposed(state.epoch);
        }
        self.tiered_end = self.tiered_end.max(state.tiered_end());
        self.log_start = self.log_start.max(state.log_start);
        if let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role {
            leader.in_sync_mut().on_committed(self.tiered_end.max(self.log_start));
            leader.on_tiered(self.tiered_end);
        }
        // Barrier: readers must see the new log start before the files are removed.
        self.publish();
        self.keep_log_start();
    }
}
