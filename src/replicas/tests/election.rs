//! The election alone: one replica's part, answer by answer.

use std::time::Duration;

use super::super::{election::*, lease::*, rules::Rules, time::*};

const ME: DirectoryId = DirectoryId(1);
const OTHER: DirectoryId = DirectoryId(2);

fn boot(seconds: u64) -> BootTime {
    BootTime(Duration::from_secs(seconds))
}

fn now(seconds: u64) -> Now {
    Now { boot: boot(seconds), unix_seconds: 1_000 + seconds, eligible: true }
}

fn lease(version: u64, term: u64, holder: DirectoryId) -> Option<Option<ObservedLease>> {
    let record = LeaseRecord { term, holder, generation: 70, released: false };
    Some(Some(ObservedLease { version: ResourceVersion(version), record }))
}

fn candidate() -> Election {
    Election::new(ME, Opened { term: 0, followed: false, resume: false }, Rules::ALL)
}

/// A tick, and the answer to the read that it asks for.
fn read(election: &mut Election, seconds: u64, found: Option<Option<ObservedLease>>) -> Vec<Action> {
    let [Action::ReadLease(id)] = election.tick(now(seconds))[..] else { panic!("a follower reads the Lease") };
    election.lease_read(id, boot(seconds), now(seconds), found)
}

fn written(actions: &[Action]) -> (RequestId, Option<ResourceVersion>, LeaseRecord) {
    let [Action::WriteLease { id, expected, record }] = actions else { panic!("{actions:?}") };
    (*id, *expected, record.clone())
}

/// A writer of term 8 whose last renewal began at 20 s.
fn writer() -> Election {
    let mut election = candidate();
    assert_eq!(read(&mut election, 0, lease(5, 7, OTHER)), []);
    let (id, _, _) = written(&read(&mut election, 20, lease(5, 7, OTHER)));
    let ok = LeaseWrite::Written(ResourceVersion(6));
    assert_eq!(election.lease_written(id, boot(20), ok), [Action::TakeOver]);
    assert_eq!(election.taken_over(boot(21)), []);
    assert_eq!(election.writing(), Some(8));
    election
}

fn renew(election: &mut Election, seconds: u64, outcome: LeaseWrite) -> Vec<Action> {
    let (id, _, _) = written(&election.tick(now(seconds)));
    election.lease_written(id, boot(seconds), outcome)
}

#[test]
fn lease_is_taken_when_it_has_not_changed_for_its_duration() {
    let mut election = candidate();
    assert_eq!(read(&mut election, 0, lease(5, 7, OTHER)), []);
    assert_eq!(read(&mut election, 10, lease(6, 7, OTHER)), [], "it was renewed");
    assert_eq!(read(&mut election, 24, lease(6, 7, OTHER)), [], "one second too early");
    let (_, expected, record) = written(&read(&mut election, 25, lease(6, 7, OTHER)));
    assert_eq!((expected, record.term, record.holder), (Some(ResourceVersion(6)), 8, ME));
    assert_eq!(record.generation, 70, "never back");
}

#[test]
fn released_lease_is_taken_at_once() {
    let mut election = candidate();
    let mut released = lease(5, 7, OTHER);
    if let Some(Some(lease)) = &mut released {
        lease.record.released = true;
    }
    assert_eq!(written(&read(&mut election, 0, released)).2.term, 8);
}

#[test]
fn own_lease_is_taken_at_once_only_by_the_process_that_certainly_follows() {
    let mut sure = Election::new(ME, Opened { term: 7, followed: false, resume: true }, Rules::ALL);
    assert_eq!(written(&read(&mut sure, 0, lease(5, 7, ME))).2.term, 8);
    assert_eq!(read(&mut candidate(), 0, lease(5, 7, ME)), []);
}

