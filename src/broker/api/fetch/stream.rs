//! The fetch stream. Its client may replace the partitions of the session at any time, and responses are sent as
//! records arrive.

use std::sync::Arc;

use futures::{Stream, TryStreamExt as _};
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

impl Fetch {
    /// Serves a fetch stream. The returned stream reads `requests` itself.
    pub(in crate::broker::api) fn fetch(
        self: &Arc<Self>,
        requests: Requests<v1::FetchRequest>,
        memory: CallMemory,
    ) -> impl Stream<Item = Result<v1::FetchResponse, Status>> + Send + use<> {
        let state = FetchStreamState::new(Arc::clone(self), requests, memory);
        futures::stream::unfold(state, |mut state| async move { Some((state.next().await?, state)) })
    }
}

/// One fetch stream.
pub(super) struct FetchStreamState {
    session: FetchSession,
    requests: Requests<v1::FetchRequest>,
    /// True while the lease has expired. Each change is reported at once in a response, because a response with records
    /// may never follow.
    lease_expiry: watch::Receiver<bool>,
    /// True once the first request has set the partitions.
    has_assignment: bool,
    /// True once the client sends no more requests. The client still receives records of the partitions in its last
    /// request.
    requests_ended: bool,
}

impl FetchStreamState {
    pub(super) fn new(fetch: Arc<Fetch>, requests: Requests<v1::FetchRequest>, memory: CallMemory) -> Self {
        let lease_expiry = fetch.lease_expiry();
        let session = FetchSession::new(fetch, FetchLimits::new(0, 0, 0), memory);
        Self { session, requests, lease_expiry, has_assignment: false, requests_ended: false }
    }

    /// Returns the next response in these cases:
    /// - The response has `min_bytes` or an error, or is full.
    /// - `max_wait_ms` have passed since its first records.
    /// - The lease expires or is renewed.
    ///
    /// A response with records is also returned when the client replaces the partitions. `None` ends the stream: the
    /// broker stops, or the client sent no request.
    pub(super) async fn next(&mut self) -> Option<Result<v1::FetchResponse, Status>> {
        let mut builder = FetchResponseBuilder::default();
        let mut deadline: Option<Instant> = None;
        loop {
            if self.session.needs_memory() {
                // This wait ends when enough earlier responses have been sent to free their memory.
                let fetch = Arc::clone(&self.session.fetch);
                fetch.stop.run_until_cancelled(self.session.reserve(false)).await?;
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
                        // Gathered records of the previous request's partitions are sent at once, because the positions
                        // of the session are past them.
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

    /// Replaces the partitions of the session by the partitions of a request. Only the first request sets the limits of
    /// the session.
    fn apply_request(&mut self, request: v1::FetchRequest) -> Result<(), ApiError> {
        // The memory of the request is freed at the return, after the session has taken memory for its partitions.
        let _request_memory = self.session.memory.take_request();
        if !self.has_assignment {
            self.session.limits = FetchLimits::new(request.min_bytes, request.max_bytes, request.max_wait_ms);
            self.has_assignment = true;
        }
        self.session.assign(request.partitions, request.restart, request.any_replica)
    }
}
