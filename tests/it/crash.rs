//! A real broker process is killed with SIGKILL at random times under load. No acknowledged record may be lost.
//!
//! Several producers send pipelined requests to several partitions of two topics, one topic for each durability.
//! Segments are small and soon evicted, so that kills also interrupt rolls, uploads, tier commits and evictions. Some
//! kills interrupt the recovery from the previous kill. Some restarts begin with a clean stop. `history` checks the
//! results. All bytes of a payload are derived from its number, so that corruption is detected.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use strandline::{
    proto::{
        error::{ApiError, ErrorCode},
        v1::{ProduceRequest, ProduceResponse, produce_response::Result as ProduceResult},
    },
    task::{Tasks, clock, lock::Mutex},
};
use tokio::{net::TcpStream, sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    broker::{Broker, BrokerInstance},
    history::{Attempt, History, Log, Outcome, ReadPass},
    test_timeout::eventually_async,
    wire,
};

const TOPICS: [(&str, &str); 2] = [("synced", "persisted"), ("cached", "replicated")];
/// Configuration of a topic with small segments, which are soon sealed, uploaded and evicted.
pub(crate) const SMALL: [(&str, &str); 4] =
    [("segment.bytes", "65536"), ("segment.ms", "500"), ("local.retention.bytes", "200000"), ("retention.ms", "-1")];
pub(crate) const PARTITIONS: i32 = 3;
const PRODUCERS: u32 = 3;
const MAX_PENDING_REQUESTS: usize = 16;
/// Maximum number of requests of all producers together between two kills.
const REQUESTS_PER_KILL: u64 = 1000;

/// Number of records before the last observed end offset from which a reader starts after each kill.
const OVERLAP_RECORDS: i64 = 200;
/// Maximum number of old records that are read again after each kill.
const MAX_OLD_RECORDS: i64 = 1000;

/// Maximum number of records that are read from one log before its leader is looked up again.
const MAX_RECORDS_PER_READ: i64 = 20_000;

/// Number of kills between two checks of all results so far. Before this number is reached, a check follows each kill,
/// because most runs are short.
const KILLS_PER_CHECK: u64 = 20;

/// Returns the number in the environment variable `name`, or the default if it is not set.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// State that producers and readers share.
pub(crate) struct Load {
    /// Addresses of the brokers. The metadata of each contains the leader of every log.
    addresses: Vec<SocketAddr>,
    /// Topics, each with [`PARTITIONS`] partitions.
    topics: Vec<&'static str>,
    /// Logical clock of the history. Its values are also the payload numbers.
    time: AtomicU64,
    attempts: Mutex<Vec<Attempt>>,
    /// Log and time of each acknowledged record.
    moments: Mutex<Vec<(Log, Instant)>>,
    /// Number of requests that producers may still send before the next kill. Without a bound, producers on a slow
    /// machine would write faster than the readers can read.
    budget: AtomicU64,
}

impl Load {
    pub(crate) fn new(addresses: Vec<SocketAddr>, topics: Vec<&'static str>) -> Arc<Self> {
        let budget = AtomicU64::new(REQUESTS_PER_KILL);
        let (attempts, moments) = (Mutex::default(), Mutex::default());
        Arc::new(Self { addresses, topics, time: AtomicU64::new(0), attempts, moments, budget })
    }

    /// Returns the address of the first broker.
    pub(crate) fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// Returns the address of the broker that leads a log. With several brokers, waits until there is a leader.
    async fn leader_address(&self, log: Log) -> SocketAddr {
        if self.addresses.len() == 1 {
            return self.addresses[0];
        }
        let find_leader = || wire::leader(&self.addresses, self.topics[log.0], log.1);
        eventually_async("the log has a leader", find_leader).await
    }

    /// Returns the longest time from `since`, or from an acknowledged record of a log after that, to the next
    /// acknowledged record of the log. Returns `None` if fewer than 20 records were acknowledged since `since`.
    pub(crate) fn longest_silence(&self, log: Log, since: Instant) -> Option<Duration> {
        let moments = self.moments.lock();
        let moments_of_log: Vec<Instant> =
            moments.iter().filter(|(of, at)| *of == log && *at >= since).map(|(_, at)| *at).collect();
        let before = std::iter::once(&since).chain(&moments_of_log);
        (moments_of_log.len() >= 20)
            .then(|| before.zip(&moments_of_log).map(|(previous, next)| *next - *previous).max().expect("not empty"))
    }

    /// Sets the budget to [`REQUESTS_PER_KILL`] requests.
    fn reset_budget(&self) {
        self.budget.store(REQUESTS_PER_KILL, Ordering::Relaxed);
    }

