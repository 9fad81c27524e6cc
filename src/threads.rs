//! A pool of threads without a limit, which keeps idle ones for the next job.
//!
//! A job goes to an idle thread, or to a new one. It never waits in a queue, so jobs may wait for each other.
//! The channel has capacity 0: a send succeeds only if a thread is receiving. Receivers of such a channel sleep
//! at once; receivers of a buffered channel spin first, which costs processor time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

/// Locks and ignores poisoning: the data is consistent after every statement.
pub fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(|e| e.into_inner())
}

pub type Job = Box<dyn FnOnce() + Send>;

/// How long a thread waits for a job before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// How many idle threads are kept. Jobs take turns among idle threads, so without this limit a few jobs would
/// keep all threads of an earlier peak alive.
const SPARE: usize = 16;

/// A thread's stack, in bytes of address space. RocksDB's writes need some 100 KiB.
const STACK: usize = 1 << 20;

#[derive(Clone)]
pub struct Pool {
    give: Sender<Job>,
    take: Receiver<Job>,
    /// Idle threads.
    spare: Arc<AtomicUsize>,
}

impl Default for Pool {
    fn default() -> Pool {
        let (give, take) = bounded(0);
        Pool { give, take, spare: Arc::default() }
    }
}

impl Pool {
    /// Runs the job on an idle thread, or on a new one. Returns the job if the machine cannot start a thread.
    pub fn run(&self, job: Job) -> Result<(), Job> {
        let Err(refused) = self.give.try_send(job) else { return Ok(()) };
        let (give, first) = bounded(1);
        let _ = give.send(refused.into_inner());
        let (pool, taken) = (self.clone(), first.clone());
        let builder = thread::Builder::new().name("mkv-pool".into()).stack_size(STACK);
        match builder.spawn(move || taken.try_iter().for_each(|job| pool.work(job))) {
            Ok(_) => Ok(()),
            Err(_) => first.try_recv().map_or(Ok(()), Err),
        }
    }

    /// Runs a job, then further jobs until none comes for `IDLE`.
    fn work(&self, job: Job) {
        let mut next = Some(job);
        while let Some(job) = next {
            // The panic hook has logged a panic.
            let _ = catch_unwind(AssertUnwindSafe(job));
            let waits = self.spare.fetch_add(1, Ordering::Relaxed) < SPARE;
            next = self.take.recv_timeout(if waits { IDLE } else { Duration::ZERO }).ok();
            self.spare.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Calls `f` with all items at the same time and returns the results in the items' order. If no thread can be
    /// started for an item, the calling thread handles it.
    pub fn each<I, T, F>(&self, items: Vec<I>, f: F) -> Vec<T>
    where
        I: Send + 'static,
        T: Send + 'static,
        F: Fn(I) -> T + Send + Sync + 'static,
    {
        let count = items.len();
        let f = Arc::new(f);
        let (done, results) = unbounded();
        for (n, item) in items.into_iter().enumerate() {
            let (f, done) = (f.clone(), done.clone());
            let job = move || {
                let result = f(item);
                // Drop `f` before signalling: it may hold the last Arc of the index.
                drop(f);
                let _ = done.send((n, result));
            };
            // The last one is this thread's own.
            if n + 1 == count {
                job();
            } else if let Err(job) = self.run(Box::new(job)) {
                job();
            }
        }
        drop(done);
        let mut results: Vec<(usize, T)> = results.iter().collect();
        assert_eq!(results.len(), count, "a job panicked");
        results.sort_by_key(|(n, _)| *n);
        results.into_iter().map(|(_, result)| result).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn each_runs_all_at_once_and_keeps_the_order() {
        let pool = Pool::default();
        for _ in 0..100 {
            let barrier = Arc::new(Barrier::new(20));
            let results = pool.each((0..20).collect(), move |n| {
                barrier.wait();
                n * 2
            });
            assert_eq!(results, (0..20).map(|n| n * 2).collect::<Vec<_>>());
        }
    }

    #[test]
    fn little_work_keeps_few_threads() {
        let pool = Pool::default();
        pool.each((0..100).collect(), |_: u32| std::thread::sleep(Duration::from_millis(100)));
        for _ in 0..200 {
            let (done, result) = unbounded();
            pool.run(Box::new(move || done.send(()).unwrap())).ok().unwrap();
            result.recv().unwrap();
        }
        assert!(pool.spare.load(Ordering::Relaxed) <= SPARE + 1);
    }

    #[test]
    fn a_job_that_panics_does_not_cost_the_next_one() {
        let pool = Pool::default();
        let (done, results) = unbounded();
        pool.run(Box::new(|| panic!("on purpose"))).ok().unwrap();
        pool.run(Box::new(move || done.send(7).unwrap())).ok().unwrap();
        assert_eq!(results.recv(), Ok(7));
    }
}
