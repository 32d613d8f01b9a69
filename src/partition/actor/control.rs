//! Control messages of the task, and its role changes: idle, following or leading.
//!
//! # Transitions
//!
//! | input | while idle | while following in e | while leading in e |
//! | --- | --- | --- | --- |
//! | this broker leads in e' > e | leads | unsubscribes, leads | leads again, writers of e get results |
//! | another broker leads in e' > e | follows | follows the other broker | follows, writers get results |
//! | no broker leads in e' > e, or this broker is no replica | | unsubscribes | writers get results |
//! | other ISR or ELR in e | | | adopts them |
//! | another addition of this replica in e | | unsubscribes, follows again | |
//! | a follower or the tier state names e' > e | does not start to lead in e | | becomes idle; a second later it reads the key from the metadata store |
//! | the disk fails | | unsubscribes, becomes idle | resigns |
//! | the partition's key is deleted (outcome of a request) | | | becomes idle, writers get results |
//! | an older revision | | | |
//!
//! # Invariants
//!
//! Readers stay open in every case. When the epoch ends, a writer whose acks rule holds gets its acknowledgement. Any
//! other writer whose records are in the log gets `AppendError::Deposed`: the outcome is unknown. A writer whose
//! records were never appended gets `AppendError::NotLeader`.
//!
//! A new leader must have all committed records. Every clean election ensures that. After an unclean election, the log
//! may end below the tiered end, or hold other records than the object store. Then the object store decides: the log is
//! reset to the tiered end, or to the log start if that is later.

use std::sync::Arc;

