//! Cluster marker: `cluster.json`, which contains the cluster's name and the id of the [`StoreBinding`].
//!
//! Before a broker writes the marker, a compare-and-set in the metadata store decides which broker's id is used. So
//! brokers that start together write the same marker, and need no conditional put. A broker with a wrong URL fails: an
//! empty store is rejected once the binding is complete, and a marker with another id is rejected.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    error::{BindingError, TierStoreError},
    name,
    store::TierStore,
    store_binding::{PrefixOwner, StoreBinding, StoreOwner},
};
use crate::task::random;

/// Content of `cluster.json`. An operator may write a marker without id, so that brokers accept a store whose marker
/// was lost. Brokers change only the generation, which never decreases.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ClusterMarker {
    format: u32,
    cluster: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<Uuid>,
    /// Cluster generation; 0 if the marker contains none, such as a marker that an operator wrote.
    #[serde(default)]
    generation: u64,
}

impl TierStore {
    /// Returns a client of the same prefix that verifies this owner. Earlier clones do not verify it.
    #[must_use]
    pub fn owned_by(self, owner: StoreOwner) -> Self {
        Self { owner: Arc::new(PrefixOwner { expected: owner, ..PrefixOwner::default() }), ..self }
    }

    /// Makes sure that the prefix belongs to this cluster, writes the marker to a prefix without one, and raises the
    /// generation of an older marker. Fails if the prefix belongs to another cluster or has a later generation, or if
    /// this cluster uses another store. Calls after the first success send no request, except for a folder. The
    /// operations that write history call this function first, so their callers need not.
    ///
    /// For a folder, each call reads the marker. Requests to a missing bucket fail by themselves. But if a disk is
    /// unmounted, its folder remains or the next write creates it, and the objects would be written to the wrong disk.
    pub async fn bind(&self) -> Result<(), BindingError> {
        let Some(id) = self.owner.bound.get().filter(|_| self.inner.folder) else {
            let bound = self.owner.bound.get_or_try_init(|| self.verify_owner()).await.map(drop);
            return bound.inspect_err(|error| {
                if error.is_fatal_at_start() {
                    self.owner.refused.send_replace(Some(error.to_string()));
                }
            });
        };
        match self.read_marker().await? {
            // A marker without id, which an operator wrote meanwhile, is accepted here as well.
            Some(marker) if marker.id.is_none() || marker.id == *id => Ok(()),
            Some(_) => {
                let url = self.location();
                Err(BindingError::OtherStore {
                    bound_url: url.clone(),
                    url,
                    found: "its cluster.json was replaced by another one",
                })
            }
            None => Err(self.missing_store_error()),
        }
    }

    /// Waits until a call of [`TierStore::bind`] before the first success fails with a fatal error, with which a broker
    /// must not run. Returns the error as text.
    pub async fn until_refused(&self) -> String {
        let mut refused = self.owner.refused.subscribe();
        let reason = refused.wait_for(Option::is_some).await.expect("the sender is in self").clone();
        reason.expect("`wait_for` returned a reason")
    }

    /// Returns true if the prefix must have a cluster marker: this process has verified the owner before, or the
    /// metadata references objects.
    pub(super) fn must_have_marker(&self) -> bool {
        self.owner.bound.initialized() || self.owner.expected.has_data
    }

    /// Reads or writes the marker, and checks its generation. If the marker has an id, also reads or writes the
    /// binding, compares both, and returns the id.
    async fn verify_owner(&self) -> Result<Option<Uuid>, BindingError> {
        let marker = match self.read_marker().await? {
            Some(marker) => marker,
            None => self.take_prefix().await?,
        };
        let id = marker.id;
        if id.is_some() {
            let binding = self.create_or_get_binding(id).await?;
            if Some(binding.id) != id {
                return Err(self.other_store_error(binding, "its cluster.json has another id"));
            }
        }
        self.check_generation(marker).await?;
        tracing::info!(url = self.inner.url, cluster = self.inner.cluster, "the object store belongs to this cluster");
        Ok(id)
    }

