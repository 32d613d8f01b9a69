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
//! - A request is charged until its batch has produce memory, a response until the connection took its bytes.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::task::AtomicWaker;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use crate::{
    partition::Memory,
    proto::fault::{Fault, Reason},
    task::clock,
};

/// Requests and responses up to this size use the pool of small ones.
pub const SMALL_BYTES: usize = 64 << 10;

/// Memory that one repeated part of a request takes at most when it has become a struct, in a list that grows.
const PART_BYTES: usize = 256;

/// The share of request memory for the parts of requests, as a divisor.
const PARTS_SHARE: u64 = 4;

/// How long a request waits for memory.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a small request may be incomplete while others wait.
const SMALL_GRACE: Duration = Duration::from_millis(10);

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
    Duration::from_secs(1 + (bytes / MIN_BYTES_PER_SECOND) as u64)
}

/// The budgets of a broker. Clones share them.
#[derive(Clone, Debug)]
pub struct Budgets(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    requests: Pools,
    parts: Pools,
    responses: Pools,
    request_bytes: u64,
    response_bytes: u64,
    incomplete: Mutex<Incomplete>,
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

/// Requests of which a part is there and the rest has not come, oldest first.
#[derive(Debug, Default)]
struct Incomplete {
    next: u64,
    requests: BTreeMap<u64, Arc<IncompleteRequest>>,
}

#[derive(Debug)]
struct IncompleteRequest {
    bytes: usize,
    since: Instant,
    ended: AtomicBool,
    waker: AtomicWaker,
}

/// Memory that one connection holds. Clones share it.
#[derive(Clone, Debug)]
pub struct ConnectionMemory(Arc<Account>);

#[derive(Debug)]
struct Account {
    requests: Pools,
    parts: Pools,
    responses: Pools,
    /// Taken while a batch of this connection is decompressed.
    decompression: Arc<Semaphore>,
    metadata_calls: Arc<Semaphore>,
}

/// Memory taken of a connection's part and of the budget.
#[derive(Debug)]
pub struct Grant {
    permits: Vec<OwnedSemaphorePermit>,
}

impl Grant {
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
            requests: Pools::new(request_bytes - request_bytes / PARTS_SHARE),
            parts: Pools::new(request_bytes / PARTS_SHARE),
            responses: Pools::new(response_bytes),
            request_bytes,
            response_bytes,
            incomplete: Mutex::default(),
        }))
    }

    /// The part of a new connection.
    pub fn connection(&self) -> ConnectionMemory {
        let part = |bytes: u64| Pools::new(bytes / CONNECTION_SHARE);
        let parts_bytes = self.0.request_bytes / PARTS_SHARE;
        ConnectionMemory(Arc::new(Account {
            requests: part(self.0.request_bytes - parts_bytes),
            parts: part(parts_bytes),
            responses: part(self.0.response_bytes),
            decompression: Arc::new(Semaphore::new(1)),
            metadata_calls: Arc::new(Semaphore::new(METADATA_CALLS)),
        }))
    }

    /// Bytes that requests and responses have taken.
    pub fn taken(&self) -> (usize, usize) {
        let taken = |pools: &Pools| pools.small.taken() + pools.large.taken();
        (taken(&self.0.requests) + taken(&self.0.parts), taken(&self.0.responses))
    }

    fn incomplete(&self) -> MutexGuard<'_, Incomplete> {
        self.0.incomplete.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends requests that do not come, until so many bytes of the pool that a request of this size uses will be free.
    fn end_incomplete(&self, bytes: usize, now: Instant) {
        let mut freed = 0;
        for request in self.incomplete().requests.values() {
            let same_pool = (request.bytes <= SMALL_BYTES) == (bytes <= SMALL_BYTES);
            if !same_pool || now.saturating_duration_since(request.since) < grace(request.bytes) {
                continue;
            }
            if !request.ended.swap(true, Ordering::AcqRel) {
                request.waker.wake();
            }
            freed += request.bytes;
            if freed >= bytes {
                return;
            }
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
            self.budgets.end_incomplete(bytes, now);
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
            Grant { permits: vec![own, all.of(bytes).take(bytes).await] }
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
        let request =
            Arc::new(IncompleteRequest { bytes, since, ended: AtomicBool::new(false), waker: AtomicWaker::new() });
        let mut incomplete = self.budgets.incomplete();
        let id = incomplete.next;
        incomplete.next += 1;
        incomplete.requests.insert(id, Arc::clone(&request));
        drop(incomplete);
        IncompleteGuard { budgets: self.budgets.clone(), id, request }
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
        let all = all.take(least).await;
        (ResponseGrant { grant: Grant { permits: vec![own, all] }, is_small }, least)
    }

    /// Takes more for a response that is being made, and charges it with that.
    ///
    /// # Errors
    /// `OVERLOADED` where there is not as much.
    pub(super) fn reserve_more(&self, bytes: usize) -> Result<(), Fault> {
        let taken = (self.connection.0.responses.large.try_take(bytes), self.budgets.0.responses.large.try_take(bytes));
        let (Some(own), Some(all)) = taken else {
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
        let sent = std::mem::take(&mut self.call().handed);
        drop(sent);
    }

    /// Hands the response made so far to the connection.
    pub fn on_body_handed(&self) {
        let mut call = self.call();
        let made = std::mem::take(&mut call.made);
        call.handed.extend(made);
    }

    /// The turn of this connection to decompress: one batch at a time.
    pub(super) async fn decompression_turn(&self) -> OwnedSemaphorePermit {
        let turn = Arc::clone(&self.connection.0.decompression).acquire_owned().await;
        turn.expect("the semaphore is never closed")
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
    id: u64,
    request: Arc<IncompleteRequest>,
}

impl IncompleteGuard {
    /// Why the request ends, where others need its memory; wakes the task when that becomes so.
    pub fn check(&self, waker: &std::task::Waker) -> Result<(), Fault> {
        self.request.waker.register(waker);
        if !self.request.ended.load(Ordering::Acquire) {
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
        self.budgets.incomplete().requests.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits;

    const MIB: usize = 1 << 20;

    fn call(budgets: &Budgets) -> CallMemory {
        CallMemory::new(budgets.clone(), budgets.connection())
    }

    #[tokio::test(start_paused = true)]
    async fn one_connection_gets_a_part_and_others_the_rest() {
        let budgets = Budgets::new(64 * MIB as u64, 64 * MIB as u64);
        let first = call(&budgets);
        let mut held: Vec<_> = (0..9).map(|_| first.try_request(MIB).expect("its part")).collect();
        assert!(first.try_request(MIB).is_none(), "a quarter of the pool of large requests");
        let other = call(&budgets);
        held.extend((0..9).map(|_| other.try_request(MIB).expect("its own part")));
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
        for bytes in [SMALL_BYTES, 9 * MIB] {
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
            let ended = |(guard, _): &(IncompleteGuard, Grant)| guard.request.ended.load(Ordering::Acquire);
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
}
