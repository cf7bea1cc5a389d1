//! The address ranges of the cluster's Services: nobody may register an address of them.

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use tracing::warn;

use super::reflector::EventHandler;
use crate::{
    kubernetes::cache::ObjectEvent,
    registry::{ClusterFact, RegistryHandle, Unavailable},
};

/// Handles ServiceCIDRs. One that is being deleted counts until it is gone, as for the API server.
pub(super) struct ServiceRangesHandler<'a> {
    registry: &'a RegistryHandle,
    ranges: Ranges,
}

impl<'a> ServiceRangesHandler<'a> {
    pub(super) fn new(registry: &'a RegistryHandle) -> Self {
        Self { registry, ranges: Ranges::default() }
    }
}

impl EventHandler<ServiceCIDR> for ServiceRangesHandler<'_> {
    async fn handle(&mut self, events: Vec<ObjectEvent<ServiceCIDR>>) -> Result<(), Unavailable> {
        for event in events {
            self.ranges.apply(event);
        }
        match self.ranges.known() {
            Some(ranges) => self.registry.learn(vec![ClusterFact::ServiceRanges(ranges)]).await,
            None => Ok(()),
        }
    }
}

/// By name of the object.
#[derive(Debug, Default)]
struct Ranges {
    known: BTreeMap<String, Vec<IpNet>>,
    /// The list that has begun; what it lacks is gone only when it is complete.
    listing: Option<BTreeMap<String, Vec<IpNet>>>,
    is_complete: bool,
}

impl Ranges {
    fn apply(&mut self, event: ObjectEvent<ServiceCIDR>) {
        match event {
            ObjectEvent::Init => self.listing = Some(BTreeMap::new()),
            ObjectEvent::InitApply(object) => {
                let (name, ranges) = read(object);
                self.listing.get_or_insert_default().insert(name, ranges);
            }
            // Replaced as a whole: ranges that were removed while the watch was away go with it.
            ObjectEvent::InitDone(_) => {
                self.known = self.listing.take().unwrap_or_default();
                self.is_complete = true;
            }
            ObjectEvent::Apply(object) => {
                let (name, ranges) = read(object);
                self.known.insert(name, ranges);
            }
            ObjectEvent::Delete(object) => drop(self.known.remove(&object.metadata.name.unwrap_or_default())),
        }
    }

    /// All of them, once a list was complete.
    fn known(&self) -> Option<Vec<IpNet>> {
        self.is_complete.then(|| self.known.values().flatten().copied().collect())
    }
}

fn read(object: ServiceCIDR) -> (String, Vec<IpNet>) {
    let name = object.metadata.name.unwrap_or_default();
    let texts = object.spec.and_then(|spec| spec.cidrs).unwrap_or_default();
    let parse = |text: &String| {
        text.parse::<IpNet>()
            .inspect_err(
                |err| warn!(servicecidr = name, range = text, error = %err, "the range cannot be read: skipped"),
            )
            .ok()
    };
    let ranges = texts.iter().filter_map(parse).collect();
    (name, ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(name: &str, cidrs: &[&str]) -> ServiceCIDR {
        let object = serde_json::json!({ "metadata": { "name": name }, "spec": { "cidrs": cidrs } });
        serde_json::from_value(object).expect("a ServiceCIDR")
    }

    #[test]
    fn ranges_are_those_of_the_last_complete_list_and_what_followed() {
        let mut ranges = Ranges::default();
        let mut known = |events: Vec<ObjectEvent<ServiceCIDR>>| {
            events.into_iter().for_each(|event| ranges.apply(event));
            let known = ranges.known();
            known.map(|known| known.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        let list = |objects: Vec<ServiceCIDR>| {
            let objects = objects.into_iter().map(ObjectEvent::InitApply);
            std::iter::once(ObjectEvent::Init).chain(objects).collect::<Vec<_>>()
        };
        let kubernetes = || object("kubernetes", &["10.96.0.0/12", "fd00::/108"]);
        assert_eq!(known(list(vec![kubernetes()])), None, "half a list");
        assert_eq!(known(vec![ObjectEvent::InitDone("1".into())]).as_deref(), Some("10.96.0.0/12 fd00::/108"));
        let more = known(vec![ObjectEvent::Apply(object("more", &["10.200.0.0/24", "no range"]))]);
        assert_eq!(more.as_deref(), Some("10.96.0.0/12 fd00::/108 10.200.0.0/24"));
        assert_eq!(known(list(vec![kubernetes()])), more, "half a list takes nothing away");
        assert_eq!(known(vec![ObjectEvent::InitDone("2".into())]).as_deref(), Some("10.96.0.0/12 fd00::/108"));
        assert_eq!(known(vec![ObjectEvent::Delete(kubernetes())]).as_deref(), Some(""));
    }
}
