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
//! | a follower or the tier state names e' > e | | | admits nothing more; a second later it reads the key from the metadata store |
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

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{Actor, ControlMessage, MAX_CONTROL_BATCH, RoleState, SubscribeMessage, leading::AppendError, rule};
use crate::{
    cluster::{PartitionValue, Revision},
    model::{BrokerId, LeaderEpoch},
    partition::{
        follower::Follower,
        leader::{
            Leader,
            isr::LeaderStart,
            member::{BrokerStatus, ReplicaProgress},
        },
        role::{PartitionAssignment, ReplicaRole, ReplicaStatus},
    },
    tier::TierState,
};

/// Metadata that the task has applied.
#[derive(Default)]
pub(in crate::partition) struct AppliedMetadata {
    value: Option<(Arc<PartitionValue>, Revision)>,
    broker_status: BTreeMap<BrokerId, BrokerStatus>,
    /// Newest epoch that a follower reported, or in which a tier state was committed.
    pub(super) newest_seen_epoch: LeaderEpoch,
    /// Time, by the clock of ticks, since which the metadata is [late](Self::awaits_newer_value).
    pub(super) waiting_since_ms: Option<u64>,
    /// Newest epoch in which this task led. It never leads twice in one epoch, because it has no state of its earlier
    /// proposals.
    last_led_epoch: Option<LeaderEpoch>,
    /// Number of the last request to the object store; a response to an earlier one is dropped.
    pub(super) request_id: u64,
    /// `Some` if a new leader made that request, with the pause before the request.
    pub(super) pending_leadership: Option<Duration>,
}

impl AppliedMetadata {
    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.value.as_ref().map_or(LeaderEpoch(0), |(value, _)| value.leader_epoch)
    }

    pub(super) fn leader(&self) -> Option<BrokerId> {
        self.value.as_ref().and_then(|(value, _)| value.leader)
    }

    /// Returns true if the metadata is late: the value names this broker as leader of an epoch that ended here, or
    /// lacks an epoch that was reported here.
    pub(super) fn awaits_newer_value(&self, me: BrokerId) -> bool {
        let (epoch, led) = (self.epoch(), self.last_led_epoch);
        let names_this_broker = self.leader() == Some(me) && led.is_some_and(|led| led >= epoch);
        self.value.is_some() && (self.newest_seen_epoch > epoch || names_this_broker)
    }

    /// Returns true if a value newer than this revision is applied.
    pub(super) fn is_newer_than(&self, revision: Revision) -> bool {
        self.value.as_ref().is_some_and(|(_, applied)| *applied > revision)
    }

    /// Returns the addition of that broker's replica while it is being added.
    pub(super) fn added_after(&self, broker: BrokerId) -> Option<u64> {
        self.value.as_ref().and_then(|(value, _)| value.added_after(broker))
    }

    fn has_in_sync(&self, broker: BrokerId) -> bool {
        self.value.as_ref().is_some_and(|(value, _)| value.isr.contains(&broker))
    }
}

impl Actor {
    /// Handles control messages, then submits their effects to the journal and publishes them.
    pub(super) async fn handle_control(
        &mut self,
        first: ControlMessage,
        control: &mut tokio::sync::mpsc::Receiver<ControlMessage>,
    ) {
        self.handle_control_message(first).await;
        for _ in 1..MAX_CONTROL_BATCH {
            let Ok(message) = control.try_recv() else { break };
            self.handle_control_message(message).await;
        }
        self.submit_to_journal();
        self.publish();
        self.answer();
    }

    async fn handle_control_message(&mut self, message: ControlMessage) {
        if let ControlMessage::Assign(..) | ControlMessage::IsrOutcome(_) | ControlMessage::Deposed(_) = message {
            // Commits of earlier control messages belong to the role and the value that may end now.
            self.publish();
        }
        match message {
            ControlMessage::Assign(assignment, done) => {
                self.assign(*assignment);
                self.publish();
                let _gone = done.send(());
            }
            ControlMessage::Subscribe(subscribe) => {
                let SubscribeMessage { peer, epoch, position, progress, responder } = *subscribe;
                let response = self.join(peer, epoch, position, progress).await;
                self.propose();
                let _gone = responder.send(response);
            }
            ControlMessage::FollowerDisconnected(peer, cause) => {
                self.update_isr_tracker(|tracker| tracker.on_disconnected(peer, cause))
            }
            ControlMessage::BrokerStatusChanged(broker, status) => {
                self.placed.broker_status.insert(broker, status);
                self.update_isr_tracker(|tracker| tracker.on_broker_status(broker, status));
            }
            ControlMessage::IsrOutcome(outcome) => self.agreed(*outcome),
            ControlMessage::Deposed(epoch) => self.deposed(epoch),
            ControlMessage::Link(event) => self.on_link_event(event).await,
            ControlMessage::BootstrapReady(request_id, tables) => self.on_tables(request_id, tables).await,
        }
    }

