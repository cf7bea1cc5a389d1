//! What stands in Kubernetes, as the watches say and as our own writes have left it.
//!
//! The watches tell what they see as [`Seen`]; the mirror tells what it wrote, so that its next look
//! does not wait for the watch; whichever is newer counts ([`objects`]). The mirror asks for one
//! service at a time ([`Cluster::observe`]) and waits for what it has to look at again
//! ([`Cluster::changed`]). What follows for registrations comes back from the `see_` functions, as
//! facts for the registry.
//!
//! Memory stays in proportion to what is ours: of our slices a [`Standing`] each, of our Services
//! the object, of everybody else's key, uid and version; of Services whose name no service of ours
//! can have, nothing. Nothing here asks the API server.

mod kept;
mod objects;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use k8s_openapi::api::{
    core::v1::{Namespace, Service},
    discovery::v1::EndpointSlice,
};
use tokio::sync::{Notify, watch};

pub(super) use self::kept::OurSlice;
use self::{
    kept::{Owned, Place, StandingNamespace, service_key},
    objects::{Objects, Told},
};
use super::{services::Ownership, slices::Standing};
use crate::{model::ServiceKey, registry::ClusterFact};

/// What a watch sees of objects of one kind.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Seen<T> {
    /// A list begins: every object will be named before it [ends](Self::ListEnds).
    ListBegins,
    /// It stands so; from the list.
    Listed(T),
    /// That were all, as of this resourceVersion.
    ListEnds(String),
    /// It stands so now.
    Stands(T),
    /// It is gone, or no longer what the watch asks for.
    Gone(T),
}

impl<T> Seen<T> {
    /// The object, where it is about one.
    pub(super) fn object(&self) -> Option<&T> {
        match self {
            Self::Listed(object) | Self::Stands(object) | Self::Gone(object) => Some(object),
            Self::ListBegins | Self::ListEnds(_) => None,
        }
    }

    /// The same of what `read` makes of the object; `None` where that is nothing.
    pub(super) fn read<U>(&self, read: impl FnOnce(&T) -> Option<U>) -> Option<Seen<U>> {
        match self {
            Self::ListBegins => Some(Seen::ListBegins),
            Self::ListEnds(version) => Some(Seen::ListEnds(version.clone())),
            Self::Listed(object) => read(object).map(Seen::Listed),
            Self::Stands(object) => read(object).map(Seen::Stands),
            Self::Gone(object) => read(object).map(Seen::Gone),
        }
    }
}

/// A namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NamespaceState {
    /// Not listed yet.
    Unknown,
    /// It does not exist.
    Absent,
    /// It exists.
    Active,
    /// It is being deleted: nothing can be created in it.
    Terminating,
}

/// The Service of a service.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum StandingService {
    /// Not listed yet.
    Unknown,
    /// It does not exist.
    Absent,
    /// Gangplank made it. Without its managed fields.
    Ours(Arc<Service>),
    /// Somebody else's, and external instances may stand beside its endpoints.
    Joined {
        /// Of the Service.
        uid: Box<str>,
    },
    /// Somebody else's.
    Foreign,
}

/// What stands of one service.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Observed {
    /// Its namespace.
    pub(super) namespace: NamespaceState,
    /// Its Service.
    pub(super) service: StandingService,
    /// Its slices, those of ours; in order of their names.
    pub(super) slices: Vec<Standing>,
    /// Whether the slices were listed: before, there may be more than [`slices`](Self::slices).
    pub(super) listed: bool,
    /// Names of slices that somebody else has taken, as far as it came up.
    pub(super) occupied: HashSet<String>,
}

/// Something to look at again.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Changed {
    /// A namespace came, goes or went. Its services with something in Kubernetes are named as well.
    Namespace(Box<str>),
    /// A service's Service or slices are not what they were.
    Service(ServiceKey),
}

/// What stands in Kubernetes.
#[derive(Debug)]
pub(super) struct Cluster {
    state: Mutex<State>,
    marked: Notify,
    joined: watch::Sender<BTreeSet<ServiceKey>>,
}

#[derive(Debug)]
struct State {
    namespaces: Objects<Box<str>, StandingNamespace>,
    services: Objects<ServiceKey, Owned>,
    slices: Objects<Place, Standing>,
    /// Names of the slices of each service.
    by_service: BTreeMap<ServiceKey, BTreeSet<Box<str>>>,
    occupied: HashMap<ServiceKey, HashSet<String>>,
    marks: BTreeSet<Changed>,
}

