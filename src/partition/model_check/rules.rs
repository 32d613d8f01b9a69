//! Rules that must hold after every step: design.md section 13, as far as one partition's replication can show them.

use std::sync::Arc;

use super::world::{BROKERS, ModelState, Role, at, count, id, index};
use crate::{
    cluster::{ReplicaIntegrity, Value as _},
    model::{BrokerId, LeaderEpoch, Offset},
};

/// Violation of a rule by a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RuleViolation {
    /// Two processes lead in one epoch.
    TwoLeaders(LeaderEpoch),
    /// The epochs in a log decrease.
    EpochFalls(BrokerId),
    /// Two logs share an offset and its epoch, and differ before.
    LogsDiffer(BrokerId, BrokerId),
    /// A broker's high watermark covers records that are not the committed ones.
    NotCommitted { broker: BrokerId, high_watermark: Offset },
    /// Fewer replicas than the min ISR held the records that were just committed.
    TooFewHold { held_by: usize, committed: usize },
    /// A member of ISR or ELR lacks committed records.
    MemberLacks { broker: BrokerId, committed: usize },
    /// The leader of the newest epoch, after committing it, serves an older end than was served before.
    LatestGoesBack { latest: Offset, committed: usize },
    /// A member truncates committed records.
    CutsCommitted { broker: BrokerId, to: Offset },
    /// A leader's response requires a truncation below the follower's high watermark.
    AskedToCutCommitted { broker: BrokerId, to: Offset },
    /// The stored value contradicts itself.
    Contradiction(String),
    /// The epoch does not grow with a change of the leader, or grows without one.
    EpochAndLeader(LeaderEpoch),
    /// A high watermark fell.
    Falls(BrokerId),
    /// Without further faults the partition does not reach a state with every replica in sync and every record
    /// committed.
    NeverInSync(String),
}

/// Applies the current value to a broker, which may take another role. A new leader is recorded, to check that it is
/// the only one of its epoch, ever.
pub(super) fn apply_value(world: &mut ModelState, me: usize) {
    let transition = world.brokers[me].metadata.apply(Arc::new(world.value.clone()), world.revision, id(me));
    let Some(role) = world.role_after(me, transition) else { return };
    let broker = &mut world.brokers[me];
    broker.high_watermark = broker.committed_end();
    if let Role::Leading(leader) = &role {
        broker.metadata.start_leading();
        world.led.push((leader.epoch(), id(me), broker.epoch));
    }
    broker.role = role;
}

impl ModelState {
    /// Checks that a member truncates no committed record.
    pub(super) fn may_cut(&self, me: usize, to: Offset) -> Result<(), RuleViolation> {
        let is_member = self.value.isr.contains(&id(me)) || self.value.elr.contains(&id(me));
        if is_member && count(to) < self.committed.len() {
            return Err(RuleViolation::CutsCommitted { broker: id(me), to });
        }
        Ok(())
    }

    /// Checks this state, which followed `before`, and records its commits.
    pub(super) fn check(&mut self, before: &Self) -> Result<(), RuleViolation> {
        self.check_value(before)?;
        self.check_leaders()?;
        self.check_logs()?;
        self.commit()?;
        self.check_committed(before)
    }

    fn check_value(&self, before: &Self) -> Result<(), RuleViolation> {
        if let Some(reason) = self.value.contradiction() {
            return Err(RuleViolation::Contradiction(reason));
        }
        let turns = u32::from(self.value.leader != before.value.leader);
        if self.value.leader_epoch.0 != before.value.leader_epoch.0 + turns {
            return Err(RuleViolation::EpochAndLeader(self.value.leader_epoch));
        }
        Ok(())
    }

    fn check_leaders(&self) -> Result<(), RuleViolation> {
        for (index, (epoch, _, _)) in self.led.iter().enumerate() {
            if self.led[..index].iter().any(|(other, _, _)| other == epoch) {
                return Err(RuleViolation::TwoLeaders(*epoch));
            }
        }
        Ok(())
    }

    fn check_logs(&self) -> Result<(), RuleViolation> {
        for (me, broker) in self.brokers.iter().enumerate() {
            if !broker.log.is_sorted() {
                return Err(RuleViolation::EpochFalls(id(me)));
            }
            for (other, other_broker) in self.brokers.iter().enumerate().take(me) {
                let last_equal = broker.log.iter().zip(&other_broker.log).rposition(|(a, b)| a == b);
                if last_equal.is_some_and(|last| broker.log[..last] != other_broker.log[..last]) {
                    return Err(RuleViolation::LogsDiffer(id(me), id(other)));
                }
            }
        }
        Ok(())
    }

    /// Commits the records below each leader's high watermark.
    fn commit(&mut self) -> Result<(), RuleViolation> {
        for me in 0..BROKERS {
            let Role::Leading(leader) = &self.brokers[me].role else { continue };
            let end = count(leader.high_watermark());
            if end <= self.committed.len() {
                continue;
            }
            let log = &self.brokers[me].log;
            if end > log.len() || !log.starts_with(&self.committed) {
                return Err(RuleViolation::NotCommitted { broker: id(me), high_watermark: at(end) });
            }
            self.committed = log[..end].to_vec();
            // A broker that lost the records since may have held them when it acknowledged.
            let held = self.brokers.iter().filter(|broker| broker.has_lost || broker.log.starts_with(&self.committed));
            let held_by = held.count();
            if held_by < leader.rule().min_insync {
                return Err(RuleViolation::TooFewHold { held_by, committed: end });
            }
        }
        Ok(())
    }

    fn check_committed(&self, before: &Self) -> Result<(), RuleViolation> {
        let committed = self.committed.len();
        for member in self.value.isr.iter().chain(&self.value.elr) {
            let broker = &self.brokers[index(*member)];
            // An exited broker that cannot verify its records removes itself before it takes part again.
            let counts = matches!(broker.role, Role::Exited(ReplicaIntegrity::Intact)) || broker.is_alive();
            if counts && !broker.log.starts_with(&self.committed) {
                return Err(RuleViolation::MemberLacks { broker: *member, committed });
            }
        }
        let newest = self.led.iter().map(|(epoch, _, _)| *epoch).max();
        for (me, broker) in self.brokers.iter().enumerate() {
            let high_watermark = broker.committed_end();
            let end = count(high_watermark);
            if end > committed || !broker.log.starts_with(&self.committed[..end]) {
                return Err(RuleViolation::NotCommitted { broker: id(me), high_watermark });
            }
            if broker.is_alive() && before.brokers[me].is_alive() && high_watermark < before.brokers[me].committed_end()
            {
                return Err(RuleViolation::Falls(id(me)));
            }
            if let Role::Leading(leader) = &broker.role
                && Some(leader.epoch()) == newest
                && let Some(latest) = leader.latest()
                && count(latest) < committed
            {
                return Err(RuleViolation::LatestGoesBack { latest, committed });
            }
        }
        Ok(())
    }
}
