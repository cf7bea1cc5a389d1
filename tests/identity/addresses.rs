//! Addresses that nobody may register.

use super::{
    SecuredServer,
    ownership::{Registrant, TEAM_POLICY},
};

#[tokio::test(flavor = "multi_thread")]
async fn denied_networks_are_refused_with_the_one_that_refuses() {
    let flags = ["--deny-addresses", "10.1.9.0/24,2001:db8:9::/48"];
    let secured = SecuredServer::start_with_flags(TEAM_POLICY, &flags);
    let channel = secured.connect(Some(&secured.ca.sign("vm-1", &["web"]))).await.expect("a handshake");
    let mut vm = Registrant::new(channel, "shop");
    for (address, network) in [("10.1.9.7", "10.1.9.0/24"), ("2001:db8:9::7", "2001:db8:9::/48")] {
        let said = format!("ipaddress: {address} may not be registered: it is in {network} (--deny-addresses)");
        assert_eq!(vm.register(address, 1.0).await, (403, said.clone()));
        let plaintext = secured.server.run(&["register", "web", address, "-n", "shop"]);
        assert!(String::from_utf8_lossy(&plaintext.stderr).contains(&said), "{plaintext:?}");
    }
    assert_eq!(vm.register("10.1.8.7", 1.0).await.0, 201);
}
