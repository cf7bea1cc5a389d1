//! Which addresses may be registered: an EndpointSlice that points where it should not makes the cluster's own proxies reach
//! what its writer could not (Kubernetes, CVE-2021-25740).

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use super::Requester;
use crate::model::{Address, AddressPattern, ServiceKey};

/// Which rule refuses an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AddressRefusal {
    /// A network of `--deny-addresses`.
    Denied(IpNet),
    /// A range of the cluster's Services.
    ServiceRange(IpNet),
    /// The ranges of the cluster's Services are not known yet.
    ServiceRangesUnknown,
    /// The annotation of the namespace, with its text.
    Annotation(Arc<str>),
    /// The annotation of the namespace is invalid.
    InvalidAnnotation(Arc<str>),
}

/// What a namespace's annotation says of addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnnotatedAddresses {
    /// The annotation.
    pub text: Arc<str>,
    /// What it allows; `None` if it is invalid: nothing is registered until it is corrected.
    pub allowed: Option<Arc<[AddressPattern]>>,
}

/// The rules, as far as they are known.
#[derive(Debug)]
pub(super) struct AddressRules {
    denied: Vec<IpNet>,
    /// `None` while they are not known.
    service_ranges: Option<Vec<IpNet>>,
    namespaces: HashMap<Box<str>, AnnotatedAddresses>,
}

impl AddressRules {
    pub(super) fn new(kubernetes: bool) -> Self {
        Self { denied: Vec::new(), service_ranges: (!kubernetes).then(Vec::new), namespaces: HashMap::new() }
    }

    pub(super) fn set_denied(&mut self, denied: Vec<IpNet>) {
        self.denied = denied;
    }

    pub(super) fn set_service_ranges(&mut self, ranges: Vec<IpNet>) {
        self.service_ranges = Some(ranges);
    }

    pub(super) fn set_annotated(&mut self, namespace: Box<str>, annotated: Option<AnnotatedAddresses>) {
        match annotated {
            Some(annotated) => drop(self.namespaces.insert(namespace, annotated)),
            None => drop(self.namespaces.remove(&namespace)),
        }
    }

    /// Whether an address may not be served that a registered name leads to: it is denied, or a Service's. Whoever may register
    /// the name does not own what it leads to, so this holds for everybody.
    ///
    /// While the ranges of Services are not known, any address may be in one.
    pub(super) fn denies_resolved(&self, ip: IpAddr) -> bool {
        let Some(service_ranges) = &self.service_ranges else { return true };
        let networks = || self.denied.iter().chain(service_ranges);
        let leads_to = [Some(ip), Address::translated(ip)];
        leads_to.into_iter().flatten().any(|ip| networks().any(|network| network.contains(&ip)))
    }

