//! Answers of reviews, remembered for a while, and one review at a time for each question.
//!
//! 1. An answer counts for [`FRESH`], whether yes or no. An error is never remembered.
//! 2. While Kubernetes cannot be asked, an answer that is older counts as long as [`ReviewLimits::stale`] says.
//! 3. Whoever asks what is being asked waits for that review. It ends when nobody waits any more.
//! 4. Everything is bounded: what is remembered, reviews under way, and those that wait. First reviews and repeated
//!    ones of what was a yes have their turns apart, so that strangers cannot keep those that are known from being
//!    confirmed. What makes room for others are refusals first.

use std::{
    fmt,
    future::Future,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};
use indexmap::{Equivalent, IndexMap};
use tokio::{sync::Semaphore, time::timeout};

use crate::{
    kubernetes::api::ReviewError,
    metrics::{GaugeGuard, IdentityMetrics, ReviewKind, ReviewResult},
};

/// How long an answer counts.
pub(super) const FRESH: Duration = Duration::from_secs(10);

/// How long a review may take with its wait for a turn.
pub(super) const MAX_WAIT: Duration = Duration::from_secs(5);

/// Limits of one cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReviewLimits {
    /// Answers that are remembered.
    pub(super) entries: usize,
    /// Reviews under way: first ones, and repeated ones of what was a yes; as many of each.
    pub(super) in_flight: usize,
    /// Reviews that wait for their turn or for an answer; one more is refused at once.
    pub(super) pending: u64,
    /// While Kubernetes cannot be asked, an answer counts for this long; [`FRESH`] at least.
    pub(super) stale: Duration,
    /// For how long after a yes the next review of the question is a repeated one; [`ReviewLimits::stale`] at least. The yes
    /// itself counts no longer for that.
    pub(super) known: Duration,
    /// How long a review may take with its wait for a turn.
    pub(super) wait: Duration,
}

/// What a review says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict<T> {
    Yes(T),
    No,
}

/// A verdict, and when it was asked for.
#[derive(Debug, Clone)]
pub(super) struct Reviewed<T> {
    pub(super) verdict: Verdict<T>,
    pub(super) at: Instant,
}

impl<T> Reviewed<T> {
    fn is_known(&self, limits: ReviewLimits, now: Instant) -> bool {
        matches!(self.verdict, Verdict::Yes(_)) && now.duration_since(self.at) < limits.known
    }
}

/// Why there is no verdict.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReviewed {
    /// Kubernetes did not answer, or has just failed to.
    #[error("Kubernetes cannot be asked now; try again")]
    Unavailable,
    /// Too many reviews wait.
    #[error("too much is being asked of Kubernetes; try again")]
    Overloaded,
}

impl From<ReviewError> for NotReviewed {
    fn from(_: ReviewError) -> Self {
        // The reason is logged where it happens; it may name what no client needs to know.
        Self::Unavailable
    }
}

type Review<T> = Shared<BoxFuture<'static, Result<Reviewed<T>, NotReviewed>>>;
type WeakReview<T> = WeakShared<BoxFuture<'static, Result<Reviewed<T>, NotReviewed>>>;

/// What is known of one question.
struct CacheEntry<T> {
    reviewed: Option<Reviewed<T>>,
    /// The review that is under way.
    pending: Option<WeakReview<T>>,
}

impl<T> CacheEntry<T> {
    /// Whether it was a yes that makes the next review a repeated one.
    fn is_known(&self, limits: ReviewLimits, now: Instant) -> bool {
        self.reviewed.as_ref().is_some_and(|reviewed| reviewed.is_known(limits, now))
    }

    /// Whether its answer is of any use.
    fn counts(&self, limits: ReviewLimits, now: Instant) -> bool {
        let is_young = |reviewed: &Reviewed<T>| now.duration_since(reviewed.at) < limits.stale;
        self.is_known(limits, now) || self.reviewed.as_ref().is_some_and(is_young)
    }

