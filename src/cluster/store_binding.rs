//! The binding of the cluster to its object store, kept in the metadata store.

use std::sync::Arc;

use futures::future::BoxFuture;
use uuid::Uuid;

use super::{Compare, Keys, MetaStore, MetadataCache, Transaction, TxnOutcome, Value as _};
use crate::{
    task::random,
    tier::{BindingStore, StoreBinding},
};

/// Maximum number of attempts while other brokers write the key.
const MAX_ATTEMPTS: usize = 10;

/// The key `object-store` as the storage of the store binding.
pub struct MetaBindingStore {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    metadata: MetadataCache,
    /// True if the broker is standalone.
    standalone: bool,
}

impl MetaBindingStore {
    /// Returns access to the key in `store`. A standalone broker may switch to another object store while the metadata
    /// references no objects. With several brokers that is not allowed, because one broker with a wrong URL could
    /// rebind the cluster.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys, metadata: MetadataCache, standalone: bool) -> Self {
        Self { store, keys, metadata, standalone }
    }

    /// Returns true if any store may replace the bound one: the broker is standalone, and the metadata references no
    /// objects.
    fn may_rebind(&self) -> bool {
        self.standalone && !self.metadata.state().has_tiered_data()
    }

    /// Returns the cluster's binding for a broker whose store is at `url`, with the id `id` in its cluster marker.
    /// Without a marker `id` is `None`, and a new binding is pending. Creates, completes or replaces the stored binding
    /// with a compare-and-set where needed. If a complete binding names another store, the function returns it
    /// unchanged, and the caller rejects its own store.
    async fn bind_with_compare_and_set(&self, url: &str, id: Option<Uuid>) -> Result<StoreBinding, String> {
        let key = self.keys.object_store();
        for _ in 0..MAX_ATTEMPTS {
            let entry = self.store.get(&key).await.map_err(|error| error.to_string())?.entry;
            let stored = match &entry {
                Some(entry) if !self.may_rebind() => Some(decode(&key, &entry.value)?),
                // No binding is stored, or any store may replace the bound one.
                _ => None,
            };
            let binding = match (stored, id) {
                // Another store, or the bound store at its URL. Of a complete binding, the remaining case is the bound
                // id at another URL. The store was moved, and its binding gets the new URL below.
                (Some(bound), Some(id)) if !bound.pending && (bound.id != id || bound.url == url) => return Ok(bound),
                // A pending binding is returned only for its own URL. So two brokers with different URLs do not write
                // the same id into two stores.
                (Some(bound), None) if !bound.pending || bound.url == url => return Ok(bound),
                (_, Some(id)) => StoreBinding { id, url: url.to_owned(), pending: false },
                (_, None) => StoreBinding { id: random::uuid(), url: url.to_owned(), pending: true },
            };
            let unchanged = match entry {
                Some(entry) => Compare::ModRevision(key.clone(), entry.mod_revision),
                None => Compare::Absent(key.clone()),
            };
            let transaction = Transaction::new().when(unchanged).put(key.as_str(), binding.encode());
            match self.store.transact(transaction).await.map_err(|error| error.to_string())? {
                TxnOutcome::Committed { .. } => return Ok(binding),
                TxnOutcome::CompareFailed { .. } => {}
            }
        }
        Err("other brokers write the store binding at the same time".to_owned())
    }
}

fn decode(key: &str, value: &[u8]) -> Result<StoreBinding, String> {
    StoreBinding::decode(key, value).map_err(|error| error.to_string())
}

impl BindingStore for MetaBindingStore {
    fn bind<'a>(&'a self, url: &'a str, id: Option<Uuid>) -> BoxFuture<'a, Result<StoreBinding, String>> {
        Box::pin(self.bind_with_compare_and_set(url, id))
    }

