//! The response to a message: what the registry said of it, as a status and its details.

use super::{
    super::proto::registry::{NamedPort, RegistrationResponse},
    InvalidMessage,
};
use crate::{
    identity::{Denied, NotAllowed, NotReviewed},
    metrics::{LabelEnum as _, RegistrationStatus},
    registry::{AddressRefusal, KubernetesRefusal, Outcome, QuotaExceeded, Unavailable},
};

/// The number of a status on the wire: the one of HTTP, where HTTP has one for it.
fn wire_code(status: RegistrationStatus) -> u32 {
    match status {
        RegistrationStatus::Ok => 200,
        RegistrationStatus::Created => 201,
        RegistrationStatus::Accepted => 202,
        RegistrationStatus::Removed => 204,
        RegistrationStatus::Invalid => 400,
        RegistrationStatus::Forbidden => 403,
        RegistrationStatus::NotFound => 404,
        RegistrationStatus::Conflict => 409,
        RegistrationStatus::Unavailable => 503,
        RegistrationStatus::OverQuota => 429,
        RegistrationStatus::Full => 507,
    }
}

/// The status of a response; `None` for a number that this version does not send.
pub(in crate::grpc) fn response_status(response: &RegistrationResponse) -> Option<RegistrationStatus> {
    RegistrationStatus::ALL.iter().copied().find(|&status| wire_code(status) == response.status)
}

/// Why a message does not reach the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::grpc) enum Refusal {
    Invalid(InvalidMessage),
    Denied(Denied),
    /// Nobody can say whether it may.
    Undecided(NotReviewed),
}

impl From<InvalidMessage> for Refusal {
    fn from(invalid: InvalidMessage) -> Self {
        Self::Invalid(invalid)
    }
}

impl From<NotAllowed> for Refusal {
    fn from(err: NotAllowed) -> Self {
        match err {
            NotAllowed::Denied(denied) => Self::Denied(denied),
            NotAllowed::Undecided(err) => Self::Undecided(err),
        }
    }
}

/// Which rule refuses.
fn address_details(refusal: &AddressRefusal, address: &str, namespace: &str) -> String {
    let rule = match refusal {
        AddressRefusal::Denied(network) => format!("{network} (--deny-addresses)"),
        AddressRefusal::ServiceRange(range) => format!("{range}, a range of the cluster's own Services"),
        AddressRefusal::ServiceRangesUnknown => "unknown ranges".into(),
        AddressRefusal::Annotation(text) => {
            let rule = format!("the annotation gangplank.dev/addresses of {namespace} allows {text:?} only");
            return format!("ipaddress: {address} may not be registered: {rule}");
        }
        AddressRefusal::InvalidAnnotation(text) => {
            let rule = format!("the annotation gangplank.dev/addresses of {namespace} is invalid: {text:?}");
            return format!("ipaddress: {address} may not be registered: {rule}");
        }
    };
    format!("ipaddress: {address} may not be registered: it is in {rule}")
}

/// Which number, and which limit.
fn quota_details(exceeded: &QuotaExceeded, namespace: &str) -> String {
    match exceeded {
        QuotaExceeded::Identity { registrant, limit } => format!(
            "{registrant} has {limit} instances or more, which is the limit of one identity (--max-instances-per-identity)"
        ),
        QuotaExceeded::Namespace { limit } => format!(
            "namespace: {namespace} has {limit} instances or more, which is the limit of one namespace \
             (--max-instances-per-namespace)"
        ),
        QuotaExceeded::Annotation { limit: Some(limit) } => format!(
            "namespace: {namespace} has {limit} instances or more, which is its limit (annotation gangplank.dev/max-instances)"
        ),
        QuotaExceeded::Removals { limit } => format!(
            "namespace: {namespace} remembers removals in {limit} services or more, which is its limit; they are forgotten after 32 h"
        ),
        QuotaExceeded::Annotation { limit: None } => format!(
            "namespace: the annotation gangplank.dev/max-instances of {namespace} is not a number, so nothing new is registered"
        ),
    }
}

