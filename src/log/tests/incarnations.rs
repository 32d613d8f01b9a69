//! The incarnations file of a data directory.

use uuid::Uuid;

use super::*;

const FILE: &str = "/data/incarnations.json";

fn incarnation(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

#[test]
fn file_has_the_confirmed_and_all_later_incarnations() {
    let disk = SimDisk::new();
    let log = open(&disk);
    assert!(log.incarnations().unwrap().is_empty());
    log.record_incarnation(incarnation(1), false).unwrap();
    log.record_incarnation(incarnation(1), true).unwrap();
    log.record_incarnation(incarnation(2), false).unwrap();
    log.record_incarnation(incarnation(2), false).unwrap();
    drop(log);
    let log = open(&disk);
    assert_eq!(log.incarnations().unwrap(), [incarnation(1), incarnation(2)], "the metadata may hold either id");
    log.record_incarnation(incarnation(3), false).unwrap();
    assert_eq!(log.incarnations().unwrap(), [1, 2, 3].map(incarnation));
    log.record_incarnation(incarnation(3), true).unwrap();
    assert_eq!(log.incarnations().unwrap(), [incarnation(3)]);
}

/// An incarnation that was written survives a power failure. Regression: a broker registered before the file was
/// durable, and could not prove its incarnation at the next start.
#[test]
fn written_incarnation_survives_a_power_failure() {
    for seed in 0..50 {
        let disk = SimDisk::new();
        let log = open(&disk);
        log.record_incarnation(incarnation(1), true).unwrap();
        disk.fail_writes_after(Some(seed % 5));
        let recorded = log.record_incarnation(incarnation(2), false);
        disk.fail_writes_after(None);
        drop(log);
        disk.crash(seed);
        let incarnations = open(&disk).incarnations().unwrap();
        let both = [incarnation(1), incarnation(2)];
        assert!(
            incarnations == both || (recorded.is_err() && incarnations == both[..1]),
            "{seed}: {recorded:?} {incarnations:?}"
        );
    }
}

#[test]
fn corrupt_file_proves_nothing_and_newer_one_is_refused() {
    let disk = SimDisk::new();
    let log = open(&disk);
    for corrupt in [&b""[..], b"{\"format\": 1, \"incarnations\": [\"7\"]}", b"\xFF"] {
        disk.replace(Path::new(FILE), corrupt).unwrap();
        assert!(log.incarnations().unwrap().is_empty());
    }
    log.record_incarnation(incarnation(1), false).unwrap();
    assert_eq!(log.incarnations().unwrap(), [incarnation(1)], "the file is created again");
    disk.replace(Path::new(FILE), b"{\"format\": 2, \"incarnations\": []}").unwrap();
    assert!(log.record_incarnation(incarnation(2), false).unwrap_err().to_string().contains("has format 2"));
}

#[test]
fn format_of_the_incarnations_file_is_stable() {
    let disk = SimDisk::new();
    let log = open(&disk);
    log.record_incarnation(incarnation(1), true).unwrap();
    log.record_incarnation(incarnation(0xAB), false).unwrap();
    let golden = "{\n  \"format\": 1,\n  \"incarnations\": [\n    \"00000000-0000-0000-0000-000000000001\",\n    \
                  \"00000000-0000-0000-0000-0000000000ab\"\n  ]\n}";
    assert_eq!(String::from_utf8(disk.read(Path::new(FILE)).unwrap()).unwrap(), golden);
}

/// The file keeps the confirmed incarnation and the last 999. A broker that starts again and again without reaching the
/// metadata must not fill its disk.
#[test]
fn confirmed_and_last_incarnations_are_kept() {
    let disk = SimDisk::new();
    let log = open(&disk);
    log.record_incarnation(incarnation(0), true).unwrap();
    for n in 1..=1100 {
        log.record_incarnation(incarnation(n), false).unwrap();
    }
    let incarnations = log.incarnations().unwrap();
    assert_eq!(
        (incarnations.len(), incarnations[0], incarnations[1], incarnations[999]),
        (1000, incarnation(0), incarnation(102), incarnation(1100))
    );
}
