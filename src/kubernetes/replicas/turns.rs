//! What the task that holds the Lease and the task that writes say to each other.

use tokio::sync::{mpsc, oneshot};

use crate::{kubernetes::api::Fence, registry::LeaseHolder, replicas::election::Tenure};

/// What the task that writes has to do next.
#[derive(Debug)]
pub(in crate::kubernetes) enum Turn {
    /// This process has taken the Lease. The second value is the highest term that a slice can have.
    TakeOver(Tenure, u64),
    /// This process goes on to write, under this term.
    Rewrite(u64),
    /// This process does not hold the Lease any more.
    StandDown {
        /// Who does, as far as is known.
        holder: LeaseHolder,
        /// Whether another process certainly writes, or wrote.
        outranked: bool,
    },
}

/// What the task that takes over says to the elector.
#[derive(Debug)]
pub(super) enum Message {
    /// Slices and store are compared, and the result is in the journal.
    TakenOver(oneshot::Sender<()>),
    /// A slice has this term, which is no lower than that of the take-over, or higher than that of this process, which writes.
    Outranked(u64),
}

/// The side of the task that writes.
#[derive(Debug)]
pub(in crate::kubernetes) struct ReplicaHandle {
    /// Each turn replaces what was to do before.
    pub(in crate::kubernetes) turns: mpsc::Receiver<Turn>,
    pub(in crate::kubernetes) elector: ElectorHandle,
    pub(in crate::kubernetes) fence: Fence,
}

/// Tells the elector how a take-over ended.
#[derive(Debug)]
pub(in crate::kubernetes) struct ElectorHandle(pub(super) mpsc::Sender<Message>);

impl ElectorHandle {
    /// The take-over is done. Returns false if the Lease is not held any more; another turn follows then.
    pub(in crate::kubernetes) async fn taken_over(&self) -> bool {
        let (reply, kept) = oneshot::channel();
        self.0.send(Message::TakenOver(reply)).await.is_ok() && kept.await.is_ok()
    }

    /// A slice has this term: a take-over with a higher one follows, or this process writes no more.
    pub(in crate::kubernetes) async fn outranked(&self, term: u64) {
        // The elector may have ended.
        let _ = self.0.send(Message::Outranked(term)).await;
    }
}
