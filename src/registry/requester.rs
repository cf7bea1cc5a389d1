//! Whose instance it is: an identity changes what it has registered, and what belongs to nobody.
//!
//! The decider asks this about each command, with the changes of all commands before it: what a caller knew when it sent
//! the command may have changed since. Words of other processes are not asked about: they were decided there.

use std::{net::IpAddr, sync::Arc};

use super::{Command, RegistryHandle};
use crate::model::{Address, Instance, InstanceId, PortSet, Registrant, ServiceKey};

/// On whose behalf a command changes instances.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Requester {
    /// A caller who may do all. Plaintext shows no name, so what it registers belongs to nobody.
    Unrestricted,
    /// An identity.
    Identity {
        /// Its user name.
        registrant: Registrant,
        /// Whether it may change what another identity has registered.
        overrides: bool,
        /// Where it connects from.
        peer: IpAddr,
    },
}

impl Requester {
    /// Another identity whose instance is among `instances`, if that forbids the change.
    pub(super) fn refused_by<'a>(
        &self,
        instances: impl IntoIterator<Item = &'a Arc<Instance>>,
    ) -> Option<&'a Registrant> {
        match self {
            Self::Unrestricted | Self::Identity { overrides: true, .. } => None,
            Self::Identity { registrant, overrides: false, .. } => {
                // What belongs to nobody may be taken by anybody with the right to register it.
                instances.into_iter().filter_map(|instance| instance.registrant()).find(|other| *other != registrant)
            }
        }
    }

    /// Who has registered an instance once this requester registers it. Who shows no name takes nobody's away.
    pub(super) fn registrant_after(&self, before: Option<&Arc<Instance>>) -> Option<Registrant> {
        match self {
            Self::Unrestricted => before.and_then(|before| before.registrant()).cloned(),
            Self::Identity { registrant, .. } => Some(registrant.clone()),
        }
    }
}

impl Command {
    /// The service that it changes.
    #[must_use]
    pub fn service(&self) -> &ServiceKey {
        match self {
            Self::Register { service, .. } | Self::Unregister { service, .. } | Self::SetReady { service, .. } => {
                service
            }
        }
    }

    /// Says whether an identity that gives it may change what another has registered.
    pub fn set_overrides(&mut self, allowed: bool) {
        if let Self::Register { by: Requester::Identity { overrides, .. }, .. }
        | Self::Unregister { by: Requester::Identity { overrides, .. }, .. } = self
        {
            *overrides = allowed;
        }
    }
}

impl RegistryHandle {
    /// Whether `command` would change the instance of another identity, as far as readers see now. The writer decides.
    #[must_use]
    pub fn changes_others_instance(&self, command: &Command) -> bool {
        let held = || self.catalog.get(command.service()).unwrap_or_default().instances;
        match command {
            Command::Register { by: Requester::Unrestricted, .. }
            | Command::Unregister { by: Requester::Unrestricted, .. }
            | Command::SetReady { .. } => false,
            Command::Register { instance, by, .. } => by.refused_by(held().get(&instance.key())).is_some(),
            Command::Unregister { address, ports, by, .. } => {
                by.refused_by(&held().removed_by(&removal(address.clone(), ports.clone()))).is_some()
            }
        }
    }
}

/// What a removal of `ports` at `address` removes: without ports everything there.
pub(super) fn removal(address: Address, ports: PortSet) -> InstanceId {
    let ports = if ports.as_slice().is_empty() { PortSet::every() } else { ports };
    InstanceId { address, ports }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::model::{
        UnixMillis,
        testing::{VALIDATOR, key, spec},
    };

    fn registrant(name: &str) -> Registrant {
        Registrant::new(name.into()).expect("a name")
    }

    fn of(owner: Option<&str>) -> Arc<Instance> {
        let instance = VALIDATOR.instance(&key("web.shop"), &spec("10.0.0.1", &["80"]), UnixMillis(1)).expect("valid");
        Arc::new(instance.with_registrant(owner.map(registrant)))
    }

    fn identity(name: &str, overrides: bool) -> Requester {
        Requester::Identity { registrant: registrant(name), overrides, peer: Ipv4Addr::LOCALHOST.into() }
    }

    #[test]
    fn another_identity_may_not_change_an_instance_without_the_right() {
        let instances = [of(None), of(Some("vm-1"))];
        assert_eq!(identity("vm-2", false).refused_by(&instances), Some(&registrant("vm-1")));
        for allowed in [identity("vm-1", false), identity("vm-2", true), Requester::Unrestricted] {
            assert_eq!(allowed.refused_by(&instances), None, "{allowed:?}");
        }
        assert_eq!(identity("vm-2", false).refused_by([&of(None)]), None, "nobody's");
    }

    #[test]
    fn identity_takes_over_what_it_registers_and_nameless_callers_leave_it() {
        let after = |by: Requester, before: Option<&str>| by.registrant_after(Some(&of(before)));
        assert_eq!(after(identity("vm-2", false), None), Some(registrant("vm-2")));
        assert_eq!(after(identity("vm-2", true), Some("vm-1")), Some(registrant("vm-2")));
        assert_eq!(after(Requester::Unrestricted, Some("vm-1")), Some(registrant("vm-1")));
        assert_eq!(after(Requester::Unrestricted, None), None);
        assert_eq!(identity("vm-2", false).registrant_after(None), Some(registrant("vm-2")));
        assert_eq!(Requester::Unrestricted.registrant_after(None), None);
    }
}
