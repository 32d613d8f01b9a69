//! The kinds of metrics, and the labels by which some are counted apart. Every label has few values: words of a fixed set, or the
//! brokers of one cluster. Nothing is counted by partition or by topic.

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

/// A gauge of bytes or things.
pub type Level = Gauge<u64, AtomicU64>;

/// A gauge of seconds.
pub type Seconds = Gauge<f64, AtomicU64>;

macro_rules! counted {
    ($(#[$doc:meta])* $kind:ident, $label:ident { $field:ident }, [$($word:literal),*]) => {
        /// The label of a counter: a word of a fixed set.
        #[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
        pub struct $label {
            /// The word.
            pub $field: &'static str,
        }

        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $kind(Family<$label, Counter>);

        impl Default for $kind {
            fn default() -> Self {
                let counted = Self(Family::default());
                // There from the start: the first of its kind is a rise from 0, and not a new line.
                $(drop(counted.0.get_or_create(&$label { $field: $word }));)*
                counted
            }
        }

        impl $kind {
            /// Counts one.
            pub fn count(&self, $field: &'static str) {
                self.0.get_or_create(&$label { $field }).inc();
            }
        }
    };
}
counted!(
    /// Failures by the word of a `proto::fault::Reason`.
    Errors, ReasonLabel { reason }, []
);
counted!(
    /// Elections by what made them necessary.
    Elections, CauseLabel { cause }, ["failed", "handover", "preferred", "unclean"]
);
counted!(
    /// Steps of the controller by the rule that asked for them.
    Steps, RuleLabel { rule }, []
);

/// Another broker of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabel {
    peer: u32,
}

/// One counter for each other broker.
#[derive(Clone, Debug, Default)]
pub struct ByPeer(Family<PeerLabel, Counter>);

impl ByPeer {
    /// That of one broker. Ask once and keep it where things are counted often.
    pub fn of(&self, peer: u32) -> Counter {
        self.0.get_or_create(&PeerLabel { peer }).clone()
    }
}

/// One gauge of things for each other broker.
#[derive(Clone, Debug, Default)]
pub struct PeerLevels(Family<PeerLabel, Level>);

impl PeerLevels {
    /// These brokers and no others have a value.
    pub fn set_all(&self, all: impl IntoIterator<Item = (u32, u64)>) {
        self.0.clear();
        for (peer, value) in all {
            self.0.get_or_create(&PeerLabel { peer }).set(value);
        }
    }
}

/// One gauge of seconds for each other broker.
#[derive(Clone, Debug, Default)]
pub struct PeerSeconds(Family<PeerLabel, Seconds>);

impl PeerSeconds {
    /// These brokers and no others have a value.
    pub fn set_all(&self, all: impl IntoIterator<Item = (u32, Duration)>) {
        self.0.clear();
        for (peer, time) in all {
            self.0.get_or_create(&PeerLabel { peer }).set(time.as_secs_f64());
        }
    }
}

/// What was asked of the metadata store, and how that ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabel {
    request: &'static str,
    outcome: &'static str,
}

/// Requests by what is asked and how it ended.
#[derive(Clone, Debug, Default)]
pub struct Requests(Family<RequestLabel, Counter>);

impl Requests {
    /// Counts one.
    pub fn count(&self, request: &'static str, outcome: &'static str) {
        self.0.get_or_create(&RequestLabel { request, outcome }).inc();
    }
}

/// What was asked of the metadata store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    request: &'static str,
}

/// The time that requests took, by what is asked.
#[derive(Clone, Debug)]
pub struct RequestSeconds(Family<KindLabel, Histogram, fn() -> Histogram>);

impl RequestSeconds {
    /// Notes one.
    pub fn observe(&self, request: &'static str, took: Duration) {
        self.0.get_or_create(&KindLabel { request }).observe(took.as_secs_f64());
    }
}

/// Where bytes were read from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabel {
    /// `memory`, `disk` or `bucket`
    pub source: &'static str,
}

