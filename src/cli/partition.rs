//! `strandline partition`: reassign, status, cancel, elect, rebuild-manifest. The output is in `words` and `rebuild`.

mod rebuild;
mod words;

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

use self::words::{elected, prospect, reassigned, reassignment, taken_back, uncleanly, under_way};
use super::{
    Common, broker,
    connect::{connect, explain, explain_order},
    output::{self, Output, format_ids},
    patience::Patience,
    wait::{Left, Unsaid, Wait, took},
};
use crate::{
    client::{Admin, CallError, Election, Reassignment},
    model::{BrokerId, TopicName},
};

#[derive(Debug, Subcommand)]
pub(super) enum Partition {
    Reassign(Reassign),
    /// Show the moves that are under way or wait for their turn
    #[command(hide = true)]
    Status(Which),
    /// Take moves back
    #[command(hide = true)]
    Cancel(Cancelled),
    Elect(Elect),
    RebuildManifest(rebuild::RebuildManifest),
}

/// Move partitions to other brokers, show how far that is, or take it back
///
/// New replicas copy what is not in the bucket yet; the old ones are let go when all new ones are in sync. The order is written
/// down when the command returns, and the brokers carry it out from then on; with --wait it is carried out. Of a topic that is named
/// `status` or `cancel`, name the partitions one by one: `status/0`.
#[derive(Debug, Args)]
#[command(subcommand_negates_reqs = true, subcommand_value_name = "WHAT")]
pub(super) struct Reassign {
    /// A topic, of which partition N gets the list rotated by N; or one partition
    #[arg(value_name = "TOPIC[/N]", required = true)]
    name: Option<Name>,
    /// The brokers that are to hold it, the preferred leader first: as many as the topic's replication factor
    #[arg(long, value_name = "ID,ID", value_delimiter = ',', value_parser = broker::number, required = true)]
    replicas: Vec<u32>,
    #[command(flatten)]
    wait: Wait,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Show the moves that are under way or wait for their turn, whoever ordered them
    Status(Which),
    /// Take moves back: the replicas are again those of before
    ///
    /// What the controller began for a drain or a changed replication factor it begins again: take that back instead.
    Cancel(Cancelled),
}

#[derive(Debug, Args)]
pub(super) struct Which {
    /// Only this topic's, or this partition's
    #[arg(value_name = "TOPIC[/N]")]
    name: Option<Name>,
}

#[derive(Debug, Args)]
pub(super) struct Cancelled {
    /// A topic's moves, or one partition's
    #[arg(value_name = "TOPIC[/N]", conflicts_with = "all")]
    name: Option<Name>,
    /// Every move in the cluster
    #[arg(long)]
    all: bool,
}

/// Have the preferred replica lead again; with --unclean, elect one where nobody can lead without loss
///
/// With --unclean: where everybody who holds all committed records is gone for good, a replica leads that may lack some. It says
/// which, and what is lost, and asks before it does it. Where there is no terminal to ask at, it needs --yes.
#[derive(Debug, Args)]
pub(super) struct Elect {
    /// The partition
    #[arg(value_name = "TOPIC/N", value_parser = one_partition)]
    name: Name,
    /// Elect although committed records may be lost
    #[arg(long)]
    unclean: bool,
    /// Do not ask; needed where there is no terminal
    #[arg(long, requires = "unclean")]
    yes: bool,
}

/// Name of a topic or of one of its partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Name {
    topic: String,
    partition: Option<u32>,
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (topic, number) = match text.split_once('/') {
            None => (text, None),
            Some((topic, number)) => (topic, Some(number)),
        };
        let topic = TopicName::new(topic).map_err(|error| error.to_string())?.to_string();
        let partition = number.map(|number| {
            number.parse().map_err(|_| format!("{number:?} is no partition: write TOPIC/N, such as {topic}/0"))
        });
        Ok(Self { topic, partition: partition.transpose()? })
    }
}

fn one_partition(text: &str) -> Result<Name, String> {
    match text.parse::<Name>()? {
        name if name.partition.is_some() => Ok(name),
        name => Err(format!("name one partition: {}/0 and so on", name.topic)),
    }
}

