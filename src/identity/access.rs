//! What a caller asks to do.

use std::{fmt, net::IpAddr};

use super::NotReviewed;

/// On what something is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessResource {
    /// What is registered.
    Instances,
    /// Join tokens.
    Tokens,
    /// Machines that joined.
    Registrants,
}

impl AccessResource {
    pub(super) const ALL: [Self; 3] = [Self::Instances, Self::Tokens, Self::Registrants];

    /// Its name in the words of RBAC.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Instances => "instances",
            Self::Tokens => "tokens",
            Self::Registrants => "registrants",
        }
    }
}

/// What is done, in the words of Kubernetes RBAC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessVerb {
    /// Register, and update; create a token.
    Create,
    /// Unregister; revoke.
    Delete,
    /// Update or unregister what another identity has registered.
    Override,
    /// Read one service.
    Get,
    /// Read all services of a namespace.
    List,
    /// Follow changes.
    Watch,
    /// Hand over the words of another process, of any instance.
    HandOver,
}

impl AccessVerb {
    pub(super) const ALL: [Self; 7] =
        [Self::Create, Self::Delete, Self::Override, Self::Get, Self::List, Self::Watch, Self::HandOver];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Delete => "delete",
            Self::Override => "override",
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::HandOver => "handover",
        }
    }
}

/// One act of one caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access<'a> {
    /// On what.
    pub resource: AccessResource,
    /// What is done.
    pub verb: AccessVerb,
    /// The namespace; `None` for all of them.
    pub namespace: Option<&'a str>,
    /// The service; `None` for all of the namespace.
    pub service: Option<&'a str>,
    /// The address of the instance that is registered; `None` for other acts, and for a name.
    pub address: Option<IpAddr>,
    /// Where the connection comes from.
    pub peer: IpAddr,
}

/// A page of the admin listener that is asked for, as RBAC knows it: a non-resource URL, and the verb `get`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageAccess<'a> {
    /// The path, as the request has it: nothing is decoded.
    pub path: &'a str,
    /// The instances that the page shows, if any. A rule about the path is enough in a policy file. In Kubernetes it is
    /// not: every cluster lets everybody in it `get` the paths `/api/*` (ClusterRole `system:discovery`), which are those
    /// of its API server.
    pub instances: Option<Access<'a>>,
    /// Where the connection comes from.
    pub peer: IpAddr,
}

/// Why an act is not allowed; `status_details` of a 403.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Denied(pub(super) String);

/// Why an act is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAllowed {
    /// The identity may not.
    #[error("{0}")]
    Denied(Denied),
    /// Nobody can say whether it may.
    #[error("{0}")]
    Undecided(NotReviewed),
}

impl From<Denied> for NotAllowed {
    fn from(denied: Denied) -> Self {
        Self::Denied(denied)
    }
}

impl fmt::Display for Access<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, resource) = (self.verb.as_str(), self.resource.as_str());
        match (self.namespace, self.service) {
            (Some(namespace), Some(service)) => write!(f, "{verb} {resource} of {namespace}/{service}"),
            (Some(namespace), None) => write!(f, "{verb} {resource} of the namespace {namespace}"),
            (None, _) => write!(f, "{verb} {resource} of all namespaces"),
        }
    }
}

impl fmt::Display for PageAccess<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", AccessVerb::Get.as_str(), self.path)
    }
}
