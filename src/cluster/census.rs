//! Counts of the cluster: the load of each broker and the number of partitions that need attention. [`Census`] covers
//! the cluster, [`Duty`] the share that one broker reports. Pure.

use std::collections::BTreeMap;

use super::{partition_value::PartitionValue, view::ViewState};
use crate::model::{BrokerId, ConfigMap, TopicConfig, TopicId, TopicName};

/// Load of one broker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Number of partitions that the broker leads.
    pub leaders: u32,
    /// Number of partitions that the broker holds.
    pub replicas: u32,
    /// Number of partitions that the broker holds in sync.
    pub in_sync: u32,
}

/// Counts over the whole cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Brokers that are live, hold replicas or are to be drained.
    pub brokers: BTreeMap<BrokerId, Carried>,
    /// Number of topics.
    pub topics: u32,
    /// Number of partitions.
    pub partitions: u32,
    /// Number of partitions without a live leader.
    pub leaderless: u32,
    /// Number of partitions whose ISR lacks a replica that is not being removed.
    pub under_replicated: u32,
    /// Number of partitions with an ISR below `min.insync.replicas`.
    pub below_minimum: u32,
    /// Number of partitions under reassignment.
    pub moving: u32,
    /// Topic and number of the first twenty partitions without a live leader or below the min ISR: `acks=all` fails
    /// there.
    pub unavailable: Vec<(TopicName, u32)>,
}

/// Maximum number of unavailable partitions that are listed.
const MOST_NAMED: usize = 20;

impl Census {
    /// Counts a metadata snapshot. `defaults` are the topic configuration of the cluster.
    pub fn of(state: &ViewState, defaults: &ConfigMap) -> Self {
        let mut census = Self::default();
        for id in state.brokers().keys().chain(state.drains().keys()) {
            census.brokers.entry(*id).or_default();
        }
        for (name, topic) in state.topics() {
            let config = TopicConfig::resolve(defaults, &topic.value.config);
            let minimum = config.map_or(1, |config| config.min_insync_replicas);
            census.topics += 1;
            for (number, entry) in state.partitions_of(&topic.value) {
                census.partitions += 1;
                let Some(known) = &entry.partition else {
                    census.leaderless += 1;
                    census.name(name, number);
                    continue;
                };
                let value = &known.value;
                for id in &value.replicas {
                    let carried = census.brokers.entry(*id).or_default();
                    carried.replicas += 1;
                    carried.leaders += u32::from(value.leader == Some(*id));
                    carried.in_sync += u32::from(value.isr.contains(id));
                }
                let (is_led, is_below) = (is_led(state, value), value.isr.len() < minimum);
                census.leaderless += u32::from(!is_led);
                census.under_replicated += u32::from(is_under_replicated(value));
                census.below_minimum += u32::from(is_below);
                if !is_led || is_below {
                    census.name(name, number);
                }
                census.moving += u32::from(value.is_moving());
            }
        }
        census
    }

    fn name(&mut self, topic: &TopicName, number: u32) {
        if self.unavailable.len() < MOST_NAMED {
            self.unavailable.push((topic.clone(), number));
        }
    }
}

/// Metrics that one broker reports. Their sum over all brokers covers the cluster: the leader counts a partition, and
/// the controller counts leaderless partitions and reassignments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Duty {
    /// Number of partitions that the broker leads.
    pub led: u64,
    /// Number of led partitions whose ISR lacks a replica that is not being removed.
    pub under_replicated: u64,
    /// Number of led partitions with an ISR below `min.insync.replicas`.
    pub below_minimum: u64,
    /// Number of led partitions with a non-empty ELR.
    pub at_risk: u64,
    /// Number of partitions without a live leader. Counted by the controller only.
    pub leaderless: u64,
    /// Number of partitions under reassignment. Counted by the controller only.
    pub moving: u64,
}

impl Duty {
    /// Counts the partitions of `me` in one pass over a metadata snapshot. `minimum` is called once for each topic of
    /// which `me` leads a partition.
    pub fn of(state: &ViewState, me: BrokerId, is_controller: bool, minimum: impl Fn(TopicId) -> usize) -> Self {
        let mut duty = Self::default();
        for topic in state.topics().values() {
            let mut asked = None;
            for (_, entry) in state.partitions_of(&topic.value) {
                let Some(known) = &entry.partition else {
                    duty.leaderless += u64::from(is_controller);
                    continue;
                };
                let value = &known.value;
                if is_controller {
                    duty.leaderless += u64::from(!is_led(state, value));
                    duty.moving += u64::from(value.is_moving());
                }
                if value.leader == Some(me) {
                    let minimum = *asked.get_or_insert_with(|| minimum(topic.value.id));
                    duty.led += 1;
                    duty.under_replicated += u64::from(is_under_replicated(value));
                    duty.below_minimum += u64::from(value.isr.len() < minimum);
                    duty.at_risk += u64::from(!value.elr.is_empty());
                }
            }
        }
        duty
    }
}

fn is_led(state: &ViewState, value: &PartitionValue) -> bool {
    value.leader.is_some_and(|leader| state.brokers().contains_key(&leader))
}

/// Returns true if a replica that is not being removed is out of sync.
fn is_under_replicated(value: &PartitionValue) -> bool {
    value.replicas.iter().any(|id| !value.isr.contains(id) && !value.removing.contains(id))
}
