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

/// How long a request is held before it is refused because too many wait: whoever sends it again at once costs little so.
const REFUSAL_DELAY: Duration = Duration::from_secs(1);

/// Bytes before each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// Calls whose requests hold records.
const RECORD_CALLS: [&str; 2] = ["/strandline.v1.Log/Append", "/strandline.v1.Log/Produce"];

/// Calls and services whose requests are streams of messages.
const STREAM_PATHS: [&str; 3] = ["/strandline.v1.Log/Produce", "/strandline.v1.Log/Fetch", "/grpc.reflection."];

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
    message: Option<Message>,
    /// To be passed on.
    out: VecDeque<Bytes>,
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

impl Message {
    /// Bytes for which it has memory.
    fn charged(&self) -> usize {
        if matches!(self.state, State::Admitted) { self.bytes } else { self.bytes.min(SMALL_BYTES) }
    }
}

impl RequestBody {
    /// The body of a call at `path`.
    pub(super) fn new(inner: Body, path: &str, memory: CallMemory, schemas: &RequestSchemas) -> Self {
        let holds_records = RECORD_CALLS.contains(&path);
        let max_bytes = if holds_records { limits::MAX_MESSAGE_BYTES } else { limits::MAX_REQUEST_BYTES };
        let counter = schemas.counter(path);
        Self {
            inner,
            memory,
            max_bytes,
            is_stream: is_stream(path),
            counter,
            rest: Bytes::new(),
            message: None,
            out: VecDeque::new(),
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
        let (grant, mut waiting) = (self.memory.try_request(bytes.min(SMALL_BYTES)), None);
        let state = match grant {
            None => {
                let granted = self.memory.clone().request(bytes.min(SMALL_BYTES));
                match self.hold_rest() {
                    Ok(grant) => {
                        waiting = grant;
                        State::Waiting(Box::pin(granted))
                    }
                    Err(fault) => State::Waiting(Box::pin(async {
                        tokio::time::sleep(REFUSAL_DELAY).await;
                        Err(fault)
                    })),
                }
            }
            Some(_) if bytes > SMALL_BYTES => State::Beginning,
            Some(_) => State::Admitted,
        };
        self.message = Some(Message {
            bytes,
            left: PREFIX_BYTES + bytes,
            state,
            held: BytesMut::new(),
            grant,
            waiting,
            parts: 0,
            since: clock::monotonic(),
            incomplete: None,
        });
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
        self.memory.deliver(message.grant.into_iter().chain(parts));
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            let is_admitted = self.message.as_ref().is_none_or(|message| matches!(message.state, State::Admitted));
            if is_admitted && let Some(piece) = self.out.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
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
                    Ok(data) => self.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
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
            (self.message, self.rest, self.out) = (None, Bytes::new(), VecDeque::new());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.failed
            || self.message.is_none() && self.rest.is_empty() && self.out.is_empty() && self.inner.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, StreamExt as _, future::poll_fn};

    use prost::Message as _;

    use super::*;
    use crate::{
        broker::Budgets,
        proto::v1::{self, append_request::Payload},
    };

    const APPEND: &str = RECORD_CALLS[0];
    const READ: &str = "/strandline.v1.Log/Read";

    fn framed(message: &[u8]) -> Vec<u8> {
        let len = u32::try_from(message.len()).expect("small");
        [&[0], &len.to_be_bytes()[..], message].concat()
    }

    /// A body of these pieces; with `open`, it never ends.
    fn body(pieces: Vec<Vec<u8>>, open: bool, path: &str, memory: &CallMemory) -> RequestBody {
        let pieces = futures::stream::iter(pieces.into_iter().map(|piece| Ok::<_, BoxError>(Bytes::from(piece))));
        let inner =
            if open { Body::from_stream(pieces.chain(futures::stream::pending())) } else { Body::from_stream(pieces) };
        RequestBody::new(inner, path, memory.clone(), &RequestSchemas::of_clients())
    }

    async fn frame(body: &mut RequestBody) -> Option<Result<Bytes, Fault>> {
        let frame = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await?;
        let refused = |error: BoxError| Fault::from(&*error.downcast::<Status>().expect("a status"));
        Some(frame.map(|frame| frame.into_data().expect("data")).map_err(refused))
    }

    fn memory(budgets: &Budgets) -> CallMemory {
        CallMemory::new(budgets.clone(), budgets.connection(|| {}))
    }

    #[tokio::test(start_paused = true)]
    async fn messages_pass_unchanged_however_they_are_cut() {
        let budgets = Budgets::new(64 << 20, 1 << 20);
        let batch = |bytes: usize| [&[0x2a][..], &prost_len(bytes), &vec![7; bytes]].concat();
        let sent =
            [framed(&[]), framed(&batch(10)), framed(&batch(300_000)), framed(&batch(70_000)), framed(&[])].concat();
        for size in [1, 3, 5, 4096, 100_000, usize::MAX] {
            let memory = memory(&budgets);
            let mut body =
                body(sent.chunks(size.min(sent.len())).map(<[u8]>::to_vec).collect(), false, APPEND, &memory);
            let mut came = Vec::new();
            while let Some(piece) = frame(&mut body).await {
                came.extend_from_slice(&piece.expect("nothing is wrong with it"));
            }
            assert!(came == sent, "in pieces of {size}");
            assert!(budgets.taken().0 > 370_000, "what was read stays charged until its handler takes it");
            drop((body, memory));
            assert_eq!(budgets.taken().0, 0);
        }
    }

    fn prost_len(bytes: usize) -> Vec<u8> {
        let mut len = Vec::new();
        prost::encoding::encode_varint(bytes as u64, &mut len);
        len
    }

    /// 60 MiB announced on each of many streams took 6 GB; five bytes that announce 65 MiB on 10,000 streams took 1.8 GB.
    #[tokio::test(start_paused = true)]
    async fn announced_bytes_are_charged_by_what_came_and_give_way() {
        let budgets = Budgets::new(96 << 20, 1 << 20);
        let announced = [&[0][..], &(60_u32 << 20).to_be_bytes()].concat();
        let mut bodies: Vec<_> =
            (0..400).map(|_| body(vec![announced.clone()], true, APPEND, &memory(&budgets))).collect();
        for body in &mut bodies {
            let pending = poll_fn(|cx| Poll::Ready(Pin::new(&mut *body).poll_frame(cx).is_pending())).await;
            assert!(pending, "nothing is passed on");
        }
        assert!(budgets.taken().0 <= 96 << 20, "{:?}", budgets.taken());
        let memory = memory(&budgets);
        let mut honest = body(vec![framed(&[0x2a, 1, 7])], false, APPEND, &memory);
        let mut ended = tokio::task::JoinSet::new();
        ended.spawn(async move {
            let all = bodies.iter_mut().map(|body| Box::pin(frame(body)));
            futures::future::select_all(all).await.0
        });
        assert_eq!(frame(&mut honest).await, Some(Ok(framed(&[0x2a, 1, 7]).into())), "it has its place");
        let ended =
            ended.join_next().await.expect("it reads").expect("no panic").expect("an answer").expect_err("it gave way");
        assert_eq!((ended.reason, ended.retryable), (Reason::Overloaded, true));
        assert!(ended.message.contains("limits.request_memory_bytes"), "{ended}");
    }

    #[tokio::test(start_paused = true)]
    async fn requests_without_records_are_small_and_have_few_parts() {
        let budgets = Budgets::new(512 << 20, 1 << 20);
        let large = [&[0][..], &(5_u32 << 20).to_be_bytes()].concat();
        let refused = frame(&mut body(vec![large.clone()], true, READ, &memory(&budgets))).await;
        let refused = refused.expect("an answer").expect_err("too large");
        assert_eq!(refused.reason, Reason::MessageTooLarge);
        assert!(refused.message.contains("5242880") && refused.message.contains("4194304"), "{refused}");
        // Empty records of two bytes each: 33 million of them took 4.7 GB.
        let records = [0x0a, 0].repeat(limits::MAX_REQUEST_PARTS + 1);
        let message = [&[0x32][..], &prost_len(records.len()), &records].concat();
        let memory = memory(&budgets);
        let mut many = body(framed(&message).chunks(1 << 14).map(<[u8]>::to_vec).collect(), false, APPEND, &memory);
        let refused = loop {
            match frame(&mut many).await {
                Some(Ok(_)) => {}
                Some(Err(fault)) => break fault,
                None => panic!("it was taken"),
            }
        };
        assert_eq!(refused.reason, Reason::InvalidRequest);
        assert!(refused.message.contains(&limits::MAX_REQUEST_PARTS.to_string()), "{refused}");
        assert_eq!(budgets.taken().0, 0, "all is given back");
    }

    /// `limits.request_memory_bytes` where `limits.memory_bytes` is 512 and 64 MiB.
    const REQUEST_BYTES: [u64; 2] = [96 << 20, 12 << 20];
    const FETCH: &str = STREAM_PATHS[1];

    fn pieces(message: &impl prost::Message) -> Vec<Vec<u8>> {
        framed(&message.encode_to_vec()).chunks(1 << 14).map(<[u8]>::to_vec).collect()
    }

    fn append(records: usize, bytes: usize) -> v1::AppendRequest {
        let record = v1::Record { value: Some(vec![7; bytes].into()), ..Default::default() };
        let records = v1::PlainRecords { records: vec![record; records] };
        v1::AppendRequest { payload: Some(Payload::Records(records)), ..Default::default() }
    }

    fn fetch(partitions: usize) -> v1::FetchRequest {
        let place = v1::FetchPartition { topic: "orders".to_owned(), ..Default::default() };
        v1::FetchRequest { partitions: vec![place; partitions], ..Default::default() }
    }

    /// Reads a body to its end: its bytes.
    async fn read(mut body: RequestBody) -> Result<usize, Fault> {
        let mut bytes = 0;
        while let Some(piece) = frame(&mut body).await {
            bytes += piece?.len();
        }
        Ok(bytes)
    }

    /// Parts came from the pool that the message needed: such appends were refused whenever they were sent.
    #[tokio::test(start_paused = true)]
    async fn requests_with_many_parts_are_accepted() {
        let large = [(APPEND, pieces(&append(30 << 10, 1 << 10))), (APPEND, pieces(&append(100_000, 3)))];
        for bytes in REQUEST_BYTES {
            let budgets = Budgets::new(bytes, 1 << 20);
            let connection = budgets.connection(|| {});
            let mut reads = tokio::task::JoinSet::new();
            for (path, sent) in large.iter().cloned().chain([(FETCH, pieces(&fetch(10_000)))]) {
                for _ in 0..3 {
                    let memory = CallMemory::new(budgets.clone(), connection.clone());
                    let (body, sent_bytes) = (body(sent.clone(), false, path, &memory), sent.concat().len());
                    reads.spawn(async move {
                        assert_eq!(read(body).await, Ok(sent_bytes));
                        memory.take_request();
                    });
                }
            }
            while let Some(read) = reads.join_next().await {
                read.expect("all are accepted, also side by side on one connection");
            }
            assert_eq!(budgets.taken().0, 0);
        }
    }

    /// One large request that waited made every small one with a part fail.
    #[tokio::test(start_paused = true)]
    async fn small_requests_pass_while_large_ones_wait() {
        for bytes in REQUEST_BYTES {
            let budgets = Budgets::new(bytes, 1 << 20);
            let connection = budgets.connection(|| {});
            let call = || CallMemory::new(budgets.clone(), connection.clone());
            let held = (call().try_request(65 << 20), call().try_parts(limits::MAX_REQUEST_PARTS));
            assert!(held.0.is_some() && held.1.is_some());
            let large = body(pieces(&append(30 << 10, 1 << 10)), false, APPEND, &call());
            // It is small, and has more parts than are free.
            let many = body(pieces(&fetch(5000)), false, FETCH, &call());
            let mut waiting = [Box::pin(read(large)), Box::pin(read(many))];
            for request in &mut waiting {
                assert!(futures::poll!(request).is_pending(), "it waits");
            }
            let began = clock::monotonic();
            read(body(pieces(&append(1, 100)), false, APPEND, &call())).await.expect("a small append passes");
            read(body(pieces(&fetch(3)), false, FETCH, &call())).await.expect("a small fetch passes");
            assert_eq!(clock::monotonic(), began, "they do not wait");
            drop(held);
            let served = futures::future::join_all(waiting).await;
            assert!(served.iter().all(Result::is_ok), "there is room: {served:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn last_bytes_wait_for_memory_for_parts() {
        let budgets = Budgets::new(REQUEST_BYTES[0], 1 << 20);
        let holder = memory(&budgets);
        let held = holder.try_parts(limits::MAX_REQUEST_PARTS).expect("room");
        let sent = pieces(&append(100_000, 3));
        let mut refused = body(sent.clone(), false, APPEND, &memory(&budgets));
        let (mut passed, began) = (0, clock::monotonic());
        let fault = loop {
            match frame(&mut refused).await.expect("no end") {
                Ok(piece) => passed += piece.len(),
                Err(fault) => break fault,
            }
        };
        assert_eq!((fault.reason, fault.retryable), (Reason::Overloaded, true));
        assert_eq!(passed, sent[..sent.len() - 1].concat().len());
        assert!(clock::monotonic() - began >= std::time::Duration::from_secs(10));
        drop(held);
        assert_eq!(budgets.taken().0, 0);
    }

    /// A stream whose handler takes nothing added the memory of each message for ever.
    #[tokio::test(start_paused = true)]
    async fn streams_hold_memory_for_one_message() {
        let budgets = Budgets::new(REQUEST_BYTES[0], 1 << 20);
        let sent = vec![framed(&fetch(30).encode_to_vec()); 5];
        let memory = memory(&budgets);
        let mut stream = body(sent, true, FETCH, &memory);
        let mut most = 0;
        for _ in 0..5 {
            frame(&mut stream).await.expect("a message").expect("it is accepted");
            most = most.max(budgets.taken().0);
            assert_eq!(budgets.taken().0, most, "as after the first");
        }
        let pending = poll_fn(|cx| Poll::Ready(Pin::new(&mut stream).poll_frame(cx).is_pending())).await;
        assert!(pending && budgets.taken().0 == 0, "all are handled");
    }

    /// What came first of a request was read to see its length, and 10,000 requests that waited then held 600 MB.
    #[tokio::test(start_paused = true)]
    async fn requests_that_wait_hold_little() {
        let budgets = Budgets::new(REQUEST_BYTES[1], 1 << 20);
        let calls: Vec<_> = (0..8).map(|_| memory(&budgets)).collect();
        let full: Vec<_> = calls.iter().flat_map(|call| std::iter::from_fn(|| call.try_request(SMALL_BYTES))).collect();
        let before = budgets.taken().0;
        let message = framed(&append(1, 60_000).encode_to_vec());
        let mut waiting: Vec<_> =
            (0..100).map(|_| Box::pin(read(body(vec![message.clone()], false, APPEND, &memory(&budgets))))).collect();
        for request in &mut waiting {
            assert!(futures::poll!(request).is_pending(), "it waits");
        }
        assert!((budgets.taken().0 - before) as u64 <= REQUEST_BYTES[1] / 16, "{:?}", budgets.taken());
        let mut small = Box::pin(read(body(pieces(&append(1, 100)), false, APPEND, &memory(&budgets))));
        assert!(futures::poll!(&mut small).is_pending(), "it waits too");
        tokio::time::sleep(REFUSAL_DELAY).await;
        let refused = waiting.iter_mut().filter_map(|request| request.as_mut().now_or_never());
        assert!(
            refused
                .map(|outcome| outcome.expect_err("refused").reason)
                .filter(|reason| *reason == Reason::Overloaded)
                .count()
                > 80
        );
        drop(full);
        small.await.expect("a small one waits for memory however many do");
    }
}
