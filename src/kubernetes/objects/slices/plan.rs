//! Plans the writes after which the slices of a service show its instances.
//!
//! Placement is stable. An endpoint that is in a slice stays there; a new one goes into the
//! fullest slice with room, and where none has any into a new slice with the lowest free index;
//! a slice left without endpoints is deleted. So one change rewrites one slice, with these
//! exceptions: an instance whose ports change moves to the slices of another [`SliceGroup`], one of a
//! split group is in a slice for each of its protocols, and a smaller
//! [`max_endpoints`](PlanOptions::max_endpoints) moves what no longer fits.
//!
//! The order of the writes is such that an instance that moves is not missing in between: slices
//! that gain endpoints come before those that lose some. Only two instances that swap ports in one
//! batch may be missing: their slices gain and lose at once.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::Arc,
};

use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::{
    group::{Family, PortList, SliceGroup},
    observed::{ObservedSlice, addresses_of, is_resolved},
    record::{EXTRA_NAME_BYTES, MAX_ENTRY_BYTES, MAX_PORT_LIST_BYTES, registrant_bytes},
    render::{SliceEndpoint, SliceStamps, digest, render},
    tombstones,
};
use crate::{
    model::{Address, CowTree, DnsName, Instance, InstanceId, InstanceKey, Resolution, ServiceKey},
    replicas::tombstones::Tombstones,
};

/// Default limit of endpoints in a slice, that of Kubernetes' own controller.
pub const DEFAULT_MAX_ENDPOINTS: usize = 100;

/// Most endpoints in a slice that Kubernetes allows.
pub const MAX_ENDPOINTS: usize = 1000;

/// Most bytes of annotations on a slice. Kubernetes allows 256 KiB; the rest is left for annotations
/// of others.
const MAX_ANNOTATION_BYTES: usize = 240 * 1024;

/// Bytes of it for the stamps, the keys and the list of ports.
const FIXED_ANNOTATIONS: usize = MAX_PORT_LIST_BYTES + 2048;

/// For which service slices are planned, and with which limits.
#[derive(Debug, Clone, Copy)]
pub struct PlanOptions<'a> {
    /// Whose slices they are.
    pub service: &'a ServiceKey,
    /// The uid of its Service, which owns the slices.
    pub service_uid: &'a str,
    /// Most endpoints in a slice, taken as 1..=1000. Default 100.
    pub max_endpoints: usize,
    /// Instances that are not ready are shown as ready: CoreDNS ignores `publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// A name that is alone in the service is shown by its addresses, too: others have addresses there, or it is wanted so.
    pub flatten_names: bool,
    /// What the names lead to. Of one that is missing nothing is known yet: while it is served, the slices of what names lead
    /// to stay as they are.
    pub resolutions: &'a HashMap<DnsName, Arc<Resolution>>,
    /// The removals that are remembered.
    pub tombstones: &'a Tombstones,
    /// The stamps of every slice that is written.
    pub stamps: SliceStamps<'a>,
    /// Names in the namespace that are taken by slices of others.
    pub occupied: &'a HashSet<String>,
}

/// One change to the slices of a service.
#[derive(Debug, Clone, PartialEq)]
pub enum SliceWrite {
    /// POST
    Create(EndpointSlice),
    /// PUT; uid and resourceVersion are set.
    Replace(EndpointSlice),
    /// DELETE, with uid and resourceVersion as preconditions.
    Delete {
        /// Its name.
        name: String,
        /// Its uid.
        uid: String,
        /// Its resourceVersion.
        resource_version: String,
    },
}

impl SliceWrite {
    /// Of the slice.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Create(slice) | Self::Replace(slice) => slice.metadata.name.as_deref().unwrap_or_default(),
            Self::Delete { name, .. } => name,
        }
    }

    /// The addresses of instances in the slice after the write.
    pub fn addresses(&self) -> impl Iterator<Item = Address> {
        let endpoints = match self {
            Self::Create(slice) | Self::Replace(slice) if !is_resolved(slice) => &slice.endpoints[..],
            _ => &[],
        };
        addresses_of(endpoints)
    }

    /// Whether the slice holds tombstones after the write.
    #[must_use]
    pub fn has_tombstones(&self) -> bool {
        match self {
            Self::Create(slice) | Self::Replace(slice) => tombstones::is_of_tombstones(slice),
            Self::Delete { .. } => false,
        }
    }
}

