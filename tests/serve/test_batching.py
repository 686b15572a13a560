"""BatchingRuntime: answers do not depend on batch mates, the queue has an end, requests can be cancelled, closing drains."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mra_export.errors import BackendError, BusyError, ContractError
from mra_export.runtime import MraRuntime
from mra_export.serve import Batch, BatchingRuntime

WAIT = 120
"""Seconds that a test waits for what takes milliseconds: other processes may hold the processor."""


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 261, shape)


class Gate:
    """A runtime whose calls wait until it is opened, and that remembers the shapes of its calls."""

    def __init__(self, runtime: MraRuntime) -> None:
        self.runtime = runtime
        self.bundle, self.backend, self.device, self.check = runtime.bundle, runtime.backend, runtime.device, runtime.check
        self.check_tokens = runtime.check_tokens
        self.refuses: Callable[[tuple[int, ...]], str | None] = lambda shape: None
        self.opened, self.entered = threading.Event(), threading.Semaphore(0)
        self.shapes: list[tuple[int, ...]] = []
        self.failure: Exception | None = None

    def run(self, **arrays: Any) -> dict[str, Any]:
        self.shapes.append(arrays["input_ids"].shape)
        self.entered.release()
        assert self.opened.wait(WAIT)
        if self.failure is not None:
            raise self.failure
        return self.runtime.run(**arrays)


@pytest.fixture(scope="module")
def invariant(bundles) -> Iterator[MraRuntime]:
    with MraRuntime.load(bundles("answers"), "onnxruntime", intra_op_threads=1) as runtime:
        yield runtime


@pytest.fixture
def gate(invariant) -> Gate:
    return Gate(invariant)


def held(gate: Gate, **options: Any) -> tuple[BatchingRuntime, concurrent.futures.Future]:
    """A batching runtime whose only worker is inside the model with a first request."""
    batching = BatchingRuntime(gate, **options)  # type: ignore[arg-type]
    first = batching.submit(input_ids=tokens(1, 5))
    assert gate.entered.acquire(timeout=WAIT)
    return batching, first


# Answers


def ragged(count: int, longest: int = 256) -> list[dict[str, np.ndarray]]:
    """Requests of one to three rows, of any length, some with a mask of their own, lengths at and around the block's."""
    random = np.random.default_rng(1)
    lengths = [1, 2, 31, 32, 33, 64, 65, longest, *random.integers(1, longest, count)][:count]
    requests = []
    for number, length in enumerate(lengths):
        ids = tokens(1 + number % 3, int(length), seed=number)
        mask = np.ones_like(ids)
        if number % 4 == 0 and length > 3:
            mask[0, length // 2 :] = 0
        requests.append({"input_ids": ids, "attention_mask": mask})
    return requests


@pytest.mark.parametrize("kind", ["answers", "fp32", "fp16", "classes", "features", "int8"])
def test_an_answer_is_bitwise_the_same_whatever_it_was_batched_with(bundles, kind) -> None:
    """On the CPU provider. fp32 and the others are not padding invariant: then only equally many blocks share a call."""
    with MraRuntime.load(bundles(kind), "onnxruntime", intra_op_threads=2) as runtime:
        requests = ragged(60)
        alone = [runtime.run(**request) for request in requests]
        sizes: list[Batch] = []
        with BatchingRuntime(
            runtime, max_delay_ms=50, max_batch_size=16, max_batch_tokens=4096, workers=2, on_batch=sizes.append
        ) as batching:
            for order in (list(range(60)), list(np.random.default_rng(2).permutation(60))):
                futures = {number: batching.submit(**requests[number]) for number in order}
                for number, future in futures.items():
                    answer = future.result(WAIT)
                    assert set(answer) == set(alone[number])
                    for name, value in answer.items():
                        np.testing.assert_array_equal(value, alone[number][name], f"{kind} request {number} {name}")
    assert max(batch.requests for batch in sizes) > 1, "nothing was batched"
    if kind == "answers":
        assert any(batch.padded > batch.tokens for batch in sizes), "nothing was padded"


@pytest.mark.parametrize(
    ("kind", "chosen_tokens"),
    [
        *((kind, True) for kind in ("invariant", "fp32", "int8", "features")),
        ("invariant", False),
        ("fp16", False),
        ("tokens", False),
    ],
)
def test_chosen_tokens_get_bitwise_their_part_of_the_whole(bundles, kind, chosen_tokens) -> None:
    """Whether the graph computes no others, or all and they are picked, and whatever batch mates want."""
    random = np.random.default_rng(3)
    requests = ragged(40)
    with MraRuntime.load(bundles(kind), "onnxruntime") as whole:
        (name,) = whole.bundle.manifest.token_outputs
        wanted = [whole.run(**request)[name] for request in requests]
    with MraRuntime.load(bundles(kind), "onnxruntime", intra_op_threads=1, chosen_tokens=chosen_tokens) as runtime:
        runtime.validate()
        sizes: list[Batch] = []
        with BatchingRuntime(runtime, max_delay_ms=50, max_batch_tokens=4096, workers=2, on_batch=sizes.append) as batching:
            futures = []
            for number, request in enumerate(requests):
                tokens = None if number % 3 == 0 else random.integers(0, request["input_ids"].size, 1 + number % 5)
                futures.append((tokens, batching.submit(tokens=tokens, **request)))
            for number, (tokens, future) in enumerate(futures):
                expected = wanted[number]
                if tokens is not None:
                    expected = expected.reshape(-1, *expected.shape[2:])[tokens]
                np.testing.assert_array_equal(future.result(WAIT)[name], expected, f"{kind} request {number}")
    assert max(batch.requests for batch in sizes) > 1, "nothing was batched"


def test_with_torch_too_within_rounding(bundles) -> None:
    with MraRuntime.load(bundles("answers"), "torch") as runtime, BatchingRuntime(runtime, max_delay_ms=50) as batching:
        requests = ragged(16)
        futures = [batching.submit(**request) for request in requests]
        for request, future in zip(requests, futures, strict=True):
            real = request["attention_mask"] == 1
            for name, wanted in runtime.run(**request).items():
                np.testing.assert_allclose(future.result(WAIT)[name][real], wanted[real], atol=2e-5)


def test_choices_are_batched_by_their_number(bundles) -> None:
    with MraRuntime.load(bundles("choices"), "onnxruntime") as runtime:
        gate = Gate(runtime)
        with BatchingRuntime(gate) as batching:  # type: ignore[arg-type]
            requests = [tokens(1, choices, 20 + n, seed=n) for n, choices in enumerate((2, 2, 3, 2, 3))]
            futures = [batching.submit(input_ids=ids) for ids in requests]
            gate.opened.set()
            for ids, future in zip(requests, futures, strict=True):
                np.testing.assert_array_equal(future.result(WAIT)["logits"], runtime.run(input_ids=ids)["logits"])
        assert {shape[1] for shape in gate.shapes} == {2, 3}


def test_torch_in_torch_out(invariant) -> None:
    import torch

    ids = tokens(2, 40)
    with BatchingRuntime(invariant) as batching:
        answer = batching.run(input_ids=torch.from_numpy(ids), token_type_ids=None)
    assert isinstance(answer["start_logits"], torch.Tensor)
    np.testing.assert_array_equal(answer["start_logits"].numpy(), invariant.run(input_ids=ids)["start_logits"])


def test_many_threads(invariant) -> None:
    requests = ragged(40, 100)
    with BatchingRuntime(invariant, workers=2) as batching, concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda request: batching.run(**request), requests))
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_array_equal(answer["end_logits"], invariant.run(**request)["end_logits"])


