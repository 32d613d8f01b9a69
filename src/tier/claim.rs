//! Owner of a prefix: the cluster marker in it, `cluster.json`, and the store binding of the cluster.
//!
//! The marker contains its cluster's name and an id. The cluster stores the id in the binding ([`StoreNotes`]) before anything relies on an
//! object. So a broker with a wrong URL fails: an empty store is not taken, and a marker with another id is rejected. A broker reserves a
//! prefix in the binding before taking it. So brokers of one cluster that start together write the same marker, and need no conditional
//! put.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    name,
    store::{Store, StoreError},
};
use crate::task::random;

/// Error for a prefix that this cluster cannot use, or cannot verify yet.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClaimError {
    /// The prefix contains another cluster's history.
    #[error(
        "{place} belongs to cluster {theirs:?}; this is cluster {ours:?}: give each cluster a bucket or prefix of its own"
    )]
    Foreign {
        /// URL of the store.
        place: String,
        /// Name of this cluster.
        ours: String,
        /// Name of the owner.
        theirs: String,
    },
    /// The store is not the one that this cluster uses: it is empty, or belongs to another cluster of the same name.
    #[error(
        "{place} is not the object store that this cluster uses, which is {noted}: {found}; correct object_store.url and \
         object_store.endpoint. Who moves a cluster's store copies all of it, cluster.json included"
    )]
    Elsewhere {
        /// Location of this store.
        place: String,
        /// Location of the cluster's store.
        noted: String,
        /// Difference of this store.
        found: &'static str,
    },
    /// `cluster.json` is missing after its write, invalid, or of a newer format.
    #[error("{place}/cluster.json cannot be read: {reason}: it must say which cluster owns this prefix")]
    Unreadable {
        /// URL of the store.
        place: String,
        /// Cause of the failure.
        reason: String,
    },
    /// The cluster's store is missing: an unmounted disk, a folder that was moved, or a changed URL.
    #[error(
        "{place} should hold this cluster's history, and its cluster.json is not there; mount or move it back, or correct \
         object_store.url; nothing is written there until then"
    )]
    Gone {
        /// URL of the store.
        place: String,
    },
    /// The metadata store has an older cluster generation than the objects: it was restored from a backup that is older than the objects.
    #[error(
        "the metadata store is at cluster generation {ours}, and {place}/cluster.json at {theirs}: the metadata store is older than the \
         bucket. Restore a newer backup of etcd; or stop all brokers and run `strandline cluster new-generation`, which goes on above both"
    )]
    Generation {
        /// URL of the store.
        place: String,
        /// Generation of the metadata store.
        ours: u64,
        /// Generation of the object store.
        theirs: u64,
    },
    /// The bucket does not exist.
    #[error("{place}: there is no such bucket; create it, or correct the URL")]
    NoBucket {
        /// URL of the store.
        place: String,
    },
    /// The request to the store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store binding cannot be read or written.
    #[error("which object store is this cluster's is not known: {0}")]
    Notes(String),
}

impl ClaimError {
    /// Returns true if a later attempt may succeed.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Gone { .. } | Self::Notes(_) => true,
            Self::Store(error) => error.retryable(),
            Self::Foreign { .. }
            | Self::Elsewhere { .. }
            | Self::Unreadable { .. }
            | Self::Generation { .. }
            | Self::NoBucket { .. } => false,
        }
    }

    /// Returns true if this is not the cluster's store, or has a later generation: a broker does not start with it.
    pub fn ends_start(&self) -> bool {
        matches!(self, Self::Foreign { .. } | Self::Elsewhere { .. } | Self::Generation { .. })
    }
}

/// Store binding: the object store that a cluster uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreNote {
    /// Id in the store's `cluster.json`.
    pub id: Uuid,
    /// URL of the store, with the endpoint if there is one.
    pub place: String,
    /// True before the marker is written. The binding does not bind any broker yet, but a broker that takes this place writes this id.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reserved: bool,
}

