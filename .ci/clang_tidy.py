"""clang-tidy over the sources of the last build, once per file; loops are checked at their highest level."""

import concurrent.futures
import json
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> int:
    databases = sorted(ROOT.glob("build/*/compile_commands.json"), key=lambda p: p.stat().st_mtime)
    if not databases:
        print("clang_tidy: build/ must hold a compile_commands.json, got none; run `make build`", file=sys.stderr)
        return 2
    known = json.loads(databases[-1].read_text())
    # CUDA sources are read as the emulator's C++: clang-tidy doesn't know nvcc's options.
    entries = {entry["file"]: entry for entry in known if "nvcc" not in " ".join(entry["command"].split()[:2])}
    tidy = pathlib.Path(sys.executable).parent / "clang-tidy"

    def check(entry: dict[str, str]) -> tuple[str, subprocess.CompletedProcess[str]]:
        flags = [a for a in shlex.split(entry["command"])[1:] if a not in ("-c", entry["file"])]
        del flags[flags.index("-o") : flags.index("-o") + 2]
        command = [str(tidy), "--quiet", entry["file"], "--", *flags, "-Wno-unknown-warning-option"]
        return entry["file"], subprocess.run(command, capture_output=True, text=True, cwd=entry["directory"])

    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, done in pool.map(check, entries.values()):
            if done.returncode:
                failed += 1
                print(f"{file}\n{done.stdout}{done.stderr}")
    print(f"clang-tidy: {len(entries)} files, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
