"""Train with sharded tables: ``torchrun --nproc-per-node 8 -m hstu_plugin.adapters.torchrec.train --config c.yaml``.

Without torchrun it is a single process. SIGTERM and SIGINT make all ranks write a checkpoint and stop with exit code
143; the same command then goes on where they stopped, on any number of ranks.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import yaml

from hstu_plugin.adapters.torchrec.loop import Trainer
from hstu_plugin.adapters.torchrec.options import TrainOptions
from hstu_plugin.adapters.torchrec.options_file import load_options

_STOPPED = 128 + signal.SIGTERM
# What PyTorch says to TorchRec, once a rank: there is nothing in them for whoever trains.
_NOT_OURS = ("Please use DTensor instead and we are deprecating ShardedTensor", "`broadcast_buffers` is deprecated")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        options = load_options(parsed.config, dict(parsed.set))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(options, evaluate_only=parsed.evaluate_only)


def run(options: TrainOptions, *, evaluate_only: bool = False) -> int:
    """Train, or evaluate the newest checkpoint; returns the exit code, 143 where it was asked to stop."""
    for message in _NOT_OURS:
        warnings.filterwarnings("ignore", message=re.escape(message), category=FutureWarning)
    device, local_world_size = join_group(options.run.timeout_s)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: asked.append(received))
    try:
        trainer = Trainer(options, device=device, local_world_size=local_world_size, stop=lambda: bool(asked))
        if evaluate_only:
            trainer.evaluate()
            return 0
        return 0 if trainer.train()["finished"] else _STOPPED
    finally:
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def join_group(timeout_s: int) -> tuple[torch.device, int]:
    """Join torchrun's process group, or make one of this process alone.

    Returns:
        The device of this rank, and the number of ranks of one host.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in alone.items()} | {"MASTER_ADDR": "localhost"}
    local_rank = int(os.environ["LOCAL_RANK"])
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return device, int(os.environ["LOCAL_WORLD_SIZE"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hstu_plugin.adapters.torchrec.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the training")
    parser.add_argument("--evaluate-only", action="store_true", help="evaluate the newest checkpoint and stop")
    # Several behind one flag, too: TorchX refuses a flag that it sees twice.
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        type=_setting,
        metavar="SECTION.KEY=VALUE",
        help="replace settings",
    )
    return parser


def _setting(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"expected SECTION.KEY=VALUE, got {text!r}")
    return name, yaml.safe_load(value)


if __name__ == "__main__":
    sys.exit(main())
