//! What goes wrong between a client and the S3 server, per operation, object and count.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt;
use hyper::Method;
use s3s::Body;

/// What a request asks for.
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

/// One thing that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing is done; this status is answered (503 as `SlowDown`).
    Status(u16),
    /// Nothing is done; the connection closes.
    Refuse,
    /// It is done after this time.
    Delay(Duration),
    /// It is done; the connection closes before the answer.
    LostAnswer,
    /// It is done two times; the second answer is given.
    Twice,
    /// One bit of what is sent is another when it arrives.
    CorruptRequest,
    /// One bit of the answer's body is another.
    CorruptAnswer,
    /// The answer's body ends half-way, with the connection.
    CutAnswer,
    /// The object is said not to exist.
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

/// What the requests to a store that ails meet, one after the other: about every other one goes through.
const AILMENTS: [Option<Fault>; 11] = [
    Some(Fault::Status(500)),
    None,
    Some(Fault::LostAnswer),
    None,
    Some(Fault::Status(503)),
    None,
    Some(Fault::Delay(Duration::from_secs(2))),
    Some(Fault::Refuse),
    None,
    Some(Fault::CutAnswer),
    Some(Fault::Twice),
];

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    requests: HashMap<Op, usize>,
    hits: usize,
    down: bool,
    /// How many requests have come since it ails, if it does.
    ailing: Option<usize>,
    ignore_conditions: bool,
}

/// The faults of one server. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    state: Arc<Mutex<State>>,
}

impl Faults {
    /// The next `count` requests of this kind get this fault.
    pub(crate) fn inject(&self, op: Op, fault: Fault, count: usize) {
        self.inject_at(op, "", 0, fault, count);
    }

    /// Of the requests of this kind whose path contains `path_part`, `pass` go through, then `count` get this fault.
    pub(crate) fn inject_at(&self, op: Op, path_part: &str, pass: usize, fault: Fault, count: usize) {
        let rule = Rule { op, path_part: path_part.to_owned(), fault, pass, left: count };
        self.state.lock().unwrap().rules.push(rule);
    }

    /// Nothing goes wrong any more.
    pub(crate) fn clear(&self) {
        let mut state = self.state.lock().unwrap();
        state.rules.clear();
        state.down = false;
        state.ailing = None;
        state.ignore_conditions = false;
    }

    /// Whether the whole store is gone: every connection is closed.
    pub(crate) fn set_down(&self, down: bool) {
        self.state.lock().unwrap().down = down;
    }

    /// Whether the store fails, stalls, answers twice or loses its answers at every other request.
    pub(crate) fn set_ailing(&self, ailing: bool) {
        self.state.lock().unwrap().ailing = ailing.then_some(0);
    }

    /// Whether the store drops `If-None-Match` without a word, as some do.
    pub(crate) fn set_ignore_conditions(&self, ignore: bool) {
        self.state.lock().unwrap().ignore_conditions = ignore;
    }

    pub(super) fn ignores_conditions(&self) -> bool {
        self.state.lock().unwrap().ignore_conditions
    }

    /// How many faults have happened.
    pub(crate) fn hits(&self) -> usize {
        self.state.lock().unwrap().hits
    }

    /// How many requests of this kind have come, faulty ones included.
    pub(crate) fn requests(&self, op: Op) -> usize {
        self.state.lock().unwrap().requests.get(&op).copied().unwrap_or(0)
    }

    pub(super) fn is_down(&self) -> bool {
        self.state.lock().unwrap().down
    }

    /// The fault that this request gets.
    pub(super) fn take(&self, op: Op, path: &str) -> Option<Fault> {
        let mut state = self.state.lock().unwrap();
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
        let ailment = state.ailing.as_mut().and_then(|met| {
            *met += 1;
            AILMENTS[*met % AILMENTS.len()]
        });
        let fault = fault.or(ailment);
        state.hits += usize::from(fault.is_some());
        fault
    }
}

/// A body that breaks off half-way.
pub(super) fn cut(whole: Bytes) -> Body {
    let half = whole.slice(..whole.len() / 2);
    let pieces = futures::stream::iter([Ok(half), Err(std::io::Error::other("cut"))]);
    Body::http_body_unsync(http_body_util::StreamBody::new(pieces.map(|piece| piece.map(hyper::body::Frame::data))))
}
