//! What one answer costs, without sockets: `answer()` over the mix of questions, by size of the
//! zone; and what one change costs, by size of the service and of the zone (P1d, P6).

#[path = "support/bench_zone.rs"]
mod bench_zone;

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use gangplank::dns::{Context, MAX_UDP, Transport, answer};

use bench_zone::{BenchZone, instance, mix, service};

fn answers(c: &mut Criterion) {
    let mut group = c.benchmark_group("answer");
    for (services, instances) in [(1_000, 3), (100_000, 3), (1_000_000, 1)] {
        let bench_zone = BenchZone::of(services, instances);
        let mut rng = fastrand::Rng::with_seed(1);
        let queries = mix(services, &mut rng);
        let context = Context { transport: Transport::Udp, nsid: b"bench" };
        let mut out = [0; MAX_UDP as usize];
        let mut next = queries.iter().cycle();
        group.bench_function(format!("mix, {services} services of {instances}"), |b| {
            b.iter(|| {
                let packet = next.next().expect("a cycle does not end");
                black_box(answer(&bench_zone.zone.pin(), &context, &mut rng, packet, &mut out))
            });
        });
    }
    group.finish();
}

fn changes(c: &mut Criterion) {
    let mut group = c.benchmark_group("publish one change");
    for (services, instances) in [(1, 1), (1, 32), (1, 10_000), (1_000, 1), (100_000, 1), (1_000_000, 1)] {
        let mut bench_zone = BenchZone::of(services, instances);
        // As many as there are, but not more than the caches mind: spread over all services.
        let spread = (0..(services * instances).min(20_000)).map(|n| (n.wrapping_mul(7919)) % (services * instances));
        let made: Vec<_> = spread
            .flat_map(|n| {
                let key = service(n / instances);
                [2.0, 1.0].map(|weight| (key.clone(), instance(&key, n, weight)))
            })
            .collect();
        let mut next = made.iter().cycle();
        group.bench_function(format!("{services} services of {instances}"), |b| {
            b.iter(|| {
                let (key, instance) = next.next().expect("a cycle does not end");
                bench_zone.put(key, instance.clone());
            });
        });
    }
    group.finish();
}

criterion_group!(benches, answers, changes);
criterion_main!(benches);
