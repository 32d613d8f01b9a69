//! What all partitions of a broker keep of the bucket: parsed manifests, pages and footers, and aligned chunks of
//! segment objects, in memory and then in a folder.
//!
//! A chunk is fetched once however many readers wait for it. All objects here are immutable and named once, so nothing
//! is ever stale; what turns out damaged is forgotten and fetched again. The folder begins empty at each start: its files
//! carry a checksum, and losing them costs requests only.

use std::{io, path::PathBuf, sync::Arc};

use bytes::Bytes;
use moka::{future::Cache as Moka, notification::RemovalCause};
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::{
    files,
    footer::Footer,
    manifest::{Page, Root, SegmentLine},
    read::ReadError,
    store::Store,
};
use crate::{
    limits, task,
    telemetry::{Counter, Metrics},
};

/// Bytes of a chunk; an object's last one is shorter.
pub(super) const CHUNK_BYTES: u64 = 1 << 20;

/// The share of the memory that is for manifests, pages and footers: one part in this many.
const PARSED_SHARE: u64 = 4;

/// Most chunks that readers fetch at once, those of read-ahead not counted.
const FETCHES: usize = 32;

/// How much the cache may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// A folder of its own, and bytes in it. Its old content is deleted.
    pub disk: Option<(PathBuf, u64)>,
    /// Bytes that are fetched ahead of sequential readers, at most, all readers together.
    pub read_ahead_bytes: u64,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { memory_bytes: 128 << 20, disk: None, read_ahead_bytes: 32 << 20 }
    }
}

/// One chunk of one segment object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    attempt: Uuid,
    index: u64,
}

impl Key {
    fn file(&self) -> String {
        format!("{}-{}.chunk", self.attempt.simple(), self.index)
    }
}

/// The parsed form of an object.
#[derive(Clone)]
pub(super) enum Parsed {
    Root(Arc<Root>),
    Page(Arc<Page>),
    Footer(Arc<Footer>),
}

impl Parsed {
    fn bytes(&self) -> usize {
        64 + match self {
            Self::Root(root) => (root.pages().len() + root.segments().len()) * size_of::<SegmentLine>(),
            Self::Page(page) => std::mem::size_of_val(page.segments()),
            Self::Footer(footer) => footer.stretches.len() * 24 + footer.epochs.len() * 16 + footer.producers.len(),
        }
    }
}

/// The cache. Clones share it.
#[derive(Clone)]
pub struct Cache {
    inner: Arc<Inner>,
}

struct Inner {
    chunks: Moka<Key, Bytes>,
    parsed: Moka<Uuid, Parsed>,
    disk: Option<Disk>,
    hits: Counter,
    misses: Counter,
    fetches: Semaphore,
    ahead: Arc<Semaphore>,
}

struct Disk {
    folder: PathBuf,
    /// Which chunks are files, by their bytes.
    files: Moka<Key, u32>,
}

