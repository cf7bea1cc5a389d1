//! One replica writes, all answer: the protocol by which replicas agree on who writes and on what was said last.
//!
//! Pure: nothing here performs I/O or reads a clock. What was read, written and seen comes in with the time, and what to do
//! next comes out. So the same code runs in a simulated world, where every rule of [`rules`] is tried with
//! and without the others, against crashes, pauses, partitions, late requests, old copies of directories and clocks that differ.
//!
//! 1. **Words.** Every registration and removal is a [`word`] with a [stamp](crate::model::Stamp): hybrid logical clock, term, generation. Of two
//!    words on one instance the younger counts, wherever they meet. A removal leaves a tombstone.
//! 2. **Terms.** The [`election`] gives the Lease to one replica at a time, each time with a higher term. A writer writes
//!    slices and confirms words only while it is certain to hold the Lease.
//! 3. **Take-over.** A new writer lists all slices after it has the Lease, and [merges](takeover) its
//!    directory and its outbox with them. It serves at once; it need not write a slice before.
//! 4. **Slices.** What a writer makes of a [slice](mod@slice) that it sees follows from the slice's term: a higher one deposes the writer,
//!    a lower one is a late request, whose words are merged.
//! 5. **Confirmation.** A word is [confirmed](confirm) when its slice was seen in this term while the Lease was safely held, or when the Lease
//!    was renewed since. Only then it leaves the outbox.
//! 6. **Hand-over.** A replica that writes no more sends its outbox to the one that does, until each word is confirmed,
//!    outranked, or refused as too old. Nothing is dropped silently.
//! 7. **Without the API server.** A writer, and a replica that starts with a directory after which nobody is known to have written,
//!    answers and takes registrations with 202. Copies of one directory are replicas of their own: see
//!    [`DirectoryId`](lease::DirectoryId).
//!
//! The server runs the election, and merges what it lists, what is handed over and what arrives late by [`takeover`], as the
//! simulation does; every process that does not write follows the one that does. A server's [`tombstones`] are
//! those of removals, also of what was not registered. One of a whole address stands for one of each of its instances. What a
//! slice is ([`slice`](mod@slice)) and what is confirmed ([`confirm`]) is decided by the mirror in the server, by code of its own.

pub mod confirm;
pub mod election;
pub mod lease;
mod role;
pub mod rules;
pub mod slice;
pub mod takeover;
#[cfg(test)]
mod tests;
pub mod time;
pub mod tombstones;
pub mod word;
