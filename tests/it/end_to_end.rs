//! The commands of the binary as a user runs them: a real log file, old records in the object store, a restart, and
//! errors.

use std::{fs, path::PathBuf, process::Stdio};

use serde_json::Value;

use crate::{
    broker::{BrokerInstance, Cli, Output},
    test_timeout::eventually,
};

/// Returns at least 30,000 lines of text, from log files of this machine as far as there are any.
fn real_text() -> Vec<u8> {
    const WANTED: usize = 30_000;
    let candidates = [
        "/var/log/dpkg.log",
        "/var/log/apt/term.log",
        "/var/log/apt/history.log",
        "/var/log/syslog",
        "/var/lib/dpkg/status",
        "/usr/share/dict/words",
    ];
    let lines = |text: &[u8]| text.iter().filter(|byte| **byte == b'\n').count();
    let mut text = Vec::new();
    for path in candidates.map(PathBuf::from) {
        if lines(&text) < WANTED {
            text.extend(fs::read(path).unwrap_or_default());
        }
    }
    // Missing lines are generated, in the form of a package manager's log.
    for n in lines(&text)..WANTED {
        let (hour, minute, second) = (n / 3600 % 24, n / 60 % 60, n % 60);
        let line = format!(
            "2026-11-01 {hour:02}:{minute:02}:{second:02} status installed lib{}:amd64 {n}.{}\n",
            n % 977,
            n % 13
        );
        text.extend(line.bytes());
    }
    if text.last() != Some(&b'\n') {
        text.push(b'\n');
    }
    text
}

/// Returns the first partition of a topic, as reported by `topic describe`.
fn partition(cli: &Cli, topic: &str) -> Value {
    cli.ok(&["topic", "describe", topic, "--output", "json"]).json()["partitions"][0].clone()
}

fn number(value: &Value, name: &str) -> i64 {
    value[name].as_i64().unwrap_or_else(|| panic!("{name} is a number in {value}"))
}

/// The main use case: produce, upload, evict, restart, consume. Every byte is unchanged.
#[test]
fn real_log_is_read_unchanged_from_object_store() {
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    let cli = instance.cli();
    let text = real_text();
    let count = i64::try_from(text.iter().filter(|byte| **byte == b'\n').count()).expect("a count");
    let file = instance.path().join("real.log");
    fs::write(&file, &text).expect("written");
    let create = ["topic", "create", "history", "--partitions", "1", "--config", "segment.bytes=131072"];
    let evict = ["--config", "segment.ms=200", "--config", "local.retention.bytes=0", "--config", "retention.ms=-1"];
    cli.ok(&[&create[..], &evict[..]].concat());
    let output = cli.ok(&["produce", "history", "--compression", "none", file.to_str().expect("the path is UTF-8")]);
    let output = format!("{}{}", output.text(), output.stderr);
    assert!(output.contains(&count.to_string()), "the output contains the count {count}: {output}");

    let state = eventually("all records are in the object store and evicted", || {
        let state = partition(&cli, "history");
        let evicted = number(&state, "tiered_end") == count && number(&state, "local_start") > count / 2;
        evicted.then_some(state)
    });
    assert_eq!((number(&state, "log_start"), number(&state, "high_watermark")), (0, count));
    let status = broker.terminate();
    assert!(status.success(), "the requested stop exited with {status}\n{}", instance.log());

    let broker = instance.start();
    let cli = instance.cli();
    let read = cli.ok(&["consume", "history", "--from", "earliest", "--until-end"]);
    let differs = read.stdout.iter().zip(&text).position(|(read, written)| read != written);
    assert_eq!((read.stdout.len(), differs), (text.len(), None), "byte for byte");
    // After the read, the broker accepts records.
    cli.ok_with(&["produce", "history"], b"one more\n");
    let last = cli.ok(&["consume", "history", "--from", &count.to_string(), "--until-end"]);
    assert_eq!(last.text(), "one more\n");
    assert!(broker.terminate().success(), "{}", instance.log());
}