    fn stored(&self) -> BoxFuture<'_, Result<Option<StoreBinding>, String>> {
        Box::pin(async {
            let key = self.keys.object_store();
            let entry = self.store.get(&key).await.map_err(|error| error.to_string())?.entry;
            entry.map(|entry| decode(&key, &entry.value)).transpose()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        cluster::EmbeddedStore,
        task::Tasks,
        tier::{BindingError, ObjectStoreOptions, StoreOwner, TierStore, name},
    };

    struct TestCluster {
        meta: Arc<dyn MetaStore>,
        metadata: MetadataCache,
        folder: tempfile::TempDir,
        _tasks: Tasks,
    }

    impl TestCluster {
        fn new() -> Self {
            let (meta, tasks) = (Arc::new(EmbeddedStore::in_memory()), Tasks::new());
            let metadata = MetadataCache::start(Arc::clone(&meta) as _, keys(), &tasks);
            Self { meta, metadata, folder: tempfile::tempdir().expect("a folder"), _tasks: tasks }
        }

        fn url(&self, path: &str) -> String {
            format!("file://{}/{path}", self.folder.path().display())
        }

        /// Returns the object store client of a broker whose store URL ends with `path`.
        fn broker(&self, path: &str, standalone: bool) -> TierStore {
            self.broker_with_data(path, standalone, false)
        }

        /// As [`Self::broker`]; with `has_data`, the metadata references objects in the cluster's store.
        fn broker_with_data(&self, path: &str, standalone: bool, has_data: bool) -> TierStore {
            let options = ObjectStoreOptions { retry_for: Duration::ZERO, ..ObjectStoreOptions::new(&self.url(path)) };
            let (meta, metadata) = (Arc::clone(&self.meta), self.metadata.clone());
            let bindings = Arc::new(MetaBindingStore::new(meta, keys(), metadata, standalone));
            let owner = StoreOwner { bindings: Some(bindings), has_data, ..StoreOwner::default() };
            TierStore::open(&options, "test").expect("valid options").owned_by(owner)
        }

        async fn stored_binding(&self) -> StoreBinding {
            let entry = self.meta.get(&keys().object_store()).await.expect("readable").entry.expect("bound");
            StoreBinding::decode("key", &entry.value).expect("a binding")
        }
    }

    fn keys() -> Keys {
        Keys::new("test").expect("valid")
    }

    #[tokio::test]
    async fn broker_with_wrong_store_url_neither_binds_nor_uses_it() {
        let cluster = TestCluster::new();
        cluster.broker("ours", false).bind().await.expect("not bound yet");
        assert_eq!(cluster.stored_binding().await.url, cluster.url("ours"));
        cluster.broker("ours", false).bind().await.expect("the same store");

        let error = cluster.broker("empty", false).bind().await.expect_err("another store");
        assert!(matches!(error, BindingError::OtherStore { .. }) && !error.retryable(), "{error}");
        let text = error.to_string();
        assert!(text.contains(&cluster.url("ours")) && text.contains(&cluster.url("empty")), "{text}");
        assert!(!cluster.folder.path().join("empty").join(name::CLUSTER).exists(), "no marker was written");

        // Another cluster with the same name has bound this store.
        let other = ObjectStoreOptions::new(&cluster.url("theirs"));
        TierStore::open(&other, "test").expect("valid options").bind().await.expect("not bound yet");
        let error = cluster.broker("theirs", false).bind().await.expect_err("another store");
        assert!(matches!(error, BindingError::OtherStore { .. }) && error.is_fatal_at_start(), "{error}");
        assert_eq!(cluster.stored_binding().await.url, cluster.url("ours"));
    }

    /// A bound broker accepts a cluster marker without an id that names its cluster. An operator recreates a corrupt
    /// marker in this way (docs/errors.md). Regression: the running broker rejected the new marker as that of another
    /// store.
    #[tokio::test]
    async fn recreated_cluster_marker_is_accepted_by_bound_broker() {
        let cluster = TestCluster::new();
        let broker = cluster.broker("ours", false);
        broker.bind().await.expect("not bound yet");
        let marker = cluster.folder.path().join("ours").join(name::CLUSTER);
        std::fs::write(&marker, "not JSON").expect("written");
        assert!(matches!(broker.bind().await, Err(BindingError::Unreadable { .. })));
        std::fs::write(&marker, r#"{"format":1,"cluster":"test"}"#).expect("written");
        broker.bind().await.expect("the marker names this cluster");
        cluster.broker("ours", false).bind().await.expect("the marker names this cluster");
    }

    #[tokio::test]
    async fn store_moved_with_its_cluster_marker_is_the_same() {
        let cluster = TestCluster::new();
        cluster.broker("ours", false).bind().await.expect("not bound yet");
        let before = cluster.stored_binding().await;
        std::fs::rename(cluster.folder.path().join("ours"), cluster.folder.path().join("moved")).expect("moved");
        cluster.broker("moved", false).bind().await.expect("the same marker");
        assert_eq!(cluster.stored_binding().await, StoreBinding { url: cluster.url("moved"), ..before });
    }

    #[tokio::test]
    async fn standalone_broker_without_history_may_rebind() {
        let cluster = TestCluster::new();
        cluster.broker("first", true).bind().await.expect("not bound yet");
        cluster.broker("second", true).bind().await.expect("the first store has no history");
        assert_eq!(cluster.stored_binding().await.url, cluster.url("second"));
    }

    /// A broker that crashes before it has written the cluster marker leaves a pending binding. A broker with the same
    /// URL completes the binding and keeps its id; a broker with another URL replaces it.
    #[tokio::test]
    async fn pending_binding_is_completed_with_its_id() {
        let write_pending = async |cluster: &TestCluster, path: &str| {
            let binding = StoreBinding { id: uuid::Uuid::from_u128(7), url: cluster.url(path), pending: true };
            let put = Transaction::new().put(keys().object_store(), binding.encode());
            cluster.meta.transact(put).await.expect("written");
            binding
        };
        let cluster = TestCluster::new();
        let reserved = write_pending(&cluster, "ours").await;
        cluster.broker("ours", false).bind().await.expect("not bound yet");
        assert_eq!(cluster.stored_binding().await, StoreBinding { pending: false, ..reserved });

        // The pending binding has a wrong URL, which the operator has corrected since.
        let cluster = TestCluster::new();
        let wrong = write_pending(&cluster, "wrong").await;
        cluster.broker("right", false).bind().await.expect("the wrong store has no history");
        let binding = cluster.stored_binding().await;
        assert!(binding.url == cluster.url("right") && binding.id != wrong.id && !binding.pending, "{binding:?}");
    }

    /// If the metadata references objects, a store without a cluster marker is rejected, and the binding stays as it
    /// is. Regression: the broker wrote a pending binding before it rejected the store.
    #[tokio::test]
    async fn missing_store_with_history_changes_no_binding() {
        let cluster = TestCluster::new();
        let reject = async || {
            let broker = cluster.broker_with_data("empty", false, true);
            let error = broker.bind().await.expect_err("the objects are in another store");
            assert!(matches!(error, BindingError::Missing { .. }), "{error}");
        };
        reject().await;
        assert_eq!(cluster.meta.get(&keys().object_store()).await.expect("readable").entry, None);
        let pending = StoreBinding { id: uuid::Uuid::from_u128(7), url: cluster.url("ours"), pending: true };
        let put = Transaction::new().put(keys().object_store(), pending.encode());
        cluster.meta.transact(put).await.expect("written");
        reject().await;
        assert_eq!(cluster.stored_binding().await, pending);
    }

    #[tokio::test]
    async fn unreadable_binding_is_not_overwritten() {
        let cluster = TestCluster::new();
        let put = Transaction::new().put(keys().object_store(), bytes::Bytes::from_static(b"{broken"));
        cluster.meta.transact(put).await.expect("written");
        let error = cluster.broker("ours", false).bind().await.expect_err("the binding is unreadable");
        assert!(
            matches!(&error, BindingError::Binding(reason) if reason.contains("object-store")) && error.retryable(),
            "{error}"
        );
        assert!(!cluster.folder.path().join("ours").join(name::CLUSTER).exists(), "no marker was written");
    }
}
