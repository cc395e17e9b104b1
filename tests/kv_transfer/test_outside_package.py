"""A connector in a package of its own, installed and served as users would."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kv_transfer.harness import Setup
from tests.kv_transfer.test_processes import make_prompts

PACKAGE = Path(__file__).parent / "outside_package"
PUBLIC = {
    "vllm.config",
    "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "vllm.forward_context",
    "vllm.logger",
    "vllm.v1.core.kv_cache_manager",
    "vllm.v1.core.sched.output",
    "vllm.v1.kv_cache_interface",
    "vllm.v1.request",
}
"""Modules that connectors written for vLLM import."""


@pytest.fixture
def installed(tmp_path):
    """A folder for PYTHONPATH with the package in it."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    source = tmp_path / "source"
    source.mkdir()
    for file in PACKAGE.rglob("*.*"):
        if file.suffix in (".py", ".toml"):
            copy = source / file.relative_to(PACKAGE)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(file.read_text())
    options = ["--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run([*command, *options], check=True)
    return target


def test_the_package_imports_public_names_only():
    tree = ast.parse((PACKAGE / "prompt_store" / "connector.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.startswith("vllm")} == PUBLIC


@pytest.mark.slow
def test_prompts_go_from_one_server_to_another(fleet, installed, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    first, second, plain = fleet.all_of(
        *(
            Setup(
                model="llama",
                role="kv_both",
                connector="PromptStore",
                module_path="prompt_store.connector",
                extra=json.dumps({"folder": str(store)}),
                environment=(("PYTHONPATH", path),),
                name=name,
            )
            for name in ("first", "second")
        ),
        Setup(model="llama"),
    )
    prompts = make_prompts(8)
    expected = [plain.tokens(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, expected, strict=True):
        answer = first.complete(prompt).json()
        assert answer["choices"][0]["token_ids"] == tokens
        if len(prompt) > 16 and "kv_transfer_params" in answer:
            assert answer["kv_transfer_params"]["stored_as"].endswith(".pt")
    first.wait_until_empty()
    assert list(store.glob("*.pt")) and not list(store.glob("*.part"))
    assert [second.tokens(prompt) for prompt in prompts] == expected
    assert second.metric("vllm:external_prefix_cache_hits_total") > 100
    second.wait_until_empty()
    # What is in the files is what counts.
    fleet.end(second.setup)
    for file in store.glob("*.pt"):
        torch.save({name: -kv for name, kv in torch.load(file).items()}, file)
    (again,) = fleet.all_of(second.setup)
    assert [again.tokens(prompt) for prompt in prompts] != expected
    fleet.end(again.setup)
    fleet.end(first.setup)
