//! The tasks of a broker that no request starts, each with the state that it owns.

mod controlled_shutdown;
mod disk_pressure;
pub(super) mod garbage;
mod lag_ticker;
pub(super) mod lease_monitor;
mod maintenance;
mod metrics;
pub(super) mod producer_ids;

use std::{sync::Arc, time::Duration};

pub use self::disk_pressure::starts_under_pressure;
use self::{
    controlled_shutdown::ControlledShutdown, disk_pressure::DiskPressure, garbage::GarbageRun,
    lease_monitor::LeaseMonitor, maintenance::Maintenance, metrics::BrokerGauges, producer_ids::ProducerIds,
};
use super::{SharedState, health::Health, node_context::NodeContext, partitions::table::PartitionTable};
use crate::{
    cluster::{Controller, Session, TierCommits, Topics, planner::PlannerLimits},
    config::ControllerConfig,
    partition::MaintenanceQueue,
};

/// Background tasks of one broker.
pub(super) struct Background {
    ctx: NodeContext,
    partitions: Arc<PartitionTable>,
    health: Arc<Health>,
    topics: Topics,
    commits: TierCommits,
    session: Session,
    pub(super) lease: Arc<LeaseMonitor>,
    pub(super) producer_ids: Arc<ProducerIds>,
    maintenance: Arc<Maintenance>,
    shutdown: ControlledShutdown,
    gauges: BrokerGauges,
}

impl Background {
    pub(super) fn new(ctx: NodeContext, shared: SharedState, queue: MaintenanceQueue, session: Session) -> Self {
        let SharedState { partitions, failures, health, topics, budgets, produce_memory, commits } = shared;
        let lease = Arc::new(LeaseMonitor::new(ctx.clone(), session.clone(), Arc::clone(&health)));
        let maintenance = Maintenance::new(
            ctx.clone(),
            Arc::clone(&partitions),
            failures,
            commits.clone(),
            queue,
            Arc::clone(&lease),
        );
        let gauges = BrokerGauges::new(ctx.clone(), Arc::clone(&partitions), session.clone(), budgets, produce_memory);
        Self {
            producer_ids: Arc::new(ProducerIds::new(&ctx, topics.clone())),
            maintenance: Arc::new(maintenance),
            shutdown: ControlledShutdown::new(&ctx, Arc::clone(&partitions), session.clone()),
            gauges,
            partitions,
            health,
            topics,
            commits,
            ctx,
            session,
            lease,
        }
    }

    /// Starts the tasks that must run before the first role is assigned: producer ids and, in a cluster, lag ticker and
    /// lease monitor.
    pub(super) fn spawn_monitors(&self) {
        let tasks = &self.ctx.tasks;
        if !self.ctx.standalone {
            let partitions = Arc::clone(&self.partitions);
            tasks.spawn_until_cancelled("lag-ticker", async move { lag_ticker::run(&partitions).await });
            let lease = Arc::clone(&self.lease);
            tasks.spawn_until_cancelled("lease-monitor", async move { lease.run().await });
        }
        let producer_ids = Arc::clone(&self.producer_ids);
        tasks.spawn_until_cancelled("producer-ids", async move { producer_ids.keep_filled().await });
    }

    /// Starts the tasks that may run only after the roles are assigned. These are maintenance, garbage collection, the
    /// check whether the start is over, disk pressure and, in a cluster, the controller.
    pub(super) fn spawn_workers(&self) {
        let (ctx, tasks) = (&self.ctx, &self.ctx.tasks);
        self.maintenance.spawn();
        let garbage = GarbageRun::new(ctx.clone(), self.topics.clone(), self.commits.clone());
        tasks.spawn_until_cancelled("garbage", garbage.run());
        let health = Arc::clone(&self.health);
        tasks.spawn_until_cancelled("start", async move { health.watch_start().await });
        let disk_pressure = DiskPressure::new(ctx.clone(), Arc::clone(&self.health), self.session.clone());
        tasks.spawn_until_cancelled("disk-pressure", disk_pressure.run());
        if !ctx.standalone {
            let controller = Controller {
                store: Arc::clone(&ctx.store),
                keys: ctx.keys.clone(),
                metadata: ctx.metadata.clone(),
                session: self.session.clone(),
                id: ctx.id,
                defaults: ctx.config.topic_defaults.clone(),
                limits: planner_limits(&ctx.config.controller),
                metrics: (*ctx.metrics).clone(),
            };
            controller.spawn(&ctx.tasks);
        }
    }

    /// Updates the gauges, as [`BrokerGauges::observe`] does. Only one call may run at a time.
    pub(super) fn observe(&self) {
        self.gauges.observe();
    }

    /// Transfers leaderships and ISR memberships, as [`ControlledShutdown::transfer_leadership`] does.
    pub(super) async fn transfer_leadership(&self, timeout: Duration) {
        self.shutdown.transfer_leadership(timeout).await;
    }
}

fn planner_limits(config: &ControllerConfig) -> PlannerLimits {
    PlannerLimits {
        max_reassignments: config.max_concurrent_reassignments,
        replace_after_ms: config.replace_after.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        balance: config.balance,
        ..PlannerLimits::default()
    }
}
