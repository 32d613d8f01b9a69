//! The events that can happen next in a state, and their effects. The broker's own code decides (`IsrTracker`,
//! `Follower`, `AppliedMetadata`). This file replaces only the partition's task, which calls that code, and adds the
//! faults.

use super::{
    rules::{RuleViolation, apply_value},
    world::{
        BROKERS, FollowerSends, LeaderSends, ModelState, Role, StoreCall, ToFollower, ToLeader, at, count, id, index,
    },
};
use crate::{
    cluster::ReplicaIntegrity,
    model::{Durability, Offset},
    partition::{
        follower::{BatchHeader, Follower, FollowerAction, ProtocolViolation},
        leader::{
            divergence::LocalLogBounds,
            isr::{ProposalOutcome, ValueUpdate},
            member::DisconnectCause,
        },
        metadata::{AppliedMetadata, Transition},
    },
};

/// Time at which a message arrives: in the step that sends it, or in a later step. The budget limits the late messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeliveryTime {
    Now,
    Later,
}

/// Outcome of a transaction for the leader that requested it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoreReply {
    /// The leader receives the outcome at once.
    Delivered,
    /// The transaction reaches the store later, and the leader waits for the outcome.
    DeliveredLater,
    /// The transaction reaches the store at once, and the outcome is lost.
    OutcomeLost,
    /// The transaction reaches the store later, and the leader no longer waits for the outcome.
    TimedOut,
}

/// One event. Numbers are indexes of brokers, late messages or transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A leader appends a batch.
    Append(usize),
    /// A broker syncs its log.
    Persist(usize),
    /// A follower subscribes.
    Subscribe { follower: usize, request: DeliveryTime, response: DeliveryTime },
    /// A follower acknowledges its progress.
    Acknowledge { follower: usize, arrives: DeliveryTime },
    /// A leader sends the next batch, or only its high watermark.
    SendBatches { leader: usize, follower: usize, arrives: DeliveryTime },
    /// A late message arrives at a leader, in any order.
    LeaderReceives { leader: usize, follower: usize, message: usize },
    /// The oldest late message arrives at a follower.
    FollowerReceives { leader: usize, follower: usize },
    /// A link breaks.
    BreakLink { leader: usize, follower: usize },
    /// A leader finds that its followers have lagged for too long.
    FindLagging(usize),
    /// A leader proposes an ISR change.
    Propose { leader: usize, outcome: StoreReply },
    /// A late transaction reaches the store.
    ApplyTransaction(usize),
    /// A leader reads the key after an unknown outcome.
    ReadBack(usize),
    /// A broker receives the current value and registrations.
    ApplyMetadata(usize),
    /// A process exits. `remaining` is the number of records in its log at the next start, which finds this integrity.
    Exit { broker: usize, integrity: ReplicaIntegrity, remaining: usize },
    /// A process starts again and registers.
    Restart(usize),
    /// The lease of a registration expires.
    Expire(usize),
    /// A running broker registers again after its lease has expired.
    Register(usize),
    /// The controller elects a broker as leader.
    Elect(usize),
    /// The controller writes a value without a leader.
    ClearLeader,
    /// `min.insync.replicas` is lowered by one.
    LowerMinIsr,
}

