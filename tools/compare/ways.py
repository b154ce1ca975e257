"""How an endpoint is asked for the log-probabilities of a given text, and which of these ways it understands.

Requests carry temperature 1 and top_p 1, so that no server scales or cuts the distribution, and let it generate one token, because
not every server accepts none; that token is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tools.compare.answers import Entry, Unsuitable, as_text, completion, native, prompt_logprobs
from tools.compare.client import Client, EndpointError, Refused, Unreachable
from tools.compare.names import Names
from tools.compare.prompts import Prompt

NAMES = ("echo", "prompt-logprobs", "generate", "steps")
_ONE = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
# vLLM's requests to name tokens by id, which text can not always do
_IDS = {"return_tokens_as_token_ids": True}
_PLAIN = {"add_special_tokens": False}
_HINT = (
    "vLLM answers both ways as it is (up to --max-logprobs, 20); SGLang by /generate beside /v1; servers that only return "
    "log-probabilities of what they generate can be compared at some positions: --stride 16"
)


@dataclass(frozen=True)
class Way:
    """One form of request. `text`: the prompt goes as text, not as ids. `extras`: with fields that only vLLM knows."""

    name: str
    text: bool = False
    extras: bool = False

    def __str__(self) -> str:
        form = "text" if self.text else "token ids"
        return f"{self.name} with {form}{' and vLLM fields' if self.extras else ''}"


@dataclass(frozen=True)
class Answer:
    """Entries of a prompt's tokens [n]. `same` tokens from the start are ours; `departure` is the first that is not:
    (position, our text, the server's text), None when all agree. `whole`: every token was asked for, so that one without a
    log-probability is a fault of the server's."""

    entries: list[Entry]
    same: int
    departure: tuple[int, str, str] | None = None
    whole: bool = True


@dataclass(frozen=True)
class Asker:
    """Asks one endpoint. model: its name there. top: others per position. stride: distance of the positions of `steps`."""

    client: Client
    model: str
    names: Names
    top: int
    stride: int | None = None

    def ask(self, way: Way, prompt: Prompt, *, patient: bool = True) -> Answer:
        """The endpoint's log-probabilities of one prompt. Refused, Unsuitable: this way does not work; EndpointError: nothing does."""
        if way.name == "steps":
            return self._steps(way, prompt, patient)
        sent: object = self._text(prompt) if way.text else list(prompt.ids)
        extras = {**(_IDS if way.extras else {}), **(_PLAIN if way.extras and way.text else {})}
        if way.name == "generate":
            body: dict[str, Any] = {
                "text" if way.text else "input_ids": sent,
                "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": self.top,
            }
            entries = native(self.client.post(f"{self.client.root}/generate", body, patient=patient))
        else:
            kind = {"echo": True, "logprobs": self.top} if way.name == "echo" else {"prompt_logprobs": self.top}
            answer = self.client.post(self._url, {"model": self.model, "prompt": sent, **_ONE, **kind, **extras}, patient=patient)
            entries = completion(answer) if way.name == "echo" else prompt_logprobs(answer, prompt.ids)
        return self._aligned(as_text(entries, prompt.ids, self.names), prompt, way)

    @property
    def _url(self) -> str:
        return f"{self.client.url}/completions"

    def _text(self, prompt: Prompt) -> str:
        if prompt.text is None:
            raise Unsuitable(f"prompt {prompt.id} is given by ids that are no text")
        return prompt.text

    def _steps(self, way: Way, prompt: Prompt, patient: bool) -> Answer:
        entries = [Entry()] * len(prompt.ids)
        positions = range(self.stride or 1, len(prompt.ids), self.stride or 1)
        for position in positions or [len(prompt.ids) - 1]:
            extras = _IDS if way.extras else {}
            body = {"model": self.model, "prompt": list(prompt.ids[:position]), **_ONE, "logprobs": self.top, **extras}
            found = completion(self.client.post(self._url, body, patient=patient))
            if len(found) != 1 or not found[0].top:
                without = "without" if len(found) == 1 else "expected one with"
                raise Unsuitable(f"found {len(found)} tokens for max_tokens 1, {without} top_logprobs")
            top = {self.names.resolve(key): value for key, value in found[0].top.items()}
            entries[position] = Entry(prompt.ids[position], top.get(prompt.ids[position]), found[0].top)
        return Answer(entries, len(entries), whole=False)

    def _aligned(self, entries: Sequence[Entry], prompt: Prompt, way: Way) -> Answer:
        ids, count = prompt.ids, len(prompt.ids)
        if len(entries) < min(2, count) or (not way.text and not count <= len(entries) <= count + 1):
            raise Unsuitable(f"found {len(entries)} tokens, expected the {count} of the prompt and at most one generated")
        if all(entry.logprob is None for entry in entries[1:count]):
            raise Unsuitable("every log-probability of the prompt is null")
        if len(entries) not in (count, count + 1) and any(entry.token is None for entry in entries[1:count]):
            raise Unsuitable(f"found {len(entries)} tokens without names, expected the {count} of the prompt")
        for i, token in enumerate(ids):
            if i >= len(entries) or not self.names.same(entries[i].token, token):
                theirs = "(end)" if i >= len(entries) else self._shown(entries[i])
                return Answer([*entries[:i], *[Entry()] * (count - i)], i, (i, self.names.text(token), theirs))
        if len(entries) > count + 1:
            # the server's text goes on where ours ends
            return Answer(list(entries[:count]), count, (count, "(end)", self._shown(entries[count])))
        return Answer(list(entries[:count]), count)

    def _shown(self, entry: Entry) -> str:
        shown = self.names.text(entry.token) if isinstance(entry.token, int) else str(entry.token)
        # halves of a surrogate pair, which JSON can hold, can not be written to a file
        return shown.encode("utf-8", "replace").decode("utf-8")


def candidates(wanted: str, *, text: bool, stride: int | None) -> Iterator[Way]:
    """Ways in the order in which they are tried; `wanted` is one of NAMES or "auto". `text`: prompts can be sent as text."""
    for form in (False, True) if text else (False,):
        for name in NAMES[:3]:
            if wanted in ("auto", name):
                if name != "generate":
                    yield Way(name, form, extras=True)
                if name != "prompt-logprobs":
                    yield Way(name, form)
    if wanted == "steps" or (wanted == "auto" and stride is not None):
        yield Way("steps", extras=True)
        yield Way("steps")


def choose(asker: Asker, prompt: Prompt, wanted: str, *, text: bool) -> tuple[Way, Answer]:
    """The first way by which the server reads our tokens, else the one by which it reads most, and its answer.

    EndpointError lists what each way met.
    """
    met, best = [], None
    for way in candidates(wanted, text=text, stride=asker.stride):
        try:
            answer = asker.ask(way, prompt, patient=False)
        except (Refused, Unsuitable) as error:
            met.append(f"  {way}: {asker.client.hide(str(error))}")
        except EndpointError as error:
            # it has a path of its own, which a gateway may guard or answer with a page although the rest is open
            if way.name != "generate" or wanted == "generate":
                raise
            met.append(f"  {way}: {error}")
        else:
            if answer.departure is None:
                return way, answer
            if best is None or answer.same > best[1].same:
                best = way, answer
    if best is not None:
        return best
    raise EndpointError(
        f"{asker.client.url}: found no way to get log-probabilities of a given text. Tried with {len(prompt.ids)} tokens, "
        f"{asker.top} top log-probabilities:\n" + "\n".join(met) + f"\n{_HINT}"
    )


def served_model(client: Client, wanted: str | None = None) -> str:
    """The name of the model to ask for: `wanted`, or the one model that the endpoint lists.

    EndpointError when it lists models, but not the one wanted; without one, also when it lists none or several, or has no list.
    """
    url = f"{client.url}/models"
    try:
        body = client.get(url)
    except Unreachable:
        raise
    except (Refused, EndpointError) as error:
        if wanted is not None:
            # not every server has a list, or shows it to everyone
            return wanted
        if isinstance(error, EndpointError):
            raise
        raise EndpointError(f"{url}: {error}; give the model's name there with --name") from None
    rows = body.get("data") if isinstance(body, dict) else None
    rows = rows if isinstance(rows, list) else []
    found = [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]
    listed = client.hide(", ".join(found[:10])) or "none"
    if wanted is not None:
        if found and wanted not in found:
            # some servers answer for whatever name with the model that they have
            raise EndpointError(f"{url}: found {len(found)} models ({listed}), expected {wanted!r} among them; see --name")
        return wanted
    if len(found) != 1:
        raise EndpointError(f"{url}: found {len(found)} models ({listed}), expected one; give one with --name")
    return found[0]
