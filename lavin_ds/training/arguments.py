"""The command line of a training run, shared by `lavin-ds train` and launch/train.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lavin_ds.run import Inputs


@dataclass(frozen=True)
class TrainArguments:
    """resume: "never", or "auto" to go on from the newest checkpoint in `out`; init_adapter: an exported adapter to
    start from instead of a new one."""

    recipe: str
    data: Path
    llama: Path
    clip: Path | None
    out: Path
    resume: str = "never"
    init_adapter: Path | None = None
    overrides: tuple[str, ...] = ()

    def inputs(self) -> Inputs:
        absolute = {
            key: getattr(self, key) and getattr(self, key).absolute()
            for key in ("data", "llama", "clip", "init_adapter")
        }
        return Inputs(**absolute)

    def words(self) -> list[str]:
        """The arguments of launch/train.py."""
        clip = ["--clip", str(self.clip)] if self.clip else []
        init = ["--init-adapter", str(self.init_adapter)] if self.init_adapter else []
        paths = ["--data", str(self.data), "--llama", str(self.llama), *clip, *init, "--out", str(self.out)]
        return ["--recipe", self.recipe, *paths, "--resume", self.resume, *self.overrides]