# Which requests share a call


def test_what_waits_goes_into_one_call_per_bucket(gate) -> None:
    batching, first = held(gate, length_buckets=(16, 64))
    futures = [batching.submit(input_ids=tokens(1, n)) for n in (10, 20, 12, 64, 200, 16)]
    gate.opened.set()
    for future in (first, *futures):
        future.result(WAIT)
    batching.close()
    assert gate.shapes == [(1, 5), (3, 16), (2, 64), (1, 200)], "oldest first, padded to the longest of the call"
    assert batching.length_buckets == (16, 64, 256)


def test_a_call_has_at_most_so_many_rows_and_tokens(gate) -> None:
    batching, _ = held(gate, max_batch_size=4, max_batch_tokens=200, length_buckets=())
    futures = [batching.submit(input_ids=tokens(*shape)) for shape in ((3, 20), (2, 20), (1, 20), (1, 60), (1, 256), (1, 5))]
    gate.opened.set()
    concurrent.futures.wait(futures, WAIT)
    batching.close()
    assert gate.shapes[1:] == [(3, 20), (3, 20), (1, 60), (1, 256), (1, 5)]


def test_a_shape_that_the_engine_refuses_is_not_made(gate) -> None:
    gate.refuses = lambda shape: "too many rows" if shape[0] > 2 else None
    batching, _ = held(gate)
    futures = [batching.submit(input_ids=tokens(1, 5)) for _ in range(3)]
    gate.opened.set()
    concurrent.futures.wait(futures, WAIT)
    batching.close()
    assert gate.shapes[1:] == [(2, 5), (1, 5)]


