"""``vllm serve --kv-cache-dtype``: every format over HTTP, and a word at start where none works."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.cache_accuracy import Simulation
from tests.entrypoints.server import SMALL, Server, serve_command
from tests.loader.test_default_loader import edit
from tests.models.checkpoints import make_hf_model, save
from vllm.v1.attention.ops.kv_formats import FORMATS, SideScales, kv_format
from vllm.v1.attention.ops.turboquant import TURBOQUANT_FORMATS

LAYERS = 3
TEXT = torch.randint(4, 120, (1, 90), generator=torch.Generator().manual_seed(3))
OPTIONS = (
    "--dtype", "float32", "--max-model-len", "128", "--kv-cache-memory-bytes", "8M",
    "--skip-tokenizer-init",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    """Heads of 16."""
    return make_hf_model("llama", hidden_size=96, num_attention_heads=6).float()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save(model, folder)
    return folder


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


def log_probs(server: Server, text: torch.Tensor = TEXT) -> torch.Tensor:
    """Of the tokens of a text after the first, as the server's answer has them."""
    (ids,) = text.tolist()
    answer = server.post(
        "/v1/completions",
        {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True},
    )
    assert answer.status_code == 200, answer.text
    rows = answer.json()["choices"][0]["prompt_logprobs"]
    assert rows[0] is None
    pairs = zip(rows[1:], ids[1:], strict=True)
    return torch.tensor([row[str(token)]["logprob"] for row, token in pairs], dtype=torch.float64)


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    apart = (found - expected).abs()
    # A number next to a threshold of the format may fall on either side, and is read from then on.
    assert apart.median() < 5e-3
    assert apart.mean() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, *TURBOQUANT_FORMATS])
def test_a_format_answers_as_its_formula_says(
    name: str, model: Any, folder: Path, log: Path
) -> None:
    expected = Simulation(model, TEXT).free(kv_format(name)).log_probs
    plain = Simulation(model, TEXT).free(None).log_probs
    with Server(log, *OPTIONS, "--kv-cache-dtype", name, model=str(folder)) as server:
        found = log_probs(server)
    check(found, expected)
    assert (found - expected).abs().mean() < 0.5 * (found - plain).abs().mean()


def test_scales_and_layers_are_served_as_asked(
    model: Any, folder: Path, log: Path, tmp_path: Path
) -> None:
    """The first layer plain, the second by the checkpoint's scales, the third by those found."""
    save(model, tmp_path / "with-scales")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_scale"] = torch.tensor(0.37)
        tensors["model.layers.1.self_attn.v_scale"] = torch.tensor(0.011)

    edit(tmp_path / "with-scales", add)
    options = [
        *OPTIONS, "--kv-cache-dtype", "fp8", "--calculate-kv-scales",
        "--kv-cache-dtype-skip-layers", "0",
    ]  # fmt: skip
    with Server(log, *options, model=str(tmp_path / "with-scales")) as server:
        found = log_probs(server)
    assert "KV scales of 2 layers after 127 tokens" in server.log()
    # Scales of powers of two leave numbers as they are: 1 stands for the one that is found.
    scales = [SideScales(), SideScales(k=0.37, v=0.011), SideScales()]
    fmt = kv_format("fp8")
    expected = Simulation(model, TEXT).free(fmt, scales, skipped={0}).log_probs
    check(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8_per_token_head", "fp8", "int4_per_token_head"])
def test_windowed_layers_stay_plain_beside_others(name: str, log: Path, tmp_path: Path) -> None:
    save(make_hf_model("gemma3_text"), tmp_path)
    settings = [*OPTIONS, "--kv-cache-dtype", name]
    found = {}
    for skipped in ([], ["--kv-cache-dtype-skip-layers", "sliding_window"], None):
        options = OPTIONS if skipped is None else (*settings, *skipped)
        with Server(log, *options, model=str(tmp_path)) as server:
            found["plain" if skipped is None else " ".join(skipped)] = log_probs(server)
    everywhere, some, plain = found.values()
    assert 0 < (some - plain).abs().mean() < (everywhere - plain).abs().mean()


PROMPTS = {"The capital of France is": "Paris", "1, 2, 3, 4, 5, 6,": "7"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("fp8",), ("fp8", "--calculate-kv-scales"), ("int8_per_token_head",), ("nvfp4",),
        ("turboquant_k8v4",),
        ("turboquant_4bit_nc", "--kv-cache-dtype-skip-layers", "0", "1", "28", "29"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_smollm2_still_knows(options: tuple[str, ...], log: Path) -> None:
    with Server(log, *SMALL, "--dtype", "float32", "--kv-cache-dtype", *options) as server:
        for prompt, word in PROMPTS.items():
            answer = server.client.completions.create(
                model="smollm2", prompt=prompt, max_tokens=8, temperature=0
            )
            assert word in answer.choices[0].text


REFUSED = [
    (("--kv-cache-dtype", "int3"), {}, "--kv-cache-dtype"),
    (("--kv-cache-dtype", "fp8_inc"), {}, "--kv-cache-dtype"),
    (("--kv-cache-dtype", "fp8_ds_mla"), {}, "--kv-cache-dtype"),
    (("--calculate-kv-scales",), {}, "--calculate-kv-scales"),
    (
        ("--kv-cache-dtype", "int8_per_token_head", "--calculate-kv-scales"), {},
        "--calculate-kv-scales",
    ),
    (
        ("--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "7"), {},
        "--kv-cache-dtype-skip-layers '7' means no layer that attends",
    ),
    (
        ("--kv-cache-dtype", "turboquant_k8v4", "--attention-backend", "CPU_ATTN"), {},
        "--kv-cache-dtype turboquant_k8v4",
    ),
    (("--kv-cache-dtype", "nvfp4"), {"VLLM_KV_CACHE_LAYOUT": "NHD"}, "VLLM_KV_CACHE_LAYOUT"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("options", "environment", "named"), REFUSED)
def test_what_cannot_work_ends_with_a_word_at_start(
    options: tuple[str, ...],
    environment: dict[str, str],
    named: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ended = subprocess.run(
        serve_command("--port", "0", *OPTIONS, *options, model=str(folder)),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode != 0
    assert named in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr.split(named)[-1]


@pytest.mark.slow
def test_heads_that_a_format_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    save(make_hf_model("llama", head_dim=24), tmp_path)
    for name in ("turboquant_4bit_nc", "nvfp4"):
        ended = subprocess.run(
            serve_command("--port", "0", *OPTIONS, "--kv-cache-dtype", name, model=str(tmp_path)),
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert ended.returncode != 0
        assert name.split("_")[0] in ended.stderr + ended.stdout


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
