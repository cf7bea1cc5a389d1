//! Instances that are registered by a DNS name, looked up at Knot DNS.

use hickory_proto::{
    op::ResponseCode,
    rr::{Record, RecordType},
};

use crate::support::{
    dns::{Over, ask},
    http,
    knot::Knot,
    server::Server,
    tools, wait_until,
};

const EXAMPLE: &str = "example.com.";
const DB: &str = "db.prod.svc.cluster.local.";

/// The zone of the names, with `records`.
fn example(serial: u32, records: &str) -> String {
    format!(
        "{EXAMPLE} 60 IN SOA ns.{EXAMPLE} admin.{EXAMPLE} {serial} 7200 1800 86400 5\n{EXAMPLE} 60 IN NS ns.{EXAMPLE}\n{records}"
    )
}

fn server(knot: &Knot, flags: &[&str]) -> Server {
    let upstream = knot.address.to_string();
    Server::start_with(&[&["--upstream", &upstream], flags].concat())
}

/// The answer section and the response code.
fn said(server: &Server, name: &str, rtype: RecordType) -> (ResponseCode, Vec<String>) {
    let answer = ask(server.dns, Over::Udp, name, rtype);
    let mut records: Vec<String> = answer.answers.iter().map(Record::to_string).collect();
    records.sort();
    (answer.metadata.response_code, records)
}

/// Waits until `name` is answered with `expected`, in order of their text.
fn answered(server: &Server, name: &str, rtype: RecordType, code: ResponseCode, expected: &[&str]) {
    let mut expected = expected.to_vec();
    expected.sort_unstable();
    let mut last = None;
    wait_until(&format!("{name} {rtype} is {expected:?}, after {last:?}"), || {
        let found = said(server, name, rtype);
        let is = found.0 == code && found.1 == expected;
        last = Some(found);
        is.then_some(())
    });
}

