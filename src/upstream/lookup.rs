//! One lookup of one name: A and AAAA together, each through all its aliases.

use hickory_proto::rr::{Name, RecordType};
use tokio::time::timeout;

use super::{
    servers::{ServerErrors, Servers},
    timing::Timing,
    walk::{Found, Step, Walk, WalkError},
};

/// What a lookup has found, per family.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) v4: Result<Found, LookupError>,
    pub(super) v6: Result<Found, LookupError>,
}

/// Why one family was not found.
#[derive(Debug, thiserror::Error)]
pub(super) enum LookupError {
    #[error("{0}")]
    Servers(ServerErrors),
    #[error(transparent)]
    Walk(#[from] WalkError),
    #[error("not complete within {}", humantime::format_duration(*.0))]
    Timeout(std::time::Duration),
}

impl LookupError {
    /// Whether the name leads into the zone of this server: an answer, which must not be followed.
    pub(super) fn is_own_zone(&self) -> bool {
        matches!(self, Self::Walk(WalkError::InOwnZone(_)))
    }
}

/// Looks `name` up, which lies outside of `zone`.
pub(super) async fn look_up(servers: &Servers, name: &Name, zone: &Name, timing: &Timing) -> Outcome {
    let family = async |kind| {
        let walk = walk(servers, Walk::new(name.clone(), kind, zone), name.clone(), kind);
        timeout(timing.lookup_timeout, walk).await.unwrap_or(Err(LookupError::Timeout(timing.lookup_timeout)))
    };
    let (v4, v6) = tokio::join!(family(RecordType::A), family(RecordType::AAAA));
    Outcome { v4, v6 }
}

/// Every question after the first follows an alias, and a walk has a limit on these.
async fn walk(servers: &Servers, mut walk: Walk<'_>, name: Name, kind: RecordType) -> Result<Found, LookupError> {
    let mut next = name;
    loop {
        let answer = servers.ask(&next, kind).await.map_err(LookupError::Servers)?;
        match walk.follow(&answer)? {
            Step::Ask(alias) => next = alias,
            Step::Done(found) => return Ok(found),
        }
    }
}
