//! Memory budgets of a broker: one for requests in progress, and one for responses. Each connection may use only a
//! share of each budget.
//!
//! # Overview
//!
//! Each budget has a pool for small messages and one for large messages, so large messages never delay small ones.
//! Small requests that have arrived completely use a third pool, which no client can occupy by sending nothing. If that
//! pool is used up, they use the pool for small messages.
//!
//! A connection takes memory from its own share of a pool first, then from the pool. So the requests of one connection
//! that wait at a pool never want more than the share of that connection. Memory for all announced bytes is taken at
//! once: no request holds a part of its memory while it waits for the rest.
//!
//! The parts of a request (its repeated elements) have pools of their own. Their memory is also taken at once, when the
//! request has arrived completely. Every request takes the memory for its bytes before the memory for its parts, so no
//! two requests wait for each other.
//!
//! # Invariants
//!
//! - A request whose bytes do not arrive holds no memory that other requests wait for. While other requests wait for a
//!   pool, requests of that pool that have been incomplete for longer than [`grace`] fail with `OVERLOADED`, the oldest
//!   first.
//! - A connection is closed (`connections`) if its client does not read and other calls wait for memory that the
//!   connection holds.
//! - An append request is charged until its batch has produce memory. A response above 4 KiB is charged until HTTP/2
//!   has written its last byte, also if the client has read a part of the response.

mod connections;
mod grant;
mod incomplete;
mod queue;

use std::{sync::Arc, time::Duration};

use smallvec::SmallVec;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

pub use self::{connections::ConnectionMemory, grant::Grant};
use self::{
    connections::{Connections, MemoryKind, SEARCH_INTERVAL, UnreadResponse},
    incomplete::{IncompleteRequest, IncompleteRequests},
    queue::{QueuedRequest, RequestQueue},
};
use crate::{
    partition::{Decompressor, MemoryBudget},
    proto::error::{ApiError, ErrorCode},
    task::{clock, lock::Mutex},
};

/// Maximum size of a message that uses a small pool, in bytes: a batch of 64 KiB, the most common size, and the rest of
/// its message.
pub const SMALL_BYTES: usize = 65 << 10;

/// Maximum memory of one repeated part of a decoded request, in bytes: its struct, and the spare capacity of the list
/// that contains it.
const PART_BYTES: usize = 256;

/// Share of request memory for the parts of requests, as a divisor.
const PARTS_SHARE: u64 = 4;

/// Share of request memory for the bytes that requests have already received while they wait for memory, as a divisor.
const WAITING_SHARE: u64 = 16;

/// Share of request memory for small requests that have arrived completely, as a divisor.
const COMPLETE_SHARE: u64 = 16;

/// Received bytes of a request up to which they are not charged while the request waits for memory.
pub const WAITING_BYTES: usize = 4 << 10;

/// Bytes by which a response may exceed its charged memory.
const UNCHARGED_BYTES: usize = 4 << 10;

/// Share of response memory for the state of the partitions that fetches and reads name, as a divisor.
const SESSION_SHARE: u64 = 8;

/// Maximum time that a request waits for memory: once for its bytes, and once for its parts.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum time that a small request may be incomplete while other requests wait for memory.
const SMALL_GRACE: Duration = Duration::from_millis(10);

/// Maximum time that a large request may be incomplete while other requests wait for memory, in addition to the time
/// for its bytes at [`MIN_BYTES_PER_SECOND`].
const LARGE_GRACE: Duration = Duration::from_secs(1);

/// Minimum rate at which a large request must arrive while other requests wait for memory. At this rate, the largest
/// request arrives within [`REQUEST_TIMEOUT`].
const MIN_BYTES_PER_SECOND: usize = 8 << 20;

/// Share of a pool that one connection may hold, as a divisor.
const CONNECTION_SHARE: u64 = 4;

/// Maximum number of calls per connection whose responses are built from metadata and have not been sent.
const METADATA_CALLS: usize = 16;

/// Returns the part of the request memory that is for the messages themselves: the small and the large pool together.
fn message_bytes(request_bytes: u64) -> u64 {
    request_bytes - request_bytes / PARTS_SHARE - request_bytes / WAITING_SHARE - request_bytes / COMPLETE_SHARE
}

/// Returns the maximum time that a request of this size may be incomplete while other requests wait for memory.
fn grace(bytes: usize) -> Duration {
    if bytes <= SMALL_BYTES {
        return SMALL_GRACE;
    }
    LARGE_GRACE + Duration::from_secs((bytes / MIN_BYTES_PER_SECOND) as u64)
}

