//! Checks the capabilities of an object store and its credentials, with objects in a folder that is deleted at the end.
//!
//! Every check states its meaning for a broker. A missing capability that a broker needs is a failure; one that a
//! broker can do without is unsupported. With the feature `s3-admin`, checks of `s3://` use the vendor's client, so
//! that a finding concerns the store and not the client of the broker.

use bytes::Bytes;

mod generic;
pub(super) mod probe;

use self::probe::{ConditionalPutResult, StoreProbe};
use super::open::{ObjectStoreOptions, ObjectStoreOptionsError};
#[cfg(feature = "s3-admin")]
use super::s3_admin::S3Admin;
use crate::task::{clock, random};

/// Size of the first part in the multipart check: the minimum that S3 allows for every part but the last.
const PART_BYTES: usize = 5 << 20;

/// Maximum difference between the store's clock and this machine's, in milliseconds. Above it, a store may refuse
/// signed requests.
const MAX_CLOCK_SKEW_MS: i64 = 60_000;

/// Number of concurrent requests in the check of conditional puts.
const CONCURRENT_PUTS: usize = 8;

/// Outcome of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckOutcome {
    /// The capability works.
    Pass,
    /// The capability does not work, and a broker needs it.
    Fail,
    /// The capability does not work, and a broker does not need it.
    Unsupported,
    /// The check was not tried, because an earlier one failed.
    Skipped,
}

/// One check and its outcome.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct StoreCheck {
    pub name: &'static str,
    pub outcome: CheckOutcome,
    /// Observation of the check, for people.
    pub detail: String,
    /// Meaning of the checked capability for a broker.
    pub meaning: &'static str,
}

/// Checks every capability of the store in `options` that a broker uses, and deletes the objects of the checks. Each
/// request has the time limit of the options.
///
/// # Errors
/// No client can be created from the options. A missing capability is not an error but the outcome of a check.
pub async fn examine(options: &ObjectStoreOptions) -> Result<Vec<StoreCheck>, ObjectStoreOptionsError> {
    let folder = format!(".strandline-doctor-{}", random::uuid());
    #[cfg(feature = "s3-admin")]
    if options.is_s3() {
        let probe = S3Admin::connect(options).await?;
        let mut checks = Box::pin(run(&probe, &folder)).await;
        let accepts_puts = can_put(&checks);
        if accepts_puts {
            checks.extend(s3_checks(&probe, &folder).await);
        } else {
            checks.extend([CHECKSUM, UPLOADS].map(|(name, meaning)| untried_check(name, meaning)));
        }
        clean(&probe, &folder, accepts_puts).await;
        return Ok(checks);
    }
    let probe = generic::GenericProbe::connect(options)?;
    let checks = Box::pin(run(&probe, &folder)).await;
    clean(&probe, &folder, can_put(&checks)).await;
    Ok(checks)
}

/// Returns the check of a capability that a broker needs: passed with an observation, or failed with an error.
fn check(name: &'static str, result: Result<String, String>, meaning: &'static str) -> StoreCheck {
    let (outcome, detail) = match result {
        Ok(detail) => (CheckOutcome::Pass, detail),
        Err(detail) => (CheckOutcome::Fail, detail),
    };
    StoreCheck { name, outcome, detail, meaning }
}

/// Returns a check as not tried, for a store that accepted no put.
fn untried_check(name: &'static str, meaning: &'static str) -> StoreCheck {
    let detail = "not tried: the store accepted no put".to_owned();
    StoreCheck { name, outcome: CheckOutcome::Skipped, detail, meaning }
}

/// Name of the check that all other checks depend on.
const PUT: &str = "put";

/// Names of the other capabilities that a broker needs, each with its purpose.
const NEEDED: [(&str, &str); 5] = [
    ("ranged get", "Cold reads fetch ranges of segment objects."),
    ("head and clock", "Uploads are verified by length, garbage by age, and signatures by time."),
    ("list", "Garbage collection and restore list the objects."),
    ("multipart", "Segments above 16 MiB are uploaded in parts."),
    ("delete", "Without deletes, retention frees no space in the object store."),
];

/// Runs the checks that every kind of store has. If the put fails, the other checks are skipped.
async fn run(probe: &impl StoreProbe, folder: &str) -> Vec<StoreCheck> {
    let written = put(probe, folder).await;
    let reachable = written.is_ok();
    let mut checks = vec![check(PUT, written, "Without puts, no segment can be uploaded.")];
    if !reachable {
        // All other checks would fail for the same reason.
        checks.extend(NEEDED.map(|(name, meaning)| untried_check(name, meaning)));
        checks.extend(["conditional put", "conditional puts at once"].map(|name| untried_check(name, CONDITIONAL)));
        return checks;
    }
    let results = [
        ranged_get(probe, folder).await,
        clock_skew(probe, folder).await,
        list(probe, folder).await,
        multipart(probe, folder).await,
        delete(probe, folder).await,
    ];
    checks.extend(NEEDED.into_iter().zip(results).map(|((name, meaning), result)| check(name, result, meaning)));
    let (sequential, concurrent) = check_conditional_puts(probe, folder).await;
    checks.extend([sequential, concurrent]);
    checks
}

