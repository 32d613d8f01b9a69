//! The HTTP listener: `/metrics`, `/healthz`, `/readyz`. The two probes respond without a wait. Metrics are rendered on
//! a separate thread, one page at a time. An idle connection is closed if a new one needs its slot (`connection`).

use std::{
    io,
    pin::pin,
    sync::{Arc, OnceLock},
};

use axum::{
    Extension, Router,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use futures::Stream;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Semaphore;
use tonic::codegen::Service as _;

use super::{
    calls,
    connection::{self, Caller, CountedConnection, IDLE_TIMEOUT},
};
use crate::{
    broker::{Broker, Readiness},
    task::{self, Tasks},
    telemetry::{Metrics, MetricsFormat},
};

/// Maximum size of a request's head, in bytes.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// Paths of probes, which are also served on connections above the connection limit.
const PROBE_PATHS: [&str; 2] = ["/healthz", "/readyz"];

/// State of the request handlers. The listener also serves during a start, before there is a broker.
pub(super) struct HttpState {
    broker: OnceLock<Arc<Broker>>,
    metrics: Metrics,
    /// Permit for rendering the metrics. Concurrent requests for metrics wait for the permit and occupy no threads.
    rendering: Arc<Semaphore>,
}

impl HttpState {
    /// Creates the state without a broker. `/metrics` already serves the counters.
    pub(super) fn new(metrics: Metrics) -> Self {
        Self { broker: OnceLock::new(), metrics, rendering: Arc::new(Semaphore::new(1)) }
    }

    /// Sets the broker that the handlers report on. Only the first call has an effect.
    pub(super) fn set_broker(&self, broker: &Arc<Broker>) {
        self.broker.get_or_init(|| Arc::clone(broker));
    }
}

/// Serves connections until the tasks are stopped. Then each connection ends after its current response. The listener
/// supports only HTTP/1, so that a connection holds one response at a time.
pub(super) async fn serve(
    state: Arc<HttpState>,
    connections: impl Stream<Item = io::Result<CountedConnection>> + Send,
    tasks: Tasks,
) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(state)
        .layer(middleware::from_fn(count_call));
    let serve = |connection| serve_connection(connection, router.clone(), tasks.clone());
    connection::serve_each(connections, &tasks, serve).await;
}

/// Serves one connection until it ends. When the tasks are stopped, it ends after its current response.
async fn serve_connection(connection: CountedConnection, router: Router, tasks: Tasks) {
    let caller = connection.caller();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(caller.clone());
        router.clone().call(request)
    });
    let mut http1 = http1::Builder::new();
    http1.timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT).max_buf_size(MAX_HEAD_BYTES);
    let mut served = pin!(http1.serve_connection(TokioIo::new(connection), service));
    let ended = tokio::select! {
        biased;
        ended = &mut served => ended,
        () = tasks.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an HTTP connection ended with an error");
    }
}

/// Counts the request as an open call of its connection until the response has been sent. Responds with 503 if the
/// connection limit rejects the call.
async fn count_call(Extension(caller): Extension<Caller>, request: Request, next: Next) -> Response {
    match caller.begin_call(PROBE_PATHS.contains(&request.uri().path())) {
        Ok(call) => calls::hold_until_sent(next.run(request).await, Some(call), None, None),
        Err(refused) => (StatusCode::SERVICE_UNAVAILABLE, [(header::CONNECTION, "close")], format!("{}\n", refused.0))
            .into_response(),
    }
}

/// Renders the metrics of the process. During the start, the gauges that the broker updates for each page are 0.
async fn metrics(State(state): State<Arc<HttpState>>, headers: HeaderMap) -> impl IntoResponse {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let format = MetricsFormat::accepted(accepted);
    let permit = Arc::clone(&state.rendering).acquire_owned().await;
    let (broker, metrics) = (state.broker.get().cloned(), state.metrics.clone());
    let rendered = task::run_blocking(move || {
        // The permit is held until the page is complete, even if the client has disconnected.
        let _permit = permit;
        if let Some(broker) = &broker {
            broker.observe();
        }
        metrics.render(format)
    });
    ([(header::CONTENT_TYPE, format.content_type()), (header::VARY, "accept")], rendered.await)
}

/// Responds with 200 if the storage of the process works, and during the start; else with 503 and the reason. A restart
/// of the process may then help.
async fn healthz(State(state): State<Arc<HttpState>>) -> impl IntoResponse {
    match state.broker.get().map_or(Ok(()), |broker| broker.health()) {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

/// Responds with 200 and the broker's impairments if the broker serves requests; else with 503 and the reason.
async fn readyz(State(state): State<Arc<HttpState>>) -> impl IntoResponse {
    let starting = || Readiness::NotReady("starting".to_owned());
    match state.broker.get().map_or_else(starting, |broker| broker.readiness()) {
        Readiness::NotReady(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")),
        Readiness::Ready(impaired) if impaired.is_empty() => (StatusCode::OK, "ok\n".to_owned()),
        Readiness::Ready(impaired) => {
            (StatusCode::OK, impaired.iter().map(|line| format!("impaired: {line}\n")).collect())
        }
    }
}
