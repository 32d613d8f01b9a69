//! Uploads segments, manifests and pages: put first, then verify. Only a verified object may be referenced.
//!
//! # Overview
//!
//! A segment is streamed from its file, which stays readable after its name is removed. Segments up to 16 MiB are
//! uploaded with one request, and larger ones in parts of 8 MiB. At most four parts of one segment and eight parts of
//! all segments are in flight. After a failed attempt, the object is verified before the next attempt: if only the
//! response was lost, the object exists. All attempts of an upload use the same name and the same content, so a
//! duplicate or late request changes nothing.
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

/// Size of each part but the last, in bytes. Some stores require parts of one size.
const PART_BYTES: usize = 8 << 20;

/// Maximum bytes of batches that are uploaded with one request.
const MAX_SINGLE_PUT_BYTES: u64 = 2 * PART_BYTES as u64;

/// Maximum number of parts of one segment in flight.
const MAX_SEGMENT_PARTS_IN_FLIGHT: usize = 4;

/// Maximum size of one read of the verification, in bytes.
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
        /// Difference between the written and the returned object.
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

/// Uploads the part of `source` after the skipped prefix, and verifies it. Returns its manifest entry. Failed attempts
/// are repeated until `ObjectStoreOptions::retry_for` has passed.
pub(super) async fn upload_segment(
    store: &TierStore,
    source: &SegmentSource,
    skipped: SkippedPrefix,
) -> Result<SegmentEntry, UploadError> {
    let mut last_sent: Option<SegmentEntry> = None;
    let mut upload = SegmentUpload::new(store, source, skipped);
    let mut pauses = backon::BackoffBuilder::build(store.pauses());
    let (began, retry_for) = (clock::monotonic(), store.options().retry_for);
    loop {
        let result = store.tasks().run_until_cancelled(upload.try_once(&mut last_sent)).await;
        let error = match result.ok_or(TierStoreError::Stopped)? {
            Ok(entry) => return Ok(entry),
            Err(error) => error,
        };
        // After `retry_for`, maintenance tries again later, with the segments that are then due.
        let may_retry = error.retryable() && began.elapsed() < retry_for;
        let Some(pause) = pauses.next().filter(|_| may_retry) else { return Err(error) };
        tracing::debug!(path = %source.path().display(), %error, ?pause, "segment upload failed, retrying");
        store.tasks().run_until_cancelled(store.pause(pause)).await.ok_or(TierStoreError::Stopped)?;
    }
}

/// The upload of one segment, with all its attempts.
struct SegmentUpload<'a> {
    store: &'a TierStore,
    source: &'a SegmentSource,
    skipped: SkippedPrefix,
    /// UUID in the name of the object, which all attempts share.
    uuid: uuid::Uuid,
}

/// The object that one attempt sent. If `outcome` is an error, the object may exist nevertheless, because only the
/// response may be lost.
struct SentObject {
    entry: SegmentEntry,
    outcome: Result<(), TierStoreError>,
}

impl<'a> SegmentUpload<'a> {
    fn new(store: &'a TierStore, source: &'a SegmentSource, skipped: SkippedPrefix) -> Self {
        Self { store, source, skipped, uuid: random::uuid() }
    }

    /// Makes one attempt: sends the object and verifies it. `last_sent` is the object of the previous attempt: if it
    /// passes the verification now, nothing is sent. This attempt stores its own object there.
    async fn try_once(&mut self, last_sent: &mut Option<SegmentEntry>) -> Result<SegmentEntry, UploadError> {
        if let Some(entry) = last_sent.take()
            && self.verify(&entry).await.is_ok()
        {
            return Ok(entry);
        }
        let sent = self.send().await?;
        *last_sent = Some(sent.entry);
        if mutant!(TreatFailedPutAsDone) {
            return Ok(sent.entry);
        }
        if let Err(error) = sent.outcome {
            return Err(error.into());
        }
        self.verify(&sent.entry).await?;
        Ok(sent.entry)
    }

