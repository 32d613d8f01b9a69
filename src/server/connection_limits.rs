//! Maximum number of connections of each listener. A broker without free file descriptors can neither write its log nor
//! respond, so connections must not take the last ones. Each connection also takes memory, even while it sends nothing.

use rustix::process::{Resource, getrlimit};

use super::connection_slots::{LOOPBACK_SLOTS, PROBE_SLOTS};
use crate::{
    limits,
    log::{Disk as _, RealDisk},
};

/// Minimum number of file descriptors for everything except connections and segments: the journal, other brokers, etcd,
/// the object store.
const MIN_OTHER_FILES: u64 = 64;

/// Number of slots of each listener that are not in its common pool: those of loopback and of probes.
const RESERVED_CONNECTIONS: u64 = (LOOPBACK_SLOTS + PROBE_SLOTS) as u64;

/// Maximum number of slots in the common pool of the HTTP listener.
const MAX_HTTP_CONNECTIONS: usize = 256;

/// Maximum number of slots in the common pool of the peer listener, unless [`MIN_PEER_CONNECTIONS_PER_BROKER`] requires
/// more.
const MAX_PEER_CONNECTIONS: usize = 1024;

/// Minimum number of slots of each listener.
#[derive(Clone, Copy, Debug)]
struct Minimum {
    grpc: usize,
    http: usize,
    peer: usize,
}

const MIN_SLOTS: Minimum = Minimum { grpc: 32, http: 8, peer: 32 };

/// Minimum for a broker of a cluster with fewer than [`SMALL_FILE_LIMIT`] file descriptors. From 256 file descriptors
/// on, these slots and the reserves of three listeners fit beside the files of the log.
const MIN_SLOTS_FEW_FILES: Minimum = Minimum { grpc: 16, http: 4, peer: 8 };

/// Limit of open files below which a broker of a cluster has [`MIN_SLOTS_FEW_FILES`].
const SMALL_FILE_LIMIT: u64 = 512;

/// Minimum number of slots of the peer listener per broker of this process. Another broker uses two connections, and
/// one more for each probe.
const MIN_PEER_CONNECTIONS_PER_BROKER: usize = 4;

/// Maximum number of slots of a listener. No system has that many file descriptors.
const MAX_SLOTS: u64 = 1 << 30;

/// Bytes of `limits.memory_bytes` that one gRPC connection needs; they determine the maximum number of connections. An
/// idle connection takes 20 KiB, its window at least 80 KiB, and each of its first calls 7 KiB.
const BYTES_PER_CONNECTION: u64 = 256 << 10;

/// Share of `limits.memory_bytes` for connections of other brokers, as a divisor.
const PEER_SHARE: u64 = 8;

/// Bytes of the share of [`PEER_SHARE`] per slot of the peer listener. A caller that is not known to be a broker can
/// send as much in incomplete requests.
const BYTES_PER_PEER: u64 = limits::MAX_PEER_REQUEST_BYTES as u64 * limits::MAX_STREAMS_PER_PEER as u64 + (256 << 10);

/// Size of the common pool of one listener, and the limit that determines this size. If another limit is smaller, it
/// replaces both fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capacity {
    pub(super) slots: usize,
    /// Setting or system limit that a rejection names.
    pub(super) raised_by: &'static str,
}

/// Connection limits of each listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConnectionLimits {
    pub(super) grpc: Capacity,
    pub(super) http: Capacity,
    /// Limit of the peer listener; `None` for a standalone broker.
    pub(super) peer: Option<Capacity>,
}

impl ConnectionLimits {
    /// Returns the limits of one of `brokers` brokers in this process. `memory_bytes` is `limits.memory_bytes`. A
    /// standalone broker has no peer listener.
    pub(super) fn of(brokers: usize, standalone: bool, memory_bytes: u64) -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        let by_files = Self::for_files(files, RealDisk::default().max_open_files() as u64, brokers, standalone);
        by_files.limit_to_memory(memory_bytes, min_peer(Minimum::of(files, standalone), brokers))
    }

    /// Limits the slots of the gRPC listener and of the peer listener to the available memory. The peer listener keeps
    /// at least `min_peer` slots.
    fn limit_to_memory(self, memory_bytes: u64, min_peer: usize) -> Self {
        let limit = |capacity: Capacity, slots: u64| {
            let slots = usize::try_from(slots).unwrap_or(usize::MAX);
            if capacity.slots <= slots { capacity } else { Capacity { slots, raised_by: "limits.memory_bytes" } }
        };
        let max_peers = (memory_bytes / PEER_SHARE / BYTES_PER_PEER).max(min_peer as u64);
        Self {
            grpc: limit(self.grpc, memory_bytes / BYTES_PER_CONNECTION),
            peer: self.peer.map(|peer| limit(peer, max_peers)),
            ..self
        }
    }

    /// Returns the slots for which a limit of `files` open files leaves descriptors. The other descriptors are for:
    /// - the `segments` open segments of each broker
    /// - the reserves of its listeners
    /// - all other uses, which get an eighth of `files`, at least [`MIN_OTHER_FILES`]
    ///
    /// An eighth of the slots is for the HTTP listener and an eighth for peers, within the bounds of these listeners.
    /// Each listener has at least its minimum, even if the descriptors do not suffice.
    fn for_files(files: u64, segments: u64, brokers: usize, standalone: bool) -> Self {
        let (brokers, listeners) = (brokers.max(1) as u64, if standalone { 2 } else { 3 });
        let reserved = (segments + listeners * RESERVED_CONNECTIONS) * brokers + MIN_OTHER_FILES.max(files / 8);
        let per_broker = (files.saturating_sub(reserved) / brokers).min(MAX_SLOTS);
        let per_broker = usize::try_from(per_broker).unwrap_or(usize::MAX);
        let min = Minimum::of(files, standalone);
        let http = (per_broker / 8).clamp(min.http, MAX_HTTP_CONNECTIONS);
        let min_peer = min_peer(min, usize::try_from(brokers).unwrap_or(MAX_PEER_CONNECTIONS));
        let peer = (!standalone).then(|| (per_broker / 8).min(MAX_PEER_CONNECTIONS).max(min_peer));
        let grpc = per_broker.saturating_sub(http + peer.unwrap_or(0)).max(min.grpc);
        let by_files = |slots| Capacity { slots, raised_by: "the limit of open files (ulimit -n, LimitNOFILE)" };
        Self { grpc: by_files(grpc), http: by_files(http), peer: peer.map(by_files) }
    }
}

