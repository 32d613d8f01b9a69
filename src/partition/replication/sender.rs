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
    subscription::{
        NotificationResult, PendingNotifications, SenderSlot, SenderSubscription, no_replica_error, read_failure,
    },
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

/// Target bytes of batches in one message; a single larger batch is a message of its own.
const MESSAGE_BYTES: usize = 1 << 20;

/// Maximum reads of one link at the same time.
const MAX_CONCURRENT_READS: usize = 8;

/// Maximum number of queued responses. At this number no message is received until some are sent, so that a follower
/// that reads no responses cannot fill the memory.
pub(super) const MAX_QUEUED_RESPONSES: usize = 1024;

/// Maximum time that a moved high watermark waits for batches that carry it.
const WATERMARK_DELAY: Duration = Duration::from_millis(5);

/// Number of queued partition batches from which on no high watermark is sent without records. Otherwise a follower
/// that reads nothing could fill the memory.
const MAX_QUEUED_WATERMARKS: usize = 4096;

/// Maximum time at the end of a link to notify its partitions. A partition whose queue stays full is not notified; the
/// follower's next subscription replaces the old one.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum number of partitions that are notified at the same time at the end of a link.
const MAX_CONCURRENT_DISCONNECTS: usize = 64;

/// Input of the leader's side of a link.
pub struct SenderConfig {
    /// The follower's broker, in one broker epoch.
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

/// Runs the leader's side of one link until the link ends. Then notifies each partition whose subscription the end of
/// the link ends.
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
        reads: FuturesUnordered::new(),
        notifications: FuturesUnordered::new(),
        catch_up_queue: VecDeque::new(),
        window_blocked: Vec::new(),
        bytes_in_flight: 0,
        responses: VecDeque::new(),
        batches: VecDeque::new(),
        batch_bytes: 0,
        watermarks_due: None,
        throttled_until: None,
    };
    let link_end = sender.run(incoming, &outgoing, tasks).await;
    sender.notify_disconnected().await;
    link_end
}

/// Delivery of a notification to the partition of a slot, with the index of that slot.
type NotifyFuture = Pin<Box<dyn Future<Output = (usize, NotificationResult)> + Send>>;
type ReadFuture = Pin<Box<dyn Future<Output = FinishedRead> + Send>>;

/// Result of a read. Its subscription may have ended since the read started.
struct FinishedRead {
    /// Index of the slot.
    index: usize,
    /// Number of the subscription.
    number: u32,
    /// `None` if there was nothing to read.
    result: Result<Option<FetchedBatches>, ReadError>,
}

/// State of the leader's side of a link.
struct ReplicationSender {
    config: SenderConfig,
    /// One slot for each partition that was ever subscribed. A partition marks the index of its slot in `written` and
    /// `committed`.
    slots: Vec<SenderSlot>,
    slot_of: BTreeMap<PartitionId, usize>,
    /// Index of the slot of each current subscription, by its number.
    subscriptions: BTreeMap<u32, usize>,
    /// Slots of the partitions whose log end moved.
    written: Arc<WakeSet>,
    /// Slots of the partitions whose high watermark moved.
    committed: Arc<WakeSet>,
    /// Reads of batches for subscriptions, at most one for each subscription.
    reads: FuturesUnordered<ReadFuture>,
    /// Notifications that are being delivered, at most one for each slot.
    notifications: FuturesUnordered<NotifyFuture>,
    /// Slots of catching-up subscriptions with new records. They are read when no other subscription is due.
    catch_up_queue: VecDeque<usize>,
    /// Slots of subscriptions with new records that wait for space on the link.
    window_blocked: Vec<usize>,
    /// Bytes in flight of all subscriptions.
    bytes_in_flight: usize,
    /// Responses, errors and pings that are not sent yet.
    responses: VecDeque<v1::ReplicateResponse>,
    /// Batches of the next messages, one entry for each read or lone high watermark, with its bytes.
    batches: VecDeque<(usize, v1::PartitionBatches)>,
    /// Sum of the bytes of `batches`.
    batch_bytes: usize,
    /// Time at which moved high watermarks are sent without batches; `None` if none moved.
    watermarks_due: Option<Instant>,
    /// Time until which no catching-up subscription is read; `None` if such reads are allowed.
    throttled_until: Option<Instant>,
}

