//! Memory of requests and responses that are under way: a budget for each, of which one connection gets a part.
//!
//! # Overview
//!
//! Each budget has two pools. Small messages have one of their own, so that large ones never hold them up. Small requests that came whole
//! have a third one: no client can hold it by sending nothing. A connection takes from its own part of a pool first, then from the pool,
//! each in turn: at most so much waits in the queue of a pool for one connection as it may hold.
//! Everything is taken at once, for as many bytes as are announced: what holds a part of what it needs never waits for the rest.
//!
//! The parts of a request have pools of their own. They are taken at once as well, when the whole request is there. Requests take from
//! small pools, large pools and those of parts in this order, so none waits for another that waits for it.
//!
//! # Invariants
//!
//! - A request whose bytes do not come holds nothing that others wait for: where a pool is used up, requests that are incomplete for longer
//!   than [`SMALL_GRACE`] or [`grace`] end with `OVERLOADED`, the oldest first.
//! - A connection whose client does not read, and holds memory that others wait for, is closed
//!   (`connections`).
//! - A request is charged until its batch has produce memory, a response above 4 KiB until HTTP/2 has written its last byte: who takes a byte
//!   of it has not taken it.

mod connections;
mod grant;
mod incomplete;
mod queue;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use smallvec::SmallVec;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

pub use self::{connections::ConnectionMemory, grant::Grant};
use self::{
    connections::{Connections, MemoryKind, SEARCH_INTERVAL, UnreadResponse},
    incomplete::{IncompleteRequest, IncompleteRequests},
    queue::{QueuedRequest, RequestQueue},
};
use crate::{
    partition::{Memory, Opener},
    proto::fault::{Fault, Reason},
    task::clock,
};

/// Requests and responses up to this size use the pool of small ones: a batch of 64 KiB, the most common size, and what is around it.
pub const SMALL_BYTES: usize = 65 << 10;

/// Memory that one repeated part of a request takes at most when it has become a struct, in a list that grows.
const PART_BYTES: usize = 256;

/// The share of request memory for the parts of requests, as a divisor.
const PARTS_SHARE: u64 = 4;

/// The share of request memory for what came of requests that wait for memory, as a divisor.
const WAITING_SHARE: u64 = 16;

/// The share of request memory for small requests that came whole, as a divisor.
const WHOLE_SHARE: u64 = 16;

/// Bytes of a waiting request that are not counted.
pub const WAITING_BYTES: usize = 4 << 10;

/// Bytes of a response that are not counted.
const UNCHARGED_BYTES: usize = 4 << 10;

/// The share of response memory for what fetches and reads keep of the partitions that they name, as a divisor.
const SESSION_SHARE: u64 = 8;

/// How long a request waits for memory.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a small request may be incomplete while others wait.
const SMALL_GRACE: Duration = Duration::from_millis(10);

/// How long a larger one may be incomplete, beside the time that its bytes take.
const LARGE_GRACE: Duration = Duration::from_secs(1);

/// Least pace at which a large request must come while others wait: the largest has less time than others wait.
const MIN_BYTES_PER_SECOND: usize = 8 << 20;

/// The share of a pool that one connection may hold, as a divisor.
const CONNECTION_SHARE: u64 = 4;

/// Calls of one connection whose answers are made of metadata and have not been sent yet.
const METADATA_CALLS: usize = 16;

/// Bytes for messages that are read, of `request_bytes`.
fn message_bytes(request_bytes: u64) -> u64 {
    request_bytes - request_bytes / PARTS_SHARE - request_bytes / WAITING_SHARE - request_bytes / WHOLE_SHARE
}

/// How long an incomplete request of so many bytes is left alone while others wait.
fn grace(bytes: usize) -> Duration {
    if bytes <= SMALL_BYTES {
        return SMALL_GRACE;
    }
    LARGE_GRACE + Duration::from_secs((bytes / MIN_BYTES_PER_SECOND) as u64)
}

/// The budgets of a broker. Clones share them.
#[derive(Clone, Debug)]
pub struct Budgets(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    requests: Pools,
    /// Small requests that came whole.
    whole: Memory,
    parts: Pools,
    waiting: Memory,
    /// Requests that wait for the pool of small ones, and for that of large ones.
    queues: [RequestQueue; 2],
    responses: Pools,
    /// Memory for the partitions that fetches and reads name.
    sessions: Memory,
    request_bytes: u64,
    response_bytes: u64,
    incomplete: IncompleteRequests,
    connections: Arc<Connections>,
}