/// Memory budgets of a broker. Clones share them.
#[derive(Clone, Debug)]
pub struct Budgets(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    requests: Pools,
    /// Pool of small requests that have arrived completely.
    complete_requests: MemoryBudget,
    /// Pools of the repeated parts of requests.
    parts: Pools,
    /// Pool of the received bytes of requests that wait for memory.
    waiting: MemoryBudget,
    /// Requests that wait for the small pool and for the large pool of `requests`.
    queues: [RequestQueue; 2],
    responses: Pools,
    /// Memory for the state of the partitions that fetches and reads name.
    sessions: MemoryBudget,
    request_bytes: u64,
    response_bytes: u64,
    incomplete: IncompleteRequests,
    connections: Arc<Connections>,
}

/// A pool for small messages and one for all other messages.
#[derive(Clone, Debug)]
pub(super) struct Pools {
    small: MemoryBudget,
    large: MemoryBudget,
}

impl Pools {
    /// Creates pools with a quarter of the memory for small messages.
    fn new(bytes: u64) -> Self {
        Self { small: MemoryBudget::new(bytes / 4), large: MemoryBudget::new(bytes - bytes / 4) }
    }

    /// Creates pools with half of the memory for small messages.
    pub(super) fn halves(bytes: u64) -> Self {
        Self { small: MemoryBudget::new(bytes / 2), large: MemoryBudget::new(bytes - bytes / 2) }
    }

    /// Returns the pool, small or large, for a message of `bytes`.
    pub(super) const fn of(&self, bytes: usize) -> &MemoryBudget {
        if bytes <= SMALL_BYTES { &self.small } else { &self.large }
    }

    /// Returns the bytes that are taken from both pools now.
    pub(super) fn taken(&self) -> usize {
        self.small.taken() + self.large.taken()
    }

    /// Takes memory from a connection's share and from the pool for a message of `bytes`, if both have enough.
    fn try_take(shares: &Self, pools: &Self, bytes: usize) -> Option<Grant> {
        let share = shares.of(bytes).try_take(bytes)?;
        let pool = pools.of(bytes).try_take(bytes)?;
        Some(Grant::with_share(share, pool))
    }
}

/// Grants of one message: usually one for its bytes and one for its parts.
type Grants = SmallVec<[Grant; 2]>;

impl Budgets {
    /// Creates budgets of these sizes.
    pub fn new(request_bytes: u64, response_bytes: u64) -> Self {
        Self(Arc::new(Inner {
            requests: Pools::new(message_bytes(request_bytes)),
            complete_requests: MemoryBudget::new(request_bytes / COMPLETE_SHARE),
            parts: Pools::new(request_bytes / PARTS_SHARE),
            waiting: MemoryBudget::new(request_bytes / WAITING_SHARE),
            queues: Default::default(),
            responses: Pools::new(response_bytes - response_bytes / SESSION_SHARE),
            sessions: MemoryBudget::new(response_bytes / SESSION_SHARE),
            request_bytes,
            response_bytes,
            incomplete: IncompleteRequests::default(),
            connections: Arc::default(),
        }))
    }

    /// Creates the shares of a new connection in all pools. `close` is called to close the connection if its client
    /// does not read.
    pub fn connection(&self, close: impl Fn() + Send + Sync + 'static) -> ConnectionMemory {
        let Inner { request_bytes, response_bytes, .. } = *self.0;
        let sessions_bytes = response_bytes / SESSION_SHARE;
        let shares = [message_bytes(request_bytes), request_bytes / PARTS_SHARE, response_bytes - sessions_bytes];
        let [complete_requests, sessions] =
            [request_bytes / COMPLETE_SHARE, sessions_bytes].map(|bytes| MemoryBudget::new(bytes / CONNECTION_SHARE));
        let pools = shares.map(|bytes| Pools::new(bytes / CONNECTION_SHARE));
        self.0.connections.open(pools, complete_requests, sessions, close)
    }

    /// Returns the bytes that all requests and all responses hold now.
    pub fn taken(&self) -> (usize, usize) {
        let requests = self.0.requests.taken() + self.0.complete_requests.taken() + self.0.waiting.taken();
        (requests + self.0.parts.taken(), self.0.responses.taken() + self.0.sessions.taken())
    }

