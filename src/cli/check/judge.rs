//! From what is known to findings. Pure.

use std::time::{Duration, SystemTime};

use super::{
    certificates::{ca_certificate, machine_certificate, server_certificate},
    facts::{At, ComparedSeen, Fact, Facts, RightsSeen},
    finding::{CheckId, CheckResult, Finding},
    rights::Need,
};
use crate::model::{Replica, ReplicaRole};

/// How far two clocks may be apart. The API server's `Date` has whole seconds, and each answer takes a moment.
const MAX_CLOCK_OFFSET: Duration = Duration::from_millis(2_500);

/// Available part of a disk, and bytes, below both of which more space is needed soon, and now. Two million instances take
/// less than 1 GiB, twice while they are compacted.
const LOW_DISK: (f64, u64) = (0.1, 4 << 30);
const FULL_DISK: (f64, u64) = (0.01, 256 << 20);

/// How old the answers of a process on standby, or a Lease, may be: after 15 s another process takes the Lease.
const MAX_AGE_SECONDS: f64 = 15.0;

/// Age of a change that Kubernetes lacks from which on something is slow, and wrong.
const SLOW_MIRROR_SECONDS: f64 = 2.0;
const LATE_MIRROR_SECONDS: f64 = 10.0;

/// The findings of all checks but those of `--e2e`, in their order.
pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![
        server_reachable(facts),
        versions_equal(facts),
        process_ready(facts),
        store_writable(facts),
        store_space(facts),
        clock(facts),
        api_reachable(facts),
        writer(facts),
        replicas_equal(facts),
        mirror_lag(facts),
    ];
    findings.extend(facts.rights.iter().map(|seen| rights(facts, seen)));
    findings.extend([
        dns_answers(facts),
        coredns_wired(facts),
        zone(facts),
        answers_equal(facts),
        no_cache(facts),
        server_certificate(facts),
        ca_certificate(facts),
        machine_certificate(facts),
    ]);
    findings
}

/// The value, or the finding that there is none.
macro_rules! known {
    ($fact:expr, $id:expr, $expected:expr) => {
        match $fact {
            Fact::Known(known) => known,
            Fact::Failed(why) => return Finding::skipped($id, $expected, why.clone()),
            Fact::Skipped(why) => return Finding::skipped($id, $expected, why.clone()),
        }
    };
}

fn server_reachable(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::ServerReachable, "every server answers over gRPC");
    let fault =
        |observed: String, why: String| Finding::failed(id, expected, observed, why, "systemctl status gangplank");
    match &facts.replicas {
        Fact::Skipped(why) => Finding::skipped(id, expected, why.clone()),
        Fact::Failed(why) => fault("no answer".into(), why.clone()),
        Fact::Known(seen) if seen.failed.is_empty() => {
            Finding::passed(id, expected, format!("{} answered", servers(seen.replicas.len())))
        }
        Fact::Known(seen) => {
            let reasons: Vec<_> = seen.failed.iter().map(|one| format!("{}: {}", one.url, one.reason)).collect();
            let all = seen.failed.len() + seen.replicas.len();
            fault(format!("{} of {} did not answer", seen.failed.len(), servers(all)), reasons.join("; "))
        }
    }
}

fn servers(count: usize) -> String {
    if count == 1 { "1 server".into() } else { format!("{count} servers") }
}

fn versions_equal(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::VersionsEqual, "this program and every server have one version");
    let seen = known!(&facts.replicas, id, expected);
    if seen.replicas.is_empty() {
        return Finding::skipped(id, expected, "no server answered");
    }
    let own = env!("CARGO_PKG_VERSION");
    let others: Vec<_> = seen.replicas.iter().filter(|(_, replica)| replica.version != own).collect();
    if others.is_empty() {
        return Finding::passed(id, expected, own);
    }
    let others: Vec<_> = others.iter().map(|(url, replica)| format!("{url} has {}", replica.version)).collect();
    let cause = "an upgrade is not complete, or this program is an older one";
    Finding::failed(id, expected, format!("this is {own}; {}", others.join("; ")), cause, "gangplank replicas")
        .into_warning()
}