/// A pool for small messages, and one for all others.
#[derive(Clone, Debug)]
pub(super) struct Pools {
    small: Memory,
    large: Memory,
}

impl Pools {
    /// A quarter for small messages.
    fn new(bytes: u64) -> Self {
        Self { small: Memory::new(bytes / 4), large: Memory::new(bytes - bytes / 4) }
    }

    /// Half for small messages.
    pub(super) fn halves(bytes: u64) -> Self {
        Self { small: Memory::new(bytes / 2), large: Memory::new(bytes - bytes / 2) }
    }

    /// The pool for a message of `bytes`.
    pub(super) const fn of(&self, bytes: usize) -> &Memory {
        if bytes <= SMALL_BYTES { &self.small } else { &self.large }
    }

    /// Bytes that are taken of both.
    pub(super) fn taken(&self) -> usize {
        self.small.taken() + self.large.taken()
    }

    /// Takes from a connection's part and from the whole, where both have as much.
    fn try_take(own: &Self, all: &Self, bytes: usize) -> Option<Grant> {
        let own = own.of(bytes).try_take(bytes)?;
        let all = all.of(bytes).try_take(bytes)?;
        Some(Grant::of_connection(own, all))
    }
}

/// Grants of one message: mostly one for its bytes, and one for its parts.
type Grants = SmallVec<[Grant; 2]>;

impl Budgets {
    /// Budgets of so many bytes.
    pub fn new(request_bytes: u64, response_bytes: u64) -> Self {
        Self(Arc::new(Inner {
            requests: Pools::new(message_bytes(request_bytes)),
            whole: Memory::new(request_bytes / WHOLE_SHARE),
            parts: Pools::new(request_bytes / PARTS_SHARE),
            waiting: Memory::new(request_bytes / WAITING_SHARE),
            queues: Default::default(),
            responses: Pools::new(response_bytes - response_bytes / SESSION_SHARE),
            sessions: Memory::new(response_bytes / SESSION_SHARE),
            request_bytes,
            response_bytes,
            incomplete: IncompleteRequests::default(),
            connections: Arc::default(),
        }))
    }

    /// The part of a new connection, which `close` ends.
    pub fn connection(&self, close: impl Fn() + Send + Sync + 'static) -> ConnectionMemory {
        let Inner { request_bytes, response_bytes, .. } = *self.0;
        let sessions_bytes = response_bytes / SESSION_SHARE;
        let shares = [message_bytes(request_bytes), request_bytes / PARTS_SHARE, response_bytes - sessions_bytes];
        let [whole, sessions] =
            [request_bytes / WHOLE_SHARE, sessions_bytes].map(|bytes| Memory::new(bytes / CONNECTION_SHARE));
        let pools = shares.map(|bytes| Pools::new(bytes / CONNECTION_SHARE));
        self.0.connections.open(pools, whole, sessions, close)
    }

    /// Bytes that requests and responses have taken.
    pub fn taken(&self) -> (usize, usize) {
        let requests = self.0.requests.taken() + self.0.whole.taken() + self.0.waiting.taken();
        (requests + self.0.parts.taken(), self.0.responses.taken() + self.0.sessions.taken())
    }

    /// Takes `bytes` of a pool. While it waits, connections are closed that hold more of it and whose clients do not read.
    async fn take(&self, pool: &Memory, bytes: usize, kind: MemoryKind) -> OwnedSemaphorePermit {
        let mut taken = std::pin::pin!(pool.take(bytes));
        loop {
            if let Ok(taken) = tokio::time::timeout(SEARCH_INTERVAL, &mut taken).await {
                return taken;
            }
            self.0.connections.close_unread(kind);
        }
    }

    fn no_request_memory(&self, bytes: usize, message: &str) -> Fault {
        let most = self.0.request_bytes;
        let message = format!(
            "{message}: the request has {bytes} bytes, and requests may take {most} (limits.request_memory_bytes)"
        );
        Fault::new(Reason::Overloaded, message).with("bytes", bytes).with("max", most)
    }
}

/// The memory of one call. Clones share it.
#[derive(Clone, Debug)]
pub struct CallMemory {
    budgets: Budgets,
    connection: ConnectionMemory,
    call: Arc<Mutex<Call>>,
}

/// A request that was read, with its memory until this is dropped.
#[derive(Debug, Default)]
pub struct HeldRequest {
    /// Bytes of its message; 0 where it came by no connection.
    pub(super) bytes: usize,
    grants: Grants,
}

