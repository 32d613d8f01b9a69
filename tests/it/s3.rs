//! A real S3 server over HTTP for the tests, with faults on demand, and the tests of `tier` against this server.
//!
//! The server is `s3s-fs`, usually on a loopback port. It runs on a thread of its own, so that a blocked test does not
//! stop it. [`Faults`] are injected between the socket and the service.

mod faults;
mod fs;
mod rebuild;
mod tier;
mod uploads;

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http_body_util::BodyExt;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use s3s::{
    Body,
    auth::SimpleAuth,
    service::{S3Service, S3ServiceBuilder},
};
use strandline::{
    model::LeaderEpoch,
    task::{self, Tasks},
    tier::{AccessKeys, ObjectStoreOptions, PartitionTier, SegmentSource, StagedManifest, UploadError},
};
use tokio::{net::TcpListener, sync::Mutex};

pub(crate) use faults::{Fault, Faults, Op};

/// Bucket that every server has at its start.
pub(crate) const BUCKET: &str = "strandline";
/// Value of `AWS_ACCESS_KEY_ID`.
pub(crate) const ACCESS_KEY: &str = "AKTEST";
/// Value of `AWS_SECRET_ACCESS_KEY`.
pub(crate) const SECRET_KEY: &str = "secret-of-the-test";

/// A running server. Dropping the value stops the server and deletes its data.
pub(crate) struct S3 {
    address: SocketAddr,
    folder: tempfile::TempDir,
    faults: Faults,
    uploads: fs::Uploads,
    tasks: Tasks,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// The service that all connections share. Conditional puts of `s3s-fs` are not atomic, so each put holds one of the
/// locks, which the path of the object selects.
struct Shared {
    service: S3Service,
    stripes: [Mutex<()>; 64],
    faults: Faults,
}

impl S3 {
    /// Starts a server on a free loopback port, with an empty bucket.
    pub(crate) async fn start() -> Self {
        Self::begin()
    }

    /// Starts a server as [`S3::start`] does. Needs no async runtime.
    pub(crate) fn begin() -> Self {
        Self::at(Ipv4Addr::LOCALHOST)
    }

    /// Starts a server as [`S3::start`] does, at this address instead of the loopback address.
    pub(crate) fn at(ip: Ipv4Addr) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(BUCKET)).unwrap();
        let (faults, uploads) = (Faults::default(), fs::Uploads::default());
        let files = s3s_fs::FileSystem::new(folder.path()).unwrap();
        let mut service =
            S3ServiceBuilder::new(fs::LongKeys { files, faults: faults.clone(), uploads: uploads.clone() });
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let shared = Arc::new(Shared {
            service: service.build(),
            stripes: std::array::from_fn(|_| Mutex::new(())),
            faults: faults.clone(),
        });
        let listener = std::net::TcpListener::bind((ip, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let tasks = Tasks::new();
        let of_thread = tasks.clone();
        let thread = task::spawn_thread("s3", move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(serve(listener, shared, of_thread));
        });
        Self { address, folder, faults, uploads, tasks, thread: Some(thread) }
    }

    /// Returns the URL of the server: `http://ADDRESS:PORT`.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the faults, through which a test injects faults.
    pub(crate) fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Returns the object keys of the multipart uploads that were neither completed nor aborted.
    pub(crate) fn open_uploads(&self) -> Vec<String> {
        self.uploads.keys()
    }

    /// Increases the age of the open multipart uploads by this time.
    pub(crate) fn age_uploads(&self, by: Duration) {
        self.uploads.age(by);
    }

