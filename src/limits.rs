//! Every hard bound of the system, in one place. A bound is not a setting: nobody needs to tune it, and something
//! breaks without it. What a user may choose lives in `config` and in topic configuration.

/// Smallest batch: the 61 bytes of a header with no records.
pub const BATCH_HEADER_BYTES: usize = 61;

/// Largest batch that any topic may allow (`max.message.bytes`), in bytes as stored.
pub const MAX_BATCH_BYTES: usize = 64 << 20;

/// Most records in one batch. A record takes at least 7 bytes, so this binds only highly compressed batches.
pub const MAX_BATCH_RECORDS: usize = 1 << 20;

/// Most bytes that one batch's records may have after decompression, wherever anything is decompressed.
pub const MAX_DECOMPRESSED_BYTES: usize = 256 << 20;

/// Most bytes that a batch's records may have without compression where the broker itself writes them anew, on a topic that
/// sets `compression.type`: what the largest batch could hold plain.
pub const MAX_RECOMPRESSED_BYTES: usize = MAX_BATCH_BYTES;

/// Most headers on one record.
pub const MAX_RECORD_HEADERS: usize = 10_000;

/// Largest gRPC message in either direction: a batch of the largest size with its envelope.
pub const MAX_MESSAGE_BYTES: usize = MAX_BATCH_BYTES + (1 << 20);

/// Largest gRPC message to the brokers' own service. None carries records: the largest name replicas, [`MAX_PEER_REPLICAS`] at most. So a
/// connection holds 1 MiB of requests at most, in [`MAX_STREAMS_PER_PEER`] pieces, before anybody has said who it is.
pub const MAX_PEER_REQUEST_BYTES: usize = 64 << 10;

/// Most replicas that one message to the brokers' own service names: a question for marks, and what a follower has.
pub const MAX_PEER_REPLICAS: usize = 1_024;

/// Most calls and streams that may be open on one connection of another broker: one link, or the questions that share a connection. What
/// is more waits for its turn there.
pub const MAX_STREAMS_PER_PEER: u32 = 16;

/// Largest request that holds no records.
pub const MAX_REQUEST_BYTES: usize = 4 << 20;

/// Most repeated parts of one request: records, headers, partitions, names.
pub const MAX_REQUEST_PARTS: usize = 100_000;

/// Bytes of a broker's disk that appends leave free. The commit after which segments can go, the checkpoint and the
/// indexes need room themselves: a log that took the last byte could never give one back.
pub const DISK_RESERVE_BYTES: u64 = 32 << 20;

/// Most partitions of one topic.
pub const MAX_PARTITIONS: u32 = 100_000;

/// Most topics in a cluster.
pub const MAX_TOPICS: usize = 100_000;

/// Most replicas of one partition.
pub const MAX_REPLICAS: u32 = 32;

/// Most partitions that one fetch may name.
pub const MAX_FETCH_PARTITIONS: usize = 10_000;

/// Most topics that one request for metadata may name.
pub const MAX_METADATA_TOPICS: usize = 10_000;

/// Bytes that a search for an offset by time reads at once.
pub const SEARCH_BYTES: usize = 1 << 20;

/// Most bytes of batches in one fetch response, but for a first batch that is larger than this.
pub const MAX_FETCH_BYTES: usize = 16 << 20;

/// Longest time that an append waits for its acknowledgement, in milliseconds: what waits for it takes a place in a list.
pub const MAX_APPEND_TIMEOUT_MS: u32 = 600_000;

/// Most appends with `acks=tiered` that wait on one broker. Each takes up to 2 KiB that no budget counts.
pub const MAX_TIERED_APPENDS: usize = 1 << 14;

/// Most of them of one connection.
pub const MAX_TIERED_APPENDS_PER_CONNECTION: usize = MAX_TIERED_APPENDS / 4;

/// Longest time that a fetch waits for data, in milliseconds.
pub const MAX_FETCH_WAIT_MS: u32 = 60_000;

/// How many of a producer's last batches a partition remembers, so that a retry of any of them is recognised. A producer
/// can have as many under way: Kafka's five hold a synced partition to five batches per round trip.
pub const PRODUCER_WINDOW: usize = 64;

/// Most operations, compares or reads in one transaction of the metadata store (etcd's default `max-txn-ops`).
pub const MAX_TRANSACTION_OPS: usize = 128;

/// Most partitions whose values one transaction changes: each needs a compare, and one more for each broker that it adds.
pub const CHANGES_TOGETHER: usize = 40;

/// Most bytes of keys and values in one transaction of the metadata store, below etcd's 1.5 MiB for a request.
pub const MAX_TRANSACTION_BYTES: usize = 1 << 20;

/// A journal of up to so many bytes grows as far as its disk allows. A larger one is asked for on purpose, and refused where it
/// can never be had.
pub const MODEST_JOURNAL_BYTES: u64 = 256 << 20;

/// Most idempotent producers that one partition remembers; beyond it, the one that wrote longest ago is forgotten.
pub const MAX_PRODUCERS: usize = 16_384;

/// Most calls and streams that are open on one connection at a time, fewer where connections are many. A client of ours needs one for each producer and consumer, and one
/// for each question that it asks meanwhile.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 1_000;
