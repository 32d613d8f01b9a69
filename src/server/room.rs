//! How many connections each listener takes: a broker without open files left can neither write its log nor answer anybody, so
//! connections may not take the last ones. Each connection takes memory too, also while it sends nothing.

use rustix::process::{Resource, getrlimit};

use super::places::{LOOPBACK_PLACES, PROBE_PLACES};
use crate::{
    limits,
    log::{Disk as _, RealDisk},
};

/// Open files that are left for all that is neither a connection nor a segment, at least: the journal, other brokers, etcd, the bucket.
const MIN_OTHER_FILES: u64 = 64;

/// Places of each listener beyond the common ones.
const RESERVE: u64 = (LOOPBACK_PLACES + PROBE_PLACES) as u64;

/// Most places of the HTTP listener and of the peer listener.
const MAX_HTTP: usize = 256;
const MAX_PEER: usize = 1024;

/// Fewest places of each listener.
#[derive(Clone, Copy, Debug)]
struct Minimum {
    grpc: usize,
    http: usize,
    peer: usize,
}

const MIN_PLACES: Minimum = Minimum { grpc: 32, http: 8, peer: 32 };

/// The same for a broker of several below [`FEW_FILES`]: with the reserves of three listeners, these fit beside its log from 256 files on.
const MIN_PLACES_FEW_FILES: Minimum = Minimum { grpc: 16, http: 4, peer: 8 };
const FEW_FILES: u64 = 512;

/// Places of the peer listener for each broker of this process, at least. Another broker takes two connections, and one more for each probe.
const MIN_PEER_PER_BROKER: usize = 4;

/// Most places that a listener counts: more than any system has open files.
const MAX_PLACES: u64 = 1 << 30;

/// Bytes of `limits.memory_bytes` for each place of the gRPC listener: an idle connection takes 20 KiB, its window 80 KiB at least, and its
/// first calls take 7 KiB each.
const BYTES_PER_CONNECTION: u64 = 256 << 10;

/// The part of `limits.memory_bytes` for connections of other brokers, as a divisor, and bytes of it for each place: what one that nobody knows
/// yet sends without an end.
const PEER_SHARE: u64 = 8;
const BYTES_PER_PEER: u64 = limits::MAX_PEER_REQUEST_BYTES as u64 * limits::MAX_STREAMS_PER_PEER as u64 + (256 << 10);

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
    /// Of a broker of several.
    pub(super) peer: Option<Capacity>,
}

impl Room {
    /// The room of one of `brokers` in this process, each of which is alone or has others to connect to it, with `memory_bytes` for its
    /// clients.
    pub(super) fn of(brokers: usize, alone: bool, memory_bytes: u64) -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        let room = Self::with(files, RealDisk::default().open_files() as u64, brokers, alone);
        room.within(memory_bytes, min_peer(Minimum::of(files, alone), brokers))
    }

    /// As many connections as there is memory for, and `min_peer` of other brokers.
    fn within(self, memory_bytes: u64, min_peer: usize) -> Self {
        let bounded = |capacity: Capacity, places: u64| {
            let places = usize::try_from(places).unwrap_or(usize::MAX);
            if capacity.places <= places { capacity } else { Capacity { places, raised_by: "limits.memory_bytes" } }
        };
        let peers = (memory_bytes / PEER_SHARE / BYTES_PER_PEER).max(min_peer as u64);
        Self {
            grpc: bounded(self.grpc, memory_bytes / BYTES_PER_CONNECTION),
            peer: self.peer.map(|peer| bounded(peer, peers)),
            ..self
        }
    }

    /// What the limit of open files leaves beside the segments of each broker and the reserves of its listeners.
    fn with(files: u64, segments: u64, brokers: usize, alone: bool) -> Self {
        let (brokers, listeners) = (brokers.max(1) as u64, if alone { 2 } else { 3 });
        let taken = (segments + listeners * RESERVE) * brokers + MIN_OTHER_FILES.max(files / 8);
        let each = usize::try_from((files.saturating_sub(taken) / brokers).min(MAX_PLACES)).unwrap_or(usize::MAX);
        let min = Minimum::of(files, alone);
        let http = (each / 8).clamp(min.http, MAX_HTTP);
        let min_peer = min_peer(min, usize::try_from(brokers).unwrap_or(MAX_PEER));
        let peer = (!alone).then(|| (each / 8).min(MAX_PEER).max(min_peer));
        let grpc = each.saturating_sub(http + peer.unwrap_or(0)).max(min.grpc);
        let bound = |places| Capacity { places, raised_by: "the limit of open files (ulimit -n, LimitNOFILE)" };
        Self { grpc: bound(grpc), http: bound(http), peer: peer.map(bound) }
    }
}

