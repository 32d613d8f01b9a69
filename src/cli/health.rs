//! `strandline cluster health`: one line per impairment of the cluster or a broker. The exit code is 0 only if there is
//! no impairment, so that a script can depend on it.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::output;
use crate::client::{BrokerDescription, ClusterDescription};

/// Maximum number of unavailable partitions that a line lists.
const MAX_NAMED: usize = 8;

/// Remedy for an invalid value in the metadata store.
pub(super) const INVALID_VALUE_REMEDY: &str = "restore its last valid value in the metadata store";

/// Impairments of a cluster.
pub(super) struct ClusterHealth {
    /// Impairments that belong to no single broker.
    cluster: Vec<String>,
    brokers: Vec<BrokerHealth>,
}

struct BrokerHealth {
    id: u32,
    state: &'static str,
    /// True if the broker accepts requests; `None` if a registered broker did not respond.
    ready: Option<bool>,
    impaired: Vec<String>,
}

impl ClusterHealth {
    pub(super) fn of(cluster: &ClusterDescription) -> Self {
        Self { cluster: of_cluster(cluster), brokers: cluster.brokers.iter().map(of_broker).collect() }
    }

    pub(super) fn is_healthy(&self) -> bool {
        self.cluster.is_empty() && self.brokers.iter().all(|broker| broker.impaired.is_empty())
    }

    pub(super) fn exit_code(&self) -> ExitCode {
        if self.is_healthy() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    /// Returns one line per impairment, or one line that starts with `ok`.
    pub(super) fn lines(&self) -> String {
        if self.is_healthy() {
            return format!("ok: {}", output::count(self.brokers.len() as u64, "broker"));
        }
        let cluster_lines = self.cluster.iter().map(|line| format!("cluster: {line}"));
        let broker_lines = self
            .brokers
            .iter()
            .flat_map(|broker| broker.impaired.iter().map(move |line| format!("broker {}: {line}", broker.id)));
        cluster_lines.chain(broker_lines).collect::<Vec<_>>().join("\n")
    }

    pub(super) fn json(&self) -> Value {
        let brokers = self.brokers.iter().map(|broker| {
            json!({ "id": broker.id, "state": broker.state, "ready": broker.ready, "impaired": broker.impaired })
        });
        json!({
            "healthy": self.is_healthy(),
            "impaired": self.cluster,
            "brokers": brokers.collect::<Vec<_>>(),
        })
    }
}

/// Returns the impairments that belong to no single broker, one line each.
fn of_cluster(cluster: &ClusterDescription) -> Vec<String> {
    let partitions =
        |count: u32, state: &str| (count > 0).then(|| format!("{} {state}", output::count(count.into(), "partition")));
    let staleness = cluster.metadata_staleness;
    let stale = (!staleness.is_zero()).then(|| {
        format!("the metadata store has not responded to broker {} for {} s", cluster.responder, staleness.as_secs())
    });
    let counted = [
        stale,
        partitions(cluster.leaderless, "without a leader"),
        partitions(cluster.under_min_isr, "below min.insync.replicas"),
        unavailable(cluster),
        partitions(
            cluster.under_replicated,
            "under-replicated: replicas are offline, have failed, or still copy records",
        ),
    ];
    let invalid = unreadable(cluster).map(|line| format!("{line}; {INVALID_VALUE_REMEDY}"));
    counted.into_iter().flatten().chain(invalid).collect()
}

/// Returns a line with the first `MAX_NAMED` partitions that accept no writes with `acks=all`; `None` if there are
/// none.
pub(super) fn unavailable(cluster: &ClusterDescription) -> Option<String> {
    let mut names: Vec<String> =
        cluster.unavailable.iter().take(MAX_NAMED).map(|(topic, number)| format!("{topic}/{number}")).collect();
    if cluster.unavailable.len() > MAX_NAMED {
        names.push("…".to_owned());
    }
    (!names.is_empty()).then(|| {
        format!("writes with acks=all are refused: {} (see `strandline topic describe NAME`)", names.join(" "))
    })
}

/// Returns a line for each invalid value in the metadata store.
pub(super) fn unreadable(cluster: &ClusterDescription) -> impl Iterator<Item = String> + '_ {
    cluster
        .unreadable
        .iter()
        .map(|unreadable| format!("the value of {} is invalid: {}", unreadable.key, unreadable.error))
}

/// Returns the state of a broker, as `cluster describe` prints it.
pub(super) fn state(broker: &BrokerDescription) -> &'static str {
    match (broker.alive, broker.stopping, broker.draining_since_ms) {
        (false, ..) => "offline",
        (true, true, _) => "stopping",
        (true, false, Some(_)) => "draining",
        (true, false, None) => "running",
    }
}

/// Returns the impairments of one broker. An offline broker without replicas has none: a drained broker may be stopped.
fn of_broker(broker: &BrokerDescription) -> BrokerHealth {
    let (mut impaired, mut ready) = (Vec::new(), None);
    if !broker.alive {
        ready = Some(false);
        if broker.replica_count > 0 {
            let replicas = output::count(broker.replica_count.into(), "replica");
            impaired.push(format!("offline with {replicas}: start it, or run `strandline broker drain {}`", broker.id));
        }
    }
    match &broker.stats {
        Some(Ok(stats)) => {
            ready = Some(stats.not_ready.is_none());
            impaired.extend(stats.not_ready.iter().map(|reason| format!("not ready: {reason}")));
            impaired.extend(stats.impaired.iter().cloned());
        }
        Some(Err(error)) => impaired.push(format!("its health is unknown: {error}")),
        None => {}
    }
    BrokerHealth { id: broker.id.0, state: state(broker), ready, impaired }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::cluster::tests::{broker_texts, healthy, unhealthy};

    #[test]
    fn health_prints_one_line_per_impairment() {
        let healthy = ClusterHealth::of(&healthy());
        assert!(healthy.is_healthy());
        output::golden::lines("cluster-health.txt", &healthy.lines());
        let cluster = unhealthy();
        let health = ClusterHealth::of(&cluster);
        assert!(!health.is_healthy());
        output::golden::lines_with_texts("cluster-health-unhealthy.txt", &health.lines(), &broker_texts(&cluster));
        let messages = ["DescribeClusterResponse", "BrokerDescription", "BrokerStats"];
        output::golden::json("cluster-health.json", &health.json(), &messages, &["healthy", "ready", "state"]);
    }

    /// A drained broker that was stopped permanently is no impairment.
    #[test]
    fn offline_broker_without_replicas_is_no_impairment() {
        let mut cluster = healthy();
        let stopped = &mut cluster.brokers[1];
        (stopped.alive, stopped.replica_count, stopped.stats) = (false, 0, None);
        assert!(ClusterHealth::of(&cluster).is_healthy());
        cluster.brokers[1].replica_count = 1;
        assert!(!ClusterHealth::of(&cluster).is_healthy());
    }
}
