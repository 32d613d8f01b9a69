//! Gauges of a broker, which are computed for each scrape of `/metrics`. Counters are updated where their events
//! happen.
//!
//! A scrape costs one pass over the partitions of the metadata cache, and a few over the partitions that are open here.
//! Without scrapes there is no cost.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    broker::{
        budget::{Budgets, Pools},
        node_context::NodeContext,
        partitions::table::PartitionTable,
    },
    cluster::{LeaderStats, MetadataSnapshot, Session},
    model::BrokerId,
    partition::Partition,
    task::clock,
};

/// Gauges of one broker.
pub(super) struct BrokerGauges {
    ctx: NodeContext,
    partitions: Arc<PartitionTable>,
    session: Session,
    budgets: Budgets,
    produce_memory: Pools,
}

impl BrokerGauges {
    pub(super) fn new(
        ctx: NodeContext,
        partitions: Arc<PartitionTable>,
        session: Session,
        budgets: Budgets,
        produce_memory: Pools,
    ) -> Self {
        Self { ctx, partitions, session, budgets, produce_memory }
    }

    /// Updates the gauges. Only one call may run at a time: each call removes the lag gauges of all followers' brokers
    /// and sets them again.
    pub(super) fn observe(&self) {
        let open = self.partitions.open();
        let status = self.ctx.log.status();
        let metrics = &self.ctx.metrics;
        metrics.partitions.set(open.len() as u64);
        metrics.partitions_failed.set(open.iter().filter(|partition| partition.error().is_some()).count() as u64);
        metrics.tier_lag_records.set(open.iter().map(|partition| self.ctx.tier_lag(partition)).sum());
        metrics.disk_used_bytes.set(open.iter().map(|partition| partition.local_bytes()).sum());
        metrics.tiered_bytes.set(open.iter().map(|partition| partition.tiered_bytes()).sum());
        metrics.future_segments.set(open.iter().map(|partition| partition.future_segments()).sum());
        metrics.disk_free_bytes.set(status.free_bytes);
        metrics.tail_cache_bytes.set(status.tail_bytes as u64);
        metrics.producer_state_bytes.set(status.producer_bytes as u64);
        let (requests, responses) = self.budgets.taken();
        metrics.request_memory_bytes.set(requests as u64);
        metrics.response_memory_bytes.set(responses as u64);
        metrics.produce_memory_bytes.set(self.produce_memory.taken() as u64);
        let state = self.ctx.metadata.state();
        self.observe_leadership(&state);
        self.observe_followers(&state, &open);
        metrics.metadata_regressed.set(self.ctx.store.regression().is_some().into());
        metrics.metadata_revision.set(state.revision().0);
        metrics.metadata_staleness_seconds.set(self.ctx.metadata.staleness().as_secs_f64());
        metrics.lease_remaining_seconds.set(self.session.lease_remaining().as_secs_f64());
    }

    /// Updates the gauges of the partitions that this broker leads according to the metadata. The gauges of leaderless
    /// partitions and of reassignments count those of the cluster on the controller, and are 0 on other brokers.
    fn observe_leadership(&self, state: &MetadataSnapshot) {
        let min_isr = |topic| {
            let config = state.name(topic).and_then(|name| self.partitions.topic(name)).map(|topic| topic.config);
            config.map_or(1, |config| config.min_insync_replicas)
        };
        let stats = LeaderStats::of(state, self.ctx.id, self.ctx.is_controller(), min_isr);
        let metrics = &self.ctx.metrics;
        metrics.partitions_led.set(stats.led);
        metrics.partitions_under_replicated.set(stats.under_replicated);
        metrics.partitions_under_min_isr.set(stats.under_min_isr);
        metrics.partitions_with_elr.set(stats.with_elr);
        metrics.partitions_leaderless.set(stats.leaderless);
        metrics.partitions_reassigning.set(stats.reassigning);
    }

    /// Updates the lag of each follower's broker over the partitions that this broker leads. The values are the sum of
    /// the lags in records, and the longest lag in time.
    fn observe_followers(&self, state: &MetadataSnapshot, open: &[Arc<Partition>]) {
        let now = clock::monotonic();
        let mut lags: BTreeMap<BrokerId, (u64, Duration)> = BTreeMap::new();
        for partition in open {
            let stored = state.partition(partition.id()).and_then(|entry| entry.partition.as_ref());
            let Some(stored) = stored.filter(|stored| stored.value.leader == Some(self.ctx.id)) else { continue };
            partition.for_each_lag(&stored.value.replicas, now, |id, lag| {
                if id != self.ctx.id {
                    let (records, time) = lags.entry(id).or_default();
                    *records += lag.records;
                    *time = lag.time.max(*time);
                }
            });
        }
        self.ctx.metrics.follower_lag_records.set_all(lags.iter().map(|(id, (records, _))| (id.0, *records)));
        self.ctx.metrics.follower_lag_seconds.set_all(lags.iter().map(|(id, (_, time))| (id.0, *time)));
    }
}