/// Runs `strandline dev`, the first command of the README, with another data directory and other ports.
#[test]
fn dev_prints_its_addresses_and_keeps_data() {
    let instance = BrokerInstance::new();
    let broker = instance.start_dev();
    // The broker is ready a moment before the greeting is complete.
    let greeting = eventually("the greeting is complete", || {
        let log = instance.log();
        log.contains("the data is kept").then_some(log)
    });
    for expected in
        [instance.grpc().to_string(), instance.http().to_string(), instance.data_dir().display().to_string()]
    {
        assert!(greeting.contains(&expected), "the greeting contains {expected}: {greeting}");
    }
    assert!(greeting.contains("strandline produce"), "the greeting contains the next command: {greeting}");
    let cli = instance.cli();
    cli.ok(&["topic", "create", "hello"]);
    cli.ok_with(&["produce", "hello"], b"world\n");
    assert!(broker.terminate().success(), "{}", instance.log());
    let broker = instance.start_dev();
    assert_eq!(cli.ok(&["consume", "hello", "--from", "earliest", "--until-end"]).text(), "world\n");
    assert!(broker.terminate().success(), "{}", instance.log());
}

/// Covers the smallest inputs that a line reader may handle wrongly: empty lines, carriage returns, a missing final
/// newline and arbitrary bytes.
#[test]
fn produce_sends_one_record_per_line_with_its_bytes_unchanged() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    for (topic, input, values) in [
        ("lines", &b"a\nb\n"[..], &[&b"a"[..], b"b"][..]),
        ("no-final-newline", b"a\nb", &[b"a", b"b"]),
        ("carriage-returns", b"a\r\nb\r", &[b"a\r", b"b\r"]),
        ("empty-lines", b"\n\na\n\n", &[b"", b"", b"a", b""]),
        ("one-newline", b"\n", &[b""]),
        ("nothing", b"", &[]),
        ("bytes", b"\xff\x00\xfe\n\x00\n", &[b"\xff\x00\xfe", b"\x00"]),
    ] {
        cli.ok(&["topic", "create", topic]);
        cli.ok_with(&["produce", topic], input);
        let read = cli.ok(&["consume", topic, "--from", "earliest", "--until-end"]);
        let wanted: Vec<u8> = values.iter().flat_map(|value| [*value, b"\n"].concat()).collect();
        assert_eq!(read.stdout, wanted, "{topic}");
    }
}

#[test]
fn consume_prints_json_with_exactly_the_documented_fields() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "shapes", "--partitions", "1"]);
    cli.ok_with(&["produce", "shapes", "--key-separator", ":"], b"k:v\n:empty key\nk2:\nk3:a:b\n");
    cli.ok_with(&["produce", "shapes"], b"no key\n\xff\xfe\n");
    let records = cli.ok(&["consume", "shapes", "--from", "earliest", "--until-end", "--format", "json"]).json_lines();
    let seen: Vec<(Value, Value)> = records.iter().map(|one| (one["key"].clone(), one["value"].clone())).collect();
    let text = |text: &str| Value::String(text.to_owned());
    assert_eq!(
        seen,
        [
            (text("k"), text("v")),
            (text(""), text("empty key")),
            (text("k2"), text("")),
            (text("k3"), text("a:b")),
            (Value::Null, text("no key")),
            (Value::Null, serde_json::json!({"base64": "//4="})),
        ]
    );
    for (offset, record) in records.iter().enumerate() {
        let mut names: Vec<&String> = record.as_object().expect("an object").keys().collect();
        names.sort();
        assert_eq!(names, ["headers", "key", "offset", "partition", "timestamp_ms", "topic", "value"], "{record}");
        assert_eq!((&record["topic"], &record["partition"]), (&text("shapes"), &Value::from(0)));
        assert_eq!(record["offset"], Value::from(offset));
        assert!(record["timestamp_ms"].as_i64().is_some_and(|ms| ms > 1_600_000_000_000), "{record}");
    }
}

