//! Lease monitor: detects that this broker may have been replaced without notice, because its registration is gone or
//! was not renewed in time.
//!
//! The result depends on this process's clock, so no invariant relies on it. The broker continues to serve. Readers are
//! notified, and can look for a new leader. Operations that need the metadata store are rejected before their start, so
//! that clients can use another broker.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::Broker;
use crate::{
    cluster::Session,
    proto::error::{ApiError, ErrorCode},
};

/// Interval between checks while the lease has expired.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// Monitors the lease until the broker stops.
pub(super) async fn run(broker: Arc<Broker>, session: Session) {
    let mut status = session.state();
    loop {
        let left = session.lease_remaining();
        let expired = left.is_zero();
        broker.health.set_unregistered(expired);
        let changed = broker.doubt.send_if_modified(|before| std::mem::replace(before, expired) != expired);
        match (changed, expired) {
            (true, true) => tracing::warn!(
                "the registration of this broker was deleted or its lease expired: other brokers may lead its \
                 partitions, and its readers are notified"
            ),
            (true, false) => tracing::info!("this broker is registered again: its readers are notified"),
            (false, _) => {}
        }
        let pause = if expired { CHECK_INTERVAL } else { left };
        tokio::select! {
            biased;
            () = broker.ctx.tasks.cancelled() => return,
            Ok(()) = status.changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

impl Broker {
    /// Returns true if the lease has expired.
    pub(super) fn is_lease_expired(&self) -> bool {
        *self.doubt.borrow()
    }

    /// Returns a receiver of lease expiry and its end. A lease that has already expired counts as a change.
    pub(super) fn lease_expiry(&self) -> watch::Receiver<bool> {
        let mut expiry = self.doubt.subscribe();
        if *expiry.borrow() {
            expiry.mark_changed();
        }
        expiry
    }

    /// Returns the reason for the lease expiry.
    pub(super) fn lease_expiry_reason(&self) -> String {
        match self.metadata_staleness() {
            Duration::ZERO => "the registration was deleted from the metadata store".to_owned(),
            silence => format!("the metadata store has not responded for {} s", silence.as_secs()),
        }
    }

    /// Rejects an operation that needs the metadata store while the store is unavailable, or has returned to an older
    /// state.
    pub(super) fn check_metadata_available(&self) -> Result<(), ApiError> {
        if let Some(regression) = self.ctx.store.regression() {
            let error = ApiError::new(ErrorCode::MetadataRegressed, regression.to_string());
            return Err(error.with("not_started", true).with("broker", self.ctx.id));
        }
        if !self.is_lease_expired() {
            return Ok(());
        }
        let reason = match self.metadata_staleness() {
            Duration::ZERO => "its registration was deleted".to_owned(),
            silence => format!("the store has not responded to it for {} s", silence.as_secs()),
        };
        let message = format!(
            "broker {} starts no operation that needs the metadata store, because {reason}; this operation was not \
             started: retry later, or on another broker",
            self.ctx.id
        );
        Err(ApiError::new(ErrorCode::MetadataUnavailable, message).with("not_started", true))
    }
}
