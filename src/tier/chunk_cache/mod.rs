//! Cache of the object store for all partitions of a broker: parsed manifests, pages and footers, and aligned chunks of
//! segment objects.
//!
//! # Overview
//!
//! Chunks are cached in memory, and repeatedly fetched ones also in a folder (`disk`). All readers that wait for a
//! chunk share one fetch. A fetch that has begun continues even if all readers stop waiting. A chunk is written to the
//! folder when it is fetched from the object store for the second time. So a reader that reads history once does not
//! write all of it to the disk that appends wait for. The reader also evicts no chunks from the folder.
//!
//! # Invariants
//!
//! - All cached objects are immutable and their names unique, so nothing in the cache is ever stale.
//! - A corrupt chunk is evicted and fetched again.
//! - Each start deletes the chunks in the folder. Its files have a checksum, and losing them costs only requests.

mod disk;

use std::{io, ops::Range, path::PathBuf, sync::Arc};

use bytes::Bytes;
use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use moka::{future::Cache as Moka, policy::EvictionPolicy};
use tokio::sync::Semaphore;
use uuid::Uuid;

use self::disk::DiskCache;
use super::{
    error::{TierReadError, TierStoreError},
    files,
    footer::Footer,
    manifest::{ManifestPage, ManifestRoot, SegmentEntry},
    single_flight::SingleFlight,
    store::TierStore,
};
use crate::telemetry::{Counter, Metrics};

/// Size of a chunk in bytes. An object's last chunk may be shorter.
pub(super) const CHUNK_BYTES: u64 = 1 << 20;

/// Manifests, pages and footers get the memory of the cache divided by this number.
const PARSED_DIVISOR: u64 = 4;

/// Maximum number of concurrent fetches of single chunks. No budget counts their memory.
const MAX_CONCURRENT_FETCHES: usize = 32;

/// Maximum number of concurrent fetches of manifests, pages and footers. They have permits of their own, so that
/// uploads and retention continue while reads of a slow object store hold all permits for chunks.
const MAX_CONCURRENT_PARSES: usize = 16;

/// Maximum number of chunks that one read-ahead request fetches. Object stores charge for each request, so one request
/// for several chunks is cheaper.
const MAX_REQUEST_CHUNKS: u64 = 4;

/// Location and limits of the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkCacheOptions {
    /// Memory limit in bytes.
    pub memory_bytes: u64,
    /// Folder for chunks, and the limit of their size in bytes; `None` for no cache on disk. Opening the cache deletes
    /// the chunks in the folder.
    pub disk: Option<(PathBuf, u64)>,
    /// Data directory, if the folder lies in it. The folder must then not be a symbolic link.
    pub data_dir: Option<PathBuf>,
    /// Maximum bytes in flight that are fetched ahead of sequential readers, over all readers.
    pub read_ahead_bytes: u64,
}

impl Default for ChunkCacheOptions {
    fn default() -> Self {
        Self { memory_bytes: 128 << 20, disk: None, data_dir: None, read_ahead_bytes: 32 << 20 }
    }
}

/// One chunk of one segment object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct ChunkKey {
    attempt: Uuid,
    index: u64,
}

impl ChunkKey {
    fn file(&self) -> String {
        format!("{}-{}{}", self.attempt.simple(), self.index, files::CHUNK)
    }
}

/// A request for adjacent chunks, which the fetches of these chunks share.
type InFlightFetch = Shared<BoxFuture<'static, Result<Bytes, TierReadError>>>;

/// The parsed form of a manifest root, a manifest page or a footer.
#[derive(Clone)]
pub(super) enum CachedMetadata {
    Root(Arc<ManifestRoot>),
    Page(Arc<ManifestPage>),
    Footer(Arc<Footer>),
}

impl CachedMetadata {
    /// Returns the approximate memory of the parsed form.
    fn bytes(&self) -> usize {
        64 + match self {
            Self::Root(root) => (root.pages().len() + root.segments().len()) * size_of::<SegmentEntry>(),
            Self::Page(page) => std::mem::size_of_val(page.segments()),
            Self::Footer(footer) => footer.index.len() * 24 + footer.epochs.len() * 16 + footer.producers.len(),
        }
    }
}

/// The cache of a broker. Clones share it.
#[derive(Clone)]
pub struct ChunkCache {
    inner: Arc<ChunkCacheInner>,
}

