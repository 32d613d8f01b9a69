//! A fake leader: streams that a real broker opens to it.

use std::net::SocketAddr;

use strandline::{
    model::PartitionId,
    proto::v1::{self, answer, peer_server, to_follower, to_leader},
    task::{Tasks, clock},
};
use tokio::{net::TcpListener, sync::mpsc, task::block_in_place};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use super::{Meta, STRANGER, peer, still_serves};
use crate::{
    broker::Home,
    cluster::members::etcd,
    test_timeout::{TEST_TIMEOUT, eventually_async},
    wire,
};

/// Returns the log end of a replica at a broker.
async fn log_end(address: SocketAddr, id: PartitionId) -> i64 {
    let name = v1::ReplicaName { topic_id: id.topic.to_string(), partition: i32::try_from(id.number).expect("few") };
    let marks = peer(address).await.marks(v1::MarksRequest { replicas: vec![name] }).await.expect("it answers");
    let marks = marks.into_inner().replicas.remove(0);
    assert!(marks.here, "it has the replica");
    marks.log_end
}

/// A stream that a real broker opened to the fake leader.
struct Led {
    hello: v1::Hello,
    incoming: Streaming<v1::ToLeader>,
    outgoing: mpsc::Sender<Result<v1::ToFollower, Status>>,
}

impl Led {
    async fn say(&self, is: to_follower::Is) {
        // A broker that has closed the stream does not receive the message.
        let _gone = self.outgoing.send(Ok(v1::ToFollower { is: Some(is), ..Default::default() })).await;
    }

    async fn next(&mut self) -> to_leader::Is {
        let next = tokio::time::timeout(TEST_TIMEOUT, self.incoming.message()).await.expect("something comes");
        next.expect("the link stands").expect("the link stands").is.expect("it says something")
    }

