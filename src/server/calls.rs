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

use super::connection::OpenCall;

/// Keeps the call open until the response has been sent.
pub(super) fn until_sent(response: Response, call: OpenCall) -> Response {
    response.map(|body| Body::new(CountedBody { body, _call: call }))
}

struct CountedBody {
    body: Body,
    _call: OpenCall,
}

impl HttpBody for CountedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