    /// Writes a marker to a prefix without one, unless another broker has written it meanwhile. Returns the marker that
    /// the prefix then has. Fails if the cluster is bound to another store, or if the marker of the bound store is
    /// missing.
    async fn take_prefix(&self) -> Result<ClusterMarker, BindingError> {
        let binding = match self.must_have_marker() {
            // The cluster has objects. Without its marker, this may be another store, so it must not become the bound
            // one.
            true => self.find_complete_binding().await?.ok_or_else(|| self.missing_store_error())?,
            false => self.create_or_get_binding(None).await?,
        };
        if binding.url != self.location() {
            return Err(self.other_store_error(binding, "its cluster.json is missing"));
        }
        if !binding.pending {
            // The binding is complete, so another broker must have written the marker meanwhile, or the marker is
            // missing.
            return self.read_marker().await?.ok_or_else(|| self.missing_store_error());
        }
        // If the generation is not known, the cluster is new.
        let generation = self.owner.expected.generation.max(1);
        let cluster = self.inner.cluster.clone();
        let marker = ClusterMarker { format: 1, cluster, id: Some(binding.id), generation };
        let content = Bytes::from(serde_json::to_vec(&marker).expect("a plain struct is valid JSON"));
        // If two clusters write a marker to this prefix at the same time, a store with conditional puts keeps the first
        // one. A store without them keeps the last one, and the other cluster detects this here or at its next start.
        match self.put_if_absent(name::CLUSTER, content.clone()).await {
            Ok(()) => {}
            Err(TierStoreError::Unsupported { .. }) => self.put(name::CLUSTER, content).await?,
            Err(TierStoreError::NotFound { .. }) => {
                return Err(BindingError::NoBucket { url: self.inner.url.clone() });
            }
            Err(error) => return Err(error.into()),
        }
        let reason = "the file is missing after its write".to_owned();
        self.read_marker().await?.ok_or_else(|| BindingError::Unreadable { url: self.inner.url.clone(), reason })
    }

    /// Fails if the marker has a later generation than the metadata store. Replaces a marker of an earlier generation.
    /// All brokers write the same content, so the order of their writes does not matter. Has no effect if the cluster's
    /// generation is not known.
    async fn check_generation(&self, marker: ClusterMarker) -> Result<(), BindingError> {
        // 0 means that the cluster's generation is not known.
        let (ours, theirs) = (self.owner.expected.generation, marker.generation);
        if ours == 0 || ours == theirs {
            return Ok(());
        }
        if ours < theirs {
            return Err(BindingError::Generation { url: self.inner.url.clone(), ours, theirs });
        }
        let marker = ClusterMarker { generation: ours, ..marker };
        let content = serde_json::to_vec(&marker).expect("a plain struct is valid JSON");
        Ok(self.put(name::CLUSTER, content.into()).await?)
    }

    /// Returns the cluster generation of the prefix. Returns `None` if the prefix has no marker.
    ///
    /// # Errors
    /// The store does not respond, the marker is invalid, or the prefix belongs to another cluster.
    pub async fn generation(&self) -> Result<Option<u64>, BindingError> {
        Ok(self.read_marker().await?.map(|marker| marker.generation))
    }

    /// Binds the cluster to this store if no store is bound yet, and returns the cluster's binding. `id` is the id in
    /// the store's `cluster.json`; without an id, a new binding is pending. Without a `BindingStore`, every store is
    /// accepted and nothing is stored.
    async fn create_or_get_binding(&self, id: Option<Uuid>) -> Result<StoreBinding, BindingError> {
        let url = self.location();
        match &self.owner.expected.bindings {
            Some(bindings) => bindings.bind(&url, id).await.map_err(BindingError::Binding),
            None => Ok(StoreBinding { id: id.unwrap_or_else(random::uuid), url, pending: id.is_none() }),
        }
    }

    /// Returns the stored binding if it is not pending.
    async fn find_complete_binding(&self) -> Result<Option<StoreBinding>, BindingError> {
        let Some(bindings) = &self.owner.expected.bindings else { return Ok(None) };
        let stored = bindings.stored().await.map_err(BindingError::Binding)?;
        Ok(stored.filter(|binding| !binding.pending))
    }

    /// Returns the marker, if there is one. Fails if the marker cannot be parsed or belongs to another cluster.
    async fn read_marker(&self) -> Result<Option<ClusterMarker>, BindingError> {
        let url = self.inner.url.clone();
        let content = match self.fetch(name::CLUSTER).await {
            Ok(content) => content,
            Err(TierStoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let marker: ClusterMarker = match serde_json::from_slice(&content) {
            Ok(marker) => marker,
            Err(error) => return Err(BindingError::Unreadable { url, reason: error.to_string() }),
        };
        if marker.format != 1 {
            let reason = format!("format {} is newer than this release: upgrade", marker.format);
            return Err(BindingError::Unreadable { url, reason });
        }
        if marker.cluster != self.inner.cluster {
            let ours = self.inner.cluster.clone();
            return Err(BindingError::Foreign { url, ours, theirs: marker.cluster });
        }
        Ok(Some(marker))
    }

    fn missing_store_error(&self) -> BindingError {
        BindingError::Missing { url: self.inner.url.clone() }
    }

    fn other_store_error(&self, bound: StoreBinding, found: &'static str) -> BindingError {
        BindingError::OtherStore { url: self.location(), bound_url: bound.url, found }
    }

    /// Returns the URL; for S3, with the endpoint if one is named, because two services may each have a bucket of this
    /// name.
    fn location(&self) -> String {
        let url = &self.inner.url;
        match self.options().named_endpoint().filter(|_| self.options().is_s3()) {
            Some(endpoint) => format!("{url} at {endpoint}"),
            None => url.clone(),
        }
    }
}
