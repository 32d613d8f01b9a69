//! `strandline partition`: reassign, status, cancel, elect, rebuild-manifest. The output is in `text` and `rebuild`.

mod rebuild;
mod text;

use std::{
    io::{self, BufRead as _, IsTerminal as _},
    process::ExitCode,
    str::FromStr,
    time::Duration,
};

use anyhow::bail;
use clap::{Args, Subcommand};
use indicatif::ProgressBar;
use serde_json::Value;

use self::text::{elected, prospect, reassigned, reassignment, taken_back, uncleanly, under_way};
use super::{
    CommonArgs, broker,
    connect::{connect, explain, explain_order},
    output::{self, OutputFormat, format_ids},
    retry_output::RetryMonitor,
    wait::{PollError, RemainingWork, WaitArgs, took},
};
use crate::{
    client::{Admin, CallError, ElectionResult, Reassignment},
    model::{BrokerId, TopicName},
};

#[derive(Debug, Subcommand)]
pub(super) enum PartitionCommand {
    Reassign(ReassignArgs),
    /// Show active and queued reassignments
    #[command(hide = true)]
    Status(StatusArgs),
    /// Cancel reassignments
    #[command(hide = true)]
    Cancel(CancelArgs),
    Elect(ElectArgs),
    RebuildManifest(rebuild::RebuildManifestArgs),
}

/// Move partitions to other brokers; show or cancel reassignments
///
/// New replicas copy the records that are not in the object store yet. Old replicas are removed when all new ones are
/// in sync. The reassignment is stored when the command returns, and the brokers then execute it; with --wait, the
/// command returns when it is completed. For a topic with the name `status` or `cancel`, name each partition:
/// `status/0`.
#[derive(Debug, Args)]
#[command(subcommand_negates_reqs = true, subcommand_value_name = "COMMAND")]
pub(super) struct ReassignArgs {
    /// A topic, whose partition N gets the list rotated by N; or one partition
    #[arg(value_name = "TOPIC[/N]", required = true)]
    name: Option<TopicOrPartition>,
    /// New replicas, the preferred leader first: as many as the topic's replication factor
    #[arg(long, value_name = "ID,ID", value_delimiter = ',', value_parser = broker::number, required = true)]
    replicas: Vec<u32>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(subcommand)]
    what: Option<ReassignCommand>,
}

#[derive(Debug, Subcommand)]
enum ReassignCommand {
    /// Show active and queued reassignments, including those of the controller
    Status(StatusArgs),
    /// Cancel reassignments: the partitions return to their previous replicas
    ///
    /// The controller restarts a reassignment for a drain or a changed replication factor: undo that change instead.
    Cancel(CancelArgs),
}

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Only this topic or partition
    #[arg(value_name = "TOPIC[/N]")]
    name: Option<TopicOrPartition>,
}

#[derive(Debug, Args)]
pub(super) struct CancelArgs {
    /// Topic or partition whose reassignments are cancelled
    #[arg(value_name = "TOPIC[/N]", conflicts_with = "all")]
    name: Option<TopicOrPartition>,
    /// All reassignments in the cluster
    #[arg(long)]
    all: bool,
}

/// Elect the preferred leader; with --unclean, elect a replica that may lack committed records
///
/// With --unclean: if all replicas with all committed records are permanently lost, a replica that may lack some
/// becomes leader. The command shows this replica and the records that are lost, and prompts before the election.
/// Without a terminal, --yes is required.
#[derive(Debug, Args)]
pub(super) struct ElectArgs {
    /// The partition
    #[arg(value_name = "TOPIC/N", value_parser = one_partition)]
    name: TopicOrPartition,
    /// Elect even if committed records may be lost
    #[arg(long)]
    unclean: bool,
    /// Do not prompt; required without a terminal
    #[arg(long, requires = "unclean")]
    yes: bool,
}

/// Name of a topic or of one of its partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
struct TopicOrPartition {
    topic: String,
    partition: Option<u32>,
}

impl FromStr for TopicOrPartition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (topic, number) = match text.split_once('/') {
            None => (text, None),
            Some((topic, number)) => (topic, Some(number)),
        };
        let topic = TopicName::new(topic).map_err(|error| error.to_string())?.to_string();
        let partition = number.map(|number| {
            number
                .parse()
                .map_err(|_| format!("{number:?} is not a partition number: write TOPIC/N, such as {topic}/0"))
        });
        Ok(Self { topic, partition: partition.transpose()? })
    }
}

fn one_partition(text: &str) -> Result<TopicOrPartition, String> {
    match text.parse::<TopicOrPartition>()? {
        name if name.partition.is_some() => Ok(name),
        name => Err(format!("name one partition, such as {}/0", name.topic)),
    }
}