    fn is_pending(&self) -> bool {
        self.pending.as_ref().is_some_and(|pending| pending.upgrade().is_some())
    }
}

/// The answers to questions `K`.
pub(super) struct ReviewCache<K, T> {
    kind: ReviewKind,
    limits: ReviewLimits,
    entries: Mutex<IndexMap<K, CacheEntry<T>>>,
    first: Semaphore,
    repeated: Semaphore,
    metrics: Arc<IdentityMetrics>,
}

impl<K, T> fmt::Debug for ReviewCache<K, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReviewCache").field("kind", &self.kind).field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl<K, T> ReviewCache<K, T>
where
    K: Hash + Eq + Clone + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    pub(super) fn new(kind: ReviewKind, limits: ReviewLimits, metrics: Arc<IdentityMetrics>) -> Arc<Self> {
        let turns = || Semaphore::new(limits.in_flight);
        let (first, repeated) = (turns(), turns());
        Arc::new(Self { kind, limits, entries: Mutex::default(), first, repeated, metrics })
    }

    /// The answer, if it is not older than [`FRESH`]; than [`ReviewLimits::stale`] if `is_paused`.
    pub(super) fn known<Q>(&self, question: &Q, is_paused: bool, now: Instant) -> Option<Reviewed<T>>
    where
        Q: Hash + Equivalent<K> + ?Sized,
    {
        let reviewed = self.lock().get(question)?.reviewed.clone()?;
        let age = now.duration_since(reviewed.at);
        if age < FRESH {
            return Some(reviewed);
        }
        (is_paused && age < self.limits.stale).then(|| self.stale(reviewed))
    }

    /// Whether a review of the question would be a first one, or nobody asks it now.
    pub(super) fn is_new<Q>(&self, question: &Q, now: Instant) -> bool
    where
        Q: Hash + Equivalent<K> + ?Sized,
    {
        let entries = self.lock();
        !entries.get(question).is_some_and(|entry| entry.is_known(self.limits, now) || entry.is_pending())
    }

    /// The answer, if it is not older than `max_age`; else it is asked for by `ask`, which is told whether it is a first
    /// review.
    ///
    /// # Errors
    /// When Kubernetes cannot be asked, and no answer is young enough.
    pub(super) async fn review<A, F>(
        self: &Arc<Self>,
        question: K,
        max_age: Duration,
        now: Instant,
        ask: A,
    ) -> Result<Reviewed<T>, NotReviewed>
    where
        A: FnOnce(bool) -> F,
        F: Future<Output = Result<Verdict<T>, NotReviewed>> + Send + 'static,
    {
        let (review, known) = {
            let mut entries = self.lock();
            let entry = entries.get(&question);
            let known = entry.and_then(|entry| entry.reviewed.clone());
            if let Some(reviewed) = known.as_ref().filter(|reviewed| now.duration_since(reviewed.at) < max_age) {
                return Ok(reviewed.clone());
            }
            let pending = entry.and_then(|entry| entry.pending.as_ref()?.upgrade());
            let review = match pending {
                Some(review) => Ok(review),
                None => self.begin(&mut entries, question, known.as_ref(), now, ask),
            };
            (review, known)
        };
        let answered = match review {
            Ok(review) => review.await,
            Err(err) => Err(err),
        };
        answered.or_else(|err| {
            let counts = known.filter(|reviewed| now.duration_since(reviewed.at) < self.limits.stale);
            counts.map(|reviewed| self.stale(reviewed)).ok_or(err)
        })
    }

    fn begin<A, F>(
        self: &Arc<Self>,
        entries: &mut IndexMap<K, CacheEntry<T>>,
        question: K,
        known: Option<&Reviewed<T>>,
        now: Instant,
        ask: A,
    ) -> Result<Review<T>, NotReviewed>
    where
        A: FnOnce(bool) -> F,
        F: Future<Output = Result<Verdict<T>, NotReviewed>> + Send + 'static,
    {
        let pending = self.metrics.reviews_in_flight.at(self.kind);
        if pending.get() >= self.limits.pending {
            self.metrics.reviews.at((self.kind, ReviewResult::Overloaded)).inc();
            return Err(NotReviewed::Overloaded);
        }
        let counted = GaugeGuard::new(pending);
        let first = !known.is_some_and(|known| known.is_known(self.limits, now));
        let (cache, asked, of) = (Arc::clone(self), ask(first), question.clone());
        let review = async move {
            let turns = if first { &cache.first } else { &cache.repeated };
            let answered = timeout(cache.limits.wait, async {
                // An error means that the semaphore is closed, which nobody does.
                let _turn = turns.acquire().await;
                // As old as the question: what was true before it does not count.
                Ok(Reviewed { verdict: asked.await?, at: now })
            });
            let result = answered.await.unwrap_or(Err(NotReviewed::Unavailable));
            cache.end(&of, result.as_ref().ok());
            drop(counted);
            result
        };
        let review = review.boxed().shared();
        if entries.len() >= self.limits.entries && !entries.contains_key(&question) {
            evict(entries, self.limits, now);
        }
        let entry = entries.entry(question).or_insert(CacheEntry { reviewed: None, pending: None });
        entry.pending = review.downgrade();
        self.metrics.review_cache_entries.at(self.kind).set(entries.len() as u64);
        Ok(review)
    }

    /// Remembers an answer; of a review without one, nothing.
    fn end(&self, question: &K, reviewed: Option<&Reviewed<T>>) {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(question) else { return };
        entry.pending = None;
        if let Some(reviewed) = reviewed {
            entry.reviewed = Some(reviewed.clone());
        } else if entry.reviewed.is_none() {
            entries.swap_remove(question);
        }
        self.metrics.review_cache_entries.at(self.kind).set(entries.len() as u64);
    }

    fn stale(&self, reviewed: Reviewed<T>) -> Reviewed<T> {
        self.metrics.stale_decisions.inc();
        reviewed
    }

    fn lock(&self) -> MutexGuard<'_, IndexMap<K, CacheEntry<T>>> {
        // Nothing panics while it holds the lock.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes room: forgets what does not count any more, then refusals, which strangers can cause without end, and of the rest
