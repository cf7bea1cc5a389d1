//! Names: labels, namespaces, services and whole DNS names, lower case and within the limits
//! that both DNS (RFC 1035 §2.3.4) and Kubernetes set.

use std::{
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

/// Most octets in one label (RFC 1035 §2.3.4).
pub const MAX_LABEL: usize = 63;

/// Most octets of a name in a message, with its length octets and the root (RFC 1035 §2.3.4).
pub const MAX_WIRE_NAME: usize = 255;

/// Most characters in a DNS name written as text without its final dot: 255 octets on the wire
/// (RFC 1035 §2.3.4) less the root and one length octet.
const MAX_NAME: usize = 253;

/// Why a text is not the name it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// An empty text.
    #[error("must not be empty")]
    Empty,
    /// A label of more than 63 octets.
    #[error("must have at most 63 characters in a label (RFC 1035 §2.3.4)")]
    LabelTooLong,
    /// A name of more than 253 characters.
    #[error("must have at most 253 characters")]
    NameTooLong,
    /// Something other than `a`–`z`, `0`–`9` and `-`.
    #[error("must consist of lower-case letters, digits and '-' (RFC 1123 §2.1), found {0:?}")]
    Character(char),
    /// A `-` at either end of a label.
    #[error("must begin and end with a letter or digit (RFC 1123 §2.1)")]
    Hyphen,
    /// A dot in what must be one label.
    #[error("must be one label without dots")]
    Dot,
    /// A DNS name of one label where two are needed.
    #[error("must be a DNS name of at least two labels")]
    OneLabel,
    /// A DNS name whose last label is all digits: a malformed address, not a name.
    #[error("must not end in a label of digits only: neither an IP address nor a DNS name")]
    NumericEnd,
}

/// Checks one lower-case label as RFC 1123 §2.1 and Kubernetes want it.
fn check_label(text: &str) -> Result<(), NameError> {
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return Err(NameError::Empty);
    };
    if let Some(bad) = text.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
        return Err(if bad == '.' { NameError::Dot } else { NameError::Character(bad) });
    }
    if bytes.len() > MAX_LABEL {
        return Err(NameError::LabelTooLong);
    }
    if *first == b'-' || *last == b'-' {
        return Err(NameError::Hyphen);
    }
    Ok(())
}

/// One lower-case DNS label (RFC 1123 §2.1), 1..=63 octets: a host name or a port name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Label(Arc<str>);

impl Label {
    /// Takes `text` as a label.
    ///
    /// # Errors
    /// When it is not one; upper case is an error too, because Kubernetes refuses it.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        check_label(text)?;
        Ok(Self(text.into()))
    }

    /// The label as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A Kubernetes namespace: one lower-case label (RFC 1123), 1..=63 octets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Namespace<'t>(&'t str);

impl<'t> Namespace<'t> {
    /// Takes `text` as a namespace.
    ///
    /// # Errors
    /// When it is not a lower-case label.
    pub fn parse(text: &'t str) -> Result<Self, NameError> {
        check_label(text).map(|()| Self(text))
    }

    /// The namespace as text.
    #[must_use]
    pub fn as_str(self) -> &'t str {
        self.0
    }
}

/// A service name: one lower-case label (RFC 1123 §2.1), 1..=63 octets. That a new one begins with a
/// letter, as Kubernetes before 1.36 wants, is the [`Validator`](super::Validator)'s rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServiceName<'t>(&'t str);

impl<'t> ServiceName<'t> {
    /// Takes `text` as a service name.
    ///
    /// # Errors
    /// When it is not a lower-case label.
    pub fn parse(text: &'t str) -> Result<Self, NameError> {
        check_label(text).map(|()| Self(text))
    }

    /// The service name as text.
    #[must_use]
    pub fn as_str(self) -> &'t str {
        self.0
    }
}

/// Which service: namespace and name, in one allocation.
///
/// Kept as `name.namespace`, the order in which a question carries them, so that a lookup
/// hashes the bytes of the question as they are. Neither part can hold a dot. It hashes as
/// its bytes, so that a map of services can be queried with borrowed bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct ServiceKey(Arc<str>);

impl ServiceKey {
    /// The service `name` in `namespace`.
    #[must_use]
    pub fn new(namespace: Namespace<'_>, name: ServiceName<'_>) -> Self {
        Self(format!("{}.{}", name.0, namespace.0).into())
    }

    /// The name, without the namespace.
    #[must_use]
    pub fn name(&self) -> &str {
        self.split().0
    }

