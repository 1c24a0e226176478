"""The script that `deepspeed` or `torchrun` starts on every rank to cache features:

    deepspeed launch/features.py --data SHARDS --clip FILE --recipe ablation-vision [--overwrite] [key=value ...]

Every rank computes whole files. `lavin-ds prep features` starts this script if there are several GPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="features.py", description="Cache features under the deepspeed launcher.")
    parser.add_argument("--data", required=True, type=Path, help="shards that `lavin-ds prep` made")
    parser.add_argument("--clip", required=True, type=Path, help="file of the CLIP weights")
    parser.add_argument("--recipe", required=True, help="a shipped recipe's name, or a YAML file")
    parser.add_argument("--overwrite", action="store_true", help="replace features of another kind")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(argv)


def main() -> int:
    given = parse(sys.argv[1:])
    import torch.distributed as dist

    from lavin_ds.cli import console
    from lavin_ds.config import load_recipe
    from lavin_ds.data_prep import features
    from lavin_ds.errors import UserError
    from lavin_ds.launching.rank import watch_launchers
    from lavin_ds.training.engine import start_distributed

    watch_launchers()
    first = os.environ.get("RANK", "0") == "0"
    try:
        job = features.plan(given.data, given.clip, load_recipe(given.recipe, given.overrides), given.overwrite)
    except UserError as error:  # all ranks raise the same error
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if job.done:
        return 0
    device = start_distributed()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        if first:
            with console.progress(f"prep features, rank 0 of {ranks}") as update:
                features.extract(job, device, rank, ranks, update)
        else:
            features.extract(job, device, rank, ranks)
    except UserError as error:
        print(f"error: rank {rank}: {error}", file=sys.stderr)
        return 2
    dist.barrier()
    if first:
        features.finish(job)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
