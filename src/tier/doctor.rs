//! What a bucket and its credentials can do, tried on objects of a folder that is deleted at the end.
//!
//! Every check says what it means for a broker. The ones that a broker cannot do without fail; the ones that it only
//! profits from are called unsupported. For `s3://` the vendor's own client asks, so that what is found is the store's doing
//! and not that of the client which the broker uses.

use std::ops::Range;

use bytes::Bytes;

#[cfg(feature = "aws-sdk")]
mod aws;
mod generic;

use super::open::{OpenError, StoreOptions};
use crate::task::{clock, random};

/// Bytes of a part of the multipart check: the least that S3 allows for all but the last.
const PART_BYTES: usize = 5 << 20;

/// How far the store's clock may be off before requests are refused or garbage is judged wrongly, in milliseconds.
const MOST_SKEW_MS: i64 = 60_000;

/// How many ask at once in the check of concurrent conditional puts.
const AT_ONCE: usize = 8;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It works.
    Pass,
    /// It does not work, and a broker needs it.
    Fail,
    /// It does not work, and a broker does without it.
    Unsupported,
    /// Nothing is known of it: what comes before it failed.
    Untried,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Check {
    /// What was tried.
    pub name: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// What was seen.
    pub detail: String,
    /// What that means for a broker.
    pub meaning: &'static str,
}

/// What a conditional put answered.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Created {
    Yes,
    Exists,
    NotKnown(String),
}

/// An object store as the checks see it. Errors are texts for the report.
trait Probe {
    async fn put(&self, key: &str, body: Bytes) -> Result<(), String>;
    async fn put_new(&self, key: &str, body: Bytes) -> Result<Created, String>;
    async fn get(&self, key: &str, range: Range<u64>) -> Result<Bytes, String>;
    /// Length, and when it was written by the store's clock in milliseconds.
    async fn head(&self, key: &str) -> Result<(u64, i64), String>;
    async fn list(&self, folder: &str) -> Result<Vec<String>, String>;
    async fn delete(&self, key: &str) -> Result<(), String>;
    async fn multipart(&self, key: &str, parts: Vec<Bytes>) -> Result<(), String>;
}

/// Tries everything that a broker needs of the store that `options` names. Waits are bounded by the options.
///
/// # Errors
/// When the options name no store. What the store cannot do is in the checks.
pub async fn examine(options: &StoreOptions) -> Result<Vec<Check>, OpenError> {
    let folder = format!(".strandline-doctor-{}", random::uuid());
    #[cfg(feature = "aws-sdk")]
    if options.is_s3() {
        let probe = super::s3::S3::connect(options).await?;
        let mut checks = Box::pin(run(&probe, &folder)).await;
        let works = works(&checks);
        checks.extend(if works { aws::own_checks(&probe, &folder).await } else { aws::untried_checks() });
        clean(&probe, &folder, works).await;
        return Ok(checks);
    }
    let probe = generic::Objects::connect(options)?;
    let checks = Box::pin(run(&probe, &folder)).await;
    clean(&probe, &folder, works(&checks)).await;
    Ok(checks)
}

fn check(name: &'static str, result: Result<String, String>, meaning: &'static str) -> Check {
    let (outcome, detail) = match result {
        Ok(detail) => (Outcome::Pass, detail),
        Err(detail) => (Outcome::Fail, detail),
    };
    Check { name, outcome, detail, meaning }
}

/// A check that makes no sense while nothing can be put.
fn untried(name: &'static str, meaning: &'static str) -> Check {
    let detail = "nothing could be put into the store".to_owned();
    Check { name, outcome: Outcome::Untried, detail, meaning }
}

/// The check that all others build on.
const PUT: &str = "put";

/// What else a broker needs, and for what.
const NEEDED: [(&str, &str); 5] = [
    ("ranged get", "Cold reads fetch ranges of segment objects."),
    ("head and clock", "Uploads are verified by length; garbage is judged by age; signatures by time."),
    ("list", "Garbage collection and restore list the bucket."),
    ("multipart", "Segments above 16 MiB are uploaded in parts."),
    ("delete", "Without it retention never frees anything in the bucket."),
];

