//! Counts open calls by connection: from the head of the request until HTTP/2 has written the body of the response, or closed the stream. So
//! a connection without open calls is idle.

use std::{
    pin::Pin,
    sync::Arc,
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
use crate::broker::{CallMemory, HandedResponse};

/// Keeps the call open until the response has been sent. `memory` is that of a client's call, `turn` its turn among the calls that are answered
/// from metadata.
pub(super) fn until_sent(
    response: Response,
    call: Option<OpenCall>,
    memory: Option<CallMemory>,
    turn: Option<OwnedSemaphorePermit>,
) -> Response {
    let open = Arc::new(OpenResponse { memory, _call: call, _turn: turn });
    response.map(|body| Body::new(CountedBody { body, rest: Bytes::new(), open }))
}

/// HTTP/2 takes a whole frame of a body when there is room for a byte, and asks for the next one then. So frames tell how fast a client
/// reads: at the slowest pace that is allowed, 256 KiB in a second, it takes one frame in a second. Smaller frames cost throughput. Responses
/// to other brokers are not charged and go out as they are.
const PIECE_BYTES: usize = 256 << 10;

/// The end of a response.
pub(super) fn trailers(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    // A header that cannot be written leaves the response without an end, which clients take for a broken one.
    let _ = status.add_header(&mut trailers);
    Frame::trailers(trailers)
}

/// A response, kept by its body and by every frame of it that has not been sent.
struct OpenResponse {
    memory: Option<CallMemory>,
    _call: Option<OpenCall>,
    _turn: Option<OwnedSemaphorePermit>,
}

/// A frame that HTTP/2 has. It drops the bytes when it has written the last of them, or closes the stream, and asks for more and takes the end
/// of the body long before.
struct HandedFrame {
    data: Bytes,
    _memory: Option<HandedResponse>,
    _open: Arc<OpenResponse>,
}

impl AsRef<[u8]> for HandedFrame {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

struct CountedBody {
    body: Body,
    /// What was not handed over of the last frame.
    rest: Bytes,
    open: Arc<OpenResponse>,
}

impl CountedBody {
    fn next_piece(&mut self) -> Frame<Bytes> {
        let most = if self.open.memory.is_some() { PIECE_BYTES } else { usize::MAX };
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
            if let Some(memory) = &self.open.memory {
                memory.on_piece_taken();
            }
            return Poll::Ready(Some(Ok(self.next_piece())));
        }
        let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)?) else { return Poll::Ready(None) };
        Poll::Ready(Some(Ok(match frame.into_data() {
            Ok(data) => match self.open.memory.as_ref().map(|memory| memory.hand(data.len())).transpose() {
                Ok(handed) => {
                    let frame = HandedFrame { data, _memory: handed, _open: Arc::clone(&self.open) };
                    self.rest = Bytes::from_owner(frame);
                    self.next_piece()
                }
                Err(fault) => {
                    self.body = Body::empty();
                    trailers(&fault.into())
                }
            },
            Err(trailers) => trailers,
        })))
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
    use std::future::poll_fn;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::{
        broker::Budgets,
        proto::fault::{Fault, Reason},
    };

    /// HTTP/2 asked for the next frame, and took the end, when a byte of the last one had been sent: responses were given back before they were
    /// read.
    #[tokio::test]
    async fn response_is_charged_and_its_call_open_until_its_last_piece_was_sent() {
        let budgets = Budgets::new(8 << 20, 8 << 20);
        let memory = CallMemory::new(budgets.clone(), budgets.connection(|| {}));
        let frames = [3 * PIECE_BYTES - 1, 10].map(|bytes| Ok::<_, axum::Error>(Bytes::from(vec![7; bytes])));
        let body = Body::from_stream(futures::stream::iter(frames));
        memory.reserve_more(100_000).expect("there is as much");
        let turn = Arc::new(Semaphore::new(1));
        let held = Arc::clone(&turn).try_acquire_owned().ok();
        let mut body = Box::pin(until_sent(Response::new(body), None, Some(memory), held).into_body());
        let mut pieces = Vec::new();
        for bytes in [PIECE_BYTES, PIECE_BYTES, PIECE_BYTES - 1, 10] {
            let piece = poll_fn(|cx| body.as_mut().poll_frame(cx)).await.expect("no end").expect("no error");
            pieces.push(piece.into_data().expect("data"));
            assert_eq!(pieces.last().map(Bytes::len), Some(bytes));
            assert!(!body.is_end_stream());
        }
        assert!(poll_fn(|cx| body.as_mut().poll_frame(cx)).await.is_none());
        drop(body);
        let held = |_: &[Bytes]| (budgets.taken().1 > 0, turn.available_permits());
        assert_eq!(held(&pieces), (true, 0), "HTTP/2 has the pieces");
        pieces.drain(..2);
        assert_eq!(held(&pieces), (true, 0), "one of the large frame is left");
        pieces.drain(..1);
        assert_eq!(held(&pieces), (false, 0), "the small one is not charged");
        drop(pieces);
        assert_eq!(turn.available_permits(), 1);
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
            let mut body = Box::pin(until_sent(Response::new(body), None, Some(memory), None).into_body());
            let frame = poll_fn(|cx| body.as_mut().poll_frame(cx)).await.expect("no end").expect("no error");
            match frame.into_trailers() {
                Ok(trailers) => break trailers,
                Err(frame) => bodies.push((body, frame)),
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
