"""Files of configs/: named model configurations, and YAML run files whose keys are checked before anything is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from v4.config import Config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DTYPES = ("float32", "bfloat16", "float16")


def nearest(word: object, known: Iterable[str]) -> str:
    """"; did you mean 'x'?" for the closest known word, else the list of them."""
    words = sorted(known)
    near = difflib.get_close_matches(str(word), words, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(words)}"


def named_config(name: str) -> Config:
    """The configuration `name` of configs/, or of a config.json or checkpoint directory given by path. ValueError when absent."""
    path = Path(name)
    if path.suffix == ".json" or path.is_dir():
        return Config.from_file(path)
    file = CONFIGS / f"{name}.json"
    if not file.is_file() or name == "v32":
        known = {p.stem for p in CONFIGS.glob("*.json")} - {"v32"}
        raise ValueError(f"config {name!r} is neither a name in configs/ nor the path of a config.json{nearest(name, known)}")
    return Config.from_file(file)


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run; every field can stand in a YAML file and be overridden on the command line.

    model: checkpoint directory. context: most tokens of prompt and answer together (None: what the model allows). ops: op ->
    backend, above the backend's own choice.
    """

    model: str | None = None
    backend: str = "cpu"
    dtype: str = "bfloat16"
    numerics: str = "exact"
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    context: int | None = None
    strict: bool = False
    checked: bool = False
    batch_invariant: bool = False
    speculative: bool = False
    cuda_graph: bool = False
    ops: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_type(f.name, str(f.type), getattr(self, f.name))
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.numerics not in ("exact", "reference", "stored"):
            raise ValueError(f"numerics: found {self.numerics!r}, expected 'exact', 'reference' or 'stored'")

    def override(self, values: Mapping[str, Any]) -> RunConfig:
        """A copy with the values that are not None; `ops` are merged, the others replaced."""
        given = {k: v for k, v in values.items() if v is not None}
        if "ops" in given:
            given["ops"] = {**self.ops, **given["ops"]}
        return replace(self, **given)


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "a text"),
    "int": (int, "an integer"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "Mapping[str, str]": (Mapping, "a mapping of op to backend"),
}


def _check_type(name: str, kind: str, value: object) -> None:
    if kind.endswith(" | None"):
        if value is None:
            return
        kind = kind.removesuffix(" | None")
    expected, words = _KINDS[kind]
    if not isinstance(value, expected) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"{name}: found {value!r}, expected {words}")
    if isinstance(value, Mapping) and (bad := [k for k, v in value.items() if not isinstance(k, str) or not isinstance(v, str)]):
        raise ValueError(f"{name}.{bad[0]}: found {value[bad[0]]!r}, expected the name of a backend")


def read_run_file(path: str | Path) -> RunConfig:
    """A YAML run file. ValueError names the file and: a key that is unknown (with the nearest one), a value of a wrong type."""
    file = Path(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: not found; expected a YAML run file such as configs/run-nano.yaml") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML: {error}") from None
    if values is None:
        return RunConfig()
    if not isinstance(values, dict):
        raise ValueError(f"{file}: found a {type(values).__name__}, expected a mapping with keys such as model and backend")
    known = {f.name for f in fields(RunConfig)}
    for key in values:
        if key not in known:
            raise ValueError(f"{file}: unknown key {key!r}{nearest(key, known)}")
    try:
        return RunConfig(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
