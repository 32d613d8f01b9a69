//! Description of a topic, from the metadata and from the reports of the partitions' leaders; and routing metadata for
//! clients.
//!
//! The metadata contains the replicas, but only the leader of a partition has its current watermarks. Without a report
//! of the leader, the description contains an error, and only the log start and tiered end of the metadata.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use tokio::sync::watch;

use super::{
    errors,
    topics::{config_to_proto, parse_topic_name, topic_summary},
};
use crate::{
    broker::{
        node_context::NodeContext,
        partitions::table::PartitionTable,
        replication::peer_status::{PeerStatus, ReplicaReport, ReportResult, replica_offline_error},
    },
    cluster::{BrokerState, MetadataSnapshot, PartitionEntry, PartitionValue, TopicValue, UnknownTopic},
    limits,
    model::{BrokerId, ConfigMap, Offset, PartitionId, TOPIC_CONFIG_KEYS, TopicConfig, TopicId, TopicName, Watermarks},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
};

/// Handler of topic descriptions and routing metadata.
pub(in crate::broker) struct Describe {
    pub(super) ctx: NodeContext,
    pub(super) partitions: Arc<PartitionTable>,
    pub(super) peers: Arc<PeerStatus>,
    /// True while the lease has expired.
    pub(super) lease: watch::Receiver<bool>,
}

impl Describe {
    /// Describes a topic: its configuration, and its partitions according to the metadata and to their leaders. If the
    /// replica on this broker is offline, the error of its partition is the reason.
    pub(in crate::broker) async fn describe_topic(&self, topic: &str) -> Result<v1::DescribeTopicResponse, ApiError> {
        let name = parse_topic_name(topic)?;
        let state = self.ctx.metadata.state();
        let Some(stored) = state.topic(&name).cloned() else { return Err(UnknownTopic::new(topic).into()) };
        let entries = state.partitions_of(&stored.value).map(|(number, entry)| (number, entry.clone()));
        let entries: Vec<(u32, PartitionEntry)> = entries.collect();
        drop(state);
        let reports = self.peers.request_reports(partitions_by_leader(stored.value.id, &entries)).await;
        let partitions = entries.into_iter().map(|(number, entry)| {
            let id = PartitionId::new(stored.value.id, number);
            let mut description = from_metadata(number, entry.partition.as_ref().map(|stored| &stored.value));
            match self.leader_report(&name, id, &entry, &reports) {
                Ok(report) => add_report(&mut description, &report),
                Err(error) => {
                    let tier = entry.tier.as_ref().map(|stored| &stored.value);
                    description.log_start = tier.map_or(Offset::ZERO, |tier| tier.log_start).as_i64();
                    description.tiered_end = tier.map_or(Offset::ZERO, |tier| tier.tiered_end()).as_i64();
                    description.leader_error = Some(error.into());
                }
            }
            if let Some(reason) = self.partitions.offline_reason(id) {
                description.error = Some(replica_offline_error(self.ctx.id, &reason).into());
            }
            description
        });
        Ok(v1::DescribeTopicResponse {
            partitions: partitions.collect(),
            topic: Some(topic_summary(&name, &stored.value)),
            effective_config: config_to_proto(TopicConfig::effective_values(
                &self.ctx.config.topic_defaults,
                &stored.value.config,
            )),
            config_source: config_sources(&self.ctx.config.topic_defaults, &stored.value.config),
        })
    }

    /// Returns the leader's report about a partition from `reports`. The error is the reason why there is none: no
    /// leader, no response, or a replica that is offline or not open.
    fn leader_report(
        &self,
        topic: &TopicName,
        id: PartitionId,
        entry: &PartitionEntry,
        reports: &BTreeMap<BrokerId, ReportResult>,
    ) -> Result<ReplicaReport, ApiError> {
        let leader = entry.partition.as_ref().and_then(|stored| stored.value.leader);
        let Some(leader) = leader else {
            let advice = match &entry.partition {
                Some(stored) => election_advice(topic, id.number, &stored.value),
                None => ": its metadata is missing or invalid: see `strandline cluster health`".to_owned(),
            };
            return Err(ApiError::new(ErrorCode::NoLeader, format!("partition {} has no leader{advice}", id.number)));
        };
        match reports.get(&leader) {
            Some(Ok(replicas)) => match replicas.get(&id) {
                Some(Ok(report)) => Ok(report.clone()),
                Some(Err(reason)) => Err(replica_offline_error(leader, reason)),
                None => {
                    let message = format!("broker {leader} does not serve partition {} yet: retry", id.number);
                    Err(ApiError::new(ErrorCode::NotReady, message))
                }
            },
            Some(Err(error)) => Err(error.clone()),
            None => Err(ApiError::new(ErrorCode::NotReady, format!("broker {leader} was not queried: retry"))),
        }
    }

