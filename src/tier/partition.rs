//! One partition's history in the object store: adding segments, moving the log start, reading.
//!
//! The module does not access the metadata store or the log. A caller stages a state
//! ([`PartitionTier::start_upload_batch`], [`PartitionTier::stage_log_start`], [`PartitionTier::stage_trim`],
//! [`PartitionTier::stage_rebuilt`]), commits [`StagedManifest::state`] by a compare-and-set over
//! [`StagedManifest::replaces`], and then calls [`PartitionTier::install`]. Readers see no change before the last step.

use std::{sync::Arc, time::Duration};

use super::{
    chunk_cache::{CachedMetadata, ChunkCache},
    codec::InvalidObject,
    error::{TierReadError, TierStoreError},
    footer::Footer,
    manifest::{ManifestLookup, ManifestPage, ManifestRoot, PageEntry, SegmentEntry},
    name::{ManifestName, partition_folder},
    read_ahead::ReadAheadTracker,
    segment::{SegmentSource, SkippedPrefix},
    state::TierState,
    store::TierStore,
    upload::{self, UploadError},
};
use crate::{
    model::{LeaderEpoch, Offset, PartitionId},
    task::{clock, lock::Mutex, random},
    telemetry::LogThrottle,
};

/// Maximum number of times that a corrupt object or chunk is fetched again: the corruption may have happened in
/// transfer.
pub(super) const CORRUPTION_RETRIES: usize = 2;

/// One partition's history in the object store. Clones share it. An idle partition holds no manifest and no task.
#[derive(Clone)]
pub struct PartitionTier {
    inner: Arc<PartitionTierInner>,
}

struct PartitionTierInner {
    store: TierStore,
    cache: ChunkCache,
    id: PartitionId,
    state: Mutex<PartitionTierState>,
}

/// State that all clones share.
struct PartitionTierState {
    /// Newest committed state that this broker has received. Its version and its log start never decrease.
    committed: TierState,
    readers: ReadAheadTracker,
    /// Name of the current manifest, or of one of its pages, that a read found missing or corrupt. A newer manifest
    /// resets the value.
    lost: Option<String>,
    /// Throttle of the log lines about reads of corrupt data.
    corruption_log: LogThrottle,
}

/// A state that is not committed yet. Its manifest, if it has one, is in the object store already.
#[derive(Clone, Debug)]
#[must_use = "nothing has changed before the state is committed and installed"]
pub struct StagedManifest {
    state: TierState,
    replaces: TierState,
}

impl StagedManifest {
    /// Returns the state to commit.
    pub fn state(&self) -> &TierState {
        &self.state
    }

    /// Returns the state from which the new one was derived. The compare-and-set of the commit must find this state
    /// unchanged.
    pub fn replaces(&self) -> &TierState {
        &self.replaces
    }
}

/// Segments that are uploaded one after the other, for one manifest that will list all of them. A dropped value leaves
/// orphan objects.
#[must_use = "no manifest lists the segments before it is finished, committed and installed"]
pub struct UploadBatch<'a> {
    tier: &'a PartitionTier,
    replaces: TierState,
    next: ManifestRoot,
}

impl UploadBatch<'_> {
    /// Uploads the part of a sealed segment that is not in the object store yet, verifies it, and adds it to the
    /// manifest. Writes a page object if a page is full. The segment may begin below the tiered end if one of its
    /// batches starts at the tiered end. The reason is that another leader rolled its segments at other offsets.
    ///
    /// After an error, [`UploadBatch::finish`] still writes a manifest of the segments that were added before.
    pub async fn add(&mut self, source: &SegmentSource) -> Result<(), UploadError> {
        let PartitionTierInner { store, id, .. } = &*self.tier.inner;
        let mut next = self.next.clone();
        if next.is_empty() {
            // The first segment may begin above the end of the empty manifest, if retention deleted records before they
            // were uploaded.
            next = next.beginning_at(self.replaces.log_start.max(source.base()));
        }
        let skipped =
            SkippedPrefix { offset: next.end(), inside: next.is_empty(), partition: *id, writer_epoch: next.epoch() };
        let entry = Box::pin(upload::upload_segment(store, source, skipped)).await?;
        if let Some(page) = next.push(entry, random::uuid()) {
            upload::put_and_verify(store, &self.tier.object(&page.stamp.page()), page.bytes).await?;
        }
        self.next = next;
        Ok(())
    }

    /// Writes and verifies the manifest. The caller commits its state and installs it.
    pub async fn finish(self) -> Result<StagedManifest, UploadError> {
        self.tier.write(self.replaces, self.next).await
    }
}

