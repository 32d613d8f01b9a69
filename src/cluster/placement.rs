//! Chooses the brokers of a partition: a pure function of the live brokers and their load.
//!
//! # Overview
//!
//! The first replica is the preferred leader. It goes to the broker that is the preferred leader of the fewest
//! partitions, since leading is most of the work. The other replicas spread over racks first, then over the least
//! loaded brokers, at most one per broker. A hash of partition and broker breaks ties, so the other replicas of the
//! partitions of one preferred leader spread over all other brokers.
//!
//! Topic creation places new partitions with [`Placement::place`]. The controller replaces and adds replicas with
//! [`Placement::replace`], and the status of a drain uses the same function. Replacements for offline new replicas of a
//! reassignment come from [`Placement::choose_up_to`], which takes the replicas that stay. All three functions skip a
//! broker at its replica limit (`broker.max_replicas`).

use std::collections::BTreeMap;

use crate::{
    cluster::{
        keys::{BrokerState, BrokerValue},
        metadata::MetadataSnapshot,
        partition_value::PartitionValue,
    },
    model::{BrokerId, PartitionId},
};

/// Load of one broker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BrokerLoad {
    /// Number of partitions with the broker as preferred leader.
    pub leaders: usize,
    pub replicas: usize,
}

/// Error: a broker would exceed its replica limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "broker {broker} would hold {replicas} replicas, and its limit is {max} (broker.max_replicas): request fewer, add \
     brokers, or raise the setting there"
)]
pub struct ReplicaLimitExceeded {
    pub broker: BrokerId,
    /// Number of replicas that the broker would hold.
    pub replicas: usize,
    /// Maximum number of replicas that the broker accepts.
    pub max: usize,
}

/// Error: a placement cannot choose brokers for all replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlacementError {
    /// There are fewer eligible brokers than replicas of a partition.
    TooFewBrokers,
    /// There are enough brokers, but a broker would exceed its replica limit.
    LimitExceeded(ReplicaLimitExceeded),
}

/// A live broker that replicas may be placed on.
#[derive(Clone, Debug)]
struct Candidate {
    /// Rack of the broker. A broker without a rack shares a rack with no other broker.
    rack: Option<String>,
    load: BrokerLoad,
    /// True if the broker's state allows more replicas: it is not stopping, drained, under disk pressure or
    /// unreachable.
    accepts_replicas: bool,
    /// Maximum number of replicas; `usize::MAX` means no limit.
    max: usize,
}

impl Candidate {
    /// Returns true if the broker's state allows more replicas and the broker is below its replica limit.
    const fn has_capacity(&self) -> bool {
        self.accepts_replicas && self.load.replicas < self.max
    }
}

/// The live brokers with their load, which grows as partitions are placed.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    brokers: BTreeMap<BrokerId, Candidate>,
}

impl Placement {
    /// Returns a placement without brokers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the live brokers of a metadata snapshot, with the load of its partitions. Brokers get no new replicas
    /// while they are stopping, drained, under disk pressure or unreachable for other brokers. All other live brokers
    /// get new replicas up to their limit.
    pub fn of(state: &MetadataSnapshot) -> Self {
        let mut placement = Self::new();
        for (id, broker) in state.brokers() {
            placement.add(*id, broker.value.rack.clone(), BrokerLoad::default());
            if let Some(max) = broker.value.max_replicas {
                placement.limit_replicas(*id, usize::try_from(max).unwrap_or(usize::MAX));
            }
            if is_leaving(state, *id, &broker.value)
                || broker.value.disk_pressure
                || is_unreachable(state, &broker.value)
            {
                placement.exclude(*id);
            }
        }
        for topic in state.topics().values() {
            for (_, entry) in state.partitions_of(&topic.value) {
                if let Some(partition) = &entry.partition {
                    placement.add_partition(&partition.value.replicas);
                }
            }
        }
        placement
    }

