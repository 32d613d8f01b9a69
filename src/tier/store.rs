//! One prefix of one object store: opening it by URL, owning it, and plain requests with time limits and retries.
//!
//! Everything below takes names relative to the prefix. Requests are retried with growing, jittered pauses until
//! [`StoreOptions::retry_for`] has passed; what cannot get better (missing, refused, not allowed) is answered at once.
//! [`Store::stop`] ends every wait.

use std::{
    collections::BTreeSet,
    fmt,
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutPayload, path::Path};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{OnceCell, Semaphore, watch},
    time::Instant,
};
use uuid::Uuid;

use super::{
    claim::{ClaimError, StoreNotes},
    folder, name,
    open::{self, OpenError, StoreOptions},
    reach::{DOUBT_AFTER, Outage, PROBE_TIMEOUT, Reach},
};
use crate::{
    model::{ConfigMap, TopicId, TopicName},
    task::{Tasks, clock, random},
};

/// Most parts of multipart uploads, of 8 MiB each, that are in memory at the same time, over all partitions.
const UPLOAD_PARTS: usize = 8;

/// One prefix of one object store. Clones share it.
#[derive(Clone)]
pub struct Store {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    objects: Arc<dyn ObjectStore>,
    prefix: Path,
    /// The URL for messages.
    pub(super) place: String,
    pub(super) cluster: String,
    options: StoreOptions,
    /// Whether it is a folder of this machine, which may go or change while we run.
    pub(super) folder: bool,
    /// The prefix is ours, by the card with this id.
    pub(super) claimed: OnceCell<Option<Uuid>>,
    /// Why a broker must not run with this store, once that is known.
    pub(super) refused: watch::Sender<Option<String>>,
    /// The cluster has objects in its store, so an empty prefix is not it.
    expected: AtomicBool,
    /// The cluster generation; 0 while it is not known.
    pub(super) generation: AtomicU64,
    /// What remembers which store is the cluster's.
    pub(super) notes: OnceLock<Arc<dyn StoreNotes>>,
    parts: Arc<Semaphore>,
    reach: Reach,
    tasks: Tasks,
}

/// A request that did not succeed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// No object has this name.
    #[error("object {object} does not exist")]
    NotFound {
        /// Its name, below the prefix.
        object: String,
    },
    /// The store refuses our credentials, or they may not do this.
    #[error(
        "the object store does not allow this on {object}: {reason}; check the credentials and the bucket's policy"
    )]
    Denied {
        /// The object's name, below the prefix.
        object: String,
        /// What the store said.
        reason: String,
    },
    /// The store did not answer, or answered that it cannot now.
    #[error("the object store could not serve {object}: {reason}")]
    Unavailable {
        /// The object's name, below the prefix.
        object: String,
        /// What happened last.
        reason: String,
    },
    /// The store does not know this operation.
    #[error("the object store cannot do this on {object}: {reason}")]
    Unsupported {
        /// The object's name, below the prefix.
        object: String,
        /// What the store said.
        reason: String,
    },
    /// The store was stopped.
    #[error("the object store's client is stopping")]
    Stopped,
}

impl StoreError {
    /// Whether the same request may succeed later, without anybody's help.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    pub(super) fn new(object: &str, error: &object_store::Error) -> Self {
        use object_store::Error as E;
        let (object, reason) = (object.to_owned(), reason(error));
        match error {
            E::NotFound { .. } => Self::NotFound { object },
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => Self::Denied { object, reason },
            E::NotImplemented { .. }
            | E::NotSupported { .. }
            | E::InvalidPath { .. }
            | E::UnknownConfigurationKey { .. } => Self::Unsupported { object, reason },
            _ => Self::Unavailable { object, reason },
        }
    }
}

/// An error with its causes, each said once and in one line. Of a connection that was refused no more than by whom.
pub(super) fn reason(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    if innermost.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused) {
        let text = error.to_string();
        return address(&text).map_or_else(String::new, |address| format!("{address}: ")) + "connection refused";
    }
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(500).collect()
}