impl Partition {
    /// Returns an error message if the arguments contradict each other.
    pub(super) fn wrong_usage(&self) -> Option<&'static str> {
        let none = &None;
        let (orders, before, after, all) = match self {
            Self::Reassign(Reassign { name, replicas, wait, what: Some(what) }) => {
                let orders = !replicas.is_empty() || wait.is_wanted();
                match what {
                    What::Status(which) => (orders, name, &which.name, None),
                    What::Cancel(cancelled) => (orders, name, &cancelled.name, Some(cancelled.all)),
                }
            }
            Self::Cancel(cancelled) => (false, none, &cancelled.name, Some(cancelled.all)),
            _ => return None,
        };
        let named = before.as_ref().or(after.as_ref());
        if orders {
            Some("--replicas orders a move, and --wait waits for it; status and cancel go without them")
        } else if after.as_ref().is_some_and(|after| named != Some(after)) {
            Some("name one topic or partition, not two")
        } else if all == Some(named.is_some()) {
            Some("name the TOPIC or TOPIC/N whose move is to be taken back, or every move with --all")
        } else {
            None
        }
    }
}

pub(super) async fn run(common: &Common, command: Partition) -> anyhow::Result<ExitCode> {
    let client = connect(common).await?;
    let (admin, output) = (client.admin(), common.output);
    let bar = match &command {
        Partition::Reassign(Reassign { wait, .. }) => wait.bar(),
        _ => ProgressBar::hidden(),
    };
    let work = async {
        match command {
            Partition::Reassign(Reassign { name, replicas, wait, what: None }) => {
                reassign(&admin, &name.expect("clap asks for it"), &replicas, output, wait, &bar).await
            }
            // `reassign TOPIC status` and `reassign status TOPIC` are the same command.
            Partition::Reassign(Reassign { name, what: Some(What::Status(which)), .. }) => {
                status(&admin, name.or(which.name), output).await
            }
            Partition::Reassign(Reassign { name, what: Some(What::Cancel(cancelled)), .. }) => {
                cancel(&admin, name.or(cancelled.name), output).await
            }
            Partition::Status(which) => status(&admin, which.name, output).await,
            Partition::Cancel(cancelled) => cancel(&admin, cancelled.name, output).await,
            Partition::Elect(command) => elect(&admin, &command, output).await,
            Partition::RebuildManifest(command) => rebuild::run(&admin, &command, output).await,
        }
    };
    // The future is boxed, because it contains an interactive prompt.
    let mut patience = Patience::new(&client);
    patience.beside(&bar);
    patience.over(None, Box::pin(work)).await?;
    Ok(ExitCode::SUCCESS)
}

async fn refused(admin: &Admin, name: Option<&Name>, error: CallError) -> anyhow::Error {
    match name {
        Some(name) => explain(admin, &name.topic, error).await,
        None => explain_order(&error),
    }
}

async fn reassign(
    admin: &Admin,
    name: &Name,
    replicas: &[u32],
    output: Output,
    wait: Wait,
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
    if output == Output::Text {
        bar.suspend(|| output::line(&reassigned(&moves)))?;
    }
    let (done, time) = until_moved(admin, name, moves, wait, bar).await?;
    let said = match done.len() {
        1 => "1 partition is where it was ordered".to_owned(),
        many => format!("{many} partitions are where they were ordered"),
    };
    print(&done, &format!("{said} after {}", took(time)), output)
}

/// Waits until every reassignment is over, and checks that each partition has the ordered replicas. Returns the final
/// reassignments, and the time that the wait took.
async fn until_moved(
    admin: &Admin,
    name: &Name,
    mut moves: Vec<Reassignment>,
    wait: Wait,
    bar: &ProgressBar,
) -> anyhow::Result<(Vec<Reassignment>, Duration)> {
    let time = wait.until_done(bar, "`strandline partition reassign status`", async || {
        match admin.reassignments(Some(&name.topic), name.partition).await {
            Ok(under_way) => Ok(left(&moves, &under_way)),
            Err(error) => Err(Unsaid::new(error.retryable(), refused(admin, Some(name), error).await)),
        }
    });
    let time = time.await?;
    let topic = match admin.describe_topic(&name.topic).await {
        Ok(topic) => topic,
        Err(error) => return Err(refused(admin, Some(name), error).await),
    };
    for one in &mut moves {
        let Some(stands) = topic.partitions.iter().find(|stands| stands.partition == one.partition) else { continue };
        if stands.replicas != one.replicas {
            let (name, on, wanted) =
                (format!("{}/{}", one.topic, one.partition), format_ids(&stands.replicas), format_ids(&one.replicas));
            bail!(
                "{name} is on {on} and not on {wanted}: the order was taken back, another one took its place, or the controller has \
                 evened out what brokers hold since (controller.balance)"
            );
        }
        (one.adding, one.removing, one.waiting) = (Vec::new(), Vec::new(), false);
        (one.isr, one.leader) = (stands.isr.clone(), stands.leader);
    }
    Ok((moves, time))
}

