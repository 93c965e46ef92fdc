"""Encoding processes: tasks go out in order, and their results come back in order."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing.connection import wait

from jaxtrain.data.encoding.documents import Encoded, Options, encode_pieces
from jaxtrain.data.encoding.work_units import Task
from jaxtrain.data.tokenizer import build_tokenizer


def run_tasks(tasks, tokenizer, options: Options, workers: int):
    """Yields (task, Encoded) in the order of the tasks; at most 2 x workers wait in memory.

    Args:
        tasks: an iterator, read by this process and only as far as there is room.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, 2))
    if workers == 1 or len(first) < 2:
        for task in chain(first, tasks):
            yield task, encode_pieces(task.pieces, tokenizer, options)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads' locks
    with ProcessPoolExecutor(workers, context, _start, (tokenizer.name, options)) as pool:
        waiting = deque()
        try:
            for task in chain(first, tasks):
                with _sigint_blocked():  # a submission may start processes
                    waiting.append((task._replace(pieces=()), pool.submit(_work, task)))
                if len(waiting) > 2 * workers:
                    task, future = waiting.popleft()
                    yield task, future.result()
            while waiting:
                task, future = waiting.popleft()
                yield task, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _sigint_blocked():
    """Holds Ctrl-C back, also in the processes that the block starts: the parent acts on it."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _start(tokenizer_name, options):
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = build_tokenizer(tokenizer_name), options


def _end_with_parent():
    """A killed parent closes no queue: its processes would wait for tasks for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(task: Task) -> Encoded:
    tokenizer, options = _worker
    return encode_pieces(task.pieces, tokenizer, options)
