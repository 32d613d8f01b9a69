//! Chunks in a folder on disk. A chunk is written when it is fetched from the object store again, and the least
//! recently used chunks are deleted.

use std::{io, path::Path, sync::Arc};

use bytes::Bytes;
use moka::{future::Cache as Moka, notification::RemovalCause, policy::EvictionPolicy};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

use super::{ChunkKey, weight};
use crate::{
    limits,
    task::{self, Tasks},
    tier::files::CacheFolder,
};

/// Maximum number of concurrent reads from the folder. A started read continues even if its caller no longer waits.
const MAX_CONCURRENT_DISK_READS: usize = 32;

/// Maximum number of concurrent writes to the folder. At the limit, a fetched chunk is not written, so that no reader
/// waits for the disk.
const MAX_CONCURRENT_DISK_WRITES: u32 = 4;

/// Maximum number of chunks whose first fetch is tracked, to detect the second fetch.
const MAX_TRACKED_CHUNKS: u64 = 1 << 16;

/// Chunks in a folder on disk.
pub(super) struct DiskCache {
    folder: Arc<CacheFolder>,
    /// Permits to write a file.
    write_permits: Arc<Semaphore>,
    /// Permits to read a file. They bound the memory of chunks whose callers no longer wait, which no budget counts.
    read_permits: Arc<Semaphore>,
    /// Chunks that exist as files, with their sizes in bytes.
    files: Moka<ChunkKey, u32>,
    /// Chunks that were fetched from the object store at least once: the last [`MAX_TRACKED_CHUNKS`] of them.
    fetched: Moka<ChunkKey, ()>,
}

impl DiskCache {
    /// Opens the folder and deletes the chunks in it. The cache keeps at most `bytes` bytes of chunks, and deletes the
    /// file of an evicted chunk.
    pub(super) fn open(folder: &Path, data_dir: Option<&Path>, bytes: u64) -> io::Result<Self> {
        let folder = Arc::new(CacheFolder::open(folder, data_dir)?);
        let listener_folder = Arc::clone(&folder);
        let files = Moka::builder()
            .eviction_policy(EvictionPolicy::lru())
            .max_capacity(bytes)
            .weigher(|_, bytes: &u32| *bytes)
            .async_eviction_listener(move |key: Arc<ChunkKey>, _, cause| {
                let folder = Arc::clone(&listener_folder);
                Box::pin(async move {
                    if cause != RemovalCause::Replaced {
                        task::run_blocking(move || folder.delete(&key.file()).ok()).await;
                    }
                })
            })
            .build();
        let fetched = Moka::builder().eviction_policy(EvictionPolicy::lru()).max_capacity(MAX_TRACKED_CHUNKS).build();
        let [write_permits, read_permits] = [MAX_CONCURRENT_DISK_WRITES as usize, MAX_CONCURRENT_DISK_READS]
            .map(|permits| Arc::new(Semaphore::new(permits)));
        Ok(Self { folder, write_permits, read_permits, files, fetched })
    }

    /// Returns true if the chunk exists as a file.
    pub(super) fn contains(&self, key: ChunkKey) -> bool {
        self.files.contains_key(&key)
    }

    /// Waits for a permit to read a file.
    pub(super) async fn read_permit(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.read_permits).acquire_owned().await.expect("the semaphore is never closed")
    }

    /// Acquires all permits to read a file.
    #[cfg(test)]
    pub(super) async fn all_read_permits(&self) -> OwnedSemaphorePermit {
        let permits = u32::try_from(MAX_CONCURRENT_DISK_READS).unwrap();
        Arc::clone(&self.read_permits).acquire_many_owned(permits).await.unwrap()
    }

    /// Acquires all permits to write a file: waits for all writes in progress, and holds back further ones.
    pub(super) async fn all_write_permits(&self) -> SemaphorePermit<'_> {
        let permits = self.write_permits.acquire_many(MAX_CONCURRENT_DISK_WRITES).await;
        permits.expect("the semaphore is never closed")
    }

    /// Returns a chunk from its file. If the file is missing or fails its checksum, evicts the chunk and returns
    /// `None`. `permit` is held until the file is read.
    pub(super) async fn get(&self, key: ChunkKey, permit: OwnedSemaphorePermit) -> Option<Bytes> {
        self.files.get(&key).await?;
        let folder = Arc::clone(&self.folder);
        let read = task::run_blocking(move || (folder.read_whole(&key.file()), permit).0).await.ok();
        let chunk = read.and_then(|mut bytes| {
            let content = bytes.split_off(bytes.len().min(4));
            (bytes.as_ref() == crc32c::crc32c(&content).to_be_bytes()).then_some(content)
        });
        if chunk.is_none() {
            self.files.invalidate(&key).await;
        }
        chunk
    }

    /// Evicts a chunk and deletes its file.
    pub(super) async fn evict(&self, key: ChunkKey) {
        self.files.invalidate(&key).await;
    }

    /// Records that a chunk was fetched from the object store. If the chunk was fetched before, starts to write it to
    /// the folder.
    pub(super) async fn record_fetch(self: &Arc<Self>, key: ChunkKey, chunk: &Bytes, tasks: &Tasks) {
        if self.fetched.contains_key(&key) {
            Arc::clone(self).spawn_put(key, chunk.clone(), tasks);
        }
        self.fetched.insert(key, ()).await;
    }

    /// Starts to write a chunk to the folder, unless too many writes are in progress.
    fn spawn_put(self: Arc<Self>, key: ChunkKey, chunk: Bytes, tasks: &Tasks) {
        let Ok(permit) = Arc::clone(&self.write_permits).try_acquire_owned() else { return };
        if tasks.is_cancelled() {
            return;
        }
        tasks.spawn("tier-cache-write", async move {
            self.put(key, chunk).await;
            drop(permit);
        });
    }

    /// Writes a chunk to the folder. If the disk is nearly full or the write fails, the chunk is not cached there.
    async fn put(&self, key: ChunkKey, chunk: Bytes) {
        let folder = Arc::clone(&self.folder);
        let bytes = weight(chunk.len() + 4);
        let written = task::run_blocking(move || {
            // The log needs the last space of the disk. It refuses appends below `MIN_FREE_DISK_BYTES`, so the cache
            // stops earlier.
            if folder.free_bytes().is_ok_and(|free| free < 2 * limits::MIN_FREE_DISK_BYTES) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let crc = crc32c::crc32c(&chunk).to_be_bytes();
            folder.write_whole(&key.file(), &[&crc, &chunk])
        });
        match written.await {
            Ok(()) => self.files.insert(key, bytes).await,
            Err(error) => tracing::debug!(%error, "cannot write a chunk to the cache folder"),
        }
    }
}
