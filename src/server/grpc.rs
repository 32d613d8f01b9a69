//! The gRPC listeners, for clients and for other brokers: services, health, reflection, and HTTP/2 tuned for batches.
//!
//! The transport itself rejects some calls before a service receives them: a message above the limit, invalid bytes, an
//! unknown method. [`handle`] gives these responses the stable error codes that all other errors have, and counts calls
//! per connection.

use std::{future::Future, io, pin::pin, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, Uri,
        header::{CONTENT_TYPE, TE},
    },
    middleware::Next,
    response::Response,
};
use futures::Stream;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::OwnedSemaphorePermit;
use tonic::{Status, codegen::Service as _, service::Routes};
use tonic_health::{
    ServingStatus,
    server::{HealthReporter, health_reporter},
};

use super::{
    calls,
    connection::{self, Caller, CountedConnection, ListenerKind},
    request_body::{self, RequestBody},
    streams,
};
use crate::{
    broker::{Broker, Budgets, CallMemory, OpenedBroker},
    limits,
    partition::MemoryBudget,
    proto::{
        CLIENT_DESCRIPTORS,
        error::{ApiError, ErrorCode, from_transport},
        parts::RequestSchemas,
        v1::{admin_server, log_server, peer_server},
    },
    task::Tasks,
};

/// Names with a health status: the whole server, which has the empty name, and each service.
const HEALTH_NAMES: [&str; 3] = ["", log_server::SERVICE_NAME, admin_server::SERVICE_NAME];

/// Maximum HTTP/2 window of one client connection, in bytes: the data that all of its streams may send before this
/// broker reads. Received data that no call reads stays in memory.
const MAX_CONNECTION_WINDOW: u64 = 8 << 20;

/// Minimum window of a connection and of each stream, in bytes. A small request fits into it.
const MIN_CONNECTION_WINDOW: u32 = 80 << 10;

/// The window of one connection is at most `limits.memory_bytes` divided by this number.
const CONNECTION_WINDOW_DIVISOR: u64 = 512;

/// The parts of all windows above [`MIN_CONNECTION_WINDOW`] have together at most `limits.memory_bytes` divided by this
/// number.
const ALL_WINDOWS_DIVISOR: u64 = 16;

/// The streams of all connections above [`MIN_STREAMS`] for each connection use together at most `limits.memory_bytes`
/// divided by this number.
const ALL_STREAMS_DIVISOR: u64 = 16;

/// Memory of one stream that a connection may open, in bytes. HTTP/2 keeps memory for the highest number of concurrent
/// streams until the connection ends.
const STREAM_BYTES: usize = 1536;

/// Number of streams that each connection may have open, regardless of the number of connections.
const MIN_STREAMS: u32 = 100;

/// A new connection gets at most the free memory for windows, and for streams, divided by this number. So each further
/// connection gets less.
const NEW_CONNECTION_DIVISOR: usize = 8;

/// Windows of a listener's connections: bytes that clients may send before they are read, and streams that clients may
/// have open. Clones share the memory for both.
#[derive(Clone, Debug)]
pub(super) struct Windows {
    /// Maximum number of open streams of a connection.
    streams: u32,
    /// Maximum size of an HTTP/2 frame, in bytes.
    frame_bytes: u32,
    /// Bytes of a stream's responses that HTTP/2 buffers. Below this number HTTP/2 polls the call for more, even if the
    /// client has read nothing.
    send_buffer_bytes: usize,
    /// Maximum window of one connection, in bytes.
    connection_bytes: u32,
    /// The window of one stream is that of the connection divided by this number, and at least
    /// [`MIN_CONNECTION_WINDOW`]. Each round trip transfers at most one window of the stream.
    stream_divisor: u32,
    /// Memory that all connections share; `None` for the peer listener, whose connections all have the maximum.
    memory: Option<WindowMemory>,
}

/// Memory that the windows and streams of a listener's connections share.
#[derive(Clone, Debug)]
struct WindowMemory {
    /// Bytes of windows above [`MIN_CONNECTION_WINDOW`].
    windows: MemoryBudget,
    /// Bytes of streams above [`MIN_STREAMS`].
    streams: MemoryBudget,
}

