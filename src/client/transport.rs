//! How a client reaches a broker: over TCP, or over whatever else carries gRPC calls.
//!
//! Producer, consumer, admin and the calls between brokers all go through [`Connect`], so a network that is simulated, or a tunnel,
//! is under every one of them. It costs one boxed future per call and nothing per message: streams flow through the bodies
//! as they are.

use std::{
    error::Error,
    fmt,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use tonic::{
    Status,
    body::Body,
    codegen::{Service, http},
    transport::{Channel, Endpoint},
};

use super::{
    connection::Address,
    error::{ConnectError, root_cause},
};

// Measured (docs/performance.md): with the message codec's large buffers these carry twice what the defaults do, and
// the stream window bounds throughput over real round trips.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
const FRAME_BYTES: u32 = 256 << 10;

/// A peer that answers no ping for this long is gone.
const PING: Duration = Duration::from_secs(5);

/// The same between brokers: whom nobody hears for twice this long is not waited for.
#[cfg(feature = "server")]
const PING_BETWEEN_BROKERS: Duration = Duration::from_secs(2);

/// What a call that got no answer ends with. A [`Status`] in it, or in its sources, is the call's outcome; an [`Unsent`] says that the
/// broker never saw the call.
pub type TransportError = Box<dyn Error + Send + Sync>;

/// What becomes of one call.
pub type Answered = Result<http::Response<Body>, TransportError>;

/// Makes connections to brokers.
pub trait Connect: Send + Sync + 'static {
    /// A connection to `to`. It lasts: when it breaks the calls that it carried fail, and it is made anew for the next.
    fn connect(&self, to: &Address) -> BoxFuture<'_, Result<Wire, ConnectError>>;
}

/// The other end of a connection.
pub trait Call: Send + Sync + 'static {
    /// One gRPC call.
    fn call(&self, request: http::Request<Body>) -> BoxFuture<'static, Answered>;
}

/// One connection, as the generated clients use it. Clones share it.
#[derive(Clone)]
pub struct Wire(Arc<dyn Call>);

impl Wire {
    /// A connection to whatever answers these calls.
    pub fn new(end: impl Call) -> Self {
        Self(Arc::new(end))
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wire")
    }
}

impl Service<http::Request<Body>> for Wire {
    type Response = http::Response<Body>;
    type Error = TransportError;
    type Future = BoxFuture<'static, Answered>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), TransportError>> {
        // Each call waits for its own turn.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        self.0.call(request)
    }
}

/// A call that did not leave this side.
#[derive(Debug)]
pub struct Unsent(Status);

impl Unsent {
    /// Says why, in words that may follow an address and a colon.
    pub fn new(problem: impl Into<String>) -> Self {
        Self(Status::unavailable(problem))
    }
}

impl fmt::Display for Unsent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.message())
    }
}

impl Error for Unsent {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.0)
    }
}

/// Why the broker never saw the call that ended so; `None` where it may have.
pub(super) fn unsent(status: &Status) -> Option<String> {
    let source = Error::source(status)?;
    if let Some(unsent) = source.downcast_ref::<Unsent>() {
        return Some(unsent.to_string());
    }
    let error = source.downcast_ref::<tonic::transport::Error>()?;
    (error.to_string() == "transport error" && is_refused(error)).then(|| root_cause(error))
}

/// Whether an error chain says that the connection could not be made.
fn is_refused(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused) {
            return true;
        }
        next = error.source();
    }
    false
}

/// HTTP/2 over TCP.
#[derive(Clone, Debug)]
pub struct Tcp {
    connect_timeout: Duration,
    ping: Duration,
}

impl Tcp {
    /// Connections that may take so long to come up.
    pub fn new(connect_timeout: Duration) -> Self {
        Self { connect_timeout, ping: PING }
    }

    /// The same for calls between brokers, which notice sooner that nobody answers any more.
    #[cfg(feature = "server")]
    pub fn between_brokers(connect_timeout: Duration) -> Self {
        Self { connect_timeout, ping: PING_BETWEEN_BROKERS }
    }
}

impl Connect for Tcp {
    fn connect(&self, to: &Address) -> BoxFuture<'_, Result<Wire, ConnectError>> {
        let to = to.clone();
        Box::pin(async move {
            let endpoint = Endpoint::from_shared(format!("http://{}", to.as_str()))
                .map_err(|error| to.no_answer(root_cause(&error)))?
                .connect_timeout(self.connect_timeout)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .max_frame_size(FRAME_BYTES)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(self.ping)
                .keep_alive_timeout(self.ping)
                .keep_alive_while_idle(true);
            match endpoint.connect().await {
                Ok(channel) => Ok(Wire::new(channel)),
                Err(error) => Err(to.no_answer(root_cause(&error))),
            }
        })
    }
}

impl Call for Channel {
    fn call(&self, request: http::Request<Body>) -> BoxFuture<'static, Answered> {
        let mut channel = self.clone();
        Box::pin(async move {
            std::future::poll_fn(|context| channel.poll_ready(context)).await?;
            Ok(Service::call(&mut channel, request).await?)
        })
    }
}
