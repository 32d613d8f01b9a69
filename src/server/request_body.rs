//! The body of a request on its way to the codec: memory is taken for each message before it is read, its size and parts are bounded, and
//! it is passed on unchanged.
//!
//! ```text
//! HTTP/2 ─► length ─► too large? ─► take memory ─► frames as they come, parts counted ─► take memory for parts ─► last frame ─► codec
//!                                        └ none free: nothing is read, the window stops the sender ┘
//! ```
//!
//! The codec makes room for a message when it sees its length. It sees the length of a large one when [`SMALL_BYTES`] of it are there, so
//! a length alone costs nothing. It makes structs of the parts when the last byte is there, so their memory is taken before that passes. One message at a time is passed on, so the handler knows which memory belongs to what it was given.

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
        fault::{Fault, Reason},
        parts::{PartCounter, RequestSchemas},
    },
    task::clock,
};

/// How long a request is held before it is refused because too many wait: a client that sends it again at once costs little then.
const REFUSAL_DELAY: Duration = Duration::from_secs(1);

/// Bytes before each message: whether it is compressed, and its length.
pub(super) const PREFIX_BYTES: usize = 5;

/// Most bytes of a request for health or reflection.
const MAX_NAMES_BYTES: usize = 4 << 10;

pub(super) const PRODUCE_PATH: &str = "/strandline.v1.Log/Produce";
pub(super) const FETCH_PATH: &str = "/strandline.v1.Log/Fetch";

/// Calls whose requests hold records.
const RECORD_CALLS: [&str; 2] = ["/strandline.v1.Log/Append", PRODUCE_PATH];

/// Calls and services whose requests are streams of messages.
const STREAM_PATHS: [&str; 3] = [PRODUCE_PATH, FETCH_PATH, "/grpc.reflection."];

/// True if a call at `path` sends one message after the other.
pub(super) fn is_stream(path: &str) -> bool {
    STREAM_PATHS.iter().any(|stream| path.starts_with(stream))
}

type Waiting = Pin<Box<dyn Future<Output = Result<Grant, Fault>> + Send>>;

/// A body that takes memory before it reads.
pub(super) struct RequestBody {
    inner: Body,
    memory: CallMemory,
    max_bytes: usize,
    is_stream: bool,
    counter: Option<PartCounter>,
    /// Came, and was not looked at.
    rest: Bytes,
    /// It is a part of a frame above [`WAITING_BYTES`].
    is_large_frame: bool,
    /// For what came behind the message that is read: the handler of a stream may take nothing of it for long.
    ahead: Option<Grant>,
    message: Option<Message>,
    /// To be passed on.
    out: VecDeque<Bytes>,
    /// The one message of a call that is no stream is there: what comes behind it is nobody's.
    is_over: bool,
    failed: bool,
}

/// The message that is being read.
struct Message {
    bytes: usize,
    /// Bytes that have not come, with those of the prefix.
    left: usize,
    state: State,
    /// What of it came and was not passed on.
    held: BytesMut,
    grant: Option<Grant>,
    /// For what came before it had memory.
    waiting: Option<Grant>,
    parts: usize,
    /// Since when it has the memory that it has.
    since: Instant,
    incomplete: Option<IncompleteGuard>,
}

enum State {
    /// Waits for memory: for its beginning, or for all of it.
    Waiting(Waiting),
    /// Has memory for its beginning, and is held until that is there.
    Beginning,
    /// Has memory for all of it.
    Admitted,
    /// Is there, and waits for memory for its parts: its last bytes are held.
    WaitingForParts(Waiting),
}

impl State {
    /// Waits before it is refused.
    fn refused(fault: Fault) -> Self {
        Self::Waiting(Box::pin(async {
            tokio::time::sleep(REFUSAL_DELAY).await;
            Err(fault)
        }))
    }
}

impl Message {
    fn new(bytes: usize, state: State) -> Self {
        Self {
            bytes,
            left: PREFIX_BYTES + bytes,
            state,
            held: BytesMut::new(),
            grant: None,
            waiting: None,
            parts: 0,
            since: clock::monotonic(),
            incomplete: None,
        }
    }

