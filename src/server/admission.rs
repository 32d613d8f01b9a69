//! Admission of a broker to its cluster: wait for the metadata store, verify the local inventory, register.
//!
//! # Overview
//!
//! 1. [`Admission::reach`] waits until the store responds, and rejects a store that is not this directory's.
//! 2. [`Admission::note`] draws an incarnation and records it in the data directory, before the store receives it.
//! 3. [`Admission::admit`] runs once the replicas are open. It deletes an earlier registration of this broker, releases everything that is
//!    not verified, and registers the broker. Then it records in the data directory that the store holds this incarnation.
//!
//! The start waits while the store does not respond. The reason is logged at once, when it changes, and every 30 s. An error that no retry
//! corrects ends the start. Examples are a rejected login, a broker id that another broker has, and a store that never contained this
//! directory.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    cluster::{
        DirectoryValue, Generations, Key, Keys, MetaStore, RegisterError, Registration, Session, Shown, StoreError,
        TopicValue, Unread, Value as _, View, prove,
    },
    log::Log,
    model::{ConfigMap, PartitionId, TopicId},
    task::{self, Tasks, clock, random},
};

/// Pause before a request is retried.
const AGAIN: Duration = Duration::from_millis(250);

/// Time without a response after which the wait is logged.
const SHORT: Duration = Duration::from_secs(1);

/// Interval at which the reason for a wait is logged again.
const REMIND: Duration = Duration::from_secs(30);

/// Error of a start that ended because the process was asked to stop.
#[derive(Debug, thiserror::Error)]
#[error("stopped while the broker waited for the metadata store")]
pub(super) struct Stopped;

/// Admission of one starting broker.
pub(super) struct Admission<'a> {
    pub(super) store: &'a Arc<dyn MetaStore>,
    pub(super) keys: &'a Keys,
    pub(super) log: &'a Log,
    /// Topic configuration defaults.
    pub(super) defaults: &'a ConfigMap,
    /// Cancelled when the process must stop.
    pub(super) stop: &'a Tasks,
}

/// Part of a cluster's metadata that shows which data directories belong to the cluster.
#[derive(Debug, Default)]
struct KnownCluster {
    /// The last directory of each broker id.
    directories: BTreeSet<String>,
    /// Existing topics, and topics that were deleted recently.
    topics: BTreeSet<TopicId>,
    /// True if the value of a directory or topic cannot be read.
    unreadable: bool,
}

impl KnownCluster {
    fn is_empty(&self) -> bool {
        self.directories.is_empty() && self.topics.is_empty() && !self.unreadable
    }

    /// Returns true if a directory with these topics may belong to one of the cluster's brokers. A restored older directory contains at
    /// least one of the topics.
    fn is_of(&self, directory: &str, held: &BTreeSet<TopicId>) -> bool {
        self.unreadable || self.directories.contains(directory) || !self.topics.is_disjoint(held)
    }
}

/// Incarnations of a start, for the local inventory. The replicas follow after they were opened.
pub(super) struct Noted {
    /// Incarnation of this process.
    pub(super) incarnation: Uuid,
    /// Incarnations that the data directory records, including this one.
    uptimes: Vec<String>,
}

