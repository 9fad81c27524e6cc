//! Threads that are kept for the next job.
//!
//! Not a channel: a channel's receivers spin before they sleep, which on few cores takes the
//! processor from nginx; a job here costs one wake-up.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Locks what is whole after each change to it, so that a panic elsewhere does not matter.
pub fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(|e| e.into_inner())
}

pub type Job = Box<dyn FnOnce() + Send>;

/// How long a thread without work waits for some before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// How many threads may wait for work. The jobs go round among those that wait: without a limit a
/// little work would keep as many threads as the most there has ever been.
const SPARE: usize = 16;

#[derive(Clone)]
pub struct Pool(Arc<Shared>);

struct Shared {
    most: usize,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    /// Threads that wait for a job, those included that were woken and are not awake yet: each of
    /// them takes one of `jobs`.
    waiting: usize,
}

impl Pool {
    /// At most `most` threads; what is more waits for one of them.
    pub fn new(most: usize) -> Pool {
        Pool(Arc::new(Shared { most, state: Mutex::default(), work: Condvar::new() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }

    /// Runs the job on a thread that waits, or on a new one. Gives the job back where the machine
    /// has no thread for it.
    pub fn run(&self, job: Job) -> Result<(), Job> {
        let mut state = self.state();
        if state.waiting <= state.jobs.len() && state.threads < self.0.most {
            let pool = self.clone();
            let thread = std::thread::Builder::new().name("mkv-pool".into());
            match thread.spawn(move || pool.work()) {
                Ok(_) => state.threads += 1,
                // A job of a pool without bound may wait for another job, so it cannot queue.
                Err(_) if state.threads == 0 || self.0.most == usize::MAX => return Err(job),
                Err(_) => {}
            }
        }
        state.jobs.push_back(job);
        let sleeping = state.waiting > 0;
        drop(state);
        if sleeping {
            self.0.work.notify_one();
        }
        Ok(())
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // A job that panics has told its own waiter, by what it drops; the thread goes on.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = self.state();
                continue;
            }
            if state.waiting >= SPARE {
                state.threads -= 1;
                return;
            }
            state.waiting += 1;
            let (back, waited) =
                self.0.work.wait_timeout(state, IDLE).unwrap_or_else(|e| e.into_inner());
            state = back;
            state.waiting -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    /// Calls `f` with every item at the same time, and gives the results in the items' order. What
    /// no thread can be had for is done here, one after the other.
    pub fn each<I, T, F>(&self, items: Vec<I>, f: F) -> Vec<T>
    where
        I: Send + 'static,
        T: Send + 'static,
        F: Fn(I) -> T + Send + Sync + 'static,
    {
        let count = items.len();
        let f = Arc::new(f);
        let (done, results) = std::sync::mpsc::channel();
        for (n, item) in items.into_iter().enumerate() {
            let (f, done) = (f.clone(), done.clone());
            let job = move || {
                let result = f(item);
                // What `f` holds is let go before the caller goes on: it may be the index.
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
        let pool = Pool::new(usize::MAX);
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
    fn a_bounded_pool_runs_everything_in_the_end() {
        let pool = Pool::new(2);
        let (done, results) = std::sync::mpsc::channel();
        for n in 0..1000 {
            let done = done.clone();
            pool.run(Box::new(move || done.send(n).unwrap())).ok().unwrap();
        }
        drop(done);
        assert_eq!(results.iter().sum::<usize>(), 999 * 1000 / 2);
        assert!(pool.state().threads <= 2);
    }

    #[test]
    fn little_work_keeps_few_threads() {
        let pool = Pool::new(usize::MAX);
        pool.each((0..100).collect(), |_: u32| std::thread::sleep(Duration::from_millis(100)));
        for _ in 0..200 {
            let (done, result) = std::sync::mpsc::channel();
            pool.run(Box::new(move || done.send(()).unwrap())).ok().unwrap();
            result.recv().unwrap();
        }
        assert!(pool.state().threads <= SPARE + 1);
    }

    #[test]
    fn a_job_that_panics_does_not_cost_the_next_one() {
        let pool = Pool::new(1);
        let (done, results) = std::sync::mpsc::channel();
        pool.run(Box::new(|| panic!("on purpose"))).ok().unwrap();
        pool.run(Box::new(move || done.send(7).unwrap())).ok().unwrap();
        assert_eq!(results.recv(), Ok(7));
    }
}
