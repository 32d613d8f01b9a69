//! The follower's side of a link: subscriptions go out, batches come in, and records in the log are acknowledged.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Weak},
    time::Duration,
};

use futures::{Stream, StreamExt as _};
use tokio::{sync::mpsc, time::Instant};

use super::{
    Ended, Find,
    asked::{Asked, Ticket, Todo},
    frames::{self, BadFrame, FromLeader, JoinFrame, Padded as _, Piece},
};
use crate::{
    limits,
    model::{LeaderEpoch, Offset, PartitionId},
    partition::{Answered, FromLink, Joined, On, Overrun, Partition, Ready, leader::insync::Ends},
    proto::{status::Status, v1},
    task::{Tasks, clock},
    telemetry::{Counter, LogThrottle},
};

/// First pause before a partition subscribes again. It doubles each time, until a leader has served the partition for [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_millis(20);

/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Maximum time that the end of a link waits for the last message of the other side, or for the delivery of this side's.
const LAST_WORD: Duration = Duration::from_millis(500);

/// Serves the partitions that send their requests to `asked` over one link, until the link ends. Each of them is notified when the link
/// is connected, and when it is not. `received` counts the bytes of the received batches.
pub async fn follow<S>(
    asked: &Asked,
    find: &Find,
    mut incoming: S,
    outgoing: mpsc::Sender<v1::ToLeader>,
    received: &Counter,
    tasks: &Tasks,
) -> Ended
where
    S: Stream<Item = Result<v1::ToFollower, Status>> + Unpin + Send,
{
    asked.begin();
    let mut following = Following {
        asked,
        find,
        received,
        slots: Vec::new(),
        slot_of: BTreeMap::new(),
        places: BTreeMap::new(),
        next_place: 0,
        ready: Arc::default(),
        messages: VecDeque::new(),
        ping: None,
        later: BTreeSet::new(),
        waiting: BTreeMap::new(),
        pauses: BTreeMap::new(),
    };
    let ended = following.run(&mut incoming, &outgoing, tasks).await;
    if matches!(ended, Ended::Stopped) {
        let said = following.say_goodbye(incoming, outgoing);
        if tokio::time::timeout(LAST_WORD, said).await.is_err() {
            tracing::debug!("the other side of a link may not have heard who leaves");
        }
    }
    for partition in asked.end() {
        if let Some(partition) = find(partition)
            && partition.from_link(FromLink::Down).is_err()
        {
            // The queue is full of earlier events; the next link notifies the partition again.
            tracing::debug!(partition = %partition.id(), "not told that its link is lost");
        }
    }
    ended
}

/// One partition on this link.
struct Slot {
    id: PartitionId,
    /// The partition may have been deleted since.
    partition: Weak<Partition>,
    place: Option<Place>,
    /// Throttle log lines about subscriptions that ended with an error here (`failed`) or by the leader (`dismissed`).
    failed: LogThrottle,
    dismissed: LogThrottle,
}

/// A subscription.
struct Place {
    partition: Arc<Partition>,
    number: u32,
    ticket: Ticket,
    join: JoinFrame,
    /// Time at which the leader accepted the reported log end.
    joined: Option<Instant>,
    /// Progress that was acknowledged last.
    told: Option<Ends>,
}

struct Following<'a> {
    asked: &'a Asked,
    find: &'a Find,
    received: &'a Counter,
    /// One slot for each partition that ever subscribed on this link, by the index under which it marks `ready`.
    slots: Vec<Slot>,
    slot_of: BTreeMap<PartitionId, usize>,
    places: BTreeMap<u32, usize>,
    next_place: u32,
    /// Partitions with progress to acknowledge.
    ready: Arc<Ready>,
    /// Messages that are sent before any new progress: subscriptions and unsubscriptions.
    messages: VecDeque<v1::ToLeader>,
    /// Newest ping without a response.
    ping: Option<u64>,
    /// Partitions that are to be notified that the link is connected, by time.
    later: BTreeSet<(Instant, PartitionId)>,
    /// The same by partition.
    waiting: BTreeMap<PartitionId, Instant>,
    /// Next pause of each partition that has waited.
    pauses: BTreeMap<PartitionId, Duration>,
}