async fn run(probe: &impl Probe, folder: &str) -> Vec<Check> {
    let written = put(probe, folder).await;
    let reachable = written.is_ok();
    let mut checks = vec![check(PUT, written, "Without it nothing moves to the bucket.")];
    if !reachable {
        // Everything else would say the same thing again.
        checks.extend(NEEDED.map(|(name, meaning)| untried(name, meaning)));
        checks.extend(["conditional put", "conditional puts at once"].map(|name| untried(name, CONDITIONAL)));
        return checks;
    }
    let seen = [
        ranged_get(probe, folder).await,
        clock_skew(probe, folder).await,
        list(probe, folder).await,
        multipart(probe, folder).await,
        delete(probe, folder).await,
    ];
    checks.extend(NEEDED.into_iter().zip(seen).map(|((name, meaning), seen)| check(name, seen, meaning)));
    let (one, many) = conditional(probe, folder).await;
    checks.extend([one, many]);
    checks
}

async fn put(probe: &impl Probe, folder: &str) -> Result<String, String> {
    probe.put(&format!("{folder}/small"), pattern(4096)).await?;
    Ok("an object of 4 KiB was written".to_owned())
}

async fn ranged_get(probe: &impl Probe, folder: &str) -> Result<String, String> {
    let whole = pattern(4096);
    for range in [0..4096, 0..1, 100..1100, 4000..4096] {
        let got = probe.get(&format!("{folder}/small"), range.clone()).await?;
        if Some(&got[..])
            != whole.get(usize::try_from(range.start).unwrap_or(0)..usize::try_from(range.end).unwrap_or(0))
        {
            return Err(format!("bytes {}..{} came back as {} other bytes", range.start, range.end, got.len()));
        }
    }
    Ok("four ranges came back as they were written".to_owned())
}

async fn clock_skew(probe: &impl Probe, folder: &str) -> Result<String, String> {
    let key = format!("{folder}/clock");
    let before = clock::wall_ms();
    probe.put(&key, pattern(100)).await?;
    let after = clock::wall_ms();
    let (bytes, modified_ms) = probe.head(&key).await?;
    if bytes != 100 {
        return Err(format!("an object of 100 bytes is said to have {bytes}"));
    }
    let skew_ms = if modified_ms < before { before - modified_ms } else { (modified_ms - after).max(0) };
    if skew_ms > MOST_SKEW_MS {
        return Err(format!("the store's clock and this machine's are {} s apart", skew_ms / 1000));
    }
    Ok("the length is right and the clocks agree within a minute".to_owned())
}

async fn list(probe: &impl Probe, folder: &str) -> Result<String, String> {
    let keys = probe.list(folder).await?;
    if keys.iter().any(|key| key.ends_with("/small")) {
        Ok(format!("{} objects listed, with what was just written", keys.len()))
    } else {
        Err("an object that was just written is not in the listing".to_owned())
    }
}

async fn multipart(probe: &impl Probe, folder: &str) -> Result<String, String> {
    let key = format!("{folder}/parts");
    let (first, last) = (pattern(PART_BYTES), pattern(1000));
    probe.multipart(&key, vec![first.clone(), last.clone()]).await?;
    let bytes = probe.head(&key).await?.0;
    let edge = PART_BYTES as u64;
    if bytes != edge + 1000 {
        return Err(format!("parts of {PART_BYTES} and 1000 bytes made an object of {bytes}"));
    }
    let got = probe.get(&key, edge - 10..edge + 10).await?;
    if got[..] != [&first[PART_BYTES - 10..], &last[..10]].concat() {
        return Err("the bytes where two parts meet are not what was written".to_owned());
    }
    Ok("two parts became one object".to_owned())
}

async fn delete(probe: &impl Probe, folder: &str) -> Result<String, String> {
    let key = format!("{folder}/clock");
    probe.delete(&key).await?;
    match probe.head(&key).await {
        Ok(_) => {
            Err("a deleted object is still there (versioning keeps old ones, but the name should be gone)".to_owned())
        }
        Err(_) => Ok("a deleted object is gone".to_owned()),
    }
}

