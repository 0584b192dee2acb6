# What goes into the report of `snakemake --report`, under which caption and labels. No rules.
FORMATS = {".html": "HTML", ".csv": "csv"}
CAPTIONS = Path(workflow.basedir) / "workflow/report"


def caption(*names):
    """Caption under the first of the names that there is one for, seen from the rules."""
    return next(
        f"../report/{name}.rst"
        for name in names
        if (CAPTIONS / f"{name}.rst").is_file()
    )


def report_table(path):
    """Put the tables into the report of `snakemake --report`: to read, and as numbers to download."""
    name = Path(path)
    if name.suffix not in FORMATS:
        return path
    return report(
        path,
        caption=caption(f"{name.stem}_table", "table"),
        category="Tables",
        labels={"table": name.stem, "format": FORMATS[name.suffix]},
    )


def report_figure(path):
    """Put the vector figures into the report of `snakemake --report`, one folder per kind."""
    name = Path(path)
    if name.suffix != ".svg":
        return path
    labels = figure_labels(name.stem)
    return report(
        path,
        caption=caption(labels["figure"], "figure"),
        category="Figures",
        subcategory=labels["figure"],
        labels=labels,
    )


def figure_labels(stem):
    """What the name of a figure says: its kind, and the scenario, seed and method that it is of."""
    known = {}
    for slug, (scenario, seed) in SCENARIOS.items():
        known[scenario.slug] = {"scenario": scenario.slug}
        known[slug] = {"scenario": scenario.slug, "seed": str(seed)}
    # The longest: the name of a scenario is how those of its seeds begin.
    slugs = [slug for slug in known if stem.startswith(f"{slug}-")]
    prefix = max(slugs, key=len, default="")
    rest = stem.removeprefix(f"{prefix}-" if prefix else "")
    method, _, kind = rest.rpartition("-")
    labels = {"figure": kind, **known.get(prefix, {}), "method": method}
    return {name: value for name, value in labels.items() if value}


def report_settings(path):
    """Put the page of the settings into the report of `snakemake --report`."""
    labels = {"settings": "of the study"}
    return report(path, caption=caption("settings"), category="Settings", labels=labels)
