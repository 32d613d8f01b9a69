//! A watch that survives the failure of its member: it moves to another member and resumes after the last returned
//! change.
//!
//! # Overview
//!
//! Only changes advance the watch. The response to a progress request contains a revision too. Up to etcd 3.4.24 and
//! 3.5.7 it may overtake older changes (etcd issue 15220), so it only proves that the member is reachable.
//!
//! Later versions respond to a progress request only once their revision has reached the start of the watch. A watch
//! from the next revision would get no response from an idle etcd, and its member would look unresponsive. So a watch
//! starts one revision earlier than requested and skips the changes of that revision.

use std::{sync::Arc, time::Duration};

use etcd_client::{Error, WatchOptions, WatchRequestSender, WatchResponse, WatchResponseStream};

use super::{
    call::{Failed, Refusal, Repeat},
    members::{Line, Members},
    text,
};
use crate::{
    cluster::store::{Changes, Event, Revision, StoreError},
    task::clock,
};

/// Time without a message after which progress is requested.
const QUIET: Duration = Duration::from_secs(2);

/// Age of a newer revision in another response after which progress is requested at once, and the timeout of that
/// request. A connection over a briefly interrupted network stalls for seconds afterwards, until the system
/// retransmits.
const LAG: Duration = Duration::from_millis(250);
const HURRY: Duration = Duration::from_secs(1);

/// Number of unanswered progress requests in a row that are tolerated. Doubled after each timeout up to
/// [`MOST_QUIETS`]: a member that must catch up responds late and needs that time.
const QUIETS: u32 = 1;
const MOST_QUIETS: u32 = 32;

/// Time without a working member after which the watch ends with an error.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pauses between attempts to resume: the first and the longest.
const WAITS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// A watch and its position.
pub(super) struct Resuming {
    members: Arc<Members>,
    prefix: String,
    /// All changes before this revision were returned.
    next: Revision,
    /// Start revision of the stream: the value of `next` at that time, or one below.
    began: Revision,
    stream: Stream,
    quiets: u32,
    wait: Duration,
}

/// The watch at one member.
struct Stream {
    line: Line,
    /// Newest known revision at the last progress request that got a response.
    alive: Revision,
    /// True if the stream has received a response since its start.
    answered: bool,
    /// True if progress was requested because a call on the connection timed out: one request is enough.
    doubted: bool,
    requests: WatchRequestSender,
    responses: WatchResponseStream,
}

/// Reason for the end of a stream.
enum Ended {
    /// The stream ended with an error or a cancellation.
    Said(String),
    /// The member did not respond in time.
    Silent,
    /// The start revision is compacted, but the next needed revision is not.
    Early,
}

/// Returns the next changes, for `futures::stream::unfold`. The stream ends after the first error.
pub(super) async fn step(watch: Option<Resuming>) -> Option<(Result<Changes, StoreError>, Option<Resuming>)> {
    let mut watch = watch?;
    match watch.changes().await {
        Ok(changes) => Some((Ok(changes), Some(watch))),
        Err(error) => Some((Err(error), None)),
    }
}

impl Resuming {
    /// Starts a watch at a revision, at any member that responds.
    pub(super) async fn begin(members: Arc<Members>, prefix: &str, from: Revision) -> Result<Self, StoreError> {
        // In etcd, 0 means from now on.
        let next = from.max(Revision(1));
        let began = one_before(next);
        let stream = open(&members, prefix, began).await.map_err(|failed| failed.of_watch(from))?;
        Ok(Self { members, prefix: prefix.to_owned(), next, began, stream, quiets: QUIETS, wait: WAITS.0 })
    }

    async fn changes(&mut self) -> Result<Changes, StoreError> {
        loop {
            let ended = match self.stream.next(self.quiets, Revision(self.next.0 - 1)).await {
                Ok(response) => match self.understand(&response)? {
                    Ok(changes) => return Ok(changes),
                    Err(ended) => ended,
                },
                Err(ended) => ended,
            };
            self.resume(ended).await?;
        }
    }

    /// Converts a response to changes, which are empty for a progress response, or to the end of this stream. An error
    /// ends the watch.
    fn understand(&mut self, response: &WatchResponse) -> Result<Result<Changes, Ended>, StoreError> {
        if response.compact_revision() > 0 {
            let oldest = text::revision(response.compact_revision());
            if self.began < self.next && oldest <= self.next {
                return Ok(Err(Ended::Early));
            }
            return Err(StoreError::Compacted { from: self.next, oldest });
        }
        if response.canceled() {
            return Ok(Err(Ended::Said(response.cancel_reason().to_owned())));
        }
        if let Err(error) = self.stream.line.revision(response.header()) {
            if let Some(regression) = self.members.regression() {
                return Err(StoreError::Regressed(regression));
            }
            return Ok(Err(Ended::Said(error.to_string())));
        }
        (self.quiets, self.wait) = (QUIETS, WAITS.0);
        let kvs = response.events().iter().filter_map(etcd_client::Event::kv);
        // Skip changes that were returned before: the stream started below `next`.
        let new = kvs.filter(|kv| text::revision(kv.mod_revision()) >= self.next);
        let mut last = None;
        let mut events: Vec<Event> = Vec::with_capacity(response.events().len());
        for kv in new {
            last = last.max(Some(text::revision(kv.mod_revision())));
            events.extend(text::event(kv));
        }
        // A revision is never split over two responses unless requested (`fragment`).
        if let Some(revision) = last {
            self.next = revision.next();
        }
        // Returned also without changes: the watcher learns that none is missing.
        Ok(Ok(Changes { revision: Revision(self.next.0 - 1), events }))
    }

