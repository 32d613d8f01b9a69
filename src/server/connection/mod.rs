//! The sockets of one listener and their limits. Each listener has a [`ConnectionLimiter`] with a limited number of
//! slots, one for each connection. `connection_slots` decides which connection gets a slot and which one is evicted;
//! this module closes the evicted one.
//!
//! A [`CloseSignal`] closes a connection: it wakes the connection's task, whose next read or write then fails.

mod socket;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::Context,
    time::Duration,
};

use futures::{Stream, StreamExt as _, task::AtomicWaker};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::server::TcpIncoming;

pub(super) use self::socket::{CountedConnection, IDLE_TIMEOUT};
use super::{
    connection_limits::Capacity,
    connection_slots::{ConnectionSlots, Origin, Pool, SlotLimit},
};
use crate::{
    broker::{Budgets, ConnectionMemory, ProducerIdQuota},
    task::{Tasks, clock, lock::Mutex},
    telemetry::{Counter, GaugeU64, LogThrottle, Metrics},
};

/// The maximum number of open calls and streams is `limits.memory_bytes` divided by this number. A waiting call uses 7
/// KiB, and as much again for the partitions that it names.
const BYTES_PER_CALL: u64 = 32 << 10;

/// Pause before the next accept after the system had no resources for another connection.
const ACCEPT_DELAY: Duration = Duration::from_millis(100);

/// Kind of listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ListenerKind {
    Grpc,
    Http,
    Peer,
}

/// Counts and limits the connections of one listener. Clones share the state.
#[derive(Clone)]
pub(super) struct ConnectionLimiter(Arc<LimiterState>);

struct LimiterState {
    kind: ListenerKind,
    capacity: Capacity,
    /// Maximum number of connections of one address in the common pool.
    per_address: usize,
    /// Setting or system limit that raises `per_address`.
    address_raised_by: &'static str,
    /// Number of open calls of all connections. While it is reached, a connection may begin a call only below its
    /// share.
    max_calls: usize,
    slots: Mutex<ConnectionSlots<Arc<CloseSignal>>>,
    throttles: Throttles,
    /// Gauge of open connections; `None` for a listener without this metric.
    open: Option<GaugeU64>,
    refused: Counter,
    evicted: Counter,
    unread_closed: Counter,
}

/// Log throttles of the conditions that a listener reports.
#[derive(Default)]
struct Throttles {
    full: Mutex<LogThrottle>,
    full_for_address: Mutex<LogThrottle>,
    evictions: Mutex<LogThrottle>,
    unread: Mutex<LogThrottle>,
    calls: Mutex<LogThrottle>,
}

impl ConnectionLimiter {
    /// Creates a limiter with the slots of `capacity`. One address gets at most `per_address` of these slots, or half
    /// of them if `per_address` is `None`. `memory_bytes` limits the number of open calls. `open` is the gauge of open
    /// connections, if the listener has one.
    pub(super) fn new(
        kind: ListenerKind,
        capacity: Capacity,
        per_address: Option<usize>,
        memory_bytes: u64,
        open: Option<GaugeU64>,
        metrics: &Metrics,
    ) -> Self {
        let max_calls = usize::try_from(memory_bytes / BYTES_PER_CALL).unwrap_or(usize::MAX);
        let per_address = per_address.unwrap_or(capacity.slots / 2).clamp(1, capacity.slots);
        let address_raised_by = match kind {
            ListenerKind::Grpc | ListenerKind::Http => "limits.connections_per_address",
            ListenerKind::Peer => capacity.raised_by,
        };
        Self(Arc::new(LimiterState {
            kind,
            capacity,
            per_address,
            address_raised_by,
            max_calls,
            slots: Mutex::new(ConnectionSlots::new(capacity.slots, per_address, max_calls)),
            throttles: Throttles::default(),
            open,
            refused: metrics.connections_refused.clone(),
            evicted: metrics.connections_evicted.clone(),
            unread_closed: metrics.connections_closed_unread.clone(),
        }))
    }

    /// Admits a connection, and closes the connection that is evicted for it. If the address or the listener is at its
    /// limit, the longest idle connection of the address or of the listener is evicted. If none is idle, a connection
    /// from this machine gets an additional slot, if there is one, and any other connection serves only probes.
    fn admit(&self, stream: TcpStream, peer: Option<SocketAddr>) -> CountedConnection {
        let peer = peer.map_or(IpAddr::from(Ipv4Addr::UNSPECIFIED), |peer| peer.ip());
        let origin = Origin::of(peer, stream.local_addr().ok().map(|local| local.ip()));
        let signal = Arc::new(CloseSignal::default());
        let admitted = self.0.slots.lock().admit(origin, Arc::clone(&signal));
        if let Some(idle) = admitted.evicted {
            idle.close();
            if admitted.pool != Pool::Probe {
                self.report_eviction();
            }
        }
        if let Some(bound) = admitted.bound.filter(|_| admitted.pool == Pool::Probe) {
            self.report_refusal(bound, peer);
        }
        if let Some(open) = &self.0.open {
            open.inc();
        }
        let (producer_ids, memory) = (ProducerIdQuota::default(), Arc::default());
        let caller = Caller { limiter: self.clone(), signal, id: admitted.id, peer, producer_ids, memory };
        CountedConnection::new(stream, caller)
    }