    /// Returns routing metadata: all registered brokers, and the requested topics or all topics. Fails if too many
    /// topics are requested, or one topic twice.
    pub(in crate::broker) fn metadata(
        &self,
        request: &v1::GetMetadataRequest,
    ) -> Result<v1::GetMetadataResponse, ApiError> {
        if request.topics.len() > limits::MAX_METADATA_TOPICS {
            return Err(errors::invalid_request(format!(
                "{} topics in one request, at most {} are allowed: send several requests, or set all_topics",
                request.topics.len(),
                limits::MAX_METADATA_TOPICS
            )));
        }
        let mut seen = BTreeSet::new();
        if let Some(duplicate) = request.topics.iter().find(|topic| !seen.insert(topic.as_str())) {
            return Err(errors::invalid_request(format!(
                "topic {duplicate:?} is named twice in one request: name each topic once"
            )));
        }
        let state = self.ctx.metadata.state();
        // Clients contact brokers in the order of this list, so brokers that are shutting down come last.
        let (running, stopping): (Vec<_>, Vec<_>) =
            state.brokers().iter().partition(|(_, entry)| entry.value.state == BrokerState::Running);
        let brokers = running.into_iter().chain(stopping).map(|(id, entry)| v1::Broker {
            id: id.0,
            address: entry.value.listeners.client().to_owned(),
            rack: entry.value.rack.clone().unwrap_or_default(),
        });
        let topics = if request.all_topics {
            state.topics().iter().map(|(name, topic)| self.topic_metadata(&state, name, &topic.value)).collect()
        } else {
            request.topics.iter().map(|topic| self.metadata_by_name(&state, topic)).collect()
        };
        Ok(v1::GetMetadataResponse {
            cluster: self.ctx.config.cluster.clone(),
            brokers: brokers.collect(),
            topics,
            controller: state.controller().map(|id| id.0),
            lease_expired: *self.lease.borrow(),
        })
    }

    /// Returns the metadata of a requested topic, with an error if there is no such topic.
    fn metadata_by_name(&self, state: &MetadataSnapshot, topic: &str) -> v1::TopicMetadata {
        let found = TopicName::new(topic).ok().and_then(|name| Some((state.topic(&name)?, name)));
        match found {
            Some((topic, name)) => self.topic_metadata(state, &name, &topic.value),
            None => v1::TopicMetadata {
                name: topic.to_owned(),
                error: Some(ApiError::from(UnknownTopic::new(topic)).into()),
                ..Default::default()
            },
        }
    }

    /// Returns the routing metadata of a topic: the leader, the replicas and the ISR of each partition.
    fn topic_metadata(&self, state: &MetadataSnapshot, name: &TopicName, topic: &TopicValue) -> v1::TopicMetadata {
        let config = TopicConfig::resolve(&self.ctx.config.topic_defaults, &topic.config).unwrap_or_default();
        let partitions = state.partitions_of(topic).map(|(number, entry)| {
            let value = entry.partition.as_ref().map(|stored| &stored.value);
            v1::PartitionMetadata {
                partition: number.cast_signed(),
                leader: value.and_then(|value| value.leader).map(|leader| leader.0),
                replicas: value.map(|value| ids_to_proto(&value.replicas)).unwrap_or_default(),
                isr: value.map(|value| ids_to_proto(&value.isr)).unwrap_or_default(),
                leader_epoch: value.map_or(-1, |value| value.leader_epoch.as_i32()),
            }
        });
        v1::TopicMetadata {
            name: name.to_string(),
            error: None,
            topic_id: topic.id.to_string(),
            partitions: partitions.collect(),
            max_message_bytes: u32::try_from(config.max_message_bytes).unwrap_or(u32::MAX),
            compression_type: config.compression.map_or("producer", |codec| codec.as_str()).to_owned(),
        }
    }
}

/// Returns the source of each key of a topic's effective configuration.
fn config_sources(defaults: &ConfigMap, topic_config: &ConfigMap) -> HashMap<String, i32> {
    let source = |key: &str| match (topic_config.contains_key(key), defaults.contains_key(key)) {
        (true, _) => v1::ConfigSource::Topic,
        (false, true) => v1::ConfigSource::Broker,
        (false, false) => v1::ConfigSource::Default,
    };
    TOPIC_CONFIG_KEYS.iter().map(|key| (key.name.to_owned(), source(key.name).into())).collect()
}

