//! A watch that survives the failure of its member: it moves to another member and resumes after the last returned
//! change.
//!
//! # Overview
//!
//! Only changes advance the watch, although the response to a progress request contains a revision too. Up to etcd
//! 3.4.24 and 3.5.7, this response may overtake older changes (etcd issue 15220), so it only proves that the member is
//! reachable.
//!
//! Later versions respond to a progress request only once their revision has reached the start of the watch. A watch
//! from the next revision would get no response from an idle etcd, and its member would look unresponsive. So a watch
//! starts one revision earlier than requested and skips the changes of that revision.

use std::{sync::Arc, time::Duration};

use etcd_client::{Error, WatchOptions, WatchRequestSender, WatchResponse, WatchResponseStream};

use super::{
    call::RetryPolicy,
    convert,
    error::{EtcdAttemptError, EtcdCallError},
    members::{MemberChannel, Members},
};
use crate::{
    cluster::store::{MetaStoreError, Revision, WatchBatch, WatchEvent},
    task::{Backoff, clock},
};

/// Time without a message after which progress is requested.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);

/// Number of progress intervals in a row without a message after which the watch moves to another member.
const MAX_MISSED_INTERVALS: u32 = 2;

/// Number of streams in a row without any response after which the watch ends with an error. If the start revision is
/// far behind that of the members, the first changes may arrive after the timeout of every stream. After the error, the
/// metadata cache relists and watches from a newer revision.
const MAX_TIMED_OUT_STREAMS: u32 = 3;

/// Time after the end of a stream during which the watch tries to open the next one, before it ends with an error.
const WATCH_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause before the first attempt to resume. The pauses before later attempts grow until a response arrives.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(20);

/// Longest pause before an attempt to resume.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(1);

/// A watch, which opens a new stream whenever a stream ends.
pub(super) struct ResumableWatch {
    members: Arc<Members>,
    prefix: String,
    /// All changes before this revision were returned.
    next: Revision,
    /// Start revision of `stream`: the value of `next` when the stream was opened, or one less.
    start: Revision,
    stream: MemberWatch,
    /// Number of streams that have timed out since the last response.
    timed_out_streams: u32,
    backoff: Backoff,
}

/// One stream of the watch, at one member.
struct MemberWatch {
    channel: MemberChannel,
    requests: WatchRequestSender,
    responses: WatchResponseStream,
}

/// Reason for the end of a stream.
enum StreamEnd {
    /// The member or the connection ended the stream, for this reason.
    Cancelled(String),
    /// The member did not respond in time.
    TimedOut,
    /// The start revision is compacted, but `next` is not: the stream started one revision before it.
    StartCompacted,
}

/// Returns the next changes, for `futures::stream::unfold`. The stream ends after the first error.
pub(super) async fn step(
    watch: Option<ResumableWatch>,
) -> Option<(Result<WatchBatch, MetaStoreError>, Option<ResumableWatch>)> {
    let mut watch = watch?;
    match watch.changes().await {
        Ok(changes) => Some((Ok(changes), Some(watch))),
        Err(error) => Some((Err(error), None)),
    }
}