/// Checks that a small object can be written. Several later checks use this object.
async fn put(probe: &impl StoreProbe, folder: &str) -> Result<String, String> {
    probe.put(&format!("{folder}/small"), pattern(4096)).await?;
    Ok("an object of 4 KiB was written".to_owned())
}

/// Checks that ranges of the small object are returned as written.
async fn ranged_get(probe: &impl StoreProbe, folder: &str) -> Result<String, String> {
    let content = pattern(4096);
    for range in [0..4096, 0..1, 100..1100, 4000..4096] {
        let received = probe.get(&format!("{folder}/small"), range.clone()).await?;
        if Some(&received[..])
            != content.get(usize::try_from(range.start).unwrap_or(0)..usize::try_from(range.end).unwrap_or(0))
        {
            let (start, end) = (range.start, range.end);
            return Err(format!("bytes {start}..{end} were returned as {} different bytes", received.len()));
        }
    }
    Ok("four ranges were returned as written".to_owned())
}

/// Checks the length that the store reports, and that its clock differs by at most [`MAX_CLOCK_SKEW_MS`] from this
/// machine's.
async fn clock_skew(probe: &impl StoreProbe, folder: &str) -> Result<String, String> {
    let key = format!("{folder}/clock");
    let before = clock::wall_ms();
    probe.put(&key, pattern(100)).await?;
    let after = clock::wall_ms();
    let (bytes, modified_ms) = probe.head(&key).await?;
    if bytes != 100 {
        return Err(format!("the store reports {bytes} bytes for an object of 100 bytes"));
    }
    let skew_ms = if modified_ms < before { before - modified_ms } else { (modified_ms - after).max(0) };
    if skew_ms > MAX_CLOCK_SKEW_MS {
        let (skew_s, max_s) = (skew_ms / 1000, MAX_CLOCK_SKEW_MS / 1000);
        return Err(format!(
            "the clocks of the store and of this machine differ by {skew_s} s, more than {max_s} s: synchronize \
             the wrong one with NTP"
        ));
    }
    Ok("the length is correct, and the clocks differ by at most a minute".to_owned())
}

/// Checks that a new object is listed.
async fn list(probe: &impl StoreProbe, folder: &str) -> Result<String, String> {
    let keys = probe.list(folder).await?;
    if keys.iter().any(|key| key.ends_with("/small")) {
        Ok(format!("listed objects: {}, including the new one", keys.len()))
    } else {
        Err("a new object is not in the list".to_owned())
    }
}

/// Checks that an object can be uploaded in two parts.
async fn multipart(probe: &impl StoreProbe, folder: &str) -> Result<String, String> {
    let key = format!("{folder}/parts");
    let (first, last) = (pattern(PART_BYTES), pattern(1000));
    probe.multipart(&key, vec![first.clone(), last.clone()]).await?;
    let bytes = probe.head(&key).await?.0;
    let boundary = PART_BYTES as u64;
    if bytes != boundary + 1000 {
        return Err(format!("parts of {PART_BYTES} and 1000 bytes became an object of {bytes} bytes"));
    }
    let received = probe.get(&key, boundary - 10..boundary + 10).await?;
    if received[..] != [&first[PART_BYTES - 10..], &last[..10]].concat() {
        return Err("the bytes at the boundary of two parts differ from what was written".to_owned());
    }
    Ok("two parts became one object".to_owned())
}

/// Checks that a deleted object no longer exists.
async fn delete(probe: &impl StoreProbe, folder: &str) -> Result<String, String> {
    let key = format!("{folder}/clock");
    probe.delete(&key).await?;
    match probe.head(&key).await {
        Ok(_) => Err("a deleted object still exists (versioning may keep old versions, but not the name)".to_owned()),
        Err(_) => Ok("a deleted object no longer exists".to_owned()),
    }
}

const CONDITIONAL: &str = "Strandline uses a conditional put for the first cluster.json if the store supports it, and is equally safe without \
     it.";

/// Checks conditional puts: one on an existing object, and several concurrent ones on a new object. A broker works
/// without conditional puts, so the outcome is never `Fail`.
async fn check_conditional_puts(probe: &impl StoreProbe, folder: &str) -> (StoreCheck, StoreCheck) {
    let sequential = match probe.put_new(&format!("{folder}/small"), pattern(10)).await {
        Ok(ConditionalPutResult::Exists) => {
            (CheckOutcome::Pass, "a put with If-None-Match on an existing object was refused".to_owned())
        }
        Ok(ConditionalPutResult::Written) => {
            let detail = "the condition is silently ignored: an existing object was overwritten";
            (CheckOutcome::Unsupported, detail.to_owned())
        }
        Ok(ConditionalPutResult::Unsupported(reason)) | Err(reason) => (CheckOutcome::Unsupported, reason),
    };
    let works = sequential.0 == CheckOutcome::Pass;
    let concurrent = if works {
        let key = format!("{folder}/race");
        let puts = (0..CONCURRENT_PUTS).map(|_| probe.put_new(&key, pattern(10)));
        let responses = futures::future::join_all(puts).await;
        let created = responses.iter().filter(|response| **response == Ok(ConditionalPutResult::Written)).count();
        let detail =
            format!("{created} of {CONCURRENT_PUTS} concurrent conditional puts succeeded; exactly one should");
        (if created == 1 { CheckOutcome::Pass } else { CheckOutcome::Unsupported }, detail)
    } else {
        (CheckOutcome::Unsupported, "not tried: a single conditional put does not work".to_owned())
    };
    let named = |name, (outcome, detail)| StoreCheck { name, outcome, detail, meaning: CONDITIONAL };
    (named("conditional put", sequential), named("conditional puts at once", concurrent))
}

