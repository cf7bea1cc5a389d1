//! A plan of which the API server refuses a part.
//!
//! What it refuses it refuses again, so the rest is not held up by it: instances that went away have
//! to leave their slices. But nobody may miss an endpoint because of it: what a refused write was
//! to bring in stays where it is.

use std::{
    collections::{HashSet, VecDeque},
    net::IpAddr,
};

use crate::kubernetes::{
    client::Fault,
    slices::{Standing, Write},
};

/// One write of a plan, and what stands under its name.
pub(super) struct Step<'a> {
    pub(super) before: Option<&'a Standing>,
    pub(super) write: Write,
}

impl Step<'_> {
    fn had(&self) -> &[IpAddr] {
        self.before.map_or(&[], |before| &before.rows)
    }

    /// Whether it takes one of `addresses` out of its slice.
    fn takes_out(&self, addresses: &HashSet<IpAddr>) -> bool {
        let mut affected = self.had().iter().filter(|ip| addresses.contains(ip)).peekable();
        affected.peek().is_some() && {
            let stays: HashSet<IpAddr> = self.write.addresses().collect();
            affected.any(|ip| !stays.contains(ip))
        }
    }

    /// What it puts into its slice.
    fn brings_in(&self) -> impl Iterator<Item = IpAddr> {
        self.write.addresses().filter(|ip| !self.had().contains(ip))
    }
}

/// What the API server refused of one plan.
#[derive(Default)]
pub(super) struct Refused {
    /// The first refusal.
    pub(super) err: Option<Fault>,
    /// Addresses that are not where they should be because of it.
    missing: HashSet<IpAddr>,
}

impl Refused {
    /// Gives back whether `step` was refused.
    ///
    /// # Errors
    /// A fault that ends the plan: not a refusal of this one write.
    pub(super) fn note(&mut self, step: &Step<'_>, done: Result<(), Fault>) -> Result<bool, Fault> {
        match done {
            Ok(()) => Ok(false),
            Err(err) if is_refusal(&err) => {
                self.missing.extend(step.brings_in());
                self.err.get_or_insert(err);
                Ok(true)
            }
            Err(err) => Err(err),
        }
    }

    /// Drops the steps that would take away what is missing elsewhere, and those that would take
    /// away what a dropped one was to bring in, and so on. They are planned again.
    pub(super) fn hold_back(&mut self, steps: &mut VecDeque<Step<'_>>) {
        let mut before = usize::MAX;
        while !self.missing.is_empty() && steps.len() < before {
            before = steps.len();
            steps.retain(|step| {
                let held = step.takes_out(&self.missing);
                if held {
                    self.missing.extend(step.brings_in());
                }
                !held
            });
        }
    }
}

/// Whether the server took the request for what it is, and does not want it.
pub(super) fn is_refusal(err: &Fault) -> bool {
    matches!(err, Fault::Forbidden(_) | Fault::Invalid(_))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use k8s_openapi::api::discovery::v1::EndpointSlice;
    use serde_json::json;

    use super::*;
    use crate::kubernetes::names;

    fn slice(name: &str, addresses: &[&str]) -> EndpointSlice {
        let endpoints: Vec<_> = addresses.iter().map(|address| json!({ "addresses": [address] })).collect();
        let labels = json!({ names::SERVICE_NAME: "web", names::MANAGED_BY: names::MANAGER });
        let slice = json!({
            "metadata": {
                "namespace": "prod", "name": name, "uid": name, "resourceVersion": "1", "labels": labels,
            },
            "addressType": "IPv4",
            "endpoints": endpoints,
        });
        serde_json::from_value(slice).expect("an EndpointSlice")
    }

    fn refusal() -> Fault {
        Fault::Forbidden("exceeded quota".into())
    }

    #[test]
    fn what_could_not_come_in_somewhere_does_not_go_out_elsewhere() {
        let standing = |name, addresses: &[&str]| Standing::read(&slice(name, addresses)).expect("one of ours");
        let standing = [
            standing("a", &["10.0.0.1", "10.0.0.3"]),
            standing("b", &["10.0.0.2", "10.0.0.4"]),
            standing("c", &["10.0.0.5", "10.0.0.6"]),
            standing("d", &["10.0.0.7"]),
        ];
        let [a, b, c, d] = &standing;
        let step = |before, write| Step { before: Some(before), write };
        // .1 was to move from `a` into a new slice, and .2 from `b` to `a`.
        let mut steps: VecDeque<Step<'_>> = [
            step(b, Write::Replace(slice("b", &["10.0.0.4"]))),
            step(a, Write::Replace(slice("a", &["10.0.0.2", "10.0.0.3"]))),
            step(c, Write::Replace(slice("c", &["10.0.0.5"]))),
            step(d, Write::Delete { name: "d".into(), uid: "d".into(), resource_version: "1".into() }),
        ]
        .into();
        let left =
            |steps: &VecDeque<Step<'_>>| steps.iter().map(|step| step.write.name().to_owned()).collect::<Vec<_>>();
        let mut refused = Refused::default();
        refused.hold_back(&mut steps);
        assert_eq!(steps.len(), 4, "nothing was refused");
        let created = Step { before: None, write: Write::Create(slice("e", &["10.0.0.1"])) };
        assert_eq!(refused.note(&created, Err(refusal())), Ok(true));
        refused.hold_back(&mut steps);
        assert_eq!(left(&steps), ["c", "d"], "what only goes away still does");
        // What stays in a slice is there, whatever becomes of the write.
        let replaced = step(c, Write::Replace(slice("c", &["10.0.0.5", "10.0.0.7"])));
        assert_eq!(refused.note(&replaced, Err(Fault::Invalid("another".into()))), Ok(true));
        refused.hold_back(&mut steps);
        assert_eq!((left(&steps), refused.err.clone()), (vec!["c".to_owned()], Some(refusal())));
        assert_eq!(refused.note(&created, Err(Fault::Conflict)), Err(Fault::Conflict), "that is planned again");
    }

    #[test]
    fn only_a_refusal_is_one() {
        assert!(is_refusal(&refusal()) && is_refusal(&Fault::Invalid(String::new())));
        for fault in [Fault::Conflict, Fault::NotFound, Fault::Busy(Duration::ZERO), Fault::Unknown(String::new())] {
            assert!(!is_refusal(&fault), "{fault}");
        }
    }
}
