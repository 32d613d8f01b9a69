//! Routing metadata: a cache of leaders, replicas and broker addresses.
//!
//! Callers read the cache without waiting. A caller that finds the cache outdated names the generation that it used and
//! requests a newer one. Concurrent requests share one call to a broker. A cached leader is never replaced by one of a
//! lower leader epoch of the same topic. So old metadata does not lead a client back to an old leader.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{address::BrokerAddress, error::CallError, replica_selector::select_replica, route::TopicRoute};
use crate::{
    model::{BrokerId, LeaderEpoch, TopicId},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    task::lock::Mutex,
};

/// Address and rack of a broker.
#[derive(Clone, Debug)]
struct BrokerEndpoint {
    address: BrokerAddress,
    /// Rack; empty if the broker has none.
    rack: String,
}

/// Broker at which a consumer reads a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ReadTarget {
    pub(super) address: BrokerAddress,
    pub(super) is_follower: bool,
    pub(super) topic: TopicId,
    /// Newest leader epoch of the partition in the cache.
    pub(super) epoch: LeaderEpoch,
}

#[derive(Debug, Default)]
struct RoutingSnapshot {
    generation: u64,
    brokers: BTreeMap<BrokerId, BrokerEndpoint>,
    topics: BTreeMap<String, Result<Arc<TopicRoute>, ApiError>>,
}

/// Cache of routing metadata.
#[derive(Debug, Default)]
pub(super) struct RoutingTable {
    snapshot: Mutex<RoutingSnapshot>,
    /// Held by the caller that requests metadata from a broker. Other callers wait.
    refreshing: tokio::sync::Mutex<()>,
}

impl RoutingTable {
    /// Returns the generation, which grows with each successful refresh. Read the generation before a call, and pass it
    /// to [`RoutingTable::refresh`] if the call fails.
    pub(super) fn generation(&self) -> u64 {
        self.snapshot.lock().generation
    }

    /// Returns the topic; `None` if the last metadata does not contain it. The inner error is the topic's error in that
    /// metadata.
    pub(super) fn topic(&self, name: &str) -> Option<Result<Arc<TopicRoute>, ApiError>> {
        self.snapshot.lock().topics.get(name).cloned()
    }

    /// Returns the address of a partition's leader. Returns `None` if the metadata has no such partition, no leader of
    /// the partition, or no address of that leader.
    pub(super) fn leader(&self, topic: &str, partition: u32) -> Option<BrokerAddress> {
        let snapshot = self.snapshot.lock();
        let route = snapshot.topics.get(topic)?.as_ref().ok()?;
        let leader = route.partitions.get(usize::try_from(partition).ok()?)?.leader?;
        snapshot.brokers.get(&leader).map(|endpoint| endpoint.address.clone())
    }

    /// Returns the broker at which a consumer in `rack` reads a partition: an in-sync replica in the rack, else the
    /// leader. Returns `None` if there is neither, or if the metadata has no address of that broker.
    pub(super) fn read_target(&self, topic: &str, partition: u32, rack: Option<&str>) -> Option<ReadTarget> {
        let snapshot = self.snapshot.lock();
        let topic_route = snapshot.topics.get(topic)?.as_ref().ok()?;
        let route = topic_route.partitions.get(usize::try_from(partition).ok()?)?;
        let rack_of = |broker| snapshot.brokers.get(&broker).map(|endpoint| endpoint.rack.as_str());
        let broker = select_replica(rack, (topic, partition), route, rack_of)?;
        let address = snapshot.brokers.get(&broker)?.address.clone();
        Some(ReadTarget {
            address,
            is_follower: route.leader != Some(broker),
            topic: topic_route.id,
            epoch: route.epoch,
        })
    }

    /// Returns the addresses of all brokers in the cache.
    pub(super) fn brokers(&self) -> Vec<BrokerAddress> {
        self.snapshot.lock().brokers.values().map(|endpoint| endpoint.address.clone()).collect()
    }

    /// Returns the broker that advertises an address.
    pub(super) fn broker_at(&self, address: &BrokerAddress) -> Option<BrokerId> {
        self.snapshot.lock().brokers.iter().find(|(_, endpoint)| endpoint.address == *address).map(|(id, _)| *id)
    }