/// The writes after which the slices of a service show exactly `instances`, in the order in which
/// to make them. Empty if nothing has to change.
///
/// `observed_slices` are all slices of ours that belong to the service.
#[must_use]
pub fn plan<'a>(
    options: &PlanOptions<'_>,
    instances: &CowTree<Arc<Instance>>,
    observed_slices: impl IntoIterator<Item = &'a ObservedSlice>,
) -> Vec<SliceWrite> {
    let observed_slices: Vec<&ObservedSlice> = observed_slices.into_iter().collect();
    // Names of all slices of ours, whatever their group: another name is the only way to a second slice.
    let mut taken: HashSet<&str> = options.occupied.iter().map(String::as_str).collect();
    taken.extend(observed_slices.iter().map(|slice| &*slice.name));
    let mut writes = SliceWrites::default();

    let mut by_group: HashMap<&SliceGroup, Vec<&ObservedSlice>> = HashMap::new();
    writes.tombstones(options, observed_slices.iter().copied().filter(|slice| slice.tombstones), &taken);
    for &slice in observed_slices.iter().filter(|slice| !slice.deleting && !slice.tombstones) {
        match &slice.group {
            Some(group) => by_group.entry(group).or_default().push(slice),
            // Nothing that gangplank writes looks so: it is left from somebody's edit, or from an older version.
            None => writes.delete(slice),
        }
    }
    let alias = alias(options, instances);
    let mut new_names = HashSet::new();
    let names_resolved = match alias {
        Some(_) => Vec::new(),
        None => resolved(options, instances).unwrap_or_else(|| {
            by_group.retain(|group, _| !group.resolved);
            Vec::new()
        }),
    };
    for (group, members) in grouped(instances).into_iter().chain(names_resolved) {
        let slices = by_group.remove(&group).unwrap_or_default();
        let mut names = (0..).map(|index| group.slice_name(options.service, index));
        for assignment in assign(options, &members, slices) {
            let endpoints = assignment.members.iter().map(|&at| {
                let (address, instance) = &members[at];
                if group.resolved {
                    return SliceEndpoint::resolved(instance, address.clone());
                }
                let is_shown = match instance.address() {
                    Address::Ip(_) => true,
                    Address::Name(name) => alias == Some(name),
                };
                SliceEndpoint::of(instance, is_shown && is_served(options, instance))
            });
            let endpoints: Vec<SliceEndpoint<'_>> = endpoints.collect();
            if let Some(slice) = assignment.slice {
                writes.update(options, slice, &assignment, &group, &endpoints);
            } else {
                let name = names
                    .find(|name| !taken.contains(&**name) && !new_names.contains(name))
                    .expect("there are more indexes than slices");
                writes.create(options, &name, &group, &endpoints);
                new_names.insert(name);
            }
        }
    }
    // What is left has the ports of no instance.
    by_group.into_values().flatten().for_each(|slice| writes.delete(slice));
    writes.in_order()
}

/// Whether an instance is ready to consumers. As Kubernetes does it for pods: `publishNotReadyAddresses` of the Service makes
/// every endpoint ready.
fn is_served(options: &PlanOptions<'_>, instance: &Instance) -> bool {
    instance.ready() || options.publish_not_ready
}

/// The name that all served instances have, by which the service is an alias of it. CoreDNS answers a CNAME for each ready
/// name, so there must be no other and no address (RFC 1034 §3.6.2).
fn alias<'a>(options: &PlanOptions<'_>, instances: &'a CowTree<Arc<Instance>>) -> Option<&'a DnsName> {
    let mut served = instances.iter().filter(|instance| is_served(options, instance));
    let first = served.next().filter(|_| !options.flatten_names)?.address();
    // IP addresses are before names, so this ends at once in a service without names.
    let Address::Name(name) = first else { return None };
    served.all(|instance| instance.address() == first).then_some(name)
}

/// The addresses of the names that are served, by group, each in order and once. An address that is served as an instance
/// with the same ports is left out. `None` while nothing is known of one of the names.
fn resolved<'a>(
    options: &PlanOptions<'_>,
    instances: &'a CowTree<Arc<Instance>>,
) -> Option<Vec<(SliceGroup, Vec<GroupMember<'a>>)>> {
    let mut groups = Groups::default();
    for instance in instances.iter().filter(|instance| is_served(options, instance)) {
        let Address::Name(name) = instance.address() else { continue };
        let resolution = options.resolutions.get(name)?;
        for ip in resolution.addresses().into_iter().flat_map(|found| found.iter()) {
            let id = InstanceId { address: Address::Ip(ip), ports: instance.ports().set() };
            if !instances.get(&InstanceKey::from(&id)).is_some_and(|plain| is_served(options, plain)) {
                groups.add(id.address, instance, true);
            }
        }
    }
    for (_, members) in &mut groups.groups {
        // Several names may lead to one address: the first counts.
        members.sort_by(|a, b| a.0.cmp(&b.0));
        members.dedup_by(|a, b| a.0 == b.0);
    }
    Some(groups.groups)
}

