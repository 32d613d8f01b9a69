//! Streams of a consumer, polled in turns: a stream that is always ready does not starve the other streams.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;

/// Streams by number.
pub(super) struct FairStreams<S> {
    streams: Vec<(u64, S)>,
    /// Index of the stream that is polled next.
    turn: usize,
}

impl<S: Stream + Unpin> FairStreams<S> {
    pub(super) fn new() -> Self {
        Self { streams: Vec::new(), turn: 0 }
    }

    /// Adds a stream under an unused number.
    pub(super) fn insert(&mut self, number: u64, stream: S) {
        self.streams.push((number, stream));
    }

    /// Removes a stream if it exists.
    pub(super) fn remove(&mut self, number: u64) {
        if let Some(at) = self.streams.iter().position(|(existing, _)| *existing == number) {
            self.take_out(at);
        }
    }

    /// Returns the next item of any stream, and the number of that stream; `None` if there is no stream. Removes
    /// streams that have ended. Dropping the future loses no item.
    pub(super) async fn next(&mut self) -> Option<(u64, S::Item)> {
        poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<(u64, S::Item)>> {
        let mut remaining = self.streams.len();
        while remaining > 0 {
            remaining -= 1;
            if self.turn >= self.streams.len() {
                self.turn = 0;
            }
            let (number, stream) = &mut self.streams[self.turn];
            match Pin::new(stream).poll_next(context) {
                Poll::Ready(Some(item)) => {
                    self.turn += 1;
                    return Poll::Ready(Some((*number, item)));
                }
                Poll::Ready(None) => self.take_out(self.turn),
                Poll::Pending => self.turn += 1,
            }
        }
        if self.streams.is_empty() { Poll::Ready(None) } else { Poll::Pending }
    }

    fn take_out(&mut self, at: usize) {
        self.streams.remove(at);
        if at < self.turn {
            self.turn -= 1;
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
    fn ready_streams_take_turns_and_ended_ones_are_removed() {
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
    fn removed_stream_does_not_skip_another_turn() {
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
