//! The leader's side of a link: followers subscribe, batches are sent as they are appended, and acknowledgements go to the partitions.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::{Arc, Weak},
    time::Duration,
};

use futures::{
    FutureExt as _, Stream, StreamExt as _,
    stream::{self, FuturesUnordered},
};
use tokio::time::Instant;

use super::{
    CatchUp, Ended, Find, LinkProbe, Outgoing, StoredEpoch,
    frames::{self, BadFrame, FromFollower, JoinFrame, Padded as _},
    place::{Asks, Place, Slot, Told, not_here, unreadable},
    probe::NeverAsked,
};
use crate::{
    model::{LeaderEpoch, PartitionId},
    partition::{
        Fetched, Joined, On, Partition, ReadError, Ready,
        leader::insync::{Departure, Ends, Peer},
    },
    proto::{
        error::{ApiError, ErrorCode},
        status::Status,
        v1,
    },
    task::{Tasks, clock},
    telemetry::Counter,
};

/// Bytes of batches from which on a message is full.
const MESSAGE_BYTES: usize = 1 << 20;

/// Maximum reads of one link at the same time.
const READS: usize = 8;

/// Number of queued responses from which on no message is received until some are sent: a follower that reads no responses must not fill
/// the memory.
pub(super) const ANSWERS: usize = 1024;

/// Maximum time that a moved high watermark waits for batches that carry it.
const MARK_WAIT: Duration = Duration::from_millis(5);

/// Number of queued pieces from which on no high watermark is sent by itself. For a follower that reads nothing there would be no limit.
const MARKS: usize = 4096;

/// Maximum time that the end of a link waits for its partitions to be notified. A partition whose queue stays full gets the next
/// subscription instead.
const DEPARTURE_WAIT: Duration = Duration::from_secs(1);

/// Maximum number of partitions that are notified of a lost follower at the same time.
const DEPARTURES: usize = 64;

/// Configuration of a leader's side.
pub struct Led {
    /// The follower's broker, in one incarnation.
    pub peer: Peer,
    /// Finds this broker's partitions.
    pub find: Find,
    /// Limit on the reads of catching-up replicas.
    pub catch_up: Arc<CatchUp>,
    /// Pings the follower.
    pub probe: Arc<LinkProbe>,
    /// Reads the stored leader epoch after a follower's report of a newer one.
    pub stored_epoch: StoredEpoch,
    /// Counts the bytes of sent batches.
    pub sent: Counter,
}

/// Serves one follower's broker over one link, until the link ends. Then it notifies every partition that was followed.
pub async fn lead<S>(led: Led, incoming: S, outgoing: Outgoing, tasks: &Tasks) -> Ended
where
    S: Stream<Item = Result<v1::ToLeader, Status>> + Unpin + Send,
{
    let mut leading = Leading {
        led,
        slots: Vec::new(),
        slot_of: BTreeMap::new(),
        places: BTreeMap::new(),
        written: Arc::default(),
        committed: Arc::default(),
        reading: FuturesUnordered::new(),
        asking: FuturesUnordered::new(),
        behind: VecDeque::new(),
        starved: Vec::new(),
        under_way: 0,
        answers: VecDeque::new(),
        pieces: VecDeque::new(),
        piece_bytes: 0,
        marks_due: None,
        throttled_until: None,
    };
    let ended = leading.run(incoming, &outgoing, tasks).await;
    leading.depart().await;
    ended
}

type Asking = Pin<Box<dyn Future<Output = (usize, Told)> + Send>>;
type Reading = Pin<Box<dyn Future<Output = (usize, u32, Result<Option<Fetched>, ReadError>)> + Send>>;