    /// Counts and logs a new connection that serves only probes because of the limit `bound`.
    fn report_refusal(&self, bound: SlotLimit, peer: IpAddr) {
        self.0.refused.inc();
        let throttle = match bound {
            SlotLimit::Connections => &self.0.throttles.full,
            SlotLimit::Address => &self.0.throttles.full_for_address,
        };
        let Some(count) = occur(throttle) else { return };
        let (listener, slots, raised_by) = (self.0.kind, self.0.capacity.slots, self.0.capacity.raised_by);
        let (per_address, address_raised_by) = (self.0.per_address, self.0.address_raised_by);
        match bound {
            SlotLimit::Connections => tracing::warn!(
                ?listener,
                slots,
                raised_by,
                refused = count,
                "connection limit reached, with open calls on all connections: new connections serve only probes; \
                 check the clients, or raise the limit"
            ),
            SlotLimit::Address => tracing::warn!(
                ?listener,
                %peer,
                per_address,
                raised_by = address_raised_by,
                refused = count,
                "connection limit of an address reached, with open calls on all connections: new connections serve \
                 only probes"
            ),
        }
    }

    /// Counts and logs an idle connection that is closed for a new one.
    fn report_eviction(&self) {
        self.0.evicted.inc();
        let Some(count) = occur(&self.0.throttles.evictions) else { return };
        tracing::warn!(
            listener = ?self.0.kind,
            slots = self.0.capacity.slots,
            raised_by = self.0.capacity.raised_by,
            per_address = self.0.per_address,
            address_raised_by = self.0.address_raised_by,
            closed = count,
            "connection limit reached: closing the longest idle connections for new ones"
        );
    }

    /// Closes, counts and logs a connection whose client does not read its responses while other calls wait for the
    /// memory of these responses. Has no effect on a connection that is already closed.
    fn close_unread(&self, signal: &CloseSignal) {
        if !signal.close() {
            return;
        }
        self.0.unread_closed.inc();
        let Some(count) = occur(&self.0.throttles.unread) else { return };
        tracing::warn!(
            listener = ?self.0.kind,
            closed = count,
            raised_by = "limits.memory_bytes",
            "closing connections of clients that do not read their responses, because other calls wait for the memory"
        );
    }

    /// Logs and returns the error for a call above the limit of open calls, on a connection that already has its share.
    fn call_limit_error(&self, peer: IpAddr) -> RefusedCall {
        let max = self.0.max_calls;
        if let Some(count) = occur(&self.0.throttles.calls) {
            tracing::warn!(
                listener = ?self.0.kind,
                calls = max,
                raised_by = "limits.memory_bytes",
                refused = count,
                %peer,
                "limit of open calls and streams reached: new calls on connections with several open calls are \
                 refused (OVERLOADED); check the clients, or raise the limit"
            );
        }
        RefusedCall(format!(
            "no memory for another call: {max} calls and streams are open on this broker: end some on this \
             connection, or raise limits.memory_bytes"
        ))
    }

    /// Returns the error for a call on a connection that serves only probes.
    fn slot_limit_error(&self, bound: SlotLimit) -> RefusedCall {
        let LimiterState { kind, capacity, per_address, address_raised_by, .. } = &*self.0;
        RefusedCall(match bound {
            SlotLimit::Connections => format!(
                "no capacity for another connection: all {} of this broker's {kind:?} listener have open calls: raise \
                 {}",
                capacity.slots, capacity.raised_by
            ),
            SlotLimit::Address => format!(
                "no capacity for another connection from this address: {per_address} have open calls: raise \
                 {address_raised_by}"
            ),
        })
    }
}

/// Reason why a call is rejected: its connection serves only probes, or the limit of open calls is reached.
#[derive(Debug)]
pub(super) struct RefusedCall(pub(super) String);

/// Counts an occurrence now. Returns the number of occurrences since the last log line, if a log line is due.
fn occur(throttle: &Mutex<LogThrottle>) -> Option<u64> {
    throttle.lock().occur(clock::monotonic())
}

