//! The controller: one broker of the cluster carries out the plan.
//!
//! # Overview
//!
//! Every broker runs this task. It campaigns for the controller key, which is attached to the broker's own lease and so
//! ends with its registration. The holder plans whenever brokers, topics, partitions or drains change. It writes the
//! planned changes as compare-and-sets that include the key: the first write of a deposed controller fails. Between
//! changes it sleeps.
//!
//! # Invariants
//!
//! - No change is safe only because there is one controller: two controllers, or one with a stale cache, only cause
//!   failed compares.
//! - The controller keeps only the times for which brokers have been online or offline. A new controller counts from
//!   zero, so after a controller change a broker is replaced late and never early.
//!
//! # Shutdown
//!
//! The task stops at any point; unfinished reassignments are recorded in the partition values. The key ends with the
//! lease.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    changes::{Change, Changed, PartitionChanges},
    keys::{ControllerValue, Key, Keys, Value as _},
    partition_value::PartitionValue,
    planner::{self, Input, Limits, Plan, Why},
    session::{Session, Standing},
    store::{Compare, Entry, LeaseId, MetaStore, Outcome, Revision, StoreError, Transaction},
    view::{Feed, Moved, View, ViewState},
};
use crate::{
    model::{BrokerId, ConfigMap, PartitionId, TopicName, format_ids},
    task::{Tasks, clock},
    telemetry::Metrics,
};

/// Time for which changes are collected before a plan is made: one failure changes many keys.
const GATHER: Duration = Duration::from_millis(5);

/// Maximum time to wait until the metadata cache shows the written changes, before the next plan.
const CATCH_UP: Duration = Duration::from_secs(1);

/// Pause after a failed store request.
const AGAIN: Duration = Duration::from_millis(250);

/// Dependencies and settings of the controller.
#[derive(Clone, Debug)]
pub struct Controller {
    /// The metadata store.
    pub store: Arc<dyn MetaStore>,
    /// Paths of the cluster.
    pub keys: Keys,
    /// The metadata cache.
    pub view: View,
    /// Registration of this broker.
    pub session: Session,
    /// Id of this broker.
    pub id: BrokerId,
    /// Topic configuration defaults.
    pub defaults: ConfigMap,
    /// Limits on concurrent reassignments.
    pub limits: Limits,
    /// Metrics.
    pub metrics: Metrics,
}