/// Window and number of streams of an open connection, with the memory of both.
struct Window {
    bytes: u32,
    /// Maximum number of open streams.
    streams: u32,
    _window_memory: Option<OwnedSemaphorePermit>,
    _stream_memory: Option<OwnedSemaphorePermit>,
}

impl Windows {
    /// Returns the windows for other brokers, which send small requests and their progress. This broker sends the
    /// batches of a link, and the other end sets the window for them.
    pub(super) const fn of_brokers() -> Self {
        Self {
            streams: limits::MAX_STREAMS_PER_PEER,
            frame_bytes: 16 << 10,
            // Other brokers read the batches that they requested, so several batches are sent with one write.
            send_buffer_bytes: 256 << 10,
            connection_bytes: 256 << 10,
            stream_divisor: 1,
            memory: None,
        }
    }

    /// Returns the windows for clients, which send batches. `memory_bytes` is `limits.memory_bytes`.
    pub(super) fn of_clients(memory_bytes: u64) -> Self {
        Self {
            streams: limits::MAX_STREAMS_PER_CONNECTION,
            // A small maximum bounds what an incomplete request can hold, which is a partial frame and a head. h2
            // buffers a head of up to five frames (HEADERS and CONTINUATION) before it checks the head's size.
            frame_bytes: 32 << 10,
            send_buffer_bytes: 16 << 10,
            connection_bytes: connection_window(memory_bytes),
            stream_divisor: 2,
            memory: Some(WindowMemory {
                windows: MemoryBudget::new(memory_bytes / ALL_WINDOWS_DIVISOR),
                streams: MemoryBudget::new(memory_bytes / ALL_STREAMS_DIVISOR),
            }),
        }
    }

    /// Reserves the window of a new connection: the minimum, and a share of the free memory for windows and streams.
    /// Dropping the returned window frees its memory. Without shared memory, the window has the maximum.
    fn reserve(&self) -> Window {
        let (bytes, streams) = (self.connection_bytes, self.streams);
        let Some(memory) = &self.memory else {
            return Window { bytes, streams, _window_memory: None, _stream_memory: None };
        };
        let (extra_bytes, window_memory) = reserve_share(&memory.windows, bytes - MIN_CONNECTION_WINDOW, 1);
        let (extra_streams, stream_memory) = reserve_share(&memory.streams, streams - MIN_STREAMS, STREAM_BYTES);
        Window {
            bytes: MIN_CONNECTION_WINDOW + extra_bytes,
            streams: MIN_STREAMS + extra_streams,
            _window_memory: window_memory,
            _stream_memory: stream_memory,
        }
    }

    /// Returns the HTTP/2 settings of a connection with this window.
    fn http2(&self, window: &Window, tasks: &Tasks) -> http2::Builder<CallExecutor> {
        let mut http2 = http2::Builder::new(CallExecutor(tasks.clone()));
        http2
            .timer(TokioTimer::new())
            .initial_stream_window_size((window.bytes / self.stream_divisor).max(MIN_CONNECTION_WINDOW))
            .initial_connection_window_size(window.bytes)
            .max_frame_size(self.frame_bytes)
            .max_concurrent_streams(window.streams)
            .max_send_buf_size(self.send_buffer_bytes)
            .keep_alive_interval(Some(PING_INTERVAL))
            .keep_alive_timeout(PING_INTERVAL);
        http2
    }
}

/// Reserves memory for `max_count` units of `unit_bytes` each, or for fewer if a new connection's share of the free
/// memory is smaller. Returns the number of units and their memory. Without memory, the number is 0.
fn reserve_share(memory: &MemoryBudget, max_count: u32, unit_bytes: usize) -> (u32, Option<OwnedSemaphorePermit>) {
    let share = (memory.bytes() - memory.taken()) / NEW_CONNECTION_DIVISOR / unit_bytes;
    let count = u32::try_from(share).unwrap_or(u32::MAX).min(max_count);
    let reserved = memory.try_take(count as usize * unit_bytes);
    (if reserved.is_some() { count } else { 0 }, reserved)
}

/// Paths of probes by clients and by other brokers. Probes are also served on connections above the connection limit.
/// `Health/Watch` is no probe, because it never ends.
const PROBE_PATHS: [&str; 2] = ["/grpc.health.v1.Health/Check", "/strandline.v1.Peer/GetIdentity"];

