//! The Lease as an object of the API server.
//!
//! | field | meaning |
//! |---|---|
//! | `spec.holderIdentity` | host name and directory id of the holder; empty when the Lease is released |
//! | annotation `gangplank.dev/address` | where the holder takes registrations, with commas |
//! | annotation `gangplank.dev/term` | the holder's term |
//! | annotation `gangplank.dev/generation` | the highest generation that the holder has published |

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use http::Request;
use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::ObjectReference,
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{
    Client,
    core::{
        Request as Builder,
        params::{GetParams, PostParams},
    },
};
use sha2::{Digest as _, Sha256};

use super::lease_watch::LeaseWatch;
use crate::{
    kubernetes::{
        api::{ApiError, exchange},
        objects::names,
    },
    model::{ServerAddress, UnixMillis, wall_clock},
    registry::LeaseHolder,
    replicas::{
        election::LEASE_DURATION,
        lease::{DirectoryId, LeaseRecord, LeaseWrite, ObservedLease, ResourceVersion},
    },
};

/// Name of the Lease.
pub(super) const NAME: &str = "gangplank-writer";

/// How far the wall clock may be from the API server's. Its `Date` has whole seconds.
const MAX_CLOCK_DIFFERENCE: Duration = Duration::from_secs(1);

/// Reads and writes the Lease.
pub(in crate::kubernetes) struct LeaseClient {
    client: Client,
    namespace: String,
    me: DirectoryId,
    /// Names this process for people.
    host: String,
    /// Where this process takes registrations.
    addresses: Vec<ServerAddress>,
    /// As it was last read or written, for what others have put on it.
    last: Mutex<Option<Lease>>,
}

/// A Lease that was read.
#[derive(Debug)]
pub(super) struct LeaseRead {
    pub(super) observed: Option<ObservedLease>,
    pub(super) holder: LeaseHolder,
    pub(super) clock_agrees: bool,
}

impl LeaseClient {
    /// `host` names this process for people, `addresses` are where it takes registrations.
    pub(in crate::kubernetes) fn new(
        client: Client,
        namespace: String,
        me: DirectoryId,
        host: String,
        addresses: Vec<ServerAddress>,
    ) -> Self {
        Self { client, namespace, me, host, addresses, last: Mutex::default() }
    }

    /// The Lease in `namespace`, as the object of an Event.
    pub(in crate::kubernetes) fn reference(namespace: &str) -> ObjectReference {
        ObjectReference {
            api_version: Some("coordination.k8s.io/v1".into()),
            kind: Some("Lease".into()),
            namespace: Some(namespace.into()),
            name: Some(NAME.into()),
            ..ObjectReference::default()
        }
    }

    /// A watch of this Lease.
    pub(super) fn watch(&self) -> LeaseWatch {
        LeaseWatch::new(self.client.clone(), &self.namespace)
    }

    /// Where the Lease is, for messages.
    pub(super) fn name(&self) -> String {
        format!("{}/{NAME}", self.namespace)
    }

    pub(super) async fn read(&self) -> Result<LeaseRead, ApiError> {
        let request = builder(&self.namespace).get(NAME, &GetParams::default());
        // The API server's `Date` is from some moment between the two readings.
        let begun = wall_clock();
        let (head, answer) = exchange::<Lease>(&self.client, encode(request)?).await;
        let clock_agrees = head.as_ref().and_then(|head| head.headers.get(http::header::DATE)?.to_str().ok());
        let clock_agrees = clock_agrees.is_none_or(|date| agrees(date, begun, wall_clock()));
        let found = match answer {
            Ok(lease) => Some(lease),
            Err(ApiError::NotFound) => None,
            Err(err) => return Err(err),
        };
        let observed = found.as_ref().map(observed).transpose()?;
        let holder = found.as_ref().map(holder).unwrap_or_default();
        self.keep(found);
        Ok(LeaseRead { observed, holder, clock_agrees })
    }

    /// Writes the Lease if it has the version `expected`; with `None`, creates it. The error is the reason of
    /// [`LeaseWrite::Unknown`].
    pub(super) async fn write(
        &self,
        expected: Option<ResourceVersion>,
        record: &LeaseRecord,
    ) -> (LeaseWrite, Option<ApiError>) {
        match self.try_write(expected, record).await {
            Ok(version) => (LeaseWrite::Written(version), None),
            Err(ApiError::Conflict | ApiError::AlreadyExists) => (LeaseWrite::Conflict, None),
            // Deleted meanwhile: it is another Lease than the one that was read.
            Err(ApiError::NotFound) if expected.is_some() => (LeaseWrite::Conflict, None),
            // After any other error the write may have been carried out, so it must be read before anything is
            // concluded.
            Err(err) => (LeaseWrite::Unknown, Some(err)),
        }
    }

