//! The gRPC listener: services, health, reflection, and HTTP/2 tuned for batches.

use std::{future::Future, io, sync::Arc, time::Duration};

use futures::Stream;
use tonic::transport::Server;
use tonic_health::server::{HealthReporter, health_reporter};

use super::connection::Connection;
use crate::{
    broker::{Broker, services},
    proto::DESCRIPTORS,
};

/// Bytes that one stream may have on its way to us. Throughput over a distance is bounded by this per round trip.
const STREAM_WINDOW: u32 = 4 << 20;

/// Bytes that all streams of one connection may have on their way to us.
const CONNECTION_WINDOW: u32 = 8 << 20;

/// Largest HTTP/2 frame.
const FRAME: u32 = 256 << 10;

/// Streams of one connection.
const STREAMS: u32 = 10_000;

/// After so long without an answer to a ping a connection counts as dead.
const PING: Duration = Duration::from_secs(20);

/// Serves until `stop` resolves; then takes nothing new and ends when what is under way has ended.
pub(super) async fn serve(
    broker: &Arc<Broker>,
    health: tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health>,
    connections: impl Stream<Item = io::Result<Connection>> + Send + 'static,
    stop: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    let (log, admin) = services(broker);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(STREAMS)
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(PING))
        .add_service(log)
        .add_service(admin)
        .add_service(health)
        .add_service(reflection)
        .serve_with_incoming_shutdown(connections, stop)
        .await?;
    Ok(())
}

/// The health service, and the hand that sets it.
pub(super) fn health()
-> (HealthReporter, tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health>) {
    health_reporter()
}
