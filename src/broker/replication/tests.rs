//! Replication between two brokers over TCP: partitions, links in both directions, and the `Peer` service. The metadata
//! stores only confirm broker epochs; each test assigns the leaders itself.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
};
use tonic::transport::{Server, server::TcpIncoming};

use super::{
    claim_verifier::ClaimVerifier,
    links::{self, LinkManager},
    peer_client::{DisconnectReason, PeerClient, PeerError, ReplicationStream, error_from_status},
    peer_server::{PeerCallbacks, PeerServer, service},
    peer_table::{LinkLossListener, PeerTable},
};
use crate::{
    broker::partitions::table::{HostedPartition, HostedTopic, OfflineReplica, PartitionTable},
    client::TcpConnector,
    cluster::{BrokerValue, EmbeddedStore, Keys, MetaStore as _, PartitionValue, Revision, Transaction, Value as _},
    log::{DataDir, DataDirIdentity, LogOptions, SimDisk},
    model::{
        Acks, BrokerId, Compression, ConfigMap, LeaderEpoch, Offset, PartitionId, TopicConfig, TopicId, TopicName,
    },
    partition::{
        AppendResult, MaintenanceQueue, Partition, PartitionAssignment, PartitionContext, ReplicaSpec,
        leader::member::BrokerStatus,
    },
    proto::v1,
    record::BatchBuilder,
    task::{Tasks, test_timeout::wait_until},
    telemetry::PeerCounters,
};

const RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);

/// One of the two brokers: the parts that replication needs.
struct Node {
    id: BrokerId,
    address: String,
    log: DataDir,
    partitions: Arc<PartitionTable>,
    links: Arc<LinkManager>,
    peer_table: Arc<PeerTable>,
    peers: PeerClient,
    /// Metadata store in which this broker verifies claims of other brokers.
    store: EmbeddedStore,
    keys: Keys,
    lost: mpsc::Receiver<(BrokerId, Revision, DisconnectReason)>,
    tasks: Tasks,
}

/// Sends each lost link to a channel that the test reads.
struct LinkLossRecorder(mpsc::Sender<(BrokerId, Revision, DisconnectReason)>);

impl LinkLossListener for LinkLossRecorder {
    fn link_lost(self: Arc<Self>, broker: BrokerId, epoch: Revision, reason: DisconnectReason) {
        let _full = self.0.try_send((broker, epoch, reason));
    }
}

fn id_of(number: u32) -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), number)
}

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn epoch_of(id: BrokerId) -> Revision {
    Revision(u64::from(id.0) * 10)
}

impl Node {
    /// Starts a broker that accepts links, with an empty peer table and topic `events`, whose four partitions are not
    /// open.
    async fn start(id: u32) -> Self {
        let (id, tasks) = (BrokerId(id), Tasks::new());
        let identity = DataDirIdentity { cluster: "test".to_owned(), broker: id };
        let options = LogOptions { journal_bytes: 8 << 20, ..LogOptions::default() };
        let log = DataDir::open(Arc::new(SimDisk::new()), Path::new("/data"), &identity, options).unwrap();
        let partitions = Arc::new(PartitionTable::default());
        let hosted = HostedTopic::new(id_of(0).topic, Arc::new(TopicConfig::default()), 4, None);
        partitions.put([(TopicName::new("events").unwrap(), hosted)]);
        let (recorder, lost) = mpsc::channel(64);
        let (store, keys) = (EmbeddedStore::in_memory(), Keys::new("test").unwrap());
        let verifier = Arc::new(ClaimVerifier::new(Arc::new(store.clone()), keys.clone()));
        let lost_links = Arc::new(LinkLossRecorder(recorder));
        let peer_table = PeerTable::new(id, "test".to_owned(), Arc::clone(&partitions), lost_links, verifier);
        let peers = PeerClient::new(Arc::new(TcpConnector::between_brokers(RESPONSE_TIMEOUT)), links::CONNECT_TIMEOUT);
        let received = PeerCounters::default();
        let links = LinkManager::new(Arc::clone(&peer_table), peers.clone(), received, tasks.clone());
        peer_table.set_own_epoch(Some(epoch_of(id)));
        let callbacks = PeerCallbacks {
            stats: Arc::new(|| v1::GetBrokerStatsResponse { leader_count: 5, ..v1::GetBrokerStatsResponse::default() }),
            report: Box::new(|report| Box::pin(async move { Ok(report.broker == BrokerId(9)) })),
        };
        let server = PeerServer::new(
            Arc::clone(&peer_table),
            format!("process {id}"),
            callbacks,
            None,
            PeerCounters::default(),
            tasks.clone(),
        );
        server.begin_serving();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let served = tasks.clone();
        tasks.spawn("serve", async move {
            let server = Server::builder().add_service(service(&server));
            tokio::select! {
                () = served.cancelled() => {}
                result = server.serve_with_incoming(TcpIncoming::from(listener)) => result.unwrap(),
            }
        });
        Self { id, address, log, partitions, links, peer_table, peers, store, keys, lost, tasks }
    }

