//! Raises the cluster generation while no broker runs: `strandline cluster new-generation`.
//!
//! The generation of the metadata store is raised first, then that of the object store. After a crash in between, the
//! object store has the lower one, which the next start of any broker raises. The generation of a data directory is
//! raised when its broker starts.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};

use super::open_objects;
use crate::{
    cluster::{BrokerValue, EMBEDDED_FILE, EmbeddedStore, EtcdStore, Generations, Keys, MetaStore, Value as _},
    config::Config,
    task::clock,
    tier::{StoreOwner, TierStore},
};

/// Maximum time that registrations outlast `metadata.session_timeout`: etcd restarts all leases when it elects a
/// leader.
const MAX_LEASE_EXPIRY_DELAY: Duration = Duration::from_secs(5);

/// Pause between two checks for registrations.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// Result of raising the generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Raised {
    /// Previous generation in the metadata store; `None` if no cluster has used the store.
    pub before: Option<u64>,
    /// Previous generation in the object store; `None` without an object store, or if no cluster has used it.
    pub object_store_before: Option<u64>,
    /// New generation.
    pub generation: u64,
    /// Error of raising the generation of the object store; `None` on success, and if `object_store_before` is `None`.
    /// Brokers raise this generation when they start.
    pub object_store_error: Option<String>,
}

/// Raises the generation above those of the metadata store and of the object store, and above `min`. With etcd, waits
/// until no broker is registered, for at most `metadata.session_timeout` and 5 s.
///
/// # Errors
/// A store does not respond or cannot be opened, such as the metadata store of a running standalone broker. The object
/// store belongs to another cluster, or brokers are registered.
pub async fn raise_generation(config: &Config, min: u64) -> anyhow::Result<Raised> {
    let keys = Keys::new(&config.cluster)?;
    let meta = open_metadata(config).await?;
    // A running standalone broker keeps the file of its store locked, so the store could not have been opened here.
    if !config.metadata.etcd.is_empty() {
        wait_for_no_brokers(&*meta, &keys, config.metadata.session_timeout + MAX_LEASE_EXPIRY_DELAY).await?;
    }
    let objects = config.object_store.url.as_deref().map(|url| open_objects(config, url)).transpose()?;
    let object_store_before = match &objects {
        Some(objects) => objects.generation().await.context("cannot read the generation of the object store")?,
        None => None,
    };
    let generations = Generations::new(meta, keys);
    let before = generations.current().await?;
    let generation = generations.raise(object_store_before.unwrap_or_default().max(min)).await?;
    let object_store_error = match &objects {
        Some(objects) if object_store_before.is_some() => raise_in_object_store(objects, generation).await.err(),
        _ => None,
    };
    Ok(Raised { before, object_store_before, generation, object_store_error })
}

/// Raises the generation in the object store. The owner has no storage of bindings, so `bind` changes only the cluster
/// marker.
async fn raise_in_object_store(objects: &TierStore, generation: u64) -> Result<(), String> {
    let owner = StoreOwner { generation, ..StoreOwner::default() };
    objects.clone().owned_by(owner).bind().await.map_err(|error| error.to_string())
}

/// Opens the metadata store of the configuration. The store of a standalone broker must exist.
async fn open_metadata(config: &Config) -> anyhow::Result<Arc<dyn MetaStore>> {
    if let Some(options) = config.etcd()? {
        return Ok(Arc::new(EtcdStore::open(options).await?));
    }
    let file = config.broker.data_dir.join(EMBEDDED_FILE);
    ensure!(
        file.exists(),
        "{} does not exist: set broker.data_dir to the data directory of the broker",
        file.display()
    );
    Ok(Arc::new(EmbeddedStore::open(&config.broker.data_dir).await?))
}

/// Waits until no broker is registered, and fails after `timeout`. A restored etcd contains the registrations of its
/// backup, and restarts their leases.
async fn wait_for_no_brokers(meta: &dyn MetaStore, keys: &Keys, timeout: Duration) -> anyhow::Result<()> {
    let deadline = clock::monotonic() + timeout;
    loop {
        let listing = meta.list(&format!("{}brokers/", keys.prefix())).await?;
        let address = |value: BrokerValue| value.listeners.client().to_owned();
        // The address of each registered broker; its key if the registration cannot be read.
        let registered = listing
            .entries
            .iter()
            .map(|entry| BrokerValue::decode(&entry.key, &entry.value).map_or(entry.key.clone(), address));
        let registered: Vec<String> = registered.collect();
        if registered.is_empty() {
            return Ok(());
        }
        ensure!(
            clock::monotonic() < deadline,
            "brokers are registered at {}: stop all brokers first, because a running broker does not detect a new \
             generation",
            registered.join(", ")
        );
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}
