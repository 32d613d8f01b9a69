//! A fake leader: streams that a real broker opens to it.

use std::net::SocketAddr;

use strandline::{
    model::PartitionId,
    proto::v1::{self, peer_server, replicate_request, replicate_response, subscribe_response},
    task::{Tasks, clock},
};
use tokio::{net::TcpListener, sync::mpsc, task::block_in_place};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use super::{FAKE_BROKER, Meta, append_record, peer};
use crate::{
    broker::BrokerInstance,
    cluster::members::etcd,
    test_timeout::{TEST_TIMEOUT, eventually_async},
    wire,
};

/// Returns the log end of a broker's replica.
async fn log_end(address: SocketAddr, id: PartitionId) -> i64 {
    let name = v1::TopicIdPartition {
        topic_id: id.topic.to_string(),
        partition: i32::try_from(id.number).expect("the number is small"),
    };
    let replica = peer(address)
        .await
        .describe_replicas(v1::DescribeReplicasRequest { replicas: vec![name] })
        .await
        .expect("the broker responds");
    let replica = replica.into_inner().replicas.remove(0);
    assert!(replica.exists, "the broker has the replica");
    replica.log_end
}

/// A stream that a real broker opened to the fake leader.
struct LeaderStream {
    hello: v1::Hello,
    incoming: Streaming<v1::ReplicateRequest>,
    outgoing: mpsc::Sender<Result<v1::ReplicateResponse, Status>>,
}

impl LeaderStream {
    async fn send(&self, message: replicate_response::Message) {
        // A broker that has closed the stream does not receive the message.
        let _closed =
            self.outgoing.send(Ok(v1::ReplicateResponse { message: Some(message), ..Default::default() })).await;
    }

    async fn next(&mut self) -> replicate_request::Message {
        let next =
            tokio::time::timeout(TEST_TIMEOUT, self.incoming.message()).await.expect("a message within the timeout");
        next.expect("the link is open").expect("the link is open").message.expect("the message is set")
    }

    /// Returns the next subscription of the partition. Skips other messages before it.
    async fn subscription(&mut self) -> v1::Subscribe {
        loop {
            if let replicate_request::Message::Subscribe(subscription) = self.next().await {
                return subscription;
            }
        }
    }

    async fn respond(&self, subscription: &v1::Subscribe, message: subscribe_response::Outcome) {
        let response = v1::SubscribeResponse {
            subscription_id: subscription.subscription_id,
            leader_epoch: subscription.leader_epoch,
            high_watermark: 0,
            outcome: Some(message),
        };
        self.send(replicate_response::Message::SubscribeResponse(response)).await;
    }

    async fn send_batch(&self, subscription: &v1::Subscribe, batch_epoch: i32, bytes: Vec<u8>) {
        let base = i64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"));
        let chunks = vec![bytes.into()];
        let batches = v1::PartitionBatches {
            subscription_id: subscription.subscription_id,
            leader_epoch: batch_epoch,
            base,
            high_watermark: 0,
            chunks,
        };
        self.send(replicate_response::Message::Batches(v1::Batches { partitions: vec![batches] })).await;
    }
}

/// The peer server of the fake leader. It sends each stream whose first message is `Hello` to the test.
#[derive(Clone)]
struct ScriptedLeader(mpsc::Sender<LeaderStream>, Tasks);

#[tonic::async_trait]
impl peer_server::Peer for ScriptedLeader {
    type ReplicateStream = ReceiverStream<Result<v1::ReplicateResponse, Status>>;

