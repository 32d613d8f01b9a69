//! The controller: one broker of the cluster carries out the plan.
//!
//! # Overview
//!
//! Every broker runs this task. It campaigns for the controller's key, which hangs on the broker's own lease and so goes with its
//! registration. Who has it plans whenever brokers, topics, partitions or drains changed, and carries the steps out as
//! compare-and-sets that name the key: a controller that was deposed is refused at its first write. Between changes it sleeps.
//!
//! # Invariants
//!
//! - Nothing that a controller does is safe because it is the only one: two of them, or one with an old view, waste refusals.
//! - It keeps nothing but how long it has seen brokers there or gone. A new controller begins to count anew, so a broker is
//!   replaced late after a change of controller, and never early.
//!
//! # Shutdown
//!
//! The task ends where it is; what is half done is in the partitions' values. The key goes with the lease.

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

/// How long changes are gathered before a plan is made: one failure changes many keys.
const GATHER: Duration = Duration::from_millis(5);

/// How long the mirror may take to show what was written, before the next plan is made without.
const CATCH_UP: Duration = Duration::from_secs(1);

/// Pause after the store did not answer.
const AGAIN: Duration = Duration::from_millis(250);

/// What a controller is made of.
#[derive(Clone, Debug)]
pub struct Controller {
    /// The metadata store.
    pub store: Arc<dyn MetaStore>,
    /// Its keys.
    pub keys: Keys,
    /// The mirror.
    pub view: View,
    /// This broker's registration.
    pub session: Session,
    /// This broker's number.
    pub id: BrokerId,
    /// What topics have that set nothing else.
    pub defaults: ConfigMap,
    /// How much is moved at the same time.
    pub limits: Limits,
    /// Figures.
    pub metrics: Metrics,
}

impl Controller {
    /// Campaigns, and plans while it is the controller, until the tasks are stopped.
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

    /// The lease of this broker's registration, once there is one.
    async fn registered(&self) -> LeaseId {
        let mut standing = self.session.standing();
        loop {
            if let Standing::Registered { lease, .. } = *standing.borrow_and_update() {
                return lease;
            }
            if standing.changed().await.is_err() {
                // The session has ended: nothing comes any more.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Takes the key where nobody has it.
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
                    // Its own, of a try whose answer was lost.
                    return Ok(Campaign::Won { term: entry.create_revision });
                }
                Ok(Campaign::Taken { at })
            }
        }
    }

    /// Takes away what no broker wrote: it hangs on nobody's lease, so it would stay for ever and the cluster without a controller.
    async fn take_away(&self, entry: &Entry, why: &str) -> Result<(), StoreError> {
        tracing::warn!(why, "what stands in the controller's key was written by no broker; it is taken away");
        let same = Compare::ModRevision(entry.key.clone(), entry.mod_revision);
        self.store.transact(Transaction::new().when(same).delete(entry.key.as_str())).await?;
        Ok(())
    }

    /// Waits until nobody has the key, as far as the mirror shows, or this broker's own lease is another one. Somebody had it `at` this
    /// revision.
    async fn vacancy(&self, lease: LeaseId, at: Revision) {
        let (mut states, mut standing) = (self.view.watch(), self.session.standing());
        let mine = |standing: &Standing| matches!(standing, Standing::Registered { lease: now, .. } if *now == lease);
        // A mirror that has not come so far, or stands still, shows nobody there: that must not have the store asked without a pause.
        let _late = tokio::time::timeout(CATCH_UP, self.view.reached(at)).await;
        tokio::select! {
            _ = states.wait_for(|state| state.controller().is_none()) => {}
            _ = standing.wait_for(|standing| !mine(standing)) => {}
        }
    }

    /// Plans and carries out until the term is over.
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
                // Its key was taken away, or overwritten: who has it now governs.
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
                    // The mirror has ended: so has this broker.
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

    /// Writes the steps, those that matter most first.
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
                // The view will show what stands there.
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

/// Waits for a change that a plan may depend on. False when there will be none any more.
async fn relevant(feed: &mut Feed) -> bool {
    loop {
        match feed.next().await {
            None => return false,
            Some(Moved::Everything) => return true,
            Some(Moved::Keys(keys)) => {
                // What is committed to the bucket, every few seconds for each partition, is no news here.
                if keys.iter().any(|key| !matches!(key, Key::Tier(_))) {
                    return true;
                }
            }
        }
    }
}

/// How a campaign ended.
enum Campaign {
    /// The key is this broker's. The transaction that made it is the term.
    Won { term: Revision },
    /// Another broker was faster, or what had no right to be there was taken away.
    Taken { at: Revision },
}

struct CarriedOut {
    /// The newest transaction that was done.
    reached: Revision,
    /// Some could not be made, or it is not known: plan again soon.
    failed: bool,
    /// Another broker has the key, or nobody.
    deposed: bool,
}

/// The name of a partition's topic, for the log.
fn named(view: &ViewState, id: PartitionId) -> &str {
    view.name(id.topic).map_or("?", TopicName::as_str)
}

/// Says once of each partition that it waits, and once that it does not any more.
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

/// How long brokers have been seen there, or gone.
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

    /// Milliseconds that each has been there, and that each has been gone.
    fn lasting(&self, now: Instant) -> (BTreeMap<BrokerId, u64>, BTreeMap<BrokerId, u64>) {
        let ms = |since: Instant| u64::try_from(now.duration_since(since).as_millis()).unwrap_or(u64::MAX);
        let up = self.up.iter().map(|(id, (_, since))| (*id, ms(*since))).collect();
        (up, self.gone.iter().map(|(id, since)| (*id, ms(*since))).collect())
    }
}

#[cfg(test)]
mod tests;
