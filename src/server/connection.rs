//! The sockets of one listener and their limits. Each listener has a [`ConnectionLimiter`] with a limited number of
//! slots, one for each connection. `connection_slots` decides which connection gets a slot and which one is evicted;
//! this module closes the evicted one.
//!
//! A [`CloseSignal`] closes a connection: it wakes the connection's task, whose next read or write then fails.

use std::{
    io::{self, IoSlice},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::{Pin, pin},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use futures::{Stream, StreamExt as _, task::AtomicWaker};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::Sleep,
};
use tonic::transport::server::TcpIncoming;

use super::{
    connection_limits::Capacity,
    connection_slots::{ConnectionSlots, Origin, Pool, SlotLimit},
};
use crate::{
    broker::{Budgets, ConnectionMemory, ProducerIdQuota},
    task::{Tasks, clock, lock::Mutex},
    telemetry::{Counter, GaugeU64, LogThrottle, Metrics},
};

/// Bytes that a gRPC client must send within [`FIRST_BYTES_TIMEOUT`]: the preface of HTTP/2. After the preface, pings
/// detect dead clients.
const PREFACE_BYTES: usize = 24;

/// Bytes that an HTTP/1 client must send within [`FIRST_BYTES_TIMEOUT`]: the shortest request line.
const REQUEST_BYTES: usize = 16;

