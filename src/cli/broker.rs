//! `strandline broker`: runs a broker from a configuration file; drains and undrains a broker.

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{anyhow, bail};
use clap::{Args, Subcommand};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    CommonArgs,
    cluster::{BLOCKED_REASSIGNMENT, DRAIN_REMEDY, first_invalid_placement_key},
    connect::{connect, explain_call},
    output::{self, OutputFormat, format_ids},
    retry_output::RetryMonitor,
    serve::{Overrides, environment, serve},
    wait::{PollError, RemainingWork, WaitArgs, format_elapsed},
};
use crate::{
    client::{Admin, BrokerDescription, CallError, ClusterDescription, DrainStatus},
    config::{ConfigSources, LoadedConfig},
    model::BrokerId,
    task::clock,
};

/// Time after which `--wait` fails if none of the drained broker's replicas could move. Not with `--wait-for-brokers`.
const STANDSTILL_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum number of partitions that a message lists.
const MAX_NAMED: usize = 10;

/// Run a broker from a configuration file; drain or undrain a broker
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, subcommand_value_name = "COMMAND")]
pub(super) struct BrokerArgs {
    #[command(subcommand)]
    subcommand: Option<BrokerCommand>,
    /// Configuration file (TOML); `strandline config print` shows every setting
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    /// Data directory; overrides broker.data_dir
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Listen address for clients (gRPC); overrides grpc.listen
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Address at which clients connect; overrides grpc.advertise
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Listen address for /metrics, /healthz and /readyz; overrides http.listen
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// URL of the object store; overrides object_store.url
    #[arg(long, value_name = "URL")]
    object_store: Option<String>,
    #[command(flatten)]
    overrides: Overrides,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum BrokerCommand {
    /// Move all leaderships and replicas off a broker, and assign it no new ones
    ///
    /// Returns when the drain is stored or, with --wait, when the broker is empty. `strandline cluster describe` shows
    /// the progress. The exit code is 1 if no replica can move. Either too few other brokers can take replicas, or
    /// running reassignments wait for an offline broker. With --wait, this failure follows only after no replica has
    /// been able to move for a minute. The cause can then also be partitions without a leader. The drain stays in
    /// effect in all of these cases.
    ///
    /// A broker that is permanently lost can be drained too: its replicas are then replaced at once. Replicas of
    /// partitions without a leader are not replaced, because there is no leader to copy from;
    /// `strandline partition elect --unclean` elects one.
    Drain {
        /// Broker id
        #[arg(value_name = "ID", value_parser = parse_broker_id)]
        id: u32,
        #[command(flatten)]
        wait: WaitArgs,
        /// With --wait: keep waiting while no replica can move, until other brokers can take replicas
        #[arg(long, requires = "wait")]
        wait_for_brokers: bool,
    },
    /// Cancel a drain: the broker accepts leaderships and replicas again
    Undrain {
        /// Broker id
        #[arg(value_name = "ID", value_parser = parse_broker_id)]
        id: u32,
    },
}

/// Parses a broker id. clap prints the error.
pub(super) fn parse_broker_id(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "not a broker id: write a number, such as 2".to_owned())
}

impl BrokerArgs {
    /// Loads the configuration: the file, then environment variables, flags and `--set`, each with precedence over the
    /// sources before it.
    fn settings(self) -> anyhow::Result<LoadedConfig> {
        let file = self.config.expect("clap requires it without a subcommand");
        let mut sources = ConfigSources::new().read_file(&file)?.environment(environment());
        let flags = [
            ("broker.data_dir", self.data_dir.map(|dir| dir.display().to_string())),
            ("grpc.listen", self.listen),
            ("grpc.advertise", self.advertise),
            ("http.listen", self.http),
            ("object_store.url", self.object_store),
        ];
        for (key, value) in flags {
            if let Some(value) = value {
                sources = sources.flag(key, value);
            }
        }
        Ok(self.overrides.apply(sources).load()?)
    }
}

