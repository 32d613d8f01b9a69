//! The fetch stream: a session whose partitions the client may change, and whose responses are sent as records arrive.

use std::sync::Arc;

use futures::TryStreamExt as _;
use tokio::{sync::watch, time::Instant};
use tonic::Status;

use super::{
    super::{errors, service::Requests},
    Fetch, FetchLimits, FetchResponseBuilder, FetchSession,
};
use crate::{
    broker::CallMemory,
    proto::{error::ApiError, v1},
    task::clock,
};

/// One fetch stream.
pub(super) struct FetchStreamState {
    session: FetchSession,
    requests: Requests<v1::FetchRequest>,
    /// True while the lease has expired. Each change causes a response, because records may never arrive.
    lease_expiry: watch::Receiver<bool>,
    /// True once the client has named its partitions.
    has_assignment: bool,
    /// True once the client sends no more requests. The client still receives records of its last assignment.
    requests_ended: bool,
}

impl FetchStreamState {
    pub(super) fn new(fetch: Arc<Fetch>, requests: Requests<v1::FetchRequest>, memory: CallMemory) -> Self {
        let lease_expiry = fetch.lease_expiry();
        let session = FetchSession::new(fetch, FetchLimits::new(0, 0, 0), memory);
        Self { session, requests, lease_expiry, has_assignment: false, requests_ended: false }
    }

    /// Returns the next response, once it has `min_bytes`, an error, or records for `max_wait_ms`; `None` ends the
    /// stream.
    pub(super) async fn next(&mut self) -> Option<Result<v1::FetchResponse, Status>> {
        let mut builder = FetchResponseBuilder::default();
        let mut deadline: Option<Instant> = None;
        loop {
            if self.session.needs_memory() {
                // The next response waits until enough of the previous responses has been sent.
                let fetch = Arc::clone(&self.session.fetch);
                tokio::select! {
                    biased;
                    () = fetch.stop.cancelled() => return None,
                    () = self.session.reserve(false) => {}
                }
            }
            self.session.gather_now(&mut builder);
            if builder.is_enough(self.session.min_bytes()) {
                break;
            }
            if builder.bytes > 0 && deadline.is_none() {
                deadline = Some(clock::monotonic() + self.session.limits.max_wait);
            }
            let delay = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            let fetch = Arc::clone(&self.session.fetch);
            let session = &mut self.session;
            tokio::select! {
                biased;
                () = fetch.stop.cancelled() => return None,
                request = self.requests.try_next(), if !self.requests_ended => match request {
                    Ok(Some(request)) => {
                        // Records of the old assignment are sent first, because the positions are past them.
                        let topics = request.partitions.iter();
                        let topics = topics.map(|requested| (requested.topic.as_str(), requested.topic_id.as_str()));
                        fetch.lookup.wait_for_topics(topics).await;
                        if let Err(error) = self.apply_request(request) {
                            return Some(Err(error.into()));
                        }
                        if builder.bytes > 0 {
                            break;
                        }
                    }
                    Ok(None) if !self.has_assignment => return None,
                    Ok(None) => self.requests_ended = true,
                    Err(status) => return Some(Err(errors::request_stream_error(status))),
                },
                Ok(()) = self.lease_expiry.changed(), if self.has_assignment => break,
                () = session.wait_for_data(&mut builder), if self.has_assignment => {}
                () = delay => break,
            }
        }
        self.session.on_response_built(builder.bytes, builder.partitions.len());
        self.session.fetch.ctx.metrics.fetch_requests.inc();
        let lease_expired = *self.lease_expiry.borrow_and_update();
        Some(Ok(v1::FetchResponse { partitions: builder.partitions, lease_expired }))
    }

    /// Replaces the partitions of the session by those of a request. The limits are those of the first request.
    fn apply_request(&mut self, request: v1::FetchRequest) -> Result<(), ApiError> {
        // The request stays charged until the session has its own memory.
        let _request_memory = self.session.memory.take_request();
        if !self.has_assignment {
            self.session.limits = FetchLimits::new(request.min_bytes, request.max_bytes, request.max_wait_ms);
            self.has_assignment = true;
        }
        self.session.assign(request.partitions, request.restart, request.any_replica)
    }
}
