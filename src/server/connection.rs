//! Connections, counted while they are open, and how many there may be: a broker without open files left can neither write its log nor
//! answer anybody, so strangers may not take the last ones.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::serve::Listener;
use futures::{Stream, StreamExt as _};
use rustix::process::{Resource, getrlimit};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Sleep,
};
use tonic::transport::server::{Connected, TcpIncoming};

use crate::{
    broker::ProducerIdQuota,
    log::{Disk as _, RealDisk},
    task::clock,
    telemetry::{Counter, Level},
};

/// Bytes that whoever wants something sends first: the preface of HTTP/2, after which pings tell who is still there; and the shortest request
/// line of HTTP/1.
const PREFACE_BYTES: usize = 24;
const REQUEST_BYTES: usize = 16;

/// How long a connection may take for them, and how long one for pages may be idle then: HTTP/1 has no pings.
const GREETING: Duration = Duration::from_secs(10);
const IDLE: Duration = Duration::from_secs(60);

/// How long accepting rests where the system has nothing for another connection.
const REST: Duration = Duration::from_millis(100);

/// Open files that are left for all that is neither a connection nor a segment, at least: the journal, other brokers, etcd, the bucket.
const LEFT: u64 = 64;

/// How many connections each listener takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) grpc: usize,
    pub(super) http: usize,
}

impl Room {
    /// That of one of so many brokers in this process.
    pub(super) fn of(brokers: usize) -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        Self::with(files, RealDisk::default().open_files() as u64, brokers)
    }

    /// What the limit of open files leaves beside the segments of each broker.
    fn with(files: u64, segments: u64, brokers: usize) -> Self {
        let brokers = brokers.max(1);
        let left = files.saturating_sub(segments * brokers as u64 + LEFT.max(files / 8));
        let each = usize::try_from(left).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS) / brokers;
        let http = (each / 8).clamp(8, 256);
        Self { grpc: each.saturating_sub(http).max(32), http }
    }
}

/// Which listener.
#[derive(Clone, Copy, Debug)]
pub(super) enum Port {
    Grpc,
    Http,
}

/// A listener's door: it takes as many connections as there is room for.
#[derive(Clone)]
pub(super) struct Door {
    port: Port,
    most: usize,
    places: Arc<Semaphore>,
    /// Whether it was said that there is no room.
    said: Arc<AtomicBool>,
    open: Option<Level>,
    refused: Counter,
}

impl Door {
    /// A door for so many. Who is inside counts in `open`, who was not let in `refused`.
    pub(super) fn new(port: Port, most: usize, open: Option<Level>, refused: Counter) -> Self {
        Self { port, most, places: Arc::new(Semaphore::new(most)), said: Arc::default(), open, refused }
    }

    /// Takes a connection in, or ends it. Those that are inside are not asked to make room: they may have work under way.
    fn enter(&self, stream: TcpStream) -> Option<Connection> {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            self.refused.inc();
            if !self.said.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    most = self.most,
                    listener = ?self.port,
                    "there are as many connections as the limit of open files leaves room for, and new ones are ended; see who holds them, or \
                     raise the limit (ulimit -n, LimitNOFILE) and restart"
                );
            }
            return None;
        };
        // Said again when it was half empty meanwhile.
        if self.places.available_permits() > self.most / 2 {
            self.said.store(false, Ordering::Relaxed);
        }
        if let Some(open) = &self.open {
            open.inc();
        }
        let (left, idle) = match self.port {
            Port::Grpc => (PREFACE_BYTES, None),
            Port::Http => (REQUEST_BYTES, Some(IDLE)),
        };
        let patience = Patience { left, until: Box::pin(tokio::time::sleep(GREETING)), idle };
        let (open, producer_ids) = (self.open.clone(), ProducerIdQuota::default());
        Some(Connection { stream, patience: Some(patience), open, producer_ids, _place: place })
    }
}

/// One connection; it counts, and has its place, until it is dropped.
pub(super) struct Connection {
    stream: TcpStream,
    /// For how long it may say nothing; `None` where it may for ever.
    patience: Option<Patience>,
    open: Option<Level>,
    producer_ids: ProducerIdQuota,
    _place: OwnedSemaphorePermit,
}

struct Patience {
    /// Bytes that are to come at first.
    left: usize,
    until: Pin<Box<Sleep>>,
    /// How long it may say nothing after those.
    idle: Option<Duration>,
}

/// The connections that come to a listener and are let in.
pub(super) fn accept(listener: TcpListener, door: Door) -> impl Stream<Item = io::Result<Connection>> + Send + 'static {
    TcpIncoming::from(listener).with_nodelay(Some(true)).filter_map(move |accepted| {
        let entered = accepted.map(|stream| door.enter(stream)).transpose();
        async move {
            if let Some(Err(error)) = &entered
                && !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
            {
                // No open files: whoever accepts again at once does nothing else.
                tokio::time::sleep(REST).await;
            }
            entered
        }
    })
}

/// The same for pages.
pub(super) struct Guarded {
    pub(super) listener: TcpListener,
    pub(super) door: Door,
}

impl Listener for Guarded {
    type Io = Connection;
    type Addr = std::net::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, address) = Listener::accept(&mut self.listener).await;
            if let Some(connection) = self.door.enter(stream) {
                return (connection, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(open) = &self.open {
            open.dec();
        }
    }
}

impl Connected for Connection {
    /// Every request that comes by the connection carries it.
    type ConnectInfo = ProducerIdQuota;

    fn connect_info(&self) -> ProducerIdQuota {
        self.producer_ids.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let Some(patience) = &mut self.patience else { return read };
        if read.is_pending() {
            ready!(patience.until.as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        patience.left = patience.left.saturating_sub(buffer.filled().len() - before);
        match patience.idle {
            _ if patience.left > 0 => {}
            Some(idle) => patience.until.as_mut().reset(clock::monotonic() + idle),
            None => self.patience = None,
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_log_and_others_need_is_left() {
        for (files, segments, brokers) in
            [(256, 128, 1), (1024, 512, 1), (1024, 512, 3), (1 << 20, 8192, 1), (64, 64, 1)]
        {
            let Room { grpc, http } = Room::with(files, segments, brokers);
            assert!(grpc >= 32 && http >= 8, "{files}: somebody is always served");
            let own = segments * brokers as u64 + LEFT;
            let taken = ((grpc + http) * brokers) as u64 + own;
            assert!(taken <= files.max(own + 40 * brokers as u64), "{files} files for {brokers}: {grpc} and {http}");
        }
        assert_eq!(Room::with(1024, 512, 1), Room { grpc: 336, http: 48 });
    }
}