fn process_ready(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::ProcessReady, "it answers DNS, and takes registrations unless it is on standby");
    let url = &facts.admin_url;
    let fix = format!("curl {url}/readyz/registrations");
    let page = match &facts.readiness {
        Fact::Known(page) => page,
        Fact::Skipped(why) => return Finding::skipped(id, expected, why.clone()),
        Fact::Failed(why) => {
            let cause = "the process is away, or --admin names another place";
            return Finding::failed(id, expected, format!("{url}: {why}"), cause, "systemctl status gangplank");
        }
    };
    let on_standby = facts.status.known().is_some_and(|at| at.value.role == ReplicaRole::Standby.as_str());
    let faults = page.checks.iter().filter(|check| !(check.ready || on_standby && check.id == "registrations"));
    let faults: Vec<_> = faults.map(|check| check.reason.clone().unwrap_or_else(|| check.id.clone())).collect();
    if faults.is_empty() {
        return Finding::passed(id, expected, if on_standby { "ready, on standby" } else { "ready" });
    }
    Finding::failed(id, expected, "not ready", faults.join("; "), fix)
}

fn store_writable(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::StoreWritable, "registrations can be stored");
    let At { value, .. } = known!(&facts.status, id, expected);
    let directory = value.data_dir.display();
    match &value.storage_failed {
        None => Finding::passed(id, expected, directory.to_string()),
        Some(err) => {
            let cause = format!("the journal cannot be written: {err}; make room on the disk, then restart gangplank");
            let fix = format!("df -h {directory}");
            Finding::failed(id, expected, "nothing is accepted until a restart", cause, fix)
        }
    }
}

fn store_space(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::StoreSpace, "a tenth of the disk, or 4 GiB, is free");
    let At { value, .. } = known!(&facts.status, id, expected);
    let Some(disk) = value.disk.filter(|disk| disk.total_bytes > 0) else {
        return Finding::skipped(id, expected, "the system does not say how full the disk is");
    };
    #[expect(clippy::cast_precision_loss, reason = "a share, to whole percents")]
    let free = disk.available_bytes as f64 / disk.total_bytes as f64;
    let observed = format!("{:.0} % free, {} MiB", free * 100.0, disk.available_bytes >> 20);
    let below = |(part, bytes): (f64, u64)| free < part && disk.available_bytes < bytes;
    if !below(LOW_DISK) {
        return Finding::passed(id, expected, observed);
    }
    let directory = value.data_dir.display();
    let cause = format!("the disk of {directory} is nearly full; what cannot be stored is refused");
    let low = Finding::failed(id, expected, observed, cause, format!("df -h {directory}"));
    if below(FULL_DISK) { low } else { low.into_warning() }
}

fn clock(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::Clock, "the clocks of the server, the API server and this machine agree");
    let At { value, here } = known!(&facts.status, id, expected);
    let fix = "chronyc tracking";
    let server = SystemTime::UNIX_EPOCH + Duration::from_millis(value.now_millis);
    if !value.clock_agrees {
        let cause = "the server's clock is more than a second from the API server's, so it takes no registrations";
        return Finding::failed(id, expected, "the server's clock is wrong", cause, fix);
    }
    let from_server = apart(server, *here);
    let mut observed = format!("server {:.1} s from here", from_server.as_secs_f64());
    let mut wrong = from_server > MAX_CLOCK_OFFSET;
    if let Some(At { value: seen, here: then }) = facts.api.known()
        && let Some(date) = seen.date
    {
        // The API server's clock stood anywhere in that second.
        let from_api = apart(date + Duration::from_millis(500), *then);
        observed += &format!(", API server {:.1} s", from_api.as_secs_f64());
        wrong |= from_api > MAX_CLOCK_OFFSET;
    }
    if !wrong {
        return Finding::passed(id, expected, observed);
    }
    let cause = "one of the clocks is not synchronised: certificates and tokens may seem expired";
    Finding::failed(id, expected, observed, cause, fix).into_warning()
}

fn apart(one: SystemTime, other: SystemTime) -> Duration {
    one.duration_since(other).unwrap_or_else(|err| err.duration())
}

