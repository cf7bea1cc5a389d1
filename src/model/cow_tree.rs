//! A copy-on-write B+ tree: an ordered map whose copies share chunks of at most 32 rows, with a count
//! and a sum of weights above every chunk (a counted B-tree).
//!
//! Changing one of `n` rows copies one chunk per level, so a service of ten thousand instances
//! costs little more per change than a service of one, and a reader that holds the older copy
//! never waits. A tree of up to 32 rows is one allocation. Reading allocates nothing.

use std::{cmp::Ordering, fmt, ops::ControlFlow, sync::Arc};

/// Most rows or children in one chunk.
const FANOUT: usize = 32;

/// Two neighbours with at most this many items together are merged.
const MERGE: usize = FANOUT / 2;

/// Most levels of chunks. 32 levels would hold more rows than there is memory even if every chunk
/// above the leaves had but two.
const DEPTH: usize = 32;

/// What a [`CowTree`] holds.
pub trait Row: Clone {
    /// What the rows are ordered by; unique within a tree.
    type Key<'a>
    where
        Self: 'a;

    /// The key of this row.
    fn key(&self) -> Self::Key<'_>;

    /// How the key of this row compares to `key`.
    fn order(&self, key: &Self::Key<'_>) -> Ordering;

    /// The share of this row in a weighted draw. The default counts rows only.
    fn weight(&self) -> u64 {
        0
    }
}

/// An ordered map of rows with unique keys. A clone costs one reference count.
#[derive(Clone)]
pub struct CowTree<R>(Node<R>);

#[derive(Clone)]
enum Node<R> {
    Leaf(Arc<[R]>),
    Inner(Arc<[Child<R>]>),
}

/// A chunk with what is known of everything below it.
#[derive(Clone)]
struct Child<R> {
    node: Node<R>,
    rows: usize,
    weight: u64,
}

impl<R> Default for CowTree<R> {
    fn default() -> Self {
        Self(Node::Leaf(Arc::new([])))
    }
}

impl<R: Row> CowTree<R> {
    /// Rows in the tree.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.rows()
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(&self.0, Node::Leaf(rows) if rows.is_empty())
    }

    /// The sum of the weights of all rows.
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.0.weight()
    }

    /// The row with this key.
    #[must_use]
    pub fn get<'a>(&'a self, key: &R::Key<'_>) -> Option<&'a R> {
        let mut node = &self.0;
        loop {
            match node {
                Node::Leaf(rows) => {
                    return rows.binary_search_by(|row| compare(row, key)).ok().map(|at| &rows[at]);
                }
                Node::Inner(children) => node = &children[child_for(children, key)].node,
            }
        }
    }

    /// Inserts `row` and returns the one that had its key.
    pub fn put(&mut self, row: R) -> Option<R> {
        let mut replaced = None;
        // The tree grows at its root only, so that all rows are at the same depth.
        if let Some(right) = self.0.put(row, &mut replaced) {
            let left = std::mem::replace(&mut self.0, Node::Leaf(Arc::new([])));
            self.0 = Node::Inner(Arc::new([Child::new(left), Child::new(right)]));
        }
        replaced
    }

    /// Removes the row with this key and returns it.
    pub fn remove(&mut self, key: &R::Key<'_>) -> Option<R> {
        let removed = self.0.remove(key);
        // A root with one child is a level too many: the tree becomes flat again as it shrinks.
        while let Node::Inner(children) = &self.0
            && let [only] = &**children
        {
            self.0 = only.node.clone();
        }
        removed
    }

    /// The rows of a tree of one chunk, at most 32; `None` for a larger one.
    #[must_use]
    pub fn as_chunk(&self) -> Option<&[R]> {
        match &self.0 {
            Node::Leaf(rows) => Some(rows),
            Node::Inner(_) => None,
        }
    }

    /// All rows in order.
    #[must_use]
    pub fn iter(&self) -> Iter<'_, R> {
        self.iter_from(0)
    }

    /// The rows in order from the one at `rank`, counted from 0.
    #[must_use]
    pub fn iter_from(&self, rank: usize) -> Iter<'_, R> {
        let mut iter = Iter { path: [&[]; DEPTH], depth: 0, rows: &[] };
        iter.descend(&self.0, rank);
        iter
    }

    /// Calls `visit` with the rows in order from the first whose key is not below `key`, until
    /// it breaks.
    pub fn visit_from<B>(&self, key: &R::Key<'_>, visit: &mut dyn FnMut(&R) -> ControlFlow<B>) -> ControlFlow<B> {
        self.0.visit_from(key, visit)
    }

    /// The rank of the row on which `point`, of 0..[`weight`](Self::weight), falls when the
    /// weights of all rows are laid end to end. A row without weight is never hit.
    #[must_use]
    pub fn rank_at(&self, mut point: u64) -> usize {
        let mut rank = 0;
        let mut node = &self.0;
        loop {
            match node {
                Node::Leaf(rows) => {
                    for row in rows.iter() {
                        let weight = row.weight();
                        if point < weight {
                            break;
                        }
                        point -= weight;
                        rank += 1;
                    }
                    return rank;
                }
                Node::Inner(children) => {
                    // Stays the last one only for a point beyond all weights, which no caller draws.
                    let mut into = &children[children.len() - 1];
                    for child in children.iter() {
                        if point < child.weight {
                            into = child;
                            break;
                        }
                        point -= child.weight;
                        rank += child.rows;
                    }
                    node = &into.node;
                }
            }
        }
    }
}

