//! What a registrant that joined may do: the scope of its token.

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::{
    identity::{Access, AccessResource, AccessVerb, Denied},
    model::{AddressPattern, Namespace, ServiceName},
};

/// What a token allows unless its creator says otherwise.
const DEFAULT_VERBS: [AccessVerb; 4] = [AccessVerb::Create, AccessVerb::Delete, AccessVerb::Get, AccessVerb::Watch];

/// What a token can allow.
const ALLOWED_VERBS: [AccessVerb; 6] = [
    AccessVerb::Create,
    AccessVerb::Delete,
    AccessVerb::Override,
    AccessVerb::Get,
    AccessVerb::List,
    AccessVerb::Watch,
];

/// Most networks of one scope.
const MAX_ADDRESSES: usize = 64;

/// A scope in texts, as it is asked for, stored and shown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScopeSpec {
    /// The namespace; empty for all.
    pub namespace: String,
    /// The service; empty for all of the namespace.
    pub service: String,
    /// Verbs; empty for the default ones.
    pub verbs: Vec<String>,
    /// Networks and `own`; empty for any address.
    pub addresses: Vec<String>,
}

/// A field of a [`ScopeSpec`] that is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct InvalidScope {
    /// The field.
    pub field: &'static str,
    /// What is wrong.
    pub reason: String,
}

/// A checked scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    namespace: Option<Box<str>>,
    service: Option<Box<str>>,
    verbs: Vec<AccessVerb>,
    /// Empty: any.
    addresses: Vec<AddressPattern>,
}

impl Scope {
    /// Checks a scope.
    ///
    /// # Errors
    /// The first invalid field.
    pub fn parse(spec: &ScopeSpec) -> Result<Self, InvalidScope> {
        let ScopeSpec { namespace, service, verbs, addresses } = spec;
        let invalid = |field, reason: String| InvalidScope { field, reason };
        let named = |text: &str| (!text.is_empty()).then(|| text.into());
        if !namespace.is_empty() {
            Namespace::parse(namespace).map_err(|err| invalid("namespace", err.to_string()))?;
        }
        if !service.is_empty() {
            ServiceName::parse(service).map_err(|err| invalid("service", err.to_string()))?;
            if namespace.is_empty() {
                return Err(invalid("service", "needs a namespace".into()));
            }
        }
        let mut parsed = Vec::new();
        for text in verbs {
            let verb = ALLOWED_VERBS.into_iter().find(|verb| verb.as_str() == text).ok_or_else(|| {
                let all = ALLOWED_VERBS.map(AccessVerb::as_str);
                invalid("verbs", format!("{text:?} is none of {}", all.join(", ")))
            })?;
            if !parsed.contains(&verb) {
                parsed.push(verb);
            }
        }
        if parsed.is_empty() {
            parsed.extend(DEFAULT_VERBS);
            // Lists are of a namespace.
            parsed.extend(service.is_empty().then_some(AccessVerb::List));
        }
        if addresses.len() > MAX_ADDRESSES {
            return Err(invalid("addresses", format!("at most {MAX_ADDRESSES}")));
        }
        let addresses = addresses.iter().cloned().map(AddressPattern::try_from).collect::<Result<_, _>>();
        let addresses = addresses.map_err(|reason| invalid("addresses", reason))?;
        Ok(Self { namespace: named(namespace), service: named(service), verbs: parsed, addresses })
    }

    /// The scope in texts.
    #[must_use]
    pub fn spec(&self) -> ScopeSpec {
        let text = |name: &Option<Box<str>>| name.as_deref().unwrap_or_default().to_owned();
        ScopeSpec {
            namespace: text(&self.namespace),
            service: text(&self.service),
            verbs: self.verbs.iter().map(|verb| verb.as_str().to_owned()).collect(),
            addresses: self.addresses.iter().map(ToString::to_string).collect(),
        }
    }

    /// The namespace; `None` for all.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    /// The service; `None` for all of the namespace.
    #[must_use]
    pub fn service(&self) -> Option<&str> {
        self.service.as_deref()
    }

    /// What may be done.
    #[must_use]
    pub fn verbs(&self) -> &[AccessVerb] {
        &self.verbs
    }

    /// Whether `user` may do this.
    pub(in crate::identity) fn decide(&self, user: &str, access: &Access<'_>) -> Result<(), Denied> {
        let within = |scope: &Option<Box<str>>, asked| scope.as_deref().is_none_or(|name| asked == Some(name));
        let allowed = access.resource == AccessResource::Instances
            && self.verbs.contains(&access.verb)
            && within(&self.namespace, access.namespace)
            && within(&self.service, access.service);
        if !allowed {
            return Err(Denied(format!("{user} may not {access}: its join token does not allow it")));
        }
        match access.address {
            // A name could point to any address.
            None if access.verb == AccessVerb::Create && !self.addresses.is_empty() => {
                Err(Denied(format!("{user} may register addresses only, no names: its join token allows no others")))
            }
            Some(address) if access.verb == AccessVerb::Create && !self.allows_address(address, access.peer) => {
                Err(Denied(format!("{user} may not register the address {address}: its join token does not allow it")))
            }
            _ => Ok(()),
        }
    }

