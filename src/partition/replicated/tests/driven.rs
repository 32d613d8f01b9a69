//! One task, driven by the test: links and ISR updates only record their requests.

use std::{path::Path, sync::Mutex};

use futures::FutureExt as _;

use crate::{
    cluster::{PartitionValue, Revision},
    log::{Identity, Options, SimDisk},
    model::{ConfigMap, TopicId},
    partition::{
        leader::{
            insync::{Agreed, Departure, Ends, Peer, Proposal, Registration},
            join::Claim,
        },
        replicated::tests::net::{append, at, batch, broker, send, tick},
        *,
    },
    task::{
        mutation::{self, Mutation},
        test_timeout::wait_until,
    },
};

/// Request of a partition's task, in order.
#[derive(Clone, Debug, PartialEq)]
enum Asked {
    Follow(BrokerId),
    Join(LeaderEpoch, Claim, Ends),
    Again,
    Leave(LeaderEpoch, bool),
    Propose(Proposal),
    ReadBack,
    Resign(LeaderEpoch),
}

#[derive(Default)]
struct Notes(Mutex<Vec<Asked>>);

impl Notes {
    fn add(&self, asked: Asked) {
        self.0.lock().unwrap().push(asked);
    }

    /// Takes the requests since the last call.
    fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl Links for Notes {
    fn follow(&self, _: PartitionId, leader: BrokerId) {
        self.add(Asked::Follow(leader));
    }

    fn join(&self, _: PartitionId, epoch: LeaderEpoch, claim: Claim, ends: Ends) {
        self.add(Asked::Join(epoch, claim, ends));
    }

    fn again(&self, _: PartitionId) {
        self.add(Asked::Again);
    }

    fn leave(&self, _: PartitionId, known: LeaderEpoch, stopping: bool) {
        self.add(Asked::Leave(known, stopping));
    }
}

impl Agreement for Notes {
    fn propose(&self, _: PartitionId, proposal: Proposal) {
        self.add(Asked::Propose(proposal));
    }

    fn read_back(&self, _: PartitionId) {
        self.add(Asked::ReadBack);
    }

