//! Files of a data directory are lost or corrupt, or a start is refused or interrupted. A refused start reports the
//! reason and changes no segment. Once the files are restored, a start finds all records.

use std::{fs, net::TcpStream, os::unix::process::ExitStatusExt as _, path::Path};

use crate::{
    broker::{Broker, BrokerInstance, Cli, Output},
    corruption::{files, lines},
    test_timeout::eventually,
};

const LINES: usize = 5000;

/// Starts a broker, appends records, and kills the broker. Some records are then synced in the journal only.
fn start_and_kill(instance: BrokerInstance) -> BrokerInstance {
    let mut instance = instance;
    let broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "kept"]);
    cli.ok_with(&["produce", "kept"], lines(LINES).as_bytes());
    broker.kill9();
    instance
}

/// Runs a start that must fail. Returns its output.
fn run_refused_start(instance: &BrokerInstance) -> Output {
    let config = instance.write_config();
    let output =
        Cli::without_broker(instance.path()).run(&["broker", "--config", config.to_str().expect("the path is UTF-8")]);
    assert_eq!(output.code, 1, "{output:?}");
    assert!(!output.stderr.contains("panicked"), "{output:?}");
    output
}

fn segment_bytes(instance: &BrokerInstance) -> u64 {
    files(&instance.data_dir(), ".log").iter().map(|path| fs::metadata(path).expect("a file").len()).sum()
}

/// Starts the broker and checks that topic `kept` has all of its records. Returns the running broker.
fn start_and_check_records(instance: &mut BrokerInstance) -> Broker {
    let broker = instance.start();
    let read = instance.cli().ok(&["consume", "kept", "--from", "earliest", "--until-end"]);
    assert!(read.stdout == lines(LINES).as_bytes(), "{} bytes", read.stdout.len());
    broker
}

/// Regression: without the identity file, the broker started as if the directory were new, and truncated every segment
/// to nothing.
#[test]
fn data_directory_without_its_identity_file_is_refused() {
    let mut instance = start_and_kill(BrokerInstance::new());
    let (marker, away) = (instance.data_dir().join("strandline.json"), instance.path().join("away.json"));
    fs::rename(&marker, &away).expect("the file is moved");
    let before = segment_bytes(&instance);
    let output = run_refused_start(&instance).stderr;
    for part in ["strandline.json", "checkpoint", "a journal", "metadata.redb"] {
        assert!(output.contains(part), "{part}: {output}");
    }
    assert_eq!(segment_bytes(&instance), before);
    fs::rename(&away, &marker).expect("the file is moved back");
    start_and_check_records(&mut instance);
}

#[test]
fn lost_journal_is_refused_only_after_an_unclean_stop() {
    let mut instance = start_and_kill(BrokerInstance::new());
    let (journal, away) = (instance.data_dir().join("journal"), instance.path().join("away"));
    fs::rename(&journal, &away).expect("the file is moved");
    // Half of the segment is cut off, as may happen to an unsynced file at a power failure.
    let segment = files(&instance.data_dir(), ".log").remove(0);
    let content = fs::read(&segment).expect("a segment");
    fs::write(&segment, &content[..content.len() / 2]).expect("the file is truncated");
    let output = run_refused_start(&instance).stderr;
    assert!(
        output.contains(journal.to_str().expect("the path is UTF-8")) && output.contains("accept_journal_loss"),
        "{output}"
    );
    assert_eq!(fs::read(&segment).expect("a segment").len(), content.len() / 2, "no file is truncated");
    fs::rename(&away, &journal).expect("the file is moved back");
    let broker = start_and_check_records(&mut instance);
    assert!(broker.terminate().success(), "{}", instance.log());
    fs::remove_dir_all(&journal).expect("removed");
    start_and_check_records(&mut instance);
}

#[test]
fn records_before_a_corrupt_batch_are_consumed() {
    let mut instance = start_and_kill(BrokerInstance::new());
    let broker = start_and_check_records(&mut instance);
    assert!(broker.terminate().success(), "{}", instance.log());
    let segment = files(&instance.data_dir(), ".log").remove(0);
    let dump = |cli: &Cli| cli.run(&["segment", "dump", segment.to_str().expect("a path"), "--output", "json"]);
    let batches = dump(&instance.cli()).json_lines();
    assert!(batches.len() > 1, "{batches:?}");
    let last = batches.last().expect("a batch");
    let (base, position) =
        (last["base_offset"].as_u64().expect("a number"), last["position"].as_u64().expect("a number"));
    let mut bytes = fs::read(&segment).expect("a segment");
    bytes[usize::try_from(position).expect("small") + 100] ^= 4;
    fs::write(&segment, bytes).expect("written");
    let _broker = instance.start();
    let read = instance.cli().run(&["consume", "kept", "--from", "earliest", "--until-end"]);
    let served = lines(usize::try_from(base).expect("small"));
    assert_eq!(read.code, 1, "{}", read.stderr);
    let printed = read.stdout.len();
    assert!(read.stdout == served.as_bytes(), "{printed} of {} bytes: {}", served.len(), read.stderr);
    assert!(read.stderr.contains(&format!("the data at offset {base} cannot be served")), "{}", read.stderr);
}

#[test]
fn data_directory_is_checked_before_object_store_and_journal() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let other = BrokerInstance::new();
    let config = fs::read_to_string(other.write_config()).expect("a configuration");
    let run = |instance: &BrokerInstance, data: &Path, flags: &[&str]| {
        let file = instance.path().join("variant.toml");
        let text = config.replace(&other.data_dir().display().to_string(), &data.display().to_string());
        fs::write(&file, text).expect("written");
        let file = file.to_str().expect("the path is UTF-8");
        let output = Cli::without_broker(instance.path()).run(&[&["broker", "--config", file], flags].concat());
        assert_eq!(output.code, 1, "{output:?}");
        output.stderr
    };
    let error = run(&other, &instance.data_dir(), &[]);
    assert!(error.contains("in use by another process"), "{error}");
    assert!(files(&other.object_store_dir(), "").is_empty(), "the object store is not bound");
    let file = other.path().join("file");
    fs::write(&file, "").expect("written");
    let error = run(&other, &file, &[]);
    assert!(error.contains("is a file: set broker.data_dir"), "{error}");
    let disk = rustix::fs::statvfs(other.path()).expect("the file system reports its space");
    if disk.f_bavail * disk.f_frsize < 1 << 40 {
        let error = run(&other, &other.data_dir(), &["--set", "log.journal_bytes=1TiB"]);
        assert!(error.contains("log.journal_bytes = 1099511627776"), "{error}");
        assert!(!other.data_dir().join("journal").exists(), "no directory was created");
    }
}

/// A stop signal may arrive at any time during a start, also before the signal handlers exist or during the recovery of
/// the journal. The process exits, and the next start finds all records.
#[test]
fn stop_at_any_moment_of_a_start_loses_nothing() {
    let anything = |_: &BrokerInstance| true;
    let listening = |instance: &BrokerInstance| TcpStream::connect(instance.grpc()).is_ok();
    let recovered =
        |instance: &BrokerInstance| instance.log().matches("the object store belongs to this cluster").count() == 2;
    let moments: [fn(&BrokerInstance) -> bool; 3] = [anything, listening, recovered];
    for moment in moments {
        let mut instance = start_and_kill(BrokerInstance::new());
        let broker = instance.spawn();
        eventually("the start has reached the step", || moment(&instance).then_some(()));
        let status = broker.terminate();
        assert!(status.success() || status.signal() == Some(15), "{status}\n{}", instance.log());
        start_and_check_records(&mut instance);
    }
}
