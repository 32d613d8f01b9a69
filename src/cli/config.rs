//! `strandline config`: what a broker started here would use.

use std::{path::PathBuf, process::ExitCode};

use clap::Subcommand;

use super::{output, serve::environment};
use crate::config::{Sources, docs};

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Print every setting with its value and where it comes from, as a configuration file
    Print {
        /// The configuration file
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Print docs/configuration.md
        #[arg(long, hide = true)]
        docs: bool,
    },
}

pub(super) fn run(command: ConfigCommand) -> anyhow::Result<ExitCode> {
    let ConfigCommand::Print { config, docs: as_docs } = command;
    if as_docs {
        output::line(docs().trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    let sources = match config {
        Some(path) => Sources::new().read_file(&path)?,
        None => Sources::new(),
    };
    output::line(sources.environment(environment()).load()?.print().trim_end())?;
    Ok(ExitCode::SUCCESS)
}
