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
    has_assignment: bool,
    /// True once the client sends no more requests. The client still receives records of its last assignment.
    ended: bool,
}

impl FetchStreamState {
    pub(super) fn new(fetch: Arc<Fetch>, requests: Requests<v1::FetchRequest>, memory: CallMemory) -> Self {
        let lease_expiry = fetch.lease_expiry();
        let session = FetchSession::new(fetch, FetchLimits::new(0, 0, 0), memory);
        Self { session, requests, lease_expiry, has_assignment: false, ended: false }
    }

    pub(super) async fn next(&mut self) -> Option<Result<v1::FetchResponse, Status>> {
        let mut gathered = FetchResponseBuilder::default();
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
            self.session.gather_now(&mut gathered);
            let terms = self.session.terms;
            if gathered.is_enough(self.session.min_bytes()) {
                break;
            }
            if gathered.bytes > 0 && deadline.is_none() {
                deadline = Some(clock::monotonic() + terms.max_wait);
            }
            let delay = async {
                match deadline {
                    Some(moment) => tokio::time::sleep_until(moment).await,
                    None => std::future::pending().await,
                }
            };
            let fetch = Arc::clone(&self.session.fetch);
            let session = &mut self.session;
            tokio::select! {
                biased;
                () = fetch.stop.cancelled() => return None,
                request = self.requests.try_next(), if !self.ended => match request {
                    Ok(Some(request)) => {
                        // Records of the old assignment are sent first, because the positions are past them.
                        let wanted = request.partitions.iter().map(|want| (want.topic.as_str(), want.topic_id.as_str()));
                        fetch.lookup.wait_for_topics(wanted).await;
                        if let Err(error) = self.take(request) {
                            return Some(Err(error.into()));
                        }
                        if gathered.bytes > 0 {
                            break;
                        }
                    }
                    Ok(None) if !self.has_assignment => return None,
                    Ok(None) => self.ended = true,
                    Err(status) => return Some(Err(errors::unreadable(status))),
                },
                Ok(()) = self.lease_expiry.changed(), if self.has_assignment => break,
                () = session.wait_for_data(&mut gathered), if self.has_assignment => {}
                () = delay => break,
            }
        }
        self.session.on_made(gathered.bytes, gathered.partitions.len());
        self.session.fetch.ctx.metrics.fetch_requests.inc();
        let lease_expired = *self.lease_expiry.borrow_and_update();
        Some(Ok(v1::FetchResponse { partitions: gathered.partitions, lease_expired }))
    }

    fn take(&mut self, request: v1::FetchRequest) -> Result<(), ApiError> {
        let _request = self.session.memory.take_request();
        if !self.has_assignment {
            self.session.terms = FetchLimits::new(request.min_bytes, request.max_bytes, request.max_wait_ms);
            self.has_assignment = true;
        }
        self.session.assign(request.partitions, request.restart, request.any_replica)
    }
}