    /// The namespace, without the name.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.split().1
    }

    /// `name.namespace`: the two labels in the order of a DNS name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn split(&self) -> (&str, &str) {
        self.0.split_once('.').expect("new() joins the two with a dot")
    }
}

impl Hash for ServiceKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.as_bytes().hash(state);
    }
}

impl PartialOrd for ServiceKey {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// By namespace, then by name: the order of every list.
impl Ord for ServiceKey {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // Not the order of the stored text, which has the name first.
        (self.namespace(), self.name()).cmp(&(other.namespace(), other.name()))
    }
}

/// `namespace/name`, as `kubectl` writes it.
impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace(), self.name())
    }
}

impl fmt::Debug for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServiceKey({self})")
    }
}

/// A DNS name in lower case without its final dot, at most 253 characters: labels as RFC 1123
/// §2.1 has them, joined by dots.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DnsName(Arc<str>);

impl DnsName {
    /// Takes `text` as a DNS name: a final dot is dropped, case is not changed.
    ///
    /// # Errors
    /// When it is empty, too long, or one of its labels is not a lower-case label.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.len() > MAX_NAME {
            return Err(NameError::NameTooLong);
        }
        text.split('.').try_for_each(check_label)?;
        Ok(Self(text.into()))
    }

    /// Parses the name of an external host: in any case, of two labels or more. The last label must not
    /// consist of digits only, so that a mistyped address is not taken for a name.
    ///
    /// # Errors
    /// When the name breaks one of these rules, or those of [`DnsName::parse`].
    pub(super) fn parse_host(text: &str) -> Result<Self, NameError> {
        let name = Self::parse(&text.to_ascii_lowercase())?;
        let Some((_, last)) = name.0.rsplit_once('.') else {
            return Err(NameError::OneLabel);
        };
        if last.bytes().all(|b| b.is_ascii_digit()) {
            return Err(NameError::NumericEnd);
        }
        Ok(name)
    }

    /// The name as text, without a final dot.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The labels from left to right.
    pub fn labels(&self) -> impl Iterator<Item = &str> {
        self.0.split('.')
    }

    /// Octets of the name in a message, uncompressed and with the root: 1..=255.
    #[must_use]
    pub fn wire_len(&self) -> usize {
        // Each dot becomes a length octet. The first label's and that of the root come on top.
        self.0.len() + 2
    }
}

macro_rules! text_fmt {
    ($($type:ty),*) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self.as_str(), f)
            }
        }
    )*};
}

text_fmt!(Label, DnsName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc1123_2_1_labels_are_letters_digits_and_inner_hyphens() {
        for good in ["a", "0", "web-1", "1-2", &"x".repeat(63)] {
            assert_eq!(Label::parse(good).expect(good).as_str(), good);
        }
        for (bad, err) in [
            ("", NameError::Empty),
            ("Web", NameError::Character('W')),
            ("web_1", NameError::Character('_')),
            ("-a", NameError::Hyphen),
            ("a-", NameError::Hyphen),
            ("a.b", NameError::Dot),
            ("ü", NameError::Character('ü')),
            (&"x".repeat(64), NameError::LabelTooLong),
        ] {
            assert_eq!(Label::parse(bad), Err(err), "{bad:?}");
        }
    }

    #[test]
    fn service_keys_are_ordered_by_namespace_first() {
        let key = |ns, name| {
            ServiceKey::new(Namespace::parse(ns).expect("a label"), ServiceName::parse(name).expect("a label"))
        };
        assert!(key("a", "z") < key("b", "a"));
        assert!(key("a", "a") < key("a-b", "a"));
        assert_eq!(key("prod", "web").to_string(), "prod/web");
        assert_eq!(key("prod", "web").as_str(), "web.prod");
        assert_eq!((key("prod", "web").namespace(), key("prod", "web").name()), ("prod", "web"));
    }

    #[test]
    fn external_host_has_two_labels_and_no_numeric_end() {
        assert_eq!(DnsName::parse_host("DB.Example.com.").expect("a name").as_str(), "db.example.com");
        assert_eq!(DnsName::parse_host("db"), Err(NameError::OneLabel));
        assert_eq!(DnsName::parse_host("10.0.0.256"), Err(NameError::NumericEnd));
        assert_eq!(DnsName::parse_host("*.example.com"), Err(NameError::Character('*')));
        assert_eq!(DnsName::parse_host("a..com"), Err(NameError::Empty));
        assert_eq!(DnsName::parse_host(&format!("{}com", "a.".repeat(126))), Err(NameError::NameTooLong));
    }
}
