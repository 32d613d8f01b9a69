//! Real etcd clusters with stores of them.

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

/// How long a start may take on a machine that others keep busy.
const START: Duration = Duration::from_secs(60);

/// A cluster. Members are counted from 0.
pub(super) struct Etcd(members::Etcd);

impl Etcd {
    /// A cluster over plain HTTP that answers.
    pub(super) async fn start(members: usize) -> Self {
        let etcd = Self::begin(members, "http", &[]);
        etcd.answers(&etcd.store().await).await;
        etcd
    }

    /// A cluster whose clients come with `scheme`. It may not answer yet.
    pub(super) fn begin(members: usize, scheme: &'static str, flags: &[String]) -> Self {
        Self(members::Etcd::begin(members, scheme, flags))
    }

    pub(super) fn options(&self) -> EtcdOptions {
        EtcdOptions::new(self.endpoints())
    }

    /// A store of all members, which are asked in their order at first.
    pub(super) async fn store(&self) -> EtcdStore {
        EtcdStore::open(self.options()).await.expect("good options")
    }

    /// Waits until every member answers, and one of them leads.
    pub(super) async fn answers(&self, store: &EtcdStore) {
        let end = clock::monotonic() + START;
        loop {
            let status = store.status().await;
            let ready = status.iter().all(|(_, answer)| answer.is_ok());
            if ready && status.iter().any(|(_, answer)| answer.as_ref().is_ok_and(|member| member.leader)) {
                return;
            }
            assert!(clock::monotonic() < end, "{status:?}\n{}", self.logs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The member that leads.
    pub(super) async fn leader(&self, store: &EtcdStore) -> usize {
        let leads = |(_, answer): &(String, Result<super::MemberStatus, String>)| {
            answer.as_ref().is_ok_and(|member| member.leader)
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
