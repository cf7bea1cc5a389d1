//! The comparison with what Kubernetes held at the start, beside the writer and not in its way.
//!
//! The comparison of a million instances takes a second, and a late API server has it begin while
//! registrations come in. So it runs on a thread of its own and reads the catalog like any other
//! reader. It sends its result through the writer's queue in parts, the next one when the last one
//! is applied. So a submission waits for one part at most.
//!
//! The catalog may change while it is read, and what is read is no snapshot. That does no harm: the
//! comparison is made instance by instance, and the writer drops the instances that changed since it
//! began from the result (`MirrorRecords::retain_current`). All others are as they were read.

use std::sync::Arc;

use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};
use tracing::info;

use super::{
    Catalog, KubernetesState, WriterMessage,
    cluster_facts::is_reserved,
    restore::{self, Comparison, LocalState},
};
use crate::store::Record;

/// What the writer is asked for.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) held: KubernetesState,
    /// The writer's own queue. The writer itself must not keep a sender: its queue would never end.
    pub(super) queue: mpsc::Sender<WriterMessage>,
    /// Gets the term under which slices are written from now on.
    pub(super) reply: oneshot::Sender<u64>,
}

/// A part of the result.
#[derive(Debug)]
pub(super) struct Differences {
    pub(super) records: Vec<Record>,
    /// Is dropped when the part could not be applied: then no other part may be.
    pub(super) applied: oneshot::Sender<()>,
}

/// The last message of a comparison.
#[derive(Debug)]
pub(super) struct End {
    /// The term from now on, if it is another than before.
    pub(super) new_term: Option<u64>,
    pub(super) term: u64,
    pub(super) reply: oneshot::Sender<u64>,
}

/// Compares in the background, and sends the result in messages of at most `max_records`.
pub(super) fn start(request: Request, local: LocalState, catalog: Arc<Catalog>, max_records: usize, runtime: &Handle) {
    // Joined by the runtime when it shuts down; it ends when the writer has gone.
    runtime.spawn_blocking(move || run(request, &local, &catalog, max_records));
}

fn run(request: Request, local: &LocalState, catalog: &Catalog, max_records: usize) {
    let Request { mut held, queue, reply } = request;
    // Reserved names are never ours, even if somebody wrote a slice with our label.
    held.services.retain(|(service, _)| !is_reserved(service));
    let services = held.services.len();
    let instances: usize = held.services.iter().map(|(_, instances)| instances.len()).sum();
    let Comparison { term, mut records } = restore::compare(local, held, &catalog.services());
    info!(term, services, instances, changes = records.len(), "compared with Kubernetes");
    while !records.is_empty() {
        let part = records.split_off(records.len().saturating_sub(max_records));
        let (applied, is_applied) = oneshot::channel();
        let sent = queue.blocking_send(WriterMessage::Differences(Differences { records: part, applied }));
        if sent.is_err() || is_applied.blocking_recv().is_err() {
            // The writer has gone or cannot write its journal; it has said so.
            return;
        }
    }
    let new_term = (term != local.term).then_some(term);
    // Without a writer nobody waits for the term either.
    let _ = queue.blocking_send(WriterMessage::Compared(End { new_term, term, reply }));
}
