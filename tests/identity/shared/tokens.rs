//! Tokens that every process knows.

use gangplank::{
    grpc::proto::gangplank::join::v1::joining_client::JoiningClient,
    identity::joining::{JoinToken, new_request},
    model::hex,
};
use serde_json::json;
use tonic::Code;

use super::{Machine, Replica, Shared, decoded, names};
use crate::{identity::joining::join_request, support::wait_until};

/// Machines that join at once.
const MACHINES: usize = 24;

#[tokio::test(flavor = "multi_thread")]
async fn token_is_used_as_often_as_it_may_be_by_all_replicas_together() {
    let Some(shared) = Shared::start("racing") else { return };
    let (writer, follower) = shared.writer_and_follower();
    let ca = shared.ca();
    for uses in [1, 5] {
        let before = names(&writer).len();
        let token = follower.create_token(&["-n", "shop", "--uses", &uses.to_string()]);
        let mut machines = Vec::new();
        for number in 0..MACHINES {
            let replica = if number % 2 == 0 { &writer } else { &follower };
            let channel = replica.handshake(&ca).await.expect("a handshake");
            let (_, request) = new_request().expect("a key");
            machines.push((JoiningClient::new(channel), join_request(&token, request)));
        }
        let joins = machines.iter_mut().map(|(joining, request)| joining.join(request.clone()));
        let results = futures::future::join_all(joins).await;
        let joined = results.iter().filter(|result| result.is_ok()).count();
        assert_eq!(joined, uses, "{results:?}");
        for refused in results.iter().filter_map(|result| result.as_ref().err()) {
            assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
            assert!(refused.message().contains("was used already"), "{refused}");
        }
        let name = format!("gangplank-token-{}", token.id);
        let secret = shared.cluster.get_json(&shared.path(&name));
        let stored: serde_json::Value = serde_json::from_slice(&decoded(&secret, "token.json")).expect("JSON");
        assert_eq!((stored["used"].as_u64(), stored["uses"].as_u64()), (Some(uses as u64), Some(uses as u64)));
        for replica in [&writer, &follower] {
            wait_until("every process knows who joined", || (names(replica).len() == before + uses).then_some(()));
        }
    }
}

#[test]
fn token_is_created_listed_and_revoked_on_any_replica() {
    let Some(shared) = Shared::start("any-replica") else { return };
    let (writer, follower) = shared.writer_and_follower();
    let token = follower.create_token(&["-n", "shop", "--service", "web"]);
    let id = token.id.to_string();
    // Where it was created at once, and elsewhere by the watch.
    assert!(follower.succeed(&["token", "ls", "-A"]).contains(&id));
    wait_until("the other one lists it", || writer.succeed(&["token", "ls", "-A"]).contains(&id).then_some(()));
    writer.succeed(&["token", "revoke", &id]);
    assert!(!writer.succeed(&["token", "ls", "-A"]).contains(&id));
    assert_eq!(shared.secrets("token").len(), 0);
    wait_until("the other one forgets it", || (!follower.succeed(&["token", "ls", "-A"]).contains(&id)).then_some(()));
    assert!(Machine::new().fail(&["join", &token.to_string()]).contains("the token is unknown"));
    // One that the watch has not shown yet is looked up.
    let token = follower.create_token(&["-n", "shop"]);
    let only = |replica: &Replica| {
        let mut token = token.clone();
        token.addresses.retain(|address| *address == replica.create_token(&["-n", "x"]).addresses[0]);
        assert_eq!(token.addresses.len(), 1, "{token:?}");
        token.to_string()
    };
    Machine::joined(&only(&writer)).succeed(&["renew", "--now"]);
    // It names the process that writes, too, for a machine whose server is gone.
    assert_eq!(token.addresses.len(), 2);
}

#[test]
fn what_has_no_meaning_any_more_is_deleted_by_the_writer() {
    let Some(shared) = Shared::start("forgotten") else { return };
    let (writer, _follower) = shared.writer_and_follower();
    let token = writer.create_token(&["-n", "shop", "--uses", "2"]);
    Machine::joined(&token.to_string());
    Machine::joined(&token.to_string());
    let kept = writer.create_token(&["-n", "shop"]);
    let [first, second] = &names(&writer)[..] else { panic!("two") };
    let secret = |user: &str| user.replace("gangplank:registrant:", "gangplank-registrant-");
    let (hour, day) = (3600, 24 * 3600);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    shared.edit(&format!("gangplank-token-{}", token.id), "token.json", |token| {
        token["expires"] = json!(now - day - hour);
    });
    shared.edit(&secret(first), "registrant.json", |registrant| registrant["expires"] = json!(now - 90 * day - hour));
    wait_until("they are gone", || {
        (shared.secrets("token").len() == 1 && shared.secrets("registrant").len() == 1).then_some(())
    });
    assert_eq!(shared.secrets("token")[0]["metadata"]["name"], format!("gangplank-token-{}", kept.id));
    assert_eq!(names(&writer), std::slice::from_ref(second));
}

#[test]
fn secret_of_a_token_and_key_of_a_machine_are_nowhere() {
    let Some(shared) = Shared::start("no-secrets") else { return };
    let (writer, follower) = shared.writer_and_follower();
    let token = writer.create_token(&["-n", "shop"]);
    let machine = Machine::joined(&token.to_string());
    let stored = ["token", "registrant"].map(|kind| shared.secrets(kind));
    assert!(stored.iter().all(|secrets| secrets.len() == 1));
    let mut texts = vec![writer.log(), follower.log()];
    for secret in stored.iter().flatten() {
        let data = secret["data"].as_object().expect("a map");
        texts.extend(data.keys().map(|key| String::from_utf8_lossy(&decoded(secret, key)).into_owned()));
        texts.push(secret.to_string());
    }
    let secret = token.secret.expose();
    let text = token.to_string();
    let body = text.strip_prefix("gp1.").expect("a token");
    let key = machine.file("client.key");
    let key = key.lines().nth(1).expect("base64").to_owned();
    assert!(texts.iter().any(|text| text.contains(&token.id.to_string())), "what is no secret is found");
    for hidden in [hex::encode(secret), body.to_owned(), key, "PRIVATE KEY".into()] {
        assert!(texts.iter().all(|text| !text.contains(&hidden)), "{hidden} is told");
    }
    assert!(texts.iter().all(|text| !text.as_bytes().windows(secret.len()).any(|window| window == secret)));
}

#[test]
fn damaged_secret_of_a_token_costs_that_token_alone() {
    let Some(shared) = Shared::start("damaged-token") else { return };
    let replica = shared.replica();
    let [good, bad]: [JoinToken; 2] = [(); 2].map(|()| replica.create_token(&["-n", "shop"]));
    let path = shared.path(&format!("gangplank-token-{}", bad.id));
    let mut secret = shared.cluster.get_json(&path);
    // That of the other one, under this name.
    let other = shared.cluster.get_json(&shared.path(&format!("gangplank-token-{}", good.id)));
    secret["data"] = other["data"].clone();
    assert_eq!(shared.admin("PUT", &path, Some(&secret)).0, 200);
    wait_until("it says so", || replica.log().contains("is damaged: it holds the token").then_some(()));
    assert!(!replica.succeed(&["token", "ls", "-A"]).contains(&bad.id.to_string()));
    Machine::new().fail(&["join", &bad.to_string(), "--no-timer"]);
    Machine::joined(&good.to_string());
}
