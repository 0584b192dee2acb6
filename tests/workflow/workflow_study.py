"""Studies in temporary folders: write a config, run or plan it, compare its files."""

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = yaml.safe_load((REPOSITORY / "configs/smoke.yaml").read_text())

# A classification data set of one's own; write_fruit writes it.
FRUIT = {
    "name": "fruit",
    "task": "classification",
    "source": {"files": ["fruit.jsonl"]},
    "template": "Is the fruit sweet? {text}\nAnswer:",
    "label": "sweet",
    "answers": {"0": "No", "1": "Yes"},
}


@dataclass
class Study:
    """A working directory with a config and its results."""

    folder: Path
    config: dict[str, Any]
    # Variables for Snakemake and its jobs, such as those of the fixture `warm`.
    environment: dict[str, str] = field(default_factory=dict)
    repository: Path = REPOSITORY

    @property
    def snakefile(self) -> Path:
        return self.repository / "Snakefile"

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
            env={**os.environ, **self.environment, **environment},
            timeout=1200,
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
            jobs[re.sub(r"(_\d+|_round|_keeping)+$", "", name)] += 1
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
        return Study(folder, {**self.config, **changes}, self.environment, self.repository)


def new_study(folder: Path, **changes: Any) -> Study:
    """A study without results; by default the smoke config."""
    folder.mkdir()
    return Study(folder, {**SMOKE, "results": "results", **changes})


def write_fruit(path: Path) -> None:
    """A hundred and twenty rows whose label stands in the text."""
    rng = np.random.default_rng(0)
    rows = [
        {"text": f"It tastes {'sweet' if sweet else 'sour'}, {number} of them.", "sweet": sweet}
        for number, sweet in enumerate(rng.integers(0, 2, size=120).tolist())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
