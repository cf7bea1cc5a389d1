//! Bearer tokens: Kubernetes says whose they are.
//!
//! A token is for gangplank only if it is for the audience [`AUDIENCE`]: one that a pod has for the API server is refused,
//! so that nobody who runs a gangplank gets tokens that are good elsewhere, and the other way round.

use std::{
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ring::hmac;
use tokio::time::{sleep, sleep_until};
use tracing::{debug, warn};

use super::{
    Identity, IdentitySource, RefusalLog, Unauthenticated, is_name, random,
    review_cache::{FRESH, MAX_WAIT, NotReviewed, ReviewCache, ReviewLimits, Reviewed, Verdict},
    shares::Shares,
};
use crate::{
    kubernetes::api::{ReviewedToken, Reviews},
    metrics::{IdentityMetrics, ReviewKind},
    net::{backoff::jittered, peer_group},
};

/// The audience of tokens for gangplank: `kubectl create token NAME --audience gangplank`.
const AUDIENCE: &str = "gangplank";

/// How RFC 6750 §2.1 writes it. The scheme's case does not matter (RFC 9110 §11.1).
const SCHEME: &str = "Bearer ";

/// Most groups of one user.
const MAX_GROUPS: usize = 256;

/// How often the token of an open stream is reviewed. The API server remembers a good token for 10 s, so that a stream
/// ends at most 14 s after its account was deleted.
const REVIEW_INTERVAL: Duration = Duration::from_secs(4);

/// When it is reviewed for the first time, at most, and again when Kubernetes could not be asked. Short calls are over
/// before.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// Tokens that are not known, of one address or one IPv6 /64, at once, and one more in each [`PEER_INTERVAL`]: a tenth of what is
/// reviewed for all addresses.
const PEER_BURST: u32 = 200;
const PEER_INTERVAL: Duration = Duration::from_millis(50);

/// A token that was good so long ago is no stranger's: its review does not wait for theirs.
const KNOWN: Duration = Duration::from_secs(60 * 60);

const LIMITS: ReviewLimits =
    ReviewLimits { entries: 16_384, in_flight: 64, pending: 4_096, stale: FRESH, known: KNOWN, wait: MAX_WAIT };

/// A token as a call shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct BearerToken(Arc<str>);

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerToken(..)")
    }
}

impl BearerToken {
    /// The token in the value of a header `authorization`.
    ///
    /// # Errors
    /// When the value is not `Bearer TOKEN`.
    pub fn parse(header: &[u8]) -> Result<Self, Unauthenticated> {
        let (scheme, token) = header.split_at_checked(SCHEME.len()).ok_or(Unauthenticated::NotBearer)?;
        let is_bearer = scheme.eq_ignore_ascii_case(SCHEME.as_bytes());
        // RFC 6750 §2.1: visible characters.
        match str::from_utf8(token) {
            Ok(token) if is_bearer && !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Ok(Self(token.into()))
            }
            _ => Err(Unauthenticated::NotBearer),
        }
    }
}

/// The name of a token in the cache: it says nothing of the token without the key, which no other process has.
type TokenHash = [u8; 32];

/// Reviews tokens.
pub(super) struct TokenReviews {
    reviews: Arc<Reviews>,
    key: hmac::Key,
    cache: Arc<ReviewCache<TokenHash, Arc<Identity>>>,
    /// Of the rate at which tokens that are not known are reviewed, by address.
    shares: Mutex<Shares<IpAddr>>,
    /// Open streams outlast their last review by this, while Kubernetes cannot be asked.
    stale: Duration,
    log: Arc<RefusalLog>,
}

impl fmt::Debug for TokenReviews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenReviews").field("cache", &self.cache).finish_non_exhaustive()
    }
}