    /// Why `by` may not register `address` under `service`. `--deny-addresses` holds for everybody; who may do all is bound by
    /// nothing else.
    pub(super) fn refuse(&self, service: &ServiceKey, address: &Address, by: &Requester) -> Option<AddressRefusal> {
        let ip = address.ip();
        let leads_to = [ip, ip.and_then(Address::translated)];
        let within = |networks: &[IpNet]| {
            networks.iter().copied().find(|one| leads_to.iter().flatten().any(|ip| one.contains(ip)))
        };
        // First, and for everybody: the operator's own rule.
        if let Some(network) = within(&self.denied) {
            return Some(AddressRefusal::Denied(network));
        }
        let Requester::Identity { peer, .. } = by else { return None };
        match &self.service_ranges {
            // Fails closed: an address of a Service that is not known yet would be accepted for good.
            None => return Some(AddressRefusal::ServiceRangesUnknown),
            Some(ranges) => {
                if let Some(range) = within(ranges) {
                    return Some(AddressRefusal::ServiceRange(range));
                }
            }
        }
        let AnnotatedAddresses { text, allowed } = self.namespaces.get(service.namespace())?;
        let Some(allowed) = allowed else { return Some(AddressRefusal::InvalidAnnotation(Arc::clone(text))) };
        // A DNS name can lead anywhere.
        let is_allowed = |ip: IpAddr| allowed.iter().any(|pattern| pattern.contains(ip, *peer));
        (!ip.is_some_and(is_allowed)).then(|| AddressRefusal::Annotation(Arc::clone(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        Registrant,
        testing::{VALIDATOR, key},
    };

    fn networks(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().expect("a network")).collect()
    }

    fn vm() -> Requester {
        let peer = "192.0.2.7".parse().expect("an address");
        Requester::Identity { registrant: Registrant::new("vm-1".into()).expect("a name"), overrides: true, peer }
    }

    fn refuse(rules: &AddressRules, address: &str, by: &Requester) -> Option<AddressRefusal> {
        rules.refuse(&key("web.shop"), &VALIDATOR.address(address).expect("valid"), by)
    }

    fn annotated(text: &str) -> Option<AnnotatedAddresses> {
        Some(AnnotatedAddresses { text: text.into(), allowed: AddressPattern::parse_list(text).ok().map(Into::into) })
    }

    #[test]
    fn service_ranges_are_refused_to_identities_and_unknown_ones_refuse_all() {
        let mut rules = AddressRules::new(true);
        assert_eq!(refuse(&rules, "10.1.0.1", &vm()), Some(AddressRefusal::ServiceRangesUnknown));
        assert_eq!(refuse(&rules, "10.1.0.1", &Requester::Unrestricted), None);
        let [v4, v6] = networks(&["10.96.0.0/12", "fd00::/108"])[..] else { panic!("two") };
        rules.set_service_ranges(vec![v4, v6]);
        assert_eq!(refuse(&rules, "10.96.0.1", &vm()), Some(AddressRefusal::ServiceRange(v4)));
        assert_eq!(refuse(&rules, "fd00::1", &vm()), Some(AddressRefusal::ServiceRange(v6)));
        assert_eq!(refuse(&rules, "10.1.0.1", &vm()), None);
        // What a gateway translates to one of them is one of them: 10.96.0.1 is 0a60:0001.
        for form in ["64:ff9b::10.96.0.1", "64:ff9b::a60:1", "2002:a60:1::1", "2002:a60:1:ffff::", "::10.96.0.1"] {
            assert_eq!(refuse(&rules, form, &vm()), Some(AddressRefusal::ServiceRange(v4)), "{form}");
        }
        for other in ["64:ff9b::10.1.0.1", "64:ff9b:0:1::a60:1", "2002:a01:1::1", "2001:db8::a60:1"] {
            assert_eq!(refuse(&rules, other, &vm()), None, "{other}");
        }
        assert_eq!(refuse(&rules, "10.96.0.1", &Requester::Unrestricted), None, "as before");
        assert_eq!(refuse(&AddressRules::new(false), "10.96.0.1", &vm()), None, "without Kubernetes");
    }

    /// Whoever registers a name does not own what it leads to, so nothing is served on trust.
    #[test]
    fn names_lead_to_no_denied_address_and_to_no_service() {
        let ip = |text: &str| text.parse().expect("an address");
        let mut rules = AddressRules::new(true);
        rules.set_denied(networks(&["198.51.100.0/24"]));
        assert!(rules.denies_resolved(ip("192.0.2.1")), "the ranges of Services are not known yet");
        rules.set_service_ranges(networks(&["10.96.0.0/12"]));
        for denied in ["10.96.0.1", "64:ff9b::10.96.0.1", "198.51.100.1", "2002:c633:6401::1"] {
            assert!(rules.denies_resolved(ip(denied)), "{denied}");
        }
        assert!(!rules.denies_resolved(ip("192.0.2.1")));
    }

    #[test]
    fn denied_networks_are_refused_to_everybody() {
        let mut rules = AddressRules::new(false);
        rules.set_denied(networks(&["10.0.0.0/24"]));
        for by in [vm(), Requester::Unrestricted] {
            assert!(matches!(refuse(&rules, "10.0.0.9", &by), Some(AddressRefusal::Denied(_))), "{by:?}");
            assert_eq!(refuse(&rules, "10.0.1.9", &by), None);
        }
    }

    #[test]
    fn annotation_narrows_its_namespace_and_an_invalid_one_allows_nothing() {
        let mut rules = AddressRules::new(false);
        rules.set_annotated("shop".into(), annotated("10.1.0.0/16,own"));
        assert_eq!(refuse(&rules, "10.1.2.3", &vm()), None);
        assert_eq!(refuse(&rules, "192.0.2.7", &vm()), None);
        assert_eq!(refuse(&rules, "192.0.2.8", &vm()), Some(AddressRefusal::Annotation("10.1.0.0/16,own".into())));
        assert!(refuse(&rules, "db.example.com", &vm()).is_some(), "a name can lead anywhere");
        assert_eq!(rules.refuse(&key("web.other"), &VALIDATOR.address("192.0.2.8").expect("valid"), &vm()), None);
        rules.set_annotated("shop".into(), annotated("everything"));
        assert_eq!(refuse(&rules, "10.1.2.3", &vm()), Some(AddressRefusal::InvalidAnnotation("everything".into())));
        rules.set_annotated("shop".into(), annotated(""));
        assert!(refuse(&rules, "10.1.2.3", &vm()).is_some(), "an empty one allows none");
        rules.set_annotated("shop".into(), None);
        assert_eq!(refuse(&rules, "192.0.2.8", &vm()), None);
    }
}
