//! Fetch streams of a consumer, each to one broker. They are polled round-robin: a stream that is always ready does
//! not starve the other streams.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
};

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use tokio::sync::mpsc;

use super::super::{Client, address::BrokerAddress, call::convert_status, connection::log_client};
use crate::proto::{
    error::{ApiError, ErrorCode},
    v1,
};

/// Event of a stream.
pub(super) enum StreamEvent {
    /// The broker accepted the request.
    Opened,
    Response(v1::FetchResponse),
}

type ResponseStream = Pin<Box<dyn Stream<Item = Result<StreamEvent, ApiError>> + Send>>;

/// Open stream to one broker.
struct FetchStream {
    address: BrokerAddress,
    /// True if the broker's last response reports an expired lease: other brokers may lead its partitions.
    lease_expired: bool,
    /// Sender that keeps the request half of the stream open.
    _requests: mpsc::Sender<v1::FetchRequest>,
}

/// Open streams by number. A number is never reused.
pub(super) struct FetchStreams {
    streams: BTreeMap<u64, FetchStream>,
    responses: FairStreams<ResponseStream>,
    next_number: u64,
}

impl FetchStreams {
    pub(super) fn new() -> Self {
        Self { streams: BTreeMap::new(), responses: FairStreams::new(), next_number: 0 }
    }

    /// Returns the number of the stream that [`Self::open`] opens next.
    pub(super) fn next_number(&self) -> u64 {
        self.next_number
    }

    /// Opens the next stream with its only request.
    pub(super) fn open(&mut self, client: Client, address: BrokerAddress, request: v1::FetchRequest) {
        let number = self.next_number;
        self.next_number += 1;
        let (requests, queue) = mpsc::channel(1);
        requests.try_send(request).expect("the queue is new");
        self.responses.insert(number, responses(client, address.clone(), queue));
        self.streams.insert(number, FetchStream { address, lease_expired: false, _requests: requests });
    }

    /// Closes a stream if it is open.
    pub(super) fn close(&mut self, number: u64) {
        self.responses.remove(number);
        self.streams.remove(&number);
    }

    /// Returns the next event of any stream, and the number of that stream; `None` if no stream is open. An error is
    /// the end of its stream, and the caller then closes the stream. Dropping the future loses no event.
    pub(super) async fn next(&mut self) -> Option<(u64, Result<StreamEvent, ApiError>)> {
        self.responses.next().await
    }

    pub(super) fn address(&self, number: u64) -> Option<&BrokerAddress> {
        self.streams.get(&number).map(|stream| &stream.address)
    }

    /// Returns the numbers of the open streams to a broker.
    pub(super) fn numbers_to(&self, address: &BrokerAddress) -> Vec<u64> {
        let streams = self.streams.iter().filter(|(_, stream)| stream.address == *address);
        streams.map(|(number, _)| *number).collect()
    }

    /// Stores whether a response on the stream reports an expired lease. Returns true if it does and the response
    /// before did not.
    pub(super) fn set_lease_expired(&mut self, number: u64, lease_expired: bool) -> bool {
        let Some(stream) = self.streams.get_mut(&number) else { return false };
        let was_expired = std::mem::replace(&mut stream.lease_expired, lease_expired);
        lease_expired && !was_expired
    }

    pub(super) fn is_lease_expired(&self, number: u64) -> bool {
        self.streams.get(&number).is_some_and(|stream| stream.lease_expired)
    }

    /// Returns the brokers that report an expired lease.
    pub(super) fn expired_brokers(&self) -> BTreeSet<BrokerAddress> {
        let expired = self.streams.values().filter(|stream| stream.lease_expired);
        expired.map(|stream| stream.address.clone()).collect()
    }
}

