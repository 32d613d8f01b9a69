//! A count of the cluster: what each broker carries, and how many partitions are not as they should be. Pure.

use std::collections::BTreeMap;

use super::view::ViewState;
use crate::model::{BrokerId, ConfigMap, TopicConfig};

/// What one broker carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Partitions that it leads.
    pub leaders: u32,
    /// Partitions that it holds.
    pub replicas: u32,
    /// Of these, those that it is in sync with.
    pub in_sync: u32,
}

/// The cluster in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Brokers that are alive, that hold replicas, or that are to be drained.
    pub brokers: BTreeMap<BrokerId, Carried>,
    /// Topics.
    pub topics: u32,
    /// Partitions of them.
    pub partitions: u32,
    /// Partitions that no live broker leads.
    pub leaderless: u32,
    /// Partitions with fewer in sync than replicas that are to stay.
    pub under_replicated: u32,
    /// Partitions with fewer in sync than `min.insync.replicas`.
    pub below_minimum: u32,
    /// Partitions whose replicas are being moved.
    pub moving: u32,
}

impl Census {
    /// Counts a view. `defaults` are what topics have that set nothing else.
    pub fn of(state: &ViewState, defaults: &ConfigMap) -> Self {
        let mut census = Self::default();
        for id in state.brokers().keys().chain(state.drains().keys()) {
            census.brokers.entry(*id).or_default();
        }
        for topic in state.topics().values() {
            let config = TopicConfig::resolve(defaults, &topic.value.config);
            let minimum = config.map_or(1, |config| config.min_insync_replicas);
            census.topics += 1;
            for (_, entry) in state.partitions_of(&topic.value) {
                census.partitions += 1;
                let Some(known) = entry.partition else {
                    census.leaderless += 1;
                    continue;
                };
                let value = &known.value;
                for id in &value.replicas {
                    let carried = census.brokers.entry(*id).or_default();
                    carried.replicas += 1;
                    carried.leaders += u32::from(value.leader == Some(*id));
                    carried.in_sync += u32::from(value.isr.contains(id));
                }
                let led = value.leader.is_some_and(|leader| state.brokers().contains_key(&leader));
                let missing = |id: &BrokerId| !value.isr.contains(id) && !value.removing.contains(id);
                census.leaderless += u32::from(!led);
                census.under_replicated += u32::from(value.replicas.iter().any(missing));
                census.below_minimum += u32::from(value.isr.len() < minimum);
                census.moving += u32::from(value.is_moving());
            }
        }
        census
    }
}