    /// Sends the segment to the store: a small one with one request, a large one in parts.
    async fn send(&self) -> Result<SentObject, UploadError> {
        let mut batches = SegmentBatches::of(self.source, self.skipped)?;
        let mut parts = PartBuffer::default();
        while parts.len() as u64 <= MAX_SINGLE_PUT_BYTES {
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
                Ok(SentObject { entry, outcome })
            }
            Err(error) => {
                multipart.abort().await;
                Err(error)
            }
        }
    }

    /// Sends a segment whose batches are all in `parts`, with one request. The request takes the permits of two parts.
    async fn send_whole(&self, batches: SegmentBatches, mut parts: PartBuffer) -> Result<SentObject, UploadError> {
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
        Ok(SentObject { entry, outcome })
    }

    /// Sends `parts`, the rest of the batches and the footer as parts of a multipart upload. Does not complete the
    /// upload.
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

    /// Appends the footer of a segment whose batches are all in `parts` or sent. Returns the manifest entry of the
    /// object.
    fn append_footer(&self, batches: SegmentBatches, parts: &mut PartBuffer) -> SegmentEntry {
        let footer = batches.into_footer_builder().finish(self.source.producers());
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
        ObjectId { base, end: self.source.end(), epoch: self.skipped.writer_epoch, attempt: self.uuid }
    }

    fn object(&self, stamp: &ObjectId) -> String {
        format!("{}/{}", partition_folder(self.skipped.partition), stamp.segment())
    }

    /// Checks that the object exists and has every byte that was sent: reads all of it and compares length and CRC-32C.
    async fn verify(&self, entry: &SegmentEntry) -> Result<(), UploadError> {
        let object = self.object(&entry.stamp);
        let mismatch = |reason: String| UploadError::Mismatch { object: object.clone(), reason };
        let bytes = match self.store.head(&object).await {
            Err(TierStoreError::NotFound { .. }) => {
                return Err(mismatch("the object is missing after its write".to_owned()));
            }
            length => length?,
        };
        if bytes != entry.object_bytes() {
            return Err(mismatch(format!("the object has {bytes} bytes instead of {}", entry.object_bytes())));
        }
        // The last piece is exactly the footer.
        let (mut position, mut crc, mut piece) = (0, 0, Bytes::new());
        while position < bytes {
            let end =
                if position < entry.data_bytes { entry.data_bytes.min(position + READ_BACK_BYTES) } else { bytes };
            piece = self.store.read_back(&object, position..end).await?;
            crc = crc32c::crc32c_append(crc, &piece);
            position = end;
        }
        super::footer::Footer::parse(&piece).map_err(|error| mismatch(error.to_string()))?;
        if crc != entry.crc {
            return Err(mismatch(format!("the CRC-32C is {crc:#010x} instead of {:#010x}", entry.crc)));
        }
        Ok(())
    }
}

/// Checked bytes that are to be sent. Taking bytes out copies no payload.
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

    /// Removes and returns the first `max_bytes` bytes, or all if there are fewer.
    fn take(&mut self, max_bytes: usize) -> PutPayload {
        let (mut taken, mut remaining) = (Vec::new(), max_bytes.min(self.bytes));
        self.bytes -= remaining;
        while remaining > 0 {
            let piece = self.pieces.front_mut().expect("the pieces have `bytes` bytes");
            if piece.len() > remaining {
                taken.push(piece.split_to(remaining));
                break;
            }
            remaining -= piece.len();
            taken.extend(self.pieces.pop_front());
        }
        taken.into_iter().collect()
    }
}

type PartFuture = futures::future::BoxFuture<'static, object_store::Result<()>>;

/// A multipart upload of one segment object.
struct MultipartUpload<'a> {
    store: &'a TierStore,
    object: &'a str,
    upload: Box<dyn object_store::MultipartUpload>,
    in_flight: FuturesUnordered<PartFuture>,
}

impl MultipartUpload<'_> {
    /// Starts to send the next part. Waits before that while too many parts of this segment or of all segments are in
    /// flight. Fails if an earlier part has failed.
    async fn put(&mut self, payload: PutPayload) -> Result<(), UploadError> {
        while self.in_flight.len() >= MAX_SEGMENT_PARTS_IN_FLIGHT {
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

    /// Waits until one part in flight has been sent. Fails if that part failed, or after twice the request timeout.
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

    /// Returns the error of a part that has failed. `sent` is `None` if no part was in flight.
    fn on_part_sent(&self, sent: Option<object_store::Result<()>>) -> Result<(), UploadError> {
        match sent {
            Some(Err(error)) => Err(TierStoreError::new(self.object, &error).into()),
            _ => Ok(()),
        }
    }

    /// Waits until all parts have been sent. Fails if one has failed.
    async fn drain(&mut self) -> Result<(), UploadError> {
        while !self.in_flight.is_empty() {
            self.wait_for_part().await?;
        }
        Ok(())
    }

    /// Completes the upload, so that the object exists. After an error, the outcome is unknown.
    async fn complete(&mut self) -> Result<(), TierStoreError> {
        let response = tokio::time::timeout(self.store.options().request_timeout * 2, self.upload.complete()).await;
        match response {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(as_unavailable(TierStoreError::new(self.object, &error))),
            Err(_) => {
                let reason = "no response to the completion of the upload in time".to_owned();
                Err(TierStoreError::Unavailable { object: self.object.to_owned(), reason })
            }
        }
    }

    /// Aborts a failed upload, so that the store frees its parts. If the abort fails, garbage collection repeats it
    /// later if the store is S3.
    async fn abort(&mut self) {
        self.in_flight.clear();
        let aborted = tokio::time::timeout(self.store.options().request_timeout, self.upload.abort()).await;
        if let Ok(Err(error)) = aborted {
            tracing::debug!(object = self.object, %error, "cannot abort a multipart upload");
        }
    }
}

/// Converts the error of a completion to `Unavailable`, which is retried. If a completion succeeds and its response is
/// lost, the store refuses the repeated request. The error depends on the store (not found, not allowed, internal). The
/// next attempt verifies the object first.
fn as_unavailable(error: TierStoreError) -> TierStoreError {
    match error {
        TierStoreError::NotFound { object } => {
            TierStoreError::Unavailable { object, reason: "the multipart upload is unknown".to_owned() }
        }
        TierStoreError::Denied { object, reason } | TierStoreError::Unsupported { object, reason } => {
            TierStoreError::Unavailable { object, reason }
        }
        error => error,
    }
}

/// Writes a small object under a new name, reads it back and compares. Repeats this while the content differs, until
/// `retry_for` has passed.
pub(super) async fn put_and_verify(store: &TierStore, object: &str, content: Bytes) -> Result<(), UploadError> {
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
