//! Uploads segments, manifests and pages: put first, then verify. Only a verified object may be referenced.
//!
//! # Overview
//!
//! A segment is streamed from its file, which stays readable after its name is removed. Its parts have 8 MiB; at most four parts of one
//! segment and eight parts of all segments are in flight. Small segments are uploaded with one request. A failed attempt is verified before
//! the next one: if only the response was lost, the object exists. All attempts of an upload use the same name and the same content, so a
//! duplicate or late request changes nothing.
//!
//! # Crash
//!
//! A crash or an error leaves at most objects that no manifest references, and multipart uploads that are incomplete. Garbage collection
//! deletes the objects. `uploads` aborts the multipart uploads if the store is S3.

use std::collections::VecDeque;

use backon::Retryable;
use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};

use super::{
    claim::ClaimError,
    manifest::SegmentLine,
    name::{Stamp, partition_folder},
    read::ReadError,
    segment::{Batches, From, SegmentSource, SourceError},
    store::{Store, StoreError},
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
    Source(#[from] SourceError),
    /// A newer leader has committed to the object store.
    #[error("leader epoch {epoch} may not write: epoch {current} has committed to the bucket")]
    Deposed {
        /// Leader epoch of the caller.
        epoch: LeaderEpoch,
        /// Leader epoch of the committed state.
        current: LeaderEpoch,
    },
    /// The prefix does not belong to this cluster, or its owner is not known yet.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The request to the store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store returns other bytes than were written.
    #[error("object {object} is not what was written: {reason}; it will not be used")]
    Mismatch {
        /// Name of the object, below the prefix.
        object: String,
        /// Difference between the two.
        reason: String,
    },
    /// The current manifest cannot be read.
    #[error("the current manifest cannot be read: {0}")]
    Manifest(#[from] ReadError),
}

impl UploadError {
    /// Returns true if a later attempt may succeed without intervention.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Source(_) | Self::Deposed { .. } => false,
            Self::Claim(error) => error.retryable(),
            Self::Store(error) => error.retryable(),
            Self::Mismatch { .. } => true,
            Self::Manifest(error) => error.retryable(),
        }
    }
}

/// Uploads the part of `source` that is not in the object store yet, and verifies it.
pub(super) async fn segment(store: &Store, source: &SegmentSource, from: From) -> Result<SegmentLine, UploadError> {
    let mut last_try: Option<SegmentLine> = None;
    let mut attempt = Attempt::new(store, source, from);
    let mut pauses = backon::BackoffBuilder::build(store.pauses());
    let (began, retry_for) = (clock::monotonic(), store.options().retry_for);
    loop {
        let tried = tokio::select! {
            biased;
            () = store.tasks().cancelled() => return Err(StoreError::Stopped.into()),
            tried = attempt.run(&mut last_try) => tried,
        };
        let error = match tried {
            Ok(line) => return Ok(line),
            Err(error) => error,
        };
        // Each request was already retried for this time. The caller tries again later, with the segments that are due then.
        let may_retry = error.retryable() && began.elapsed() < retry_for;
        let Some(pause) = pauses.next().filter(|_| may_retry) else { return Err(error) };
        tracing::debug!(path = %source.path().display(), %error, ?pause, "segment upload failed, trying again");
        tokio::select! {
            biased;
            () = store.tasks().cancelled() => return Err(StoreError::Stopped.into()),
            () = store.pause(pause) => {}
        }
    }
}

/// One upload with all its attempts.
struct Attempt<'a> {
    store: &'a Store,
    source: &'a SegmentSource,
    from: From,
    name: uuid::Uuid,
}

/// The object that one attempt sent.
struct Sent {
    line: SegmentLine,
    outcome: Result<(), StoreError>,
}

impl<'a> Attempt<'a> {
    fn new(store: &'a Store, source: &'a SegmentSource, from: From) -> Self {
        Self { store, source, from, name: random::uuid() }
    }

    async fn run(&mut self, last_try: &mut Option<SegmentLine>) -> Result<SegmentLine, UploadError> {
        if let Some(line) = last_try.take()
            && self.verify(&line).await.is_ok()
        {
            return Ok(line);
        }
        let sent = self.send().await?;
        *last_try = Some(sent.line);
        if mutant!(TreatFailedPutAsDone) {
            return Ok(sent.line);
        }
        if let Err(error) = sent.outcome {
            return Err(error.into());
        }
        self.verify(&sent.line).await?;
        Ok(sent.line)
    }

