"""Encodes tasks in several processes and returns the results in the order of the tasks."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing.connection import wait

from jaxtrain.data.encoding.documents import Encoded, encode_pieces
from jaxtrain.data.encoding.held_out import ForcedSplit
from jaxtrain.data.encoding.options import EncodeOptions
from jaxtrain.data.encoding.work_units import Task
from jaxtrain.data.tokenizer import Tokenizer, build_tokenizer


def encode_tasks(
    tasks: Iterable[Task], tokenizer: Tokenizer, options: EncodeOptions, forced: ForcedSplit | None
) -> Iterator[tuple[Task, Encoded]]:
    """Yields each task and its documents' tokens, in order.

    At most 2 x workers + 1 tasks are in memory; more are read as results are taken. With one
    worker, or fewer than two tasks, this process encodes them itself.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, 2))
    workers = options.workers
    if workers == 1 or len(first) < 2:
        for task in chain(first, tasks):
            yield task, encode_pieces(task.pieces, tokenizer, options, forced)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy locks that JAX's threads hold
    with ProcessPoolExecutor(workers, context, _init_worker, (options, forced)) as pool:
        waiting = deque()
        try:
            for task in chain(first, tasks):
                with _sigint_blocked():  # a submission may start processes
                    waiting.append((task._replace(pieces=()), pool.submit(_encode_task, task)))
                if len(waiting) > 2 * workers:
                    task, future = waiting.popleft()
                    yield task, future.result()
            while waiting:
                task, future = waiting.popleft()
                yield task, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Blocks SIGINT, which processes started here inherit: only the parent reacts to Ctrl-C."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _init_worker(options: EncodeOptions, forced: ForcedSplit | None) -> None:
    global _worker
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker = build_tokenizer(options.tokenizer), options, forced


def _exit_with_parent() -> None:
    """Ends this process if its parent is killed; otherwise it would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_task(task: Task) -> Encoded:
    return encode_pieces(task.pieces, *_worker)