/// Returns the events of one stream to one broker. The first error is the reason for the end of the stream; a second
/// error may follow.
fn responses(client: Client, address: BrokerAddress, requests: mpsc::Receiver<v1::FetchRequest>) -> ResponseStream {
    let name = address.clone();
    let open = async move {
        let channel =
            client.channel(&address).await.map_err(|error| ApiError::new(ErrorCode::NotReady, error.problem()))?;
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let response = log_client(channel).fetch(requests).await.map_err(|status| convert_status(&status))?;
        let responses = response.into_inner().map_ok(StreamEvent::Response).map_err(|status| convert_status(&status));
        Ok::<_, ApiError>(futures::stream::once(async { Ok(StreamEvent::Opened) }).chain(responses))
    };
    let ended = futures::stream::once(async { Err(ApiError::new(ErrorCode::NotReady, "the broker ended the stream")) });
    let stream = futures::stream::once(open).try_flatten().chain(ended);
    let with_address =
        move |error: ApiError| ApiError { message: format!("{}: {}", name.as_str(), error.message), ..error };
    Box::pin(stream.map_err(with_address))
}

/// Streams by number, polled round-robin.
struct FairStreams<S> {
    streams: Vec<(u64, S)>,
    /// Index of the stream that is polled next.
    next_index: usize,
}

impl<S: Stream + Unpin> FairStreams<S> {
    fn new() -> Self {
        Self { streams: Vec::new(), next_index: 0 }
    }

    /// Adds a stream under an unused number.
    fn insert(&mut self, number: u64, stream: S) {
        self.streams.push((number, stream));
    }

    fn remove(&mut self, number: u64) {
        if let Some(at) = self.streams.iter().position(|(existing, _)| *existing == number) {
            self.remove_at(at);
        }
    }

    /// Returns the next item of any stream, and the number of that stream; `None` if there is no stream. Removes
    /// streams that have ended. Dropping the future loses no item.
    async fn next(&mut self) -> Option<(u64, S::Item)> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// Polls each stream at most once, beginning with the stream after the one that returned the last item.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<(u64, S::Item)>> {
        let mut remaining = self.streams.len();
        while remaining > 0 {
            remaining -= 1;
            if self.next_index >= self.streams.len() {
                self.next_index = 0;
            }
            let (number, stream) = &mut self.streams[self.next_index];
            match Pin::new(stream).poll_next(context) {
                Poll::Ready(Some(item)) => {
                    self.next_index += 1;
                    return Poll::Ready(Some((*number, item)));
                }
                Poll::Ready(None) => self.remove_at(self.next_index),
                Poll::Pending => self.next_index += 1,
            }
        }
        if self.streams.is_empty() { Poll::Ready(None) } else { Poll::Pending }
    }

    /// Removes the stream at an index. The stream that is polled next stays the same.
    fn remove_at(&mut self, at: usize) {
        self.streams.remove(at);
        if at < self.next_index {
            self.next_index -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, StreamExt as _, stream};

    use super::*;

    fn numbers(of: std::ops::Range<u32>) -> stream::BoxStream<'static, u32> {
        stream::iter(of).boxed()
    }

    #[test]
    fn ready_streams_are_polled_round_robin_until_they_end() {
        let mut streams = FairStreams::new();
        assert_eq!(streams.next().now_or_never(), Some(None));
        streams.insert(1, numbers(0..3));
        streams.insert(2, numbers(10..11));
        streams.insert(3, numbers(20..22));
        let mut received = Vec::new();
        while let Some(Some(item)) = streams.next().now_or_never() {
            received.push(item);
        }
        assert_eq!(received, [(1, 0), (2, 10), (3, 20), (1, 1), (3, 21), (1, 2)]);
    }

    #[test]
    fn removed_stream_does_not_skip_another_stream() {
        let mut streams = FairStreams::new();
        for number in 1..=3 {
            streams.insert(number, numbers(0..9));
        }
        streams.insert(4, stream::pending().boxed());
        assert_eq!(streams.next().now_or_never(), Some(Some((1, 0))));
        assert_eq!(streams.next().now_or_never(), Some(Some((2, 0))));
        streams.remove(1);
        streams.remove(7);
        assert_eq!(streams.next().now_or_never(), Some(Some((3, 0))));
        assert_eq!(streams.next().now_or_never(), Some(Some((2, 1))));
        streams.remove(2);
        streams.remove(3);
        assert_eq!(streams.next().now_or_never(), None, "the remaining stream has no item");
    }
}
