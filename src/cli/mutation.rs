//! The result of `register` and `deregister`: one line or JSON, and the exit code of each status.

use serde::Serialize;

use super::{
    args::PERMISSIVE_VALIDATOR,
    error::{CommandError, ErrorKind},
    output::{Format, print, print_json, print_yaml},
};
use crate::{
    grpc::client::MutationResponse,
    model::{InstanceId, InstanceSpec, PortSet},
};

/// A change that was requested, and the server's answer.
#[derive(Debug)]
pub(super) struct MutationReport<'a> {
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
    pub(super) spec: &'a InstanceSpec,
    pub(super) answer: MutationResponse,
}

/// A change as JSON and YAML. Fields are added, never renamed.
#[derive(Debug, Serialize)]
struct MutationView<'a> {
    namespace: &'a str,
    name: &'a str,
    instance: &'a str,
    status: u32,
    outcome: &'static str,
    details: &'a str,
    generation: u64,
}

impl MutationReport<'_> {
    /// Prints the outcome, or returns why the server refused.
    pub(super) fn report(&self, format: Option<Format>) -> Result<(), CommandError> {
        let instance = self.instance();
        let outcome = self.outcome(&instance)?;
        let Self { namespace, name, answer, .. } = self;
        let MutationResponse { status, details, generation, writers: _ } = answer;
        let view = MutationView {
            namespace,
            name,
            instance: &instance,
            status: *status,
            outcome,
            details,
            generation: *generation,
        };
        match format {
            None | Some(Format::Wide) => print(&self.line(&instance, outcome)),
            Some(Format::Json) => print_json(&view),
            Some(Format::Yaml) => print_yaml(&view),
            Some(Format::Name) => print(&format!("{namespace}/{name} {instance}\n")),
        }
    }

    /// The instance as every command prints it; an address that does not parse stays as it was typed.
    fn instance(&self) -> String {
        let ports = self.spec.ports.iter();
        let ports = ports.filter_map(|port| Some((port.protocol, u16::try_from(port.number).ok()?))).collect();
        match PERMISSIVE_VALIDATOR.address(&self.spec.address) {
            Ok(address) => InstanceId { address, ports: PortSet::new(ports) }.to_string(),
            Err(_) => self.spec.address.clone(),
        }
    }

    fn line(&self, instance: &str, outcome: &str) -> String {
        let Self { namespace, name, answer, .. } = self;
        format!("instance {namespace}/{name} {instance} {outcome}, generation {}\n", answer.generation)
    }

    /// The outcome in a word; an error if the server did not do what was requested.
    fn outcome(&self, instance: &str) -> Result<&'static str, CommandError> {
        let Self { namespace, name, answer: MutationResponse { status, details, .. }, .. } = self;
        let subject = format!("instance {namespace}/{name} {instance}");
        let because = if details.is_empty() { String::new() } else { format!(": {details}") };
        let refused = |kind| CommandError::new(kind, format!("{subject} refused{because}"));
        match status {
            201 => Ok("registered"),
            // The server does not say whether an attribute changed; either way it is registered as requested.
            200 => Ok("up to date"),
            202 => Ok("accepted, not in Kubernetes yet"),
            204 => Ok("deregistered"),
            // 404 is also "no such instance"; only the details tell them apart.
            404 if details.starts_with("namespace:") => {
                Err(refused(ErrorKind::NotFound).hint(format!("create it:  kubectl create namespace {namespace}")))
            }
            409 if !details.starts_with("service_name:") => Err(refused(ErrorKind::Failed)
                .hint(format!("whose instances they are:  gangplank ls {namespace}/{name} -o wide"))),
            409 => Err(refused(ErrorKind::Failed)
                .hint(format!("whose it is:  kubectl get service {name} -n {namespace} -o yaml"))
                .hint(format!("let external instances join:  kubectl label service {name} -n {namespace} gangplank.dev/service=joined"))),
            403 => Err(refused(ErrorKind::Failed)),
            404 => Err(CommandError::new(ErrorKind::NotFound, format!("{subject} not found{because}"))
                .hint(format!("what is there:  gangplank ls {namespace}/{name}"))),
            400 => {
                Err(refused(ErrorKind::Failed).hint("fix the field that is named; the flags: gangplank register --help"))
            }
            429 | 507 => Err(refused(ErrorKind::Failed)
                .hint("make room:  gangplank deregister SERVICE ADDRESS")
                .hint("or start the server with a higher limit:  gangplank serve --help")),
            503 => Err(refused(ErrorKind::Failed)
                .hint("why, and whether to wait:  curl http://127.0.0.1:9153/readyz/registrations")),
            _ => Err(CommandError::new(ErrorKind::Failed, format!("{subject} refused with status {status}{because}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{PortSpec, Protocol};

    fn outcome(status: u32, details: &str) -> Result<String, CommandError> {
        let port = |number, protocol, name: &str| PortSpec { number, protocol, name: name.into() };
        let spec = InstanceSpec {
            address: "2001:DB8::1".into(),
            ports: vec![port(8080, Protocol::Tcp, "http"), port(53, Protocol::Udp, "")],
            ..InstanceSpec::default()
        };
        let answer = MutationResponse { status, details: details.into(), generation: 1712, writers: Vec::new() };
        let mutation = MutationReport { namespace: "prod", name: "web", spec: &spec, answer };
        let instance = mutation.instance();
        mutation.outcome(&instance).map(|word| mutation.line(&instance, word))
    }

    #[test]
    fn outcome_is_one_line() {
        for (status, line) in [
            (201, "instance prod/web [2001:db8::1]:8080,53/UDP registered, generation 1712\n"),
            (200, "instance prod/web [2001:db8::1]:8080,53/UDP up to date, generation 1712\n"),
            (204, "instance prod/web [2001:db8::1]:8080,53/UDP deregistered, generation 1712\n"),
        ] {
            assert_eq!(outcome(status, "").expect("done"), line);
        }
    }

    #[test]
    fn refusal_names_the_field_and_the_next_step() {
        let refused = outcome(400, "weight: must be a finite number in 0..=655, got -1").expect_err("refused");
        assert_eq!(refused.kind, ErrorKind::Failed);
        let text = refused.to_string();
        assert!(text.contains("refused: weight: must be a finite number"), "{text}");
        assert!(text.contains("gangplank register --help"), "{text}");
    }

    #[test]
    fn missing_kubernetes_objects_come_with_the_command_that_creates_them() {
        let absent = outcome(404, "namespace: prod does not exist in Kubernetes").expect_err("refused");
        assert_eq!(absent.kind, ErrorKind::NotFound);
        assert!(absent.to_string().contains("kubectl create namespace prod"), "{absent}");
        let foreign = outcome(409, "service_name: not managed").expect_err("refused");
        assert!(foreign.to_string().contains("gangplank.dev/service=joined"), "{foreign}");
        let owned = outcome(409, "10.0.0.1 of prod/web is registered by vm-1").expect_err("refused");
        assert!(owned.to_string().contains("gangplank ls prod/web -o wide"), "{owned}");
        let line = outcome(202, "").expect("durable and served");
        assert!(line.ends_with("accepted, not in Kubernetes yet, generation 1712\n"), "{line}");
    }

    #[test]
    fn statuses_have_their_exit_codes() {
        for (status, exit) in [
            (400, ErrorKind::Failed),
            (403, ErrorKind::Failed),
            (404, ErrorKind::NotFound),
            (409, ErrorKind::Failed),
            (503, ErrorKind::Failed),
            (507, ErrorKind::Failed),
            (999, ErrorKind::Failed),
        ] {
            let failure = outcome(status, "why").expect_err("no success");
            assert_eq!(failure.kind, exit, "{status}");
            assert!(failure.to_string().contains("why"), "{failure}");
        }
    }
}