    /// Streams the segment to the store.
    async fn send(&self) -> Result<Sent, UploadError> {
        let mut batches = Batches::of(self.source, self.from)?;
        let mut parts = Parts::default();
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
            Multipart { store: self.store, object: &object, upload: opened, flying: FuturesUnordered::new() };
        match self.send_parts(&mut multipart, batches, parts).await {
            Ok(line) => {
                let outcome = multipart.complete().await;
                Ok(Sent { line, outcome })
            }
            Err(error) => {
                multipart.abort().await;
                Err(error)
            }
        }
    }

    async fn send_whole(&self, batches: Batches, mut parts: Parts) -> Result<Sent, UploadError> {
        let line = self.append_footer(batches, &mut parts);
        let object = self.object(&line.stamp);
        let path = self.store.path(&object);
        let _permits = self.store.parts().acquire_many(2).await.map_err(|_| StoreError::Stopped)?;
        let payload = parts.take(usize::MAX);
        let put = || async {
            let answered = self.store.objects().put(&path, payload.clone()).await.map(drop);
            if mutant!(TreatFailedPutAsDone) { Ok(()) } else { answered }
        };
        let outcome = self.store.retry(&object, put).await;
        Ok(Sent { line, outcome })
    }

    async fn send_parts(
        &self,
        multipart: &mut Multipart<'_>,
        mut batches: Batches,
        mut parts: Parts,
    ) -> Result<SegmentLine, UploadError> {
        loop {
            while parts.len() >= PART_BYTES {
                multipart.put(parts.take(PART_BYTES)).await?;
            }
            match batches.next().await? {
                Some(pieces) => parts.extend(pieces),
                None => break,
            }
        }
        let line = self.append_footer(batches, &mut parts);
        while parts.len() > 0 {
            multipart.put(parts.take(PART_BYTES)).await?;
        }
        multipart.drain().await?;
        Ok(line)
    }

    fn append_footer(&self, batches: Batches, parts: &mut Parts) -> SegmentLine {
        let footer = batches.into_footer().finish(self.source.producers());
        let encoded = footer.encode();
        let line = SegmentLine {
            stamp: self.stamp(footer.base),
            data_bytes: footer.data_bytes,
            footer_bytes: u32::try_from(encoded.len()).expect("a footer is far below 4 GiB"),
            crc: crc32c::crc32c_append(footer.data_crc, &encoded),
            max_timestamp_ms: footer.max_timestamp_ms,
            created_ms: self.source.written_ms(),
        };
        parts.extend([encoded]);
        line
    }

    fn stamp(&self, base: crate::model::Offset) -> Stamp {
        Stamp { base, end: self.source.end(), epoch: self.from.writer_epoch, attempt: self.name }
    }

    fn object(&self, stamp: &Stamp) -> String {
        format!("{}/{}", partition_folder(self.from.partition), stamp.segment())
    }

    /// Checks that the object exists and has every byte that was sent.
    async fn verify(&self, line: &SegmentLine) -> Result<(), UploadError> {
        let object = self.object(&line.stamp);
        let mismatch = |reason: String| UploadError::Mismatch { object: object.clone(), reason };
        let bytes = match self.store.head(&object).await {
            Err(StoreError::NotFound { .. }) => {
                return Err(mismatch("it is not there after it was written".to_owned()));
            }
            answered => answered?,
        };
        if bytes != line.object_bytes() {
            return Err(mismatch(format!("it has {bytes} bytes instead of {}", line.object_bytes())));
        }
        let (mut at, mut crc, mut tail) = (0, 0, Bytes::new());
        while at < bytes {
            let end = if at < line.data_bytes { line.data_bytes.min(at + READ_BACK_BYTES) } else { bytes };
            tail = self.store.read_back(&object, at..end).await?;
            crc = crc32c::crc32c_append(crc, &tail);
            at = end;
        }
        super::footer::Footer::parse(&tail).map_err(|error| mismatch(error.to_string()))?;
        if crc != line.crc {
            return Err(mismatch(format!("its CRC-32C is {crc:#010x} instead of {:#010x}", line.crc)));
        }
        Ok(())
    }
}

