//! Metrics of the DNS listeners, named and labelled as CoreDNS has them.
//!
//! Each writer counts in a [`DnsCounters`] of its own, in plain cells that no other thread writes; the
//! scrape adds them up. So a query costs a few additions and shares no cache line.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder},
    metrics::{MetricType, exemplar::Exemplar},
    registry::{Registry, Unit},
};

use crate::model::{Rcode, RecordType};

/// Index of the counter for types without a name: after all others.
const OTHER_TYPE: usize = RecordType::ALL.len();

/// Upper ends of the size buckets in octets: those of CoreDNS, 8291 too, so that dashboards which were made for it fit.
const SIZES: [u64; 14] = [0, 100, 200, 300, 400, 511, 1023, 2047, 4095, 8291, 16_000, 32_000, 48_000, 64_000];

/// Duration buckets: the upper ends are 1 µs × 2^n.
const DURATIONS: usize = 20;

/// One listener, as labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerLabels {
    /// `dns://` and the address it is bound to.
    pub server: String,
    /// `udp` or `tcp`.
    pub proto: &'static str,
    /// `1` for IPv4, `2` for IPv6.
    pub family: &'static str,
    /// The zone's name with its final dot. What is outside of it is counted under `.`.
    pub zone: String,
}

/// One answered query.
#[derive(Debug, Clone, Copy)]
pub struct AnsweredQuery {
    /// Whether the name is in the zone.
    pub in_zone: bool,
    /// The type; `None` if no question was read, or its type has no name.
    pub rtype: Option<RecordType>,
    /// The response code of the answer.
    pub rcode: Rcode,
    /// Octets of the query.
    pub request: usize,
    /// Octets of the answer.
    pub response: usize,
    /// Time from the received packet to the written answer.
    pub took: Duration,
}

/// One counter, written by one thread or by several.
#[derive(Debug, Default)]
struct LocalCounter(AtomicU64);

impl LocalCounter {
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, number: u64, shared: bool) {
        if shared {
            self.0.fetch_add(number, Ordering::Relaxed);
        } else {
            // With one writer a plain load and store suffice, without a locked instruction.
            self.0.store(self.get().wrapping_add(number), Ordering::Relaxed);
        }
    }
}

#[derive(Debug)]
struct LocalHistogram<const N: usize> {
    buckets: [LocalCounter; N],
    above: LocalCounter,
    sum: LocalCounter,
}

impl<const N: usize> Default for LocalHistogram<N> {
    fn default() -> Self {
        Self {
            buckets: std::array::from_fn(|_| LocalCounter::default()),
            above: LocalCounter::default(),
            sum: LocalCounter::default(),
        }
    }
}

impl<const N: usize> LocalHistogram<N> {
    fn add(&self, bucket: usize, value: u64, shared: bool) {
        // One bucket, not all from there on: the encoder adds them up, so that a query writes one cell for each
        // histogram.
        self.buckets.get(bucket).unwrap_or(&self.above).add(1, shared);
        self.sum.add(value, shared);
    }
}

/// Queries in the zone, or outside of it.
#[derive(Debug, Default)]
struct ZoneCounters {
    /// By [`RecordType`]; the last is `other`.
    types: [LocalCounter; RecordType::ALL.len() + 1],
    rcodes: [LocalCounter; Rcode::ALL.len()],
    durations: LocalHistogram<DURATIONS>,
    requests: LocalHistogram<{ SIZES.len() }>,
    responses: LocalHistogram<{ SIZES.len() }>,
}

/// The counters of one writer: a UDP thread alone, or all connections of a TCP listener.
#[derive(Debug)]
#[repr(align(128))] // so that no two writers share a cache line, nor a pair of them
pub struct DnsCounters {
    shared: bool,
    outside: ZoneCounters,
    in_zone: ZoneCounters,
    panics: LocalCounter,
    receive_errors: LocalCounter,
}

impl DnsCounters {
    fn new(shared: bool) -> Self {
        Self {
            shared,
            outside: ZoneCounters::default(),
            in_zone: ZoneCounters::default(),
            panics: LocalCounter::default(),
            receive_errors: LocalCounter::default(),
        }
    }