impl PartitionTier {
    /// Creates the history of partition `id` in this state. Sends no request.
    pub fn new(store: TierStore, cache: ChunkCache, id: PartitionId, state: TierState) -> Self {
        let state = Mutex::new(PartitionTierState {
            committed: state,
            readers: ReadAheadTracker::default(),
            lost: None,
            corruption_log: LogThrottle::default(),
        });
        Self { inner: Arc::new(PartitionTierInner { store, cache, id, state }) }
    }

    /// Returns the newest committed state that this broker has received.
    pub fn state(&self) -> TierState {
        self.inner.state.lock().committed.clone()
    }

    /// Returns the bytes of batches in the object store.
    pub fn bytes(&self) -> u64 {
        self.inner.state.lock().committed.bytes
    }

    /// Returns the partition's id.
    pub fn id(&self) -> PartitionId {
        self.inner.id
    }

    /// Makes `state` the current state if it is newer. This broker committed `state`, or read it from the metadata
    /// store. States are compared by manifest version, then by log start, then by leader epoch.
    pub fn apply_state(&self, state: TierState) {
        let mut shared = self.inner.state.lock();
        let order = |state: &TierState| (state.version(), state.log_start, state.epoch);
        if order(&state) > order(&shared.committed) {
            if state.manifest != shared.committed.manifest {
                shared.lost = None;
            }
            shared.committed = state;
        }
    }

