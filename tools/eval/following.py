"""What one backend says and chooses on given texts: logits of every step, and the scores behind each choice of entries and experts.

Shapes: S steps, V vocabulary, T tokens of a call, N entries or experts, K chosen ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import v4
from ops.gate_bound import score_bound
from ops.indexer import index_scores_reference
from ops.trace import Call, Recorder, finding

CHOICES = ("index_topk", "gate_topk")


@dataclass
class Choice:
    """One call's choice: the lists [T, K] and the scores they were taken from [T, N] float64, -inf where not visible."""

    op: str
    place: str
    step: int
    chosen_TK: Tensor
    score_TN: Tensor


@dataclass
class Followed:
    """A text as one backend sees it. logits_SV fp32; choices in the order they were made; wrong: calls that their contract refuses."""

    logits_SV: Tensor
    choices: list[Choice]
    wrong: list[str]
    judged: int


@dataclass
class Watch:
    """A sink that judges calls and keeps choices. everything: every op is judged, not only those that choose."""

    everything: bool
    choices: list[Choice] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    judged: int = 0
    names: list[str] = field(default_factory=list)

    def wants(self, place: str, op: str, step: int) -> bool:
        """Whether a call is judged."""
        return self.everything or op in CHOICES

    def line(self, call: Call) -> None:
        """A call that is not judged."""
        self.names.append(call.where)

    def kept(self, call: Call, parameters: Mapping[str, str]) -> None:
        """A call to judge, and to keep where it chooses."""
        self.judged += 1
        if found := finding(call, self.names.__getitem__):
            self.wrong.append(f"{call.where}: {'; '.join(found.problems)}")
        self.names.append(call.where)
        if call.op in CHOICES:
            self.choices.append(choice_of(call))


def choice_of(call: Call) -> Choice:
    """The choice of a recorded call, its scores computed in float64 from the call's own arguments."""
    call = call.cpu()
    given: dict[str, Any] = dict(call.arguments)
    if call.op == "index_topk":
        given.pop("topk")
        score_TN, _ = index_scores_reference(**given, compute=torch.float64)
        return Choice(call.op, call.place, call.step, call.outputs[0].clone(), score_TN)
    _, score_TE, _ = score_bound(given["x_TD"], given["weight_ED"])
    return Choice(call.op, call.place, call.step, call.outputs[1].clone(), score_TE + given["bias_E"].double())


@torch.inference_mode()
def follow(model: v4.LoadedModel, recorder: Recorder, prompt: Sequence[int], tokens: Sequence[int], *, everything: bool) -> Followed:
    """Feed the prompt in one call and then `tokens` one by one, as generation does; logits of the last prompt token and of all but
    the last of `tokens`: row i is what token i is chosen from."""
    watch = Watch(everything)
    recorder.start(watch)
    runner = model.runner
    cache = runner.session(max_tokens=len(prompt) + len(tokens), max_chunk=len(prompt)).cache
    sequence = cache.new_sequence()
    rows = [runner.logits(runner.forward(cache, [sequence], [list(prompt)])[-1:])]
    for token in tokens[:-1]:
        rows.append(runner.logits(runner.forward(cache, [sequence], [[token]])))
    return Followed(torch.cat(rows).float().cpu(), watch.choices, watch.wrong, watch.judged)
