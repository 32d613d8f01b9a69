//! A fake follower: streams to a real broker.

use std::{net::SocketAddr, time::Duration};

use strandline::{
    cluster::Endpoints,
    model::{BrokerId, PartitionId},
    proto::v1::{self, answer, to_follower, to_leader},
    task::clock,
};
use tokio::{sync::mpsc, task::block_in_place};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{Meta, STRANGER, broker_epoch, peer, still_serves};
use crate::{
    broker::Home,
    cluster::members::Cluster,
    test_timeout::{TEST_TIMEOUT, eventually, eventually_async},
    wire,
};

/// A stream to a broker, as a follower's broker opens it.
struct Follows {
    sender: mpsc::Sender<v1::ToLeader>,
    receiver: Streaming<v1::ToFollower>,
}

impl Follows {
    async fn begin(address: SocketAddr, first: Option<to_leader::Is>) -> Self {
        let (sender, messages) = mpsc::channel(16);
        sender.send(v1::ToLeader { is: first, ..Default::default() }).await.expect("there is room");
        let stream = peer(address).await.replicate(ReceiverStream::new(messages)).await.expect("a stream");
        Self { sender, receiver: stream.into_inner() }
    }

    async fn say(&self, is: Option<to_leader::Is>) {
        self.sender.send(v1::ToLeader { is, ..Default::default() }).await.expect("the stream is open");
    }

    async fn next(&mut self) -> Result<v1::ToFollower, Status> {
        let next = tokio::time::timeout(TEST_TIMEOUT, self.receiver.message()).await.expect("something comes");
        next.map(|message| message.expect("it does not end without a word"))
    }

    async fn welcomed(&mut self) {
        let first = self.next().await.expect("no refusal");
        assert!(matches!(first.is, Some(to_follower::Is::Welcome(_))), "{first:?}");
    }

    /// Returns the response to a subscription. Skips other messages before it.
    async fn answer(&mut self) -> v1::Answer {
        loop {
            if let Some(to_follower::Is::Answer(answer)) = self.next().await.expect("the link stands").is {
                return answer;
            }
        }
    }

    /// Returns the error that ends the stream.
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

/// Two brokers with one partition in sync. Its epoch is not the first, so that an older epoch exists.
struct Calm {
    cluster: Cluster,
    meta: Meta,
    id: PartitionId,
    leader: u32,
    follower: u32,
    epoch: i32,
}

impl Calm {
    async fn begin() -> Self {
        // Longer than a broker stays frozen.
        let settings = |home: Home| home.setting("metadata.session_timeout", "\"15s\"");
        let (cluster, leader) = block_in_place(|| {
            let cluster = Cluster::with(2, settings);
            let create = ["topic", "create", "calm", "--replication-factor", "2", "--config", "min.insync.replicas=2"];
            cluster.cli().ok(&create);
            cluster.in_sync("calm", 2);
            let (old, new) = (cluster.leader("calm", 0), 3 - cluster.leader("calm", 0));
            cluster.cli().ok(&["partition", "reassign", "calm/0", "--replicas", &format!("{new},{old}")]);
            cluster.cli().ok(&["partition", "elect", "calm/0"]);
            eventually("the other one leads", || (cluster.leader("calm", 0) == new).then_some(()));
            cluster.in_sync("calm", 2);
            (cluster, new)
        });
        let meta = Meta::of(&cluster.etcd).await;
        let id = meta.first_partition("calm").await;
        let epoch = meta.value(id).await.leader_epoch.as_i32();
        assert!(epoch > 0, "there is an older one");
        Self { cluster, meta, id, leader, follower: 3 - leader, epoch }
    }

    /// Returns the address of the leader's peer listener.
    fn address(&self) -> SocketAddr {
        self.cluster.home(self.leader).peer()
    }

    fn serves(&self) {
        block_in_place(|| still_serves(&self.cluster.cli(), "calm"));
    }

    fn hello(&self, broker: u32, broker_epoch: u64) -> v1::Hello {
        let (cluster, to) = ("it".to_owned(), self.leader);
        v1::Hello { cluster, broker, broker_epoch, to, version: 1, wall_ms: None }
    }

