//! Counts open calls by connection: from the head of the request until the body of the response has ended or was dropped. That is when
//! HTTP/2 closes the stream, so a connection without open calls is idle.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::{Body, Bytes, HttpBody},
    response::Response,
};
use http_body::{Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;

use super::connection::OpenCall;
use crate::broker::CallMemory;

/// What a response holds until it has been sent.
pub(super) struct HeldMemory {
    pub(super) memory: CallMemory,
    /// Its turn among the calls that are answered from metadata.
    pub(super) turn: Option<OwnedSemaphorePermit>,
}

/// Keeps the call open until the response has been sent.
pub(super) fn until_sent(response: Response, call: Option<OpenCall>, held: Option<HeldMemory>) -> Response {
    if let Some(held) = &held {
        held.memory.on_response_begun();
    }
    response.map(|body| Body::new(CountedBody { body, _call: call, held }))
}

struct CountedBody {
    body: Body,
    _call: Option<OpenCall>,
    held: Option<HeldMemory>,
}

impl HttpBody for CountedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        // HTTP/2 asks for more when it has sent most of what it was given.
        if let Some(held) = &self.held {
            held.memory.on_body_polled();
        }
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if let Some(held) = &mut self.held
            && let Poll::Ready(frame) = &frame
        {
            held.memory.on_body_handed();
            if frame.is_none() {
                held.turn = None;
            }
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