impl Following<'_> {
    async fn run<S>(&mut self, incoming: &mut S, outgoing: &mpsc::Sender<v1::ToLeader>, tasks: &Tasks) -> Ended
    where
        S: Stream<Item = Result<v1::ToFollower, Status>> + Unpin + Send,
    {
        loop {
            while let Some((partition, todo)) = self.asked.take() {
                self.carry_out(partition, todo);
            }
            let ready = Arc::clone(&self.ready);
            let first = self.later.first().map(|(due, _)| *due);
            let due = async {
                match first {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = tasks.cancelled() => return Ended::Stopped,
                permit = outgoing.reserve(), if self.has_message() => match (permit, self.message()) {
                    (Ok(permit), Some(message)) => permit.send(message.padded()),
                    _ => return refused(incoming).await,
                },
                () = self.asked.changed() => {}
                () = ready.wait(), if self.messages.is_empty() => self.gather_progress(limits::MAX_PEER_REPLICAS),
                message = incoming.next() => match message {
                    Some(Ok(message)) => {
                        if let Err(bad) = self.received(message) {
                            return Ended::Bad(bad.into());
                        }
                    }
                    Some(Err(status)) => return Ended::Broken(status),
                    None => return Ended::Closed,
                },
                () = due => self.remind(),
            }
        }
    }

    fn has_message(&self) -> bool {
        self.ping.is_some() || !self.messages.is_empty()
    }

    /// Returns the next message: the response to a ping first.
    fn message(&mut self) -> Option<v1::ToLeader> {
        self.ping.take().map(frames::pong).or_else(|| self.messages.pop_front())
    }

    /// Sends the pending unsubscriptions, and waits until the other side has received them: it ends the stream then.
    async fn say_goodbye<S>(&mut self, mut incoming: S, outgoing: mpsc::Sender<v1::ToLeader>)
    where
        S: Stream<Item = Result<v1::ToFollower, Status>> + Unpin + Send,
    {
        while let Some((partition, todo)) = self.asked.take() {
            self.carry_out(partition, Todo { leave: todo.leave, ..Todo::default() });
        }
        for message in self.messages.drain(..) {
            if outgoing.send(message.padded()).await.is_err() {
                return;
            }
        }
        drop(outgoing);
        while incoming.next().await.is_some() {}
    }

    fn carry_out(&mut self, id: PartitionId, todo: Todo) {
        if let Some(leave) = todo.leave {
            self.pauses.remove(&id);
            if let Some(due) = self.waiting.remove(&id) {
                self.later.remove(&(due, id));
            }
            if let Some(place) = self.end_place(id) {
                self.messages.push_back(frames::leave(place.number, leave.known, leave.stopping));
            }
        }
        if todo.up {
            self.say_up(id);
        }
        if todo.again {
            self.wait(id);
        }
        if let Some((ticket, join)) = todo.join {
            self.join(ticket, join);
        }
    }

    /// Notifies a partition that the link is connected, or schedules the notification if it cannot be delivered now.
    fn say_up(&mut self, id: PartitionId) {
        let told = (self.find)(id).is_some_and(|partition| partition.from_link(FromLink::Up).is_ok());
        if !told {
            self.wait(id);
        }
    }

    /// Schedules the notification that the link is connected for the end of the partition's pause.
    fn wait(&mut self, id: PartitionId) {
        if self.waiting.contains_key(&id) {
            return;
        }
        self.reset_pause(id);
        let pause = self.pauses.entry(id).or_insert(PAUSE);
        let due = clock::monotonic() + *pause;
        self.later.insert((due, id));
        self.waiting.insert(id, due);
        *pause = (*pause * 2).min(LONGEST_PAUSE);
    }

    /// Notifies the partitions whose pause is over.
    fn remind(&mut self) {
        let now = clock::monotonic();
        while let Some((due, id)) = self.later.first().copied()
            && due <= now
        {
            self.later.pop_first();
            self.waiting.remove(&id);
            if self.asked.follows(id) {
                self.say_up(id);
            }
        }
    }

    fn join(&mut self, ticket: Ticket, join: JoinFrame) {
        let id = join.partition;
        self.end_place(id);
        let Some((index, partition)) = self.slot(id) else {
            // The partition is being opened, or closed.
            self.asked.give_up(id, ticket);
            return self.wait(id);
        };
        let number = self.next_place;
        self.next_place = self.next_place.wrapping_add(1);
        self.places.insert(number, index);
        self.slots[index].place = Some(Place { partition, number, ticket, join, joined: None, told: None });
        self.messages.push_back(frames::join(number, &join));
    }

    /// Returns the slot of a partition as it is open now.
    fn slot(&mut self, id: PartitionId) -> Option<(usize, Arc<Partition>)> {
        let partition = (self.find)(id)?;
        let index = *self.slot_of.entry(id).or_insert(self.slots.len());
        if index == self.slots.len() {
            self.slots.push(Slot {
                id,
                partition: Weak::new(),
                place: None,
                failed: LogThrottle::default(),
                dismissed: LogThrottle::default(),
            });
        }
        let (slot, weak) = (&mut self.slots[index], Arc::downgrade(&partition));
        if !Weak::ptr_eq(&slot.partition, &weak) {
            slot.partition = weak;
            partition.follow(&self.ready, index, On::Progress);
        }
        Some((index, partition))
    }

    /// Resets the pause if the subscription lasted. A subscription that ended at once may do so again: its pauses keep growing.
    fn reset_pause(&mut self, id: PartitionId) {
        let place = self.slot_of.get(&id).and_then(|index| self.slots[*index].place.as_ref());
        let joined = place.and_then(|place| place.joined);
        if joined.is_some_and(|joined| clock::monotonic().saturating_duration_since(joined) >= LONGEST_PAUSE) {
            self.pauses.remove(&id);
        }
    }

    fn end_place(&mut self, id: PartitionId) -> Option<Place> {
        self.reset_pause(id);
        let index = *self.slot_of.get(&id)?;
        let place = self.slots[index].place.take()?;
        self.places.remove(&place.number);
        Some(place)
    }

    /// Ends a subscription after an error; the partition subscribes again after a pause.
    fn fail(&mut self, index: usize, why: &dyn std::fmt::Display) {
        let Some(place) = self.end_and_wait(index) else { return };
        let Some(count) = self.slots[index].failed.occur(clock::monotonic()) else {
            return tracing::debug!(partition = %place.partition.id(), %why, "what the leader sent is refused again");
        };
        tracing::warn!(
            topic = %place.partition.topic(), partition = %place.partition.id(), epoch = %place.join.epoch, count,
            log_end = %place.partition.ends().written, %why, "what the leader sent is refused; the partition joins again"
        );
    }

    /// Ends a subscription that the leader ended, as at each change of leader; the partition subscribes again after a pause.
    fn dismissed(&mut self, index: usize, why: &dyn std::fmt::Display) {
        let Some(place) = self.end_and_wait(index) else { return };
        let Some(count) = self.slots[index].dismissed.occur(clock::monotonic()) else {
            return tracing::debug!(partition = %place.partition.id(), %why, "the leader sends no more again");
        };
        tracing::info!(
            topic = %place.partition.topic(), partition = %place.partition.id(), epoch = %place.join.epoch, count,
            log_end = %place.partition.ends().written, %why, "the leader sends no more; the partition joins again"
        );
    }

    fn end_and_wait(&mut self, index: usize) -> Option<Place> {
        let id = self.slots[index].id;
        let place = self.end_place(id)?;
        self.asked.give_up(id, place.ticket);
        self.messages.push_back(frames::leave(place.number, place.join.epoch, false));
        self.wait(id);
        Some(place)
    }

    /// Queues one message with the progress of subscriptions that moved, at most `max_places` of them.
    fn gather_progress(&mut self, max_places: usize) {
        let mut moved = Vec::new();
        // The rest is gathered when this message has been sent.
        while moved.len() < max_places
            && let Some(index) = self.ready.take()
        {
            let Some(place) = &mut self.slots[index].place else { continue };
            if place.joined.is_none() {
                continue;
            }
            // Read while the subscription holds: a partition that unsubscribes, or subscribes again, changes its log only after that.
            let ends = self.asked.while_joined(&place.partition, place.ticket, Partition::ends);
            if let Some(ends) = ends.filter(|ends| place.told != Some(*ends)) {
                place.told = Some(ends);
                moved.push((place.number, ends));
            }
        }
        if !moved.is_empty() {
            self.messages.push_back(frames::progress(moved));
        }
    }

    fn received(&mut self, message: v1::ToFollower) -> Result<(), BadFrame> {
        match message.try_into()? {
            FromLeader::Answer { place, answered } => {
                if let Some(index) = self.places.get(&place).copied() {
                    match answered {
                        Ok(answered) => self.answered(index, answered),
                        Err(bad) => self.fail(index, &bad),
                    }
                }
            }
            FromLeader::Ping(number) => self.ping = Some(number),
            FromLeader::Batches(pieces) => {
                for piece in pieces {
                    if let Some(index) = self.places.get(&piece.place).copied()
                        && let Err(why) = self.take(index, piece)
                    {
                        self.fail(index, &why);
                    }
                }
            }
        }
        Ok(())
    }

    fn answered(&mut self, index: usize, answered: Answered) {
        let Slot { id, place: Some(place), .. } = &mut self.slots[index] else { return };
        let id = *id;
        match &answered.join {
            Joined::Refused(why) if place.joined.is_some() => {
                let why = why.clone();
                return self.dismissed(index, &why);
            }
            _ if place.joined.is_some() => return self.fail(index, &"a second answer came"),
            Joined::At(at) if *at != place.join.claim.end => {
                let why = not_asked("an offset to go on at", *at, place.join.claim.end);
                return self.fail(index, &why);
            }
            Joined::At(_) => place.joined = Some(clock::monotonic()),
            _ => {}
        }
        let over = place.joined.is_none();
        let answer = FromLink::Answer(answered);
        let handed = self.asked.while_joined(&place.partition, place.ticket, |to| to.from_link(answer));
        if let Some(Err(overrun)) = handed {
            return self.fail(index, &overrun);
        }
        if over {
            self.end_place(id);
        }
    }

    fn take(&mut self, index: usize, piece: v1::Piece) -> Result<(), Untaken> {
        let Some(place) = &mut self.slots[index].place else { return Ok(()) };
        if place.joined.is_none() {
            return Err(Untaken::Early);
        }
        self.received.inc_by(piece.chunks.iter().map(|chunk| chunk.len() as u64).sum());
        let Piece { epoch, high_watermark, batches } = piece.try_into()?;
        if epoch != place.join.epoch {
            return Err(Untaken::Epoch { got: epoch, joined: place.join.epoch });
        }
        let pieces = FromLink::Pieces { epoch, high_watermark, batches };
        self.asked.while_joined(&place.partition, place.ticket, |to| to.from_link(pieces)).transpose()?;
        Ok(())
    }
}

