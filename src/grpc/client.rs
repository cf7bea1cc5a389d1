//! The client side of both services, in model types: for the command line and the agent.

use crate::model::{Draft, Instance, Service, ServiceKey, Timeline};
use std::sync::Arc;

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("no gangplank server at {url}")]
    Unreachable {
        /// The URL that was dialled.
        url: String,
        /// What the transport said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The URL is not one.
    #[error("{url:?} is not a server URL such as http://127.0.0.1:9080")]
    Url {
        /// What was given.
        url: String,
    },
    /// The server answered the call with a gRPC status.
    #[error("the server answered {code}: {message}")]
    Status {
        /// The status code in words.
        code: String,
        /// Its message.
        message: String,
    },
    /// The server's answer makes no sense to this version.
    #[error("the server's answer cannot be read: {0}")]
    Answer(String),
}

/// The outcome of a registration or removal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// 201, 200, 204, 400, ….
    pub status: u32,
    /// For a refusal: the field and the reason.
    pub details: String,
    /// The generation in which it is served.
    pub generation: u64,
}

/// What a watch says.
#[derive(Debug, Clone)]
pub enum WatchEvent {
    /// A service as it stands.
    Snapshot(ServiceKey, Service),
    /// The snapshot is complete.
    Synced {
        /// Up to which generation.
        generation: u64,
        /// Where to go on.
        cursor: Vec<u8>,
    },
    /// One change.
    Change {
        /// Added, updated or removed.
        kind: ChangeKind,
        /// Under this service.
        service: ServiceKey,
        /// The instance after it, or as it last was.
        instance: Arc<Instance>,
        /// With which generation.
        generation: u64,
        /// When it reached each station.
        timeline: Timeline,
        /// Where to go on.
        cursor: Vec<u8>,
    },
    /// The watch is over and must begin again without a cursor.
    Restart {
        /// `slow reader`, `unknown cursor`, `shutting down`.
        reason: &'static str,
        /// What the server says about it.
        message: String,
    },
}

/// What happened to an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// Its attributes or its readiness changed.
    Updated,
    /// It is gone.
    Removed,
}

/// A watch that is open.
#[derive(Debug)]
pub struct Watch {}

impl Watch {
    /// The next event; `None` when the server ended the stream.
    ///
    /// # Errors
    /// When the connection breaks or the answer cannot be read.
    pub async fn next(&mut self) -> Result<Option<WatchEvent>, ClientError> {
        Ok(None)
    }
}

/// A connection to a server.
#[derive(Debug, Clone)]
pub struct Client {}

impl Client {
    /// Dials `url`, for instance `http://127.0.0.1:9080`.
    ///
    /// # Errors
    /// When it is not a URL or nobody listens there.
    pub async fn connect(url: &str) -> Result<Self, ClientError> {
        Err(ClientError::Url { url: url.into() })
    }

    /// Registers one instance. A refusal is an [`Answer`] too.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn register(&mut self, _namespace: &str, _name: &str, _draft: &Draft) -> Result<Answer, ClientError> {
        Err(ClientError::Answer(String::new()))
    }

    /// Removes one instance; without ports in `draft`, all of its address. Only address and ports count.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn unregister(&mut self, _namespace: &str, _name: &str, _draft: &Draft) -> Result<Answer, ClientError> {
        Err(ClientError::Answer(String::new()))
    }

    /// One service, or `None`.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn service(&mut self, _key: &ServiceKey) -> Result<Option<Service>, ClientError> {
        Err(ClientError::Answer(String::new()))
    }

    /// All services in order, or those of one namespace.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn services(&mut self, _namespace: Option<&str>) -> Result<Vec<(ServiceKey, Service)>, ClientError> {
        Err(ClientError::Answer(String::new()))
    }

    /// Watches all, one namespace, or one service; from a cursor, or from a snapshot.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn watch(
        &mut self,
        _namespace: Option<&str>,
        _service: Option<&str>,
        _cursor: Option<Vec<u8>>,
    ) -> Result<Watch, ClientError> {
        Err(ClientError::Answer(String::new()))
    }
}