impl TokenReviews {
    pub(super) fn new(
        reviews: Arc<Reviews>,
        stale: Duration,
        metrics: Arc<IdentityMetrics>,
        log: Arc<RefusalLog>,
    ) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &random::<32>());
        let shares = Mutex::new(Shares::new(PEER_BURST, PEER_INTERVAL));
        Self { reviews, key, cache: ReviewCache::new(ReviewKind::Token, LIMITS, metrics), shares, stale, log }
    }

    /// Whose token it is. A token that is not known waits until its peer may show another one.
    pub(super) async fn identity(&self, token: &BearerToken, peer: IpAddr) -> Result<Arc<Identity>, Unauthenticated> {
        if self.cache.is_new(&self.hash(token), Instant::now()) {
            let wait = {
                let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
                shares.reserve(peer_group(peer), MAX_WAIT, Instant::now())
            };
            sleep(wait.ok_or(NotReviewed::Overloaded)?).await;
        }
        match self.review(token, FRESH).await? {
            Reviewed { verdict: Verdict::Yes(identity), .. } => Ok(identity),
            Reviewed { verdict: Verdict::No, .. } => Err(Unauthenticated::Token),
        }
    }

    /// Ready when the token is not good any more, or is another user's, or nobody could say so for too long.
    pub(super) async fn end(&self, token: &BearerToken, identity: &Identity) -> Unauthenticated {
        let mut confirmed = Instant::now();
        // Not all at one moment, when a thousand streams begin at once.
        sleep(jittered(MIN_INTERVAL)).await;
        loop {
            match self.review(token, REVIEW_INTERVAL).await {
                Ok(Reviewed { verdict: Verdict::Yes(found), at }) if *found == *identity => {
                    confirmed = at;
                    sleep_until((at + REVIEW_INTERVAL).into()).await;
                }
                Ok(_) => return Unauthenticated::TokenEnded,
                Err(err) if confirmed.elapsed() >= self.stale => return Unauthenticated::Unreviewed(err),
                Err(_) => sleep(MIN_INTERVAL).await,
            }
        }
    }

    fn hash(&self, token: &BearerToken) -> TokenHash {
        let hash = hmac::sign(&self.key, token.0.as_bytes());
        TokenHash::try_from(hash.as_ref()).expect("HMAC-SHA256 has 32 bytes")
    }

    async fn review(&self, token: &BearerToken, max_age: Duration) -> Result<Reviewed<Arc<Identity>>, NotReviewed> {
        let ask = |first| {
            let (reviews, log, token) = (Arc::clone(&self.reviews), Arc::clone(&self.log), token.clone());
            async move {
                if reviews.is_paused(ReviewKind::Token) {
                    return Err(NotReviewed::Unavailable);
                }
                let reviewed = reviews.token(&token.0, AUDIENCE, first).await?;
                Ok(verdict(reviewed, &log))
            }
        };
        let reviewed = self.cache.review(self.hash(token), max_age, Instant::now(), ask).await;
        if let Err(err) = &reviewed {
            debug!(%err, "a token was not reviewed");
        }
        reviewed
    }
}

fn verdict(reviewed: ReviewedToken, log: &RefusalLog) -> Verdict<Arc<Identity>> {
    let refused = |user: &str, reason: &str| {
        // What the API server says is for the operator: who shows a bad token learns nothing.
        log.refused(|suppressed| warn!(user, reason, suppressed, "a token is refused"));
        Verdict::No
    };
    let (user, groups) = match reviewed {
        ReviewedToken::Authenticated { user, groups } => (user, groups),
        ReviewedToken::Refused(reason) => return refused("", &reason),
    };
    if !is_name(&user) || !groups.iter().all(|group| is_name(group)) {
        return refused("", "its user or a group has an invalid name");
    }
    if groups.len() > MAX_GROUPS {
        return refused(&user, "its user is in more than 256 groups");
    }
    let groups = groups.into_iter().map(String::into_boxed_str).collect();
    Verdict::Yes(Arc::new(Identity { user: user.into(), groups, source: IdentitySource::Token, expires: None }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_holds_one_bearer_token() {
        for good in ["Bearer abc.DEF-_~+/=", "bearer abc.DEF-_~+/=", "BEARER abc.DEF-_~+/="] {
            assert_eq!(BearerToken::parse(good.as_bytes()).expect(good).0.as_ref(), "abc.DEF-_~+/=");
        }
        for bad in ["", "Bearer", "Bearer ", "Bearer a b", "Basic dTpw", "abc", "Bearer a\n", "Bearer \u{e4}"] {
            assert_eq!(BearerToken::parse(bad.as_bytes()), Err(Unauthenticated::NotBearer), "{bad:?}");
        }
        assert_eq!(BearerToken::parse(b"Bearer \xff"), Err(Unauthenticated::NotBearer));
    }

    #[test]
    fn token_is_in_no_debug_output() {
        let token = BearerToken::parse(b"Bearer secret").expect("valid");
        assert!(!format!("{token:?}").contains("secret"));
    }

    #[test]
    fn user_that_logs_and_rules_cannot_hold_is_refused() {
        let log = RefusalLog::default();
        let of = |user: &str, groups: usize| {
            let groups = (0..groups).map(|n| format!("g{n}")).collect();
            verdict(ReviewedToken::Authenticated { user: user.into(), groups }, &log)
        };
        assert!(matches!(of("ada", MAX_GROUPS), Verdict::Yes(identity) if &*identity.user == "ada"));
        assert_eq!(of("ada", MAX_GROUPS + 1), Verdict::No);
        assert_eq!(of("", 0), Verdict::No);
        assert_eq!(of("a\nb", 0), Verdict::No);
        assert_eq!(verdict(ReviewedToken::Refused("expired".into()), &log), Verdict::No);
    }
}
