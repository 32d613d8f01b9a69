//! A folder of this machine as object store. The folder may be on the disk of the journal, whose writes
//! acknowledgements wait for.
//!
//! Large objects are written in small pieces with pauses, one piece at a time over all uploads. A sync of 64 MiB at
//! once would delay the next write of the journal. The read-back after an upload drops the object from the page cache,
//! which objects without readers would fill. The space of a deleted object is freed in steps. `object_store` does
//! everything else, and is configured to sync (`open`). So when a put returns, the object and its name are durable.

use std::{fmt, io, ops::Range, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};
use object_store::{
    CopyOptions, Error, Extensions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt as _, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions,
    Result, UploadPart, local::LocalFileSystem, path::Path,
};

use super::files::{PieceWriter, RemovedFile, StagedFile, read_and_drop_pages};
use crate::{log::disk::PIECE_BYTES, task};

/// Extension of a get that verifies an upload. The bytes were written just now, and no other read is expected soon.
#[derive(Clone, Copy, Debug)]
struct VerifyingRead;

/// Returns the options of a get that verifies an upload.
pub(super) fn read_back_options() -> GetOptions {
    let mut extensions = Extensions::new();
    extensions.insert(VerifyingRead);
    GetOptions::new().with_extensions(extensions)
}

/// A folder as object store.
#[derive(Debug)]
pub(super) struct Folder {
    files: LocalFileSystem,
    writer: Arc<PieceWriter>,
}

impl Folder {
    /// Creates the store over `files`. Objects that `files` writes are synced only if `files` is configured to sync.
    pub(super) fn new(files: LocalFileSystem) -> Self {
        Self { files, writer: Arc::default() }
    }

    /// Starts to write an object in pieces.
    async fn upload(&self, location: &Path) -> Result<FolderUpload> {
        let target = self.files.path_to_filesystem(location)?;
        let staged = task::run_blocking(move || StagedFile::create(&target)).await.map_err(folder_error)?;
        Ok(FolderUpload { staged: Some(Arc::new(staged)), writer: Arc::clone(&self.writer), at: 0 })
    }
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.files.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for Folder {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let is_plain = matches!(options.mode, PutMode::Overwrite) && options.attributes.is_empty();
        if payload.content_length() <= PIECE_BYTES || !is_plain {
            return self.files.put_opts(location, payload, options).await;
        }
        let mut upload = self.upload(location).await?;
        upload.put_part(payload).await?;
        upload.complete().await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        if !options.attributes.is_empty() {
            return self.files.put_multipart_opts(location, options).await;
        }
        Ok(Box::new(self.upload(location).await?))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let is_read_back = options.extensions.get::<VerifyingRead>().is_some();
        let mut found = self.files.get_opts(location, options).await?;
        if is_read_back && let GetResultPayload::File(file, _) = found.payload {
            let range = found.range.clone();
            let bytes = task::run_blocking(move || read_and_drop_pages(&file, range)).await.map_err(folder_error)?;
            found.payload = GetResultPayload::Stream(futures::stream::once(async { Ok(bytes) }).boxed());
        }
        Ok(found)
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.files.get_ranges(location, ranges).await
    }

    /// Deletes the objects, and frees the space of each object in steps after its name is removed.
    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let files = self.files.clone();
        let delete = move |location: Result<Path>| {
            let files = files.clone();
            async move {
                let location = location?;
                let path = files.path_to_filesystem(&location)?;
                // The open file keeps the space until it is freed in steps.
                let removed = task::run_blocking(move || RemovedFile::open(&path)).await;
                files.delete(&location).await?;
                task::run_blocking(move || removed.map(RemovedFile::free_in_steps)).await;
                Ok(location)
            }
        };
        // Deletes one object after the other, because all deletes free space on the same disk.
        locations.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.files.list(prefix)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.files.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.files.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.files.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.files.rename_opts(from, to, options).await
    }
}

/// An object that is being written.
#[derive(Debug)]
struct FolderUpload {
    /// `None` once `complete` or `abort` was called.
    staged: Option<Arc<StagedFile>>,
    writer: Arc<PieceWriter>,
    /// Position of the next part in the object.
    at: u64,
}

