//! Requests of a partition's task to its broker, and counters. No call waits or blocks: the broker queues the request,
//! and the outcome, if there is one, arrives through the partition's handle.

use std::sync::Arc;

use super::leader::{divergence::LogPosition, isr::IsrProposal, member::ReplicaProgress};
use crate::{
    model::{BrokerId, LeaderEpoch, PartitionId},
    telemetry::{Counter, Metrics},
};

/// Replication links over which this broker follows other brokers.
pub trait ReplicationLinks: Send + Sync + 'static {
    /// Starts to follow `leader`, instead of any earlier leader. The partition receives
    /// [`LinkEvent::Connected`](super::LinkEvent::Connected) when the link is connected, or at once if it already is.
    fn start_following(&self, partition: PartitionId, leader: BrokerId);

    /// Subscribes with this log position, over the link to the followed leader. Responses and batches of an earlier
    /// subscription are dropped.
    fn subscribe(&self, partition: PartitionId, epoch: LeaderEpoch, position: LogPosition, progress: ReplicaProgress);

    /// Sends [`LinkEvent::Connected`](super::LinkEvent::Connected) again after a pause. The pause doubles with each
    /// call, up to a limit. The pause is the shortest again on a new link, and after an unsubscription. The pause is
    /// also the shortest after a subscription that the leader accepted and that lasted for the longest pause.
    fn retry_later(&self, partition: PartitionId);

    /// Stops following, and ends the subscription. If there was one, the leader receives `newest_epoch`, the epoch of
    /// the value that this replica applied. That epoch may be newer than the leader's own. `stopping` is true if this
    /// replica will not return soon. After this call returns, nothing is acknowledged for the ended subscription.
    fn unsubscribe(&self, partition: PartitionId, newest_epoch: LeaderEpoch, stopping: bool);
}

/// Requests of a partition to the metadata store: of a leader, and of an idle replica whose metadata is late. `propose`
/// and `read_back` have exactly one outcome each, sent through
/// [`Partition::on_isr_outcome`](super::Partition::on_isr_outcome); the partition calls neither again before that
/// outcome.
pub trait IsrUpdater: Send + Sync + 'static {
    /// Writes the proposed value by compare-and-set: another ISR and ELR, or no leader.
    fn propose(&self, partition: PartitionId, proposal: IsrProposal);

    /// Reads the partition's key: after a proposal with an unknown outcome, or if the metadata is late. The read is
    /// repeated until the store returns a value or reports that the key does not exist.
    fn read_back(&self, partition: PartitionId);

    /// Resigns from the leadership of this epoch, because this broker can no longer write. The broker also leaves the
    /// ISR. Nothing changes if the ISR has no other member. This request has no outcome. The task calls this at most
    /// once for each revision of the value. So the updater must retry until the store has applied the change or the
    /// change has no effect.
    fn resign(&self, partition: PartitionId, epoch: LeaderEpoch);
}

/// Counters over all partitions of a broker.
#[derive(Clone, Debug, Default)]
pub struct PartitionCounters {
    /// Members that left the ISR of partitions that this broker leads.
    pub isr_shrinks: Counter,
    /// Members that entered the ISR of partitions that this broker leads.
    pub isr_expands: Counter,
    /// Leader epochs in which this broker started to lead.
    pub leader_elections_won: Counter,
}

impl PartitionCounters {
    /// Returns these counters of a broker's metrics.
    pub fn of(metrics: &Metrics) -> Self {
        Self {
            isr_shrinks: metrics.isr_shrinks.clone(),
            isr_expands: metrics.isr_expands.clone(),
            leader_elections_won: metrics.leader_elections_won.clone(),
        }
    }

    /// Counts the members that left and entered the ISR of a partition that this broker leads.
    pub(super) fn count_isr_change(&self, before: &[BrokerId], after: &[BrokerId]) {
        self.isr_shrinks.inc_by(before.iter().filter(|id| !after.contains(id)).count() as u64);
        self.isr_expands.inc_by(after.iter().filter(|id| !before.contains(id)).count() as u64);
    }
}

/// Interfaces of the broker that the task of a partition calls, and the counters that the task updates.
#[derive(Clone)]
pub struct PartitionContext {
    pub links: Arc<dyn ReplicationLinks>,
    pub isr_updater: Arc<dyn IsrUpdater>,
    pub counters: PartitionCounters,
}

impl PartitionContext {
    /// Returns the context of a standalone broker, with new counters. There is no other leader to follow, and the ISR
    /// never changes, so a call of `start_following` or `propose` is logged as an error. All other calls do nothing.
    pub fn standalone() -> Self {
        Self {
            links: Arc::new(StandaloneContext),
            isr_updater: Arc::new(StandaloneContext),
            counters: PartitionCounters::default(),
        }
    }
}

/// Links and ISR updater of a standalone broker.
struct StandaloneContext;

impl ReplicationLinks for StandaloneContext {
    fn start_following(&self, partition: PartitionId, leader: BrokerId) {
        tracing::error!(
            %partition, %leader,
            "the metadata names another leader, and this broker is standalone: set metadata.etcd"
        );
    }

    fn subscribe(&self, _: PartitionId, _: LeaderEpoch, _: LogPosition, _: ReplicaProgress) {}

    fn retry_later(&self, _: PartitionId) {}

    fn unsubscribe(&self, _: PartitionId, _: LeaderEpoch, _: bool) {}
}

impl IsrUpdater for StandaloneContext {
    fn propose(&self, partition: PartitionId, proposal: IsrProposal) {
        tracing::error!(
            %partition, ?proposal,
            "the metadata names other replicas, and this broker is standalone: set metadata.etcd"
        );
    }

    fn read_back(&self, _: PartitionId) {}

    fn resign(&self, _: PartitionId, _: LeaderEpoch) {}
}
