//! The command line: one file per command.
//!
//! Exit codes: 0 success, 1 failure, 2 wrong usage. Results go to standard output, everything else to standard error. A
//! closed output pipe ends a command with exit code 0 and no message. Progress is drawn only on a terminal, and never
//! with `NO_COLOR`.

mod bench;
mod broker;
mod cluster;
mod config;
mod connect;
mod consume;
mod dev;
mod doctor;
mod format;
mod health;
mod idle;
mod line_reader;
mod output;
mod partition;
mod produce;
mod rack;
mod retry_output;
mod segment;
mod separator;
mod serve;
mod start_position;
mod topic;
mod wait;

use std::{io, process::ExitCode};

use clap::{CommandFactory as _, Parser, Subcommand};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use self::output::OutputFormat;
use crate::config::ConfigSources;

/// A log service: milliseconds on local disk, history in object storage.
#[derive(Debug, Parser)]
#[command(name = "strandline", version, max_term_width = 100, arg_required_else_help = true)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

/// Default bootstrap address of all commands, and default client address of `strandline dev`.
const DEFAULT_BOOTSTRAP: &str = "127.0.0.1:9460";

/// Environment variable with the bootstrap addresses. The option has precedence.
const BOOTSTRAP_VARIABLE: &str = "STRANDLINE_BOOTSTRAP";

/// Help heading of the options that all commands share. The heading comes after a command's own options.
const COMMON: &str = "Common options";

/// Options that every command accepts. They matter to commands that connect to a cluster or print a result.
#[derive(Clone, Debug, clap::Args)]
struct CommonArgs {
    /// Broker addresses for the first connection; default: STRANDLINE_BOOTSTRAP of the environment, else
    /// 127.0.0.1:9460
    // `bootstrap()` reads the variable itself. If clap read it, clap's usage lines would show --bootstrap as a required
    // option whenever the variable is set.
    #[arg(long, global = true, value_name = "ADDR[,ADDR]", help_heading = COMMON)]
    bootstrap: Option<String>,
    /// Output format of results
    #[arg(long, global = true, value_enum, default_value_t = OutputFormat::Text, help_heading = COMMON)]
    output: OutputFormat,
}

impl CommonArgs {
    /// Returns the bootstrap addresses: those of the option, else of the variable. An empty option or variable selects
    /// the default.
    fn bootstrap(&self) -> String {
        let addresses = self.bootstrap.clone().or_else(|| std::env::var(BOOTSTRAP_VARIABLE).ok());
        addresses.filter(|addresses| !addresses.is_empty()).unwrap_or_else(|| DEFAULT_BOOTSTRAP.to_owned())
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Dev(dev::DevArgs),
    Broker(Box<broker::BrokerArgs>),
    /// Show the cluster's brokers, load and health; raise its generation
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Create, list, describe, alter and delete topics; add partitions
    #[command(subcommand)]
    Topic(topic::TopicCommand),
    /// Reassign replicas, elect leaders, rebuild manifests
    #[command(subcommand)]
    Partition(partition::PartitionCommand),
    Produce(produce::ProduceArgs),
    Consume(consume::ConsumeArgs),
    /// Measure a cluster from the client's side
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Inspect segment files
    #[command(subcommand)]
    Segment(segment::SegmentCommand),
    Doctor(doctor::DoctorArgs),
    /// Show the configuration
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

impl Args {
    /// Rejects combinations of arguments that clap accepts and the command does not support.
    fn check(&self) -> Result<(), clap::Error> {
        let conflict = match &self.command {
            Command::Partition(command) => command.conflicting_arguments(),
            _ => None,
        };
        conflict.map_or(Ok(()), |reason| Err(Self::command().error(clap::error::ErrorKind::ArgumentConflict, reason)))
    }
}

/// Runs the program on the process's arguments.
pub fn main() -> ExitCode {
    let arguments = Args::parse();
    if let Err(error) = arguments.check() {
        error.exit();
    }
    raise_open_file_limit();
    match check_environment().and_then(|()| run(arguments)) {
        Ok(code) => code,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", format_error(&error));
            ExitCode::FAILURE
        }
    }
}

/// Rejects `STRANDLINE_` variables that no code reads or whose value is not UTF-8. A command that ignored
/// `STRANDLINE_BOOTSTRP` would use another cluster than the user meant.
fn check_environment() -> anyhow::Result<()> {
    for (name, value) in std::env::vars_os() {
        let name = name.to_string_lossy();
        anyhow::ensure!(
            !name.starts_with("STRANDLINE_") || value.to_str().is_some(),
            "the value of {name} is not valid UTF-8: {value:?}; set another value, or unset the variable"
        );
    }
    Ok(ConfigSources::check_names(serve::environment())?)
}

/// Raises the soft limit of open files to the hard limit. With the common soft limit of 1024, a thousand clients use
/// all file descriptors, and none is left for the broker's own files.
fn raise_open_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        // If the system refuses, the old limit stays.
        let _raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    }
}