    /// Waits until the logical clock has advanced by a random number: producers advance it with each record and each
    /// response. The caller then injects a fault.
    pub(crate) async fn wait_for_random_progress(&self, rng: &mut StdRng) {
        let at = self.time.load(Ordering::SeqCst) + rng.random_range(1..REQUESTS_PER_KILL);
        eventually_async("the load continues", || async { (self.time.load(Ordering::SeqCst) >= at).then_some(()) })
            .await;
    }

    /// Takes one request from the budget until the next kill. Returns false if the budget is used up.
    fn take_request(&self) -> bool {
        self.budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    /// Advances the logical clock and returns its new time.
    pub(crate) fn tick(&self) -> u64 {
        self.time.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Adds completed attempts to the history. `outcome` gets the index of each attempt.
    pub(crate) fn complete(&self, attempts: Vec<Attempt>, outcome: impl Fn(i64) -> Outcome) {
        let responded = self.tick();
        let now = clock::monotonic();
        let acknowledged = (0..).zip(&attempts).filter(|(n, _)| matches!(outcome(*n), Outcome::Acknowledged { .. }));
        let moments: Vec<_> = acknowledged.map(|(_, attempt)| (attempt.log, now)).collect();
        self.moments.lock().extend(moments);
        let completed = (0..).zip(attempts).map(|(n, attempt)| Attempt { responded, outcome: outcome(n), ..attempt });
        self.attempts.lock().extend(completed);
    }

    /// Returns the number of acknowledged records so far.
    pub(crate) fn acknowledged(&self) -> usize {
        let attempts = self.attempts.lock();
        attempts.iter().filter(|attempt| matches!(attempt.outcome, Outcome::Acknowledged { .. })).count()
    }
}

/// Returns the bytes of payload number `id`: the number, then filler bytes. Length and content of the filler are
/// derived from the number.
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

/// Returns the number of a payload; `None` if any byte differs from [`value`].
pub(crate) fn identify(bytes: &[u8]) -> Option<u64> {
    let id = u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?);
    (*value(id) == *bytes).then_some(id)
}

/// Runs one producer until the tasks are cancelled. The producer opens a new connection whenever one ends.
async fn produce(load: Arc<Load>, producer: u32, seed: u64, tasks: Tasks) {
    let mut rng = StdRng::seed_from_u64(seed);
    while !tasks.is_cancelled() {
        let mut pending = HashMap::new();
        run_connection(&load, producer, &mut rng, &tasks, &mut pending).await;
        // The connection has ended, so no response to the pending requests will arrive.
        for attempts in pending.into_values() {
            load.complete(attempts, |_| Outcome::Unknown);
        }
        tokio::select! {
            biased;
            () = tasks.cancelled() => {}
            () = eventually_async("the broker listens", || async { TcpStream::connect(load.address()).await.ok().map(drop) }) => {}
        }
    }
}

/// Runs one connection until it breaks or the tasks are cancelled; returns after five seconds if it cannot be opened.
/// Keeps up to [`MAX_PENDING_REQUESTS`] requests in flight. At the return, `pending` contains the requests without a
/// response.
async fn run_connection(
    load: &Load,
    producer: u32,
    rng: &mut StdRng,
    tasks: &Tasks,
    pending: &mut HashMap<u64, Vec<Attempt>>,
) {
    let (requests, outgoing) = mpsc::channel(MAX_PENDING_REQUESTS);
    let mut log = wire::log(load.address());
    let opened = tokio::time::timeout(Duration::from_secs(5), log.produce(ReceiverStream::new(outgoing))).await;
    let Ok(Ok(responses)) = opened else { return };
    let mut responses: Streaming<ProduceResponse> = responses.into_inner();
    let mut pace = tokio::time::interval(Duration::from_millis(3));
    loop {
        tokio::select! {
            biased;
            () = tasks.cancelled() => return,
            response = responses.message() => match response {
                Ok(Some(response)) => complete_request(load, pending, response),
                Ok(None) | Err(_) => return,
            },
            _ = pace.tick(), if pending.len() < MAX_PENDING_REQUESTS => {
                if !load.take_request() {
                    continue;
                }
                let (request, attempts) = next_request(load, producer, rng);
                let correlation_id = request.correlation_id;
                // The request is inserted before it is sent, because it may be in the log from then on.
                pending.insert(correlation_id, attempts);
                if requests.try_send(request).is_err() {
                    return;
                }
            }
        }
    }
}

/// Returns an append of one to seven new records to a random log, and one attempt for each record.
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
                responded: 0,
                outcome: Outcome::Unknown,
            }
        })
        .collect();
    let values = attempts.iter().map(|attempt| value(attempt.payload)).collect();
    let append = wire::append_plain(load.topics[log.0], log.1, values);
    (ProduceRequest { correlation_id: attempts[0].payload, append: Some(append) }, attempts)
}