impl<R: Row> FromIterator<R> for CowTree<R> {
    fn from_iter<I: IntoIterator<Item = R>>(rows: I) -> Self {
        let mut table = Self::default();
        for row in rows {
            table.put(row);
        }
        table
    }
}

impl<'a, R: Row> IntoIterator for &'a CowTree<R> {
    type Item = &'a R;
    type IntoIter = Iter<'a, R>;

    fn into_iter(self) -> Iter<'a, R> {
        self.iter()
    }
}

impl<R: Row + fmt::Debug> fmt::Debug for CowTree<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self).finish()
    }
}

impl<R: Row + PartialEq> PartialEq for CowTree<R> {
    fn eq(&self, other: &Self) -> bool {
        // By rows, not by chunks: where a tree is cut into chunks depends on the order of its changes.
        self.iter().eq(other.iter())
    }
}

impl<R: Row> Node<R> {
    fn rows(&self) -> usize {
        match self {
            Self::Leaf(rows) => rows.len(),
            Self::Inner(children) => children.iter().map(|child| child.rows).sum(),
        }
    }

    fn weight(&self) -> u64 {
        match self {
            Self::Leaf(rows) => rows.iter().map(Row::weight).sum(),
            Self::Inner(children) => children.iter().map(|child| child.weight).sum(),
        }
    }

    /// Rows or children in this chunk itself.
    fn width(&self) -> usize {
        match self {
            Self::Leaf(rows) => rows.len(),
            Self::Inner(children) => children.len(),
        }
    }

    /// The first row below. Only the root of an empty tree has none, and callers
    /// test for that before.
    fn first(&self) -> &R {
        let mut node = self;
        loop {
            match node {
                Self::Leaf(rows) => return &rows[0],
                Self::Inner(children) => node = &children[0].node,
            }
        }
    }

    /// Inserts `row` below and returns the right half, if the chunk had to be split.
    fn put(&mut self, row: R, replaced: &mut Option<R>) -> Option<Self> {
        match self {
            Self::Leaf(rows) => match rows.binary_search_by(|old| compare(old, &row.key())) {
                Ok(at) => {
                    *replaced = Some(std::mem::replace(&mut Arc::make_mut(rows)[at], row));
                    None
                }
                Err(at) => {
                    let last = at == rows.len();
                    *rows = splice(rows, at..at, [row]);
                    split(rows, last).map(Self::Leaf)
                }
            },
            Self::Inner(children) => {
                let at = child_for(children, &row.key());
                let last = at + 1 == children.len();
                // Copies the chunk only if a reader still holds it. A tree that nobody else holds is changed in place.
                let child = &mut Arc::make_mut(children)[at];
                let right = child.node.put(row, replaced);
                child.recount();
                let right = right?;
                *children = splice(children, at + 1..at + 1, [Child::new(right)]);
                split(children, last).map(Self::Inner)
            }
        }
    }

    fn remove(&mut self, key: &R::Key<'_>) -> Option<R> {
        match self {
            Self::Leaf(rows) => {
                let at = rows.binary_search_by(|row| compare(row, key)).ok()?;
                let removed = rows[at].clone();
                *rows = splice(rows, at..at + 1, []);
                Some(removed)
            }
            Self::Inner(children) => {
                let at = child_for(children, key);
                let child = &mut Arc::make_mut(children)[at];
                let removed = child.node.remove(key)?;
                child.recount();
                Self::tidy(children, at);
                Some(removed)
            }
        }
    }

