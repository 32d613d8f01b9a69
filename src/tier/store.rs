//! One prefix of one object store: its client, and requests with time limits and retries.
//!
//! All object names are relative to the prefix. Requests are retried with growing, jittered pauses until
//! [`ObjectStoreOptions::retry_for`] has passed. A permanent error (missing, denied, unsupported) is returned at once.
//! [`TierStore::stop`] ends every wait.

use std::{collections::BTreeSet, fmt, ops::Range, sync::Arc, time::Duration};

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutPayload, path::Path};
use serde::{Deserialize, Serialize};
use tokio::{sync::Semaphore, time::Instant};

use super::{
    error::{BindingError, TierStoreError},
    folder, name,
    open::{self, ObjectStoreOptions, ObjectStoreOptionsError},
    outage::{Outage, OutageTracker, PROBE_TIMEOUT, SUSPECT_TIMEOUT},
    store_binding::PrefixOwner,
};
use crate::{
    model::{ConfigMap, TopicId, TopicName},
    task::{Tasks, clock, random},
};

/// Maximum number of parts of multipart uploads in flight, of 8 MiB each, over all partitions.
const MAX_CONCURRENT_PARTS: usize = 8;

/// One prefix of one object store. Clones share it.
#[derive(Clone)]
pub struct TierStore {
    pub(super) inner: Arc<TierStoreInner>,
    pub(super) owner: Arc<PrefixOwner>,
}

pub(super) struct TierStoreInner {
    objects: Arc<dyn ObjectStore>,
    prefix: Path,
    /// URL of the store, for messages.
    pub(super) url: String,
    pub(super) cluster: String,
    options: ObjectStoreOptions,
    /// True if the store is a folder of this machine, which may disappear or change while the broker runs.
    pub(super) folder: bool,
    /// Permits for parts of multipart uploads in flight.
    parts: Arc<Semaphore>,
    outages: OutageTracker,
    tasks: Tasks,
}

/// Topic record: content of `topic.json`, from which a restore can create the topic again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicRecord {
    pub name: TopicName,
    pub id: TopicId,
    pub partitions: u32,
    /// Configuration that is set for the topic.
    #[serde(default)]
    pub config: ConfigMap,
}

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Name of the object, below the prefix.
    pub object: String,
    /// Length of the object in bytes.
    pub bytes: u64,
    /// Modification time by the store's clock, in milliseconds since 1970.
    pub modified_ms: i64,
}

impl TierStore {
    /// Creates the client of a store. Sends no request, so a broker starts even if the store is unreachable.
    ///
    /// # Errors
    /// The options are invalid: an unknown scheme, no bucket, an invalid prefix or client setting, or a directory that
    /// cannot be created.
    pub fn open(options: &ObjectStoreOptions, cluster: &str) -> Result<Self, ObjectStoreOptionsError> {
        let (objects, prefix) = open::open(options)?;
        Ok(Self::from_object_store(objects, prefix.as_ref(), options, cluster))
    }

    /// Creates the client for an existing implementation of the store, such as a simulated one.
    pub fn from_object_store(
        objects: Arc<dyn ObjectStore>,
        prefix: &str,
        options: &ObjectStoreOptions,
        cluster: &str,
    ) -> Self {
        let inner = TierStoreInner {
            objects,
            prefix: Path::from(prefix),
            url: options.url.clone(),
            cluster: cluster.to_owned(),
            options: options.clone(),
            folder: options.url.starts_with("file:"),
            parts: Arc::new(Semaphore::new(MAX_CONCURRENT_PARTS)),
            outages: OutageTracker::default(),
            tasks: Tasks::new(),
        };
        Self { inner: Arc::new(inner), owner: Arc::default() }
    }

    /// Returns true if the objects are files in a folder of this machine.
    pub fn is_folder(&self) -> bool {
        self.inner.folder
    }

    /// Returns the outage if it was logged and has not ended.
    pub fn outage(&self) -> Option<Outage> {
        self.inner.outages.outage()
    }

    /// Returns the outage if it is confirmed. Reads from the object store then fail at once until the store responds.
    pub fn confirmed_outage(&self) -> Option<Outage> {
        self.inner.outages.confirmed()
    }

    /// Waits until an outage is confirmed.
    pub async fn wait_until_unavailable(&self) -> Outage {
        self.inner.outages.wait_until_unavailable().await
    }

