//! The members of an etcd cluster: one connection to each, created on first use, and the choice of the member to call
//! first.
//!
//! This module repeats a request only after a login in place of a rejected token. All other retries are in `call`.

use std::{
    future::Future,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use etcd_client::{Client, Error, KvClient, LeaseClient, ResponseHeader, WatchClient};
use tokio::sync::OnceCell;

use super::{
    MemberStatus, convert,
    error::{ErrorClass, EtcdAttemptError},
    options::{EtcdLogin, EtcdOptions, EtcdOptionsError},
};
use crate::{
    cluster::store::{Regression, Revision},
    task::lock::Mutex,
};

/// Maximum size of a read response. A page of a list that exceeds it is requested again with fewer keys.
const MAX_READ_BYTES: usize = 64 << 20;

/// Maximum size of a watch message. etcd sends up to a thousand transactions at once to a watch that lags. The limit
/// fits a thousand transactions of a quarter of the maximum size.
const MAX_WATCH_BYTES: usize = 256 << 20;

/// Minimum timeout of a login. etcd's password hash is slow on purpose.
const MIN_LOGIN_TIMEOUT: Duration = Duration::from_secs(2);

/// The members of one etcd cluster, in the order of the options.
pub(super) struct Members {
    list: Vec<Member>,
    header_state: HeaderState,
    /// Index of the member to call first: the member that responded last, or a later one if that member has failed
    /// since.
    first: AtomicUsize,
}

/// State from the headers of all members' responses. Clones share it.
#[derive(Clone, Default)]
struct HeaderState {
    /// Id of the etcd cluster, from the first response.
    cluster: Arc<OnceLock<u64>>,
    /// Set when a member of another etcd cluster has responded to a call.
    regression: Arc<OnceLock<Regression>>,
}

/// One member and its current connection.
pub(super) struct Member {
    /// Position in `Members::list`.
    index: usize,
    endpoint: String,
    options: EtcdOptions,
    header_state: HeaderState,
    channel: Mutex<MemberChannel>,
}

/// One connection to one member, created with the first request. Clones share it.
#[derive(Clone)]
pub(super) struct MemberChannel(Arc<MemberConnection>);

struct MemberConnection {
    /// Index of the member.
    index: usize,
    client: Client,
    /// Set after the login of this connection. An expired token is replaced together with the connection.
    login: OnceCell<()>,
    /// Number of calls on this connection that ended before their timeout, with a response or an error. If it does not
    /// grow during a timeout, the member counts as unreachable and not only as slow.
    response_count: AtomicU64,
    header_state: HeaderState,
}

impl Members {
    /// Checks the options and creates the members, without connecting to them.
    pub(super) async fn new(options: EtcdOptions) -> Result<Self, EtcdOptionsError> {
        options.check()?;
        let header_state = HeaderState::default();
        let mut list = Vec::with_capacity(options.endpoints.len());
        for (index, endpoint) in options.endpoints.iter().enumerate() {
            let channel = MemberChannel::new(index, endpoint, &options, &header_state).await;
            let channel = channel.map_err(|error| match error {
                Error::InvalidUri(reason) => {
                    EtcdOptionsError::Endpoint { endpoint: endpoint.clone(), reason: reason.to_string() }
                }
                // Not a failed connection, since `MemberChannel::new` does not connect.
                other => EtcdOptionsError::Tls { reason: format_options_error(&other) },
            })?;
            list.push(Member {
                index,
                endpoint: endpoint.clone(),
                options: options.clone(),
                header_state: header_state.clone(),
                channel: Mutex::new(channel),
            });
        }
        Ok(Self { list, header_state, first: AtomicUsize::new(0) })
    }

    /// Returns the regression if a member of another etcd cluster has responded to a call.
    pub(super) fn regression(&self) -> Option<Regression> {
        self.header_state.regression.get().cloned()
    }

    pub(super) fn endpoints(&self) -> Vec<&str> {
        self.list.iter().map(|member| member.endpoint.as_str()).collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Member> {
        self.list.iter()
    }

    /// Returns every member once, starting with the one to call first.
    pub(super) fn in_call_order(&self) -> impl Iterator<Item = &Member> {
        let first = self.first.load(Relaxed);
        (0..self.list.len()).map(move |step| &self.list[(first + step) % self.list.len()])
    }

    /// Makes this member the first to call, because it responded.
    pub(super) fn on_response(&self, member: &Member) {
        self.first.store(member.index, Relaxed);
    }

    /// Makes the next member the first to call, because `member` failed. Changes nothing if another member is already
    /// the first.
    pub(super) fn use_next_member(&self, member: &Member) {
        let next = (member.index + 1) % self.list.len();
        let _previous = self.first.compare_exchange(member.index, next, Relaxed, Relaxed);
    }

    /// Returns the member to which a connection leads.
    pub(super) fn member_of(&self, channel: &MemberChannel) -> &Member {
        &self.list[channel.0.index]
    }
}

impl Member {
    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Sends a request to this member: connects and logs in if needed, then waits at most the request timeout for the
    /// response. If the member rejects the token, logs in on a new connection and sends the request once more.
    pub(super) async fn call_member<T, F>(&self, request: &impl Fn(MemberChannel) -> F) -> Result<T, EtcdAttemptError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        match self.attempt(request).await {
            // Tokens expire, and each change of etcd's users invalidates all tokens. The request was not executed.
            Err((EtcdAttemptError { class: ErrorClass::Token, .. }, channel)) if self.options.login.is_some() => {
                self.replace(&channel).await;
                let retried = self.attempt(request).await;
                retried.map_err(|(error, _)| error.token_error_to_refusal())
            }
            result => result.map_err(|(error, _)| error.token_error_to_refusal()),
        }
    }

    /// Sends a request once, on the current connection. Returns that connection with an error, so that the caller can
    /// replace it. If the request times out, the connection is replaced here in two cases: no other call on it ended
    /// meanwhile, or it has a token. etcd may delay requests with a token without end, while it responds to keepalives.
    /// Such a delay lasts until etcd has applied the login that issued the token, which a restored etcd never does.
    async fn attempt<T, F>(&self, request: &impl Fn(MemberChannel) -> F) -> Result<T, (EtcdAttemptError, MemberChannel)>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let channel = self.channel();
        if let Some(login) = &self.options.login {
            channel.log_in(login, self.options.request_timeout).await.map_err(|error| (error, channel.clone()))?;
        }
        let response_count = channel.0.response_count.load(Relaxed);
        let timeout = self.options.request_timeout;
        match tokio::time::timeout(timeout, request(channel.clone())).await {
            Ok(result) => {
                channel.0.response_count.fetch_add(1, Relaxed);
                result.map_err(|error| (EtcdAttemptError::from_client(&error), channel))
            }
            Err(_) => {
                if self.options.login.is_some() || channel.0.response_count.load(Relaxed) == response_count {
                    self.replace(&channel).await;
                }
                Err((EtcdAttemptError::unknown(format!("no response within {} ms", timeout.as_millis())), channel))
            }
        }
    }

    /// Replaces the connection `old` for later calls, unless a concurrent caller has replaced it. Calls on the old
    /// connection continue. If no new connection can be created, the old one stays.
    pub(super) async fn replace(&self, old: &MemberChannel) {
        match MemberChannel::new(self.index, &self.endpoint, &self.options, &self.header_state).await {
            Ok(channel) => {
                let mut current = self.channel.lock();
                if Arc::ptr_eq(&current.0, &old.0) {
                    *current = channel;
                }
            }
            // The options worked before; the system's trust store may have become unreadable.
            Err(error) => {
                tracing::warn!(
                    endpoint = self.endpoint,
                    error = format_options_error(&error),
                    "cannot create a new connection to etcd"
                );
            }
        }
    }

    /// Requests the status of the member. A member of another etcd cluster is an error, but no regression of the store,
    /// because a status request reads and writes no key.
    pub(super) async fn status(&self) -> Result<MemberStatus, String> {
        let result = self.call_member(&|channel: MemberChannel| async move {
            let mut client = channel.0.client.maintenance_client();
            let response = client.status().await?;
            let checked = channel.check(response.header())?;
            checked.map_err(|regression| convert::invalid_response_error(&regression.to_string()))?;
            let member = response.header().map(ResponseHeader::member_id);
            Ok(MemberStatus {
                version: response.version().to_owned(),
                leader: member == Some(response.leader()),
                database_bytes: u64::try_from(response.db_size()).unwrap_or_default(),
            })
        });
        result.await.map_err(|error| error.reason)
    }

    fn channel(&self) -> MemberChannel {
        self.channel.lock().clone()
    }
}