impl Cluster {
    pub(super) fn new() -> Self {
        let state = State {
            namespaces: Objects::new(),
            services: Objects::new(),
            slices: Objects::new(),
            by_service: BTreeMap::new(),
            occupied: HashMap::new(),
            marks: BTreeSet::new(),
        };
        Self { state: Mutex::new(state), marked: Notify::new(), joined: watch::Sender::default() }
    }

    /// What stands of `service`.
    pub(super) fn observe(&self, service: &ServiceKey) -> Observed {
        let state = self.lock();
        let namespace = match state.namespaces.get(service.namespace()) {
            Some(StandingNamespace { terminating: true, .. }) => NamespaceState::Terminating,
            Some(_) => NamespaceState::Active,
            None if state.namespaces.complete() => NamespaceState::Absent,
            None => NamespaceState::Unknown,
        };
        let standing = match state.services.get(service) {
            Some(Owned { object: Some(object), .. }) => StandingService::Ours(Arc::clone(object)),
            Some(Owned { ownership: Ownership::Joined, uid, .. }) => StandingService::Joined { uid: uid.clone() },
            Some(_) => StandingService::Foreign,
            None if state.services.complete() => StandingService::Absent,
            None => StandingService::Unknown,
        };
        let names = state.by_service.get(service).into_iter().flatten();
        let slices = names.filter_map(|name| state.slices.get(&(service.namespace().into(), name.clone())).cloned());
        Observed {
            namespace,
            service: standing,
            slices: slices.collect(),
            listed: state.slices.complete(),
            occupied: state.occupied.get(service).cloned().unwrap_or_default(),
        }
    }

    /// Every service with a Service of ours, or with slices of ours.
    pub(super) fn every_service(&self) -> Vec<ServiceKey> {
        let state = self.lock();
        let mut all: BTreeSet<&ServiceKey> = state.by_service.keys().collect();
        all.extend(state.services.keys().filter(|key| state.services.get(key).is_some_and(|one| one.object.is_some())));
        all.into_iter().cloned().collect()
    }

    /// Waits for changes that the mirror did not make itself, and gives back all of them, each
    /// once. Whoever drops it misses nothing. One caller at a time.
    pub(super) async fn changed(&self) -> Vec<Changed> {
        loop {
            let marks = mem::take(&mut self.lock().marks);
            if !marks.is_empty() {
                return marks.into_iter().collect();
            }
            // A mark that was set since leaves a permit.
            self.marked.notified().await;
        }
    }

    /// The Services that external instances joined; changes are seen on the channel.
    pub(super) fn joined(&self) -> watch::Receiver<BTreeSet<ServiceKey>> {
        self.joined.subscribe()
    }

    /// The watch of the namespaces saw this.
    pub(super) fn see_namespaces(&self, seen: Vec<Seen<Namespace>>) -> Vec<ClusterFact> {
        self.update(|state| state.see_namespaces(seen))
    }

    /// The watch of the Services saw this.
    pub(super) fn see_services(&self, seen: Vec<Seen<Service>>) -> Vec<ClusterFact> {
        let mut joined = Vec::new();
        let facts = self.update(|state| state.see_services(seen, &mut joined));
        self.joined.send_if_modified(|all| {
            let changed = |(key, is): (ServiceKey, bool)| if is { all.insert(key) } else { all.remove(&key) };
            joined.into_iter().map(changed).fold(false, |any, one| any | one)
        });
        facts
    }

    /// The watch of our slices saw this.
    pub(super) fn see_slices(&self, seen: Vec<Seen<OurSlice>>) {
        self.update(|state| state.see_slices(seen));
    }

    /// We wrote a slice; so it is now.
    pub(super) fn wrote_slice(&self, slice: &EndpointSlice) {
        if let Some(OurSlice { place, standing: Some(standing), .. }) = OurSlice::read(slice) {
            // What the mirror knows is no news.
            let _ = self.lock().slice_stands(place, standing, false);
        }
    }

    /// We removed a slice: the one with this uid, as it was observed.
    pub(super) fn removed_slice(&self, namespace: &str, name: &str, uid: &str) {
        let mut state = self.lock();
        if let Some(gone) = state.slices.removed(&(namespace.into(), name.into()), uid) {
            state.forget(&gone.service, name);
        }
    }