#[derive(Debug, Default)]
struct Call {
    /// The request that was read, until its handler takes it.
    request: HeldRequest,
    /// Responses that were made and not handed to the connection yet.
    made: Grants,
    /// How many frames of responses were handed to the connection and have not been sent.
    handed: usize,
    /// While there are such.
    unread: Option<UnreadResponse>,
}

impl CallMemory {
    /// Nothing taken yet.
    pub fn new(budgets: Budgets, connection: ConnectionMemory) -> Self {
        Self { budgets, connection, call: Arc::default() }
    }

    fn call(&self) -> MutexGuard<'_, Call> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes memory for a request of which nothing but its length is there. Most get it at once.
    pub fn try_request(&self, bytes: usize) -> Option<Grant> {
        Pools::try_take(&self.connection.0.requests, &self.budgets.0.requests, bytes)
    }

    /// Takes memory for a small request that is there. Most get it at once.
    pub fn try_whole_request(&self, bytes: usize) -> Option<Grant> {
        let taken = || {
            let own = self.connection.0.whole.try_take(bytes)?;
            Some(Grant::of_connection(own, self.budgets.0.whole.try_take(bytes)?))
        };
        taken().or_else(|| self.try_request(bytes))
    }

    /// Takes memory for what came of a request that is to wait.
    ///
    /// # Errors
    /// `OVERLOADED` where others that wait hold too much.
    pub fn try_waiting(&self, bytes: usize) -> Result<Grant, Fault> {
        let permit = self.budgets.0.waiting.try_take(bytes);
        permit.map(Grant::of_all).ok_or_else(|| {
            self.budgets
                .no_request_memory(bytes, "there is no memory for the request, and too many others wait for theirs")
        })
    }

    /// Waits for it. Its connection reads nothing of the request meanwhile, so HTTP/2's window stops its sender.
    ///
    /// # Errors
    /// `OVERLOADED` where none came free in time.
    pub async fn request(self, bytes: usize) -> Result<Grant, Fault> {
        let deadline = clock::monotonic() + REQUEST_TIMEOUT;
        let own = self.connection.0.requests.of(bytes).take(bytes);
        let Ok(own) = tokio::time::timeout_at(deadline, own).await else {
            let message = "other requests of this connection hold the memory that one connection may take";
            return Err(self.budgets.no_request_memory(bytes, message));
        };
        let queued = QueuedRequest::new(&self.budgets.0.queues[usize::from(bytes > SMALL_BYTES)], bytes);
        let mut all = std::pin::pin!(self.budgets.0.requests.of(bytes).take(bytes));
        loop {
            if let Ok(all) = tokio::time::timeout(queued.interval(), &mut all).await {
                return Ok(Grant::of_connection(own, all));
            }
            let now = clock::monotonic();
            if now >= deadline {
                return Err(self.budgets.no_request_memory(bytes, "no memory for the request came free"));
            }
            if let Some(wanted) = queued.wanted(now) {
                self.budgets.0.incomplete.end(bytes, wanted, now);
                self.budgets.0.connections.close_unread(MemoryKind::Requests);
            }
        }
    }

    /// Takes memory for the parts of a request that is there. Most get it at once.
    pub fn try_parts(&self, parts: usize) -> Option<Grant> {
        Pools::try_take(&self.connection.0.parts, &self.budgets.0.parts, parts * PART_BYTES)
    }

    /// Waits for it. The last bytes of the request are held back meanwhile, so nothing is made of it.
    ///
    /// # Errors
    /// `OVERLOADED` where none came free in time.
    pub async fn parts(self, parts: usize) -> Result<Grant, Fault> {
        let bytes = parts * PART_BYTES;
        let (own, all) = (&self.connection.0.parts, &self.budgets.0.parts);
        let taken = async {
            let own = own.of(bytes).take(bytes).await;
            Grant::of_connection(own, self.budgets.take(all.of(bytes), bytes, MemoryKind::Requests).await)
        };
        let in_time = tokio::time::timeout(REQUEST_TIMEOUT, taken).await;
        in_time.map_err(|_| self.budgets.no_request_memory(bytes, "no memory for the request's parts came free"))
    }

    /// A request of `bytes` was read whole.
    pub fn deliver(&self, bytes: usize, grants: impl IntoIterator<Item = Grant>) {
        let mut call = self.call();
        call.request.bytes = bytes;
        call.request.grants.extend(grants);
    }

    /// Takes over the memory of the request that was read last. Dropping the value gives it back.
    pub fn take_request(&self) -> HeldRequest {
        std::mem::take(&mut self.call().request)
    }

