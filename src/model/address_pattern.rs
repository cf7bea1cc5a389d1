//! Which addresses may be registered: networks, and where a registrant connects from.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use serde::Deserialize;

/// Most of them in one annotation: each registration is compared with each.
const MAX_PATTERNS: usize = 256;

/// The text of [`AddressPattern::Own`].
const OWN: &str = "own";

/// One network, or the registrant's own address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum AddressPattern {
    /// `own`: the address that the connection comes from.
    Own,
    /// `10.1.0.0/16`, or a single address.
    Network(IpNet),
}

impl AddressPattern {
    /// Whether it allows `address` to who connects from `peer`.
    #[must_use]
    pub fn contains(&self, address: IpAddr, peer: IpAddr) -> bool {
        match self {
            // A dual-stack listener reports IPv4 peers as mapped IPv6 addresses, which instances never have.
            Self::Own => address == peer.to_canonical(),
            Self::Network(network) => network.contains(&address),
        }
    }

    /// Reads a list with commas, as in an annotation. An empty one allows none.
    ///
    /// # Errors
    /// Which part is none.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, String> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let patterns = parts.map(|part| Self::try_from(part.to_owned())).collect::<Result<Vec<_>, _>>()?;
        if patterns.len() > MAX_PATTERNS {
            return Err(format!("{} networks, at most {MAX_PATTERNS} are allowed", patterns.len()));
        }
        Ok(patterns)
    }
}

impl fmt::Display for AddressPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str(OWN),
            Self::Network(network) => network.fmt(f),
        }
    }
}

impl TryFrom<String> for AddressPattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == OWN { Ok(Self::Own) } else { parse_network(&text).map(Self::Network) }
    }
}

/// Parses `10.1.0.0/16`, or an address, which is a network of its own.
///
/// # Errors
/// When it is neither, or has bits beyond its prefix.
pub fn parse_network(text: &str) -> Result<IpNet, String> {
    let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    let network = network.map_err(|_| format!("{text:?} is neither a network such as 10.1.0.0/16 nor an address"))?;
    // An instance's address is never one, so the network would contain none.
    if let IpNet::V6(network) = network
        && network.addr().to_ipv4_mapped().is_some()
    {
        return Err(format!("{text:?} is IPv4 written as IPv6 (RFC 4291 §2.5.5.2): write it as IPv4"));
    }
    // Bits beyond the prefix are most likely a mistake in one of the two, and nobody knows in which.
    if network.trunc() == network {
        Ok(network)
    } else {
        Err(format!("{text:?} has bits beyond its prefix: {}", network.trunc()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn list_is_networks_and_own() {
        let list = AddressPattern::parse_list(" 10.1.0.0/16, own,2001:db8::1,").expect("valid");
        let [network, own, single] = list[..] else { panic!("{list:?}") };
        assert!(network.contains(ip("10.1.2.3"), ip("::1")) && !network.contains(ip("10.2.0.0"), ip("::1")));
        assert!(
            own.contains(ip("192.0.2.7"), ip("::ffff:192.0.2.7")) && !own.contains(ip("192.0.2.8"), ip("192.0.2.7"))
        );
        assert!(single.contains(ip("2001:db8::1"), ip("::1")) && !single.contains(ip("2001:db8::2"), ip("::1")));
        assert_eq!(AddressPattern::parse_list(" "), Ok(vec![]), "none");
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for (text, why) in [
            ("10.1.0.0/33", "neither a network"),
            ("10.1.0.1/16", "10.1.0.0/16"),
            ("Own", "neither"),
            ("::ffff:10.66.0.0/112", "write it as IPv4"),
            ("10.1.0.0/16 10.2.0.0/16", "neither"),
        ] {
            assert!(AddressPattern::parse_list(text).expect_err(text).contains(why), "{text}");
        }
        let many = vec!["10.1.0.0/16"; MAX_PATTERNS + 1].join(",");
        assert!(AddressPattern::parse_list(&many).expect_err("too many").contains("at most 256"));
    }
}
