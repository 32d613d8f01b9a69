//! `strandline doctor`: checks whether an object store, with these credentials, supports everything that a broker
//! needs.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{
    Common,
    output::{self, Output},
};
use crate::tier::{
    StoreOptions,
    doctor::{Check, Outcome, examine},
};

/// Try whether an object store can do what a broker needs
///
/// It tries everything that a broker does with a bucket, on objects in a folder of their own that is deleted at the end.
/// Credentials come from the usual environment. Exits 1 when something that a broker needs does not work.
#[derive(Debug, Args)]
pub(super) struct Doctor {
    /// The object store: s3://bucket/prefix, gs://…, az://…, file:///dir or memory://
    #[arg(long, value_name = "URL", env = "STRANDLINE_OBJECT_STORE_URL")]
    object_store: String,
    /// Where the S3 service answers, if not at Amazon
    #[arg(long, value_name = "URL", env = "STRANDLINE_OBJECT_STORE_ENDPOINT")]
    endpoint: Option<String>,
    /// The S3 region; AWS_REGION, or us-east-1, if left out
    #[arg(long, value_name = "REGION", env = "STRANDLINE_OBJECT_STORE_REGION")]
    region: Option<String>,
    /// Whether the bucket's name is put into the path instead of the host's name; yes where an endpoint is named, if left out
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

pub(super) async fn run(common: &Common, command: Doctor) -> anyhow::Result<ExitCode> {
    let options = StoreOptions {
        endpoint: command.endpoint,
        region: command.region,
        path_style: command.path_style,
        ..StoreOptions::new(&command.object_store)
    };
    let place = match &options.endpoint {
        Some(endpoint) => format!("{} at {endpoint}", options.url),
        None => options.url.clone(),
    };
    let bar = output::progress(None, "{spinner} {elapsed} trying the object store");
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    let checks = Box::pin(examine(&options)).await;
    bar.finish_and_clear();
    let checks = checks?;
    print(&command.object_store, &place, &checks, common.output)?;
    Ok(if fit(&checks) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns true if a broker can use the object store: no check failed.
fn fit(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.outcome != Outcome::Fail)
}

fn print(url: &str, place: &str, checks: &[Check], output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        return Ok(output::json(&json!({ "object_store": url, "fit": fit(checks), "checks": checks }))?);
    }
    let row = |check: &Check| vec![check.name.to_owned(), word(check.outcome).to_owned(), check.detail.clone()];
    output::table(&["CHECK", "RESULT", "SEEN"], &[], checks.iter().map(row).collect())?;
    output::line("")?;
    for check in checks.iter().filter(|check| matches!(check.outcome, Outcome::Fail | Outcome::Unsupported)) {
        output::line(&format!("{} {}: {}", check.name, word(check.outcome), check.meaning))?;
    }
    let verdict = if fit(checks) { "a broker can work with it" } else { "a broker cannot work with it" };
    Ok(output::line(&format!("{place}: {verdict}"))?)
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Pass => "passed",
        Outcome::Fail => "FAILED",
        Outcome::Unsupported => "unsupported",
        Outcome::Untried => "not tried",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failed_check_makes_an_object_store_unfit() {
        let check = |outcome| Check { name: "n", outcome, detail: String::new(), meaning: "m" };
        assert!(fit(&[check(Outcome::Pass), check(Outcome::Unsupported)]));
        assert!(!fit(&[check(Outcome::Fail), check(Outcome::Untried)]));
        assert!(!fit(&[check(Outcome::Pass), check(Outcome::Fail)]));
    }
}