impl MemberChannel {
    /// Returns a client of one member, which connects with its first request. `etcd_client` connects at once only if
    /// the options contain a user, and these do not.
    async fn new(
        index: usize,
        endpoint: &str,
        options: &EtcdOptions,
        header_state: &HeaderState,
    ) -> Result<Self, Error> {
        let client = Client::connect([endpoint], Some(options.connect_options(endpoint))).await?;
        let (login, response_count, header_state) = (OnceCell::new(), AtomicU64::new(0), header_state.clone());
        Ok(Self(Arc::new(MemberConnection { index, client, login, response_count, header_state })))
    }

    pub(super) fn kv(&self) -> KvClient {
        self.0.client.kv_client().max_decoding_message_size(MAX_READ_BYTES)
    }

    pub(super) fn leases(&self) -> LeaseClient {
        self.0.client.lease_client()
    }

    pub(super) fn watches(&self) -> WatchClient {
        self.0.client.watch_client().max_decoding_message_size(MAX_WATCH_BYTES)
    }

    /// Returns the revision in a response. If the response is of another etcd cluster than the first response, sets
    /// [`Members::regression`] and returns an error.
    pub(super) fn revision(&self, header: Option<&ResponseHeader>) -> Result<Revision, Error> {
        self.check(header)?.map_err(|regression| {
            let error = convert::invalid_response_error(&regression.to_string());
            // Fails if a regression is set already: the first one stays.
            drop(self.0.header_state.regression.set(regression));
            error
        })
    }