/// the oldest quarter, so that the next time is far.
fn evict<K: Hash + Eq, T>(entries: &mut IndexMap<K, CacheEntry<T>>, limits: ReviewLimits, now: Instant) {
    entries.retain(|_, entry| entry.counts(limits, now) || entry.is_pending());
    let kept = limits.entries / 4 * 3;
    if entries.len() > kept {
        entries.retain(|_, entry| entry.is_known(limits, now) || entry.is_pending());
    }
    if entries.len() <= kept {
        return;
    }
    let mut ages: Vec<Duration> =
        entries.values().filter_map(|entry| Some(now.duration_since(entry.reviewed.as_ref()?.at))).collect();
    let surplus = (entries.len() - kept).min(ages.len());
    if surplus == 0 {
        return;
    }
    let (_, &mut oldest_kept, _) = ages.select_nth_unstable_by(surplus - 1, |one, other| other.cmp(one));
    entries.retain(|_, entry| {
        entry.reviewed.as_ref().is_none_or(|reviewed| now.duration_since(reviewed.at) < oldest_kept)
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::oneshot;

    use super::*;
    use crate::metrics::Metrics;

    const STALE: Duration = Duration::from_secs(300);

    /// A cache, and how often its questions were asked.
    struct TestCache {
        cache: Arc<ReviewCache<u32, u32>>,
        reviews: AtomicUsize,
        firsts: AtomicUsize,
        now: Mutex<Instant>,
    }

    impl TestCache {
        fn with(limits: ReviewLimits) -> Self {
            let cache = ReviewCache::new(ReviewKind::Access, limits, Arc::clone(&Metrics::new().identity));
            Self { cache, reviews: AtomicUsize::new(0), firsts: AtomicUsize::new(0), now: Mutex::new(Instant::now()) }
        }

        fn new() -> Self {
            Self::with(ReviewLimits {
                entries: 8,
                in_flight: 2,
                pending: 4,
                stale: STALE,
                known: STALE,
                wait: MAX_WAIT,
            })
        }

        fn now(&self) -> Instant {
            *self.now.lock().expect("nobody panics here")
        }

        fn advance(&self, by: Duration) {
            *self.now.lock().expect("nobody panics here") += by;
        }

        fn known(&self, question: u32, is_paused: bool) -> Option<Verdict<u32>> {
            self.cache.known(&question, is_paused, self.now()).map(|known| known.verdict)
        }

        async fn ask(
            &self,
            question: u32,
            max_age: Duration,
            answer: impl Future<Output = Result<Verdict<u32>, NotReviewed>> + Send + 'static,
        ) -> Result<Verdict<u32>, NotReviewed> {
            let ask = |first| {
                self.reviews.fetch_add(1, Ordering::SeqCst);
                self.firsts.fetch_add(usize::from(first), Ordering::SeqCst);
                answer
            };
            self.cache.review(question, max_age, self.now(), ask).await.map(|reviewed| reviewed.verdict)
        }

        async fn fresh(
            &self,
            question: u32,
            answer: Result<Verdict<u32>, NotReviewed>,
        ) -> Result<Verdict<u32>, NotReviewed> {
            self.ask(question, FRESH, async { answer }).await
        }

        /// How many reviews were begun, and how many of them were first ones.
        fn counts(&self) -> (usize, usize) {
            (self.reviews.load(Ordering::SeqCst), self.firsts.load(Ordering::SeqCst))
        }

        fn len(&self) -> usize {
            self.cache.lock().len()
        }
    }

    const YES: Result<Verdict<u32>, NotReviewed> = Ok(Verdict::Yes(1));
    const NO: Result<Verdict<u32>, NotReviewed> = Ok(Verdict::No);
    const AWAY: Result<Verdict<u32>, NotReviewed> = Err(NotReviewed::Unavailable);

    #[tokio::test]
    async fn answers_count_for_ten_seconds_each_way() {
        for (was, is) in [(YES, NO), (NO, YES)] {
            let asked = TestCache::new();
            assert_eq!(asked.fresh(1, was.clone()).await, was);
            asked.advance(FRESH - Duration::from_millis(1));
            assert_eq!(asked.fresh(1, is.clone()).await, was);
            assert_eq!(asked.known(1, false), was.ok());
            asked.advance(Duration::from_millis(1));
            assert!(asked.known(1, false).is_none());
            assert_eq!(asked.fresh(1, is.clone()).await, is);
            assert_eq!(asked.counts().0, 2);
        }
    }

    #[tokio::test]
    async fn errors_are_not_remembered() {
        let asked = TestCache::new();
        assert_eq!(asked.fresh(1, AWAY).await, AWAY);
        assert_eq!(asked.len(), 0);
        assert_eq!(asked.fresh(1, YES).await, YES);
        assert_eq!(asked.counts(), (2, 2));
    }

    #[tokio::test]
    async fn old_answer_holds_while_nobody_can_be_asked() {
        for was in [YES, NO] {
            let asked = TestCache::new();
            assert_eq!(asked.fresh(1, was.clone()).await, was);
            asked.advance(STALE - Duration::from_millis(1));
            assert_eq!(asked.fresh(1, AWAY).await, was);
            assert_eq!(asked.known(1, true), was.ok());
            assert!(asked.known(1, false).is_none(), "it can be asked");
            assert_eq!(asked.cache.metrics.stale_decisions.get(), 2);
            asked.advance(Duration::from_millis(1));
            assert_eq!(asked.fresh(1, AWAY).await, AWAY);
            assert!(asked.known(1, true).is_none());
            assert_eq!(asked.fresh(2, AWAY).await, AWAY, "never asked before");
        }
    }

    #[tokio::test]
    async fn one_review_of_a_question_at_a_time_and_it_outlives_who_began_it() {
        let asked = TestCache::new();
        let (answer, answered) = oneshot::channel();
        let answered = async { answered.await.expect("sent") };
        let mut first = Box::pin(asked.ask(1, FRESH, answered));
        let mut second = Box::pin(asked.ask(1, FRESH, async { NO }));
        assert!(first.as_mut().now_or_never().is_none() && second.as_mut().now_or_never().is_none());
        assert_eq!(asked.cache.metrics.reviews_in_flight.at(ReviewKind::Access).get(), 1);
        drop(first);
        answer.send(YES).expect("somebody waits");
        assert_eq!(second.await, YES);
        assert_eq!(asked.counts(), (1, 1));
    }

    #[tokio::test]
    async fn review_that_nobody_waits_for_ends() {
        let asked = TestCache::new();
        assert!(asked.ask(1, FRESH, std::future::pending()).now_or_never().is_none());
        assert_eq!(asked.cache.metrics.reviews_in_flight.at(ReviewKind::Access).get(), 0);
        assert_eq!(asked.fresh(1, YES).await, YES);
    }

    #[tokio::test]
    async fn review_without_an_answer_ends_as_unavailable() {
        let wait = Duration::from_millis(1);
        let asked =
            TestCache::with(ReviewLimits { entries: 8, in_flight: 2, pending: 4, stale: STALE, known: STALE, wait });
        assert_eq!(asked.ask(1, FRESH, std::future::pending()).await, AWAY);
    }

    #[tokio::test]
    async fn strangers_fill_their_own_turns_only() {
        let asked = TestCache::new();
        assert_eq!(asked.fresh(0, YES).await, YES);
        asked.advance(FRESH);
        // Two under way, one that waits.
        let mut strangers: Vec<_> = (1..=3).map(|n| Box::pin(asked.ask(n, FRESH, std::future::pending()))).collect();
        for stranger in &mut strangers {
            assert!(stranger.as_mut().now_or_never().is_none());
        }
        assert_eq!(asked.fresh(0, YES).await, YES, "what was a yes has turns of its own");
        assert_eq!(asked.counts(), (5, 4));
        let mut fourth = Box::pin(asked.ask(4, FRESH, std::future::pending()));
        assert!(fourth.as_mut().now_or_never().is_none());
        assert_eq!(asked.fresh(5, YES).await, Err(NotReviewed::Overloaded), "four pend already");
        let overloaded = asked.cache.metrics.reviews.at((ReviewKind::Access, ReviewResult::Overloaded)).get();
        assert_eq!(overloaded, 1);
    }

    #[tokio::test]
    async fn cache_forgets_the_oldest_when_it_is_full() {
        let asked = TestCache::new();
        for question in 0..8 {
            assert_eq!(asked.fresh(question, YES).await, YES);
            asked.advance(Duration::from_millis(1));
        }
        assert_eq!(asked.fresh(8, YES).await, YES);
        assert_eq!(asked.len(), 7);
        let known: Vec<_> = (0..=8).filter(|question| asked.known(*question, false).is_some()).collect();
        assert_eq!(known, [2, 3, 4, 5, 6, 7, 8]);
        asked.advance(STALE);
        // What does not count any more goes first.
        assert_eq!((asked.fresh(9, NO).await, asked.fresh(10, NO).await), (NO, NO));
        assert_eq!(asked.len(), 2);
        assert_eq!(asked.cache.metrics.review_cache_entries.at(ReviewKind::Access).get(), 2);
    }
}
