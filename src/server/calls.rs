//! Keeps each call open, and its response charged, until the response has been sent. A call is open from the head of
//! its request until HTTP has written the body of the response, or has closed the stream. A connection without open
//! calls is idle.

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
use crate::broker::{CallMemory, SendingResponse};

/// Wraps the body of `response`, so that the call stays open and holds its resources until the body has been sent.
/// `call` is `None` for a request that arrived on no connection, as in a simulation. `memory` is the memory of a
/// client's gRPC call; calls of other brokers and HTTP requests have none. `metadata_permit` is the permit of a call
/// whose response is built from metadata.
pub(super) fn hold_until_sent(
    response: Response,
    call: Option<OpenCall>,
    memory: Option<CallMemory>,
    metadata_permit: Option<OwnedSemaphorePermit>,
) -> Response {
    let open = Arc::new(OpenResponse { memory, _call: call, _metadata_permit: metadata_permit });
    response.map(|body| Body::new(CountedBody { body, rest: Bytes::new(), open }))
}

/// Maximum bytes of a response to a client that are passed to HTTP/2 at once. HTTP/2 takes a whole piece when its
/// buffer has space for one byte, and then polls for the next piece. So these polls show how fast a client reads: at
/// the minimum rate of `broker::budget`, 256 KiB per second, there is one poll per second. Smaller pieces would reduce
/// throughput. Responses without charged memory are not split.
const PIECE_BYTES: usize = 256 << 10;

/// Returns the trailers that end a response with a status.
pub(super) fn trailers(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    // If a header cannot be written, the response ends without a status, and clients treat it as broken.
    let _ = status.add_header(&mut trailers);
    Frame::trailers(trailers)
}

/// Resources that a call holds until its response has been sent. The body and each unsent frame of the response have a
/// reference to this value.
struct OpenResponse {
    memory: Option<CallMemory>,
    _call: Option<OpenCall>,
    _metadata_permit: Option<OwnedSemaphorePermit>,
}

/// A frame of a response body, of which pieces were passed to HTTP/2. HTTP/2 drops the pieces after it has written them
/// or closed the stream. Long before that, it polls for the next frame and sees the end of the body.
struct SendingFrame {
    data: Bytes,
    _memory: Option<SendingResponse>,
    _open: Arc<OpenResponse>,
}

impl AsRef<[u8]> for SendingFrame {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

/// Body of a response that is passed to HTTP/2 in pieces, and is charged to the memory of its call.
struct CountedBody {
    body: Body,
    /// Bytes of the last frame that have not been passed on.
    rest: Bytes,
    open: Arc<OpenResponse>,
}

impl CountedBody {
    /// Splits the next piece from the rest of the last frame: at most [`PIECE_BYTES`], or all of it if the response is
    /// not charged.
    fn next_piece(&mut self) -> Frame<Bytes> {
        let max_bytes = if self.open.memory.is_some() { PIECE_BYTES } else { usize::MAX };
        Frame::data(self.rest.split_to(self.rest.len().min(max_bytes)))
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
            // The poll for this piece shows that HTTP/2 has sent data of the previous one.
            if let Some(memory) = &self.open.memory {
                memory.on_piece_taken();
            }
            return Poll::Ready(Some(Ok(self.next_piece())));
        }
        let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)?) else { return Poll::Ready(None) };
        Poll::Ready(Some(Ok(match frame.into_data() {
            Ok(data) => match self.open.memory.as_ref().map(|memory| memory.begin_sending(data.len())).transpose() {
                Ok(charge) => {
                    let frame = SendingFrame { data, _memory: charge, _open: Arc::clone(&self.open) };
                    self.rest = Bytes::from_owner(frame);
                    self.next_piece()
                }
                // There is no memory for this frame, so the response ends with the error.
                Err(error) => {
                    self.body = Body::empty();
                    trailers(&error.into())
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
        proto::error::{ApiError, ErrorCode},
    };

    /// Regression: the memory of responses was freed before the client had read them. HTTP/2 polled for the next frame,
    /// and saw the end of the body, after one byte of the last frame had been sent.
    #[tokio::test]
    async fn response_is_charged_until_last_piece_is_sent() {
        let budgets = Budgets::new(8 << 20, 8 << 20);
        let memory = CallMemory::new(budgets.clone(), budgets.open_connection(|| {}));
        let frames = [3 * PIECE_BYTES - 1, 10].map(|bytes| Ok::<_, axum::Error>(Bytes::from(vec![7; bytes])));
        let body = Body::from_stream(futures::stream::iter(frames));
        memory.reserve_more(100_000).expect("the memory is available");
        let permits = Arc::new(Semaphore::new(1));
        let permit = Arc::clone(&permits).try_acquire_owned().ok();
        let mut body = Box::pin(hold_until_sent(Response::new(body), None, Some(memory), permit).into_body());
        let mut pieces = Vec::new();
        for bytes in [PIECE_BYTES, PIECE_BYTES, PIECE_BYTES - 1, 10] {
            let piece = poll_fn(|cx| body.as_mut().poll_frame(cx)).await.expect("no end").expect("no error");
            pieces.push(piece.into_data().expect("data"));
            assert_eq!(pieces.last().map(Bytes::len), Some(bytes));
            assert!(!body.is_end_stream());
        }
        assert!(poll_fn(|cx| body.as_mut().poll_frame(cx)).await.is_none());
        drop(body);
        let charged_and_permits = |_: &[Bytes]| (budgets.taken().1 > 0, permits.available_permits());
        assert_eq!(charged_and_permits(&pieces), (true, 0), "HTTP/2 holds the pieces");
        pieces.drain(..2);
        assert_eq!(charged_and_permits(&pieces), (true, 0), "one piece of the large frame is left");
        pieces.drain(..1);
        assert_eq!(charged_and_permits(&pieces), (false, 0), "the small frame is not charged");
        drop(pieces);
        assert_eq!(permits.available_permits(), 1);
    }

    /// Regression: responses without records were not charged, so each of a thousand connections could hold sixteen of
    /// them.
    #[tokio::test]
    async fn response_without_records_is_charged_or_rejected() {
        let budgets = Budgets::new(1 << 20, 1 << 20);
        let connection = budgets.open_connection(|| {});
        let mut bodies = Vec::new();
        let refused = loop {
            let memory = CallMemory::new(budgets.clone(), connection.clone());
            let body = Body::from(vec![7; 50_000]);
            let mut body = Box::pin(hold_until_sent(Response::new(body), None, Some(memory), None).into_body());
            let frame = poll_fn(|cx| body.as_mut().poll_frame(cx)).await.expect("no end").expect("no error");
            match frame.into_trailers() {
                Ok(trailers) => break trailers,
                Err(frame) => bodies.push((body, frame)),
            }
        };
        let error = ApiError::from(&Status::from_header_map(&refused).expect("a status"));
        assert_eq!((error.code, error.retryable), (ErrorCode::Overloaded, true));
        assert!(error.message.contains("limits.response_memory_bytes"), "{error}");
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