impl PartitionCommand {
    /// Returns an error message if the arguments contradict each other.
    pub(super) fn wrong_usage(&self) -> Option<&'static str> {
        let none = &None;
        let (orders, before, after, all) = match self {
            Self::Reassign(ReassignArgs { name, replicas, wait, what: Some(what) }) => {
                let orders = !replicas.is_empty() || wait.is_wanted();
                match what {
                    ReassignCommand::Status(which) => (orders, name, &which.name, None),
                    ReassignCommand::Cancel(cancelled) => (orders, name, &cancelled.name, Some(cancelled.all)),
                }
            }
            Self::Cancel(cancelled) => (false, none, &cancelled.name, Some(cancelled.all)),
            _ => return None,
        };
        let named = before.as_ref().or(after.as_ref());
        if orders {
            Some("--replicas and --wait are for a new reassignment: leave them out with status and cancel")
        } else if after.as_ref().is_some_and(|after| named != Some(after)) {
            Some("name one topic or partition, not two")
        } else if all == Some(named.is_some()) {
            Some("name the TOPIC or TOPIC/N whose reassignment is to be cancelled, or use --all")
        } else {
            None
        }
    }
}

pub(super) async fn run(common: &CommonArgs, command: PartitionCommand) -> anyhow::Result<ExitCode> {
    let client = connect(common).await?;
    let (admin, output) = (client.admin(), common.output);
    let bar = match &command {
        PartitionCommand::Reassign(ReassignArgs { wait, .. }) => wait.bar(),
        _ => ProgressBar::hidden(),
    };
    let work = async {
        match command {
            PartitionCommand::Reassign(ReassignArgs { name, replicas, wait, what: None }) => {
                reassign(&admin, &name.expect("clap requires it"), &replicas, output, wait, &bar).await
            }
            // `reassign TOPIC status` and `reassign status TOPIC` are the same command.
            PartitionCommand::Reassign(ReassignArgs { name, what: Some(ReassignCommand::Status(which)), .. }) => {
                status(&admin, name.or(which.name), output).await
            }
            PartitionCommand::Reassign(ReassignArgs {
                name, what: Some(ReassignCommand::Cancel(cancelled)), ..
            }) => cancel(&admin, name.or(cancelled.name), output).await,
            PartitionCommand::Status(which) => status(&admin, which.name, output).await,
            PartitionCommand::Cancel(cancelled) => cancel(&admin, cancelled.name, output).await,
            PartitionCommand::Elect(command) => elect(&admin, &command, output).await,
            PartitionCommand::RebuildManifest(command) => rebuild::run(&admin, &command, output).await,
        }
    };
    // The future is boxed, because it contains an interactive prompt.
    let mut monitor = RetryMonitor::new(&client);
    monitor.beside(&bar);
    monitor.run_with_retry_output(None, Box::pin(work)).await?;
    Ok(ExitCode::SUCCESS)
}

async fn refused(admin: &Admin, name: Option<&TopicOrPartition>, error: CallError) -> anyhow::Error {
    match name {
        Some(name) => explain(admin, &name.topic, error).await,
        None => explain_order(&error),
    }
}

async fn reassign(
    admin: &Admin,
    name: &TopicOrPartition,
    replicas: &[u32],
    output: OutputFormat,
    wait: WaitArgs,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let replicas: Vec<BrokerId> = replicas.iter().copied().map(BrokerId).collect();
    let moves = match admin.reassign(&name.topic, name.partition, &replicas).await {
        Ok(moves) => moves,
        Err(error) => return Err(refused(admin, Some(name), error).await),
    };
    if !wait.is_wanted() {
        return print(&moves, &reassigned(&moves), output);
    }
    if output == OutputFormat::Text {
        bar.suspend(|| output::line(&reassigned(&moves)))?;
    }
    let (done, time) = until_moved(admin, name, moves, wait, bar).await?;
    let text = match done.len() {
        1 => "1 partition has its new replicas".to_owned(),
        many => format!("{many} partitions have their new replicas"),
    };
    print(&done, &format!("{text} after {}", took(time)), output)
}

/// Waits until every reassignment is over, and checks that each partition has the ordered replicas. Returns the final
/// reassignments, and the time that the wait took.
async fn until_moved(
    admin: &Admin,
    name: &TopicOrPartition,
    mut moves: Vec<Reassignment>,
    wait: WaitArgs,
    bar: &ProgressBar,
) -> anyhow::Result<(Vec<Reassignment>, Duration)> {
    let time = wait.until_done(bar, "`strandline partition reassign status`", async || {
        match admin.reassignments(Some(&name.topic), name.partition).await {
            Ok(under_way) => Ok(remaining(&moves, &under_way)),
            Err(error) => Err(PollError::new(error.retryable(), refused(admin, Some(name), error).await)),
        }
    });
    let time = time.await?;
    let topic = match admin.describe_topic(&name.topic).await {
        Ok(topic) => topic,
        Err(error) => return Err(refused(admin, Some(name), error).await),
    };
    for one in &mut moves {
        let Some(current) = topic.partitions.iter().find(|current| current.partition == one.partition) else {
            continue;
        };
        if current.replicas != one.replicas {
            let (name, on, wanted) =
                (format!("{}/{}", one.topic, one.partition), format_ids(&current.replicas), format_ids(&one.replicas));
            bail!(
                "{name} is on {on} instead of {wanted}: the reassignment was cancelled or replaced, or the controller \
                 has balanced the brokers since (controller.balance)"
            );
        }
        (one.adding, one.removing, one.queued) = (Vec::new(), Vec::new(), false);
        (one.isr, one.leader) = (current.isr.clone(), current.leader);
    }
    Ok((moves, time))
}

