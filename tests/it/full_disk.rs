//! A broker on a file system that is really full. Appends are refused with a retryable error, reads continue, and no
//! restart is needed. Appends resume as soon as there is free space.
//!
//! The data directory is a mounted file system of 96 MiB, which only root can mount. Without root, the tests print a
//! message and pass. The unit tests of `log` cover a full disk too, on a simulated disk and without root.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    path::PathBuf,
    process::Command,
};

use bytes::Bytes;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use strandline::proto::{
    error::{ApiError, ErrorCode},
    v1::{AppendRequest, CreateTopicRequest, log_client::LogClient},
};
use tonic::transport::Channel;

use crate::{
    broker::{Broker, BrokerInstance, http_get},
    corruption::partition,
    s3::S3,
    skipped::report_skipped,
    test_timeout::{eventually, eventually_async},
    wire,
};

const SMALL: &[(&str, &str)] =
    &[("segment.bytes", "4194304"), ("segment.ms", "1000"), ("local.retention.bytes", "0"), ("retention.ms", "-1")];

/// A mounted file system. Dropping the value unmounts the file system.
pub(crate) struct Mount {
    at: PathBuf,
}

impl Mount {
    /// Mounts a file system of 96 MiB at a path. Returns `None` and prints the reason if this user may not mount.
    pub(crate) fn new(at: PathBuf) -> Option<Self> {
        fs::create_dir_all(&at).expect("a folder");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=96m", "strandline"]).arg(&at).output();
        match mounted {
            Ok(output) if output.status.success() => return Some(Self { at }),
            Ok(output) => report_skipped(
                "a full disk",
                &format!("cannot mount: {}", String::from_utf8_lossy(&output.stderr).trim()),
            ),
            Err(error) => report_skipped("a full disk", &format!("cannot mount: {error}")),
        }
        None
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.at).expect("the file system reports its space");
        stat.f_bavail * stat.f_frsize
    }

    /// Writes a file that is not of the broker and leaves this number of bytes free. Returns its path.
    fn fill(&self, leave: u64) -> PathBuf {
        let path = self.at.join("filler");
        let bytes = self.free().saturating_sub(leave);
        let zeros = vec![0; usize::try_from(bytes).expect("the data fits in memory")];
        fs::write(&path, zeros).expect("the disk is not full");
        path
    }

    /// Appends to a file that is not of the broker until the disk is full. Returns its path. A further call takes the
    /// space that was freed since.
    pub(crate) fn fill_up(&self) -> PathBuf {
        let path = self.at.join("filler");
        let mut filler = fs::OpenOptions::new().create(true).append(true).open(&path).expect("the file opens");
        let zeros = vec![0; 1 << 16];
        let refused = loop {
            if let Err(error) = filler.write_all(&zeros) {
                break error;
            }
        };
        assert_eq!(refused.kind(), ErrorKind::StorageFull, "{refused}");
        path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // The unmount is lazy, because a killed broker may have files open for a moment.
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// A broker whose data directory is a small mounted file system. The broker is dropped before the mount, in the order
/// of the fields.
struct BrokerOnSmallDisk {
    broker: Broker,
    mount: Mount,
    instance: BrokerInstance,
}

/// Starts a broker whose data directory is a mounted file system of 96 MiB. Returns `None` if this user may not mount.
fn start(instance: BrokerInstance) -> Option<BrokerOnSmallDisk> {
    let mut instance = instance.setting("log.journal_bytes", "\"16MiB\"");
    let mount = Mount::new(instance.data_dir())?;
    let broker = instance.start();
    Some(BrokerOnSmallDisk { broker, mount, instance })
}

/// Returns 1 MB of random bytes, which no codec can compress, different for each number.
fn payload(number: u64) -> Bytes {
    let mut bytes = vec![0; 1_000_000];
    StdRng::seed_from_u64(number).fill_bytes(&mut bytes);
    bytes.into()
}

fn request(topic: &str, number: u64) -> AppendRequest {
    wire::append_plain(topic, 0, vec![payload(number)])
}

/// Appends records, the first with the number `from`, until one is refused. Returns the number of the refused record,
/// and the error.
async fn append_until_full(log: &mut LogClient<Channel>, topic: &str, from: u64) -> (u64, ApiError) {
    for number in from..from + 300 {
        if let Err(error) = wire::append(log, request(topic, number)).await {
            return (number, error);
        }
    }
    panic!("300 MB were written to a disk of 96 MiB");
}

/// Repeats the append of record `number` until it succeeds. Every error before must be `DISK_FULL`.
async fn append_until_accepted(log: &mut LogClient<Channel>, topic: &str, number: u64) {
    eventually_async("appends resume", || {
        let (mut log, request) = (log.clone(), request(topic, number));
        async move {
            match wire::append(&mut log, request).await {
                Ok(_) => Some(()),
                Err(error) => {
                    assert_eq!(error.code, ErrorCode::DiskFull, "{error:?}");
                    None
                }
            }
        }
    })
    .await;
}

/// Checks that the topic contains exactly the records with the numbers below `count`, each at the offset of its number.
async fn check_records(log: &mut LogClient<Channel>, topic: &str, count: u64) {
    let end = i64::try_from(count).expect("the number is small");
    assert_eq!(wire::latest(log, topic, 0).await.expect("a response"), end);
    let records = wire::read_range(log, topic, 0, 0, end).await.expect("the read succeeds");
    assert_eq!(records.len() as u64, count);
    for (number, record) in (0..).zip(records) {
        assert!(record.value == Some(payload(number)), "record {number}");
    }
}

/// Regression: appends were refused, but `cluster describe`, the metric and `/readyz` reported no problem, because a
/// standalone broker did not check its disk. The log leaves a third of this small disk free, so disk usage stays below
/// `broker.disk_pressure_percent`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_is_reported_everywhere_until_space_is_free() {
    let Some(full) = tokio::task::block_in_place(|| start(BrokerInstance::new())) else { return };
    let address = full.instance.grpc();
    wire::create_topic(address, "t", 1, &[("remote.storage.enable", "false"), SMALL[0]]).await;
    let filler = full.mount.fill(50 << 20);
    let (_, error) = append_until_full(&mut wire::log(address), "t", 0).await;
    assert_eq!(error.code, ErrorCode::DiskFull);
    tokio::task::block_in_place(|| {
        let (http, cli) = (full.instance.http(), full.instance.cli());
        let page = eventually("the page reports the full disk", || {
            let (code, page) = http_get(http, "/readyz").expect("the broker responds");
            assert_eq!(code, 200, "the broker serves: {page}");
            (page != "ok\n").then_some(page)
        });
        assert!(page.starts_with("impaired: disk full since 2") && page.lines().count() == 1, "{page}");
        eventually("the metric reports disk pressure", || {
            (full.instance.metric("strandline_disk_pressure") == 1.0).then_some(())
        });
        let described = cli.ok(&["cluster", "describe", "--output", "json"]).json();
        assert_eq!(described["brokers"][0]["disk_full"], true, "{described}");
        let text = cli.ok(&["cluster", "describe"]).text();
        assert!(text.contains("the disk of broker 1 is full: appends are refused"), "{text}");
        let health = cli.run(&["cluster", "health"]);
        assert_eq!(health.code, 1);
        assert!(health.text().starts_with("broker 1: disk full since 2"), "{}", health.text());
        let health = cli.run(&["cluster", "health", "--output", "json"]);
        assert_eq!((health.code, &health.json()["healthy"]), (1, &false.into()));
        fs::remove_file(filler).expect("the file exists");
    });
    append_until_accepted(&mut wire::log(address), "t", 1000).await;
    tokio::task::block_in_place(|| {
        let over = || http_get(full.instance.http(), "/readyz").is_ok_and(|(_, page)| page == "ok\n");
        eventually("the condition is over", || over().then_some(()));
        assert_eq!(full.instance.cli().ok(&["cluster", "health"]).text(), "ok: 1 broker\n");
        eventually("the metric reports no disk pressure", || {
            (full.instance.metric("strandline_disk_pressure") == 0.0).then_some(())
        });
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_refuses_appends_until_space_is_free() {
    let Some(full) = tokio::task::block_in_place(|| start(BrokerInstance::new())) else { return };
    let address = full.instance.grpc();
    let local = [("remote.storage.enable", "false"), SMALL[0]];
    wire::create_topic(address, "t", 1, &local).await;
    let mut log = wire::log(address);
    let filler = full.mount.fill(50 << 20);
    let (count, error) = append_until_full(&mut log, "t", 0).await;
    assert!(count > 5, "{count} records were stored");
    assert_eq!(error.code, ErrorCode::DiskFull, "{error:?}");
    assert!(error.code.retryable());
    // After many refused appends, reads and the creation of a topic, which needs little space, still succeed.
    for _ in 0..20 {
        let error = wire::append(&mut log, request("t", count)).await.expect_err("the disk is still full");
        assert_eq!(error.code, ErrorCode::DiskFull, "{error:?}");
    }
    check_records(&mut log, "t", count).await;
    wire::create_topic(address, "another", 1, &local).await;
    fs::remove_file(filler).expect("removed");
    append_until_accepted(&mut log, "t", count).await;
    // These records exceed the size of the journal, so its ring wraps around.
    for number in count + 1..count + 15 {
        wire::append(&mut log, request("t", number)).await.expect("the disk is not full");
    }
    check_records(&mut log, "t", count + 15).await;
    wire::append(&mut log, request("another", 0)).await.expect("the disk is not full");
}

/// Appends leave a reserve free, so that the operations that free space succeed on a full disk. A tier commit precedes
/// the eviction of segments, a checkpoint precedes the reuse of journal files, and both need some space.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_full_of_untiered_records_recovers_with_object_store() {
    let server = S3::start().await;
    let instance = BrokerInstance::new().object_store(&server);
    let Some(full) = tokio::task::block_in_place(|| start(instance)) else { return };
    wire::create_topic(full.instance.grpc(), "t", 1, SMALL).await;
    let mut log = wire::log(full.instance.grpc());
    server.faults().set_down(true);
    let (count, error) = append_until_full(&mut log, "t", 0).await;
    assert_eq!(error.code, ErrorCode::DiskFull, "{error:?}");
    let free = full.mount.free();
    server.faults().set_down(false);
    append_until_accepted(&mut log, "t", count).await;
    tokio::task::block_in_place(|| {
        eventually("all records are in the object store", || {
            let state = partition(&full.instance.cli(), "t");
            (state["tiered_end"] == count + 1 && state["local_start"] == count + 1).then_some(())
        });
    });
    check_records(&mut log, "t", count + 1).await;
    assert!(free > 16 << 20, "the log leaves space for the operations that free space: {free}");
}

/// Another process takes the last free byte, also after the broker has freed its reserve. When the space is free again,
/// the broker resumes without a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_without_one_free_byte_needs_no_restart() {
    let server = S3::start().await;
    let instance = BrokerInstance::new().object_store(&server);
    let Some(full) = tokio::task::block_in_place(|| start(instance)) else { return };
    let address = full.instance.grpc();
    wire::create_topic(address, "t", 1, SMALL).await;
    let mut log = wire::log(address);
    for number in 0..15 {
        wire::append(&mut log, request("t", number)).await.expect("the disk is not full");
    }
    let filler = full.mount.fill_up();
    let (count, error) = append_until_full(&mut log, "t", 15).await;
    assert_eq!(error.code, ErrorCode::DiskFull, "{error:?}");
    let another = |n| CreateTopicRequest { name: format!("another{n}"), partitions: 1, ..Default::default() };
    // The test also takes the space that the log frees. The log frees its reserve, once, and up to four segments that
    // are uploaded and evicted during the loop.
    let mut attempt = 0;
    let refused = loop {
        match wire::admin(address).create_topic(another(attempt)).await {
            Err(refused) => break refused,
            Ok(_) => full.mount.fill_up(),
        };
        attempt += 1;
        assert!(attempt <= 5, "metadata needs disk space too");
    };
    let error = ApiError::from(&refused);
    assert_eq!(error.code, ErrorCode::MetadataUnavailable, "{error:?}");
    assert!(error.code.retryable() && error.message.contains("full"), "{error:?}");
    check_records(&mut log, "t", count).await;
    fs::remove_file(filler).expect("removed");
    append_until_accepted(&mut log, "t", count).await;
    wire::admin(address).create_topic(another(99)).await.expect("the disk is not full");
    tokio::task::block_in_place(|| {
        eventually("all records are in the object store", || {
            (partition(&full.instance.cli(), "t")["tiered_end"] == count + 1).then_some(())
        });
    });
    check_records(&mut log, "t", count + 1).await;
}

/// Checks that the records from the log start to the number `count`, not included, are readable. Returns the log start.
async fn check_records_from_log_start(full: &BrokerOnSmallDisk, log: &mut LogClient<Channel>, count: u64) -> u64 {
    let state = tokio::task::block_in_place(|| partition(&full.instance.cli(), "t"));
    let start = state["log_start"].as_u64().expect("a number");
    let (from, end) =
        (i64::try_from(start).expect("the number is small"), i64::try_from(count).expect("the number is small"));
    let records = wire::read_range(log, "t", 0, from, end).await.expect("the read succeeds");
    assert_eq!(records.len() as u64, count - start);
    for (number, record) in (start..).zip(records) {
        assert!(record.value == Some(payload(number)), "record {number}");
    }
    start
}

/// A lower `retention.bytes` frees space on a full disk, and appends resume.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lower_retention_frees_a_full_disk_without_a_restart() {
    let Some(full) = tokio::task::block_in_place(|| start(BrokerInstance::new())) else { return };
    wire::create_topic(full.instance.grpc(), "t", 1, &[("remote.storage.enable", "false"), SMALL[0], SMALL[3]]).await;
    let mut log = wire::log(full.instance.grpc());
    let (count, error) = append_until_full(&mut log, "t", 0).await;
    assert_eq!(error.code, ErrorCode::DiskFull, "{error:?}");
    let free = full.mount.free();
    tokio::task::block_in_place(|| {
        full.instance.cli().ok(&["topic", "alter", "t", "--config", "retention.bytes=10000000"]);
    });
    append_until_accepted(&mut log, "t", count).await;
    tokio::task::block_in_place(|| {
        eventually("disk space is free again", || (full.mount.free() > free + (10 << 20)).then_some(()));
    });
    let start = check_records_from_log_start(&full, &mut log, count + 1).await;
    assert!(start > 0 && count + 1 - start >= 10, "{start} of {count}");
}

