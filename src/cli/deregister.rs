//! `gangplank deregister`: removes an instance.

use super::{
    args::{AddressArg, NamespaceArgs, ServiceArg, WriterArgs, port},
    error::CommandError,
    mutation::MutationReport,
    output::OutputArgs,
};
use crate::model::{InstanceSpec, PortSpec};

pub(super) const EXAMPLES: &str = "\
With ports, the instance that has exactly these ports is removed; without,
all instances of the address in this service.

Examples:
  gangplank deregister web 10.0.0.1
  gangplank deregister prod/web 10.0.0.2:8080
  gangplank deregister dns 10.0.0.3 -n prod --port 53/udp --port 53/tcp
  gangplank ls web -o name | xargs -L1 gangplank deregister

Exit codes: 0 done, 1 failed or refused, 2 wrong usage, 3 not registered";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The service: NAME, or NAMESPACE/NAME
    service: ServiceArg,
    /// The address, with ports or without: 10.0.0.1, 10.0.0.1:8080, [2001:db8::1]:80
    address: AddressArg,
    /// A port of the instance; repeatable. Its name does not matter
    #[arg(long = "port", short = 'p', value_name = "[NAME=]PORT[/PROTO]", value_parser = port)]
    ports: Vec<PortSpec>,
    #[command(flatten)]
    namespace: NamespaceArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    server: WriterArgs,
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    let Args { service, address: address_arg, ports, namespace, output, server } = args;
    let ports = address_arg.ports.into_iter().chain(ports).collect();
    let spec = InstanceSpec { address: address_arg.address, ports, ..InstanceSpec::default() };
    let connection = server.connection().await?;
    let namespace = namespace.of(&service, connection.namespace());
    let answer = connection.servers.unregister(namespace, &service.name, &spec).await?;
    MutationReport { namespace, name: &service.name, spec: &spec, answer }.report(output.output)
}
