//! Metric types and metric families with their labels. A label has few values: names of a fixed set, or the brokers of
//! the cluster. There is no label for topics or partitions.

use std::{sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// A gauge with an integer value.
pub type GaugeU64 = Gauge<u64, AtomicU64>;

/// A gauge with a floating-point value.
pub type GaugeF64 = Gauge<f64, AtomicU64>;

/// Declares a counter family with one label. The counters of the listed names exist from the start.
macro_rules! labelled_counters {
    ($(#[$doc:meta])* $kind:ident, $label:ident { $field:ident }, [$($name:literal),*]) => {
        /// Label of a counter family. Its values are names in the code.
        #[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
        pub struct $label {
            /// Value of the label.
            pub $field: &'static str,
        }

        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $kind(Family<$label, Counter>);

        impl Default for $kind {
            fn default() -> Self {
                let counters = Self(Family::default());
                // Exposed from the start, so that `rate()` sees the first event as an increase from 0.
                $(drop(counters.0.get_or_create(&$label { $field: $name }));)*
                counters
            }
        }

        impl $kind {
            /// Increments the counter with this label.
            pub fn count(&self, $field: &'static str) {
                self.0.get_or_create(&$label { $field }).inc();
            }
        }
    };
}
labelled_counters!(
    /// Counters by error code (`proto::ErrorCode`).
    ErrorCounters, ReasonLabel { reason }, []
);
labelled_counters!(
    /// Counters of elections by cause.
    ElectionCounters, CauseLabel { cause }, ["failed", "controlled_shutdown", "preferred", "unclean"]
);
labelled_counters!(
    /// Counters of the controller's changes by reason.
    ControllerChangeCounters, ChangeReasonLabel { reason }, []
);

/// Label for another broker of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabel {
    peer: u32,
}

/// Counters by peer broker.
#[derive(Clone, Debug, Default)]
pub struct PeerCounters(Family<PeerLabel, Counter>);

impl PeerCounters {
    /// Returns the counter of a broker, and creates it at the first call. Callers that count often store the counter.
    pub fn of(&self, peer: u32) -> Counter {
        self.0.get_or_create(&PeerLabel { peer }).clone()
    }
}

/// Integer gauges, one for each peer broker that currently has a value.
#[derive(Clone, Debug, Default)]
pub struct PeerGauges(Family<PeerLabel, GaugeU64>);

impl PeerGauges {
    /// Removes all gauges, and sets those of these brokers.
    pub fn set_all(&self, values: impl IntoIterator<Item = (u32, u64)>) {
        self.0.clear();
        for (peer, value) in values {
            self.0.get_or_create(&PeerLabel { peer }).set(value);
        }
    }
}

/// Floating-point gauges, one for each peer broker that currently has a value.
#[derive(Clone, Debug, Default)]
pub struct PeerGaugesF64(Family<PeerLabel, GaugeF64>);

impl PeerGaugesF64 {
    /// Removes all gauges, and sets those of these brokers.
    pub fn set_all(&self, values: impl IntoIterator<Item = (u32, Duration)>) {
        self.0.clear();
        for (peer, time) in values {
            self.0.get_or_create(&PeerLabel { peer }).set(time.as_secs_f64());
        }
    }
}

/// Labels for the kind of a request to the metadata store and for its outcome.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabel {
    request: &'static str,
    outcome: &'static str,
}

/// Counters by kind of request and outcome.
#[derive(Clone, Debug, Default)]
pub struct RequestCounters(Family<RequestLabel, Counter>);

impl RequestCounters {
    /// Increments the counter with these labels.
    pub fn count(&self, request: &'static str, outcome: &'static str) {
        self.0.get_or_create(&RequestLabel { request, outcome }).inc();
    }
}

/// Label for the kind of a request to the metadata store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    request: &'static str,
}

/// Histograms of durations by kind of request.
#[derive(Clone, Debug)]
pub struct RequestHistograms(Family<KindLabel, Histogram, fn() -> Histogram>);

impl RequestHistograms {
    /// Records a duration.
    pub fn observe(&self, request: &'static str, took: Duration) {
        self.0.get_or_create(&KindLabel { request }).observe(took.as_secs_f64());
    }
}

/// Label for the source of bytes that were read.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabel {
    /// `memory`, `disk` or `object_store`
    pub source: &'static str,
}