#[test]
fn consume_starts_and_ends_at_the_given_offsets() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "ten", "--partitions", "2"]);
    let five: String = (0..5).map(|n| format!("{n}\n")).collect();
    cli.ok_with(&["produce", "ten", "--partition", "1"], five.as_bytes());
    let read = |more: &[&str]| -> String { cli.ok(&[&["consume", "ten", "--until-end"], more].concat()).text() };
    let middle = cli.ok(&["consume", "ten", "--from", "earliest", "--until-end", "--format", "json"]).json_lines();
    // The second five records must have later timestamps than the first five.
    let last_ms = middle.iter().filter_map(|record| record["timestamp_ms"].as_i64()).max().expect("records");
    eventually("the clock advances", || (strandline::task::clock::wall_ms() > last_ms + 5).then_some(()));
    let later: String = (5..10).map(|n| format!("{n}\n")).collect();
    cli.ok_with(&["produce", "ten", "--partition", "1"], later.as_bytes());

    assert_eq!(read(&["--from", "earliest"]), five.clone() + &later);
    assert_eq!(read(&["--from", "earliest", "--partition", "0"]), "");
    assert_eq!(read(&["--from", "8", "--partition", "1"]), "8\n9\n");
    assert_eq!(read(&["--from", "latest"]), "");
    assert_eq!(read(&["--from", &format!("@{}", last_ms + 1), "--partition", "1"]), later);
    assert_eq!(read(&["--from", "earliest", "--max-records", "3"]), "0\n1\n2\n");
    assert_eq!(
        cli.ok(&["consume", "ten", "--from", "earliest", "--max-records", "2"]).text(),
        "0\n1\n",
        "only --max-records ends the command"
    );
    let beyond = cli.run(&["consume", "ten", "--from", "11", "--partition", "1", "--until-end"]);
    assert_eq!(beyond.code, 1, "{beyond:?}");
    assert!(
        beyond.stderr.contains("11") && beyond.stderr.contains("10"),
        "the error contains offset, start and end: {beyond:?}"
    );
}

#[test]
fn topics_are_created_described_altered_grown_and_deleted() {
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "orders", "--partitions", "2", "--config", "retention.ms=86400000"]);
    cli.ok(&["topic", "create", "access-log"]);
    let list = cli.ok(&["topic", "list", "--output", "json"]).json();
    let names: Vec<&str> = list.as_array().expect("a list").iter().filter_map(|topic| topic["name"].as_str()).collect();
    assert_eq!(names, ["access-log", "orders"]);

    let described = cli.ok(&["topic", "describe", "orders", "--output", "json"]).json();
    let mut keys: Vec<&String> = described.as_object().expect("an object").keys().collect();
    keys.retain(|key| ["name", "topic_id", "effective_config", "partitions"].contains(&key.as_str()));
    assert_eq!(keys.len(), 4, "{described}");
    assert_eq!(described["name"], "orders");
    assert_eq!(described["effective_config"]["retention.ms"], "86400000");
    assert_eq!(described["topic_id"].as_str().map(str::len), Some(36), "{described}");
    let partitions = described["partitions"].as_array().expect("a list");
    assert_eq!(partitions.len(), 2);
    for (n, partition) in partitions.iter().enumerate() {
        assert_eq!(number(partition, "partition"), i64::try_from(n).expect("small"));
        assert_eq!((number(partition, "leader"), &partition["replicas"]), (1, &serde_json::json!([1])));
        assert_eq!(partition["isr"], serde_json::json!([1]));
        for name in ["leader_epoch", "log_start", "local_start", "tiered_end", "high_watermark", "log_end"] {
            assert!(number(partition, name) >= 0, "{partition}");
        }
    }
    let people = cli.ok(&["topic", "describe", "orders"]).text();
    assert!(people.contains("orders") && people.contains("retention.ms"), "{people}");

    cli.ok(&["topic", "alter", "orders", "--config", "retention.ms=3600000"]);
    cli.ok(&["topic", "add-partitions", "orders", "--partitions", "4"]);
    assert!(broker.terminate().success(), "{}", instance.log());
    let _broker = instance.start();
    let cli = instance.cli();
    let described = cli.ok(&["topic", "describe", "orders", "--output", "json"]).json();
    assert_eq!(described["effective_config"]["retention.ms"], "3600000", "an alteration survives a restart");
    assert_eq!(described["partitions"].as_array().map(Vec::len), Some(4));

    cli.ok_with(&["produce", "orders", "--partition", "3"], b"old\n");
    cli.ok(&["topic", "delete", "orders", "--yes"]);
    assert_eq!(cli.run(&["topic", "describe", "orders"]).code, 1);
    cli.ok(&["topic", "create", "orders", "--partitions", "4"]);
    assert_eq!(
        cli.ok(&["consume", "orders", "--from", "earliest", "--until-end"]).text(),
        "",
        "the new topic has no records of the old one"
    );
}

