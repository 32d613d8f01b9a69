//! What a partition's task asks of its broker. Nothing here waits or blocks: the broker takes the question, and the outcome comes
//! back through the partition's handle.

use std::sync::Arc;

use super::leader::{
    insync::{Ends, Proposal},
    join::Claim,
};
use crate::{
    model::{BrokerId, LeaderEpoch, PartitionId},
    telemetry::{Counter, Metrics},
};

/// The links to other brokers, over which this one follows.
pub trait Links: Send + Sync + 'static {
    /// The partition follows `leader` from now on, and nobody that it followed before. The link says
    /// [`FromLink::Up`](super::FromLink::Up) when it stands, also when it stands already.
    fn follow(&self, partition: PartitionId, leader: BrokerId);

    /// Sends a claim on the link over which the partition follows. It takes the place of an earlier one: what is answered to that, or
    /// comes after it, is dropped.
    fn join(&self, partition: PartitionId, epoch: LeaderEpoch, claim: Claim, ends: Ends);

    /// Says [`FromLink::Up`](super::FromLink::Up) again a little later: later each time, until the leader has answered
    /// with [`Joined::At`](super::Joined::At).
    fn again(&self, partition: PartitionId);

    /// The partition is not followed any more. The leader is told of the newest epoch that is known here, which may be newer than its
    /// own; `stopping` when this replica will not be back soon. Once this has returned nothing is acknowledged on that link.
    fn leave(&self, partition: PartitionId, known: LeaderEpoch, stopping: bool);
}

/// The metadata store, as leaders change it. Each question is answered exactly once, through
/// [`Partition::agreed`](super::Partition::agreed): a partition asks nothing more before that.
pub trait Agreement: Send + Sync + 'static {
    /// Writes a change of the ISR, by compare-and-set.
    fn propose(&self, partition: PartitionId, proposal: Proposal);

    /// Reads the partition's key, because the outcome of a proposal is not known. It is asked again until the store has answered
    /// with a value or with none.
    fn read_back(&self, partition: PartitionId);

    /// The leader of this epoch cannot write any more: gives up its leadership and its membership, as far as another member stays.
    /// Not answered.
    fn resign(&self, partition: PartitionId, epoch: LeaderEpoch);
}

/// What partitions count, over all of a broker.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// In-sync replicas that were lost while leading.
    pub isr_shrinks: Counter,
    /// In-sync replicas that were won while leading.
    pub isr_expands: Counter,
    /// Leader epochs that began here.
    pub leader_epochs: Counter,
}

impl Counts {
    /// Those of a broker's figures.
    pub fn of(metrics: &Metrics) -> Self {
        Self {
            isr_shrinks: metrics.isr_shrinks.clone(),
            isr_expands: metrics.isr_expands.clone(),
            leader_epochs: metrics.leader_epochs.clone(),
        }
    }

    /// The in-sync replicas of a partition that is led here changed.
    pub(super) fn isr_changed(&self, before: &[BrokerId], after: &[BrokerId]) {
        self.isr_shrinks.inc_by(before.iter().filter(|id| !after.contains(id)).count() as u64);
        self.isr_expands.inc_by(after.iter().filter(|id| !before.contains(id)).count() as u64);
    }
}

/// All of them.
#[derive(Clone)]
pub struct Surroundings {
    /// Links to other brokers.
    pub links: Arc<dyn Links>,
    /// The metadata store.
    pub agreement: Arc<dyn Agreement>,
    /// What is counted.
    pub counts: Counts,
}

impl Surroundings {
    /// Those of a broker that is alone: there is nobody to follow, and no set that could change.
    pub fn alone() -> Self {
        Self { links: Arc::new(Alone), agreement: Arc::new(Alone), counts: Counts::default() }
    }
}

struct Alone;

impl Links for Alone {
    fn follow(&self, partition: PartitionId, leader: BrokerId) {
        tracing::error!(%partition, %leader, "the metadata names another leader, and this broker runs alone: give it metadata.etcd");
    }

    fn join(&self, _: PartitionId, _: LeaderEpoch, _: Claim, _: Ends) {}

    fn again(&self, _: PartitionId) {}

    fn leave(&self, _: PartitionId, _: LeaderEpoch, _: bool) {}
}

impl Agreement for Alone {
    fn propose(&self, partition: PartitionId, proposal: Proposal) {
        tracing::error!(%partition, ?proposal, "the metadata names other replicas, and this broker runs alone: give it metadata.etcd");
    }

    fn read_back(&self, _: PartitionId) {}

    fn resign(&self, _: PartitionId, _: LeaderEpoch) {}
}
