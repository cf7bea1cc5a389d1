//! What an edit changes, and what it leaves alone.

use proptest::{collection, prelude::*, sample};

use super::*;

/// What kubeadm installs.
const KUBEADM: &str = ".:53 {
    errors
    health {
       lameduck 5s
    }
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
       pods insecure
       fallthrough in-addr.arpa ip6.arpa
       ttl 30
    }
    prometheus :9153
    forward . /etc/resolv.conf {
       max_concurrent 1000
    }
    cache 30 {
       disable success cluster.local
       disable denial cluster.local
    }
    loop
    reload
    loadbalance
}
";

/// Like that of k3s: nothing has a block that need not, and more is imported.
const K3S: &str = "# managed
.:53 {
    bind 10.1.0.1 # the node
    kubernetes cluster.local in-addr.arpa ip6.arpa  # all
    hosts /etc/coredns/NodeHosts {
      fallthrough
    }
    cache 30
    import /etc/coredns/custom/*.override
    forward . /etc/resolv.conf
}
import /etc/coredns/custom/*.server";

fn plan(wiring: Wiring) -> Plan {
    let zone = DnsName::parse("cluster.local").expect("a name");
    Plan { zone, servers: vec!["10.96.0.53:1053".parse().expect("an address")], wiring }
}

fn stub_domain(namespaces: &[&str]) -> Plan {
    plan(Wiring::StubDomain { namespaces: namespaces.iter().map(|&name| name.to_owned()).collect() })
}

fn fall_through() -> Plan {
    plan(Wiring::FallThrough { reverse: true })
}

/// The lines of `text` that are not comments, without their indentation.
fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

#[test]
fn stub_domain_is_a_block_at_the_end_on_the_same_sockets() {
    let edited = apply(K3S, &stub_domain(&["prod", "test"])).expect("it is valid");
    assert!(edited.starts_with(K3S));
    assert_eq!(
        lines(&edited[K3S.len()..]),
        [
            "prod.svc.cluster.local:53 test.svc.cluster.local:53 {",
            "errors",
            "bind 10.1.0.1",
            "forward . 10.96.0.53:1053",
            "}"
        ]
    );
    let stub = |name: &str| Wired::StubDomain(format!("{name}.svc.cluster.local"));
    assert_eq!(wired(&edited), Ok(vec![stub("prod"), stub("test")]));
    assert_eq!(remove(&edited).as_deref(), Ok(K3S));
}

#[test]
fn fall_through_changes_only_what_kubeadm_lacks() {
    let edited = apply(KUBEADM, &fall_through()).expect("it is valid");
    let mut expected = lines(KUBEADM);
    let at = |lines: &[&str], line: &str| lines.iter().position(|one| *one == line).expect("it is there");
    expected.insert(at(&expected, "ttl 30") + 1, "fallthrough in-addr.arpa ip6.arpa cluster.local");
    let forward = at(&expected, "forward . /etc/resolv.conf {");
    expected.splice(
        forward..forward,
        [
            "forward cluster.local 10.96.0.53:1053",
            "forward in-addr.arpa 10.96.0.53:1053 {",
            "next NXDOMAIN REFUSED",
            "}",
            "forward ip6.arpa 10.96.0.53:1053 {",
            "next NXDOMAIN REFUSED",
            "}",
        ],
    );
    assert_eq!(lines(&edited), expected);
    assert_eq!(wired(&edited), Ok(vec![Wired::FallThrough("cluster.local".into())]));
    let without = apply(KUBEADM, &plan(Wiring::FallThrough { reverse: false })).expect("it is valid");
    assert!(!without.contains("next NXDOMAIN"), "{without}");
}

#[test]
fn plugins_without_a_block_get_one_and_their_line_is_kept() {
    let edited = apply(K3S, &fall_through()).expect("it is valid");
    assert_eq!(
        lines(&edited),
        [
            ".:53 {",
            "bind 10.1.0.1 # the node",
            "kubernetes cluster.local in-addr.arpa ip6.arpa {",
            "fallthrough cluster.local in-addr.arpa ip6.arpa",
            "}",
            "hosts /etc/coredns/NodeHosts {",
            "fallthrough",
            "}",
            "cache 30 {",
            "disable success cluster.local",
            "disable denial cluster.local",
            "}",
            "forward cluster.local 10.96.0.53:1053",
            "forward in-addr.arpa 10.96.0.53:1053 {",
            "next NXDOMAIN REFUSED",
            "}",
            "forward ip6.arpa 10.96.0.53:1053 {",
            "next NXDOMAIN REFUSED",
            "}",
            "import /etc/coredns/custom/*.override",
            "forward . /etc/resolv.conf",
            "}",
            "import /etc/coredns/custom/*.server",
        ]
    );
    assert_eq!(remove(&edited).as_deref(), Ok(K3S));
}

#[test]
fn zones_that_are_there_already_are_kept() {
    let text = ".:53 {\n  kubernetes CLUSTER.local. {\n    fallthrough a.example\n  }\n  cache 5 {\n    disable denial b.example\n    \
        disable success\n  }\n}\n";
    let edited = apply(text, &fall_through()).expect("it is valid");
    let edited = lines(&edited);
    assert!(edited.contains(&"fallthrough a.example cluster.local"), "{edited:?}");
    assert!(edited.contains(&"disable denial b.example cluster.local"), "{edited:?}");
    assert!(!edited.contains(&"disable success cluster.local"), "{edited:?}");
    // Of reverse names only those that reach this block.
    let narrow = "cluster.local:53 {\n  kubernetes cluster.local\n}\n";
    let edited = apply(narrow, &fall_through()).expect("it is valid");
    assert!(!edited.contains("arpa 10"), "{edited}");
}

#[test]
fn uncertain_places_are_refused_with_their_line() {
    let stub = stub_domain(&["prod"]);
    for (text, plan, line, part) in [
        (".:53 {\n    errors\n", &stub, Some(1), "without its `}`"),
        ("example.com:53 {\n}\n", &stub, None, "no server block serves prod.svc.cluster.local"),
        (".:53 {\n}\nprod.svc.cluster.local {\n}\n", &stub, Some(3), "already"),
        (".:53 {\n}\n.:5353 {\n}\n", &stub, Some(3), "not certain"),
        (".:53 {\n}\n", &fall_through(), None, "no server block has `kubernetes cluster.local`"),
        (
            ".:53 {\n  kubernetes cluster.local\n  forward svc.cluster.local 1.1.1.1\n}\n",
            &fall_through(),
            Some(3),
            "already",
        ),
        (
            "a {\n  kubernetes cluster.local\n}\nb {\n  kubernetes cluster.local\n}\n",
            &fall_through(),
            Some(5),
            "not certain",
        ),
        (".:53 { kubernetes cluster.local\n}\n", &fall_through(), Some(1), "does not begin its line"),
        (".:53 {\n  # gangplank coredns: begin\n}\n", &stub, Some(2), "without"),
        (".:53 {\n  # gangplank coredns: end\n}\n", &stub, Some(2), "without"),
        ("# gangplank coredns: begin\n.:53 {\n# gangplank coredns: end\n}\n", &stub, None, "would be invalid"),
    ] {
        let err = apply(text, plan).expect_err(text);
        assert!(err.line == line && err.reason.contains(part), "{text:?}: {err:?}");
    }
}

#[test]
fn markers_in_quotes_and_behind_words_are_none() {
    let text = ".:53 {\n    errors # gangplank coredns: begin\n    template IN A \"\n# gangplank coredns: begin\n\" {\n    }\n}\n";
    assert_eq!(remove(text).as_deref(), Ok(text));
}

#[test]
fn reload_is_found() {
    assert!(reads_changes(KUBEADM) && reads_changes(K3S));
    assert!(!reads_changes(".:53 {\n    errors\n}\n"));
}

/// A server block like those of clusters, with what an edit could stumble over.
fn server_block() -> impl Strategy<Value = String> {
    let zone =
        sample::select(vec![".", "cluster.local", "example.com", "prod.svc.cluster.local", "{$ZONE}", "tls://."]);
    let port = sample::select(vec![":53", "", ":5353"]);
    let plugin = sample::select(vec![
        "errors",
        "errors # to the log",
        "\tkubernetes cluster.local in-addr.arpa ip6.arpa",
        "kubernetes cluster.local {\n\tpods insecure\n    }",
        "kubernetes {$ZONE} cluster.local. in-addr.arpa {\n  # a comment }\n  fallthrough in-addr.arpa\n}",
        "kubernetes other.local {\n  fallthrough\n}",
        "forward . /etc/resolv.conf",
        "forward . 1.1.1.1 {\n        max_concurrent 1000 # many\n    }",
        "cache 30",
        "cache {\n    disable success example.com cluster.local\n  disable denial\n}",
        "cache 10 example.com",
        "cache 30 . # all {",
        "hosts {\n  10.0.0.1 \"a \\\" b\"\n  fallthrough\n }",
        "template IN A \"{\n\" {\n  answer \"# gangplank coredns: begin\"\n}",
        "bind 10.0.0.1 \"::1\"",
        "import custom/*.override",
        "reload 5s",
        "",
        "   ",
        "# gangplank coredns: was: errors",
    ]);
    let plugins = collection::vec((sample::select(vec!["", "    ", "\t"]), plugin), 0..8);
    (collection::vec((zone, port), 1..3), plugins).prop_map(|(keys, plugins)| {
        let keys: Vec<String> = keys.into_iter().map(|(zone, port)| format!("{zone}{port}")).collect();
        let body: String = plugins.into_iter().map(|(indent, plugin)| format!("{indent}{plugin}\n")).collect();
        format!("{} {{\n{body}}}\n", keys.join(", "))
    })
}

fn corefile_text() -> impl Strategy<Value = String> {
    let other = sample::select(vec!["# a comment", "", "import custom/*.server", "(snippet) {\n  errors\n}"]);
    let part = prop_oneof![3 => server_block(), 1 => other.prop_map(|text| format!("{text}\n"))];
    (collection::vec(part, 0..5), any::<bool>(), any::<bool>()).prop_map(|(parts, crlf, end)| {
        let text = parts.concat();
        let text = if crlf { text.replace('\n', "\r\n") } else { text };
        if end { text } else { text.trim_end().to_owned() }
    })
}

fn any_plan() -> impl Strategy<Value = Plan> {
    let namespaces = collection::vec("[a-z]{1,8}", 1..4);
    prop_oneof![
        namespaces.prop_map(|namespaces| plan(Wiring::StubDomain { namespaces })),
        any::<bool>().prop_map(|reverse| plan(Wiring::FallThrough { reverse })),
    ]
}

/// The text without marked lines, by lines alone, and with the lines that were replaced.
fn unmarked(text: &str) -> String {
    let (mut inside, mut result) = (false, String::new());
    for line in text.split_inclusive('\n') {
        let comment = line.trim_start();
        match comment.split_once("# gangplank coredns: ") {
            Some(("", rest)) if rest.starts_with("begin; ") => inside = true,
            Some(("", rest)) if inside && rest.starts_with("end") => {
                inside = false;
                if !line.ends_with('\n') {
                    result.pop();
                }
            }
            Some(("", rest)) if inside && rest.starts_with("was:") => result.push_str(&rest[4..]),
            _ if !inside => result.push_str(line),
            _ => {}
        }
    }
    result
}

/// Offsets of lines that are not between markers.
fn places(text: &str) -> Vec<usize> {
    let (mut inside, mut at, mut places) = (false, 0, Vec::new());
    for line in text.split_inclusive('\n') {
        if !inside {
            places.push(at);
        }
        inside = (inside || line.trim_start().starts_with("# gangplank coredns: begin; "))
            && !line.trim_start().starts_with("# gangplank coredns: end");
        at += line.len();
    }
    places
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn apply_then_remove_is_the_identity(text in corefile_text(), first in any_plan(), second in any_plan()) {
        prop_assert_eq!(remove(&text), Ok(text.clone()));
        if let Ok(edited) = apply(&text, &first) {
            prop_assert_eq!(remove(&edited), Ok(text.clone()));
            prop_assert_eq!(&unmarked(&edited), &text);
            prop_assert_eq!(apply(&edited, &first), Ok(edited.clone()));
            prop_assert_eq!(apply(&edited, &second), apply(&text, &second));
            prop_assert!(!wired(&edited).expect("it is valid").is_empty());
        }
    }

    #[test]
    fn edits_around_the_markers_survive(text in corefile_text(), plan in any_plan(), place in any::<sample::Index>()) {
        if let Ok(edited) = apply(&text, &plan) {
            let places = places(&edited);
            let at = places[place.index(places.len())];
            let (before, after) = edited.split_at(at);
            // A line within quotes would be a part of a word, which does no harm either.
            let by_hand = format!("{before}# by hand\n{after}");
            let expected = unmarked(&by_hand);
            prop_assert!(expected.contains("# by hand"));
            prop_assert_eq!(remove(&by_hand), Ok(expected));
        }
    }

    #[test]
    fn any_text_is_refused_or_restored(text in "([a-z#\"\\\\{} \n]|# gangplank coredns: (begin|end|was: a)\n|kubernetes cluster.local|\\.:53 \\{\n|\n\\}\n){0,40}", plan in any_plan()) {
        if let Ok(base) = remove(&text) && let Ok(edited) = apply(&text, &plan) {
            prop_assert_eq!(remove(&edited), Ok(base));
        }
    }
}

/// So that the properties above are not about refusals only.
#[test]
fn generated_corefiles_are_often_edited() {
    use proptest::{strategy::ValueTree as _, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let edited = (0..1000).filter(|_| {
        let text = corefile_text().new_tree(&mut runner).expect("a value").current();
        let plan = any_plan().new_tree(&mut runner).expect("a value").current();
        apply(&text, &plan).is_ok()
    });
    let edited = edited.count();
    assert!(edited > 150, "{edited} of 1000");
}
