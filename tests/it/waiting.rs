//! Commands that wait for a broker or for records: their output during the wait, the end of the wait, and the
//! continuation after it.

use rustix::process::Signal;

use crate::{
    broker::{BrokerInstance, free_address},
    running::Running,
    test_timeout::eventually,
};

/// Regression, found by a user: if the leader's address was unreachable, `produce` printed nothing for two minutes.
#[test]
fn unreachable_leader_is_reported_until_the_timeout() {
    let closed_port = free_address();
    let mut instance = BrokerInstance::new().advertise(closed_port);
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "t"]);
    for command in [&["produce", "t", "--timeout", "3"][..], &["produce", "t", "--timeout", "3", "--output", "json"]] {
        let output = cli.run_with(command, b"x\n");
        assert_eq!(output.code, 1, "{output:?}");
        let line = output.stderr.lines().find(|line| line.starts_with("still trying")).unwrap_or_default();
        assert!(line.contains(&closed_port.to_string()) && line.contains("giving up in 2 s"), "{output:?}");
        assert!(output.stderr.contains("error: t/0: not acknowledged"), "{output:?}");
    }
    let output = cli.run(&["consume", "t", "--until-end", "--timeout", "3"]);
    let expected =
        format!("error: timed out after 3 s without a record: the leader of t/0, {closed_port}: connection refused");
    assert!(output.code == 1 && output.stderr.contains(&expected), "{output:?}");
}

/// Regression, found by a user: after the broker was killed, `consume` printed no warning, as if the topic were idle.
#[test]
fn consumer_reports_a_killed_broker_and_resumes() {
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "t"]);
    cli.ok_with(&["produce", "t"], b"before\n");
    let reader = Running::start(&cli, &["consume", "t"]);
    reader.wait_for_output(&reader.stdout, "before\n");
    broker.kill9();
    reader.wait_for_output(&reader.stderr, &format!("still trying: t/0: {}", instance.grpc()));
    reader.wait_for_output(&reader.stderr, "stop with Ctrl-C");
    let _broker = instance.start();
    reader.wait_for_output(&reader.stderr, "working again after");
    cli.ok_with(&["produce", "t"], b"after\n");
    reader.wait_for_output(&reader.stdout, "after\n");
    assert_eq!(reader.stop(Signal::TERM), (Some(0), "before\nafter\n".to_owned()), "each once");
}

#[test]
fn consumer_and_producer_use_added_partitions() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "t"]);
    let reader = Running::start(&cli, &["consume", "t"]);
    let mut writer = Running::start(&cli, &["produce", "t"]);
    writer.feed(b"one\n");
    reader.wait_for_output(&reader.stdout, "one\n");
    cli.ok(&["topic", "add-partitions", "t", "--partitions", "2"]);
    cli.ok_with(&["produce", "t", "--partition", "1"], b"two\n");
    reader.wait_for_output(&reader.stdout, "two\n");
    // Each batch of records without a key may go to another partition, so one of them reaches the new partition.
    let log_end =
        || cli.ok(&["topic", "describe", "t", "--output", "json"]).json()["partitions"][1]["log_end"].as_i64();
    eventually("the producer writes to the new partition", || {
        writer.feed(&b"x\n".repeat(100_000));
        (log_end() > Some(1)).then_some(())
    });
    assert_eq!(reader.stop(Signal::INT).0, Some(0));
}

#[test]
fn producer_ends_at_either_signal_with_its_summary() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    for (topic, signal) in [("int", Signal::INT), ("term", Signal::TERM)] {
        cli.ok(&["topic", "create", topic]);
        let mut writer = Running::start(&cli, &["produce", topic]);
        writer.feed(b"a\nb\n");
        let end = || {
            cli.ok(&["topic", "describe", topic, "--output", "json"]).json()["partitions"][0]["high_watermark"].as_i64()
        };
        eventually("both records are stored", || (end() == Some(2)).then_some(()));
        let (code, output) = writer.stop(signal);
        assert_eq!(code, Some(1), "the command was interrupted");
        assert!(output.contains("acknowledged 2 of 2 records") && output.contains("offsets 0..2"), "{output}");
    }
}

/// Regression, found by a user: if the first bootstrap address was the HTTP port of a broker, the second address was
/// not used.
#[test]
fn invalid_bootstrap_address_does_not_hide_the_next() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    let (grpc, http) = (instance.grpc().to_string(), instance.http().to_string());
    cli.ok(&["topic", "list", "--bootstrap", &format!("{http},{grpc}")]);
    let output = cli.run(&["topic", "list", "--bootstrap", &http]);
    assert!(output.code == 1 && output.stderr.contains(&http), "the error contains the address: {output:?}");
}
