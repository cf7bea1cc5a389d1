//! A log of requests to the API server, in Kubernetes' terms.

use std::{
    sync::{Mutex, MutexGuard},
    time::Instant,
};

use hyper::{Method, Uri};

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    /// As RBAC has it: `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub(crate) verb: &'static str,
    /// Plural and lower case, as `endpointslices`; empty for paths such as `/version`.
    pub(crate) resource: String,
    /// Empty if it was asked about no namespace or all.
    pub(crate) namespace: String,
    /// Empty if it was asked about no object in particular; a `create` has its name in the body.
    pub(crate) name: String,
    /// The path with its query.
    pub(crate) path: String,
    /// When the request arrived.
    pub(crate) at: Instant,
    /// The status code of the answer; `None` without an answer.
    pub(crate) status: Option<u16>,
}

impl Call {
    /// Whether it is this verb on this resource.
    pub(crate) fn is(&self, verb: &str, resource: &str) -> bool {
        self.verb == verb && self.resource == resource
    }

    /// Whether it changes something.
    pub(crate) fn is_write(&self) -> bool {
        !matches!(self.verb, "get" | "list" | "watch")
    }

    pub(super) fn of(method: &Method, uri: &Uri) -> Self {
        let mut parts = uri.path().split('/').filter(|part| !part.is_empty());
        // /api/VERSION/… and /apis/GROUP/VERSION/…
        let object: Vec<&str> = match parts.next() {
            Some("api") => parts.skip(1).collect(),
            Some("apis") => parts.skip(2).collect(),
            _ => Vec::new(),
        };
        let (namespace, resource, name) = match object[..] {
            ["namespaces", namespace, resource, ref rest @ ..] => (namespace, resource, rest.first().copied()),
            [resource, ref rest @ ..] => ("", resource, rest.first().copied()),
            [] => ("", "", None),
        };
        let watches =
            uri.query().is_some_and(|query| query.split('&').any(|one| one == "watch=true" || one == "watch=1"));
        let verb = match (method.as_str(), name) {
            ("POST", _) => "create",
            ("PUT", _) => "update",
            ("PATCH", _) => "patch",
            ("DELETE", Some(_)) => "delete",
            ("DELETE", None) => "deletecollection",
            (_, None) if watches => "watch",
            (_, None) if !resource.is_empty() => "list",
            _ => "get",
        };
        let path = uri.path_and_query().map(ToString::to_string).unwrap_or_default();
        let [resource, namespace, name] = [resource, namespace, name.unwrap_or_default()].map(str::to_owned);
        Self { verb, resource, namespace, name, path, at: Instant::now(), status: None }
    }
}

/// All requests, in order.
#[derive(Debug, Default)]
pub(super) struct CallLog(Mutex<(Vec<Call>, usize)>);

impl CallLog {
    fn lock(&self) -> MutexGuard<'_, (Vec<Call>, usize)> {
        self.0.lock().expect("nobody panics here")
    }

    /// Appends a request, and returns its number for [`CallLog::answered`].
    pub(super) fn push(&self, call: Call) -> usize {
        let (calls, forgotten) = &mut *self.lock();
        calls.push(call);
        *forgotten + calls.len() - 1
    }

    pub(super) fn answered(&self, number: usize, status: u16) {
        let (calls, forgotten) = &mut *self.lock();
        if let Some(call) = number.checked_sub(*forgotten).and_then(|index| calls.get_mut(index)) {
            call.status = Some(status);
        }
    }

    pub(super) fn all(&self) -> Vec<Call> {
        self.lock().0.clone()
    }

    pub(super) fn clear(&self) {
        let (calls, forgotten) = &mut *self.lock();
        *forgotten += calls.len();
        calls.clear();
    }
}