/// The writes, by when they may be made.
#[derive(Default)]
struct SliceWrites {
    creates: Vec<SliceWrite>,
    /// Slices that give nothing up, those that give and take, and the others.
    replaces: [Vec<SliceWrite>; 3],
    deletes: Vec<SliceWrite>,
}

impl SliceWrites {
    fn create(&mut self, options: &PlanOptions<'_>, name: &str, group: &SliceGroup, endpoints: &[SliceEndpoint<'_>]) {
        let mut slice = render(options.service, options.service_uid, name, group, endpoints);
        stamp(&mut slice, options.stamps);
        self.creates.push(SliceWrite::Create(slice));
    }

    /// The writes for the slice of tombstones: before all others, so that no instance is gone without its tombstone.
    fn tombstones<'a>(
        &mut self,
        options: &PlanOptions<'_>,
        slices: impl Iterator<Item = &'a ObservedSlice>,
        taken: &HashSet<&str>,
    ) {
        let mut slices: Vec<&ObservedSlice> = slices.filter(|slice| !slice.deleting).collect();
        slices.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        if options.tombstones.is_empty() {
            return slices.into_iter().for_each(|slice| self.delete(slice));
        }
        let Some((slice, surplus)) = slices.split_first() else {
            let mut names = (0..).map(|index| tombstones::name(options.service, index));
            let name = names.find(|name| !taken.contains(&**name)).expect("there are more indexes than slices");
            let mut slice = tombstones::render(options.service, &name, options.tombstones);
            stamp(&mut slice, options.stamps);
            return self.creates.push(SliceWrite::Create(slice));
        };
        surplus.iter().for_each(|slice| self.delete(slice));
        if slice.term > options.stamps.term || slice.digest != Some(tombstones::digest(options.tombstones)) {
            let write = tombstones::render(options.service, &slice.name, options.tombstones);
            // Before every write that takes something away: an instance must not be gone from its slice without its
            // tombstone.
            self.replaces[0].insert(0, replacement(options, slice, write));
        }
    }

    /// The write for an existing slice, if it has to change.
    fn update(
        &mut self,
        options: &PlanOptions<'_>,
        slice: &ObservedSlice,
        assignment: &Assignment<'_>,
        group: &SliceGroup,
        endpoints: &[SliceEndpoint<'_>],
    ) {
        if endpoints.is_empty() {
            return self.delete(slice);
        }
        // No process writes under a term that is higher than the Lease's, so somebody has edited the slice.
        let ours = slice.term <= options.stamps.term;
        if ours && slice.digest == Some(digest(options.service_uid, group, endpoints)) {
            return;
        }
        let write = render(options.service, options.service_uid, &slice.name, group, endpoints);
        // 0 loses nothing, 1 gains and loses, 2 loses only: an instance that moves is in both slices for a moment, not
        // in none.
        let turn = if assignment.loses { if assignment.gains { 1 } else { 2 } } else { 0 };
        self.replaces[turn].push(replacement(options, slice, write));
    }

    fn delete(&mut self, slice: &ObservedSlice) {
        let ObservedSlice { name, uid, resource_version, .. } = slice;
        let (name, uid, resource_version) = (name.clone(), uid.clone(), resource_version.clone());
        self.deletes.push(SliceWrite::Delete { name, uid, resource_version });
    }

    fn in_order(mut self) -> Vec<SliceWrite> {
        // A map yields them in random order.
        self.deletes.sort_by(|a, b| a.name().cmp(b.name()));
        let replaces = self.replaces.into_iter().flatten();
        self.creates.into_iter().chain(replaces).chain(self.deletes).collect()
    }
}

/// `write` in place of `slice`.
fn replacement(options: &PlanOptions<'_>, slice: &ObservedSlice, mut write: EndpointSlice) -> SliceWrite {
    stamp(&mut write, options.stamps);
    write.metadata.uid = Some(slice.uid.clone());
    write.metadata.resource_version = Some(slice.resource_version.clone());
    // A PUT replaces everything: what others have put on the slice would be lost.
    if let Some(foreign) = &slice.foreign {
        foreign.carry_over(&mut write.metadata);
    }
    SliceWrite::Replace(write)
}

fn stamp(slice: &mut EndpointSlice, stamps: SliceStamps<'_>) {
    let annotations = slice.metadata.annotations.get_or_insert_default();
    annotations.extend(stamps.annotations().map(|(key, value)| (key.to_owned(), value)));
}

/// An instance with its address, or with one that its name leads to.
type GroupMember<'a> = (Address, &'a Instance);

/// The instances by group, each in order of address. An instance with split ports is in several.
fn grouped(instances: &CowTree<Arc<Instance>>) -> Vec<(SliceGroup, Vec<GroupMember<'_>>)> {
    let mut groups = Groups::default();
    instances.iter().for_each(|instance| groups.add(instance.address().clone(), instance, false));
    groups.groups
}

