//! `strandline config`: the configuration that a broker started here would use.

use std::{path::PathBuf, process::ExitCode};

use clap::Subcommand;

use super::{
    CommonArgs,
    output::{self, OutputFormat},
    serve::environment,
};
use crate::config::{ConfigSources, docs};

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Print every setting with its value and source, as a configuration file; with --output json, only the values,
    /// without unset settings
    Print {
        /// Configuration file
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Print docs/configuration.md
        #[arg(long, hide = true)]
        docs: bool,
    },
}

pub(super) fn run(common: &CommonArgs, command: ConfigCommand) -> anyhow::Result<ExitCode> {
    let ConfigCommand::Print { config, docs: as_docs } = command;
    if as_docs {
        output::line(docs().trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    let sources = match config {
        Some(path) => ConfigSources::new().read_file(&path)?,
        None => ConfigSources::new(),
    };
    let printed = sources.environment(environment()).load()?.print();
    match common.output {
        OutputFormat::Text => output::line(printed.trim_end())?,
        OutputFormat::Json => output::json(&json(&printed)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the values of a configuration file as JSON, by section and key.
fn json(file: &str) -> anyhow::Result<serde_json::Value> {
    let table: toml::Table = file.parse()?;
    Ok(serde_json::to_value(table)?)
}