/// Fewest places for other brokers, of `brokers` in this process.
fn min_peer(min: Minimum, brokers: usize) -> usize {
    min.peer.max(MIN_PEER_PER_BROKER * brokers)
}

impl Minimum {
    const fn of(files: u64, alone: bool) -> Self {
        if files < FEW_FILES && !alone { MIN_PLACES_FEW_FILES } else { MIN_PLACES }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_log_and_others_need_is_left() {
        for (files, segments, brokers, alone) in [
            (256, 128, 1, true),
            (256, 128, 1, false),
            (511, 255, 1, false),
            (512, 256, 1, false),
            (1024, 512, 1, true),
            (1024, 512, 1, false),
            (1024, 512, 3, false),
            (1 << 20, 8192, 1, true),
            (1 << 20, 8192, 32, false),
            (65_536, 8192, 32, false),
            (64, 64, 1, true),
            (64, 64, 1, false),
        ] {
            let Room { grpc, http, peer } = Room::with(files, segments, brokers, alone);
            let (grpc, http, peer) = (grpc.places, http.places, peer.map_or(0, |peer| peer.places));
            let min = Minimum::of(files, alone);
            assert!(grpc >= min.grpc && http >= min.http, "{files}: somebody is always served");
            let (min_peer, listeners) = if alone { (0, 2) } else { (min.peer.max(4 * brokers), 3) };
            assert_eq!(peer == 0, alone);
            assert!(alone || peer >= 2 * (brokers - 1), "{brokers} brokers: two connections of each other one");
            let brokers = brokers as u64;
            let own = (segments + listeners * RESERVE) * brokers + MIN_OTHER_FILES;
            let taken = (grpc + http + peer) as u64 * brokers + own;
            let least = own + (min.grpc + min.http + min_peer) as u64 * brokers;
            // A broker of its own fits from 256 files on; what `dev --brokers` starts shares the limit.
            let bound = if brokers == 1 && files >= 256 { files } else { files.max(least) };
            assert!(taken <= bound, "{files} files for {brokers}: {grpc}, {http} and {peer}");
        }
        let places = |files, segments, alone| {
            let Room { grpc, http, peer } = Room::with(files, segments, 1, alone);
            (grpc.places, http.places, peer.map(|peer| peer.places))
        };
        assert_eq!(places(1024, 512, true), (315, 45, None));
        assert_eq!(places(1024, 512, false), (262, 43, Some(43)));
        assert_eq!(places(1 << 20, 8192, false), (907_996, 256, Some(1024)));
        assert_eq!(places(256, 128, true), (32, 8, None));
        assert_eq!(places(256, 128, false), (16, 4, Some(8)));
    }

    /// 20,000 connections without a call took 400 MB, and there were 900,000 places.
    #[test]
    fn connections_of_clients_are_bounded_by_memory() {
        let grpc = |files, memory_bytes| Room::with(files, 128, 1, true).within(memory_bytes, 32).grpc;
        assert_eq!(grpc(1 << 20, 512 << 20), Capacity { places: 2048, raised_by: "limits.memory_bytes" });
        assert_eq!(grpc(1 << 20, 64 << 20).places, 256);
        assert_eq!(grpc(1024, 512 << 20), Room::with(1024, 128, 1, true).grpc, "files are fewer");
    }

    /// Before anybody has said who it is, 1,024 connections could hold 1.3 GB.
    #[test]
    fn connections_of_other_brokers_are_bounded_by_memory() {
        let peer =
            |memory_bytes| Room::with(1 << 20, 128, 1, false).within(memory_bytes, 32).peer.expect("they are several");
        assert_eq!(peer(512 << 20), Capacity { places: 51, raised_by: "limits.memory_bytes" });
        assert_eq!(peer(64 << 20).places, 32, "a cluster of some brokers works with little memory too");
        assert_eq!(peer(16 << 30).places, 1024);
    }

    /// Half of the places were one address's, and 32 the fewest: of 32 brokers on one machine seven links were refused for ever.
    #[test]
    fn many_brokers_in_one_process_have_peer_places_for_each_other() {
        let peer = Room::with(65_536, 8192, 32, false).peer.expect("they are several").places;
        assert!(peer >= 62, "two connections of 31 others each: {peer}");
    }
}
