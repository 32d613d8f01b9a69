//! Whose a prefix is: the card in it, `cluster.json`, and what the cluster itself remembers of its store.
//!
//! The card names its cluster and has an id. The cluster notes the id ([`StoreNotes`]) before anything relies on an object, so a broker
//! whose URL names another store finds out: one that is empty is not taken, and one that has a card is not the one that was noted.
//! Who takes a prefix reserves it in the note first. So brokers of one cluster that come at once write the same card, and it does not
//! matter which of them is last where the store knows no conditional put.

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

/// The prefix cannot be used by this cluster, or it is not known yet whether it can.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another cluster's history is there.
    #[error(
        "{place} belongs to cluster {theirs:?}; this is cluster {ours:?}: give each cluster a bucket or prefix of its own"
    )]
    Foreign {
        /// The store's URL.
        place: String,
        /// This cluster's name.
        ours: String,
        /// The owner's name.
        theirs: String,
    },
    /// A store of a cluster of this name, or an empty one, and not the one that this cluster uses.
    #[error(
        "{place} is not the object store that this cluster uses, which is {noted}: {found}; correct object_store.url and \
         object_store.endpoint. Who moves a cluster's store copies all of it, cluster.json included"
    )]
    Elsewhere {
        /// Where the store is that was asked.
        place: String,
        /// Where the cluster's is.
        noted: String,
        /// What is wrong with this one.
        found: &'static str,
    },
    /// `cluster.json` is not one that we wrote.
    #[error("{place}/cluster.json cannot be read: {reason}: it must say which cluster owns this prefix")]
    Unreadable {
        /// The store's URL.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// What must be ours is not: an unmounted disk, a folder moved away, another URL than before.
    #[error(
        "{place} should hold this cluster's history, and its cluster.json is not there; mount or move it back, or correct \
         object_store.url; nothing is written there until then"
    )]
    Gone {
        /// The store's URL.
        place: String,
    },
    /// The metadata store is of an older cluster generation than the objects: it was restored from a backup of before.
    #[error(
        "the metadata store is at cluster generation {ours}, and {place}/cluster.json at {theirs}: the metadata store is older than the \
         bucket. Restore a newer backup of etcd; or stop all brokers and run `strandline cluster new-generation`, which goes on above both"
    )]
    Generation {
        /// The store's URL.
        place: String,
        /// The metadata store's generation.
        ours: u64,
        /// The bucket's.
        theirs: u64,
    },
    /// There is nothing that could hold the prefix.
    #[error("{place}: there is no such bucket; create it, or correct the URL")]
    NoBucket {
        /// The store's URL.
        place: String,
    },
    /// The store could not be asked.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What the cluster remembers could not be asked.
    #[error("which object store is this cluster's is not known: {0}")]
    Notes(String),
}

impl ClaimError {
    /// Whether asking again later may help.
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

    /// Whether the store is another one than this cluster's, or of a later generation: a broker does not start with it.
    pub fn ends_start(&self) -> bool {
        matches!(self, Self::Foreign { .. } | Self::Elsewhere { .. } | Self::Generation { .. })
    }
}

/// Which store a cluster uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreNote {
    /// The id in the store's `cluster.json`.
    pub id: Uuid,
    /// Its URL, and the service's where it has one, for messages.
    pub place: String,
    /// The card is about to be written: it binds nobody yet, but who takes this place writes this id.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reserved: bool,
}

impl StoreNote {
    /// Whether this goes on being noted when a broker comes with `mine`.
    pub fn outlasts(&self, mine: &Self) -> bool {
        match (self.reserved, mine.reserved) {
            (false, _) => self.id != mine.id || self.place == mine.place,
            (true, true) => self.place == mine.place,
            (true, false) => false,
        }
    }
}

/// What remembers, outside of the store, which store is the cluster's. Errors are for people; asking again may help.
pub trait StoreNotes: Send + Sync {
    /// The store that is noted; `None` where the cluster may use any.
    fn noted(&self) -> BoxFuture<'_, Result<Option<StoreNote>, String>>;

    /// Notes a store, unless what is noted [outlasts](StoreNote::outlasts) it. Returns what is noted then.
    fn note(&self, mine: StoreNote) -> BoxFuture<'_, Result<StoreNote, String>>;
}

/// The content of `cluster.json`. One that a person wrote, to begin anew, needs no id and is taken at its word. Only the generation ever
/// changes, and only upwards.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Card {
    format: u32,
    cluster: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<Uuid>,
    /// The cluster generation; 0 where a person wrote the card.
    #[serde(default)]
    generation: u64,
}

impl Store {
    /// Makes sure that the prefix is this cluster's: takes it when nobody has it, refuses when another cluster has, or when this one
    /// uses another. Asks the store until it has succeeded once; everything that writes calls it first, so a caller need not.
    ///
    /// A folder is looked at each time. A bucket that goes away says so itself; where a disk is not mounted any more there
    /// is still a folder, or one is made by the next write, and what lands in it is on the wrong disk.
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
            // One that a person wrote meanwhile is taken at its word here as well.
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

    /// Returns the id of the card.
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

    /// Takes a prefix that nobody has, unless the cluster's is elsewhere.
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
        // Where nobody said which generation it is, it is a new cluster's.
        let generation = self.inner.generation.load(Ordering::Acquire).max(1);
        let card = Card { format: 1, cluster: self.inner.cluster.clone(), id: Some(reserved.id), generation };
        let content = Bytes::from(serde_json::to_vec(&card).expect("a plain struct"));
        // Where the store knows conditions, only one of two clusters that come at the same moment succeeds. Where
        // it does not, the last one does, and the first learns it here or at its next start.
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

    /// Refuses a card of a later generation than the metadata's, and brings one of an earlier up to it. All brokers write the same, so it
    /// does not matter which is last.
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

    /// The cluster generation that the prefix is of; `None` where nobody has it.
    ///
    /// # Errors
    /// When the store does not answer, or the prefix is another cluster's.
    pub async fn generation(&self) -> Result<Option<u64>, ClaimError> {
        Ok(self.card().await?.map(|card| card.generation))
    }

    /// Notes a store where there is something to note it in. Returns what is noted then.
    async fn note(&self, mine: StoreNote) -> Result<StoreNote, ClaimError> {
        match self.inner.notes.get() {
            Some(notes) => notes.note(mine).await.map_err(ClaimError::Notes),
            None => Ok(mine),
        }
    }

    /// The card, if there is one; an error when it is another cluster's.
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

    /// The URL, and the service's where it has one: two services may each have a bucket of this name.
    fn whereabouts(&self) -> String {
        let place = &self.inner.place;
        match self.options().named_endpoint().filter(|_| self.options().is_s3()) {
            Some(endpoint) => format!("{place} at {endpoint}"),
            None => place.clone(),
        }
    }
}