    /// Notes that a request is incomplete, for as long as the value lives.
    pub fn incomplete(&self, bytes: usize, since: Instant) -> IncompleteGuard {
        IncompleteGuard {
            budgets: self.budgets.clone(),
            request: self.budgets.0.incomplete.add(bytes, since, &self.connection.0),
        }
    }

    /// Memory for a response of up to `bytes`, or of up to `least` where others hold too much for that: the bytes that were granted. `None`
    /// where there is none now.
    pub(super) fn try_response(&self, bytes: usize, least: usize) -> Option<(ResponseGrant, usize)> {
        let take = |bytes: usize, is_small| {
            let (own, all) = self.response_pools(is_small);
            let grant = Grant::of_connection(own.try_take(bytes)?, all.try_take(bytes)?);
            Some((ResponseGrant { grant, is_small }, bytes))
        };
        let large = if bytes > least { take(bytes, false) } else { None };
        large.or_else(|| take(least, self.is_small(least)))
    }

    /// As [`Self::try_response`]. Waits where there is none.
    pub(super) async fn response(&self, bytes: usize, least: usize) -> (ResponseGrant, usize) {
        if let Some(granted) = self.try_response(bytes, least) {
            return granted;
        }
        let is_small = self.is_small(least);
        let (own, all) = self.response_pools(is_small);
        let own = own.take(least).await;
        let all = self.budgets.take(all, least, MemoryKind::Responses).await;
        (ResponseGrant { grant: Grant::of_connection(own, all), is_small }, least)
    }

    /// A response larger than the small part of one connection waits for the large pool.
    fn is_small(&self, least: usize) -> bool {
        least <= self.connection.0.responses.small.bytes()
    }

    fn response_pools(&self, is_small: bool) -> (&Memory, &Memory) {
        let (own, all) = (&self.connection.0.responses, &self.budgets.0.responses);
        if is_small { (&own.small, &all.small) } else { (&own.large, &all.large) }
    }

    /// Memory for reading `bytes` that are no part of a response, for as long as the value lives.
    pub(super) async fn read(&self, bytes: usize) -> Grant {
        let own = self.connection.0.responses.large.take(bytes).await;
        let all = self.budgets.take(&self.budgets.0.responses.large, bytes, MemoryKind::Responses).await;
        Grant::of_connection(own, all)
    }

    /// No memory for a response came free in time.
    pub(super) fn no_response_memory(&self) -> Fault {
        let most = self.budgets.0.response_bytes;
        let message = format!(
            "no memory for the response came free in time: others that were not read yet hold it, and responses may take {most} bytes \
             (limits.response_memory_bytes)"
        );
        Fault::new(Reason::Overloaded, message).with("max", most)
    }

    /// Takes more for a response that is being made, and charges it with that.
    ///
    /// # Errors
    /// `OVERLOADED` where there is not as much.
    pub(crate) fn reserve_more(&self, bytes: usize) -> Result<(), Fault> {
        let more = self.take_more(bytes)?;
        self.call().made.push(more);
        Ok(())
    }

    fn take_more(&self, bytes: usize) -> Result<Grant, Fault> {
        let taken = (self.connection.0.responses.large.try_take(bytes), self.budgets.0.responses.large.try_take(bytes));
        let (Some(own), Some(all)) = taken else {
            self.budgets.0.connections.close_unread(MemoryKind::Responses);
            let most = self.budgets.0.response_bytes;
            let message = format!(
                "no memory for the response: it needs {bytes} bytes, and responses may take {most} (limits.response_memory_bytes), of which \
                 others that were not read yet hold a part"
            );
            return Err(Fault::new(Reason::Overloaded, message).with("bytes", bytes).with("max", most));
        };
        Ok(Grant::of_connection(own, all))
    }

    /// Takes memory for what a fetch or a read keeps of the partitions that it names.
    ///
    /// # Errors
    /// `OVERLOADED` where there is not as much.
    pub(super) fn session(&self, bytes: usize) -> Result<Grant, Fault> {
        let own = self.connection.0.sessions.try_take(bytes);
        let taken = own.and_then(|own| Some(Grant::of_connection(own, self.budgets.0.sessions.try_take(bytes)?)));
        taken.ok_or_else(|| {
            let most = self.budgets.0.response_bytes / SESSION_SHARE;
            let message = format!(
                "no memory for the partitions of the request: they need {bytes} bytes, all fetches and reads together may take {most} and \
                 those of one connection a quarter of it (an eighth of limits.response_memory_bytes): name fewer partitions"
            );
            Fault::new(Reason::Overloaded, message).with("bytes", bytes).with("max", most)
        })
    }