    async fn replicate(
        &self,
        request: Request<Streaming<v1::ReplicateRequest>>,
    ) -> Result<Response<Self::ReplicateStream>, Status> {
        let mut incoming = request.into_inner();
        let (outgoing, messages) = mpsc::channel(16);
        let streams = self.0.clone();
        // A task waits for the first message, because the response must start before that message arrives.
        self.1.spawn("stream", async move {
            if let Ok(Some(v1::ReplicateRequest { message: Some(replicate_request::Message::Hello(hello)), .. })) =
                incoming.message().await
            {
                let _ended = streams.send(LeaderStream { hello, incoming, outgoing }).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn get_identity(
        &self,
        _: Request<v1::GetIdentityRequest>,
    ) -> Result<Response<v1::GetIdentityResponse>, Status> {
        let incarnation = "a scripted leader's".to_owned();
        Ok(Response::new(v1::GetIdentityResponse {
            cluster: "it".to_owned(),
            broker_id: FAKE_BROKER,
            broker_epoch: None,
            incarnation,
        }))
    }

    async fn report_failure(
        &self,
        _: Request<v1::ReportFailureRequest>,
    ) -> Result<Response<v1::ReportFailureResponse>, Status> {
        Err(Status::unimplemented("a scripted leader"))
    }

    async fn describe_replicas(
        &self,
        _: Request<v1::DescribeReplicasRequest>,
    ) -> Result<Response<v1::DescribeReplicasResponse>, Status> {
        Err(Status::unimplemented("a scripted leader"))
    }

    async fn get_broker_stats(
        &self,
        _: Request<v1::GetBrokerStatsRequest>,
    ) -> Result<Response<v1::GetBrokerStatsResponse>, Status> {
        Err(Status::unimplemented("a scripted leader"))
    }
}

/// Starts the peer server of the fake leader, until `tasks` are stopped. Returns its address and a receiver of its
/// streams.
async fn serve_scripted_leader(tasks: &Tasks) -> (SocketAddr, mpsc::Receiver<LeaderStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("the listener is bound");
    let (streams, receiver) = mpsc::channel(16);
    let server = tonic::transport::Server::builder()
        .add_service(peer_server::PeerServer::new(ScriptedLeader(streams, tasks.clone())));
    let stop = tasks.clone();
    tasks.spawn("scripted-leader", async move {
        tokio::select! {
            () = stop.cancelled() => {}
            served = server.serve_with_incoming(TcpListenerStream::new(listener)) => served.expect("the server runs"),
        }
    });
    (address, receiver)
}

/// Returns the next stream that a broker opens.
async fn next_stream(streams: &mut mpsc::Receiver<LeaderStream>) -> LeaderStream {
    tokio::time::timeout(TEST_TIMEOUT, streams.recv())
        .await
        .expect("the broker opens a stream")
        .expect("the scripted leader is running")
}

/// Returns a batch of one record at this offset, in this epoch.
fn batch_at(base: i64, epoch: i32) -> Vec<u8> {
    let mut batch = wire::batch(&[b"from a scripted leader"]);
    batch[..8].copy_from_slice(&base.to_be_bytes());
    batch[12..16].copy_from_slice(&epoch.to_be_bytes());
    batch
}

/// A real broker that follows the fake leader in one partition. Its log holds five records of epoch 0.
struct Follower {
    instance: BrokerInstance,
    epoch: i32,
}

impl Follower {
    /// Waits until the broker's log contains `text` more than `count` times.
    async fn wait_for_log_again(&self, text: &str, count: usize) {
        eventually_async(text, async || (self.instance.log().matches(text).count() > count).then_some(())).await;
    }

    /// Waits until the broker's log contains `text`.
    async fn wait_for_log(&self, text: &str) {
        eventually_async(text, async || self.instance.log().contains(text).then_some(())).await;
    }

    /// Checks that the broker refuses a first message that is no `Welcome`, and a `Welcome` of another broker or broker
    /// epoch than the registered one.
    async fn check_welcomes_refused(&self, streams: &mut mpsc::Receiver<LeaderStream>, registered: u64) {
        let nothing = replicate_response::Message::Batches(v1::Batches::default());
        for (first, text) in [
            (nothing, "the first message of the peer is not Welcome"),
            (welcome(4, registered), "broker 4 responds at this address"),
            (welcome(FAKE_BROKER, registered - 1), "is registered with the later epoch"),
            (welcome(FAKE_BROKER, 1 << 63), "is not registered with broker epoch 9223372036854775808"),
        ] {
            let stream = next_stream(streams).await;
            assert_eq!(
                (stream.hello.broker_id, stream.hello.target_broker, stream.hello.cluster.as_str()),
                (1, FAKE_BROKER, "it")
            );
            stream.send(first).await;
            self.wait_for_log(text).await;
        }
    }

    /// Checks that the broker refuses a batch that is corrupt, leaves a gap, overlaps its log, or is of another epoch.
    /// Then checks that it refuses an accepted offset that differs from its log end.
    async fn check_batches_refused(&self, stream: &mut LeaderStream) {
        let epoch = self.epoch;
        let mut flipped = batch_at(5, epoch);
        *flipped.last_mut().expect("bytes") ^= 1;
        let half = batch_at(5, epoch)[..40].to_vec();
        for (bytes, batch_epoch, text) in [
            (flipped, epoch, "are malformed"),
            (half, epoch, "are malformed"),
            (batch_at(7, epoch), epoch, "offsets are missing: offset 5 is next, and the leader sent offset 7"),
            (
                batch_at(3, epoch),
                epoch,
                "offsets overlap, or a batch is empty: offset 5 is next, and the leader sent offset 3",
            ),
            (batch_at(5, epoch + 1), epoch, "of the leader that sent it"),
            (batch_at(5, epoch), epoch - 1, "and the subscription has epoch"),
            (batch_at(5, epoch), epoch + 1, "and the subscription has epoch"),
        ] {
            let subscription = stream.subscription().await;
            assert_eq!(
                (subscription.log_end, subscription.last_epoch, subscription.leader_epoch),
                (5, Some(0), epoch),
                "{text}"
            );
            let count = self.instance.log().matches(text).count();
            stream.respond(&subscription, subscribe_response::Outcome::AcceptedAt(5)).await;
            stream.send_batch(&subscription, batch_epoch, bytes).await;
            self.wait_for_log_again(text, count).await;
        }
        let subscription = stream.subscription().await;
        stream.respond(&subscription, subscribe_response::Outcome::AcceptedAt(3)).await;
        self.wait_for_log("the accepted offset is 3 instead of 5").await;
    }

    /// Sends a valid batch, which is appended. Then sends a batch of an older epoch and a truncation of committed
    /// records, which are refused.
    async fn check_valid_batch_accepted(&self, stream: &mut LeaderStream) {
        let epoch = self.epoch;
        let subscription = stream.subscription().await;
        stream.respond(&subscription, subscribe_response::Outcome::AcceptedAt(5)).await;
        stream.send_batch(&subscription, epoch, batch_at(5, epoch)).await;
        loop {
            if let replicate_request::Message::Progress(progress) = stream.next().await
                && progress.persisted_end == [6]
            {
                break;
            }
        }
        stream.send_batch(&subscription, epoch, batch_at(6, epoch - 1)).await;
        self.wait_for_log("older than leader epoch").await;
        let subscription = stream.subscription().await;
        assert_eq!((subscription.log_end, subscription.last_epoch), (6, Some(epoch)));
        // The truncation would remove committed records. The replica keeps them and follows no leader until the next
        // epoch.
        stream.respond(&subscription, subscribe_response::Outcome::Diverged(v1::Diverged { epoch: 0, end: 2 })).await;
        self.wait_for_log("the replica stops copying until another broker leads").await;
    }
}

/// Returns the fake leader's `Welcome`, with a clock that is ten minutes ahead.
fn welcome(broker: u32, broker_epoch: u64) -> replicate_response::Message {
    let wall_ms = Some(clock::wall_ms() + 605_000);
    replicate_response::Message::Welcome(v1::Welcome { broker_id: broker, broker_epoch, wall_clock_ms: wall_ms })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn follower_copies_only_valid_batches_of_fake_leader() {
    let (etcd, tasks) = (block_in_place(|| etcd(1)), Tasks::new());
    // At the level debug, the broker logs every start and end of a link or subscription, not only one per minute.
    let level = "\"info,strandline::broker=debug,strandline::partition=debug\"";
    let mut instance = BrokerInstance::member(1, &etcd).setting("telemetry.level", level);
    let broker = block_in_place(|| instance.start());
    let cli = instance.cli();
    block_in_place(|| {
        cli.ok(&["topic", "create", "t"]);
        cli.ok(&["topic", "create", "calm"]);
        cli.ok_with(&["produce", "t"], b"0\n1\n2\n3\n4\n");
    });
    let meta = Meta::of(&etcd).await;
    let id = meta.first_partition("t").await;
    let (address, mut streams) = serve_scripted_leader(&tasks).await;
    let registered = meta.register(address).await;
    let epoch = meta.take_leadership("t").await.as_i32();
    let follower = Follower { instance, epoch };
    follower.check_welcomes_refused(&mut streams, registered).await;
    let mut stream = next_stream(&mut streams).await;
    stream.send(welcome(FAKE_BROKER, registered)).await;
    follower.wait_for_log("seconds_ahead=60").await;

    follower.check_batches_refused(&mut stream).await;
    assert_eq!(log_end(follower.instance.peer(), id).await, 5, "no invalid batch was appended");
    block_in_place(|| append_record(&cli, "calm"));
    follower.check_valid_batch_accepted(&mut stream).await;
    assert_eq!(log_end(follower.instance.peer(), id).await, 6);
    block_in_place(|| append_record(&cli, "calm"));
    drop(stream);
    tasks.stop().await;
    block_in_place(|| assert!(broker.terminate().success(), "{}", follower.instance.log()));
}
