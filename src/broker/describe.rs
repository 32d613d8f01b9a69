//! Description of a topic, as the leaders of its partitions report it.
//!
//! The metadata contains the replicas, and only the leader knows the end of its log. If a leader does not respond, the watermarks of its
//! partitions are unknown, and the description contains the error.

use std::collections::{BTreeMap, HashMap};

use super::{
    Broker,
    admin::{name, summary, texts},
    figures::{Answer, Told, useless},
    hosted::Holding,
};
use crate::{
    cluster::{PartitionEntry, PartitionValue},
    model::{BrokerId, ConfigMap, Offset, PartitionId, TOPIC_CONFIG_KEYS, TopicConfig, TopicId, TopicName, Watermarks},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
};

impl Broker {
    pub(super) async fn describe_topic(&self, topic: &str) -> Result<v1::DescribeTopicResponse, ApiError> {
        let name = name(topic)?;
        let state = self.view.state();
        let Some(known) = state.topic(&name).cloned() else { return Err(self.topics.unknown(topic).into()) };
        let entries = state.partitions_of(&known.value).map(|(number, entry)| (number, entry.clone()));
        let entries: Vec<(u32, PartitionEntry)> = entries.collect();
        drop(state);
        let answers = self.ask_marks(leaders(known.value.id, &entries)).await;
        let partitions = entries.into_iter().map(|(number, entry)| {
            let id = PartitionId::new(known.value.id, number);
            let mut state = assigned(number, entry.partition.as_ref().map(|known| &known.value));
            match self.told(&name, id, &entry, &answers) {
                Ok(told) => marked(&mut state, &told),
                Err(fault) => {
                    let tier = entry.tier.as_ref().map(|known| &known.value);
                    state.log_start = tier.map_or(Offset::ZERO, |tier| tier.log_start).as_i64();
                    state.tiered_end = tier.map_or(Offset::ZERO, |tier| tier.bucket_end()).as_i64();
                    state.unanswered = Some(fault.into());
                }
            }
            if let Some(why) = self.unusable(id) {
                state.fault = Some(ApiError::new(ErrorCode::StorageFailed, why).into());
            }
            state
        });
        Ok(v1::DescribeTopicResponse {
            partitions: partitions.collect(),
            topic: Some(summary(&name, &known.value)),
            effective_config: texts(TopicConfig::effective_values(&self.settings.topic_defaults, &known.value.config)),
            config_source: sources(&self.settings.topic_defaults, &known.value.config),
        })
    }

    /// Returns the leader's report about a partition.
    fn told(
        &self,
        topic: &TopicName,
        id: PartitionId,
        entry: &PartitionEntry,
        answers: &BTreeMap<BrokerId, Answer>,
    ) -> Result<Told, ApiError> {
        let leader = entry.partition.as_ref().and_then(|known| known.value.leader);
        let Some(leader) = leader else {
            let known = entry.partition.as_ref();
            let waits = known.map_or_else(String::new, |known| waits(topic, id.number, &known.value));
            return Err(ApiError::new(
                ErrorCode::NoLeader,
                format!("nobody leads partition {} at the moment{waits}", id.number),
            ));
        };
        match answers.get(&leader) {
            Some(Ok(told)) => match told.get(&id) {
                Some(Ok(told)) => Ok(told.clone()),
                Some(Err(why)) => Err(useless(leader, why)),
                None => {
                    let message = format!("broker {leader} does not serve partition {} at the moment", id.number);
                    Err(ApiError::new(ErrorCode::NotReady, message))
                }
            },
            Some(Err(fault)) => Err(fault.clone()),
            None => Err(ApiError::new(ErrorCode::NotReady, format!("broker {leader} was not asked"))),
        }
    }

    /// Returns why the local replica is unusable.
    pub(super) fn unusable(&self, id: PartitionId) -> Option<String> {
        match &*self.hosted.held(id)? {
            Holding::Unusable(unusable) => Some(unusable.why.as_ref().to_owned()),
            Holding::Open(_) | Holding::Elsewhere => None,
        }
    }
}

/// Returns the source of each key of a topic's effective configuration.
fn sources(defaults: &ConfigMap, own: &ConfigMap) -> HashMap<String, i32> {
    let source = |key: &str| match (own.contains_key(key), defaults.contains_key(key)) {
        (true, _) => v1::ConfigSource::Topic,
        (false, true) => v1::ConfigSource::Broker,
        (false, false) => v1::ConfigSource::Default,
    };
    TOPIC_CONFIG_KEYS.iter().map(|key| (key.name.to_owned(), source(key.name).into())).collect()
}

