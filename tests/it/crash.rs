//! The real process, killed with signal 9 at random moments under load: what was acknowledged stays.
//!
//! Several producers pipeline into several partitions of two topics, one for each durability. Segments are small and soon
//! evicted, so that kills hit rolls, uploads, manifest commits and evictions too; some hit the recovery from the kill
//! before, and some are polite stops. `history` judges. Every payload can be told from its own number, so damage shows.
//!
//! While the producers go on, a reader goes on in every partition after each start from a little below where the one before
//! it ended, and looks at a piece of the history at a place drawn by lot. So a kill costs the same whether it is the
//! first or the last, every record is read soon after it was written, and old ones again after later kills. At the end
//! everything is read once more and must be what all those readers saw.
//!
//! `STRANDLINE_KILLS` says how often (`make crash-test`: 200), `STRANDLINE_SEED` repeats a run's choices, though not the
//! scheduler's.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use strandline::{
    proto::{
        fault::{Fault, Reason},
        v1::{ProduceRequest, ProduceResponse, produce_response::Result as Answer},
    },
    task::{Tasks, clock},
};
use tokio::{net::TcpStream, sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    broker::{Broker, Home},
    history::{Attempt, History, Log, Outcome, Pass},
    test_timeout::eventually_async,
    wire,
};

const TOPICS: [(&str, &str); 2] = [("synced", "persisted"), ("cached", "replicated")];
/// Segments that are soon sealed, uploaded and evicted.
pub(crate) const SMALL: [(&str, &str); 4] =
    [("segment.bytes", "65536"), ("segment.ms", "500"), ("local.retention.bytes", "200000"), ("retention.ms", "-1")];
pub(crate) const PARTITIONS: i32 = 3;
const PRODUCERS: u32 = 3;
const WINDOW: usize = 16;
/// Requests of all producers together from one kill to the next.
const REQUESTS: u64 = 1000;

/// How many records below the last end that was seen a reader starts over after each kill.
const OVERLAP: i64 = 200;
/// Most records of the piece of history that is looked at after each kill.
const PIECE: i64 = 1000;

/// Records of one log that are read before it is asked again who leads it.
const READ_AT_ONCE: i64 = 20_000;

/// After how many kills everything that was seen so far is judged, and progress is told. The first ones each, because most
/// runs are short.
const ROUND: u64 = 20;

/// The number of a setting of the environment.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// What producers and readers share.
pub(crate) struct Load {
    /// The brokers: any of them tells who leads.
    addresses: Vec<SocketAddr>,
    /// The topics, each with [`PARTITIONS`] partitions.
    topics: Vec<&'static str>,
    /// The counter that is the history's time, and its payloads' identity.
    time: AtomicU64,
    attempts: Mutex<Vec<Attempt>>,
    /// When something was acknowledged, and where.
    moments: Mutex<Vec<(Log, Instant)>>,
    /// Requests that producers may still send before the next kill. Without a bound a slow machine would be given more
    /// to write while it reads than it can ever read.
    budget: AtomicU64,
}

impl Load {
    pub(crate) fn new(addresses: Vec<SocketAddr>, topics: Vec<&'static str>) -> Arc<Self> {
        let budget = AtomicU64::new(REQUESTS);
        let (attempts, moments) = (Mutex::default(), Mutex::default());
        Arc::new(Self { addresses, topics, time: AtomicU64::new(0), attempts, moments, budget })
    }

    /// The broker, where there is one.
    pub(crate) fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// The broker that serves a log.
    async fn serving(&self, log: Log) -> SocketAddr {
        if self.addresses.len() == 1 {
            return self.addresses[0];
        }
        let known = || wire::leader(&self.addresses, self.topics[log.0], log.1);
        eventually_async("the log has a leader", known).await
    }

    /// How long nothing was acknowledged in a log, at the longest, since `since`; `None` before it has been acknowledged often enough
    /// that it goes on.
    pub(crate) fn longest_silence(&self, log: Log, since: Instant) -> Option<Duration> {
        let moments = self.moments.lock().expect("no holder panics");
        let here: Vec<Instant> =
            moments.iter().filter(|(of, at)| *of == log && *at >= since).map(|(_, at)| *at).collect();
        let before = std::iter::once(&since).chain(&here);
        (here.len() >= 20).then(|| before.zip(&here).map(|(one, next)| *next - *one).max().expect("not empty"))
    }

