//! `strandline broker`: runs a broker from a configuration file; drains and restores a broker.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{anyhow, bail};
use clap::{Args, Subcommand};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    Common,
    cluster::hides_replicas,
    connect::{connect, explain_order},
    output::{self, Output},
    patience::Patience,
    serve::{Overrides, environment, serve},
    wait::{Left, Unsaid, Wait, took},
};
use crate::{
    client::{Admin, CallError, Drain},
    config::{Settings, Sources},
    model::BrokerId,
    task::clock,
};

/// Time after which a wait ends if no replica has been able to move.
const STANDSTILL_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum number of partitions that a message lists.
const MOST_NAMED: usize = 10;

/// Run a broker from a configuration file; drain a broker, or restore it
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, subcommand_value_name = "ORDER")]
pub(super) struct Broker {
    #[command(subcommand)]
    order: Option<Order>,
    /// The configuration file (TOML); `strandline config print` shows every setting
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    /// Where everything is kept: broker.data_dir
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where clients connect (gRPC): grpc.listen
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// The address that clients are told: grpc.advertise
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Where /metrics, /healthz and /readyz are: http.listen
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// The object store's URL: object_store.url
    #[arg(long, value_name = "URL")]
    object_store: Option<String>,
    #[command(flatten)]
    overrides: Overrides,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Order {
    /// Empty a broker: its leaderships and replicas move to others, and it is given nothing new
    ///
    /// Returns when that is written down, or, with --wait, when the broker is empty; `strandline cluster describe` shows how far it is. Exits
    /// with 1 if no replica can move: too few other brokers take replicas, a broker that their moves wait for is gone, or nobody leads their
    /// partitions. With --wait the command exits so when no replica has been able to move for a minute. The order stays either way.
    ///
    /// A broker that is gone for good may be named too: its replicas are then replaced at once, but not those of partitions that nobody leads:
    /// there is nobody to copy from, and `strandline partition elect --unclean` is the way out.
    Drain {
        /// The broker's number
        #[arg(value_name = "ID", value_parser = number)]
        id: u32,
        #[command(flatten)]
        wait: Wait,
        /// With --wait: wait on where nothing that is left can move, for brokers that take replicas
        #[arg(long, requires = "wait")]
        wait_for_brokers: bool,
    },
    /// Take a drain back: the broker is given leaderships and replicas again
    Restore {
        /// The broker's number
        #[arg(value_name = "ID", value_parser = number)]
        id: u32,
    },
}

/// Parses a broker id.
pub(super) fn number(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "not a broker's number, such as 2".to_owned())
}

