"""What `deepspeed` starts on every rank:

    deepspeed launch/train.py --recipe lavin-7b --data SHARDS --llama DIR --clip FILE --out RUN [key=value ...]

`lavin-ds train` works out the ranks of this machine and starts it the same way.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description="Train LaVIN under the deepspeed launcher.")
    parser.add_argument("--recipe", required=True, help="a shipped recipe's name, or a YAML file")
    parser.add_argument("--data", required=True, type=Path, help="shards that `lavin-ds prep` made")
    parser.add_argument(
        "--llama", required=True, type=Path, help="folder of the LLaMA, Meta's or Hugging Face's layout"
    )
    parser.add_argument("--clip", type=Path, help="file of the CLIP weights; not for text-only recipes")
    parser.add_argument("--out", required=True, type=Path, help="run directory to make")
    parser.add_argument("--resume", choices=["never", "auto"], default="never", help="auto: go on where --out stopped")
    parser.add_argument("--init-adapter", type=Path, help="exported adapter to start from, instead of a new one")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(argv)


def main() -> None:
    given = parse(sys.argv[1:])
    # torch and DeepSpeed take seconds to import: a wrong argument is told before, and a launcher that dies is noticed.
    from lavin_ds.training import rank
    from lavin_ds.training.arguments import TrainArguments

    arguments = TrainArguments(
        recipe=given.recipe,
        data=given.data,
        llama=given.llama,
        clip=given.clip,
        out=given.out,
        resume=given.resume,
        init_adapter=given.init_adapter,
        overrides=tuple(given.overrides),
    )
    code = rank.run(arguments)
    if code in (1, 2):
        rank.end(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
