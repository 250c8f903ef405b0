"""Editable installs need ``package_dir`` here: see docs/decisions/0001-shared-megatron-name.md."""

from setuptools import Extension, find_namespace_packages, setup

setup(
    # A plain .pth file instead of setuptools' import hook, which would run after
    # site-packages/megatron (megatron-core's) and so never execute our megatron/__init__.py.
    package_dir={"": "."},
    packages=find_namespace_packages(include=["megatron", "megatron.*"]),
    ext_modules=[
        Extension(
            "megatron.stream._shuffle",
            ["megatron/stream/_shuffle.cpp"],
            extra_compile_args=["-O3", "-std=c++17"],
        ),
    ],
)
