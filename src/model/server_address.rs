//! Where a gangplank takes registrations, as `--advertise` and the Lease write it.

use std::{fmt, net::IpAddr};

use super::{
    address::Address,
    name::{DnsName, NameError},
};

/// Most addresses that are read from one list: a process has one per IP family, and perhaps a name.
const MAX_ADDRESSES: usize = 8;

/// Why a text is not the address of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ServerAddressError {
    /// `0.0.0.0`, `[::]` and multicast addresses.
    #[error("not the address of one machine")]
    NotOneMachine,
    /// `:0`, `:http` or `:70000`.
    #[error("the port must be 1..=65535")]
    Port,
    /// Neither an IP address nor a DNS name.
    #[error(
        "neither an IP address nor a DNS name, with or without a port, such as 10.0.0.1:9080, [2001:db8::1] or gangplank.example.com"
    )]
    Host,
}

impl From<NameError> for ServerAddressError {
    fn from(_: NameError) -> Self {
        Self::Host
    }
}

/// The address or name of a server, and its port, 1..=65535.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServerAddress {
    host: Address,
    port: u16,
}

impl ServerAddress {
    /// The address of a listener.
    #[must_use]
    pub const fn new(ip: IpAddr, port: u16) -> Self {
        Self { host: Address::Ip(ip), port }
    }

    /// Parses `10.0.0.1:9080`, `[2001:db8::1]:9080`, `gangplank.example.com:9080`, or one without a port, which then
    /// has `default_port`. A name may have one label.
    ///
    /// # Errors
    /// When it is none, or does not name one machine.
    pub fn parse(text: &str, default_port: u16) -> Result<Self, ServerAddressError> {
        let (host, port) = split(text)?;
        let host = match host.parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() || ip.is_multicast() => return Err(ServerAddressError::NotOneMachine),
            // An IPv4 address that was written as IPv6 must compare as the same server.
            Ok(ip) => Address::Ip(ip.to_canonical()),
            Err(_) => {
                let name = DnsName::parse(&host.to_ascii_lowercase())?;
                // A mistyped IP address.
                if name.labels().last().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit())) {
                    return Err(ServerAddressError::Host);
                }
                Address::Name(name)
            }
        };
        let port = match port {
            None => default_port,
            Some(port) => port.parse().ok().filter(|port| *port > 0).ok_or(ServerAddressError::Port)?,
        };
        Ok(Self { host, port })
    }

    /// The valid ones of a list with commas, each with a port. Another process wrote the list, or somebody typed it.
    #[must_use]
    pub fn parse_list(text: &str) -> Vec<Self> {
        let valid = text.split(',').filter_map(|one| {
            let address = Self::parse(one.trim(), 0).ok()?;
            (address.port > 0).then_some(address)
        });
        valid.take(MAX_ADDRESSES).collect()
    }

    /// `a`, `a or b`, `a, b or c`: for messages.
    #[must_use]
    pub fn choice(addresses: &[Self]) -> String {
        match addresses {
            [] => String::new(),
            [one] => one.to_string(),
            [first @ .., last] => format!("{} or {last}", Self::list(first, ", ")),
        }
    }

    /// The addresses with `separator` between them.
    #[must_use]
    pub fn list(addresses: &[Self], separator: &str) -> String {
        addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
    }

    /// The IP address, if the host is one.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.ip()
    }

    /// The name, without the final dot, if the host is one.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        match &self.host {
            Address::Ip(_) => None,
            Address::Name(name) => Some(name.to_string()),
        }
    }

    /// The IP address or the name, without brackets or port.
    #[must_use]
    pub fn host(&self) -> String {
        match &self.host {
            Address::Ip(ip) => ip.to_string(),
            Address::Name(name) => name.to_string(),
        }
    }

    /// Where gRPC listens there, 1..=65535.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }
}

/// Splits the port off.
fn split(text: &str) -> Result<(&str, Option<&str>), ServerAddressError> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or(ServerAddressError::Host)?;
        return match rest.strip_prefix(':') {
            // In brackets there is an IPv6 address and nothing else.
            _ if !host.contains(':') => Err(ServerAddressError::Host),
            None if rest.is_empty() => Ok((host, None)),
            None => Err(ServerAddressError::Host),
            Some(port) => Ok((host, Some(port))),
        };
    }
    match text.split_once(':') {
        // An IPv6 address without brackets has no port.
        Some((_, rest)) if rest.contains(':') => Ok((text, None)),
        Some((host, port)) => Ok((host, Some(port))),
        None => Ok((text, None)),
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Address::Ip(IpAddr::V6(v6)) => write!(f, "[{v6}]:{}", self.port),
            Address::Ip(IpAddr::V4(v4)) => write!(f, "{v4}:{}", self.port),
            Address::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_is_optional_and_printed_addresses_parse() {
        for (text, printed) in [
            ("10.0.0.1", "10.0.0.1:9080"),
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("2001:DB8::1", "[2001:db8::1]:9080"),
            ("[2001:db8::1]", "[2001:db8::1]:9080"),
            ("[2001:db8::1]:80", "[2001:db8::1]:80"),
            ("::ffff:10.0.0.1", "10.0.0.1:9080"),
            ("Gangplank-0.example.com.", "gangplank-0.example.com:9080"),
            ("localhost:80", "localhost:80"),
        ] {
            let address = ServerAddress::parse(text, 9080).expect(text);
            assert_eq!(address.to_string(), printed);
            assert_eq!(ServerAddress::parse(printed, 1), Ok(address));
        }
    }

    #[test]
    fn invalid_addresses_are_refused() {
        use ServerAddressError::{Host, NotOneMachine, Port};
        for (text, err) in [
            ("", Host),
            (":9080", Host),
            ("0.0.0.0:9080", NotOneMachine),
            ("[::]:9080", NotOneMachine),
            ("224.0.0.1", NotOneMachine),
            ("10.0.0.1:0", Port),
            ("10.0.0.1:70000", Port),
            ("name:http", Port),
            ("10.0.0.300", Host),
            ("[10.0.0.1]:80", Host),
            ("[2001:db8::1", Host),
            ("[2001:db8::1]80", Host),
            ("fe80::1%eth0", Host),
            ("http://10.0.0.1:9080", Host),
            ("a b", Host),
        ] {
            assert_eq!(ServerAddress::parse(text, 9080), Err(err), "{text:?}");
        }
    }

    #[test]
    fn list_is_read_as_far_as_it_is_valid() {
        let list = ServerAddress::parse_list("10.0.0.1:9080, junk:0,[2001:db8::1]:9080,10.0.0.2,");
        assert_eq!(ServerAddress::list(&list, ","), "10.0.0.1:9080,[2001:db8::1]:9080");
        assert_eq!(ServerAddress::choice(&list), "10.0.0.1:9080 or [2001:db8::1]:9080");
        assert_eq!(ServerAddress::parse_list(&"10.0.0.1:1,".repeat(100_000)).len(), MAX_ADDRESSES);
    }
}
