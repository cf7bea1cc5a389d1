//! RFC 8906 §8: the probes that detect servers which fail to answer, each over UDP and TCP.
//!
//! Packets are built octet by octet, because libraries refuse to build most of them.

use std::net::SocketAddr;

use crate::support::{
    dns::{exchange_tcp, exchange_udp},
    server::Server,
};

const ZONE: &[u8] = b"\x07cluster\x05local\x00";
const SOA: u16 = 6;
const UNKNOWN: u16 = 1000;
const DNSKEY: u16 = 48;

const RD: u16 = 0x0100;
const RESERVED: u16 = 0x0040;
const AD: u16 = 0x0020;
const CD: u16 = 0x0010;
const QR_AA: u16 = 0x8400;

const DO: u16 = 0x8000;
/// A flag of OPT that means nothing yet.
const UNKNOWN_FLAG: u16 = 0x0040;

/// Option 100, which means nothing yet.
const OPTION_100: &[u8] = &[0, 100, 0, 2, 1, 2];
/// A cookie (RFC 7873), a client subnet (RFC 7871) and EXPIRE (RFC 7314).
const OTHERS: &[u8] = &[0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0, 8, 0, 4, 0, 1, 0, 0, 0, 9, 0, 0];

/// The OPT record of a probe.
#[derive(Clone, Copy)]
struct Edns {
    size: u16,
    version: u8,
    flags: u16,
    options: &'static [u8],
}

const EDNS: Edns = Edns { size: 4096, version: 0, flags: 0, options: &[] };

fn probe(flags: u16, qtype: u16, edns: Option<Edns>) -> Vec<u8> {
    let mut packet = vec![0x12, 0x34];
    packet.extend(flags.to_be_bytes());
    packet.extend([0, 1, 0, 0, 0, 0, 0, u8::from(edns.is_some())]);
    packet.extend(ZONE);
    packet.extend(qtype.to_be_bytes());
    packet.extend([0, 1]);
    if let Some(Edns { size, version, flags, options }) = edns {
        packet.extend([0, 0, 41]);
        packet.extend(size.to_be_bytes());
        packet.extend([0, version]);
        packet.extend(flags.to_be_bytes());
        packet.extend(u16::try_from(options.len()).expect("few options").to_be_bytes());
        packet.extend(options);
    }
    packet
}

/// What an answer must be: the flags of its header, records in answer and authority, and of its
/// OPT the upper part of the rcode and the flags.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    flags: u16,
    answers: u8,
    authority: u8,
    opt: Option<(u8, u16)>,
}

fn seen(answer: &[u8]) -> Seen {
    assert_eq!(answer[..2], [0x12, 0x34], "the id");
    let [_, answers, _, authority, _, additional] = answer[6..12] else { unreachable!("six octets") };
    let opt = (additional > 0).then(|| {
        // Without an option in it, it is the last eleven octets.
        let [0, 0, 41, _, _, upper, version, high, low, 0, 0] = answer[answer.len() - 11..] else {
            panic!("no bare OPT at the end of {answer:02x?}")
        };
        assert_eq!(version, 0, "the highest version that is spoken");
        (upper, u16::from_be_bytes([high, low]))
    });
    Seen { flags: u16::from_be_bytes([answer[2], answer[3]]), answers, authority, opt }
}

fn assert_everywhere(server: SocketAddr, what: &str, packet: &[u8], expected: &Seen) {
    for (over, answer) in [("UDP", exchange_udp(server, packet)), ("TCP", exchange_tcp(server, packet))] {
        assert_eq!(seen(&answer), *expected, "{what} over {over}: {answer:02x?}");
    }
}

#[test]
fn rfc8906_8_1_basic_dns() {
    let server = Server::start();
    let soa = |flags| Seen { flags, answers: 1, authority: 0, opt: None };
    let no_data = Seen { answers: 0, authority: 1, ..soa(QR_AA) };
    for (what, flags, qtype, expected) in [
        ("§8.1.1 a zone", 0, SOA, soa(QR_AA)),
        ("§8.1.2 an unknown type", 0, UNKNOWN, no_data),
        ("§8.1.3.1 CD", CD, SOA, soa(QR_AA | CD)),
        ("§8.1.3.2 AD", AD, SOA, soa(QR_AA)),
        ("§8.1.3.3 the reserved bit", RESERVED, SOA, soa(QR_AA)),
        ("§8.1.3.4 RD", RD, SOA, soa(QR_AA | RD)),
    ] {
        assert_everywhere(server.dns, what, &probe(flags, qtype, None), &expected);
    }
    // §8.1.4: opcode 15 is unassigned.
    let packet = probe(15 << 11, SOA, None);
    let expected = Seen { flags: 0x8000 | 15 << 11 | 4, answers: 0, authority: 0, opt: None };
    assert_everywhere(server.dns, "§8.1.4 an unknown opcode", &packet, &expected);
}

#[test]
fn rfc8906_8_2_extended_dns() {
    let server = Server::start();
    let soa = Seen { flags: QR_AA, answers: 1, authority: 0, opt: Some((0, 0)) };
    let bad_version = || Seen { flags: 0x8000, answers: 0, authority: 0, opt: Some((1, 0)) };
    for (what, qtype, edns, expected) in [
        ("§8.2.1 version 0", SOA, EDNS, Seen { ..soa }),
        ("§8.2.2 version 1", SOA, Edns { version: 1, ..EDNS }, bad_version()),
        ("§8.2.3 an unknown option", SOA, Edns { options: OPTION_100, ..EDNS }, Seen { ..soa }),
        ("§8.2.4 an unknown flag", SOA, Edns { flags: UNKNOWN_FLAG, ..EDNS }, Seen { ..soa }),
        ("§8.2.5 version 1 and a flag", SOA, Edns { version: 1, flags: UNKNOWN_FLAG, ..EDNS }, bad_version()),
        ("§8.2.6 version 1 and an option", SOA, Edns { version: 1, options: OPTION_100, ..EDNS }, bad_version()),
        (
            "§8.2.7 a small size",
            DNSKEY,
            Edns { size: 512, flags: DO, ..EDNS },
            Seen { answers: 0, authority: 1, opt: Some((0, DO)), ..soa },
        ),
        ("§8.2.8 DO", SOA, Edns { flags: DO, ..EDNS }, Seen { opt: Some((0, DO)), ..soa }),
        (
            "§8.2.9 version 1 and DO",
            SOA,
            Edns { version: 1, flags: DO, ..EDNS },
            Seen { opt: Some((1, DO)), ..bad_version() },
        ),
        ("§8.2.10 several known options", SOA, Edns { options: OTHERS, ..EDNS }, Seen { ..soa }),
    ] {
        assert_everywhere(server.dns, what, &probe(0, qtype, Some(edns)), &expected);
    }
}
