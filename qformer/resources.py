"""Finding the shipped cards, templates, configs and weights: in a wheel, an editable install or a bare clone."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from qformer.errors import ConfigError, did_you_mean


def folder(kind: str) -> Path:
    """Where the shipped files of a kind ("tasks", "templates", "configs", "configs/published", "profiles") are.

    An installed package maps the four top-level folders to `qformer.tasks` and so on; in a clone that was never
    installed they stand beside the package.
    """
    top, _, inner = kind.partition("/")
    beside = Path(__file__).parent.parent / top
    if (beside / "__init__.py").exists() and beside.parent.joinpath("setup.cfg").exists():
        return beside / inner
    return Path(str(resources.files(f"qformer.{top}"))) / inner


def names(kind: str) -> list[str]:
    """The names of all shipped files of a kind, without their ending, sorted."""
    return sorted(path.stem for path in folder(kind).glob("*.yaml"))


def find(kind: str, name: str, what: str) -> Path:
    """The file behind a name: a path to a YAML file as it is, otherwise a shipped one of that name.

    Raises:
        ConfigError: there is no such file, and none shipped by that name.
    """
    given = Path(name)
    if given.suffix in (".yaml", ".yml"):
        if not given.is_file():
            told = f"{what} '{name}': there is no such file; check its path, or take a shipped one."
            raise ConfigError(f"{told}{did_you_mean(given.stem, names(kind))}")
        return given
    shipped = folder(kind) / f"{name}.yaml"
    if not shipped.is_file():
        raise ConfigError(f"unknown {what} '{name}'.{did_you_mean(name, names(kind))}")
    return shipped


def located(name: str) -> str:
    """A tower's name or directory as it is; `demo:NAME` stands for the shipped tiny tower of that name.

    Raises:
        ConfigError: no tower is shipped by that name.
    """
    if not name.startswith("demo:"):
        return name
    shipped = Path(__file__).parent / "demo" / "weights"
    directory = shipped / name.removeprefix("demo:")
    if not directory.is_dir():
        known = [path.name for path in shipped.iterdir() if path.is_dir()] if shipped.is_dir() else []
        raise ConfigError(f"unknown shipped tower '{name}'.{did_you_mean(directory.name, known)}")
    return str(directory)
