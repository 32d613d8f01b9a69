//! The requests of clients and operators, with one module for each family of requests. The module `errors` has the
//! mapping from errors of the inner modules to API errors.
//!
//! The handler of a request for a partition looks up the local replica. If this broker does not serve the
//! partition, the error names the leader, if there is one.

mod describe;
mod errors;
mod fetch;
mod offsets;
mod operations;
mod produce;
mod rebuild;
mod service;
mod topics;

use std::sync::Arc;

use tokio::sync::Semaphore;

pub use self::service::{AdminService, LogService, Requests};
use self::{
    describe::Describe, fetch::Fetch, offsets::OffsetFinder, operations::Operations, produce::Produce,
    rebuild::ManifestRebuilder, topics::TopicAdmin,
};
use super::{
    SharedState,
    background::Background,
    budget::{Budgets, CallMemory},
    node_context::NodeContext,
    partitions::lookup::ReplicaLookup,
    replication::peer_status::PeerStatus,
};
use crate::{limits, partition::Decompressor, task::Tasks};

/// Handlers of all requests.
pub(super) struct Api {
    pub(super) produce: Arc<Produce>,
    pub(super) fetch: Arc<Fetch>,
    pub(super) offsets: OffsetFinder,
    pub(super) topics: TopicAdmin,
    pub(super) describe: Describe,
    pub(super) operations: Operations,
    rebuilder: ManifestRebuilder,
    budgets: Budgets,
    /// Its cancellation ends the streams of clients.
    streams: Tasks,
}

impl Api {
    pub(super) fn new(
        ctx: &NodeContext,
        background: &Background,
        shared: SharedState,
        peer_status: PeerStatus,
    ) -> Self {
        let SharedState { partitions, failures, health, topics, budgets, produce_memory, commits } = shared;
        let (streams, peer_status) = (Tasks::new(), Arc::new(peer_status));
        let lookup = ReplicaLookup::new(ctx, Arc::clone(&partitions));
        // All handlers share one decompressor, which bounds the memory of decompressed batches.
        let decompressor = Decompressor::new(ctx.config.limits.decompression_memory_bytes);
        let lease = &background.lease;
        Self {
            produce: Arc::new(Produce {
                ctx: ctx.clone(),
                lookup: lookup.clone(),
                memory: produce_memory,
                tiered_appends: Arc::new(Semaphore::new(limits::MAX_TIERED_APPENDS)),
                decompressor: decompressor.clone(),
                producer_ids: Arc::clone(&background.producer_ids),
                failures,
                stop: streams.clone(),
            }),
            fetch: Arc::new(Fetch {
                ctx: ctx.clone(),
                lookup: lookup.clone(),
                decompressor: decompressor.clone(),
                lease: lease.subscribe(),
                stop: streams.clone(),
            }),
            offsets: OffsetFinder {
                lookup,
                decompressor,
                lease: lease.subscribe(),
                max_wait: ctx.config.tier.fetch_max_wait,
            },
            topics: TopicAdmin { ctx: ctx.clone(), topics, partitions: Arc::clone(&partitions) },
            describe: Describe {
                ctx: ctx.clone(),
                partitions,
                peers: Arc::clone(&peer_status),
                lease: lease.subscribe(),
            },
            operations: Operations::new(ctx.clone(), peer_status, Arc::clone(lease), health),
            rebuilder: ManifestRebuilder::new(ctx.clone(), commits),
            budgets,
            streams,
        }
    }

    /// Returns the memory budgets of requests and responses.
    pub(super) fn budgets(&self) -> &Budgets {
        &self.budgets
    }

    /// Returns the memory of a call without a connection of its own, with new shares that no other call uses.
    pub(super) fn call_memory(&self) -> CallMemory {
        CallMemory::new(self.budgets.clone(), self.budgets.open_connection(|| {}))
    }

    /// Signals all streams of clients to end. A produce stream ends after it has returned the responses to all received
    /// writes.
    pub(super) async fn stop(&self) {
        self.streams.stop().await;
    }
}
