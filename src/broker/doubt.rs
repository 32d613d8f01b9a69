//! Whether this broker may have been replaced without having heard of it: its registration is gone, or the metadata store has not renewed
//! it for as long as it lives.
//!
//! By this process's clock, and a hint for clients: nothing that must be right depends on it. The broker goes on with what it has. Readers are
//! told, so that one who waits here for records that another broker takes by now can ask who leads; and what needs the store is
//! refused before anything of it is begun, so that a client can have another broker do it.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::Broker;
use crate::{
    cluster::Session,
    proto::fault::{Fault, Reason},
};

/// How often it is looked whether the doubt is over.
const AGAIN: Duration = Duration::from_millis(250);

/// Looks whether the registration is kept alive, until the broker stops.
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
    /// Whether there is doubt now.
    pub(super) fn is_in_doubt(&self) -> bool {
        *self.doubt.borrow()
    }

    /// Its beginnings and ends. A doubt that there is already counts as one that has just begun.
    pub(super) fn doubts(&self) -> watch::Receiver<bool> {
        let mut doubts = self.doubt.subscribe();
        if *doubts.borrow() {
            doubts.mark_changed();
        }
        doubts
    }

    /// Why there is doubt.
    pub(super) fn why_unregistered(&self) -> String {
        match self.metadata_silence() {
            Duration::ZERO => "the metadata store does not hold it".to_owned(),
            silence => format!("the metadata store has not answered for {} s", silence.as_secs()),
        }
    }

    /// Refuses what needs the metadata store while that is out of reach, or has gone back.
    pub(super) fn reaches_metadata(&self) -> Result<(), Fault> {
        if let Some(regression) = self.store.regression() {
            let fault = Fault::new(Reason::MetadataRegressed, regression.to_string());
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
        Err(Fault::new(Reason::MetadataUnavailable, message).with("not_begun", true))
    }
}