/// Returns the end of the error message about a leaderless partition. The text names the brokers of the ISR and ELR,
/// one of which must start. If there are none, the text names the election that an operator can run.
fn election_advice(topic: &TopicName, number: u32, value: &PartitionValue) -> String {
    let candidates: Vec<String> = value.isr.iter().chain(&value.elr).map(ToString::to_string).collect();
    if !candidates.is_empty() {
        return format!(": start broker {}", candidates.join(" or "));
    }
    format!(
        ": no replica is known to have all committed records; `strandline partition elect {topic}/{number} --unclean` \
         elects a replica that may lack some"
    )
}

/// Groups the partitions of a topic by leader, without leaderless partitions.
fn partitions_by_leader(topic: TopicId, entries: &[(u32, PartitionEntry)]) -> BTreeMap<BrokerId, Vec<PartitionId>> {
    let mut leaders: BTreeMap<BrokerId, Vec<PartitionId>> = BTreeMap::new();
    for (number, entry) in entries {
        if let Some(leader) = entry.partition.as_ref().and_then(|stored| stored.value.leader) {
            leaders.entry(leader).or_default().push(PartitionId::new(topic, *number));
        }
    }
    leaders
}

/// Returns the description of a partition according to the metadata.
fn from_metadata(number: u32, value: Option<&PartitionValue>) -> v1::PartitionDescription {
    let mut state = v1::PartitionDescription {
        partition: number.cast_signed(),
        leader_epoch: -1,
        ..v1::PartitionDescription::default()
    };
    if let Some(value) = value {
        state.leader = value.leader.map(|leader| leader.0);
        state.leader_epoch = value.leader_epoch.as_i32();
        state.replicas = ids_to_proto(&value.replicas);
        state.isr = ids_to_proto(&value.isr);
        state.elr = ids_to_proto(&value.elr);
        state.adding = ids_to_proto(&value.adding);
        state.removing = ids_to_proto(&value.removing);
        state.unclean_epoch = value.unclean_epoch.map(|epoch| epoch.as_i32());
    }
    state
}

/// Adds the leader's report to the description of its partition.
fn add_report(state: &mut v1::PartitionDescription, report: &ReplicaReport) {
    let Watermarks { log_start, local_start, tiered_end, high_watermark, persisted_end, log_end } = report.watermarks;
    state.log_start = log_start.as_i64();
    state.local_start = local_start.as_i64();
    state.tiered_end = tiered_end.as_i64();
    state.high_watermark = high_watermark.as_i64();
    state.persisted_end = persisted_end.as_i64();
    state.log_end = log_end.as_i64();
    state.local_bytes = report.local_bytes;
    state.tiered_bytes = report.tiered_bytes;
    state.error = state.leader.zip(report.failed.as_ref()).map(|(leader, reason)| {
        let message = format!("the replica on broker {leader} accepts no writes: {reason}");
        ApiError::new(ErrorCode::StorageFailed, message).into()
    });
}

/// Converts broker ids to their protocol form.
pub(super) fn ids_to_proto(ids: &[BrokerId]) -> Vec<u32> {
    ids.iter().map(|id| id.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LeaderEpoch;

    #[test]
    fn config_source_prefers_topic_then_broker() {
        let map = |keys: &[&str]| keys.iter().map(|&key| (key.to_owned(), "1".to_owned())).collect::<ConfigMap>();
        let found = config_sources(&map(&["retention.ms", "segment.ms"]), &map(&["segment.ms"]));
        let of = |key: &str| v1::ConfigSource::try_from(found[key]).expect("the source is valid");
        assert_eq!(of("segment.ms"), v1::ConfigSource::Topic);
        assert_eq!(of("retention.ms"), v1::ConfigSource::Broker);
        assert_eq!(of("segment.bytes"), v1::ConfigSource::Default);
        assert_eq!(found.len(), TOPIC_CONFIG_KEYS.len());
    }

    #[test]
    fn leaderless_partition_names_candidates_or_election() {
        let topic: TopicName = "orders".parse().expect("the name is valid");
        let value = PartitionValue::new([1, 2, 3].map(BrokerId).to_vec(), LeaderEpoch(4));
        let waiting = PartitionValue { leader: None, isr: vec![BrokerId(1)], elr: vec![BrokerId(3)], ..value };
        assert_eq!(election_advice(&topic, 7, &waiting), ": start broker 1 or 3");
        let without = PartitionValue { isr: Vec::new(), elr: Vec::new(), ..waiting };
        let text = election_advice(&topic, 7, &without);
        assert!(text.contains("no replica is known") && text.contains("elect orders/7 --unclean"), "{text}");
    }
}
