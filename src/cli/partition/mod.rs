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

use self::text::{
    election_json, format_cancelled, format_consequences, format_requested, format_status, reassignment_json,
    unclean_election_json,
};
use super::{
    CommonArgs, broker,
    connect::{connect, explain, explain_call},
    output::{self, OutputFormat, format_ids},
    retry_output::RetryMonitor,
    wait::{PollError, RemainingWork, WaitArgs, format_elapsed},
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
    #[arg(long, value_name = "ID,ID", value_delimiter = ',', value_parser = broker::parse_broker_id, required = true)]
    replicas: Vec<u32>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(subcommand)]
    subcommand: Option<ReassignCommand>,
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
    #[arg(value_name = "TOPIC/N", value_parser = parse_partition)]
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

/// Parses the name of one partition.
fn parse_partition(text: &str) -> Result<TopicOrPartition, String> {
    match text.parse::<TopicOrPartition>()? {
        name if name.partition.is_some() => Ok(name),
        name => Err(format!("name one partition, such as {}/0", name.topic)),
    }
}

impl PartitionCommand {
    /// Returns an error message if the arguments contradict each other. `cancel` needs exactly one of a name and
    /// `--all`. For `status` and `cancel`, one name may stand before or after that word, and the options of a new
    /// reassignment are not allowed.
    pub(super) fn conflicting_arguments(&self) -> Option<&'static str> {
        let none = &None;
        let (has_reassign_options, name_before, name_after, cancels_all) = match self {
            Self::Reassign(ReassignArgs { name, replicas, wait, subcommand: Some(subcommand) }) => {
                let has_reassign_options = !replicas.is_empty() || wait.is_wanted();
                match subcommand {
                    ReassignCommand::Status(args) => (has_reassign_options, name, &args.name, None),
                    ReassignCommand::Cancel(args) => (has_reassign_options, name, &args.name, Some(args.all)),
                }
            }
            Self::Cancel(args) => (false, none, &args.name, Some(args.all)),
            _ => return None,
        };
        let name = name_before.as_ref().or(name_after.as_ref());
        if has_reassign_options {
            Some("--replicas and --wait are for a new reassignment: leave them out with status and cancel")
        } else if name_after.as_ref().is_some_and(|after| name != Some(after)) {
            Some("name one topic or partition, not two")
        } else if cancels_all == Some(name.is_some()) {
            Some("name the TOPIC or TOPIC/N whose reassignment is to be cancelled, or use --all")
        } else {
            None
        }
    }
}

