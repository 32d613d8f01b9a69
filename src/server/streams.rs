//! Client calls that are streams of messages: `Produce` and `Fetch`. Each message has its own buffer, which is freed
//! with the message.
//!
//! tonic keeps a buffer per direction for as long as a call is open, as large as the largest message of the call. With
//! those buffers, an idle consumer would hold its last response, and an idle producer its largest request. But the
//! budgets count that memory as free.

use std::{
    convert::Infallible,
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    Router,
    body::{Body, BodyDataStream, Bytes, HttpBody},
    extract::Request,
    http::{HeaderValue, header::CONTENT_TYPE},
    response::Response,
    routing,
};
use bytes::{Buf as _, BufMut, BytesMut};
use futures::{Stream, StreamExt as _, stream};
use http_body::Frame;
use prost::Message;
use tonic::{Code, Status, metadata::MetadataMap};

use super::{
    calls,
    request_body::{FETCH_PATH, PREFIX_BYTES, PRODUCE_PATH},
};
use crate::broker::{LogService, Requests};

/// Size in bytes from which no further response is added to a frame. Responses that are ready together share a frame.
const FRAME_BYTES: usize = 32 << 10;

/// Returns the routes of `Produce` and `Fetch`.
pub(super) fn routes(log: &LogService) -> Router {
    let (produce_service, fetch_service) = (log.clone(), log.clone());
    Router::new()
        .route(
            PRODUCE_PATH,
            routing::post(async move |request| serve(request, |requests| produce_service.serve_produce(requests))),
        )
        .route(
            FETCH_PATH,
            routing::post(async move |request| serve(request, |requests| fetch_service.serve_fetch(requests))),
        )
}

/// Serves a call: passes the messages of the request to `call`, and returns a response with the messages from `call`.
fn serve<T, U, S>(request: Request, call: impl FnOnce(tonic::Request<Requests<T>>) -> S) -> Response
where
    T: Message + Default + 'static,
    U: Message + 'static,
    S: Stream<Item = Result<U, Status>> + Send + 'static,
{
    let (head, body) = request.into_parts();
    if let Some(encoding) = head.headers.get("grpc-encoding").filter(|encoding| *encoding != "identity") {
        return compressed_error(format_args!("grpc-encoding is {encoding:?}")).into_http();
    }
    let requests = tonic::Request::from_parts(MetadataMap::new(), head.extensions, requests(body));
    let body = ResponseBody { responses: Box::pin(call(requests)), end: None, is_over: false };
    let mut response = Response::new(Body::new(body));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// Returns the messages of a body as a stream.
fn requests<T: Message + Default + 'static>(body: Body) -> Requests<T> {
    let reader = MessageReader { frames: body.into_data_stream(), rest: Bytes::new() };
    stream::try_unfold(reader, async |mut reader| Ok(reader.next().await?.map(|message| (message, reader)))).boxed()
}

/// Reads the messages of a body in order.
struct MessageReader {
    frames: BodyDataStream,
    /// Unread rest of the last frame.
    rest: Bytes,
}

impl MessageReader {
    /// Returns the next message; `None` at the end, or after the client has reset the call.
    async fn next<T: Message + Default>(&mut self) -> Result<Option<T>, Status> {
        match self.read_message().await {
            Err(status) if status.code() == Code::Cancelled => Ok(None),
            message => message,
        }
    }

    /// Reads one message: the prefix, and then as many bytes as the prefix announces. Returns `None` if the body ends
    /// before the prefix.
    async fn read_message<T: Message + Default>(&mut self) -> Result<Option<T>, Status> {
        if self.rest.is_empty() && !self.read_frame().await? {
            return Ok(None);
        }
        let mut prefix = [0; PREFIX_BYTES];
        self.read(&mut prefix[..]).await?;
        match prefix[0] {
            0 => {}
            1 => return Err(compressed_error("the compressed flag of a message is set")),
            flag => {
                return Err(Status::internal(format!("the compressed flag of a message is {flag} instead of 0 or 1")));
            }
        }
        // `request_body` has taken memory for the message, and has received the beginning of a large one, so this
        // length may be allocated.
        let len = (&prefix[1..]).get_u32() as usize;
        let mut message = BytesMut::with_capacity(len);
        self.read((&mut message).limit(len)).await?;
        T::decode(message.freeze()).map(Some).map_err(|error| Status::internal(error.to_string()))
    }

    /// Reads until `buffer` is full. Fails if the body ends earlier.
    async fn read(&mut self, mut buffer: impl BufMut) -> Result<(), Status> {
        while buffer.has_remaining_mut() {
            if self.rest.is_empty() && !self.read_frame().await? {
                return Err(Status::internal("the body ends within a message"));
            }
            buffer.put(self.rest.split_to(self.rest.len().min(buffer.remaining_mut())));
        }
        Ok(())
    }

    /// Reads the next frame that contains bytes into `rest`. Returns false at the end of the body.
    async fn read_frame(&mut self) -> Result<bool, Status> {
        while self.rest.is_empty() {
            match self.frames.next().await {
                Some(Ok(data)) => self.rest = data,
                Some(Err(error)) => return Err(Status::from_error(error.into_inner())),
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// Returns the error for a compressed message. Requests of these streams are never decompressed.
fn compressed_error(reason: impl fmt::Display) -> Status {
    Status::unimplemented(format!("messages are compressed: {reason}"))
}

/// Body of a response: one message per item of a stream, then the trailers.
struct ResponseBody<S> {
    responses: Pin<Box<S>>,
    /// Status that ends the response, set once the stream of messages has ended. The trailers follow the last message.
    end: Option<Status>,
    /// True once the trailers were passed on.
    is_over: bool,
}

impl<U: Message, S: Stream<Item = Result<U, Status>>> HttpBody for ResponseBody<S> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        // A frame takes all responses that are ready, up to `FRAME_BYTES`.
        let mut frame = BytesMut::new();
        while self.end.is_none() && frame.len() < FRAME_BYTES {
            match self.responses.as_mut().poll_next(cx) {
                Poll::Ready(Some(Ok(response))) => put_message(&response, &mut frame),
                Poll::Ready(Some(Err(status))) => self.end = Some(status),
                Poll::Ready(None) => self.end = Some(Status::ok("")),
                Poll::Pending if frame.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        if !frame.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(frame.freeze()))));
        }
        if std::mem::replace(&mut self.is_over, true) {
            return Poll::Ready(None);
        }
        Poll::Ready(self.end.as_ref().map(|end| Ok(calls::trailers(end))))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over
    }
}

/// Appends a message with its prefix, uncompressed.
fn put_message(message: &impl Message, out: &mut BytesMut) {
    let len = message.encoded_len();
    out.reserve(PREFIX_BYTES + len);
    out.put_u8(0);
    out.put_u32(u32::try_from(len).expect("a response is smaller than 4 GiB"));
    message.encode_raw(out);
}

#[cfg(test)]
mod tests;
