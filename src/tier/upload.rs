//! Uploads segments, manifests and pages: put first, then verify. Only a verified object may be referenced.
//!
//! # Overview
//!
//! A segment is streamed from its file, which stays readable after its name is removed. Its parts have 8 MiB; at most
//! four parts of one segment and eight parts of all segments are in flight. Small segments are uploaded with one
//! request. A failed attempt is verified before the next one: if only the response was lost, the object exists. All
//! attempts of an upload use the same name and the same content, so a duplicate or late request changes nothing.
//!
//! # Crash
//!
//! A crash or an error leaves at most objects that no manifest references, and multipart uploads that are incomplete.
//! Garbage collection deletes the objects, and aborts the multipart uploads if the store is S3.

use std::collections::VecDeque;

use backon::Retryable;
use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use object_store::{ObjectStoreExt, PutPayload};

use super::{
    error::{BindingError, TierReadError, TierStoreError},
    manifest::SegmentEntry,
    name::{ObjectId, partition_folder},
    segment::{SegmentBatches, SegmentSource, SegmentSourceError, SkippedPrefix},
    store::TierStore,
};
use crate::{
    model::LeaderEpoch,
    task::{clock, random},
};

/// Size of each part but the last. Some stores require parts of one size.
const PART_BYTES: usize = 8 << 20;

/// Maximum bytes of batches that are uploaded with one request.
const SINGLE_BYTES: u64 = 2 * PART_BYTES as u64;

/// Maximum number of parts of one segment in flight.
const PARTS_AT_ONCE: usize = 4;

/// Maximum size of one read of the verification.
const READ_BACK_BYTES: u64 = 8 << 20;

/// Error of an upload of a segment or a manifest. No state has changed; at most orphan objects are left.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The segment file cannot be read, is corrupt, or does not continue the history in the object store.
    #[error(transparent)]
    Source(#[from] SegmentSourceError),
    /// A newer leader has committed to the object store.
    #[error("leader epoch {epoch} may not write: epoch {current} has committed to the object store")]
    Deposed {
        epoch: LeaderEpoch,
        /// Leader epoch of the committed state.
        current: LeaderEpoch,
    },
    /// The prefix does not belong to this cluster, or its owner is not known yet.
    #[error(transparent)]
    Binding(#[from] BindingError),
    #[error(transparent)]
    Store(#[from] TierStoreError),
    /// The store returns other bytes than were written.
    #[error("object {object} differs from what was written and is not used: {reason}")]
    Mismatch {
        /// Name of the object, below the prefix.
        object: String,
        /// Difference between the two.
        reason: String,
    },
    /// The current manifest cannot be read.
    #[error("cannot read the current manifest: {0}")]
    Manifest(#[from] TierReadError),
}

impl UploadError {
    /// Returns true if a later attempt may succeed without intervention.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Source(_) | Self::Deposed { .. } => false,
            Self::Binding(error) => error.retryable(),
            Self::Store(error) => error.retryable(),
            Self::Mismatch { .. } => true,
            Self::Manifest(error) => error.retryable(),
        }
    }
}

/// Uploads the part of `source` that is not in the object store yet, and verifies it.
pub(super) async fn segment(
    store: &TierStore,
    source: &SegmentSource,
    from: SkippedPrefix,
) -> Result<SegmentEntry, UploadError> {
    let mut last_try: Option<SegmentEntry> = None;
    let mut attempt = UploadAttempt::new(store, source, from);
    let mut pauses = backon::BackoffBuilder::build(store.pauses());
    let (began, retry_for) = (clock::monotonic(), store.options().retry_for);
    loop {
        let tried = store.tasks().run_until_cancelled(attempt.run(&mut last_try)).await;
        let error = match tried.ok_or(TierStoreError::Stopped)? {
            Ok(entry) => return Ok(entry),
            Err(error) => error,
        };
        // Each request was already retried for this time. The caller tries again later, with the segments that are due
        // then.
        let may_retry = error.retryable() && began.elapsed() < retry_for;
        let Some(pause) = pauses.next().filter(|_| may_retry) else { return Err(error) };
        tracing::debug!(path = %source.path().display(), %error, ?pause, "segment upload failed, retrying");
        store.tasks().run_until_cancelled(store.pause(pause)).await.ok_or(TierStoreError::Stopped)?;
    }
}

/// One upload with all its attempts.
struct UploadAttempt<'a> {
    store: &'a TierStore,
    source: &'a SegmentSource,
    from: SkippedPrefix,
    name: uuid::Uuid,
}

/// The object that one attempt sent.
struct UploadedObject {
    entry: SegmentEntry,
    outcome: Result<(), TierStoreError>,
}

impl<'a> UploadAttempt<'a> {
    fn new(store: &'a TierStore, source: &'a SegmentSource, from: SkippedPrefix) -> Self {
        Self { store, source, from, name: random::uuid() }
    }