struct Leading {
    led: Led,
    /// By the index under which each partition marks `written` and `committed`.
    slots: Vec<Slot>,
    slot_of: BTreeMap<PartitionId, usize>,
    places: BTreeMap<u32, usize>,
    /// Partitions whose log end moved.
    written: Arc<Ready>,
    /// Partitions whose high watermark moved.
    committed: Arc<Ready>,
    reading: FuturesUnordered<Reading>,
    asking: FuturesUnordered<Asking>,
    /// Catching-up subscriptions with new records: they are read when no other subscription is due.
    behind: VecDeque<usize>,
    /// Subscriptions with new records that wait for space on the link.
    starved: Vec<usize>,
    /// Bytes in flight of all subscriptions.
    under_way: usize,
    answers: VecDeque<v1::ToFollower>,
    /// Pieces of the next messages, with the bytes of each.
    pieces: VecDeque<(usize, v1::Piece)>,
    piece_bytes: usize,
    /// Time at which moved high watermarks are sent that no batch carried.
    marks_due: Option<Instant>,
    throttled_until: Option<Instant>,
}

impl Leading {
    async fn run<S>(&mut self, mut incoming: S, outgoing: &Outgoing, tasks: &Tasks) -> Ended
    where
        S: Stream<Item = Result<v1::ToLeader, Status>> + Unpin + Send,
    {
        let mut pings = self.led.probe.pings();
        loop {
            self.fill();
            let (written, committed) = (Arc::clone(&self.written), Arc::clone(&self.committed));
            let may_read = self.piece_bytes < MESSAGE_BYTES && self.reading.len() < READS;
            tokio::select! {
                biased;
                () = tasks.cancelled() => return Ended::Stopped,
                message = incoming.next(), if self.answers.len() < ANSWERS => match message {
                    Some(Ok(message)) => {
                        if let Err(bad) = self.received(message) {
                            return Ended::Bad(bad);
                        }
                    }
                    Some(Err(status)) => return Ended::Broken(status),
                    None => return Ended::Closed,
                },
                permit = outgoing.reserve(), if self.has_message() => match permit {
                    Ok(permit) => permit.send(Ok(self.message().padded())),
                    Err(_) => return Ended::Closed,
                },
                Ok(()) = pings.changed() => self.answers.push_front(frames::ping(*pings.borrow_and_update())),
                Some((index, told)) = self.asking.next(), if !self.asking.is_empty() => self.told(index, told),
                Some(read) = self.reading.next(), if !self.reading.is_empty() => self.absorb(read),
                () = written.wait(), if may_read => {}
                () = until(self.throttled_until), if may_read => self.throttled_until = None,
                () = committed.wait(), if self.marks_due.is_none() && self.pieces.len() < MARKS => {
                    self.marks_due = Some(clock::monotonic() + MARK_WAIT);
                }
                () = until(self.marks_due), if self.pieces.len() < MARKS => self.tell_marks(),
                () = outgoing.closed() => return Ended::Closed,
            }
        }
    }

    fn has_message(&self) -> bool {
        !self.answers.is_empty() || !self.pieces.is_empty()
    }

    /// Returns the next message: responses first, since batches follow them.
    fn message(&mut self) -> v1::ToFollower {
        if let Some(answer) = self.answers.pop_front() {
            return answer;
        }
        let mut pieces = Vec::new();
        let mut room = MESSAGE_BYTES;
        while let Some((bytes, piece)) = self.pieces.pop_front_if(|(bytes, _)| pieces.is_empty() || *bytes <= room) {
            room = room.saturating_sub(bytes);
            self.piece_bytes -= bytes;
            self.led.sent.inc_by(bytes as u64);
            pieces.push(piece);
        }
        frames::batches(pieces)
    }

    /// Reads what is available at once, until the message is full.
    fn fill(&mut self) {
        while self.piece_bytes < MESSAGE_BYTES && self.reading.len() < READS {
            let Some(index) = self.next_to_read() else { return };
            self.begin_read(index);
            while let Some(Some(read)) = self.reading.next().now_or_never() {
                self.absorb(read);
            }
        }
    }

