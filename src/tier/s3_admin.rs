//! Requests that only S3 needs, through the vendor's own client: those of `strandline doctor`, and those that list and
//! abort multipart uploads.
//!
//! All requests of a broker for its data go through `store`. This client is rarely needed, so it is created on demand,
//! from the same options.

use std::{future::Future, ops::Range, time::Duration};

use aws_config::{BehaviorVersion, Region, meta::region::RegionProviderChain};
use aws_sdk_s3::{
    Client,
    config::Credentials,
    error::{ProvideErrorMetadata, SdkError},
    primitives::ByteStream,
    types::{ChecksumAlgorithm, ChecksumMode, CompletedMultipartUpload, CompletedPart},
};
use bytes::Bytes;
use futures::future::BoxFuture;

use super::{
    doctor::probe::{ConditionalPutResult, StoreProbe},
    open::{ObjectStoreOptions, ObjectStoreOptionsError},
};

/// Region if none is configured, as in the requests of `store`.
const REGION: &str = "us-east-1";

/// Maximum number of pages of one listing of uploads, of up to 1,000 uploads each. Further uploads are listed once
/// enough earlier ones have ended.
const UPLOAD_PAGES: usize = 100;

/// Client for one prefix of one bucket.
pub(super) struct S3Admin {
    client: Client,
    /// URL of a service other than AWS.
    endpoint: Option<String>,
    bucket: String,
    prefix: String,
    timeout: Duration,
}

/// An incomplete multipart upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IncompleteUpload {
    /// Name of the object that the upload would create, below the prefix.
    pub(super) object: String,
    id: String,
    /// Start time by the store's clock, in milliseconds since 1970. `None` if the store does not return it.
    pub(super) started_ms: Option<i64>,
}

impl S3Admin {
    /// Creates the client for the bucket and prefix of the options. Sends no request to the bucket.
    pub(super) async fn connect(options: &ObjectStoreOptions) -> Result<Self, ObjectStoreOptionsError> {
        let Some(rest) = options.url.strip_prefix("s3://").or_else(|| options.url.strip_prefix("s3a://")) else {
            return Err(ObjectStoreOptionsError::Url { url: options.url.clone() });
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(ObjectStoreOptionsError::Url { url: options.url.clone() });
        }
        let region = RegionProviderChain::first_try(options.region.clone().map(Region::new));
        let region = region.or_default_provider().or_else(REGION);
        let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12()).region(region);
        let endpoint = options.named_endpoint();
        if let Some(endpoint) = &endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        if let Some(keys) = &options.keys {
            let (id, secret) = (keys.access_key_id.as_str(), keys.secret_access_key.as_str());
            loader = loader.credentials_provider(Credentials::new(id, secret, None, None, "options"));
        }
        let config = loader.load().await;
        let in_path = options.in_path(endpoint.as_deref());
        let config = aws_sdk_s3::config::Builder::from(&config).force_path_style(in_path).build();
        Ok(Self {
            client: Client::from_conf(config),
            endpoint,
            bucket: bucket.to_owned(),
            prefix: prefix.trim_matches('/').to_owned(),
            timeout: options.request_timeout,
        })
    }

    /// Returns the complete key of a name below the prefix.
    fn key(&self, key: &str) -> String {
        if self.prefix.is_empty() { key.to_owned() } else { format!("{}/{key}", self.prefix) }
    }

    /// Sends one request with the time limit. The future is boxed, because the client's futures have some 20 KiB.
    fn request<'a, T, E>(
        &'a self,
        request: impl Future<Output = Result<T, SdkError<E>>> + Send + 'a,
    ) -> BoxFuture<'a, Result<T, String>>
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let response = Box::pin(tokio::time::timeout(self.timeout, request));
        Box::pin(async move {
            match response.await {
                Ok(response) => response.map_err(|error| match error.raw_response() {
                    Some(_) => error_text(&error),
                    None => self.at_endpoint(&error_text(&error)),
                }),
                Err(_) => Err(self.at_endpoint(&format!("no response within {:?}", self.timeout))),
            }
        })
    }

    /// Returns an error that occurred before any response, with the endpoint.
    fn at_endpoint(&self, error: &str) -> String {
        self.endpoint.as_ref().map_or_else(|| error.to_owned(), |endpoint| format!("{endpoint}: {error}"))
    }

    /// Returns the incomplete multipart uploads below the prefix, from at most [`UPLOAD_PAGES`] pages.
    ///
    /// The requests list the complete bucket: for a prefix, MinIO returns only uploads of exactly that key. (MinIO also
    /// omits uploads that were started before its last restart, but aborts an upload that is a day old by itself.)
    pub(super) async fn uploads(&self) -> Result<Vec<IncompleteUpload>, String> {
        let prefix = self.key("");
        let (mut uploads, mut key, mut id) = (Vec::new(), None::<String>, None::<String>);
        for _ in 0..UPLOAD_PAGES {
            let list = self.client.list_multipart_uploads().bucket(&self.bucket);
            let page = self.request(list.set_key_marker(key.take()).set_upload_id_marker(id.take()).send()).await?;
            uploads.extend(page.uploads().iter().filter_map(|upload| {
                Some(IncompleteUpload {
                    object: upload.key()?.strip_prefix(&prefix)?.to_owned(),
                    id: upload.upload_id()?.to_owned(),
                    started_ms: upload.initiated().and_then(|time| time.to_millis().ok()),
                })
            }));
            key = page.next_key_marker().filter(|key| !key.is_empty()).map(str::to_owned);
            id = page.next_upload_id_marker().filter(|id| !id.is_empty()).map(str::to_owned);
            if page.is_truncated() != Some(true) || key.is_none() {
                break;
            }
        }
        Ok(uploads)
    }

    /// Aborts an upload, so that the store frees its parts. A missing upload is no error.
    pub(super) async fn abort_upload(&self, upload: &IncompleteUpload) -> Result<(), String> {
        let abort = self.client.abort_multipart_upload().bucket(&self.bucket);
        let abort = abort.key(self.key(&upload.object)).upload_id(&upload.id).send();
        match Box::pin(tokio::time::timeout(self.timeout, abort)).await {
            Ok(Err(error)) if error.code() == Some("NoSuchUpload") => Ok(()),
            Ok(response) => response.map(drop).map_err(|error| error_text(&error)),
            Err(_) => Err(format!("no response within {:?}", self.timeout)),
        }
    }

    /// Puts an object with its CRC-32C. Returns true if the store keeps the checksum.
    pub(super) async fn probe_checksum(&self, key: &str, body: Bytes) -> Result<bool, String> {
        let crc = crc32c::crc32c(&body).to_be_bytes();
        let expected = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, crc);
        let (bucket, key) = (&self.bucket, self.key(key));
        let put = self.client.put_object().bucket(bucket).key(&key).body(ByteStream::from(body));
        let put = put.checksum_algorithm(ChecksumAlgorithm::Crc32C).checksum_crc32_c(&expected);
        self.request(put.send()).await?;
        let head = self.client.head_object().bucket(bucket).key(&key).checksum_mode(ChecksumMode::Enabled);
        Ok(self.request(head.send()).await?.checksum_crc32_c() == Some(&expected))
    }
}

