//! A fault-injecting proxy between gangplank and the API server.
//!
//! The proxy serves the API server's own certificate, so that clients do not notice it. Each incoming
//! connection has an outgoing one, opened for its first request; when one end closes, so does the
//! other. Requests that match no rule pass unchanged, watches as a stream. The proxy never retries.
//!
//! ```text
//! let proxy = Proxy::start(&cluster);           // gangplank: --kubeconfig proxy.kubeconfig()
//! proxy.inject_first(3, Fault::answer(429).retry_after(1), |call| call.is("update", "endpointslices"));
//! let hung = proxy.inject(Fault::HangAfter, |call| call.is("update", "endpointslices"));
//! hung.wait_hits(1);
//! hung.lift();
//! assert_eq!(proxy.count(|call| call.is("create", "services")), 1);
//! ```

mod call;
mod rules;

use std::{
    convert::Infallible,
    error::Error,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
};

use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    client::conn::http1::{self as client, SendRequest},
    header,
    server::conn::http1 as server,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{
    net::TcpStream,
    sync::{Mutex, watch},
    task::JoinSet,
};
use tokio_rustls::{
    TlsAcceptor, TlsConnector,
    rustls::{ClientConfig, ServerConfig},
};
use tokio_util::sync::CancellationToken;

pub(crate) use self::{
    call::Call,
    rules::{Fault, InjectedFault},
};
use self::{call::CallLog, rules::FaultRules};
use super::cluster::Cluster;

type BoxError = Box<dyn Error + Send + Sync>;
type Body = UnsyncBoxBody<Bytes, BoxError>;

/// Runs until it is dropped.
pub(crate) struct Proxy {
    port: u16,
    kubeconfig: PathBuf,
    shared: Arc<ProxyState>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// What all connections share.
struct ProxyState {
    port: u16,
    tls: Arc<ClientConfig>,
    serving: Arc<ServerConfig>,
    calls: CallLog,
    rules: Arc<FaultRules>,
    /// A new value closes every connection that is open.
    cut: watch::Sender<()>,
}

impl Proxy {
    /// Starts a proxy for this cluster's API server, which may be stopped.
    pub(crate) fn start(cluster: &Cluster) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        listener.set_nonblocking(true).expect("sockets can do that");
        let port = listener.local_addr().expect("it is bound").port();
        let shared = Arc::new(ProxyState {
            port: cluster.port(),
            tls: cluster.tls(),
            serving: cluster.serving_tls(),
            calls: CallLog::default(),
            rules: Arc::default(),
            cut: watch::Sender::new(()),
        });
        let stop = CancellationToken::new();
        let run = accept(listener, Arc::clone(&shared), stop.clone());
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
        let thread = thread::Builder::new().name("proxy".to_owned()).spawn(move || runtime.block_on(run));
        let kubeconfig = cluster.kubeconfig_for_gangplank_at(&format!("https://127.0.0.1:{port}"));
        Self { port, kubeconfig, shared, stop, thread: Some(thread.expect("a thread can be made")) }
    }

    /// Where it listens, as a URL.
    pub(crate) fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// The kubeconfig of gangplank's account by way of this proxy.
    pub(crate) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Applies `fault` to every request that `matches`, until it is lifted. Of several rules that
    /// match, the oldest applies.
    pub(crate) fn inject(
        &self,
        fault: Fault,
        matches: impl Fn(&Call) -> bool + Send + Sync + 'static,
    ) -> InjectedFault {
        self.shared.rules.add(fault, usize::MAX, Box::new(matches))
    }

    /// Applies `fault` to the first `times` requests that match; later ones pass.
    pub(crate) fn inject_first(
        &self,
        times: usize,
        fault: Fault,
        matches: impl Fn(&Call) -> bool + Send + Sync + 'static,
    ) -> InjectedFault {
        self.shared.rules.add(fault, times, Box::new(matches))
    }

    /// All requests so far, in order.
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.shared.calls.all()
    }

    /// How many requests so far match.
    pub(crate) fn count(&self, matches: impl Fn(&Call) -> bool) -> usize {
        self.shared.calls.all().iter().filter(|call| matches(call)).count()
    }

    /// Clears the log, so that counts begin at zero.
    pub(crate) fn forget_calls(&self) {
        self.shared.calls.clear();
    }

    /// Closes every connection that is open now, as a restarting load balancer does.
    pub(crate) fn drop_connections(&self) {
        self.shared.cut.send_replace(());
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

async fn accept(listener: TcpListener, shared: Arc<ProxyState>, stop: CancellationToken) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("it does not block");
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let (socket, _) = accepted.expect("descriptors are free");
                connections.spawn(serve(Arc::clone(&shared), socket));
            }
        }
    }
}