/// Runs a broker until a stop signal; with a subcommand, drains or undrains a broker of the cluster instead.
pub(super) async fn run(common: &CommonArgs, command: BrokerArgs) -> anyhow::Result<ExitCode> {
    if let Some(subcommand) = command.subcommand {
        let client = connect(common).await?;
        let bar = match subcommand {
            BrokerCommand::Drain { wait, .. } => wait.bar(),
            BrokerCommand::Undrain { .. } => ProgressBar::hidden(),
        };
        let mut monitor = RetryMonitor::new(&client);
        monitor.set_bar(&bar);
        let work = Box::pin(drain_or_undrain(client.admin(), subcommand, common.output, &bar));
        return monitor.run_with_retry_output(None, work).await;
    }
    serve(command.settings()?, |ready| {
        tracing::info!(
            grpc = %ready.grpc,
            http = %ready.http,
            data_dir = %ready.data_dir.display(),
            object_store = ready.object_store.as_deref().unwrap_or("none"),
            partitions = ready.partitions,
            took_ms = u64::try_from(ready.took.as_millis()).unwrap_or(u64::MAX),
            "ready"
        );
    })
    .await
}

/// Sends the drain or undrain request, waits if `--wait` is set, and prints the result.
async fn drain_or_undrain(
    admin: Admin,
    command: BrokerCommand,
    output: OutputFormat,
    bar: &ProgressBar,
) -> anyhow::Result<ExitCode> {
    let (value, lines) = match command {
        BrokerCommand::Drain { id, wait, wait_for_brokers } => {
            let drain = admin.drain_broker(BrokerId(id)).await.map_err(|error| explain_call(&error))?;
            // With `--wait` the command fails only after a minute, because a broker may be restarting.
            if drain.is_blocked() && !wait.is_wanted() {
                print(&drain_json(id, &drain), &format_drain(id, &drain), output)?;
                bail!("{}", blocked_drain_error(id, &unmovable_replicas(&drain)));
            }
            match wait.is_wanted() {
                false => (drain_json(id, &drain), format_drain(id, &drain)),
                true => wait_until_empty(&admin, id, drain, output, (wait, wait_for_brokers), bar).await?,
            }
        }
        BrokerCommand::Undrain { id } => {
            let changed = admin.undrain_broker(BrokerId(id)).await.map_err(|error| explain_call(&error))?;
            let text = match changed {
                true => format!("broker {id} accepts leaderships and replicas again"),
                false => format!("broker {id} was not draining: nothing changed"),
            };
            (json!({ "broker": id, "draining": false, "changed": changed }), text)
        }
    };
    print(&value, &lines, output)?;
    Ok(ExitCode::SUCCESS)
}

fn print(value: &Value, lines: &str, output: OutputFormat) -> anyhow::Result<()> {
    match output {
        OutputFormat::Json => output::json(value)?,
        OutputFormat::Text => output::line(lines)?,
    }
    Ok(())
}

/// Returns the error message for a drain in which none of the remaining replicas can move. `causes` states how many
/// replicas are blocked and why.
fn blocked_drain_error(id: u32, causes: &str) -> String {
    format!(
        "no replica on broker {id} can move: {causes}: {DRAIN_REMEDY}; for partitions without a leader, `strandline \
         topic describe NAME` shows how they get one; the drain stays in effect until `strandline broker undrain {id}`"
    )
}

/// Returns as text how many replicas cannot move, for each cause that a drain response distinguishes.
fn unmovable_replicas(drain: &DrainStatus) -> String {
    let blocked = output::count(u64::try_from(drain.blocked.len()).unwrap_or(u64::MAX), "replica");
    let mut causes = format!("{blocked}: {}, or {BLOCKED_REASSIGNMENT}", eligible_brokers(drain));
    if drain.leaderless > 0 {
        causes += &format!("; {}: the partition has no leader", output::count(drain.leaderless.into(), "replica"));
    }
    causes
}

