//! How many connections each listener takes: a broker without open files left can neither write its log nor answer anybody, so
//! connections may not take the last ones.

use rustix::process::{Resource, getrlimit};

use super::places::{LOOPBACK_PLACES, PROBE_PLACES};
use crate::log::{Disk as _, RealDisk};

/// Open files that are left for all that is neither a connection nor a segment, at least: the journal, other brokers, etcd, the bucket.
const MIN_OTHER_FILES: u64 = 64;

/// Places of each listener beyond the common ones.
const RESERVE: u64 = (LOOPBACK_PLACES + PROBE_PLACES) as u64;

/// Bounds of the HTTP listener's places, and the least of the gRPC listener's.
const MIN_HTTP: usize = 8;
const MAX_HTTP: usize = 256;
const MIN_GRPC: usize = 32;

/// Most places that a listener counts: more than any system has open files.
const MAX_PLACES: u64 = 1 << 30;

/// The common places of one listener, and what raises their number. A smaller bound replaces both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capacity {
    pub(super) places: usize,
    /// The setting that a refusal names.
    pub(super) raised_by: &'static str,
}

/// How many connections each listener takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) grpc: Capacity,
    pub(super) http: Capacity,
}

impl Room {
    /// The room of one of so many brokers in this process.
    pub(super) fn of(brokers: usize) -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        Self::with(files, RealDisk::default().open_files() as u64, brokers)
    }

    /// What the limit of open files leaves beside the segments of each broker and the reserves of its two listeners.
    fn with(files: u64, segments: u64, brokers: usize) -> Self {
        let brokers = brokers.max(1) as u64;
        let taken = (segments + 2 * RESERVE) * brokers + MIN_OTHER_FILES.max(files / 8);
        let each = usize::try_from((files.saturating_sub(taken) / brokers).min(MAX_PLACES)).unwrap_or(usize::MAX);
        let http = (each / 8).clamp(MIN_HTTP, MAX_HTTP);
        let bound = |places| Capacity { places, raised_by: "the limit of open files (ulimit -n, LimitNOFILE)" };
        Self { grpc: bound(each.saturating_sub(http).max(MIN_GRPC)), http: bound(http) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_log_and_others_need_is_left() {
        for (files, segments, brokers) in
            [(256, 128, 1), (1024, 512, 1), (1024, 512, 3), (1 << 20, 8192, 1), (64, 64, 1)]
        {
            let Room { grpc, http } = Room::with(files, segments, brokers);
            let (grpc, http) = (grpc.places, http.places);
            assert!(grpc >= MIN_GRPC && http >= MIN_HTTP, "{files}: somebody is always served");
            let brokers = brokers as u64;
            let own = (segments + 2 * RESERVE) * brokers + MIN_OTHER_FILES;
            let taken = (grpc + http) as u64 * brokers + own;
            let least = own + (MIN_GRPC + MIN_HTTP) as u64 * brokers;
            assert!(taken <= files.max(least), "{files} files for {brokers}: {grpc} and {http}");
        }
        let Room { grpc, http } = Room::with(1024, 512, 1);
        assert_eq!((grpc.places, http.places), (315, 45));
        let Room { grpc, http } = Room::with(256, 128, 1);
        assert_eq!((grpc.places, http.places), (32, 8));
    }
}