#[test]
fn missing_lease_is_held_for_its_duration_before_slices_are_listed() {
    let mut election = candidate();
    let (id, expected, record) = written(&read(&mut election, 0, Some(None)));
    assert_eq!((expected, record.term), (None, 1_001), "no lower than any term before it");
    assert_eq!(election.lease_written(id, boot(0), LeaseWrite::Written(ResourceVersion(9))), []);
    assert_eq!(renew(&mut election, 14, LeaseWrite::Unknown), []);
    assert_eq!(election.tick(now(15)).last(), Some(&Action::TakeOver));
}

#[test]
fn lease_that_is_made_again_in_time_is_left_to_its_holder() {
    let mut election = candidate();
    assert_eq!(read(&mut election, 0, lease(5, 7, OTHER)), []);
    assert_eq!(read(&mut election, 2, Some(None)), []);
    assert_eq!(read(&mut election, 4, lease(6, 1_003, OTHER)), []);
    assert_eq!(read(&mut election, 6, Some(None)), [], "deleted again");
    assert_eq!(read(&mut election, 9, Some(None)), []);
    assert_eq!(written(&read(&mut election, 10, Some(None))).2.term, 1_011);
}

#[test]
fn replica_whose_clock_is_wrong_does_not_acquire() {
    let mut election = candidate();
    let [Action::ReadLease(id)] = election.tick(now(0))[..] else { panic!("a read") };
    let wrong = Now { eligible: false, ..now(0) };
    assert_eq!(election.lease_read(id, boot(0), wrong, Some(None)), []);
}

#[test]
fn writer_is_safe_until_its_renew_deadline() {
    let mut election = writer();
    assert!(election.is_safe(boot(29)) && !election.is_safe(boot(30)));
    assert_eq!(renew(&mut election, 28, LeaseWrite::Written(ResourceVersion(7))), [Action::Renewed(boot(28))]);
    assert!(election.is_safe(boot(37)));
}

#[test]
fn renewal_whose_answer_was_lost_is_found_to_be_ones_own() {
    let mut election = writer();
    assert_eq!(renew(&mut election, 22, LeaseWrite::Unknown), []);
    let [Action::ReadLease(id)] = renew(&mut election, 24, LeaseWrite::Conflict)[..] else { panic!("a look") };
    let (_, expected, record) = written(&election.lease_read(id, boot(24), now(24), lease(9, 8, ME)));
    assert_eq!((expected, record.term), (Some(ResourceVersion(9)), 8));
}

#[test]
fn higher_term_deposes() {
    let mut election = writer();
    let [Action::ReadLease(id)] = renew(&mut election, 24, LeaseWrite::Conflict)[..] else { panic!("a look") };
    let actions = election.lease_read(id, boot(24), now(24), lease(9, 9, OTHER));
    assert_eq!(actions, [Action::Deposed(Deposed::Outranked(9))]);
    assert!(!election.is_safe(boot(24)));

    let mut election = writer();
    assert_eq!(election.outranked(8), []);
    assert_eq!(election.outranked(12), [Action::Deposed(Deposed::Outranked(12))]);
    assert_eq!(election.known_term(), 12);
    // The Lease still names this replica: nobody else wrote the slice.
    let (_, expected, record) = written(&read(&mut election, 25, lease(6, 8, ME)));
    assert_eq!((expected, record.term), (Some(ResourceVersion(6)), 13));
}

#[test]
fn deleted_lease_is_made_again_only_while_safe() {
    let look = |seconds| {
        let mut election = writer();
        let [Action::ReadLease(id)] = renew(&mut election, seconds, LeaseWrite::Conflict)[..] else { panic!("a look") };
        let actions = election.lease_read(id, boot(seconds), now(seconds), Some(None));
        (election, actions)
    };
    let (election, actions) = look(29);
    assert_eq!((actions.len(), &actions[0], election.writing()), (2, &Action::Rewrite, Some(1_030)));
    let (election, actions) = look(30);
    assert_eq!((&actions[..], election.writing()), (&[Action::Deposed(Deposed::LeaseLost)][..], None));
}

