//! Who leads and who holds what: a cache of the cluster's metadata.
//!
//! Callers read the cache without waiting. Whoever finds it wrong says which generation it acted on and asks for a
//! newer one; of many who ask at once, one calls a broker and all take its answer. A partition's leader is only ever
//! replaced by one of a higher or equal leader epoch, so that a broker which lags cannot send a client back.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use super::{connection::Address, error::CallError, lock::lock, nearest::nearest};
use crate::{
    model::{BrokerId, LeaderEpoch, TopicId},
    proto::{
        fault::{Fault, Reason},
        v1,
    },
};

/// What a client knows of one topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicRoute {
    /// The topic's id; another one under the same name is another topic.
    pub id: TopicId,
    /// Its partitions, by number.
    pub partitions: Vec<PartitionRoute>,
    /// Largest batch that it takes, in bytes as stored.
    pub max_message_bytes: usize,
    /// `compression.type` as configured.
    pub compression_type: String,
}

/// Who leads one partition, and who else holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartitionRoute {
    /// The leader; none at the moment of an election.
    pub leader: Option<BrokerId>,
    /// The epoch that it leads in.
    pub epoch: LeaderEpoch,
    /// Who holds it, the preferred leader first.
    pub replicas: Vec<BrokerId>,
    /// Who of them is in sync.
    pub isr: Vec<BrokerId>,
}

/// Where a broker is.
#[derive(Clone, Debug)]
struct Home {
    address: Address,
    /// Empty when it did not say.
    rack: String,
}

/// Where a consumer reads a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    /// The broker.
    pub(super) address: Address,
    /// Whether it is a follower.
    pub(super) follows: bool,
    /// The topic's identity.
    pub(super) topic: TopicId,
    /// The newest leader epoch that is known.
    pub(super) epoch: LeaderEpoch,
}

#[derive(Debug, Default)]
struct View {
    generation: u64,
    brokers: BTreeMap<BrokerId, Home>,
    topics: BTreeMap<String, Result<Arc<TopicRoute>, Fault>>,
}

/// The cache.
#[derive(Debug, Default)]
pub(super) struct Routing {
    view: Mutex<View>,
    /// Held while one caller asks a broker for all.
    refreshing: tokio::sync::Mutex<()>,
}

impl Routing {
    /// Grows with each refresh. Read it before acting, and hand it to [`Routing::refresh`] when the act failed.
    pub(super) fn generation(&self) -> u64 {
        lock(&self.view).generation
    }

    /// The topic, when it is known; a fault when brokers said that it does not exist.
    pub(super) fn topic(&self, name: &str) -> Option<Result<Arc<TopicRoute>, Fault>> {
        lock(&self.view).topics.get(name).cloned()
    }

    /// Where the leader of a partition listens.
    pub(super) fn leader(&self, topic: &str, partition: u32) -> Option<Address> {
        let view = lock(&self.view);
        let route = view.topics.get(topic)?.as_ref().ok()?;
        let leader = route.partitions.get(usize::try_from(partition).ok()?)?.leader?;
        view.brokers.get(&leader).map(|home| home.address.clone())
    }

    /// Where a consumer in `rack` reads a partition: at an in-sync replica there, else at the leader.
    pub(super) fn source(&self, topic: &str, partition: u32, rack: Option<&str>) -> Option<Source> {
        let view = lock(&self.view);
        let known = view.topics.get(topic)?.as_ref().ok()?;
        let route = known.partitions.get(usize::try_from(partition).ok()?)?;
        let rack_of = |broker| view.brokers.get(&broker).map(|home| home.rack.as_str());
        let broker = nearest(rack, (topic, partition), route, rack_of)?;
        let address = view.brokers.get(&broker)?.address.clone();
        Some(Source { address, follows: route.leader != Some(broker), topic: known.id, epoch: route.epoch })
    }

    /// The brokers that the last answer named.
    pub(super) fn brokers(&self) -> Vec<Address> {
        lock(&self.view).brokers.values().map(|home| home.address.clone()).collect()
    }

    /// The broker that advertises an address.
    pub(super) fn broker_at(&self, address: &Address) -> Option<BrokerId> {
        lock(&self.view).brokers.iter().find(|(_, home)| home.address == *address).map(|(id, _)| *id)
    }