    /// We wrote a Service of ours, or read it; so it is now.
    ///
    /// Whose a Service is only the watch says, because the registry has to hear of it too: an
    /// answer that tells it differently is passed over, and the watch follows with the same.
    pub(super) fn wrote_service(&self, service: &Service) {
        let Some((key, owned)) = service_key(&service.metadata).zip(Owned::read(service.clone())) else { return };
        let mut state = self.lock();
        let was_others = state.services.get(&key).is_some_and(|held| held.ownership != Ownership::Ours);
        if owned.ownership == Ownership::Ours && !was_others {
            let _ = state.services.stands(key, owned);
        }
    }

    /// The uid of the Service that stands under this name, whosever it is.
    pub(super) fn service_uid(&self, key: &ServiceKey) -> Option<String> {
        self.lock().services.get(key).map(|owned| owned.uid.clone().into())
    }

    /// We removed a Service: the one with this uid, as it was observed.
    pub(super) fn removed_service(&self, key: &ServiceKey, uid: &str) {
        let mut state = self.lock();
        if state.services.get(key).is_some_and(|held| held.ownership == Ownership::Ours) {
            let _ = state.services.removed(key, uid);
        }
    }

    /// Somebody else has a slice of this name, which we wanted for `service`.
    pub(super) fn occupied(&self, service: &ServiceKey, slice: &str) {
        self.lock().occupied.entry(service.clone()).or_default().insert(slice.into());
    }

    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        if !state.marks.is_empty() {
            self.marked.notify_one();
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn see_namespaces(&mut self, seen: Vec<Seen<Namespace>>) -> Vec<ClusterFact> {
        let mut facts = Vec::new();
        let mut changed: HashSet<Box<str>> = HashSet::new();
        let mut news = |name: Box<str>, before: Option<bool>, now: Option<bool>| {
            let (existed, exists) = (before == Some(false), now == Some(false));
            if existed != exists {
                facts.push(ClusterFact::Namespace { name: name.clone(), exists });
            }
            if before != now {
                changed.insert(name);
            }
        };
        let mut complete = false;
        for seen in seen {
            match seen {
                Seen::ListBegins => self.namespaces.list_begins(),
                Seen::ListEnds(version) => {
                    complete |= !self.namespaces.complete();
                    for (name, gone) in self.namespaces.list_ends(&version) {
                        news(name, Some(gone.terminating), None);
                    }
                }
                Seen::Listed(ref namespace) | Seen::Stands(ref namespace) => {
                    let Some((name, standing)) = StandingNamespace::read(&namespace.metadata) else { continue };
                    let now = Some(standing.terminating);
                    let told = if matches!(seen, Seen::Listed(_)) {
                        self.namespaces.listed(name.clone(), standing)
                    } else {
                        self.namespaces.stands(name.clone(), standing)
                    };
                    if let Told::News(before) = told {
                        news(name, before.map(|one| one.terminating), now);
                    }
                }
                Seen::Gone(namespace) => {
                    let Some((name, gone)) = StandingNamespace::read(&namespace.metadata) else { continue };
                    if let Some(before) = self.namespaces.is_gone(&name, &gone.uid, &gone.version) {
                        news(name, Some(before.terminating), None);
                    }
                }
            }
        }
        facts.extend(complete.then_some(ClusterFact::NamespacesComplete));
        if changed.is_empty() {
            return facts;
        }
        let within = |key: &&ServiceKey| changed.contains(key.namespace());
        self.marks.extend(self.by_service.keys().filter(within).cloned().map(Changed::Service));
        self.marks.extend(self.services.keys().filter(within).cloned().map(Changed::Service));
        self.marks.extend(changed.into_iter().map(Changed::Namespace));
        facts
    }

    fn see_services(&mut self, seen: Vec<Seen<Service>>, joined: &mut Vec<(ServiceKey, bool)>) -> Vec<ClusterFact> {
        let mut facts = Vec::new();
        let marks = &mut self.marks;
        let mut news = |key: ServiceKey, before: Option<Ownership>, now: Option<Ownership>| {
            let is = |which: Ownership| (before == Some(which), now == Some(which));
            let ((was_foreign, foreign), (was_joined, is_joined)) = (is(Ownership::Foreign), is(Ownership::Joined));
            if was_foreign != foreign {
                facts.push(ClusterFact::Service { service: key.clone(), foreign });
            }
            if was_joined != is_joined {
                joined.push((key.clone(), is_joined));
            }
            marks.insert(Changed::Service(key));
        };
        for seen in seen {
            match seen {
                Seen::ListBegins => self.services.list_begins(),
                Seen::ListEnds(version) => {
                    for (key, gone) in self.services.list_ends(&version) {
                        news(key, Some(gone.ownership), None);
                    }
                }
                Seen::Listed(service) => {
                    let Some((key, owned)) = service_key(&service.metadata).zip(Owned::read(service)) else { continue };
                    let now = owned.ownership;
                    if let Told::News(before) = self.services.listed(key.clone(), owned) {
                        news(key, before.map(|one| one.ownership), Some(now));
                    }
                }
                Seen::Stands(service) => {
                    let Some((key, owned)) = service_key(&service.metadata).zip(Owned::read(service)) else { continue };
                    let now = owned.ownership;
                    if let Told::News(before) = self.services.stands(key.clone(), owned) {
                        news(key, before.map(|one| one.ownership), Some(now));
                    }
                }
                Seen::Gone(service) => {
                    let Some((key, gone)) = service_key(&service.metadata).zip(Owned::read(service)) else { continue };
                    if let Some(before) = self.services.is_gone(&key, &gone.uid, &gone.version) {
                        news(key, Some(before.ownership), None);
                    }
                }
            }
        }
        facts
    }

    fn see_slices(&mut self, seen: Vec<Seen<OurSlice>>) {
        for seen in seen {
            let listed = matches!(seen, Seen::Listed(_));
            match seen {
                Seen::ListBegins => self.slices.list_begins(),
                Seen::ListEnds(version) => {
                    for ((_, name), gone) in self.slices.list_ends(&version) {
                        self.slice_is_gone(&gone.service, &name);
                    }
                    // Whoever had taken a name may be gone; the next attempt shows it.
                    self.occupied.clear();
                }
                Seen::Listed(OurSlice { place, standing: Some(standing), .. })
                | Seen::Stands(OurSlice { place, standing: Some(standing), .. }) => {
                    self.slice_is_seen(place, standing, listed);
                }
                Seen::Listed(slice) | Seen::Stands(slice) | Seen::Gone(slice) => {
                    if let Some(gone) = self.slices.is_gone(&slice.place, &slice.uid, &slice.version) {
                        self.slice_is_gone(&gone.service, &slice.place.1);
                    }
                }
            }
        }
    }

    fn slice_is_seen(&mut self, place: Place, standing: Standing, listed: bool) {
        let service = standing.service.clone();
        if let Told::News(before) = self.slice_stands(place, standing, listed) {
            self.marks.extend(before.into_iter().map(|before| Changed::Service(before.service)));
            self.marks.insert(Changed::Service(service));
        }
    }

    fn slice_is_gone(&mut self, service: &ServiceKey, name: &str) {
        self.forget(service, name);
        self.marks.insert(Changed::Service(service.clone()));
    }

    /// Holds a slice, unless it is known better.
    fn slice_stands(&mut self, place: Place, standing: Standing, listed: bool) -> Told<Standing> {
        let (service, name) = (standing.service.clone(), place.1.clone());
        let told = if listed { self.slices.listed(place, standing) } else { self.slices.stands(place, standing) };
        if let Told::News(before) = &told {
            if let Some(before) = before.as_ref().filter(|before| before.service != service) {
                self.forget(&before.service, &name);
            }
            if let Some(occupied) = self.occupied.get_mut(&service) {
                occupied.remove(&*name);
            }
            self.by_service.entry(service).or_default().insert(name);
        }
        told
    }

    /// The slice `name` does not belong to `service` any more.
    fn forget(&mut self, service: &ServiceKey, name: &str) {
        if let Some(names) = self.by_service.get_mut(service) {
            names.remove(name);
            if names.is_empty() {
                self.by_service.remove(service);
                self.occupied.remove(service);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use k8s_openapi::{
        Metadata,
        apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
        jiff::Timestamp,
    };
    use serde_json::json;

    use super::*;
    use crate::{
        kubernetes::names,
        model::{self, ServiceName},
    };

    fn key(namespace: &str, name: &str) -> ServiceKey {
        let namespace = model::Namespace::parse(namespace).expect("valid");
        ServiceKey::new(namespace, ServiceName::parse(name).expect("valid"))
    }

    fn namespace(name: &str, version: u64) -> Namespace {
        let meta = json!({ "metadata": { "name": name, "uid": format!("uid-{name}"), "resourceVersion": version.to_string() } });
        serde_json::from_value(meta).expect("a Namespace")
    }

    fn deleting<T: Metadata<Ty = ObjectMeta>>(mut object: T) -> T {
        object.metadata_mut().deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        object
    }

    fn service(name: &str, label: Option<&str>, version: u64) -> Service {
        let service = json!({ "metadata": {
            "namespace": "prod", "name": name, "uid": format!("uid-{name}"), "resourceVersion": version.to_string(),
            "labels": label.map(|value| json!({ names::SERVICE: value })),
            "managedFields": [{ "manager": "someone" }],
        } });
        serde_json::from_value(service).expect("a Service")
    }

    fn slice(service: &str, name: &str, uid: &str, version: u64, address: &str) -> EndpointSlice {
        let slice = json!({
            "metadata": {
                "namespace": "prod", "name": name, "uid": uid, "resourceVersion": version.to_string(),
                "labels": { names::MANAGED_BY: names::MANAGER, names::SERVICE_NAME: service },
            },
            "addressType": "IPv4", "endpoints": [{ "addresses": [address] }],
        });
        serde_json::from_value(slice).expect("an EndpointSlice")
    }

    fn seen(seen: Seen<EndpointSlice>) -> Vec<Seen<OurSlice>> {
        vec![seen.read(OurSlice::read).expect("it has a name")]
    }

    /// What the mirror would get now.
    fn changes(cluster: &Cluster) -> Vec<Changed> {
        cluster.changed().now_or_never().unwrap_or_default()
    }

    fn web() -> Vec<Changed> {
        vec![Changed::Service(key("prod", "web"))]
    }

    fn addresses(cluster: &Cluster) -> Vec<String> {
        let slices = cluster.observe(&key("prod", "web")).slices;
        slices.iter().flat_map(|slice| &slice.rows).map(ToString::to_string).collect()
    }

    /// Facts in few words.
    fn said(facts: &[ClusterFact]) -> Vec<String> {
        let one = |fact: &ClusterFact| match fact {
            ClusterFact::Namespace { name, exists } => format!("{name} {exists}"),
            ClusterFact::NamespacesComplete => "complete".into(),
            ClusterFact::Service { service, foreign } => format!("{service} foreign {foreign}"),
            ClusterFact::Endpoints { .. } => "endpoints".into(),
        };
        facts.iter().map(one).collect()
    }

    #[test]
    fn a_late_event_does_not_undo_our_own_write() {
        let cluster = Cluster::new();
        cluster.wrote_slice(&slice("web", "web-1", "a", 20, "10.0.0.2"));
        assert_eq!(addresses(&cluster), ["10.0.0.2"]);
        cluster.see_slices(seen(Seen::Stands(slice("web", "web-1", "a", 18, "10.0.0.1"))));
        assert_eq!(addresses(&cluster), ["10.0.0.2"]);
        cluster.see_slices(seen(Seen::Stands(slice("web", "web-1", "a", 20, "10.0.0.2"))));
        assert_eq!(changes(&cluster), [], "our own write and its echo are no news");

        cluster.see_slices(seen(Seen::Stands(slice("web", "web-1", "a", 21, "10.0.0.3"))));
        assert_eq!((addresses(&cluster), changes(&cluster)), (vec!["10.0.0.3".into()], web()));
        cluster.wrote_slice(&slice("web", "web-1", "a", 19, "10.0.0.9"));
        assert_eq!(addresses(&cluster), ["10.0.0.3"], "an answer that came late");

        cluster.removed_slice("prod", "web-1", "a");
        cluster.see_slices(seen(Seen::Stands(slice("web", "web-1", "a", 21, "10.0.0.3"))));
        cluster.see_slices(seen(Seen::Gone(slice("web", "web-1", "a", 22, "10.0.0.3"))));
        assert_eq!((addresses(&cluster), changes(&cluster)), (vec![], vec![]));
    }

    #[test]
    fn a_slice_that_goes_or_changes_its_service_is_seen_by_both() {
        let cluster = Cluster::new();
        cluster.see_slices(seen(Seen::Stands(slice("web", "web-1", "a", 1, "10.0.0.1"))));
        cluster.see_slices(seen(Seen::Stands(slice("web", "web-2", "b", 2, "10.0.0.2"))));
        assert_eq!(changes(&cluster), web(), "several changes are one");
        assert_eq!(cluster.every_service(), [key("prod", "web")]);
        cluster.see_slices(seen(Seen::Stands(slice("db", "web-2", "b", 3, "10.0.0.2"))));
        assert_eq!(changes(&cluster), [Changed::Service(key("prod", "db")), web().remove(0)]);
        assert_eq!(addresses(&cluster), ["10.0.0.1"]);
        assert_eq!(cluster.every_service(), [key("prod", "db"), key("prod", "web")]);
        // Another hand took the label off that says whose it is.
        let mut nobodys = slice("db", "web-2", "b", 4, "10.0.0.2");
        nobodys.metadata.labels.as_mut().expect("it has labels").remove(names::SERVICE_NAME);
        cluster.see_slices(seen(Seen::Stands(nobodys)));
        assert_eq!(changes(&cluster), [Changed::Service(key("prod", "db"))]);
        cluster.see_slices(seen(Seen::Gone(slice("web", "web-1", "a", 5, "10.0.0.1"))));
        assert_eq!((changes(&cluster), cluster.every_service()), (web(), vec![]));
    }

    #[test]
    fn after_a_list_what_it_did_not_name_is_gone() {
        let cluster = Cluster::new();
        assert!(!cluster.observe(&key("prod", "web")).listed);
        cluster.see_slices(seen(Seen::Stands(slice("web", "web-1", "a", 1, "10.0.0.1"))));
        cluster.see_slices(seen(Seen::Stands(slice("web", "web-2", "b", 2, "10.0.0.2"))));
        cluster.occupied(&key("prod", "web"), "web-3");
        assert_eq!(cluster.observe(&key("prod", "web")).occupied, HashSet::from(["web-3".into()]));
        changes(&cluster);
        cluster.see_slices(seen(Seen::ListBegins));
        cluster.see_slices(seen(Seen::Listed(slice("web", "web-2", "b", 2, "10.0.0.2"))));
        cluster.wrote_slice(&slice("web", "web-4", "d", 9, "10.0.0.4"));
        assert_eq!(changes(&cluster), [], "half a list says nothing of the rest");
        cluster.see_slices(seen(Seen::ListEnds("8".into())));
        assert_eq!((addresses(&cluster), changes(&cluster)), (vec!["10.0.0.2".into(), "10.0.0.4".into()], web()));
        let observed = cluster.observe(&key("prod", "web"));
        assert_eq!((observed.listed, observed.occupied), (true, HashSet::new()));
    }

    #[test]
    fn a_service_is_ours_joined_foreign_or_not_there() {
        let cluster = Cluster::new();
        let standing = || cluster.observe(&key("prod", "web")).service;
        let joined = || cluster.joined().borrow().iter().cloned().collect::<Vec<_>>();
        assert_eq!(standing(), StandingService::Unknown);
        let first = vec![Seen::ListBegins, Seen::Listed(service("9lives", None, 1)), Seen::ListEnds("1".into())];
        assert_eq!(said(&cluster.see_services(first)), [""; 0], "no service of ours can be called so");
        assert_eq!(standing(), StandingService::Absent);

        cluster.wrote_service(&service("web", Some("owned"), 2));
        let StandingService::Ours(held) = standing() else { panic!("{:?}", standing()) };
        assert_eq!(held.metadata.managed_fields, None);
        let mut touched = service("web", Some("owned"), 3);
        touched.metadata.managed_fields = None;
        assert_eq!(said(&cluster.see_services(vec![Seen::Stands(touched)])), [""; 0]);
        assert_eq!(changes(&cluster), [], "only others' bookkeeping changed");
        assert_eq!(cluster.every_service(), [key("prod", "web")]);

        let see = |seen| (said(&cluster.see_services(vec![seen])), changes(&cluster));
        assert_eq!(see(Seen::Stands(service("web", None, 4))), (vec!["prod/web foreign true".into()], web()));
        assert_eq!(standing(), StandingService::Foreign);
        let joins = Seen::Stands(service("web", Some("joined"), 5));
        assert_eq!(see(joins), (vec!["prod/web foreign false".into()], web()));
        assert_eq!(
            (standing(), joined()),
            (StandingService::Joined { uid: "uid-web".into() }, vec![key("prod", "web")])
        );
        assert_eq!(cluster.every_service(), []);
        let leaves = Seen::Stands(service("web", Some("no"), 6));
        assert_eq!(see(leaves), (vec!["prod/web foreign true".into()], web()));
        assert_eq!(joined(), []);
        assert_eq!(see(Seen::Gone(service("web", None, 7))), (vec!["prod/web foreign false".into()], web()));
        assert_eq!(standing(), StandingService::Absent);
        assert_eq!(see(Seen::Stands(service("web", Some("joined"), 6))), (vec![], vec![]), "late");

        cluster.wrote_service(&service("db", Some("owned"), 10));
        cluster.removed_service(&key("prod", "db"), "uid-db");
        assert_eq!(see(Seen::Stands(service("db", Some("owned"), 10))), (vec![], vec![]), "late");
        assert_eq!(cluster.observe(&key("prod", "db")).service, StandingService::Absent);
    }

    #[test]
    fn whose_a_service_is_only_the_watch_says() {
        let cluster = Cluster::new();
        let see = |seen| (said(&cluster.see_services(vec![seen])), changes(&cluster));
        // The answer to a POST that came second, read before the watch told.
        cluster.wrote_service(&service("web", None, 3));
        cluster.wrote_service(&service("web", Some("joined"), 4));
        assert_eq!(see(Seen::Stands(service("web", None, 3))), (vec!["prod/web foreign true".into()], web()));
        cluster.wrote_service(&service("web", Some("owned"), 5));
        cluster.removed_service(&key("prod", "web"), "uid-web");
        assert_eq!(cluster.observe(&key("prod", "web")).service, StandingService::Foreign);
        let ours = Seen::Stands(service("web", Some("owned"), 5));
        assert_eq!(see(ours), (vec!["prod/web foreign false".into()], web()));
    }

    #[test]
    fn a_namespace_that_goes_takes_the_right_to_register_with_it() {
        let cluster = Cluster::new();
        let state = || cluster.observe(&key("prod", "web")).namespace;
        assert_eq!(state(), NamespaceState::Unknown);
        let see = |seen| said(&cluster.see_namespaces(seen));
        let page = vec![Seen::ListBegins, Seen::Listed(namespace("prod", 1)), Seen::Listed(namespace("stage", 2))];
        assert_eq!(see(page), ["prod true", "stage true"]);
        assert_eq!(state(), NamespaceState::Active);
        assert_eq!(see(vec![Seen::Listed(deleting(namespace("old", 3))), Seen::ListEnds("3".into())]), ["complete"]);
        cluster.see_slices(seen(Seen::Stands(slice("web", "web-1", "a", 1, "10.0.0.1"))));
        changes(&cluster);

        assert_eq!(see(vec![Seen::Stands(deleting(namespace("prod", 4)))]), ["prod false"]);
        assert_eq!(state(), NamespaceState::Terminating);
        assert_eq!(changes(&cluster), [Changed::Namespace("prod".into()), web().remove(0)]);
        assert_eq!(see(vec![Seen::Gone(deleting(namespace("prod", 5)))]), [""; 0], "it is known already");
        assert_eq!(state(), NamespaceState::Absent);
        assert_eq!(see(vec![Seen::ListBegins, Seen::ListEnds("9".into())]), ["stage false"]);
    }

    #[tokio::test]
    async fn whoever_waits_is_woken_and_drops_nothing() {
        let cluster = Arc::new(Cluster::new());
        let mut waits = Box::pin(cluster.changed());
        assert_eq!(waits.as_mut().now_or_never(), None);
        cluster.see_slices(seen(Seen::Stands(slice("web", "web-1", "a", 1, "10.0.0.1"))));
        drop(waits);
        assert_eq!(cluster.changed().await, web());
        let tell = async { cluster.see_slices(seen(Seen::Gone(slice("web", "web-1", "a", 2, "10.0.0.1")))) };
        assert_eq!(futures::join!(cluster.changed(), tell).0, web());
    }
}