    fn resign(&self, _: PartitionId, epoch: LeaderEpoch) {
        self.add(Asked::Resign(epoch));
    }
}

/// Opens broker 1's replica of three. The log is to be kept as long as it is written to.
fn open() -> (Arc<Partition>, Arc<Notes>, Log) {
    open_on(SimDisk::new())
}

fn open_on(disk: SimDisk) -> (Arc<Partition>, Arc<Notes>, Log) {
    let identity = Identity { cluster: "test".to_owned(), broker: broker(1) };
    let options = Options { journal_bytes: 1 << 20, reserve_bytes: 0, ..Options::default() };
    let log = Log::open(Arc::new(disk), Path::new("/data"), &identity, options).unwrap();
    let spec = Spec {
        id: PartitionId::new(TopicId::from_bytes([5; 16]), 0),
        topic: TopicName::new("events").unwrap(),
        config: Arc::new(TopicConfig::resolve(&ConfigMap::new(), &ConfigMap::new()).unwrap()),
        committed: None,
        tier: None,
        alone: false,
        anew: false,
        lag_time: Duration::from_secs(10),
    };
    let notes = Arc::new(Notes::default());
    let around = Surroundings { links: notes.clone(), agreement: notes.clone(), ..Surroundings::alone() };
    let queue = UpkeepQueue::default();
    (Partition::open(broker(1), &log, spec, around, &queue, &Tasks::new()).unwrap(), notes, log)
}

fn value(leader: Option<u32>, epoch: u32) -> PartitionValue {
    let whole = PartitionValue::new([1, 2, 3].map(broker).to_vec(), LeaderEpoch(epoch));
    PartitionValue { leader: leader.map(broker), ..whole }
}

async fn assign(partition: &Partition, value: PartitionValue, revision: u64) {
    let running = |number| (broker(number), Registration::Running(Revision(100 + u64::from(number))));
    let registered = [running(2), running(3)].into();
    let assignment = Assignment { value: Arc::new(value), revision: Revision(revision), committed: None, registered };
    partition.assign(assignment).await;
}

fn peer(number: u32) -> Peer {
    Peer { broker: broker(number), epoch: Revision(100 + u64::from(number)) }
}

/// Returns a batch as a leader of that epoch sends it.
fn sent(base: u64, epoch: u32) -> Batch {
    let mut batch = batch(b"x", None);
    batch.set_offset_and_epoch(at(base), LeaderEpoch(epoch));
    batch
}

fn pieces(epoch: u32, high_watermark: u64, batches: Vec<Batch>) -> FromLink {
    FromLink::Pieces { epoch: LeaderEpoch(epoch), high_watermark: at(high_watermark), batches }
}

fn answer(epoch: u32, join: Joined) -> FromLink {
    FromLink::Answer(Answered { epoch: LeaderEpoch(epoch), high_watermark: at(0), join, in_sync: false })
}

/// Delivers link events, and returns when the partition has handled them.
async fn told(partition: &Partition, said: impl IntoIterator<Item = FromLink>) {
    for said in said {
        partition.from_link(said).unwrap();
    }
    // A control message behind the others is handled after them.
    partition.seen(broker(9), Registration::None).await;
    assign_again(partition).await;
}

/// Sends outdated metadata, and returns when everything before it was handled.
async fn assign_again(partition: &Partition) {
    assign(partition, value(None, 0), 0).await;
}

fn joined(epoch: u32, last: Option<u32>, end: u64) -> Asked {
    let claim = Claim { last: last.map(LeaderEpoch), end: at(end), added: None };
    Asked::Join(LeaderEpoch(epoch), claim, Ends { written: at(end), persisted: at(end) })
}

#[tokio::test]
async fn follower_copies_and_rejects_batches_that_do_not_fit() {
    let (partition, notes, _log) = open();
    assign(&partition, value(Some(2), 4), 10).await;
    told(&partition, [FromLink::Up]).await;
    assert_eq!(notes.take(), [Asked::Follow(broker(2)), joined(4, None, 0)]);

    // Before the response nothing is accepted, and that is no reason to subscribe again.
    told(&partition, [pieces(4, 0, vec![sent(0, 4)])]).await;
    told(&partition, [answer(4, Joined::At(at(0))), pieces(4, 1, vec![sent(0, 3), sent(1, 4)])]).await;
    assert_eq!((partition.marks().log_end, partition.marks().high_watermark), (at(2), at(1)));
    wait_until("it is durable", || partition.ends().persisted == at(2)).await;
    assert_eq!(partition.standing().role, Role::Follower { leader: broker(2), in_sync: true });
    assert_eq!(notes.take(), []);

    // Late, of an earlier epoch: the batch changes nothing.
    told(&partition, [pieces(3, 2, vec![sent(2, 3)])]).await;
    assert_eq!(notes.take(), []);
    let bad = [
        ("a gap", vec![sent(3, 4)]),
        ("an overlap", vec![sent(1, 4)]),
        ("an epoch that falls", vec![sent(2, 3)]),
        ("an epoch above its leader's", vec![sent(2, 5)]),
        ("a good one before a gap", vec![sent(2, 4), sent(4, 4)]),
    ];
    for (what, batches) in bad {
        told(&partition, [pieces(4, 9, batches), pieces(4, 9, vec![sent(2, 4)])]).await;
        assert_eq!(notes.take(), [Asked::Again], "{what}");
        assert_eq!((partition.marks().log_end, partition.marks().high_watermark), (at(2), at(1)), "{what}");
        assert_eq!(partition.standing().role, Role::Follower { leader: broker(2), in_sync: false }, "{what}");
        told(&partition, [FromLink::Up, answer(4, Joined::At(at(2)))]).await;
        assert_eq!(notes.take(), [joined(4, Some(4), 2)], "{what}");
    }
    told(&partition, [pieces(4, 3, vec![sent(2, 4)])]).await;
    assert_eq!(partition.marks().high_watermark, at(3));
}

/// A follower holds records that its leader has not committed yet. No reader gets them, however far the reader has read elsewhere.
#[tokio::test]
async fn in_sync_follower_serves_only_committed_records() {
    let (partition, _notes, _log) = open();
    let reader = partition.reader().clone();
    let serves = || (partition.standing().role.serves(false), partition.standing().role.serves(true));
    let next = async |from| reader.read(at(from), (1 << 20).into()).await.unwrap().map(|fetched| fetched.next);
    assign(&partition, value(Some(2), 4), 10).await;
    told(&partition, [FromLink::Up]).await;
    assert_eq!(serves(), (false, false), "its leader has not answered");
    let four = (0..4).map(|n| sent(n, 4)).collect();
    told(&partition, [answer(4, Joined::At(at(0))), pieces(4, 2, four)]).await;
    assert_eq!(serves(), (false, true));
    assert_eq!((next(0).await, next(1).await), (Some(at(2)), Some(at(2))));
    let ready = Arc::new(Ready::default());
    reader.follow(&ready, 7);
    assert_eq!((ready.take(), ready.take()), (Some(7), None));
    assert_eq!((next(2).await, next(3).await, next(9).await), (None, None, None), "to be waited for");
    let broken = mutation::with_mutation(Some(Mutation::FollowerServesUncommitted), || next(2).now_or_never());
    assert_eq!(broken, Some(Some(at(4))), "it has them");
    told(&partition, [pieces(4, 3, vec![])]).await;
    assert_eq!((ready.take(), next(2).await), (Some(7), Some(at(3))), "the mark moved");

    // Removed from the ISR, and admitted again.
    let without = PartitionValue { isr: vec![broker(2), broker(3)], ..value(Some(2), 4) };
    assign(&partition, without, 11).await;
    assert_eq!(serves(), (false, false));
    assign(&partition, value(Some(2), 4), 12).await;
    assert_eq!(serves(), (false, true));
    // The link is lost: later commits of the leader do not arrive.
    told(&partition, [FromLink::Down]).await;
    assert_eq!(serves(), (false, false));
    // Another broker leads: no reads before it has found the two logs to agree.
    assign(&partition, value(Some(3), 5), 13).await;
    told(&partition, [FromLink::Up]).await;
    assert_eq!(serves(), (false, false));
    told(&partition, [answer(5, Joined::At(at(4)))]).await;
    assert_eq!((serves(), next(3).await), ((false, true), None));
    // The broker leads, and follows again.
    assign(&partition, value(Some(1), 6), 14).await;
    assert_eq!(serves(), (true, true));
    assign(&partition, value(Some(2), 7), 15).await;
    assert_eq!(serves(), (false, false));
}

#[tokio::test]
async fn follower_truncates_bootstraps_and_retries_by_response() {
    let (partition, notes, _log) = open();
    assign(&partition, value(Some(2), 4), 10).await;
    let copied = pieces(4, 1, (0..6).map(|n| sent(n, if n < 3 { 1 } else { 2 })).collect());
    told(&partition, [FromLink::Up, answer(4, Joined::At(at(0))), copied]).await;
    wait_until("it is durable", || partition.ends().persisted == at(6)).await;
    notes.take();

    // Another broker leads, which has only some of the records.
    assign(&partition, value(Some(3), 5), 11).await;
    told(&partition, [FromLink::Up]).await;
    assert_eq!(notes.take(), [Asked::Leave(LeaderEpoch(5), false), Asked::Follow(broker(3)), joined(5, Some(2), 6)]);
    told(&partition, [answer(5, Joined::Diverged { epoch: LeaderEpoch(1), end: at(7) })]).await;
    assert_eq!(notes.take(), [joined(5, Some(1), 3)], "no further than its own part of that epoch");
    assert_eq!(partition.marks().log_end, at(3));

    for refused in [
        answer(5, Joined::Refused("not now".to_owned())),
        answer(5, Joined::At(at(2))),
        answer(5, Joined::Diverged { epoch: LeaderEpoch(1), end: at(3) }),
        answer(6, Joined::At(at(3))),
        answer(5, Joined::Begin(Box::new(Beginning { at: at(9), in_bucket: true, ..Beginning::default() }))),
        answer(
            5,
            Joined::Begin(Box::new(Beginning {
                at: at(9),
                in_bucket: false,
                epochs: vec![(LeaderEpoch(2), at(10))],
                producers: bytes::Bytes::new(),
            })),
        ),
    ] {
        told(&partition, [refused.clone()]).await;
        wait_until("it asks again", || notes.0.lock().unwrap().contains(&Asked::Again)).await;
        assert_eq!(partition.marks().log_end, at(3), "{refused:?}");
        told(&partition, [FromLink::Up]).await;
        assert_eq!(notes.take(), [Asked::Again, joined(5, Some(1), 3)], "{refused:?}");
    }
    // The follower does not truncate committed records, and does not retry for ever.
    told(&partition, [answer(5, Joined::Diverged { epoch: LeaderEpoch(0), end: at(0) })]).await;
    assert_eq!((notes.take(), partition.marks().log_end), (vec![], at(3)));

    told(&partition, [FromLink::Up]).await;
    let epochs = vec![(LeaderEpoch(1), at(0)), (LeaderEpoch(3), at(5))];
    let beginning = Beginning { at: at(9), in_bucket: false, epochs, producers: bytes::Bytes::new() };
    told(&partition, [answer(5, Joined::Begin(Box::new(beginning.clone())))]).await;
    assert_eq!(notes.take(), [joined(5, Some(1), 3), joined(5, Some(3), 9)]);
    // A leader that repeats its response is not asked as fast as it responds.
    told(&partition, [answer(5, Joined::Begin(Box::new(beginning)))]).await;
    wait_until("it asks again", || notes.0.lock().unwrap().contains(&Asked::Again)).await;
    assert_eq!(notes.take(), [Asked::Again]);
    let marks = partition.marks();
    assert_eq!((marks.log_start, marks.local_start, marks.log_end), (at(9), at(9), at(9)));
    partition.stop().await;
    assert_eq!(notes.take(), [Asked::Leave(LeaderEpoch(5), true)]);
}

/// A leader has one request at a time. The outcome of a request in an earlier epoch is no outcome of the current request. Applied as
/// such, it would drop a member from the maximal ISR whose admission may still come true.
#[tokio::test]
async fn late_outcome_does_not_count_for_another_proposal() {
    let (partition, notes, _log) = open();
    assign(&partition, value(Some(1), 4), 10).await;
    partition.left(peer(2), Departure::Gone).await;
    assign_again(&partition).await;
    let [Asked::Propose(first)] = &notes.take()[..] else { panic!("one proposal") };
    assert_eq!((first.expect, &first.value.isr), (Revision(10), &vec![broker(1), broker(3)]));
    partition.left(peer(3), Departure::Gone).await;
    assign(&partition, value(None, 5), 20).await;
    assign(&partition, value(Some(1), 6), 21).await;
    partition.left(peer(3), Departure::Gone).await;
    assign_again(&partition).await;
    assert_eq!(notes.take(), [], "the first is not answered yet");

    partition.agreed(Agreed::Done(Revision(11))).await;
    assign_again(&partition).await;
    let [Asked::Propose(second)] = &notes.take()[..] else { panic!("one proposal") };
    assert_eq!((second.expect, &second.value.isr), (Revision(21), &vec![broker(1), broker(2)]));

    // The outcome is unknown: the key is read back, and nothing is proposed before.
    partition.agreed(Agreed::Unknown).await;
    partition.left(peer(2), Departure::Gone).await;
    assign_again(&partition).await;
    assert_eq!(notes.take(), [Asked::ReadBack]);
    // The metadata is faster: the value that is read later is known by then.
    assign(&partition, second.value.clone(), 22).await;
    assert_eq!(notes.take(), []);
    partition.agreed(Agreed::Found(second.value.clone(), Revision(22))).await;
    assign_again(&partition).await;
    let [Asked::Propose(third)] = &notes.take()[..] else { panic!("one proposal") };
    assert_eq!((third.expect, &third.value.isr), (Revision(22), &vec![broker(1)]));
}

#[tokio::test]
async fn broker_leads_at_most_once_in_an_epoch() {
    let (partition, notes, _log) = open();
    assign(&partition, value(Some(1), 4), 10).await;
    assert!(partition.standing().role.leads());
    let waiting = send(&partition, batch(b"x", None), Acks::All).await;
    wait_until("it is written", || partition.ends().written == at(1)).await;
    partition.agreed(Agreed::Gone).await;
    partition.left(peer(2), Departure::Gone).await;
    assign_again(&partition).await;
    let [Asked::Propose(_)] = &notes.take()[..] else { panic!("one proposal") };
    partition.agreed(Agreed::Gone).await;
    assert_eq!(waiting.await.unwrap(), Err(AppendError::Deposed));
    assign(&partition, value(Some(1), 4), 10).await;
    assert_eq!(partition.standing().role, Role::Waiting);
    // An older revision changes nothing.
    assign(&partition, value(Some(1), 5), 9).await;
    assert_eq!(partition.standing().role, Role::Waiting);
    assign(&partition, value(Some(1), 6), 12).await;
    assert!(partition.standing().role.leads());
    // This broker is no longer a replica.
    let gone = PartitionValue { replicas: vec![broker(2)], ..value(Some(2), 7) };
    assign(&partition, gone, 13).await;
    let refused = append(&partition, b"x", Acks::None).await;
    assert_eq!(refused, Err(AppendError::NotLeader { leader: Some(broker(2)), epoch: LeaderEpoch(7) }));
}

/// A follower's report of a newer epoch ends a leadership at once. Regression: a wrong report, by a broken follower or broken metadata,
/// stopped the partition for ever. The metadata kept naming a leader that waited for newer metadata.
#[tokio::test]
async fn wrong_report_of_newer_epoch_costs_only_an_epoch() {
    let (partition, notes, _log) = open();
    assign(&partition, value(Some(1), 4), 10).await;
    partition.deposed(LeaderEpoch(1_000_000)).await;
    assign_again(&partition).await;
    assert_eq!((partition.standing().role, partition.is_behind()), (Role::Waiting, true));
    let ticks = async |from_ms: u64| {
        for ms in [0, 250, 750] {
            tick(&partition, from_ms + ms).await;
        }
        assert_eq!(notes.take(), [], "the metadata may bring it yet");
        tick(&partition, from_ms + 1000).await;
        tick(&partition, from_ms + 1250).await;
        assert_eq!(notes.take(), [Asked::ReadBack]);
    };
    ticks(5000).await;
    partition.agreed(Agreed::Found(value(Some(1), 4), Revision(10))).await;
    assign_again(&partition).await;
    let [Asked::Propose(first)] = &notes.take()[..] else { panic!("one proposal") };
    assert_eq!((first.expect, &first.value), (Revision(10), &value(None, 5)));
    // The outcome of the proposal is unknown.
    partition.agreed(Agreed::Unknown).await;
    ticks(9000).await;
    partition.agreed(Agreed::Found(value(None, 5), Revision(11))).await;
    assign_again(&partition).await;
    assert_eq!((notes.take(), partition.is_behind()), (vec![], false));
    assign(&partition, value(Some(1), 6), 12).await;
    assert!(partition.standing().role.leads(), "what the follower said counts no more");
    // The report does not keep this broker from following another one.
    partition.deposed(LeaderEpoch(2_000_000)).await;
    assign(&partition, value(Some(3), 7), 13).await;
    assert_eq!((partition.standing().role, notes.take()), (Role::Waiting, vec![]));
    ticks(15_000).await;
    partition.agreed(Agreed::Found(value(Some(3), 7), Revision(13))).await;
    assign_again(&partition).await;
    assert_eq!(notes.take(), [Asked::Follow(broker(3))]);
    assign(&partition, value(Some(1), 8), 14).await;
    assert_eq!(notes.take(), [Asked::Leave(LeaderEpoch(8), false)]);
    // If the report was true, the store names the new leader.
    partition.deposed(LeaderEpoch(9)).await;
    ticks(20_000).await;
    partition.agreed(Agreed::Found(value(Some(2), 9), Revision(15))).await;
    assign_again(&partition).await;
    assert_eq!(notes.take(), [Asked::Follow(broker(2))]);
}

/// Regression: the second for the metadata was counted from the wait before, if that wait had ended before the next tick.
#[tokio::test]
async fn metadata_wait_counts_from_the_end_of_leadership() {
    let (partition, notes, _log) = open();
    assign(&partition, value(Some(1), 4), 10).await;
    partition.deposed(LeaderEpoch(5)).await;
    tick(&partition, 5000).await;
    // The metadata arrives.
    assign(&partition, value(Some(1), 6), 11).await;
    partition.deposed(LeaderEpoch(7)).await;
    tick(&partition, 60_000).await;
    assert_eq!(notes.take(), [], "the metadata may bring it yet");
    tick(&partition, 61_000).await;
    assert_eq!(notes.take(), [Asked::ReadBack]);
}

/// Regression: one clock serves all partitions of a broker. A task that was blocked at its disk for minutes had its queue filled with
/// ticks, and then blocked the clock of all other partitions.
#[tokio::test]
async fn blocked_task_delays_no_clock_and_keeps_queue_space() {
    let (partition, notes, _log) = open();
    assign(&partition, value(Some(2), 4), 10).await;
    (0..2 * QUEUE as u64).for_each(|now_ms| partition.tick(now_ms));
    assert_eq!(partition.from_link(FromLink::Up), Ok(()));
    told(&partition, []).await;
    assert_eq!(notes.take().len(), 2, "the link was asked for, and used");
}

/// The queue for link events is bounded, and no sender waits for it.
#[tokio::test]
async fn full_control_queue_rejects_link_events() {
    let (partition, notes, _log) = open();
    assign(&partition, value(Some(2), 4), 10).await;
    let all: Vec<_> = (0..2 * QUEUE).map(|_| partition.from_link(FromLink::Up)).collect();
    assert_eq!(all.iter().filter(|taken| taken.is_err()).count(), QUEUE);
    assert!(all[..QUEUE].iter().all(Result::is_ok));
    told(&partition, []).await;
    assert_eq!(notes.take().len(), 1 + QUEUE, "what was taken was carried out");
}

/// A subscription in an epoch that this broker has not received yet waits for it, and not for ever.
#[tokio::test(start_paused = true)]
async fn subscription_waits_for_its_epoch_to_begin() {
    let (partition, _notes, _log) = open();
    assign(&partition, value(Some(2), 4), 10).await;
    let claim = Claim { last: None, end: at(0), added: None };
    let early = partition.join(peer(2), LeaderEpoch(5), claim, Ends::default());
    let news = async {
        tokio::time::sleep(Duration::from_millis(900)).await;
        assign(&partition, value(Some(1), 5), 11).await;
    };
    let (answered, ()) = tokio::join!(early, news);
    assert!(matches!(answered, Answered { epoch: LeaderEpoch(5), join: Joined::At(_), .. }), "{answered:?}");
    let began = crate::task::clock::monotonic();
    let answered = partition.join(peer(3), LeaderEpoch(6), claim, Ends::default()).await;
    assert!(matches!(&answered.join, Joined::Refused(why) if why.contains("epoch 5")), "{answered:?}");
    assert_eq!(began.elapsed().as_millis(), 1000);
}

/// Regression: an etcd that was restored from a backup names epochs again, and the first append of such a leader panicked.
#[tokio::test]
async fn broker_does_not_lead_in_an_epoch_before_its_log() {
    let (partition, notes, _log) = open();
    assign(&partition, value(Some(2), 7), 10).await;
    told(&partition, [FromLink::Up, answer(7, Joined::At(at(0))), pieces(7, 1, vec![sent(0, 7)])]).await;
    let older = value(Some(1), 5);
    assign(&partition, older.clone(), 11).await;
    notes.take();
    let refused = send(&partition, batch(b"y", None), Acks::Leader).await.await.unwrap();
    assert!(matches!(refused, Err(AppendError::NotLeader { .. })), "{refused:?}");
    assert_eq!((partition.standing().role, partition.is_behind()), (Role::Waiting, true));

    // That epoch ends here, and an election in the next one follows.
    for ms in [0, 1000] {
        tick(&partition, ms).await;
    }
    assert_eq!(notes.take(), [Asked::ReadBack]);
    partition.agreed(Agreed::Found(older.clone(), Revision(11))).await;
    assign_again(&partition).await;
    let [Asked::Propose(ended)] = &notes.take()[..] else { panic!("one proposal") };
    assert_eq!(ended.value, older.leaderless());
}

/// Regression: the admission of the only possible successor was pending when the disk failed, and the partition accepted no writes until
/// the broker was stopped.
#[tokio::test]
async fn failed_leader_resigns_when_a_successor_enters_isr() {
    let disk = SimDisk::new();
    let (partition, notes, _log) = open_on(disk.clone());
    let alone = PartitionValue { isr: vec![broker(1)], ..value(Some(1), 4) };
    assign(&partition, alone.clone(), 10).await;
    disk.fail_writes_after(Some(0));
    let refused = send(&partition, batch(b"x", None), Acks::Leader).await.await.unwrap();
    assert!(matches!(refused, Err(AppendError::StorageFailed { .. })), "{refused:?}");
    assert_eq!(notes.take(), [Asked::Resign(LeaderEpoch(4))]);
    assign(&partition, PartitionValue { isr: vec![broker(1), broker(2)], ..alone }, 11).await;
    assert_eq!(notes.take(), [Asked::Resign(LeaderEpoch(4))]);
}

/// The outcome of a proposal names this broker id as the leader of a newer epoch: that may be another process, on a copy of the data
/// directory.
#[tokio::test]
async fn only_the_metadata_cache_starts_a_leader() {
    let (partition, notes, _log) = open();
    assign(&partition, value(Some(1), 4), 10).await;
    partition.left(peer(2), Departure::Gone).await;
    assign_again(&partition).await;
    assert!(matches!(&notes.take()[..], [Asked::Propose(_)]));
    let newer = value(Some(1), 6);
    partition.agreed(Agreed::Found(newer.clone(), Revision(12))).await;
    assign_again(&partition).await;
    assert_eq!(partition.standing().role, Role::Waiting);
    for ms in [0, 1000] {
        tick(&partition, ms).await;
    }
    assert_eq!(notes.take(), [Asked::ReadBack]);
    partition.agreed(Agreed::Found(newer.clone(), Revision(12))).await;
    assign_again(&partition).await;
    assert_eq!((partition.standing().role, notes.take()), (Role::Waiting, vec![]));
    assign(&partition, newer, 12).await;
    assert!(matches!(partition.standing().role, Role::Leader { .. }));
}