/// Runs a subcommand. The hidden commands `status` and `cancel` are short forms of `reassign status` and `reassign
/// cancel`.
pub(super) async fn run(common: &CommonArgs, command: PartitionCommand) -> anyhow::Result<ExitCode> {
    let client = connect(common).await?;
    let (admin, output) = (client.admin(), common.output);
    let bar = match &command {
        PartitionCommand::Reassign(ReassignArgs { wait, .. }) => wait.bar(),
        _ => ProgressBar::hidden(),
    };
    let work = async {
        match command {
            PartitionCommand::Reassign(ReassignArgs { name, replicas, wait, subcommand: None }) => {
                reassign(&admin, &name.expect("clap requires it"), &replicas, output, wait, &bar).await
            }
            // `reassign TOPIC status` and `reassign status TOPIC` are the same command.
            PartitionCommand::Reassign(ReassignArgs {
                name, subcommand: Some(ReassignCommand::Status(args)), ..
            }) => status(&admin, name.or(args.name), output).await,
            PartitionCommand::Reassign(ReassignArgs {
                name, subcommand: Some(ReassignCommand::Cancel(args)), ..
            }) => cancel(&admin, name.or(args.name), output).await,
            PartitionCommand::Status(args) => status(&admin, args.name, output).await,
            PartitionCommand::Cancel(args) => cancel(&admin, args.name, output).await,
            PartitionCommand::Elect(command) => elect(&admin, &command, output).await,
            PartitionCommand::RebuildManifest(command) => rebuild::run(&admin, &command, output).await,
        }
    };
    // The future of all subcommands is large, so it is boxed.
    let mut monitor = RetryMonitor::new(&client);
    monitor.set_bar(&bar);
    monitor.run_with_retry_output(None, Box::pin(work)).await?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the error message for a failed request about a topic or partition, or about all topics (`None`).
async fn explain_for(admin: &Admin, name: Option<&TopicOrPartition>, error: CallError) -> anyhow::Error {
    match name {
        Some(name) => explain(admin, &name.topic, error).await,
        None => explain_call(&error),
    }
}

/// Requests a reassignment, waits if `--wait` is set, and prints the result.
async fn reassign(
    admin: &Admin,
    name: &TopicOrPartition,
    replicas: &[u32],
    output: OutputFormat,
    wait: WaitArgs,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let replicas: Vec<BrokerId> = replicas.iter().copied().map(BrokerId).collect();
    let requested = match admin.reassign(&name.topic, name.partition, &replicas).await {
        Ok(requested) => requested,
        Err(error) => return Err(explain_for(admin, Some(name), error).await),
    };
    if !wait.is_wanted() {
        return print(&requested, &format_requested(&requested), output);
    }
    if output == OutputFormat::Text {
        bar.suspend(|| output::line(&format_requested(&requested)))?;
    }
    let (completed, elapsed) = wait_until_completed(admin, name, requested, wait, bar).await?;
    let text = match completed.len() {
        1 => "1 partition has its new replicas".to_owned(),
        count => format!("{count} partitions have their new replicas"),
    };
    print(&completed, &format!("{text} after {}", format_elapsed(elapsed)), output)
}

/// Waits until every reassignment has ended, and checks that each partition has the requested replicas. Returns the
/// reassignments in their final state, and the time that the wait took. Fails if a partition has other replicas.
async fn wait_until_completed(
    admin: &Admin,
    name: &TopicOrPartition,
    mut reassignments: Vec<Reassignment>,
    wait: WaitArgs,
    bar: &ProgressBar,
) -> anyhow::Result<(Vec<Reassignment>, Duration)> {
    let elapsed = wait.until_done(bar, "`strandline partition reassign status`", async || {
        match admin.reassignments(Some(&name.topic), name.partition).await {
            Ok(active) => Ok(remaining(&reassignments, &active)),
            Err(error) => Err(PollError::new(error.retryable(), explain_for(admin, Some(name), error).await)),
        }
    });
    let elapsed = elapsed.await?;
    let topic = match admin.describe_topic(&name.topic).await {
        Ok(topic) => topic,
        Err(error) => return Err(explain_for(admin, Some(name), error).await),
    };
    for reassignment in &mut reassignments {
        let partition = reassignment.partition;
        let Some(current) = topic.partitions.iter().find(|current| current.partition == partition) else {
            continue;
        };
        if current.replicas != reassignment.replicas {
            let (current, requested) = (format_ids(&current.replicas), format_ids(&reassignment.replicas));
            bail!(
                "{}/{partition} is on {current} instead of {requested}: the reassignment was cancelled or replaced, or \
                 the controller has balanced the brokers since (controller.balance)",
                reassignment.topic
            );
        }
        (reassignment.adding, reassignment.removing, reassignment.queued) = (Vec::new(), Vec::new(), false);
        (reassignment.isr, reassignment.leader) = (current.isr.clone(), current.leader);
    }
    Ok((reassignments, elapsed))
}

/// Returns the work that remains of the requested reassignments. `active` are the uncompleted reassignments of the
/// topic or partition, and may include reassignments of the controller.
fn remaining(requested: &[Reassignment], active: &[Reassignment]) -> RemainingWork {
    let is_requested =
        |reassignment: &&Reassignment| requested.iter().any(|other| other.partition == reassignment.partition);
    let remaining: Vec<&Reassignment> = active.iter().filter(is_requested).collect();
    let queued_count = remaining.iter().filter(|reassignment| reassignment.queued).count();
    let count = u64::try_from(remaining.len()).unwrap_or(u64::MAX);
    let queued = if queued_count == 0 { String::new() } else { format!(" (queued: {queued_count})") };
    RemainingWork {
        count,
        text: format!("{} to move{queued}", output::count(count, "partition")),
        ..RemainingWork::default()
    }
}

/// Prints the uncompleted reassignments of a topic or partition; of all topics without a name.
async fn status(admin: &Admin, name: Option<TopicOrPartition>, output: OutputFormat) -> anyhow::Result<()> {
    let (topic, partition) = split_name(name.as_ref());
    match admin.reassignments(topic, partition).await {
        Ok(reassignments) => print(&reassignments, &format_status(&reassignments), output),
        Err(error) => Err(explain_for(admin, name.as_ref(), error).await),
    }
}

/// Cancels the reassignments of a topic or partition; all reassignments without a name.
async fn cancel(admin: &Admin, name: Option<TopicOrPartition>, output: OutputFormat) -> anyhow::Result<()> {
    let (topic, partition) = split_name(name.as_ref());
    match admin.cancel_reassignment(topic, partition).await {
        Ok(cancelled) => print(&cancelled, &format_cancelled(&cancelled), output),
        Err(error) => Err(explain_for(admin, name.as_ref(), error).await),
    }
}

/// Returns the topic and the partition of an optional name.
fn split_name(name: Option<&TopicOrPartition>) -> (Option<&str>, Option<u32>) {
    (name.map(|name| name.topic.as_str()), name.and_then(|name| name.partition))
}

/// Elects a leader and prints the result. An unclean election first shows its consequences, and prompts without
/// `--yes`.
async fn elect(admin: &Admin, command: &ElectArgs, output: OutputFormat) -> anyhow::Result<()> {
    let (topic, number) =
        (command.name.topic.as_str(), command.name.partition.expect("the parser requires a partition"));
    if !command.unclean {
        let election = match admin.elect_leader(topic, number).await {
            Ok(election) => election,
            Err(error) => return Err(explain_for(admin, Some(&command.name), error).await),
        };
        let verb = if election.changed { "leads" } else { "leads already:" };
        let text = format!("broker {} {verb} {topic}/{number} in epoch {}", election.leader, election.leader_epoch);
        return show(&election_json(topic, number, &election), &text, output);
    }
    let dry_run = match admin.unclean_election(topic, number).await {
        Ok(dry_run) => dry_run,
        Err(error) => return Err(explain_for(admin, Some(&command.name), error).await),
    };
    let consequences = format_consequences(topic, number, &dry_run);
    if !command.yes {
        confirm(&consequences, &format!("elect broker {} anyway?", dry_run.leader))?;
    }
    let result = match admin.elect_unclean(topic, number, &dry_run).await {
        Ok(result) => result,
        Err(error) => return Err(explain_for(admin, Some(&command.name), error).await),
    };
    let election = ElectionResult {
        replicas: dry_run.replicas,
        lost: dry_run.lost,
        discard_local: dry_run.discard_local,
        ..result
    };
    let text =
        format!("{consequences}\nbroker {} leads {topic}/{number} in epoch {}", election.leader, election.leader_epoch);
    show(&unclean_election_json(topic, number, &election), if command.yes { &text } else { last_line(&text) }, output)
}

/// Returns the last line. The prompt has already shown the lines before it.
fn last_line(text: &str) -> &str {
    text.lines().next_back().unwrap_or(text)
}

/// Shows the consequences and prompts the user at the terminal. Fails without a terminal or without a yes.
fn confirm(consequences: &str, question: &str) -> anyhow::Result<()> {
    if !io::stdin().is_terminal() {
        bail!("{consequences}\nnothing was done: without a terminal, confirm with --yes");
    }
    eprint!("{consequences}\n{question} [y/N] ");
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { bail!("nothing was done") }
}

fn print(reassignments: &[Reassignment], lines: &str, output: OutputFormat) -> anyhow::Result<()> {
    show(&Value::Array(reassignments.iter().map(reassignment_json).collect()), lines, output)
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
