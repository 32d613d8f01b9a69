//! Lease monitor: detects that this broker may have been replaced without notice, because its registration is gone or was not renewed in
//! time.
//!
//! The result depends on this process's clock, so no invariant relies on it. The broker continues to serve. Readers are notified, and can
//! look for a new leader. Operations that need the metadata store are rejected before their start, so that clients can use another broker.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::Broker;
use crate::{
    cluster::Session,
    proto::error::{ApiError, ErrorCode},
};

/// Interval between checks while the lease has expired.
const AGAIN: Duration = Duration::from_millis(250);

/// Monitors the lease until the broker stops.
pub(super) async fn run(broker: Arc<Broker>, session: Session) {
    let mut standing = session.standing();
    loop {
        let left = session.lease_left();
        let doubts = left.is_zero();
        broker.health.set_unregistered(doubts);
        let changed = broker.doubt.send_if_modified(|known| std::mem::replace(known, doubts) != doubts);
        match (changed, doubts) {
            (true, true) => tracing::warn!(
                "this broker's registration is gone, or was not renewed for as long as it lives: others may lead by now what it leads, \
                 and its readers are told so"
            ),
            (true, false) => tracing::info!("this broker's registration lives again, and its readers are told so"),
            (false, _) => {}
        }
        let pause = if doubts { AGAIN } else { left };
        tokio::select! {
            biased;
            () = broker.tasks.cancelled() => return,
            Ok(()) = standing.changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

impl Broker {
    /// Returns true if the lease has expired.
    pub(super) fn is_in_doubt(&self) -> bool {
        *self.doubt.borrow()
    }

    /// Returns a receiver of lease expiry and its end. A lease that has already expired counts as a change.
    pub(super) fn doubts(&self) -> watch::Receiver<bool> {
        let mut doubts = self.doubt.subscribe();
        if *doubts.borrow() {
            doubts.mark_changed();
        }
        doubts
    }

    /// Returns the reason for the lease expiry.
    pub(super) fn why_unregistered(&self) -> String {
        match self.metadata_silence() {
            Duration::ZERO => "the metadata store does not hold it".to_owned(),
            silence => format!("the metadata store has not answered for {} s", silence.as_secs()),
        }
    }

    /// Rejects an operation that needs the metadata store while the store is unavailable, or has returned to an older state.
    pub(super) fn reaches_metadata(&self) -> Result<(), ApiError> {
        if let Some(regression) = self.store.regression() {
            let fault = ApiError::new(ErrorCode::MetadataRegressed, regression.to_string());
            return Err(fault.with("not_begun", true).with("broker", self.settings.id));
        }
        if !self.is_in_doubt() {
            return Ok(());
        }
        let why = match self.metadata_silence() {
            Duration::ZERO => "its registration there is gone".to_owned(),
            silence => format!("that has not answered it for {} s", silence.as_secs()),
        };
        let message = format!(
            "broker {} begins nothing that needs the metadata store: {why}. Nothing was begun; try again later, or through a broker that the \
             store answers",
            self.settings.id
        );
        Err(ApiError::new(ErrorCode::MetadataUnavailable, message).with("not_begun", true))
    }
}