/// Beginnings of the paths of calls whose responses grow with the metadata, or are large for a small request.
const METADATA_PATHS: [&str; 3] = ["/strandline.v1.Admin/", "/strandline.v1.Log/ListOffsets", "/grpc.reflection."];

/// Interval of pings, and time without a response to a ping after which a connection counts as dead.
const PING_INTERVAL: Duration = Duration::from_secs(20);

/// Memory budgets of calls, and the schemas by which the parts of requests are counted.
#[derive(Clone)]
struct RequestMemory {
    budgets: Budgets,
    schemas: Arc<RequestSchemas>,
}

/// Returns the services for clients. With `reflection`, also the reflection service, which lists them. The peer service
/// is on another listener.
pub(super) fn routes(
    broker: &Broker,
    health: tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health>,
    reflection: bool,
) -> anyhow::Result<Routes> {
    let log = broker.log_service();
    let mut routes = Routes::new(log.clone().server()).add_service(broker.admin_service()).add_service(health);
    if reflection {
        // Most tools request v1 first; grpcio-reflection and older tools support only v1alpha.
        let reflection_builder = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(CLIENT_DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        routes =
            routes.add_service(reflection_builder().build_v1()?).add_service(reflection_builder().build_v1alpha()?);
    }
    let memory = RequestMemory { budgets: broker.budgets().clone(), schemas: Arc::new(RequestSchemas::of_clients()) };
    // `streams` serves Produce and Fetch. Its exact paths take precedence over the wildcard path of the `Log` service,
    // which therefore serves only the unary calls.
    Ok(layered(routes.into_axum_router().merge(streams::routes(&log)), Some(memory)))
}

/// Returns the services for other brokers; `None` for a standalone broker. The cluster limits the number of other
/// brokers, so their calls are not charged to the memory for clients.
pub(super) fn peer_routes(broker: &OpenedBroker) -> Option<Routes> {
    broker.peer_service().map(|peer| layered(Routes::new(peer).into_axum_router(), None))
}

/// Puts [`handle`] in front of all routes. `memory` is `None` for the calls of other brokers.
fn layered(routes: Router, memory: Option<RequestMemory>) -> Routes {
    routes.layer(axum::middleware::from_fn_with_state(memory, handle)).into()
}

/// Serves connections until the tasks are stopped. Then accepts no further connections, and each connection ends after
/// its open calls.
pub(super) async fn serve(
    routes: Routes,
    connections: impl Stream<Item = io::Result<CountedConnection>> + Send,
    windows: Windows,
    tasks: Tasks,
) {
    let routes = routes.into_axum_router();
    let serve = |connection| serve_connection(windows.clone(), connection, routes.clone(), tasks.clone());
    connection::serve_each(connections, &tasks, serve).await;
}

/// Serves one connection until it ends. When the tasks are stopped, the connection accepts no further calls.
async fn serve_connection(windows: Windows, connection: CountedConnection, routes: Router, tasks: Tasks) {
    let window = windows.reserve();
    let http2 = windows.http2(&window, &tasks);
    let caller = connection.caller();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        trim_head(&mut request);
        request.extensions_mut().insert(caller.clone());
        routes.clone().call(request)
    });
    let mut served = pin!(http2.serve_connection(TokioIo::new(connection), service));
    let ended = tokio::select! {
        biased;
        ended = &mut served => ended,
        () = tasks.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

/// Executor that runs the calls of connections as tasks.
#[derive(Clone)]
struct CallExecutor(Tasks);

impl<F> hyper::rt::Executor<F> for CallExecutor
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, call: F) {
        drop(self.0.spawn("call", call));
    }
}

/// Returns the maximum window of one client connection, in bytes. `memory_bytes` is `limits.memory_bytes`.
fn connection_window(memory_bytes: u64) -> u32 {
    let window = (memory_bytes / CONNECTION_WINDOW_DIVISOR).clamp(MIN_CONNECTION_WINDOW.into(), MAX_CONNECTION_WINDOW);
    u32::try_from(window).expect("the largest is 8 MiB")
}

/// Creates the health service. Returns the reporter that sets its status, and the service.
pub(super) fn health()
-> (HealthReporter, tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health>) {
    health_reporter()
}