/// Completes the attempts of the request to which this response belongs, and removes them from `pending`.
fn complete_request(load: &Load, pending: &mut HashMap<u64, Vec<Attempt>>, response: ProduceResponse) {
    let attempts = pending.remove(&response.correlation_id).expect("one response per request");
    match response.result.expect("the response has a result") {
        ProduceResult::Appended(appended) => {
            let end = appended.base_offset + i64::try_from(attempts.len()).expect("few records");
            assert_eq!(appended.end_offset, end, "an acknowledgement has one offset per record");
            load.complete(attempts, |n| Outcome::Acknowledged { offset: appended.base_offset + n });
        }
        ProduceResult::Error(error) => {
            let failure = ApiError::from(error);
            assert!(failure.retryable, "the request is valid: {failure}");
            // These errors mean that the request was refused before it was appended. After any other error, the request
            // may be in the log.
            let refused = matches!(failure.code, ErrorCode::Overloaded | ErrorCode::DiskFull);
            load.complete(attempts, |_| if refused { Outcome::Refused } else { Outcome::Unknown });
        }
        ProduceResult::Waiting(reason) => panic!("unexpected wait for the object store: {reason:?}"),
    }
}

/// Start offset and maximum number of records of one read of a log. The read also ends at the end offset that the
/// broker reports.
#[derive(Clone, Copy)]
struct Part {
    from: i64,
    max_records: i64,
}

/// Reads every partition, from the offset that `from` returns to the end offset that the broker reports when the read
/// begins.
pub(crate) async fn read(load: &Load, from: impl Fn(Log) -> i64) -> Vec<ReadPass> {
    let mut passes = Vec::new();
    for topic in 0..load.topics.len() {
        for partition in 0..PARTITIONS {
            let log = (topic, partition);
            passes.push(read_part(load, log, Part { from: from(log), max_records: i64::MAX }).await);
        }
    }
    passes
}

/// Reads a part of a log. Panics if a record is corrupt. With several brokers, waits until the log has a leader that
/// serves it.
async fn read_part(load: &Load, log: Log, part: Part) -> ReadPass {
    let (name, partition) = (load.topics[log.0], log.1);
    let (began, from) = (load.tick(), part.from);
    // With several brokers, leadership may change during a read, for example back to the preferred leader. After an
    // outage of the object store, a broker may reject reads until its next probe detects that the store is available.
    let is_retried = |error: &ApiError| {
        load.addresses.len() > 1 && matches!(error.code, ErrorCode::NotLeader | ErrorCode::ObjectStoreUnavailable)
    };
    let end = eventually_async("the end is reported", async || {
        let mut client = wire::log(load.leader_address(log).await);
        let end = wire::latest(&mut client, name, partition).await;
        (!end.as_ref().is_err_and(is_retried)).then(|| end.expect("the end offset is present"))
    });
    let end = end.await;
    let to = end.min(from.saturating_add(part.max_records));
    let (mut records, mut next) = (Vec::new(), from);
    while next < to {
        let until = to.min(next.saturating_add(MAX_RECORDS_PER_READ));
        let read = eventually_async("a leader serves what was written", async || {
            let mut client = wire::log(load.leader_address(log).await);
            let read = wire::read_range(&mut client, name, partition, next, until).await;
            (!read.as_ref().is_err_and(is_retried)).then(|| read.expect("the records are readable"))
        });
        records.extend(read.await);
        next = until;
    }
    let records = records.into_iter().map(|record| {
        let bytes = record.value.expect("a value");
        let id = identify(&bytes);
        (record.offset, id.unwrap_or_else(|| panic!("corrupt record at {name}/{partition}@{}", record.offset)))
    });
    ReadPass { log, began, from, end, to, current: true, records: records.collect() }
}

/// Results of all readers, and the offsets at which the next readers start.
///
/// After each start of the broker, while the producers continue, a reader reads every partition from a little before
/// its previous end. Another reader reads a random range of old records of one partition. So the cost of a kill does
/// not grow with the number of kills. Every record is read soon after it was written, and old records are read again
/// after later kills. At the end, all records are read once more, and must equal the earlier results.
#[derive(Default)]
struct Readers {
    passes: Vec<ReadPass>,
    ends: HashMap<Log, i64>,
}

