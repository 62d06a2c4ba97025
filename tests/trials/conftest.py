"""Trials at their full counts run only when they are asked for, by ``make trials``; a share of each is always run."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "trials: the full count, for `make trials`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "trials" in config.option.markexpr:
        return
    full = [item for item in items if item.get_closest_marker("trials") is not None]
    if full:
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if item not in full]
