//! The EndpointSlices of the Service through which registrants reach the writer: `--grpc-service`.
//!
//! The Service has no selector, so its slices say where its connections go. The process that writes puts its own
//! address there after the take-over, one slice for each IP family, and looks at every renewal of the Lease whether
//! it is still there. A process that leaves does nothing: the next one overwrites.
//!
//! Every write waits until the Lease is safely held, and is a compare-and-swap. So a late write of an old writer fails,
//! or is seen and corrected by the new one at its next renewal.

use std::{convert::Infallible, future, net::IpAddr};

use k8s_openapi::{
    api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use tracing::{info, warn};

use crate::{
    kubernetes::{
        api::{ApiClient, ApiError, Fence, Preconditions},
        objects::names,
    },
    model::ServerAddress,
};

/// The families: `addressType`, and the end of the slice's name.
const FAMILIES: [(&str, &str); 2] = [("IPv4", "ipv4"), ("IPv6", "ipv6")];

/// Name of the port, in the slices and in the Service.
const PORT_NAME: &str = "grpc";

/// How often a conflict is tried again before the next renewal.
const MAX_ATTEMPTS: u32 = 3;

/// Keeps the slices of one Service.
pub(in crate::kubernetes) struct ServiceSlices {
    api: ApiClient,
    fence: Fence,
    namespace: String,
    service: String,
    /// Where this process takes registrations.
    addresses: Vec<ServerAddress>,
    /// The last error of each family, to log each once.
    failures: [Option<ApiError>; 2],
}

/// What a slice needs.
#[derive(Debug, PartialEq)]
enum SliceChange {
    None,
    /// It is another's.
    Foreign,
    Create,
    Replace(Box<EndpointSlice>),
    Delete,
}

impl ServiceSlices {
    pub(in crate::kubernetes) fn new(
        api: ApiClient,
        fence: Fence,
        namespace: String,
        service: String,
        addresses: Vec<ServerAddress>,
    ) -> Self {
        Self { api, fence, namespace, service, addresses, failures: [None, None] }
    }

    /// Writes the slices while this process writes. Never ends.
    pub(in crate::kubernetes) async fn run(mut self) -> Infallible {
        let mut renewals = self.fence.renewals();
        loop {
            // The sender lives as long as the fence.
            if renewals.changed().await.is_err() {
                return future::pending().await;
            }
            // This process does not write: the slices are the next writer's.
            if renewals.borrow_and_update().is_none() {
                continue;
            }
            for family in 0..FAMILIES.len() {
                let result = self.keep(family).await;
                self.note(family, result.err());
            }
        }
    }

    fn note(&mut self, family: usize, err: Option<ApiError>) {
        // Every renewal tries again; the log has one line for each change.
        if self.failures[family] == err {
            return;
        }
        let slice = format!("{}/{}", self.namespace, slice_name(&self.service, family));
        match &err {
            Some(err) => warn!(
                slice, %err,
                "the EndpointSlice of --grpc-service cannot be written: registrants do not find this process by it; retrying"
            ),
            None => info!(slice, "the EndpointSlice of --grpc-service can be written again"),
        }
        self.failures[family] = err;
    }

    async fn keep(&self, family: usize) -> Result<(), ApiError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.try_keep(family).await {
                // Somebody else wrote meanwhile.
                Err(ApiError::Conflict | ApiError::AlreadyExists | ApiError::NotFound) if attempts < MAX_ATTEMPTS => {}
                result => return result,
            }
        }
    }

    async fn try_keep(&self, family: usize) -> Result<(), ApiError> {
        let (namespace, name) = (&self.namespace, slice_name(&self.service, family));
        let found = match self.api.get::<EndpointSlice>(namespace, &name).await {
            Ok(found) => Some(found),
            Err(ApiError::NotFound) => None,
            Err(err) => return Err(err),
        };
        let wanted = render(namespace, &self.service, family, &self.addresses);
        match change(found.as_ref(), wanted.as_ref()) {
            SliceChange::None => return Ok(()),
            SliceChange::Foreign => {
                let label = format!("{} is not {}", names::MANAGED_BY, names::WRITER_MANAGER);
                return Err(ApiError::Invalid(format!("it exists, and its label {label}")));
            }
            SliceChange::Create => {
                if let Some(wanted) = &wanted {
                    self.api.create(namespace, wanted).await?;
                }
            }
            SliceChange::Replace(slice) => {
                self.api.replace(namespace, &name, &*slice).await?;
            }
            SliceChange::Delete => {
                if let Some(found) = &found {
                    self.api.delete::<EndpointSlice>(namespace, Preconditions::of(&found.metadata)).await?;
                }
                if wanted.is_some() {
                    return Err(ApiError::Conflict); // again, to create it
                }
            }
        }
        info!(slice = format!("{namespace}/{name}"), "the EndpointSlice of --grpc-service names this process");
        Ok(())
    }
}

fn slice_name(service: &str, family: usize) -> String {
    format!("{service}-gangplank-{}", FAMILIES[family].1)
}

