//! The comparison with the EndpointSlices at a take-over, on a thread beside the writer's.
//!
//! The comparison of a million instances takes a second. When the API server answers late, the
//! comparison begins while registrations arrive. So it runs on a thread of its own and reads the
//! catalog like any other reader. It sends its result through the writer's queue in parts, each after
//! the previous one is applied, so that a submission waits for one part at most.
//!
//! The catalog may change while it is read, so the comparison does not see a snapshot. The result is
//! correct nevertheless: instances are compared one by one, and the writer drops from the result the
//! instances that changed since the comparison began (`MirrorRecords::retain_current`). All other
//! instances are still as they were read.

use std::sync::Arc;

use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};
use tracing::{info, warn};

use super::{
    Catalog, KubernetesState, RefusedWord, WordRefusal, WriterMessage,
    cluster_facts::is_reserved,
    restore::{self, Comparison, LocalState, Stored},
};
use crate::{
    model::UnixMillis,
    store::{DirectoryTerm, Record},
};

/// Asks the writer for a comparison.
#[derive(Debug)]
pub(super) struct ComparisonRequest {
    pub(super) held: KubernetesState,
    /// The writer's own queue. The writer itself must not keep a sender: its queue would never close.
    pub(super) queue: mpsc::Sender<WriterMessage>,
    /// Receives the term under which the mirror writes slices from now on.
    pub(super) reply: oneshot::Sender<u64>,
}

/// A part of the result.
#[derive(Debug)]
pub(super) struct Differences {
    /// Of the comparison, from [`MirrorRecords`](super::mirror_records::MirrorRecords).
    pub(super) number: u64,
    pub(super) records: Vec<Record>,
    /// Whether Kubernetes has all of them.
    pub(super) mirrored: bool,
    /// Dropped without a message when the part could not be applied; then no other part may be sent.
    pub(super) applied: oneshot::Sender<()>,
}

/// The last message of a comparison.
#[derive(Debug)]
pub(super) struct End {
    /// As in [`Differences`].
    pub(super) number: u64,
    /// The new term, if it differs from the stored one.
    pub(super) new_term: Option<u64>,
    pub(super) term: u64,
    /// Registrations of the outbox that were too old to count.
    pub(super) refused: Vec<RefusedWord>,
    pub(super) reply: oneshot::Sender<u64>,
}

/// Compares in the background, and sends the result in messages of at most `max_records`.
pub(super) fn start(
    request: ComparisonRequest,
    (number, local): (u64, LocalState),
    catalog: Arc<Catalog>,
    max_records: usize,
    runtime: &Handle,
) {
    // The runtime joins this thread at its shutdown. The thread ends when the writer has ended.
    runtime.spawn_blocking(move || run(request, number, &local, &catalog, max_records));
}

fn run(request: ComparisonRequest, number: u64, local: &LocalState, catalog: &Catalog, max_records: usize) {
    let ComparisonRequest { mut held, queue, reply } = request;
    // Anyone with access to the API server can label a slice of a reserved service as managed by the mirror.
    held.services.retain(|(service, _)| !is_reserved(service));
    held.tombstones.retain(|(service, _)| !is_reserved(service));
    let services = held.services.len();
    let instances: usize = held.services.iter().map(|(_, instances)| instances.len()).sum();
    let stored = Stored { services: catalog.services(), tombstones: catalog.all_tombstones() };
    let Comparison { term, records, unmirrored, refused } = restore::compare(local, held, &stored, UnixMillis::now());
    for (service, instance) in &refused {
        warn!(
            %service, instance = %instance.id(), stamp = %instance.stamp(),
            "a registration that Kubernetes never had is too old to count, because its removal may have been forgotten: \
             it is dropped, and has to be registered again"
        );
    }
    info!(term, services, instances, changes = records.len() + unmirrored.len(), "compared with Kubernetes");
    // Apart, because they are journaled differently: the outbox must keep what Kubernetes lacks.
    for (mut records, mirrored) in [(records, true), (unmirrored, false)] {
        while !records.is_empty() {
            // From the end, which moves no other record.
            let part = records.split_off(records.len().saturating_sub(max_records));
            let (applied, is_applied) = oneshot::channel();
            let part = Differences { number, records: part, mirrored, applied };
            if queue.blocking_send(WriterMessage::Differences(part)).is_err() || is_applied.blocking_recv().is_err() {
                // The writer has ended, or has logged that it cannot write its journal.
                return;
            }
        }
    }
    let new_term = (DirectoryTerm::new(term) != local.term).then_some(term);
    // An error means that the writer has ended; then the caller does not wait for the term either.
    let refused = refused.into_iter().map(|(service, instance)| {
        let (id, reason) = (instance.id(), WordRefusal::TooOld);
        RefusedWord { service, id, reason }
    });
    let refused = refused.collect();
    let end = End { number, new_term, term, refused, reply };
    let _ = queue.blocking_send(WriterMessage::Compared(end));
}
