//! Judging and rendering, without anything to ask.

use std::{collections::BTreeSet, fs};

use super::{
    facts::{At, ComparedSeen, Facts, ReplicasSeen, RightsSeen, ThroughSeen},
    finding::CheckId,
    judge::{judge, overall},
    rights::{Need, rights_needed},
    *,
};
use crate::{
    admin::client::{DiskSpace, KubernetesFlags, ProcessStatus, Readiness, ReadinessCheck},
    coredns::Wired,
    grpc::client::{Attempt, Validity},
    kubernetes::api::ApiServerSeen,
    model::{Replica, ReplicaRole, UnixMillis},
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn replica(name: &str, role: ReplicaRole) -> (String, Replica) {
    let replica = Replica {
        name: name.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        role,
        since: UnixMillis(0),
        term: 1,
        generation: 7,
        age_seconds: (role == ReplicaRole::Standby).then_some(0.5),
        lease_age_seconds: Some(0.5),
        services_behind: 0,
        outbox_words: 0,
        addresses: Vec::new(),
        writer: String::new(),
        writer_addresses: Vec::new(),
    };
    (format!("http://{name}:9080"), replica)
}

/// Everything is as it should be.
fn well() -> Facts {
    let valid = Validity { not_before: now() - DAY, not_after: now() + 30 * DAY };
    let flags = KubernetesFlags { own_ca: true, endpoints_object: true, ..KubernetesFlags::default() };
    let rights = rights_needed(Some(&flags)).into_iter();
    Facts {
        now: now(),
        replicas: Fact::Known(ReplicasSeen {
            replicas: vec![replica("a", ReplicaRole::Writer), replica("b", ReplicaRole::Standby)],
            failed: Vec::new(),
        }),
        admin_url: "http://127.0.0.1:9153".into(),
        readiness: Fact::Known(Readiness {
            ready: true,
            checks: ["dns", "registrations"]
                .map(|id| ReadinessCheck { id: id.into(), ready: true, reason: None, age: None })
                .into(),
        }),
        status: Fact::Known(At {
            value: ProcessStatus {
                version: env!("CARGO_PKG_VERSION").into(),
                zone: "cluster.local".into(),
                role: "writer".into(),
                now_millis: 1_800_000_000_000,
                clock_agrees: true,
                data_dir: "/data".into(),
                disk: Some(DiskSpace { available_bytes: 50 << 30, total_bytes: 100 << 30 }),
                kubernetes: Some(flags.clone()),
                ..ProcessStatus::default()
            },
            here: now(),
        }),
        api_url: "https://10.0.0.1:6443".into(),
        api: Fact::Known(At {
            value: ApiServerSeen { date: Some(now()), took: Duration::from_millis(3) },
            here: now(),
        }),
        user: DEFAULT_USER.into(),
        rights: rights.map(|one| RightsSeen { id: one.id, need: one.need, missing: Fact::Known(Vec::new()) }).collect(),
        configmap: "configmap kube-system/coredns".into(),
        wired: Fact::Known(vec![Wired::FallThrough("cluster.local".into())]),
        dns: "10.96.0.53:1053".into(),
        via: "10.96.0.10:53".into(),
        zone: "cluster.local".into(),
        direct: Fact::Known(ThroughSeen { name: "cluster.local".into(), answer: Ok(("NOERROR".into(), 1)) }),
        control: Fact::Known(ThroughSeen {
            name: "kubernetes.default.svc.cluster.local".into(),
            answer: Ok(("NOERROR".into(), 1)),
        }),
        compared: Fact::Known(ComparedSeen {
            name: "web.prod.svc.cluster.local.".into(),
            differences: Vec::new(),
            ttls: vec![5, 5, 5],
            nsid_lost: false,
        }),
        server_certificate: Fact::Known(("https://10.0.0.2:9080".into(), valid)),
        ca: Fact::Known(vec![valid]),
        machine_expires: Fact::Known(now() + DAY),
    }
}

/// The finding of this check after `spoil`; every other one is as before, except those of `also`.
fn spoiled(id: CheckId, also: &[CheckId], spoil: impl FnOnce(&mut Facts)) -> Finding {
    let mut facts = well();
    spoil(&mut facts);
    let findings = judge(&facts);
    for (before, after) in judge(&well()).iter().zip(&findings) {
        assert!(after.id == id || also.contains(&after.id) || before == after, "{id:?}: {after:?}");
    }
    findings.into_iter().find(|finding| finding.id == id).expect("each check has a finding")
}

fn assert_fault(id: CheckId, result: CheckResult, spoil: impl FnOnce(&mut Facts)) {
    assert_faults(id, &[], result, spoil);
}

fn assert_faults(id: CheckId, also: &[CheckId], result: CheckResult, spoil: impl FnOnce(&mut Facts)) {
    let finding = spoiled(id, also, spoil);
    assert_eq!(finding.result, result, "{finding:?}");
    let cause = finding.cause.as_deref().unwrap_or_default();
    assert!(!cause.is_empty(), "{finding:?}");
    let fix = finding.fix.as_deref().expect("a fault has a fix");
    let programs = ["gangplank ", "kubectl ", "curl ", "df ", "dig ", "systemctl ", "chronyc "];
    assert!(programs.iter().any(|program| fix.starts_with(program)), "{fix}");
    assert!(!fix.contains("; "), "one command: {fix}");
}

fn status(facts: &mut Facts) -> &mut ProcessStatus {
    match &mut facts.status {
        Fact::Known(at) => &mut at.value,
        other => panic!("{other:?}"),
    }
}

fn replicas(facts: &mut Facts) -> &mut ReplicasSeen {
    match &mut facts.replicas {
        Fact::Known(seen) => seen,
        other => panic!("{other:?}"),
    }
}

fn compared(facts: &mut Facts) -> &mut ComparedSeen {
    match &mut facts.compared {
        Fact::Known(seen) => seen,
        other => panic!("{other:?}"),
    }
}

#[test]
fn nothing_is_found_where_all_is_well() {
    let findings = judge(&well());
    assert!(findings.iter().all(|finding| finding.result == CheckResult::Passed), "{findings:#?}");
    let judged: BTreeSet<&str> = findings.iter().map(|finding| finding.id.as_str()).collect();
    let all = CheckId::ALL.iter().filter(|id| id.category() != finding::Category::E2e);
    assert_eq!(judged, all.map(|id| id.as_str()).collect());
}

#[test]
fn faults_of_the_process_are_found() {
    assert_fault(CheckId::ServerReachable, CheckResult::Failed, |facts| {
        replicas(facts).failed.push(Attempt { url: "http://c:9080".into(), reason: "connection refused".into() });
    });
    assert_fault(CheckId::VersionsEqual, CheckResult::Warning, |facts| {
        replicas(facts).replicas[0].1.version = "9.9.9".into();
    });
    assert_fault(CheckId::ProcessReady, CheckResult::Failed, |facts| {
        facts.readiness = Fact::Failed("connection refused".into());
    });
    assert_fault(CheckId::ProcessReady, CheckResult::Failed, |facts| {
        let Fact::Known(page) = &mut facts.readiness else { panic!() };
        page.checks[1] = ReadinessCheck {
            id: "registrations".into(),
            ready: false,
            reason: Some("the journal cannot be written".into()),
            age: None,
        };
    });
    assert_fault(CheckId::StoreWritable, CheckResult::Failed, |facts| {
        status(facts).storage_failed = Some("No space left on device".into());
    });
    let disk = |available_bytes| Some(DiskSpace { available_bytes, total_bytes: 1000 });
    assert_fault(CheckId::StoreSpace, CheckResult::Warning, |facts| status(facts).disk = disk(99));
    assert_fault(CheckId::StoreSpace, CheckResult::Failed, |facts| status(facts).disk = disk(9));
    assert_fault(CheckId::Clock, CheckResult::Failed, |facts| status(facts).clock_agrees = false);
    assert_fault(CheckId::Clock, CheckResult::Warning, |facts| status(facts).now_millis += 3_000);
    assert_fault(CheckId::Clock, CheckResult::Warning, |facts| {
        let Fact::Known(at) = &mut facts.api else { panic!() };
        at.value.date = Some(now() - Duration::from_secs(60));
    });
}

#[test]
fn standby_need_not_take_registrations() {
    let finding = spoiled(CheckId::ProcessReady, &[CheckId::MirrorLag], |facts| {
        status(facts).role = "standby".into();
        let Fact::Known(page) = &mut facts.readiness else { panic!() };
        page.checks[1].ready = false;
    });
    assert_eq!(finding.result, CheckResult::Passed, "{finding:?}");
}

#[test]
fn faults_of_kubernetes_are_found() {
    assert_faults(CheckId::ApiReachable, &[CheckId::Clock], CheckResult::Failed, |facts| {
        facts.api = Fact::Failed("connection refused".into());
    });
    let roles = |facts: &mut Facts, roles: [ReplicaRole; 2]| {
        for ((_, replica), role) in replicas(facts).replicas.iter_mut().zip(roles) {
            replica.role = role;
            replica.age_seconds = Some(0.5);
        }
    };
    assert_fault(CheckId::Writer, CheckResult::Failed, |facts| roles(facts, [ReplicaRole::Standby; 2]));
    assert_fault(CheckId::Writer, CheckResult::Failed, |facts| roles(facts, [ReplicaRole::Writer; 2]));
    assert_fault(CheckId::Writer, CheckResult::Failed, |facts| {
        replicas(facts).replicas[0].1.lease_age_seconds = Some(20.0);
    });
    assert_fault(CheckId::ReplicasEqual, CheckResult::Warning, |facts| replicas(facts).replicas[1].1.generation = 6);
    assert_fault(CheckId::ReplicasEqual, CheckResult::Failed, |facts| {
        replicas(facts).replicas[1].1.age_seconds = Some(16.0);
    });
    let lag = |facts: &mut Facts, seconds| (status(facts).services_behind, status(facts).lag_seconds) = (1, seconds);
    assert_fault(CheckId::MirrorLag, CheckResult::Warning, |facts| lag(facts, 3.0));
    assert_fault(CheckId::MirrorLag, CheckResult::Failed, |facts| lag(facts, 11.0));
    assert_fault(CheckId::MirrorLag, CheckResult::Warning, |facts| {
        status(facts).services_blocked = vec![("forbidden".into(), 1)];
    });
    assert_fault(CheckId::RightsEndpointslices, CheckResult::Failed, |facts| {
        let seen = facts.rights.iter_mut().find(|seen| seen.id == CheckId::RightsEndpointslices);
        seen.expect("it is needed").missing = Fact::Known(vec!["create endpointslices".into()]);
    });
}

#[test]
fn right_that_no_flag_needs_is_skipped() {
    for need in [Need::Flag(Some(false)), Need::Flag(None)] {
        let finding = spoiled(CheckId::RightsSecrets, &[], |facts| {
            let seen = facts.rights.iter_mut().find(|seen| seen.id == CheckId::RightsSecrets).expect("it is there");
            (seen.need, seen.missing) = (need, Fact::Known(vec!["get secrets".into()]));
        });
        assert_eq!(finding.result, CheckResult::Skipped, "{finding:?}");
        assert!(finding.reason.is_some_and(|reason| !reason.is_empty()));
    }
}

#[test]
fn faults_of_dns_are_found() {
    assert_fault(CheckId::DnsAnswers, CheckResult::Failed, |facts| facts.direct = Fact::Failed("refused".into()));
    assert_fault(CheckId::DnsAnswers, CheckResult::Failed, |facts| {
        facts.direct = Fact::Known(ThroughSeen { name: "x".into(), answer: Ok(("REFUSED".into(), 0)) });
    });
    assert_fault(CheckId::CorednsWired, CheckResult::Warning, |facts| facts.wired = Fact::Known(Vec::new()));
    assert_fault(CheckId::CorednsWired, CheckResult::Warning, |facts| facts.wired = Fact::Failed("forbidden".into()));
    let control = |answer| Fact::Known(ThroughSeen { name: "kubernetes.default.svc.other".into(), answer });
    assert_fault(CheckId::Zone, CheckResult::Failed, |facts| facts.control = control(Ok(("NXDOMAIN".into(), 0))));
    assert_fault(CheckId::Zone, CheckResult::Failed, |facts| facts.control = control(Err("timeout".into())));
    assert_fault(CheckId::AnswersEqual, CheckResult::Failed, |facts| compared(facts).differences = vec!["records"]);
    assert_fault(CheckId::NoCache, CheckResult::Warning, |facts| compared(facts).ttls = vec![5, 4, 3]);
    assert_fault(CheckId::NoCache, CheckResult::Warning, |facts| compared(facts).nsid_lost = true);
}

#[test]
fn coredns_that_is_not_wired_may_answer_otherwise() {
    let finding = spoiled(CheckId::AnswersEqual, &[CheckId::CorednsWired], |facts| {
        facts.wired = Fact::Known(Vec::new());
        compared(facts).differences = vec!["records"];
    });
    assert_eq!(finding.result, CheckResult::Skipped, "{finding:?}");
}

#[test]
fn certificates_are_watched() {
    let server = |facts: &mut Facts, left: i64| {
        let Fact::Known((_, validity)) = &mut facts.server_certificate else { panic!() };
        let by = Duration::from_secs(left.unsigned_abs());
        validity.not_after = if left < 0 { now() - by } else { now() + by };
    };
    assert_fault(CheckId::ServerCertificate, CheckResult::Failed, |facts| server(facts, -1));
    assert_fault(CheckId::ServerCertificate, CheckResult::Warning, |facts| server(facts, 60 * 60));
    assert_fault(CheckId::ServerCertificate, CheckResult::Failed, |facts| {
        let Fact::Known((_, validity)) = &mut facts.server_certificate else { panic!() };
        validity.not_before = now() + DAY;
    });
    assert_fault(CheckId::CaCertificate, CheckResult::Failed, |facts| {
        facts.ca = Fact::Known(vec![Validity { not_before: now() - 2 * DAY, not_after: now() - DAY }]);
    });
    assert_fault(CheckId::MachineCertificate, CheckResult::Failed, |facts| {
        facts.machine_expires = Fact::Known(now() - DAY);
    });
    assert_fault(CheckId::MachineCertificate, CheckResult::Warning, |facts| {
        facts.machine_expires = Fact::Known(now() + Duration::from_secs(60));
    });
}

#[test]
fn nothing_known_is_nothing_passed() {
    let mut facts = well();
    let none = || "nothing was given".to_owned();
    facts.replicas = Fact::Skipped(none());
    facts.readiness = Fact::Skipped(none());
    facts.status = Fact::Skipped(none());
    facts.api = Fact::Skipped(none());
    facts.rights.iter_mut().for_each(|seen| seen.missing = Fact::Skipped(none()));
    facts.wired = Fact::Skipped(none());
    facts.direct = Fact::Skipped(none());
    facts.control = Fact::Skipped(none());
    facts.compared = Fact::Skipped(none());
    facts.server_certificate = Fact::Skipped(none());
    facts.ca = Fact::Skipped(none());
    facts.machine_expires = Fact::Skipped(none());
    for finding in judge(&facts) {
        assert_eq!(finding.result, CheckResult::Skipped, "{finding:?}");
        assert_eq!((finding.reason.as_deref(), &finding.observed), (Some("nothing was given"), &None));
    }
}

#[test]
fn text_shows_categories_marks_cause_fix_and_heading() {
    let mut facts = well();
    status(&mut facts).storage_failed = Some("No space left on device".into());
    facts.wired = Fact::Known(Vec::new());
    facts.ca = Fact::Skipped("no CA is configured".into());
    let findings = judge(&facts);
    assert_eq!(overall(&findings), CheckResult::Failed);
    let text = render::text(&findings, false, false);
    assert!(text.starts_with("process\n√ server-reachable      2 servers answered\n"), "{text}");
    let expected = "× store-writable        nothing is accepted until a restart\n    cause  the journal cannot be written: No space \
                    left on device; make room on the disk, then restart gangplank\n    fix    df -h /data\n    see    \
                    docs/troubleshooting.md#store-writable\n";
    assert!(text.contains(expected), "{text}");
    assert!(text.contains("\ndns\n√ dns-answers") && text.contains("\n‼ coredns-wired "), "{text}");
    assert!(text.contains("- ca-certificate        skipped: no CA is configured\n"), "{text}");
    assert!(text.ends_with(" passed, 1 warnings, 1 failed, 1 skipped\n") && !text.contains('\x1b'), "{text}");
    let short = render::text(&findings, true, true);
    assert!(short.starts_with("\x1b[31m×\x1b[0m store-writable") && !short.contains('√'), "{short}");
    assert_eq!(short.matches("    fix ").count(), 2, "{short}");
}

#[test]
fn waiting_tells_each_fault_once_until_it_has_passed() {
    let mut failing = BTreeSet::new();
    let mut facts = well();
    facts.api = Fact::Failed("connection refused".into());
    let said = news(&mut failing, &judge(&facts), now());
    let [line] = &said[..] else { panic!("{said:?}") };
    assert!(line.starts_with("× api-reachable failing since 2027-01-15T08:00:00Z: "), "{line}");
    assert!(news(&mut failing, &judge(&facts), now() + DAY).is_empty());
    assert_eq!(news(&mut failing, &judge(&well()), now()), ["√ api-reachable"]);
}

#[test]
fn admin_listener_is_http_here_and_https_elsewhere() {
    let url = |text: &str| admin_url(text).map(|url| url.to_string());
    assert_eq!(url("127.0.0.1:9153"), Ok("http://127.0.0.1:9153/".into()));
    assert_eq!(url("[::1]:9153"), Ok("http://[::1]:9153/".into()));
    assert_eq!(url("gangplank.example.com:9153"), Ok("https://gangplank.example.com:9153/".into()));
    assert_eq!(url("http://10.0.0.1:9153"), Ok("http://10.0.0.1:9153/".into()));
    for bad in ["", "127.0.0.1", "ftp://a:1", "http://:9153", "a b:1"] {
        assert!(url(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn page_has_a_heading_for_each_check_and_no_other() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/troubleshooting.md");
    let page = fs::read_to_string(path).expect("it is there");
    let headings: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    let ids: Vec<&str> = CheckId::ALL.iter().map(|id| id.as_str()).collect();
    assert_eq!(headings, ids);
}
