//! Both sides of a link over channels: connected to each other, and each to a scripted peer that violates the protocol.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{StreamExt as _, stream::BoxStream};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;

use super::{
    frames::{self, JoinFrame},
    *,
};
use crate::{
    cluster::{PartitionValue, Revision},
    log::{Identity, Log, Options, SimDisk},
    model::{Acks, BrokerId, Compression, ConfigMap, LeaderEpoch, Offset, TopicConfig, TopicId, TopicName},
    partition::{
        AppendResult, Assignment, Links, Spec, Surroundings, UpkeepQueue,
        leader::{
            insync::{Ends, Peer, Registration},
            join::Claim,
        },
    },
    proto::v1::{answer, to_follower, to_leader},
    record::{Batch, BatchBuilder, ChunkedBatches},
    task::{Tasks, test_timeout::wait_until},
    telemetry::Counter,
};

mod claims;

const EPOCH: LeaderEpoch = LeaderEpoch(3);
const LEADER: BrokerId = BrokerId(1);
const FOLLOWER: Peer = Peer { broker: BrokerId(2), epoch: Revision(20) };

/// A broker's partitions and one of its links.
pub(super) struct Side {
    me: BrokerId,
    log: Log,
    partitions: Arc<Mutex<BTreeMap<PartitionId, Arc<Partition>>>>,
    pub(super) asked: Arc<Asked>,
    /// Pings the followers of its links.
    probe: Arc<LinkProbe>,
    /// Leader epoch of every partition in the metadata store.
    stored: Arc<Mutex<Option<LeaderEpoch>>>,
    pub(super) tasks: Tasks,
}

/// Links of a broker with one link.
struct Around(Arc<Asked>);

impl Links for Around {
    fn follow(&self, partition: PartitionId, _leader: BrokerId) {
        self.0.follow(partition);
    }

    fn join(&self, partition: PartitionId, epoch: LeaderEpoch, claim: Claim, ends: Ends) {
        self.0.join(partition, epoch, claim, ends);
    }

    fn again(&self, partition: PartitionId) {
        self.0.again(partition);
    }

    fn leave(&self, partition: PartitionId, known: LeaderEpoch, stopping: bool) {
        self.0.leave(partition, known, stopping);
    }
}

fn id(number: u32) -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), number)
}

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn value(epoch: LeaderEpoch, leader: BrokerId, isr: &[BrokerId]) -> PartitionValue {
    let whole = PartitionValue::new(vec![LEADER, FOLLOWER.broker], epoch);
    PartitionValue { leader: Some(leader), isr: isr.to_vec(), ..whole }
}

impl Side {
    pub(super) fn new(me: BrokerId) -> Self {
        let identity = Identity { cluster: "test".to_owned(), broker: me };
        let options = Options { journal_bytes: 8 << 20, ..Options::default() };
        let log = Log::open(Arc::new(SimDisk::new()), Path::new("/data"), &identity, options).unwrap();
        let (asked, probe) = (Arc::default(), Arc::default());
        Self { me, log, partitions: Arc::default(), asked, probe, stored: Arc::default(), tasks: Tasks::new() }
    }

    /// Opens a partition whose leader is broker 1.
    pub(super) async fn open(&self, number: u32, isr: &[BrokerId]) -> Arc<Partition> {
        let config = TopicConfig::resolve(&ConfigMap::new(), &ConfigMap::new()).unwrap();
        let spec = Spec {
            id: id(number),
            topic: TopicName::new("events").unwrap(),
            config: Arc::new(config),
            committed: None,
            tier: None,
            alone: false,
            anew: false,
            lag_time: Duration::MAX,
        };
        let links = Arc::new(Around(Arc::clone(&self.asked)));
        let around = Surroundings { links, ..Surroundings::alone() };
        let queue = UpkeepQueue::default();
        let partition = Partition::open(self.me, &self.log, spec, around, &queue, &self.tasks).unwrap();
        self.partitions.lock().unwrap().insert(id(number), Arc::clone(&partition));
        self.assign(number, value(EPOCH, LEADER, isr), Revision(1)).await;
        partition
    }