    /// Returns the next subscription to read: those that keep up before those that catch up, each in the order of their signals.
    fn next_to_read(&mut self) -> Option<usize> {
        while let Some(index) = self.written.take() {
            let Some(place) = &mut self.slots[index].place else { continue };
            if place.reading {
                place.again = true;
            } else if !place.catches_up {
                return Some(index);
            } else if !std::mem::replace(&mut place.queued, true) {
                self.behind.push_back(index);
            }
        }
        if self.throttled_until.is_some() || self.behind.is_empty() {
            return None;
        }
        self.throttled_until = self.led.catch_up.wait();
        if self.throttled_until.is_some() {
            return None;
        }
        let index = self.behind.pop_front()?;
        if let Some(place) = &mut self.slots[index].place {
            place.queued = false;
        }
        Some(index)
    }

    fn begin_read(&mut self, index: usize) {
        let Slot { number: Some(number), place: Some(place), .. } = &mut self.slots[index] else { return };
        if place.reading {
            // The signal was queued for an earlier subscription.
            place.again = true;
            return;
        }
        if let Err(error) = place.tail.leads() {
            if mutant!(CountOlderEpochAcks) {
                return;
            }
            return self.refuse(index, unreadable(&error));
        }
        let from = place.window.sent();
        if place.tail.ends().0 <= from {
            place.catches_up = false;
            return;
        }
        let Some(room) = place.window.room(self.under_way) else {
            place.blocked = true;
            if place.window.room(0).is_some() {
                self.starved.push(index);
            }
            return;
        };
        place.reading = true;
        let (tail, number) = (place.tail.clone(), *number);
        self.reading.push(Box::pin(async move { (index, number, tail.read(from, room).await) }));
    }

    /// Adds the result of a read to the next message.
    fn absorb(&mut self, (index, read_for, read): (usize, u32, Result<Option<Fetched>, ReadError>)) {
        let Slot { number, place: Some(place), .. } = &mut self.slots[index] else { return };
        if *number != Some(read_for) {
            return;
        }
        place.reading = false;
        let again = std::mem::take(&mut place.again);
        let fetched = match read {
            Ok(Some(fetched)) => fetched,
            Ok(None) => {
                if again {
                    self.written.mark(index);
                }
                return;
            }
            Err(_) if mutant!(CountOlderEpochAcks) => return,
            Err(error) => return self.refuse(index, unreadable(&error)),
        };
        let base = place.window.sent();
        let (log_end, high_watermark) = place.tail.ends();
        place.window.send(fetched.next, fetched.bytes);
        place.told = high_watermark;
        self.under_way += fetched.bytes;
        if place.catches_up {
            self.led.catch_up.take(fetched.bytes);
        }
        if again || fetched.next < log_end {
            self.written.mark(index);
        } else {
            place.catches_up = false;
        }
        let piece = v1::Piece {
            place: read_for,
            leader_epoch: place.epoch.as_i32(),
            base: base.as_i64(),
            high_watermark: high_watermark.as_i64(),
            chunks: fetched.chunks,
        };
        self.piece_bytes += fetched.bytes;
        self.pieces.push_back((fetched.bytes, piece));
    }

    /// Sends the high watermarks that moved and that no batch carried.
    fn tell_marks(&mut self) {
        self.marks_due = None;
        while let Some(index) = self.committed.take() {
            let Slot { number: Some(number), place: Some(place), .. } = &mut self.slots[index] else { continue };
            let (_, high_watermark) = place.tail.ends();
            if high_watermark > place.told {
                place.told = high_watermark;
                let piece = v1::Piece {
                    place: *number,
                    leader_epoch: place.epoch.as_i32(),
                    base: place.window.sent().as_i64(),
                    high_watermark: high_watermark.as_i64(),
                    chunks: Vec::new(),
                };
                self.pieces.push_back((0, piece));
            }
        }
    }

    fn received(&mut self, message: v1::ToLeader) -> Result<(), ApiError> {
        match message.try_into()? {
            FromFollower::Join { place, join: Ok(join) } => self.join(place, join)?,
            FromFollower::Join { place, join: Err(bad) } => {
                self.answers.push_back(frames::refused(place, LeaderEpoch::default(), bad.into()));
            }
            FromFollower::Leave { place, known, stopping } => self.leave(place, known, stopping),
            FromFollower::Pong(number) => self.led.probe.on_pong(number).map_err(|NeverAsked| {
                let value = number.try_into().unwrap_or(i64::MAX);
                BadFrame::Number { field: "a ping that was never sent", value }
            })?,
            FromFollower::Progress(all) => {
                for (place, ends) in all {
                    self.acknowledged(place, ends);
                }
            }
        }
        Ok(())
    }

