//! The gRPC listeners, for clients and for other brokers: services, health, reflection, and HTTP/2 tuned for batches.
//!
//! What the transport itself refuses (a message above the limit, bytes that are no message, an unknown method) never
//! reaches a service. [`answer`] gives these answers the same stable words that every other failure carries, and counts calls by
//! connection.

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
    connection::{self, Caller, Connection, Port},
    request_body::{self, RequestBody},
    streams,
};
use crate::{
    broker::{Broker, Budgets, CallMemory, LogService, admin_service, peer_service},
    limits,
    partition::Memory,
    proto::{
        CLIENT_DESCRIPTORS,
        fault::{self, Fault, Reason},
        parts::RequestSchemas,
        v1::{admin_server, log_server, peer_server},
    },
    task::Tasks,
};

/// Whom health is told of: the whole server, which has no name, and each service.
const HEALTH_NAMES: [&str; 3] = ["", log_server::SERVICE_NAME, admin_server::SERVICE_NAME];

/// Most and least bytes that all streams of one connection may have on their way to us: what nobody reads of that is in memory, for each
/// connection. One stream may have half of it, and the least at least: a small request fits into it.
const MAX_CONNECTION_WINDOW: u64 = 8 << 20;
const MIN_CONNECTION_WINDOW: u32 = 80 << 10;

/// The part of all memory that the window of one connection is at most, as a divisor.
const WINDOW_SHARE: u64 = 512;

/// The part of all memory that the windows of all connections take beside the smallest ones, as a divisor.
const WINDOWS_SHARE: u64 = 16;

/// The part of all memory that streams of all connections take beside the fewest, as a divisor, and the bytes of one: HTTP/2 keeps the room of
/// as many as were open at a time, for as long as its connection.
const STREAMS_SHARE: u64 = 16;
const STREAM_BYTES: usize = 1536;

/// Streams that each connection may have open, however many connections there are.
const MIN_STREAMS: u32 = 100;

/// A new connection gets at most this part of what is left for windows and for streams, as a divisor: the later ones get less.
const LEFT_SHARE: usize = 8;

/// The windows of a listener's connections: bytes that clients may send before they are read, and streams that they may have open. Clones
/// share the memory for them.
#[derive(Clone, Debug)]
pub(super) struct Windows {
    /// Calls and streams of a connection that are open, at most.
    streams: u32,
    /// Largest HTTP/2 frame.
    frame_bytes: u32,
    /// Bytes of a stream's responses that HTTP/2 keeps: with less than this HTTP/2 asks a call for more, whatever its caller has read.
    send_buffer_bytes: usize,
    /// Bytes that all streams of one connection may have on their way to us, at most.
    connection_bytes: u32,
    /// The part of them that one stream may have, as a divisor. Throughput over a distance is bounded by this per round trip.
    stream_share: u32,
    /// For what is above [`MIN_CONNECTION_WINDOW`], and for streams above [`MIN_STREAMS`]; `None` where connections are few.
    memory: Option<[Memory; 2]>,
}

/// The window of a connection, for as long as that is open.
struct Window {
    bytes: u32,
    streams: u32,
    _memory: [Option<OwnedSemaphorePermit>; 2],
}

impl Windows {
    /// Other brokers send questions and what they have. The batches of a link come from here, and its other end sets their window.
    pub(super) const fn of_brokers() -> Self {
        Self {
            streams: limits::MAX_STREAMS_PER_PEER,
            frame_bytes: 16 << 10,
            // They read what they asked for: several batches go out with one write.
            send_buffer_bytes: 256 << 10,
            connection_bytes: 256 << 10,
            stream_share: 1,
            memory: None,
        }
    }

    /// Clients send batches.
    pub(super) fn of_clients(memory_bytes: u64) -> Self {
        Self {
            streams: limits::MAX_STREAMS_PER_CONNECTION,
            // Frames that are not whole are in memory too, and HTTP/2 puts together five of a head before it looks how large that is.
            frame_bytes: 32 << 10,
            send_buffer_bytes: 16 << 10,
            connection_bytes: connection_window(memory_bytes),
            stream_share: 2,
            memory: Some([WINDOWS_SHARE, STREAMS_SHARE].map(|share| Memory::new(memory_bytes / share))),
        }
    }