/// A killed broker starts on a disk without a free byte, serves reads, and accepts a lower retention, which frees
/// space.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_starts_on_a_disk_without_one_free_byte() {
    let Some(full) = tokio::task::block_in_place(|| start(BrokerInstance::new())) else { return };
    let local = [("remote.storage.enable", "false"), SMALL[0], SMALL[3]];
    wire::create_topic(full.instance.grpc(), "t", 1, &local).await;
    let mut log = wire::log(full.instance.grpc());
    for number in 0..25 {
        wire::append(&mut log, request("t", number)).await.expect("the disk is not full");
    }
    let (BrokerOnSmallDisk { broker, mount, mut instance }, filler) = tokio::task::block_in_place(|| {
        let filler = full.mount.fill_up();
        (full, filler)
    });
    let broker = tokio::task::block_in_place(|| {
        broker.kill9();
        instance.start()
    });
    let full = BrokerOnSmallDisk { broker, mount, instance };
    let mut log = wire::log(full.instance.grpc());
    check_records(&mut log, "t", 25).await;
    let error = wire::append(&mut log, request("t", 25)).await.expect_err("the disk is full");
    assert_eq!(error.code, ErrorCode::DiskFull, "{error:?}");
    tokio::task::block_in_place(|| {
        full.instance.cli().ok(&["topic", "alter", "t", "--config", "retention.bytes=5000000"]);
        eventually("disk space is free again", || (full.mount.free() > 10 << 20).then_some(()));
    });
    assert!(check_records_from_log_start(&full, &mut log, 25).await > 10);
    fs::remove_file(filler).expect("removed");
    append_until_accepted(&mut log, "t", 25).await;
}

/// A read-only mount is used, because permissions do not prevent root from writing.
#[test]
fn data_directory_on_read_only_file_system_is_refused() {
    let instance = BrokerInstance::new();
    let Some(mount) = Mount::new(instance.data_dir()) else { return };
    let remounted =
        Command::new("mount").args(["-o", "remount,ro"]).arg(&mount.at).status().expect("the mount program exists");
    assert!(remounted.success());
    let mut broker = instance.spawn();
    assert_eq!(broker.wait_for_exit().code(), Some(1), "{}", instance.log());
    let (log, directory) = (instance.log(), instance.data_dir().display().to_string());
    assert!(log.contains(&directory) && log.to_lowercase().contains("read-only"), "{log}");
    assert!(!log.contains("panicked"), "{log}");
}