    /// Bytes for which it has memory.
    fn charged(&self) -> usize {
        if matches!(self.state, State::Admitted) { self.bytes } else { self.bytes.min(SMALL_BYTES) }
    }
}

impl RequestBody {
    /// The body of a call at `path`.
    pub(super) fn new(inner: Body, path: &str, memory: CallMemory, schemas: &RequestSchemas) -> Self {
        let max_bytes = match path {
            _ if RECORD_CALLS.contains(&path) => limits::MAX_MESSAGE_BYTES,
            // Names alone. Reflection's answers hold its requests.
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

    /// Begins the next message, whose prefix is there.
    fn begin(&mut self) -> Result<(), Fault> {
        let bytes = (&self.rest[1..PREFIX_BYTES]).get_u32() as usize;
        if bytes > self.max_bytes {
            return Err(too_large(bytes, self.max_bytes));
        }
        if let Some(counter) = &mut self.counter {
            counter.begin();
        }
        if let Err(fault) = self.charge_ahead(self.rest.len().saturating_sub(PREFIX_BYTES + bytes)) {
            self.refuse(fault);
            return Ok(());
        }
        let is_whole = bytes <= SMALL_BYTES && self.rest.len() >= PREFIX_BYTES + bytes;
        let grant = if is_whole {
            self.memory.try_whole_request(bytes)
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
                    Err(fault) => State::refused(fault),
                }
            }
            Some(_) if bytes > SMALL_BYTES => State::Beginning,
            Some(_) => State::Admitted,
        };
        self.message = Some(Message { grant, waiting, ..Message::new(bytes, state) });
        Ok(())
    }

    /// Takes a frame, of which a part may be of messages behind the one that is read.
    fn take_frame(&mut self, data: Bytes) {
        self.is_large_frame = data.len() > WAITING_BYTES;
        (self.rest, self.ahead) = (data, None);
        if let Some(message) = &self.message
            && let Err(fault) = self.charge_ahead(self.rest.len().saturating_sub(message.left))
        {
            self.refuse(fault);
        }
    }

    /// Refuses the message that is read, after a while. What came is dropped at once.
    fn refuse(&mut self, fault: Fault) {
        (self.rest, self.ahead, self.out) = (Bytes::new(), None, VecDeque::new());
        self.message = Some(Message::new(0, State::refused(fault)));
    }