#[cfg(feature = "s3-admin")]
const CHECKSUM: (&str, &str) =
    ("content checksum", "Uploads are read back and compared, so a store without checksums is equally safe.");

#[cfg(feature = "s3-admin")]
const UPLOADS: (&str, &str) = (
    "list multipart uploads",
    "A crash can leave an incomplete upload, which costs storage. Brokers abort old ones; if that is not possible, \
     give the bucket a life-cycle rule that aborts them.",
);

/// Checks content checksums and the listing of incomplete multipart uploads.
#[cfg(feature = "s3-admin")]
async fn s3_checks(s3: &S3Admin, folder: &str) -> [StoreCheck; 2] {
    let (outcome, detail) = match s3.probe_checksum(&format!("{folder}/checksum"), pattern(1000)).await {
        Ok(true) => (CheckOutcome::Pass, "the store keeps the CRC-32C of an object".to_owned()),
        Ok(false) => (CheckOutcome::Unsupported, "the store keeps no checksum".to_owned()),
        Err(error) => (CheckOutcome::Unsupported, error),
    };
    let checksum = StoreCheck { name: CHECKSUM.0, outcome, detail, meaning: CHECKSUM.1 };
    let (outcome, detail) = match s3.uploads().await {
        Ok(uploads) => (CheckOutcome::Pass, format!("incomplete uploads below this prefix: {}", uploads.len())),
        Err(error) => (CheckOutcome::Unsupported, error),
    };
    [checksum, StoreCheck { name: UPLOADS.0, outcome, detail, meaning: UPLOADS.1 }]
}

/// Returns true if the put of the first object passed.
fn can_put(checks: &[StoreCheck]) -> bool {
    checks.iter().all(|check| check.name != PUT || check.outcome == CheckOutcome::Pass)
}

/// Deletes the objects of the checks. If `all` is false, deletes only the first object: its put failed, but may have
/// arrived. If the store cannot delete, its check has reported that already.
async fn clean(probe: &impl StoreProbe, folder: &str, all: bool) {
    let names = ["small", "clock", "parts", "race", "checksum"];
    for name in names.into_iter().take(if all { names.len() } else { 1 }) {
        if let Err(error) = probe.delete(&format!("{folder}/{name}")).await {
            tracing::debug!(folder, name, error, "cannot delete an object of the checks");
        }
    }
}

/// Returns bytes in which a shifted range can be detected.
fn pattern(bytes: usize) -> Bytes {
    let numbers = (0u32..).flat_map(u32::to_be_bytes);
    numbers.take(bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn memory_and_directory_stores_pass_and_keep_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for url in ["memory://".to_owned(), format!("file://{}/objects", folder.path().display())] {
            let checks = examine(&ObjectStoreOptions::new(&url)).await.unwrap();
            assert_eq!(checks.len(), 8);
            for check in checks {
                assert_eq!(check.outcome, CheckOutcome::Pass, "{url}: {check:?}");
            }
        }
        let left = std::fs::read_dir(folder.path().join("objects"))
            .unwrap()
            .flat_map(|entry| std::fs::read_dir(entry.unwrap().path()).unwrap().map(|entry| entry.unwrap().path()));
        assert_eq!(left.collect::<Vec<_>>(), Vec::<std::path::PathBuf>::new());
    }

    /// Regression: the checks reported capabilities of an unreachable store as unsupported, although no request had
    /// tried them.
    #[cfg(feature = "s3-admin")]
    #[tokio::test]
    async fn unreachable_store_leaves_checks_untried() {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let keys = crate::tier::AccessKeys { access_key_id: "a".into(), secret_access_key: "b".into() };
        let options = ObjectStoreOptions {
            endpoint: Some(format!("http://{address}")),
            path_style: Some(true),
            keys: Some(keys),
            ..ObjectStoreOptions::new("s3://bucket")
        };
        let checks = examine(&options).await.unwrap();
        assert_eq!(checks.len(), 10, "{checks:?}");
        assert_eq!((checks[0].name, checks[0].outcome), (PUT, CheckOutcome::Fail));
        assert!(checks[0].detail.contains(&format!("http://{address}")), "{checks:?}");
        assert!(!checks[0].detail.contains("region"), "no region is requested: {checks:?}");
        for check in &checks[1..] {
            assert_eq!(check.outcome, CheckOutcome::Skipped, "{check:?}");
        }
    }
}
