"""Studies in temporary folders: write a config, run or plan it, compare its files."""

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = yaml.safe_load((REPOSITORY / "configs/smoke.yaml").read_text())


@dataclass
class Study:
    """A working directory with a config and its results."""

    folder: Path
    config: dict[str, Any]

    @property
    def snakefile(self) -> Path:
        return REPOSITORY / "Snakefile"

    @property
    def results(self) -> Path:
        return self.folder / self.config["results"]

    def command(self, *arguments: str) -> list[str]:
        """The Snakemake command for this study."""
        configfile = self.folder / "config.yaml"
        configfile.write_text(yaml.safe_dump(self.config))
        return [
            "snakemake",
            *arguments,
            "--snakefile",
            str(self.snakefile),
            "--directory",
            str(self.folder),
            "--cores",
            "2",
            "--configfile",
            str(configfile),
        ]

    def snakemake(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Snakemake and wait."""
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=300,
        )

    def run(self) -> None:
        """Run the whole study; fail with what Snakemake said."""
        done = self.snakemake("--quiet", "rules")
        assert done.returncode == 0, done.stderr + self.logs()

    def planned(self) -> Counter[str]:
        """Rules that would run, with how often; shards of a rule count as the rule."""
        done = self.snakemake("--dry-run")
        assert done.returncode == 0, done.stderr
        jobs: Counter[str] = Counter()
        for name in re.findall(r"^(?:local)?rule (\w+):$", done.stdout + done.stderr, re.MULTILINE):
            jobs[re.sub(r"(_\d+)+$", "", name)] += 1
        assert jobs or "Nothing to be done" in done.stdout + done.stderr
        return jobs

    def logs(self) -> str:
        """Everything that the jobs wrote into their logs."""
        paths = sorted(self.results.glob("logs/**/*.log"))
        return "\n".join(f"== {path}\n{path.read_text()}" for path in paths)

    def contents(self, *patterns: str) -> dict[str, bytes]:
        """Bytes of the files that match, by path under the results folder."""
        return {
            str(path.relative_to(self.results)): path.read_bytes()
            for pattern in patterns
            for path in sorted(self.results.glob(pattern))
            if path.is_file()
        }

    def copy(self, folder: Path, **changes: Any) -> "Study":
        """A copy with everything, times and Snakemake's records included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Study(folder, {**self.config, **changes})


def new_study(folder: Path, **changes: Any) -> Study:
    """A study without results; by default the smoke config."""
    folder.mkdir()
    return Study(folder, {**SMOKE, "results": "results", **changes})
