//! Whether the process can serve DNS and accept registrations, and if not, why not.

use std::fmt::Write as _;

use serde::Serialize;

use super::Admin;
use crate::registry::Phase;

/// One condition of a readiness page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    /// Stable: `dns` or `registrations`.
    id: &'static str,
    ready: bool,
    /// The fault and its remedy; `None` if ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Check {
    fn new(id: &'static str, fault: Option<String>) -> Self {
        Self { id, ready: fault.is_none(), reason: fault }
    }
}

/// The content of a readiness page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Readiness {
    ready: bool,
    checks: Vec<Check>,
}

impl Readiness {
    /// Whether DNS answers from the whole store and is not about to stop.
    pub(super) fn of_dns(admin: &Admin) -> Self {
        Self::of(vec![dns(admin.zone.is_ready(), &admin.status.phase())])
    }

    /// Whether a registration would be accepted and served; equal to the status of the gRPC health service.
    pub(super) fn of_registrations(admin: &Admin) -> Self {
        let phase = admin.status.phase();
        Self::of(vec![dns(admin.zone.is_ready(), &phase), registrations(&phase)])
    }

    fn of(checks: Vec<Check>) -> Self {
        Self { ready: checks.iter().all(|check| check.ready), checks }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    /// `ready`, or one line for each failed check.
    pub(super) fn to_text(&self) -> String {
        if self.ready {
            return "ready\n".into();
        }
        let mut text = String::new();
        for Check { id, reason, .. } in &self.checks {
            if let Some(reason) = reason {
                writeln!(text, "not ready: {id}: {reason}").expect("a String takes everything");
            }
        }
        text
    }
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
    use super::*;

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