    /// Applies the leader hint in the error of a broker that does not lead a partition (docs/errors.md). Returns true
    /// if the hint had a newer epoch than the cache and was applied; no metadata request is needed then. A hint without
    /// a newer epoch is ignored, so that two brokers that name each other cannot send a client back and forth.
    pub(super) fn apply_leader_hint(&self, topic: &str, partition: u32, error: &ApiError) -> bool {
        if !matches!(error.code, ErrorCode::NotLeader | ErrorCode::NotReady) {
            return false;
        }
        let leader = error.number("leader").and_then(|id| u32::try_from(id).ok()).map(BrokerId);
        let epoch = error.number("leader_epoch").and_then(|epoch| LeaderEpoch::from_i32(i32::try_from(epoch).ok()?));
        let address = error.metadata.get("address").and_then(|address| BrokerAddress::parse(address).ok());
        let (Some(leader), Some(epoch), Some(address)) = (leader, epoch, address) else { return false };
        let mut snapshot = self.snapshot.lock();
        let Some(Ok(route)) = snapshot.topics.get_mut(topic) else { return false };
        let Ok(number) = usize::try_from(partition) else { return false };
        if route.partitions.get(number).is_none_or(|cached| cached.epoch >= epoch) {
            return false;
        }
        let cached = &mut Arc::make_mut(route).partitions[number];
        (cached.leader, cached.epoch) = (Some(leader), epoch);
        let rack = snapshot.brokers.remove(&leader).map_or_else(String::new, |endpoint| endpoint.rack);
        snapshot.brokers.insert(leader, BrokerEndpoint { address, rack });
        true
    }

    /// Refreshes the cache and adds `wanted` topics. Does nothing if the cache has a generation above `used_generation`
    /// and contains these topics, because another caller has then refreshed it. `request` requests the metadata of
    /// topics from a broker.
    pub(super) async fn refresh<F, R>(&self, used_generation: u64, wanted: &[&str], request: F) -> Result<(), CallError>
    where
        F: FnOnce(Vec<String>) -> R,
        R: Future<Output = Result<v1::GetMetadataResponse, CallError>>,
    {
        let _one_at_a_time = self.refreshing.lock().await;
        let topics: BTreeSet<String> = {
            let snapshot = self.snapshot.lock();
            if snapshot.generation > used_generation && wanted.iter().all(|name| snapshot.topics.contains_key(*name)) {
                return Ok(());
            }
            // Topics that do not exist are requested only while a caller needs them.
            let cached = snapshot.topics.iter().filter(|(_, route)| route.is_ok()).map(|(name, _)| name.clone());
            cached.chain(wanted.iter().map(|name| (*name).to_owned())).collect()
        };
        let response = request(topics.into_iter().collect()).await?;
        self.snapshot.lock().replace(response)?;
        Ok(())
    }
}