    /// Returns the next subscription of the partition. Skips other messages before it.
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

/// A fake leader's broker. It passes incoming streams to the test.
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
        // The response starts before the first message arrives.
        self.1.spawn("stream", async move {
            if let Ok(Some(v1::ToLeader { is: Some(to_leader::Is::Hello(hello)), .. })) = incoming.message().await {
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

/// Serves as the fake leader's broker. The server ends with `tasks`.
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

/// Returns the next stream that a broker opens.
async fn called(streams: &mut mpsc::Receiver<Led>) -> Led {
    tokio::time::timeout(TEST_TIMEOUT, streams.recv()).await.expect("the broker comes").expect("the stranger listens")
}

/// Returns a batch of one record at this offset, in this epoch.
fn batch_at(base: i64, epoch: i32) -> Vec<u8> {
    let mut batch = wire::batch(&[b"from a stranger"]);
    batch[..8].copy_from_slice(&base.to_be_bytes());
    batch[12..16].copy_from_slice(&epoch.to_be_bytes());
    batch
}

/// A real broker whose partition the fake leader leads, with five records of the epoch before.
struct Follower {
    home: Home,
    epoch: i32,
}

impl Follower {
    /// Waits until the broker's log contains `words` more than `said` times.
    async fn says_again(&self, words: &str, said: usize) {
        eventually_async(words, async || (self.home.log().matches(words).count() > said).then_some(())).await;
    }

    async fn says(&self, words: &str) {
        eventually_async(words, async || self.home.log().contains(words).then_some(())).await;
    }

    /// Checks that a `Welcome` is refused unless its sender is the called broker, in its registered broker epoch.
    async fn refuses_welcomes(&self, streams: &mut mpsc::Receiver<Led>, registered: u64) {
        let nothing = to_follower::Is::Batches(v1::Batches::default());
        for (first, words) in [
            (nothing, "it has not said hello"),
            (welcome(4, registered), "broker 4 answers there"),
            (welcome(STRANGER, registered - 1), "and has registered as"),
            (welcome(STRANGER, 1 << 63), "is not registered in the uptime 9223372036854775808"),
        ] {
            let led = called(streams).await;
            assert_eq!((led.hello.broker, led.hello.to, led.hello.cluster.as_str()), (1, STRANGER, "it"));
            led.say(first).await;
            self.says(words).await;
        }
    }

    /// Checks that a batch is refused if it is corrupt, leaves a gap, overlaps, or is of another epoch.
    async fn refuses_batches(&self, led: &mut Led) {
        let epoch = self.epoch;
        let mut flipped = batch_at(5, epoch);
        *flipped.last_mut().expect("bytes") ^= 1;
        let half = batch_at(5, epoch)[..40].to_vec();
        for (bytes, piece_epoch, words) in [
            (flipped, epoch, "are malformed"),
            (half, epoch, "are malformed"),
            (batch_at(7, epoch), epoch, "offsets are missing: 5 is next, the leader sent 7"),
            (batch_at(3, epoch), epoch, "offsets overlap: 5 is next, the leader sent 3"),
            (batch_at(5, epoch + 1), epoch, "above its leader's"),
            (batch_at(5, epoch), epoch - 1, "where epoch"),
            (batch_at(5, epoch), epoch + 1, "where epoch"),
        ] {
            let join = led.join().await;
            assert_eq!((join.end, join.last_epoch, join.leader_epoch), (5, Some(0), epoch), "{words}");
            let said = self.home.log().matches(words).count();
            led.answer(&join, answer::Is::At(5)).await;
            led.send(&join, piece_epoch, bytes).await;
            self.says_again(words, said).await;
        }
        let join = led.join().await;
        led.answer(&join, answer::Is::At(3)).await;
        self.says("an offset to go on at is 3, and 5 was asked for").await;
    }

    /// Sends a valid batch, which is appended. Then sends a batch of an older epoch and a truncation, which are refused.
    async fn takes_what_fits(&self, led: &mut Led) {
        let epoch = self.epoch;
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
        self.says("falls from").await;
        let join = led.join().await;
        assert_eq!((join.end, join.last_epoch), (6, Some(epoch)));
        // The truncation would remove committed records. The replica keeps them and follows no leader.
        led.answer(&join, answer::Is::Diverged(v1::Diverged { epoch: 0, end: 2 })).await;
        self.says("the replica follows nobody until another leads").await;
    }
}

/// Returns the fake leader's `Welcome`, with a clock that is ten minutes ahead.
fn welcome(broker: u32, broker_epoch: u64) -> to_follower::Is {
    let wall_ms = Some(clock::wall_ms() + 605_000);
    to_follower::Is::Welcome(v1::Welcome { broker, broker_epoch, wall_ms })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn follower_copies_only_valid_batches_of_fake_leader() {
    let (etcd, tasks) = (block_in_place(|| etcd(1)), Tasks::new());
    // Links and subscriptions that start and end are logged once a minute, and each of them at the level debug.
    let level = "\"info,strandline::broker=debug,strandline::partition=debug\"";
    let mut home = Home::member(1, &etcd).setting("telemetry.level", level);
    let broker = block_in_place(|| home.start());
    let cli = home.cli();
    block_in_place(|| {
        cli.ok(&["topic", "create", "t"]);
        cli.ok(&["topic", "create", "calm"]);
        cli.ok_with(&["produce", "t"], b"0\n1\n2\n3\n4\n");
    });
    let meta = Meta::of(&etcd).await;
    let id = meta.first_partition("t").await;
    let (address, mut streams) = stranger(&tasks).await;
    let registered = meta.register(address).await;
    let epoch = meta.usurp("t").await.as_i32();
    let follower = Follower { home, epoch };
    follower.refuses_welcomes(&mut streams, registered).await;
    let mut led = called(&mut streams).await;
    led.say(welcome(STRANGER, registered)).await;
    follower.says("seconds_ahead=60").await;

    follower.refuses_batches(&mut led).await;
    assert_eq!(log_end(follower.home.peer(), id).await, 5, "nothing of it was appended");
    block_in_place(|| still_serves(&cli, "calm"));
    follower.takes_what_fits(&mut led).await;
    assert_eq!(log_end(follower.home.peer(), id).await, 6);
    block_in_place(|| still_serves(&cli, "calm"));
    drop(led);
    tasks.stop().await;
    block_in_place(|| assert!(broker.terminate().success(), "{}", follower.home.log()));
}
