//! What a writer and its followers use, and what followers cost the API server: CPU and memory, at rest and with changes at a
//! steady rate.

use std::time::{Duration, Instant};

use gangplank::grpc::proto::registry::RegistrationType;

use super::{resident, rounds};
use crate::{
    mirror::{make_namespace, replica::Replica, serve_by},
    support::{
        cluster::Cluster,
        cpu_seconds, http,
        server::Server,
        stream::{Stream, message},
        wait_until,
    },
};

/// Services, for each round that is asked for, and instances of each.
const SERVICES_PER_ROUND: usize = 5;
const INSTANCES: usize = 100;

/// How often each number of followers is measured, in turns.
const TURNS: usize = 3;

const FOLLOWERS: usize = 2;

/// Changes a second.
const RATE: u32 = 100;

/// CPU time of the API server, the writer, and each follower.
struct Used(Vec<f64>);

impl Used {
    fn now(processes: &[u32]) -> Self {
        Self(processes.iter().map(|pid| cpu_seconds(*pid)).collect())
    }

    fn since(&self, processes: &[u32], elapsed: Duration) -> Vec<f64> {
        let now = Self::now(processes);
        now.0.iter().zip(&self.0).map(|(now, before)| (now - before) / elapsed.as_secs_f64() * 100.0).collect()
    }
}

/// Waits for as long as there is progress.
fn mirrored(server: &Server) {
    let mut behind = usize::MAX;
    while behind > 0 {
        behind = wait_until("fewer services are behind", || {
            let (_, text) = http::get(server.admin, "/metrics");
            let value = text.lines().find_map(|line| line.strip_prefix("gangplank_mirror_services_behind "));
            let now = value.expect("with a mirror it is there").parse().expect("a number");
            (now < behind).then_some(now)
        });
    }
}

pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

#[test]
fn followers_beside_the_writer_and_the_api_server() {
    let Some(cluster) = Cluster::private() else { return };
    let services = rounds() * SERVICES_PER_ROUND;
    // Ten seconds with 200 rounds.
    let window = Duration::from_millis(50) * u32::try_from(rounds()).expect("not that many");
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    let server = serve_by(&kubeconfig, &[]);
    let mut stream = Stream::open(server.grpc);
    make_namespace(&cluster, &mut stream, "figures");
    let registration = |n: usize, weight: f32| {
        let address = format!("10.{}.{}.{}", 60 + n / 62_500, n / 250 % 250, n % 250);
        let mut message = message(RegistrationType::Register, "figures", &format!("many-{}", n % services), &address);
        message.weight = Some(weight);
        message
    };
    let (statuses, took) = stream.exchange((0..services * INSTANCES).map(|n| registration(n, 1.0)).collect());
    assert!(statuses.iter().all(|status| matches!(status, 201 | 202)));
    mirrored(&server);
    println!("{} instances of {services} services, registered within {took:.1?}", services * INSTANCES);

    let mut weight = 1.0;
    // By the number of followers: percent of a core at rest and under load, of each process.
    let mut used: Vec<[Vec<Vec<f64>>; 2]> = (0..=FOLLOWERS).map(|_| [Vec::new(), Vec::new()]).collect();
    for turn in 0..TURNS {
        let mut followers = Vec::new();
        for used in &mut used {
            let mut processes = vec![cluster.api_server_pid(), server.pid()];
            processes.extend(followers.iter().map(Replica::pid));
            let (before, begun) = (Used::now(&processes), Instant::now());
            wait_until("the window is over", || (begun.elapsed() >= window).then_some(()));
            used[0].push(before.since(&processes, begun.elapsed()));

            let changes = (window.as_secs_f64() * f64::from(RATE)) as usize;
            weight += 1.0;
            let changes: Vec<_> =
                (0..changes).map(|_| registration(fastrand::usize(..services * INSTANCES), weight)).collect();
            let (before, begun) = (Used::now(&processes), Instant::now());
            let (statuses, _) = stream.exchange_evenly(changes, window);
            used[1].push(before.since(&processes, begun.elapsed()));
            let late = statuses.iter().filter(|status| **status == 202).count();
            if late > 0 {
                println!("{late} of {} changes were answered before Kubernetes had them", statuses.len());
            }
            mirrored(&server);
            if turn == TURNS - 1 && followers.len() == FOLLOWERS {
                let resident: Vec<_> = processes.iter().map(|pid| resident(*pid) >> 10).collect();
                println!("resident MiB of API server, writer, followers: {resident:?}");
            }
            if followers.len() < FOLLOWERS {
                followers.push(Replica::on_standby(&kubeconfig));
            }
        }
    }
    for (what, which) in [("at rest", 0), (&*format!("{RATE} changes/s"), 1)] {
        for (followers, used) in used.iter().enumerate() {
            let of = |process: usize| median(used[which].iter().map(|used| used[process]).collect());
            let others: Vec<_> = (2..2 + followers).map(|process| format!("{:.1}", of(process))).collect();
            println!(
                "{what}, {followers} followers, % of a core: API server {:.1}, writer {:.1}, followers {others:?}",
                of(0),
                of(1)
            );
        }
    }
}