/// Signal that closes a connection.
#[derive(Debug, Default)]
struct CloseSignal {
    closed: AtomicBool,
    waker: AtomicWaker,
}

impl CloseSignal {
    /// Sends the signal and wakes the connection's task. Returns true at the first call.
    fn close(&self) -> bool {
        let first = !self.closed.swap(true, Ordering::AcqRel);
        self.waker.wake();
        first
    }

    /// Fails once the signal was sent. Registers the task of `cx`, which the signal wakes.
    fn check(&self, cx: &Context<'_>) -> io::Result<()> {
        self.waker.register(cx.waker());
        if self.closed.load(Ordering::Acquire) { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }
}

/// Connection by which a request arrived. Every request has this value as an extension.
#[derive(Clone)]
pub(super) struct Caller {
    limiter: ConnectionLimiter,
    signal: Arc<CloseSignal>,
    id: u64,
    peer: IpAddr,
    producer_ids: ProducerIdQuota,
    memory: Arc<OnceLock<ConnectionMemory>>,
}

impl Caller {
    /// Returns the connection's share of these budgets, which the first call opens.
    pub(super) fn memory(&self, budgets: &Budgets) -> ConnectionMemory {
        let create = || {
            let (signal, limiter) = (Arc::clone(&self.signal), self.limiter.clone());
            budgets.open_connection(move || limiter.close_unread(&signal))
        };
        self.memory.get_or_init(create).clone()
    }

    /// Returns the kind of the listener that accepted the connection.
    pub(super) fn listener_kind(&self) -> ListenerKind {
        self.limiter.0.kind
    }

    /// Returns the connection's quota of new producers.
    pub(super) fn producer_ids(&self) -> ProducerIdQuota {
        self.producer_ids.clone()
    }

    /// Counts a call as open until the returned value is dropped. If the connection serves only probes and the call is
    /// no probe, the connection moves to the common pool. An idle connection may be evicted for that. The call is
    /// rejected if the common pool has no slot. The call is also rejected if the limit of open calls is reached and the
    /// connection has its share.
    pub(super) fn begin_call(&self, is_probe: bool) -> Result<OpenCall, RefusedCall> {
        let mut slots = self.limiter.0.slots.lock();
        if !slots.has_capacity_for_call(self.id) {
            drop(slots);
            return Err(self.limiter.call_limit_error(self.peer));
        }
        let pool = slots.begin_call(self.id);
        let call = OpenCall(self.clone());
        if pool != Some(Pool::Probe) || is_probe {
            drop(slots);
            return Ok(call);
        }
        let promoted = slots.promote(self.id);
        drop(slots);
        match promoted {
            Ok(evicted) => {
                if let Some(idle) = evicted {
                    idle.close();
                    self.limiter.report_eviction();
                }
                Ok(call)
            }
            Err(bound) => {
                tracing::debug!(peer = %self.peer, "refused a call: its connection is above the limit");
                Err(self.limiter.slot_limit_error(bound))
            }
        }
    }

    /// Frees the slot of the connection, which ends.
    fn end_connection(&self) {
        self.limiter.0.slots.lock().remove(self.id);
        if let Some(open) = &self.limiter.0.open {
            open.dec();
        }
    }
}

/// A call or stream that is open. Its connection is not idle.
pub(super) struct OpenCall(Caller);

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.limiter.0.slots.lock().end_call(self.0.id);
    }
}

/// Accepts connections of `listener` and admits each with `limiter`.
pub(super) fn accept(
    listener: TcpListener,
    limiter: ConnectionLimiter,
) -> impl Stream<Item = io::Result<CountedConnection>> + Send + 'static {
    TcpIncoming::from(listener).with_nodelay(Some(true)).then(move |accepted| {
        let admitted = accepted.map(|stream| {
            let peer = stream.peer_addr().ok();
            limiter.admit(stream, peer)
        });
        async move {
            if let Err(error) = &admitted
                && !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
            {
                // The process has no free file descriptors, for example. Accepting again at once would be a busy loop.
                tokio::time::sleep(ACCEPT_DELAY).await;
            }
            admitted
        }
    })
}

/// Serves each connection in its own task. Returns when the tasks are stopped, and then accepts no further connections.
pub(super) async fn serve_each<F>(
    connections: impl Stream<Item = io::Result<CountedConnection>> + Send,
    tasks: &Tasks,
    serve: impl Fn(CountedConnection) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = pin!(connections);
    loop {
        let Some(connection) = tasks.run_until_cancelled(connections.next()).await else {
            return;
        };
        match connection {
            None => return,
            Some(Err(error)) => tracing::debug!(%error, "a connection was not accepted"),
            Some(Ok(connection)) => drop(tasks.spawn("connection", serve(connection))),
        }
    }
}
