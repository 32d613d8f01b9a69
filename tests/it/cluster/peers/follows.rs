//! A fake follower: streams to a real broker.

use std::{net::SocketAddr, time::Duration};

use strandline::{
    cluster::Endpoints,
    model::{BrokerId, PartitionId},
    proto::v1::{self, replicate_request, replicate_response, subscribe_response},
    task::clock,
};
use tokio::{sync::mpsc, task::block_in_place};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{FAKE_BROKER, Meta, append_record, broker_epoch, peer};
use crate::{
    broker::BrokerInstance,
    cluster::members::Cluster,
    test_timeout::{TEST_TIMEOUT, eventually, eventually_async},
    wire,
};

/// A stream to a broker, as a follower's broker opens it.
struct FollowerStream {
    sender: mpsc::Sender<v1::ReplicateRequest>,
    receiver: Streaming<v1::ReplicateResponse>,
}

impl FollowerStream {
    /// Opens a stream and sends its first message. `None` sends a request without a message.
    async fn begin(address: SocketAddr, first: Option<replicate_request::Message>) -> Self {
        let (sender, messages) = mpsc::channel(16);
        sender
            .send(v1::ReplicateRequest { message: first, ..Default::default() })
            .await
            .expect("the channel has capacity");
        let stream = peer(address).await.replicate(ReceiverStream::new(messages)).await.expect("a stream");
        Self { sender, receiver: stream.into_inner() }
    }

    async fn send(&self, message: Option<replicate_request::Message>) {
        self.sender.send(v1::ReplicateRequest { message, ..Default::default() }).await.expect("the stream is open");
    }

    async fn next(&mut self) -> Result<v1::ReplicateResponse, Status> {
        let next =
            tokio::time::timeout(TEST_TIMEOUT, self.receiver.message()).await.expect("a message within the timeout");
        next.map(|message| message.expect("the stream ends with a status"))
    }

    /// Waits for `Welcome`, which must be the first response.
    async fn wait_for_welcome(&mut self) {
        let first = self.next().await.expect("the request succeeds");
        assert!(matches!(first.message, Some(replicate_response::Message::Welcome(_))), "{first:?}");
    }

    /// Returns the response to a subscription. Skips other messages before it.
    async fn subscribe_response(&mut self) -> v1::SubscribeResponse {
        loop {
            if let Some(replicate_response::Message::SubscribeResponse(response)) =
                self.next().await.expect("the link is open").message
            {
                return response;
            }
        }
    }

    /// Waits until the stream ends with an error, and returns its message.
    async fn wait_for_error(&mut self) -> String {
        loop {
            if let Err(status) = self.next().await {
                return status.message().to_owned();
            }
        }
    }
}

/// Returns the error message of a response that refuses a subscription.
fn refusal(response: &v1::SubscribeResponse) -> &str {
    match &response.outcome {
        Some(subscribe_response::Outcome::Error(error)) => &error.message,
        other => panic!("not refused: {other:?}"),
    }
}

/// Two brokers with one partition, whose replicas are in sync. The leader epoch of the partition is above 0, so that an
/// older epoch exists.
struct IdleCluster {
    cluster: Cluster,
    meta: Meta,
    id: PartitionId,
    leader: u32,
    follower: u32,
    epoch: i32,
}

impl IdleCluster {
    async fn begin() -> Self {
        // A lease that is longer than a test freezes a broker.
        let settings = |instance: BrokerInstance| instance.setting("metadata.session_timeout", "\"15s\"");
        let (cluster, leader) = block_in_place(|| {
            let cluster = Cluster::with(2, settings);
            let create = ["topic", "create", "calm", "--replication-factor", "2", "--config", "min.insync.replicas=2"];
            cluster.cli().ok(&create);
            cluster.wait_until_in_sync("calm", 2);
            let (old, new) = (cluster.leader("calm", 0), 3 - cluster.leader("calm", 0));
            cluster.cli().ok(&["partition", "reassign", "calm/0", "--replicas", &format!("{new},{old}")]);
            cluster.cli().ok(&["partition", "elect", "calm/0"]);
            eventually("the other broker leads", || (cluster.leader("calm", 0) == new).then_some(()));
            cluster.wait_until_in_sync("calm", 2);
            (cluster, new)
        });
        let meta = Meta::of(&cluster.etcd).await;
        let id = meta.first_partition("calm").await;
        let epoch = meta.value(id).await.leader_epoch.as_i32();
        assert!(epoch > 0, "an older epoch exists");
        Self { cluster, meta, id, leader, follower: 3 - leader, epoch }
    }

