//! Store binding: the object store that a cluster uses, the interface to the storage of the binding, and the state
//! of both in one process.

use std::sync::Arc;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::{OnceCell, watch};
use uuid::Uuid;

/// Store binding: the object store that a cluster uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreBinding {
    /// Id in the store's `cluster.json`.
    pub id: Uuid,
    /// URL of the store, with the endpoint if there is one.
    pub url: String,
    /// True before `cluster.json` is written. A pending binding does not exclude other stores yet, but a broker that
    /// writes `cluster.json` to this store uses this id.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pending: bool,
}

/// Storage of the store binding, outside of the object store. Errors are texts for people; a later attempt may succeed.
pub trait BindingStore: Send + Sync {
    /// Returns the cluster's binding for a broker whose store is at `url`, with `id` in its cluster marker. Without
    /// `id`, a new binding is pending. Creates, completes or replaces the stored binding with a compare-and-set where
    /// needed. A complete binding of another store is returned unchanged.
    fn bind<'a>(&'a self, url: &'a str, id: Option<Uuid>) -> BoxFuture<'a, Result<StoreBinding, String>>;

    /// Returns the stored binding, if there is one. Changes nothing.
    fn stored(&self) -> BoxFuture<'_, Result<Option<StoreBinding>, String>>;
}

/// The cluster that a prefix must belong to.
#[derive(Clone, Default)]
pub struct StoreOwner {
    /// Storage of the binding. `TierStore::bind` fails for a store other than the bound one, and binds its own store if
    /// none is bound. Without a storage, the cluster may use any store.
    pub bindings: Option<Arc<dyn BindingStore>>,
    /// Cluster generation; 0 if it is not known. A prefix of a later generation is rejected. A cluster marker of an
    /// earlier generation is replaced.
    pub generation: u64,
    /// True if the metadata references objects, so that a prefix without cluster marker cannot be the cluster's.
    pub has_data: bool,
}

/// Owner of a prefix, and the results of its verification in one process.
#[derive(Default)]
pub(super) struct PrefixOwner {
    pub(super) expected: StoreOwner,
    /// Set when the prefix is known to belong to this cluster: the id in its cluster marker, if the marker has one.
    pub(super) bound: OnceCell<Option<Uuid>>,
    /// Fatal error of the verification, with which a broker must not run; `None` while there is none.
    pub(super) refused: watch::Sender<Option<String>>,
}