    fn update_peers(&self, nodes: &[&Node]) {
        let peers = nodes.iter().map(|node| (node.id, (node.address.clone(), epoch_of(node.id))));
        self.peer_table.update_peers(peers.collect());
    }

    fn partition(&self, number: u32) -> Arc<Partition> {
        self.partitions.by_id(id_of(number)).unwrap()
    }

    /// Opens the local replica of a partition, without a role.
    fn open(&self, number: u32) {
        let spec = ReplicaSpec {
            id: id_of(number),
            topic: TopicName::new("events").unwrap(),
            config: Arc::new(TopicConfig::resolve(&ConfigMap::new(), &ConfigMap::new()).unwrap()),
            committed: None,
            tier: None,
            standalone: false,
            discard_local: false,
            max_lag_time: Duration::MAX,
        };
        let ctx = PartitionContext { links: self.links.clone(), ..PartitionContext::standalone() };
        let partition =
            Partition::open(self.id, &self.log, spec, ctx, &MaintenanceQueue::default(), &self.tasks).unwrap();
        self.partitions.set(id_of(number), HostedPartition::Online(partition));
    }

    /// Registers a broker with this broker epoch in the metadata store. The peer table, as a stale metadata cache, does
    /// not change.
    async fn register(&self, broker: BrokerId, epoch: Revision) {
        let value = BrokerValue::running_at("a:1".to_owned()).encode();
        // A broker epoch is the create revision of the key, so the store must be one revision before `epoch`.
        let (filler, key) = (self.keys.broker(BrokerId(99)), self.keys.broker(broker));
        while self.store.get(&key).await.unwrap().revision.0 + 1 < epoch.0 {
            self.store.transact(Transaction::new().put(filler.clone(), value.clone())).await.unwrap();
        }
        self.store.transact(Transaction::new().put(key.clone(), value)).await.unwrap();
        assert_eq!(self.store.get(&key).await.unwrap().entry.unwrap().create_revision, epoch);
    }

    /// Assigns the partition to `leader` in this epoch, with both brokers in sync.
    async fn assign(&self, number: u32, leader: u32, epoch: u32) {
        let both = [BrokerId(1), BrokerId(2)];
        let value = PartitionValue::new(both.to_vec(), LeaderEpoch(epoch));
        let value = PartitionValue { leader: Some(BrokerId(leader)), ..value };
        let registered = both.map(|id| (id, BrokerStatus::Registered(epoch_of(id)))).into();
        let (value, revision) = (Arc::new(value), Revision(u64::from(epoch) + 100));
        self.partition(number).assign(PartitionAssignment { value, revision, committed: None, registered }).await;
    }

    async fn stop(&self) {
        self.tasks.stop().await;
    }
}

async fn append(partition: &Partition, value: &[u8]) -> tokio::sync::oneshot::Receiver<AppendResult> {
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(1, None, Some(value), &[]).unwrap();
    let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
    partition.append(builder.finish(None).unwrap(), None, Acks::All, permit).await
}

async fn acked(response: tokio::sync::oneshot::Receiver<AppendResult>) {
    let response = tokio::time::timeout(RESPONSE_TIMEOUT, response).await.expect("in time");
    response.expect("a response").expect("an acknowledgement");
}

