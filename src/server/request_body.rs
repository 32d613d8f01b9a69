//! The body of a request on its way to the codec. Memory is taken for each message before the message is read. The size
//! of a message and the number of its parts (elements of repeated fields) are limited. Its bytes are passed on
//! unchanged.
//!
//! ```text
//! HTTP/2 ─► length ─► too large? ─► take memory ─► frames as they arrive, parts counted ─► take memory for parts ─► last frame ─► codec
//!                                        └ none free: nothing is read, the window stops the sender ┘
//! ```
//!
//! The codec allocates space for a message when it reads the length. The length of a large message is passed on after
//! more than [`SMALL_BYTES`] of the message have arrived. So a length without its bytes allocates nothing. The codec
//! builds structs of the parts after the last byte, so their memory is taken before that byte is passed on. Messages
//! are passed on one at a time, so that each memory grant belongs to the message that the handler has.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    BoxError,
    body::{Body, Bytes, HttpBody},
};
use bytes::{Buf as _, BytesMut};
use http_body::Frame;
use tokio::time::Instant;
use tonic::Status;

use crate::{
    broker::{CallMemory, Grant, IncompleteGuard, SMALL_BYTES, WAITING_BYTES},
    limits,
    proto::{
        error::{ApiError, ErrorCode},
        parts::{PartCounter, RequestSchemas},
    },
    task::clock,
};

/// Delay before a request is rejected because too many requests wait. Clients that retry at once then cause little
/// work.
const REFUSAL_DELAY: Duration = Duration::from_secs(1);

/// Size of the prefix of each message, in bytes: the compression flag and the length.
pub(super) const PREFIX_BYTES: usize = 5;

/// Maximum size of a request for health or reflection, in bytes.
const MAX_NAMES_BYTES: usize = 4 << 10;

pub(super) const PRODUCE_PATH: &str = "/strandline.v1.Log/Produce";
pub(super) const FETCH_PATH: &str = "/strandline.v1.Log/Fetch";

/// Calls whose requests contain records.
const RECORD_CALLS: [&str; 2] = ["/strandline.v1.Log/Append", PRODUCE_PATH];

/// Beginnings of the paths of calls whose requests are streams of messages.
const STREAM_PATHS: [&str; 3] = [PRODUCE_PATH, FETCH_PATH, "/grpc.reflection."];

/// Returns true if the request of a call at `path` is a stream of messages.
pub(super) fn is_stream(path: &str) -> bool {
    STREAM_PATHS.iter().any(|stream| path.starts_with(stream))
}

type GrantFuture = Pin<Box<dyn Future<Output = Result<Grant, ApiError>> + Send>>;

/// Body of a request that takes memory for each message before it reads the message.
pub(super) struct RequestBody {
    inner: Body,
    memory: CallMemory,
    /// Maximum size of one message, in bytes.
    max_bytes: usize,
    /// True if the body is a stream of messages, and false if it is one message.
    is_stream: bool,
    /// Counter of the parts of a message; `None` for a call whose requests are not counted.
    counter: Option<PartCounter>,
    /// Received bytes that have not been processed.
    rest: Bytes,
    /// True if `rest` is a part of a frame above [`WAITING_BYTES`].
    is_large_frame: bool,
    /// Memory of the received bytes after the current message. The handler of a stream may leave these bytes unread for
    /// a long time.
    ahead: Option<Grant>,
    message: Option<Message>,
    /// Processed bytes to be passed on.
    out: VecDeque<Bytes>,
    /// True once the only message of a unary call has arrived. Bytes after that message are ignored.
    is_over: bool,
    /// True once an error was passed on. The body then ends.
    failed: bool,
}

/// The message that is being read.
struct Message {
    /// Length from the prefix.
    bytes: usize,
    /// Number of bytes that have not been processed, including those of the prefix.
    remaining: usize,
    state: State,
    /// Processed bytes that have not been passed on.
    buffered: BytesMut,
    /// Memory of the message, or only of its beginning. `None` while the message waits for memory of its beginning.
    grant: Option<Grant>,
    /// Memory of the bytes that have arrived while the message has no memory of its own.
    waiting: Option<Grant>,
    /// Number of parts that have arrived.
    parts: usize,
    /// Time when the message got its current memory.
    since: Instant,
    /// Registration as incomplete, while the message waits for its sender. If other requests need its memory, the
    /// message is rejected.
    incomplete: Option<IncompleteGuard>,
}

