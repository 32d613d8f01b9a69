//! Memory of one call: of its request, from the announced length to its handler, and of its response until HTTP/2 has
//! sent it.

use std::sync::Arc;

use smallvec::SmallVec;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use super::{
    Budgets, ConnectionMemory, Grant, PART_BYTES, Pools, REQUEST_TIMEOUT, SESSION_SHARE, SMALL_BYTES, UNCHARGED_BYTES,
    connections::{MemoryKind, UnreadResponse},
    incomplete::IncompleteRequest,
    queue::QueuedRequest,
};
use crate::{
    partition::{Decompressor, MemoryBudget},
    proto::error::{ApiError, ErrorCode},
    task::{clock, lock::Mutex},
};

/// Grants of one message: usually one for its bytes and one for its parts.
type Grants = SmallVec<[Grant; 2]>;

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
    pub(in crate::broker) bytes: usize,
    grants: Grants,
}

/// Memory and unsent response data of one call.
#[derive(Debug, Default)]
struct Call {
    /// Last request that was read, until its handler takes it.
    request: ReceivedRequest,
    /// Grants of complete response data that was not passed to HTTP/2 yet, and grants of [`CallMemory::reserve_more`].
    completed: Grants,
    /// Number of existing [`SendingResponse`] values: of response data that HTTP/2 has not sent yet.
    sending_count: usize,
    /// Registration of the call while `sending_count` is above 0; `None` otherwise.
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
            self.budgets.no_request_memory_error(
                bytes,
                "no memory for the request, and too many other requests wait for memory",
            )
        })
    }

    /// Waits for memory for a request, at most `REQUEST_TIMEOUT`. During the wait, nothing more of the request is
    /// read, so the HTTP/2 window stops the sender. A wait for the pool, not for the connection's share, ends stalled
    /// incomplete requests, and closes connections whose clients do not read.
    ///
    /// # Errors
    /// `OVERLOADED`: no memory became free in time.
    pub async fn request(self, bytes: usize) -> Result<Grant, ApiError> {
        let deadline = clock::monotonic() + REQUEST_TIMEOUT;
        let share = self.connection.0.requests.of(bytes).take(bytes);
        let Ok(share) = tokio::time::timeout_at(deadline, share).await else {
            let message = "other requests of this connection hold the whole share of one connection";
            return Err(self.budgets.no_request_memory_error(bytes, message));
        };
        let queued = QueuedRequest::new(&self.budgets.0.queues[usize::from(bytes > SMALL_BYTES)], bytes);
        let mut pending_permit = std::pin::pin!(self.budgets.0.requests.of(bytes).take(bytes));
        loop {
            if let Ok(pool) = tokio::time::timeout(queued.interval(), &mut pending_permit).await {
                return Ok(Grant::with_share(share, pool));
            }
            let now = clock::monotonic();
            if now >= deadline {
                return Err(self
                    .budgets
                    .no_request_memory_error(bytes, "no memory for the request became free in time"));
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
    /// of the request during the wait, so the request is not decoded. A wait for the pool closes connections whose
    /// clients do not read.
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
        granted.map_err(|_| self.budgets.no_request_memory_error(bytes, reason))
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
    pub fn register_incomplete(&self, bytes: usize, since: Instant) -> IncompleteGuard {
        IncompleteGuard {
            budgets: self.budgets.clone(),
            request: self.budgets.0.incomplete.add(bytes, since, &self.connection.0),
        }
    }

    /// Takes memory for a response without waiting: `bytes` from the large pool if they are free, else `min_bytes`.
    /// Returns the grant and its bytes, or `None` if not even `min_bytes` are free.
    pub(in crate::broker) fn try_response(&self, bytes: usize, min_bytes: usize) -> Option<(ResponseGrant, usize)> {
        let take = |bytes: usize, is_small| {
            let (share, pool) = self.response_pools(is_small);
            let grant = Grant::with_share(share.try_take(bytes)?, pool.try_take(bytes)?);
            Some((ResponseGrant { grant, is_small }, bytes))
        };
        let large = if bytes > min_bytes { take(bytes, false) } else { None };
        large.or_else(|| take(min_bytes, self.is_small(min_bytes)))
    }

    /// Takes memory as [`Self::try_response`] does. If there is none, waits for `min_bytes`. A wait for the pool closes
    /// connections whose clients do not read.
    pub(in crate::broker) async fn response(&self, bytes: usize, min_bytes: usize) -> (ResponseGrant, usize) {
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
    pub(in crate::broker) async fn read(&self, bytes: usize) -> Grant {
        let share = self.connection.0.responses.large.take(bytes).await;
        let pool = self.budgets.take(&self.budgets.0.responses.large, bytes, MemoryKind::Responses).await;
        Grant::with_share(share, pool)
    }

    /// Returns the error for a response whose memory did not become free in time.
    pub(in crate::broker) fn no_response_memory_error(&self) -> ApiError {
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

    /// Takes memory from the pool of large responses and from the connection's share, without waiting. If there is not
    /// enough, closes connections whose clients do not read, and fails with `OVERLOADED`.
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
    pub(in crate::broker) fn session(&self, bytes: usize) -> Result<Grant, ApiError> {
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
    pub(in crate::broker) fn complete_response(&self, mut response: ResponseGrant, bytes: usize) {
        response.shrink(bytes);
        self.call.lock().completed.push(response.grant);
    }

    /// Extends the memory of a response to `bytes` again, without waiting. Returns true if there was enough.
    pub(in crate::broker) fn try_grow(&self, response: &mut ResponseGrant, bytes: usize) -> bool {
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
    /// has sent these bytes. A response with records already holds most of this memory. A response without records,
    /// such as metadata, takes its memory here.
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
        call.sending_count += 1;
        // HTTP/2 does not poll the call until the client reads, so the call cannot free memory before that.
        call.unread.get_or_insert_with(|| UnreadResponse::new(&self.connection.0)).on_data_passed(charged);
        drop(call);
        Ok(SendingResponse { call: Arc::clone(&self.call), _grants: grants })
    }

    /// Returns a decompressor for reads, which processes one batch of this connection at a time.
    pub(in crate::broker) fn decompressor(&self, decompressor: &Decompressor) -> Decompressor {
        decompressor.for_caller(Arc::clone(&self.connection.0.decompression))
    }

    /// Returns a decompressor for recompression, which processes one batch of this connection at a time. Reads of the
    /// connection use [`Self::decompressor`], and do not wait for a recompression.
    pub(in crate::broker) fn rewriter(&self, decompressor: &Decompressor) -> Decompressor {
        decompressor.for_caller(Arc::clone(&self.connection.0.recompression))
    }

    /// Returns one of the connection's permits for appends with `acks=tiered`; `None` if all are in use.
    pub(in crate::broker) fn tiered_append(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.connection.0.tiered_appends).try_acquire_owned().ok()
    }

    /// Waits for one of the connection's permits to build a response from metadata. The caller holds the permit until
    /// the response has been sent.
    pub async fn metadata_permit(&self) -> OwnedSemaphorePermit {
        let permit = Arc::clone(&self.connection.0.metadata_calls).acquire_owned().await;
        permit.expect("the semaphore is never closed")
    }
}

/// Response data that was passed to HTTP/2 and has not been sent. The data is charged until this value is dropped.
#[derive(Debug)]
pub struct SendingResponse {
    call: Arc<Mutex<Call>>,
    _grants: Grants,
}

impl Drop for SendingResponse {
    fn drop(&mut self) {
        let mut call = self.call.lock();
        call.sending_count -= 1;
        if call.sending_count > 0 {
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
pub(in crate::broker) struct ResponseGrant {
    grant: Grant,
    /// True if the memory is from the small pools.
    is_small: bool,
}

impl ResponseGrant {
    /// Splits off `bytes` for a read, or everything if the grant has fewer.
    pub(in crate::broker) fn split(&mut self, bytes: usize) -> Grant {
        self.grant.split(bytes)
    }

    /// Merges memory that was split off. If `part` is from other pools than this grant, the memory of `part` is freed.
    pub(in crate::broker) fn merge(&mut self, part: Grant) {
        self.grant.merge(part);
    }

    /// Frees the memory above `bytes`.
    pub(in crate::broker) fn shrink(&mut self, bytes: usize) {
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
        Err(self.budgets.no_request_memory_error(
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
