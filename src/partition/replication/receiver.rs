//! The follower's side of a link: it sends subscriptions, receives batches, and acknowledges records in the log.

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

/// First pause before a partition subscribes again. It doubles each time, until a leader has served the partition for
/// [`MAX_RETRY_DELAY`].
const MIN_RETRY_DELAY: Duration = Duration::from_millis(20);

/// Longest such pause.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Maximum time that the end of a link waits for the last message of the other side, or for the delivery of this
/// side's.
const UNSUBSCRIBE_TIMEOUT: Duration = Duration::from_millis(500);

/// Serves the partitions that send their requests to `requests` over one link, until the link ends. Each of these
/// partitions is notified when the link is connected, and when the link ends. `received` counts the bytes of the
/// received batches.
pub async fn run_receiver<S>(
    requests: &LinkRequests,
    find: &PartitionLookup,
    mut incoming: S,
    outgoing: mpsc::Sender<v1::ReplicateRequest>,
    received: &Counter,
    tasks: &Tasks,
) -> LinkEnd
where
    S: Stream<Item = Result<v1::ReplicateResponse, Status>> + Unpin + Send,
{
    requests.begin();
    let mut receiver = ReplicationReceiver::new(requests, find, received);
    let ended = receiver.run(&mut incoming, &outgoing, tasks).await;
    if matches!(ended, LinkEnd::Stopped) {
        let unsubscribed = receiver.send_unsubscribes(incoming, outgoing);
        if tokio::time::timeout(UNSUBSCRIBE_TIMEOUT, unsubscribed).await.is_err() {
            tracing::debug!("timed out sending unsubscriptions at the end of a link");
        }
    }
    for partition in requests.end() {
        if let Some(partition) = find(partition)
            && partition.on_link_event(LinkEvent::Disconnected).is_err()
        {
            // The queue is full of earlier events; the next link notifies the partition again.
            tracing::debug!(
                partition = %partition.id(),
                "cannot notify the partition of its lost link: its queue is full"
            );
        }
    }
    ended
}

/// One partition on this link.
struct ReceiverSlot {
    id: PartitionId,
    /// The partition may have been deleted since.
    partition: Weak<Partition>,
    subscription: Option<ReceiverSubscription>,
    /// Throttle log lines about subscriptions that ended with an error here (`failed`) or by the leader (`dismissed`).
    failed: LogThrottle,
    dismissed: LogThrottle,
}

/// A subscription.
struct ReceiverSubscription {
    partition: Arc<Partition>,
    number: u32,
    request: RequestId,
    params: SubscribeRequest,
    /// Time at which the leader accepted the reported log end.
    accepted_at: Option<Instant>,
    /// Progress that was acknowledged last.
    acknowledged: Option<ReplicaProgress>,
}

struct ReplicationReceiver<'a> {
    requests: &'a LinkRequests,
    find: &'a PartitionLookup,
    received: &'a Counter,
    /// One slot for each partition that ever subscribed on this link, by the index under which it marks `ready`.
    slots: Vec<ReceiverSlot>,
    slot_of: BTreeMap<PartitionId, usize>,
    subscriptions: BTreeMap<u32, usize>,
    next_subscription: u32,
    /// Partitions with progress to acknowledge.
    ready: Arc<WakeSet>,
    /// Messages that are sent before any new progress: subscriptions and unsubscriptions.
    messages: VecDeque<v1::ReplicateRequest>,
    /// Newest ping without a response.
    ping: Option<u64>,
    /// Partitions that are to be notified that the link is connected, by time.
    later: BTreeSet<(Instant, PartitionId)>,
    /// The same by partition.
    waiting: BTreeMap<PartitionId, Instant>,
    /// Pauses of each partition that has waited.
    backoffs: BTreeMap<PartitionId, Backoff>,
}

