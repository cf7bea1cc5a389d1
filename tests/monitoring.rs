//! `deploy/monitoring`: each alert is valid, fires, and says in `docs/operations.md` what to do; the alerts and the dashboard
//! use metrics, labels and values of labels that a real scrape has.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::{
    metrics::{busy_server, scraped},
    support::{
        http,
        tools::{self, ROOT},
    },
};

/// Labels that Prometheus adds to every series, or that its configuration does.
const LABELS_OF_PROMETHEUS: [&str; 5] = ["cluster", "namespace", "job", "instance", "le"];

fn path(file: &str) -> PathBuf {
    Path::new(ROOT).join("deploy/monitoring").join(file)
}

fn text(file: &str) -> String {
    fs::read_to_string(path(file)).expect("it is there")
}

fn yaml(file: &str) -> Value {
    serde_yaml_ng::from_str(&text(file)).expect("YAML")
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field].as_array().map_or(&[], Vec::as_slice)
}

fn string<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("no {field} in {value}"))
}

fn alerts() -> Vec<Value> {
    let rules = yaml("alerts.yaml");
    list(&rules, "groups").iter().flat_map(|group| list(group, "rules").to_vec()).collect()
}

/// The expressions of all panels, as Grafana would send them with its variables at `All`.
fn dashboard_expressions(dashboard: &Value) -> Vec<String> {
    let targets = list(dashboard, "panels").iter().flat_map(|panel| list(panel, "targets"));
    targets.map(|target| string(target, "expr").replace("$__rate_interval", "5m")).collect()
}

/// Runs promtool; a failure fails the test with what it printed.
fn promtool(arguments: &[&str]) -> Option<()> {
    let mut command = Command::new(tools::require("promtool")?);
    let output = command.args(arguments).stdin(Stdio::null()).output().expect("promtool can be run");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&said));
    Some(())
}

#[test]
fn every_alert_fires_and_is_quiet_in_a_case_of_promtool() {
    let (rules, tests) = (path("alerts.yaml"), path("alerts.test.yaml"));
    let [rules, tests] = [&rules, &tests].map(|path| path.to_str().expect("UTF-8"));
    let Some(()) = promtool(&["check", "rules", "--lint=all", "--lint-fatal", rules]) else { return };
    promtool(&["test", "rules", tests]).expect("it is there");
    let cases = yaml("alerts.test.yaml");
    let mut expected: BTreeMap<String, &[Value]> = BTreeMap::new();
    for case in list(&cases, "tests") {
        for check in list(case, "promql_expr_test") {
            assert_eq!(check["expr"], r#"count by (alertname) (ALERTS{alertstate="firing"})"#, "all that fire");
            expected.insert(string(case, "name").to_owned(), list(check, "exp_samples"));
        }
    }
    let alerts = alerts();
    for alert in &alerts {
        let name = string(alert, "alert");
        let fires = expected.remove(&format!("{name} fires")).unwrap_or_else(|| panic!("{name} never fires"));
        assert_eq!(fires.len(), 1, "{name}");
        assert_eq!(fires[0]["labels"], format!("{{alertname=\"{name}\"}}"));
        let quiet = expected.remove(&format!("{name} is quiet")).unwrap_or_else(|| panic!("{name} is never quiet"));
        assert!(quiet.is_empty(), "{name}");
    }
    assert!(expected.is_empty(), "cases of no alert: {:?}", expected.keys());
    // promtool does say so when an alert does not fire, and when one does that should not.
    let folder = tempfile::tempdir().expect("a directory");
    fs::copy(rules, folder.path().join("alerts.yaml")).expect("copied");
    let broken = |from: &str, to: &str| {
        let file = folder.path().join("alerts.test.yaml");
        let cases = text("alerts.test.yaml");
        assert!(cases.contains(from), "{from}");
        fs::write(&file, cases.replacen(from, to, 1)).expect("written");
        let mut promtool = Command::new(tools::require("promtool").expect("it is there"));
        !promtool.args(["test", "rules"]).arg(&file).output().expect("promtool can be run").status.success()
    };
    assert!(broken("values: '0+30x60'", "values: '0x60'"), "nothing lags");
    assert!(broken("values: '5x5 0x60'", "values: '5x60'"), "a hand-over is stuck");
}

#[test]
fn every_alert_says_what_to_do_under_its_heading() {
    let page = fs::read_to_string(Path::new(ROOT).join("docs/operations.md")).expect("a page is UTF-8");
    let (_, section) = page.split_once("\n## Alerts and dashboard\n").expect("there is a section");
    let section = section.split("\n## ").next().expect("a first part");
    let mut headings = BTreeMap::new();
    for part in section.split("\n### ").skip(1) {
        let (heading, body) = part.split_once('\n').expect("a heading is a line");
        headings.insert(heading, body.trim());
    }
    for alert in alerts() {
        let name = string(&alert, "alert");
        let what_to_do = headings.remove(name).unwrap_or_else(|| panic!("no heading {name}"));
        assert!(what_to_do.len() > 60, "{name}: {what_to_do}");
        let annotations = &alert["annotations"];
        assert_eq!(annotations["runbook_url"], format!("docs/operations.md#{}", name.to_lowercase()));
        assert!(!string(annotations, "summary").is_empty() && string(annotations, "description").ends_with('.'));
        let severity = string(&alert["labels"], "severity");
        assert!(["critical", "warning"].contains(&severity), "{name}: {severity}");
    }
    assert!(headings.is_empty(), "headings of no alert: {:?}", headings.keys());
    // Links to headings of this page and of others lead somewhere.
    let anchor = |heading: &str| {
        let kept = heading.trim_start_matches('#').trim().to_lowercase();
        kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>().replace(' ', "-")
    };
    let mut links = 0;
    for link in section.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(link, _)| link)) {
        let (file, heading) = link.split_once('#').unwrap_or_else(|| panic!("{link} names no heading"));
        let file = if file.is_empty() { "operations.md" } else { file };
        let target = fs::read_to_string(Path::new(ROOT).join("docs").join(file)).expect("a page is UTF-8");
        assert!(target.lines().any(|line| line.starts_with('#') && anchor(line) == heading), "{link}");
        links += 1;
    }
    assert!(links > 20, "{links} links");
}

