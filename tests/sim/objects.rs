//! A bucket in memory that is slow, refuses, and loses answers: what was asked for may have been done all the same.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt as _, stream, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};
use strandline::task::random;

/// One bucket. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Objects {
    kept: Arc<InMemory>,
    /// Of a hundred requests so many fail, half of them after they were done.
    failing: Arc<AtomicU32>,
}

impl Objects {
    pub(crate) fn new() -> Self {
        Self { kept: Arc::new(InMemory::new()), failing: Arc::default() }
    }

    /// How many of a hundred requests fail from now on.
    pub(crate) fn fail(&self, percent: u32) {
        self.failing.store(percent, Ordering::Relaxed);
    }

    /// Does a request, perhaps, and answers it, perhaps.
    async fn answer<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::sleep(Duration::from_micros(random::in_range(500..20_000))).await;
        let fails = random::in_range(0..100) < self.failing.load(Ordering::Relaxed);
        if fails && random::in_range(0..2) == 0 {
            return Err(failed("refused"));
        }
        let answer = request.await;
        if fails { Err(failed("the answer was lost")) } else { answer }
    }
}

fn failed(what: &str) -> object_store::Error {
    object_store::Error::Generic { store: "sim", source: what.into() }
}

impl fmt::Display for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated bucket")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Objects {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.answer(self.kept.put_opts(location, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.answer(self.kept.put_multipart_opts(location, options)).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.answer(self.kept.get_opts(location, options)).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.kept.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        if random::in_range(0..100) < self.failing.load(Ordering::Relaxed) {
            return stream::once(async { Err(failed("refused")) }).boxed();
        }
        self.kept.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.answer(self.kept.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.answer(self.kept.copy_opts(from, to, options)).await
    }
}
