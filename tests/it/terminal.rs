//! The command line at a terminal, which the program `script` simulates.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use crate::{
    broker::{BrokerInstance, Cli},
    skipped::report_skipped,
};

/// Runs a command at a terminal with `typed` as the typed input. Returns true if the command succeeded, and the
/// terminal output. Returns `None` if the program `script` is not installed.
fn run_at_terminal(instance: &BrokerInstance, cli: &Cli, arguments: &str, typed: &str) -> Option<(bool, String)> {
    let program = cli.command(&[]).get_program().to_owned();
    let mut command = Command::new("script");
    let line = format!("{} --bootstrap {} {arguments}", program.display(), instance.grpc());
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.args(["-qec", &line, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().ok()?;
    child.stdin.take().expect("piped").write_all(typed.as_bytes()).expect("the command reads its input");
    let output = child.wait_with_output().expect("the process exits");
    Some((output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned()))
}

#[test]
fn topic_deletion_asks_for_the_name_at_a_terminal() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "orders"]);
    let typed = |response| run_at_terminal(&instance, &cli, "topic delete orders", response);
    let Some((is_success, output)) = typed("order\n") else {
        return report_skipped("a question at a terminal", "no `script` in PATH");
    };
    assert!(!is_success && output.contains("Type its name:") && output.contains("nothing was deleted"), "{output}");
    cli.ok(&["topic", "describe", "orders"]);
    let (is_success, output) = typed("orders\n").expect("the terminal is available");
    assert!(is_success && output.contains("deleted topic orders"), "{output}");
}

/// Regression: control characters in a record cleared the screen of a user who consumed the record.
#[test]
fn records_are_printed_with_escapes_only_at_a_terminal() {
    const RECORD: &str = "a\x1b[2Jb\u{202e}c\n";
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "orders"]);
    cli.ok_with(&["produce", "orders"], RECORD.as_bytes());
    let consume = "consume orders --from earliest --until-end";
    for (format, expected) in [("value", "a\\x1b[2Jb\\u{202e}c"), ("json", "a\\u001b[2Jb\\u202ec")] {
        let arguments = format!("{consume} --format {format}");
        let Some((is_success, output)) = run_at_terminal(&instance, &cli, &arguments, "") else {
            return report_skipped("records at a terminal", "no `script` in PATH");
        };
        assert!(is_success && output.contains(expected), "{output:?}");
    }
    let elsewhere = cli.ok(&["consume", "orders", "--from", "earliest", "--until-end"]);
    assert_eq!(elsewhere.stdout, RECORD.as_bytes());
}