/// One use of a metric: its name, and what it demands of labels.
#[derive(Debug, PartialEq, Eq)]
struct Use {
    metric: String,
    /// Label, and the values that it is compared with.
    matchers: Vec<(String, Vec<String>)>,
}

/// The metrics of an expression in PromQL with their matchers, and the labels that it groups by or joins on.
fn uses(expression: &str) -> (Vec<Use>, BTreeSet<String>) {
    let (mut uses, mut groups) = (Vec::new(), BTreeSet::new());
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut rest = expression;
    while let Some(start) = rest.find(is_word) {
        rest = &rest[start..];
        let end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
        let word = &rest[..end];
        rest = &rest[end..];
        if ["by", "without", "on"].contains(&word) {
            let (inside, after) = rest.split_once(')').expect("a list of labels");
            groups.extend(inside.trim_start_matches([' ', '(']).split(", ").map(str::to_owned));
            rest = after;
        } else if word == "up"
            || ["gangplank_", "grpc_server_", "process_"].iter().any(|prefix| word.starts_with(prefix))
        {
            let mut matchers = Vec::new();
            if let Some(inside) = rest.strip_prefix('{') {
                let (inside, after) = inside.split_once('}').expect("it is closed");
                rest = after;
                // `a="x",b=~"y|z"`: names and values take turns between the quotes.
                let pieces: Vec<&str> = inside.split('"').collect();
                matchers.extend(pieces.chunks_exact(2).map(|pair| {
                    let label = pair[0].trim_matches([',', '=', '~', '!', ' ']).to_owned();
                    (label, pair[1].split('|').map(str::to_owned).collect())
                }));
            }
            uses.push(Use { metric: word.to_owned(), matchers });
        } else if let Some(string) = rest.strip_prefix('"') {
            rest = string.split_once('"').map_or("", |(_, after)| after);
        }
    }
    (uses, groups)
}