    async fn run(&mut self, last_try: &mut Option<SegmentEntry>) -> Result<SegmentEntry, UploadError> {
        if let Some(entry) = last_try.take()
            && self.verify(&entry).await.is_ok()
        {
            return Ok(entry);
        }
        let sent = self.send().await?;
        *last_try = Some(sent.entry);
        if mutant!(TreatFailedPutAsDone) {
            return Ok(sent.entry);
        }
        if let Err(error) = sent.outcome {
            return Err(error.into());
        }
        self.verify(&sent.entry).await?;
        Ok(sent.entry)
    }

    /// Streams the segment to the store.
    async fn send(&self) -> Result<UploadedObject, UploadError> {
        let mut batches = SegmentBatches::of(self.source, self.from)?;
        let mut parts = PartBuffer::default();
        while parts.len() as u64 <= SINGLE_BYTES {
            match batches.next().await? {
                Some(pieces) => parts.extend(pieces),
                None => return self.send_whole(batches, parts).await,
            }
        }
        let first = batches.first().expect("batches were kept");
        let object = self.object(&self.stamp(first));
        let path = self.store.path(&object);
        let opened = self.store.retry(&object, || self.store.objects().put_multipart(&path)).await?;
        let mut multipart =
            MultipartUpload { store: self.store, object: &object, upload: opened, in_flight: FuturesUnordered::new() };
        match self.send_parts(&mut multipart, batches, parts).await {
            Ok(entry) => {
                let outcome = multipart.complete().await;
                Ok(UploadedObject { entry, outcome })
            }
            Err(error) => {
                multipart.abort().await;
                Err(error)
            }
        }
    }

    async fn send_whole(&self, batches: SegmentBatches, mut parts: PartBuffer) -> Result<UploadedObject, UploadError> {
        let entry = self.append_footer(batches, &mut parts);
        let object = self.object(&entry.stamp);
        let path = self.store.path(&object);
        let _permits = self.store.parts().acquire_many(2).await.map_err(|_| TierStoreError::Stopped)?;
        let payload = parts.take(usize::MAX);
        let put = || async {
            let result = self.store.objects().put(&path, payload.clone()).await.map(drop);
            if mutant!(TreatFailedPutAsDone) { Ok(()) } else { result }
        };
        let outcome = self.store.retry(&object, put).await;
        Ok(UploadedObject { entry, outcome })
    }

    async fn send_parts(
        &self,
        multipart: &mut MultipartUpload<'_>,
        mut batches: SegmentBatches,
        mut parts: PartBuffer,
    ) -> Result<SegmentEntry, UploadError> {
        loop {
            while parts.len() >= PART_BYTES {
                multipart.put(parts.take(PART_BYTES)).await?;
            }
            match batches.next().await? {
                Some(pieces) => parts.extend(pieces),
                None => break,
            }
        }
        let entry = self.append_footer(batches, &mut parts);
        while parts.len() > 0 {
            multipart.put(parts.take(PART_BYTES)).await?;
        }
        multipart.drain().await?;
        Ok(entry)
    }

    fn append_footer(&self, batches: SegmentBatches, parts: &mut PartBuffer) -> SegmentEntry {
        let footer = batches.into_footer().finish(self.source.producers());
        let encoded = footer.encode();
        let entry = SegmentEntry {
            stamp: self.stamp(footer.base),
            data_bytes: footer.data_bytes,
            footer_bytes: u32::try_from(encoded.len()).expect("a footer is far below 4 GiB"),
            crc: crc32c::crc32c_append(footer.data_crc, &encoded),
            max_timestamp_ms: footer.max_timestamp_ms,
            created_ms: self.source.written_ms(),
        };
        parts.extend([encoded]);
        entry
    }

    fn stamp(&self, base: crate::model::Offset) -> ObjectId {
        ObjectId { base, end: self.source.end(), epoch: self.from.writer_epoch, attempt: self.name }
    }

    fn object(&self, stamp: &ObjectId) -> String {
        format!("{}/{}", partition_folder(self.from.partition), stamp.segment())
    }

    /// Checks that the object exists and has every byte that was sent.
    async fn verify(&self, entry: &SegmentEntry) -> Result<(), UploadError> {
        let object = self.object(&entry.stamp);
        let mismatch = |reason: String| UploadError::Mismatch { object: object.clone(), reason };
        let bytes = match self.store.head(&object).await {
            Err(TierStoreError::NotFound { .. }) => {
                return Err(mismatch("the object is missing after its write".to_owned()));
            }
            found => found?,
        };
        if bytes != entry.object_bytes() {
            return Err(mismatch(format!("the object has {bytes} bytes instead of {}", entry.object_bytes())));
        }
        let (mut at, mut crc, mut tail) = (0, 0, Bytes::new());
        while at < bytes {
            let end = if at < entry.data_bytes { entry.data_bytes.min(at + READ_BACK_BYTES) } else { bytes };
            tail = self.store.read_back(&object, at..end).await?;
            crc = crc32c::crc32c_append(crc, &tail);
            at = end;
        }
        super::footer::Footer::parse(&tail).map_err(|error| mismatch(error.to_string()))?;
        if crc != entry.crc {
            return Err(mismatch(format!("the CRC-32C is {crc:#010x} instead of {:#010x}", entry.crc)));
        }
        Ok(())
    }
}