impl ReplicationSender {
    /// Receives and sends messages until the link ends. Each pass of the loop first starts the reads that are possible.
    async fn run<S>(&mut self, mut incoming: S, outgoing: &ResponseSender, tasks: &Tasks) -> LinkEnd
    where
        S: Stream<Item = Result<v1::ReplicateRequest, Status>> + Unpin + Send,
    {
        let mut pings = self.config.probe.pings();
        loop {
            self.start_reads();
            let (written, committed) = (Arc::clone(&self.written), Arc::clone(&self.committed));
            let may_read = self.batch_bytes < MESSAGE_BYTES && self.reads.len() < MAX_CONCURRENT_READS;
            tokio::select! {
                biased;
                () = tasks.cancelled() => return LinkEnd::Stopped,
                message = incoming.next(), if self.responses.len() < MAX_QUEUED_RESPONSES => match message {
                    Some(Ok(message)) => {
                        if let Err(error) = self.on_message(message) {
                            return LinkEnd::Bad(error);
                        }
                    }
                    Some(Err(status)) => return LinkEnd::Broken(status),
                    None => return LinkEnd::Closed,
                },
                permit = outgoing.reserve(), if self.has_message() => match permit {
                    Ok(permit) => permit.send(Ok(self.next_message().padded())),
                    Err(_) => return LinkEnd::Closed,
                },
                Ok(()) = pings.changed() => self.responses.push_front(messages::ping(*pings.borrow_and_update())),
                Some((index, result)) = self.notifications.next(), if !self.notifications.is_empty() => self.on_notified(index, result),
                Some(read) = self.reads.next(), if !self.reads.is_empty() => self.on_read(read),
                // The next pass of the loop starts the reads.
                () = written.wait_for_mark(), if may_read => {}
                () = sleep_until_time(self.throttled_until), if may_read => self.throttled_until = None,
                () = committed.wait_for_mark(), if self.watermarks_due.is_none() && self.batches.len() < MAX_QUEUED_WATERMARKS => {
                    self.watermarks_due = Some(clock::monotonic() + WATERMARK_DELAY);
                }
                () = sleep_until_time(self.watermarks_due), if self.batches.len() < MAX_QUEUED_WATERMARKS => self.send_watermarks(),
                () = outgoing.closed() => return LinkEnd::Closed,
            }
        }
    }

    fn has_message(&self) -> bool {
        !self.responses.is_empty() || !self.batches.is_empty()
    }

