//! Whose instance it is: another identity gets 409, and everybody sees the name.

use gangplank::grpc::proto::registry::{
    NamedPort, RegistrationMsg, RegistrationType, ServiceInfo, service_registry_client::ServiceRegistryClient,
};
use serde_json::Value;
use tonic::transport::Channel;

use super::SecuredServer;
use crate::support::http;

/// The group `web` may register shop/web, `ops` may do all.
pub(crate) const TEAM_POLICY: &str = "\
[[rule]]
groups = ['web']
namespaces = ['*']
services = ['web']
verbs = ['create', 'delete']

[[rule]]
users = ['ops']
namespaces = ['*']
verbs = ['*']
";

/// A client that registers, updates and removes `shop/web`.
pub(crate) struct Registrant {
    client: ServiceRegistryClient<Channel>,
    namespace: &'static str,
}

impl Registrant {
    pub(crate) fn new(channel: Channel, namespace: &'static str) -> Self {
        Self { client: ServiceRegistryClient::new(channel), namespace }
    }

    fn info(&self, address: &str, weight: f32) -> ServiceInfo {
        ServiceInfo {
            namespace: self.namespace.into(),
            service_name: "web".into(),
            ipaddress: address.into(),
            ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
            weight: Some(weight),
            ..ServiceInfo::default()
        }
    }

    pub(crate) async fn register(&mut self, address: &str, weight: f32) -> (u32, String) {
        let answer = self.client.register(self.info(address, weight)).await.expect("answered").into_inner();
        (answer.status, answer.status_details)
    }

    pub(crate) async fn remove(&mut self, address: &str) -> (u32, String) {
        let answer = self.client.un_register(self.info(address, 1.0)).await.expect("answered").into_inner();
        (answer.status, answer.status_details)
    }

    /// The statuses of a registration and a removal on one stream.
    async fn by_stream(&mut self, address: &str) -> Vec<u32> {
        let message = |kind: RegistrationType| RegistrationMsg {
            r#type: kind.into(),
            namespace: self.namespace.into(),
            service_name: "web".into(),
            ipaddress: address.into(),
            ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
            ..RegistrationMsg::default()
        };
        let messages = [message(RegistrationType::Register), message(RegistrationType::Unregister)];
        let mut answers =
            self.client.registration_event(futures::stream::iter(messages)).await.expect("answered").into_inner();
        let mut statuses = Vec::new();
        while let Some(answer) = answers.message().await.expect("a good stream") {
            statuses.push(answer.status);
        }
        statuses
    }
}

/// The registrant of the instance at `address`, as `ls -o json` and the admin API show it.
fn shown(secured: &SecuredServer, address: &str) -> Value {
    let listed = secured.server.run(&["ls", "web", "-n", "shop", "-o", "json"]);
    let service: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let instances = service["instances"].as_array().expect("a list");
    let one = instances.iter().find(|instance| instance["address"] == address).expect("it is registered");
    let registrant = one["registrant"].clone();
    let (_, body) = http::get(secured.server.admin, "/api/v1/services");
    assert!(body.contains(&format!("\"registrant\":{registrant}")), "{body}");
    registrant
}

#[tokio::test(flavor = "multi_thread")]
async fn another_identity_gets_409_until_it_may_override() {
    let mut secured = SecuredServer::start_with(TEAM_POLICY);
    let client = async |user: &str, group: &str| {
        let credential = secured.ca.sign(user, &[group]);
        Registrant::new(secured.connect(Some(&credential)).await.expect("a handshake"), "shop")
    };
    let (mut vm, mut other, mut ops) =
        (client("vm-1", "web").await, client("vm-2", "web").await, client("ops", "ops").await);
    let said =
        "10.1.0.1 of shop/web is registered by vm-1; to change it you need the right of the verb override".to_owned();
    assert_eq!(vm.register("10.1.0.1", 1.0).await.0, 201);
    assert_eq!(other.register("10.1.0.1", 1.0).await, (409, said.clone()), "unchanged");
    assert_eq!(other.register("10.1.0.1", 2.0).await, (409, said.clone()));
    assert_eq!(other.remove("10.1.0.1").await, (409, said.clone()));
    assert_eq!(other.by_stream("10.1.0.1").await, [409, 409]);
    assert_eq!(shown(&secured, "10.1.0.1"), "vm-1");
    let log = secured.server.stderr();
    assert!(log.contains("vm-2 may not override instances of shop/web"), "{log}");
    assert_eq!(vm.by_stream("10.1.0.1").await, [200, 204]);

    assert_eq!(vm.register("10.1.0.1", 1.0).await.0, 201);
    assert_eq!(ops.register("10.1.0.1", 3.0).await.0, 200, "it overrides");
    assert_eq!(shown(&secured, "10.1.0.1"), "ops");
    assert_eq!(vm.register("10.1.0.1", 1.0).await.0, 409);
    assert_eq!(ops.remove("10.1.0.1").await.0, 204);
    assert_eq!(other.register("10.1.0.1", 1.0).await.0, 201, "nobody has it now");

    // As after a crash: only the journal knows.
    secured.server = secured.server.restart();
    let credential = secured.ca.sign("vm-1", &["web"]);
    let mut vm = Registrant::new(secured.connect(Some(&credential)).await.expect("a handshake"), "shop");
    assert_eq!(vm.remove("10.1.0.1").await.0, 409);
    let metrics = http::get(secured.server.admin, "/metrics").1;
    assert!(metrics.contains("gangplank_registry_commands_total{outcome=\"owned\"} 1"), "{metrics}");
    let wide = secured.server.run(&["ls", "web", "-n", "shop", "-o", "wide"]);
    let wide = String::from_utf8_lossy(&wide.stdout).into_owned();
    assert!(wide.contains("REGISTRANT") && wide.contains("vm-2"), "{wide}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_plaintext_registered_is_taken_over_by_the_first_identity() {
    let secured = SecuredServer::start_with(TEAM_POLICY);
    secured.server.register("shop", "web", "10.1.0.2", "http=8080");
    assert_eq!(shown(&secured, "10.1.0.2"), Value::Null);
    let client = async |user: &str| {
        let credential = secured.ca.sign(user, &["web"]);
        Registrant::new(secured.connect(Some(&credential)).await.expect("a handshake"), "shop")
    };
    let mut vm = client("vm-1").await;
    assert_eq!(vm.remove("10.1.0.2").await.0, 204);
    secured.server.register("shop", "web", "10.1.0.2", "http=8080");
    assert_eq!((vm.register("10.1.0.2", 1.0).await.0, shown(&secured, "10.1.0.2")), (200, "vm-1".into()));
    // Who may do all goes on so, and leaves it to its registrant.
    secured.server.register("shop", "web", "10.1.0.2", "http=8080");
    assert_eq!(shown(&secured, "10.1.0.2"), "vm-1");
    assert_eq!(client("vm-2").await.remove("10.1.0.2").await.0, 409);
}
