//! Where an instance is reached: an IP address that pods can use, or a DNS name.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::name::{DnsName, NameError};

/// Why a text is not an address for an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// An empty text.
    #[error("must not be empty")]
    Empty,
    /// `::ffff:10.0.0.1`: two spellings of one host.
    #[error("IPv4-mapped IPv6: write the IPv4 address itself")]
    Mapped,
    /// `fe80::1%eth0`.
    #[error("an address with a zone id (RFC 4007) means something on one machine only")]
    ZoneId,
    /// Neither an IP address nor a DNS name.
    #[error("neither an IPv4 or IPv6 address nor a DNS name: {0}")]
    NotAName(NameError),
}

/// Where an instance is reached. IP addresses are kept in binary, so that every spelling of one
/// address is one key; IPv4 orders before IPv6, and both before names.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// An IPv4 or IPv6 address; whether pods can reach it is the [`Validator`](super::Validator)'s rule.
    Ip(IpAddr),
    /// A name that is looked up (the egress gateway's case).
    Name(DnsName),
}

impl Address {
    /// Takes `text` as an IP address, or else as a DNS name of two labels or more.
    ///
    /// # Errors
    /// When it is neither, or an IP address that does not identify a host by itself: IPv4-mapped, which
    /// is a second spelling of another address, or with a zone id.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        if text.is_empty() {
            return Err(AddressError::Empty);
        }
        match text.parse::<IpAddr>() {
            // One host would have two keys, and be registered twice.
            Ok(IpAddr::V6(v6)) if v6.to_ipv4_mapped().is_some() => return Err(AddressError::Mapped),
            Ok(ip) => return Ok(Self::Ip(ip)),
            Err(_) => {}
        }
        if text.split_once('%').is_some_and(|(ip, _)| ip.parse::<Ipv6Addr>().is_ok()) {
            return Err(AddressError::ZoneId);
        }
        DnsName::parse_host(text).map(Self::Name).map_err(AddressError::NotAName)
    }

    /// Why pods cannot reach `ip`: it means something else on every machine, or no machine. `None`
    /// when they can.
    pub(crate) fn unreachable(ip: IpAddr) -> Option<&'static str> {
        match ip {
            IpAddr::V4(v4) => unreachable_v4(v4),
            IpAddr::V6(v6) => unreachable_v6(v6),
        }
    }

    /// The IPv4 address to which a gateway of the network may translate an IPv6 one: NAT64 (RFC 6052 §2.1, RFC 8215), 6to4 (RFC 3056
    /// §2), or IPv4-compatible (RFC 4291 §2.5.5.1). One that is IPv4-mapped is IPv4 from the start.
    #[must_use]
    pub(crate) fn translated(ip: IpAddr) -> Option<IpAddr> {
        let IpAddr::V6(ip) = ip else { return None };
        let [a, b, c, d] = match ip.segments() {
            [0x64, 0xff9b, 0, 0, 0, 0, ..] | [0x64, 0xff9b, 1, ..] | [0, 0, 0, 0, 0, 0, ..] => {
                *ip.octets().last_chunk()?
            }
            [0x2002, ..] => {
                let [_, _, a, b, c, d, ..] = ip.octets();
                [a, b, c, d]
            }
            _ => return None,
        };
        Some(Ipv4Addr::new(a, b, c, d).into())
    }

    /// The DNS name, if it is one.
    #[must_use]
    pub fn name(&self) -> Option<&DnsName> {
        match self {
            Self::Ip(_) => None,
            Self::Name(name) => Some(name),
        }
    }

    /// The IP address, if it is one.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Ip(ip) => Some(*ip),
            Self::Name(_) => None,
        }
    }
}

fn unreachable_v4(ip: Ipv4Addr) -> Option<&'static str> {
    // No pod can connect to these, or only to itself (RFC 6890).
    match ip.octets()[0] {
        _ if ip.is_unspecified() => Some("unspecified"),
        _ if ip.is_broadcast() => Some("broadcast"),
        0 => Some("\"this network\" (0.0.0.0/8)"),
        127 => Some("loopback"),
        224..=239 => Some("multicast"),
        240..=255 => Some("reserved (240.0.0.0/4)"),
        _ if ip.is_link_local() => Some("link-local"),
        _ => None,
    }
}

fn unreachable_v6(ip: Ipv6Addr) -> Option<&'static str> {
    if ip.is_unspecified() {
        Some("unspecified")
    } else if ip.is_loopback() {
        Some("loopback")
    } else if ip.is_multicast() {
        Some("multicast")
    } else if ip.is_unicast_link_local() {
        Some("link-local")
    } else {
        // A gateway would lead there. Low IPv6 addresses such as ::abcd spell one in 0.0.0.0/8, to which nothing translates.
        let translated =
            Address::translated(ip.into()).filter(|ip| !matches!(ip, IpAddr::V4(v4) if v4.octets()[0] == 0));
        translated.and_then(Address::unreachable)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => fmt::Display::fmt(ip, f),
            Self::Name(name) => fmt::Display::fmt(name, f),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({self})")
    }
}