    /// Waits until an outage has lasted for `time` since its confirmation. Returns at once if that holds already.
    pub(super) async fn wait_until_unavailable_for(&self, time: Duration) -> Outage {
        self.inner.outages.wait_until_unavailable_for(time).await
    }

    /// Sleeps for `pause`. During a confirmed outage, returns as soon as the outage ends.
    pub(super) async fn pause(&self, pause: Duration) {
        self.inner.outages.pause(pause).await;
    }

    /// Waits until there is no confirmed outage.
    pub async fn wait_until_available(&self) {
        self.inner.outages.wait_until_available().await;
    }

    /// Runs the request of a reader. Fails at once if an outage is or becomes confirmed, so that the reader does not
    /// wait.
    pub(super) async fn while_available<T>(
        &self,
        object: &str,
        request: impl Future<Output = Result<T, TierStoreError>>,
    ) -> Result<T, TierStoreError> {
        tokio::select! {
            biased;
            outage = self.wait_until_unavailable() => {
                let reason = format!("the object store has been unavailable {outage}");
                Err(TierStoreError::Unavailable { object: object.to_owned(), reason })
            }
            response = request => response,
        }
    }

    /// Writes or replaces a topic record.
    pub async fn put_topic(&self, topic: &TopicRecord) -> Result<(), BindingError> {
        self.bind().await?;
        let content = serde_json::to_vec_pretty(topic).expect("a plain struct is valid JSON");
        Ok(self.put(&name::topic_object(topic.id), content.into()).await?)
    }

    /// Ends every wait, after which requests fail with `Stopped`, and joins the background tasks.
    pub async fn stop(&self) {
        self.inner.tasks.stop().await;
    }

