//! The members of an etcd cluster: one connection to each, created on first use, and the choice of the member to call
//! first.
//!
//! This module never retries a request: see `call`.

use std::{
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use etcd_client::{Client, Error, KvClient, LeaseClient, ResponseHeader, WatchClient};
use tokio::sync::{OnceCell, watch};

use super::{
    MemberStatus,
    call::{Class, Refusal},
    options::{EtcdLogin, EtcdOptions, EtcdOptionsError},
    text,
};
use crate::cluster::store::{Regression, Revision};

/// Maximum size of a read response. A larger page of a list is requested again in smaller pages.
const READ_BYTES: usize = 64 << 20;

/// Maximum size of a watch message. etcd sends up to a thousand transactions at once to a watch that lags. The limit
/// fits a thousand transactions of a quarter of the maximum size.
const WATCH_BYTES: usize = 256 << 20;

/// Minimum timeout of a login: etcd's password hash is slow on purpose.
const LOGIN_TIME: Duration = Duration::from_secs(2);

/// All members.
pub(super) struct Members {
    list: Vec<Member>,
    common: Common,
    /// Index of the member to call first: the one that responded last.
    first: AtomicUsize,
}

/// State from the responses of all members.
#[derive(Clone, Default)]
struct Common {
    /// Id of the etcd cluster, from the first response.
    cluster: Arc<OnceLock<u64>>,
    /// Newest revision in any response.
    newest: Arc<watch::Sender<Revision>>,
    /// Evidence that a member of another cluster responded to a call.
    foreign: Arc<OnceLock<Regression>>,
}

/// One member.
pub(super) struct Member {
    place: usize,
    endpoint: String,
    options: EtcdOptions,
    common: Common,
    line: Mutex<Line>,
}

/// One connection to one member, created with the first request. Clones share it.
#[derive(Clone)]
pub(super) struct Line(Arc<Connection>);

struct Connection {
    place: usize,
    client: Client,
    /// Set once per connection: an expired token is renewed with a new connection.
    login: OnceCell<()>,
    /// Number of responses so far; distinguishes a slow member from an unreachable one.
    heard: AtomicU64,
    /// True if a call timed out without any response meanwhile; later calls use a new connection.
    given_up: watch::Sender<bool>,
    common: Common,
}

impl Members {
    pub(super) async fn new(options: EtcdOptions) -> Result<Self, EtcdOptionsError> {
        options.check()?;
        let common = Common::default();
        let mut list = Vec::with_capacity(options.endpoints.len());
        for (place, endpoint) in options.endpoints.iter().enumerate() {
            let line = Line::new(place, endpoint, &options, &common).await;
            let line = line.map_err(|error| match error {
                Error::InvalidUri(why) => {
                    EtcdOptionsError::Endpoint { endpoint: endpoint.clone(), why: why.to_string() }
                }
                other => EtcdOptionsError::Tls { why: refused(&other) },
            })?;
            list.push(Member {
                place,
                endpoint: endpoint.clone(),
                options: options.clone(),
                common: common.clone(),
                line: Mutex::new(line),
            });
        }
        Ok(Self { list, common, first: AtomicUsize::new(0) })
    }

    /// Returns the regression if a member of another cluster has responded to a call.
    pub(super) fn regression(&self) -> Option<Regression> {
        self.common.foreign.get().cloned()
    }

    pub(super) fn endpoints(&self) -> Vec<&str> {
        self.list.iter().map(|member| member.endpoint.as_str()).collect()
    }

    pub(super) fn each(&self) -> impl Iterator<Item = &Member> {
        self.list.iter()
    }

    /// Returns every member once, starting with the one that responded last.
    pub(super) fn in_turn(&self) -> impl Iterator<Item = &Member> {
        let first = self.first.load(Relaxed);
        (0..self.list.len()).map(move |step| &self.list[(first + step) % self.list.len()])
    }

    /// Makes this member the first to call, because it responded.
    pub(super) fn answered(&self, member: &Member) {
        self.first.store(member.place, Relaxed);
    }

    /// Makes the next member the first to call, because this one did not respond. Keeps the choice of a concurrent
    /// caller.
    pub(super) fn pass_on(&self, member: &Member) {
        let next = (member.place + 1) % self.list.len();
        // If another caller chose first, its choice is as good.
        let _chosen = self.first.compare_exchange(member.place, next, Relaxed, Relaxed);
    }

    /// Returns the member of a connection.
    pub(super) fn of(&self, line: &Line) -> &Member {
        &self.list[line.0.place]
    }
}

impl Member {
    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Makes one attempt: connects and logs in if needed, sends the request, and waits for at most the call timeout.
    pub(super) async fn ask<T, F>(&self, ask: &impl Fn(Line) -> F) -> Result<T, Refusal>
    where
        F: Future<Output = Result<T, Error>>,
    {
        match self.ask_once(ask).await {
            // Tokens expire, and each change of etcd's users invalidates all of them. The request was not executed.
            Err((Refusal { class: Class::Token, .. }, line)) if self.options.login.is_some() => {
                self.replace(&line).await;
                let again = self.ask_once(ask).await;
                again.map_err(|(refusal, _)| refusal.without_token())
            }
            other => other.map_err(|(refusal, _)| refusal.without_token()),
        }
    }

    async fn ask_once<T, F>(&self, ask: &impl Fn(Line) -> F) -> Result<T, (Refusal, Line)>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let line = self.line();
        if let Some(login) = &self.options.login {
            line.log_in(login, self.options.call_timeout).await.map_err(|refusal| (refusal, line.clone()))?;
        }
        let heard = line.0.heard.load(Relaxed);
        let time = self.options.call_timeout;
        match tokio::time::timeout(time, ask(line.clone())).await {
            Ok(answer) => {
                line.0.heard.fetch_add(1, Relaxed);
                answer.map_err(|error| (Refusal::of(&error), line))
            }
            Err(_) => {
                if line.0.heard.load(Relaxed) == heard {
                    line.0.given_up.send_replace(true);
                    self.replace(&line).await;
                }
                Err((Refusal::unknown(format!("no answer within {} ms", time.as_millis())), line))
            }
        }
    }

    /// Replaces the connection for later calls, unless a concurrent caller did. Calls on the old connection continue.
    pub(super) async fn replace(&self, old: &Line) {
        match Line::new(self.place, &self.endpoint, &self.options, &self.common).await {
            Ok(fresh) => {
                let mut line = self.lock();
                if Arc::ptr_eq(&line.0, &old.0) {
                    *line = fresh;
                }
            }
            // The options worked before; the system's trust store may have become unreadable.
            Err(error) => {
                tracing::warn!(endpoint = self.endpoint, error = refused(&error), "no new connection to etcd")
            }
        }
    }

    /// Requests the status of the member.
    pub(super) async fn status(&self) -> Result<MemberStatus, String> {
        let asked = self.ask(&|line: Line| async move {
            let mut response = line.0.client.maintenance_client();
            let response = response.status().await?;
            line.check(response.header())?.map_err(|other| text::not_an_answer(&other.to_string()))?;
            let member = response.header().map(ResponseHeader::member_id);
            Ok(MemberStatus {
                version: response.version().to_owned(),
                leader: member == Some(response.leader()),
                database_bytes: u64::try_from(response.db_size()).unwrap_or_default(),
            })
        });
        asked.await.map_err(|refusal| refusal.why)
    }

    /// Acts as after a call that timed out.
    #[cfg(test)]
    pub(super) async fn give_up(&self) {
        let line = self.line();
        line.0.given_up.send_replace(true);
        self.replace(&line).await;
    }

    fn line(&self) -> Line {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    /// Creates a connection without connecting: `etcd_client` connects here only with a user.
    async fn new(place: usize, endpoint: &str, options: &EtcdOptions, common: &Common) -> Result<Self, Error> {
        let client = Client::connect([endpoint], Some(options.connect(endpoint))).await?;
        let (login, heard, given_up) = (OnceCell::new(), AtomicU64::new(0), watch::Sender::new(false));
        Ok(Self(Arc::new(Connection { place, client, login, heard, given_up, common: common.clone() })))
    }

    pub(super) fn kv(&self) -> KvClient {
        self.0.client.kv_client().max_decoding_message_size(READ_BYTES)
    }

    pub(super) fn leases(&self) -> LeaseClient {
        self.0.client.lease_client()
    }

    pub(super) fn watches(&self) -> WatchClient {
        self.0.client.watch_client().max_decoding_message_size(WATCH_BYTES)
    }

    /// Returns the revision in a response, if the response comes from the cluster that responded first. Otherwise
    /// records a regression.
    pub(super) fn revision(&self, header: Option<&ResponseHeader>) -> Result<Revision, Error> {
        self.check(header)?.map_err(|other| {
            let error = text::not_an_answer(&other.to_string());
            drop(self.0.common.foreign.set(other));
            error
        })
    }

    /// Like [`Self::revision`], but a response of another cluster is returned and not recorded.
    fn check(&self, header: Option<&ResponseHeader>) -> Result<Result<Revision, Regression>, Error> {
        let header = header.ok_or_else(|| text::not_an_answer("no header"))?;
        let Common { cluster, newest, .. } = &self.0.common;
        let (known, answered) = (*cluster.get_or_init(|| header.cluster_id()), header.cluster_id());
        if known != answered {
            return Ok(Err(Regression::Cluster { known, answered }));
        }
        let revision = text::revision(header.revision());
        newest.send_if_modified(|newest| {
            let is_newer = revision > *newest;
            *newest = revision.max(*newest);
            is_newer
        });
        Ok(Ok(revision))
    }

    /// Returns the newest revision in any response.
    pub(super) fn newest(&self) -> Revision {
        *self.0.common.newest.borrow()
    }

    /// Resolves when a call on this connection has timed out.
    pub(super) async fn is_given_up(&self) {
        // `self` owns the sender.
        drop(self.0.given_up.subscribe().wait_for(|given_up| *given_up).await);
    }

    /// Resolves `lag` after a response contained a revision newer than `known`.
    pub(super) async fn is_outrun(&self, known: Revision, lag: Duration) {
        drop(self.0.common.newest.subscribe().wait_for(|newest| *newest > known).await);
        tokio::time::sleep(lag).await;
    }

    /// Logs in once per connection; concurrent callers wait for the same login.
    async fn log_in(&self, login: &EtcdLogin, call_timeout: Duration) -> Result<(), Refusal> {
        let user = || Some((login.user.clone(), login.password.clone()));
        let attempt = || async {
            let mut client = self.0.client.clone();
            let time = call_timeout.max(LOGIN_TIME);
            match tokio::time::timeout(time, client.update_user(user())).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => match Refusal::of(&error) {
                    // Authentication is disabled in etcd: then no token is issued or needed.
                    Refusal { class: Class::NoLogins, .. } => Ok(()),
                    refusal => Err(refusal.at_login(&login.user)),
                },
                Err(_) => {
                    Err(Refusal::unknown(format!("no answer within {} ms", time.as_millis())).at_login(&login.user))
                }
            }
        };
        self.0.login.get_or_try_init(attempt).await?;
        Ok(())
    }
}

/// Returns an error of `etcd_client` about options in one line.
fn refused(error: &Error) -> String {
    use std::error::Error as _;
    match error {
        Error::TransportError(error) => match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        },
        other => other.to_string(),
    }
}