impl ModelState {
    /// Returns every possible next event.
    pub(super) fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::with_capacity(32);
        for broker in 0..BROKERS {
            self.push_process_steps(broker, &mut steps);
            self.push_fault_steps(broker, &mut steps);
        }
        for leader in 0..BROKERS {
            for follower in 0..BROKERS {
                self.push_link_steps(leader, follower, &mut steps);
            }
        }
        steps.extend((0..self.calls.len()).map(Step::ApplyTransaction));
        self.push_controller_steps(&mut steps);
        steps
    }

    /// Adds the steps of a running broker.
    fn push_process_steps(&self, me: usize, steps: &mut Vec<Step>) {
        let broker = &self.brokers[me];
        match &broker.role {
            Role::Exited(_) => return,
            Role::Idle => {}
            Role::Leading(leader) => {
                if self.budget.appends > 0 {
                    steps.push(Step::Append(me));
                }
                if self.budget.lags > 0 && leader.wants_ticks() {
                    steps.push(Step::FindLagging(me));
                }
                if leader.needs_read_back() {
                    steps.push(Step::ReadBack(me));
                }
                if leader.clone().start_proposal().is_some() {
                    steps.push(Step::Propose { leader: me, outcome: StoreReply::Delivered });
                    if self.budget.late > 0 {
                        steps.push(Step::Propose { leader: me, outcome: StoreReply::DeliveredLater });
                    }
                    if self.budget.unknowns > 0 {
                        steps.push(Step::Propose { leader: me, outcome: StoreReply::OutcomeLost });
                        steps.push(Step::Propose { leader: me, outcome: StoreReply::TimedOut });
                    }
                }
            }
            Role::Following(follower) => self.push_follower_steps(me, follower, steps),
        }
        if broker.persisted < broker.log.len() {
            steps.push(Step::Persist(me));
        }
        if broker.metadata.revision() < self.revision || matches!(broker.role, Role::Leading(_)) {
            steps.push(Step::ApplyMetadata(me));
        }
    }

    /// Adds the steps of a follower, and of the leader that sends to it.
    fn push_follower_steps(&self, me: usize, follower: &Follower, steps: &mut Vec<Step>) {
        let leader = index(follower.leader());
        let Role::Leading(leading) = &self.brokers[leader].role else { return };
        let link = &self.links[leader][me];
        let may_be_late = self.budget.late > 0;
        if !follower.is_following() && !follower.is_subscribing() {
            steps.push(Step::Subscribe { follower: me, request: DeliveryTime::Now, response: DeliveryTime::Now });
            if may_be_late {
                steps.push(Step::Subscribe { follower: me, request: DeliveryTime::Later, response: DeliveryTime::Now });
                steps.push(Step::Subscribe { follower: me, request: DeliveryTime::Now, response: DeliveryTime::Later });
            }
        }
        if follower.is_following() {
            // An acknowledgement is useless if the leader has counted it, or has no subscription of this follower. One
            // that is in flight is not sent again.
            let progress = self.brokers[me].progress();
            let is_useless = leading.acknowledged_by(id(me)) == Some(progress) || leading.follows(id(me)).is_none();
            if !is_useless
                && !link.replicate_request.iter().any(|message| message.content == FollowerSends::Progress(progress))
            {
                steps.push(Step::Acknowledge { follower: me, arrives: DeliveryTime::Now });
                if may_be_late {
                    steps.push(Step::Acknowledge { follower: me, arrives: DeliveryTime::Later });
                }
            }
        }
        // A leader sends nothing while a late message is in flight: messages to a follower keep their order.
        let lacks_batches = self.brokers[me].log.len() < self.brokers[leader].log.len();
        if leading.follows(id(me)).is_some()
            && link.replicate_response.is_empty()
            && (lacks_batches || follower.high_watermark() < leading.high_watermark())
        {
            steps.push(Step::SendBatches { leader, follower: me, arrives: DeliveryTime::Now });
            if may_be_late && lacks_batches {
                steps.push(Step::SendBatches { leader, follower: me, arrives: DeliveryTime::Later });
            }
        }
    }

    /// Adds the exits, restarts, expiries and registrations of a broker.
    fn push_fault_steps(&self, me: usize, steps: &mut Vec<Step>) {
        let (broker, budget) = (&self.brokers[me], &self.budget);
        let log_len = broker.log.len();
        if let Role::Exited(_) = broker.role {
            steps.push(Step::Restart(me));
            if self.registered[me].is_some() {
                steps.push(Step::Expire(me));
            }
            return;
        }
        // After a kill or a power loss, the next start finds the log intact only in a `persisted` topic.
        let integrity = if self.durability == Durability::Persisted {
            ReplicaIntegrity::Intact
        } else {
            ReplicaIntegrity::UncleanShutdown
        };
        if budget.kills > 0 {
            steps.push(Step::Exit { broker: me, integrity, remaining: log_len });
        }
        if budget.losses > 0 {
            let synced = if self.durability == Durability::Persisted { broker.persisted } else { 0 };
            steps.extend((synced..log_len).map(|remaining| Step::Exit { broker: me, integrity, remaining }));
        }
        if budget.wipes > 0 {
            steps.push(Step::Exit { broker: me, integrity: ReplicaIntegrity::Unverified, remaining: 0 });
        }
        match self.registered[me] {
            Some(_) if budget.expiries > 0 => steps.push(Step::Expire(me)),
            Some(_) => {}
            None => steps.push(Step::Register(me)),
        }
    }

    /// Adds the arrivals of late messages, and the break of a link.
    fn push_link_steps(&self, leader: usize, follower: usize, steps: &mut Vec<Step>) {
        let link = &self.links[leader][follower];
        steps.extend((0..link.replicate_request.len()).map(|message| Step::LeaderReceives {
            leader,
            follower,
            message,
        }));
        if !link.replicate_response.is_empty() {
            steps.push(Step::FollowerReceives { leader, follower });
        }
        if let Role::Following(following) = &self.brokers[follower].role
            && index(following.leader()) == leader
            && (following.is_following() || following.is_subscribing())
            && self.budget.breaks > 0
        {
            steps.push(Step::BreakLink { leader, follower });
        }
    }

    /// Adds the controller's elections and its value without a leader, and the change of the min ISR.
    fn push_controller_steps(&self, steps: &mut Vec<Step>) {
        if self.budget.epochs > 0 {
            let leads = self.value.leader.is_some_and(|leader| self.is_registered(leader));
            if !leads || self.budget.transfers > 0 {
                let can_elect =
                    |to: &usize| self.value.elect(id(*to), |id| self.is_registered(id), self.min_insync).is_some();
                steps.extend((0..BROKERS).filter(can_elect).map(Step::Elect));
            }
            if !leads && self.value.leader.is_some() {
                steps.push(Step::ClearLeader);
            }
        }
        if self.budget.lowerings > 0 && self.min_insync > 1 {
            steps.push(Step::LowerMinIsr);
        }
    }

    /// Returns the state after this step, or the rule that the step violates.
    pub(super) fn after(&self, step: Step) -> Result<Self, RuleViolation> {
        let mut state = self.clone();
        match step {
            Step::Append(me) => state.append(me),
            Step::Persist(me) => {
                state.brokers[me].persisted = state.brokers[me].log.len();
                state.update_leader_progress(me);
            }
            Step::Subscribe { follower, request, response } => state.subscribe(follower, request, response)?,
            Step::Acknowledge { follower, arrives } => state.acknowledge(follower, arrives)?,
            Step::SendBatches { leader, follower, arrives } => state.send_batches(leader, follower, arrives)?,
            Step::LeaderReceives { leader, follower, message } => {
                let message = state.links[leader][follower].replicate_request.remove(message);
                state.leader_receives(leader, follower, message, DeliveryTime::Now)?;
            }
            Step::FollowerReceives { leader, follower } => {
                let message = state.links[leader][follower].replicate_response.remove(0);
                state.follower_receives(follower, message)?;
            }
            Step::BreakLink { leader, follower } => state.break_link(leader, follower),
            Step::FindLagging(me) => {
                state.budget.lags -= 1;
                if let Role::Leading(leader) = &mut state.brokers[me].role {
                    leader.tick(0);
                    leader.tick(1);
                }
            }
            Step::Propose { leader, outcome } => state.propose(leader, outcome),
            Step::ApplyTransaction(call) => {
                let call = state.calls.remove(call);
                state.apply_transaction(call);
            }
            Step::ReadBack(me) => {
                state.on_proposal_outcome(me, ProposalOutcome::CurrentValue(state.value.clone(), state.revision))
            }
            Step::ApplyMetadata(me) => state.apply_metadata(me),
            Step::Exit { broker, integrity, remaining } => state.exit(broker, integrity, remaining),
            Step::Restart(me) => state.restart(me),
            Step::Expire(me) => {
                state.budget.expiries -= u8::from(state.brokers[me].is_running());
                state.registered[me] = None;
            }
            Step::Register(me) => state.register(me),
            Step::Elect(to) => {
                state.budget.transfers -=
                    u8::from(state.value.leader.is_some_and(|leader| state.is_registered(leader)));
                let elected = state.value.elect(id(to), |id| state.is_registered(id), state.min_insync);
                state.write(elected.expect("the step is offered only if the broker can be elected"));
            }
            Step::ClearLeader => state.write(state.value.leaderless()),
            Step::LowerMinIsr => {
                state.budget.lowerings -= 1;
                state.min_insync -= 1;
            }
        }
        state.check(self)?;
        Ok(state)
    }

    /// Replaces the stored value, at the next revision. Takes a new epoch from the budget.
    fn write(&mut self, value: crate::cluster::PartitionValue) {
        let new_epochs = value.leader_epoch.0 - self.value.leader_epoch.0;
        self.budget.epochs =
            self.budget.epochs.saturating_sub(u8::try_from(new_epochs).expect("the epoch grows by at most one"));
        self.value = value;
        self.revision = self.revision.next();
    }

    /// Appends one batch of one record to a leader's log.
    fn append(&mut self, me: usize) {
        self.budget.appends -= 1;
        let broker = &mut self.brokers[me];
        if let Role::Leading(leader) = &broker.role {
            broker.log.push(leader.epoch());
        }
        self.on_log_grown(me);
    }

    /// Handles an append to a leader's or a follower's log.
    fn on_log_grown(&mut self, me: usize) {
        // In a `replicated` topic, or if no power loss may follow, an append counts as synced at once. The search then
        // needs no step for the sync.
        if self.durability == Durability::Replicated || self.budget.losses == 0 {
            self.brokers[me].persisted = self.brokers[me].log.len();
        }
        self.update_leader_progress(me);
    }

    /// Passes the progress of a leader's own log to the leader. Does nothing on a broker that does not lead.
    fn update_leader_progress(&mut self, me: usize) {
        let progress = self.brokers[me].progress();
        if let Role::Leading(leader) = &mut self.brokers[me].role {
            leader.update_local(progress);
        }
    }

    /// Sends a follower's subscription to its leader. `response` is the delivery time of the leader's response, and
    /// counts only if the request arrives at once.
    fn subscribe(&mut self, me: usize, request: DeliveryTime, response: DeliveryTime) -> Result<(), RuleViolation> {
        let (history, end, from) = (self.brokers[me].history(), at(self.brokers[me].log.len()), self.peer(me));
        let Role::Following(follower) = &mut self.brokers[me].role else { return Ok(()) };
        let content = FollowerSends::Position(follower.subscribe(&history, end));
        let (leader, epoch) = (index(follower.leader()), follower.epoch());
        self.send_to_leader(leader, me, ToLeader { from, epoch, content }, request, response)
    }

    /// Sends a follower's progress to its leader.
    fn acknowledge(&mut self, me: usize, arrives: DeliveryTime) -> Result<(), RuleViolation> {
        let (from, content) = (self.peer(me), FollowerSends::Progress(self.brokers[me].progress()));
        let Role::Following(follower) = &self.brokers[me].role else { return Ok(()) };
        let message = ToLeader { from, epoch: follower.epoch(), content };
        self.send_to_leader(index(follower.leader()), me, message, arrives, DeliveryTime::Now)
    }

    /// Delivers a message to a leader, or queues it on the link as a late one.
    fn send_to_leader(
        &mut self,
        leader: usize,
        follower: usize,
        message: ToLeader,
        arrives: DeliveryTime,
        response: DeliveryTime,
    ) -> Result<(), RuleViolation> {
        if arrives == DeliveryTime::Now {
            return self.leader_receives(leader, follower, message, response);
        }
        self.budget.late -= 1;
        self.links[leader][follower].replicate_request.push(message);
        Ok(())
    }

    /// Sends the next batch that the follower lacks, or only the leader's high watermark.
    fn send_batches(&mut self, leader: usize, follower: usize, arrives: DeliveryTime) -> Result<(), RuleViolation> {
        let from = self.brokers[follower].log.len();
        let Role::Leading(leading) = &self.brokers[leader].role else { return Ok(()) };
        let batch = self.brokers[leader].log.get(from);
        let headers = batch.map(|epoch| BatchHeader { base: at(from), end: at(from + 1), epoch: *epoch });
        let message = ToFollower {
            epoch: leading.epoch(),
            high_watermark: leading.high_watermark(),
            content: LeaderSends::Batches(headers.into_iter().collect()),
        };
        self.send_to_follower(leader, follower, message, arrives)
    }

    /// Delivers a message to a follower, or queues it on the link as a late one.
    fn send_to_follower(
        &mut self,
        leader: usize,
        follower: usize,
        message: ToFollower,
        arrives: DeliveryTime,
    ) -> Result<(), RuleViolation> {
        if arrives == DeliveryTime::Now {
            return self.follower_receives(follower, message);
        }
        self.budget.late -= 1;
        self.links[leader][follower].replicate_response.push(message);
        Ok(())
    }

    /// Handles a message at a leader; dropped if the broker no longer leads. `arrives` is the delivery time of the
    /// response.
    fn leader_receives(
        &mut self,
        leader: usize,
        follower: usize,
        message: ToLeader,
        arrives: DeliveryTime,
    ) -> Result<(), RuleViolation> {
        let ToLeader { from, epoch, content } = message;
        let (history, local) =
            (self.brokers[leader].history(), LocalLogBounds { local_start: Offset::ZERO, tiered_end: None });
        let Role::Leading(leading) = &mut self.brokers[leader].role else { return Ok(()) };
        match content {
            FollowerSends::Position(position) => {
                let decision = leading.on_subscribe(from, epoch, position, local, &history);
                let message = ToFollower {
                    epoch,
                    high_watermark: leading.high_watermark(),
                    content: LeaderSends::Response(decision),
                };
                // A response is sent on the link of its request, and is lost with that link.
                if self.brokers[follower].epoch == from.epoch && self.brokers[follower].is_running() {
                    return self.send_to_follower(leader, follower, message, arrives);
                }
            }
            FollowerSends::Progress(progress) => {
                // An acknowledgement that does not count is rejected. If it moved the high watermark all the same,
                // `check` would find that.
                let _stale = leading.on_acknowledged(from, epoch, progress);
            }
        }
        Ok(())
    }

    /// Handles a message at a follower: truncates its log, appends batches or does nothing. Dropped if the broker no
    /// longer follows.
    fn follower_receives(&mut self, me: usize, message: ToFollower) -> Result<(), RuleViolation> {
        let ToFollower { epoch, high_watermark, content } = message;
        let history = self.brokers[me].history();
        let Role::Following(follower) = &mut self.brokers[me].role else { return Ok(()) };
        let result = match &content {
            LeaderSends::Response(decision) => follower.on_response(epoch, decision, high_watermark, &history),
            LeaderSends::Batches(headers) => follower.on_batches(epoch, headers, high_watermark),
        };
        match result {
            Ok(FollowerAction::Truncate(to) | FollowerAction::Bootstrap(to)) => {
                self.check_truncation(me, to)?;
                let broker = &mut self.brokers[me];
                broker.log.truncate(count(to));
                broker.persisted = broker.persisted.min(count(to));
            }
            Ok(FollowerAction::Append) => {
                if let LeaderSends::Batches(headers) = content {
                    self.brokers[me].log.extend(headers.iter().map(|header| header.epoch));
                }
                let end = at(self.brokers[me].log.len());
                if let Role::Following(follower) = &mut self.brokers[me].role {
                    follower.on_appended(end);
                }
                self.on_log_grown(me);
            }
            Ok(FollowerAction::Follow(_) | FollowerAction::Ignore | FollowerAction::RetryLater) => {}
            // In this model no record is deleted, so these truncations would lose committed records.
            Err(
                ProtocolViolation::TruncateBelowCommitted { to, .. }
                | ProtocolViolation::BootstrapBelowCommitted { at: to, .. },
            ) => {
                return Err(RuleViolation::TruncationBelowHighWatermark { broker: id(me), to });
            }
            // The message was late or out of order, and changed nothing.
            Err(_) => {}
        }
        Ok(())
    }

    /// Breaks a link: messages to the follower are lost, messages to the leader may still arrive, and both sides are
    /// notified.
    fn break_link(&mut self, leader: usize, me: usize) {
        self.budget.breaks -= 1;
        self.links[leader][me].replicate_response.clear();
        if let Role::Following(follower) = &mut self.brokers[me].role {
            follower.on_disconnected();
        }
        let peer = self.peer(me);
        if let Role::Leading(leading) = &mut self.brokers[leader].role {
            leading.on_disconnected(peer, DisconnectCause::LinkLost);
        }
    }

    /// Sends the leader's next ISR proposal to the store, if one is due. `reply` states when the store applies it, and
    /// whether the leader learns the outcome.
    fn propose(&mut self, me: usize, reply: StoreReply) {
        let Role::Leading(leader) = &mut self.brokers[me].role else { return };
        let Some(proposal) = leader.start_proposal() else { return };
        let awaited = Some(leader.epoch());
        let call = StoreCall { proposal, owner: id(me), awaited };
        match reply {
            StoreReply::Delivered => self.apply_transaction(call),
            StoreReply::DeliveredLater => {
                self.budget.late -= 1;
                self.calls.push(call);
            }
            StoreReply::OutcomeLost | StoreReply::TimedOut => {
                self.budget.unknowns -= 1;
                let call = StoreCall { awaited: None, ..call };
                match reply {
                    StoreReply::OutcomeLost => self.apply_transaction(call),
                    _ => self.calls.push(call),
                }
                self.on_proposal_outcome(me, ProposalOutcome::Unknown);
            }
        }
    }

    /// Applies a transaction in the store if all its compares hold. The owner receives the outcome if it still waits.
    fn apply_transaction(&mut self, call: StoreCall) {
        let StoreCall { proposal, owner, awaited } = call;
        let compares_hold = proposal.expect == self.revision
            && proposal.added.iter().all(|peer| self.registered[index(peer.broker)] == Some(peer.epoch));
        if compares_hold {
            self.write(proposal.value);
        }
        let outcome = if compares_hold {
            ProposalOutcome::Committed(self.revision)
        } else {
            ProposalOutcome::CurrentValue(self.value.clone(), self.revision)
        };
        if let Role::Leading(leader) = &self.brokers[index(owner)].role
            && Some(leader.epoch()) == awaited
        {
            self.on_proposal_outcome(index(owner), outcome);
        }
    }

    /// Passes an outcome to a leader, and the adopted value to its metadata. A deposed leader gets the current
    /// metadata.
    fn on_proposal_outcome(&mut self, me: usize, outcome: ProposalOutcome) {
        let broker = &mut self.brokers[me];
        let Role::Leading(leader) = &mut broker.role else { return };
        match leader.on_outcome(outcome) {
            ValueUpdate::Deposed { .. } => self.apply_metadata(me),
            ValueUpdate::Adopted => {
                let transition = broker.metadata.apply(leader.value().clone().into(), leader.revision(), id(me));
                let keeps_role = matches!(transition, Transition::SetsChanged | Transition::Unchanged);
                assert!(keeps_role, "a value of the leader's epoch keeps the role");
            }
            ValueUpdate::Unchanged | ValueUpdate::Deleted => {}
        }
    }

    /// Gives a broker the current value and registrations.
    fn apply_metadata(&mut self, me: usize) {
        let (value, revision, rules) = (self.value.clone(), self.revision, self.isr_rules());
        let statuses: Vec<_> = (0..BROKERS).map(|broker| (id(broker), self.broker_status(broker))).collect();
        apply_value(self, me);
        if let Role::Leading(leader) = &mut self.brokers[me].role {
            leader.on_value(&value, revision);
            leader.configure(rules);
            for (broker, status) in statuses {
                leader.on_broker_status(broker, status);
            }
        }
    }

    /// Ends a process. Its log keeps the first `remaining` records.
    fn exit(&mut self, me: usize, integrity: ReplicaIntegrity, remaining: usize) {
        let budget = &mut self.budget;
        match integrity {
            ReplicaIntegrity::Unverified => budget.wipes -= 1,
            _ if remaining < self.brokers[me].log.len() => budget.losses -= 1,
            _ => budget.kills -= 1,
        }
        let broker = &mut self.brokers[me];
        // A power loss in a `persisted` topic is no loss: it removes only records that this broker has not
        // acknowledged.
        broker.has_lost |= integrity == ReplicaIntegrity::Unverified
            || integrity == ReplicaIntegrity::UncleanShutdown && remaining < broker.log.len();
        broker.log.truncate(remaining);
        (broker.persisted, broker.high_watermark) = (remaining, Offset::ZERO);
        broker.metadata = AppliedMetadata::default();
        broker.role = Role::Exited(integrity);
        for peer in 0..BROKERS {
            // Messages to the broker are lost, and so are the batches and responses that it sent as a leader. Its
            // messages to a leader may still arrive.
            self.links[peer][me].replicate_response.clear();
            self.links[me][peer].replicate_request.clear();
            self.links[me][peer].replicate_response.clear();
        }
        for call in &mut self.calls {
            if call.owner == id(me) {
                call.awaited = None;
            }
        }
    }

    /// Starts a process. The broker ends its older registration, resigns its leadership, and registers. Before the
    /// registration, it leaves ISR and ELR unless its log is intact or it is the last holder.
    fn restart(&mut self, me: usize) {
        let Role::Exited(integrity) = self.brokers[me].role else { return };
        self.registered[me] = None;
        if let Some(value) = self.value.after_restart(id(me), integrity) {
            self.write(value);
        }
        self.brokers[me].role = Role::Idle;
        self.register(me);
    }

    /// Registers a broker with a new broker epoch. A follower connects again with that epoch.
    fn register(&mut self, me: usize) {
        let broker = &mut self.brokers[me];
        broker.epoch = broker.epoch.next();
        self.registered[me] = Some(broker.epoch);
        if let Role::Following(follower) = &mut broker.role {
            follower.on_disconnected();
            self.links[index(follower.leader())][me].replicate_response.clear();
        }
    }
}
