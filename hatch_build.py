"""Compiles the kernel as the package is installed or a wheel of it is made.

The compiler comes as a package; where it does not, a clang of the system serves (CXX names it). KLMETRIC_NO_KERNEL=1
leaves the kernel out, and KLMETRIC_PLATFORM makes a wheel for another platform.
"""

import importlib.util
import os
import platform
import runpy
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Platform(NamedTuple):
    """What zig compiles for, the tag of a wheel that fits, and the name of the library."""

    target: str | None
    tag: str
    library: str


PLATFORMS = {
    "linux-x86_64": Platform("x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64", "kernel.so"),
    "linux-aarch64": Platform("aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64", "kernel.so"),
    "macosx-x86_64": Platform("x86_64-macos.11.0", "macosx_11_0_x86_64", "kernel.dylib"),
    "macosx-arm64": Platform("aarch64-macos.11.0", "macosx_11_0_arm64", "kernel.dylib"),
    "win-amd64": Platform("x86_64-windows-gnu", "win_amd64", "kernel.dll"),
}
ROOM = "klmetric/arithmetic"


class CustomBuildHook(BuildHookInterface):
    """The kernel beside the Python that calls it: in src for an editable install, else in the wheel."""

    def dependencies(self) -> list[str]:
        """A compiler where one is wanted and known to come as a package: elsewhere nothing may fail for lack of it."""
        wanted = _zig_platform() and not os.environ.get("KLMETRIC_NO_KERNEL")
        return self.metadata.config["project"]["optional-dependencies"]["wheels"] if wanted else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and put the library where `version` ("editable" or "standard") has its files."""
        platform_of_zig = _zig_platform() if _has_zig() or os.environ.get("KLMETRIC_PLATFORM") else None
        target, tag, name = platform_of_zig or _this_platform()
        source = Path(self.root, "src", ROOM)
        self.folder = tempfile.TemporaryDirectory()  # goes with the hook, when the wheel is written
        library = (source if version == "editable" else Path(self.folder.name)) / name
        library.unlink(missing_ok=True)
        try:
            if os.environ.get("KLMETRIC_NO_KERNEL"):
                raise OSError("KLMETRIC_NO_KERNEL is set")
            runpy.run_path(str(source / "kernel" / "build.py"))["build"](library, target)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("KLMETRIC_PLATFORM"):
                raise
            reason = "its compiler failed" if isinstance(error, subprocess.CalledProcessError) else error
            print(f"klmetric is installed without its kernel, and is slower: {reason}.", file=sys.stderr)
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"
        build_data["force_include"][str(library)] = f"{ROOM}/{name}"


def _has_zig() -> bool:
    return importlib.util.find_spec("ziglang") is not None


def _this_platform() -> Platform:
    """That of this machine, for its own compiler."""
    suffix = {"win32": "dll", "darwin": "dylib"}.get(sys.platform, "so")
    return Platform(None, sysconfig.get_platform().replace("-", "_").replace(".", "_"), f"kernel.{suffix}")


def _zig_platform() -> Platform | None:
    """The platform that zig is to compile for; None where it is not asked or cannot."""
    asked = os.environ.get("KLMETRIC_PLATFORM")
    if asked:
        return PLATFORMS[asked]
    system, *_, machine = sysconfig.get_platform().split("-")
    if system == "linux" and platform.libc_ver()[0] != "glibc":
        return None
    return PLATFORMS.get(f"{system}-{platform.machine() if machine == 'universal2' else machine}")
