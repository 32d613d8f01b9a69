//! One machine: its disk, its links to peers and to the metadata store, and its broker, which is started, stopped,
//! killed or loses power.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use strandline::{
    cluster::{Endpoints, MetaStore, MetadataSnapshot},
    config::{Config, ConfigSources},
    log::{DataDir, Disk as _, SimDisk, SimHook},
    model::BrokerId,
    server::{Node, NodeDeps, StoreHandles},
    task::{Tasks, clock, process::SimProcess, random},
    tier::{ObjectStoreOptions, TierStore},
};
use tokio::{sync::Notify, time::Instant};

use crate::{
    meta::SimMeta,
    net::{self, Net},
    objects::Objects,
    trace::Trace,
};

/// Time since the last sync of the segments after which the next sync is due. A sync may also be made earlier.
const SYNC_INTERVAL: Duration = Duration::from_millis(50);

/// Grace period of orphan objects. In a simulation, an upload and its commit must take less time.
pub(crate) const GRACE_INTERVAL: Duration = Duration::from_secs(30);

/// State shared by the machines of a simulation.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) net: Net,
    pub(crate) objects: Objects,
    pub(crate) trace: Trace,
    pub(crate) began: Instant,
    pub(crate) seed: u64,
}

/// One machine and its broker.
pub(crate) struct Machine {
    pub(crate) id: BrokerId,
    pub(crate) address: String,
    pub(crate) disk: SimDisk,
    pub(crate) meta: SimMeta,
    config: Config,
    /// True for a standalone broker.
    pub(crate) standalone: bool,
    shared: Shared,
    starts: u32,
    /// Offset of the wall clock from simulated time, in milliseconds.
    wall_offset_ms: i64,
    broker: Option<(SimProcess, Node)>,
    /// Number of the broker's process while the broker runs; 0 while it is down, starts or stops.
    pub(crate) process: Arc<AtomicU32>,
    /// Number of earlier disks of this machine, which is also the number of the current disk.
    pub(crate) disks: Arc<AtomicU32>,
    /// True from a fault of syncs until the next start of the broker: the disk content may differ from the broker's
    /// writes.
    pub(crate) disk_altered: Arc<AtomicBool>,
    /// Maximum additional pause before each journal or sync step, in microseconds.
    slow_us: Arc<AtomicU64>,
}

impl Machine {
    /// Creates a machine in a rack, for a standalone broker or for one broker of several. The broker is not started.
    pub(crate) fn new(id: u32, rack: u32, standalone: bool, meta: SimMeta, shared: Shared) -> Self {
        let settings = ConfigSources::new()
            .flag("broker.id", id.to_string())
            .flag("broker.rack", format!("r{rack}"))
            .flag("broker.data_dir", "/data")
            .flag("cache.disk_bytes", "0")
            .flag("limits.memory_bytes", "2GiB")
            .flag("tier.check_interval", "1s")
            .flag("tier.garbage_grace", format!("{}s", GRACE_INTERVAL.as_secs()))
            .flag("metadata.session_timeout", "2s")
            .flag("replication.max_lag_time", "2s")
            .load();
        let mut config = settings.unwrap_or_else(|error| panic!("{error}")).config;
        // Smaller than the configuration allows, so that within seconds the journal ring wraps and reads miss the tail
        // cache.
        (config.log.journal_bytes, config.log.tail_cache_bytes) = (1 << 20, 64 << 10);
        Self {
            id: BrokerId(id),
            address: format!("b{id}:9460"),
            disk: SimDisk::new(),
            meta,
            config,
            standalone,
            shared,
            starts: 0,
            wall_offset_ms: 0,
            broker: None,
            process: Arc::default(),
            disks: Arc::default(),
            disk_altered: Arc::default(),
            slow_us: Arc::default(),
        }
    }