/// Counters of bytes by source.
#[derive(Clone, Debug)]
pub struct SourceCounters {
    family: Family<SourceLabel, Counter>,
    /// Bytes read from the tail cache.
    pub memory: Counter,
    /// Bytes read from segments on local disk.
    pub disk: Counter,
    /// Bytes read from the object store or its chunk cache.
    pub object_store: Counter,
}

impl Default for SourceCounters {
    fn default() -> Self {
        let family = Family::<SourceLabel, Counter>::default();
        // All three counters are created here, so that they are exposed from the start and counting needs no lookup.
        let [memory, disk, object_store] =
            ["memory", "disk", "object_store"].map(|source| family.get_or_create(&SourceLabel { source }).clone());
        Self { family, memory, disk, object_store }
    }
}

/// Label for the role in which a broker served a consumer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RoleLabel {
    /// `leader` or `follower`
    pub role: &'static str,
}

/// Counters of bytes by role.
#[derive(Clone, Debug)]
pub struct RoleCounters {
    family: Family<RoleLabel, Counter>,
    /// Bytes served as leader.
    pub leader: Counter,
    /// Bytes served as in-sync follower.
    pub follower: Counter,
}

impl Default for RoleCounters {
    fn default() -> Self {
        let family = Family::<RoleLabel, Counter>::default();
        let [leader, follower] = ["leader", "follower"].map(|role| family.get_or_create(&RoleLabel { role }).clone());
        Self { family, leader, follower }
    }
}

/// Creates a histogram with buckets from 50 µs to 26 s, each twice the one before.
fn latency_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.000_05, 2.0, 20))
}

/// Requirements of the `metrics!` macro on a metric type.
pub(super) trait MetricKind {
    /// Type in the documentation: counter, gauge or histogram.
    const KIND: &'static str;
    /// Names of the labels, separated by commas.
    const LABELS: &'static str = "";
    /// Suffix that the text formats add to the name.
    const SUFFIX: &'static str = "";
    fn create() -> Self;
    fn register(&self, registry: &mut Registry, name: &str, help: &str);
}

/// Implements [`MetricKind`]. `$create` creates the metric, and `$collector` returns the part that the registry reads.
macro_rules! metric_kind {
    ($kind:ty, $name:literal, $suffix:literal, $labels:literal, $create:expr, $collector:expr) => {
        impl MetricKind for $kind {
            const KIND: &'static str = $name;
            const LABELS: &'static str = $labels;
            const SUFFIX: &'static str = $suffix;
            fn create() -> Self {
                $create
            }
            fn register(&self, registry: &mut Registry, name: &str, help: &str) {
                let to_collector = $collector;
                // The registry adds a full stop to every help text.
                registry.register(name, help.trim_end_matches('.'), to_collector(self));
            }
        }
    };
}
metric_kind!(Counter, "counter", "_total", "", Self::default(), |m: &Self| m.clone());
metric_kind!(GaugeU64, "gauge", "", "", Self::default(), |m: &Self| m.clone());
metric_kind!(Histogram, "histogram", "", "", latency_histogram(), |m: &Self| m.clone());
metric_kind!(ErrorCounters, "counter", "_total", "reason", Self::default(), |m: &Self| m.0.clone());
metric_kind!(SourceCounters, "counter", "_total", "source", Self::default(), |m: &Self| m.family.clone());
metric_kind!(RoleCounters, "counter", "_total", "role", Self::default(), |m: &Self| m.family.clone());
metric_kind!(GaugeF64, "gauge", "", "", Self::default(), |m: &Self| m.clone());
metric_kind!(ElectionCounters, "counter", "_total", "cause", Self::default(), |m: &Self| m.0.clone());
metric_kind!(ControllerChangeCounters, "counter", "_total", "reason", Self::default(), |m: &Self| m.0.clone());
metric_kind!(PeerCounters, "counter", "_total", "peer", Self::default(), |m: &Self| m.0.clone());
metric_kind!(PeerGauges, "gauge", "", "peer", Self::default(), |m: &Self| m.0.clone());
metric_kind!(PeerGaugesF64, "gauge", "", "peer", Self::default(), |m: &Self| m.0.clone());
metric_kind!(RequestCounters, "counter", "_total", "request, outcome", Self::default(), |m: &Self| m.0.clone());
metric_kind!(
    RequestHistograms,
    "histogram",
    "",
    "request",
    Self(Family::new_with_constructor(latency_histogram)),
    |m: &Self| m.0.clone()
);
