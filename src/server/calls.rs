//! Counts open calls by connection: from the head of the request until the body of the response has ended or was dropped. That is when
//! HTTP/2 closes the stream, so a connection without open calls is idle.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::{
    body::{Body, Bytes, HttpBody},
    response::Response,
};
use http_body::{Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tonic::{Status, codegen::http::HeaderMap};

use super::connection::OpenCall;
use crate::{broker::CallMemory, proto::fault::Fault};

/// What a response holds until it has been sent.
pub(super) struct HeldMemory {
    pub(super) memory: CallMemory,
    /// Its turn among the calls that are answered from metadata.
    pub(super) turn: Option<OwnedSemaphorePermit>,
}

/// Keeps the call open until the response has been sent.
pub(super) fn until_sent(response: Response, call: Option<OpenCall>, held: Option<HeldMemory>) -> Response {
    if let Some(held) = &held {
        held.memory.on_response_begun();
    }
    response.map(|body| Body::new(CountedBody { body, rest: Bytes::new(), _call: call, held }))
}

/// HTTP/2 takes a whole frame of a body when it takes a byte of it, and asks for the next one then. Smaller ones keep what it holds of a
/// stream beside what is charged small. Responses to other brokers are not charged and go out as they are.
const PIECE_BYTES: usize = 32 << 10;

/// The end of a response that there is no memory for.
fn trailers(fault: Fault) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    // A header that cannot be written leaves the response without an end, which clients take for a broken one.
    let _ = Status::from(fault).add_header(&mut trailers);
    Frame::trailers(trailers)
}

struct CountedBody {
    body: Body,
    /// What was not handed over of the last frame.
    rest: Bytes,
    _call: Option<OpenCall>,
    held: Option<HeldMemory>,
}

impl CountedBody {
    fn next_piece(&mut self) -> Frame<Bytes> {
        let most = if self.held.is_some() { PIECE_BYTES } else { usize::MAX };
        Frame::data(self.rest.split_to(self.rest.len().min(most)))
    }
}

impl HttpBody for CountedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        if !self.rest.is_empty() {
            if let Some(held) = &self.held {
                held.memory.on_piece_taken();
            }
            return Poll::Ready(Some(Ok(self.next_piece())));
        }
        // HTTP/2 asks for more when it has sent most of what it was given.
        if let Some(held) = &self.held {
            held.memory.on_body_polled();
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let bytes = frame.iter().flatten().filter_map(Frame::data_ref).map(Bytes::len).sum();
        if let Some(held) = &mut self.held {
            if frame.is_none() {
                held.turn = None;
            }
            if let Err(fault) = held.memory.on_body_handed(bytes) {
                self.body = Body::empty();
                return Poll::Ready(Some(Ok(trailers(fault))));
            }
        }
        Poll::Ready(match frame {
            Some(Ok(frame)) => Some(Ok(match frame.into_data() {
                Ok(data) => {
                    self.rest = data;
                    self.next_piece()
                }
                Err(trailers) => trailers,
            })),
            ended => ended,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (body, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(body.lower() + rest);
        if let Some(upper) = body.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin};

    use super::*;
    use crate::{broker::Budgets, proto::fault::Reason};

    /// HTTP/2 asked for the next frame when a byte of the last one had been sent: a response was given back before it was read.
    #[tokio::test]
    async fn frame_goes_out_in_pieces_and_is_given_back_after_the_last() {
        let budgets = Budgets::new(1 << 20, 1 << 20);
        let memory = CallMemory::new(budgets.clone(), budgets.connection(|| {}));
        let frames = [3 * PIECE_BYTES - 1, 10].map(|bytes| Ok::<_, axum::Error>(Bytes::from(vec![7; bytes])));
        let body = Body::from_stream(futures::stream::iter(frames));
        let held = HeldMemory { memory: memory.clone(), turn: None };
        memory.reserve_more(100_000).expect("there is as much");
        let mut body = pin!(until_sent(Response::new(body), None, Some(held)).into_body());
        for (bytes, taken) in [(PIECE_BYTES, true), (PIECE_BYTES, true), (PIECE_BYTES - 1, true), (10, false)] {
            let piece = poll_fn(|cx| body.as_mut().poll_frame(cx)).await.expect("no end").expect("no error");
            assert_eq!(piece.into_data().expect("data").len(), bytes);
            assert_eq!((budgets.taken().1 > 0, body.is_end_stream()), (taken, false));
        }
        assert!(poll_fn(|cx| body.as_mut().poll_frame(cx)).await.is_none());
    }

    /// Answers made of metadata were not charged: a thousand connections held sixteen each.
    #[tokio::test]
    async fn response_without_records_is_charged_or_ends_with_an_error() {
        let budgets = Budgets::new(1 << 20, 1 << 20);
        let connection = budgets.connection(|| {});
        let mut bodies = Vec::new();
        let refused = loop {
            let memory = CallMemory::new(budgets.clone(), connection.clone());
            let body = Body::from(vec![7; 50_000]);
            let mut body =
                Box::pin(until_sent(Response::new(body), None, Some(HeldMemory { memory, turn: None })).into_body());
            let frame = poll_fn(|cx| body.as_mut().poll_frame(cx)).await.expect("no end").expect("no error");
            match frame.into_trailers() {
                Ok(trailers) => break trailers,
                Err(_) => bodies.push(body),
            }
        };
        let fault = Fault::from(&Status::from_header_map(&refused).expect("a status"));
        assert_eq!((fault.reason, fault.retryable), (Reason::Overloaded, true));
        assert!(fault.message.contains("limits.response_memory_bytes"), "{fault}");
        assert!(
            !bodies.is_empty() && budgets.taken().1 >= bodies.len() * 50_000,
            "{} {:?}",
            bodies.len(),
            budgets.taken()
        );
        drop(bodies);
        assert_eq!(budgets.taken().1, 0);
    }
}