    /// Lets the producers go on until the next kill.
    fn grant(&self) {
        self.budget.store(REQUESTS, Ordering::Relaxed);
    }

    /// A moment of the load to strike at: when so many of its events, by chance, have happened.
    pub(crate) async fn moment(&self, rng: &mut StdRng) {
        let at = self.time.load(Ordering::SeqCst) + rng.random_range(1..REQUESTS);
        eventually_async("the load goes on", || async { (self.time.load(Ordering::SeqCst) >= at).then_some(()) }).await;
    }

    fn spend(&self) -> bool {
        self.budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    pub(crate) fn tick(&self) -> u64 {
        self.time.fetch_add(1, Ordering::SeqCst) + 1
    }

    pub(crate) fn conclude(&self, attempts: Vec<Attempt>, outcome: impl Fn(i64) -> Outcome) {
        let answered = self.tick();
        let now = clock::monotonic();
        let acknowledged = (0..).zip(&attempts).filter(|(n, _)| matches!(outcome(*n), Outcome::Acknowledged { .. }));
        let moments: Vec<_> = acknowledged.map(|(_, one)| (one.log, now)).collect();
        self.moments.lock().expect("no holder panics").extend(moments);
        let settled = (0..).zip(attempts).map(|(n, one)| Attempt { answered, outcome: outcome(n), ..one });
        self.attempts.lock().expect("no holder panics").extend(settled);
    }

    pub(crate) fn acknowledged(&self) -> usize {
        let attempts = self.attempts.lock().expect("no holder panics");
        attempts.iter().filter(|one| matches!(one.outcome, Outcome::Acknowledged { .. })).count()
    }
}

/// The bytes of payload number `id`: the number, then a filler of some length that follows from it.
pub(crate) fn value(id: u64) -> Bytes {
    let mut state = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let length = if id.is_multiple_of(997) { 40_000 } else { next() % 1500 };
    let mut out = id.to_be_bytes().to_vec();
    out.extend((0..length).map(|_| next().to_le_bytes()[0]));
    out.into()
}

/// The number of a payload whose every byte is right.
pub(crate) fn identify(bytes: &[u8]) -> Option<u64> {
    let id = u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?);
    (*value(id) == *bytes).then_some(id)
}

/// One producer: session after session until the load ends.
async fn produce(load: Arc<Load>, producer: u32, seed: u64, tasks: Tasks) {
    let mut rng = StdRng::seed_from_u64(seed);
    while !tasks.is_cancelled() {
        let mut pending = HashMap::new();
        session(&load, producer, &mut rng, &tasks, &mut pending).await;
        // The connection is gone: nobody will ever say what became of these.
        for attempts in pending.into_values() {
            load.conclude(attempts, |_| Outcome::Unknown);
        }
        tokio::select! {
            biased;
            () = tasks.cancelled() => {}
            () = eventually_async("the broker listens", || async { TcpStream::connect(load.address()).await.ok().map(drop) }) => {}
        }
    }
}

/// One connection: keeps a window of requests under way until it breaks.
async fn session(
    load: &Load,
    producer: u32,
    rng: &mut StdRng,
    tasks: &Tasks,
    pending: &mut HashMap<u64, Vec<Attempt>>,
) {
    let (requests, outgoing) = mpsc::channel(WINDOW);
    let mut log = wire::log(load.address());
    let opened = tokio::time::timeout(Duration::from_secs(5), log.produce(ReceiverStream::new(outgoing))).await;
    let Ok(Ok(answers)) = opened else { return };
    let mut answers: Streaming<ProduceResponse> = answers.into_inner();
    let mut pace = tokio::time::interval(Duration::from_millis(3));
    loop {
        tokio::select! {
            biased;
            () = tasks.cancelled() => return,
            answer = answers.message() => match answer {
                Ok(Some(answer)) => settle(load, pending, answer),
                Ok(None) | Err(_) => return,
            },
            _ = pace.tick(), if pending.len() < WINDOW => {
                if !load.spend() {
                    continue;
                }
                let (request, attempts) = next_request(load, producer, rng);
                let correlation = request.correlation;
                // Before it is sent: from here on it may be in the log.
                pending.insert(correlation, attempts);
                if requests.try_send(request).is_err() {
                    return;
                }
            }
        }
    }
}

