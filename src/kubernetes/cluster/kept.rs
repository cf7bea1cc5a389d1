//! What is kept of each object.

use std::sync::Arc;

use k8s_openapi::{
    api::{core::v1::Service, discovery::v1::EndpointSlice},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::objects::Object;
use crate::{
    kubernetes::{services::Ownership, slices::Standing},
    model::{self, ServiceKey, ServiceName},
};

/// Namespace and name of an object.
pub(super) type Place = (Box<str>, Box<str>);

/// What is kept of an EndpointSlice that is, or was, ours.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::kubernetes) struct OurSlice {
    pub(super) place: Place,
    pub(super) uid: Box<str>,
    pub(super) version: Box<str>,
    /// `None` when it does not say any more whose it is.
    pub(in crate::kubernetes) standing: Option<Standing>,
}

impl OurSlice {
    /// Reads it. `None` when it has no name, uid or version, as no object from the API server has.
    pub(in crate::kubernetes) fn read(slice: &EndpointSlice) -> Option<Self> {
        let meta = &slice.metadata;
        Some(Self {
            place: (meta.namespace.as_deref()?.into(), meta.name.as_deref()?.into()),
            uid: meta.uid.as_deref()?.into(),
            version: meta.resource_version.as_deref()?.into(),
            standing: Standing::read(slice),
        })
    }
}

/// What is kept of a namespace.
#[derive(Debug, PartialEq)]
pub(super) struct StandingNamespace {
    pub(super) uid: Box<str>,
    pub(super) version: Box<str>,
    pub(super) terminating: bool,
}

/// A Service, and whose it is.
#[derive(Debug, PartialEq)]
pub(super) struct Owned {
    pub(super) uid: Box<str>,
    pub(super) version: Box<str>,
    pub(super) ownership: Ownership,
    /// Of [`Ownership::Ours`] only.
    pub(super) object: Option<Arc<Service>>,
}

impl StandingNamespace {
    pub(super) fn read(meta: &ObjectMeta) -> Option<(Box<str>, Self)> {
        let standing = Self {
            uid: meta.uid.as_deref()?.into(),
            version: meta.resource_version.as_deref()?.into(),
            terminating: meta.deletion_timestamp.is_some(),
        };
        Some((meta.name.as_deref()?.into(), standing))
    }
}

impl Object for StandingNamespace {
    fn uid(&self) -> &str {
        &self.uid
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn says_the_same(&self, later: &Self) -> bool {
        self.terminating == later.terminating
    }
}

impl Owned {
    pub(super) fn read(mut service: Service) -> Option<Self> {
        service.metadata.managed_fields = None;
        let meta = &service.metadata;
        let ownership = Ownership::of(meta);
        Some(Self {
            uid: meta.uid.as_deref()?.into(),
            version: meta.resource_version.as_deref()?.into(),
            ownership,
            object: (ownership == Ownership::Ours).then(|| Arc::new(service)),
        })
    }
}

impl Object for Owned {
    fn uid(&self) -> &str {
        &self.uid
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn says_the_same(&self, later: &Self) -> bool {
        let content = |one: &Self| {
            one.object.as_deref().map(|object| {
                let mut object = object.clone();
                object.metadata.resource_version = None;
                object
            })
        };
        self.ownership == later.ownership && content(self) == content(later)
    }
}

impl Object for Standing {
    fn uid(&self) -> &str {
        &self.uid
    }

    fn version(&self) -> &str {
        &self.resource_version
    }

    fn says_the_same(&self, later: &Self) -> bool {
        // Without a digest it is not known what another hand wrote.
        later.digest.is_some() && *self == Self { resource_version: self.resource_version.clone(), ..later.clone() }
    }
}

/// The service that a Service gives its name to; `None` where the name can be none of ours.
pub(super) fn service_key(meta: &ObjectMeta) -> Option<ServiceKey> {
    let namespace = model::Namespace::parse(meta.namespace.as_deref()?).ok()?;
    Some(ServiceKey::new(namespace, ServiceName::parse(meta.name.as_deref()?).ok()?))
}
