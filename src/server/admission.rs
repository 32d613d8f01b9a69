//! How a broker of several takes its place: it waits for the metadata store, shows what it holds, and registers.
//!
//! # Overview
//!
//! 1. [`Admission::reach`] waits until the store answers, and refuses one that is not this directory's.
//! 2. [`Admission::note`] draws an id for this uptime and writes it into the data directory, before the store hears of it.
//! 3. [`Admission::admit`], once the replicas are open: an earlier registration of this broker goes, what is not proven is given
//!    up, the broker is registered. Then the directory is told that the store knows this uptime.
//!
//! A store that does not answer is waited for, and the reason is said: at once, when it changes, and every half minute. What no waiting
//! mends ends the start: a login that is refused, a number that another broker has, a store that never heard of this directory.

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

/// Pause before the store is asked again.
const AGAIN: Duration = Duration::from_millis(250);

/// How long an answer may take before that is said.
const SHORT: Duration = Duration::from_secs(1);

/// How often the reason for a wait is said again.
const REMIND: Duration = Duration::from_secs(30);

/// The start was given up because the process is to stop.
#[derive(Debug, thiserror::Error)]
#[error("stopped while the broker waited for the metadata store")]
pub(super) struct Stopped;

/// One start's way into the cluster.
pub(super) struct Admission<'a> {
    pub(super) store: &'a Arc<dyn MetaStore>,
    pub(super) keys: &'a Keys,
    pub(super) log: &'a Log,
    /// What topics have that set nothing else.
    pub(super) defaults: &'a ConfigMap,
    /// Cancelled when the process is to stop.
    pub(super) stop: &'a Tasks,
}

/// What a cluster's metadata knows that a data directory may have taken part in.
#[derive(Debug, Default)]
struct KnownCluster {
    /// Those that took part last under each broker's number.
    directories: BTreeSet<String>,
    /// Those that are there, and those that were not long ago.
    topics: BTreeSet<TopicId>,
    /// Whether there is one of either that cannot be read.
    unreadable: bool,
}

impl KnownCluster {
    fn is_empty(&self) -> bool {
        self.directories.is_empty() && self.topics.is_empty() && !self.unreadable
    }

    /// Whether a directory with these topics may be one of its brokers'. An old one that is put back knows a topic at least.
    fn is_of(&self, directory: &str, held: &BTreeSet<TopicId>) -> bool {
        self.unreadable || self.directories.contains(directory) || !self.topics.is_disjoint(held)
    }
}

/// What a start shows, but for the replicas: those are opened first.
pub(super) struct Noted {
    /// This uptime.
    pub(super) incarnation: Uuid,
    /// Those that the data directory names, this one among them.
    uptimes: Vec<String>,
}

impl Admission<'_> {
    /// Waits until the store answers. One that knows nothing of this directory, though that took part in a cluster before, is another one's.
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

    /// The cluster generation by the metadata store. One that is below what this directory took part in is of an older backup.
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

    /// What the store says of directories and topics.
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

    /// Draws an id for this uptime and notes it in the data directory.
    pub(super) async fn note(&self) -> anyhow::Result<Noted> {
        let (log, incarnation) = (self.log.clone(), random::uuid());
        let uptimes = task::run_blocking(move || -> Result<_, _> {
            log.note_uptime(incarnation, false)?;
            log.uptimes()
        });
        let uptimes = uptimes.await.context("cannot note this uptime in the data directory")?;
        Ok(Noted { incarnation, uptimes: uptimes.iter().map(Uuid::to_string).collect() })
    }

    /// Proves what is held and registers. `whole` are the replicas that lost nothing, as far as their disk can tell. Returns as well what is
    /// still to be proven.
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
        // All of it again after a failure: what may have been registered meanwhile was seen by others.
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

    /// Asks until there is an answer that counts.
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

/// Waits for an answer, and says so where a person may be watching.
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

/// Whether no waiting mends it.
fn is_final(error: &RegisterError) -> bool {
    !error.retryable() || matches!(error, RegisterError::Store(StoreError::Refused { .. }))
}

#[cfg(test)]
mod tests;
