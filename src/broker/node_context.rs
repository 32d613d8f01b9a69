//! The context of one node: its configuration, its stores, and what all parts of a broker share. Cheap to clone.
//!
//! A part of the broker that needs only one or two of these values gets the values instead of the context.

use std::sync::Arc;

use crate::{
    cluster::{Keys, MetaStore, MetadataCache},
    config::Config,
    log::DataDir,
    model::BrokerId,
    partition::Partition,
    task::Tasks,
    telemetry::Metrics,
    tier::{ChunkCache, TierStore},
};

/// The object store, and the chunk cache for reads from it.
#[derive(Clone)]
pub struct TierHandle {
    pub store: TierStore,
    /// Chunk cache shared by all partitions.
    pub cache: ChunkCache,
}

/// Dependencies that the parts of a broker share.
#[derive(Clone)]
pub struct NodeContext {
    pub config: Arc<Config>,
    /// Id of this broker, from its configuration.
    pub id: BrokerId,
    pub log: DataDir,
    pub store: Arc<dyn MetaStore>,
    /// Keys of the cluster in the metadata store.
    pub keys: Keys,
    pub metadata: MetadataCache,
    /// Object store; `None` for a broker without one.
    pub tier: Option<TierHandle>,
    pub metrics: Arc<Metrics>,
    /// Incarnation of this process, which its registration contains.
    pub incarnation: Arc<str>,
    /// True for a standalone broker, whose metadata store is in its data directory.
    pub standalone: bool,
    /// Tasks of the broker, except the tasks of partitions and of links.
    pub tasks: Tasks,
}

impl NodeContext {
    /// Returns true if this broker is the controller or standalone, and so does the work that only one broker may do.
    pub(super) fn is_controller(&self) -> bool {
        self.standalone || self.metadata.state().controller() == Some(self.id)
    }

    /// Returns the number of records of a partition that are not in the object store yet. Returns 0 if the topic or the
    /// broker uses no object store.
    pub(super) fn tier_lag(&self, partition: &Partition) -> u64 {
        if !partition.config().tiered || self.tier.is_none() {
            return 0;
        }
        let watermarks = partition.watermarks();
        watermarks.log_end.since(watermarks.tiered_end.max(watermarks.log_start))
    }
}