    /// Returns a subscription whose log position is of its own epoch.
    fn join(&self, place: u32, leader_epoch: i32, end: i64) -> v1::Join {
        let last_epoch = (end > 0).then_some(leader_epoch);
        let topic_id = self.id.topic.to_string();
        v1::Join { place, topic_id, partition: 0, leader_epoch, last_epoch, end, persisted: end, added_after: None }
    }

    /// Checks that the leader refuses an invalid `Hello`, a `Hello` in the name of another or of an unregistered broker, and a stream
    /// without one.
    async fn refuses_hellos(&self) {
        let (leader, follower) = (self.leader, self.follower);
        let epoch = broker_epoch(self.cluster.home(follower).peer()).await;
        let true_one = self.hello(follower, epoch);
        let is_hello = |hello| Some(to_leader::Is::Hello(hello));
        let leave = v1::Leave { place: 0, known_epoch: 99, stopping: true };
        for (first, words) in [
            (is_hello(v1::Hello { cluster: "other".to_owned(), ..true_one.clone() }), "belongs to cluster \"it\""),
            (is_hello(v1::Hello { to: follower, ..true_one.clone() }), "was called"),
            (is_hello(v1::Hello { version: 7, ..true_one }), "version 7"),
            (is_hello(self.hello(leader, epoch)), "calls itself"),
            (is_hello(self.hello(STRANGER, 5)), "broker 9 is not registered"),
            (is_hello(self.hello(follower, epoch - 1)), "has registered as"),
            (is_hello(self.hello(follower, 1 << 63)), "is not registered in the uptime 9223372036854775808"),
            (Some(to_leader::Is::Leave(leave)), "begins with Hello"),
            (None, "begins with Hello"),
        ] {
            let said = Follows::begin(self.address(), first).await.refused().await;
            assert!(said.contains(words), "{words}: {said}");
        }
    }

    /// Checks that each port serves only its own kind of caller.
    async fn keeps_brokers_and_clients_apart(&self) {
        let home = self.cluster.home(self.leader);
        let asked = peer(home.grpc()).await.who_is(v1::WhoIsRequest {}).await.expect_err("a port for clients");
        let told = wire::admin(home.peer()).get_metadata(v1::GetMetadataRequest::default()).await;
        for (refused, words) in [
            (asked, "this port is for clients (grpc.listen): other brokers connect to peer.listen"),
            (
                told.expect_err("a port for brokers"),
                "this port is for other brokers (peer.listen): clients connect to grpc.listen",
            ),
        ] {
            assert_eq!((refused.code(), refused.message()), (Code::Unimplemented, words));
        }
    }

    /// Checks that a broker without an address for peers is reported. A broker of another version may register in this way.
    async fn says_who_cannot_be_reached(&self) {
        self.meta.register_at(Endpoints::new("127.0.0.1:9".to_owned())).await;
        let cli = self.cluster.cli();
        let lines = || {
            let log = self.cluster.log(self.leader);
            log.lines()
                .filter(|line| line.contains("broker=9") && line.contains("registered without an address"))
                .count()
        };
        block_in_place(|| {
            eventually("the leader logs it", || (lines() > 0).then_some(()));
            eventually("the description says it", || {
                let described = cli.ok(&["cluster", "describe"]).text();
                described.contains("broker 9 is registered without an address for other brokers").then_some(())
            });
            assert_eq!(lines(), 1, "{}", self.cluster.log(self.leader));
        });
        // The next registration is a new key. Its revision is the broker epoch.
        self.meta.unregister().await;
    }

    /// Checks that invalid subscriptions of a registered broker are refused.
    async fn refuses_joins(&self, link: &mut Follows) {
        let epoch = self.epoch;
        for (place, (join, words)) in (0..).zip([
            (v1::Join { topic_id: "nonsense".to_owned(), ..self.join(0, epoch, 0) }, "is no UUID"),
            (v1::Join { partition: 7, ..self.join(0, epoch, 0) }, "no replica of partition"),
            (v1::Join { partition: -1, ..self.join(0, epoch, 0) }, "a partition's number"),
            (v1::Join { persisted: 3, ..self.join(0, epoch, 2) }, "above the written one"),
            (self.join(0, epoch - 1, 0), "wait for the newer"),
            (self.join(0, epoch + 1, 0), "wait for the newer"),
            (self.join(0, epoch, 0), "is no replica of the partition"),
        ]) {
            link.say(Some(to_leader::Is::Join(v1::Join { place, ..join }))).await;
            let answer = link.answer().await;
            assert_eq!(answer.place, place);
            assert!(refusal(&answer).contains(words), "{words}: {answer:?}");
        }
    }

