//! Faults: which requests they apply to, and how often.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use tokio::sync::watch;

use super::Call;
use crate::support::wait_until;

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The proxy answers with a Kubernetes Status of this code; the API server does not see the request.
    Answer {
        /// The status code, such as 409, 410, 429, 500, 503.
        code: u16,
        /// The header of that name, in seconds.
        retry_after: Option<u32>,
    },
    /// The proxy answers a watch: 200, one event ERROR with a Status of this code, the end.
    ErrorEvent(u16),
    /// The request is read and never answered or passed on. Lifting closes the connection.
    Hang,
    /// The request is passed on, its answer is not. Lifting closes the connection.
    HangAfter,
    /// The connection closes before the request is passed on.
    Drop,
    /// The request is passed on; then the connection closes without an answer.
    DropAfter,
    /// The rest of the answer is held back, and the connection stays open: a silent watch. Watches
    /// that run already stall too; lifting releases what was held back.
    Stall,
}

impl Fault {
    /// [`Fault::Answer`] with this code.
    pub(crate) fn answer(code: u16) -> Self {
        Self::Answer { code, retry_after: None }
    }

    /// Adds the header Retry-After to an answer.
    pub(crate) fn retry_after(self, seconds: u32) -> Self {
        match self {
            Self::Answer { code, .. } => Self::Answer { code, retry_after: Some(seconds) },
            other => panic!("only an answer can carry Retry-After, not {other:?}"),
        }
    }
}

type CallMatcher = Box<dyn Fn(&Call) -> bool + Send + Sync>;

/// A rule in force until [`InjectedFault::lift`]; dropping this does not lift it.
#[derive(Clone)]
pub(crate) struct InjectedFault {
    rule: Arc<FaultRule>,
    changed: watch::Sender<()>,
}

struct FaultRule {
    fault: Fault,
    matches: CallMatcher,
    most: usize,
    hits: AtomicUsize,
    lifted: AtomicBool,
}

impl InjectedFault {
    /// Ends the fault: requests pass, hanging ones are dropped, stalled answers continue.
    pub(crate) fn lift(&self) {
        self.rule.lifted.store(true, SeqCst);
        self.changed.send_replace(());
    }

    /// How many requests the fault has hit.
    pub(crate) fn hits(&self) -> usize {
        self.rule.hits.load(SeqCst)
    }

    /// Waits until the fault has hit this many requests.
    pub(crate) fn wait_hits(&self, times: usize) {
        wait_until(&format!("{times} requests are hit by {:?}", self.rule.fault), || {
            (self.hits() >= times).then_some(())
        });
    }

    pub(super) fn fault(&self) -> Fault {
        self.rule.fault
    }

    /// Waits for [`InjectedFault::lift`].
    pub(super) async fn lifted(&self) {
        // Fails only without a sender, which `self` holds.
        let _ = self.changed.subscribe().wait_for(|()| self.rule.lifted.load(SeqCst)).await;
    }
}

impl fmt::Debug for InjectedFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, {} hits", self.rule.fault, self.hits())
    }
}

impl FaultRule {
    /// Counts a hit, unless the limit is reached.
    fn hit(&self) -> bool {
        self.hits.fetch_update(SeqCst, SeqCst, |hits| (hits < self.most).then_some(hits + 1)).is_ok()
    }
}

/// All rules, oldest first.
#[derive(Default)]
pub(super) struct FaultRules {
    rules: Mutex<Vec<Arc<FaultRule>>>,
    changed: watch::Sender<()>,
}

impl FaultRules {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<FaultRule>>> {
        self.rules.lock().expect("a test's matcher does not panic")
    }

    pub(super) fn add(&self, fault: Fault, most: usize, matches: CallMatcher) -> InjectedFault {
        let rule = FaultRule { fault, matches, most, hits: 0.into(), lifted: false.into() };
        let rule = Arc::new(rule);
        self.lock().push(Arc::clone(&rule));
        InjectedFault { rule, changed: self.changed.clone() }
    }

    /// The rule that applies to a new request, if any; counts the hit.
    pub(super) fn apply(&self, call: &Call) -> Option<InjectedFault> {
        let rule = self.find(call, |rule| rule.fault != Fault::Stall && rule.hit())?;
        Some(InjectedFault { rule, changed: self.changed.clone() })
    }

    /// Waits while a rule stalls the answer to this request.
    pub(super) async fn flows(&self, call: &Call) {
        while let Some(rule) = self.find(call, |rule| rule.fault == Fault::Stall && rule.hit()) {
            InjectedFault { rule, changed: self.changed.clone() }.lifted().await;
        }
    }

    fn find(&self, call: &Call, holds: impl Fn(&FaultRule) -> bool) -> Option<Arc<FaultRule>> {
        let mut rules = self.lock();
        rules.retain(|rule| !rule.lifted.load(SeqCst));
        rules.iter().find(|rule| (rule.matches)(call) && holds(rule)).cloned()
    }
}
