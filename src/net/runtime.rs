//! Threads of the operating system that can be awaited, with or without a runtime of their own.

use std::{io, thread};

use tokio::{runtime::Builder, sync::oneshot};

/// Runs `work` on a thread of its own. The future is ready when the thread has ended and is joined.
///
/// # Errors
/// When the thread cannot be started; the future returns the error of `work`, or that it panicked.
pub fn run_in_thread(
    name: String,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<impl Future<Output = io::Result<()>> + Send> {
    let (done, ended) = oneshot::channel::<()>();
    let thread = thread::Builder::new().name(name).spawn(move || {
        // Dropped when the thread ends, also after a panic.
        let _done = done;
        work()
    })?;
    Ok(async move {
        // Waits without a thread. The join below returns at once, because the thread drops the sender as its last act.
        let _ = ended.await;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

/// Runs `work` to its end on a runtime of its own with `workers` threads. Tasks of other runtimes do not
/// delay it, except that they share the processor, which the kernel divides fairly among threads.
///
/// # Errors
/// When the threads cannot be started; the future returns the error of `work`, or that it panicked.
pub fn run_on_runtime<F>(
    name: &'static str,
    workers: usize,
    work: F,
) -> io::Result<impl Future<Output = io::Result<()>> + Send>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let runtime = Builder::new_multi_thread().worker_threads(workers).thread_name(name).enable_all().build()?;
    run_in_thread(name.into(), move || {
        // Spawned, because `block_on` polls its future on this thread, which has no work queue: the
        // accept loop would wake a worker for each connection.
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn_on(work, runtime.handle());
        let ended = runtime.block_on(tasks.join_next());
        ended.map_or(Ok(()), |ended| ended.unwrap_or_else(|err| Err(io::Error::other(err))))
    })
}
