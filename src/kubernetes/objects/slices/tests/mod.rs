//! What the tests of slices share: instances, requests, and a [`Cluster`] to write to.

mod cases;
mod cluster;
mod generated;

use std::{collections::HashMap, sync::Arc};

use k8s_openapi::api::discovery::v1::EndpointSlice;

use cluster::Cluster;

use super::*;
use crate::kubernetes::objects::names;
use crate::model::{
    CowTree, DnsName, Instance, InstanceSpec, PortSpec, Protocol, Resolution, ResolvedAddresses, ServiceKey,
    UnixMillis, Validator,
};
use crate::replicas::tombstones::Tombstones;

pub(in crate::kubernetes) use crate::model::testing::VALIDATOR;

const UID: &str = "0d3cf0a4-0000-4000-8000-000000000001";

pub(in crate::kubernetes) fn web() -> ServiceKey {
    VALIDATOR.service("prod", "web").expect("valid")
}

/// `(number, protocol, name)`.
pub(in crate::kubernetes) type PortTuple = (i64, Protocol, &'static str);

pub(in crate::kubernetes) fn spec(address: &str, ports: &[PortTuple]) -> InstanceSpec {
    let ports =
        ports.iter().map(|&(number, protocol, name)| PortSpec { number, protocol, name: name.into() }).collect();
    InstanceSpec { address: address.into(), ports, ..InstanceSpec::default() }
}

pub(in crate::kubernetes) fn instance(spec: &InstanceSpec) -> Arc<Instance> {
    Arc::new(VALIDATOR.instance(&web(), spec, UnixMillis(1_700_000_000_000)).expect("valid"))
}

pub(in crate::kubernetes) fn table(specs: &[InstanceSpec]) -> CowTree<Arc<Instance>> {
    let mut table = CowTree::default();
    for spec in specs {
        table.put(instance(spec));
    }
    table
}

pub(in crate::kubernetes) const TCP: Protocol = Protocol::Tcp;
pub(in crate::kubernetes) const UDP: Protocol = Protocol::Udp;

pub(in crate::kubernetes) const HTTP: &[PortTuple] = &[(8080, TCP, "http")];
const DNS: &[PortTuple] = &[(53, TCP, "dns"), (53, UDP, "dns"), (9153, TCP, "")];

fn stamps(generation: u64) -> SliceStamps<'static> {
    SliceStamps { term: 7, generation, updated: UnixMillis(1_700_000_000_123), writer: "gangplank-0" }
}

/// What the names of the tests lead to: an address that is an instance too, one that both have, and one of their own.
fn resolutions() -> HashMap<DnsName, Arc<Resolution>> {
    let names = [
        ("db.example.com", &["10.0.0.1", "10.0.0.77", "2001:db8::77"][..]),
        ("mail.example.com", &["10.0.0.77", "10.0.0.78"]),
    ];
    let resolution = |addresses: &[&str]| {
        let addresses = addresses.iter().map(|text| text.parse().expect("an address"));
        Arc::new(Resolution::Addresses(ResolvedAddresses::new(addresses, 5)))
    };
    names.map(|(name, addresses)| (DnsName::parse(name).expect("a name"), resolution(addresses))).into()
}

/// Calls `test` with a request for [`web`].
fn with_request<T>(max_endpoints: usize, occupied: &[&str], test: impl FnOnce(&PlanOptions<'_>) -> T) -> T {
    let service = web();
    let occupied = occupied.iter().map(ToString::to_string).collect();
    test(&PlanOptions {
        service: &service,
        service_uid: UID,
        max_endpoints,
        publish_not_ready: false,
        flatten_names: false,
        resolutions: &resolutions(),
        tombstones: &Tombstones::default(),
        stamps: stamps(1),
        occupied: &occupied,
    })
}

/// What comes back from slices: ready, and without a host name that only spells the address.
fn as_recorded(instances: &CowTree<Arc<Instance>>) -> Vec<Instance> {
    let mut all: Vec<Instance> = instances.iter().map(|one| (**one).clone().with_ready(true)).collect();
    all.sort_by(|a, b| a.key().cmp(&b.key()));
    all
}

/// What the slices of one service hold together.
fn read<'a>(
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    validator: &Validator,
) -> (Vec<Arc<Instance>>, Vec<SkippedEndpoint>) {
    let (mut view, mut all_skipped) = (SliceView::default(), Vec::new());
    for slice in slices {
        let (instances, skipped) = read_slice(slice, validator);
        all_skipped.extend(skipped);
        let stamp = |key| observed::stamp(&slice.metadata, key).unwrap_or(0);
        let rank = SliceRank { term: stamp(names::TERM), generation: stamp(names::GENERATION) };
        view.apply(&web(), &slice.metadata, rank, instances);
    }
    (view.instances(&web()), all_skipped)
}

fn read_back(cluster: &Cluster) -> Vec<Instance> {
    let (read, skipped) = read(cluster.slices.values(), &VALIDATOR);
    assert_eq!(skipped, []);
    let mut read: Vec<Instance> = read.iter().map(|one| (**one).clone()).collect();
    read.sort_by(|a, b| a.key().cmp(&b.key()));
    read
}
