"""Many runs at once: SQL by DuckDB over the files of their folders, which are only read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.core.errors import InputError
from batchlab.core.run import RUN_FILE, STEPS_FILE

if TYPE_CHECKING:
    import duckdb

OVERVIEW = """
SELECT run, job, status, batch_size, learning_rate, steps, predicted_steps, target_step, target_seconds, seconds
FROM runs ORDER BY created, run
"""

_EMPTY = """
CREATE TABLE steps (
    run VARCHAR, step BIGINT, position BIGINT, batch_size BIGINT, lr DOUBLE, loss DOUBLE, grad_norm DOUBLE,
    noise_scale DOUBLE, noise_low DOUBLE, noise_high DOUBLE, seconds DOUBLE, examples_per_second DOUBLE,
    skipped BOOLEAN, capped BOOLEAN, valid JSON
)
"""

_STEPS = """
INSERT INTO steps
SELECT
    parse_dirpath(filename)[len($root) + 2:] AS run, step, position, batch_size,
    TRY_CAST(lr AS DOUBLE) AS lr, TRY_CAST(loss AS DOUBLE) AS loss, TRY_CAST(grad_norm AS DOUBLE) AS grad_norm,
    TRY_CAST(noise_scale->>'value' AS DOUBLE) AS noise_scale,
    TRY_CAST(noise_scale->>'low' AS DOUBLE) AS noise_low,
    TRY_CAST(noise_scale->>'high' AS DOUBLE) AS noise_high,
    seconds, examples_per_second, skipped, coalesce(capped, FALSE) AS capped, valid
FROM read_json(
    $files, format = 'newline_delimited', filename = true, ignore_errors = true,
    columns = {
        step: 'BIGINT', position: 'BIGINT', batch_size: 'BIGINT', lr: 'VARCHAR', loss: 'VARCHAR',
        grad_norm: 'VARCHAR', noise_scale: 'JSON', seconds: 'DOUBLE', examples_per_second: 'DOUBLE',
        skipped: 'BOOLEAN', capped: 'BOOLEAN', valid: 'JSON'
    }
)
WHERE step IS NOT NULL
"""

_RUNS = """
CREATE TABLE runs AS
WITH files AS (
    SELECT parse_dirpath(filename)[len($root) + 2:] AS run, *
    FROM read_json(
        $files, format = 'unstructured', filename = true, maximum_object_size = 1000000000,
        columns = {
            name: 'VARCHAR', created: 'VARCHAR', status: 'VARCHAR', seed: 'BIGINT', world_size: 'BIGINT',
            device: 'VARCHAR', git_commit: 'VARCHAR', plan: 'JSON', summary: 'JSON'
        }
    )
), told AS (
    SELECT *, plan->'reasons'->'predicted_steps'->'inputs' AS planned FROM files
), taken AS (
    SELECT run, max(step) AS steps, max(position) AS examples, sum(seconds) AS seconds,
           count(*) FILTER (skipped) AS skipped_steps
    FROM steps GROUP BY run
)
SELECT
    run, name, plan->>'job' AS job, created, status, seed, device, world_size, git_commit, plan->>'goal' AS goal,
    plan->>'optimizer' AS optimizer, CAST(plan->>'batch_size' AS BIGINT) AS batch_size,
    CAST(plan->>'micro_batch' AS BIGINT) AS micro_batch, CAST(plan->>'learning_rate' AS DOUBLE) AS learning_rate,
    TRY_CAST(CASE WHEN json_exists(summary, '$.predicted_steps') THEN summary->>'predicted_steps'
        WHEN coalesce(plan->>'batch_schedule', 'fixed') = 'fixed'
            AND coalesce(planned->>'batch_size' = plan->>'batch_size', true)
            AND coalesce(planned->>'optimizer' = plan->>'optimizer', true) THEN plan->'predicted_steps'->>'value'
    END AS DOUBLE) AS predicted_steps,
    coalesce(steps, 0) AS steps, coalesce(examples, 0) AS examples, coalesce(seconds, 0.0) AS seconds,
    CAST(summary->>'target_step' AS BIGINT) AS target_step,
    CAST(summary->>'target_seconds' AS DOUBLE) AS target_seconds,
    coalesce(skipped_steps, 0) AS skipped_steps
FROM told LEFT JOIN taken USING (run)
"""


def query(folder: str | Path, sql: str = OVERVIEW) -> list[dict[str, Any]]:
    """The rows that `sql` selects from the runs at and under `folder`, one dict a row, in order.

    The table `runs` has one row a run, `steps` one row an update; `run`, the folder's path under `folder` ("" for
    itself), is in both. Units: examples and seconds. Lines that are still being written are left out. The query
    sees these two tables and nothing else of the machine.

    Raises `InputError` where there is no run, or DuckDB refuses the query.
    """
    import duckdb

    root = Path(folder).resolve()
    files = sorted(str(path) for path in root.rglob(RUN_FILE)) if root.is_dir() else []
    if not files:
        raise InputError(f"no run at or under {folder}: a run folder has a {RUN_FILE}")
    with duckdb.connect(":memory:", config={"autoinstall_known_extensions": "false"}) as connection:
        try:
            _load(connection, root, files)
            connection.execute("SET enable_external_access = false; SET lock_configuration = true")
            result = connection.execute(sql)
            names = [column[0] for column in result.description or ()]
            rows = result.fetchall()
        except duckdb.Error as error:
            raise InputError(f"DuckDB: {str(error).splitlines()[0]}") from None
    if len(set(names)) < len(names):
        raise InputError(f"the query gives two columns one name: {names}; tell them apart with AS")
    return [dict(zip(names, map(_plain, row), strict=True)) for row in rows]


def _load(connection: duckdb.DuckDBPyConnection, root: Path, files: list[str]) -> None:
    steps = [str(path) for path in (Path(file).with_name(STEPS_FILE) for file in files) if path.exists()]
    connection.execute(_EMPTY)
    if steps:
        connection.execute(_STEPS, {"root": str(root), "files": steps})
    connection.execute(_RUNS, {"root": str(root), "files": files})


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)