def test_a_free_worker_waits_so_long_for_batch_mates(gate) -> None:
    gate.opened.set()
    with BatchingRuntime(gate, max_delay_ms=600_000, max_batch_size=2, max_batch_tokens=40) as batching:  # type: ignore[arg-type]
        lone = batching.submit(input_ids=tokens(1, 5))
        full = [batching.submit(input_ids=tokens(1, 10, seed=n)) for n in range(2)]
        concurrent.futures.wait(full, WAIT)
        assert gate.shapes == [(2, 10)], "a full batch does not wait, though it is younger"
        assert not lone.done()
    assert lone.result(0), "draining does not wait either"
    with BatchingRuntime(gate, max_delay_ms=1) as batching:  # type: ignore[arg-type]
        assert batching.submit(input_ids=tokens(1, 5)).result(WAIT)


def test_each_call_is_told(gate) -> None:
    told: list[Batch] = []
    batching, _ = held(gate, on_batch=told.append)
    futures = [batching.submit(input_ids=tokens(1, n)) for n in (10, 12)]
    gate.opened.set()
    concurrent.futures.wait(futures, WAIT)
    batching.close()
    batch = told[1]
    assert (batch.requests, batch.rows, batch.tokens, batch.padded, batch.failed) == (2, 2, 22, 24, False)
    assert len(batch.waited) == 2
    assert batch.waited[0] >= batch.waited[1] >= 0
    assert batch.seconds > 0


# Queue, cancellation, failure, end


def test_a_full_queue_is_busy_and_says_so(gate) -> None:
    batching, first = held(gate, max_queue=2)
    waiting = [batching.submit(input_ids=tokens(1, 5)) for _ in range(2)]
    with pytest.raises(BusyError, match="2 requests are waiting, max_queue is 2: try again later"):
        batching.submit(input_ids=tokens(1, 5))
    assert batching.queue_length == 2
    assert waiting[0].cancel()
    assert batching.queue_length == 1, "a cancelled request gives its place up"
    last = batching.submit(input_ids=tokens(1, 7))
    gate.opened.set()
    for future in (first, waiting[1], last):
        future.result(WAIT)
    batching.close()
    assert gate.shapes == [(1, 5), (2, 7)], "the cancelled request was not computed"
    assert not first.cancel()


def test_an_asyncio_caller_waits_and_cancels(gate) -> None:
    batching, first = held(gate, max_queue=1)

    async def call() -> np.ndarray:
        task = asyncio.ensure_future(asyncio.wrap_future(batching.submit(input_ids=tokens(1, 9))))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(task, 0.01)
        assert batching.queue_length == 0
        again = asyncio.wrap_future(batching.submit(input_ids=tokens(1, 9)))
        gate.opened.set()
        return (await again)["start_logits"]

    assert asyncio.run(call()).shape == (1, 9)
    assert first.result(WAIT)
    batching.close()


def test_bad_requests_are_refused_at_once_and_hurt_nobody(gate) -> None:
    batching, first = held(gate, max_batch_size=2)
    for arrays, message in (
        ({"input_ids": tokens(1, 257)}, "max_position_embeddings is 256"),
        ({"input_ids": tokens(1, 5) + 300}, "vocab_size is 261"),
        ({"input_ids": tokens(1, 5).astype(float)}, "dtype float64: pass integers"),
        ({}, "input_ids is missing"),
        ({"input_ids": tokens(3, 5)}, "input_ids has 3 rows, max_batch_size is 2: send 2 rows or fewer at once"),
        (
            {"input_ids": tokens(1, 5), "tokens": [5]},
            r"tokens holds 5, input_ids of shape \(1, 5\) has 5: pass numbers from 0 to 4",
        ),
    ):
        with pytest.raises(ContractError, match=message):
            batching.submit(**arrays)
    assert batching.queue_length == 0
    gate.opened.set()
    assert first.result(WAIT)
    batching.close()


