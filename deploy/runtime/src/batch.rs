//! The queue in front of the model, and the worker that runs it.
//!
//! Batching adapts by itself: while the model runs, requests wait, and the next run takes those that
//! can be joined. Nothing is added to the latency of a lone request unless a delay is asked for.
//!
//! Always holds: a job that was pushed gets exactly one answer, or its caller has gone; the oldest
//! job is in the next batch, so none starves; a job is never split; the queue never holds more than
//! its capacity.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::error;

use crate::error::{Chain, Error, Outcome};
use crate::metrics::Metrics;
use crate::model::Model;
use crate::tensor::Tensor;

/// One request on its way to the model.
#[derive(Debug)]
pub struct Job {
    /// All inputs, in the model's order.
    pub inputs: Vec<Tensor>,
    /// Places of the outputs that are asked for, in the order of the answer.
    pub wanted: Vec<usize>,
    /// When it was pushed.
    pub since: Instant,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Result<Vec<Tensor>, Error>>,
}

/// How jobs are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows in one run; 1 joins nothing.
    pub max_rows: usize,
    /// How long the oldest job may wait for others.
    pub max_delay: Duration,
    /// Jobs that may wait.
    pub capacity: usize,
}

/// A bounded queue with one worker at its end.
#[derive(Debug)]
pub struct Queue {
    limits: Limits,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Job>,
    closed: bool,
}