/// Returns the ordered reassignments that are not completed.
fn remaining(ordered: &[Reassignment], under_way: &[Reassignment]) -> RemainingWork {
    let mine = |one: &&Reassignment| ordered.iter().any(|ordered| ordered.partition == one.partition);
    let left: Vec<&Reassignment> = under_way.iter().filter(mine).collect();
    let waiting = left.iter().filter(|one| one.queued).count();
    let count = u64::try_from(left.len()).unwrap_or(u64::MAX);
    let turn = if waiting == 0 { String::new() } else { format!(", {waiting} of them queued") };
    RemainingWork {
        count,
        text: format!("{} to move{turn}", output::count(count, "partition")),
        ..RemainingWork::default()
    }
}

async fn status(admin: &Admin, name: Option<TopicOrPartition>, output: OutputFormat) -> anyhow::Result<()> {
    let (topic, partition) = parts(name.as_ref());
    match admin.reassignments(topic, partition).await {
        Ok(moves) => print(&moves, &under_way(&moves), output),
        Err(error) => Err(refused(admin, name.as_ref(), error).await),
    }
}

async fn cancel(admin: &Admin, name: Option<TopicOrPartition>, output: OutputFormat) -> anyhow::Result<()> {
    let (topic, partition) = parts(name.as_ref());
    match admin.cancel_reassignment(topic, partition).await {
        Ok(moves) => print(&moves, &taken_back(&moves), output),
        Err(error) => Err(refused(admin, name.as_ref(), error).await),
    }
}

fn parts(name: Option<&TopicOrPartition>) -> (Option<&str>, Option<u32>) {
    (name.map(|name| name.topic.as_str()), name.and_then(|name| name.partition))
}

async fn elect(admin: &Admin, command: &ElectArgs, output: OutputFormat) -> anyhow::Result<()> {
    let (topic, number) =
        (command.name.topic.as_str(), command.name.partition.expect("the parser requires a partition"));
    if !command.unclean {
        let election = match admin.elect_leader(topic, number).await {
            Ok(election) => election,
            Err(error) => return Err(refused(admin, Some(&command.name), error).await),
        };
        let verb = if election.changed { "leads" } else { "leads already:" };
        let text = format!("broker {} {verb} {topic}/{number} in epoch {}", election.leader, election.leader_epoch);
        return show(&elected(topic, number, &election), &text, output);
    }
    let would = match admin.unclean_election(topic, number).await {
        Ok(would) => would,
        Err(error) => return Err(refused(admin, Some(&command.name), error).await),
    };
    let prospect = prospect(topic, number, &would);
    if !command.yes {
        confirm(&prospect, &format!("elect broker {} anyway?", would.leader))?;
    }
    let done = match admin.elect_unclean(topic, number, &would).await {
        Ok(done) => done,
        Err(error) => return Err(refused(admin, Some(&command.name), error).await),
    };
    let election =
        ElectionResult { replicas: would.replicas, lost: would.lost, discard_local: would.discard_local, ..done };
    let text =
        format!("{prospect}\nbroker {} leads {topic}/{number} in epoch {}", election.leader, election.leader_epoch);
    show(&uncleanly(topic, number, &election), if command.yes { &text } else { last(&text) }, output)
}

/// Returns the last line. The prompt has already shown the lines before it.
fn last(text: &str) -> &str {
    text.lines().next_back().unwrap_or(text)
}

/// Prompts the user at the terminal. Fails without a terminal or without a yes.
fn confirm(prospect: &str, question: &str) -> anyhow::Result<()> {
    if !io::stdin().is_terminal() {
        bail!("{prospect}\nnothing was done: without a terminal, confirm with --yes");
    }
    eprint!("{prospect}\n{question} [y/N] ");
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { bail!("nothing was done") }
}

fn print(moves: &[Reassignment], lines: &str, output: OutputFormat) -> anyhow::Result<()> {
    show(&Value::Array(moves.iter().map(reassignment).collect()), lines, output)
}

fn show(value: &Value, lines: &str, output: OutputFormat) -> anyhow::Result<()> {
    match output {
        OutputFormat::Json => output::json(value)?,
        OutputFormat::Text => output::line(lines)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests;