impl Admission<'_> {
    /// Waits until the store responds, and rejects another cluster's store. A directory that took part in a cluster before must be in the
    /// store, or one of its topics must be. A directory without replicas fits any store.
    pub(super) async fn reach(&self) -> anyhow::Result<()> {
        let prefix = self.keys.prefix();
        let known = patiently(self.answered(async || Ok(self.known().await?))).await?;
        let log = self.log.clone();
        let took_part = !task::run_blocking(move || log.uptimes()).await?.is_empty();
        let held: BTreeSet<TopicId> = self.log.partitions().into_iter().map(|id| id.topic).collect();
        if !took_part || held.is_empty() || known.is_of(&self.log.directory_id().to_string(), &held) {
            return Ok(());
        }
        anyhow::ensure!(
            !known.is_empty(),
            "the metadata store holds nothing below {prefix}, and this data directory took part in that cluster before: is \
             metadata.etcd another cluster's? If etcd's data is lost, bring back its backup. An empty data directory begins anew, without what only this one holds"
        );
        anyhow::bail!(
            "what the metadata store holds below {prefix} knows neither this data directory nor any topic in it: it is another cluster of the \
             same name, or etcd was restored from a backup of before. See to metadata.etcd; a broker of that cluster needs an empty data directory"
        )
    }

    /// Returns the cluster generation of the metadata store. Fails if the directory took part in a later generation: the store is from an
    /// older backup.
    pub(super) async fn generation(&self) -> anyhow::Result<u64> {
        let generations = Generations::new(Arc::clone(self.store), self.keys.clone());
        let generation = self.answered(async || Ok(generations.begin().await?)).await?;
        let log = self.log.clone();
        let noted = task::run_blocking(move || log.generation()).await?;
        anyhow::ensure!(
            generation >= noted,
            "the metadata store is at cluster generation {generation}, and this data directory took part in generation {noted}: the metadata \
             store is older than the directory. Restore a newer backup of etcd; or stop all brokers and run `strandline cluster \
             new-generation --above {noted}`"
        );
        Ok(generation)
    }

    /// Lists the directories and topics in the store.
    async fn known(&self) -> Result<KnownCluster, StoreError> {
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
                Some(Key::Deleted(topic)) => Some(topic),
                _ => None,
            });
        known.topics.extend(deleted);
        Ok(known)
    }

    /// Draws an incarnation and records it in the data directory.
    pub(super) async fn note(&self) -> anyhow::Result<Noted> {
        let (log, incarnation) = (self.log.clone(), random::uuid());
        let uptimes = task::run_blocking(move || -> Result<_, _> {
            log.note_uptime(incarnation, false)?;
            log.uptimes()
        });
        let uptimes = uptimes.await.context("cannot note this uptime in the data directory")?;
        Ok(Noted { incarnation, uptimes: uptimes.iter().map(Uuid::to_string).collect() })
    }

    /// Verifies the local inventory and registers the broker. `whole` are the replicas that lost nothing, as far as their disk can show.
    /// Also returns the partitions that could not be verified.
    pub(super) async fn admit(
        &self,
        registration: &Registration,
        noted: Noted,
        whole: BTreeSet<PartitionId>,
        view: &View,
        tasks: &Tasks,
    ) -> anyhow::Result<(Session, Unread)> {
        let shown = Shown {
            directory_id: self.log.directory_id().to_string(),
            uptimes: noted.uptimes,
            clean: self.log.opened_clean(),
            on_disk: self.log.partitions().into_iter().collect(),
            whole,
        };
        // After an error, all steps are repeated: peers may have seen a registration whose response was lost.
        let admitted = self
            .answered(async || {
                registration.clear().await?;
                let proof = prove(self.store, self.keys, registration.id, &shown, self.defaults).await?;
                if proof.changed > 0 {
                    tracing::info!(
                        partitions = proof.changed,
                        "gave up leaderships of the last uptime, and memberships that are not proven"
                    );
                }
                Ok((registration.clone().register(proof.judged, view, tasks).await?, proof.unread))
            })
            .await?;
        let (log, incarnation) = (self.log.clone(), noted.incarnation);
        let noted = task::run_blocking(move || log.note_uptime(incarnation, true)).await;
        noted.context("cannot note this uptime in the data directory")?;
        Ok(admitted)
    }

    /// Repeats a request until it succeeds, or fails with an error that no retry corrects.
    async fn answered<T>(&self, ask: impl AsyncFn() -> Result<T, RegisterError>) -> anyhow::Result<T> {
        let (mut said, mut at): (String, Option<Instant>) = (String::new(), None);
        loop {
            let answer = tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(Stopped.into()),
                answer = ask() => answer,
            };
            let error = match answer {
                Ok(answer) => {
                    if at.is_some() {
                        tracing::info!("the metadata store answers; the start goes on");
                    }
                    return Ok(answer);
                }
                Err(error) if is_final(&error) => {
                    return Err(error).context("cannot register the broker in the metadata store");
                }
                Err(error) => error.to_string(),
            };
            if error != said || at.is_none_or(|at| at.elapsed() >= REMIND) {
                tracing::warn!(error, "waiting for the metadata store; the broker starts as soon as it answers");
                (said, at) = (error, Some(clock::monotonic()));
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(Stopped.into()),
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
    }
}

/// Waits for a response, and logs a wait that a person may notice.
async fn patiently<T>(answer: impl Future<Output = T>) -> T {
    let mut answer = std::pin::pin!(answer);
    match tokio::time::timeout(SHORT, &mut answer).await {
        Ok(answer) => answer,
        Err(_) => {
            tracing::info!("the metadata store has not answered yet; the start waits for it");
            answer.await
        }
    }
}

/// Returns true if no retry corrects the error.
fn is_final(error: &RegisterError) -> bool {
    !error.retryable() || matches!(error, RegisterError::Store(StoreError::Refused { .. }))
}

#[cfg(test)]
mod tests;
