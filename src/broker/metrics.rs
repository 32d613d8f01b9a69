//! Metrics: counters are updated where the events happen, and gauges are read for each scrape.
//!
//! A scrape costs one pass over the partitions of the metadata cache, and one over the partitions that are open here. Without scrapes there
//! is no cost.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::Broker;
use crate::{
    cluster::{Duty, ViewState},
    model::BrokerId,
    partition::Partition,
    task::clock,
};

impl Broker {
    /// Updates the gauges. Only one call may run at a time, because per-broker gauges are set for some brokers and then removed for the
    /// rest.
    pub fn observe(&self) {
        let open = self.hosted.open();
        let status = self.log.status();
        let metrics = &self.metrics;
        metrics.partitions.set(open.len() as u64);
        metrics.partitions_failed.set(open.iter().filter(|partition| partition.fault().is_some()).count() as u64);
        metrics.tier_lag_records.set(open.iter().map(|partition| self.tier_lag(partition)).sum());
        metrics.disk_used_bytes.set(open.iter().map(|partition| partition.local_bytes()).sum());
        metrics.tiered_bytes.set(open.iter().map(|partition| partition.tiered_bytes()).sum());
        metrics.future_segments.set(open.iter().map(|partition| partition.future_segments()).sum());
        metrics.disk_free_bytes.set(status.free_bytes);
        metrics.tail_memory_bytes.set(status.tail_bytes as u64);
        metrics.producer_state_bytes.set(status.producer_bytes as u64);
        let (requests, responses) = self.budgets.taken();
        metrics.request_memory_bytes.set(requests as u64);
        metrics.response_memory_bytes.set(responses as u64);
        metrics.produce_memory_bytes.set(self.produce_memory.taken() as u64);
        let state = self.view.state();
        self.observe_duty(&state);
        self.observe_followers(&state, &open);
        metrics.metadata_regressed.set(self.store.regression().is_some().into());
        metrics.metadata_revision.set(state.revision().0);
        metrics.metadata_silence_seconds.set(self.view.silence().as_secs_f64());
        let lease_left = self.session.get().map_or(Duration::ZERO, |session| session.lease_left());
        metrics.lease_left_seconds.set(lease_left.as_secs_f64());
    }

    /// Updates the gauges of the partitions that this broker reports.
    fn observe_duty(&self, state: &ViewState) {
        let minimum = |topic| {
            let config = state.name(topic).and_then(|name| self.hosted.topic(name)).map(|topic| topic.config);
            config.map_or(1, |config| config.min_insync_replicas)
        };
        let duty = Duty::of(state, self.settings.id, self.is_controller(), minimum);
        let metrics = &self.metrics;
        metrics.partitions_led.set(duty.led);
        metrics.partitions_under_replicated.set(duty.under_replicated);
        metrics.partitions_below_minimum.set(duty.below_minimum);
        metrics.partitions_at_risk.set(duty.at_risk);
        metrics.partitions_leaderless.set(duty.leaderless);
        metrics.partitions_moving.set(duty.moving);
    }

    /// Updates the lag of each broker behind the partitions led here: the records of all partitions, and the longest time.
    fn observe_followers(&self, state: &ViewState, open: &[Arc<Partition>]) {
        let now = clock::monotonic();
        let mut lags: BTreeMap<BrokerId, (u64, Duration)> = BTreeMap::new();
        for partition in open {
            let known = state.partition(partition.id()).and_then(|entry| entry.partition.as_ref());
            let Some(known) = known.filter(|known| known.value.leader == Some(self.settings.id)) else { continue };
            partition.lags(&known.value.replicas, now, |id, lag| {
                if id != self.settings.id {
                    let (records, time) = lags.entry(id).or_default();
                    *records += lag.records;
                    *time = lag.time.max(*time);
                }
            });
        }
        self.metrics.follower_lag_records.set_all(lags.iter().map(|(id, (records, _))| (id.0, *records)));
        self.metrics.follower_lag_seconds.set_all(lags.iter().map(|(id, (_, time))| (id.0, *time)));
    }
}
