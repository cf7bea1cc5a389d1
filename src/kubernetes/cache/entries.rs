//! What the cache keeps of each object.

use std::sync::Arc;

use k8s_openapi::{
    api::{core::v1::Service, discovery::v1::EndpointSlice},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::object_store::CachedObject;
use crate::{
    kubernetes::objects::{names, services::Ownership, slices::ObservedSlice},
    model::{self, AddressPattern, ServiceKey, ServiceName},
    registry::{AnnotatedAddresses, AnnotatedQuota},
};

/// Namespace and name of an object.
pub(super) type ObjectKey = (Box<str>, Box<str>);

/// An EndpointSlice that is, or was, ours.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::kubernetes) struct CachedSlice {
    pub(super) key: ObjectKey,
    pub(super) uid: Box<str>,
    pub(super) resource_version: Box<str>,
    /// `None` when its labels do not name a service of ours any more.
    pub(in crate::kubernetes) observed: Option<ObservedSlice>,
}

impl CachedSlice {
    /// Reads a slice. `None` without a name, uid or resourceVersion, which the API server always sets.
    pub(in crate::kubernetes) fn read(slice: &EndpointSlice) -> Option<Self> {
        let meta = &slice.metadata;
        Some(Self {
            key: (meta.namespace.as_deref()?.into(), meta.name.as_deref()?.into()),
            uid: meta.uid.as_deref()?.into(),
            resource_version: meta.resource_version.as_deref()?.into(),
            observed: ObservedSlice::read(slice),
        })
    }
}

/// What matters of a namespace, with its version.
#[derive(Debug, PartialEq)]
pub(super) struct CachedNamespace {
    pub(super) uid: Box<str>,
    pub(super) resource_version: Box<str>,
    pub(super) terminating: bool,
    /// By its annotation.
    pub(super) quota: Option<AnnotatedQuota>,
    /// By its annotation.
    pub(super) addresses: Option<AnnotatedAddresses>,
}

/// A Service and its owner.
#[derive(Debug, PartialEq)]
pub(super) struct CachedService {
    pub(super) uid: Box<str>,
    pub(super) resource_version: Box<str>,
    pub(super) ownership: Ownership,
    /// `Some` for [`Ownership::Ours`] only, without its managed fields.
    pub(super) object: Option<Arc<Service>>,
}

/// Our Endpoints object of a service. Its content is read when the service is reconciled.
#[derive(Debug, PartialEq)]
pub(super) struct CachedEndpoints {
    pub(super) uid: Box<str>,
    pub(super) resource_version: Box<str>,
}

impl CachedEndpoints {
    pub(super) fn read(meta: &ObjectMeta) -> Option<(ServiceKey, Self)> {
        let cached =
            Self { uid: meta.uid.as_deref()?.into(), resource_version: meta.resource_version.as_deref()?.into() };
        Some((service_key(meta)?, cached))
    }
}

impl CachedObject for CachedEndpoints {
    fn uid(&self) -> &str {
        &self.uid
    }

    fn resource_version(&self) -> &str {
        &self.resource_version
    }

    fn same_content(&self, _: &Self) -> bool {
        false // not known
    }
}

fn annotated<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(key).map(String::as_str)
}

impl CachedNamespace {
    pub(super) fn read(meta: &ObjectMeta) -> Option<(Box<str>, Self)> {
        let cached = Self {
            uid: meta.uid.as_deref()?.into(),
            resource_version: meta.resource_version.as_deref()?.into(),
            // The API server refuses every object that would be created in it from then on.
            terminating: meta.deletion_timestamp.is_some(),
            quota: annotated(meta, names::MAX_INSTANCES)
                .map(|text| text.parse().map_or(AnnotatedQuota::Invalid, AnnotatedQuota::Limit)),
            addresses: annotated(meta, names::ADDRESSES).map(|text| AnnotatedAddresses {
                text: text.into(),
                allowed: AddressPattern::parse_list(text).ok().map(Into::into),
            }),
        };
        Some((meta.name.as_deref()?.into(), cached))
    }
}

/// What matters of a namespace.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct NamespaceFields {
    pub(super) terminating: bool,
    pub(super) quota: Option<AnnotatedQuota>,
    pub(super) addresses: Option<AnnotatedAddresses>,
}

impl CachedNamespace {
    pub(super) fn state(&self) -> NamespaceFields {
        NamespaceFields { terminating: self.terminating, quota: self.quota, addresses: self.addresses.clone() }
    }
}

impl CachedObject for CachedNamespace {
    fn uid(&self) -> &str {
        &self.uid
    }

    fn resource_version(&self) -> &str {
        &self.resource_version
    }

    fn same_content(&self, later: &Self) -> bool {
        self.state() == later.state()
    }
}

impl CachedService {
    /// Reads a Service of which `known` is what was read last.
    pub(super) fn read(mut service: Service, known: Option<&Self>) -> Option<Self> {
        // Often larger than the rest of the object, and of no use here.
        service.metadata.managed_fields = None;
        let known_uid = known.filter(|known| known.ownership == Ownership::Ours).map(|known| &*known.uid);
        let ownership = Ownership::of(&service, known_uid);
        let meta = &service.metadata;
        Some(Self {
            uid: meta.uid.as_deref()?.into(),
            resource_version: meta.resource_version.as_deref()?.into(),
            ownership,
            object: (ownership == Ownership::Ours).then(|| Arc::new(service)),
        })
    }
}

impl CachedObject for CachedService {
    fn uid(&self) -> &str {
        &self.uid
    }

    fn resource_version(&self) -> &str {
        &self.resource_version
    }

    fn same_content(&self, later: &Self) -> bool {
        // Without the version, which changes with every write, also of the status by others.
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

impl CachedObject for ObservedSlice {
    fn uid(&self) -> &str {
        &self.uid
    }

    fn resource_version(&self) -> &str {
        &self.resource_version
    }

    fn same_content(&self, later: &Self) -> bool {
        // Without a digest the content is not known: another writer changed it.
        later.digest.is_some() && *self == Self { resource_version: self.resource_version.clone(), ..later.clone() }
    }
}

/// The service of a Service; `None` when its name is not valid for a service of ours.
pub(super) fn service_key(meta: &ObjectMeta) -> Option<ServiceKey> {
    let namespace = model::Namespace::parse(meta.namespace.as_deref()?).ok()?;
    Some(ServiceKey::new(namespace, ServiceName::parse(meta.name.as_deref()?).ok()?))
}
