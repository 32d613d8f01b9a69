//! Admission of a broker to its cluster: wait for the metadata store, verify the local inventory, register.
//!
//! # Overview
//!
//! 1. [`ClusterAdmission::reach`] waits until the metadata store responds, and rejects the store of another cluster.
//!    [`ClusterAdmission::generation`] rejects a store that is older than the data directory.
//! 2. [`ClusterAdmission::record_start`] creates an incarnation and writes it to the data directory, before the store
//!    receives it.
//! 3. [`ClusterAdmission::admit`] runs once the replicas are open. It deletes an earlier registration of this broker,
//!    and releases the leaderships of the last incarnation. [`ClusterAdmission::admit`] removes the broker from each
//!    ISR and ELR whose local replica is not verified. It registers the broker, and then writes to the data directory
//!    that the store contains this incarnation.
//!
//! The start waits while the store does not respond, or while a value that the start needs is invalid. The reason of a
//! failed request is logged at once, when it changes, and every 30 s. An error that no retry corrects ends the start.
//! Examples are a rejected login, a broker id that another broker has, and a store that never contained this directory.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    cluster::{
        DirectoryValue, Generations, Key, Keys, LocalInventory, MetaStore, MetaStoreError, MetadataCache,
        RegisterError, RegistrationRequest, Revision, Session, TopicValue, Value as _, verify_inventory,
    },
    log::DataDir,
    model::{ConfigMap, PartitionId, TopicId},
    task::{self, Tasks, clock, random},
};

/// Pause before a request is retried.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// Time after which the wait for the first response of the metadata store is logged.
const REPORT_DELAY: Duration = Duration::from_secs(1);

/// Interval at which the reason for a wait is logged again.
const REMIND_INTERVAL: Duration = Duration::from_secs(30);

/// Error of a start that ended because a stop of the process was requested.
#[derive(Debug, thiserror::Error)]
#[error("stopped while the broker waited for the metadata store")]
pub(super) struct StartCancelled;

/// Admission of one starting broker.
pub(super) struct ClusterAdmission<'a> {
    pub(super) store: &'a Arc<dyn MetaStore>,
    pub(super) keys: &'a Keys,
    pub(super) log: &'a DataDir,
    /// Topic configuration defaults.
    pub(super) defaults: &'a ConfigMap,
    /// Cancelled when the process must stop.
    pub(super) stop: &'a Tasks,
}

/// Part of a cluster's metadata that shows which data directories belong to the cluster.
#[derive(Debug, Default)]
struct KnownCluster {
    /// Id of the last registered data directory of each broker.
    directories: BTreeSet<String>,
    /// Existing topics, and deleted topics that still have a tombstone.
    topics: BTreeSet<TopicId>,
    /// True if the value of a directory or topic cannot be read.
    unreadable: bool,
}

impl KnownCluster {
    fn is_empty(&self) -> bool {
        self.directories.is_empty() && self.topics.is_empty() && !self.unreadable
    }

    /// Returns true if a data directory with these local topics may belong to one of the cluster's brokers. An older
    /// directory that was restored is no longer registered, but contains at least one of the cluster's topics. If a
    /// value cannot be read, any directory may belong to the cluster.
    fn may_contain(&self, directory: &str, local_topics: &BTreeSet<TopicId>) -> bool {
        self.unreadable || self.directories.contains(directory) || !self.topics.is_disjoint(local_topics)
    }
}

/// Start of a process whose incarnation is in the data directory, and not yet in the metadata store.
pub(super) struct PendingStart {
    /// Incarnation of this process.
    pub(super) incarnation: Uuid,
    /// Incarnations in the data directory, including that of this process.
    incarnations: Vec<String>,
}

