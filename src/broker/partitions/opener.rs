//! Opens the replicas that the metadata assigns to this broker. The reconciler decides which replicas are opened, and
//! when.

use std::sync::Arc;

use futures::{StreamExt as _, stream};

use super::table::{HostedPartition, OfflineReplica, PartitionTable};
use crate::{
    broker::node_context::NodeContext,
    cluster::{MetadataSnapshot, PartitionValue},
    model::{LeaderEpoch, PartitionId, TopicName},
    partition::{MaintenanceQueue, Partition, PartitionContext, PartitionError, ReplicaSpec},
    task,
    tier::PartitionTier,
};

/// Maximum number of partitions that one blocking task opens in sequence. One blocking task per partition would start
/// dozens of threads, which are not faster and whose memory is not returned.
const MAX_OPENED_PER_BATCH: usize = 64;

/// Maximum number of such blocking tasks at a time. Opening a partition may recover the tail of its log.
const MAX_CONCURRENT_OPENS: usize = 4;

/// Opens replicas, and sets their entries in the partition table.
pub(super) struct PartitionOpener {
    pub(super) ctx: NodeContext,
    pub(super) partitions: Arc<PartitionTable>,
    /// Interfaces and counters of the broker that every opened partition gets: replication links, ISR updates.
    pub(super) partition_ctx: PartitionContext,
    pub(super) queue: MaintenanceQueue,
}

impl PartitionOpener {
    /// Returns the parameters for opening a replica. Returns `None` if its topic is not in `state` or not hosted.
    /// Returns `None` also if the replica has no files and the broker of a cluster is not activated yet. `replica` is
    /// its entry in the partition table, and `value` the partition value in `state`.
    ///
    /// A broker of a cluster sets `ReplicaSpec::discard_local` in these cases, and a standalone broker never:
    ///
    /// | replica | condition |
    /// | --- | --- |
    /// | without files | always |
    /// | failed to open | another broker leads now, and this broker is in neither ISR nor ELR |
    /// | failed to open | an operator has elected this replica after the first failure, in order to discard it |
    pub(super) fn spec(
        &self,
        id: PartitionId,
        state: &MetadataSnapshot,
        value: &PartitionValue,
        replica: &HostedPartition,
        is_on_disk: bool,
        is_active: bool,
    ) -> Option<ReplicaSpec> {
        let (standalone, me) = (self.ctx.standalone, self.ctx.id);
        if !is_on_disk && !standalone && !is_active {
            // A starting broker opens replicas in order to verify them. A replica without files is created after the
            // activation.
            return None;
        }
        let is_member = value.isr.contains(&me) || value.elr.contains(&me);
        let failed_since = match replica {
            HostedPartition::Offline(OfflineReplica::OpenFailed { since, .. }) => Some(*since),
            _ => None,
        };
        let discard_local = !is_on_disk
            || failed_since.is_some_and(|since| match value.leader {
                // The operator elected this replica after it was found unusable, with the request to discard it.
                Some(leader) if leader == me => {
                    value.isr == [me] && value.discard_local && value.unclean_epoch.is_some_and(|epoch| epoch > since)
                }
                Some(_) => !is_member,
                // There is no leader to copy from, so the files of the failed replica stay.
                None => false,
            });
        let discard_local = discard_local && !standalone;
        let name = state.name(id.topic)?;
        let committed = state.partition(id)?.tier.as_ref().map(|stored| stored.value.clone());
        let tier = self.ctx.tier.as_ref().map(|tier| {
            let state = committed.clone().unwrap_or_default();
            PartitionTier::new(tier.store.clone(), tier.cache.clone(), id, state)
        });
        let config = self.partitions.topic(name)?.config;
        let max_lag_time = self.ctx.config.replication.max_lag_time;
        Some(ReplicaSpec { id, topic: name.clone(), config, committed, tier, standalone, discard_local, max_lag_time })
    }