impl RoutingSnapshot {
    /// Replaces the content by that of a response. A cached partition is kept if the topic id is the same and its
    /// leader epoch is newer. An invalid broker address is an error and changes nothing.
    fn replace(&mut self, response: v1::GetMetadataResponse) -> Result<(), ApiError> {
        let mut brokers = BTreeMap::new();
        for broker in response.brokers {
            let address = BrokerAddress::parse(&broker.address).map_err(|error| {
                let message = format!("broker {} advertises an unusable address: {error}", broker.id);
                ApiError::new(ErrorCode::Internal, message)
            })?;
            brokers.insert(BrokerId(broker.id), BrokerEndpoint { address, rack: broker.rack });
        }
        self.brokers = brokers;
        let mut topics = BTreeMap::new();
        for topic in response.topics {
            let name = topic.name.clone();
            let cached = self.topics.get(&name).and_then(|route| route.as_ref().ok());
            let route = TopicRoute::from_metadata(topic, cached.map(|route| &**route));
            topics.insert(name, route.map(Arc::new));
        }
        self.topics = topics;
        self.generation += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(leader: u32, epoch: i32) -> v1::GetMetadataResponse {
        v1::GetMetadataResponse {
            cluster: "c".into(),
            brokers: (1..=2).map(|id| v1::Broker { id, address: format!("b{id}:9460"), rack: String::new() }).collect(),
            topics: vec![v1::TopicMetadata {
                name: "t".into(),
                topic_id: TopicId::from_bytes([7; 16]).to_string(),
                partitions: vec![v1::PartitionMetadata {
                    leader: Some(leader),
                    leader_epoch: epoch,
                    ..Default::default()
                }],
                max_message_bytes: 1000,
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn concurrent_refreshes_share_one_call() {
        let routing = RoutingTable::default();
        let calls = std::sync::atomic::AtomicU32::new(0);
        let request = |_| async {
            calls.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            tokio::task::yield_now().await;
            Ok(response(1, 0))
        };
        let (a, b) = tokio::join!(routing.refresh(0, &["t"], request), routing.refresh(0, &["t"], request));
        assert!(a.is_ok() && b.is_ok());
        assert_eq!(calls.into_inner(), 1);
        assert_eq!(routing.leader("t", 0).expect("cached").as_str(), "b1:9460");
        assert_eq!(routing.leader("t", 1), None);
    }

    #[tokio::test]
    async fn leader_hint_with_newer_epoch_is_applied() {
        let routing = RoutingTable::default();
        let error = |leader: u32, epoch: i32| {
            ApiError::new(ErrorCode::NotLeader, "another leader")
                .with("leader", leader)
                .with("leader_epoch", epoch)
                .with("address", format!("n{leader}:9460"))
        };
        assert!(!routing.apply_leader_hint("t", 0, &error(2, 9)), "the topic was not requested");
        routing.refresh(0, &["t"], |_| async { Ok(response(1, 3)) }).await.expect("refreshed");
        assert!(!routing.apply_leader_hint("t", 0, &error(2, 3)), "the hint has the cached epoch");
        assert!(!routing.apply_leader_hint("t", 1, &error(2, 4)), "no such partition");
        assert!(!routing.apply_leader_hint("t", 0, &ApiError::new(ErrorCode::NotLeader, "no leader")));
        assert!(!routing.apply_leader_hint("t", 0, &ApiError { code: ErrorCode::StorageFailed, ..error(2, 4) }));
        let invalid = ApiError::new(ErrorCode::NotLeader, "invalid hint")
            .with("leader", -1)
            .with("leader_epoch", "x")
            .with("address", "");
        assert!(!routing.apply_leader_hint("t", 0, &invalid));
        assert_eq!(routing.leader("t", 0).expect("cached").as_str(), "b1:9460");
        assert!(routing.apply_leader_hint("t", 0, &error(3, 4)), "the metadata did not contain the broker");
        assert_eq!(routing.leader("t", 0).expect("cached").as_str(), "n3:9460");
        routing.refresh(1, &["t"], |_| async { Ok(response(1, 3)) }).await.expect("refreshed");
        assert_eq!(
            routing.leader("t", 0),
            None,
            "the outdated broker does not list broker 3, and its leader is ignored"
        );
    }

    #[tokio::test]
    async fn consumer_reads_in_its_rack_else_at_the_leader() {
        let routing = RoutingTable::default();
        let mut metadata = response(1, 3);
        for (broker, rack) in metadata.brokers.iter_mut().zip(["a", "b"]) {
            broker.rack = rack.to_owned();
        }
        metadata.topics[0].partitions[0].replicas = vec![1, 2];
        metadata.topics[0].partitions[0].isr = vec![2, 1];
        routing.refresh(0, &["t"], |_| async { Ok(metadata) }).await.expect("refreshed");
        let at = |rack| {
            let target = routing.read_target("t", 0, rack).expect("cached");
            (target.address.as_str().to_owned(), target.is_follower)
        };
        assert_eq!(at(None), ("b1:9460".to_owned(), false));
        assert_eq!(at(Some("a")), ("b1:9460".to_owned(), false));
        assert_eq!(at(Some("b")), ("b2:9460".to_owned(), true));
        assert_eq!(at(Some("c")), ("b1:9460".to_owned(), false));
        // A hint names broker 2 as the new leader; the cache keeps the rack of broker 2.
        let hint = ApiError::new(ErrorCode::NotLeader, "another leader")
            .with("leader", 2)
            .with("leader_epoch", 4)
            .with("address", "n2:9460");
        assert!(routing.apply_leader_hint("t", 0, &hint));
        assert_eq!(at(Some("b")), ("n2:9460".to_owned(), false));
        assert_eq!(at(Some("a")), ("b1:9460".to_owned(), true));
        assert_eq!(routing.read_target("t", 1, Some("a")), None);
    }

    #[tokio::test]
    async fn leader_of_older_epoch_is_ignored() {
        let routing = RoutingTable::default();
        routing.refresh(0, &["t"], |_| async { Ok(response(2, 5)) }).await.expect("refreshed");
        routing.refresh(1, &["t"], |_| async { Ok(response(1, 4)) }).await.expect("refreshed");
        assert_eq!(routing.leader("t", 0).expect("cached").as_str(), "b2:9460");
        routing.refresh(2, &["t"], |_| async { Ok(response(1, 6)) }).await.expect("refreshed");
        assert_eq!(routing.leader("t", 0).expect("cached").as_str(), "b1:9460");
    }
}