impl ClusterAdmission<'_> {
    /// Waits until the metadata store responds. Fails if the store is that of another cluster: it contains neither this
    /// data directory nor a topic of its replicas. A directory that was in no cluster before, or that has no replicas,
    /// is accepted by any store.
    pub(super) async fn reach(&self) -> anyhow::Result<()> {
        let prefix = self.keys.prefix();
        let known = report_long_wait(self.retry_until_reply(async || Ok(self.known_cluster().await?))).await?;
        let log = self.log.clone();
        let was_in_cluster = !task::run_blocking(move || log.incarnations()).await?.is_empty();
        let local_topics: BTreeSet<TopicId> = self.log.partitions().into_iter().map(|id| id.topic).collect();
        let directory = self.log.directory_id().to_string();
        if !was_in_cluster || local_topics.is_empty() || known.may_contain(&directory, &local_topics) {
            return Ok(());
        }
        anyhow::ensure!(
            !known.is_empty(),
            "the metadata store has no keys below {prefix}, but this data directory belongs to that cluster: check \
             that metadata.etcd names the right etcd; if etcd lost its data, restore a backup; an empty data \
             directory would lack the records that only this directory has"
        );
        anyhow::bail!(
            "the metadata store has neither this data directory nor any of its topics below {prefix}: this is another \
             cluster of the same name, or etcd was restored from a backup that is too old; correct metadata.etcd, or \
             use an empty data \
             directory for a broker of that cluster"
        )
    }

    /// Returns the cluster generation of the metadata store, and creates it in the store of a new cluster. Waits until
    /// the store responds. Fails if the data directory took part in a later generation, because the store is then from
    /// an older backup.
    pub(super) async fn generation(&self) -> anyhow::Result<u64> {
        let generations = Generations::new(Arc::clone(self.store), self.keys.clone());
        let generation = self.retry_until_reply(async || Ok(generations.get_or_create().await?)).await?;
        let log = self.log.clone();
        let recorded = task::run_blocking(move || log.generation()).await?;
        anyhow::ensure!(
            generation >= recorded,
            "the metadata store is at cluster generation {generation}, and this data directory at generation \
             {recorded}: the metadata store is older than the directory; restore a newer backup of etcd, or stop all \
             brokers and run `strandline cluster new-generation --config FILE --above {recorded}`"
        );
        Ok(generation)
    }

    /// Returns the directories, topics and tombstones in the store.
    async fn known_cluster(&self) -> Result<KnownCluster, MetaStoreError> {
        let list = async |kind: &str| self.store.list(&format!("{}{kind}/", self.keys.prefix())).await;
        let mut known = KnownCluster::default();
        for entry in list("directories").await?.entries {
            match DirectoryValue::decode(&entry.key, &entry.value) {
                Ok(value) => drop(known.directories.insert(value.directory_id)),
                Err(_) => known.unreadable = true,
            }
        }
        for entry in list("topics").await?.entries {
            match TopicValue::decode(&entry.key, &entry.value) {
                Ok(topic) => drop(known.topics.insert(topic.id)),
                Err(_) => known.unreadable = true,
            }
        }
        let deleted =
            list("deleted").await?.entries.into_iter().filter_map(|entry| match self.keys.parse(&entry.key) {
                Some(Key::Tombstone(topic)) => Some(topic),
                _ => None,
            });
        known.topics.extend(deleted);
        Ok(known)
    }

    /// Creates the incarnation of this process and adds it to those in the data directory.
    pub(super) async fn record_start(&self) -> anyhow::Result<PendingStart> {
        let (log, incarnation) = (self.log.clone(), random::uuid());
        let incarnations = task::run_blocking(move || -> Result<_, _> {
            log.record_incarnation(incarnation, false)?;
            log.incarnations()
        });
        let incarnations =
            incarnations.await.context("cannot record this start of the broker in the data directory")?;
        Ok(PendingStart { incarnation, incarnations: incarnations.iter().map(Uuid::to_string).collect() })
    }

    /// Runs step 3 of the module documentation; waits until the store responds. `intact` are the replicas without a
    /// detected loss on disk. Also returns the partitions whose values in the store could not be read, with the
    /// revisions of those values: their replicas are not verified yet.
    pub(super) async fn admit(
        &self,
        registration: &RegistrationRequest,
        pending_start: PendingStart,
        intact: BTreeSet<PartitionId>,
        metadata: &MetadataCache,
        tasks: &Tasks,
    ) -> anyhow::Result<(Session, BTreeMap<PartitionId, Revision>)> {
        let inventory = LocalInventory {
            directory_id: self.log.directory_id().to_string(),
            incarnations: pending_start.incarnations,
            clean: self.log.was_clean_shutdown(),
            on_disk: self.log.partitions().into_iter().collect(),
            intact,
        };
        // After an error, all steps are repeated: peers may have seen a registration whose response was lost.
        let admitted = self
            .retry_until_reply(async || {
                registration.clear().await?;
                let verified =
                    verify_inventory(self.store, self.keys, registration.id, &inventory, self.defaults).await?;
                if verified.changed > 0 {
                    tracing::info!(
                        partitions = verified.changed,
                        "released leaderships of the last incarnation and unverified ISR and ELR memberships"
                    );
                }
                let registered = registration.clone().register(verified.directory_revision, metadata, tasks).await?;
                Ok((registered, verified.unverified))
            })
            .await?;
        let (log, incarnation) = (self.log.clone(), pending_start.incarnation);
        let recorded = task::run_blocking(move || log.record_incarnation(incarnation, true)).await;
        recorded.context("cannot record this start of the broker in the data directory")?;
        Ok(admitted)
    }

    /// Repeats a request to the metadata store until it succeeds or fails with an error that no retry corrects. Fails
    /// with [`StartCancelled`] when the start is cancelled. Logs why the start waits.
    async fn retry_until_reply<T>(&self, request: impl AsyncFn() -> Result<T, RegisterError>) -> anyhow::Result<T> {
        let (mut last_error, mut logged_at): (String, Option<Instant>) = (String::new(), None);
        loop {
            let Some(result) = self.stop.run_until_cancelled(request()).await else {
                return Err(StartCancelled.into());
            };
            let error = match result {
                Ok(value) => {
                    if logged_at.is_some() {
                        tracing::info!("the metadata store can be used: the start continues");
                    }
                    return Ok(value);
                }
                Err(error) if is_final(&error) => {
                    return Err(error).context("cannot register the broker in the metadata store");
                }
                Err(error) => error.to_string(),
            };
            if error != last_error || logged_at.is_none_or(|at| at.elapsed() >= REMIND_INTERVAL) {
                tracing::warn!(
                    error,
                    "waiting for the metadata store: the start continues when the cause in \"error\" is over"
                );
                (last_error, logged_at) = (error, Some(clock::monotonic()));
            }
            if self.stop.sleep_until_cancelled(RETRY_INTERVAL).await.is_none() {
                return Err(StartCancelled.into());
            }
        }
    }
}

/// Waits for a response and returns it. Logs the wait once if it exceeds [`REPORT_DELAY`].
async fn report_long_wait<T>(response: impl Future<Output = T>) -> T {
    let mut response = std::pin::pin!(response);
    match tokio::time::timeout(REPORT_DELAY, &mut response).await {
        Ok(response) => response,
        Err(_) => {
            tracing::info!("the metadata store has not responded yet: the start waits for its response");
            response.await
        }
    }
}

/// Returns true if the error ends the start. A request that the store refuses is retryable elsewhere, but here the
/// start of a broker with a rejected login must fail.
fn is_final(error: &RegisterError) -> bool {
    !error.retryable() || matches!(error, RegisterError::Store(MetaStoreError::Refused { .. }))
}

#[cfg(test)]
mod tests;