/// Maximum time from the accept of a connection until its first [`PREFACE_BYTES`] or [`REQUEST_BYTES`] have arrived.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum time between two reads of an HTTP/1 connection after its first bytes: HTTP/1 has no pings.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

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
        let (remaining_bytes, idle_timeout) = match self.0.kind {
            ListenerKind::Grpc | ListenerKind::Peer => (PREFACE_BYTES, None),
            ListenerKind::Http => (REQUEST_BYTES, Some(IDLE_TIMEOUT)),
        };
        let deadline = Box::pin(tokio::time::sleep(FIRST_BYTES_TIMEOUT));
        let read_deadline = ReadDeadline { remaining_bytes, deadline, idle_timeout };
        let (producer_ids, memory) = (ProducerIdQuota::default(), Arc::default());
        let caller =
            Caller { limiter: self.clone(), signal: Arc::clone(&signal), id: admitted.id, peer, producer_ids, memory };
        CountedConnection {
            stream,
            signal,
            read_deadline: Some(read_deadline),
            is_full: false,
            has_written: false,
            reader: None,
            caller,
        }
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
    fn refuse_call(&self, peer: IpAddr) -> RefusedCall {
        let max = self.0.max_calls;
        if let Some(count) = occur(&self.0.throttles.calls) {
            tracing::warn!(
                listener = ?self.0.kind,
                calls = max,
                raised_by = "limits.memory_bytes",
                refused = count,
                %peer,
                "limit of open calls and streams reached: connections with several calls start no more"
            );
        }
        RefusedCall(format!(
            "no memory for another call: {max} calls and streams are open on this broker: end some on this \
             connection, or raise limits.memory_bytes"
        ))
    }

    /// Returns the error for a call on a connection that serves only probes.
    fn refusal(&self, bound: SlotLimit) -> RefusedCall {
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
            budgets.connection(move || limiter.close_unread(&signal))
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
    /// no probe, the connection moves to the common pool, for which an idle connection may be evicted. The call is
    /// rejected if the common pool has no slot, or if the limit of open calls is reached and the connection has its
    /// share.
    pub(super) fn begin_call(&self, is_probe: bool) -> Result<OpenCall, RefusedCall> {
        let mut slots = self.limiter.0.slots.lock();
        if !slots.has_capacity_for_call(self.id) {
            drop(slots);
            return Err(self.limiter.refuse_call(self.peer));
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
                Err(self.limiter.refusal(bound))
            }
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

/// One connection. It counts as open and keeps its slot until it is dropped.
pub(super) struct CountedConnection {
    stream: TcpStream,
    signal: Arc<CloseSignal>,
    /// Deadline for the next bytes from the client; `None` after the first bytes of HTTP/2, because pings then detect a
    /// dead client.
    read_deadline: Option<ReadDeadline>,
    /// True if the last write to a client found no space in the socket, because the client does not read. Then each
    /// successful write permits one read. With more reads, HTTP/2 would continue to serve requests and would buffer the
    /// heads of the responses, which flow control does not limit. Always false on the listeners for other brokers and
    /// for HTTP/1.
    is_full: bool,
    /// True if a write succeeded since this flag last permitted a read.
    has_written: bool,
    /// Waker of the task whose read waits for the next successful write.
    reader: Option<Waker>,
    caller: Caller,
}

/// Time by which a connection must receive bytes from its client. Otherwise reads fail with `TimedOut`.
struct ReadDeadline {
    /// Number of first bytes that have not arrived yet. While it is above 0, they must arrive by `deadline`.
    remaining_bytes: usize,
    deadline: Pin<Box<Sleep>>,
    /// Maximum time between two reads after the first bytes; `None` for no limit.
    idle_timeout: Option<Duration>,
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

impl CountedConnection {
    /// Returns the value that each request of this connection carries.
    pub(super) fn caller(&self) -> Caller {
        self.caller.clone()
    }

    /// Updates the flags that permit reads after a write, and wakes a waiting read if the write succeeded. Returns the
    /// result of the write unchanged.
    fn on_write(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.is_full = written.is_pending() && self.caller.listener_kind() == ListenerKind::Grpc;
        if written.is_ready() {
            self.has_written = true;
            self.reader.take().into_iter().for_each(Waker::wake);
        }
        written
    }
}

impl Drop for CountedConnection {
    fn drop(&mut self) {
        let limiter = &self.caller.limiter;
        limiter.0.slots.lock().remove(self.caller.id);
        if let Some(open) = &limiter.0.open {
            open.dec();
        }
    }
}

impl AsyncRead for CountedConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.signal.check(cx)?;
        let before = buffer.filled().len();
        // See `is_full`: while the socket is full, nothing is read from the client without a write since the last read.
        let read = if self.is_full && !std::mem::take(&mut self.has_written) {
            self.reader = Some(cx.waker().clone());
            Poll::Pending
        } else {
            Pin::new(&mut self.stream).poll_read(cx, buffer)
        };
        let Some(ReadDeadline { remaining_bytes, deadline, idle_timeout }) = &mut self.read_deadline else {
            return read;
        };
        if read.is_pending() {
            ready!(deadline.as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        *remaining_bytes = remaining_bytes.saturating_sub(buffer.filled().len() - before);
        if *remaining_bytes == 0 {
            match *idle_timeout {
                Some(idle) => deadline.as_mut().reset(clock::monotonic() + idle),
                None => self.read_deadline = None,
            }
        }
        read
    }
}

impl AsyncWrite for CountedConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.signal.check(cx)?;
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.on_write(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.signal.check(cx)?;
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.on_write(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.signal.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::timeout,
    };

    use super::*;

    /// Returns a client's socket and the broker's end of the connection, on a listener of this kind.
    async fn connected(kind: ListenerKind) -> (TcpStream, CountedConnection) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let capacity = Capacity { slots: 4, raised_by: "" };
        let limiter = ConnectionLimiter::new(kind, capacity, None, 1 << 30, None, &Metrics::new());
        let (client, accepted) =
            tokio::join!(TcpStream::connect(address), async { pin!(accept(listener, limiter)).next().await });
        (client.expect("connected"), accepted.expect("one").expect("no error"))
    }

    const STALL_TIMEOUT: Duration = Duration::from_millis(100);

    /// Regression: a client that sent requests and read nothing made HTTP/2 keep the heads of 1,000 responses on each
    /// connection.
    #[tokio::test]
    async fn client_that_reads_nothing_is_not_read_from() {
        let tasks = Tasks::new();
        for (kind, continues) in [(ListenerKind::Grpc, false), (ListenerKind::Peer, true)] {
            let (mut client, connection) = connected(kind).await;
            let (mut incoming, mut outgoing) = tokio::io::split(connection);
            while timeout(STALL_TIMEOUT, outgoing.write(&[7; 1 << 16])).await.is_ok() {}
            // The last write that succeeded permits one read.
            client.write_all(b"1").await.expect("the socket has space");
            assert_eq!(incoming.read_u8().await.expect("the byte arrives"), b'1');
            client.write_all(b"2").await.expect("the socket has space");
            // The read runs in a separate task, so that only the write wakes it.
            let mut reading = tasks.spawn("reading", async move { incoming.read_u8().await });
            assert_eq!(timeout(STALL_TIMEOUT, &mut reading).await.is_ok(), continues, "{kind:?}");
            if !continues {
                // The client reads some of the data, so writes succeed again, and each permits a read. The second byte
                // from the client arrives, although the socket is full again.
                let writing = async { while outgoing.write(&[7; 1 << 16]).await.is_ok() {} };
                let mut buffer = vec![0; 8 << 20];
                let client_reading = client.read_exact(&mut buffer);
                let both = async { tokio::join!(reading, client_reading) };
                let (byte, _) = tokio::select! {
                    () = writing => panic!("the connection is open"),
                    read = timeout(Duration::from_secs(10), both) => read.expect("reads continue"),
                };
                assert_eq!(byte.expect("no panic").expect("no error"), b'2');
            }
        }
    }
}