fn next_request(load: &Load, producer: u32, rng: &mut StdRng) -> (ProduceRequest, Vec<Attempt>) {
    let log: Log = (rng.random_range(0..load.topics.len()), rng.random_range(0..PARTITIONS));
    let attempts: Vec<Attempt> = (0..rng.random_range(1..8))
        .map(|_| {
            let payload = load.tick();
            Attempt {
                log,
                payload,
                once: true,
                producer,
                sequence: payload,
                sent: payload,
                answered: 0,
                outcome: Outcome::Unknown,
            }
        })
        .collect();
    let values = attempts.iter().map(|one| value(one.payload)).collect();
    let append = wire::append_plain(load.topics[log.0], log.1, values);
    (ProduceRequest { correlation: attempts[0].payload, append: Some(append) }, attempts)
}

fn settle(load: &Load, pending: &mut HashMap<u64, Vec<Attempt>>, answer: ProduceResponse) {
    let attempts = pending.remove(&answer.correlation).expect("an answer to something that was asked, once");
    match answer.result.expect("an answer holds a result") {
        Answer::Appended(appended) => {
            let end = appended.base_offset + i64::try_from(attempts.len()).expect("few records");
            assert_eq!(appended.end_offset, end, "an acknowledgement names as many offsets as records");
            load.conclude(attempts, |n| Outcome::Acknowledged { offset: appended.base_offset + n });
        }
        Answer::Error(error) => {
            let fault = Fault::from(error);
            assert!(fault.retryable, "the load is well formed: {fault}");
            // Only what is refused at the door is certainly not in the log.
            let refused = matches!(fault.reason, Reason::Overloaded | Reason::DiskFull);
            load.conclude(attempts, |_| if refused { Outcome::Refused } else { Outcome::Unknown });
        }
        Answer::Waiting(why) => panic!("nothing here waits for the bucket: {why:?}"),
    }
}

/// Where a reader begins, and where it may stop before the end that it is told.
#[derive(Clone, Copy)]
struct Part {
    from: i64,
    most: i64,
}

/// Reads every partition from where `from` says to the end that it is told first.
pub(crate) async fn read(load: &Load, from: impl Fn(Log) -> i64) -> Vec<Pass> {
    let mut passes = Vec::new();
    for topic in 0..load.topics.len() {
        for partition in 0..PARTITIONS {
            let log = (topic, partition);
            passes.push(read_part(load, log, Part { from: from(log), most: i64::MAX }).await);
        }
    }
    passes
}

async fn read_part(load: &Load, log: Log, part: Part) -> Pass {
    let (name, partition) = (load.topics[log.0], log.1);
    let (began, from) = (load.tick(), part.from);
    // Of several brokers another one may lead at any time: the preferred one is back. After an outage of the bucket, brokers that
    // nobody reads from learn from their next probe that it serves again.
    let goes_over = |fault: &Fault| {
        load.addresses.len() > 1 && matches!(fault.reason, Reason::NotLeader | Reason::ObjectStoreUnavailable)
    };
    let end = eventually_async("the end is known", async || {
        let mut client = wire::log(load.serving(log).await);
        let end = wire::latest(&mut client, name, partition).await;
        (!end.as_ref().is_err_and(goes_over)).then(|| end.expect("the end is known"))
    });
    let end = end.await;
    let to = end.min(from.saturating_add(part.most));
    let (mut records, mut next) = (Vec::new(), from);
    while next < to {
        let until = to.min(next.saturating_add(READ_AT_ONCE));
        let read = eventually_async("a leader serves what was written", async || {
            let mut client = wire::log(load.serving(log).await);
            let read = wire::read_range(&mut client, name, partition, next, until).await;
            (!read.as_ref().is_err_and(goes_over)).then(|| read.expect("it can be read"))
        });
        records.extend(read.await);
        next = until;
    }
    let records = records.into_iter().map(|record| {
        let bytes = record.value.expect("a value");
        let id = identify(&bytes);
        (record.offset, id.unwrap_or_else(|| panic!("damaged record at {name}/{partition}@{}", record.offset)))
    });
    Pass { log, began, from, end, to, current: true, records: records.collect() }
}

/// What readers have seen, and where the next ones go on.
#[derive(Default)]
struct Readers {
    passes: Vec<Pass>,
    ends: HashMap<Log, i64>,
}

