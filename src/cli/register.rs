//! `gangplank register`: registers one instance.

use super::{
    args::{AddressArg, NamespaceArgs, ServiceArg, WriterArgs, port},
    error::CommandError,
    mutation::MutationReport,
    output::OutputArgs,
};
use crate::model::{InstanceSpec, PortSpec};

pub(super) const EXAMPLES: &str = "\
Registering again replaces the attributes. Registering the same again changes
nothing and exits 0, so that a start script can do it at every start. Of several
replicas any will do: one on standby names the one that writes, which is asked
next. If none writes, all are asked again until --timeout.

Examples:
  gangplank register web 10.0.0.1 --port http=8080
  gangplank register prod/web 10.0.0.2:8080 --weight 0.5
  gangplank register dns 10.0.0.3 -n prod --port dns=53/udp --port dns=53/tcp
  gangplank register db 2001:db8::7 --port 5432 --host-name db-1
  gangplank register web 10.0.0.1:80 --server http://gp-0:9080,http://gp-1:9080

Exit codes: 0 registered, also if it already was; 1 failed or refused, 2 wrong
usage, 3 no such namespace in Kubernetes";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The service: NAME, or NAMESPACE/NAME
    service: ServiceArg,
    /// IPv4 or IPv6 address, with ports or without: 10.0.0.1, 10.0.0.1:8080,
    /// [2001:db8::1]:80
    address: AddressArg,
    /// A port of the instance; repeatable. A named port has an SRV record. TCP,
    /// unless /udp or /sctp follows
    #[arg(long = "port", short = 'p', value_name = "[NAME=]PORT[/PROTO]", value_parser = port)]
    ports: Vec<PortSpec>,
    /// The first label of the instance's own name, HOST.SERVICE.NAMESPACE.svc.ZONE;
    /// the address with dashes if not given
    #[arg(long, value_name = "HOST", default_value = "", hide_default_value = true)]
    host_name: String,
    /// The machine that the instance runs on
    #[arg(long, value_name = "NODE", default_value = "", hide_default_value = true)]
    node_name: String,
    /// Share of traffic relative to the service's other instances, 0 to 655 [default: 1]
    #[arg(long, allow_negative_numbers = true)]
    weight: Option<f32>,
    /// SRV priority; the lowest is used first
    #[arg(long, default_value_t = 0)]
    priority: u16,
    #[command(flatten)]
    namespace: NamespaceArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    server: WriterArgs,
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    let Args {
        service,
        address: address_arg,
        ports,
        host_name,
        node_name,
        weight,
        priority,
        namespace,
        output,
        server,
    } = args;
    let ports = address_arg.ports.into_iter().chain(ports).collect();
    let spec = InstanceSpec { address: address_arg.address, ports, host_name, node_name, weight, priority };
    let connection = server.connection().await?;
    let namespace = namespace.of(&service, connection.namespace());
    let answer = connection.servers.register(namespace, &service.name, &spec).await?;
    MutationReport { namespace, name: &service.name, spec: &spec, answer }.report(output.output)
}