    /// Takes `bytes` from a pool, and waits until they are free. While it waits, closes connections that hold memory of
    /// this `kind` and whose clients do not read.
    async fn take(&self, pool: &MemoryBudget, bytes: usize, kind: MemoryKind) -> OwnedSemaphorePermit {
        let mut pending_permit = std::pin::pin!(pool.take(bytes));
        loop {
            if let Ok(permit) = tokio::time::timeout(SEARCH_INTERVAL, &mut pending_permit).await {
                return permit;
            }
            self.0.connections.close_unread(kind);
        }
    }

    /// Returns the `OVERLOADED` error for a request of `bytes` that got no memory. `reason` begins the message.
    fn no_request_memory(&self, bytes: usize, reason: &str) -> ApiError {
        let max = self.0.request_bytes;
        let message = format!(
            "{reason}: the request has {bytes} bytes, and all requests share {max} bytes \
             (limits.request_memory_bytes); retry later"
        );
        ApiError::new(ErrorCode::Overloaded, message).with("bytes", bytes).with("max", max)
    }
}

/// Memory that the request and the response of one call hold. Clones share it.
#[derive(Clone, Debug)]
pub struct CallMemory {
    budgets: Budgets,
    connection: ConnectionMemory,
    call: Arc<Mutex<Call>>,
}

/// Size and memory of a request that was read. Dropping this value frees the memory.
#[derive(Debug, Default)]
pub struct ReceivedRequest {
    /// Size of the message in bytes; 0 for a request that did not arrive over the listener.
    pub(super) bytes: usize,
    grants: Grants,
}

/// Memory and unsent response frames of one call.
#[derive(Debug, Default)]
struct Call {
    /// Last request that was read, until its handler takes it.
    request: ReceivedRequest,
    /// Grants of response data that is complete and not yet passed to HTTP/2.
    completed: Grants,
    /// Number of response frames that were passed to HTTP/2 and have not been sent.
    unsent_frames: usize,
    /// Registration of the call while response frames are unsent; `None` otherwise.
    unread: Option<UnreadResponse>,
}

impl CallMemory {
    /// Creates the memory of a call, with nothing taken.
    pub fn new(budgets: Budgets, connection: ConnectionMemory) -> Self {
        Self { budgets, connection, call: Arc::default() }
    }

    /// Takes memory for a request of which only the length has arrived, without waiting. Returns `None` if the share or
    /// the pool has not enough; the caller then waits with [`Self::request`].
    pub fn try_request(&self, bytes: usize) -> Option<Grant> {
        Pools::try_take(&self.connection.0.requests, &self.budgets.0.requests, bytes)
    }

    /// Takes memory for a small request that has arrived completely, without waiting: from the pool for complete
    /// requests, or else as [`Self::try_request`] does. Returns `None` if there is not enough.
    pub fn try_complete_request(&self, bytes: usize) -> Option<Grant> {
        let try_take = || {
            let share = self.connection.0.complete_requests.try_take(bytes)?;
            Some(Grant::with_share(share, self.budgets.0.complete_requests.try_take(bytes)?))
        };
        try_take().or_else(|| self.try_request(bytes))
    }

    /// Takes memory for the bytes that a request has already received, before the request waits for memory for its
    /// whole message.
    ///
    /// # Errors
    /// `OVERLOADED`: the received bytes of other waiting requests use up the pool.
    pub fn try_waiting(&self, bytes: usize) -> Result<Grant, ApiError> {
        let permit = self.budgets.0.waiting.try_take(bytes);
        permit.map(Grant::without_share).ok_or_else(|| {
            self.budgets
                .no_request_memory(bytes, "no memory for the request, and too many other requests wait for memory")
        })
    }

