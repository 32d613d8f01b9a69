//! The binding of the cluster to its object store, kept in the metadata store.

use std::sync::Arc;

use futures::future::BoxFuture;

use super::{Compare, Entry, Keys, MetaStore, Outcome, Transaction, Value as _, View};
use crate::tier::{StoreNote, StoreNotes};

/// Maximum number of attempts while other brokers write the key.
const ATTEMPTS: usize = 10;

/// Access to the key `object-store`.
pub struct ObjectStoreKey {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    view: View,
    /// True if the broker is standalone.
    alone: bool,
}

impl ObjectStoreKey {
    /// Returns access to the key in `store`. A standalone broker may switch to another object store while the metadata
    /// references no objects. With several brokers, a single broker with a wrong URL could otherwise rebind the
    /// cluster.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys, view: View, alone: bool) -> Self {
        Self { store, keys, view, alone }
    }

    fn is_free(&self) -> bool {
        self.alone && !self.view.state().names_history()
    }

    /// Returns the entry of the key, and the binding that it contains if that binding is in force.
    async fn read(&self) -> Result<(Option<Entry>, Option<StoreNote>), String> {
        let key = self.keys.object_store();
        let entry = self.store.get(&key).await.map_err(|error| error.to_string())?.entry;
        let note = match &entry {
            Some(entry) if !self.is_free() => {
                Some(StoreNote::decode(&key, &entry.value).map_err(|error| error.to_string())?)
            }
            _ => None,
        };
        Ok((entry, note))
    }

    async fn write(&self, mine: StoreNote) -> Result<StoreNote, String> {
        let key = self.keys.object_store();
        for _ in 0..ATTEMPTS {
            let unchanged = match self.read().await? {
                (_, Some(noted)) if noted.outlasts(&mine) => return Ok(noted),
                (Some(entry), _) => Compare::ModRevision(key.clone(), entry.mod_revision),
                (None, _) => Compare::Absent(key.clone()),
            };
            let transaction = Transaction::new().when(unchanged).put(key.as_str(), mine.encode());
            match self.store.transact(transaction).await.map_err(|error| error.to_string())? {
                Outcome::Done { .. } => return Ok(mine),
                Outcome::Refused { .. } => {}
            }
        }
        Err("other brokers note it at the same time".to_owned())
    }
}