/// Returns the ordered reassignments that are not completed.
fn left(ordered: &[Reassignment], under_way: &[Reassignment]) -> Left {
    let mine = |one: &&Reassignment| ordered.iter().any(|ordered| ordered.partition == one.partition);
    let left: Vec<&Reassignment> = under_way.iter().filter(mine).collect();
    let waiting = left.iter().filter(|one| one.waiting).count();
    let count = u64::try_from(left.len()).unwrap_or(u64::MAX);
    let turn = if waiting == 0 { String::new() } else { format!(", of which {waiting} waiting for their turn") };
    Left { count, said: format!("{} to move{turn}", output::count(count, "partition")), ..Left::default() }
}

async fn status(admin: &Admin, name: Option<Name>, output: Output) -> anyhow::Result<()> {
    let (topic, partition) = parts(name.as_ref());
    match admin.reassignments(topic, partition).await {
        Ok(moves) => print(&moves, &under_way(&moves), output),
        Err(error) => Err(refused(admin, name.as_ref(), error).await),
    }
}

async fn cancel(admin: &Admin, name: Option<Name>, output: Output) -> anyhow::Result<()> {
    let (topic, partition) = parts(name.as_ref());
    match admin.cancel_reassignment(topic, partition).await {
        Ok(moves) => print(&moves, &taken_back(&moves), output),
        Err(error) => Err(refused(admin, name.as_ref(), error).await),
    }
}

fn parts(name: Option<&Name>) -> (Option<&str>, Option<u32>) {
    (name.map(|name| name.topic.as_str()), name.and_then(|name| name.partition))
}

async fn elect(admin: &Admin, command: &Elect, output: Output) -> anyhow::Result<()> {
    let (topic, number) = (command.name.topic.as_str(), command.name.partition.expect("it was parsed so"));
    if !command.unclean {
        let election = match admin.elect_leader(topic, number).await {
            Ok(election) => election,
            Err(error) => return Err(refused(admin, Some(&command.name), error).await),
        };
        let verb = if election.changed { "leads" } else { "leads already:" };
        let said = format!("broker {} {verb} {topic}/{number} in epoch {}", election.leader, election.leader_epoch);
        return show(&elected(topic, number, &election), &said, output);
    }
    let would = match admin.unclean_election(topic, number).await {
        Ok(would) => would,
        Err(error) => return Err(refused(admin, Some(&command.name), error).await),
    };
    let prospect = prospect(topic, number, &would);
    if !command.yes {
        confirm(&prospect, &format!("elect broker {} all the same?", would.leader))?;
    }
    let done = match admin.elect_unclean(topic, number, &would).await {
        Ok(done) => done,
        Err(error) => return Err(refused(admin, Some(&command.name), error).await),
    };
    let election = Election { held: would.held, lost: would.lost, discard: would.discard, ..done };
    let said =
        format!("{prospect}\nbroker {} leads {topic}/{number} in epoch {}", election.leader, election.leader_epoch);
    show(&uncleanly(topic, number, &election), if command.yes { &said } else { last(&said) }, output)
}

/// Returns the last line. The prompt has already shown the lines before it.
fn last(text: &str) -> &str {
    text.lines().next_back().unwrap_or(text)
}

/// Prompts the user at the terminal. Fails without a terminal or without a yes.
fn confirm(prospect: &str, question: &str) -> anyhow::Result<()> {
    if !io::stdin().is_terminal() {
        bail!("{prospect}\nnothing was done: there is no terminal to ask at, so --yes must say that this is wanted");
    }
    eprint!("{prospect}\n{question} [y/N] ");
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { bail!("nothing was done") }
}

fn print(moves: &[Reassignment], lines: &str, output: Output) -> anyhow::Result<()> {
    show(&Value::Array(moves.iter().map(reassignment).collect()), lines, output)
}

fn show(value: &Value, lines: &str, output: Output) -> anyhow::Result<()> {
    match output {
        Output::Json => output::json(value)?,
        Output::Text => output::line(lines)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests;
