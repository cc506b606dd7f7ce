"""Speed and memory side by side, in one process, in turns: `python benchmark.py --help`."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import timm
import torch

from benchmarks.any_model import any_model_table
from benchmarks.busy import busy_benchmark
from benchmarks.digits import digits_seeds
from benchmarks.drop_path import RATES, drop_path_benchmark, limits_benchmark
from benchmarks.fold import FOLDED, fold_benchmark
from benchmarks.measure import machine
from training.threads import wait_passively

wait_passively()  # before torch loads


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark and writes its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, help="JSON; default benchmarks/results/NAME.json")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "drop-path",
        help="blocks, branches or models: mask, skip, timm's and DINOv2's scheme over rates",
        parents=[common],
    )
    one.add_argument(
        "--subjects",
        nargs="+",
        help="blocks, branches, or models of the zoo",
        default=["blocks", "poolformer_s12", "caformer_s18", "vit_small_patch16_224"],
    )
    one.add_argument("--variants", nargs="+", default=["mask", "skip", "timm", "floored"])
    one.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    one.add_argument("--profiles", nargs="+", default=["linear", "constant"])
    one.add_argument("--batch", type=int, default=16, help="of whole models")
    one.add_argument("--block-batch", type=int, default=32)
    one.add_argument("--rounds", type=int, default=7)
    one.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU; default all")
    one.set_defaults(run=drop_path_benchmark)
    two = commands.add_parser(
        "any-model", help="set_drop_path on architectures of timm and torchvision", parents=[common]
    )
    two.add_argument("--architectures", nargs="+")
    two.add_argument("--markdown", type=Path)
    two.set_defaults(run=any_model_table)
    five = commands.add_parser("limits", help="what skipping could gain at most, by blocks' times", parents=[common])
    five.add_argument("--models", nargs="+", default=["poolformer_s12", "caformer_s18", "vit_small_patch16_224"])
    five.add_argument("--rate", type=float, default=0.4)
    five.add_argument("--batch", type=int, default=16)
    five.add_argument("--rounds", type=int, default=3)
    five.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU; default all")
    five.set_defaults(run=limits_benchmark)
    four = commands.add_parser("fold", help="the inference form with folded scales", parents=[common])
    four.add_argument("--models", nargs="+", default=FOLDED)
    four.add_argument("--batch", type=int, default=4)
    four.add_argument("--rounds", type=int, default=25)
    four.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU; default all")
    four.set_defaults(run=fold_benchmark)
    three = commands.add_parser("digits", help="the default run over seeds", parents=[common])
    three.add_argument("--seeds", type=int, default=5)
    three.add_argument("--runs", type=Path, default=Path("runs"))
    three.add_argument("overrides", nargs="*")
    three.set_defaults(run=digits_seeds)
    six = commands.add_parser("busy", help="the default run beside a busy process, over alone", parents=[common])
    six.add_argument("--rounds", type=int, default=3)
    six.add_argument("--epochs", type=int, default=5, help="of each run")
    six.add_argument("overrides", nargs="*")
    six.set_defaults(run=busy_benchmark)
    args = parser.parse_args(argv)
    if "threads" in args:
        torch.set_num_threads(args.threads)

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    about = {
        "command": f"python benchmark.py {' '.join(argv if argv is not None else sys.argv[1:])}",
        "commit": commit,
        "machine": machine(torch.get_num_threads()),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    output = args.output or Path("benchmarks/results") / f"{args.command}.json"
    try:  # before what may take hours
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a").close()
    except OSError as error:
        parser.error(f"--output {output}: {error.strerror}")
    result = {**about, **args.run(args)}
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written {output}")
    return 0


if __name__ == "__main__":
    # glibc gives large blocks back to the system and fetches them again, and page faults then swamp the differences: keep
    # them, for all sides alike. The C library reads these before Python starts.
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
    if sys.platform == "linux" and not keep.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**keep, **os.environ})
    sys.exit(main())
