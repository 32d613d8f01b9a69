//! One run: load and faults for some simulated seconds, then recovery without faults, then the checks.

use std::{fmt, time::Duration};

use futures::future::{join_all, join4};
use strandline::{
    client::{Client, NewTopic},
    cluster::PartitionValue,
    model::PartitionId,
    task::{Tasks, clock, random},
};

use crate::{
    checker::StateChecker,
    faults::{self, FaultPlan, FaultProfile},
    liveness,
    load::{ClientHistory, Load, READ_TIMEOUT, RESPONSE_TIMEOUT, RetentionProfile, TOPICS},
    operator::Operator,
    panics,
    reference::ReferenceModel,
    trace,
    world::Simulation,
};

/// Topology and fault phase of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Topology {
    /// Number of brokers of most runs. One run in six has one or two more, up to `max_brokers`.
    pub(crate) brokers: u32,
    pub(crate) max_brokers: u32,
    pub(crate) racks: u32,
    /// Duration of the fault phase.
    pub(crate) fault_duration: Duration,
    /// Fault profile; `None` draws one for each run.
    pub(crate) theme: Option<FaultProfile>,
}

impl Topology {
    /// One standalone broker. A real one has its metadata store in its data directory, so no faults are injected into
    /// the link to the store.
    pub(crate) const ONE: Self =
        Self { brokers: 1, max_brokers: 1, racks: 1, fault_duration: Duration::from_secs(12), theme: None };
    /// Three to five brokers in three racks.
    pub(crate) const THREE: Self =
        Self { brokers: 3, max_brokers: 5, racks: 3, fault_duration: Duration::from_secs(15), theme: None };

    /// Returns the same topology with a fixed fault profile.
    pub(crate) const fn with_profile(self, theme: FaultProfile) -> Self {
        Self { theme: Some(theme), ..self }
    }

    /// Returns the topology for a seed. One seed in six has one or two more brokers, up to `max_brokers`, so that there
    /// are more brokers than replicas of a partition.
    fn for_seed(self, seed: u64) -> Self {
        let more = if seed.is_multiple_of(6) { u32::try_from(seed / 6 % 2).unwrap_or(0) + 1 } else { 0 };
        Self { brokers: (self.brokers + more).min(self.max_brokers), ..self }
    }

    /// Returns the part of the test name that selects this topology's test.
    pub(crate) fn test(self) -> &'static str {
        if self.brokers == 1 { "one_broker" } else { "three_brokers" }
    }
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} broker{}", self.brokers, if self.brokers == 1 { "" } else { "s" })
    }
}

/// Interval between two checks of the machines during the fault phase.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// Maximum number of retries of a read whose start offset is below the log start, because retention moved the log start
/// meanwhile. Few are needed, because no client writes at that time.
const MAX_READ_RETRIES: u32 = 10;

/// Maximum time after the faults, or after the last start, until every replica is in sync.
const IN_SYNC_TIMEOUT: Duration = Duration::from_secs(90);

/// Runs a seed and returns its trace. Panics if a check fails; [`trace::last`] then returns the trace.
pub(crate) fn run(shape: Topology, seed: u64) -> String {
    let shape = shape.for_seed(seed);
    simulate(shape, seed, async |world| run_cluster(world, shape).await)
}

/// Runs `body` in a simulation of this seed and returns the trace. Panics if `body` or a task panics, or if a rule was
/// violated.
pub(crate) fn simulate(shape: Topology, seed: u64, body: impl AsyncFnOnce(&mut Simulation)) -> String {
    panics::start_recording();
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true);
    #[cfg(tokio_unstable)]
    builder.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_be_bytes()));
    let runtime = builder.build().unwrap();
    let simulated = async {
        let mut world = Simulation::new(shape, seed);
        let outside = world.outside.clone();
        outside.run(Box::pin(body(&mut world))).await;
    };
    trace::with_log(|| runtime.block_on(simulated));
    panics::check();
    trace::last()
}

