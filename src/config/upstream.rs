//! Flags of the instances that are registered by a DNS name.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use clap::{Args, builder::FalseyValueParser};

use crate::{model::DnsName, upstream::UpstreamOptions};

/// Longest `--upstream-stale`. RFC 8767 §5 suggests one to three days.
const MAX_STALE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Where a DNS server listens (RFC 1035 §4.2).
const DNS_PORT: u16 = 53;

#[derive(Debug, Args)]
pub(super) struct UpstreamArgs {
    /// A DNS server that is asked for the instances which are registered by a DNS name; repeatable, the next one is asked
    /// when one fails. Without any such registrations are refused
    #[arg(long, env = "GANGPLANK_UPSTREAM", value_name = "ADDR[:PORT]", value_delimiter = ',')]
    upstream: Vec<String>,

    /// How long the last good addresses of a name are served while no --upstream answers; at most 7d
    #[arg(long, env = "GANGPLANK_UPSTREAM_STALE", value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    upstream_stale: Duration,

    /// Serve the addresses of a DNS name that is the only instance of its service, instead of an alias (CNAME)
    #[arg(long, env = "GANGPLANK_FLATTEN_NAMES", value_parser = FalseyValueParser::new())]
    pub(super) flatten_names: bool,
}

impl UpstreamArgs {
    /// The options of the lookups; `None` without a server.
    ///
    /// # Errors
    /// The first invalid flag.
    pub(super) fn check(self, zone: &DnsName, max_ttl: u32) -> anyhow::Result<Option<UpstreamOptions>> {
        let Self { upstream, upstream_stale: stale, flatten_names: _ } = self;
        ensure!(stale <= MAX_STALE, "--upstream-stale: must be at most {}", humantime::format_duration(MAX_STALE));
        // An empty variable is one that was left out.
        let servers = upstream
            .iter()
            .filter(|text| !text.is_empty())
            .map(|text| parse_server(text))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok((!servers.is_empty()).then(|| UpstreamOptions { servers, stale, max_ttl, zone: zone.clone() }))
    }
}

/// Parses `10.0.0.2`, `10.0.0.2:5353`, `2001:db8::2` or `[2001:db8::2]:5353`.
fn parse_server(text: &str) -> anyhow::Result<SocketAddr> {
    let server = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| SocketAddr::new(ip, DNS_PORT)));
    server.with_context(|| format!("--upstream {text:?}: must be an IP address, with :PORT if that is not {DNS_PORT}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_is_an_address_with_or_without_a_port() {
        for (text, expected) in [
            ("10.0.0.2", "10.0.0.2:53"),
            ("10.0.0.2:5353", "10.0.0.2:5353"),
            ("2001:db8::2", "[2001:db8::2]:53"),
            ("[2001:db8::2]:5353", "[2001:db8::2]:5353"),
        ] {
            assert_eq!(parse_server(text).expect("valid").to_string(), expected);
        }
        let err = parse_server("dns.example.com").expect_err("a name").to_string();
        assert!(err.starts_with("--upstream \"dns.example.com\": must be an IP address"), "{err}");
    }
}