impl Queue {
    /// An empty queue.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Puts a job at the end.
    ///
    /// # Errors
    ///
    /// [`Error::QueueFull`] or [`Error::Stopping`]; the job is gone then.
    pub fn push(&self, job: Job) -> Result<(), Error> {
        let mut state = self.lock();
        if state.closed {
            return Err(Error::Stopping);
        }
        if state.waiting.len() >= self.limits.capacity {
            // While the model runs nobody else takes away those whose callers have gone.
            state.waiting.retain(|job| !job.reply.is_closed());
        }
        if state.waiting.len() >= self.limits.capacity {
            return Err(Error::QueueFull { limit: self.limits.capacity });
        }
        state.waiting.push_back(job);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Takes no more jobs; those that wait are still handed out.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// The next jobs to run together; `None` when the queue is closed and empty.
    ///
    /// Blocks the thread until there is a job: [`Self::close`] ends the wait.
    #[must_use]
    pub fn next(&self) -> Option<Vec<Job>> {
        let mut state = self.lock();
        loop {
            // Nobody waits for these any more.
            state.waiting.retain(|job| !job.reply.is_closed());
            let Some(oldest) = state.waiting.front() else {
                if state.closed {
                    return None;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let shapes: Vec<&[Tensor]> =
                state.waiting.iter().map(|job| job.inputs.as_slice()).collect();
            let (picked, rows) = pick(&shapes, self.limits.max_rows);
            let waited = oldest.since.elapsed();
            if rows < self.limits.max_rows && !state.closed && waited < self.limits.max_delay {
                let left = self.limits.max_delay - waited;
                let (next, _) =
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
                state = next;
                continue;
            }
            // From behind, so that the places of the others stay right.
            let mut jobs: Vec<Job> =
                picked.iter().rev().filter_map(|place| state.waiting.remove(*place)).collect();
            jobs.reverse();
            return Some(jobs);
        }
    }

    /// Jobs that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Whether no job waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock; if it does, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which of the waiting jobs run together, and how many rows that makes.
///
/// The first always does. Others join when all their inputs equal the first's but for the number of
/// rows, and as long as the rows fit into `max_rows`.
fn pick(waiting: &[&[Tensor]], max_rows: usize) -> (Vec<usize>, usize) {
    let rows = |inputs: &[Tensor]| inputs.first().map_or(1, Tensor::rows);
    let Some((first, others)) = waiting.split_first() else { return (Vec::new(), 0) };
    let mut picked = vec![0];
    let mut total = rows(first);
    for (place, inputs) in others.iter().enumerate() {
        if total >= max_rows {
            break;
        }
        let fits = total + rows(inputs) <= max_rows
            && inputs.iter().zip(*first).all(|(a, b)| {
                !a.shape.is_empty() && !b.shape.is_empty() && a.shape[1..] == b.shape[1..]
            });
        if fits {
            picked.push(place + 1);
            total += rows(inputs);
        }
    }
    (picked, total)
}

/// Runs batches until the queue is closed and empty. One thread does nothing else.
pub fn work(queue: &Queue, model: &Model, metrics: &Metrics) {
    while let Some(jobs) = queue.next() {
        run(jobs, model, metrics);
    }
}

fn run(jobs: Vec<Job>, model: &Model, metrics: &Metrics) {
    let start = Instant::now();
    for job in &jobs {
        metrics.waited.observe(start.saturating_duration_since(job.since).as_secs_f64());
    }
    let rows: Vec<usize> = jobs.iter().map(|j| j.inputs.first().map_or(1, Tensor::rows)).collect();
    let total: usize = rows.iter().sum();
    metrics.batch_requests.observe_count(jobs.len());
    metrics.batch_rows.observe_count(total);
    if let [job] = jobs.as_slice() {
        let answer = model.run(&job.inputs, &job.wanted);
        metrics.ran.observe(start.elapsed().as_secs_f64());
        return reply(jobs, answer.map(|tensors| vec![tensors]));
    }
    let answer = run_joined(&jobs, &rows, model);
    metrics.ran.observe(start.elapsed().as_secs_f64());
    match answer {
        Ok(parts) => reply(jobs, Ok(parts)),
        // One request may have spoilt it for the others: each gets what it would have got alone.
        Err(_) => {
            for job in jobs {
                let answer = model.run(&job.inputs, &job.wanted);
                reply(vec![job], answer.map(|tensors| vec![tensors]));
            }
        }
    }
}

/// The answers of all jobs from one run.
fn run_joined(jobs: &[Job], rows: &[usize], model: &Model) -> Result<Vec<Vec<Tensor>>, Error> {
    let unfit = || Error::BrokenSignature("requests that were joined did not fit".to_owned());
    let inputs = (0..jobs[0].inputs.len())
        .map(|place| Tensor::concat(jobs.iter().map(|job| &job.inputs[place])).ok_or_else(unfit))
        .collect::<Result<Vec<_>, _>>()?;
    let mut wanted: Vec<usize> = jobs.iter().flat_map(|job| job.wanted.iter().copied()).collect();
    wanted.sort_unstable();
    wanted.dedup();
    let outputs = model
        .run(&inputs, &wanted)?
        .iter()
        .map(|output| output.split(rows).ok_or_else(unfit))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(jobs
        .iter()
        .enumerate()
        .map(|(place, job)| {
            job.wanted
                .iter()
                .filter_map(|index| wanted.binary_search(index).ok())
                .map(|output| outputs[output][place].clone())
                .collect()
        })
        .collect())
}

/// Sends each job its answer; a failure goes to the only job.
fn reply(jobs: Vec<Job>, answer: Result<Vec<Vec<Tensor>>, Error>) {
    match answer {
        Ok(parts) => {
            for (job, part) in jobs.into_iter().zip(parts) {
                // The caller may have gone; then nobody wants it.
                let _ = job.reply.send(Ok(part));
            }
        }
        Err(error) => {
            if error.outcome() == Outcome::Failed {
                error!("a run of the model failed: {}", Chain(&error));
            }
            if let Some(job) = jobs.into_iter().next() {
                let _ = job.reply.send(Err(error));
            }
        }
    }
}

/// Starts the worker's thread.
///
/// # Errors
///
/// When the system has no thread to give.
pub fn start_worker(
    queue: Arc<Queue>,
    model: Arc<Model>,
    metrics: Arc<Metrics>,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new()
        .name("model".to_owned())
        .spawn(move || work(&queue, &model, &metrics))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Elements;

    fn rows(count: usize, width: usize) -> Vec<Tensor> {
        let elements = Elements::F32(vec![0.0; count * width]);
        vec![Tensor { shape: vec![count, width], elements }]
    }

    fn picked(waiting: &[Vec<Tensor>], max_rows: usize) -> (Vec<usize>, usize) {
        pick(&waiting.iter().map(Vec::as_slice).collect::<Vec<_>>(), max_rows)
    }

    fn job(inputs: Vec<Tensor>) -> (Job, oneshot::Receiver<Result<Vec<Tensor>, Error>>) {
        let (reply, answer) = oneshot::channel();
        (Job { inputs, wanted: vec![0], since: Instant::now(), reply }, answer)
    }

    fn queue(max_rows: usize, max_delay: Duration, capacity: usize) -> Queue {
        Queue::new(Limits { max_rows, max_delay, capacity })
    }

    #[test]
    fn equal_shapes_join_up_to_the_limit() {
        let waiting = [rows(1, 4), rows(2, 4), rows(1, 5), rows(1, 4), rows(1, 4)];
        assert_eq!(picked(&waiting, 4), (vec![0, 1, 3], 4));
        assert_eq!(picked(&waiting, 100), (vec![0, 1, 3, 4], 5));
        assert_eq!(picked(&waiting, 1), (vec![0], 1));
        assert_eq!(picked(&[], 4), (vec![], 0));
    }

    #[test]
    fn a_large_job_runs_alone_and_whole() {
        assert_eq!(picked(&[rows(9, 4), rows(1, 4)], 4), (vec![0], 9));
        assert_eq!(picked(&[rows(1, 4), rows(9, 4), rows(1, 4)], 4), (vec![0, 2], 2));
    }

    #[test]
    fn a_full_queue_refuses() {
        let queue = queue(1, Duration::ZERO, 1);
        let (first, _answer) = job(rows(1, 4));
        queue.push(first).unwrap();
        let refused = queue.push(job(rows(1, 4)).0);
        assert!(matches!(refused, Err(Error::QueueFull { limit: 1 })));
    }

    #[test]
    fn a_place_of_a_caller_who_has_gone_is_free() {
        let queue = queue(1, Duration::ZERO, 1);
        let (gone, answer) = job(rows(1, 4));
        queue.push(gone).unwrap();
        drop(answer);
        let (next, _answer) = job(rows(3, 4));
        queue.push(next).unwrap();
        assert_eq!(queue.next().unwrap()[0].inputs[0].rows(), 3);
    }

    #[test]
    fn jobs_that_nobody_waits_for_are_not_run() {
        let queue = queue(1, Duration::ZERO, 8);
        drop({
            let (gone, answer) = job(rows(1, 4));
            queue.push(gone).unwrap();
            answer
        });
        let (kept, _answer) = job(rows(3, 4));
        queue.push(kept).unwrap();
        let jobs = queue.next().unwrap();
        assert_eq!(jobs[0].inputs[0].rows(), 3);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_closed_queue_hands_out_what_waits_and_then_ends() {
        let queue = queue(8, Duration::from_secs(3600), 8);
        let (waiting, _answer) = job(rows(1, 4));
        queue.push(waiting).unwrap();
        queue.close();
        assert_eq!(queue.next().map(|jobs| jobs.len()), Some(1));
        assert!(queue.next().is_none());
        assert!(matches!(queue.push(job(rows(1, 4)).0), Err(Error::Stopping)));
    }

    #[test]
    fn a_full_batch_does_not_wait_for_the_delay() {
        let queue = queue(2, Duration::from_secs(3600), 8);
        let (one, _first) = job(rows(1, 4));
        let (two, _second) = job(rows(1, 4));
        queue.push(one).unwrap();
        queue.push(two).unwrap();
        assert_eq!(queue.next().unwrap().len(), 2);
    }

    #[test]
    fn a_delay_lets_a_later_job_join() {
        let queue = Arc::new(queue(2, Duration::from_secs(3600), 8));
        let (one, _first) = job(rows(1, 4));
        queue.push(one).unwrap();
        let taker = std::thread::spawn({
            let queue = queue.clone();
            move || queue.next().map(|jobs| jobs.len())
        });
        let (two, _second) = job(rows(1, 4));
        queue.push(two).unwrap();
        assert_eq!(taker.join().unwrap(), Some(2));
    }
}
