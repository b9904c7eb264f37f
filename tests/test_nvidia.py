from types import SimpleNamespace

import pytest

from cifar_flax import packages
from cifar_flax.diagnosis import nvidia


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A machine with an NVIDIA GPU, as far as its files tell; `gpu.driver` is its version, `gpu.packages` Python's."""
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
    ("driver", "plugins", "reason"),
    [
        ("580.65.06", {}, f"JAX's plugin for it is missing; {INSTALL.format(13)}"),
        ("535.104.05", {}, f"JAX's plugin for it is missing; {INSTALL.format(12)}"),
        (
            "570.10",
            {CUDA13: "0.10.2"},
            f"{CUDA13} needs a driver from 580 on; update it to 580 or newer, or {INSTALL.format(12)}",
        ),
        ("470.256.02", {CUDA12: "0.10.2"}, "the driver is too old; update it to 580 or newer"),
        (
            "580.65.06",
            {CUDA12: "0.10.1"},
            f"{CUDA12} is 0.10.1, jaxlib 0.10.2: they must be equal; {INSTALL.format(13)}",
        ),
        ("570.10", {CUDA12: "0.10.2"}, "JAX does not say why; JAX_PLATFORMS=cuda makes it do so"),
    ],
)
def test_why_a_gpu_is_not_used(gpu, driver, plugins, reason):
    gpu.driver.write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build  (root)\n")
    gpu.packages |= plugins
    assert nvidia.why_unused("") == f"driver {driver}, not used: {reason}"


def test_what_jax_says_comes_last(gpu):
    gpu.packages[CUDA13] = "0.10.2"
    assert nvidia.why_unused("cuDNN is too old") == "driver 580.65.06, not used: cuDNN is too old"
    gpu.driver.write_text("something else")
    assert nvidia.why_unused("cuDNN is too old") == "driver of unknown version, not used: cuDNN is too old"


@pytest.mark.parametrize(("variable", "value"), [("JAX_PLATFORMS", "cpu"), ("CUDA_VISIBLE_DEVICES", "")])
def test_a_variable_keeps_the_gpu_from_being_used(gpu, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert f"not used: {variable}={value} " in nvidia.why_unused("")


@pytest.mark.parametrize(
    ("vendor", "kind", "is_told"),
    [("0x10de", "0x030200", True), ("0x1002", "0x030000", False), ("0x10de", "0x040300", False)],
)
def test_a_gpu_without_a_driver(gpu, vendor, kind, is_told):
    gpu.driver.unlink()
    gpu.device.unlink()
    device = nvidia.PCI / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    assert nvidia.why_unused("") == ("there is one, but its driver is not installed" if is_told else None)