    /// Returns the address of the leader's peer listener.
    fn address(&self) -> SocketAddr {
        self.cluster.instance(self.leader).peer()
    }

    fn append(&self) {
        block_in_place(|| append_record(&self.cluster.cli(), "calm"));
    }

    fn hello(&self, broker: u32, broker_epoch: u64) -> v1::Hello {
        let (cluster, to) = ("it".to_owned(), self.leader);
        v1::Hello { cluster, broker_id: broker, broker_epoch, target_broker: to, version: 1, wall_clock_ms: None }
    }

    /// Returns a subscription whose log ends at `end`, with a last record of `leader_epoch`.
    fn subscription(&self, subscription_id: u32, leader_epoch: i32, end: i64) -> v1::Subscribe {
        let last_epoch = (end > 0).then_some(leader_epoch);
        let topic_id = self.id.topic.to_string();
        v1::Subscribe {
            subscription_id,
            topic_id,
            partition: 0,
            leader_epoch,
            last_epoch,
            log_end: end,
            persisted_end: end,
            removal_count: None,
        }
    }

    /// Checks that the leader refuses an invalid `Hello`, a `Hello` with an unregistered broker or broker epoch, and
    /// another first message.
    async fn check_hellos_refused(&self) {
        let (leader, follower) = (self.leader, self.follower);
        let epoch = broker_epoch(self.cluster.instance(follower).peer()).await;
        let valid = self.hello(follower, epoch);
        let is_hello = |hello| Some(replicate_request::Message::Hello(hello));
        let unsubscribe = v1::Unsubscribe { subscription_id: 0, known_epoch: 99, stopping: true };
        for (first, text) in [
            (is_hello(v1::Hello { cluster: "other".to_owned(), ..valid.clone() }), "belongs to cluster \"it\""),
            (is_hello(v1::Hello { target_broker: follower, ..valid.clone() }), "this is broker "),
            (is_hello(v1::Hello { version: 7, ..valid }), "version 7"),
            (is_hello(self.hello(leader, epoch)), "connects to itself"),
            (is_hello(self.hello(FAKE_BROKER, 5)), "broker 9 is not registered"),
            (is_hello(self.hello(follower, epoch - 1)), "is registered with the later epoch"),
            (is_hello(self.hello(follower, 1 << 63)), "is not registered with broker epoch 9223372036854775808"),
            (Some(replicate_request::Message::Unsubscribe(unsubscribe)), "is not Hello"),
            (None, "is not Hello"),
        ] {
            let output = FollowerStream::begin(self.address(), first).await.wait_for_error().await;
            assert!(output.contains(text), "{text}: {output}");
        }
    }

    /// Checks that the port for clients refuses the peer protocol, and the port for peers refuses requests of clients.
    async fn check_wrong_port_refused(&self) {
        let instance = self.cluster.instance(self.leader);
        let identity =
            peer(instance.grpc()).await.get_identity(v1::GetIdentityRequest {}).await.expect_err("a port of clients");
        let described = wire::admin(instance.peer()).get_metadata(v1::GetMetadataRequest::default()).await;
        for (refused, text) in [
            (identity, "this port is for clients (grpc.listen): other brokers connect to peer.listen"),
            (
                described.expect_err("a port of brokers"),
                "this port is for other brokers (peer.listen): clients connect to grpc.listen",
            ),
        ] {
            assert_eq!((refused.code(), refused.message()), (Code::Unimplemented, text));
        }
    }

