"""Faults and legal variants of index_topk.

Shapes: T tokens, H index heads, d index width, N visible entries of a token, k = topk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops import paged
from ops.cache import unpack_index_rows
from ops.mutants.core import arguments, legal, mutant

_OP = "index_topk"
Score = Callable[[Tensor, Tensor, Tensor], Tensor]
Pick = Callable[[Tensor, int], Tensor]


def _score(q_Hd: Tensor, w_H: Tensor, keys_Nd: Tensor) -> Tensor:
    return w_H @ (q_Hd @ keys_Nd.T).clamp_min(0)


def _best(score_N: Tensor, k: int) -> Tensor:
    return score_N.sort(descending=True, stable=True).indices[:k].sort().values


def _built(
    *,
    score: Score = _score,
    pick: Pick = _best,
    seen: Callable[[int, int, int], int] = lambda p, last, m: (p + 1) // m,
    pad: int = -1,
) -> Callable[..., Tensor]:
    """The op in fp32 with one of its parts replaced. seen(position, last position of the call, ratio): entries looked at."""

    def body(call: Any, *args: Any, **kwargs: Any) -> Tensor:
        a = arguments(_OP, args, kwargs)
        cache, d = a["key_cache"], a["q_THd"].shape[2]
        index = torch.full((a["q_THd"].shape[0], a["topk"]), pad, dtype=torch.int32)
        ends = (a["start_pos"] + a["cu_seqlens"].diff()).tolist()
        for b, t, p in paged.tokens(a["cu_seqlens"], a["start_pos"]):
            entries = torch.arange(max(seen(p, ends[b] - 1, a["ratio"]), 0))
            keys = unpack_index_rows(
                cache, paged.row_slots(a["block_table"][b], entries, cache.shape[1]), dtype=torch.float32, channels=d
            )
            best = pick(score(a["q_THd"][t].float(), a["w_TH"][t], keys), a["topk"])
            index[t, : len(best)] = best.to(torch.int32)
        return index

    return body


def _changed(**changes: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    def body(call: Any, *args: Any, **kwargs: Any) -> Any:
        a = arguments(_OP, args, kwargs)
        return call(**{**a, **{name: change(a) for name, change in changes.items()}})

    return body


# ---- scores ---------------------------------------------------------------------------------------------------------

mutant(_OP, "relu_lost", "negative products of single heads are kept")(_built(score=lambda q, w, k: w @ (q @ k.T)))
mutant(_OP, "relu_after_sum", "the ReLU is applied to the sum over heads")(
    _built(score=lambda q, w, k: (w @ (q @ k.T)).clamp_min(0))
)
mutant(_OP, "absolute", "the absolute value is taken instead of the ReLU")(_built(score=lambda q, w, k: w @ (q @ k.T).abs()))
mutant(_OP, "weights_lost", "all heads count the same")(_built(score=lambda q, w, k: (q @ k.T).clamp_min(0).sum(0)))
mutant(_OP, "weights_of_next_head", "each head takes the weight of the next one")(
    _changed(w_TH=lambda a: a["w_TH"].roll(-1, 1).contiguous())
)
mutant(_OP, "weights_positive", "negative head weights are cut to zero")(_changed(w_TH=lambda a: a["w_TH"].clamp_min(0)))
mutant(_OP, "last_head_lost", "the last head is not summed")(_built(score=lambda q, w, k: _score(q[:-1], w[:-1], k)))
mutant(_OP, "channels_lost", "the last eighth of the channels is not multiplied")(
    _built(score=lambda q, w, k: _score(q[:, : q.shape[1] * 7 // 8], w, k[:, : q.shape[1] * 7 // 8]))
)
mutant(_OP, "scores_bf16", "scores are stored in bf16 before the choice")(
    _built(score=lambda q, w, k: _score(q, w, k).bfloat16().float())
)

# ---- visibility -----------------------------------------------------------------------------------------------------

mutant(_OP, "entry_late", "the entry that the query itself completes is hidden")(_built(seen=lambda p, last, m: p // m))
mutant(_OP, "future", "queries choose among the entries that the last token of the call sees")(
    _built(seen=lambda p, last, m: (last + 1) // m)
)
mutant(_OP, "oldest_only", "only the entries before this call are looked at")(
    _built(seen=lambda p, last, m: max((p + 1) // m - 2, 0))
)


@mutant(_OP, "first_table", "every sequence reads the pages of sequence 0")
def _first_table(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    a = arguments(_OP, args, kwargs)
    a["block_table"] = a["block_table"][:1].expand_as(a["block_table"]).contiguous()
    return _built()(call, **a)


# ---- choice ---------------------------------------------------------------------------------------------------------

mutant(_OP, "ties_last", "equal scores go to the highest index")(
    _built(pick=lambda s, k: (len(s) - 1 - s.flip(0).sort(descending=True, stable=True).indices[:k]).sort().values)
)
mutant(_OP, "smallest", "the entries with the smallest scores are chosen")(_built(pick=lambda s, k: _best(-s, k)))
mutant(_OP, "one_short", "the last place of the list stays empty")(
    _built(pick=lambda s, k: _best(s, k)[: max(k - 1, 0)] if len(s) >= k else _best(s, k))
)
mutant(_OP, "duplicate", "the best entry fills the last place as well")(
    _built(pick=lambda s, k: torch.cat((b[:-1], b[:1])) if len(b := _best(s, k)) > 1 else b)
)
mutant(_OP, "sentinel_zero", "empty places hold 0 instead of -1")(_built(pad=0))
mutant(_OP, "neighbour", "one chosen entry is replaced by the next one behind it in score")(
    _built(
        pick=lambda s, k: (
            torch.cat(((o := s.sort(descending=True, stable=True).indices)[: k - 1], o[k : k + 1])) if len(s) > k else _best(s, k)
        )
    )
)


@mutant(_OP, "random", "random ones of the visible entries are chosen, whatever their scores")
def _random(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    a = arguments(_OP, args, kwargs)
    visible = torch.tensor([(p + 1) // a["ratio"] for _, _, p in paged.tokens(a["cu_seqlens"], a["start_pos"])])
    most = max(a["topk"], *visible.tolist(), 0)
    draw = torch.rand(len(visible), most, generator=torch.Generator().manual_seed(int(visible.sum())))
    best = draw.masked_fill(torch.arange(most) >= visible[:, None], -1).topk(a["topk"], 1)
    return best.indices.masked_fill(best.values < 0, -1).to(a["q_THd"].device, torch.int32)


# ---- legal ----------------------------------------------------------------------------------------------------------

legal(_OP, "list_reversed", "the list in descending order of the index")(_built(pick=lambda s, k: _best(s, k).flip(0)))
legal(_OP, "by_score", "the list in descending order of the score")(
    _built(pick=lambda s, k: s.sort(descending=True, stable=True).indices[:k])
)
legal(_OP, "heads_reversed", "heads summed in the other order")(_built(score=lambda q, w, k: _score(q.flip(0), w.flip(0), k)))
legal(_OP, "channels_reversed", "products summed in the other order")(
    _built(score=lambda q, w, k: _score(q.flip(1), w, k.flip(1)))
)
legal(_OP, "weights_first", "queries multiplied by the head's weight where it is positive, before the product")(
    _built(score=lambda q, w, k: (((q * w.abs()[:, None]) @ k.T).clamp_min(0) * w.sign()[:, None]).sum(0))
)