    /// The window of a new connection.
    fn take(&self) -> Window {
        let Some([windows, streams]) = &self.memory else {
            return Window { bytes: self.connection_bytes, streams: self.streams, _memory: [None, None] };
        };
        let (bytes, window) = take_part(windows, self.connection_bytes - MIN_CONNECTION_WINDOW, 1);
        let (more, room) = take_part(streams, self.streams - MIN_STREAMS, STREAM_BYTES);
        Window { bytes: MIN_CONNECTION_WINDOW + bytes, streams: MIN_STREAMS + more, _memory: [window, room] }
    }

    /// HTTP/2 on a connection with this window.
    fn http2(&self, window: &Window, tasks: &Tasks) -> http2::Builder<CallExecutor> {
        let mut http2 = http2::Builder::new(CallExecutor(tasks.clone()));
        http2
            .timer(TokioTimer::new())
            .initial_stream_window_size((window.bytes / self.stream_share).max(MIN_CONNECTION_WINDOW))
            .initial_connection_window_size(window.bytes)
            .max_frame_size(self.frame_bytes)
            .max_concurrent_streams(window.streams)
            .max_send_buf_size(self.send_buffer_bytes)
            .keep_alive_interval(Some(PING))
            .keep_alive_timeout(PING);
        http2
    }
}

/// Takes memory for `most` of what has `bytes` each, or for as many as a new connection gets of what is left: how many, and the memory.
fn take_part(memory: &Memory, most: u32, bytes: usize) -> (u32, Option<OwnedSemaphorePermit>) {
    let left = (memory.bytes() - memory.taken()) / LEFT_SHARE / bytes;
    let count = u32::try_from(left).unwrap_or(u32::MAX).min(most);
    let taken = memory.try_take(count as usize * bytes);
    (if taken.is_some() { count } else { 0 }, taken)
}

/// The calls of probes, by clients and by other brokers. They are answered on connections that have no place too; `Watch`, which never
/// ends, is not.
const PROBE_PATHS: [&str; 2] = ["/grpc.health.v1.Health/Check", "/strandline.v1.Peer/WhoIs"];

/// Calls whose answers grow with the metadata, or are large and made of little.
const METADATA_PATHS: [&str; 3] = ["/strandline.v1.Admin/", "/strandline.v1.Log/ListOffsets", "/grpc.reflection."];

/// After so long without an answer to a ping a connection counts as dead.
const PING: Duration = Duration::from_secs(20);

/// What calls take their memory from, and how their parts are counted.
#[derive(Clone)]
struct RequestMemory {
    budgets: Budgets,
    schemas: Arc<RequestSchemas>,
}

