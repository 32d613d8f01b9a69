//! The environment of the broker processes: machines, network, object store, metadata store, and the process of the
//! clients.

use std::{sync::Arc, time::Duration};

use strandline::{
    client::{self, Client},
    cluster::EmbeddedStore,
    task::{Tasks, clock, process::SimProcess},
};

use crate::{
    checker::MachineView,
    faults::OUTSIDE,
    logs::DiskLogs,
    machine::{Machine, Shared},
    meta::SimMeta,
    net::Net,
    objects::Objects,
    run::Topology,
    trace::Trace,
};

/// A simulated cluster and its environment. The caller of [`Simulation::new`] starts the brokers.
pub(crate) struct Simulation {
    pub(crate) machines: Vec<Machine>,
    pub(crate) shared: Shared,
    pub(crate) store: EmbeddedStore,
    /// Process that draws the faults and runs the clients.
    pub(crate) outside: SimProcess,
    _time: Tasks,
}

impl Simulation {
    pub(crate) fn new(shape: Topology, seed: u64) -> Self {
        let began = clock::monotonic();
        let outside = SimProcess::new(0, seed, began);
        let (store, time) = (EmbeddedStore::in_memory(), outside.enter(Tasks::new));
        store.spawn_lease_expiry(&time);
        let shared = Shared { net: Net::default(), objects: Objects::new(began), trace: Trace::new(), began, seed };
        let machine = |id| {
            let meta = SimMeta::new(store.clone(), time.clone());
            Machine::new(id, id % shape.racks, shape.brokers == 1, meta, shared.clone())
        };
        let machines = (1..=shape.brokers).map(machine).collect();
        Self { machines, shared, store, outside, _time: time }
    }

    /// Returns the network names of the brokers and of the clients.
    pub(crate) fn names(&self) -> Vec<String> {
        let brokers = self.machines.iter().map(|machine| machine.address.clone());
        brokers.chain([OUTSIDE.to_owned()]).collect()
    }

    /// Returns the machines for the checker.
    pub(crate) fn machine_views(&self) -> Vec<MachineView> {
        let seen = |machine: &Machine| MachineView {
            id: machine.id,
            logs: DiskLogs::of(&machine.disk),
            process: Arc::clone(&machine.process),
            disk_altered: Arc::clone(&machine.disk_altered),
        };
        self.machines.iter().map(seen).collect()
    }

    /// Connects a client. Retries until a broker accepts the connection. Called in the `outside` process.
    pub(crate) async fn client(&self) -> Client {
        let options =
            client::ClientOptions { request_timeout: Duration::from_secs(600), ..client::ClientOptions::default() };
        let addresses: Vec<&str> = self.machines.iter().map(|machine| machine.address.as_str()).collect();
        loop {
            let socket = Arc::new(self.shared.net.from(OUTSIDE));
            let connected = Client::connect_through(socket, &addresses.join(","), options.clone()).await;
            if let Ok(client) = connected {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

impl Drop for Simulation {
    fn drop(&mut self) {
        self.shared.net.close();
    }
}
