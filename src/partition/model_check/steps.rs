//! Possible next events of a state, and their effects. The brokers' decisions are the real ones; this file has only the
//! actor's part, and the faults.

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

/// Time of an arrival. Most messages arrive at once. The number of later arrivals is limited, and each may happen at
/// any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeliveryTime {
    Now,
    Later,
}

/// End of a transaction, for the leader that requested it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoreReply {
    /// The leader receives the outcome at once.
    Delivered,
    /// The outcome arrives later, and the leader waits for it.
    DeliveredLater,
    /// The transaction was applied or refused, and the leader does not receive the outcome.
    Lost,
    /// The leader receives nothing, and the transaction may still be applied.
    Open,
}

/// One event. Numbers are of brokers, from 0, or of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Append(usize),
    Persist(usize),
    Subscribe { follower: usize, request: DeliveryTime, response: DeliveryTime },
    Acknowledge { follower: usize, arrives: DeliveryTime },
    Push { leader: usize, follower: usize, arrives: DeliveryTime },
    LeaderReceives { leader: usize, follower: usize, message: usize },
    FollowerReceives { leader: usize, follower: usize },
    Break { leader: usize, follower: usize },
    Lag(usize),
    Propose { leader: usize, outcome: StoreReply },
    StoreDoes(usize),
    ReadBack(usize),
    ApplyMetadata(usize),
    Exit { broker: usize, holds: ReplicaIntegrity, left: usize },
    Restart(usize),
    Expire(usize),
    Register(usize),
    Elect(usize),
    Leaderless,
    LowerMinimum,
}