    /// Opens replicas, and sets the entry of each in the partition table: online, or offline with the error.
    pub(super) async fn open_all(&self, specs: Vec<ReplicaSpec>) {
        let opened =
            stream::iter(chunks(specs)).map(|specs| self.open_batch(specs)).buffer_unordered(MAX_CONCURRENT_OPENS);
        opened
            .for_each(|results| {
                for (id, topic, opened) in results {
                    let replica = match opened {
                        Ok(partition) => HostedPartition::Online(partition),
                        Err(error) => self.offline_entry(id, &topic, &error),
                    };
                    self.partitions.set(id, replica);
                }
                std::future::ready(())
            })
            .await;
    }

    /// Returns the leader epoch of a partition in the metadata cache; zero if the partition has no readable value.
    fn leader_epoch(&self, id: PartitionId) -> LeaderEpoch {
        let state = self.ctx.metadata.state();
        let stored = state.entry(id).and_then(|entry| entry.partition.as_ref());
        stored.map(|stored| stored.value.leader_epoch).unwrap_or_default()
    }

    /// Logs that a replica could not be opened, and returns its entry for the partition table. An error equal to the
    /// previous one is not logged again, because every metadata change retries the open. The entry keeps the leader
    /// epoch of the first failure.
    fn offline_entry(&self, id: PartitionId, topic: &TopicName, error: &PartitionError) -> HostedPartition {
        let reason: Arc<str> = error.to_string().into();
        let earlier = self.partitions.get(id).and_then(|replica| match &*replica {
            HostedPartition::Offline(OfflineReplica::OpenFailed { reason, since }) => {
                Some((Arc::clone(reason), *since))
            }
            _ => None,
        });
        let since = earlier.as_ref().map_or_else(|| self.leader_epoch(id), |(_, since)| *since);
        match error {
            _ if earlier.is_some_and(|(logged, _)| logged == reason) => {}
            PartitionError::Lost { .. } => tracing::warn!(
                partition = %id, %topic, %error,
                "the replica lacks committed records and is offline: it is copied again once another replica leads"
            ),
            _ => tracing::error!(
                partition = %id, %topic, %error,
                "could not open the partition on this broker, which does not serve it: remove the cause in \"error\", \
                 then restart the broker"
            ),
        }
        HostedPartition::Offline(OfflineReplica::OpenFailed { reason, since })
    }

    /// Opens replicas in sequence, as one blocking task. Queues opened partitions for maintenance.
    async fn open_batch(
        &self,
        specs: Vec<ReplicaSpec>,
    ) -> Vec<(PartitionId, TopicName, Result<Arc<Partition>, PartitionError>)> {
        let (log, queue, tasks) = (self.ctx.log.clone(), self.queue.clone(), self.partitions.tasks().clone());
        let (broker, ctx) = (self.ctx.id, self.partition_ctx.clone());
        let open = move |spec: ReplicaSpec| {
            let (id, topic) = (spec.id, spec.topic.clone());
            let opened = Partition::open(broker, &log, spec, ctx.clone(), &queue, &tasks);
            if opened.is_ok() {
                queue.push(id);
            }
            (id, topic, opened)
        };
        task::run_blocking(move || specs.into_iter().map(open).collect()).await
    }
}

/// Splits replicas into chunks for `open_batch`. Each chunk has its own allocation. If chunks were split off one
/// vector, each would keep the capacity for all later replicas, which is quadratic in total.
fn chunks<T>(replicas: Vec<T>) -> impl Iterator<Item = Vec<T>> {
    let mut remaining = replicas.into_iter();
    std::iter::from_fn(move || {
        let chunk: Vec<T> = remaining.by_ref().take(MAX_OPENED_PER_BATCH).collect();
        (!chunk.is_empty()).then_some(chunk)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replica_chunks_keep_no_excess_capacity() {
        let chunks: Vec<Vec<u64>> = chunks((0..10_000).collect()).collect();
        assert!(chunks.iter().flatten().copied().eq(0..10_000), "all replicas, in order");
        let capacity: usize = chunks.iter().map(Vec::capacity).sum();
        assert!(capacity <= 2 * 10_000, "capacity for {capacity} of 10,000 numbers");
    }
}