    /// Checks that a replica cannot acknowledge records that it was never sent.
    async fn refuses_lies(&self, link: &mut Follows) {
        let added_after = Some(self.meta.value(self.id).await.removals);
        let join = |place, end| v1::Join { added_after, ..self.join(place, self.epoch, end) };
        let mut place = 10;
        let joins = async {
            loop {
                link.say(Some(to_leader::Is::Join(join(place, 0)))).await;
                if matches!(link.answer().await.is, Some(answer::Is::At(0))) {
                    break;
                }
                place += 1;
            }
        };
        tokio::time::timeout(TEST_TIMEOUT, joins).await.expect("the leader knows of the new replica");
        let progress = |end: i64| v1::Progress { place: vec![place], written: vec![end], persisted: vec![end] };
        link.say(Some(to_leader::Is::Progress(progress(1_000_000)))).await;
        let answer = link.answer().await;
        assert!(refusal(&answer).contains("offset 1000000 is acknowledged"), "{answer:?}");
        // A log that is longer than the leader's gets the offset at which to truncate.
        link.say(Some(to_leader::Is::Join(join(place + 1, 1_000_000)))).await;
        let answer = link.answer().await;
        assert!(matches!(&answer.is, Some(answer::Is::Diverged(_))), "{answer:?}");
        let lists = v1::Progress { written: vec![], ..progress(0) };
        link.say(Some(to_leader::Is::Progress(lists))).await;
        let said = link.refused().await;
        assert!(said.contains("lists of a progress"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fake_follower_is_refused_and_real_follower_continues() {
    let calm = Calm::begin().await;
    calm.keeps_brokers_and_clients_apart().await;
    calm.refuses_hellos().await;
    calm.says_who_cannot_be_reached().await;
    calm.serves();

    // From here on the fake broker is registered.
    let stranger = calm.meta.register("127.0.0.1:9".parse().expect("an address")).await;
    let wall_ms = Some(clock::wall_ms() - 605_000);
    let hello = Some(to_leader::Is::Hello(v1::Hello { wall_ms, ..calm.hello(STRANGER, stranger) }));
    let mut link = eventually_async("the leader knows the stranger", async || {
        let mut link = Follows::begin(calm.address(), hello.clone()).await;
        link.next().await.is_ok().then_some(link)
    })
    .await;
    let log = calm.cluster.log(calm.leader);
    let apart = log.lines().any(|line| line.contains("broker=9") && line.contains("seconds_ahead=-60"));
    assert!(apart, "clocks that are ten minutes apart are said: {log}");
    calm.refuses_joins(&mut link).await;

    // An operator adds the fake broker as a replica.
    let (cli, before) = (calm.cluster.cli(), calm.meta.value(calm.id).await);
    let target = format!("{},{STRANGER}", calm.leader);
    block_in_place(|| cli.ok(&["partition", "reassign", "calm/0", "--replicas", &target]));
    calm.refuses_lies(&mut link).await;
    let mut link = Follows::begin(calm.address(), hello).await;
    link.welcomed().await;
    link.say(None).await;
    let said = link.refused().await;
    assert!(said.contains("has no place here"), "{said}");

    calm.serves();
    let now = calm.meta.value(calm.id).await;
    assert_eq!((now.leader, now.leader_epoch, &now.isr), (before.leader, before.leader_epoch, &before.isr));
    assert_eq!(now.adding, [BrokerId(STRANGER)], "it was never in sync");
    block_in_place(|| cli.ok(&["partition", "reassign", "cancel", "calm/0"]));
    let read = block_in_place(|| cli.ok(&["consume", "calm", "--from", "earliest", "--until-end"]));
    assert_eq!(read.text(), "still here\n".repeat(2));
}

/// Regression: two fake brokers in the names of followers made a leader acknowledge records that only they had, or took over the followers'
/// links and acknowledged nothing. A broker epoch of 2^63 counted as the newest, and the last caller as the real follower.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fake_follower_takes_over_no_responsive_link() {
    let calm = Calm::begin().await;
    let epoch = broker_epoch(calm.cluster.home(calm.follower).peer()).await;
    let hello = |epoch| Some(to_leader::Is::Hello(calm.hello(calm.follower, epoch)));
    for round in 0..10 {
        let mut tries = 0;
        let said = loop {
            let began = clock::monotonic();
            let mut second = Follows::begin(calm.address(), hello(epoch)).await;
            // The real follower acknowledges records that are written while the leader compares the two links.
            calm.serves();
            match second.next().await {
                Err(status) => break status.message().to_owned(),
                // The real follower must respond within a second. The retry allows for other load on this machine.
                Ok(_welcome) => tries += 1,
            }
            assert!(began.elapsed() >= Duration::from_secs(1) && tries < 3, "{round}: it took the link");
        };
        assert!(said.contains("over another link, which answers"), "{round}: {said}");
        let said = Follows::begin(calm.address(), hello(1 << 63)).await.refused().await;
        assert!(said.contains("is not registered in the uptime"), "{round}: {said}");
    }
    let value = calm.meta.value(calm.id).await;
    assert_eq!(value.isr.len(), 2, "the true follower was in sync all the time: {value:?}");

    // A follower that cannot respond loses its link. It takes the link back from a caller that does not respond.
    calm.cluster.broker(calm.follower).freeze(true);
    // A response from before the freeze may still be under way.
    let mut silent = eventually_async("the link of the silent one is taken", async || {
        let mut link = Follows::begin(calm.address(), hello(epoch)).await;
        link.next().await.is_ok().then_some(link)
    })
    .await;
    calm.cluster.broker(calm.follower).freeze(false);
    let said = silent.refused().await;
    assert!(said.contains("another one takes its place"), "{said}");
    calm.serves();
    let now = calm.meta.value(calm.id).await;
    assert_eq!((now.leader, now.leader_epoch), (value.leader, value.leader_epoch));
}

/// Regression: one fake broker deposed a leader 26 times in 12 s. Its failure reports in the controller's own name revoked live
/// registrations.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unconfirmed_epochs_and_failure_reports_change_nothing() {
    let calm = Calm::begin().await;
    let before = calm.meta.value(calm.id).await;
    let stranger = calm.meta.register("127.0.0.1:9".parse().expect("an address")).await;
    let hello = Some(to_leader::Is::Hello(calm.hello(STRANGER, stranger)));
    let mut link = eventually_async("the leader knows the stranger", async || {
        let mut link = Follows::begin(calm.address(), hello.clone()).await;
        link.next().await.is_ok().then_some(link)
    })
    .await;
    for place in 0..100 {
        link.say(Some(to_leader::Is::Join(calm.join(place, calm.epoch, 0)))).await;
        link.say(Some(to_leader::Is::Leave(v1::Leave { place, known_epoch: i32::MAX, stopping: false }))).await;
        if place % 10 == 0 {
            calm.serves();
        }
    }
    // The last message gets a response, so all earlier messages were processed.
    link.say(Some(to_leader::Is::Join(v1::Join { partition: 7, ..calm.join(100, calm.epoch, 0) }))).await;
    while link.answer().await.place != 100 {}
    calm.serves();
    let log = calm.cluster.log(calm.leader);
    assert!(!log.contains("another broker leads by now"), "it was deposed: {log}");
    let now = calm.meta.value(calm.id).await;
    assert_eq!((now.leader, now.leader_epoch, &now.isr), (before.leader, before.leader_epoch, &before.isr));

    // Either broker may be the controller. Each gets failure reports about the other in its own name.
    for (asked, broker) in [(1, 2), (2, 1)] {
        let epoch = broker_epoch(calm.cluster.home(broker).peer()).await;
        for _ in 0..20 {
            let report = v1::ReportGoneRequest {
                cluster: "it".to_owned(),
                reporter: asked,
                broker,
                broker_epoch: epoch,
                seen: "connections are refused".to_owned(),
            };
            let told = peer(calm.cluster.home(asked).peer()).await.report_gone(report).await.expect("it answers");
            assert!(!told.into_inner().revoked, "broker {broker} is there");
        }
        assert_eq!(broker_epoch(calm.cluster.home(broker).peer()).await, epoch);
    }
    calm.serves();
}