/// Returns the number of blocked replicas of a drained broker as text, with possible causes. These are the placement
/// state of every other broker, and the number of partitions without a leader in the cluster.
fn blocked_replicas(cluster: &ClusterDescription, drained: &BrokerDescription) -> String {
    let mut others: BTreeMap<&str, Vec<BrokerId>> = BTreeMap::new();
    for other in cluster.brokers.iter().filter(|other| other.id != drained.id) {
        others.entry(placement_state(other)).or_default().push(other.id);
    }
    let mut states: Vec<String> = others
        .iter()
        .map(|(state, ids)| {
            let noun = if ids.len() == 1 { "broker" } else { "brokers" };
            format!("{state}: {noun} {}", format_ids(ids))
        })
        .collect();
    if states.is_empty() {
        states.push("there is no other broker".to_owned());
    }
    if cluster.leaderless > 0 {
        states
            .push(format!("{} without a leader in the cluster", output::count(cluster.leaderless.into(), "partition")));
    }
    let replicas = output::count(drained.replica_count.into(), "replica");
    format!("{} of {replicas} blocked ({})", drained.blocked, states.join("; "))
}

/// Returns `eligible` if a broker accepts new replicas, else the reason why not.
fn placement_state(broker: &BrokerDescription) -> &'static str {
    let is_at_maximum = broker.max_replicas.is_some_and(|max| broker.replica_count >= max);
    if !broker.alive {
        "offline"
    } else if broker.draining_since_ms.is_some() {
        "draining"
    } else if broker.stopping {
        "stopping"
    } else if broker.disk_pressure || broker.disk_full {
        "under disk pressure"
    } else if is_at_maximum {
        "at broker.max_replicas"
    } else {
        "eligible"
    }
}

/// Detector of a drain without progress. A restarting broker accepts no replicas for a moment, so only a long
/// standstill ends a wait.
#[derive(Debug, Default)]
struct Standstill {
    /// Time since which no replica of the drained broker can move; `None` while one can.
    since: Option<Instant>,
}

impl Standstill {
    /// Returns true if all `replicas` have been blocked for [`STANDSTILL_TIMEOUT`]. A replica that can move restarts
    /// the timeout.
    fn has_timed_out(&mut self, replicas: u32, blocked: u32, now: Instant) -> bool {
        if replicas == 0 || blocked < replicas {
            self.since = None;
            return false;
        }
        now.duration_since(*self.since.get_or_insert(now)) >= STANDSTILL_TIMEOUT
    }
}

/// Waits until the broker has no replicas, and returns the final output as JSON and as text. With text output, first
/// prints the start of the drain. `drain` is the response to the drain request.
///
/// # Errors
/// The drain was cancelled, a value in the metadata store may hide replicas, or the wait itself failed.
/// Without `wait_for_brokers`, also if no replica could move for [`STANDSTILL_TIMEOUT`].
async fn wait_until_empty(
    admin: &Admin,
    id: u32,
    drain: DrainStatus,
    output: OutputFormat,
    (wait, wait_for_brokers): (WaitArgs, bool),
    bar: &ProgressBar,
) -> anyhow::Result<(Value, String)> {
    if output == OutputFormat::Text {
        let text = format_drain(id, &drain);
        bar.suspend(|| output::line(&text))?;
    }
    let mut standstill = Standstill::default();
    let elapsed = wait.until_done(bar, "`strandline cluster describe`", async || {
        let poll_error = |error: CallError| PollError::new(error.retryable(), explain_call(&error));
        let cluster = admin.describe_cluster().await.map_err(poll_error)?;
        let broker = cluster.brokers.iter().find(|broker| broker.id == BrokerId(id));
        // A broker that the description no longer contains has no replicas.
        let Some(broker) = broker else { return Ok(RemainingWork::default()) };
        if broker.draining_since_ms.is_none() {
            let error = anyhow!("the drain of broker {id} was cancelled during the wait");
            return Err(PollError::Fatal(error));
        }
        if let Some(key) = first_invalid_placement_key(&cluster).filter(|_| broker.replica_count == 0) {
            let error = anyhow!(
                "broker {id} has no replicas in the readable metadata, but the value of {key} is invalid: do not stop \
                 the broker for good before that value is repaired; `strandline cluster describe` shows the error"
            );
            return Err(PollError::Fatal(error));
        }
        if standstill.has_timed_out(broker.replica_count, broker.blocked, clock::monotonic()) && !wait_for_brokers {
            let error = anyhow!("{}", blocked_drain_error(id, &blocked_replicas(&cluster, broker)));
            return Err(PollError::Fatal(error));
        }
        let text = format!("{} still on broker {id}", output::count(broker.replica_count.into(), "replica"));
        let obstacle = (broker.blocked > 0).then(|| format!("broker {id}: {}", blocked_replicas(&cluster, broker)));
        Ok(RemainingWork { count: broker.replica_count.into(), text, obstacle })
    });
    let elapsed = elapsed.await?;
    let empty = DrainStatus { leader_count: 0, replica_count: 0, blocked: Vec::new(), leaderless: 0, ..drain };
    Ok((
        drain_json(id, &empty),
        format!("broker {id} is empty after {}: it can be stopped for good", format_elapsed(elapsed)),
    ))
}

