//! The mark of a directory's uptimes.

use uuid::Uuid;

use super::*;

const MARK: &str = "/data/uptimes.json";

fn uptime(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

#[test]
fn a_mark_names_the_confirmed_uptime_and_those_noted_since() {
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

/// A broker that registered before its note was durable could not prove itself at the next start.
#[test]
fn a_noted_uptime_survives_the_power_and_half_a_note_leaves_the_mark_of_before() {
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
fn a_damaged_mark_proves_nothing_and_a_newer_one_is_left_alone() {
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
fn the_format_of_a_mark_is_kept() {
    let disk = SimDisk::new();
    let log = open(&disk);
    log.note_uptime(uptime(1), true).unwrap();
    log.note_uptime(uptime(0xAB), false).unwrap();
    let golden = "{\n  \"format\": 1,\n  \"uptimes\": [\n    \"00000000-0000-0000-0000-000000000001\",\n    \
                  \"00000000-0000-0000-0000-0000000000ab\"\n  ]\n}";
    assert_eq!(String::from_utf8(disk.read(Path::new(MARK)).unwrap()).unwrap(), golden);
}

/// A broker that is started again and again without reaching the metadata must not fill its disk, nor forget what it can prove.
#[test]
fn of_very_many_starts_the_confirmed_uptime_and_the_last_ones_are_kept() {
    let disk = SimDisk::new();
    let log = open(&disk);
    log.note_uptime(uptime(0), true).unwrap();
    for n in 1..=1100 {
        log.note_uptime(uptime(n), false).unwrap();
    }
    let uptimes = log.uptimes().unwrap();
    assert_eq!((uptimes.len(), uptimes[0], uptimes[1], uptimes[999]), (1000, uptime(0), uptime(102), uptime(1100)));
}