impl StoreProbe for S3Admin {
    async fn put(&self, key: &str, body: Bytes) -> Result<(), String> {
        let put = self.client.put_object().bucket(&self.bucket).key(self.key(key)).body(ByteStream::from(body));
        self.request(put.send()).await.map(drop)
    }

    async fn put_new(&self, key: &str, body: Bytes) -> Result<ConditionalPutResult, String> {
        let put = self.client.put_object().bucket(&self.bucket).key(self.key(key)).body(ByteStream::from(body));
        let response = Box::pin(tokio::time::timeout(self.timeout, put.if_none_match("*").send())).await;
        let Ok(response) = response else { return Err(format!("no response within {:?}", self.timeout)) };
        match response {
            Ok(_) => Ok(ConditionalPutResult::Written),
            Err(error) => match error.raw_response().map(|response| response.status().as_u16()) {
                Some(409 | 412) => Ok(ConditionalPutResult::Exists),
                Some(400 | 501) => Ok(ConditionalPutResult::Unsupported(error_text(&error))),
                _ => Err(error_text(&error)),
            },
        }
    }

    async fn get(&self, key: &str, range: Range<u64>) -> Result<Bytes, String> {
        let get = self.client.get_object().bucket(&self.bucket).key(self.key(key));
        let response = self.request(get.range(format!("bytes={}-{}", range.start, range.end - 1)).send()).await?;
        let body = tokio::time::timeout(self.timeout, response.body.collect()).await;
        let body = body.map_err(|_| format!("the body did not end within {:?}", self.timeout))?;
        body.map(|body| body.into_bytes()).map_err(|error| error.to_string())
    }

    async fn head(&self, key: &str) -> Result<(u64, i64), String> {
        let head = self.request(self.client.head_object().bucket(&self.bucket).key(self.key(key)).send()).await?;
        let bytes = head.content_length().and_then(|bytes| u64::try_from(bytes).ok()).ok_or("no content length")?;
        let modified = head.last_modified().and_then(|time| time.to_millis().ok()).ok_or("no modification time")?;
        Ok((bytes, modified))
    }

    async fn list(&self, folder: &str) -> Result<Vec<String>, String> {
        let prefix = format!("{}/", self.key(folder));
        let listed = self.request(self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix).send()).await?;
        Ok(listed.contents().iter().filter_map(|object| object.key()).map(str::to_owned).collect())
    }

    async fn delete(&self, key: &str) -> Result<(), String> {
        self.request(self.client.delete_object().bucket(&self.bucket).key(self.key(key)).send()).await.map(drop)
    }

    async fn multipart(&self, key: &str, parts: Vec<Bytes>) -> Result<(), String> {
        let (bucket, key) = (&self.bucket, self.key(key));
        let created = self.request(self.client.create_multipart_upload().bucket(bucket).key(&key).send()).await?;
        let id = created.upload_id().ok_or("the store returned no upload id")?;
        let mut completed = CompletedMultipartUpload::builder();
        for (number, part) in (1..).zip(parts) {
            let put = self.client.upload_part().bucket(bucket).key(&key).upload_id(id).part_number(number);
            let sent = self.request(put.body(ByteStream::from(part)).send()).await?;
            let part = CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag().map(str::to_owned));
            let part = part.set_checksum_crc32(sent.checksum_crc32().map(str::to_owned));
            completed = completed.parts(part.build());
        }
        let complete = self.client.complete_multipart_upload().bucket(bucket).key(&key).upload_id(id);
        self.request(complete.multipart_upload(completed.build()).send()).await.map(drop)
    }
}

/// Returns the messages of an error and of its causes. Missing credentials are explained.
fn describe_causes(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    let text = chain.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    if text.contains("loading credentials") {
        return format!(
            "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or set a profile or role ({text})"
        );
    }
    text
}

/// Returns the service's error message, or the cause if there was no response.
fn error_text<E>(error: &SdkError<E>) -> String
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let status = error.raw_response().map(|response| format!("HTTP {}", response.status().as_u16()));
    match (status, error.code(), error.message()) {
        (Some(status), Some(code), Some(message)) => format!("{status} {code}: {message}"),
        (Some(status), Some(code), None) => format!("{status} {code}"),
        (Some(status), ..) => status,
        _ => describe_causes(error),
    }
}
