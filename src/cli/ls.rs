//! `gangplank ls`: services, or the instances of one service.

use std::{
    io::{self, Write as _},
    time::SystemTime,
};

use super::{
    args::{ScopeArgs, ServerArgs, ServiceArg, check_namespace, key},
    error::{CommandError, ErrorKind},
    names::{names_of, names_table},
    output::{Format, NONE, OutputArgs, Table, age, percent, print, print_json, print_yaml},
};
use crate::model::{
    DnsName, NameStatus, Port, Protocol, Registrant, Service, ServiceKey,
    view::{NameViews, NamedServiceView, Rfc3339, ServiceView, ServicesView, TrafficShares},
};

pub(super) const EXAMPLES: &str = "\
Ports are written as --port takes them. SHARE is the part of traffic that an
instance should get: its weight over the sum of all ready instances.
An instance that is a DNS name has a second table: what it leads to now.
-o json and -o yaml give one service as an object, and several as
{\"services\": [...]}, in the shape of the server's /api/v1.

Examples:
  gangplank ls
  gangplank ls -A -o wide
  gangplank ls prod/web
  gangplank ls web -n prod -o json

Exit codes: 0 done, also if there are no services; 1 failed, 2 wrong usage,
3 the named service does not exist";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The service whose instances are listed: NAME, or NAMESPACE/NAME
    service: Option<ServiceArg>,
    #[command(flatten)]
    scope: ScopeArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    let Args { service, scope, output, server } = args;
    let format = output.output;
    let connection = server.readers().await?;
    let (servers, namespace) = (&connection.servers, scope.of(service.as_ref(), connection.namespace()));
    match (&service, namespace) {
        (None, namespace) => {
            namespace.map_or(Ok(()), check_namespace)?;
            let services = servers.read(async |client| client.services(namespace).await).await?;
            if services.is_empty() {
                // Not `eprintln!`, which panics if stderr cannot be written. An empty list is no error: exit 0.
                let _ = writeln!(io::stderr(), "{}", no_services(namespace));
            }
            show_services(&services, format)
        }
        (Some(service), Some(namespace)) => {
            let key = key(namespace, &service.name)?;
            match servers.read(async |client| client.service(&key).await).await? {
                Some(found) => {
                    let names = names_of(servers, &key, &found).await?;
                    show_service(&key, &found, &names, format)
                }
                None => Err(not_found(&key.to_string())),
            }
        }
        (Some(service), None) => {
            // Only the name matters; any valid namespace does.
            key("default", &service.name)?;
            let mut services = servers.read(async |client| client.services(None).await).await?;
            services.retain(|(key, _)| key.name() == service.name);
            if services.is_empty() {
                return Err(not_found(&format!("{} in any namespace", service.name)));
            }
            show_instances(&services, format)
        }
    }
}

fn no_services(namespace: Option<&str>) -> String {
    match namespace {
        Some(namespace) => format!("no services in namespace {namespace}; all namespaces: gangplank ls -A"),
        None => "no services; register one: gangplank register web 10.0.0.1 --port http=8080".into(),
    }
}

fn not_found(service: &str) -> CommandError {
    CommandError::new(ErrorKind::NotFound, format!("there is no service {service}"))
        .hint("what there is:  gangplank ls -A")
}

fn show_services(services: &[(ServiceKey, Service)], format: Option<Format>) -> Result<(), CommandError> {
    match format {
        None | Some(Format::Wide) if services.is_empty() => Ok(()),
        None | Some(Format::Wide) => print(&services_table(services, format, SystemTime::now())),
        Some(Format::Json) => print_json(&ServicesView(services)),
        Some(Format::Yaml) => print_yaml(&ServicesView(services)),
        Some(Format::Name) => print(&services.iter().map(|(key, _)| format!("{key}\n")).collect::<String>()),
    }
}

fn show_service(
    key: &ServiceKey,
    service: &Service,
    names: &[(DnsName, NameStatus)],
    format: Option<Format>,
) -> Result<(), CommandError> {
    let view = NamedServiceView { service: ServiceView { key, service }, names: NameViews(names) };
    match format {
        Some(Format::Json) => print_json(&view),
        Some(Format::Yaml) => print_yaml(&view),
        _ => {
            show_instances(&[(key.clone(), service.clone())], format)?;
            if names.is_empty() || format == Some(Format::Name) {
                return Ok(());
            }
            print(&format!("\n{}", names_table(names, format, SystemTime::now())))
        }
    }
}

