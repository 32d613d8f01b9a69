//! The leader's side of a link: followers subscribe, batches are sent as they are appended, and acknowledgements go to
//! the partitions.

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
    LinkEnd, PartitionLookup, ResponseSender, StoredEpoch,
    flow_control::CatchUpThrottle,
    messages::{self, FollowerMessage, InvalidMessage, Padded as _, SubscribeRequest},
    probe::{LinkProbe, UnsentPing},
    subscription::{NotificationResult, PendingNotifications, SenderSlot, SenderSubscription, not_here, unreadable},
};
use crate::{
    model::{LeaderEpoch, PartitionId},
    partition::{
        handle::Partition,
        leader::{
            divergence::SubscribeOutcome,
            member::{DisconnectCause, PeerId, ReplicaProgress},
        },
        read::{FetchedBatches, ReadError},
        role::WatermarkKind,
        wake::WakeSet,
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
const MAX_CONCURRENT_READS: usize = 8;

/// Number of queued responses from which on no message is received until some are sent: a follower that reads no
/// responses must not fill the memory.
pub(super) const MAX_QUEUED_RESPONSES: usize = 1024;

/// Maximum time that a moved high watermark waits for batches that carry it.
const WATERMARK_DELAY: Duration = Duration::from_millis(5);

/// Number of queued partition batches from which on no high watermark is sent without records. A follower that reads
/// nothing would otherwise fill the memory.
const MAX_QUEUED_WATERMARKS: usize = 4096;

/// Maximum time that the end of a link waits for its partitions to be notified. A partition whose queue stays full gets
/// the next subscription instead.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum number of partitions that are notified of a lost follower at the same time.
const MAX_CONCURRENT_DISCONNECTS: usize = 64;

/// Configuration of a leader's side.
pub struct SenderConfig {
    /// The follower's broker, in one incarnation.
    pub peer: PeerId,
    /// Finds this broker's partitions.
    pub find: PartitionLookup,
    /// Limit on the reads of catching-up replicas.
    pub catch_up: Arc<CatchUpThrottle>,
    /// Pings the follower.
    pub probe: Arc<LinkProbe>,
    /// Reads the stored leader epoch after a follower's report of a newer one.
    pub stored_epoch: StoredEpoch,
    /// Counts the bytes of sent batches.
    pub sent: Counter,
}

/// Serves one follower's broker over one link, until the link ends. Then it notifies every partition that was followed.
pub async fn run_sender<S>(config: SenderConfig, incoming: S, outgoing: ResponseSender, tasks: &Tasks) -> LinkEnd
where
    S: Stream<Item = Result<v1::ReplicateRequest, Status>> + Unpin + Send,
{
    let mut sender = ReplicationSender {
        config,
        slots: Vec::new(),
        slot_of: BTreeMap::new(),
        subscriptions: BTreeMap::new(),
        written: Arc::default(),
        committed: Arc::default(),
        reading: FuturesUnordered::new(),
        notifying: FuturesUnordered::new(),
        catch_up_queue: VecDeque::new(),
        window_blocked: Vec::new(),
        bytes_in_flight: 0,
        responses: VecDeque::new(),
        batches: VecDeque::new(),
        batch_bytes: 0,
        watermarks_due: None,
        throttled_until: None,
    };
    let ended = sender.run(incoming, &outgoing, tasks).await;
    sender.notify_disconnected().await;
    ended
}

type NotifyFuture = Pin<Box<dyn Future<Output = (usize, NotificationResult)> + Send>>;
type ReadFuture = Pin<Box<dyn Future<Output = (usize, u32, Result<Option<FetchedBatches>, ReadError>)> + Send>>;

struct ReplicationSender {
    config: SenderConfig,
    /// By the index under which each partition marks `written` and `committed`.
    slots: Vec<SenderSlot>,
    slot_of: BTreeMap<PartitionId, usize>,
    subscriptions: BTreeMap<u32, usize>,
    /// Partitions whose log end moved.
    written: Arc<WakeSet>,
    /// Partitions whose high watermark moved.
    committed: Arc<WakeSet>,
    reading: FuturesUnordered<ReadFuture>,
    notifying: FuturesUnordered<NotifyFuture>,
    /// Catching-up subscriptions with new records: they are read when no other subscription is due.
    catch_up_queue: VecDeque<usize>,
    /// Subscriptions with new records that wait for space on the link.
    window_blocked: Vec<usize>,
    /// Bytes in flight of all subscriptions.
    bytes_in_flight: usize,
    responses: VecDeque<v1::ReplicateResponse>,
    /// Partition batches of the next messages, with the bytes of each.
    batches: VecDeque<(usize, v1::PartitionBatches)>,
    batch_bytes: usize,
    /// Time at which moved high watermarks are sent without batches.
    watermarks_due: Option<Instant>,
    throttled_until: Option<Instant>,
}

impl ReplicationSender {
    async fn run<S>(&mut self, mut incoming: S, outgoing: &ResponseSender, tasks: &Tasks) -> LinkEnd
    where
        S: Stream<Item = Result<v1::ReplicateRequest, Status>> + Unpin + Send,
    {
        let mut pings = self.config.probe.pings();
        loop {
            self.fill();
            let (written, committed) = (Arc::clone(&self.written), Arc::clone(&self.committed));
            let may_read = self.batch_bytes < MESSAGE_BYTES && self.reading.len() < MAX_CONCURRENT_READS;
            tokio::select! {
                biased;
                () = tasks.cancelled() => return LinkEnd::Stopped,
                message = incoming.next(), if self.responses.len() < MAX_QUEUED_RESPONSES => match message {
                    Some(Ok(message)) => {
                        if let Err(bad) = self.received(message) {
                            return LinkEnd::Bad(bad);
                        }
                    }
                    Some(Err(status)) => return LinkEnd::Broken(status),
                    None => return LinkEnd::Closed,
                },
                permit = outgoing.reserve(), if self.has_message() => match permit {
                    Ok(permit) => permit.send(Ok(self.message().padded())),
                    Err(_) => return LinkEnd::Closed,
                },
                Ok(()) = pings.changed() => self.responses.push_front(messages::ping(*pings.borrow_and_update())),
                Some((index, result)) = self.notifying.next(), if !self.notifying.is_empty() => self.on_notified(index, result),
                Some(read) = self.reading.next(), if !self.reading.is_empty() => self.on_read(read),
                () = written.wait_for_index(), if may_read => {}
                () = until(self.throttled_until), if may_read => self.throttled_until = None,
                () = committed.wait_for_index(), if self.watermarks_due.is_none() && self.batches.len() < MAX_QUEUED_WATERMARKS => {
                    self.watermarks_due = Some(clock::monotonic() + WATERMARK_DELAY);
                }
                () = until(self.watermarks_due), if self.batches.len() < MAX_QUEUED_WATERMARKS => self.send_watermarks(),
                () = outgoing.closed() => return LinkEnd::Closed,
            }
        }
    }

    fn has_message(&self) -> bool {
        !self.responses.is_empty() || !self.batches.is_empty()
    }

    /// Returns the next message: responses first, since batches follow them.
    fn message(&mut self) -> v1::ReplicateResponse {
        if let Some(response) = self.responses.pop_front() {
            return response;
        }
        let mut batches = Vec::new();
        let mut space = MESSAGE_BYTES;
        while let Some((bytes, partition_batches)) =
            self.batches.pop_front_if(|(bytes, _)| batches.is_empty() || *bytes <= space)
        {
            space = space.saturating_sub(bytes);
            self.batch_bytes -= bytes;
            self.config.sent.inc_by(bytes as u64);
            batches.push(partition_batches);
        }
        messages::batches(batches)
    }

    /// Reads what is available at once, until the message is full.
    fn fill(&mut self) {
        while self.batch_bytes < MESSAGE_BYTES && self.reading.len() < MAX_CONCURRENT_READS {
            let Some(index) = self.next_to_read() else { return };
            self.begin_read(index);
            while let Some(Some(read)) = self.reading.next().now_or_never() {
                self.on_read(read);
            }
        }
    }

    /// Returns the next subscription to read: current subscriptions before catching-up ones, each in the order of
    /// signals.
    fn next_to_read(&mut self) -> Option<usize> {
        while let Some(index) = self.written.take() {
            let Some(subscription) = &mut self.slots[index].subscription else { continue };
            if subscription.reading {
                subscription.moved_during_read = true;
            } else if !subscription.catches_up {
                return Some(index);
            } else if !std::mem::replace(&mut subscription.queued, true) {
                self.catch_up_queue.push_back(index);
            }
        }
        if self.throttled_until.is_some() || self.catch_up_queue.is_empty() {
            return None;
        }
        self.throttled_until = self.config.catch_up.next_send_at();
        if self.throttled_until.is_some() {
            return None;
        }
        let index = self.catch_up_queue.pop_front()?;
        if let Some(subscription) = &mut self.slots[index].subscription {
            subscription.queued = false;
        }
        Some(index)
    }

    fn begin_read(&mut self, index: usize) {
        let SenderSlot { number: Some(number), subscription: Some(subscription), .. } = &mut self.slots[index] else {
            return;
        };
        if subscription.reading {
            // The signal was queued for an earlier subscription.
            subscription.moved_during_read = true;
            return;
        }
        if let Err(error) = subscription.tail.check_leading() {
            if mutant!(CountOlderEpochAcks) {
                return;
            }
            return self.refuse(index, unreadable(&error));
        }
        let from = subscription.window.sent();
        if subscription.tail.progress().0 <= from {
            subscription.catches_up = false;
            return;
        }
        let Some(max_bytes) = subscription.window.room(self.bytes_in_flight) else {
            subscription.blocked = true;
            if subscription.window.room(0).is_some() {
                self.window_blocked.push(index);
            }
            return;
        };
        subscription.reading = true;
        let (tail, number) = (subscription.tail.clone(), *number);
        self.reading.push(Box::pin(async move { (index, number, tail.read(from, max_bytes).await) }));
    }

    /// Adds the result of a read to the next message.
    fn on_read(&mut self, (index, read_for, read): (usize, u32, Result<Option<FetchedBatches>, ReadError>)) {
        let SenderSlot { number, subscription: Some(subscription), .. } = &mut self.slots[index] else { return };
        if *number != Some(read_for) {
            return;
        }
        subscription.reading = false;
        let has_moved = std::mem::take(&mut subscription.moved_during_read);
        let fetched = match read {
            Ok(Some(fetched)) => fetched,
            Ok(None) => {
                if has_moved {
                    self.written.mark(index);
                }
                return;
            }
            Err(_) if mutant!(CountOlderEpochAcks) => return,
            Err(error) => return self.refuse(index, unreadable(&error)),
        };
        let base = subscription.window.sent();
        let (log_end, high_watermark) = subscription.tail.progress();
        subscription.window.send(fetched.next, fetched.bytes);
        subscription.sent_high_watermark = high_watermark;
        self.bytes_in_flight += fetched.bytes;
        if subscription.catches_up {
            self.config.catch_up.take(fetched.bytes);
        }
        if has_moved || fetched.next < log_end {
            self.written.mark(index);
        } else {
            subscription.catches_up = false;
        }
        let batches = v1::PartitionBatches {
            subscription_id: read_for,
            leader_epoch: subscription.epoch.as_i32(),
            base: base.as_i64(),
            high_watermark: high_watermark.as_i64(),
            chunks: fetched.chunks,
        };
        self.batch_bytes += fetched.bytes;
        self.batches.push_back((fetched.bytes, batches));
    }

    /// Sends the high watermarks that moved and that no batch carried.
    fn send_watermarks(&mut self) {
        self.watermarks_due = None;
        while let Some(index) = self.committed.take() {
            let SenderSlot { number: Some(number), subscription: Some(subscription), .. } = &mut self.slots[index]
            else {
                continue;
            };
            let (_, high_watermark) = subscription.tail.progress();
            if high_watermark > subscription.sent_high_watermark {
                subscription.sent_high_watermark = high_watermark;
                let batches = v1::PartitionBatches {
                    subscription_id: *number,
                    leader_epoch: subscription.epoch.as_i32(),
                    base: subscription.window.sent().as_i64(),
                    high_watermark: high_watermark.as_i64(),
                    chunks: Vec::new(),
                };
                self.batches.push_back((0, batches));
            }
        }
    }

    fn received(&mut self, message: v1::ReplicateRequest) -> Result<(), ApiError> {
        match message.try_into()? {
            FollowerMessage::Subscribe { subscription_id: number, request: Ok(request) } => {
                self.subscribe(number, request)?
            }
            FollowerMessage::Subscribe { subscription_id: number, request: Err(error) } => {
                self.responses.push_back(messages::refused(number, LeaderEpoch::default(), error.into()));
            }
            FollowerMessage::Unsubscribe { subscription_id: number, known, stopping } => {
                self.unsubscribe(number, known, stopping)
            }
            FollowerMessage::Pong(number) => self.config.probe.on_pong(number).map_err(|UnsentPing| {
                let value = number.try_into().unwrap_or(i64::MAX);
                InvalidMessage::Number { field: "a ping that was never sent", value }
            })?,
            FollowerMessage::Progress(all) => {
                for (number, progress) in all {
                    self.acknowledged(number, progress);
                }
            }
        }
        Ok(())
    }

    fn subscribe(&mut self, number: u32, request: SubscribeRequest) -> Result<(), ApiError> {
        if self.subscriptions.contains_key(&number) {
            return Err(InvalidMessage::Number { field: "a subscription id in use", value: number.into() }.into());
        }
        let Some(index) = self.slot(request.partition) else {
            self.responses.push_back(messages::refused(number, request.epoch, not_here(request.partition)));
            return Ok(());
        };
        self.end_subscription(index);
        self.subscriptions.insert(number, index);
        let slot = &mut self.slots[index];
        (slot.number, slot.is_shutting_down) = (Some(number), false);
        slot.notifications.subscribe = Some((number, request));
        self.notify_partition(index);
        Ok(())
    }

    /// Returns the slot of a partition as it is open now.
    fn slot(&mut self, id: PartitionId) -> Option<usize> {
        let partition = (self.config.find)(id)?;
        let index = match self.slot_of.get(&id).copied() {
            Some(index) if Weak::ptr_eq(&self.slots[index].partition, &Arc::downgrade(&partition)) => {
                return Some(index);
            }
            Some(index) => {
                self.end_subscription(index);
                let slot = &mut self.slots[index];
                (slot.partition, slot.notifications) = (Arc::downgrade(&partition), PendingNotifications::default());
                index
            }
            None => {
                let (index, partition, notifications) =
                    (self.slots.len(), Arc::downgrade(&partition), PendingNotifications::default());
                self.slot_of.insert(id, index);
                self.slots.push(SenderSlot {
                    partition,
                    number: None,
                    subscription: None,
                    notifications,
                    notifying: false,
                    is_shutting_down: false,
                });
                index
            }
        };
        partition.add_listener(&self.written, index, WatermarkKind::LogEnd);
        partition.add_listener(&self.committed, index, WatermarkKind::HighWatermark);
        Some(index)
    }

    fn unsubscribe(&mut self, number: u32, known: Option<LeaderEpoch>, stopping: bool) {
        let Some(index) = self.subscriptions.get(&number).copied() else { return };
        let slot = &mut self.slots[index];
        slot.notifications.deposed = slot.notifications.deposed.max(known);
        slot.notifications.left =
            Some(if stopping { DisconnectCause::ShuttingDown } else { DisconnectCause::LinkLost });
        slot.is_shutting_down |= stopping;
        self.end_subscription(index);
        self.notify_partition(index);
    }

    fn acknowledged(&mut self, number: u32, progress: ReplicaProgress) {
        let Some(index) = self.subscriptions.get(&number).copied() else { return };
        let SenderSlot { subscription: Some(subscription), .. } = &mut self.slots[index] else { return };
        let freed = match subscription.window.acknowledge(progress.log_end) {
            Ok(freed) => freed,
            Err(error) => {
                let error = ApiError::new(ErrorCode::InvalidRequest, error.to_string());
                return self.refuse(index, error);
            }
        };
        subscription.partition.on_acknowledged(self.config.peer, subscription.epoch, progress);
        if std::mem::take(&mut subscription.blocked) {
            self.written.mark(index);
        }
        self.free(freed);
    }

    /// Releases bytes that are no longer in flight.
    fn free(&mut self, bytes: usize) {
        self.bytes_in_flight -= bytes;
        if bytes > 0 {
            self.window_blocked.drain(..).for_each(|index| self.written.mark(index));
        }
    }

    /// Ends a subscription. The follower is sent the error, and may subscribe again.
    fn refuse(&mut self, index: usize, error: ApiError) {
        let slot = &mut self.slots[index];
        let (Some(number), Some(subscription)) = (slot.number, &slot.subscription) else { return };
        tracing::debug!(
            partition = %subscription.partition.id(), follower = %self.config.peer.broker, reason = %error,
            "subscription ended"
        );
        self.responses.push_back(messages::refused(number, subscription.epoch, error));
        slot.notifications.left = Some(DisconnectCause::LinkLost);
        self.end_subscription(index);
        self.notify_partition(index);
    }

    fn end_subscription(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.notifications.subscribe = None;
        if let Some(number) = slot.number.take() {
            self.subscriptions.remove(&number);
        }
        if let Some(subscription) = slot.subscription.take() {
            self.free(subscription.window.bytes());
        }
    }

    /// Starts the next notification of a partition, outside the loop: the partition's task may be busy.
    fn notify_partition(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        if slot.notifying {
            return;
        }
        let Some(partition) = slot.partition.upgrade() else {
            if let Some((number, request)) = std::mem::take(&mut slot.notifications).subscribe {
                self.responses.push_back(messages::refused(number, request.epoch, not_here(request.partition)));
            }
            return self.end_subscription(index);
        };
        let peer = self.config.peer;
        let epoch = partition.epoch();
        let notify: NotifyFuture = if slot.notifications.deposed.take().is_some_and(|reported| reported > epoch) {
            let stored = (self.config.stored_epoch)(partition.id());
            Box::pin(async move {
                depose(&partition, stored).await;
                (index, NotificationResult::Delivered)
            })
        } else if let Some(reason) = slot.notifications.left.take() {
            Box::pin(async move {
                partition.on_follower_disconnected(peer, reason).await;
                (index, NotificationResult::Delivered)
            })
        } else if let Some((number, request)) = slot.notifications.subscribe.take() {
            Box::pin(async move {
                let response = partition.subscribe(peer, request.epoch, request.position, request.progress).await;
                (index, NotificationResult::Subscribed { partition, number, epoch: request.epoch, response })
            })
        } else {
            return;
        };
        slot.notifying = true;
        self.notifying.push(notify);
    }

    /// Handles the end of a notification, which may be the response to a subscription.
    fn on_notified(&mut self, index: usize, result: NotificationResult) {
        let slot = &mut self.slots[index];
        slot.notifying = false;
        if let NotificationResult::Subscribed { partition, number, epoch, response } = result {
            if slot.number != Some(number) {
                // The subscription ended or was replaced meanwhile: its effect on the partition is to end first.
                slot.notifications.left = slot.notifications.left.or(Some(DisconnectCause::LinkLost));
            } else {
                let tail = partition.tail();
                match response.outcome {
                    // Otherwise another epoch has begun since: the first batches would be of that epoch.
                    SubscribeOutcome::Accepted(at) if tail.epoch() == epoch => {
                        slot.subscription = Some(SenderSubscription::new(
                            partition,
                            tail,
                            at,
                            response.high_watermark,
                            response.in_sync,
                        ));
                        self.written.mark(index);
                        self.committed.mark(index);
                        self.responses.push_back(messages::subscribe_response(number, response));
                    }
                    SubscribeOutcome::Accepted(_) => {
                        slot.notifications.left = Some(DisconnectCause::LinkLost);
                        self.end_subscription(index);
                        let error = unreadable(&ReadError::Closed);
                        self.responses.push_back(messages::refused(number, epoch, error));
                    }
                    _ => {
                        self.end_subscription(index);
                        self.responses.push_back(messages::subscribe_response(number, response));
                    }
                }
            }
        }
        self.notify_partition(index);
    }

    /// Notifies every partition that is still followed of the end of the link.
    async fn notify_disconnected(&mut self) {
        self.notifying.clear();
        let peer = self.config.peer;
        let followed = |slot: &SenderSlot| slot.number.is_some() || slot.notifying || slot.notifications.left.is_some();
        let stored_epoch = &self.config.stored_epoch;
        let notifications = self.slots.iter_mut().filter(|slot| followed(slot)).filter_map(|slot| {
            let (partition, reported) = (slot.partition.upgrade()?, slot.notifications.deposed.take());
            let stored =
                reported.filter(|reported| *reported > partition.epoch()).map(|_| stored_epoch(partition.id()));
            let cause = if slot.is_shutting_down { DisconnectCause::ShuttingDown } else { DisconnectCause::LinkLost };
            Some(async move {
                partition.on_follower_disconnected(peer, cause).await;
                if let Some(stored) = stored {
                    depose(&partition, stored).await;
                }
            })
        });
        let notified =
            stream::iter(notifications).for_each_concurrent(MAX_CONCURRENT_DISCONNECTS, |notification| notification);
        if tokio::time::timeout(DISCONNECT_TIMEOUT, notified).await.is_err() {
            tracing::warn!(
                follower = %peer.broker,
                "timed out notifying partitions of a lost link: their tasks are busy"
            );
        }
    }
}

/// Deposes a partition if the metadata store has a newer epoch.
async fn depose(partition: &Partition, stored: impl Future<Output = Option<LeaderEpoch>>) {
    if let Some(newer) = stored.await.filter(|stored| *stored > partition.epoch()) {
        partition.report_newer_epoch(newer).await;
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