/// The slice as it must be; `None` if this process has no address of the family.
fn render(namespace: &str, service: &str, family: usize, addresses: &[ServerAddress]) -> Option<EndpointSlice> {
    // Names are not resolved here: a slice of type FQDN is not read by kube-proxy.
    let of_family = |ip: &IpAddr| if family == 0 { ip.is_ipv4() } else { ip.is_ipv6() };
    let mut ips = addresses.iter().filter_map(|address| Some((address.ip().filter(of_family)?, address.port())));
    let (first, port) = ips.next()?;
    // A slice has one list of ports for all of its endpoints.
    let others = ips.filter(|(_, other)| *other == port).map(|(ip, _)| ip);
    let endpoints = std::iter::once(first).chain(others).map(|ip| Endpoint {
        addresses: vec![ip.to_string()],
        conditions: Some(EndpointConditions { ready: Some(true), ..EndpointConditions::default() }),
        ..Endpoint::default()
    });
    let labels = [(names::SERVICE_NAME, service), (names::MANAGED_BY, names::WRITER_MANAGER)];
    Some(EndpointSlice {
        address_type: FAMILIES[family].0.into(),
        endpoints: endpoints.collect(),
        metadata: ObjectMeta {
            name: Some(slice_name(service, family)),
            namespace: Some(namespace.into()),
            labels: Some(labels.map(|(key, value)| (key.into(), value.into())).into()),
            ..ObjectMeta::default()
        },
        ports: Some(vec![EndpointPort {
            name: Some(PORT_NAME.into()),
            port: Some(port.into()),
            protocol: Some("TCP".into()),
            ..EndpointPort::default()
        }]),
    })
}

fn change(found: Option<&EndpointSlice>, wanted: Option<&EndpointSlice>) -> SliceChange {
    let Some(found) = found else {
        return if wanted.is_some() { SliceChange::Create } else { SliceChange::None };
    };
    let label = |key| found.metadata.labels.as_ref().and_then(|labels| labels.get(key)).map(String::as_str);
    if label(names::MANAGED_BY) != Some(names::WRITER_MANAGER) {
        return SliceChange::Foreign;
    }
    let Some(wanted) = wanted else { return SliceChange::Delete };
    if found.address_type != wanted.address_type {
        // The type cannot be changed.
        return SliceChange::Delete;
    }
    let mut slice = found.clone();
    slice.endpoints.clone_from(&wanted.endpoints);
    slice.ports.clone_from(&wanted.ports);
    let labels = slice.metadata.labels.get_or_insert_default();
    // kube-proxy does not watch slices with this label.
    labels.remove(names::HEADLESS);
    labels.extend(wanted.metadata.labels.clone().unwrap_or_default());
    if slice == *found { SliceChange::None } else { SliceChange::Replace(Box::new(slice)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(family: usize, addresses: &str) -> Option<EndpointSlice> {
        render("gangplank", "registry", family, &ServerAddress::parse_list(addresses))
    }

    #[test]
    fn each_family_has_its_slice_with_the_addresses_of_one_port() {
        let list = "10.0.0.1:9080,gangplank.example.com:9080,[2001:db8::1]:9081,10.0.0.2:9080,10.0.0.3:1";
        let four = slice(0, list).expect("there is an IPv4 address");
        assert_eq!(four.metadata.name.as_deref(), Some("registry-gangplank-ipv4"));
        let addresses: Vec<_> = four.endpoints.iter().flat_map(|endpoint| &endpoint.addresses).collect();
        assert_eq!(addresses, ["10.0.0.1", "10.0.0.2"]);
        let six = slice(1, list).expect("there is an IPv6 address");
        assert_eq!(six.address_type, "IPv6");
        assert_eq!(six.ports.expect("one")[0].port, Some(9081));
        assert_eq!(slice(1, "10.0.0.1:9080"), None);
    }

    #[test]
    fn slice_is_written_only_if_it_differs_and_is_ours() {
        let wanted = slice(0, "10.0.0.1:9080");
        let wanted = wanted.as_ref();
        assert_eq!(change(None, None), SliceChange::None);
        assert_eq!(change(None, wanted), SliceChange::Create);
        assert_eq!(change(wanted, wanted), SliceChange::None);
        assert_eq!(change(wanted, None), SliceChange::Delete);
        let other = slice(0, "10.0.0.2:9080");
        assert_eq!(change(other.as_ref(), wanted), SliceChange::Replace(Box::new(wanted.expect("one").clone())));
        assert_eq!(change(slice(1, "[2001:db8::1]:9080").as_ref(), wanted), SliceChange::Delete);

        let mut edited = wanted.expect("one").clone();
        let labels = edited.metadata.labels.get_or_insert_default();
        labels.insert(names::HEADLESS.into(), String::new());
        labels.insert("team".into(), "net".into());
        let SliceChange::Replace(repaired) = change(Some(&edited), wanted) else { panic!("it differs") };
        let labels = repaired.metadata.labels.expect("labels");
        assert!(labels.contains_key("team") && !labels.contains_key(names::HEADLESS));
        edited.metadata.labels.get_or_insert_default().insert(names::MANAGED_BY.into(), "somebody".into());
        assert_eq!(change(Some(&edited), wanted), SliceChange::Foreign);
    }
}