    async fn assign(&self, number: u32, value: PartitionValue, revision: Revision) {
        let registered = [(LEADER, Revision(10)), (FOLLOWER.broker, FOLLOWER.epoch)];
        let registered = registered.map(|(id, epoch)| (id, Registration::Running(epoch)));
        let value = Arc::new(value);
        let assignment = Assignment { value, revision, committed: None, registered: registered.into() };
        (self.find())(id(number)).unwrap().assign(assignment).await;
    }

    pub(super) fn find(&self) -> Find {
        let partitions = Arc::clone(&self.partitions);
        Arc::new(move |id| partitions.lock().unwrap().get(&id).cloned())
    }

    /// Runs the leader's side against a scripted peer.
    fn lead(&self) -> Stranger<v1::ToLeader, v1::ToFollower> {
        self.lead_at(CatchUp::new(None))
    }

    /// Runs the leader's side against a scripted peer, with a limit on catching up.
    fn lead_at(&self, catch_up: CatchUp) -> Stranger<v1::ToLeader, v1::ToFollower> {
        let ((to, incoming), (outgoing, from)) = (mpsc::channel(1), mpsc::channel(1));
        let led = self.led(catch_up);
        let tasks = self.tasks.clone();
        let ended =
            self.tasks.spawn("lead", async move { lead(led, ReceiverStream::new(incoming), outgoing, &tasks).await });
        Stranger { to, from: ReceiverStream::new(from).boxed(), ended }
    }

    fn led(&self, catch_up: CatchUp) -> Led {
        let (catch_up, probe, sent) = (Arc::new(catch_up), Arc::clone(&self.probe), Counter::default());
        let stored = Arc::clone(&self.stored);
        let stored_epoch: StoredEpoch = Arc::new(move |_| {
            let stored = *stored.lock().unwrap();
            Box::pin(async move { stored })
        });
        Led { peer: FOLLOWER, find: self.find(), catch_up, probe, stored_epoch, sent }
    }

    /// Runs the follower's side against a scripted peer.
    fn follow(&self) -> Stranger<v1::ToFollower, v1::ToLeader> {
        let ((to, incoming), (outgoing, from)) = (mpsc::channel(1), mpsc::channel(1));
        let (asked, find, tasks) = (Arc::clone(&self.asked), self.find(), self.tasks.clone());
        let ended = self.tasks.spawn("follow", async move {
            follow(&asked, &find, ReceiverStream::new(incoming), outgoing, &Counter::default(), &tasks).await
        });
        Stranger { to, from: ReceiverStream::new(from).map(Ok).boxed(), ended }
    }
}

/// Scripted peer: the other end of a side's channels.
struct Stranger<T, F> {
    to: mpsc::Sender<Result<T, Status>>,
    from: BoxStream<'static, Result<F, Status>>,
    ended: JoinHandle<Ended>,
}

impl<T, F> Stranger<T, F> {
    async fn say(&self, message: T) {
        assert!(self.to.send(Ok(message)).await.is_ok(), "it listens");
    }

    async fn hear(&mut self) -> F {
        let heard = tokio::time::timeout(Duration::from_secs(20), self.from.next()).await;
        heard.expect("it says something").expect("it goes on").expect("no error")
    }
}

impl Stranger<v1::ToLeader, v1::ToFollower> {
    async fn join(&self, place: u32, partition: PartitionId, epoch: LeaderEpoch) {
        let (claim, ends) = (Claim { last: None, end: Offset::ZERO, added: None }, Ends::default());
        self.say(frames::join(place, &JoinFrame { partition, epoch, claim, ends })).await;
    }

    async fn answer(&mut self) -> v1::Answer {
        match self.hear().await.is {
            Some(to_follower::Is::Answer(answer)) => answer,
            other => panic!("an answer was due: {other:?}"),
        }
    }

    async fn pieces(&mut self) -> Vec<v1::Piece> {
        match self.hear().await.is {
            Some(to_follower::Is::Batches(batches)) => batches.pieces,
            other => panic!("batches were due: {other:?}"),
        }
    }
}

impl Stranger<v1::ToFollower, v1::ToLeader> {
    async fn asked(&mut self) -> v1::Join {
        loop {
            if let Some(to_leader::Is::Join(join)) = self.hear().await.is {
                return join;
            }
        }
    }

    async fn accept(&self, join: &v1::Join) {
        self.answer(join.place, answer::Is::At(join.end)).await;
    }

