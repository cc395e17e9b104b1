"""The tree keeps its promises: import direction, packaging, pipelines."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm"

# docs/architecture.md draws these parts. The longest matching prefix decides.
PARTS = {
    "vllm": 0,
    "vllm.errors": 0,
    "vllm.logger": 0,
    "vllm.envs": 0,
    "vllm.utils": 0,
    "vllm.platforms": 0,
    "vllm.plugins": 0,
    "vllm._custom_ops": 0,
    "vllm._C": 0,
    "vllm.config": 1,
    "vllm.beam_search": 1,
    "vllm.sampling_params": 1,
    "vllm.inputs": 1,
    "vllm.outputs": 1,
    "vllm.logprobs": 1,
    "vllm.forward_context": 1,
    "vllm.v1": 1,
    "vllm.v1.engine": 6,
    "vllm.v1.core": 2,
    "vllm.v1.core.sched.output": 1,
    "vllm.distributed": 2,
    "vllm.distributed.kv_transfer": 4,
    "vllm.distributed.kv_transfer.kv_connector.v1.base": 1,
    "vllm.model_executor": 3,
    "vllm.v1.attention": 3,
    "vllm.v1.sample": 3,
    "vllm.v1.structured_output": 3,
    "vllm.model_executor.models": 4,
    "vllm.model_executor.model_loader": 4,
    "vllm.transformers_utils": 4,
    "vllm.v1.worker": 5,
    "vllm.v1.executor": 6,
    "vllm.v1.metrics": 6,
    "vllm.engine": 6,
    "vllm.entrypoints": 7,
    "vllm.reasoning": 7,
    "vllm.benchmarks": 7,
}
# The messages between processes are the __init__ of a package whose other modules are high.
EXACT = {"vllm.v1.engine": 1}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def part_of(module: str) -> int:
    if module in EXACT:
        return EXACT[module]
    prefix = module
    while prefix not in PARTS:
        prefix = prefix.rpartition(".")[0]
    return PARTS[prefix]


def imported_modules(module: str, path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import of our own package, lazy ones included."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    found: list[tuple[str, int]] = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            found += [
                (full if (full := f"{base}.{alias.name}") in MODULES else base, node.lineno)
                for alias in node.names
            ]
    return [(name, line) for name, line in found if name.split(".")[0] == "vllm"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_its_own_part_and_lower_ones(module: str) -> None:
    own = part_of(module)
    upward = [
        f"{MODULES[module]}:{line} (part {own}) imports {name} (part {part_of(name)})"
        for name, line in imported_modules(module, MODULES[module])
        if part_of(name) > own
    ]
    assert not upward, "\n".join(upward)


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from vllm.entrypoints import llm\n")
    assert imported_modules("vllm.v1.core.bad", bad) == [("vllm.entrypoints.llm", 2)]
    assert part_of("vllm.v1.core.bad") < part_of("vllm.entrypoints.llm")


PIPELINES = sorted((ROOT / ".buildkite").glob("*.yaml"))
TEST_FOLDERS = sorted(p for p in (ROOT / "tests").iterdir() if any(p.glob("test_*.py")))


def pipeline_steps(path: Path) -> list[dict]:
    return yaml.safe_load(path.read_text())["steps"]


@pytest.mark.parametrize("folder", TEST_FOLDERS, ids=lambda p: p.name)
def test_every_test_folder_has_a_pipeline_that_runs_it(folder: Path) -> None:
    pipeline = ROOT / ".buildkite" / f"{folder.name}.yaml"
    commands = " ".join(step["command"] for step in pipeline_steps(pipeline))
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([\w-]+)", commands):
        recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        commands += recipe[1] if recipe else ""
    assert f"tests/{folder.name}" in commands


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda p: p.stem)
def test_every_path_a_pipeline_depends_on_exists(pipeline: Path) -> None:
    for step in pipeline_steps(pipeline):
        assert step["source_file_dependencies"], step["label"]
        missing = [p for p in step["source_file_dependencies"] if not (ROOT / p).exists()]
        assert not missing, f"{pipeline.name}: no such path: {missing}"


# Between processes of one engine or benchmark, through inherited pipes or nameless memory.
PICKLES = {
    "vllm.benchmarks.load",
    "vllm.entrypoints.openai.api_server_group",
    "vllm.v1.engine.core_proc",
    "vllm.v1.engine.launch",
    "vllm.v1.executor.messages",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.worker_proc",
}
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"}


def imports_a_pickle(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if UNPICKLERS & {name.split(".")[0] for name in names}:
            return True
        if isinstance(node, ast.Attribute) and node.attr in ("recv_pyobj", "send_pyobj"):
            return True
    return False


def test_nothing_unpickles_what_a_socket_brings() -> None:
    found = {name for name, path in MODULES.items() if imports_a_pickle(path)}
    assert found == PICKLES


def test_the_gate_runs_what_the_readme_tells_a_newcomer() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "make test"
    readme = (ROOT / "README.md").read_text()
    assert "```sh\nmake test\n```" in readme and "```sh\nmake serve\n```" in readme


def test_the_package_has_the_extras_that_users_ask_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "vllm"
    extras = {"cpu", "cuda", "nixl", "mooncake", "ray", "test", "bench"}
    assert extras <= set(project["optional-dependencies"])
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_what_the_architecture_page_names_is_there():
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`(?:vllm/)?([\w/]+(?:/|\.py))`", text)) | {"csrc/cpu"}
    found = [path.relative_to(ROOT).as_posix() for path in (*PACKAGE.rglob("*"), ROOT / "csrc/cpu")]
    found += [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*")]
    missing = {
        name
        for name in named
        if not any(f"/{path}".endswith(f"/{name.strip('/')}") for path in found)
    }
    assert len(named) > 40 and not missing, missing


def test_the_architecture_page_names_every_part():
    text = (ROOT / "docs/architecture.md").read_text()
    packages = [path.parent.relative_to(PACKAGE) for path in PACKAGE.glob("*/__init__.py")]
    packages += [path.parent.relative_to(PACKAGE) for path in PACKAGE.glob("v1/*/__init__.py")]
    operators = [path.relative_to(PACKAGE) for path in PACKAGE.glob("_*_op*.py")]
    unnamed = [str(path) for path in packages + operators if str(path) not in text]
    assert not unnamed, unnamed