/// Returns the end of a link whose other side takes no more messages: it has sent the reason, or is about to.
async fn refused<S>(incoming: &mut S) -> Ended
where
    S: Stream<Item = Result<v1::ToFollower, Status>> + Unpin + Send,
{
    let why = incoming.filter_map(async |message| message.err());
    match tokio::time::timeout(LAST_WORD, std::pin::pin!(why).next()).await {
        Ok(Some(status)) => Ended::Broken(status),
        Ok(None) | Err(_) => Ended::Closed,
    }
}

/// Reason why a piece cannot be delivered.
#[derive(Debug, thiserror::Error)]
enum Untaken {
    #[error(transparent)]
    Bad(#[from] BadFrame),
    #[error(transparent)]
    Overrun(#[from] Overrun),
    #[error("batches came before the answer")]
    Early,
    #[error("batches of epoch {got} came where epoch {joined} was joined")]
    Epoch { got: LeaderEpoch, joined: LeaderEpoch },
}

fn not_asked(field: &'static str, got: Offset, expected: Offset) -> BadFrame {
    BadFrame::NotAsked { field, got: got.as_i64(), expected: expected.as_i64() }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::{model::BrokerId, partition::session::tests::Side, proto::v1::to_leader};

    #[test]
    fn largest_progress_fits_into_one_request() {
        let end = Offset::from_i64(i64::MAX).expect("an offset");
        let ends = Ends { written: end, persisted: end };
        let message = frames::progress(std::iter::repeat_n((u32::MAX, ends), limits::MAX_PEER_REPLICAS));
        assert!(message.encoded_len() < limits::MAX_PEER_REQUEST_BYTES, "{}", message.encoded_len());
    }

    fn joins_nothing_yet<'a>(side: &'a Side, find: &'a Find, received: &'a Counter) -> Following<'a> {
        Following {
            asked: &side.asked,
            find,
            received,
            slots: Vec::new(),
            slot_of: BTreeMap::new(),
            places: BTreeMap::new(),
            next_place: 0,
            ready: Arc::default(),
            messages: VecDeque::new(),
            ping: None,
            later: BTreeSet::new(),
            waiting: BTreeMap::new(),
            pauses: BTreeMap::new(),
        }
    }

