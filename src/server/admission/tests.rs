//! A start's way into the cluster, over a store that loses answers.

use std::{collections::BTreeSet, path::Path};

use super::*;
use crate::{
    cluster::{
        BrokerValue, EmbeddedStore, PartitionChanges, PartitionValue, TopicValue, Transaction, Value as _,
        faulty::{Fault, Faulty},
    },
    log::{Identity, Options, SimDisk},
    model::{BrokerId, LeaderEpoch, TopicId, TopicName},
};

const ME: BrokerId = BrokerId(1);

fn partition() -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), 0)
}

fn log() -> Log {
    let options = Options { journal_bytes: 1 << 20, reserve_bytes: 0, manual: true, ..Options::default() };
    let identity = Identity { cluster: "test".to_owned(), broker: ME };
    Log::open(Arc::new(SimDisk::new()), Path::new("/data"), &identity, options).unwrap()
}

/// One start: notes its uptime, proves, registers.
async fn start(store: &Arc<dyn MetaStore>, keys: &Keys, log: &Log, tasks: &Tasks) -> Session {
    let (defaults, stop) = (ConfigMap::new(), Tasks::new());
    let admission = Admission { store, keys, log, defaults: &defaults, stop: &stop };
    let noted = admission.note().await.unwrap();
    let value = BrokerValue {
        directory_id: log.directory_id().to_string(),
        incarnation: noted.incarnation.to_string(),
        ..BrokerValue::running_at("here:1".to_owned())
    };
    let time = Duration::from_secs(2);
    let registration = Registration { store: Arc::clone(store), keys: keys.clone(), id: ME, value, time };
    let view = View::start(Arc::clone(store), keys.clone(), tasks);
    admission.admit(&registration, noted, BTreeSet::from([partition()]), &view, tasks).await.unwrap().0
}

/// The simulator found it: the store had registered this uptime and the answer was lost. The next try judged the directory by the uptimes
/// before, took it for another one, and gave up every membership: with that of the last in-sync replica the partition stood still for ever.
#[tokio::test(start_paused = true)]
async fn a_lost_answer_of_the_registration_costs_no_membership() {
    let (link, keys, tasks) = (Faulty::new(EmbeddedStore::in_memory()), Keys::new("test").unwrap(), Tasks::new());
    let store: Arc<dyn MetaStore> = Arc::new(link.clone());
    let log = log();
    start(&store, &keys, &log, &tasks).await.leave().await;
    let value = PartitionValue { leader: None, ..PartitionValue::new(vec![ME], LeaderEpoch(3)) };
    let topic = TopicValue { id: partition().topic, partitions: 1, replication_factor: 1, config: ConfigMap::new() };
    let name = TopicName::new("t").unwrap();
    store.transact(Transaction::new().put(keys.topic(&name), topic.encode())).await.unwrap();
    for _ in 0..2 {
        store.transact(Transaction::new().put(keys.partition(partition()), value.encode())).await.unwrap();
    }
    link.transactions([Some(Fault::AnswerLost)]);
    let session = start(&store, &keys, &log, &tasks).await;
    let changes = PartitionChanges::new(Arc::clone(&store), keys.clone());
    let (now, _) = changes.read_back(partition()).await.unwrap().unwrap();
    assert_eq!(now, value, "the same process, the same disk");
    session.leave().await;
    tasks.stop().await;
}
