"""Run examples/pretrain_rmt.py, unchanged, and write down what the model of a step is asked.

``main`` runs it; a program for ``tests.tiny_run.run`` is two lines that call it. The file that it
writes holds one JSON object, of the last step: ``documents``, the token ids of each document of the
trunk with what stands before it; ``stem`` and ``close``, and their ``texts``; ``stop``, the ids
that end a response; ``budget``; ``responses``, the ids of each; ``positions``, for each chosen one
its document and how many of the document's tokens its prompt has.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

PRETRAIN = Path(__file__).resolve().parents[1] / "examples/pretrain_rmt.py"


def main(target: Path) -> None:
    """Patch Megatron as the program itself will, and watch what the step collects."""
    import megatron_rmt
    from megatron_rmt.cpu import platform as cpu_platform

    cpu_platform.install_if_no_cuda()
    megatron_rmt.patch()
    from megatron_rmt.job import train_step

    collect = train_step.collect

    def watched(run: Any, batches: Any, schedule: Any, *others: Any) -> Any:
        collected = collect(run, batches, schedule, *others)
        target.write_text(json.dumps(_record(run, collected.reasoned, schedule.budget)))
        return collected

    train_step.collect = watched
    sys.argv[0] = str(PRETRAIN)
    runpy.run_path(str(PRETRAIN), run_name="__main__")


def _record(run: Any, reasoned: Any, budget: int) -> dict[str, Any]:
    documents, positions, responses = [], [], []
    for own in reasoned:
        bounds = own.sample.documents
        for position in own.positions:
            document = own.sample.document_of(position.row)
            index = len(documents) + bounds.index(document)
            positions.append([index, position.row + 1 - document[0]])
            responses += [rollout.tokens.tolist() for rollout in position.rollouts]
        documents += [own.sample.tokens[first:limit].tolist() for first, limit in bounds]
    prompt = run.prompt
    return {
        "documents": documents,
        "stem": list(prompt.stem(budget)),
        "close": list(prompt.close),
        "texts": {"stem": prompt.text(prompt.stem(budget)), "close": prompt.text(prompt.close)},
        "stop": list(prompt.stop),
        "positions": positions,
        "responses": responses,
        "budget": budget,
    }
