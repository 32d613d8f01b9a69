//! `strandline doctor`: checks whether an object store, with these credentials, supports everything that a broker
//! needs.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{
    CommonArgs,
    output::{self, OutputFormat},
};
use crate::tier::{
    ObjectStoreOptions,
    doctor::{CheckOutcome, StoreCheck, examine},
};

/// Check whether an object store supports everything that a broker needs
///
/// Runs every operation that a broker uses, on objects in a separate folder that is deleted at the end. Credentials
/// come from the usual environment. Exits with code 1 if a required operation fails.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Object store URL: s3://bucket/prefix, gs://…, az://…, file:///dir or memory://
    #[arg(long, value_name = "URL", env = "STRANDLINE_OBJECT_STORE_URL")]
    object_store: String,
    /// URL of an S3-compatible server; default: AWS_ENDPOINT_URL_S3, else AWS_ENDPOINT_URL, else Amazon S3
    #[arg(long, value_name = "URL", env = "STRANDLINE_OBJECT_STORE_ENDPOINT")]
    endpoint: Option<String>,
    /// S3 region; default: that of AWS's usual sources, such as AWS_REGION, else us-east-1
    #[arg(long, value_name = "REGION", env = "STRANDLINE_OBJECT_STORE_REGION")]
    region: Option<String>,
    /// Put the bucket name into the URL's path instead of the host name; default: true with an endpoint; always true if
    /// the endpoint is an IP address
    #[arg(
        long,
        value_name = "true|false",
        env = "STRANDLINE_OBJECT_STORE_PATH_STYLE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    path_style: Option<bool>,
}

/// Runs the checks and prints their results. The exit code is 1 if a broker cannot use the object store.
pub(super) async fn run(common: &CommonArgs, command: DoctorArgs) -> anyhow::Result<ExitCode> {
    let options = ObjectStoreOptions {
        endpoint: command.endpoint,
        region: command.region,
        path_style: command.path_style,
        ..ObjectStoreOptions::new(&command.object_store)
    };
    let location = match &options.endpoint {
        Some(endpoint) => format!("{} at {endpoint}", options.url),
        None => options.url.clone(),
    };
    let bar = output::progress(None, "{spinner} {elapsed} checking the object store");
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    let checks = Box::pin(examine(&options)).await;
    bar.finish_and_clear();
    let checks = checks?;
    print(&command.object_store, &location, &checks, common.output)?;
    Ok(if is_usable(&checks) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns true if a broker can use the object store: no check failed.
fn is_usable(checks: &[StoreCheck]) -> bool {
    checks.iter().all(|check| check.outcome != CheckOutcome::Fail)
}

/// Prints a table of the checks, the consequences of failed and unsupported checks, and a verdict.
fn print(url: &str, location: &str, checks: &[StoreCheck], output: OutputFormat) -> anyhow::Result<()> {
    if output == OutputFormat::Json {
        return Ok(output::json(&json!({ "object_store": url, "fit": is_usable(checks), "checks": checks }))?);
    }
    let row =
        |check: &StoreCheck| vec![check.name.to_owned(), outcome_text(check.outcome).to_owned(), check.detail.clone()];
    output::table(&["CHECK", "RESULT", "DETAIL"], &[], checks.iter().map(row).collect())?;
    output::line("")?;
    for check in checks.iter().filter(|check| matches!(check.outcome, CheckOutcome::Fail | CheckOutcome::Unsupported)) {
        output::line(&format!("{} {}: {}", check.name, outcome_text(check.outcome), check.meaning))?;
    }
    let verdict =
        if is_usable(checks) { "a broker can use this object store" } else { "a broker cannot use this object store" };
    Ok(output::line(&format!("{location}: {verdict}"))?)
}

fn outcome_text(outcome: CheckOutcome) -> &'static str {
    match outcome {
        CheckOutcome::Pass => "passed",
        CheckOutcome::Fail => "FAILED",
        CheckOutcome::Unsupported => "unsupported",
        CheckOutcome::Skipped => "skipped",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failed_check_makes_an_object_store_unusable() {
        let check = |outcome| StoreCheck { name: "n", outcome, detail: String::new(), meaning: "m" };
        assert!(is_usable(&[check(CheckOutcome::Pass), check(CheckOutcome::Unsupported)]));
        assert!(!is_usable(&[check(CheckOutcome::Fail), check(CheckOutcome::Skipped)]));
        assert!(!is_usable(&[check(CheckOutcome::Pass), check(CheckOutcome::Fail)]));
    }
}
