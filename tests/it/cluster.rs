//! Tests of several real brokers with a real etcd.

mod alone;
mod chaos;
mod dev;
mod disks;
mod failover;
mod figures;
mod full;
mod grows;
mod machines;
pub(crate) mod members;
mod metadata;
mod moves;
pub(crate) mod network;
mod outage;
mod peers;
mod racks;
mod rolling;
mod rubbish;
mod starts;

pub(crate) use self::members::etcd;