impl Broker {
    fn settings(self) -> anyhow::Result<Settings> {
        let file = self.config.expect("clap asks for it where there is no order");
        let mut sources = Sources::new().read_file(&file)?.environment(environment());
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

pub(super) async fn run(common: &Common, command: Broker) -> anyhow::Result<ExitCode> {
    if let Some(order) = command.order {
        let client = connect(common).await?;
        let bar = match order {
            Order::Drain { wait, .. } => wait.bar(),
            Order::Restore { .. } => ProgressBar::hidden(),
        };
        let mut patience = Patience::new(&client);
        patience.beside(&bar);
        return patience.over(None, Box::pin(give(client.admin(), order, common.output, &bar))).await;
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

async fn give(admin: Admin, order: Order, output: Output, bar: &ProgressBar) -> anyhow::Result<ExitCode> {
    let (value, lines) = match order {
        Order::Drain { id, wait, wait_for_brokers } => {
            let drain = admin.drain_broker(BrokerId(id)).await.map_err(|error| explain_order(&error))?;
            // With `--wait` the command fails only after a minute, because a broker may be restarting.
            if drain.is_stuck() && !wait.is_wanted() {
                print(&drained(id, &drain), &said(id, &drain), output)?;
                bail!("{}", stuck(id));
            }
            match wait.is_wanted() {
                false => (drained(id, &drain), said(id, &drain)),
                true => until_empty(&admin, id, drain, output, (wait, wait_for_brokers), bar).await?,
            }
        }
        Order::Restore { id } => {
            let changed = admin.restore_broker(BrokerId(id)).await.map_err(|error| explain_order(&error))?;
            let said = match changed {
                true => format!("broker {id} is given leaderships and replicas again"),
                false => format!("broker {id} was not being drained; nothing changed"),
            };
            (json!({ "broker": id, "draining": false, "changed": changed }), said)
        }
    };
    print(&value, &lines, output)?;
    Ok(ExitCode::SUCCESS)
}

fn print(value: &Value, lines: &str, output: Output) -> anyhow::Result<()> {
    match output {
        Output::Json => output::json(value)?,
        Output::Text => output::line(lines)?,
    }
    Ok(())
}

/// Returns the error message for a drain in which none of the remaining replicas can move.
fn stuck(id: u32) -> String {
    format!(
        "no replica on broker {id} can move, because too few other brokers take replicas, a broker that a move waits for is gone, or nobody \
         leads their partitions: start another broker or the one that is gone, or lower the topics' replication factor; \
         `strandline topic describe` tells how a partition gets a leader; the order stays until `strandline broker restore {id}` takes it back"
    )
}

/// Time since which no replica of a drained broker can move. A restarting broker accepts no replicas for a moment, so
/// only a long standstill ends a wait.
#[derive(Debug, Default)]
struct Standstill {
    since: Option<Instant>,
}

impl Standstill {
    /// Returns true if no replica has been able to move for [`STANDSTILL_TIMEOUT`].
    fn is_over(&mut self, replicas: u32, stuck: u32, now: Instant) -> bool {
        if replicas == 0 || stuck < replicas {
            self.since = None;
            return false;
        }
        now.duration_since(*self.since.get_or_insert(now)) >= STANDSTILL_TIMEOUT
    }
}

/// Waits until the broker has no replicas, and returns the output as JSON and as text.
async fn until_empty(
    admin: &Admin,
    id: u32,
    drain: Drain,
    output: Output,
    (wait, wait_for_brokers): (Wait, bool),
    bar: &ProgressBar,
) -> anyhow::Result<(Value, String)> {
    if output == Output::Text {
        let said = said(id, &drain);
        bar.suspend(|| output::line(&said))?;
    }
    let mut standstill = Standstill::default();
    let time = wait.until_done(bar, "`strandline cluster describe`", async || {
        let unsaid = |error: CallError| Unsaid::new(error.retryable(), explain_order(&error));
        let cluster = admin.describe_cluster().await.map_err(unsaid)?;
        let broker = cluster.brokers.iter().find(|broker| broker.id == BrokerId(id));
        // A broker that the description no longer contains has no replicas.
        let Some(broker) = broker else { return Ok(Left::default()) };
        if broker.draining_since_ms.is_none() {
            let error = anyhow!("the drain of broker {id} was taken back while this waited for it");
            return Err(Unsaid::ForGood(error));
        }
        if let Some(key) = hides_replicas(&cluster).filter(|_| broker.replicas == 0) {
            let error = anyhow!(
                "broker {id} holds nothing, as far as values can be read; do not stop it for good before that of {key} is mended: \
                 `strandline cluster describe` says what is wrong with it"
            );
            return Err(Unsaid::ForGood(error));
        }
        if standstill.is_over(broker.replicas, broker.stuck, clock::monotonic()) && !wait_for_brokers {
            return Err(Unsaid::ForGood(anyhow!("{}", stuck(id))));
        }
        let said = format!("{} still on broker {id}", output::count(broker.replicas.into(), "replica"));
        let obstacle = (broker.stuck > 0).then(|| {
            format!(
                "{said}, of which {} cannot move, because too few other brokers take replicas, a broker that a move waits for is gone, or \
                 nobody leads their partitions",
                broker.stuck
            )
        });
        Ok(Left { count: broker.replicas.into(), said, obstacle })
    });
    let time = time.await?;
    let done = Drain { leaders: 0, replicas: 0, stuck: Vec::new(), leaderless: 0, ..drain };
    Ok((drained(id, &done), format!("broker {id} is empty after {}: it can be stopped for good", took(time))))
}

fn drained(id: u32, drain: &Drain) -> Value {
    let stuck = drain.stuck.iter().map(|(topic, partition)| json!({ "topic": topic, "partition": partition }));
    json!({
        "broker": id,
        "draining": true,
        "changed": drain.changed,
        "since_ms": drain.since_ms,
        "leaders": drain.leaders,
        "replicas": drain.replicas,
        "takers": drain.takers,
        "leaderless_replicas": drain.leaderless,
        "stuck_replicas": stuck.collect::<Vec<_>>(),
    })
}

fn said(id: u32, drain: &Drain) -> String {
    let now = if drain.changed { "is being drained" } else { "was being drained already" };
    let mut lines = match (drain.replicas, drain.leaders) {
        (0, _) => format!("broker {id} {now}; it holds nothing"),
        (replicas, leaders) => format!(
            "broker {id} {now}: {} to move, of which it leads {leaders}\n`strandline cluster describe` shows how far it is",
            output::count(replicas.into(), "replica"),
        ),
    };
    if !drain.stuck.is_empty() {
        let mut names: Vec<String> =
            drain.stuck.iter().take(MOST_NAMED).map(|(topic, number)| format!("{topic}/{number}")).collect();
        if drain.stuck.len() > MOST_NAMED {
            names.push("…".to_owned());
        }
        let takers = match drain.takers {
            0 => "no other broker takes any".to_owned(),
            few => format!("too few others take any ({few})"),
        };
        lines += &format!(
            "\nwarning: {} cannot move: {takers}, or one that a move needs is gone:\n  {}\nstart brokers, restore one, or lower the \
             topics' replication factor; it goes on by itself then",
            output::count(u64::try_from(drain.stuck.len()).unwrap_or(u64::MAX), "replica"),
            names.join(" "),
        );
    }
    if drain.leaderless > 0 {
        lines += &format!(
            "\nwarning: {} cannot move while nobody leads their partitions: `strandline topic describe` tells the way out",
            output::count(drain.leaderless.into(), "replica"),
        );
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(stuck: u32) -> Drain {
        Drain {
            changed: true,
            since_ms: 1_790_000_000_000,
            leaders: 3,
            replicas: 12,
            stuck: (0..stuck).map(|number| ("orders".to_owned(), number)).collect(),
            takers: 2,
            leaderless: 0,
        }
    }

    #[test]
    fn broker_id_must_be_a_number() {
        assert_eq!(number("12"), Ok(12));
        for wrong in ["x", "", "-1", "1.5"] {
            assert!(number(wrong).expect_err(wrong).contains("such as 2"), "{wrong}");
        }
    }

    /// The restart of another broker does not end a wait; a cluster that is too small does.
    #[test]
    fn wait_ends_when_no_replica_can_move_for_a_minute() {
        let (start, mut standstill) = (clock::monotonic(), Standstill::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!standstill.is_over(8, 8, at(0)) && !standstill.is_over(8, 8, at(59)));
        assert!(!standstill.is_over(8, 7, at(60)), "one moves");
        assert!(!standstill.is_over(7, 7, at(61)) && !standstill.is_over(7, 7, at(120)));
        assert!(standstill.is_over(7, 7, at(121)));
        assert!(!standstill.is_over(0, 0, at(122)), "it is empty");
    }

    #[test]
    fn drain_is_blocked_when_every_replica_is() {
        assert!(Drain { replicas: 2, ..drain(2) }.is_stuck());
        assert!(!Drain { replicas: 3, ..drain(2) }.is_stuck());
        assert!(!Drain { replicas: 0, ..drain(0) }.is_stuck(), "an empty one is done");
        assert!(Drain { replicas: 3, leaderless: 1, ..drain(2) }.is_stuck());
        assert!(!Drain { replicas: 3, leaderless: 3, ..drain(0) }.is_stuck(), "they may have a leader in a moment");
        assert!(stuck(3).contains("broker restore 3"));
    }

    #[test]
    fn drain_output_lists_moving_and_blocked_replicas() {
        output::golden::lines("broker-drain.txt", &said(2, &drain(0)));
        output::golden::json("broker-drain.json", &drained(2, &drain(2)));
        output::golden::lines("broker-drain-stuck.txt", &said(2, &drain(12)));
        let last = Drain { takers: 0, replicas: 1, changed: false, ..drain(1) };
        assert!(said(2, &last).contains("was being drained already: 1 replica"), "{}", said(2, &last));
        assert!(said(2, &last).contains("1 replica cannot move: no other broker takes any"));
        let unled = said(2, &Drain { leaderless: 2, ..drain(0) });
        assert!(unled.contains("warning: 2 replicas cannot move while nobody leads their partitions"), "{unled}");
        assert_eq!(said(2, &Drain { replicas: 0, ..drain(0) }), "broker 2 is being drained; it holds nothing");
    }
}