impl Readers {
    /// After a kill: all that is new, and a piece of what is old.
    async fn go_on(&mut self, load: &Load, rng: &mut StdRng) {
        let ends = &self.ends;
        let new = read(load, |log| ends.get(&log).map_or(0, |end| (end - OVERLAP).max(0))).await;
        let log: Log = (rng.random_range(0..load.topics.len()), rng.random_range(0..PARTITIONS));
        let old = Part { from: rng.random_range(0..=self.ends.get(&log).copied().unwrap_or(0)), most: PIECE };
        let old = read_part(load, log, old).await;
        self.ends.extend(new.iter().map(|pass| (pass.log, pass.end)));
        self.passes.extend(new.into_iter().chain([old]));
    }

    /// Everything from the beginning.
    async fn start_over(&mut self, load: &Load) {
        self.passes.extend(read(load, |_| 0).await);
    }

    fn records(&self) -> i64 {
        self.ends.values().sum()
    }
}

/// Ends the process one way or another and starts it again, perhaps killing it once more as it recovers.
pub(crate) fn restart(home: &mut Home, broker: Broker, rng: &mut StdRng) -> Broker {
    if rng.random_ratio(1, 6) {
        let status = broker.terminate();
        assert!(status.success(), "a polite stop ended with {status}\n{}", home.log());
    } else {
        broker.kill9();
    }
    if rng.random_ratio(1, 4) {
        let early = home.spawn();
        std::thread::sleep(Duration::from_millis(rng.random_range(0..150)));
        early.kill9();
    }
    home.start()
}

pub(crate) fn judge(load: &Load, passes: &[Pass]) {
    let attempts = load.attempts.lock().expect("no holder panics").clone();
    let violations = History { attempts, passes: passes.to_vec() }.check();
    let first = &violations[..violations.len().min(20)];
    assert!(violations.is_empty(), "{} violations, the first: {first:#?}", violations.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_to_kill_9() {
    let kills = setting("STRANDLINE_KILLS", 6);
    let seed = setting("STRANDLINE_SEED", clock::wall_ms().unsigned_abs());
    println!("crash: {kills} kills, STRANDLINE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut home = Home::new();
    let mut broker = home.start();
    for (name, durability) in TOPICS {
        let config: Vec<(&str, &str)> = SMALL.into_iter().chain([("durability", durability)]).collect();
        wire::create_topic(home.grpc(), name, PARTITIONS.unsigned_abs(), &config).await;
    }
    let load = Load::new(vec![home.grpc()], TOPICS.map(|(name, _)| name).to_vec());
    let tasks = Tasks::new();
    for producer in 0..PRODUCERS {
        let seed = rng.random();
        tasks.spawn("producer", produce(load.clone(), producer, seed, tasks.clone()));
    }
    let mut readers = Readers::default();
    for kill in 1..=kills {
        load.grant();
        load.moment(&mut rng).await;
        broker = tokio::task::block_in_place(|| restart(&mut home, broker, &mut rng));
        assert_eq!(home.grpc(), load.address(), "nobody took the broker's port");
        readers.go_on(&load, &mut rng).await;
        if kill < ROUND || kill.is_multiple_of(ROUND) {
            judge(&load, &readers.passes);
            println!("crash: kill {kill} of {kills}, {} records so far", readers.records());
        }
    }
    tasks.stop().await;
    readers.start_over(&load).await;
    judge(&load, &readers.passes);
    let (acknowledged, passes) = (load.acknowledged(), readers.passes.len());
    println!("crash: {kills} kills, {acknowledged} records acknowledged, {passes} readings, nothing lost");
    assert!(acknowledged > 100, "the load got through: {acknowledged}");
    let uploaded = std::fs::read_dir(home.bucket()).expect("the bucket").count();
    assert!(uploaded > 0, "kills hit uploads only if there are some");
    assert!(broker.terminate().success(), "{}", home.log());
}

#[test]
fn a_payload_is_known_by_all_its_bytes() {
    for id in [1, 2, 997, u64::MAX] {
        let bytes = value(id);
        assert_eq!(identify(&bytes), Some(id));
        let mut damaged = bytes.to_vec();
        *damaged.last_mut().expect("bytes") ^= 1;
        assert_eq!(identify(&damaged), None);
        assert_eq!(identify(&bytes.slice(..bytes.len() - 1)), None);
    }
}