    /// Restores the power and starts the broker. Retries a second after each failed attempt, and panics after 50
    /// attempts.
    pub(crate) async fn start(&mut self) {
        self.shared.net.power_on(&self.address);
        for _ in 0..50 {
            self.starts += 1;
            let number = self.id.0 * 1000 + self.starts;
            let process = SimProcess::new(number, self.shared.seed ^ (u64::from(number) << 32), self.shared.began);
            process.set_wall_offset(self.wall_offset_ms);
            match process.run(Box::pin(self.open(&process))).await {
                Ok(node) => {
                    self.record(format_args!("started, {} partitions", node.broker().open_partition_count()));
                    self.broker = Some((process, node));
                    self.disk_altered.store(false, Ordering::Relaxed);
                    self.process.store(number, Ordering::Relaxed);
                    return;
                }
                Err(error) => {
                    self.record(format_args!("did not start: {error:#}"));
                    process.kill();
                    self.disk.kill();
                    self.shared.net.hang_up(&self.address, true);
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
        panic!("broker {} does not start", self.id);
    }

    /// Opens the broker in `process`, starts the steps of its log, and listens for clients and peers.
    async fn open(&self, process: &SimProcess) -> anyhow::Result<Node> {
        let wake = Arc::new(Notify::new());
        let woken = Arc::clone(&wake);
        let options = ObjectStoreOptions::new("memory://");
        let objects =
            TierStore::from_object_store(Arc::new(self.shared.objects.clone()), "", &options, &self.config.cluster);
        let meta: Arc<dyn MetaStore> = Arc::new(self.meta.clone());
        let outside = NodeDeps {
            disk: Arc::new(self.disk.clone()),
            stores: Box::pin(async { Ok(StoreHandles { meta, objects: Some(objects) }) }),
            connect: Arc::new(self.shared.net.from(&self.address)),
            standalone: self.standalone,
            sim_hook: Some(SimHook::new(move || wake.notify_one())),
        };
        let endpoints = Endpoints::new(self.address.clone()).with_peer(net::peer_address(&self.address));
        let step = |log: &DataDir| {
            let steps = steps(log.clone(), woken, Arc::clone(&self.slow_us));
            process.enter(|| Tasks::new().spawn("log-steps", steps));
        };
        let serve_peers = |routes| self.shared.net.listen_for_peers(&self.address, routes);
        let node = Node::open(&self.config, outside, endpoints, step, serve_peers).await?;
        process.enter(|| self.shared.net.listen(&self.address, node.routes()));
        Ok(node)
    }

    /// Kills the broker, if it runs. `power` is the seed of a power loss of the machine; with `None` only the process
    /// ends, as by signal 9.
    pub(crate) fn kill(&mut self, power: Option<u64>) {
        let Some((process, node)) = self.broker.take() else { return };
        self.process.store(0, Ordering::Relaxed);
        process.kill();
        match power {
            Some(seed) => self.disk.crash(seed),
            None => self.disk.kill(),
        }
        self.shared.net.hang_up(&self.address, power.is_none());
        process.enter(|| drop(node));
        self.record(format_args!("{}", if power.is_some() { "lost power" } else { "was killed" }));
    }

    /// Stops the broker as an operator does, if it runs. The connections of a clustered broker stay open until the stop
    /// is complete, because the broker first transfers leadership. After an even number of attempts to start, a power
    /// loss follows a successful stop. The power loss must not affect data that was closed cleanly.
    pub(crate) async fn stop(&mut self) {
        let Some((process, node)) = self.broker.take() else { return };
        self.process.store(0, Ordering::Relaxed);
        if self.standalone {
            self.shared.net.hang_up(&self.address, true);
        }
        let stopped = process.run(Box::pin(node.stop())).await;
        self.shared.net.hang_up(&self.address, true);
        match &stopped {
            Ok(()) => self.record(format_args!("stopped")),
            Err(error) => self.record(format_args!("stopped with an error: {error:#}")),
        }
        process.kill();
        if stopped.is_ok() && self.starts.is_multiple_of(2) {
            self.disk.crash(self.shared.seed ^ u64::from(self.starts));
            self.record(format_args!("lost power"));
        }
    }

    /// Removes all files of a stopped broker's disk, as if the disk had been replaced.
    pub(crate) fn wipe(&mut self) {
        for (path, _) in self.disk.files() {
            self.disk.remove(&path).unwrap();
            self.disk.sync_dir(path.parent().unwrap()).unwrap();
        }
        self.disks.fetch_add(1, Ordering::Relaxed);
        self.record(format_args!("has a new disk"));
    }

    /// Makes syncs of files with `part` in their path fail until [`Self::mend`].
    pub(crate) fn fail_syncs(&self, part: &str) {
        self.disk_altered.store(true, Ordering::Relaxed);
        self.disk.fail_syncs(Some(part));
    }

    /// Makes syncs succeed again, after [`Self::fail_syncs`].
    pub(crate) fn mend(&self) {
        self.disk.fail_syncs(None);
    }

    /// Adds up to `us` microseconds to the pause before each journal or sync step from now on.
    pub(crate) fn slow(&self, us: u64) {
        self.slow_us.store(us, Ordering::Relaxed);
    }

    /// Sets the offset of the wall clock from simulated time.
    pub(crate) fn set_clock_offset(&mut self, offset_ms: i64) {
        self.wall_offset_ms = offset_ms;
        if let Some((process, _)) = &self.broker {
            process.set_wall_offset(offset_ms);
        }
        self.record(format_args!("has a clock offset of {offset_ms} ms"));
    }

    /// Returns the metadata snapshot of the broker, if one is running.
    pub(crate) fn metadata_snapshot(&self) -> Option<Arc<MetadataSnapshot>> {
        self.broker.as_ref().map(|(_, node)| node.broker().metadata_snapshot())
    }

    /// Returns true if the broker runs and its health check reports an error.
    pub(crate) fn needs_restart(&self) -> bool {
        self.broker.as_ref().is_some_and(|(_, node)| node.broker().health().is_err())
    }

    pub(crate) fn is_running(&self) -> bool {
        self.broker.is_some()
    }

    /// Returns the number of bytes in the broker's data directory.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.disk.files().iter().filter(|(path, _)| path.starts_with(Path::new("/data"))).map(|(_, bytes)| bytes).sum()
    }

    pub(crate) fn record(&self, what: std::fmt::Arguments<'_>) {
        self.shared.trace.record(format_args!("broker {} {what}", self.id));
    }
}

/// Runs the journal and sync steps of a log, with pauses that stand for the duration of syncs. Outside the simulator,
/// threads of the log do this work.
async fn steps(log: DataDir, wake: Arc<Notify>, slow_us: Arc<AtomicU64>) {
    let pause = async |most_us: u64| {
        let most_us = most_us + slow_us.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_micros(random::in_range(20..most_us))).await;
    };
    let mut synced = clock::monotonic();
    loop {
        let _either = tokio::time::timeout(SYNC_INTERVAL, wake.notified()).await;
        pause(800).await;
        while log.journal_step() {
            // One in twenty journal writes is slow.
            let most = if random::in_range(0..20) == 0 { 20_000 } else { 800 };
            pause(most).await;
        }
        // Synced at random times too, because appends that are too large for the journal wait for this sync.
        if random::in_range(0..4) == 0 || clock::monotonic() - synced > SYNC_INTERVAL {
            log.sync_step();
            synced = clock::monotonic();
        }
    }
}
