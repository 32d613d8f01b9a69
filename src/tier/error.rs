//! Errors of the object store: of its requests, of the owner of its prefix, and of cold reads.

use super::name::{ManifestName, ObjectId};
use crate::model::Offset;

/// Error of a request to the object store.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TierStoreError {
    #[error("object {object} does not exist")]
    NotFound {
        /// Name of the object, below the prefix.
        object: String,
    },
    /// The store rejects the credentials, or the credentials do not allow the request.
    #[error("the object store denies access to {object} ({reason}): check the credentials and the bucket's policy")]
    Denied {
        /// Name of the object, below the prefix.
        object: String,
        reason: String,
    },
    /// The store did not respond, or cannot serve the request now.
    #[error("the object store cannot serve {object}: {reason}")]
    Unavailable {
        /// Name of the object, below the prefix.
        object: String,
        reason: String,
    },
    /// The store does not support the operation, or the client rejects its path or configuration.
    #[error(
        "the object store or its client refused a request for {object}: {reason}; check the settings object_store.* \
         with `strandline doctor`"
    )]
    Unsupported {
        /// Name of the object, below the prefix.
        object: String,
        reason: String,
    },
    #[error("the object store's client is stopping")]
    Stopped,
}

impl TierStoreError {
    /// Returns true if the same request may succeed later without intervention.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    /// Converts the error of a request for `object`. Every error that is not a missing object, a denial, an unsupported
    /// operation or an invalid path or configuration becomes `Unavailable`, which is retried.
    pub(super) fn new(object: &str, error: &object_store::Error) -> Self {
        use object_store::Error as E;
        let (object, reason) = (object.to_owned(), reason(error));
        match error {
            E::NotFound { .. } => Self::NotFound { object },
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => Self::Denied { object, reason },
            E::NotImplemented { .. }
            | E::NotSupported { .. }
            | E::InvalidPath { .. }
            | E::UnknownConfigurationKey { .. } => Self::Unsupported { object, reason },
            _ => Self::Unavailable { object, reason },
        }
    }
}

/// Error for a prefix that this cluster cannot use, or cannot verify yet.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BindingError {
    /// The prefix contains another cluster's history.
    #[error(
        "{url} belongs to cluster {theirs:?}, and this is cluster {ours:?}: give each cluster a bucket or prefix of \
         its own"
    )]
    Foreign { url: String, ours: String, theirs: String },
    /// The store is not the one that this cluster uses: its `cluster.json` is missing or has another id.
    #[error(
        "{url} is not the object store of this cluster, which is {bound_url} ({found}): correct object_store.url and \
         object_store.endpoint; to move the store, copy all of its objects, including cluster.json"
    )]
    OtherStore {
        /// Location of this store.
        url: String,
        /// Location of the cluster's store.
        bound_url: String,
        /// Difference of this store.
        found: &'static str,
    },
    /// `cluster.json` is missing after its write, invalid, or of a newer format.
    #[error("{url}/cluster.json, which names the owner of the prefix, cannot be read: {reason}")]
    Unreadable { url: String, reason: String },
    /// The cluster's store is missing: an unmounted disk, a folder that was moved, or a changed URL.
    #[error(
        "{url} has no cluster.json, although this cluster has objects in its store, so nothing is written to it: \
         mount the store, move it back, or correct object_store.url"
    )]
    Missing { url: String },
    /// The metadata store has an older cluster generation than `cluster.json`: the metadata store was restored from a
    /// backup that is older than the objects.
    #[error(
        "the metadata store is at cluster generation {ours}, and {url}/cluster.json at the later generation \
         {theirs}: restore a newer backup of etcd, or stop all brokers and run `strandline cluster new-generation \
         --config FILE`, which sets a generation above both"
    )]
    Generation { url: String, ours: u64, theirs: u64 },
    #[error("the bucket of {url} does not exist: create it, or correct object_store.url")]
    NoBucket { url: String },
    #[error(transparent)]
    Store(#[from] TierStoreError),
    /// The store binding cannot be read or written.
    #[error("cannot read or write the store binding of the cluster: {0}")]
    Binding(String),
}

