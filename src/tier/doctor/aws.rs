//! The checks' requests through the vendor's own S3 client, and the checks that only S3 has.

use std::{future::Future, ops::Range, time::Duration};

use aws_config::{
    BehaviorVersion, Region, environment::EnvironmentVariableRegionProvider, meta::region::RegionProviderChain,
};
use aws_sdk_s3::{
    Client,
    config::Credentials,
    error::{ProvideErrorMetadata, SdkError},
    primitives::ByteStream,
    types::{ChecksumAlgorithm, ChecksumMode, CompletedMultipartUpload, CompletedPart},
};
use bytes::Bytes;
use futures::future::BoxFuture;

use super::{Check, Created, Outcome, Probe, pattern, untried};
use crate::tier::open::{OpenError, StoreOptions};

/// The region where none is named, as for the broker's own client.
const DEFAULT_REGION: &str = "us-east-1";

const CHECKSUM: (&str, &str) =
    ("content checksum", "Uploads are read back and compared, so a store without checksums is as safe.");

const UPLOADS: (&str, &str) = (
    "list multipart uploads",
    "A crash can leave an upload without an end, which costs storage: give the bucket a life-cycle rule that ends them.",
);

pub(super) struct Sdk {
    client: Client,
    /// Where it calls, if not at Amazon.
    endpoint: Option<String>,
    bucket: String,
    prefix: String,
    timeout: Duration,
}

impl Sdk {
    pub(super) async fn connect(options: &StoreOptions) -> Result<Self, OpenError> {
        let rest = options.url.trim_start_matches("s3://");
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(OpenError::Url { url: options.url.clone() });
        }
        let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12());
        let region = match &options.region {
            Some(region) => RegionProviderChain::first_try(Region::new(region.clone())),
            None => RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new()),
        };
        loader = loader.region(region.or_else(Region::new(DEFAULT_REGION)));
        if let Some(endpoint) = &options.endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        if let Some(keys) = &options.keys {
            let (id, secret) = (keys.access_key_id.as_str(), keys.secret_access_key.as_str());
            loader = loader.credentials_provider(Credentials::new(id, secret, None, None, "options"));
        }
        let config = loader.load().await;
        let config = aws_sdk_s3::config::Builder::from(&config).force_path_style(options.path_style).build();
        Ok(Self {
            client: Client::from_conf(config),
            endpoint: options.endpoint.clone(),
            bucket: bucket.to_owned(),
            prefix: prefix.trim_matches('/').to_owned(),
            timeout: options.request_timeout,
        })
    }

    fn key(&self, key: &str) -> String {
        if self.prefix.is_empty() { key.to_owned() } else { format!("{}/{key}", self.prefix) }
    }

    /// One request, within the time limit. Boxed, because the client's futures are some 20 KiB.
    fn ask<'a, T, E>(
        &'a self,
        request: impl Future<Output = Result<T, SdkError<E>>> + Send + 'a,
    ) -> BoxFuture<'a, Result<T, String>>
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let answer = Box::pin(tokio::time::timeout(self.timeout, request));
        Box::pin(async move {
            match answer.await {
                Ok(answer) => answer.map_err(|error| match &self.endpoint {
                    Some(endpoint) if error.raw_response().is_none() => format!("{endpoint}: {}", text(&error)),
                    _ => text(&error),
                }),
                Err(_) => {
                    let endpoint = self.endpoint.as_ref().map_or(String::new(), |endpoint| format!("{endpoint}: "));
                    Err(format!("{endpoint}no answer within {:?}", self.timeout))
                }
            }
        })
    }

    /// The checks that only S3 has, where nothing could be asked.
    pub(super) fn untried() -> Vec<Check> {
        [CHECKSUM, UPLOADS].into_iter().map(|(name, meaning)| untried(name, meaning)).collect()
    }

    /// Checksums that the store keeps, and uploads without an end.
    pub(super) async fn own_checks(&self, folder: &str) -> Vec<Check> {
        let checksum = match self.checksum(&format!("{folder}/checksum")).await {
            Ok(true) => (Outcome::Pass, "the store keeps the CRC-32C of what it was given".to_owned()),
            Ok(false) => (Outcome::Unsupported, "the store keeps no checksum".to_owned()),
            Err(error) => (Outcome::Unsupported, error),
        };
        let uploads = self.client.list_multipart_uploads().bucket(&self.bucket).prefix(self.key("topics/")).send();
        let uploads = match self.ask(uploads).await {
            Ok(listed) => {
                let detail = format!("{} uploads without an end below this prefix", listed.uploads().len());
                (Outcome::Pass, detail)
            }
            Err(error) => (Outcome::Unsupported, error),
        };
        vec![
            Check { name: CHECKSUM.0, outcome: checksum.0, detail: checksum.1, meaning: CHECKSUM.1 },
            Check { name: UPLOADS.0, outcome: uploads.0, detail: uploads.1, meaning: UPLOADS.1 },
        ]
    }

    async fn checksum(&self, key: &str) -> Result<bool, String> {
        let body = pattern(1000);
        let crc = crc32c::crc32c(&body).to_be_bytes();
        let expected = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, crc);
        let (bucket, key) = (&self.bucket, self.key(key));
        let put = self.client.put_object().bucket(bucket).key(&key).body(ByteStream::from(body));
        let put = put.checksum_algorithm(ChecksumAlgorithm::Crc32C).checksum_crc32_c(&expected);
        self.ask(put.send()).await?;
        let head = self.client.head_object().bucket(bucket).key(&key).checksum_mode(ChecksumMode::Enabled);
        Ok(self.ask(head.send()).await?.checksum_crc32_c() == Some(&expected))
    }
}

