//! What all brokers agree on: the metadata store, the keys in it, the mirror of it, and whoever changes what is there.
//!
//! # Overview
//!
//! `store` is the trait [`MetaStore`]: a map from paths to values with one history, in etcd's words. `embedded` is the
//! implementation for a broker alone, `etcd` that for several; `measured` counts what is asked of either, and
//! `monotonic` refuses a store that went back. `keys` says what is at which path, `endpoints` where a broker is
//! reached. `view` mirrors the cluster's prefix into memory: every question of where something is, is answered from
//! there. `topics` creates, alters and deletes topics; `placement` says which brokers hold a new partition; `orders`
//! writes down what an operator wants of brokers and partitions.
//!
//! Among several brokers `session` keeps one registered, after `proof` has shown what it still holds. `partition_value`
//! computes every new set and leader of a partition, `changes` writes them by compare-and-set, and `controller` carries
//! out what the pure `planner` finds to be done. `generation` tells a restored store from what it was. `own_store`
//! remembers which bucket is the cluster's. `census` counts what is as it should be, and what is not.
//!
//! # Invariants
//!
//! - The view is a hint. It never goes back, and it may lag: what changes the store compares what it was based on.
//! - A topic's key and the key of its partition 0 are created in one transaction and deleted in one transaction. So a
//!   partition without its topic is either on its way (its numbers begin at 1) or left over.
//! - A partition counts only below the topic's partition count.
//!
//! # What a crash leaves
//!
//! Half a creation leaves partitions that no topic names, half a deletion too, half an enlargement leaves partitions
//! above the topic's count. Nobody acts on them; [`Sweep`] finds and deletes them.

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