/// Runs the command, and returns the exit code of the process. An error means exit code 1.
fn run(arguments: Args) -> anyhow::Result<ExitCode> {
    let common = arguments.common;
    match arguments.command {
        Command::Dev(command) => block_on(dev::run(command)),
        Command::Broker(command) => block_on(broker::run(&common, *command)),
        Command::Cluster(command) => block_on(cluster::run(&common, command)),
        Command::Doctor(command) => block_on(doctor::run(&common, command)),
        Command::Topic(command) => block_on(topic::run(&common, command)),
        Command::Partition(command) => block_on(partition::run(&common, command)),
        Command::Produce(command) => block_on(produce::run(&common, command)),
        Command::Consume(command) => block_on(consume::run(&common, command)),
        Command::Bench(command) => block_on(bench::run(&common, command)),
        Command::Segment(command) => segment::run(&common, command),
        Command::Config(command) => config::run(&common, command),
        Command::Completions { shell } => {
            // The script is built in memory, because the generator panics if its writer fails.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "strandline", &mut script);
            io::Write::write_all(&mut io::stdout().lock(), &script)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Runs a command's future. The future is boxed, so that the largest command does not set the stack size of every
/// command.
fn block_on<F: Future<Output = anyhow::Result<ExitCode>>>(command: F) -> anyhow::Result<ExitCode> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.enable_all().on_thread_park(idle::release_free_memory).build()?;
    let result = runtime.block_on(Box::pin(command));
    // A read of standard input cannot be interrupted, so the shutdown does not wait for it.
    runtime.shutdown_background();
    result
}

/// Formats an error with its causes. A cause that the text already contains is not repeated.
fn format_error(error: &anyhow::Error) -> String {
    error
        .chain()
        .skip(1)
        .map(ToString::to_string)
        .fold(error.to_string(), |text, cause| if text.contains(&cause) { text } else { format!("{text}: {cause}") })
}

/// Returns true if the cause of an error is a closed pipe, such as the standard output.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let mut chain = error.chain();
    chain.any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|io| io.kind() == io::ErrorKind::BrokenPipe))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn error_text_contains_each_cause_once() {
        let cause = || io::Error::other("no such device");
        let repeated = anyhow::Error::from(cause()).context("f cannot be read: no such device");
        assert_eq!(format_error(&repeated), "f cannot be read: no such device");
        let separate = anyhow::Error::from(cause()).context("f cannot be read");
        assert_eq!(format_error(&separate), "f cannot be read: no such device");
    }

    #[test]
    fn documented_command_lines_are_parsed() {
        for line in [
            "topic create t --partitions 3 --replication-factor 1 --config a=b --config c=d",
            "topic list --output json",
            "topic describe t",
            "topic alter t --config retention.ms=1",
            "topic alter t --replication-factor 3",
            "cluster describe --output json",
            "broker drain 2",
            "broker undrain 2 --output json",
            "partition reassign t/0 --replicas 1,2,3",
            "partition reassign t --replicas 1,2,3 --output json",
            "partition reassign status",
            "partition reassign status t/3",
            "partition reassign t/3 status",
            "partition reassign cancel t",
            "partition reassign t cancel",
            "partition reassign cancel --all",
            "partition status t",
            "partition cancel t/1",
            "partition elect t/0",
            "partition elect t/0 --unclean --yes",
            "topic add-partitions t --partitions 4",
            "topic delete t",
            "topic delete t --yes",
            "topic delete t --dry-run --output json",
            "produce t --key-separator : --partition 2 --acks tiered --compression zstd a b",
            "consume t --partition 0 --partition 1 --from @2026-01-01T00:00:00Z --until-end --max-records 3 --format json",
            "consume t --rack zone-a",
            "segment dump f --records",
            "config print",
            "bench produce --topic t --records 10 --record-size 100 --partitions-used 2 --rate 1.5 --acks all \
             --batch-size 65536 --linger-ms 1 --in-flight 5 --producers 2 --output json",
            "bench produce --topic t --seconds 3 --with-disk --disk-dir /tmp",
            "bench consume --topic t --from earliest --records 10 --consumers 2 --output json",
            "bench consume --topic t --rack zone-a",
            "bench latency --topic t --rate 1 --seconds 2 --output json",
            "--bootstrap a:1,b:2 topic list",
            "completions bash",
            "dev --data-dir d --listen 127.0.0.1:1 --http 127.0.0.1:2",
            "dev --brokers 3",
            "dev --brokers 3 --etcd http://127.0.0.1:2379",
            "broker --config f",
            "doctor --object-store s3://b/p --endpoint http://127.0.0.1:9000 --region r --path-style",
        ] {
            let words = std::iter::once("strandline").chain(line.split_whitespace());
            Args::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn long_help_describes_command_behaviour() {
        let seconds = format!("within {} seconds", connect::METADATA_REFRESH_INTERVAL.as_secs());
        for (name, expected) in [
            ("produce", "only if every record was acknowledged"),
            ("produce", seconds.as_str()),
            ("consume", seconds.as_str()),
            ("consume", "STRANDLINE_RACK"),
            ("doctor", "Credentials come from the usual environment"),
        ] {
            let mut root = Args::command();
            let help = root.find_subcommand_mut(name).expect(name).render_long_help().to_string();
            let words: Vec<&str> = help.split_whitespace().collect();
            assert!(words.join(" ").contains(expected), "{name}: {help}");
        }
    }

    #[test]
    fn empty_bootstrap_selects_the_default() {
        let parsed = |value: &str| Args::try_parse_from(["strandline", "--bootstrap", value, "topic", "list"]);
        assert_eq!(parsed("").expect("valid").common.bootstrap(), DEFAULT_BOOTSTRAP);
        assert_eq!(parsed("a:1").expect("valid").common.bootstrap(), "a:1");
    }

    #[test]
    fn wrong_usage_exits_with_code_2() {
        for line in [
            "topic create",
            "broker",
            "broker drain",
            "broker drain two",
            "broker drain 1 --config f",
            "cluster",
            "partition reassign t",
            "partition reassign --replicas 1,2",
            "partition reassign t/x --replicas 1,2",
            "partition reassign t/-1 --replicas 1,2",
            "partition reassign t --replicas 1,x",
            "partition reassign cancel",
            "partition reassign t cancel --all",
            "partition cancel",
            "partition reassign t status u",
            "partition reassign t --replicas 1 status",
            "partition reassign t --wait cancel",
            "partition elect t",
            "partition elect t/0 --yes",
            "topic alter t",
            "topic delete t --dry-run --yes",
            "topic alter t --replication-factor 0",
            "dev --brokers 0",
            "doctor",
            "topic create t --config nothing",
            "produce t --acks 2",
            "produce t --compression brotli",
            "consume t --from yesterday",
            "consume t --format xml",
            "bench produce --topic t --records 1 --seconds 1",
            "bench produce --topic t --in-flight 65",
            "bench produce --topic t --rate 0",
            "bench produce --topic t --batch-size 0",
            "bench produce --topic t --batch-size 999999999",
            "consume t --from @1767225600",
            "consume t --timeout 0",
            "broker drain 1 --timeout 5",
            "partition reassign t --replicas 1 --wait --timeout 0",
            "produce t --timeout 0",
        ] {
            let words = std::iter::once("strandline").chain(line.split_whitespace());
            let error = Args::try_parse_from(words).and_then(|parsed| parsed.check()).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn name_may_precede_or_follow_reassign_subcommand() {
        for line in [
            "partition reassign t status",
            "partition reassign status t",
            "partition reassign t/0 cancel t/0",
            "partition reassign cancel --all",
            "partition status",
            "partition cancel t",
        ] {
            let words = std::iter::once("strandline").chain(line.split_whitespace());
            let parsed = Args::try_parse_from(words).and_then(|parsed| parsed.check());
            assert!(parsed.is_ok(), "{line}: {parsed:?}");
        }
    }

    #[test]
    fn low_soft_limit_of_open_files_is_raised() {
        let limit = getrlimit(Resource::Nofile);
        let low = limit.maximum.map(|max| max - 1);
        setrlimit(Resource::Nofile, Rlimit { current: low, ..limit }).expect("lower is allowed");
        raise_open_file_limit();
        assert_eq!(getrlimit(Resource::Nofile).current, limit.maximum);
    }
}
