"""Finds the TensorRT headers that libmra_trt is built with, and downloads them where there are none.

    python mra_export/plugins/tensorrt/fetch_headers.py

No TensorRT wheel ships its headers; the wheel of kernel-lens carries those of TensorRT 10.14 (Apache-2.0). Needs pip only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

WHEEL = "kernel-lens==2.0.1"
INSIDE = "/include/tensorrt/"
HEADER = "NvInferPluginBase.h"
"""Came with TensorRT 10: older headers are passed over."""
DOWNLOAD = Path(__file__).resolve().parents[3] / ".downloads" / "tensorrt-headers"


def find() -> Path | None:
    """The folder with the headers, in the order in which CMakeLists.txt looks, or None."""
    given = [
        Path(os.environ[name], part)
        for name, part in (("TENSORRT_INCLUDE_DIR", ""), ("TENSORRT_ROOT", "include"))
        if name in os.environ
    ]
    system = [Path(prefix, "include") for prefix in ("/usr/local", "/usr")]
    multiarch = Path("/usr/include", sysconfig.get_config_var("MULTIARCH") or "")
    return next((folder for folder in (*given, *system, multiarch, DOWNLOAD) if (folder / HEADER).is_file()), None)


def fetch() -> None:
    """Download the headers into DOWNLOAD. Raises CalledProcessError with pip's own words where there is no network."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            headers = {Path(name).name: archive.read(name) for name in archive.namelist() if INSIDE in name}
    DOWNLOAD.mkdir(parents=True, exist_ok=True)
    for name in sorted(headers, key=lambda name: name == HEADER):  # the file that find() looks for goes last
        (DOWNLOAD / name).write_bytes(headers[name])


if __name__ == "__main__" and find() is None:
    fetch()