/// A failed command exits with code 1, and its error names the topic, option, value or file that is wrong.
#[test]
fn failed_command_names_its_subject_and_exits_with_1() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "access-log"]);
    let fails = |arguments: &[&str], expected: &[&str]| {
        let output: Output = cli.run_with(arguments, b"x\n");
        assert_eq!(output.code, 1, "{arguments:?}: {output:?}");
        for word in expected {
            assert!(output.stderr.contains(word), "the error of {arguments:?} contains {word:?}: {output:?}");
        }
        assert!(
            !output.stderr.contains("panicked") && !output.stderr.contains("Error {"),
            "the text output: {output:?}"
        );
    };
    for command in
        [&["produce", "acces-log"][..], &["consume", "acces-log", "--until-end"], &["topic", "describe", "acces-log"]]
    {
        fails(command, &["acces-log", "access-log"]);
    }
    fails(&["topic", "create", "access-log"], &["access-log", "exists"]);
    fails(&["topic", "create", "a/b"], &["a/b"]);
    fails(&["topic", "create", "t", "--config", "retention.mss=1"], &["retention.mss", "retention.ms"]);
    fails(&["topic", "create", "t", "--config", "segment.bytes=-5"], &["segment.bytes", "-5", "16384"]);
    fails(&["topic", "create", "t", "--config", "durability=maybe"], &["durability", "maybe", "persisted"]);
    fails(&["topic", "create", "t", "--replication-factor", "3"], &["3", "1"]);
    fails(&["topic", "add-partitions", "access-log", "--partitions", "1"], &["access-log", "1"]);
    fails(&["topic", "delete", "nothing-like-it", "--yes"], &["nothing-like-it"]);
    fails(&["produce", "access-log", "--partition", "9"], &["9"]);
    fails(&["consume", "access-log", "--partition", "9", "--until-end"], &["9"]);
    fails(&["produce", "access-log", "/nowhere/at-all.log"], &["/nowhere/at-all.log"]);
    fails(&["bench", "produce", "--topic", "access-log", "--with-disk", "--disk-dir", "/nowhere"], &["/nowhere"]);
    fails(
        &["topic", "create", "t", "--config", "min.insync.replicas=2"],
        &["min.insync.replicas=\"2\"", "factor, which is 1"],
    );
    fails(
        &["topic", "alter", "access-log", "--config", "min.insync.replicas=2"],
        &["min.insync.replicas=\"2\"", "factor, which is 1"],
    );
    let list = cli.ok(&["topic", "list", "--output", "json"]).json();
    assert_eq!(list.as_array().map(Vec::len), Some(1), "no topic is partly created: {list}");
}

/// A failed `produce` exits with 1 even if it cannot print its summary. Regression: it exited with 0.
#[test]
fn failed_produce_with_closed_output_exits_with_1() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = instance.cli().command(&["produce", "missing", "--output", "json"]);
    let mut child =
        command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::null()).spawn().expect("the binary starts");
    assert_eq!(child.wait().expect("the command exits").code(), Some(1));
}

