//! Disk usage of this broker, and its publication to peers. A standalone broker has no peers, and only shows the state.
//!
//! # Overview
//!
//! Two states are published. Under disk pressure, above a threshold, the broker gets no new replicas. With a full disk, after a record did
//! not fit, in-sync brokers with space take over its leaderships, because its partitions cannot be written.
//!
//! Both states are in the registration, which placement and elections read anyway. The registration is written only when a state changes. A
//! state ends well below its start, so that a disk at the threshold does not cause a write at each check.

use std::{sync::Arc, time::Duration};

use super::Broker;
use crate::{
    cluster::Session,
    limits,
    log::{Log, Space},
    task,
};

/// Interval between checks of the disk-full state.
const EVERY: Duration = Duration::from_millis(500);

/// Number of these checks per check of the disk itself.
const DISK_EVERY: u32 = 10;

/// Distance below the threshold at which disk pressure ends, in percent of the disk.
const BACK_PERCENT: u64 = 5;

/// Returns true if the disk is under pressure, given its previous state. A disk of unknown size is not under pressure.
fn counts_as_full(was: bool, space: Space, percent: u64) -> bool {
    let Space { free_bytes, total_bytes } = space;
    let used = u128::from(total_bytes.saturating_sub(free_bytes)) * 100;
    let limit = if was { percent.saturating_sub(BACK_PERCENT) } else { percent };
    used > u128::from(total_bytes) * u128::from(limit)
}

/// Free bytes with which any batch fits. An earlier refusal no longer counts then, also if no record has arrived since.
const ROOM_BYTES: u64 = limits::MIN_FREE_DISK_BYTES + limits::MAX_BATCH_BYTES as u64;

/// Returns true if records do not fit: after a refusal, until a record was written or any record would fit.
const fn does_not_fit(refused: bool, space: Space) -> bool {
    refused && space.free_bytes < ROOM_BYTES
}

/// Returns true if other brokers are to lead this broker's partitions: after a record did not fit, until there is space for replicas again.
fn is_without_room(was: bool, refused: bool, space: Space, percent: u64) -> bool {
    does_not_fit(refused, space) || (was && counts_as_full(false, space, percent.min(100 - BACK_PERCENT)))
}

/// Returns true if the disk of this log is under pressure at a start. Blocks on the file system.
pub fn starts_full(log: &Log, percent: u64) -> bool {
    log.space().is_ok_and(|space| counts_as_full(false, space, percent))
}

/// Checks the disk and publishes changed states, until the broker stops.
pub(super) async fn run(broker: Arc<Broker>, session: Session) {
    let percent = broker.settings.disk_full_percent;
    let (mut full, mut without_room, mut told) = (session.says_full(), false, true);
    for look in 1u32.. {
        broker.metrics.disk_full.set(u64::from(full || broker.health.is_full()));
        tokio::select! {
            biased;
            () = broker.tasks.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        let refused = broker.log.is_full();
        let looks = look.is_multiple_of(DISK_EVERY) || refused != without_room;
        if looks && let Some(space) = space(&broker).await {
            let now = counts_as_full(full, space, percent);
            if std::mem::replace(&mut full, now) != now && !broker.alone {
                told = false;
                report_full(now, percent);
            }
            broker.health.set_full(does_not_fit(refused, space));
            let now = is_without_room(without_room && !broker.alone, refused, space, percent);
            if std::mem::replace(&mut without_room, now) != now && !broker.alone {
                told = false;
                report_room(now);
            }
        }
        if !told && !broker.alone {
            match session.disk_full(full).await.and(session.no_room(without_room).await) {
                Ok(()) => told = true,
                Err(error) => {
                    tracing::debug!(%error, "the others could not be told how full the disk is; trying again")
                }
            }
        }
    }
}

async fn space(broker: &Broker) -> Option<Space> {
    let log = broker.log.clone();
    let space = task::run_blocking(move || log.space()).await;
    space.inspect_err(|error| tracing::debug!(%error, "the file system does not say how full it is")).ok()
}

fn report_full(full: bool, percent: u64) {
    match full {
        true => tracing::warn!(
            percent,
            "the disk is fuller than broker.disk_full_percent: this broker is given no new replicas until there is room"
        ),
        false => tracing::info!("the disk has room again: this broker may be given new replicas"),
    }
}

fn report_room(none: bool) {
    match none {
        true => tracing::error!(
            "records do not fit on the disk: other brokers lead what they can until there is room; add space, or lower \
             local.retention.* or retention.*"
        ),
        false => tracing::info!("records fit on the disk again: this broker may lead"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_pressure_ends_well_below_threshold() {
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

    #[test]
    fn disk_full_lasts_until_there_is_space_for_replicas() {
        let room = |used: u64| Space { free_bytes: 1000 - used, total_bytes: 1000 };
        assert!(!is_without_room(false, false, room(999), 85), "everything fitted so far");
        assert!(is_without_room(false, true, room(999), 85));
        assert!(is_without_room(true, false, room(851), 85), "one that fitted says little");
        assert!(!is_without_room(true, false, room(850), 85));
        assert!(!is_without_room(true, false, room(950), 100), "where full disks are given replicas too");
        let space = Space { free_bytes: ROOM_BYTES, total_bytes: 4 * ROOM_BYTES };
        assert!(!is_without_room(false, true, space, 85), "no record has come since there is room for any");
        assert!(is_without_room(false, true, Space { free_bytes: ROOM_BYTES - 1, ..space }, 85));
    }
}
