//! The metadata store, its keys, a broker's cache of it, and everything that changes it.
//!
//! # Overview
//!
//! The modules, bottom up:
//!
//! | module | content |
//! | --- | --- |
//! | `store` | the trait [`MetaStore`]: a map from paths to values with one history, in etcd's terms |
//! | `embedded`, `etcd` | the implementations for a standalone broker and for several brokers |
//! | `metered`, `monotonic` | wrappers that count the requests, and that reject a store that returned to an older state |
//! | `keys`, `endpoints` | paths and values; a broker's listeners |
//! | `metadata` | the metadata cache: the cluster's prefix in memory; serves every lookup |
//! | `topics` | creates, alters and deletes topics |
//! | `placement` | chooses the brokers of a new partition |
//! | `operations` | writes the operations that an operator requests on brokers and partitions |
//! | `startup_verification` | compares a starting broker's local replicas with the metadata |
//! | `session` | keeps a broker registered after its startup verification |
//! | `partition_value`, `partition_updates` | compute every new ISR and leader of a partition; write them by compare-and-set |
//! | `planner`, `controller` | plan the changes (pure); write the planned changes |
//! | `generation` | distinguishes a restored store from its earlier state |
//! | `store_binding` | stores the binding to the cluster's object store |
//! | `producer_ids`, `tier_commits` | compute and verify producer ids; write tier commits |
//! | `stats` | counts partitions, and those that need attention |
//! | `outcome` | repeats a transaction whose outcome is unknown |
//!
//! # Invariants
//!
//! - The metadata cache is a hint: its revision never falls, and it may lag. So a write that must not undo a concurrent
//!   change compares the revisions of the keys that it is based on.
//! - A partition exists only if its topic exists and its number is below the topic's partition count. Other partition
//!   keys are ignored.
//! - A topic's key and the key of its partition 0 are created in one transaction and deleted in one transaction. The
//!   key of any other partition is created before the topic counts that partition. So partition keys without a topic
//!   belong to a topic that is being created, or are stale.
//!
//! # Crash
//!
//! An interrupted creation or deletion may leave partition keys and tier keys without a topic. An interrupted addition
//! of partitions may leave keys of partitions that the topic does not count. Brokers ignore these keys;
//! [`StaleKeySweeper`] finds and deletes them.

mod controller;
mod embedded;
mod endpoints;
mod etcd;
mod generation;
mod keys;
mod metadata;
mod metered;
mod monotonic;
mod operations;
mod outcome;
mod partition_updates;
mod partition_value;
mod placement;
pub mod planner;
mod producer_ids;
mod session;
mod startup_verification;
mod stats;
mod store;
mod store_binding;
mod tier_commits;
mod topics;

#[cfg(test)]
mod conformance;
#[cfg(test)]
pub(crate) mod faulty;

pub use controller::Controller;
pub use embedded::{EmbeddedStore, EmbeddedStoreError, FILE_NAME as EMBEDDED_FILE};
pub use endpoints::{Endpoint, Endpoints, Protocol};
pub use etcd::{EtcdIdentity, EtcdLogin, EtcdOptions, EtcdOptionsError, EtcdStore, EtcdTls, MemberStatus};
pub use generation::{FIRST_GENERATION, Generations};
pub use keys::{
    BrokerState, BrokerValue, ControllerValue, DirectoryValue, DrainValue, GenerationValue, InvalidClusterName,
    InvalidValue, Key, Keys, ProducerIdsValue, TombstoneValue, TopicValue, Value,
};
pub use metadata::{ChangeFeed, MetadataCache, MetadataChange, MetadataSnapshot, PartitionEntry, Versioned};
pub use metered::MeteredStore;
pub use monotonic::MonotonicStore;
pub use operations::{
    BrokerDrain, CancelError, ClusterOperations, DrainError, ElectError, LostOffsets, OperationResult,
    PreferredLeaderIssue, ReassignError, ReplicaPosition, TargetError, UncleanCandidate, UnknownBrokers,
    UnknownPartition, WriteError, best_unclean_candidate,
};
pub use partition_updates::{PartitionUpdate, PartitionUpdater, UpdateOutcome};
pub use partition_value::{PartitionValue, ReplicaIntegrity};
pub use placement::{BrokerLoad, Placement, PlacementError, ReplicaLimitExceeded};
pub use producer_ids::{ANONYMOUS, ProducerIdKey};
pub use session::{RegisterError, RegistrationRequest, Session, SessionState};
pub use startup_verification::{LocalInventory, VerificationResult, verify_inventory};
pub use stats::{ClusterStats, LeaderStats, ReplicaCounts};
pub use store::{
    Compare, GetResult, KeyValue, LeaseId, ListResult, MetaStore, MetaStoreError, Regression, Revision, StoreFuture,
    Transaction, TxnOp, TxnOutcome, Watch, WatchBatch, WatchEvent,
};
pub use store_binding::MetaBindingStore;
pub use tier_commits::{TierCommitError, TierCommits};
pub use topics::{
    AddPartitionsError, AlterError, BrokerCounts, CreateError, DeleteError, StaleKeySweeper, Tombstone, TopicInfo,
    TopicSpec, Topics, UnknownTopic,
};