/// The host label of an instance that gave none: its address with dashes, `10-0-0-1` or
/// `2001-db8--1`. Where the address begins or ends in `::` a `0` is added at that end, because a
/// label may not begin or end with a dash (RFC 1123 §2.1) and glibc and Go refuse one that does.
///
/// It lives on the stack: answers are rendered with it, without an allocation.
#[derive(Clone, Copy)]
pub struct DashedLabel {
    octets: [u8; Self::MAX_LEN],
    len: usize,
}

impl DashedLabel {
    /// The longest text of an IPv6 address has 39 characters, and 45 with an IPv4 tail.
    const MAX_LEN: usize = 47;

    /// The label of `ip`.
    #[must_use]
    pub fn new(ip: IpAddr) -> Self {
        let mut label = Self { octets: [0; Self::MAX_LEN], len: 0 };
        write!(label, "{ip}").expect("write_str never fails");
        if label.as_bytes().ends_with(b"-") {
            label.push(b'0');
        }
        label
    }

    /// The label as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(self.as_bytes()).expect("digits, letters a-f and dashes")
    }

    /// The label as octets.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.octets[..self.len]
    }

    fn push(&mut self, octet: u8) {
        self.octets[self.len] = octet;
        self.len += 1;
    }
}

/// Takes what an address prints, in one piece or several, and turns separators into dashes.
impl fmt::Write for DashedLabel {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for octet in text.bytes() {
            let separator = matches!(octet, b'.' | b':');
            // `::1` begins with a separator.
            if separator && self.len == 0 {
                self.push(b'0');
            }
            self.push(if separator { b'-' } else { octet });
        }
        Ok(())
    }
}

impl fmt::Display for DashedLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The address that `label` is the [`DashedLabel`] of, or `None`. Allocates nothing.
///
/// Only the one canonical spelling counts: `10-0-0-01` and `2001-0db8--1` are no label of an address.
#[must_use]
pub fn parse_dashed_label(label: &[u8]) -> Option<IpAddr> {
    if label.len() > DashedLabel::MAX_LEN || !label.contains(&b'-') {
        return None;
    }
    let spelled = |separator: u8| {
        let mut text = [0; DashedLabel::MAX_LEN];
        let text = &mut text[..label.len()];
        for (to, from) in text.iter_mut().zip(label) {
            *to = if *from == b'-' { separator } else { *from };
        }
        std::str::from_utf8(text).ok()?.parse::<IpAddr>().ok()
    };
    // Both spellings are tried: `1-2-3-4` is an IPv4 address, and `1--2` an IPv6 one.
    let ip = spelled(b'.').or_else(|| spelled(b':'))?;
    // Written again and compared: any other spelling of the address would be a second name of the host.
    (DashedLabel::new(ip).as_bytes() == label).then_some(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_address_are_equal() {
        let a = Address::parse("2001:DB8:0::1").expect("an address");
        assert_eq!(a, Address::parse("2001:db8::1").expect("an address"));
        assert_eq!(a.to_string(), "2001:db8::1");
        assert_eq!(Address::parse("DB.Example.COM.").expect("a name").to_string(), "db.example.com");
    }

    #[test]
    fn unreachable_and_malformed_addresses_are_refused() {
        let accepted = |text: &str| {
            let address = Address::parse(text).ok()?;
            address.ip().is_none_or(|ip| Address::unreachable(ip).is_none()).then_some(address)
        };
        for bad in [
            "",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.1.1",
            "0.0.0.0",
            "0.1.2.3",
            "240.0.0.1",
            "255.255.255.255",
            "224.0.0.1",
            "239.1.2.3",
            "::",
            "::1",
            "fe80::1",
            // A gateway translates these to loopback and link-local addresses.
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::127.0.0.1",
            "2002:7f00:1::1",
            "::127.0.0.1",
            "febf::1",
            "ff02::1",
            "ff0e::1",
            "::ffff:10.0.0.1",
            "fe80::1%eth0",
            "2001:db8::1%1",
            "010.0.0.1",
            "10.0.0",
            "10.0.0.256",
            "1.2.3.4.5",
            "localhost",
            "a_b.com",
            "*.example.com",
            "http://x.y",
            " 10.0.0.1",
        ] {
            assert!(accepted(bad).is_none(), "{bad:?} was accepted");
        }
        for good in ["10.0.0.1", "192.168.1.1", "8.8.8.8", "2001:db8::1", "fd00::1", "fec0::1", "a.example.com"] {
            assert!(accepted(good).is_some(), "{good:?} was refused");
        }
    }

    #[test]
    fn dashed_label_is_a_valid_label_and_parses_back() {
        for (ip, label) in [
            ("10.0.0.1", "10-0-0-1"),
            ("2001:db8::1", "2001-db8--1"),
            ("2001:db8::", "2001-db8--0"),
            ("::abcd", "0--abcd"),
            ("1:2:3:4:5:6:7:8", "1-2-3-4-5-6-7-8"),
        ] {
            let ip: IpAddr = ip.parse().expect("an address");
            assert_eq!(DashedLabel::new(ip).as_str(), label);
            assert!(super::super::Label::parse(label).is_ok());
            assert_eq!(parse_dashed_label(label.as_bytes()), Some(ip));
        }
        for invalid in ["10-0-0-01", "10-0-0", "2001-0db8--1", "2001-DB8--1", "-1", "web-1", "--", "0-0--0"] {
            assert_eq!(parse_dashed_label(invalid.as_bytes()), None, "{invalid}");
        }
    }
}
