//! An Event on the Lease at every change of the writer, published by the new one.
//!
//! For people: nothing depends on it, and one that cannot be published is left out.

use std::{convert::Infallible, future, time::Duration};

use k8s_openapi::api::{coordination::v1::Lease, core::v1::ObjectReference};
use kube::{
    Api, Client, Resource as _,
    runtime::events::{Event, EventType, Recorder},
};
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::lease::NAME;
use crate::{
    model::ReplicaRole,
    registry::{Phase, Status},
};

/// How long one attempt may take.
const EVENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Attempts, and the pause between them.
const MAX_ATTEMPTS: usize = 3;
const ATTEMPT_BACKOFF: Duration = Duration::from_secs(2);

/// Publishes the Events of one process.
pub(in crate::kubernetes) struct WriterEvents {
    leases: Api<Lease>,
    recorder: Recorder,
    /// As the Lease names this process.
    me: String,
}

/// Who wrote before, as this process has seen it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Predecessor {
    name: String,
    term: u64,
}

impl WriterEvents {
    pub(in crate::kubernetes) fn new(client: Client, recorder: Recorder, namespace: String, me: String) -> Self {
        Self { leases: Api::namespaced(client, &namespace), recorder, me }
    }

    /// Publishes an Event whenever this process begins to write. Never ends.
    pub(in crate::kubernetes) async fn run(self, status: &Status) -> Infallible {
        let (mut phases, mut roles) = (status.watch(), status.replica().watch_role());
        let (mut predecessor, mut writes) = (None, false);
        loop {
            let role = *roles.borrow_and_update();
            if let Phase::Standby(holder) = &*phases.borrow_and_update()
                && role.role == ReplicaRole::Standby
                && !holder.name.is_empty()
                && holder.name != self.me
            {
                predecessor = Some(Predecessor { name: holder.name.clone(), term: role.term });
            }
            // Roles are reported again with each new term; only the step from another role is an Event.
            let begins = role.role == ReplicaRole::Writer && !writes;
            writes = role.role == ReplicaRole::Writer;
            if begins {
                self.publish(role.term, predecessor.take()).await;
            }
            tokio::select! {
                Ok(()) = phases.changed() => {}
                Ok(()) = roles.changed() => {}
                // The registry is gone: the process ends.
                else => return future::pending().await,
            }
        }
    }

    async fn publish(&self, term: u64, predecessor: Option<Predecessor>) {
        let note = note(&self.me, term, predecessor.as_ref());
        for _ in 0..MAX_ATTEMPTS {
            match timeout(EVENT_TIMEOUT, self.try_publish(&note)).await {
                Ok(Ok(())) => return,
                Ok(Err(err)) => debug!(%err, "the Event of the change of the writer was not published"),
                Err(_) => debug!("the Event of the change of the writer was not published in time"),
            }
            sleep(ATTEMPT_BACKOFF).await;
        }
    }

    async fn try_publish(&self, note: &str) -> kube::Result<()> {
        // With the uid: `kubectl describe` selects Events by it.
        let lease: ObjectReference = self.leases.get(NAME).await?.object_ref(&());
        let event = Event {
            type_: EventType::Normal,
            reason: "WriterChanged".into(),
            note: Some(note.into()),
            action: "TakeOver".into(),
            secondary: None,
        };
        self.recorder.publish(&event, &lease).await
    }
}

fn note(me: &str, term: u64, predecessor: Option<&Predecessor>) -> String {
    match predecessor {
        Some(Predecessor { name, term: before }) => {
            format!("{me} writes under term {term}; before, {name} wrote under term {before}")
        }
        None => format!("{me} writes under term {term}; it has seen no other writer"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_note_fits_into_an_event() {
        // events.k8s.io allows 1024 bytes; a host name has 64 at most, a directory id 32.
        let name = "h".repeat(64 + 1 + 32);
        let predecessor = Predecessor { name: name.clone(), term: u64::MAX };
        let note = note(&name, u64::MAX, Some(&predecessor));
        assert!(note.len() < 1024 && note.contains(&name), "{note}");
    }
}
