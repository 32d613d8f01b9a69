//! How full this broker's disk is, and when the others are told.
//!
//! They are told in the registration, where placement looks anyway, and only when a threshold is crossed: in steady state nothing is
//! written. Two thresholds, so that a disk at the edge does not write at each look.

use std::{sync::Arc, time::Duration};

use super::Broker;
use crate::{
    cluster::Session,
    log::{Log, Space},
    task,
};

/// How often the disk is looked at.
const EVERY: Duration = Duration::from_secs(5);

/// How far below the threshold a full disk must fall, in percent of the disk, to count as one with room again.
const BACK_PERCENT: u64 = 5;

/// Whether a disk counts as full that was, or was not, until now. One of which nothing is known has room.
fn counts_as_full(was: bool, space: Space, percent: u64) -> bool {
    let Space { free_bytes, total_bytes } = space;
    let used = u128::from(total_bytes.saturating_sub(free_bytes)) * 100;
    let limit = if was { percent.saturating_sub(BACK_PERCENT) } else { percent };
    used > u128::from(total_bytes) * u128::from(limit)
}

/// Whether the disk of this log counts as full at a start. Blocks on the file system.
pub fn starts_full(log: &Log, percent: u64) -> bool {
    log.space().is_ok_and(|space| counts_as_full(false, space, percent))
}

/// Looks at the disk and tells the others what has changed, until the broker stops.
pub(super) async fn run(broker: Arc<Broker>, session: Session) {
    let percent = broker.settings.disk_full_percent;
    let (mut full, mut told) = (session.says_full(), true);
    loop {
        broker.metrics.disk_full.set(u64::from(full));
        tokio::select! {
            biased;
            () = broker.tasks.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        let log = broker.log.clone();
        let now = match task::blocking(move || log.space()).await {
            Ok(space) => counts_as_full(full, space, percent),
            Err(error) => {
                tracing::debug!(%error, "the file system does not say how full it is");
                full
            }
        };
        if std::mem::replace(&mut full, now) != now {
            told = false;
            match now {
                true => tracing::warn!(
                    percent,
                    "the disk is fuller than broker.disk_full_percent: this broker is given no new replicas until there is room"
                ),
                false => tracing::info!("the disk has room again: this broker may be given new replicas"),
            }
        }
        if !told {
            match session.disk_full(full).await {
                Ok(()) => told = true,
                Err(error) => {
                    tracing::debug!(%error, "the others could not be told how full the disk is; trying again")
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_full_above_the_threshold_and_has_room_again_well_below_it() {
        let room = |used: u64| Space { free_bytes: 1000 - used, total_bytes: 1000 };
        let looks = [(850, false), (851, true), (850, true), (801, true), (800, false), (850, false), (1000, true)];
        let mut full = false;
        for (used, expected) in looks {
            full = counts_as_full(full, room(used), 85);
            assert_eq!(full, expected, "{used} of 1000 bytes");
        }
        assert!(!counts_as_full(false, room(1000), 100), "100 is never");
        assert!(!counts_as_full(false, Space { free_bytes: 0, total_bytes: 0 }, 85), "nothing is known");
        let huge = Space { free_bytes: 1, total_bytes: u64::MAX };
        assert!(counts_as_full(false, huge, 99), "no product overflows");
    }
}