/// Returns the minimum number of slots for other brokers, with `brokers` brokers in this process.
fn min_peer(min: Minimum, brokers: usize) -> usize {
    min.peer.max(MIN_PEER_CONNECTIONS_PER_BROKER * brokers)
}

impl Minimum {
    /// Returns the minimum for a broker with this limit of open files.
    const fn of(files: u64, standalone: bool) -> Self {
        if files < SMALL_FILE_LIMIT && !standalone { MIN_SLOTS_FEW_FILES } else { MIN_SLOTS }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_limit_leaves_descriptors_for_log_and_peers() {
        for (files, segments, brokers, standalone) in [
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
            let ConnectionLimits { grpc, http, peer } =
                ConnectionLimits::for_files(files, segments, brokers, standalone);
            let (grpc, http, peer) = (grpc.slots, http.slots, peer.map_or(0, |peer| peer.slots));
            let min = Minimum::of(files, standalone);
            assert!(grpc >= min.grpc && http >= min.http, "{files}: the minimum is always served");
            let (min_peer, listeners) = if standalone { (0, 2) } else { (min.peer.max(4 * brokers), 3) };
            assert_eq!(peer == 0, standalone);
            assert!(standalone || peer >= 2 * (brokers - 1), "{brokers} brokers: two connections of each other broker");
            let brokers = brokers as u64;
            let reserved = (segments + listeners * RESERVED_CONNECTIONS) * brokers + MIN_OTHER_FILES;
            let taken = (grpc + http + peer) as u64 * brokers + reserved;
            let min_total = reserved + (min.grpc + min.http + min_peer) as u64 * brokers;
            // A single broker fits into the limit from 256 file descriptors on. Several brokers of `dev --brokers`
            // share the limit, and may exceed it by their minimums.
            let bound = if brokers == 1 && files >= 256 { files } else { files.max(min_total) };
            assert!(taken <= bound, "{files} files for {brokers}: {grpc}, {http} and {peer}");
        }
        let slots = |files, segments, standalone| {
            let ConnectionLimits { grpc, http, peer } = ConnectionLimits::for_files(files, segments, 1, standalone);
            (grpc.slots, http.slots, peer.map(|peer| peer.slots))
        };
        assert_eq!(slots(1024, 512, true), (315, 45, None));
        assert_eq!(slots(1024, 512, false), (262, 43, Some(43)));
        assert_eq!(slots(1 << 20, 8192, false), (907_996, 256, Some(1024)));
        assert_eq!(slots(256, 128, true), (32, 8, None));
        assert_eq!(slots(256, 128, false), (16, 4, Some(8)));
    }

    /// Regression: 20,000 connections without a call took 400 MB, with 900,000 slots available.
    #[test]
    fn client_connections_are_bounded_by_memory() {
        let grpc = |files, memory_bytes| {
            ConnectionLimits::for_files(files, 128, 1, true).limit_to_memory(memory_bytes, 32).grpc
        };
        assert_eq!(grpc(1 << 20, 512 << 20), Capacity { slots: 2048, raised_by: "limits.memory_bytes" });
        assert_eq!(grpc(1 << 20, 64 << 20).slots, 256);
        assert_eq!(grpc(1024, 512 << 20), ConnectionLimits::for_files(1024, 128, 1, true).grpc, "files are fewer");
    }

    /// Regression: 1,024 connections whose callers had not been identified could hold 1.3 GB.
    #[test]
    fn peer_connections_are_bounded_by_memory() {
        let peer = |memory_bytes| {
            ConnectionLimits::for_files(1 << 20, 128, 1, false)
                .limit_to_memory(memory_bytes, 32)
                .peer
                .expect("there are several brokers")
        };
        assert_eq!(peer(512 << 20), Capacity { slots: 51, raised_by: "limits.memory_bytes" });
        assert_eq!(peer(64 << 20).slots, 32, "a cluster of some brokers works with little memory too");
        assert_eq!(peer(16 << 30).slots, 1024);
    }

    /// Regression: one address got half of the slots of the peer listener, which had at least 32. With 32 brokers on
    /// one machine, seven links were rejected forever.
    #[test]
    fn brokers_of_one_process_have_enough_peer_slots() {
        let peer = ConnectionLimits::for_files(65_536, 8192, 32, false).peer.expect("there are several brokers").slots;
        assert!(peer >= 62, "two connections of 31 other brokers each: {peer}");
    }
}
