"""A wheel, an editable install and a bare clone all find what is shipped beside the code."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KINDS = ("tasks", "templates", "configs", "profiles")
INNER = ("configs/presets", "configs/decoding", "configs/published")
NOT_SOURCE = (
    ".git",
    ".venv*",
    "runs",
    "demo-data",
    "build",
    "dist",
    "__pycache__",
    "*.egg-info",
    ".*_cache",
    ".coverage*",
)

LOOK = """
import json, pathlib, qformer
from qformer import resources
weights = pathlib.Path(resources.__file__).parent / "demo" / "weights"
kinds = "tasks templates configs profiles configs/presets configs/decoding configs/published".split()
found = {kind: resources.names(kind) for kind in kinds}
found["weights"] = sorted(str(path.relative_to(weights)) for path in weights.rglob("*") if path.is_file())
print(json.dumps({"home": qformer.__file__, **found}))
"""


def look(cwd: Path, path: Path | None = None) -> dict[str, list[str]]:
    """What a new process finds that stands in `cwd` and has `path` and this environment's other packages at hand."""
    # Neither this clone's editable finder nor its pytest plugins may help: -S leaves site-packages' .pth files unread.
    paths = [*([str(path)] if path else []), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    code = f"import sys; sys.path += {paths!r}\n{LOOK}"
    command = [sys.executable, "-S", "-c", code]
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=clean_environment(), check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def shipped() -> dict[str, list[str]]:
    """What the source tree holds, listed without the code under test."""
    weights = ROOT / "qformer" / "demo" / "weights"
    return {kind: sorted(path.stem for path in (ROOT / kind).glob("*.yaml")) for kind in (*KINDS, *INNER)} | {
        "weights": sorted(str(path.relative_to(weights)) for path in weights.rglob("*") if path.is_file())
    }


def pip(*arguments: str) -> None:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation")
    ran = subprocess.run(
        [sys.executable, "-m", "pip", arguments[0], *quiet, *arguments[1:]],
        capture_output=True, text=True, env=clean_environment(), check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree as a fresh clone has it, where building may leave things behind."""
    copy = tmp_path_factory.mktemp("clone") / "qformer-clone"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="module")
def sdist(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    [archive] = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a wheel, built from the source archive, was installed into."""
    wheels, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    pip("wheel", "--wheel-dir", str(wheels), str(sdist))
    [wheel] = wheels.glob("*.whl")
    pip("install", "--target", str(target), str(wheel))
    return target


def test_a_wheel_finds_cards_templates_configs_and_weights(installed: Path) -> None:
    found = look(Path("/"), installed)
    assert Path(found.pop("home")) == installed / "qformer" / "__init__.py"
    assert found == shipped()


def test_a_wheel_puts_one_name_into_site_packages(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} - {"bin"}
    assert names == {"qformer"}
    assert (installed / "qformer" / "py.typed").exists()
    assert (installed / "qformer" / "report.css").exists()
    assert (installed / "bin" / "qformer").exists()


def test_a_wheel_holds_every_module(installed: Path) -> None:
    def modules(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}

    mapped = {f"{kind}/__init__.py" for kind in KINDS}
    assert modules(installed / "qformer") == modules(ROOT / "qformer") | mapped


def test_the_source_archive_holds_what_a_contributor_needs(sdist: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(sdist, tmp_path)
    [top] = tmp_path.iterdir()
    for name in ("Makefile", "LICENSE", "CONTRIBUTING.md", "constraints/oldest.txt", "tests/conftest.py", "setup.cfg"):
        assert (top / name).exists(), name
    assert sorted(path.stem for path in (top / "tasks").glob("*.yaml")) == shipped()["tasks"]


def test_a_bare_clone_finds_them(clone: Path) -> None:
    found = look(clone)
    assert Path(found.pop("home")) == clone / "qformer" / "__init__.py"
    assert found == shipped()


def test_an_editable_install_finds_them_from_anywhere(clone: Path, tmp_path: Path) -> None:
    """The finder that an editable install puts into site-packages, made and used without installing anything."""
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    [wheel] = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    paths = [str(tmp_path / "site"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    [finder] = (tmp_path / "site").glob("__editable___*_finder.py")
    code = f"import sys; sys.path += {paths!r}; import {finder.stem}; {finder.stem}.install()\n{LOOK}"
    command = [sys.executable, "-S", "-c", code]
    ran = subprocess.run(command, cwd="/", capture_output=True, text=True, env=clean_environment(), check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert Path(found.pop("home")) == clone / "qformer" / "__init__.py"
    assert found == shipped()


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_setup_cfg_names_every_folder_of_the_package() -> None:
    listed = set(settings()["options"]["packages"].split())
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "qformer").rglob("*.py")}
    assert listed == {".".join(folder.parts) for folder in folders} | {f"qformer.{kind}" for kind in KINDS}


def test_every_requirement_is_imported_somewhere() -> None:
    """What nothing imports is a download for nothing."""
    modules = {"pillow": "PIL"}
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "qformer").rglob("*.py"))
    for requirement in settings()["options"]["install_requires"].split():
        name = requirement.split(">=")[0]
        assert re.search(rf"^\s*(import|from) {modules.get(name, name)}\b", code, flags=re.MULTILINE), name


TOOLS = {"coverage", "hypothesis", "mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "setuptools"}
"""What a contributor works with, in whatever version comes."""


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """So that what `make test-all` runs on is what setup.cfg promises."""
    lines = (ROOT / "constraints" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if "==" in line)
    extras = settings()["options.extras_require"]
    asked = [settings()["options"]["install_requires"], *(extras[name] for name in ("video", "quantization", "dev"))]
    bounds = [line.split(">=") for lines in asked for line in lines.split()]
    bounds = [(name, bound) for name, bound in bounds if name not in TOOLS]

    def comparable(version: str) -> tuple[int, ...]:
        numbers = [int(number) for number in version.split(".")]
        return tuple(numbers + [0] * (4 - len(numbers)))

    assert {"torch", "av", "bitsandbytes", "torchmetrics"} <= {name for name, _ in bounds}
    for name, bound in bounds:
        assert name in oldest and comparable(bound) == comparable(oldest[name]), name