impl BindingError {
    /// Returns true if a later attempt may succeed with the same configuration.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Missing { .. } | Self::Binding(_) => true,
            Self::Store(error) => error.retryable(),
            Self::Foreign { .. }
            | Self::OtherStore { .. }
            | Self::Unreadable { .. }
            | Self::Generation { .. }
            | Self::NoBucket { .. } => false,
        }
    }

    /// Returns true if the store belongs to another cluster, is not the one to which this cluster is bound, or has a
    /// later generation. Later attempts would fail as well, so a broker must not run with this store.
    pub fn is_fatal_at_start(&self) -> bool {
        matches!(self, Self::Foreign { .. } | Self::OtherStore { .. } | Self::Generation { .. })
    }
}

/// Error of a read from the object store.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TierReadError {
    /// The offset is below the log start, or the object store does not contain it yet.
    #[error("offset {offset} is not in the object store, which holds {start}..{end}")]
    OutOfRange { offset: Offset, start: Offset, end: Offset },
    /// An object that the manifest references, or the manifest itself, does not exist.
    #[error("object {object} is missing from the object store: restore it")]
    Missing {
        /// Name of the object, below the prefix.
        object: String,
    },
    /// The content of an object is corrupt. The read returns none of it.
    #[error("object {object} is corrupt: {reason}")]
    Corrupt {
        /// Name of the object, below the prefix.
        object: String,
        /// Check that failed.
        reason: String,
    },
    /// The batch is larger than both limits of the reader (`ReadLimits`), and was not read.
    #[error("the batch has {bytes} bytes, which exceeds the memory of the reader")]
    BatchTooLarge { bytes: usize },
    #[error(transparent)]
    Store(TierStoreError),
}

impl TierReadError {
    /// Returns the manifest or manifest page that is missing or corrupt. Returns `None` for every other error.
    pub fn lost_manifest(&self) -> Option<&str> {
        let (Self::Missing { object } | Self::Corrupt { object, .. }) = self else { return None };
        let file = object.rsplit('/').next().unwrap_or(object);
        let is_manifest = file.parse::<ManifestName>().is_ok() || ObjectId::from_page(file).is_ok();
        is_manifest.then_some(object)
    }

    /// Returns true if the same read may succeed later without intervention.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Store(error) if error.retryable())
    }
}

impl From<TierStoreError> for TierReadError {
    fn from(error: TierStoreError) -> Self {
        match error {
            TierStoreError::NotFound { object } => Self::Missing { object },
            error => Self::Store(error),
        }
    }
}

/// Returns an error with its causes in one line of at most 500 characters, each text once. For a refused connection,
/// returns only the address and `connection refused`.
pub(super) fn reason(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    if innermost.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused) {
        let text = error.to_string();
        return address(&text).map_or_else(String::new, |address| format!("{address}: ")) + "connection refused";
    }
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let cause_text = error.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        cause = error.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(500).collect()
}

/// Returns scheme, host and port of the first URL in a text; `None` if the text contains no URL.
fn address(text: &str) -> Option<&str> {
    let colon = text.find("://")?;
    let start = text[..colon].rfind(|c: char| !c.is_ascii_alphanumeric()).map_or(0, |before| before + 1);
    let host = colon + "://".len();
    let end = text[host..].find(['/', ' ', '"', ')']).map_or(text.len(), |length| host + length);
    Some(&text[start..end])
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::model::LeaderEpoch;

    #[test]
    fn only_manifests_and_pages_are_lost_manifests() {
        let end = Offset::new(9).expect("valid");
        let stamp = ObjectId { base: Offset::ZERO, end, epoch: LeaderEpoch(1), attempt: Uuid::from_u128(7) };
        let manifest = ManifestName { version: 7, epoch: LeaderEpoch(5), attempt: Uuid::from_u128(1) };
        let object = |file: String| format!("topics/x/0/{file}");
        let missing = |file| TierReadError::Missing { object: object(file) };
        assert_eq!(missing(manifest.to_string()).lost_manifest(), Some(&*object(manifest.to_string())));
        assert!(missing(stamp.page()).lost_manifest().is_some());
        assert!(missing(stamp.segment()).lost_manifest().is_none());
        let outage = TierStoreError::Unavailable { object: object(manifest.to_string()), reason: "down".to_owned() };
        assert!(TierReadError::Store(outage).lost_manifest().is_none());
    }
}
