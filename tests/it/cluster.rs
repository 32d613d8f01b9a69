//! Several real brokers over a real etcd of three members.

mod chaos;
mod failover;
mod figures;
mod members;
mod network;
mod outage;
mod rolling;
mod starts;

pub(crate) use self::members::etcd;