    /// Checks that the log and `cluster describe` report a broker that registered without an address for peers, as
    /// another version may do.
    async fn check_unreachable_broker_reported(&self) {
        self.meta.register_at(Endpoints::new("127.0.0.1:9".to_owned())).await;
        let cli = self.cluster.cli();
        let lines = || {
            let log = self.cluster.log(self.leader);
            log.lines()
                .filter(|line| line.contains("broker=9") && line.contains("registered without a peer address"))
                .count()
        };
        block_in_place(|| {
            eventually("the leader logs a warning", || (lines() > 0).then_some(()));
            eventually("the description contains the broker", || {
                let described = cli.ok(&["cluster", "describe"]).text();
                described.contains("broker 9 is registered without a peer address").then_some(())
            });
            assert_eq!(lines(), 1, "{}", self.cluster.log(self.leader));
        });
        // Deleted, so that the next registration creates the key: its create revision is the broker epoch.
        self.meta.unregister().await;
    }

    /// Checks that invalid subscriptions of a registered broker are refused.
    async fn check_subscriptions_refused(&self, link: &mut FollowerStream) {
        let epoch = self.epoch;
        for (subscription_id, (subscription, text)) in (0..).zip([
            (v1::Subscribe { topic_id: "nonsense".to_owned(), ..self.subscription(0, epoch, 0) }, "is no UUID"),
            (v1::Subscribe { partition: 7, ..self.subscription(0, epoch, 0) }, "no open replica of partition"),
            (v1::Subscribe { partition: -1, ..self.subscription(0, epoch, 0) }, "a partition number"),
            (v1::Subscribe { persisted_end: 3, ..self.subscription(0, epoch, 2) }, "a persisted end above the log end"),
            (self.subscription(0, epoch - 1, 0), "wait for the newer"),
            (self.subscription(0, epoch + 1, 0), "wait for the newer"),
            (self.subscription(0, epoch, 0), "is no replica of the partition"),
        ]) {
            link.send(Some(replicate_request::Message::Subscribe(v1::Subscribe { subscription_id, ..subscription })))
                .await;
            let response = link.subscribe_response().await;
            assert_eq!(response.subscription_id, subscription_id);
            assert!(refusal(&response).contains(text), "{text}: {response:?}");
        }
    }

