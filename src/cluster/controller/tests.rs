//! Controllers of several brokers over one store: election of the controller, its changes, and its succession.

use super::*;
use crate::{
    cluster::{
        embedded::EmbeddedStore,
        faulty::{Fault, FaultyStore},
        keys::{BrokerValue, TopicValue},
        partition_value::PartitionValue,
        session::RegistrationRequest,
    },
    model::{LeaderEpoch, TopicId, TopicName},
};

/// Session timeout of the brokers, and unit of the waits in the tests.
const SESSION_TIMEOUT: Duration = Duration::from_secs(9);

struct World {
    store: EmbeddedStore,
    link: FaultyStore,
    keys: Keys,
    metadata: MetadataCache,
    tasks: Tasks,
}

/// One broker: its registration and its controller task.
struct Node {
    session: Session,
    tasks: Tasks,
}

fn id() -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), 0)
}

impl World {
    async fn new() -> Self {
        let (store, keys, tasks) = (EmbeddedStore::in_memory(), Keys::new("test").unwrap(), Tasks::new());
        let link = FaultyStore::new(store.clone());
        let metadata = MetadataCache::start(Arc::new(store.clone()), keys.clone(), &tasks);
        let world = Self { store, link, keys, metadata, tasks };
        let topic = TopicValue { id: id().topic, partitions: 1, replication_factor: 3, config: ConfigMap::new() };
        let brokers = [1, 2, 3].map(BrokerId).to_vec();
        let value = PartitionValue { leader: None, ..PartitionValue::new(brokers, LeaderEpoch(0)) };
        let name = TopicName::new("t").unwrap();
        let creation = Transaction::new()
            .put(world.keys.topic(&name), topic.encode())
            .put(world.keys.partition(id()), value.encode());
        world.store.transact(creation).await.unwrap();
        world
    }

    async fn start_broker(&self, number: u32) -> Node {
        self.start_broker_with(number, self.metadata.clone()).await
    }

    /// Returns a broker whose controller uses this metadata cache.
    async fn start_broker_with(&self, number: u32, metadata: MetadataCache) -> Node {
        let (keys, id) = (self.keys.clone(), BrokerId(number));
        let registration = RegistrationRequest {
            store: Arc::new(self.store.clone()),
            keys,
            id,
            value: value(number),
            session_timeout: SESSION_TIMEOUT,
        };
        let tasks = self.tasks.child();
        let session = registration.register(None, &self.metadata, &tasks).await.unwrap();
        let controller = Controller {
            store: Arc::new(self.link.clone()),
            keys: self.keys.clone(),
            metadata,
            session: session.clone(),
            id,
            defaults: ConfigMap::new(),
            limits: PlannerLimits::default(),
            metrics: Metrics::new(),
        };
        controller.spawn(&tasks);
        Node { session, tasks }
    }

    /// Writes the registration of a broker that has no controller task and no lease.
    async fn register_without_task(&self, number: u32) {
        let path = self.keys.broker(BrokerId(number));
        self.store.transact(Transaction::new().put(path, value(number).encode())).await.unwrap();
    }

    async fn delete(&self, key: String) {
        self.store.transact(Transaction::new().delete(key)).await.unwrap();
    }

    /// Waits until a condition holds for the metadata cache, for at most four session timeouts. Returns the elapsed
    /// time.
    async fn wait_until(&self, holds: impl Fn(&MetadataSnapshot) -> bool) -> Duration {
        let started = clock::monotonic();
        let mut states = self.metadata.watch();
        let satisfied = tokio::time::timeout(SESSION_TIMEOUT * 4, states.wait_for(|state| holds(state))).await;
        assert!(satisfied.is_ok(), "not satisfied after {:?}: {:?}", SESSION_TIMEOUT * 4, self.metadata.state());
        started.elapsed()
    }
}

fn value(number: u32) -> BrokerValue {
    BrokerValue::running_at(format!("b{number}:1"))
}