/// Starts the brokers, runs the load with faults, and then checks that all replicas recover. The check follows once
/// after the faults and once after a power loss or stop of all machines.
async fn run_cluster(world: &mut Simulation, shape: Topology) {
    let model = ReferenceModel::watch(world);
    join_all(world.machines.iter_mut().map(|machine| Box::pin(machine.start()))).await;
    let client = world.client().await;
    let keeps = RetentionProfile::of(world.shared.seed);
    let (partitions, power) = create_topics(&client, shape, keeps).await;
    let (client_history, trace) = (ClientHistory::default(), world.shared.trace.clone());
    let stop = Tasks::new();
    let load = Load {
        client: client.clone(),
        client_history: client_history.clone(),
        trace: trace.clone(),
        stop: stop.clone(),
        partitions,
        keeps,
    };
    let operator = Operator {
        client: client.clone(),
        trace: trace.clone(),
        stop: stop.clone(),
        partitions: load.partitions.clone(),
        brokers: shape.brokers,
    };
    let operated = shape.brokers > 3 || shape.brokers == 3 && random::in_range(0..4) == 0;
    let mut checker =
        StateChecker::new(world.machine_views(), world.store.clone(), client_history.clone(), trace.clone(), model);

    let tasks = Tasks::new();
    let alone = shape.brokers == 1;
    let clients = [
        tasks.spawn("producer", load.clone().produce(0)),
        tasks.spawn("producer", load.clone().produce(1)),
        tasks.spawn("plain-producer", load.clone().produce_without_idempotence(2)),
        tasks.spawn("reader", load.clone().read(alone)),
    ];
    let operator = operated.then(|| tasks.spawn("operator", operator.run()));
    run_fault_phase(world, shape, power, &mut checker).await;
    trace.record(format_args!("end of the faults"));
    stop.cancel();
    let operator_result = tokio::time::timeout(RESPONSE_TIMEOUT, join_all(operator)).await;
    panics::check();
    assert!(operator_result.is_ok(), "every operation has a response after the faults");
    wait_until_in_sync(&checker, shape).await;
    let clients_result = tokio::time::timeout(RESPONSE_TIMEOUT, join_all(clients)).await;
    panics::check();
    assert!(clients_result.is_ok(), "every send has a response after the faults");
    check(&load, &mut checker).await;
    liveness::wait_for_caches_and_uploads(world, &checker).await;
    // The same conditions must hold after a power loss of all machines. In runs in which a power loss may lose records,
    // a clean stop replaces it.
    for machine in &mut world.machines {
        if power { machine.kill(Some(random::bits())) } else { machine.stop().await }
    }
    join_all(world.machines.iter_mut().map(|machine| Box::pin(machine.start()))).await;
    wait_until_in_sync(&checker, shape).await;
    check(&load, &mut checker).await;
    liveness::wait_for_caches_and_uploads(world, &checker).await;
    if random::in_range(0..4) == 0 {
        liveness::wait_for_garbage_collection(world, &checker).await;
    }
    for machine in &mut world.machines {
        trace.record(format_args!("{} bytes on the disk of broker {}", machine.disk_bytes(), machine.id));
        machine.kill(None);
    }
    tasks.stop().await;
}

