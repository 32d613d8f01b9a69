//! A watch that outlives its member: it moves on and resumes behind the last change that it gave.
//!
//! Only changes move it forward. An answer to the request for a sign of life names a revision too, but up to etcd 3.4.24
//! and 3.5.7 it may overtake changes that are older (etcd issue 15220), so nothing but life is believed of it.
//!
//! Later ones answer that request only once there is a revision as new as the watch's beginning. A watch from the revision after
//! the newest would hear nothing from a quiet etcd, however well it is, and be taken for one whose member is gone. So a watch begins
//! one revision earlier than asked for, and what that one holds is passed over.

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

/// How long nothing may come before a sign of life is asked for.
const QUIET: Duration = Duration::from_secs(2);

/// How long ago an answer elsewhere must have named a newer revision than the watch has given for a sign of life to be asked for at once, and
/// how long that may take then. A connection over a network that was cut for a moment stands still for seconds after it, until its
/// system sends again.
const LAG: Duration = Duration::from_millis(250);
const HURRY: Duration = Duration::from_secs(1);

/// How many signs of life in a row may stay out. Doubled after each time that it was too long, up to [`MOST_QUIETS`]: a member
/// that has much to catch up with answers late, and must get the time that it needs.
const QUIETS: u32 = 1;
const MOST_QUIETS: u32 = 32;

/// How long no member may have to give before the watch ends with an error.
const PATIENCE: Duration = Duration::from_secs(30);

/// The waits between attempts at resuming.
const WAITS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// A watch and where it stands.
pub(super) struct Resuming {
    members: Arc<Members>,
    prefix: String,
    /// Everything before this revision was given.
    next: Revision,
    /// Where the stream began: `next` as it was then, or one before.
    began: Revision,
    stream: Stream,
    quiets: u32,
    wait: Duration,
}

/// The watch at one member.
struct Stream {
    line: Line,
    /// The newest revision that was known when a sign of life was asked for that came.
    alive: Revision,
    /// Whether it has answered since it began.
    answered: bool,
    /// Whether it was asked because a call on its connection was given up: once is enough.
    doubted: bool,
    requests: WatchRequestSender,
    responses: WatchResponseStream,
}

/// How a stream ended.
enum Ended {
    /// With a word.
    Said(String),
    /// Without one, and without a sign of life.
    Silent,
    /// Of where it began nothing is kept, but of what comes next everything is.
    Early,
}

/// One answer of the watch, for `futures::stream::unfold`. It ends after the first error.
pub(super) async fn step(watch: Option<Resuming>) -> Option<(Result<Changes, StoreError>, Option<Resuming>)> {
    let mut watch = watch?;
    match watch.changes().await {
        Ok(changes) => Some((Ok(changes), Some(watch))),
        Err(error) => Some((Err(error), None)),
    }
}

impl Resuming {
    /// Begins at a revision, at whichever member answers.
    pub(super) async fn begin(members: Arc<Members>, prefix: &str, from: Revision) -> Result<Self, StoreError> {
        // To etcd 0 means from now on.
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

    /// What a response holds: changes, or a sign of life without any; or the end of this stream. An error ends the watch.
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
        // What is older than what was given must not be given again: the stream began before it.
        let new = kvs.filter(|kv| text::revision(kv.mod_revision()) >= self.next);
        let mut last = None;
        let mut events: Vec<Event> = Vec::with_capacity(response.events().len());
        for kv in new {
            last = last.max(Some(text::revision(kv.mod_revision())));
            events.extend(text::event(kv));
        }
        // One revision never comes in two responses: that would have to be asked for (`fragment`).
        if let Some(revision) = last {
            self.next = revision.next();
        }
        // Also when nothing is new: whoever watches knows then that nothing is missing.
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

/// Where a watch begins whose first change is to be of `next`. To etcd 0 means from now on.
fn one_before(next: Revision) -> Revision {
    Revision(next.0.saturating_sub(1).max(1))
}

/// Begins a watch at whichever member answers, and waits until it has begun.
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
    /// The next response, where everything up to `given` was given. May be dropped at any moment without losing any.
    async fn next(&mut self, quiets: u32, given: Revision) -> Result<WatchResponse, Ended> {
        let (mut asked, mut hurried, mut quiet) = (None, false, 0);
        let mut until = clock::monotonic() + QUIET;
        loop {
            // One that has just begun, or a member that was too late before, has the time that it needs.
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
                    // Changes may have been on their way before it was asked.
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
            // Room for a hundred requests: it never waits.
            let requested = self.requests.request_progress().await;
            requested.map_err(|error| Ended::Said(error.to_string()))?;
        }
    }
}
