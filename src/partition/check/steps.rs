//! What may happen next in a state, and what it leads to. The brokers' decisions are the real ones; what is written here is only what an
//! actor does with them, and the world's malice.

use super::{
    rules::{Fault, learned_role},
    world::{BROKERS, Brings, Call, Role, Says, ToFollower, ToLeader, World, at, count, id, index},
};
use crate::{
    cluster::{Holds, Revision},
    model::{BrokerId, Durability, LeaderEpoch, Offset},
    partition::{
        follower::{Act, Head, Violation},
        leader::{
            insync::{Agreed, Departure, Observed},
            join::{Join, JoinRefused, Local},
        },
    },
};

/// Most messages on their way from a follower to a leader.
const LATE: usize = 2;

/// One thing that happens. Numbers are of brokers, from 0, or of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Append(usize),
    Persist(usize),
    Claim(usize),
    Acknowledge(usize),
    Push { leader: usize, follower: usize },
    LeaderHears { leader: usize, follower: usize, message: usize },
    FollowerHears { leader: usize, follower: usize },
    Break { leader: usize, follower: usize },
    Lag(usize),
    Propose(usize),
    StoreDoes(usize),
    OutcomeTold(usize),
    OutcomeLost(usize),
    ReadBack(usize),
    Learn(usize),
    Die { broker: usize, holds: Holds, left: usize },
    Restart(usize),
    Expire(usize),
    Register(usize),
    Elect(usize),
    Leaderless,
    LowerMinimum,
}

