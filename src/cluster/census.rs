//! Counts of the cluster: what each broker carries, and how many partitions are not as they should be; all of it for who describes it
//! ([`Census`]), and one broker's part for its figures ([`Duty`]). Pure.

use std::collections::BTreeMap;

use super::{partition_value::PartitionValue, view::ViewState};
use crate::model::{BrokerId, ConfigMap, TopicConfig, TopicId, TopicName};

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
    /// Names of those that no live broker leads or that have fewer in sync than the minimum: `acks=all` fails there. The first twenty.
    pub unavailable: Vec<(TopicName, u32)>,
}

/// How many partitions in trouble are named.
const MOST_NAMED: usize = 20;

impl Census {
    /// Counts a view. `defaults` are what topics have that set nothing else.
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

/// What one broker answers for. The sum over all of them is the cluster's: a partition is counted by who leads it, and what nobody
/// leads, or is moved, by the controller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Duty {
    /// Partitions that it leads.
    pub led: u64,
    /// Of these, those of which a replica that is to stay is not in sync.
    pub under_replicated: u64,
    /// Of these, those with fewer in sync than `min.insync.replicas`.
    pub below_minimum: u64,
    /// Of these, those with eligible leaders that are not in sync.
    pub at_risk: u64,
    /// Partitions that no live broker leads. Only of the controller.
    pub leaderless: u64,
    /// Partitions whose replicas are being moved. Only of the controller.
    pub moving: u64,
}

impl Duty {
    /// Counts what `me` answers for in a view: one pass over its partitions. `minimum` is asked once for each topic of which it leads
    /// something.
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

/// Whether one is missing that is to stay.
fn is_under_replicated(value: &PartitionValue) -> bool {
    value.replicas.iter().any(|id| !value.isr.contains(id) && !value.removing.contains(id))
}