/// Serves one connection until either side closes it.
async fn serve(shared: Arc<ProxyState>, socket: TcpStream) {
    let _ = socket.set_nodelay(true);
    let mut cut = shared.cut.subscribe();
    let upstream = Arc::new(Mutex::new(Upstream::default()));
    let service = service_fn(|request| answer(Arc::clone(&shared), Arc::clone(&upstream), request));
    let tls = TlsAcceptor::from(Arc::clone(&shared.serving));
    let connection = async {
        let stream = TokioIo::new(tls.accept(socket).await?);
        Ok::<(), BoxError>(server::Builder::new().serve_connection(stream, service).await?)
    };
    tokio::select! {
        _ = connection => {}
        _ = cut.changed() => {}
    }
}

/// The connection to the API server that belongs to an incoming one.
#[derive(Default)]
struct Upstream {
    sender: Option<SendRequest<Incoming>>,
    /// Drives the connection; aborted when the incoming connection ends.
    driver: JoinSet<()>,
}

impl Upstream {
    async fn send(&mut self, shared: &ProxyState, request: Request<Incoming>) -> Result<Response<Incoming>, BoxError> {
        let sender = match &mut self.sender {
            Some(sender) => sender,
            None => {
                let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, shared.port)).await?;
                socket.set_nodelay(true)?;
                let tls = TlsConnector::from(Arc::clone(&shared.tls));
                let stream = tls.connect(Ipv4Addr::LOCALHOST.into(), socket).await?;
                let (sender, connection) = client::handshake(TokioIo::new(stream)).await?;
                self.driver.spawn(async move {
                    let _ = connection.await;
                });
                self.sender.insert(sender)
            }
        };
        sender.ready().await?;
        Ok(sender.send_request(request).await?)
    }
}

/// An error closes the connection without an answer.
async fn answer(
    shared: Arc<ProxyState>,
    upstream: Arc<Mutex<Upstream>>,
    request: Request<Incoming>,
) -> Result<Response<Body>, BoxError> {
    let call = Call::of(request.method(), request.uri());
    let number = shared.calls.push(call.clone());
    let forward = async { upstream.lock().await.send(&shared, request).await };
    let injected = shared.rules.apply(&call);
    let response = match injected.as_ref().map(|rule| rule.fault()) {
        None => pass(&shared, call, forward.await?),
        Some(Fault::Answer { code, retry_after }) => refusal(code, retry_after),
        Some(Fault::ErrorEvent(code)) => error_event(code),
        Some(fault) => {
            if matches!(fault, Fault::HangAfter | Fault::DropAfter) {
                forward.await?.into_body().collect().await?; // carried out, to the last byte
            }
            if let Some(rule) = injected.filter(|_| matches!(fault, Fault::Hang | Fault::HangAfter)) {
                rule.lifted().await;
            }
            return Err("dropped on purpose".into());
        }
    };
    shared.calls.answered(number, response.status().as_u16());
    Ok(response)
}

/// Passes the answer on frame by frame, except while a rule stalls it.
fn pass(shared: &ProxyState, call: Call, response: Response<Incoming>) -> Response<Body> {
    let rules = Arc::clone(&shared.rules);
    response.map(|body| {
        let frames = stream::unfold((body, rules, call), |(mut body, rules, call)| async move {
            let frame = body.frame().await;
            rules.flows(&call).await;
            frame.map(|frame| (frame.map_err(BoxError::from), (body, rules, call)))
        });
        StreamBody::new(frames).boxed_unsync()
    })
}

/// An error answer in the form of the API server.
fn refusal(code: u16, retry_after: Option<u32>) -> Response<Body> {
    let body = Full::from(status(code).to_string()).map_err(|never: Infallible| match never {}).boxed_unsync();
    let mut response = Response::builder().status(code).header(header::CONTENT_TYPE, "application/json");
    if let Some(seconds) = retry_after {
        response = response.header(header::RETRY_AFTER, seconds);
    }
    response.body(body).expect("a test injects a valid code")
}

/// A watch whose only event is an error, as the API server reports 410 on a watch.
fn error_event(code: u16) -> Response<Body> {
    let event = json!({"type": "ERROR", "object": status(code)}).to_string() + "\n";
    let frames = stream::iter([Ok(Frame::data(Bytes::from(event)))]);
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

fn status(code: u16) -> serde_json::Value {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        422 => "Invalid",
        429 => "TooManyRequests",
        500 => "InternalError",
        503 => "ServiceUnavailable",
        504 => "Timeout",
        _ => "Unknown",
    };
    let text = StatusCode::from_u16(code).ok().and_then(|code| code.canonical_reason()).unwrap_or("injected");
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": format!("{text} (injected by a test)"), "reason": reason, "code": code})
}