impl World {
    /// Everything that may happen next.
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
        for (call, pending) in self.calls.iter().enumerate() {
            match pending.done {
                None => steps.push(Step::StoreDoes(call)),
                Some(_) => steps.push(Step::OutcomeTold(call)),
            }
            if pending.awaited.is_some() && self.budget.unknowns > 0 {
                steps.push(Step::OutcomeLost(call));
            }
        }
        self.steps_of_controller(&mut steps);
        steps
    }

    fn steps_of_process(&self, me: usize, steps: &mut Vec<Step>) {
        let broker = &self.brokers[me];
        match &broker.role {
            Role::Dead(_) => return,
            Role::Waiting => {}
            Role::Leading(leader) => {
                if self.budget.appends > 0 {
                    steps.push(Step::Append(me));
                }
                if self.budget.lags > 0 && leader.is_behind() {
                    steps.push(Step::Lag(me));
                }
                if leader.awaits_reading() {
                    steps.push(Step::ReadBack(me));
                }
                if leader.clone().proposal().is_some() && self.calls.len() < 2 {
                    steps.push(Step::Propose(me));
                }
            }
            Role::Following(follower) => {
                let wire = &self.wires[index(follower.leader())][me];
                if !follower.is_following() && !follower.is_claiming() && wire.to_leader.len() < LATE {
                    steps.push(Step::Claim(me));
                }
                if follower.is_following() && wire.to_leader.len() < LATE && self.has_news(me, follower.leader()) {
                    steps.push(Step::Acknowledge(me));
                }
            }
        }
        if broker.persisted < broker.log.len() {
            steps.push(Step::Persist(me));
        }
        if broker.known < self.revision || matches!(broker.role, Role::Leading(_)) {
            steps.push(Step::Learn(me));
        }
    }

    /// Whether the leader has not heard, nor is about to hear, how far this follower is.
    fn has_news(&self, me: usize, leader: BrokerId) -> bool {
        let ends = self.brokers[me].ends();
        let told =
            matches!(&self.brokers[index(leader)].role, Role::Leading(it) if it.acknowledged_by(id(me)) == Some(ends));
        let on_its_way = &self.wires[index(leader)][me].to_leader;
        !told && !on_its_way.iter().any(|message| message.says == Says::Holds(ends))
    }

    fn steps_of_fate(&self, me: usize, steps: &mut Vec<Step>) {
        let (broker, budget) = (&self.brokers[me], &self.budget);
        let written = broker.log.len();
        if let Role::Dead(_) = broker.role {
            steps.push(Step::Restart(me));
            if self.registered[me].is_some() {
                steps.push(Step::Expire(me));
            }
            return;
        }
        let unmarked = if self.durability == Durability::Persisted { Holds::All } else { Holds::Unmarked };
        if budget.kills > 0 {
            steps.push(Step::Die { broker: me, holds: unmarked, left: written });
        }
        if budget.losses > 0 {
            let kept = if self.durability == Durability::Persisted { broker.persisted } else { 0 };
            steps.extend((kept..written).map(|left| Step::Die { broker: me, holds: unmarked, left }));
        }
        if budget.wipes > 0 {
            steps.push(Step::Die { broker: me, holds: Holds::Nothing, left: 0 });
        }
        match self.registered[me] {
            Some(_) if budget.expiries > 0 => steps.push(Step::Expire(me)),
            Some(_) => {}
            None => steps.push(Step::Register(me)),
        }
    }

    fn steps_of_wire(&self, leader: usize, follower: usize, steps: &mut Vec<Step>) {
        let wire = &self.wires[leader][follower];
        steps.extend((0..wire.to_leader.len()).map(|message| Step::LeaderHears { leader, follower, message }));
        if !wire.to_follower.is_empty() {
            steps.push(Step::FollowerHears { leader, follower });
        }
        if let Role::Following(it) = &self.brokers[follower].role
            && index(it.leader()) == leader
            && (it.is_following() || it.is_claiming())
            && self.budget.breaks > 0
        {
            steps.push(Step::Break { leader, follower });
        }
        // One message at a time: what the leader sends after it, it sends when that has come.
        if let (Role::Leading(from), Role::Following(to)) = (&self.brokers[leader].role, &self.brokers[follower].role)
            && from.follows(id(follower)).is_some()
            && wire.to_follower.is_empty()
            && (self.brokers[follower].log.len() < self.brokers[leader].log.len()
                || to.high_watermark() < from.high_watermark())
        {
            steps.push(Step::Push { leader, follower });
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

    /// The state after this step.
    pub(super) fn after(&self, step: Step) -> Result<Self, Fault> {
        let mut world = self.clone();
        match step {
            Step::Append(me) => world.append(me),
            Step::Persist(me) => {
                world.brokers[me].persisted = world.brokers[me].log.len();
                world.own_moved(me);
            }
            Step::Claim(me) => world.claim(me),
            Step::Acknowledge(me) => world.acknowledge(me),
            Step::Push { leader, follower } => world.push(leader, follower),
            Step::LeaderHears { leader, follower, message } => world.leader_hears(leader, follower, message),
            Step::FollowerHears { leader, follower } => world.follower_hears(leader, follower)?,
            Step::Break { leader, follower } => world.break_link(leader, follower),
            Step::Lag(me) => {
                world.budget.lags -= 1;
                if let Role::Leading(leader) = &mut world.brokers[me].role {
                    leader.tick(0);
                    leader.tick(1);
                }
            }
            Step::Propose(me) => world.propose(me),
            Step::StoreDoes(call) => world.store_does(call),
            Step::OutcomeTold(call) => world.outcome_told(call),
            Step::OutcomeLost(call) => world.outcome_lost(call),
            Step::ReadBack(me) => world.tell(me, Agreed::Found(world.value.clone(), world.revision)),
            Step::Learn(me) => world.learn(me),
            Step::Die { broker, holds, left } => world.die(broker, holds, left),
            Step::Restart(me) => world.restart(me),
            Step::Expire(me) => {
                world.budget.expiries -= u8::from(world.brokers[me].is_alive());
                world.registered[me] = None;
            }
            Step::Register(me) => world.register(me),
            Step::Elect(to) => {
                world.budget.handovers -= u8::from(world.value.leader.is_some_and(|leader| world.is_live(leader)));
                let elected = world.value.elect(id(to), |id| world.is_live(id), world.min_insync);
                world.write(elected.expect("only offered when it may be"));
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

    /// The value is another from now on.
    fn write(&mut self, value: crate::cluster::PartitionValue) {
        let turns = value.leader_epoch.0 - self.value.leader_epoch.0;
        self.budget.epochs = self.budget.epochs.saturating_sub(u8::try_from(turns).expect("at most one"));
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
        if self.durability == Durability::Replicated {
            self.brokers[me].persisted = self.brokers[me].log.len();
        }
        self.own_moved(me);
    }

    fn own_moved(&mut self, me: usize) {
        let ends = self.brokers[me].ends();
        if let Role::Leading(leader) = &mut self.brokers[me].role {
            leader.own(ends);
        }
    }

    fn claim(&mut self, me: usize) {
        let (history, end, from) = (self.brokers[me].history(), at(self.brokers[me].log.len()), self.peer(me));
        if let Role::Following(follower) = &mut self.brokers[me].role {
            let says = Says::Claims(follower.claim(&history, end));
            let (leader, epoch) = (index(follower.leader()), follower.epoch());
            self.wires[leader][me].to_leader.push(ToLeader { from, epoch, says });
        }
    }

    fn acknowledge(&mut self, me: usize) {
        let (from, says) = (self.peer(me), Says::Holds(self.brokers[me].ends()));
        if let Role::Following(follower) = &self.brokers[me].role {
            let message = ToLeader { from, epoch: follower.epoch(), says };
            self.wires[index(follower.leader())][me].to_leader.push(message);
        }
    }

    /// The leader sends the next batch that the follower lacks, or only its high watermark.
    fn push(&mut self, leader: usize, follower: usize) {
        let from = self.brokers[follower].log.len();
        let Role::Leading(it) = &self.brokers[leader].role else { return };
        let batch = self.brokers[leader].log.get(from);
        let heads = batch.map(|epoch| Head { base: at(from), end: at(from + 1), epoch: *epoch });
        let message = ToFollower {
            epoch: it.epoch(),
            high_watermark: it.high_watermark(),
            brings: Brings::Batches(heads.into_iter().collect()),
        };
        self.wires[leader][follower].to_follower.push(message);
    }

    fn leader_hears(&mut self, leader: usize, follower: usize, message: usize) {
        let ToLeader { from, epoch, says } = self.wires[leader][follower].to_leader.remove(message);
        let (history, local) = (self.brokers[leader].history(), Local { local_start: Offset::ZERO, tiered_end: None });
        let answer = match (&mut self.brokers[leader].role, says) {
            (Role::Leading(it), Says::Claims(claim)) => {
                let answer = it.join(from, epoch, claim, local, &history);
                ToFollower { epoch, high_watermark: it.high_watermark(), brings: Brings::Answer(answer) }
            }
            (Role::Leading(it), Says::Holds(ends)) => {
                // What does not count changes nothing: that is the rule, and what is checked.
                let _stale = it.acknowledged(from, epoch, ends);
                return;
            }
            (_, Says::Claims(_)) => {
                let refused = Join::Refused(JoinRefused::NoReplica);
                ToFollower { epoch, high_watermark: Offset::ZERO, brings: Brings::Answer(refused) }
            }
            (_, Says::Holds(_)) => return,
        };
        // An answer goes out on the link that asked: it is gone with the process.
        if self.brokers[follower].epoch == from.epoch && self.brokers[follower].is_alive() {
            self.wires[leader][follower].to_follower.push(answer);
        }
    }

    fn follower_hears(&mut self, leader: usize, me: usize) -> Result<(), Fault> {
        let ToFollower { epoch, high_watermark, brings } = self.wires[leader][me].to_follower.remove(0);
        let history = self.brokers[me].history();
        let Role::Following(follower) = &mut self.brokers[me].role else { return Ok(()) };
        let answered = match &brings {
            Brings::Answer(answer) => follower.answered(epoch, answer, high_watermark, &history),
            Brings::Batches(heads) => follower.received(epoch, heads, high_watermark),
        };
        match answered {
            Ok(Act::Cut(to) | Act::Begin(to)) => {
                self.may_cut(me, to)?;
                let broker = &mut self.brokers[me];
                broker.log.truncate(count(to));
                broker.persisted = broker.persisted.min(count(to));
                self.claim(me);
            }
            Ok(Act::Append) => {
                if let Brings::Batches(heads) = brings {
                    self.brokers[me].log.extend(heads.iter().map(|head| head.epoch));
                }
                let end = at(self.brokers[me].log.len());
                if let Role::Following(follower) = &mut self.brokers[me].role {
                    follower.appended(end);
                }
                self.log_grew(me);
            }
            Ok(Act::Follow(_) | Act::Pass | Act::Wait(_)) => {}
            Err(Violation::CutBelowCommitted { to, .. }) => {
                return Err(Fault::AskedToCutCommitted { broker: id(me), to });
            }
            // Late or out of order: it changed nothing.
            Err(_) => {}
        }
        Ok(())
    }

    fn break_link(&mut self, leader: usize, me: usize) {
        self.budget.breaks -= 1;
        self.wires[leader][me].to_follower.clear();
        if let Role::Following(follower) = &mut self.brokers[me].role {
            follower.interrupted();
        }
        if let Role::Leading(it) = &mut self.brokers[leader].role {
            it.left(id(me), Departure::LinkLost);
        }
    }

    fn propose(&mut self, me: usize) {
        let Role::Leading(leader) = &mut self.brokers[me].role else { return };
        if let Some(proposal) = leader.proposal() {
            let awaited = Some(leader.epoch());
            self.calls.push(Call { proposal, owner: id(me), awaited, done: None });
        }
    }

    /// The store carries out a transaction: all its comparisons hold, or nothing is done.
    fn store_does(&mut self, call: usize) {
        let Call { proposal, awaited, .. } = self.calls[call].clone();
        let holds = proposal.expect == self.revision
            && proposal.added.iter().all(|peer| self.registered[index(peer.broker)] == Some(peer.epoch));
        if holds {
            self.write(proposal.value);
        }
        if awaited.is_some() {
            self.calls[call].done = Some(holds.then_some(self.revision));
        } else {
            self.calls.remove(call);
        }
    }

    fn outcome_told(&mut self, call: usize) {
        let Call { owner, awaited, done, .. } = self.calls.remove(call);
        let outcome = match done.flatten() {
            Some(revision) => Agreed::Done(revision),
            None => Agreed::Found(self.value.clone(), self.revision),
        };
        self.tell_if(owner, awaited, outcome);
    }

    /// The leader hears nothing. What the store did is done, and what it did not may yet be done, now or never.
    fn outcome_lost(&mut self, call: usize) {
        self.budget.unknowns -= 1;
        let Call { owner, awaited, done, .. } = self.calls[call].clone();
        match done {
            Some(_) => drop(self.calls.remove(call)),
            None => self.calls[call].awaited = None,
        }
        self.tell_if(owner, awaited, Agreed::Unknown);
    }

    fn tell_if(&mut self, owner: BrokerId, awaited: Option<LeaderEpoch>, outcome: Agreed) {
        if let Role::Leading(leader) = &self.brokers[index(owner)].role
            && Some(leader.epoch()) == awaited
        {
            self.tell(index(owner), outcome);
        }
    }

    fn tell(&mut self, me: usize, outcome: Agreed) {
        let Role::Leading(leader) = &mut self.brokers[me].role else { return };
        if let Observed::Deposed { .. } = leader.agreed(outcome) {
            self.learn(me);
        }
    }

    /// A broker hears of the value and the registrations as they are.
    fn learn(&mut self, me: usize) {
        let (value, revision, rule) = (self.value.clone(), self.revision, self.rule());
        let seen: Vec<_> = (0..BROKERS).map(|other| (id(other), self.registration(other))).collect();
        let broker = &mut self.brokers[me];
        let stays = match &mut broker.role {
            Role::Leading(leader) => !matches!(leader.observed(&value, revision), Observed::Deposed { .. }),
            Role::Following(follower) => follower.epoch() == value.leader_epoch,
            Role::Waiting | Role::Dead(_) => value.leader.is_none(),
        };
        broker.known = revision;
        if !stays {
            learned_role(self, me);
        }
        if let Role::Leading(leader) = &mut self.brokers[me].role {
            leader.configure(rule);
            for (other, registration) in seen {
                leader.seen(other, registration);
            }
        }
    }

    fn die(&mut self, me: usize, holds: Holds, left: usize) {
        let budget = &mut self.budget;
        match holds {
            Holds::Nothing => budget.wipes -= 1,
            _ if left < self.brokers[me].log.len() => budget.losses -= 1,
            _ => budget.kills -= 1,
        }
        let broker = &mut self.brokers[me];
        broker.log.truncate(left);
        (broker.persisted, broker.high_watermark, broker.known) = (left, Offset::ZERO, Revision::ZERO);
        broker.role = Role::Dead(holds);
        for other in 0..BROKERS {
            // What it was sent is gone, what it sent may still come.
            self.wires[other][me].to_follower.clear();
            self.wires[me][other].to_leader.clear();
            self.wires[me][other].to_follower.clear();
        }
        for call in &mut self.calls {
            if call.owner == id(me) {
                call.awaited = None;
            }
        }
        self.calls.retain(|call| call.awaited.is_some() || call.done.is_none());
    }

    /// A process begins: it ends the older registration, strikes itself from what it cannot prove, gives up what it led, registers.
    fn restart(&mut self, me: usize) {
        let Role::Dead(holds) = self.brokers[me].role else { return };
        self.registered[me] = None;
        if let Some(value) = self.value.struck(id(me), holds) {
            self.write(value);
        }
        self.brokers[me].role = Role::Waiting;
        self.register(me);
    }

    /// It registers, with a new broker epoch, and connects anew with that.
    fn register(&mut self, me: usize) {
        let broker = &mut self.brokers[me];
        broker.epoch = broker.epoch.next();
        self.registered[me] = Some(broker.epoch);
        if let Role::Following(follower) = &mut broker.role {
            follower.interrupted();
            self.wires[index(follower.leader())][me].to_follower.clear();
        }
    }
}
