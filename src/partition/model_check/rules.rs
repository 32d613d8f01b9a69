//! Rules that must hold after every step. The section *Model check* of docs/replication.md lists them.

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
    EpochDecreases(BrokerId),
    /// Two logs share an offset and its epoch, and differ below that offset.
    LogsDiffer(BrokerId, BrokerId),
    /// A broker's high watermark covers records that are not the committed ones.
    NotCommitted { broker: BrokerId, high_watermark: Offset },
    /// Fewer replicas than the min ISR held the records that were just committed.
    TooFewReplicas { replicas: usize, committed: usize },
    /// A member of ISR or ELR lacks committed records.
    MemberLacks { broker: BrokerId, committed: usize },
    /// The leader of the newest epoch has committed its epoch, and serves a latest offset below a committed record.
    LatestGoesBack { latest: Offset, committed: usize },
    /// A member of ISR or ELR truncates committed records.
    TruncatesCommitted { broker: BrokerId, to: Offset },
    /// A leader's response requires a truncation below the follower's high watermark.
    TruncationBelowHighWatermark { broker: BrokerId, to: Offset },
    /// The stored value contradicts itself.
    Contradiction(String),
    /// The epoch did not grow by one with a change of the leader, or changed without one.
    EpochAndLeader(LeaderEpoch),
    /// The high watermark of a running broker fell.
    HighWatermarkFalls(BrokerId),
    /// Without further faults the partition does not reach a state with every replica in sync and every record
    /// committed.
    NeverInSync(String),
}

/// Applies the current value to a broker, which may change its role. Adds a new leader to `leaders`: an epoch must have
/// only one leader, ever.
pub(super) fn apply_value(state: &mut ModelState, me: usize) {
    let transition = state.brokers[me].metadata.apply(Arc::new(state.value.clone()), state.revision, id(me));
    let Some(role) = state.role_after(me, transition) else { return };
    let broker = &mut state.brokers[me];
    broker.high_watermark = broker.committed_end();
    if let Role::Leading(leader) = &role {
        broker.metadata.start_leading();
        state.leaders.push((leader.epoch(), id(me), broker.epoch));
    }
    broker.role = role;
}

impl ModelState {
    /// Checks that a member of ISR or ELR truncates no committed record.
    pub(super) fn check_truncation(&self, me: usize, to: Offset) -> Result<(), RuleViolation> {
        let is_member = self.value.isr.contains(&id(me)) || self.value.elr.contains(&id(me));
        if is_member && count(to) < self.committed.len() {
            return Err(RuleViolation::TruncatesCommitted { broker: id(me), to });
        }
        Ok(())
    }

    /// Checks all rules for this state, which a step from `before` reached. Adds the records that the step committed.
    pub(super) fn check(&mut self, before: &Self) -> Result<(), RuleViolation> {
        self.check_value(before)?;
        self.check_leaders()?;
        self.check_logs()?;
        self.commit()?;
        self.check_committed(before)
    }

    /// Checks that the stored value is valid, and that its epoch grows by one with each change of the leader.
    fn check_value(&self, before: &Self) -> Result<(), RuleViolation> {
        if let Some(reason) = self.value.contradiction() {
            return Err(RuleViolation::Contradiction(reason));
        }
        let leader_changes = u32::from(self.value.leader != before.value.leader);
        if self.value.leader_epoch.0 != before.value.leader_epoch.0 + leader_changes {
            return Err(RuleViolation::EpochAndLeader(self.value.leader_epoch));
        }
        Ok(())
    }

    /// Checks that no epoch had two leaders.
    fn check_leaders(&self) -> Result<(), RuleViolation> {
        for (index, (epoch, _, _)) in self.leaders.iter().enumerate() {
            if self.leaders[..index].iter().any(|(earlier, _, _)| earlier == epoch) {
                return Err(RuleViolation::TwoLeaders(*epoch));
            }
        }
        Ok(())
    }

    /// Checks that epochs ascend in each log, and that logs that share a record are equal before it.
    fn check_logs(&self) -> Result<(), RuleViolation> {
        for (me, broker) in self.brokers.iter().enumerate() {
            if !broker.log.is_sorted() {
                return Err(RuleViolation::EpochDecreases(id(me)));
            }
            for (peer, peer_broker) in self.brokers.iter().enumerate().take(me) {
                let last_equal = broker.log.iter().zip(&peer_broker.log).rposition(|(a, b)| a == b);
                if last_equal.is_some_and(|last| broker.log[..last] != peer_broker.log[..last]) {
                    return Err(RuleViolation::LogsDiffer(id(me), id(peer)));
                }
            }
        }
        Ok(())
    }

    /// Adds the records below each leader's high watermark to the committed records, and checks that enough replicas
    /// held them.
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
            // A broker that has lost records may have held these when it acknowledged them.
            let holders =
                self.brokers.iter().filter(|broker| broker.has_lost || broker.log.starts_with(&self.committed));
            let replicas = holders.count();
            if replicas < leader.rules().min_insync {
                return Err(RuleViolation::TooFewReplicas { replicas, committed: end });
            }
        }
        Ok(())
    }

    /// Checks that members of ISR and ELR hold all committed records, and that high watermarks cover only these and
    /// never fall. Checks also that the newest leader serves all of them.
    fn check_committed(&self, before: &Self) -> Result<(), RuleViolation> {
        let committed = self.committed.len();
        for member in self.value.isr.iter().chain(&self.value.elr) {
            let broker = &self.brokers[index(*member)];
            // An exited broker that cannot verify its records removes itself before it takes part again.
            let must_hold = matches!(broker.role, Role::Exited(ReplicaIntegrity::Intact)) || broker.is_running();
            if must_hold && !broker.log.starts_with(&self.committed) {
                return Err(RuleViolation::MemberLacks { broker: *member, committed });
            }
        }
        let newest_epoch = self.leaders.iter().map(|(epoch, _, _)| *epoch).max();
        for (me, broker) in self.brokers.iter().enumerate() {
            let high_watermark = broker.committed_end();
            let end = count(high_watermark);
            if end > committed || !broker.log.starts_with(&self.committed[..end]) {
                return Err(RuleViolation::NotCommitted { broker: id(me), high_watermark });
            }
            if broker.is_running()
                && before.brokers[me].is_running()
                && high_watermark < before.brokers[me].committed_end()
            {
                return Err(RuleViolation::HighWatermarkFalls(id(me)));
            }
            if let Role::Leading(leader) = &broker.role
                && Some(leader.epoch()) == newest_epoch
                && let Some(latest) = leader.latest()
                && count(latest) < committed
            {
                return Err(RuleViolation::LatestGoesBack { latest, committed });
            }
        }
        Ok(())
    }
}
