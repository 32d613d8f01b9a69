//! Brokers that are none, at the ports of real ones: what a stranger or a broken broker sends over a peer link is refused in words,
//! changes nothing, and the true ones go on.

use std::{net::SocketAddr, time::Duration};

use strandline::{
    cluster::{
        Addresses, BrokerState, BrokerValue, Compare, EtcdOptions, EtcdStore, Keys, MetaStore as _, Outcome,
        PartitionValue, TopicValue, Transaction, Value as _,
    },
    model::{BrokerId, LeaderEpoch, PartitionId, TopicName},
    proto::v1::{self, answer, peer_client::PeerClient, peer_server, to_follower, to_leader},
    task::{Tasks, clock},
};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Channel};

use super::members::{Cluster, etcd};
use crate::{
    broker::{Cli, Home},
    etcd::Etcd,
    patience::{PATIENCE, becomes, eventually},
    proxy::{FILLER, Proxy},
    wire,
};

/// The broker that is none.
const STRANGER: u32 = 9;

/// What the tests know of the cluster's metadata.
struct Meta {
    store: EtcdStore,
    keys: Keys,
}

impl Meta {
    async fn of(etcd: &Etcd) -> Self {
        let store = EtcdStore::open(EtcdOptions::new(etcd.endpoints())).await.expect("good options");
        Self { store, keys: Keys::new("it").expect("a name") }
    }

    /// Registers the stranger, as a broker at this address; its broker epoch.
    async fn register(&self, address: SocketAddr) -> u64 {
        let value = BrokerValue {
            addresses: Addresses { grpc: address.to_string(), http: None },
            rack: None,
            directory_id: "a stranger's".to_owned(),
            incarnation: "a stranger's".to_owned(),
            state: BrokerState::Running,
            disk_full: false,
            version: "0".to_owned(),
        };
        let put = Transaction::new().put(self.keys.broker(BrokerId(STRANGER)), value.encode());
        match self.store.transact(put).await.expect("etcd answers") {
            Outcome::Done { revision } => revision.0,
            Outcome::Refused { .. } => panic!("nothing was compared"),
        }
    }

    async fn first_partition(&self, topic: &str) -> PartitionId {
        let key = self.keys.topic(&TopicName::new(topic).expect("a name"));
        let entry = self.store.get(&key).await.expect("etcd answers").entry.expect("the topic is there");
        PartitionId::new(TopicValue::decode(&entry.key, &entry.value).expect("a topic").id, 0)
    }

    async fn value(&self, id: PartitionId) -> PartitionValue {
        let entry = self.store.get(&self.keys.partition(id)).await.expect("etcd answers").entry.expect("it is there");
        PartitionValue::decode(&entry.key, &entry.value).expect("a value")
    }

    /// Makes the stranger the leader of a topic's first partition, in an epoch of its own, with everybody else in sync.
    async fn usurp(&self, topic: &str) -> LeaderEpoch {
        let id = self.first_partition(topic).await;
        let topic = self.keys.topic(&TopicName::new(topic).expect("a name"));
        loop {
            let entry = self.store.get(&topic).await.expect("etcd answers").entry.expect("the topic is there");
            // One replica more, or the controller would take one away.
            let mut larger = TopicValue::decode(&entry.key, &entry.value).expect("a topic");
            larger.replication_factor += 1;
            let key = self.keys.partition(id);
            let entry = self.store.get(&key).await.expect("etcd answers").entry.expect("it is there");
            let mut value = PartitionValue::decode(&entry.key, &entry.value).expect("a value");
            value.replicas.insert(0, BrokerId(STRANGER));
            value.isr.insert(0, BrokerId(STRANGER));
            value.leader = Some(BrokerId(STRANGER));
            value.leader_epoch = LeaderEpoch(value.leader_epoch.0 + 1);
            let same = Compare::ModRevision(key.clone(), entry.mod_revision);
            let put = Transaction::new().when(same).put(key, value.encode()).put(topic.as_str(), larger.encode());
            if let Outcome::Done { .. } = self.store.transact(put).await.expect("etcd answers") {
                return value.leader_epoch;
            }
        }
    }
}

