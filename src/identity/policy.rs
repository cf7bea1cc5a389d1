//! The policy file: who may do what where no Kubernetes says so. TOML; what no rule allows is denied.
//!
//! ```toml
//! [[rule]]
//! users = ["vm-1", "spiffe://example.org/web"] # or groups = ["web-servers"]; "*" is everybody
//! namespaces = ["shop"]
//! services = ["web"]                           # without: every service of the namespaces
//! verbs = ["create", "delete"]                 # create, delete, override, get, list, watch, handover; "*" is all
//! addresses = ["10.1.0.0/16", "own"]           # without: any; "own" is where the connection comes from
//! resources = ["instances"]                    # without: instances; else of instances, tokens and registrants
//!
//! [[rule]]
//! users = ["prometheus"]
//! paths = ["/metrics", "/api/v1/*"]            # pages of the admin listener, in the place of all other keys
//! ```

use std::{
    fs, io,
    io::Read as _,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use toml::Spanned;

use super::{Access, AccessResource, AccessVerb, Denied, Identity, PageAccess};
use crate::model::{AddressPattern, Namespace, ServiceName};

/// Most bytes of a policy file.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// The text that stands for all.
const EVERY: &str = "*";

/// A policy file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It cannot be read.
    #[error("{path}: cannot be read: {err}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        err: io::Error,
    },
    /// It says something invalid.
    #[error("{path}: {reason}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What, and in which line.
        reason: String,
    },
}

/// What is wrong with a text, and where.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InvalidPolicy(String);

impl InvalidPolicy {
    pub(super) fn of(self, path: &Path) -> PolicyError {
        PolicyError::Invalid { path: path.to_owned(), reason: self.0 }
    }
}

pub(super) fn read(path: &Path) -> Result<String, PolicyError> {
    let mut text = String::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text));
    match read {
        Ok(_) if text.len() as u64 > MAX_FILE_BYTES => {
            Err(PolicyError::Invalid { path: path.to_owned(), reason: "is larger than 1 MiB".into() })
        }
        Ok(_) => Ok(text),
        Err(err) => Err(PolicyError::Unreadable { path: path.to_owned(), err }),
    }
}

/// The rules of a policy file.
#[derive(Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    #[serde(default, rename = "rule")]
    rules: Vec<Spanned<Rule>>,
}

/// Allows some callers some verbs on some services, or some pages.
#[derive(Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Rule {
    #[serde(default)]
    users: Vec<String>,
    #[serde(default)]
    groups: Vec<String>,
    #[serde(default)]
    namespaces: Option<Vec<Pattern<NamespaceText>>>,
    #[serde(default)]
    services: Option<Vec<Pattern<ServiceText>>>,
    #[serde(default)]
    verbs: Option<Vec<VerbPattern>>,
    #[serde(default)]
    addresses: Option<Vec<AddressPattern>>,
    /// Without: instances.
    #[serde(default)]
    resources: Option<Vec<ResourceText>>,
    #[serde(default)]
    paths: Option<Vec<PathPattern>>,
}

/// A path, or the beginning of some: what RBAC has in `nonResourceURLs`.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
enum PathPattern {
    One(String),
    Below(String),
}

impl TryFrom<String> for PathPattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (path, is_prefix) = text.strip_suffix(EVERY).map_or((text.as_str(), false), |prefix| (prefix, true));
        if path.contains(EVERY) || !(path.starts_with('/') || text == EVERY) {
            return Err(format!("{text:?} is no path such as \"/metrics\" or \"/api/v1/*\""));
        }
        Ok(if is_prefix { Self::Below(path.to_owned()) } else { Self::One(text) })
    }
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
struct ResourceText(AccessResource);

impl TryFrom<String> for ResourceText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        AccessResource::ALL.into_iter().find(|one| one.as_str() == text).map(Self).ok_or_else(|| {
            let all = AccessResource::ALL.map(AccessResource::as_str);
            format!("{text:?} is none of {}", all.join(", "))
        })
    }
}

/// One name, or `*` for every one.
#[derive(Debug, PartialEq, Eq)]
enum Pattern<T> {
    Every,
    One(T),
}

#[derive(Debug, PartialEq, Eq)]
struct NamespaceText(String);

#[derive(Debug, PartialEq, Eq)]
struct ServiceText(String);

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
enum VerbPattern {
    Every,
    One(AccessVerb),
}