    /// After a removal below `children[at]`: drops it when empty, joins it with a neighbour when
    /// both are small, so that chunks stay worth their overhead.
    fn tidy(children: &mut Arc<[Child<R>]>, at: usize) {
        // The last child stays although it is empty. The chunk has no rows then, and its own parent drops it.
        if children[at].rows == 0 && children.len() > 1 {
            *children = splice(children, at..at + 1, []);
            return;
        }
        let left = if at + 1 < children.len() { at } else { at.saturating_sub(1) };
        if let [a, b] = &children[left..children.len().min(left + 2)]
            && a.node.width() + b.node.width() <= MERGE
        {
            let joined = match (&a.node, &b.node) {
                (Self::Leaf(a), Self::Leaf(b)) => Self::Leaf(a.iter().chain(b.iter()).cloned().collect()),
                (Self::Inner(a), Self::Inner(b)) => Self::Inner(a.iter().chain(b.iter()).cloned().collect()),
                // Never: all rows are at the same depth, so neighbours are of one kind.
                _ => return,
            };
            *children = splice(children, left..left + 2, [Child::new(joined)]);
        }
    }

    fn visit_from<B>(&self, key: &R::Key<'_>, visit: &mut dyn FnMut(&R) -> ControlFlow<B>) -> ControlFlow<B> {
        match self {
            Self::Leaf(rows) => {
                let at = rows.partition_point(|row| compare(row, key).is_lt());
                rows[at..].iter().try_for_each(visit)
            }
            Self::Inner(children) => {
                let at = child_for(children, key);
                children[at].node.visit_from(key, visit)?;
                children[at + 1..].iter().try_for_each(|child| child.node.visit_all(visit))
            }
        }
    }

    fn visit_all<B>(&self, visit: &mut dyn FnMut(&R) -> ControlFlow<B>) -> ControlFlow<B> {
        match self {
            Self::Leaf(rows) => rows.iter().try_for_each(visit),
            Self::Inner(children) => children.iter().try_for_each(|child| child.node.visit_all(visit)),
        }
    }
}

impl<R: Row> Child<R> {
    fn new(node: Node<R>) -> Self {
        Self { rows: node.rows(), weight: node.weight(), node }
    }

    fn recount(&mut self) {
        self.rows = self.node.rows();
        self.weight = self.node.weight();
    }
}

/// The child below which `key` is or would be.
fn child_for<R: Row>(children: &[Child<R>], key: &R::Key<'_>) -> usize {
    // A key before all others belongs to the first child.
    children.partition_point(|child| compare(child.node.first(), key).is_le()).saturating_sub(1)
}

/// [`Row::order`], counted in tests: the work of an operation that no noise can touch.
fn compare<R: Row>(row: &R, key: &R::Key<'_>) -> Ordering {
    #[cfg(test)]
    COMPARISONS.set(COMPARISONS.get() + 1);
    row.order(key)
}

