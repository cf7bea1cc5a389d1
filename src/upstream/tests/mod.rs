//! The lookups against real DNS servers on loopback.

mod faults;
mod model;
mod scale;
mod server;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use hickory_proto::rr::RecordType;
use tokio::time::timeout;

use self::server::{Server, Zone, failing, record};
use super::{Lookups, NoServer, Timing, UpstreamOptions};
use crate::{
    metrics::{LabelEnum as _, LookupResult, Metrics, NameState},
    model::{DnsName, NameStatus, Resolution, ResolvedAddresses},
};

/// How long a test waits for a state.
const WAIT_TIMEOUT: Duration = Duration::from_secs(30);

/// How many times as fast as in production, where a test has to wait.
const FASTER: u32 = 20;

fn name(text: &str) -> DnsName {
    DnsName::parse(text).expect("a name")
}

fn options(servers: &[&Server]) -> UpstreamOptions {
    UpstreamOptions {
        servers: servers.iter().map(|server| server.address).collect(),
        stale: Duration::from_secs(3600),
        max_ttl: 3600,
        zone: name("cluster.local"),
    }
}

fn lookups(options: UpstreamOptions, timing: Timing) -> Lookups {
    Lookups::with_timing(options, Arc::new(Metrics::new()), timing).expect("it has a server")
}

fn addresses(of: &[&str], ttl: u32) -> Resolution {
    Resolution::Addresses(ResolvedAddresses::new(of.iter().map(|ip| ip.parse().expect("an address")), ttl))
}

/// Waits until `wanted` is in a state.
async fn until(lookups: &mut Lookups, wanted: &DnsName, is: impl Fn(&NameStatus) -> bool) -> NameStatus {
    let mut last = None;
    let found = timeout(WAIT_TIMEOUT, async {
        loop {
            for (name, status) in lookups.next().await {
                if name == *wanted {
                    if is(&status) {
                        return status;
                    }
                    last = Some(status);
                }
            }
        }
    });
    let found = found.await;
    found.unwrap_or_else(|_| panic!("{wanted} did not come into the state; the last one: {last:?}"))
}

/// Looks `text` up once.
async fn once(server: &Server, max_ttl: u32, text: &str) -> NameStatus {
    let mut lookups = lookups(UpstreamOptions { max_ttl, ..options(&[server]) }, Timing::new());
    lookups.want(name(text));
    until(&mut lookups, &name(text), |_| true).await
}

#[tokio::test]
async fn both_families_are_found_through_aliases_with_the_smallest_ttl() {
    let zone = Zone::shared(&[
        ("db.test.", 300, "DB.Cloud.test."),
        ("db.cloud.test.", 7, "host.cloud.test."),
        ("host.cloud.test.", 60, "192.0.2.2"),
        ("host.cloud.test.", 60, "192.0.2.1"),
        ("host.cloud.test.", 40, "2001:db8::1"),
        ("other.cloud.test.", 1, "192.0.2.3"),
    ]);
    for recursive in [true, false] {
        zone.lock().expect("no panic").recursive = recursive;
        let server = Server::of(&zone).await;
        let found = once(&server, 3600, "db.test").await;
        assert_eq!(*found.resolution, addresses(&["192.0.2.1", "192.0.2.2", "2001:db8::1"], 7));
        assert_eq!(found.error, None);
        assert!(found.answered.is_some());
        let mut asked: Vec<_> = server.asked().into_iter().map(|asked| (asked.name, asked.kind)).collect();
        asked.sort();
        let kinds = [RecordType::A, RecordType::AAAA];
        let names = if recursive { vec!["db.test."] } else { vec!["DB.Cloud.test.", "db.test.", "host.cloud.test."] };
        let expected: Vec<_> = names.iter().flat_map(|name| kinds.map(|kind| ((*name).to_owned(), kind))).collect();
        assert_eq!(asked, expected, "recursive: {recursive}");

        let clamped = once(&server, 5, "db.test").await;
        assert_eq!(*clamped.resolution, addresses(&["192.0.2.1", "192.0.2.2", "2001:db8::1"], 5));
    }
}