/// Checked bytes that are to be sent. Removing bytes copies no payload.
#[derive(Default)]
struct PartBuffer {
    pieces: VecDeque<Bytes>,
    bytes: usize,
}

impl PartBuffer {
    fn len(&self) -> usize {
        self.bytes
    }

    fn extend(&mut self, pieces: impl IntoIterator<Item = Bytes>) {
        for piece in pieces {
            self.bytes += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// Removes and returns the first `most` bytes.
    fn take(&mut self, max_bytes: usize) -> PutPayload {
        let (mut taken, mut left) = (Vec::new(), max_bytes.min(self.bytes));
        self.bytes -= left;
        while left > 0 {
            let piece = self.pieces.front_mut().expect("the pieces have `bytes` bytes");
            if piece.len() > left {
                taken.push(piece.split_to(left));
                break;
            }
            left -= piece.len();
            taken.extend(self.pieces.pop_front());
        }
        taken.into_iter().collect()
    }
}

type PartFuture = futures::future::BoxFuture<'static, object_store::Result<()>>;

struct MultipartUpload<'a> {
    store: &'a TierStore,
    object: &'a str,
    upload: Box<dyn object_store::MultipartUpload>,
    in_flight: FuturesUnordered<PartFuture>,
}

impl MultipartUpload<'_> {
    async fn put(&mut self, payload: PutPayload) -> Result<(), UploadError> {
        while self.in_flight.len() >= PARTS_AT_ONCE {
            self.wait_for_part().await?;
        }
        // Parts of this upload must complete while it waits for permits that other uploads hold.
        let permit = loop {
            tokio::select! {
                permit = std::sync::Arc::clone(self.store.parts()).acquire_owned() => {
                    break permit.map_err(|_| TierStoreError::Stopped)?;
                }
                sent = self.in_flight.next(), if !self.in_flight.is_empty() => self.on_part_sent(sent)?,
            }
        };
        let part = self.upload.put_part(payload);
        self.in_flight.push(Box::pin(async move {
            let sent = part.await;
            drop(permit);
            sent
        }));
        Ok(())
    }

    async fn wait_for_part(&mut self) -> Result<(), UploadError> {
        let sent = tokio::time::timeout(self.store.options().request_timeout * 2, self.in_flight.next()).await;
        match sent {
            Ok(sent) => self.on_part_sent(sent),
            Err(_) => {
                let reason = "no response to a part in time".to_owned();
                Err(TierStoreError::Unavailable { object: self.object.to_owned(), reason }.into())
            }
        }
    }

    fn on_part_sent(&self, sent: Option<object_store::Result<()>>) -> Result<(), UploadError> {
        match sent {
            Some(Err(error)) => Err(TierStoreError::new(self.object, &error).into()),
            _ => Ok(()),
        }
    }

    async fn drain(&mut self) -> Result<(), UploadError> {
        while !self.in_flight.is_empty() {
            self.wait_for_part().await?;
        }
        Ok(())
    }

    async fn complete(&mut self) -> Result<(), TierStoreError> {
        let done = tokio::time::timeout(self.store.options().request_timeout * 2, self.upload.complete()).await;
        match done {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(as_unknown(TierStoreError::new(self.object, &error))),
            Err(_) => {
                let reason = "no response to the completion of the upload in time".to_owned();
                Err(TierStoreError::Unavailable { object: self.object.to_owned(), reason })
            }
        }
    }

    /// Aborts a failed upload, so that the store frees its parts. If the abort fails, `uploads` repeats it later.
    async fn abort(&mut self) {
        self.in_flight.clear();
        let aborted = tokio::time::timeout(self.store.options().request_timeout, self.upload.abort()).await;
        if let Ok(Err(error)) = aborted {
            tracing::debug!(object = self.object, %error, "cannot abort a multipart upload");
        }
    }
}

/// Returns the error of a completion as one of unknown outcome. If a completion succeeds and its response is lost, the
/// repeated request is refused, and every store uses another error (not found, not allowed, an internal error). So the
/// next attempt verifies the object first.
fn as_unknown(error: TierStoreError) -> TierStoreError {
    match error {
        TierStoreError::NotFound { object } => {
            TierStoreError::Unavailable { object, reason: "the multipart upload is unknown".to_owned() }
        }
        TierStoreError::Denied { object, reason } | TierStoreError::Unsupported { object, reason } => {
            TierStoreError::Unavailable { object, reason }
        }
        other => other,
    }
}

/// Writes a small object under a new name, reads it back and compares.
pub(super) async fn small(store: &TierStore, object: &str, content: Bytes) -> Result<(), UploadError> {
    let write = || async {
        store.put(object, content.clone()).await?;
        let stored = store.get(object).await?;
        if stored == content {
            Ok(())
        } else {
            let reason = format!("{} bytes were written, and {} others were returned", content.len(), stored.len());
            Err(UploadError::Mismatch { object: object.to_owned(), reason })
        }
    };
    write.retry(store.pauses()).when(|error| matches!(error, UploadError::Mismatch { .. })).await
}