    async fn try_write(
        &self,
        expected: Option<ResourceVersion>,
        record: &LeaseRecord,
    ) -> Result<ResourceVersion, ApiError> {
        let lease = self.render(expected, record);
        let body = serde_json::to_vec(&lease).expect("a Lease is JSON");
        let request = match expected {
            Some(_) => builder(&self.namespace).replace(NAME, &PostParams::default(), body),
            None => builder(&self.namespace).create(&PostParams::default(), body),
        };
        let (_, written) = exchange::<Lease>(&self.client, encode(request)?).await;
        let written = written?;
        let version = version(&written.metadata)?;
        self.keep(Some(written));
        Ok(version)
    }

    fn render(&self, expected: Option<ResourceVersion>, record: &LeaseRecord) -> Lease {
        // Labels and annotations of others stay on a Lease that is replaced.
        let before = if expected.is_some() { self.kept() } else { None };
        let Lease { mut metadata, spec } = before.unwrap_or_default();
        let before = spec.unwrap_or_default();
        let now = MicroTime(jiff_now());
        let holder = (!record.released).then(|| self.holder_identity(record.holder));
        let taken = before.holder_identity != holder && holder.is_some();
        metadata.name = Some(NAME.into());
        metadata.namespace = Some(self.namespace.clone());
        metadata.resource_version = expected.map(|ResourceVersion(version)| version.to_string());
        let annotations = metadata.annotations.get_or_insert_default();
        annotations.insert(names::TERM.into(), record.term.to_string());
        annotations.insert(names::GENERATION.into(), record.generation.to_string());
        // Nobody takes registrations at a released Lease's address.
        if self.addresses.is_empty() || record.released {
            annotations.remove(names::ADDRESS);
        } else {
            annotations.insert(names::ADDRESS.into(), ServerAddress::list(&self.addresses, ","));
        }
        let spec = LeaseSpec {
            // Empty when released: client-go, too, takes a Lease without a holder at once.
            holder_identity: Some(holder.unwrap_or_default()),
            lease_duration_seconds: i32::try_from(LEASE_DURATION.as_secs()).ok(),
            // As client-go does it: `acquireTime` and `leaseTransitions` change with the holder, not with a renewal.
            acquire_time: if taken { Some(now.clone()) } else { before.acquire_time },
            renew_time: Some(now),
            lease_transitions: Some(before.lease_transitions.unwrap_or(0).saturating_add(i32::from(taken))),
            ..before
        };
        Lease { metadata, spec: Some(spec) }
    }

    fn keep(&self, lease: Option<Lease>) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = lease;
    }

    fn kept(&self) -> Option<Lease> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn holder_identity(&self, directory: DirectoryId) -> String {
        format!("{}_{}", self.host, hex(directory))
    }

    /// As the Lease names this process when it holds it.
    pub(in crate::kubernetes) fn identity(&self) -> String {
        self.holder_identity(self.me)
    }

    pub(super) fn me(&self) -> DirectoryId {
        self.me
    }
}