/// With `--output json`, the JSON output contains an error that occurs before a record is sent, with the counts of
/// records.
#[test]
fn error_before_sending_is_in_the_json_output() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "t"]);
    let long = [&[b'x'; 2 << 20][..], b"\n"].concat();
    for (arguments, input, sent, expected) in [
        (&["produce", "t", "."][..], &b""[..], 0, "cannot read ."),
        (&["produce", "t"], &long, 1, "line 1: record of"),
        (&["produce", "t", "--partition", "7"], b"", 0, "no partition 7"),
    ] {
        let output = cli.run_with(&[arguments, &["--output", "json"]].concat(), input);
        assert_eq!(output.code, 1, "{output:?}");
        let response = output.json();
        assert!(response["error"].as_str().is_some_and(|error| error.contains(expected)), "{arguments:?}: {response}");
        assert_eq!(
            (&response["sent"], &response["failed"], &response["acknowledged"]),
            (&sent.into(), &sent.into(), &0.into())
        );
    }
    let accepted = cli.ok_with(&["produce", "t", "--acks", "0", "--output", "json"], b"a\nb\n").json();
    assert_eq!((&accepted["accepted"], &accepted["acknowledged"]), (&2.into(), &Value::Null), "{accepted}");
}

/// If the start offset is out of range in one of the partitions, the command fails and prints no record.
#[test]
fn consume_checks_start_offset_before_printing() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "t", "--partitions", "2"]);
    cli.ok_with(&["produce", "t", "--partition", "0"], b"0\n1\n2\n");
    cli.ok_with(&["produce", "t", "--partition", "1"], b"0\n");
    let output = cli.run(&["consume", "t", "--from", "2", "--until-end"]);
    assert_eq!((output.code, output.text()), (1, String::new()), "{output:?}");
    for expected in ["partition 1", "not including, 1", "--from earliest", "--partition"] {
        assert!(output.stderr.contains(expected), "{expected:?}: {output:?}");
    }
    let json = cli.ok(&["consume", "t", "--partition", "1", "--until-end", "--output", "json"]).json_lines();
    assert_eq!(json[0]["value"], "0", "--output json selects the format");
}

/// A record of 60 MB, larger than the memory that a producer has by default, is sent and read.
#[test]
fn line_of_the_maximum_record_size_is_one_record() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "large", "--config", "max.message.bytes=67108864"]);
    let line = [vec![b'x'; 60_000_000], b"\n".to_vec()].concat();
    cli.ok_with(&["produce", "large"], &line);
    assert!(cli.ok(&["consume", "large", "--until-end"]).stdout == line, "byte for byte");
}

/// A benchmark with a rate and a duration runs for the whole duration. A benchmark without an acknowledged record
/// fails.
#[test]
fn bench_runs_its_full_time_or_fails_without_records() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "t", "--config", "max.message.bytes=1024"]);
    let rated = ["bench", "produce", "--topic", "t", "--rate", "0.000001", "--seconds", "1", "--record-size", "100"];
    let result = cli.ok(&[&rated[..], &["--output", "json"]].concat()).json();
    assert_eq!(result["records"], 1);
    assert!(result["seconds"].as_f64().is_some_and(|seconds| seconds >= 1.0), "{result}");
    let output = cli.run(&["bench", "produce", "--topic", "t", "--records", "5", "--record-size", "5000"]);
    assert_eq!(output.code, 1, "{output:?}");
    assert!(output.text().contains("no record was acknowledged"), "{output:?}");
}

#[test]
fn wrong_usage_exits_with_2() {
    let instance = BrokerInstance::new();
    let cli = Cli::without_broker(instance.path());
    for arguments in [
        &["no-such-command"][..],
        &["topic", "create"],
        &["topic", "create", "t", "--partitions", "many"],
        &["produce", "t", "--acks", "some"],
        &["produce", "t", "--compression", "rar"],
        &["consume", "t", "--from", "yesterday"],
        &["consume", "t", "--format", "yaml"],
        &["broker"],
    ] {
        let output = cli.run(arguments);
        assert_eq!(output.code, 2, "{arguments:?}: {output:?}");
        assert!(!output.stderr.is_empty() && output.stdout.is_empty(), "{arguments:?}: {output:?}");
    }
    // The usage line does not show `--bootstrap` as required, because the environment sets it.
    let twice = instance.cli().run(&["bench", "produce", "--topic", "t", "--records", "1", "--seconds", "1"]);
    assert!(twice.code == 2 && !twice.stderr.contains("--bootstrap"), "{twice:?}");
}