    /// Takes the next message to send: from `responses`, or batches if `responses` is empty. The batches of a
    /// subscription follow its response. Called only if [`Self::has_message`].
    fn next_message(&mut self) -> v1::ReplicateResponse {
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

    /// Starts reads, and adds those that finish at once to the next message. Returns when the message is full,
    /// [`MAX_CONCURRENT_READS`] reads are in progress, or no subscription is due.
    fn start_reads(&mut self) {
        while self.batch_bytes < MESSAGE_BYTES && self.reads.len() < MAX_CONCURRENT_READS {
            let Some(index) = self.next_slot_to_read() else { return };
            self.start_read(index);
            while let Some(Some(read)) = self.reads.next().now_or_never() {
                self.on_read(read);
            }
        }
    }

    /// Takes the slot of the next subscription to read; `None` if none is due. Subscriptions that catch up come after
    /// all others, and only if the throttle allows.
    fn next_slot_to_read(&mut self) -> Option<usize> {
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

    /// Starts a read for the subscription of a slot, if there are new records and space in its window. Ends the
    /// subscription if this broker no longer leads in its epoch.
    fn start_read(&mut self, index: usize) {
        let SenderSlot { number: Some(number), subscription: Some(subscription), .. } = &mut self.slots[index] else {
            return;
        };
        if subscription.reading {
            // The slot was queued by an earlier subscription, and the present one is already being read.
            subscription.moved_during_read = true;
            return;
        }
        if let Err(error) = subscription.tail.check_leading() {
            if mutant!(CountOlderEpochAcks) {
                return;
            }
            return self.end_with_error(index, read_failure(&error));
        }
        let from = subscription.window.sent_end();
        if subscription.tail.progress().0 <= from {
            subscription.catches_up = false;
            return;
        }
        let Some(max_bytes) = subscription.window.max_read_bytes(self.bytes_in_flight) else {
            subscription.blocked = true;
            // If the subscription's own window has space, the link is full: bytes that any subscription releases
            // unblock this one.
            if subscription.window.max_read_bytes(0).is_some() {
                self.window_blocked.push(index);
            }
            return;
        };
        subscription.reading = true;
        let (tail, number) = (subscription.tail.clone(), *number);
        self.reads.push(Box::pin(async move {
            let result = tail.read(from, max_bytes).await;
            FinishedRead { index, number, result }
        }));
    }

    /// Adds the batches of a read to the next message. A failed read ends the subscription with an error. Drops the
    /// result if the subscription has ended meanwhile.
    fn on_read(&mut self, read: FinishedRead) {
        let FinishedRead { index, number, result } = read;
        let slot = &mut self.slots[index];
        let SenderSlot { number: current, subscription: Some(subscription), .. } = slot else { return };
        if *current != Some(number) {
            return;
        }
        subscription.reading = false;
        let has_moved = std::mem::take(&mut subscription.moved_during_read);
        let fetched = match result {
            Ok(Some(fetched)) => fetched,
            Ok(None) => {
                if has_moved {
                    self.written.mark(index);
                }
                return;
            }
            Err(_) if mutant!(CountOlderEpochAcks) => return,
            Err(error) => return self.end_with_error(index, read_failure(&error)),
        };
        let base = subscription.window.sent_end();
        let (log_end, high_watermark) = subscription.tail.progress();
        subscription.window.add_read(fetched.next, fetched.bytes);
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
            subscription_id: number,
            leader_epoch: subscription.epoch.as_i32(),
            base: base.as_i64(),
            high_watermark: high_watermark.as_i64(),
            chunks: fetched.chunks,
        };
        self.batch_bytes += fetched.bytes;
        self.batches.push_back((fetched.bytes, batches));
    }

    /// Queues the high watermarks that moved, without records, unless batches have sent them since.
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
                    base: subscription.window.sent_end().as_i64(),
                    high_watermark: high_watermark.as_i64(),
                    chunks: Vec::new(),
                };
                self.batches.push_back((0, batches));
            }
        }
    }

    /// Handles a message of the follower's broker. Messages for earlier subscriptions are dropped.
    ///
    /// # Errors
    /// The link has to end in these cases:
    /// - The message has an unexpected kind.
    /// - It is an invalid progress message.
    /// - It names a subscription number in use.
    /// - It responds to a ping that was never sent.
    fn on_message(&mut self, message: v1::ReplicateRequest) -> Result<(), ApiError> {
        match message.try_into()? {
            FollowerMessage::Subscribe { subscription_id: number, request: Ok(request) } => {
                self.subscribe(number, request)?
            }
            FollowerMessage::Subscribe { subscription_id: number, request: Err(error) } => {
                self.responses.push_back(messages::subscription_error(number, LeaderEpoch::default(), error.into()));
            }
            FollowerMessage::Unsubscribe { subscription_id: number, known_epoch, stopping } => {
                self.unsubscribe(number, known_epoch, stopping)
            }
            FollowerMessage::Pong(number) => self.config.probe.on_pong(number).map_err(|UnsentPing| {
                let value = number.try_into().unwrap_or(i64::MAX);
                InvalidMessage::Number { field: "a ping that was never sent", value }
            })?,
            FollowerMessage::Progress(entries) => {
                for (number, progress) in entries {
                    self.on_progress(number, progress);
                }
            }
        }
        Ok(())
    }

    /// Replaces the partition's subscription by a new one, and passes the request to the partition. The response
    /// follows in [`Self::on_notified`]. If the partition is not open, the follower is sent an error.
    ///
    /// # Errors
    /// The number is in use: the link has to end.
    fn subscribe(&mut self, number: u32, request: SubscribeRequest) -> Result<(), ApiError> {
        if self.subscriptions.contains_key(&number) {
            return Err(InvalidMessage::Number { field: "a subscription id in use", value: number.into() }.into());
        }
        let Some(index) = self.open_slot(request.partition) else {
            self.responses.push_back(messages::subscription_error(
                number,
                request.epoch,
                no_replica_error(request.partition),
            ));
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

    /// Returns the index of the slot of an open partition; `None` if the partition is not open. Creates the slot on
    /// first use. If the partition was closed and opened again since, ends the subscription and attaches the slot to
    /// the new partition.
    fn open_slot(&mut self, id: PartitionId) -> Option<usize> {
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

    /// Ends a subscription at the follower's request, and notifies the partition of the end and of the reported epoch.
    fn unsubscribe(&mut self, number: u32, reported_epoch: Option<LeaderEpoch>, stopping: bool) {
        let Some(index) = self.subscriptions.get(&number).copied() else { return };
        let slot = &mut self.slots[index];
        slot.notifications.reported_epoch = slot.notifications.reported_epoch.max(reported_epoch);
        slot.notifications.disconnected =
            Some(if stopping { DisconnectCause::ShuttingDown } else { DisconnectCause::LinkLost });
        slot.is_shutting_down |= stopping;
        self.end_subscription(index);
        self.notify_partition(index);
    }

    /// Passes an acknowledgement to the partition, and frees the acknowledged bytes in the window. An acknowledgement
    /// of unsent records ends the subscription.
    fn on_progress(&mut self, number: u32, progress: ReplicaProgress) {
        let Some(index) = self.subscriptions.get(&number).copied() else { return };
        let SenderSlot { subscription: Some(subscription), .. } = &mut self.slots[index] else { return };
        let freed_bytes = match subscription.window.acknowledge(progress.log_end) {
            Ok(freed_bytes) => freed_bytes,
            Err(error) => {
                let error = ApiError::new(ErrorCode::InvalidRequest, error.to_string());
                return self.end_with_error(index, error);
            }
        };
        subscription.partition.on_acknowledged(self.config.peer, subscription.epoch, progress);
        if std::mem::take(&mut subscription.blocked) {
            self.written.mark(index);
        }
        self.release_bytes(freed_bytes);
    }

    /// Releases bytes that are no longer in flight, so that subscriptions that wait for space on the link are read
    /// again.
    fn release_bytes(&mut self, bytes: usize) {
        self.bytes_in_flight -= bytes;
        if bytes > 0 {
            self.window_blocked.drain(..).for_each(|index| self.written.mark(index));
        }
    }

    /// Ends the accepted subscription of a slot, notifies the partition, and sends the error to the follower, which may
    /// subscribe again.
    fn end_with_error(&mut self, index: usize, error: ApiError) {
        let slot = &mut self.slots[index];
        let (Some(number), Some(subscription)) = (slot.number, &slot.subscription) else { return };
        tracing::debug!(
            partition = %subscription.partition.id(), follower = %self.config.peer.broker, reason = %error,
            "subscription ended"
        );
        self.responses.push_back(messages::subscription_error(number, subscription.epoch, error));
        slot.notifications.disconnected = Some(DisconnectCause::LinkLost);
        self.end_subscription(index);
        self.notify_partition(index);
    }

    /// Ends the requested or accepted subscription of a slot, and releases its bytes in flight. Does not notify the
    /// partition.
    fn end_subscription(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.notifications.subscribe = None;
        if let Some(number) = slot.number.take() {
            self.subscriptions.remove(&number);
        }
        if let Some(subscription) = slot.subscription.take() {
            self.release_bytes(subscription.window.bytes());
        }
    }

    /// Starts the next pending notification of a partition, unless one is being delivered. The loop does not wait for
    /// the notification, because the partition's task may be busy. If the partition was closed, ends its subscription,
    /// and sends the follower an error for a pending one.
    fn notify_partition(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        if slot.notifying {
            return;
        }
        let Some(partition) = slot.partition.upgrade() else {
            if let Some((number, request)) = std::mem::take(&mut slot.notifications).subscribe {
                self.responses.push_back(messages::subscription_error(
                    number,
                    request.epoch,
                    no_replica_error(request.partition),
                ));
            }
            return self.end_subscription(index);
        };
        let peer = self.config.peer;
        let epoch = partition.epoch();
        let notify: NotifyFuture = if slot.notifications.reported_epoch.take().is_some_and(|reported| reported > epoch)
        {
            let stored = (self.config.stored_epoch)(partition.id());
            Box::pin(async move {
                report_stored_epoch(&partition, stored).await;
                (index, NotificationResult::Delivered)
            })
        } else if let Some(cause) = slot.notifications.disconnected.take() {
            Box::pin(async move {
                partition.on_follower_disconnected(peer, cause).await;
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
        self.notifications.push(notify);
    }

    /// Handles a delivered notification, and starts the next one. If the notification was a subscription that is still
    /// current, sends its response.
    fn on_notified(&mut self, index: usize, result: NotificationResult) {
        let slot = &mut self.slots[index];
        slot.notifying = false;
        if let NotificationResult::Subscribed { partition, number, epoch, response } = result {
            if slot.number != Some(number) {
                // The subscription ended or was replaced meanwhile. The partition must be notified of its end before
                // the next subscription.
                slot.notifications.disconnected = slot.notifications.disconnected.or(Some(DisconnectCause::LinkLost));
            } else {
                let tail = partition.tail();
                match response.outcome {
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
                    // Since the acceptance this broker lost the leadership or leads in another epoch, so `tail` does
                    // not read the accepted epoch.
                    SubscribeOutcome::Accepted(_) => {
                        slot.notifications.disconnected = Some(DisconnectCause::LinkLost);
                        self.end_subscription(index);
                        let error = read_failure(&ReadError::Closed);
                        self.responses.push_back(messages::subscription_error(number, epoch, error));
                    }
                    SubscribeOutcome::Diverged { .. }
                    | SubscribeOutcome::Bootstrap(_)
                    | SubscribeOutcome::Rejected(_) => {
                        self.end_subscription(index);
                        self.responses.push_back(messages::subscribe_response(number, response));
                    }
                }
            }
        }
        self.notify_partition(index);
    }

    /// Notifies partitions of the end of the link: those with a subscription, or with a notification that is not
    /// delivered. Then passes on the newer epochs that the follower reported, as in [`report_stored_epoch`].
    async fn notify_disconnected(&mut self) {
        // Cancels the notifications that are being delivered: the notification of the end replaces them.
        self.notifications.clear();
        let peer = self.config.peer;
        let is_concerned =
            |slot: &SenderSlot| slot.number.is_some() || slot.notifying || slot.notifications.disconnected.is_some();
        let stored_epoch = &self.config.stored_epoch;
        let notifications = self.slots.iter_mut().filter(|slot| is_concerned(slot)).filter_map(|slot| {
            let (partition, reported) = (slot.partition.upgrade()?, slot.notifications.reported_epoch.take());
            let stored =
                reported.filter(|reported| *reported > partition.epoch()).map(|_| stored_epoch(partition.id()));
            let cause = if slot.is_shutting_down { DisconnectCause::ShuttingDown } else { DisconnectCause::LinkLost };
            Some(async move {
                partition.on_follower_disconnected(peer, cause).await;
                if let Some(stored) = stored {
                    report_stored_epoch(&partition, stored).await;
                }
            })
        });
        let notified =
            stream::iter(notifications).for_each_concurrent(MAX_CONCURRENT_DISCONNECTS, |notification| notification);
        if tokio::time::timeout(DISCONNECT_TIMEOUT, notified).await.is_err() {
            tracing::warn!(
                follower = %peer.broker, timeout = ?DISCONNECT_TIMEOUT,
                "the connection of a follower was lost, and some partitions were too busy to be notified in time: no \
                 action is needed, because the follower's next connection replaces this one"
            );
        }
    }
}

/// Reports the stored leader epoch to a partition if it is newer than the partition's. `stored_epoch` reads the
/// metadata store: a follower's own report is not sufficient.
async fn report_stored_epoch(partition: &Partition, stored_epoch: impl Future<Output = Option<LeaderEpoch>>) {
    if let Some(newer) = stored_epoch.await.filter(|stored| *stored > partition.epoch()) {
        partition.report_newer_epoch(newer).await;
    }
}

/// Waits until this time; without end for `None`.
async fn sleep_until_time(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