fn builder(namespace: &str) -> Builder {
    Builder::new(format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"))
}

fn encode(request: Result<Request<Vec<u8>>, kube::core::request::Error>) -> Result<Request<Vec<u8>>, ApiError> {
    request.map_err(|err| ApiError::Invalid(err.to_string()))
}

/// What a Lease says. One without our annotations is of term 0.
fn observed(lease: &Lease) -> Result<ObservedLease, ApiError> {
    let number = |key| {
        let text = lease.metadata.annotations.as_ref()?.get(key)?;
        text.parse::<u64>().ok()
    };
    let holder = identity(lease);
    let record = LeaseRecord {
        term: number(names::TERM).unwrap_or(0),
        holder: parse_holder(holder),
        generation: number(names::GENERATION).unwrap_or(0),
        released: holder.is_empty(),
    };
    Ok(ObservedLease { version: version(&lease.metadata)?, record })
}

fn identity(lease: &Lease) -> &str {
    lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default()
}

/// Who holds it.
pub(super) fn holder(lease: &Lease) -> LeaseHolder {
    let addresses = lease.metadata.annotations.as_ref().and_then(|all| all.get(names::ADDRESS));
    LeaseHolder {
        name: identity(lease).to_owned(),
        addresses: addresses.map(|list| ServerAddress::parse_list(list)).unwrap_or_default(),
    }
}

fn version(metadata: &ObjectMeta) -> Result<ResourceVersion, ApiError> {
    let text = metadata.resource_version.as_deref().unwrap_or_default();
    // Kubernetes promises since 1.35 that it is a number, and has always kept it.
    let number = text.parse().map_err(|_| ApiError::Unknown(format!("resourceVersion {text:?} is not a number")))?;
    Ok(ResourceVersion(number))
}

fn hex(DirectoryId(id): DirectoryId) -> String {
    format!("{id:032x}")
}

/// The directory id in a `holderIdentity`; of any other text, a number that is no directory's.
fn parse_holder(text: &str) -> DirectoryId {
    // The host name may have underscores, the id has none.
    let own = text.rsplit_once('_').and_then(|(_, id)| u128::from_str_radix(id, 16).ok());
    DirectoryId(own.unwrap_or_else(|| {
        let hash = Sha256::digest(text);
        u128::from_be_bytes(hash[..16].try_into().expect("half of 32 bytes"))
    }))
}

/// Whether the wall clock agrees with a `Date` that was made between `begun` and `ended`.
fn agrees(date: &str, begun: SystemTime, ended: SystemTime) -> bool {
    let Ok(date) = httpdate::parse_http_date(date) else { return true };
    // The server's clock stood anywhere in that second.
    let (from, to) = (date, date + Duration::from_secs(1));
    ended + MAX_CLOCK_DIFFERENCE >= from && begun <= to + MAX_CLOCK_DIFFERENCE
}

fn jiff_now() -> k8s_openapi::jiff::Timestamp {
    let millis = i64::try_from(UnixMillis::now().0).unwrap_or(i64::MAX);
    k8s_openapi::jiff::Timestamp::from_millisecond(millis).unwrap_or(k8s_openapi::jiff::Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_is_read_back_as_it_was_written() {
        // No request is made: only what it renders is looked at.
        let record = LeaseRecord { term: 7, holder: DirectoryId(42), generation: 9, released: false };
        for released in [false, true] {
            let record = LeaseRecord { released, ..record.clone() };
            let mut lease = render_alone(&record);
            lease.metadata.resource_version = Some("5".into());
            let read = observed(&lease).expect("a number");
            assert_eq!(read.version, ResourceVersion(5));
            assert_eq!((read.record.term, read.record.generation, read.record.released), (7, 9, released));
            assert_eq!(read.record.holder == record.holder, !released);
            assert_eq!(holder(&lease).addresses.len(), if released { 0 } else { 2 });
        }
    }

    fn render_alone(record: &LeaseRecord) -> Lease {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let _entered = runtime.enter();
        let config = kube::Config::new("http://127.0.0.1:1".parse().expect("a URL"));
        let client = Client::try_from(config).expect("a client");
        let addresses = ServerAddress::parse_list("10.0.0.1:9080,[2001:db8::1]:9080");
        LeaseClient::new(client, "gangplank".into(), record.holder, "host".into(), addresses).render(None, record)
    }

    #[test]
    fn lease_of_another_kind_is_held_by_nobody_we_know() {
        let lease = Lease {
            metadata: ObjectMeta { resource_version: Some("1".into()), ..ObjectMeta::default() },
            spec: Some(LeaseSpec { holder_identity: Some("by hand".into()), ..LeaseSpec::default() }),
        };
        let ObservedLease { record, .. } = observed(&lease).expect("a number");
        assert_eq!((record.term, record.generation, record.released), (0, 0, false));
        assert_ne!(record.holder, DirectoryId(0));
    }

    #[test]
    fn clocks_more_than_a_second_apart_do_not_agree() {
        let date = "Wed, 25 Nov 2026 18:00:00 GMT";
        let server = httpdate::parse_http_date(date).expect("a date");
        let at = |millis: i64| match u64::try_from(millis) {
            Ok(millis) => server + Duration::from_millis(millis),
            Err(_) => server - Duration::from_millis(millis.unsigned_abs()),
        };
        assert!(agrees(date, at(-900), at(-900)) && agrees(date, at(1_900), at(1_950)));
        assert!(!agrees(date, at(-1_200), at(-1_100)) && !agrees(date, at(2_100), at(2_200)));
        assert!(agrees(date, at(-60_000), at(60_000)), "a slow answer says little");
        assert!(agrees("never", at(0), at(0)));
    }
}
