//! Lease monitor: detects that the registration of this broker was deleted, or that its lease has expired by this
//! process's clock. Other brokers may then lead its partitions. No invariant relies on the result. The broker continues
//! to serve. Readers are notified, and can look for a new leader. Operations that need the metadata store are rejected
//! before they start, so that clients can use another broker.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use crate::{
    broker::{
        health::{Health, registration_loss_reason},
        node_context::NodeContext,
    },
    cluster::Session,
    proto::error::{ApiError, ErrorCode},
};

/// Interval between checks whether this broker is registered again, while the lease has expired.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// Monitor of this broker's lease.
pub(in crate::broker) struct LeaseMonitor {
    ctx: NodeContext,
    session: Session,
    health: Arc<Health>,
    /// True while the lease has expired: other brokers may lead the partitions that this broker leads.
    expired: watch::Sender<bool>,
}

impl LeaseMonitor {
    pub(super) fn new(ctx: NodeContext, session: Session, health: Arc<Health>) -> Self {
        Self { ctx, session, health, expired: watch::Sender::new(false) }
    }

    /// Publishes each expiry of the lease, and each new registration, to `expired` and to `health`. Never returns.
    pub(super) async fn run(&self) {
        let mut status = self.session.state();
        loop {
            let remaining = self.session.lease_remaining();
            let expired = remaining.is_zero();
            self.health.set_unregistered(expired);
            let changed = self.expired.send_if_modified(|before| std::mem::replace(before, expired) != expired);
            match (changed, expired) {
                (true, true) => tracing::warn!(
                    reason = %registration_loss_reason(self.ctx.metadata.unresponsive_for()),
                    "this broker is not registered in the cluster any longer, so other brokers may lead its \
                     partitions: it continues to serve requests, and registers again by itself"
                ),
                (true, false) => tracing::info!("this broker is registered in the cluster again"),
                (false, _) => {}
            }
            let pause = if expired { CHECK_INTERVAL } else { remaining };
            tokio::select! {
                biased;
                Ok(()) = status.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Returns true if the lease has expired.
    pub(in crate::broker) fn is_expired(&self) -> bool {
        *self.expired.borrow()
    }

    /// Returns a receiver that holds true while the lease has expired.
    pub(in crate::broker) fn subscribe(&self) -> watch::Receiver<bool> {
        self.expired.subscribe()
    }

    /// Returns the time for which the metadata store has not responded, if the lease has expired; zero otherwise. While
    /// the lease is renewed, the store responds, even if the metadata cache has received no change for a long time.
    pub(in crate::broker) fn metadata_staleness(&self) -> Duration {
        if self.session.lease_remaining().is_zero() { self.ctx.metadata.unresponsive_for() } else { Duration::ZERO }
    }

    /// Fails if an operation that needs the metadata store must not start. The error is `METADATA_REGRESSED` if the
    /// store has returned to an older state, and `METADATA_UNAVAILABLE` if the lease has expired.
    pub(in crate::broker) fn check_metadata_available(&self) -> Result<(), ApiError> {
        if let Some(regression) = self.ctx.store.regression() {
            let error = ApiError::new(ErrorCode::MetadataRegressed, regression.to_string());
            return Err(error.with("not_started", true).with("broker", self.ctx.id));
        }
        if !self.is_expired() {
            return Ok(());
        }
        let reason = match self.metadata_staleness() {
            Duration::ZERO => "its registration was deleted".to_owned(),
            staleness => format!("the store has not responded to it for {} s", staleness.as_secs()),
        };
        let message = format!(
            "broker {} starts no operation that needs the metadata store, because {reason}; this operation was not \
             started: retry later, or on another broker",
            self.ctx.id
        );
        Err(ApiError::new(ErrorCode::MetadataUnavailable, message).with("not_started", true))
    }
}
