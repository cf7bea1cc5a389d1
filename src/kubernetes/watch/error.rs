//! Why a list or watch ended, and when it is tried again.

use std::time::Duration;

use kube::core::Status;

use crate::{
    kubernetes::api::DEFAULT_RETRY_AFTER,
    metrics::RestartReason,
    net::backoff::{doubled, jittered},
};

/// Backoff after the first failure; it doubles with each further one in a row.
pub(super) const MIN_BACKOFF: Duration = Duration::from_millis(250);

/// Longest backoff.
pub(super) const MAX_BACKOFF: Duration = Duration::from_secs(15);

/// Longest backoff where a right is missing: a person has to grant it. The first ones are as short
/// as others, because an API server that has just started knows nobody's rights for a moment.
pub(super) const MAX_FORBIDDEN_BACKOFF: Duration = Duration::from_secs(30);

/// Longest Retry-After that is honoured.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Why a list or watch ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum WatchError {
    #[error(transparent)]
    Kube(#[from] kube::Error),
    #[error("the watch ended with {} ({})", .0.message, .0.code)]
    Ended(Box<Status>),
    #[error("no answer within {} s", .0.as_secs())]
    Silent(Duration),
    #[error("it ends every watch at once")]
    Closed,
}

/// What to do about a [`WatchError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WatchErrorKind {
    /// The API server cannot continue the watch where it was: list again.
    Expired,
    /// A right is missing, or the credentials are not accepted.
    Forbidden,
    /// The API server answered something else than what was requested.
    Refused,
    /// No answer in time.
    Silent,
    /// No connection, or it broke.
    Unreachable,
}

impl WatchErrorKind {
    /// The label of the metric.
    pub(super) fn label(self) -> RestartReason {
        match self {
            Self::Expired => RestartReason::Expired,
            Self::Forbidden => RestartReason::Forbidden,
            Self::Refused => RestartReason::Refused,
            Self::Silent => RestartReason::Silent,
            Self::Unreachable => RestartReason::Unreachable,
        }
    }
}

impl WatchError {
    pub(super) fn kind(&self) -> WatchErrorKind {
        match self {
            Self::Silent(_) => WatchErrorKind::Silent,
            Self::Closed => WatchErrorKind::Unreachable,
            Self::Kube(kube::Error::Auth(_)) => WatchErrorKind::Forbidden,
            Self::Kube(kube::Error::SerdeError(_)) => WatchErrorKind::Refused,
            Self::Kube(_) | Self::Ended(_) => match self.status() {
                Some(status) if is_expired(status) => WatchErrorKind::Expired,
                Some(status) if matches!(status.code, 401 | 403) => WatchErrorKind::Forbidden,
                Some(_) => WatchErrorKind::Refused,
                None => WatchErrorKind::Unreachable,
            },
        }
    }

    /// How long the API server wants to be left alone; zero where it does not say.
    pub(super) fn retry_after(&self) -> Duration {
        let Some(status) = self.status() else { return Duration::ZERO };
        match status.details.as_ref().map_or(0, |details| details.retry_after_seconds) {
            // A 429 without a time is a request to slow down all the same.
            0 if status.code == 429 => DEFAULT_RETRY_AFTER,
            seconds => Duration::from_secs(seconds.into()),
        }
    }

    fn status(&self) -> Option<&Status> {
        match self {
            Self::Kube(kube::Error::Api(status)) | Self::Ended(status) => Some(status),
            _ => None,
        }
    }
}

/// Whether the version is too old for the API server, or one that it has not seen yet.
fn is_expired(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    // ResourceVersionTooLarge: this API server, one of several or on a restored etcd, has not seen the version yet.
    status.code == 410 || causes.map(|cause| &*cause.reason).any(|cause| cause == "ResourceVersionTooLarge")
}

/// The backoff of one watch.
#[derive(Debug, Default)]
pub(super) struct WatchBackoff {
    /// In a row.
    failures: u32,
}

impl WatchBackoff {
    /// How long to wait after this failure.
    pub(super) fn next(&mut self, kind: WatchErrorKind, retry_after: Duration) -> Duration {
        let longest = if kind == WatchErrorKind::Forbidden { MAX_FORBIDDEN_BACKOFF } else { MAX_BACKOFF };
        let backoff = doubled(MIN_BACKOFF, longest, self.failures);
        self.failures = self.failures.saturating_add(1);
        // Added, not the larger of the two: those who got the same Retry-After must not return at the same moment.
        retry_after.min(MAX_RETRY_AFTER) + jittered(backoff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::api::chain;

    fn failed(code: u16, cause: &str) -> WatchError {
        let status = serde_json::json!({
            "code": code, "message": "no", "details": { "causes": [{ "reason": cause }], "retryAfterSeconds": 7 },
        });
        WatchError::Ended(serde_json::from_value(status).expect("a Status"))
    }

    #[test]
    fn kind_of_error_follows_from_status_and_cause() {
        let cut = WatchError::Kube(kube::Error::ReadEvents(std::io::Error::other("cut")));
        for (err, kind) in [
            (failed(410, ""), WatchErrorKind::Expired),
            (failed(504, "ResourceVersionTooLarge"), WatchErrorKind::Expired),
            (failed(504, ""), WatchErrorKind::Refused),
            (failed(500, ""), WatchErrorKind::Refused),
            (failed(401, ""), WatchErrorKind::Forbidden),
            (failed(403, ""), WatchErrorKind::Forbidden),
            (WatchError::Silent(Duration::from_secs(10)), WatchErrorKind::Silent),
            (cut, WatchErrorKind::Unreachable),
        ] {
            assert_eq!(err.kind(), kind, "{err}");
        }
        assert_eq!(failed(429, "").retry_after(), Duration::from_secs(7));
        let busy = serde_json::json!({ "code": 429, "message": "Too many requests, please try again later." });
        let busy = WatchError::Ended(serde_json::from_value(busy).expect("a Status"));
        assert_eq!(busy.retry_after(), DEFAULT_RETRY_AFTER);
        assert_eq!(chain(&failed(500, "")), "the watch ended with no (500)");
    }

    #[test]
    fn backoff_grows_to_a_limit_and_honours_retry_after() {
        let mut backoff = WatchBackoff::default();
        let mut least = MIN_BACKOFF / 2;
        for _ in 0..40 {
            let wait = backoff.next(WatchErrorKind::Unreachable, Duration::ZERO);
            assert!(wait >= least && wait <= MAX_BACKOFF, "{wait:?}");
            least = (2 * least).min(MAX_BACKOFF / 2);
        }
        let retry_after = Duration::from_secs(20);
        assert!(backoff.next(WatchErrorKind::Refused, retry_after) >= retry_after);
        assert!(backoff.next(WatchErrorKind::Refused, Duration::MAX) <= MAX_RETRY_AFTER + MAX_BACKOFF);
        let mut backoff = WatchBackoff::default();
        assert!(backoff.next(WatchErrorKind::Forbidden, Duration::ZERO) <= MIN_BACKOFF, "it may have just started");
        let later = (0..40).map(|_| backoff.next(WatchErrorKind::Forbidden, Duration::ZERO)).last();
        assert!(later >= Some(MAX_FORBIDDEN_BACKOFF / 2), "{later:?}");
    }
}