/// Builds the response to a message. Holds the fields that the response repeats: those that identify the
/// instance, and the request's id.
#[derive(Debug, Default)]
pub(in crate::grpc) struct ResponseBuilder {
    pub(super) kind: i32,
    pub(super) namespace: String,
    pub(super) service_name: String,
    pub(super) ipaddress: String,
    pub(super) ports: Vec<NamedPort>,
    pub(super) request_id: String,
}

impl ResponseBuilder {
    /// The response to a message that was refused here.
    pub(in crate::grpc) fn refused(self, refusal: Refusal) -> RegistrationResponse {
        match refusal {
            Refusal::Invalid(InvalidMessage(details)) => self.answer(RegistrationStatus::Invalid, details, 0),
            Refusal::Denied(denied) => self.answer(RegistrationStatus::Forbidden, denied.to_string(), 0),
            // Nobody has said no: the client shall ask again.
            Refusal::Undecided(err) => {
                self.answer(RegistrationStatus::Unavailable, format!("whether this is allowed: {err}"), 0)
            }
        }
    }

    /// The response to a message that the registry did not accept.
    pub(in crate::grpc) fn unavailable(self, err: &Unavailable) -> RegistrationResponse {
        self.answer(RegistrationStatus::Unavailable, err.to_string(), 0)
    }

    /// The response to a message that the registry carried out in `generation`. `mirrored` is false while
    /// Kubernetes does not have the change yet; of a removal that no slice has, while it is not certain.
    pub(in crate::grpc) fn completed(self, outcome: Outcome, generation: u64, mirrored: bool) -> RegistrationResponse {
        match outcome {
            // First: until Kubernetes has it, 201 and 200 would promise more than is true.
            _ if !mirrored && outcome.is_word() => {
                let details = "durable and served; not in Kubernetes yet, it will follow".into();
                self.answer(RegistrationStatus::Accepted, details, generation)
            }
            Outcome::Created => self.answer(RegistrationStatus::Created, String::new(), generation),
            Outcome::Updated | Outcome::Unchanged => self.answer(RegistrationStatus::Ok, String::new(), generation),
            Outcome::Removed(_) => self.answer(RegistrationStatus::Removed, String::new(), generation),
            Outcome::NotFound { .. } if !mirrored => {
                let details = "nothing is registered there, but another server may have taken over; try again".into();
                self.answer(RegistrationStatus::Unavailable, details, 0)
            }
            Outcome::NotFound { .. } => {
                let details = format!("{}/{} has no instance at {}", self.namespace, self.service_name, self.ipaddress);
                // The ports are a part of what identifies an instance: with others it is another one.
                let with_ports = if self.ports.is_empty() { "" } else { " with exactly these ports" };
                self.answer(RegistrationStatus::NotFound, details + with_ports, generation)
            }
            Outcome::Full { limit } => {
                let details = format!(
                    "the server holds {limit} instances, or remembers removals in that many services, which is its limit; \
                     nothing was added"
                );
                self.answer(RegistrationStatus::Full, details, 0)
            }
            // Not 403: the address may well be allowed, and it is known which as soon as the ranges are listed.
            Outcome::AddressRefused(AddressRefusal::ServiceRangesUnknown) => {
                let details = "ipaddress: the ranges of the cluster's Services are not known yet (the right to list and watch \
                               servicecidrs.networking.k8s.io); try again";
                self.answer(RegistrationStatus::Unavailable, details.into(), 0)
            }
            Outcome::AddressRefused(refusal) => {
                let details = address_details(&refusal, &self.ipaddress, &self.namespace);
                self.answer(RegistrationStatus::Forbidden, details, 0)
            }
            Outcome::OverQuota(exceeded) => {
                let details = quota_details(&exceeded, &self.namespace);
                self.answer(RegistrationStatus::OverQuota, details, 0)
            }
            Outcome::Owned(registrant) => {
                let details = format!(
                    "{} of {}/{} is registered by {registrant}; to change it you need the right of the verb override",
                    self.ipaddress, self.namespace, self.service_name
                );
                self.answer(RegistrationStatus::Conflict, details, 0)
            }
            Outcome::Refused(err) => self.refused_by_kubernetes(err),
        }
    }