    /// Checks three responses of the leader:
    /// - It refuses a progress above its log end.
    /// - It reports divergence to a subscription above its log end.
    /// - It ends the link at a progress whose lists differ in length.
    async fn check_false_progress_refused(&self, link: &mut FollowerStream) {
        let removal_count = Some(self.meta.value(self.id).await.removal_count);
        let subscription = |subscription_id, end| v1::Subscribe {
            removal_count,
            ..self.subscription(subscription_id, self.epoch, end)
        };
        let mut subscription_id = 10;
        let subscribe = async {
            loop {
                link.send(Some(replicate_request::Message::Subscribe(subscription(subscription_id, 0)))).await;
                if matches!(link.subscribe_response().await.outcome, Some(subscribe_response::Outcome::AcceptedAt(0))) {
                    break;
                }
                subscription_id += 1;
            }
        };
        tokio::time::timeout(TEST_TIMEOUT, subscribe).await.expect("the leader accepts the new replica");
        let progress = |end: i64| v1::Progress {
            subscription_id: vec![subscription_id],
            log_end: vec![end],
            persisted_end: vec![end],
        };
        link.send(Some(replicate_request::Message::Progress(progress(1_000_000)))).await;
        let response = link.subscribe_response().await;
        assert!(refusal(&response).contains("offset 1000000 is above the end"), "{response:?}");
        // To a subscription whose log is longer than the leader's, the leader responds with the offset at which to
        // truncate.
        link.send(Some(replicate_request::Message::Subscribe(subscription(subscription_id + 1, 1_000_000)))).await;
        let response = link.subscribe_response().await;
        assert!(matches!(&response.outcome, Some(subscribe_response::Outcome::Diverged(_))), "{response:?}");
        let lists = v1::Progress { log_end: vec![], ..progress(0) };
        link.send(Some(replicate_request::Message::Progress(lists))).await;
        let output = link.wait_for_error().await;
        assert!(output.contains("lists of a progress"), "{output}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fake_follower_is_refused_and_real_follower_continues() {
    let idle = IdleCluster::begin().await;
    idle.check_wrong_port_refused().await;
    idle.check_hellos_refused().await;
    idle.check_unreachable_broker_reported().await;
    idle.append();

    // From here on the fake broker is registered.
    let fake_epoch = idle.meta.register("127.0.0.1:9".parse().expect("an address")).await;
    let wall_ms = Some(clock::wall_ms() - 605_000);
    let hello = Some(replicate_request::Message::Hello(v1::Hello {
        wall_clock_ms: wall_ms,
        ..idle.hello(FAKE_BROKER, fake_epoch)
    }));
    let mut link = eventually_async("the leader accepts the fake broker", async || {
        let mut link = FollowerStream::begin(idle.address(), hello.clone()).await;
        link.next().await.is_ok().then_some(link)
    })
    .await;
    let log = idle.cluster.log(idle.leader);
    let is_logged = log.lines().any(|line| line.contains("broker=9") && line.contains("seconds_ahead=-60"));
    assert!(is_logged, "a clock difference of ten minutes is logged: {log}");
    idle.check_subscriptions_refused(&mut link).await;

    // An operator adds the fake broker as a replica.
    let (cli, before) = (idle.cluster.cli(), idle.meta.value(idle.id).await);
    let target = format!("{},{FAKE_BROKER}", idle.leader);
    block_in_place(|| cli.ok(&["partition", "reassign", "calm/0", "--replicas", &target]));
    idle.check_false_progress_refused(&mut link).await;
    let mut link = FollowerStream::begin(idle.address(), hello).await;
    link.wait_for_welcome().await;
    link.send(None).await;
    let output = link.wait_for_error().await;
    assert!(output.contains("message of an unexpected kind"), "{output}");

    idle.append();
    let now = idle.meta.value(idle.id).await;
    assert_eq!((now.leader, now.leader_epoch, &now.isr), (before.leader, before.leader_epoch, &before.isr));
    assert_eq!(now.adding, [BrokerId(FAKE_BROKER)], "the fake broker was never in sync");
    block_in_place(|| cli.ok(&["partition", "reassign", "cancel", "calm/0"]));
    let read = block_in_place(|| cli.ok(&["consume", "calm", "--from", "earliest", "--until-end"]));
    assert_eq!(read.text(), "still here\n".repeat(2));
}

/// A second link in a follower's name is refused while the follower's own link responds. A second link replaces a link
/// that does not respond. Regression: two fake brokers used the names of followers. Either a leader acknowledged
/// records that only the fake brokers had, or the fake brokers replaced the followers' links and acknowledged nothing.
/// A broker epoch of 2^63 counted as the newest, and the last caller as the real follower.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fake_follower_takes_over_no_responsive_link() {
    let idle = IdleCluster::begin().await;
    let epoch = broker_epoch(idle.cluster.instance(idle.follower).peer()).await;
    let hello = |epoch| Some(replicate_request::Message::Hello(idle.hello(idle.follower, epoch)));
    for round in 0..10 {
        let mut tries = 0;
        let output = loop {
            let began = clock::monotonic();
            let mut second = FollowerStream::begin(idle.address(), hello(epoch)).await;
            // The real follower acknowledges records that are written while the leader compares the two links.
            idle.append();
            match second.next().await {
                Err(status) => break status.message().to_owned(),
                // The leader accepts the second link if the real follower does not respond within a second. Other load
                // on this machine may cause this, so the test allows it twice per round.
                Ok(_welcome) => tries += 1,
            }
            assert!(
                began.elapsed() >= Duration::from_secs(1) && tries < 3,
                "{round}: the fake broker took over the link"
            );
        };
        assert!(output.contains("already has a link to this broker, and that link responds"), "{round}: {output}");
        let output = FollowerStream::begin(idle.address(), hello(1 << 63)).await.wait_for_error().await;
        assert!(output.contains("is not registered with broker epoch"), "{round}: {output}");
    }
    let value = idle.meta.value(idle.id).await;
    assert_eq!(value.isr.len(), 2, "the real follower stayed in sync: {value:?}");

    // The frozen follower cannot respond, so the fake link replaces its link. After the freeze, the follower opens a
    // new link, which replaces the fake one because the fake one does not respond.
    idle.cluster.broker(idle.follower).freeze(true);
    // Repeated: a response that the follower sent before the freeze may still arrive.
    let mut silent = eventually_async("the link of the frozen follower is replaced", async || {
        let mut link = FollowerStream::begin(idle.address(), hello(epoch)).await;
        link.next().await.is_ok().then_some(link)
    })
    .await;
    idle.cluster.broker(idle.follower).freeze(false);
    let output = silent.wait_for_error().await;
    assert!(output.contains("another link of the same broker replaced it"), "{output}");
    idle.append();
    let now = idle.meta.value(idle.id).await;
    assert_eq!((now.leader, now.leader_epoch), (value.leader, value.leader_epoch));
}

/// An epoch that the metadata does not contain deposes no leader, and reports of the failure of a running broker do not
/// revoke its registration. Regression: one fake broker deposed a leader 26 times in 12 s, and its failure reports in
/// the controller's own name revoked live registrations.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unconfirmed_epochs_and_failure_reports_change_nothing() {
    let idle = IdleCluster::begin().await;
    let before = idle.meta.value(idle.id).await;
    let fake_epoch = idle.meta.register("127.0.0.1:9".parse().expect("an address")).await;
    let hello = Some(replicate_request::Message::Hello(idle.hello(FAKE_BROKER, fake_epoch)));
    let mut link = eventually_async("the leader accepts the fake broker", async || {
        let mut link = FollowerStream::begin(idle.address(), hello.clone()).await;
        link.next().await.is_ok().then_some(link)
    })
    .await;
    for subscription_id in 0..100 {
        link.send(Some(replicate_request::Message::Subscribe(idle.subscription(subscription_id, idle.epoch, 0)))).await;
        link.send(Some(replicate_request::Message::Unsubscribe(v1::Unsubscribe {
            subscription_id,
            known_epoch: i32::MAX,
            stopping: false,
        })))
        .await;
        if subscription_id % 10 == 0 {
            idle.append();
        }
    }
    // The response to this last message shows that all earlier messages were processed.
    link.send(Some(replicate_request::Message::Subscribe(v1::Subscribe {
        partition: 7,
        ..idle.subscription(100, idle.epoch, 0)
    })))
    .await;
    while link.subscribe_response().await.subscription_id != 100 {}
    idle.append();
    let log = idle.cluster.log(idle.leader);
    assert!(!log.contains("deposed by a newer leader epoch"), "the leader was deposed: {log}");
    let now = idle.meta.value(idle.id).await;
    assert_eq!((now.leader, now.leader_epoch, &now.isr), (before.leader, before.leader_epoch, &before.isr));

    // Either broker may be the controller, so each gets failure reports about the other broker, with itself as the
    // reporter.
    for (reporter, broker) in [(1, 2), (2, 1)] {
        let epoch = broker_epoch(idle.cluster.instance(broker).peer()).await;
        for _ in 0..20 {
            let report = v1::ReportFailureRequest {
                cluster: "it".to_owned(),
                reporter,
                broker_id: broker,
                broker_epoch: epoch,
                observation: "connections are refused".to_owned(),
            };
            let response = peer(idle.cluster.instance(reporter).peer())
                .await
                .report_failure(report)
                .await
                .expect("the broker responds");
            assert!(!response.into_inner().revoked, "broker {broker} is running");
        }
        assert_eq!(broker_epoch(idle.cluster.instance(broker).peer()).await, epoch);
    }
    idle.append();
}
