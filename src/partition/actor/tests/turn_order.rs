//! Order of the effects of a turn. A recorder replaces the links and the ISR updater, and is called at each submission
//! to the journal. At each of these calls the recorder stores the state that was published before.

use std::sync::OnceLock;

use super::*;
use crate::{
    partition::{
        context::{IsrUpdater, ReplicationLinks},
        leader::isr::IsrProposal,
    },
    task::lock::Mutex,
    tier::TierState,
};

/// One effect, with the state that was published before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Effect {
    name: &'static str,
    epoch: u32,
    log_end: u64,
    high_watermark: u64,
    /// True if the watched write had its result before the effect.
    has_result: bool,
}

/// Stores the effects of an actor in their order.
struct Recorder {
    published: Arc<PublishedState>,
    /// Receiver of the watched write: each effect stores whether this write has its result.
    watched: Mutex<Option<Receiver<AppendResult>>>,
    effects: Mutex<Vec<Effect>>,
}

impl Recorder {
    /// Stores an effect with the published state.
    fn add_effect(&self, name: &'static str) {
        let (status, watermarks) = (self.published.status(), self.published.watermarks());
        self.effects.lock().push(Effect {
            name,
            epoch: status.epoch.0,
            log_end: watermarks.log_end.get(),
            high_watermark: watermarks.high_watermark.get(),
            has_result: self.watched.lock().as_ref().is_some_and(|result| !result.is_empty()),
        });
    }

    /// Drops the stored effects, and watches the result of this write at the next ones.
    fn watch(&self, written: Receiver<AppendResult>) {
        *self.watched.lock() = Some(written);
        self.effects.lock().clear();
    }

    /// Removes and returns the stored effects, and the result of the watched write; `None` if it has none yet.
    fn take(&self) -> (Vec<Effect>, Option<AppendResult>) {
        let result = self.watched.lock().as_mut().and_then(|written| written.try_recv().ok());
        (std::mem::take(&mut self.effects.lock()), result)
    }
}

impl ReplicationLinks for Recorder {
    fn start_following(&self, _: PartitionId, _: BrokerId) {
        self.add_effect("follow");
    }

    fn subscribe(&self, _: PartitionId, _: LeaderEpoch, _: LogPosition, _: ReplicaProgress) {
        self.add_effect("subscribe");
    }

    fn retry_later(&self, _: PartitionId) {}

    fn unsubscribe(&self, _: PartitionId, _: LeaderEpoch, _: bool) {}
}

impl IsrUpdater for Recorder {
    fn propose(&self, _: PartitionId, _: IsrProposal) {
        self.add_effect("propose");
    }

    fn read_back(&self, _: PartitionId) {}

    fn resign(&self, _: PartitionId, _: LeaderEpoch) {}
}

/// Returns an actor with its data directory and recorder. The actor leads in epoch 4, with the ISR 1 and 2 among the
/// replicas 1 to 3.
fn open_recorded(start: Offset) -> (DataDir, Actor, Arc<Recorder>) {
    // The hook is an option of the log, so it exists before the actor, and the recorder needs the actor's published
    // state. So the hook gets the recorder later.
    let recorder = Arc::new(OnceLock::<Arc<Recorder>>::new());
    let recorder_in_hook = Arc::clone(&recorder);
    let hook = SimHook::new(move || {
        if let Some(recorder) = recorder_in_hook.get() {
            recorder.add_effect("submit");
        }
    });
    let log = open_log_with(SimDisk::new(), Some(hook));
    let mut actor = open_at(&log, start);
    let recorder = recorder.get_or_init(|| {
        Arc::new(Recorder {
            published: Arc::clone(&actor.published),
            watched: Mutex::default(),
            effects: Mutex::default(),
        })
    });
    actor.ctx.links = recorder.clone();
    actor.ctx.isr_updater = recorder.clone();
    let recorder = Arc::clone(recorder);
    let registered = (1..=3).map(|id| (BrokerId(id), BrokerStatus::Registered(Revision(1))));
    actor.metadata.set_broker_statuses(registered.collect());
    actor.apply_partition_value(Arc::new(value(4, 1)), Revision(4));
    actor.finish_turn();
    (log, actor, recorder)
}

/// Returns the value of an epoch with this leader.
fn value(epoch: u32, leader: u32) -> PartitionValue {
    let (replicas, leader) = (vec![BrokerId(1), BrokerId(2), BrokerId(3)], Some(BrokerId(leader)));
    PartitionValue { leader, isr: vec![BrokerId(1), BrokerId(2)], ..PartitionValue::new(replicas, LeaderEpoch(epoch)) }
}

fn peer(broker: u32) -> PeerId {
    PeerId { broker: BrokerId(broker), epoch: Revision(1) }
}

/// Returns the subscription of a follower whose durable log, all of epoch 4, ends at `end`. The subscription counts as
/// an acknowledgement.
fn subscribe(broker: u32, end: u64) -> ControlMessage {
    let end = Offset::new(end).unwrap();
    ControlMessage::Subscribe(Box::new(SubscribeMessage {
        peer: peer(broker),
        epoch: LeaderEpoch(4),
        position: LogPosition {
            last_epoch: (end > Offset::ZERO).then_some(LeaderEpoch(4)),
            log_end: end,
            removal_count: None,
        },
        progress: ReplicaProgress { log_end: end, persisted_end: end },
        responder: oneshot::channel().0,
    }))
}