#[async_trait]
impl MultipartUpload for FolderUpload {
    fn put_part(&mut self, part: PutPayload) -> UploadPart {
        let (staged, writer, at) = (self.staged.clone(), Arc::clone(&self.writer), self.at);
        self.at += part.content_length() as u64;
        Box::pin(async move {
            let staged = staged.ok_or_else(upload_ended)?;
            let written = move || staged.write_at(&writer, at, part.iter().map(Bytes::as_ref));
            task::run_blocking(written).await.map_err(folder_error)
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let staged = self.staged.take().ok_or_else(upload_ended)?;
        task::run_blocking(move || staged.publish()).await.map_err(folder_error)?;
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn abort(&mut self) -> Result<()> {
        let staged = self.staged.take();
        // The drop of the last reference removes the file.
        task::run_blocking(move || drop(staged)).await;
        Ok(())
    }
}

fn folder_error(error: io::Error) -> Error {
    Error::Generic { store: "folder", source: error.into() }
}

/// Returns the error of a call after the end of its upload.
fn upload_ended() -> Error {
    folder_error(io::Error::other("the upload was already completed or aborted"))
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt as _;

    use super::*;

    fn content(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| u8::try_from(i % 253).unwrap()).collect()
    }

    async fn names(folder: &Folder) -> Vec<String> {
        let listed: Vec<_> = folder.list(None).try_collect().await.unwrap();
        listed.into_iter().map(|object| object.location.to_string()).collect()
    }

    #[tokio::test]
    async fn large_objects_are_complete_or_absent() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder::new(LocalFileSystem::new_with_prefix(parent.path()).unwrap().with_fsync(true));
        let large = content(5 * PIECE_BYTES + 1);
        let path = Path::from("topics/a/large");
        folder.put(&path, large.clone().into()).await.unwrap();
        assert!(folder.get(&path).await.unwrap().bytes().await.unwrap() == large);
        // The object is replaced while another upload of it is in progress, which is aborted afterwards.
        let mut other = folder.put_multipart(&path).await.unwrap();
        other.put_part(content(PIECE_BYTES).into()).await.unwrap();
        let mut parts = folder.put_multipart(&path).await.unwrap();
        let (first, second) = large.split_at(2 * PIECE_BYTES + 3);
        let (first, second) = (parts.put_part(first.to_vec().into()), parts.put_part(second.to_vec().into()));
        let (second, first) = tokio::join!(second, first);
        first.and(second).unwrap();
        assert_eq!(names(&folder).await, ["topics/a/large"], "an incomplete object is not listed");
        parts.complete().await.unwrap();
        assert!(parts.put_part(content(1).into()).await.is_err() && parts.complete().await.is_err());
        other.abort().await.unwrap();
        assert!(folder.get_range(&path, 7..large.len() as u64).await.unwrap() == large[7..]);
        let remaining: Vec<_> = std::fs::read_dir(parent.path().join("topics/a")).unwrap().collect();
        assert_eq!(remaining.len(), 1, "{remaining:?}");
    }

    #[tokio::test]
    async fn deleted_object_leaves_its_copy() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder::new(LocalFileSystem::new_with_prefix(parent.path()).unwrap());
        let (path, copy, missing) = (Path::from("object"), Path::from("copy"), Path::from("missing"));
        folder.put(&path, content(9 << 20).into()).await.unwrap();
        folder.copy(&path, &copy).await.unwrap();
        folder.delete(&path).await.unwrap();
        assert_eq!(names(&folder).await, ["copy"]);
        assert_eq!(folder.head(&copy).await.unwrap().size, 9 << 20);
        assert!(matches!(folder.delete(&missing).await, Err(Error::NotFound { .. })));
        folder.delete(&copy).await.unwrap();
        assert!(names(&folder).await.is_empty());
    }

    #[tokio::test]
    async fn conditional_put_of_large_object_replaces_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder::new(LocalFileSystem::new_with_prefix(parent.path()).unwrap());
        let path = Path::from("object");
        folder.put(&path, "small".into()).await.unwrap();
        let refused = folder.put_opts(&path, content(2 * PIECE_BYTES).into(), PutMode::Create.into()).await;
        assert!(matches!(refused, Err(Error::AlreadyExists { .. })), "{refused:?}");
        assert_eq!(folder.get(&path).await.unwrap().bytes().await.unwrap(), "small");
    }
}
