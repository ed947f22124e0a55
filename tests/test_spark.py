"""The registered model as a Spark UDF, where pyspark (and Java) is installed: the lines of docs/inference.md."""

import re
import sys
import zipfile

import pandas as pd
import pytest
from conftest import ROOT, copy_project, output_of, run, use_project

pytestmark = pytest.mark.slow


def test_a_spark_job_predicts_what_cxr_predict_does(demo_project, tmp_path, monkeypatch):
    pytest.importorskip("pyspark")
    project = copy_project(demo_project, tmp_path / "project")
    use_project(project, monkeypatch)
    with zipfile.ZipFile("data/raw.zip") as archive:
        archive.extractall("radiographs")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/inference.md").read_text(), re.DOTALL)
    (script,) = (block for block in blocks if "spark_udf" in block)
    script = script.replace("http://127.0.0.1:5000", f"sqlite:///{project / 'mlflow.db'}")
    completed = run(project, sys.executable, "-c", script, PYSPARK_PYTHON=sys.executable, SPARK_LOCAL_IP="127.0.0.1")
    assert completed.returncode == 0, completed.stderr
    predicted = pd.read_parquet("predicted-by-spark").sort_values("file", ignore_index=True)
    output_of("cxr predict radiographs/test --csv predicted.csv")
    expected = pd.read_csv("predicted.csv", dtype={"version": str}).sort_values("file", ignore_index=True)
    assert list(predicted["file"]) == [f"file:{project / name}" for name in expected["file"]]
    assert len(predicted) > 0
    columns = ["probability", "label", "prevalence", "version"]
    # The last bits depend on the size of a batch.
    pd.testing.assert_frame_equal(predicted[columns], expected[columns], check_dtype=False, rtol=0, atol=5e-6)
