//! The upstream servers: the next one is asked when one fails, and one that does not answer comes last for a while.

use std::{
    fmt,
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hickory_proto::{
    op::DnsResponse,
    rr::{Name, RecordType},
};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{
    timing::Timing,
    transport::{self, QueryError},
};
use crate::net::backoff::{doubled, jittered};

/// Questions in a row that a server has to leave unanswered before the log says so.
const WARN_AFTER: u32 = 3;

/// What each server answered, when none gave an answer that can be used.
#[derive(Debug)]
pub(super) struct ServerErrors(Vec<(SocketAddr, QueryError)>);

impl fmt::Display for ServerErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (server, err)) in self.0.iter().enumerate() {
            let separator = if at == 0 { "" } else { "; " };
            write!(f, "{separator}{server}: {err}")?;
        }
        Ok(())
    }
}

/// The servers in the order in which they were configured.
#[derive(Debug)]
pub(super) struct Servers {
    servers: Box<[Server]>,
    timing: Timing,
}

#[derive(Debug)]
struct Server {
    address: SocketAddr,
    health: Mutex<Health>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Health {
    /// Questions in a row that were not answered.
    failures: u32,
    /// Until then it comes after all others.
    avoid_until: Option<Instant>,
}

impl Server {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Servers {
    pub(super) fn new(addresses: &[SocketAddr], timing: Timing) -> Self {
        let servers = addresses.iter().map(|&address| Server { address, health: Mutex::default() }).collect();
        Self { servers, timing }
    }

    /// Asks one server after the other until one answers.
    pub(super) async fn ask(&self, name: &Name, kind: RecordType) -> Result<DnsResponse, ServerErrors> {
        let mut errors = Vec::new();
        for server in self.in_order(Instant::now()) {
            self.begin(server, Instant::now());
            let answer = transport::ask(server.address, name, kind, &self.timing).await;
            self.end(server, answer.as_ref().err().filter(|err| err.server_is_down()), Instant::now());
            match answer {
                Ok(answer) => return Ok(answer),
                Err(err) => errors.push((server.address, err)),
            }
        }
        Err(ServerErrors(errors))
    }

    /// As configured, except that those which did not answer lately come last, the one with the shortest time left first.
    fn in_order(&self, now: Instant) -> Vec<&Server> {
        let mut servers: Vec<(Duration, &Server)> = self
            .servers
            .iter()
            .map(|server| {
                let left =
                    server.health().avoid_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
                (left, server)
            })
            .collect();
        servers.sort_by_key(|(left, _)| *left); // stable
        servers.into_iter().map(|(_, server)| server).collect()
    }

    /// One question at a time finds out whether a server is back; the others go on to avoid it.
    fn begin(&self, server: &Server, now: Instant) {
        let mut health = server.health();
        if health.failures > 0 {
            let answered_by = now + self.timing.udp_timeout + self.timing.tcp_timeout;
            health.avoid_until = health.avoid_until.max(Some(answered_by));
        }
    }

    fn end(&self, server: &Server, down: Option<&QueryError>, now: Instant) {
        let mut health = server.health();
        let Some(err) = down else {
            if health.failures >= WARN_AFTER {
                info!(server = %server.address, "the upstream server answers again");
            }
            *health = Health::default();
            return;
        };
        let pause = jittered(doubled(self.timing.min_avoidance, self.timing.max_avoidance, health.failures));
        health.avoid_until = Some(now + pause);
        health.failures = health.failures.saturating_add(1);
        if health.failures == WARN_AFTER {
            warn!(server = %server.address, %err, "the upstream server does not answer");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_server_comes_last_and_one_question_tries_it_again() {
        let timing = Timing::new();
        let addresses: Vec<SocketAddr> = (1..=3).map(|host| SocketAddr::from(([192, 0, 2, host], 53))).collect();
        let servers = Servers::new(&addresses, timing);
        let order = |now| servers.in_order(now).iter().map(|server| server.address).collect::<Vec<_>>();
        let begun = Instant::now();
        assert_eq!(order(begun), addresses);

        let first = &servers.servers[0];
        servers.end(first, Some(&QueryError::Timeout(timing.udp_timeout)), begun);
        let last = vec![addresses[1], addresses[2], addresses[0]];
        assert_eq!(order(begun), last);

        // Its time is over: the next question goes there, those that come meanwhile do not.
        let later = begun + timing.min_avoidance;
        assert_eq!(order(later), addresses);
        servers.begin(first, later);
        assert_eq!(order(later + timing.udp_timeout), last);

        // Each failure doubles the time, up to its limit.
        for _ in 0..40 {
            servers.end(first, Some(&QueryError::Io("connection refused".into())), later);
        }
        assert_eq!(order(later + timing.max_avoidance / 2 - Duration::from_millis(1)), last);
        assert_eq!(order(later + timing.max_avoidance), addresses);

        servers.end(first, None, later);
        assert_eq!(order(later), addresses, "it has answered");
        servers.begin(first, later);
        assert_eq!(order(later), addresses, "and is trusted again");
    }
}