#[test]
fn name_alone_is_an_alias_that_follows_its_upstream() {
    let Some(knotd) = tools::require("knotd") else { return };
    let pg = |ip: &str| format!("pg.{EXAMPLE} 1 IN CNAME one.{EXAMPLE}\none.{EXAMPLE} 1 IN A {ip}\n");
    let knot = Knot::start(&knotd, &[(EXAMPLE, example(1, &pg("192.0.2.7")))]);
    let server = server(&knot, &["--upstream-stale", "1d"]);
    server.register("prod", "db", "pg.example.com", "pg=5432");
    let alias = "db.prod.svc.cluster.local. 5 IN CNAME pg.example.com.";
    let is = |ip: &str| {
        let address = format!("pg.example.com. 1 IN A {ip}");
        answered(&server, DB, RecordType::A, ResponseCode::NoError, &[alias, &address]);
    };
    is("192.0.2.7");
    assert_eq!(said(&server, DB, RecordType::AAAA), (ResponseCode::NoError, vec![alias.to_owned()]));
    let srv = said(&server, &format!("_pg._tcp.{DB}"), RecordType::SRV).1;
    assert_eq!(srv, [format!("_pg._tcp.{DB} 5 IN SRV 0 100 5432 pg.example.com.")]);

    knot.reload(EXAMPLE, &example(2, &pg("192.0.2.9")));
    is("192.0.2.9");
    // The name is gone: the alias stays, with the code of its target (RFC 6604).
    knot.reload(EXAMPLE, &example(3, ""));
    answered(&server, DB, RecordType::A, ResponseCode::NXDomain, &[alias]);
    knot.reload(EXAMPLE, &example(4, &pg("192.0.2.8")));
    is("192.0.2.8");

    // Beside an address it is its own addresses.
    server.register("prod", "db", "10.0.0.1", "pg=5432");
    let mixed = ["db.prod.svc.cluster.local. 1 IN A 10.0.0.1", "db.prod.svc.cluster.local. 1 IN A 192.0.2.8"];
    answered(&server, DB, RecordType::A, ResponseCode::NoError, &mixed);

    // The last good answer survives its upstream.
    drop(knot);
    wait_until("a lookup fails", || {
        let (_, metrics) = http::get(server.admin, "/metrics");
        let failed =
            metrics.lines().find_map(|line| line.strip_prefix("gangplank_upstream_lookups_total{result=\"failed\"} "));
        failed.filter(|count| *count != "0").map(drop)
    });
    let listed = server.run(&["ls", "prod/db"]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let row = listed.lines().find(|line| line.starts_with("pg.example.com")).expect("the name has a row");
    assert!(row.contains("192.0.2.8") && !row.ends_with("<none>"), "{listed}");
    let listed = server.run(&["ls", "prod/db", "-o", "json"]).stdout;
    let listed: serde_json::Value = serde_json::from_slice(&listed).expect("JSON");
    let name = &listed["names"][0];
    assert_eq!((&name["name"], &name["state"]), (&"pg.example.com".into(), &"resolved".into()), "{listed}");
    assert_eq!(name["addresses"], serde_json::json!(["192.0.2.8"]), "{listed}");
    assert!(name["answered"].is_string() && name["error"].is_string(), "{listed}");
    assert!(listed["instances"].is_array() && listed["namespace"] == "prod", "{listed}");
    // `resolve` has them beside what DNS answers.
    let resolved = server.run(&["resolve", "prod/db"]).stdout;
    let resolved = String::from_utf8_lossy(&resolved).into_owned();
    assert!(
        resolved.lines().any(|line| line.starts_with("pg.example.com") && line.contains("192.0.2.8")),
        "{resolved}"
    );
    let resolved = server.run(&["resolve", "prod/db", "-o", "json"]).stdout;
    let resolved: serde_json::Value = serde_json::from_slice(&resolved).expect("JSON");
    assert_eq!(resolved["names"][0]["addresses"], name["addresses"], "{resolved}");
    assert_eq!(said(&server, DB, RecordType::A).1, mixed);
    // A restart begins without: the others are served, a name alone is not known.
    server.register("prod", "alone", "pg.example.com", "pg=5432");
    let server = server.restart();
    assert_eq!(said(&server, DB, RecordType::A).1, ["db.prod.svc.cluster.local. 5 IN A 10.0.0.1"]);
    assert_eq!(said(&server, "alone.prod.svc.cluster.local.", RecordType::A), (ResponseCode::ServFail, vec![]));
}

/// An instance that is a name gives what the plain list of its addresses gives: Knot serves that list.
#[test]
fn flattened_names_equal_knots_list_of_addresses() {
    let Some(knotd) = tools::require("knotd") else { return };
    let mut rng = fastrand::Rng::with_seed(7);
    let (mut names, mut plain) = (String::new(), String::new());
    for n in 0..20 {
        let owner = format!("s{n}.prod.svc.cluster.local.");
        for _ in 0..rng.usize(1..30) {
            let (rtype, ip) = if rng.bool() {
                ("A", format!("192.0.{}.{}", rng.u8(2..4), rng.u8(1..255)))
            } else {
                ("AAAA", format!("2001:db8::{:x}", rng.u16(1..)))
            };
            names += &format!("n{n}.{EXAMPLE} 60 IN {rtype} {ip}\n");
            plain += &format!("{owner} 5 IN {rtype} {ip}\n");
        }
    }
    let zone = "cluster.local.";
    let apex =
        format!("{zone} 5 IN SOA ns.dns.{zone} hostmaster.{zone} 1 7200 1800 86400 5\n{zone} 5 IN NS ns.dns.{zone}\n");
    let knot = Knot::start(&knotd, &[(EXAMPLE, example(1, &names)), (zone, apex + &plain)]);
    let server = server(&knot, &["--flatten-names"]);
    for n in 0..20 {
        server.register("prod", &format!("s{n}"), &format!("n{n}.example.com"), "http=80");
    }
    for n in 0..20 {
        for rtype in [RecordType::A, RecordType::AAAA] {
            let name = format!("s{n}.prod.svc.cluster.local.");
            let mut theirs: Vec<String> =
                ask(knot.address, Over::Tcp, &name, rtype).answers.iter().map(Record::to_string).collect();
            theirs.sort();
            let theirs: Vec<&str> = theirs.iter().map(String::as_str).collect();
            answered(&server, &name, rtype, ResponseCode::NoError, &theirs);
        }
    }
}

#[test]
fn names_that_lead_where_they_must_not_are_not_followed() {
    let Some(knotd) = tools::require("knotd") else { return };
    let records = format!(
        "rebind.{EXAMPLE} 60 IN A 127.0.0.1\nrebind.{EXAMPLE} 60 IN A 192.0.2.1\nmeta.{EXAMPLE} 60 IN A 169.254.169.254\n\
         denied.{EXAMPLE} 60 IN A 198.51.100.1\nown.{EXAMPLE} 60 IN CNAME web.prod.svc.cluster.local.\n"
    );
    let knot = Knot::start(&knotd, &[(EXAMPLE, example(1, &records))]);
    let server = server(&knot, &["--deny-addresses", "198.51.100.0/24"]);
    for name in ["rebind", "meta", "denied", "own"] {
        server.register("prod", name, &format!("{name}.example.com"), "http=80");
    }
    let alias = |name: &str| format!("{name}.prod.svc.cluster.local. 5 IN CNAME {name}.example.com.");
    let expect = |name: &str, code, more: &[&str]| {
        let owner = format!("{name}.prod.svc.cluster.local.");
        let alias = alias(name);
        let all = if code == ResponseCode::NoError { [&[alias.as_str()], more].concat() } else { more.to_vec() };
        answered(&server, &owner, RecordType::A, code, &all);
    };
    expect("rebind", ResponseCode::NoError, &["rebind.example.com. 5 IN A 192.0.2.1"]);
    expect("meta", ResponseCode::NoError, &[]);
    expect("denied", ResponseCode::ServFail, &[]);
    // Through CoreDNS this would ask gangplank itself.
    expect("own", ResponseCode::ServFail, &[]);
}

#[test]
fn names_are_refused_without_an_upstream() {
    let server = Server::start();
    let refused = server.run(&["register", "db", "pg.example.com", "--port", "pg=5432", "-n", "prod"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("ipaddress: pg.example.com is a DNS name") && said.contains("--upstream"), "{said}");
}