impl Controller {
    /// Starts the task, which campaigns and plans until the tasks are stopped.
    pub fn spawn(self, tasks: &Tasks) {
        let stop = tasks.clone();
        tasks.spawn("controller", async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = self.run() => {}
            }
        });
    }

    async fn run(self) {
        loop {
            let lease = self.registered().await;
            match self.campaign(lease).await {
                Ok(Campaign::Won { term }) => {
                    tracing::info!(broker = %self.id, "this broker is the controller now");
                    self.metrics.controller_terms.inc();
                    self.metrics.controller.set(1);
                    self.govern(lease, term).await;
                    self.metrics.controller.set(0);
                    tracing::info!(broker = %self.id, "this broker is not the controller any more");
                }
                Ok(Campaign::Taken { at }) => self.vacancy(lease, at).await,
                Err(error) => {
                    tracing::debug!(%error, "cannot campaign for the controller's key; trying again");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }

    /// Returns the lease of this broker's registration, as soon as there is one.
    async fn registered(&self) -> LeaseId {
        let mut standing = self.session.standing();
        loop {
            if let Standing::Registered { lease, .. } = *standing.borrow_and_update() {
                return lease;
            }
            if standing.changed().await.is_err() {
                // The session has ended: no further registration follows.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Takes the controller key if it does not exist.
    async fn campaign(&self, lease: LeaseId) -> Result<Campaign, StoreError> {
        let key = self.keys.controller();
        let transaction = Transaction::new()
            .when(Compare::Absent(key.clone()))
            .put_leased(key.as_str(), ControllerValue { broker: self.id }.encode(), lease)
            .else_get(key);
        match self.store.transact(transaction).await? {
            Outcome::Done { revision } => Ok(Campaign::Won { term: revision }),
            Outcome::Refused { mut found, revision: at } => {
                let Some(entry) = found.pop().flatten() else { return Ok(Campaign::Taken { at }) };
                if let Err(error) = ControllerValue::decode(&entry.key, &entry.value) {
                    self.take_away(&entry, &error.to_string()).await?;
                } else if entry.lease.is_none() {
                    self.take_away(&entry, "it has no lease").await?;
                } else if entry.lease == Some(lease) {
                    // This broker's own key, from an attempt whose response was lost.
                    return Ok(Campaign::Won { term: entry.create_revision });
                }
                Ok(Campaign::Taken { at })
            }
        }
    }

    /// Deletes a controller key that no broker wrote: without a lease it would stay forever and leave the cluster
    /// without a controller.
    async fn take_away(&self, entry: &Entry, why: &str) -> Result<(), StoreError> {
        tracing::warn!(why, "what stands in the controller's key was written by no broker; it is taken away");
        let same = Compare::ModRevision(entry.key.clone(), entry.mod_revision);
        self.store.transact(Transaction::new().when(same).delete(entry.key.as_str())).await?;
        Ok(())
    }

    /// Waits until the metadata cache shows no controller key or this broker's lease changes. The store had the key at
    /// revision `at`.
    async fn vacancy(&self, lease: LeaseId, at: Revision) {
        let (mut states, mut standing) = (self.view.watch(), self.session.standing());
        let mine = |standing: &Standing| matches!(standing, Standing::Registered { lease: now, .. } if *now == lease);
        // A cache that is older than `at` or has stalled shows no holder. This wait keeps the store from being queried
        // in a tight loop.
        let _late = tokio::time::timeout(CATCH_UP, self.view.reached(at)).await;
        tokio::select! {
            _ = states.wait_for(|state| state.controller().is_none()) => {}
            _ = standing.wait_for(|standing| !mine(standing)) => {}
        }
    }

    /// Plans and applies changes until the term is over.
    async fn govern(&self, lease: LeaseId, term: Revision) {
        let when = [Compare::CreateRevision(self.keys.controller(), term)];
        let changes = PartitionChanges::new(Arc::clone(&self.store), self.keys.clone());
        let (mut feed, mut presence) = (self.view.feed(), Presence::default());
        let mut standing = self.session.standing();
        let _ours = tokio::time::timeout(CATCH_UP, self.view.reached(term)).await;
        let mut waiting = BTreeSet::new();
        loop {
            if !matches!(*standing.borrow_and_update(), Standing::Registered { lease: now, .. } if now == lease) {
                return;
            }
            let state = self.view.state();
            if state.revision() >= term && state.controller_revision() != Some(term) {
                // The key was deleted or overwritten: its present holder is the controller.
                return;
            }
            drop(state);
            let plan = self.plan(&mut presence);
            report(&plan, &self.view.state(), &mut waiting);
            let outcome = self.carry_out(&changes, plan.steps, &when).await;
            if outcome.deposed {
                return;
            }
            let _late = tokio::time::timeout(CATCH_UP, self.view.reached(outcome.reached)).await;
            let again = if outcome.failed { Some(AGAIN) } else { plan.again_in_ms.map(Duration::from_millis) };
            tokio::select! {
                biased;
                _ = standing.changed() => {}
                news = relevant(&mut feed) => match news {
                    true => tokio::time::sleep(GATHER).await,
                    // The metadata cache has ended, and so has this broker.
                    false => std::future::pending().await,
                },
                () = sleep(again) => {}
            }
        }
    }

    fn plan(&self, presence: &mut Presence) -> Plan {
        let state = self.view.state();
        presence.look(&state, clock::monotonic());
        let (up_ms, gone_ms) = presence.lasting(clock::monotonic());
        planner::plan(&Input {
            view: &state,
            defaults: &self.defaults,
            gone_ms: &gone_ms,
            up_ms: &up_ms,
            limits: self.limits,
        })
    }

    /// Writes the planned changes, the most important first.
    async fn carry_out(&self, changes: &PartitionChanges, steps: Vec<planner::Step>, when: &[Compare]) -> CarriedOut {
        let mut outcome = CarriedOut { reached: Revision::ZERO, failed: false, deposed: false };
        if steps.is_empty() {
            return outcome;
        }
        let view = self.view.state();
        let made: BTreeMap<PartitionId, (Why, PartitionValue)> =
            steps.iter().map(|step| (step.change.id, (step.why, step.change.value.clone()))).collect();
        let changed: Vec<Change> = steps.into_iter().map(|step| step.change).collect();
        for (id, changed) in changes.make(changed, when).await {
            match changed {
                Changed::Done(revision) => {
                    outcome.reached = outcome.reached.max(revision);
                    let (why, value) = &made[&id];
                    self.metrics.controller_steps.count(why.as_str());
                    if let Some(cause) = why.election() {
                        self.metrics.elections.count(cause);
                    }
                    tracing::info!(
                        topic = %named(&view, id), partition = %id, why = %why.as_str(),
                        leader = %value.leader.map_or_else(|| "none".to_owned(), |leader| leader.to_string()),
                        epoch = %value.leader_epoch, replicas = %format_ids(&value.replicas), isr = %format_ids(&value.isr),
                        "changed a partition"
                    );
                    if *why == Why::Redirected {
                        tracing::warn!(
                            topic = %named(&view, id), partition = %id,
                            adding = %format_ids(&value.adding), removing = %format_ids(&value.removing),
                            "a broker that the partition's move needs is gone for good: the move goes to another one, or back; \
                             order it again if it was to lead elsewhere"
                        );
                    }
                }
                // The metadata cache will show the stored value.
                Changed::Refused(_) => {}
                Changed::Barred => outcome.deposed = true,
                Changed::Unknown(error) | Changed::Failed(error) => {
                    tracing::debug!(partition = %id, %error, "a step was not made, or is not known to have been");
                    outcome.failed = true;
                }
            }
        }
        outcome
    }
}

async fn sleep(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

/// Waits for a change that a plan may depend on. Returns false if no further change will follow.
async fn relevant(feed: &mut Feed) -> bool {
    loop {
        match feed.next().await {
            None => return false,
            Some(Moved::Everything) => return true,
            Some(Moved::Keys(keys)) => {
                // Tier commits, every few seconds per partition, do not affect the plan.
                if keys.iter().any(|key| !matches!(key, Key::Tier(_))) {
                    return true;
                }
            }
        }
    }
}

/// Result of a campaign.
enum Campaign {
    /// This broker holds the key. The revision that created the key is the term.
    Won { term: Revision },
    /// Another broker holds the key, or an invalid key was deleted.
    Taken { at: Revision },
}

struct CarriedOut {
    /// Newest revision of an applied change.
    reached: Revision,
    /// A change failed or its outcome is unknown: plan again soon.
    failed: bool,
    /// The key belongs to another broker or does not exist.
    deposed: bool,
}

/// Returns the name of a partition's topic, for the log.
fn named(view: &ViewState, id: PartitionId) -> &str {
    view.name(id.topic).map_or("?", TopicName::as_str)
}

/// Logs the start and the end of each partition's blocked state once.
fn report(plan: &Plan, view: &ViewState, waiting: &mut BTreeSet<PartitionId>) {
    let now: BTreeSet<PartitionId> = plan.waiting.iter().map(|(id, _)| *id).collect();
    for (id, what) in plan.waiting.iter().filter(|(id, _)| !waiting.contains(id)) {
        match what {
            planner::Waiting::ForLeader => tracing::warn!(
                topic = %named(view, *id), partition = %id,
                "no broker that holds everything committed is there to lead: the partition waits for one; \
                 `strandline partition elect` with --unclean goes on without"
            ),
            planner::Waiting::ForOrdered => tracing::warn!(
                topic = %named(view, *id), partition = %id,
                "a broker that the partition was ordered to is not alive, is registered without an address for other brokers, or holds as many \
                 replicas as it takes (broker.max_replicas): the move waits for it; start it or raise the setting, or cancel the order with \
                 `strandline partition reassign cancel`"
            ),
            planner::Waiting::ForBrokers => tracing::warn!(
                topic = %named(view, *id), partition = %id,
                "there are too few brokers that can take a replica: start more, raise broker.max_replicas where brokers hold as many as \
                 that, or lower the replication factor"
            ),
        }
    }
    for id in waiting.difference(&now) {
        tracing::info!(topic = %named(view, *id), partition = %id, "the partition waits no more");
    }
    *waiting = now;
}

/// Times since which brokers have been online or offline, as seen by this process.
#[derive(Debug, Default)]
struct Presence {
    up: BTreeMap<BrokerId, (Revision, Instant)>,
    gone: BTreeMap<BrokerId, Instant>,
}

impl Presence {
    fn look(&mut self, state: &ViewState, now: Instant) {
        let live = state.brokers();
        self.up.retain(|id, (epoch, _)| live.get(id).is_some_and(|known| known.create_revision == *epoch));
        for (id, known) in live {
            self.up.entry(*id).or_insert((known.create_revision, now));
        }
        let holders = state.holders();
        self.gone.retain(|id, since| {
            if live.contains_key(id) {
                let seconds = now.duration_since(*since).as_secs();
                tracing::info!(broker = %id, seconds, "a broker that was gone is there again");
            }
            holders.contains(id) && !live.contains_key(id)
        });
        for id in holders.into_iter().filter(|id| !live.contains_key(id)) {
            self.gone.entry(id).or_insert_with(|| {
                tracing::warn!(broker = %id, "a broker that holds replicas is gone: others lead what they can until it is back");
                now
            });
        }
    }

    /// Returns the milliseconds that each broker has been online, and that each has been offline.
    fn lasting(&self, now: Instant) -> (BTreeMap<BrokerId, u64>, BTreeMap<BrokerId, u64>) {
        let ms = |since: Instant| u64::try_from(now.duration_since(since).as_millis()).unwrap_or(u64::MAX);
        let up = self.up.iter().map(|(id, (_, since))| (*id, ms(*since))).collect();
        (up, self.gone.iter().map(|(id, since)| (*id, ms(*since))).collect())
    }
}

#[cfg(test)]
mod tests;
