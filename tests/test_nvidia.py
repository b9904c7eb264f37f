"""Test the reasons that the doctor reports for an unused NVIDIA GPU."""

import logging
from types import SimpleNamespace

import jax
import pytest

from cifar_flax import packages
from cifar_flax.diagnosis import nvidia
from cifar_flax.errors import UserError
from cifar_flax.runtime import devices


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """Simulate a machine with an NVIDIA GPU by its driver's files (`gpu.driver`, `gpu.device`) and `gpu.packages`."""
    machine = SimpleNamespace(driver=tmp_path / "version", device=tmp_path / "nvidia0", packages={"jaxlib": "0.10.2"})
    machine.driver.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Fri Jul\nGCC version: 12.3.0\n"
    )
    machine.device.touch()
    monkeypatch.setattr(nvidia, "DRIVER", machine.driver)
    monkeypatch.setattr(nvidia, "DEVICES", (machine.device,))
    monkeypatch.setattr(nvidia, "PCI", tmp_path / "pci")
    monkeypatch.setattr(packages, "version", lambda name: machine.packages.get(name))
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return machine


CUDA12, CUDA13 = "jax-cuda12-plugin", "jax-cuda13-plugin"
INSTALL = 'pip install -U "jax[cuda{}]"'


@pytest.mark.parametrize(
    ("driver", "plugins", "parts"),
    [
        ("580.65.06", {}, ("plugin", INSTALL.format(13))),
        ("535.104.05", {}, ("plugin", INSTALL.format(12))),
        ("570.10", {CUDA13: "0.10.2"}, (CUDA13, "580", INSTALL.format(12))),
        ("470.256.02", {CUDA12: "0.10.2"}, ("driver is too old", "580")),
        ("580.65.06", {CUDA12: "0.10.1"}, (CUDA12, "0.10.1", "0.10.2", INSTALL.format(13))),
        ("570.10", {CUDA12: "0.10.2"}, ("JAX_PLATFORMS=cuda",)),
    ],
)
def test_why_a_gpu_is_not_used(gpu, driver, plugins, parts):
    gpu.driver.write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build  (root)\n")
    gpu.packages |= plugins
    reason = nvidia.why_unused("")
    for part in (f"driver {driver}", *parts):
        assert part in reason


def test_jaxs_warning_is_the_reason_if_there_is_no_other(gpu):
    gpu.packages[CUDA13] = "0.10.2"
    for content, driver in ((None, "580.65.06"), ("something else", "unknown")):
        if content is not None:
            gpu.driver.write_text(content)
        reason = nvidia.why_unused("cuDNN is too old")
        assert driver in reason
        assert reason.endswith("cuDNN is too old")


@pytest.mark.parametrize(
    ("plugins", "parts"),
    [
        ({}, ("plugin is not installed", INSTALL.format(13))),
        ({CUDA13: "0.10.1"}, (f"{CUDA13} is 0.10.1", "jaxlib 0.10.2")),
        ({CUDA12: "0.10.2"}, ("unknown backend cuda", "Exception in the plugin no driver")),
    ],
)
def test_a_requested_gpu_that_jax_cannot_use(gpu, monkeypatch, caplog, plugins, parts):
    """The error line has JAX's log, whose tracebacks are not printed."""

    def fail():
        try:
            raise RuntimeError("no\ndriver")
        except RuntimeError:
            logging.getLogger("jax._src.xla_bridge").exception("Exception in the plugin")
        raise RuntimeError("unknown backend cuda")

    gpu.packages |= plugins
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=cuda,cpu: ") as raised:
        devices.all_devices()
    for part in parts:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not caplog.records


@pytest.mark.parametrize(("variable", "value"), [("JAX_PLATFORMS", "cpu"), ("CUDA_VISIBLE_DEVICES", "")])
def test_environment_variables_may_hide_the_gpu(gpu, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert f"{variable}={value} " in nvidia.why_unused("")


@pytest.mark.parametrize(
    ("vendor", "kind", "is_reported"),
    [("0x10de", "0x030200", True), ("0x1002", "0x030000", False), ("0x10de", "0x040300", False)],
)
def test_a_gpu_without_a_driver(gpu, vendor, kind, is_reported):
    gpu.driver.unlink()
    gpu.device.unlink()
    device = nvidia.PCI / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    reason = nvidia.why_unused("")
    assert "driver" in reason if is_reported else reason is None