    async fn answer(&self, place: u32, is: answer::Is) {
        let answer = v1::Answer { place, leader_epoch: EPOCH.as_i32(), high_watermark: 0, is: Some(is) };
        self.say(v1::ToFollower { is: Some(to_follower::Is::Answer(answer)), ..Default::default() }).await;
    }

    async fn progress(&mut self) -> v1::Progress {
        match self.hear().await.is {
            Some(to_leader::Is::Progress(progress)) => progress,
            other => panic!("progress was due: {other:?}"),
        }
    }
}

/// Connects two sides with a link until its tasks are stopped.
fn connect(leader: &Side, follower: &Side) -> Tasks {
    let tasks = Tasks::new();
    let ((to_leader, at_leader), (to_follower, at_follower)) = (mpsc::channel(1), mpsc::channel(1));
    let led = leader.led(CatchUp::new(None));
    let link = tasks.clone();
    tasks.spawn("lead", async move {
        let incoming = ReceiverStream::new(at_leader).map(Ok);
        lead(led, incoming, to_follower, &link).await
    });
    let (asked, find, link) = (Arc::clone(&follower.asked), follower.find(), tasks.clone());
    tasks.spawn("follow", async move {
        follow(&asked, &find, ReceiverStream::new(at_follower), to_leader, &Counter::default(), &link).await
    });
    tasks
}

fn batch(bytes: usize) -> Batch {
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(1, None, Some(&vec![7; bytes]), &[]).unwrap();
    builder.finish(None).unwrap()
}

async fn append(partition: &Partition, bytes: usize, acks: Acks) -> tokio::sync::oneshot::Receiver<AppendResult> {
    let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
    partition.append(batch(bytes), None, acks, permit).await
}