/// Checked bytes that are to be sent. Removing bytes copies no payload.
#[derive(Default)]
struct Parts {
    pieces: VecDeque<Bytes>,
    bytes: usize,
}

impl Parts {
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
    fn take(&mut self, most: usize) -> PutPayload {
        let (mut taken, mut left) = (Vec::new(), most.min(self.bytes));
        self.bytes -= left;
        while left > 0 {
            let piece = self.pieces.front_mut().expect("the pieces hold as much as was counted");
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

type Part = futures::future::BoxFuture<'static, object_store::Result<()>>;

struct Multipart<'a> {
    store: &'a Store,
    object: &'a str,
    upload: Box<dyn MultipartUpload>,
    flying: FuturesUnordered<Part>,
}

impl Multipart<'_> {
    async fn put(&mut self, payload: PutPayload) -> Result<(), UploadError> {
        while self.flying.len() >= PARTS_AT_ONCE {
            self.land().await?;
        }
        // Parts of this upload must complete while it waits for permits that other uploads hold.
        let permit = loop {
            tokio::select! {
                permit = std::sync::Arc::clone(self.store.parts()).acquire_owned() => {
                    break permit.map_err(|_| StoreError::Stopped)?;
                }
                landed = self.flying.next(), if !self.flying.is_empty() => self.landed(landed)?,
            }
        };
        let part = self.upload.put_part(payload);
        self.flying.push(Box::pin(async move {
            let sent = part.await;
            drop(permit);
            sent
        }));
        Ok(())
    }

    async fn land(&mut self) -> Result<(), UploadError> {
        let landed = tokio::time::timeout(self.store.options().request_timeout * 2, self.flying.next()).await;
        match landed {
            Ok(landed) => self.landed(landed),
            Err(_) => {
                let reason = "a part was not answered in time".to_owned();
                Err(StoreError::Unavailable { object: self.object.to_owned(), reason }.into())
            }
        }
    }

    fn landed(&self, landed: Option<object_store::Result<()>>) -> Result<(), UploadError> {
        match landed {
            Some(Err(error)) => Err(StoreError::new(self.object, &error).into()),
            _ => Ok(()),
        }
    }

    async fn drain(&mut self) -> Result<(), UploadError> {
        while !self.flying.is_empty() {
            self.land().await?;
        }
        Ok(())
    }

    async fn complete(&mut self) -> Result<(), StoreError> {
        let done = tokio::time::timeout(self.store.options().request_timeout * 2, self.upload.complete()).await;
        match done {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(as_unknown(StoreError::new(self.object, &error))),
            Err(_) => {
                let reason = "the end of the upload was not answered in time".to_owned();
                Err(StoreError::Unavailable { object: self.object.to_owned(), reason })
            }
        }
    }

    /// Aborts a failed upload, so that the store frees its parts. If the abort fails, `uploads` repeats it later.
    async fn abort(&mut self) {
        self.flying.clear();
        let aborted = tokio::time::timeout(self.store.options().request_timeout, self.upload.abort()).await;
        if let Ok(Err(error)) = aborted {
            tracing::debug!(object = self.object, %error, "a multipart upload could not be aborted");
        }
    }
}

/// Returns the error of a completion as one of unknown outcome. If a completion succeeds and its response is lost, the repeated request is
/// refused, and every store uses another error (not found, not allowed, an internal error). So the next attempt verifies the object first.
fn as_unknown(error: StoreError) -> StoreError {
    match error {
        StoreError::NotFound { object } => {
            StoreError::Unavailable { object, reason: "the multipart upload is unknown".to_owned() }
        }
        StoreError::Denied { object, reason } | StoreError::Unsupported { object, reason } => {
            StoreError::Unavailable { object, reason }
        }
        other => other,
    }
}

/// Writes a small object under a new name, reads it back and compares.
pub(super) async fn small(store: &Store, object: &str, content: Bytes) -> Result<(), UploadError> {
    let write = || async {
        store.put(object, content.clone()).await?;
        let there = store.get(object).await?;
        if there == content {
            Ok(())
        } else {
            let reason = format!("{} bytes were written and {} others came back", content.len(), there.len());
            Err(UploadError::Mismatch { object: object.to_owned(), reason })
        }
    };
    write.retry(store.pauses()).when(|error| matches!(error, UploadError::Mismatch { .. })).await
}
