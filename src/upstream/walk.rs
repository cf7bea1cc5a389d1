//! The walk from a name through its aliases to its addresses of one family: a pure function of the answers.

use std::net::IpAddr;

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType},
};

use crate::model::{Address, MAX_RESOLVED, ResolvedAddresses};

/// Most aliases (CNAME records) between a name and its addresses.
pub(super) const MAX_ALIASES: usize = 16;

/// Seconds for which an answer without records holds when it has no SOA record, as those of dnsmasq.
const DEFAULT_NEGATIVE_TTL: u32 = 60;

/// Most addresses that an error names.
const MAX_NAMED: usize = 3;

/// What a name has of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// The addresses that pods can use; `None` if the name does not exist.
    pub(super) addresses: Option<ResolvedAddresses>,
    /// Seconds until the smallest TTL of all records ends, with that of the SOA record if there are no addresses.
    pub(super) ttl: u32,
    /// What was not taken, and why.
    pub(super) left_out: Option<String>,
}

/// What to do after an answer.
#[derive(Debug)]
pub(super) enum Step {
    /// Ask for this name next: the server did not follow the alias.
    Ask(Name),
    /// The walk is at its end.
    Done(Found),
}

/// Why a walk ends nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum WalkError {
    #[error("its aliases lead in a circle, back to {0}")]
    Loop(String),
    #[error("it has more than {MAX_ALIASES} aliases, the last of which is {0}")]
    TooManyAliases(String),
    #[error("its alias {0} is a name in the zone of this server, which would have to ask itself")]
    InOwnZone(String),
}

/// A walk, and where it is.
#[derive(Debug)]
pub(super) struct Walk<'z> {
    zone: &'z Name,
    kind: RecordType,
    /// The name and its aliases so far; the last one is looked for.
    names: Vec<Name>,
    /// Smallest TTL so far.
    ttl: u32,
}

impl<'z> Walk<'z> {
    /// At the begin, which must lie outside of `zone`.
    pub(super) fn new(name: Name, kind: RecordType, zone: &'z Name) -> Self {
        Self { zone, kind, names: vec![name], ttl: u32::MAX }
    }

    /// Follows the records of an answer to the question for the last name. `answer` is NOERROR or NXDOMAIN.
    pub(super) fn follow(&mut self, answer: &Message) -> Result<Step, WalkError> {
        let begun_at = self.names.len();
        loop {
            let current = self.names.last().expect("the name itself is there");
            let of = |kind: RecordType| {
                let records = answer.answers.iter();
                records.filter(move |record| {
                    record.record_type() == kind && record.dns_class == DNSClass::IN && record.name == *current
                })
            };
            let addresses: Vec<IpAddr> = of(self.kind).filter_map(address).collect();
            if !addresses.is_empty() {
                let ttl = of(self.kind).map(ttl).fold(self.ttl, u32::min);
                return Ok(Step::Done(found(addresses, ttl, self.kind)));
            }
            let alias = of(RecordType::CNAME).find_map(|record| match &record.data {
                RData::CNAME(target) => Some((target.0.clone(), ttl(record))),
                _ => None,
            });
            let Some((target, ttl)) = alias else { break };
            self.ttl = self.ttl.min(ttl);
            self.push(target)?;
        }
        let current = self.names.last().expect("the name itself is there");
        let negative_ttl = negative_ttl(answer, current);
        let ttl = self.ttl.min(negative_ttl.unwrap_or(DEFAULT_NEGATIVE_TTL));
        // RFC 6604 §3: the response code is that of the last name of the chain.
        if answer.metadata.response_code == ResponseCode::NXDomain {
            return Ok(Step::Done(Found { addresses: None, ttl, left_out: None }));
        }
        let followed = self.names.len() > begun_at;
        if followed && negative_ttl.is_none() {
            return Ok(Step::Ask(current.clone()));
        }
        Ok(Step::Done(Found { addresses: Some(ResolvedAddresses::default()), ttl, left_out: None }))
    }

    fn push(&mut self, alias: Name) -> Result<(), WalkError> {
        let text = || alias.to_lowercase().to_string().trim_end_matches('.').to_owned();
        if self.zone.zone_of(&alias) {
            return Err(WalkError::InOwnZone(text()));
        }
        if self.names.contains(&alias) {
            return Err(WalkError::Loop(text()));
        }
        if self.names.len() > MAX_ALIASES {
            return Err(WalkError::TooManyAliases(text()));
        }
        self.names.push(alias);
        Ok(())
    }
}

fn address(record: &Record) -> Option<IpAddr> {
    match &record.data {
        RData::A(ip) => Some(ip.0.into()),
        RData::AAAA(ip) => Some(ip.0.into()),
        _ => None,
    }
}

/// RFC 2181 §8: a TTL with its highest bit set counts as 0.
fn ttl(record: &Record) -> u32 {
    if i32::try_from(record.ttl).is_ok() { record.ttl } else { 0 }
}

/// How long the answer that there are no records holds (RFC 2308 §5); `None` without a SOA record.
fn negative_ttl(answer: &Message, name: &Name) -> Option<u32> {
    answer.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) if record.name.zone_of(name) => Some(ttl(record).min(soa.minimum)),
        _ => None,
    })
}

fn found(addresses: Vec<IpAddr>, ttl: u32, kind: RecordType) -> Found {
    // Somebody else's name must not lead pods to themselves ("DNS rebinding").
    let (usable, refused): (Vec<IpAddr>, Vec<IpAddr>) = addresses.into_iter().partition(|&ip| unusable(ip).is_none());
    let all = usable.len();
    let addresses = ResolvedAddresses::new(usable, ttl);
    let mut left_out = Vec::new();
    if !refused.is_empty() {
        let named = refused.iter().take(MAX_NAMED);
        let named = named.map(|&ip| format!("{ip} ({})", unusable(ip).expect("it was refused"))).collect::<Vec<_>>();
        let more = refused.len() - named.len();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        left_out.push(format!("left out, because pods cannot use them: {}{more}", named.join(", ")));
    }
    if all > MAX_RESOLVED {
        left_out.push(format!("only the lowest {MAX_RESOLVED} of {all} {kind} records are used"));
    }
    let left_out = (!left_out.is_empty()).then(|| left_out.join("; "));
    Found { addresses: Some(addresses), ttl, left_out }
}

/// Why pods cannot use `ip`.
fn unusable(ip: IpAddr) -> Option<&'static str> {
    match ip {
        // A second spelling of an IPv4 address, which an A record has to give.
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Some("IPv4-mapped"),
        ip => Address::unreachable(ip),
    }
}
