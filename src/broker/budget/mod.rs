//! Memory budgets of a broker: one for requests in progress, and one for responses. Each connection may use only a
//! share of each budget.
//!
//! # Overview
//!
//! Each budget has a pool for small messages and one for large messages, so large messages never delay small ones.
//! Small requests that have arrived completely use a third pool, which no client can occupy by sending nothing. If that
//! pool or the connection's share of it is used up, they use the pool for small messages.
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
//! - A request whose bytes do not arrive loses the memory that other requests wait for. While other requests wait for a
//!   pool, requests of that pool that have been incomplete for longer than [`arrival_timeout`] fail with `OVERLOADED`,
//!   the oldest first.
//! - A connection is closed (`connections`) if its client does not read and other calls wait for memory that the
//!   connection holds.
//! - An append request is charged until its batch has produce memory. A response above 4 KiB is charged until HTTP/2
//!   has written its last byte, also if the client has read a part of the response.

mod call;
mod connections;
mod grant;
mod incomplete;
mod queue;

use std::{sync::Arc, time::Duration};

use tokio::sync::OwnedSemaphorePermit;

pub(super) use self::call::ResponseGrant;
pub use self::{
    call::{CallMemory, IncompleteGuard, SendingResponse},
    connections::ConnectionMemory,
    grant::Grant,
};
use self::{
    connections::{Connections, MemoryKind, SEARCH_INTERVAL},
    incomplete::IncompleteRequests,
    queue::RequestQueue,
};
use crate::{
    partition::MemoryBudget,
    proto::error::{ApiError, ErrorCode},
};

/// Maximum size of a message that uses a small pool, in bytes. This size allows a batch of 64 KiB, the most common
/// size, and the rest of its message.
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
const SMALL_ARRIVAL_TIMEOUT: Duration = Duration::from_millis(10);

/// Part of the [`arrival_timeout`] of a large request that does not depend on its size. The other part is the time for
/// its bytes at [`MIN_BYTES_PER_SECOND`].
const MIN_LARGE_ARRIVAL_TIMEOUT: Duration = Duration::from_secs(1);

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
fn arrival_timeout(bytes: usize) -> Duration {
    if bytes <= SMALL_BYTES {
        return SMALL_ARRIVAL_TIMEOUT;
    }
    MIN_LARGE_ARRIVAL_TIMEOUT + Duration::from_secs((bytes / MIN_BYTES_PER_SECOND) as u64)
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

    /// Registers a new connection, and returns its shares: a part of each pool, except of the pool for the bytes of
    /// waiting requests. `close` is called to close the connection if its client does not read while other calls wait
    /// for memory.
    pub fn open_connection(&self, close: impl Fn() + Send + Sync + 'static) -> ConnectionMemory {
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
    fn no_request_memory_error(&self, bytes: usize, reason: &str) -> ApiError {
        let max = self.0.request_bytes;
        let message = format!(
            "{reason}: the request has {bytes} bytes, and all requests share {max} bytes \
             (limits.request_memory_bytes); retry later"
        );
        ApiError::new(ErrorCode::Overloaded, message).with("bytes", bytes).with("max", max)
    }
}

#[cfg(test)]
mod tests;
