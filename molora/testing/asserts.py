"""Assertions for tests, ours and those of plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from molora.terminal import Finding


def assert_conforms(
    spec: str, options: Mapping[str, Any] | None = None, parts: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Raises AssertionError with every way in which a modality plugin breaks its contract; see `check_modality`."""
    # Here, because plugins live in files that import this one, and a plugin must not bring the model with it.
    from molora.plugin_kit.check import check_modality

    _assert_kept(check_modality(spec, options, parts), f"modality {spec!r}")


def assert_router_conforms(spec: str, options: Mapping[str, Any] | None = None) -> None:
    """Raises AssertionError with every way in which a router plugin breaks its contract; see `check_router`."""
    from molora.plugin_kit.check import check_router

    _assert_kept(check_router(spec, options), f"router {spec!r}")


def _assert_kept(findings: Sequence[Finding], what: str) -> None:
    faults = [finding for finding in findings if finding.ok is False]
    listed = "".join(f"\n- {finding.what}: {finding.found}" for finding in faults)
    assert not faults, f"{what} does not conform:{listed}"


def assert_close(ours: Tensor, reference: Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    """Raises AssertionError unless max |Δ| ≤ tolerance · max(1, max |reference|)."""
    assert ours.shape == reference.shape, f"{what}: shapes {tuple(ours.shape)} and {tuple(reference.shape)} differ"
    if not reference.numel():
        return
    worst = float((ours - reference).detach().abs().max())
    allowed = tolerance * max(1.0, float(reference.detach().abs().max()))
    assert worst <= allowed, f"{what}: largest difference {worst:.3g}, allowed {allowed:.3g}"
