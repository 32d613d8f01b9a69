//! The socket of one connection: the deadlines of its reads, and reads that wait while the client does not read.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Sleep,
};

use super::{Caller, CloseSignal, ListenerKind};
use crate::task::clock;

/// Bytes that a gRPC client must send within [`FIRST_BYTES_TIMEOUT`]: the preface of HTTP/2. After the preface, pings
/// detect dead clients.
const PREFACE_BYTES: usize = 24;

/// Bytes that an HTTP/1 client must send within [`FIRST_BYTES_TIMEOUT`]: the shortest request line.
const REQUEST_BYTES: usize = 16;

/// Maximum time from the accept of a connection until its first [`PREFACE_BYTES`] or [`REQUEST_BYTES`] have arrived.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum time between two reads of an HTTP/1 connection after its first bytes: HTTP/1 has no pings.
pub(in crate::server) const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// One connection. It counts as open and keeps its slot until it is dropped.
pub(in crate::server) struct CountedConnection {
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

impl CountedConnection {
    /// Returns the connection of `stream`, which was accepted now.
    pub(super) fn new(stream: TcpStream, caller: Caller) -> Self {
        let (remaining_bytes, idle_timeout) = match caller.listener_kind() {
            ListenerKind::Grpc | ListenerKind::Peer => (PREFACE_BYTES, None),
            ListenerKind::Http => (REQUEST_BYTES, Some(IDLE_TIMEOUT)),
        };
        let deadline = Box::pin(tokio::time::sleep(FIRST_BYTES_TIMEOUT));
        let read_deadline = ReadDeadline { remaining_bytes, deadline, idle_timeout };
        Self {
            stream,
            signal: Arc::clone(&caller.signal),
            read_deadline: Some(read_deadline),
            is_full: false,
            has_written: false,
            reader: None,
            caller,
        }
    }

    /// Returns the value that each request of this connection carries.
    pub(in crate::server) fn caller(&self) -> Caller {
        self.caller.clone()
    }

    /// Updates the flags that permit reads after a write, and wakes a waiting read if the write did not find the socket
    /// full. Returns the result of the write unchanged.
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
        self.caller.end_connection();
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
    use std::pin::pin;

    use futures::StreamExt as _;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        time::timeout,
    };

    use super::*;
    use crate::{
        server::{
            connection::{ConnectionLimiter, accept},
            connection_limits::Capacity,
        },
        task::Tasks,
        telemetry::Metrics,
    };

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
