//! An object store in memory that is slow, rejects requests and loses responses, and checks that no referenced object
//! is deleted or changed. A failed write may have been applied.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{FutureExt as _, StreamExt as _, stream, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt as _,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};
use strandline::{
    model::PartitionId,
    task::{clock, lock::Mutex, random},
};
use tokio::time::Instant;

use crate::panics;

/// One object store. Clones share its content.
#[derive(Clone, Debug)]
pub(crate) struct Objects {
    kept: Arc<InMemory>,
    /// Percentage of requests that fail, some of them after they were applied. Deletions and the parts of multipart
    /// uploads do not fail.
    failing: Arc<AtomicU32>,
    began: Instant,
    /// Write time of each object in simulated time, which determines the age of orphan objects.
    written: Arc<Mutex<BTreeMap<Path, DateTime<Utc>>>>,
    /// Names of the referenced objects of each partition, which must not be deleted or changed.
    kept_for: Arc<Mutex<BTreeMap<PartitionId, BTreeSet<String>>>>,
}

impl Objects {
    /// Creates an empty object store whose clock starts at `began`.
    pub(crate) fn new(began: Instant) -> Self {
        Self {
            kept: Arc::new(InMemory::new()),
            failing: Arc::default(),
            began,
            written: Arc::default(),
            kept_for: Arc::default(),
        }
    }

    /// Sets the percentage of requests that fail from now on.
    pub(crate) fn fail(&self, percent: u32) {
        self.failing.store(percent, Ordering::Relaxed);
    }

    /// Returns the names of all objects.
    pub(crate) async fn all(&self) -> BTreeSet<String> {
        let listed = self.kept.list(None).map(|object| object.unwrap().location.to_string());
        listed.collect().await
    }

    /// Returns the content of one object, without delay and faults; `None` if it does not exist.
    pub(crate) fn read(&self, object: &str) -> Option<Bytes> {
        let read = async { self.kept.get(&Path::from(object)).await.ok()?.bytes().await.ok() };
        // A read from memory completes at once.
        read.now_or_never().flatten()
    }

    /// Replaces the referenced objects of a partition. From now on a deletion or change of one of these is a rule
    /// violation.
    pub(crate) fn keep(&self, partition: PartitionId, objects: BTreeSet<String>) {
        self.kept_for.lock().insert(partition, objects);
    }

    /// Returns the partition that references an object; `None` if there is none.
    fn referencing_partition(&self, location: &Path) -> Option<PartitionId> {
        let kept_for = self.kept_for.lock();
        kept_for.iter().find_map(|(partition, objects)| objects.contains(location.as_ref()).then_some(*partition))
    }

    /// Checks a write before it is applied: it must not change a referenced object.
    fn check_put(&self, location: &Path, payload: &PutPayload) {
        let Some(partition) = self.referencing_partition(location) else { return };
        let new: Vec<u8> = payload.iter().flatten().copied().collect();
        if self.read(location.as_ref()).is_some_and(|old| old != new) {
            panics::report(format!("{partition}: {location} is referenced, but was overwritten with other bytes"));
        }
    }

    /// Checks a deletion, or a write whose content is not known yet, before it is applied: the object must not be
    /// referenced.
    fn check_delete(&self, location: &Path) {
        if let Some(partition) = self.referencing_partition(location) {
            panics::report(format!("{partition}: {location} is referenced, but was deleted or replaced"));
        }
    }

    /// Stores the simulated time as the write time of an object.
    fn set_write_time(&self, location: &Path) {
        let now = DateTime::UNIX_EPOCH + (clock::monotonic() - self.began);
        self.written.lock().insert(location.clone(), now);
    }

    /// Returns the description of an object with its write time in simulated time.
    fn dated(&self, mut object: ObjectMeta) -> ObjectMeta {
        let written = self.written.lock().get(&object.location).copied();
        object.last_modified = written.unwrap_or(object.last_modified);
        object
    }

    /// Applies a request after a delay, and returns its response. A fault may prevent the request, or lose the response
    /// of an applied one.
    async fn respond<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::sleep(Duration::from_micros(random::in_range(500..20_000))).await;
        let fails = random::in_range(0..100) < self.failing.load(Ordering::Relaxed);
        if fails && random::in_range(0..2) == 0 {
            return Err(request_error("refused"));
        }
        let result = request.await;
        if fails { Err(request_error("response lost")) } else { result }
    }
}

fn request_error(what: &str) -> object_store::Error {
    object_store::Error::Generic { store: "sim", source: what.into() }
}

impl fmt::Display for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated object store")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Objects {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let put = async {
            self.check_put(location, &payload);
            let put = self.kept.put_opts(location, payload, options).await;
            put.inspect(|_| self.set_write_time(location))
        };
        self.respond(put).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.check_delete(location);
        self.set_write_time(location);
        self.respond(self.kept.put_multipart_opts(location, options)).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let got = self.respond(self.kept.get_opts(location, options)).await?;
        Ok(GetResult { meta: self.dated(got.meta), ..got })
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let objects = self.clone();
        let result = locations.inspect(move |location| {
            if let Ok(location) = location {
                objects.check_delete(location);
            }
        });
        self.kept.delete_stream(result.boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        if random::in_range(0..100) < self.failing.load(Ordering::Relaxed) {
            return stream::once(async { Err(request_error("refused")) }).boxed();
        }
        let objects = self.clone();
        self.kept.list(prefix).map(move |object| object.map(|object| objects.dated(object))).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let listed = self.respond(self.kept.list_with_delimiter(prefix)).await?;
        let objects = listed.objects.into_iter().map(|object| self.dated(object)).collect();
        Ok(ListResult { objects, ..listed })
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.check_delete(to);
        self.respond(self.kept.copy_opts(from, to, options)).await
    }
}
