//! Creates the client of an object store from a URL and options.

use std::{sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, RetryConfig, aws::AmazonS3Builder, azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder, local::LocalFileSystem, memory::InMemory, path::Path,
};

use super::folder::Folder;

/// An access key with its secret. The `Debug` output omits the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct AccessKeys {
    /// Id of the access key.
    pub access_key_id: String,
    /// Secret of the access key.
    pub secret_access_key: String,
}

impl std::fmt::Debug for AccessKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessKeys").field("access_key_id", &self.access_key_id).finish_non_exhaustive()
    }
}

/// Location of the object store, and time limits of its requests. Unless `keys` is set, credentials come from the
/// sources that the vendor's own tools read (`AWS_ACCESS_KEY_ID`, web identity, instance metadata; `GOOGLE_…`,
/// `AZURE_…`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectStoreOptions {
    /// `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, `file:///dir` or `memory://`.
    pub url: String,
    /// For `s3`: URL of a service other than AWS. `http://` is allowed.
    pub endpoint: Option<String>,
    /// For `s3`: the region. `None` means that of `AWS_REGION`, else of `AWS_DEFAULT_REGION`, else `us-east-1`.
    pub region: Option<String>,
    /// For `s3`: true if requests name the bucket in the path instead of the host name. `None` means true if an
    /// endpoint is set by the options, by `AWS_ENDPOINT_URL_S3` or by `AWS_ENDPOINT_URL`. Requests to an IP address
    /// always name the bucket in the path.
    pub path_style: Option<bool>,
    /// For `s3`: access key that replaces the credentials of the environment.
    pub keys: Option<AccessKeys>,
    /// Time limit of one request.
    pub request_timeout: Duration,
    /// Time during which a failed request is retried.
    pub retry_for: Duration,
}

impl ObjectStoreOptions {
    /// Creates the options for a URL, with defaults for the other fields.
    pub fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            endpoint: None,
            region: None,
            path_style: None,
            keys: None,
            request_timeout: Duration::from_secs(30),
            retry_for: Duration::from_secs(20),
        }
    }

    /// Returns the URL of a service other than AWS, from the options or else from the environment; `None` for AWS.
    pub(super) fn named_endpoint(&self) -> Option<String> {
        let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
        self.endpoint.clone().or_else(|| variable("AWS_ENDPOINT_URL_S3")).or_else(|| variable("AWS_ENDPOINT_URL"))
    }

    /// Returns true if requests to `endpoint` name the bucket in the path. A bucket name in the host cannot precede an
    /// IP address, so the path is then used regardless of `path_style`.
    pub(super) fn in_path(&self, endpoint: Option<&str>) -> bool {
        endpoint.is_some_and(is_address) || self.path_style.unwrap_or(endpoint.is_some())
    }

    /// Returns true if the URL has S3's scheme.
    pub(super) fn is_s3(&self) -> bool {
        ["s3://", "s3a://"].iter().any(|scheme| self.url.starts_with(scheme))
    }
}

/// Error for options from which no client can be created.
#[derive(Debug, thiserror::Error)]
pub enum ObjectStoreOptionsError {
    /// The URL has no scheme or an unknown one, or names no bucket.
    #[error(
        "object store URL {url:?} is not one of s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, \
         file:///dir and memory://"
    )]
    Url {
        /// URL in the options.
        url: String,
    },
    /// The prefix is invalid, the client cannot be created from the options and the environment, or the directory of a
    /// `file://` URL cannot be created.
    #[error("object store {url:?} cannot be opened: {reason}")]
    Client {
        /// URL in the options.
        url: String,
        reason: String,
    },
}

/// Creates the client, and the directory of a `file://` URL if it does not exist. Also returns the prefix in the store.
pub(super) fn open(options: &ObjectStoreOptions) -> Result<(Arc<dyn ObjectStore>, Path), ObjectStoreOptionsError> {
    let url = options.url.as_str();
    let unknown = || ObjectStoreOptionsError::Url { url: url.to_owned() };
    let refuse = |reason: String| ObjectStoreOptionsError::Client { url: url.to_owned(), reason };
    let client = |error: object_store::Error| refuse(super::error::reason(&error));
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
                .with_retry(client_retries())
                .with_client_options(client_options(options, false))
                .build()
                .map_err(client)?,
        ),
        "az" | "azure" | "abfs" => Arc::new(
            MicrosoftAzureBuilder::from_env()
                .with_container_name(bucket)
                .with_retry(client_retries())
                .with_client_options(client_options(options, false))
                .build()
                .map_err(client)?,
        ),
        _ => return Err(unknown()),
    };
    Ok((objects, prefix))
}