    /// Regression: a leader that could not read the records that a follower lacked was asked fifty times a second, and each time both
    /// logged a line.
    #[tokio::test(flavor = "multi_thread")]
    async fn subscription_that_ends_at_once_waits_longer_each_time() {
        let side = Side::new(BrokerId(2));
        let (find, received) = (side.find(), Counter::default());
        side.asked.begin();
        side.open(0, &[BrokerId(1)]).await;
        let mut following = joins_nothing_yet(&side, &find, &received);
        let mut pauses = Vec::new();
        for lasts in [false, false, false, true] {
            let joins = async {
                while following.places.is_empty() {
                    following.remind();
                    while let Some((partition, todo)) = side.asked.take() {
                        following.carry_out(partition, todo);
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), joins).await.expect("it joins again");
            let since = clock::monotonic() - if lasts { LONGEST_PAUSE } else { Duration::ZERO };
            following.slots[0].place.as_mut().expect("it joined").joined = Some(since);
            following.dismissed(0, &"its disk is damaged");
            pauses.extend(following.pauses.values().copied());
        }
        assert_eq!(pauses, [2, 4, 8, 2].map(|times| PAUSE * times), "the next pause");
        let slot = &mut following.slots[0];
        let now = clock::monotonic();
        assert_eq!(
            (slot.dismissed.occur(now), slot.failed.occur(now)),
            (None, Some(1)),
            "a fault is logged all the same"
        );
        side.tasks.stop().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn progress_beyond_one_message_stays_marked() {
        const PLACES: usize = 5;
        let side = Side::new(BrokerId(2));
        let (find, received) = (side.find(), Counter::default());
        side.asked.begin();
        for number in 0..PLACES {
            side.open(u32::try_from(number).expect("few"), &[BrokerId(1)]).await;
        }
        let mut following = joins_nothing_yet(&side, &find, &received);
        let joins = async {
            loop {
                while let Some((partition, todo)) = side.asked.take() {
                    following.carry_out(partition, todo);
                }
                if following.places.len() == PLACES {
                    break;
                }
                side.asked.changed().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), joins).await.expect("every partition joins");
        following.messages.clear();
        while following.ready.take().is_some() {}
        for index in 0..PLACES {
            following.slots[index].place.as_mut().expect("it joined").joined = Some(clock::monotonic());
            following.ready.mark(index);
        }
        let mut told = BTreeSet::new();
        for places in [2, 2, 1] {
            following.gather_progress(2);
            let Some(v1::ToLeader { is: Some(to_leader::Is::Progress(progress)), .. }) = following.messages.pop_front()
            else {
                panic!("progress was due");
            };
            assert_eq!((progress.place.len(), following.messages.len()), (places, 0));
            told.extend(progress.place);
        }
        assert_eq!(told.len(), PLACES);
        side.tasks.stop().await;
    }
}
