//! The HTTP listener: `/metrics`, `/healthz`, `/readyz`.

use std::{
    future::Future,
    sync::{Arc, OnceLock},
};

use super::connection::Guarded;
use crate::broker::Broker;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};

/// What the pages tell of: the broker, once there is one. A start that waits for others is asked how it is as well.
#[derive(Default)]
pub(super) struct Pages(OnceLock<Arc<Broker>>);

impl Pages {
    /// From now on the pages tell of this broker.
    pub(super) fn tell_of(&self, broker: &Arc<Broker>) {
        self.0.get_or_init(|| Arc::clone(broker));
    }
}

/// Serves until `stop` resolves.
pub(super) async fn serve(
    pages: Arc<Pages>,
    listener: Guarded,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(pages);
    axum::serve(listener, router).with_graceful_shutdown(stop).await?;
    Ok(())
}

async fn metrics(State(pages): State<Arc<Pages>>) -> impl IntoResponse {
    let figures = pages.0.get().map(|broker| broker.render_metrics()).unwrap_or_default();
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], figures)
}

/// Whether the process is alive and its storage sound: a failure here means that restarting may help.
async fn healthz(State(pages): State<Arc<Pages>>) -> impl IntoResponse {
    answer(pages.0.get().map_or(Ok(()), |broker| broker.health()))
}

/// Whether it takes requests.
async fn readyz(State(pages): State<Arc<Pages>>) -> impl IntoResponse {
    let starting = || Err("not ready: starting".to_owned());
    answer(pages.0.get().map_or_else(starting, |broker| broker.readiness()))
}

fn answer(state: Result<(), String>) -> (StatusCode, String) {
    match state {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}