/// Sets the health status of the whole server and of every service.
pub(super) async fn set_health_status(reporter: &HealthReporter, status: ServingStatus) {
    for name in HEALTH_NAMES {
        reporter.set_service_status(name, status).await;
    }
}

/// Headers of a request that this server reads.
const HEADERS: [HeaderName; 4] =
    [CONTENT_TYPE, TE, HeaderName::from_static("grpc-encoding"), HeaderName::from_static("grpc-accept-encoding")];

/// Maximum size of the value of a header in [`HEADERS`], in bytes. A header with a longer value is dropped.
const MAX_HEADER_BYTES: usize = 256;

/// Replaces the head of a request by copies of the parts that this server reads: the path and [`HEADERS`]. A call keeps
/// the head of its request while it is open. Each original value is a slice that would keep its whole frame in memory.
fn trim_head<B>(request: &mut hyper::Request<B>) {
    let mut headers = HeaderMap::with_capacity(HEADERS.len());
    for name in HEADERS {
        if let Some(value) = request.headers().get(&name).filter(|value| value.len() <= MAX_HEADER_BYTES)
            && let Ok(copy) = HeaderValue::from_bytes(value.as_bytes())
        {
            headers.insert(name, copy);
        }
    }
    *request.headers_mut() = headers;
    if let Ok(path) = Uri::try_from(request.uri().path().to_owned()) {
        *request.uri_mut() = path;
    }
}

/// Serves a call, counts it on its connection, and charges its request and response to `request_memory`, which is
/// `None` for calls of other brokers. A client's call in [`METADATA_PATHS`] first waits for a permit. Gives a rejection
/// by the transport a stable error code, a message and a matching status.
async fn handle(State(request_memory): State<Option<RequestMemory>>, mut request: Request, next: Next) -> Response {
    // A call that arrives through no listener, as in a simulation, has no connection.
    let caller = request.extensions().get::<Caller>().cloned();
    if let Some(caller) = &caller {
        request.extensions_mut().insert(caller.producer_ids());
    }
    let call_memory = request_memory.as_ref().map(|RequestMemory { budgets, .. }| {
        let connection =
            caller.as_ref().map_or_else(|| budgets.open_connection(|| {}), |caller| caller.memory(budgets));
        CallMemory::new(budgets.clone(), connection)
    });
    let listener = caller.as_ref().map(Caller::listener_kind);
    let call = match caller.map(|caller| caller.begin_call(PROBE_PATHS.contains(&request.uri().path()))).transpose() {
        Ok(call) => call,
        Err(refused) => return Status::from(ApiError::new(ErrorCode::Overloaded, refused.0)).into_http(),
    };
    let uri = request.uri().clone();
    let mut metadata_permit = None;
    if let (Some(memory), Some(RequestMemory { schemas, .. })) = (&call_memory, &request_memory) {
        if METADATA_PATHS.iter().any(|paths| uri.path().starts_with(paths)) {
            metadata_permit = Some(memory.metadata_permit().await);
        }
        request.extensions_mut().insert(memory.clone());
        request = request.map(|body| Body::new(RequestBody::new(body, uri.path(), memory.clone(), schemas)));
    }
    let mut response = next.run(request).await;
    // The memory of a unary request is freed once its response exists, before the client has read the response.
    if let Some(memory) = &call_memory
        && !request_body::is_stream(uri.path())
    {
        drop(memory.take_request());
    }
    if let Some(status) = Status::from_header_map(response.headers())
        && let Some(mut error) = from_transport(&status, uri.path())
    {
        if error.code == ErrorCode::UnknownMethod
            && let Some(message) = listener.and_then(|listener| wrong_listener_message(listener, uri.path()))
        {
            message.clone_into(&mut error.message);
        }
        // If a header cannot be written, the response remains a rejection without a stable error code.
        let _ = Status::from(error).add_header(response.headers_mut());
    }
    calls::hold_until_sent(response, call, call_memory, metadata_permit)
}

