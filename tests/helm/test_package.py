"""The chart as a package: it lints, packs and installs, and is of the same version as what it deploys."""

import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "helm/kvarto/examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("values", [None, *EXAMPLES], ids=lambda path: path.stem if path else "defaults")
def test_lints_strictly(chart, values):
    done = chart.run("lint", "--strict", str(chart.CHART), *(["--values", str(values)] if values else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


def test_package_holds_schema_and_examples_and_installs(chart, tmp_path):
    done = chart.run("package", str(chart.CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("kvarto-*.tgz")
    shown = chart.run("install", "kvarto", str(archive), "--dry-run=client", "--set", "config.tensor_parallel_size=0")
    assert "tensor_parallel_size" in shown.stderr and shown.returncode != 0
    installed = chart.run("install", "kvarto", str(archive), "--dry-run=client")
    assert installed.returncode == 0, installed.stderr
    assert "kind: RayService" in installed.stdout


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
def test_dry_run_ends_with_commands_to_try(chart, values):
    done = chart.run("install", "kvarto", str(chart.CHART), "--dry-run=client", "--values", str(values))
    assert done.returncode == 0, done.stderr
    notes = done.stdout.split("NOTES:")[1]
    assert "port-forward service/kvarto 8000" in notes
    assert ("Bearer $KEY" in notes) == ("apiKey" in values.read_text())


def test_refuses_a_kubernetes_that_is_too_old(chart):
    assert "kubeVersion" in chart.template(None, "--kube-version", "1.28.9").stderr


def test_app_version_is_the_python_package_s(project):
    assert yaml.safe_load((ROOT / "helm/kvarto/Chart.yaml").read_text())["appVersion"] == project["version"]


def test_ray_version_is_the_one_that_the_project_pins(project):
    (pin,) = [line for line in project["dependencies"] if line.startswith("ray")]
    version = yaml.safe_load((ROOT / "helm/kvarto/values.yaml").read_text())["ray"]["version"]
    assert pin == f"ray[serve]=={version.rsplit('.', 1)[0]}.*"
