"""One process of test_peers.py: joins, takes part in one sum, then does what the test asks, and reports its error."""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist

from nemo_advrm.engine import peers
from nemo_advrm.errors import ProcessLost
from nemo_advrm.rank_info import RankInfo


def main(fate: str, minutes: float) -> None:
    here = RankInfo.from_environment()
    if fate == "absent" and here.rank == 1:
        return
    try:
        peers.join(here, "gloo", minutes)
    except ProcessLost as error:
        print(error)
        return
    dist.all_reduce(torch.ones(1))
    victim = 0 if fate == "first_stopped" else 1
    if here.rank == victim and fate != "fine":
        os.kill(os.getpid(), signal.SIGKILL if fate == "killed" else signal.SIGSTOP)
    try:
        dist.all_reduce(torch.ones(1))
        print("sum")
    except (dist.DistError, RuntimeError) as error:
        print(peers.lost(error))
    assert peers.lost(ValueError("gloo")) is None
    assert peers.lost(RuntimeError("shapes do not match")) is None


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