    /// Waits for memory for a request, at most `REQUEST_TIMEOUT`. During the wait, nothing more of the request is
    /// read, so the HTTP/2 window stops the sender. The wait ends stalled incomplete requests, and closes connections
    /// whose clients do not read.
    ///
    /// # Errors
    /// `OVERLOADED`: no memory became free in time.
    pub async fn request(self, bytes: usize) -> Result<Grant, ApiError> {
        let deadline = clock::monotonic() + REQUEST_TIMEOUT;
        let share = self.connection.0.requests.of(bytes).take(bytes);
        let Ok(share) = tokio::time::timeout_at(deadline, share).await else {
            let message = "other requests of this connection hold the whole share of one connection";
            return Err(self.budgets.no_request_memory(bytes, message));
        };
        let queued = QueuedRequest::new(&self.budgets.0.queues[usize::from(bytes > SMALL_BYTES)], bytes);
        let mut pending_permit = std::pin::pin!(self.budgets.0.requests.of(bytes).take(bytes));
        loop {
            if let Ok(pool) = tokio::time::timeout(queued.interval(), &mut pending_permit).await {
                return Ok(Grant::with_share(share, pool));
            }
            let now = clock::monotonic();
            if now >= deadline {
                return Err(self.budgets.no_request_memory(bytes, "no memory for the request became free in time"));
            }
            if let Some(wanted_bytes) = queued.begin_search(now) {
                self.budgets.0.incomplete.end_stalled(bytes, wanted_bytes, now);
                self.budgets.0.connections.close_unread(MemoryKind::Requests);
            }
        }
    }

    /// Takes memory for the parts of a request that has arrived completely, without waiting. Returns `None` if there is
    /// not enough; the caller then waits with [`Self::parts`].
    pub fn try_parts(&self, parts: usize) -> Option<Grant> {
        Pools::try_take(&self.connection.0.parts, &self.budgets.0.parts, parts * PART_BYTES)
    }

    /// Waits for memory for the parts of a request, at most `REQUEST_TIMEOUT`. The caller holds back the last bytes
    /// of the request during the wait, so the request is not decoded.
    ///
    /// # Errors
    /// `OVERLOADED`: no memory became free in time.
    pub async fn parts(self, parts: usize) -> Result<Grant, ApiError> {
        let bytes = parts * PART_BYTES;
        let (shares, pools) = (&self.connection.0.parts, &self.budgets.0.parts);
        let take = async {
            let share = shares.of(bytes).take(bytes).await;
            Grant::with_share(share, self.budgets.take(pools.of(bytes), bytes, MemoryKind::Requests).await)
        };
        let granted = tokio::time::timeout(REQUEST_TIMEOUT, take).await;
        let reason = "no memory for the parts of the request became free in time";
        granted.map_err(|_| self.budgets.no_request_memory(bytes, reason))
    }

    /// Stores size and memory of a completely read request until its handler calls [`Self::take_request`].
    pub fn deliver(&self, bytes: usize, grants: impl IntoIterator<Item = Grant>) {
        let mut call = self.call.lock();
        call.request.bytes = bytes;
        call.request.grants.extend(grants);
    }

    /// Returns size and memory of the request that was read last, and removes them from the call. Dropping the value
    /// frees the memory.
    pub fn take_request(&self) -> ReceivedRequest {
        std::mem::take(&mut self.call.lock().request)
    }

    /// Registers a request of this call as incomplete until the returned guard is dropped. The request has held `bytes`
    /// of memory since the time `since`.
    pub fn incomplete(&self, bytes: usize, since: Instant) -> IncompleteGuard {
        IncompleteGuard {
            budgets: self.budgets.clone(),
            request: self.budgets.0.incomplete.add(bytes, since, &self.connection.0),
        }
    }

    /// Takes memory for a response without waiting: `bytes` from the large pool if they are free, else `min_bytes`.
    /// Returns the grant and its bytes, or `None` if not even `min_bytes` are free.
    pub(super) fn try_response(&self, bytes: usize, min_bytes: usize) -> Option<(ResponseGrant, usize)> {
        let take = |bytes: usize, is_small| {
            let (share, pool) = self.response_pools(is_small);
            let grant = Grant::with_share(share.try_take(bytes)?, pool.try_take(bytes)?);
            Some((ResponseGrant { grant, is_small }, bytes))
        };
        let large = if bytes > min_bytes { take(bytes, false) } else { None };
        large.or_else(|| take(min_bytes, self.is_small(min_bytes)))
    }

    /// Takes memory as [`Self::try_response`] does. If there is none, waits for `min_bytes`.
    pub(super) async fn response(&self, bytes: usize, min_bytes: usize) -> (ResponseGrant, usize) {
        if let Some(granted) = self.try_response(bytes, min_bytes) {
            return granted;
        }
        let is_small = self.is_small(min_bytes);
        let (share, pool) = self.response_pools(is_small);
        let share = share.take(min_bytes).await;
        let pool = self.budgets.take(pool, min_bytes, MemoryKind::Responses).await;
        (ResponseGrant { grant: Grant::with_share(share, pool), is_small }, min_bytes)
    }

