//! The follower's side of a link: it sends subscriptions, delivers received batches to partitions, and acknowledges
//! their progress.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Weak},
    time::Duration,
};

use futures::{Stream, StreamExt as _};
use tokio::{sync::mpsc, time::Instant};

use super::{
    LinkEnd, PartitionLookup,
    link_requests::{LinkRequests, PendingLinkWork, RequestId},
    messages::{self, InvalidMessage, LeaderMessage, Padded as _, PartitionBatches, SubscribeRequest},
};
use crate::{
    limits,
    model::{LeaderEpoch, Offset, PartitionId},
    partition::{
        handle::Partition,
        leader::{divergence::SubscribeOutcome, member::ReplicaProgress},
        role::{LinkEvent, QueueFull, SubscribeResponse, WatermarkKind},
        wake::WakeSet,
    },
    proto::{status::Status, v1},
    task::{Backoff, Tasks, clock},
    telemetry::{Counter, LogThrottle},
};

/// First pause before a partition subscribes again. The pause doubles each time. It is the shortest again after an
/// unsubscription, and after an accepted subscription that lasted [`MAX_RETRY_DELAY`].
const MIN_RETRY_DELAY: Duration = Duration::from_millis(20);

/// Longest pause before a partition subscribes again.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Maximum time at the end of a link to deliver unsubscriptions, or to receive the error with which the other side
/// ended the link.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// Runs the follower's side of one link until the link ends, for the partitions that send their requests to `requests`.
/// Notifies each of these partitions when the link is connected, and when it ends. `received_bytes` counts the bytes of
/// the received batches.
pub async fn run_receiver<S>(
    requests: &LinkRequests,
    find: &PartitionLookup,
    mut incoming: S,
    outgoing: mpsc::Sender<v1::ReplicateRequest>,
    received_bytes: &Counter,
    tasks: &Tasks,
) -> LinkEnd
where
    S: Stream<Item = Result<v1::ReplicateResponse, Status>> + Unpin + Send,
{
    requests.begin_link();
    let mut receiver = ReplicationReceiver::new(requests, find, received_bytes);
    let link_end = receiver.run(&mut incoming, &outgoing, tasks).await;
    if matches!(link_end, LinkEnd::Stopped) {
        let send_unsubscribes = receiver.send_unsubscribes(incoming, outgoing);
        if tokio::time::timeout(CLOSE_TIMEOUT, send_unsubscribes).await.is_err() {
            tracing::debug!("timed out sending unsubscriptions at the end of a link");
        }
    }
    for partition in requests.end_link() {
        if let Some(partition) = find(partition)
            && partition.on_link_event(LinkEvent::Disconnected).is_err()
        {
            // The queue is full of earlier events. The partition subscribes again when the next link is connected.
            tracing::debug!(
                partition = %partition.id(),
                "cannot notify the partition of its lost link: its queue is full"
            );
        }
    }
    link_end
}

/// Partition that subscribed on this link, with its current subscription.
struct ReceiverSlot {
    id: PartitionId,
    /// The partition may have been deleted since.
    partition: Weak<Partition>,
    subscription: Option<ReceiverSubscription>,
    /// Throttle of log lines about subscriptions that this broker ended, after an invalid message or because of a full
    /// queue.
    failure_log: LogThrottle,
    /// Throttle of log lines about subscriptions that the leader ended.
    end_log: LogThrottle,
}

/// A subscription that was queued for the leader, or sent.
struct ReceiverSubscription {
    partition: Arc<Partition>,
    /// Number of the subscription on this link.
    number: u32,
    /// The partition's request for this subscription.
    request: RequestId,
    params: SubscribeRequest,
    /// Time at which the leader accepted the subscription; `None` before.
    accepted_at: Option<Instant>,
    /// Progress that was acknowledged last; `None` before the first acknowledgement.
    acknowledged: Option<ReplicaProgress>,
}