#[tokio::test]
async fn names_without_addresses_and_names_that_do_not_exist_differ() {
    let zone = Zone::shared(&[
        ("v4.test.", 60, "192.0.2.1"),
        ("leaf.below.test.", 60, "192.0.2.9"),
        ("alias.test.", 60, "gone.test."),
        ("empty.test.", 60, "leaf.test."),
        ("leaf.test.", 60, "nowhere.test."),
    ]);
    {
        // A name with records of another type only.
        let mut zone = zone.lock().expect("no panic");
        let mut other = record("text.test.", 60, "192.0.2.1");
        other.data = hickory_proto::rr::RData::TXT(hickory_proto::rr::rdata::TXT::new(vec!["x".into()]));
        zone.records.push(other);
        zone.records.push(record("totext.test.", 60, "text.test."));
    }
    for (recursive, soa) in [(true, true), (true, false), (false, true), (false, false)] {
        {
            let mut zone = zone.lock().expect("no panic");
            (zone.recursive, zone.soa) = (recursive, soa);
        }
        let server = Server::of(&zone).await;
        assert_eq!(*once(&server, 60, "v4.test").await.resolution, addresses(&["192.0.2.1"], 60));
        for missing in ["gone.test", "alias.test", "empty.test"] {
            let status = once(&server, 60, missing).await;
            assert_eq!(*status.resolution, Resolution::NxDomain, "{missing}");
            assert_eq!(status.error, None, "an answer, not a failure");
        }
        for empty in ["text.test", "totext.test"] {
            let found = once(&server, 5, empty).await;
            assert_eq!(*found.resolution, addresses(&[], 5), "{empty}");
            assert_eq!(found.error, None);
        }
    }
}

#[tokio::test]
async fn names_are_looked_up_again_ahead_of_their_ttl_and_no_sooner() {
    for (ttl, at_least) in [(0, 5.0), (1, 5.0), (12, 12.0 * 0.8)] {
        let zone = Zone::shared(&[("a.test.", ttl, "192.0.2.1"), ("a.test.", ttl, "2001:db8::1")]);
        let server = Server::of(&zone).await;
        // A lookup that fails is repeated sooner, and none fails here, however busy the machine is.
        let patient = Timing::new();
        let timing = Timing { udp_timeout: 10 * patient.udp_timeout, ..Timing::faster(FASTER) };
        let mut lookups =
            lookups(options(&[&server]), Timing { lookup_timeout: 10 * patient.lookup_timeout, ..timing });
        lookups.want(name("a.test"));
        until(&mut lookups, &name("a.test"), |_| true).await;
        let changed = addresses(&["192.0.2.2", "2001:db8::1"], ttl);
        zone.lock().expect("no panic").records[0] = record("a.test.", ttl, "192.0.2.2");
        until(&mut lookups, &name("a.test"), |status| *status.resolution == changed).await;
        until(&mut lookups, &name("a.test"), |status| status.error.is_none()).await;
        let asked = server.asked().into_iter().filter(|asked| asked.kind == RecordType::A);
        // A question that is sent again has the id of the first.
        let mut times: Vec<_> = asked.map(|asked| (asked.id, asked.at)).collect();
        times.dedup_by_key(|(id, _)| *id);
        assert!(times.len() >= 3, "{times:?}");
        for pair in times.windows(2) {
            let pause = (pair[1].1 - pair[0].1).as_secs_f64() * f64::from(FASTER);
            assert!(pause >= at_least, "a TTL of {ttl} s, and a pause of {pause} s");
        }
    }
}

#[tokio::test]
async fn answer_is_reported_again_when_it_is_confirmed() {
    let server = Server::of(&Zone::shared(&[("a.test.", 1, "192.0.2.1")])).await;
    let mut lookups = lookups(options(&[&server]), Timing::faster(FASTER));
    lookups.want(name("a.test"));
    let first = until(&mut lookups, &name("a.test"), |_| true).await;
    let again = until(&mut lookups, &name("a.test"), |status| status.answered > first.answered).await;
    assert!(Arc::ptr_eq(&first.resolution, &again.resolution), "nothing is made anew");
}