async fn peer(address: SocketAddr) -> PeerClient<Channel> {
    PeerClient::connect(format!("http://{address}")).await.expect("the broker listens")
}

async fn broker_epoch(address: SocketAddr) -> u64 {
    let who = peer(address).await.who_is(v1::WhoIsRequest {}).await.expect("it answers");
    who.into_inner().broker_epoch.expect("it is registered")
}

/// How far a replica's log reaches at a broker.
async fn log_end(address: SocketAddr, id: PartitionId) -> i64 {
    let name = v1::ReplicaName { topic_id: id.topic.to_string(), partition: i32::try_from(id.number).expect("few") };
    let marks = peer(address).await.marks(v1::MarksRequest { replicas: vec![name] }).await.expect("it answers");
    let marks = marks.into_inner().replicas.remove(0);
    assert!(marks.here, "it has the replica");
    marks.log_end
}

/// A stream to a broker, as a follower's broker opens one.
struct Follows {
    sender: mpsc::Sender<v1::ToLeader>,
    receiver: Streaming<v1::ToFollower>,
}

impl Follows {
    async fn begin(address: SocketAddr, first: Option<to_leader::Is>) -> Self {
        let (sender, messages) = mpsc::channel(16);
        sender.send(v1::ToLeader { is: first }).await.expect("there is room");
        let stream = peer(address).await.replicate(ReceiverStream::new(messages)).await.expect("a stream");
        Self { sender, receiver: stream.into_inner() }
    }

    async fn say(&self, is: Option<to_leader::Is>) {
        self.sender.send(v1::ToLeader { is }).await.expect("the stream is open");
    }

    async fn next(&mut self) -> Result<v1::ToFollower, Status> {
        let next = tokio::time::timeout(PATIENCE, self.receiver.message()).await.expect("something comes");
        next.map(|message| message.expect("it does not end without a word"))
    }

    async fn welcomed(&mut self) {
        let first = self.next().await.expect("no refusal");
        assert!(matches!(first.is, Some(to_follower::Is::Welcome(_))), "{first:?}");
    }

    /// The answer to a join, whatever comes before it.
    async fn answer(&mut self) -> v1::Answer {
        loop {
            if let Some(to_follower::Is::Answer(answer)) = self.next().await.expect("the link stands").is {
                return answer;
            }
        }
    }

    /// Why the stream ends.
    async fn refused(&mut self) -> String {
        loop {
            if let Err(status) = self.next().await {
                return status.message().to_owned();
            }
        }
    }
}

fn refusal(answer: &v1::Answer) -> &str {
    match &answer.is {
        Some(answer::Is::Refused(error)) => &error.message,
        other => panic!("not refused: {other:?}"),
    }
}