/// Creates a random number of topics with random settings. Returns the number of partitions of each, and true if
/// acknowledged records survive a power loss on any machine.
async fn create_topics(client: &Client, shape: Topology, keeps: RetentionProfile) -> (Vec<u32>, bool) {
    let power = shape.brokers == 1 || random::in_range(0..3) > 0 && shape.theme != Some(FaultProfile::OneDown);
    let mut partitions = Vec::new();
    for name in &TOPICS[..random::in_range(1..=TOPICS.len())] {
        let count = random::in_range(1..=2);
        let mut topic = NewTopic::new(name)
            .partitions(count)
            .replication_factor(shape.brokers.min(3))
            .config("segment.bytes", "16384")
            .config("retention.ms", "-1")
            // Clocks jump by hours. This limit is high enough that no record is rejected for its timestamp.
            .config("message.timestamp.after.max.ms", "31536000000")
            .config("local.retention.bytes", "40000");
        if keeps == RetentionProfile::Last {
            topic = topic.config("retention.bytes", "80000");
        }
        if shape.brokers > 1 {
            topic = topic.config("min.insync.replicas", if random::in_range(0..2) == 0 { "1" } else { "2" });
        }
        if !power && random::in_range(0..2) == 0 {
            topic = topic.config("durability", "replicated");
        }
        // If only the response was lost, the topic exists, and no further attempt is needed.
        while let Err(error) = client.admin().create_topic(&topic).await {
            if client.admin().describe_topic(name).await.is_ok() {
                break;
            }
            drop(error);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        partitions.push(count);
    }
    (partitions, power)
}

/// Injects faults until the end of the fault phase, and runs the checker at intervals.
async fn run_fault_phase(world: &mut Simulation, shape: Topology, power: bool, checker: &mut StateChecker) {
    let plan = FaultPlan::draw(shape, power);
    let (names, shared) = (world.names(), world.shared.clone());
    let metas: Vec<_> = world.machines.iter().map(|machine| machine.meta.clone()).collect();
    let machines =
        join_all(world.machines.iter_mut().map(|machine| Box::pin(faults::inject_on_machine(machine, &plan))));
    let metadata = async {
        // A real standalone broker has no link to a metadata store: its metadata is in its data directory.
        if metas.len() > 1 {
            faults::inject_on_metadata(&shared, &metas, &plan).await;
        }
    };
    let checks = async {
        while !plan.is_over() {
            tokio::time::sleep(CHECK_INTERVAL).await;
            panics::check();
            checker.check_machines().await;
        }
    };
    join4(machines, faults::inject_on_network(&shared, &names, &plan), metadata, checks).await;
}

/// Waits until [`check_in_sync`] succeeds for every partition. Panics after [`IN_SYNC_TIMEOUT`].
async fn wait_until_in_sync(checker: &StateChecker, shape: Topology) {
    let until = clock::monotonic() + IN_SYNC_TIMEOUT;
    loop {
        panics::check();
        let partitions = checker.partitions().await;
        let behind = partitions.iter().find_map(|(log, id, value)| {
            let reason = check_in_sync(checker, *id, value).err()?;
            Some(format!("{log:?} of {} brokers is not in sync: {reason}: {value:?}", shape.brokers))
        });
        let Some(behind) = behind else { break };
        assert!(clock::monotonic() < until, "{behind}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Returns an error with the reason unless the partition has a leader and no ELR, and no reassignment is in progress.
/// All its replicas must also be in sync with the same log end.
fn check_in_sync(checker: &StateChecker, id: PartitionId, value: &PartitionValue) -> Result<(), String> {
    let moving = value.adding.len() + value.removing.len() + value.elr.len();
    if value.leader.is_none() || value.isr.len() < value.replicas.len() || moving > 0 {
        return Err("no leader, not in sync, or a reassignment".to_owned());
    }
    let machines_of_partition = checker.machines.iter().filter(|machine| value.replicas.contains(&machine.id));
    let ends: Vec<_> = machines_of_partition.map(|machine| machine.logs.replica(id).end).collect();
    if ends.iter().any(|end| *end != ends[0]) {
        return Err(format!("logs end at {ends:?}"));
    }
    Ok(())
}

/// Checks the machines, reads every log to its end, and checks the client history with these reads.
async fn check(load: &Load, checker: &mut StateChecker) {
    checker.check_machines().await;
    for (log, _, _) in checker.partitions().await {
        let mut read = load.read_log(log, true, true, READ_TIMEOUT).await;
        // Retention may move the log start during the read, and the read is then retried.
        for _ in 0..MAX_READ_RETRIES {
            if load.keeps == RetentionProfile::Last
                && read.as_ref().is_err_and(|error| error.contains("is out of range"))
            {
                read = load.read_log(log, true, true, READ_TIMEOUT).await;
            }
        }
        assert_eq!(read, Ok(()), "{log:?} is not readable to its end");
    }
    let found = load.client_history.history().check();
    assert!(found.is_empty(), "{found:?}");
    panics::check();
    load.trace.record(format_args!("{} acknowledged", load.client_history.history().attempts.len()));
}
