//! What one answer costs, without sockets: `answer()` over the mix of questions, by size of the
//! zone; and what one change costs, by size of the service (P1d, P6b).

#[path = "support/world.rs"]
mod world;

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use gangplank::dns::{Context, MAX_UDP, Transport, answer};

use world::{World, instance, mix, service};

fn answers(c: &mut Criterion) {
    let mut group = c.benchmark_group("answer");
    for services in [1_000, 100_000] {
        let world = World::of(services, 3);
        let mut rng = fastrand::Rng::with_seed(1);
        let queries = mix(services, &mut rng);
        let context = Context { transport: Transport::Udp, nsid: b"bench" };
        let mut out = [0; MAX_UDP as usize];
        let mut next = queries.iter().cycle();
        group.bench_function(format!("mix, {services} services of 3"), |b| {
            b.iter(|| {
                let packet = next.next().expect("it goes round");
                black_box(answer(&world.zone.pin(), &context, &mut rng, packet, &mut out))
            });
        });
    }
    group.finish();
}

fn changes(c: &mut Criterion) {
    let mut group = c.benchmark_group("publish one change");
    for instances in [1, 32, 10_000] {
        let mut world = World::of(1, instances);
        let key = service(0);
        let made: Vec<_> = (0..instances).flat_map(|n| [instance(&key, n, 2.0), instance(&key, n, 1.0)]).collect();
        let mut next = made.iter().cycle();
        group.bench_function(format!("service of {instances}"), |b| {
            b.iter(|| world.put(&key, next.next().expect("it goes round").clone()));
        });
    }
    group.finish();
}

criterion_group!(benches, answers, changes);
criterion_main!(benches);