#[test]
fn term_in_a_lease_that_nobody_can_have_handed_out_says_nothing() {
    let mut election = candidate();
    assert_eq!(read(&mut election, 0, lease(5, u64::MAX, OTHER)), [], "it may be held all the same");
    assert_eq!(written(&read(&mut election, 20, lease(5, u64::MAX, OTHER))).2.term, 1_021, "as if it was missing");

    let mut election = writer();
    let [Action::ReadLease(id)] = renew(&mut election, 29, LeaseWrite::Conflict)[..] else { panic!("a look") };
    let actions = election.lease_read(id, boot(29), now(29), lease(9, u64::MAX, OTHER));
    assert_eq!((actions.len(), &actions[0], election.writing()), (2, &Action::Rewrite, Some(9)));
}

/// A replica that takes over under term 8 since 0 s, after the Lease was released.
fn taking_over() -> Election {
    let mut election = candidate();
    let (id, _, _) = written(&read(&mut election, 0, lease_released()));
    assert_eq!(election.lease_written(id, boot(0), LeaseWrite::Written(ResourceVersion(6))), [Action::TakeOver]);
    election
}

/// A renewal of the take-over is refused, and this is found.
fn inspect(election: &mut Election, seconds: u64, found: Option<Option<ObservedLease>>) -> Vec<Action> {
    let [Action::ReadLease(id)] = renew(election, seconds, LeaseWrite::Conflict)[..] else { panic!("a look") };
    election.lease_read(id, boot(seconds), now(seconds), found)
}

#[test]
fn take_over_whose_renewal_is_refused_looks_before_it_gives_up() {
    // The answer of an earlier renewal was lost.
    let mut election = taking_over();
    assert_eq!(renew(&mut election, 2, LeaseWrite::Unknown), []);
    let (id, expected, record) = written(&inspect(&mut election, 4, lease(9, 8, ME)));
    assert_eq!((expected, record.term), (Some(ResourceVersion(9)), 8));
    let ok = LeaseWrite::Written(ResourceVersion(10));
    assert_eq!(election.lease_written(id, boot(4), ok.clone()), [Action::Renewed(boot(4))]);
    assert_eq!(election.taken_over(boot(5)), []);
    assert_eq!(election.writing(), Some(8));

    // Another one has it.
    let mut election = taking_over();
    assert_eq!(inspect(&mut election, 2, lease(9, 9, OTHER)), [Action::Deposed(Deposed::Outranked(9))]);
    assert_eq!((election.role(), election.known_term()), (&Role::Follower, 9));

    // It was deleted. While nobody else can have held it, a higher term will do, and the slices are listed again.
    let mut election = taking_over();
    let (id, expected, record) = written(&inspect(&mut election, 9, Some(None)));
    assert_eq!((expected, record.term), (None, 1_010));
    assert_eq!(election.lease_written(id, boot(9), ok), [Action::TakeOver]);
    let mut election = taking_over();
    assert_eq!(inspect(&mut election, 10, Some(None)), [Action::Deposed(Deposed::NotAcquired)]);

    // No answer: the next renewal asks again.
    let mut election = taking_over();
    assert_eq!(inspect(&mut election, 2, None), []);
    assert_eq!(written(&election.tick(now(4))).2.term, 8);
}

#[test]
fn restarted_replica_accepts_no_more_when_its_take_over_is_outranked() {
    let mut election = Election::new(ME, Opened { term: 7, followed: false, resume: true }, Rules::ALL);
    let (id, _, _) = written(&read(&mut election, 0, lease(5, 7, ME)));
    assert_eq!(election.lease_written(id, boot(0), LeaseWrite::Written(ResourceVersion(6))), [Action::TakeOver]);
    assert!(election.may_accept());
    let actions = inspect(&mut election, 2, lease(9, 9, OTHER));
    assert_eq!(actions, [Action::Followed, Action::Deposed(Deposed::Outranked(9))]);
    assert!(!election.may_accept());
}