/// Returns a drain's status as JSON.
fn drain_json(id: u32, drain: &DrainStatus) -> Value {
    let blocked = drain.blocked.iter().map(|(topic, partition)| json!({ "topic": topic, "partition": partition }));
    json!({
        "broker": id,
        "draining": true,
        "changed": drain.changed,
        "since_ms": drain.since_ms,
        "leader_count": drain.leader_count,
        "replica_count": drain.replica_count,
        "eligible_brokers": drain.eligible_brokers,
        "leaderless": drain.leaderless,
        "blocked": blocked.collect::<Vec<_>>(),
    })
}

/// Returns a drain's status as text: the remaining replicas, and a warning for those that cannot move.
fn format_drain(id: u32, drain: &DrainStatus) -> String {
    let state = if drain.changed { "is draining" } else { "was draining already" };
    let mut lines = match (drain.replica_count, drain.leader_count) {
        (0, _) => format!("broker {id} {state}: no replicas to move"),
        (replicas, leaders) => format!(
            "broker {id} {state}: {} to move (leaders: {leaders})\n`strandline cluster describe` shows the progress and each broker's state",
            output::count(replicas.into(), "replica"),
        ),
    };
    if !drain.blocked.is_empty() {
        let mut names: Vec<String> =
            drain.blocked.iter().take(MAX_NAMED).map(|(topic, number)| format!("{topic}/{number}")).collect();
        if drain.blocked.len() > MAX_NAMED {
            names.push("…".to_owned());
        }
        lines += &format!(
            "\nwarning: {} cannot move: {},\n  or {BLOCKED_REASSIGNMENT}:\n  {}\n{DRAIN_REMEDY}\nthe drain then \
             continues",
            output::count(u64::try_from(drain.blocked.len()).unwrap_or(u64::MAX), "replica"),
            eligible_brokers(drain),
            names.join(" "),
        );
    }
    if drain.leaderless > 0 {
        lines += &format!(
            "\nwarning: {} cannot move without a leader to copy from: see `strandline topic describe NAME`",
            output::count(drain.leaderless.into(), "replica"),
        );
    }
    lines
}

