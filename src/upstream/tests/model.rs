//! Random zones: what the lookups find is what a plain walk through the records finds.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex},
};

use hickory_proto::rr::Record;
use proptest::{collection::vec, prelude::*};
use tokio::{runtime::Builder, time::timeout};

use super::{
    super::{Timing, UpstreamOptions, walk::MAX_ALIASES},
    WAIT_TIMEOUT, lookups, name, options,
    server::{Server, Zone, record},
};
use crate::model::{Resolution, ResolvedAddresses};

/// Names of a zone. More than a chain may have aliases.
const NAMES: usize = 24;

/// What one name has.
#[derive(Debug, Clone)]
enum Has {
    Nothing,
    Alias { target: Target, ttl: u32 },
    Addresses { v4: Vec<u8>, v6: Vec<u8>, ttl4: u32, ttl6: u32 },
}

#[derive(Debug, Clone, Copy)]
enum Target {
    Name(usize),
    OwnZone,
}

fn has() -> impl Strategy<Value = Has> {
    let ttl = || 0..400_u32;
    let target = prop_oneof![12 => (0..NAMES).prop_map(Target::Name), 1 => Just(Target::OwnZone)];
    let addresses = (vec(1..9_u8, 0..4), vec(1..9_u8, 0..4), ttl(), ttl());
    prop_oneof![
        1 => Just(Has::Nothing),
        3 => (target, ttl()).prop_map(|(target, ttl)| Has::Alias { target, ttl }),
        3 => addresses.prop_map(|(v4, v6, ttl4, ttl6)| Has::Addresses { v4, v6, ttl4, ttl6 }),
    ]
}

/// One zone of these names; in half of the cases one long chain, of which the last has what it has.
fn zones() -> impl Strategy<Value = Vec<Has>> {
    let long_chain = |names: Vec<Has>| {
        let last = names.len() - 1;
        let alias = |(at, has)| if at < last { Has::Alias { target: Target::Name(at + 1), ttl: 300 } } else { has };
        names.into_iter().enumerate().map(alias).collect::<Vec<_>>()
    };
    prop_oneof![3 => vec(has(), NAMES), 1 => vec(has(), NAMES).prop_map(long_chain)]
}

fn host(at: usize) -> String {
    format!("h{at}.test.")
}

/// 127 is an address that pods cannot use.
fn v4(n: u8) -> IpAddr {
    IpAddr::from(if n == 8 { [127, 0, 0, 1] } else { [192, 0, 2, n] })
}

fn v6(n: u8) -> IpAddr {
    format!("2001:db8::{n}").parse().expect("an address")
}

fn records(zone: &[Has]) -> Vec<Record> {
    let mut records = Vec::new();
    for (at, has) in zone.iter().enumerate() {
        match has {
            Has::Nothing => {}
            Has::Alias { target: Target::OwnZone, ttl } => records.push(record(&host(at), *ttl, "own.cluster.local.")),
            Has::Alias { target: Target::Name(to), ttl } => records.push(record(&host(at), *ttl, &host(*to))),
            Has::Addresses { v4: fours, v6: sixes, ttl4, ttl6 } => {
                records.extend(fours.iter().map(|n| record(&host(at), *ttl4, &v4(*n).to_string())));
                records.extend(sixes.iter().map(|n| record(&host(at), *ttl6, &v6(*n).to_string())));
            }
        }
    }
    records
}

/// What the name leads to, and whether that is an error.
fn expected(zone: &[Has], begin: usize, max_ttl: u32) -> (Resolution, bool) {
    let (mut at, mut chain_ttl, mut walked) = (begin, u32::MAX, vec![begin]);
    loop {
        match &zone[at] {
            Has::Nothing => return (Resolution::NxDomain, false),
            Has::Alias { target: Target::OwnZone, .. } => return (Resolution::Unavailable, true),
            Has::Alias { target: Target::Name(to), ttl } => {
                if walked.contains(to) || walked.len() > MAX_ALIASES {
                    return (Resolution::Unavailable, true);
                }
                chain_ttl = chain_ttl.min(*ttl);
                walked.push(*to);
                at = *to;
            }
            Has::Addresses { v4: fours, v6: sixes, .. } if fours.is_empty() && sixes.is_empty() => {
                // No record at all.
                return (Resolution::NxDomain, false);
            }
            Has::Addresses { v4: fours, v6: sixes, ttl4, ttl6 } => {
                let usable: Vec<u8> = fours.iter().copied().filter(|n| *n != 8).collect();
                let all = usable.iter().map(|n| v4(*n)).chain(sixes.iter().map(|n| v6(*n)));
                let with_addresses = [(usable.is_empty(), ttl4), (sixes.is_empty(), ttl6)];
                let ttl = with_addresses.iter().filter(|(empty, _)| !empty).map(|(_, ttl)| **ttl).min();
                // Of no addresses: A records that pods cannot use, and no AAAA record for as long as the SOA record says.
                let ttl = ttl.unwrap_or_else(|| 30.min(*ttl4)).min(chain_ttl).min(max_ttl);
                return (Resolution::Addresses(ResolvedAddresses::new(all, ttl)), usable.len() < fours.len());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lookups_find_what_a_plain_walk_finds(zone in zones(), recursive: bool, max_ttl in 0..400_u32) {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let found: BTreeMap<String, _> = runtime.block_on(async {
            let served = Zone { records: records(&zone), recursive, soa: true };
            let server = Server::of(&Arc::new(Mutex::new(served))).await;
            let mut lookups = lookups(UpstreamOptions { max_ttl, ..options(&[&server]) }, Timing::new());
            (0..NAMES).for_each(|at| lookups.want(name(&host(at))));
            let mut found = BTreeMap::new();
            while found.len() < NAMES {
                let batch = timeout(WAIT_TIMEOUT, lookups.next()).await.expect("all are looked up");
                for (name, status) in batch {
                    found.entry(format!("{name}.")).or_insert(status);
                }
            }
            found
        });
        let by_name: HashMap<String, usize> = (0..NAMES).map(|at| (host(at), at)).collect();
        for (name, status) in found {
            let (resolution, error) = expected(&zone, by_name[&name], max_ttl);
            prop_assert_eq!(&*status.resolution, &resolution, "{} of {:?}: {:?}", name, zone, status.error);
            prop_assert_eq!(status.error.is_some(), error, "{}: {:?}", name, status.error);
            prop_assert_eq!(status.answered.is_some(), resolution != Resolution::Unavailable);
        }
    }
}