enum State {
    /// The message waits for memory: for its beginning, or for all of it.
    Waiting(GrantFuture),
    /// The message has memory for its beginning of [`SMALL_BYTES`]. Its bytes are not passed on until the beginning has
    /// arrived.
    Beginning,
    /// The message has memory for all of it.
    Admitted,
    /// The message has arrived and waits for memory for its parts. Its last bytes are not passed on yet.
    WaitingForParts(GrantFuture),
}

impl State {
    /// Returns the state of a rejected message: it waits for [`REFUSAL_DELAY`], and then fails with `error`.
    fn refused(error: ApiError) -> Self {
        Self::Waiting(Box::pin(async {
            tokio::time::sleep(REFUSAL_DELAY).await;
            Err(error)
        }))
    }
}

impl Message {
    fn new(bytes: usize, state: State) -> Self {
        Self {
            bytes,
            remaining: PREFIX_BYTES + bytes,
            state,
            buffered: BytesMut::new(),
            grant: None,
            waiting: None,
            parts: 0,
            since: clock::monotonic(),
            incomplete: None,
        }
    }

    /// Returns the number of bytes for which an incomplete message has memory: all of them, or its beginning.
    fn charged(&self) -> usize {
        if matches!(self.state, State::Admitted) { self.bytes } else { self.bytes.min(SMALL_BYTES) }
    }
}

impl RequestBody {
    /// Creates the body of a call at `path`.
    pub(super) fn new(inner: Body, path: &str, memory: CallMemory, schemas: &RequestSchemas) -> Self {
        let max_bytes = match path {
            _ if RECORD_CALLS.contains(&path) => limits::MAX_MESSAGE_BYTES,
            // Requests for health and reflection contain only names. A response of reflection contains its request.
            _ if path.starts_with("/grpc.") => MAX_NAMES_BYTES,
            _ => limits::MAX_REQUEST_BYTES,
        };
        let counter = schemas.counter(path);
        Self {
            inner,
            memory,
            max_bytes,
            is_stream: is_stream(path),
            counter,
            rest: Bytes::new(),
            is_large_frame: false,
            ahead: None,
            message: None,
            out: VecDeque::new(),
            is_over: false,
            failed: false,
        }
    }

    /// Begins the next message, whose prefix has arrived. Takes memory for its beginning, or lets the message wait.
    /// Fails only if the message is too large; any other rejection is a state of the message.
    fn begin(&mut self) -> Result<(), ApiError> {
        let bytes = (&self.rest[1..PREFIX_BYTES]).get_u32() as usize;
        if bytes > self.max_bytes {
            return Err(too_large(bytes, self.max_bytes));
        }
        if let Some(counter) = &mut self.counter {
            counter.reset();
        }
        if let Err(error) = self.charge_ahead(self.rest.len().saturating_sub(PREFIX_BYTES + bytes)) {
            self.refuse(error);
            return Ok(());
        }
        let is_small_and_complete = bytes <= SMALL_BYTES && self.rest.len() >= PREFIX_BYTES + bytes;
        let grant = if is_small_and_complete {
            self.memory.try_complete_request(bytes)
        } else {
            self.memory.try_request(bytes.min(SMALL_BYTES))
        };
        let mut waiting = None;
        let state = match grant {
            None => {
                let granted = self.memory.clone().request(bytes.min(SMALL_BYTES));
                match self.hold_rest() {
                    Ok(grant) => {
                        waiting = grant;
                        State::Waiting(Box::pin(granted))
                    }
                    Err(error) => State::refused(error),
                }
            }
            Some(_) if bytes > SMALL_BYTES => State::Beginning,
            Some(_) => State::Admitted,
        };
        self.message = Some(Message { grant, waiting, ..Message::new(bytes, state) });
        Ok(())
    }

    /// Stores a received frame in `rest`, and charges the bytes of the frame after the current message.
    fn take_frame(&mut self, data: Bytes) {
        self.is_large_frame = data.len() > WAITING_BYTES;
        (self.rest, self.ahead) = (data, None);
        if let Some(message) = &self.message
            && let Err(error) = self.charge_ahead(self.rest.len().saturating_sub(message.remaining))
        {
            self.refuse(error);
        }
    }

    /// Rejects the current message after a delay. The received bytes are dropped at once.
    fn refuse(&mut self, error: ApiError) {
        (self.rest, self.ahead, self.out) = (Bytes::new(), None, VecDeque::new());
        self.message = Some(Message::new(0, State::refused(error)));
    }

