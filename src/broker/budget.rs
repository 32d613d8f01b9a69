//! Memory of requests and responses that are under way: a budget for each, of which one connection gets a part.
//!
//! # Overview
//!
//! Each budget has two pools. Small messages have one of their own, so that large ones never hold them up. A connection takes from its own
//! part of a pool first, then from the pool, each in turn: at most so much waits in the queue of a pool for one connection as it may hold.
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
//! - A request is charged until its batch has produce memory, a response until the connection took its bytes.

mod connections;
mod incomplete;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::OwnedSemaphorePermit, time::Instant};

pub use self::connections::ConnectionMemory;
use self::{
    connections::{Connections, MemoryKind, SEARCH_INTERVAL, UnreadResponse},
    incomplete::{IncompleteRequest, IncompleteRequests},
};
use crate::{
    partition::{Memory, Opener},
    proto::fault::{Fault, Reason},
    task::clock,
};

/// Requests and responses up to this size use the pool of small ones.
pub const SMALL_BYTES: usize = 64 << 10;

/// Memory that one repeated part of a request takes at most when it has become a struct, in a list that grows.
const PART_BYTES: usize = 256;

/// The share of request memory for the parts of requests, as a divisor.
const PARTS_SHARE: u64 = 4;

/// The share of request memory for what came of requests that wait for memory, as a divisor.
const WAITING_SHARE: u64 = 16;

/// Bytes of a waiting request that are not counted.
pub const WAITING_BYTES: usize = 4 << 10;

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
    parts: Pools,
    waiting: Memory,
    responses: Pools,
    request_bytes: u64,
    response_bytes: u64,
    incomplete: IncompleteRequests,
    connections: Arc<Connections>,
}

#[derive(Clone, Debug)]
struct Pools {
    small: Memory,
    large: Memory,
}

impl Pools {
    /// A quarter for small messages.
    fn new(bytes: u64) -> Self {
        Self { small: Memory::new(bytes / 4), large: Memory::new(bytes - bytes / 4) }
    }

    const fn of(&self, bytes: usize) -> &Memory {
        if bytes <= SMALL_BYTES { &self.small } else { &self.large }
    }

    /// Takes from a connection's part and from the whole, where both have as much.
    fn try_take(own: &Self, all: &Self, bytes: usize) -> Option<Grant> {
        let own = own.of(bytes).try_take(bytes)?;
        let all = all.of(bytes).try_take(bytes)?;
        Some(Grant { permits: vec![own, all] })
    }
}

/// Memory taken of a connection's part and of the budget.
#[derive(Debug)]
pub struct Grant {
    permits: Vec<OwnedSemaphorePermit>,
}

impl Grant {
    fn bytes(&self) -> usize {
        self.permits.first().map_or(0, Memory::bytes_of)
    }

    /// Gives back what is above `bytes`.
    fn shrink(&mut self, bytes: usize) {
        for permit in &mut self.permits {
            let surplus = permit.num_permits().saturating_sub(Memory::units(bytes));
            drop(permit.split(surplus));
        }
    }
}

impl Budgets {
    /// Budgets of so many bytes.
    pub fn new(request_bytes: u64, response_bytes: u64) -> Self {
        Self(Arc::new(Inner {
            requests: Pools::new(request_bytes - request_bytes / PARTS_SHARE - request_bytes / WAITING_SHARE),
            parts: Pools::new(request_bytes / PARTS_SHARE),
            waiting: Memory::new(request_bytes / WAITING_SHARE),
            responses: Pools::new(response_bytes),
            request_bytes,
            response_bytes,
            incomplete: IncompleteRequests::default(),
            connections: Arc::default(),
        }))
    }

    /// The part of a new connection, which `close` ends.
    pub fn connection(&self, close: impl Fn() + Send + Sync + 'static) -> ConnectionMemory {
        let Inner { request_bytes, response_bytes, .. } = *self.0;
        let parts_bytes = request_bytes / PARTS_SHARE;
        let shares = [request_bytes - parts_bytes - request_bytes / WAITING_SHARE, parts_bytes, response_bytes];
        self.0.connections.open(shares.map(|bytes| Pools::new(bytes / CONNECTION_SHARE)), close)
    }

