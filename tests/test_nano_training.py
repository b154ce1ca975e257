"""The training model is the inference graph, its fake quantisers are the packed formats, and a resumed run is the same run."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

import v4
from ops.quant import roundtrip_fp8
from ops.quant_fp4 import roundtrip_fp4
from tools.nano import fake
from tools.nano.batches import Batches, Encoder, Plan
from tools.nano.documents import ANSWER_WEIGHT, own_texts, recall, story, tool_call, tool_request
from tools.nano.export import export
from tools.nano.fused import Fused
from tools.nano.layers import Mode
from tools.nano.model import Nano
from tools.nano.needle import prompt
from tools.nano.optimiser import orthogonal
from tools.nano.schedule import STAGES, plans, rate, stage_of
from tools.nano.sinkhorn import check, plain
from tools.nano.state import lengthen, shorten
from tools.nano.tokenizer import SPECIAL, train, write
from tools.nano.train import Settings, Trainer
from tools.runconfig import named_config
from v4.config import Config
from v4.encoding import encode
from v4.packing import quantise_fp4, quantise_fp8, unpack_fp4, unpack_fp8
from v4.parsing import parse
from v4.tokenizer import ASSISTANT, END_THINK, EOS, Tokenizer

SMALL = {
    "hidden_size": 128, "num_attention_heads": 4, "n_routed_experts": 4, "o_lora_rank": 64, "vocab_size": 1024,
    "num_hidden_layers": 4, "compress_ratios": (0, 4, 128, 4, 0), "num_hash_layers": 1, "hc_sinkhorn_iters": 6,
}  # fmt: skip


def small(**changes: object) -> Config:
    return replace(named_config("nano_trained"), **{**SMALL, **changes})


def shaken(config: Config, mode: Mode | None = None) -> Nano:
    """A model in which no parameter has its neutral initial value, all of them representable in bf16."""
    model = Nano(config, mode=mode, seed=3).eval()
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if last in ("ape", "attn_sink", "base"):
                p.add_(0.5 * torch.randn(p.shape, generator=g))
            elif last == "scale":
                p.fill_(1.0)
            elif p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
            p.copy_(p.bfloat16().float())
        for name, b in model.named_buffers():
            if name.endswith("bias"):
                b.copy_(0.1 * torch.randn(b.shape, generator=g))
    return model


def logits(model: Nano, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(ids[None], draft=False).hidden)


# with few index heads many scores are exactly zero, and which of the equal ones are chosen is nobody's fault
@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Nano, v4.LoadedModel]:
    model = shaken(small(index_n_heads=32, index_topk=16))
    out = tmp_path_factory.mktemp("f32")
    export(model, out, storage="f32")
    return model, v4.load(out, dtype=torch.float32, numerics="exact")


@pytest.mark.parametrize("length", [1, 3, 128, 131, 260, 400])
def test_training_model_equals_inference_graph(pair: tuple[Nano, v4.LoadedModel], length: int) -> None:
    model, loaded = pair
    ids = torch.randint(0, 1024, (length,), generator=torch.Generator().manual_seed(length))
    assert (logits(model, ids) - loaded.logits(ids)).abs().max() < 1e-4


def test_mtp_equals_inference_graph(pair: tuple[Nano, v4.LoadedModel]) -> None:
    model, loaded = pair
    ids = torch.randint(0, 1024, (200,), generator=torch.Generator().manual_seed(0))
    runner = loaded.runner
    session = runner.session(max_tokens=200, drafts=True)
    streams = runner.forward(session.cache, [session.cache.new_sequence()], [ids])
    assert session.draft_cache is not None
    found = runner.draft_logits(runner.draft(session.draft_cache, session.draft_cache.new_sequence(), ids[1:], streams[:-1]))
    with torch.no_grad():
        hidden = model(ids[None]).mtp
        assert hidden is not None
        assert (model.logits(hidden)[:-1] - found).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name", ["layers.1.attn.indexer.compressor.ape", "layers.2.attn.compressor.ape", "layers.3.attn.attn_sink", "layers.0.hc_ffn.base"]
)
def test_comparison_sees_every_mechanism(pair: tuple[Nano, v4.LoadedModel], name: str) -> None:
    model, loaded = pair
    ids = torch.randint(0, 1024, (400,), generator=torch.Generator().manual_seed(9))
    p = dict(model.named_parameters())[name]
    with torch.no_grad():
        kept = p.clone()
        p.copy_(p.roll(1, 0))
        wrong = (logits(model, ids) - loaded.logits(ids)).abs().max()
        p.copy_(kept)
    assert wrong > 1e-3


def test_window_of_a_stage() -> None:
    """A stage's window is that of a model configured so, and the last stage has the configuration's own."""
    config = small()
    models = [shaken(config), shaken(config), shaken(replace(config, sliding_window=16))]
    models[1].mode.window = 16
    ids = torch.randint(0, 1024, (200,), generator=torch.Generator().manual_seed(2))
    own, narrow, configured = (logits(m, ids) for m in models)
    assert torch.equal(narrow, configured)
    assert (own - narrow).abs().max() > 0.01
    STAGES[-1].apply(models[1].mode)
    assert (models[1].mode.window, models[1].mode.sparse, models[1].mode.quantise) == (None, True, True)


def test_fake_quantised_model_is_the_packed_graph(tmp_path: Path) -> None:
    # every entry is chosen: a selection that differs by one rounding would say nothing about the quantisers
    model = shaken(small(index_topk=256), Mode(quantise=True))
    export(model, tmp_path)
    loaded = v4.load(tmp_path, dtype=torch.float32, numerics="reference")
    ids = torch.randint(0, 1024, (160,), generator=torch.Generator().manual_seed(1))
    expected = loaded.logits(ids)
    difference = (logits(model, ids) - expected).abs().amax(1)
    model.mode.quantise = False
    without = (logits(model, ids) - expected).abs().amax(1)
    # once a value on a rounding boundary falls the other way, everything after it differs by about a quantisation step
    first = int((difference > 1e-4).nonzero()[0])
    assert first > 6, difference
    assert without[:first].min() > 1e-3
    assert without.median() > 2 * difference.median()


def test_fake_quantisers_equal_the_stored_formats() -> None:
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 384)
    out = torch.empty_like(w)
    unpack_fp8(*quantise_fp8(w), out)
    assert torch.equal(fake.fp8_weight(w), out)
    unpack_fp4(*quantise_fp4(w), out)
    assert torch.equal(fake.fp4(w), out)
    assert torch.equal(fake.fp4(w), roundtrip_fp4.reference(w))
    assert torch.equal(fake.fp8_activation(w, 64, 128), roundtrip_fp8.reference(w, channels=128))


def test_straight_through_gradient_is_the_identity() -> None:
    for f in (fake.fp8_weight, fake.fp4, fake.fp8_activation):
        w = torch.randn(128, 128, requires_grad=True)
        f(w).sum().backward()
        assert w.grad is not None
        assert torch.equal(w.grad, torch.ones_like(w))


def test_sinkhorn_check_sees_a_wrong_kernel() -> None:
    device = torch.device("cpu")
    assert check(plain, device) == 0
    assert check(lambda z, iters, eps: plain(z, iters - 1, eps), device) > 1e-6
    assert check(lambda z, iters, eps: plain(z.mT, iters, eps), device) > 1e-2


def test_orthogonal() -> None:
    for shape in ((3, 64, 32), (64, 200)):
        s = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert 0.3 < float(s.min()) <= float(s.max()) < 1.3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write(train(1024), path)
    return path


def test_tokenizer_has_special_strings_and_is_deterministic(tokenizer: Path, tmp_path: Path) -> None:
    found = Tokenizer(tokenizer)
    assert [found.special_id(s) for s in SPECIAL] == list(range(len(SPECIAL)))
    write(train(1024), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == tokenizer.read_bytes()
    with pytest.raises(ValueError, match="vocabulary 100: expected at least 272"):
        train(100)


def test_encoder_equals_tokenizer(tokenizer: Path) -> None:
    known, texts = Tokenizer(tokenizer), own_texts()
    encoder = Encoder(known)
    for seed in range(20):
        r = Random(seed)
        for document in (recall(r, 300), story(r, 200), tool_call(r, texts)):
            text = "".join(piece.text for piece in document)
            assert encoder.document(document)[0] == encoder(text) == known.encode(text)


def test_tool_documents_are_whole_conversations() -> None:
    """Every turn of the assistant parses, and exactly the values of parameters carry the weight of answers."""
    texts = own_texts()
    calls = 0
    for seed in range(20):
        document = tool_call(Random(seed), texts)
        text = "".join(piece.text for piece in document)
        turns = [t.split(EOS)[0] for t in text.split(f"{ASSISTANT}{END_THINK}")[1:]]
        parsed = [parse(t + EOS, mode="chat") for t in turns]
        values = [str(v) for p in parsed for c in p.tool_calls for v in json.loads(c.arguments).values()]
        assert [piece.text for piece in document if piece.weight == ANSWER_WEIGHT] == values
        assert {p.content for p in parsed} <= {"I will do that.", "It is done."}
        calls += sum(len(p.tool_calls) for p in parsed)
    assert calls > 20


def test_documents_are_the_prompt_format(tokenizer: Path) -> None:
    text = "".join(piece.text for piece in recall(Random(0), 200))
    context, question = text.split("\n\n", 1)
    question, rest = question.split("<｜Assistant｜></think>", 1)
    answer = rest.split("<｜end▁of▁sentence｜>")[0]
    user = {"role": "user", "content": f"{context.split('<｜User｜>', 1)[1]}\n\n{question}"}
    assert text.startswith(encode([user, {"role": "assistant", "content": answer}]))
    messages, reply = tool_request(Random(1))
    whole = encode([*messages, reply], texts=own_texts())
    completion = parse(whole[len(encode(messages, texts=own_texts())) :], mode="chat")
    assert [c.name for c in completion.tool_calls] == [reply["tool_calls"][0]["function"]["name"]]  # type: ignore[index]


def test_batches_depend_on_seed_and_number_only(tokenizer: Path) -> None:
    first, second = (Batches(str(tokenizer), [Plan(4, 256)] * 3, 7) for _ in range(2))
    second[0]
    assert torch.equal(first[2].ids_BT, second[2].ids_BT)
    assert first[2].ids_BT.shape == first[2].weights_BT.shape == (4, 256)
    assert not torch.equal(first[1].ids_BT, first[2].ids_BT)
    assert not torch.equal(first[1].ids_BT, Batches(str(tokenizer), [Plan(4, 256)] * 3, 8)[1].ids_BT)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_lies_where_it_should(tokenizer: Path, depth: float) -> None:
    known = Tokenizer(tokenizer)
    case = prompt(Random(5), Encoder(known), 1024, depth)
    assert 960 < len(case.ids) <= 1024
    text = known.decode(case.ids)
    where = text.index(f"{case.lead}{case.text}.") / text.rindex("\n\n")
    assert abs(where - depth) < 0.1
    assert text.count(case.lead + " ") == 1


def test_schedule() -> None:
    assert abs(sum(s.share for s in STAGES) - 1) < 1e-9
    lengths = [p.length for p in plans(100, 8192, 4096)]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 4096
    assert stage_of(99, 100).quantise
    assert not stage_of(0, 100).sparse
    assert rate(0, 1000, 1.0) < rate(19, 1000, 1.0) > rate(999, 1000, 1.0) > 0
    with pytest.raises(ValueError, match="batch of 512 tokens"):
        plans(100, 512, 4096)


def test_a_resumed_run_is_the_same_run(tokenizer: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    import json

    config.write_text(json.dumps({**json.loads(Path("configs/nano_trained.json").read_text()), **SMALL, "num_hidden_layers": 2,
                                  "compress_ratios": [4, 128, 0]}))  # fmt: skip
    common = Settings(str(config), str(tokenizer), str(tmp_path / "whole"), steps=4, tokens=256, longest=256, probe_trials=1)
    assert Trainer(common).train()
    part = replace(common, out=str(tmp_path / "part"), budget=0.0)
    assert not Trainer(part).train()
    state = str(tmp_path / "part" / "state.pt")
    rest = Trainer(replace(part, budget=None, resume=state))
    assert rest.step == 1
    assert rest.train()
    a, b = (torch.load(tmp_path / n / "state.pt", weights_only=True)["model"] for n in ("whole", "part"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    small = Trainer(replace(part, budget=None, resume=str(tmp_path / "part" / "small.pt")))
    c = small.model.state_dict()
    assert small.step == 4
    assert all(torch.allclose(a[k], c[k], rtol=1e-4, atol=0) for k in a)
    with pytest.raises(ValueError, match="a resumed run needs the same"):
        Trainer(replace(part, seed=1, resume=state))


def test_three_bytes_of_a_weight() -> None:
    x = torch.randn(7, 5) * torch.logspace(-20, 20, 5)
    parts = shorten(x)
    assert (parts.dtype, parts.shape) == (torch.uint8, (35, 3))
    assert ((lengthen(parts, x.shape) - x).abs() <= x.abs() * 2.0**-16).all()


def test_fused_kinds() -> None:
    with pytest.raises(ValueError, match="sinkhorn 'x'"):
        Fused(sinkhorn_kind="x")
