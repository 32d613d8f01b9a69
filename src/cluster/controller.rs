//! The controller: the one broker of the cluster that plans changes of partitions and applies them.
//!
//! # Overview
//!
//! Every broker runs this task. The task campaigns for the controller key, which is attached to the broker's own lease
//! and so ends with the registration. The holder plans when brokers, topics, partitions or drains change, and when a
//! waiting time of the plan ends. It writes the planned changes as compare-and-sets that also compare the controller
//! key, so the first write of a deposed controller fails.
//!
//! # Invariants
//!
//! - Safety does not depend on there being one controller: two controllers, or a controller with a stale cache, only
//!   cause failed compares.
//! - Between plans, the controller keeps only the times since which brokers have been online or offline, and the
//!   blocked partitions that it has logged. A new controller counts the times from zero, so after a controller change a
//!   broker is replaced late and never early.
//!
//! # Shutdown
//!
//! The task stops at any point; unfinished reassignments are stored in the partition values. The key ends with the
//! lease.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    keys::{ControllerValue, Key, Keys, Value as _},
    metadata::{ChangeFeed, MetadataCache, MetadataChange, MetadataSnapshot},
    partition_updates::{PartitionUpdate, PartitionUpdater, UpdateOutcome},
    partition_value::PartitionValue,
    planner::{self, ChangeReason, ClusterPlan, PlannerInput, PlannerLimits},
    session::{Session, SessionState},
    store::{Compare, KeyValue, LeaseId, MetaStore, MetaStoreError, Revision, Transaction, TxnOutcome},
};
use crate::{
    model::{BrokerId, ConfigMap, PartitionId, TopicName, format_ids},
    task::{Tasks, clock},
    telemetry::Metrics,
};

/// Time to wait after a metadata change before the next plan, because one failure changes many keys.
const COALESCE_INTERVAL: Duration = Duration::from_millis(5);

/// Maximum time to wait until the metadata cache has a revision. The wait occurs after a lost campaign, at the start of
/// a term, and after the changes of a plan.
const CACHE_WAIT: Duration = Duration::from_secs(1);

/// Pause after a failed store request.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// Dependencies and settings of the controller.
#[derive(Clone, Debug)]
pub struct Controller {
    pub store: Arc<dyn MetaStore>,
    pub keys: Keys,
    pub metadata: MetadataCache,
    /// Registration of this broker.
    pub session: Session,
    pub id: BrokerId,
    /// Topic configuration defaults.
    pub defaults: ConfigMap,
    /// Limits on concurrent changes, and further settings of the planner.
    pub limits: PlannerLimits,
    pub metrics: Metrics,
}

impl Controller {
    /// Starts the task, which campaigns and plans until the tasks are stopped.
    pub fn spawn(self, tasks: &Tasks) {
        tasks.spawn_until_cancelled("controller", self.run());
    }