/// Everything that a broker answers to clients, which reflection shows. The brokers' own service is at another listener.
pub(super) fn routes(
    broker: &Arc<Broker>,
    health: tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health>,
    reflection: bool,
) -> anyhow::Result<Routes> {
    let log = LogService::new(broker);
    let mut routes = Routes::new(log.clone().server()).add_service(admin_service(broker)).add_service(health);
    if reflection {
        // Most tools ask for v1 first; grpcio-reflection and older ones know v1alpha alone.
        let shown = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(CLIENT_DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        routes = routes.add_service(shown().build_v1()?).add_service(shown().build_v1alpha()?);
    }
    let memory = RequestMemory { budgets: broker.budgets().clone(), schemas: Arc::new(RequestSchemas::of_clients()) };
    Ok(layered(routes.into_axum_router().merge(streams::routes(&log)), Some(memory)))
}

/// What a broker answers to other brokers; `None` for a broker alone. Other brokers are as many as there are: their calls take nothing from
/// the clients' memory.
pub(super) fn peer_routes(broker: &Arc<Broker>) -> Option<Routes> {
    peer_service(broker).map(|peer| layered(Routes::new(peer).into_axum_router(), None))
}

fn layered(routes: Router, memory: Option<RequestMemory>) -> Routes {
    routes.layer(axum::middleware::from_fn_with_state(memory, answer)).into()
}

/// Serves until the tasks are stopped; then takes nothing new, and each connection ends when what is under way on it has ended.
pub(super) async fn serve(
    routes: Routes,
    connections: impl Stream<Item = io::Result<Connection>> + Send,
    windows: Windows,
    tasks: Tasks,
) {
    let routes = routes.into_axum_router();
    let serve = |connection| serve_connection(windows.clone(), connection, routes.clone(), tasks.clone());
    connection::serve_each(connections, &tasks, serve).await;
}

async fn serve_connection(windows: Windows, connection: Connection, routes: Router, tasks: Tasks) {
    let window = windows.take();
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

/// Runs the calls of connections as tasks.
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

fn connection_window(memory_bytes: u64) -> u32 {
    let window = (memory_bytes / WINDOW_SHARE).clamp(MIN_CONNECTION_WINDOW.into(), MAX_CONNECTION_WINDOW);
    u32::try_from(window).expect("the largest is 8 MiB")
}

/// The health service, and the hand that sets it.
pub(super) fn health()
-> (HealthReporter, tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health>) {
    health_reporter()
}

/// Says of every service whether it takes requests.
pub(super) async fn report(reporter: &HealthReporter, status: ServingStatus) {
    for name in HEALTH_NAMES {
        reporter.set_service_status(name, status).await;
    }
}

/// The headers of a request that anything here reads, and the most bytes of one.
const HEADERS: [HeaderName; 4] =
    [CONTENT_TYPE, TE, HeaderName::from_static("grpc-encoding"), HeaderName::from_static("grpc-accept-encoding")];
const MAX_HEADER_BYTES: usize = 256;

/// Keeps copies of what is read of a request's head. A call holds its head for as long as it is open, and each value of it the whole frame.
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

/// Serves a call, counted on its connection, and gives a refusal of the transport's own a stable word, a sentence and a fitting code.
async fn answer(State(memory): State<Option<RequestMemory>>, mut request: Request, next: Next) -> Response {
    // Calls that come by no listener of ours, as in a simulation, have no connection.
    let caller = request.extensions().get::<Caller>().cloned();
    if let Some(caller) = &caller {
        request.extensions_mut().insert(caller.producer_ids());
    }
    let connection = |memory: &RequestMemory| {
        caller.as_ref().map_or_else(|| memory.budgets.connection(|| {}), |caller| caller.memory(&memory.budgets))
    };
    let memory = memory.map(|memory| (CallMemory::new(memory.budgets.clone(), connection(&memory)), memory.schemas));
    let port = caller.as_ref().map(Caller::port);
    let call = match caller.map(|caller| caller.begin_call(PROBE_PATHS.contains(&request.uri().path()))).transpose() {
        Ok(call) => call,
        Err(refused) => return Status::from(Fault::new(Reason::Overloaded, refused.0)).into_http(),
    };
    let uri = request.uri().clone();
    let (mut held, mut turn) = (None, None);
    if let Some((memory, schemas)) = memory {
        let is_metadata = METADATA_PATHS.iter().any(|paths| uri.path().starts_with(paths));
        turn = if is_metadata { Some(memory.metadata_turn().await) } else { None };
        request.extensions_mut().insert(memory.clone());
        request = request.map(|body| Body::new(RequestBody::new(body, uri.path(), memory.clone(), &schemas)));
        held = Some(memory);
    }
    let mut response = next.run(request).await;
    // Nothing of a request is left when its answer is there, however long that takes to be read.
    if let Some(memory) = &held
        && !request_body::is_stream(uri.path())
    {
        drop(memory.take_request());
    }
    if let Some(status) = Status::from_header_map(response.headers())
        && let Some(mut fault) = fault::of_transport(&status, uri.path())
    {
        if fault.reason == Reason::UnknownMethod
            && let Some(message) = port.and_then(|port| misdirected(port, uri.path()))
        {
            message.clone_into(&mut fault.message);
        }
        // A header that cannot be written leaves the answer as it was: refused, without our word.
        let _ = Status::from(fault).add_header(response.headers_mut());
    }
    calls::until_sent(response, call, held, turn)
}

/// What a call of `path` is told that came to the wrong listener.
fn misdirected(port: Port, path: &str) -> Option<&'static str> {
    let is_peer = path.split('/').nth(1) == Some(peer_server::SERVICE_NAME);
    match port {
        Port::Peer if !is_peer => Some("this port is for other brokers (peer.listen): clients connect to grpc.listen"),
        Port::Grpc if is_peer => Some("this port is for clients (grpc.listen): other brokers connect to peer.listen"),
        Port::Grpc | Port::Peer | Port::Http => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_smaller_where_there_is_little_memory() {
        assert_eq!([64, 512, 4096, 1 << 20].map(|mib| connection_window(mib << 20) >> 10), [128, 1024, 8192, 8192]);
    }

    /// A window of 1 MiB each: a thousand connections held a gigabyte that nobody read.
    #[test]
    fn windows_of_many_connections_stay_within_their_memory() {
        let memory_bytes = 512 << 20;
        let windows = Windows::of_clients(memory_bytes);
        let taken: Vec<Window> = (0..1000).map(|_| windows.take()).collect();
        let bytes = |windows: &[Window]| windows.iter().map(|window| u64::from(window.bytes)).sum::<u64>();
        assert_eq!(taken[0].bytes, connection_window(memory_bytes), "the first have large ones");
        assert!(taken[999].bytes < 100_000, "{}", taken[999].bytes);
        let most = memory_bytes / WINDOWS_SHARE + 1000 * u64::from(MIN_CONNECTION_WINDOW);
        assert!(bytes(&taken) <= most, "{} of {most}", bytes(&taken));
        // HTTP/2 kept the room of 1,000 streams with each connection that had had as many: up to 1.5 MB.
        assert_eq!(taken[0].streams, limits::MAX_STREAMS_PER_CONNECTION);
        assert!((MIN_STREAMS..MIN_STREAMS + 10).contains(&taken[999].streams), "{}", taken[999].streams);
        let streams = taken.iter().map(|window| window.streams as usize).sum::<usize>();
        let most = (memory_bytes / STREAMS_SHARE) as usize / STREAM_BYTES + 1000 * MIN_STREAMS as usize;
        assert!(streams <= most, "{streams} of {most}");
        drop(taken);
        assert_eq!(windows.take().bytes, connection_window(memory_bytes), "they are given back");
        assert_eq!(Windows::of_brokers().take().bytes, 256 << 10);
    }

    /// Streams whose requests had 12 KB of headers took 26 KiB each, and not 7.
    #[test]
    fn head_of_a_request_keeps_copies_of_what_is_read() {
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
        let kept: Vec<_> = request.headers().keys().map(HeaderName::as_str).collect();
        assert_eq!(kept, ["content-type", "te", "grpc-encoding"]);
        assert_eq!(request.uri(), "/strandline.v1.Log/Append");
    }

    /// Calls whose answers nobody read held the memory of their requests, and four connections all of it.
    #[tokio::test]
    async fn request_memory_is_given_back_before_the_answer_is_read() {
        let budgets = Budgets::new(1 << 20, 1 << 20);
        let memory = RequestMemory { budgets: budgets.clone(), schemas: Arc::new(RequestSchemas::of_clients()) };
        let handler = {
            let budgets = budgets.clone();
            move |body: Body| async move {
                axum::body::to_bytes(body, usize::MAX).await.expect("one message");
                assert!(budgets.taken().0 > 0, "it is charged while it is handled");
                "answer"
            }
        };
        let path = "/strandline.v1.Admin/GetMetadata";
        let mut service = axum::Router::new()
            .route(path, axum::routing::post(handler))
            .layer(axum::middleware::from_fn_with_state(Some(memory), answer));
        // One topic without a name.
        let request = Request::post(path).body(Body::from(vec![0, 0, 0, 0, 2, 0x0a, 0])).expect("a request");
        let response = service.call(request).await.expect("it never fails");
        assert!(response.status().is_success());
        assert_eq!(budgets.taken().0, 0);
        drop(response);
    }
}
