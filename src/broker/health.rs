//! Health of this broker, for probes and `cluster health`. A broker that serves requests is ready even if it is
//! impaired. An outage of the object store or of the metadata store affects all brokers, and must not take all of them
//! out of service.
//!
//! A start lasts until every local replica has been in sync once, or until `broker.catch_up_timeout` has passed. A
//! rolling restart continues then.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::Broker;
use crate::{
    cluster::MetadataSnapshot,
    model::PartitionId,
    partition::{Partition, ReplicaRole},
    task::clock,
};

/// Minimum interval between checks of the replicas, and minimum ratio of the interval to the duration of a check.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);
const MIN_PAUSE_PER_CHECK: u32 = 20;

/// Maximum time that a start waits for a leader of a leaderless partition. An election that waits for the end of a
/// lease takes 7 s.
const ELECTION_TIMEOUT: Duration = Duration::from_secs(8);

/// Readiness of a broker for requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// The broker is not ready, for this reason.
    NotReady(String),
    /// The broker is ready. Contains its impairments, one line each.
    Ready(Vec<String>),
}

/// State that is kept between two queries.
#[derive(Debug)]
pub(super) struct Health {
    start: Mutex<StartState>,
    /// Time since which the registration is gone.
    unregistered: Mutex<Option<Instant>>,
    /// Time since which records do not fit on the disk.
    full: Mutex<Option<Instant>>,
}

/// Progress of the start.
#[derive(Debug)]
enum StartState {
    /// Replicas that have not been in sync yet, each with the time since which it has no leader. `None` before the
    /// first check.
    CatchingUp(Option<BTreeMap<PartitionId, Option<Instant>>>),
    Over,
}

impl Default for Health {
    fn default() -> Self {
        Self { start: Mutex::new(StartState::CatchingUp(None)), unregistered: Mutex::default(), full: Mutex::default() }
    }
}

impl Health {
    /// Sets the disk-full state.
    pub(super) fn set_full(&self, full: bool) {
        update_since(&self.full, full);
    }

    /// Returns true if records do not fit on the disk.
    pub(super) fn is_full(&self) -> bool {
        self.full.lock().is_some()
    }

    /// Records that the registration is gone, or exists.
    pub(super) fn set_unregistered(&self, unregistered: bool) {
        update_since(&self.unregistered, unregistered);
    }
}

fn update_since(since: &Mutex<Option<Instant>>, holds: bool) {
    let mut since = since.lock();
    *since = holds.then(|| since.unwrap_or_else(clock::monotonic));
}

/// Checks the replicas until every one has been in sync once, so that a start also ends without queries.
pub(super) async fn watch_start(broker: Arc<Broker>) {
    loop {
        let began = clock::monotonic();
        if broker.is_started() {
            return;
        }
        let pause = CHECK_INTERVAL.max(began.elapsed() * MIN_PAUSE_PER_CHECK);
        if broker.ctx.tasks.sleep_until_cancelled(pause).await.is_none() {
            return;
        }
    }
}

impl Broker {
    /// Returns the reason why this process should be restarted, if there is one.
    pub fn health(&self) -> Result<(), String> {
        self.ctx.log.failure().map_or(Ok(()), |reason| Err(accepts_no_writes(&reason)))
    }

    /// Returns the readiness of the broker and its impairments.
    pub fn readiness(&self) -> Readiness {
        let not_ready = |reason: String| Readiness::NotReady(reason);
        if self.leaving.load(Ordering::Acquire) || self.readers.is_cancelled() {
            return not_ready("stopping".to_owned());
        }
        if self.is_stopping() {
            return not_ready("starting".to_owned());
        }
        if let (Err(reason), 0) = (self.health(), self.partitions()) {
            return not_ready(format!("no partition can be served: {reason}"));
        }
        match self.catching_up() {
            0 => Readiness::Ready(self.impairments()),
            behind => not_ready(format!("starting: local replicas that have not been in sync yet: {behind}")),
        }
    }