    /// Campaigns for the controller key, runs a term after each won campaign, and repeats this without end.
    async fn run(self) {
        loop {
            let lease = self.wait_for_registration().await;
            match self.campaign(lease).await {
                Ok(CampaignResult::Won { term }) => {
                    tracing::info!(broker = %self.id, "this broker became the controller");
                    self.metrics.controller_terms.inc();
                    self.metrics.controller.set(1);
                    self.run_term(lease, term).await;
                    self.metrics.controller.set(0);
                    tracing::info!(broker = %self.id, "this broker is no longer the controller");
                }
                Ok(CampaignResult::Lost { at }) => self.wait_for_vacancy(lease, at).await,
                Err(error) => {
                    tracing::debug!(%error, "the campaign for the controller key failed: retrying");
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// Returns the lease of this broker's registration, as soon as there is one.
    async fn wait_for_registration(&self) -> LeaseId {
        let mut session = self.session.state();
        loop {
            if let SessionState::Registered { lease, .. } = *session.borrow_and_update() {
                return lease;
            }
            if session.changed().await.is_err() {
                // The session has ended: no further registration follows.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Creates the controller key under this broker's lease if the key does not exist. Returns `Won` also if the stored
    /// key has this lease. Deletes a stored key that no broker wrote, and returns `Lost`; the next campaign can then
    /// win.
    async fn campaign(&self, lease: LeaseId) -> Result<CampaignResult, MetaStoreError> {
        let key = self.keys.controller();
        let transaction = Transaction::new()
            .when(Compare::Absent(key.clone()))
            .put_leased(key.as_str(), ControllerValue { broker: self.id }.encode(), lease)
            .else_get(key);
        match self.store.transact(transaction).await? {
            TxnOutcome::Committed { revision } => Ok(CampaignResult::Won { term: revision }),
            TxnOutcome::CompareFailed { mut found, revision: at } => {
                let Some(entry) = found.pop().flatten() else { return Ok(CampaignResult::Lost { at }) };
                if let Err(error) = ControllerValue::decode(&entry.key, &entry.value) {
                    self.delete_invalid_key(&entry, &error.reason).await?;
                } else if entry.lease.is_none() {
                    self.delete_invalid_key(&entry, "the key has no lease").await?;
                } else if entry.lease == Some(lease) {
                    // This broker's own key, from an attempt whose response was lost.
                    return Ok(CampaignResult::Won { term: entry.create_revision });
                }
                Ok(CampaignResult::Lost { at })
            }
        }
    }

    /// Deletes a controller key that is unreadable or has no lease, if it is unchanged. Such a key might never expire,
    /// and the cluster would have no controller.
    async fn delete_invalid_key(&self, entry: &KeyValue, reason: &str) -> Result<(), MetaStoreError> {
        tracing::warn!(reason, "deleting a controller key that no broker wrote");
        let unchanged = Compare::ModRevision(entry.key.clone(), entry.mod_revision);
        self.store.transact(Transaction::new().when(unchanged).delete(entry.key.as_str())).await?;
        Ok(())
    }

    /// Waits until the metadata cache contains no readable controller key, or this broker's lease is no longer `lease`.
    /// The store had a controller key at revision `at`.
    async fn wait_for_vacancy(&self, lease: LeaseId, at: Revision) {
        let (mut states, mut session) = (self.metadata.watch(), self.session.state());
        // A cache that is older than `at` may show no holder yet. Without this wait, the caller would campaign in a
        // tight loop.
        let _late = tokio::time::timeout(CACHE_WAIT, self.metadata.wait_for_revision(at)).await;
        tokio::select! {
            _ = states.wait_for(|state| state.controller().is_none()) => {}
            _ = session.wait_for(|session| !has_lease(session, lease)) => {}
        }
    }

    /// Plans and applies changes until the term is over: the broker's lease changes, or the controller key has changed
    /// since revision `term`.
    async fn run_term(&self, lease: LeaseId, term: Revision) {
        let key_unchanged = [Compare::CreateRevision(self.keys.controller(), term)];
        let updater = PartitionUpdater::new(Arc::clone(&self.store), self.keys.clone());
        let (mut feed, mut presence) = (self.metadata.feed(), BrokerPresence::default());
        let mut session = self.session.state();
        let _late = tokio::time::timeout(CACHE_WAIT, self.metadata.wait_for_revision(term)).await;
        let mut blocked = BTreeSet::new();
        loop {
            if !has_lease(&session.borrow_and_update(), lease) {
                return;
            }
            let state = self.metadata.state();
            if state.revision() >= term && state.controller_revision() != Some(term) {
                // The key was deleted or overwritten, so this term is over.
                return;
            }
            drop(state);
            let plan = self.plan(&mut presence);
            log_blocked(&plan, &self.metadata.state(), &mut blocked);
            let outcome = self.apply_plan(&updater, plan.changes, &key_unchanged).await;
            if outcome.deposed {
                return;
            }
            let _late =
                tokio::time::timeout(CACHE_WAIT, self.metadata.wait_for_revision(outcome.newest_revision)).await;
            let next_plan =
                if outcome.failed { Some(RETRY_INTERVAL) } else { plan.next_plan_ms.map(Duration::from_millis) };
            tokio::select! {
                biased;
                _ = session.changed() => {}
                has_change = wait_for_relevant_change(&mut feed) => match has_change {
                    true => tokio::time::sleep(COALESCE_INTERVAL).await,
                    // The metadata cache ends only when this broker stops, which cancels this task.
                    false => std::future::pending().await,
                },
                () = sleep_or_pend(next_plan) => {}
            }
        }
    }

    /// Updates the presence of brokers, and computes a plan from the metadata cache.
    fn plan(&self, presence: &mut BrokerPresence) -> ClusterPlan {
        let state = self.metadata.state();
        presence.observe(&state, clock::monotonic());
        let (online_ms, offline_ms) = presence.durations_ms(clock::monotonic());
        planner::plan(&PlannerInput {
            metadata: &state,
            defaults: &self.defaults,
            offline_ms: &offline_ms,
            online_ms: &online_ms,
            limits: self.limits,
        })
    }

    /// Writes the planned changes, and counts and logs the applied ones. The compares in `key_unchanged` are part of
    /// every transaction.
    async fn apply_plan(
        &self,
        updater: &PartitionUpdater,
        changes: Vec<planner::PlannedChange>,
        key_unchanged: &[Compare],
    ) -> AppliedChanges {
        let mut outcome = AppliedChanges { newest_revision: Revision::ZERO, failed: false, deposed: false };
        if changes.is_empty() {
            return outcome;
        }
        let metadata = self.metadata.state();
        let planned: BTreeMap<PartitionId, (ChangeReason, PartitionValue)> =
            changes.iter().map(|change| (change.update.id, (change.reason, change.update.value.clone()))).collect();
        let updates: Vec<PartitionUpdate> = changes.into_iter().map(|change| change.update).collect();
        for (id, result) in updater.apply(updates, key_unchanged).await {
            match result {
                UpdateOutcome::Done(revision) => {
                    outcome.newest_revision = outcome.newest_revision.max(revision);
                    let (reason, value) = &planned[&id];
                    self.metrics.controller_changes.count(reason.as_str());
                    if let Some(cause) = reason.election() {
                        self.metrics.elections.count(cause);
                    }
                    tracing::info!(
                        topic = %topic_name(&metadata, id), partition = %id, reason = %reason.as_str(),
                        leader = %value.leader.map_or_else(|| "none".to_owned(), |leader| leader.to_string()),
                        epoch = %value.leader_epoch,
                        replicas = %format_ids(&value.replicas), isr = %format_ids(&value.isr),
                        "changed a partition"
                    );
                    if *reason == ChangeReason::ReassignmentRetargeted {
                        tracing::warn!(
                            topic = %topic_name(&metadata, id), partition = %id,
                            adding = %format_ids(&value.adding), removing = %format_ids(&value.removing),
                            "a target broker of the reassignment was offline for controller.replace_after, or is \
                             offline and drained, so the controller changed or reverted the reassignment to \
                             \"adding\" and \"removing\": to choose other brokers, reassign the partition again"
                        );
                    }
                }
                // Another writer came first. The next plan uses its value, which the metadata cache will show.
                UpdateOutcome::Conflict(_) => {}
                UpdateOutcome::GuardFailed => outcome.deposed = true,
                UpdateOutcome::Unknown(error) | UpdateOutcome::Failed(error) => {
                    tracing::debug!(partition = %id, %error, "a planned change failed, or its outcome is unknown");
                    outcome.failed = true;
                }
            }
        }
        outcome
    }
}

/// Returns true if the broker is registered under this lease.
fn has_lease(session: &SessionState, lease: LeaseId) -> bool {
    matches!(session, SessionState::Registered { lease: current, .. } if *current == lease)
}

/// Sleeps for a time. Never returns if the time is `None`.
async fn sleep_or_pend(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

/// Waits for a change that a plan may depend on. Returns false if no further change will follow.
async fn wait_for_relevant_change(feed: &mut ChangeFeed) -> bool {
    loop {
        match feed.next().await {
            None => return false,
            Some(MetadataChange::Relisted) => return true,
            Some(MetadataChange::Keys(keys)) => {
                // Tier commits, every few seconds per partition, do not affect the plan.
                if keys.iter().any(|key| !matches!(key, Key::Tier(_))) {
                    return true;
                }
            }
        }
    }
}

/// Result of a campaign.
enum CampaignResult {
    /// This broker holds the key. The revision that created the key is the term.
    Won { term: Revision },
    /// Another broker holds the key, or an invalid key was deleted. The store was read at revision `at`.
    Lost { at: Revision },
}

/// Result of applying a plan.
struct AppliedChanges {
    /// Newest revision of an applied change; zero if none was applied.
    newest_revision: Revision,
    /// True if a change failed or its outcome is unknown: the next plan follows after `RETRY_INTERVAL` at the latest.
    failed: bool,
    /// True if a compare of the controller key failed: the term is over.
    deposed: bool,
}

/// Returns the name of a partition's topic for a log message; `?` if the metadata does not contain the topic.
fn topic_name(metadata: &MetadataSnapshot, id: PartitionId) -> &str {
    metadata.name(id.topic).map_or("?", TopicName::as_str)
}

/// Logs each partition that became blocked, and each that is no longer blocked. `blocked` contains the blocked
/// partitions of the last plan, and is replaced by those of this plan.
fn log_blocked(plan: &ClusterPlan, metadata: &MetadataSnapshot, blocked: &mut BTreeSet<PartitionId>) {
    let now_blocked: BTreeSet<PartitionId> = plan.blocked.iter().map(|(id, _)| *id).collect();
    for (id, reason) in plan.blocked.iter().filter(|(id, _)| !blocked.contains(id)) {
        let value = metadata.partition(*id).and_then(|entry| entry.partition.as_ref()).map(|stored| &stored.value);
        match reason {
            planner::BlockedReason::NoLeader => {
                let candidates = value.into_iter().flat_map(|value| value.isr.iter().chain(&value.elr));
                let waits_for: Vec<BrokerId> = candidates.copied().collect();
                tracing::warn!(
                    topic = %topic_name(metadata, *id), partition = %id, waits_for = %format_ids(&waits_for),
                    "the partition has no leader: start one of the brokers in \"waits_for\" with its data; if none is \
                     named, or all are lost for good, `strandline partition elect TOPIC/N --unclean` elects a replica \
                     that may lack committed records"
                );
            }
            planner::BlockedReason::QueuedTarget => tracing::warn!(
                topic = %topic_name(metadata, *id), partition = %id,
                to = %value.map(|value| format_ids(&value.queued_replicas)).unwrap_or_default(),
                "the queued reassignment waits for a broker in \"to\" that is offline, runs another version, or is at \
                 its replica limit (broker.max_replicas): start the broker, run the same version everywhere, or raise \
                 the setting; to cancel the reassignment, run `strandline partition reassign cancel TOPIC/N`"
            ),
            planner::BlockedReason::NoBrokers => tracing::warn!(
                topic = %topic_name(metadata, *id), partition = %id,
                "too few brokers can take a replica: start more, raise broker.max_replicas on brokers at that limit, \
                 or lower the replication factor"
            ),
        }
    }
    for id in blocked.difference(&now_blocked) {
        tracing::info!(topic = %topic_name(metadata, *id), partition = %id, "the partition is no longer blocked");
    }
    *blocked = now_blocked;
}

/// Times since which each broker has been online or offline, as observed by this process in its current term as
/// controller.
#[derive(Debug, Default)]
struct BrokerPresence {
    /// Per live broker: its broker epoch, and the time when this process first observed that epoch.
    online: BTreeMap<BrokerId, (Revision, Instant)>,
    /// Per offline broker that holds replicas: the time when this process first observed that it is offline.
    offline: BTreeMap<BrokerId, Instant>,
}

impl BrokerPresence {
    /// Updates the times from a metadata snapshot, and logs brokers that went offline or came back. A new registration
    /// of a broker starts its online time again.
    fn observe(&mut self, state: &MetadataSnapshot, now: Instant) {
        let live = state.brokers();
        self.online.retain(|id, (epoch, _)| live.get(id).is_some_and(|entry| entry.create_revision == *epoch));
        for (id, entry) in live {
            self.online.entry(*id).or_insert((entry.create_revision, now));
        }
        let holders = state.holders();
        self.offline.retain(|id, since| {
            if live.contains_key(id) {
                let seconds = now.duration_since(*since).as_secs();
                tracing::info!(broker = %id, seconds, "a broker that was offline is online again");
            }
            holders.contains(id) && !live.contains_key(id)
        });
        for id in holders.into_iter().filter(|id| !live.contains_key(id)) {
            self.offline.entry(id).or_insert_with(|| {
                tracing::warn!(
                    broker = %id,
                    "a broker that holds replicas is offline: other brokers lead its partitions where possible"
                );
                now
            });
        }
    }

    /// Returns two maps, by broker: the milliseconds for which it has been online, and those for which it has been
    /// offline.
    fn durations_ms(&self, now: Instant) -> (BTreeMap<BrokerId, u64>, BTreeMap<BrokerId, u64>) {
        let elapsed_ms = |since: Instant| u64::try_from(now.duration_since(since).as_millis()).unwrap_or(u64::MAX);
        let online = self.online.iter().map(|(id, (_, since))| (*id, elapsed_ms(*since))).collect();
        (online, self.offline.iter().map(|(id, since)| (*id, elapsed_ms(*since))).collect())
    }
}

#[cfg(test)]
mod tests;