    fn join(&mut self, number: u32, join: JoinFrame) -> Result<(), ApiError> {
        if self.places.contains_key(&number) {
            return Err(BadFrame::Number { field: "a place that is taken", value: number.into() }.into());
        }
        let Some(index) = self.slot(join.partition) else {
            self.answers.push_back(frames::refused(number, join.epoch, not_here(join.partition)));
            return Ok(());
        };
        self.end_place(index);
        self.places.insert(number, index);
        let slot = &mut self.slots[index];
        (slot.number, slot.stops) = (Some(number), false);
        slot.asks.join = Some((number, join));
        self.ask(index);
        Ok(())
    }

    /// Returns the slot of a partition as it is open now.
    fn slot(&mut self, id: PartitionId) -> Option<usize> {
        let partition = (self.led.find)(id)?;
        let index = match self.slot_of.get(&id).copied() {
            Some(index) if Weak::ptr_eq(&self.slots[index].partition, &Arc::downgrade(&partition)) => {
                return Some(index);
            }
            Some(index) => {
                self.end_place(index);
                let slot = &mut self.slots[index];
                (slot.partition, slot.asks) = (Arc::downgrade(&partition), Asks::default());
                index
            }
            None => {
                let (index, partition, asks) = (self.slots.len(), Arc::downgrade(&partition), Asks::default());
                self.slot_of.insert(id, index);
                self.slots.push(Slot { partition, number: None, place: None, asks, asking: false, stops: false });
                index
            }
        };
        partition.follow(&self.written, index, On::Written);
        partition.follow(&self.committed, index, On::Committed);
        Some(index)
    }

    fn leave(&mut self, number: u32, known: Option<LeaderEpoch>, stopping: bool) {
        let Some(index) = self.places.get(&number).copied() else { return };
        let slot = &mut self.slots[index];
        slot.asks.deposed = slot.asks.deposed.max(known);
        slot.asks.left = Some(if stopping { Departure::Stopping } else { Departure::LinkLost });
        slot.stops |= stopping;
        self.end_place(index);
        self.ask(index);
    }

    fn acknowledged(&mut self, number: u32, ends: Ends) {
        let Some(index) = self.places.get(&number).copied() else { return };
        let Slot { place: Some(place), .. } = &mut self.slots[index] else { return };
        let freed = match place.window.acknowledge(ends.written) {
            Ok(freed) => freed,
            Err(never) => {
                let fault = ApiError::new(ErrorCode::InvalidRequest, never.to_string());
                return self.refuse(index, fault);
            }
        };
        place.partition.acknowledged(self.led.peer, place.epoch, ends);
        if std::mem::take(&mut place.blocked) {
            self.written.mark(index);
        }
        self.free(freed);
    }

    /// Releases bytes that are no longer in flight.
    fn free(&mut self, bytes: usize) {
        self.under_way -= bytes;
        if bytes > 0 {
            self.starved.drain(..).for_each(|index| self.written.mark(index));
        }
    }

    /// Ends a subscription. The follower is sent the error, and may subscribe again.
    fn refuse(&mut self, index: usize, fault: ApiError) {
        let slot = &mut self.slots[index];
        let (Some(number), Some(place)) = (slot.number, &slot.place) else { return };
        tracing::debug!(partition = %place.partition.id(), follower = %self.led.peer.broker, why = %fault, "a place ends");
        self.answers.push_back(frames::refused(number, place.epoch, fault));
        slot.asks.left = Some(Departure::LinkLost);
        self.end_place(index);
        self.ask(index);
    }

    fn end_place(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.asks.join = None;
        if let Some(number) = slot.number.take() {
            self.places.remove(&number);
        }
        if let Some(place) = slot.place.take() {
            self.free(place.window.bytes());
        }
    }

