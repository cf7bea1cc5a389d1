//! RRsets, and the tree behind them, which allocates nothing for a single row: most RRsets of a zone
//! have one record.
//!
//! One row is stored inline; two or more are in a [`CowTree`]. Readers get an [`Rrset`]: never empty,
//! borrowed, free to copy.

use std::{fmt, ops::ControlFlow, slice};

use crate::model::cow_tree::{CowTree, Row};

/// No row, one inline, or a tree of them.
#[derive(Clone, Default)]
pub(super) enum SmallTree<R> {
    /// Nothing.
    #[default]
    None,
    /// The usual case, without an allocation.
    One(R),
    /// Two rows or more.
    Many(CowTree<R>),
}

impl<R: Row> SmallTree<R> {
    /// Whether there is no row.
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Self::None)
    }

    /// The rows as a set of records; `None` when there are none.
    pub(super) fn rrset(&self) -> Option<Rrset<'_, R>> {
        match self {
            Self::None => None,
            Self::One(row) => Some(Rrset::one(row)),
            Self::Many(table) => Some(table.as_chunk().map_or(Rrset::Many(table), Rrset::Few)),
        }
    }

    /// The row with this key.
    pub(super) fn get<'a>(&'a self, key: &R::Key<'_>) -> Option<&'a R> {
        match self {
            Self::None => None,
            Self::One(row) => row.order(key).is_eq().then_some(row),
            Self::Many(table) => table.get(key),
        }
    }

    /// Whether `accept` takes the first row whose key is not below `key`.
    pub(super) fn any_from(&self, key: &R::Key<'_>, accept: impl Fn(&R) -> bool) -> bool {
        let mut accepted = false;
        self.visit_from(key, |row| {
            accepted = accept(row);
            false
        });
        accepted
    }

    /// Calls `visit` with the rows in order, from the first whose key is not below `key`, as long as it returns true.
    pub(super) fn visit_from(&self, key: &R::Key<'_>, mut visit: impl FnMut(&R) -> bool) {
        match self {
            Self::None => {}
            Self::One(row) => {
                if row.order(key).is_ge() {
                    visit(row);
                }
            }
            Self::Many(table) => {
                let mut step = |row: &R| if visit(row) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
                let _ = table.visit_from(key, &mut step);
            }
        }
    }

    /// Inserts `row`; one with the same key is replaced.
    pub(super) fn put(&mut self, row: R) {
        *self = match std::mem::take(self) {
            Self::None => Self::One(row),
            Self::One(old) if old.order(&row.key()).is_eq() => Self::One(row),
            Self::One(old) => Self::Many([old, row].into_iter().collect()),
            Self::Many(mut table) => {
                table.put(row);
                Self::Many(table)
            }
        };
    }

    /// Removes the row with this key, if there is one.
    pub(super) fn remove(&mut self, key: &R::Key<'_>) {
        *self = match std::mem::take(self) {
            Self::One(row) if row.order(key).is_eq() => Self::None,
            Self::Many(mut table) => {
                table.remove(key);
                // The last row moves back inline: a service that was large for a while does not keep a tree for ever.
                match (table.len(), table.iter().next()) {
                    (1, Some(last)) => Self::One(last.clone()),
                    _ => Self::Many(table),
                }
            }
            rest => rest,
        };
    }

    /// Changes the row with this key, or one that `new` makes; `change` returns whether the row stays.
    pub(super) fn update(&mut self, key: &R::Key<'_>, new: impl FnOnce() -> R, change: impl FnOnce(&mut R) -> bool) {
        let mut row = self.get(key).cloned().unwrap_or_else(new);
        if change(&mut row) {
            self.put(row);
        } else {
            self.remove(key);
        }
    }

    /// All rows in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &R> {
        self.rrset().into_iter().flat_map(|set| set.iter())
    }
}

impl<R: Row + PartialEq> PartialEq for SmallTree<R> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl<R: Row + fmt::Debug> fmt::Debug for SmallTree<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// The records of one name and type: at least one, in the order of their keys.
pub(crate) enum Rrset<'v, R> {
    /// Up to 32 records, side by side.
    Few(&'v [R]),
    /// More.
    Many(&'v CowTree<R>),
}

impl<R> Clone for Rrset<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for Rrset<'_, R> {}

impl<R: Row + fmt::Debug> fmt::Debug for Rrset<'_, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<'v, R: Row> Rrset<'v, R> {
    /// A single record.
    pub(super) fn one(row: &'v R) -> Self {
        Self::Few(slice::from_ref(row))
    }

    /// How many records.
    #[must_use]
    pub(crate) fn len(self) -> usize {
        match self {
            Self::Few(rows) => rows.len(),
            Self::Many(table) => table.len(),
        }
    }

    /// Draws the record that comes first, by weight; without any weight every record is equally likely.
    #[must_use]
    pub(crate) fn draw(self, rng: &mut fastrand::Rng) -> usize {
        let weight = match self {
            // Nearly every RRset: no random number is drawn.
            Self::Few([_]) => return 0,
            Self::Few(rows) => rows.iter().map(Row::weight).sum(),
            Self::Many(table) => table.weight(),
        };
        if weight == 0 {
            // RFC 2782 gives weight 0 a small chance beside others. When all are 0 they share the load evenly.
            return rng.usize(0..self.len());
        }
        // A point on the line of all weights: it falls into each row as often as the row is long.
        let mut point = rng.u64(0..weight);
        match self {
            Self::Few(rows) => rows
                .iter()
                .position(|row| {
                    let hit = point < row.weight();
                    point = point.saturating_sub(row.weight());
                    hit
                })
                .unwrap_or(0),
            Self::Many(table) => table.rank_at(point),
        }
    }

    /// Calls `visit` with every record, beginning with the one at `rank` and going on with the
    /// first after the last, until it fails.
    ///
    /// # Errors
    /// The error of `visit`.
    pub(crate) fn visit_from<E>(self, rank: usize, visit: impl FnMut(&'v R) -> Result<(), E>) -> Result<(), E> {
        // The iterator of a large table is large itself: a small one does without.
        match self {
            Self::Few(rows) => {
                let (before, from) = rows.split_at(rank.min(rows.len()));
                from.iter().chain(before).try_for_each(visit)
            }
            Self::Many(table) => table.iter_from(rank).chain(table.iter_from(0).take(rank)).try_for_each(visit),
        }
    }

    /// All records, in the order of [`Rrset::visit_from`].
    pub(crate) fn wrap_from(self, rank: usize) -> impl Iterator<Item = &'v R> {
        // Both forms as one iterator: whichever the RRset is not stays empty.
        let (few, many): (&[R], Option<_>) = match self {
            Self::Few(rows) => (rows, None),
            Self::Many(table) => (&[], Some(table.iter_from(rank).chain(table.iter_from(0).take(rank)))),
        };
        let (before, from) = few.split_at(rank.min(few.len()));
        from.iter().chain(before).chain(many.into_iter().flatten())
    }

    /// All records in order.
    pub(crate) fn iter(self) -> impl Iterator<Item = &'v R> {
        self.wrap_from(0)
    }
}
