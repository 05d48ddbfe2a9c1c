"""What a decode step may cost, counted and not timed: native calls, torch operators, messages and their bytes. A change
that makes a step do more has to say so here."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from kvarto import LLM, SamplingParams
from kvarto.cluster.engine.inline import InlineTransport, InlineWorkerGroup
from kvarto.kernels.native.library import load_library
from kvarto.protos.codec import encode
from kvarto.worker.rank import Rank

_spec = importlib.util.spec_from_file_location("random_models", Path(__file__).with_name("parity") / "random_models.py")
assert _spec is not None and _spec.loader is not None
random_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_models)

NUM_SEQS = 16
PROMPTS = [[(13 * place + 7 * number) % random_models.VOCAB for place in range(20 + number)]
           for number in range(NUM_SEQS)]
NUM_TOKENS = 40

pytestmark = pytest.mark.skipif(load_library() is None, reason="there are no native kernels here")


class Operators(TorchDispatchMode):
    """Counts torch's operators."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts["torch operators"] += 1
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[Counter[str]]:
    """What each step did in which all sequences gained a token and none a prompt's."""
    directory = tmp_path_factory.mktemp("model")
    random_models.make_model(directory, "full")
    library, found, now = load_library(), [], Counter[str]()
    assert library is not None
    patch = pytest.MonkeyPatch()

    def count(owner: Any, name: str, what: str) -> None:
        inner = getattr(owner, name)

        def counting(*args: Any) -> Any:
            now[what] += 1
            return inner(*args)

        patch.setattr(owner, name, counting)

    execute, send = Rank.execute, InlineWorkerGroup.send

    def counted_execute(rank: Rank, plan: Any) -> Any:
        with Operators(now):
            result = execute(rank, plan)
        now["result bytes"] += len(encode(result))
        return result

    def counted_send(group: InlineWorkerGroup, plan: Any) -> None:
        # A plan ends what was done for the one before it.
        if now["tokens"] == NUM_SEQS and now["steps"] == 1:
            found.append(now.copy())
        now.clear()
        now["plan bytes"] += len(encode(plan))
        now["steps"] += 1
        now["tokens"] += sum(step.num_tokens for step in plan.steps)
        send(group, plan)

    for name in ("write_kv", "quantize_blocks", "copy_blocks", "paged_attention", "linear", "norm", "rotate", "gate",
                 "best", "take", "replay"):
        count(library, name, "native calls")
    count(InlineTransport, "send", "messages")
    patch.setattr(Rank, "execute", counted_execute)
    patch.setattr(InlineWorkerGroup, "send", counted_send)
    try:
        with LLM(str(directory), dtype="float32", num_blocks=200, max_num_seqs=NUM_SEQS) as llm:
            llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
                         use_tqdm=False)
    finally:
        patch.undo()
    assert len(found) > NUM_TOKENS // 2
    return found


def most(steps: list[Counter[str]], what: str) -> int:
    return max(step[what] for step in steps)


def test_from_token_ids_to_the_best_tokens_is_one_native_call(steps: list[Counter[str]]) -> None:
    assert {step["native calls"] for step in steps} == {1}


def test_torchs_operators_do_not_grow_with_layers_or_sequences(steps: list[Counter[str]]) -> None:
    assert most(steps, "torch operators") <= 20


def test_a_frontend_hears_of_a_step_once(steps: list[Counter[str]]) -> None:
    assert {step["messages"] for step in steps} == {1}


def test_plans_and_results_hold_what_changed_and_nothing_else(steps: list[Counter[str]]) -> None:
    # A sequence is its number and its count of tokens, and now and then a block.
    quiet = min(step["plan bytes"] for step in steps)
    assert quiet <= 80 + 8 * NUM_SEQS
    assert most(steps, "plan bytes") <= 80 + 20 * NUM_SEQS
    assert most(steps, "result bytes") <= 110 + 17 * NUM_SEQS