#[test]
fn unreachable_broker_is_named_after_a_bounded_wait() {
    let instance = BrokerInstance::new();
    let address = instance.grpc().to_string();
    for arguments in [&["topic", "list"][..], &["produce", "t"], &["consume", "t", "--until-end"]] {
        let output = instance.cli().run_with(arguments, b"x\n");
        assert_eq!(output.code, 1, "{arguments:?}: {output:?}");
        assert!(output.stderr.contains(&address), "the error of {arguments:?} contains {address}: {output:?}");
    }
}

/// The output names the place where acknowledged records are stored, for each value of `--acks` and each durability.
#[test]
fn produce_prints_the_durability_of_acknowledgements() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "synced", "--config", "segment.ms=200"]);
    cli.ok(&["topic", "create", "cached", "--config", "durability=replicated"]);
    for (topic, acks, word) in [
        ("synced", "all", "persisted"),
        ("synced", "1", "persisted"),
        ("cached", "all", "page cache"),
        ("synced", "tiered", "object store"),
        ("synced", "0", "memory"),
    ] {
        let output = cli.ok_with(&["produce", topic, "--acks", acks], b"x\n");
        let printed = format!("{}{}", output.text(), output.stderr);
        assert!(printed.contains(word), "the output of {topic} with acks={acks} contains {word:?}: {printed}");
    }
}

/// Records of every codec are written and read back through the broker. `segment dump` prints the batches and records
/// of their segment on disk.
#[test]
fn every_codec_can_be_read_back_and_dumped() {
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "codecs", "--config", "remote.storage.enable=false"]);
    let mut wanted = String::new();
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        let input: String = (0..100).map(|n| format!("{codec} compresses line {n}\n")).collect();
        cli.ok_with(&["produce", "codecs", "--compression", codec], input.as_bytes());
        wanted += &input;
    }
    assert_eq!(cli.ok(&["consume", "codecs", "--from", "earliest", "--until-end"]).text(), wanted);
    let described = cli.ok(&["topic", "describe", "codecs", "--output", "json"]).json();
    let id = described["topic_id"].as_str().expect("an id");
    assert!(broker.terminate().success(), "{}", instance.log());
    let segment = instance.data_dir().join(id).join("0").join(format!("{:020}.log", 0));
    assert!(segment.exists(), "segments are at the documented path: {}", segment.display());
    let dump = |more: &[&str]| {
        let path = segment.to_str().expect("the path is UTF-8");
        cli.ok(&[&["segment", "dump", path], more].concat()).text()
    };
    let batches = dump(&[]);
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        assert!(batches.contains(codec), "{batches}");
    }
    let records = dump(&["--records"]);
    assert!(
        records.contains("zstd compresses line 99") && records.lines().count() >= 500,
        "{}",
        records.lines().count()
    );
}

#[test]
fn health_and_metrics_pages_respond() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    for path in ["/healthz", "/readyz"] {
        assert_eq!(crate::broker::http_get(instance.http(), path).expect("a response").0, 200, "{path}");
    }
    let (code, metrics) = crate::broker::http_get(instance.http(), "/metrics").expect("a response");
    assert_eq!(code, 200);
    assert!(metrics.contains("# TYPE strandline_"), "{metrics}");
    assert_eq!(crate::broker::http_get(instance.http(), "/nothing").expect("a response").0, 404);
}

#[test]
fn config_print_shows_defaults_as_configuration_file() {
    let instance = BrokerInstance::new();
    let printed = Cli::without_broker(instance.path()).ok(&["config", "print"]).text();
    let table: toml::Table = printed.parse().unwrap_or_else(|error| panic!("{error} in {printed}"));
    assert_eq!(table["broker"]["id"].as_integer(), Some(1));
    assert_eq!(table["grpc"]["listen"].as_str(), Some("127.0.0.1:9460"));
    assert_eq!(table["http"]["listen"].as_str(), Some("127.0.0.1:9461"));
    let json = Cli::without_broker(instance.path()).ok(&["config", "print", "--output", "json"]).json();
    assert_eq!((&json["broker"]["id"], &json["grpc"]["listen"]), (&1.into(), &"127.0.0.1:9460".into()));
}