    /// Returns the impairments of this broker, one line each.
    fn impairments(&self) -> Vec<String> {
        let failed = self.partitions.open().iter().filter(|partition| partition.error().is_some()).count();
        let unverified = self.unverified.get().map_or(0, BTreeSet::len);
        let maintenance = self.maintenance_failures.to_string();
        let lines = [
            self.health().err(),
            (failed > 0).then(|| format!("replicas that accept no writes after an error: {failed}")),
            (unverified > 0).then(|| {
                format!(
                    "replicas offline, because their partition values were unreadable at the start: {unverified}; \
                     repair the values, and restart this broker"
                )
            }),
            self.health.full.lock().map(|at| {
                format!(
                    "disk full {}, appends are rejected: add space, or lower local.retention.* or retention.*",
                    since(at.elapsed())
                )
            }),
            self.ctx.tier.as_ref().and_then(|tier| tier.store.outage()).map(|outage| {
                format!("object store unavailable {}: {}", since(outage.lasted), one_line(&outage.reason))
            }),
            self.health
                .unregistered
                .lock()
                .map(|at| format!("registration lost {}: {}", since(at.elapsed()), self.lease_expiry_reason())),
            self.ctx.store.regression().map(|reason| {
                format!(
                    "the metadata store returned to an older state: {}; follow `Restoring etcd`, and restart this \
                     broker",
                    one_line(&reason.to_string())
                )
            }),
            (!maintenance.is_empty()).then(|| format!("maintenance fails: {}", one_line(&maintenance))),
        ];
        lines.into_iter().flatten().collect()
    }

    pub(super) fn is_started(&self) -> bool {
        self.catching_up();
        matches!(*self.health.start.lock(), StartState::Over)
    }

    /// Returns the number of local replicas that have not been in sync yet, and have a leader or may get one. Returns 0
    /// once the start is over.
    pub(super) fn catching_up(&self) -> usize {
        let mut start = self.health.start.lock();
        let StartState::CatchingUp(pending) = &mut *start else { return 0 };
        let Some(started) = self.begun.get() else { return 0 };
        let is_late = self.ctx.standalone || started.elapsed() >= self.ctx.config.broker.catch_up_timeout;
        let all = || self.partitions.open().iter().map(|partition| (partition.id(), None)).collect();
        let pending = pending.get_or_insert_with(all);
        pending.retain(|id, _| self.partitions.by_id(*id).is_some_and(|partition| !is_in_sync(&partition)));
        if is_late || pending.is_empty() {
            *start = StartState::Over;
            return 0;
        }
        let (state, now) = (self.ctx.metadata.state(), clock::monotonic());
        // After the time for an election, a replica without a leader does not count: there is no log that it could
        // copy.
        let is_catching_up = |(id, unled): (&PartitionId, &mut Option<Instant>)| {
            *unled = if has_leader(&state, *id) { None } else { Some(unled.unwrap_or(now)) };
            unled.is_none_or(|since| now.saturating_duration_since(since) < ELECTION_TIMEOUT)
        };
        pending.iter_mut().map(is_catching_up).filter(|catching_up| *catching_up).count()
    }
}

fn is_in_sync(partition: &Partition) -> bool {
    matches!(partition.status().role, ReplicaRole::Leader { .. } | ReplicaRole::Follower { in_sync: true, .. })
}

fn has_leader(state: &MetadataSnapshot, id: PartitionId) -> bool {
    let stored = state.partition(id).and_then(|entry| entry.partition.as_ref());
    stored.is_some_and(|stored| stored.value.leader.is_some())
}

fn accepts_no_writes(reason: &str) -> String {
    format!("the data directory accepts no writes: {}", one_line(reason))
}

/// Joins the lines of a text that another program wrote.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Formats the moment this long ago, and the duration in seconds.
fn since(lasted: Duration) -> String {
    let now = Duration::from_millis(u64::try_from(clock::wall_ms()).unwrap_or(0));
    let at = SystemTime::UNIX_EPOCH + now.saturating_sub(lasted);
    format!("since {} ({} s)", humantime::format_rfc3339_seconds(at), lasted.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn condition_keeps_its_start_time() {
        let health = Health::default();
        health.set_full(true);
        let began = *health.full.lock();
        tokio::time::advance(Duration::from_secs(5)).await;
        health.set_full(true);
        assert_eq!(*health.full.lock(), began);
        health.set_full(false);
        assert!(!health.is_full());
    }

    #[test]
    fn impairment_is_one_line() {
        assert_eq!(one_line("status 503:\n <Error>\r\n</Error>"), "status 503: <Error> </Error>");
        assert!(since(Duration::from_secs(75)).ends_with("Z (75 s)"));
    }
}