fn leader(state: &MetadataSnapshot) -> Option<BrokerId> {
    state.partition(id())?.partition.as_ref()?.value.leader
}

impl Node {
    async fn leave(self) {
        self.session.leave().await;
        self.tasks.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn first_broker_is_controller_until_it_stops() {
    let world = World::new().await;
    world.register_without_task(2).await;
    world.register_without_task(3).await;
    let first = world.start_broker(1).await;
    world.wait_until(|state| state.controller() == Some(BrokerId(1)) && leader(state) == Some(BrokerId(1))).await;
    let second = world.start_broker(2).await;
    let third = world.start_broker(3).await;
    tokio::time::sleep(SESSION_TIMEOUT).await;
    assert_eq!(world.metadata.state().controller(), Some(BrokerId(1)), "the key stays with its holder");
    first.leave().await;
    let elapsed = world
        .wait_until(|state| state.controller().is_some() && leader(state).is_some_and(|id| id != BrokerId(1)))
        .await;
    assert!(elapsed < Duration::from_secs(1), "{elapsed:?}");
    second.leave().await;
    third.leave().await;
    world.tasks.stop().await;
}

/// Regression: while etcd changed its leader, every metadata cache was older than the campaign. All brokers then
/// campaigned two hundred times per second. A lost campaign must wait for the cache, for at most `CACHE_WAIT`.
#[tokio::test(start_paused = true)]
async fn lost_campaign_waits_for_the_metadata_cache() {
    let world = World::new().await;
    let first = world.start_broker(1).await;
    world.wait_until(|state| state.controller() == Some(BrokerId(1))).await;
    let tasks = Tasks::new();
    let stale = MetadataCache::start(Arc::new(EmbeddedStore::in_memory()), world.keys.clone(), &tasks);
    let before = world.link.transaction_count();
    let second = world.start_broker_with(2, stale).await;
    tokio::time::sleep(SESSION_TIMEOUT).await;
    let transactions = u64::try_from(world.link.transaction_count() - before).unwrap();
    let expected = 1..=SESSION_TIMEOUT.as_secs() + 2;
    assert!(expected.contains(&transactions), "{transactions} transactions in {SESSION_TIMEOUT:?}");
    first.leave().await;
    second.leave().await;
    tasks.stop().await;
    world.tasks.stop().await;
}

/// The test deletes the registration of a leader before its lease ends, as the controller does after a failure report.
/// The election must not wait for the end of the lease.
#[tokio::test(start_paused = true)]
async fn deleted_registration_triggers_election_at_once() {
    let world = World::new().await;
    world.register_without_task(1).await;
    let node = world.start_broker(2).await;
    world.wait_until(|state| leader(state) == Some(BrokerId(1))).await;
    world.delete(world.keys.broker(BrokerId(1))).await;
    let elapsed = world.wait_until(|state| leader(state) == Some(BrokerId(2))).await;
    assert!(elapsed < Duration::from_millis(100), "{elapsed:?}");
    node.leave().await;
    world.tasks.stop().await;
}

#[tokio::test(start_paused = true)]
async fn deposed_controller_changes_nothing() {
    let world = World::new().await;
    let node = world.start_broker(1).await;
    world.wait_until(|state| leader(state) == Some(BrokerId(1))).await;
    let other_controller = ControllerValue { broker: BrokerId(9) };
    let lease = world.store.grant(10 * SESSION_TIMEOUT).await.unwrap();
    let takeover = Transaction::new().put_leased(world.keys.controller(), other_controller.encode(), lease);
    world.delete(world.keys.controller()).await;
    world.store.transact(takeover).await.unwrap();
    let key = world.keys.partition(id());
    let entry = world.store.get(&key).await.unwrap().entry.unwrap();
    let leaderless = PartitionValue::decode(&key, &entry.value).unwrap().leaderless();
    world.store.transact(Transaction::new().put(key.as_str(), leaderless.encode())).await.unwrap();
    tokio::time::sleep(SESSION_TIMEOUT).await;
    assert_eq!(leader(&world.metadata.state()), None, "only the new controller may elect");
    world.delete(world.keys.controller()).await;
    world.wait_until(|state| leader(state) == Some(BrokerId(1))).await;
    node.leave().await;
    world.tasks.stop().await;
}

/// Regression: a key without a lease left the cluster without a controller forever, and brokers campaigned without
/// pause.
#[tokio::test(start_paused = true)]
async fn invalid_controller_key_is_deleted() {
    let world = World::new().await;
    let nodes = [world.start_broker(1).await, world.start_broker(2).await];
    world.wait_until(|state| state.controller().is_some() && leader(state).is_some()).await;
    // Invalid bytes, and a value as a broker writes it but without a lease.
    for invalid in ["nobody".into(), ControllerValue { broker: BrokerId(9) }.encode()] {
        let invalid = Transaction::new().put(world.keys.controller(), invalid);
        let TxnOutcome::Committed { revision } = world.store.transact(invalid).await.unwrap() else {
            panic!("no compare")
        };
        // The test cannot wait for the invalid key itself: a broker may delete it before this task reads the state.
        world.metadata.wait_for_revision(revision).await;
        let is_running = |id: BrokerId| id.0 <= 2;
        world.wait_until(|state| state.controller().is_some_and(is_running) && state.unreadable().is_empty()).await;
    }
    let key = world.keys.partition(id());
    let entry = world.store.get(&key).await.unwrap().entry.unwrap();
    let leaderless = PartitionValue::decode(&key, &entry.value).unwrap().leaderless();
    world.store.transact(Transaction::new().put(key.as_str(), leaderless.encode())).await.unwrap();
    world.wait_until(|state| leader(state).is_none()).await;
    world.wait_until(|state| leader(state).is_some()).await;
    for node in nodes {
        node.leave().await;
    }
    world.tasks.stop().await;
}

#[tokio::test(start_paused = true)]
async fn failed_store_requests_are_retried() {
    let world = World::new().await;
    let faults = [Fault::Refused, Fault::Lost, Fault::ResponseLost, Fault::Refused, Fault::Lost, Fault::ResponseLost];
    world.link.fail_transactions(faults.map(Some));
    let node = world.start_broker(1).await;
    world.wait_until(|state| leader(state) == Some(BrokerId(1))).await;
    let epoch = world.metadata.state().partition(id()).unwrap().partition.as_ref().unwrap().value.leader_epoch;
    assert_eq!(epoch, LeaderEpoch(1), "elected once");
    node.leave().await;
    world.tasks.stop().await;
}

#[tokio::test(start_paused = true)]
async fn presence_is_counted_per_incarnation_from_first_sight() {
    let world = World::new().await;
    let (now, mut presence) = (clock::monotonic(), BrokerPresence::default());
    let broker = BrokerId(1);
    // Broker 1 is online in even steps, and offline in odd ones.
    let observe_step = async |presence: &mut BrokerPresence, step: u32| {
        world.wait_until(|state| state.brokers().contains_key(&broker) == step.is_multiple_of(2)).await;
        presence.observe(&world.metadata.state(), now + SESSION_TIMEOUT * step);
        presence.durations_ms(now + SESSION_TIMEOUT * (step + 1))
    };
    let time_ms = 9_000;
    for step in [0, 2] {
        world.register_without_task(1).await;
        let (online, offline) = observe_step(&mut presence, step).await;
        assert_eq!(
            (online.get(&broker), offline.get(&broker)),
            (Some(&time_ms), None),
            "a new incarnation counts from zero"
        );
        assert_eq!(
            offline.get(&BrokerId(2)),
            Some(&(time_ms * u64::from(step + 1))),
            "offline from the start, with a replica"
        );
        world.delete(world.keys.broker(broker)).await;
        let (online, offline) = observe_step(&mut presence, step + 1).await;
        assert_eq!((online.get(&broker), offline.get(&broker)), (None, Some(&time_ms)));
    }
    world.tasks.stop().await;
}