    fn allows_address(&self, address: IpAddr, peer: IpAddr) -> bool {
        self.addresses.is_empty() || self.addresses.iter().any(|pattern| pattern.contains(address, peer))
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ScopeSpec { namespace, service, verbs, addresses } = self.spec();
        let or_all = |text: String| if text.is_empty() { "*".to_owned() } else { text };
        write!(f, "{} of {}/{}", verbs.join(","), or_all(namespace), or_all(service))?;
        if addresses.is_empty() { Ok(()) } else { write!(f, " at {}", addresses.join(",")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));

    fn spec(namespace: &str, service: &str, verbs: &[&str], addresses: &[&str]) -> ScopeSpec {
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        ScopeSpec {
            namespace: namespace.into(),
            service: service.into(),
            verbs: texts(verbs),
            addresses: texts(addresses),
        }
    }

    fn access<'a>(verb: AccessVerb, namespace: Option<&'a str>, service: Option<&'a str>) -> Access<'a> {
        Access { resource: AccessResource::Instances, verb, namespace, service, address: None, peer: PEER }
    }

    #[test]
    fn scope_ends_at_verb_namespace_and_service() {
        let scope = Scope::parse(&spec("shop", "web", &[], &[])).expect("valid");
        let allows = |access: &Access<'_>| scope.decide("vm", access).is_ok();
        for verb in DEFAULT_VERBS {
            assert!(allows(&access(verb, Some("shop"), Some("web"))), "{verb:?}");
        }
        for denied in [
            access(AccessVerb::List, Some("shop"), Some("web")),
            access(AccessVerb::HandOver, Some("shop"), Some("web")),
            access(AccessVerb::Create, Some("shop"), Some("api")),
            access(AccessVerb::Create, Some("prod"), Some("web")),
            access(AccessVerb::Watch, Some("shop"), None),
            access(AccessVerb::Watch, None, None),
            Access { resource: AccessResource::Tokens, ..access(AccessVerb::Create, Some("shop"), Some("web")) },
            Access { resource: AccessResource::Registrants, ..access(AccessVerb::Delete, Some("shop"), Some("web")) },
        ] {
            assert!(!allows(&denied), "{denied:?}");
        }
        let all = Scope::parse(&spec("", "", &["list"], &[])).expect("valid");
        assert!(all.decide("vm", &access(AccessVerb::List, None, None)).is_ok());
        assert!(all.decide("vm", &access(AccessVerb::Create, Some("shop"), Some("web"))).is_err());
    }

    #[test]
    fn addresses_are_bounded() {
        let scope = Scope::parse(&spec("shop", "web", &[], &["10.1.0.0/16", "own"])).expect("valid");
        let create = |address| Access { address, ..access(AccessVerb::Create, Some("shop"), Some("web")) };
        let allows = |text: &str| scope.decide("vm", &create(Some(text.parse().expect("an address")))).is_ok();
        assert!(allows("10.1.2.3") && allows("192.0.2.7"));
        assert!(!allows("10.2.0.1"));
        assert!(scope.decide("vm", &create(None)).is_err(), "a name");
        let delete = access(AccessVerb::Delete, Some("shop"), Some("web"));
        assert!(scope.decide("vm", &delete).is_ok(), "only what is registered is bounded");
    }

    #[test]
    fn invalid_scope_names_its_field_and_a_valid_one_is_shown_as_it_was_given() {
        for (spec, expected) in [
            (spec("Shop", "", &[], &[]), "namespace: "),
            (spec("shop", "a.b", &[], &[]), "service: "),
            (spec("", "web", &[], &[]), "service: needs a namespace"),
            (spec("shop", "", &["handover"], &[]), "verbs: \"handover\" is none of create, delete"),
            (spec("shop", "", &[], &["10.0.0.1/8"]), "addresses: \"10.0.0.1/8\" has bits"),
            (spec("shop", "", &[], &["all"]), "addresses: \"all\" is neither"),
        ] {
            let err = Scope::parse(&spec).expect_err("refused").to_string();
            assert!(err.starts_with(expected), "{err}");
        }
        let given = spec("shop", "web", &["create"], &["own", "10.0.0.0/8"]);
        let scope = Scope::parse(&given).expect("valid");
        assert_eq!(scope.spec(), given);
        assert_eq!(scope.to_string(), "create of shop/web at own,10.0.0.0/8");
    }
}