/// Returns the cause of a blocked drain as text: the number of other brokers that are eligible for its replicas.
fn eligible_brokers(drain: &DrainStatus) -> String {
    match drain.eligible_brokers {
        0 => "no other broker can take replicas".to_owned(),
        number => format!("only {} can take replicas", output::count(number.into(), "other broker")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::cluster::tests::unhealthy;

    fn drain(blocked: u32) -> DrainStatus {
        DrainStatus {
            changed: true,
            since_ms: 1_790_000_000_000,
            leader_count: 3,
            replica_count: 12,
            blocked: (0..blocked).map(|number| ("orders".to_owned(), number)).collect(),
            eligible_brokers: 2,
            leaderless: 0,
        }
    }

    #[test]
    fn broker_id_must_be_a_number() {
        assert_eq!(parse_broker_id("12"), Ok(12));
        for wrong in ["x", "", "-1", "1.5"] {
            assert!(parse_broker_id(wrong).expect_err(wrong).contains("such as 2"), "{wrong}");
        }
    }

    /// A standstill ends the wait only after a minute. The restart of another broker is shorter, while a cluster that
    /// is too small blocks for good.
    #[test]
    fn wait_ends_when_no_replica_can_move_for_a_minute() {
        let (start, mut standstill) = (clock::monotonic(), Standstill::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!standstill.has_timed_out(8, 8, at(0)) && !standstill.has_timed_out(8, 8, at(59)));
        assert!(!standstill.has_timed_out(8, 7, at(60)), "one replica can move");
        assert!(!standstill.has_timed_out(7, 7, at(61)) && !standstill.has_timed_out(7, 7, at(120)));
        assert!(standstill.has_timed_out(7, 7, at(121)));
        assert!(!standstill.has_timed_out(0, 0, at(122)), "the broker is empty");
    }

    #[test]
    fn drain_is_blocked_when_every_replica_is() {
        assert!(DrainStatus { replica_count: 2, ..drain(2) }.is_blocked());
        assert!(!DrainStatus { replica_count: 3, ..drain(2) }.is_blocked());
        assert!(!DrainStatus { replica_count: 0, ..drain(0) }.is_blocked(), "an empty broker is drained");
        assert!(DrainStatus { replica_count: 3, leaderless: 1, ..drain(2) }.is_blocked());
        assert!(
            !DrainStatus { replica_count: 3, leaderless: 3, ..drain(0) }.is_blocked(),
            "a leader may be elected soon"
        );
    }

    #[test]
    fn blocked_drain_error_counts_replicas_per_cause() {
        let causes = unmovable_replicas(&DrainStatus { leaderless: 1, ..drain(11) });
        assert_eq!(
            causes,
            "11 replicas: only 2 other brokers can take replicas, or a running reassignment waits for an offline broker; \
             1 replica: the partition has no leader"
        );
        let error = blocked_drain_error(3, &causes);
        assert!(error.contains("no replica on broker 3 can move: 11 replicas"), "{error}");
        assert!(error.contains("broker undrain 3"), "{error}");
    }

    #[test]
    fn blocked_replicas_name_the_states_of_other_brokers() {
        let cluster = unhealthy();
        let drained = BrokerDescription { blocked: 20, ..cluster.brokers[2].clone() };
        assert_eq!(
            blocked_replicas(&cluster, &drained),
            "20 of 20 replicas blocked (eligible: broker 1; offline: broker 5; stopping: broker 2; under disk \
             pressure: broker 4; 1 partition without a leader in the cluster)"
        );
        let alone = ClusterDescription { brokers: vec![drained.clone()], leaderless: 0, ..cluster };
        assert_eq!(blocked_replicas(&alone, &drained), "20 of 20 replicas blocked (there is no other broker)");
    }

    #[test]
    fn drain_output_lists_moving_and_blocked_replicas() {
        output::golden::lines("broker-drain.txt", &format_drain(2, &drain(0)));
        let messages = ["DrainBrokerRequest", "DrainBrokerResponse", "TopicPartition"];
        output::golden::json("broker-drain.json", &drain_json(2, &drain(2)), &messages, &["draining"]);
        output::golden::lines("broker-drain-blocked.txt", &format_drain(2, &drain(12)));
        let repeated = DrainStatus { eligible_brokers: 0, replica_count: 1, changed: false, ..drain(1) };
        assert!(
            format_drain(2, &repeated).contains("was draining already: 1 replica"),
            "{}",
            format_drain(2, &repeated)
        );
        assert!(format_drain(2, &repeated).contains("1 replica cannot move: no other broker can take replicas"));
        let leaderless = format_drain(2, &DrainStatus { leaderless: 2, ..drain(0) });
        assert!(leaderless.contains("warning: 2 replicas cannot move without a leader to copy from"), "{leaderless}");
        assert_eq!(
            format_drain(2, &DrainStatus { replica_count: 0, ..drain(0) }),
            "broker 2 is draining: no replicas to move"
        );
    }
}