/// An error and what caused it, in the words of each.
fn causes(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    let text = chain.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    if text.contains("loading credentials") {
        return format!(
            "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give a profile or role ({text})"
        );
    }
    text
}

/// The service's own words when it answered, else why there was no answer.
fn text<E>(error: &SdkError<E>) -> String
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let status = error.raw_response().map(|response| format!("HTTP {}", response.status().as_u16()));
    match (status, error.code(), error.message()) {
        (Some(status), Some(code), Some(message)) => format!("{status} {code}: {message}"),
        (Some(status), Some(code), None) => format!("{status} {code}"),
        (Some(status), ..) => status,
        _ => causes(error),
    }
}

impl Probe for Sdk {
    async fn put(&self, key: &str, body: Bytes) -> Result<(), String> {
        let put = self.client.put_object().bucket(&self.bucket).key(self.key(key)).body(ByteStream::from(body));
        self.ask(put.send()).await.map(drop)
    }

    async fn put_new(&self, key: &str, body: Bytes) -> Result<Created, String> {
        let put = self.client.put_object().bucket(&self.bucket).key(self.key(key)).body(ByteStream::from(body));
        let answer = Box::pin(tokio::time::timeout(self.timeout, put.if_none_match("*").send())).await;
        let Ok(answer) = answer else { return Err(format!("no answer within {:?}", self.timeout)) };
        match answer {
            Ok(_) => Ok(Created::Yes),
            Err(error) => match error.raw_response().map(|response| response.status().as_u16()) {
                Some(409 | 412) => Ok(Created::Exists),
                Some(400 | 501) => Ok(Created::NotKnown(text(&error))),
                _ => Err(text(&error)),
            },
        }
    }

    async fn get(&self, key: &str, range: Range<u64>) -> Result<Bytes, String> {
        let get = self.client.get_object().bucket(&self.bucket).key(self.key(key));
        let answer = self.ask(get.range(format!("bytes={}-{}", range.start, range.end - 1)).send()).await?;
        let body = tokio::time::timeout(self.timeout, answer.body.collect()).await;
        let body = body.map_err(|_| format!("no end of the body within {:?}", self.timeout))?;
        body.map(|body| body.into_bytes()).map_err(|error| error.to_string())
    }

    async fn head(&self, key: &str) -> Result<(u64, i64), String> {
        let head = self.ask(self.client.head_object().bucket(&self.bucket).key(self.key(key)).send()).await?;
        let bytes = head.content_length().and_then(|bytes| u64::try_from(bytes).ok()).ok_or("no content length")?;
        let modified = head.last_modified().and_then(|time| time.to_millis().ok()).ok_or("no modification time")?;
        Ok((bytes, modified))
    }

    async fn list(&self, folder: &str) -> Result<Vec<String>, String> {
        let prefix = format!("{}/", self.key(folder));
        let listed = self.ask(self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix).send()).await?;
        Ok(listed.contents().iter().filter_map(|object| object.key()).map(str::to_owned).collect())
    }

    async fn delete(&self, key: &str) -> Result<(), String> {
        self.ask(self.client.delete_object().bucket(&self.bucket).key(self.key(key)).send()).await.map(drop)
    }

    async fn multipart(&self, key: &str, parts: Vec<Bytes>) -> Result<(), String> {
        let (bucket, key) = (&self.bucket, self.key(key));
        let begun = self.ask(self.client.create_multipart_upload().bucket(bucket).key(&key).send()).await?;
        let id = begun.upload_id().ok_or("the store gave the upload no id")?;
        let mut done = CompletedMultipartUpload::builder();
        for (number, part) in (1..).zip(parts) {
            let put = self.client.upload_part().bucket(bucket).key(&key).upload_id(id).part_number(number);
            let sent = self.ask(put.body(ByteStream::from(part)).send()).await?;
            let part = CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag().map(str::to_owned));
            let part = part.set_checksum_crc32(sent.checksum_crc32().map(str::to_owned));
            done = done.parts(part.build());
        }
        let complete = self.client.complete_multipart_upload().bucket(bucket).key(&key).upload_id(id);
        self.ask(complete.multipart_upload(done.build()).send()).await.map(drop)
    }
}
