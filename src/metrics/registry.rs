//! Metrics of the registry: instances, batches, outcomes of commands, refused submissions.
//!
//! The writer calls [`RegistryMetrics::observe_batch`] and the setters once per batch; every
//! handle is made once, so that a call is a few atomic adds.

use std::{sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    metrics::{
        counter::Counter,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::labels::{EnumCounter, label_enum};

/// A gauge of a value that is never negative.
type Level = Gauge<u64, AtomicU64>;

label_enum! {
    /// The outcome of one command.
    pub enum CommandOutcome {
        /// A new instance.
        Created => "created",
        /// The attributes or the readiness of an instance were replaced.
        Updated => "updated",
        /// The instance was registered with the same attributes already.
        Unchanged => "unchanged",
        /// Instances were removed.
        Removed => "removed",
        /// There was no such instance.
        NotFound => "not_found",
        /// The instance limit is reached.
        Full => "full",
        /// The address may not be registered.
        AddressRefused => "address_refused",
        /// A quota of an identity or a namespace is used up.
        OverQuota => "over_quota",
        /// Another identity has registered the instance.
        Owned => "owned",
        /// The Kubernetes cluster, as it is now, forbids the registration.
        Refused => "refused",
    }
}

label_enum! {
    /// Why a registration or removal was refused before it reached the writer.
    pub enum RefusalReason {
        /// A field is invalid.
        Invalid => "invalid",
        /// The registry is still recovering.
        NotReady => "not_ready",
        /// Another process has the Lease.
        Standby => "standby",
        /// The process is stopping.
        ShuttingDown => "shutting_down",
        /// A write or sync failed.
        StorageFailed => "storage_failed",
    }
}

label_enum! {
    /// What the process that writes answers to a word.
    pub enum HandOverResult {
        /// Kubernetes has it.
        Confirmed => "confirmed",
        /// Kubernetes has a later word on the same instance.
        Outranked => "outranked",
        /// It is too old to count.
        TooOld => "too_old",
        /// It has to be sent again.
        NotYet => "not_yet",
    }
}

/// Metrics of what is registered, of the writer and its batches, and of what is refused.
#[derive(Debug)]
pub struct RegistryMetrics {
    services: Level,
    instances: Level,
    unservable: Level,
    tombstones: Level,
    refused_words: Counter,
    outbox: Level,
    handed_over: EnumCounter<HandOverResult>,
    generation: Level,
    queue: Level,
    batches: Counter,
    batch_submissions: Histogram,
    batch_commands: Histogram,
    changes: Counter,
    publish: Histogram,
    programming: Histogram,
    outcomes: EnumCounter<CommandOutcome>,
    refusals: EnumCounter<RefusalReason>,
}

impl RegistryMetrics {
    pub(super) fn register(all: &mut Registry) -> Self {
        // The buckets of CoreDNS, 1 ms to 524 s by twos.
        let programming = Histogram::new(exponential_buckets(0.001, 2.0, 20));
        // Kubernetes' SLI "DNS programming latency"; CoreDNS reserves this value of the label.
        let kind = ("service_kind".into(), "headless_without_selector".into());
        all.sub_registry_with_label(kind).register(
            "gangplank_dns_programming_duration_seconds",
            "Time from a change being received to DNS answering with it",
            programming.clone(),
        );
        let registry = all.sub_registry_with_prefix("gangplank_registry");
        // 1 to about a million, and 10 µs to about 2.6 s, by fours.
        let sizes = || Histogram::new(exponential_buckets(1.0, 4.0, 11));
        let durations = Histogram::new(exponential_buckets(1e-5, 4.0, 10));
        let metrics = Self {
            services: Level::default(),
            instances: Level::default(),
            unservable: Level::default(),
            tombstones: Level::default(),
            refused_words: Counter::default(),
            outbox: Level::default(),
            handed_over: EnumCounter::register(
                registry,
                "handed_over_words",
                "result",
                "Words that this process sent to the one that writes, by its answer; one that is not confirmed yet is sent again",
            ),
            generation: Level::default(),
            queue: Level::default(),
            batches: Counter::default(),
            batch_submissions: sizes(),
            batch_commands: sizes(),
            changes: Counter::default(),
            publish: durations,
            programming,
            outcomes: EnumCounter::register(
                registry,
                "commands",
                "outcome",
                "Commands that were carried out, by outcome",
            ),
            refusals: EnumCounter::register(
                registry,
                "refused",
                "reason",
                "Registrations and removals that never reached the writer, by reason",
            ),
        };
        registry.register("services", "Services that have an instance", metrics.services.clone());
        registry.register("instances", "Instances of all services", metrics.instances.clone());
        registry.register(
            "unservable_instances",
            "Instances with a name that is not served, because it does not fit DNS",
            metrics.unservable.clone(),
        );
        registry.register(
            "tombstones",
            "Removals that are remembered, so that no older registration undoes them",
            metrics.tombstones.clone(),
        );
        registry.register(
            "refused_words",
            "Registrations that Kubernetes never had and that were too old to count when this process took over, or got them \
             from another process",
            metrics.refused_words.clone(),
        );
        registry.register(
            "outbox_words",
            "Words that this process accepted, that Kubernetes was never seen to have, and that it has to hand over to the \
             process that writes; 0 while it writes itself",
            metrics.outbox.clone(),
        );
        registry.register("generation", "The generation that is served", metrics.generation.clone());
        registry.register("queue_length", "Submissions that wait for the writer", metrics.queue.clone());
        registry.register("batches", "Batches that were carried out", metrics.batches.clone());
        registry.register("batch_submissions", "Submissions in one batch", metrics.batch_submissions.clone());
        registry.register("batch_commands", "Commands in one batch", metrics.batch_commands.clone());
        registry.register("changes", "Instances that were added, changed or removed", metrics.changes.clone());
        registry.register(
            "publish_duration_seconds",
            "Time from durable to visible, of one batch",
            metrics.publish.clone(),
        );
        metrics
    }

    /// Counts one batch, with its submissions, commands and changed instances. `generation` is the generation
    /// that DNS serves after the batch.
    pub fn observe_batch(&self, submissions: usize, commands: usize, changed: usize, generation: u64) {
        self.batches.inc();
        self.batch_submissions.observe(submissions as f64);
        self.batch_commands.observe(commands as f64);
        self.changes.inc_by(changed as u64);
        self.generation.set(generation);
    }

    /// The generation that DNS serves.
    pub fn generation(&self) -> u64 {
        self.generation.get()
    }

    /// Observes the time from the receipt of a change until DNS serves it.
    pub fn observe_programming(&self, took: Duration) {
        self.programming.observe(took.as_secs_f64());
    }

    /// Observes the time from the sync of a batch until DNS serves it.
    pub fn observe_publish(&self, took: Duration) {
        self.publish.observe(took.as_secs_f64());
    }

    /// Counts `commands` with this outcome.
    pub fn count(&self, outcome: CommandOutcome, commands: usize) {
        self.outcomes.at(outcome).inc_by(commands as u64);
    }

    /// Counts one message that was refused before it reached the writer.
    pub fn refused(&self, reason: RefusalReason) {
        self.refusals.at(reason).inc();
    }

    /// Sets the registered services and instances and the generation; also called after a recovery.
    pub fn set_registered(&self, services: usize, instances: usize, generation: u64) {
        self.services.set(services as u64);
        self.instances.set(instances as u64);
        self.generation.set(generation);
    }

    /// Sets the number of instances whose names are too long for DNS.
    pub fn set_unservable(&self, instances: u64) {
        self.unservable.set(instances);
    }

    /// Sets the number of removals that are remembered.
    pub fn set_tombstones(&self, tombstones: usize) {
        self.tombstones.set(tombstones as u64);
    }

    /// Sets the number of words that have to be handed over.
    pub fn set_outbox(&self, words: usize) {
        self.outbox.set(words as u64);
    }

    /// The number of words that have to be handed over.
    pub fn outbox(&self) -> u64 {
        self.outbox.get()
    }

    /// Counts words that were sent to the process that writes.
    pub fn count_handed_over(&self, result: HandOverResult, words: usize) {
        self.handed_over.at(result).inc_by(words as u64);
    }

    /// Counts registrations that were too old to count at a take-over or a hand-over.
    pub fn count_refused_words(&self, words: usize) {
        self.refused_words.inc_by(words as u64);
    }

    /// Sets the number of messages in the writer's queue.
    pub fn set_queue_length(&self, submissions: usize) {
        self.queue.set(submissions as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::LabelEnum as _;

    fn encoded(all: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, all).expect("a String takes everything");
        text
    }

    #[test]
    fn every_series_exists_before_its_first_event() {
        let mut all = Registry::default();
        let _metrics = RegistryMetrics::register(&mut all);
        let text = encoded(&all);
        for line in [
            "# TYPE gangplank_registry_services gauge",
            "gangplank_registry_services 0",
            "gangplank_registry_instances 0",
            "gangplank_registry_unservable_instances 0",
            "gangplank_registry_tombstones 0",
            "gangplank_registry_refused_words_total 0",
            "gangplank_registry_outbox_words 0",
            "gangplank_registry_handed_over_words_total{result=\"confirmed\"} 0",
            "gangplank_registry_generation 0",
            "gangplank_registry_queue_length 0",
            "# TYPE gangplank_registry_batches counter",
            "gangplank_registry_batches_total 0",
            "gangplank_registry_batch_submissions_count 0",
            "gangplank_registry_batch_commands_count 0",
            "gangplank_registry_changes_total 0",
            "# TYPE gangplank_registry_publish_duration_seconds histogram",
            "gangplank_registry_publish_duration_seconds_count 0",
            "gangplank_registry_commands_total{outcome=\"created\"} 0",
            "gangplank_registry_commands_total{outcome=\"updated\"} 0",
            "gangplank_registry_commands_total{outcome=\"unchanged\"} 0",
            "gangplank_registry_commands_total{outcome=\"removed\"} 0",
            "gangplank_registry_commands_total{outcome=\"not_found\"} 0",
            "gangplank_registry_commands_total{outcome=\"full\"} 0",
            "gangplank_registry_refused_total{reason=\"invalid\"} 0",
            "gangplank_registry_refused_total{reason=\"not_ready\"} 0",
            "gangplank_registry_refused_total{reason=\"shutting_down\"} 0",
            "gangplank_registry_refused_total{reason=\"storage_failed\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
        }
    }

    #[test]
    fn observations_are_exposed_under_their_own_series() {
        let mut all = Registry::default();
        let metrics = RegistryMetrics::register(&mut all);
        metrics.observe_batch(3, 70, 65, 1712);
        metrics.observe_publish(Duration::from_micros(50));
        metrics.set_registered(2, 64, 1712);
        metrics.set_queue_length(5);
        // Each by another number, so that a counter taken for its neighbour shows.
        for (at, outcome) in CommandOutcome::ALL.iter().enumerate() {
            metrics.count(*outcome, at + 1);
        }
        for (at, reason) in RefusalReason::ALL.iter().enumerate() {
            (0..=at).for_each(|_| metrics.refused(*reason));
        }
        let text = encoded(&all);
        for line in [
            "gangplank_registry_services 2",
            "gangplank_registry_instances 64",
            "gangplank_registry_generation 1712",
            "gangplank_registry_queue_length 5",
            "gangplank_registry_batches_total 1",
            "gangplank_registry_batch_submissions_sum 3.0",
            "gangplank_registry_batch_commands_bucket{le=\"64.0\"} 0",
            "gangplank_registry_batch_commands_bucket{le=\"256.0\"} 1",
            "gangplank_registry_changes_total 65",
            "gangplank_registry_publish_duration_seconds_bucket{le=\"0.00004\"} 0",
            "gangplank_registry_publish_duration_seconds_bucket{le=\"0.00016\"} 1",
            "gangplank_registry_commands_total{outcome=\"created\"} 1",
            "gangplank_registry_commands_total{outcome=\"full\"} 6",
            "gangplank_registry_refused_total{reason=\"invalid\"} 1",
            "gangplank_registry_refused_total{reason=\"storage_failed\"} 5",
        ] {
            assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
        }
    }
}
