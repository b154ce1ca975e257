"""What is wrong with a checkpoint: one error type that says which file, which tensor, what was found and what was expected."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A damaged or unsuitable checkpoint. Raised by the reader and the loader, collected by `verify`.

    kind: short stable words ("truncated", "wrong shape"). file: name inside the directory, or None. tensor: hub name, or None.
    found, expected: what is there and what should be. hint: what to do.
    """

    def __init__(
        self, kind: str, *, file: str | None = None, tensor: str | None = None, found: str, expected: str, hint: str = ""
    ) -> None:
        self.kind, self.file, self.tensor = kind, file, tensor
        self.found, self.expected, self.hint = found, expected, hint
        place = ": ".join(p for p in (file, tensor) if p)
        super().__init__(
            f"{kind}: {place + ': ' if place else ''}found {found}; expected {expected}" + (f". {hint}" if hint else "")
        )

    def to_dict(self) -> dict[str, str | None]:
        """The fields under stable keys: kind, file, tensor, found, expected, hint."""
        return {k: getattr(self, k) for k in ("kind", "file", "tensor", "found", "expected", "hint")}