/// Regression: the separator `\\t` was used as two characters, which no line contained, so every record was sent
/// without a key.
#[test]
fn key_separator_may_have_escapes_and_hints_if_unused() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "keys"]);
    let sent = cli.ok_with(&["produce", "keys", "--key-separator", r"\t"], b"k\tv\n");
    assert_eq!(sent.stderr, "", "the output has no hint");
    cli.ok_with(&["produce", "keys", "--key-separator", r"\x1f"], b"a\x1fb\nno separator\n");
    let keyless = cli.ok_with(&["produce", "keys", "--key-separator", "::"], b"x:y\n");
    assert!(
        keyless.stderr.contains("hint: the separator \"::\" was not in the line, so no record has a key"),
        "{keyless:?}"
    );
    let records = cli.ok(&["consume", "keys", "--from", "earliest", "--until-end", "--format", "json"]).json_lines();
    let seen: Vec<_> = records.iter().map(|one| (one["key"].clone(), one["value"].clone())).collect();
    let text = |text: &str| Value::String(text.to_owned());
    assert_eq!(
        seen,
        [
            (text("k"), text("v")),
            (text("a"), text("b")),
            (Value::Null, text("no separator")),
            (Value::Null, text("x:y")),
        ]
    );
    let wrong = cli.run(&["produce", "keys", "--key-separator", r"\q"]);
    assert!(wrong.code == 2 && wrong.stderr.contains(r"\q is not an escape"), "{wrong:?}");
}

#[test]
fn topic_describe_shows_the_source_of_each_value() {
    let mut instance = BrokerInstance::new().topic_default("segment.ms", 1000);
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "t", "--config", "retention.ms=86400000"]);
    let described = cli.ok(&["topic", "describe", "t", "--output", "json"]).json();
    for (key, source) in [("segment.ms", "broker"), ("retention.ms", "topic"), ("segment.bytes", "default")] {
        assert_eq!(described["config_source"][key], source, "{key}");
    }
    let text = cli.ok(&["topic", "describe", "t"]).text();
    let line = text.lines().find(|line| line.starts_with("segment.ms")).expect("a line");
    assert!(line.contains("1000") && line.trim_end().ends_with("broker"), "{line}");
}

/// An environment variable with a mistyped name fails every command. A command that ignored it might call another
/// cluster than intended.
#[test]
fn mistyped_variable_fails_every_command_before_any_call() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "t"]);
    for arguments in [
        &["topic", "delete", "t", "--yes"][..],
        &["topic", "list"],
        &["produce", "t"],
        &["consume", "t", "--until-end"],
        &["cluster", "describe"],
        &["doctor", "--object-store", "file:///nowhere"],
        &["segment", "dump", "f"],
        &["config", "print"],
        &["completions", "bash"],
        &["dev"],
    ] {
        let output =
            cli.command(arguments).env("STRANDLINE_BOOTSTRP", "127.0.0.1:1").output().expect("the program starts");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(
            text.contains("STRANDLINE_BOOTSTRP") && text.contains("\"STRANDLINE_BOOTSTRAP\""),
            "{arguments:?}: {text}"
        );
    }
    cli.ok(&["topic", "describe", "t"]);
    let value = std::os::unix::ffi::OsStrExt::from_bytes(b"\xff");
    let value: &std::ffi::OsStr = value;
    let output =
        cli.command(&["topic", "list"]).env("STRANDLINE_BROKER_DATA_DIR", value).output().expect("the program starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("STRANDLINE_BROKER_DATA_DIR is not valid UTF-8"), "{text}");
    // Variables that Kubernetes sets for a service named `strandline` are accepted.
    let output = cli
        .command(&["topic", "list"])
        .env("STRANDLINE_SERVICE_HOST", "10.0.0.1")
        .output()
        .expect("the program starts");
    assert!(output.status.success(), "{output:?}");
}