def test_a_failed_call_fails_its_own_requests_only(gate) -> None:
    told: list[Batch] = []
    batching, first = held(gate, on_batch=told.append)
    second = batching.submit(input_ids=tokens(1, 5))
    gate.failure = BackendError("out of memory")
    gate.opened.set()
    for future in (first, second):
        with pytest.raises(BackendError, match="out of memory"):
            future.result(WAIT)
    gate.failure = None
    assert batching.run(input_ids=tokens(1, 5))
    batching.close()
    assert [batch.failed for batch in told] == [True, True, False]


def test_closing_drains_and_takes_no_more(gate) -> None:
    batching, first = held(gate)
    waiting = [batching.submit(input_ids=tokens(1, n)) for n in (5, 50, 150)]
    closer = threading.Thread(target=batching.close)
    closer.start()
    while not batching.closed:
        time.sleep(0.001)
    with pytest.raises(BackendError, match="closing and takes no more requests"):
        batching.submit(input_ids=tokens(1, 5))
    assert closer.is_alive()
    gate.opened.set()
    closer.join(WAIT)
    assert not closer.is_alive()
    assert all(future.done() and not future.cancelled() for future in (first, *waiting))
    assert not [t for t in threading.enumerate() if t in batching._workers]
    batching.close()


def test_closing_without_draining_cancels_what_waits(gate) -> None:
    batching, first = held(gate)
    waiting = batching.submit(input_ids=tokens(1, 5))
    threading.Timer(0.05, gate.opened.set).start()
    batching.close(drain=False)
    assert waiting.cancelled()
    assert first.result(0), "what runs is finished"


def test_draining_may_be_given_a_time(gate) -> None:
    batching, first = held(gate)
    waiting = batching.submit(input_ids=tokens(1, 5))
    batching.close(timeout=0.05)
    assert waiting.cancelled()
    assert not first.done()
    gate.opened.set()
    assert first.result(WAIT)


# Settings


@pytest.mark.parametrize("name", ["max_batch_size", "max_queue", "workers", "max_batch_tokens"])
def test_settings_have_their_range(invariant, name) -> None:
    with pytest.raises(ContractError, match=f"{name} is 0: it must be 1 or more"):
        BatchingRuntime(invariant, **{name: 0})


def test_buckets_are_checked(bundles, invariant) -> None:
    with pytest.raises(ContractError, match="ascending order"):
        BatchingRuntime(invariant, length_buckets=(64, 32))
    with MraRuntime.load(bundles("fp32"), "onnxruntime") as runtime:
        with pytest.raises(ContractError, match=r"lengths 33 to 128 together, but this bundle is not padding invariant"):
            BatchingRuntime(runtime, length_buckets=(32, 128))
        with pytest.raises(ContractError, match=r"lengths 33 to 256 together"):
            BatchingRuntime(runtime, length_buckets=(32,))
        with BatchingRuntime(runtime, length_buckets=range(16, 257, 16)) as batching:
            assert batching.length_buckets[:3] == (16, 32, 48)
        with BatchingRuntime(runtime) as batching:
            assert batching.length_buckets == tuple(range(32, 257, 32))


def test_the_usual_buckets_pad_little(invariant) -> None:
    with BatchingRuntime(invariant) as batching:
        ends = batching.length_buckets
    assert ends == (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def test_scales_from_each_call_forbid_batches(bundles) -> None:
    with MraRuntime.load(bundles("int8-dynamic"), "onnxruntime") as runtime:
        with pytest.raises(ContractError, match=r"takes its scales from each call.*pass max_batch_size 1"):
            BatchingRuntime(runtime)
        ids = tokens(1, 20)
        with BatchingRuntime(runtime, max_batch_size=1) as batching:
            np.testing.assert_array_equal(batching.run(input_ids=ids)["logits"], runtime.run(input_ids=ids)["logits"])


def test_no_worker_is_left_behind(invariant) -> None:
    before = threading.active_count()
    for _ in range(3):
        with BatchingRuntime(invariant, workers=3) as batching:
            batching.run(input_ids=tokens(1, 5))
    assert threading.active_count() == before