    /// Returns true if a response of `min_bytes` uses the small pool. A response larger than the connection's share of
    /// the small pool uses the large pool.
    fn is_small(&self, min_bytes: usize) -> bool {
        min_bytes <= self.connection.0.responses.small.bytes()
    }

    /// Returns the connection's share and the pool of small or of large responses.
    fn response_pools(&self, is_small: bool) -> (&MemoryBudget, &MemoryBudget) {
        let (shares, pools) = (&self.connection.0.responses, &self.budgets.0.responses);
        if is_small { (&shares.small, &pools.small) } else { (&shares.large, &pools.large) }
    }

    /// Takes memory of the large response pool for reading `bytes` that belong to no response, such as a search by
    /// timestamp. Waits without a limit.
    pub(super) async fn read(&self, bytes: usize) -> Grant {
        let share = self.connection.0.responses.large.take(bytes).await;
        let pool = self.budgets.take(&self.budgets.0.responses.large, bytes, MemoryKind::Responses).await;
        Grant::with_share(share, pool)
    }

    /// Returns the error for a response whose memory did not become free in time.
    pub(super) fn no_response_memory(&self) -> ApiError {
        let max = self.budgets.0.response_bytes;
        let message = format!(
            "no memory for the response became free in time: unread responses hold it, and all responses share {max} \
             bytes (limits.response_memory_bytes); retry later"
        );
        ApiError::new(ErrorCode::Overloaded, message).with("max", max)
    }

    /// Takes additional memory for the response that is being built, without waiting. The response holds this memory
    /// until it has been sent.
    ///
    /// # Errors
    /// `OVERLOADED`: there is not enough memory.
    pub(crate) fn reserve_more(&self, bytes: usize) -> Result<(), ApiError> {
        let grant = self.take_more(bytes)?;
        self.call.lock().completed.push(grant);
        Ok(())
    }

    /// Takes memory from the pool of large responses, without waiting. If there is not enough, closes connections whose
    /// clients do not read, and fails with `OVERLOADED`.
    fn take_more(&self, bytes: usize) -> Result<Grant, ApiError> {
        let taken = (self.connection.0.responses.large.try_take(bytes), self.budgets.0.responses.large.try_take(bytes));
        let (Some(share), Some(pool)) = taken else {
            self.budgets.0.connections.close_unread(MemoryKind::Responses);
            let max = self.budgets.0.response_bytes;
            let message = format!(
                "no memory for the response of {bytes} bytes: all responses share {max} bytes \
                 (limits.response_memory_bytes), and unread responses hold a part of them; retry later"
            );
            return Err(ApiError::new(ErrorCode::Overloaded, message).with("bytes", bytes).with("max", max));
        };
        Ok(Grant::with_share(share, pool))
    }

    /// Takes memory for the state of the partitions that a fetch or read names, without waiting.
    ///
    /// # Errors
    /// `OVERLOADED`: there is not enough memory.
    pub(super) fn session(&self, bytes: usize) -> Result<Grant, ApiError> {
        let share = self.connection.0.sessions.try_take(bytes);
        let grant = share.and_then(|share| Some(Grant::with_share(share, self.budgets.0.sessions.try_take(bytes)?)));
        grant.ok_or_else(|| {
            let max = self.budgets.0.response_bytes / SESSION_SHARE;
            let message = format!(
                "no memory for the partitions of the request: they need {bytes} bytes, and all fetches and reads share \
                 {max} bytes (an eighth of limits.response_memory_bytes), of which one connection may take a quarter: \
                 name fewer partitions"
            );
            ApiError::new(ErrorCode::Overloaded, message).with("bytes", bytes).with("max", max)
        })
    }

    /// Frees the memory of a completed response above `bytes`. The rest stays charged until the response has been sent.
    pub(super) fn complete_response(&self, mut response: ResponseGrant, bytes: usize) {
        response.shrink(bytes);
        self.call.lock().completed.push(response.grant);
    }

    /// Extends the memory of a response to `bytes` again, without waiting. Returns true if there was enough.
    pub(super) fn try_grow(&self, response: &mut ResponseGrant, bytes: usize) -> bool {
        let (share, pool) = self.response_pools(response.is_small);
        response.grant.try_grow(share, pool, bytes)
    }

    /// Extends the deadline by which the client must take the next piece of the response. Called when HTTP/2 has taken
    /// a piece of the data that was passed to it.
    pub fn on_piece_taken(&self) {
        if let Some(unread) = &self.call.lock().unread {
            unread.renew();
        }
    }