#[tokio::test]
async fn forgotten_name_is_neither_reported_nor_asked_for() {
    let zone = Zone::shared(&[("a.test.", 0, "192.0.2.1"), ("b.test.", 0, "192.0.2.2")]);
    let server = Server::of(&zone).await;
    let mut lookups = lookups(options(&[&server]), Timing::faster(FASTER));
    for one in ["a.test", "b.test", "a.test"] {
        lookups.want(name(one));
    }
    until(&mut lookups, &name("a.test"), |_| true).await;
    lookups.forget(&name("a.test"));
    lookups.forget(&name("never.test"));
    let asked = |of: &str| server.asked().iter().filter(|asked| asked.name == of).count();
    let before = asked("a.test.");
    for _ in 0..3 {
        let batch = timeout(WAIT_TIMEOUT, lookups.next()).await.expect("b.test is looked up again");
        assert!(batch.iter().all(|(one, _)| *one == name("b.test")), "{batch:?}");
    }
    assert_eq!(asked("a.test."), before);
    assert_eq!(lookups.names.len(), 1);
    assert_eq!(lookups.timers.len(), 1);

    // Forgotten while it is looked up, and wanted again: the first lookup counts no more.
    lookups.forget(&name("b.test"));
    lookups.want(name("a.test"));
    assert!(futures::FutureExt::now_or_never(lookups.next()).is_none(), "it has begun");
    lookups.forget(&name("a.test"));
    lookups.want(name("a.test"));
    until(&mut lookups, &name("a.test"), |_| true).await;
    assert_eq!(lookups.timers.len(), 1);
}

#[tokio::test]
async fn nothing_is_lost_when_next_is_dropped() {
    let records: Vec<String> = (0..300).map(|n| format!("n{n}.test.")).collect();
    let records: Vec<_> = records.iter().map(|name| (name.as_str(), 300, "192.0.2.1")).collect();
    let server = Server::of(&Zone::shared(&records)).await;
    let mut lookups = lookups(options(&[&server]), Timing::new());
    for n in 0..300 {
        lookups.want(name(&format!("n{n}.test")));
    }
    let mut seen = std::collections::HashMap::new();
    while seen.len() < 300 {
        // Mostly too short for anything to be ready.
        if let Ok(batch) = timeout(Duration::from_micros(300), lookups.next()).await {
            for (name, status) in batch {
                assert_eq!(*status.resolution, addresses(&["192.0.2.1"], 300));
                assert_eq!(seen.insert(name.clone(), ()), None, "{name} twice");
            }
        }
    }
}

#[tokio::test]
async fn lookups_and_names_are_counted() {
    let zone = Zone::shared(&[("good.test.", 60, "192.0.2.1"), ("bad.test.", 60, "192.0.2.1")]);
    let shared = Arc::clone(&zone);
    let server = Server::start(move |question, over| {
        if question.queries[0].name().to_string() == "bad.test." {
            failing(question, hickory_proto::op::ResponseCode::ServFail)
        } else {
            shared.lock().expect("no panic").react(question, over)
        }
    })
    .await;
    let metrics = Arc::new(Metrics::new());
    let mut lookups = Lookups::new(options(&[&server]), Arc::clone(&metrics)).expect("it has a server");
    for one in ["good.test", "bad.test", "gone.test", "a.cluster.local"] {
        lookups.want(name(one));
    }
    let mut left = 4;
    while left > 0 {
        left -= timeout(WAIT_TIMEOUT, lookups.next()).await.expect("all are looked up").len();
    }
    let count = |result| metrics.upstream.lookups(result);
    for result in LookupResult::ALL {
        assert_eq!(count(*result), 1, "{result:?}");
    }
    let names = |state| metrics.upstream.names.at(state).get();
    assert_eq!(
        [NameState::Current, NameState::Stale, NameState::Absent, NameState::Unavailable].map(names),
        [1, 0, 1, 2]
    );
    for one in ["good.test", "bad.test", "gone.test", "a.cluster.local"] {
        lookups.forget(&name(one));
    }
    assert_eq!([NameState::Current, NameState::Stale, NameState::Absent, NameState::Unavailable].map(names), [0; 4]);
}

#[test]
fn lookups_need_a_server() {
    let options =
        UpstreamOptions { servers: Vec::new(), stale: Duration::ZERO, max_ttl: 5, zone: name("cluster.local") };
    assert_eq!(Lookups::new(options, Arc::new(Metrics::new())).err(), Some(NoServer));
}

/// A zone that a test changes.
type SharedZone = Arc<Mutex<Zone>>;
