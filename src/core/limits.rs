//! The fixed limits of the system. A limit is not a setting: no user needs to tune it, and the system breaks without
//! it. Settings are in `config` and in the topic configuration (`model`).

/// Size of a batch header, and so of the smallest batch.
pub const BATCH_HEADER_BYTES: usize = 61;

/// Upper bound of the topic setting `max.message.bytes`: the size of a batch as stored.
pub const MAX_BATCH_BYTES: usize = 64 << 20;

/// Maximum number of records in a batch. An uncompressed record takes at least 7 bytes, so with the default
/// `max.message.bytes` only compressed batches can reach this number.
pub const MAX_BATCH_RECORDS: usize = 1 << 20;

/// Maximum size of a batch's records after decompression.
pub const MAX_DECOMPRESSED_BYTES: usize = 256 << 20;

/// Maximum size of a batch's decompressed records if the broker stores the batch in another codec, because the topic
/// sets `compression.type`. Equal to the maximum size of an uncompressed batch.
pub const MAX_RECOMPRESSED_BYTES: usize = MAX_BATCH_BYTES;

/// Maximum number of headers of a record.
pub const MAX_RECORD_HEADERS: usize = 10_000;

/// Maximum size of a gRPC message in either direction: the largest batch and the fields around it. Requests without
/// records have lower limits.
pub const MAX_MESSAGE_BYTES: usize = MAX_BATCH_BYTES + (1 << 20);

/// Maximum size of a request to the peer service. Such requests carry no records; the largest ones name up to
/// [`MAX_PEER_REPLICAS`] replicas. With [`MAX_STREAMS_PER_PEER`] streams, a connection holds at most 1 MiB of requests
/// before the caller is identified.
pub const MAX_PEER_REQUEST_BYTES: usize = 64 << 10;

/// Maximum number of replicas that one request to the peer service names.
pub const MAX_PEER_REPLICAS: usize = 1_024;

/// Maximum number of concurrent HTTP/2 streams on a connection from another broker. A connection carries either one
/// replication link or unary calls. The calling broker queues calls above the maximum.
pub const MAX_STREAMS_PER_PEER: u32 = 16;

/// Maximum size of a client's request without records. Requests of health checks and reflection have a lower limit.
pub const MAX_REQUEST_BYTES: usize = 4 << 20;

/// Maximum number of elements of all repeated fields of a client's request together: records, headers, partitions,
/// names.
pub const MAX_REQUEST_PARTS: usize = 100_000;

/// Disk space that appends leave free. Evicting segments needs space for a journal entry, a checkpoint and indexes. A
/// log that used the last byte could not free space.
pub const MIN_FREE_DISK_BYTES: u64 = 32 << 20;

/// Maximum number of partitions of a topic.
pub const MAX_PARTITIONS: u32 = 100_000;

/// Maximum number of topics in a cluster.
pub const MAX_TOPICS: usize = 100_000;

/// Maximum replication factor.
pub const MAX_REPLICAS: u32 = 32;

/// Maximum number of partitions of a fetch session or a read request, and of queries in an offset lookup.
pub const MAX_FETCH_PARTITIONS: usize = 10_000;

/// Maximum number of topics that a metadata request names.
pub const MAX_METADATA_TOPICS: usize = 10_000;

/// Maximum size of one read during a search for an offset by timestamp, unless a single batch is larger.
pub const SEARCH_BYTES: usize = 1 << 20;

/// Maximum of the `max_bytes` of a fetch, and so of the batches in a response. A larger first batch is returned as
/// well, so that a reader can pass it.
pub const MAX_FETCH_BYTES: usize = 16 << 20;

/// Maximum timeout of an append, in milliseconds; a larger timeout is rejected. An append that waits for its
/// acknowledgement occupies memory.
pub const MAX_APPEND_TIMEOUT_MS: u32 = 600_000;

/// Maximum number of appends with `acks=tiered` that wait for the object store on one broker. Each takes up to 2 KiB
/// that no memory budget counts.
pub const MAX_TIERED_APPENDS: usize = 1 << 14;

/// Maximum number of appends with `acks=tiered` from one connection that wait for the object store.
pub const MAX_TIERED_APPENDS_PER_CONNECTION: usize = MAX_TIERED_APPENDS / 4;

/// Maximum time that a fetch waits for data, in milliseconds. A longer time in a request is reduced to it.
pub const MAX_FETCH_WAIT_MS: u32 = 60_000;

/// Maximum number of a producer's last batches that a partition stores to detect duplicates, and so the maximum number
/// of batches in flight. While the broker's memory for producers is used up, a partition may store only 16. Kafka
/// stores five, which limits a partition with synced writes to five batches per round trip.
pub const MAX_BATCHES_PER_PRODUCER: usize = 64;

/// Maximum length of each list of a transaction of the metadata store (etcd's default `max-txn-ops`). The lists are its
/// compares, its operations, and the reads for a failed compare.
pub const MAX_TRANSACTION_OPS: usize = 128;

/// Maximum number of partitions that a transaction changes. Each partition needs one compare for its value and one for
/// each broker that it adds, and [`MAX_TRANSACTION_OPS`] limits these compares as well.
pub const MAX_PARTITIONS_PER_TXN: usize = 40;

/// Maximum size of the keys and values of a transaction of the metadata store, below etcd's request limit of 1.5 MiB.
pub const MAX_TRANSACTION_BYTES: usize = 1 << 20;

/// Maximum size of a journal whose space is not checked at a start: the journal grows as far as the disk allows. A
/// larger journal was configured on purpose. So the broker does not start if no journal file exists and the disk has
/// less free space than the journal's size.
pub const JOURNAL_SPACE_CHECK_BYTES: u64 = 256 << 20;

/// Maximum number of idempotent producers of which a partition keeps state. Above this number, the producer that wrote
/// least recently is removed.
pub const MAX_PRODUCERS: usize = 16_384;

/// Maximum number of concurrent HTTP/2 streams on a client connection. A broker grants fewer to a connection that opens
/// while the memory for streams is scarce. The Rust client needs one for each producer and consumer, and one for each
/// concurrent unary call.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 1_000;