use super::{
    Actor, ControlMessage, MAX_CONTROL_BATCH, RoleState, SubscribeMessage, isr_rules,
    leading::{AppendError, LeaderRole},
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
    /// Handles this control message and those that are queued behind it, at most [`MAX_CONTROL_BATCH`] in total.
    pub(super) async fn handle_control(&mut self, first: ControlMessage) {
        self.handle_control_message(first).await;
        for _ in 1..MAX_CONTROL_BATCH {
            let Some(message) = self.inbox.next_control() else { break };
            self.handle_control_message(message).await;
        }
    }

    /// Handles one control message.
    async fn handle_control_message(&mut self, message: ControlMessage) {
        if let ControlMessage::Assign(..) | ControlMessage::IsrOutcome(_) | ControlMessage::NewerEpoch(_) = message {
            // Barrier: commits of earlier messages of this turn belong to the role and the value that this message may
            // end.
            self.publish();
        }
        match message {
            ControlMessage::Assign(assignment, responder) => {
                self.assign(*assignment);
                // The caller reads the published role after the response.
                self.finish_turn();
                let _dropped_receiver = responder.send(());
            }
            ControlMessage::Subscribe(subscribe) => {
                let SubscribeMessage { peer, epoch, position, progress, responder } = *subscribe;
                let response = self.on_subscribe(peer, epoch, position, progress).await;
                let _dropped_receiver = responder.send(response);
            }
            ControlMessage::FollowerDisconnected(peer, cause) => {
                self.update_isr_tracker(|tracker| tracker.on_disconnected(peer, cause))
            }
            ControlMessage::BrokerStatusChanged(broker, status) => {
                self.metadata.set_broker_status(broker, status);
                self.update_isr_tracker(|tracker| tracker.on_broker_status(broker, status));
            }
            ControlMessage::IsrOutcome(outcome) => self.on_isr_outcome(*outcome),
            ControlMessage::NewerEpoch(epoch) => self.on_reported_epoch(epoch),
            ControlMessage::Link(event) => self.on_link_event(event).await,
            ControlMessage::BootstrapReady(request_id, tables) => self.on_tables_read(request_id, tables).await,
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
        // The metadata may name this broker although the task is idle: this broker was deposed, or does not lead yet.
        let leader = leader.filter(|leader| role != ReplicaRole::Idle || *leader != self.broker);
        ReplicaStatus { role, epoch, leader }
    }

    /// Applies an assignment, unless its revision is older than the applied one.
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

    /// Applies a value of the partition, and takes the role that the value gives this broker. A value older than the
    /// applied one is dropped.
    pub(super) fn apply_partition_value(&mut self, value: Arc<PartitionValue>, revision: Revision) {
        let (epoch, unclean_epoch) = (value.leader_epoch, value.unclean_epoch);
        let transition = self.metadata.apply(Arc::clone(&value), revision, self.broker);
        sim_event!(MetadataApplied { partition: self.id, revision: self.metadata.revision().0 });
        match transition {
            Transition::Stale => {}
            Transition::Unchanged => self.apply_broker_statuses(),
            Transition::SetsChanged => self.adopt_sets(&value, revision),
            Transition::Lead => self.become_leader(&value),
            Transition::Follow(leader) => self.become_follower(leader, epoch, unclean_epoch),
            Transition::Idle | Transition::EndedEpoch => self.become_idle(),
        }
    }

    /// Applies a newer value of the epoch in which this broker leads. Does nothing in another role.
    fn adopt_sets(&mut self, value: &PartitionValue, revision: Revision) {
        let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role else { return };
        let old_isr = leader.in_sync().value().isr.clone();
        leader.in_sync_mut().on_value(value, revision);
        self.ctx.counters.count_isr_change(&old_isr, &leader.in_sync().value().isr);
        self.apply_broker_statuses();
    }

    /// Ends the current role. A follower unsubscribes; the writers of a leader get their results. A pending request for
    /// tables is cancelled. The high watermark of the role remains as `committed_end`.
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
                for writer in leader.drain_waiters() {
                    writer.respond(Err(AppendError::Deposed));
                }
            }
        }
    }

    /// Ends the role without a new one, in the task and in its metadata. A later assignment can give the role of a
    /// follower again, even by the same partition value.
    pub(super) fn become_idle(&mut self) {
        self.metadata.end_role();
        self.leave_role();
    }

    /// Ends the current role and follows `leader` in `epoch`. The task subscribes when the link is connected. After a
    /// disk failure the task becomes idle instead.
    fn become_follower(&mut self, leader: BrokerId, epoch: LeaderEpoch, unclean_epoch: Option<LeaderEpoch>) {
        self.leave_role();
        if self.published.has_failed() {
            // The disk failed, so the replica cannot copy. Without a subscription, no leader waits for it.
            return self.metadata.end_role();
        }
        tracing::debug!(partition = %self.id, %leader, %epoch, "became a follower");
        self.role = RoleState::Following(Follower::new(leader, epoch, self.high_watermark(), unclean_epoch));
        self.ctx.links.start_following(self.id, leader);
    }

    /// Ends the current role. Then starts to lead in the epoch of this value, or first requests the tables in the
    /// object store. Refuses the leadership if the log has a newer epoch: the task is then idle.
    fn become_leader(&mut self, value: &PartitionValue) {
        let (epoch, last_epoch) = (value.leader_epoch, self.log.epochs().last().map(|(last, _)| last));
        if let Some(last) = last_epoch.filter(|last| *last > epoch) {
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

    /// Starts to lead in the epoch of the applied value. The caller has ensured that the log ends neither below the
    /// tiered end nor below the log start.
    pub(super) fn start_leading(&mut self) {
        let Some(value) = self.metadata.value().cloned() else { return };
        let progress = ReplicaProgress { log_end: self.log.log_end(), persisted_end: self.log.persisted_end() };
        let committed_end = self.committed_end.max(self.tiered_end).max(self.log_start).min(progress.log_end);
        let (epoch, in_sync) = (value.leader_epoch, value.isr.len());
        let rules = isr_rules(&self.config, self.lag_ms);
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
        self.ctx.counters.leader_elections_won.inc();
        tracing::debug!(
            partition = %self.id, %epoch, log_end = %progress.log_end, %committed_end, in_sync,
            "became the leader"
        );
        self.apply_broker_statuses();
        // Only a leader uploads: segments that were sealed before may be due.
        self.maintenance.push(self.id);
    }

    /// Applies the status of every replica's broker to the leader. The leader may then repeat a refused proposal. Does
    /// nothing in another role.
    fn apply_broker_statuses(&mut self) {
        let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role else { return };
        let replicas = leader.in_sync().value().replicas.clone();
        for broker in replicas {
            leader.in_sync_mut().on_broker_status(broker, self.metadata.broker_status(broker));
        }
    }

    /// Handles a report of a leader epoch. The reported epoch may be newer than the applied value's. A leading task
    /// then becomes idle, and a task that waits for tables to lead does not start to lead. The task stays idle until it
    /// receives metadata with the reported epoch. A read of the metadata store that shows that the store does not have
    /// that epoch also ends the idle state.
    pub(super) fn on_reported_epoch(&mut self, reported: LeaderEpoch) {
        self.metadata.on_reported_epoch(reported);
        let epoch = self.metadata.epoch();
        let leads = matches!(self.role, RoleState::Leading(_)) || self.bootstrap_request.is_for_leadership();
        if leads && epoch < reported {
            tracing::info!(
                topic = %self.topic, partition = %self.id, %epoch, reported_epoch = %reported,
                "deposed by a newer leader epoch"
            );
            self.become_idle();
        }
    }

    /// Applies the tiered end and the log start of the metadata, and publishes. A leader of the state's epoch, or of an
    /// earlier one, committed all records below both. If the state's epoch is newer than this leader's, this log may
    /// hold other records below these offsets, so this leader is deposed first.
    pub(super) fn apply_tier_state(&mut self, state: &TierState) {
        if !mutant!(AdoptNewerTieredEnd) {
            self.on_reported_epoch(state.epoch);
        }
        self.tiered_end = self.tiered_end.max(state.tiered_end());
        self.log_start = self.log_start.max(state.log_start);
        if let RoleState::Leading(LeaderRole { leader, .. }) = &mut self.role {
            leader.in_sync_mut().on_committed(self.tiered_end.max(self.log_start));
            leader.on_tiered(self.tiered_end);
        }
        // Barrier: readers must see the new log start before the files are removed.
        self.publish();
        self.advance_log_start();
    }
}