/// State of the follower's side of a link.
struct ReplicationReceiver<'a> {
    requests: &'a LinkRequests,
    find: &'a PartitionLookup,
    received_bytes: &'a Counter,
    /// One slot for each partition that ever subscribed on this link. A partition marks the index of its slot in
    /// `ready`.
    slots: Vec<ReceiverSlot>,
    slot_of: BTreeMap<PartitionId, usize>,
    /// Index of the slot of each current subscription, by its number.
    subscriptions: BTreeMap<u32, usize>,
    next_subscription: u32,
    /// Slots of partitions with progress to acknowledge.
    ready: Arc<WakeSet>,
    /// Messages to send. New progress is added only when all are sent.
    messages: VecDeque<v1::ReplicateRequest>,
    /// Newest ping without a response.
    ping: Option<u64>,
    /// Partitions that subscribe again after a pause, ordered by the end of the pause. At that time they are notified
    /// that the link is connected.
    retry_queue: BTreeSet<(Instant, PartitionId)>,
    /// The entries of `retry_queue` by partition.
    retry_at: BTreeMap<PartitionId, Instant>,
    /// Pauses of each partition that had to subscribe again.
    backoffs: BTreeMap<PartitionId, Backoff>,
}

impl<'a> ReplicationReceiver<'a> {
    fn new(requests: &'a LinkRequests, find: &'a PartitionLookup, received_bytes: &'a Counter) -> Self {
        Self {
            requests,
            find,
            received_bytes,
            slots: Vec::new(),
            slot_of: BTreeMap::new(),
            subscriptions: BTreeMap::new(),
            next_subscription: 0,
            ready: Arc::default(),
            messages: VecDeque::new(),
            ping: None,
            retry_queue: BTreeSet::new(),
            retry_at: BTreeMap::new(),
            backoffs: BTreeMap::new(),
        }
    }

