//! The lines themselves, with the comments that explain them: the same in what is printed and in what is applied.

use std::fmt::Write as _;

use super::{Plan, Wiring};

/// The reverse zones of IPv4 and IPv6.
pub(super) const REVERSE_ZONES: [&str; 2] = ["in-addr.arpa", "ip6.arpa"];

/// Indentation of one level where there is nothing to go by.
pub(super) const INDENT: &str = "    ";

/// A configuration of its own for a plan, to read and to copy from.
#[must_use]
pub fn corefile(plan: &Plan) -> String {
    let mut text = format!("# Made by: {}\n#\n", command(plan));
    match &plan.wiring {
        Wiring::StubDomain { namespaces } => {
            let zones = stub_zones(plan, namespaces);
            let keys: Vec<String> = zones.iter().map(|zone| format!("{zone}:53")).collect();
            push(&mut text, "", &stub_domain(&keys, &[], plan));
        }
        Wiring::FallThrough { reverse } => {
            let (zone, reverse_zones) = (plan.zone.as_str(), if *reverse { &REVERSE_ZONES[..] } else { &[] });
            let all: Vec<&str> = std::iter::once(zone).chain(reverse_zones.iter().copied()).collect();
            push(
                &mut text,
                "",
                &[
                    "# One server block for everything: gangplank is asked for the names that Kubernetes does not know.".into(),
                    "# Nothing is hidden. `gangplank coredns --apply` puts the same into the server block that you have;".into(),
                    "# by hand, take the three parts below.".into(),
                    ".:53 {".into(),
                    "    errors".into(),
                    format!("    kubernetes {zone} {} {{", REVERSE_ZONES.join(" ")),
                    "        pods insecure".into(),
                ],
            );
            push(&mut text, "        ", &fallthrough_property(&all));
            text.push_str("    }\n");
            push(&mut text, INDENT, &forwards(plan, reverse_zones));
            text.push_str("    forward . /etc/resolv.conf\n    cache 30 {\n");
            push(&mut text, "        ", &cache_properties(&[("success", vec![zone]), ("denial", vec![zone])]));
            text.push_str("    }\n}\n");
        }
    }
    text
}

/// The command that prints it.
fn command(plan: &Plan) -> String {
    let mut line = match &plan.wiring {
        Wiring::StubDomain { namespaces } => {
            format!("gangplank coredns --wiring stub-domain -n {}", namespaces.join(","))
        }
        Wiring::FallThrough { reverse } => {
            format!("gangplank coredns --wiring fall-through{}", if *reverse { "" } else { " --no-reverse" })
        }
    };
    if plan.zone.as_str() != "cluster.local" {
        write!(line, " --zone {}", plan.zone).expect("a String takes everything");
    }
    let servers: Vec<String> = plan.servers.iter().map(ToString::to_string).collect();
    line + " --server " + &servers.join(",")
}

/// Appends the lines, each behind `indent`.
pub(super) fn push(text: &mut String, indent: &str, lines: &[String]) {
    for line in lines {
        writeln!(text, "{indent}{line}").expect("a String takes everything");
    }
}

/// The zones of namespaces.
pub(super) fn stub_zones(plan: &Plan, namespaces: &[String]) -> Vec<String> {
    namespaces.iter().map(|namespace| format!("{namespace}.svc.{}", plan.zone)).collect()
}

/// The server block of a stub domain. `binds` are the `bind` lines of the block that it was part of.
pub(super) fn stub_domain(keys: &[String], binds: &[&str], plan: &Plan) -> Vec<String> {
    let mut lines: Vec<String> = [
        "# CoreDNS takes the server block with the longest match: every question below the names of this one",
        "# goes to gangplank, and no other. That hides the native Services of these namespaces; where pods and",
        "# outside services share a namespace, take --wiring fall-through. Reverse names are not asked for here.",
        "# There is no `cache` on purpose: it would hold every answer, `no such name` too, for 5 seconds or more.",
    ]
    .map(str::to_owned)
    .to_vec();
    lines.push(format!("{} {{", keys.join(" ")));
    lines.push("    errors".into());
    lines.extend(binds.iter().map(|bind| format!("    {bind}")));
    lines.push(format!("    forward . {}", servers(plan)));
    lines.push("}".into());
    lines
}

/// The property of the kubernetes plugin.
pub(super) fn fallthrough_property(zones: &[&str]) -> Vec<String> {
    vec![
        "# Names that do not exist are passed on, and nothing else: `fallthrough` is about NXDOMAIN. Of several".into(),
        "# such lines the last one counts.".into(),
        format!("fallthrough {}", zones.join(" ")),
    ]
}

/// The `forward` lines for the zone and the reverse zones.
pub(super) fn forwards(plan: &Plan, reverse_zones: &[&str]) -> Vec<String> {
    let mut lines = vec![
        "# What the kubernetes plugin passes on is asked of gangplank. Before the general `forward`, because the"
            .into(),
        "# first one that matches is asked.".into(),
        format!("forward {} {}", plan.zone, servers(plan)),
    ];
    if !reverse_zones.is_empty() {
        lines.push(
            "# Reverse names that gangplank does not know go on to the next `forward`. Without `next`, which CoreDNS"
                .into(),
        );
        lines.push("# has since 1.12, gangplank would take over all reverse DNS.".into());
    }
    for zone in reverse_zones {
        lines.push(format!("forward {zone} {} {{", servers(plan)));
        lines.push("    next NXDOMAIN REFUSED".into());
        lines.push("}".into());
    }
    lines
}

/// The properties of the cache plugin: for `success` and `denial`, which zones are left out.
pub(super) fn cache_properties(disabled: &[(&str, Vec<&str>)]) -> Vec<String> {
    let mut lines = vec![
        "# CoreDNS holds every answer for 5 seconds or more whatever its TTL, `no such name` too: a service would"
            .into(),
        "# be unknown for that time after its registration. Of several such lines the last one counts.".into(),
    ];
    lines.extend(disabled.iter().map(|(kind, zones)| format!("disable {kind} {}", zones.join(" "))));
    lines
}

fn servers(plan: &Plan) -> String {
    plan.servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}
