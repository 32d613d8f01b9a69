//! `s3s-fs` with keys as long as ours.
//!
//! It keeps what a multipart upload was begun with in one file whose name holds the whole key in base64, which for our
//! segment names is more than the 255 bytes of a file name. That file is only for attributes, which we do not use: the
//! upload is begun under a short key, and everything after goes by the upload's id.

use s3s::{S3, S3Request, S3Response, S3Result, dto::*};
use s3s_fs::FileSystem;

pub(super) struct LongKeys {
    pub(super) files: FileSystem,
    pub(super) faults: super::Faults,
}

macro_rules! pass_on {
    ($($method:ident: $input:ty => $output:ty;)*) => {
        #[async_trait::async_trait]
        impl S3 for LongKeys {
            async fn create_multipart_upload(
                &self,
                mut request: S3Request<CreateMultipartUploadInput>,
            ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
                let key = std::mem::replace(&mut request.input.key, "upload".to_owned());
                let mut response = self.files.create_multipart_upload(request).await?;
                response.output.key = Some(key);
                Ok(response)
            }

            async fn put_object(
                &self,
                mut request: S3Request<PutObjectInput>,
            ) -> S3Result<S3Response<PutObjectOutput>> {
                // Here and not on the wire, where the header is signed.
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
pass_on! {
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
    complete_multipart_upload: CompleteMultipartUploadInput => CompleteMultipartUploadOutput;
    abort_multipart_upload: AbortMultipartUploadInput => AbortMultipartUploadOutput;
}