    async fn resume(&mut self, ended: Ended) -> Result<(), StoreError> {
        let member = self.members.of(&self.stream.line);
        let mut begin = one_before(self.next);
        match ended {
            Ended::Said(why) => {
                tracing::debug!(endpoint = member.endpoint(), why, next = %self.next, "a metadata watch is resumed");
                self.members.pass_on(member);
            }
            Ended::Silent => {
                tracing::info!(
                    endpoint = member.endpoint(),
                    "this member of etcd fell silent; the metadata watch moves on to another"
                );
                self.quiets = (self.quiets * 2).min(MOST_QUIETS);
                member.replace(&self.stream.line).await;
                self.members.pass_on(member);
            }
            Ended::Early => begin = self.next,
        }
        let end = clock::monotonic() + PATIENCE;
        loop {
            tokio::time::sleep(self.wait).await;
            self.wait = (self.wait * 2).min(WAITS.1);
            match open(&self.members, &self.prefix, begin).await {
                Ok(stream) => {
                    (self.stream, self.began) = (stream, begin);
                    return Ok(());
                }
                Err(failed @ Failed::Unavailable { .. }) if clock::monotonic() < end => {
                    tracing::debug!(?failed, "no member resumes the metadata watch yet");
                }
                Err(failed) => return Err(failed.of_watch(self.next)),
            }
        }
    }
}

/// Returns the start revision of a watch whose first change is that of `next`. In etcd, 0 means from now on.
fn one_before(next: Revision) -> Revision {
    Revision(next.0.saturating_sub(1).max(1))
}

/// Starts a watch at any member that responds, and waits until etcd has created it.
async fn open(members: &Members, prefix: &str, begin: Revision) -> Result<Stream, Failed> {
    let from = text::number(begin).unwrap_or(i64::MAX);
    let options = &WatchOptions::new().with_range(text::end(prefix)).with_start_revision(from);
    members
        .call(Repeat::Always, |line: Line| async move {
            let stream = line.watches().watch(text::first(prefix), Some(options.clone())).await?;
            let (requests, mut responses) = stream.split();
            let begun = responses.message().await?.ok_or_else(|| Error::WatchError("it ended at once".to_owned()))?;
            if begun.canceled() {
                return Err(Error::WatchError(begun.cancel_reason().to_owned()));
            }
            line.revision(begun.header())?;
            Ok(Stream { line, alive: Revision::ZERO, answered: false, doubted: false, requests, responses })
        })
        .await
}

impl Stream {
    /// Returns the next response; everything up to `given` was returned. Cancel safe: dropping the future loses no
    /// response.
    async fn next(&mut self, quiets: u32, given: Revision) -> Result<WatchResponse, Ended> {
        let (mut asked, mut hurried, mut quiet) = (None, false, 0);
        let mut until = clock::monotonic() + QUIET;
        loop {
            // A new stream, or a member that was too slow before, gets the full time.
            let may_doubt = self.answered && !hurried && quiets == QUIETS;
            let Self { line, responses, alive, answered, doubted, .. } = &mut *self;
            let hurry = tokio::select! {
                biased;
                response = responses.message() => {
                    let response = match response {
                        Ok(Some(response)) => response,
                        Ok(None) => return Err(Ended::Said("the stream ended".to_owned())),
                        Err(error) => return Err(Ended::Said(Refusal::of(&error).why)),
                    };
                    // Changes may have been in transit before the request.
                    if let Some(asked) = asked.filter(|_| response.events().is_empty()) {
                        *alive = asked;
                    }
                    *answered = true;
                    return Ok(response);
                }
                () = line.is_given_up(), if may_doubt && !*doubted => {
                    *doubted = true;
                    true
                }
                () = line.is_outrun(given.max(*alive), LAG), if may_doubt => true,
                () = tokio::time::sleep_until(until) => false,
            };
            if !hurry && (hurried || quiet == quiets) {
                return Err(Ended::Silent);
            }
            let soon = clock::monotonic() + if hurry { HURRY } else { QUIET };
            until = if hurry && quiet > 0 { soon.min(until) } else { soon };
            quiet += 1;
            hurried = hurry;
            asked = Some(self.line.newest());
            // The channel holds a hundred requests, so this never waits.
            let requested = self.requests.request_progress().await;
            requested.map_err(|error| Ended::Said(error.to_string()))?;
        }
    }
}