impl StoreNote {
    /// Returns true if this binding remains when a broker submits `mine`.
    pub fn outlasts(&self, mine: &Self) -> bool {
        match (self.reserved, mine.reserved) {
            (false, _) => self.id != mine.id || self.place == mine.place,
            (true, true) => self.place == mine.place,
            (true, false) => false,
        }
    }
}

/// Storage of the store binding, outside of the object store. Errors are texts for people; a later attempt may succeed.
pub trait StoreNotes: Send + Sync {
    /// Returns the binding. Returns `None` if the cluster may use any store.
    fn noted(&self) -> BoxFuture<'_, Result<Option<StoreNote>, String>>;

    /// Stores a binding, unless the present binding [outlasts](StoreNote::outlasts) it. Returns the binding that remains.
    fn note(&self, mine: StoreNote) -> BoxFuture<'_, Result<StoreNote, String>>;
}

/// Content of `cluster.json`. An operator may write a marker without id to start with this store again; a broker accepts it. Only the
/// generation ever changes, and it only increases.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Card {
    format: u32,
    cluster: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<Uuid>,
    /// Cluster generation. 0 if an operator wrote the marker.
    #[serde(default)]
    generation: u64,
}

impl Store {
    /// Makes sure that the prefix belongs to this cluster. Takes a prefix without marker. Fails if the prefix belongs to another cluster,
    /// or if this cluster uses another store. Sends requests until it has succeeded once. The operations that write history call it first,
    /// so their callers need not.
    ///
    /// A folder is checked at each call. A missing bucket causes errors by itself. If a disk is unmounted, its folder remains or the next
    /// write creates it, and the objects would be written to the wrong disk.
    pub async fn claim(&self) -> Result<(), ClaimError> {
        let Some(id) = self.inner.claimed.get().filter(|_| self.inner.folder) else {
            let claimed = self.inner.claimed.get_or_try_init(|| self.ask_claim()).await.map(drop);
            return claimed.inspect_err(|error| {
                if error.ends_start() {
                    self.inner.refused.send_replace(Some(error.to_string()));
                }
            });
        };
        match self.card().await? {
            // A marker that an operator wrote meanwhile is accepted here as well.
            Some(card) if card.id.is_none() || card.id == *id => Ok(()),
            Some(_) => {
                let place = self.whereabouts();
                Err(ClaimError::Elsewhere {
                    noted: place.clone(),
                    place,
                    found: "its cluster.json is another one than before",
                })
            }
            None => Err(self.gone()),
        }
    }

    /// Reads or writes the marker and the binding, and compares them. Returns the id of the marker.
    async fn ask_claim(&self) -> Result<Option<Uuid>, ClaimError> {
        let noted = match self.inner.notes.get() {
            Some(notes) => notes.noted().await.map_err(ClaimError::Notes)?,
            None => None,
        };
        let card = match self.card().await? {
            Some(card) => card,
            None => self.take(noted.filter(|noted| !noted.reserved)).await?,
        };
        if let Some(id) = card.id {
            let mine = StoreNote { id, place: self.whereabouts(), reserved: false };
            let noted = self.note(mine.clone()).await?;
            if noted.id != id {
                let found = "its cluster.json has another id";
                return Err(ClaimError::Elsewhere { place: mine.place, noted: noted.place, found });
            }
        }
        let id = card.id;
        self.agree_on_generation(card).await?;
        tracing::info!(place = self.inner.place, cluster = self.inner.cluster, "object store is ours");
        Ok(id)
    }