    /// Returns the current replica status.
    pub(super) fn current_status(&self) -> ReplicaStatus {
        let (epoch, leader) = (self.placed.epoch(), self.placed.leader());
        let role = match &self.part {
            RoleState::Leading(leader) => {
                ReplicaRole::Leader { epoch_committed: leader.in_sync().is_epoch_committed() }
            }
            RoleState::Following(follower) => ReplicaRole::Follower {
                leader: follower.leader(),
                in_sync: follower.is_following() && self.placed.has_in_sync(self.broker),
            },
            RoleState::Idle => ReplicaRole::Idle,
        };
        // Another broker leads by now, but this task has no metadata that names it.
        let deposed = role == ReplicaRole::Idle && leader == Some(self.broker);
        ReplicaStatus { role, epoch, leader: leader.filter(|_| !deposed) }
    }

    fn assign(&mut self, assignment: PartitionAssignment) {
        let PartitionAssignment { value, revision, committed, registered } = assignment;
        if self.placed.value.as_ref().is_some_and(|(_, applied)| revision < *applied) && !mutant!(ApplyOlderMetadata) {
            return;
        }
        if let Some(state) = committed {
            self.committed(&state);
        }
        self.placed.broker_status = registered;
        self.apply_partition_value(value, revision);
    }

    /// Takes the role that a value of the partition, no older than the applied one, gives to this broker.
    pub(super) fn apply_partition_value(&mut self, value: Arc<PartitionValue>, revision: Revision) {
        sim_event!(MetadataApplied { partition: self.id, revision: revision.0 });
        let before = self.placed.added_after(self.broker);
        self.placed.value = Some((Arc::clone(&value), revision));
        let (epoch, addition) = (value.leader_epoch, value.added_after(self.broker));
        // The replica was removed and added again meanwhile: its subscription no longer counts.
        let is_new_addition = addition.is_some() && addition != before;
        let is_late = epoch < self.placed.newest_seen_epoch;
        match value.leader {
            _ if is_late || !value.replicas.contains(&self.broker) => self.become_idle(),
            None => self.become_idle(),
            Some(leader) if leader == self.broker => self.become_leader(&value, revision),
            Some(leader) => {
                let follows = matches!(&self.part, RoleState::Following(follower) if follower.epoch() == epoch);
                if !follows || is_new_addition {
                    self.become_follower(leader, epoch, value.unclean_epoch);
                }
            }
        }
    }

    /// Leaves the current role, in the epoch of that role.
    fn leave_role(&mut self) {
        self.committed_end = self.high_watermark();
        self.placed.request_id += 1;
        self.placed.pending_leadership = None;
        match std::mem::replace(&mut self.part, RoleState::Idle) {
            RoleState::Idle => {}
            RoleState::Following(_) => self.ctx.links.unsubscribe(self.id, self.placed.epoch(), false),
            RoleState::Leading(mut leader) => {
                self.published.set_leading(false);
                // Writers whose rule holds get their acknowledgement first.
                leader.take_due(|writer, acked| writer.respond(Ok(acked)));
                for writer in leader.abandon() {
                    writer.respond(Err(AppendError::Deposed));
                }
            }
        }
    }

    /// Becomes idle.
    pub(super) fn become_idle(&mut self) {
        self.leave_role();
    }

    fn become_follower(&mut self, leader: BrokerId, epoch: LeaderEpoch, unclean: Option<LeaderEpoch>) {
        self.leave_role();
        if self.published.error().is_some() {
            // The replica cannot copy: no leader may wait for it.
            return;
        }
        tracing::debug!(partition = %self.id, %leader, %epoch, "became a follower");
        self.part = RoleState::Following(Box::new(Follower::new(leader, epoch, self.high_watermark(), unclean)));
        self.ctx.links.start_following(self.id, leader);
    }

