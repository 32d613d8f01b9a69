//! Transport between a client and a broker: TCP, or another carrier of gRPC calls.
//!
//! Producer, consumer, admin and the calls between brokers all use [`Connector`], so a simulated network or a tunnel
//! can carry every call. The cost is one boxed future per call and nothing per message.

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
    address::BrokerAddress,
    error::{ConnectError, root_cause},
};

// With the message codec's large buffers, these values allow twice the throughput of the defaults (measured, see
// docs/performance.md). The stream window bounds the throughput over long round trips.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
const FRAME_BYTES: u32 = 256 << 10;

/// Interval of HTTP/2 pings from clients, and time limit for the response to a ping.
const PING_INTERVAL: Duration = Duration::from_secs(3);

/// The same between brokers: a broker that sends no data for twice this time is disconnected.
const BROKER_PING_INTERVAL: Duration = Duration::from_secs(2);

/// Display text of tonic's error for a connection that could not be made or that broke.
const TRANSPORT_ERROR: &str = "transport error";

/// Error of a call without a response. A [`Status`] in it, or in its sources, is the outcome of the call. A [`NotSent`]
/// means that the broker never received the call.
pub type TransportError = Box<dyn Error + Send + Sync>;

/// Result of one call.
pub type CallResult = Result<http::Response<Body>, TransportError>;

/// Factory of connections to brokers.
pub trait Connector: Send + Sync + 'static {
    /// Makes a connection to `address`. If the connection breaks, the calls in progress fail, and the next call
    /// reconnects.
    fn connect(&self, address: &BrokerAddress) -> BoxFuture<'_, Result<BrokerChannel, ConnectError>>;
}

/// Transport of gRPC calls on one connection.
pub trait RpcTransport: Send + Sync + 'static {
    /// Makes one gRPC call.
    fn call(&self, request: http::Request<Body>) -> BoxFuture<'static, CallResult>;
}

/// Connection of the generated clients to one broker. Clones share the connection.
#[derive(Clone)]
pub struct BrokerChannel(Arc<dyn RpcTransport>);

impl BrokerChannel {
    /// Creates a connection whose calls `transport` makes.
    pub fn new(transport: impl RpcTransport) -> Self {
        Self(Arc::new(transport))
    }
}

impl fmt::Debug for BrokerChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BrokerChannel")
    }
}

impl Service<http::Request<Body>> for BrokerChannel {
    type Response = http::Response<Body>;
    type Error = TransportError;
    type Future = BoxFuture<'static, CallResult>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), TransportError>> {
        // Each call waits for capacity itself.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        self.0.call(request)
    }
}

/// Error of a call that was not sent.
#[derive(Debug)]
pub struct NotSent(Status);

impl NotSent {
    /// Creates the error. `problem` is a text that may follow an address and a colon.
    pub fn new(problem: impl Into<String>) -> Self {
        Self(Status::unavailable(problem))
    }
}

impl fmt::Display for NotSent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.message())
    }
}

impl Error for NotSent {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.0)
    }
}

/// Returns the reason for which the broker certainly never received the call: a [`NotSent`] or a refused connection.
/// Returns `None` for any other error.
pub fn unsent(status: &Status) -> Option<String> {
    let source = Error::source(status)?;
    if let Some(unsent) = source.downcast_ref::<NotSent>() {
        return Some(unsent.to_string());
    }
    let error = source.downcast_ref::<tonic::transport::Error>()?;
    (error.to_string() == TRANSPORT_ERROR && is_refused(error)).then(|| root_cause(error))
}

/// Returns true if a refused connection is among the causes of an error.
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

/// Connections by HTTP/2 over TCP.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    connect_timeout: Duration,
    ping: Duration,
}

impl TcpConnector {
    /// Creates a factory with a time limit for making one connection.
    pub fn new(connect_timeout: Duration) -> Self {
        Self { connect_timeout, ping: PING_INTERVAL }
    }

    /// Creates a factory for calls between brokers. Its shorter ping interval detects an unresponsive broker sooner.
    pub fn between_brokers(connect_timeout: Duration) -> Self {
        Self { connect_timeout, ping: BROKER_PING_INTERVAL }
    }
}

impl Connector for TcpConnector {
    fn connect(&self, address: &BrokerAddress) -> BoxFuture<'_, Result<BrokerChannel, ConnectError>> {
        let address = address.clone();
        Box::pin(async move {
            let endpoint = Endpoint::from_shared(format!("http://{}", address.as_str()))
                .map_err(|error| address.unreachable(root_cause(&error)))?
                .connect_timeout(self.connect_timeout)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .max_frame_size(FRAME_BYTES)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(self.ping)
                .keep_alive_timeout(self.ping)
                .keep_alive_while_idle(true);
            match endpoint.connect().await {
                Ok(channel) => Ok(BrokerChannel::new(channel)),
                Err(error) => Err(address.unreachable(root_cause(&error))),
            }
        })
    }
}

impl RpcTransport for Channel {
    fn call(&self, request: http::Request<Body>) -> BoxFuture<'static, CallResult> {
        let mut channel = self.clone();
        Box::pin(async move {
            std::future::poll_fn(|context| channel.poll_ready(context)).await?;
            Ok(Service::call(&mut channel, request).await?)
        })
    }
}
