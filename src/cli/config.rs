//! `strandline config`: the configuration that a broker started here would use.

use std::{path::PathBuf, process::ExitCode};

use clap::Subcommand;

use super::{
    Common,
    output::{self, Output},
    serve::environment,
};
use crate::config::{Sources, docs};

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Print every setting with its value and where it comes from, as a configuration file; with --output json, the values
    /// of those that are set
    Print {
        /// The configuration file
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Print docs/configuration.md
        #[arg(long, hide = true)]
        docs: bool,
    },
}

pub(super) fn run(common: &Common, command: ConfigCommand) -> anyhow::Result<ExitCode> {
    let ConfigCommand::Print { config, docs: as_docs } = command;
    if as_docs {
        output::line(docs().trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    let sources = match config {
        Some(path) => Sources::new().read_file(&path)?,
        None => Sources::new(),
    };
    let printed = sources.environment(environment()).load()?.print();
    match common.output {
        Output::Text => output::line(printed.trim_end())?,
        Output::Json => output::json(&json(&printed)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the values of a configuration file as JSON, by section and key.
fn json(file: &str) -> anyhow::Result<serde_json::Value> {
    let table: toml::Table = file.parse()?;
    Ok(serde_json::to_value(table)?)
}