fn show_instances(services: &[(ServiceKey, Service)], format: Option<Format>) -> Result<(), CommandError> {
    match format {
        None | Some(Format::Wide) => print(&instances_table(services, format, SystemTime::now())),
        Some(Format::Json) => print_json(&ServicesView(services)),
        Some(Format::Yaml) => print_yaml(&ServicesView(services)),
        Some(Format::Name) => {
            let instances = services.iter().flat_map(|(key, service)| {
                service.instances.iter().map(move |instance| format!("{key} {}\n", instance.id()))
            });
            print(&instances.collect::<String>())
        }
    }
}

fn services_table(services: &[(ServiceKey, Service)], format: Option<Format>, now: SystemTime) -> String {
    let wide = format == Some(Format::Wide);
    let mut titles = vec!["NAMESPACE", "NAME", "INSTANCES", "READY", "PORTS", "SHARES"];
    titles.extend_from_slice(if wide { &["GENERATION", "CREATED", "AGE"] } else { &["AGE"] });
    let mut table = Table::new(&titles, &["SHARES", "PORTS"], format);
    for (key, service) in services {
        let created = service.created();
        let all = service.instances.iter().flat_map(|instance| instance.ports().as_slice());
        let mut all: Vec<&Port> = all.collect();
        // Instances have mostly the same ports: the column shows each once.
        all.sort_unstable_by_key(|port| (port.protocol, port.number, port.name.as_ref()));
        all.dedup();
        let mut row = vec![
            key.namespace().to_owned(),
            key.name().to_owned(),
            service.instances.len().to_string(),
            TrafficShares::of(service).ready().to_string(),
            ports(&all),
            shares(service),
        ];
        if wide {
            row.push(service.generation.to_string());
            row.push(created.map_or_else(|| NONE.to_owned(), |created| Rfc3339(created).to_string()));
        }
        row.push(created.map_or_else(|| NONE.to_owned(), |created| age(created, now)));
        table.row(row);
    }
    table.render()
}

fn instances_table(services: &[(ServiceKey, Service)], format: Option<Format>, now: SystemTime) -> String {
    let wide = format == Some(Format::Wide);
    let mut titles = vec!["NAMESPACE", "NAME", "ADDRESS", "PORTS", "SHARE", "READY"];
    let more = ["WEIGHT", "PRIORITY", "HOST", "NODE", "REGISTRANT", "AGE"];
    titles.extend_from_slice(if wide { &more } else { &more[5..] });
    let mut table = Table::new(&titles, &["PORTS"], format);
    for (key, service) in services {
        let shares = TrafficShares::of(service);
        for instance in service.instances.iter() {
            let mut row = vec![
                key.namespace().to_owned(),
                key.name().to_owned(),
                instance.address().to_string(),
                ports(&instance.ports().as_slice().iter().collect::<Vec<_>>()),
                percent(shares.share(instance)),
                instance.ready().to_string(),
            ];
            if wide {
                let text = |text: Option<&str>| text.unwrap_or(NONE).to_owned();
                row.push(instance.weight().get().to_string());
                row.push(instance.priority().to_string());
                row.push(text(instance.host_name().map(|label| label.as_str())));
                row.push(text(instance.node_name().map(|name| name.as_str())));
                row.push(text(instance.registrant().map(Registrant::as_str)));
            }
            row.push(age(instance.registered(), now));
            table.row(row);
        }
    }
    table.render()
}

/// Ports as `--port` takes them, joined by commas.
fn ports(ports: &[&Port]) -> String {
    if ports.is_empty() {
        return NONE.to_owned();
    }
    let one = |port: &&Port| {
        let name = port.name.as_ref().map_or_else(String::new, |name| format!("{}=", name.as_str()));
        let protocol = match port.protocol {
            Protocol::Tcp => String::new(),
            protocol => format!("/{}", protocol.as_str().to_lowercase()),
        };
        format!("{name}{}{protocol}", port.number)
    };
    ports.iter().map(one).collect::<Vec<_>>().join(",")
}

