"""Expert gates: which experts a token goes to, and with which weights.

Ids are a choice: two correct implementations may differ where scores are closer than rounding errors. They are judged by a
certificate (no better expert was passed over beyond the error bound; exact ties go to the lowest index) and the weights are
judged for the ids the candidate chose.

Shapes: x [T, D], weight [E, D], bias [E], ids and weights [T, K], tid2eid [V, K].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes
from ops.gate_bound import choice_complaint, exact_ties, score_bound, weights_bound

Outputs: TypeAlias = tuple[Tensor, ...]

_SHAPES = {
    "zero": (0, 8, 16, 2),
    "one": (1, 8, 16, 2),
    "odd": (3, 7, 19, 3),
    "all": (2, 4, 8, 4),
    "many": (33, 32, 48, 6),
    "flash": (2, 256, 4096, 6),
    "pro": (1, 384, 7168, 6),
}


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_gate(op: str, x_TD: Tensor, weight_ED: Tensor) -> None:
    if not x_TD.is_floating_point() or not weight_ED.is_floating_point():
        raise ValueError(f"{op}: x is {x_TD.dtype} and weight {weight_ED.dtype}, expected floating types")
    if x_TD.dim() != 2:
        raise ValueError(f"{op}: x has shape {tuple(x_TD.shape)}, expected [T, D]; flatten batch and time first")
    if weight_ED.dim() != 2 or weight_ED.shape[1] != x_TD.shape[1]:
        raise ValueError(f"{op}: weight has shape {tuple(weight_ED.shape)}, expected [E, {x_TD.shape[1]}], the width of x")


def _outputs(tokens: int, topk: int) -> tuple[Tensor, Tensor]:
    shape = (tokens, topk)
    return torch.empty(shape, dtype=torch.float32, device="meta"), torch.empty(shape, dtype=torch.int32, device="meta")


# ---- references -----------------------------------------------------------------------------------------------------


def _scores(x_TD: Tensor, weight_ED: Tensor, compute: torch.dtype) -> Tensor:
    return torch.nn.functional.softplus(x_TD.to(compute) @ weight_ED.to(compute).T).sqrt()


def _normalised(scores_TE: Tensor, ids_TK: Tensor, scale: float) -> Tensor:
    chosen_TK = scores_TE.gather(1, ids_TK.long())
    return chosen_TK / chosen_TK.sum(-1, keepdim=True) * scale


def _gate_topk(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, *, topk: int, scale: float, compute: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Learned routing: s = sqrt(softplus(x W^T)); ids = topk experts by s + bias; weights = s[ids] / sum s[ids] * scale.

    x_TD [T, D] and weight_ED [E, D] any float types, upcast to fp32 before the product; bias_E fp32 [E], used for the
    selection only. Softplus is linear above 20. Returns weights fp32 [T, topk] and ids int32 [T, topk] in descending order of
    s + bias, equal values by ascending index. No epsilon in the quotient.
    Source: DeepSeek-V4 specification section 9. ValueError for shapes that do not fit and topk outside 1..E.
    """
    scores_TE = _scores(x_TD, weight_ED, compute)
    order_TE = torch.sort(scores_TE + bias_E.to(compute), dim=-1, descending=True, stable=True).indices
    ids_TK = order_TE[:, :topk].to(torch.int32)
    return _normalised(scores_TE, ids_TK, scale), ids_TK