    /// Returns the revision in a response. The inner error means a response of another etcd cluster, the outer error a
    /// response without a header. Sets no regression.
    fn check(&self, header: Option<&ResponseHeader>) -> Result<Result<Revision, Regression>, Error> {
        let header = header.ok_or_else(|| convert::invalid_response_error("a response without a header"))?;
        let returned = header.cluster_id();
        let known = *self.0.header_state.cluster.get_or_init(|| returned);
        if known != returned {
            return Ok(Err(Regression::Cluster { known, returned }));
        }
        Ok(Ok(convert::revision(header.revision())))
    }

    /// Logs in once per connection; concurrent callers wait for the same login.
    async fn log_in(&self, login: &EtcdLogin, request_timeout: Duration) -> Result<(), EtcdAttemptError> {
        let user = || Some((login.user.clone(), login.password.clone()));
        let log_in_once = || async {
            let mut client = self.0.client.clone();
            let timeout = request_timeout.max(MIN_LOGIN_TIMEOUT);
            match tokio::time::timeout(timeout, client.update_user(user())).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => match EtcdAttemptError::from_client(&error) {
                    // Authentication is disabled in etcd: then no token is issued or needed.
                    EtcdAttemptError { class: ErrorClass::NoLogins, .. } => Ok(()),
                    error => Err(error.into_login_error(&login.user)),
                },
                Err(_) => Err(EtcdAttemptError::unknown(format!("no response within {} ms", timeout.as_millis()))
                    .into_login_error(&login.user)),
            }
        };
        self.0.login.get_or_try_init(log_in_once).await?;
        Ok(())
    }
}

/// Formats an error of `etcd_client` about options, with its cause, in one line.
fn format_options_error(error: &Error) -> String {
    use std::error::Error as _;
    match error {
        Error::TransportError(error) => match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        },
        other => other.to_string(),
    }
}