    /// Starts the next notification of a partition, outside the loop: the partition's task may be busy.
    fn ask(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        if slot.asking {
            return;
        }
        let Some(partition) = slot.partition.upgrade() else {
            if let Some((number, join)) = std::mem::take(&mut slot.asks).join {
                self.answers.push_back(frames::refused(number, join.epoch, not_here(join.partition)));
            }
            return self.end_place(index);
        };
        let peer = self.led.peer;
        let own = partition.epoch();
        let asking: Asking = if slot.asks.deposed.take().is_some_and(|claimed| claimed > own) {
            let stored = (self.led.stored_epoch)(partition.id());
            Box::pin(async move {
                depose(&partition, stored).await;
                (index, Told::Noted)
            })
        } else if let Some(why) = slot.asks.left.take() {
            Box::pin(async move {
                partition.left(peer, why).await;
                (index, Told::Noted)
            })
        } else if let Some((number, join)) = slot.asks.join.take() {
            Box::pin(async move {
                let answered = partition.join(peer, join.epoch, join.claim, join.ends).await;
                (index, Told::Joined { partition, number, epoch: join.epoch, answered })
            })
        } else {
            return;
        };
        slot.asking = true;
        self.asking.push(asking);
    }

    /// Handles the end of a notification, which may be the response to a subscription.
    fn told(&mut self, index: usize, told: Told) {
        let slot = &mut self.slots[index];
        slot.asking = false;
        if let Told::Joined { partition, number, epoch, answered } = told {
            if slot.number != Some(number) {
                // The subscription ended or was replaced meanwhile: its effect on the partition is to end first.
                slot.asks.left = slot.asks.left.or(Some(Departure::LinkLost));
            } else {
                let tail = partition.tail();
                match answered.join {
                    // Otherwise another epoch has begun since: the first batches would be of that epoch.
                    Joined::At(at) if tail.epoch() == epoch => {
                        slot.place = Some(Place::new(partition, tail, at, answered.high_watermark, answered.in_sync));
                        self.written.mark(index);
                        self.committed.mark(index);
                        self.answers.push_back(frames::answer(number, answered));
                    }
                    Joined::At(_) => {
                        slot.asks.left = Some(Departure::LinkLost);
                        self.end_place(index);
                        let fault = unreadable(&ReadError::Closed);
                        self.answers.push_back(frames::refused(number, epoch, fault));
                    }
                    _ => {
                        self.end_place(index);
                        self.answers.push_back(frames::answer(number, answered));
                    }
                }
            }
        }
        self.ask(index);
    }

    /// Notifies every partition that is still followed of the end of the link.
    async fn depart(&mut self) {
        self.asking.clear();
        let peer = self.led.peer;
        let followed = |slot: &Slot| slot.number.is_some() || slot.asking || slot.asks.left.is_some();
        let stored_epoch = &self.led.stored_epoch;
        let departures = self.slots.iter_mut().filter(|slot| followed(slot)).filter_map(|slot| {
            let (partition, claimed) = (slot.partition.upgrade()?, slot.asks.deposed.take());
            let stored = claimed.filter(|claimed| *claimed > partition.epoch()).map(|_| stored_epoch(partition.id()));
            let why = if slot.stops { Departure::Stopping } else { Departure::LinkLost };
            Some(async move {
                partition.left(peer, why).await;
                if let Some(stored) = stored {
                    depose(&partition, stored).await;
                }
            })
        });
        let told = stream::iter(departures).for_each_concurrent(DEPARTURES, |departure| departure);
        if tokio::time::timeout(DEPARTURE_WAIT, told).await.is_err() {
            tracing::warn!(follower = %peer.broker, "some partitions took no note of a lost link: their tasks are busy");
        }
    }
}

/// Deposes a partition if the metadata store has a newer epoch.
async fn depose(partition: &Partition, stored: impl Future<Output = Option<LeaderEpoch>>) {
    if let Some(newer) = stored.await.filter(|stored| *stored > partition.epoch()) {
        partition.deposed(newer).await;
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