struct ChunkCacheInner {
    chunks: Moka<ChunkKey, Bytes>,
    chunk_flights: Arc<SingleFlight<ChunkKey, Bytes>>,
    parsed: Moka<Uuid, CachedMetadata>,
    parsed_flights: Arc<SingleFlight<Uuid, CachedMetadata>>,
    disk: Option<Arc<DiskCache>>,
    hits: Counter,
    misses: Counter,
    /// Permits to fetch single chunks.
    fetches: Semaphore,
    /// Permits to fetch manifests, pages and footers.
    parses: Semaphore,
    /// Permits for chunks that are being fetched ahead of readers, one for each chunk.
    read_ahead: Arc<Semaphore>,
    /// Maximum number of chunks that one read-ahead request fetches.
    max_request_chunks: u64,
}

impl ChunkCache {
    /// Opens the cache, which counts its hits and misses in `metrics`. Blocks on the file system.
    ///
    /// # Errors
    /// The folder cannot be created, or its chunks cannot be deleted.
    pub fn open(options: &ChunkCacheOptions, metrics: &Metrics) -> io::Result<Self> {
        let parsed_bytes = options.memory_bytes / PARSED_DIVISOR;
        // Without memory a prefetched chunk would be evicted before its reader needs it, and be fetched twice.
        let read_ahead_chunks = if options.memory_bytes == 0 { 0 } else { options.read_ahead_bytes / CHUNK_BYTES };
        let inner = ChunkCacheInner {
            // Evicts the least recently used chunk, not the least frequently used one. A prefetched chunk was not used
            // yet, and must remain until its reader needs it.
            chunks: Moka::builder()
                .eviction_policy(EvictionPolicy::lru())
                .max_capacity(options.memory_bytes - parsed_bytes)
                .weigher(|_, chunk: &Bytes| weight(chunk.len() + 128))
                .build(),
            chunk_flights: Arc::default(),
            parsed: Moka::builder()
                .eviction_policy(EvictionPolicy::lru())
                .max_capacity(parsed_bytes)
                .weigher(|_, parsed: &CachedMetadata| weight(parsed.bytes()))
                .build(),
            parsed_flights: Arc::default(),
            disk: options
                .disk
                .as_ref()
                .map(|(folder, bytes)| DiskCache::open(folder, options.data_dir.as_deref(), *bytes).map(Arc::new))
                .transpose()?,
            hits: metrics.cache_hits.clone(),
            misses: metrics.cache_misses.clone(),
            fetches: Semaphore::new(MAX_CONCURRENT_FETCHES),
            parses: Semaphore::new(MAX_CONCURRENT_PARSES),
            read_ahead: Arc::new(Semaphore::new(usize::try_from(read_ahead_chunks).unwrap_or(0))),
            max_request_chunks: read_ahead_chunks.clamp(1, MAX_REQUEST_CHUNKS),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns a parsed object by the attempt in its name. If the object is not cached, runs `load` and caches the
    /// result; concurrent callers wait for the same load.
    pub(super) async fn get_parsed<F>(
        &self,
        store: &TierStore,
        attempt: Uuid,
        load: F,
    ) -> Result<CachedMetadata, TierReadError>
    where
        F: Future<Output = Result<CachedMetadata, TierReadError>> + Send + 'static,
    {
        if let Some(parsed) = self.inner.parsed.get(&attempt).await {
            return Ok(parsed);
        }
        let inner = Arc::clone(&self.inner);
        let load = || async move {
            let _permit = inner.parses.acquire().await.expect("the semaphore is never closed");
            // While this fetch waited for its permit, all callers may have stopped waiting.
            if inner.parsed_flights.remove_if_abandoned(attempt) {
                return Err(TierStoreError::Stopped.into());
            }
            if let Some(parsed) = inner.parsed.get(&attempt).await {
                return Ok(parsed);
            }
            let parsed = load.await?;
            inner.parsed.insert(attempt, parsed.clone()).await;
            Ok(parsed)
        };
        self.inner.parsed_flights.join(store.tasks(), attempt, load).await.0
    }

    /// Caches the parsed form of an object that this broker has written.
    pub(super) async fn put_parsed(&self, attempt: Uuid, parsed: CachedMetadata) {
        self.inner.parsed.insert(attempt, parsed).await;
    }

    /// Returns chunk `index` of a segment object, and true if the chunk was in memory or in flight. False means that
    /// the caller waited for a fetch that it started.
    pub(super) async fn chunk(
        &self,
        store: &TierStore,
        object: &str,
        entry: &SegmentEntry,
        index: u64,
    ) -> Result<(Bytes, bool), TierReadError> {
        let key = ChunkKey { attempt: entry.stamp.attempt, index };
        if let Some(chunk) = self.inner.chunks.get(&key).await {
            self.inner.hits.inc();
            return Ok((chunk, true));
        }
        let (chunk, joined) = self.fetch_once_from(store, object, *entry, index, None).await;
        let chunk = chunk?;
        if joined {
            self.inner.hits.inc();
        }
        Ok((chunk, joined))
    }

    /// Runs `fetch` for a chunk that is not in memory and stores the result in memory, or waits for the fetch in
    /// flight. Also returns true if a fetch was in flight already.
    fn fetch_once<F>(
        &self,
        store: &TierStore,
        key: ChunkKey,
        fetch: F,
    ) -> impl Future<Output = (Result<Bytes, TierReadError>, bool)> + Send + use<F>
    where
        F: Future<Output = Result<Bytes, TierReadError>> + Send + 'static,
    {
        let inner = Arc::clone(&self.inner);
        let load = move || async move {
            if let Some(chunk) = inner.chunks.get(&key).await {
                return Ok(chunk);
            }
            let chunk = fetch.await?;
            inner.chunks.insert(key, chunk.clone()).await;
            Ok(chunk)
        };
        self.inner.chunk_flights.join(store.tasks(), key, load)
    }

    /// Evicts corrupt chunks of a segment from memory and from the folder.
    pub(super) async fn evict(&self, entry: &SegmentEntry, indexes: Range<u64>) {
        // A write in progress would store its chunk after the eviction, so this waits for all writes first.
        let _all_writes = match &self.inner.disk {
            Some(disk) => Some(disk.all_write_permits().await),
            None => None,
        };
        for index in indexes {
            let key = ChunkKey { attempt: entry.stamp.attempt, index };
            self.inner.chunks.invalidate(&key).await;
            if let Some(disk) = &self.inner.disk {
                disk.evict(key).await;
            }
        }
    }

    /// Waits until no chunk is being written to the folder.
    #[cfg(test)]
    pub(super) async fn wait_for_writes(&self) {
        let Some(disk) = &self.inner.disk else { return };
        drop(disk.all_write_permits().await);
    }

    /// Acquires all permits to read from the folder.
    #[cfg(test)]
    pub(super) async fn folder_permits(&self) -> tokio::sync::OwnedSemaphorePermit {
        self.inner.disk.as_ref().unwrap().all_read_permits().await
    }

    /// Acquires all permits to fetch manifests, pages and footers.
    #[cfg(test)]
    pub(super) async fn parse_permits(&self) -> tokio::sync::SemaphorePermit<'_> {
        self.inner.parses.acquire_many(u32::try_from(MAX_CONCURRENT_PARSES).unwrap()).await.unwrap()
    }

    /// Returns the maximum number of chunks that one read-ahead request fetches.
    pub(super) fn max_request_chunks(&self) -> u64 {
        self.inner.max_request_chunks
    }

    /// Starts to fetch those of the chunks that are not in memory, before a reader needs them. Adjacent chunks that are
    /// not on disk share one request. Returns true also if all chunks are in memory. Returns false, and fetches
    /// nothing, if the read-ahead budget has too few free permits or if the store is stopping.
    pub(super) fn read_ahead(&self, store: &TierStore, object: &str, entry: SegmentEntry, indexes: Range<u64>) -> bool {
        let attempt = entry.stamp.attempt;
        let key = move |index| ChunkKey { attempt, index };
        let absent: Vec<u64> = indexes.filter(|index| !self.inner.chunks.contains_key(&key(*index))).collect();
        if absent.is_empty() {
            return true;
        }
        let permits = u32::try_from(absent.len()).unwrap_or(u32::MAX);
        let Ok(mut permits) = Arc::clone(&self.inner.read_ahead).try_acquire_many_owned(permits) else { return false };
        let tasks = store.tasks().clone();
        if tasks.is_cancelled() {
            return false;
        }
        let is_adjacent =
            |a: &u64, b: &u64| a + 1 == *b && !self.inner.is_on_disk(key(*a)) && !self.inner.is_on_disk(key(*b));
        for adjacent in absent.chunk_by(is_adjacent) {
            let flight = self.fetch_request(store, object, &entry, adjacent[0]..adjacent[0] + adjacent.len() as u64);
            for (position, index) in adjacent.iter().copied().enumerate() {
                let (permit, flight) = (permits.split(1), (adjacent.len() > 1).then(|| (flight.clone(), position)));
                // The fetch is in flight before its reader arrives, so the reader waits for it instead of fetching the
                // chunk again.
                let fetched = self.fetch_once_from(store, object, entry, index, flight);
                let object = object.to_owned();
                tasks.spawn("tier-read-ahead", async move {
                    // A reader that needs the chunk repeats the fetch and receives the error.
                    if let (Err(error), _) = fetched.await {
                        tracing::debug!(object, index, %error, "read-ahead failed");
                    }
                    drop(permit);
                });
            }
        }
        true
    }

    /// Returns a request for adjacent chunks. It proceeds only while a fetch of one of these chunks waits for it.
    fn fetch_request(
        &self,
        store: &TierStore,
        object: &str,
        entry: &SegmentEntry,
        indexes: Range<u64>,
    ) -> InFlightFetch {
        let (store, object) = (store.clone(), object.to_owned());
        let range = indexes.start * CHUNK_BYTES..entry.object_bytes().min(indexes.end * CHUNK_BYTES);
        let request = async move { store.while_available(&object, store.get_range(&object, range)).await };
        request.map(|outcome| outcome.map_err(TierReadError::from)).boxed().shared()
    }

    /// Fetches a chunk, or waits for the fetch in flight. `flight` is a shared request for several chunks, and the
    /// index of this chunk among them. Without `flight`, or if the shared request fails, perhaps because of another
    /// chunk, the chunk gets a request of its own. Also returns true if a fetch was in flight already.
    fn fetch_once_from(
        &self,
        store: &TierStore,
        object: &str,
        entry: SegmentEntry,
        index: u64,
        flight: Option<(InFlightFetch, usize)>,
    ) -> impl Future<Output = (Result<Bytes, TierReadError>, bool)> + Send + use<> {
        let key = ChunkKey { attempt: entry.stamp.attempt, index };
        let (inner, task_store, object) = (Arc::clone(&self.inner), store.clone(), object.to_owned());
        let load = async move {
            let response = match flight {
                Some((flight, position)) => flight.await.ok().map(|response| (response, position)),
                None => None,
            };
            let Some((response, position)) = response else {
                return inner.fetch_alone(&task_store, &object, &entry, key).await;
            };
            let chunk_bytes = usize::try_from(CHUNK_BYTES).expect("a usize holds 32 bits");
            let start = response.len().min(position * chunk_bytes);
            // The copy has memory of its own: a slice would keep the complete response in memory.
            let chunk = Bytes::copy_from_slice(&response[start..response.len().min(start + chunk_bytes)]);
            inner.record_fetch(&task_store, key, &chunk).await;
            Ok(chunk)
        };
        self.fetch_once(store, key, load)
    }
}

impl ChunkCacheInner {
    /// Returns one chunk from the folder, else from the object store.
    async fn fetch_alone(
        &self,
        store: &TierStore,
        object: &str,
        entry: &SegmentEntry,
        key: ChunkKey,
    ) -> Result<Bytes, TierReadError> {
        if let Some(disk) = self.disk.as_ref().filter(|disk| disk.contains(key)) {
            let permit = disk.read_permit().await;
            // While this fetch waited for its permit, all callers may have stopped waiting.
            if self.chunk_flights.remove_if_abandoned(key) {
                return Err(TierStoreError::Stopped.into());
            }
            if let Some(chunk) = disk.get(key, permit).await {
                self.hits.inc();
                return Ok(chunk);
            }
        }
        let start = key.index * CHUNK_BYTES;
        let end = entry.object_bytes().min(start + CHUNK_BYTES);
        let chunk = {
            let _permit = self.fetches.acquire().await.expect("the semaphore is never closed");
            // While this fetch waited for its permit, all callers may have stopped waiting.
            if self.chunk_flights.remove_if_abandoned(key) {
                return Err(TierStoreError::Stopped.into());
            }
            store.while_available(object, store.get_range(object, start..end)).await?
        };
        self.record_fetch(store, key, &chunk).await;
        Ok(chunk)
    }

    /// Counts a fetch of a chunk from the object store, and reports the fetch to the cache on disk.
    async fn record_fetch(&self, store: &TierStore, key: ChunkKey, chunk: &Bytes) {
        self.misses.inc();
        if let Some(disk) = &self.disk {
            disk.record_fetch(key, chunk, store.tasks()).await;
        }
    }

    fn is_on_disk(&self, key: ChunkKey) -> bool {
        self.disk.as_ref().is_some_and(|disk| disk.contains(key))
    }
}

/// Returns a size as the weight of a cache entry.
fn weight(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

impl std::fmt::Debug for ChunkCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkCache").field("chunk_bytes", &self.inner.chunks.weighted_size()).finish_non_exhaustive()
    }
}
