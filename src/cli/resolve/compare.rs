//! In what two answers to the same question differ.

use serde::Serialize;

use super::{
    query::Reply,
    report::{AnswerView, ReplyView, reply_view},
};

/// In what an answer differs from that of the server that was asked directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::cli) enum Difference {
    Rcode,
    Records,
    /// The same records, of which some have another TTL: a cache counts it down, CoreDNS has a TTL of its own for what
    /// it reads from the cluster.
    Ttl,
    /// Another server has answered, or a cache, which keeps no NSID.
    Nsid,
}

impl Difference {
    /// Whether a client gets something else, and not only from elsewhere or for another time.
    pub(in crate::cli) fn is_wrong(self) -> bool {
        matches!(self, Self::Rcode | Self::Records)
    }

    /// How the table of the questions shows it. Records and their TTLs are in the table of the answers.
    pub(super) fn of_question(self) -> Option<&'static str> {
        match self {
            Self::Rcode => Some("rcode"),
            Self::Nsid => Some("nsid"),
            Self::Records | Self::Ttl => None,
        }
    }
}

/// A record, and which of the two servers has it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Found<'a> {
    /// Asked directly; also where no other server was asked.
    Direct(&'a AnswerView),
    Via(&'a AnswerView),
    Both {
        direct: &'a AnswerView,
        via: &'a AnswerView,
    },
}

impl<'a> Found<'a> {
    pub(super) fn answer(&self) -> &'a AnswerView {
        match self {
            Self::Direct(answer) | Self::Via(answer) | Self::Both { direct: answer, .. } => answer,
        }
    }

    pub(super) fn direct(&self) -> Option<&'a AnswerView> {
        match self {
            Self::Direct(direct) | Self::Both { direct, .. } => Some(direct),
            Self::Via(_) => None,
        }
    }

    pub(super) fn via(&self) -> Option<&'a AnswerView> {
        match self {
            Self::Via(via) | Self::Both { via, .. } => Some(via),
            Self::Direct(_) => None,
        }
    }

    /// How the table shows in what the two servers differ.
    pub(super) fn differs(&self) -> Option<&'static str> {
        match self {
            Self::Direct(_) => Some("not via"),
            Self::Via(_) => Some("only via"),
            Self::Both { direct, via } => (direct.ttl != via.ttl).then_some("ttl"),
        }
    }
}

/// Each record once: those of `direct` in their order, then what only `via` has. Servers rotate their records, so the
/// order is no difference.
pub(super) fn matched<'a>(direct: &'a [AnswerView], via: &'a [AnswerView]) -> Vec<Found<'a>> {
    let mut rest: Vec<&AnswerView> = via.iter().collect();
    let mut found = Vec::with_capacity(direct.len());
    for answer in direct {
        let same = rest.iter().position(|other| is_same(answer, other)).map(|at| rest.remove(at));
        found.push(same.map_or(Found::Direct(answer), |via| Found::Both { direct: answer, via }));
    }
    found.extend(rest.into_iter().map(Found::Via));
    found
}

/// Whether two records say the same, whatever their TTLs. The case of names means nothing (RFC 4343).
fn is_same(one: &AnswerView, other: &AnswerView) -> bool {
    let same = |one: &str, other: &str| one.eq_ignore_ascii_case(other);
    one.r#type == other.r#type && same(&one.name, &other.name) && same(&one.data, &other.data)
}

/// In what a reply differs from that of the server that was asked directly.
pub(in crate::cli) fn differences(direct: &Reply, via: &Reply) -> Vec<Difference> {
    compare(&reply_view(direct), &reply_view(via))
}

/// In what `via` differs.
pub(super) fn compare(direct: &ReplyView, via: &ReplyView) -> Vec<Difference> {
    let found = matched(&direct.answers, &via.answers);
    let is_shared = |found: &Found<'_>| matches!(found, Found::Both { .. });
    let differences = [
        (Difference::Rcode, direct.rcode != via.rcode),
        (Difference::Records, !found.iter().all(is_shared)),
        (Difference::Ttl, found.iter().any(|found| is_shared(found) && found.differs().is_some())),
        (Difference::Nsid, direct.nsid != via.nsid),
    ];
    differences.into_iter().filter_map(|(difference, is_there)| is_there.then_some(difference)).collect()
}
