//! Completes short names as the resolver of a pod would.

use std::net::IpAddr;

use hickory_proto::rr::Name;

use crate::{
    cli::{
        args::{self, ServiceArg},
        error::{CommandError, ErrorKind},
    },
    model::ServiceKey,
};

/// What a name refers to, as far as its spelling shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum QueryTarget {
    /// The reverse name of an address.
    Address(Name),
    /// The DNS name of a service.
    Service(Name, ServiceKey),
    /// `_port._protocol.…`.
    Port(Name),
    /// Anything else.
    Other(Name),
}

impl QueryTarget {
    pub(super) fn name(&self) -> &Name {
        match self {
            Self::Address(name) | Self::Service(name, _) | Self::Port(name) | Self::Other(name) => name,
        }
    }

    /// Completes `text`:
    ///
    /// | typed | asked |
    /// |---|---|
    /// | `10.0.0.1` | `1.0.0.10.in-addr.arpa` |
    /// | `web`, `prod/web`, `web.prod`, `web.prod.svc` | `web.<namespace>.svc.<zone>` |
    /// | `_http._tcp.web`, and the same endings | `_http._tcp.web.<namespace>.svc.<zone>` |
    /// | a name that ends in a dot or in the zone, or has three labels or more | as it is |
    pub(super) fn complete(text: &str, namespace: &str, zone: &str) -> Result<Self, CommandError> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Address(Name::from(address)));
        }
        let zone = zone.trim_end_matches('.').to_ascii_lowercase();
        if text.contains('/') {
            let service: ServiceArg = text.parse().map_err(|err: String| CommandError::new(ErrorKind::Usage, err))?;
            let namespace = service.namespace.as_deref().unwrap_or(namespace);
            return Self::of(&format!("{}.{namespace}.svc.{zone}", service.name), &zone);
        }
        // `_port._protocol` is not part of the service's name.
        let labels: Vec<&str> = text.split('.').skip_while(|label| label.starts_with('_')).collect();
        // Names compare without case (RFC 4343); what is asked keeps the spelling.
        let lower = text.to_ascii_lowercase();
        let full = match labels.as_slice() {
            _ if text.ends_with('.') || lower == zone || lower.ends_with(&format!(".{zone}")) => text.to_owned(),
            [_] => format!("{text}.{namespace}.svc.{zone}"),
            [_, _] => format!("{text}.svc.{zone}"),
            [.., last] if last.eq_ignore_ascii_case("svc") => format!("{text}.{zone}"),
            _ => text.to_owned(),
        };
        Self::of(&full, &zone)
    }

    fn of(full: &str, zone: &str) -> Result<Self, CommandError> {
        let bad = |err: &dyn std::fmt::Display| {
            CommandError::new(ErrorKind::Usage, format!("{full:?} is not a DNS name: {err}"))
        };
        let mut name = Name::from_ascii(full).map_err(|err| bad(&err))?;
        name.set_fqdn(true);
        if full.starts_with('_') {
            return Ok(Self::Port(name));
        }
        let lower = full.trim_end_matches('.').to_ascii_lowercase();
        let service = lower.strip_suffix(&format!(".svc.{zone}")).and_then(|rest| rest.split_once('.'));
        Ok(match service.map(|(service, namespace)| args::key(namespace, service)) {
            Some(Ok(key)) => Self::Service(name, key),
            Some(Err(_)) | None => Self::Other(name),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(text: &str) -> String {
        QueryTarget::complete(text, "prod", "Cluster.local.").expect(text).name().to_string()
    }

    #[test]
    fn short_names_are_completed() {
        for (typed, full) in [
            ("web", "web.prod.svc.cluster.local."),
            ("test/web", "web.test.svc.cluster.local."),
            ("web.test", "web.test.svc.cluster.local."),
            ("web.test.svc", "web.test.svc.cluster.local."),
            ("web.test.svc.cluster.local", "web.test.svc.cluster.local."),
            ("WEB.test.svc.CLUSTER.local", "WEB.test.svc.CLUSTER.local."),
            ("web.", "web."),
            ("cluster.local", "cluster.local."),
            ("dns-version.cluster.local", "dns-version.cluster.local."),
            ("www.example.com", "www.example.com."),
            ("10-0-0-1.web.test.svc", "10-0-0-1.web.test.svc.cluster.local."),
            ("_http._tcp.web", "_http._tcp.web.prod.svc.cluster.local."),
            ("_http._tcp.web.test", "_http._tcp.web.test.svc.cluster.local."),
            ("10.0.0.1", "1.0.0.10.in-addr.arpa."),
            ("2001:db8::1", "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa."),
        ] {
            assert_eq!(asked(typed), full, "{typed}");
        }
    }

    #[test]
    fn spelling_decides_the_kind_of_target() {
        let of = |text| QueryTarget::complete(text, "prod", "cluster.local").expect(text);
        assert!(matches!(of("web"), QueryTarget::Service(_, key) if key.to_string() == "prod/web"));
        assert!(
            matches!(of("web.test.svc.cluster.local."), QueryTarget::Service(_, key) if key.to_string() == "test/web")
        );
        assert!(matches!(of("_http._tcp.web"), QueryTarget::Port(_)));
        assert!(matches!(of("10.0.0.1"), QueryTarget::Address(_)));
        for other in ["10-0-0-1.web.prod.svc.cluster.local", "www.example.com", "cluster.local"] {
            assert!(matches!(of(other), QueryTarget::Other(_)), "{other}");
        }
    }

    #[test]
    fn invalid_names_are_usage_errors() {
        for bad in ["", "a..b", &"x".repeat(64)] {
            assert_eq!(QueryTarget::complete(bad, "prod", "cluster.local").expect_err(bad).kind, ErrorKind::Usage);
        }
    }
}