#[cfg(test)]
thread_local! {
    /// Keys that this thread has compared in all trees.
    pub(crate) static COMPARISONS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// `old` with the items in `range` replaced by `new`.
fn splice<T: Clone, const N: usize>(old: &[T], range: std::ops::Range<usize>, new: [T; N]) -> Arc<[T]> {
    // A chain of slices knows its length, so that the result is made in one allocation.
    old[..range.start].iter().cloned().chain(new).chain(old[range.end..].iter().cloned()).collect()
}

/// Splits a chunk that is too wide and returns its right part. Rows that are inserted in order leave
/// full chunks behind: a new `last` row becomes a chunk of its own.
fn split<T: Clone>(items: &mut Arc<[T]>, last: bool) -> Option<Arc<[T]>> {
    if items.len() <= FANOUT {
        return None;
    }
    let at = if last { FANOUT } else { items.len() / 2 };
    let right = items[at..].into();
    *items = items[..at].into();
    Some(right)
}

/// The rows of a tree in order, from one of them on.
#[derive(Clone)]
pub struct Iter<'a, R> {
    /// What is left to visit on each level above the current chunk.
    path: [&'a [Child<R>]; DEPTH],
    depth: usize,
    rows: &'a [R],
}

impl<'a, R: Row> Iter<'a, R> {
    fn descend(&mut self, mut node: &'a Node<R>, mut skip: usize) {
        loop {
            match node {
                Node::Leaf(rows) => {
                    self.rows = &rows[skip.min(rows.len())..];
                    return;
                }
                Node::Inner(children) => {
                    let mut at = 0;
                    // By the counts above the chunks: no row is visited that is not returned.
                    while at + 1 < children.len() && skip >= children[at].rows {
                        skip -= children[at].rows;
                        at += 1;
                    }
                    self.path[self.depth] = &children[at + 1..];
                    self.depth += 1;
                    node = &children[at].node;
                }
            }
        }
    }
}

impl<'a, R: Row> Iterator for Iter<'a, R> {
    type Item = &'a R;

    fn next(&mut self) -> Option<&'a R> {
        loop {
            if let Some((row, rest)) = self.rows.split_first() {
                self.rows = rest;
                return Some(row);
            }
            let level = self.depth.checked_sub(1)?;
            if let Some((child, rest)) = self.path[level].split_first() {
                self.path[level] = rest;
                self.descend(&child.node, 0);
            } else {
                self.depth = level;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    impl Row for (u32, u64) {
        type Key<'a> = u32;

        fn key(&self) -> u32 {
            self.0
        }

        fn order(&self, key: &u32) -> Ordering {
            self.0.cmp(key)
        }

        fn weight(&self) -> u64 {
            self.1
        }
    }

    /// Which row a point falls on, laid end to end by hand.
    fn rank_by_hand(rows: &[(u32, u64)], mut point: u64) -> usize {
        rows.iter()
            .position(|(_, weight)| {
                let hit = point < *weight;
                point = point.wrapping_sub(if hit { 0 } else { *weight });
                hit
            })
            .unwrap_or(rows.len())
    }

    fn check(table: &CowTree<(u32, u64)>, model: &BTreeMap<u32, u64>) {
        let rows: Vec<(u32, u64)> = model.iter().map(|(k, w)| (*k, *w)).collect();
        assert_eq!(table.iter().copied().collect::<Vec<_>>(), rows);
        assert_eq!(table.len(), rows.len());
        assert_eq!(table.is_empty(), rows.is_empty());
        assert!(table.as_chunk().map_or(rows.len() > 1, |chunk| chunk == rows));
        assert_eq!(table.weight(), model.values().sum::<u64>());
        for rank in [0, 1, rows.len() / 2, rows.len()] {
            let from: Vec<_> = table.iter_from(rank).copied().collect();
            assert_eq!(from, rows[rank.min(rows.len())..]);
        }
        for point in [0, table.weight() / 3, table.weight().saturating_sub(1)] {
            if point < table.weight() {
                assert_eq!(table.rank_at(point), rank_by_hand(&rows, point));
            }
        }
        for key in [0, 77, 500, u32::MAX] {
            let mut seen = Vec::new();
            let _ = table.visit_from::<()>(&key, &mut |row| {
                seen.push(*row);
                ControlFlow::Continue(())
            });
            assert_eq!(seen, rows.iter().copied().filter(|(k, _)| *k >= key).collect::<Vec<_>>());
        }
    }

    proptest! {
        #[test]
        fn tree_equals_a_btreemap(steps in prop::collection::vec((any::<bool>(), 0u32..1000, 0u64..5), 0..3000)) {
            let mut table = CowTree::default();
            let mut model = BTreeMap::new();
            let mut copies = Vec::new();
            for (index, (put, key, weight)) in steps.into_iter().enumerate() {
                if put {
                    prop_assert_eq!(table.put((key, weight)).map(|row| row.1), model.insert(key, weight));
                } else {
                    prop_assert_eq!(table.remove(&key).map(|row| row.1), model.remove(&key));
                }
                prop_assert_eq!(table.get(&key).map(|row| row.1), model.get(&key).copied());
                if index % 500 == 0 {
                    copies.push((table.clone(), model.clone()));
                }
            }
            check(&table, &model);
            for (table, model) in copies {
                check(&table, &model);
            }
        }
    }

    #[test]
    fn rows_inserted_in_order_fill_their_chunks() {
        let table: CowTree<(u32, u64)> = (0..100_000).map(|k| (k, 1)).collect();
        let Node::Inner(children) = &table.0 else { panic!("a large table has levels") };
        assert_eq!(children[0].rows % FANOUT, 0);
        assert_eq!(table.rank_at(99_999), 99_999);
        let mut emptied = table.clone();
        for key in 0..100_000 {
            assert!(emptied.remove(&key).is_some());
        }
        assert!(emptied.is_empty());
        assert_eq!(table.len(), 100_000);
    }
}
