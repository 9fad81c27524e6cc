//! The last changes in memory, so that a follower's master does not read its log from the disk over and over.
//!
//! Entries are added in the order of their numbers. After a gap the tail begins anew: readers take the log then.

use std::collections::VecDeque;

use crate::index::log::encode;

/// Bytes of batches that are kept, and that are read at once.
const BYTES: usize = 4 << 20;

#[derive(Default)]
pub struct Tail {
    /// The number of each batch's first change, and the batch.
    updates: VecDeque<(u64, Vec<u8>)>,
    /// The number of the next change.
    next: u64,
    bytes: usize,
}

impl Tail {
    /// Adds a batch of `count` changes, the first of which has this number.
    pub fn push(&mut self, change: u64, count: u64, batch: Vec<u8>) {
        if change != self.next {
            *self = Tail::default();
        }
        self.next = change + count;
        self.bytes += batch.len();
        self.updates.push_back((change, batch));
        while self.bytes > BYTES
            && let Some((_, oldest)) = self.updates.pop_front()
        {
            self.bytes -= oldest.len();
        }
    }

    /// Appends the batches after this change. `false`: they are not here.
    pub fn read(&self, since: u64, out: &mut Vec<u8>) -> bool {
        let Ok(first) = self.updates.binary_search_by_key(&(since + 1), |(change, _)| *change) else { return false };
        for (change, batch) in self.updates.range(first..) {
            encode(out, *change, batch);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_gives_what_follows_a_change_and_nothing_after_a_gap() {
        let mut tail = Tail::default();
        let read = |tail: &Tail, since| {
            let mut out = Vec::new();
            tail.read(since, &mut out).then_some(out)
        };
        let encoded = |updates: &[(u64, &[u8])]| {
            let mut out = Vec::new();
            updates.iter().for_each(|(change, batch)| encode(&mut out, *change, batch));
            Some(out)
        };
        tail.push(5, 2, b"first".into());
        tail.push(7, 1, b"second".into());
        assert_eq!(read(&tail, 4), encoded(&[(5, b"first"), (7, b"second")]));
        assert_eq!(read(&tail, 6), encoded(&[(7, b"second")]));
        // Before its begin, inside a batch, at its end.
        assert!([3, 5, 7].iter().all(|since| read(&tail, *since).is_none()));
        tail.push(9, 1, b"later".into());
        assert!(read(&tail, 6).is_none());
        assert_eq!(read(&tail, 8), encoded(&[(9, b"later")]));
    }

    #[test]
    fn a_tail_does_not_grow_for_ever() {
        let mut tail = Tail::default();
        (0..100).for_each(|n| tail.push(n, 1, vec![0; BYTES / 10]));
        assert_eq!(tail.updates.len(), 10);
        assert!(!tail.read(88, &mut Vec::new()) && tail.read(89, &mut Vec::new()));
    }
}