    /// Charges `bytes` of a response that the caller passes to HTTP/2. The caller drops the returned value when HTTP/2
    /// has sent them. A response with records already holds most of this memory. A response without records, such as
    /// metadata, takes its memory here.
    ///
    /// # Errors
    /// `OVERLOADED`: there is not enough memory.
    pub fn begin_sending(&self, bytes: usize) -> Result<SendingResponse, ApiError> {
        let mut grants = std::mem::take(&mut self.call.lock().completed);
        let charged = grants.iter().map(Grant::bytes).sum::<usize>();
        if bytes > charged + UNCHARGED_BYTES {
            grants.push(self.take_more(bytes - charged)?);
        }
        let charged = grants.iter().map(Grant::bytes).sum();
        let mut call = self.call.lock();
        call.unsent_frames += 1;
        // HTTP/2 does not poll the call until the client reads, so the call cannot free memory before that.
        call.unread.get_or_insert_with(|| UnreadResponse::new(&self.connection.0)).on_data_passed(charged);
        drop(call);
        Ok(SendingResponse { call: Arc::clone(&self.call), _grants: grants })
    }

    /// Returns a decompressor for reads, which processes one batch of this connection at a time.
    pub(super) fn decompressor(&self, decompressor: &Decompressor) -> Decompressor {
        decompressor.for_caller(Arc::clone(&self.connection.0.decompression))
    }

    /// Returns a decompressor for recompression, which processes one batch of this connection at a time. Reads of the
    /// connection use [`Self::decompressor`], and do not wait for a recompression.
    pub(super) fn rewriter(&self, decompressor: &Decompressor) -> Decompressor {
        decompressor.for_caller(Arc::clone(&self.connection.0.recompression))
    }

    /// Returns one of the connection's permits for appends with `acks=tiered`; `None` if all are in use.
    pub(super) fn tiered_append(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.connection.0.tiered_appends).try_acquire_owned().ok()
    }

    /// Waits for one of the connection's permits to build a response from metadata. The caller holds the permit until
    /// the response has been sent.
    pub async fn metadata_permit(&self) -> OwnedSemaphorePermit {
        let permit = Arc::clone(&self.connection.0.metadata_calls).acquire_owned().await;
        permit.expect("the semaphore is never closed")
    }
}

/// A response frame that was passed to HTTP/2 and has not been sent. The frame is charged until this value is dropped.
#[derive(Debug)]
pub struct SendingResponse {
    call: Arc<Mutex<Call>>,
    _grants: Grants,
}

impl Drop for SendingResponse {
    fn drop(&mut self) {
        let mut call = self.call.lock();
        call.unsent_frames -= 1;
        if call.unsent_frames > 0 {
            return call.unread.iter().for_each(UnreadResponse::renew);
        }
        let unread = call.unread.take();
        // Dropping the registration takes a lock of the connection, so the lock of the call is released first.
        drop(call);
        drop(unread);
    }
}

/// Memory of one response, before the response is complete.
#[derive(Debug)]
pub(super) struct ResponseGrant {
    grant: Grant,
    /// True if the memory is from the small pools.
    is_small: bool,
}

impl ResponseGrant {
    /// Splits off `bytes` for a read, or everything if the grant has fewer.
    pub(super) fn split(&mut self, bytes: usize) -> Grant {
        self.grant.split(bytes)
    }

    /// Merges memory that was split off. If `part` is from other pools than this grant, the memory of `part` is freed.
    pub(super) fn merge(&mut self, part: Grant) {
        self.grant.merge(part);
    }

    /// Frees the memory above `bytes`.
    pub(super) fn shrink(&mut self, bytes: usize) {
        self.grant.shrink(bytes);
    }
}

/// Registration of an incomplete request, until this value is dropped.
#[derive(Debug)]
pub struct IncompleteGuard {
    budgets: Budgets,
    request: Arc<IncompleteRequest>,
}

impl IncompleteGuard {
    /// Returns the `OVERLOADED` error if the request must end because other requests wait for its memory. Otherwise,
    /// the task of `waker` is woken when the request must end.
    pub fn check(&self, waker: &std::task::Waker) -> Result<(), ApiError> {
        if !self.request.is_ended(waker) {
            return Ok(());
        }
        Err(self.budgets.no_request_memory(
            self.request.bytes,
            "the rest of the request did not arrive while other requests waited for its memory",
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