def _gate_hash(
    x_TD: Tensor,
    weight_ED: Tensor,
    tid2eid_VK: Tensor,
    token_ids_T: Tensor,
    *,
    scale: float,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Fixed routing by token id: ids = tid2eid[token]; weights = s[ids] / sum s[ids] * scale with s as in gate_topk.

    x_TD [T, D], weight_ED [E, D] any float types; tid2eid_VK int32 or int64 [V, K] with entries in 0..E-1; token_ids_T int64 or
    int32 [T] with entries in 0..V-1. Returns weights fp32 [T, K] and ids int32 [T, K] in the table's order.
    Source: DeepSeek-V4 specification section 9. ValueError for shapes that do not fit and non-integer tables or tokens.
    """
    ids_TK = tid2eid_VK[token_ids_T.long()].to(torch.int32)
    return _normalised(_scores(x_TD, weight_ED, compute), ids_TK, scale), ids_TK


# ---- meta -----------------------------------------------------------------------------------------------------------


def _gate_topk_meta(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, *, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    _check_gate("gate_topk", x_TD, weight_ED)
    experts = weight_ED.shape[0]
    if bias_E.shape != (experts,) or bias_E.dtype != torch.float32:
        raise ValueError(
            f"gate_topk: bias is {bias_E.dtype} {tuple(bias_E.shape)}, expected torch.float32 ({experts},), one per expert"
        )
    if not 1 <= topk <= experts:
        raise ValueError(f"gate_topk: topk is {topk}, expected 1..{experts} (the number of experts)")
    return _outputs(x_TD.shape[0], topk)


def _gate_hash_meta(
    x_TD: Tensor, weight_ED: Tensor, tid2eid_VK: Tensor, token_ids_T: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    _check_gate("gate_hash", x_TD, weight_ED)
    if tid2eid_VK.dim() != 2 or tid2eid_VK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"gate_hash: tid2eid is {tid2eid_VK.dtype} {tuple(tid2eid_VK.shape)}, expected int32 or int64 [V, K]; "
            "load the table as integers, never through a float type"
        )
    if token_ids_T.shape != x_TD.shape[:1] or token_ids_T.dtype not in (torch.int32, torch.int64):
        found = f"{token_ids_T.dtype} {tuple(token_ids_T.shape)}"
        raise ValueError(f"gate_hash: token_ids is {found}, expected int64 ({x_TD.shape[0]},), one per row of x")
    return _outputs(x_TD.shape[0], tid2eid_VK.shape[1])


# ---- bounds ---------------------------------------------------------------------------------------------------------


def _gate_topk_bound(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor,
    *,
    topk: int,
    scale: float,
    golden: Outputs,
    found: Outputs,
) -> tuple[Callable[[Tensor], str | None], Callable[[Tensor], str | None]]:
    logits, score, error = score_bound(x_TD, weight_ED)
    bias = bias_E.double()
    value, value_error = score + bias, error + bounds.SPREAD * bounds.roundoff(torch.float32) * (score + bias.abs())
    groups = exact_ties(x_TD, weight_ED, bias_E, logits)

    def judge_ids(ids_TK: Tensor) -> str | None:
        return choice_complaint(ids_TK, value, value_error, groups)

    def judge_weights(weights_TK: Tensor) -> str | None:
        if complaint := judge_ids(found[1]):
            return f"weights not judged: {complaint}"
        expected, allowed = weights_bound(score, error, found[1], scale)
        excess = (weights_TK.double() - expected).abs() - allowed
        if not weights_TK.numel() or bool((excess <= 0).all()):
            return None
        t, k = divmod(int(torch.nan_to_num(excess, nan=torch.inf).argmax()), weights_TK.shape[1])
        pair = f"found {float(weights_TK[t, k]):.9g}, expected {float(expected[t, k]):.9g}"
        return f"weight ({t}, {k}) of expert {int(found[1][t, k])}: {pair}"

    return judge_weights, judge_ids


def _gate_hash_bound(
    x_TD: Tensor,
    weight_ED: Tensor,
    tid2eid_VK: Tensor,
    token_ids_T: Tensor,
    *,
    scale: float,
    golden: Outputs,
    found: Outputs,
) -> tuple[Tensor, None]:
    _, score, error = score_bound(x_TD, weight_ED)
    return weights_bound(score, error, golden[1], scale)[1], None


# ---- samples and wrong inputs ---------------------------------------------------------------------------------------


def _random(
    g: torch.Generator, shape: tuple[int, int, int, int], dtype: torch.dtype, spread: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts, width, _ = shape
    x = torch.randn(tokens, width, generator=g).to(dtype)
    w = (torch.randn(experts, width, generator=g) * spread * width**-0.5).to(dtype)
    return x, w, 0.3 * torch.randn(experts, generator=g)


def _gate_topk_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, shape in _SHAPES.items():
        x, w, bias = _random(g, shape, dtype, 2.0)
        yield Sample(name, (x, w, bias), {"topk": shape[3], "scale": 1.5}, (name,))
    x, w, bias = _random(g, _SHAPES["many"], dtype, 15.0)
    yield Sample("linear-range", (x, w, bias), {"topk": 6, "scale": 2.5}, ("large",))
    x, w, bias = _random(g, _SHAPES["many"], dtype, 1e-6)
    yield Sample("near-ties", (x, w, bias * 0), {"topk": 6, "scale": 1.5}, ("near",))
    x, w, bias = _random(g, _SHAPES["many"], dtype, 1.0)
    yield Sample("fp32-weight", (x, w.float(), bias), {"topk": 6, "scale": 1.5}, ("mixed",))
    x = torch.randint(-2, 3, (9, 24), generator=g).to(dtype)
    w = torch.randint(-1, 2, (5, 24), generator=g)[torch.randint(0, 5, (24,), generator=g)].to(dtype)
    yield Sample("ties", (x, w, torch.zeros(24)), {"topk": 6, "scale": 1.5}, ("ties",))
    yield Sample("ties-bias", (x, w, torch.arange(24) % 2 * 0.5), {"topk": 7, "scale": 1.5}, ("ties",))
    yield Sample("ties-all", (x * 0, w, torch.zeros(24)), {"topk": 5, "scale": 1.5}, ("ties",))


def _gate_hash_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for index, (name, shape) in enumerate({**_SHAPES, "large-table": (64, 384, 16, 6)}.items()):
        x, w, _ = _random(g, shape, dtype, 2.0)
        vocab = 11
        table = torch.stack([torch.randperm(shape[1], generator=g)[: shape[3]] for _ in range(vocab)])
        tokens = torch.randint(0, vocab, (shape[0],), generator=g)
        yield Sample(name, (x, w, table.int() if index % 2 else table, tokens), {"scale": 1.5}, (name,))


def _gate_topk_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, w, bias = torch.zeros(2, 8, dtype=dtype), torch.zeros(4, 8, dtype=dtype), torch.zeros(4)
    kwargs: dict[str, Any] = {"topk": 2, "scale": 1.0}
    yield WrongInput("weight-width", (x, w[:, :5], bias), kwargs, r"weight has shape \(4, 5\), expected \[E, 8\]")
    yield WrongInput("batched", (x[None], w, bias), kwargs, r"x has shape \(1, 2, 8\), expected \[T, D\]")
    yield WrongInput("bias-length", (x, w, bias[:3]), kwargs, r"bias is torch.float32 \(3,\), expected torch.float32 \(4,\)")
    yield WrongInput("bias-type", (x, w, bias.double()), kwargs, r"bias is torch.float64")
    yield WrongInput("topk-large", (x, w, bias), {"topk": 5, "scale": 1.0}, r"topk is 5, expected 1\.\.4")
    yield WrongInput("topk-zero", (x, w, bias), {"topk": 0, "scale": 1.0}, r"topk is 0, expected 1\.\.4")
    yield WrongInput("integer", (x.int(), w, bias), kwargs, r"x is torch.int32")


def _gate_hash_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, w = torch.zeros(2, 8, dtype=dtype), torch.zeros(4, 8, dtype=dtype)
    table, tokens = torch.zeros(5, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    yield WrongInput("float-table", (x, w, table.float(), tokens), {"scale": 1.0}, r"tid2eid is torch.float32")
    yield WrongInput(
        "token-count", (x, w, table, tokens[:1]), {"scale": 1.0}, r"token_ids is torch.int64 \(1,\), expected int64 \(2,\)"
    )
    yield WrongInput("float-tokens", (x, w, table, tokens.float()), {"scale": 1.0}, r"token_ids is torch.float32")
    yield WrongInput("weight-width", (x, w[:, :5], table, tokens), {"scale": 1.0}, r"weight has shape \(4, 5\)")


# ---- cost and contracts ---------------------------------------------------------------------------------------------


def _gate_cost(x_TD: Tensor, weight_ED: Tensor, read: int, topk: int) -> Cost:
    tokens, experts = x_TD.shape[0], weight_ED.shape[0]
    return Cost(
        2 * tokens * experts * x_TD.shape[1],
        tokens * (4 * experts + 3 * topk),
        tensors_bytes(x_TD, weight_ED) + read,
        tokens * topk * 8,
        "bf16",
    )


def _gate_hash_cost(x_TD: Tensor, weight_ED: Tensor, tid2eid_VK: Tensor, token_ids_T: Tensor, *, scale: float) -> Cost:
    topk = tid2eid_VK.shape[1]
    read = tensors_bytes(token_ids_T) + x_TD.shape[0] * topk * tid2eid_VK.element_size()
    return _gate_cost(x_TD, weight_ED, read, topk)


gate_topk = Contract(
    name="gate_topk",
    reference=_gate_topk,
    meta=_gate_topk_meta,
    samples=_gate_topk_samples,
    errors=_gate_topk_errors,
    bound=_gate_topk_bound,
    cost=lambda x_TD, weight_ED, bias_E, *, topk, scale: _gate_cost(x_TD, weight_ED, tensors_bytes(bias_E), topk),
    choices=(1,),
)
gate_hash = Contract(
    name="gate_hash",
    reference=_gate_hash,
    meta=_gate_hash_meta,
    samples=_gate_hash_samples,
    errors=_gate_hash_errors,
    bound=_gate_hash_bound,
    cost=_gate_hash_cost,
)