/// Starts two brokers, each with the other in its peer table and with replicas of this number of partitions. The first
/// broker leads them in epoch 1.
async fn pair(partitions: u32) -> (Node, Node) {
    let (one, two) = (Node::start(1).await, Node::start(2).await);
    one.update_peers(&[&one, &two]);
    two.update_peers(&[&one, &two]);
    for number in 0..partitions {
        one.open(number);
        two.open(number);
        one.assign(number, 1, 1).await;
        two.assign(number, 1, 1).await;
    }
    (one, two)
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_records_are_on_both_brokers() {
    let (one, two) = pair(3).await;
    let large = vec![7; 3 << 20];
    for number in 0..3 {
        for value in [b"first".as_slice(), &large, b"last"] {
            acked(append(&one.partition(number), value).await).await;
        }
        assert_eq!(two.partition(number).progress().persisted_end, at(3), "the follower synced the batches");
        let is_committed = || two.partition(number).watermarks().high_watermark == at(3);
        wait_until("the batches are committed on the follower", is_committed).await;
    }
    let read = |node: &Node| {
        let reader = node.partition(2).reader().clone();
        async move {
            let (mut bytes, mut from) = (Vec::new(), Offset::ZERO);
            while let Some(read) = reader.read(from, (8 << 20).into()).await.unwrap() {
                bytes.extend(read.chunks.concat());
                from = read.next;
            }
            bytes
        }
    };
    let copied = read(&two).await;
    assert!(copied.len() > 3 << 20);
    assert!(copied == read(&one).await, "the copies are equal");

    // The second broker becomes the leader of partition 0, so partitions are replicated in both directions.
    for node in [&two, &one] {
        node.assign(0, 2, 2).await;
    }
    acked(append(&two.partition(0), b"other way").await).await;
    acked(append(&one.partition(1), b"as before").await).await;
    assert_eq!(one.partition(0).progress().persisted_end, at(4));
    one.stop().await;
    two.stop().await;
}

/// Waits for a ping on the stream and responds to it.
async fn respond_to_ping(stream: &mut ReplicationStream) {
    let message = stream.receiver.message().await.unwrap().unwrap();
    let Some(v1::replicate_response::Message::Ping(ping)) = message.message else { panic!("{message:?}") };
    let pong = v1::replicate_request::Message::Pong(v1::Pong { number: ping.number });
    stream.sender.send(v1::ReplicateRequest { message: Some(pong), ..Default::default() }).await.unwrap();
}

/// A Hello with a wrong or outdated field is rejected. A second link with the same broker epoch replaces the first link
/// only if that link does not respond to a ping. A newer broker epoch replaces the link at once.
#[tokio::test(flavor = "multi_thread")]
async fn invalid_hello_is_rejected_with_reason() {
    let (one, two) = pair(0).await;
    let epoch = epoch_of(two.id).0;
    let good = v1::Hello {
        cluster: "test".to_owned(),
        broker_id: 2,
        broker_epoch: epoch,
        target_broker: 1,
        version: 1,
        wall_clock_ms: None,
    };
    let hellos = [
        (v1::Hello { cluster: "other".to_owned(), ..good.clone() }, "belongs to cluster \"test\", not to \"other\""),
        (v1::Hello { broker_id: 7, ..good.clone() }, "broker 7 is not registered"),
        (v1::Hello { broker_id: 1, ..good.clone() }, "connects to itself"),
        (v1::Hello { broker_epoch: 19, ..good.clone() }, "epoch 19, and is registered with the later epoch 20"),
        (
            v1::Hello { broker_epoch: 1 << 63, ..good.clone() },
            "is not registered with broker epoch 9223372036854775808",
        ),
        (v1::Hello { target_broker: 5, ..good.clone() }, "this is broker 1, not broker 5"),
        (v1::Hello { version: 2, ..good.clone() }, "version 2"),
    ];
    let peers = PeerClient::new(Arc::new(TcpConnector::between_brokers(RESPONSE_TIMEOUT)), RESPONSE_TIMEOUT);
    for (hello, expected) in hellos {
        let mut stream = peers.replicate(&one.address, hello).await.unwrap();
        let status = stream.receiver.message().await.expect_err(expected);
        let PeerError::Refused(error) = error_from_status("", &status) else { panic!("{status:?}") };
        assert!(error.message.contains(expected), "{expected}: {error}");
    }
    let mut stream = peers.replicate(&one.address, good.clone()).await.unwrap();
    let welcome = stream.receiver.message().await.unwrap().unwrap();
    let Some(v1::replicate_response::Message::Welcome(welcome)) = welcome.message else { panic!("{welcome:?}") };
    assert_eq!((welcome.broker_id, welcome.broker_epoch), (1, 10));
    assert!(welcome.wall_clock_ms.is_some_and(|theirs| theirs.abs_diff(crate::task::clock::wall_ms()) < 60_000));
    // The next link with the same broker epoch causes a ping on the first link, which responds and stays.
    let mut tries = 0;
    let status = loop {
        let began = crate::task::clock::monotonic();
        let (next, ()) = tokio::join!(peers.replicate(&one.address, good.clone()), respond_to_ping(&mut stream));
        let mut next = next.unwrap();
        match next.receiver.message().await {
            Err(status) => break status,
            // The response to the ping took more than a second, so the first link was replaced. Other work on this
            // machine may be the cause, and the test tries again.
            Ok(_welcome) => (stream, tries) = (next, tries + 1),
        }
        assert!(began.elapsed() >= Duration::from_secs(1) && tries < 3, "the first link stays");
    };
    assert!(status.message().contains("already has a link to this broker, and that link responds"), "{status:?}");
    // The stream does not respond to the ping that the next link causes, so the next link replaces it.
    let mut next = peers.replicate(&one.address, good.clone()).await.unwrap();
    assert!(matches!(
        next.receiver.message().await.unwrap().unwrap().message,
        Some(v1::replicate_response::Message::Welcome(_))
    ));
    let status = loop {
        match stream.receiver.message().await {
            Ok(Some(v1::ReplicateResponse { message: Some(v1::replicate_response::Message::Ping(_)), .. })) => {}
            other => break other.expect_err("the link was replaced"),
        }
    };
    assert!(status.message().contains("another link of the same broker replaced it"), "{status:?}");
    // A link with a newer broker epoch, which only the metadata store contains yet, replaces the link at once.
    one.register(two.id, Revision(21)).await;
    let mut newest = peers.replicate(&one.address, v1::Hello { broker_epoch: 21, ..good }).await.unwrap();
    assert!(newest.receiver.message().await.unwrap().is_some());
    assert!(next.receiver.message().await.is_err());
    one.peer_table.update_peers([(two.id, (two.address.clone(), Revision(22)))].into());
    assert!(newest.receiver.message().await.is_err());
    one.stop().await;
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_link_is_reported_and_reopened() {
    let (mut one, two) = pair(1).await;
    acked(append(&one.partition(0), b"first").await).await;
    // The follower's broker registers again: its link is reopened with the new broker epoch. Such an end is not a lost
    // link.
    two.peer_table.set_own_epoch(Some(Revision(21)));
    one.peer_table.update_peers([(two.id, (two.address.clone(), Revision(21)))].into());
    one.partition(0).on_broker_status(two.id, BrokerStatus::Registered(Revision(21))).await;
    acked(append(&one.partition(0), b"second").await).await;
    // A broker whose lease is lost reports no broker epoch, but its link continues.
    two.peer_table.set_own_epoch(None);
    acked(append(&one.partition(0), b"third").await).await;
    let identity = one.peers.get_identity(&two.address, RESPONSE_TIMEOUT).await.unwrap();
    assert_eq!(identity.broker_epoch, None);
    // The stop of broker 2 closes its connections, as an exit of its process does.
    two.stop().await;
    drop(two);
    let lost = tokio::time::timeout(RESPONSE_TIMEOUT, async {
        loop {
            let (broker, epoch, reason) = one.lost.recv().await.unwrap();
            if epoch == Revision(21) {
                return (broker, reason);
            }
        }
    });
    let (broker, reason) = lost.await.expect("the lost link is reported");
    assert!(
        broker == BrokerId(2) && matches!(reason, DisconnectReason::Closed | DisconnectReason::Reset),
        "{reason:?}"
    );
    one.stop().await;
}

/// When the process of a leader has exited, its follower's connection attempts are refused and reported at once. The
/// link is reopened when the broker is registered at another address.
#[tokio::test(flavor = "multi_thread")]
async fn exited_leader_process_is_reported_at_once() {
    let (one, mut two) = pair(1).await;
    acked(append(&one.partition(0), b"first").await).await;
    one.stop().await;
    let lost = tokio::time::timeout(RESPONSE_TIMEOUT, async {
        let mut seen = Vec::new();
        while !seen.contains(&DisconnectReason::Refused) {
            let (broker, epoch, reason) = two.lost.recv().await.unwrap();
            assert_eq!((broker, epoch), (BrokerId(1), Revision(10)));
            seen.push(reason);
        }
        seen
    });
    let seen = lost.await.expect("the refused connection is reported");
    assert!(!seen.contains(&DisconnectReason::TimedOut), "{seen:?}");
    // The broker starts again at another address, with a new broker epoch, and leads in a new leader epoch.
    let restarted = Node::start(1).await;
    let epoch = Revision(11);
    restarted.peer_table.set_own_epoch(Some(epoch));
    let registered =
        [(BrokerId(1), (restarted.address.clone(), epoch)), (BrokerId(2), (two.address.clone(), Revision(20)))];
    restarted.peer_table.update_peers(registered.clone().into());
    two.peer_table.update_peers(registered.into());
    restarted.open(1);
    two.open(1);
    restarted.assign(1, 1, 2).await;
    two.assign(1, 1, 2).await;
    acked(append(&restarted.partition(1), b"second").await).await;
    restarted.stop().await;
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_requests_are_served() {
    let (one, two) = pair(1).await;
    acked(append(&one.partition(0), b"record").await).await;
    let offline = OfflineReplica::OpenFailed { reason: "the log is corrupt".into(), since: LeaderEpoch(1) };
    two.partitions.set(id_of(1), HostedPartition::Offline(offline));
    let peers = one.peers.clone();
    let identity = peers.get_identity(&two.address, RESPONSE_TIMEOUT).await.unwrap();
    assert_eq!((identity.cluster.as_str(), identity.broker_id, identity.broker_epoch), ("test", 2, Some(20)));
    assert_eq!(identity.incarnation, "process 2");
    let name = |partition| v1::TopicIdPartition { topic_id: id_of(0).topic.to_string(), partition };
    let nonsense = v1::TopicIdPartition { topic_id: "nonsense".to_owned(), partition: 0 };
    let request = v1::DescribeReplicasRequest { replicas: vec![name(0), name(1), name(-1), nonsense] };
    let watermarks = peers.describe_replicas(&two.address, request, RESPONSE_TIMEOUT).await.unwrap().replicas;
    assert_eq!(watermarks.iter().map(|replica| replica.exists).collect::<Vec<_>>(), [true, false, false, false]);
    assert_eq!(
        watermarks.iter().map(|replica| &*replica.failed).collect::<Vec<_>>(),
        ["", "the log is corrupt", "", ""]
    );
    let here = &watermarks[0];
    assert_eq!((here.is_leader, here.leader_epoch, here.log_end, here.last_epoch), (false, 1, 1, Some(1)));
    assert_eq!(peers.broker_stats(&two.address, RESPONSE_TIMEOUT).await.unwrap().leader_count, 5);
    let report = |cluster: &str, broker| v1::ReportFailureRequest {
        cluster: cluster.to_owned(),
        reporter: 1,
        broker_id: broker,
        broker_epoch: 3,
        observation: "refused".to_owned(),
    };
    assert!(peers.report_failure(&two.address, report("test", 9), RESPONSE_TIMEOUT).await.unwrap().revoked);
    assert!(!peers.report_failure(&two.address, report("test", 8), RESPONSE_TIMEOUT).await.unwrap().revoked);
    let refused = peers.report_failure(&two.address, report("other", 9), RESPONSE_TIMEOUT).await;
    assert!(matches!(refused, Err(PeerError::Refused(_))), "{refused:?}");
    one.stop().await;
    two.stop().await;
}