    /// Bytes that requests and responses have taken.
    pub fn taken(&self) -> (usize, usize) {
        let taken = |pools: &Pools| pools.small.taken() + pools.large.taken();
        (taken(&self.0.requests) + taken(&self.0.parts) + self.0.waiting.taken(), taken(&self.0.responses))
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

#[derive(Debug, Default)]
struct Call {
    /// Requests that were read, and that their handler has not taken.
    requests: Vec<Grant>,
    /// Responses that were made and not handed to the connection yet.
    made: Vec<Grant>,
    /// Those that were handed over; they have been sent when more is asked for.
    handed: Vec<Grant>,
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

    /// Takes memory for what came of a request that is to wait.
    ///
    /// # Errors
    /// `OVERLOADED` where others that wait hold too much.
    pub fn try_waiting(&self, bytes: usize) -> Result<Grant, Fault> {
        let permit = self.budgets.0.waiting.try_take(bytes);
        permit.map(|permit| Grant { permits: vec![permit] }).ok_or_else(|| {
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
        let mut all = std::pin::pin!(self.budgets.0.requests.of(bytes).take(bytes));
        loop {
            if let Ok(all) = tokio::time::timeout(SMALL_GRACE, &mut all).await {
                return Ok(Grant { permits: vec![own, all] });
            }
            let now = clock::monotonic();
            if now >= deadline {
                return Err(self.budgets.no_request_memory(bytes, "no memory for the request came free"));
            }
            self.budgets.0.incomplete.end(bytes, now);
            self.budgets.0.connections.close_unread(MemoryKind::Requests);
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
            Grant { permits: vec![own, self.budgets.take(all.of(bytes), bytes, MemoryKind::Requests).await] }
        };
        let in_time = tokio::time::timeout(REQUEST_TIMEOUT, taken).await;
        in_time.map_err(|_| self.budgets.no_request_memory(bytes, "no memory for the request's parts came free"))
    }

    /// A request was read whole.
    pub fn deliver(&self, grants: impl IntoIterator<Item = Grant>) {
        self.call().requests.extend(grants);
    }

    /// Takes over the memory of the request that was read last. Dropping the value gives it back.
    pub fn take_request(&self) -> Vec<Grant> {
        std::mem::take(&mut self.call().requests)
    }

    /// Notes that a request is incomplete, for as long as the value lives.
    pub fn incomplete(&self, bytes: usize, since: Instant) -> IncompleteGuard {
        IncompleteGuard {
            budgets: self.budgets.clone(),
            request: self.budgets.0.incomplete.add(bytes, since, &self.connection.0),
        }
    }

    /// Memory for a response of up to `bytes`, or of up to `least` where others hold too much for that: the bytes that were granted.
    pub(super) async fn response(&self, bytes: usize, least: usize) -> (ResponseGrant, usize) {
        let (own, all) = (&self.connection.0.responses, &self.budgets.0.responses);
        if bytes > least
            && let Some(own) = own.large.try_take(bytes)
            && let Some(all) = all.large.try_take(bytes)
        {
            return (ResponseGrant { grant: Grant { permits: vec![own, all] }, is_small: false }, bytes);
        }
        // A response larger than the small part of one connection waits for the large pool.
        let is_small = least <= own.small.bytes();
        let (own, all) = if is_small { (&own.small, &all.small) } else { (&own.large, &all.large) };
        let own = own.take(least).await;
        let all = self.budgets.take(all, least, MemoryKind::Responses).await;
        (ResponseGrant { grant: Grant { permits: vec![own, all] }, is_small }, least)
    }

    /// Takes more for a response that is being made, and charges it with that.
    ///
    /// # Errors
    /// `OVERLOADED` where there is not as much.
    pub(crate) fn reserve_more(&self, bytes: usize) -> Result<(), Fault> {
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
        self.call().made.push(Grant { permits: vec![own, all] });
        Ok(())
    }

    /// A response of so many bytes was made of what was taken for it. It is charged until it has been sent.
    pub(super) fn made(&self, mut response: ResponseGrant, bytes: usize) {
        response.shrink(bytes);
        self.call().made.push(response.grant);
    }

    /// Takes again what a response gave back, up to `bytes`; whether there was as much.
    pub(super) fn grow(&self, response: &mut ResponseGrant, bytes: usize) -> bool {
        let (own, all) = (&self.connection.0.responses, &self.budgets.0.responses);
        let pools = if response.is_small { [&own.small, &all.small] } else { [&own.large, &all.large] };
        pools.into_iter().zip(&mut response.grant.permits).all(|(pool, permit)| pool.try_grow(permit, bytes))
    }

    /// More of the response's body is asked for: what was handed over before has been sent.
    pub fn on_body_polled(&self) {
        let mut call = self.call();
        let sent = (std::mem::take(&mut call.handed), call.unread.take());
        drop(call);
        drop(sent);
    }

    /// The client took a piece of what was handed over.
    pub fn on_piece_taken(&self) {
        if let Some(unread) = &self.call().unread {
            unread.renew();
        }
    }

    /// Hands the response made so far to the connection.
    pub fn on_body_handed(&self) {
        let mut call = self.call();
        let made = std::mem::take(&mut call.made);
        call.handed.extend(made);
        drop(call);
        self.on_response_begun();
    }

    /// The client is to read: until more is asked for, the call can give back nothing.
    pub fn on_response_begun(&self) {
        let mut call = self.call();
        let bytes = call.made.iter().chain(&call.handed).map(Grant::bytes).sum();
        call.unread.get_or_insert_with(|| UnreadResponse::new(&self.connection.0, bytes));
    }

    /// Opens the batches of this connection one at a time.
    pub(super) fn opener(&self, opener: &Opener) -> Opener {
        opener.for_caller(Arc::clone(&self.connection.0.decompression))
    }

    /// The turn of a call whose answer is made of metadata, until that was sent.
    pub async fn metadata_turn(&self) -> OwnedSemaphorePermit {
        let turn = Arc::clone(&self.connection.0.metadata_calls).acquire_owned().await;
        turn.expect("the semaphore is never closed")
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
mod tests {
    use super::{connections::UNREAD_TIMEOUT, *};
    use crate::limits;

    const MIB: usize = 1 << 20;

    fn call(budgets: &Budgets) -> CallMemory {
        CallMemory::new(budgets.clone(), budgets.connection(|| {}))
    }

    #[tokio::test(start_paused = true)]
    async fn one_connection_gets_a_part_and_others_the_rest() {
        let budgets = Budgets::new(64 * MIB as u64, 64 * MIB as u64);
        let first = call(&budgets);
        let mut held: Vec<_> = (0..8).map(|_| first.try_request(MIB).expect("its part")).collect();
        assert!(first.try_request(MIB).is_none(), "a quarter of the pool of large requests");
        let other = call(&budgets);
        held.extend((0..8).map(|_| other.try_request(MIB).expect("its own part")));
        let refused = first.clone().request(MIB).await.expect_err("its own requests hold its part");
        assert_eq!(refused.reason, Reason::Overloaded);
        for word in ["1048576", "67108864", "limits.request_memory_bytes"] {
            assert!(refused.message.contains(word), "{word}: {refused}");
        }
        drop(held);
        assert_eq!(budgets.taken(), (0, 0));
        first.request(MIB).await.expect("there is room again");
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_do_not_come_make_room_for_others() {
        let budgets = Budgets::new(64 * MIB as u64, MIB as u64);
        for bytes in [SMALL_BYTES, 8 * MIB] {
            let full: Vec<_> = std::iter::from_fn(|| {
                let call = call(&budgets);
                let grant = call.try_request(bytes)?;
                Some((call.incomplete(bytes, clock::monotonic()), grant))
            })
            .collect();
            assert!(full.len() >= 4);
            let mut waits = tokio::task::JoinSet::new();
            waits.spawn(call(&budgets).request(1000.max(bytes / 2)));
            let oldest = &full[0].0;
            std::future::poll_fn(|cx| match oldest.check(cx.waker()) {
                Ok(()) => std::task::Poll::Pending,
                Err(fault) => std::task::Poll::Ready(fault),
            })
            .await;
            let ended = |(guard, _): &(IncompleteGuard, Grant)| guard.request.is_ended(std::task::Waker::noop());
            assert_eq!(full.iter().filter(|request| ended(request)).count(), 1, "no more than needed");
            drop(full);
            waits.join_next().await.expect("it waits").expect("no panic").expect("there is room");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn parts_have_memory_of_their_own() {
        let budgets = Budgets::new(512 * MIB as u64, MIB as u64);
        let call = call(&budgets);
        let message = call.clone().request(512 * MIB).await.expect("it comes alone");
        let parts = call.try_parts(limits::MAX_REQUEST_PARTS).expect("as many as there may be");
        assert!(call.try_parts(limits::MAX_REQUEST_PARTS).is_none(), "one at a time of one connection");
        let (waiting, small) = (call.clone().parts(limits::MAX_REQUEST_PARTS), call.try_parts(1));
        assert!(small.is_some(), "few parts do not wait for many");
        drop(small);
        let with_parts = budgets.taken().0;
        call.deliver([message]);
        drop(call.take_request());
        assert!(with_parts > budgets.taken().0);
        assert_eq!(budgets.taken().0, limits::MAX_REQUEST_PARTS * PART_BYTES);
        let refused = call.clone().parts(limits::MAX_REQUEST_PARTS).await.expect_err("they are held for too long");
        assert_eq!(refused.reason, Reason::Overloaded);
        drop(parts);
        drop(waiting.await.expect("there is room"));
        assert_eq!(budgets.taken(), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_is_charged_until_it_was_sent() {
        let budgets = Budgets::new(MIB as u64, 256 * MIB as u64);
        let call = call(&budgets);
        let (grant, bytes) = call.response(32 * MIB, MIB).await;
        assert_eq!(bytes, 32 * MIB);
        call.made(grant, MIB);
        assert_eq!(budgets.taken().1, MIB);
        call.on_body_polled();
        call.on_body_handed();
        assert_eq!(budgets.taken().1, MIB, "it is on its way");
        let (_held, bytes) = call.response(40 * MIB, MIB).await;
        assert_eq!(bytes, 40 * MIB);
        let (_small, bytes) = call.response(40 * MIB, MIB).await;
        assert_eq!(bytes, MIB, "its part is used up: small responses go on");
        call.on_body_polled();
        assert_eq!(budgets.taken().1, 41 * MIB, "it was sent");
    }

    /// Four connections that read nothing held all memory of responses for ever.
    #[tokio::test(start_paused = true)]
    async fn connections_that_read_nothing_are_closed_when_others_wait() {
        let budgets = Budgets::new(64 * MIB as u64, 64 * MIB as u64);
        let closed = Arc::new(Mutex::new(Vec::new()));
        let connection = |number: usize| {
            let closed = Arc::clone(&closed);
            budgets.connection(move || closed.lock().unwrap().push(number))
        };
        let mut calls = Vec::new();
        for (number, bytes) in [12 * MIB, 11 * MIB, 10 * MIB, 12 * MIB].into_iter().enumerate() {
            let call = CallMemory::new(budgets.clone(), connection(number));
            let (grant, _) = call.response(bytes, MIB).await;
            call.made(grant, bytes);
            call.on_body_handed();
            calls.push(Some(call));
        }
        // The first one reads on, and has nothing.
        calls[0].as_ref().unwrap().on_body_polled();
        let held = calls[0].as_ref().unwrap().response(12 * MIB, MIB).await;
        tokio::time::advance(UNREAD_TIMEOUT * 10).await;
        assert!(closed.lock().unwrap().is_empty(), "nobody needs their memory");

        let honest = CallMemory::new(budgets.clone(), connection(4));
        let ((_grant, bytes), ()) = tokio::join!(honest.response(12 * MIB, 12 * MIB), async {
            while closed.lock().unwrap().is_empty() {
                tokio::time::sleep(SEARCH_INTERVAL).await;
            }
            calls[3] = None;
        });
        assert_eq!(bytes, 12 * MIB);
        let closed: std::collections::BTreeSet<_> = closed.lock().unwrap().iter().copied().collect();
        assert_eq!(closed, [1, 2, 3].into(), "those that do not read");
        drop(held);
    }

    /// A response that was handed over a moment ago is being read.
    #[tokio::test(start_paused = true)]
    async fn clients_have_time_to_read() {
        let budgets = Budgets::new(64 * MIB as u64, 4 * MIB as u64);
        let reading = CallMemory::new(budgets.clone(), budgets.connection(|| panic!("it is read")));
        let all: Vec<_> = std::iter::from_fn(|| {
            let call = call(&budgets);
            let taken = Pools::try_take(&call.connection.0.responses, &budgets.0.responses, SMALL_BYTES + 1)?;
            Some((call, taken))
        })
        .collect();
        assert!(!all.is_empty());
        let waiting = call(&budgets);
        let mut waits = std::pin::pin!(waiting.response(2 * MIB, 2 * MIB));
        for _ in 0..20 {
            reading.on_body_polled();
            reading.on_body_handed();
            let waited = tokio::time::timeout(UNREAD_TIMEOUT / 2, &mut waits).await;
            assert!(waited.is_err(), "others hold it");
        }
    }
}
