//! `s3s-fs` with keys as long as ours.
//!
//! `s3s-fs` stores the attributes of a multipart upload in a file whose name holds the whole key in base64. For segment
//! names, this exceeds the 255 bytes of a file name. The attributes are not used here, so each upload starts under a
//! short key, and later requests use its upload id. `s3s-fs` also has no list of uploads. [`Uploads`] has one, in the
//! order and pages of S3.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use s3s::{S3, S3Request, S3Response, S3Result, dto::*, s3_error};
use s3s_fs::FileSystem;
use strandline::task::lock::Mutex;

/// Number of uploads in one page of a list.
const PAGE: i32 = 3;

pub(super) struct LongKeys {
    pub(super) files: FileSystem,
    pub(super) faults: super::Faults,
    pub(super) uploads: Uploads,
}

/// Bucket, key and id of an upload.
type UploadName = (String, String, String);

/// The multipart uploads that have not ended, with their start times. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Uploads {
    started: Arc<Mutex<BTreeMap<UploadName, SystemTime>>>,
}

impl Uploads {
    fn begin(&self, bucket: &str, key: &str, id: &str) {
        // A store has its own clock.
        #[allow(clippy::disallowed_methods, reason = "the server stands for another machine")]
        let now = SystemTime::now();
        self.started.lock().insert((bucket.to_owned(), key.to_owned(), id.to_owned()), now);
    }

    fn end(&self, id: &str) {
        self.started.lock().retain(|(_, _, upload_id), _| upload_id != id);
    }

    fn contains(&self, id: &str) -> bool {
        self.started.lock().keys().any(|(_, _, upload_id)| upload_id == id)
    }

    /// Returns the keys of all uploads.
    pub(super) fn keys(&self) -> Vec<String> {
        self.started.lock().keys().map(|(_, key, _)| key.clone()).collect()
    }

    /// Makes all uploads older by this time.
    pub(super) fn age(&self, by: Duration) {
        self.started.lock().values_mut().for_each(|started| *started -= by);
    }

    /// Returns the requested page: the uploads of the bucket with the prefix, after the markers.
    fn list(&self, request: &ListMultipartUploadsInput) -> ListMultipartUploadsOutput {
        let max = usize::try_from(request.max_uploads.unwrap_or(1000)).unwrap();
        let prefix = request.prefix.clone().unwrap_or_default();
        let after = request.key_marker.clone().map(|key| (key, request.upload_id_marker.clone()));
        let started = self.started.lock();
        let mut all = started.iter().filter(|((bucket, key, id), _)| {
            let beyond = after.as_ref().is_none_or(|(marker, marked)| match marked {
                Some(marked) => (key, id) > (marker, marked),
                None => key > marker,
            });
            *bucket == request.bucket && key.starts_with(&prefix) && beyond
        });
        let page: Vec<MultipartUpload> = all
            .by_ref()
            .take(max)
            .map(|((_, key, id), started)| MultipartUpload {
                key: Some(key.clone()),
                upload_id: Some(id.clone()),
                initiated: Some((*started).into()),
                ..MultipartUpload::default()
            })
            .collect();
        let truncated = all.next().is_some();
        let last = page.last().filter(|_| truncated);
        ListMultipartUploadsOutput {
            bucket: Some(request.bucket.clone()),
            is_truncated: Some(truncated),
            max_uploads: request.max_uploads,
            next_key_marker: last.and_then(|last| last.key.clone()),
            next_upload_id_marker: last.and_then(|last| last.upload_id.clone()),
            uploads: Some(page),
            ..ListMultipartUploadsOutput::default()
        }
    }
}

macro_rules! implement_s3 {
    ($($method:ident: $input:ty => $output:ty;)*) => {
        #[async_trait::async_trait]
        impl S3 for LongKeys {
            async fn create_multipart_upload(
                &self,
                mut request: S3Request<CreateMultipartUploadInput>,
            ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
                let key = std::mem::replace(&mut request.input.key, "upload".to_owned());
                let bucket = request.input.bucket.clone();
                let mut response = self.files.create_multipart_upload(request).await?;
                let id = response.output.upload_id.as_deref().expect("an upload has an id");
                self.uploads.begin(&bucket, &key, id);
                response.output.key = Some(key);
                Ok(response)
            }

            async fn complete_multipart_upload(
                &self,
                request: S3Request<CompleteMultipartUploadInput>,
            ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
                let id = request.input.upload_id.clone();
                let response = self.files.complete_multipart_upload(request).await?;
                self.uploads.end(&id);
                Ok(response)
            }

            async fn abort_multipart_upload(
                &self,
                request: S3Request<AbortMultipartUploadInput>,
            ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
                let id = request.input.upload_id.clone();
                // For an unknown upload, s3s-fs returns the error for an upload of another user. S3 returns
                // NoSuchUpload.
                if !self.uploads.contains(&id) {
                    return Err(s3_error!(NoSuchUpload));
                }
                let response = self.files.abort_multipart_upload(request).await?;
                self.uploads.end(&id);
                Ok(response)
            }

            async fn list_multipart_uploads(
                &self,
                request: S3Request<ListMultipartUploadsInput>,
            ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
                let mut input = request.input;
                // The pages are small enough that tests get several.
                input.max_uploads = Some(input.max_uploads.map_or(PAGE, |uploads| uploads.min(PAGE)));
                Ok(S3Response::new(self.uploads.list(&input)))
            }

            async fn put_object(
                &self,
                mut request: S3Request<PutObjectInput>,
            ) -> S3Result<S3Response<PutObjectOutput>> {
                // Removed here and not on the wire, where the header is signed.
                if self.faults.ignores_conditions() {
                    request.input.if_none_match = None;
                }
                self.files.put_object(request).await
            }

            $(async fn $method(&self, request: S3Request<$input>) -> S3Result<S3Response<$output>> {
                self.files.$method(request).await
            })*
        }
    };
}
implement_s3! {
    create_bucket: CreateBucketInput => CreateBucketOutput;
    head_bucket: HeadBucketInput => HeadBucketOutput;
    list_buckets: ListBucketsInput => ListBucketsOutput;
    get_bucket_location: GetBucketLocationInput => GetBucketLocationOutput;
    get_object: GetObjectInput => GetObjectOutput;
    head_object: HeadObjectInput => HeadObjectOutput;
    delete_object: DeleteObjectInput => DeleteObjectOutput;
    delete_objects: DeleteObjectsInput => DeleteObjectsOutput;
    list_objects: ListObjectsInput => ListObjectsOutput;
    list_objects_v2: ListObjectsV2Input => ListObjectsV2Output;
    upload_part: UploadPartInput => UploadPartOutput;
    list_parts: ListPartsInput => ListPartsOutput;
}
