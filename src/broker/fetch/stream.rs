//! The fetch stream: a session whose partitions the client may change, and whose responses are sent as records arrive.

use std::sync::Arc;

use futures::TryStreamExt as _;
use tokio::{sync::watch, time::Instant};
use tonic::Status;

use super::{Gathered, Session, Terms};
use crate::{
    broker::{Broker, CallMemory, Requests, faults},
    proto::{error::ApiError, v1},
    task::clock,
};

/// One fetch stream.
pub(super) struct Follow {
    session: Session,
    requests: Requests<v1::FetchRequest>,
    /// True while the lease has expired. Each change causes a response, because records may never arrive.
    doubts: watch::Receiver<bool>,
    begun: bool,
    /// True once the client sends no more requests. The client still receives records of its last assignment.
    ended: bool,
}

impl Follow {
    pub(super) fn new(broker: Arc<Broker>, requests: Requests<v1::FetchRequest>, memory: CallMemory) -> Self {
        let doubts = broker.doubts();
        let session = Session::new(broker, Terms::new(0, 0, 0), memory);
        Self { session, requests, doubts, begun: false, ended: false }
    }

    pub(super) async fn next(&mut self) -> Option<Result<v1::FetchResponse, Status>> {
        let mut gathered = Gathered::default();
        let mut deadline: Option<Instant> = None;
        loop {
            if self.session.needs_memory() {
                // The next response waits until enough of the previous responses has been sent.
                let broker = Arc::clone(&self.session.broker);
                tokio::select! {
                    biased;
                    () = broker.stopping() => return None,
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
            let hold = async {
                match deadline {
                    Some(moment) => tokio::time::sleep_until(moment).await,
                    None => std::future::pending().await,
                }
            };
            let broker = Arc::clone(&self.session.broker);
            let session = &mut self.session;
            tokio::select! {
                biased;
                () = broker.stopping() => return None,
                request = self.requests.try_next(), if !self.ended => match request {
                    Ok(Some(request)) => {
                        // Records of the old assignment are sent first, because the positions are past them.
                        let wanted = request.partitions.iter().map(|want| (want.topic.as_str(), want.topic_id.as_str()));
                        broker.acquaint(wanted).await;
                        if let Err(fault) = self.take(request) {
                            return Some(Err(fault.into()));
                        }
                        if gathered.bytes > 0 {
                            break;
                        }
                    }
                    Ok(None) if !self.begun => return None,
                    Ok(None) => self.ended = true,
                    Err(status) => return Some(Err(faults::unreadable(status))),
                },
                Ok(()) = self.doubts.changed(), if self.begun => break,
                () = session.wait(&mut gathered), if self.begun => {}
                () = hold => break,
            }
        }
        self.session.on_made(gathered.bytes, gathered.partitions.len());
        self.session.broker.metrics.fetch_requests.inc();
        let in_doubt = *self.doubts.borrow_and_update();
        Some(Ok(v1::FetchResponse { partitions: gathered.partitions, in_doubt }))
    }

    fn take(&mut self, request: v1::FetchRequest) -> Result<(), ApiError> {
        let _request = self.session.memory.take_request();
        if !self.begun {
            self.session.terms = Terms::new(request.min_bytes, request.max_bytes, request.max_wait_ms);
            self.begun = true;
        }
        self.session.assign(request.partitions, request.restart, request.any_replica)
    }
}
