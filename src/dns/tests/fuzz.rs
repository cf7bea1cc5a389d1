//! Malformed packets, random and mutated.

use std::sync::LazyLock;

use super::*;

static SAMPLE: LazyLock<TestZone> = LazyLock::new(sample_zone);

/// What holds for every packet whatever: the oracle of the fuzz targets.
fn check(packet: &[u8]) {
    for transport in [Transport::Udp, Transport::Tcp] {
        let Some(octets) = respond(&SAMPLE, transport, packet) else {
            assert!(packet.len() < 12 || packet[2] & 0x80 != 0, "silence to {packet:?}");
            continue;
        };
        assert!(packet.len() >= 12 && packet[2] & 0x80 == 0, "an answer to {packet:?}");
        assert!(octets.len() <= if transport == Transport::Udp { 1232 } else { 65_535 });
        assert_eq!(octets[..2], packet[..2], "the id");
        assert_eq!((octets[2] & 0xf8, octets[2] & 1), (packet[2] & 0x78 | 0x80, packet[2] & 1), "QR, opcode, RD");
        assert_eq!(octets[3] & 0xf0, packet[3] & 0x10, "CD alone is copied");
        let message = Message::from_vec(&octets);
        let message = message.unwrap_or_else(|error| panic!("{error}: {octets:?} to {packet:?}"));
        match octets[5] {
            0 => assert_eq!(octets.len(), 12, "without a question nothing else"),
            _ => {
                let name = message.queries[0].name().to_string();
                let end = 12 + packet[12..].iter().position(|octet| *octet == 0).map_or(0, |_| question_len(packet));
                assert_eq!(octets[12..end], packet[12..end], "the question {name}");
            }
        }
    }
}

/// Octets of the question that a packet begins with, which was found good.
fn question_len(packet: &[u8]) -> usize {
    let mut at = 12;
    while packet[at] != 0 {
        at += 1 + usize::from(packet[at]);
    }
    at + 1 + 4 - 12
}

/// Packets to mutate.
fn corpus() -> Vec<Vec<u8>> {
    let names = [
        "web.prod.svc.cluster.local.",
        "_http._tcp.web.prod.svc.cluster.local.",
        "10-0-0-1.web.prod.svc.cluster.local.",
        "1.0.0.10.in-addr.arpa.",
        "cluster.local.",
        "dns-version.cluster.local.",
        ".",
    ];
    let types = [A, SRV, PTR, AAAA, TXT, SOA, NS, ANY];
    let asks = names.iter().flat_map(|name| types.map(|qtype| query_for(name, qtype)));
    asks.flat_map(|ask| {
        [ask.packet(), ask.clone().edns(1232).packet(), ask.opt(4096, [0, 0, 0x80, 0], b"\0\x03\0\0").packet()]
    })
    .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_packets_get_valid_answers_or_none(packet in prop::collection::vec(any::<u8>(), 0..600)) {
        check(&packet);
    }

    #[test]
    fn mutated_packets_get_valid_answers_or_none(
        which in any::<prop::sample::Index>(),
        mutations in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 0..6),
    ) {
        let corpus = corpus();
        let mut packet = which.get(&corpus).clone();
        for (at, octet, how) in mutations {
            if packet.is_empty() {
                break;
            }
            let at = at.index(packet.len());
            match how {
                0 => packet[at] = octet,
                1 => packet[at] ^= 1 << (octet % 8),
                2 => packet.insert(at, octet),
                _ => packet.truncate(at),
            }
        }
        check(&packet);
    }
}

#[test]
fn corpus_gets_valid_answers() {
    corpus().iter().for_each(|packet| check(packet));
}