    fn refused_by_kubernetes(self, err: KubernetesRefusal) -> RegistrationResponse {
        let Self { namespace, service_name, .. } = &self;
        let (status, details) = match err {
            KubernetesRefusal::Reserved => (
                RegistrationStatus::Forbidden,
                format!("namespace: {namespace}/{service_name} is the cluster's own and never takes registrations"),
            ),
            KubernetesRefusal::NamespaceAbsent => (
                RegistrationStatus::NotFound,
                format!(
                    "namespace: {namespace} does not exist in Kubernetes; create it, or start the server with \
                     --create-namespaces"
                ),
            ),
            KubernetesRefusal::ForeignService => (
                RegistrationStatus::Conflict,
                format!(
                    "service_name: the Service {namespace}/{service_name} is not managed by gangplank; label it \
                     gangplank.dev/service=joined to let external instances join it"
                ),
            ),
        };
        self.answer(status, details, 0)
    }

    fn answer(self, status: RegistrationStatus, details: String, generation: u64) -> RegistrationResponse {
        RegistrationResponse {
            r#type: self.kind,
            namespace: self.namespace,
            service_name: self.service_name,
            ipaddress: self.ipaddress,
            ports: self.ports,
            status: wire_code(status),
            status_details: details,
            request_id: self.request_id,
            generation,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        model::{Registrant, ServerAddress},
        registry::LeaseHolder,
    };

    #[test]
    fn labels_of_statuses_are_their_numbers_on_the_wire() {
        for &status in RegistrationStatus::ALL {
            assert_eq!(status.as_str(), wire_code(status).to_string());
            let response = RegistrationResponse { status: wire_code(status), ..RegistrationResponse::default() };
            assert_eq!(response_status(&response), Some(status));
        }
        let response = RegistrationResponse { status: 418, ..RegistrationResponse::default() };
        assert_eq!(response_status(&response), None);
    }

    #[test]
    fn every_outcome_has_its_status() {
        for (outcome, status, generation) in [
            (Outcome::Created, 201, 5),
            (Outcome::Updated, 200, 5),
            (Outcome::Unchanged, 200, 5),
            (Outcome::Removed(3), 204, 5),
            (Outcome::NotFound { remembered: true }, 404, 5),
            (Outcome::Full { limit: 10 }, 507, 0),
            (Outcome::AddressRefused(AddressRefusal::Annotation("own".into())), 403, 0),
            (Outcome::AddressRefused(AddressRefusal::ServiceRangesUnknown), 503, 0),
            (Outcome::OverQuota(QuotaExceeded::Namespace { limit: 3 }), 429, 0),
            (Outcome::Owned(Registrant::new("vm-1".into()).expect("a name")), 409, 0),
        ] {
            let response = ResponseBuilder::default().completed(outcome.clone(), 5, true);
            assert_eq!((response.status, response.generation), (status, generation), "{outcome:?}");
            assert_eq!(response.status_details.is_empty(), status < 300, "{}", response.status_details);
        }
        for (outcome, status, generation) in [
            (Outcome::Created, 202, 5),
            (Outcome::NotFound { remembered: true }, 202, 5),
            (Outcome::NotFound { remembered: false }, 503, 0),
        ] {
            let response = ResponseBuilder::default().completed(outcome.clone(), 5, false);
            assert_eq!((response.status, response.generation), (status, generation), "{outcome:?}, not confirmed");
        }
        let addresses = ServerAddress::parse_list("10.0.0.1:9080,[2001:db8::1]:9080");
        let standby = Unavailable::Standby(Arc::new(LeaseHolder { name: "other".into(), addresses }));
        assert!(standby.to_string().ends_with("; register at 10.0.0.1:9080 or [2001:db8::1]:9080"), "{standby}");
        for err in [Unavailable::NotReady, standby, Unavailable::ShuttingDown, Unavailable::StorageFailed] {
            let response = ResponseBuilder::default().unavailable(&err);
            assert_eq!((response.status, response.status_details), (503, err.to_string()));
        }
    }
}