impl<'a> ReplicationReceiver<'a> {
    fn new(requests: &'a LinkRequests, find: &'a PartitionLookup, received: &'a Counter) -> Self {
        Self {
            requests,
            find,
            received,
            slots: Vec::new(),
            slot_of: BTreeMap::new(),
            subscriptions: BTreeMap::new(),
            next_subscription: 0,
            ready: Arc::default(),
            messages: VecDeque::new(),
            ping: None,
            later: BTreeSet::new(),
            waiting: BTreeMap::new(),
            backoffs: BTreeMap::new(),
        }
    }

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
            let first = self.later.first().map(|(due, _)| *due);
            let due = async {
                match first {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = tasks.cancelled() => return LinkEnd::Stopped,
                permit = outgoing.reserve(), if self.has_message() => match (permit, self.message()) {
                    (Ok(permit), Some(message)) => permit.send(message.padded()),
                    _ => return end_of_closed_link(incoming).await,
                },
                () = self.requests.changed() => {}
                () = ready.wait_for_index(), if self.messages.is_empty() => self.gather_progress(limits::MAX_PEER_REPLICAS),
                message = incoming.next() => match message {
                    Some(Ok(message)) => {
                        if let Err(bad) = self.received(message) {
                            return LinkEnd::Bad(bad.into());
                        }
                    }
                    Some(Err(status)) => return LinkEnd::Broken(status),
                    None => return LinkEnd::Closed,
                },
                () = due => self.notify_due(),
            }
        }
    }

    fn has_message(&self) -> bool {
        self.ping.is_some() || !self.messages.is_empty()
    }

    /// Returns the next message: the response to a ping first.
    fn message(&mut self) -> Option<v1::ReplicateRequest> {
        self.ping.take().map(messages::pong).or_else(|| self.messages.pop_front())
    }

    /// Sends the pending unsubscriptions, and waits until the other side has received them: it ends the stream then.
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

    fn process_requests(&mut self, id: PartitionId, work: PendingLinkWork) {
        if let Some(unsubscribe) = work.unsubscribe {
            self.backoffs.remove(&id);
            if let Some(due) = self.waiting.remove(&id) {
                self.later.remove(&(due, id));
            }
            if let Some(subscription) = self.end_subscription(id) {
                self.messages.push_back(messages::unsubscribe(
                    subscription.number,
                    unsubscribe.known,
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

    /// Notifies a partition that the link is connected, or schedules the notification if it cannot be delivered now.
    fn notify_connected(&mut self, id: PartitionId) {
        let is_delivered =
            (self.find)(id).is_some_and(|partition| partition.on_link_event(LinkEvent::Connected).is_ok());
        if !is_delivered {
            self.schedule_retry(id);
        }
    }

    /// Schedules the notification that the link is connected for the end of the partition's pause.
    fn schedule_retry(&mut self, id: PartitionId) {
        if self.waiting.contains_key(&id) {
            return;
        }
        self.reset_pause(id);
        let backoff = self.backoffs.entry(id).or_insert_with(|| Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY));
        let due = clock::monotonic() + backoff.next_pause();
        self.later.insert((due, id));
        self.waiting.insert(id, due);
    }

    /// Notifies the partitions whose pause is over.
    fn notify_due(&mut self) {
        let now = clock::monotonic();
        while let Some((due, id)) = self.later.first().copied()
            && due <= now
        {
            self.later.pop_first();
            self.waiting.remove(&id);
            if self.requests.follows(id) {
                self.notify_connected(id);
            }
        }
    }

    fn subscribe(&mut self, request: RequestId, params: SubscribeRequest) {
        let id = params.partition;
        self.end_subscription(id);
        let Some((index, partition)) = self.slot(id) else {
            // The partition is being opened, or closed.
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

    /// Returns the slot of a partition as it is open now.
    fn slot(&mut self, id: PartitionId) -> Option<(usize, Arc<Partition>)> {
        let partition = (self.find)(id)?;
        let index = *self.slot_of.entry(id).or_insert(self.slots.len());
        if index == self.slots.len() {
            self.slots.push(ReceiverSlot {
                id,
                partition: Weak::new(),
                subscription: None,
                failed: LogThrottle::default(),
                dismissed: LogThrottle::default(),
            });
        }
        let (slot, weak) = (&mut self.slots[index], Arc::downgrade(&partition));
        if !Weak::ptr_eq(&slot.partition, &weak) {
            slot.partition = weak;
            partition.add_listener(&self.ready, index, WatermarkKind::AnyEnd);
        }
        Some((index, partition))
    }

    /// Resets the pause if the subscription lasted. A subscription that ended at once may do so again: its pauses keep
    /// growing.
    fn reset_pause(&mut self, id: PartitionId) {
        let subscription = self.slot_of.get(&id).and_then(|index| self.slots[*index].subscription.as_ref());
        let accepted_at = subscription.and_then(|subscription| subscription.accepted_at);
        if accepted_at
            .is_some_and(|accepted_at| clock::monotonic().saturating_duration_since(accepted_at) >= MAX_RETRY_DELAY)
        {
            self.backoffs.remove(&id);
        }
    }

    fn end_subscription(&mut self, id: PartitionId) -> Option<ReceiverSubscription> {
        self.reset_pause(id);
        let index = *self.slot_of.get(&id)?;
        let subscription = self.slots[index].subscription.take()?;
        self.subscriptions.remove(&subscription.number);
        Some(subscription)
    }

    /// Ends a subscription after an error; the partition subscribes again after a pause.
    fn fail(&mut self, index: usize, reason: &dyn std::fmt::Display) {
        let Some(subscription) = self.end_and_wait(index) else { return };
        let Some(count) = self.slots[index].failed.occur(clock::monotonic()) else {
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

    /// Ends a subscription that the leader ended, as at each change of leader; the partition subscribes again after a
    /// pause.
    fn on_subscription_ended(&mut self, index: usize, reason: &dyn std::fmt::Display) {
        let Some(subscription) = self.end_and_wait(index) else { return };
        let Some(count) = self.slots[index].dismissed.occur(clock::monotonic()) else {
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

    fn end_and_wait(&mut self, index: usize) -> Option<ReceiverSubscription> {
        let id = self.slots[index].id;
        let subscription = self.end_subscription(id)?;
        self.requests.end_subscription(id, subscription.request);
        self.messages.push_back(messages::unsubscribe(subscription.number, subscription.params.epoch, false));
        self.schedule_retry(id);
        Some(subscription)
    }

    /// Queues one message with the progress of subscriptions that moved, at most `max_subscriptions` of them.
    fn gather_progress(&mut self, max_subscriptions: usize) {
        let mut moved = Vec::new();
        // The rest is gathered when this message has been sent.
        while moved.len() < max_subscriptions
            && let Some(index) = self.ready.take()
        {
            let Some(subscription) = &mut self.slots[index].subscription else { continue };
            if subscription.accepted_at.is_none() {
                continue;
            }
            // Read while the subscription holds: a partition that unsubscribes, or subscribes again, changes its log
            // only after that.
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

    fn received(&mut self, message: v1::ReplicateResponse) -> Result<(), InvalidMessage> {
        match message.try_into()? {
            LeaderMessage::Response { subscription_id: number, response } => {
                if let Some(index) = self.subscriptions.get(&number).copied() {
                    match response {
                        Ok(response) => self.on_response(index, response),
                        Err(error) => self.fail(index, &error),
                    }
                }
            }
            LeaderMessage::Ping(number) => self.ping = Some(number),
            LeaderMessage::Batches(partitions) => {
                for message in partitions {
                    if let Some(index) = self.subscriptions.get(&message.subscription_id).copied()
                        && let Err(reason) = self.take(index, message)
                    {
                        self.fail(index, &reason);
                    }
                }
            }
        }
        Ok(())
    }

    fn on_response(&mut self, index: usize, response: SubscribeResponse) {
        let ReceiverSlot { id, subscription: Some(subscription), .. } = &mut self.slots[index] else { return };
        let id = *id;
        match &response.outcome {
            SubscribeOutcome::Rejected(reason) if subscription.accepted_at.is_some() => {
                let reason = reason.clone();
                return self.on_subscription_ended(index, &reason);
            }
            _ if subscription.accepted_at.is_some() => return self.fail(index, &"second response to one subscription"),
            SubscribeOutcome::Accepted(at) if *at != subscription.params.position.log_end => {
                let reason = not_requested("the accepted offset", *at, subscription.params.position.log_end);
                return self.fail(index, &reason);
            }
            SubscribeOutcome::Accepted(_) => subscription.accepted_at = Some(clock::monotonic()),
            _ => {}
        }
        let is_over = subscription.accepted_at.is_none();
        let event = LinkEvent::Response(response);
        let delivered = self.requests.while_subscribed(&subscription.partition, subscription.request, |partition| {
            partition.on_link_event(event)
        });
        if let Some(Err(full)) = delivered {
            return self.fail(index, &full);
        }
        if is_over {
            self.end_subscription(id);
        }
    }

    fn take(&mut self, index: usize, message: v1::PartitionBatches) -> Result<(), BatchRejection> {
        let Some(subscription) = &mut self.slots[index].subscription else { return Ok(()) };
        if subscription.accepted_at.is_none() {
            return Err(BatchRejection::Early);
        }
        self.received.inc_by(message.chunks.iter().map(|chunk| chunk.len() as u64).sum());
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

/// Returns the end of a link whose other side takes no more messages: it has sent the reason, or is about to.
async fn end_of_closed_link<S>(incoming: &mut S) -> LinkEnd
where
    S: Stream<Item = Result<v1::ReplicateResponse, Status>> + Unpin + Send,
{
    let reason = incoming.filter_map(async |message| message.err());
    match tokio::time::timeout(UNSUBSCRIBE_TIMEOUT, std::pin::pin!(reason).next()).await {
        Ok(Some(status)) => LinkEnd::Broken(status),
        Ok(None) | Err(_) => LinkEnd::Closed,
    }
}

/// Reason why batches cannot be delivered.
#[derive(Debug, thiserror::Error)]
enum BatchRejection {
    #[error(transparent)]
    Bad(#[from] InvalidMessage),
    #[error(transparent)]
    Overrun(#[from] QueueFull),
    #[error("batches arrived before the response to the subscription")]
    Early,
    #[error("batches have epoch {got}, and the subscription has epoch {subscribed}")]
    Epoch { got: LeaderEpoch, subscribed: LeaderEpoch },
}

fn not_requested(field: &'static str, got: Offset, expected: Offset) -> InvalidMessage {
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
    /// and each time both logged a line.
    #[tokio::test(flavor = "multi_thread")]
    async fn subscription_that_ends_at_once_waits_longer_each_time() {
        let side = Side::new(BrokerId(2));
        let (find, received) = (side.find(), Counter::default());
        side.asked.begin();
        side.open(0, &[BrokerId(1)]).await;
        let mut receiver = ReplicationReceiver::new(&side.asked, &find, &received);
        // Each pause is twice the pause before.
        for (lasts, times) in [(false, 1), (false, 2), (false, 4), (true, 1)] {
            let subscribed = async {
                while receiver.subscriptions.is_empty() {
                    receiver.notify_due();
                    while let Some((partition, work)) = side.asked.take() {
                        receiver.process_requests(partition, work);
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), subscribed).await.expect("the partition subscribes again");
            let since = clock::monotonic() - if lasts { MAX_RETRY_DELAY } else { Duration::ZERO };
            receiver.slots[0].subscription.as_mut().expect("a subscription exists").accepted_at = Some(since);
            let pause = MIN_RETRY_DELAY * times;
            let earliest = clock::monotonic() + pause;
            receiver.on_subscription_ended(0, &"its disk is corrupt");
            let due = *receiver.waiting.values().next().expect("the partition waits");
            assert!((earliest..=clock::monotonic() + pause).contains(&due), "a pause of {pause:?}");
        }
        let slot = &mut receiver.slots[0];
        let now = clock::monotonic();
        assert_eq!(
            (slot.dismissed.occur(now), slot.failed.occur(now)),
            (None, Some(1)),
            "an error is logged in spite of the other throttle"
        );
        side.tasks.stop().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn progress_beyond_one_message_stays_marked() {
        const SUBSCRIPTIONS: usize = 5;
        let side = Side::new(BrokerId(2));
        let (find, received) = (side.find(), Counter::default());
        side.asked.begin();
        for number in 0..SUBSCRIPTIONS {
            side.open(u32::try_from(number).expect("few"), &[BrokerId(1)]).await;
        }
        let mut receiver = ReplicationReceiver::new(&side.asked, &find, &received);
        let subscribed = async {
            loop {
                while let Some((partition, work)) = side.asked.take() {
                    receiver.process_requests(partition, work);
                }
                if receiver.subscriptions.len() == SUBSCRIPTIONS {
                    break;
                }
                side.asked.changed().await;
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
