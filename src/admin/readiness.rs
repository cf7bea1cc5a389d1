//! Whether the process can serve DNS and accept registrations, and if not, why not.

use std::{fmt::Write as _, time::Duration};

use serde::{Deserialize, Serialize};

use super::Admin;
use crate::registry::Phase;

/// One condition of a readiness page.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Stable: `dns` or `registrations`.
    pub id: String,
    /// Whether it holds.
    pub ready: bool,
    /// The fault and its remedy; `None` if ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// On standby, how old the answers may be, in seconds.
    #[serde(rename = "age_seconds", skip_serializing_if = "Option::is_none")]
    pub age: Option<f64>,
}

impl Check {
    fn new(id: &str, fault: Option<String>) -> Self {
        Self { id: id.to_owned(), ready: fault.is_none(), reason: fault, age: None }
    }
}

/// The content of a readiness page.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Readiness {
    /// Whether all conditions hold.
    pub ready: bool,
    /// The conditions.
    pub checks: Vec<Check>,
}

impl Readiness {
    /// Whether DNS answers from the whole store and is not about to stop.
    pub(super) fn of_dns(admin: &Admin) -> Self {
        Self::of(vec![of_dns(admin)])
    }

    /// Whether a registration would be accepted and served; equal to the status of the gRPC health service.
    pub(super) fn of_registrations(admin: &Admin) -> Self {
        Self::of(vec![of_dns(admin), registrations(&admin.status.phase())])
    }

    fn of(checks: Vec<Check>) -> Self {
        Self { ready: checks.iter().all(|check| check.ready), checks }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    /// `ready`, or one line for each failed check; on standby also how old the answers may be.
    pub(super) fn to_text(&self) -> String {
        let mut text = String::from(if self.ready { "ready\n" } else { "" });
        if let (true, Some(age)) = (self.ready, self.checks.iter().find_map(|check| check.age)) {
            writeln!(text, "on standby: as of {age:.1} s ago").expect("a String takes everything");
        }
        for Check { id, reason, .. } in &self.checks {
            if let Some(reason) = reason {
                writeln!(text, "not ready: {id}: {reason}").expect("a String takes everything");
            }
        }
        text
    }
}

fn of_dns(admin: &Admin) -> Check {
    let Admin { status, zone, max_staleness, .. } = admin;
    let check = dns(zone.is_ready(), &status.phase());
    if check.ready { standby(&status.phase(), status.staleness(), *max_staleness) } else { check }
}

/// The check of a process that is ready otherwise. `age` is `None` unless it is on standby.
fn standby(phase: &Phase, age: Option<Duration>, max_staleness: Option<Duration>) -> Check {
    // Without an age, before the first list, the check of DNS has failed already.
    let is_old = age.zip(max_staleness).is_some_and(|(age, limit)| age > limit);
    let writer = match phase {
        Phase::Standby(holder) if !holder.name.is_empty() => &*holder.name,
        _ => "the process that writes",
    };
    let fault = is_old.then(|| {
        let age = age.unwrap_or_default().as_secs_f64();
        format!(
            "on standby: what {writer} registered in the last {age:.1} s may be missing, because the API server does not \
             answer; the limit is --max-staleness. Names are answered as before"
        )
    });
    // To a tenth of a second: more digits would say that it is known more exactly.
    Check { age: age.map(|age| (age.as_secs_f64() * 10.0).round() / 10.0), ..Check::new("dns", fault) }
}

fn dns(loaded: bool, phase: &Phase) -> Check {
    let fault = if *phase == Phase::Draining {
        Some("shutting down: DNS answers until the drain time is over".into())
    } else if !loaded && *phase == Phase::Restoring {
        Some(
            "the EndpointSlices in Kubernetes are still being read: every name that is not known yet gets SERVFAIL until \
             then; the log has the reason if the API server does not answer"
                .into(),
        )
    } else if let (false, Phase::Standby(holder)) = (loaded, phase) {
        let name = &holder.name;
        Some(format!(
            "on standby: {name} has the Lease gangplank-writer, and its EndpointSlices are still being read: every name that \
             is not known yet gets SERVFAIL until then"
        ))
    } else if !loaded {
        Some("the store is still being loaded: every name that is not known yet gets SERVFAIL until then".into())
    } else {
        None
    };
    Check::new("dns", fault)
}

fn registrations(phase: &Phase) -> Check {
    let fault = match phase {
        Phase::Ready => None,
        Phase::Recovering => Some("the journal is still being read; the log has the progress".into()),
        Phase::Restoring => Some(
            "the EndpointSlices in Kubernetes are still being read; the log has the reason if the API server does not \
             answer"
                .into(),
        ),
        Phase::Standby(holder) => {
            Some(format!("on standby: {} has the Lease gangplank-writer{}", holder.name, holder.hint()))
        }
        Phase::StorageFailed(err) => Some(format!(
            "the journal cannot be written ({err}): nothing is accepted until a restart; fix the data directory's \
             disk, then restart gangplank"
        )),
        Phase::Draining => Some("shutting down".into()),
    };
    Check::new("registrations", fault)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::registry::LeaseHolder;

    #[test]
    fn failed_storage_makes_registrations_unready_and_not_dns() {
        let phase = Phase::StorageFailed("No space left on device".into());
        assert!(Readiness::of(vec![dns(true, &phase)]).is_ready());
        let both = Readiness::of(vec![dns(true, &phase), registrations(&phase)]);
        assert!(!both.is_ready());
        let text = both.to_text();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("not ready: registrations: the journal cannot be written (No space left on device)"));
        assert!(text.contains("restart"), "{text}");
    }

    #[test]
    fn process_on_standby_says_how_old_its_answers_may_be() {
        let phase = Phase::Standby(Arc::new(LeaseHolder { name: "vm-1_7".into(), addresses: Vec::new() }));
        let (age, limit) = (Duration::from_millis(5_120), Duration::from_secs(5));
        let page = |limit| Readiness::of(vec![standby(&phase, Some(age), limit)]);
        assert_eq!(page(None).to_text(), "ready\non standby: as of 5.1 s ago\n");
        assert!(page(Some(age)).is_ready(), "the limit itself is allowed");
        let old = page(Some(limit));
        assert!(!old.is_ready());
        let text = old.to_text();
        assert!(text.starts_with("not ready: dns: on standby: what vm-1_7 registered in the last 5.1 s"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert_eq!(serde_json::to_value(&old).expect("JSON")["checks"][0]["age_seconds"], 5.1);
        assert!(Readiness::of(vec![standby(&Phase::Ready, None, Some(limit))]).is_ready());
    }

    #[test]
    fn draining_server_is_unready_for_dns_and_registrations() {
        let both = Readiness::of(vec![dns(true, &Phase::Draining), registrations(&Phase::Draining)]);
        assert_eq!(both.to_text().lines().count(), 2);
        let shown = serde_json::to_value(&both).expect("JSON");
        assert_eq!(shown["ready"], false);
        assert_eq!(shown["checks"][1]["id"], "registrations");
        assert_eq!(shown["checks"][1]["reason"], "shutting down");
    }

    #[test]
    fn ready_page_has_no_reasons() {
        let both = Readiness::of(vec![dns(true, &Phase::Ready), registrations(&Phase::Ready)]);
        assert!(both.is_ready());
        assert_eq!(both.to_text(), "ready\n");
        let shown = serde_json::to_value(&both).expect("JSON");
        assert_eq!(shown["checks"][0], serde_json::json!({"id": "dns", "ready": true}));
    }
}