    /// Takes a prefix without marker, unless the cluster's store is another one.
    async fn take(&self, noted: Option<StoreNote>) -> Result<Card, ClaimError> {
        let place = self.whereabouts();
        let elsewhere = |noted: StoreNote| ClaimError::Elsewhere {
            place: place.clone(),
            noted: noted.place,
            found: "it has no cluster.json",
        };
        let is_noted = noted.is_some();
        if let Some(noted) = noted.filter(|noted| noted.place != place) {
            return Err(elsewhere(noted));
        }
        if is_noted || self.is_expected() {
            return Err(self.gone());
        }
        let reserved = self.note(StoreNote { id: random::uuid(), place: place.clone(), reserved: true }).await?;
        if reserved.place != place {
            return Err(elsewhere(reserved));
        }
        // If the generation is not known, the cluster is new.
        let generation = self.inner.generation.load(Ordering::Acquire).max(1);
        let card = Card { format: 1, cluster: self.inner.cluster.clone(), id: Some(reserved.id), generation };
        let content = Bytes::from(serde_json::to_vec(&card).expect("a plain struct"));
        // If the store has conditional puts, only one of two clusters that take the prefix at the same time succeeds. If not, the last one
        // succeeds, and the first one detects this here or at its next start.
        match self.put_if_absent(name::CLUSTER, content.clone()).await {
            Ok(()) => {}
            Err(StoreError::Unsupported { .. }) => self.put(name::CLUSTER, content).await?,
            Err(StoreError::NotFound { .. }) => {
                return Err(ClaimError::NoBucket { place: self.inner.place.clone() });
            }
            Err(error) => return Err(error.into()),
        }
        let reason = "it is not there after it was written".to_owned();
        self.card().await?.ok_or_else(|| ClaimError::Unreadable { place: self.inner.place.clone(), reason })
    }

    /// Rejects a marker of a later generation than the metadata store's. Replaces a marker of an earlier generation. All brokers write the
    /// same content, so the order of their writes does not matter.
    async fn agree_on_generation(&self, card: Card) -> Result<(), ClaimError> {
        let (ours, theirs) = (self.inner.generation.load(Ordering::Acquire), card.generation);
        if ours == 0 || ours == theirs {
            return Ok(());
        }
        if ours < theirs {
            return Err(ClaimError::Generation { place: self.inner.place.clone(), ours, theirs });
        }
        let content = serde_json::to_vec(&Card { generation: ours, ..card }).expect("a plain struct");
        Ok(self.put(name::CLUSTER, content.into()).await?)
    }

    /// Returns the cluster generation of the prefix. Returns `None` if the prefix has no marker.
    ///
    /// # Errors
    /// The store does not respond, or the prefix belongs to another cluster.
    pub async fn generation(&self) -> Result<Option<u64>, ClaimError> {
        Ok(self.card().await?.map(|card| card.generation))
    }

    /// Stores a binding if there is a storage for it. Returns the binding that remains.
    async fn note(&self, mine: StoreNote) -> Result<StoreNote, ClaimError> {
        match self.inner.notes.get() {
            Some(notes) => notes.note(mine).await.map_err(ClaimError::Notes),
            None => Ok(mine),
        }
    }

    /// Returns the marker, if there is one. Fails if it belongs to another cluster.
    async fn card(&self) -> Result<Option<Card>, ClaimError> {
        let place = self.inner.place.clone();
        let content = match self.fetch(name::CLUSTER).await {
            Ok(content) => content,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let card: Card = match serde_json::from_slice(&content) {
            Ok(card) => card,
            Err(error) => return Err(ClaimError::Unreadable { place, reason: error.to_string() }),
        };
        if card.format != 1 {
            let reason = format!("format {} is newer than this release knows: upgrade", card.format);
            return Err(ClaimError::Unreadable { place, reason });
        }
        if card.cluster != self.inner.cluster {
            let ours = self.inner.cluster.clone();
            return Err(ClaimError::Foreign { place, ours, theirs: card.cluster });
        }
        Ok(Some(card))
    }

    fn gone(&self) -> ClaimError {
        ClaimError::Gone { place: self.inner.place.clone() }
    }

    /// Returns the URL, with the endpoint if there is one: two services may each have a bucket of this name.
    fn whereabouts(&self) -> String {
        let place = &self.inner.place;
        match self.options().named_endpoint().filter(|_| self.options().is_s3()) {
            Some(endpoint) => format!("{place} at {endpoint}"),
            None => place.clone(),
        }
    }
}