/// Scheme, host and port of the first URL in a text.
fn address(text: &str) -> Option<&str> {
    let colon = text.find("://")?;
    let start = text[..colon].rfind(|c: char| !c.is_ascii_alphanumeric()).map_or(0, |before| before + 1);
    let host = colon + "://".len();
    let end = text[host..].find(['/', ' ', '"', ')']).map_or(text.len(), |length| host + length);
    Some(&text[start..end])
}

/// The content of `topic.json`: what a restore needs to make the topic again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicRecord {
    /// The topic's name.
    pub name: TopicName,
    /// Its id.
    pub id: TopicId,
    /// How many partitions it has.
    pub partitions: u32,
    /// What its configuration sets.
    #[serde(default)]
    pub config: ConfigMap,
}

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name, below the prefix.
    pub object: String,
    /// Its length.
    pub bytes: u64,
    /// When it was written, by the store's clock, in milliseconds since 1970.
    pub modified_ms: i64,
}

impl Store {
    /// Makes a client for a store. Nothing is asked of the store yet: an unreachable one does not keep a broker from
    /// starting.
    ///
    /// # Errors
    /// When the options make no sense: an unknown scheme, no bucket, a directory that cannot be made.
    pub fn open(options: &StoreOptions, cluster: &str) -> Result<Self, OpenError> {
        let (objects, prefix) = open::open(options)?;
        Ok(Self::over(objects, prefix.as_ref(), options, cluster))
    }

