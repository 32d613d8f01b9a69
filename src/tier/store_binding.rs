//! Store binding: the object store that a cluster uses, and the interface to the storage of the binding.

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Store binding: the object store that a cluster uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreBinding {
    /// Id in the store's `cluster.json`.
    pub id: Uuid,
    /// URL of the store, with the endpoint if there is one.
    pub url: String,
    /// True before the marker is written. The binding does not bind any broker yet, but a broker that takes this store
    /// writes this id.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pending: bool,
}

impl StoreBinding {
    /// Returns true if this binding remains when a broker submits `mine`.
    pub fn prevails_over(&self, mine: &Self) -> bool {
        match (self.pending, mine.pending) {
            (false, _) => self.id != mine.id || self.url == mine.url,
            (true, true) => self.url == mine.url,
            (true, false) => false,
        }
    }
}

/// Storage of the store binding, outside of the object store. Errors are texts for people; a later attempt may succeed.
pub trait BindingStore: Send + Sync {
    /// Returns the binding. Returns `None` if the cluster may use any store.
    fn binding(&self) -> BoxFuture<'_, Result<Option<StoreBinding>, String>>;

    /// Stores a binding, unless the present binding [remains](StoreBinding::prevails_over). Returns the binding that
    /// remains.
    fn bind(&self, mine: StoreBinding) -> BoxFuture<'_, Result<StoreBinding, String>>;
}