    /// Believes a broker that does not lead a partition, or not any more, and says who does (docs/errors.md), where that is newer than
    /// what is known: nobody needs to be asked then. An epoch that is not above the known one changes nothing, so that two brokers which
    /// name each other cannot send a client back and forth.
    pub(super) fn told(&self, topic: &str, partition: u32, fault: &Fault) -> bool {
        if !matches!(fault.reason, Reason::NotLeader | Reason::NotReady) {
            return false;
        }
        let leader = fault.number("leader").and_then(|id| u32::try_from(id).ok()).map(BrokerId);
        let epoch = fault.number("leader_epoch").and_then(|epoch| LeaderEpoch::from_i32(i32::try_from(epoch).ok()?));
        let address = fault.metadata.get("address").and_then(|address| Address::parse(address).ok());
        let (Some(leader), Some(epoch), Some(address)) = (leader, epoch, address) else { return false };
        let mut view = lock(&self.view);
        let Some(Ok(route)) = view.topics.get_mut(topic) else { return false };
        let Ok(number) = usize::try_from(partition) else { return false };
        if route.partitions.get(number).is_none_or(|known| known.epoch >= epoch) {
            return false;
        }
        let known = &mut Arc::make_mut(route).partitions[number];
        (known.leader, known.epoch) = (Some(leader), epoch);
        let rack = view.brokers.remove(&leader).map_or_else(String::new, |home| home.rack);
        view.brokers.insert(leader, Home { address, rack });
        true
    }

    /// Makes the cache newer than `seen` and adds `wanted` to the topics that it keeps. `ask` calls a broker; it is not
    /// called when somebody else has refreshed meanwhile.
    pub(super) async fn refresh<F, R>(&self, seen: u64, wanted: &[&str], ask: F) -> Result<(), CallError>
    where
        F: FnOnce(Vec<String>) -> R,
        R: Future<Output = Result<v1::GetMetadataResponse, CallError>>,
    {
        let _one_at_a_time = self.refreshing.lock().await;
        let topics: BTreeSet<String> = {
            let view = lock(&self.view);
            if view.generation > seen && wanted.iter().all(|name| view.topics.contains_key(*name)) {
                return Ok(());
            }
            // A name that nobody wants any more and that does not exist is not asked for for ever.
            let known = view.topics.iter().filter(|(_, route)| route.is_ok()).map(|(name, _)| name.clone());
            known.chain(wanted.iter().map(|name| (*name).to_owned())).collect()
        };
        let answer = ask(topics.into_iter().collect()).await?;
        lock(&self.view).take(answer)?;
        Ok(())
    }
}

impl View {
    fn take(&mut self, answer: v1::GetMetadataResponse) -> Result<(), Fault> {
        let mut brokers = BTreeMap::new();
        for broker in answer.brokers {
            let address = Address::parse(&broker.address).map_err(|error| {
                let message = format!("broker {} advertises an address that cannot be called: {error}", broker.id);
                Fault::new(Reason::Internal, message)
            })?;
            brokers.insert(BrokerId(broker.id), Home { address, rack: broker.rack });
        }
        self.brokers = brokers;
        let mut topics = BTreeMap::new();
        for topic in answer.topics {
            let name = topic.name.clone();
            let old = self.topics.get(&name).and_then(|route| route.as_ref().ok());
            let route = read_topic(topic, old.map(|route| &**route));
            topics.insert(name, route.map(Arc::new));
        }
        self.topics = topics;
        self.generation += 1;
        Ok(())
    }
}

