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
//! | `measured`, `monotonic` | wrappers that count the requests, and that reject a store whose revision fell |
//! | `keys`, `endpoints` | paths and values; a broker's listeners |
//! | `view` | the metadata cache: the cluster's prefix in memory; serves every lookup |
//! | `topics` | creates, alters and deletes topics |
//! | `placement` | chooses the brokers of a new partition |
//! | `orders` | writes the operations that an operator requests on brokers and partitions |
//! | `proof` | startup verification: compares a broker's local replicas with the metadata |
//! | `session` | keeps a broker registered after its startup verification |
//! | `partition_value`, `changes` | compute every new ISR and leader of a partition; write them by compare-and-set |
//! | `planner`, `controller` | plan the changes (pure); write the planned changes |
//! | `generation` | distinguishes a restored store from its earlier state |
//! | `own_store` | stores the binding to the cluster's object store |
//! | `census` | counts partitions, and those that need attention |
//!
//! # Invariants
//!
//! - The metadata cache is a hint: its revision never falls, and it may lag. Every write compares the revisions that it
//!   was computed from.
//! - A topic's key and the key of its partition 0 are created in one transaction and deleted in one transaction. So a
//!   partition without its topic is either being created (its partition numbers start at 1) or left over.
//! - A partition counts only if its number is below the topic's partition count.
//!
//! # Crash
//!
//! An interrupted creation or deletion leaves partitions without a topic. An interrupted addition of partitions leaves
//! partitions above the topic's count. Brokers ignore both; [`Sweep`] finds and deletes them.

mod census;
mod changes;
mod controller;
mod embedded;
mod endpoints;
mod etcd;
mod generation;
mod keys;
mod measured;
mod monotonic;
mod orders;
mod outcome;
mod own_store;
mod partition_value;
mod placement;
pub mod planner;
mod producer_ids;
mod proof;
mod session;
mod store;
mod tier_commits;
mod topics;
mod view;

#[cfg(test)]
mod conformance;
#[cfg(test)]
pub(crate) mod faulty;

pub use census::{Carried, Census, Duty};
pub use changes::{Change, Changed, PartitionChanges};
pub use controller::Controller;
pub use embedded::{EmbeddedStore, FILE as EMBEDDED_FILE, OpenError};
pub use endpoints::{Endpoint, Endpoints, Protocol};
pub use etcd::{EtcdIdentity, EtcdLogin, EtcdOptions, EtcdOptionsError, EtcdStore, EtcdTls, MemberStatus};
pub use generation::{FIRST_GENERATION, Generations};
pub use keys::{
    BrokerState, BrokerValue, ControllerValue, DeletedValue, DirectoryValue, DrainValue, GenerationValue,
    InvalidClusterName, InvalidValue, Key, Keys, ProducerIdsValue, TopicValue, Value,
};
pub use measured::Measured;
pub use monotonic::MonotonicStore;
pub use orders::{
    CancelError, DrainError, Drained, ElectError, FindError, Held, Loss, Ordered, Orders, ReassignError, Successor,
    Unfit, UnknownBrokers, UnknownPartition, WriteError, successor,
};
pub use own_store::ObjectStoreKey;
pub use partition_value::{Holds, PartitionValue};
pub use placement::{Load, Placement, ReplicaBound};
pub use producer_ids::{ANONYMOUS, ProducerIdKey};
pub use proof::{Proof, Shown, Unread, prove};
pub use session::{RegisterError, Registration, Session, Standing};
pub use store::{
    Answer, Changes, Compare, Entry, Event, LeaseId, Listing, MetaStore, Op, Outcome, Reading, Regression, Revision,
    StoreError, Transaction, Watch,
};
pub use tier_commits::{TierCommitError, TierCommits};
pub use topics::{
    AddPartitionsError, AlterError, CreateError, DeleteError, Mark, NewTopic, Sweep, There, TopicInfo, Topics,
    UnknownTopic,
};
pub use view::{Feed, Known, Moved, PartitionEntry, View, ViewState};
