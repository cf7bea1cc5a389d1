//! How long certificates are valid. Pure.

use std::time::{Duration, SystemTime};

use super::{
    facts::{Fact, Facts},
    finding::{CheckId, Finding},
};

/// How long before its end a certificate that is not renewed by itself should be replaced.
const RENEW_BEFORE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How long before its end a machine's certificate, which lives a day, should have been renewed.
const MACHINE_RENEW_BEFORE: Duration = Duration::from_secs(60 * 60);

pub(super) fn server_certificate(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::ServerCertificate, "the server's certificate is valid for a week or more");
    let (url, validity) = match &facts.server_certificate {
        Fact::Known(shown) => shown,
        Fact::Failed(why) | Fact::Skipped(why) => return Finding::skipped(id, expected, why.clone()),
    };
    let cause = format!("nobody has replaced the certificate that {url} shows");
    let fix = "systemctl restart gangplank";
    if validity.not_before > facts.now {
        let cause = "this machine's clock is behind, or the certificate is not for now";
        return Finding::failed(id, expected, format!("{url}: not valid yet"), cause, "chronyc tracking");
    }
    ends(facts.now, id, expected, validity.not_after, RENEW_BEFORE, &cause, fix)
}

pub(super) fn ca_certificate(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::CaCertificate, "the CA that is trusted is valid for a week or more");
    let all = match &facts.ca {
        Fact::Known(all) => all,
        Fact::Failed(why) | Fact::Skipped(why) => return Finding::skipped(id, expected, why.clone()),
    };
    // The one that ends last: others may be left of a change of CAs.
    let Some(last) = all.iter().map(|one| one.not_after).max() else {
        return Finding::skipped(id, expected, "no CA");
    };
    let cause = "the CA was not replaced in time";
    ends(facts.now, id, expected, last, RENEW_BEFORE, cause, "gangplank join TOKEN")
}

pub(super) fn machine_certificate(facts: &Facts) -> Finding {
    let (id, expected) = (CheckId::MachineCertificate, "the certificate of this machine is renewed in time");
    let expires = match &facts.machine_expires {
        Fact::Known(expires) => *expires,
        Fact::Failed(why) | Fact::Skipped(why) => return Finding::skipped(id, expected, why.clone()),
    };
    let cause =
        "no timer runs `gangplank renew`, or no server answers it; a week after the end only `gangplank join` helps";
    let fix = "gangplank renew";
    ends(facts.now, id, expected, expires, MACHINE_RENEW_BEFORE, cause, fix)
}

/// A certificate that ends then.
fn ends(
    now: SystemTime,
    id: CheckId,
    expected: &'static str,
    end: SystemTime,
    soon: Duration,
    cause: &str,
    fix: &str,
) -> Finding {
    let date = humantime::format_rfc3339_seconds(end);
    match end.duration_since(now) {
        Err(_) => Finding::failed(id, expected, format!("expired at {date}"), cause, fix),
        Ok(left) if left < soon => {
            Finding::failed(id, expected, format!("expires at {date}"), cause, fix).into_warning()
        }
        Ok(_) => Finding::passed(id, expected, format!("until {date}")),
    }
}
