//! One run: load and faults for some simulated seconds, then peace, then the check.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use strandline::{
    client::{Client, ConsumerOptions, Delivery, NewRecord, NewTopic, OffsetAt, ProducerOptions},
    model::Offset,
    task::{Tasks, random},
};

use crate::{trace::Trace, world::World};

const TOPIC: &str = "events";

/// Producers, each with a sequence of its own.
const PRODUCERS: u32 = 2;

/// Values of one producer that are under way at most.
const OUTSTANDING: u64 = 8;

/// The longest pause of a producer between two values.
const PAUSE_MICROS: u64 = 6_000;

/// How many faults a run has.
const FAULTS: u32 = 8;

/// How long peace may take until everything is answered.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long reading the whole log may take.
const READING: Duration = Duration::from_secs(20);

/// What the producers were told: the offset of each of their values.
type Acked = Arc<Mutex<BTreeMap<(u32, u64), Offset>>>;

/// Runs a seed and gives its trace.
pub(crate) fn run(seed: u64) -> String {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true);
    #[cfg(tokio_unstable)]
    builder.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_be_bytes()));
    let runtime = builder.build().unwrap();
    runtime.block_on(async {
        let mut world = World::new(seed);
        let outside = world.outside.clone();
        outside.run(Box::pin(live(&mut world))).await;
        world.trace.text()
    })
}

async fn live(world: &mut World) {
    world.start().await;
    let client = world.client().await;
    let topic = NewTopic::new(TOPIC)
        .config("segment.bytes", "16384")
        .config("retention.ms", "-1")
        .config("local.retention.bytes", "40000");
    client.admin().create_topic(&topic).await.unwrap();
    let (load, acked, stop) = (Tasks::new(), Acked::default(), Tasks::new());
    let producers = (0..PRODUCERS).map(|number| {
        load.spawn("producer", produce(client.clone(), number, acked.clone(), world.trace.clone(), stop.clone()))
    });
    let producers: Vec<_> = producers.collect();
    for _ in 0..FAULTS {
        tokio::time::sleep(Duration::from_millis(random::in_range(50..1500))).await;
        fault(world).await;
    }
    stop.cancel();
    let answered = tokio::time::timeout(PATIENCE, futures::future::join_all(producers)).await;
    let answered = answered
        .unwrap_or_else(|_| panic!("every send is answered once the faults have stopped\n{}", world.trace.text()));
    assert!(answered.iter().all(Result::is_ok), "a send failed: see above");
    check(&client, &acked, &world.trace).await;
    world.stop().await;
    world.trace.note(format_args!("{} bytes on the disk", world.disk_bytes()));
    world.start().await;
    check(&client, &acked, &world.trace).await;
    world.kill(None);
}

/// One fault, and its end.
async fn fault(world: &mut World) {
    let lasts = Duration::from_millis(random::in_range(1..2000));
    match random::in_range(0..8) {
        0 | 7 => world.kill(Some(random::bits())),
        1 => world.kill(None),
        2 => world.stop().await,
        3 => {
            world.trace.note(format_args!("links break"));
            world.net.reset();
        }
        4 => {
            world.trace.note(format_args!("links stall"));
            world.net.stall(true);
            tokio::time::sleep(lasts).await;
            world.net.stall(false);
            return;
        }
        5 => {
            world.trace.note(format_args!("the bucket fails"));
            world.objects.fail(random::in_range(10..100));
            tokio::time::sleep(lasts * 3).await;
            world.objects.fail(0);
            return;
        }
        _ => {
            world.trace.note(format_args!("the disk is full"));
            world.disk.set_capacity(Some(world.disk_bytes() + random::in_range(0..20_000)));
            tokio::time::sleep(lasts).await;
            world.disk.set_capacity(None);
            return;
        }
    }
    tokio::time::sleep(lasts).await;
    if !world.is_running() {
        world.start().await;
    }
}

/// Sends values in order, a few under way at the same time.
async fn produce(client: Client, producer: u32, acked: Acked, trace: Trace, stop: Tasks) {
    let options = ProducerOptions { delivery_timeout: PATIENCE, ..ProducerOptions::default() };
    let sender = loop {
        match client.producer(options.clone()).await {
            Ok(sender) => break sender,
            Err(error) => trace.note(format_args!("{producer}: no producer: {error}")),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let settle = async |(number, delivery): (u64, Delivery)| {
        let ack = delivery.await.unwrap_or_else(|error| panic!("{producer} {number}: {error}\n{}", trace.text()));
        let offset = ack.offset.expect("acknowledged by all");
        trace.note(format_args!("{producer}: {number} is at {offset}"));
        acked.lock().unwrap().insert((producer, number), offset);
    };
    let mut outstanding = VecDeque::new();
    let mut number = 0_u64;
    while !stop.is_cancelled() {
        let mut value = format!("{producer} {number} ").into_bytes();
        value.resize(value.len() + random::in_range(0..3000), b'x');
        let sent = sender.send(TOPIC, NewRecord::value(&value)).await;
        let delivery = sent.unwrap_or_else(|error| panic!("{producer} {number}: {error}\n{}", trace.text()));
        outstanding.push_back((number, delivery));
        number += 1;
        if outstanding.len() as u64 > random::in_range(1..OUTSTANDING) {
            settle(outstanding.pop_front().unwrap()).await;
        }
        tokio::time::sleep(Duration::from_micros(random::in_range(0..PAUSE_MICROS))).await;
    }
    for one in outstanding {
        settle(one).await;
    }
    sender.close().await.unwrap();
}

/// Everything that was acknowledged is there at its offset, once, in its producer's order.
async fn check(client: &Client, acked: &Acked, trace: &Trace) {
    let acked = acked.lock().unwrap().clone();
    let found = tokio::time::timeout(READING, read(client)).await;
    let found = found.unwrap_or_else(|_| panic!("the log is read in time\n{}", trace.text()));
    for (sent, offset) in &acked {
        assert_eq!(found.get(offset), Some(sent), "what was acknowledged at {offset}\n{}", trace.text());
    }
    for producer in 0..PRODUCERS {
        let numbers: Vec<u64> = found.values().filter(|(of, _)| *of == producer).map(|(_, number)| *number).collect();
        let expected: Vec<u64> = (0..numbers.len() as u64).collect();
        assert_eq!(numbers, expected, "producer {producer}: once, in order, without a gap\n{}", trace.text());
    }
    trace.note(format_args!("{} records are there", found.len()));
}

/// The whole log: whose value lies at each offset.
async fn read(client: &Client) -> BTreeMap<Offset, (u32, u64)> {
    let end = loop {
        match client.admin().offset(TOPIC, 0, OffsetAt::Latest).await {
            Ok(end) => break end,
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    };
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign_at(TOPIC, 0, Offset::ZERO).await.unwrap();
    let (mut found, mut next) = (BTreeMap::new(), Offset::ZERO);
    while next < end {
        let read = consumer.next().await.unwrap();
        assert_eq!(read.offset, next, "offsets follow each other");
        let value = read.record.value.unwrap();
        let text = String::from_utf8(value.to_vec()).unwrap();
        let mut words = text.split(' ').map(|word| word.parse::<u64>());
        let (producer, number) = (words.next().unwrap().unwrap(), words.next().unwrap().unwrap());
        found.insert(read.offset, (u32::try_from(producer).unwrap(), number));
        next = read.offset.plus(1);
    }
    consumer.close().await;
    found
}