    /// Takes memory for `bytes` received bytes after the current message, or frees the part of that memory that is no
    /// longer needed. Fails if other waiting requests hold too much memory.
    fn charge_ahead(&mut self, bytes: usize) -> Result<(), ApiError> {
        match &mut self.ahead {
            Some(grant) if bytes > WAITING_BYTES => grant.shrink(bytes),
            Some(_) => self.ahead = None,
            None if bytes > WAITING_BYTES => {
                let grant = self.memory.try_request(bytes);
                self.ahead = Some(grant.map_or_else(|| self.memory.try_waiting(bytes), Ok)?);
            }
            None => {}
        }
        Ok(())
    }

    /// Keeps the received bytes of a message that must wait for memory, and returns the memory of these bytes. Returns
    /// `None` for few bytes, which are not charged. Drops the bytes and fails if other waiting requests hold too much.
    fn hold_rest(&mut self) -> Result<Option<Grant>, ApiError> {
        if self.rest.len() <= WAITING_BYTES {
            // The bytes may be a slice, which would keep a larger buffer in memory.
            self.rest = Bytes::copy_from_slice(&self.rest);
            return Ok(None);
        }
        self.memory.try_waiting(self.rest.len()).map(Some).inspect_err(|_| self.rest = Bytes::new())
    }

    /// Processes the received bytes of the message, as far as there is memory for them. Counts the elements of repeated
    /// fields that start in these bytes, and takes memory. Moves the bytes to `out`, or to the message's buffer while
    /// the message must not be passed on yet. Pending while the message waits for memory. Fails if the message is
    /// rejected.
    fn process_message(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ApiError>> {
        let Some(message) = &mut self.message else { return Poll::Ready(Ok(())) };
        if let State::WaitingForParts(waiting) = &mut message.state {
            let parts = ready!(waiting.as_mut().poll(cx))?;
            self.finish(Some(parts));
            return Poll::Ready(Ok(()));
        }
        if let State::Waiting(waiting) = &mut message.state {
            let Poll::Ready(granted) = waiting.as_mut().poll(cx) else {
                // While a message waits for all of its memory, it fails if other requests need the memory that it has.
                if message.grant.is_some() {
                    check_incomplete(&self.memory, message, cx)?;
                }
                return Poll::Pending;
            };
            let is_for_beginning = message.grant.replace(granted?).is_none();
            message.waiting = None;
            message.state =
                if is_for_beginning && message.bytes > SMALL_BYTES { State::Beginning } else { State::Admitted };
            (message.since, message.incomplete) = (clock::monotonic(), None);
        }
        // The message has memory for at least its beginning.
        let piece = self.rest.split_to(message.remaining.min(self.rest.len()));
        if !piece.is_empty() {
            let processed = PREFIX_BYTES + message.bytes - message.remaining;
            let prefix_bytes = PREFIX_BYTES.saturating_sub(processed).min(piece.len());
            message.remaining -= piece.len();
            if let Some(counter) = &mut self.counter {
                message.parts += counter.count(&piece[prefix_bytes..]);
                if message.parts > limits::MAX_REQUEST_PARTS {
                    return Poll::Ready(Err(too_many_parts(message.parts)));
                }
            }
            if matches!(message.state, State::Admitted) {
                self.out.push_back(piece);
            } else if message.buffered.is_empty() && piece.len() > SMALL_BYTES {
                // The whole beginning arrived in one piece.
                self.out.push_back(piece);
            } else {
                message.buffered.extend_from_slice(&piece);
            }
        }
        let beginning_arrived = self.out.back().map_or(message.buffered.len(), Bytes::len) > SMALL_BYTES;
        // The sender of a large message has sent its beginning, so the message gets memory for all of it.
        if matches!(message.state, State::Beginning) && beginning_arrived {
            match self.memory.try_request(message.bytes) {
                Some(grant) => {
                    message.grant = Some(grant);
                    message.state = State::Admitted;
                    (message.since, message.incomplete) = (clock::monotonic(), None);
                }
                None => message.state = State::Waiting(Box::pin(self.memory.clone().request(message.bytes))),
            }
        }
        if matches!(message.state, State::Admitted) && !message.buffered.is_empty() {
            self.out.push_front(message.buffered.split().freeze());
        }
        // The codec builds the parts after the last byte, so the last byte is passed on only after `finish`.
        if message.remaining == 0 && matches!(message.state, State::Admitted) {
            let parts = message.parts;
            let granted = if parts == 0 { None } else { self.memory.try_parts(parts) };
            if parts > 0 && granted.is_none() {
                message.state = State::WaitingForParts(Box::pin(self.memory.clone().parts(parts)));
            } else {
                self.finish(granted);
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Completes the message, which has arrived and has memory for everything that is built from it.
    fn finish(&mut self, parts: Option<Grant>) {
        let message = self.message.take().expect("a message is being read");
        self.memory.deliver(message.bytes, message.grant.into_iter().chain(parts));
        if !self.is_stream {
            // A unary handler starts at the end of the body. The client may never send that end, and the message would
            // hold its memory until then, so the body ends here.
            (self.is_over, self.rest, self.ahead) = (true, Bytes::new(), None);
            return;
        }
        if self.is_large_frame && self.rest.len() <= WAITING_BYTES {
            // A slice would keep the whole frame in memory.
            self.rest = Bytes::copy_from_slice(&self.rest);
            (self.ahead, self.is_large_frame) = (None, false);
        }
    }

    /// Reads and processes frames until there are bytes to pass on, and returns these bytes; `None` at the end of the
    /// body.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            let is_admitted = self.message.as_ref().is_none_or(|message| matches!(message.state, State::Admitted));
            if is_admitted && let Some(piece) = self.out.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            if self.is_over {
                return Poll::Ready(None);
            }
            if self.is_stream && self.message.is_none() {
                // The handler of a stream polls for more after it has received the previous message. It has taken the
                // memory of that message, or does not need it.
                drop(self.memory.take_request());
            }
            if self.message.is_none() && self.rest.len() >= PREFIX_BYTES {
                self.begin().map_err(status)?;
            }
            let is_waiting = self
                .message
                .as_ref()
                .is_some_and(|message| matches!(message.state, State::Waiting(_) | State::WaitingForParts(_)));
            if is_waiting || self.message.is_some() && !self.rest.is_empty() {
                ready!(self.process_message(cx)).map_err(status)?;
                continue;
            }
            let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) else {
                if let Some(message) = &mut self.message {
                    check_incomplete(&self.memory, message, cx).map_err(status)?;
                }
                return Poll::Pending;
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    // The prefix of a message is split between two frames.
                    Ok(data) if !self.rest.is_empty() => self.rest = [&self.rest[..], &data].concat().into(),
                    Ok(data) => self.take_frame(data),
                    // No call uses request trailers, and the codec would keep them for as long as the call is open.
                    Err(_trailers) => return Poll::Ready(None),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                // The body ends within a message. The received bytes are passed on, and the codec rejects the
                // incomplete message.
                None if !self.rest.is_empty() => {
                    return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.rest)))));
                }
                None => match self.message.take() {
                    Some(mut message) if !message.buffered.is_empty() => {
                        return Poll::Ready(Some(Ok(Frame::data(message.buffered.split().freeze()))));
                    }
                    _ => return Poll::Ready(None),
                },
            }
        }
    }
}