fn api_reachable(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::ApiReachable, "the API server answers");
    match &facts.api {
        Fact::Skipped(why) => Finding::skipped(id, expected, why.clone()),
        Fact::Known(At { value, .. }) => {
            Finding::passed(id, expected, format!("{} in {} ms", facts.api_url, value.took.as_millis()))
        }
        Fact::Failed(why) => {
            let cause = format!("{why}; names are answered as before, and new ones are not in Kubernetes");
            Finding::failed(
                id,
                expected,
                format!("{}: no answer", facts.api_url),
                cause,
                "kubectl get --raw /readyz?verbose",
            )
        }
    }
}

/// The replicas, if there are several by nature.
fn with_kubernetes(facts: &Facts) -> Result<&[(String, Replica)], String> {
    match &facts.replicas {
        Fact::Failed(why) | Fact::Skipped(why) => Err(why.clone()),
        Fact::Known(seen) if seen.replicas.is_empty() => Err("no server answered".into()),
        Fact::Known(seen) if seen.replicas.iter().all(|(_, replica)| replica.role == ReplicaRole::Alone) => {
            Err("the server runs without --kubernetes".into())
        }
        Fact::Known(seen) => Ok(&seen.replicas),
    }
}

fn writer(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::Writer, "one process writes, and renews the Lease");
    let replicas = match with_kubernetes(facts) {
        Ok(replicas) => replicas,
        Err(why) => return Finding::skipped(id, expected, why),
    };
    let fix = "kubectl get lease gangplank-writer -n gangplank -o yaml";
    let writers: Vec<_> = replicas.iter().map(|(_, one)| one).filter(|one| one.role == ReplicaRole::Writer).collect();
    match writers[..] {
        [] => {
            let cause = "nobody has the Lease, or its holder could not be asked: registrations get 503";
            Finding::failed(id, expected, format!("none of {}", servers(replicas.len())), cause, fix)
        }
        [one] if one.lease_age_seconds.is_some_and(|age| age > MAX_AGE_SECONDS) => {
            let age = one.lease_age_seconds.unwrap_or_default();
            let cause = "the writer cannot renew the Lease: it does not reach the API server";
            Finding::failed(id, expected, format!("{}, renewed {age:.0} s ago", one.name), cause, fix)
        }
        [one] => Finding::passed(id, expected, one.name.clone()),
        _ => {
            let names: Vec<_> = writers.iter().map(|one| one.name.as_str()).collect();
            let cause =
                "they write to different clusters or namespaces, or one has not noticed yet that it was replaced";
            Finding::failed(id, expected, names.join(", "), cause, "gangplank replicas -o wide")
        }
    }
}

fn replicas_equal(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::ReplicasEqual, "all replicas answer the same");
    let replicas = match with_kubernetes(facts) {
        Ok(replicas) => replicas,
        Err(why) => return Finding::skipped(id, expected, why),
    };
    if replicas.len() < 2 {
        return Finding::skipped(id, expected, "one replica was asked; name all of them by --server");
    }
    let fix = "gangplank replicas -o wide";
    let old = replicas
        .iter()
        .find(|(_, one)| one.role == ReplicaRole::Standby && one.age_seconds.is_none_or(|age| age > MAX_AGE_SECONDS));
    if let Some((url, one)) = old {
        let age = one.age_seconds.map_or_else(|| "not read yet".into(), |age| format!("{age:.0} s old"));
        let cause = "it does not reach the API server, or has just been started";
        return Finding::failed(id, expected, format!("{url}: its answers are {age}"), cause, fix);
    }
    let generations: Vec<_> = replicas.iter().map(|(_, one)| one.generation.to_string()).collect();
    if generations.windows(2).all(|pair| pair[0] == pair[1]) {
        return Finding::passed(id, expected, format!("{} at generation {}", servers(replicas.len()), generations[0]));
    }
    let cause = "a change is on its way, or the writer cannot write to Kubernetes";
    Finding::failed(id, expected, format!("generations {}", generations.join(", ")), cause, fix).into_warning()
}