    /// Returns the URL of the store, for messages.
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    pub(super) fn options(&self) -> &ObjectStoreOptions {
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

    /// Returns the complete path of an object below the prefix.
    pub(super) fn path(&self, object: &str) -> Path {
        object.split('/').fold(self.inner.prefix.clone(), |path, part| path.join(part))
    }

    /// Returns the content of a small object. If the complete store of the cluster is missing, the error is
    /// `Unavailable`, not `NotFound`.
    pub async fn get(&self, object: &str) -> Result<Bytes, TierStoreError> {
        match self.fetch(object).await {
            Err(missing @ TierStoreError::NotFound { .. }) => Err(self.missing_error(missing, object).await),
            response => response,
        }
    }

    /// Returns the content of an object like [`get`](Self::get). A missing object is `NotFound` even if the complete
    /// store is missing.
    pub(super) async fn fetch(&self, object: &str) -> Result<Bytes, TierStoreError> {
        let path = self.path(object);
        self.retry(object, || async { self.inner.objects.get(&path).await?.bytes().await }).await
    }

    /// Returns the error for an object that the store does not contain. The error stays `NotFound` if
    /// [`bind`](Self::bind) succeeds, or if the prefix needs no cluster marker yet. Otherwise the complete store is
    /// missing, as after an unmount, and the error is `Unavailable`, or that of the request for the marker.
    async fn missing_error(&self, missing: TierStoreError, object: &str) -> TierStoreError {
        if !self.must_have_marker() {
            return missing;
        }
        match self.bind().await {
            Ok(()) => missing,
            Err(BindingError::Store(error)) => error,
            Err(error) => TierStoreError::Unavailable { object: object.to_owned(), reason: error.to_string() },
        }
    }

    /// Returns exactly the bytes in `range` of an object. If the object is shorter, the error is `Unavailable` after
    /// the retries.
    pub async fn get_range(&self, object: &str, range: Range<u64>) -> Result<Bytes, TierStoreError> {
        self.get_with(object, range, GetOptions::new()).await
    }

    /// Reads like [`get_range`](Self::get_range), to verify bytes that were written just now: if the store is a folder,
    /// it then drops them from the page cache.
    pub(super) async fn read_back(&self, object: &str, range: Range<u64>) -> Result<Bytes, TierStoreError> {
        self.get_with(object, range, folder::read_back_options()).await
    }

    /// Reads exactly `range` of an object. A response of another length counts as a failed attempt.
    async fn get_with(&self, object: &str, range: Range<u64>, options: GetOptions) -> Result<Bytes, TierStoreError> {
        let path = self.path(object);
        let expected = range.end.saturating_sub(range.start);
        let options = options.with_range(Some(range.clone()));
        let response = self.retry(object, || async {
            let bytes = self.inner.objects.get_opts(&path, options.clone()).await?.bytes().await?;
            let received = bytes.len() as u64;
            if received == expected { Ok(bytes) } else { Err(wrong_length(&range, received)) }
        });
        match response.await {
            Err(missing @ TierStoreError::NotFound { .. }) => Err(self.missing_error(missing, object).await),
            response => response,
        }
    }

    /// Returns the length of an object in bytes.
    pub async fn head(&self, object: &str) -> Result<u64, TierStoreError> {
        let path = self.path(object);
        self.retry(object, || async { Ok(self.inner.objects.head(&path).await?.size) }).await
    }

    /// Returns the modification time of an object by the store's clock, in milliseconds since 1970.
    pub(super) async fn modified_ms(&self, object: &str) -> Result<i64, TierStoreError> {
        let path = self.path(object);
        let modified = self.retry(object, || async { Ok(self.inner.objects.head(&path).await?.last_modified) }).await?;
        Ok(modified.timestamp_millis())
    }

    /// Writes `clock.json` and returns its modification time: the time of the store's clock, in milliseconds since
    /// 1970. Only this clock determines the ages of objects. A broker's own clock may be hours ahead; by that clock, an
    /// object that another broker has just uploaded would be old.
    ///
    /// # Errors
    /// The prefix does not belong to this cluster, or the store does not respond.
    pub async fn clock_ms(&self) -> Result<i64, BindingError> {
        self.bind().await?;
        self.put(name::CLOCK, Bytes::from_static(b"{}")).await?;
        Ok(self.modified_ms(name::CLOCK).await?)
    }

    /// Writes or replaces a small object.
    pub async fn put(&self, object: &str, content: Bytes) -> Result<(), TierStoreError> {
        let path = self.path(object);
        self.retry(object, || async {
            self.inner.objects.put(&path, PutPayload::from_bytes(content.clone())).await.map(drop)
        })
        .await
    }

    /// Writes an object if it does not exist. Success means only that an object of this name exists now, perhaps with
    /// other content.
    pub(super) async fn put_if_absent(&self, object: &str, content: Bytes) -> Result<(), TierStoreError> {
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

    /// Deletes an object. A missing object is no error.
    pub async fn delete(&self, object: &str) -> Result<(), TierStoreError> {
        let path = self.path(object);
        let deleted = self.retry(object, || self.inner.objects.delete(&path)).await;
        match deleted {
            Err(TierStoreError::NotFound { .. }) => Ok(()),
            result => result,
        }
    }

    /// Returns all objects below a folder, at any depth.
    pub async fn list(&self, folder: &str) -> Result<Vec<ObjectInfo>, TierStoreError> {
        let path = self.path(folder);
        let metas = self.retry(folder, || self.inner.objects.list(Some(&path)).try_collect::<Vec<_>>()).await?;
        let listed = metas.into_iter().map(|meta| ObjectInfo {
            object: self.relative(&meta.location),
            bytes: meta.size,
            modified_ms: meta.last_modified.timestamp_millis(),
        });
        Ok(listed.collect())
    }

    /// Returns the names of the folders directly in a folder.
    pub async fn folders(&self, folder: &str) -> Result<Vec<String>, TierStoreError> {
        let path = self.path(folder);
        let listing = self.retry(folder, || self.inner.objects.list_with_delimiter(Some(&path))).await?;
        Ok(listing.common_prefixes.iter().filter_map(|path| path.filename()).map(str::to_owned).collect())
    }

    /// Returns those of the topics that have an object. A folder alone does not count, because a directory as store
    /// keeps empty folders.
    pub async fn topics_with_objects(&self, topics: &BTreeSet<TopicId>) -> Result<BTreeSet<TopicId>, TierStoreError> {
        let mut found = BTreeSet::new();
        for folder in self.folders(name::TOPICS).await? {
            let topic = folder.parse::<TopicId>().ok().filter(|topic| topics.contains(topic));
            let Some(topic) = topic else { continue };
            if !self.list(&name::topic_folder(topic)).await?.is_empty() {
                found.insert(topic);
            }
        }
        Ok(found)
    }

    /// Returns a path without the prefix.
    fn relative(&self, path: &Path) -> String {
        let (path, prefix) = (path.as_ref(), self.inner.prefix.as_ref());
        path.strip_prefix(prefix).unwrap_or(path).trim_start_matches('/').to_owned()
    }

    /// Sends a request until it succeeds, fails permanently, `retry_for` has passed, or the store is stopping. Each
    /// attempt has a time limit, and its outcome is reported to the outage tracker.
    pub(super) async fn retry<T, F, Fut>(&self, object: &str, mut request: F) -> Result<T, TierStoreError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = object_store::Result<T>>,
    {
        let options = &self.inner.options;
        let attempt = || {
            let (sent, request) = (clock::monotonic(), request());
            async move {
                let mut response = std::pin::pin!(tokio::time::timeout(options.request_timeout, request));
                let response = tokio::select! {
                    biased;
                    response = &mut response => response,
                    () = tokio::time::sleep(SUSPECT_TIMEOUT) => {
                        self.suspect(sent, &format!("no response for {SUSPECT_TIMEOUT:?}"));
                        response.await
                    }
                };
                let response = match response {
                    Ok(response) => response.map_err(|error| TierStoreError::new(object, &error)),
                    Err(_) => {
                        let reason = format!("no response within {:?}", options.request_timeout);
                        Err(TierStoreError::Unavailable { object: object.to_owned(), reason })
                    }
                };
                match outage_reason(&response) {
                    Some(reason) => self.suspect(sent, &reason),
                    None => self.inner.outages.on_reply(&self.inner.url),
                }
                response
            }
        };
        let inner = Arc::clone(&self.inner);
        let pause = move |pause| {
            let inner = Arc::clone(&inner);
            async move { inner.outages.pause(pause).await }
        };
        let retried =
            attempt.retry(self.pauses()).sleep(pause).when(TierStoreError::retryable).notify(|error, pause| {
                tracing::debug!(object, %error, ?pause, "object store request failed, retrying");
            });
        // Not `run_until_cancelled`: the compiler cannot prove that a generic future around this one is `Send`.
        tokio::select! {
            biased;
            () = self.inner.tasks.cancelled() => Err(TierStoreError::Stopped),
            response = retried => response,
        }
    }

    /// Reports a request that failed, or has had no response for [`SUSPECT_TIMEOUT`], to the outage tracker. Starts the
    /// probes, unless they are running.
    fn suspect(&self, sent: Instant, reason: &str) {
        if self.inner.outages.on_failure(&self.inner.url, sent, reason) && !self.inner.tasks.is_cancelled() {
            let store = self.clone();
            self.inner.tasks.spawn_until_cancelled("object-store-probe", async move { store.probe().await });
        }
    }

    /// Sends probes until no outage is suspected: requests for the small cluster marker, one at a time. Reports each
    /// outcome to the outage tracker.
    async fn probe(&self) {
        let path = self.path(name::CLUSTER);
        while let Some(pause) = self.inner.outages.next_probe() {
            tokio::time::sleep(pause).await;
            let sent = clock::monotonic();
            let request = async { self.inner.objects.get(&path).await?.bytes().await };
            let response = match tokio::time::timeout(PROBE_TIMEOUT, request).await {
                Ok(response) => response.map_err(|error| TierStoreError::new(name::CLUSTER, &error)),
                Err(_elapsed) => {
                    let reason = format!("no response within {PROBE_TIMEOUT:?}");
                    Err(TierStoreError::Unavailable { object: name::CLUSTER.to_owned(), reason })
                }
            };
            match outage_reason(&response) {
                Some(reason) => self.inner.outages.on_probe_failure(&self.inner.url, sent, &reason),
                None => self.inner.outages.on_reply(&self.inner.url),
            }
        }
    }

    /// Returns the pauses between attempts: from 50 ms, doubling, jittered, at most 5 s each, and `retry_for` in total.
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

/// Returns the reason why a response may indicate an outage. Returns `None` if the response shows that the store works.
fn outage_reason<T>(response: &Result<T, TierStoreError>) -> Option<String> {
    match response {
        Err(TierStoreError::Unavailable { reason, .. }) => Some(reason.clone()),
        Err(TierStoreError::Denied { reason, .. }) => {
            Some(format!("access is denied ({reason}): check the credentials and the bucket's policy"))
        }
        _ => None,
    }
}

/// Returns the error for a response with another number of bytes than the requested range.
fn wrong_length(range: &Range<u64>, received: u64) -> object_store::Error {
    let text = format!("bytes {}..{} were requested, and {received} bytes were returned", range.start, range.end);
    object_store::Error::Generic { store: "range", source: text.into() }
}

impl fmt::Debug for TierStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TierStore").field("url", &self.inner.url).finish_non_exhaustive()
    }
}