/// Checks a message that has memory and is not complete. Fails if other requests wait for this memory and the message
/// has had it for too long. Otherwise the task is woken when that becomes true.
fn check_incomplete(memory: &CallMemory, message: &mut Message, cx: &Context<'_>) -> Result<(), ApiError> {
    let (charged, since) = (message.charged(), message.since);
    message.incomplete.get_or_insert_with(|| memory.register_incomplete(charged, since)).check(cx.waker())
}

fn too_large(bytes: usize, max: usize) -> ApiError {
    let message =
        format!("the request has {bytes} bytes, and the maximum for this call is {max}: send smaller requests");
    ApiError::new(ErrorCode::RequestTooLarge, message).with("bytes", bytes).with("max", max)
}

fn too_many_parts(count: usize) -> ApiError {
    let max = limits::MAX_REQUEST_PARTS;
    let message = format!(
        "the request has {count} parts or more (records, headers, partitions, names), and the maximum is {max}: send \
         several requests"
    );
    ApiError::new(ErrorCode::InvalidRequest, message).with("max", max)
}

fn status(error: ApiError) -> BoxError {
    Status::from(error).into()
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        if self.failed {
            return Poll::Ready(None);
        }
        let frame = ready!(self.poll_next(cx));
        if matches!(frame, Some(Err(_))) {
            // All memory is freed at once.
            self.failed = true;
            (self.message, self.rest, self.ahead, self.out) = (None, Bytes::new(), None, VecDeque::new());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.failed
            || self.is_over && self.out.is_empty()
            || self.message.is_none() && self.rest.is_empty() && self.out.is_empty() && self.inner.is_end_stream()
    }
}

#[cfg(test)]
mod tests;
