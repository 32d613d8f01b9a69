//! The incarnations file of a data directory.

use uuid::Uuid;

use super::*;

const MARK: &str = "/data/uptimes.json";

fn uptime(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

#[test]
fn file_has_the_confirmed_and_all_later_incarnations() {
    let disk = SimDisk::new();
    let log = open(&disk);
    assert!(log.uptimes().unwrap().is_empty());
    log.note_uptime(uptime(1), false).unwrap();
    log.note_uptime(uptime(1), true).unwrap();
    log.note_uptime(uptime(2), false).unwrap();
    log.note_uptime(uptime(2), false).unwrap();
    drop(log);
    let log = open(&disk);
    assert_eq!(log.uptimes().unwrap(), [uptime(1), uptime(2)], "the metadata may name either");
    log.note_uptime(uptime(3), false).unwrap();
    assert_eq!(log.uptimes().unwrap(), [1, 2, 3].map(uptime));
    log.note_uptime(uptime(3), true).unwrap();
    assert_eq!(log.uptimes().unwrap(), [uptime(3)]);
}

/// Regression: a broker that registered before its record was durable could not prove its incarnation at the next
/// start.
#[test]
fn recorded_incarnation_survives_a_power_failure() {
    for seed in 0..50 {
        let disk = SimDisk::new();
        let log = open(&disk);
        log.note_uptime(uptime(1), true).unwrap();
        disk.fail_writes_after(Some(seed % 5));
        let noted = log.note_uptime(uptime(2), false);
        disk.fail_writes_after(None);
        drop(log);
        disk.crash(seed);
        let uptimes = open(&disk).uptimes().unwrap();
        let both = [uptime(1), uptime(2)];
        assert!(uptimes == both || (noted.is_err() && uptimes == both[..1]), "{seed}: {noted:?} {uptimes:?}");
    }
}

#[test]
fn corrupt_file_proves_nothing_and_newer_one_is_refused() {
    let disk = SimDisk::new();
    let log = open(&disk);
    for damaged in [&b""[..], b"{\"format\": 1, \"uptimes\": [\"7\"]}", b"\xFF"] {
        disk.replace(Path::new(MARK), damaged).unwrap();
        assert!(log.uptimes().unwrap().is_empty());
    }
    log.note_uptime(uptime(1), false).unwrap();
    assert_eq!(log.uptimes().unwrap(), [uptime(1)], "it is made again");
    disk.replace(Path::new(MARK), b"{\"format\": 2, \"uptimes\": []}").unwrap();
    assert!(log.note_uptime(uptime(2), false).unwrap_err().to_string().contains("has format 2"));
}

#[test]
fn format_of_the_incarnations_file_is_stable() {
    let disk = SimDisk::new();
    let log = open(&disk);
    log.note_uptime(uptime(1), true).unwrap();
    log.note_uptime(uptime(0xAB), false).unwrap();
    let golden = "{\n  \"format\": 1,\n  \"uptimes\": [\n    \"00000000-0000-0000-0000-000000000001\",\n    \
                  \"00000000-0000-0000-0000-0000000000ab\"\n  ]\n}";
    assert_eq!(String::from_utf8(disk.read(Path::new(MARK)).unwrap()).unwrap(), golden);
}

/// A broker that starts again and again without reaching the metadata must not fill its disk, nor drop its confirmed
/// incarnation.
#[test]
fn confirmed_and_last_incarnations_are_kept() {
    let disk = SimDisk::new();
    let log = open(&disk);
    log.note_uptime(uptime(0), true).unwrap();
    for n in 1..=1100 {
        log.note_uptime(uptime(n), false).unwrap();
    }
    let uptimes = log.uptimes().unwrap();
    assert_eq!((uptimes.len(), uptimes[0], uptimes[1], uptimes[999]), (1000, uptime(0), uptime(102), uptime(1100)));
}