/// One counter for each place that bytes are read from.
#[derive(Clone, Debug)]
pub struct BySource {
    family: Family<SourceLabel, Counter>,
    /// The tail in memory.
    pub memory: Counter,
    /// Segments on local disk.
    pub disk: Counter,
    /// The object store, or what is cached of it.
    pub bucket: Counter,
}

impl Default for BySource {
    fn default() -> Self {
        let family = Family::<SourceLabel, Counter>::default();
        // Made once: counting is then one addition, and all three are there from the start.
        let [memory, disk, bucket] =
            ["memory", "disk", "bucket"].map(|source| family.get_or_create(&SourceLabel { source }).clone());
        Self { family, memory, disk, bucket }
    }
}

/// What served bytes to a consumer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RoleLabel {
    /// `leader` or `follower`
    pub role: &'static str,
}

/// One counter for each role in which a broker serves consumers.
#[derive(Clone, Debug)]
pub struct ByRole {
    family: Family<RoleLabel, Counter>,
    /// It leads the partition.
    pub leader: Counter,
    /// It follows, and is in sync.
    pub follower: Counter,
}

impl Default for ByRole {
    fn default() -> Self {
        let family = Family::<RoleLabel, Counter>::default();
        let [leader, follower] = ["leader", "follower"].map(|role| family.get_or_create(&RoleLabel { role }).clone());
        Self { family, leader, follower }
    }
}

/// Seconds from 50 µs to 26 s, each bucket double the one before.
fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.000_05, 2.0, 20))
}

/// What a declaration needs of its kind: a fresh one, the part that is registered, and its type in words.
pub(super) trait Metric {
    const KIND: &'static str;
    const LABELS: &'static str = "";
    /// What the text format adds to the name.
    const SUFFIX: &'static str = "";
    fn fresh() -> Self;
    fn register(&self, registry: &mut Registry, name: &str, help: &str);
}

macro_rules! metric {
    ($kind:ty, $word:literal, $suffix:literal, $labels:literal, $fresh:expr, $part:expr) => {
        impl Metric for $kind {
            const KIND: &'static str = $word;
            const LABELS: &'static str = $labels;
            const SUFFIX: &'static str = $suffix;
            fn fresh() -> Self {
                $fresh
            }
            fn register(&self, registry: &mut Registry, name: &str, help: &str) {
                let part = $part;
                // The registry ends every help text with a full stop of its own.
                registry.register(name, help.trim_end_matches('.'), part(self));
            }
        }
    };
}
metric!(Counter, "counter", "_total", "", Self::default(), |m: &Self| m.clone());
metric!(Level, "gauge", "", "", Self::default(), |m: &Self| m.clone());
metric!(Histogram, "histogram", "", "", histogram(), |m: &Self| m.clone());
metric!(Errors, "counter", "_total", "reason", Self::default(), |m: &Self| m.0.clone());
metric!(BySource, "counter", "_total", "source", Self::default(), |m: &Self| m.family.clone());
metric!(ByRole, "counter", "_total", "role", Self::default(), |m: &Self| m.family.clone());
metric!(Seconds, "gauge", "", "", Self::default(), |m: &Self| m.clone());
metric!(Elections, "counter", "_total", "cause", Self::default(), |m: &Self| m.0.clone());
metric!(Steps, "counter", "_total", "rule", Self::default(), |m: &Self| m.0.clone());
metric!(ByPeer, "counter", "_total", "peer", Self::default(), |m: &Self| m.0.clone());
metric!(PeerLevels, "gauge", "", "peer", Self::default(), |m: &Self| m.0.clone());
metric!(PeerSeconds, "gauge", "", "peer", Self::default(), |m: &Self| m.0.clone());
metric!(Requests, "counter", "_total", "request, outcome", Self::default(), |m: &Self| m.0.clone());
metric!(RequestSeconds, "histogram", "", "request", Self(Family::new_with_constructor(histogram)), |m: &Self| m
    .0
    .clone());