fn mirror_lag(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::MirrorLag, "Kubernetes has every change within 2 s");
    let At { value, .. } = known!(&facts.status, id, expected);
    if value.kubernetes.is_none() {
        return Finding::skipped(id, expected, "the server runs without --kubernetes");
    }
    if value.role != ReplicaRole::Writer.as_str() {
        return Finding::skipped(id, expected, "the process at --admin does not write; ask the one that does");
    }
    let observed = format!("{} services behind, {:.1} s", value.services_behind, value.lag_seconds);
    let blocked: Vec<_> = value.services_blocked.iter().map(|(why, count)| format!("{why} {count}")).collect();
    if !blocked.is_empty() {
        let cause = format!("services that cannot be mirrored, by reason: {}", blocked.join(", "));
        let fix = "kubectl logs -n gangplank deployment/gangplank";
        return Finding::failed(id, expected, observed, cause, fix).into_warning();
    }
    if value.services_behind == 0 || value.lag_seconds <= SLOW_MIRROR_SECONDS {
        return Finding::passed(id, expected, observed);
    }
    let late = value.lag_seconds > LATE_MIRROR_SECONDS;
    let cause = "the API server is slow, away, or refuses what gangplank writes";
    let finding = Finding::failed(id, expected, observed, cause, "kubectl get --raw /readyz?verbose");
    if late { finding } else { finding.into_warning() }
}

fn rights(facts: &Facts, seen: &RightsSeen) -> Finding {
    let expected = "the account may do what the flags need";
    // Such as that the server runs without Kubernetes, whatever its flags.
    if let Fact::Skipped(why) = &seen.missing
        && !why.is_empty()
    {
        return Finding::skipped(seen.id, expected, why.clone());
    }
    match seen.need {
        Need::Flag(Some(false)) => return Finding::skipped(seen.id, expected, "no flag of the server needs it"),
        Need::Flag(None) => {
            return Finding::skipped(seen.id, expected, "whether a flag needs it is told by --admin");
        }
        Need::Always | Need::Flag(Some(true)) => {}
    }
    let missing = known!(&seen.missing, seen.id, expected);
    let user = &facts.user;
    if missing.is_empty() {
        return Finding::passed(seen.id, expected, user.clone());
    }
    let cause = format!("no role gives it: {}", missing.join(", "));
    Finding::failed(
        seen.id,
        expected,
        format!("{user}: {} missing", missing.len()),
        cause,
        "kubectl apply -k deploy/kustomize",
    )
}

fn dns_answers(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::DnsAnswers, "gangplank answers for its zone");
    let dns = &facts.dns;
    let seen = match &facts.direct {
        Fact::Known(seen) => seen,
        Fact::Failed(why) => {
            return Finding::failed(id, expected, dns.clone(), why.clone(), "gangplank check --dns ADDRESS:PORT");
        }
        Fact::Skipped(why) => return Finding::skipped(id, expected, why.clone()),
    };
    let (name, fix) = (&seen.name, format!("dig @{} {} SOA", host_of(dns), seen.name));
    match &seen.answer {
        Ok((rcode, 1..)) if rcode == "NOERROR" => Finding::passed(id, expected, format!("{dns}: {name} SOA")),
        Ok((rcode, records)) => {
            let cause = "it serves another zone, is still loading, or another program listens there";
            Finding::failed(id, expected, format!("{dns}: {name} SOA: {rcode}, {records} records"), cause, fix)
        }
        Err(why) => Finding::failed(id, expected, format!("{dns}: no answer"), why.clone(), fix),
    }
}

/// `ADDRESS -p PORT`, for dig.
fn host_of(dns: &str) -> String {
    dns.rsplit_once(':')
        .map_or_else(|| dns.into(), |(host, port)| format!("{} -p {port}", host.trim_matches(['[', ']'])))
}

