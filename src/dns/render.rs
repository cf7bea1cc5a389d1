//! Records to wire format: one function per kind of RRset.
//!
//! Owners are pointers into the question (RFC 1035 §4.1.4), so that they keep the case of the question.
//! SRV targets are written out (RFC 2782), in lower case.

use std::net::IpAddr;

use super::{
    question::HEADER,
    wire::{HostName, NoSpace, OwnerName, WireWriter, WriteResult},
};
use crate::{
    model::{RecordType, Resolution, cow_tree::Row},
    zone::{
        AddressRecord, Addresses, Alias, Apex, Hit, PtrRecord, QName, Rrset, ServiceRecords, SrvRecord, ZoneReader,
    },
};

/// The implemented version of Kubernetes' DNS specification, as TXT.
const VERSION: &[u8] = b"1.1.0";

/// Seconds that the version may be cached: it changes with a release at most.
const VERSION_TTL: u32 = 28_800;

/// Largest TTL of an SOA, in seconds, whatever the zone's TTL.
const MAX_SOA_TTL: u32 = 300;

/// REFRESH, RETRY and EXPIRE of the SOA in seconds (RFC 1035 §3.3.13). Only secondaries use them, and
/// zone transfers are refused.
const REFRESH_RETRY_EXPIRE: [u32; 3] = [7200, 1800, 86_400];

/// Most names in the answer to one PTR question. An address that a hundred thousand services share would
/// otherwise fill every packet.
pub(super) const MAX_PTR: usize = 64;

/// Octets of a record before its RDATA, when the owner is a pointer.
const FIXED: usize = 12;

/// Octets in the RDATA of SRV before the target.
const SRV_FIXED: usize = 6;

/// Writes the records of an answer.
pub(super) struct ResponseRenderer<'r, 'z, 'o> {
    pub(super) w: WireWriter<'o>,
    pub(super) zone: &'r ZoneReader<'z>,
    pub(super) name: &'r QName,
    pub(super) rng: &'r mut fastrand::Rng,
    pub(super) sections: SectionCounts,
}

/// Records per section, and whether a required record is missing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct SectionCounts {
    pub(super) answers: u16,
    pub(super) authority: u16,
    pub(super) additional: u16,
    pub(super) truncated: bool,
}

impl<'r> ResponseRenderer<'r, '_, '_> {
    /// The answer section, and the additional section for it.
    pub(super) fn hit(&mut self, hit: &Hit<'r>) {
        let ttl = self.zone.ttl();
        let owner = self.asked();
        match *hit {
            Hit::A(set, ttl) => self.addresses(owner, RecordType::A, set, ttl),
            Hit::Aaaa(set, ttl) => self.addresses(owner, RecordType::Aaaa, set, ttl),
            Hit::Cname(Alias { target, resolution }, asked) => {
                let target_at = self.w.len() + FIXED;
                let written = self.w.record(owner, RecordType::Cname, ttl, |w| w.name(target));
                if self.answered(written).is_ok()
                    && let Resolution::Addresses(found) = resolution
                {
                    // RFC 1034 §3.6.2: who follows an alias gets what it leads to in the same answer. Resolvers of pods do not ask again.
                    let owner = OwnerName { at: target_at, name: HostName { target: None, service: &[] } };
                    match asked {
                        Some(RecordType::A) => self.resolved(owner, RecordType::A, &found.v4, found.ttl),
                        Some(RecordType::Aaaa) => self.resolved(owner, RecordType::Aaaa, &found.v6, found.ttl),
                        _ => {}
                    }
                }
            }
            Hit::Srv(set, records) => self.srv(set, records),
            Hit::Ptr(set, ip) => self.ptr(set, ip),
            Hit::Version => {
                let written = self.w.record(owner, RecordType::Txt, VERSION_TTL, |w| w.label(VERSION));
                let _ = self.answered(written);
            }
            Hit::Soa(apex) => {
                let written = self.write_soa(apex);
                let _ = self.answered(written);
            }
            Hit::Ns(found) => {
                // Where the name of the server will be: the owner before it is a pointer, because the question begins at octet 12.
                let host_at = self.w.len() + FIXED;
                let zone_at = self.zone_in_question();
                let zone = self.zone;
                let written = self.w.record(owner, RecordType::Ns, ttl, |w| name_server(w, zone, zone_at));
                if self.answered(written).is_ok() {
                    let name = HostName { target: None, service: &[] };
                    // What does not fit here is left out without TC: it is additional (RFC 2181 §9).
                    let _ = self.additional(OwnerName { at: host_at, name }, found);
                }
            }
        }
    }

