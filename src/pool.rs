//! Threads that are kept for the next job: as many as there are jobs at once, no more.

use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

type Job = Box<dyn FnOnce() + Send>;

/// How long a thread without work waits for some before it ends.
const IDLE: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub struct Pool {
    /// Without a buffer: a job is taken by a thread that waits, or not at all.
    jobs: Sender<Job>,
    work: Receiver<Job>,
}

impl Pool {
    pub fn new() -> Pool {
        let (jobs, work) = bounded(0);
        Pool { jobs, work }
    }

    /// Runs the job on a waiting thread, or on a new one where none waits. Gives the job back where
    /// the machine has no thread for it.
    pub fn run(&self, job: Job) -> Result<(), Job> {
        let job = match self.jobs.try_send(job) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job,
        };
        let work = self.work.clone();
        let thread = std::thread::Builder::new().name("mkv-pool".into()).spawn(move || {
            while let Ok(job) = work.recv_timeout(IDLE) {
                // A job that panics has told its own waiter, by what it drops; the thread goes on.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
            }
        });
        match thread {
            // Another caller may take the new thread; then one that is busy now becomes free.
            Ok(_) => self.jobs.send_timeout(job, IDLE).map_err(|e| e.into_inner()),
            Err(_) => Err(job),
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
        let f = std::sync::Arc::new(f);
        let (done, results) = bounded(count);
        for (n, item) in items.into_iter().enumerate() {
            let (f, done) = (f.clone(), done.clone());
            let job = move || drop(done.send((n, f(item))));
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
    use std::sync::{Arc, Barrier};

    #[test]
    fn each_runs_all_at_once_and_keeps_the_order() {
        let pool = Pool::new();
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
    fn a_job_that_panics_does_not_cost_the_next_one() {
        let pool = Pool::new();
        let (done, results) = bounded(1);
        pool.run(Box::new(|| panic!("on purpose"))).ok().unwrap();
        pool.run(Box::new(move || done.send(7).unwrap())).ok().unwrap();
        assert_eq!(results.recv(), Ok(7));
    }
}