/// Returns the builder of an S3 client for a bucket.
fn s3(options: &ObjectStoreOptions, bucket: &str) -> AmazonS3Builder {
    let endpoint = options.named_endpoint();
    let is_http = endpoint.as_deref().is_some_and(|endpoint| endpoint.starts_with("http://"));
    let in_path = options.in_path(endpoint.as_deref());
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_virtual_hosted_style_request(!in_path)
        .with_retry(client_retries())
        .with_client_options(client_options(options, is_http))
        .with_allow_http(is_http);
    if let Some(endpoint) = endpoint {
        // In virtual-hosted style, the client expects the bucket name in the endpoint's host and does not add the name
        // itself.
        builder = builder.with_endpoint(if in_path { endpoint } else { with_bucket(&endpoint, bucket) });
    }
    if let Some(region) = &options.region {
        builder = builder.with_region(region);
    }
    if let Some(keys) = &options.keys {
        builder = builder.with_access_key_id(&keys.access_key_id).with_secret_access_key(&keys.secret_access_key);
    }
    builder
}

/// Returns the endpoint's host, without the port.
fn host(endpoint: &str) -> &str {
    let rest = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => authority.split(':').next().unwrap_or_default(),
    }
}

/// Returns true if the host of an endpoint is an IP address.
fn is_address(endpoint: &str) -> bool {
    host(endpoint).parse::<std::net::IpAddr>().is_ok()
}

/// Returns `https://bucket.host:port` for `https://host:port`.
fn with_bucket(endpoint: &str, bucket: &str) -> String {
    match endpoint.split_once("://") {
        Some((scheme, rest)) => format!("{scheme}://{bucket}.{rest}"),
        None => format!("{bucket}.{endpoint}"),
    }
}

/// Opens a directory as object store. Creates the directory if it is missing. Every write is synced before it succeeds,
/// because the local copy of a segment may be evicted after the commit.
fn directory(path: &str) -> Result<Folder, String> {
    if !path.starts_with('/') {
        return Err("a file URL needs an absolute path: file:///dir".to_owned());
    }
    super::files::create_folder(std::path::Path::new(path)).map_err(|error| format!("folder {path}: {error}"))?;
    let store = LocalFileSystem::new_with_prefix(path).map_err(|error| super::error::reason(&error))?;
    Ok(Folder::new(store.with_fsync(true)))
}

/// Returns the retry options of the client itself, which makes at most two quick retries: one failed part would
/// otherwise fail its complete multipart upload. `store` does all longer retries, because it can cancel them and
/// reports their outcome to the outage tracker.
fn client_retries() -> RetryConfig {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(50), max_backoff: Duration::from_secs(1), base: 2.0 };
    RetryConfig { backoff, max_retries: 2, retry_timeout: Duration::from_secs(10) }
}

/// Returns the options of the HTTP client. `allow_http` permits requests without TLS.
fn client_options(options: &ObjectStoreOptions, allow_http: bool) -> ClientOptions {
    ClientOptions::new()
        .with_allow_http(allow_http)
        .with_timeout(options.request_timeout)
        .with_connect_timeout(Duration::from_secs(5).min(options.request_timeout))
        .with_pool_max_idle_per_host(64)
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn at(endpoint: &str, path_style: Option<bool>) -> ObjectStoreOptions {
        let keys = AccessKeys { access_key_id: "a".to_owned(), secret_access_key: "b".to_owned() };
        let endpoint = Some(endpoint.to_owned());
        ObjectStoreOptions { endpoint, path_style, keys: Some(keys), ..ObjectStoreOptions::new("s3://bucket/prefix") }
    }

    /// Regression: with an IP address as endpoint, `doctor` named the bucket in the path and reported success. The
    /// broker sent its requests to a bucket with the name of the prefix.
    #[tokio::test]
    async fn bucket_is_in_path_if_endpoint_is_an_address() {
        for path_style in [None, Some(true), Some(false)] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = format!("http://{}", listener.local_addr().unwrap());
            let (objects, prefix) = open(&at(&endpoint, path_style)).unwrap();
            let path = prefix.clone().join("object");
            let request_text = async {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 4096];
                let read = socket.read(&mut request).await.unwrap();
                socket.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await.unwrap();
                String::from_utf8_lossy(&request[..read]).into_owned()
            };
            let (request, response) = tokio::join!(request_text, objects.get(&path));
            assert!(request.starts_with("GET /bucket/prefix/object HTTP/1.1"), "{path_style:?}: {request}");
            assert!(response.is_err());
        }
    }

    #[tokio::test]
    async fn refused_connection_error_names_only_the_address() {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (objects, prefix) = open(&at(&format!("http://{address}"), None)).unwrap();
        let error = objects.get(&prefix.join("object")).await.unwrap_err();
        assert_eq!(super::super::error::reason(&error), format!("http://{address}: connection refused"));
    }

    #[test]
    fn bucket_location_follows_endpoint_and_path_style() {
        let named = "https://s3.example:9000";
        assert!(at(named, None).in_path(Some(named)), "an endpoint is set");
        assert!(!at(named, Some(false)).in_path(Some(named)), "the option takes precedence");
        assert!(!ObjectStoreOptions::new("s3://bucket").in_path(None), "AWS uses the host name");
        assert_eq!(with_bucket(named, "bucket"), "https://bucket.s3.example:9000");
        for (endpoint, address) in
            [("http://[::1]:9000", true), ("http://10.0.0.1", true), ("http://localhost:9000", false)]
        {
            assert_eq!(is_address(endpoint), address, "{endpoint}");
        }
    }
}
