//! What is known before anything is judged.

use std::time::SystemTime;

use super::rights::Need;
use crate::{
    admin::client::{ProcessStatus, Readiness},
    coredns::Wired,
    grpc::client::{Attempt, Validity},
    kubernetes::api::ApiServerSeen,
    model::Replica,
};

/// Something that was looked for.
#[derive(Debug, Clone)]
pub(super) enum Fact<T> {
    Known(T),
    /// It was looked for in vain; why.
    Failed(String),
    /// It was not looked for; why.
    Skipped(String),
}

impl<T> Fact<T> {
    pub(super) fn of(result: Result<T, impl ToString>) -> Self {
        match result {
            Ok(known) => Self::Known(known),
            Err(err) => Self::Failed(err.to_string()),
        }
    }

    pub(super) const fn known(&self) -> Option<&T> {
        match self {
            Self::Known(known) => Some(known),
            Self::Failed(_) | Self::Skipped(_) => None,
        }
    }
}

/// A moment of another clock, and of this machine's.
#[derive(Debug, Clone)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) here: SystemTime,
}

/// What every server said of itself.
#[derive(Debug, Clone, Default)]
pub(super) struct ReplicasSeen {
    pub(super) replicas: Vec<(String, Replica)>,
    pub(super) failed: Vec<Attempt>,
}

/// The verbs that are missing, each with its resource.
#[derive(Debug, Clone)]
pub(super) struct RightsSeen {
    pub(super) id: super::finding::CheckId,
    pub(super) need: Need,
    pub(super) missing: Fact<Vec<String>>,
}

/// An answer through CoreDNS.
#[derive(Debug, Clone)]
pub(super) struct ThroughSeen {
    pub(super) name: String,
    /// The response code in words, and how many records.
    pub(super) answer: Result<(String, usize), String>,
}

/// One name, asked directly and through CoreDNS.
#[derive(Debug, Clone)]
pub(super) struct ComparedSeen {
    pub(super) name: String,
    /// In what they differ that a client notices.
    pub(super) differences: Vec<&'static str>,
    /// TTLs of the same question through CoreDNS, a second apart.
    pub(super) ttls: Vec<u32>,
    /// Gangplank says who it is, and the answer through a stub domain does not.
    pub(super) nsid_lost: bool,
}

/// Everything.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) now: SystemTime,
    pub(super) replicas: Fact<ReplicasSeen>,
    pub(super) admin_url: String,
    pub(super) readiness: Fact<Readiness>,
    pub(super) status: Fact<At<ProcessStatus>>,
    pub(super) api_url: String,
    pub(super) api: Fact<At<ApiServerSeen>>,
    /// Whose rights.
    pub(super) user: String,
    pub(super) rights: Vec<RightsSeen>,
    pub(super) configmap: String,
    pub(super) wired: Fact<Vec<Wired>>,
    pub(super) dns: String,
    pub(super) via: String,
    pub(super) zone: String,
    pub(super) direct: Fact<ThroughSeen>,
    pub(super) control: Fact<ThroughSeen>,
    pub(super) compared: Fact<ComparedSeen>,
    /// The URL that shows it.
    pub(super) server_certificate: Fact<(String, Validity)>,
    pub(super) ca: Fact<Vec<Validity>>,
    pub(super) machine_expires: Fact<SystemTime>,
}