#[tokio::test(flavor = "multi_thread")]
async fn thousand_partitions_follow_over_one_link_and_the_next() {
    const COUNT: u32 = 1000;
    let (leader, follower) = (Side::new(LEADER), Side::new(FOLLOWER.broker));
    let isr = [LEADER, FOLLOWER.broker];
    let (mut led, mut copies) = (Vec::new(), Vec::new());
    for number in 0..COUNT {
        led.push(leader.open(number, &isr).await);
        copies.push(follower.open(number, &isr).await);
    }
    for round in 1..=2 {
        let link = connect(&leader, &follower);
        let mut answers = Vec::new();
        for partition in &led {
            answers.push(append(partition, 100, Acks::All).await);
        }
        for answer in answers {
            let acked = tokio::time::timeout(Duration::from_secs(60), answer).await.expect("in time");
            assert!(acked.unwrap().is_ok(), "both have it");
        }
        for copy in &copies {
            assert_eq!(copy.marks().log_end, at(round));
        }
        // The high watermark arrives although no batches follow.
        wait_until("all is committed there", || copies.iter().all(|copy| copy.marks().high_watermark == at(round)))
            .await;
        link.stop().await;
    }
    for side in [leader, follower] {
        side.tasks.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocked_subscription_keeps_its_window_and_delays_no_other() {
    const BYTES: usize = 256 << 10;
    let side = Side::new(LEADER);
    let mut link = side.lead();
    let mut partitions = Vec::new();
    for number in 0..10 {
        partitions.push(side.open(number, &[LEADER]).await);
        link.join(100 + number, id(number), EPOCH).await;
        let answer = link.answer().await;
        assert_eq!((answer.place, answer.is), (100 + number, Some(answer::Is::At(0))));
    }
    for _ in 0..40 {
        append(&partitions[0], BYTES, Acks::Leader).await.await.unwrap().unwrap();
    }
    let mut stuck = 0;
    for round in 1..=20 {
        for partition in &partitions[1..] {
            append(partition, 10, Acks::Leader).await.await.unwrap().unwrap();
        }
        let mut ends = BTreeMap::new();
        while ends.values().filter(|end| **end == at(round)).count() < 9 {
            for piece in link.pieces().await {
                let batches: Vec<_> = ChunkedBatches::new(piece.chunks).collect::<Result<_, _>>().unwrap();
                let Some(last) = batches.last() else { continue };
                if piece.place == 100 {
                    stuck += batches.iter().map(Batch::encoded_len).sum::<usize>();
                } else {
                    ends.insert(piece.place, last.end_offset());
                }
            }
        }
        let ends = ends.into_iter().map(|(place, written)| (place, Ends { written, persisted: written }));
        link.say(frames::progress(ends)).await;
    }
    assert!((window::PLACE_BYTES - BYTES..window::PLACE_BYTES + 2 * BYTES).contains(&stuck), "{stuck}");
    // An acknowledgement makes space again.
    let few = Ends { written: at(8), persisted: at(0) };
    link.say(frames::progress([(100, few)])).await;
    let piece = loop {
        if let Some(piece) = link.pieces().await.into_iter().find(|piece| !piece.chunks.is_empty()) {
            break piece;
        }
    };
    assert_eq!(piece.place, 100);
    side.tasks.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_follower_message_gets_an_error() {
    let join = |topic_id: &str, partition: i32, epoch: i32, end: i64, persisted: i64| {
        let (topic_id, last_epoch) = (topic_id.to_owned(), None);
        let join = v1::Join {
            place: 1,
            topic_id,
            partition,
            leader_epoch: epoch,
            last_epoch,
            end,
            persisted,
            added_after: None,
        };
        to_leader::Is::Join(join)
    };
    let topic = id(0).topic.to_string();
    let refused = [
        (join("no id", 0, 3, 0, 0), "topic id \"no id\" is no UUID"),
        (join(&topic, -1, 3, 0, 0), "a partition's number is -1"),
        (join(&topic, 0, -3, 0, 0), "a leader epoch is -3"),
        (join(&topic, 0, 3, -1, -1), "a written end is -1"),
        (join(&topic, 0, 3, 0, 5), "a persisted end above the written one is 5"),
        (join(&topic, 99, 3, 0, 0), "has no replica of partition"),
        (join(&topic, 0, 2, 0, 0), "epoch 3, not in 2"),
    ];
    for (message, words) in refused {
        let side = Side::new(LEADER);
        side.open(0, &[LEADER]).await;
        let mut link = side.lead();
        link.say(v1::ToLeader { is: Some(message), ..Default::default() }).await;
        let answer = link.answer().await;
        let Some(answer::Is::Refused(error)) = answer.is else { panic!("{words}: {answer:?}") };
        assert!(error.message.contains(words), "{words}: {}", error.message);
        // The link goes on.
        link.join(2, id(0), EPOCH).await;
        assert_eq!(link.answer().await.is, Some(answer::Is::At(0)), "{words}");
        // An acknowledgement of records that were never sent ends that subscription, and only it.
        link.say(frames::progress([(2, Ends { written: at(7), persisted: at(0) })])).await;
        let answer = link.answer().await;
        assert!(matches!(answer.is, Some(answer::Is::Refused(_))), "{answer:?}");
        side.tasks.stop().await;
    }
    let progress = |place: &[u32], written: &[i64]| v1::Progress {
        place: place.to_vec(),
        written: written.to_vec(),
        persisted: written.to_vec(),
    };
    let ends = [
        (None, "no place here"),
        (Some(to_leader::Is::Hello(v1::Hello::default())), "no place here"),
        (Some(to_leader::Is::Progress(progress(&[1, 2], &[5]))), "have 2, 1 and 1 entries"),
        (Some(to_leader::Is::Progress(progress(&[1], &[-5]))), "a written end is -5"),
        (Some(join(&topic, 0, 3, 0, 0)), "a place that is taken is 1"),
    ];
    for (is, words) in ends {
        let side = Side::new(LEADER);
        side.open(0, &[LEADER]).await;
        let mut link = side.lead();
        link.join(1, id(0), EPOCH).await;
        link.answer().await;
        link.say(v1::ToLeader { is, ..Default::default() }).await;
        let ended = link.ended.await.unwrap();
        let Ended::Bad(fault) = ended else { panic!("{words}: {ended:?}") };
        assert!(fault.message.contains(words), "{words}: {fault}");
        side.tasks.stop().await;
    }
}

/// Returns a batch as the leader of the epoch sends it.
fn piece(place: u32, base: u64) -> v1::Piece {
    let mut batch = batch(10);
    batch.set_offset_and_epoch(at(base), EPOCH);
    let chunks = vec![batch.header().to_vec().into(), batch.records_bytes().clone()];
    v1::Piece { place, leader_epoch: EPOCH.as_i32(), base: at(base).as_i64(), high_watermark: 0, chunks }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_leader_message_causes_a_new_subscription() {
    let damaged = |mut piece: v1::Piece| {
        let mut records = piece.chunks[1].to_vec();
        records[3] ^= 1;
        piece.chunks[1] = records.into();
        piece
    };
    type Bad = Box<dyn Fn(u32) -> v1::Piece>;
    let bad: [(&str, Bad); 5] = [
        ("damaged", Box::new(move |place| damaged(piece(place, 1)))),
        ("cut off", Box::new(|place| v1::Piece { chunks: piece(place, 1).chunks[..1].to_vec(), ..piece(place, 1) })),
        ("another epoch", Box::new(|place| v1::Piece { leader_epoch: 4, ..piece(place, 1) })),
        ("a mark that cannot be", Box::new(|place| v1::Piece { high_watermark: -1, ..piece(place, 1) })),
        // Detected by the partition, not by the link.
        ("a gap", Box::new(|place| piece(place, 5))),
    ];
    for (what, bad) in bad {
        let side = Side::new(FOLLOWER.broker);
        let [copy, other] = [side.open(0, &[LEADER]).await, side.open(1, &[LEADER]).await];
        let mut link = side.follow();
        let mut joins = [link.asked().await, link.asked().await];
        // Each partition subscribes from its own task.
        joins.sort_by_key(|join| join.partition);
        let [first, second] = joins;
        link.accept(&first).await;
        link.accept(&second).await;
        link.say(frames::batches(vec![piece(first.place, 0), piece(second.place, 0)])).await;
        wait_until("both have it", || copy.marks().log_end == at(1) && other.marks().log_end == at(1)).await;

        link.say(frames::batches(vec![bad(first.place), piece(second.place, 1)])).await;
        let again = link.asked().await;
        assert_eq!((again.partition, again.end), (first.partition, 1), "{what}");
        assert!(again.place > first.place.max(second.place), "{what}: an earlier place would take what is late");
        link.accept(&again).await;
        // Late messages for the earlier subscription are dropped.
        link.say(frames::batches(vec![piece(first.place, 0), piece(again.place, 1), piece(second.place, 2)])).await;
        wait_until("both have it", || copy.marks().log_end == at(2) && other.marks().log_end == at(3)).await;
        drop(link);
        side.tasks.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unexpected_responses_change_nothing() {
    let side = Side::new(FOLLOWER.broker);
    let copy = side.open(0, &[LEADER]).await;
    let mut link = side.follow();
    let mut join = link.asked().await;
    let refused = || v1::Error { message: "not now".to_owned(), ..v1::Error::default() };
    for is in [
        // The reported log end is 0.
        answer::Is::At(5),
        answer::Is::At(-1),
        answer::Is::Diverged(v1::Diverged { epoch: -1, end: 0 }),
        answer::Is::Diverged(v1::Diverged { epoch: 1, end: 4 }),
        answer::Is::Begin(v1::Begin { at: -4, ..v1::Begin::default() }),
        answer::Is::Begin(v1::Begin {
            at: 4,
            epochs: vec![v1::EpochStart { epoch: 2, start: 3 }, v1::EpochStart { epoch: 1, start: 0 }],
            ..v1::Begin::default()
        }),
        answer::Is::Refused(refused()),
    ] {
        let what = format!("{is:?}");
        link.answer(join.place, is).await;
        // Batches without a response that allows them.
        link.say(frames::batches(vec![piece(join.place, 0)])).await;
        let again = link.asked().await;
        assert_eq!((again.end, copy.marks().log_end), (0, at(0)), "{what}");
        join = again;
    }
    link.accept(&join).await;
    link.answer(join.place, answer::Is::Refused(refused())).await;
    let again = link.asked().await;
    assert!(again.place > join.place, "a leader may end what it began");
    // Only a message that names no subscription ends the link.
    link.say(v1::ToFollower::default()).await;
    assert!(matches!(link.ended.await.unwrap(), Ended::Bad(_)));
    side.tasks.stop().await;
}

/// The leader counts an acknowledgement for the epoch of the subscription. The progress of a replica under another leader must not be
/// sent to the first leader.
#[tokio::test(flavor = "multi_thread")]
async fn unsubscribed_partition_acknowledges_nothing() {
    let side = Side::new(FOLLOWER.broker);
    let copy = side.open(0, &[LEADER]).await;
    let mut link = side.follow();
    let join = link.asked().await;
    link.accept(&join).await;
    assert_eq!(link.progress().await.written, [0], "at once: it is what the leader has");
    link.say(frames::batches(vec![piece(join.place, 0)])).await;
    while link.progress().await.persisted != [1] {}

    let next = LeaderEpoch(EPOCH.0 + 1);
    side.asked.leave(id(0), next, false);
    // Late batches would move its progress.
    link.say(frames::batches(vec![piece(join.place, 1)])).await;
    let Some(to_leader::Is::Leave(leave)) = link.hear().await.is else { panic!("a leave was due") };
    assert_eq!((leave.place, leave.known_epoch, leave.stopping), (join.place, next.as_i32(), false));
    side.asked.follow(id(0));
    let join = link.asked().await;
    assert_eq!((join.end, copy.marks().log_end), (1, at(1)), "what came late was not taken");
    // An unsubscription while the broker stops is delivered.
    side.asked.leave(id(0), next, true);
    side.tasks.cancel();
    let Some(to_leader::Is::Leave(leave)) = link.hear().await.is else { panic!("a leave was due") };
    assert!(leave.stopping);
    assert!(link.from.next().await.is_none(), "and nothing after it");
    drop(link);
    side.tasks.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn moved_high_watermark_is_sent_without_batches() {
    let side = Side::new(LEADER);
    let partition = side.open(0, &[LEADER, FOLLOWER.broker]).await;
    let mut link = side.lead();
    link.join(1, id(0), EPOCH).await;
    assert_eq!(link.answer().await.is, Some(answer::Is::At(0)));
    link.say(frames::progress([(1, Ends::default())])).await;
    let acked = append(&partition, 10, Acks::All).await;
    let pieces = link.pieces().await;
    assert_eq!((pieces.len(), pieces[0].high_watermark), (1, 0));
    link.say(frames::progress([(1, Ends { written: at(1), persisted: at(1) })])).await;
    acked.await.unwrap().unwrap();
    let pieces = link.pieces().await;
    assert_eq!((pieces.len(), pieces[0].high_watermark, pieces[0].chunks.len()), (1, 1, 0));
    side.tasks.stop().await;
}

/// After a change of leader all replicas subscribe again, beside replicas that copy a history: writers wait for none but those in sync.
#[tokio::test(start_paused = true)]
async fn in_sync_follower_is_not_throttled_by_catch_up_limit() {
    for (isr, waits) in [(&[LEADER, FOLLOWER.broker][..], false), (&[LEADER], true)] {
        let side = Side::new(LEADER);
        let partition = side.open(0, isr).await;
        let _unanswered = append(&partition, 10, Acks::All).await;
        let overdrawn = CatchUp::new(Some(1));
        overdrawn.take(1 << 20);
        let mut link = side.lead_at(overdrawn);
        link.join(1, id(0), EPOCH).await;
        assert_eq!(link.answer().await.is, Some(answer::Is::At(0)));
        let came = tokio::time::timeout(Duration::from_secs(5), link.pieces()).await;
        assert_eq!(came.is_err(), waits, "{isr:?}");
        side.tasks.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn follower_that_reads_no_responses_is_blocked() {
    let side = Side::new(LEADER);
    let mut link = side.lead();
    let mut asked = 0;
    // The paused clock moves only when no task has work.
    let many = async {
        while asked < 100_000 {
            link.join(asked, id(99), EPOCH).await;
            asked += 1;
        }
    };
    tokio::time::timeout(Duration::from_secs(1), many).await.expect_err("the leader's side waits to be heard");
    let most = u32::try_from(leading::ANSWERS).unwrap() + 4;
    assert!((most - 4..=most).contains(&asked), "{asked} joins were taken in");
    // The link continues when its responses are read.
    for place in 0..asked {
        assert_eq!(link.answer().await.place, place);
    }
    link.join(asked, id(99), EPOCH).await;
    assert_eq!(link.answer().await.place, asked);
    side.tasks.stop().await;
}