impl Cache {
    /// Makes the cache, which counts in `metrics`. Blocks on the file system.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(options: &CacheOptions, metrics: &Metrics) -> io::Result<Self> {
        let parsed_bytes = options.memory_bytes / PARSED_SHARE;
        let inner = Inner {
            chunks: Moka::builder()
                .max_capacity(options.memory_bytes - parsed_bytes)
                .weigher(|_, chunk: &Bytes| weight(chunk.len() + 128))
                .build(),
            parsed: Moka::builder()
                .max_capacity(parsed_bytes)
                .weigher(|_, parsed: &Parsed| weight(parsed.bytes()))
                .build(),
            disk: options.disk.as_ref().map(|(folder, bytes)| Disk::open(folder.clone(), *bytes)).transpose()?,
            hits: metrics.cache_hits.clone(),
            misses: metrics.cache_misses.clone(),
            fetches: Semaphore::new(FETCHES),
            ahead: Arc::new(Semaphore::new(usize::try_from(options.read_ahead_bytes / CHUNK_BYTES).unwrap_or(0))),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// A parsed object, by the attempt that its name ends in; loaded by the first who asks.
    pub(super) async fn parsed<F>(&self, attempt: Uuid, load: F) -> Result<Parsed, ReadError>
    where
        F: Future<Output = Result<Parsed, ReadError>>,
    {
        self.inner.parsed.try_get_with(attempt, load).await.map_err(|error| ReadError::clone(&error))
    }

    /// Puts a parsed object in that was made here.
    pub(super) async fn put_parsed(&self, attempt: Uuid, parsed: Parsed) {
        self.inner.parsed.insert(attempt, parsed).await;
    }

    /// Chunk `index` of a segment object.
    pub(super) async fn chunk(
        &self,
        store: &Store,
        object: &str,
        line: &SegmentLine,
        index: u64,
    ) -> Result<Bytes, ReadError> {
        let key = Key { attempt: line.stamp.attempt, index };
        let fetch = self.inner.fetch(store, object, line, key);
        let found = self.inner.chunks.entry(key).or_try_insert_with(fetch).await;
        let entry = found.map_err(|error| ReadError::clone(&error))?;
        if !entry.is_fresh() {
            self.inner.hits.inc();
        }
        Ok(entry.into_value())
    }

    /// Forgets chunks that turned out damaged.
    pub(super) async fn forget(&self, line: &SegmentLine, indexes: std::ops::Range<u64>) {
        for index in indexes {
            let key = Key { attempt: line.stamp.attempt, index };
            self.inner.chunks.invalidate(&key).await;
            if let Some(disk) = &self.inner.disk {
                disk.files.invalidate(&key).await;
            }
        }
    }

    /// Fetches a chunk before anyone asks for it, if it is not there and the budget allows.
    pub(super) fn read_ahead(&self, store: &Store, object: &str, line: SegmentLine, index: u64) -> bool {
        let key = Key { attempt: line.stamp.attempt, index };
        if self.inner.chunks.contains_key(&key) {
            return true;
        }
        let Ok(permit) = Arc::clone(&self.inner.ahead).try_acquire_owned() else { return false };
        let (cache, store, object) = (self.clone(), store.clone(), object.to_owned());
        let tasks = store.tasks().clone();
        if tasks.is_cancelled() {
            return false;
        }
        tasks.spawn("tier read-ahead", async move {
            // Whoever needs the chunk asks again and sees the error.
            if let Err(error) = cache.chunk(&store, &object, &line, index).await {
                tracing::debug!(object, index, %error, "read-ahead failed");
            }
            drop(permit);
        });
        true
    }
}

impl Inner {
    async fn fetch(&self, store: &Store, object: &str, line: &SegmentLine, key: Key) -> Result<Bytes, ReadError> {
        if let Some(disk) = &self.disk
            && let Some(chunk) = disk.get(key).await
        {
            self.hits.inc();
            return Ok(chunk);
        }
        let start = key.index * CHUNK_BYTES;
        let end = line.object_bytes().min(start + CHUNK_BYTES);
        let chunk = {
            let _permit = self.fetches.acquire().await.expect("never closed");
            store.get_range(object, start..end).await?
        };
        self.misses.inc();
        if let Some(disk) = &self.disk {
            disk.put(key, chunk.clone()).await;
        }
        Ok(chunk)
    }
}

impl Disk {
    fn open(folder: PathBuf, bytes: u64) -> io::Result<Self> {
        let aside = files::set_aside(&folder)?;
        files::delete_folder(&aside)?;
        let of_evicted = folder.clone();
        let files = Moka::builder()
            .max_capacity(bytes)
            .weigher(|_, bytes: &u32| *bytes)
            .async_eviction_listener(move |key: Arc<Key>, _, cause| {
                let path = of_evicted.join(key.file());
                Box::pin(async move {
                    if cause != RemovalCause::Replaced {
                        task::blocking(move || files::delete(&path).ok()).await;
                    }
                })
            })
            .build();
        Ok(Self { folder, files })
    }

    /// A chunk that is there and whole.
    async fn get(&self, key: Key) -> Option<Bytes> {
        self.files.get(&key).await?;
        let path = self.folder.join(key.file());
        let read = task::blocking(move || files::read_whole(&path)).await.ok();
        let chunk = read.and_then(|mut bytes| {
            let content = bytes.split_off(bytes.len().min(4));
            (bytes.as_ref() == crc32c::crc32c(&content).to_be_bytes()).then_some(content)
        });
        if chunk.is_none() {
            self.files.invalidate(&key).await;
        }
        chunk
    }

    /// Keeps a chunk. A full or failing disk only makes the cache smaller.
    async fn put(&self, key: Key, chunk: Bytes) {
        let path = self.folder.join(key.file());
        let bytes = weight(chunk.len() + 4);
        let written = task::blocking(move || {
            // The last of the disk belongs to the log, and before it to what makes room in it.
            if files::free_bytes(path.parent().unwrap_or(&path)).is_ok_and(|free| free < 2 * limits::DISK_RESERVE_BYTES)
            {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let crc = crc32c::crc32c(&chunk).to_be_bytes();
            files::write_whole(&path, &[&crc, &chunk])
        });
        match written.await {
            Ok(()) => self.files.insert(key, bytes).await,
            Err(error) => tracing::debug!(%error, "the chunk cache could not write"),
        }
    }
}

fn weight(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("chunk_bytes", &self.inner.chunks.weighted_size()).finish_non_exhaustive()
    }
}
