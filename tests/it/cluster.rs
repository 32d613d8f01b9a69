//! Tests of several real brokers with a real etcd.

mod add_brokers;
mod chaos;
mod dev;
mod disks;
mod failover;
mod full;
mod invalid_values;
mod isolated_leader;
mod machines;
pub(crate) mod members;
mod metadata;
mod metrics;
pub(crate) mod network;
mod outage;
mod peers;
mod racks;
mod reassignments;
mod rolling;
mod starts;

pub(crate) use self::members::etcd;
