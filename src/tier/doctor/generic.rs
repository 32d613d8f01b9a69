//! Requests of the store checks through `object_store`: for all stores that the vendor's S3 client does not serve.

use std::{future::Future, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutPayload, path::Path};

use super::{Created, Probe};
use crate::tier::{
    open::{self, OpenError, StoreOptions},
    store::reason,
};

pub(super) struct Objects {
    objects: Arc<dyn ObjectStore>,
    prefix: Path,
    timeout: Duration,
}

impl Objects {
    pub(super) fn connect(options: &StoreOptions) -> Result<Self, OpenError> {
        let (objects, prefix) = open::open(options)?;
        Ok(Self { objects, prefix, timeout: options.request_timeout })
    }

    fn path(&self, key: &str) -> Path {
        key.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    async fn ask<T>(&self, request: impl Future<Output = object_store::Result<T>>) -> Result<T, String> {
        match tokio::time::timeout(self.timeout, request).await {
            Ok(answer) => answer.map_err(|error| reason(&error)),
            Err(_) => Err(format!("no answer within {:?}", self.timeout)),
        }
    }
}

impl Probe for Objects {
    async fn put(&self, key: &str, body: Bytes) -> Result<(), String> {
        self.ask(self.objects.put(&self.path(key), PutPayload::from_bytes(body))).await.map(drop)
    }

    async fn put_new(&self, key: &str, body: Bytes) -> Result<Created, String> {
        use object_store::Error as E;
        let path = self.path(key);
        let put = async {
            match self.objects.put_opts(&path, PutPayload::from_bytes(body), PutMode::Create.into()).await {
                Ok(_) => Ok(Created::Yes),
                Err(E::AlreadyExists { .. } | E::Precondition { .. }) => Ok(Created::Exists),
                Err(error @ (E::NotImplemented { .. } | E::NotSupported { .. })) => {
                    Ok(Created::NotKnown(reason(&error)))
                }
                Err(error) => Err(error),
            }
        };
        self.ask(put).await
    }

    async fn get(&self, key: &str, range: Range<u64>) -> Result<Bytes, String> {
        self.ask(self.objects.get_range(&self.path(key), range)).await
    }

    async fn head(&self, key: &str) -> Result<(u64, i64), String> {
        let meta = self.ask(self.objects.head(&self.path(key))).await?;
        Ok((meta.size, meta.last_modified.timestamp_millis()))
    }

    async fn list(&self, folder: &str) -> Result<Vec<String>, String> {
        let listed = self.ask(self.objects.list(Some(&self.path(folder))).try_collect::<Vec<_>>()).await?;
        Ok(listed.into_iter().map(|meta| meta.location.to_string()).collect())
    }

    async fn delete(&self, key: &str) -> Result<(), String> {
        self.ask(self.objects.delete(&self.path(key))).await
    }

    async fn multipart(&self, key: &str, parts: Vec<Bytes>) -> Result<(), String> {
        let mut upload = self.ask(self.objects.put_multipart(&self.path(key))).await?;
        for part in parts {
            self.ask(upload.put_part(PutPayload::from_bytes(part))).await?;
        }
        self.ask(upload.complete()).await.map(drop)
    }
}