    /// A store over a given implementation, for one that lives in this process.
    pub fn over(objects: Arc<dyn ObjectStore>, prefix: &str, options: &StoreOptions, cluster: &str) -> Self {
        let inner = Inner {
            objects,
            prefix: Path::from(prefix),
            place: options.url.clone(),
            cluster: cluster.to_owned(),
            options: options.clone(),
            folder: options.url.starts_with("file:"),
            claimed: OnceCell::new(),
            refused: watch::Sender::new(None),
            expected: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            notes: OnceLock::new(),
            parts: Arc::new(Semaphore::new(UPLOAD_PARTS)),
            reach: Reach::default(),
            tasks: Tasks::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Whether the objects are files in a folder of this machine.
    pub fn is_folder(&self) -> bool {
        self.inner.folder
    }

    /// The outage that the log has named and that is not over.
    pub fn outage(&self) -> Option<Outage> {
        self.inner.reach.outage()
    }

    /// The outage as soon as it is certain: from then on reads of history fail at once, until the store answers again.
    pub fn away(&self) -> Option<Outage> {
        self.inner.reach.away()
    }

    /// Waits until it is known that a broker must not run with this store: why.
    pub async fn until_refused(&self) -> String {
        let mut refused = self.inner.refused.subscribe();
        let why = refused.wait_for(Option::is_some).await.expect("the sender is in self").clone();
        why.expect("it was waited for")
    }

    /// Waits until the store is away.
    pub async fn until_away(&self) -> Outage {
        self.inner.reach.until_away().await
    }

    /// Waits until it has been known for so long that the store is away; not at all where it has been.
    pub(super) async fn until_away_for(&self, time: Duration) -> Outage {
        self.inner.reach.until_away_for(time).await
    }

    /// Sleeps for so long, or until an outage is over.
    pub(super) async fn pause(&self, pause: Duration) {
        self.inner.reach.pause(pause).await;
    }

    /// Waits until the store is not away.
    pub async fn until_back(&self) {
        self.inner.reach.until_back().await;
    }

    /// Makes a request for a reader, who is not kept waiting for a store that is away.
    pub(super) async fn unless_away<T>(
        &self,
        object: &str,
        request: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        tokio::select! {
            biased;
            outage = self.until_away() => {
                let reason = format!("the store has served nothing {outage}");
                Err(StoreError::Unavailable { object: object.to_owned(), reason })
            }
            answer = request => answer,
        }
    }

    /// From now on a prefix that nobody has is not taken: the metadata names objects, which must be in another place.
    pub fn expect_history(&self) {
        self.inner.expected.store(true, Ordering::Release);
    }

    /// From now on a claim holds only for the store that is noted there, and notes the one that it finds where none is.
    pub fn go_by(&self, notes: Arc<dyn StoreNotes>) {
        drop(self.inner.notes.set(notes));
    }

    /// From now on a claim holds only where the prefix is of no later cluster generation, and writes this one into a card of an earlier.
    pub fn in_generation(&self, generation: u64) {
        self.inner.generation.store(generation, Ordering::Release);
    }

    pub(super) fn is_expected(&self) -> bool {
        self.inner.claimed.initialized() || self.inner.expected.load(Ordering::Acquire)
    }

    /// Writes or replaces a topic's description.
    pub async fn put_topic(&self, topic: &TopicRecord) -> Result<(), ClaimError> {
        self.claim().await?;
        let content = serde_json::to_vec_pretty(topic).expect("a plain struct");
        Ok(self.put(&name::topic_object(topic.id), content.into()).await?)
    }

    /// Ends every wait and joins what runs in the background.
    pub async fn stop(&self) {
        self.inner.tasks.stop().await;
    }

    /// The URL that it was opened with, for messages.
    pub fn place(&self) -> &str {
        &self.inner.place
    }

    pub(super) fn options(&self) -> &StoreOptions {
        &self.inner.options
    }

    pub(super) fn objects(&self) -> &Arc<dyn ObjectStore> {
        &self.inner.objects
    }

    pub(super) fn parts(&self) -> &Arc<Semaphore> {
        &self.inner.parts
    }

    pub(super) fn tasks(&self) -> &Tasks {
        &self.inner.tasks
    }

    pub(super) fn path(&self, object: &str) -> Path {
        object.split('/').fold(self.inner.prefix.clone(), |path, part| path.join(part))
    }

    /// The whole of a small object.
    pub async fn get(&self, object: &str) -> Result<Bytes, StoreError> {
        match self.fetch(object).await {
            Err(missing @ StoreError::NotFound { .. }) => Err(self.missing(missing, object).await),
            answer => answer,
        }
    }

    pub(super) async fn fetch(&self, object: &str) -> Result<Bytes, StoreError> {
        let path = self.path(object);
        self.retry(object, || async { self.inner.objects.get(&path).await?.bytes().await }).await
    }

    /// An object is missing only where the rest of the store is there: else all of it is away, and may come back.
    async fn missing(&self, missing: StoreError, object: &str) -> StoreError {
        if !self.is_expected() {
            return missing;
        }
        match self.claim().await {
            Ok(()) => missing,
            Err(ClaimError::Store(error)) => error,
            Err(error) => StoreError::Unavailable { object: object.to_owned(), reason: error.to_string() },
        }
    }

    /// Exactly these bytes of an object. Fewer, because the object is shorter, is `Unavailable` after the retries.
    pub async fn get_range(&self, object: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.get_with(object, range, GetOptions::new()).await
    }

    /// As [`get_range`](Self::get_range), for bytes that were written just now: a folder then keeps them on its disk alone.
    pub(super) async fn read_back(&self, object: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.get_with(object, range, folder::read_back_options()).await
    }

    async fn get_with(&self, object: &str, range: Range<u64>, options: GetOptions) -> Result<Bytes, StoreError> {
        let path = self.path(object);
        let wanted = range.end.saturating_sub(range.start);
        let options = options.with_range(Some(range.clone()));
        let answer = self.retry(object, || async {
            let bytes = self.inner.objects.get_opts(&path, options.clone()).await?.bytes().await?;
            let got = bytes.len() as u64;
            if got == wanted { Ok(bytes) } else { Err(short(&range, got)) }
        });
        match answer.await {
            Err(missing @ StoreError::NotFound { .. }) => Err(self.missing(missing, object).await),
            answer => answer,
        }
    }

    /// An object's length.
    pub async fn head(&self, object: &str) -> Result<u64, StoreError> {
        let path = self.path(object);
        self.retry(object, || async { Ok(self.inner.objects.head(&path).await?.size) }).await
    }

    /// When an object was written, by the store's clock, in milliseconds since 1970.
    pub(super) async fn modified_ms(&self, object: &str) -> Result<i64, StoreError> {
        let path = self.path(object);
        let modified = self.retry(object, || async { Ok(self.inner.objects.head(&path).await?.last_modified) }).await?;
        Ok(modified.timestamp_millis())
    }

    /// What time it is at the store, in milliseconds since 1970: when it says that an object was written which was written just now. Ages
    /// of objects are told by this clock alone. By a broker's own, which may be hours ahead, what another one has just uploaded would
    /// be old.
    ///
    /// # Errors
    /// When the prefix is not ours, or the store does not answer.
    pub async fn clock_ms(&self) -> Result<i64, ClaimError> {
        self.claim().await?;
        self.put(name::CLOCK, Bytes::from_static(b"{}")).await?;
        Ok(self.modified_ms(name::CLOCK).await?)
    }

    /// Writes a small object, whatever is there.
    pub async fn put(&self, object: &str, content: Bytes) -> Result<(), StoreError> {
        let path = self.path(object);
        self.retry(object, || async {
            self.inner.objects.put(&path, PutPayload::from_bytes(content.clone())).await.map(drop)
        })
        .await
    }

    /// Writes an object if there is none. Success says only that there is one now.
    pub(super) async fn put_if_absent(&self, object: &str, content: Bytes) -> Result<(), StoreError> {
        let path = self.path(object);
        self.retry(object, || async {
            let payload = PutPayload::from_bytes(content.clone());
            match self.inner.objects.put_opts(&path, payload, PutMode::Create.into()).await {
                Ok(_) | Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                    Ok(())
                }
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Deletes an object; one that is not there is deleted.
    pub async fn delete(&self, object: &str) -> Result<(), StoreError> {
        let path = self.path(object);
        let deleted = self.retry(object, || self.inner.objects.delete(&path)).await;
        match deleted {
            Err(StoreError::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    /// All objects below a folder.
    pub async fn list(&self, folder: &str) -> Result<Vec<Listed>, StoreError> {
        let path = self.path(folder);
        let metas = self.retry(folder, || self.inner.objects.list(Some(&path)).try_collect::<Vec<_>>()).await?;
        let listed = metas.into_iter().map(|meta| Listed {
            object: self.relative(&meta.location),
            bytes: meta.size,
            modified_ms: meta.last_modified.timestamp_millis(),
        });
        Ok(listed.collect())
    }

    /// The names of the folders that lie directly in a folder.
    pub async fn folders(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let path = self.path(folder);
        let listing = self.retry(folder, || self.inner.objects.list_with_delimiter(Some(&path))).await?;
        Ok(listing.common_prefixes.iter().filter_map(|path| path.filename()).map(str::to_owned).collect())
    }

    /// Which of these topics there is any object of. A folder alone is nothing: a directory as store keeps empty ones.
    pub async fn held(&self, topics: &BTreeSet<TopicId>) -> Result<BTreeSet<TopicId>, StoreError> {
        let mut held = BTreeSet::new();
        for folder in self.folders(name::TOPICS).await? {
            let topic = folder.parse::<TopicId>().ok().filter(|topic| topics.contains(topic));
            let Some(topic) = topic else { continue };
            if !self.list(&name::topic_folder(topic)).await?.is_empty() {
                held.insert(topic);
            }
        }
        Ok(held)
    }

    fn relative(&self, path: &Path) -> String {
        let (path, prefix) = (path.as_ref(), self.inner.prefix.as_ref());
        path.strip_prefix(prefix).unwrap_or(path).trim_start_matches('/').to_owned()
    }

    /// Runs a request until it succeeds, cannot, or has taken too long.
    pub(super) async fn retry<T, F, Fut>(&self, object: &str, mut request: F) -> Result<T, StoreError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = object_store::Result<T>>,
    {
        let options = &self.inner.options;
        let attempt = || {
            let (sent, request) = (clock::monotonic(), request());
            async move {
                let mut answer = std::pin::pin!(tokio::time::timeout(options.request_timeout, request));
                let answer = tokio::select! {
                    biased;
                    answer = &mut answer => answer,
                    () = tokio::time::sleep(DOUBT_AFTER) => {
                        self.doubt(sent, &format!("no answer for {DOUBT_AFTER:?}"));
                        answer.await
                    }
                };
                let answer = match answer {
                    Ok(answer) => answer.map_err(|error| StoreError::new(object, &error)),
                    Err(_) => {
                        let reason = format!("no answer within {:?}", options.request_timeout);
                        Err(StoreError::Unavailable { object: object.to_owned(), reason })
                    }
                };
                match outage_reason(&answer) {
                    Some(why) => self.doubt(sent, &why),
                    None => self.inner.reach.answered(&self.inner.place),
                }
                answer
            }
        };
        let inner = Arc::clone(&self.inner);
        let pause = move |pause| {
            let inner = Arc::clone(&inner);
            async move { inner.reach.pause(pause).await }
        };
        let retried = attempt.retry(self.pauses()).sleep(pause).when(StoreError::retryable).notify(|error, pause| {
            tracing::debug!(object, %error, ?pause, "object store request failed, asking again");
        });
        tokio::select! {
            biased;
            () = self.inner.tasks.cancelled() => Err(StoreError::Stopped),
            answer = retried => answer,
        }
    }

    /// A request failed, or has had no answer for long. Probes find out whether the store is away.
    fn doubt(&self, sent: Instant, why: &str) {
        if self.inner.reach.failed(&self.inner.place, sent, why) && !self.inner.tasks.is_cancelled() {
            let store = self.clone();
            self.inner.tasks.spawn("object store probe", async move {
                tokio::select! {
                    biased;
                    () = store.inner.tasks.cancelled() => {}
                    () = store.probe() => {}
                }
            });
        }
    }

    /// Asks for a small object until the store answers.
    async fn probe(&self) {
        let path = self.path(name::CLUSTER);
        while let Some(pause) = self.inner.reach.next_probe() {
            tokio::time::sleep(pause).await;
            let sent = clock::monotonic();
            let request = async { self.inner.objects.get(&path).await?.bytes().await };
            let answer = match tokio::time::timeout(PROBE_TIMEOUT, request).await {
                Ok(answer) => answer.map_err(|error| StoreError::new(name::CLUSTER, &error)),
                Err(_elapsed) => {
                    let reason = format!("no answer within {PROBE_TIMEOUT:?}");
                    Err(StoreError::Unavailable { object: name::CLUSTER.to_owned(), reason })
                }
            };
            match outage_reason(&answer) {
                Some(why) => self.inner.reach.probe_failed(&self.inner.place, sent, &why),
                None => self.inner.reach.answered(&self.inner.place),
            }
        }
    }

    /// The pauses between attempts: from 50 ms, doubling, jittered, at most 5 s each and `retry_for` together.
    pub(super) fn pauses(&self) -> ExponentialBuilder {
        ExponentialBuilder::new()
            .with_jitter()
            .with_jitter_seed(random::bits())
            .with_min_delay(Duration::from_millis(50))
            .with_max_delay(Duration::from_secs(5))
            .with_total_delay(Some(self.inner.options.retry_for))
            .without_max_times()
    }
}

/// Why an answer is a sign that the store serves nothing; `None` where it serves.
fn outage_reason<T>(answer: &Result<T, StoreError>) -> Option<String> {
    match answer {
        Err(StoreError::Unavailable { reason, .. }) => Some(reason.clone()),
        Err(StoreError::Denied { reason, .. }) => {
            Some(format!("it does not allow this: {reason}; check the credentials and the bucket's policy"))
        }
        _ => None,
    }
}

fn short(range: &Range<u64>, got: u64) -> object_store::Error {
    let text = format!("bytes {}..{} were asked for and {got} came", range.start, range.end);
    object_store::Error::Generic { store: "range", source: text.into() }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("place", &self.inner.place).finish_non_exhaustive()
    }
}