#[test]
fn replica_that_leaves_while_it_takes_over_releases_the_lease() {
    let mut election = taking_over();
    let (_, expected, record) = written(&election.release());
    assert_eq!((expected, record.term, record.released), (Some(ResourceVersion(6)), 8, true));
    assert_eq!(election.role(), &Role::Follower);

    // The last holder of a Lease that was missing may still count on it.
    let mut election = candidate();
    let (id, _, _) = written(&read(&mut election, 0, Some(None)));
    assert_eq!(election.lease_written(id, boot(0), LeaseWrite::Written(ResourceVersion(6))), []);
    assert_eq!(election.release(), []);
    assert_eq!(election.tick(now(15)).len(), 2, "listed");
    assert_eq!(election.release().len(), 1);
}

#[test]
fn paused_take_over_does_not_serve() {
    let mut election = candidate();
    let (id, _, _) = written(&read(&mut election, 0, lease_released()));
    let ok = LeaseWrite::Written(ResourceVersion(6));
    assert_eq!(election.lease_written(id, boot(0), ok), [Action::TakeOver]);
    assert_eq!(election.taken_over(boot(11)), [Action::Deposed(Deposed::NotAcquired)]);
}

#[test]
fn slice_of_a_higher_term_in_a_take_over_makes_the_term_higher() {
    let mut election = candidate();
    let (id, _, _) = written(&read(&mut election, 0, lease_released()));
    let ok = LeaseWrite::Written(ResourceVersion(6));
    assert_eq!(election.lease_written(id, boot(0), ok.clone()), [Action::TakeOver]);
    let (id, expected, record) = written(&election.outranked(30));
    assert_eq!((expected, record.term), (Some(ResourceVersion(6)), 31));
    assert_eq!(election.lease_written(id, boot(1), ok), [Action::TakeOver], "listed again");
}

#[test]
fn restarted_replica_accepts_until_it_reads_a_lease_that_another_holds() {
    let started = |followed| Election::new(ME, Opened { term: 7, followed, resume: true }, Rules::ALL);
    assert!(!candidate().may_accept(), "a directory without a term");
    assert!(!started(true).may_accept(), "another wrote after it");

    let mut election = started(false);
    assert!(election.may_accept());
    assert_eq!(read(&mut election, 0, None), [], "the API server is away");
    assert!(election.may_accept());
    assert_eq!(read(&mut election, 2, lease(5, 8, OTHER)), [Action::Followed]);
    assert!(!election.may_accept());

    let mut election = started(false);
    assert_eq!(read(&mut election, 0, lease(5, 7, OTHER)), [Action::Followed], "though its term is no higher");
    assert!(!election.may_accept());

    let mut election = started(false);
    assert_eq!(read(&mut election, 0, lease(5, 7, ME)).len(), 1, "acquires");
    assert!(election.may_accept(), "nobody wrote since");

    let mut election = started(false);
    assert_eq!(election.outranked(8), [Action::Followed], "a slice shows it");
}

#[test]
fn answers_that_nobody_waits_for_are_ignored() {
    let mut election = writer();
    let (late, _, _) = written(&election.tick(now(22)));
    assert_eq!(election.outranked(12), [Action::Deposed(Deposed::Outranked(12))]);
    assert_eq!(election.lease_written(late, boot(22), LeaseWrite::Written(ResourceVersion(7))), []);
    assert!(!election.is_safe(boot(22)));
}

fn lease_released() -> Option<Option<ObservedLease>> {
    let record = LeaseRecord { term: 7, holder: OTHER, generation: 70, released: true };
    Some(Some(ObservedLease { version: ResourceVersion(5), record }))
}

/// Two copies of a directory must not write under one term.
#[test]
fn lease_that_was_set_back_gets_a_higher_term_than_that_of_the_directory() {
    for followed in [false, true] {
        let mut election = Election::new(ME, Opened { term: 7, followed, resume: true }, Rules::ALL);
        assert_eq!(written(&read(&mut election, 0, lease(5, 3, ME))).2.term, 8);
    }
}