    /// Counts an answered query.
    pub fn query(&self, query: &AnsweredQuery) {
        let shared = self.shared;
        let counts = if query.in_zone { &self.in_zone } else { &self.outside };
        // An index into all assigned types, not the number from the wire: no question can make a new series.
        counts.types[query.rtype.map_or(OTHER_TYPE, |rtype| rtype as usize)].add(1, shared);
        counts.rcodes[query.rcode as usize].add(1, shared);
        let nanos = u64::try_from(query.took.as_nanos()).unwrap_or(u64::MAX);
        counts.durations.add(duration_bucket(nanos), nanos, shared);
        for (histogram, octets) in [(&counts.requests, query.request), (&counts.responses, query.response)] {
            let octets = octets as u64;
            histogram.add(SIZES.partition_point(|end| *end < octets), octets, shared);
        }
    }

    /// Counts a packet on which the responder panicked, which it never should.
    pub fn panicked(&self) {
        self.panics.add(1, self.shared);
    }

    /// Counts a failed receive of a UDP socket.
    pub fn receive_failed(&self) {
        self.receive_errors.add(1, self.shared);
    }
}

/// The bucket of a duration: the first whose upper end, 1 000 ns × 2^n, is not below it.
fn duration_bucket(nanos: u64) -> usize {
    // Rounded up: a bucket holds what is not above its end. Its number is then the logarithm, without a search.
    let micros = nanos.div_ceil(1000).max(1);
    (u64::BITS - (micros - 1).leading_zeros()) as usize
}

/// Metrics of the DNS listeners.
#[derive(Debug, Clone)]
pub struct DnsMetrics(Arc<DnsCollector>);

#[derive(Debug, Default)]
struct DnsCollector(Mutex<Vec<ListenerCounters>>);

/// All counters of one listener.
#[derive(Debug)]
struct ListenerCounters {
    listener: ListenerLabels,
    counters: Vec<Arc<DnsCounters>>,
}

impl DnsMetrics {
    pub(super) fn register(all: &mut Registry) -> Self {
        let counters = Arc::new(DnsCollector::default());
        all.register_collector(Box::new(Arc::clone(&counters)));
        Self(counters)
    }

    /// Counters for one thread, which alone may write it.
    #[must_use]
    pub fn single_writer(&self, listener: &ListenerLabels) -> Arc<DnsCounters> {
        self.add(listener, DnsCounters::new(false))
    }

    /// Counters that several threads write.
    #[must_use]
    pub fn multi_writer(&self, listener: &ListenerLabels) -> Arc<DnsCounters> {
        self.add(listener, DnsCounters::new(true))
    }

    fn add(&self, listener: &ListenerLabels, counters: DnsCounters) -> Arc<DnsCounters> {
        let counters = Arc::new(counters);
        // Taken at the start of a listener and by the scrape. Queries never take it.
        let mut groups = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        match groups.iter_mut().find(|group| group.listener == *listener) {
            Some(group) => group.counters.push(Arc::clone(&counters)),
            None => groups.push(ListenerCounters { listener: listener.clone(), counters: vec![Arc::clone(&counters)] }),
        }
        counters
    }
}

/// Where the counts of one zone are among the counters of a writer.
type ZoneOf = fn(&DnsCounters) -> &ZoneCounters;

impl ListenerCounters {
    fn sum(&self, cell: impl Fn(&DnsCounters) -> &LocalCounter) -> u64 {
        self.counters.iter().map(|counters| cell(counters).get()).sum()
    }

    /// In the zone and outside: the label, and where its counts are.
    fn zones(&self) -> [(&str, ZoneOf); 2] {
        [(&self.listener.zone, |counters| &counters.in_zone), (".", |counters| &counters.outside)]
    }

    fn histogram<const N: usize>(
        &self,
        counts: ZoneOf,
        of: fn(&ZoneCounters) -> &LocalHistogram<N>,
    ) -> (u64, [u64; N], u64) {
        let buckets = std::array::from_fn(|index| self.sum(|counters| &of(counts(counters)).buckets[index]));
        (self.sum(|counters| &of(counts(counters)).sum), buckets, self.sum(|counters| &of(counts(counters)).above))
    }
}

type NoExemplar = Exemplar<[(&'static str, &'static str); 0], f64>;

