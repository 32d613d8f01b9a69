//! From a URL and options to a client of an object store.

use std::{sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, RetryConfig, aws::AmazonS3Builder, azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder, local::LocalFileSystem, memory::InMemory, path::Path,
};

/// How an upload is checked before anything relies on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Its length, and every byte is read back and compared by CRC-32C.
    #[default]
    Whole,
    /// Its length and its footer. The data's integrity in transit rests on the request's signature.
    Footer,
}

/// An access key and its secret. Printing it shows no secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    /// The access key's id.
    pub access_key_id: String,
    /// The secret.
    pub secret_access_key: String,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("access_key_id", &self.access_key_id).finish_non_exhaustive()
    }
}

/// Where the object store is and how patient to be with it. Credentials come from the environment, as the vendor's own
/// tools read it (`AWS_ACCESS_KEY_ID`, web identity, instance metadata; `GOOGLE_…`, `AZURE_…`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreOptions {
    /// `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, `file:///dir` or `memory://`.
    pub url: String,
    /// For `s3`: where the service is, when it is not AWS. `http://` is allowed here.
    pub endpoint: Option<String>,
    /// For `s3`: the region.
    pub region: Option<String>,
    /// For `s3`: the bucket in the path instead of the host name.
    pub path_style: bool,
    /// For `s3`: keys to use instead of those of the environment.
    pub keys: Option<Keys>,
    /// Longest time that one request may take.
    pub request_timeout: Duration,
    /// Longest time that a request is asked again.
    pub retry_for: Duration,
    /// How an upload is checked.
    pub verify: Verify,
}

impl StoreOptions {
    /// The options for a URL, with the defaults for the rest.
    pub fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            endpoint: None,
            region: None,
            path_style: false,
            keys: None,
            request_timeout: Duration::from_secs(30),
            retry_for: Duration::from_secs(20),
            verify: Verify::Whole,
        }
    }

    /// Whether the store speaks S3.
    pub(super) fn is_s3(&self) -> bool {
        ["s3://", "s3a://"].iter().any(|scheme| self.url.starts_with(scheme))
    }
}

/// Options that name no store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL's scheme is none that we know, or there is no scheme.
    #[error(
        "object store URL {url:?} is not one of s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, \
         file:///dir and memory://"
    )]
    Url {
        /// What was given.
        url: String,
    },
    /// The client could not be made from the URL and the environment.
    #[error("object store {url:?} cannot be opened: {reason}")]
    Client {
        /// What was given.
        url: String,
        /// What is wrong.
        reason: String,
    },
}

/// The client and the prefix inside of it.
pub(super) fn open(options: &StoreOptions) -> Result<(Arc<dyn ObjectStore>, Path), OpenError> {
    let url = options.url.as_str();
    let unknown = || OpenError::Url { url: url.to_owned() };
    let refuse = |reason: String| OpenError::Client { url: url.to_owned(), reason };
    let client = |error: object_store::Error| refuse(super::store::reason(&error));
    let (scheme, rest) = url.split_once("://").ok_or_else(unknown)?;
    if scheme == "memory" {
        return Ok((Arc::new(InMemory::new()), Path::from(rest)));
    }
    if scheme == "file" {
        return Ok((Arc::new(directory(rest).map_err(refuse)?), Path::default()));
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(unknown());
    }
    let prefix = Path::parse(prefix).map_err(|error| refuse(error.to_string()))?;
    let objects: Arc<dyn ObjectStore> = match scheme {
        "s3" | "s3a" => Arc::new(s3(options, bucket).build().map_err(client)?),
        "gs" => Arc::new(
            GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(bucket)
                .with_retry(no_retry())
                .with_client_options(client_options(options, false))
                .build()
                .map_err(client)?,
        ),
        "az" | "azure" | "abfs" => Arc::new(
            MicrosoftAzureBuilder::from_env()
                .with_container_name(bucket)
                .with_retry(no_retry())
                .with_client_options(client_options(options, false))
                .build()
                .map_err(client)?,
        ),
        _ => return Err(unknown()),
    };
    Ok((objects, prefix))
}

fn s3(options: &StoreOptions, bucket: &str) -> AmazonS3Builder {
    let plain = options.endpoint.as_deref().is_some_and(|endpoint| endpoint.starts_with("http://"));
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_virtual_hosted_style_request(!options.path_style)
        .with_retry(no_retry())
        .with_client_options(client_options(options, plain))
        .with_allow_http(plain);
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(region) = &options.region {
        builder = builder.with_region(region);
    }
    if let Some(keys) = &options.keys {
        builder = builder.with_access_key_id(&keys.access_key_id).with_secret_access_key(&keys.secret_access_key);
    }
    builder
}

/// A directory as object store. It is made if need be, and what is written is synced before it counts: after the commit the
/// local copy may go.
fn directory(path: &str) -> Result<LocalFileSystem, String> {
    if !path.starts_with('/') {
        return Err("a file URL needs an absolute path: file:///dir".to_owned());
    }
    super::files::create_folder(std::path::Path::new(path)).map_err(|error| format!("folder {path}: {error}"))?;
    let store = LocalFileSystem::new_with_prefix(path).map_err(|error| super::store::reason(&error))?;
    Ok(store.with_fsync(true))
}

/// Retries are ours, so that they can be stopped and are counted once. One quick second try stays inside a multipart
/// upload, where a failed part would otherwise cost all others.
fn no_retry() -> RetryConfig {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(50), max_backoff: Duration::from_secs(1), base: 2.0 };
    RetryConfig { backoff, max_retries: 2, retry_timeout: Duration::from_secs(10) }
}

fn client_options(options: &StoreOptions, plain: bool) -> ClientOptions {
    ClientOptions::new()
        .with_allow_http(plain)
        .with_timeout(options.request_timeout)
        .with_connect_timeout(Duration::from_secs(5).min(options.request_timeout))
        .with_pool_max_idle_per_host(64)
}