fn coredns_wired(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::CorednsWired, "the Corefile forwards to gangplank");
    let configmap = &facts.configmap;
    let fix = "gangplank coredns --server ADDR:PORT --apply";
    match &facts.wired {
        Fact::Skipped(why) => Finding::skipped(id, expected, why.clone()),
        Fact::Failed(why) => {
            let fix = "gangplank check --configmap NAMESPACE/NAME";
            Finding::failed(id, expected, format!("{configmap} was not read"), why.clone(), fix).into_warning()
        }
        Fact::Known(wired) if wired.is_empty() => {
            let cause = "pods do not see what is registered, except services that Kubernetes has";
            Finding::failed(id, expected, format!("{configmap} does not"), cause, fix).into_warning()
        }
        Fact::Known(wired) => {
            let parts = if wired.len() == 1 { "1 zone".into() } else { format!("{} zones", wired.len()) };
            Finding::passed(id, expected, format!("{configmap}: {parts}"))
        }
    }
}

fn zone(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::Zone, "the server's zone is the cluster's");
    let seen = known!(&facts.control, id, expected);
    let name = &seen.name;
    let via = &facts.via;
    match &seen.answer {
        Ok((rcode, 1..)) if rcode == "NOERROR" => Finding::passed(id, expected, facts.zone.clone()),
        Ok((rcode, _)) => {
            let cause = format!(
                "the cluster's DNS does not know {name}, which each cluster has in its zone: gangplank needs --zone with the zone of the kubernetes plugin"
            );
            let fix = "kubectl get configmap coredns -n kube-system -o yaml";
            Finding::failed(id, expected, format!("{via}: {name}: {rcode}"), cause, fix)
        }
        Err(why) => {
            let fix = "kubectl get pods -n kube-system -l k8s-app=kube-dns";
            Finding::failed(id, expected, format!("{via}: no answer"), format!("CoreDNS does not answer: {why}"), fix)
        }
    }
}

fn compared(facts: &Facts) -> Result<&ComparedSeen, String> {
    match &facts.compared {
        Fact::Known(seen) => Ok(seen),
        Fact::Failed(why) | Fact::Skipped(why) => Err(why.clone()),
    }
}

fn answers_equal(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::AnswersEqual, "CoreDNS answers as gangplank does");
    let seen = match compared(facts) {
        Ok(seen) => seen,
        Err(why) => return Finding::skipped(id, expected, why),
    };
    let name = &seen.name;
    if seen.differences.is_empty() {
        return Finding::passed(id, expected, name.clone());
    }
    if facts.wired.known().is_some_and(Vec::is_empty) {
        return Finding::skipped(id, expected, "CoreDNS is not wired");
    }
    let cause = "CoreDNS does not reach gangplank, has not read its Corefile, or has a Service of this name";
    let fix = format!("gangplank resolve {} --via {}", name.trim_end_matches('.'), facts.via);
    Finding::failed(id, expected, format!("{name}: other {}", seen.differences.join(" and ")), cause, fix)
}

fn no_cache(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::NoCache, "no cache is between CoreDNS and gangplank");
    let seen = match compared(facts) {
        Ok(seen) => seen,
        Err(why) => return Finding::skipped(id, expected, why),
    };
    if seen.ttls.len() < 2 {
        return Finding::skipped(id, expected, "CoreDNS did not answer twice with records");
    }
    let falls = seen.ttls.windows(2).any(|pair| pair[1] < pair[0]);
    let ttls: Vec<_> = seen.ttls.iter().map(ToString::to_string).collect();
    if !falls && !seen.nsid_lost {
        return Finding::passed(id, expected, format!("TTL {}", ttls.join(", ")));
    }
    let how = if falls { format!("TTL falls: {}", ttls.join(", ")) } else { "the NSID is lost".into() };
    let cause = "the cache plugin keeps answers of the zone, so that changes are seen late";
    let fix = "gangplank coredns --server ADDR:PORT --apply";
    Finding::failed(id, expected, format!("{}: {how}", seen.name), cause, fix).into_warning()
}

/// The result of all: the worst.
pub(super) fn overall(findings: &[Finding]) -> CheckResult {
    let any = |result| findings.iter().any(|finding| finding.result == result);
    if any(CheckResult::Failed) {
        CheckResult::Failed
    } else if any(CheckResult::Warning) {
        CheckResult::Warning
    } else {
        CheckResult::Passed
    }
}
