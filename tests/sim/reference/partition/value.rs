//! Rules for a new partition value in the metadata store, by the value that it replaces.

use super::*;

/// ISR proposal of a leader.
pub(super) struct Proposal {
    pub(super) epoch: LeaderEpoch,
    pub(super) expect: Revision,
    /// Proposed members, each with the broker epoch that was registered at the time of the proposal.
    pub(super) isr: BTreeMap<BrokerId, Option<u64>>,
    /// Brokers that the proposal adds to the ISR, with the broker epoch that each must have.
    pub(super) added: Vec<(BrokerId, u64)>,
}

impl Proposal {
    /// Returns true if the added brokers are still registered with the broker epochs of the proposal. Otherwise the
    /// store does not apply the proposal.
    pub(super) fn may_be_applied(&self, brokers: &Brokers) -> bool {
        self.added.iter().all(|(broker, registered)| brokers.get(broker) == Some(registered))
    }
}

/// A new value, the replaced value, and the revision of the replaced one.
struct Change<'a> {
    old: &'a PartitionValue,
    new: &'a PartitionValue,
    replaced: Revision,
}

impl Change<'_> {
    /// Returns an error with the reason and both values.
    fn violation<T>(&self, reason: impl std::fmt::Display) -> Result<T, RuleViolation> {
        Err(format!("{reason}: {:?} became {:?}", self.old, self.new))
    }

    /// Returns the brokers that entered the ISR.
    fn entered_isr(&self) -> impl Iterator<Item = BrokerId> {
        self.new.isr.iter().copied().filter(|id| !self.old.isr.contains(id))
    }

    /// Returns the brokers that left the ISR and are still replicas of the partition.
    fn left_isr(&self) -> impl Iterator<Item = BrokerId> {
        let left = self.old.isr.iter().copied().filter(|id| !self.new.isr.contains(id));
        left.filter(|id| self.new.replicas.contains(id))
    }

    /// Returns the brokers that left ISR ∪ ELR and are still replicas of the partition.
    fn left_isr_and_elr(&self) -> impl Iterator<Item = BrokerId> {
        let left = self.left_isr().chain(self.old.elr.iter().copied().filter(|id| !self.new.isr.contains(id)));
        left.filter(|id| self.new.replicas.contains(id) && !self.new.elr.contains(id))
    }

    fn is_unclean(&self) -> bool {
        self.new.unclean_epoch != self.old.unclean_epoch
    }
}

impl Partition {
    /// Checks that the new value may replace the current one. The first value is not checked.
    pub(super) fn check_replacement(
        &self,
        new: &PartitionValue,
        brokers: &Brokers,
        machines: &Machines,
    ) -> Result<(), RuleViolation> {
        let Some((old, replaced)) = self.value() else { return Ok(()) };
        let change = Change { old, new, replaced };
        let (was, is) = (old.leader_epoch, new.leader_epoch);
        if new.leader.is_some_and(|leader| !new.isr.contains(&leader)) {
            return change.violation("the leader is not in sync");
        }
        if is == was {
            if new.leader != old.leader {
                return change.violation(format_args!("epoch {is} has another leader"));
            }
            change.entered_isr().try_for_each(|broker| self.check_admitted(broker, &change, brokers))?;
            self.check_proposed(&change, machines)?;
        } else {
            if is.0 != was.0 + 1 {
                return change.violation(format_args!("the epoch changed from {was} to {is}"));
            }
            if let Some(leader) = new.leader.filter(|_| !change.is_unclean()) {
                check_elected(leader, &change)?;
            }
        }
        self.check_elr(&change, machines)
    }

    /// Checks that the leader proposed the new ISR, with this broker, for the replaced value. The broker must still be
    /// registered with the broker epoch that it had at the proposal.
    fn check_admitted(&self, broker: BrokerId, change: &Change<'_>, brokers: &Brokers) -> Result<(), RuleViolation> {
        let Some(proposal) = self.proposed_as(change) else {
            return change.violation(format_args!(
                "broker {broker} was admitted without a proposal for the value of revision {}",
                change.replaced
            ));
        };
        let (proposed_epoch, registered_epoch) = (proposal.isr[&broker], brokers.get(&broker).copied());
        if proposed_epoch.is_none() || proposed_epoch != registered_epoch {
            return change
                .violation(format_args!("broker {broker} was admitted with broker epoch {proposed_epoch:?}, but {registered_epoch:?} is registered"));
        }
        Ok(())
    }

    /// Returns the last proposal of the new ISR for the replaced value; `None` if there is none.
    fn proposed_as(&self, change: &Change<'_>) -> Option<&Proposal> {
        let isr: BTreeSet<_> = change.new.isr.iter().collect();
        let epoch = change.new.leader_epoch;
        let is_match = |proposal: &&Proposal| {
            proposal.epoch == epoch && proposal.expect == change.replaced && proposal.isr.keys().eq(isr.iter().copied())
        };
        self.proposals.iter().rev().find(is_match)
    }

    /// Checks that within an epoch only the leader removes a replica whose broker runs from the ISR. A broker that
    /// starts may remove itself.
    fn check_proposed(&self, change: &Change<'_>, machines: &Machines) -> Result<(), RuleViolation> {
        match change.left_isr().find(|broker| !is_inactive(*broker, machines)) {
            Some(broker) if self.proposed_as(change).is_none() => change
                .violation(format_args!("the running broker {broker} left the ISR without a proposal of the leader")),
            _ => Ok(()),
        }
    }

    /// Checks the ELR. A replica that leaves the ISR below the min ISR stays eligible until the min ISR is met again. A
    /// broker that does not run, or whose replica lacks committed records, need not stay eligible. Only a member of ISR
    /// or ELR enters the new ELR.
    fn check_elr(&self, change: &Change<'_>, machines: &Machines) -> Result<(), RuleViolation> {
        let (old, new) = (change.old, change.new);
        if let Some(broker) = new.elr.iter().find(|id| !old.elr.contains(id) && !old.isr.contains(id)) {
            return change.violation(format_args!("broker {broker} entered the ELR but was no member of ISR or ELR"));
        }
        if change.is_unclean() || self.minima.first().is_none_or(|min| new.isr.len() >= *min) {
            return Ok(());
        }
        let lacks = |id: &BrokerId| self.replicas.get(id).is_none_or(|replica| self.check_committed(replica).is_err());
        match change.left_isr_and_elr().find(|id| !is_inactive(*id, machines) && !lacks(id)) {
            Some(broker) => {
                change.violation(format_args!("broker {broker} has all committed records but left the ELR"))
            }
            None => Ok(()),
        }
    }
}

/// Checks a clean election: the new leader was a member of ISR or ELR, and no other replica enters the ISR. A leader
/// from the ELR is alone in the ISR.
fn check_elected(leader: BrokerId, change: &Change<'_>) -> Result<(), RuleViolation> {
    let old = change.old;
    if !old.isr.contains(&leader) && !old.elr.contains(&leader) {
        return change.violation(format_args!("broker {leader} was elected but is no member of ISR or ELR"));
    }
    if change.entered_isr().any(|broker| broker != leader) {
        return change.violation("an election added members");
    }
    if !old.isr.contains(&leader) && change.new.isr != [leader] {
        return change.violation(format_args!("broker {leader} was elected from the ELR beside members of the ISR"));
    }
    Ok(())
}

/// Returns true if a broker does not run: it is down, starts or stops.
fn is_inactive(broker: BrokerId, machines: &Machines) -> bool {
    machines.get(&broker).is_none_or(|machine| !machine.is_running())
}