impl Readers {
    /// Reads all new records of each partition, and up to [`MAX_OLD_RECORDS`] old records of one partition.
    async fn read_after_kill(&mut self, load: &Load, rng: &mut StdRng) {
        let ends = &self.ends;
        let new = read(load, |log| ends.get(&log).map_or(0, |end| (end - OVERLAP_RECORDS).max(0))).await;
        let log: Log = (rng.random_range(0..load.topics.len()), rng.random_range(0..PARTITIONS));
        let old = Part {
            from: rng.random_range(0..=self.ends.get(&log).copied().unwrap_or(0)),
            max_records: MAX_OLD_RECORDS,
        };
        let old = read_part(load, log, old).await;
        self.ends.extend(new.iter().map(|pass| (pass.log, pass.end)));
        self.passes.extend(new.into_iter().chain([old]));
    }

    /// Reads every partition from offset 0.
    async fn read_all_again(&mut self, load: &Load) {
        self.passes.extend(read(load, |_| 0).await);
    }

    fn records(&self) -> i64 {
        self.ends.values().sum()
    }
}

/// Kills the process, or stops it in one of six cases, and starts it again. In one of four cases, kills the new process
/// during its start and starts another.
pub(crate) fn restart(instance: &mut BrokerInstance, broker: Broker, rng: &mut StdRng) -> Broker {
    if rng.random_ratio(1, 6) {
        let status = broker.terminate();
        assert!(status.success(), "the clean stop exited with {status}\n{}", instance.log());
    } else {
        broker.kill9();
    }
    if rng.random_ratio(1, 4) {
        let early = instance.spawn();
        std::thread::sleep(Duration::from_millis(rng.random_range(0..150)));
        early.kill9();
    }
    instance.start()
}

/// Checks with `history` that the read records agree with the attempts so far. Panics with the first violations.
pub(crate) fn check_passes(load: &Load, passes: &[ReadPass]) {
    let attempts = load.attempts.lock().clone();
    let violations = History { attempts, passes: passes.to_vec() }.check();
    let first = &violations[..violations.len().min(20)];
    assert!(violations.is_empty(), "{} violations, the first: {first:#?}", violations.len());
}

/// `STRANDLINE_KILLS` is the number of kills (`make crash-test`: 200). `STRANDLINE_SEED` repeats the random choices of
/// a run, but not the timing of its tasks and processes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_loses_no_acknowledged_records() {
    let kills = setting("STRANDLINE_KILLS", 6);
    let seed = setting("STRANDLINE_SEED", clock::wall_ms().unsigned_abs());
    println!("crash: {kills} kills, STRANDLINE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut instance = BrokerInstance::new();
    let mut broker = instance.start();
    for (name, durability) in TOPICS {
        let config: Vec<(&str, &str)> = SMALL.into_iter().chain([("durability", durability)]).collect();
        wire::create_topic(instance.grpc(), name, PARTITIONS.unsigned_abs(), &config).await;
    }
    let load = Load::new(vec![instance.grpc()], TOPICS.map(|(name, _)| name).to_vec());
    let tasks = Tasks::new();
    for producer in 0..PRODUCERS {
        let seed = rng.random();
        tasks.spawn("producer", produce(load.clone(), producer, seed, tasks.clone()));
    }
    let mut readers = Readers::default();
    for kill in 1..=kills {
        load.reset_budget();
        load.wait_for_random_progress(&mut rng).await;
        broker = tokio::task::block_in_place(|| restart(&mut instance, broker, &mut rng));
        assert_eq!(instance.grpc(), load.address(), "the port of the broker is free");
        readers.read_after_kill(&load, &mut rng).await;
        if kill < KILLS_PER_CHECK || kill.is_multiple_of(KILLS_PER_CHECK) {
            check_passes(&load, &readers.passes);
            println!("crash: kill {kill} of {kills}, {} records so far", readers.records());
        }
    }
    tasks.stop().await;
    readers.read_all_again(&load).await;
    check_passes(&load, &readers.passes);
    let (acknowledged, passes) = (load.acknowledged(), readers.passes.len());
    println!("crash: {kills} kills, {acknowledged} records acknowledged, {passes} reads, no record lost");
    assert!(acknowledged > 100, "records were acknowledged: {acknowledged}");
    let uploaded = std::fs::read_dir(instance.object_store_dir()).expect("the object store").count();
    assert!(uploaded > 0, "the kills need uploads to hit");
    assert!(broker.terminate().success(), "{}", instance.log());
}

#[test]
fn payload_is_identified_by_all_its_bytes() {
    for id in [1, 2, 997, u64::MAX] {
        let bytes = value(id);
        assert_eq!(identify(&bytes), Some(id));
        let mut corrupt = bytes.to_vec();
        *corrupt.last_mut().expect("bytes") ^= 1;
        assert_eq!(identify(&corrupt), None);
        assert_eq!(identify(&bytes.slice(..bytes.len() - 1)), None);
    }
}
