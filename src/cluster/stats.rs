//! Counts of the cluster: the load of each broker and the number of partitions that need attention. [`ClusterStats`]
//! covers the cluster, [`LeaderStats`] the share that one broker reports. Pure.

use std::collections::BTreeMap;

use super::{metadata::MetadataSnapshot, partition_value::PartitionValue};
use crate::model::{BrokerId, ConfigMap, TopicConfig, TopicId, TopicName};

/// Load of one broker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplicaCounts {
    /// Number of partitions whose value names the broker as leader, live or not.
    pub leaders: u32,
    /// Number of partitions whose replica list contains the broker.
    pub replicas: u32,
    /// Number of these partitions whose ISR contains the broker.
    pub in_sync: u32,
}

/// Counts over the whole cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterStats {
    /// Brokers that are live, hold replicas or are to be drained.
    pub brokers: BTreeMap<BrokerId, ReplicaCounts>,
    pub topics: u32,
    pub partitions: u32,
    /// Number of partitions without a live leader or a readable value.
    pub leaderless: u32,
    /// Number of partitions whose ISR lacks a replica that is not being removed.
    pub under_replicated: u32,
    /// Number of partitions with an ISR below `min.insync.replicas`.
    pub under_min_isr: u32,
    /// Number of partitions under reassignment.
    pub reassigning: u32,
    /// Topic and number of the first partitions that have no live leader, no readable value or an ISR below the min
    /// ISR, at most `MAX_UNAVAILABLE_LISTED`. A write with `acks=all` to such a partition fails.
    pub unavailable: Vec<(TopicName, u32)>,
}

/// Maximum length of [`ClusterStats::unavailable`].
const MAX_UNAVAILABLE_LISTED: usize = 20;

impl ClusterStats {
    /// Counts the brokers, topics and partitions of a metadata snapshot. A partition whose value is missing or
    /// unreadable counts as leaderless and unavailable, and in no other count of partitions that need attention.
    /// `defaults` are the topic configuration of the cluster.
    pub fn of(state: &MetadataSnapshot, defaults: &ConfigMap) -> Self {
        let mut stats = Self::default();
        for id in state.brokers().keys().chain(state.drains().keys()) {
            stats.brokers.entry(*id).or_default();
        }
        for (name, topic) in state.topics() {
            let config = TopicConfig::resolve(defaults, &topic.value.config);
            // For a topic whose configuration is invalid, a min ISR of 1 is assumed.
            let min_isr = config.map_or(1, |config| config.min_insync_replicas);
            stats.topics += 1;
            for (number, entry) in state.partitions_of(&topic.value) {
                stats.partitions += 1;
                let Some(partition) = &entry.partition else {
                    stats.leaderless += 1;
                    stats.add_unavailable(name, number);
                    continue;
                };
                let value = &partition.value;
                for id in &value.replicas {
                    let counts = stats.brokers.entry(*id).or_default();
                    counts.replicas += 1;
                    counts.leaders += u32::from(value.leader == Some(*id));
                    counts.in_sync += u32::from(value.isr.contains(id));
                }
                let (is_led, is_under_min_isr) = (is_led(state, value), value.isr.len() < min_isr);
                stats.leaderless += u32::from(!is_led);
                stats.under_replicated += u32::from(is_under_replicated(value));
                stats.under_min_isr += u32::from(is_under_min_isr);
                if !is_led || is_under_min_isr {
                    stats.add_unavailable(name, number);
                }
                stats.reassigning += u32::from(value.is_reassigning());
            }
        }
        stats
    }

    /// Adds a partition to the list of unavailable partitions, unless the list is full.
    fn add_unavailable(&mut self, topic: &TopicName, number: u32) {
        if self.unavailable.len() < MAX_UNAVAILABLE_LISTED {
            self.unavailable.push((topic.clone(), number));
        }
    }
}

/// Counts that one broker reports as metrics. Each field counts a partition at most once over all brokers: the leader
/// counts it, and the controller counts leaderless partitions and reassignments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaderStats {
    /// Number of partitions that the broker leads.
    pub led: u64,
    /// Number of led partitions whose ISR lacks a replica that is not being removed.
    pub under_replicated: u64,
    /// Number of led partitions with an ISR below `min.insync.replicas`.
    pub under_min_isr: u64,
    /// Number of led partitions with a non-empty ELR.
    pub with_elr: u64,
    /// Number of partitions without a live leader or a readable value. Counted by the controller only.
    pub leaderless: u64,
    /// Number of partitions under reassignment. Counted by the controller only.
    pub reassigning: u64,
}

impl LeaderStats {
    /// Counts the partitions that `me` leads. On the controller, also counts the leaderless partitions and the
    /// reassignments of the whole cluster. `min_isr` is called once for each topic of which `me` leads a partition.
    pub fn of(state: &MetadataSnapshot, me: BrokerId, is_controller: bool, min_isr: impl Fn(TopicId) -> usize) -> Self {
        let mut stats = Self::default();
        for topic in state.topics().values() {
            let mut cached_min_isr = None;
            for (_, entry) in state.partitions_of(&topic.value) {
                let Some(partition) = &entry.partition else {
                    stats.leaderless += u64::from(is_controller);
                    continue;
                };
                let value = &partition.value;
                if is_controller {
                    stats.leaderless += u64::from(!is_led(state, value));
                    stats.reassigning += u64::from(value.is_reassigning());
                }
                if value.leader == Some(me) {
                    let min_isr = *cached_min_isr.get_or_insert_with(|| min_isr(topic.value.id));
                    stats.led += 1;
                    stats.under_replicated += u64::from(is_under_replicated(value));
                    stats.under_min_isr += u64::from(value.isr.len() < min_isr);
                    stats.with_elr += u64::from(!value.elr.is_empty());
                }
            }
        }
        stats
    }
}

/// Returns true if the partition has a leader and this leader is live.
fn is_led(state: &MetadataSnapshot, value: &PartitionValue) -> bool {
    value.leader.is_some_and(|leader| state.brokers().contains_key(&leader))
}

/// Returns true if the ISR lacks a replica that is not being removed.
fn is_under_replicated(value: &PartitionValue) -> bool {
    value.replicas.iter().any(|id| !value.isr.contains(id) && !value.removing.contains(id))
}