/// Returns the message for a call of an unknown method at `path`, if its service is on another listener. Returns `None`
/// if the listener serves such paths.
fn wrong_listener_message(listener: ListenerKind, path: &str) -> Option<&'static str> {
    let is_peer = path.split('/').nth(1) == Some(peer_server::SERVICE_NAME);
    match listener {
        ListenerKind::Peer if !is_peer => {
            Some("this port is for other brokers (peer.listen): clients connect to grpc.listen")
        }
        ListenerKind::Grpc if is_peer => {
            Some("this port is for clients (grpc.listen): other brokers connect to peer.listen")
        }
        ListenerKind::Grpc | ListenerKind::Peer | ListenerKind::Http => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_smaller_with_little_memory() {
        assert_eq!([64, 512, 4096, 1 << 20].map(|mib| connection_window(mib << 20) >> 10), [128, 1024, 8192, 8192]);
    }

    /// Regression: with a window of 1 MiB each, a thousand connections held 1 GB of unread data.
    #[test]
    fn windows_of_many_connections_stay_within_their_memory() {
        let memory_bytes = 512 << 20;
        let windows = Windows::of_clients(memory_bytes);
        let taken: Vec<Window> = (0..1000).map(|_| windows.reserve()).collect();
        let bytes = |windows: &[Window]| windows.iter().map(|window| u64::from(window.bytes)).sum::<u64>();
        assert_eq!(taken[0].bytes, connection_window(memory_bytes), "the first connections have large windows");
        assert!(taken[999].bytes < 100_000, "{}", taken[999].bytes);
        let max_bytes = memory_bytes / ALL_WINDOWS_DIVISOR + 1000 * u64::from(MIN_CONNECTION_WINDOW);
        assert!(bytes(&taken) <= max_bytes, "{} of {max_bytes}", bytes(&taken));
        // Regression: HTTP/2 kept memory for 1,000 streams, up to 1.5 MB, for each connection that once had 1,000 open
        // streams.
        assert_eq!(taken[0].streams, limits::MAX_STREAMS_PER_CONNECTION);
        assert!((MIN_STREAMS..MIN_STREAMS + 10).contains(&taken[999].streams), "{}", taken[999].streams);
        let streams = taken.iter().map(|window| window.streams as usize).sum::<usize>();
        let max_streams = (memory_bytes / ALL_STREAMS_DIVISOR) as usize / STREAM_BYTES + 1000 * MIN_STREAMS as usize;
        assert!(streams <= max_streams, "{streams} of {max_streams}");
        drop(taken);
        assert_eq!(windows.reserve().bytes, connection_window(memory_bytes), "windows are returned");
        assert_eq!(Windows::of_brokers().reserve().bytes, 256 << 10);
    }

    /// Regression: streams whose requests had 12 KB of headers took 26 KiB each instead of 7 KiB.
    #[test]
    fn request_head_keeps_only_headers_that_are_read() {
        let long = "a".repeat(MAX_HEADER_BYTES + 1);
        let mut request = Request::post("/strandline.v1.Log/Append?more")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-encoding", "gzip")
            .header("grpc-accept-encoding", &long)
            .header("x-large", &long)
            .body(Body::empty())
            .expect("a request");
        trim_head(&mut request);
        let names: Vec<_> = request.headers().keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["content-type", "te", "grpc-encoding"]);
        assert_eq!(request.uri(), "/strandline.v1.Log/Append");
    }

    /// Regression: calls whose responses were not read held the memory of their requests. Four connections held all
    /// memory for requests.
    #[tokio::test]
    async fn request_memory_is_freed_before_response_is_read() {
        let budgets = Budgets::new(1 << 20, 1 << 20);
        let memory = RequestMemory { budgets: budgets.clone(), schemas: Arc::new(RequestSchemas::of_clients()) };
        let handler = {
            let budgets = budgets.clone();
            move |body: Body| async move {
                axum::body::to_bytes(body, usize::MAX).await.expect("one message");
                assert!(budgets.taken().0 > 0, "the message is charged during the call");
                "answer"
            }
        };
        let path = "/strandline.v1.Admin/GetMetadata";
        let mut service = axum::Router::new()
            .route(path, axum::routing::post(handler))
            .layer(axum::middleware::from_fn_with_state(Some(memory), handle));
        // A request for one topic with an empty name.
        let request = Request::post(path).body(Body::from(vec![0, 0, 0, 0, 2, 0x0a, 0])).expect("a request");
        let response = service.call(request).await.expect("the service is infallible");
        assert!(response.status().is_success());
        assert_eq!(budgets.taken().0, 0);
        drop(response);
    }
}