    /// Adds a live broker without a limit of replicas.
    pub fn add(&mut self, id: BrokerId, rack: Option<String>, load: BrokerLoad) {
        self.brokers.insert(id, Candidate { rack, load, accepts_replicas: true, max: usize::MAX });
    }

    /// Sets the maximum number of replicas of a broker.
    pub fn limit_replicas(&mut self, id: BrokerId, max: usize) {
        if let Some(candidate) = self.brokers.get_mut(&id) {
            candidate.max = max;
        }
    }

    /// Excludes a broker from further placement. Its present load still counts.
    pub fn exclude(&mut self, id: BrokerId) {
        if let Some(candidate) = self.brokers.get_mut(&id) {
            candidate.accepts_replicas = false;
        }
    }

    /// Returns the brokers whose state allows more replicas, with their load; brokers at their replica limit are
    /// included.
    pub fn accepting_brokers(&self) -> impl Iterator<Item = (BrokerId, BrokerLoad)> + '_ {
        self.brokers
            .iter()
            .filter(|(_, candidate)| candidate.accepts_replicas)
            .map(|(id, candidate)| (*id, candidate.load))
    }

    /// Returns true if the broker's state allows more replicas and the broker is below its replica limit.
    pub fn has_capacity(&self, id: BrokerId) -> bool {
        self.brokers.get(&id).is_some_and(Candidate::has_capacity)
    }

    /// Returns true if the broker is live and below its replica limit. Unlike [`Self::has_capacity`], this ignores the
    /// broker's state: a reassignment that an operator requested may use a broker under disk pressure, for example.
    pub fn is_below_limit(&self, id: BrokerId) -> bool {
        self.brokers.get(&id).is_some_and(|candidate| candidate.load.replicas < candidate.max)
    }

    /// Runs `place_replicas`, which returns `None` if it cannot place all replicas. After a failure, runs it again on a
    /// copy without replica limits. If the second run succeeds, the error names the broker that would exceed its limit
    /// most. After an error, `self` may contain some of the replicas.
    pub fn place_within_limits<T>(
        &mut self,
        place_replicas: impl Fn(&mut Self) -> Option<T>,
    ) -> Result<T, PlacementError> {
        let mut unlimited = self.clone();
        if let Some(placed) = place_replicas(self) {
            return Ok(placed);
        }
        let bounds: BTreeMap<BrokerId, usize> = unlimited
            .brokers
            .iter_mut()
            .map(|(id, candidate)| (*id, std::mem::replace(&mut candidate.max, usize::MAX)))
            .collect();
        if place_replicas(&mut unlimited).is_none() {
            return Err(PlacementError::TooFewBrokers);
        }
        let counts = unlimited.brokers.iter().map(|(id, candidate)| ReplicaLimitExceeded {
            broker: *id,
            replicas: candidate.load.replicas,
            max: bounds[id],
        });
        let exceeded = counts.filter(|bound| bound.replicas > bound.max);
        let worst = exceeded.max_by_key(|bound| bound.replicas - bound.max);
        Err(worst.map_or(PlacementError::TooFewBrokers, PlacementError::LimitExceeded))
    }

    /// Returns the load of each broker.
    pub fn loads(&self) -> BTreeMap<BrokerId, BrokerLoad> {
        self.brokers.iter().map(|(id, candidate)| (*id, candidate.load)).collect()
    }

    /// Chooses the brokers of a new partition, the preferred leader first, and adds them to the load. Returns `None`,
    /// and adds nothing, if there are fewer brokers with capacity than replicas.
    pub fn place(&mut self, partition: PartitionId, replicas: usize) -> Option<Vec<BrokerId>> {
        let rank = |(id, candidate): &(&BrokerId, &Candidate)| {
            (candidate.load.leaders, candidate.load.replicas, hash_pair(partition, **id))
        };
        let (leader, _) = self.brokers.iter().filter(|(_, candidate)| candidate.has_capacity()).min_by_key(rank)?;
        let chosen = self.choose(partition, vec![*leader], replicas)?;
        self.add_partition(&chosen);
        Some(chosen)
    }

    /// Returns the staying replicas, in their order, and after them newly chosen ones, until there are `replicas` in
    /// total. Returns `None` if there are too few brokers. Does not change the load.
    pub fn choose(&self, partition: PartitionId, staying: Vec<BrokerId>, replicas: usize) -> Option<Vec<BrokerId>> {
        let chosen = self.choose_up_to(partition, staying, replicas);
        (chosen.len() >= replicas).then_some(chosen)
    }

    /// Like [`Self::choose`], but if there are too few brokers, returns as many replicas as possible.
    pub fn choose_up_to(&self, partition: PartitionId, staying: Vec<BrokerId>, replicas: usize) -> Vec<BrokerId> {
        let mut chosen = staying;
        let rack_of = |id: &BrokerId| self.brokers.get(id).and_then(|candidate| candidate.rack.as_deref());
        let mut racks: Vec<&str> = chosen.iter().filter_map(rack_of).collect();
        while chosen.len() < replicas {
            let replicas_in_rack = |candidate: &Candidate| {
                let rack = candidate.rack.as_deref();
                racks.iter().filter(|used| Some(**used) == rack).count()
            };
            let next = self
                .brokers
                .iter()
                .filter(|(id, candidate)| candidate.has_capacity() && !chosen.contains(id))
                .min_by_key(|(id, candidate)| {
                    let BrokerLoad { replicas, leaders } = candidate.load;
                    (replicas_in_rack(candidate), replicas, leaders, hash_pair(partition, **id))
                });
            let Some((next, candidate)) = next else { break };
            chosen.push(*next);
            racks.extend(candidate.rack.as_deref());
        }
        chosen
    }

    /// Returns the replicas of a partition after a reassignment that replaces those in `leaving`, given in the order of
    /// the replica list. As many new ones replace them as brokers permit, up to `factor` replicas in total. A
    /// reassignment in progress counts as completed. Without a new replica, none is removed. Does not change the load.
    ///
    /// Removed are offline replicas first, and among those of equal state members of the ISR or ELR last. At most as
    /// many are removed as added, plus as many as the partition has above the factor. The latter stay if too few
    /// replicas would then be in sync. A new replica takes the position of a removed one, so the preferred leader
    /// changes only if its own replica is removed.
    pub fn replace(
        &self,
        partition: PartitionId,
        value: &PartitionValue,
        leaving: &[BrokerId],
        factor: usize,
        min_insync: usize,
    ) -> Vec<BrokerId> {
        let mut replicas = value.replicas.clone();
        replicas.retain(|id| !value.removing.contains(id));
        let staying: Vec<BrokerId> = replicas.iter().copied().filter(|id| !leaving.contains(id)).collect();
        let staying_count = staying.len();
        let chosen = self.choose_up_to(partition, staying, factor);
        let new = &chosen[staying_count..];
        if new.is_empty() {
            return replicas;
        }
        let is_in_sync = |id: &BrokerId| value.isr.contains(id) || value.adding.contains(id);
        let mut removed = leaving.to_vec();
        removed.sort_by_key(|id| (self.brokers.contains_key(id), is_in_sync(id) || value.elr.contains(id)));
        let max_removed = new.len() + replicas.len().saturating_sub(factor);
        let stays = |id: &BrokerId| !removed.iter().take(max_removed).any(|removed| removed == id);
        let staying_in_sync = replicas.iter().filter(|id| is_in_sync(id) && stays(id)).count();
        let is_enough = staying_in_sync + new.len() >= min_insync.min(factor);
        removed.truncate(if is_enough { max_removed } else { new.len() });
        let mut new = new.iter().copied();
        let mut target: Vec<BrokerId> =
            replicas.into_iter().filter_map(|id| if removed.contains(&id) { new.next() } else { Some(id) }).collect();
        target.extend(new);
        target
    }

    /// Adds one replica to the load of each of these brokers, without a preferred leader. Offline brokers are ignored.
    pub fn add_replica_to_each(&mut self, brokers: &[BrokerId]) {
        brokers.iter().for_each(|id| self.add_replica_count(*id, 1));
    }

    /// Adds this number of replicas to the load of a broker; ignores an offline broker.
    pub fn add_replica_count(&mut self, id: BrokerId, replicas: usize) {
        if let Some(candidate) = self.brokers.get_mut(&id) {
            candidate.load.replicas += replicas;
        }
    }

    /// Adds the replicas of one partition to the load. The first one is the preferred leader.
    fn add_partition(&mut self, replicas: &[BrokerId]) {
        for (position, id) in replicas.iter().enumerate() {
            // The placement contains live brokers only.
            if let Some(candidate) = self.brokers.get_mut(id) {
                candidate.load.replicas += 1;
                candidate.load.leaders += usize::from(position == 0);
            }
        }
    }
}

