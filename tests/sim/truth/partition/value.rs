//! Rules by which a partition value in the metadata store follows the one that it replaces.

use super::*;

/// ISR proposal of a leader.
pub(super) struct Proposal {
    pub(super) epoch: LeaderEpoch,
    pub(super) expect: Revision,
    /// Proposed members with the broker epochs that were registered at the proposal.
    pub(super) isr: BTreeMap<BrokerId, Option<u64>>,
    /// Added brokers, with the broker epoch that each must have.
    pub(super) added: Vec<(BrokerId, u64)>,
}

impl Proposal {
    /// Returns true if the registrations still allow the store to apply the proposal.
    pub(super) fn may_come(&self, brokers: &Brokers) -> bool {
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
    fn wrong<T>(&self, why: impl std::fmt::Display) -> Result<T, Wrong> {
        Err(format!("{why}: {:?} became {:?}", self.old, self.new))
    }

    /// Returns the replicas that entered the ISR.
    fn came(&self) -> impl Iterator<Item = BrokerId> {
        self.new.isr.iter().copied().filter(|id| !self.old.isr.contains(id))
    }

    /// Returns the brokers that left the ISR and are still replicas.
    fn left(&self) -> impl Iterator<Item = BrokerId> {
        let left = self.old.isr.iter().copied().filter(|id| !self.new.isr.contains(id));
        left.filter(|id| self.new.replicas.contains(id))
    }

    /// Returns the brokers that left ISR ∪ ELR and are still replicas.
    fn forgotten(&self) -> impl Iterator<Item = BrokerId> {
        let left = self.left().chain(self.old.elr.iter().copied().filter(|id| !self.new.isr.contains(id)));
        left.filter(|id| self.new.replicas.contains(id) && !self.new.elr.contains(id))
    }

    fn is_unclean(&self) -> bool {
        self.new.unclean != self.old.unclean
    }
}

impl Partition {
    /// Checks that a new value follows from the current one.
    pub(super) fn follows(&self, new: &PartitionValue, brokers: &Brokers, machines: &Machines) -> Result<(), Wrong> {
        let Some((old, replaced)) = self.value() else { return Ok(()) };
        let change = Change { old, new, replaced };
        let (was, is) = (old.leader_epoch, new.leader_epoch);
        if new.leader.is_some_and(|leader| !new.isr.contains(&leader)) {
            return change.wrong("the leader is not in sync");
        }
        if is == was {
            if new.leader != old.leader {
                return change.wrong(format_args!("epoch {is} got another leader"));
            }
            change.came().try_for_each(|broker| self.was_admitted(broker, &change, brokers))?;
            self.was_proposed(&change, machines)?;
        } else {
            if is.0 != was.0 + 1 {
                return change.wrong(format_args!("the epoch went from {was} to {is}"));
            }
            if let Some(leader) = new.leader.filter(|_| !change.is_unclean()) {
                was_elected(leader, &change)?;
            }
        }
        self.stays_eligible(&change, machines)
    }

    /// Checks that a replica that enters the ISR was proposed for the replaced value and has not registered again since.
    fn was_admitted(&self, broker: BrokerId, change: &Change<'_>, brokers: &Brokers) -> Result<(), Wrong> {
        let Some(proposal) = self.proposed_as(change) else {
            return change.wrong(format_args!(
                "broker {broker} was admitted, and by no proposal for the value of {}",
                change.replaced
            ));
        };
        let (then, now) = (proposal.isr[&broker], brokers.get(&broker).copied());
        if then.is_none() || then != now {
            return change
                .wrong(format_args!("broker {broker} was admitted in uptime {then:?}, and {now:?} is registered"));
        }
        Ok(())
    }

    /// Returns the proposal of this ISR for the replaced value.
    fn proposed_as(&self, change: &Change<'_>) -> Option<&Proposal> {
        let isr: BTreeSet<_> = change.new.isr.iter().collect();
        let epoch = change.new.leader_epoch;
        let made_so = |proposal: &&Proposal| {
            proposal.epoch == epoch && proposal.expect == change.replaced && proposal.isr.keys().eq(isr.iter().copied())
        };
        self.proposals.iter().rev().find(made_so)
    }

    /// Checks that within an epoch only the leader removes a replica from the ISR. A starting broker may remove itself.
    fn was_proposed(&self, change: &Change<'_>, machines: &Machines) -> Result<(), Wrong> {
        match change.left().find(|broker| !starts(*broker, machines)) {
            Some(broker) if self.proposed_as(change).is_none() => {
                change.wrong(format_args!("broker {broker} runs and left the ISR, and no leader proposed it"))
            }
            _ => Ok(()),
        }
    }

    /// Checks the ELR. A replica that leaves the ISR below the min ISR stays eligible until the min ISR is met again. A broker that is down
    /// or starts, or that lacks committed records, need not stay eligible. Only a member becomes eligible.
    fn stays_eligible(&self, change: &Change<'_>, machines: &Machines) -> Result<(), Wrong> {
        let (old, new) = (change.old, change.new);
        if let Some(broker) = new.elr.iter().find(|id| !old.elr.contains(id) && !old.isr.contains(id)) {
            return change.wrong(format_args!("broker {broker} may lead now, and was no member"));
        }
        if change.is_unclean() || self.minima.first().is_none_or(|least| new.isr.len() >= *least) {
            return Ok(());
        }
        let lacks = |id: &BrokerId| self.replicas.get(id).is_none_or(|replica| self.holds(replica).is_err());
        match change.forgotten().find(|id| !starts(*id, machines) && !lacks(id)) {
            Some(broker) => change.wrong(format_args!("broker {broker} holds all, and may lead no more")),
            None => Ok(()),
        }
    }
}

/// Checks an election: the leader is a member, and no other replica enters the ISR. A leader from the ELR is alone in the ISR.
fn was_elected(leader: BrokerId, change: &Change<'_>) -> Result<(), Wrong> {
    let old = change.old;
    if !old.isr.contains(&leader) && !old.elr.contains(&leader) {
        return change.wrong(format_args!("broker {leader} was elected and is no member"));
    }
    if change.came().any(|broker| broker != leader) {
        return change.wrong("an election added members");
    }
    if !old.isr.contains(&leader) && change.new.isr != [leader] {
        return change.wrong(format_args!("broker {leader} was elected from the ELR beside members of the ISR"));
    }
    Ok(())
}

/// Returns true if a broker is not active: it is down or starts.
fn starts(broker: BrokerId, machines: &Machines) -> bool {
    machines.get(&broker).is_none_or(|machine| !machine.is_running())
}
