//! Files of a data directory are lost. A broker that starts on the remaining files reports the loss, and loses nothing that is restored.

use std::{fs, net::TcpStream, os::unix::process::ExitStatusExt as _, path::Path};

use crate::{
    broker::{Broker, Cli, Home, Output},
    damage::{files, lines},
    test_timeout::eventually,
};

const LINES: usize = 5000;

/// Starts a broker that takes records, and kills the broker. Some records are then in its journal and nowhere else safely.
fn killed(home: Home) -> Home {
    let mut home = home;
    let broker = home.start();
    let cli = home.cli();
    cli.ok(&["topic", "create", "kept"]);
    cli.ok_with(&["produce", "kept"], lines(LINES).as_bytes());
    broker.kill9();
    home
}

/// Runs a start that must fail. Returns its output.
fn refused(home: &Home) -> Output {
    let config = home.write_config();
    let output =
        Cli::without_broker(home.path()).run(&["broker", "--config", config.to_str().expect("a path of ours")]);
    assert_eq!(output.code, 1, "{output:?}");
    assert!(!output.stderr.contains("panicked"), "{output:?}");
    output
}

fn segment_bytes(home: &Home) -> u64 {
    files(&home.data_dir(), ".log").iter().map(|path| fs::metadata(path).expect("a file").len()).sum()
}

fn all_is_there(home: &mut Home) -> Broker {
    let broker = home.start();
    let read = home.cli().ok(&["consume", "kept", "--from", "earliest", "--until-end"]);
    assert!(read.stdout == lines(LINES).as_bytes(), "{} bytes", read.stdout.len());
    broker
}

/// Regression: the broker started as if the directory were new, and emptied every segment.
#[test]
fn data_directory_without_its_identity_file_is_refused() {
    let mut home = killed(Home::new());
    let (card, away) = (home.data_dir().join("strandline.json"), home.path().join("away.json"));
    fs::rename(&card, &away).expect("moved away");
    let before = segment_bytes(&home);
    let said = refused(&home).stderr;
    for part in ["strandline.json", "checkpoint", "a journal", "metadata.redb"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(segment_bytes(&home), before);
    fs::rename(&away, &card).expect("put back");
    all_is_there(&mut home);
}

#[test]
fn lost_journal_is_refused_only_after_an_unclean_stop() {
    let mut home = killed(Home::new());
    let (journal, away) = (home.data_dir().join("journal"), home.path().join("away"));
    fs::rename(&journal, &away).expect("moved away");
    // The state of an unsynced segment after a power failure.
    let segment = files(&home.data_dir(), ".log").remove(0);
    let whole = fs::read(&segment).expect("a segment");
    fs::write(&segment, &whole[..whole.len() / 2]).expect("cut");
    let said = refused(&home).stderr;
    assert!(said.contains(journal.to_str().expect("a path of ours")) && said.contains("accept_journal_loss"), "{said}");
    assert_eq!(fs::read(&segment).expect("a segment").len(), whole.len() / 2, "nothing is cut");
    fs::rename(&away, &journal).expect("put back");
    let broker = all_is_there(&mut home);
    assert!(broker.terminate().success(), "{}", home.log());
    fs::remove_dir_all(&journal).expect("removed");
    all_is_there(&mut home);
}

#[test]
fn records_before_a_corrupt_batch_are_consumed() {
    let mut home = killed(Home::new());
    let broker = all_is_there(&mut home);
    assert!(broker.terminate().success(), "{}", home.log());
    let segment = files(&home.data_dir(), ".log").remove(0);
    let dump = |cli: &Cli| cli.run(&["segment", "dump", segment.to_str().expect("a path"), "--output", "json"]);
    let batches = dump(&home.cli()).json_lines();
    assert!(batches.len() > 1, "{batches:?}");
    let last = batches.last().expect("a batch");
    let (base, position) =
        (last["base_offset"].as_u64().expect("a number"), last["position"].as_u64().expect("a number"));
    let mut bytes = fs::read(&segment).expect("a segment");
    bytes[usize::try_from(position).expect("small") + 100] ^= 4;
    fs::write(&segment, bytes).expect("written");
    let _broker = home.start();
    let read = home.cli().run(&["consume", "kept", "--from", "earliest", "--until-end"]);
    let served = lines(usize::try_from(base).expect("small"));
    assert_eq!(read.code, 1, "{}", read.stderr);
    let printed = read.stdout.len();
    assert!(read.stdout == served.as_bytes(), "{printed} of {} bytes: {}", served.len(), read.stderr);
    assert!(read.stderr.contains(&format!("the data at offset {base} is damaged")), "{}", read.stderr);
}

#[test]
fn data_directory_is_checked_before_object_store_and_journal() {
    let mut home = Home::new();
    let _broker = home.start();
    let other = Home::new();
    let config = fs::read_to_string(other.write_config()).expect("a configuration");
    let run = |home: &Home, data: &Path, flags: &[&str]| {
        let file = home.path().join("variant.toml");
        let text = config.replace(&other.data_dir().display().to_string(), &data.display().to_string());
        fs::write(&file, text).expect("written");
        let file = file.to_str().expect("a path of ours");
        let output = Cli::without_broker(home.path()).run(&[&["broker", "--config", file], flags].concat());
        assert_eq!(output.code, 1, "{output:?}");
        output.stderr
    };
    let said = run(&other, &home.data_dir(), &[]);
    assert!(said.contains("in use by another process"), "{said}");
    assert!(files(&other.bucket(), "").is_empty(), "the bucket was not claimed");
    let file = other.path().join("file");
    fs::write(&file, "").expect("written");
    let said = run(&other, &file, &[]);
    assert!(said.contains("is a file, and a folder is needed"), "{said}");
    let disk = rustix::fs::statvfs(other.path()).expect("it says");
    if disk.f_bavail * disk.f_frsize < 1 << 40 {
        let said = run(&other, &other.data_dir(), &["--set", "log.journal_bytes=1TiB"]);
        assert!(said.contains("log.journal_bytes = 1099511627776"), "{said}");
        assert!(!other.data_dir().join("journal").exists(), "nothing was made");
    }
}

/// A signal may arrive at any moment of a start, before the signal handlers exist or in the middle of journal recovery. The process exits,
/// and the next start finds all records.
#[test]
fn stop_at_any_moment_of_a_start_loses_nothing() {
    let anything = |_: &Home| true;
    let listening = |home: &Home| TcpStream::connect(home.grpc()).is_ok();
    let recovered = |home: &Home| home.log().matches("object store is ours").count() == 2;
    let moments: [fn(&Home) -> bool; 3] = [anything, listening, recovered];
    for moment in moments {
        let mut home = killed(Home::new());
        let broker = home.spawn();
        eventually("the start has come so far", || moment(&home).then_some(()));
        let status = broker.terminate();
        assert!(status.success() || status.signal() == Some(15), "{status}\n{}", home.log());
        all_is_there(&mut home);
    }
}