#[test]
fn uses_of_an_expression_are_found() {
    let (found, groups) =
        uses(r#"sum by (le, type) (rate(gangplank_a_bucket{x=~"1|2",y!="3"}[5m])) / gangplank_b > 0.1"#);
    let matchers = vec![("x".to_owned(), vec!["1".to_owned(), "2".to_owned()]), ("y".to_owned(), vec!["3".to_owned()])];
    assert_eq!(
        found,
        [
            Use { metric: "gangplank_a_bucket".into(), matchers },
            Use { metric: "gangplank_b".into(), matchers: Vec::new() }
        ]
    );
    assert_eq!(groups.into_iter().collect::<Vec<_>>(), ["le", "type"]);
}

#[test]
fn alerts_and_dashboard_use_what_a_scrape_has() {
    let server = busy_server();
    let (status, text) = http::get(server.admin, "/metrics");
    assert_eq!(status, 200);
    let scraped = scraped(&text);
    let dashboard: Value = serde_json::from_str(&self::text("dashboard.json")).expect("JSON");
    let panels = dashboard_expressions(&dashboard);
    let rules: Vec<String> = alerts().iter().map(|alert| string(alert, "expr").to_owned()).collect();
    assert!(panels.len() > 60 && rules.len() > 30, "{} and {}", panels.len(), rules.len());
    for expression in panels.iter().chain(&rules) {
        let (uses, groups) = uses(expression);
        assert!(!uses.is_empty(), "{expression}");
        let mut known: BTreeSet<&str> = LABELS_OF_PROMETHEUS.into();
        for Use { metric, matchers } in &uses {
            // Made by Prometheus for each target.
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| metric.strip_suffix(suffix));
            let labels = match scraped.get(metric.as_str()).or_else(|| family.and_then(|name| scraped.get(name))) {
                Some(labels) => labels.clone(),
                None if metric == "up" => BTreeSet::new(),
                None => panic!("{expression}: no scrape has {metric}"),
            };
            let series = text.lines().filter(|line| line.starts_with(&format!("{metric}{{")));
            let series: Vec<&str> = series.collect();
            for (label, values) in matchers.iter().filter(|(label, _)| !LABELS_OF_PROMETHEUS.contains(&label.as_str()))
            {
                assert!(labels.contains(label.as_str()), "{expression}: {metric} has no label {label}");
                for value in values {
                    let pair = format!("{label}=\"{value}\"");
                    assert!(series.iter().any(|line| line.contains(&pair)), "{expression}: no series has {pair}");
                }
            }
            known.extend(labels);
        }
        for label in groups {
            assert!(known.contains(label.as_str()), "{expression}: there is no label {label}");
        }
    }
}

#[test]
fn dashboard_is_laid_out_and_its_expressions_are_valid() {
    let dashboard: Value = serde_json::from_str(&text("dashboard.json")).expect("JSON");
    let panels = list(&dashboard, "panels");
    let rows: Vec<&str> =
        panels.iter().filter(|panel| panel["type"] == "row").map(|panel| string(panel, "title")).collect();
    assert_eq!(rows, ["Now", "DNS", "Registrations", "Mirror and replicas", "Process", "Identity"]);
    let sources = list(&dashboard["templating"], "list").iter().filter(|variable| variable["type"] == "datasource");
    assert_eq!(sources.count(), 1);
    let (mut taken, mut ids) = (BTreeSet::new(), BTreeSet::new());
    for panel in panels {
        let title = string(panel, "title");
        assert!(ids.insert(panel["id"].as_u64().expect("a number")), "{title}");
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().expect("a number"));
        assert!(x + w <= 24, "{title}");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(taken.insert(cell), "{title} lies on another panel");
        }
        if panel["type"] != "row" {
            assert!(!string(&panel["fieldConfig"]["defaults"], "unit").is_empty(), "{title}");
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        }
    }
    // As rules: what promtool reads.
    let rules: Vec<Value> = dashboard_expressions(&dashboard)
        .iter()
        .enumerate()
        .map(|(at, expression)| serde_json::json!({"record": format!("panel:{at}"), "expr": expression}))
        .collect();
    let file = tempfile::NamedTempFile::new().expect("a file");
    let rules = serde_json::json!({"groups": [{"name": "dashboard", "rules": rules}]});
    fs::write(file.path(), rules.to_string()).expect("written");
    promtool(&["check", "rules", "--lint=none", file.path().to_str().expect("UTF-8")]);
}
