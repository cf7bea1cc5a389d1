//! Flags about what one identity, and one namespace, may have.

use std::num::{NonZeroU32, NonZeroUsize};

use clap::Args;
use ipnet::IpNet;

use crate::{identity::UsageLimits, model::parse_network, registry::InstanceQuotas};

#[derive(Debug, Args)]
pub(super) struct QuotaArgs {
    /// Instances of one identity; beyond that the answer is 429. 0 for any number. A twentieth of --max-instances, so that one
    /// stolen key does not take the room of all others. Plaintext clients that may do all are no identity
    #[arg(long, env = "GANGPLANK_MAX_INSTANCES_PER_IDENTITY", value_name = "N", default_value_t = 100_000)]
    max_instances_per_identity: usize,

    /// A network whose addresses nobody may register; repeatable. With Kubernetes, everybody but a plaintext client that may do
    /// all is refused those of the cluster's Services anyway
    #[arg(long, env = "GANGPLANK_DENY_ADDRESSES", value_name = "CIDR", value_delimiter = ',', value_parser = parse_network)]
    deny_addresses: Vec<IpNet>,

    /// Instances of one namespace, where its annotation gangplank.dev/max-instances says nothing else; beyond that the answer is
    /// 429. 0 for any number, because everything may be in one namespace
    #[arg(long, env = "GANGPLANK_MAX_INSTANCES_PER_NAMESPACE", value_name = "N", default_value_t = 0)]
    max_instances_per_namespace: usize,

    /// Registrations and removals of one identity a second, on all of its streams; more wait. 0 for any number. One core
    /// writes some 400000
    #[arg(long, env = "GANGPLANK_MAX_MESSAGES_PER_IDENTITY", value_name = "N", default_value_t = 20_000)]
    max_messages_per_identity: u32,

    /// Calls of one identity that are open at a time, streams and others; beyond that RESOURCE_EXHAUSTED. 0 for any number. A
    /// sixth of the 12000 streams of all
    #[arg(long, env = "GANGPLANK_MAX_STREAMS_PER_IDENTITY", value_name = "N", default_value_t = 2_000)]
    max_streams_per_identity: usize,
}

impl QuotaArgs {
    /// How many instances there may be.
    pub(super) fn instances(&self) -> InstanceQuotas {
        InstanceQuotas {
            per_identity: NonZeroUsize::new(self.max_instances_per_identity),
            per_namespace: NonZeroUsize::new(self.max_instances_per_namespace),
        }
    }

    /// What nobody may register.
    pub(super) fn deny_addresses(&self) -> Vec<IpNet> {
        self.deny_addresses.clone()
    }

    /// What one identity may use at a time.
    pub(super) fn usage(&self) -> UsageLimits {
        UsageLimits {
            streams: NonZeroUsize::new(self.max_streams_per_identity),
            messages_per_second: NonZeroU32::new(self.max_messages_per_identity),
        }
    }
}