    /// Receives and sends messages until the link ends. Requests of partitions come before progress, and messages to
    /// send before messages to receive.
    async fn run<S>(
        &mut self,
        incoming: &mut S,
        outgoing: &mpsc::Sender<v1::ReplicateRequest>,
        tasks: &Tasks,
    ) -> LinkEnd
    where
        S: Stream<Item = Result<v1::ReplicateResponse, Status>> + Unpin + Send,
    {
        loop {
            while let Some((partition, work)) = self.requests.take() {
                self.process_requests(partition, work);
            }
            let ready = Arc::clone(&self.ready);
            let next_retry_at = self.retry_queue.first().map(|(retry_at, _)| *retry_at);
            let retry_due = async {
                match next_retry_at {
                    Some(retry_at) => tokio::time::sleep_until(retry_at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = tasks.cancelled() => return LinkEnd::Stopped,
                permit = outgoing.reserve(), if self.has_message() => match (permit, self.next_message()) {
                    (Ok(permit), Some(message)) => permit.send(message.padded()),
                    // The channel is closed: a message exists, since `has_message` was true.
                    _ => return end_of_closed_link(incoming).await,
                },
                // The next pass of the loop takes the requests.
                () = self.requests.wait_for_request() => {}
                () = ready.wait_for_mark(), if self.messages.is_empty() => self.gather_progress(limits::MAX_PEER_REPLICAS),
                message = incoming.next() => match message {
                    Some(Ok(message)) => {
                        if let Err(error) = self.on_message(message) {
                            return LinkEnd::Bad(error.into());
                        }
                    }
                    Some(Err(status)) => return LinkEnd::Broken(status),
                    None => return LinkEnd::Closed,
                },
                () = retry_due => self.notify_due(),
            }
        }
    }

    fn has_message(&self) -> bool {
        self.ping.is_some() || !self.messages.is_empty()
    }

    /// Takes the next message to send, the response to a ping first; `None` if there is none.
    fn next_message(&mut self) -> Option<v1::ReplicateRequest> {
        self.ping.take().map(messages::pong).or_else(|| self.messages.pop_front())
    }

    /// Sends the pending messages and unsubscriptions, and waits until the other side has received them and ends the
    /// stream. Drops received messages.
    async fn send_unsubscribes<S>(&mut self, mut incoming: S, outgoing: mpsc::Sender<v1::ReplicateRequest>)
    where
        S: Stream<Item = Result<v1::ReplicateResponse, Status>> + Unpin + Send,
    {
        while let Some((partition, work)) = self.requests.take() {
            self.process_requests(
                partition,
                PendingLinkWork { unsubscribe: work.unsubscribe, ..PendingLinkWork::default() },
            );
        }
        for message in self.messages.drain(..) {
            if outgoing.send(message.padded()).await.is_err() {
                return;
            }
        }
        drop(outgoing);
        while incoming.next().await.is_some() {}
    }

    /// Applies the pending work of a partition, in the order of its fields.
    fn process_requests(&mut self, id: PartitionId, work: PendingLinkWork) {
        if let Some(unsubscribe) = work.unsubscribe {
            self.backoffs.remove(&id);
            if let Some(retry_at) = self.retry_at.remove(&id) {
                self.retry_queue.remove(&(retry_at, id));
            }
            if let Some(subscription) = self.end_subscription(id) {
                self.messages.push_back(messages::unsubscribe(
                    subscription.number,
                    unsubscribe.known_epoch,
                    unsubscribe.stopping,
                ));
            }
        }
        if work.connected {
            self.notify_connected(id);
        }
        if work.resubscribe {
            self.schedule_retry(id);
        }
        if let Some((request, params)) = work.subscribe {
            self.subscribe(request, params);
        }
    }

    /// Notifies a partition that the link is connected. If the partition is not open, or its queue is full, the
    /// notification is repeated after a pause.
    fn notify_connected(&mut self, id: PartitionId) {
        let is_delivered =
            (self.find)(id).is_some_and(|partition| partition.on_link_event(LinkEvent::Connected).is_ok());
        if !is_delivered {
            self.schedule_retry(id);
        }
    }

    /// Schedules a notification that the link is connected, after the partition's pause. Does nothing if one is
    /// scheduled.
    fn schedule_retry(&mut self, id: PartitionId) {
        if self.retry_at.contains_key(&id) {
            return;
        }
        self.reset_backoff_if_stable(id);
        let backoff = self.backoffs.entry(id).or_insert_with(|| Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY));
        let retry_at = clock::monotonic() + backoff.next_pause();
        self.retry_queue.insert((retry_at, id));
        self.retry_at.insert(id, retry_at);
    }

    /// Notifies the partitions whose pause is over, and that still follow on this link, that the link is connected.
    fn notify_due(&mut self) {
        let now = clock::monotonic();
        while let Some((retry_at, id)) = self.retry_queue.first().copied()
            && retry_at <= now
        {
            self.retry_queue.pop_first();
            self.retry_at.remove(&id);
            if self.requests.follows(id) {
                self.notify_connected(id);
            }
        }
    }

    /// Replaces a partition's subscription by a new one, and queues the message. If the partition is not open, drops
    /// the request, and notifies the partition after a pause that the link is connected.
    fn subscribe(&mut self, request: RequestId, params: SubscribeRequest) {
        let id = params.partition;
        self.end_subscription(id);
        let Some((index, partition)) = self.open_slot(id) else {
            // The partition is not open: it is being opened or closed.
            self.requests.end_subscription(id, request);
            return self.schedule_retry(id);
        };
        let number = self.next_subscription;
        self.next_subscription = self.next_subscription.wrapping_add(1);
        self.subscriptions.insert(number, index);
        self.slots[index].subscription =
            Some(ReceiverSubscription { partition, number, request, params, accepted_at: None, acknowledged: None });
        self.messages.push_back(messages::subscribe(number, &params));
    }

    /// Returns the index of a partition's slot and the open partition; `None` if it is not open. Creates the slot on
    /// first use. If the partition was closed and opened again since, attaches the slot to the new partition.
    fn open_slot(&mut self, id: PartitionId) -> Option<(usize, Arc<Partition>)> {
        let partition = (self.find)(id)?;
        let index = *self.slot_of.entry(id).or_insert(self.slots.len());
        if index == self.slots.len() {
            self.slots.push(ReceiverSlot {
                id,
                partition: Weak::new(),
                subscription: None,
                failure_log: LogThrottle::default(),
                end_log: LogThrottle::default(),
            });
        }
        let (slot, weak) = (&mut self.slots[index], Arc::downgrade(&partition));
        if !Weak::ptr_eq(&slot.partition, &weak) {
            slot.partition = weak;
            partition.add_listener(&self.ready, index, WatermarkKind::AnyEnd);
        }
        Some((index, partition))
    }

    /// Resets the partition's pause if the leader accepted its subscription at least [`MAX_RETRY_DELAY`] ago. After a
    /// shorter subscription, the pauses keep growing.
    fn reset_backoff_if_stable(&mut self, id: PartitionId) {
        let subscription = self.slot_of.get(&id).and_then(|index| self.slots[*index].subscription.as_ref());
        let accepted_at = subscription.and_then(|subscription| subscription.accepted_at);
        let has_lasted = |since: Instant| clock::monotonic().saturating_duration_since(since) >= MAX_RETRY_DELAY;
        if accepted_at.is_some_and(has_lasted) {
            self.backoffs.remove(&id);
        }
    }

    /// Removes the current subscription of a partition, and returns it; `None` if the partition has none. If the leader
    /// accepted it at least [`MAX_RETRY_DELAY`] ago, the next pause of the partition is the shortest one again. Sends
    /// nothing.
    fn end_subscription(&mut self, id: PartitionId) -> Option<ReceiverSubscription> {
        self.reset_backoff_if_stable(id);
        let index = *self.slot_of.get(&id)?;
        let subscription = self.slots[index].subscription.take()?;
        self.subscriptions.remove(&subscription.number);
        Some(subscription)
    }

    /// Ends a subscription after an invalid message or a full queue; the partition subscribes again after a pause.
    fn fail_subscription(&mut self, index: usize, reason: &dyn std::fmt::Display) {
        let Some(subscription) = self.end_and_retry(index) else { return };
        let Some(count) = self.slots[index].failure_log.occur(clock::monotonic()) else {
            return tracing::debug!(
                partition = %subscription.partition.id(), %reason,
                "rejected a message from the leader again"
            );
        };
        tracing::warn!(
            topic = %subscription.partition.topic(), partition = %subscription.partition.id(), epoch = %subscription.params.epoch, count,
            log_end = %subscription.partition.progress().log_end, %reason, "rejected a message from the leader; subscribing again"
        );
    }

    /// Handles a subscription that the leader ended after it had accepted it, as at each change of leader. The
    /// partition subscribes again after a pause.
    fn on_subscription_ended(&mut self, index: usize, reason: &dyn std::fmt::Display) {
        let Some(subscription) = self.end_and_retry(index) else { return };
        let Some(count) = self.slots[index].end_log.occur(clock::monotonic()) else {
            return tracing::debug!(
                partition = %subscription.partition.id(), %reason,
                "the leader ended the subscription again"
            );
        };
        tracing::info!(
            topic = %subscription.partition.topic(), partition = %subscription.partition.id(), epoch = %subscription.params.epoch, count,
            log_end = %subscription.partition.progress().log_end, %reason, "the leader ended the subscription; subscribing again"
        );
    }

    /// Ends the subscription of a slot, sends an unsubscription, and schedules the next subscription. Returns the ended
    /// subscription; `None` if the slot has none.
    fn end_and_retry(&mut self, index: usize) -> Option<ReceiverSubscription> {
        let id = self.slots[index].id;
        let subscription = self.end_subscription(id)?;
        self.requests.end_subscription(id, subscription.request);
        self.messages.push_back(messages::unsubscribe(subscription.number, subscription.params.epoch, false));
        self.schedule_retry(id);
        Some(subscription)
    }

    /// Queues one message with the progress of the subscriptions whose progress changed, at most `max_subscriptions` of
    /// them.
    fn gather_progress(&mut self, max_subscriptions: usize) {
        let mut moved = Vec::new();
        // Further marks stay in `ready` until this message has been sent.
        while moved.len() < max_subscriptions
            && let Some(index) = self.ready.take()
        {
            let Some(subscription) = &mut self.slots[index].subscription else { continue };
            // The mark can be dropped: when the partition applies the acceptance, it marks its slot again.
            if subscription.accepted_at.is_none() {
                continue;
            }
            // The progress is read only while the subscription is current: a partition truncates or resets its log only
            // after its subscription has ended.
            let progress =
                self.requests.while_subscribed(&subscription.partition, subscription.request, Partition::progress);
            if let Some(progress) = progress.filter(|progress| subscription.acknowledged != Some(*progress)) {
                subscription.acknowledged = Some(progress);
                moved.push((subscription.number, progress));
            }
        }
        if !moved.is_empty() {
            self.messages.push_back(messages::progress(moved));
        }
    }

    /// Handles a message of the leader's broker. Messages for earlier subscriptions are dropped.
    ///
    /// # Errors
    /// The message has an unexpected kind: the link has to end.
    fn on_message(&mut self, message: v1::ReplicateResponse) -> Result<(), InvalidMessage> {
        match message.try_into()? {
            LeaderMessage::Response { subscription_id: number, response } => {
                if let Some(index) = self.subscriptions.get(&number).copied() {
                    match response {
                        Ok(response) => self.on_response(index, response),
                        Err(error) => self.fail_subscription(index, &error),
                    }
                }
            }
            LeaderMessage::Ping(number) => self.ping = Some(number),
            LeaderMessage::Batches(partitions) => {
                for message in partitions {
                    if let Some(index) = self.subscriptions.get(&message.subscription_id).copied()
                        && let Err(reason) = self.deliver_batches(index, message)
                    {
                        self.fail_subscription(index, &reason);
                    }
                }
            }
        }
        Ok(())
    }

    /// Checks the leader's response, and delivers it to the partition. Only an accepted subscription continues. An
    /// error response after the acceptance means that the leader ended the subscription.
    fn on_response(&mut self, index: usize, response: SubscribeResponse) {
        let ReceiverSlot { id, subscription: Some(subscription), .. } = &mut self.slots[index] else { return };
        let id = *id;
        match &response.outcome {
            SubscribeOutcome::Rejected(reason) if subscription.accepted_at.is_some() => {
                let reason = reason.clone();
                return self.on_subscription_ended(index, &reason);
            }
            _ if subscription.accepted_at.is_some() => {
                return self.fail_subscription(index, &"second response to one subscription");
            }
            SubscribeOutcome::Accepted(at) if *at != subscription.params.position.log_end => {
                let reason = not_requested_error("the accepted offset", *at, subscription.params.position.log_end);
                return self.fail_subscription(index, &reason);
            }
            SubscribeOutcome::Accepted(_) => subscription.accepted_at = Some(clock::monotonic()),
            SubscribeOutcome::Diverged { .. } | SubscribeOutcome::Bootstrap(_) | SubscribeOutcome::Rejected(_) => {}
        }
        let is_accepted = subscription.accepted_at.is_some();
        let event = LinkEvent::Response(response);
        let delivered = self.requests.while_subscribed(&subscription.partition, subscription.request, |partition| {
            partition.on_link_event(event)
        });
        if let Some(Err(full)) = delivered {
            return self.fail_subscription(index, &full);
        }
        if !is_accepted {
            self.end_subscription(id);
        }
    }

    /// Checks batches and delivers them to the partition.
    ///
    /// # Errors
    /// The subscription has to end in these cases:
    /// - The batches are malformed, belong to another epoch, or arrived before the response to the subscription.
    /// - The partition's queue is full.
    fn deliver_batches(&mut self, index: usize, message: v1::PartitionBatches) -> Result<(), BatchRejection> {
        let Some(subscription) = &mut self.slots[index].subscription else { return Ok(()) };
        if subscription.accepted_at.is_none() {
            return Err(BatchRejection::BeforeResponse);
        }
        self.received_bytes.inc_by(message.chunks.iter().map(|chunk| chunk.len() as u64).sum());
        let PartitionBatches { epoch, high_watermark, batches } = message.try_into()?;
        if epoch != subscription.params.epoch {
            return Err(BatchRejection::Epoch { got: epoch, subscribed: subscription.params.epoch });
        }
        let event = LinkEvent::Batches { epoch, high_watermark, batches };
        self.requests
            .while_subscribed(&subscription.partition, subscription.request, |partition| partition.on_link_event(event))
            .transpose()?;
        Ok(())
    }
}

/// Returns the end of a link whose other side takes no more messages. Waits, at most [`CLOSE_TIMEOUT`], for the error
/// with which the other side ended the link.
async fn end_of_closed_link<S>(incoming: &mut S) -> LinkEnd
where
    S: Stream<Item = Result<v1::ReplicateResponse, Status>> + Unpin + Send,
{
    let errors = incoming.filter_map(async |message| message.err());
    match tokio::time::timeout(CLOSE_TIMEOUT, std::pin::pin!(errors).next()).await {
        Ok(Some(status)) => LinkEnd::Broken(status),
        Ok(None) | Err(_) => LinkEnd::Closed,
    }
}

/// Reason why batches cannot be delivered.
#[derive(Debug, thiserror::Error)]
enum BatchRejection {
    #[error(transparent)]
    Invalid(#[from] InvalidMessage),
    #[error(transparent)]
    QueueFull(#[from] QueueFull),
    #[error("batches arrived before the response to the subscription")]
    BeforeResponse,
    #[error("batches have epoch {got}, and the subscription has epoch {subscribed}")]
    Epoch { got: LeaderEpoch, subscribed: LeaderEpoch },
}

/// Returns the error of a message that names another offset than the requested one.
fn not_requested_error(field: &'static str, got: Offset, expected: Offset) -> InvalidMessage {
    InvalidMessage::NotRequested { field, got: got.as_i64(), expected: expected.as_i64() }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::{model::BrokerId, partition::replication::tests::Side, proto::v1::replicate_request};

    #[test]
    fn largest_progress_fits_into_one_request() {
        let end = Offset::from_i64(i64::MAX).expect("the maximum offset");
        let progress = ReplicaProgress { log_end: end, persisted_end: end };
        let message = messages::progress(std::iter::repeat_n((u32::MAX, progress), limits::MAX_PEER_REPLICAS));
        assert!(message.encoded_len() < limits::MAX_PEER_REQUEST_BYTES, "{}", message.encoded_len());
    }

    /// Regression: a follower sent fifty subscriptions a second to a leader that could not read the missing records,
    /// and each time both logged a line. The pauses must grow until a subscription lasts.
    #[tokio::test(flavor = "multi_thread")]
    async fn subscription_that_ends_at_once_waits_longer_each_time() {
        let side = Side::new(BrokerId(2));
        let (find, received_bytes) = (side.find(), Counter::default());
        side.requests.begin_link();
        side.open(0, &[BrokerId(1)]).await;
        let mut receiver = ReplicationReceiver::new(&side.requests, &find, &received_bytes);
        // Each pause is twice the pause before. After a subscription that lasted, it is the shortest again.
        for (has_lasted, factor) in [(false, 1), (false, 2), (false, 4), (true, 1)] {
            let subscribed = async {
                while receiver.subscriptions.is_empty() {
                    receiver.notify_due();
                    while let Some((partition, work)) = side.requests.take() {
                        receiver.process_requests(partition, work);
                    }
                    if !receiver.subscriptions.is_empty() {
                        break;
                    }
                    match receiver.retry_queue.first().map(|(retry_at, _)| *retry_at) {
                        Some(retry_at) => tokio::time::sleep_until(retry_at).await,
                        None => side.requests.wait_for_request().await,
                    }
                }
            };
            tokio::time::timeout(Duration::from_secs(20), subscribed).await.expect("the partition subscribes again");
            let since = clock::monotonic() - if has_lasted { MAX_RETRY_DELAY } else { Duration::ZERO };
            receiver.slots[0].subscription.as_mut().expect("a subscription exists").accepted_at = Some(since);
            let pause = MIN_RETRY_DELAY * factor;
            let earliest = clock::monotonic() + pause;
            receiver.on_subscription_ended(0, &"its disk is corrupt");
            let retry_at = *receiver.retry_at.values().next().expect("the partition waits");
            assert!((earliest..=clock::monotonic() + pause).contains(&retry_at), "a pause of {pause:?}");
        }
        let slot = &mut receiver.slots[0];
        let now = clock::monotonic();
        assert_eq!(
            (slot.end_log.occur(now), slot.failure_log.occur(now)),
            (None, Some(1)),
            "an error is logged in spite of the other throttle"
        );
        side.tasks.stop().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn progress_beyond_one_message_stays_marked() {
        const SUBSCRIPTIONS: usize = 5;
        let side = Side::new(BrokerId(2));
        let (find, received_bytes) = (side.find(), Counter::default());
        side.requests.begin_link();
        for number in 0..SUBSCRIPTIONS {
            side.open(u32::try_from(number).expect("few"), &[BrokerId(1)]).await;
        }
        let mut receiver = ReplicationReceiver::new(&side.requests, &find, &received_bytes);
        let subscribed = async {
            loop {
                while let Some((partition, work)) = side.requests.take() {
                    receiver.process_requests(partition, work);
                }
                if receiver.subscriptions.len() == SUBSCRIPTIONS {
                    break;
                }
                side.requests.wait_for_request().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), subscribed).await.expect("every partition subscribes");
        receiver.messages.clear();
        while receiver.ready.take().is_some() {}
        for index in 0..SUBSCRIPTIONS {
            receiver.slots[index].subscription.as_mut().expect("a subscription exists").accepted_at =
                Some(clock::monotonic());
            receiver.ready.mark(index);
        }
        let mut acknowledged = BTreeSet::new();
        for subscriptions in [2, 2, 1] {
            receiver.gather_progress(2);
            let Some(v1::ReplicateRequest { message: Some(replicate_request::Message::Progress(progress)), .. }) =
                receiver.messages.pop_front()
            else {
                panic!("a progress message is due");
            };
            assert_eq!((progress.subscription_id.len(), receiver.messages.len()), (subscriptions, 0));
            acknowledged.extend(progress.subscription_id);
        }
        assert_eq!(acknowledged.len(), SUBSCRIPTIONS);
        side.tasks.stop().await;
    }
}