fn count<const N: usize>(to: &mut MetricEncoder<'_>, labels: [(&str, &str); N], number: u64) -> fmt::Result {
    to.encode_family(&labels)?.encode_counter(&number, None::<&NoExemplar>)
}

fn encode_histogram<const N: usize, const B: usize>(
    to: &mut MetricEncoder<'_>,
    labels: [(&str, &str); N],
    ends: [f64; B],
    unit: f64,
    (sum, buckets, above): (u64, [u64; B], u64),
) -> fmt::Result {
    let mut rows: Vec<(f64, u64)> = ends.into_iter().zip(buckets).collect();
    // The format wants a last bucket without an end (OpenMetrics 1.0, histogram).
    rows.push((f64::INFINITY, above));
    let all = rows.iter().map(|(_, count)| count).sum();
    to.encode_family(&labels)?.encode_histogram::<[(&str, &str); 0]>(sum as f64 * unit, all, &rows, None)
}

impl Collector for DnsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let e = &mut encoder;
        encode_queries(&groups, e)?;
        encode_histograms(&groups, e)?;
        encode_receive_errors(&groups, e)
    }
}

fn encode_queries(groups: &[ListenerCounters], e: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let mut to =
        e.encode_descriptor("gangplank_dns_requests", "DNS queries that were answered", None, MetricType::Counter)?;
    for group in groups {
        let ListenerLabels { server, proto, family, zone: _ } = &group.listener;
        for (zone, counts) in group.zones() {
            let names = RecordType::ALL.iter().map(|rtype| rtype.name()).chain(["other"]);
            for (index, rtype) in names.enumerate() {
                let labels =
                    [("server", &**server), ("zone", zone), ("proto", proto), ("family", family), ("type", rtype)];
                count(&mut to, labels, group.sum(|counters| &counts(counters).types[index]))?;
            }
        }
    }
    let mut to = e.encode_descriptor("gangplank_dns_responses", "DNS answers by rcode", None, MetricType::Counter)?;
    for (server, same) in by_server(groups) {
        for zone in 0..2 {
            for rcode in Rcode::ALL {
                // UDP and TCP of one server are summed.
                let sum = |group: &&ListenerCounters| {
                    group.sum(|counters| &group.zones()[zone].1(counters).rcodes[*rcode as usize])
                };
                let labels = [("server", server), ("zone", same[0].zones()[zone].0), ("rcode", rcode.name())];
                count(&mut to, labels, same.iter().map(sum).sum())?;
            }
        }
    }
    let help = "Packets on which the responder panicked";
    let mut to = e.encode_descriptor("gangplank_panics", help, None, MetricType::Counter)?;
    let panics: u64 = groups.iter().map(|group| group.sum(|counters| &counters.panics)).sum();
    to.encode_counter(&panics, None::<&NoExemplar>)
}

