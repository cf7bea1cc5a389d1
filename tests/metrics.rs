//! The metrics in the docs are those of a real scrape, and every metric of a scrape is in
//! `docs/operations.md`, with its labels.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use hickory_proto::rr::RecordType;

use crate::support::{
    dns::{Over, answers, ask},
    http,
    server::Server,
    tools::ROOT,
};

/// How metrics of this process begin.
const PREFIXES: [&str; 3] = ["gangplank_", "grpc_server_", "process_"];

const OPERATIONS: &str = "docs/operations.md";

/// Labels by name, as a scrape has them or as a page has them.
pub(crate) type Metrics<'t> = BTreeMap<&'t str, BTreeSet<&'t str>>;

/// A server that has had traffic of every kind.
pub(crate) fn busy_server() -> Server {
    let server = Server::start();
    server.register("prod", "web", "10.0.0.1", "http=8080");
    server.register("prod", "web", "10.0.0.1", "http=8080");
    assert_eq!(server.run(&["register", "web", "127.0.0.1", "-n", "prod"]).status.code(), Some(1));
    assert_eq!(server.run(&["deregister", "web", "10.9.9.9", "-n", "prod"]).status.code(), Some(3));
    assert_eq!(server.run(&["ls", "-A"]).status.code(), Some(0));
    for over in [Over::Udp, Over::Tcp] {
        assert_eq!(answers(server.dns, over, "web.prod.svc.cluster.local.", RecordType::A), ["10.0.0.1"]);
        ask(server.dns, over, "nobody.prod.svc.cluster.local.", RecordType::A);
        ask(server.dns, over, "example.com.", RecordType::A);
    }
    server
}

/// The metrics of a scrape under the names that people write: a histogram's is that of its family.
pub(crate) fn scraped(text: &str) -> Metrics<'_> {
    let kinds: BTreeMap<&str, &str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    let mut metrics = Metrics::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (series, _) = line.rsplit_once(' ').expect("a value");
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let name = family.filter(|family| kinds.get(family) == Some(&"histogram")).unwrap_or(name);
        // `a="x",b="y"}`: every other piece between quotes is a label's name.
        let keys = labels.split('"').step_by(2).map(|piece| piece.trim_matches([',', '=', '}']));
        metrics.entry(name).or_default().extend(keys.filter(|key| !key.is_empty() && *key != "le"));
    }
    metrics
}

/// The metrics that a page names in code spans, `name` or `name{label,label}`.
fn named(page: &str) -> Vec<(&str, BTreeSet<&str>)> {
    let spans = page.split('`').filter(|span| PREFIXES.iter().any(|prefix| span.starts_with(prefix)));
    spans
        .map(|span| {
            let (name, labels) = span.split_once('{').unwrap_or((span, ""));
            (name, labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty()).collect())
        })
        .collect()
}

#[test]
fn pages_and_scrape_name_the_same_metrics_and_labels() {
    let server = busy_server();
    let (status, text) = http::get(server.admin, "/metrics");
    assert_eq!(status, 200);
    let scraped = scraped(&text);
    let mut pages = vec![OPERATIONS.to_owned(), "README.md".to_owned()];
    for entry in fs::read_dir(Path::new(ROOT).join("docs")).expect("there is a folder of pages") {
        let name = entry.expect("it can be read").file_name().into_string().expect("ASCII");
        pages.push(format!("docs/{name}"));
    }
    for page in pages {
        let shown = fs::read_to_string(Path::new(ROOT).join(&page)).expect("a page is UTF-8");
        for (name, labels) in named(&shown) {
            let real = scraped.get(name).unwrap_or_else(|| panic!("{page} names {name}, which no scrape has:\n{text}"));
            assert!(labels.is_empty() || labels == *real, "{page} gives {name} the labels {labels:?}, it has {real:?}");
        }
    }
    let operations = fs::read_to_string(Path::new(ROOT).join(OPERATIONS)).expect("a page is UTF-8");
    let documented = named(&operations);
    for (name, labels) in scraped {
        let whole = documented.iter().any(|(shown, with)| *shown == name && *with == labels);
        assert!(whole, "{OPERATIONS} does not name {name} with its labels {labels:?}");
    }
}

#[test]
fn every_status_of_the_contract_has_a_series() {
    let page = fs::read_to_string(Path::new(ROOT).join("docs/registry-api.md")).expect("a page is UTF-8");
    let (_, table) = page.split_once("## The answers").expect("the table of statuses");
    let rows = table.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" |"));
    let documented: BTreeSet<&str> =
        rows.map(|(status, _)| status).filter(|status| status.parse::<u32>().is_ok()).collect();
    let server = Server::start();
    let (_, text) = http::get(server.admin, "/metrics");
    for kind in ["register", "unregister", "other"] {
        let before = format!(r#"gangplank_registrations_total{{type="{kind}",status=""#);
        let exposed: BTreeSet<&str> =
            text.lines().filter_map(|line| Some(line.strip_prefix(&before)?.split_once('"')?.0)).collect();
        assert_eq!(exposed, documented, "{kind}");
    }
}

#[test]
fn traffic_is_counted() {
    let server = busy_server();
    let (_, text) = http::get(server.admin, "/metrics");
    let dns = server.dns;
    for line in [
        r#"gangplank_registrations_total{type="register",status="201"} 1"#.to_owned(),
        r#"gangplank_registrations_total{type="register",status="200"} 1"#.into(),
        r#"gangplank_registrations_total{type="register",status="400"} 1"#.into(),
        r#"gangplank_registrations_total{type="unregister",status="404"} 1"#.into(),
        r#"gangplank_registry_refused_total{reason="invalid"} 1"#.into(),
        "gangplank_registry_services 1".into(),
        "gangplank_registry_instances 1".into(),
        "gangplank_registry_changes_total 1".into(),
        "gangplank_store_failed 0".into(),
        "gangplank_panics_total 0".into(),
        format!(r#"gangplank_dns_responses_total{{server="dns://{dns}",zone="cluster.local.",rcode="NXDOMAIN"}} 2"#),
        format!(r#"gangplank_dns_responses_total{{server="dns://{dns}",zone=".",rcode="REFUSED"}} 2"#),
        r#"gangplank_connections_accepted_total{listener="dns"} 3"#.to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
    }
    let generation = server.run(&["ls", "web", "-n", "prod", "-o", "json"]).stdout;
    let service: serde_json::Value = serde_json::from_slice(&generation).expect("JSON");
    let line = format!("gangplank_registry_generation {}", service["generation"]);
    assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
}