/// One record through the cluster, acknowledged by all in sync.
fn still_serves(cli: &Cli, topic: &str) {
    cli.ok_with(&["produce", topic], b"still here\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_that_follows_is_refused_in_words_and_the_true_follower_goes_on() {
    let cluster = tokio::task::block_in_place(|| {
        let cluster = Cluster::start(2);
        let create = ["topic", "create", "calm", "--replication-factor", "2", "--config", "min.insync.replicas=2"];
        cluster.cli().ok(&create);
        cluster.in_sync("calm", 2);
        // Another epoch than the first, so that there is an older one.
        let (old, new) = (cluster.leader("calm", 0), 3 - cluster.leader("calm", 0));
        cluster.cli().ok(&["partition", "reassign", "calm/0", "--replicas", &format!("{new},{old}")]);
        cluster.cli().ok(&["partition", "elect", "calm/0"]);
        eventually("the other one leads", || (cluster.leader("calm", 0) == new).then_some(()));
        cluster.in_sync("calm", 2);
        cluster
    });
    let cli = cluster.cli();
    let (leader, follower) = (cluster.leader("calm", 0), 3 - cluster.leader("calm", 0));
    let address = cluster.home(leader).grpc();
    let meta = Meta::of(&cluster.etcd).await;
    let id = meta.first_partition("calm").await;
    let follower_epoch = broker_epoch(cluster.home(follower).grpc()).await;
    let hello = |broker, broker_epoch| v1::Hello {
        cluster: "it".to_owned(),
        broker,
        broker_epoch,
        to: leader,
        version: 1,
        wall_ms: None,
    };
    let true_one = hello(follower, follower_epoch);
    let is_hello = |hello| Some(to_leader::Is::Hello(hello));
    let leave = v1::Leave { place: 0, known_epoch: 99, stopping: true };
    for (first, words) in [
        (is_hello(v1::Hello { cluster: "other".to_owned(), ..true_one.clone() }), "belongs to cluster \"it\""),
        (is_hello(v1::Hello { to: follower, ..true_one.clone() }), "was called"),
        (is_hello(v1::Hello { version: 7, ..true_one.clone() }), "version 7"),
        (is_hello(hello(leader, follower_epoch)), "calls itself"),
        (is_hello(hello(STRANGER, 5)), "broker 9 is not registered"),
        (is_hello(hello(follower, follower_epoch - 1)), "has registered as"),
        (Some(to_leader::Is::Leave(leave)), "begins with Hello"),
        (None, "begins with Hello"),
    ] {
        let said = Follows::begin(address, first).await.refused().await;
        assert!(said.contains(words), "{words}: {said}");
    }
    tokio::task::block_in_place(|| still_serves(&cli, "calm"));

    // From here on it is registered, and lies about partitions.
    let stranger = meta.register("127.0.0.1:9".parse().expect("an address")).await;
    let own = v1::Hello { wall_ms: Some(clock::wall_ms() - 605_000), ..hello(STRANGER, stranger) };
    let mut link = becomes("the leader knows the stranger", || async {
        let mut link = Follows::begin(address, is_hello(own.clone())).await;
        link.next().await.is_ok().then_some(link)
    })
    .await;
    let apart =
        || cluster.log(leader).lines().any(|line| line.contains("broker=9") && line.contains("seconds_ahead=-60"));
    assert!(apart(), "clocks that are ten minutes apart are said: {}", cluster.log(leader));
    let epoch = i32::try_from(meta.value(id).await.leader_epoch.0).expect("small");
    assert!(epoch > 0, "there is an older one");
    let join = |place, leader_epoch, end| v1::Join {
        place,
        topic_id: id.topic.to_string(),
        partition: 0,
        leader_epoch,
        last_epoch: (end > 0).then_some(leader_epoch),
        end,
        persisted: end,
    };
    for (place, (join, words)) in (0..).zip([
        (v1::Join { topic_id: "nonsense".to_owned(), ..join(0, epoch, 0) }, "is no UUID"),
        (v1::Join { partition: 7, ..join(0, epoch, 0) }, "no replica of partition"),
        (v1::Join { partition: -1, ..join(0, epoch, 0) }, "a partition's number"),
        (v1::Join { persisted: 3, ..join(0, epoch, 2) }, "above the written one"),
        (join(0, epoch - 1, 0), "wait for the newer"),
        (join(0, epoch + 1, 0), "wait for the newer"),
        (join(0, epoch, 0), "is no replica of the partition"),
    ]) {
        link.say(Some(to_leader::Is::Join(v1::Join { place, ..join }))).await;
        let answer = link.answer().await;
        assert_eq!(answer.place, place);
        assert!(refusal(&answer).contains(words), "{words}: {answer:?}");
    }
    let before = meta.value(id).await;

    // An operator wants it as a replica; it says that it has what it was never sent.
    let target = format!("{leader},{STRANGER}");
    tokio::task::block_in_place(|| cli.ok(&["partition", "reassign", "calm/0", "--replicas", &target]));
    let mut place = 10;
    let joins = async {
        loop {
            link.say(Some(to_leader::Is::Join(join(place, epoch, 0)))).await;
            if matches!(link.answer().await.is, Some(answer::Is::At(0))) {
                break;
            }
            place += 1;
        }
    };
    tokio::time::timeout(PATIENCE, joins).await.expect("the leader knows of the new replica");
    let progress = |place: u32, end: i64| v1::Progress { place: vec![place], written: vec![end], persisted: vec![end] };
    link.say(Some(to_leader::Is::Progress(progress(place, 1_000_000)))).await;
    let answer = link.answer().await;
    assert!(refusal(&answer).contains("offset 1000000 is acknowledged"), "{answer:?}");
    // A log that is longer than the leader's is told where to cut.
    link.say(Some(to_leader::Is::Join(join(place + 1, epoch, 1_000_000)))).await;
    let answer = link.answer().await;
    assert!(matches!(&answer.is, Some(answer::Is::Diverged(_))), "{answer:?}");
    let lists = v1::Progress { written: vec![], ..progress(place, 0) };
    link.say(Some(to_leader::Is::Progress(lists))).await;
    let said = link.refused().await;
    assert!(said.contains("lists of a progress"), "{said}");
    let mut link = Follows::begin(address, is_hello(own)).await;
    link.welcomed().await;
    link.say(None).await;
    let said = link.refused().await;
    assert!(said.contains("has no place here"), "{said}");

    tokio::task::block_in_place(|| still_serves(&cli, "calm"));
    let now = meta.value(id).await;
    assert_eq!((now.leader, now.leader_epoch, &now.isr), (before.leader, before.leader_epoch, &before.isr));
    assert_eq!(now.adding, [BrokerId(STRANGER)], "it was never in sync");
    tokio::task::block_in_place(|| cli.ok(&["partition", "reassign", "cancel", "calm/0"]));
    let read = tokio::task::block_in_place(|| cli.ok(&["consume", "calm", "--from", "earliest", "--until-end"]));
    assert_eq!(read.text(), "still here\n".repeat(2));
}

/// A stream that a real broker opened to the stranger.
struct Led {
    hello: v1::Hello,
    incoming: Streaming<v1::ToLeader>,
    outgoing: mpsc::Sender<Result<v1::ToFollower, Status>>,
}

impl Led {
    async fn say(&self, is: to_follower::Is) {
        // Who has hung up meanwhile does not hear it.
        let _gone = self.outgoing.send(Ok(v1::ToFollower { is: Some(is) })).await;
    }

    async fn next(&mut self) -> to_leader::Is {
        let next = tokio::time::timeout(PATIENCE, self.incoming.message()).await.expect("something comes");
        next.expect("the link stands").expect("the link stands").is.expect("it says something")
    }

    /// The next claim of the partition, whatever comes before it.
    async fn join(&mut self) -> v1::Join {
        loop {
            if let to_leader::Is::Join(join) = self.next().await {
                return join;
            }
        }
    }

    async fn answer(&self, join: &v1::Join, is: answer::Is) {
        let answer = v1::Answer { place: join.place, leader_epoch: join.leader_epoch, high_watermark: 0, is: Some(is) };
        self.say(to_follower::Is::Answer(answer)).await;
    }

    async fn send(&self, join: &v1::Join, piece_epoch: i32, bytes: Vec<u8>) {
        let base = i64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"));
        let chunks = vec![bytes.into()];
        let piece = v1::Piece { place: join.place, leader_epoch: piece_epoch, base, high_watermark: 0, chunks };
        self.say(to_follower::Is::Batches(v1::Batches { pieces: vec![piece] })).await;
    }
}

/// A leader's broker that is none: it hands the streams that come to the test.
#[derive(Clone)]
struct Stranger(mpsc::Sender<Led>, Tasks);

#[tonic::async_trait]
impl peer_server::Peer for Stranger {
    type ReplicateStream = ReceiverStream<Result<v1::ToFollower, Status>>;

    async fn replicate(
        &self,
        request: Request<Streaming<v1::ToLeader>>,
    ) -> Result<Response<Self::ReplicateStream>, Status> {
        let mut incoming = request.into_inner();
        let (outgoing, messages) = mpsc::channel(16);
        let streams = self.0.clone();
        // The answer begins before the first message comes.
        self.1.spawn("stream", async move {
            if let Ok(Some(v1::ToLeader { is: Some(to_leader::Is::Hello(hello)) })) = incoming.message().await {
                let _over = streams.send(Led { hello, incoming, outgoing }).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn who_is(&self, _: Request<v1::WhoIsRequest>) -> Result<Response<v1::WhoIsResponse>, Status> {
        let incarnation = "a stranger's".to_owned();
        Ok(Response::new(v1::WhoIsResponse {
            cluster: "it".to_owned(),
            broker: STRANGER,
            broker_epoch: None,
            incarnation,
        }))
    }

    async fn report_gone(&self, _: Request<v1::ReportGoneRequest>) -> Result<Response<v1::ReportGoneResponse>, Status> {
        Err(Status::unimplemented("a stranger"))
    }

    async fn marks(&self, _: Request<v1::MarksRequest>) -> Result<Response<v1::MarksResponse>, Status> {
        Err(Status::unimplemented("a stranger"))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        Err(Status::unimplemented("a stranger"))
    }
}

/// Serves as a stranger's broker. The task ends with the test's runtime.
async fn stranger(tasks: &Tasks) -> (SocketAddr, mpsc::Receiver<Led>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("it is bound");
    let (streams, led) = mpsc::channel(16);
    let server =
        tonic::transport::Server::builder().add_service(peer_server::PeerServer::new(Stranger(streams, tasks.clone())));
    let stop = tasks.clone();
    tasks.spawn("stranger", async move {
        tokio::select! {
            () = stop.cancelled() => {}
            served = server.serve_with_incoming(TcpListenerStream::new(listener)) => served.expect("it serves"),
        }
    });
    (address, led)
}

/// The next stream that a broker opens.
async fn called(streams: &mut mpsc::Receiver<Led>) -> Led {
    tokio::time::timeout(PATIENCE, streams.recv()).await.expect("the broker comes").expect("the stranger listens")
}

/// A batch of one record at this offset, of this epoch.
fn batch_at(base: i64, epoch: i32) -> Vec<u8> {
    let mut batch = wire::batch(&[b"from a stranger"]);
    batch[..8].copy_from_slice(&base.to_be_bytes());
    batch[12..16].copy_from_slice(&epoch.to_be_bytes());
    batch
}

async fn says(home: &Home, words: &str) {
    becomes(words, || async { home.log().contains(words).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_that_leads_is_copied_from_only_where_all_fits() {
    let (etcd, tasks) = (tokio::task::block_in_place(|| etcd(1)), Tasks::new());
    let mut home = Home::member(1, &etcd);
    let broker = tokio::task::block_in_place(|| home.start());
    let cli = home.cli();
    tokio::task::block_in_place(|| {
        cli.ok(&["topic", "create", "t"]);
        cli.ok(&["topic", "create", "calm"]);
        cli.ok_with(&["produce", "t"], b"0\n1\n2\n3\n4\n");
    });
    let meta = Meta::of(&etcd).await;
    let id = meta.first_partition("t").await;
    let (address, mut streams) = stranger(&tasks).await;
    let registered = meta.register(address).await;
    let epoch = meta.usurp("t").await.as_i32();
    let welcome = |broker, broker_epoch| {
        let wall_ms = Some(clock::wall_ms() + 605_000);
        to_follower::Is::Welcome(v1::Welcome { broker, broker_epoch, wall_ms })
    };
    let nothing = to_follower::Is::Batches(v1::Batches::default());
    for (first, words) in [
        (nothing, "it has not said hello"),
        (welcome(4, registered), "broker 4 answers there"),
        (welcome(STRANGER, registered - 1), "it runs in an older uptime"),
    ] {
        let led = called(&mut streams).await;
        assert_eq!((led.hello.broker, led.hello.to, led.hello.cluster.as_str()), (1, STRANGER, "it"));
        led.say(first).await;
        says(&home, words).await;
    }
    let mut led = called(&mut streams).await;
    led.say(welcome(STRANGER, registered)).await;
    says(&home, "seconds_ahead=60").await;

    let flipped = |mut batch: Vec<u8>| {
        *batch.last_mut().expect("bytes") ^= 1;
        batch
    };
    let half = batch_at(5, epoch)[..40].to_vec();
    for (bytes, piece_epoch, words) in [
        (flipped(batch_at(5, epoch)), epoch, "are malformed"),
        (half, epoch, "are malformed"),
        (batch_at(7, epoch), epoch, "offsets are missing: 5 is next, the leader sent 7"),
        (batch_at(3, epoch), epoch, "offsets overlap: 5 is next, the leader sent 3"),
        (batch_at(5, epoch + 1), epoch, "above its leader's"),
        (batch_at(5, epoch), epoch - 1, "where epoch"),
        (batch_at(5, epoch), epoch + 1, "where epoch"),
    ] {
        let join = led.join().await;
        assert_eq!((join.end, join.last_epoch, join.leader_epoch), (5, Some(0), epoch), "{words}");
        let said = home.log().matches(words).count();
        led.answer(&join, answer::Is::At(5)).await;
        led.send(&join, piece_epoch, bytes).await;
        becomes(words, || async { (home.log().matches(words).count() > said).then_some(()) }).await;
    }
    let join = led.join().await;
    led.answer(&join, answer::Is::At(3)).await;
    says(&home, "an offset to go on at is 3, and 5 was asked for").await;
    assert_eq!(log_end(home.grpc(), id).await, 5, "nothing of it was appended");
    tokio::task::block_in_place(|| still_serves(&cli, "calm"));

    // What fits is taken, and only that.
    let join = led.join().await;
    led.answer(&join, answer::Is::At(5)).await;
    led.send(&join, epoch, batch_at(5, epoch)).await;
    loop {
        if let to_leader::Is::Progress(progress) = led.next().await
            && progress.persisted == [6]
        {
            break;
        }
    }
    led.send(&join, epoch, batch_at(6, epoch - 1)).await;
    says(&home, "falls from").await;
    let join = led.join().await;
    assert_eq!((join.end, join.last_epoch), (6, Some(epoch)));
    // It is to cut what it knows as committed: it keeps it, and follows nobody.
    led.answer(&join, answer::Is::Diverged(v1::Diverged { epoch: 0, end: 2 })).await;
    says(&home, "the replica follows nobody until another leads").await;
    assert_eq!(log_end(home.grpc(), id).await, 6);
    tokio::task::block_in_place(|| still_serves(&cli, "calm"));
    drop(led);
    tasks.stop().await;
    tokio::task::block_in_place(|| assert!(broker.terminate().success(), "{}", home.log()));
}

/// Bytes change on their way between two real brokers. Every batch that came damaged is sent again, and none is stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_damaged_on_its_way_to_a_follower_is_sent_again() {
    let (mut cluster, mut links) = (tokio::task::block_in_place(|| Cluster::over(Etcd::begin(3, "http", &[]))), vec![]);
    let bucket = tempfile::tempdir().expect("a folder");
    for id in 1..=2 {
        let proxy = Proxy::bind().await;
        let home = Home::member(id, &cluster.etcd).bucket_of(bucket.path()).advertise(proxy.address());
        links.push(proxy.carry_to(home.grpc()));
        cluster.add(id, home);
    }
    let expected = tokio::task::block_in_place(|| {
        cluster.ready();
        let create = ["topic", "create", "t", "--replication-factor", "2", "--config", "min.insync.replicas=2"];
        cluster.cli().ok(&create);
        cluster.in_sync("t", 2);
        let (leader, follower) = (cluster.leader("t", 0), 3 - cluster.leader("t", 0));
        let filler = String::from_utf8(vec![FILLER; 2000]).expect("text");
        let lines: String = (0..400).map(|line| format!("{line} {filler}\n")).collect();
        links[leader as usize - 1].damage(true);
        for chunk in lines.lines().collect::<Vec<_>>().chunks(20) {
            let text = chunk.join("\n") + "\n";
            cluster.cli().ok_with(&["produce", "t"], text.as_bytes());
        }
        links[leader as usize - 1].damage(false);
        let log = cluster.log(follower);
        assert!(log.contains("replication from the leader is interrupted") && log.contains("are malformed"), "{log}");
        cluster.in_sync("t", 2);
        // What was acknowledged the follower has, byte for byte.
        cluster.cli().ok(&["topic", "alter", "t", "--config", "min.insync.replicas=1"]);
        cluster.kill(leader);
        lines
    });
    let cli = cluster.cli();
    let read = tokio::task::block_in_place(|| {
        eventually("the follower leads", || {
            let read = cli.run(&["consume", "t", "--from", "earliest", "--until-end"]);
            (read.code == 0).then(|| read.text())
        })
    });
    assert!(read == expected, "{} bytes of {}", read.len(), expected.len());
    for link in &links {
        tokio::time::timeout(Duration::from_secs(5), link.stop()).await.expect("it ends");
    }
}