/// The shares of the ready instances, largest first, equal ones once: `50%,2x25%`.
fn shares(service: &Service) -> String {
    let all = TrafficShares::of(service);
    if all.ready() == 0 {
        return NONE.to_owned();
    }
    let mut shares: Vec<f64> = service.instances.iter().filter(|i| i.ready()).map(|i| all.share(i)).collect();
    shares.sort_unstable_by(|a, b| b.total_cmp(a));
    // By what is shown: shares that differ in later digits only are one group.
    let groups = shares.chunk_by(|a, b| percent(*a) == percent(*b)).map(|group| match group {
        [one] => percent(*one),
        several => format!("{}x{}", several.len(), percent(several[0])),
    });
    groups.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;
    use crate::{
        cli::args::{PERMISSIVE_VALIDATOR, port},
        model::{InstanceSpec, UnixMillis},
    };

    fn service(instances: &[(&str, &[&str], f32, bool)]) -> (ServiceKey, Service) {
        let key = key("prod", "web").expect("valid");
        let instances = instances.iter().map(|(address, ports, weight, ready)| {
            let spec = InstanceSpec {
                address: (*address).into(),
                ports: ports.iter().map(|text| port(text).expect("a port")).collect(),
                node_name: "vm-7".into(),
                weight: Some(*weight),
                ..InstanceSpec::default()
            };
            let instance = PERMISSIVE_VALIDATOR.instance(&key, &spec, UnixMillis(1_000_000)).expect("valid");
            let registrant = Registrant::new("spiffe://a".into()).expect("a name");
            Arc::new(instance.with_ready(*ready).with_registrant(Some(registrant)))
        });
        (key.clone(), Service { instances: instances.collect(), generation: 1712 })
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1000 + 300)
    }

    #[test]
    fn services_are_one_row_each() {
        let web = service(&[
            ("10.0.0.1", &["http=8080"], 2.0, true),
            ("10.0.0.2", &["http=8080", "dns=53/udp"], 1.0, true),
            ("10.0.0.3", &["http=8080"], 1.0, true),
            ("10.0.0.4", &["http=8080"], 9.0, false),
        ]);
        assert_eq!(
            services_table(&[web], None, now()),
            "NAMESPACE   NAME   INSTANCES   READY   PORTS                  SHARES      AGE\n\
             prod        web    4           3       http=8080,dns=53/udp   50%,2x25%   5m\n"
        );
        let down = service(&[("10.0.0.1", &[], 1.0, false)]);
        assert_eq!(
            services_table(&[down], None, now()),
            "NAMESPACE   NAME   INSTANCES   READY   PORTS    SHARES   AGE\n\
             prod        web    1           0       <none>   <none>   5m\n"
        );
    }

    #[test]
    fn instances_are_one_row_each() {
        let web = service(&[("10.0.0.1", &["http=8080"], 3.0, true), ("2001:db8::1", &[], 1.0, true)]);
        assert_eq!(
            instances_table(std::slice::from_ref(&web), None, now()),
            "NAMESPACE   NAME   ADDRESS       PORTS       SHARE   READY   AGE\n\
             prod        web    10.0.0.1      http=8080   75%     true    5m\n\
             prod        web    2001:db8::1   <none>      25%     true    5m\n"
        );
        let wide = instances_table(&[web], Some(Format::Wide), now());
        assert!(
            wide.lines().next().expect("titles").ends_with("WEIGHT   PRIORITY   HOST     NODE   REGISTRANT   AGE"),
            "{wide}"
        );
        assert!(wide.contains("75%     true    3        0          <none>   vm-7   spiffe://a   5m"), "{wide}");
    }

    #[test]
    fn many_ports_and_shares_stay_within_80_columns() {
        let ports: Vec<String> = (0..20).map(|number| format!("port-{number}={}", 8000 + number)).collect();
        let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
        let rows: Vec<_> = (1u8..40).map(|last| (format!("10.0.0.{last}"), f32::from(last))).collect();
        let rows: Vec<_> =
            rows.iter().map(|(address, weight)| (address.as_str(), ports.as_slice(), *weight, true)).collect();
        let web = service(&rows);
        for table in [services_table(std::slice::from_ref(&web), None, now()), instances_table(&[web], None, now())] {
            for line in table.lines() {
                assert!(line.chars().count() <= 80, "{line}");
            }
        }
    }
}
