//! Real etcd clusters with stores on them.

use std::{
    ops::{Deref, DerefMut},
    time::Duration,
};

use crate::{
    cluster::etcd::{EtcdOptions, EtcdStore},
    task::clock,
};

#[allow(dead_code, reason = "the tests of real brokers use the rest")]
#[path = "../../../../tests/common/etcd.rs"]
mod members;
#[path = "../../../../tests/common/ports.rs"]
mod ports;

/// Maximum time of a start on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// An etcd cluster. Members are numbered from 0.
pub(super) struct Etcd(members::Etcd);

impl Etcd {
    /// Starts a cluster over plain HTTP and waits until it responds.
    pub(super) async fn start(members: usize) -> Self {
        let etcd = Self::begin(members, "http", &[]);
        etcd.wait_until_ready(&etcd.store().await).await;
        etcd
    }

    /// Starts a cluster with this client scheme and these command-line flags of each member. Does not wait until the
    /// cluster responds.
    pub(super) fn begin(members: usize, scheme: &'static str, flags: &[String]) -> Self {
        Self(members::Etcd::begin(members, scheme, flags))
    }

    pub(super) fn options(&self) -> EtcdOptions {
        EtcdOptions::new(self.endpoints())
    }

    /// Returns a store of all members. Its first call goes to the member 0.
    pub(super) async fn store(&self) -> EtcdStore {
        EtcdStore::open(self.options()).await.expect("valid options")
    }

    /// Waits until every member responds and one of them is etcd's leader.
    pub(super) async fn wait_until_ready(&self, store: &EtcdStore) {
        let end = clock::monotonic() + START_TIMEOUT;
        loop {
            let status = store.status().await;
            let ready = status.iter().all(|(_, result)| result.is_ok());
            if ready && status.iter().any(|(_, result)| result.as_ref().is_ok_and(|member| member.leader)) {
                return;
            }
            assert!(clock::monotonic() < end, "{status:?}\n{}", self.logs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Returns the index of etcd's leader.
    pub(super) async fn leader(&self, store: &EtcdStore) -> usize {
        let leads = |(_, result): &(String, Result<super::MemberStatus, String>)| {
            result.as_ref().is_ok_and(|member| member.leader)
        };
        store.status().await.iter().position(leads).expect("one leads")
    }
}

impl Deref for Etcd {
    type Target = members::Etcd;

    fn deref(&self) -> &members::Etcd {
        &self.0
    }
}

impl DerefMut for Etcd {
    fn deref_mut(&mut self) -> &mut members::Etcd {
        &mut self.0
    }
}