fn encode_histograms(groups: &[ListenerCounters], e: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let ends: [f64; DURATIONS] = std::array::from_fn(|n| (1u64 << n) as f64 * 1e-6);
    let help = "From the packet in hand to the answer in hand";
    let mut to =
        e.encode_descriptor("gangplank_dns_request_duration", help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for (server, same) in by_server(groups) {
        for zone in 0..2 {
            let mut all = (0, [0; DURATIONS], 0);
            for group in &same {
                let (sum, buckets, above) = group.histogram(group.zones()[zone].1, |counts| &counts.durations);
                all.0 += sum;
                all.1.iter_mut().zip(buckets).for_each(|(all, one)| *all += one);
                all.2 += above;
            }
            encode_histogram(&mut to, [("server", server), ("zone", same[0].zones()[zone].0)], ends, 1e-9, all)?;
        }
    }
    let ends = SIZES.map(|octets| octets as f64);
    type Sizes = fn(&ZoneCounters) -> &LocalHistogram<{ SIZES.len() }>;
    let sizes: [(&str, &str, Sizes); 2] = [
        ("gangplank_dns_request_size", "Octets of queries", |counts| &counts.requests),
        ("gangplank_dns_response_size", "Octets of answers", |counts| &counts.responses),
    ];
    for (name, help, of) in sizes {
        let mut to = e.encode_descriptor(name, help, Some(&Unit::Bytes), MetricType::Histogram)?;
        for group in groups {
            let ListenerLabels { server, proto, .. } = &group.listener;
            for (zone, counts) in group.zones() {
                let labels = [("server", &**server), ("zone", zone), ("proto", proto)];
                encode_histogram(&mut to, labels, ends, 1.0, group.histogram(counts, of))?;
            }
        }
    }
    Ok(())
}

fn encode_receive_errors(groups: &[ListenerCounters], e: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let help = "Times that a UDP socket could not receive";
    let mut to = e.encode_descriptor("gangplank_dns_udp_receive_errors", help, None, MetricType::Counter)?;
    for group in groups.iter().filter(|group| group.listener.proto == "udp") {
        let labels = [("server", &*group.listener.server)];
        count(&mut to, labels, group.sum(|counters| &counters.receive_errors))?;
    }
    Ok(())
}

/// The groups of each server: UDP and TCP of one address.
fn by_server(groups: &[ListenerCounters]) -> Vec<(&str, Vec<&ListenerCounters>)> {
    let mut servers: Vec<(&str, Vec<&ListenerCounters>)> = Vec::new();
    for group in groups {
        let server = group.listener.server.as_str();
        match servers.iter_mut().find(|(known, _)| *known == server) {
            Some((_, same)) => same.push(group),
            None => servers.push((server, vec![group])),
        }
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scrape_is_the_sum_of_all_threads() {
        let mut registry = Registry::default();
        let metrics = DnsMetrics::register(&mut registry);
        let udp = ListenerLabels { server: "dns://127.0.0.1:53".into(), proto: "udp", family: "1", zone: "z.".into() };
        let tcp = ListenerLabels { proto: "tcp", ..udp.clone() };
        let query = AnsweredQuery {
            in_zone: true,
            rtype: Some(RecordType::A),
            rcode: Rcode::NoError,
            request: 40,
            response: 600,
            took: Duration::from_nanos(1500),
        };
        let counters = metrics.single_writer(&udp);
        counters.query(&query);
        counters.query(&AnsweredQuery { in_zone: false, rtype: None, rcode: Rcode::Refused, ..query });
        metrics.single_writer(&udp).query(&query);
        let shared = metrics.multi_writer(&tcp);
        shared.query(&query);
        shared.panicked();

        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("writes to a string");
        for line in [
            r#"gangplank_dns_requests_total{server="dns://127.0.0.1:53",zone="z.",proto="udp",family="1",type="A"} 2"#,
            r#"gangplank_dns_requests_total{server="dns://127.0.0.1:53",zone=".",proto="udp",family="1",type="other"} 1"#,
            r#"gangplank_dns_responses_total{server="dns://127.0.0.1:53",zone="z.",rcode="NOERROR"} 3"#,
            r#"gangplank_dns_responses_total{server="dns://127.0.0.1:53",zone=".",rcode="REFUSED"} 1"#,
            r#"gangplank_dns_request_duration_seconds_bucket{le="0.000001",server="dns://127.0.0.1:53",zone="z."} 0"#,
            r#"gangplank_dns_request_duration_seconds_count{server="dns://127.0.0.1:53",zone="z."} 3"#,
            r#"gangplank_dns_request_duration_seconds_bucket{le="+Inf",server="dns://127.0.0.1:53",zone="z."} 3"#,
            r#"gangplank_dns_response_size_bytes_bucket{le="1023.0",server="dns://127.0.0.1:53",zone="z.",proto="tcp"} 1"#,
            r#"gangplank_dns_response_size_bytes_bucket{le="511.0",server="dns://127.0.0.1:53",zone="z.",proto="tcp"} 0"#,
            r#"gangplank_dns_udp_receive_errors_total{server="dns://127.0.0.1:53"} 0"#,
            "gangplank_panics_total 1",
        ] {
            assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
        }
    }

    #[test]
    fn duration_bucket_is_the_first_that_holds_it() {
        for (nanos, bucket) in [(0, 0), (1, 0), (1000, 0), (1001, 1), (2000, 1), (2001, 2), (4000, 2), (1 << 40, 31)] {
            assert_eq!(duration_bucket(nanos), bucket, "{nanos}");
        }
    }
}