    /// Returns the environment variables with the access keys of the server.
    pub(crate) fn environment(&self) -> [(&'static str, &'static str); 2] {
        [("AWS_ACCESS_KEY_ID", ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", SECRET_KEY)]
    }

    /// Returns the folder whose files are the objects of [`BUCKET`].
    pub(crate) fn bucket(&self) -> std::path::PathBuf {
        self.folder.path().join(BUCKET)
    }

    /// Creates another bucket.
    pub(crate) fn create_bucket(&self, name: &str) {
        std::fs::create_dir(self.folder.path().join(name)).unwrap();
    }

    /// Returns options for a prefix in [`BUCKET`], with timeouts short enough for tests.
    pub(crate) fn options(&self, prefix: &str) -> ObjectStoreOptions {
        ObjectStoreOptions {
            endpoint: Some(self.endpoint()),
            region: Some("us-east-1".to_owned()),
            path_style: Some(true),
            keys: Some(AccessKeys { access_key_id: ACCESS_KEY.to_owned(), secret_access_key: SECRET_KEY.to_owned() }),
            request_timeout: Duration::from_secs(5),
            retry_for: Duration::from_secs(3),
            ..ObjectStoreOptions::new(&format!("s3://{BUCKET}/{prefix}"))
        }
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.tasks.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic of the server thread was already printed. The tests that use the server then fail themselves.
            let _panicked = thread.join();
        }
    }
}

/// Uploads one segment and writes the manifest that lists it.
pub(crate) async fn stage(
    tier: &PartitionTier,
    source: &SegmentSource,
    epoch: LeaderEpoch,
) -> Result<StagedManifest, UploadError> {
    let mut batch = tier.start_upload_batch(epoch).await?;
    batch.add(source).await?;
    batch.finish().await
}

/// Accepts connections and serves each in a task, until the tasks are cancelled. Drops new connections while the server
/// is down.
async fn serve(listener: std::net::TcpListener, shared: Arc<Shared>, tasks: Tasks) {
    let listener = TcpListener::from_std(listener).unwrap();
    loop {
        let (socket, _) = tokio::select! {
            biased;
            () = tasks.cancelled() => return,
            accepted = listener.accept() => accepted.unwrap(),
        };
        if shared.faults.is_down() {
            continue;
        }
        let shared = Arc::clone(&shared);
        tasks.spawn("s3-connection", async move {
            let service = service_fn(|request| respond(Arc::clone(&shared), request));
            // An error only means that a fault or the client broke the connection.
            let _broken = http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
        });
    }
}

/// Error that closes the connection without a response.
#[derive(Debug, thiserror::Error)]
#[error("connection closed")]
struct Cut;

type HttpResponse = hyper::Response<Body>;

/// Serves one request with the injected fault for it, if there is one.
async fn respond(shared: Arc<Shared>, request: hyper::Request<Incoming>) -> Result<HttpResponse, Cut> {
    if shared.faults.is_down() {
        return Err(Cut);
    }
    let (head, body) = request.into_parts();
    let mut content = body.collect().await.map_err(|_| Cut)?.to_bytes();
    let query = head.uri.query().unwrap_or_default();
    let op = Op::of(&head.method, head.uri.path(), query);
    let fault = shared.faults.next_fault(op, head.uri.path());
    match fault {
        Some(Fault::Status(status)) => {
            return Ok(error_response(status, if status == 503 { "SlowDown" } else { "InternalError" }));
        }
        Some(Fault::Vanished) => return Ok(error_response(404, "NoSuchKey")),
        Some(Fault::Refuse) => return Err(Cut),
        Some(Fault::Delay(time)) => tokio::time::sleep(time).await,
        Some(Fault::CorruptRequest) => content = flip(content),
        _ => {}
    }
    let times = if fault == Some(Fault::Twice) { 2 } else { 1 };
    let mut response = None;
    for _ in 0..times {
        let request = hyper::Request::from_parts(head.clone(), Body::from(content.clone()));
        let stripe = head.uri.path().bytes().fold(0usize, |sum, byte| sum.wrapping_mul(31) + usize::from(byte)) % 64;
        let _one_at_a_time = if op == Op::Put { Some(shared.stripes[stripe].lock().await) } else { None };
        response = Some(shared.service.call(request).await.map_err(|_| Cut)?);
    }
    let response = response.ok_or(Cut)?;
    match fault {
        Some(Fault::LostResponse) => Err(Cut),
        Some(Fault::CorruptResponse) => change_body(response, flip).await,
        Some(Fault::CutResponse) => {
            let (head, body) = response.into_parts();
            let body_bytes = body.collect().await.map_err(|_| Cut)?.to_bytes();
            Ok(hyper::Response::from_parts(head, faults::cut(body_bytes)))
        }
        _ => Ok(response),
    }
}

async fn change_body(
    response: HttpResponse,
    change: impl Fn(bytes::Bytes) -> bytes::Bytes,
) -> Result<HttpResponse, Cut> {
    let (head, body) = response.into_parts();
    let body_bytes = body.collect().await.map_err(|_| Cut)?.to_bytes();
    Ok(hyper::Response::from_parts(head, Body::from(change(body_bytes))))
}

/// Flips one bit of the middle byte; empty content stays unchanged.
fn flip(content: bytes::Bytes) -> bytes::Bytes {
    let mut content = content.to_vec();
    if let Some(byte) = (content.len() / 2 < content.len()).then_some(content.len() / 2) {
        content[byte] ^= 0x10;
    }
    content.into()
}

fn error_response(status: u16, code: &str) -> HttpResponse {
    let xml = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>injected</Message></Error>");
    hyper::Response::builder().status(status).body(Body::from(xml)).unwrap()
}
