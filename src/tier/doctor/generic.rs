//! Requests of the store checks through `object_store`: for all stores except S3, and for S3 without the feature
//! `s3-admin`.

use std::{future::Future, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutPayload, path::Path};

use super::probe::{ConditionalPutResult, StoreProbe};
use crate::tier::{
    error::reason,
    open::{self, ObjectStoreOptions, ObjectStoreOptionsError},
};

/// Probe of a store through `object_store`.
pub(super) struct GenericProbe {
    objects: Arc<dyn ObjectStore>,
    prefix: Path,
    timeout: Duration,
}

impl GenericProbe {
    pub(super) fn connect(options: &ObjectStoreOptions) -> Result<Self, ObjectStoreOptionsError> {
        let (objects, prefix) = open::open(options)?;
        Ok(Self { objects, prefix, timeout: options.request_timeout })
    }

    fn path(&self, key: &str) -> Path {
        key.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    /// Sends one request with the time limit. Errors are texts for the report.
    async fn request<T>(&self, request: impl Future<Output = object_store::Result<T>>) -> Result<T, String> {
        match tokio::time::timeout(self.timeout, request).await {
            Ok(response) => response.map_err(|error| reason(&error)),
            Err(_) => Err(format!("no response within {:?}", self.timeout)),
        }
    }
}

impl StoreProbe for GenericProbe {
    async fn put(&self, key: &str, body: Bytes) -> Result<(), String> {
        self.request(self.objects.put(&self.path(key), PutPayload::from_bytes(body))).await.map(drop)
    }

    async fn put_new(&self, key: &str, body: Bytes) -> Result<ConditionalPutResult, String> {
        use object_store::Error as E;
        let path = self.path(key);
        let put = async {
            match self.objects.put_opts(&path, PutPayload::from_bytes(body), PutMode::Create.into()).await {
                Ok(_) => Ok(ConditionalPutResult::Written),
                Err(E::AlreadyExists { .. } | E::Precondition { .. }) => Ok(ConditionalPutResult::Exists),
                Err(error @ (E::NotImplemented { .. } | E::NotSupported { .. })) => {
                    Ok(ConditionalPutResult::Unsupported(reason(&error)))
                }
                Err(error) => Err(error),
            }
        };
        self.request(put).await
    }

    async fn get(&self, key: &str, range: Range<u64>) -> Result<Bytes, String> {
        self.request(self.objects.get_range(&self.path(key), range)).await
    }

    async fn head(&self, key: &str) -> Result<(u64, i64), String> {
        let meta = self.request(self.objects.head(&self.path(key))).await?;
        Ok((meta.size, meta.last_modified.timestamp_millis()))
    }

    async fn list(&self, folder: &str) -> Result<Vec<String>, String> {
        let listed = self.request(self.objects.list(Some(&self.path(folder))).try_collect::<Vec<_>>()).await?;
        Ok(listed.into_iter().map(|meta| meta.location.to_string()).collect())
    }

    async fn delete(&self, key: &str) -> Result<(), String> {
        self.request(self.objects.delete(&self.path(key))).await
    }

    async fn multipart(&self, key: &str, parts: Vec<Bytes>) -> Result<(), String> {
        let mut upload = self.request(self.objects.put_multipart(&self.path(key))).await?;
        for part in parts {
            self.request(upload.put_part(PutPayload::from_bytes(part))).await?;
        }
        self.request(upload.complete()).await.map(drop)
    }
}
