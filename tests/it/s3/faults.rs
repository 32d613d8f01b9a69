//! Faults between a client and the S3 server, per operation, object and count.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use hyper::Method;
use s3s::Body;
use strandline::task::lock::Mutex;

/// Operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Op {
    Put,
    Get,
    Head,
    Delete,
    List,
    ListUploads,
    StartUpload,
    PutPart,
    EndUpload,
    AbortUpload,
}

impl Op {
    pub(super) fn of(method: &Method, path: &str, query: &str) -> Self {
        let has = |name: &str| query.split('&').any(|pair| pair.split('=').next() == Some(name));
        let object = path.trim_start_matches('/').trim_end_matches('/').contains('/');
        match *method {
            Method::PUT if has("partNumber") => Self::PutPart,
            Method::PUT => Self::Put,
            Method::POST if has("uploads") => Self::StartUpload,
            Method::POST if has("uploadId") => Self::EndUpload,
            Method::POST => Self::Delete,
            Method::DELETE if has("uploadId") => Self::AbortUpload,
            Method::DELETE => Self::Delete,
            Method::HEAD => Self::Head,
            _ if has("uploads") => Self::ListUploads,
            _ if has("list-type") || !object => Self::List,
            _ => Self::Get,
        }
    }
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The request is not executed. The response has this status (503 as `SlowDown`).
    Status(u16),
    /// The request is not executed. The connection closes.
    Refuse,
    /// The request is executed after this time.
    Delay(Duration),
    /// The request is executed. The connection closes before the response.
    LostResponse,
    /// The request is executed twice. The second response is sent.
    Twice,
    /// One bit of the request body is flipped.
    CorruptRequest,
    /// One bit of the response body is flipped.
    CorruptResponse,
    /// The response body ends half-way, with the connection.
    CutResponse,
    /// The object is reported as missing.
    Vanished,
}

#[derive(Debug)]
struct Rule {
    op: Op,
    path_part: String,
    fault: Fault,
    pass: usize,
    left: usize,
}

/// Faults of consecutive requests to an unreliable store. About every second request succeeds.
const UNRELIABLE_FAULTS: [Option<Fault>; 11] = [
    Some(Fault::Status(500)),
    None,
    Some(Fault::LostResponse),
    None,
    Some(Fault::Status(503)),
    None,
    Some(Fault::Delay(Duration::from_secs(2))),
    Some(Fault::Refuse),
    None,
    Some(Fault::CutResponse),
    Some(Fault::Twice),
];

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    requests: HashMap<Op, usize>,
    hits: usize,
    down: bool,
    /// Number of requests since the store became unreliable; `None` while it is reliable.
    unreliable: Option<usize>,
    ignore_conditions: bool,
}

/// The faults of one server. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    state: Arc<Mutex<State>>,
}

impl Faults {
    /// Applies this fault to the next `count` requests of this kind.
    pub(crate) fn inject(&self, op: Op, fault: Fault, count: usize) {
        self.inject_at(op, "", 0, fault, count);
    }

    /// Applies a fault to requests of this kind whose path contains `path_part`. The first `pass` requests do not have
    /// the fault, the next `count` have it.
    pub(crate) fn inject_at(&self, op: Op, path_part: &str, pass: usize, fault: Fault, count: usize) {
        let rule = Rule { op, path_part: path_part.to_owned(), fault, pass, left: count };
        self.state.lock().rules.push(rule);
    }

    /// Removes all faults.
    pub(crate) fn clear(&self) {
        let mut state = self.state.lock();
        state.rules.clear();
        state.down = false;
        state.unreliable = None;
        state.ignore_conditions = false;
    }

    /// Sets whether the whole store is down, so that every connection is closed.
    pub(crate) fn set_down(&self, down: bool) {
        self.state.lock().down = down;
    }

    /// Sets whether the store is unreliable: seven of eleven requests fail, are delayed, are executed twice, or get no
    /// complete response.
    pub(crate) fn set_unreliable(&self, unreliable: bool) {
        self.state.lock().unreliable = unreliable.then_some(0);
    }

    /// Sets whether the store silently ignores `If-None-Match`, as some stores do.
    pub(crate) fn set_ignore_conditions(&self, ignore: bool) {
        self.state.lock().ignore_conditions = ignore;
    }

    pub(super) fn ignores_conditions(&self) -> bool {
        self.state.lock().ignore_conditions
    }

    /// Returns the number of faults that have occurred, without the connections that closed while the store was down.
    pub(crate) fn hits(&self) -> usize {
        self.state.lock().hits
    }

    /// Returns the number of requests of this kind that have arrived, including those with faults.
    pub(crate) fn requests(&self, op: Op) -> usize {
        self.state.lock().requests.get(&op).copied().unwrap_or(0)
    }

    pub(super) fn is_down(&self) -> bool {
        self.state.lock().down
    }

    /// Counts a request. Returns its fault.
    pub(super) fn next_fault(&self, op: Op, path: &str) -> Option<Fault> {
        let mut state = self.state.lock();
        *state.requests.entry(op).or_default() += 1;
        let fault = state.rules.iter_mut().find_map(|rule| {
            if rule.op != op || rule.left == 0 || !path.contains(&rule.path_part) {
                return None;
            }
            if rule.pass > 0 {
                rule.pass -= 1;
                return None;
            }
            rule.left -= 1;
            Some(rule.fault)
        });
        let background = state.unreliable.as_mut().and_then(|requests_seen| {
            *requests_seen += 1;
            UNRELIABLE_FAULTS[*requests_seen % UNRELIABLE_FAULTS.len()]
        });
        let fault = fault.or(background);
        state.hits += usize::from(fault.is_some());
        fault
    }
}

/// Returns a body that breaks off half-way.
pub(super) fn cut(content: Bytes) -> Body {
    let half = content.slice(..content.len() / 2);
    let pieces = futures::stream::iter([Ok(half), Err(std::io::Error::other("cut"))]);
    Body::http_body_unsync(http_body_util::StreamBody::new(pieces.map(|piece| piece.map(hyper::body::Frame::data))))
}
