"""Filling a model's parameters from a checkpoint: every parameter exactly once, every stored tensor used or listed as ignored.

The hub's tensors are streamed in file order, all shards as one stream. What is stored as the parameter wants it is read straight
into its place by several threads, in parts, so that none waits for another's long tensor; the rest is unpacked or cast on the way.
Parameters live in memory of their own, not in the file mapping: a file that changes later can not change a running model, and
products over mapped files are slower.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from v4.checkpoint import Checkpoint
from v4.errors import CheckpointError
from v4.manifest import verify_files
from v4.memory import Memory
from v4.packing import channel_scale_problem, scale_problem, unpack_fp4, unpack_fp8, unpack_int8
from v4.placement import Piece, place
from v4.shards import StoredTensor
from v4.workers import COUNT, in_order, workers

PART = 4 << 20
"""Bytes that a thread reads at a time: several huge pages, and little to wait for at the end."""


class Task(NamedTuple):
    """Bytes [begin, end) of a piece's stored tensor, and all of the piece's target."""

    piece: Piece
    target: Tensor
    begin: int
    end: int


@dataclass(frozen=True)
class LoadReport:
    """bytes: stored bytes read; seconds: all of the loading; filled: number of parameters; ignored: stored names not read."""

    bytes: int
    seconds: float
    filled: int
    ignored: tuple[str, ...]

    @property
    def gb_per_s(self) -> float:
        """Stored bytes read per second, in units of 10^9."""
        return self.bytes / 1e9 / self.seconds


def _read_into(path: Path, offset: int, target: memoryview) -> None:
    with path.open("rb", buffering=0) as f:
        f.seek(offset)
        while target:
            n = f.readinto(target)
            if not n:
                raise CheckpointError(
                    "truncated",
                    file=path.name,
                    found=f"the end of the file at {f.tell()}",
                    expected=f"{len(target)} more bytes",
                    hint="The file changed while it was read",
                )
            target = target[n:]


def check_values(stored: StoredTensor, tensor: Tensor, experts: int) -> CheckpointError | None:
    """Cheap checks made at every load: scales, and tables of expert numbers in [0, experts)."""
    if stored.dtype == "F8_E8M0":
        return scale_problem(tensor, file=stored.file, tensor=stored.name)
    if stored.name.endswith(".scale"):
        return channel_scale_problem(tensor, file=stored.file, tensor=stored.name)
    if stored.name.endswith(".tid2eid") and tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= experts:
            return CheckpointError(
                "expert out of range",
                file=stored.file,
                tensor=stored.name,
                found=f"numbers from {low} to {high}",
                expected=f"0 to {experts - 1}",
            )
    return None


class _Filler:
    """Runs a plan: allocates parameters when their first piece comes, hands them to the module when the last one is in."""

    def __init__(
        self, module: nn.Module, checkpoint: Checkpoint, pieces: list[Piece], device: torch.device | str | None, bar: tqdm
    ) -> None:
        self.module, self.checkpoint, self.device, self.bar = module, checkpoint, device, bar
        self.parameters = dict(module.named_parameters())
        self.left = Counter(p.parameter for p in pieces)
        self.filling: dict[str, Tensor] = {}
        self.memory = Memory()

    def target(self, piece: Piece) -> Tensor:
        if piece.parameter not in self.filling:
            p = self.parameters[piece.parameter]
            self.filling[piece.parameter] = self.memory.uninitialised(tuple(p.shape), p.dtype)
        return piece.target(self.filling[piece.parameter])

    def check(self, stored: StoredTensor, tensor: Tensor) -> None:
        if problem := check_values(stored, tensor, self.checkpoint.config.n_routed_experts):
            raise problem

    def convert(self, piece: Piece, target: Tensor) -> None:
        source = self.checkpoint.get(piece.source.name)
        if piece.scale is None:
            self.check(piece.source, source)
            target.copy_(source)
            return
        scale = self.checkpoint.get(piece.scale.name)
        self.check(piece.scale, scale)
        {"fp4": unpack_fp4, "fp8": unpack_fp8, "int8": unpack_int8}[piece.how](source, scale, target)

    def tasks(self, pieces: list[Piece]) -> Iterator[Task]:
        """What the threads do, in file order. Numbers without a rule of their own are read in parts."""
        for piece in pieces:
            target, size = self.target(piece), piece.source.bytes
            split = piece.how == "read" and piece.source.dtype not in ("F8_E8M0", "I64") and not piece.source.name.endswith(".scale")
            for begin in range(0, size, PART) if split and size else (0,):
                yield Task(piece, target, begin, min(begin + PART, size) if split else size)

    def carry_out(self, task: Task) -> Task:
        piece, target = task.piece, task.target
        if piece.how != "read":
            self.convert(piece, target)
            return task
        data = target.view(-1).view(torch.uint8).numpy().data[task.begin : task.end]
        _read_into(self.checkpoint.path / piece.source.file, piece.source.begin + task.begin, data)
        if task.end - task.begin == piece.source.bytes:
            self.check(piece.source, target)
        return task

    def run(self, pieces: list[Piece], pool: ThreadPoolExecutor) -> None:
        """Fill all pieces; the first error ends it."""
        for task in in_order(pool, self.carry_out, self.tasks(pieces)):
            if task.end == task.piece.source.bytes:  # in order: the parts before it are done
                self.done(task.piece)
        self.memory.offer()

    def done(self, piece: Piece) -> None:
        self.bar.update(piece.bytes)
        self.left[piece.parameter] -= 1
        if self.left[piece.parameter] == 0:
            owner, _, name = piece.parameter.rpartition(".")
            value = self.filling.pop(piece.parameter)
            value = value if self.device is None else value.to(self.device)
            setattr(self.module.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))


def load_parameters(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    progress: bool = False,
    include_mtp: bool = True,
    verify: bool = False,
    threads: int = COUNT,
) -> LoadReport:
    """Fill every parameter of `module` from a checkpoint and move it to `device` (None: leave it where it was read).

    Parameter names are the hub's, except the stacked experts.w13/w2/s13/s2 [E, ...] (w1 rows first, then w3), shared_experts.w13
    and the grouped attn.wo_a. A parameter whose type is the stored one takes the bytes as they are (packed FP4 int8 as uint8);
    a floating parameter takes dequantised or cast values. dtype: the activation type the module was built for. include_mtp False
    ignores stored `mtp.*`. verify: hold the files against checksums.json first. threads: concurrent reads.
    Raises CheckpointError for damaged scales and tables, unreadable files and types or shapes that do not fit; ValueError naming
    parameters left unfilled, tensors left unused, or parameters of another type than `dtype`, float32 and the packed ones.
    """
    began = time.perf_counter()
    if verify:
        for problem in verify_files(checkpoint.path, progress=progress):
            raise problem
    parameters = dict(module.named_parameters())
    for name, p in parameters.items():
        if p.dtype.is_floating_point and p.dtype.itemsize > 1 and p.dtype not in (dtype, torch.float32):
            raise ValueError(
                f"{name}: found a parameter of {p.dtype}, expected {dtype} or torch.float32; build the model for {dtype}"
            )
    ignored = set(checkpoint.ignored)
    if not include_mtp:
        ignored.update(n for n in checkpoint.tensors if n.startswith("mtp."))
    pieces = place(parameters, checkpoint, ignored)
    size = sum(p.bytes for p in pieces)
    with tqdm(total=size, unit="B", unit_scale=True, desc="load", disable=not progress) as bar, workers(threads) as pool:
        _Filler(module, checkpoint, pieces, device, bar).run(pieces, pool)
    return LoadReport(size, time.perf_counter() - began, len(parameters), tuple(sorted(ignored)))


def raw_read_gb_per_s(path: str | Path) -> float:
    """GB/s of plain safetensors reading, what loading is held against: every tensor of every shard read with `get_tensor` into
    memory of its own and kept until the end, as a model must keep it (get_tensor alone maps the file and reads nothing).
    """
    began, size = time.perf_counter(), 0
    kept = []
    for shard in sorted(Path(path).glob("*.safetensors")):
        with safe_open(str(shard), framework="pt") as f:
            for name in list(f.keys()):
                kept.append(f.get_tensor(name).clone())
                size += kept[-1].numel() * kept[-1].element_size()
    return size / 1e9 / (time.perf_counter() - began)