impl<'de> Deserialize<'de> for Pattern<NamespaceText> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        pattern(deserializer, |text| Namespace::parse(text).map(|_| NamespaceText(text.into())))
    }
}

impl<'de> Deserialize<'de> for Pattern<ServiceText> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        pattern(deserializer, |text| ServiceName::parse(text).map(|_| ServiceText(text.into())))
    }
}

fn pattern<'de, T, E: std::fmt::Display, D: serde::Deserializer<'de>>(
    deserializer: D,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Result<Pattern<T>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == EVERY {
        return Ok(Pattern::Every);
    }
    parse(&text).map(Pattern::One).map_err(|err| serde::de::Error::custom(format!("{text:?}: {err}")))
}

impl TryFrom<String> for VerbPattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == EVERY {
            return Ok(Self::Every);
        }
        let verb = AccessVerb::ALL.iter().find(|verb| verb.as_str() == text);
        verb.copied().map(Self::One).ok_or_else(|| {
            let all: Vec<_> = AccessVerb::ALL.iter().map(|verb| verb.as_str()).collect();
            format!("{text:?} is none of {} and {EVERY:?}", all.join(", "))
        })
    }
}

impl Policy {
    /// Parses a policy.
    pub(super) fn parse(text: &str) -> Result<Self, InvalidPolicy> {
        let policy: Self = toml::from_str(text).map_err(|err| InvalidPolicy(err.to_string().trim_end().to_owned()))?;
        for rule in &policy.rules {
            rule.get_ref().check().map_err(|reason| {
                let line = text.as_bytes().iter().take(rule.span().start).filter(|byte| **byte == b'\n').count() + 1;
                InvalidPolicy(format!("line {line}: the rule {reason}"))
            })?;
        }
        Ok(policy)
    }

    fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter().map(Spanned::get_ref)
    }

    /// Whether `identity` may see a page.
    pub(super) fn decide_page(&self, identity: &Identity, page: &PageAccess<'_>) -> Result<(), Denied> {
        if self.rules().any(|rule| rule.holds_for_page(identity, page)) {
            return Ok(());
        }
        Err(Denied(format!("{identity} may not {page}")))
    }

    /// Whether a rule with the name of `identity`, and not of everybody, allows it to see a page.
    pub(super) fn decide_named_page(&self, identity: &Identity, page: &PageAccess<'_>) -> bool {
        self.rules()
            .any(|rule| rule.users.iter().any(|user| *user == *identity.user) && rule.holds_for_page(identity, page))
    }

    pub(super) fn decide(&self, identity: &Identity, access: &Access<'_>) -> Result<(), Denied> {
        let mut elsewhere = false;
        for rule in self.rules().filter(|rule| rule.holds_for(identity, access)) {
            if rule.holds_for_address(access) {
                return Ok(());
            }
            elsewhere = true;
        }
        Err(Denied(match access.address {
            Some(address) if elsewhere => format!("{identity} may not register the address {address}"),
            _ => format!("{identity} may not {access}"),
        }))
    }
}