    /// RFC 2308 §3: the SOA carries the negative TTL. Without it nothing is cached, and pods with
    /// `ndots:5` ask again for every search suffix.
    pub(super) fn negative(&mut self, apex: Apex) {
        match self.write_soa(apex) {
            Ok(()) => self.sections.authority += 1,
            Err(NoSpace) => self.sections.truncated = true,
        }
    }

    /// The queried name.
    fn asked(&self) -> OwnerName<'r> {
        OwnerName { at: HEADER, name: HostName { target: None, service: self.name.suffix(0) } }
    }

    /// Counts a record of the answer section, or sets TC if it did not fit.
    fn answered(&mut self, written: WriteResult) -> WriteResult {
        match written {
            Ok(()) => self.sections.answers += 1,
            // RFC 2181 §9: TC is set for missing required data only.
            Err(NoSpace) => self.sections.truncated = true,
        }
        written
    }

    /// The offset of the zone's name in the question, if the question is in the zone.
    fn zone_in_question(&self) -> Option<usize> {
        self.zone.labels_below_origin(self.name).map(|below| HEADER + self.name.offset(below))
    }

    fn write_soa(&mut self, apex: Apex) -> WriteResult {
        let zone = self.zone;
        // RFC 2308 §5: a negative answer is cached for the smaller of the SOA's TTL and MINIMUM.
        let (ttl, minimum) = (zone.ttl().min(MAX_SOA_TTL), zone.ttl());
        let at = HEADER + self.name.offset(apex.0);
        let owner = OwnerName { at, name: HostName { target: None, service: self.name.suffix(apex.0) } };
        let zone_at = self.zone_in_question();
        self.w.record(owner, RecordType::Soa, ttl, |w| {
            name_server(w, zone, zone_at)?;
            // Of a reverse name nothing can be pointed at, so the first name spells the zone out, and the second points at that.
            let zone_at = zone_at.unwrap_or_else(|| w.len() - zone.origin().len());
            w.label(b"hostmaster")?;
            w.pointer_or(zone_at, |w| w.put(zone.origin()))?;
            w.u32(zone.serial())?;
            REFRESH_RETRY_EXPIRE.iter().try_for_each(|seconds| w.u32(*seconds))?;
            w.u32(minimum)
        })
    }

    fn addresses<I: Ip>(
        &mut self,
        owner: OwnerName<'_>,
        rtype: RecordType,
        set: Rrset<'_, AddressRecord<I>>,
        max_ttl: u32,
    ) where
        AddressRecord<I>: Row,
    {
        let ttl = self.zone.ttl().min(max_ttl);
        // Ends at the first record that does not fit; `answered` has set TC then.
        let _ = set.visit_from(set.draw(self.rng), |row| {
            let written = row.ip.with_octets(|octets| self.w.record(owner, rtype, ttl, |w| w.put(octets)));
            self.answered(written)
        });
    }

    /// The addresses of a name outside of the zone, beginning with any of them.
    fn resolved<I: Ip>(&mut self, owner: OwnerName<'_>, rtype: RecordType, addresses: &[I], max_ttl: u32) {
        let ttl = self.zone.ttl().min(max_ttl);
        let (before, from) = addresses.split_at(self.rng.usize(0..addresses.len().max(1)));
        for ip in from.iter().chain(before) {
            let written = ip.with_octets(|octets| self.w.record(owner, rtype, ttl, |w| w.put(octets)));
            if self.answered(written).is_err() {
                return;
            }
        }
    }

    fn srv(&mut self, set: Rrset<'r, SrvRecord>, records: &'r ServiceRecords) {
        let ttl = self.zone.ttl();
        let owner = self.asked();
        // The question is the owner of all records, and its end is the end of every target.
        // `_port._proto` are the two labels before the service.
        let service = self.name.suffix(2);
        let first = set.draw(self.rng);
        let mut at = self.w.len();
        let all = set.visit_from(first, |row| {
            let written = self.w.record(owner, RecordType::Srv, ttl, |w| {
                w.u16(row.priority)?;
                w.u16(row.srv_weight())?;
                w.u16(row.port)?;
                // RFC 2782: the target is not compressed.
                w.host(HostName { target: Some(&row.target), service })
            });
            self.answered(written)
        });
        // Truncated: the client asks again over TCP, and additional records would be wasted.
        if all.is_err() {
            return;
        }
        // Rows are sorted by target, so equal targets are adjacent, except for the target at which the draw
        // starts: its rows can be at both ends.
        let (mut seen, mut opening) = (None, None);
        let _ = set.visit_from(first, |SrvRecord { target, .. }| {
            // The target is spelled out in the SRV record. Its address records point there, which takes two octets each.
            let name = OwnerName { at: at + FIXED + SRV_FIXED, name: HostName { target: Some(target), service } };
            // RDLENGTH of the record leads to the next one.
            at += FIXED + usize::from(self.w.u16_at(at + FIXED - 2));
            if seen == Some(target) || opening == Some(target) {
                return Ok(());
            }
            seen = Some(target);
            opening.get_or_insert(target);
            records.target(target).map_or(Ok(()), |found| self.additional(name, found))
        });
    }

    /// RFC 2181 §9: additional data is left out by whole RRsets, without TC.
    fn additional(&mut self, owner: OwnerName<'_>, found: Addresses<'_>) -> WriteResult {
        if let Some(v4) = found.v4 {
            self.additional_rrset(owner, RecordType::A, v4)?;
        }
        if let Some(v6) = found.v6 {
            self.additional_rrset(owner, RecordType::Aaaa, v6)?;
        }
        Ok(())
    }

    fn additional_rrset<I: Ip>(
        &mut self,
        owner: OwnerName<'_>,
        rtype: RecordType,
        set: Rrset<'_, AddressRecord<I>>,
    ) -> WriteResult
    where
        AddressRecord<I>: Row,
    {
        // Checked first, so that up to a thousand records are not written and then discarded.
        if set.len() * (FIXED + size_of::<I>()) > self.w.room() {
            return Err(NoSpace);
        }
        let ttl = self.zone.ttl();
        let first = set.draw(self.rng);
        let count = self.w.whole(|w| {
            let mut count = 0;
            set.visit_from(first, |row| {
                count += 1;
                row.ip.with_octets(|octets| w.record(owner, rtype, ttl, |w| w.put(octets)))
            })?;
            Ok(count)
        })?;
        self.sections.additional += count;
        Ok(())
    }

    fn ptr(&mut self, set: Rrset<'_, PtrRecord>, ip: IpAddr) {
        let (ttl, zone) = (self.zone.ttl(), self.zone);
        let owner = self.asked();
        // The offset where `svc.<zone>` was written.
        let mut spelled = None;
        for PtrRecord { service, host } in set.wrap_from(set.draw(self.rng)).take(MAX_PTR) {
            let mut suffix_at = 0;
            let written = self.w.record(owner, RecordType::Ptr, ttl, |w| {
                match host {
                    Some(label) => w.label(label.as_str().as_bytes())?,
                    None => w.dashed(ip)?,
                }
                w.label(service.name().as_bytes())?;
                w.label(service.namespace().as_bytes())?;
                suffix_at = w.len();
                let suffix = |w: &mut WireWriter<'_>| {
                    w.label(b"svc")?;
                    w.put(zone.origin())
                };
                match spelled {
                    Some(at) => w.pointer_or(at, suffix),
                    None => suffix(w),
                }
            });
            if self.answered(written).is_err() {
                return;
            }
            spelled.get_or_insert(suffix_at);
        }
    }
}

/// `ns.dns.<zone>`.
fn name_server(w: &mut WireWriter<'_>, zone: &ZoneReader<'_>, zone_at: Option<usize>) -> WriteResult {
    w.label(b"ns")?;
    w.label(b"dns")?;
    match zone_at {
        Some(at) => w.pointer_or(at, |w| w.put(zone.origin())),
        None => w.put(zone.origin()),
    }
}

/// An address of either family, as RDATA.
trait Ip: Copy + Ord {
    fn with_octets<T>(self, write: impl FnOnce(&[u8]) -> T) -> T;
}

impl Ip for std::net::Ipv4Addr {
    fn with_octets<T>(self, write: impl FnOnce(&[u8]) -> T) -> T {
        write(&self.octets())
    }
}

impl Ip for std::net::Ipv6Addr {
    fn with_octets<T>(self, write: impl FnOnce(&[u8]) -> T) -> T {
        write(&self.octets())
    }
}
