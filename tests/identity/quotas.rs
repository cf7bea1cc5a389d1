//! Each identity has its share and no more: instances, open calls, messages a second.

use std::time::{Duration, Instant};

use gangplank::grpc::proto::registry::{RegistrationMsg, service_registry_client::ServiceRegistryClient};
use tonic::{Code, transport::Channel};

use super::{
    SecuredServer,
    matrix::open_stream,
    ownership::{Registrant, TEAM_POLICY},
};
use crate::support::{http, wait_until};

async fn channel(secured: &SecuredServer, user: &str) -> Channel {
    secured.connect(Some(&secured.ca.sign(user, &["web"]))).await.expect("a handshake")
}

fn metric(secured: &SecuredServer, quota: &str) -> u64 {
    let (_, text) = http::get(secured.server.admin, "/metrics");
    let series = format!("gangplank_over_quota_total{{quota=\"{quota}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&series)).expect("it is there").parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_of_an_identity_are_limited_on_all_of_its_streams_and_after_a_start() {
    let flags = ["--max-instances-per-identity", "2", "--max-instances-per-namespace", "3"];
    let mut secured = SecuredServer::start_with_flags(TEAM_POLICY, &flags);
    let client = async |secured: &SecuredServer, user| Registrant::new(channel(secured, user).await, "shop");
    let (mut one, mut two) = (client(&secured, "vm-1").await, client(&secured, "vm-1").await);
    assert_eq!(one.register("10.1.0.1", 1.0).await.0, 201);
    assert_eq!(two.register("10.1.0.2", 1.0).await.0, 201);
    let said = "vm-1 has 2 instances or more, which is the limit of one identity (--max-instances-per-identity)";
    assert_eq!(one.register("10.1.0.3", 1.0).await, (429, said.into()));
    assert_eq!(one.register("10.1.0.1", 2.0).await.0, 200, "its own may change");

    secured.server = secured.server.restart();
    let (mut vm, mut other) = (client(&secured, "vm-1").await, client(&secured, "vm-2").await);
    assert_eq!(vm.register("10.1.0.3", 1.0).await, (429, said.into()));
    assert_eq!(other.register("10.1.0.3", 1.0).await.0, 201);
    let (status, said) = other.register("10.1.0.4", 1.0).await;
    assert!(status == 429 && said.contains("shop has 3 instances or more"), "{status} {said}");
    assert_eq!(vm.remove("10.1.0.1").await.0, 204);
    assert_eq!(vm.register("10.1.0.4", 1.0).await.0, 201, "there is room again");
    assert_eq!((metric(&secured, "identity_instances"), metric(&secured, "namespace_instances")), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn open_streams_of_an_identity_are_limited_until_one_ends() {
    let secured = SecuredServer::start_with_flags(TEAM_POLICY, &["--max-streams-per-identity", "2"]);
    let vm = secured.ca.sign("vm-1", &["web"]);
    let (sender, messages) = futures::channel::mpsc::unbounded();
    let mut first = ServiceRegistryClient::new(channel(&secured, "vm-1").await);
    let _first = first.registration_event(messages).await.expect("answered");
    let _second = open_stream(&secured, &vm).await;
    let mut third = ServiceRegistryClient::new(channel(&secured, "vm-1").await);
    let refused = third.registration_event(futures::stream::pending()).await.expect_err("a third one");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("vm-1 has 2 calls open"), "{refused}");
    assert_eq!(metric(&secured, "identity_streams"), 1);
    let _other = open_stream(&secured, &secured.ca.sign("ops", &[])).await;
    drop(sender);
    let runtime = tokio::runtime::Handle::current();
    tokio::task::block_in_place(|| {
        wait_until("a place", || {
            runtime.block_on(third.registration_event(futures::stream::empty())).is_ok().then_some(())
        });
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_beyond_the_rate_of_an_identity_wait_and_are_answered() {
    let secured = SecuredServer::start_with_flags(TEAM_POLICY, &["--max-messages-per-identity", "50"]);
    let mut client = ServiceRegistryClient::new(channel(&secured, "vm-1").await);
    let messages = (1..=125u8).map(|last| RegistrationMsg {
        namespace: "shop".into(),
        service_name: "web".into(),
        ipaddress: format!("10.1.0.{last}"),
        ..RegistrationMsg::default()
    });
    let begun = Instant::now();
    let mut answers = client.registration_event(futures::stream::iter(messages)).await.expect("answered").into_inner();
    let mut answered = 0;
    while let Some(answer) = answers.message().await.expect("a good stream") {
        assert_eq!(answer.status, 201, "{answer:?}");
        answered += 1;
    }
    // 50 at once, then 50 a second.
    assert_eq!(answered, 125);
    assert!(begun.elapsed() >= Duration::from_millis(1_490), "{:?}", begun.elapsed());
    assert!(metric(&secured, "identity_messages") > 0);
    let mut other = Registrant::new(channel(&secured, "vm-2").await, "shop");
    let begun = Instant::now();
    assert_eq!(other.register("10.2.0.1", 1.0).await.0, 201);
    assert!(begun.elapsed() < Duration::from_secs(1), "others do not wait");
}
