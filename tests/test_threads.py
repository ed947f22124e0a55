"""How long waiting OpenMP threads spin: what the commands set, and that results do not depend on it."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

from pipeline.core import threads

SCRIPT = """
from stages.common import stage

@stage
def command():
    import hashlib
    import torch
    from torch import nn

    torch.set_num_threads(2)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(16 * 28 * 28, 2))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    images = torch.rand(8, 3, 32, 32)
    for _ in range(3):
        optimizer.zero_grad()
        network(images).square().sum().backward()
        optimizer.step()
    weights = nn.utils.parameters_to_vector(network.parameters()).detach()
    print(hashlib.sha256(weights.numpy().tobytes()).hexdigest())

command()
"""
POLICIES = [  # what the user has set, and the spin count that libgomp shall have
    ({}, threads.SPIN_COUNT),
    ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_PROC_BIND": "true"}, 30_000_000_000),
    ({"GOMP_SPINCOUNT": "0"}, 0),
]


@pytest.mark.skipif(platform.system() != "Linux", reason="only libgomp reads GOMP_SPINCOUNT")
def test_commands_limit_spinning_unless_the_user_has_chosen_and_results_are_the_same():
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            env={**inherited, **changes, "OMP_DISPLAY_ENV": "VERBOSE"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for changes, _ in POLICIES
    ]
    outputs = [process.communicate() for process in processes]
    for (_, spin_count), (_, settings) in zip(POLICIES, outputs, strict=True):
        assert f"GOMP_SPINCOUNT = '{spin_count}'" in settings
    digests = {digest for digest, _ in outputs}
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64
