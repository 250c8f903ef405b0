"""Thousands of small files are written here, and none has to survive a power failure."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