    /// Starts the next manifest, to which segments can be added. Sends requests only to read the current manifest and
    /// to verify the owner of the prefix ([`TierStore::bind`]).
    ///
    /// A partition may stage one manifest at a time. Its state must be committed well within the grace period of
    /// garbage collection.
    pub async fn start_upload_batch(&self, epoch: LeaderEpoch) -> Result<UploadBatch<'_>, UploadError> {
        let (state, root) = self.load_for_epoch(epoch).await?;
        let next = self.next_manifest(&state, &root, epoch).await?;
        Ok(UploadBatch { tier: self, next, replaces: state })
    }

    /// Returns the next manifest after `root`, without segments that lie completely below the log start.
    async fn next_manifest(
        &self,
        state: &TierState,
        root: &ManifestRoot,
        epoch: LeaderEpoch,
    ) -> Result<ManifestRoot, TierReadError> {
        if !state.is_ahead_of(root) {
            return Ok(root.next_version(epoch));
        }
        let trim_at = state.log_start.min(state.tiered_end);
        let page = match root.page_to_trim(trim_at) {
            Some(entry) => Some(self.page(&entry).await?),
            None => None,
        };
        Ok(root.trim(trim_at, page.as_deref(), epoch))
    }

    /// Returns the current state with the log start raised to `log_start`, and with the same manifest. Sends no
    /// request, so the log start can move during an outage of the store. `removed_bytes` are the bytes of the segments
    /// that end above the current log start, and not above the new one.
    ///
    /// # Errors
    /// `Deposed`: a newer leader has committed.
    pub fn stage_log_start(
        &self,
        log_start: Offset,
        removed_bytes: u64,
        epoch: LeaderEpoch,
    ) -> Result<StagedManifest, UploadError> {
        let replaces = self.state();
        if epoch < replaces.epoch {
            return Err(UploadError::Deposed { epoch, current: replaces.epoch });
        }
        let log_start = log_start.max(replaces.log_start);
        let bytes = if log_start < replaces.tiered_end { replaces.bytes.saturating_sub(removed_bytes) } else { 0 };
        Ok(StagedManifest { state: TierState { log_start, epoch, bytes, ..replaces.clone() }, replaces })
    }

    /// Writes a manifest without the segments that lie completely below the log start. These segments become garbage
    /// with the commit. The tiered end does not change, even if the log start lies above it: the next segment then
    /// begins after the gap.
    pub async fn stage_trim(&self, epoch: LeaderEpoch) -> Result<StagedManifest, UploadError> {
        let (state, root) = self.load_for_epoch(epoch).await?;
        let (log_start, next) = (state.log_start, self.next_manifest(&state, &root, epoch).await?);
        let mut staged = self.write(state, next).await?;
        staged.state.log_start = log_start;
        Ok(staged)
    }

    /// Returns true if the manifest's log start is below that of the state, so that the manifest lists or counts
    /// segments below the log start.
    pub async fn manifest_lags(&self) -> Result<bool, TierReadError> {
        let state = self.state();
        Ok(state.is_ahead_of(&*self.root(&state).await?))
    }

    /// Returns the modification time of a segment's object by the store's clock, in milliseconds since 1970.
    pub async fn modified_ms(&self, entry: &SegmentEntry) -> Result<i64, TierReadError> {
        let (store, object) = (&self.inner.store, self.object(&entry.stamp.segment()));
        Ok(store.while_available(&object, store.modified_ms(&object)).await?)
    }

    /// Waits until an outage of the store has lasted for `time` since its confirmation, and returns the outage as an
    /// error. Returns at once if that holds already.
    pub async fn wait_until_unavailable_for(&self, time: Duration) -> TierStoreError {
        let outage = self.inner.store.wait_until_unavailable_for(time).await;
        let reason = format!("the object store has been unavailable {outage}");
        TierStoreError::Unavailable { object: partition_folder(self.inner.id), reason }
    }

    /// Returns the current state and its manifest, for a change by the leader of `epoch`. Fails if a newer leader has
    /// committed, if the prefix does not belong to this cluster, or if the manifest cannot be read.
    async fn load_for_epoch(&self, epoch: LeaderEpoch) -> Result<(TierState, Arc<ManifestRoot>), UploadError> {
        self.inner.store.bind().await?;
        let state = self.state();
        if epoch < state.epoch {
            return Err(UploadError::Deposed { epoch, current: state.epoch });
        }
        let root = self.root(&state).await?;
        Ok((state, root))
    }

    /// Writes and verifies the manifest `next`, and adds it to the cache. The returned state is not committed.
    async fn write(&self, replaces: TierState, next: ManifestRoot) -> Result<StagedManifest, UploadError> {
        let name = ManifestName::draw(next.version(), next.epoch());
        upload::put_and_verify(&self.inner.store, &self.object(&name.to_string()), next.encode()).await?;
        // Last check before the commit. All objects must have been written to the cluster's store, and not to a folder
        // that was created in its place.
        self.inner.store.bind().await?;
        let state = TierState::of(&next, name);
        self.inner.cache.put_parsed(name.attempt, CachedMetadata::Root(Arc::new(next))).await;
        Ok(StagedManifest { state, replaces })
    }

    /// Makes a staged state the current one. The caller has committed the state.
    pub fn install(&self, staged: StagedManifest) {
        self.apply_state(staged.state);
    }

    /// Returns the segments that contain offsets from `from` and from the log start on, oldest first, at most `limit`.
    pub async fn segments(&self, from: Offset, limit: usize) -> Result<Vec<SegmentEntry>, TierReadError> {
        let state = self.state();
        let root = self.root(&state).await?;
        let from = from.max(state.log_start);
        let mut found = Vec::new();
        for entry in root.pages().iter().filter(|entry| entry.stamp.end > from) {
            if found.len() >= limit {
                break;
            }
            found.extend(self.page(entry).await?.segments().iter().filter(|entry| entry.stamp.end > from));
        }
        found.extend(root.segments().iter().filter(|entry| entry.stamp.end > from));
        found.truncate(limit);
        Ok(found)
    }

    /// Returns the footer of the last segment, with the epochs and the producer state at the tiered end. Returns `None`
    /// if the manifest lists no segment.
    pub async fn last_footer(&self) -> Result<Option<Arc<Footer>>, TierReadError> {
        let root = self.root(&self.state()).await?;
        match root.segments().last() {
            Some(entry) => self.footer(entry).await.map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn store(&self) -> &TierStore {
        &self.inner.store
    }

    pub(super) fn cache(&self) -> &ChunkCache {
        &self.inner.cache
    }

    /// Runs `update` on the tracked readers, under the lock.
    pub(super) fn with_readers<T>(&self, update: impl FnOnce(&mut ReadAheadTracker) -> T) -> T {
        update(&mut self.inner.state.lock().readers)
    }

    /// Counts a read of corrupt data. Returns `Some` if the caller must log it, with the number of such reads since the
    /// last line.
    pub(super) fn count_corruption(&self) -> Option<u64> {
        self.inner.state.lock().corruption_log.occur(clock::monotonic())
    }

    /// Returns the object name of a file in the partition's folder.
    pub(super) fn object(&self, name: &str) -> String {
        format!("{}/{name}", partition_folder(self.inner.id))
    }

    /// Returns the manifest that `state` names, from the cache if possible; an empty manifest if `state` names none.
    pub(super) async fn root(&self, state: &TierState) -> Result<Arc<ManifestRoot>, TierReadError> {
        let Some(name) = state.manifest else {
            return Ok(Arc::new(ManifestRoot::empty(self.inner.id, state.tiered_end())));
        };
        let (tier, expected) = (self.clone(), state.clone());
        let load = Box::pin(async move { tier.load_root(&expected).await.map(CachedMetadata::Root) });
        let parsed = self.inner.cache.get_parsed(&self.inner.store, name.attempt, load);
        match parsed.await.inspect_err(|error| self.record_lost_manifest(error))? {
            CachedMetadata::Root(root) => Ok(root),
            _ => Err(self.duplicate_uuid_error(&name.to_string())),
        }
    }

    /// Returns a page of the manifest, from the cache if possible.
    async fn page(&self, entry: &PageEntry) -> Result<Arc<ManifestPage>, TierReadError> {
        let (tier, entry) = (self.clone(), *entry);
        let load = Box::pin(async move { tier.load_page(&entry).await.map(CachedMetadata::Page) });
        let parsed = self.inner.cache.get_parsed(&self.inner.store, entry.stamp.attempt, load);
        match parsed.await.inspect_err(|error| self.record_lost_manifest(error))? {
            CachedMetadata::Page(page) => Ok(page),
            _ => Err(self.duplicate_uuid_error(&entry.stamp.page())),
        }
    }

    /// Fetches the manifest that `state` names from the store. Returns an empty manifest if `state` names none.
    pub(super) async fn load_root(&self, state: &TierState) -> Result<Arc<ManifestRoot>, TierReadError> {
        let Some(name) = state.manifest else {
            return Ok(Arc::new(ManifestRoot::empty(self.inner.id, state.tiered_end())));
        };
        let parse = |bytes: &[u8]| {
            let root = ManifestRoot::parse(bytes)?;
            if root.partition() == self.inner.id && state.agrees(&root) {
                Ok(Arc::new(root))
            } else {
                Err(InvalidObject::Contradiction { reason: "the object is not the committed manifest" })
            }
        };
        self.load(&self.object(&name.to_string()), None, parse).await
    }

    /// Fetches a page from the store.
    pub(super) async fn load_page(&self, entry: &PageEntry) -> Result<Arc<ManifestPage>, TierReadError> {
        let parse = |bytes: &[u8]| ManifestPage::parse(bytes, self.inner.id, entry).map(Arc::new);
        self.load(&self.object(&entry.stamp.page()), None, parse).await
    }

    /// Returns the error for a UUID whose cached object is of another kind: two objects have the same UUID.
    fn duplicate_uuid_error(&self, name: &str) -> TierReadError {
        TierReadError::Corrupt { object: self.object(name), reason: "the name belongs to another object".to_owned() }
    }

    /// Stores the name of the manifest or page that `error` reports as missing or corrupt, so that maintenance rebuilds
    /// the manifest. Has no effect for other errors.
    fn record_lost_manifest(&self, error: &TierReadError) {
        if let Some(object) = error.lost_manifest() {
            self.inner.state.lock().lost = Some(object.to_owned());
        }
    }

    /// Returns the name of the current manifest, or of its page, that a read found missing or corrupt.
    pub fn lost_manifest(&self) -> Option<String> {
        self.inner.state.lock().lost.clone()
    }

    /// Writes a manifest of these segments in place of a lost one. The segments have no gap: the first one contains
    /// `log_start`, and the last one ends at the tiered end. Without segments, `log_start` is at or above the tiered
    /// end. The objects exist already. The caller commits the manifest like any other.
    ///
    /// # Panics
    /// If the segments are not such a chain. [`PartitionTier::survey`] returns one.
    pub async fn stage_rebuilt(
        &self,
        segments: &[SegmentEntry],
        log_start: Offset,
        epoch: LeaderEpoch,
    ) -> Result<StagedManifest, UploadError> {
        self.inner.store.bind().await?;
        let state = self.state();
        if epoch < state.epoch {
            return Err(UploadError::Deposed { epoch, current: state.epoch });
        }
        let begin = log_start.min(state.tiered_end);
        let mut next = ManifestRoot::rebuilt(self.inner.id, state.version() + 1, epoch, begin);
        for entry in segments {
            if let Some(page) = next.push(*entry, random::uuid()) {
                upload::put_and_verify(&self.inner.store, &self.object(&page.stamp.page()), page.bytes).await?;
            }
        }
        assert_eq!(next.end(), state.tiered_end, "the tiered end never decreases");
        let mut staged = self.write(state, next).await?;
        staged.state.log_start = log_start.max(staged.replaces.log_start);
        Ok(staged)
    }

    /// Returns the footer of a segment, from the cache if possible.
    pub(super) async fn footer(&self, entry: &SegmentEntry) -> Result<Arc<Footer>, TierReadError> {
        let (tier, entry) = (self.clone(), *entry);
        let load = Box::pin(async move { tier.load_footer(&entry).await.map(CachedMetadata::Footer) });
        match self.inner.cache.get_parsed(&self.inner.store, entry.stamp.attempt, load).await? {
            CachedMetadata::Footer(footer) => Ok(footer),
            _ => Err(self.duplicate_uuid_error(&entry.stamp.segment())),
        }
    }

    /// Fetches the footer of a segment from the store.
    async fn load_footer(&self, entry: &SegmentEntry) -> Result<Arc<Footer>, TierReadError> {
        let parse = |bytes: &[u8]| {
            let footer = Footer::parse(bytes)?;
            let is_expected = footer.partition == self.inner.id
                && (footer.base, footer.end, footer.data_bytes)
                    == (entry.stamp.base, entry.stamp.end, entry.data_bytes);
            if is_expected {
                Ok(Arc::new(footer))
            } else {
                Err(InvalidObject::Contradiction { reason: "the footer belongs to another segment" })
            }
        };
        self.load(&self.object(&entry.stamp.segment()), Some(entry.data_bytes..entry.object_bytes()), parse).await
    }

    /// Returns the segment that contains `offset`, according to a manifest. Returns `None` if the manifest does not
    /// cover `offset`.
    pub(super) async fn segment_of(
        &self,
        root: &ManifestRoot,
        offset: Offset,
    ) -> Result<Option<SegmentEntry>, TierReadError> {
        Ok(match root.find(offset) {
            Some(ManifestLookup::Segment(entry)) => Some(entry),
            Some(ManifestLookup::Page(entry)) => self.page(&entry).await?.find(offset),
            None => None,
        })
    }

    /// Returns the first segment that ends above `from` and has a largest timestamp of `timestamp_ms` or later.
    pub(super) async fn segment_at_time(
        &self,
        root: &ManifestRoot,
        timestamp_ms: i64,
        mut from: Offset,
    ) -> Result<Option<SegmentEntry>, TierReadError> {
        loop {
            let entry = match root.find_time(timestamp_ms, from) {
                Some(ManifestLookup::Segment(entry)) => return Ok(Some(entry)),
                Some(ManifestLookup::Page(entry)) => entry,
                None => return Ok(None),
            };
            let page = self.page(&entry).await?;
            let matches = |entry: &&SegmentEntry| entry.stamp.end > from && entry.max_timestamp_ms >= timestamp_ms;
            if let Some(entry) = page.segments().iter().find(matches) {
                return Ok(Some(*entry));
            }
            // The page's largest timestamp is that of a segment below `from`.
            from = entry.stamp.end;
        }
    }

    /// Fetches an object, or a range of it, and parses it. If the content cannot be parsed, fetches it again, at most
    /// [`CORRUPTION_RETRIES`] times.
    async fn load<T>(
        &self,
        object: &str,
        range: Option<std::ops::Range<u64>>,
        parse: impl Fn(&[u8]) -> Result<T, InvalidObject>,
    ) -> Result<T, TierReadError> {
        let (store, mut tries) = (&self.inner.store, 0);
        loop {
            let bytes = match range.clone() {
                Some(range) => store.while_available(object, store.get_range(object, range)).await?,
                None => store.while_available(object, store.get(object)).await?,
            };
            match parse(&bytes) {
                Ok(parsed) => return Ok(parsed),
                Err(_) if tries < CORRUPTION_RETRIES => tries += 1,
                Err(error) => {
                    return Err(TierReadError::Corrupt { object: object.to_owned(), reason: error.to_string() });
                }
            }
        }
    }
}

impl std::fmt::Debug for PartitionTier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PartitionTier")
            .field("id", &self.inner.id)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