    /// Takes memory for bytes that came behind a message, or gives back the part that they no longer need.
    fn charge_ahead(&mut self, bytes: usize) -> Result<(), Fault> {
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

    /// Keeps what came of a message that is to wait for memory, or drops it where others that wait hold too much.
    fn hold_rest(&mut self) -> Result<Option<Grant>, Fault> {
        if self.rest.len() <= WAITING_BYTES {
            // It may be a part of a larger buffer.
            self.rest = Bytes::copy_from_slice(&self.rest);
            return Ok(None);
        }
        self.memory.try_waiting(self.rest.len()).map(Some).inspect_err(|_| self.rest = Bytes::new())
    }

    /// Takes what came of the message, as far as there is memory for it.
    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        let Some(message) = &mut self.message else { return Poll::Ready(Ok(())) };
        if let State::WaitingForParts(waiting) = &mut message.state {
            let parts = ready!(waiting.as_mut().poll(cx))?;
            self.finish(Some(parts));
            return Poll::Ready(Ok(()));
        }
        if let State::Waiting(waiting) = &mut message.state {
            let Poll::Ready(granted) = waiting.as_mut().poll(cx) else {
                // While it waits for all of its memory, it gives way to those that need what it has.
                if message.grant.is_some() {
                    note_incomplete(&self.memory, message, cx)?;
                }
                return Poll::Pending;
            };
            let first = message.grant.replace(granted?).is_none();
            message.waiting = None;
            message.state = if first && message.bytes > SMALL_BYTES { State::Beginning } else { State::Admitted };
            (message.since, message.incomplete) = (clock::monotonic(), None);
        }
        let piece = self.rest.split_to(message.left.min(self.rest.len()));
        if !piece.is_empty() {
            let prefix = PREFIX_BYTES.saturating_sub(PREFIX_BYTES + message.bytes - message.left);
            message.left -= piece.len();
            if let Some(counter) = &mut self.counter {
                message.parts += counter.count(&piece[prefix.min(piece.len())..]);
                if message.parts > limits::MAX_REQUEST_PARTS {
                    return Poll::Ready(Err(too_many_parts(message.parts)));
                }
            }
            if matches!(message.state, State::Admitted) {
                self.out.push_back(piece);
            } else if message.held.is_empty() && piece.len() > SMALL_BYTES {
                // All that is wanted of its beginning came at once.
                self.out.push_back(piece);
            } else {
                message.held.extend_from_slice(&piece);
            }
        }
        let begun = self.out.back().map_or(message.held.len(), Bytes::len) > SMALL_BYTES;
        if matches!(message.state, State::Beginning) && begun {
            match self.memory.try_request(message.bytes) {
                Some(grant) => {
                    message.grant = Some(grant);
                    message.state = State::Admitted;
                    (message.since, message.incomplete) = (clock::monotonic(), None);
                }
                None => message.state = State::Waiting(Box::pin(self.memory.clone().request(message.bytes))),
            }
        }
        if matches!(message.state, State::Admitted) && !message.held.is_empty() {
            self.out.push_front(message.held.split().freeze());
        }
        if message.left == 0 && matches!(message.state, State::Admitted) {
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

    /// The message is there, with memory for all that is made of it.
    fn finish(&mut self, parts: Option<Grant>) {
        let message = self.message.take().expect("it is being read");
        self.memory.deliver(message.bytes, message.grant.into_iter().chain(parts));
        if !self.is_stream {
            // The handler would begin at the end of the body, which may never come, and hold what the message took until then.
            (self.is_over, self.rest, self.ahead) = (true, Bytes::new(), None);
            return;
        }
        if self.is_large_frame && self.rest.len() <= WAITING_BYTES {
            // It would hold all of the frame.
            self.rest = Bytes::copy_from_slice(&self.rest);
            (self.ahead, self.is_large_frame) = (None, false);
        }
    }

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
                // More is asked for by a handler that has the last message: it took the memory, or does not need it.
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
                ready!(self.advance(cx)).map_err(status)?;
                continue;
            }
            let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) else {
                if let Some(message) = &mut self.message {
                    note_incomplete(&self.memory, message, cx).map_err(status)?;
                }
                return Poll::Pending;
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    // A prefix in two frames.
                    Ok(data) if !self.rest.is_empty() => self.rest = [&self.rest[..], &data].concat().into(),
                    Ok(data) => self.take_frame(data),
                    // No call has any, and the codec would keep them for as long as the call is open.
                    Err(_trailers) => return Poll::Ready(None),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                // What is not whole is the codec's to refuse.
                None if !self.rest.is_empty() => {
                    return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.rest)))));
                }
                None => match self.message.take() {
                    Some(mut message) if !message.held.is_empty() => {
                        return Poll::Ready(Some(Ok(Frame::data(message.held.split().freeze()))));
                    }
                    _ => return Poll::Ready(None),
                },
            }
        }
    }
}

fn note_incomplete(memory: &CallMemory, message: &mut Message, cx: &Context<'_>) -> Result<(), Fault> {
    let (charged, since) = (message.charged(), message.since);
    message.incomplete.get_or_insert_with(|| memory.incomplete(charged, since)).check(cx.waker())
}

fn too_large(bytes: usize, most: usize) -> Fault {
    let message = format!(
        "the request has {bytes} bytes, and {most} is the most that a request of this call may have: send less at once"
    );
    Fault::new(Reason::MessageTooLarge, message).with("bytes", bytes).with("max", most)
}

fn too_many_parts(count: usize) -> Fault {
    let most = limits::MAX_REQUEST_PARTS;
    let message = format!(
        "the request has {count} parts or more (records, headers, partitions, names), and {most} is the most that one may have: send \
         several requests"
    );
    Fault::new(Reason::InvalidRequest, message).with("max", most)
}

fn status(fault: Fault) -> BoxError {
    Status::from(fault).into()
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
            // What was taken is given back at once.
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