impl Rule {
    /// A rule is about services or about pages, never about both, as in RBAC.
    fn check(&self) -> Result<(), &'static str> {
        let Self { users, groups, namespaces, services, verbs, addresses, resources, paths } = self;
        if users.is_empty() && groups.is_empty() {
            return Err("names neither users nor groups");
        }
        match (namespaces, verbs, paths) {
            (Some(_), Some(_), None) => Ok(()),
            (None, None, Some(_)) if services.is_none() && addresses.is_none() && resources.is_none() => Ok(()),
            (_, _, Some(_)) => {
                Err("names paths, which are read only: beside them it has users or groups and nothing else")
            }
            (None, _, None) => Err("names neither namespaces nor paths"),
            (Some(_), None, None) => Err("names no verbs"),
        }
    }

    fn is_for(&self, identity: &Identity) -> bool {
        let is = |name: &String, who: &str| name == EVERY || name == who;
        self.users.iter().any(|user| is(user, &identity.user))
            || self.groups.iter().any(|group| identity.groups.iter().any(|of| is(group, of)))
    }

    fn holds_for_page(&self, identity: &Identity, page: &PageAccess<'_>) -> bool {
        let mut paths = self.paths.iter().flatten();
        self.is_for(identity)
            && paths.any(|pattern| match pattern {
                PathPattern::One(path) => path == page.path,
                PathPattern::Below(prefix) => page.path.starts_with(prefix),
            })
    }

    fn holds_for(&self, identity: &Identity, access: &Access<'_>) -> bool {
        let about = match &self.resources {
            None => access.resource == AccessResource::Instances,
            Some(resources) => resources.iter().any(|ResourceText(resource)| *resource == access.resource),
        };
        self.is_for(identity)
            && about
            && self.verbs.iter().flatten().any(|verb| match verb {
                VerbPattern::Every => true,
                VerbPattern::One(one) => *one == access.verb,
            })
            && self.namespaces.iter().flatten().any(|pattern| match pattern {
                Pattern::Every => true,
                Pattern::One(NamespaceText(name)) => access.namespace == Some(name.as_str()),
            })
            && self.services.as_ref().is_none_or(|services| {
                services.iter().any(|pattern| match pattern {
                    Pattern::Every => true,
                    Pattern::One(ServiceText(name)) => access.service == Some(name.as_str()),
                })
            })
    }

    /// An instance without an IP address is only allowed where any address is.
    fn holds_for_address(&self, access: &Access<'_>) -> bool {
        let Some(patterns) = &self.addresses else { return true };
        access.verb != AccessVerb::Create
            || access.resource != AccessResource::Instances
            || access
                .address
                .is_some_and(|address| patterns.iter().any(|pattern| pattern.contains(address, access.peer)))
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::identity::IdentitySource;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));

    fn identity(user: &str, groups: &[&str]) -> Identity {
        let groups = groups.iter().map(|&group| group.into()).collect();
        Identity { user: user.into(), groups, source: IdentitySource::Certificate, expires: None }
    }

    fn access<'a>(verb: AccessVerb, namespace: &'a str, service: &'a str) -> Access<'a> {
        let named = |text: &'a str| (!text.is_empty()).then_some(text);
        let address = (verb == AccessVerb::Create).then_some(PEER);
        Access {
            resource: AccessResource::Instances,
            verb,
            namespace: named(namespace),
            service: named(service),
            address,
            peer: PEER,
        }
    }

    fn allows(policy: &str, identity: &Identity, access: &Access<'_>) -> bool {
        Policy::parse(policy).expect("a valid policy").decide(identity, access).is_ok()
    }

    #[test]
    fn nothing_is_allowed_that_no_rule_allows() {
        let rule = "[[rule]]\nusers = ['vm-1']\nnamespaces = ['shop']\nservices = ['web']\nverbs = ['create', 'get']";
        let (vm, other) = (identity("vm-1", &[]), identity("vm-2", &["vm-1"]));
        assert!(allows(rule, &vm, &access(AccessVerb::Create, "shop", "web")));
        assert!(allows(rule, &vm, &access(AccessVerb::Get, "shop", "web")));
        for denied in [
            access(AccessVerb::Delete, "shop", "web"),
            access(AccessVerb::Create, "shop", "api"),
            access(AccessVerb::Create, "prod", "web"),
            access(AccessVerb::Get, "shop", ""),
            access(AccessVerb::Get, "", ""),
        ] {
            assert!(!allows(rule, &vm, &denied), "{denied:?}");
        }
        assert!(!allows(rule, &other, &access(AccessVerb::Create, "shop", "web")), "a user is not a group");
        assert!(!allows("", &vm, &access(AccessVerb::Create, "shop", "web")), "deny by default");
    }

    #[test]
    fn wildcards_stand_for_all() {
        let rule = "[[rule]]\ngroups = ['ops']\nnamespaces = ['*']\nverbs = ['*']";
        let ops = identity("ada", &["ops"]);
        assert!(allows(rule, &ops, &access(AccessVerb::Watch, "", "")));
        assert!(allows(rule, &ops, &access(AccessVerb::Delete, "shop", "web")));
        let everybody = "[[rule]]\nusers = ['*']\nnamespaces = ['shop']\nverbs = ['list']";
        assert!(allows(everybody, &identity("x", &[]), &access(AccessVerb::List, "shop", "")));
        assert!(!allows(everybody, &identity("x", &[]), &access(AccessVerb::List, "", "")), "one namespace is not all");
    }

    #[test]
    fn addresses_narrow_what_may_be_registered() {
        let rule = |addresses: &str| {
            format!("[[rule]]\nusers = ['vm-1']\nnamespaces = ['shop']\nverbs = ['*']\naddresses = {addresses}")
        };
        let vm = identity("vm-1", &[]);
        let at = |address: &str| Access { address: address.parse().ok(), ..access(AccessVerb::Create, "shop", "web") };
        assert!(allows(&rule("['10.1.0.0/16']"), &vm, &at("10.1.2.3")));
        assert!(!allows(&rule("['10.1.0.0/16']"), &vm, &at("10.2.0.1")));
        assert!(allows(&rule("['2001:db8::/32']"), &vm, &at("2001:db8::1")));
        assert!(allows(&rule("['own']"), &vm, &at("192.0.2.7")));
        assert!(!allows(&rule("['own']"), &vm, &at("192.0.2.8")));
        assert!(!allows(&rule("['0.0.0.0/0', '::/0']"), &vm, &at("")), "a name is no address");
        assert!(!allows(&rule("[]"), &vm, &at("10.1.2.3")));
        assert!(
            allows(&rule("['10.1.0.0/16']"), &vm, &access(AccessVerb::Delete, "shop", "web")),
            "only for registrations"
        );
        let denied = Policy::parse(&rule("['own']")).expect("valid").decide(&vm, &at("10.0.0.1")).expect_err("denied");
        assert_eq!(denied.to_string(), "vm-1 may not register the address 10.0.0.1");
    }

    #[test]
    fn paths_are_exact_or_prefixes_and_no_rule_about_services_allows_a_page() {
        let policy = "[[rule]]\ngroups = ['ops']\nnamespaces = ['*']\nverbs = ['*']\n\
                      [[rule]]\nusers = ['prometheus']\npaths = ['/metrics', '/api/v1/*']\n\
                      [[rule]]\nusers = ['ada']\npaths = ['*']";
        let policy = Policy::parse(policy).expect("valid");
        let sees = |identity: &Identity, path: &str| {
            policy.decide_page(identity, &PageAccess { path, instances: None, peer: PEER }).is_ok()
        };
        let prometheus = identity("prometheus", &[]);
        for path in ["/metrics", "/api/v1/", "/api/v1/services", "/api/v1/namespaces/shop/services"] {
            assert!(sees(&prometheus, path), "{path}");
        }
        for path in
            ["/", "", "*", "/metrics/", "//metrics", "/METRICS", "/%6detrics", "/api/v1", "/api/v10", "/metricsx"]
        {
            assert!(!sees(&prometheus, path), "{path}");
        }
        assert!(sees(&identity("ada", &[]), "/anything"));
        assert!(!sees(&identity("grace", &["ops"]), "/metrics"), "services are not pages");
        let list = access(AccessVerb::List, "", "");
        assert!(policy.decide(&identity("ada", &[]), &list).is_err(), "pages are not services");
    }

    #[test]
    fn errors_name_the_line() {
        let refused = |text: &str, line: &str, why: &str| {
            let err = Policy::parse(text).expect_err(text).0;
            assert!(err.contains(line) && err.contains(why), "{err:?} should contain {line:?} and {why:?}");
        };
        let rule = "[[rule]]\nusers = ['vm-1']\nnamespaces = ['shop']\n";
        refused(
            &format!("{rule}verbs = ['register']"),
            "line 4",
            "none of create, delete, override, get, list, watch, handover",
        );
        refused(&format!("{rule}verbs = ['*']\nservices = ['Web']"), "line 5", "Web");
        refused(&format!("{rule}verbs = ['*']\naddresses = ['10.1.0.1/16']"), "line 5", "10.1.0.0/16");
        refused(&format!("{rule}verbs = ['*']\naddress = ['10.1.0.1']"), "line 5", "unknown field");
        refused("[[rule]]\nusers = ['vm-1'\n", "line", "");
        refused("[[rule]]\nnamespaces = ['shop']\nverbs = ['*']", "line 1", "neither users nor groups");
        refused("[[rules]]\n", "line 1", "unknown field");
        let page = "[[rule]]\nusers = ['vm-1']\n";
        refused(&format!("{page}paths = ['metrics']"), "line 3", "no path such as");
        refused(&format!("{page}paths = ['/api/*/services']"), "line 3", "no path such as");
        refused(&format!("{page}paths = ['/metrics']\nverbs = ['get']"), "line 1", "users or groups and nothing else");
        refused(page, "line 1", "neither namespaces nor paths");
        refused(&format!("{page}paths = []\n\n{page}namespaces = ['shop']"), "line 5", "names no verbs");
    }
}