    /// A response of so many bytes was made of what was taken for it. It is charged until it has been sent.
    pub(super) fn made(&self, mut response: ResponseGrant, bytes: usize) {
        response.shrink(bytes);
        self.call().made.push(response.grant);
    }

    /// Takes again what a response gave back, up to `bytes`; whether there was as much.
    pub(super) fn grow(&self, response: &mut ResponseGrant, bytes: usize) -> bool {
        let (own, all) = self.response_pools(response.is_small);
        response.grant.try_grow(own, all, bytes)
    }

    /// The client took a piece of what was handed over.
    pub fn on_piece_taken(&self) {
        if let Some(unread) = &self.call().unread {
            unread.renew();
        }
    }

    /// Hands `bytes` of a response to the connection, which has sent them when the value is dropped. What was taken for the response covers
    /// most; what is made without records, as metadata is, takes its memory here.
    ///
    /// # Errors
    /// `OVERLOADED` where there is not as much.
    pub fn hand(&self, bytes: usize) -> Result<HandedResponse, Fault> {
        let mut grants = std::mem::take(&mut self.call().made);
        let charged = grants.iter().map(Grant::bytes).sum::<usize>();
        if bytes > charged + UNCHARGED_BYTES {
            grants.push(self.take_more(bytes - charged)?);
        }
        let charged = grants.iter().map(Grant::bytes).sum();
        let mut call = self.call();
        call.handed += 1;
        // Until the client takes it, the call can give back nothing.
        call.unread.get_or_insert_with(|| UnreadResponse::new(&self.connection.0)).hand(charged);
        drop(call);
        Ok(HandedResponse { call: Arc::clone(&self.call), _grants: grants })
    }

    /// Opens the batches of this connection one at a time.
    pub(super) fn opener(&self, opener: &Opener) -> Opener {
        opener.for_caller(Arc::clone(&self.connection.0.decompression))
    }

    /// Rewrites the batches of this connection one at a time. Its readers wait for none of them.
    pub(super) fn rewriter(&self, opener: &Opener) -> Opener {
        opener.for_caller(Arc::clone(&self.connection.0.recompression))
    }

    /// A place for an append with `acks=tiered` among those of its connection, where there is one.
    pub(super) fn tiered_append(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.connection.0.tiered_appends).try_acquire_owned().ok()
    }

    /// The turn of a call whose answer is made of metadata, until that was sent.
    pub async fn metadata_turn(&self) -> OwnedSemaphorePermit {
        let turn = Arc::clone(&self.connection.0.metadata_calls).acquire_owned().await;
        turn.expect("the semaphore is never closed")
    }
}

/// A frame of a response that HTTP/2 has: it is charged until this is dropped.
#[derive(Debug)]
pub struct HandedResponse {
    call: Arc<Mutex<Call>>,
    _grants: Grants,
}

impl Drop for HandedResponse {
    fn drop(&mut self) {
        let mut call = self.call.lock().unwrap_or_else(PoisonError::into_inner);
        call.handed -= 1;
        if call.handed > 0 {
            return call.unread.iter().for_each(UnreadResponse::renew);
        }
        let unread = call.unread.take();
        drop(call);
        drop(unread);
    }
}

/// Memory for one response.
#[derive(Debug)]
pub(super) struct ResponseGrant {
    grant: Grant,
    /// Taken from the pools of small responses.
    is_small: bool,
}

impl ResponseGrant {
    /// Takes `bytes` out for a read, or as many as there are.
    pub(super) fn split(&mut self, bytes: usize) -> Grant {
        self.grant.split(bytes)
    }

    /// Puts back what was taken out. What came of other pools is given back.
    pub(super) fn merge(&mut self, part: Grant) {
        self.grant.merge(part);
    }

    /// Gives back what is above `bytes`.
    pub(super) fn shrink(&mut self, bytes: usize) {
        self.grant.shrink(bytes);
    }
}

/// A request that is incomplete.
#[derive(Debug)]
pub struct IncompleteGuard {
    budgets: Budgets,
    request: Arc<IncompleteRequest>,
}

impl IncompleteGuard {
    /// Why the request ends, where others need its memory; wakes the task when that becomes so.
    pub fn check(&self, waker: &std::task::Waker) -> Result<(), Fault> {
        if !self.request.is_ended(waker) {
            return Ok(());
        }
        Err(self.budgets.no_request_memory(
            self.request.bytes,
            "the rest of the request did not come while others needed its memory",
        ))
    }
}

impl Drop for IncompleteGuard {
    fn drop(&mut self) {
        self.budgets.0.incomplete.remove(&self.request);
    }
}

#[cfg(test)]
mod tests;
