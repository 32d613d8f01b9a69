//! The Rust client, while its broker is killed again and again: the client delivers everything, once and in order.
//!
//! `crash` checks that the broker loses no acknowledged record. These tests check the client. Retries of an idempotent
//! producer across kills neither lose nor duplicate records. A following consumer reads every record once, without an
//! error. `STRANDLINE_KILLS` is divided by four for these tests.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use strandline::{
    client::{
        Client, ClientOptions, Consumer, ConsumerOptions, Delivery, NewRecord, OffsetSpec, Producer, ProducerOptions,
    },
    task::{Tasks, clock},
};
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    broker::BrokerInstance,
    crash::{Load, PARTITIONS, SMALL, check_passes, identify, read, restart, setting, value},
    history::{Attempt, Log, Outcome, ReadPass},
    proxy::Proxy,
    wire,
};

pub(crate) const TOPIC: &str = "exactly";

/// Maximum number of unacknowledged records of one producer.
const OUTSTANDING: usize = 100;

/// Sends records until the tasks are cancelled, and then waits for all deliveries. Every record must be acknowledged.
async fn produce(load: Arc<Load>, number: u32, producer: Producer, seed: u64, tasks: Tasks) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut outstanding: VecDeque<(Attempt, Delivery)> = VecDeque::new();
    let mut pace = tokio::time::interval(Duration::from_millis(1));
    while !tasks.is_cancelled() {
        pace.tick().await;
        let payload = load.tick();
        let partition = rng.random_range(0..PARTITIONS);
        let attempt = Attempt {
            log: (0, partition),
            once: true,
            payload,
            producer: number,
            sequence: payload,
            sent: payload,
            responded: 0,
            outcome: Outcome::Unknown,
        };
        let bytes = value(payload);
        let record = NewRecord::value(&bytes).partition(partition.unsigned_abs());
        let delivery = producer.send(TOPIC, record).await.expect("the record is queued");
        outstanding.push_back((attempt, delivery));
        if outstanding.len() > OUTSTANDING {
            complete_delivery(&load, outstanding.pop_front().expect("not empty")).await;
        }
    }
    for one in outstanding {
        complete_delivery(&load, one).await;
    }
    producer.close().await.expect("every record is delivered");
}

/// Waits until a sent record is acknowledged, and adds it to the history. Panics if the delivery fails.
async fn complete_delivery(load: &Load, (attempt, delivery): (Attempt, Delivery)) {
    let ack = delivery.await.unwrap_or_else(|error| panic!("{attempt:?} failed: {error}"));
    let offset = ack.offset.expect("acks=all names the offset").as_i64();
    load.complete(vec![attempt], |_| Outcome::Acknowledged { offset });
}

/// Reads all partitions of the consumer up to the end offsets in `ends`, which are set when the producers have
/// finished. Returns offset and payload number of each record.
async fn consume(
    mut consumer: Consumer,
    mut ends: watch::Receiver<Option<HashMap<Log, i64>>>,
) -> HashMap<Log, Vec<(i64, u64)>> {
    let mut seen: HashMap<Log, Vec<(i64, u64)>> = HashMap::new();
    loop {
        let done = ends.borrow_and_update().as_ref().is_some_and(|ends| {
            ends.iter()
                .all(|(log, end)| seen.get(log).and_then(|records| records.last()).map_or(0, |last| last.0 + 1) >= *end)
        });
        if done {
            return seen;
        }
        tokio::select! {
            biased;
            changed = ends.changed() => changed.expect("the ends are set"),
            record = consumer.next() => {
                let record = record.expect("the consumer continues without a restart");
                let partition = i32::try_from(record.partition).expect("few partitions");
                let id = record.record.value.as_deref().and_then(identify);
                let id = id.unwrap_or_else(|| panic!("corrupt record at {partition}@{}", record.offset));
                seen.entry((0, partition)).or_default().push((record.offset.as_i64(), id));
            }
        }
    }
}

/// Producers and a following consumer, which use the library's client.
pub(crate) struct ClientLoad {
    pub(crate) load: Arc<Load>,
    tasks: Tasks,
    producers: Vec<JoinHandle<()>>,
    consumer: JoinHandle<HashMap<Log, Vec<(i64, u64)>>>,
    end_offsets: watch::Sender<Option<HashMap<Log, i64>>>,
}

impl ClientLoad {
    /// Starts the load on a new topic. The clients connect to `bootstrap`, and the readers at the end connect to
    /// `direct`.
    async fn start(bootstrap: SocketAddr, direct: SocketAddr, rng: &mut StdRng) -> Self {
        wire::create_topic(direct, TOPIC, PARTITIONS.unsigned_abs(), &SMALL).await;
        Self::on_topic(&bootstrap.to_string(), vec![direct], rng).await
    }

    /// Starts the load on the existing topic [`TOPIC`].
    pub(crate) async fn on_topic(bootstrap: &str, direct: Vec<SocketAddr>, rng: &mut StdRng) -> Self {
        Self::with_reader(bootstrap, direct, ConsumerOptions::default(), rng).await
    }