/// Returns true if a live broker is stopping or drained.
pub(super) fn is_leaving(state: &MetadataSnapshot, id: BrokerId, value: &BrokerValue) -> bool {
    value.state == BrokerState::Stopping || state.drains().contains_key(&id)
}

/// Returns true if other brokers cannot reach a live broker because its registration contains no address for them. Its
/// replicas can never be in sync. False if there is no other live broker.
pub(super) fn is_unreachable(state: &MetadataSnapshot, value: &BrokerValue) -> bool {
    value.listeners.peer().is_none() && state.brokers().len() > 1
}

/// Returns a number that is the same for the same pair everywhere, and pseudorandom over pairs (finalizer of
/// SplitMix64).
fn hash_pair(partition: PartitionId, broker: BrokerId) -> u64 {
    let mut topic = [0; 8];
    topic.copy_from_slice(&partition.topic.as_bytes()[..8]);
    let seed = u64::from_le_bytes(topic) ^ (u64::from(partition.number) << 32) ^ u64::from(broker.0);
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::model::TopicId;

    fn partition(number: u32) -> PartitionId {
        PartitionId::new(TopicId::from_bytes([7; 16]), number)
    }

    /// Returns brokers 1, 2, … without load, in these racks.
    fn brokers(racks: &[Option<u8>]) -> Placement {
        let mut placement = Placement::new();
        for (id, rack) in (1..).zip(racks) {
            placement.add(BrokerId(id), rack.map(|rack| format!("rack-{rack}")), BrokerLoad::default());
        }
        placement
    }

    /// Returns the difference between the largest and the smallest count.
    fn spread(counts: impl Iterator<Item = usize> + Clone) -> usize {
        counts.clone().max().unwrap_or(0) - counts.min().unwrap_or(0)
    }

    proptest! {
        #[test]
        fn replicas_use_distinct_brokers_and_all_racks_first(
            racks in prop::collection::vec(prop::option::of(0_u8..4), 1..12),
            wanted in 1_usize..6,
            partitions in 1_u32..40,
        ) {
            let mut placement = brokers(&racks);
            let rack_of = |id: &BrokerId| racks[usize::try_from(id.0 - 1).unwrap()].map_or(1000 + id.0, u32::from);
            let all_racks: BTreeSet<u32> = (1..).map(BrokerId).take(racks.len()).map(|id| rack_of(&id)).collect();
            for number in 0..partitions {
                match placement.place(partition(number), wanted) {
                    None => prop_assert!(wanted > racks.len()),
                    Some(replicas) => {
                        prop_assert_eq!(replicas.len(), wanted);
                        prop_assert_eq!(replicas.iter().collect::<BTreeSet<_>>().len(), wanted);
                        let used: BTreeSet<u32> = replicas.iter().map(rack_of).collect();
                        prop_assert_eq!(used.len(), wanted.min(all_racks.len()));
                    }
                }
            }
        }

        #[test]
        fn replica_limits_are_respected_and_used_fully(
            bounds in prop::collection::vec(0_usize..12, 1..8),
            wanted in 1_usize..4,
            partitions in 1_u32..60,
        ) {
            let mut placement = brokers(&vec![None; bounds.len()]);
            for (id, max) in (1..).zip(&bounds) {
                placement.limit_replicas(BrokerId(id), *max);
            }
            for number in 0..partitions {
                let eligible = placement.accepting_brokers().filter(|(id, _)| placement.has_capacity(*id)).count();
                prop_assert_eq!(placement.place(partition(number), wanted).is_some(), eligible >= wanted);
            }
            for (load, max) in placement.loads().values().zip(bounds) {
                prop_assert!(load.replicas <= max);
            }
        }

        #[test]
        fn without_racks_load_is_even(count in 1_usize..12, wanted in 1_usize..6, partitions in 1_u32..100) {
            prop_assume!(wanted <= count);
            let mut placement = brokers(&vec![None; count]);
            for number in 0..partitions {
                placement.place(partition(number), wanted).expect("enough brokers");
            }
            let loads = placement.loads();
            prop_assert!(spread(loads.values().map(|load| load.replicas)) <= 2, "{loads:?}");
            prop_assert!(spread(loads.values().map(|load| load.leaders)) <= 1, "{loads:?}");
        }

        #[test]
        fn staying_replicas_keep_their_order(count in 4_usize..10, number in 0_u32..1000) {
            let placement = brokers(&vec![None; count]);
            let staying = vec![BrokerId(3), BrokerId(1)];
            let chosen = placement.choose(partition(number), staying.clone(), 4).expect("enough brokers");
            prop_assert_eq!(&chosen[..2], &staying[..]);
            prop_assert_eq!(chosen.iter().collect::<BTreeSet<_>>().len(), 4);
        }
    }

    #[test]
    fn exceeded_limit_names_broker_and_both_numbers() {
        let mut placement = brokers(&[None, None]);
        placement.limit_replicas(BrokerId(1), 10);
        placement.limit_replicas(BrokerId(2), 30);
        let many = |count: u32| {
            move |placement: &mut Placement| {
                (0..count).map(|number| placement.place(partition(number), 1)).collect::<Option<Vec<_>>>()
            }
        };
        let placed = placement.clone().place_within_limits(many(40)).expect("as many as both limits permit");
        assert_eq!(placed.iter().filter(|replicas| **replicas == [BrokerId(2)]).count(), 30);
        let bound = ReplicaLimitExceeded { broker: BrokerId(1), replicas: 21, max: 10 };
        assert_eq!(placement.clone().place_within_limits(many(41)), Err(PlacementError::LimitExceeded(bound)));
        let text = bound.to_string();
        assert!(["broker 1", "21", "10", "broker.max_replicas"].iter().all(|part| text.contains(part)), "{text}");
        let three = |placement: &mut Placement| placement.place(partition(0), 3);
        assert_eq!(placement.place_within_limits(three), Err(PlacementError::TooFewBrokers), "there are two brokers");
    }

    #[test]
    fn new_broker_gets_partitions_until_load_is_even() {
        let mut placement = brokers(&[None, None]);
        for number in 0..10 {
            placement.place(partition(number), 1).expect("enough brokers");
        }
        placement.add(BrokerId(9), None, BrokerLoad::default());
        let next: Vec<_> = (10..15).map(|number| placement.place(partition(number), 1).expect("enough")).collect();
        assert_eq!(next, vec![vec![BrokerId(9)]; 5]);
    }

    #[test]
    fn partitions_of_lost_broker_spread_over_all_others() {
        let mut placement = brokers(&[None; 6]);
        let sets: Vec<_> = (0..60).map(|number| placement.place(partition(number), 3).expect("enough")).collect();
        let other_replicas: BTreeSet<_> =
            sets.iter().filter(|set| set[0] == BrokerId(1)).flat_map(|set| &set[1..]).collect();
        assert_eq!(other_replicas.len(), 5, "{other_replicas:?}");
    }
}
