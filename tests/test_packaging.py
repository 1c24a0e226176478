"""What is installed, and what of others' code it leans on."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import lavin_ds

ROOT = Path(__file__).parents[1]
PUBLIC = {"_exit", "_replace"}  # of os and of named tuples: documented


def sources() -> list[Path]:
    files = (ROOT / folder for folder in ("lavin_ds", "data_prep", "launch"))
    return sorted(path for folder in files for path in folder.rglob("*.py"))


def private_names(tree: ast.AST) -> set[str]:
    """Names with a leading underscore that are read off an object or imported."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= set((node.module or "").split(".")) | {alias.name for alias in node.names}
    return {name for name in names if re.match("_[^_]", name)}


def own_names(tree: ast.AST) -> set[str]:
    """Names that a file defines: functions, classes, fields, attributes it sets on self."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def test_every_private_name_of_another_package_is_listed_with_its_replacement():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources()}
    ours = set().union(*map(own_names, trees.values()))
    listed = (ROOT / "docs" / "private-apis.md").read_text(encoding="utf-8")
    used = {name: path for path, tree in trees.items() for name in private_names(tree) - ours - PUBLIC}
    missing = {name: str(path.relative_to(ROOT)) for name, path in used.items() if f"`{name}`" not in listed}
    assert not missing, f"add these to docs/private-apis.md: {missing}"


def test_docs_list_no_private_name_that_is_no_longer_used():
    used = set().union(*(private_names(ast.parse(path.read_text(encoding="utf-8"))) for path in sources()))
    listed = re.findall(r"`(_\w+)`", (ROOT / "docs" / "private-apis.md").read_text(encoding="utf-8"))
    assert set(listed) <= used, f"remove these from docs/private-apis.md: {set(listed) - used}"


def test_a_wheel_holds_recipes_assets_jobs_and_the_licence(tmp_path):
    source = tmp_path / "source"  # building leaves folders beside setup.py
    for folder in ("lavin_ds", "data_prep", "launch", "ds_configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"lavin_ds-{lavin_ds.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"lavin_ds/recipes/{path.name}" for path in (ROOT / "lavin_ds" / "recipes").glob("*.yaml")}
    expected |= {f"lavin_ds/ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}
    expected |= {
        "lavin_ds/assets/tiny/llama/model.safetensors",
        "lavin_ds/assets/tiny/llama/tokenizer.model",
        "lavin_ds/assets/tiny/vit.safetensors",
        "lavin_ds/data_prep/pipeline.py",
        "lavin_ds/launch/train.py",
        "lavin_ds/launch/train.sbatch",
    }
    assert not expected - names
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}


def test_product_code_does_not_import_test_packages():
    imported = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    assert not imported & {"transformers", "pytest", "hypothesis", "gguf", "accelerate"}