    fn become_leader(&mut self, value: &PartitionValue, revision: Revision) {
        let (epoch, last) = (value.leader_epoch, self.last_epoch());
        match &mut self.part {
            RoleState::Leading(leader) if leader.epoch() == epoch => {
                let before = leader.in_sync().value().isr.clone();
                leader.in_sync_mut().observed(value, revision);
                self.ctx.counters.isr_changed(&before, &leader.in_sync().value().isr);
                self.apply_broker_statuses();
                self.propose();
            }
            // The leadership begins when the object store has responded.
            RoleState::Idle if self.placed.pending_leadership.is_some() && self.status.epoch == epoch => {}
            _ if self.placed.last_led_epoch.is_some_and(|led| led >= epoch) => self.become_idle(),
            // Treated like an epoch that this broker already led: the epoch ends, and an election in a newer epoch
            // follows.
            _ if let Some(last) = last.filter(|last| *last > epoch) => {
                tracing::error!(
                    topic = %self.topic, partition = %self.id, %epoch, %last,
                    "the metadata is older than this log: its leader epoch is below the epoch of the log's last \
                     records; check whether etcd was restored from a backup. This broker leads only in a newer epoch"
                );
                self.placed.last_led_epoch = Some(epoch);
                self.become_idle();
            }
            _ => {
                self.leave_role();
                if self.needs_object_store(value) {
                    self.request_tables(self.tiered_end, Some(Duration::ZERO));
                } else {
                    self.start_leading();
                }
            }
        }
    }

    fn last_epoch(&self) -> Option<LeaderEpoch> {
        self.replica.epochs().last().map(|(epoch, _)| epoch)
    }

    pub(super) fn start_leading(&mut self) {
        let Some((value, revision)) = self.placed.value.clone() else { return };
        let progress = ReplicaProgress { log_end: self.replica.log_end(), persisted_end: self.replica.persisted_end() };
        let committed_end = self.committed_end.max(self.tiered_end).max(self.log_start).min(progress.log_end);
        let (epoch, in_sync) = (value.leader_epoch, value.isr.len());
        let rules = rule(&self.config, self.lag_ms);
        let start = LeaderStart {
            me: self.broker,
            value: PartitionValue::clone(&value),
            revision,
            progress,
            committed_end,
            rules,
        };
        self.placed.pending_leadership = None;
        self.placed.last_led_epoch = Some(epoch);
        sim_event!(LeadershipStarted { partition: self.id, epoch, start: progress.log_end });
        self.part = RoleState::Leading(Box::new(Leader::new(start, self.tiered_end)));
        self.published.set_leading(true);
        self.ctx.counters.leader_epochs.inc();
        tracing::debug!(
            partition = %self.id, %epoch, log_end = %progress.log_end, %committed_end, in_sync,
            "became the leader"
        );
        self.apply_broker_statuses();
        if self.published.error().is_some() {
            self.ctx.isr_updater.resign(self.id, epoch);
        }
        self.propose();
        // Segments may be due that could not be uploaded while another broker led.
        self.maintenance.push(self.id);
    }

    /// Applies the status of every replica's broker to the leader.
    fn apply_broker_statuses(&mut self) {
        let RoleState::Leading(leader) = &mut self.part else { return };
        let replicas = leader.in_sync().value().replicas.clone();
        for broker in replicas {
            let status = self.placed.broker_status.get(&broker).copied().unwrap_or(BrokerStatus::Unregistered);
            leader.in_sync_mut().on_broker_status(broker, status);
        }
    }

    /// Handles a report of a newer epoch: a leader of an older epoch admits nothing more until the metadata contains
    /// the newer one.
    pub(super) fn deposed(&mut self, known: LeaderEpoch) {
        self.placed.newest_seen_epoch = self.placed.newest_seen_epoch.max(known);
        if let RoleState::Leading(leader) = &self.part
            && leader.epoch() < known
        {
            tracing::info!(
                topic = %self.topic, partition = %self.id, epoch = %leader.epoch(), %known,
                "deposed by a newer leader epoch"
            );
            self.become_idle();
        }
    }

    /// Applies the tiered end and the log start of the metadata. All records below both were committed, by a leader of
    /// the state's epoch or an earlier one. If that epoch is newer than the one in which this broker leads, this log
    /// may hold other records there.
    pub(super) fn committed(&mut self, state: &TierState) {
        if !mutant!(AdoptNewerTieredEnd) {
            self.deposed(state.epoch);
        }
        self.tiered_end = self.tiered_end.max(state.tiered_end());
        self.log_start = self.log_start.max(state.log_start);
        if let RoleState::Leading(leader) = &mut self.part {
            leader.in_sync_mut().committed(self.tiered_end.max(self.log_start));
            leader.tiered(self.tiered_end);
        }
        // Readers must see the new log start before the files are removed.
        self.publish();
        self.keep_log_start();
    }
}