impl ModelState {
    /// Returns every possible next event.
    pub(super) fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::with_capacity(32);
        for broker in 0..BROKERS {
            self.steps_of_process(broker, &mut steps);
            self.steps_of_fate(broker, &mut steps);
        }
        for leader in 0..BROKERS {
            for follower in 0..BROKERS {
                self.steps_of_wire(leader, follower, &mut steps);
            }
        }
        steps.extend((0..self.calls.len()).map(Step::StoreDoes));
        self.steps_of_controller(&mut steps);
        steps
    }

    fn steps_of_process(&self, me: usize, steps: &mut Vec<Step>) {
        let broker = &self.brokers[me];
        match &broker.role {
            Role::Exited(_) => return,
            Role::Waiting => {}
            Role::Leading(leader) => {
                if self.budget.appends > 0 {
                    steps.push(Step::Append(me));
                }
                if self.budget.lags > 0 && leader.wants_ticks() {
                    steps.push(Step::Lag(me));
                }
                if leader.needs_read_back() {
                    steps.push(Step::ReadBack(me));
                }
                if leader.clone().proposal().is_some() {
                    steps.push(Step::Propose { leader: me, outcome: StoreReply::Delivered });
                    if self.budget.late > 0 {
                        steps.push(Step::Propose { leader: me, outcome: StoreReply::DeliveredLater });
                    }
                    if self.budget.unknowns > 0 {
                        steps.push(Step::Propose { leader: me, outcome: StoreReply::Lost });
                        steps.push(Step::Propose { leader: me, outcome: StoreReply::Open });
                    }
                }
            }
            Role::Following(follower) => self.steps_of_follower(me, follower, steps),
        }
        if broker.persisted < broker.log.len() {
            steps.push(Step::Persist(me));
        }
        if broker.metadata.revision() < self.revision || matches!(broker.role, Role::Leading(_)) {
            steps.push(Step::ApplyMetadata(me));
        }
    }

    fn steps_of_follower(&self, me: usize, follower: &Follower, steps: &mut Vec<Step>) {
        let leader = index(follower.leader());
        let Role::Leading(leading) = &self.brokers[leader].role else { return };
        let link = &self.wires[leader][me];
        let may_be_late = self.budget.late > 0;
        if !follower.is_following() && !follower.is_subscribing() {
            steps.push(Step::Subscribe { follower: me, request: DeliveryTime::Now, response: DeliveryTime::Now });
            if may_be_late {
                steps.push(Step::Subscribe { follower: me, request: DeliveryTime::Later, response: DeliveryTime::Now });
                steps.push(Step::Subscribe { follower: me, request: DeliveryTime::Now, response: DeliveryTime::Later });
            }
        }
        if follower.is_following() {
            // An acknowledgement that the leader has already, or that is on its way, is not sent again.
            let progress = self.brokers[me].progress();
            let is_known = leading.acknowledged_by(id(me)) == Some(progress) || leading.follows(id(me)).is_none();
            if !is_known
                && !link.replicate_request.iter().any(|message| message.content == FollowerSends::Holds(progress))
            {
                steps.push(Step::Acknowledge { follower: me, arrives: DeliveryTime::Now });
                if may_be_late {
                    steps.push(Step::Acknowledge { follower: me, arrives: DeliveryTime::Later });
                }
            }
        }
        // A leader sends nothing after a late message before that one has arrived.
        let lacks = self.brokers[me].log.len() < self.brokers[leader].log.len();
        if leading.follows(id(me)).is_some()
            && link.replicate_response.is_empty()
            && (lacks || follower.high_watermark() < leading.high_watermark())
        {
            steps.push(Step::Push { leader, follower: me, arrives: DeliveryTime::Now });
            if may_be_late && lacks {
                steps.push(Step::Push { leader, follower: me, arrives: DeliveryTime::Later });
            }
        }
    }

    fn steps_of_fate(&self, me: usize, steps: &mut Vec<Step>) {
        let (broker, budget) = (&self.brokers[me], &self.budget);
        let written = broker.log.len();
        if let Role::Exited(_) = broker.role {
            steps.push(Step::Restart(me));
            if self.registered[me].is_some() {
                steps.push(Step::Expire(me));
            }
            return;
        }
        let unmarked = if self.durability == Durability::Persisted {
            ReplicaIntegrity::Intact
        } else {
            ReplicaIntegrity::UncleanShutdown
        };
        if budget.kills > 0 {
            steps.push(Step::Exit { broker: me, holds: unmarked, left: written });
        }
        if budget.losses > 0 {
            let kept = if self.durability == Durability::Persisted { broker.persisted } else { 0 };
            steps.extend((kept..written).map(|left| Step::Exit { broker: me, holds: unmarked, left }));
        }
        if budget.wipes > 0 {
            steps.push(Step::Exit { broker: me, holds: ReplicaIntegrity::Unverified, left: 0 });
        }
        match self.registered[me] {
            Some(_) if budget.expiries > 0 => steps.push(Step::Expire(me)),
            Some(_) => {}
            None => steps.push(Step::Register(me)),
        }
    }

    fn steps_of_wire(&self, leader: usize, follower: usize, steps: &mut Vec<Step>) {
        let link = &self.wires[leader][follower];
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
            steps.push(Step::Break { leader, follower });
        }
    }

    fn steps_of_controller(&self, steps: &mut Vec<Step>) {
        if self.budget.epochs > 0 {
            let leads = self.value.leader.is_some_and(|leader| self.is_live(leader));
            if !leads || self.budget.handovers > 0 {
                let may = |to: &usize| self.value.elect(id(*to), |id| self.is_live(id), self.min_insync).is_some();
                steps.extend((0..BROKERS).filter(may).map(Step::Elect));
            }
            if !leads && self.value.leader.is_some() {
                steps.push(Step::Leaderless);
            }
        }
        if self.budget.lowerings > 0 && self.min_insync > 1 {
            steps.push(Step::LowerMinimum);
        }
    }

    /// Returns the state after this step.
    pub(super) fn after(&self, step: Step) -> Result<Self, RuleViolation> {
        let mut world = self.clone();
        match step {
            Step::Append(me) => world.append(me),
            Step::Persist(me) => {
                world.brokers[me].persisted = world.brokers[me].log.len();
                world.own_moved(me);
            }
            Step::Subscribe { follower, request, response } => world.subscribe(follower, request, response)?,
            Step::Acknowledge { follower, arrives } => world.acknowledge(follower, arrives)?,
            Step::Push { leader, follower, arrives } => world.push(leader, follower, arrives)?,
            Step::LeaderReceives { leader, follower, message } => {
                let message = world.wires[leader][follower].replicate_request.remove(message);
                world.leader_receives(leader, follower, message, DeliveryTime::Now)?;
            }
            Step::FollowerReceives { leader, follower } => {
                let message = world.wires[leader][follower].replicate_response.remove(0);
                world.follower_receives(follower, message)?;
            }
            Step::Break { leader, follower } => world.break_link(leader, follower),
            Step::Lag(me) => {
                world.budget.lags -= 1;
                if let Role::Leading(leader) = &mut world.brokers[me].role {
                    leader.tick(0);
                    leader.tick(1);
                }
            }
            Step::Propose { leader, outcome } => world.propose(leader, outcome),
            Step::StoreDoes(call) => {
                let call = world.calls.remove(call);
                world.store_does(call);
            }
            Step::ReadBack(me) => {
                world.on_proposal_outcome(me, ProposalOutcome::CurrentValue(world.value.clone(), world.revision))
            }
            Step::ApplyMetadata(me) => world.apply_metadata(me),
            Step::Exit { broker, holds, left } => world.exit(broker, holds, left),
            Step::Restart(me) => world.restart(me),
            Step::Expire(me) => {
                world.budget.expiries -= u8::from(world.brokers[me].is_alive());
                world.registered[me] = None;
            }
            Step::Register(me) => world.register(me),
            Step::Elect(to) => {
                world.budget.handovers -= u8::from(world.value.leader.is_some_and(|leader| world.is_live(leader)));
                let elected = world.value.elect(id(to), |id| world.is_live(id), world.min_insync);
                world.write(elected.expect("the step is offered only if the broker can be elected"));
            }
            Step::Leaderless => world.write(world.value.leaderless()),
            Step::LowerMinimum => {
                world.budget.lowerings -= 1;
                world.min_insync -= 1;
            }
        }
        world.check(self)?;
        Ok(world)
    }

    /// Replaces the stored value.
    fn write(&mut self, value: crate::cluster::PartitionValue) {
        let turns = value.leader_epoch.0 - self.value.leader_epoch.0;
        self.budget.epochs =
            self.budget.epochs.saturating_sub(u8::try_from(turns).expect("the epoch grows by at most one"));
        self.value = value;
        self.revision = self.revision.next();
    }

    fn append(&mut self, me: usize) {
        self.budget.appends -= 1;
        let broker = &mut self.brokers[me];
        if let Role::Leading(leader) = &broker.role {
            broker.log.push(leader.epoch());
        }
        self.log_grew(me);
    }

    fn log_grew(&mut self, me: usize) {
        // If no unsynced record can be lost, syncs make no difference.
        if self.durability == Durability::Replicated || self.budget.losses == 0 {
            self.brokers[me].persisted = self.brokers[me].log.len();
        }
        self.own_moved(me);
    }

    fn own_moved(&mut self, me: usize) {
        let progress = self.brokers[me].progress();
        if let Role::Leading(leader) = &mut self.brokers[me].role {
            leader.update_local(progress);
        }
    }

    fn subscribe(&mut self, me: usize, request: DeliveryTime, response: DeliveryTime) -> Result<(), RuleViolation> {
        let (history, end, from) = (self.brokers[me].history(), at(self.brokers[me].log.len()), self.peer(me));
        let Role::Following(follower) = &mut self.brokers[me].role else { return Ok(()) };
        let content = FollowerSends::Position(follower.subscribe(&history, end));
        let (leader, epoch) = (index(follower.leader()), follower.epoch());
        self.send_to_leader(leader, me, ToLeader { from, epoch, content }, request, response)
    }

    fn acknowledge(&mut self, me: usize, arrives: DeliveryTime) -> Result<(), RuleViolation> {
        let (from, content) = (self.peer(me), FollowerSends::Holds(self.brokers[me].progress()));
        let Role::Following(follower) = &self.brokers[me].role else { return Ok(()) };
        let message = ToLeader { from, epoch: follower.epoch(), content };
        self.send_to_leader(index(follower.leader()), me, message, arrives, DeliveryTime::Now)
    }

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
        self.wires[leader][follower].replicate_request.push(message);
        Ok(())
    }

    /// Sends the next batch that the follower lacks, or only the leader's high watermark.
    fn push(&mut self, leader: usize, follower: usize, arrives: DeliveryTime) -> Result<(), RuleViolation> {
        let from = self.brokers[follower].log.len();
        let Role::Leading(leading) = &self.brokers[leader].role else { return Ok(()) };
        let batch = self.brokers[leader].log.get(from);
        let headers = batch.map(|epoch| BatchHeader { base: at(from), end: at(from + 1), epoch: *epoch });
        let message = ToFollower {
            epoch: leading.epoch(),
            high_watermark: leading.high_watermark(),
            brings: LeaderSends::Batches(headers.into_iter().collect()),
        };
        self.send_to_follower(leader, follower, message, arrives)
    }

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
        self.wires[leader][follower].replicate_response.push(message);
        Ok(())
    }

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
                    brings: LeaderSends::Response(decision),
                };
                // A response is sent on the link of its request, and is lost with that link.
                if self.brokers[follower].epoch == from.epoch && self.brokers[follower].is_alive() {
                    return self.send_to_follower(leader, follower, message, arrives);
                }
            }
            FollowerSends::Holds(progress) => {
                // An acknowledgement that does not count changes nothing: this rule is checked.
                let _stale = leading.on_acknowledged(from, epoch, progress);
            }
        }
        Ok(())
    }

    fn follower_receives(&mut self, me: usize, message: ToFollower) -> Result<(), RuleViolation> {
        let ToFollower { epoch, high_watermark, brings } = message;
        let history = self.brokers[me].history();
        let Role::Following(follower) = &mut self.brokers[me].role else { return Ok(()) };
        let result = match &brings {
            LeaderSends::Response(decision) => follower.on_response(epoch, decision, high_watermark, &history),
            LeaderSends::Batches(headers) => follower.on_batches(epoch, headers, high_watermark),
        };
        match result {
            Ok(FollowerAction::Truncate(to) | FollowerAction::Bootstrap(to)) => {
                self.may_cut(me, to)?;
                let broker = &mut self.brokers[me];
                broker.log.truncate(count(to));
                broker.persisted = broker.persisted.min(count(to));
            }
            Ok(FollowerAction::Append) => {
                if let LeaderSends::Batches(headers) = brings {
                    self.brokers[me].log.extend(headers.iter().map(|header| header.epoch));
                }
                let end = at(self.brokers[me].log.len());
                if let Role::Following(follower) = &mut self.brokers[me].role {
                    follower.on_appended(end);
                }
                self.log_grew(me);
            }
            Ok(FollowerAction::Follow(_) | FollowerAction::Ignore | FollowerAction::RetryLater) => {}
            // No record is ever deleted here.
            Err(
                ProtocolViolation::TruncateBelowCommitted { to, .. }
                | ProtocolViolation::BootstrapBelowCommitted { at: to, .. },
            ) => {
                return Err(RuleViolation::AskedToCutCommitted { broker: id(me), to });
            }
            // Late or out of order: the message changed nothing.
            Err(_) => {}
        }
        Ok(())
    }

    fn break_link(&mut self, leader: usize, me: usize) {
        self.budget.breaks -= 1;
        self.wires[leader][me].replicate_response.clear();
        if let Role::Following(follower) = &mut self.brokers[me].role {
            follower.on_disconnected();
        }
        let peer = self.peer(me);
        if let Role::Leading(leading) = &mut self.brokers[leader].role {
            leading.on_disconnected(peer, DisconnectCause::LinkLost);
        }
    }

    fn propose(&mut self, me: usize, outcome: StoreReply) {
        let Role::Leading(leader) = &mut self.brokers[me].role else { return };
        let Some(proposal) = leader.proposal() else { return };
        let awaited = Some(leader.epoch());
        let call = StoreCall { proposal, owner: id(me), awaited };
        match outcome {
            StoreReply::Delivered => self.store_does(call),
            StoreReply::DeliveredLater => {
                self.budget.late -= 1;
                self.calls.push(call);
            }
            StoreReply::Lost | StoreReply::Open => {
                self.budget.unknowns -= 1;
                let call = StoreCall { awaited: None, ..call };
                match outcome {
                    StoreReply::Lost => self.store_does(call),
                    _ => self.calls.push(call),
                }
                self.on_proposal_outcome(me, ProposalOutcome::Unknown);
            }
        }
    }

    /// Applies a transaction in the store: all its compares hold, or nothing changes. A leader that waits for the
    /// outcome receives it.
    fn store_does(&mut self, call: StoreCall) {
        let StoreCall { proposal, owner, awaited } = call;
        let holds = proposal.expect == self.revision
            && proposal.added.iter().all(|peer| self.registered[index(peer.broker)] == Some(peer.epoch));
        if holds {
            self.write(proposal.value);
        }
        let outcome = if holds {
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

    fn on_proposal_outcome(&mut self, me: usize, outcome: ProposalOutcome) {
        let broker = &mut self.brokers[me];
        let Role::Leading(leader) = &mut broker.role else { return };
        match leader.on_outcome(outcome) {
            ValueUpdate::Deposed { .. } => self.apply_metadata(me),
            ValueUpdate::Adopted => {
                let transition = broker.metadata.apply(leader.value().clone().into(), leader.revision(), id(me));
                let stays = matches!(transition, Transition::SetsChanged | Transition::Same);
                assert!(stays, "a value of the leader's epoch keeps the role");
            }
            ValueUpdate::Unchanged | ValueUpdate::Deleted => {}
        }
    }

    /// Gives a broker the current value and registrations.
    fn apply_metadata(&mut self, me: usize) {
        let (value, revision, rule) = (self.value.clone(), self.revision, self.rule());
        let seen: Vec<_> = (0..BROKERS).map(|other| (id(other), self.registration(other))).collect();
        apply_value(self, me);
        if let Role::Leading(leader) = &mut self.brokers[me].role {
            leader.on_value(&value, revision);
            leader.configure(rule);
            for (other, registration) in seen {
                leader.on_broker_status(other, registration);
            }
        }
    }

    fn exit(&mut self, me: usize, holds: ReplicaIntegrity, left: usize) {
        let budget = &mut self.budget;
        match holds {
            ReplicaIntegrity::Unverified => budget.wipes -= 1,
            _ if left < self.brokers[me].log.len() => budget.losses -= 1,
            _ => budget.kills -= 1,
        }
        let broker = &mut self.brokers[me];
        broker.has_lost |= holds == ReplicaIntegrity::Unverified
            || holds == ReplicaIntegrity::UncleanShutdown && left < broker.log.len();
        broker.log.truncate(left);
        (broker.persisted, broker.high_watermark) = (left, Offset::ZERO);
        broker.metadata = AppliedMetadata::default();
        broker.role = Role::Exited(holds);
        for other in 0..BROKERS {
            // Messages to the broker are lost; messages from it to a leader may still arrive.
            self.wires[other][me].replicate_response.clear();
            self.wires[me][other].replicate_request.clear();
            self.wires[me][other].replicate_response.clear();
        }
        for call in &mut self.calls {
            if call.owner == id(me) {
                call.awaited = None;
            }
        }
    }

    /// Starts a process. It ends the older registration, removes itself from the sets that it cannot verify, releases
    /// its leadership, and registers.
    fn restart(&mut self, me: usize) {
        let Role::Exited(holds) = self.brokers[me].role else { return };
        self.registered[me] = None;
        if let Some(value) = self.value.after_restart(id(me), holds) {
            self.write(value);
        }
        self.brokers[me].role = Role::Waiting;
        self.register(me);
    }

    /// Registers with a new broker epoch, and connects again with that.
    fn register(&mut self, me: usize) {
        let broker = &mut self.brokers[me];
        broker.epoch = broker.epoch.next();
        self.registered[me] = Some(broker.epoch);
        if let Role::Following(follower) = &mut broker.role {
            follower.on_disconnected();
            self.wires[index(follower.leader())][me].replicate_response.clear();
        }
    }
}