/// Names the brokers that could lead a leaderless partition or, if there are none, the election that an operator can run.
fn waits(topic: &TopicName, number: u32, value: &PartitionValue) -> String {
    let waited: Vec<String> = value.isr.iter().chain(&value.elr).map(ToString::to_string).collect();
    if !waited.is_empty() {
        return format!(": it waits for broker {}", waited.join(" or "));
    }
    format!(
        ": no replica is known to hold everything; `strandline partition elect {topic}/{number} --unclean` has one lead that may lack \
         records"
    )
}

/// Groups the partitions of a topic by leader.
fn leaders(topic: TopicId, entries: &[(u32, PartitionEntry)]) -> BTreeMap<BrokerId, Vec<PartitionId>> {
    let mut leaders: BTreeMap<BrokerId, Vec<PartitionId>> = BTreeMap::new();
    for (number, entry) in entries {
        if let Some(leader) = entry.partition.as_ref().and_then(|known| known.value.leader) {
            leaders.entry(leader).or_default().push(PartitionId::new(topic, *number));
        }
    }
    leaders
}

/// Returns the description of a partition according to the metadata.
fn assigned(number: u32, value: Option<&PartitionValue>) -> v1::PartitionState {
    let mut state =
        v1::PartitionState { partition: number.cast_signed(), leader_epoch: -1, ..v1::PartitionState::default() };
    if let Some(value) = value {
        state.leader = value.leader.map(|leader| leader.0);
        state.leader_epoch = value.leader_epoch.as_i32();
        state.replicas = numbers(&value.replicas);
        state.isr = numbers(&value.isr);
        state.elr = numbers(&value.elr);
        state.adding = numbers(&value.adding);
        state.removing = numbers(&value.removing);
        state.unclean_epoch = value.unclean.map(|epoch| epoch.as_i32());
    }
    state
}

/// Adds the leader's report to the description.
fn marked(state: &mut v1::PartitionState, told: &Told) {
    let Watermarks { log_start, local_start, tiered_end, high_watermark, persisted_end, log_end } = told.marks;
    state.log_start = log_start.as_i64();
    state.local_start = local_start.as_i64();
    state.tiered_end = tiered_end.as_i64();
    state.high_watermark = high_watermark.as_i64();
    state.persisted_end = persisted_end.as_i64();
    state.log_end = log_end.as_i64();
    state.local_bytes = told.local_bytes;
    state.tiered_bytes = told.tiered_bytes;
    state.fault = told.failed.as_ref().map(|why| ApiError::new(ErrorCode::StorageFailed, why.as_str()).into());
}

/// Converts broker ids to their wire form.
pub(super) fn numbers(ids: &[BrokerId]) -> Vec<u32> {
    ids.iter().map(|id| id.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LeaderEpoch;

    #[test]
    fn config_source_prefers_topic_then_broker() {
        let map = |keys: &[&str]| keys.iter().map(|&key| (key.to_owned(), "1".to_owned())).collect::<ConfigMap>();
        let found = sources(&map(&["retention.ms", "segment.ms"]), &map(&["segment.ms"]));
        let of = |key: &str| v1::ConfigSource::try_from(found[key]).expect("known");
        assert_eq!(of("segment.ms"), v1::ConfigSource::Topic);
        assert_eq!(of("retention.ms"), v1::ConfigSource::Broker);
        assert_eq!(of("segment.bytes"), v1::ConfigSource::Default);
        assert_eq!(found.len(), TOPIC_CONFIG_KEYS.len());
    }

    #[test]
    fn leaderless_partition_names_candidates_or_election() {
        let topic: TopicName = "orders".parse().expect("valid");
        let whole = PartitionValue::new([1, 2, 3].map(BrokerId).to_vec(), LeaderEpoch(4));
        let waiting = PartitionValue { leader: None, isr: vec![BrokerId(1)], elr: vec![BrokerId(3)], ..whole };
        assert_eq!(waits(&topic, 7, &waiting), ": it waits for broker 1 or 3");
        let forsaken = PartitionValue { isr: Vec::new(), elr: Vec::new(), ..waiting };
        let said = waits(&topic, 7, &forsaken);
        assert!(said.contains("no replica is known") && said.contains("elect orders/7 --unclean"), "{said}");
    }
}
