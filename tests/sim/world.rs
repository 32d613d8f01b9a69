//! One broker on a simulated machine, and how it is started, killed and robbed of its power.

use std::{path::Path, sync::Arc, time::Duration};

use strandline::{
    client::{self, Client},
    cluster::{Addresses, EmbeddedStore},
    config::{Config, Sources},
    log::{Log, SimDisk, Stepper},
    server::{Node, Outside, Stores},
    task::{Tasks, clock, process::Process, random},
    tier::{Store, StoreOptions},
};
use tokio::{sync::Notify, time::Instant};

use crate::{net::Net, objects::Objects, trace::Trace};

const ADDRESS: &str = "b1:9460";

/// How long nothing is synced behind the journal at most.
const SYNC_EVERY: Duration = Duration::from_millis(50);

/// Everything outside the broker's process, and the process when it runs.
pub(crate) struct World {
    pub(crate) disk: SimDisk,
    pub(crate) net: Net,
    pub(crate) objects: Objects,
    pub(crate) trace: Trace,
    /// The process that draws the faults and makes the load.
    pub(crate) outside: Process,
    meta: EmbeddedStore,
    config: Config,
    began: Instant,
    seed: u64,
    starts: u32,
    broker: Option<(Process, Node)>,
    _time: Tasks,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let began = clock::monotonic();
        let outside = Process::new(0, seed, began);
        let (meta, time) = (EmbeddedStore::in_memory(), Tasks::new());
        meta.keep_time(&time);
        let settings = Sources::new()
            .flag("broker.data_dir", "/data")
            .flag("cache.disk_bytes", "0")
            .flag("tier.check_interval", "1s")
            .load();
        let mut config = settings.unwrap_or_else(|error| panic!("{error}")).config;
        // Smaller than anybody may set them: the ring goes round and the tail is left behind within seconds.
        (config.log.journal_bytes, config.log.tail_memory_bytes) = (1 << 20, 64 << 10);
        Self {
            disk: SimDisk::new(),
            net: Net::default(),
            objects: Objects::new(),
            trace: Trace::new(),
            outside,
            meta,
            config,
            began,
            seed,
            starts: 0,
            broker: None,
            _time: time,
        }
    }

    /// Starts the broker, again and again where a fault keeps it from starting.
    pub(crate) async fn start(&mut self) {
        for _ in 0..50 {
            self.starts += 1;
            let process = Process::new(self.starts, self.seed ^ u64::from(self.starts) << 32, self.began);
            match process.run(Box::pin(self.open(&process))).await {
                Ok(node) => {
                    self.trace.note(format_args!("broker started, {} partitions", node.broker().partitions()));
                    self.broker = Some((process, node));
                    return;
                }
                Err(error) => {
                    self.trace.note(format_args!("broker did not start: {error:#}"));
                    process.kill();
                    self.disk.kill();
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
        panic!("the broker does not start any more");
    }

    async fn open(&self, process: &Process) -> anyhow::Result<Node> {
        let wake = Arc::new(Notify::new());
        let woken = Arc::clone(&wake);
        let options = StoreOptions::new("memory://");
        let objects = Store::over(Arc::new(self.objects.clone()), "", &options, &self.config.cluster);
        let meta = self.meta.clone();
        let outside = Outside {
            disk: Arc::new(self.disk.clone()),
            stores: Box::pin(async { Ok(Stores { meta: Arc::new(meta), objects: Some(objects) }) }),
            connect: Arc::new(self.net.clone()),
            alone: true,
            stepper: Some(Stepper::new(move || wake.notify_one())),
        };
        let addresses = Addresses { grpc: ADDRESS.to_owned(), http: None };
        let node = Node::open(&self.config, outside, addresses).await?;
        process.enter(|| {
            Tasks::new().spawn("log steps", steps(node.log().clone(), woken));
            self.net.listen(ADDRESS, node.routes());
        });
        Ok(node)
    }

    /// Kills the broker: signal 9, or the whole machine's power.
    pub(crate) fn kill(&mut self, power: Option<u64>) {
        let Some((process, node)) = self.broker.take() else { return };
        process.kill();
        match power {
            Some(seed) => self.disk.crash(seed),
            None => self.disk.kill(),
        }
        self.net.hang_up(ADDRESS);
        process.enter(|| drop(node));
        self.trace.note(format_args!("{}", if power.is_some() { "power lost" } else { "broker killed" }));
    }

    /// Stops the broker as an operator does.
    pub(crate) async fn stop(&mut self) {
        let Some((process, node)) = self.broker.take() else { return };
        self.net.hang_up(ADDRESS);
        let stopped = process.run(Box::pin(node.stop())).await;
        self.trace.note(format_args!("broker stopped: {stopped:?}"));
        process.kill();
    }

    pub(crate) fn is_running(&self) -> bool {
        self.broker.is_some()
    }

    /// A client in the outside process.
    pub(crate) async fn client(&self) -> Client {
        loop {
            let options = client::Options { request_timeout: Duration::from_secs(600), ..client::Options::default() };
            let connected = Client::connect_through(Arc::new(self.net.clone()), ADDRESS, options).await;
            if let Ok(client) = connected {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Bytes in the broker's data directory, for the trace.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.disk.files().iter().filter(|(path, _)| path.starts_with(Path::new("/data"))).map(|(_, bytes)| bytes).sum()
    }
}

/// What the threads of a log do elsewhere.
async fn steps(log: Log, wake: Arc<Notify>) {
    let mut synced = clock::monotonic();
    loop {
        let _either = tokio::time::timeout(SYNC_EVERY, wake.notified()).await;
        tokio::time::sleep(Duration::from_micros(random::in_range(20..800))).await;
        while log.journal_step() {
            // Most devices are quick, and each is slow at times.
            let most = if random::in_range(0..20) == 0 { 20_000 } else { 800 };
            tokio::time::sleep(Duration::from_micros(random::in_range(20..most))).await;
        }
        // What is too large for the journal waits for the segments.
        if random::in_range(0..4) == 0 || clock::monotonic() - synced > SYNC_EVERY {
            log.sync_step();
            synced = clock::monotonic();
        }
    }
}
