"""Stage `report`: tables, pictures and costs on a page, and its copy in MLflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import storage, tracking
from pipeline.config import Config
from pipeline.evaluate.records import Record, find_records
from pipeline.evaluate.table import Table, plural
from pipeline.log import log
from pipeline.report.costs import cost_table, measure_costs
from pipeline.report.deployed import deployed_table
from pipeline.report.exports import find_deployed
from pipeline.report.pictures import draw_pictures, model_speeds
from pipeline.report.render import Page, html, markdown
from pipeline.report.tables import left_out, paper_numbers, score_tables

TITLE = "SlotMatch: our numbers beside the paper's"


def report(config: Config, folder: str | Path | None = None, *, latency_runs: int = 5) -> dict[str, Any]:
    """Writes `report.md`, `report.html` and pictures, and logs them to MLflow as one run named "report".

    Args:
        folder: where to; `<storage.root>/report`, or `./report` where the root is remote.
        latency_runs: measured passes of each model of Table 2, and frames that each deployed form streams at least;
            0 measures nothing.

    Returns `uri` (the HTML file), `markdown`, and the numbers of `tables`, `pictures` and `records`.
    """
    target = report_folder(config) if folder is None else Path(folder).expanduser().absolute()
    target.mkdir(parents=True, exist_ok=True)
    records = find_records(config)
    pairs, notes = measure_costs(config, latency_runs)
    deployed = find_deployed(records, config.distill.beta)
    # An exported form is its model once more: beside it in that table, and nowhere else.
    models = [record for record in records if record.run_id not in deployed.form_ids]
    tables = score_tables(config, models)
    tables.insert(_place_of_table_2(tables), cost_table(paper_numbers(), pairs, notes))
    if deployed.models:
        table = deployed_table(deployed.models, latency_runs, notes=deployed.notes)
        tables.append(replace(table, run_ids=deployed.run_ids))
    pictures = draw_pictures(config, models, model_speeds(models, latency_runs))
    page = Page(TITLE, _intro(config, records), tables, pictures, left_out(records, tables))
    files = {"report.md": markdown(page).encode(), "report.html": html(page).encode()}
    files |= {picture.link: picture.content for picture in pictures}
    for name, content in files.items():
        storage.write_bytes(str(target / name), content)
    _log_to_mlflow(config, [target / name for name in files])
    log(f"report: {plural(len(records), 'evaluation')} in {target / 'report.html'}")
    return {
        "uri": str(target / "report.html"),
        "markdown": str(target / "report.md"),
        "tables": len(tables),
        "pictures": len(pictures),
        "records": len(records),
    }


def report_folder(config: Config) -> Path:
    root = config.storage.root
    return Path("report").absolute() if storage.is_remote(root) else Path(storage.absolute(root)) / "report"


def _place_of_table_2(tables: list[Table]) -> int:
    return sum(table.name == "Table 1" for table in tables)


def _intro(config: Config, records: list[Record]) -> list[str]:
    made = f"Made {storage.timestamp()} from {plural(len(records), 'evaluation')} of the MLflow experiment "
    made += f"{config.mlflow.experiment!r}, below {config.storage.root}."
    if not records:
        made += " There is no evaluation yet; this makes some: `python -m jobs.evaluate CONFIG`"
    return [
        made,
        "Scores are percent. “Ours” was computed by this code, “paper” is what SlotMatch (Grigore, Madan et al.) "
        "prints: means over three seeds of models of its own size and training time, under its own protocol. Two "
        "numbers compare where data set, protocol, clips and model size are the same; what ours are is said below each "
        "table. Bold: the best of ours in a column under the protocol of most rows. Rows in the end, named after what "
        "they do, are trivial segmentations: what scores less has learned nothing. – means that there is no run.",
    ]


def _log_to_mlflow(config: Config, files: list[Path]) -> None:
    client = tracking.connect(config)
    run = client.create_run(tracking.experiment_id(config), run_name="report", tags={"role": "report"})
    for file in files:
        client.log_artifact(run.info.run_id, str(file))
    client.set_terminated(run.info.run_id)
