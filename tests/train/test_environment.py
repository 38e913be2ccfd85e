"""What a run notes about its environment, and what the doctor finds."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform

import pytest

from lmobj.train import environment


def test_environment_names_versions_and_devices() -> None:
    found = environment.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["python"] == platform.python_version()
    assert found["packages"]["jax"] == importlib.metadata.version("jax")
    assert found["devices"] == "8 x cpu (cpu)"
    assert "--xla_force_host_platform_device_count=8" in found["flags"]["XLA_FLAGS"]


def _find(cache: pathlib.Path) -> dict[str, environment.Check]:
    return {check.subject: check for check in environment.doctor(cache)}


def test_doctor_finds_this_machine_well(tmp_path: pathlib.Path) -> None:
    checks = _find(tmp_path / "not" / "yet")
    assert all(check.ok is not False for check in checks.values())
    assert checks["devices"].finding == "8 x cpu (cpu)"
    assert "can be written" in checks["data cache"].finding
    assert not (tmp_path / "not").exists(), "the doctor makes nothing"


def test_doctor_tells_a_cache_that_cannot_be_a_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    check = _find(tmp_path / "file")["data cache"]
    assert check.ok is False
    assert "cannot be written" in check.finding


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_doctor_tells_a_cache_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o500)
    assert _find(tmp_path / "cache")["data cache"].ok is False


@pytest.mark.parametrize(
    ("versions", "subject", "ok", "part"),
    [
        ({"flax": None}, "flax", False, "not installed; run `pip install flax`"),
        ({"jax": "0.9.1", "jaxlib": "0.9.1"}, "jax", None, "tested on 0.10.2 to 0.11"),
        ({"jax": "0.12.0", "jaxlib": "0.12.0"}, "jax", None, "tested on 0.10.2 to 0.11"),
        ({"jax": "0.11.3", "jaxlib": "0.11.3"}, "jax", True, "0.11.3"),
        ({"jax": "0.11.0", "jaxlib": "0.10.2"}, "jaxlib", False, "does not go with jax 0.11.0"),
    ],
)
def test_doctor_tells_packages_that_are_missing_or_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, versions: dict, subject: str, ok: bool | None, part: str
) -> None:
    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: versions[name] if name in versions else real(name))
    check = _find(tmp_path)[subject]
    assert check.ok is ok
    assert part in check.finding