impl StoreNotes for ObjectStoreKey {
    fn noted(&self) -> BoxFuture<'_, Result<Option<StoreNote>, String>> {
        Box::pin(async { Ok(self.read().await?.1) })
    }

    fn note(&self, mine: StoreNote) -> BoxFuture<'_, Result<StoreNote, String>> {
        Box::pin(self.write(mine))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        cluster::EmbeddedStore,
        task::Tasks,
        tier::{ClaimError, Store, StoreOptions, name},
    };

    struct Cluster {
        meta: Arc<dyn MetaStore>,
        view: View,
        folder: tempfile::TempDir,
        _tasks: Tasks,
    }

    impl Cluster {
        fn new() -> Self {
            let (meta, tasks) = (Arc::new(EmbeddedStore::in_memory()), Tasks::new());
            let view = View::start(Arc::clone(&meta) as _, keys(), &tasks);
            Self { meta, view, folder: tempfile::tempdir().expect("a folder"), _tasks: tasks }
        }

        fn url(&self, place: &str) -> String {
            format!("file://{}/{place}", self.folder.path().display())
        }

        /// Returns the client of a broker whose URL names this place.
        fn broker(&self, place: &str, alone: bool) -> Store {
            let options = StoreOptions { retry_for: Duration::ZERO, ..StoreOptions::new(&self.url(place)) };
            let store = Store::open(&options, "test").expect("good options");
            store.go_by(Arc::new(ObjectStoreKey::new(Arc::clone(&self.meta), keys(), self.view.clone(), alone)));
            store
        }

        async fn note(&self) -> StoreNote {
            let entry = self.meta.get(&keys().object_store()).await.expect("answers").entry.expect("noted");
            StoreNote::decode("key", &entry.value).expect("a note")
        }
    }

    fn keys() -> Keys {
        Keys::new("test").expect("valid")
    }

    #[tokio::test]
    async fn broker_with_wrong_store_url_neither_binds_nor_uses_it() {
        let cluster = Cluster::new();
        cluster.broker("ours", false).claim().await.expect("nobody's yet");
        assert_eq!(cluster.note().await.place, cluster.url("ours"));
        cluster.broker("ours", false).claim().await.expect("as the first does");

        let error = cluster.broker("empty", false).claim().await.expect_err("not ours");
        assert!(matches!(error, ClaimError::Elsewhere { .. }) && !error.retryable(), "{error}");
        let text = error.to_string();
        assert!(text.contains(&cluster.url("ours")) && text.contains(&cluster.url("empty")), "{text}");
        assert!(!cluster.folder.path().join("empty").join(name::CLUSTER).exists(), "it is not taken");

        // A store of another cluster with the same name.
        let other = StoreOptions::new(&cluster.url("theirs"));
        Store::open(&other, "test").expect("good options").claim().await.expect("nobody's yet");
        let error = cluster.broker("theirs", false).claim().await.expect_err("not ours");
        assert!(matches!(error, ClaimError::Elsewhere { .. }) && error.ends_start(), "{error}");
        assert_eq!(cluster.note().await.place, cluster.url("ours"));
    }

    /// A recreated cluster marker, as docs/errors.md instructs after corruption while the broker ran. Regression: the
    /// broker took the new marker for another store's.
    #[tokio::test]
    async fn recreated_cluster_marker_is_accepted_by_bound_broker() {
        let cluster = Cluster::new();
        let broker = cluster.broker("ours", false);
        broker.claim().await.expect("nobody has it");
        let card = cluster.folder.path().join("ours").join(name::CLUSTER);
        std::fs::write(&card, "rubbish").expect("written");
        assert!(matches!(broker.claim().await, Err(ClaimError::Unreadable { .. })));
        std::fs::write(&card, r#"{"format":1,"cluster":"test"}"#).expect("written");
        broker.claim().await.expect("it is said to be ours");
        cluster.broker("ours", false).claim().await.expect("by everybody");
    }

    #[tokio::test]
    async fn store_moved_with_its_cluster_marker_is_the_same() {
        let cluster = Cluster::new();
        cluster.broker("ours", false).claim().await.expect("nobody's yet");
        let before = cluster.note().await;
        std::fs::rename(cluster.folder.path().join("ours"), cluster.folder.path().join("moved")).expect("moved");
        cluster.broker("moved", false).claim().await.expect("the same card");
        assert_eq!(cluster.note().await, StoreNote { place: cluster.url("moved"), ..before });
    }

    #[tokio::test]
    async fn standalone_broker_without_history_may_rebind() {
        let cluster = Cluster::new();
        cluster.broker("first", true).claim().await.expect("nobody's yet");
        cluster.broker("second", true).claim().await.expect("nothing is in the first");
        assert_eq!(cluster.note().await.place, cluster.url("second"));
    }

    /// A broker that crashes before it has written the cluster marker leaves a binding that another broker can
    /// complete.
    #[tokio::test]
    async fn pending_binding_is_completed_with_its_id() {
        let reserve = async |cluster: &Cluster, place: &str| {
            let note = StoreNote { id: uuid::Uuid::from_u128(7), place: cluster.url(place), reserved: true };
            let put = Transaction::new().put(keys().object_store(), note.encode());
            cluster.meta.transact(put).await.expect("answers");
            note
        };
        let cluster = Cluster::new();
        let reserved = reserve(&cluster, "ours").await;
        cluster.broker("ours", false).claim().await.expect("nobody's yet");
        assert_eq!(cluster.note().await, StoreNote { reserved: false, ..reserved });

        // The URL was corrected meanwhile.
        let cluster = Cluster::new();
        let wrong = reserve(&cluster, "wrong").await;
        cluster.broker("right", false).claim().await.expect("nothing was in the wrong place");
        let note = cluster.note().await;
        assert!(note.place == cluster.url("right") && note.id != wrong.id && !note.reserved, "{note:?}");
    }

    #[tokio::test]
    async fn unreadable_binding_is_not_overwritten() {
        let cluster = Cluster::new();
        let put = Transaction::new().put(keys().object_store(), bytes::Bytes::from_static(b"{broken"));
        cluster.meta.transact(put).await.expect("answers");
        let error = cluster.broker("ours", false).claim().await.expect_err("which store is not known");
        assert!(
            matches!(&error, ClaimError::Notes(why) if why.contains("object-store")) && error.retryable(),
            "{error}"
        );
        assert!(!cluster.folder.path().join("ours").join(name::CLUSTER).exists(), "nothing is taken meanwhile");
    }
}