#[derive(Default)]
struct Groups<'a> {
    groups: Vec<(SliceGroup, Vec<GroupMember<'a>>)>,
    /// Most instances of a service have the same ports, so groups are made once for each list.
    known: HashMap<(Family, PortList<'a>), Range<usize>, foldhash::fast::RandomState>,
}

impl<'a> Groups<'a> {
    fn add(&mut self, address: Address, instance: &'a Instance, resolved: bool) {
        let (family, groups) = (Family::of(&address), &mut self.groups);
        let range = self.known.entry((family, PortList(instance.ports()))).or_insert_with(|| {
            let first = groups.len();
            let parts = SliceGroup::all(family, instance.ports()).into_iter();
            groups.extend(parts.map(|group| (SliceGroup { resolved, ..group }, Vec::new())));
            first..groups.len()
        });
        for (_, members) in &mut groups[range.clone()] {
            members.push((address.clone(), instance));
        }
    }
}

/// A slice and the members of its group that are in it, by index, in order.
struct Assignment<'a> {
    /// The existing slice; `None` for a new one.
    slice: Option<&'a ObservedSlice>,
    members: Vec<usize>,
    capacity: usize,
    /// It gains members.
    gains: bool,
    /// It loses members.
    loses: bool,
}

/// Assigns every member of a group to a slice. `members` are in order of address.
fn assign<'a>(
    options: &PlanOptions<'_>,
    members: &[GroupMember<'_>],
    mut slices: Vec<&'a ObservedSlice>,
) -> Vec<Assignment<'a>> {
    let entry_bytes = entry_bytes(members);
    // An endpoint that is in two slices stays in the larger.
    slices.sort_unstable_by(|a, b| b.addresses.len().cmp(&a.addresses.len()).then_with(|| a.name.cmp(&b.name)));
    let mut assigned = vec![false; members.len()];
    let stays = slices.into_iter().map(|slice| {
        let capacity = capacity(options, Some(slice), entry_bytes);
        let mut stay = Vec::new();
        for address in &slice.addresses {
            if stay.len() < capacity
                && let Ok(at) = members.binary_search_by_key(&address, |(address, _)| address)
                && !std::mem::replace(&mut assigned[at], true)
            {
                stay.push(at);
            }
        }
        let loses = stay.len() < slice.addresses.len();
        Assignment { slice: Some(slice), members: stay, capacity, gains: false, loses }
    });
    let mut assignments: Vec<Assignment<'a>> = stays.collect();

    // The fullest first; a slice that nobody stays in is not filled again but deleted, unless
    // there is no other with room: then it saves a creation.
    assignments.sort_by_key(|assignment| std::cmp::Reverse(assignment.members.len()));
    // Slices fill up in order, so that none that is full is looked at again: linear in instances and slices.
    let mut open = 0;
    for at in assigned.iter().enumerate().filter(|(_, assigned)| !**assigned).map(|(at, _)| at) {
        while assignments.get(open).is_some_and(|assignment| assignment.members.len() >= assignment.capacity) {
            open += 1;
        }
        if open == assignments.len() {
            let capacity = capacity(options, None, entry_bytes);
            assignments.push(Assignment { slice: None, members: Vec::new(), capacity, gains: true, loses: false });
        }
        assignments[open].members.push(at);
        assignments[open].gains = true;
    }
    for assignment in assignments.iter_mut().filter(|assignment| assignment.gains) {
        assignment.members.sort_unstable();
    }
    assignments
}

/// Most bytes of an entry in the annotation of a group's slices. In coarse steps, because a longer registrant may make
/// room for fewer endpoints, and then each slice that has more is written anew.
fn entry_bytes(members: &[GroupMember<'_>]) -> usize {
    let longest = members.iter().map(|(_, instance)| registrant_bytes(instance.registrant())).max();
    let name = members.first().is_some_and(|(address, _)| address.ip().is_none());
    let address = MAX_ENTRY_BYTES + if name { EXTRA_NAME_BYTES } else { 0 };
    address + longest.filter(|&bytes| bytes > 0).map_or(0, |bytes| bytes.next_power_of_two().max(128))
}

/// How many endpoints a slice may have: fewer than usual if long registrants, or annotations of others, use much of what
/// Kubernetes allows.
fn capacity(options: &PlanOptions<'_>, slice: Option<&ObservedSlice>, entry_bytes: usize) -> usize {
    let foreign = slice.and_then(|slice| slice.foreign.as_ref()).map_or(0, |foreign| foreign.annotation_octets());
    let octets = MAX_ANNOTATION_BYTES.saturating_sub(FIXED_ANNOTATIONS + foreign);
    options.max_endpoints.clamp(1, MAX_ENDPOINTS).min(octets / entry_bytes)
}
