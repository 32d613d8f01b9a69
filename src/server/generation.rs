//! Raises the cluster generation while no broker runs: `strandline cluster new-generation`.
//!
//! The order is: metadata store, then bucket. A crash in between leaves a store that is ahead, and the next start of any broker brings the
//! bucket up to it; data directories follow when their brokers start.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};

use super::open_objects;
use crate::{
    cluster::{BrokerValue, EMBEDDED_FILE, EmbeddedStore, EtcdStore, Generations, Keys, MetaStore, Value as _},
    config::Config,
    task::clock,
    tier::Store,
};

/// How long registrations may live beyond `metadata.session_timeout`: etcd lets all leases begin again when it elects a leader.
const LEASE_GRACE: Duration = Duration::from_secs(5);

/// Pause before the registrations are looked at again.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// What was raised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Raised {
    /// The generation in the metadata store before; none in one that no cluster has used.
    pub before: Option<u64>,
    /// The bucket's before; none where there is no bucket, or nobody has taken it.
    pub bucket: Option<u64>,
    /// The new one.
    pub generation: u64,
    /// Why the bucket could not be brought up to it: brokers do that when they start.
    pub bucket_behind: Option<String>,
}

/// Raises the generation above those of the metadata store and of the bucket, and above `above`.
///
/// # Errors
/// When a store does not answer, the bucket is another cluster's, or brokers are registered.
pub async fn raise_generation(config: &Config, above: u64) -> anyhow::Result<Raised> {
    let keys = Keys::new(&config.cluster)?;
    let meta = metadata(config).await?;
    // A broker alone has its store's file open, so none runs here.
    if !config.metadata.etcd.is_empty() {
        without_brokers(&*meta, &keys, config.metadata.session_timeout + LEASE_GRACE).await?;
    }
    let objects = config.object_store.url.as_deref().map(|url| open_objects(config, url)).transpose()?;
    let bucket = match &objects {
        Some(objects) => objects.generation().await.context("the bucket's generation cannot be read")?,
        None => None,
    };
    let generations = Generations::new(meta, keys);
    let before = generations.current().await?;
    let generation = generations.raise(bucket.unwrap_or_default().max(above)).await?;
    let bucket_behind = match &objects {
        Some(objects) if bucket.is_some() => raise_bucket(objects, generation).await.err(),
        _ => None,
    };
    Ok(Raised { before, bucket, generation, bucket_behind })
}

async fn raise_bucket(objects: &Store, generation: u64) -> Result<(), String> {
    objects.in_generation(generation);
    objects.claim().await.map_err(|error| error.to_string())
}

async fn metadata(config: &Config) -> anyhow::Result<Arc<dyn MetaStore>> {
    if let Some(options) = config.etcd()? {
        return Ok(Arc::new(EtcdStore::open(options).await?));
    }
    let file = config.broker.data_dir.join(EMBEDDED_FILE);
    ensure!(file.exists(), "{} does not exist: is broker.data_dir the broker's?", file.display());
    Ok(Arc::new(EmbeddedStore::open(&config.broker.data_dir).await?))
}

/// Waits until no broker is registered. A restored etcd has the registrations of its backup, whose leases begin again.
async fn without_brokers(meta: &dyn MetaStore, keys: &Keys, within: Duration) -> anyhow::Result<()> {
    let until = clock::monotonic() + within;
    loop {
        let listing = meta.list(&format!("{}brokers/", keys.prefix())).await?;
        let address = |value: BrokerValue| value.listeners.client().to_owned();
        let named = listing
            .entries
            .iter()
            .map(|entry| BrokerValue::decode(&entry.key, &entry.value).map_or(entry.key.clone(), address));
        let named: Vec<String> = named.collect();
        if named.is_empty() {
            return Ok(());
        }
        ensure!(
            clock::monotonic() < until,
            "brokers are registered at {}: stop all brokers first, because a running one does not notice that the generation rises",
            named.join(", ")
        );
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}