/// Returns the report that a follower's process exited.
fn exit(broker: u32) -> ControlMessage {
    ControlMessage::FollowerDisconnected(peer(broker), DisconnectCause::ProcessGone)
}

/// Handles these messages in one turn.
async fn handle_in_one_turn(actor: &mut Actor, messages: [ControlMessage; 2]) {
    let control = connect_control(actor);
    let [first, second] = messages;
    control.try_send(second).expect("the queue has space");
    actor.handle(Input::Control(first)).await;
}

#[tokio::test]
async fn turn_submits_publishes_proposes_and_responds() {
    let (log, mut actor, recorder) = open_recorded(Offset::ZERO);
    let written = write(&mut actor);
    assert!(log.journal_step());
    take_signals(&mut actor);
    recorder.watch(written);
    let _appended = append(&mut actor, Acks::All);
    actor.flush();
    handle_in_one_turn(&mut actor, [subscribe(2, 1), exit(2)]).await;
    let submitted = Effect { name: "submit", epoch: 4, log_end: 1, high_watermark: 0, has_result: false };
    let proposed = Effect { name: "propose", log_end: 2, high_watermark: 1, ..submitted };
    let (effects, result) = recorder.take();
    assert_eq!(effects, [submitted, proposed]);
    assert_eq!(result.expect("the write is committed").unwrap().end.get(), 1);
}

#[tokio::test]
async fn commit_before_role_change_is_published_in_its_epoch() {
    let assignment = || PartitionAssignment {
        value: Arc::new(value(5, 2)),
        revision: Revision(5),
        committed: None,
        registered: Default::default(),
    };
    let changes = [
        (ControlMessage::Assign(Box::new(assignment()), oneshot::channel().0), Some("follow")),
        (ControlMessage::NewerEpoch(LeaderEpoch(5)), None),
    ];
    for (change, effect) in changes {
        let (log, mut actor, recorder) = open_recorded(Offset::ZERO);
        let written = write(&mut actor);
        assert!(log.journal_step());
        take_signals(&mut actor);
        recorder.watch(written);
        handle_in_one_turn(&mut actor, [subscribe(2, 1), change]).await;
        let (effects, result) = recorder.take();
        let expected = effect.map(|name| Effect { name, epoch: 4, log_end: 1, high_watermark: 1, has_result: true });
        assert_eq!(effects, expected.into_iter().collect::<Vec<_>>());
        assert_eq!(result.expect("the write has its result").unwrap().end.get(), 1);
        assert_eq!(recorder.published.watermarks().high_watermark.get(), 1);
    }
}

#[tokio::test]
async fn truncation_is_published_before_and_after() {
    let (log, mut actor, recorder) = open_recorded(Offset::ZERO);
    let written = write(&mut actor);
    assert!(log.journal_step());
    take_signals(&mut actor);
    actor.apply_partition_value(Arc::new(value(5, 2)), Revision(5));
    recorder.watch(written);
    let recorder_in_change = Arc::clone(&recorder);
    let change = move |replica: &mut ReplicaLog| {
        recorder_in_change.add_effect("truncate");
        replica.truncate(Offset::ZERO).map(drop)
    };
    assert!(actor.change_log(change).await);
    actor.subscribe_or_retry(true);
    let (effects, _) = recorder.take();
    let find = |name| effects.iter().find(|effect| effect.name == name).copied();
    let truncated = Effect { name: "truncate", epoch: 5, log_end: 1, high_watermark: 0, has_result: true };
    assert_eq!(find("truncate"), Some(truncated));
    assert_eq!(find("subscribe"), Some(Effect { name: "subscribe", log_end: 0, ..truncated }));
}

#[tokio::test]
async fn log_start_is_published_before_the_turn_ends() {
    let (log, mut actor, recorder) = open_recorded(Offset::ZERO);
    recorder.watch(write(&mut actor));
    assert!(log.journal_step());
    take_signals(&mut actor);
    handle_in_one_turn(&mut actor, [subscribe(2, 1), exit(3)]).await;
    let state = TierState { log_start: Offset::new(1).unwrap(), epoch: LeaderEpoch(4), ..TierState::default() };
    actor.handle_admin_command(ActorCommand::ApplyTierState(Box::new(state))).await;
    assert_eq!(recorder.published.watermarks().log_start.get(), 1);
}

/// Regression: the proposal waited until the turn had read the tables at the log start for another follower. The
/// proposal must be sent before that read.
#[tokio::test]
async fn isr_change_does_not_wait_for_blocking_read() {
    let (_log, mut actor, recorder) = open_recorded(Offset::new(10).unwrap());
    let control = connect_control(&mut actor);
    control.try_send(subscribe(3, 0)).expect("the queue has space");
    let mut handled = Box::pin(actor.handle(Input::Control(exit(2))));
    assert!(futures::poll!(handled.as_mut()).is_pending(), "the turn reads the tables");
    assert_eq!(recorder.take().0.iter().map(|effect| effect.name).collect::<Vec<_>>(), ["propose"]);
    handled.await;
}