const CONDITIONAL: &str =
    "Strandline uses conditional puts where they work and never needs them: without them it is as safe.";

async fn conditional(probe: &impl Probe, folder: &str) -> (Check, Check) {
    let sequential = match probe.put_new(&format!("{folder}/small"), pattern(10)).await {
        Ok(Created::Exists) => (Outcome::Pass, "a put with If-None-Match on an existing object was refused".to_owned()),
        Ok(Created::Yes) => {
            let detail = "the condition is silently ignored: an existing object was overwritten";
            (Outcome::Unsupported, detail.to_owned())
        }
        Ok(Created::NotKnown(reason)) | Err(reason) => (Outcome::Unsupported, reason),
    };
    let works = sequential.0 == Outcome::Pass;
    let concurrent = if works {
        let key = format!("{folder}/race");
        let puts = (0..AT_ONCE).map(|_| probe.put_new(&key, pattern(10)));
        let answers = futures::future::join_all(puts).await;
        let created = answers.iter().filter(|answer| **answer == Ok(Created::Yes)).count();
        let detail = format!("{created} of {AT_ONCE} conditional puts at once succeeded; one should");
        (if created == 1 { Outcome::Pass } else { Outcome::Unsupported }, detail)
    } else {
        (Outcome::Unsupported, "not tried: one at a time does not work either".to_owned())
    };
    let named = |name, (outcome, detail)| Check { name, outcome, detail, meaning: CONDITIONAL };
    (named("conditional put", sequential), named("conditional puts at once", concurrent))
}

/// Whether anything could be put at all.
fn works(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.name != PUT || check.outcome == Outcome::Pass)
}

/// Deletes what the checks wrote: all of it, or the first object alone, whose put failed but may have arrived. A store
/// that cannot delete has said so in its check.
async fn clean(probe: &impl Probe, folder: &str, all: bool) {
    let names = ["small", "clock", "parts", "race", "checksum"];
    for name in names.into_iter().take(if all { names.len() } else { 1 }) {
        if let Err(error) = probe.delete(&format!("{folder}/{name}")).await {
            tracing::debug!(folder, name, error, "left behind");
        }
    }
}

/// Bytes that show when a range is shifted.
fn pattern(bytes: usize) -> Bytes {
    let numbers = (0u32..).flat_map(u32::to_be_bytes);
    numbers.take(bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_store_in_memory_and_a_directory_pass_everything_and_keep_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for url in ["memory://".to_owned(), format!("file://{}/objects", folder.path().display())] {
            let checks = examine(&StoreOptions::new(&url)).await.unwrap();
            assert_eq!(checks.len(), 8);
            for check in checks {
                assert_eq!(check.outcome, Outcome::Pass, "{url}: {check:?}");
            }
        }
        let left = std::fs::read_dir(folder.path().join("objects"))
            .unwrap()
            .flat_map(|entry| std::fs::read_dir(entry.unwrap().path()).unwrap().map(|entry| entry.unwrap().path()));
        assert_eq!(left.collect::<Vec<_>>(), Vec::<std::path::PathBuf>::new());
    }

    /// Found by a user: a store that could not be reached was said to lack what nobody had asked it for.
    #[cfg(feature = "aws-sdk")]
    #[tokio::test]
    async fn what_cannot_be_reached_is_not_judged() {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let keys = crate::tier::Keys { access_key_id: "a".into(), secret_access_key: "b".into() };
        let options = StoreOptions {
            endpoint: Some(format!("http://{nobody}")),
            path_style: Some(true),
            keys: Some(keys),
            ..StoreOptions::new("s3://bucket")
        };
        let checks = examine(&options).await.unwrap();
        assert_eq!(checks.len(), 10, "{checks:?}");
        assert_eq!((checks[0].name, checks[0].outcome), (PUT, Outcome::Fail));
        assert!(checks[0].detail.contains(&format!("http://{nobody}")), "{checks:?}");
        assert!(!checks[0].detail.contains("region"), "a region is not asked of everybody: {checks:?}");
        for check in &checks[1..] {
            assert_eq!(check.outcome, Outcome::Untried, "{check:?}");
        }
    }
}