fn read_topic(topic: v1::TopicMetadata, old: Option<&TopicRoute>) -> Result<TopicRoute, Fault> {
    if let Some(error) = topic.error {
        return Err(error.into());
    }
    let odd = |what: &str| Fault::new(Reason::Internal, format!("metadata of topic {:?} has {what}", topic.name));
    let id: TopicId = topic.topic_id.parse().map_err(|_| odd("no valid topic id"))?;
    let old = old.filter(|old| old.id == id);
    let mut partitions = Vec::new();
    for (number, partition) in topic.partitions.iter().enumerate() {
        if usize::try_from(partition.partition) != Ok(number) {
            return Err(odd("partitions out of order"));
        }
        let fresh = PartitionRoute {
            leader: partition.leader.map(BrokerId),
            epoch: LeaderEpoch::from_i32(partition.leader_epoch).unwrap_or_default(),
            replicas: partition.replicas.iter().copied().map(BrokerId).collect(),
            isr: partition.isr.iter().copied().map(BrokerId).collect(),
        };
        let known = old.and_then(|old| old.partitions.get(number));
        partitions.push(known.filter(|known| known.epoch > fresh.epoch).cloned().unwrap_or(fresh));
    }
    Ok(TopicRoute {
        id,
        partitions,
        max_message_bytes: usize::try_from(topic.max_message_bytes).unwrap_or(usize::MAX),
        compression_type: topic.compression_type,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(leader: u32, epoch: i32) -> v1::GetMetadataResponse {
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
    async fn of_many_who_ask_at_once_one_calls() {
        let routing = Routing::default();
        let calls = std::sync::atomic::AtomicU32::new(0);
        let ask = |_| async {
            calls.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            tokio::task::yield_now().await;
            Ok(answer(1, 0))
        };
        let (a, b) = tokio::join!(routing.refresh(0, &["t"], ask), routing.refresh(0, &["t"], ask));
        assert!(a.is_ok() && b.is_ok());
        assert_eq!(calls.into_inner(), 1);
        assert_eq!(routing.leader("t", 0).expect("known").as_str(), "b1:9460");
        assert_eq!(routing.leader("t", 1), None);
    }

    #[tokio::test]
    async fn a_broker_that_does_not_lead_says_who_does_and_is_believed_where_that_is_newer() {
        let routing = Routing::default();
        let fault = |leader: u32, epoch: i32| {
            Fault::new(Reason::NotLeader, "elsewhere")
                .with("leader", leader)
                .with("leader_epoch", epoch)
                .with("address", format!("n{leader}:9460"))
        };
        assert!(!routing.told("t", 0, &fault(2, 9)), "a topic that nobody asked for");
        routing.refresh(0, &["t"], |_| async { Ok(answer(1, 3)) }).await.expect("answered");
        assert!(!routing.told("t", 0, &fault(2, 3)), "another word on the epoch that is known");
        assert!(!routing.told("t", 1, &fault(2, 4)), "no such partition");
        assert!(!routing.told("t", 0, &Fault::new(Reason::NotLeader, "nobody")));
        assert!(!routing.told("t", 0, &Fault { reason: Reason::StorageFailed, ..fault(2, 4) }));
        let odd = Fault::new(Reason::NotLeader, "odd").with("leader", -1).with("leader_epoch", "x").with("address", "");
        assert!(!routing.told("t", 0, &odd));
        assert_eq!(routing.leader("t", 0).expect("known").as_str(), "b1:9460");
        assert!(routing.told("t", 0, &fault(3, 4)), "a broker that was not known");
        assert_eq!(routing.leader("t", 0).expect("known").as_str(), "n3:9460");
        routing.refresh(1, &["t"], |_| async { Ok(answer(1, 3)) }).await.expect("answered");
        assert_eq!(
            routing.leader("t", 0),
            None,
            "the one who lags knows no broker 3: its word on who leads is not taken"
        );
    }

    #[tokio::test]
    async fn a_consumer_in_a_rack_is_sent_there_and_without_one_to_the_leader() {
        let routing = Routing::default();
        let mut metadata = answer(1, 3);
        for (broker, rack) in metadata.brokers.iter_mut().zip(["a", "b"]) {
            broker.rack = rack.to_owned();
        }
        metadata.topics[0].partitions[0].replicas = vec![1, 2];
        metadata.topics[0].partitions[0].isr = vec![2, 1];
        routing.refresh(0, &["t"], |_| async { Ok(metadata) }).await.expect("answered");
        let at = |rack| {
            let source = routing.source("t", 0, rack).expect("known");
            (source.address.as_str().to_owned(), source.follows)
        };
        assert_eq!(at(None), ("b1:9460".to_owned(), false));
        assert_eq!(at(Some("a")), ("b1:9460".to_owned(), false));
        assert_eq!(at(Some("b")), ("b2:9460".to_owned(), true));
        assert_eq!(at(Some("c")), ("b1:9460".to_owned(), false));
        // Somebody says that 2 leads by now: its rack is still known.
        let told = Fault::new(Reason::NotLeader, "elsewhere")
            .with("leader", 2)
            .with("leader_epoch", 4)
            .with("address", "n2:9460");
        assert!(routing.told("t", 0, &told));
        assert_eq!(at(Some("b")), ("n2:9460".to_owned(), false));
        assert_eq!(at(Some("a")), ("b1:9460".to_owned(), true));
        assert_eq!(routing.source("t", 1, Some("a")), None);
    }

    #[tokio::test]
    async fn a_leader_of_an_older_epoch_is_not_believed() {
        let routing = Routing::default();
        routing.refresh(0, &["t"], |_| async { Ok(answer(2, 5)) }).await.expect("answered");
        routing.refresh(1, &["t"], |_| async { Ok(answer(1, 4)) }).await.expect("answered");
        assert_eq!(routing.leader("t", 0).expect("known").as_str(), "b2:9460");
        routing.refresh(2, &["t"], |_| async { Ok(answer(1, 6)) }).await.expect("answered");
        assert_eq!(routing.leader("t", 0).expect("known").as_str(), "b1:9460");
    }
}
