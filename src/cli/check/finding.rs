//! What the checks are, and what one of them found.

use serde::Serialize;

/// A group of checks, as they are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Category {
    Process,
    Kubernetes,
    Rights,
    Dns,
    Certificates,
    E2e,
}

impl Category {
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Kubernetes => "kubernetes",
            Self::Rights => "rights",
            Self::Dns => "dns",
            Self::Certificates => "certificates",
            Self::E2e => "e2e",
        }
    }
}

macro_rules! checks {
    ($($(#[$attribute:meta])* $variant:ident = $id:literal in $category:ident),+ $(,)?) => {
        /// The checks, in their order. Each id is a heading of `docs/troubleshooting.md`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum CheckId { $($(#[$attribute])* $variant),+ }

        impl CheckId {
            #[cfg(test)]
            pub(super) const ALL: &'static [Self] = &[$(Self::$variant),+];

            pub(super) const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $id),+ }
            }

            pub(super) const fn category(self) -> Category {
                match self { $(Self::$variant => Category::$category),+ }
            }
        }
    };
}

checks! {
    ServerReachable = "server-reachable" in Process,
    VersionsEqual = "versions-equal" in Process,
    ProcessReady = "process-ready" in Process,
    StoreWritable = "store-writable" in Process,
    StoreSpace = "store-space" in Process,
    Clock = "clock" in Process,
    ApiReachable = "api-reachable" in Kubernetes,
    Writer = "writer" in Kubernetes,
    ReplicasEqual = "replicas-equal" in Kubernetes,
    MirrorLag = "mirror-lag" in Kubernetes,
    RightsNamespaces = "rights-namespaces" in Rights,
    RightsServices = "rights-services" in Rights,
    RightsEndpointslices = "rights-endpointslices" in Rights,
    RightsServicecidrs = "rights-servicecidrs" in Rights,
    RightsEvents = "rights-events" in Rights,
    RightsLeases = "rights-leases" in Rights,
    RightsEndpoints = "rights-endpoints" in Rights,
    RightsSecrets = "rights-secrets" in Rights,
    RightsReviews = "rights-reviews" in Rights,
    DnsAnswers = "dns-answers" in Dns,
    CorednsWired = "coredns-wired" in Dns,
    Zone = "zone" in Dns,
    AnswersEqual = "answers-equal" in Dns,
    NoCache = "no-cache" in Dns,
    ServerCertificate = "server-certificate" in Certificates,
    CaCertificate = "ca-certificate" in Certificates,
    MachineCertificate = "machine-certificate" in Certificates,
    E2eRegistered = "e2e-registered" in E2e,
    E2eDirect = "e2e-direct" in E2e,
    E2eEndpointslice = "e2e-endpointslice" in E2e,
    E2eCoredns = "e2e-coredns" in E2e,
    E2eRemoved = "e2e-removed" in E2e,
}

impl Serialize for CheckId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum CheckResult {
    Passed,
    /// Not as it should be; what clients ask for is answered.
    Warning,
    Failed,
    /// The check could not be made.
    Skipped,
}

/// One check and what it found, as JSON shows it. Fields are added, never renamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) id: CheckId,
    pub(super) category: Category,
    pub(super) result: CheckResult,
    /// `None` if it was skipped.
    pub(super) observed: Option<String>,
    pub(super) expected: &'static str,
    /// Of a warning or a fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cause: Option<String>,
    /// Of a warning or a fault: a command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fix: Option<String>,
    /// Why it was skipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<String>,
}

impl Finding {
    pub(super) fn passed(id: CheckId, expected: &'static str, observed: impl Into<String>) -> Self {
        Self {
            id,
            category: id.category(),
            result: CheckResult::Passed,
            observed: Some(observed.into()),
            expected,
            cause: None,
            fix: None,
            reason: None,
        }
    }

    pub(super) fn skipped(id: CheckId, expected: &'static str, reason: impl Into<String>) -> Self {
        let passed = Self::passed(id, expected, "");
        Self { result: CheckResult::Skipped, observed: None, reason: Some(reason.into()), ..passed }
    }

    pub(super) fn failed(
        id: CheckId,
        expected: &'static str,
        observed: impl Into<String>,
        cause: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        let passed = Self::passed(id, expected, observed);
        Self { result: CheckResult::Failed, cause: Some(cause.into()), fix: Some(fix.into()), ..passed }
    }

    /// Not as bad as it looks.
    pub(super) fn into_warning(self) -> Self {
        Self { result: CheckResult::Warning, ..self }
    }

    pub(super) fn is_fault(&self) -> bool {
        matches!(self.result, CheckResult::Warning | CheckResult::Failed)
    }
}