    /// Starts the load as [`ClientLoad::on_topic`] does, with these options for the consumer.
    pub(crate) async fn with_reader(
        bootstrap: &str,
        direct: Vec<SocketAddr>,
        reader: ConsumerOptions,
        rng: &mut StdRng,
    ) -> Self {
        let load = Load::new(direct, vec![TOPIC]);
        let client = Client::connect(bootstrap, ClientOptions::default()).await.expect("the brokers are listed");
        let (tasks, mut producers) = (Tasks::new(), Vec::new());
        for number in 0..2 {
            let producer = client.producer(ProducerOptions::default()).await.expect("an idempotent producer");
            let work = produce(load.clone(), number, producer, rng.random(), tasks.clone());
            producers.push(tasks.spawn("producer", work));
        }
        let options = ClientOptions { metadata_age: Duration::from_secs(1), ..ClientOptions::default() };
        let mut consumer = Client::connect(bootstrap, options).await.expect("the brokers are listed").consumer(reader);
        for partition in 0..PARTITIONS.unsigned_abs() {
            consumer.assign(TOPIC, partition, OffsetSpec::Earliest).await.expect("the partition is there");
        }
        let (end_offsets, ends) = watch::channel(None);
        let consumer = tasks.spawn("consumer", consume(consumer, ends));
        Self { load, tasks, producers, consumer, end_offsets }
    }

    /// Ends the load after this number of injected faults. Every sent record must have been delivered once and
    /// consumed. Returns the number of records.
    pub(crate) async fn finish(self, faults: u64) -> i64 {
        self.tasks.cancel();
        for producer in self.producers {
            producer.await.expect("every record was acknowledged");
        }
        let mut passes = read(&self.load, |_| 0).await;
        let ends: HashMap<Log, i64> = passes.iter().map(|pass| (pass.log, pass.end)).collect();
        self.end_offsets.send(Some(ends.clone())).expect("the consumer still follows");
        // The timeout grows with the number of faults, because each fault delays the consumer.
        let seen = tokio::time::timeout(Duration::from_secs(60 + faults), self.consumer).await;
        for (log, records) in seen.expect("the consumer reaches the ends").expect("the consumer followed") {
            passes.push(ReadPass {
                log,
                began: self.load.tick(),
                from: 0,
                end: ends[&log],
                to: ends[&log],
                current: true,
                records,
            });
        }
        check_passes(&self.load, &passes);
        let total: i64 = ends.values().sum();
        assert_eq!(i64::try_from(self.load.acknowledged()).expect("a count"), total, "each record is in the log once");
        assert!(total > 100, "records were acknowledged: {total}");
        total
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_delivers_once_and_in_order_across_kills() {
    let kills = setting("STRANDLINE_KILLS", 20).div_ceil(4);
    let seed = setting("STRANDLINE_SEED", clock::wall_ms().unsigned_abs());
    println!("crash: {kills} kills under the client, STRANDLINE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut instance = BrokerInstance::new();
    let mut broker = tokio::task::block_in_place(|| instance.start());
    let work = ClientLoad::start(instance.grpc(), instance.grpc(), &mut rng).await;
    for kill in 1..=kills {
        work.load.wait_for_random_progress(&mut rng).await;
        broker = tokio::task::block_in_place(|| restart(&mut instance, broker, &mut rng));
        assert_eq!(instance.grpc(), work.load.address(), "the port of the broker is free");
        println!("crash: kill {kill} of {kills} under the client, {} records so far", work.load.acknowledged());
    }
    let total = work.finish(kills).await;
    println!("crash: {total} records delivered once across {kills} kills");
    assert!(broker.terminate().success(), "{}", instance.log());
}

/// Retries of records whose responses were lost are recognised as duplicates. A kill rarely happens between an append
/// and its response, so a proxy drops responses. After some of these losses the broker is killed or stopped, so
/// recovery must restore the producer state too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_responses_and_kills_duplicate_no_records() {
    let losses = setting("STRANDLINE_KILLS", 32).div_ceil(4);
    let seed = setting("STRANDLINE_SEED", clock::wall_ms().unsigned_abs());
    println!("crash: {losses} losses of responses, STRANDLINE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let proxy = Proxy::bind().await;
    let bootstrap = proxy.address();
    let mut instance = BrokerInstance::new().advertise(bootstrap);
    let mut broker = tokio::task::block_in_place(|| instance.start());
    let link = proxy.forward_to(instance.grpc());
    let work = ClientLoad::start(bootstrap, instance.grpc(), &mut rng).await;
    for loss in 1..=losses {
        work.load.wait_for_random_progress(&mut rng).await;
        let mute = Duration::from_millis(rng.random_range(5..60));
        link.drop_responses(mute).await;
        if rng.random_ratio(1, 4) {
            broker = tokio::task::block_in_place(|| restart(&mut instance, broker, &mut rng));
        }
        println!("crash: loss of responses {loss} of {losses}, {} records so far", work.load.acknowledged());
    }
    let total = work.finish(losses).await;
    println!("crash: {total} records delivered once across {losses} losses of responses");
    link.stop().await;
    assert!(broker.terminate().success(), "{}", instance.log());
}
