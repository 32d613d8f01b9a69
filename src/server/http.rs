//! The HTTP listener: `/metrics`, `/healthz`, `/readyz`.

use std::{future::Future, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;

use crate::broker::Broker;

/// Serves until `stop` resolves.
pub(super) async fn serve(
    broker: Arc<Broker>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(broker);
    axum::serve(listener, router).with_graceful_shutdown(stop).await?;
    Ok(())
}

async fn metrics(State(broker): State<Arc<Broker>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], broker.render_metrics())
}

/// Whether the process is alive and its storage sound: a failure here means that restarting may help.
async fn healthz(State(broker): State<Arc<Broker>>) -> impl IntoResponse {
    answer(broker.health())
}

/// Whether it takes requests.
async fn readyz(State(broker): State<Arc<Broker>>) -> impl IntoResponse {
    answer(broker.readiness())
}

fn answer(state: Result<(), String>) -> (StatusCode, String) {
    match state {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}