impl ResumableWatch {
    /// Starts a watch at a revision, at any member that responds.
    pub(super) async fn start(members: Arc<Members>, prefix: &str, from: Revision) -> Result<Self, MetaStoreError> {
        // As a start revision in etcd, 0 means from now on.
        let next = from.max(Revision(1));
        let start = one_before(next);
        let stream = open_stream(&members, prefix, start).await.map_err(|error| error.into_watch_error(from))?;
        Ok(Self {
            members,
            prefix: prefix.to_owned(),
            next,
            start,
            stream,
            timed_out_streams: 0,
            backoff: Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY),
        })
    }

    /// Returns the next changes, which are empty for a progress response. Resumes the watch when the stream ends.
    async fn changes(&mut self) -> Result<WatchBatch, MetaStoreError> {
        loop {
            let end = match self.stream.next().await {
                Ok(response) => match self.convert_response(&response)? {
                    Ok(changes) => return Ok(changes),
                    Err(end) => end,
                },
                Err(end) => end,
            };
            self.resume(end).await?;
        }
    }

    /// Converts a response to changes, which are empty for a progress response, and advances `next` past them. The
    /// inner error ends this stream, after which the watch resumes; the outer error ends the watch.
    fn convert_response(&mut self, response: &WatchResponse) -> Result<Result<WatchBatch, StreamEnd>, MetaStoreError> {
        if response.compact_revision() > 0 {
            let oldest = convert::revision(response.compact_revision());
            if self.start < self.next && oldest <= self.next {
                return Ok(Err(StreamEnd::StartCompacted));
            }
            return Err(MetaStoreError::Compacted { from: self.next, oldest });
        }
        if response.canceled() {
            return Ok(Err(StreamEnd::Cancelled(response.cancel_reason().to_owned())));
        }
        if let Err(error) = self.stream.channel.revision(response.header()) {
            if let Some(regression) = self.members.regression() {
                return Err(MetaStoreError::Regressed(regression));
            }
            return Ok(Err(StreamEnd::Cancelled(error.to_string())));
        }
        self.backoff.reset();
        self.timed_out_streams = 0;
        let kvs = response.events().iter().filter_map(etcd_client::Event::kv);
        // Skip changes below `next`, where the stream may have started. They were returned before, or precede the
        // requested start.
        let new_kvs = kvs.filter(|kv| convert::revision(kv.mod_revision()) >= self.next);
        let mut newest = None;
        let mut events: Vec<WatchEvent> = Vec::with_capacity(response.events().len());
        for kv in new_kvs {
            newest = newest.max(Some(convert::revision(kv.mod_revision())));
            events.extend(convert::event(kv));
        }
        // etcd splits a revision over two responses only if the watch requests it (`fragment`).
        if let Some(revision) = newest {
            self.next = revision.next();
        }
        // Returned also without changes: the revision states up to where all changes were returned.
        Ok(Ok(WatchBatch { revision: Revision(self.next.0 - 1), events }))
    }

    /// Opens the next stream after `end`, at another member unless only the start revision was compacted.
    ///
    /// # Errors
    /// The watch ends in these cases:
    /// - Too many streams timed out in a row.
    /// - No member opened a stream within [`WATCH_TIMEOUT`].
    /// - The start revision is compacted.
    /// - The members reject the watch.
    /// - A member of another etcd cluster responded.
    async fn resume(&mut self, end: StreamEnd) -> Result<(), MetaStoreError> {
        let member = self.members.member_of(&self.stream.channel);
        let mut start_at = one_before(self.next);
        match end {
            StreamEnd::Cancelled(reason) => {
                tracing::debug!(endpoint = member.endpoint(), reason, next = %self.next, "resuming a metadata watch");
                self.members.use_next_member(member);
            }
            StreamEnd::TimedOut => {
                tracing::info!(
                    endpoint = member.endpoint(),
                    "an etcd member does not respond: the metadata watch moves to another member"
                );
                member.replace(&self.stream.channel).await;
                self.members.use_next_member(member);
                self.timed_out_streams += 1;
                if self.timed_out_streams == MAX_TIMED_OUT_STREAMS {
                    return Err(MetaStoreError::unavailable("no stream of the watch received a response in time"));
                }
            }
            StreamEnd::StartCompacted => start_at = self.next,
        }
        let deadline = clock::monotonic() + WATCH_TIMEOUT;
        loop {
            self.backoff.pause().await;
            match open_stream(&self.members, &self.prefix, start_at).await {
                Ok(stream) => {
                    (self.stream, self.start) = (stream, start_at);
                    return Ok(());
                }
                Err(error @ EtcdCallError::Unavailable { .. }) if clock::monotonic() < deadline => {
                    tracing::debug!(?error, "no etcd member resumed the metadata watch: retrying");
                }
                Err(error) => return Err(error.into_watch_error(self.next)),
            }
        }
    }
}

/// Returns the start revision of a stream whose first new change has the revision `next`. This is one revision earlier,
/// and at least 1, because 0 means from now on in etcd.
fn one_before(next: Revision) -> Revision {
    Revision(next.0.saturating_sub(1).max(1))
}

/// Opens a stream at any member that responds, and waits until etcd has created the watch.
async fn open_stream(members: &Members, prefix: &str, start_at: Revision) -> Result<MemberWatch, EtcdCallError> {
    let from = convert::etcd_revision(start_at).unwrap_or(i64::MAX);
    let options = &WatchOptions::new().with_range(convert::prefix_end(prefix)).with_start_revision(from);
    members
        .call(RetryPolicy::Always, |channel: MemberChannel| async move {
            let stream = channel.watches().watch(convert::first_key(prefix), Some(options.clone())).await?;
            let (requests, mut responses) = stream.split();
            let created =
                responses.message().await?.ok_or_else(|| Error::WatchError("the watch ended at once".to_owned()))?;
            if created.canceled() {
                return Err(Error::WatchError(created.cancel_reason().to_owned()));
            }
            channel.revision(created.header())?;
            Ok(MemberWatch { channel, requests, responses })
        })
        .await
}

impl MemberWatch {
    /// Returns the next response. If none arrives within [`PROGRESS_INTERVAL`], requests progress; after
    /// [`MAX_MISSED_INTERVALS`] such intervals in a row, the stream has timed out. Cancel safe: dropping the future
    /// loses no response.
    async fn next(&mut self) -> Result<WatchResponse, StreamEnd> {
        for missed in 1..=MAX_MISSED_INTERVALS {
            match tokio::time::timeout(PROGRESS_INTERVAL, self.responses.message()).await {
                Ok(Ok(Some(response))) => return Ok(response),
                Ok(Ok(None)) => return Err(StreamEnd::Cancelled("the stream ended".to_owned())),
                Ok(Err(error)) => return Err(StreamEnd::Cancelled(EtcdAttemptError::from_client(&error).reason)),
                Err(_elapsed) if missed == MAX_MISSED_INTERVALS => {}
                Err(_elapsed) => {
                    // The channel holds a hundred requests, so this never waits.
                    let requested = self.requests.request_progress().await;
                    requested.map_err(|error| StreamEnd::Cancelled(error.to_string()))?;
                }
            }
        }
        Err(StreamEnd::TimedOut)
    }
}
